"""A state machine of an optimizer: whatever happens to it between steps, every path keeps the bits of the oracle.

Its rules add and remove groups, take steps in which some gradients are missing or sparse, and change hyperparameters,
clip options and `norm_variables`; they save, load and copy the optimizer; they convert, replace, exchange and offload
its parameters and state behind its back. After every rule the parameters, the accumulators and the count of steps of
each path are compared with the oracle's, bit by bit. A failure is shrunk and printed as a script.

The short run is always the same. `make nightly` draws new examples; the environment variable TORCH_ADADELTA_EXAMPLES
says how many.
"""

import copy
import io
import os
import pickle
import warnings
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from cases import assert_same_bits, dtype_name, gradients, randn, to_numpy, to_oracle
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from reference.oracle import Oracle, OracleOptimizer, memory_order
from stateful_draws import (
    CLIPS,
    DTYPES,
    HYPERPARAMETERS,
    KEYS,
    LAYOUTS,
    NUMBERS,
    PRECISIONS,
    SHAPES,
    dtypes,
    gradient,
    keys,
    kinds,
    layouts,
    seeds,
    shapes,
    some_param,
)
from torch import Tensor
from torch.nn import Parameter

from torch_adadelta import AdadeltaKeras
from torch_adadelta.backends import kernels
from torch_adadelta.step import planning

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support", "ignore:Sparse CSR tensor support")


class Path(NamedTuple):
    name: str
    options: dict[str, bool]


PATHS = (
    Path("single_tensor", {"foreach": False}),
    Path("multi_tensor", {"foreach": True}),
    *(
        (Path("fused", {"fused": True}), Path("default", {}))
        if kernels.is_loaded
        else (Path("default", {"fused": False}),)
    ),
)


class Replica:
    """The parameters of one path, in the order in which they were made, and their optimizer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.params: list[Tensor] = []
        self.optimizer: Any = None


class OptimizerStateMachine(RuleBasedStateMachine):
    """A replica on every path, and what the oracle says of them."""

    capability: ClassVar[str | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.replicas = [Replica(path) for path in PATHS]
        self.expected = OracleOptimizer([])
        self.groups: list[dict[str, Any]] = []  # "params": the numbers of the parameters, in the order of the group
        self.has_state: list[bool] = []
        self.defaults: dict[str, Any] = {key: values[0] for key, values in HYPERPARAMETERS.items()}
        self.expected.params = []
        self.left_behind: list[tuple[Tensor, Tensor]] = []

    # ---- What the others build on -----------------------------------------------------------------------------------

    def dtype_of(self, index: int) -> torch.dtype:
        return self.replicas[0].params[index].dtype

    def has_complex(self) -> bool:
        return any(p.is_complex() for p in self.replicas[0].params)

    def number(self, index: int) -> int:
        return index % len(self.has_state)

    def number_with_state(self, index: int) -> int | None:
        """Some parameter that has state, or None."""
        numbers = [i for i, has in enumerate(self.has_state) if has]
        return numbers[index % len(numbers)] if numbers else None

    def set_oracle(self, index: int) -> None:
        """Takes over what somebody else wrote to a parameter and its state; the paths must agree on that, too."""
        replica = self.replicas[0]
        param, oracle = replica.params[index], self.expected.oracles[index]
        state_dtype, master_weights = self.precision_of(index)
        fresh = Oracle(
            to_numpy(param),
            dtype=dtype_name(param.dtype),
            maximize=oracle.maximize,
            master_weights=master_weights,
            state_dtype=None if state_dtype is None else dtype_name(state_dtype),
        )
        if self.has_state[index]:
            state = replica.optimizer.state[param]
            for key in KEYS:
                setattr(fresh, key, to_numpy(state[key]).copy())
            if "remainder" in state:
                fresh.remainder = state["remainder"].cpu().numpy().copy()
        fresh.p = to_numpy(param).copy()
        self.expected.oracles[index] = fresh
        strides = np.empty(param.shape, np.int8)
        strides = np.lib.stride_tricks.as_strided(strides, param.shape, param.stride())
        self.expected.params[index], self.expected.orders[index] = strides, memory_order(strides)

    def precision_of(self, index: int) -> tuple[torch.dtype | None, bool]:
        """What the group of a parameter says of its state and its master."""
        group: dict[str, Any] = next((group for group in self.groups if index in group["params"]), {})
        return group.get("state_dtype"), group.get("master_weights", False)

    def forget_state(self, index: int) -> None:
        self.has_state[index] = False
        self.set_oracle(index)

    def make_group(self, shape_numbers: list[int], dtype: str, layout: str, seed: int, options: dict[str, Any]) -> None:
        first = len(self.has_state)
        numbers = list(range(first, first + len(shape_numbers)))
        generator = torch.Generator().manual_seed(seed)
        values = [
            LAYOUTS[layout](randn(SHAPES[shape], DTYPES[dtype], generator) * (seed % 2)) for shape in shape_numbers
        ]
        for replica in self.replicas:
            # Not clone, which would fill the gaps.
            params = [Parameter(LAYOUTS[layout](v.clone(memory_format=torch.contiguous_format))) for v in values]
            replica.params += params
            group = {"params": params, **options}
            if replica.optimizer is None:
                replica.optimizer = AdadeltaKeras([group], **self.defaults, **replica.path.options)
            else:
                replica.optimizer.add_param_group(group)
        self.groups.append({"params": numbers, "maximize": False, **self.defaults, **options})
        for number in numbers:
            self.has_state.append(False)
            self.expected.oracles.append(Oracle(np.zeros(1), maximize=self.groups[-1]["maximize"]))
            self.expected.orders.append([])
            self.expected.params.append(np.zeros(1))
            self.set_oracle(number)

    # ---- The rules --------------------------------------------------------------------------------------------------

    @initialize(
        shape_numbers=st.lists(shapes, min_size=1, max_size=4),
        dtype=dtypes,
        layout=layouts,
        seed=seeds,
        capability=st.sampled_from(kernels.CPU_CAPABILITIES),
    )
    def begin(self, shape_numbers: list[int], dtype: str, layout: str, seed: int, capability: str) -> None:
        if kernels.is_loaded:
            try:
                before = kernels.set_cpu_capability(capability)
            except RuntimeError:  # this processor has it not
                before = kernels.cpu_capability()
            if OptimizerStateMachine.capability is None:
                OptimizerStateMachine.capability = before
        self.make_group(shape_numbers, dtype, layout, seed, {})

    @precondition(lambda self: len(self.groups) < 3)
    @rule(
        shape_numbers=st.lists(shapes, min_size=1, max_size=3),
        dtype=dtypes,
        layout=layouts,
        seed=seeds,
        options=st.sampled_from([{}, {"lr": 0.1}, {"rho": 0.5, "maximize": True}, {"epsilon": 1e-3}, *PRECISIONS]),
    )
    def add_group(self, shape_numbers: list[int], dtype: str, layout: str, seed: int, options: dict[str, Any]) -> None:
        if DTYPES[dtype].is_complex and self.expected.clipvalue is not None:
            dtype = "float32"
        if "master_weights" in options or ("state_dtype" in options and dtype in ("float64", "complex64")):
            dtype = "bfloat16"
        self.make_group(shape_numbers, dtype, layout, seed, options)

    @precondition(lambda self: len(self.groups) > 1)
    @rule(group=st.integers(0, 2))
    def remove_group(self, group: int) -> None:
        """With the state of its parameters. The variables of the norm that it had pieces of lose these."""
        number = group % len(self.groups)
        for replica in self.replicas:
            for param in replica.optimizer.param_groups.pop(number)["params"]:
                replica.optimizer.state.pop(param, None)
                param.grad = None
        removed = self.groups.pop(number)["params"]
        for index in removed:
            self.forget_state(index)
        left = [[piece for piece in pieces if piece[0] not in removed] for pieces in self.expected.norm_variables]
        self.expected.norm_variables = [pieces for pieces in left if pieces]

    def steps(self, kinds: list[str], seed: int, count: int = 1) -> None:
        if self.expected.norm_variables and self.expected.clipnorm is not None:
            kinds = ["dense" if kind == "sparse" else kind for kind in kinds]  # which has no norm there
        for t in range(count):
            grads: list[Any] = [None] * len(self.has_state)
            for replica in self.replicas:
                for i, param in enumerate(replica.params):
                    grads[i] = gradient(kinds[i % len(kinds)], param, seed + 101 * i + t)
                    param.grad = grads[i]
                replica.optimizer.step()
            own = to_oracle(grads)
            rows = [(i, own[i]) for group in self.groups for i in group["params"]]
            rows = [(i, self.expected.unscaled(i, grad)) for i, grad in rows if grad is not None]
            if not rows:
                continue
            group_of = {i: group for group in self.groups for i in group["params"]}
            for (i, _), grad in zip(rows, self.expected.clip(rows), strict=True):
                oracle, group = self.expected.oracles[i], group_of[i]
                self.expected.learning_rate = group["lr"]
                oracle.learning_rate = self.expected.learning_rate_at(self.expected.iterations, oracle.format.T)
                for key in ("rho", "epsilon", "weight_decay"):
                    setattr(oracle, key, group[key])
                oracle.step(grad)
                self.has_state[i] = True
            self.expected.iterations += 1

    @rule(seed=seeds, count=st.integers(1, 3))
    def step(self, seed: int, count: int) -> None:
        self.steps(["dense"], seed, count)

    @rule(kinds=kinds, seed=seeds)
    def step_with(self, kinds: list[str], seed: int) -> None:
        self.steps(kinds, seed)

    @rule(key=st.sampled_from([*HYPERPARAMETERS]), choice=st.integers(0, 3), group=st.integers(0, 3))
    def set_hyperparameter(self, key: str, choice: int, group: int) -> None:
        """For one group, or for all if there is none with this number."""
        values = HYPERPARAMETERS[key]
        value = values[choice % len(values)]
        for replica in self.replicas:
            if group < len(self.groups):
                replica.optimizer.param_groups[group][key] = value
            else:
                setattr(replica.optimizer, key, value)
        for number, own in enumerate(self.groups):
            if number == group or group >= len(self.groups):
                own[key] = value
        if group >= len(self.groups):
            self.defaults[key] = value

    @rule(choice=st.integers(0, len(CLIPS) - 1))
    def set_clip(self, choice: int) -> None:
        clip = CLIPS[choice]
        if "clipvalue" in clip and self.has_complex():
            clip = {}
        for name in ("clipvalue", "clipnorm", "global_clipnorm"):  # two of them exclude each other
            for replica in self.replicas:
                setattr(replica.optimizer, name, None)
            setattr(self.expected, name, clip.get(name))
        for name, value in clip.items():
            for replica in self.replicas:
                setattr(replica.optimizer, name, value)

    @rule(shares=st.lists(st.tuples(some_param, st.sampled_from(["whole", "first row", "others"])), max_size=5))
    def set_norm_variables(self, shares: list[tuple[int, str]]) -> None:
        """One variable of all pieces: whole parameters, or rows of some."""
        numbers = [i for group in self.groups for i in group["params"]]
        if numbers != sorted(numbers):  # the oracle adds in the order of the numbers
            return
        pieces: dict[int, tuple[int, int, int]] = {}
        for index, share in shares:
            number = numbers[index % len(numbers)]
            param = self.replicas[0].params[number]
            rows = param.shape[0] if param.dim() else 1
            if share == "whole" and rows:
                pieces[number] = (number, 0, rows)
            elif rows > 1 and param.stride(0) == max(param.stride()):
                pieces[number] = (number, 0, 1) if share == "first row" else (number, 1, rows)
        for replica in self.replicas:
            given = [[(replica.params[i], first, end) for i, first, end in pieces.values()]] if pieces else None
            replica.optimizer.norm_variables = given
        self.expected.norm_variables = [list(pieces.values())] if pieces else []

    @rule(name_and_value=st.sampled_from([(n, x) for n, xs in NUMBERS.items() for x in xs]))
    def set_number(self, name_and_value: tuple[str, Any]) -> None:
        for each in (*(replica.optimizer for replica in self.replicas), self.expected):
            setattr(each, *name_and_value)

    @rule()
    def load_into_itself(self) -> None:
        for replica in self.replicas:
            file = io.BytesIO()
            torch.save(replica.optimizer.state_dict(), file)
            file.seek(0)
            replica.optimizer.load_state_dict(torch.load(file, weights_only=True))

    @rule(steps_before=st.integers(0, 2))
    def load_into_another(self, steps_before: int) -> None:
        """Another optimizer of the same parameters, which has perhaps taken steps, and holds state of its own."""
        for replica in self.replicas:
            saved = copy.deepcopy(replica.optimizer.state_dict())
            values = [p.detach().clone() for p in replica.params]
            own = ("params", "state_dtype", "master_weights")
            groups = [{key: copy.copy(group[key]) for key in own} for group in replica.optimizer.param_groups]
            other = AdadeltaKeras(groups, **self.defaults, **replica.path.options)
            for _ in range(steps_before):
                for param in replica.params:
                    param.grad = None if self.has_complex() else torch.ones_like(param)
                other.step()
            with torch.no_grad():
                for param, value in zip(replica.params, values, strict=True):
                    param.copy_(value)
            other.load_state_dict(saved)
            replica.optimizer = other

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def go_on_with_a_copy(self, how: str) -> None:
        """The copy goes on; what it was copied from must stay as it is."""
        for replica in self.replicas:
            both = (replica.params, replica.optimizer)
            for param in replica.params:
                param.grad = None
                for tensor in (param, *replica.optimizer.state.get(param, {}).values()):
                    self.left_behind.append((tensor, tensor.detach().clone()))
            copied = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
            replica.params, replica.optimizer = copied
        self.left_behind = self.left_behind[-64:]
        for index in range(len(self.has_state)):
            self.set_oracle(index)  # the copy may lie otherwise in memory

    @rule(index=some_param, dtype=st.sampled_from(["float32", "float64", "bfloat16", "float16"]))
    def convert(self, index: int, dtype: str) -> None:
        """Parameter and state to another dtype, as `module.to` does it. A step amid that must be refused."""
        index = self.number(index)
        if self.dtype_of(index).is_complex or any(self.precision_of(index)):
            return
        for replica in self.replicas:
            param = replica.params[index]
            param.grad = None
            param.data = param.data.to(DTYPES[dtype])
            state = replica.optimizer.state.get(param, {})
            if state and state["square_avg"].dtype != param.dtype:
                self.refused(replica, "Convert the state too")
            for key in state:
                state[key] = state[key].to(DTYPES[dtype])
        self.set_oracle(index)

    def refused(self, replica: Replica, message: str) -> None:
        """A step that must raise, and change nothing."""
        before = self.copied(replica)
        for param in replica.params:
            param.grad = torch.ones_like(param)
        with pytest.raises(RuntimeError, match=message):
            replica.optimizer.step()
        for param in replica.params:
            param.grad = None
        for (tensor, was), (now, _) in zip(before, self.copied(replica), strict=True):
            assert now is tensor
            assert_same_bits(tensor, was, "after a refused step")

    @staticmethod
    def copied(replica: Replica) -> list[tuple[Tensor, Tensor]]:
        tensors = [
            tensor for param in replica.params for tensor in (param, *replica.optimizer.state.get(param, {}).values())
        ]
        return [(tensor, tensor.detach().clone()) for tensor in tensors]

    @rule(index=some_param, key=keys)
    def corrupt_and_restore(self, index: int, key: str) -> None:
        """A state tensor of another shape: refused, and nothing changed; then the right one again."""
        number = self.number_with_state(index)
        if number is None:
            return
        for replica in self.replicas:
            state = replica.optimizer.state[replica.params[number]]
            good = state[key]
            state[key] = torch.zeros(*good.shape, 2, dtype=good.dtype)
            self.refused(replica, "but its state")
            state[key] = good

    @rule(index=some_param, how=st.sampled_from(["pop", "empty", "all"]))
    def clear_state(self, index: int, how: str) -> None:
        number = self.number(index)
        if how == "empty" and not any(number in group["params"] for group in self.groups):
            return  # PyTorch makes no state_dict of an optimizer with an entry for what is in no group
        for replica in self.replicas:
            if how == "all":
                replica.optimizer.state.clear()
            elif how == "pop":
                replica.optimizer.state.pop(replica.params[number], None)
            else:
                replica.optimizer.state[replica.params[number]] = {}
        for cleared in range(len(self.has_state)) if how == "all" else [number]:
            self.forget_state(cleared)

    @rule(
        index=some_param,
        key=keys,
        how=st.sampled_from(["replace", "gaps", "data", "set_", "copy_", "resize_", "swap_tensors", "dict", "offload"]),
        seed=seeds,
    )
    def rewrite_state(self, index: int, key: str, how: str, seed: int) -> None:
        """Other values in one state tensor, by every way there is to put them there."""
        number = self.number_with_state(index)
        if number is None:
            return
        for replica in self.replicas:
            param = replica.params[number]
            state = replica.optimizer.state[param]
            old = state[key]
            new = gradients(param.shape, param.dtype, 1, seed)[0].abs().to(old.dtype)
            if how == "replace":
                state[key] = new
            elif how == "data":
                old.data = new
            elif how == "set_":
                old.set_(new.untyped_storage(), 0, new.shape, new.stride())
            elif how == "gaps":
                state[key] = LAYOUTS["gaps"](new)
            elif how == "offload":  # its storage is freed, as frameworks do it, and another tensor comes back
                if old.untyped_storage().resizable():  # that of a loaded one is not
                    old.untyped_storage().resize_(0)
                state[key] = new
            elif how == "resize_":
                old.resize_(0).resize_(new.shape).copy_(new)
            elif how == "swap_tensors":
                try:
                    torch.utils.swap_tensors(old, new)
                except RuntimeError:  # PyTorch does not exchange a tensor that somebody else, the library, refers to
                    assert replica.optimizer._partitions.partition is not None
                    state[key] = new
            elif how == "dict":
                replica.optimizer.state[param] = {**state, key: new}
            else:
                old.copy_(new)
            if how in ("replace", "dict"):
                old.fill_(77)  # nobody may still read it
        self.set_oracle(number)

    @rule(index=some_param)
    def exchange_the_two_averages(self, index: int) -> None:
        number = self.number_with_state(index)
        if number is None:
            return
        for replica in self.replicas:
            state = replica.optimizer.state[replica.params[number]]
            state["square_avg"], state["acc_delta"] = state["acc_delta"], state["square_avg"]
        self.set_oracle(number)

    @rule(one=some_param, other=some_param, key=keys)
    def exchange_between_parameters(self, one: int, other: int, key: str) -> None:
        numbers = [self.number_with_state(i) for i in (one, other)]
        i, j = numbers
        if (
            i is None
            or j is None
            or self.dtype_of(i) != self.dtype_of(j)
            or self.precision_of(i) != self.precision_of(j)
        ):
            return
        if self.replicas[0].params[i].shape != self.replicas[0].params[j].shape:
            return
        for replica in self.replicas:
            states = [replica.optimizer.state[replica.params[number]] for number in (i, j)]
            states[0][key], states[1][key] = states[1][key], states[0][key]
        self.set_oracle(i)
        self.set_oracle(j)

    @rule(index=some_param, how=st.sampled_from(["data", "swap_tensors", "copy_", "set_"]), seed=seeds)
    def rewrite_param(self, index: int, how: str, seed: int) -> None:
        index = self.number(index)
        for replica in self.replicas:
            param = replica.params[index]
            new = gradients(param.shape, param.dtype, 1, seed)[0]
            param.grad = None
            if how == "data":
                param.data = new
            elif how == "swap_tensors":
                torch.utils.swap_tensors(param, Parameter(new))
            else:
                with torch.no_grad():
                    if how == "set_":
                        param.set_(new.untyped_storage(), 0, new.shape, new.stride())
                    else:
                        param.copy_(new)
        self.set_oracle(index)

    @precondition(lambda self: not self.expected.norm_variables)  # which go by the places of parameters
    @rule(group=st.integers(0, 2))
    def reverse_a_group(self, group: int) -> None:
        number = group % len(self.groups)
        for replica in self.replicas:
            replica.optimizer.param_groups[number]["params"].reverse()
        self.groups[number]["params"].reverse()

    @rule()
    def reorder_state(self) -> None:
        for replica in self.replicas:
            items = list(replica.optimizer.state.items())[::-1]
            replica.optimizer.state.clear()
            replica.optimizer.state.update(items)

    @rule()
    def weights_as_in_keras(self) -> None:
        for replica in self.replicas:
            if any(p.dtype not in (torch.float32, torch.float64) for p in replica.params):
                return
        for replica in self.replicas:
            weights = replica.optimizer.get_weights()
            replica.optimizer.state.clear()
            replica.optimizer.set_weights(weights)
        for index in (i for group in self.groups for i in group["params"]):
            self.has_state[index] = True
            self.set_oracle(index)

    # ---- What must hold after each of them --------------------------------------------------------------------------

    @invariant()
    def all_paths_are_like_the_oracle(self) -> None:
        for replica in self.replicas:
            if replica.optimizer is None:
                return
            for i, (param, oracle) in enumerate(zip(replica.params, self.expected.oracles, strict=True)):
                what = f"of parameter {i}, {replica.path.name}"
                assert_same_bits(param, oracle.p, f"param {what}")
                state = replica.optimizer.state.get(param) or {}
                assert bool(state) == self.has_state[i], what
                for key, tensor in state.items():
                    if key == "remainder":
                        np.testing.assert_array_equal(tensor.cpu().numpy(), oracle.remainder, err_msg=what)
                    else:
                        assert_same_bits(tensor, getattr(oracle, key), f"{key} {what}")
            assert replica.optimizer.iterations == self.expected.iterations
        for tensor, was in self.left_behind:
            assert_same_bits(tensor, was, "left behind")

    def teardown(self) -> None:
        if kernels.is_loaded and OptimizerStateMachine.capability is not None:
            kernels.set_cpu_capability(OptimizerStateMachine.capability)


EXAMPLES = os.environ.get("TORCH_ADADELTA_EXAMPLES")
SETTINGS = settings(
    max_examples=120,
    derandomize=True,
    database=None,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def run_state_machine(how: settings) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_state_machine_as_test(OptimizerStateMachine, settings=how)


def test_optimizer_stateful() -> None:
    run_state_machine(SETTINGS)


@pytest.mark.slow
def test_optimizer_stateful_long() -> None:
    run_state_machine(settings(SETTINGS, max_examples=int(EXAMPLES or 1000), derandomize=EXAMPLES is None))


@pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")
def test_a_stale_partition_is_found_and_printed_as_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """If an optimizer took the state that it has cached for that of its parameters, without a look, this would show."""
    monkeypatch.setattr(planning.Partition, "state_of", lambda self, *_: self.state)
    # To shrink it takes minutes.
    without_shrinking = settings(SETTINGS, max_examples=250, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)) as raised:
        run_state_machine(without_shrinking)
    script = "\n".join(getattr(raised.value, "__notes__", []))
    assert "state = OptimizerStateMachine()" in script
    assert "state.begin(" in script
