"""A model and its optimizer in other precisions: `to_bfloat16`, `to_float32`, masters, and checkpoints between them."""

import copy
import io
import pickle
import re
import warnings
from typing import Any

import pytest
import torch
from cases import Path, assert_same_bits, assert_unchanged, gradients, snapshot
from torch import Tensor, nn
from torch.nn import Parameter
from training import advance, assert_same_training, params_of
from training import path as path

from torch_adadelta import AdadeltaKeras, step_in_backward, to_bfloat16, to_float32

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
MASTERS: dict[str, Any] = {"master_weights": True, "state_dtype": FLOAT32}


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2))


def train(model: nn.Module, optimizer: AdadeltaKeras, steps: int) -> None:
    for k in range(steps):
        optimizer.zero_grad()
        dtype = next(model.parameters()).dtype
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(k)).to(dtype)
        model(x).square().sum().backward()
        optimizer.step()
    optimizer.zero_grad()


def everything(model: nn.Module, optimizer: AdadeltaKeras) -> list[Tensor]:
    """Masters, buffers and accumulators, copied."""
    masters = [master.clone() for _, master in optimizer.master_params()]
    states = [
        optimizer.state[param][key].clone() for param in params_of(optimizer) for key in ("square_avg", "acc_delta")
    ]
    return [*masters, *(buffer.clone() for buffer in model.buffers()), *states]


def bfloat16_optimizer(path: Path, **options: Any) -> tuple[AdadeltaKeras, list[Parameter]]:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator).to(BFLOAT16)) for shape in ((3, 4), (5,))]
    optimizer = AdadeltaKeras(params, 1.0, **{**MASTERS, **options, **path.options})
    advance(optimizer, 3)
    return optimizer, params


# ---- Conversions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 3])
def test_there_and_back_not_a_bit_is_lost(path: Path, steps: int) -> None:
    model = model_of()
    optimizer = AdadeltaKeras(model.parameters(), 1.0, use_ema=True, **path.options)
    train(model, optimizer, steps)
    params = list(model.parameters())
    before = copy.deepcopy(optimizer.state_dict()), [param.detach().clone() for param in params]
    assert to_bfloat16(model, optimizer) is optimizer
    assert list(model.parameters()) == params_of(optimizer)
    assert all(one is other for one, other in zip(model.parameters(), params, strict=True))
    dtypes = [BFLOAT16, BFLOAT16, FLOAT32, FLOAT32, BFLOAT16, BFLOAT16]
    assert [param.dtype for param in params] == dtypes
    assert all(param.is_leaf and param.requires_grad for param in params)
    assert (optimizer.master_weights, optimizer.state_dtype) == (True, FLOAT32)
    for (_, master), was in zip(optimizer.master_params(), before[1], strict=True):
        assert_same_bits(master, was)
    assert to_float32(model, optimizer) is optimizer
    assert (optimizer.master_weights, optimizer.state_dtype) == (False, None)
    for param, was in zip(params, before[1], strict=True):
        assert_same_bits(param, was)
    after = optimizer.state_dict()
    assert after["state"].keys() == before[0]["state"].keys()
    for number, state in before[0]["state"].items():
        assert after["state"][number].keys() == state.keys()
        for key, value in state.items():
            assert_same_bits(after["state"][number][key], value)


def test_training_goes_on_as_with_float32_masters(path: Path) -> None:
    """The masters of a converted job are those of float32 parameters with the same gradients."""
    params = [Parameter(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))]
    same = [Parameter(params[0].detach().clone())]
    ours, usual = (AdadeltaKeras(some, 1.0, **path.options) for some in (params, same))
    for k in range(6):
        if k == 3:
            to_bfloat16(nn.ParameterList(params), ours)
        grad = gradients((5, 3), BFLOAT16, 1, seed=k)[0]
        params[0].grad, same[0].grad = grad.to(params[0].dtype), grad.float()
        for optimizer in (ours, usual):
            optimizer.step()
            optimizer.zero_grad()
    ((_, master),) = ours.master_params()
    assert_same_bits(master, same[0].detach())
    for key in ("square_avg", "acc_delta"):
        assert_same_bits(ours.state[params[0]][key], usual.state[same[0]][key])


def test_models_with_more_than_the_optimizer_has(path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2))
    model.register_buffer("exact", torch.tensor([1.0, 0.5]))
    model.register_buffer("inexact", torch.tensor([0.1]))
    model.register_buffer("count", torch.tensor([3]))
    optimizer = AdadeltaKeras([*model[0].parameters(), *model[2].parameters()], 1.0, **path.options)
    with pytest.warns(
        UserWarning, match=r"rounded to bfloat16, for the optimizer does not have them: 1\.weight, inexact$"
    ):
        to_bfloat16(model, optimizer)
    dtypes = {name: x.dtype for name, x in model.state_dict().items()}
    assert dtypes["0.weight"] is dtypes["1.weight"] is dtypes["exact"] is dtypes["inexact"] is BFLOAT16
    assert dtypes["2.weight"] is dtypes["2.running_mean"] is FLOAT32
    assert dtypes["count"] is torch.int64
    to_float32(model, optimizer)
    assert {x.dtype for x in model.state_dict().values()} == {FLOAT32, torch.int64}


def test_groups_that_the_model_has_no_part_in_stay(path: Path) -> None:
    model, other = nn.Linear(2, 2), Parameter(torch.ones(2, dtype=torch.float16))
    optimizer = AdadeltaKeras([{"params": model.parameters()}, {"params": [other]}], 1.0, **path.options)
    to_bfloat16(model, optimizer)
    assert [group["master_weights"] for group in optimizer.param_groups] == [True, False]
    assert [group["state_dtype"] for group in optimizer.param_groups] == [FLOAT32, None]
    advance(optimizer)
    assert optimizer.state[other]["square_avg"].dtype is torch.float16


def test_remainders_go_with_their_masters_where_a_group_keeps_others(path: Path) -> None:
    """In a group of two models, of which one becomes float32."""
    model, other = nn.Linear(2, 2).bfloat16(), Parameter(torch.ones(2, dtype=BFLOAT16))
    optimizer = AdadeltaKeras([*model.parameters(), other], 1.0, **MASTERS, **path.options)
    advance(optimizer)
    optimizer.zero_grad()
    to_float32(model, optimizer)
    assert optimizer.master_weights
    assert ["remainder" in optimizer.state[param] for param in params_of(optimizer)] == [False, False, True]
    advance(optimizer)


def test_state_in_bfloat16_stays_there(path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = AdadeltaKeras(model.parameters(), 1.0, state_dtype=BFLOAT16, **path.options)
    advance(optimizer)
    optimizer.zero_grad()
    for convert in (to_bfloat16, to_float32):
        convert(model, optimizer)
        assert optimizer.state_dtype is BFLOAT16
        assert optimizer.state[model.weight]["square_avg"].dtype is BFLOAT16
    plain = AdadeltaKeras([Parameter(torch.ones(2, dtype=BFLOAT16))], 1.0, **path.options)
    advance(plain)
    plain.zero_grad()
    to_float32(nn.ParameterList(params_of(plain)), plain)
    assert plain.state[params_of(plain)[0]]["acc_delta"].dtype is FLOAT32
    advance(plain)


def test_what_cannot_be_converted_is_refused(path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = AdadeltaKeras(model.parameters(), 1.0, **path.options)
    advance(optimizer)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 has a gradient of torch\.float32\. Call zero_grad"):
        to_bfloat16(model, optimizer)
    optimizer.zero_grad()
    handle = step_in_backward(optimizer)
    with pytest.raises(RuntimeError, match=r"step_in_backward is on, .* remove\(\) it first"):
        to_bfloat16(model, optimizer)
    handle.remove()
    assert_unchanged(optimizer, before)
    params: list[Any] = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.float64))]
    mixed = AdadeltaKeras(params, 1.0, **path.options)
    before = snapshot(mixed)
    with pytest.raises(
        ValueError, match=r"parameter 1 of group 0 has dtype torch\.float64, and state_dtype=torch\.float32"
    ):
        to_bfloat16(nn.ParameterList(params), mixed)
    assert_unchanged(mixed, before)


def test_conversions_in_inference_mode(path: Path) -> None:
    model = nn.Linear(4, 2)
    optimizer = AdadeltaKeras(model.parameters(), 1.0, **path.options)
    for convert in (to_bfloat16, to_float32):
        train(model, optimizer, 1)
        with torch.inference_mode():
            convert(model, optimizer)
        assert not model.weight.is_inference()
    train(model, optimizer, 1)


def test_models_that_the_optimizer_was_not_made_for_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = AdadeltaKeras(model[0].parameters(), 1.0)
    with pytest.raises(TypeError, match="the optimizer must be an AdadeltaKeras, got SGD"):
        to_bfloat16(model, torch.optim.SGD(model.parameters(), 0.1))  # type: ignore[type-var]
    with pytest.raises(ValueError, match="the optimizer has no parameter of this model"):
        to_bfloat16(model[1], optimizer)
    model[1].bias.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"^1\.bias has a gradient of torch\.float32"):
        to_bfloat16(model, optimizer)
    assert {param.dtype for param in model.parameters()} == {FLOAT32}


def test_differentiable_optimizers_are_refused() -> None:
    model = nn.Linear(2, 2)
    optimizer = AdadeltaKeras(model.parameters(), 1.0, differentiable=True)
    before = snapshot(optimizer)
    message = "master_weights=True cannot be combined with differentiable=True: .*Train float32 parameters"
    with pytest.raises(ValueError, match=message):
        to_bfloat16(model, optimizer)
    assert_unchanged(optimizer, before)
    with pytest.raises(ValueError, match=message):
        AdadeltaKeras(model.parameters(), master_weights=True, differentiable=True)
    optimizer.state_dtype = BFLOAT16  # autograd follows the rounding


# ---- Options --------------------------------------------------------------------------------------------------------


def test_options_are_set_and_state_is_converted(path: Path) -> None:
    optimizer, params = bfloat16_optimizer(path)
    state = optimizer.state[params[0]]
    before = {key: value.clone() for key, value in state.items()}
    optimizer.state_dtype = None
    assert_same_bits(state["square_avg"], before["square_avg"].to(BFLOAT16))
    optimizer.state_dtype = FLOAT32
    assert_same_bits(state["acc_delta"], before["acc_delta"].to(BFLOAT16).float())
    assert torch.equal(state["remainder"], before["remainder"])
    optimizer.master_weights = False
    assert "remainder" not in state
    advance(optimizer)
    assert "remainder" not in state
    optimizer.add_param_group({"params": [Parameter(torch.ones(2, dtype=BFLOAT16))]})
    assert optimizer.param_groups[1]["master_weights"] is False
    optimizer.master_weights = True
    advance(optimizer)
    assert state["remainder"].dtype is torch.int16
    before_set = snapshot(optimizer)
    for name, value, error, message in (
        (
            "state_dtype",
            torch.float16,
            ValueError,
            r"Invalid state_dtype: torch\.float16; it must be None, torch\.float32",
        ),
        (
            "state_dtype",
            "bfloat16",
            TypeError,
            r"state_dtype must be None, torch\.float32 or torch\.bfloat16, got 'bfloat16'",
        ),
        ("master_weights", 1, TypeError, "master_weights must be True or False, got 1"),
    ):
        with pytest.raises(error, match=message):
            setattr(optimizer, name, value)
        with pytest.raises(error, match=message):
            AdadeltaKeras([Parameter(torch.ones(1))], **{name: value})
    assert_unchanged(optimizer, before_set)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float16, {"master_weights": True}),
        (torch.complex64, {"master_weights": True}),
        (torch.float64, {"state_dtype": FLOAT32}),
        (torch.complex64, {"state_dtype": BFLOAT16}),
    ],
    ids=str,
)
def test_dtypes_that_an_option_is_not_for(dtype: torch.dtype, options: dict[str, Any]) -> None:
    params = [Parameter(torch.ones(1)), Parameter(torch.ones(1, dtype=dtype))]
    message = rf"parameter 1 of group {{}} has dtype {re.escape(str(dtype))}, and .*=.* is for "
    with pytest.raises(ValueError, match=message.format(0)):
        AdadeltaKeras(params, **options)
    optimizer = AdadeltaKeras([Parameter(torch.ones(1))], **options)
    with pytest.raises(ValueError, match=message.format(1)):
        optimizer.add_param_group({"params": params})
    assert len(optimizer.param_groups) == 1
    plain = AdadeltaKeras(params)
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=message.format(0)):
        setattr(plain, name, value)
    plain.param_groups[0].update(options)
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=message.format(0)):
        plain.step()


def test_averages_that_would_never_decay_are_warned_of() -> None:
    params = [Parameter(torch.ones(1))]
    message = r"rho=0\.999 with state in bfloat16: .* Use state_dtype=torch\.float32, or a rho <= 0\.998"
    with pytest.warns(UserWarning, match=message):
        AdadeltaKeras([Parameter(torch.ones(1, dtype=BFLOAT16))], rho=0.999)
    with pytest.warns(UserWarning, match=message):
        optimizer = AdadeltaKeras(params, rho=0.999, state_dtype=BFLOAT16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.rho = 0.998
        optimizer.state_dtype = None
        optimizer.rho = 0.999
        AdadeltaKeras(params, rho=torch.tensor(0.999), state_dtype=BFLOAT16)
        AdadeltaKeras(params, rho=1.0, state_dtype=BFLOAT16)
        AdadeltaKeras([Parameter(torch.ones(1, dtype=BFLOAT16))], rho=0.999, state_dtype=FLOAT32)
        with pytest.raises(UserWarning, match=message):
            optimizer.state_dtype = BFLOAT16
        assert optimizer.state_dtype is None
        with pytest.raises(UserWarning, match=message):
            optimizer.add_param_group({"params": [Parameter(torch.ones(1))], "state_dtype": BFLOAT16})
        assert len(optimizer.param_groups) == 1
    decayed = torch.tensor(1.5, dtype=BFLOAT16)
    assert (decayed.float() * 0.9981).to(BFLOAT16) == decayed
    assert (torch.tensor(1.9921875) * 0.998).to(BFLOAT16) < 1.9921875


def test_masters_are_read_and_set(path: Path) -> None:
    optimizer, params = bfloat16_optimizer(path)
    optimizer.add_param_group({"params": [Parameter(torch.ones(2)), Parameter(torch.ones(2, dtype=BFLOAT16))]})
    own, fresh = optimizer.param_groups[1]["params"]
    rows = list(optimizer.master_params())
    assert [param for param, _ in rows] == [*params, own, fresh]
    assert all(master.dtype is FLOAT32 and not master.requires_grad for _, master in rows)
    assert rows[2][1].data_ptr() == own.data_ptr()
    assert_same_bits(rows[3][1], torch.ones(2))
    value = torch.tensor([0.1, 1 + 2**-20])
    for param in (own, fresh):
        optimizer.set_master(param, value)
    assert_same_bits(dict(optimizer.master_params())[fresh], value)
    assert_same_bits(own, value)
    with pytest.raises(KeyError):
        optimizer.set_master(Parameter(torch.ones(2)), value)
    message = (
        r"parameter 1 of group 1 is a Parameter of shape \(2,\), and its master cannot be a Tensor of shape \(1,\)"
    )
    with pytest.raises(ValueError, match=message):
        optimizer.set_master(fresh, torch.zeros(1))
    assert_same_bits(dict(optimizer.master_params())[fresh], value)


# ---- Averages -------------------------------------------------------------------------------------------------------


def test_averages_follow_masters_and_change_places_with_them(path: Path) -> None:
    optimizer, params = bfloat16_optimizer(path, use_ema=True, ema_momentum=0.75)
    before = [x.clone() for x in optimizer.state_dict()["state"][0].values()]
    own = [(param.detach().clone(), master) for param, master in optimizer.master_params()]
    averages = [optimizer.state[param]["average"].clone() for param in params]
    with optimizer.swap_averages():
        for (param, master), average, (_, was) in zip(optimizer.master_params(), averages, own, strict=True):
            assert_same_bits(master, average)
            assert_same_bits(optimizer.state[param]["average"], was)
    for (param, master), (was, was_master) in zip(optimizer.master_params(), own, strict=True):
        assert_same_bits(param.detach(), was)
        assert_same_bits(master, was_master)
    for now, was in zip(optimizer.state_dict()["state"][0].values(), before, strict=True):
        assert torch.equal(now, was)
    for state in optimizer.state.values():
        del state["remainder"]  # as after loading a training without masters
    optimizer.finalize_variable_values()
    for (_, master), average in zip(optimizer.master_params(), averages, strict=True):
        assert_same_bits(master, average)


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


def reloaded(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def test_masters_and_state_are_saved_and_copied(path: Path) -> None:
    optimizer, params = bfloat16_optimizer(path, use_ema=True)
    twin = AdadeltaKeras([Parameter(param.detach().clone()) for param in params], **MASTERS, **path.options)
    twin.load_state_dict(reloaded(optimizer.state_dict()))
    copies = [twin, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    for other in copies:
        assert_same_training(other, optimizer)
    advance(optimizer, 2, seed=5)
    for other in copies:
        advance(other, 2, seed=5)
        assert_same_training(other, optimizer)


@pytest.mark.parametrize("saved", [None, FLOAT32, BFLOAT16])
@pytest.mark.parametrize("loading", [None, FLOAT32, BFLOAT16])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_state_takes_the_dtype_of_the_optimizer_that_loads(path: Path, dtype: Any, loading: Any, saved: Any) -> None:
    """Rounded once. The parameter's dtype, which PyTorch casts to, does not come between."""
    params = [Parameter(torch.ones(7, dtype=dtype))]
    ours = AdadeltaKeras(params, 1.0, state_dtype=saved, master_weights=True, **path.options)
    advance(ours, 3)
    ours.state[params[0]]["others"] = torch.tensor([0.1], dtype=torch.float64)
    other = AdadeltaKeras(
        [Parameter(torch.ones(7, dtype=dtype))], state_dtype=loading, master_weights=True, **path.options
    )
    before = copy.deepcopy(ours.state_dict())
    other.load_state_dict(ours.state_dict())
    assert (other.state_dtype, other.master_weights, other.learning_rate) == (loading, True, 1.0)
    state = other.state[params_of(other)[0]]
    for key in ("square_avg", "acc_delta"):
        assert state[key].dtype is (loading or dtype)
        assert_same_bits(state[key], before["state"][0][key].to(loading or dtype))
    assert torch.equal(state["others"], ours.state[params[0]]["others"])
    assert state.keys() == ours.state[params[0]].keys()
    assert all(state[key].data_ptr() != ours.state[params[0]][key].data_ptr() for key in state)
    advance(other)


def test_remainders_that_no_master_takes_are_dropped(path: Path) -> None:
    optimizer, params = bfloat16_optimizer(path)
    state_dict = optimizer.state_dict()
    for dtype, options in ((BFLOAT16, {}), (FLOAT32, {"master_weights": True})):
        other = AdadeltaKeras([Parameter(param.detach().to(dtype)) for param in params], **options, **path.options)
        with pytest.warns(UserWarning, match=r"the remainders of 2 masters, which are dropped: .*master_weights=True"):
            other.load_state_dict(state_dict)
        assert all("remainder" not in state for state in other.state.values())
        assert not other.master_weights or options
        advance(other)
    without = AdadeltaKeras([Parameter(param.detach().clone()) for param in params], **path.options)
    advance(without)
    optimizer.load_state_dict(without.state_dict())
    assert all("remainder" not in state for state in optimizer.state.values())
    for param, master in optimizer.master_params():
        assert_same_bits(master, param.detach().float())
    advance(optimizer)
    assert all("remainder" in state for state in optimizer.state.values())


@pytest.mark.parametrize(
    ("remainder", "message"),
    [
        (
            torch.zeros(2, dtype=torch.int16),
            r"parameter 1 of group 0 has shape \(5,\), but the state remainder to load is",
        ),
        (1, r"parameter 1 of group 0 has shape \(5,\), but the state remainder to load is 1"),
        (
            torch.zeros(5),
            r"parameter 1 of group 0: the state remainder to load has dtype torch\.float32, not torch\.int16",
        ),
    ],
)
def test_remainders_that_cannot_be_loaded(path: Path, remainder: Any, message: str) -> None:
    optimizer, _ = bfloat16_optimizer(path)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][1]["remainder"] = remainder
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    assert_unchanged(optimizer, before)


def test_a_checkpoint_of_version_0_1_loads(path: Path) -> None:
    """It knows neither option."""
    optimizer, params = bfloat16_optimizer(path)
    usual = AdadeltaKeras([Parameter(param.detach().clone()) for param in params], **path.options)
    advance(usual)
    state_dict = usual.state_dict()
    for group in state_dict["param_groups"]:
        del group["master_weights"], group["state_dtype"]
    optimizer.load_state_dict(state_dict)
    assert (optimizer.master_weights, optimizer.state_dtype) == (True, FLOAT32)
    usual.load_state_dict(state_dict)
    assert (usual.master_weights, usual.state_dtype) == (False, None)
    advance(optimizer)


def test_keras_weights_of_an_optimizer_are_of_its_state(path: Path) -> None:
    optimizer, params = bfloat16_optimizer(path)
    weights = optimizer.get_weights()
    assert [w.dtype.name for w in weights[1:]] == ["float32"] * 4
    other = AdadeltaKeras([Parameter(param.detach().clone()) for param in params], **MASTERS, **path.options)
    other.set_weights(weights)
    for param, same in zip(params, params_of(other), strict=True):
        assert_same_bits(other.state[same]["square_avg"], optimizer.state[param]["square_avg"])


# ---- Lazy modules ---------------------------------------------------------------------------------------------------


def test_parameters_without_a_shape_have_no_master_yet() -> None:
    model = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2))
    optimizer = AdadeltaKeras(model.parameters(), master_weights=True)
    assert [param for param, _ in optimizer.master_params()] == list(model[1].parameters())
    for convert in (to_bfloat16, to_float32):
        with pytest.raises(ValueError, match=r"0\.weight has no shape yet\. Run the model once"):
            convert(model, optimizer)
    model(torch.ones(1, 3))
    to_bfloat16(model, optimizer)
    assert model[0].weight.dtype is BFLOAT16


def test_no_master_is_set_amid_a_swap(path: Path) -> None:
    optimizer, params = bfloat16_optimizer(path, use_ema=True)
    with optimizer.swap_averages(), pytest.raises(RuntimeError, match="no master can be set inside of swap_averages"):
        optimizer.set_master(params[0], torch.zeros(3, 4))


def test_a_checkpoint_may_bring_a_rho_that_is_warned_of() -> None:
    optimizer = AdadeltaKeras([Parameter(torch.ones(1))], state_dtype=BFLOAT16)
    state_dict = AdadeltaKeras([Parameter(torch.ones(1))], rho=0.999).state_dict()
    with pytest.warns(UserWarning, match=r"rho=0\.999 with state in bfloat16"):
        optimizer.load_state_dict(state_dict)


def test_float64_state_is_rounded_once(path: Path) -> None:
    """1 + 2**-8 + 2**-40 is nearer to 1 + 2**-7 than to 1; by way of float32 it would be in the middle."""
    wide = AdadeltaKeras([Parameter(torch.ones(1, dtype=torch.float64))])
    advance(wide)
    state_dict = wide.state_dict()
    state_dict["state"][0]["square_avg"].fill_(1 + 2**-8 + 2**-40)
    plain = AdadeltaKeras([Parameter(torch.ones(1, dtype=BFLOAT16))], **path.options)
    plain.load_state_dict(state_dict)
    assert float(plain.state[params_of(plain)[0]]["square_avg"]) == 1 + 2**-7
