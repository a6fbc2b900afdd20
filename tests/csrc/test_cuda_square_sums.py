"""csrc/cuda/square_sums.cuh, emulated: the tree of the CPU."""

import pytest
import torch
from cases import COMPLEX_DTYPES, DTYPES, LAYOUTS, REAL_DTYPES, dtype_name, gradients, order_sensitive, randn
from emulated import (
    LARGE_TABLE,
    SMALL_TABLE,
    SQUARE_OPTIONS,
    assert_same_square_sums,
    emulated,
    marks,
    virtual_zeros,
)
from op_cases import adadelta, inf, nan

pytestmark = marks

# Around the row of 128 lanes, the chunk of 4096, the unit of 65536 elements, and of several units.
SIZES = (0, 1, 3, 4, 5, 127, 128, 129, 131, 255, 511, 4095, 4096, 4097, 12289, 65535, 65536, 65537, 131_073, 0)


@pytest.mark.parametrize("name", SQUARE_OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_every_size_in_one_call(dtype: torch.dtype, name: str) -> None:
    options = {key: value for key, value in SQUARE_OPTIONS[name].items() if key != "clipvalue" or not dtype.is_complex}
    make = order_sensitive if name in ("plain", "in-double") else lambda *args: gradients(*args[:2], steps=1)[0]
    grads = [make((size,), dtype, i) for i, size in enumerate(SIZES)]
    assert assert_same_square_sums(grads, grads, **options) == 2


@pytest.mark.parametrize("seed", [0, 2, 3])
def test_any_order_of_blocks_and_threads(seed: int) -> None:
    grads = [order_sensitive((size,), torch.float32, i) for i, size in enumerate((5, 4097, 65_537, 200_000))]
    assert_same_square_sums(grads, grads, (seed,))


@pytest.mark.parametrize("units", [2, 3, 5, 6, 7, 8])
def test_units(units: int) -> None:
    for seed in range(2):
        grads = [order_sensitive((units * 65536 - 100,), torch.bfloat16, seed).float(), torch.ones(3)]
        assert assert_same_square_sums(grads, grads, (0,)) == 2


@pytest.mark.parametrize("count", [SMALL_TABLE + 1, LARGE_TABLE, LARGE_TABLE + 1])
def test_number_of_gradients_of_several_units(count: int) -> None:
    """Only their two first and last units are summed, and those of ones that are added up in two launches."""
    grads = [torch.zeros(65537)] * count
    emulated.set_edge_blocks(1)
    before = emulated.launches()
    emulated.grad_square_sums(grads, grads)
    assert emulated.launches() - before == (4 if count > LARGE_TABLE else 2)


@pytest.mark.slow
def test_more_units_than_a_block_has_threads() -> None:
    grad = torch.cat([order_sensitive((1100 * 65536 // 44,), torch.float32, seed) for seed in range(4)] * 11)[:-77]
    assert assert_same_square_sums([grad], [grad], (0,)) == 2


@pytest.mark.parametrize("dtypes", [REAL_DTYPES, COMPLEX_DTYPES], ids=["real", "complex"])
def test_gradients_of_another_dtype(dtypes: tuple[torch.dtype, ...]) -> None:
    pairs = [(dtype, grad_dtype) for dtype in dtypes for grad_dtype in dtypes]
    params = [torch.empty(4700, dtype=dtype) for dtype, _ in pairs]
    grads = [gradients((4700,), dtype, steps=1, seed=i)[0] for i, (_, dtype) in enumerate(pairs)]
    assert assert_same_square_sums(params, grads) == 1
    assert assert_same_square_sums(params, grads, in_double=True) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=dtype_name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_memory_of_the_parameter_has_the_order(layout: str, dtype: torch.dtype) -> None:
    shape = (5, 7, 1, 130)
    param = LAYOUTS[layout](randn(shape, dtype, torch.Generator().manual_seed(1)))
    grad = order_sensitive(shape, dtype, 0)
    grads = [lay_out(grad) for lay_out in (*LAYOUTS.values(), lambda x: x[:, :1, :, :1].expand(shape))]
    assert_same_square_sums([param] * len(grads), grads)
    assert_same_square_sums([param] * len(grads), grads, in_double=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_strided_gradients_of_several_units(dtype: torch.dtype) -> None:
    grads = [gradients((300, 700), dtype, steps=1)[0].t(), gradients((700, 300), dtype, steps=1)[0]]
    params = [torch.ones(700, 300, dtype=dtype), torch.ones(300, 700, dtype=dtype).t()]
    assert assert_same_square_sums(params, grads) == 3
    assert assert_same_square_sums(params, grads, grad_scale=torch.tensor(3.0), clipvalue=0.3) == 3


@pytest.mark.parametrize("clipvalue", [None, inf, 2.0, 0.0, 1e300])
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_special_values(dtype: torch.dtype, clipvalue: float | None) -> None:
    special = [inf, -inf, nan, 1e20, -1e20, 1e200, 0.0, -0.0, 1e-30, 1e-45, 2.0, -2.0]
    grads = [torch.tensor([value, 1.0, -3.0], dtype=torch.float64).to(dtype) for value in special]
    assert_same_square_sums(grads, grads, clipvalue=clipvalue)


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
def test_gradients_that_are_not_aligned(dtype: torch.dtype) -> None:
    base = order_sensitive((5000,), dtype, 0)
    grads = [base[begin:] for begin in range(9)]
    assert_same_square_sums(grads, grads)


def test_more_elements_than_a_launch_takes() -> None:
    ones = torch.ones(1).expand(2**31 * 65536)
    error = "parameter 1: it or its gradient has more elements than one launch can take"
    with pytest.raises(RuntimeError, match=f"^torch_adadelta refuses {error}"):
        emulated.grad_square_sums([torch.ones(3), ones], [torch.ones(3), ones])


def test_nothing_to_sum() -> None:
    assert assert_same_square_sums([torch.ones(0), torch.ones(2, 0)], [torch.ones(0), torch.ones(2, 0)]) == 0


@pytest.mark.parametrize(
    ("param_dtype", "dtype"),
    [(torch.bfloat16, torch.bfloat16), (torch.float64, torch.float16), (torch.complex64, torch.complex64)],
    ids=dtype_name,
)
@pytest.mark.parametrize("is_sliced", [False, True], ids=["dense", "sliced"])
def test_more_elements_than_32_bits_count(is_sliced: bool, param_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """All is zero but the first and the last units, and zeros change no sum."""
    unit = 65536
    count = 2**38 + unit + 7
    edges = [gradients((n,), dtype, steps=1, seed=n)[0] for n in (unit, unit + 7)]
    memory = virtual_zeros(2 * count if is_sliced else count, dtype)
    grad = memory[::2] if is_sliced else memory
    grad[:unit], grad[-unit - 7 :] = edges
    param = virtual_zeros(count, param_dtype)
    emulated.set_edge_blocks(2)
    actual = emulated.grad_square_sums([param], [grad])
    expected = adadelta.grad_square_sums([param[: len(edge)] for edge in edges], edges)
    assert actual.tolist() == [expected[0].item() + expected[1].item()]
