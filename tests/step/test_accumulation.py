"""Gradient accumulation: what counts, what a call changes, what must not happen to pending sums."""

import copy
import warnings
from typing import Any

import pytest
import torch
from cases import (
    Path,
    assert_optimizer_like_oracle,
    assert_same_bits,
    assert_unchanged,
    coo,
    coo_gradient,
    gradients,
    optimizer_oracle_of,
    snapshot,
    to_oracle,
)
from processes import Processes
from torch import Tensor
from torch.nn import Parameter
from training import advance, path  # noqa: F401

from torch_adadelta import AdadeltaKeras, schedules, step_in_backward
from torch_adadelta.step import accumulation


def pending(calls: int = 1, n: int = 3, **options: Any) -> tuple[AdadeltaKeras, list[Parameter]]:
    params = [Parameter(torch.ones(4)), Parameter(torch.ones(2))]
    optimizer = AdadeltaKeras(params, 1.0, **{"gradient_accumulation_steps": n, **options})
    advance(optimizer, calls)
    return optimizer, params


def count_of(optimizer: AdadeltaKeras) -> int:
    return int(optimizer.param_groups[0]["iterations"])


def test_a_call_that_only_accumulates_changes_nothing_else(path: Path) -> None:  # noqa: F811
    params = [Parameter(torch.ones(4)), Parameter(torch.ones(2))]
    optimizer = AdadeltaKeras(params, 1.0, gradient_accumulation_steps=3, **path.options)
    for call in range(2):
        advance(optimizer, 1, seed=call)
        for param in params:
            assert optimizer.state[param].keys() == {accumulation.KEY}
            assert param.tolist() == [1.0] * param.numel()
        assert (optimizer.iterations, count_of(optimizer)) == (0, call + 1)
    advance(optimizer, 1, seed=2)
    assert (optimizer.iterations, count_of(optimizer)) == (1, 3)
    for param in params:
        assert optimizer.state[param].keys() == {accumulation.KEY, "square_avg", "acc_delta"}
        assert not optimizer.state[param][accumulation.KEY].any()
        assert (param != 1.0).all()


def test_schedules_count_calls_and_are_asked_when_there_is_an_update(path: Path) -> None:  # noqa: F811
    asked = []

    class Counting(schedules.LearningRateSchedule):
        def __call__(self, step: Tensor) -> float:
            asked.append(float(step))
            return 1.0

    param = Parameter(torch.ones(2))
    optimizer = AdadeltaKeras([param], Counting(), gradient_accumulation_steps=3, **path.options)
    asked.clear()
    advance(optimizer, 7)
    assert asked == [2.0, 5.0]


def test_callbacks_see_means(path: Path) -> None:  # noqa: F811
    seen: list[list[float]] = []

    def transformer(pairs: Any) -> Any:
        seen.append([float(grad[0]) for grad, _ in pairs])
        return pairs

    param = Parameter(torch.ones(2))
    options = {"gradient_accumulation_steps": 2, "loss_scale_factor": 4.0, "gradient_transformers": [transformer]}
    optimizer = AdadeltaKeras([param], 1.0, **options, **path.options)
    for value in (4.0, 8.0, 12.0):
        param.grad = torch.full((2,), value)
        optimizer.step()
    assert seen == [[1.5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_gradients_make_dense_updates(path: Path, dtype: torch.dtype) -> None:  # noqa: F811
    options = {"gradient_accumulation_steps": 2, "loss_scale_factor": 3.0, "weight_decay": 0.1, "clipnorm": 0.5}
    params = [Parameter(torch.ones((9, 4), dtype=dtype)), Parameter(torch.ones(3, dtype=dtype))]
    optimizer = AdadeltaKeras(params, 1.0, **options, **path.options)
    expected = optimizer_oracle_of(params, learning_rate=1.0, **options)
    for k in range(6):
        grads = [coo_gradient((9, 4), dtype, 0 if k == 2 else 6, seed=k), gradients((3,), dtype, 1, seed=k)[0]]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        expected.step(to_oracle(grads))
        optimizer.step()
        assert_optimizer_like_oracle(optimizer, expected, f"after call {k}")


def test_gradients_of_another_dtype_are_rounded_first(path: Path) -> None:  # noqa: F811
    param = Parameter(torch.ones(50))
    optimizer = AdadeltaKeras([param], 1.0, gradient_accumulation_steps=2, **path.options)
    expected = optimizer_oracle_of([param], learning_rate=1.0, gradient_accumulation_steps=2)
    for k in range(4):
        (grad,) = gradients((50,), torch.float64, 1, seed=k)
        expected.step([grad.numpy()])
        optimizer.apply_gradients([(grad, param)])
        assert_optimizer_like_oracle(optimizer, expected, f"after call {k}")


def test_gradients_in_another_order(path: Path) -> None:  # noqa: F811
    """The sum of all squares is taken in the order in which they are given, and a parameter may be given twice."""
    params = [Parameter(torch.ones(3)) for _ in range(3)]
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    options = {"gradient_accumulation_steps": 2, "global_clipnorm": 0.5}
    optimizer = AdadeltaKeras(groups, 1.0, **options, **path.options)
    twin = AdadeltaKeras([Parameter(torch.ones(3)) for _ in range(3)], 1.0, global_clipnorm=0.5, **path.options)
    grads = [gradients((3,), torch.float32, 1, seed=k)[0] for k in range(6)]
    optimizer.apply_gradients([(grads[0], params[2]), (grads[1], params[0]), (grads[2], params[2])])
    optimizer.apply_gradients([(grads[3], params[2]), (grads[4], params[0]), (grads[5], params[2])])
    means = [(((grads[0] + grads[2]) + grads[3]) + grads[5]) / 2, (grads[1] + grads[4]) / 2]
    own = twin.param_groups[0]["params"]
    twin.apply_gradients([(means[0], own[2]), (means[1], own[0])])
    assert_same_bits(optimizer.state[params[2]]["square_avg"], twin.state[own[2]]["square_avg"])
    for param, other in zip(params, own, strict=True):
        assert_same_bits(param, other.detach())


def test_a_sum_without_a_gradient_in_the_call_that_updates_is_dropped(path: Path) -> None:  # noqa: F811
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(3))]
    optimizer = AdadeltaKeras(params, 1.0, gradient_accumulation_steps=2, **path.options)
    advance(optimizer)
    params[1].grad = None
    with pytest.warns(
        UserWarning, match="no gradient in the call that updates: parameter 1 of group 0; what was summed"
    ):
        optimizer.step()
    assert optimizer.state[params[1]].keys() == {accumulation.KEY}
    assert not optimizer.state[params[1]][accumulation.KEY].any()
    assert params[1].tolist() == [1.0] * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        advance(optimizer, 2)


def test_calls_without_any_gradient_do_not_count(path: Path) -> None:  # noqa: F811
    optimizer, params = pending(2, **path.options)
    before = snapshot(optimizer)
    for param in params:
        param.grad = None
    optimizer.step()
    assert_unchanged(optimizer, before)


# ---- Counts ---------------------------------------------------------------------------------------------------------


def test_what_would_leave_sums_behind_is_refused() -> None:
    optimizer, params = pending()
    before = snapshot(optimizer)
    for name, value in (("iterations", 0), ("gradient_accumulation_steps", None), ("gradient_accumulation_steps", 2)):
        with pytest.raises(ValueError, match=f"{name}={value} cannot be set while gradients wait for their update"):
            setattr(optimizer, name, value)
    with pytest.raises(ValueError, match="the state cannot be set while gradients wait"):
        optimizer.set_weights(optimizer.get_weights()[:5])
    assert_unchanged(optimizer, before)
    advance(optimizer, 2)
    optimizer.iterations = 5
    assert count_of(optimizer) == 15
    with pytest.raises(
        ValueError, match="after 15 calls, with gradient_accumulation_steps=2, the gradients of 1 are summed"
    ):
        optimizer.gradient_accumulation_steps = 2
    optimizer.gradient_accumulation_steps = 5
    assert (optimizer.iterations, count_of(optimizer)) == (3, 15)
    optimizer.gradient_accumulation_steps = None
    assert optimizer.iterations == 15
    advance(optimizer)
    with pytest.raises(ValueError, match="with gradient_accumulation_steps=3, the gradients of 1 are summed"):
        optimizer.gradient_accumulation_steps = 3
    assert optimizer.gradient_accumulation_steps is None
    assert params[0].shape == (4,)


def test_pending_sums_are_loaded_with_the_count() -> None:
    optimizer, _ = pending(4)
    saved = optimizer.state_dict()
    other = AdadeltaKeras([Parameter(torch.ones(4)), Parameter(torch.ones(2))], gradient_accumulation_steps=3)
    before = snapshot(other)
    without = copy.deepcopy(saved)
    for entry in without["state"].values():
        del entry[accumulation.KEY]
    with pytest.raises(ValueError, match="after 4 calls, with gradient_accumulation_steps=3, the gradients of 1 are"):
        other.load_state_dict(without)
    assert_unchanged(other, before)
    old = AdadeltaKeras([Parameter(torch.ones(4)), Parameter(torch.ones(2))])
    old.iterations = 4
    with pytest.raises(ValueError, match="the gradients of 1 are summed"):
        other.set_weights(old.get_weights())
    spoiled = copy.deepcopy(saved)
    spoiled["state"][0][accumulation.KEY] = torch.zeros(3)
    with pytest.raises(ValueError, match="has shape"):
        other.load_state_dict(spoiled)
    assert_unchanged(other, before)
    other.load_state_dict(saved)
    assert (other.iterations, count_of(other)) == (1, 4)


def test_a_checkpoint_of_torch_adadelta_counts_updates() -> None:
    params = [Parameter(torch.ones(4)), Parameter(torch.ones(2))]
    theirs = torch.optim.Adadelta(params)
    advance(theirs, 5)
    ours = AdadeltaKeras([Parameter(torch.ones(4)), Parameter(torch.ones(2))], gradient_accumulation_steps=3)
    ours.load_state_dict(theirs.state_dict())
    assert (ours.iterations, count_of(ours)) == (5, 15)


# ---- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grad", "error", "message"),
    [
        (torch.ones(3), RuntimeError, r"parameter 1 of group 0 has shape \(2,\), but its gradient has shape \(3,\)"),
        (torch.ones(2, dtype=torch.complex64), RuntimeError, "parameter 1 of group 0 has dtype torch.float32, but its"),
        (
            coo([0, 7], torch.ones(2), (2,)),
            IndexError,
            "parameter 1 of group 0 has 2 rows, but .* index 7 at position 1",
        ),
    ],
    ids=["shape", "complex", "index"],
)
@pytest.mark.parametrize("calls", [1, 2])
def test_a_gradient_that_does_not_fit_changes_nothing(
    path: Path,  # noqa: F811
    grad: Tensor,
    error: type[Exception],
    message: str,
    calls: int,
) -> None:
    optimizer, params = pending(calls, use_ema=True, **path.options)
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.apply_gradients([(torch.ones(4), params[0]), (grad, params[1])])
    assert_unchanged(optimizer, before)


def test_a_sum_that_does_not_fit(path: Path) -> None:  # noqa: F811
    optimizer, params = pending(1, **path.options)
    optimizer.state[params[1]][accumulation.KEY] = torch.zeros(2, dtype=torch.float64)
    before = snapshot(optimizer)
    with pytest.raises(
        RuntimeError, match=r"its state gradient_accumulator has dtype torch.float64, not torch.float32"
    ):
        advance(optimizer)
    assert_unchanged(optimizer, before)


def test_who_else_accumulates_or_counts() -> None:
    with pytest.raises(
        ValueError, match=r"gradient_accumulation_steps=3 cannot be combined with capturable=True.*\.grad"
    ):
        pending(0, capturable=True)
    optimizer, _ = pending(0, fused=True)
    assert not optimizer._step_supports_amp_scaling
    with pytest.raises(ValueError, match="step_in_backward: gradient_accumulation_steps=3 cannot be applied, for each"):
        step_in_backward(optimizer)
    optimizer.gradient_accumulation_steps = None
    assert optimizer._step_supports_amp_scaling


def test_a_grad_scaler_unscales_before_gradients_are_summed() -> None:
    params = [Parameter(torch.ones(3)) for _ in range(2)]
    ours, usual = (AdadeltaKeras([p], 1.0, gradient_accumulation_steps=2, use_ema=True, fused=True) for p in params)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    for value in (1.0, torch.inf, 2.0, 3.0, 4.0):
        loss = (params[0] * value).sum()
        scaler.scale(loss).backward()
        scaler.step(ours)
        scaler.update()
        ours.zero_grad()
        if value != torch.inf:
            params[1].grad = torch.full((3,), value)
            usual.step()
    assert count_of(ours) == count_of(usual) == 4
    assert_same_bits(params[0], params[1].detach())
    for key, tensor in usual.state[params[1]].items():
        assert_same_bits(ours.state[params[0]][key], tensor, key)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"gradient_accumulation_steps": 1},
            ValueError,
            "Invalid gradient_accumulation_steps: 1; it must be an int >= 2",
        ),
        (
            {"gradient_accumulation_steps": 2.0},
            TypeError,
            "gradient_accumulation_steps must be an int or None, got 2.0",
        ),
        (
            {"gradient_accumulation_steps": True},
            TypeError,
            "gradient_accumulation_steps must be an int or None, got True",
        ),
        ({"ema_overwrite_frequency": 0}, ValueError, "Invalid ema_overwrite_frequency: 0; it must be an int >= 1"),
        ({"ema_momentum": 1.5}, ValueError, r"Invalid ema_momentum: 1.5; it must be a number in \[0, 1\]"),
        ({"ema_momentum": -0.1}, ValueError, r"Invalid ema_momentum: -0.1; it must be a number in \[0, 1\]"),
        ({"ema_momentum": torch.tensor(0.5)}, TypeError, "ema_momentum must be a number, got a Tensor"),
        ({"ema_momentum": None}, TypeError, "ema_momentum must be a number, got None"),
        ({"use_ema": 1}, TypeError, "use_ema must be True or False, got 1"),
        ({"loss_scale_factor": 0.0}, ValueError, "Invalid loss_scale_factor: 0.0; it must be a finite number > 0"),
        ({"loss_scale_factor": -2}, ValueError, "Invalid loss_scale_factor: -2; it must be a finite number > 0"),
        ({"loss_scale_factor": float("nan")}, ValueError, "Invalid loss_scale_factor: nan; it must be a finite number"),
    ],
    ids=str,
)
def test_wrong_values(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AdadeltaKeras([Parameter(torch.ones(1))], **options)
    optimizer = AdadeltaKeras([Parameter(torch.ones(1))])
    before = snapshot(optimizer)
    ((name, value),) = options.items()
    with pytest.raises(error, match=message):
        setattr(optimizer, name, value)
    assert_unchanged(optimizer, before)
    with pytest.raises(ValueError, match=f"{name} belongs to the whole optimizer"):
        optimizer.add_param_group({"params": [Parameter(torch.ones(1))], name: value})
    optimizer.param_groups[0][name] = value  # past the setter
    optimizer.param_groups[0]["params"][0].grad = torch.ones(1)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert not optimizer.state


def test_the_loss_is_scaled() -> None:
    optimizer = AdadeltaKeras([Parameter(torch.ones(1))])
    assert optimizer.scale_loss(3.0) == 3.0
    optimizer.loss_scale_factor = 8
    assert optimizer.scale_loss(3.0) == 24.0
    assert optimizer.loss_scale_factor == 8.0


# ---- Others ---------------------------------------------------------------------------------------------------------


def accumulate_together(options: dict[str, Any]) -> list[Any]:
    """Two processes with a parameter each, one of which has no gradient in some calls."""
    rank = torch.distributed.get_rank()
    param = Parameter(torch.ones(3))
    optimizer = AdadeltaKeras([param], 1.0, gradient_accumulation_steps=2, norm_group="world", **options)
    counts = []
    for call in range(6):
        param.grad = None if rank == 1 and call in (0, 3) else torch.full((3,), 1.0 + call)
        optimizer.step()
        counts.append(int(optimizer.param_groups[0]["iterations"]))
        copy.deepcopy(optimizer)
    return counts


@pytest.mark.filterwarnings("ignore:no gradient in the call that updates")
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("options", [{}, {"global_clipnorm": 0.5, "use_ema": True}], ids=str)
def test_processes_with_other_parameters_count_together(two: Processes, options: dict[str, Any]) -> None:
    assert two.run(accumulate_together, options) == [[1, 2, 3, 4, 5, 6]] * 2


def test_the_aggregator_is_not_called_between_updates() -> None:
    calls: list[int] = []

    def aggregator(pairs: Any) -> Any:
        calls.append(len(pairs))
        return pairs

    param = Parameter(torch.ones(3))
    optimizer = AdadeltaKeras([param], 1.0, gradient_accumulation_steps=2, gradient_aggregator=aggregator)
    optimizer.step()
    advance(optimizer, 2)
    assert calls == [1]


def test_a_callback_may_load_other_sums(path: Path) -> None:  # noqa: F811
    param = Parameter(torch.ones(3))
    optimizer = AdadeltaKeras([param], 1.0, gradient_accumulation_steps=2, **path.options)
    advance(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())

    def load(pairs: Any) -> Any:
        optimizer.load_state_dict(saved)
        return pairs

    optimizer.gradient_transformers = [load]
    advance(optimizer)
    assert not optimizer.state[param][accumulation.KEY].any()


def test_sums_of_inference_mode_are_refused() -> None:
    param = Parameter(torch.ones(3))
    optimizer = AdadeltaKeras([param], 1.0, gradient_accumulation_steps=2)
    with torch.inference_mode():
        param.grad = torch.ones(3)
        optimizer.step()
    with pytest.raises(
        RuntimeError, match="parameter 0 of group 0: its state gradient_accumulator was made in inference"
    ):
        advance(optimizer)
    assert param.tolist() == [1.0] * 3
    assert count_of(optimizer) == 1
