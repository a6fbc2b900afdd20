"""The aggregator and the transformers: what they are given, how often, and what is made of what they return."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES, Path, assert_same_bits, assert_unchanged, dtype_name, gradients, snapshot, to_numpy
from reference import oracle
from torch import Tensor
from torch.nn import Parameter
from training import assert_like_oracles, assert_same_training, give_gradients, oracle_of_all, trained
from training import path as path

from torch_adadelta import AdadeltaKeras
from torch_adadelta.backends import kernels
from torch_adadelta.step.callbacks import Callbacks

Pairs = list[tuple[Tensor, Tensor]]


def identity(pairs: Pairs) -> Pairs:
    return pairs


def doubled(pairs: Pairs) -> Pairs:
    return [(2 * grad, param) for grad, param in pairs]


def halved_in_place(pairs: Pairs) -> Pairs:
    for grad, _ in pairs:
        grad.mul_(0.5)
    return pairs


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_callbacks_see_the_gradients_in_T_and_may_overwrite_them(path: Path, dtype: torch.dtype) -> None:
    params = [Parameter(torch.ones(3, dtype=dtype)), Parameter(torch.ones(2, dtype=dtype)), Parameter(torch.ones(1))]
    seen: list[list[tuple[torch.dtype, int]]] = []

    def look(pairs: Pairs) -> Pairs:
        assert isinstance(pairs, list)
        seen.append([(grad.dtype, next(i for i, p in enumerate(params) if p is param)) for grad, param in pairs])
        return pairs

    optimizer = AdadeltaKeras(
        [{"params": params[:1]}, {"params": params[1:]}],
        1.0,
        gradient_aggregator=halved_in_place,
        gradient_transformers=[look, doubled, halved_in_place, halved_in_place],
        **path.options,
    )
    expected = oracle_of_all(params)
    grads: list[Tensor | None] = [gradients(p.shape, p.dtype, 1, seed=i)[0] for i, p in enumerate(params)]
    grads[2] = None
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    before = [None if g is None else g.clone() for g in grads]
    optimizer.step()
    wide = {torch.float64: torch.float64, torch.complex128: torch.complex128}
    T = wide.get(dtype, torch.complex64 if dtype.is_complex else torch.float32)
    assert seen == [[(T, 0), (T, 1)]]
    for grad, was in zip(grads, before, strict=True):
        if grad is not None and was is not None:
            assert_same_bits(grad, was, "the user's gradient")
    expected.step([None if g is None else oracle.scaled(to_numpy(g), to_numpy(g).real.dtype.type(0.25)) for g in grads])
    assert_like_oracles(optimizer, expected)


@pytest.mark.parametrize(
    "clip", [{"clipvalue": 0.5}, {"clipnorm": 0.7}, {"clipvalue": 0.5, "global_clipnorm": 0.9}], ids=str
)
def test_the_aggregator_comes_before_clipping(path: Path, clip: dict[str, Any]) -> None:
    params = [Parameter(torch.ones(300)), Parameter(torch.ones(2))]
    optimizer = AdadeltaKeras(params, 1.0, gradient_aggregator=doubled, **clip, **path.options)
    expected = oracle_of_all(params, **clip)
    grads = give_gradients(params, 0)
    optimizer.step()
    expected.step([2 * to_numpy(g) for g in grads])
    assert_like_oracles(optimizer, expected)


def test_the_aggregator_comes_first_and_transformers_in_their_order(path: Path) -> None:
    seen: list[float] = []

    def added(number: float) -> Callable[[Pairs], Pairs]:
        return lambda pairs: [(grad + number, param) for grad, param in pairs]

    def look(pairs: Pairs) -> Pairs:
        seen.append(pairs[0][0].item())
        return pairs

    param = Parameter(torch.zeros(1))
    transformers = [look, doubled, look, added(3), look]
    optimizer = AdadeltaKeras([param], gradient_aggregator=added(1), gradient_transformers=transformers, **path.options)
    param.grad = torch.ones(1)
    optimizer.step()
    assert seen == [2.0, 4.0, 7.0]
    optimizer.apply_gradients([(torch.ones(1), param)], experimental_aggregate_gradients=False)
    assert seen[3:] == [1.0, 2.0, 5.0]


@pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")
def test_callbacks_see_unscaled_gradients() -> None:
    seen = []

    def look(pairs: Pairs) -> Pairs:
        seen.append(pairs[0][0].tolist())
        return pairs

    param = Parameter(torch.zeros(2))
    optimizer = AdadeltaKeras([param], 1.0, fused=True, gradient_transformers=[look])
    param.grad = torch.tensor([8.0, -16.0])
    optimizer.grad_scale, optimizer.found_inf = torch.tensor([8.0]), torch.tensor([0.0])
    optimizer.step()
    assert seen == [[1.0, -2.0]]
    assert param.grad.tolist() == [8.0, -16.0]


def test_maximize_comes_last(path: Path) -> None:
    param = Parameter(torch.zeros(3))
    seen = []

    def look(pairs: Pairs) -> Pairs:
        seen.append(pairs[0][0].tolist())
        return pairs

    optimizer = AdadeltaKeras([param], 1.0, maximize=True, gradient_transformers=[look], **path.options)
    param.grad = torch.tensor([1.0, -2.0, 3.0])
    optimizer.step()
    assert seen == [[1.0, -2.0, 3.0]]
    assert (param * param.grad > 0).all()


@pytest.mark.parametrize(
    ("aggregator", "transformers", "message"),
    [
        (1, None, "gradient_aggregator must be callable, got 1"),
        (None, "sum", "gradient_transformers must be a list of callables, got 'sum'"),
        (None, identity, "gradient_transformers must be a list of callables, got <function identity"),
        (None, [identity, 1], "gradient_transformers must be callables, got 1"),
    ],
)
def test_what_cannot_be_called_is_refused(aggregator: Any, transformers: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Callbacks(aggregator, transformers)


def test_callbacks_that_something_was_saved_with_are_asked_for() -> None:
    both = ["gradient_aggregator", "gradient_transformers"]
    saved: list[dict[str, Any]] = [{}, {"callables": ["rho", *both]}, {"callables": []}]
    Callbacks(identity, [identity]).check_known(saved)
    for name, given in zip(both, (Callbacks(None, [identity]), Callbacks(identity, None)), strict=True):
        assert given.names == [other for other in both if other != name]
        given.check_known([{"callables": given.names}, {}])
        with pytest.raises(ValueError, match=f"was saved with {name}, .* set optimizer.{name} first"):
            given.check_known(saved)


@pytest.mark.parametrize("kind", ["gradient_aggregator", "gradient_transformers"])
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (
            lambda pairs: None,
            TypeError,
            "must return a list of .gradient, parameter. tuples, as it was given; got None",
        ),
        (lambda pairs: [g for g, _ in pairs], (TypeError, ValueError), "must return a list of"),
        (lambda pairs: pairs[:-1], ValueError, "was given 2 .gradient, parameter. tuples and returned 1"),
        (lambda pairs: pairs[::-1], ValueError, "returned another parameter than parameter 0 of group 0 in tuple 0"),
        (
            lambda pairs: [(None, p) for _, p in pairs],
            TypeError,
            "returned None as the gradient of parameter 0 of group 0",
        ),
        (
            lambda pairs: [(g[:1], p) for g, p in pairs],
            ValueError,
            r"a gradient of shape \(1,\) for parameter 0 of group",
        ),
        (
            lambda pairs: [(g.to_mkldnn(), p) for g, p in pairs],
            ValueError,
            "a gradient of layout torch._mkldnn for param",
        ),
        (lambda pairs: [(g.to("meta"), p) for g, p in pairs], ValueError, "a gradient of device meta for parameter 0"),
        (lambda pairs: [(g.long(), p) for g, p in pairs], ValueError, "a gradient of torch.int64 for parameter 0"),
        (lambda pairs: [(g + 0j, p) for g, p in pairs], ValueError, "a gradient of torch.complex64 for parameter 0"),
        (lambda pairs: 1 / 0, ZeroDivisionError, "division"),
    ],
)
def test_what_a_callback_returns_is_checked(path: Path, kind: str, wrong: Any, error: Any, message: str) -> None:
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(2))]
    option: Any = wrong if kind == "gradient_aggregator" else [doubled, wrong]
    optimizer = AdadeltaKeras(params, 1.0, **{kind: option}, **path.options)
    params[0].grad, params[1].grad = torch.ones(3), torch.ones(2)
    before = snapshot(optimizer)
    with pytest.raises(error, match=message) as caught:
        optimizer.step()
    if error is not ZeroDivisionError:
        assert str(caught.value).startswith(f"{kind}")
        assert "lambda" in str(caught.value)
    assert_unchanged(optimizer, before)
    assert optimizer.iterations == 0


def test_a_callback_may_return_another_dtype(path: Path) -> None:
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(3))]
    optimizer = AdadeltaKeras(
        params, 1.0, gradient_transformers=[lambda pairs: [(g.bfloat16(), p) for g, p in pairs]], **path.options
    )
    grads = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.1, 0.2, 0.3])]
    params[0].grad, params[1].grad = grads
    optimizer.step()
    expected = oracle_of_all([torch.ones(3)] * 2)
    expected.step([to_numpy(g.bfloat16()) for g in grads])
    assert_like_oracles(optimizer, expected)


def test_a_gradient_that_does_not_fit_is_refused_before_the_callback(path: Path) -> None:
    param = Parameter(torch.ones(3))
    optimizer = AdadeltaKeras([param], gradient_transformers=[doubled], **path.options)
    with pytest.raises(RuntimeError, match=r"has shape \(3,\), but its gradient has shape \(2,\)"):
        optimizer.apply_gradients([(torch.ones(2), param)])
    assert optimizer.iterations == 0


# ---- When they are called, and what they may do ----------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 2])
def test_callbacks_run_once_a_step_also_where_the_first_sparse_gradient_comes(path: Path, steps: int) -> None:
    calls: list[tuple[str, int]] = []

    def called(name: str) -> Callable[[Any], Any]:
        def callback(pairs: Any) -> Any:
            calls.append((name, len(pairs)))
            return pairs

        return callback

    def rate() -> float:
        calls.append(("rho", 0))
        return 0.5

    callbacks = {"gradient_aggregator": called("aggregator"), "gradient_transformers": [called("transformer")]}
    optimizer, params = trained(path, steps, rho=rate, **callbacks)
    params[1].grad = torch.ones(5).to_sparse()
    calls.clear()
    optimizer.step()
    assert sorted(calls) == [("aggregator", 4), ("rho", 0), ("transformer", 4)]


def test_transformers_are_not_called_without_gradients(path: Path) -> None:
    calls: list[str] = []

    def aggregator(pairs: Any) -> Any:
        calls.append("aggregator")
        return pairs

    def transformer(pairs: Any) -> Any:
        calls.append("transformer")
        return pairs

    optimizer, params = trained(path, gradient_aggregator=aggregator, gradient_transformers=[transformer])
    for param in params:
        param.grad = None
    calls.clear()
    optimizer.step()
    assert calls == ["aggregator"]  # other processes may have gradients, and wait for this one
    assert optimizer.iterations == 2


def test_callbacks_cannot_change_the_gradients_of_the_user(path: Path) -> None:
    """Neither the values nor the indices."""

    def spoiling(pairs: Any) -> Any:
        for grad, _ in pairs:
            if grad.is_sparse:
                grad._indices().zero_()
                grad._values().zero_()
            else:
                grad.zero_()
        return pairs

    param, table = Parameter(torch.zeros(3)), Parameter(torch.zeros(4, 2))
    optimizer = AdadeltaKeras([param, table], 1.0, gradient_transformers=[spoiling], **path.options)
    param.grad = torch.ones(3)
    table.grad = torch.sparse_coo_tensor(torch.tensor([[1, 3]]), torch.ones(2, 2), (4, 2))
    optimizer.step()
    assert param.grad.tolist() == [1, 1, 1]
    assert table.grad._indices().tolist() == [[1, 3]]
    assert (table.grad._values() == 1).all()


def test_a_clip_option_beside_transformers_is_noticed(path: Path) -> None:
    """Written to the groups themselves."""
    optimizer, _ = trained(path, gradient_transformers=[lambda pairs: pairs])
    for group in optimizer.param_groups:
        group["clipnorm"] = 1.0
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="`clipnorm` cannot be set when `gradient_transformers` is set"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_transformers_that_are_appended_are_noticed(path: Path) -> None:
    optimizer, _ = trained(path)
    optimizer.gradient_transformers.append(lambda pairs: [(-g, p) for g, p in pairs])
    expected, _ = trained(path)
    for group in expected.param_groups:
        group["maximize"] = True
    for each in (optimizer, expected):
        each.step()
    assert_same_training(optimizer, expected)
    clipped, _ = trained(path, clipnorm=1.0)
    clipped.gradient_transformers.append(lambda pairs: pairs)
    before = snapshot(clipped)
    with pytest.raises(ValueError, match="`clipnorm` cannot be set when `gradient_transformers` is set"):
        clipped.step()
    assert_unchanged(clipped, before)
