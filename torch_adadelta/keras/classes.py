"""What the layers of Keras call their weights and their parts, by class."""

import re
from typing import Any, Final

from torch_adadelta.keras import config as configs

# The weights of a layer in the order of their numbers, by the class. What is optional has a key of the configuration.
_RNN: Final = ("kernel", "recurrent_kernel", "bias?use_bias")


_NORM: Final = ("gamma?scale", "beta?center")


NUMBERED: Final = {
    "Embedding": ("embeddings",),
    "BatchNormalization": (*_NORM, "moving_mean", "moving_variance"),
    "SyncBatchNormalization": (*_NORM, "moving_mean", "moving_variance"),
    "LayerNormalization": _NORM,
    "GroupNormalization": _NORM,
    "RMSNormalization": ("scale",),
    "LSTM": _RNN,
    "GRU": _RNN,
    "CuDNNLSTM": ("kernel", "recurrent_kernel", "bias"),
    "CuDNNGRU": ("kernel", "recurrent_kernel", "bias"),
    "SimpleRNN": _RNN,
    "MultiHeadAttention": ("kernel", "bias?use_bias"),
    "Dense": ("kernel", "bias?use_bias"),
    **{f"{kind}Conv{n}D": ("kernel", "bias?use_bias") for kind in ("", "Depthwise") for n in (1, 2, 3)},
    **{f"Conv{n}DTranspose": ("kernel", "bias?use_bias") for n in (1, 2, 3)},
    **{f"SeparableConv{n}D": ("depthwise_kernel", "pointwise_kernel", "bias?use_bias") for n in (1, 2)},
}


WITH_WEIGHTS: Final = {*NUMBERED, "Bidirectional"}


BY_SNAKE_CASE: Final = {configs.snake_case(name): name for name in (*NUMBERED, "Bidirectional", "TimeDistributed")}


def numbered_roles(class_name: str | None, config: dict[str, Any], count: int) -> list[str] | None:
    """The names of so many weights of a layer, or None if they cannot be told."""
    if class_name == "Bidirectional":
        inner, own = configs.inner_layer(config)
        class_name, config = (inner, own) if inner else ("LSTM", {})
    entries = [entry.partition("?")[::2] for entry in NUMBERED.get(class_name or "", ())]
    if config:
        entries = [(role, key) for role, key in entries if not key or config.get(key, True)]
    elif len(entries) == count + 1:
        entries = [(role, key) for role, key in entries if not key]
    return [role for role, _ in entries] if len(entries) == count else None


PARTS: Final = {
    "query": "query",
    "key": "key",
    "value": "value",
    "attention_output": "output",
    "query_dense": "query",
    "key_dense": "key",
    "value_dense": "value",
    "output_dense": "output",
}


def is_part(name: str) -> bool:
    """Whether a name is that of a part of a layer, rather than of a layer."""
    name = name.lstrip("_")
    return bool(re.fullmatch(r"(\w+_)?cell(_\d+)?|layer|(forward|backward)_\w+", name)) or name in PARTS


def role_prefix(parts: list[str]) -> list[str]:
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
            found.append(PARTS.get(name, name))
    return found


MOVING: Final = {"moving_mean", "moving_variance"}
