"""What the file does not hold, and what makes the model of PyTorch compute or train otherwise than that of Keras."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from torch import Tensor, nn

from torch_adadelta.keras import additions
from torch_adadelta.keras.config import ADADELTA, inner_layer
from torch_adadelta.keras.contents import KERAS3, Checkpoint
from torch_adadelta.keras.correspondence import Match, WeightTransfer
from torch_adadelta.keras.layers import Layer
from torch_adadelta.keras.modules import TorchLayer, params_of
from torch_adadelta.keras.report import text_of
from torch_adadelta.optimizer import AdadeltaKeras


def differences(found: Match, checkpoint: Checkpoint) -> list[str]:
    """What makes the modules compute something else than the layers, as far as the configuration tells."""
    notes = []
    for layer, torch_layer in found.pairs:
        config, module = layer.config, torch_layer.module
        epsilon, eps = config.get("epsilon"), getattr(module, "eps", None)
        if isinstance(epsilon, int | float) and eps is not None and not math.isclose(epsilon, eps, rel_tol=1e-6):
            notes.append(f"{torch_layer.path} has eps={eps:g}, and {layer.path} epsilon={epsilon:g}")
        momentum, ours = config.get("momentum"), getattr(module, "momentum", None)
        if isinstance(momentum, int | float) and isinstance(ours, float) and abs(1 - momentum - ours) > 1e-9:
            notes.append(
                f"{torch_layer.path} has momentum={ours:g}, and {layer.path} momentum={momentum:g}, which is "
                f"momentum={1 - momentum:g} in PyTorch"
            )
        notes += _recurrent_differences(layer, torch_layer)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and checkpoint.optimizer == ADADELTA:
            is_sparse = checkpoint.generation.is_sparse
            if is_sparse != bool(module.sparse):
                rows = "only the rows that a batch uses" if is_sparse else "all rows"
                notes.append(
                    f"{torch_layer.path}: this Keras updates {rows} of an embedding, as sparse={is_sparse} does"
                )
            is_trained = any(variable.has_state and not variable.is_frozen for variable in layer.variables)
            if checkpoint.generation == KERAS3 and checkpoint.backend in (None, "tensorflow") and is_trained:
                notes.append(
                    f"{torch_layer.path}: Keras 3 on TensorFlow adds the squares of the gradients of rows that a batch "
                    "uses more than once, where AdadeltaKeras squares their sum; with such batches training goes on "
                    "differently"
                )
    return notes


def unconfirmed(checkpoint: Checkpoint, optimizer: AdadeltaKeras, settings: Mapping[str, Any]) -> list[str]:
    """A note on the options that the optimizer has from its own arguments, and the file cannot confirm."""
    names = [name for name in _OPTIONS if name not in settings]
    if not names:
        return []
    if checkpoint.generation.has_additions:
        names += additions.given(optimizer)
    own = ", ".join(f"{name}={text_of(getattr(optimizer, name))}" for name in names)
    others = "" if not checkpoint.generation.has_additions or "weight_decay" in names else ", and no weight decay"
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


def norm_variables(found: Match, optimizer: AdadeltaKeras) -> list[_NormVariable]:
    """The weights that are trained and not one to one with parameters, of which `clipnorm` takes the norms in Keras."""
    trained = params_of(optimizer)
    weights: dict[int, list[WeightTransfer]] = {}
    counts: Counter[Tensor] = Counter()
    for transfer in found.transfers:
        if transfer.tensor in trained and transfer.tensor.requires_grad:
            weights.setdefault(id(transfer.variable), []).append(transfer)
            counts[transfer.tensor] += 1
    variables = []
    for transfers in weights.values():
        if len(transfers) == 1 and counts[transfers[0].tensor] == 1:
            continue
        names, pieces = [], []
        for transfer in transfers:
            first, end = transfer.rows
            is_whole = counts[transfer.tensor] == 1
            names.append(transfer.name if is_whole else f"{transfer.name}[{first}:{end}]")
            pieces.append((transfer.tensor, first, end))
        weight = f"{transfers[0].layer.path}/{transfers[0].variable.role}"
        variables.append(_NormVariable(weight, " and ".join(names), pieces))
    return variables


def has_a_part(optimizer: AdadeltaKeras) -> bool:
    """Whether other processes have other parameters, so that `norm_variables` cannot be set."""
    request = optimizer.step_request()
    return request.norm_group is not None or request.is_part


def other_norms(variables: list[_NormVariable], clipnorm: float | None) -> list[str]:
    """A note on norms that are others than in Keras."""
    if clipnorm is None or not variables:
        return []
    pairs = "; ".join(f"{names} (in Keras {weight})" for weight, names, _ in variables)
    return [
        f"clipnorm={clipnorm:g} takes the norm of each parameter, and Keras of each of its weights, which are not the "
        f"same for {pairs}: there gradients are clipped differently, for norm_variables is not for norm_group, nor for "
        "ZeroRedundancyOptimizer"
    ]


def _recurrent_differences(layer: Layer, torch_layer: TorchLayer) -> Iterator[str]:
    if not isinstance(torch_layer.module, nn.RNNBase | nn.RNNCellBase):
        return
    config = inner_layer(layer.config)[1]
    nonlinearity = getattr(torch_layer.module, "nonlinearity", "tanh")
    for key, expected in (("activation", nonlinearity), ("recurrent_activation", "sigmoid")):
        value = config.get(key)
        if isinstance(value, dict):
            value = value.get("config", value.get("class_name"))
        if isinstance(value, str) and value != expected:
            yield f"{layer.path} has {key}={value!r}, and {torch_layer.path} has {expected}"
    if (
        isinstance(torch_layer.module, nn.GRU | nn.GRUCell)
        and not torch_layer.module.bias
        and "reset_after" not in config
    ):
        yield f"the file does not say whether {layer.path} has reset_after=True, as {torch_layer.path} does"
    for key, does in (("go_backwards", "goes forwards"), ("stateful", "begins each batch anew")):
        if config.get(key) is True:
            yield f"{layer.path} has {key}=True, and {torch_layer.path} {does}"
    if layer.config.get("merge_mode", "concat") != "concat":
        mode = layer.config["merge_mode"]
        yield f"{layer.path} has merge_mode={mode!r}, and {torch_layer.path} concatenates both directions"
