"""Checkpoints and copies of optimizers with schedules and callables."""

import copy
from typing import Any

import pytest
import torch
from cases import Path, assert_unchanged, snapshot
from keras_training import (
    EVERYTHING,
    Counting,
    WithoutConfig,
    advance,
    assert_same_training,
    make_params,
    saved,
)
from torch.nn import Parameter
from training import path as path

from torch_adadelta import AdadeltaKeras
from torch_adadelta.schedules import ExponentialDecay, PolynomialDecay


@pytest.mark.parametrize("capturable", [False, True])
def test_all_of_it_survives_a_checkpoint(path: Path, capturable: bool) -> None:
    one = AdadeltaKeras(make_params(), **EVERYTHING, capturable=capturable, **path.options)
    advance(one, 3)
    other = AdadeltaKeras([Parameter(p.detach().clone()) for p in one.param_groups[0]["params"]], **path.options)
    other.load_state_dict(saved(one))
    assert other.get_config() == one.get_config()
    assert isinstance(other.learning_rate, ExponentialDecay)
    assert one.param_groups[0].keys() == other.param_groups[0].keys() == one.state_dict()["param_groups"][0].keys()
    advance(one, 3, first=3)
    advance(other, 3, first=3)
    assert_same_training(one, other)
    assert other.iterations == 6


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("gradient_aggregator", list),
        ("gradient_transformers", [list]),
        ("rho", lambda: 0.9),
        ("epsilon", lambda: 0.1),
        ("learning_rate", lambda: 0.5),
        ("learning_rate", WithoutConfig()),
    ],
)
def test_what_is_not_saved_must_be_given_again(path: Path, option: str, value: Any) -> None:
    one = AdadeltaKeras(make_params(), **{option: value}, **path.options)
    advance(one, 2)
    state = saved(one)
    assert state["param_groups"][0]["callables"] == [option]
    other = AdadeltaKeras(make_params(), **path.options)
    before = snapshot(other)
    with pytest.raises(ValueError, match=rf"was saved with .*{option}.* not saved: set optimizer.{option} first"):
        other.load_state_dict(state)
    assert_unchanged(other, before)
    setattr(other, option, value)
    other.load_state_dict(state)
    assert getattr(other, option) == value
    with torch.no_grad():
        for p, q in zip(one.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
            q.copy_(p)
    advance(one, 2, first=3)
    advance(other, 2, first=3)
    assert_same_training(one, other)


def test_a_checkpoint_without_a_schedule_replaces_one(path: Path) -> None:
    one = AdadeltaKeras(make_params(), 0.5, **path.options)
    other = AdadeltaKeras(make_params(), ExponentialDecay(1.0, 2, 0.5), gradient_aggregator=list, **path.options)
    advance(one, 1)
    other.load_state_dict(saved(one))
    assert other.learning_rate == 0.5
    assert other.gradient_aggregator is list  # a function is no part of a checkpoint


def test_groups_have_their_own_schedules(path: Path) -> None:
    params = make_params((3,), (3,), (3,))
    one = AdadeltaKeras(
        [
            {"params": params[:1]},
            {"params": params[1:2], "learning_rate": PolynomialDecay(1.0, 5)},
            {"params": params[2:], "lr": 0.1},
        ],
        ExponentialDecay(0.5, 3, 0.7),
        **path.options,
    )
    assert [group["lr"] for group in one.param_groups] == [0.5, 1.0, 0.1]
    advance(one, 2)
    copies = [[Parameter(p.detach().clone())] for p in params]
    other = AdadeltaKeras([{"params": p} for p in copies], **path.options)
    other.load_state_dict(saved(one))
    advance(one, 2, first=2)
    advance(other, 2, first=2)
    assert_same_training(one, other)
    assert [group["lr"] for group in other.param_groups] == [group["lr"] for group in one.param_groups]
    one.add_param_group({"params": [Parameter(torch.ones(2))]})
    assert one.param_groups[3]["lr"] == ExponentialDecay(0.5, 3, 0.7)(4)


def test_the_groups_of_one_optimizer_make_another(path: Path) -> None:
    one = AdadeltaKeras(make_params(), ExponentialDecay(0.5, 3, 0.7), **path.options)
    advance(one, 2)
    groups = [dict(group) for group in one.param_groups]
    other = AdadeltaKeras(groups, **path.options)
    assert isinstance(other.learning_rate, ExponentialDecay)
    assert other.iterations == 2


def test_what_changed_in_a_schedule_is_saved_and_copied(path: Path) -> None:
    schedule = Counting()
    optimizer = AdadeltaKeras(make_params(), schedule, **path.options)
    advance(optimizer, 3)
    assert optimizer.state_dict()["param_groups"][0]["schedule"]["config"] == {"calls": schedule.calls}
    assert copy.deepcopy(optimizer).learning_rate.calls == schedule.calls
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.learning_rate is schedule


def test_the_dictionaries_of_groups_stay_the_users(path: Path) -> None:
    def rate() -> float:
        return 0.5

    groups = [{"params": make_params((3,)), "lr": rate}, {"params": make_params((3,)), "learning_rate": 0.25}]
    for _ in range(2):
        optimizer = AdadeltaKeras(groups, lambda: 1.0, **path.options)
        assert optimizer.learning_rate is rate
        assert optimizer.param_groups[1]["lr"] == 0.25
        advance(optimizer, 1)
        assert optimizer.iterations == 1
    assert groups[0].keys() == {"params", "lr"}
