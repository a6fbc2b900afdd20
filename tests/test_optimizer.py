"""The torch.optim contract: groups, state, closures, flags, derivatives, and what the constructor refuses."""

import copy
import math
import warnings
from typing import Any

import expecttest
import pytest
import torch
from cases import (
    DTYPES,
    Path,
    assert_like_oracle,
    assert_same_bits,
    assert_unchanged,
    dtype_name,
    gradients,
    optimizer_with,
    oracle_of,
    randn,
    snapshot,
)
from torch import nn
from torch.nn import Parameter
from training import advance, assert_same_training, give_gradients, params_of, stepped, trained
from training import path as path

from torch_adadelta import AdadeltaKeras, options, schedules
from torch_adadelta.step import norm_variables, selection, validation
from torch_adadelta.step.sources import Sources


class Subclass(torch.Tensor):
    """A tensor that may mean anything by its operators."""


# ---- State, gradients and the closure --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_state_is_lazy_and_like_the_parameter(path: Path, dtype: torch.dtype) -> None:
    param = Parameter(torch.ones(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last))
    idle = Parameter(torch.ones(2, dtype=dtype))
    optimizer = AdadeltaKeras([param, idle], **path.options)
    assert not optimizer.state
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert set(optimizer.state) == {param}
    assert set(optimizer.state[param]) == {"square_avg", "acc_delta"}
    for tensor in optimizer.state[param].values():
        assert (tensor.shape, tensor.dtype, tensor.stride()) == (param.shape, param.dtype, param.stride())
        assert type(tensor) is torch.Tensor
        assert not tensor.requires_grad


@pytest.mark.parametrize(("count", "numel"), [(3, 4), (80, 512)], ids=["few", "many"])
def test_lazy_clones_keep_their_values(path: Path, count: int, numel: int) -> None:
    """A clone that copies on write shares its memory with what the next step writes to, until then."""
    for of_state, of_params in ((True, False), (False, True), (True, True)):
        optimizer = AdadeltaKeras([Parameter(torch.ones(numel)) for _ in range(count)], **path.options)
        twin = copy.deepcopy(optimizer)
        advance(optimizer, 2)
        advance(twin, 2)
        tensors = [x for state in optimizer.state.values() for x in state.values()] if of_state else []
        tensors += [param.detach() for param in params_of(optimizer)] if of_params else []
        clones, values = ([function(x) for x in tensors] for function in (torch._lazy_clone, torch.clone))
        advance(optimizer, 2)
        advance(twin, 2)
        assert_same_training(optimizer, twin)
        for clone, value in zip(clones, values, strict=True):
            assert_same_bits(clone, value)


def test_the_users_gradient_is_never_written_to(path: Path) -> None:
    for maximize in (False, True):
        optimizer = optimizer_with([torch.ones(50)], path, maximize=maximize)
        (param,) = optimizer.param_groups[0]["params"]
        grad = gradients((50,), torch.float32, steps=1)[0]
        param.grad, before = grad, (grad.clone(), grad._version)
        optimizer.step()
        assert param.grad is grad
        assert_same_bits(grad, before[0])
        assert grad._version == before[1]


def test_autograd_notices_that_a_saved_parameter_changed(path: Path) -> None:
    param = Parameter(torch.ones(3))
    optimizer = AdadeltaKeras([param], 1.0, **path.options)
    loss = (param * param).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_closure(path: Path) -> None:
    param = Parameter(torch.tensor([3.0]))
    optimizer = AdadeltaKeras([param], 1.0, **path.options)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (param**2).sum()
        assert torch.is_grad_enabled()
        loss.backward()
        return loss.item()

    with torch.no_grad():
        assert optimizer.step(closure) == 9.0
        assert not torch.is_grad_enabled()
    assert param.item() < 3.0
    assert optimizer.iterations == 1
    assert optimizer.step() is None


def test_inference_mode(path: Path) -> None:
    with torch.inference_mode():
        param = torch.ones(3)
        optimizer = AdadeltaKeras([param], 1.0, **path.options)
        oracle = oracle_of(param, learning_rate=1.0)
        param.grad = torch.ones(3)
        optimizer.step()
    oracle.step(torch.ones(3).numpy())
    assert_like_oracle(param, optimizer.state[param], oracle)


# ---- Groups ----------------------------------------------------------------------------------------------------------


def test_named_parameters_appear_in_errors_and_checkpoints(path: Path) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = AdadeltaKeras(model.named_parameters(), **path.options)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    advance(optimizer)
    optimizer.state[model.bias]["acc_delta"] = torch.zeros(3)
    with pytest.raises(
        RuntimeError, match=r"parameter 1 of group 0 \('bias'\) has shape \(1,\), but its state acc_delta"
    ):
        optimizer.step()


def test_add_param_group_copies_iterations_and_defaults(path: Path) -> None:
    optimizer = stepped(path)
    new = Parameter(torch.ones(2))
    optimizer.add_param_group({"params": new, "custom": "kept"})
    group = optimizer.param_groups[2]
    assert group["iterations"] == 3
    assert group["lr"] == 1.0
    assert group["custom"] == "kept"
    assert group["optimizer_name"] == "Adadelta"
    advance(optimizer)
    assert [g["iterations"] for g in optimizer.param_groups] == [4, 4, 4]
    assert new in optimizer.state


def test_a_group_may_have_a_name(path: Path) -> None:
    optimizer = AdadeltaKeras([{"params": [Parameter(torch.ones(1))], "name": "head"}], name="mine", **path.options)
    assert optimizer.param_groups[0]["name"] == "head"
    assert optimizer.name == "mine"


@pytest.mark.parametrize("capturable", [False, True])
def test_iterations_can_be_read_and_set(path: Path, capturable: bool) -> None:
    optimizer = stepped(path, steps=2, capturable=capturable)
    assert optimizer.iterations == 2
    optimizer.iterations = 10
    advance(optimizer)
    assert optimizer.iterations == 11
    for group in optimizer.param_groups:
        count = group["iterations"]
        assert int(count) == 11
        assert isinstance(count, torch.Tensor) == capturable
        if capturable:
            assert (count.dtype, count.shape) == (torch.int64, ())
    with pytest.raises(TypeError, match=r"iterations must be an int, got 1\.5"):
        optimizer.iterations = 1.5  # type: ignore[assignment]
    for count in (-1, 2**63):
        with pytest.raises(ValueError, match=f"iterations must be >= 0 and fit 64 bits, got {count}"):
            optimizer.iterations = count
    assert optimizer.iterations == 11


@pytest.mark.parametrize(
    "group",
    [
        {"params": [torch.ones(2), torch.ones(2, dtype=torch.int32)]},
        {"params": [torch.ones(2)], "rho": 7},
        {"params": [torch.ones(2)], "fused": True, "foreach": True},
        {"params": [torch.ones(2).as_subclass(Subclass)], "foreach": True},
        {"params": [torch.ones(2)], "eps": 1e-7},
        {"params": [torch.ones(2)], "clipnorm": 0.5},
        {"params": [torch.ones(2)], "norm_variables": [[0, 0, 0, 3]]},
        {"params": [torch.ones(2)], "maximize": 1},
        {"params": 3},
    ],
    ids=["dtype", "rho", "choices", "subclass", "eps", "clipnorm", "norm_variables", "flag", "no parameters"],
)
def test_a_refused_group_leaves_the_optimizer_as_it_was(path: Path, group: dict[str, Any]) -> None:
    optimizer = stepped(path)
    before, given = snapshot(optimizer), dict(group)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        optimizer.add_param_group(group)
    assert_unchanged(optimizer, before)
    assert group.keys() == given.keys()
    advance(optimizer)
    optimizer.add_param_group({"params": [torch.ones(2)]})
    assert optimizer.iterations == 4


def test_an_interrupt_while_a_group_is_added(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Before or after each call of another module: the group is there, or it is not."""
    calls = ((validation, "check_param"), (validation, "check_dtypes"), (norm_variables, "canonicalize"),
             (selection, "check_params"), (options, "iterations_for"), (Sources, "update_metadata"))  # fmt: skip
    for owner, name in calls:
        real = getattr(owner, name)
        for comes_first in (True, False):

            def interrupted(*args: Any, comes_first: bool = comes_first, real: Any = real, **kwargs: Any) -> Any:
                if not comes_first:
                    real(*args, **kwargs)
                raise KeyboardInterrupt

            optimizer, _ = trained(path)
            before = snapshot(optimizer)
            monkeypatch.setattr(owner, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                optimizer.add_param_group({"params": [Parameter(torch.ones(2))], "rho": lambda: 0.5})
            monkeypatch.undo()
            assert_unchanged(optimizer, before)
            advance(optimizer)
            assert optimizer.iterations == 3
            optimizer.add_param_group({"params": [Parameter(torch.ones(2))], "rho": lambda: 0.5})
            advance(optimizer)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("learning_rate", "lr", 0.5),
        ("lr", "lr", torch.tensor(0.25)),
        ("rho", "rho", 0.5),
        ("epsilon", "epsilon", 1e-5),
        ("decay", "decay", 0.5),
        ("clipvalue", "clipvalue", 0.5),
        ("clipnorm", "clipnorm", 0.5),
        ("global_clipnorm", "global_clipnorm", 0.5),
    ],
)
def test_a_property_sets_all_groups_and_those_to_come(name: str, key: str, value: Any) -> None:
    """A number for the learning rate replaces a schedule, and one for rho a callable."""
    params = [Parameter(torch.ones(2)) for _ in range(3)]
    own = {"params": params[:1], "lr": 7.0, "rho": 0.25, "epsilon": 1e-3}
    schedule = schedules.ExponentialDecay(1.0, 2, 0.5)
    optimizer = AdadeltaKeras([own, {"params": params[1:2]}], schedule, lambda: 0.75)
    advance(optimizer, 1)
    setattr(optimizer, name, value)
    assert getattr(optimizer, name) == value
    optimizer.add_param_group({"params": params[2:]})
    advance(optimizer, 2)
    assert [group[key] for group in optimizer.param_groups] == [value] * 3
    assert optimizer.param_groups[0]["lr"] == (value if key == "lr" else 7.0)
    names = [[name for name in ("rho",) if name in group["callables"]] for group in optimizer.param_groups]
    assert names == ([[]] * 3 if key == "rho" else [[], ["rho"], ["rho"]])
    assert [group["schedule"] is not None for group in optimizer.param_groups] == [False, key != "lr", key != "lr"]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"clipnorm": -1.0}, "Expected clipnorm >= 0, received: -1.0"),
        ({"clipnorm": 1.0}, "Cannot accept both"),
        ({"decay": math.nan}, "Invalid decay: nan"),
        ({"gradient_transformers": [list]}, "`global_clipnorm` cannot be set when"),
        ({"clipvalue": 1.0}, "parameter 0 of group 1 has dtype torch.complex64, and clipvalue=1.0 is for real"),
    ],
)
def test_a_refused_assignment_changes_nothing(change: dict[str, Any], error: str) -> None:
    optimizer = AdadeltaKeras(
        [{"params": [torch.zeros(2)]}, {"params": [torch.zeros(2, dtype=torch.complex64)]}], global_clipnorm=1.0
    )
    before = snapshot(optimizer)
    ((key, value),) = change.items()
    with pytest.raises((ValueError, TypeError), match=error):
        setattr(optimizer, key, value)
    assert_unchanged(optimizer, before)
    assert optimizer.gradient_transformers == []


def test_options_belong_to_the_whole_optimizer(path: Path) -> None:
    with pytest.raises(
        ValueError, match="clipnorm belongs to the whole optimizer, which has None; a param group cannot"
    ):
        AdadeltaKeras([{"params": [torch.zeros(2)], "clipnorm": 1.0}], **path.options)
    params = [Parameter(torch.ones(2)), Parameter(torch.ones(2))]
    optimizer = AdadeltaKeras([{"params": params[:1]}, {"params": params[1:]}], **path.options)
    give_gradients(params, 0)
    optimizer.step()
    optimizer.param_groups[1]["clipnorm"] = 1.0
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"group 0 has None and group 1 has 1.0\. Set optimizer\.clipnorm"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_a_group_is_restored_on_error(path: Path) -> None:
    """Param groups, defaults, options, sources and state, whatever became of them."""
    optimizer, params = trained(path, learning_rate=schedules.ExponentialDecay(1.0, 2, 0.5))
    expected, _ = trained(path, learning_rate=schedules.ExponentialDecay(1.0, 2, 0.5))
    before = snapshot(optimizer)

    @optimizer.restored_on_error()
    def fail() -> None:
        optimizer.learning_rate = 0.25
        optimizer.rho = lambda: 0.5
        optimizer.clipnorm = 0.5
        optimizer.add_param_group({"params": [Parameter(torch.ones(2))]})
        optimizer.state.pop(params[0])
        optimizer.param_groups.pop(0)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert_unchanged(optimizer, before)
    for each in (optimizer, expected):
        each.add_param_group({"params": [Parameter(torch.ones(2))]})
        advance(each, 2)
    assert_same_training(optimizer, expected)
    with optimizer.restored_on_error():
        optimizer.learning_rate = 0.25
    assert optimizer.learning_rate == 0.25


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


# ---- Differentiable --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=dtype_name)
def test_differentiable_step(dtype: torch.dtype) -> None:
    """The derivative of two steps by gradient, state and every hyperparameter, against finite differences."""
    generator = torch.Generator().manual_seed(8)
    start = randn((3,), dtype, generator)

    def two_steps(
        grad: torch.Tensor, square_avg: torch.Tensor, acc_delta: torch.Tensor, *values: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        param = start.clone()
        optimizer = AdadeltaKeras([param], *values, differentiable=True)
        if dtype.is_complex:
            square_avg, acc_delta = (torch.complex(x, x) for x in (square_avg, acc_delta))
        optimizer.state[param] = {"square_avg": square_avg.clone(), "acc_delta": acc_delta.clone()}
        for factor in (1.0, 2.0):
            param.grad = grad * factor
            optimizer.step()
        return (param, *optimizer.state[param].values())

    state = [torch.rand(3, dtype=torch.float64, generator=generator) + 0.1 for _ in range(2)]
    values = [torch.tensor(value, dtype=torch.float64) for value in (0.7, 0.9, 1e-2)]
    inputs = [x.requires_grad_() for x in (randn((3,), dtype, generator), *state, *values)]
    assert torch.autograd.gradcheck(two_steps, inputs)
    assert torch.autograd.gradgradcheck(two_steps, inputs)


def test_differentiable_gives_the_same_bits() -> None:
    results = []
    for differentiable in (False, True):
        param = torch.ones(50)
        optimizer = AdadeltaKeras([param], 1.0, foreach=False, differentiable=differentiable)
        for grad in gradients((50,), torch.float32, steps=5):
            param.grad = grad.requires_grad_(differentiable)
            optimizer.step()
        results.append([param, *optimizer.state[param].values()])
    for one, other in zip(*results, strict=True):
        assert_same_bits(other, one)


@pytest.mark.parametrize("default", [False, True])
def test_differentiable_is_an_option_of_each_group(default: bool) -> None:
    """A leaf that requires grad can be updated in a group that is not differentiable, whatever the default."""
    leaf, free = Parameter(torch.ones(3)), torch.ones(3)
    groups = [{"params": [leaf], "differentiable": False}, {"params": [free], "differentiable": True}]
    optimizer = AdadeltaKeras(groups, 1.0, differentiable=default)
    leaf.grad, free.grad = torch.ones(3), torch.ones(3, requires_grad=True)
    optimizer.step()
    assert free.requires_grad
    assert_same_bits(leaf, free)
    assert not any(tensor.requires_grad for tensor in optimizer.state[leaf].values())
    assert torch.is_grad_enabled()


# ---- The constructor -------------------------------------------------------------------------------------------------


class TestConstruction(expecttest.TestCase):
    """What the constructor and add_param_group refuse, in words."""

    def message(self, params: Any, **options: Any) -> str:
        with pytest.raises((TypeError, ValueError)) as caught:
            AdadeltaKeras(params, **options)
        return f"{caught.type.__name__}: {caught.value}"

    def test_parameters(self) -> None:
        self.assertExpectedInline(self.message([]), """ValueError: optimizer got an empty parameter list""")
        self.assertExpectedInline(
            self.message([torch.ones(2, dtype=torch.int64)]),
            """TypeError: parameter 0 of group 0 has dtype torch.int64; Adadelta trains floating-point and complex parameters. Leave it out, as in (p for p in model.parameters() if p.requires_grad)""",
        )
        self.assertExpectedInline(
            self.message([("weight", torch.ones(2).to(torch.float8_e4m3fn))]),
            """TypeError: parameter 0 of group 0 ('weight') has dtype torch.float8_e4m3fn; Adadelta trains floating-point and complex parameters. Leave it out, as in (p for p in model.parameters() if p.requires_grad)""",
        )
        self.assertExpectedInline(
            self.message([torch.ones(2), torch.ones(1).expand(3)]),
            """ValueError: parameter 1 of group 0 overlaps itself in memory (shape (3,), strides (0,)), as an expanded tensor does. Use .contiguous()""",
        )
        self.assertExpectedInline(
            self.message([torch.eye(2).to_sparse()]),
            """ValueError: parameter 0 of group 0 has layout torch.sparse_coo; only dense parameters can be trained. Use .to_dense()""",
        )
        self.assertExpectedInline(
            self.message([torch.ones(2, dtype=torch.complex64).conj()]),
            """ValueError: parameter 0 of group 0 is a lazily conjugated or negated view. Use .resolve_conj().resolve_neg()""",
        )
        self.assertExpectedInline(
            self.message(torch.ones(2)),
            """TypeError: params argument given to the optimizer should be an iterable of Tensors or dicts, but got torch.FloatTensor""",
        )
        self.assertExpectedInline(
            self.message([1.0]), """TypeError: optimizer can only optimize Tensors, but one of the params is float"""
        )
        self.assertExpectedInline(
            self.message([torch.ones(1, requires_grad=True) * 2]), """ValueError: can't optimize a non-leaf Tensor"""
        )

    def test_groups(self) -> None:
        param = torch.ones(2)
        self.assertExpectedInline(
            self.message([{"params": [param]}, {"params": [param]}]),
            """ValueError: some parameters appear in more than one parameter group""",
        )
        self.assertExpectedInline(
            self.message([{"params": [param], "eps": 1e-6}]),
            """ValueError: a param group has eps=1e-06; here the key is `epsilon`""",
        )
        self.assertExpectedInline(
            self.message([{"params": {param}}]),
            """TypeError: optimizer parameters need to be organized in ordered collections, but the ordering of tensors in sets will change between runs. Please use a list instead.""",
        )


def test_repr() -> None:
    class TestRepr(expecttest.TestCase):
        def runTest(self) -> None:
            self.assertExpectedInline(
                repr(AdadeltaKeras([torch.ones(1)], maximize=True)),
                """\
AdadeltaKeras (
Parameter Group 0
    callables: []
    capturable: False
    clipnorm: None
    clipvalue: None
    decay: 0.0
    decoupled_weight_decay: True
    differentiable: False
    ema_momentum: 0.99
    ema_overwrite_frequency: None
    epsilon: 1e-07
    excluded_from_weight_decay: None
    foreach: None
    fused: None
    global_clipnorm: None
    gradient_accumulation_steps: None
    iterations: 0
    loss_scale_factor: None
    lr: 0.001
    master_weights: False
    maximize: True
    norm_variables: None
    optimizer_name: Adadelta
    rho: 0.95
    schedule: None
    state_dtype: None
    use_ema: False
    weight_decay: 0.0
)""",
            )

    TestRepr().runTest()


def test_no_warning_in_ordinary_use(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepped(path)
