"""csrc/options.h: hyperparameters, segments and gradient options that do not fit are refused by each op, unwritten."""

from typing import Any

import pytest
import torch
from cases import segment
from op_cases import CALLS, assert_refused, dense, inf, lists_for, nan, needs_library
from torch import Tensor

pytestmark = needs_library

ONE = torch.ones(1)
THREE = torch.ones(3).double()
SCALAR = "must be a CPU tensor of one element, on the device of the parameters"
BOOLEANS = {3: "maximize", 5: "is_decoupled", 7: "overwrites", 9: "has_masters"}
FLAGS = (*((k, name, "0 or 1") for k, name in BOOLEANS.items()), (8, "state_dtype", "0, 1 or 2"))
ONES = [*[1.0] * 8, 0.0, 0.0]  # of a segment
SUMS = "square_sums must be a contiguous float64 CPU tensor with one element for each of 3 parameters"


def with_item(values: list[Any], index: int, item: Any) -> list[Any]:
    return [*values[:index], item, *values[index + 1 :]]


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"clipvalue": -1.0}, "clipvalue must be a number >= 0, got -1"),
    ({"clipvalue": nan}, "clipvalue must be a number >= 0, got nan"),
    ({"clipnorm": 1.0}, "clipnorm and square_sums must be given together"),
    ({"square_sums": THREE}, "clipnorm and square_sums must be given together"),
    ({"clipnorm": -2.0, "square_sums": THREE}, "clipnorm must be a number >= 0, got -2"),
    ({"clipnorm": nan, "square_sums": THREE}, "clipnorm must be a number >= 0, got nan"),
    ({"clipnorm": 1.5, "square_sums": THREE, "factor": 0.5}, "clipnorm is 1.5, but a factor is given, too"),
    ({"clipnorm": 1.5, "square_sums": THREE, "factor_tensor": ONE}, "clipnorm is 1.5, but a factor is given, too"),
    ({"clipnorm": 1.0, "square_sums": torch.ones(3)}, SUMS),
    ({"clipnorm": 1.0, "square_sums": torch.ones(2).double()}, SUMS),
    ({"clipnorm": 1.0, "square_sums": torch.ones(4).double()}, SUMS),
    ({"clipnorm": 1.0, "square_sums": torch.ones(3, 1).double()}, SUMS),
    ({"clipnorm": 1.0, "square_sums": torch.ones(6).double()[::2]}, SUMS),
    ({"factor_tensor": torch.ones(2)}, f"factor_tensor {SCALAR}"),
    ({"factor_tensor": ONE.long()}, "factor_tensor must have a floating-point dtype"),
    *(
        ({name: tensor}, f"{name} {error}")
        for name in ("grad_scale", "found_inf")
        for tensor, error in (
            (torch.ones(2), SCALAR),
            (torch.ones(0), SCALAR),
            (ONE.double(), "must have the dtype float32"),
            (ONE.bfloat16(), "must have the dtype float32"),
        )
    ),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("options", "error"), OPTIONS)
def test_gradient_options_that_do_not_fit(call: str, options: dict[str, Any], error: str) -> None:
    own = segment(3, 1.0, 0.9, 1e-7)
    assert_refused(CALLS[call], lists_for(call), *own, **options, error=f"the call: {error}")


def test_bounds_that_are_not_refused() -> None:
    for options in ({"clipvalue": 0.0}, {"clipvalue": inf}, {"clipnorm": 0.0, "square_sums": THREE}, {"factor": nan}):
        for name, call in CALLS.items():
            call(*lists_for(name), *segment(3, 1.0, 0.9, 1e-7), **options)


@pytest.mark.parametrize("call", CALLS)
def test_a_complex_parameter_has_no_order_to_clamp_in(call: str) -> None:
    lists = lists_for(call)
    for part in lists:
        part[1:] = [x if x.dtype is torch.int64 else x.to(torch.complex64) for x in part[1:]]
    error = "parameter 1: clipvalue is 0.5, but it is complex, and has no order to clamp in"
    assert_refused(CALLS[call], lists, *segment(3, 1.0, 0.9, 1e-7), clipvalue=0.5, error=error)
    CALLS[call](*lists, *segment(3, 1.0, 0.9, 1e-7), clipvalue=inf)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("sizes", "hyperparameters", "tensors", "error"),
    [
        ([3], ONES[:9], [], "1 segments have 9 hyperparameters and 0 hyperparameter_tensors, but must have 10 and"),
        ([1, 2], ONES, [], "2 segments have 10 hyperparameters and 0 hyperparameter_tensors, but must have 20 and"),
        ([3], ONES, [None] * 3, "1 segments have 10 hyperparameters and 3 hyperparameter_tensors, but must"),
        ([3], ONES, [None] * 11, "1 segments have 10 hyperparameters and 11 hyperparameter_tensors, but must"),
        *(
            ([3], ONES, with_item([None] * 10, k, ONE), f"the {name} of segment 0 must be {choices}, and no tensor")
            for k, name, choices in FLAGS
        ),
        *(
            ([3, 0], with_item([*ONES, *ONES], 10 + k, value), [], f"the {name} of segment 1 must be {choices}, and no")
            for k, name, choices in FLAGS
            for value in (0.5, -1.0, 3.0, nan)
        ),
        *(
            ([1, 2], [*ONES, *ONES], with_item([None] * 20, 10 + k, tensor), f"the {name} of segment 1 {error}")
            for k, name in ((0, "lr"), (1, "rho"), (2, "epsilon"), (4, "weight_decay"), (6, "ema_momentum"))
            for tensor, error in ((torch.ones(2), SCALAR), (ONE.long(), "must have a floating-point dtype"))
        ),
    ],
)
def test_segments_that_do_not_fit(call: str, sizes: list[int], hyperparameters: Any, tensors: Any, error: str) -> None:
    assert_refused(CALLS[call], lists_for(call), sizes, hyperparameters, tensors, error=f"the call: {error}")


@pytest.mark.parametrize("name", ["lr", "rho", "epsilon", "factor_tensor", "found_inf", "grad_scale", "square_sums"])
@pytest.mark.parametrize("call", CALLS)
def test_tensors_without_their_memory(call: str, name: str) -> None:
    option: Tensor = THREE.clone() if name == "square_sums" else torch.ones(1)
    option.untyped_storage().resize_(0)
    values: dict[str, Any] = {"lr": 1.0, "rho": 0.9, "epsilon": 1e-7}
    options: dict[str, Any] = {"clipnorm": 1.0} if name == "square_sums" else {}
    (values if name in values else options)[name] = option
    what = f"the {name} of segment 0" if name in values else name
    error = f"the call: {what} has no memory: its storage was resized"
    assert_refused(CALLS[call], lists_for(call), *segment(3, **values), **options, error=error)


@pytest.mark.parametrize("name", ["lr", "square_sums"])
def test_tensors_on_the_meta_device(name: str) -> None:
    values: dict[str, Any] = {"lr": 1.0, "rho": 0.9, "epsilon": 1e-7}
    options: dict[str, Any] = {"clipnorm": 1.0} if name == "square_sums" else {}
    (values if name in values else options)[name] = torch.ones(3 if name == "square_sums" else 1, device="meta")
    with pytest.raises(RuntimeError, match="a tensor on the meta device has no elements to update"):
        dense(*lists_for("dense"), *segment(3, **values), **options)
