"""Reads ``.keras`` and ``.weights.h5`` files, whose weights and state have numbers instead of names."""

import re
import zipfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from torch_adadelta.keras import config as configs
from torch_adadelta.keras.classes import BY_SNAKE_CASE, PARTS, is_part, numbered_roles, role_prefix
from torch_adadelta.keras.config import LayerConfig, ModelConfig, wrapped_class
from torch_adadelta.keras.contents import (
    KERAS3,
    NEW,
    NO_STATE,
    Checkpoint,
    attach,
    dropped,
    mark_frozen,
    scalar,
    separated,
    variables_of,
)
from torch_adadelta.keras.errors import MAX_EXPANSION, KerasFileError, LazyArray
from torch_adadelta.keras.hdf5 import Hdf5, required
from torch_adadelta.keras.layers import Layer, Variable
from torch_adadelta.keras.state_order import assigned, natural

_WEIGHTS: Final = "model.weights.h5"


def from_zip(
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
    hdf5 = Hdf5.sandboxed(None, weights)
    closers.append(hdf5)
    compiled = own.get("compile_config")
    optimizer = compiled.get("optimizer") if isinstance(compiled, dict) else None
    if isinstance(optimizer, str):
        optimizer = {"class_name": optimizer[:1].upper() + optimizer[1:], "config": {}}
    if isinstance(optimizer, dict) and "legacy" in str(optimizer.get("module", "")):
        raise KerasFileError(
            NO_STATE.format(
                why="with the legacy optimizers of tf_keras, .keras files leave it out",
                how="model.save('model.h5'), or tf.train.Checkpoint(model=model, optimizer=model.optimizer)",
            )
        )
    return from_numbered(path, hdf5, ".keras", version, optimizer, config or own, drop, state_order, uses)


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


# By the names that Keras 3 gives them. Some of them have two states for each weight, too.
_OTHER_OPTIMIZERS: Final = "adam|adamw|adamax|nadam|rms_?prop|adagrad|sgd|ftrl|lion|lamb|adafactor|muon"


def from_numbered(
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
    groups: dict[str, dict[int, LazyArray]] = {}
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
    mark_frozen(layers, model)
    states = _numbered_states(hdf5)
    attribute = hdf5.get("optimizer/vars")
    optimizer_name = hdf5.attribute_text(attribute, "name") if attribute is not None else None
    is_keras3 = (version or "").startswith("3") or optimizer_name is not None
    if not states:
        how = "model.save('model.h5')" if not is_keras3 else f"model.save{'_weights' if 'w' in format else ''}"
        raise KerasFileError(
            NO_STATE.format(
                why=f"it has no group optimizer, as {format} files of tf_keras with a legacy optimizer have none",
                how=f"{how}, or tf.train.Checkpoint(model=model, optimizer=model.optimizer)",
            )
        )
    if optimizer_name is not None and not found:
        kind = re.fullmatch(rf"({_OTHER_OPTIMIZERS})(_\d+)?", optimizer_name)
        if kind:
            raise KerasFileError(f"its optimizer is {kind[1]}, not Adadelta")
    if len(states) < 2 + (states[-1].shape == () and states[-1].dtype.kind == "f"):
        raise KerasFileError(NO_STATE.format(why="no step was taken", how="what you saved it with"))
    state = assigned(states, layers, model, optimizer["config"] if optimizer else {}, drop, state_order, uses)
    for _, variable in variables_of(layers):
        if id(variable) in state.slots:
            attach("a weight", variable, state.slots[id(variable)])
    place = {id(variable): number for number, variable in enumerate(state.order)}
    if model is None or not model.is_complete:
        layers.sort(key=lambda layer: min((place.get(id(v), len(place)) for v in layer.variables), default=0))
    is_ordered = all(any(variable.has_state for variable in layer.variables) for layer in layers)
    found, notes = configs.without_idle_clipping(found)
    iterations, learning_rate = state.iterations, state.learning_rate
    if learning_rate is not None:
        found["learning_rate"] = scalar(learning_rate)
    generation = KERAS3 if is_keras3 or learning_rate is not None else NEW
    return Checkpoint(
        path,
        format,
        generation,
        separated(layers),
        iterations,
        found,
        model,
        learning_rate,
        dropped(drop),
        notes,
        is_ordered=is_ordered,
    )


def _numbered_layers(groups: dict[str, dict[int, LazyArray]], hdf5: Hdf5, model: ModelConfig | None) -> list[Layer]:
    """The layers of a numbered file: in the order of the model if that is known, else by name."""
    known = {layer.group: layer for layer in model.layers} if model else {}
    by_path: dict[str, tuple[Layer, dict[str, dict[int, LazyArray]]]] = {}
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
        own[1]["/".join(role_prefix(inner))] = stored
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
            roles = numbered_roles(layer.class_name, layer.config, len(numbers)) or [str(n) for n in numbers]
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
    if parts == set(PARTS.values()):  # of Dense layers, if somebody wrote it himself
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
    while end > 1 and parts[end - 2] != "layers" and is_part(parts[end - 1]):
        end -= 1
    return "/".join(parts[:end]), parts[end:]


def _unknown(group: str, hdf5: Hdf5) -> tuple[str | None, dict[str, Any], str]:
    """Class, configuration and path of a layer that no configuration names, from the names of groups."""
    parts = group.split("/")
    path = [part for part in parts if part != "layers"]
    if len(parts) > 1 and parts[-2] == "layers":
        class_name = BY_SNAKE_CASE.get(re.sub(r"_\d+$", "", parts[-1]))
    else:
        class_name = None
    vars_group = hdf5.get(f"{group}/vars")
    name = hdf5.attribute_text(vars_group, "name") if vars_group is not None else None
    if name and "/" not in name:
        path[-1] = name
    return class_name, {}, "/".join(path)


def _numbered_states(hdf5: Hdf5) -> list[LazyArray]:
    if hdf5.has("optimizer/inner_optimizer"):
        raise KerasFileError("its optimizer is a LossScaleOptimizer, whose scale does not carry over")
    numbered: dict[int, LazyArray] = {}
    for name, dataset in hdf5.datasets("optimizer/vars"):
        if not name.isdecimal():
            raise KerasFileError(f"its optimizer holds {name}, which is no number")
        numbered[int(name)] = hdf5.of_dataset(f"optimizer/vars/{name}", dataset)
    if sorted(numbered) != list(range(len(numbered))):
        raise KerasFileError("some variables of its optimizer are missing")
    return [numbered[number] for number in range(len(numbered))]
