"""What a file holds, of every format and generation: layers and weights by name, their state, iterations, options."""

import io
import json
import re
import shutil
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

pytest.importorskip("h5py", reason="needs the extra 'keras'")

import h5py
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras_memory import layer_of
from keras_stored import (
    DATA,
    KERNEL,
    SCHEDULE,
    WITH_STATE,
    assert_is,
    assert_refused,
    assert_untouched,
    build,
    datasets,
    edited,
    renamed,
    replaced,
    sequential,
    truth,
    with_json,
    with_options,
    with_state_names,
    zipped,
)

from torch_adadelta.keras import KerasFileError, checkpoints, hdf5, load_keras
from torch_adadelta.keras.checkpoints import KERAS3, LEGACY, NEW, Checkpoint, opened
from torch_adadelta.keras.config import ModelConfig
from torch_adadelta.keras.errors import Stored

pytestmark = pytest.mark.filterwarnings("ignore:.*not in the file, so that training goes on")

# ---- Recorded files -------------------------------------------------------------------------------------------------

GENERATIONS: Final = {"tf24": LEGACY, "legacy": LEGACY, "new": NEW, "k3": KERAS3}


@pytest.mark.parametrize(("generation", "name"), [(g, name) for g, names in WITH_STATE.items() for name in names])
def test_recorded_files_bring_the_true_state(generation: str, name: str) -> None:
    model, optimizer = build()
    load_keras(DATA / name, optimizer, model, weights=True)
    iterations, square_avgs, acc_deltas = truth(generation)
    assert optimizer.iterations == iterations == 4
    for param, square_avg, acc_delta in zip(model.parameters(), square_avgs, acc_deltas, strict=True):
        assert_is(optimizer.state[param]["square_avg"], square_avg.T)
        assert_is(optimizer.state[param]["acc_delta"], acc_delta.T)
    weights = datasets(DATA / f"{generation}.h5")
    kernel = next(value for key, value in weights.items() if key.endswith(("d1/kernel", "d1/kernel:0")))
    assert_is(model[0].weight, kernel.T)
    if name != "new.weights.h5":  # which holds no learning rate
        assert optimizer.learning_rate == 0.5
    with opened(DATA / name) as checkpoint:
        assert checkpoint.generation == GENERATIONS[generation]
        kind = ".weights.h5" if "weights" in name else Path(name).suffix if "tfck" not in name else ""
        assert checkpoint.format == (kind or "TensorFlow checkpoint")
        assert checkpoint.source.startswith(f"{checkpoint.format} of ")
        paths = ["dense", "dense_1"] if name == "new.weights.h5" else ["d1", "d2"]
        assert [layer.path for layer in checkpoint.layers] == paths
        assert [v.role for _, v in checkpoint.variables()] == ["kernel", "bias"] * 2
        options = {} if "h5" in kind and kind != ".h5" else {"rho", "epsilon"} & checkpoint.hyperparameters.keys()
        assert options == {".h5": {"rho", "epsilon"}, ".keras": options, "": options}.get(kind, {})


@pytest.mark.parametrize("name", ["legacy.keras", "legacy.weights.h5"])
def test_files_without_state_say_which_to_save(name: str) -> None:
    assert_refused(DATA / name, r"holds no state of an Adadelta.*Save with model\.save\('model\.h5'\)")


@pytest.mark.usefixtures("probed")
def test_a_process_looks_first_whether_hdf5_survives_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "probe.py").write_text("import sys; sys.exit('looked')")
    monkeypatch.setattr(hdf5, "_PROBE", tmp_path / "probe.py")
    for name in ("tf24.h5", "k3.keras", "k3.weights.h5"):
        assert_refused(DATA / name, r"no file of Keras \(looked\)")


# ---- What is read of a file -----------------------------------------------------------------------------------------


def checkpoint_of(iterations: Any, *layers: str, config: Any = None, is_ordered: bool = True) -> Checkpoint:
    array = np.asarray(iterations)
    stored = Stored("iter", array.shape, array.dtype, lambda: array)
    own = [layer_of(path, "Dense", {}, {"kernel": np.ones((2, 2))}) for path in layers]
    model = None if config is None else ModelConfig(config)
    return Checkpoint(Path("m"), ".h5", KERAS3, own, stored, {}, model, is_ordered=is_ordered)


def test_iterations_are_one_number() -> None:
    for value in (np.int64(7), np.array([7], "i4"), np.uint64(2**63 - 1), np.int64(0)):
        assert checkpoint_of(value).count() == int(np.ravel(value)[0])
    for value, message in (
        (np.int64(-1), "its iterations are -1"),
        (np.uint64(2**63), "its iterations are 9223372036854775808"),
        (np.float32(7), "have shape .* and float32"),
        (np.array([7, 8]), r"have shape \(2,\)"),
    ):
        with pytest.raises(KerasFileError, match=message):
            checkpoint_of(value).count()


def test_layers_come_in_the_order_of_the_model() -> None:
    config = sequential(("a", "Dense", {}), ("b", "SeparableConv1D", {}), ("c", "Dense", {}))
    paths = ["c", "b/pointwise", "a"]

    def order(**options: Any) -> list[str] | None:
        checkpoint = checkpoint_of(0, *paths, **options)
        found = checkpoint.in_order(checkpoint.layers)
        return None if found is None else [layer.path for layer in found]

    assert order(config=config) == ["a", "b/pointwise", "c"]
    assert order() == paths
    assert order(is_ordered=False) is None
    assert order(config={"class_name": "Net", "config": {}}) == paths
    renamed = sequential(("a", "Dense", {}), ("b", "Dense", {}), ("other", "Dense", {}))
    assert (order(config=renamed), order(config=renamed, is_ordered=False)) == (paths, None)


@pytest.mark.parametrize("name", ["k3.keras", "k3.h5", "new.keras", "new.h5"])
def test_a_configuration_that_is_given_takes_the_place_of_that_in_the_file(name: str) -> None:
    with opened(str(DATA / name)) as checkpoint:
        given = sequential(*((layer.path, layer.class_name, {"mark": 1}) for layer in checkpoint.layers))
        assert not any("mark" in layer.config for layer in checkpoint.layers)
    with opened(DATA / name, given) as checkpoint:
        assert all("mark" in layer.config for layer in checkpoint.layers)


def test_an_array_of_another_shape_than_it_said_is_damage() -> None:
    stored = Stored("x", (2,), np.dtype("f4"), lambda: np.zeros(3))
    with pytest.raises(KerasFileError, match=r"m: x has shape \(3,\), not \(2,\)"):
        checkpoints.explained(checkpoint_of(0), stored)
    for error in (
        *(OSError("bad"), MemoryError(), RecursionError(), KeyError("x"), AssertionError(), EOFError()),
        *(AttributeError(), NotImplementedError(), OverflowError(), TypeError(), ValueError(), zipfile.BadZipFile()),
    ):
        with pytest.raises(KerasFileError, match=rf"m: it is damaged, or no file of Keras \({type(error).__name__}"):
            raise_as_damage(error)
    for error in (FileNotFoundError(), ImportError(), IsADirectoryError(), PermissionError(), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            raise_as_damage(error)


def raise_as_damage(error: BaseException) -> None:
    with checkpoints.damage_named(Path("m")):
        raise error


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dense/kernel/accum_grad", ("square_avg", "dense/kernel")),
        ("Adadelta/dense/kernel/accum_var", ("acc_delta", "Adadelta/dense/kernel")),
        ("Adadelta/accumulated_grad/dense/kernel", ("square_avg", "dense/kernel")),
        ("accumulated_delta_var/dense/kernel", ("acc_delta", "dense/kernel")),
        ("adadelta/dense_kernel_accumulated_grad", ("square_avg", "dense_kernel")),
        ("adadelta/dense_kernel_accumulated_delta_var", ("acc_delta", "dense_kernel")),
        ("Adadelta/average/dense/kernel", ("average", "dense/kernel")),
        ("adadelta/dense_kernel_average", ("average", "dense_kernel")),
        ("adadelta/dense_kernel_gradient_accumulator", ("gradient_accumulator", "dense_kernel")),
        ("dense/kernel/momentum", ("", "")),
        ("dense/kernel/accum_grad/norm", ("", "")),
        ("adadelta/dense_kernel_average_of_all", ("", "")),
    ],
)
def test_names_of_state(name: str, expected: tuple[str, str]) -> None:
    assert checkpoints._slot(name) == expected


OWN: Final = "Adadelta/d1/kernel/accum_"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (renamed(f"{OWN}grad:0", "Adadelta/d3/kernel/accum_grad:0"), "Adadelta/d3/kernel/accum_grad, which belongs to no"),
        (renamed(f"{OWN}grad:0", f"{OWN}sum:0"), "accum_sum, which belongs to no weight of the model"),
        (renamed(f"{OWN}grad:0", "d1/kernel/accum_var:0"), "acc_delta of d1/kernel twice"),
        (renamed(f"{OWN}grad:0", "Adadelta/average/d1/kernel:0"), r"moving averages.*drop=\{'ema'\}"),
        (renamed(f"{OWN}grad:0", "d1_kernel_gradient_accumulator:0"), r"drop=\{'gradient_accumulation'\}"),
        (renamed("Adadelta/iter:0", "Adadelta/steps:0"), "Adadelta/steps|has no iterations"),
        (with_state_names("Adadelta/iter:0"), "no step was taken"),
        (with_state_names("Adadelta/iter:0", f"{OWN}grad:0"), "square_avg of d1/kernel, and not acc_delta"),
        (lambda f: f.pop("optimizer_weights"), "the model was saved without its optimizer"),
        (lambda f: f.attrs.pop("training_config"), "the model was saved without its optimizer"),
        (lambda f: f.move("model_weights", "other"), "no .weights.h5|which is no weight"),
        (lambda f: (f.pop("model_weights"), f.attrs.update(layer_names=[b"d1"])), "it holds weights only, as save_weights"),
        (replaced(KERNEL, -np.ones((3, 2), "f4")), "has negative numbers"),
        (replaced(KERNEL, np.ones((2, 3), "f4")), r"has shape \(2, 3\), its weight d1/kernel \(3, 2\)"),
        (replaced(KERNEL, np.ones((3, 2), "i4")), "has dtype int32, which no state has"),
        (with_options(class_name="Adam"), "its optimizer is Adam, not Adadelta"),
        (with_options(use_ema=True), r"drop=\{'ema'\}"),
        (lambda f: f.attrs.modify("training_config", "{"), "training_config is no JSON"),
        (lambda f: f.attrs.modify("model_config", "[]"), "model_config is a list"),
        (with_json("training_config", lambda c: c.update(loss={"class_name": "__lambda__"})), "its training configuration has"),
        (with_json("model_config", lambda c: c["config"]["layers"].append(3)), "a layer that is none"),
    ],
    ids=range(21),
)  # fmt: skip
def test_an_h5_file_that_is_not_whole_is_refused(edit: Any, message: str, tmp_path: Path) -> None:
    assert_refused(edited(tmp_path, edit), message)


def test_what_may_be_left_out_is(tmp_path: Path) -> None:
    path = edited(tmp_path, renamed(f"{OWN}grad:0", "Adadelta/average/d1/kernel:0", is_copied=True))
    assert_refused(path, r"drop=\{'ema'\}", drop={"gradient_accumulation"})
    model, optimizer = build()
    report = load_keras(path, optimizer, model, drop={"ema"})
    assert report.notes == ["left out: moving averages of the weights (use_ema)"]
    assert_is(optimizer.state[model[0].weight]["square_avg"], truth("tf24")[1][0].T)
    lambda_layer = {"class_name": "Lambda", "config": {"name": "scale", "function": ["4wEAAAA=", None, None]}}
    path = edited(tmp_path, with_json("model_config", lambda config: config["config"]["layers"].append(lambda_layer)))
    assert_refused(path, r"its model has a lambda \('scale'\)")
    load_keras(path, optimizer, model, drop={"lambda"})
    code = {"class_name": "__lambda__", "config": {"value": "4wEAAAA="}}
    assert_refused(
        zipped(tmp_path, config=lambda data: json.dumps({**json.loads(data), "extra": [code]}).encode()), "a lambda"
    )
    for options in ({"drop": "ema"}, {"drop": {"momentum"}}):
        with pytest.raises(ValueError, match="drop must be a set of ema, weight_decay, gradient_accumulation, lambda"):
            load_keras(path, optimizer, model, **options)


def test_a_learning_rate_that_is_a_variable_comes_before_the_configuration(tmp_path: Path) -> None:
    """The new classes have one in the file, which a callback may have changed."""
    name = "optimizer_weights/adadelta/learning_rate"
    for rate, options in ((0.125, {}), (np.nan, {"message": "is nan"})):
        path = edited(tmp_path, replaced(name, np.float32(rate)), "k3.h5")
        if options:
            assert_refused(path, **options)
        else:
            model, optimizer = build()
            load_keras(path, optimizer, model)
            assert optimizer.learning_rate == 0.125
    with opened(
        edited(tmp_path, with_options(learning_rate=SCHEDULE), "k3.h5")
    ) as checkpoint:  # but not before a schedule
        assert checkpoint.hyperparameters["learning_rate"] == SCHEDULE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -1.0}, "Invalid learning_rate: -1.0"),
        ({"learning_rate": float("nan")}, "Invalid learning_rate: nan"),
        ({"learning_rate": "fast"}, "learning_rate must be"),
        ({"learning_rate": {"class_name": "Mine", "config": {}}}, "its learning-rate schedule cannot be made"),
        ({"learning_rate": {"class_name": "os.system", "config": {"command": "false"}}}, "cannot be made"),
        ({"rho": 2}, "Invalid rho"),
        ({"clipnorm": 1.0, "global_clipnorm": 1.0}, "Cannot accept both"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert_refused(edited(tmp_path, with_options(**options)), message)


# ---- Archives -------------------------------------------------------------------------------------------------------


def test_zip_bombs_are_not_unpacked(tmp_path: Path) -> None:
    path = zipped(tmp_path, zipfile.ZIP_DEFLATED, model=bytes(50_000_000))
    assert path.stat().st_size < 100_000
    assert_refused(path, "made to exhaust the memory")
    # A directory that claims less than the member unpacks to.
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    assert struct.unpack_from("<I", data, at + 24)[0] == 50_000_000
    struct.pack_into("<I", data, at + 24, 1000)
    path.write_bytes(bytes(data))
    assert_refused(path)


def without_optimizer(data: bytes) -> bytes:
    buffer = io.BytesIO(data)
    with h5py.File(buffer, "r+") as file:
        del file["optimizer"]
    return buffer.getvalue()


def test_archives_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    for names, message in (
        (["config.json"], r"has no model\.weights\.h5"),
        (["model.weights.h5"], r"or no config\.json"),
        (["config.json", "config.json"], "has a file twice"),
    ):
        with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zipfile's own, of the name that comes twice
            for name in names:
                archive.writestr(name, "{}")
        assert_refused(path, message)
    for members, message in (
        ({"model": b"no HDF5"}, "damaged"),
        ({"config": b"{"}, "config.json is no JSON"),
        ({"metadata": b"[]"}, "metadata.json is a list"),
        ({"config": b'{"class_name": "Sequential", "config": {"layers": [3]}}'}, "a layer that is none"),
        ({"method": zipfile.ZIP_LZMA}, "compressed in a way that Keras does not use"),
    ):
        assert_refused(zipped(tmp_path, **members), message)
    assert_refused(
        zipped(tmp_path, model=without_optimizer), r"it has no group optimizer.*Save with model\.save, or tf"
    )
    data = bytearray(zipped(tmp_path).read_bytes())
    for signature, at in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        for found in re.finditer(re.escape(signature), bytes(data)):
            data[found.start() + at] |= 1
    path.write_bytes(data)
    assert_refused(path, r": \w+\.json is encrypted$")
    with zipfile.ZipFile(DATA / "k3.keras") as whole, zipfile.ZipFile(path, "w") as archive:
        for name in ("config.json", "model.weights.h5"):
            archive.writestr(name, whole.read(name))
    with opened(path) as checkpoint:  # what the metadata say, the names in it do, too
        assert checkpoint.generation == KERAS3
    path.write_bytes(b"something else")
    assert_refused(path, "it is no .h5, .keras or .weights.h5 file")
    assert_refused(tmp_path, "the directory holds no TensorFlow checkpoint")
    model, optimizer = build()
    with pytest.raises(FileNotFoundError):
        load_keras(DATA / "nothing.h5", optimizer, model)


def test_the_optimizer_of_a_keras_file(tmp_path: Path) -> None:
    def compiled(optimizer: Any) -> Path:
        change = lambda data: json.dumps({**json.loads(data), "compile_config": {"optimizer": optimizer}}).encode()  # noqa: E731
        return zipped(tmp_path, config=change)

    options = {"class_name": "Adadelta", "config": {"rho": 0.75, "epsilon": 1e-3}}
    for optimizer, expected in ((options, {"rho": 0.75, "epsilon": 1e-3}), ("adadelta", {}), (None, {})):
        with opened(compiled(optimizer)) as checkpoint:
            assert checkpoint.hyperparameters == {**expected, "learning_rate": 0.5}
    assert_refused(compiled("adam"), "its optimizer is Adam, not")
    assert_refused(compiled({**options, "module": "keras.optimizers.legacy"}), "with the legacy optimizers of tf_keras")


# ---- Checkpoints of TensorFlow --------------------------------------------------------------------------------------


def test_a_missing_or_short_data_file_is_refused(tmp_path: Path) -> None:
    source = DATA / "tf24_tfck"
    shutil.copy(source / "w.index", tmp_path)
    assert_refused(tmp_path / "w", r"its data file w\.data-00000-of-00001 is missing")
    data = (source / "w.data-00000-of-00001").read_bytes()
    (tmp_path / "w.data-00000-of-00001").write_bytes(data[:100])
    assert_refused(tmp_path / "w")


def test_state_order_and_the_names_of_state_exclude_each_other() -> None:
    for name in ("k3.h5", "tf24_tfck/w"):
        assert_refused(DATA / name, "state_order is for files that number the state", state_order=["d1/kernel"])


# ---- Damage at random -----------------------------------------------------------------------------------------------

FUZZED: Final = {"tf24.h5": 8, "k3.keras": 8, "new.weights.h5": 6, "tf24_tfck2/c-1": 60, "new_tfck2/c-1": 60}


@st.composite
def damage(draw: Any, data: bytes) -> bytes:
    """Cut off, with some bytes or a stretch overwritten, or with a stretch doubled or left out."""
    changed, places = bytearray(data), st.integers(0, len(data) - 1)
    kind = draw(st.sampled_from(["cut", "bytes", "number", "ones", "double", "leave out"]))
    at, length = draw(places), draw(st.integers(1, 200))
    if kind == "cut":
        del changed[at:]
    elif kind == "bytes":
        for place, byte in draw(st.dictionaries(places, st.integers(0, 255), min_size=1, max_size=30)).items():
            changed[place] = byte
    elif kind == "number":
        changed[at : at + 8] = draw(st.binary(min_size=8, max_size=8))[: len(changed[at : at + 8])]
    elif kind == "ones":
        changed[at : at + 64] = b"\xff" * len(changed[at : at + 64])
    elif kind == "double":
        changed[at : at + length] = changed[at : at + length] * 2
    else:
        del changed[at : at + length]
    return bytes(changed)


@pytest.mark.usefixtures("probed")
@pytest.mark.parametrize("name", FUZZED)
def test_a_damaged_file_ends_in_an_error_or_brings_a_valid_state(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damage that nothing tells, such as another digit of a weight in HDF5, which has no checksums, may pass."""
    monkeypatch.setattr("torch_adadelta.keras.hdf5.PROBE_SECONDS", 5)
    path = DATA / name
    originals = {
        p.name: p.read_bytes() for p in ([path] if path.is_file() else sorted(path.parent.glob(f"{path.name}.*")))
    }
    victims = st.sampled_from(list(originals)).flatmap(
        lambda victim: st.tuples(st.just(victim), damage(originals[victim]))
    )

    @settings(
        max_examples=FUZZED[name],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(victims)
    def check(damaged: tuple[str, bytes]) -> None:
        for other, data in (originals | {damaged[0]: damaged[1]}).items():
            (tmp_path / other).write_bytes(data)
        model, optimizer = build(learning_rate=0.125)
        before = [param.clone() for param in model.parameters()]
        try:
            load_keras(tmp_path / path.name, optimizer, model, weights=True)
        except KerasFileError:
            assert_untouched(model, optimizer, before)
            return
        for param in model.parameters():
            assert not any((tensor < 0).any() for tensor in optimizer.state[param].values())
        if "tfck" in name:  # which has a checksum on every byte that counts
            iterations, *slots = truth(name.partition("_")[0])
            assert optimizer.iterations == iterations
            for param, *arrays in zip(model.parameters(), *slots, strict=True):
                for tensor, array in zip(optimizer.state[param].values(), arrays, strict=True):
                    assert_is(tensor, array.T)

    check()
