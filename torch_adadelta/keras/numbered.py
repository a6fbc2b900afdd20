"""Reads ``.keras`` and ``.weights.h5`` files, whose weights and state have numbers instead of names."""

import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from torch_adadelta.keras import config as configs
from torch_adadelta.keras.classes import BY_SNAKE_CASE, PARTS, is_part, numbered_roles, role_prefix
from torch_adadelta.keras.config import LayerConfig, ModelConfig, leaf_of, wrapped_class
from torch_adadelta.keras.contents import (
    KERAS3,
    LEGACY,
    NEW,
    NO_STATE,
    UNKNOWN,
    Checkpoint,
    Request,
    attach,
    dropped,
    mark_frozen,
    scalar,
    scale_remark,
    separated,
    variables_of,
)
from torch_adadelta.keras.errors import MAX_EXPANSION, KerasFileError, LazyArray, NoStateError
from torch_adadelta.keras.hdf5 import Hdf5, required
from torch_adadelta.keras.layers import Layer, Variable
from torch_adadelta.keras.state_order import State, assigned, natural

WEIGHTS: Final = "model.weights.h5"


def from_zip(path: Path, size: int, request: Request, closers: list[Any]) -> Checkpoint:
    required()
    with zipfile.ZipFile(path) as archive:
        names = [info.filename for info in archive.infolist()]
        if len(set(names)) != len(names):
            raise KerasFileError("the archive has a file twice")
        if WEIGHTS not in names or "config.json" not in names:
            raise KerasFileError(f"the archive has no {WEIGHTS} or no config.json; it is no .keras file")
        own = configs.parsed(_member(archive, "config.json", size), "config.json")
        version = ""
        if "metadata.json" in names:
            metadata = configs.parsed(_member(archive, "metadata.json", size), "metadata.json")
            version = str(metadata.get("keras_version"))
        weights = _member(archive, WEIGHTS, size)
    hdf5 = Hdf5.sandboxed(None, weights)
    closers.append(hdf5)
    compiled = own.get("compile_config")
    optimizer = compiled.get("optimizer") if isinstance(compiled, dict) else None
    if isinstance(optimizer, str):
        optimizer = {"class_name": optimizer[:1].upper() + optimizer[1:], "config": {}}
    if request.has_state and _is_legacy(configs.inner_optimizer(optimizer)):
        raise NoStateError(
            NO_STATE.format(
                why="with the legacy optimizers of tf_keras, .keras files leave it out",
                how="model.save('model.h5'), or tf.train.Checkpoint(model=model, optimizer=model.optimizer)",
            )
        )
    if request.config is None:
        request = request._replace(config=own)
    return from_numbered(path, hdf5, ".keras", version, optimizer, request)


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
_OTHER_OPTIMIZERS: Final = "adam|adamw|adamax|nadam|rm_?s_?prop|adagrad|sgd|ftrl|lion|lamb|adafactor|muon"


def from_numbered(
    path: Path, hdf5: Hdf5, format: str, version: str | None, optimizer: Any, request: Request
) -> Checkpoint:
    model = ModelConfig(request.config) if request.config is not None else None
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
    stored = _stored_optimizer(hdf5, optimizer)
    optimizer = configs.inner_optimizer(optimizer)
    class_name = configs.optimizer_class(optimizer) or stored.class_name
    is_keras3 = (version or "").startswith("3") or stored.name is not None
    found = configs.hyperparameters(optimizer, request.drop) if optimizer and class_name == configs.ADADELTA else {}
    state = State()
    learning_rate = None
    if request.has_state:
        _check_state(stored, class_name, format, is_keras3)
        class_name = configs.ADADELTA
        options = optimizer["config"] if optimizer else {}
        state = assigned(stored.variables, layers, model, options, request.drop, request.state_order, request.uses)
        learning_rate = state.learning_rate
    elif is_keras3 and class_name == configs.ADADELTA and len(stored.variables) > 1:
        learning_rate = stored.variables[1] if stored.variables[1].shape == () else None
    for _, variable in variables_of(layers):
        if id(variable) in state.slots:
            attach("a weight", variable, state.slots[id(variable)])
    layers = separated(layers)
    place = {id(variable): number for number, variable in enumerate(state.order)}
    known = {layer.path: number for number, layer in enumerate(model.layers if model and model.is_complete else ())}
    # The configuration has the order of layers, but for those in a custom layer, which the order of the state tells.
    layers.sort(
        key=lambda layer: (
            known.get(leaf_of(layer.path, known) or "", 0),
            min((place.get(id(v), len(place)) for v in layer.variables), default=0),
        )
    )
    is_ordered = all(
        any(variable.has_state for variable in layer.variables)
        for layer in layers
        if not known or layer.class_name is None
    )
    if learning_rate is not None:
        found["learning_rate"] = scalar(learning_rate)
    if is_keras3 or learning_rate is not None:
        generation = KERAS3
    elif class_name != configs.ADADELTA:
        generation = UNKNOWN
    else:
        generation = LEGACY if _is_legacy(optimizer) else NEW
    found, notes = configs.without_idle_clipping(found) if generation != LEGACY else (found, [])
    return Checkpoint(
        path,
        format,
        generation,
        layers,
        state.iterations,
        found,
        model,
        learning_rate,
        [*dropped(request.drop), *stored.remarks],
        notes,
        is_ordered=is_ordered,
        optimizer=class_name,
        has_state=request.has_state,
        optional=state.optional,
        copies=stored.copies,
    )


def _is_legacy(optimizer: Any) -> bool:
    return isinstance(optimizer, dict) and "legacy" in str(optimizer.get("module", ""))


def _check_state(stored: "_Optimizer", class_name: str | None, format: str, is_keras3: bool) -> None:
    """Raises unless there may be state of an Adadelta."""
    if class_name not in (None, configs.ADADELTA):
        raise NoStateError(configs.OTHER_OPTIMIZER.format(name=class_name))
    variables = stored.variables
    if not variables:
        how = "model.save('model.h5')" if not is_keras3 else f"model.save{'_weights' if 'w' in format else ''}"
        raise NoStateError(
            NO_STATE.format(
                why=f"it has no group optimizer, as {format} files of tf_keras with a legacy optimizer have none",
                how=f"{how}, or tf.train.Checkpoint(model=model, optimizer=model.optimizer)",
            )
        )
    if len(variables) < 2 + (variables[-1].shape == () and variables[-1].dtype.kind == "f"):
        raise NoStateError(NO_STATE.format(why="no step was taken", how="what you saved it with"))


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


def _part_rank(part: str) -> tuple[str, int, str]:
    ranks = ["forward", "query", "key", "value", "output", "backward"]
    layer, _, last = part.rpartition("/")
    return (layer, ranks.index(last), last) if last in ranks else (part, -1, "")


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


class _Optimizer(NamedTuple):
    """The variables of an optimizer, inside of a LossScaleOptimizer if there is one around it."""

    variables: list[LazyArray]
    name: str | None  # which Keras 3 writes
    copies: dict[str, str]  # where the LossScaleOptimizer has a variable once more
    remarks: list[str]

    @property
    def class_name(self) -> str | None:
        """Its class, if it has the name that Keras 3 gives it."""
        kind = re.fullmatch(rf"(adadelta|{_OTHER_OPTIMIZERS})(_\d+)?", self.name or "")
        return None if kind is None else kind[1].replace("adadelta", configs.ADADELTA)


def _stored_optimizer(hdf5: Hdf5, config: Any) -> _Optimizer:
    """The variables of the optimizer.

    A LossScaleOptimizer has them behind its own, of which Keras 3 saves four, the scale last. The optimizer in it has
    them once more, and with these Keras goes on, for it reads them last.

    Args:
        hdf5: the file.
        config: the configuration of the optimizer, if there is one.
    """
    outer = _numbered_variables(hdf5, "optimizer")
    if not hdf5.has("optimizer/inner_optimizer"):
        remarks = [scale_remark(None, config)] if configs.is_scaled(config) else []
        return _Optimizer(outer, _optimizer_name(hdf5, "optimizer"), {}, remarks)
    inner = _numbered_variables(hdf5, "optimizer/inner_optimizer")
    own, copied = outer[: len(outer) - len(inner)], outer[len(outer) - len(inner) :]
    if [stored.shape for stored in copied] != [stored.shape for stored in inner] or len(own) not in (0, 4):
        raise KerasFileError(
            f"its LossScaleOptimizer has {len(outer)} variables, which do not fit the {len(inner)} of its optimizer"
        )
    return _Optimizer(
        inner,
        _optimizer_name(hdf5, "optimizer/inner_optimizer"),
        {stored.name: copy.name for stored, copy in zip(inner, copied, strict=True)},
        [scale_remark(own[3] if own else None, config if configs.is_scaled(config) else None)],
    )


def _optimizer_name(hdf5: Hdf5, group: str) -> str | None:
    item = hdf5.get(f"{group}/vars")
    return hdf5.attribute_text(item, "name") if item is not None else None


def _numbered_variables(hdf5: Hdf5, group: str) -> list[LazyArray]:
    numbered: dict[int, LazyArray] = {}
    for name, dataset in hdf5.datasets(f"{group}/vars"):
        if not name.isdecimal():
            raise KerasFileError(f"its optimizer holds {name}, which is no number")
        numbered[int(name)] = hdf5.of_dataset(f"{group}/vars/{name}", dataset)
    if sorted(numbered) != list(range(len(numbered))):
        raise KerasFileError("some variables of its optimizer are missing")
    return [numbered[number] for number in range(len(numbered))]
