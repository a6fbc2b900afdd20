"""Small models in Keras and in PyTorch, and training jobs in both, for the tests of `torch_adadelta.keras`.

Needs TensorFlow, tf_keras and Keras; imported by tests that skip without them.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from torch_adadelta import AdadeltaKeras

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import keras
import tensorflow as tf
import tf_keras

from torch_adadelta.keras import freeze_second_biases

GENERATIONS: Final = ("legacy", "new", "keras3")
BATCH: Final = 6


def library(generation: str) -> Any:
    """The module that has the layers of a generation."""
    return keras if generation == "keras3" else tf_keras


# Apart from the defaults, so that a value that did not come over is seen.
HYPERPARAMETERS: Final = {"learning_rate": 0.5, "rho": 0.9, "epsilon": 1e-6}


def optimizer_of(generation: str, **options: Any) -> Any:
    """The Adadelta of a generation."""
    optimizers = library(generation).optimizers
    cls = optimizers.legacy.Adadelta if generation == "legacy" else optimizers.Adadelta
    return cls(**{**HYPERPARAMETERS, **options})


# ---- Models ---------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """One model in both frameworks."""

    keras: Callable[[Any, str], Any]  # from the module of layers and the dtype
    torch: Callable[[], nn.Module]
    inputs: Callable[[np.random.Generator], np.ndarray]
    to_torch: Callable[[Tensor], Tensor] = lambda x: x  # from the inputs of Keras to those of PyTorch
    outputs: int = 1
    options: dict[str, Any] = {}  # noqa: RUF012 - of load_keras


def _sequential(K: Any, dtype: str, shape: tuple[int, ...], layers: list[Any], integer: bool = False) -> Any:
    return K.Sequential([K.Input(shape, dtype="int32" if integer else dtype), *layers])


def _mlp(K: Any, dtype: str) -> Any:
    d = {"dtype": dtype}
    hidden = [K.layers.Dense(8, activation="tanh", **d) for _ in range(3)]
    return _sequential(K, dtype, (8,), [*hidden, K.layers.Dense(1, use_bias=False, **d)])


def _torch_mlp() -> nn.Module:
    hidden = [module for _ in range(3) for module in (nn.Linear(8, 8), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(8, 1, bias=False))


def _cnn(K: Any, dtype: str) -> Any:
    L, d = K.layers, {"dtype": dtype}
    layers = [
        L.Conv2D(4, 3, padding="same", activation="relu", **d),
        L.BatchNormalization(momentum=0.9, **d),
        L.SeparableConv2D(6, 3, padding="same", **d),
        L.DepthwiseConv2D(3, padding="same", depth_multiplier=2, **d),
        L.GroupNormalization(2, epsilon=1e-5, **d),
        L.Conv2DTranspose(5, 2, strides=2, **d),
        L.MaxPooling2D(4, **d),
        L.Flatten(**d),
        L.Dense(5, **d),
        L.LayerNormalization(epsilon=1e-5, **d),
        L.Dense(5, activation="tanh", **d),
        L.Dense(2, **d),
    ]
    return _sequential(K, dtype, (6, 8, 3), layers)


def _torch_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.BatchNorm2d(4, eps=1e-3, momentum=0.1),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.Conv2d(4, 6, 1)),
        nn.Conv2d(6, 12, 3, padding=1, groups=6),
        nn.GroupNorm(2, 12),
        nn.ConvTranspose2d(12, 5, 2, stride=2),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Linear(5 * 3 * 4, 5),
        nn.LayerNorm(5),
        nn.Linear(5, 5),
        nn.Tanh(),
        nn.Linear(5, 2),
    )


def _cnn1d(K: Any, dtype: str) -> Any:
    L, d = K.layers, {"dtype": dtype}
    layers = [
        # Keras 3 compiles a convolution in groups with XLA, which takes a minute.
        L.Conv1D(6, 3, groups=1 if K is keras else 3, **d),
        L.SeparableConv1D(4, 3, depth_multiplier=2, **d),
        L.DepthwiseConv1D(2, **d),
        L.Conv1DTranspose(5, 2, strides=2, **d),
        L.GlobalAveragePooling1D(**d),
        L.Dense(1, **d),
    ]
    return _sequential(K, dtype, (12, 3), layers)


class _GlobalAverage(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


def _torch_cnn1d(groups: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 6, 3, groups=groups),
        nn.Conv1d(6, 12, 3, groups=6, bias=False),
        nn.Conv1d(12, 4, 1),
        nn.Conv1d(4, 4, 2, groups=4),
        nn.ConvTranspose1d(4, 5, 2, stride=2),
        _GlobalAverage(),
        nn.Linear(5, 1),
    )


def _cnn3d(K: Any, dtype: str) -> Any:
    L, d = K.layers, {"dtype": dtype}
    layers = [
        L.Dense(2 * 3 * 2 * 3, **d),
        L.Reshape((2, 3, 2, 3), **d),
        L.Conv3DTranspose(4, 2, strides=2, **d),
        L.Conv3D(2, (3, 2, 1), **d),
        L.Flatten(**d),
        L.BatchNormalization(momentum=0.9, **d),
        L.Dense(1, **d),
    ]
    return _sequential(K, dtype, (4,), layers)


class _TorchCnn3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 36)
        self.up = nn.ConvTranspose3d(3, 4, 2, stride=2)
        self.conv = nn.Conv3d(4, 2, (3, 2, 1))
        self.norm = nn.BatchNorm1d(2 * 5 * 4 * 2, eps=1e-3, momentum=0.1)
        self.leave = nn.Linear(2 * 2 * 5 * 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(self.up(self.enter(x).view(-1, 3, 2, 3, 2)))
        return self.leave(self.norm(maps.flatten(1)))


def _lstm(K: Any, dtype: str) -> Any:
    L, d = K.layers, {"dtype": dtype}
    layers = [
        L.Embedding(7 * BATCH, 6, **d),
        L.Bidirectional(L.LSTM(4, return_sequences=True, **d), **d),
        L.LSTM(3, **d),
        L.Dense(1, **d),
    ]
    return _sequential(K, dtype, (None,), layers, integer=True)


class _TorchLstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7 * BATCH, 6)
        self.first = nn.LSTM(6, 4, bidirectional=True, batch_first=True)
        self.second = nn.LSTM(8, 3, batch_first=True)
        self.head = nn.Linear(3, 1)
        freeze_second_biases(self)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.first(self.embed(tokens))
        x, _ = self.second(x)
        return self.head(x[:, -1])


def _gru(K: Any, dtype: str) -> Any:
    L, d = K.layers, {"dtype": dtype}
    layers = [
        L.Bidirectional(L.GRU(3, return_sequences=True, **d), **d),
        *[L.GRU(6, return_sequences=True, **d) for _ in range(3)],
        L.SimpleRNN(4, **d),
        L.Dense(1, **d),
    ]
    return _sequential(K, dtype, (5, 4), layers)


class _TorchGru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.GRU(4, 3, bidirectional=True, batch_first=True)
        self.stack = nn.GRU(6, 6, num_layers=3, batch_first=True)
        self.last = nn.RNN(6, 4, batch_first=True)
        self.head = nn.Linear(4, 1)
        freeze_second_biases(self)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.first(x)
        x, _ = self.stack(x)
        x, _ = self.last(x)
        return self.head(x[:, -1])


def _attention(K: Any, dtype: str) -> Any:
    L, d = K.layers, {"dtype": dtype}
    inputs = K.Input((5, 8), dtype=dtype)
    attended = L.MultiHeadAttention(2, 4, name="attention", **d)(inputs, inputs)
    x = L.LayerNormalization(epsilon=1e-5, name="norm", **d)(L.Add(**d)([inputs, attended]))
    inner = K.Sequential(
        [
            K.Input((5, 8), dtype=dtype),
            L.Dense(8, activation="relu", name="widen", **d),
            L.Dense(8, name="narrow", **d),
        ],
        name="feed_forward",
    )
    x = L.Flatten(**d)(inner(x))
    return K.Model(inputs, L.Dense(1, name="head", **d)(x))


class _TorchAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(40, 1)  # before the others: the order says nothing here
        self.feed_forward = nn.ModuleDict({"narrow": nn.Linear(8, 8), "widen": nn.Linear(8, 8)})
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = self.feed_forward["narrow"](torch.relu(self.feed_forward["widen"](x)))
        return self.head(x.flatten(1))


def _normal(*shape: int) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda rng: rng.standard_normal((BATCH, *shape))


PAIRS: Final = {
    "mlp": Pair(_mlp, _torch_mlp, _normal(8)),
    "cnn": Pair(_cnn, _torch_cnn, _normal(6, 8, 3), lambda x: x.permute(0, 3, 1, 2), outputs=2),
    "cnn1d": Pair(_cnn1d, lambda: _torch_cnn1d(3), _normal(12, 3), lambda x: x.permute(0, 2, 1)),
    "cnn3d": Pair(_cnn3d, _TorchCnn3d, _normal(4), options={"flatten": "channels_first"}),
    # Every batch has every token once. What becomes of other rows differs between generations, and a token that comes
    # twice is a mistake of Keras 3 on TensorFlow: it adds the squares of its gradients, not the gradients.
    "lstm": Pair(_lstm, _TorchLstm, lambda rng: rng.permutation(7 * BATCH).reshape(BATCH, 7)),
    "lstm, some tokens": Pair(_lstm, _TorchLstm, lambda rng: rng.permutation(7 * BATCH)[: 3 * BATCH].reshape(BATCH, 3)),
    "gru": Pair(_gru, _TorchGru, _normal(5, 4), options={"match": "order"}),
    "attention": Pair(_attention, _TorchAttention, _normal(5, 8)),
}


# ---- Jobs -----------------------------------------------------------------------------------------------------------


def batches(name: str, count: int, dtype: str, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Inputs as Keras has them, and targets."""
    rng = np.random.default_rng(seed)
    pair = PAIRS[name]
    found = []
    for _ in range(count):
        x = pair.inputs(rng)
        y = rng.standard_normal((BATCH, pair.outputs)).astype(dtype)
        found.append((x.astype("int32" if x.dtype.kind == "i" else dtype), y))
    return found


def build(name: str, generation: str, dtype: str = "float64", seed: int = 1, **options: Any) -> Any:
    """A compiled model of Keras. All its weights, biases too, are random numbers of this seed."""
    K = library(generation)
    model = PAIRS[name].keras(K, dtype)
    rng = np.random.default_rng(seed)
    model.set_weights([rng.uniform(0.1, 0.6, weight.shape) * rng.choice([-1, 1], weight.shape)
                       if "variance" not in variable.name else rng.uniform(0.5, 2, weight.shape)
                       for weight, variable in zip(model.get_weights(), model.weights, strict=True)])  # fmt: skip
    model.compile(optimizer=optimizer_of(generation, **options), loss=K.losses.MeanSquaredError())
    return model


def train_keras(model: Any, generation: str, data: list[tuple[np.ndarray, np.ndarray]]) -> list[float]:
    """Trains eagerly, and returns the losses."""
    losses = []
    for x, y in data:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(tf.constant(x), training=True) - y))
        variables = model.trainable_variables
        raw = [v.value if generation == "keras3" else v for v in variables]
        gradients = tape.gradient(loss, raw)
        model.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        losses.append(float(loss))
    return losses


def build_torch(name: str, generation: str, dtype: str = "float64", **options: Any) -> tuple[nn.Module, AdadeltaKeras]:
    """The model of PyTorch, with other weights, and an optimizer with other hyperparameters."""
    torch.manual_seed(0)
    is_ungrouped = name == "cnn1d" and generation == "keras3"
    model = _torch_cnn1d(1) if is_ungrouped else PAIRS[name].torch()
    model = model.to(getattr(torch, dtype))
    return model, AdadeltaKeras(model.named_parameters(), **options)


def train_torch(
    name: str, model: nn.Module, optimizer: AdadeltaKeras, data: list[tuple[np.ndarray, np.ndarray]]
) -> list[float]:
    """The same in PyTorch."""
    model.train()
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        inputs = torch.from_numpy(x)
        inputs = inputs.long() if x.dtype.kind == "i" else inputs
        loss = (model(PAIRS[name].to_torch(inputs)) - torch.from_numpy(y)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def predict(name: str, model: nn.Module, x: np.ndarray) -> np.ndarray:
    """The outputs of the model of PyTorch in evaluation mode."""
    model.eval()
    inputs = torch.from_numpy(x)
    inputs = inputs.long() if x.dtype.kind == "i" else inputs
    with torch.no_grad():
        return model(PAIRS[name].to_torch(inputs)).numpy()


# ---- Files ----------------------------------------------------------------------------------------------------------

FORMATS: Final = {
    "legacy": ("h5", "checkpoint", "weights_checkpoint"),
    "new": ("h5", "keras", "weights.h5", "checkpoint", "weights_checkpoint"),
    "keras3": ("h5", "keras", "weights.h5", "checkpoint"),
}
WRITABLE: Final = ("h5", "keras", "weights.h5")


def save(model: Any, directory: Path, format: str) -> Path:
    """Saves the model with its optimizer."""
    path = directory / f"model.{format}"
    if format in ("h5", "keras"):
        model.save(str(path))
    elif format == "weights.h5":
        model.save_weights(str(path))
    elif format == "checkpoint":
        path = Path(tf.train.Checkpoint(net=model, opt=model.optimizer).save(str(directory / "ckpt")))
    else:
        path = directory / "weights"
        model.save_weights(str(path))
    return path


def restore(path: Path, format: str, name: str, generation: str, dtype: str) -> Any:
    """A model of Keras that Keras made from a file: its weights, and its optimizer to go on with."""
    K = library(generation)
    if format == "h5" or (format == "keras" and generation == "new"):
        return K.models.load_model(str(path))
    # Keras 3 leaves the optimizer out of the configuration in a .keras file, so it is compiled again.
    model = build(name, generation, dtype, seed=9)
    model.optimizer.build(model.trainable_variables)
    model.load_weights(str(path))
    return model
