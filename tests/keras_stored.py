"""Files of Keras for the tests of `torch_adadelta.keras`: recorded, edited, or written here without Keras; needs h5py."""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torch_adadelta import AdadeltaKeras
from torch_adadelta.keras import KerasFileError, load_keras
from torch_adadelta.keras.checkpoints import opened

DATA: Final = Path(__file__).resolve().parent / "data" / "keras"

# The recorded files with state, by the generation of Keras; each has its truth beside it.
WITH_STATE: Final = {
    "tf24": ["tf24.h5", "tf24_tfck/w", "tf24_tfck2/c-1", "tf24_tfck", "tf24_tfck2/c-1.index"],
    "legacy": ["legacy.h5", "legacy_tfck/w", "legacy_tfck2/c-1"],
    "new": ["new.h5", "new.keras", "new.weights.h5", "new_tfck/w", "new_tfck2/c-1"],
    "k3": ["k3.h5", "k3.keras", "k3.weights.h5"],
}
WRITABLE: Final = [name for names in WITH_STATE.values() for name in names if "tfck" not in name]

# A dataset of tf24.h5.
KERNEL: Final = "optimizer_weights/Adadelta/d1/kernel/accum_grad:0"

CLIPPING: Final = ("clipvalue", "clipnorm", "global_clipnorm")
SCHEDULE: Final = {
    "class_name": "ExponentialDecay",
    "config": {"initial_learning_rate": 3.0, "decay_steps": 5, "decay_rate": 0.5, "staircase": True},
}

Weights = dict[str, np.ndarray]


def build(**options: Any) -> tuple[nn.Sequential, AdadeltaKeras]:
    """The model of the recorded files, and an optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    return model, AdadeltaKeras(model.named_parameters(), **options)


def convolutional() -> nn.Sequential:
    """The model of the files in old/."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.BatchNorm2d(4, eps=1e-3, momentum=0.01), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(24, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3),
    )  # fmt: skip


def truth(generation: str) -> tuple[int, list[np.ndarray], list[np.ndarray]]:
    """Iterations, accum_grad and accum_var of kernel and bias of d1 and d2, as Keras has them."""
    arrays = list(np.load(DATA / f"{generation}_truth.npz").values())
    count, rest = int(arrays[0]), arrays[2 if generation == "k3" else 1 :]
    return (count, rest[:4], rest[4:]) if generation in ("tf24", "legacy") else (count, rest[::2], rest[1::2])


def datasets(path: Path) -> dict[str, np.ndarray]:
    """All datasets of an .h5, .keras or .weights.h5 file, by their paths."""
    source: Any = path
    if zipfile.is_zipfile(path):
        source = io.BytesIO(zipfile.ZipFile(path).read("model.weights.h5"))
    found = {}
    with h5py.File(source, "r") as file:
        file.visititems(
            lambda name, item: found.__setitem__(name, item[()]) if isinstance(item, h5py.Dataset) else None
        )
    return found


def assert_same_datasets(path: Path, other: Path) -> None:
    before, after = datasets(path), datasets(other)
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value, err_msg=key, strict=True)


def written_config(path: Path) -> dict[str, Any]:
    if zipfile.is_zipfile(path):
        return json.loads(zipfile.ZipFile(path).read("config.json"))["compile_config"]["optimizer"]["config"]
    with h5py.File(path, "r") as file:
        return json.loads(file.attrs["training_config"])["optimizer_config"]["config"]


# ---- Edited ---------------------------------------------------------------------------------------------------------


def edited(tmp_path: Path, edit: Callable[[Any], Any], name: str = "tf24.h5") -> Path:
    """A copy of a recorded HDF5 file in which something is another."""
    path = tmp_path / f"edited.{name.partition('.')[2]}"
    path.write_bytes((DATA / name).read_bytes())
    with h5py.File(path, "r+") as file:
        edit(file)
    return path


def zipped(tmp_path: Path, method: int = zipfile.ZIP_STORED, **members: bytes | Callable[[bytes], bytes]) -> Path:
    """A copy of k3.keras in which members ("config", "metadata", "model") are others."""
    path = tmp_path / "edited.keras"
    with zipfile.ZipFile(DATA / "k3.keras") as old, zipfile.ZipFile(path, "w", method) as new:
        for info in old.infolist():
            data = old.read(info)
            change = members.get(info.filename.partition(".")[0])
            new.writestr(info.filename, change(data) if callable(change) else data if change is None else change)
    return path


def replaced(name: str, value: Any = None, **options: Any) -> Callable[[Any], None]:
    """An edit: another dataset in the place of one."""

    def edit(file: Any) -> None:
        del file[name]
        file.create_dataset(name, data=value, **options)

    return edit


def state_names(file: Any) -> list[str]:
    names = file["optimizer_weights"].attrs["weight_names"]
    return [name if isinstance(name, str) else name.decode() for name in names]


def with_state_names(*names: str) -> Callable[[Any], None]:
    """An edit: the state that is said to be there."""
    return lambda file: file["optimizer_weights"].attrs.update(weight_names=[name.encode() for name in names])


def without_state(part: str) -> Callable[[Any], None]:
    """An edit: no state of the weights with this in their names."""
    return lambda file: with_state_names(*(name for name in state_names(file) if part not in name))(file)


def renamed(old: str, new: str, is_copied: bool = False) -> Callable[[Any], None]:
    """An edit: a state of another name, or one more."""

    def edit(file: Any) -> None:
        states, names = file["optimizer_weights"], state_names(file)
        states[new] = states[old][()]
        names = [*names, new] if is_copied else [new if name == old else name for name in names]
        with_state_names(*names)(file)

    return edit


def with_json(attribute: str, change: Callable[[Any], Any]) -> Callable[[Any], None]:
    """An edit of a configuration: "model_config" or "training_config"."""

    def edit(file: Any) -> None:
        config = json.loads(file.attrs[attribute])
        change(config)
        file.attrs[attribute] = json.dumps(config)

    return edit


def with_options(class_name: str = "Adadelta", **options: Any) -> Callable[[Any], None]:
    """An edit of the configuration of the optimizer."""

    def change(training: Any) -> None:
        training["optimizer_config"]["config"].update(options)
        training["optimizer_config"]["class_name"] = class_name

    return with_json("training_config", change)


def assert_refused(path: Path, message: str | None = None, **options: Any) -> None:
    """The file ends in a KerasFileError, and optimizer and model are as they were."""
    model, optimizer = build(learning_rate=0.125)
    before = [param.clone() for param in model.parameters()]
    with pytest.raises(KerasFileError, match=message):
        load_keras(path, optimizer, model, weights=True, **options)
    assert_untouched(model, optimizer, before)


def assert_untouched(model: nn.Module, optimizer: AdadeltaKeras, before: list[Tensor]) -> None:
    assert (optimizer.iterations, optimizer.learning_rate, dict(optimizer.state)) == (0, 0.125, {})
    assert all(map(torch.equal, model.parameters(), before))


# ---- Written --------------------------------------------------------------------------------------------------------


def write_h5(path: Path, layers: dict[str, Weights], config: Any = None, **optimizer: Any) -> Path:
    """A file as the legacy class writes it. A state is the square of its weight, and half of it."""
    options = {"name": "Adadelta", "learning_rate": 1.0, "decay": 0.0, "rho": 0.95, "epsilon": 1e-7, **optimizer}
    training = {"optimizer_config": {"class_name": "Adadelta", "config": options}}
    with h5py.File(path, "w") as file:
        file.attrs["keras_version"] = "2.4.0"
        file.attrs["training_config"] = json.dumps(training)
        if config is not None:
            file.attrs["model_config"] = json.dumps(config)
        file.create_group("model_weights").attrs["layer_names"] = [name.encode() for name in layers]
        state: dict[str, Any] = {"Adadelta/iter:0": np.int64(3)}
        for layer, weights in layers.items():
            group = file["model_weights"].create_group(layer)
            group.attrs["weight_names"] = [f"{layer}/{name}:0".encode() for name in weights]
            for name, value in weights.items():
                group[f"{layer}/{name}:0"] = value
                if not name.startswith("moving"):
                    state[f"Adadelta/{layer}/{name}/accum_grad:0"] = value**2
                    state[f"Adadelta/{layer}/{name}/accum_var:0"] = value**2 / 2
        group = file.create_group("optimizer_weights")
        group.attrs["weight_names"] = [name.encode() for name in state]
        for name, value in state.items():
            group[name] = value
    return path


def dense(inputs: int, outputs: int, seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)
    return {"kernel": rng.standard_normal((inputs, outputs)), "bias": rng.standard_normal(outputs)}


def recurrent(inputs: int, units: int, gates: int, bias: tuple[int, ...]) -> Weights:
    rng = np.random.default_rng(0)
    kernels = {
        "kernel": rng.standard_normal((inputs, gates * units)),
        "recurrent_kernel": rng.standard_normal((units, gates * units)),
    }
    return {f"cell/{name}": value for name, value in {**kernels, "bias": rng.standard_normal(bias)}.items()}


def attention() -> Weights:
    rng = np.random.default_rng(0)
    shapes = {"kernel": (4, 2, 2), "bias": (2, 2)}
    parts = {f"{p}/{r}": rng.standard_normal(s) for p in ("query", "key", "value") for r, s in shapes.items()}
    return {
        **parts,
        "attention_output/kernel": rng.standard_normal((2, 2, 4)),
        "attention_output/bias": rng.standard_normal(4),
    }


def sequential(*layers: tuple[str, str, dict[str, Any]]) -> dict[str, Any]:
    """A configuration of layers by name, class and options."""
    entries = [{"class_name": cls, "config": {"name": name, **options}} for name, cls, options in layers]
    return {"class_name": "Sequential", "config": {"name": "sequential", "layers": entries}}


def layers_of(path: Path, **options: Any) -> dict[str, list[str]]:
    """The roles of the weights of each layer, by its path, with its class."""
    with opened(path, **options) as checkpoint:
        return {f"{layer.path} {layer.class_name}": [v.role for v in layer.variables] for layer in checkpoint.layers}


class Net(nn.Module):
    """Modules by name, which run in an order that nobody knows."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.double()


def load(path: Path, model: nn.Module, **options: Any) -> AdadeltaKeras:
    """An optimizer of the model, after both took the file over."""
    optimizer = AdadeltaKeras(model.named_parameters())
    load_keras(path, optimizer, model, weights=True, **options)
    return optimizer


def assert_is(param: Tensor, array: np.ndarray) -> None:
    np.testing.assert_array_equal(param.detach().numpy(), array, strict=True)


def write_numbered(path: Path, groups: dict[str, list[tuple[int, ...]]], names: dict[str, str] | None = None) -> Path:
    """A .weights.h5 file of these shapes by group, whose optimizer has them in this order."""
    with h5py.File(path, "w") as file:
        arrays = [np.full(shape, 1, "f4") for shapes in groups.values() for shape in shapes]
        for number, array in enumerate([np.int64(3), np.float32(0.5), *(a for own in arrays for a in (own, own))]):
            file[f"optimizer/vars/{number}"] = array
        for group, shapes in groups.items():
            for number, shape in enumerate(shapes):
                file[f"{group}/vars/{number}"] = np.ones(shape, "f4")
            file[f"{group}/vars"].attrs["name"] = (names or {}).get(group, "")
    return path


def unpacked(name: str, folder: Path) -> Path:
    """The folder, with the files that an archive of recorded ones holds."""
    with tarfile.open(DATA / name) as archive:
        archive.extractall(folder, filter="data")
    return folder
