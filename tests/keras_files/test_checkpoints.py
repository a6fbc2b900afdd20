"""What a file holds, of every format and generation: layers and weights by name, their state, iterations, options."""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pytest

pytest.importorskip("h5py", reason="needs the extra 'keras'")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras_stored import (
    DATA,
    WITH_STATE,
    assert_is,
    assert_refused,
    assert_untouched,
    build,
    convolutional,
    datasets,
    sequential,
    truth,
)

from torch_adadelta import AdadeltaKeras
from torch_adadelta.keras import KerasFileError, hdf5, load_keras
from torch_adadelta.keras.checkpoints import opened
from torch_adadelta.keras.contents import KERAS3, LEGACY, NEW

pytestmark = pytest.mark.filterwarnings("ignore:.*not in the file, so that training goes on")

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


@pytest.mark.usefixtures("sandboxed")
def test_a_process_looks_first_whether_hdf5_survives_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hdf5_sandbox.py").write_text("import sys; sys.exit('looked')")
    monkeypatch.setattr(hdf5, "_SANDBOX", tmp_path / "hdf5_sandbox.py")
    for name in ("tf24.h5", "k3.keras", "k3.weights.h5"):
        assert_refused(DATA / name, r"no file of Keras \(looked\)")


@pytest.mark.parametrize("name", ["k3.keras", "k3.h5", "new.keras", "new.h5"])
def test_a_configuration_that_is_given_takes_the_place_of_that_in_the_file(name: str) -> None:
    with opened(str(DATA / name)) as checkpoint:
        given = sequential(*((layer.path, layer.class_name, {"mark": 1}) for layer in checkpoint.layers))
        assert not any("mark" in layer.config for layer in checkpoint.layers)
    with opened(DATA / name, given) as checkpoint:
        assert all("mark" in layer.config for layer in checkpoint.layers)


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


FUZZED: Final = {"tf24.h5": 8, "k3.keras": 8, "new.weights.h5": 6, "tf24_tfck2/c-1": 60, "new_tfck2/c-1": 60}
FUZZED_OLD: Final = {"old/keras-2.0.8.h5": 8, "old/keras-2.2.4-theano.h5": 8, "old/keras-2.3.1.h5": 8}


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


@pytest.mark.usefixtures("sandboxed")
@pytest.mark.parametrize("name", {**FUZZED, **FUZZED_OLD})
def test_a_damaged_file_ends_in_an_error_or_brings_a_valid_state(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damage that nothing tells, such as another digit of a weight in HDF5, which has no checksums, may pass."""
    monkeypatch.setattr("torch_adadelta.keras.hdf5.SANDBOX_SECONDS", 5)
    path = DATA / name
    originals = {
        p.name: p.read_bytes() for p in ([path] if path.is_file() else sorted(path.parent.glob(f"{path.name}.*")))
    }
    victims = st.sampled_from(list(originals)).flatmap(
        lambda victim: st.tuples(st.just(victim), damage(originals[victim]))
    )

    @settings(
        max_examples={**FUZZED, **FUZZED_OLD}[name],
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
        if name in FUZZED_OLD:
            model = convolutional()
            optimizer = AdadeltaKeras(model.named_parameters(), learning_rate=0.125)
        before = [param.clone() for param in model.parameters()]
        with suppress(KerasFileError):
            other_model, other_optimizer = build()
            load_keras(tmp_path / path.name, other_optimizer, other_model, weights=True, state=False)
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
