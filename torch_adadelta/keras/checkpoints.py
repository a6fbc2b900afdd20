"""Reads what a file of Keras holds: its layers with their weights, the state of its Adadelta, and the hyperparameters.

Four generations (TensorFlow 2.4, the legacy and the new class of tf_keras, Keras 3) write four formats (``.h5``,
``.keras``, ``.weights.h5``, TensorFlow checkpoints), and what they hold falls in two classes:

- In ``.h5`` and TensorFlow checkpoints, weights and state have names, and a state names its weight.
- In ``.keras`` and ``.weights.h5`` both are numbered. Which weight the n-th state belongs to follows from the order of
  the layers, which is in the configuration of the model, or else from the shapes, if those leave one possibility.
"""

import json
import math
import re
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import numpy as np

from torch_adadelta.keras import config as configs
from torch_adadelta.keras.bundle import Bundle, Node, find_prefix
from torch_adadelta.keras.config import LayerConfig, ModelConfig
from torch_adadelta.keras.errors import MAX_EXPANSION, KerasFileError, Stored
from torch_adadelta.keras.hdf5 import Hdf5, probe, required
from torch_adadelta.keras.layers import ACCUMULATORS, Layer, Variable
from torch_adadelta.keras.state_order import assigned, natural
from torch_adadelta.step import accumulation, averages

LEGACY, NEW, KERAS3 = "legacy", "new", "keras3"
_GENERATIONS: Final = {
    LEGACY: "TensorFlow 2.4 or the legacy class of tf_keras",
    NEW: "the new class of tf_keras",
    KERAS3: "Keras 3",
}

_WEIGHTS: Final = "model.weights.h5"


@dataclass
class Checkpoint:
    """What a file holds. Arrays are read when they are asked for, while the file is open."""

    path: Path
    format: str
    generation: str  # LEGACY, NEW or KERAS3
    layers: list[Layer]
    iterations: Stored
    hyperparameters: dict[str, Any]  # those that the file has; a schedule as its configuration
    model: ModelConfig | None
    learning_rate: Stored | None = None  # the variable, where there is one
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what the hyperparameters mean elsewhere
    backend: str | None = None  # of Keras, where the file says
    is_ordered: bool = True  # whether the layers are known to be in the order of the model without its configuration

    def in_order(self, layers: Sequence[Layer]) -> list[Layer] | None:
        """Some of the layers in the order of the model; None if that is not known."""
        if self.model is not None and self.model.is_complete:
            order = {layer.path: number for number, layer in enumerate(self.model.layers)}
            places = [order.get(layer.path, order.get(layer.path.rpartition("/")[0])) for layer in layers]
            if None not in places:  # as it is of a layer that was renamed, in a file that has the old name
                ranked = sorted(zip(places, range(len(layers)), strict=True))
                return [layers[number] for _, number in ranked]
        return list(layers) if self.is_ordered else None

    @property
    def source(self) -> str:
        """The format and the generation, for people."""
        return f"{self.format} of {_GENERATIONS[self.generation]}"

    def variables(self) -> Iterator[tuple[Layer, Variable]]:
        """All weights with their layers."""
        yield from _variables(self.layers)

    def count(self) -> int:
        """The iterations.

        Raises:
            KerasFileError: they are no number that counts.
        """
        if math.prod(self.iterations.shape) != 1 or self.iterations.dtype.kind not in "iu":
            raise KerasFileError(f"its iterations have shape {self.iterations.shape} and {self.iterations.dtype}")
        count = int(self.iterations.read().reshape(()))
        if not 0 <= count < 2**63:
            raise KerasFileError(f"its iterations are {count}")
        return count


def _variables(layers: Iterable[Layer]) -> Iterator[tuple[Layer, Variable]]:
    for layer in layers:
        for variable in layer.variables:
            yield layer, variable


@contextmanager
def opened(
    path: str | Path,
    config: str | Path | Mapping[str, Any] | None = None,
    drop: Collection[str] = (),
    state_order: Sequence[str] | None = None,
    uses: Collection[str] = (),
) -> Iterator[Checkpoint]:
    """Opens a file of any kind that holds a model of Keras and the state of its Adadelta.

    Args:
        path: an ``.h5``, ``.keras`` or ``.weights.h5`` file; or the prefix, the index or the directory of a TensorFlow
            checkpoint; or a SavedModel.
        config: the configuration of the model, for files without it, or instead of theirs: what ``model.to_json()``
            returned, a file that holds it, or the dictionary.
        drop: what may be left out, of "ema", "weight_decay", "gradient_accumulation" and "lambda".
        state_order: the names of the weights in the order of the optimizer, for files that number its state.
        uses: what the optimizer used of "ema" and "gradient_accumulation", for those of these files that do not say.

    Raises:
        FileNotFoundError: there is no such file.
        KerasFileError: it is none of these, damaged, or without the state of an Adadelta.
        ImportError: it needs h5py, which is not installed.
    """
    if set(drop) - set(configs.DROPPABLE):
        raise ValueError(f"drop must be a set of {', '.join(configs.DROPPABLE)}; got {drop!r}")
    path = Path(path)
    closers: list[Any] = []
    try:
        with damage_named(path):
            checkpoint = _read(path, _given_config(config), drop, state_order, uses, closers)
        yield checkpoint
    finally:
        for closer in closers:
            closer.close()


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turns whatever a damaged file leads to into a KerasFileError that names it."""
    try:
        yield
    except KerasFileError as error:
        raise KerasFileError(f"{path}: {error}") from error
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        MemoryError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        zipfile.BadZipFile,
        EOFError,
    ) as error:
        raise KerasFileError(f"{path}: it is damaged, or no file of Keras ({type(error).__name__}: {error})") from error


def explained(checkpoint: Checkpoint, stored: Stored) -> np.ndarray[Any, Any]:
    """Reads an array; what goes wrong is a KerasFileError that names the file."""
    with damage_named(checkpoint.path):
        array = stored.read()
        if array.shape != stored.shape:
            raise KerasFileError(f"{stored.name} has shape {array.shape}, not {stored.shape}")
        return array


def _given_config(config: Any) -> dict[str, Any] | None:
    if config is None:
        return None
    if isinstance(config, Mapping):  # with lists for tuples, as in a file
        return configs.parsed(json.dumps(dict(config), default=str), "config")
    if isinstance(config, str) and config.lstrip().startswith("{"):
        return configs.parsed(config, "config")
    with damage_named(Path(config)):
        return configs.parsed(Path(config).read_bytes(), "config")


def _read(
    path: Path,
    config: dict[str, Any] | None,
    drop: Collection[str],
    state_order: Sequence[str] | None,
    uses: Collection[str],
    closers: list[Any],
) -> Checkpoint:
    if config is not None:
        configs.refuse_lambdas(config, "config", drop)
    prefix = find_prefix(path)
    if prefix is not None:
        _refuse_order(state_order)
        bundle = Bundle(prefix)
        closers.append(bundle)
        return _from_bundle(path, bundle, config, drop)
    if path.is_dir():
        raise KerasFileError("the directory holds no TensorFlow checkpoint")
    with path.open("rb") as file:
        magic = file.read(8)
        size = path.stat().st_size
    if magic[:4] == b"PK\x03\x04":
        return _from_zip(path, size, config, drop, state_order, uses, closers)
    if magic == b"\x89HDF\r\n\x1a\n":
        probe(path)
        file = path.open("rb")
        closers.append(file)
        hdf5 = Hdf5(file, size)
        closers.insert(0, hdf5)
        if hdf5.has("model_weights"):
            _refuse_order(state_order)
            return _from_h5(path, hdf5, config, drop)
        if hdf5.attribute_list("", "layer_names") is not None:
            raise KerasFileError(
                "it holds weights only, as save_weights writes them in .h5. Save with model.save('model.h5'), which "
                "keeps the state of the optimizer too"
            )
        return _from_numbered(path, hdf5, ".weights.h5", None, {}, config, drop, state_order, uses)
    raise KerasFileError("it is no .h5, .keras or .weights.h5 file, and there is no TensorFlow checkpoint of that name")


def _refuse_order(state_order: Sequence[str] | None) -> None:
    if state_order is not None:
        raise KerasFileError("state_order is for files that number the state; in this one it has the names of weights")


# ---- Names ----------------------------------------------------------------------------------------------------------

_PARTS: Final = {
    "query": "query",
    "key": "key",
    "value": "value",
    "attention_output": "output",
    "query_dense": "query",
    "key_dense": "key",
    "value_dense": "value",
    "output_dense": "output",
}


def _is_part(name: str) -> bool:
    """Whether a name is that of a part of a layer, rather than of a layer."""
    name = name.lstrip("_")
    return bool(re.fullmatch(r"(\w+_)?cell(_\d+)?|layer|(forward|backward)_\w+", name)) or name in _PARTS


def _role_prefix(parts: list[str]) -> list[str]:
    """The parts of a layer that a weight is in, in one vocabulary: ["forward"], ["query"], or [].

    Args:
        parts: the names between the layer and the weight: ["forward_lstm", "lstm_cell"] or ["_query_dense"].
    """
    found = []
    for part in parts:
        name = part.lstrip("_")
        if re.fullmatch(r"(\w+_)?cell(_\d+)?", name) or name == "layer":
            continue
        if re.match(r"forward_", name):
            found.append("forward")
        elif re.match(r"backward_", name):
            found.append("backward")
        else:
            found.append(_PARTS.get(name, name))
    return found


def _mark_frozen(layers: Iterable[Layer], model: ModelConfig | None) -> None:
    """Marks the weights that are not trained, by the configuration."""
    known = model.by_path() if model else {}
    for layer, variable in _variables(layers):
        variable.is_frozen = layer.path in known and not known[layer.path].is_trainable


def _split(layers: list[Layer]) -> list[Layer]:
    """Separable convolutions as two layers, which is what they are in PyTorch."""
    found = []
    for layer in layers:
        roles = {variable.role: variable for variable in layer.variables}
        if {"depthwise_kernel", "pointwise_kernel"} <= roles.keys():
            depthwise = roles.pop("depthwise_kernel")
            pointwise = list(roles.values())
            depthwise.role = roles["pointwise_kernel"].role = "kernel"
            rank = len(depthwise.value.shape) - 2
            found.append(Layer(f"{layer.path}/depthwise", f"DepthwiseConv{rank}D", layer.config, [depthwise]))
            found.append(Layer(f"{layer.path}/pointwise", f"Conv{rank}D", layer.config, pointwise))
        else:
            found.append(layer)
    return found


def wrapped_class(known: LayerConfig) -> tuple[str, dict[str, Any]]:
    """The class and configuration of a layer, or of the one that a TimeDistributed applies at each time."""
    inner = known.config.get("layer")
    if known.class_name == "TimeDistributed" and isinstance(inner, dict) and isinstance(inner.get("config"), dict):
        return str(inner.get("class_name")), inner["config"]
    return known.class_name, known.config


def _named_layers(
    names: list[tuple[str | None, str, Stored]], model: ModelConfig | None
) -> tuple[list[Layer], dict[str, Variable]]:
    """The layers of weights that have names, and the weights by their names.

    Args:
        names: of each weight the layer of the model that it is in, if that is known, its name, and where it is.
        model: the configuration, if there is one.
    """
    by_name: dict[str, Variable] = {}
    layers: dict[str, Layer] = {}
    leaves: dict[str, list[LayerConfig]] = {}
    for known in model.layers if model else ():
        leaves.setdefault(known.path.rpartition("/")[2], []).append(known)
    roots = {name.partition("/")[0] for _, name, _ in names}
    has_root = len(roots) == 1 and all(name.count("/") > 1 for _, name, _ in names) and model is None
    for top, name, stored in names:
        parts = name.split("/")
        if has_root and top is None:
            parts = parts[1:]
        role, above = parts[-1], parts[:-1]
        known_layer, depth = _leaf(leaves, top, above)
        if known_layer is not None:
            class_name, config = wrapped_class(known_layer)
            path = known_layer.path
            if depth < 0 and class_name in _BY_SNAKE_CASE.values():  # above all is its name before it was renamed
                depth = next((at for at, part in enumerate(above) if _is_part(part)), len(above)) - 1
            prefix = _role_prefix(above[depth + 1 :])
        else:
            class_name, config = None, {}
            keep = len(above)
            while keep > 1 and _is_part(above[keep - 1]):
                keep -= 1
            prefix = _role_prefix(above[keep:])
            path = "/".join(above[:keep]) or "(no layer)"
        layer = layers.setdefault(path, Layer(path, class_name, config))
        variable = Variable("/".join([*prefix, role]), stored)
        if name in by_name or any(other.role == variable.role for other in layer.variables):
            raise KerasFileError(
                f"it holds two weights named {name}; name the layers, and save it again, or save a .weights.h5 file, "
                "which has no need of names"
            )
        by_name[name] = variable
        layer.variables.append(variable)
    return _ungrouped(layers.values()), by_name


def _ungrouped(layers: Iterable[Layer]) -> list[Layer]:
    """Takes apart what has some parts of an attention layer and is none."""
    found = []
    for layer in layers:
        parts = {variable.role.rpartition("/")[0] for variable in layer.variables}
        if layer.class_name is not None or not parts & set(_PARTS.values()) or parts == set(_PARTS.values()):
            found.append(layer)
            continue
        by_part: dict[str, list[Variable]] = {}
        for variable in layer.variables:
            part, _, variable.role = variable.role.rpartition("/")
            by_part.setdefault(part, []).append(variable)
        for part, inner in by_part.items():
            found.append(Layer(f"{layer.path}/{part}".rstrip("/"), None, {}, inner))
    return found


def _leaf(leaves: dict[str, list[LayerConfig]], top: str | None, above: list[str]) -> tuple[LayerConfig | None, int]:
    """The layer that a name means, and the place of its own name in it."""
    for depth, part in enumerate(above):
        found = [leaf for leaf in leaves.get(part, []) if top is None or leaf.path.split("/")[0] == top]
        if len(found) > 1:
            inside = set(above[:depth]) | ({top} if top else set())
            found = [leaf for leaf in found if set(leaf.path.split("/")[:-1]) <= inside] or found
        if len(found) > 1:
            raise KerasFileError(
                f"two layers of its model are named {part}, and which one {'/'.join(above)} is in "
                "cannot be told; name the layers, and save it again"
            )
        if found:
            return found[0], depth
    if top is not None and top in leaves and len(leaves[top]) == 1:
        return leaves[top][0], -1  # a layer whose weights were named by hand
    return None, 0


# ---- State that has names -------------------------------------------------------------------------------------------


def _without_number(name: str) -> str:
    return re.sub(r":\d+$", "", name)


def _attach_named(
    states: Mapping[str, Stored],
    variables: Mapping[str, Variable],
    drop: Collection[str],
    kept: Collection[str] | None = None,
) -> None:
    """Gives each weight its state, by the names.

    Args:
        states: what the optimizer has, by name, without iterations and learning rate.
        variables: the weights by name.
        drop: what may be left out.
        kept: what the configuration says that there is besides the accumulators; None if it is not in the file.

    Raises:
        KerasFileError: a state has no weight, a weight a part of the state, or there is more or less than `kept`.
    """
    left_out = {configs.SLOT_OF.get(name) for name in drop}
    underscored: dict[str, list[str]] = {}
    for name in variables:
        underscored.setdefault(name.replace("/", "_"), []).append(name)
    found: dict[str, dict[str, Stored]] = {}
    for name, stored in states.items():
        slot, target = _slot(name)
        if slot in left_out:
            continue
        # In a file of a model that was loaded itself, the legacy class leaves its own name out.
        candidates = [known for known in (target, target.partition("/")[2]) if known in variables]
        candidates = candidates or underscored.get(target, [])
        if not slot or not candidates:
            raise KerasFileError(f"its optimizer has {name}, which belongs to no weight of the model")
        if len(candidates) > 1:
            raise KerasFileError(f"its optimizer has {name}, which may belong to {' or '.join(candidates)}")
        if slot in found.setdefault(candidates[0], {}):
            raise KerasFileError(f"its optimizer has {slot} of {candidates[0]} twice")
        found[candidates[0]][slot] = stored
    for name in configs.SLOT_OF:
        _check_optional(name, found, drop, kept)
    for name, slots in found.items():
        missing = [slot for slot in ACCUMULATORS if slot not in slots]
        if missing:
            raise KerasFileError(f"its optimizer has {', '.join(slots)} of {name}, and not {' and '.join(missing)}")
        _attach(name, variables[name], slots)


def _check_optional(
    name: str, found: Mapping[str, Mapping[str, Stored]], drop: Collection[str], kept: Collection[str] | None
) -> None:
    """Raises unless all weights have what `drop` calls so, or none has."""
    slot = configs.SLOT_OF[name]
    having = [weight for weight, slots in found.items() if slot in slots]
    without = [weight for weight, slots in found.items() if slot not in slots]
    advice = f"Save it again, or pass drop={{{name!r}}} to leave them out"
    if name in drop or not (having or name in (kept or ())):
        return
    if kept is not None and name not in kept:
        raise KerasFileError(
            f"its optimizer has {configs.DROPPABLE[name]} for {having[0]}, and its configuration does not ask for "
            f"them. {advice}"
        )
    if without:
        raise KerasFileError(
            f"its optimizer had {configs.DROPPABLE[name]}, and there is no {slot} of {without[0]}. " + advice
        )


def _attach(name: str, variable: Variable, slots: Mapping[str, Stored]) -> None:
    for slot, stored in slots.items():
        if stored.shape != variable.value.shape:
            raise KerasFileError(f"{stored.name} has shape {stored.shape}, its weight {name} {variable.value.shape}")
        if stored.dtype.kind != "f":
            raise KerasFileError(f"{stored.name} has dtype {stored.dtype}, which no state has")
        setattr(variable, slot, stored)


def _slot(name: str) -> tuple[str, str]:
    """What a state is, and the name of its weight: perhaps behind that of the optimizer, or with "_" for "/"."""
    for pattern, slot in (
        (r"(.+)/accum_grad", "square_avg"),
        (r"(.+)/accum_var", "acc_delta"),
        (r"(?:[^/]+/)?accumulated_grad/(.+)", "square_avg"),
        (r"(?:[^/]+/)?accumulated_delta_var/(.+)", "acc_delta"),
        (r"(?:[^/]+/)?average/(.+)", averages.KEY),
        (r"(?:[^/]+/)?(.+)_accumulated_grad", "square_avg"),
        (r"(?:[^/]+/)?(.+)_accumulated_delta_var", "acc_delta"),
        (r"(?:[^/]+/)?(.+)_average", averages.KEY),
        (r"(?:[^/]+/)?(.+)_gradient_accumulator", accumulation.KEY),
    ):
        match = re.fullmatch(pattern, name)
        if match:
            return slot, match[1]
    return "", ""


def _is_iteration(name: str) -> bool:
    return name.rpartition("/")[2] in ("iter", "iteration", "iterations")


_NO_STATE: Final = (
    "it holds no state of an Adadelta: {why}. Save with {how}, after a step at least, from a model that was compiled "
    "with the optimizer"
)


# ---- .h5 ------------------------------------------------------------------------------------------------------------


def _from_h5(path: Path, hdf5: Hdf5, config: dict[str, Any] | None, drop: Collection[str]) -> Checkpoint:
    text = hdf5.root_text("model_config") if config is None else None
    if text is not None:
        config = configs.parsed(text, "model_config")
        configs.refuse_lambdas(config, "its model", drop)
    model = None if config is None else ModelConfig(config)
    names: list[tuple[str | None, str, Stored]] = []
    for top in hdf5.attribute_list("model_weights", "layer_names") or []:
        for name in hdf5.attribute_list(f"model_weights/{top}", "weight_names") or []:
            names.append((top, _without_number(name), hdf5.stored(f"model_weights/{top}/{name}")))
    layers, by_name = _named_layers(names, model)
    _mark_frozen(layers, model)

    text = hdf5.root_text("training_config")
    stored_names = hdf5.attribute_list("optimizer_weights", "weight_names")
    if text is None or not stored_names:
        raise KerasFileError(
            _NO_STATE.format(why="the model was saved without its optimizer", how="model.save('model.h5')")
        )
    training = configs.parsed(text, "training_config")
    configs.refuse_lambdas(training, "its training configuration", drop)
    found = configs.hyperparameters(training.get("optimizer_config"), drop)
    kept = configs.optional_state(training["optimizer_config"]["config"])
    states: dict[str, Stored] = {}
    iterations = learning_rate = None
    for name in stored_names:
        stored = hdf5.stored(f"optimizer_weights/{name}")
        short = _without_number(name)
        if _is_iteration(short):
            iterations = stored
        elif short.rpartition("/")[2] == "learning_rate" and stored.shape == ():
            learning_rate = stored
        else:
            states[short] = stored
    if iterations is None:
        raise KerasFileError("its optimizer has no iterations")
    if not states:
        raise KerasFileError(_NO_STATE.format(why="no step was taken", how="model.save('model.h5')"))
    _attach_named(states, by_name, drop, kept)
    version = hdf5.root_text("keras_version") or ""
    if version.startswith("3"):
        generation = KERAS3
    else:
        generation = (
            LEGACY if any(_slot(name)[1] and name.endswith(("accum_grad", "accum_var")) for name in states) else NEW
        )
    if learning_rate is not None and not isinstance(found.get("learning_rate"), dict):
        found["learning_rate"] = _scalar(learning_rate)
    found, notes = configs.without_idle_clipping(found) if generation != LEGACY else (found, [])
    return Checkpoint(
        path,
        ".h5",
        generation,
        _split(layers),
        iterations,
        found,
        model,
        learning_rate,
        _dropped(drop),
        notes,
        hdf5.root_text("backend"),
    )


def _dropped(drop: Collection[str]) -> list[str]:
    return [configs.DROPPABLE[name] for name in drop]


def _scalar(stored: Stored) -> float:
    value = float(stored.read().reshape(()))
    if not math.isfinite(value):
        raise KerasFileError(f"{stored.name} is {value}")
    return value


# ---- .keras and .weights.h5 -----------------------------------------------------------------------------------------


def _from_zip(
    path: Path,
    size: int,
    config: dict[str, Any] | None,
    drop: Collection[str],
    state_order: Sequence[str] | None,
    uses: Collection[str],
    closers: list[Any],
) -> Checkpoint:
    required()
    with zipfile.ZipFile(path) as archive:
        names = [info.filename for info in archive.infolist()]
        if len(set(names)) != len(names):
            raise KerasFileError("the archive has a file twice")
        if _WEIGHTS not in names or "config.json" not in names:
            raise KerasFileError(f"the archive has no {_WEIGHTS} or no config.json; it is no .keras file")
        own = configs.parsed(_member(archive, "config.json", size), "config.json")
        version = ""
        if "metadata.json" in names:
            metadata = configs.parsed(_member(archive, "metadata.json", size), "metadata.json")
            version = str(metadata.get("keras_version"))
        weights = _member(archive, _WEIGHTS, size)
    configs.refuse_lambdas(own, "its model", drop)
    probe(None, weights)
    hdf5 = Hdf5(BytesIO(weights), len(weights))
    closers.append(hdf5)
    compiled = own.get("compile_config")
    optimizer = compiled.get("optimizer") if isinstance(compiled, dict) else None
    if isinstance(optimizer, str):
        optimizer = {"class_name": optimizer[:1].upper() + optimizer[1:], "config": {}}
    if isinstance(optimizer, dict) and "legacy" in str(optimizer.get("module", "")):
        raise KerasFileError(
            _NO_STATE.format(
                why="with the legacy optimizers of tf_keras, .keras files leave it out",
                how="model.save('model.h5'), or tf.train.Checkpoint(model=model, optimizer=model.optimizer)",
            )
        )
    return _from_numbered(path, hdf5, ".keras", version, optimizer, config or own, drop, state_order, uses)


def _member(archive: zipfile.ZipFile, name: str, size: int) -> bytes:
    info = archive.getinfo(name)
    if info.flag_bits & 1:
        raise KerasFileError(f"{name} is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise KerasFileError(f"{name} is compressed in a way that Keras does not use")
    if info.compress_size > size or info.file_size > MAX_EXPANSION * max(info.compress_size, 1):
        raise KerasFileError(
            f"{name} is said to unpack from {info.compress_size} to {info.file_size} bytes in a file of {size}; it is "
            "damaged, or made to exhaust the memory"
        )
    with archive.open(info) as member:
        data = member.read(info.file_size + 1)
    if len(data) != info.file_size:
        raise KerasFileError(f"{name} is cut off")
    return data


# The weights of a layer in the order of their numbers, by the class. What is optional has a key of the configuration.
_RNN: Final = ("kernel", "recurrent_kernel", "bias?use_bias")
_NORM: Final = ("gamma?scale", "beta?center")
_NUMBERED: Final = {
    "Embedding": ("embeddings",),
    "BatchNormalization": (*_NORM, "moving_mean", "moving_variance"),
    "SyncBatchNormalization": (*_NORM, "moving_mean", "moving_variance"),
    "LayerNormalization": _NORM,
    "GroupNormalization": _NORM,
    "RMSNormalization": ("scale",),
    "LSTM": _RNN,
    "GRU": _RNN,
    "SimpleRNN": _RNN,
    "MultiHeadAttention": ("kernel", "bias?use_bias"),
    "Dense": ("kernel", "bias?use_bias"),
    **{f"{kind}Conv{n}D": ("kernel", "bias?use_bias") for kind in ("", "Depthwise") for n in (1, 2, 3)},
    **{f"Conv{n}DTranspose": ("kernel", "bias?use_bias") for n in (1, 2, 3)},
    **{f"SeparableConv{n}D": ("depthwise_kernel", "pointwise_kernel", "bias?use_bias") for n in (1, 2)},
}
_BY_SNAKE_CASE: Final = {configs.snake_case(name): name for name in (*_NUMBERED, "Bidirectional", "TimeDistributed")}
# By the names that Keras 3 gives them. Some of them have two states for each weight, too.
_OTHER_OPTIMIZERS: Final = "adam|adamw|adamax|nadam|rms_?prop|adagrad|sgd|ftrl|lion|lamb|adafactor|muon"

_MOVING: Final = {"moving_mean", "moving_variance"}


def _numbered_roles(class_name: str | None, config: dict[str, Any], count: int) -> list[str] | None:
    """The names of so many weights of a layer, or None if they cannot be told."""
    if class_name == "Bidirectional":
        inner = config.get("layer")
        class_name = str(inner.get("class_name")) if isinstance(inner, dict) else "LSTM"
        config = inner["config"] if isinstance(inner, dict) and isinstance(inner.get("config"), dict) else {}
    entries = [entry.partition("?")[::2] for entry in _NUMBERED.get(class_name or "", ())]
    if config:
        entries = [(role, key) for role, key in entries if not key or config.get(key, True)]
    elif len(entries) == count + 1:
        entries = [(role, key) for role, key in entries if not key]
    return [role for role, _ in entries] if len(entries) == count else None


def _from_numbered(
    path: Path,
    hdf5: Hdf5,
    format: str,
    version: str | None,
    optimizer: Any,
    config: dict[str, Any] | None,
    drop: Collection[str],
    state_order: Sequence[str] | None,
    uses: Collection[str],
) -> Checkpoint:
    found = configs.hyperparameters(optimizer, drop) if optimizer else {}
    model = ModelConfig(config) if config is not None else None
    groups: dict[str, dict[int, Stored]] = {}
    for name, dataset in hdf5.datasets():
        group, _, number = name.rpartition("/")
        group = re.sub(r"(^|/)vars$", "", group)
        if re.match(r"(optimizer|metrics|compile_metrics|_compile_metrics|_metrics|loss|_loss_tracker)(/|$)", group):
            continue
        if "seed_generator" in group:
            continue
        if not number.isdecimal():
            raise KerasFileError(f"it holds {name}, which is no weight of a .keras or .weights.h5 file")
        groups.setdefault(group, {})[int(number)] = hdf5.of_dataset(name, dataset)
    if not groups:
        raise KerasFileError("it holds no weights")
    layers = _numbered_layers(groups, hdf5, model)
    _mark_frozen(layers, model)
    states = _numbered_states(hdf5)
    attribute = hdf5.get("optimizer/vars")
    optimizer_name = hdf5.attribute_text(attribute, "name") if attribute is not None else None
    is_keras3 = (version or "").startswith("3") or optimizer_name is not None
    if not states:
        how = "model.save('model.h5')" if not is_keras3 else f"model.save{'_weights' if 'w' in format else ''}"
        raise KerasFileError(
            _NO_STATE.format(
                why=f"it has no group optimizer, as {format} files of tf_keras with a legacy optimizer have none",
                how=f"{how}, or tf.train.Checkpoint(model=model, optimizer=model.optimizer)",
            )
        )
    if optimizer_name is not None and not found:
        kind = re.fullmatch(rf"({_OTHER_OPTIMIZERS})(_\d+)?", optimizer_name)
        if kind:
            raise KerasFileError(f"its optimizer is {kind[1]}, not Adadelta")
    if len(states) < 2 + (states[-1].shape == () and states[-1].dtype.kind == "f"):
        raise KerasFileError(_NO_STATE.format(why="no step was taken", how="what you saved it with"))
    state = assigned(states, layers, model, optimizer["config"] if optimizer else {}, drop, state_order, uses)
    for _, variable in _variables(layers):
        if id(variable) in state.slots:
            _attach("a weight", variable, state.slots[id(variable)])
    place = {id(variable): number for number, variable in enumerate(state.order)}
    if model is None or not model.is_complete:
        layers.sort(key=lambda layer: min((place.get(id(v), len(place)) for v in layer.variables), default=0))
    is_ordered = all(any(variable.has_state for variable in layer.variables) for layer in layers)
    found, notes = configs.without_idle_clipping(found)
    iterations, learning_rate = state.iterations, state.learning_rate
    if learning_rate is not None:
        found["learning_rate"] = _scalar(learning_rate)
    generation = KERAS3 if is_keras3 or learning_rate is not None else NEW
    return Checkpoint(
        path,
        format,
        generation,
        _split(layers),
        iterations,
        found,
        model,
        learning_rate,
        _dropped(drop),
        notes,
        is_ordered=is_ordered,
    )


def _numbered_layers(groups: dict[str, dict[int, Stored]], hdf5: Hdf5, model: ModelConfig | None) -> list[Layer]:
    """The layers of a numbered file: in the order of the model if that is known, else by name."""
    known = {layer.group: layer for layer in model.layers} if model else {}
    by_path: dict[str, tuple[Layer, dict[str, dict[int, Stored]]]] = {}
    class_name: str | None
    for group, stored in groups.items():
        top, inner = _owner(group, known)
        if top in known:
            class_name, config = wrapped_class(known[top])
            path = known[top].path
        else:
            if model is not None and model.is_complete and model.layers:
                raise KerasFileError(f"it holds {group}, which is no layer of the model in its configuration")
            class_name, config, path = _unknown(top, hdf5)
        own = by_path.setdefault(top, (Layer(path, class_name, config, group=top), {}))
        own[1]["/".join(_role_prefix(inner))] = stored
    paths = Counter(layer.path for layer, _ in by_path.values())
    for top, (layer, _) in by_path.items():
        if paths[layer.path] > 1:
            layer.path = top
    order = {group: number for number, group in enumerate(known)}
    for top in sorted(by_path, key=lambda group: (order.get(group, 0), natural(group))):
        layer, parts = by_path[top]
        for part in sorted(parts, key=_part_rank):
            numbers = sorted(parts[part])
            if numbers != list(range(len(numbers))):
                raise KerasFileError(f"{top} has the weights {numbers}; some are missing")
            roles = _numbered_roles(layer.class_name, layer.config, len(numbers)) or [str(n) for n in numbers]
            for number, role in zip(numbers, roles, strict=True):
                layer.variables.append(Variable(f"{part}/{role}" if part else role, parts[part][number]))
        layer.is_known = _is_known(layer)
    return [by_path[top][0] for top in sorted(by_path, key=lambda group: (order.get(group, 0), natural(group)))]


def _is_known(layer: Layer) -> bool:
    """Whether the weights of a layer are named, so that it is one of Keras, or have the shapes of one with parts."""
    roles = [variable.role.rpartition("/") for variable in layer.variables]
    if not any(role.isdecimal() for _, _, role in roles):
        return True
    parts = {part for part, _, _ in roles}
    if layer.class_name not in (None, "GroupedQueryAttention"):
        return False
    if parts == set(_PARTS.values()):  # of Dense layers, if somebody wrote it himself
        return all(len(v.value.shape) == 3 for v in layer.variables if v.role.endswith("/0"))
    return parts == {"forward", "backward"} and all("/cell/vars/" in v.value.name for v in layer.variables)


def _part_rank(part: str) -> tuple[int, str]:
    ranks = ["forward", "query", "key", "value", "output", "backward"]
    return (ranks.index(part) if part in ranks else -1, part)


def _owner(group: str, known: Mapping[str, LayerConfig]) -> tuple[str, list[str]]:
    """The group of the layer that a group belongs to, and the parts below it."""
    parts = group.split("/")
    for end in range(len(parts), 0, -1):
        if "/".join(parts[:end]) in known:
            return "/".join(parts[:end]), parts[end:]
    end = len(parts)
    while end > 1 and parts[end - 2] != "layers" and _is_part(parts[end - 1]):
        end -= 1
    return "/".join(parts[:end]), parts[end:]


def _unknown(group: str, hdf5: Hdf5) -> tuple[str | None, dict[str, Any], str]:
    """Class, configuration and path of a layer that no configuration names, from the names of groups."""
    parts = group.split("/")
    path = [part for part in parts if part != "layers"]
    if len(parts) > 1 and parts[-2] == "layers":
        class_name = _BY_SNAKE_CASE.get(re.sub(r"_\d+$", "", parts[-1]))
    else:
        class_name = None
    vars_group = hdf5.get(f"{group}/vars")
    name = hdf5.attribute_text(vars_group, "name") if vars_group is not None else None
    if name and "/" not in name:
        path[-1] = name
    return class_name, {}, "/".join(path)


def _numbered_states(hdf5: Hdf5) -> list[Stored]:
    if hdf5.has("optimizer/inner_optimizer"):
        raise KerasFileError("its optimizer is a LossScaleOptimizer, whose scale does not carry over")
    numbered: dict[int, Stored] = {}
    for name, dataset in hdf5.datasets("optimizer/vars"):
        if not name.isdecimal():
            raise KerasFileError(f"its optimizer holds {name}, which is no number")
        numbered[int(name)] = hdf5.of_dataset(f"optimizer/vars/{name}", dataset)
    if sorted(numbered) != list(range(len(numbered))):
        raise KerasFileError("some variables of its optimizer are missing")
    return [numbered[number] for number in range(len(numbered))]


# ---- TensorFlow checkpoints -----------------------------------------------------------------------------------------


def _from_bundle(path: Path, bundle: Bundle, config: dict[str, Any] | None, drop: Collection[str]) -> Checkpoint:
    nodes = bundle.object_graph()
    optimizers = [number for number, node in enumerate(nodes) if _is_optimizer(node)]
    if not optimizers:
        raise KerasFileError(
            _NO_STATE.format(
                why="there is no optimizer in it",
                how="tf.train.Checkpoint(model=model, optimizer=optimizer), or model.save_weights of TensorFlow 2.4",
            )
        )
    if len(optimizers) > 1:
        raise KerasFileError(f"it holds {len(optimizers)} optimizers, and which one is meant cannot be told")
    optimizer = nodes[optimizers[0]]
    of_optimizer = dict(optimizer.children)
    weights, owned = _weight_nodes(nodes, optimizers[0])
    model = ModelConfig(config) if config is not None else None
    named: list[tuple[str | None, str, Stored]] = []
    for number in weights:
        node = nodes[number]
        assert node.key is not None
        named.append((None, _without_number(node.full_name or node.key), bundle.stored(node.key)))
    layers, by_name = _named_layers(named, model)
    for layer in layers:
        layer.variables.sort(key=lambda variable: variable.role in _MOVING)

    scalars: dict[str, Stored] = {}
    for name, child in optimizer.children:
        key = nodes[child].key
        if key is not None:
            scalars[name.lstrip("_").replace("iterations", "iter")] = bundle.stored(key)
    if "iter" not in scalars:
        raise KerasFileError("its optimizer has no iterations")
    if optimizer.slots:
        generation = LEGACY
        pairs: dict[int, dict[str, Stored]] = {}
        for variable, slot, number in optimizer.slots:
            key = nodes[number].key
            if slot not in ("accum_grad", "accum_var"):
                raise KerasFileError(f"its optimizer has the slot {slot}; it is not Adadelta")
            if key is None:
                raise KerasFileError("a slot of its optimizer has no value")
            pairs.setdefault(variable, {})["square_avg" if slot == "accum_grad" else "acc_delta"] = bundle.stored(key)
        by_node = {number: by_name[name] for number, (_, name, _) in zip(weights, named, strict=True)}
        for number, slots in pairs.items():
            if number not in by_node or len(slots) != 2:
                raise KerasFileError("its optimizer has a slot of no weight, or one slot of two")
            _attach(nodes[number].full_name or "", by_node[number], slots)
    else:
        generation = KERAS3 if "_trainable_variables" in of_optimizer else NEW
        states: dict[str, Stored] = {}
        own = {child for _, child in optimizer.children}  # iterations and hyperparameters
        for number in owned:
            node = nodes[number]
            name = _without_number(node.full_name or "")
            if number in own or node.key is None or _is_iteration(name) or name.rpartition("/")[2] == "learning_rate":
                continue
            if name in states:
                raise KerasFileError(f"its optimizer has {name} twice; name the layers, and save it again")
            states[name] = bundle.stored(node.key)
        if not states:
            raise KerasFileError(
                _NO_STATE.format(why="no step was taken", how="tf.train.Checkpoint(model=model, optimizer=optimizer)")
            )
        _attach_named(states, by_name, drop)
    if not any(variable.has_state for layer in layers for variable in layer.variables):
        raise KerasFileError(
            _NO_STATE.format(why="no step was taken", how="tf.train.Checkpoint(model=model, optimizer=optimizer)")
        )
    # Keras 3 lists the weights that are trained, and those of the layers that are frozen come behind them.
    is_ordered = generation != KERAS3 or all(any(v.has_state for v in layer.variables) for layer in layers)
    found: dict[str, Any] = {n: _scalar(scalars[n]) for n in ("learning_rate", "rho", "decay") if n in scalars}
    return Checkpoint(
        path,
        "TensorFlow checkpoint",
        generation,
        _split(layers),
        scalars["iter"],
        found,
        model,
        scalars.get("learning_rate"),
        _dropped(drop),
        is_ordered=is_ordered,
    )


def _is_optimizer(node: Node) -> bool:
    names = {name for name, _ in node.children}
    return bool(node.slots) or "_iterations" in names or {"iter", "learning_rate"} <= names


# Objects beside the layers that a saved model refers to.
_NOT_LAYERS: Final = {
    "keras_api",
    "metrics",
    "compiled_metrics",
    "_metrics",
    "save_counter",
    "signatures",
    "seed_generator",
}


def _weight_nodes(nodes: list[Node], optimizer: int) -> tuple[list[int], list[int]]:
    """The numbers of the weights in the order of the layers, and of what belongs to the optimizer."""
    owned: list[int] = []
    trainable: list[int] = []
    for name, child in nodes[optimizer].children:
        if name == "_variables":
            owned += [number for _, number in sorted(nodes[child].children, key=lambda item: natural(item[0]))]
        elif name == "_trainable_variables":
            trainable += [number for _, number in sorted(nodes[child].children, key=lambda item: natural(item[0]))]
        elif nodes[child].key is not None:
            owned.append(child)
    owned += [slot for _, _, slot in nodes[optimizer].slots]
    weights = list(trainable)
    seen = {optimizer, *owned}
    todo = [0]
    while todo:
        number = todo.pop()
        if number in seen:
            continue
        seen.add(number)
        node = nodes[number]
        is_other = "seed_generator" in (node.full_name or "") or (node.key or "").startswith("save_counter")
        if node.key is not None and number not in weights and not is_other:
            weights.append(number)
        children = [child for name, child in node.children if name not in _NOT_LAYERS and not name.startswith("train_")]
        todo += reversed(children)
    return weights, owned
