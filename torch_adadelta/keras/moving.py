"""Moves a training job: the state of Keras' Adadelta and the weights of its model into PyTorch, and back."""

import json
import math
import os
import shutil
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from torch_adadelta import schedules
from torch_adadelta.backends import masters
from torch_adadelta.backends.opmath import stored
from torch_adadelta.keras import additions, hdf5
from torch_adadelta.keras.checkpoints import KERAS3, LEGACY, Checkpoint, Layer, explained, opened
from torch_adadelta.keras.config import CLIPPING, DROPPABLE, dropped_options
from torch_adadelta.keras.errors import Array, KerasFileError, Stored
from torch_adadelta.keras.layers import ACCUMULATORS, SLOTS
from torch_adadelta.keras.matching import Match, Move, Unit, match
from torch_adadelta.optimizer import AdadeltaKeras
from torch_adadelta.options import BY_NAME, OPTIONS
from torch_adadelta.step import averages
from torch_adadelta.step.validation import name_in

_WEIGHTS: Final = "model.weights.h5"


@dataclass
class Report:
    """What was moved, from where to where; `str()` of it is a table."""

    source: str
    iterations: int
    hyperparameters: dict[str, Any]  # those that were set, or written
    moves: list[tuple[str, str, str, bool]]  # the weight, the parameter, how it is turned, whether there is state
    notes: list[str] = field(default_factory=list)  # what differs, or was not in the file
    norm_variables: list[tuple[str, str]] = field(default_factory=list)  # weights not one to one with parameters

    def __str__(self) -> str:
        rows = [("Keras", "PyTorch", "layout", "state")]
        rows += [(*move[:3], "yes" if move[3] else "no") for move in self.moves]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [self.source, f"iterations: {self.iterations}"]
        lines += [f"{name}: {_text(value)}" for name, value in self.hyperparameters.items()]
        if self.norm_variables:
            lines += ["norm_variables:", *(f"  {weight} → {pieces}" for weight, pieces in self.norm_variables)]
        lines.append("")
        for row in rows:
            lines.append("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]]))
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(line.rstrip() for line in lines)


def _text(value: Any) -> str:
    return (
        f"{type(value).__name__} {value.get_config()}"
        if isinstance(value, schedules.LearningRateSchedule)
        else repr(value)
    )


def freeze_second_biases(model: nn.Module) -> nn.Module:
    """Sets to zero, and freezes, the second bias of every LSTM and RNN of a model; returns the model.

    Keras' LSTM and SimpleRNN have one bias. PyTorch's have two, ``bias_ih`` and ``bias_hh``, which are added, so both
    get the same gradient: trained together they would move twice as far as that of Keras. (A GRU with
    ``reset_after=True`` has two biases in both frameworks, and keeps them.)
    """
    for module in model.modules():
        if isinstance(module, nn.LSTM | nn.LSTMCell | nn.RNN | nn.RNNCell):
            for name, param in module.named_parameters():
                if name.startswith("bias_hh"):
                    param.requires_grad_(False)
                    with torch.no_grad():
                        param.zero_()
                    param.grad = None
    return model


# ---- From Keras -----------------------------------------------------------------------------------------------------


def load_keras(
    path: str | Path,
    optimizer: AdadeltaKeras,
    model: nn.Module,
    *,
    weights: bool = False,
    hyperparameters: bool = True,
    mapping: Mapping[str, Any] | None = None,
    match: str = "auto",
    flatten: str | Mapping[str, Any] | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    drop: Collection[str] = (),
    state_order: Sequence[str] | None = None,
    custom_objects: Mapping[str, Any] | None = None,
) -> Report:
    """Takes over the state of Keras' Adadelta from a file, so that training goes on where Keras left it.

    Sets ``optimizer.iterations``, the state of each parameter (``accum_grad`` as ``square_avg``, ``accum_var`` as
    ``acc_delta``, each turned as its weight is), and the hyperparameters that the file has, a schedule included; and
    ``optimizer.norm_variables``, so that ``clipnorm`` takes the norms of the weights of Keras, not of parameters. Where
    Keras kept moving averages (``use_ema``) or sums of gradients (``gradient_accumulation_steps``), these come, too; if
    the file does not have the options, the optimizer must be given them.

    The kind of the file is found out: ``.h5``, ``.keras``, ``.weights.h5``, a TensorFlow checkpoint (its prefix, index
    or directory) or SavedModel, of TensorFlow 2.4 and later, tf_keras with the legacy or the new class, or Keras 3.
    Neither TensorFlow nor Keras is needed; all but TensorFlow checkpoints need h5py. Nothing in the file is executed.

    Args:
        path: the file.
        optimizer: has all parameters of `model` that Keras trained.
        model: computes the same as the model of Keras.
        weights: whether to set the parameters, and the statistics of batch normalisation, too.
        hyperparameters: False to keep those of the optimizer.
        mapping: what cannot be inferred, as a dictionary: from the path of a layer of Keras to that of a module
            (``{"dense": "encoder.fc1"}``), or from a weight to a parameter, with a permutation or `Layout` if it is
            turned (``{"dense/kernel": ("fc1.weight", (1, 0))}``); None leaves a layer out.
        match: how layers and modules find each other. "auto" takes what is the only possibility by kind and shape;
            names if they agree on both sides; and the order if it is known to be that of computation in both, as in two
            Sequentials. "names" demands equal names. "order" takes the modules in the order of their definition.
        flatten: how the model flattens feature maps in front of a Linear, and makes features maps: "channels_first" as
            PyTorch does, "channels_last" if it permutes them to the order of Keras before. Or a dictionary with one of
            these for each layer, or the number of channels of the maps that the layer takes in one row, or a pair of
            either for what it takes and what it gives (``{"dense": (None, 32)}`` before a reshape to maps). Need not be
            given where an ``nn.Sequential`` shows it by an ``nn.Flatten`` or ``nn.Unflatten``.
        config: the configuration of the model, for files without it, or instead of theirs: what ``model.to_json()``
            returned, a file that holds that, or the dictionary.
        drop: what to leave out, with its options, of "ema", "weight_decay", "gradient_accumulation" and "lambda".
        state_order: for a ``.keras`` or ``.weights.h5`` file, whose state has numbers instead of names, the names of
            the weights in the order of the optimizer. Needed only where the error asks for it: where the configuration,
            the counts and the shapes admit several orders, as with layers in a custom layer.
        custom_objects: classes of schedules by their names, for those that `torch_adadelta.schedules` does not have.

    Returns:
        A `Report`, which says what went where. A difference between the two models that changes how training goes on
        (such as another epsilon of a normalisation) is a note in it, and a UserWarning; and so are the options that the
        file does not hold.

    Raises:
        FileNotFoundError, ImportError: there is no such file; h5py is missing.
        KerasFileError: the file is damaged, hostile or without such state; or layers and modules do not match, or not
            in one way only, with a list of both. It is a ValueError.
        ValueError, TypeError: an argument is wrong.
        Whatever is raised, optimizer and model are as they were.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
        >>> optimizer = AdadeltaKeras(model.parameters())
        >>> report = load_keras("tests/data/keras/k3.keras", optimizer, model, weights=True)
        >>> optimizer.iterations, optimizer.learning_rate
        (4, 0.5)
    """
    _check_arguments(optimizer, model)
    with opened(path, config, drop, state_order, additions.uses(optimizer)) as checkpoint:
        found = _matched(checkpoint, model, mapping, match, flatten)
        notes = _differences(found, checkpoint)
        _check_coverage(found, checkpoint, optimizer, weights)
        settings = _settings(checkpoint, optimizer, custom_objects, drop) if hyperparameters else {}
        count = checkpoint.count()
        additions.check_state(checkpoint, optimizer, settings, count)
        states = _states(found, checkpoint, optimizer, notes)
        additions.check_sums(checkpoint, states, count, additions.steps(optimizer, settings))
        values = _values(found, checkpoint, optimizer, notes) if weights else []
    infos = additions.remarks(checkpoint, optimizer, settings, count)
    if hyperparameters:
        notes += _unconfirmed(checkpoint, optimizer, settings)
        notes += additions.exclusions_note(optimizer, settings)
        infos += checkpoint.notes
    variables = _norm_variables(found, optimizer)
    if _has_a_part(optimizer):
        notes += _other_norms(variables, settings.get("clipnorm", optimizer.clipnorm))
        variables = []
    infos += [f"left out: {what}" for what in checkpoint.dropped]
    if notes:  # before anything is changed, for the user may have made errors of warnings
        warnings.warn("; ".join([f"{path}: {notes[0]}", *notes[1:]]), stacklevel=2)
    reported = {name: value for name, value in settings.items() if _is_news(checkpoint, optimizer, name, value)}
    with optimizer.restored_on_error():
        optimizer._set_count(0)  # with gradients that wait for their update, some options could not be set
        for name, value in settings.items():
            setattr(optimizer, name, value)
        if not _has_a_part(optimizer):
            optimizer.norm_variables = [variable.pieces for variable in variables]
        optimizer._set_count(count)
        for param in [param for group in optimizer.param_groups for param in group["params"]]:
            own = states.get(param, {})
            before = optimizer.state.pop(param, {})
            if masters.KEY in before:  # a copy, for the weights may be written
                own[masters.KEY] = before[masters.KEY].clone()
            if own:
                optimizer.state[param] = own
        _set_values(values, optimizer)
    report = Report(f"{path}: {checkpoint.source}", optimizer.iterations, reported, _rows(found), [*notes, *infos])
    report.norm_variables = [(variable.weight, variable.names) for variable in variables]
    return report


def _check_arguments(optimizer: Any, model: Any) -> None:
    if not isinstance(optimizer, AdadeltaKeras):
        raise TypeError(f"optimizer must be an AdadeltaKeras, got {type(optimizer).__name__}")
    optimizer.check_not_swapped("no file of Keras can be read or written")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for group_index, group in enumerate(optimizer.param_groups):
        for index, param in enumerate(group["params"]):
            if hasattr(param, "placements") or param.is_meta or param.is_complex():
                kind = "a DTensor" if hasattr(param, "placements") else "complex" if param.is_complex() else "on meta"
                raise ValueError(
                    f"{name_in(optimizer.param_groups, group_index, index)} is {kind}; load into a plain model first, "
                    "and shard or move it after that"
                )


def _matched(checkpoint: Checkpoint, model: nn.Module, mapping: Any, how: str, flatten: Any) -> Match:
    return match(checkpoint, model, mapping, how, flatten)


def _rows(found: Match) -> list[tuple[str, str, str, bool]]:
    rows = []
    for move in found.moves:
        rows_of = "" if move.first is None else f"[{move.first}:]"
        rows.append((move.label, move.name + rows_of, str(move.layout), move.variable.has_state))
    return rows


def _params(optimizer: AdadeltaKeras) -> set[Tensor]:
    return {param for group in optimizer.param_groups for param in group["params"]}


def _neutral(name: str) -> float:
    """The value of a parameter that Keras does not have at which it does nothing."""
    return 1.0 if name.rpartition(".")[2].startswith("weight") else 0.0


def _is_param(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _check_coverage(found: Match, checkpoint: Checkpoint, optimizer: AdadeltaKeras, weights: bool) -> None:
    """Raises unless every parameter of the optimizer gets state, or needs none, and every state has a parameter."""
    trained = _params(optimizer)
    names: dict[Tensor, str] = {}
    has_state: dict[Tensor, tuple[bool, bool]] = {}
    for move in found.moves:
        if not _is_param(move.tensor):
            continue
        names[move.tensor] = move.name
        variable = move.variable
        own = (variable.has_state, variable.is_frozen)
        if has_state.setdefault(move.tensor, own) != own:
            raise KerasFileError(f"{checkpoint.path}: Keras trained a part of {move.name}, and froze the rest")
        if variable.has_state and not variable.is_frozen and move.tensor not in trained:
            raise KerasFileError(
                f"{checkpoint.path}: Keras trained {move.label}, but {move.name} is no parameter of the optimizer; add "
                "it, with requires_grad_(False) if it is frozen by now"
            )
        if (variable.is_frozen or not variable.has_state) and move.tensor in trained and move.tensor.requires_grad:
            why = "does not train" if variable.has_state else "did not train"
            raise KerasFileError(
                f"{checkpoint.path}: Keras {why} {move.label}, but {move.name} is a parameter of the "
                "optimizer; call requires_grad_(False) on it to keep it so"
            )
    for name, tensor in found.neutral:
        if not _is_param(tensor):
            continue
        neutral = _neutral(name)
        is_second = name.rpartition(".")[2].startswith("bias_hh")
        reason = (
            "PyTorch's LSTM adds two biases, which get the same gradient, where Keras has one: trained, both would "
            "move. Call torch_adadelta.keras.freeze_second_biases(model)"
            if is_second
            else f"Keras has no such weight. Set it to {neutral:g} and call requires_grad_(False) on it"
        )
        if tensor in trained and tensor.requires_grad:
            raise KerasFileError(f"{checkpoint.path}: {name} would be trained. {reason}")
        if not weights and bool((tensor.detach() != neutral).any()):
            raise KerasFileError(f"{checkpoint.path}: {name} is not {neutral:g}. {reason}")
        names[tensor] = name
    for group_index, group in enumerate(optimizer.param_groups):
        for index, param in enumerate(group["params"]):
            if param not in names:
                raise KerasFileError(
                    f"{checkpoint.path}: {name_in(optimizer.param_groups, group_index, index)} of shape "
                    f"{tuple(param.shape)} is in the optimizer and corresponds to no weight of Keras. " + _sides(found)
                )


def _sides(found: Match) -> str:
    return "What corresponds:" + "".join(f"\n  {move.label} → {move.name}" for move in found.moves)


def _settings(
    checkpoint: Checkpoint,
    optimizer: AdadeltaKeras,
    custom_objects: Mapping[str, Any] | None,
    drop: Collection[str],
) -> dict[str, Any]:
    """The hyperparameters to set, checked as the constructor checks them."""
    found = dict(checkpoint.hyperparameters)
    if found.get("epsilon") == 0 and checkpoint.generation != LEGACY:
        raise KerasFileError(
            f"{checkpoint.path}: its optimizer has epsilon={found['epsilon']!r}, which stays 0 in this Keras, and "
            "means 1e-7 for AdadeltaKeras, as in TensorFlow 2.4. Give AdadeltaKeras all options, with an epsilon as "
            "small as you like, and pass hyperparameters=False"
        )
    if isinstance(found.get("learning_rate"), dict):
        try:
            found["learning_rate"] = schedules.deserialize(found["learning_rate"], custom_objects)
        except (ValueError, TypeError, KeyError) as error:
            raise KerasFileError(
                f"{checkpoint.path}: its learning-rate schedule cannot be made: {error}. Pass custom_objects, or "
                "hyperparameters=False"
            ) from error
    if "epsilon" in found:  # the whole configuration is there, so what is not in it is not set
        kept = {"name", "learning_rate", "rho", "epsilon", *dropped_options(drop)}
        defaults = {option.name: option.default for option in OPTIONS if option.keras and option.name not in kept}
        found = {**defaults, **found}
    try:
        AdadeltaKeras([torch.zeros(1)], **found)
    except (ValueError, TypeError) as error:
        raise KerasFileError(f"{checkpoint.path}: {error}") from error
    # One norm or the other: the old one goes before the new one comes. So does weight decay that no clip option admits.
    last = [name for name in CLIPPING if found.get(name) is not None]
    return {name: found[name] for name in sorted(found, key=lambda name: (name in last, name != _DECOUPLED))}


_DECOUPLED: Final = "decoupled_weight_decay"


def _is_news(checkpoint: Checkpoint, optimizer: AdadeltaKeras, name: str, value: Any) -> bool:
    """Whether a report is to name an option: not if nobody gave what only Keras 3 has."""
    option, before = BY_NAME[name], getattr(optimizer, name)
    return not option.is_keras3 or value != option.default or (before is not value and before != value)


def _states(
    found: Match, checkpoint: Checkpoint, optimizer: AdadeltaKeras, notes: list[str]
) -> dict[Tensor, dict[str, Tensor]]:
    states: dict[Tensor, dict[str, Tensor]] = {}
    rounded = set()
    trained = _params(optimizer)
    for key in SLOTS:
        for param, array in _assembled(found, checkpoint, key):
            if param not in trained:  # frozen, with state of the time before
                continue
            if key not in ACCUMULATORS and not param.requires_grad:
                continue
            if key in ACCUMULATORS and (array < 0).any():
                raise KerasFileError(
                    f"{checkpoint.path}: {key} of {_name_of(found, param)} has negative numbers, which an average of "
                    "squares cannot have; it is damaged, or the state of another optimizer"
                )
            state = states.setdefault(param, {})
            for own in (*ACCUMULATORS, key):
                if own not in state:
                    state[own] = optimizer.initial_state(param, own)
            if _is_rounded(array, state[key].dtype):
                rounded.add(_name_of(found, param))
            state[key].copy_(stored(torch.from_numpy(array), state[key].dtype))
    if rounded:
        notes.append(f"the state of {', '.join(sorted(rounded))} was rounded to its dtype here")
    return states


def _values(
    found: Match, checkpoint: Checkpoint, optimizer: AdadeltaKeras, notes: list[str]
) -> list[tuple[Tensor, Tensor]]:
    values = []
    dtypes = {param: master.dtype for param, master in optimizer.master_params()}
    for tensor, array in _assembled(found, checkpoint, "value"):
        dtype = dtypes.get(tensor, tensor.dtype)
        if _is_rounded(array, dtype):
            notes.append(f"{_name_of(found, tensor)} was rounded to its dtype, {tensor.dtype}")
        values.append((tensor, stored(torch.from_numpy(array), dtype)))
    for name, tensor in found.neutral:
        if _is_param(tensor):
            values.append((tensor, torch.full_like(tensor, _neutral(name))))
    return values


def _set_values(values: list[tuple[Tensor, Tensor]], optimizer: AdadeltaKeras) -> None:
    """Writes the tensors of the model: all, or none if one cannot be written to."""
    written: list[tuple[Tensor, Tensor]] = []
    trained = _params(optimizer)
    with torch.no_grad():
        try:
            for tensor, value in values:
                before = tensor.detach().clone()
                if tensor in trained:
                    optimizer.set_master(tensor, value)
                else:
                    tensor.copy_(value)
                written.append((tensor, before))
        except BaseException:
            for tensor, before in written:
                tensor.copy_(before)
            raise


def _is_rounded(array: Array, dtype: torch.dtype) -> bool:
    return array.dtype.kind == "f" and torch.finfo(dtype).bits < array.dtype.itemsize * 8


def _name_of(found: Match, tensor: Tensor) -> str:
    return next(move.name for move in found.moves if move.tensor is tensor)


def _assembled(found: Match, checkpoint: Checkpoint, key: str) -> Iterator[tuple[Tensor, Array]]:
    """The arrays for the tensors of PyTorch: of their shape, from all moves that go to them."""
    by_tensor: dict[Tensor, list[Move]] = {}
    for move in found.moves:
        if key == "value" or key in move.variable.slots:
            by_tensor.setdefault(move.tensor, []).append(move)
    read: dict[int, Array] = {}
    for tensor, moves in by_tensor.items():
        parts = []
        for move in moves:
            stored: Stored = getattr(move.variable, key)
            array = read.pop(id(stored), None)
            if array is None:
                array = explained(checkpoint, stored)
            if move.row is not None:
                read[id(stored)] = array  # another move takes the other row
                array = array[move.row]
            parts.append(move.layout.to_torch(array))
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
        yield tensor, np.array(joined, dtype=joined.dtype.newbyteorder("="), order="C")


# ---- What the file does not hold, and differences --------------------------------------------------------------------


def _differences(found: Match, checkpoint: Checkpoint) -> list[str]:
    """What makes the modules compute something else than the layers, as far as the configuration tells."""
    notes = []
    for layer, unit in found.pairs:
        config, module = layer.config, unit.module
        epsilon, eps = config.get("epsilon"), getattr(module, "eps", None)
        if isinstance(epsilon, int | float) and eps is not None and not math.isclose(epsilon, eps, rel_tol=1e-6):
            notes.append(f"{unit.path} has eps={eps:g}, and {layer.path} epsilon={epsilon:g}")
        momentum, ours = config.get("momentum"), getattr(module, "momentum", None)
        if isinstance(momentum, int | float) and isinstance(ours, float) and abs(1 - momentum - ours) > 1e-9:
            notes.append(
                f"{unit.path} has momentum={ours:g}, and {layer.path} momentum={momentum:g}, which is "
                f"momentum={1 - momentum:g} in PyTorch"
            )
        notes += _recurrent_differences(layer, unit)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            is_legacy = checkpoint.generation == LEGACY
            if is_legacy != bool(module.sparse):
                rows = "only the rows that a batch uses" if is_legacy else "all rows"
                notes.append(f"{unit.path}: this Keras updates {rows} of an embedding, as sparse={is_legacy} does")
            is_trained = any(variable.has_state and not variable.is_frozen for variable in layer.variables)
            if checkpoint.generation == KERAS3 and checkpoint.backend in (None, "tensorflow") and is_trained:
                notes.append(
                    f"{unit.path}: Keras 3 on TensorFlow adds the squares of the gradients of rows that a batch uses "
                    "more than once, where AdadeltaKeras squares their sum; with such batches training goes on "
                    "differently"
                )
    return notes


def _unconfirmed(checkpoint: Checkpoint, optimizer: AdadeltaKeras, settings: Mapping[str, Any]) -> list[str]:
    """A note on the options that the optimizer has from its own arguments, and the file cannot confirm."""
    names = [name for name in _OPTIONS if name not in settings]
    if not names:
        return []
    if checkpoint.generation != LEGACY:
        names += additions.given(optimizer)
    own = ", ".join(f"{name}={_text(getattr(optimizer, name))}" for name in names)
    others = "" if checkpoint.generation == LEGACY or "weight_decay" in names else ", and no weight decay"
    is_scheduled = checkpoint.generation == KERAS3 and "learning_rate" in names
    rate = " (Keras had a schedule)" if is_scheduled else ""
    return [
        f"not in the file, so that training goes on with what the optimizer has: {own}{others}; see that Keras had the "
        f"same{rate}"
    ]


# In the order in which they are told: what does most harm first.
_OPTIONS: Final = ("clipnorm", "clipvalue", "global_clipnorm", "learning_rate", "decay", "rho", "epsilon")


class _NormVariable(NamedTuple):
    """A weight of Keras that is not one to one with a parameter."""

    weight: str
    names: str
    pieces: list[tuple[Tensor, int, int]]


def _norm_variables(found: Match, optimizer: AdadeltaKeras) -> list[_NormVariable]:
    """The weights that are trained and not one to one with parameters, of which `clipnorm` takes the norms in Keras."""
    trained = _params(optimizer)
    weights: dict[int, list[Move]] = {}
    counts: Counter[Tensor] = Counter()
    for move in found.moves:
        if move.tensor in trained and move.tensor.requires_grad:
            weights.setdefault(id(move.variable), []).append(move)
            counts[move.tensor] += 1
    variables = []
    for moves in weights.values():
        if len(moves) == 1 and counts[moves[0].tensor] == 1:
            continue
        names, pieces = [], []
        for move in moves:
            shape = move.variable.value.shape
            first = move.first or 0
            end = first + move.layout.result(shape if move.row is None else shape[1:])[0]
            is_whole = counts[move.tensor] == 1
            names.append(move.name if is_whole else f"{move.name}[{first}:{end}]")
            pieces.append((move.tensor, first, end))
        weight = f"{moves[0].layer.path}/{moves[0].variable.role}"
        variables.append(_NormVariable(weight, " and ".join(names), pieces))
    return variables


def _has_a_part(optimizer: AdadeltaKeras) -> bool:
    """Whether other processes have other parameters, so that `norm_variables` cannot be set."""
    request = optimizer.step_request()
    return request.norm_group is not None or request.is_part


def _other_norms(variables: list[_NormVariable], clipnorm: float | None) -> list[str]:
    """A note on norms that are others than in Keras."""
    if clipnorm is None or not variables:
        return []
    pairs = "; ".join(f"{names} (in Keras {weight})" for weight, names, _ in variables)
    return [
        f"clipnorm={clipnorm:g} takes the norm of each parameter, and Keras of each of its weights, which are not the "
        f"same for {pairs}: there gradients are clipped differently, for norm_variables is not for norm_group, nor for "
        "ZeroRedundancyOptimizer"
    ]


def _recurrent_differences(layer: Layer, unit: Unit) -> Iterator[str]:
    if not isinstance(unit.module, nn.RNNBase | nn.RNNCellBase):
        return
    inner = layer.config.get("layer")
    config = inner["config"] if isinstance(inner, dict) and isinstance(inner.get("config"), dict) else layer.config
    for key, expected in (("activation", "tanh"), ("recurrent_activation", "sigmoid")):
        value = config.get(key)
        if isinstance(value, dict):
            value = value.get("config", value.get("class_name"))
        if isinstance(value, str) and value not in (expected, _nonlinearity(unit)):
            yield f"{layer.path} has {key}={value!r}, and {unit.path} has {expected}"
    for key, does in (("go_backwards", "goes forwards"), ("stateful", "begins each batch anew")):
        if config.get(key) is True:
            yield f"{layer.path} has {key}=True, and {unit.path} {does}"
    if layer.config.get("merge_mode", "concat") != "concat":
        mode = layer.config["merge_mode"]
        yield f"{layer.path} has merge_mode={mode!r}, and {unit.path} concatenates both directions"


def _nonlinearity(unit: Unit) -> str | None:
    return getattr(unit.module, "nonlinearity", None)


# ---- To Keras -------------------------------------------------------------------------------------------------------


def save_keras(
    path: str | Path,
    optimizer: AdadeltaKeras,
    model: nn.Module,
    template: str | Path,
    *,
    weights: bool = True,
    hyperparameters: bool = True,
    mapping: Mapping[str, Any] | None = None,
    match: str = "auto",
    flatten: str | Mapping[str, Any] | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    state_order: Sequence[str] | None = None,
    drop: Collection[str] = (),
) -> Report:
    """Writes a copy of a file of Keras with the state, the weights and the hyperparameters of now, for Keras to go on.

    Args:
        path: the file to write. It is written beside it and renamed into place when it is whole; it may be `template`.
        optimizer: its state and its hyperparameters are written. A parameter without state yet gets zeros.
        model: has the weights.
        template: a ``.h5``, ``.keras`` or ``.weights.h5`` file that holds the same model with the state of an Adadelta,
            such as the one that was loaded. TensorFlow checkpoints cannot be written.
        weights: False to leave the weights of the template.
        hyperparameters: False to leave those of the template. Otherwise they are written wherever the file has a place
            for them; the `Report` names those without.
        mapping: as for `load_keras`.
        match: as for `load_keras`.
        flatten: as for `load_keras`.
        config: as for `load_keras`.
        state_order: as for `load_keras`.
        drop: what may be left out where the template has no place for it: "ema" and "gradient_accumulation", the moving
            averages and sums of gradients, with their options; "weight_decay", which goes for all parameters alike in
            Keras, and off the weights; "exclusions" from it, which are in no file; and "lambda" as for `load_keras`.

    Raises:
        What `load_keras` raises, and
        ValueError: the template is a TensorFlow checkpoint; or it has a schedule and the optimizer a number, or the
            other way round; or the optimizer has what that Keras does not know.
        `path` is not touched then.
    """
    _check_arguments(optimizer, model)
    if set(drop) - set(additions.DROPPABLE_ON_SAVE):
        raise ValueError(f"drop must be a set of {', '.join(additions.DROPPABLE_ON_SAVE)}; got {drop!r}")
    path, template = Path(path), Path(template)
    lambdas = {"lambda"} & set(drop)
    with opened(template, config, lambdas, state_order, additions.uses(optimizer)) as checkpoint:
        if checkpoint.format == "TensorFlow checkpoint":
            raise ValueError(f"{template} is a TensorFlow checkpoint, which is not written; use a .h5 or .keras file")
        found = _matched(checkpoint, model, mapping, match, flatten)
        _check_coverage(found, checkpoint, optimizer, weights=False)
        notes: list[str] = []
        left_out = additions.check_places(checkpoint, optimizer, drop, hyperparameters)
        arrays = _arrays(found, optimizer, weights)
        count = int(optimizer.param_groups[0]["iterations"])
        arrays[checkpoint.iterations.name] = np.asarray(count, checkpoint.iterations.dtype)
        edit: Callable[[dict[str, Any]], Any] | None = None
        written: dict[str, Any] = {}
        if hyperparameters:
            values = _written_values(checkpoint, optimizer, drop, left_out, notes)
            if checkpoint.learning_rate is not None and "learning_rate" in values:
                arrays[checkpoint.learning_rate.name] = np.asarray(
                    values["learning_rate"], checkpoint.learning_rate.dtype
                )
                written["learning_rate"] = values["learning_rate"]
            if "epsilon" in checkpoint.hyperparameters:
                written = values

                def edit(options: dict[str, Any]) -> None:
                    _edit(options, values)

            needed = [name for name, default in additions.DEFAULTS.items() if values.get(name, default) != default]
            missing = [name for name in ("learning_rate", "rho", "epsilon", *needed) if name not in written]
            if missing:
                notes.append(f"the file has no place for {', '.join(missing)}; give them to Keras when you compile")
        source = f"{path}: {checkpoint.source}"
    _write(path, template, checkpoint.format, arrays, edit)
    notes += [f"left out: {DROPPABLE[name]}" for name in left_out]
    return Report(source, optimizer.iterations, written, _rows(found), notes)


def _arrays(found: Match, optimizer: AdadeltaKeras, weights: bool) -> dict[str, Array]:
    """What to write, by the names of the datasets."""
    arrays: dict[str, Array] = {}
    of_params = dict(optimizer.master_params()) if weights else {}
    trained = _params(optimizer)
    for move in found.moves:
        # A parameter that is frozen, and not in the optimizer, keeps the state in the template.
        keys = [*(move.variable.slots if move.tensor in trained else ()), *(["value"] if weights else [])]
        for key in keys:
            stored: Stored = getattr(move.variable, key)
            state = optimizer.state.get(move.tensor, {})
            if key == "value":
                tensor = of_params.get(move.tensor, move.tensor)
            elif key in state:
                tensor = state[key]
            elif key == averages.KEY and not move.tensor.requires_grad and move.row is None:
                continue  # that of the template stays
            else:
                tensor = optimizer.initial_state(move.tensor, key)
            tensor = tensor.detach().cpu()
            array = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
            shape = stored.shape if move.row is None else stored.shape[1:]
            if move.first is not None:
                result = move.layout.result(shape)
                array = array[move.first : move.first + result[0]]
            array = move.layout.to_keras(array, shape)
            if move.row is None:
                arrays[stored.name] = array
            else:
                arrays.setdefault(stored.name, np.zeros(stored.shape, array.dtype))[move.row] = array
    return arrays


def _written_values(
    checkpoint: Checkpoint,
    optimizer: AdadeltaKeras,
    drop: Collection[str],
    left_out: Collection[str],
    notes: list[str],
) -> dict[str, Any]:
    """The hyperparameters as Keras has them in its configuration."""
    values = {"decay": 0.0, **optimizer.get_config()}
    for name in ("name", "weight_decay", "decoupled_weight_decay", *dropped_options(left_out)):
        values.pop(name, None)
    values |= additions.written_weight_decay(checkpoint, optimizer, drop, notes)
    factor = values.get("loss_scale_factor")
    if checkpoint.generation != KERAS3 and factor is not None:
        raise ValueError(
            f"the optimizer has loss_scale_factor={factor!r}, which this Keras does not have; set it to None"
        )
    is_scheduled = isinstance(checkpoint.hyperparameters.get("learning_rate"), dict) or (
        checkpoint.generation == KERAS3 and checkpoint.learning_rate is None
    )
    if isinstance(values["learning_rate"], dict) != is_scheduled and "learning_rate" in checkpoint.hyperparameters:
        ours = "a schedule" if isinstance(values["learning_rate"], dict) else "a number"
        raise ValueError(
            f"the learning rate of the optimizer is {ours}, and that of {checkpoint.path} is not; save a template with "
            "Keras that has the same kind, or pass hyperparameters=False"
        )
    if checkpoint.generation != LEGACY:
        if values["decay"]:
            raise ValueError(
                f"the optimizer has decay={values['decay']!r}, which this Keras does not have; use a schedule"
            )
        del values["decay"]
        values = {**additions.DEFAULTS, **values}
        clipping = [name for name in CLIPPING if values.get(name) is not None]
        if any(values[name] == 0 for name in clipping):
            name = next(name for name in clipping if values[name] == 0)
            raise ValueError(f"the optimizer has {name}=0, which means no clipping in this Keras; set it to None")
        if len(clipping) > 1:
            raise ValueError(
                f"the optimizer has {' and '.join(clipping)}, of which this Keras takes one only; pass "
                "hyperparameters=False"
            )
    else:  # all that is left of averages are options without use_ema
        values = {name: value for name, value in values.items() if not BY_NAME[name].is_keras3}
    return {"clipvalue": None, "clipnorm": None, "global_clipnorm": None, **values}


def _edit(options: dict[str, Any], values: dict[str, Any]) -> None:
    """Sets the hyperparameters in a configuration of Keras, in place."""
    for name, value in values.items():
        if name == "learning_rate" and "lr" in options:
            name = "lr"
        if isinstance(value, dict) and isinstance(options.get(name), dict):
            options[name] = {**options[name], "class_name": value["class_name"], "config": value["config"]}
        elif value is not None or name in options:
            options[name] = value


def _write(
    path: Path, template: Path, format: str, arrays: dict[str, Array], edit: Callable[[dict[str, Any]], Any] | None
) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        if format == ".keras":
            _write_zip(part, template, arrays, edit)
        else:
            shutil.copyfile(template, part)
            with hdf5.required().File(part, "r+") as file:
                _write_datasets(file, arrays)
                if edit is not None:
                    training = json.loads(file.attrs["training_config"])
                    edit(training["optimizer_config"]["config"])
                    file.attrs["training_config"] = json.dumps(training)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            shutil.copymode(path if path.exists() else template, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _write_datasets(file: Any, arrays: dict[str, Array]) -> None:
    for name, array in arrays.items():
        dataset = file[name]
        if dataset.dtype.kind not in "fiu":  # bfloat16, which NumPy does not know
            bits = torch.from_numpy(np.array(array)).to(torch.bfloat16).view(torch.int16).numpy()
            dataset[...] = bits.view(dataset.dtype)
        else:
            dataset[...] = array


def _write_zip(
    part: Path, template: Path, arrays: dict[str, Array], edit: Callable[[dict[str, Any]], Any] | None
) -> None:
    with zipfile.ZipFile(template) as old, zipfile.ZipFile(part, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename == _WEIGHTS:
                buffer = BytesIO(data)
                with hdf5.required().File(buffer, "r+") as file:
                    _write_datasets(file, arrays)
                data = buffer.getvalue()
            elif info.filename == "config.json" and edit is not None:
                config = json.loads(data)
                edit(config["compile_config"]["optimizer"]["config"])
                data = json.dumps(config).encode()
            new.writestr(info.filename, data)
