"""What layers call their weights."""

from typing import Any

import pytest

pytest.importorskip("h5py", reason="needs the extra 'keras'")
from torch_adadelta.keras import classes


@pytest.mark.parametrize(
    ("class_name", "config", "count", "roles"),
    [
        ("Dense", {}, 2, ["kernel", "bias"]),
        ("Dense", {}, 1, ["kernel"]),
        ("Dense", {"use_bias": False}, 1, ["kernel"]),
        ("Dense", {"use_bias": True}, 1, None),
        ("Dense", {}, 3, None),
        ("Embedding", {}, 1, ["embeddings"]),
        ("BatchNormalization", {"scale": False}, 3, ["beta", "moving_mean", "moving_variance"]),
        ("BatchNormalization", {}, 4, ["gamma", "beta", "moving_mean", "moving_variance"]),
        ("BatchNormalization", {}, 3, None),  # gamma or beta
        ("LayerNormalization", {"center": False}, 1, ["gamma"]),
        ("GRU", {"use_bias": True}, 3, ["kernel", "recurrent_kernel", "bias"]),
        *((f"SeparableConv{n}D", {}, 3, ["depthwise_kernel", "pointwise_kernel", "bias"]) for n in (1, 2)),
        *((f"{kind}Conv{n}D", {}, 2, ["kernel", "bias"]) for kind in ("", "Depthwise") for n in (1, 2, 3)),
        *((f"Conv{n}DTranspose", {}, 2, ["kernel", "bias"]) for n in (1, 2, 3)),
        *((name, {"center": True}, 2, ["gamma", "beta"]) for name in ("LayerNormalization", "GroupNormalization")),
        *((name, {}, 3, ["kernel", "recurrent_kernel", "bias"]) for name in ("LSTM", "GRU", "SimpleRNN")),
        ("RMSNormalization", {}, 1, ["scale"]),
        ("MultiHeadAttention", {}, 2, ["kernel", "bias"]),
        ("SyncBatchNormalization", {"center": False}, 3, ["gamma", "moving_mean", "moving_variance"]),
        ("Bidirectional", {"layer": {"class_name": "GRU", "config": {"use_bias": False}}}, 2, ["kernel", "recurrent_kernel"]),
        ("Bidirectional", {}, 3, ["kernel", "recurrent_kernel", "bias"]),
        ("Mine", {}, 1, None),
        (None, {}, 2, None),
    ],
)  # fmt: skip
def test_names_of_numbered_weights(class_name: str | None, config: Any, count: int, roles: list[str] | None) -> None:
    assert classes.numbered_roles(class_name, config, count) == roles
