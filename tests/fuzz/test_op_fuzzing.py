"""The door of the ops: whatever they are called with, an exception with a message, or the work; never a crash."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import segment
from torch import Tensor

from torch_adadelta.backends import kernels

pytestmark = pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")

CALLS = 2500


def test_drawn_calls(tmp_path: Path) -> None:
    """In a process of its own, which must not die."""
    log = tmp_path / "calls"
    driver = Path(__file__).with_name("op_fuzzing.py")
    done = subprocess.run([sys.executable, str(driver), "0", str(CALLS), str(log)], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stderr}\nat the last of these calls:\n{log.read_text()[-2000:]}"
    refused, worked = map(int, done.stdout.split())
    assert refused + worked == CALLS
    assert min(refused, worked) > CALLS // 10


def freed(x: Tensor) -> None:
    x.untyped_storage().resize_(0)


def shortened(x: Tensor) -> None:
    x.untyped_storage().resize_(x.untyped_storage().nbytes() - 1)


def at_an_offset(count: int) -> Tensor:
    return torch.ones(count + 100)[100:]


def dense_lists() -> list[list[Tensor]]:
    return [[torch.ones(4), at_an_offset(5)] for _ in range(4)]


NAMES = ["it", "its gradient", "its square_avg", "its acc_delta"]


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("check_only", [False, True])
@pytest.mark.parametrize("spoil", [freed, shortened])
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("calls_before", [0, 1])
def test_tensors_without_their_memory(
    is_cached: bool, check_only: bool, spoil: Callable[[Tensor], None], which: int, calls_before: int
) -> None:
    """As FSDP leaves parameters between uses; the second call of a kind is looked at less closely than the first."""
    if which == 1 and spoil is shortened:
        pytest.skip("nothing is written to a gradient, and to ask for the size of its storage costs each step")
    lists = dense_lists()
    params, grads, *states = lists
    adadelta = torch.ops.torch_adadelta
    number = adadelta.cache_accumulators(*states)

    def call(check_only: bool = False) -> None:
        own = segment(2, 1.0, 0.9, 1e-7)
        if is_cached:
            adadelta.adadelta_.cached(params, grads, number, *own, check_only=check_only)
        else:
            adadelta.adadelta_(*lists, *own, check_only=check_only)

    for _ in range(calls_before):
        call()
    spoil(lists[which][1])
    before = [tensors[0].clone() for tensors in lists]
    message = rf"parameter 1: {NAMES[which]} (has no|reaches beyond its) memory: its storage was resized"
    with pytest.raises(RuntimeError, match=f"^torch_adadelta refuses {message}"):
        call(check_only)
    for tensors, was in zip(lists, before, strict=True):
        assert torch.equal(tensors[0], was)


@pytest.mark.parametrize("name", ["lr", "rho", "epsilon"])
def test_hyperparameters_without_memory(name: str) -> None:
    values = {"lr": 1.0, "rho": 0.9, "epsilon": 1e-7, name: torch.ones(1)}
    freed(values[name])
    with pytest.raises(RuntimeError, match=f"the {name} of segment 0 has no memory: its storage was resized"):
        torch.ops.torch_adadelta.adadelta_(*dense_lists(), *segment(2, **values))


@pytest.mark.parametrize("name", ["factor_tensor", "found_inf"])
def test_options_without_memory(name: str) -> None:
    option = torch.ones(1)
    freed(option)
    with pytest.raises(RuntimeError, match=f"{name} has no memory: its storage was resized"):
        torch.ops.torch_adadelta.adadelta_(*dense_lists(), *segment(2, 1.0, 0.9, 1e-7), **{name: option})


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("spoil", [freed, shortened])
def test_sparse_gradients_without_their_memory(which: int, spoil: Callable[[Tensor], None]) -> None:
    lists = [
        [torch.ones(4, 3)],
        [torch.zeros(1, 2, dtype=torch.int64)],
        *([torch.ones(count, 3)] for count in (2, 4, 4)),
    ]
    spoil(lists[which][0])
    name = ["it", "the memory of its indices", *NAMES[1:]][which]
    for op, arguments in (("sparse_adadelta_", segment(1, 1.0, 0.9, 1e-7)), ("first_invalid_indices", ())):
        message = f"^torch_adadelta refuses parameter 0: {name} .*its storage was resized"
        with pytest.raises(RuntimeError, match=message):
            getattr(torch.ops.torch_adadelta, op)(*lists, *arguments)


@pytest.mark.parametrize("which", ["param", "square_avg", "acc_delta"])
@pytest.mark.parametrize("of_another", [False, True])
def test_indices_in_memory_that_is_written_to(which: str, of_another: bool) -> None:
    """Once the first rows were updated, they would name rows anywhere."""
    tables = {name: [torch.zeros(8, 2) for _ in range(2)] for name in ("param", "square_avg", "acc_delta")}
    indices = [torch.zeros(1, 4, dtype=torch.int64) for _ in range(2)]
    indices[1 - of_another] = tables[which][1].view(-1).view(torch.int64)[2:6][None]
    values = [torch.ones(4, 2) for _ in range(2)]
    message = f"parameter {1 - of_another}: its indices share memory with a tensor that would be written to"
    own = segment(2, 1.0, 0.9, 1e-7)
    with pytest.raises(RuntimeError, match=f"^torch_adadelta refuses {message}"):
        torch.ops.torch_adadelta.sparse_adadelta_(
            tables["param"], indices, values, tables["square_avg"], tables["acc_delta"], *own
        )
    assert not any(table.any() for pair in tables.values() for table in pair)


def test_numbers_under_which_no_accumulators_are_cached() -> None:
    params, grads, *states = dense_lists()
    adadelta = torch.ops.torch_adadelta
    number = adadelta.cache_accumulators(*states)
    adadelta.drop_accumulators(number)
    adadelta.drop_accumulators(number)  # does nothing: a finalizer must not fail
    for wrong in (number, 0, -1, 2**63 - 1):
        message = f"^torch_adadelta refuses the call: no accumulators are cached under the number {wrong}$"
        with pytest.raises(RuntimeError, match=message):
            adadelta.adadelta_.cached(params, grads, wrong, *segment(2, 1.0, 0.9, 1e-7))
    assert torch.equal(params[0], torch.ones(4))


@pytest.mark.parametrize("op", ["adadelta_", "adadelta_.cached", "sparse_adadelta_"])
@pytest.mark.parametrize(
    ("sizes", "hyperparameters", "tensors", "error"),
    [
        ([1], [1.0] * 4, [], "the sizes of the segments are 1, which do not add up to 2 parameters"),
        ([3], [1.0] * 4, [], "the sizes of the segments are 3, which do not add up to 2 parameters"),
        ([], [], [], "the sizes of the segments are , which do not add up to 2 parameters"),
        ([3, -1], [1.0] * 8, [], "the sizes of the segments are 3, -1, which"),
        ([2**63 - 1, 2**63 - 1, 4], [1.0] * 12, [], "the sizes of the segments are 92"),
        ([2], [1.0] * 3, [], "1 segments have 3 hyperparameters and 0 hyperparameter_tensors, but must have 4 and"),
        ([1, 1], [1.0] * 4, [], "2 segments have 4 hyperparameters and 0 hyperparameter_tensors, but must have 8 and"),
        ([2], [1.0] * 4, [None] * 3, "1 segments have 4 hyperparameters and 3 hyperparameter_tensors, but must"),
        ([2], [1.0] * 4, [None] * 8, "1 segments have 4 hyperparameters and 8 hyperparameter_tensors, but must"),
        ([2], [1.0] * 4, [None] * 3 + [torch.ones(1)], "the maximize of segment 0 must be 0 or 1, and no tensor"),
        ([2, 0], [1.0] * 7 + [0.5], [], "the maximize of segment 1 must be 0 or 1, and no tensor"),
    ],
)
def test_segments_that_do_not_fit(op: str, sizes: list[int], hyperparameters: Any, tensors: Any, error: str) -> None:
    params, grads, *states = dense_lists()
    adadelta = torch.ops.torch_adadelta
    lists: tuple[Any, ...] = (params, grads, *states)
    if op == "adadelta_.cached":
        lists = (params, grads, adadelta.cache_accumulators(*states))
    elif op == "sparse_adadelta_":
        lists = (params, [torch.zeros(1, 1, dtype=torch.int64)] * 2, [torch.ones(1)] * 2, *states)
    call = adadelta.adadelta_.cached if op == "adadelta_.cached" else getattr(adadelta, op)
    with pytest.raises(RuntimeError, match=f"^torch_adadelta refuses the call: {error}"):
        call(*lists, sizes, hyperparameters, tensors)
    assert all(torch.equal(x, torch.ones_like(x)) for x in (*params, *states[0], *states[1]))
