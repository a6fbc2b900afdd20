"""The signature that every update has: for-loop, foreach, fused; of dense and of sparse gradients, and of shards."""

from typing import Any, Protocol

from torch import Tensor

from torch_adadelta.hyperparameters import Value

# params, grads, square_avgs and acc_deltas: entry i of each belongs to parameter i.
Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


class Update(Protocol):
    """Updates parameters and their state in place, by the hyperparameters of one step.

    `clip` holds the keywords of `gradients.clip`; a fused update takes `grad_scale` and `found_inf` besides (see
    `ops.adadelta_`). Gradients are clipped before `maximize` negates them.
    """

    def __call__(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        square_avgs: list[Tensor],
        acc_deltas: list[Tensor],
        lr: Value,
        rho: Value,
        epsilon: Value,
        maximize: bool,
        **clip: Any,
    ) -> None: ...
