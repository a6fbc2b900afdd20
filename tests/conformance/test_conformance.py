"""What PyTorch tests of each of its own optimizers, asked of AdadeltaKeras, through PyTorch's own machinery.

`OptimizerInfo` describes the optimizer to that machinery, `optims` makes a test of each property for it. The properties
are those of PyTorch's test/test_optim.py; where PyTorch compares within tolerances, bits are compared here. Properties
of it that have no place here, and why:

- `weight_decay` of groups: Keras' Adadelta has none (a group that sets one is refused; tests/test_optimizer.py);
- step counts that are no tensors, in old checkpoints: there is one count for the optimizer, in its groups;
- mixed dtypes, gradients that are not contiguous, complex numbers in two parts, learning rates of groups: in
  tests/backends/test_functional.py, beside the oracle; sparse gradients: in tests/backends/test_functional_sparse.py;
- what a device without a kernel is told, and `repr`: tests/step/test_selection.py, tests/test_optimizer.py;
- several GPUs, large tensors, peak memory, CPU against CUDA: tests/cuda, on a machine with a GPU.
"""

import copy
import functools
import io
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import assert_same_bits
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, PolynomialLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
    optims,
)
from torch.testing._internal.common_utils import TestCase

from torch_adadelta import AdadeltaKeras, schedules
from torch_adadelta.backends import kernels

# ---- The description ------------------------------------------------------------------------------------------------


def inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    """Every option that can be combined with any implementation."""
    described: dict[str, dict[str, Any]] = {
        "default": {},
        "non-default lr": {"lr": 0.01},
        "maximize": {"maximize": True},
        "rho": {"rho": 0.9},
        "Tensor lr": {"lr": torch.tensor(0.5)},
        "Tensor rho and epsilon": {"rho": torch.tensor(0.9), "epsilon": torch.tensor([1e-3])},
        "capturable": {"capturable": True},
        "Tensor lr with capturable and maximize": {"lr": torch.tensor(0.5), "capturable": True, "maximize": True},
        "decay": {"lr": 1.0, "decay": 0.5},
        "clipvalue": {"lr": 1.0, "clipvalue": 0.1},
        "clipnorm": {"lr": 1.0, "clipnorm": 0.5},
        "global_clipnorm": {"lr": 1.0, "global_clipnorm": 0.5},
        "schedule": {"learning_rate": schedules.ExponentialDecay(1.0, 2, 0.5)},
    }
    return [OptimizerInput(params=None, kwargs=kwargs, desc=desc) for desc, kwargs in described.items()]


def error_inputs(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    """PyTorch's errors of all optimizers, the one for Tensor lr in our words, and our own."""
    result = get_error_inputs_for_all_optims(device, dtype)
    for error in result:
        if error.error_regex == "Tensor lr must be 1-element":
            error.error_regex = "learning_rate must be a number or a one-element Tensor"
    sample = torch.zeros((), device=device, dtype=dtype)
    described: dict[str, tuple[Any, dict[str, Any], Any]] = {
        "Invalid rho: 1.1": (None, {"lr": 1e-2, "rho": 1.1}, ValueError),
        "Invalid learning_rate: -1": (None, {"lr": -1.0}, ValueError),
        "Invalid epsilon: -1": (None, {"epsilon": -1.0}, ValueError),
        "cannot both be True": ([sample], {"foreach": True, "fused": True}, RuntimeError),
        "`fused` and `differentiable` cannot": ([sample], {"fused": True, "differentiable": True}, RuntimeError),
        "`foreach` and `differentiable` cannot": ([sample], {"foreach": True, "differentiable": True}, RuntimeError),
    }
    for regex, (params, kwargs, kind) in described.items():
        given = OptimizerInput(params=params, kwargs=kwargs, desc=regex)
        result.append(ErrorOptimizerInput(given, error_type=kind, error_regex=regex))
    return result


INFO = OptimizerInfo(
    AdadeltaKeras,
    optim_inputs_func=inputs,
    optim_error_inputs_func=error_inputs,
    scheduler_inputs=(
        [lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
        [lambda opt: LinearLR(opt, start_factor=0.4, total_iters=4), lambda opt: ExponentialLR(opt, gamma=0.99)],
        [lambda opt: PolynomialLR(opt, power=0.9, total_iters=400), lambda opt: ReduceLROnPlateau(opt)],
    ),
    supported_impls=("foreach", "fused", "differentiable"),
    not_og_supported_flags=("foreach", "fused", "differentiable", "maximize", "capturable"),
    has_capturable_arg=True,
    supports_complex=True,
    supports_fused_on=("cpu", "cuda") if kernels.is_loaded else (),
)

IMPLEMENTATIONS: dict[str, dict[str, bool]] = {"single_tensor": {"foreach": False}, "multi_tensor": {"foreach": True}}
if kernels.is_loaded:
    IMPLEMENTATIONS["fused"] = {"fused": True}


def configurations(device: str, dtype: torch.dtype, skip: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """Every option with every implementation."""
    for described in _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, INFO, skip):
        yield described.kwargs


def without_differentiable(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """The same for leaf parameters, which a differentiable step refuses."""
    return configurations(device, dtype, skip=("differentiable",))


# ---- What the tests train -------------------------------------------------------------------------------------------


class Problem:
    """A small linear model, fixed by its seed, its loss, and an optimizer for its parameters."""

    def __init__(self, kwargs: dict[str, Any], device: str, dtype: torch.dtype, layout: str = "contiguous") -> None:
        generator = torch.Generator().manual_seed(3)
        shapes = {"contiguous": ((10, 5), (10,)), "strided": ((10, 5, 2), (10, 2))}[layout]
        tensors = [torch.randn(shape, generator=generator, dtype=dtype).to(device) for shape in shapes]
        if layout == "strided":
            tensors = [tensor[..., 0] for tensor in tensors]
        self.weight, self.bias = (Parameter(tensor) for tensor in tensors)
        self.input = torch.randn(5, generator=generator, dtype=dtype).to(device)
        self.optimizer = AdadeltaKeras([self.weight, self.bias], **kwargs)

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = (self.weight.mv(self.input) + self.bias).pow(2).sum()
        loss.backward()
        return loss

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.step(self.closure)

    def everything(self) -> list[Tensor]:
        """Parameters and state, in a fixed order."""
        params = [self.weight, self.bias]
        return [*params, *(self.optimizer.state[p][key] for p in params for key in ("square_avg", "acc_delta"))]


def assert_same_training(one: Problem, other: Problem, what: Any = "") -> None:
    for index, (actual, expected) in enumerate(zip(one.everything(), other.everything(), strict=True)):
        assert_same_bits(actual, expected, f"{what} {index}")
    assert one.optimizer.iterations == other.optimizer.iterations


def as_plain(state_dict: Any) -> Any:
    """A state_dict in which equal contents compare equal."""
    if isinstance(state_dict, Tensor):
        return state_dict.tolist()
    if isinstance(state_dict, dict):
        return {key: as_plain(value) for key, value in state_dict.items()}
    return [as_plain(value) for value in state_dict] if isinstance(state_dict, list | tuple) else state_dict


class TestContract(TestCase):
    """Each method is a property; `optims` makes it a test of AdadeltaKeras."""

    # ---- Description and errors ---------------------------------------------------------------------------------

    @optims([INFO])
    def test_errors(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
        for error in optim_info.optim_error_inputs_func(device, dtype):
            given = error.optimizer_error_input
            params = given.params
            if params is None:
                params = [Parameter(torch.randn(1, device=device, dtype=dtype))]
            assert error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
            if issubclass(error.error_type, Warning):
                with self.assertWarnsRegex(error.error_type, error.error_regex):
                    optim_info.optim_cls(params, **given.kwargs)
            else:
                with pytest.raises(error.error_type, match=error.error_regex):
                    optim_info.optim_cls(params, **given.kwargs)

    # ---- Training -----------------------------------------------------------------------------------------------

    @optims([INFO])
    def test_it_goes_in_the_right_direction(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
        for layout in ("contiguous", "strided"):
            for kwargs in without_differentiable(device, dtype):
                problem = Problem(kwargs, device, dtype, layout)
                first = problem.closure().item()
                problem.train(20)
                last = problem.closure().item()
                assert last > first if kwargs.get("maximize") else last < first, kwargs

    @optims([INFO])
    def test_it_goes_in_the_right_direction_with_schedulers(
        self, device: str, dtype: torch.dtype, optim_info: Any
    ) -> None:
        for constructors in optim_info.scheduler_inputs:
            for implementation in IMPLEMENTATIONS.values():
                problem = Problem({"lr": 1.0, **implementation}, device, dtype)
                problem.optimizer.add_param_group(
                    {"params": [Parameter(torch.ones(3, device=device, dtype=dtype))], "lr": 0.5}
                )
                schedulers = [make(problem.optimizer) for make in constructors]
                first = problem.closure().item()
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    for _ in range(20):
                        loss = problem.optimizer.step(problem.closure).detach()
                        for scheduler in schedulers:
                            scheduler.step(loss) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
                assert problem.closure().item() < first
                lrs = [group["lr"] for group in problem.optimizer.param_groups]
                assert lrs[0] == 2 * lrs[1]
                assert problem.optimizer.learning_rate == lrs[0]

    @optims([INFO], dtypes=[torch.float32, torch.float64])
    def test_implementations_give_the_same_bits(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
        for described in optim_info.optim_inputs_func(device):
            problems = [
                Problem({**described.kwargs, **kwargs}, device, dtype, layout)
                for kwargs in IMPLEMENTATIONS.values()
                for layout in ("contiguous",)
            ]
            for problem in problems:
                for step in range(6):
                    problem.closure()
                    if step == 3:
                        problem.optimizer.zero_grad()  # a step without gradients is nothing
                    problem.optimizer.step()
                assert problem.optimizer.iterations == 5
            for problem in problems[1:]:
                assert_same_training(problem, problems[0], described.desc)

    @optims([INFO])
    def test_the_default_dtype_makes_no_difference(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
        for kwargs in IMPLEMENTATIONS.values():
            problems = []
            for default in (torch.float32, torch.float64):
                before = torch.get_default_dtype()
                torch.set_default_dtype(default)
                try:
                    problems.append(Problem({"lr": 0.1, "decay": 0.25, "clipnorm": 0.5, **kwargs}, device, dtype))
                    problems[-1].train(3)
                finally:
                    torch.set_default_dtype(before)
            assert_same_training(*problems)

    @optims([INFO], dtypes=[torch.float32, torch.float64])
    def test_tensor_lr_is_the_number(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
        for dims in (0, 1, 3):
            for implementation in IMPLEMENTATIONS.values():
                for capturable in (False, True):
                    kwargs = {"capturable": capturable, **implementation}
                    lr = torch.full((1,) * dims, 0.5)  # a half is the same in float32
                    problems = [Problem({"lr": value, **kwargs}, device, dtype) for value in (lr, 0.5)]
                    for problem in problems:
                        problem.train(3)
                    assert_same_training(*problems, what=kwargs)
                    scheduler = ExponentialLR(problems[0].optimizer, gamma=0.5)
                    problems[0].train(1)
                    scheduler.step()
                    assert problems[0].optimizer.param_groups[0]["lr"] is lr
                    assert lr.tolist() == torch.full((1,) * dims, 0.25).tolist()

    @optims([INFO], dtypes=[torch.complex64, torch.complex128])
    def test_complex_numbers_are_pairs_of_reals(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
        for kwargs in without_differentiable(device, dtype):
            if kwargs.get("clipvalue") is not None:
                continue  # refused for complex parameters, which Keras cannot clip by value
            generator = torch.Generator().manual_seed(0)
            value = torch.randn(5, 5, dtype=dtype, generator=generator)
            numbers = Parameter(value.clone())
            pairs = Parameter(torch.view_as_real(value).clone())
            one, other = optim_info.optim_cls([numbers], **kwargs), optim_info.optim_cls([pairs], **kwargs)
            for _ in range(3):
                numbers.grad = torch.randn(5, 5, dtype=dtype, generator=generator)
                pairs.grad = torch.view_as_real(numbers.grad).clone()
                one.step()
                other.step()
            if kwargs.get("clipnorm") is None and kwargs.get("global_clipnorm") is None:
                assert_same_bits(torch.view_as_real(numbers.detach()), pairs.detach())
            else:  # squared moduli are rounded before they are summed
                torch.testing.assert_close(torch.view_as_real(numbers.detach()), pairs.detach())
            for key, state in one.state[numbers].items():
                assert state.dtype is dtype
                if kwargs.get("clipnorm") is None and kwargs.get("global_clipnorm") is None:
                    assert_same_bits(torch.view_as_real(state), other.state[pairs][key])

    @optims([INFO])
    def test_closures(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
        for kwargs in without_differentiable(device, dtype):
            problem, by_hand = Problem(kwargs, device, dtype), Problem(kwargs, device, dtype)
            for _ in range(3):
                with torch.no_grad():
                    loss = problem.optimizer.step(problem.closure)
                expected = by_hand.closure()
                assert by_hand.optimizer.step() is None
                assert loss.item() == expected.item()
            assert_same_training(problem, by_hand, kwargs)

    # ---- Groups -------------------------------------------------------------------------------------------------

    @optims([INFO])
    def test_empty_groups(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
        for kwargs in without_differentiable(device, dtype):
            plain, problem = Problem(kwargs, device, dtype), Problem(kwargs, device, dtype)
            problem.optimizer.add_param_group({"params": []})
            for each in (plain, problem):
                each.train(3)
            assert_same_training(problem, plain, kwargs)
            again = Problem(kwargs, device, dtype)
            again.optimizer.add_param_group({"params": []})
            again.optimizer.load_state_dict(problem.optimizer.state_dict())
            assert again.optimizer.iterations == 3

    @optims([INFO])
    def test_named_parameters(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
        for kwargs in without_differentiable(device, dtype):
            plain, named = Problem(kwargs, device, dtype), Problem(kwargs, device, dtype)
            pairs = [("first.weight", named.weight), ("first.bias", named.bias)]
            named.optimizer = optim_info.optim_cls(pairs, **kwargs)
            for problem in (plain, named):
                problem.train(2)
            assert_same_training(named, plain, kwargs)
            state_dict = named.optimizer.state_dict()
            assert state_dict["param_groups"][0]["param_names"] == ["first.weight", "first.bias"]
            named.optimizer.load_state_dict(plain.optimizer.state_dict())  # which has no names
            assert named.optimizer.param_groups[0]["param_names"] == ["first.weight", "first.bias"]
            plain.optimizer.load_state_dict(state_dict)
            for problem in (plain, named):
                problem.train(2)
            assert_same_training(named, plain, kwargs)

    # ---- No gradients -------------------------------------------------------------------------------------------

    @optims([INFO])
    def test_a_step_without_gradients_is_nothing(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
        for kwargs in configurations(device, dtype):
            param = torch.randn(2, 3, device=device, dtype=dtype, requires_grad=not kwargs.get("differentiable"))
            before = param.detach().clone()
            optimizer = optim_info.optim_cls([param], **kwargs)
            optimizer.step()
            assert_same_bits(param.detach(), before)
            assert optimizer.iterations == 0
            assert not optimizer.state

    @optims([INFO])
    def test_a_first_step_with_zero_gradients_moves_nothing(
        self, device: str, dtype: torch.dtype, optim_info: Any
    ) -> None:
        for kwargs in configurations(device, dtype):
            param = torch.randn(2, 3, device=device, dtype=dtype, requires_grad=not kwargs.get("differentiable"))
            before = param.detach().clone()
            optimizer = optim_info.optim_cls([param], **kwargs)
            param.grad = torch.zeros_like(param)
            optimizer.step()
            assert_same_bits(param.detach(), before)
            assert optimizer.iterations == 1

    # ---- state_dict, copies -------------------------------------------------------------------------------------

    @optims([INFO])
    def test_a_state_dict_continues_the_training(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
        for kwargs in without_differentiable(device, dtype):
            one, other = Problem(kwargs, device, dtype), Problem(kwargs, device, dtype)
            one.train(5)
            with torch.no_grad():
                other.weight.copy_(one.weight)
                other.bias.copy_(one.bias)
            state_dict = copy.deepcopy(one.optimizer.state_dict())
            loaded = copy.deepcopy(state_dict)
            other.optimizer.load_state_dict(loaded)
            for _ in range(3):
                for problem in (one, other):
                    problem.train(1)
                assert_same_training(one, other, kwargs)
            assert as_plain(loaded) == as_plain(state_dict)  # loading and training left it as it was
            assert as_plain(one.optimizer.state_dict()) == as_plain(other.optimizer.state_dict())

    @optims([INFO])
    def test_what_is_loaded_is_not_what_was_saved(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
        """The tensors of a state_dict may be those of the optimizer it is from, never those of two optimizers."""
        for kwargs in without_differentiable(device, dtype):
            one, other = Problem(kwargs, device, dtype), Problem(kwargs, device, dtype)
            one.train(2)
            other.optimizer.load_state_dict(one.optimizer.state_dict())
            saved = [t.clone() for t in one.everything()], one.optimizer.iterations
            other.train(2)
            for actual, expected in zip(one.everything(), saved[0], strict=True):
                assert_same_bits(actual, expected)
            assert one.optimizer.iterations == saved[1]
            if isinstance(kwargs.get("lr"), Tensor):
                lrs = [p.optimizer.param_groups[0]["lr"] for p in (one, other)]
                assert lrs[0].data_ptr() != lrs[1].data_ptr()

    @optims([INFO])
    def test_older_checkpoints(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
        for kwargs in without_differentiable(device, dtype):
            problem = Problem(kwargs, device, dtype)
            problem.train(1)
            for flag in optim_info.not_og_supported_flags:
                state_dict = copy.deepcopy(problem.optimizer.state_dict())
                for group in state_dict["param_groups"]:
                    del group[flag]
                problem.optimizer.load_state_dict(state_dict)
                problem.train(1)
            assert problem.optimizer.iterations == 1 + len(optim_info.not_og_supported_flags)

    @optims([INFO])
    def test_saved_checkpoints_load_with_weights_only(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
        for kwargs in configurations(device, dtype, skip=("differentiable",)):
            one, other = Problem(kwargs, device, dtype), Problem(kwargs, device, dtype)
            one.train(2)
            file = io.BytesIO()
            torch.save(one.optimizer.state_dict(), file)
            file.seek(0)
            state_dict = torch.load(file, weights_only=True)
            assert as_plain(state_dict) == as_plain(one.optimizer.state_dict())
            other.optimizer.load_state_dict(state_dict)
            assert other.optimizer.iterations == 2

    @optims([INFO])
    def test_copies_have_every_public_attribute(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
        for kwargs in configurations(device, dtype):
            optimizer = Problem(kwargs, device, dtype).optimizer

            def public(instance: Any) -> set[str]:
                return {key for key in instance.__dict__ if not key.startswith("_")}

            assert public(copy.deepcopy(optimizer)) == public(optimizer)

    # ---- Hooks --------------------------------------------------------------------------------------------------

    @optims([INFO])
    def test_step_hooks(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
        for kwargs in without_differentiable(device, dtype):
            order: list[str] = []

            def append(what: str, order: list[str], *_: Any) -> None:
                order.append(what)

            problem = Problem(kwargs, device, dtype)
            handles = [
                register_optimizer_step_pre_hook(functools.partial(append, "global pre", order)),
                register_optimizer_step_post_hook(functools.partial(append, "global post", order)),
                problem.optimizer.register_step_pre_hook(functools.partial(append, "pre", order)),
                problem.optimizer.register_step_post_hook(functools.partial(append, "post", order)),
            ]
            try:
                problem.train(1)
            finally:
                for handle in handles:
                    handle.remove()
            problem.train(1)
            assert order == ["global pre", "pre", "post", "global post"]

    @optims([INFO])
    def test_state_dict_hooks(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
        problem = Problem({"lr": 1.0}, device, dtype)
        problem.train(1)
        order: list[str] = []

        def before(optimizer: Any) -> None:
            order.append("pre")
            optimizer.param_groups[0]["lr"] = 0.25

        def after(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            order.append("post")
            return {**state_dict, "more": 1}

        handles = [
            problem.optimizer.register_state_dict_pre_hook(before),
            problem.optimizer.register_state_dict_post_hook(after),
        ]
        state_dict = problem.optimizer.state_dict()
        assert order == ["pre", "post"]
        assert state_dict["more"] == 1
        assert state_dict["param_groups"][0]["lr"] == 0.25
        for handle in handles:
            handle.remove()
        assert "more" not in problem.optimizer.state_dict()

    @optims([INFO])
    def test_load_state_dict_hooks(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
        problem = Problem({"lr": 1.0}, device, dtype)
        state_dict = problem.optimizer.state_dict()
        order: list[str] = []

        def first(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            order.append("first")
            state_dict["param_groups"][0]["lr"] = 0.5
            return state_dict

        def second(optimizer: Any, state_dict: dict[str, Any]) -> None:
            order.append(f"second after {state_dict['param_groups'][0]['lr']}")

        def after(optimizer: Any) -> None:
            order.append("post")
            optimizer.learning_rate = 0.125

        problem.optimizer.register_load_state_dict_pre_hook(second)
        problem.optimizer.register_load_state_dict_pre_hook(first, prepend=True)
        problem.optimizer.register_load_state_dict_post_hook(after)
        problem.optimizer.load_state_dict(state_dict)
        assert order == ["first", "second after 0.5", "post"]
        assert problem.optimizer.learning_rate == 0.125

    @optims([INFO])
    def test_the_profiler_shows_step_and_zero_grad(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
        problem = Problem({"lr": 1.0}, device, dtype)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            problem.train(1)
        names = {event.name for event in profile.events()}
        assert "Optimizer.step#AdadeltaKeras.step" in names
        assert "Optimizer.zero_grad#AdadeltaKeras.zero_grad" in names
        if kernels.is_loaded:
            assert "torch_adadelta::adadelta_" in names

    # ---- The fused implementation -------------------------------------------------------------------------------

    @optims([INFO], dtypes=[torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_fused_does_not_step_if_found_inf(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
        if not kernels.is_loaded:
            self.skipTest("the compiled library is not installed")
        for described in optim_info.optim_inputs_func(device):
            params = [Parameter(torch.ones(2, 3, device=device, dtype=dtype)) for _ in range(3)]
            optimizer = optim_info.optim_cls(params, **{"lr": 1.0, **described.kwargs, "fused": True})
            optimizer.grad_scale = None  # as a scaler that has unscaled already
            for found_inf in (1.0, 0.0):
                optimizer.found_inf = torch.tensor(found_inf, device=device)
                before = [p.detach().clone() for p in params]
                for p in params:
                    p.grad = torch.ones_like(p)
                optimizer.step()
                for p, was in zip(params, before, strict=True):
                    # The first step of Adadelta is too small for 16 bits.
                    assert torch.equal(p, was) == bool(found_inf) or dtype in (torch.bfloat16, torch.float16)
                    for state in optimizer.state[p].values():
                        assert bool(state.any()) == (not found_inf)
                assert optimizer.iterations == (0 if found_inf else 1)

    @optims([INFO])
    def test_meta_parameters_take_a_step_elsewhere(self, device: str, dtype: torch.dtype, optim_info: Any) -> None:
        for implementation in ({}, {"foreach": False}):
            param = Parameter(torch.ones(5, 5, device="meta", dtype=dtype))
            optimizer = optim_info.optim_cls([param], **implementation)
            param.grad = torch.ones_like(param)
            optimizer.step()
            assert all(state.is_meta for state in optimizer.state[param].values())


instantiate_device_type_tests(TestContract, globals(), only_for="cpu")
