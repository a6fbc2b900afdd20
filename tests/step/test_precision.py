"""State of another dtype than the parameter's, and remainders of masters: what a step makes of them, and what it refuses."""

from collections.abc import Callable
from typing import Any

import direct
import pytest
import torch
from cases import (
    Path,
    assert_like_oracle,
    assert_optimizer_like_oracle,
    assert_same_bits,
    assert_unchanged,
    coo_gradient,
    dtype_name,
    gradients,
    optimizer_oracle_of,
    oracle_of,
    randn,
    snapshot,
    to_numpy,
    to_oracle,
)
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter
from training import path as path

from torch_adadelta import AdadeltaKeras, schedules
from torch_adadelta.backends import kernels
from torch_adadelta.step import precision

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32

# The dtypes of parameters and state, and whether there are masters: all that there is besides the parameter's own.
COMBINATIONS: list[tuple[torch.dtype, torch.dtype | None, bool]] = [
    (FLOAT32, BFLOAT16, False),
    (FLOAT32, FLOAT32, True),
    (FLOAT32, BFLOAT16, True),
    (FLOAT16, FLOAT32, False),
    (FLOAT16, BFLOAT16, False),
    (BFLOAT16, FLOAT32, False),
    (BFLOAT16, None, True),
    (BFLOAT16, FLOAT32, True),
    (BFLOAT16, BFLOAT16, True),
]

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "maximize, clipvalue": {"maximize": True, "clipvalue": 0.5},
    "clipnorm": {"clipnorm": 0.7},
    "global_clipnorm": {"global_clipnorm": 0.9, "loss_scale_factor": 3.0},
    "weight_decay": {"weight_decay": 0.25, "decay": 0.5},
    "penalty": {"weight_decay": 0.25, "decoupled_weight_decay": False},
    "averages": {"use_ema": True, "ema_momentum": 0.75},
    "overwritten": {"use_ema": True, "ema_momentum": 0.75, "ema_overwrite_frequency": 2, "weight_decay": 0.1},
    "accumulation": {"gradient_accumulation_steps": 2, "use_ema": True},
    "schedule": {"learning_rate": schedules.ExponentialDecay(1.0, 2, 0.5)},
}


def names(state_dtype: torch.dtype | None) -> str | None:
    return None if state_dtype is None else dtype_name(state_dtype)


def optimizer_of(
    path: Path,
    combination: tuple[torch.dtype, torch.dtype | None, bool],
    shapes: Any = ((5, 3), (70,), ()),
    **options: Any,
) -> tuple[AdadeltaKeras, list[Parameter]]:
    dtype, state_dtype, master_weights = combination
    generator = torch.Generator().manual_seed(3)
    params = [Parameter(randn(shape, dtype, generator)) for shape in shapes]
    own = {
        "learning_rate": 1.0,
        "master_weights": master_weights,
        "state_dtype": state_dtype,
        **options,
        **path.options,
    }
    return AdadeltaKeras(params, **own), params


def step(optimizer: AdadeltaKeras, *grads: Tensor | None) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_it_has_the_bits_of_the_oracle(path: Path, combination: Any, options: dict[str, Any]) -> None:
    dtype, state_dtype, master_weights = combination
    optimizer, params = optimizer_of(path, combination, **options)
    own = {"learning_rate": 1.0, **options, "master_weights": master_weights, "state_dtype": names(state_dtype)}
    if "learning_rate" in options:
        own["learning_rate"] = lambda t: t.dtype.type(0.5) ** (t / t.dtype.type(2))
    expected = optimizer_oracle_of(params, **own)
    for k in range(6):
        grads = [gradients(param.shape, dtype, 1, seed=10 * k + i)[0] for i, param in enumerate(params)]
        grads[1] = None if k == 1 and len(options) < 2 else grads[1]
        step(optimizer, *grads)
        expected.step(to_oracle(grads))
        assert_optimizer_like_oracle(optimizer, expected, f"after step {k}")
    for param, one in zip(params, expected.oracles, strict=True):
        state = optimizer.state[param]
        assert state["square_avg"].dtype is state["acc_delta"].dtype is (state_dtype or dtype)
        assert ("remainder" in state) == (one.remainder is not None) == (master_weights and dtype is BFLOAT16)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "use_ema": True}, {"clipnorm": 0.7}], ids=str)
@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_sparse_gradients(path: Path, combination: Any, options: dict[str, Any]) -> None:
    dtype, state_dtype, master_weights = combination
    optimizer, params = optimizer_of(path, combination, ((9, 4), (5,)), **options)
    own = {"learning_rate": 1.0, **options, "master_weights": master_weights, "state_dtype": names(state_dtype)}
    expected = optimizer_oracle_of(params, **own)
    for k in range(5):
        grads = [coo_gradient((9, 4), dtype, 6, sparse_dims=1 + k % 2, seed=k), gradients((5,), dtype, 1, seed=k)[0]]
        step(optimizer, *grads)
        expected.step(to_oracle(grads))
        assert_optimizer_like_oracle(optimizer, expected, f"after step {k}")


@pytest.mark.parametrize("combination", [(FLOAT32, None, False), (BFLOAT16, None, False), *COMBINATIONS], ids=str)
def test_a_thousand_steps(path: Path, combination: Any) -> None:
    dtype, state_dtype, master_weights = combination
    optimizer, (param,) = optimizer_of(path, combination, ((70,),))
    expected = oracle_of(param, learning_rate=1.0, master_weights=master_weights, state_dtype=names(state_dtype))
    for grad in gradients((70,), dtype, 1000, seed=5):
        step(optimizer, grad)
        expected.step(to_numpy(grad))
    assert_like_oracle(param, optimizer.state[param], expected)


def test_masters_with_float32_state_train_as_float32_parameters_do(path: Path) -> None:
    """A thousand steps with the same gradients: the same masters and accumulators, bit by bit."""
    optimizer, params = optimizer_of(path, (BFLOAT16, FLOAT32, True), weight_decay=0.01)
    wide = [Parameter(param.detach().float()) for param in params]
    usual = AdadeltaKeras(wide, 1.0, weight_decay=0.01, **path.options)
    for k in range(1000):
        grads = [gradients(param.shape, BFLOAT16, 1, seed=10 * k + i)[0] for i, param in enumerate(params)]
        step(optimizer, *grads)
        step(usual, *[grad.float() for grad in grads])
    for (param, master), same in zip(optimizer.master_params(), wide, strict=True):
        assert_same_bits(master, same.detach())
        for key, state in usual.state[same].items():
            assert_same_bits(optimizer.state[param][key], state)


def test_groups_of_every_kind_in_one_step(path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    kinds = [(FLOAT32, None, False), (torch.float64, None, True), (BFLOAT16, None, False), *COMBINATIONS]
    groups = [
        {
            "params": [Parameter(randn((3,), dtype, generator)) for _ in range(2)],
            "state_dtype": state_dtype,
            "master_weights": master_weights,
            "weight_decay": 0.1 * index,
        }
        for index, (dtype, state_dtype, master_weights) in enumerate(kinds)
    ]
    optimizer = AdadeltaKeras(groups, 1.0, global_clipnorm=100.0, **path.options)
    params = [param for group in groups for param in group["params"]]
    alone = [
        optimizer_oracle_of(
            [param], master_weights=kind[2], state_dtype=names(kind[1]), learning_rate=1.0, weight_decay=0.1 * index
        )
        for index, kind in enumerate(kinds)
        for param in groups[index]["params"]
    ]
    for _ in range(4):
        grads = [randn((3,), param.dtype, generator) for param in params]
        step(optimizer, *grads)
        for oracle, grad in zip(alone, grads, strict=True):
            oracle.step(to_oracle([grad]))
    for param, oracle in zip(params, alone, strict=True):
        assert_like_oracle(param, optimizer.state[param], oracle.oracles[0], str(param.dtype))


def test_a_parameter_that_is_listed_twice(path: Path) -> None:
    optimizer, (param,) = optimizer_of(path, (BFLOAT16, FLOAT32, True), ((4,),))
    expected = oracle_of(param, learning_rate=1.0, master_weights=True, state_dtype="float32")
    for k in range(3):
        grads = gradients((4,), BFLOAT16, 2, seed=k)
        optimizer.apply_gradients([(grad, param) for grad in grads])
        for grad in grads:
            expected.step(to_numpy(grad))
    assert_like_oracle(param, optimizer.state[param], expected)


def test_variables_of_the_norm(path: Path) -> None:
    """A parameter in pieces, each with its rows of the remainder."""
    optimizer, (param,) = optimizer_of(path, (BFLOAT16, FLOAT32, True), ((6, 3),), clipnorm=0.5)
    optimizer.norm_variables = [[(param, 0, 4)], [(param, 4, 6)]]
    expected = optimizer_oracle_of(
        [param],
        learning_rate=1.0,
        master_weights=True,
        state_dtype="float32",
        clipnorm=0.5,
        norm_variables=[[(0, 0, 4)], [(0, 4, 6)]],
    )
    for k in range(3):
        grads = gradients((6, 3), BFLOAT16, 1, seed=k)
        step(optimizer, *grads)
        expected.step(to_oracle(grads))
    assert_optimizer_like_oracle(optimizer, expected)


# ---- Whoever writes a parameter -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "value"),
    [
        (lambda p: p.zero_(), 0.0),
        (lambda p: p.mul_(torch.zeros_like(p)), None),
        (lambda p: p.fill_(torch.inf), torch.inf),
        (lambda p: p.fill_(-torch.inf), -torch.inf),
        (lambda p: p.copy_(torch.arange(70.0)), None),
    ],
    ids=["zero_", "mask", "inf", "-inf", "loaded"],
)
def test_a_parameter_that_somebody_wrote(path: Path, write: Callable[[Tensor], Any], value: float | None) -> None:
    """Over remainders of all kinds: no nan, and no master is further off than half a unit in the last place."""
    optimizer, (param,) = optimizer_of(path, (BFLOAT16, FLOAT32, True), ((70,),))
    for grad in gradients((70,), BFLOAT16, 3):
        step(optimizer, grad)
    assert set(optimizer.state[param]["remainder"].sign().tolist()) >= {-1, 1}
    with torch.no_grad():
        write(param)
    ((_, master),) = optimizer.master_params()
    assert not master.isnan().any()
    distance = (master.view(torch.int32) - param.detach().float().view(torch.int32)).abs()
    assert int(distance.max()) <= 2**15
    if value is not None:
        assert (master == value).any()
    step(optimizer, torch.zeros(70, dtype=BFLOAT16))
    assert not param.isnan().any()


def test_distributed_tensors(path: Path, mesh: DeviceMesh) -> None:
    """They have distributed remainders, and the bits of plain tensors."""
    ours, plain = optimizer_of(path, (BFLOAT16, FLOAT32, True), ((5, 3), (4,)))
    spread = [Parameter(distribute_tensor(param.detach().clone(), mesh, [Shard(0)])) for param in plain]
    options = {"state_dtype": FLOAT32, "master_weights": True, **path.options}
    theirs = AdadeltaKeras(spread, 1.0, **options)
    for k in range(3):
        grads = [gradients(param.shape, BFLOAT16, 1, seed=10 * k + i)[0] for i, param in enumerate(plain)]
        step(ours, *grads)
        step(theirs, *(distribute_tensor(grad, mesh, [Shard(0)]) for grad in grads))
        for one, other in zip(plain, spread, strict=True):
            assert torch.equal(one, other.to_local())
            for key, tensor in ours.state[one].items():
                assert torch.equal(theirs.state[other][key].to_local(), tensor), key
    theirs.state[spread[1]]["remainder"] = torch.zeros(4, dtype=torch.int16)
    with pytest.raises(RuntimeError, match="parameter 1 of group 0 is a DTensor, but its state remainder is a Tensor"):
        theirs.step()


def test_state_is_converted_to_what_groups_ask_for() -> None:
    params = [torch.ones(2, dtype=dtype) for dtype in (BFLOAT16, BFLOAT16, FLOAT32, BFLOAT16, FLOAT32)]
    groups: list[dict[str, Any]] = [
        {"params": params[:1], "state_dtype": FLOAT32, "master_weights": True},
        {"params": params[1:], "state_dtype": None, "master_weights": False},
    ]
    remainder = torch.ones(2, dtype=torch.int16)
    state: dict[Tensor, dict[str, Any]] = {
        params[0]: {
            "square_avg": torch.full((2,), 0.5, dtype=BFLOAT16),
            "acc_delta": torch.ones(2),
            "remainder": remainder,
        },
        params[1]: {"square_avg": torch.full((2,), 0.5), "acc_delta": torch.ones(2), "remainder": remainder, "mine": 7},
        params[2]: {"square_avg": torch.full((2,), 0.5)},
        params[3]: {"remainder": remainder},
    }
    precision.convert_state(groups, state, {params[2]: FLOAT16})
    dtypes = [{key: getattr(value, "dtype", value) for key, value in entry.items()} for entry in state.values()]
    assert dtypes == [
        {"square_avg": FLOAT32, "acc_delta": FLOAT32, "remainder": torch.int16},
        {"square_avg": BFLOAT16, "acc_delta": BFLOAT16, "mine": 7},
        {"square_avg": FLOAT16},
    ]
    assert list(state) == params[:3]
    assert all(entry["square_avg"].tolist() == [0.5, 0.5] for entry in state.values())


# ---- What is refused ------------------------------------------------------------------------------------------------


def spoiled(optimizer: AdadeltaKeras, param: Tensor, key: str, value: Any) -> None:
    if value is None:
        del optimizer.state[param][key]
    else:
        optimizer.state[param][key] = value


@pytest.mark.parametrize("is_sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("square_avg", torch.zeros(4, 3, dtype=BFLOAT16), "its state square_avg has dtype torch.bfloat16. Convert the"),
        (
            "acc_delta",
            torch.zeros(4, 3, dtype=FLOAT16),
            "its state acc_delta has dtype torch.float16. Convert the state",
        ),
        ("remainder", torch.zeros(4, 3), "its state remainder has dtype torch.float32, not torch.int16. Delete it"),
        ("remainder", torch.zeros(4, dtype=torch.int16), "has shape (4, 3), but its state remainder has shape (4,)"),
        ("remainder", 3, "its state remainder is 3, not a Tensor"),
        ("acc_delta", torch._neg_view(torch.zeros(4, 3)), "its state acc_delta is a lazily conjugated or negated view"),
        (
            "remainder",
            torch.zeros(1, dtype=torch.int16).expand(4, 3),
            "its state remainder is not a dense tensor of its",
        ),
    ],
)
def test_state_that_does_not_fit_is_refused_by_name(
    path: Path, key: str, value: Any, message: str, is_sparse: bool
) -> None:
    optimizer, params = optimizer_of(path, (BFLOAT16, FLOAT32, True), ((4, 3), (4, 3)))
    grads = [
        coo_gradient((4, 3), BFLOAT16, 2, seed=i) if is_sparse else gradients((4, 3), BFLOAT16, 1, i)[0] for i in (0, 1)
    ]
    step(optimizer, *grads)
    optimizer.state[params[1]][key] = value
    before = snapshot(optimizer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="parameter 1 of group 0") as caught:
            optimizer.step()
        assert message in str(caught.value)
        assert "partial" not in str(caught.value)
        assert_unchanged(optimizer, before)


def test_a_remainder_that_is_missing_is_made_anew(path: Path) -> None:
    optimizer, (param,) = optimizer_of(path, (BFLOAT16, FLOAT32, True), ((4,),))
    step(optimizer, torch.ones(4, dtype=BFLOAT16))
    del optimizer.state[param]["remainder"]
    expected = oracle_of(param, learning_rate=1.0, master_weights=True, state_dtype="float32")
    state = optimizer.state[param]
    expected.square_avg, expected.acc_delta = (to_numpy(state[key]).copy() for key in ("square_avg", "acc_delta"))
    grad = torch.full((4,), 0.5, dtype=BFLOAT16)
    step(optimizer, grad)
    expected.step(to_numpy(grad))
    assert_like_oracle(param, optimizer.state[param], expected)


def test_a_parameter_that_becomes_its_average_has_that_as_its_master(path: Path) -> None:
    """Without a gradient since its masters began, it has no remainder yet."""
    options = {"use_ema": True, "ema_momentum": 0.75}
    usual, params = optimizer_of(path, (BFLOAT16, None, False), ((70,), (4,)), **options)
    for k in range(3):
        step(usual, *[gradients(param.shape, BFLOAT16, 1, seed=k)[0] for param in params])
    optimizer, own = optimizer_of(path, (BFLOAT16, FLOAT32, True), ((70,), (4,)), ema_overwrite_frequency=1, **options)
    own[0].data.copy_(params[0])
    optimizer.load_state_dict(usual.state_dict())
    optimizer.ema_overwrite_frequency = 1
    step(optimizer, None, torch.ones(4, dtype=BFLOAT16))
    average = optimizer.state[own[0]]["average"]
    assert (average != own[0]).any()
    assert_same_bits(dict(optimizer.master_params())[own[0]], average)


def test_a_model_that_was_converted_by_itself_is_refused(path: Path) -> None:
    """The state stays float32, which nobody asked for; the message shows the way, and it works."""
    optimizer, (param,) = optimizer_of(path, (FLOAT32, None, False), ((4,),))
    step(optimizer, torch.ones(4))
    param.grad, param.data = None, param.data.to(BFLOAT16)
    param.grad = torch.ones(4, dtype=BFLOAT16)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="its state square_avg has dtype") as caught:
        optimizer.step()
    assert_unchanged(optimizer, before)
    remedy = str(caught.value).partition("too:\n")[2]
    exec("if True:\n" + remedy, {"optimizer": optimizer})
    optimizer.step()
    assert optimizer.state[param]["square_avg"].dtype is BFLOAT16


def test_a_parameter_that_becomes_bfloat16_amid_masters_gets_a_remainder(path: Path) -> None:
    """Its dtype changes under the partition of the last step, which asked for no remainder."""
    optimizer, (param,) = optimizer_of(path, (FLOAT32, FLOAT32, True), ((4,),))
    step(optimizer, torch.ones(4))
    param.grad, param.data = None, param.data.to(BFLOAT16)
    state = optimizer.state[param]
    expected = oracle_of(param, learning_rate=1.0, master_weights=True, state_dtype="float32")
    expected.square_avg, expected.acc_delta = (to_numpy(state[key]).copy() for key in ("square_avg", "acc_delta"))
    for grad in gradients((4,), BFLOAT16, 2):
        step(optimizer, grad)
        expected.step(to_numpy(grad))
    assert_like_oracle(param, state, expected)


def test_a_group_that_is_written_to(path: Path) -> None:
    optimizer, (param,) = optimizer_of(path, (BFLOAT16, None, False), ((4,),))
    step(optimizer, torch.ones(4, dtype=BFLOAT16))
    optimizer.param_groups[0]["state_dtype"] = FLOAT32
    with pytest.raises(RuntimeError, match=r"bfloat16, and state_dtype=torch\.float32, but its state square_avg"):
        optimizer.step()
    optimizer.param_groups[0]["state_dtype"] = FLOAT16
    with pytest.raises(ValueError, match=r"Invalid state_dtype: torch\.float16; it must be None"):
        optimizer.step()
    optimizer.param_groups[0].update(state_dtype=None, master_weights=True)
    optimizer.step()
    assert optimizer.state[param]["remainder"].dtype is torch.int16


@pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")
def test_the_library_takes_gradients_of_any_dtype() -> None:
    for combination in COMBINATIONS:
        for grad_dtype in (FLOAT32, BFLOAT16, torch.float64):
            results = []
            for fused in (True, False):
                optimizer, (param,) = optimizer_of(Path("", direct.fused, {"fused": fused}), combination, ((70,),))
                group = optimizer.param_groups[0]
                for grad in gradients((70,), grad_dtype, 3):
                    optimizer.apply_gradients([(grad, param)])
                results.append([param.detach(), *optimizer.state[group["params"][0]].values()])
            for ours, expected in zip(*results, strict=True):
                assert torch.equal(ours.view(torch.uint8), expected.view(torch.uint8))
