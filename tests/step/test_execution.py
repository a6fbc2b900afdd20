"""Exception safety: a step that is interrupted has done nothing, or all of it, or says that it is partial.

And whatever came of it, no cache is stale: the optimizer goes on as one that has none.
"""

import copy
import functools
import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    assert_optimizer_like_oracle,
    assert_unchanged,
    gradients,
    optimizer_oracle_of,
    snapshot,
    to_oracle,
)
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from torch_adadelta import AdadeltaKeras, schedules
from torch_adadelta.backends import functional, kernels
from torch_adadelta.step import execution, planning, precision, sources
from torch_adadelta.step.sources import Source

PARTIAL = "the step is partial"

SINGLE, MULTI, FUSED = {"foreach": False}, {"foreach": True}, {"fused": True}
BACKENDS: dict[str, list[dict[str, bool]]] = {
    "single_tensor": [SINGLE, SINGLE],
    "multi_tensor": [MULTI, MULTI],
    **({"fused": [FUSED, FUSED], "all": [FUSED, SINGLE, MULTI]} if kernels.is_loaded else {}),
}


def identity(pairs: Any) -> Any:
    return pairs


def params_of(optimizer: AdadeltaKeras) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


@functools.cache
def gradient(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return gradients(shape, dtype, 1, seed)[0]


def give_gradients(optimizer: AdadeltaKeras, seed: int, sparse: bool = False) -> None:
    for i, param in enumerate(params_of(optimizer)):
        grad = gradient(param.shape, param.dtype, 10 * seed + i)
        param.grad = grad.to_sparse(1) if sparse and i == 0 else grad


def made(
    backends: list[dict[str, bool]],
    steps_before: int = 2,
    sparse: bool = False,
    found_inf: bool = False,
    others: bool = False,
    **options: Any,
) -> AdadeltaKeras:
    """An optimizer of a group for each backend, which has taken steps and has gradients for another one."""
    dtypes = (torch.float32, torch.bfloat16, torch.float32)
    groups = [
        {"params": [Parameter(torch.ones(3, 2, dtype=dtype))], **backend}
        for backend, dtype in zip(backends, dtypes, strict=False)
    ]
    optimizer = AdadeltaKeras(groups, **{"learning_rate": 1.0, **options})
    for step in range(steps_before):
        give_gradients(optimizer, step, sparse)
        optimizer.step()
    give_gradients(optimizer, steps_before, sparse)
    for param in params_of(optimizer) if others else ():
        optimizer.state[param]["slow"] = torch.full((3, 2), 0.5)
    if found_inf:
        optimizer.found_inf = torch.zeros(1)
    return optimizer


def tensors_of(optimizer: AdadeltaKeras) -> list[Tensor]:
    return [x for p in params_of(optimizer) for x in (p.detach(), *optimizer.state.get(p, {}).values())]


def numbers_of(optimizer: AdadeltaKeras) -> list[Any]:
    """What a step writes to groups."""
    return [(int(group["iterations"]), float(group["lr"]), float(group["rho"])) for group in optimizer.param_groups]


def holds(optimizer: AdadeltaKeras, values: list[Tensor]) -> bool:
    ours = tensors_of(optimizer)
    return len(ours) == len(values) and all(map(torch.equal, ours, values))


def is_like(optimizer: AdadeltaKeras, other: AdadeltaKeras) -> bool:
    return holds(optimizer, tensors_of(other)) and numbers_of(optimizer) == numbers_of(other)


# ---- What is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"gradient_accumulation_steps": 2, "use_ema": True}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_are_those_of_the_oracle(backend: str, options: dict[str, Any]) -> None:
    """The first parameter has dense gradients at first, for which a single batch checks itself, and then sparse ones."""
    for backends in (BACKENDS[backend], BACKENDS[backend][:1]):
        optimizer = made(backends, 0, **options)
        params = params_of(optimizer)
        expected = optimizer_oracle_of(params, learning_rate=1.0, **options)
        for step in range(6):
            give_gradients(optimizer, step, sparse=step >= 2)
            optimizer.step()
            expected.step(to_oracle([param.grad for param in params]))
            assert_optimizer_like_oracle(optimizer, expected, f"after step {step}")


def test_a_step_counts_unless_it_is_skipped() -> None:
    groups: list[dict[str, Any]] = [{"iterations": count} for count in (3, torch.tensor(5))]
    for found_inf, expected in ((1.0, [3, 5]), (0.0, [4, 6]), (2.0, [4, 6])):
        execution.count_unless(torch.tensor([found_inf]), groups)
        assert [group["iterations"].tolist() for group in groups] == expected


# ---- An exception at every boundary ---------------------------------------------------------------------------------


class TickingState(dict[Any, Any]):
    """A state that another thread interrupts where parameters are added."""

    tick: Callable[[], None]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tick()
        super().__setitem__(key, value)
        self.tick()

    def __deepcopy__(self, memo: Any) -> dict[Any, Any]:
        return copy.deepcopy(dict(self), memo)


class Fault(TorchDispatchMode):
    """Raises at boundary number `at` of a step: before a PyTorch op, before or after a call of one of `CALLS`.

    A dispatch mode keeps the library from updating its cached accumulators, so that ops are watched only if wanted.
    """

    KERNELS = ("adadelta_", "_adadelta_cached", "_sparse_adadelta")
    PASSES = ("add_to_sum", "average", "decay_table")
    CALLS: tuple[tuple[Any, str], ...] = (
        *((kernels, name) for name in (*KERNELS, "grad_square_sums", "_first_invalid_indices", "_cache_accumulators")),
        *((functional, name) for name in PASSES),
        *((planning, name) for name in ("gather", "Partition", "set_gradient_options", "StepPlan")),
        *((execution, name) for name in ("apply", "add_state", "run", "count_unless")),
        *((sources, name) for name in ("at_step", "write")),
        (precision, "new_state"),
        (precision, "attach_remainders"),
        (Source, "record"),
    )

    def __init__(self, at: int, error: BaseException, watches_ops: bool) -> None:
        super().__init__()
        self.at, self.error, self.watches_ops = at, error, watches_ops
        self.count = 0
        self.may_write = False  # the boundary is that of a call that writes to parameters

    def tick(self, may_write: bool = False) -> None:
        self.count += 1
        if self.count - 1 == self.at:
            self.may_write = may_write
            raise self.error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.watches_ops and func._schema.name != "torch_adadelta::drop_accumulators":  # which finalizers call
            self.tick(func._schema.is_mutable)
        return func(*args, **(kwargs or {}))

    def step(self, optimizer: AdadeltaKeras) -> None:
        optimizer.state, was = TickingState(optimizer.state), optimizer.state  # type: ignore[assignment]
        optimizer.state.tick = self.tick  # type: ignore[attr-defined]
        try:
            with pytest.MonkeyPatch.context() as patch:
                for owner, name in self.CALLS:
                    if hasattr(owner, name):
                        patch.setattr(owner, name, self.ticking(name, getattr(owner, name)))
                if self.watches_ops:
                    with self:
                        optimizer.step()
                else:
                    optimizer.step()
        finally:
            was.clear()
            was.update(optimizer.state)
            optimizer.state = was

    def ticking(self, name: str, real: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            self.tick(name in self.KERNELS + self.PASSES)
            result = real(*args, **kwargs)
            self.tick(name in self.KERNELS + self.PASSES)
            return result

        return called


SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no state yet": {"steps_before": 0},
    "state of others": {"others": True, "steps_before": 0},
    "clipnorm": {"clipnorm": 0.5},
    "global_clipnorm": {"global_clipnorm": 0.5, "steps_before": 0},
    "sources": {"learning_rate": schedules.ExponentialDecay(1.0, 10, 0.9), "rho": lambda: 0.9, "decay": 0.5},
    "callbacks": {"gradient_aggregator": identity, "gradient_transformers": [identity], "steps_before": 0},
    "sparse": {"sparse": True},
    "sparse, no state yet": {"sparse": True, "steps_before": 0},
    "capturable": {"capturable": True, "learning_rate": schedules.ExponentialDecay(1.0, 10, 0.9)},
    "found_inf": {"found_inf": True},
    "sums": {"gradient_accumulation_steps": 2},
    "means, averages": {"gradient_accumulation_steps": 2, "use_ema": True, "sparse": True, "steps_before": 3},
    "sparse, decay": {"sparse": True, "weight_decay": 0.1},
}


CASES = [
    (backend, scenario, watches_ops)
    for watches_ops, scenarios in (
        (False, SCENARIOS),
        (True, ("no state yet", "sparse, no state yet", "capturable", "means, averages")),
    )
    for scenario in scenarios
    for backend in (BACKENDS if scenario != "found_inf" else ("fused",))  # which alone takes it
    if backend in BACKENDS
]


@pytest.mark.parametrize(
    ("backend", "scenario", "watches_ops"), CASES, ids=[f"{b}-{s}-{'ops' if w else 'calls'}" for b, s, w in CASES]
)
def test_an_exception_at_any_boundary_of_a_step(backend: str, scenario: str, watches_ops: bool) -> None:
    """KeyboardInterrupt is what Ctrl-C raises; RuntimeError, what an op raises."""
    backends, options = BACKENDS[backend], SCENARIOS[scenario]
    complete = made(backends, **options)
    complete.step()
    outcomes = set()
    for at in itertools.count():
        optimizer = made(backends, **options)
        before, was, numbers = snapshot(optimizer), [x.clone() for x in tensors_of(optimizer)], numbers_of(optimizer)
        error = (KeyboardInterrupt, RuntimeError)[at % 2]("enough")
        fault = Fault(at, error, watches_ops)
        raised: BaseException | None = None
        try:
            fault.step(optimizer)
        except (KeyboardInterrupt, RuntimeError) as caught:
            raised = caught
        if raised is None:
            assert fault.count <= at, "the exception was swallowed"
            assert is_like(optimizer, complete)
            break
        assert raised is error
        assert torch.is_grad_enabled()
        is_partial = PARTIAL in str(error)
        if holds(optimizer, was) and not (is_partial and fault.may_write):
            assert not is_partial
            assert_unchanged(optimizer, before)
            outcomes.add("nothing")
            optimizer.step()
            assert is_like(optimizer, complete)
        else:
            assert is_partial or is_like(optimizer, complete)
            if not holds(optimizer, tensors_of(complete)):
                assert numbers_of(optimizer) == numbers
            outcomes.add("partial" if is_partial else "complete")
        # Whatever was left in the optimizer, training goes on as that of a copy, which has no cache.
        other = copy.deepcopy(optimizer)
        for each in (optimizer, other):
            give_gradients(each, 77, bool(options.get("sparse")))
            each.step()
        assert is_like(optimizer, other)
    assert outcomes >= {"nothing", "partial"}


def test_an_error_with_a_text_of_its_own_says_in_a_note_that_the_step_is_partial() -> None:
    class Late(Exception):
        def __str__(self) -> str:
            return "late"

    class Group(dict[str, Any]):
        def __setitem__(self, key: str, value: Any) -> None:
            raise Late

    optimizer = made([SINGLE])
    optimizer.param_groups[0] = Group(optimizer.param_groups[0])
    with pytest.raises(Late) as raised:
        optimizer.step()
    if sys.version_info >= (3, 11):
        assert any(PARTIAL in note for note in raised.value.__notes__)


@pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize(
    ("backends", "sparse", "place", "name"),
    [
        ([FUSED, FUSED], False, 0, "parameter 0 of group 0"),
        ([FUSED], True, 0, "parameter 0 of group 0"),
        ([{**FUSED, "weight_decay": 0.1}], True, 0, "parameter 0 of group 0"),
        ([FUSED, FUSED], True, 1, "parameter 0 of group 0"),
        ([SINGLE, FUSED], False, 1, "parameter 0 of group 1"),
        ([MULTI, SINGLE, FUSED], False, 2, "parameter 0 of group 2"),
    ],
    ids=["first", "first, sparse", "first, sparse, after its decay", "second, sparse", "second", "third"],
)
def test_a_batch_that_its_op_refuses_after_it_was_checked(
    monkeypatch: pytest.MonkeyPatch,
    backends: list[dict[str, bool]],
    sparse: bool,
    place: int,
    name: str,
    steps_before: int,
) -> None:
    """Another thread has changed its state: the first leaves nothing behind, unless rows have decayed; a later one does."""
    optimizer = made(backends, steps_before, sparse)
    before, was = snapshot(optimizer), [x.clone() for x in tensors_of(optimizer)]
    spoiled: list[tuple[Tensor, Tensor]] = []
    real, numbers = execution.run, itertools.count()

    def run(batch: Any) -> Any:
        if next(numbers) == place:
            tensor = batch.square_avgs[0]
            spoiled.append((tensor, tensor.data))
            tensor.data = torch.zeros(7, dtype=tensor.dtype)
        return real(batch)

    monkeypatch.setattr(execution, "run", run)
    with pytest.raises(RuntimeError, match=rf"{name} has shape \(3, 2\), but its state square_avg") as raised:
        optimizer.step()
    for tensor, data in spoiled:
        tensor.data = data
    is_partial = place > 0 or "weight_decay" in backends[0]
    assert (PARTIAL in str(raised.value)) == is_partial
    if not is_partial:
        assert_unchanged(optimizer, before)
    else:
        assert optimizer.iterations == steps_before
        assert not holds(optimizer, was)
    monkeypatch.undo()
    other = copy.deepcopy(optimizer)
    for each in (optimizer, other):
        give_gradients(each, 77, sparse)
        each.step()
    assert is_like(optimizer, other)
    assert optimizer.iterations == steps_before + 1


@pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")
def test_averages_that_a_refused_step_began_are_all_that_goes() -> None:
    """The accumulators that were there before stay."""
    optimizer = made([FUSED])
    optimizer.use_ema = True
    optimizer.state[params_of(optimizer)[0]]["square_avg"] = torch.zeros(7)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 has shape \(3, 2\), but its state square_avg"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_counts_are_levelled() -> None:
    """Where nothing has to be asked of a device."""
    tensor = torch.tensor(4)
    groups: list[dict[str, Any]] = [{"iterations": count} for count in (3, 4, tensor, torch.tensor(7, device="meta"))]
    execution.level_counts(groups)
    assert [int(group["iterations"]) for group in groups[:3]] == [3, 4, 4]
    execution.level_counts(groups[:3])
    assert [groups[0], groups[1], int(tensor)] == [{"iterations": 3}, {"iterations": 3}, 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_versions_count_up_for_autograd(backend: str, mesh: DeviceMesh) -> None:
    """Those of a distributed tensor and of its local one."""
    spread = Parameter(distribute_tensor(torch.ones(2), mesh, [Shard(0)]))
    optimizer = AdadeltaKeras([spread, plain := Parameter(torch.ones(2))], **BACKENDS[backend][0])
    spread.grad, plain.grad = distribute_tensor(torch.ones(2), mesh, [Shard(0)]), torch.ones(2)
    before = [tensor._version for tensor in (spread, spread.to_local(), plain)]
    optimizer.step()
    assert all(x._version > was for x, was in zip((spread, spread.to_local(), plain), before, strict=True))


# ---- An exception in every callback ---------------------------------------------------------------------------------


class Enough(Exception):
    pass


def fail(*_: Any, **__: Any) -> Any:
    raise Enough("enough")


class FailingSchedule(schedules.LearningRateSchedule):
    fails = False

    def __call__(self, step: Any) -> Any:
        if self.fails:
            fail()
        return 0.5

    def get_config(self) -> dict[str, Any]:
        return {}


CALLBACKS: dict[str, Callable[[AdadeltaKeras], None]] = {
    "gradient_aggregator": lambda o: setattr(o, "gradient_aggregator", fail),
    "gradient_transformers": lambda o: setattr(o, "gradient_transformers", [identity, fail]),
    "learning_rate": lambda o: setattr(o, "learning_rate", fail),
    "rho": lambda o: setattr(o, "rho", fail),
    "epsilon": lambda o: setattr(o, "epsilon", fail),
    "schedule": lambda o: (setattr(o, "learning_rate", FailingSchedule()), setattr(FailingSchedule, "fails", True))[0],
    "step_pre_hook": lambda o: o.register_step_pre_hook(fail) and None,
}


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_exception_in_a_callback_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, backend: str, name: str, steps_before: int
) -> None:
    monkeypatch.setattr(FailingSchedule, "fails", False)
    optimizer = made(BACKENDS[backend], steps_before)
    CALLBACKS[name](optimizer)
    before = snapshot(optimizer)
    with pytest.raises(Enough, match=r"^enough$"):
        optimizer.step()
    assert_unchanged(optimizer, before)
    assert torch.is_grad_enabled()


def test_an_exception_in_the_closure_or_after_the_step() -> None:
    optimizer, other = made([SINGLE]), made([SINGLE])
    before = snapshot(optimizer)
    with pytest.raises(Enough):
        optimizer.step(fail)
    assert_unchanged(optimizer, before)
    optimizer.register_step_post_hook(fail)
    other.step()
    with pytest.raises(Enough, match=r"^enough$"):
        optimizer.step()
    assert is_like(optimizer, other)  # the hook comes after the step


# ---- No memory ------------------------------------------------------------------------------------------------------

NO_MEMORY = """
import resource
import sys
import torch
from torch_adadelta import AdadeltaKeras

def limit(megabytes):
    pages = int(open("/proc/self/statm").read().split()[0])
    most = pages * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))

options, numels, steps_before, megabytes = map(eval, sys.argv[1:])
torch.set_num_threads(1)
params = [torch.nn.Parameter(torch.zeros(numel)) for numel in numels]
optimizer = AdadeltaKeras(params, 1.0, **options)
for param in params:
    param.grad = torch.ones_like(param)
for _ in range(steps_before):
    optimizer.step()

def written():
    return [[x.ravel()[0].item() for x in (p, *optimizer.state.get(p, {}).values())] for p in params]

before = written()
limit(megabytes)
try:
    optimizer.step()
except (MemoryError, RuntimeError) as error:
    print(f"{type(error).__name__}: {error}")
print(optimizer.iterations == steps_before, [x != y for x, y in zip(written(), before)])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "numels", "steps_before", "megabytes", "changed"),
    [
        # State is made before anything else.
        ({}, [10, 2**24], 0, 40, [False, False]),
        # single_tensor computes all of a parameter before it writes to it, and goes on to the next.
        (SINGLE, [10, 2**24], 1, 40, [True, False]),
        (SINGLE, [2**24, 10], 1, 40, [False, False]),
        # multi_tensor updates all averages before anything else; one temporary fits, and a root takes more.
        (MULTI, [10, 2**24], 1, 40, [False, False]),
        (MULTI, [10, 2**24], 1, 100, [True, True]),
    ],
)
def test_no_memory(
    options: dict[str, bool], numels: list[int], steps_before: int, megabytes: int, changed: list[bool]
) -> None:
    """Either the step says that it is partial, or it has done nothing; the fused update needs none but for state."""
    arguments = [options, numels, steps_before, megabytes]
    done = subprocess.run(
        [sys.executable, "-c", NO_MEMORY, *map(repr, arguments)], capture_output=True, text=True, check=True
    )
    refused, after = done.stdout.strip().split("\n")
    assert "allocate memory" in refused or "MemoryError" in refused
    assert (PARTIAL in refused) == any(changed)
    assert after == f"True {changed}"
