"""What the state machine draws from: dtypes, shapes, layouts, values of options, kinds of gradients."""

from collections.abc import Callable
from typing import Any

import torch
from cases import gradients
from hypothesis import strategies as st
from torch import Tensor

KEYS = ("square_avg", "acc_delta")
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16", "complex64")}
SHAPES = ((3,), (), (0,), (1,), (4, 3), (2, 3, 2), (37,), (5, 1, 4))
RATES = (1.0, 0.001, 0.1, 0.0)
HYPERPARAMETERS: dict[str, tuple[float, ...]] = {
    "lr": RATES,
    "rho": (0.95, 0.5, 0.0, 1.0),
    "epsilon": (1e-7, 1e-3, 1.0),
    "weight_decay": (0.0, 0.01, 0.5),
}
NUMBERS: dict[str, tuple[Any, ...]] = {
    "decay": (0.0, 0.5, 1e-3),
    "iterations": (0, 1, 2**40),
    "loss_scale_factor": (None, 4.0, 7.0),
}
PRECISIONS: tuple[dict[str, Any], ...] = (
    {"state_dtype": torch.bfloat16},
    {"state_dtype": torch.float32},
    {"master_weights": True, "state_dtype": torch.float32},
    {"master_weights": True},
)
CLIPS: tuple[dict[str, float], ...] = (
    {},
    {"clipvalue": 0.5},
    {"clipnorm": 0.7},
    {"global_clipnorm": 0.9},
    {"clipvalue": 2.0, "clipnorm": 1.5},
)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "gaps": lambda x: torch.stack([x, x], -1)[..., 0],
}

# Most parameters are plain: only a step of one group of them, all dense, runs on state that the library holds.
dtypes = st.sampled_from([*["float32"] * 6, *DTYPES])
layouts = st.sampled_from([*["contiguous"] * 4, *LAYOUTS])
shapes = st.integers(0, len(SHAPES) - 1)
seeds = st.integers(0, 10**6)
some_param = st.integers(0, 11)
keys = st.sampled_from(KEYS)


def gradient(kind: str, param: Tensor, seed: int) -> Tensor | None:
    """A gradient of this kind; where the kind does not fit the parameter, a dense one."""
    if kind == "none":
        return None
    grad = gradients(param.shape, param.dtype, 1, seed)[0]
    if kind == "sparse" and param.dim() > 0 and param.numel() > 0:
        generator = torch.Generator().manual_seed(seed)
        count, dims = seed % 5, 1 + seed % param.dim()
        indices = torch.stack([torch.randint(size, (count,), generator=generator) for size in param.shape[:dims]])
        values = gradients((count, *param.shape[dims:]), param.dtype, 1, seed)[0]
        return torch.sparse_coo_tensor(indices, values, param.shape, is_coalesced=False, check_invariants=False)
    if kind == "zero":
        return torch.zeros_like(param)
    if kind == "expanded":
        return grad.flatten()[:1].expand(grad.numel()).view(grad.shape)
    if kind == "large":
        return grad * 1e4
    if kind == "special" and grad.numel() > 0:
        grad.view(-1)[seed % grad.numel()] = (float("nan"), float("inf"), -float("inf"), -0.0)[seed % 4]
        return grad
    return LAYOUTS[kind](grad) if kind in LAYOUTS else grad


GRADIENT_KINDS = ("dense", "none", "sparse", "zero", "expanded", "large", "special", "transposed", "gaps")
kinds = st.lists(st.sampled_from(["dense", "dense", *GRADIENT_KINDS]), min_size=1, max_size=6)
