"""The methods of a Keras optimizer: gradients handed over, configuration, weights and slots."""

import copy
import json
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import DTYPES, Path, assert_same_bits, assert_unchanged, dtype_name, randn, snapshot, to_numpy
from keras_training import EVERYTHING, Halving, advance, assert_same_training, make_params, saved, set_gradients
from reference.oracle import OracleOptimizer
from torch import Tensor
from torch.nn import Parameter
from training import path as path

from torch_adadelta import AdadeltaKeras, schedules
from torch_adadelta.schedules import ExponentialDecay

# ---- Gradients handed over ------------------------------------------------------------------------------------------


def test_apply_gradients_is_a_step(path: Path) -> None:
    ours, theirs = (AdadeltaKeras(make_params(), 1.0, clipnorm=0.5, **path.options) for _ in range(2))
    for step in range(3):
        set_gradients(theirs, step)
        params = ours.param_groups[0]["params"]
        pairs = [(q.grad, p) for p, q in zip(params, theirs.param_groups[0]["params"], strict=True)]
        ours.apply_gradients(iter(pairs))
        theirs.step()
        assert all(p.grad is None for p in params)
    assert_same_training(ours, theirs)
    assert ours.iterations == 3


def test_apply_gradients_runs_hooks_and_takes_any_order_over_groups(path: Path) -> None:
    params = make_params((3,), (2,), (4,))
    optimizer = AdadeltaKeras([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}], 1.0, **path.options)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *args: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *args: calls.append("post"))
    grads = [torch.ones(3), torch.ones(2), torch.ones(4)]
    optimizer.apply_gradients([(grads[2], params[2]), (grads[0], params[0]), (grads[1], params[1])])
    assert calls == ["pre", "post"]
    expected = [
        OracleOptimizer([np.float32([1 + i] * len(g))], lr)
        for i, (g, lr) in enumerate(zip(grads, (1.0, 0.5, 0.5), strict=True))
    ]
    for param, grad, oracle in zip(params, grads, expected, strict=True):
        oracle.step([grad.numpy()])
        assert_same_bits(param, oracle.oracles[0].p)


def test_gradients_that_are_none(path: Path) -> None:
    params = make_params()
    optimizer = AdadeltaKeras([("kernel", params[0]), ("bias", params[1])], **path.options)
    with pytest.warns(UserWarning, match=r"Gradients do not exist for variables: .*'bias'"):
        optimizer.apply_gradients([(torch.ones(3), params[0]), (None, params[1])])
    assert optimizer.iterations == 1
    assert params[1] not in optimizer.state
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"No gradients provided for any variable: .*'kernel'.*'bias'"):
        optimizer.apply_gradients([(None, p) for p in params])
    optimizer.apply_gradients([])
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        (lambda p: 3, TypeError, "grads_and_vars must consist of"),
        (lambda p: [p], TypeError, "grads_and_vars must consist of"),
        (
            lambda p: [(1.0, p)],
            TypeError,
            r"tuple 0 of grads_and_vars must be \(Tensor, parameter\), got \(float, Parameter\)",
        ),
        (lambda p: [(torch.ones(3), "p")], TypeError, r"got \(Tensor, str\)"),
        (
            lambda p: [(torch.ones(3), torch.ones(3))],
            ValueError,
            r"a tensor of shape \(3,\) that is no parameter of this",
        ),
        (lambda p: [(torch.ones(4), p)], RuntimeError, r"has shape \(3,\), but its gradient has shape \(4,\)"),
        (lambda p: [(torch.ones(3, dtype=torch.int64), p)], RuntimeError, "gradient has dtype torch.int64"),
    ],
)
def test_malformed_gradients_change_nothing(path: Path, pairs: Any, error: Any, message: str) -> None:
    params = make_params()
    optimizer = AdadeltaKeras(params, **path.options)
    advance(optimizer, 1)
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.apply_gradients(pairs(params[0]))
    assert_unchanged(optimizer, before)
    optimizer.step()  # nothing of the refused call is left
    assert optimizer.iterations == 2


def test_a_parameter_handed_over_twice_is_updated_twice(path: Path) -> None:
    (param,) = make_params((3,))
    optimizer = AdadeltaKeras([param], 1.0, **path.options)
    optimizer.apply_gradients([(torch.full((3,), 2.0), param), (torch.full((3,), -1.0), param)])
    oracle = OracleOptimizer([np.ones(3, np.float32)], 1.0)
    oracle.step([np.full(3, 2.0)])
    oracle.step([np.full(3, -1.0)])
    assert_same_bits(param, oracle.oracles[0].p)
    assert optimizer.iterations == 1


def test_the_aggregator_can_be_left_out(path: Path) -> None:
    calls: list[int] = []

    def aggregate(pairs: Any) -> Any:
        calls.append(len(pairs))
        return pairs

    (param,) = make_params((3,))
    optimizer = AdadeltaKeras([param], gradient_aggregator=aggregate, gradient_transformers=[aggregate], **path.options)
    optimizer.apply_gradients([(torch.ones(3), param)], name="ignored")
    assert calls == [1, 1]
    optimizer.apply_gradients([(torch.ones(3), param)], experimental_aggregate_gradients=False)
    assert calls == [1, 1, 1]


def test_minimize(path: Path) -> None:
    ours, theirs = (AdadeltaKeras(make_params((3,), (3,)), 1.0, **path.options) for _ in range(2))
    x, y = ours.param_groups[0]["params"]

    def loss() -> Tensor:
        return (x * x).sum() + (y * y * y).sum()

    def variables() -> list[Tensor]:
        return [x, y]

    calls: list[Callable[[], None]] = [
        lambda: torch.no_grad()(ours.minimize)(loss, [x, y]),
        lambda: ours.minimize(loss(), (x, y)),
        lambda: ours.minimize(loss, variables),
        lambda: ours.minimize(lambda: x * x + y * y * y, [x, [y]], grad_loss=torch.ones(3)),  # type: ignore[list-item]
        lambda: ours.minimize(lambda: x * x + y * y * y, {"x": x, "y": y}),  # type: ignore[arg-type]
    ]
    for call in calls:
        call()
        p, q = theirs.param_groups[0]["params"]
        theirs.zero_grad()
        ((p * p).sum() + (q * q * q).sum()).backward()
        theirs.step()
        assert x.grad is None
    assert_same_training(ours, theirs)


def test_minimize_refuses_what_it_cannot(path: Path) -> None:
    x, y = make_params((3,), (3,))
    optimizer = AdadeltaKeras([x, y], **path.options)
    with pytest.raises(TypeError, match="must be a Tensor, or a callable that returns one, got float"):
        optimizer.minimize(lambda: 1.0, [x])  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="No gradients provided for any variable"):
        optimizer.minimize(torch.ones(()), [x, y])
    with pytest.warns(UserWarning, match="Gradients do not exist for variables"):
        optimizer.minimize((x * x).sum(), [x, y])
    with pytest.raises(ValueError, match=r"Variable 1 of shape \(3,\) has `None` for gradient"):
        optimizer.get_gradients((x * x).sum(), [x, y])
    (grad,) = optimizer.get_gradients((x * x).sum(), x)
    assert_same_bits(grad, 2 * x.detach())


def test_what_the_users_generator_raises_is_not_replaced(path: Path) -> None:
    (param,) = make_params((3,))

    def broken() -> Any:
        yield torch.ones(3), param
        raise ValueError("mine")

    optimizer = AdadeltaKeras([param], **path.options)
    with pytest.raises(ValueError, match="mine"):
        optimizer.apply_gradients(broken())
    assert optimizer.iterations == 0


def test_gradients_handed_over_inside_a_hook(path: Path) -> None:
    x, y = make_params((3,), (3,))
    optimizer = AdadeltaKeras([x, y], 1.0, **path.options)
    inner = iter([True])

    def hook(*args: Any) -> None:
        if next(inner, False):
            optimizer.apply_gradients([(torch.ones(3), y)])

    optimizer.register_step_pre_hook(hook)
    optimizer.apply_gradients([(torch.ones(3), x)])
    assert optimizer.iterations == 2
    assert_same_bits(optimizer.state[x]["square_avg"], optimizer.state[y]["square_avg"])


# ---- Configuration --------------------------------------------------------------------------------------------------


def test_config_of_every_kind_of_hyperparameter() -> None:
    params = make_params()
    assert AdadeltaKeras(params).get_config() == {
        "name": "Adadelta", "learning_rate": 0.001, "decay": 0.0, "rho": 0.95, "epsilon": 1e-7,
    }  # fmt: skip
    optimizer = AdadeltaKeras(
        params, torch.tensor(0.5), rho=lambda: 0.9, epsilon=1e-3, name="A", decay=0.1, clipvalue=1.0, clipnorm=2.0
    )
    assert optimizer.get_config() == {
        "name": "A", "clipnorm": 2.0, "clipvalue": 1.0, "learning_rate": 0.5, "decay": 0.1, "rho": 0.9, "epsilon": 1e-3,
    }  # fmt: skip
    optimizer = AdadeltaKeras(params, ExponentialDecay(0.5, 3, 0.7), global_clipnorm=3.0)
    assert json.loads(json.dumps(optimizer.get_config())) == {
        "name": "Adadelta",
        "global_clipnorm": 3.0,
        "learning_rate": schedules.serialize(ExponentialDecay(0.5, 3, 0.7)),
        "decay": 0.0,
        "rho": 0.95,
        "epsilon": 1e-7,
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"learning_rate": 0.5, "rho": 0.9, "epsilon": 1e-3, "name": "A", "decay": 0.1, "clipvalue": 1.0},
        {"learning_rate": ExponentialDecay(0.5, 3, 0.7), "clipnorm": 2.0},
        {"global_clipnorm": 2.0},
    ],
)
def test_from_config_makes_the_same_optimizer(path: Path, options: dict[str, Any]) -> None:
    one = AdadeltaKeras(make_params(), **options, **path.options)
    config = one.get_config()
    before = copy.deepcopy(config)
    other = AdadeltaKeras.from_config(config, make_params(), **path.options)
    assert config == before
    assert other.get_config() == config
    advance(one, 3)
    advance(other, 3)
    assert_same_training(one, other)


def test_from_config_takes_what_keras_writes() -> None:
    params = make_params()
    legacy = {"name": "Adadelta", "lr": 0.5, "decay": 0.0, "rho": 0.9, "epsilon": 1e-7, "is_legacy_optimizer": True}
    assert AdadeltaKeras.from_config(legacy, params).learning_rate == 0.5
    keras_3 = {
        "name": "adadelta", "learning_rate": 0.5, "weight_decay": None, "clipnorm": None, "global_clipnorm": 1.0,
        "clipvalue": None, "use_ema": False, "ema_momentum": 0.99, "ema_overwrite_frequency": None,
        "loss_scale_factor": None, "gradient_accumulation_steps": None, "rho": 0.9, "epsilon": 1e-7,
    }  # fmt: skip
    assert AdadeltaKeras.from_config(keras_3, params).global_clipnorm == 1.0
    neutral = {"weight_decay": 0.0, "loss_scale_factor": 1.0, "gradient_accumulation_steps": 1, "jit_compile": True}
    assert AdadeltaKeras.from_config({**keras_3, **neutral}, params).global_clipnorm == 1.0
    optimizer = AdadeltaKeras.from_config(keras_3, params, maximize=True, rho=0.5)
    assert (optimizer.param_groups[0]["maximize"], optimizer.rho, optimizer.learning_rate) == (True, 0.5, 0.5)
    assert AdadeltaKeras.from_config({**keras_3, "weight_decay": 0.1}, params).weight_decay == 0.1
    custom = {"learning_rate": {"class_name": "Halving", "config": {"start": 2.0}}}
    with pytest.raises(ValueError, match="Halving"):
        AdadeltaKeras.from_config(custom, params)
    optimizer = AdadeltaKeras.from_config(custom, params, custom_objects={"Halving": Halving})
    assert isinstance(optimizer.learning_rate, Halving)
    assert optimizer.learning_rate.start == 2.0


# ---- Weights and slots ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_weights_travel(path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(randn(shape, dtype, generator)) for shape in ((3, 2), (4,))]
    one = AdadeltaKeras(params, 1.0, **path.options)
    advance(one, 2)
    weights = one.get_weights()
    assert all(isinstance(weight, np.ndarray) for weight in weights)
    assert weights[0] == 2
    assert weights[0].dtype == np.int64
    for index, (param, name) in enumerate([(p, key) for key in ("square_avg", "acc_delta") for p in params], 1):
        np.testing.assert_array_equal(weights[index], to_numpy(one.state[param][name]))
    other = AdadeltaKeras([Parameter(p.detach().clone()) for p in params], 1.0, **path.options)
    other.set_weights(weights)
    advance(one, 2, first=5)
    advance(other, 2, first=5)
    assert_same_training(one, other)


def test_weights_are_copies_and_zeros_where_there_is_no_state(path: Path) -> None:
    params = make_params()
    optimizer = AdadeltaKeras(params, **path.options)
    params[0].grad = torch.ones(3)
    optimizer.step()
    weights = optimizer.get_weights()
    assert [w.shape for w in weights] == [(), (3,), (2, 2), (3,), (2, 2)]
    assert not weights[2].any()
    assert params[1] not in optimizer.state
    weights[1][:] = 7
    assert (optimizer.state[params[0]]["square_avg"] != 7).all()
    assert optimizer.variables()[1] is optimizer.state[params[0]]["square_avg"]
    assert len(optimizer.weights) == 5


def test_old_weights_without_iterations() -> None:
    optimizer = AdadeltaKeras(make_params())
    advance(optimizer, 3)
    weights = optimizer.get_weights()
    optimizer.set_weights(weights[1:])
    assert optimizer.iterations == 0
    optimizer.set_weights([np.array(5), *map(torch.as_tensor, weights[1:])])
    assert optimizer.iterations == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w[:-2], r"with a weight list of length 3, but the optimizer was expecting 5 weights\."),
        (lambda w: [*w, w[0]], "weight list of length 6"),
        (
            lambda w: [*w[:-1], w[-1][:1]],
            r"Optimizer weight shape \(2, 2\) not compatible with provided weight shape \(1, 2\)",
        ),
        (lambda w: [w[1], *w[1:]], "the first weight is the number of iterations"),
        (lambda w: [np.array(1.5), *w[1:]], "the first weight is the number of iterations, got 1.5"),
        (lambda w: [np.array(-1), *w[1:]], "iterations must be >= 0"),
        (lambda w: [*w[:-1], w[-1] + 0j], "weight 4 is complex"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(change: Any, message: str) -> None:
    optimizer = AdadeltaKeras(make_params())
    advance(optimizer, 2)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.set_weights(change(optimizer.get_weights()))
    assert_unchanged(optimizer, before)


def test_slots() -> None:
    params = make_params()
    optimizer = AdadeltaKeras(params)
    assert optimizer.get_slot_names() == ["accum_grad", "accum_var"]
    with pytest.raises(KeyError, match="has no state"):
        optimizer.get_slot(params[0], "accum_grad")
    advance(optimizer, 1)
    assert optimizer.get_slot(params[0], "accum_grad") is optimizer.state[params[0]]["square_avg"]
    assert optimizer.get_slot(params[1], "accum_var") is optimizer.state[params[1]]["acc_delta"]
    with pytest.raises(KeyError, match="no slot 'momentum'; there are accum_grad, accum_var"):
        optimizer.get_slot(params[0], "momentum")


def test_weights_may_be_the_optimizers_own() -> None:
    optimizer = AdadeltaKeras(make_params((3,)))
    advance(optimizer, 1)
    count, square_avg, acc_delta = optimizer.variables()
    expected = [count.clone(), acc_delta.clone(), square_avg.clone()]
    optimizer.set_weights([count, acc_delta, square_avg])
    for now, then in zip(optimizer.variables(), expected, strict=True):
        assert_same_bits(now, then)


def test_numpy_counts_as_a_number() -> None:
    optimizer = AdadeltaKeras(make_params())
    optimizer.iterations = np.int64(5)  # type: ignore[assignment]
    assert type(optimizer.param_groups[0]["iterations"]) is int


def test_no_warning_in_ordinary_use(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = AdadeltaKeras(make_params(), **EVERYTHING, **path.options)
        advance(one, 2)
        one.apply_gradients([(torch.ones(3), one.param_groups[0]["params"][0])])
        one.load_state_dict(saved(one))
        one.set_weights(one.get_weights())
