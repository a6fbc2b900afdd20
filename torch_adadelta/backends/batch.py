"""The data that `step/` and `backends/` exchange. A Batch is what one call of a backend updates."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from torch_adadelta.backends.opmath import Value

# The state of a parameter, in the order in which backends take it.
STATE_KEYS: Final = ("square_avg", "acc_delta")


# What a segment may ask for of square_avg and acc_delta, in the order by which the ops know them; None is the dtype of
# the parameter.
STATE_DTYPES: Final = (None, torch.float32, torch.bfloat16)


def new_state_of(param: Tensor, state_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Returns the state that the first step with a gradient creates."""
    dtype = state_dtype or param.dtype
    return {key: torch.zeros_like(param, dtype=dtype) for key in STATE_KEYS}


def has_state(state: Any) -> bool:
    """Whether a parameter has state of this optimizer. Other owners may keep entries beside it."""
    return isinstance(state, dict) and any(key in state for key in STATE_KEYS)


class Backend(Enum):
    """How an update is computed. All give the same bits."""

    SINGLE_TENSOR = "single_tensor"  # one parameter after the other: the reference, which autograd can record
    MULTI_TENSOR = "multi_tensor"  # PyTorch's multi-tensor operations
    FUSED = "fused"  # one compiled pass


class Segment(NamedTuple):
    """Consecutive parameters of a batch with the same hyperparameters, rounded as Keras rounds them."""

    size: int
    lr: Value
    rho: Value
    epsilon: Value
    maximize: bool = False
    weight_decay: Value = 0.0
    is_decoupled: bool = True  # weight decay is taken off the parameter, or else added to the gradient
    ema_momentum: Value = 0.0  # of the averages, where there are some
    overwrites: bool = False  # the parameter becomes its average
    state_dtype: int = 0  # the place in STATE_DTYPES of that of square_avg and acc_delta
    has_masters: bool = False  # bfloat16 parameters have remainders

    def state_dtype_of(self, param: Tensor) -> torch.dtype:
        """The dtype of square_avg and acc_delta."""
        return STATE_DTYPES[self.state_dtype] or param.dtype


class GradientOptions(NamedTuple):
    """What is applied to the gradients of a batch before the update.

    Args:
        clipvalue (float, optional): the largest absolute value of an element. (default: None)
        clipnorm (float, optional): the largest norm of each gradient. (default: None)
        square_sums (Tensor, optional): with `clipnorm`, the sum of squares of each gradient, in float64.
            (default: None)
        factor (float or Tensor, optional): multiplies the gradients, for `global_clipnorm`. (default: 1.0)
        grad_scale (Tensor, optional): a float32 Tensor by which a fused update divides the gradients first.
            (default: None)
        found_inf (Tensor, optional): a float32 Tensor. If it is not zero, a fused update writes nothing.
            (default: None)
        loss_scale_factor (float, optional): divides the gradients after `grad_scale`. (default: 1.0)
    """

    clipvalue: float | None = None
    clipnorm: float | None = None
    square_sums: Tensor | None = None
    factor: Value = 1.0
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    loss_scale_factor: float = 1.0


NO_OPTIONS: Final = GradientOptions()


class Refusal(NamedTuple):
    """The reason why a compiled op refused a batch. Nothing was written."""

    message: str
    param: int | None  # which parameter of the batch is to blame, if one is


class Row(NamedTuple):
    """The tensors of a parameter."""

    param: Tensor
    grad: Tensor  # dense or sparse
    square_avg: Tensor
    acc_delta: Tensor
    average: Tensor | None = None
    remainder: Tensor | None = None  # what the parameter lacks of its master


# For each tensor of a Row, that of all rows.
Lists = tuple[list[Any], ...]


@dataclass(slots=True)
class Batch:
    """Parameters of one device that one call updates, with gradients and state. Entry i of each list belongs to
    parameter i.
    """

    backend: Backend
    is_sparse: bool  # the layout of the gradients
    is_differentiable: bool
    params: list[Tensor]
    grads: list[Tensor]
    square_avgs: list[Tensor]
    acc_deltas: list[Tensor]
    segments: list[Segment]
    gradient_options: GradientOptions = NO_OPTIONS
    gradient_order: list[int] | None = None  # the number of each gradient in the step; None for 0, 1, 2, …
    accumulators: int | None = None  # the number by which the compiled library knows them, if it keeps them
    wholes: Lists | None = None  # where the lists hold local tensors of DTensors, or rows: those whose they are
    averages: list[Tensor] = field(default_factory=list)  # of the opmath dtypes; or none
    remainders: list[Tensor] = field(default_factory=list)  # of bfloat16 parameters that have masters; or none
    # Set by a backend just before its first write: what raises later leaves the step partial.
    has_begun: bool = field(default=False, compare=False)

    @property
    def lists(self) -> Lists:
        """The lists that the update is computed on."""
        none = [None] * len(self.params)
        optional = (self.averages or none, self.remainders or none)
        return self.params, self.grads, self.square_avgs, self.acc_deltas, *optional

    @property
    def segment_of_rows(self) -> list[Segment]:
        """The segment of each parameter."""
        return [segment for segment in self.segments for _ in range(segment.size)]

    @property
    def rows(self) -> "Iterator[Batch]":
        """The same update as batches of one parameter each."""
        sums = self.gradient_options.square_sums
        for index, segment in enumerate(self.segment_of_rows):
            row = slice(index, index + 1)
            options = self.gradient_options._replace(square_sums=None if sums is None else sums[row])
            yield Batch(
                self.backend,
                self.is_sparse,
                self.is_differentiable,
                self.params[row],
                self.grads[row],
                self.square_avgs[row],
                self.acc_deltas[row],
                [segment._replace(size=1)],
                options,
                averages=self.averages[row],
                remainders=self.remainders[row],
            )

    @property
    def owners(self) -> Lists:
        """The lists with the tensors that the user knows: DTensors instead of local tensors, parameters instead of
        rows.
        """
        return self.lists if self.wholes is None else self.wholes
