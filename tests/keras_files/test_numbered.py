"""``.keras`` and ``.weights.h5`` files, whose weights and state have numbers."""

import io
import json
import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("h5py", reason="needs the extra 'keras'")
import h5py
from keras_stored import (
    DATA,
    assert_refused,
    build,
    edited,
    layers_of,
    replaced,
    sequential,
    write_numbered,
    zipped,
)

from torch_adadelta.keras import KerasFileError, load_keras
from torch_adadelta.keras.checkpoints import opened
from torch_adadelta.keras.contents import KERAS3

pytestmark = pytest.mark.filterwarnings("ignore:.*not in the file, so that training goes on")


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


def test_parts_of_numbered_layers(tmp_path: Path) -> None:
    """Of a class that the group tells, or of none."""
    rnn = [(2, 12), (3, 12), (12,)]
    parts = ("query", "key", "value", "output")
    groups = {
        **{f"layers/bidirectional/{way}_layer/cell": rnn for way in ("forward", "backward")},
        **{f"attend/{part}_dense": [(2, 2, 4) if part == "output" else (4, 2, 2)] for part in parts},
        **{f"mine/{part}_dense": [(4, 4)] for part in parts},
    }
    for names in ({}, {"attend/query_dense": "q"}):
        with pytest.raises(
            KerasFileError, match="several orders of them fit"
        ):  # of those of mine, which are Dense layers
            layers_of(write_numbered(tmp_path / "m.weights.h5", groups, names))
    known = {group: shapes for group, shapes in groups.items() if "mine" not in group}
    more = {
        "alpha": [(5, 5)],
        "beta/forward": [(6, 6)],
        "one/forward_layer": [(7, 7)],
        "one/backward_layer": [(8, 8)],
        **{f"two/{way}_layer/cell": [(2, 16), (4, 16), (16,)] for way in ("forward", "backward")},
    }
    path = write_numbered(tmp_path / "m.weights.h5", {**known, **more})
    with opened(path) as checkpoint:
        assert {layer.path: layer.is_known for layer in checkpoint.layers} == {
            "alpha": False, "attend": True, "beta/forward": False, "bidirectional": True, "one": False, "two": True
        }  # fmt: skip
    roles = ["kernel", "recurrent_kernel", "bias"]
    assert layers_of(write_numbered(tmp_path / "m.weights.h5", known)) == {
        "attend None": [f"{part}/0" for part in parts],
        "bidirectional Bidirectional": [f"{way}/{role}" for way in ("forward", "backward") for role in roles],
    }
    private = {f"attend/_{part}_dense": groups[f"attend/{part}_dense"] for part in parts}  # as tf_keras names them
    assert layers_of(write_numbered(tmp_path / "m.weights.h5", private)) == {"attend None": [f"{p}/0" for p in parts]}
    wrapped = write_numbered(tmp_path / "m.weights.h5", {"layers/time_distributed/layer": [(2, 3), (3,)]})
    assert layers_of(wrapped) == {"time_distributed TimeDistributed": ["0", "1"]}


def test_layers_of_one_name_have_that_of_their_group(tmp_path: Path) -> None:
    groups = {"layers/dense": [(2, 3), (3,)], "net/dense": [(5, 5)], "out": [(4, 4)]}
    path = write_numbered(tmp_path / "m.weights.h5", groups, dict.fromkeys(groups, "same"))
    assert layers_of(path) == {"layers/dense Dense": ["kernel", "bias"], "net/same None": ["0"], "out None": ["0"]}
    path = write_numbered(tmp_path / "m.weights.h5", groups, {"layers/dense": "one", "out": "a/b"})
    assert layers_of(path) == {"one Dense": ["kernel", "bias"], "net/dense None": ["0"], "out None": ["0"]}


def test_layers_come_in_the_order_of_their_state(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "m.weights.h5", {"b": [(2, 3)], "a": [(4, 4)]})
    with opened(path) as checkpoint:
        assert ([layer.path for layer in checkpoint.layers], checkpoint.is_ordered) == (["b", "a"], True)
    with h5py.File(path, "r+") as file:
        file["aa/vars/0"] = np.ones((5, 5), "f4")
    with opened(path) as checkpoint:
        assert ([layer.path for layer in checkpoint.layers], checkpoint.is_ordered) == (["b", "a", "aa"], False)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda f: f.move("layers/dense/vars/1", "layers/dense/vars/2"),
            r"layers/dense has the weights \[0, 2\]; some are",
        ),
        (
            lambda f: f.move("layers/dense/vars/1", "layers/dense/vars/bias"),
            "it holds layers/dense/vars/bias, which is no",
        ),
        (lambda f: f.move("optimizer/vars/3", "optimizer/vars/99"), "some variables of its optimizer are missing"),
        (lambda f: f.move("optimizer/vars/3", "optimizer/vars/x"), "its optimizer holds x, which is no number"),
        (lambda f: f.move("optimizer", "optimizer/inner_optimizer"), "LossScaleOptimizer|it has no group optimizer"),
        (
            lambda f: f.create_group("optimizer/inner_optimizer"),
            "its LossScaleOptimizer has 10 variables, which do not fit the 0 of its",
        ),
        *(
            (
                lambda f, name=name: f["optimizer/vars"].attrs.update(name=name),
                f"its optimizer is {name.partition('_1')[0]}, not",
            )
            for name in (
                *(
                    "adam",
                    "adamw_1",
                    "adamax",
                    "nadam",
                    "rms_prop",
                    "rmsprop",
                    "adagrad",
                    "sgd_12",
                    "ftrl",
                    "lion",
                    "lamb",
                ),
                *("adafactor", "muon"),
            )
        ),
        (lambda f: [f.pop(f"optimizer/vars/{n}") for n in range(2, 10)], "no step was taken"),
        (lambda f: f.pop("optimizer"), "it has no group optimizer"),
        (lambda f: f.pop("layers"), "it holds no weights"),
        (lambda f: f.__setitem__("layers/loop", f["layers"]), "nested"),
        (replaced("optimizer/vars/0", np.float32(4)), "the first variable of its optimizer is not the iterations"),
    ],
    ids=range(24),
)
def test_a_file_of_numbers_that_is_not_whole_is_refused(edit: Any, message: str, tmp_path: Path) -> None:
    assert_refused(edited(tmp_path, edit, "k3.weights.h5"), message)


def test_other_groups_hold_no_weights(tmp_path: Path) -> None:
    def fill(file: Any) -> None:
        for group in (
            "metrics/mean/vars/0",
            *(
                f"{name}/vars/0"
                for name in ("compile_metrics", "_compile_metrics", "_metrics", "loss", "_loss_tracker")
            ),
            "layers/drop/seed_generator/vars/0",
        ):
            file[group] = np.ones(3, "f4")

    assert list(layers_of(edited(tmp_path, fill, "k3.weights.h5"))) == ["d1 Dense", "d2 Dense"]


def test_a_configuration_is_that_of_the_file(tmp_path: Path) -> None:
    config = sequential(("d1", "Dense", {}), ("d2", "Dense", {}))
    text = json.dumps(config)
    (tmp_path / "model.json").write_text(text)
    path = DATA / "k3.weights.h5"
    for given_config in (config, text, tmp_path / "model.json", str(tmp_path / "model.json")):
        with opened(path, given_config) as checkpoint:
            assert checkpoint.model is not None
            assert checkpoint.layers[0].class_name == "Dense"
    with pytest.raises(
        KerasFileError, match=r"it holds layers/dense_1, which is no layer of the model in its configura"
    ):
        layers_of(path, config=sequential(("d1", "Dense", {})))
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(KerasFileError, match=r"model\.json: config is no JSON"):
        layers_of(path, config=tmp_path / "model.json")
