"""What layers of Keras compute, in NumPy, from weights as Keras has them; for the tests of `torch_adadelta.keras`."""

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

Array = np.ndarray


def _last(x: Array, data_format: str) -> Array:
    return np.moveaxis(x, 1, -1) if data_format == "channels_first" else x


def _back(x: Array, data_format: str) -> Array:
    return np.moveaxis(x, -1, 1) if data_format == "channels_first" else x


def _windows(x: Array, size: tuple[int, ...], strides: int) -> Array:
    """Of maps with the channels last: (batch, *places, channels, *size)."""
    axes = tuple(range(1, 1 + len(size)))
    return sliding_window_view(x, size, axes)[(slice(None), *(slice(None, None, strides) for _ in size))]


def conv(x: Array, kernel: Array, bias: Array, data_format: str = "channels_last", strides: int = 1) -> Array:
    """Convolution in any number of dimensions, padding "valid", in groups if the kernel has fewer input channels."""
    x = _last(x, data_format)
    rank = kernel.ndim - 2
    groups = x.shape[-1] // kernel.shape[-2]
    found = []
    for part, weights in zip(np.split(x, groups, -1), np.split(kernel, groups, -1), strict=True):
        windows = _windows(part, kernel.shape[:rank], strides)
        found.append(np.tensordot(windows, np.moveaxis(weights, -2, 0), axes=rank + 1))
    return _back(np.concatenate(found, -1) + bias, data_format)


def conv_transpose(x: Array, kernel: Array, bias: Array, strides: int = 1) -> Array:
    """Transposed convolution, padding "valid": each place adds its kernel to the output."""
    rank = kernel.ndim - 2
    places = x.shape[1:-1]
    sizes = kernel.shape[:rank]
    shape = [strides * (n - 1) + k for n, k in zip(places, sizes, strict=True)]
    out = np.zeros((len(x), *shape, kernel.shape[-2]))
    for at in np.ndindex(*places):
        region = tuple(slice(strides * i, strides * i + k) for i, k in zip(at, sizes, strict=True))
        values = x[(slice(None), *at)]  # (batch, in)
        out[(slice(None), *region)] += np.moveaxis(np.tensordot(values, kernel, (1, kernel.ndim - 1)), 0, 0)
    return out + bias


def depthwise(x: Array, kernel: Array, bias: Array | float = 0.0) -> Array:
    """Each channel by itself, with several kernels."""
    rank = kernel.ndim - 2
    windows = _windows(x, kernel.shape[:rank], 1)  # (batch, *places, channels, *size)
    letters = "xyz"[:rank]
    found = np.einsum(f"...c{letters},{letters}cm->...cm", windows, kernel)
    return found.reshape(*found.shape[:-2], -1) + bias


def pool(x: Array, size: tuple[int, ...], data_format: str = "channels_last") -> Array:
    """The largest in windows that move by one place."""
    x = _last(x, data_format)
    windows = _windows(x, size, 1)
    return _back(windows.max(tuple(range(-len(size), 0))), data_format)


def batch_norm(x: Array, weights: dict[str, Array], axis: int = -1, epsilon: float = 1e-3) -> Array:
    """In evaluation, over an axis."""
    shape = [1] * x.ndim
    shape[axis] = -1
    w = {name: value.reshape(shape) for name, value in weights.items()}
    return w["gamma"] * (x - w["moving_mean"]) / np.sqrt(w["moving_variance"] + epsilon) + w["beta"]


def layer_norm(x: Array, gamma: Array, beta: Array, epsilon: float = 1e-5) -> Array:
    """Over the last axes, as many as gamma has."""
    axes = tuple(range(-gamma.ndim, 0))
    centred = x - x.mean(axes, keepdims=True)
    return gamma * centred / np.sqrt((centred**2).mean(axes, keepdims=True) + epsilon) + beta


def group_norm(x: Array, gamma: Array, beta: Array, groups: int, epsilon: float = 1e-5) -> Array:
    """Over the places and each group of channels, which are last."""
    parts = x.reshape(*x.shape[:-1], groups, -1)
    axes = (*range(1, x.ndim - 1), -1)
    centred = parts - parts.mean(axes, keepdims=True)
    return gamma * (centred / np.sqrt((centred**2).mean(axes, keepdims=True) + epsilon)).reshape(x.shape) + beta


def flatten(x: Array, data_format: str = "channels_last") -> Array:
    """Keras moves the channels to the end first if they are first."""
    return _last(x, data_format).reshape(len(x), -1)


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def lstm(x: Array, w: dict[str, Array], is_reversed: bool = False) -> Array:
    """All outputs; gates in the order input, forget, cell, output."""
    units = len(w["recurrent_kernel"])
    h = c = np.zeros((len(x), units))
    found = []
    for step in x.swapaxes(0, 1)[:: -1 if is_reversed else 1]:
        i, f, g, o = np.split(step @ w["kernel"] + h @ w["recurrent_kernel"] + w["bias"], 4, 1)
        c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
        h = _sigmoid(o) * np.tanh(c)
        found.append(h)
    return np.stack(found[:: -1 if is_reversed else 1], 1)


def gru(x: Array, w: dict[str, Array], is_reversed: bool = False) -> Array:
    """All outputs, with reset_after; gates in the order update, reset, new."""
    units = len(w["recurrent_kernel"])
    h = np.zeros((len(x), units))
    found = []
    for step in x.swapaxes(0, 1)[:: -1 if is_reversed else 1]:
        xz, xr, xn = np.split(step @ w["kernel"] + w["bias"][0], 3, 1)
        hz, hr, hn = np.split(h @ w["recurrent_kernel"] + w["bias"][1], 3, 1)
        z, r = _sigmoid(xz + hz), _sigmoid(xr + hr)
        h = z * h + (1 - z) * np.tanh(xn + r * hn)
        found.append(h)
    return np.stack(found[:: -1 if is_reversed else 1], 1)


def simple_rnn(x: Array, w: dict[str, Array], is_reversed: bool = False) -> Array:
    """All outputs."""
    h = np.zeros((len(x), len(w["recurrent_kernel"])))
    found = []
    for step in x.swapaxes(0, 1)[:: -1 if is_reversed else 1]:
        h = np.tanh(step @ w["kernel"] + h @ w["recurrent_kernel"] + w["bias"])
        found.append(h)
    return np.stack(found[:: -1 if is_reversed else 1], 1)


def attention(query: Array, value: Array, key: Array, w: dict[str, Array]) -> Array:
    """MultiHeadAttention of (batch, time, width)."""

    def projected(x: Array, part: str) -> Array:
        return np.einsum("btw,whd->bhtd", x, w[f"{part}/kernel"]) + w[f"{part}/bias"][:, None]

    q, k, v = projected(query, "query"), projected(key, "key"), projected(value, "value")
    scores = np.einsum("bhtd,bhsd->bhts", q, k) / np.sqrt(q.shape[-1])
    weights: Any = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("bhts,bhsd->bthd", weights, v)
    return np.einsum("bthd,hdo->bto", mixed, w["output/kernel"]) + w["output/bias"]
