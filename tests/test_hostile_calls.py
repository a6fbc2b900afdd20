"""The door of the ops: whatever they are called with, an exception with a message, or the work; never a crash."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from torch_adadelta import ops

pytestmark = pytest.mark.skipif(not ops.is_loaded, reason="the compiled library is not installed")

CALLS = 2500


def test_drawn_calls(tmp_path: Path) -> None:
    """In a process of its own, which must not die."""
    log = tmp_path / "calls"
    driver = Path(__file__).with_name("hostile_calls.py")
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


@pytest.mark.parametrize("op", ["default", "unclipped", "held", "held_with_options", "check_lists"])
@pytest.mark.parametrize("spoil", [freed, shortened])
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("calls_before", [0, 1])
def test_tensors_without_their_memory(op: str, spoil: Callable[[Tensor], None], which: int, calls_before: int) -> None:
    """As FSDP leaves parameters between uses; the second call of a kind is looked at less closely than the first."""
    if which == 1 and spoil is shortened:
        pytest.skip("nothing is written to a gradient, and to ask for the size of its storage costs each step")
    lists = dense_lists()
    name = ["params", "grads", "square_avgs", "acc_deltas"][which]
    params, grads, *states = lists
    adadelta = torch.ops.torch_adadelta
    if op.startswith("held"):
        number = adadelta.hold_state(*states)
        call = lambda: getattr(adadelta.adadelta_, op)(params, grads, number, 1.0, 0.9, 1e-7)  # noqa: E731
    elif op == "check_lists":
        call = lambda: adadelta.check_lists(*lists)  # noqa: E731
    else:
        call = lambda: getattr(adadelta.adadelta_, op)(*lists, 1.0, 0.9, 1e-7)  # noqa: E731
    for _ in range(calls_before):
        call()
    spoil(lists[which][1])
    before = [tensors[0].clone() for tensors in lists]
    with pytest.raises(RuntimeError, match=rf"{name}\[1\] (has no|reaches beyond its) memory: its storage was resized"):
        call()
    for tensors, was in zip(lists, before, strict=True):
        assert torch.equal(tensors[0], was)


@pytest.mark.parametrize("name", ["lr_tensor", "rho_tensor", "epsilon_tensor", "factor_tensor", "found_inf"])
def test_options_without_memory(name: str) -> None:
    option = torch.ones(1)
    freed(option)
    with pytest.raises(RuntimeError, match=f"{name} has no memory: its storage was resized"):
        torch.ops.torch_adadelta.adadelta_(*dense_lists(), 1.0, 0.9, 1e-7, **{name: option})


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("spoil", [freed, shortened])
def test_sparse_gradients_without_their_memory(which: int, spoil: Callable[[Tensor], None]) -> None:
    lists = [
        [torch.ones(4, 3)],
        [torch.zeros(1, 2, dtype=torch.int64)],
        *([torch.ones(count, 3)] for count in (2, 4, 4)),
    ]
    spoil(lists[which][0])
    name = ["params", "indices", "values", "square_avgs", "acc_deltas"][which]
    for op, arguments in (("sparse_adadelta_", (1.0, 0.9, 1e-7)), ("first_bad_indices", ())):
        with pytest.raises(RuntimeError, match=rf"{name}\[0\] .*its storage was resized"):
            getattr(torch.ops.torch_adadelta, op)(*lists, *arguments)


@pytest.mark.parametrize("which", ["param", "square_avg", "acc_delta"])
@pytest.mark.parametrize("of_another", [False, True])
def test_indices_in_memory_that_is_written_to(which: str, of_another: bool) -> None:
    """Once the first rows were updated, they would name rows anywhere."""
    tables = {name: [torch.zeros(8, 2) for _ in range(2)] for name in ("param", "square_avg", "acc_delta")}
    indices = [torch.zeros(1, 4, dtype=torch.int64) for _ in range(2)]
    indices[1 - of_another] = tables[which][1].view(-1).view(torch.int64)[2:6][None]
    values = [torch.ones(4, 2) for _ in range(2)]
    with pytest.raises(
        RuntimeError,
        match=f"the indices of parameter {1 - of_another} share memory with a tensor that would be written to",
    ):
        torch.ops.torch_adadelta.sparse_adadelta_(
            tables["param"], indices, values, tables["square_avg"], tables["acc_delta"], 1.0, 0.9, 1e-7
        )
    assert not any(table.any() for pair in tables.values() for table in pair)


def test_numbers_of_state_that_nothing_is_held_under() -> None:
    params, grads, *states = dense_lists()
    adadelta = torch.ops.torch_adadelta
    number = adadelta.hold_state(*states)
    adadelta.drop_state(number)
    adadelta.drop_state(number)  # does nothing: a finalizer must not fail
    for wrong in (number, 0, -1, 2**63 - 1):
        with pytest.raises(RuntimeError, match=f"no state is held under the number {wrong}"):
            adadelta.adadelta_.held(params, grads, wrong, 1.0, 0.9, 1e-7)
        with pytest.raises(RuntimeError, match=f"no state is held under the number {wrong}"):
            adadelta.adadelta_.held_with_options(params, grads, wrong, 1.0, 0.9, 1e-7, clipvalue=1.0)
    assert torch.equal(params[0], torch.ones(4))
