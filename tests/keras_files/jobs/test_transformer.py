"""A block of a Transformer, written as custom layers, classifies texts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import torch
from keras_jobs import KINDS, Batch, Job, check
from torch import Tensor, nn

WORDS, LENGTH, WIDTH = 60, 6, 8


def layers(K: Any) -> dict[str, Any]:
    """The custom layers, of one library."""
    L = K.layers

    @K.utils.register_keras_serializable("transformer")
    class TokenAndPositionEmbedding(L.Layer):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.tokens = L.Embedding(WORDS, WIDTH)
            self.positions = L.Embedding(LENGTH, WIDTH)

        def call(self, x: Any) -> Any:
            return self.tokens(x) + self.positions(tf.range(LENGTH))

    @K.utils.register_keras_serializable("transformer")
    class TransformerBlock(L.Layer):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.attention = L.MultiHeadAttention(2, WIDTH // 2)
            self.feed_forward = K.Sequential([L.Dense(16, activation="relu"), L.Dense(WIDTH)])
            self.norm1 = L.LayerNormalization(epsilon=1e-5)
            self.norm2 = L.LayerNormalization(epsilon=1e-5)

        def call(self, x: Any) -> Any:
            x = self.norm1(x + self.attention(x, x))
            return self.norm2(x + self.feed_forward(x))

    return {cls.__name__: cls for cls in (TokenAndPositionEmbedding, TransformerBlock)}


def keras_model(K: Any) -> Any:
    L, own = K.layers, layers(K)
    words = K.Input((LENGTH,), dtype="int32")
    x = own["TokenAndPositionEmbedding"](name="embedding")(words)
    x = own["TransformerBlock"](name="transformer_block")(x)
    return K.Model(words, L.Dense(3, activation="softmax", name="out")(L.GlobalAveragePooling1D()(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, WIDTH))
        self.norm1 = nn.LayerNorm(WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x, x, x, need_weights=False)[0])
        return self.norm2(x + self.feed_forward(x))


class Transformer(nn.Module):
    def __init__(self, is_sparse: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(WORDS, WIDTH, sparse=is_sparse)
        self.positions = nn.Embedding(LENGTH, WIDTH, sparse=is_sparse)
        self.block = Block()
        self.out = nn.Linear(WIDTH, 3)

    def forward(self, words: Tensor) -> Tensor:
        x = self.tokens(words) + self.positions(torch.arange(words.shape[1]))
        return self.out(self.block(x).mean(1)).softmax(-1)


def batch(rng: np.random.Generator) -> Batch:
    """No word comes twice in a batch: what becomes of a row that does differs between the generations."""
    return [rng.permutation(WORDS)[: 8 * LENGTH].reshape(8, LENGTH).astype("int32")], np.eye(3)[rng.integers(3, size=8)]


# Files without names have the layers of a custom layer by their attributes, and the state in the order of their creation.
BLOCK = [
    *[f"attention/{part}/{n}" for part in ("query", "key", "value", "output") for n in range(2)],
    *[f"feed_forward/layers/{name}/{n}" for name in ("dense", "dense_1") for n in range(2)],
    *[f"norm{number}/{n}" for number in (1, 2) for n in range(2)],
]
STATE_ORDER = [
    "embedding/tokens/0",
    "embedding/positions/0",
    *[f"transformer_block/{name}" for name in BLOCK],
    "out/kernel",
    "out/bias",
]

OPTIONS: dict[str, dict[str, Any]] = {
    "": {"mapping": {"transformer_block": "block"}},
    "h5": {"match": "order_within_kind"},  # where the layers have numbers for names
    "keras": {"state_order": STATE_ORDER},
    "weights.h5": {"state_order": STATE_ORDER},
}


@pytest.mark.slow
@pytest.mark.parametrize("generation", KINDS)
def test_a_transformer(generation: str, tmp_path: Path) -> None:
    job = Job(keras_model, lambda: Transformer(generation == "legacy"), batch, options=OPTIONS, custom_objects=layers)
    check(job, generation, tmp_path)
