"""Schedules and callables: their values in a step, what they leave in the groups, and who else writes there."""

import copy
import itertools
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from cases import Path, assert_same_bits, assert_unchanged, snapshot
from torch import Tensor
from torch.nn import Parameter
from training import advance, assert_same_training, give_gradients, oracle_of_all, trained
from training import path as path

from torch_adadelta import AdadeltaKeras, schedules
from torch_adadelta.schedules import ExponentialDecay, LearningRateSchedule
from torch_adadelta.step import sources
from torch_adadelta.step.sources import at_step, decayed

F32, F64 = torch.float32, torch.float64


class Counting(LearningRateSchedule):
    """Counts its calls, and returns what it is told to."""

    def __init__(self, value: Any = None) -> None:
        self.value = value
        self.steps: list[Any] = []

    def __call__(self, step: Any) -> Any:
        self.steps.append((step.dtype, step.item()))
        return 0.1 / (1 + step) if self.value is None else self.value

    def get_config(self) -> dict[str, Any]:
        return {"value": self.value}


def two_kinds(dtypes: list[torch.dtype], capturable: list[bool], **options: Any) -> AdadeltaKeras:
    """Two groups of parameters of these dtypes, which may differ in `capturable`."""
    groups = [{"params": [Parameter(torch.zeros(3, dtype=d)) for d in dtypes], "capturable": own} for own in capturable]
    return AdadeltaKeras(groups, **options)


# ---- The values of a step -------------------------------------------------------------------------------------------


def test_each_is_called_once_a_step(path: Path) -> None:
    """A schedule once for each opmath dtype, with the count of steps before this one; a callable once in all groups."""
    schedule, calls = Counting(), []

    def rho() -> float:
        calls.append("rho")
        return 0.5

    optimizer = two_kinds([F32, F64, torch.bfloat16], [False, False], learning_rate=schedule, rho=rho, **path.options)
    schedule.steps.clear()
    for step in range(3):
        advance(optimizer, 1, step)
        assert sorted(schedule.steps, key=str) == [(F32, step), (F64, step)]
        assert calls == ["rho"]
        schedule.steps.clear()
        calls.clear()


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_they_have_the_bits_of_the_oracle(path: Path, decay: float) -> None:
    """In a float64 parameter, the schedule in float64."""
    params = [Parameter(torch.zeros(3, dtype=dtype)) for dtype in (F32, F64, F32)]
    rhos = iter([0.9, 0.5, 0.0, 1.0])
    optimizer = AdadeltaKeras(params, Counting(), lambda: next(rhos), decay=decay, **path.options)
    expected = oracle_of_all(params, learning_rate=lambda t: t.dtype.type(0.1) / (1 + t), decay=decay)
    for step, rho in enumerate([0.9, 0.5, 0.0, 1.0]):
        grads = give_gradients(params, step)
        optimizer.step()
        for oracle in expected.oracles:
            oracle.rho = rho
        expected.step([grad.numpy() for grad in grads])
        for param, oracle in zip(params, expected.oracles, strict=True):
            assert_same_bits(param, oracle.p)
            assert_same_bits(optimizer.state[param]["acc_delta"], oracle.acc_delta)
        assert optimizer.param_groups[0]["rho"] == rho


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_what_stays_in_a_group_depends_on_no_order(path: Path, decay: float) -> None:
    """Neither on that of groups that differ in `capturable`, nor on that of dtypes: the wider one stays."""
    for dtypes, capturable in itertools.product(([F32, F64], [F64, F32], [F32]), ([False, True], [True, False])):
        optimizer = two_kinds(dtypes, capturable, learning_rate=Counting(), decay=decay, **path.options)
        advance(optimizer, 2)
        for group in optimizer.param_groups:
            assert isinstance(group["lr"], Tensor) == group["capturable"], (dtypes, capturable)
            T = F64 if F64 in dtypes else F32
            assert float(group["lr"]) == float(0.1 / (1 + torch.tensor(1.0, dtype=T))), (dtypes, capturable)
        # The bits are those of groups that are alike.
        alike = two_kinds(dtypes, [False, False], learning_rate=Counting(), decay=decay, **path.options)
        advance(alike, 2)
        assert_same_training(optimizer, alike)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.1, float(np.float32(0.1))),
        (1, 1.0),
        (-0.5, -0.5),
        (np.float64(0.1), 0.1),
        (torch.tensor([0.1], dtype=F64), 0.1),
        (torch.tensor(3), 3.0),
        ("0.1", TypeError),
        (True, TypeError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        (-1e39, ValueError),
        (torch.tensor([0.1, 0.2]), ValueError),
        (torch.tensor(1j), ValueError),
        (torch.tensor(True), ValueError),
        (torch.tensor(math.nan), ValueError),
    ],
    ids=str,
)
def test_what_a_schedule_returns(value: Any, expected: Any) -> None:
    if isinstance(expected, float):
        assert [at_step(lambda step: value, 3, T) for T in (F32, F64)] == [expected, expected]
        return
    with pytest.raises(expected, match=r"the schedule Counting returned"):
        at_step(Counting(value), 3, F32)


def test_a_schedule_is_told_the_step_as_a_tensor() -> None:
    """On the device of `iterations`, if that is a Tensor; then it may return one."""
    for iterations in (2**24 + 1, torch.tensor(2**24 + 1)):
        for T in (F32, F64):
            seen = []
            value = at_step(lambda step: seen.append(step) or step * 0.5, iterations, T)  # noqa: B023
            assert (seen[0].dtype, seen[0].shape) == (T, ())
            assert float(value) == (2.0**23 if T is F32 else 2.0**23 + 0.5)
            assert isinstance(value, Tensor) == isinstance(iterations, Tensor)
    assert at_step(lambda step: step.reshape(1), torch.tensor(3), F32).shape == ()


@pytest.mark.parametrize("T", [np.float32, np.float64])
@pytest.mark.parametrize("iterations", [7, torch.tensor(7)], ids=["int", "Tensor"])
@pytest.mark.parametrize("lr", [0.3, torch.tensor([0.3], dtype=F64)], ids=["float", "Tensor lr"])
def test_decay_is_cast_to_T_before_it_is_multiplied(T: Any, iterations: Any, lr: Any) -> None:
    """A NumPy float64 is rounded once to float32, then the product: not the product of the float64 alone."""
    dtype = F32 if T is np.float32 else F64
    for decay in np.random.default_rng(0).uniform(0, 1, 100):
        expected = T(0.3) / (T(1) + T(decay) * T(7))
        result = decayed(lr, decay, iterations, dtype)
        assert float(result) == expected
        assert not isinstance(result, Tensor) or result.shape == ()


# ---- Who else writes to the groups ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["lr", "rho", "epsilon"])
@pytest.mark.parametrize("kind", ["callable", "schedule", "Tensor"])
def test_what_others_write_is_refused(path: Path, key: str, kind: str) -> None:
    if kind == "schedule" and key != "lr":
        with pytest.raises(TypeError, match=f"{key} must be a number, a one-element Tensor or a callable, got the sch"):
            AdadeltaKeras([Parameter(torch.zeros(1))], **{key: Counting()})
        return
    given: Any = {"callable": lambda: 0.25, "schedule": ExponentialDecay(1.0, 2, 0.5), "Tensor": torch.tensor(0.25)}
    source = given[kind] if kind != "Tensor" else lambda: given["Tensor"]
    optimizer, params = trained(path, **{"learning_rate" if key == "lr" else key: source})
    written = optimizer.param_groups[1][key]
    for value in (7.0, torch.tensor(0.25), torch.tensor(7.0)):
        optimizer.param_groups[1][key] = value
        before = snapshot(optimizer)
        name = "learning_rate" if key == "lr" else key
        with pytest.raises(RuntimeError, match=rf"group 1 has {key}=.*, but its {name} is given by the (call|sched)"):
            optimizer.step()
        assert_unchanged(optimizer, before)
    optimizer.param_groups[1][key] = written
    if kind == "Tensor":
        given["Tensor"].fill_(0.5)  # which is the user's to fill
    optimizer.step()
    setattr(optimizer, "learning_rate" if key == "lr" else key, 0.125)
    optimizer.param_groups[0][key] = 0.5
    give_gradients(params, 9)
    optimizer.step()
    assert optimizer.iterations == 4


def test_a_tensor_of_a_schedule_that_somebody_fills_is_refused(path: Path) -> None:
    optimizer, _ = trained(path, learning_rate=ExponentialDecay(1.0, 2, 0.5), capturable=True)
    count = optimizer.param_groups[0]["iterations"]
    for each in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        advance(each, 2)  # what it wrote itself is its own, also in a copy
        lr = each.param_groups[0]["lr"]
        assert isinstance(lr, Tensor)
        lr.fill_(7.0)
        before = snapshot(each)
        with pytest.raises(
            RuntimeError, match=r"group 0 has lr=tensor\(7\.\), but its learning_rate is given by the schedule"
        ):
            each.step()
        assert_unchanged(each, before)
    assert optimizer.param_groups[0]["iterations"] is count  # a graph that was captured counts in place
    assert count.item() == 4


def test_a_schedule_and_a_scheduler_of_torch() -> None:
    """Both at once are refused. A scheduler leaves its mark on `step`; a schedule that is set later replaces it."""
    param = Parameter(torch.ones(2))
    optimizer = AdadeltaKeras([param], 1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    param.grad = torch.ones(2)
    optimizer.step()
    scheduler.step()
    optimizer.learning_rate = ExponentialDecay(1.0, 1, 0.5)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    scheduler.step()
    with pytest.raises(RuntimeError, match="which would overwrite that"):
        optimizer.step()
    fresh = AdadeltaKeras([param], ExponentialDecay(1.0, 1, 0.5))
    torch.optim.lr_scheduler.ExponentialLR(fresh, 0.5)
    with pytest.raises(RuntimeError, match=r"a scheduler of torch\.optim is attached too"):
        fresh.step()
    fresh.learning_rate = 0.5
    fresh.step()


def test_a_callable_of_numbers_is_refused_in_a_capture(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """A graph would repeat the number for ever; a Tensor is read by every replay."""
    value: Any = 0.5
    optimizer, _ = trained(path, capturable=True, rho=lambda: value)
    monkeypatch.setattr(sources, "is_capturing", lambda: True)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"the callable .* gives rho as a Python number, which a CUDA graph would"):
        optimizer.step()
    assert_unchanged(optimizer, before)
    value = torch.tensor(0.5)
    optimizer.step()


# ---- What a group is given ------------------------------------------------------------------------------------------


class KerasSchedule:
    """Of another library."""

    def __call__(self, step: Any) -> float:
        return 1.0

    def get_config(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("library", ["keras", "tf_keras", "tensorflow"])
def test_a_schedule_of_keras_is_refused(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setattr(KerasSchedule, "__module__", f"{library}.optimizers")
    with pytest.raises(TypeError, match=rf"learning_rate is a KerasSchedule of {library}, which computes with .* Use"):
        AdadeltaKeras([Parameter(torch.zeros(1))], KerasSchedule())


@pytest.mark.parametrize("name", ["learning_rate", "rho", "epsilon"])
def test_a_class_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a number, a one-element Tensor or a callable, got the class"):
        AdadeltaKeras([Parameter(torch.zeros(1))], **{name: Counting})


@pytest.mark.parametrize("value", [-1.0, math.nan, "0.5", torch.ones(2), True, None])
@pytest.mark.parametrize("name", ["learning_rate", "rho"])
def test_what_a_callable_returns_is_checked(path: Path, name: str, value: Any) -> None:
    optimizer, _ = trained(path, steps=1)
    setattr(optimizer, name, lambda: value)
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError), match=name):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_a_checkpoint_names_what_it_cannot_hold() -> None:
    """Of a schedule it holds the configuration as it is now; the optimizer that loads it has been given the rest."""
    schedule = ExponentialDecay(1.0, 2, 0.5)

    def made(**options: Any) -> AdadeltaKeras:
        return AdadeltaKeras([Parameter(torch.zeros(1))], **options)

    optimizer = made(learning_rate=schedule, rho=lambda: 0.5, gradient_aggregator=lambda pairs: pairs)
    assert optimizer.param_groups[0]["callables"] == ["gradient_aggregator", "rho"]
    schedule.decay_rate = 0.25
    saved = optimizer.state_dict()
    (group,) = saved["param_groups"]
    assert group["schedule"]["config"]["decay_rate"] == 0.25
    assert group["callables"] == ["gradient_aggregator", "rho"]
    options: dict[str, Any] = {"rho": lambda: 0.5, "gradient_aggregator": lambda pairs: pairs}
    for missing, error in (
        ("rho", "was saved with a callable for rho, and functions are not saved: set optimizer.rho first"),
        ("gradient_aggregator", "was saved with gradient_aggregator, and functions are not saved"),
    ):
        other = made(**{key: value for key, value in options.items() if key != missing})
        before = snapshot(other)
        with pytest.raises(ValueError, match=error):
            other.load_state_dict(copy.deepcopy(saved))
        assert_unchanged(other, before)
    other = made(**options)
    other.load_state_dict(copy.deepcopy(saved))
    assert other.learning_rate.get_config() == schedule.get_config()
    # The schedule that is there stays if it is the same, and one of a class of the user's is made by that class.
    loaded = other.learning_rate
    other.load_state_dict(copy.deepcopy(saved))
    assert other.learning_rate is loaded
    own, custom = made(learning_rate=Counting(0.5)), made(learning_rate=Counting(0.25))
    own.load_state_dict(custom.state_dict())
    assert type(own.learning_rate) is Counting
    assert own.learning_rate.value == 0.25
    with pytest.raises(
        ValueError, match=r"the schedule to load cannot be made: .*; set optimizer\.learning_rate first"
    ):
        made().load_state_dict(custom.state_dict())
    optimizer.learning_rate = type("Unknown", (LearningRateSchedule,), {"__call__": lambda self, step: 0.5})()
    assert optimizer.state_dict()["param_groups"][0]["schedule"] is None
    assert optimizer.param_groups[0]["callables"] == ["gradient_aggregator", "rho", "learning_rate"]
    optimizer.learning_rate, optimizer.rho = 0.5, 0.5
    assert (optimizer.param_groups[0]["schedule"], optimizer.param_groups[0]["callables"]) == (
        None,
        ["gradient_aggregator"],
    )


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies_go_on_by_their_own_sources(path: Path, how: str) -> None:
    optimizer, _ = trained(path, learning_rate=schedules.InverseTimeDecay(1.0, 1, 0.5))
    copied: Any = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}
    if how == "state_dict":
        other = AdadeltaKeras(
            [{"params": [Parameter(p.detach().clone()) for p in g["params"]]} for g in optimizer.param_groups],
            **path.options,
        )
        other.load_state_dict(optimizer.state_dict())
    else:
        other = copied[how](optimizer)
    for each in (optimizer, other):
        advance(each, 2, seed=5)
    assert_same_training(optimizer, other)
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == float(np.float32(0.4))
    other.learning_rate = 0.125
    assert optimizer.learning_rate is not other.learning_rate
    advance(optimizer)
    assert optimizer.param_groups[1]["lr"] != 0.125


@pytest.mark.parametrize("value", [0.25, torch.tensor(0.25)], ids=["number", "Tensor"])
def test_an_interrupted_write_is_nobody_elses(value: Any) -> None:
    class Interrupted(sources.Source):
        def record(self, value: Any) -> None:
            if hasattr(self, "_written"):
                raise KeyboardInterrupt
            super().record(value)

    source, group = Interrupted("rho", lambda: value, 0.5), {"rho": 0.5}
    with pytest.raises(KeyboardInterrupt):
        sources.write([sources.GroupWrite(group, "rho", value, source)])
    assert group["rho"] is value
    assert not source.is_overwritten(value)
    assert source.is_overwritten(torch.tensor(0.25))
    assert source.is_overwritten(0.125)


# ---- Groups that come and go ----------------------------------------------------------------------------------------


def test_a_group_that_is_removed_is_gone() -> None:
    """Each of the others keeps its own sources."""
    params = [Parameter(torch.ones(2)) for _ in range(3)]
    schedule = ExponentialDecay(1.0, 1, 0.5)
    optimizer = AdadeltaKeras([{"params": [params[0]], "lr": 0.5}, {"params": [params[1]]}], schedule)
    optimizer.add_param_group({"params": [params[2]], "lr": 0.25, "rho": lambda: 0.5})
    del optimizer.param_groups[0]
    assert len(optimizer.state_dict()["param_groups"]) == 2
    assert optimizer.learning_rate is schedule
    for p in params:
        p.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.iterations == 1
    assert params[0].tolist() == [1.0, 1.0]
    assert [(group["lr"], group["rho"]) for group in optimizer.param_groups] == [(1.0, 0.95), (0.25, 0.5)]
    optimizer.param_groups.append({"params": [params[0]], "lr": 1.0})
    with pytest.raises(RuntimeError, match="param_groups was changed from outside; use add_param_group"):
        optimizer.state_dict()


def test_a_new_group_gets_the_sources_of_the_optimizer(path: Path) -> None:
    optimizer, _ = trained(path, learning_rate=ExponentialDecay(1.0, 2, 0.5), rho=lambda: 0.5)
    optimizer.add_param_group({"params": [Parameter(torch.zeros(5))]})
    optimizer.add_param_group({"params": [Parameter(torch.zeros(5))], "lr": 0.25, "rho": lambda: 0.75})
    assert optimizer.param_groups[2]["lr"] == 0.5  # as of this step
    advance(optimizer)
    assert [(g["lr"], g["rho"]) for g in optimizer.param_groups] == [(0.5, 0.5)] * 3 + [(0.25, 0.75)]


def test_a_group_that_is_restored_under_a_schedule(path: Path) -> None:
    optimizer, params = trained(path)
    optimizer.learning_rate = ExponentialDecay(1.0, 2, 0.5)
    optimizer.add_param_group({"params": [Parameter(torch.zeros(5))], "rho": lambda: 0.75})
    optimizer.step()
    saved = [{k: copy.deepcopy(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    give_gradients(params, 3)
    optimizer.step()
    for group, was in zip(optimizer.param_groups, saved, strict=True):
        group.update(was)
    for param in optimizer.param_groups[2]["params"]:
        param.grad = torch.ones(5)
    optimizer.step()
    assert optimizer.iterations == 4
    assert optimizer.param_groups[2]["rho"] == 0.75  # of its own callable
    optimizer.param_groups[0] = dict(optimizer.param_groups[0])
    with pytest.raises(RuntimeError, match="param_groups was changed from outside"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"rho": lambda: 0.9}, "was saved with a callable for rho, and functions are not saved"),
        ({"gradient_aggregator": lambda pairs: pairs}, "was saved with gradient_aggregator, and functions are not"),
    ],
    ids=["callable", "aggregator"],
)
def test_a_checkpoint_written_past_load_state_dict(options: dict[str, Any], error: str) -> None:
    """As ZeroRedundancyOptimizer does it: what cannot be taken over is said, not ignored."""
    params = [Parameter(torch.ones(2)) for _ in range(2)]
    saved = AdadeltaKeras([params[0]], **options).state_dict()["param_groups"][0]
    optimizer = AdadeltaKeras([params[1]])
    optimizer.param_groups[0].update({key: value for key, value in saved.items() if key != "params"})
    params[1].grad = torch.ones(2)
    with pytest.raises(ValueError, match=error):
        optimizer.step()
    assert params[1].tolist() == [1.0, 1.0]


def test_a_schedule_written_past_load_state_dict_is_used() -> None:
    saved = AdadeltaKeras([Parameter(torch.ones(2))], ExponentialDecay(1.0, 1, 0.5)).state_dict()
    optimizer = AdadeltaKeras([Parameter(torch.ones(2))])
    group = {key: value for key, value in saved["param_groups"][0].items() if key not in ("params", "callables")}
    optimizer.param_groups[0].update({**group, "iterations": 2})
    advance(optimizer)
    assert [optimizer.param_groups[0][key] for key in ("lr", "iterations", "decay")] == [0.25, 3, 0.0]
    assert isinstance(optimizer.learning_rate, ExponentialDecay)
