"""What is saved, restored and copied: checkpoints of this and other optimizers, resets, and the keys of others."""

import copy
import io
import pickle
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import pytest
import torch
from cases import Path, assert_like_oracle, assert_same_bits, assert_unchanged, oracle_of, snapshot
from torch.nn import Parameter
from training import advance, assert_same_training, stepped
from training import path as path

from torch_adadelta import AdadeltaKeras

# ---- Lazy modules ---------------------------------------------------------------------------------------------------


# ---- A reset --------------------------------------------------------------------------------------------------------


def after_two_steps(path: Path, **options: Any) -> AdadeltaKeras:
    optimizer = AdadeltaKeras([Parameter(torch.zeros(3))], 1.0, **options, **path.options)
    for _ in range(2):
        optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
        optimizer.step()
    return optimizer


def test_a_part_of_what_is_restored_may_be_left_out(path: Path) -> None:
    optimizer = after_two_steps(path, rho=lambda: 0.9)
    (param,) = optimizer.param_groups[0]["params"]
    with torch.no_grad():
        param.zero_()
    optimizer.__setstate__({"state": defaultdict(dict)})  # the idiom by which people reset an optimizer
    assert optimizer.iterations == 2
    assert not optimizer.state
    optimizer.__setstate__({})
    optimizer.__setstate__({"param_groups": optimizer.param_groups})
    oracle = oracle_of(param, learning_rate=1.0, rho=0.9)
    for _ in range(2):
        optimizer.step()
        oracle.step(np.ones(3, dtype=np.float32))
    assert_like_oracle(param, optimizer.state[param], oracle)
    assert optimizer.iterations == 4


def test_a_part_that_does_not_fit_changes_nothing(path: Path) -> None:
    optimizer = after_two_steps(path)
    (param,) = optimizer.param_groups[0]["params"]
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="parameter 0 of group 0: its state must hold square_avg and acc_delta"):
        optimizer.__setstate__({"state": {param: {"square_avg": torch.zeros(3)}}})
    assert_unchanged(optimizer, before)


# ---- Keys of others -------------------------------------------------------------------------------------------------


def by_checkpoint(optimizer: AdadeltaKeras) -> AdadeltaKeras:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other = AdadeltaKeras([Parameter(torch.zeros(3))], 1.0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other


COPIES: dict[str, Callable[[AdadeltaKeras], AdadeltaKeras]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "load_state_dict": by_checkpoint,
}


@pytest.mark.parametrize("how", COPIES)
def test_what_others_keep_in_the_state_comes_along(path: Path, how: str) -> None:
    """As Lookahead keeps its slow weights there. Values keep their dtype, which torch.optim would cast."""
    optimizer = after_two_steps(path)
    (param,) = optimizer.param_groups[0]["params"]
    slow = torch.full((3,), 1 / 3, dtype=torch.float64)
    optimizer.state[param] |= {"slow": slow, "counts": [torch.tensor(7), {"steps": 3}]}
    copied = COPIES[how](optimizer)
    (state,) = copied.state.values()
    assert state.keys() == {"square_avg", "acc_delta", "slow", "counts"}
    assert_same_bits(state["slow"], slow)
    assert state["counts"] == [torch.tensor(7), {"steps": 3}]
    state["slow"].zero_()
    state["counts"][0].zero_()
    assert_same_bits(slow, torch.full((3,), 1 / 3, dtype=torch.float64))
    assert optimizer.state[param]["counts"][0] == 7
    for each in (optimizer, copied):
        (each_param,) = each.param_groups[0]["params"]
        each_param.grad = torch.ones(3)
        each.step()
    for key in ("square_avg", "acc_delta"):
        assert_same_bits(state[key], optimizer.state[param][key], key)


def test_what_others_keep_does_not_stand_for_state(path: Path) -> None:
    param = Parameter(torch.zeros(3))
    optimizer = AdadeltaKeras([param], 1.0, **path.options)
    entry = optimizer.state[param]
    entry["slow"] = slow = torch.ones(3)
    assert [weight.tolist() for weight in optimizer.get_weights()] == [0, [0.0] * 3, [0.0] * 3]
    param.grad = torch.ones(3)
    param.grad.data = torch.ones(4)
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 has shape"):
        optimizer.step()
    assert optimizer.state[param] is entry
    assert entry == {"slow": slow}
    param.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[param] is entry
    assert entry.keys() == {"slow", "square_avg", "acc_delta"}
    assert entry["slow"] is slow
    del entry["acc_delta"]
    with pytest.raises(RuntimeError, match=r"its state holds \['slow', 'square_avg'\], not square_avg and acc_delta"):
        optimizer.step()


def test_the_keys_of_others_survive_in_weights(path: Path) -> None:
    optimizer = after_two_steps(path)
    (param,) = optimizer.param_groups[0]["params"]
    optimizer.state[param]["slow"] = slow = torch.ones(3)
    optimizer.set_weights(optimizer.get_weights())
    assert optimizer.state[param]["slow"] is slow


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


def test_what_is_loaded_is_copied(path: Path) -> None:
    optimizer = after_two_steps(path)
    optimizer.state[optimizer.param_groups[0]["params"][0]]["slow"] = torch.ones(3)
    saved = optimizer.state_dict()
    other = AdadeltaKeras([Parameter(torch.zeros(3))], 1.0, **path.options)
    other.load_state_dict(saved)
    before = copy.deepcopy(saved)
    (param,) = other.param_groups[0]["params"]
    param.grad = torch.ones(3)
    other.step()
    other.state[param]["slow"].zero_()
    for key in ("square_avg", "acc_delta", "slow"):
        assert_same_bits(saved["state"][0][key], before["state"][0][key], key)
        assert (other.state[param][key] != before["state"][0][key]).all()


def test_what_is_restored_past_load_state_dict_is_copied(path: Path) -> None:
    optimizer = after_two_steps(path)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    other = AdadeltaKeras([Parameter(torch.zeros(3))], 1.0, **path.options)
    torch.optim.Optimizer.load_state_dict(other, saved)
    other.param_groups[0]["params"][0].grad = torch.ones(3)
    other.step()
    for key in ("square_avg", "acc_delta"):
        assert_same_bits(saved["state"][0][key], before["state"][0][key], key)


def test_a_numpy_scalar_keeps_its_precision_in_a_checkpoint(path: Path) -> None:
    optimizer = after_two_steps(path, rho=np.float64(0.95), decay=np.float32(0.25))
    copied = by_checkpoint(optimizer)
    assert copied.rho.dtype is torch.float64
    assert copied.rho.item() == 0.95
    assert copied.decay == 0.25


@pytest.mark.parametrize("name", ["plain", "schedule", "clipped", "capturable"])
def test_a_checkpoint_of_version_0_1_goes_on_with_the_same_bits(path: Path, name: str) -> None:
    """checkpoints_0_1.pt holds parameters and state_dict after three steps of that version, and after two more."""
    saved = torch.load(FilePath(__file__).with_name("data") / "checkpoints_0_1.pt", weights_only=True)[name]
    params = [Parameter(param) for param in saved["params"]]
    optimizer = AdadeltaKeras([{"params": params[:2]}, {"params": params[2:]}], **path.options)
    optimizer.load_state_dict(saved["optimizer"])
    for group in optimizer.param_groups:
        group.update(path.options)
    assert optimizer.iterations == 3
    generator = torch.Generator().manual_seed(2)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn(3, 2, generator=generator).to(param.dtype)
        optimizer.step()
    for param, after, state in zip(params, saved["after"], saved["after_state"], strict=True):
        assert_same_bits(param, after)
        for key in ("square_avg", "acc_delta"):
            assert_same_bits(optimizer.state[param][key], state[key], key)


# ---- Parameters that are converted ----------------------------------------------------------------------------------


# ---- Two names of the learning rate ---------------------------------------------------------------------------------


# ---- state_dict, deepcopy and pickle ---------------------------------------------------------------------------------


def through_state_dict(optimizer: AdadeltaKeras) -> AdadeltaKeras:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    groups = [{"params": [Parameter(p.detach().clone()) for p in g["params"]]} for g in optimizer.param_groups]
    other = AdadeltaKeras(groups, 123.0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(
    "copied",
    [through_state_dict, copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))],
    ids=["state_dict", "deepcopy", "pickle"],
)
def test_copies_train_on_alike(path: Path, copied: Any, capturable: bool) -> None:
    optimizer = stepped(path, rho=0.9, name="mine", maximize=True, capturable=capturable)
    other = copied(optimizer)
    assert_same_training(optimizer, other)
    advance(optimizer, 2)
    assert other.iterations == 3
    advance(other, 2)
    assert_same_training(optimizer, other)
    assert (other.iterations, other.name) == (5, "mine")


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.complex64, torch.complex128),
    ],
    ids=str,
)
def test_loading_casts_the_state_to_the_parameter(path: Path, source: torch.dtype, target: torch.dtype) -> None:
    one, other = (AdadeltaKeras([Parameter(torch.ones(3, dtype=d))], 1.0, **path.options) for d in (source, target))
    advance(one)
    other.load_state_dict(one.state_dict())
    ((_, ours),), ((_, theirs),) = other.state.items(), one.state.items()
    for key in ("square_avg", "acc_delta"):
        assert_same_bits(ours[key], theirs[key].to(target))
    advance(other)
    assert other.iterations == 2


def test_an_older_checkpoint_gets_what_it_lacks(path: Path) -> None:
    optimizer = stepped(path)
    optimizer.norm_variables = [optimizer.param_groups[0]["params"][:2]]
    given = str(optimizer.norm_variables)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["norm_variables"]
        for key in ("iterations", "maximize", "foreach", "fused", "capturable", "differentiable", "optimizer_name"):
            del group[key]
    optimizer.load_state_dict(saved)
    assert optimizer.iterations == 0
    assert optimizer.name == "Adadelta"
    assert str(optimizer.norm_variables) == given
    advance(optimizer)


def test_a_clipvalue_is_not_loaded_for_complex_parameters() -> None:
    saved = AdadeltaKeras([Parameter(torch.ones(2))], clipvalue=0.5).state_dict()
    optimizer = AdadeltaKeras([Parameter(torch.ones(2, dtype=torch.complex64))])
    before = snapshot(optimizer)
    with pytest.raises(
        ValueError, match=r"parameter 0 of group 0 has dtype torch\.complex64, and clipvalue=0\.5 is for"
    ):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("capturable", [False, True])
def test_torch_adadelta_checkpoint(path: Path, capturable: bool) -> None:
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(2)), Parameter(torch.ones(4))]
    theirs = torch.optim.Adadelta([{"params": params[:2], "lr": 0.5}, {"params": params[2:]}], rho=0.8, eps=1e-5)
    for step in range(3):
        params[0].grad = torch.full((3,), step + 1.0)
        params[2].grad = torch.full((4,), step + 2.0) if step > 0 else None
        theirs.step()
    saved = theirs.state_dict()
    before = copy.deepcopy(saved)
    ours = AdadeltaKeras([{"params": params[:2]}, {"params": params[2:]}], capturable=capturable, **path.options)
    ours.load_state_dict(saved)
    assert saved["param_groups"] == before["param_groups"]
    assert ours.iterations == 3
    assert [(g["lr"], g["rho"], g["epsilon"]) for g in ours.param_groups] == [(0.5, 0.8, 1e-5), (1.0, 0.8, 1e-5)]
    assert ours.param_groups[0].keys() == AdadeltaKeras([Parameter(torch.ones(1))]).param_groups[0].keys()
    assert all(path.options[key] == g[key] for g in ours.param_groups for key in path.options)
    assert set(ours.state) == {params[0], params[2]}
    for param in ours.state:
        assert set(ours.state[param]) == {"square_avg", "acc_delta"}
        assert_same_bits(ours.state[param]["square_avg"], theirs.state[param]["square_avg"])
        assert_same_bits(ours.state[param]["acc_delta"], theirs.state[param]["acc_delta"])
    advance(ours)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (
            lambda saved: saved["param_groups"][1].update(eps=1e-6, weight_decay=-0.1),
            r"Invalid weight_decay: -0\.1; it must be a finite number >= 0",
        ),
        (lambda saved: saved["param_groups"][1].update(eps=0), "group 1 .* eps=0, which would mean 1e-7 here"),
        (lambda saved: saved["param_groups"][1].update(lr=-1.0), "Invalid learning_rate: -1.0"),
        (lambda saved: saved["param_groups"][1].update(iterations=4), r"disagree on iterations: \[3, 4\]"),
        (
            lambda saved: saved["param_groups"][1].update(iterations=-4),
            "iterations must be >= 0 and fit 64 bits, got -4",
        ),
        (
            lambda saved: saved["state"][7].update(square_avg=torch.zeros(4)),
            r"parameter 3 of group 1 has shape \(5, 3\)",
        ),
        (
            lambda saved: saved["state"][7].update(acc_delta=torch.zeros(3, 5)),
            r"parameter 3 of group 1 has shape \(5, 3\), but the state acc_delta to load is \(3, 5\)",
        ),
        (
            lambda saved: saved["param_groups"][1].update(clipnorm=0.5),
            r"clipnorm belongs to the whole optimizer, but group 0 has None and group 1 has 0\.5",
        ),
        (
            lambda saved: saved["state"][7].pop("acc_delta"),
            "parameter 3 of group 1: its state must hold square_avg and",
        ),
        (lambda saved: saved["param_groups"].pop(), "different number of parameter groups"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(path: Path, change: Any, error: str) -> None:
    optimizer = stepped(path)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 99.0
    change(saved)
    if any("eps" in group for group in saved["param_groups"]):
        for group in saved["param_groups"]:
            group.setdefault("eps", 1e-6)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=error):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)
