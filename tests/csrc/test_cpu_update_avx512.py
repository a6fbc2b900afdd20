"""csrc/cpu/kernels/update_avx512.h, and whatever else an instruction set does faster: the bits of the plainest loops."""

from collections.abc import Callable

import direct
import pytest
import torch
from cases import assert_same_bits, dtype_name, segment
from op_cases import capabilities, dense, dense_lists, needs_library, ways
from torch import Tensor

from torch_adadelta.backends import kernels

pytestmark = needs_library


def assert_same_on_all(updated: Callable[[], list[Tensor]], flushes: bool = False) -> list[Tensor]:
    """`updated` gives the same bits, those of nans of bfloat16 included, on each instruction set."""
    results = []
    for way in ways():
        torch.set_flush_denormal(flushes)
        try:
            results.append(updated())
        finally:
            torch.set_flush_denormal(False)
        for one, other in zip(results[-1], results[0], strict=True):
            assert_same_bits(one, other, way)
            if one.dtype is torch.bfloat16:  # every nan is the same one
                assert torch.equal(one.view(torch.int16), other.view(torch.int16)), way
    return results[0]


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), 2.0**127, 2.0**70, 2.0**-70, 2.0**-130, 0.0, -(2.0**-100)]
)
@pytest.mark.parametrize("count", [255, 256, 300, 1537])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)
def test_square_avg_out_of_the_range_of_fast_inverses(dtype: torch.dtype, count: int, value: float) -> None:
    """Wherever one stands, in one call for all places."""
    places = sorted({0, 15, 16, 40, 95, 96, 97, 130, count // 2, count - 33, count - 1})

    def updated() -> list[Tensor]:
        lists = dense_lists([count] * len(places), dtype)
        for k, place in enumerate(places):
            lists[1][k][place] = 0.0
            lists[2][k] = lists[0][k].square()
            lists[2][k][place : place + 1 + place % 3] = torch.tensor(value).to(dtype)  # to infinity, of float16
            lists[3][k] = lists[0][k].square() / 4
        # An epsilon that leaves small numbers as they are.
        direct.fused(*lists, 1.0, 0.95, 1e-30, False)
        return [*lists[0], *lists[2], *lists[3]]

    assert_same_on_all(updated)


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
    """Among groups of common numbers."""
    generator = torch.Generator().manual_seed(0)
    count = 32 * 4096
    bounds = torch.tensor([-1e-7, -epsilon, 0.0, -0.0, 2.0**-126, 2.0**-133, float("inf"), -float("inf"), float("nan")])
    exponents = torch.tensor([-99, -98, -97, -96, -95, -64, -63, -62, -61, 62, 63, 64, 126, 127])
    powers = exponents.float().exp2()
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

    def updated(*tensors: Tensor) -> list[Tensor]:
        """The states after one step and after two, as the second would hide some of what the first makes of nan."""
        ends = (count, 200, 70, 33)
        param, grad, square_avg, acc_delta = [[tensor[:end].clone() for end in ends] for tensor in tensors]
        after = []
        for _ in range(2):
            hyperparameters = segment(len(ends), learning_rate, rho, epsilon)
            dense(param, grad, square_avg, acc_delta, *hyperparameters)
            after += [torch.cat(states) for states in (param, square_avg, acc_delta)]
        return after

    made = [with_others(normal() * 0.01**power) for power in (0, 1)]
    made += [with_others(normal() ** 2 * 0.01**power) for power in (2, 3)]
    # Some that the step all but cancels.
    zero = torch.zeros(count, dtype=dtype)
    best = kernels.set_cpu_capability("default")
    step, squares, _ = (after[:count] for after in updated(zero, made[1], zero, made[3])[:3])
    kernels.set_cpu_capability(best)
    made[0] = torch.where(some(), -step, made[0])
    made[2] = torch.where(some(), (-squares / rho).to(dtype), made[2]) if rho else made[2]
    assert_same_on_all(lambda: updated(*made), flushes)


@pytest.mark.parametrize("flushes", [False, True])
@pytest.mark.parametrize("rho", [0.95, 0.5, 0.0, 1.0, 1.25, -0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_denormal_averages(dtype: torch.dtype, rho: float, flushes: bool) -> None:
    """They come and go along a tensor."""
    generator = torch.Generator().manual_seed(1)
    count = 30_000

    def stretches(*values: Tensor) -> Tensor:
        """Now these, now those, for a while each."""
        lengths = torch.tensor([7, 1500, 90, 3000, 1024, 400, 32, 2048])
        kinds = torch.randint(len(values), (64,), generator=generator).repeat_interleave(lengths.repeat(8))
        return torch.stack(values).gather(0, kinds[None, :count])[0]

    normal = torch.rand(count, generator=generator)
    denormal = torch.randint(1, 2**23, (count,), generator=generator, dtype=torch.int32).view(torch.float32)
    mixed = torch.where(normal > 0.5, normal, denormal)
    zero = torch.zeros(count)
    grad = stretches(zero, zero, zero, normal - 0.5, denormal)
    states = [stretches(normal, denormal, zero, -denormal, mixed, 1e-37 * normal) for _ in range(2)]

    def updated() -> list[Tensor]:
        param, *others = [[tensor.to(dtype, copy=True)] for tensor in (normal, grad, *states)]
        for _ in range(3):
            direct.fused(param, *others, 1.0, rho, 1e-7, False)
        return [param[0], others[1][0], others[2][0]]

    square_avg = assert_same_on_all(updated, flushes)[1]
    are_denormal = (square_avg != 0) & (square_avg.abs() < torch.finfo(torch.float32).tiny)
    assert bool(are_denormal.any()) == (rho != 0 and not flushes)


@pytest.mark.parametrize(
    ("rho", "square_avg", "acc_delta"),
    [(2.0**-28, 1.0, 2.0**-60), (2.0**-27, 1.0, 2.0**-70), (0.95, 2.0**-95, 2.0**-99), (0.95, 1.0, 2.0**-99)],
)
def test_bounds_of_fast_rounding_to_bfloat16(rho: float, square_avg: float, acc_delta: float) -> None:
    """Below them the bfloat16 instructions would round to zero what is not."""

    def updated() -> list[Tensor]:
        neighbours = torch.tensor([1 - 2.0**-7, 1.0, 1 + 2.0**-7]).repeat(22)[:64]
        lists = [[torch.full((64,), x).to(torch.bfloat16)] for x in (1.0, 2.0**-50, square_avg, acc_delta)]
        for part in (2, 3):
            lists[part][0] *= neighbours.to(torch.bfloat16)
        direct.fused(*lists, 1.0, rho, 1e-30)  # type: ignore[arg-type]
        return [x[0] for x in lists]

    result = assert_same_on_all(updated)
    assert bool((result[3] != 0).all())
    assert capabilities()[0] == "default"
