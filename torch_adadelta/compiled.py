"""The step as `torch.compile` traces it: the same compiled op, between graph inputs.

PyTorch runs a method by the name of `_init_group` while it traces, with the real tensors, and lets it fill the lists
that are passed: that is how the step of its own optimizers stays out of the graph but for the update. Here the first
such call plans the whole step, which makes what state is missing and finds out whether anything speaks against tracing;
where it does (schedules, callables, GradScaler, DTensors, or an error), the step runs as it would without
`torch.compile`, after a break of the graph.

What the graph must not take for a constant comes into it as a Tensor: a learning rate that is one, and `iterations`.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from torch_adadelta import gradients, hyperparameters, ops
from torch_adadelta import update as updates
from torch_adadelta.arithmetic import arithmetic_dtype, arithmetic_dtypes
from torch_adadelta.signature import Lists, Update

_KINDS: Final[tuple[Update, ...]] = (updates.fused, updates.for_loop, updates.foreach)

# The first argument of `_init_group` that asks for the plan.
_PLAN: Final = -1

# What the plan says instead of the number of buckets.
_NOT_TRACEABLE: Final = -1


class CompiledStep(Optimizer):
    """`_traced_step`, which `step` becomes inside `torch.compile`."""

    # A bucket: its group, what updates it, where its parameters are in the group, the numbers of their gradients.
    _traced: list[tuple[int, int, list[int], list[int]]]
    _untraced_step: Any = None

    _given: Any
    _gradient_transformers: Any
    _norm_group: Any
    found_inf: Any

    def _numbered_plan(self) -> Any:
        raise NotImplementedError

    def _init_group(
        self,
        index: int,
        params: list[Tensor],
        grads: list[Tensor],
        square_avgs: list[Tensor],
        acc_deltas: list[Tensor],
        numbers: list[int],
    ) -> int:
        """Plans a step, and returns the number of buckets; or fills the lists with a bucket, and says what it is."""
        if index == _PLAN:
            return self._plan_trace()
        # By places, not with the tensors: should the graph break, this runs at each step.
        group, kind, places, numbers_here = self._traced[index]
        for param in (self.param_groups[group]["params"][place] for place in places):
            params.append(param)
            grads.append(param.grad)
            square_avgs.append(self.state[param]["square_avg"])
            acc_deltas.append(self.state[param]["acc_delta"])
        numbers.extend(numbers_here)
        return group * len(_KINDS) + kind

    def _plan_trace(self) -> int:
        if type(self)._untraced_step is None:
            step: Any = type(self).step
            CompiledStep._untraced_step = torch._dynamo.disable(
                getattr(step, "__wrapped__", step), reason="this step of AdadeltaKeras cannot be traced"
            )
        try:
            with torch.no_grad():
                planned = self._numbered_plan()
        except Exception:
            return _NOT_TRACEABLE  # the untraced step raises it again, outside of the compiler
        self._traced = []
        if planned is None:
            return 0
        buckets, all_numbers, new_state = planned
        place_of = {id(group): place for place, group in enumerate(self.param_groups)}
        clips = any(self.param_groups[0][key] is not None for key in ("clipvalue", "clipnorm", "global_clipnorm"))
        for (group, update, lists, _), numbers in zip(buckets, all_numbers, strict=True):
            # Clipping in Python rounds its numbers by means that cannot be traced.
            if update not in _KINDS or group["differentiable"] or (clips and update is not updates.fused):
                return _NOT_TRACEABLE
            within = {id(param): place for place, param in enumerate(group["params"])}
            where = [within[id(param)] for param in lists[0]]
            if len(set(where)) < len(where):  # listed twice, and updated twice
                return _NOT_TRACEABLE
            self._traced.append((place_of[id(group)], _KINDS.index(update), where, numbers))
        types = arithmetic_dtypes(param for bucket in buckets for param in bucket[2][0])
        if self.param_groups[0]["global_clipnorm"] is not None and len(types) > 1:
            return _NOT_TRACEABLE  # their norm is taken in float64, of gradients rounded before
        self.state.update(new_state)
        for group in self.param_groups:
            if not isinstance(group["iterations"], Tensor):
                device = group["params"][0].device if group["params"] else torch.device("cpu")
                group["iterations"] = torch.full((), group["iterations"], dtype=torch.int64, device=device)
        return len(buckets)

    def _traced_step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Reading these makes guards of them.
        is_plain = (
            self._given is None
            and not self._gradient_transformers
            and self._norm_group is None
            and self.found_inf is None
            and getattr(self, "grad_scale", None) is None
        )
        count = self._init_group(_PLAN, [], [], [], [], [])
        if not is_plain or count == _NOT_TRACEABLE:
            self._untraced_step()
            return loss
        with torch.no_grad():
            if count:
                self._traced_update(count)
                for group in self.param_groups:
                    group["iterations"].add_(1)
        return loss

    def _traced_update(self, count: int) -> None:
        options = self.param_groups[0]
        buckets: list[tuple[int, Lists, list[int]]] = []
        for index in range(count):
            params: list[Tensor] = []
            grads: list[Tensor] = []
            square_avgs: list[Tensor] = []
            acc_deltas: list[Tensor] = []
            numbers: list[int] = []
            which = self._init_group(index, params, grads, square_avgs, acc_deltas, numbers)
            buckets.append((which, (params, grads, square_avgs, acc_deltas), numbers))
        clip: dict[str, Any] = {}
        before: dict[str, Any] = {}
        if options["clipvalue"] is not None:
            before = {"clipvalue": options["clipvalue"]}
            clip = dict(before)
        sums = []
        if options["clipnorm"] is not None or options["global_clipnorm"] is not None:
            for _, lists, _ in buckets:
                in_double = (
                    options["global_clipnorm"] is not None and arithmetic_dtype(lists[0][0].dtype) is torch.float64
                )
                sums.append(ops.grad_square_sums(lists[0], lists[1], in_double=in_double, **before))
        if options["global_clipnorm"] is not None:
            all_numbers = [number for _, _, numbers in buckets for number in numbers]
            in_double = arithmetic_dtype(buckets[0][1][0][0].dtype) is torch.float64
            clip["factor"] = torch.ops.torch_adadelta.global_factor.default(
                sums, all_numbers, options["global_clipnorm"], in_double
            )
        for position, (which, lists, _) in enumerate(buckets):
            group = self.param_groups[which // len(_KINDS)]
            own = dict(clip)
            if options["clipnorm"] is not None:
                own["clipnorm"] = options["clipnorm"]
                own["square_sums"] = sums[position]
            param = lists[0][0]
            lr = _as_tensor(group["lr"], param.device, rounds_to_float32=True)
            if group["decay"]:
                T = arithmetic_dtype(param.dtype)
                decay = _as_tensor(group["decay"], param.device, rounds_to_float32=True).to(T)
                lr = lr.to(T) / (1 + decay * group["iterations"].to(param.device, T))
            rho = _as_tensor(group["rho"], param.device, rounds_to_float32=True)
            epsilon = _as_tensor(group["epsilon"], param.device, rounds_to_float32=False)
            epsilon = torch.where(epsilon == 0, hyperparameters.DEFAULT_EPSILON, epsilon)
            if "factor" in own:
                own["factor"] = own["factor"].to(param.device)
            if which % len(_KINDS) == 0:
                ops._adadelta(*lists, *ops._option_arguments(len(lists[0]), lr, rho, epsilon, group["maximize"], **own))
            else:
                updates.for_loop(*lists, lr, rho, epsilon, group["maximize"], **own)


def _as_tensor(value: Any, device: torch.device, rounds_to_float32: bool) -> Tensor:
    """A hyperparameter as a Tensor without dimensions, rounded as Keras does it if it is a Python number."""
    if isinstance(value, Tensor):
        return value.detach().to(device).reshape(())
    dtype = torch.float32 if rounds_to_float32 else torch.float64
    return torch.full((), value, dtype=dtype, device=device)


# One op, so that no compiler changes the bits of the few numbers that it computes.
@torch.library.custom_op("torch_adadelta::global_factor", mutates_args=())
def _global_factor(square_sums: list[Tensor], numbers: list[int], global_clipnorm: float, in_double: bool) -> Tensor:
    T = torch.float64 if in_double else torch.float32
    sums = torch.cat(square_sums)
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    factor = gradients.global_factor(global_clipnorm, sums[order], T)
    return factor if isinstance(factor, Tensor) else torch.full((), factor, dtype=torch.float64)


@_global_factor.register_fake
def _(square_sums: list[Tensor], numbers: list[int], global_clipnorm: float, in_double: bool) -> Tensor:
    return square_sums[0].new_empty((), dtype=torch.float64)
