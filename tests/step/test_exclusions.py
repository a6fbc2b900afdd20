"""`exclude_from_weight_decay`: which parameters, what survives, what is refused."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from cases import Path, assert_like_oracle, gradients, to_numpy
from reference.oracle import OracleOptimizer
from torch import nn
from torch.nn import Parameter

from torch_adadelta import AdadeltaKeras
from torch_adadelta.step import exclusions


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def excluded(optimizer: AdadeltaKeras) -> list[Any]:
    return [group[exclusions.KEY] for group in optimizer.param_groups]


def by_pickle(optimizer: AdadeltaKeras) -> AdadeltaKeras:
    return pickle.loads(pickle.dumps(optimizer))


def by_checkpoint(optimizer: AdadeltaKeras) -> AdadeltaKeras:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = AdadeltaKeras(model().parameters(), 1.0, **optimizer.backend)  # type: ignore[attr-defined]
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize(
    "copied", [None, copy.deepcopy, by_pickle, by_checkpoint], ids=["itself", "deepcopy", "pickle", "checkpoint"]
)
def test_excluded_parameters_do_not_decay(path: Path, copied: Any) -> None:
    params = list(model().parameters())
    optimizer = AdadeltaKeras(params, 1.0, weight_decay=0.1, **path.options)
    optimizer.backend = path.options  # type: ignore[attr-defined]
    optimizer.exclude_from_weight_decay([params[0], params[3]])
    oracle = OracleOptimizer(list(map(to_numpy, params)), 1.0, weight_decay=0.1, excluded=[0, 3])
    for step in range(3):
        own = optimizer.param_groups[0]["params"]
        grads = [gradients(param.shape, param.dtype, 1, 10 * step + i)[0] for i, param in enumerate(own)]
        for param, grad in zip(own, grads, strict=True):
            param.grad = grad
        optimizer.step()
        oracle.step(list(map(to_numpy, grads)))
        if copied is not None and step == 1:
            before = optimizer
            optimizer = copied(optimizer)
            for new, old in zip(optimizer.param_groups[0]["params"], own, strict=True):
                new.data.copy_(old.data)
            optimizer.backend = before.backend  # type: ignore[attr-defined]
    for param, expected in zip(optimizer.param_groups[0]["params"], oracle.oracles, strict=True):
        assert_like_oracle(param, optimizer.state[param], expected)


def test_names_are_searched_for_patterns() -> None:
    optimizer = AdadeltaKeras(model().named_parameters(), weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["bias$", "^1"])
    assert excluded(optimizer) == [[1, 2, 3, 5]]
    optimizer.exclude_from_weight_decay(var_names=["2.w"])
    assert excluded(optimizer) == [[4]], "a later call replaces the former"
    optimizer.exclude_from_weight_decay()
    assert excluded(optimizer) == [None]


def test_places_are_those_in_their_group() -> None:
    params = [Parameter(torch.zeros(2)) for _ in range(4)]
    optimizer = AdadeltaKeras([{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.5}])
    optimizer.exclude_from_weight_decay([params[3], params[0]], var_names=[])
    assert excluded(optimizer) == [[0], [1]]
    optimizer.add_param_group({"params": [Parameter(torch.zeros(2))]})
    assert excluded(optimizer) == [[0], [1], None]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"var_list": [torch.zeros(3)]}, ValueError, r"shape \(3,\) that is no parameter of this optimizer"),
        ({"var_names": ["bias"]}, ValueError, "needs names: give the optimizer model.named_parameters"),
        ({"var_list": torch.zeros(3)}, TypeError, "var_list must be a list"),
        ({"var_list": ["bias"]}, TypeError, "var_list must consist of Tensor"),
        ({"var_names": "bias"}, TypeError, "var_names must be a list, got 'bias'"),
        ({"var_names": ["bias", 1]}, TypeError, "var_names must consist of str"),
        ({"var_names": ["("]}, ValueError, r"var_names has '\(', which is no regular expression: missing"),
    ],
)
def test_what_is_refused_changes_nothing(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    param = Parameter(torch.zeros(2))
    optimizer = AdadeltaKeras([param], weight_decay=0.1)
    optimizer.exclude_from_weight_decay([param])
    with pytest.raises(error, match=message):
        optimizer.exclude_from_weight_decay(**arguments)
    assert excluded(optimizer) == [[0]]


def test_not_after_the_first_step() -> None:
    param = Parameter(torch.zeros(2))
    optimizer = AdadeltaKeras([param], weight_decay=0.1)
    param.grad = torch.ones(2)
    optimizer.step()
    with pytest.raises(ValueError, match="before the first step"):
        optimizer.exclude_from_weight_decay([param])


@pytest.mark.parametrize("places", [(0,), [1], [-1], ["0"], [True], 0])
def test_places_that_others_wrote_are_checked(places: Any) -> None:
    param = Parameter(torch.zeros(2))
    optimizer = AdadeltaKeras([param], weight_decay=0.1)
    state_dict = optimizer.state_dict()
    state_dict["param_groups"][0][exclusions.KEY] = places
    with pytest.raises(ValueError, match="group 0 has excluded_from_weight_decay="):
        optimizer.load_state_dict(state_dict)
    param.grad = torch.ones(2)
    optimizer.param_groups[0][exclusions.KEY] = places
    with pytest.raises(ValueError, match="group 0 has excluded_from_weight_decay="):
        optimizer.step()
    assert torch.equal(param, torch.zeros(2))


def test_a_change_takes_effect_at_once() -> None:
    """The partition of the last step is made anew."""
    params = [Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = AdadeltaKeras(params, 1.0, weight_decay=0.5)
    for _ in range(2):
        for param in params:
            param.grad = torch.zeros(2)
        optimizer.step()
    assert [param[0].item() for param in params] == [0.25, 0.25]
    optimizer.param_groups[0][exclusions.KEY] = [1]
    optimizer.step()
    assert [param[0].item() for param in params] == [0.125, 0.25]
