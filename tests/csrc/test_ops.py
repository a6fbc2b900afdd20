"""csrc/ops.cpp and csrc/schemas.h: what PyTorch checks of an op, tracing, leaks, and what the library depends on."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from average_cases import averages_of
from cases import (
    COMPLEX_DTYPES,
    DTYPES,
    LAYOUTS,
    REAL_DTYPES,
    assert_same_bits,
    dtype_name,
    randn,
    segment,
    segments,
)
from op_cases import (
    CALLS,
    CLIPS,
    HYPERPARAMETERS,
    Lists,
    adadelta,
    dense,
    dense_lists,
    inf,
    lists_for,
    needs_library,
    sparse_lists,
    storage_uses,
)

from torch_adadelta.backends import kernels
from torch_adadelta.step import validation

pytestmark = needs_library

SHAPES = [(2, 3, 4, 5), (1, 1, 1, 7), (0, 1, 1, 1)]


# ---- opcheck --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES[:-1], ids=dtype_name)
def test_the_update(dtype: torch.dtype, layout: str) -> None:
    lists = [[LAYOUTS[layout](x) for x in tensors] for tensors in dense_lists(SHAPES, dtype)]
    for check_only in (False, True):
        arguments = (*lists, [], [], *segment(3, 1.0, 0.9, 1e-7))
        torch.library.opcheck(adadelta.adadelta_.default, arguments, {"check_only": check_only})


@pytest.mark.parametrize("dtype", DTYPES[:-1], ids=dtype_name)
def test_the_update_with_averages(dtype: torch.dtype) -> None:
    lists = dense_lists([(2, 3), (0,), (7,)], dtype)
    averages = averages_of(lists[0])
    for momentum in (0.9, torch.tensor(0.9)):
        own = segment(3, 1.0, 0.9, 1e-7, ema_momentum=momentum, overwrites=True)
        torch.library.opcheck(adadelta.adadelta_.default, (*lists, averages, [], *own))


def test_the_schema_says_what_is_written() -> None:
    arguments = adadelta.adadelta_.default._schema.arguments
    written = [argument.name for argument in arguments if argument.is_write]
    assert written == ["params", "square_avgs", "acc_deltas", "averages", "remainders"]


@pytest.mark.parametrize("name", ["clipvalue-clipnorm", "scale-clipvalue-factor", "both-scales-clipnorm", "tensors"])
def test_the_update_with_options(name: str) -> None:
    lists = dense_lists([5, 0, 40])
    if name == "tensors":
        options: dict[str, Any] = {
            "factor_tensor": torch.tensor(0.37, dtype=torch.float64),
            "found_inf": torch.zeros(1),
        }
        values: tuple[Any, ...] = tuple(torch.tensor(x) for x in HYPERPARAMETERS)
    else:
        options, values = CLIPS[name].options(*lists[:2]), HYPERPARAMETERS
    own = segments(segment(1, *values, options.pop("maximize", False)), segment(2, *HYPERPARAMETERS))
    torch.library.opcheck(adadelta.adadelta_.default, (*lists, [], [], *own), options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=dtype_name)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clipnorm": 0.5, "square_sums": torch.ones(2, dtype=torch.float64)},
        {"lr": torch.tensor(0.5), "factor_tensor": torch.tensor(0.5), "found_inf": torch.zeros(1)},
    ],
    ids=["plain", "clipnorm", "tensors"],
)
def test_the_sparse_update(dtype: torch.dtype, options: dict[str, Any]) -> None:
    lists = sparse_lists([((9, 4), 1), ((3, 2, 5), 2)], dtype)
    options = dict(options)
    lr = options.pop("lr", 1.0)
    torch.library.opcheck(adadelta.sparse_adadelta_.default, (*lists, [], *segment(2, lr, 0.9, 1e-7)), options)
    torch.library.opcheck(adadelta.first_invalid_indices.default, (*lists, []))


@pytest.mark.parametrize("dtype", DTYPES[:-1], ids=dtype_name)
def test_the_sums_of_squares(dtype: torch.dtype) -> None:
    grads = [randn(shape, dtype, torch.Generator().manual_seed(3)) for shape in ((3, 4), (0,), (), (300,))]
    torch.library.opcheck(adadelta.grad_square_sums.default, (grads, grads))
    clipvalue = inf if dtype.is_complex else 0.5
    torch.library.opcheck(adadelta.grad_square_sums.default, (grads, grads, clipvalue, True, torch.tensor(3.0), 7.0))


def test_a_compiled_call_has_no_graph_break() -> None:
    eager, compiled = dense_lists([5, 12]), dense_lists([5, 12])
    own = segment(2, 1.0, 0.9, 1e-7)
    dense(*eager, *own)
    torch.compile(adadelta.adadelta_, backend="eager", fullgraph=True)(*compiled, [], [], *own)
    for tensors, others in zip(eager, compiled, strict=True):
        for x, y in zip(tensors, others, strict=True):
            assert_same_bits(x, y)


# ---- Leaks ----------------------------------------------------------------------------------------------------------


def _wrong_shape(lists: Lists) -> None:
    lists[-1][-1] = torch.ones(7)


def _wrong_dtype(lists: Lists) -> None:
    lists[-2][0] = lists[-2][0].double()


@pytest.mark.parametrize("spoil", [None, _wrong_shape, _wrong_dtype])
@pytest.mark.parametrize("call", [*CALLS, "sums", "indices"])
def test_no_tensor_outlives_a_call(call: str, spoil: Any) -> None:
    """Refused calls included: every handle that an op takes is given back, of the options and hyperparameters, too."""
    lists = lists_for("sparse" if call == "indices" else call)
    if spoil is not None:
        spoil(lists)
    one = [torch.ones(1) for _ in range(6)]
    sums = torch.ones(3, dtype=torch.float64)
    own = segment(3, *one[:3])
    options = [
        {"grad_scale": one[3], "found_inf": one[4], "factor_tensor": one[5]},
        {"clipnorm": 1.0, "square_sums": sums},
        {"clipnorm": 1.0, "square_sums": sums, "factor_tensor": one[5]},  # refused
        {"clipvalue": -1.0, "grad_scale": one[3]},  # refused
    ]
    tensors = [*(x for part in lists for x in part), *one, sums]

    def held() -> tuple[list[int], list[int]]:
        return [sys.getrefcount(x) for x in tensors], storage_uses(tensors)

    before = held()
    rest: dict[str, Any] = {}
    for given in options:
        for _ in range(2):
            try:
                if call == "sums":
                    rest = {name: given[name] for name in ("clipvalue", "grad_scale") if name in given}
                    adadelta.grad_square_sums(*lists[:2], **rest)
                elif call == "indices":
                    adadelta.first_invalid_indices(*lists, [])
                else:
                    CALLS[call](*lists, *own, **given)
            except RuntimeError:
                assert spoil is not None or given in options[2:]
    del given, rest
    assert held() == before


# ---- The library ----------------------------------------------------------------------------------------------------


def test_it_needs_no_python_symbol_and_only_the_stable_abi() -> None:
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


def test_every_dtype_is_covered() -> None:
    assert set(DTYPES) == set(REAL_DTYPES) | set(COMPLEX_DTYPES) == validation.DTYPES
