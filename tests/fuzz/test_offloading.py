"""State and parameters that are moved, replaced or cleared between steps: right, or a clear error, never stale."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Path, assert_same_bits, assert_unchanged, snapshot
from torch import Tensor, nn
from torch.nn import Parameter

from torch_adadelta import AdadeltaKeras, schedules

OPTIONS: dict[str, dict[str, Any]] = {"plain": {}, "clipnorm": {"clipnorm": 0.5}, "decay": {"decay": 0.5}}


class Training:
    def __init__(self, path: Path, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        self.model.to(dtype)
        self.optimizer = AdadeltaKeras(self.model.parameters(), 1.0, **options, **path.options)

    def take(self, step: int) -> None:
        for i, p in enumerate(self.model.parameters()):
            generator = torch.Generator().manual_seed(10 * step + i)
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        self.optimizer.step()

    def everything(self) -> list[Tensor]:
        params = list(self.model.parameters())
        return [*params, *(t for p in params for t in self.optimizer.state[p].values())]


def assert_same_training(one: Training, other: Training) -> None:
    for index, (actual, expected) in enumerate(zip(one.everything(), other.everything(), strict=True)):
        assert_same_bits(actual, expected, str(index))
    assert one.optimizer.iterations == other.optimizer.iterations


def move_state_away_and_back(training: Training) -> None:
    """As an offloading framework does: storage freed, other tensors in the end."""
    for state in training.optimizer.state.values():
        for key, tensor in state.items():
            kept = tensor.clone()
            tensor.untyped_storage().resize_(0)
            state[key] = kept


def replace_state_dicts(training: Training) -> None:
    for param, state in list(training.optimizer.state.items()):
        training.optimizer.state[param] = {key: state[key].clone() for key in reversed(state)}


def reorder_state(training: Training) -> None:
    entries = list(training.optimizer.state.items())
    training.optimizer.state.clear()
    training.optimizer.state.update(reversed(entries))


def non_contiguous_state(training: Training) -> None:
    for state in training.optimizer.state.values():
        for key, tensor in state.items():
            state[key] = torch.stack([tensor, tensor], dim=-1)[..., 0]


def swap_data(training: Training) -> None:
    for p in training.model.parameters():
        p.data = p.data.clone()


def swap_tensors(training: Training) -> None:
    for p in training.model.parameters():
        state = training.optimizer.state.pop(p)
        p.grad = None
        other = Parameter(p.detach().clone())
        torch.utils.swap_tensors(p, other)
        training.optimizer.state[p] = state


def to_and_back(training: Training) -> None:
    """Two conversions that lose nothing; `.to()` replaces the data of the same parameters."""
    training.model.double().float()


def load_own_state_dict(training: Training) -> None:
    training.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))


HARMLESS: tuple[Callable[[Training], None], ...] = (
    move_state_away_and_back,
    replace_state_dicts,
    reorder_state,
    non_contiguous_state,
    swap_data,
    swap_tensors,
    to_and_back,
    load_own_state_dict,
)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("change", HARMLESS, ids=lambda f: f.__name__)
def test_changes_that_keep_the_values_change_nothing(
    path: Path, change: Callable[[Training], None], options: dict[str, Any]
) -> None:
    changed, plain = Training(path, options), Training(path, options)
    for step in range(4):
        for training in (changed, plain):
            training.take(step)
        change(changed)
    for training in (changed, plain):
        training.take(4)
    assert_same_training(changed, plain)


def test_cleared_state_begins_anew(path: Path) -> None:
    training = Training(path, {})
    training.take(0)
    training.optimizer.state.clear()
    fresh = Training(path, {})
    fresh.model.load_state_dict(training.model.state_dict())
    fresh.optimizer.iterations = 1
    for each in (training, fresh):
        each.take(1)
    assert_same_training(training, fresh)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_state_dict_of_another_dtype_is_cast(path: Path, dtype: torch.dtype) -> None:
    source, target = Training(path, {}, dtype), Training(path, {})
    source.take(0)
    target.optimizer.load_state_dict(source.optimizer.state_dict())
    for p, q in zip(target.model.parameters(), source.model.parameters(), strict=True):
        for key, state in target.optimizer.state[p].items():
            assert_same_bits(state, source.optimizer.state[q][key].float())
    target.take(1)
    assert target.optimizer.iterations == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.model.double(), r"has dtype torch\.float64, but its state square_avg has dtype torch\.float32"),
        (lambda t: t.model.bfloat16(), r"has dtype torch\.bfloat16, but its state square_avg has dtype torch\.float32"),
        (lambda t: t.optimizer.state[t.model[0].weight].pop("acc_delta"), "its state holds .*square_avg.*, not"),
        (
            lambda t: t.optimizer.state[t.model[0].weight].update(acc_delta=torch.zeros(2, 2)),
            r"has shape \(4, 5\), but its state acc_delta has shape \(2, 2\)",
        ),
        (
            lambda t: t.optimizer.state[t.model[0].weight].update(acc_delta=torch.zeros(4, 5, device="meta")),
            "is on cpu, but its state acc_delta is on meta",
        ),
        (lambda t: t.optimizer.state[t.model[0].weight].update(acc_delta=None), "its state acc_delta is None"),
    ],
    ids=["double", "bfloat16", "missing", "shape", "device", "none"],
)
def test_state_that_does_not_fit_is_an_error(path: Path, change: Callable[[Training], Any], message: str) -> None:
    training = Training(path, {})
    training.take(0)
    change(training)
    for p in training.model.parameters():
        p.grad = torch.ones_like(p)
    before = snapshot(training.optimizer)
    with pytest.raises(RuntimeError, match=message):
        training.optimizer.step()
    assert_unchanged(training.optimizer, before)


# ---- Groups ---------------------------------------------------------------------------------------------------------


def test_a_group_that_is_removed_is_gone() -> None:
    params = [Parameter(torch.ones(2)) for _ in range(3)]
    schedule = schedules.ExponentialDecay(1.0, 1, 0.5)
    optimizer = AdadeltaKeras([{"params": [params[0]], "lr": 0.5}, {"params": [params[1]]}], schedule)
    optimizer.add_param_group({"params": [params[2]], "lr": 0.25})
    del optimizer.param_groups[0]
    assert len(optimizer.state_dict()["param_groups"]) == 2
    assert optimizer.learning_rate is schedule
    for p in params:
        p.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.iterations == 1
    assert params[0].tolist() == [1.0, 1.0]
    assert optimizer.param_groups[1]["lr"] == 0.25
    optimizer.param_groups.append({"params": [params[0]], "lr": 1.0})
    with pytest.raises(RuntimeError, match="param_groups was changed from outside; use add_param_group"):
        optimizer.state_dict()


def test_a_schedule_after_a_scheduler_of_torch() -> None:
    """A scheduler leaves its mark on `step` for ever; a schedule that is set later replaces it all the same."""
    param = Parameter(torch.ones(2))
    optimizer = AdadeltaKeras([param], 1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    param.grad = torch.ones(2)
    optimizer.step()
    scheduler.step()
    optimizer.learning_rate = schedules.ExponentialDecay(1.0, 1, 0.5)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    scheduler.step()
    with pytest.raises(RuntimeError, match="which would overwrite that"):
        optimizer.step()
    fresh = AdadeltaKeras([param], schedules.ExponentialDecay(1.0, 1, 0.5))
    torch.optim.lr_scheduler.ExponentialLR(fresh, 0.5)
    with pytest.raises(RuntimeError, match=r"a scheduler of torch\.optim is attached too"):
        fresh.step()


def test_a_checkpoint_written_past_load_state_dict() -> None:
    """As ZeroRedundancyOptimizer does it: what cannot be taken over is said, not ignored."""
    params = [Parameter(torch.ones(2)) for _ in range(2)]
    saved = AdadeltaKeras([params[0]], rho=lambda: 0.9).state_dict()["param_groups"][0]
    optimizer = AdadeltaKeras([params[1]])
    optimizer.param_groups[0].update({key: value for key, value in saved.items() if key != "params"})
    params[1].grad = torch.ones(2)
    with pytest.raises(ValueError, match="was saved with a callable for rho, and functions are not saved"):
        optimizer.step()
    assert params[1].tolist() == [1.0, 1.0]
