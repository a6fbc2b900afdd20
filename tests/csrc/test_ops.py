"""The compiled ops by themselves: schemas, tracing, their checks at the door, and what the library depends on."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import direct
import pytest
import torch
from cases import COMPLEX_DTYPES, DTYPES, LAYOUTS, REAL_DTYPES, assert_same_bits, dtype_name, randn, segment
from torch import Tensor

from torch_adadelta.backends import kernels
from torch_adadelta.step import validation

pytestmark = pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")

Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def lists(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Lists:
    generator = torch.Generator().manual_seed(0)
    made = [[LAYOUTS[layout](randn(shape, dtype, generator)) for shape in shapes] for _ in range(4)]
    return made[0], made[1], [x * x.conj() for x in made[2]], [x * x.conj() for x in made[3]]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES[:-1], ids=dtype_name)
def test_opcheck(dtype: torch.dtype, layout: str) -> None:
    arguments = lists((2, 3, 4, 5), (1, 1, 1, 7), (0, 1, 1, 1), dtype=dtype, layout=layout)
    op = torch.ops.torch_adadelta.adadelta_.default
    for check_only in (False, True):
        torch.library.opcheck(op, (*arguments, *segment(3, 1.0, 0.9, 1e-7)), {"check_only": check_only})


@pytest.mark.parametrize("tensor_dtype", REAL_DTYPES, ids=dtype_name)
def test_opcheck_with_tensor_hyperparameters(tensor_dtype: torch.dtype) -> None:
    values = [torch.tensor(value, dtype=tensor_dtype) for value in (0.5, 0.875, 0.0625)]
    torch.library.opcheck(torch.ops.torch_adadelta.adadelta_.default, (*lists((5,)), *segment(1, *values, True)))


@pytest.mark.parametrize("tensor_dtype", REAL_DTYPES, ids=dtype_name)
def test_a_tensor_replaces_the_number(tensor_dtype: torch.dtype) -> None:
    values = (0.5, 0.875, 0.0625)  # exact in every dtype
    by_number, by_tensor = lists((70,)), lists((70,))
    direct.fused(*by_number, *values, False)
    direct.fused(*by_tensor, *(torch.tensor([value], dtype=tensor_dtype) for value in values), False)
    for one, other in zip(by_number, by_tensor, strict=True):
        assert_same_bits(one[0], other[0])


def test_compiled_call_has_no_graph_break() -> None:
    eager, compiled = lists((5,), (3, 4)), lists((5,), (3, 4))
    hyperparameters = segment(2, 1.0, 0.9, 1e-7)
    torch.ops.torch_adadelta.adadelta_(*eager, *hyperparameters)
    torch.compile(torch.ops.torch_adadelta.adadelta_, backend="eager", fullgraph=True)(*compiled, *hyperparameters)
    for one, other in zip(eager, compiled, strict=True):
        for x, y in zip(one, other, strict=True):
            assert_same_bits(x, y)


def _shorter(made: Lists) -> None:
    made[2].pop()


def _shape(made: Lists) -> None:
    made[1][-1] = torch.ones(4, 3)


def _dims(made: Lists) -> None:
    made[1][-1] = torch.ones(12)


def _state_dtype(made: Lists) -> None:
    made[3][-1] = made[3][-1].double()


def _integers(made: Lists) -> None:
    made[1][-1] = made[1][-1].long()


def _complex(made: Lists) -> None:
    made[1][-1] = made[1][-1].to(torch.complex64)


def _meta(made: Lists) -> None:
    made[2][-1] = made[2][-1].to("meta")


def _expanded_param(made: Lists) -> None:
    made[0][-1] = torch.ones(1).expand(3, 4)


def _expanded_state(made: Lists) -> None:
    made[2][-1] = torch.ones(3, 1).expand(3, 4)


def _overlapping_windows(made: Lists) -> None:
    made[0][-1] = torch.ones(6).unfold(0, 4, 1)


def _state_is_param(made: Lists) -> None:
    made[3][-1] = made[0][-1]


def _state_is_grad(made: Lists) -> None:
    made[1][-1] = made[2][-1]


def _acc_delta_is_grad(made: Lists) -> None:
    made[1][-1] = made[3][-1]


def _one_state_twice(made: Lists) -> None:
    made[3][-1] = made[2][-1]


def _shifted_grad(made: Lists) -> None:
    base = torch.ones(13)
    made[0][-1], made[1][-1] = base[:12].view(3, 4), base[1:].view(3, 4)


def _sparse(made: Lists) -> None:
    made[1][-1] = made[1][-1].to_sparse()


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (_shorter, "the call: the lists differ in length: 3 params, 3 grads, 2 square_avgs, 3 acc_deltas"),
        (_shape, "parameter 2: its tensors differ in shape"),
        (_dims, "parameter 2: its tensors differ in shape"),
        (_state_dtype, "parameter 2: its state has another dtype than the parameter"),
        (_integers, "parameter 2: its gradient has a dtype that the kernels do not know"),
        (_complex, "parameter 2: of its tensors, some are complex and some are real"),
        (_meta, None),
        (_expanded_param, "parameter 2: it would be written to, but overlaps itself in memory"),
        (_expanded_state, "parameter 2: its square_avg would be written to, but overlaps itself in memory"),
        (_overlapping_windows, "parameter 2: it would be written to, but overlaps itself in memory"),
        (_state_is_param, "parameter 2: it and its acc_delta share memory"),
        (_state_is_grad, "parameter 2: its gradient and its square_avg share memory"),
        (_acc_delta_is_grad, "parameter 2: its gradient and its acc_delta share memory"),
        (_one_state_twice, "parameter 2: its square_avg and its acc_delta share memory"),
        (_shifted_grad, "parameter 2: its gradient shares memory with the parameter at another place"),
        (_sparse, None),
    ],
)
@pytest.mark.parametrize("check_only", [False, True])
def test_lists_that_do_not_fit_are_refused_unwritten(check_only: bool, spoil: Any, error: str | None) -> None:
    """With the prefix by which a caller knows a refusal; without, where the dispatcher finds no kernel."""
    made = lists((5,), (2, 2), (3, 4))
    spoil(made)
    before = [[x if x.is_meta or x.is_sparse else x.clone() for x in tensors] for tensors in made]
    message = {_meta: "a tensor on the meta device has no elements to update", _sparse: "adadelta_"}.get(spoil)
    with pytest.raises((RuntimeError, NotImplementedError), match=message or f"^torch_adadelta refuses {error}"):
        torch.ops.torch_adadelta.adadelta_(*made, *segment(3, 1.0, 0.9, 1e-7), check_only=check_only)
    for tensors, copies in zip(made, before, strict=True):
        for tensor, copy in zip(tensors, copies, strict=True):
            assert tensor is copy or torch.equal(tensor, copy)


@pytest.mark.parametrize(
    ("tensor", "error"),
    [
        (torch.ones(2), "^torch_adadelta refuses the call: the lr of segment 0 must be a CPU tensor of one element"),
        (torch.ones(1, dtype=torch.int64), "the lr of segment 0 must have a floating-point dtype"),
    ],
)
def test_tensor_hyperparameters_that_do_not_fit(tensor: Tensor, error: str) -> None:
    with pytest.raises(RuntimeError, match=error):
        torch.ops.torch_adadelta.adadelta_(*lists((5,)), *segment(1, tensor, 0.9, 1e-7))


def test_a_hyperparameter_on_the_meta_device_is_refused() -> None:
    with pytest.raises(RuntimeError, match="a tensor on the meta device has no elements to update"):
        torch.ops.torch_adadelta.adadelta_(*lists((5,)), *segment(1, torch.tensor(1.0, device="meta"), 0.9, 1e-7))


def test_empty_lists() -> None:
    direct.fused([], [], [], [], 1.0, 0.9, 1e-7, False)
    direct.check([], [], [], [])


def test_no_tensor_outlives_a_call() -> None:
    """Refused calls included: every handle that the op takes is given back."""
    for spoil in (None, _shape):
        made = lists((5,), (2, 2), (3, 4))
        if spoil:
            spoil(made)
        counts = [sys.getrefcount(x) for tensors in made for x in tensors]
        uses = [torch._C._storage_Use_Count(x.untyped_storage()._cdata) for tensors in made for x in tensors]
        for _ in range(3):
            try:
                torch.ops.torch_adadelta.adadelta_(*made, *segment(3, 1.0, 0.9, 1e-7))
            except RuntimeError:
                assert spoil
        assert [sys.getrefcount(x) for tensors in made for x in tensors] == counts
        assert [torch._C._storage_Use_Count(x.untyped_storage()._cdata) for t in made for x in t] == uses


def test_capabilities_can_be_chosen_in_process_and_by_the_environment() -> None:
    best = kernels.cpu_capability()
    assert kernels.set_cpu_capability("default") == best
    assert kernels.cpu_capability() == "default"
    assert kernels.set_cpu_capability(best) == "default"
    with pytest.raises(RuntimeError, match="this processor has the CPU capabilities 0 to"):
        torch.ops.torch_adadelta.set_cpu_capability(len(kernels.CPU_CAPABILITIES))
    with pytest.raises(ValueError):
        kernels.set_cpu_capability("SSE9")

    def started_with(capability: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from torch_adadelta.backends import kernels as k; print(k.cpu_capability())"]
        environment = {**os.environ, "TORCH_ADADELTA_CPU_CAPABILITY": capability}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)

    assert started_with("DEFAULT").stdout.strip() == "default"
    ignored = started_with("sse9")
    assert ignored.stdout.strip() == best
    assert "TORCH_ADADELTA_CPU_CAPABILITY=sse9 is ignored" in ignored.stderr


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), 2.0**127, 2.0**70, 2.0**-70, 2.0**-130, 0.0, -(2.0**-100)]
)
@pytest.mark.parametrize("count", [255, 256, 300, 1000, 1537])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_square_avg_out_of_the_range_of_fast_inverses(dtype: torch.dtype, count: int, value: float) -> None:
    """Wherever one stands, every instruction set computes the bits that the plainest does."""
    best = kernels.cpu_capability()
    for capability in range(1, kernels.CPU_CAPABILITIES.index(best) + 1):
        for place in {0, 15, 16, 40, 95, 96, 97, 130, count // 2, count - 33, count - 1}:
            plain, fast = lists((count,), dtype=dtype), lists((count,), dtype=dtype)
            for made in (plain, fast):
                made[1][0][place] = 0.0
                made[2][0][place : place + 1 + place % 3] = torch.tensor(value).to(dtype)  # to infinity, of float16
            # An epsilon that leaves small numbers as they are.
            kernels.set_cpu_capability("default")
            try:
                direct.fused(*plain, 1.0, 0.95, 1e-30, False)
                kernels.set_cpu_capability(kernels.CPU_CAPABILITIES[capability])
                direct.fused(*fast, 1.0, 0.95, 1e-30, False)
            finally:
                kernels.set_cpu_capability(best)
            for one, other in zip(plain, fast, strict=True):
                assert_same_bits(one[0], other[0])


@pytest.mark.parametrize("flushes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize(
    ("learning_rate", "rho", "epsilon"),
    [
        (1.0, 0.95, 1e-7), (0.0, 0.95, 1e-7), (3e38, 0.95, 1e-7), (-1.0, 0.95, 1e-7), (1e-40, 0.95, 1e-7),
        (1.0, 0.0, 1e-7), (1.0, 2.0**-30, 1e-7), (1.0, 2.0**-28, 1e-7), (1.0, 1.0 - 2.0**-24, 1e-7), (1.0, 1.0, 1e-7),
        (1.0, 0.95, 2.0**-130), (1.0, 0.95, 2.0**-126), (1.0, 0.95, 2.0**62), (1.0, 0.95, 2.0**126), (1.0, 0.95, 3e38),
        (float("inf"), 0.95, 1e-7), (float("nan"), 0.95, 1e-7),
    ],
)  # fmt: skip
def test_numbers_of_every_kind_in_every_place(
    learning_rate: float, rho: float, epsilon: float, dtype: torch.dtype, flushes: bool
) -> None:
    """Among groups of common numbers, every instruction set computes the bits that the plainest does of all others."""
    generator = torch.Generator().manual_seed(0)
    count = 32 * 4096
    bounds = torch.tensor([-1e-7, -epsilon, 0.0, -0.0, 2.0**-126, 2.0**-133, float("inf"), -float("inf"), float("nan")])
    powers = torch.tensor([-97, -96, -95, -64, -63, -62, -61, 62, 63, 64, 126, 127]).float().exp2()
    known = torch.cat([bounds, powers, -powers, powers * (1 + 2**-7), powers * (1 - 2**-8)])

    def normal() -> Tensor:
        return torch.randn(count, generator=generator)

    def some() -> Tensor:
        """In some groups of 32, one or some elements."""
        share = torch.tensor([0.0, 0.0, 0.02, 0.3])[torch.randint(4, (count // 32,), generator=generator)]
        return torch.rand(count, generator=generator) < share.repeat_interleave(32)

    def with_others(common: Tensor) -> Tensor:
        """Some are any bits, or a number that bounds a range somewhere."""
        bounding = known[torch.randint(known.numel(), (count,), generator=generator)]
        any_bits = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32).view(torch.float32)
        others = torch.where(torch.rand(count, generator=generator) < 0.5, bounding, any_bits)
        return torch.where(some(), others, common).to(dtype)

    def updated(capability: str, *tensors: Tensor) -> list[Tensor]:
        """The states after one step and after two, as the second would hide some of what the first makes of nan."""
        ends = (count, 200, 70, 33)
        param, grad, square_avg, acc_delta = [[tensor[:end].clone() for end in ends] for tensor in tensors]
        kernels.set_cpu_capability(capability)
        torch.set_flush_denormal(flushes)
        after = []
        try:
            for _ in range(2):
                hyperparameters = segment(len(ends), learning_rate, rho, epsilon)
                torch.ops.torch_adadelta.adadelta_(param, grad, square_avg, acc_delta, *hyperparameters)
                after += [torch.cat(states) for states in (param, square_avg, acc_delta)]
        finally:
            torch.set_flush_denormal(False)
        return after

    best = kernels.cpu_capability()
    try:
        made = [with_others(normal() * 0.01**power) for power in (0, 1)]
        made += [with_others(normal() ** 2 * 0.01**power) for power in (2, 3)]
        # Some that the step all but cancels.
        zero = torch.zeros(count, dtype=dtype)
        step, squares, _ = (after[:count] for after in updated("default", zero, made[1], zero, made[3])[:3])
        made[0] = torch.where(some(), -step, made[0])
        made[2] = torch.where(some(), (-squares / rho).to(dtype), made[2]) if rho else made[2]
        names = kernels.CPU_CAPABILITIES[: kernels.CPU_CAPABILITIES.index(best) + 1]
        results = [updated(name, *made) for name in names]
    finally:
        kernels.set_cpu_capability(best)
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            assert_same_bits(one, other)
            if dtype == torch.bfloat16:  # every nan is the same one
                assert torch.equal(one.view(torch.int16), other.view(torch.int16))


@pytest.mark.parametrize("flushes", [False, True])
@pytest.mark.parametrize("rho", [0.95, 0.5, 0.0, 1.0, 1.25, -0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_subnormal_averages(dtype: torch.dtype, rho: float, flushes: bool) -> None:
    """They come and go along a tensor; every instruction set computes the bits that the plainest does."""
    generator = torch.Generator().manual_seed(1)
    count = 30_000

    def stretches(*values: Tensor) -> Tensor:
        """Now these, now those, for a while each."""
        lengths = torch.tensor([7, 1500, 90, 3000, 1024, 400, 32, 2048])
        kinds = torch.randint(len(values), (64,), generator=generator).repeat_interleave(lengths.repeat(8))
        return torch.stack(values).gather(0, kinds[None, :count])[0]

    normal = torch.rand(count, generator=generator)
    subnormal = torch.randint(1, 2**23, (count,), generator=generator, dtype=torch.int32).view(torch.float32)
    mixed = torch.where(normal > 0.5, normal, subnormal)
    zero = torch.zeros(count)
    grad = stretches(zero, zero, zero, normal - 0.5, subnormal)
    states = [stretches(normal, subnormal, zero, -subnormal, mixed, 1e-37 * normal) for _ in range(2)]

    def updated(capability: str) -> list[Tensor]:
        param, *others = [[tensor.to(dtype, copy=True)] for tensor in (normal, grad, *states)]
        kernels.set_cpu_capability(capability)
        torch.set_flush_denormal(flushes)
        try:
            for _ in range(3):
                direct.fused(param, *others, 1.0, rho, 1e-7, False)
        finally:
            torch.set_flush_denormal(False)
        return [param[0], others[1][0], others[2][0]]

    best = kernels.cpu_capability()
    try:
        results = [
            updated(capability) for capability in kernels.CPU_CAPABILITIES[: kernels.CPU_CAPABILITIES.index(best) + 1]
        ]
    finally:
        kernels.set_cpu_capability(best)
    are_subnormal = (results[0][1] != 0) & (results[0][1].abs() < torch.finfo(torch.float32).tiny)
    assert bool(are_subnormal.any()) == (rho != 0 and not flushes)
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_flushing_of_subnormals_is_that_of_the_calling_thread(dtype: torch.dtype) -> None:
    """`torch.set_flush_denormal` changes the thread that calls it; the other threads must calculate like it."""
    before = torch.get_num_threads()
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor cannot flush subnormal numbers")
    count = 2_000_000  # so that a second thread has time to wake up
    tiny = torch.full((count,), torch.finfo(dtype).tiny / 8, dtype=torch.float64).to(dtype)
    indices = torch.arange(count)[None]
    roots = [torch.full((count,), torch.finfo(dtype).tiny, dtype=torch.float64).sqrt().to(dtype) / 4]

    def results(*, flushes: bool, threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        tensors = [tiny.clone() for _ in range(6)]
        dense, sparse = [[tensor] for tensor in tensors[:3]], [[tensor] for tensor in tensors[3:]]
        torch.set_flush_denormal(flushes)
        try:
            direct.fused(dense[0], [tiny], dense[1], dense[2], 1.0, 0.95, 1e-7, False)
            direct.sparse_op(sparse[0], [indices], [tiny], sparse[1], sparse[2], 1.0, 0.95, 1e-7)
            sums = direct.square_sums(roots, roots)
        finally:
            torch.set_flush_denormal(False)
        return [*tensors, sums]

    try:
        torch.set_num_threads(2)
        torch.zeros(count).add_(1.0)  # so that the threads were there before
        kept = results(flushes=False, threads=1)
        flushed = results(flushes=True, threads=1)
        in_two = results(flushes=True, threads=2)
    finally:
        torch.set_num_threads(before)
    if dtype is not torch.float16:  # which has no subnormal numbers in float32
        assert not torch.equal(kept[1], flushed[1])
        assert not torch.equal(kept[-1], flushed[-1])
    for one, other in zip(in_two, flushed, strict=True):
        assert_same_bits(one, other)


def test_more_elements_than_an_int32_counts() -> None:
    """2**31 + 3 of them, in one 16-bit parameter; the last ones as in a short one."""
    available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    if available is None or int(available[1]) < 18 * 2**20:
        pytest.skip("needs 18 GB of available memory")
    count = 2**31 + 3
    long = [[torch.full((count,), value, dtype=torch.bfloat16)] for value in (1.0, 0.5, 0.25, 0.125)]
    short = [[tensors[0][-7:].clone()] for tensors in long]
    direct.fused(*long, 1.0, 0.9375, 1e-7, False)
    direct.fused(*short, 1.0, 0.9375, 1e-7, False)
    for one, other in zip(long, short, strict=True):
        assert_same_bits(one[0][-7:], other[0])
        assert_same_bits(one[0][:7], other[0])


def test_library_needs_no_python_symbol_and_only_the_stable_abi() -> None:
    """Nothing of libtorch_python, of Python, or of the C++ classes of LibTorch, which change from release to release."""
    symbols = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", "--demangle", str(kernels.LIBRARY_PATH)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    names = [line.split(maxsplit=1)[1] for line in symbols if line]
    assert names
    for name in names:
        assert not name.startswith(("U Py", "U _Py")), name
        assert not any(space in name for space in ("at::", "c10::", "torch::", "pybind11")), name


def test_complex_dtypes_are_covered() -> None:
    assert set(DTYPES) == set(REAL_DTYPES) | set(COMPLEX_DTYPES) == validation.DTYPES
