"""`all_reduce_sum`, in processes that talk to each other through gloo."""

import copy
import doctest
import functools
import operator
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import expecttest
import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import LAYOUTS, assert_same_bits, bits, dtype_name, gradients, randn, to_numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import Processes
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from torch_adadelta import distributed
from torch_adadelta.distributed import AllReduceSum, all_reduce_sum

pytestmark = pytest.mark.xdist_group("processes")

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


class Calls(TorchDispatchMode):
    """Records how many elements each all_reduce is given, and the largest buffer that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numels: list[int] = []
        self.largest_buffer = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d.allreduce_.default:
            self.numels += [tensor.numel() for tensor in args[0]]
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format:
            self.largest_buffer = max(self.largest_buffer, result.numel())
        return result


def summed(grads: list[Tensor], aggregator: AllReduceSum = all_reduce_sum) -> list[Tensor]:
    """The sums, once the parameters that came back with them have been compared."""
    params = [Parameter(torch.zeros(())) for _ in grads]
    returned = aggregator(list(zip(grads, params, strict=True)))
    assert isinstance(returned, list)
    assert all(type(pair) is tuple for pair in returned)
    assert all(pair[1] is param for pair, param in zip(returned, params, strict=True))
    return [grad for grad, _ in returned]


def integers(shape: tuple[int, ...], dtype: torch.dtype, rank: int, seed: int = 0) -> Tensor:
    """Numbers whose sums are exact in every dtype and order."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    values = torch.randint(-100, 100, (*shape, 2), generator=generator).double()
    return (torch.view_as_complex(values) if dtype.is_complex else values[..., 0]).to(dtype)


def expected_sum(make: Callable[[int], Tensor], world_size: int) -> Tensor:
    return functools.reduce(operator.add, map(make, range(world_size)))


def error_of(function: Callable[[], Any]) -> tuple[str, str]:
    try:
        function()
    except (RuntimeError, TypeError, ValueError) as error:
        return type(error).__name__, str(error)
    return "", "nothing was raised"


# ---- Sums -----------------------------------------------------------------------------------------------------------

SHAPES = ((3, 4), (), (0,), (5,), (2, 0, 3), (1, 1), (1000,))


def sums_of_integers(dtypes: tuple[torch.dtype, ...], bucket_bytes: int) -> list[Tensor]:
    grads = [integers(shape, dtype, dist.get_rank()) for dtype in dtypes for shape in SHAPES]
    return summed(grads, AllReduceSum(bucket_bytes=bucket_bytes))


@pytest.mark.parametrize("bucket_bytes", [1, 64, 2**20])
@pytest.mark.parametrize(
    "dtypes", [*((dtype,) for dtype in DTYPES), DTYPES], ids=lambda d: "-".join(map(dtype_name, d))
)
def test_sums_are_exact(processes: Processes, dtypes: tuple[torch.dtype, ...], bucket_bytes: int) -> None:
    expected = [
        expected_sum(functools.partial(integers, shape, dtype), processes.world_size)
        for dtype in dtypes
        for shape in SHAPES
    ]
    for sums in processes.run(sums_of_integers, dtypes, bucket_bytes):
        assert len(sums) == len(expected)
        for actual, wanted in zip(sums, expected, strict=True):
            assert_same_bits(actual, wanted)


def sums_of_all_scales(dtype: torch.dtype) -> Tensor:
    return summed(gradients((5000,), dtype, steps=1, seed=dist.get_rank()))[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_every_process_gets_the_same_bits(processes: Processes, dtype: torch.dtype) -> None:
    """Also where the order of summation matters, as it does with three processes: one order serves for all of them."""
    sums = processes.run(sums_of_all_scales, dtype)
    for other in sums[1:]:
        assert_same_bits(other, sums[0])
    shards = [to_numpy(gradients((5000,), dtype, steps=1, seed=rank)[0]) for rank in range(processes.world_size)]
    if processes.world_size == 2:
        orders = [shards[0] + shards[1]]
    else:
        a, b, c = shards
        orders = [(a + b) + c, (b + c) + a, (c + a) + b]
        assert not np.array_equal(bits(orders[0]), bits(orders[1]))
    is_one = np.any([bits(to_numpy(sums[0])) == bits(order) for order in orders], axis=0)
    assert is_one.all()


LAYOUT_NAMES = (*LAYOUTS, "expanded", "conjugated", "negated", "misaligned_complex")


def laid_out(name: str, rank: int) -> Tensor:
    if name in LAYOUTS:
        return LAYOUTS[name](integers((2, 3, 1, 5), torch.float32, rank))
    if name == "expanded":
        return integers((3, 1), torch.float32, rank).expand(3, 4)
    if name == "conjugated":
        return integers((3, 4), torch.complex64, rank).conj()
    if name == "negated":
        return integers((3, 4), torch.complex64, rank).conj().imag
    return LAYOUTS["misaligned"](integers((3, 4), torch.complex128, rank))


def sums_of_layouts(bucket_bytes: int) -> list[tuple[Tensor, bool, bool]]:
    rank = dist.get_rank()
    grads = [laid_out(name, rank) for name in LAYOUT_NAMES]
    # The processes need not agree on the layout of a gradient.
    grads += [laid_out(list(LAYOUTS)[(i + rank) % len(LAYOUTS)], rank) for i in range(len(LAYOUTS))]
    sums = summed(grads, AllReduceSum(bucket_bytes=bucket_bytes))
    return [
        (actual.resolve_conj().resolve_neg(), actual is grad, actual.stride() == grad.stride())
        for actual, grad in zip(sums, grads, strict=True)
    ]


@pytest.mark.parametrize("bucket_bytes", [1, 2**20])
def test_layouts(processes: Processes, bucket_bytes: int) -> None:
    names = (*LAYOUT_NAMES, *LAYOUTS)
    for results in processes.run(sums_of_layouts, bucket_bytes):
        for name, (actual, is_in_place, has_same_strides) in zip(names, results, strict=True):
            wanted = expected_sum(functools.partial(laid_out, name), processes.world_size)
            assert_same_bits(actual, wanted, name)
            assert is_in_place is (name not in ("expanded", "conjugated", "negated")), name
            assert has_same_strides is (name not in ("expanded", "negated")), name


def sum_of_one_tensor_listed_twice(bucket_bytes: int) -> list[Tensor]:
    grad = integers((3, 4), torch.float32, dist.get_rank())
    return summed([grad, grad.clone(), grad], AllReduceSum(bucket_bytes=bucket_bytes))


@pytest.mark.parametrize("bucket_bytes", [1, 2**20])
def test_a_tensor_listed_twice_is_summed_once(two: Processes, bucket_bytes: int) -> None:
    wanted = expected_sum(functools.partial(integers, (3, 4), torch.float32), 2)
    for sums in two.run(sum_of_one_tensor_listed_twice, bucket_bytes):
        for actual in sums:
            assert_same_bits(actual, wanted)


def sums_of_drawn(drawn: list[tuple[tuple[int, ...], torch.dtype]], bucket_bytes: int) -> list[Tensor]:
    grads = [integers(shape, dtype, dist.get_rank(), seed) for seed, (shape, dtype) in enumerate(drawn)]
    return summed(grads, AllReduceSum(bucket_bytes=bucket_bytes))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    drawn=st.lists(st.tuples(st.lists(st.integers(0, 6), max_size=3).map(tuple), st.sampled_from(DTYPES)), max_size=12),
    bucket_bytes=st.integers(1, 2000),
)
def test_any_list_and_bucket(
    two: Processes, drawn: list[tuple[tuple[int, ...], torch.dtype]], bucket_bytes: int
) -> None:
    for sums in two.run(sums_of_drawn, drawn, bucket_bytes):
        assert len(sums) == len(drawn)
        for seed, (actual, (shape, dtype)) in enumerate(zip(sums, drawn, strict=True)):
            wanted = expected_sum(functools.partial(integers, shape, dtype, seed=seed), 2)
            assert_same_bits(actual, wanted, str((shape, dtype)))


# ---- Calls of the backend -------------------------------------------------------------------------------------------


def many_small_and_one_large(aggregator: AllReduceSum) -> tuple[list[Tensor], list[int], int, bool]:
    grads = [integers((1000,), torch.float32, dist.get_rank(), seed) for seed in range(300)]
    grads.insert(200, integers((500, 400), torch.float32, dist.get_rank(), seed=300))
    address = grads[200].data_ptr()
    with Calls() as calls:
        sums = summed(grads, aggregator)
    return sums, calls.numels, calls.largest_buffer, sums[200].data_ptr() == address


@pytest.mark.parametrize("check", [True, False])
def test_few_calls_and_no_copy_of_a_large_gradient(processes: Processes, check: bool) -> None:
    n = processes.world_size
    results = processes.run(many_small_and_one_large, AllReduceSum(bucket_bytes=500_000, check=check))
    for sums, numels, largest_buffer, is_in_place in results:
        assert numels == [4 * n] * check + [125_000, 125_000, 200_000, 50_000]
        assert largest_buffer == 125_000
        assert is_in_place
        small = [seed for seed in range(301) if seed != 300]
        for seed, actual in zip([*small[:200], 300, *small[200:]], sums, strict=True):
            make = functools.partial(integers, actual.shape, torch.float32, seed=seed)
            assert_same_bits(actual, expected_sum(make, n))


def calls_with_defaults(dtypes: tuple[torch.dtype, ...]) -> list[int]:
    with Calls() as calls:
        summed([torch.ones(10, dtype=dtype) for dtype in dtypes for _ in range(100)])
    return calls.numels


def test_a_model_of_ordinary_size_is_one_call_beside_the_check(two: Processes) -> None:
    assert two.run(calls_with_defaults, (torch.float32,)) == [[8, 1000]] * 2
    # Complex numbers travel as pairs of reals.
    assert two.run(calls_with_defaults, (torch.float64, torch.complex64)) == [[8, 1000, 2000]] * 2
    assert two.run(calls_with_defaults, ()) == [[8]] * 2


def alone() -> tuple[list[bool], list[int], str]:
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    aggregator = AllReduceSum(groups[dist.get_rank()])
    grads = [torch.ones(3), torch.ones(2, dtype=torch.complex128).conj(), torch.ones(1).expand(4)]
    with Calls() as calls:
        sums = summed(grads, aggregator)
    error = error_of(lambda: summed([torch.eye(3).to_sparse_csr()], aggregator))
    return [actual is grad for actual, grad in zip(sums, grads, strict=True)], calls.numels, error[1]


def test_one_process_gets_its_gradients_back(two: Processes) -> None:
    for are_same, numels, error in two.run(alone):
        assert are_same == [True, True, True]
        assert numels == []
        assert "gradient 0 has layout torch.sparse_csr" in error


# ---- Sparse gradients -----------------------------------------------------------------------------------------------

SPARSE: list[tuple[tuple[int, ...], int, torch.dtype]] = [
    ((7, 3), 1, torch.float32),
    ((7, 3), 1, torch.bfloat16),
    ((4, 5), 2, torch.float16),
    ((3, 2, 2), 2, torch.complex64),
    ((3,), 0, torch.float64),
    ((9, 0), 1, torch.float32),
    ((5,), 1, torch.float32),
]


def sparse_gradient(shape: tuple[int, ...], dims: int, dtype: torch.dtype, rank: int) -> Tensor:
    """Process 1 has no entry of some, and the others have different numbers of them."""
    count = 0 if rank == 1 and len(shape) < 3 else 3 + 2 * rank
    generator = torch.Generator().manual_seed(10 * rank)
    indices = torch.stack([torch.randint(n, (count,), generator=generator) for n in shape[:dims]]) if dims else None
    indices = torch.zeros(0, count, dtype=torch.int64) if indices is None else indices
    values = randn((count, *shape[dims:]), dtype, generator)
    return torch.sparse_coo_tensor(indices, values, shape, check_invariants=True, is_coalesced=False)


def sums_of_sparse(check: bool, with_dense: bool) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor], bool]:
    rank = dist.get_rank()
    grads = [sparse_gradient(*kind, rank) for kind in SPARSE]
    kept = [(grad._indices().clone(), grad._values().clone()) for grad in grads]
    dense = [integers((6,), torch.float32, rank, seed) for seed in range(2 if with_dense else 0)]
    sums = summed([*dense[:1], *grads, grads[0], *dense[1:]], AllReduceSum(check=check))
    first = len(dense[:1])
    assert sums[first] is sums[first + len(grads)]
    assert not any(grad.is_coalesced() for grad in sums if grad.is_sparse)
    is_kept = all(
        torch.equal(grad._indices(), indices) and torch.equal(grad._values(), values)
        for grad, (indices, values) in zip(grads, kept, strict=True)
    )
    entries = [(grad._indices(), grad._values()) for grad in sums if grad.is_sparse]
    return entries[:-1], [grad for grad in sums if not grad.is_sparse], is_kept


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("with_dense", [True, False])
def test_sparse_gradients_hold_the_entries_of_all_processes(
    processes: Processes, check: bool, with_dense: bool
) -> None:
    world = range(processes.world_size)
    for sums, dense, is_kept in processes.run(sums_of_sparse, check, with_dense):
        assert is_kept
        for kind, (indices, values) in zip(SPARSE, sums, strict=True):
            grads = [sparse_gradient(*kind, rank) for rank in world]
            assert torch.equal(indices, torch.cat([grad._indices() for grad in grads], dim=1))
            assert_same_bits(values, torch.cat([grad._values() for grad in grads]))
        for seed, total in enumerate(dense):
            assert_same_bits(total, sum(integers((6,), torch.float32, rank, seed) for rank in world))  # type: ignore[arg-type]


def sum_of_nothing() -> list[int]:
    with Calls() as calls:
        (grad,) = summed([torch.sparse_coo_tensor(torch.zeros(1, 0), torch.zeros(0, 3), (5, 3), check_invariants=True)])
    return [grad._nnz(), *calls.numels]


def test_sparse_gradients_without_an_entry(two: Processes) -> None:
    assert two.run(sum_of_nothing) == [[0, 8, 2]] * 2


def disagree_on_the_layout(kind: str) -> tuple[str, str]:
    grad = sparse_gradient((7, 3), 1, torch.float32, 0)
    if dist.get_rank() == 1:
        grad = grad.to_dense() if kind == "dense" else grad.to_dense().to_sparse(2)
    return error_of(lambda: summed([grad]))


@pytest.mark.parametrize("kind", ["dense", "dimensions"])
def test_processes_that_disagree_on_the_layout_are_refused(two: Processes, kind: str) -> None:
    for error, message in two.run(disagree_on_the_layout, kind):
        assert error == "RuntimeError"
        assert "the processes have different lists of gradients" in message


# ---- Groups ---------------------------------------------------------------------------------------------------------


def in_a_sub_group() -> tuple[Any, Any, Any]:
    rank = dist.get_rank()
    group = dist.new_group([0, 2])
    aggregator = AllReduceSum(group)
    if rank == 1:
        return error_of(lambda: summed([torch.ones(1)], aggregator)), None, None
    error = error_of(lambda: summed([torch.ones(1 + rank)], aggregator))
    assert copy.deepcopy(aggregator).group is group
    assert error_of(lambda: pickle.dumps(aggregator))[0] == "TypeError"
    return summed([integers((7,), torch.float32, rank)], aggregator)[0], error, None


def test_a_sub_group(three: Processes) -> None:
    outside = three.run(in_a_sub_group)
    assert outside[1][0] == (
        "RuntimeError",
        "all_reduce_sum: process 1 is not in the group; only its members can sum over it",
    )
    wanted = integers((7,), torch.float32, 0) + integers((7,), torch.float32, 2)
    for rank in (0, 2):
        assert_same_bits(outside[rank][0], wanted)
        assert "(process 0: 1 with 1 elements; process 2: 1 with 3 elements)" in outside[rank][1][1]


def test_without_a_process_group() -> None:
    assert not dist.is_initialized()
    kind, message = error_of(lambda: all_reduce_sum([]))
    assert kind == "RuntimeError"
    expecttest.assert_expected_inline(
        message,
        """all_reduce_sum: torch.distributed is not initialized. Call torch.distributed.init_process_group first, or leave gradient_aggregator out: one process has nothing to sum""",
    )


# ---- Processes that disagree ----------------------------------------------------------------------------------------

COMMON = ((3, 4), (5,), (2, 2))


def disagreeing(kind: str) -> tuple[list[Tensor], AllReduceSum]:
    """What the last process passes where the others pass float32 gradients of the shapes COMMON."""
    shapes, dtypes, aggregator = list(COMMON), [torch.float32] * 4, all_reduce_sum
    if kind == "missing":
        del shapes[1]
    elif kind == "none at all":
        shapes = []
    elif kind == "one more":
        shapes.append((1,))
    elif kind == "one more, empty":
        shapes.append((0,))
    elif kind == "shape":
        shapes[0] = (4, 3)
    elif kind == "order":
        shapes.reverse()
    elif kind == "dtype":
        dtypes[2] = torch.float64
    elif kind == "buckets":
        aggregator = AllReduceSum(bucket_bytes=1)
    return [torch.ones(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=False)], aggregator


def disagree(kind: str) -> tuple[tuple[str, str], bool, Tensor]:
    is_last = dist.get_rank() == dist.get_world_size() - 1
    grads, aggregator = disagreeing(kind if is_last else "")
    before = [grad.clone() for grad in grads]
    error = error_of(lambda: summed(grads, aggregator))
    is_unchanged = all(map(torch.equal, grads, before))
    return error, is_unchanged, summed([torch.ones(3)])[0]


@pytest.mark.parametrize(
    "kind", ["missing", "none at all", "one more", "one more, empty", "shape", "order", "dtype", "buckets"]
)
def test_different_lists_are_refused_everywhere(processes: Processes, kind: str) -> None:
    n = processes.world_size
    for (error, message), is_unchanged, later in processes.run(disagree, kind):
        assert error == "RuntimeError"
        assert "the processes have different lists of gradients" in message
        assert f"{'processes 0, 1' if n == 3 else 'process 0'}: 3 with 21 elements; process {n - 1}: " in message
        assert is_unchanged
        assert later.tolist() == [n] * 3  # nothing is left over that could be mixed up with what follows


def test_message_for_different_lists(three: Processes) -> None:
    expecttest.assert_expected_inline(
        three.run(disagree, "missing")[0][0][1],
        """all_reduce_sum: the processes have different lists of gradients (processes 0, 1: 3 with 21 elements; process 2: 2 with 16 elements). All need the same shapes, dtypes, layouts and kinds of devices in the same order, and the same bucket_bytes. A parameter that a process did not use has no gradient there: give it one of zeros (param.grad = torch.zeros_like(param)), or leave gradient_aggregator out and let DistributedDataParallel(model, find_unused_parameters=True) reduce""",
    )


class Subclass(torch.Tensor):
    pass


def refused(kind: str) -> Any:
    return {
        "compressed": lambda: torch.eye(2).to_sparse_csr(),
        "requires_grad": lambda: torch.ones(2, 2, requires_grad=True),
        "none": lambda: None,
        "array": lambda: np.ones((2, 2)),
        "subclass": lambda: torch.ones(2, 2).as_subclass(Subclass),
        "meta": lambda: torch.ones(2, 2, device="meta"),
    }[kind]()


def refuse(kind: str) -> tuple[tuple[str, str], Tensor]:
    grads = [torch.ones(3), refused(kind) if dist.get_rank() == 1 else torch.ones(2, 2)]
    return error_of(lambda: summed(grads)), summed([torch.ones(3)])[0]


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("compressed", "RuntimeError", ("layout torch.sparse_csr", ".to_sparse_coo()")),
        ("requires_grad", "RuntimeError", ("requires grad", ".detach()")),
        ("none", "TypeError", ("is None of type NoneType",)),
        ("array", "TypeError", ("ndarray",)),
        ("subclass", "TypeError", ("is a Subclass",)),
        ("meta", "RuntimeError", ("is on meta", "cpu:gloo")),
    ],
)
def test_what_one_process_refuses_is_refused_everywhere(
    processes: Processes, kind: str, error: str, words: tuple[str, ...]
) -> None:
    for rank, (raised, later) in enumerate(processes.run(refuse, kind)):
        if rank == 1:
            assert raised[0] == error
            assert all(word in raised[1] for word in ("all_reduce_sum: gradient 1 ", *words)), raised[1]
        else:
            assert raised == (
                "RuntimeError",
                "all_reduce_sum: process 1 refused a gradient; the error there says why",
            )
        assert later.tolist() == [processes.world_size] * 3


def under_no_grad(bucket_bytes: int) -> list[Tensor]:
    grads = [torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True).expand(2), torch.ones(2)]
    with torch.no_grad():
        return [grad.detach() for grad in summed(grads, AllReduceSum(bucket_bytes=bucket_bytes))]


@pytest.mark.parametrize("bucket_bytes", [1, 2**20])
def test_a_gradient_that_requires_grad_is_summed_where_autograd_is_off(two: Processes, bucket_bytes: int) -> None:
    for results in two.run(under_no_grad, bucket_bytes):
        assert [result.tolist() for result in results] == [[2, 2]] * 3


# It ends without Python's own end: gloo's threads may let go of the last tensors meanwhile, which aborts the process.
SCRIPT = """
import os, sys, torch, traceback
from torch_adadelta.distributed import all_reduce_sum
rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
try:
    all_reduce_sum([(torch.ones(2 + rank), None)])
    print("went on")
except RuntimeError:
    traceback.print_exc()
    os._exit(1)
"""


@pytest.mark.slow
def test_scripts_that_disagree_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    command = [sys.executable, "-c", SCRIPT]
    scripts = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        for script in scripts:
            out, err = script.communicate(timeout=120)
            assert script.returncode == 1
            assert out == b""
            assert b"process 0: 1 with 2 elements; process 1: 1 with 3 elements" in err
    finally:
        for script in scripts:
            script.kill()


# ---- The object -----------------------------------------------------------------------------------------------------


def test_copies() -> None:
    other = AllReduceSum(bucket_bytes=1000, check=False)
    for aggregator in (all_reduce_sum, other):
        assert pickle.loads(pickle.dumps(aggregator)) == aggregator
        assert copy.deepcopy(aggregator) is aggregator
    assert all_reduce_sum == AllReduceSum(None)
    assert all_reduce_sum != other


def test_invalid_bucket_bytes() -> None:
    for value, error in ((0, "ValueError"), (-5, "ValueError"), (2.5e7, "TypeError"), (True, "TypeError")):
        kind, message = error_of(lambda value=value: AllReduceSum(bucket_bytes=value))
        assert kind == error
        assert message.startswith("bucket_bytes must be ")
        assert message.endswith(f"got {value}")


def test_docstring_example() -> None:
    results = doctest.testmod(distributed, extraglobs={"torch": torch})
    assert results.attempted > 0
    assert results.failed == 0
