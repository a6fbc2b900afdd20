"""Moves a training job: the state of Keras' Adadelta and the weights of its model into PyTorch, and back."""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from torch_adadelta import schedules
from torch_adadelta.backends import masters
from torch_adadelta.backends.opmath import stored
from torch_adadelta.keras import additions, matching
from torch_adadelta.keras.checkpoints import opened
from torch_adadelta.keras.config import ADADELTA, CLIPPING, WEIGHTS_ALONE, dropped_options
from torch_adadelta.keras.contents import Checkpoint, explained
from torch_adadelta.keras.correspondence import Match
from torch_adadelta.keras.differences import differences, has_a_part, norm_variables, other_norms, unconfirmed
from torch_adadelta.keras.errors import Array, KerasFileError, LazyArray
from torch_adadelta.keras.layers import ACCUMULATORS, SLOTS
from torch_adadelta.keras.layouts import row_of
from torch_adadelta.keras.modules import params_of
from torch_adadelta.keras.report import Report
from torch_adadelta.optimizer import AdadeltaKeras
from torch_adadelta.options import BY_NAME, OPTIONS
from torch_adadelta.step.validation import name_in


def freeze_second_biases(model: nn.Module) -> nn.Module:
    """Sets the second bias of every LSTM and RNN of a model to zero and freezes it.

    LSTM and SimpleRNN have one bias in Keras. In PyTorch they have two, ``bias_ih`` and ``bias_hh``, which are added
    and get the same gradient. If both are trained, their sum moves twice as far as the bias in Keras. (A GRU with
    ``reset_after=True`` has two biases in both frameworks, and keeps them.)

    Args:
        model (nn.Module): the model, which is changed in place.

    Returns:
        The model.
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


def load_keras(
    path: str | Path,
    optimizer: AdadeltaKeras,
    model: nn.Module,
    *,
    weights: bool = False,
    hyperparameters: bool = True,
    state: bool = True,
    mapping: Mapping[str, Any] | None = None,
    match: str = "auto",
    flatten: str | Mapping[str, Any] | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    drop: Collection[str] = (),
    state_order: Sequence[str] | None = None,
    custom_objects: Mapping[str, Any] | None = None,
) -> Report:
    """Loads the state of Keras' Adadelta from a file, so that training continues where Keras stopped.

    Sets ``optimizer.iterations``, the state of each parameter, and the hyperparameters that the file has, including a
    schedule. ``accum_grad`` becomes ``square_avg`` and ``accum_var`` becomes ``acc_delta``, each transformed as its
    weight is. Moving averages (``use_ema``) and sums of gradients (``gradient_accumulation_steps``) are loaded too. If
    the file has them without the options, the optimizer must have the options. ``optimizer.norm_variables`` is set, so
    that ``clipnorm`` uses the norms of Keras' weights, not of parameters.

    The kind of the file is detected: ``.h5``, ``.keras``, ``.weights.h5``, a TensorFlow checkpoint (its prefix, index
    or directory) or a SavedModel, of standalone Keras 2, TensorFlow, either class of tf_keras, or Keras 3. Neither
    TensorFlow nor Keras is needed. All files but TensorFlow checkpoints need h5py. Nothing in the file is executed. The
    report names Lambda layers, which the PyTorch model must compute.

    With mixed precision (``mixed_float16``), the state and the number of steps of the Adadelta inside the
    LossScaleOptimizer are loaded. The loss scale is not loaded; the report gives it if the file does.

    Args:
        path (str or Path): the file.
        optimizer (AdadeltaKeras): has all parameters of `model` that Keras trained.
        model (nn.Module): computes the same as the Keras model.
        weights (bool, optional): True also sets the parameters, and the statistics of batch normalisation.
            (default: False)
        hyperparameters (bool, optional): False keeps the hyperparameters of the optimizer. (default: True)
        state (bool, optional): False loads without state. Then `weights` can come from a file of any optimizer or none,
            including ``save_weights`` in ``.h5``. Hyperparameters are loaded if the file is known to be of an Adadelta.
            The state of the parameters and ``optimizer.iterations`` do not change. Which weights Keras trained does not
            matter. (default: True)
        mapping (dict, optional): what cannot be inferred. A key is a path in Keras:

            - a layer, for a module: ``{"dense": "encoder.fc1"}``;
            - a custom layer or a nested model, for a module that contains modules: ``{"transformer_block": "block"}``.
              The layers below the one are matched with the modules below the other. Of several such keys, the longest
              is used;
            - a weight, for a parameter or rows of one, with a permutation or a `Layout` if it is transposed or
              reshaped: ``{"dense/kernel": ("fc1.weight", (1, 0))}``,
              ``{"q/kernel": ("attention.in_proj_weight[0:16]", (1, 0))}``. The other weights of the layer follow.

            The value None leaves out a layer, or everything below a path. (default: None)
        match (str, optional): how layers are matched with modules. (default: "auto")

            - ``"auto"`` uses the pairs that occur in every assignment that kinds and shapes allow. Then it uses names,
              if the layers and modules that still compete have the same names. Then it uses the order, if each
              competing layer is known to be computed from the one before it and the modules are in an
              ``nn.Sequential``.
            - ``"order_within_kind"`` matches the layers that ``"auto"`` leaves open in the order in which their modules
              are defined: for example, several LayerNorms of one shape in a functional model.
            - ``"order"`` matches all layers in the order in which the modules are defined. The layers of a subclassed
              model are in the order of their creation.
            - ``"names"`` requires equal names.
        flatten (str or dict, optional): how the model flattens feature maps before a Linear, and how it turns features
            into maps. "channels_first" is the way of PyTorch. "channels_last" is for a model that first permutes maps
            to the order of Keras. A dictionary has one of these for each layer, or the number of channels of the maps
            that the layer takes in one row, or a pair for its input and its output (``{"dense": (None, 32)}`` before a
            reshape to maps). Not needed if an ``nn.Sequential`` has an ``nn.Flatten`` or ``nn.Unflatten`` there.
            (default: None)
        config (str, Path or dict, optional): the configuration of the model, for a file without one, or instead of its
            own: the output of ``model.to_json()``, a file that contains it, or the dictionary. (default: None)
        drop (collection of str, optional): what is left out, with its options: "ema", "weight_decay",
            "gradient_accumulation". (default: ())
        state_order (sequence of str, optional): for a file with numbered state (``.keras``, ``.weights.h5``, the
            ``.h5`` of Keras 2), the names of the weights in the order of the optimizer. Needed only if an error asks
            for it, because the configuration, the counts and the shapes admit several orders, as with layers in a
            custom layer. (default: None)
        custom_objects (dict, optional): classes of schedules that `torch_adadelta.schedules` does not have, by name.
            (default: None)

    Returns:
        A `Report` of what was loaded. A difference between the two models that changes the training, such as another
        epsilon of a normalisation, is a note in it and a UserWarning. So are the options that the file does not have.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: h5py is missing.
        KerasFileError: the file is damaged or hostile; it has no such state and `state` is True; or layers and modules
            do not match, or match in several ways. The message then lists both. It is a ValueError.
        ValueError: an argument has a wrong value.
        TypeError: an argument has a wrong type.

    After any error, the optimizer and the model are as before.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
        >>> optimizer = AdadeltaKeras(model.parameters())
        >>> report = load_keras("tests/data/keras/k3.keras", optimizer, model, weights=True)
        >>> optimizer.iterations, optimizer.learning_rate
        (4, 0.5)
    """
    check_arguments(optimizer, model)
    with opened(path, config, drop, state_order, additions.uses(optimizer), state, WEIGHTS_ALONE) as checkpoint:
        found = matching.match(checkpoint, model, mapping, match, flatten)
        notes = differences(found, checkpoint)
        check_coverage(found, checkpoint, optimizer, weights)
        settings = _settings(checkpoint, optimizer, custom_objects, drop) if hyperparameters else {}
        if not (weights or state or settings):
            kept = "hyperparameters=False" if not hyperparameters else "no hyperparameters of an Adadelta in it"
            raise KerasFileError(
                f"{checkpoint.path}: with weights=False, state=False and {kept}, nothing is loaded; pass weights=True"
            )
        states: dict[Tensor, dict[str, Tensor]] = {}
        if state:
            count = checkpoint.count()
            additions.check_state(checkpoint, optimizer, settings, count)
            states = _states(found, checkpoint, optimizer, notes)
            additions.check_sums(checkpoint, states, count, additions.steps(optimizer, settings))
            infos = additions.remarks(checkpoint, optimizer, settings, count)
        else:
            infos = [_STATELESS.get(checkpoint.optimizer, _OF_ANOTHER.format(name=checkpoint.optimizer))]
        values = _values(found, checkpoint, optimizer, notes) if weights else []
    if hyperparameters and checkpoint.optimizer == ADADELTA:
        notes += unconfirmed(checkpoint, optimizer, settings)
        notes += additions.exclusions_note(optimizer, settings)
        infos += checkpoint.notes
    is_going_on = state or bool(settings)  # as in Keras, so that clipnorm takes the norms of its weights
    variables = norm_variables(found, optimizer) if is_going_on else []
    if has_a_part(optimizer):
        notes += other_norms(variables, settings.get("clipnorm", optimizer.clipnorm))
        variables = []
    if checkpoint.iterations is None and state:
        infos.append("there are no iterations in the file, and this Keras, too, goes on from 0")
    infos += [*checkpoint.remarks, *(f"left out: {what}" for what in _frozen_elsewhere(found, optimizer))]
    if notes:  # before anything is changed, for the user may have made errors of warnings
        warnings.warn("; ".join([f"{path}: {notes[0]}", *notes[1:]]), stacklevel=2)
    reported = {name: value for name, value in settings.items() if _is_news(checkpoint, optimizer, name, value)}
    with optimizer.restored_on_error():
        if state:
            optimizer.set_calls(0)  # with gradients that wait for their update, some options could not be set
        for name, value in settings.items():
            setattr(optimizer, name, value)
        if is_going_on and not has_a_part(optimizer):
            optimizer.norm_variables = [variable.pieces for variable in variables]
        if state:
            optimizer.set_calls(count)
        for param in [param for group in optimizer.param_groups for param in group["params"]]:
            before = optimizer.state.pop(param, {})
            own = states.get(param, {}) if state else dict(before)
            if masters.KEY in before:  # a copy, for the weights may be written
                own[masters.KEY] = before[masters.KEY].clone()
            if own:
                optimizer.state[param] = own
        _set_values(values, optimizer)
    moves = rows_of(found) if weights or state else []
    report = Report(f"{path}: {checkpoint.source}", optimizer.iterations, reported, moves, [*notes, *infos])
    report.norm_variables = [(variable.weight, variable.names) for variable in variables]
    return report


# What a report tells of a file that was read without state, by the class of its optimizer.
_STATELESS: Final[dict[str | None, str]] = {
    None: "its optimizer is not known to be Adadelta; neither its state nor its hyperparameters were read",
    ADADELTA: "neither the state nor the iterations of its Adadelta were read",
}
_OF_ANOTHER: Final = "its optimizer is {name}, not Adadelta; neither its state nor its hyperparameters were read"


def check_arguments(optimizer: Any, model: Any) -> None:
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


def rows_of(found: Match) -> list[tuple[str, str, str, bool]]:
    return [
        (transfer.label, transfer.part, str(transfer.layout), transfer.variable.has_state)
        for transfer in found.transfers
    ]


def _neutral(name: str) -> float:
    """The value of a parameter that Keras does not have at which it does nothing."""
    return 1.0 if name.rpartition(".")[2].startswith("weight") else 0.0


def _is_param(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def check_coverage(found: Match, checkpoint: Checkpoint, optimizer: AdadeltaKeras, weights: bool) -> None:
    """Raises unless every parameter of the optimizer gets state, or needs none, and every state has a parameter."""
    trained = params_of(optimizer)
    names: dict[Tensor, str] = {}
    has_state: dict[Tensor, tuple[bool, bool]] = {}
    for transfer in found.transfers:
        if not _is_param(transfer.tensor):
            continue
        names[transfer.tensor] = transfer.name
        if not checkpoint.has_state:  # nothing says what Keras trained
            continue
        variable = transfer.variable
        own = (variable.has_state, variable.is_frozen)
        if has_state.setdefault(transfer.tensor, own) != own:
            raise KerasFileError(f"{checkpoint.path}: Keras trained a part of {transfer.name}, and froze the rest")
        if variable.has_state and not variable.is_frozen and transfer.tensor not in trained:
            raise KerasFileError(
                f"{checkpoint.path}: Keras trained {transfer.label}, but {transfer.name} is no parameter of the "
                "optimizer; add it, with requires_grad_(False) if it is frozen by now"
            )
        if (
            (variable.is_frozen or not variable.has_state)
            and transfer.tensor in trained
            and transfer.tensor.requires_grad
        ):
            why = "does not train" if variable.has_state else "did not train"
            raise KerasFileError(
                f"{checkpoint.path}: Keras {why} {transfer.label}, but {transfer.name} is a parameter of the "
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


def _frozen_elsewhere(found: Match, optimizer: AdadeltaKeras) -> list[str]:
    """A note on the state of weights that are frozen by now, and of which the optimizer has no parameter."""
    trained = params_of(optimizer)
    labels = [
        transfer.label
        for transfer in found.transfers
        if transfer.variable.has_state and _is_param(transfer.tensor) and transfer.tensor not in trained
    ]
    return [f"the state of {', '.join(labels)}, which are frozen, and not in the optimizer"] if labels else []


def _sides(found: Match) -> str:
    return "What corresponds:" + "".join(f"\n  {transfer.label} → {transfer.name}" for transfer in found.transfers)


def _settings(
    checkpoint: Checkpoint,
    optimizer: AdadeltaKeras,
    custom_objects: Mapping[str, Any] | None,
    drop: Collection[str],
) -> dict[str, Any]:
    """The hyperparameters to set, checked as the constructor checks them."""
    found = dict(checkpoint.hyperparameters)
    if found.get("epsilon") == 0 and checkpoint.generation.has_zero:
        raise KerasFileError(
            f"{checkpoint.path}: its optimizer has epsilon={found['epsilon']!r}, which stays 0 in this Keras, and "
            "means 1e-7 for AdadeltaKeras, as in TensorFlow 2.4. Give AdadeltaKeras all options, with an epsilon as "
            "small as you like, and pass hyperparameters=False"
        )
    norms = [name for name in ("clipnorm", "global_clipnorm") if found.get(name) is not None]
    if checkpoint.generation.is_norm_first and norms and found.get("clipvalue") is not None:
        raise KerasFileError(
            f"{checkpoint.path}: its optimizer has clipnorm={found[norms[0]]!r} and clipvalue={found['clipvalue']!r}. "
            "This Keras clips by the norm and then by value, AdadeltaKeras by value first. Give AdadeltaKeras the "
            "other options, with gradient_transformers that clip in this order, and pass hyperparameters=False"
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
    trained = params_of(optimizer)
    for key in SLOTS:
        for param, array in _assembled(found, checkpoint, key):
            if param not in trained:  # frozen, with state of the time before
                continue
            if key not in ACCUMULATORS and not param.requires_grad:
                continue
            if key in ACCUMULATORS and (array < 0).any():
                raise KerasFileError(
                    f"{checkpoint.path}: {key} of {_name_of(found, param)} has negative numbers, which an average of "
                    f"squares cannot have; it is damaged, or the state of another optimizer; {WEIGHTS_ALONE}"
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
    trained = params_of(optimizer)
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
    return next(transfer.name for transfer in found.transfers if transfer.tensor is tensor)


def _assembled(found: Match, checkpoint: Checkpoint, key: str) -> Iterator[tuple[Tensor, Array]]:
    """The arrays for the tensors of PyTorch: of their shape, from all transfers that go to them."""
    read: dict[int, Array] = {}
    for transfers in found.by_tensor():
        parts = []
        for transfer in transfers:
            if key != "value" and key not in transfer.variable.slots:
                continue
            stored: LazyArray = getattr(transfer.variable, key)
            array = read.pop(id(stored), None)
            if array is None:
                array = explained(checkpoint, stored)
            if transfer.row is not None:
                read[id(stored)] = array  # another transfer takes the other row
            parts.append(transfer.layout.to_torch(row_of(array, transfer.row)))
        if parts:
            joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
            yield transfers[0].tensor, np.array(joined, dtype=joined.dtype.newbyteorder("="), order="C")
