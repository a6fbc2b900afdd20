"""What PyTorch and its users do with parameters and state of an optimizer: lazy modules, resets, keys of others, `.to()`."""

import copy
import io
import pickle
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import pytest
import torch
from cases import Path, assert_like_oracle, assert_same_bits, assert_unchanged, oracle_of, snapshot
from torch import nn
from torch.nn import Parameter

from torch_adadelta import AdadeltaKeras

# ---- Lazy modules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"clipvalue": 1.0}, {"capturable": True}, {"global_clipnorm": 1.0}], ids=str)
@pytest.mark.parametrize("is_added", [False, True], ids=["constructor", "add_param_group"])
def test_a_lazy_parameter_steps_once_it_is_materialised(path: Path, options: dict[str, Any], is_added: bool) -> None:
    module, twin = nn.LazyLinear(3, bias=False), nn.Linear(4, 3, bias=False)
    other = Parameter(torch.ones(2))
    lazy = list(module.parameters())
    optimizer = AdadeltaKeras([other] if is_added else [other, *lazy], 1.0, **options, **path.options)
    if is_added:
        optimizer.add_param_group({"params": lazy, "rho": 0.5})
    copy.deepcopy(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    other.grad = torch.ones(2)
    optimizer.step()  # the lazy one has no gradient yet
    assert optimizer.iterations == 1
    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    module(x)
    with torch.no_grad():
        module.weight.copy_(twin.weight)
    groups: Any = [{"params": [other]}, {"params": twin.parameters(), "rho": 0.5 if is_added else 0.95}]
    expected = AdadeltaKeras(groups, 1.0, **options, **path.options)
    expected.iterations = 1
    other.grad = None
    for step in range(2):
        for model in (module, twin):
            model.zero_grad()
            (model(x).square().sum() * (step + 1)).backward()
        optimizer.step()
        expected.step()
    assert_same_bits(module.weight, twin.weight.detach())
    for key in ("square_avg", "acc_delta"):
        assert_same_bits(optimizer.state[module.weight][key], expected.state[twin.weight][key], key)


def test_what_can_be_checked_of_a_lazy_parameter_is() -> None:
    module = nn.LazyLinear(3, dtype=torch.float64)
    module.weight.data = module.weight.data.to(torch.complex128)
    with pytest.raises(
        ValueError, match=r"parameter 0 of group 0 has dtype torch\.complex128, and clipvalue=1\.0 is for"
    ):
        AdadeltaKeras(module.parameters(), clipvalue=1.0)


# ---- A reset --------------------------------------------------------------------------------------------------------


def trained(path: Path, **options: Any) -> AdadeltaKeras:
    optimizer = AdadeltaKeras([Parameter(torch.zeros(3))], 1.0, **options, **path.options)
    for _ in range(2):
        optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
        optimizer.step()
    return optimizer


def test_a_part_of_what_is_restored_may_be_left_out(path: Path) -> None:
    optimizer = trained(path, rho=lambda: 0.9)
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
    optimizer = trained(path)
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
    optimizer = trained(path)
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
    optimizer = trained(path)
    (param,) = optimizer.param_groups[0]["params"]
    optimizer.state[param]["slow"] = slow = torch.ones(3)
    optimizer.set_weights(optimizer.get_weights())
    assert optimizer.state[param]["slow"] is slow


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


def test_what_is_loaded_is_copied(path: Path) -> None:
    optimizer = trained(path)
    saved = optimizer.state_dict()
    other = AdadeltaKeras([Parameter(torch.zeros(3))], 1.0, **path.options)
    other.load_state_dict(saved)
    before = copy.deepcopy(saved)
    (param,) = other.param_groups[0]["params"]
    param.grad = torch.ones(3)
    other.step()
    for key in ("square_avg", "acc_delta"):
        assert_same_bits(saved["state"][0][key], before["state"][0][key], key)
        assert (other.state[param][key] != before["state"][0][key]).all()


def test_what_is_restored_past_load_state_dict_is_copied(path: Path) -> None:
    optimizer = trained(path)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    other = AdadeltaKeras([Parameter(torch.zeros(3))], 1.0, **path.options)
    torch.optim.Optimizer.load_state_dict(other, saved)
    other.param_groups[0]["params"][0].grad = torch.ones(3)
    other.step()
    for key in ("square_avg", "acc_delta"):
        assert_same_bits(saved["state"][0][key], before["state"][0][key], key)


def test_a_numpy_scalar_keeps_its_precision_in_a_checkpoint(path: Path) -> None:
    optimizer = trained(path, rho=np.float64(0.95), decay=np.float32(0.25))
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_lines_that_convert_the_state_work(path: Path, dtype: torch.dtype) -> None:
    model = nn.Linear(3, 2)
    optimizer = AdadeltaKeras(model.parameters(), 1.0, **path.options)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    model.to(dtype)
    model.zero_grad()
    model(torch.ones(1, 3, dtype=dtype)).sum().backward()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 has dtype .*Convert the state too:") as raised:
        optimizer.step()
    assert_unchanged(optimizer, before)
    lines = [line.removeprefix("    ") for line in str(raised.value).split("\n")[1:]]
    exec("\n".join(lines), {"optimizer": optimizer})
    optimizer.step()
    assert optimizer.iterations == 2
    assert {tensor.dtype for state in optimizer.state.values() for tensor in state.values()} == {dtype}


# ---- Two names of the learning rate ---------------------------------------------------------------------------------


def test_lr_wins_with_a_warning_that_names_both_values() -> None:
    param = Parameter(torch.zeros(1))
    with pytest.warns(UserWarning, match=r"lr=0\.1 is used, not learning_rate=0\.5"):
        optimizer = AdadeltaKeras([param], learning_rate=0.5, lr=0.1)
    assert optimizer.learning_rate == 0.1
    with pytest.warns(UserWarning, match=r"lr=0\.1 is used, not learning_rate=0\.2"):
        optimizer = AdadeltaKeras([{"params": [param], "lr": 0.1, "learning_rate": 0.2}])
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert "learning_rate" not in optimizer.param_groups[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdadeltaKeras([param], lr=0.1)
        AdadeltaKeras([param], learning_rate=0.1, lr=0.1)
        AdadeltaKeras([{"params": [param], "learning_rate": 0.2}])
