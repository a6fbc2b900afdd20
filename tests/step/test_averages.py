"""Moving averages of the parameters: which there are, when they move on, and what is refused."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
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
    to_numpy,
    to_oracle,
)
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter
from training import advance, path  # noqa: F401

from torch_adadelta import AdadeltaKeras, step_in_backward
from torch_adadelta.step import averages

MOMENTUM = 0.75
EMA: dict[str, Any] = {"use_ema": True, "ema_momentum": MOMENTUM}


def moved(average: Tensor, param: Tensor) -> Tensor:
    """The average after a step that left the parameter at `param`."""
    m = np.float32(MOMENTUM)
    return torch.from_numpy(to_numpy(average) * m + to_numpy(param) * (np.float32(1) - m))


def step(optimizer: AdadeltaKeras, *grads: Tensor | None) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()


def test_parameters_without_a_gradient_have_averages_too(path: Path) -> None:  # noqa: F811
    params = [Parameter(torch.full((4,), float(k))) for k in range(3)]
    params[2].requires_grad_(False)
    optimizer = AdadeltaKeras(params, 1.0, **EMA, **path.options)
    step(optimizer, torch.ones(4), None, None)
    assert [averages.KEY in optimizer.state.get(param, {}) for param in params] == [True, True, False]
    assert set(optimizer.state[params[1]]) == {averages.KEY}
    with torch.no_grad():
        params[1].fill_(5.0)
    step(optimizer, torch.ones(4), None, None)
    assert optimizer.state[params[1]][averages.KEY].tolist() == [0.75 * 1 + 0.25 * 5] * 4
    step(optimizer, None, torch.ones(4), None)
    assert set(optimizer.state[params[1]]) == {averages.KEY, "square_avg", "acc_delta"}


def test_nothing_happens_without_any_gradient(path: Path) -> None:  # noqa: F811
    optimizer = AdadeltaKeras([Parameter(torch.ones(2))], 1.0, **EMA, **path.options)
    optimizer.step()
    assert not optimizer.state
    assert optimizer.iterations == 0


def test_an_average_that_is_made_later_begins_before_the_call(path: Path) -> None:  # noqa: F811
    first, later = Parameter(torch.ones(3)), Parameter(torch.full((3,), 2.0))
    optimizer = AdadeltaKeras([first], 1.0, **path.options)
    advance(optimizer, 2)
    optimizer.add_param_group({"params": [later]})
    optimizer.use_ema, optimizer.ema_momentum = True, MOMENTUM
    before = [param.detach().clone() for param in (first, later)]
    advance(optimizer, 1, seed=7)
    for param, was in zip((first, later), before, strict=True):
        assert_same_bits(optimizer.state[param][averages.KEY], moved(was, param))


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_the_first_step_copies(path: Path, bad: float) -> None:  # noqa: F811
    """Whatever was there: 0 * inf would be nan."""
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(3))]
    optimizer = AdadeltaKeras(params, 1.0, **EMA, **path.options)
    for param in params:
        optimizer.state[param] = {averages.KEY: torch.full((3,), bad)}
    step(optimizer, torch.ones(3), None)
    for param in params:
        assert_same_bits(optimizer.state[param][averages.KEY], param)


def test_sparse_gradients_and_weight_decay(path: Path) -> None:  # noqa: F811
    options = {**EMA, "weight_decay": 0.1, "ema_overwrite_frequency": 2}
    for dtype in (torch.float32, torch.bfloat16):
        params = [Parameter(torch.ones((9, 4), dtype=dtype)), Parameter(torch.ones(5, dtype=dtype))]
        optimizer = AdadeltaKeras(params, 1.0, **options, **path.options)
        expected = optimizer_oracle_of(params, learning_rate=1.0, **options)
        for k in range(6):
            grads = [coo_gradient((9, 4), dtype, 6, seed=k), gradients((5,), dtype, 1, seed=k)[0]]
            step(optimizer, *grads)
            expected.step(to_oracle(grads))
            assert_optimizer_like_oracle(optimizer, expected, f"after step {k}")


@pytest.mark.parametrize(
    ("count", "frequency", "n", "expected"),
    [
        (0, None, None, (0.0, False)),
        (1, None, None, (MOMENTUM, False)),
        (torch.tensor(0), None, None, (0.0, False)),
        (0, 1, None, (0.0, True)),
        (2, 3, None, (MOMENTUM, True)),
        (3, 3, None, (MOMENTUM, False)),
        (torch.tensor(1), None, 2, (0.0, False)),
        (2, 2, 2, (MOMENTUM, True)),
        (5, 2, 2, (MOMENTUM, False)),
    ],
)
def test_momentum(count: Any, frequency: int | None, n: int | None, expected: tuple[float, bool]) -> None:
    group = {"ema_momentum": MOMENTUM, "ema_overwrite_frequency": frequency, "gradient_accumulation_steps": n}
    momentum = averages.momentum_of({**group, "iterations": count})
    assert momentum == expected
    assert momentum.on(torch.device("meta")) == expected[0]


def test_momentum_is_computed_where_the_count_is() -> None:
    group = {"ema_momentum": MOMENTUM, "ema_overwrite_frequency": None, "gradient_accumulation_steps": None}
    momentum = averages.momentum_of({**group, "iterations": torch.tensor(1, device="meta")})
    assert not momentum.overwrites
    assert isinstance(momentum.value, Tensor)
    assert momentum.value.is_meta
    for key in ("ema_overwrite_frequency", "gradient_accumulation_steps"):
        with pytest.raises(RuntimeError, match="meta tensor"):  # for these it has to be read
            averages.momentum_of({**group, key: 2, "iterations": torch.tensor(1, device="meta")})
    for count in range(3):
        value = averages.momentum_on_device({**group, "iterations": torch.tensor(count)})
        assert_same_bits(value, torch.tensor(MOMENTUM if count else 0.0, dtype=torch.float64))
        moved_there = averages.Momentum(value, False).on(torch.device("meta"))
        assert isinstance(moved_there, Tensor)
        assert moved_there.is_meta


def test_averages_follow_the_masters(path: Path) -> None:  # noqa: F811
    """Of a parameter without a gradient too; its remainder is then checked."""
    options = {**EMA, "master_weights": True}
    params = [Parameter(torch.ones(5, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = AdadeltaKeras(params, 1.0, **options, **path.options)
    expected = optimizer_oracle_of(params, learning_rate=1.0, **options)
    for k in range(4):
        grads = [gradients((5,), torch.float32, 1, seed=10 * k + i)[0] if k != 2 or i else None for i in range(2)]
        step(optimizer, *(None if grad is None else grad.bfloat16() for grad in grads))
        expected.step([None if grad is None else to_numpy(grad.bfloat16()) for grad in grads])
        assert_optimizer_like_oracle(optimizer, expected, f"after step {k}")
    for k, bad in enumerate((torch.zeros(5), torch.zeros(4, dtype=torch.int16))):
        optimizer.state[params[k]]["remainder"] = bad
        before = snapshot(optimizer)
        with pytest.raises(RuntimeError, match=f"parameter {k} of group 0.* its state remainder has"):
            step(optimizer, *(None if i == k else torch.ones(5, dtype=torch.bfloat16) for i in range(2)))
        assert_unchanged(optimizer, before)
        optimizer.state[params[k]]["remainder"] = torch.zeros(5, dtype=torch.int16)


@pytest.mark.parametrize("second", [torch.ones(3), coo([[0, 2]], torch.ones(2), (3,))], ids=["dense", "sparse"])
def test_a_parameter_that_is_updated_twice_is_averaged_once(path: Path, second: Tensor) -> None:  # noqa: F811
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(3))]
    optimizer = AdadeltaKeras(params, 1.0, **EMA, **path.options)
    for k in range(3):
        before = [optimizer.state[param][averages.KEY].clone() if k else param.detach().clone() for param in params]
        optimizer.apply_gradients([(torch.ones(3), params[0]), (torch.ones(3), params[1]), (second, params[0])])
        for param, was in zip(params, before, strict=True):
            assert_same_bits(optimizer.state[param][averages.KEY], moved(was, param) if k else param)


def test_norm_variables_that_are_rows(path: Path) -> None:  # noqa: F811
    param = Parameter(torch.ones(6, 3))
    options = {"norm_variables": [[(param, 0, 2)], [(param, 2, 6)]], "clipnorm": 0.5}
    ours, without = (AdadeltaKeras([p], 1.0, **path.options) for p in (param, Parameter(torch.ones(6, 3))))
    ours = AdadeltaKeras([param], 1.0, **EMA, **options, **path.options)
    for k in range(3):
        before = ours.state[param][averages.KEY].clone() if k else None
        advance(ours, 1, seed=k)
        assert_same_bits(ours.state[param][averages.KEY], param if before is None else moved(before, param))
    assert not without.state


def test_groups_of_other_options_and_devices_share_the_average(path: Path) -> None:  # noqa: F811
    params = [Parameter(torch.full((5,), 1.0 + k)) for k in range(3)]
    groups = [{"params": [params[0]], "rho": 0.9}, {"params": [params[1]], "maximize": True}, {"params": [params[2]]}]
    optimizer = AdadeltaKeras(groups, 1.0, **EMA, **path.options)
    for k in range(3):
        before = [optimizer.state[p][averages.KEY].clone() if k else None for p in params]
        advance(optimizer, 1, seed=k)
        for param, was in zip(params, before, strict=True):
            assert_same_bits(optimizer.state[param][averages.KEY], param if was is None else moved(was, param))


def test_distributed_tensors(path: Path) -> None:  # noqa: F811
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain = [Parameter(torch.arange(6.0)), Parameter(torch.arange(4.0))]
        spread = [Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in plain]
        options = {**EMA, "ema_overwrite_frequency": 3, "gradient_accumulation_steps": 2, "loss_scale_factor": 3.0}
        optimizers = [AdadeltaKeras(params, 1.0, **options, **path.options) for params in (plain, spread)]
        for k in range(7):
            grads: list[Any] = [gradients(p.shape, p.dtype, 1, seed=9 * k + i)[0] for i, p in enumerate(plain)]
            grads[1] = None if k == 4 else grads[1]
            step(optimizers[0], *grads)
            step(optimizers[1], *(None if g is None else distribute_tensor(g, mesh, [Shard(0)]) for g in grads))
            for p, q in zip(plain, spread, strict=True):
                assert_same_bits(q.to_local(), p.detach())
                assert optimizers[0].state[p].keys() == optimizers[1].state[q].keys()
                for key, tensor in optimizers[0].state[p].items():
                    assert_same_bits(optimizers[1].state[q][key].to_local(), tensor, key)
        optimizers[1].state[spread[0]][averages.KEY] = torch.zeros(6)
        with pytest.raises(RuntimeError, match="parameter 0 of group 0 is a DTensor, but its state average is a Tenso"):
            step(optimizers[1], *(distribute_tensor(torch.ones_like(p), mesh, [Shard(0)]) for p in plain))
    finally:
        torch.distributed.destroy_process_group()


def test_a_skipped_step_changes_no_average() -> None:
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(3))]
    optimizer = AdadeltaKeras(params, 1.0, **EMA, fused=True)
    for k, found_inf in enumerate([1.0, 0.0, 0.0, 1.0, 0.0]):
        before = snapshot(optimizer)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(found_inf)
        step(optimizer, torch.ones(3), None)
        if found_inf and k:
            assert_same_bits(params[0], before[1][0])
            for param in params:
                assert_same_bits(optimizer.state[param][averages.KEY], before[2][id(param)][averages.KEY][1])
        elif k == 1:  # the first step that counts
            assert_same_bits(optimizer.state[params[0]][averages.KEY], params[0])
    assert optimizer.iterations == 3


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_is_listed_twice_is_averaged_once(path: Path) -> None:  # noqa: F811
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(3))]
    optimizer = AdadeltaKeras([params[0], params[0], params[1], params[1]], 1.0, **EMA, **path.options)
    before = None
    for k in range(4):
        params[0].grad = torch.full((3,), 1.0 + k)
        optimizer.step()
        average = optimizer.state[params[0]][averages.KEY]
        assert_same_bits(average, params[0] if before is None else moved(before, params[0]))
        before = average.clone()
    assert optimizer.state[params[1]][averages.KEY].tolist() == [1.0] * 3


def test_sparse_gradients_in_the_backward_pass() -> None:
    tables = [torch.nn.Embedding(5, 2, sparse=True) for _ in range(2)]
    tables[1].load_state_dict(tables[0].state_dict())
    ours, usual = (AdadeltaKeras(table.parameters(), 1.0, **EMA, ema_overwrite_frequency=2) for table in tables)
    step_in_backward(ours)
    for k in range(4):
        usual.zero_grad()
        for table in tables:
            table(torch.tensor([k, 1])).square().sum().backward()
        usual.step()
        assert_same_bits(tables[0].weight, tables[1].weight.detach())
        for key, tensor in usual.state[tables[1].weight].items():
            assert_same_bits(ours.state[tables[0].weight][key], tensor, key)


def test_a_lazy_parameter_has_no_average_yet() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LazyLinear(1))
    optimizer = AdadeltaKeras(model.parameters(), 1.0, **EMA)
    model[0](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 2
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 4


# ---- Evaluation -----------------------------------------------------------------------------------------------------


def trained(dtype: torch.dtype = torch.bfloat16, **options: Any) -> tuple[AdadeltaKeras, list[Parameter]]:
    params = [Parameter(torch.ones(5, dtype=dtype)), Parameter(torch.ones(3))]
    optimizer = AdadeltaKeras(params, 1.0, **{**EMA, **options})
    advance(optimizer, 3)
    return optimizer, params


def test_parameters_and_averages_are_swapped_and_come_back() -> None:
    optimizer, params = trained()
    before = snapshot(optimizer)
    own = [optimizer.state[param][averages.KEY].clone() for param in params]
    with optimizer.swap_averages():
        for param, average, was in zip(params, own, before[1], strict=True):
            assert_same_bits(param, average.to(param.dtype))
            assert_same_bits(optimizer.state[param][averages.KEY], was.float())
        assert params[1].sum().requires_grad
        with pytest.raises(RuntimeError, match="no step can be taken inside of swap_averages"):
            advance(optimizer)
        with pytest.raises(RuntimeError, match="swap_averages is on already"), optimizer.swap_averages():
            pass
    assert_unchanged(optimizer, before)
    with pytest.raises(KeyError, match="mine"), optimizer.swap_averages():
        raise KeyError("mine")
    assert_unchanged(optimizer, before)
    advance(optimizer)


def test_nothing_is_saved_or_loaded_while_they_are_swapped() -> None:
    optimizer, _ = trained()
    saved, weights = optimizer.state_dict(), optimizer.get_weights()
    compiled_step = torch.compile(optimizer.step, backend="eager")
    compiled_step()
    before = snapshot(optimizer)
    calls: list[Callable[[], Any]] = [
        optimizer.state_dict,
        lambda: optimizer.load_state_dict(saved),
        lambda: optimizer.set_weights(weights),
        lambda: copy.deepcopy(optimizer),
        lambda: optimizer.finalize_variable_values(),
        compiled_step,
    ]
    with optimizer.swap_averages():
        for call in calls:
            with pytest.raises(RuntimeError, match="inside of swap_averages"):
                call()
    assert_unchanged(optimizer, before)


def test_averages_are_not_for_recorded_steps() -> None:
    options: tuple[dict[str, Any], ...] = ({"use_ema": True}, {"gradient_accumulation_steps": 2})
    for option in options:
        with pytest.raises(ValueError, match="cannot be combined with differentiable=True"):
            AdadeltaKeras([torch.ones(1)], differentiable=True, **option)


def test_averages_that_are_switched_on_again_begin_anew(path: Path) -> None:  # noqa: F811
    optimizer, params = trained(torch.float32, **path.options)
    optimizer.use_ema = False
    with torch.no_grad():
        params[0].add_(100)
    optimizer.use_ema = True
    before = params[0].detach().clone()
    advance(optimizer)
    assert_same_bits(optimizer.state[params[0]][averages.KEY], moved(before, params[0]))


def test_finalizing_takes_parameters_of_the_optimizer() -> None:
    optimizer, params = trained()
    with pytest.raises(TypeError, match="var_list must be a list"):
        optimizer.finalize_variable_values(params[0])
    with pytest.raises(ValueError, match="that is no parameter of this optimizer"):
        optimizer.finalize_variable_values([torch.ones(2)])


def test_swapping_needs_averages() -> None:
    optimizer = AdadeltaKeras([Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match="swap_averages needs averages: make the optimizer with use_ema=True"):
        optimizer.swap_averages().__enter__()
    optimizer.use_ema = True
    with optimizer.swap_averages():
        pass


def test_finalizing_sets_parameters_to_their_averages() -> None:
    optimizer, params = trained()
    before = [param.detach().clone() for param in params]
    optimizer.finalize_variable_values([params[1]])
    assert_same_bits(params[0], before[0])
    assert_same_bits(params[1], optimizer.state[params[1]][averages.KEY])
    optimizer.finalize_variable_values()
    assert_same_bits(params[0], optimizer.state[params[0]][averages.KEY].bfloat16())
    optimizer.use_ema = False
    with torch.no_grad():
        params[1].fill_(9.0)
    optimizer.finalize_variable_values()
    assert params[1].tolist() == [9.0] * 3


# ---- What survives --------------------------------------------------------------------------------------------------


def by_state_dict(optimizer: AdadeltaKeras, params: list[Parameter]) -> AdadeltaKeras:
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    new = AdadeltaKeras(params, 0.1)
    new.load_state_dict(torch.load(saved))
    return new


def by_weights(optimizer: AdadeltaKeras, params: list[Parameter]) -> AdadeltaKeras:
    new = AdadeltaKeras.from_config(optimizer.get_config(), params)
    new.set_weights(optimizer.get_weights())
    return new


@pytest.mark.parametrize("by", [by_state_dict, by_weights])
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2, "ema_overwrite_frequency": 3}], ids=str)
def test_a_checkpoint_keeps_what_16_bits_would_lose(by: Callable[..., AdadeltaKeras], options: dict[str, Any]) -> None:
    optimizer, params = trained(**options)  # with sums, if there are some
    copies = [Parameter(param.detach().clone()) for param in params]
    other = by(optimizer, copies)
    assert int(other.param_groups[0]["iterations"]) == 3
    for k in range(3):
        for param, twin in zip(params, copies, strict=True):
            assert optimizer.state[param].keys() == other.state[twin].keys()
            for key, tensor in optimizer.state[param].items():
                assert_same_bits(other.state[twin][key], tensor, key)
                assert other.state[twin][key] is not tensor
        advance(optimizer, 1, seed=20 + k)
        advance(other, 1, seed=20 + k)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike(copied: Callable[[Any], Any]) -> None:
    optimizer, params = trained()
    other = copied(optimizer)
    for each in (optimizer, other):
        advance(each, 2, seed=5)
    for param, twin in zip(params, other.param_groups[0]["params"], strict=True):
        assert_same_bits(optimizer.state[param][averages.KEY], other.state[twin][averages.KEY])


def test_a_checkpoint_without_averages_gets_them() -> None:
    optimizer, params = trained(use_ema=False)
    new = AdadeltaKeras([Parameter(param.detach().clone()) for param in params], 1.0)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        for key in ("use_ema", "ema_momentum", "ema_overwrite_frequency", "weight_decay"):
            del group[key]
    new.use_ema, new.ema_momentum = True, MOMENTUM
    new.load_state_dict(saved)
    assert (new.use_ema, new.ema_momentum, new.iterations) == (True, MOMENTUM, 3)
    before = [param.detach().clone() for param in new.param_groups[0]["params"]]
    advance(new, 1, seed=5)
    for param, was in zip(new.param_groups[0]["params"], before, strict=True):
        assert_same_bits(new.state[param][averages.KEY], moved(was.float(), param))


def test_distributed_checkpoints_make_averages_to_load_into() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = torch.nn.Linear(2, 2)
    optimizer = AdadeltaKeras(model.parameters(), 1.0, **EMA, gradient_accumulation_steps=2)
    state = get_optimizer_state_dict(model, optimizer)["state"]
    assert state["weight"].keys() == {"square_avg", "acc_delta", "average", "gradient_accumulator"}
    assert int(optimizer.param_groups[0]["iterations"]) == 0


# ---- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(4), r"has shape \(5,\), but its state average has shape \(4,\)"),
        (
            torch.zeros(5, dtype=torch.bfloat16),
            "its state average has dtype torch.bfloat16, not torch.float32. Convert",
        ),
        (torch.zeros(5, device="meta"), "its state average is on meta"),
        (None, "its state average is None"),
        (torch.zeros(1).expand(5), "its state average is not a dense tensor of its own memory"),
    ],
    ids=["shape", "dtype", "device", "none", "expanded"],
)
@pytest.mark.parametrize("has_gradient", [True, False])
def test_an_average_that_does_not_fit(path: Path, bad: Any, message: str, has_gradient: bool) -> None:  # noqa: F811
    params = [Parameter(torch.ones(5, dtype=torch.bfloat16)), Parameter(torch.ones(5))]
    optimizer = AdadeltaKeras(params, 1.0, **EMA, **path.options)
    advance(optimizer)
    optimizer.state[params[0]][averages.KEY] = bad
    if bad is None:  # no average is made anew
        optimizer.state[params[0]][averages.KEY] = "None"
        message = "its state average is 'None'"
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=f"parameter 0 of group 0.*{message}"):
        step(optimizer, torch.ones(5, dtype=torch.bfloat16) if has_gradient else None, torch.ones(5))
    assert_unchanged(optimizer, before)


def test_an_average_in_the_memory_of_its_parameter(path: Path) -> None:  # noqa: F811
    param = Parameter(torch.ones(5))
    optimizer = AdadeltaKeras([param], 1.0, **EMA, **path.options)
    advance(optimizer)
    optimizer.state[param][averages.KEY] = param.detach()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="parameter 0 of group 0: it and its state average share memory"):
        advance(optimizer)
    assert_unchanged(optimizer, before)


def test_what_no_graph_can_repeat() -> None:
    with pytest.raises(
        ValueError, match=r"ema_overwrite_frequency=2 cannot be combined with capturable=True.*finalize"
    ):
        AdadeltaKeras([Parameter(torch.ones(1))], **EMA, ema_overwrite_frequency=2, capturable=True)
    optimizer = AdadeltaKeras([Parameter(torch.ones(1))], ema_overwrite_frequency=2, capturable=True, fused=True)
    assert optimizer._step_supports_amp_scaling
    with pytest.raises(ValueError, match="ema_overwrite_frequency=2 cannot be combined"):
        optimizer.use_ema = True
    assert not optimizer.use_ema


def test_a_count_on_the_device(path: Path) -> None:  # noqa: F811
    ours, usual = (
        AdadeltaKeras([Parameter(torch.ones(3)), Parameter(torch.ones(2))], 1.0, **EMA, **path.options, capturable=flag)
        for flag in (True, False)
    )
    for k in range(3):
        for optimizer in (ours, usual):
            step(optimizer, torch.full((3,), 1.0 + k), None)
    for p, q in zip(ours.param_groups[0]["params"], usual.param_groups[0]["params"], strict=True):
        assert_same_bits(ours.state[p][averages.KEY], usual.state[q][averages.KEY])
