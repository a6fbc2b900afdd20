"""The state machine of test_optimizer_stateful.py, whose parameters also move between the CPU and a fake GPU.

Left out is what takes storages apart or writes them to a file, and sparse gradients there: PyTorch does that only on
devices that it was built for.
"""

from typing import Any

import cases
import pytest
import test_optimizer_stateful as stateful
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule
from torch import Tensor

pytestmark = stateful.pytestmark

DEVICES = ("cpu", "cuda:0", "cuda:1")

to_numpy_on_host, gradient_on_host = cases.to_numpy, stateful.gradient


def to_numpy(tensor: Tensor) -> Any:
    return to_numpy_on_host(tensor.detach().cpu())


def gradient(kind: str, param: Tensor, seed: int) -> Tensor | None:
    if param.device.type == "cpu":
        return gradient_on_host(kind, param, seed)
    grad = gradient_on_host("dense" if kind == "sparse" else kind, param.detach().cpu(), seed)
    return None if grad is None else grad.to(param.device)


class MovingStateMachine(stateful.OptimizerStateMachine):
    """With a rule that moves parameters."""

    load_into_itself = load_into_another = go_on_with_a_copy = rewrite_state = rewrite_param = None  # type: ignore[assignment]

    moves = 0

    @rule(one=stateful.some_param, other=stateful.some_param, key=stateful.keys)
    def exchange_between_parameters(self, one: int, other: int, key: str) -> None:
        numbers = [self.number_with_state(i) for i in (one, other)]
        if len({self.replicas[0].params[number].device for number in numbers if number is not None}) == 1:
            super().exchange_between_parameters(one=one, other=other, key=key)

    @rule(index=stateful.some_param, device=st.sampled_from(DEVICES), how=st.sampled_from(["one", "all", "state late"]))
    def move(self, index: int, device: str, how: str) -> None:
        """As `module.to` and frameworks that offload do it. A step before the state has followed must be refused."""
        numbers = range(len(self.has_state)) if how == "all" else [self.number(index)]
        for replica in self.replicas:
            for number in numbers:
                param = replica.params[number]
                before = param.device
                param.grad = None
                param.data = param.data.to(device)
                state = replica.optimizer.state.get(param, {})
                if how == "state late" and state and param.device != before and param.numel():
                    self.refused(replica, "but its state")
                for key in state:
                    state[key] = state[key].to(device)
                MovingStateMachine.moves += param.device != before
        for number in numbers:
            self.set_oracle(number)


def test_moving_state_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cases, stateful):
        monkeypatch.setattr(module, "to_numpy", to_numpy)
    monkeypatch.setattr(stateful, "gradient", gradient)
    monkeypatch.setattr(stateful, "OptimizerStateMachine", MovingStateMachine)
    stateful.run_state_machine(settings(stateful.SETTINGS, max_examples=100))
    assert MovingStateMachine.moves > 50
