"""Weight decay: Keras 3's, which is decoupled, and that of `torch.optim`; every path against the oracle, bit by bit."""

import copy
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    LAYOUTS,
    Path,
    assert_like_oracle,
    assert_unchanged,
    coo_gradient,
    dtype_name,
    gradients,
    optimizer_oracle_of,
    optimizer_with,
    randn,
    snapshot,
    to_numpy,
    to_oracle,
)
from reference.oracle import OracleOptimizer, SparseGradient
from torch.nn import Parameter

from torch_adadelta import AdadeltaKeras, schedules

SHAPES = ((3, 5, 2, 4), (300,), (), (0, 3), (7, 33))


def like(optimizer: AdadeltaKeras, oracle: OracleOptimizer, what: str = "") -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param, expected in zip(params, oracle.oracles, strict=True):
        assert_like_oracle(param, optimizer.state[param], expected, what)


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.01},
        {"weight_decay": 0.3, "decoupled_weight_decay": False},
        {"weight_decay": 0.01, "clipnorm": 0.7, "maximize": True},
        {"weight_decay": 0.02, "decoupled_weight_decay": False, "maximize": True},
        {"weight_decay": 0.01, "decay": 0.5},
        {"weight_decay": 1e-50},
    ],
    ids=[
        "decoupled",
        "coupled",
        "decoupled-clipnorm-maximize",
        "coupled-maximize",
        "decoupled-decay",
        "none in float32",
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_every_path_has_the_bits_of_the_oracle(path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    params = [randn(shape, dtype, generator) for shape in SHAPES]
    oracle = OracleOptimizer(list(map(to_numpy, params)), 1.0, dtypes=[dtype_name(dtype)] * len(params), **options)
    optimizer = optimizer_with(params, path, learning_rate=1.0, **options)
    own = optimizer.param_groups[0]["params"]
    grads = [gradients(shape, dtype, 3, seed) for seed, shape in enumerate(SHAPES)]
    for step in range(3):
        for param, grad in zip(own, grads, strict=True):
            param.grad = grad[step].clone()
        optimizer.step()
        oracle.step([to_numpy(grad[step]) for grad in grads])
    like(optimizer, oracle)


@pytest.mark.parametrize("is_decoupled", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_any_layout(path: Path, dtype: torch.dtype, layout: str, is_decoupled: bool) -> None:
    options = {"weight_decay": 0.1, "decoupled_weight_decay": is_decoupled}
    shape = (3, 5, 1, 40)
    param = LAYOUTS[layout](randn(shape, dtype, torch.Generator().manual_seed(1)))
    oracle = OracleOptimizer([to_numpy(param)], 1.0, dtypes=[dtype_name(dtype)], **options)
    optimizer = optimizer_with([param], path, learning_rate=1.0, **options)
    (own,) = optimizer.param_groups[0]["params"]
    for grad in gradients(shape, dtype, 2):
        own.grad = LAYOUTS[layout](grad)
        optimizer.step()
        oracle.step([to_numpy(grad)])
    like(optimizer, oracle)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_a_sparse_gradient_decays_all_rows(path: Path, dtype: torch.dtype) -> None:
    """A pass of its own over the table, also where no row occurs."""
    shape = (50, 7)
    param = randn(shape, dtype, torch.Generator().manual_seed(1))
    oracle = OracleOptimizer([to_numpy(param)], 1.0, dtypes=[dtype_name(dtype)], weight_decay=0.1)
    optimizer = optimizer_with([param], path, learning_rate=1.0, weight_decay=0.1)
    (own,) = optimizer.param_groups[0]["params"]
    for step, rows in enumerate(([3, 3, 49, 0], [], [5])):
        (values,) = gradients((len(rows), 7), dtype, 1, step)
        indices = torch.tensor([rows], dtype=torch.int64)
        own.grad = torch.sparse_coo_tensor(indices, values, shape)
        optimizer.step()
        oracle.step([SparseGradient(indices.numpy(), to_numpy(values))])
    like(optimizer, oracle)


def test_tables_are_clipped_by_their_own_norms(path: Path) -> None:
    shapes, options = ((9, 4), (5, 2)), {"weight_decay": 0.1, "clipnorm": 0.5}
    params = [Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = AdadeltaKeras(params, 1.0, **options, **path.options)
    expected = optimizer_oracle_of(params, learning_rate=1.0, **options)
    for seed in range(3):
        grads = [coo_gradient(shape, torch.float32, 6, seed=10 * seed + i) for i, shape in enumerate(shapes)]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
        expected.step(to_oracle(grads))
        like(optimizer, expected, f"after step {seed}")


def test_a_table_that_is_listed_twice_decays_twice(path: Path) -> None:
    table = Parameter(torch.ones(3, 2))
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = AdadeltaKeras([table, table], 1.0, weight_decay=0.5, **path.options)
    oracle = OracleOptimizer([to_numpy(table)], 1.0, weight_decay=0.5)
    indices, values = torch.tensor([[1, 1]]), torch.ones(2, 2)
    table.grad = torch.sparse_coo_tensor(indices, values, table.shape)
    optimizer.step()
    for _ in range(2):
        oracle.step([SparseGradient(indices.numpy(), values.numpy())])
    assert_like_oracle(table, optimizer.state[table], oracle.oracles[0])


def test_infinite_parameters_stay_what_they_are_without_decay(path: Path) -> None:
    """0 times infinity is nan: no weight decay is no operation, also where the 0 is in a Tensor."""
    for value in (0.0, torch.zeros(())):
        optimizer = optimizer_with([torch.full((40,), float("inf"))], path, weight_decay=value)
        (param,) = optimizer.param_groups[0]["params"]
        param.grad = torch.ones(40)
        optimizer.step()
        assert param.isinf().all()


# ---- As an option ---------------------------------------------------------------------------------------------------


def step(optimizer: AdadeltaKeras, seed: int = 0) -> None:
    for i, param in enumerate(param for group in optimizer.param_groups for param in group["params"]):
        (param.grad,) = gradients(param.shape, param.dtype, 1, seed + i)
    optimizer.step()


def test_groups_have_their_own(path: Path) -> None:
    starts = [torch.full((300,), 2.0), torch.full((7,), -3.0), torch.full((5,), 1.0)]
    options: list[dict[str, Any]] = [
        {"weight_decay": 0.1},
        {"weight_decay": 0.0},
        {"weight_decay": 0.2, "decoupled_weight_decay": False},
    ]
    params = [Parameter(start.clone()) for start in starts]
    groups = [{"params": [param], **own} for param, own in zip(params, options, strict=True)]
    optimizer = AdadeltaKeras(groups, 1.0, weight_decay=7.0, **path.options)
    for seed in range(3):
        step(optimizer, 10 * seed)
    for i, (param, start, own) in enumerate(zip(params, starts, options, strict=True)):
        oracle = OracleOptimizer([to_numpy(start)], 1.0, **own)
        for seed in range(3):
            oracle.step([to_numpy(gradients(start.shape, start.dtype, 1, 10 * seed + i)[0])])
        assert_like_oracle(param, optimizer.state[param], oracle.oracles[0])


@pytest.mark.parametrize("kind", ["tensor", "float64 tensor", "callable", "written to the group", "set"])
def test_a_value_may_come_and_change_in_any_way(path: Path, kind: str) -> None:
    values = iter([0.1, 0.3, 0.0, 0.2])
    given: Any = 0.0
    if kind.endswith("tensor"):
        given = torch.zeros((), dtype=torch.float64 if "64" in kind else torch.float32)
    current = 0.0
    if kind == "callable":
        given = lambda: current  # noqa: E731
    optimizer = optimizer_with([torch.linspace(-1, 1, 300)], path, learning_rate=1.0, weight_decay=given)
    (param,) = optimizer.param_groups[0]["params"]
    oracle = OracleOptimizer([to_numpy(param)], 1.0)
    for seed, current in enumerate(values):
        if kind.endswith("tensor"):
            given.fill_(current)
        elif kind == "set":
            optimizer.weight_decay = current
        elif kind != "callable":
            optimizer.param_groups[0]["weight_decay"] = current
        (param.grad,) = gradients(param.shape, param.dtype, 1, seed)
        optimizer.step()
        oracle.oracles[0].weight_decay = float(given) if kind.endswith("tensor") else current
        oracle.step([to_numpy(param.grad)])
    like(optimizer, oracle)


def test_properties() -> None:
    optimizer = AdadeltaKeras([Parameter(torch.zeros(2))], weight_decay=None)
    assert (optimizer.weight_decay, optimizer.decoupled_weight_decay) == (0.0, True)
    optimizer.weight_decay, optimizer.decoupled_weight_decay = 0.5, False
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    assert not optimizer.param_groups[0]["decoupled_weight_decay"]
    optimizer.add_param_group({"params": [Parameter(torch.zeros(2))]})
    assert (optimizer.param_groups[1]["weight_decay"], optimizer.param_groups[1]["decoupled_weight_decay"]) == (
        0.5,
        False,
    )
    optimizer.weight_decay = None
    assert optimizer.weight_decay == 0.0


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), 1e39])
def test_values_out_of_range(value: float) -> None:
    param = Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"Invalid weight_decay: .* a finite number >= 0 that fits float32"):
        AdadeltaKeras([param], weight_decay=value)
    optimizer = AdadeltaKeras([param])
    optimizer.param_groups[0]["weight_decay"] = value
    param.grad = torch.ones(2)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="Invalid weight_decay"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("key", ["clipvalue", "clipnorm", "global_clipnorm"])
def test_a_penalty_is_not_clipped(key: str) -> None:
    """Whichever comes last: in the constructor, a setter, a group, a checkpoint, or written to a group."""
    param = Parameter(torch.zeros(2))
    refused = pytest.raises(ValueError, match=f"{key}=1.0 cannot be combined with decoupled_weight_decay=False")
    penalty: dict[str, Any] = {"weight_decay": 0.1, "decoupled_weight_decay": False}
    with refused:
        AdadeltaKeras([param], **penalty, **{key: 1.0})
    optimizer = AdadeltaKeras([param], **penalty)
    before = snapshot(optimizer)
    with refused:
        setattr(optimizer, key, 1.0)
    assert_unchanged(optimizer, before)
    optimizer = AdadeltaKeras([param], **{key: 1.0}, weight_decay=0.1)
    before = snapshot(optimizer)
    with refused:
        optimizer.decoupled_weight_decay = False
    with refused:
        optimizer.add_param_group({"params": [Parameter(torch.zeros(2))], "decoupled_weight_decay": False})
    assert_unchanged(optimizer, before)
    optimizer.weight_decay = 0.0
    optimizer.decoupled_weight_decay = False  # of nothing
    before = snapshot(optimizer)
    with refused:
        optimizer.weight_decay = 0.1
    assert_unchanged(optimizer, before)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    param.grad = torch.ones(2)
    before = snapshot(optimizer)
    with refused:
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_a_penalty_is_not_for_sparse_gradients(path: Path) -> None:
    optimizer = optimizer_with([torch.ones(3, 2)], path, weight_decay=0.1, decoupled_weight_decay=False)
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (3, 2))
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 has a sparse gradient, to which decoupled_weight"):
        optimizer.step()
    assert_unchanged(optimizer, before)
    param.grad = param.grad.to_dense()
    optimizer.step()


def test_a_penalty_that_comes_later_is_not_clipped_either() -> None:
    with pytest.raises(ValueError, match=r"clipnorm=1\.0 cannot be combined with decoupled_weight_decay=False"):
        AdadeltaKeras([Parameter(torch.ones(2))], weight_decay=lambda: 0.1, decoupled_weight_decay=False, clipnorm=1.0)
    param = Parameter(torch.ones(2))
    optimizer = AdadeltaKeras([param], decoupled_weight_decay=False, clipnorm=1.0)
    param.grad = torch.ones(2)
    optimizer.step()
    before = param.detach().clone()
    optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match=r"clipnorm=1\.0 cannot be combined with decoupled_weight_decay=False"):
        optimizer.step()
    assert torch.equal(param, before)


# ---- torch.optim ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maximize", [False, True])
def test_a_job_of_torch_optim_goes_on(path: Path, maximize: bool) -> None:
    def losses(optimizer: torch.optim.Optimizer, param: Parameter, count: int) -> list[float]:
        found = []
        for _ in range(count):
            optimizer.zero_grad()
            loss = (param - 3).square().sum() * (-1 if maximize else 1)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    options: dict[str, Any] = {"lr": 1.0, "rho": 0.9, "eps": 1e-6, "weight_decay": 0.01, "maximize": maximize}
    param = Parameter(torch.linspace(-1, 1, 50))
    theirs = torch.optim.Adadelta([param], **options)
    losses(theirs, param, 20)
    state_dict, start = copy.deepcopy(theirs.state_dict()), param.detach().clone()
    expected = losses(theirs, param, 100)
    own = Parameter(start)
    optimizer = AdadeltaKeras([own], **path.options)
    optimizer.load_state_dict(state_dict)
    assert (optimizer.weight_decay, optimizer.decoupled_weight_decay, optimizer.iterations) == (0.01, False, 20)
    torch.testing.assert_close(torch.tensor(losses(optimizer, own, 100)), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_a_checkpoint_without_weight_decay_says_nothing_of_its_kind() -> None:
    param = Parameter(torch.zeros(2))
    state_dict = torch.optim.Adadelta([param]).state_dict()
    optimizer = AdadeltaKeras([param], clipvalue=1.0)
    optimizer.load_state_dict(state_dict)
    assert optimizer.decoupled_weight_decay


# ---- With a schedule, in other loops --------------------------------------------------------------------------------


def test_the_learning_rate_is_that_of_the_step(path: Path) -> None:
    schedule = schedules.ExponentialDecay(1.0, 1, 0.5)
    optimizer = optimizer_with([torch.ones(300)], path, learning_rate=schedule, weight_decay=0.5)
    (param,) = optimizer.param_groups[0]["params"]
    for _ in range(3):
        param.grad = torch.zeros(300)
        optimizer.step()
    assert param[0].item() == (1 - 0.5) * (1 - 0.25) * (1 - 0.125)
