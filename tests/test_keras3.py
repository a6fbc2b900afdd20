"""torch_adadelta.keras3.Adadelta beside keras.optimizers.Adadelta, call by call."""

import itertools
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_same_bits
from keras3_training import (
    CALLS,
    CLIPS,
    MARKS,
    TOLERANCE,
    all_options,
    assert_close,
    both,
    gradients_of,
    on_torch,
    train,
    variables_of,
)

from torch_adadelta import AdadeltaKeras
from torch_adadelta.backends import kernels

pytestmark = MARKS


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@on_torch
def test_numbers_are_those_of_keras(dtype: str) -> None:
    for options in all_options():
        ours, theirs, variables, expected = both(options, dtype)
        try:
            train(ours, variables)
            train(theirs, expected)
            assert_close(ours, theirs, variables, expected, TOLERANCE if dtype == "float32" else 1e-13)
        except Exception as error:
            raise AssertionError(f"{options}: {error}") from error
        assert int(ours.iterations) == int(theirs.iterations)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@on_torch
def test_bits_are_those_of_adadeltakeras(dtype: str) -> None:
    """So it is the fused op that runs. In float64 rho is a double."""
    from torch_adadelta import keras3

    variables = variables_of(dtype)
    ours = keras3.Adadelta(1.0)
    params = [torch.nn.Parameter(v._value.detach().clone()) for v in variables]
    plain = AdadeltaKeras(params, 1.0, rho=np.float64(0.95))
    for call in range(CALLS):
        for param, grad in zip(params, gradients_of(variables, call), strict=True):
            param.grad = grad
        plain.step()
    train(ours, variables)
    for i, (variable, param) in enumerate(zip(variables, params, strict=True)):
        assert_same_bits(variable._value, param)
        assert_same_bits(ours._accumulated_grads[i]._value, plain.state[param]["square_avg"])
        assert_same_bits(ours._accumulated_delta_vars[i]._value, plain.state[param]["acc_delta"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@on_torch
def test_the_errors_of_16_bits_are_about_those_of_keras(dtype: str) -> None:
    for options in all_options():
        ours, theirs, variables, expected = both(options, dtype)
        _, exact, _, true = both(options, "float64")
        for one, other in zip(true, variables, strict=True):
            one.assign(other._value.double())
        train(ours, variables)
        train(theirs, expected)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Gradients do not exist")
            for call in range(CALLS):
                grads = gradients_of(variables, call)
                exact.apply([None if grad is None else grad.double() for grad in grads], true)

        def error(found: Sequence[Any], true: Sequence[Any] = true) -> float:
            return max(float((a._value.double() - b._value).abs().sum()) for a, b in zip(found, true, strict=True))

        assert error(variables) <= 1.5 * error(expected) + 1e-6, options


@on_torch
def test_an_epsilon_of_0_stays_0() -> None:
    ours, theirs, variables, expected = both({"epsilon": 0.0})
    for optimizer, list_ in ((ours, variables), (theirs, expected)):
        optimizer.build(list_)
        for state in optimizer._accumulated_delta_vars:
            state.assign(torch.full(state.shape, 1e-12))
    train(ours, variables)
    train(theirs, expected)
    assert_close(ours, theirs, variables, expected, TOLERANCE)
    assert ours.get_config()["epsilon"] == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30, 0.0])
@on_torch
def test_gradients_that_are_not_finite_or_zero(bad: float) -> None:
    """They make nan and infinity appear where Keras has them."""
    for clip in [{}, *CLIPS]:
        ours, theirs, variables, expected = both(clip)
        train(ours, variables, 2)
        train(theirs, expected, 2)
        grads = [torch.full(v.shape, 0.1) for v in variables]
        grads[0][1, 2] = grads[1][:] = bad
        for optimizer, list_ in ((ours, variables), (theirs, expected)):
            optimizer.apply([grad.clone() for grad in grads], list_)
        for one, other in zip([*variables, *ours.variables], [*expected, *theirs.variables], strict=True):
            torch.testing.assert_close(one._value, other._value, rtol=1e-5, atol=1e-6, equal_nan=True)


@on_torch
def test_dtypes_may_be_mixed() -> None:
    import keras

    from torch_adadelta import keras3

    def run(cls: Any) -> list[Any]:
        dtypes = ("float32", "float64", "bfloat16")
        variables = [keras.Variable(np.linspace(0.5, 1, 3), dtype=dtype) for dtype in dtypes]
        optimizer = cls(1.0, weight_decay=0.1, use_ema=True, ema_overwrite_frequency=5, global_clipnorm=1.0)
        for _ in range(3):
            optimizer.apply([torch.ones(3, dtype=v._value.dtype) for v in variables], variables)
        return [v._value.detach().double() for v in variables]

    ours, theirs = run(keras3.Adadelta), run(keras.optimizers.Adadelta)
    for one, other, tolerance in zip(ours, theirs, (TOLERANCE, TOLERANCE, 2**-7), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=0)


@on_torch
def test_gradients_of_another_dtype_or_layout() -> None:
    """They are cast first, without a rounding of their squares."""
    for change in (
        lambda grad: grad.double(),
        lambda grad: grad.bfloat16(),
        lambda grad: grad.t().contiguous().t() if grad.dim() == 2 else grad,
        lambda grad: torch.ones(()).expand(grad.shape),
    ):
        ours, theirs, variables, expected = both({})
        theirs = type(ours)(1.0)
        for _ in range(3):
            grads = [change(torch.ones_like(v._value.detach()) / 3) for v in variables]
            ours.apply(grads, variables)
            theirs.apply([grad.float().contiguous() for grad in grads], expected)
        assert_close(ours, theirs, variables, expected, 0.0)


@on_torch
def test_sparse_gradients_are_dense_ones_with_zeros() -> None:
    """All rows decay, as in Keras 3, which refuses sparse gradients on this backend."""
    import keras

    from torch_adadelta import keras3

    for clip in [{}, *CLIPS]:
        found = []
        for is_sparse in (True, False):
            variable = keras.Variable(np.ones((4, 2)))
            optimizer = keras3.Adadelta(1.0, **clip)
            for row in (0, 2, 0):
                grad = torch.sparse_coo_tensor([[row, row]], torch.ones(2, 2), (4, 2))
                optimizer.apply([grad if is_sparse else grad.to_dense()], [variable])
            found.append([variable, *optimizer.variables])
        for one, other in zip(*found, strict=True):
            assert_same_bits(one._value, other._value)


# ---- Where the op cannot run ----------------------------------------------------------------------------------------


def _shared(variables: list[Any]) -> list[Any]:
    variables[1]._value = torch.nn.Parameter(variables[3]._value.detach())
    return variables


class Subclass(torch.nn.Parameter):
    """Of a tensor."""


@contextmanager
def _without_library() -> Iterator[None]:
    before = kernels.is_loaded
    kernels.is_loaded = False
    try:
        yield
    finally:
        kernels.is_loaded = before


def _cannot_run(kind: str) -> tuple[list[Any], str]:
    """Fresh variables of a kind, and what the warning says."""
    import keras

    names = [f"x{i}" for i in range(4)]
    variables = [keras.Variable(np.arange(1.0, 4.0), name=name) for name in names]
    if kind == "complex":
        variables[2] = keras.Variable(torch.tensor([1 + 2j, 3j, 1.0]), name="c")
        return variables, "complex square"
    if kind == "subclass":
        variables[0]._value = Subclass(variables[0]._value.detach())
        return variables, "not plain tensors"
    if kind == "twice":
        return [variables[0], variables[1], variables[0]], "given twice"
    if kind == "shared":
        return _shared(variables), r"x1: .* share memory"
    if kind == "meta":
        for variable in variables:
            variable._value = torch.nn.Parameter(torch.empty(3, device="meta"))
        return variables, "not for meta"
    return variables, "torch_adadelta"  # why the library is missing


@pytest.mark.parametrize("kind", ["complex", "subclass", "twice", "shared", "meta", "no library"])
@on_torch
def test_where_the_op_cannot_run_keras_does_with_one_warning(kind: str) -> None:
    import keras

    from torch_adadelta import keras3

    results = []
    for cls in (keras3.Adadelta, keras.optimizers.Adadelta):
        variables, message = _cannot_run(kind)
        with warnings.catch_warnings(record=True) as caught, _without_library() if "no" in kind else nullcontext():
            warnings.simplefilter("always")
            optimizer = cls(1.0, **({"weight_decay": 0.1, "clipnorm": 0.5} if kind == "no library" else {}))
            optimizer.build(list({id(v): v for v in variables}.values()))
            if kind == "meta":
                for state in optimizer.variables[2:]:
                    state._value = torch.nn.Parameter(torch.empty(3, device="meta"), requires_grad=False)
            for _ in range(3):
                optimizer.apply(
                    [torch.ones_like(v._value.detach()).as_subclass(torch.Tensor) for v in variables], variables
                )
        ours = [str(w.message) for w in caught if w.category is RuntimeWarning]
        if cls is keras3.Adadelta:
            assert len(ours) == 1, ours
            assert "runs Keras' own update" in ours[0]
            if kind == "no library":
                assert kernels.why_no_kernel("cpu") in ours[0]
            else:
                assert re.search(message, ours[0]), ours[0]
        assert int(optimizer.iterations) == 3
        results.append([*variables, *optimizer.variables])
    for one, other in zip(*results, strict=True):
        if one._value.device.type != "meta":
            assert torch.equal(one._value, other._value)


@on_torch
def test_errors_are_those_of_keras() -> None:
    import keras

    from torch_adadelta import keras3

    def messages(cls: Any) -> list[str]:
        variable, other = keras.Variable(np.ones(3), name="a"), keras.Variable(np.ones(3), name="b")
        optimizer = cls(1.0, use_ema=True, name="optimizer")
        optimizer.apply([torch.ones(3)], [variable])
        found = []
        for call in (
            lambda: cls(1),
            lambda: cls(1.0, clipnorm=1.0, clipvalue=1.0),
            lambda: cls(1.0, gradient_accumulation_steps=1),
            lambda: cls(1.0, unknown=1),
            lambda: optimizer.apply([torch.ones(3)], [other]),
            lambda: optimizer.apply([None], [variable]),
            lambda: optimizer.finalize_variable_values([variable, other]),
        ):
            with pytest.raises(ValueError) as raised:
                call()
            found.append(str(raised.value))
        return found

    assert messages(keras3.Adadelta) == messages(keras.optimizers.Adadelta)


@on_torch
def test_all_variables_may_be_excluded_from_weight_decay() -> None:
    ours, theirs, variables, expected = both({"weight_decay": 0.5})
    ours.exclude_from_weight_decay(var_list=variables)
    theirs.weight_decay = None  # with it Keras' own fails
    train(ours, variables)
    train(theirs, expected)
    assert_close(ours, theirs, variables, expected, TOLERANCE)


@on_torch
def test_variables_that_their_gradients_replace() -> None:
    """They have no accumulators and no average: those of float8 training."""
    for options in (
        {"use_ema": True, "ema_overwrite_frequency": 2, "clipnorm": 0.5},
        {"gradient_accumulation_steps": 2},
    ):
        ours, theirs, variables, expected = both(options)
        variables[0].overwrite_with_gradient = expected[0].overwrite_with_gradient = True
        train(ours, variables)
        train(theirs, expected)
        assert_close(ours, theirs, variables, expected, TOLERANCE)


@on_torch
def test_stateless_calls() -> None:
    ours, theirs, variables, expected = both({"weight_decay": 0.1, "use_ema": True, "ema_overwrite_frequency": 2})
    results = []
    for optimizer, list_ in ((ours, variables), (theirs, expected)):
        train(optimizer, list_, 2)
        before = [v._value.detach().clone() for v in (*list_, *optimizer.variables)]
        state = [[v._value.detach().clone() for v in group] for group in (optimizer.variables, list_)]
        grads = [grad if grad is not None else torch.ones(()) for grad in gradients_of(list_, 0)]
        results.append([*itertools.chain(*optimizer.stateless_apply(state[0], grads, state[1]))])
        after = [v._value.detach() for v in (*list_, *optimizer.variables)]
        assert all(map(torch.equal, before, after))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@on_torch
def test_apply_traces_into_one_graph() -> None:
    from torch_adadelta import keras3

    for options in ({}, {"weight_decay": 0.1, "global_clipnorm": 0.5, "use_ema": True}, {"clipnorm": 0.5}):
        found = []
        for is_traced in (True, False):
            variables = variables_of()
            grads = [torch.full(v.shape, 0.5) for v in variables]
            optimizer = keras3.Adadelta(1.0, **options)
            optimizer.build(variables)

            def apply(optimizer: Any = optimizer, grads: Any = grads, variables: Any = variables) -> None:
                optimizer.apply(grads, variables)

            step = torch.compile(apply, backend="aot_eager", fullgraph=True) if is_traced else apply
            for rate in (1.0, 1.0, 0.25):
                optimizer.learning_rate = rate
                step()
            found.append([v._value.detach() for v in (*variables, *optimizer.variables)])
            torch.compiler.reset()
        for one, other in zip(*found, strict=True):
            if options:  # Keras' own code runs around the update
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
            else:
                assert torch.equal(one, other)
