"""What surrounds `step()`: hooks, and the range that profilers and observers are told of, as for every optimizer."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import ExecutionTraceObserver, ProfilerActivity, profile

from torch_adadelta import AdadeltaKeras

OPTIMIZERS = [torch.optim.Adadelta, AdadeltaKeras]


def optimizer_of(cls: type[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    param = Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    return cls([param])  # type: ignore[call-arg]


@contextmanager
def observed(file: Path) -> Iterator[list[dict[str, Any]]]:
    """Leaves in the list what an observer that is no profiler is told of meanwhile."""
    nodes: list[dict[str, Any]] = []
    observer = ExecutionTraceObserver().register_callback(str(file))
    observer.start()
    try:
        yield nodes
    finally:
        observer.stop()
        observer.unregister_callback()
    nodes += json.loads(file.read_text())["nodes"]


def ranges(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The nodes of steps, without what tells one from another."""
    return [
        {key: value for key, value in node.items() if key not in ("id", "ctrl_deps", "name", "attrs")}
        | {attr["name"]: attr["value"] for attr in node["attrs"] if attr["name"] not in ("rf_id", "seq_id")}
        for node in nodes
        if node["name"].startswith("Optimizer.step#")
    ]


def test_observers_are_told_what_they_are_told_of_other_optimizers(tmp_path: Path) -> None:
    theirs, ours = map(optimizer_of, OPTIMIZERS)
    with observed(tmp_path / "trace.json") as nodes:
        theirs.step()
        ours.step()
    assert [node["name"] for node in nodes if node["name"].startswith("Optimizer.")] == [
        "Optimizer.step#Adadelta.step",
        "Optimizer.step#AdadeltaKeras.step",
    ]
    of_theirs, of_ours = ranges(nodes)
    assert of_ours == of_theirs
    (ours_id,) = (node["id"] for node in nodes if node["name"] == "Optimizer.step#AdadeltaKeras.step")
    assert any(node["ctrl_deps"] == ours_id for node in nodes)


def test_profilers_are_told_what_they_are_told_of_other_optimizers() -> None:
    theirs, ours = map(optimizer_of, OPTIMIZERS)
    with profile(activities=[ProfilerActivity.CPU], with_stack=True, profile_memory=True) as profiler:
        theirs.step()
        ours.step()
    events = [event for event in profiler.events() if event.name.startswith("Optimizer.step#")]
    assert [(event.name, event.scope, event.is_user_annotation) for event in events] == [
        ("Optimizer.step#Adadelta.step", torch._C._profiler.RecordScope.USER_SCOPE.value, True),
        ("Optimizer.step#AdadeltaKeras.step", torch._C._profiler.RecordScope.USER_SCOPE.value, True),
    ]


def test_the_range_ends_where_a_step_raises(tmp_path: Path) -> None:
    optimizer = optimizer_of(AdadeltaKeras)

    def fail() -> float:
        raise ValueError("no loss")

    with observed(tmp_path / "trace.json") as nodes:
        with pytest.raises(ValueError, match="no loss"):
            optimizer.step(fail)
        torch.ones(3)
    (step,) = (node for node in nodes if node["name"].startswith("Optimizer.step#"))
    (ones,) = (node for node in nodes if node["name"] == "aten::ones")
    assert ones["ctrl_deps"] == step["ctrl_deps"]


@pytest.mark.parametrize(
    "kinds", [("pre", "post"), ("pre",), ("post",), ("all pre",), ("all post",), ("all post", "post")]
)
def test_hooks_are_called_as_those_of_other_optimizers(kinds: tuple[str, ...]) -> None:
    """With the same arguments, in the same order; also one that the closure registers."""

    def calls_of(cls: type[torch.optim.Optimizer]) -> list[Any]:
        optimizer = optimizer_of(cls)
        calls: list[Any] = []

        def hook_called(name: str) -> Any:
            return lambda o, args, kwargs: calls.append((name, o is optimizer, args == (optimizer,), list(kwargs)))

        register = {
            "pre": optimizer.register_step_pre_hook,
            "post": optimizer.register_step_post_hook,
            "all pre": register_optimizer_step_pre_hook,
            "all post": register_optimizer_step_post_hook,
        }
        handles = [register[kind](hook_called(kind)) for kind in kinds]

        def closure() -> float:
            calls.append("closure")
            handles.append(optimizer.register_step_post_hook(hook_called("late")))
            return 1.0

        try:
            optimizer.step()
            calls.append(optimizer.step(closure=closure))
        finally:
            for handle in handles:
                handle.remove()
        optimizer.step()
        return calls

    theirs, ours = map(calls_of, OPTIMIZERS)
    assert ours == theirs
    assert ("late", True, True, ["closure"]) in ours


def test_a_hook_may_replace_the_arguments() -> None:
    optimizer = optimizer_of(AdadeltaKeras)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: (args, {"closure": lambda: 7.0}))
    assert optimizer.step() == 7.0


def test_the_step_of_a_subclass_has_hooks_too() -> None:
    class Counting(AdadeltaKeras):
        steps = 0

        def step(self, closure: Any = None) -> Any:
            self.steps += 1
            return super().step(closure)

    optimizer = optimizer_of(Counting)
    seen: list[int] = []
    optimizer.register_step_post_hook(lambda o, *_: seen.append(o.steps))
    optimizer.step()
    assert seen[-1] == optimizer.steps == 1
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        optimizer.step()
    assert "Optimizer.step#Counting.step" in {event.name for event in profiler.events()}
