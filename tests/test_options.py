"""What the user gave, and the value of a step: rounding, Tensors, ranges, and the words of a refusal."""

import itertools
import math
import warnings
from typing import Any

import expecttest
import numpy as np
import pytest
import torch
from cases import Path, assert_like_oracle, assert_unchanged, gradients, oracle_of, snapshot, to_numpy
from torch.nn import Parameter
from training import assert_like_oracles, give_gradients, numpy_or_none, oracle_of_all
from training import path as path

from torch_adadelta import AdadeltaKeras, options
from torch_adadelta.backends import opmath
from torch_adadelta.options import HYPERPARAMETERS


def for_step(*values: Any) -> tuple[Any, ...]:
    """Learning rate, rho and epsilon as a step uses them."""
    return tuple(options.in_step(option, value) for option, value in zip(HYPERPARAMETERS[:3], values, strict=True))


ROUNDED = float(np.float32(0.001))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0.001, ROUNDED),
        (1, 1.0),
        (np.float64(0.001), 0.001),
        (np.float32(0.001), ROUNDED),
        (np.int64(2), 2.0),
        (torch.tensor(0.001, dtype=torch.float64), 0.001),
        (torch.tensor([[0.001]], dtype=torch.float32), ROUNDED),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (torch.tensor(3), 3.0),
    ],
)
def test_only_python_numbers_are_rounded_to_float32(given: Any, expected: float) -> None:
    learning_rate, rho, epsilon = for_step(given, 0.95, 1e-7)
    assert (learning_rate, rho, epsilon) == (expected, float(np.float32(0.95)), 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [np.float64, lambda x: torch.tensor(x, dtype=torch.float64)], ids=["numpy", "Tensor"])
def test_what_carries_its_own_precision_keeps_it(path: Path, dtype: torch.dtype, kind: Any) -> None:
    param = Parameter(torch.zeros(50, dtype=dtype))
    optimizer = AdadeltaKeras([param], kind(0.3), kind(0.95), kind(1e-7), **path.options)
    oracle = oracle_of(param, learning_rate=np.float64(0.3), rho=np.float64(0.95), epsilon=np.float64(1e-7))
    for grad in gradients((50,), dtype, steps=5):
        param.grad = grad
        oracle.step(to_numpy(grad))
        optimizer.step()
    assert_like_oracle(param, optimizer.state[param], oracle)


def test_one_minus_rho_is_subtracted_in_the_opmath_dtype() -> None:
    rho = float(np.float32(0.95))
    assert opmath.one_minus(rho, torch.float32) == float(np.float32(1) - np.float32(0.95)) != 0.05
    assert opmath.one_minus(rho, torch.float64) == 1 - rho
    assert opmath.one_minus(torch.tensor(rho), torch.float32) == np.float32(1) - np.float32(0.95)


def test_getters_return_what_was_given() -> None:
    tensor = torch.tensor(0.5)
    optimizer = AdadeltaKeras([Parameter(torch.zeros(1))], 0.001, tensor, 1e-5, "mine")
    assert optimizer.learning_rate == optimizer.lr == 0.001
    assert optimizer.rho is tensor
    assert optimizer.epsilon == 1e-5
    assert optimizer.name == "mine"


@pytest.mark.parametrize("epsilon", [None, 0, 0.0])
def test_no_epsilon_means_that_of_keras(epsilon: float | None) -> None:
    optimizer = AdadeltaKeras([Parameter(torch.zeros(1))], epsilon=epsilon)
    assert optimizer.epsilon == 1e-7
    optimizer.epsilon = 1.0
    optimizer.param_groups[0]["epsilon"] = epsilon
    assert for_step(1.0, 0.5, epsilon)[2] == 1e-7


def test_lr_is_an_alias_that_wins() -> None:
    optimizer = AdadeltaKeras([Parameter(torch.zeros(1))], 0.5, lr=0.25)
    assert optimizer.learning_rate == 0.25
    optimizer.add_param_group({"params": [Parameter(torch.zeros(1))], "learning_rate": 2.0, "lr": 3.0})
    optimizer.add_param_group({"params": [Parameter(torch.zeros(1))], "learning_rate": 2.0})
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 3.0, 2.0]
    assert "learning_rate" not in optimizer.param_groups[2]


def test_torch_schedulers_reach_numbers_and_tensors(path: Path) -> None:
    for learning_rate in (1.0, torch.tensor(1.0)):
        param = Parameter(torch.zeros(9))
        optimizer = AdadeltaKeras([param], learning_rate, **path.options)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        oracle = oracle_of(param, learning_rate=1.0)
        for step, grad in enumerate(gradients((9,), torch.float32, steps=4)):
            oracle.learning_rate = 0.5**step
            oracle.step(grad.numpy())
            param.grad = grad
            optimizer.step()
            scheduler.step()
        assert_like_oracle(param, optimizer.state[param], oracle)


BAD_NUMBERS = (-1.0, -1e-9, math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("name", ["learning_rate", "rho", "epsilon"])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("value", [*BAD_NUMBERS, "above"])
def test_numbers_out_of_range(name: str, as_tensor: bool, value: float | str) -> None:
    if value == "above":
        value = {"learning_rate": 1e39, "rho": 1.0001, "epsilon": math.inf}[name]
    given = torch.tensor(value, dtype=torch.float64) if as_tensor else value
    with pytest.raises(ValueError, match=f"Invalid {name}: "):
        AdadeltaKeras([Parameter(torch.zeros(1))], **{name: given})
    optimizer = AdadeltaKeras([Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match=f"Invalid {name}: "):
        setattr(optimizer, name, given)
    with pytest.raises(ValueError, match=f"Invalid {name}: "):
        optimizer.add_param_group({"params": [Parameter(torch.zeros(1))], name: given})
    assert len(optimizer.param_groups) == 1
    assert (optimizer.learning_rate, optimizer.rho, optimizer.epsilon) == (0.001, 0.95, 1e-7)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 10**400),
        ("epsilon", 10**400),
        ("learning_rate", -1e-50),
        ("rho", -1e-60),
        ("rho", 1.00000001),
        ("rho", torch.tensor(0.9, device="meta")),
    ],
)
def test_numbers_that_rounding_would_bring_into_range(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        AdadeltaKeras([Parameter(torch.zeros(1))], **{name: value})
    optimizer = AdadeltaKeras([Parameter(torch.zeros(1))])
    optimizer.param_groups[0]["lr" if name == "learning_rate" else name] = value
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = torch.ones(1)
    with pytest.raises(ValueError, match=name):
        optimizer.step()
    assert optimizer.iterations == 0


def test_an_epsilon_tensor_of_zero_means_that_of_keras(path: Path) -> None:
    param = Parameter(torch.zeros(3))
    optimizer = AdadeltaKeras([param], 1.0, epsilon=torch.tensor(0.0), **path.options)
    oracle = oracle_of(param, learning_rate=1.0)
    param.grad = torch.tensor([0.0, 1.0, -1.0])
    oracle.step(param.grad.numpy())
    optimizer.step()
    assert_like_oracle(param, optimizer.state[param], oracle)


@pytest.mark.parametrize("name", ["learning_rate", "rho", "epsilon"])
@pytest.mark.parametrize(
    "value",
    ["0.1", True, False, np.bool_(True), 1j, [0.1], {}, torch.tensor(1j), torch.tensor(True), np.array([0.1])],
    ids=repr,
)
def test_values_of_the_wrong_type(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} must be"):
        AdadeltaKeras([Parameter(torch.zeros(1))], **{name: value})


@pytest.mark.parametrize("name", ["learning_rate", "rho", "epsilon"])
@pytest.mark.parametrize("value", [torch.tensor([0.1, 0.2]), torch.empty(0)])
def test_tensors_of_more_or_less_than_one_element(name: str, value: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a number or a one-element Tensor, got a Tensor of shape"):
        AdadeltaKeras([Parameter(torch.zeros(1))], **{name: value})


@pytest.mark.parametrize(
    ("key", "value"), [("lr", math.nan), ("rho", 2.0), ("epsilon", -1.0), ("lr", torch.tensor(-1.0))]
)
def test_a_group_is_checked_again_at_each_step(path: Path, key: str, value: Any) -> None:
    param = Parameter(torch.ones(3))
    optimizer = AdadeltaKeras([param], **path.options)
    optimizer.param_groups[0][key] = value
    param.grad = torch.ones(3)
    with pytest.raises(ValueError, match="Invalid"):
        optimizer.step()
    assert param.tolist() == [1.0] * 3
    assert not optimizer.state
    assert optimizer.iterations == 0


class TestMessages(expecttest.TestCase):
    """The words people see."""

    def message(self, **hyperparameters: Any) -> str:
        with pytest.raises((TypeError, ValueError)) as caught:
            AdadeltaKeras([Parameter(torch.zeros(1))], **hyperparameters)
        return f"{caught.type.__name__}: {caught.value}"

    def test_range(self) -> None:
        self.assertExpectedInline(
            self.message(learning_rate=-1.0),
            """ValueError: Invalid learning_rate: -1.0; it must be a finite number >= 0 that fits float32""",
        )
        self.assertExpectedInline(
            self.message(learning_rate=1e39),
            """ValueError: Invalid learning_rate: 1e+39; it must be a finite number >= 0 that fits float32""",
        )
        self.assertExpectedInline(
            self.message(rho=1.5), """ValueError: Invalid rho: 1.5; it must be a number in [0, 1]"""
        )
        self.assertExpectedInline(
            self.message(epsilon=torch.tensor(-1.0)),
            """ValueError: Invalid epsilon: tensor(-1.); it must be a finite number >= 0""",
        )

    def test_type(self) -> None:
        self.assertExpectedInline(
            self.message(learning_rate="fast"),
            """TypeError: learning_rate must be a number or a one-element Tensor, got 'fast' of type str""",
        )
        self.assertExpectedInline(
            self.message(rho=torch.tensor(True)), """TypeError: rho must be a real number, got a Tensor of torch.bool"""
        )
        self.assertExpectedInline(
            self.message(epsilon=torch.ones(2)),
            """ValueError: epsilon must be a number or a one-element Tensor, got a Tensor of shape (2,)""",
        )
        self.assertExpectedInline(
            self.message(learning_rat=1.0),
            """TypeError: AdadeltaKeras.__init__() got an unexpected keyword argument 'learning_rat'""",
        )


# ---- Options of the whole optimizer ----------------------------------------------------------------------------------


def test_options_can_be_set_and_read(path: Path) -> None:
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(2))]
    optimizer = AdadeltaKeras([{"params": params[:1]}, {"params": params[1:]}], 1.0, **path.options)
    expected = oracle_of_all(params)
    assert (optimizer.clipvalue, optimizer.clipnorm, optimizer.global_clipnorm, optimizer.decay) == (None,) * 3 + (0.0,)
    changes: list[dict[str, Any]] = [
        {"clipvalue": 0.5},
        {"clipnorm": 2.0},
        {"clipvalue": None},
        {"clipnorm": None, "global_clipnorm": 1.5},
        {"decay": 0.7},
        {"global_clipnorm": None},
    ]
    for step, change in enumerate(changes):
        for key, value in change.items():
            setattr(optimizer, key, value)
            setattr(expected, key, value)
            assert getattr(optimizer, key) == value
            assert [group[key] for group in optimizer.param_groups] == [value, value]
        grads = give_gradients(params, step)
        optimizer.step()
        expected.step(numpy_or_none(grads))
        assert_like_oracles(optimizer, expected, f"after {change}")


class TestRefusedOptions(expecttest.TestCase):
    def refused(self, error: type[Exception], **options: Any) -> str:
        dtype = options.pop("dtype", torch.float32)
        with pytest.raises(error) as caught:
            AdadeltaKeras([torch.zeros(2, dtype=dtype)], **options)
        return str(caught.value)

    def test_negative_numbers(self) -> None:
        for key in ("clipvalue", "clipnorm", "global_clipnorm", "decay"):
            assert self.refused(ValueError, **{key: -1.0}) == f"Expected {key} >= 0, received: -1.0"

    def test_numbers_that_are_none(self) -> None:
        messages = [
            self.refused(ValueError, clipvalue=math.nan),
            self.refused(ValueError, clipnorm=math.inf),
            self.refused(ValueError, global_clipnorm=1e39),
            self.refused(ValueError, decay=math.inf),
            self.refused(TypeError, decay=None),
            self.refused(TypeError, clipnorm="1"),
            self.refused(TypeError, clipvalue=True),
            self.refused(TypeError, clipvalue=torch.tensor(1.0)),
        ]
        self.assertExpectedInline(
            "\n".join(messages),
            """\
Invalid clipvalue: nan; it must be a number >= 0
Invalid clipnorm: inf; it must be a finite number >= 0 that fits float32
Invalid global_clipnorm: 1e+39; it must be a finite number >= 0 that fits float32
Invalid decay: inf; it must be a finite number >= 0 that fits float32
decay must be a number, got None of type NoneType
clipnorm must be a number, got '1' of type str
clipvalue must be a number, got True of type bool
clipvalue must be a number, got a Tensor; use .item()""",
        )

    def test_options_that_exclude_each_other(self) -> None:
        messages = [
            self.refused(ValueError, clipnorm=1.0, global_clipnorm=2.0),
            self.refused(ValueError, clipvalue=1.0, gradient_transformers=[list]),
            self.refused(ValueError, clipvalue=1.0, dtype=torch.complex64),
        ]
        self.assertExpectedInline(
            "\n".join(messages),
            """\
Cannot accept both `clipnorm` and `global_clipnorm`. Received: `clipnorm`=1.0, `global_clipnorm`=2.0.
`clipvalue` cannot be set when `gradient_transformers` is set. Instead, use the `gradient_transformers` to specify clipping and other transformations. Received: clipvalue=1.0
parameter 0 of group 0 has dtype torch.complex64, and clipvalue=1.0 is for real numbers; use clipnorm or global_clipnorm""",
        )

    def test_callbacks_that_are_none(self) -> None:
        messages = [
            self.refused(TypeError, gradient_aggregator=1),
            self.refused(TypeError, gradient_transformers=list),
            self.refused(TypeError, gradient_transformers=[1]),
        ]
        self.assertExpectedInline(
            "\n".join(messages),
            """\
gradient_aggregator must be callable, got 1
gradient_transformers must be a list of callables, got <class 'list'>
gradient_transformers must be callables, got 1""",
        )

    def test_an_unknown_keyword_is_named(self) -> None:
        with pytest.raises(TypeError, match="momentum"):
            AdadeltaKeras([torch.zeros(2)], momentum=0.9)  # type: ignore[call-arg]


def test_clipvalue_in_a_group_of_complex_parameters_is_refused(path: Path) -> None:
    param = Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = AdadeltaKeras([param], **path.options)
    optimizer.param_groups[0]["clipvalue"] = 1.0
    param.grad = torch.full((2,), 5 + 5j)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"clipvalue=1\.0 is for real numbers"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_options_of_the_wrong_type() -> None:
    for name, value in itertools.product(("maximize", "capturable", "differentiable"), (None, 1, "yes")):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got"):
            AdadeltaKeras([Parameter(torch.ones(1))], **{name: value})
    for name, value in itertools.product(("foreach", "fused"), (1, "yes")):
        with pytest.raises(TypeError, match=f"{name} must be True, False or None, got"):
            AdadeltaKeras([Parameter(torch.ones(1))], **{name: value})
    with pytest.raises(TypeError, match="name must be a str"):
        AdadeltaKeras([Parameter(torch.ones(1))], 0.1, 0.9, 1e-7, 5)  # type: ignore[arg-type]


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


@pytest.mark.parametrize(
    ("values", "agrees"),
    [((0.5, 0.5), True), ((None, None), True), ((0.5, None), False), ((0.5, 0.25), False), ((1.0, True), False)],
)
@pytest.mark.parametrize("key", ["decay", "clipvalue", "clipnorm", "global_clipnorm"])
def test_groups_agree_on_what_belongs_to_the_whole_optimizer(key: str, values: tuple[Any, Any], agrees: bool) -> None:
    """True is no number, though it equals one."""
    groups = [{**dict.fromkeys(option.key for option in options.OPTIMIZER_WIDE), key: value} for value in values]
    if agrees:
        options.check_agreement(groups)
        return
    with pytest.raises(ValueError, match=rf"{key} belongs to the whole optimizer, but group 0 has .* and group 1 has"):
        options.check_agreement(groups)


def test_what_is_saved_of_numpy_scalars() -> None:
    """A number; a Tensor where that would be rounded when it is loaded."""
    rho, decay, epsilon = (options.BY_NAME[name] for name in ("rho", "decay", "epsilon"))
    saved = options.as_saved(rho, np.float64(0.95))
    assert (saved.dtype, saved.item()) == (torch.float64, 0.95)
    for option, value in ((decay, np.float32(0.25)), (rho, np.float64(0.5)), (epsilon, np.float64(1e-7))):
        saved = options.as_saved(option, value)
        assert type(saved) is float
        assert saved == value
    tensor = torch.tensor(0.95, dtype=torch.float64)
    assert options.as_saved(rho, tensor) is tensor
    assert options.as_saved(rho, 0.95) == 0.95


def test_iterations_are_an_int_or_a_tensor_of_the_group() -> None:
    count = torch.tensor(3)
    for value in (3, np.int64(3), count):
        assert options.iterations_for({"capturable": False, "params": []}, value) == 3
        kept = options.iterations_for({"capturable": True, "params": [torch.zeros(1)]}, value)
        assert isinstance(kept, torch.Tensor)
        assert (kept.dtype, kept.shape, kept.item()) == (torch.int64, (), 3)
        assert kept is not count
    for value, error in ((1.5, TypeError), (True, TypeError), ("1", TypeError), (-1, ValueError), (2**63, ValueError)):
        with pytest.raises(error, match="iterations must be"):
            options.iterations_for({"capturable": False, "params": []}, value)
