"""Parameters that are DTensors: FSDP2, alone and with tensor parallelism, in processes on gloo."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from cases import assert_same_bits
from exact_training import (
    HEADS_PLAN,
    OPTIONS,
    STEPS,
    Heads,
    alone,
    assert_same,
    data,
    dtype_for,
    error_of,
    everything,
    full,
    parallel,
    shard_of,
    sharded_model,
    train,
)
from processes import Processes
from test_distributed import Calls
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

from torch_adadelta import AdadeltaKeras
from torch_adadelta.backends import dtensor
from torch_adadelta.backends.batch import Backend
from torch_adadelta.step import selection

pytestmark = pytest.mark.xdist_group("processes")


# ---- FSDP2 ----------------------------------------------------------------------------------------------------------


def train_fsdp(
    all_options: dict[str, dict[str, Any]], mesh_shape: tuple[int, ...], policy: MixedPrecisionPolicy
) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicas", "parts")[-len(mesh_shape) :])
    results = {}
    for name, options in all_options.items():
        model = sharded_model(dtype_for(options), mesh=mesh, mp_policy=policy)
        optimizer = AdadeltaKeras(model.parameters(), **{"learning_rate": 1.0, **options})
        train(model, optimizer, range(STEPS), shard_of)
        is_stepped = all(dtensor.is_dtensor(s) for state in optimizer.state.values() for s in state.values())
        results[name] = everything(model, optimizer), optimizer.iterations, is_stepped
    return results


def check_fsdp(processes: Processes, mesh_shape: tuple[int, ...], policy: MixedPrecisionPolicy) -> None:
    for results in processes.run(train_fsdp, OPTIONS, mesh_shape, policy):
        for name, (ours, iterations, are_dtensors) in results.items():
            expected, count = alone(OPTIONS[name])
            assert_same(ours, expected, name)
            assert iterations == count
            assert are_dtensors


IN_BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def test_fsdp2_trains_as_one_process_does(processes: Processes) -> None:
    """To the bit, norms included; with rows that do not divide evenly, and processes without any of a parameter."""
    check_fsdp(processes, (processes.world_size,), MixedPrecisionPolicy())


def test_fsdp2_with_mixed_precision_trains_as_one_process_does(two: Processes) -> None:
    """These gradients are exact in bfloat16, too. Parameters, gradients and state stay in the parameters' dtype."""
    check_fsdp(two, (2,), IN_BFLOAT16)


@pytest.mark.parametrize("policy", [MixedPrecisionPolicy(), IN_BFLOAT16], ids=["float32", "bfloat16"])
def test_hybrid_sharding_trains_as_one_process_does(four: Processes, policy: MixedPrecisionPolicy) -> None:
    """Two replicas, each sharded over two processes: a square is in one sum of norms, not in two."""
    check_fsdp(four, (2, 2), policy)


def sums_of_a_step(options: dict[str, Any]) -> list[int]:
    """How many numbers each call of the backend adds up over the processes."""
    model = sharded_model()
    optimizer = AdadeltaKeras(model.parameters(), 1.0, **options)
    train(model, optimizer, range(1), shard_of)
    with Calls() as calls:
        optimizer.step()
    return calls.numels


def test_a_step_calls_other_processes_for_norms_only(two: Processes) -> None:
    """Two numbers for each of the four parameters, and two more: docs/scaling.md counts on it."""
    assert two.run(sums_of_a_step, {"clipvalue": 1.0}) == [[]] * 2
    for name in ("clipnorm", "global_clipnorm"):
        assert two.run(sums_of_a_step, {name: 1.0}) == [[2 * 4 + 2]] * 2


def accumulate_without_sync() -> tuple[dict[str, Tensor], int]:
    """Updates from two batches each, whose sum FSDP2 keeps until it reduces it."""
    model: Any = sharded_model()
    optimizer = AdadeltaKeras(model.parameters(), 1.0, global_clipnorm=5.0)
    for step in range(STEPS):
        model.set_requires_gradient_sync(step % 2 == 1)
        optimizer.zero_grad()
        (model(shard_of(data(step))) / 2).backward()
        optimizer.step()  # does nothing where there is no gradient yet
    return everything(model, optimizer), optimizer.iterations


def test_fsdp2_may_keep_the_sum_of_gradients(two: Processes) -> None:
    expected, count = alone({"gradient_accumulation_steps": 2, "global_clipnorm": 5.0})
    for ours, iterations in two.run(accumulate_without_sync):
        assert_same(ours, {name: expected[name] for name in expected if not name.endswith("gradient_accumulator")})
        assert iterations == count


# ---- Tensor parallelism with FSDP2 ----------------------------------------------------------------------------------


class Block(nn.Module):
    """A block as of a transformer. Each row of a batch is a token."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.norm = nn.LayerNorm(5, dtype=torch.float64)
        self.column = nn.Linear(5, 8, dtype=torch.float64)
        self.row = nn.Linear(8, 5, dtype=torch.float64)
        for param in self.parameters():
            nn.init.normal_(param, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        x = x.double()
        return ((x + self.row(torch.tanh(self.column(self.norm(x))))) ** 2).sum()


BLOCK_PLAN = {
    "norm": SequenceParallel(sequence_dim=0),
    "column": ColwiseParallel(input_layouts=Shard(0)),
    "row": RowwiseParallel(output_layouts=Shard(0)),
}


def train_heads(all_options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    results = {}
    for name, options in all_options.items():
        model = Heads(dtype_for(options))
        loss, of = parallel(model, HEADS_PLAN)
        optimizer = AdadeltaKeras(model.parameters(), **{"learning_rate": 1.0, **options})
        train(loss, optimizer, range(STEPS), of)
        results[name] = everything(model, optimizer), optimizer.iterations
    return results


def test_tensor_parallelism_with_fsdp2_trains_as_one_process_does(four: Processes) -> None:
    """To the bit, norms included. Some rows are first shared out by tensor parallelism, then unevenly by FSDP2."""
    expected = train_heads(OPTIONS)
    for results in four.run(train_heads, OPTIONS):
        assert results.keys() == expected.keys()
        for name, (ours, iterations) in results.items():
            assert_same(ours, expected[name][0], name)
            assert iterations == expected[name][1]


def train_block() -> dict[str, Tensor]:
    model = Block()
    loss, of = parallel(model, BLOCK_PLAN)
    own_tokens = of
    if dist.is_initialized():
        own_tokens = lambda batch: of(batch).chunk(2)[dist.get_rank() % 2]  # noqa: E731
    optimizer = AdadeltaKeras(model.parameters(), 1.0, global_clipnorm=0.5)
    train(loss, optimizer, range(STEPS), own_tokens)
    return everything(model, optimizer)


def test_a_block_of_a_transformer(four: Processes) -> None:
    """In float64. Matrix products, and the norm in its last place, depend on how they are shared out."""
    expected = train_block()
    for ours in four.run(train_block):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-15)


PLACEMENTS = ([Shard(0), Shard(1)], [Replicate(), Shard(0)], [Shard(1), Replicate()], [Replicate(), Replicate()])


def train_on_two_dimensions(options: dict[str, Any]) -> Any:
    """Parameters that are sharded over one or both dimensions of a mesh of 2 × 2 processes, as in HSDP."""
    mesh = init_device_mesh("cpu", (2, 2))
    generator = torch.Generator().manual_seed(0)
    params = [
        nn.Parameter(distribute_tensor(torch.randn(4, 6, generator=generator), mesh, placements))
        for placements in PLACEMENTS
    ]
    plain = [nn.Parameter(param.full_tensor().detach().clone()) for param in params]  # type: ignore[attr-defined]
    optimizers = [AdadeltaKeras(some, 1.0, **options) for some in (params, plain)]
    for _ in range(2):
        for param, same, placements in zip(params, plain, PLACEMENTS, strict=True):
            same.grad = torch.randn(4, 6, generator=generator)
            param.grad = distribute_tensor(same.grad, mesh, placements)
        for optimizer in optimizers:
            optimizer.step()
    return [
        (full(ours).detach(), expected.detach())
        for param, same in zip(params, plain, strict=True)
        for ours, expected in (
            (param, same),
            *zip(optimizers[0].state[param].values(), optimizers[1].state[same].values(), strict=True),
        )
    ]


@pytest.mark.parametrize(
    "options", [{"clipnorm": 0.5}, {"global_clipnorm": 0.5}, {"state_dtype": torch.bfloat16}], ids=str
)
def test_a_mesh_of_two_dimensions(four: Processes, options: dict[str, float]) -> None:
    for pairs in four.run(train_on_two_dimensions, options):
        for ours, expected in pairs:
            assert_same_bits(ours, expected)


def test_the_choice_for_dtensors_is_that_for_plain_tensors() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        params = [nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Shard(0)])), nn.Parameter(torch.ones(2))]
        plain = [nn.Parameter(torch.ones(1))]
        for foreach, fused in ((None, None), (True, None), (False, None), (None, False)):
            group = {"foreach": foreach, "fused": fused, "differentiable": False}
            backend, is_local = selection.select_backend(group, plain)
            assert not is_local
            assert selection.select_backend(group, params) == (backend, True)
        group = {"foreach": None, "fused": None, "differentiable": True}
        assert selection.select_backend(group, params) == (Backend.SINGLE_TENSOR, False)
        optimizer = AdadeltaKeras(params, 1.0)
        params[0].grad = distribute_tensor(torch.ones(3), mesh, [Shard(0)])
        version = params[0]._version
        optimizer.step()
        assert params[0]._version > version
        optimizer.state[params[0]]["square_avg"] = distribute_tensor(torch.zeros(3), mesh, [Replicate()])
        with pytest.raises(RuntimeError, match="parameter 0 of group 0 and its state square_avg are distributed in"):
            optimizer.step()
    finally:
        dist.destroy_process_group()


def mixed(all_options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """DTensors of several placements and plain tensors in one optimizer, one gradient a partial sum."""
    n, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (n,))
    results = {}
    for name, options in all_options.items():
        values = [torch.zeros(5, 3), torch.ones(4), torch.zeros(2, 3), torch.ones(3)]
        placements = [[Shard(0)], [Replicate()], [Shard(1)], None]
        ours = [
            nn.Parameter(v.clone() if p is None else distribute_tensor(v, mesh, p))
            for v, p in zip(values, placements, strict=True)
        ]
        plain = [nn.Parameter(v.clone()) for v in values]
        optimizers = [AdadeltaKeras(params, **{"learning_rate": 1.0, **options}) for params in (ours, plain)]
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            grads = [torch.randint(-9, 9, v.shape, generator=generator).float() for v in values]
            for p, g in zip(plain, grads, strict=True):
                p.grad = g
            for p, g, placement in zip(ours, grads, placements, strict=True):
                p.grad = g.clone() if placement is None else distribute_tensor(g, mesh, placement)
            part = grads[1] if rank == 0 else torch.zeros(4)
            ours[1].grad = torch.distributed.tensor.DTensor.from_local(part, mesh, [Partial()])
            for optimizer in optimizers:
                optimizer.step()
        results[name] = [(full(p), q.detach()) for p, q in zip(ours, plain, strict=True)]
    return results


def test_placements_and_plain_tensors_mix(processes: Processes) -> None:
    for results in processes.run(mixed, OPTIONS):
        for name, pairs in results.items():
            for ours, plain in pairs:
                assert_same_bits(ours, plain, name)


def disagree_fsdp(kind: str) -> tuple[str, bool, int]:
    model = sharded_model()
    optimizer = AdadeltaKeras(model.parameters(), 1.0, global_clipnorm=1.0)
    train(model, optimizer, range(1), shard_of)
    model(shard_of(data(1))).backward()
    if dist.get_rank() == 1:
        if kind == "gradient":
            model.four.grad = None
        elif kind == "all gradients":
            optimizer.zero_grad()
        else:
            optimizer.iterations = 7
    before = everything(model, optimizer)
    count = optimizer.iterations
    error = error_of(optimizer.step)
    after = everything(model, optimizer)
    return error, all(torch.equal(before[name], after[name]) for name in before), optimizer.iterations - count


@pytest.mark.parametrize("kind", ["gradient", "all gradients", "iterations"])
def test_processes_that_disagree_are_told_so(two: Processes, kind: str) -> None:
    for error, is_unchanged, counted in two.run(disagree_fsdp, kind):
        what = "disagree on iterations" if kind == "iterations" else "has a gradient in 1 of the 2 processes"
        assert what in error
        assert is_unchanged
        assert counted == 0


# ---- The parts ------------------------------------------------------------------------------------------------------


class Looks(Tensor):
    """A subclass that is no DTensor."""


def looked_at() -> dict[str, Any]:
    """What backends/dtensor.py says of tensors, in each of two processes."""
    rank = dist.get_rank()
    mesh, same, grid = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))
    plain = torch.arange(3.0)
    rows, copies, columns = (
        distribute_tensor(torch.arange(6.0).view(3, 2), mesh, [p]) for p in (Shard(0), Replicate(), Shard(1))
    )
    param = nn.Parameter(rows)
    partial = DTensor.from_local(torch.full((3, 2), 1.0 + rank), mesh, [Partial()])
    late = copies.redistribute(mesh, [Shard(0)], async_op=True)
    waiting = DTensor.from_local(funcol.all_reduce(torch.full((2,), 1.0 + rank), "sum", mesh), mesh, [Replicate()])
    aligned = dtensor.aligned([param, plain, copies], [partial, plain, copies])
    on_grid = distribute_tensor(torch.ones(4, 4), grid, [Shard(0), Replicate()])
    both = distribute_tensor(torch.ones(4, 4), grid, [Shard(0), Shard(1)])
    made: Any = dtensor.from_local(param, dtensor.local(rows) * 2)
    return {
        "is_dtensor": [dtensor.is_dtensor(x) for x in (rows, param, plain, torch.ones(1).as_subclass(Looks), None)],
        "has_dtensor": [dtensor.has_dtensor(xs) for xs in ([plain, rows], [plain], [])],
        "are_alike": [
            dtensor.are_alike(*pair)
            for pair in (([rows, plain], [copies, plain]), ([param], [rows]), ([plain], [nn.Parameter(plain)]), ([rows], [plain]), ([plain, rows], [rows, plain]))
        ],
        "local": dtensor.local(rows).tolist(),
        "local of a Parameter": dtensor.local(param).data_ptr() == dtensor.local(rows).data_ptr(),
        "local of a plain one": dtensor.local(plain) is plain,
        "waited for": [type(dtensor.local(waiting)) is Tensor, dtensor.local(waiting).tolist()],
        "waited for in a list": [type(x) for x in dtensor.local_tensors([waiting, plain])] == [Tensor, Tensor],
        "local_tensors": [x.tolist() for x in dtensor.local_tensors([param, plain])],
        "made": [tuple(made.shape), made.stride(), made.placements == rows.placements, dtensor.local(made).tolist()],
        "redistributed": dtensor.local(late).tolist(),
        "aligned": [dtensor.local(aligned[0]).tolist(), aligned[1] is plain, aligned[2] is copies],
        "distributed alike": [
            dtensor.is_distributed_alike(*pair)
            for pair in ((rows, param), (rows, copies), (rows, columns), (plain, rows), (plain, plain), (rows, distribute_tensor(torch.ones(3, 2), same, [Shard(0)])), (copies, distribute_tensor(torch.ones(2), grid, [Replicate(), Replicate()])))
        ],
        "groups": [len(dtensor._groups(x)) for x in (rows, copies, on_grid, both)],
        "nonzero": [
            dtensor.any_nonzero([param], [distribute_tensor(g, mesh, [Shard(0)])])
            for g in (torch.zeros(3, 2), torch.tensor([[0.0, 0], [0, 0], [0, 1]]), torch.tensor([[1.0, 0], [0, 0], [0, 0]]))
        ],
        "nonzero, sparse": [dtensor.any_nonzero([plain], [torch.sparse_coo_tensor([[0]], [x], (3,), check_invariants=True)]) for x in (0.0, 2.0)],
    }  # fmt: skip


def test_what_a_process_has_of_a_tensor(two: Processes) -> None:
    parts = [[[0.0, 1.0], [2.0, 3.0]], [[4.0, 5.0]]]
    for rank, seen in enumerate(two.run(looked_at)):
        assert seen == {
            "is_dtensor": [True, True, False, False, False],
            "has_dtensor": [True, False, False],
            "are_alike": [True, True, True, False, False],
            "local": parts[rank],
            "local of a Parameter": True,
            "local of a plain one": True,
            "waited for": [True, [3.0, 3.0]],
            "waited for in a list": True,
            "local_tensors": [parts[rank], [0.0, 1.0, 2.0]],
            "made": [(3, 2), (2, 1), True, [[2 * x for x in row] for row in parts[rank]]],
            "redistributed": parts[rank],
            "aligned": [[[3.0, 3.0]] * len(parts[rank]), True, True],
            "distributed alike": [True, False, False, False, True, True, False],
            "groups": [1, 0, 1, 1],
            "nonzero": [False, True, True],
            "nonzero, sparse": [False, True],
        }


def sums_over_parts(change: str) -> tuple[Any, Any]:
    """Two lists of parameters, as of two dtypes; some are sharded, one is a copy in every process, one has no gradient."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    sharded = [distribute_tensor(torch.ones(4), mesh, [Shard(0)]) for _ in range(4)]
    copied, plain = distribute_tensor(torch.ones(4), mesh, [Replicate()]), torch.ones(4)
    given = [[plain, sharded[2], copied], [sharded[0]] + [sharded[1]] * (change == "gradient" and rank == 1)]
    sums = [torch.tensor([1.0, 2.0, 3.0]).double() * (1 + rank), torch.tensor([5.0, 7.0]).double()[: len(given[1])]]
    kept = [x.clone() for x in sums]
    iterations: Any = 3 + (change == "iterations") * rank
    if change == "in a Tensor":
        iterations = torch.tensor(3)
    everything = [*sharded, copied, plain]
    try:
        result = dtensor.sum_over_parts(given, sums, everything, iterations)
    except RuntimeError as error:
        return str(error), all(map(torch.equal, sums, kept))
    return [x.tolist() for x in result], all(map(torch.equal, sums, kept))


@pytest.mark.parametrize("change", ["nothing", "in a Tensor", "gradient", "iterations"])
def test_sums_of_squares_over_parts(two: Processes, change: str) -> None:
    for rank, (result, is_unchanged) in enumerate(two.run(sums_over_parts, change)):
        assert is_unchanged
        if change == "gradient":
            assert result.startswith("sharded parameter 1 has a gradient in 1 of the 2 processes that share it.")
        elif change == "iterations":
            assert result.startswith(
                "the 2 processes that share parameters disagree on iterations, which are 3.5 on average"
            )
        else:
            assert result == [[1.0 * (1 + rank), 6.0, 3.0 * (1 + rank)], [10.0]]
