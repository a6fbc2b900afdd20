"""`all_reduce_sum` in an optimizer: shards train as the whole batch does, in processes on gloo."""

import functools
import operator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import assert_same_bits, assert_unchanged, dtype_name, randn, snapshot
from processes import Processes
from test_distributed import error_of
from torch import Tensor
from torch.nn import Parameter

from torch_adadelta import AdadeltaKeras
from torch_adadelta.distributed import all_reduce_sum

pytestmark = pytest.mark.xdist_group("processes")


# ---- Dense gradients --------------------------------------------------------------------------------------------------

STEPS = 6
BATCH = 12


def train(model: "Integers | Reals", shards: list[range], how: str) -> list[Tensor]:
    """The parameters and state after some steps on these samples, the gradients of several shards summed in order.

    `how` says who calls all_reduce_sum: the optimizer ("keyword"), this loop ("by hand") or nobody ("not").
    """
    options = {"gradient_aggregator": all_reduce_sum} if how == "keyword" else {}
    optimizer = AdadeltaKeras(model.params, learning_rate=1.0, **options)
    for step in range(STEPS):
        by_shard = []
        for shard in shards:
            optimizer.zero_grad()
            model.loss(step, shard).backward()
            by_shard.append([param.grad for param in model.params])
        grads = [functools.reduce(operator.add, same) for same in zip(*by_shard, strict=True)]
        pairs = list(zip(grads, model.params, strict=True))
        for grad, param in all_reduce_sum(pairs) if how == "by hand" else pairs:
            param.grad = grad
        before = [param.grad.clone() for param in model.params]
        optimizer.step()
        assert all(map(torch.equal, before, [param.grad for param in model.params]))
    return [
        tensor.detach().clone()
        for param in model.params
        for tensor in (optimizer.state[param]["square_avg"], optimizer.state[param]["acc_delta"], param)
    ]


class Integers:
    """A loss linear in the parameters: their gradients are small integers at every step, and so are sums of them."""

    def __init__(self) -> None:
        dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128)
        self.params = [Parameter(torch.zeros(4, 3, dtype=dtype)) for dtype in dtypes]
        self.params.append(Parameter(torch.zeros(4, 3).t()))

    def loss(self, step: int, samples: range) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        x = torch.randint(-2, 3, (BATCH, 4), generator=generator)[samples]
        y = torch.randint(-2, 3, (BATCH, 3), generator=generator)[samples]
        total = torch.zeros((), dtype=torch.float64)
        for param in self.params:
            weight = param if param.shape == (4, 3) else param.t()
            if param.is_complex():
                weight = weight * (1 - 2j)
            total = total + ((x.to(weight.dtype) @ weight) * y).sum().real.double()
        return total


class Reals:
    """Two layers and a squared error, summed over the samples."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(5)
        self.params = [Parameter(randn(shape, dtype, generator)) for shape in ((7, 20), (20,), (20, 3), (3,))]

    def loss(self, step: int, samples: range) -> Tensor:
        w1, b1, w2, b2 = self.params
        generator = torch.Generator().manual_seed(step)
        x = randn((BATCH, 7), w1.dtype, generator)[samples]
        y = randn((BATCH, 3), w1.dtype, generator)[samples]
        return ((torch.tanh(x @ w1 + b1) @ w2 + b2 - y) ** 2).sum()


def all_shards(world_size: int) -> list[range]:
    each = BATCH // world_size
    return [range(rank * each, (rank + 1) * each) for rank in range(world_size)]


def train_integers(how: str) -> tuple[list[Tensor], list[Tensor]]:
    """What this process trained on its shard, and what it trains on all the data."""
    shard = all_shards(dist.get_world_size())[dist.get_rank()]
    return train(Integers(), [shard], how), train(Integers(), [range(BATCH)], "not")


@pytest.mark.parametrize("how", ["keyword", "by hand"])
def test_shards_train_as_the_whole_batch_does_to_the_bit(processes: Processes, how: str) -> None:
    for ours, whole in processes.run(train_integers, how):
        for i, (actual, wanted) in enumerate(zip(ours, whole, strict=True)):
            assert_same_bits(actual, wanted, str(i))
            assert wanted.abs().max() > 0


def test_without_the_sum_they_do_not(two: Processes) -> None:
    for ours, whole in two.run(train_integers, "not"):
        assert not any(map(torch.equal, ours, whole))


def train_reals(dtype: torch.dtype, how: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What this process trained on its shard, what it trains on the shards in their order, and on all the data."""
    shards = all_shards(dist.get_world_size())
    return (
        train(Reals(dtype), [shards[dist.get_rank()]], how),
        train(Reals(dtype), shards, "not"),
        train(Reals(dtype), [range(BATCH)], "not"),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("how", ["keyword", "by hand"])
def test_shards_train_as_their_summed_gradients_do(processes: Processes, how: str, dtype: torch.dtype) -> None:
    """To the bit with two processes, for a + b is b + a. With three, gloo sums some parts as (a + b) + c and others as
    (b + c) + a; and the one backward pass over the whole batch sums sample by sample. These differ in the last bits.
    """
    results = processes.run(train_reals, dtype, how)
    tolerance = {"rtol": 2e-4, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 1e-11, "atol": 1e-15}
    for ours, by_shards, whole in results:
        for i, (actual, wanted, all_at_once) in enumerate(zip(ours, by_shards, whole, strict=True)):
            if processes.world_size == 2:
                assert_same_bits(actual, wanted, str(i))
            torch.testing.assert_close(actual, wanted, **tolerance)
            torch.testing.assert_close(actual, all_at_once, **tolerance)
            assert_same_bits(actual, results[0][0][i], f"{i}: the processes drift apart")


def step_without_a_gradient() -> tuple[tuple[str, str], int]:
    """A step after a process has not used one of two parameters; then one in which all have used both."""
    params = [Parameter(torch.zeros(3)), Parameter(torch.zeros(2))]
    optimizer = AdadeltaKeras(params, gradient_aggregator=all_reduce_sum)
    for param in params[dist.get_rank() :]:
        param.grad = torch.ones_like(param)
    before = snapshot(optimizer)
    error = error_of(optimizer.step)
    assert_unchanged(optimizer, before)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    return error, optimizer.iterations


def test_a_step_with_a_parameter_unused_in_one_process_changes_nothing(two: Processes) -> None:
    for (error, message), iterations in two.run(step_without_a_gradient):
        assert error == "RuntimeError"
        assert "(process 0: 2 with 5 elements; process 1: 1 with 2 elements)" in message
        assert iterations == 1


# ---- Tables ------------------------------------------------------------------------------------------------------------


def train_tables(shards: list[range], aggregates: bool, options: dict[str, Any]) -> list[Tensor]:
    """Two tables, one step after the other on these samples."""
    torch.manual_seed(0)
    tables = [torch.nn.Embedding(n, 5, sparse=True) for n in (20, 4)]
    params = [table.weight for table in tables]
    if aggregates:
        options = {**options, "gradient_aggregator": all_reduce_sum}
    optimizer = AdadeltaKeras(params, 1.0, **options)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        rows = [torch.randint(n, (BATCH,), generator=generator) for n in (20, 4)]
        target = torch.randn(BATCH, 5, generator=generator)
        optimizer.zero_grad()
        for shard in shards:
            (tables[0](rows[0][shard]) * tables[1](rows[1][shard]) - target[shard]).square().sum().backward()
        optimizer.step()
    return [tensor.detach().clone() for tensor in (*params, *optimizer.variables()[1:])]


def train_tables_both_ways(options: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    shard = all_shards(dist.get_world_size())[dist.get_rank()]
    return train_tables([shard], True, options), train_tables([range(BATCH)], False, options)


@pytest.mark.parametrize("options", [{}, {"clipnorm": 0.7}, {"global_clipnorm": 0.7}, {"foreach": False}], ids=str)
def test_tables_train_as_on_the_whole_batch_to_the_bit(processes: Processes, options: dict[str, Any]) -> None:
    """For any number of processes: nothing is added before the update, which adds in the order of the samples."""
    for ours, whole in processes.run(train_tables_both_ways, options):
        for i, (actual, wanted) in enumerate(zip(ours, whole, strict=True)):
            assert_same_bits(actual, wanted, str(i))
