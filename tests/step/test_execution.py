"""Faults amid a step: what was interrupted says what it has done, and training can go on."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path as FilePath
from types import FrameType
from typing import Any

import pytest
import torch
from cases import Path, assert_same_bits, assert_unchanged, gradients, snapshot
from torch import Tensor
from torch.nn import Parameter

import torch_adadelta
from torch_adadelta import AdadeltaKeras, schedules

PACKAGE = str(FilePath(torch_adadelta.__file__).parent)
PARTIAL = "the step is partial"


def identity(pairs: Any) -> Any:
    return pairs


# ---- An exception at every line ---------------------------------------------------------------------------------------

SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two groups": {"groups": 2},
    "no state yet": {"steps_before": 0},
    "clipnorm": {"clipnorm": 0.5},
    "global_clipnorm": {"global_clipnorm": 0.5, "groups": 2},
    "sources": {
        "learning_rate": schedules.ExponentialDecay(1.0, 10, 0.9),
        "rho": lambda: 0.9,
        "decay": 0.5,
        "groups": 2,
    },
    "callbacks": {"gradient_aggregator": identity, "gradient_transformers": [identity], "steps_before": 0},
    "sparse": {"sparse": True},
}

OF_EACH_KIND: dict[type[BaseException], tuple[str, ...]] = dict.fromkeys(
    (TimeoutError, RuntimeError), ("plain", "no state yet")
)


def made(path: Path, groups: int = 1, steps_before: int = 2, sparse: bool = False, **options: Any) -> AdadeltaKeras:
    """An optimizer that has taken steps, and has gradients for another one."""
    param_groups = [{"params": [Parameter(torch.ones(4, 3)) for _ in range(2)]} for _ in range(groups)]
    optimizer = AdadeltaKeras(param_groups, **{"learning_rate": 1.0, **options}, **path.options)
    for step in range(steps_before + 1):
        if step > 0:
            optimizer.step()
        give_gradients(optimizer, step, sparse)
    return optimizer


def give_gradients(optimizer: AdadeltaKeras, seed: int, sparse: bool = False) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, param in enumerate(params):
        grad = gradients((4, 3), torch.float32, 1, 10 * seed + i)[0]
        param.grad = grad.to_sparse(1) if sparse and i == 1 else grad


def everything(optimizer: AdadeltaKeras) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [x for p in params for x in (p, *optimizer.state.get(p, {}).values())]


def is_like(optimizer: AdadeltaKeras, other: AdadeltaKeras) -> bool:
    ours, theirs = everything(optimizer), everything(other)
    return (
        len(ours) == len(theirs)
        and all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
        and [group["iterations"] for group in optimizer.param_groups]
        == [group["iterations"] for group in other.param_groups]
    )


class Fault:
    """Raises at line number `at` that the package runs, and counts them."""

    def __init__(self, at: int, error: BaseException | None = None) -> None:
        self.at, self.error = at, error
        self.count = 0
        self.was_planning = self.was_restoring = False

    def __enter__(self) -> "Fault":
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(self._before)

    def _call(self, frame: FrameType, event: str, _: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event != "line":
            return self._line
        self.count += 1
        if self.count - 1 == self.at and self.error is not None:
            sys.settrace(None)
            names = {f.f_code.co_name for f in self._stack(frame)}
            self.was_planning = bool(names & {"plan", "assemble"})
            self.was_restoring = frame.f_code.co_name == "_take_step" and torch.is_grad_enabled() is False
            raise self.error
        return self._line

    @staticmethod
    def _stack(frame: FrameType | None) -> Iterator[FrameType]:
        while frame is not None:
            yield frame
            frame = frame.f_back


@pytest.mark.parametrize("kind", [KeyboardInterrupt, TimeoutError, RuntimeError], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", SCENARIOS)
def test_an_exception_at_any_line_of_a_step(path: Path, name: str, kind: type[BaseException]) -> None:
    """It has done nothing, all, or says that it is partial; before the first write it has done nothing.

    KeyboardInterrupt is what Ctrl-C raises, the others what a signal handler may: Exceptions, like a refusal, and
    RuntimeError is what an op raises.
    """
    if path.capability not in (None, "default"):
        pytest.skip("the lines are those of the default instruction set")
    if path.name == "multi_tensor" or name not in OF_EACH_KIND.get(kind, SCENARIOS):
        pytest.skip("the optimizer's lines are the same")
    options = SCENARIOS[name]
    untouched, complete, after = (made(path, **options) for _ in range(3))
    complete.step()
    for seed in (0, 77):
        if seed:
            give_gradients(after, seed, "sparse" in options)
        after.step()
    outcomes = set()
    for at in itertools.count():
        optimizer = made(path, **options)
        before = snapshot(optimizer)
        raised = None
        try:
            with Fault(at, kind("enough")) as fault:
                optimizer.step()
        except kind as error:
            raised = error
        if raised is None:
            assert fault.count <= at, "the exception was swallowed"
            break
        if not torch.is_grad_enabled():
            torch.set_grad_enabled(True)
            assert fault.was_restoring  # no signal is handled where it begins; a trace function can raise there
        if PARTIAL in str(raised):
            assert not fault.was_planning
            outcomes.add("partial")
            continue
        if is_like(optimizer, complete):
            outcomes.add("complete")
        else:
            assert is_like(optimizer, untouched)
            assert_unchanged(optimizer, before)
            outcomes.add("nothing")
            optimizer.step()
        # Whatever the fault left in the optimizer itself, training goes on as if there had been none.
        give_gradients(optimizer, 77, "sparse" in options)
        optimizer.step()
        assert is_like(optimizer, after)
    assert outcomes == {"nothing", "partial", "complete"}


def test_an_interrupt_while_a_group_is_added(path: Path) -> None:
    def new_group() -> dict[str, Any]:
        return {"params": [Parameter(torch.ones(2))], "rho": lambda: 0.5}

    optimizer = made(path)
    with Fault(-1) as counter:
        optimizer.add_param_group(new_group())
    added = 0
    for at in range(counter.count):
        optimizer = made(path)
        before = snapshot(optimizer)
        with pytest.raises(KeyboardInterrupt), Fault(at, KeyboardInterrupt()):
            optimizer.add_param_group(new_group())
        if len(optimizer.param_groups) == 2:
            added += 1
        else:
            assert_unchanged(optimizer, before)
        optimizer.step()
        assert optimizer.iterations == 3
    assert added <= 1


def test_an_error_with_a_text_of_its_own_says_in_a_note_that_the_step_is_partial(path: Path) -> None:
    class Late(Exception):
        def __str__(self) -> str:
            return "late"

    class Group(dict[str, Any]):
        def __setitem__(self, key: str, value: Any) -> None:
            raise Late

    optimizer = made(path)
    optimizer.param_groups[0] = Group(optimizer.param_groups[0])
    with pytest.raises(Late) as raised:
        optimizer.step()
    if sys.version_info >= (3, 11):
        assert any(PARTIAL in note for note in raised.value.__notes__)


# ---- An exception in every callback -----------------------------------------------------------------------------------


class Enough(Exception):
    pass


def fail(*_: Any, **__: Any) -> Any:
    raise Enough("enough")


class FailingSchedule(schedules.LearningRateSchedule):
    fails = False

    def __call__(self, step: Any) -> Any:
        if self.fails:
            fail()
        return 0.5

    def get_config(self) -> dict[str, Any]:
        return {}


CALLBACKS: dict[str, Callable[[AdadeltaKeras], None]] = {
    "gradient_aggregator": lambda o: setattr(o, "gradient_aggregator", fail),
    "gradient_transformers": lambda o: setattr(o, "gradient_transformers", [identity, fail]),
    "learning_rate": lambda o: setattr(o, "learning_rate", fail),
    "rho": lambda o: setattr(o, "rho", fail),
    "epsilon": lambda o: setattr(o, "epsilon", fail),
    "schedule": lambda o: (setattr(o, "learning_rate", FailingSchedule()), setattr(FailingSchedule, "fails", True))[0],
    "step_pre_hook": lambda o: o.register_step_pre_hook(fail) and None,
}


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("name", CALLBACKS)
def test_an_exception_in_a_callback_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, path: Path, name: str, steps_before: int
) -> None:
    monkeypatch.setattr(FailingSchedule, "fails", False)
    optimizer = made(path, groups=2, steps_before=steps_before)
    CALLBACKS[name](optimizer)
    before = snapshot(optimizer)
    with pytest.raises(Enough, match=r"^enough$"):
        optimizer.step()
    assert_unchanged(optimizer, before)
    assert torch.is_grad_enabled()


def test_an_exception_in_the_closure_or_after_the_step(path: Path) -> None:
    optimizer, other = made(path), made(path)
    before = snapshot(optimizer)
    with pytest.raises(Enough):
        optimizer.step(fail)
    assert_unchanged(optimizer, before)
    optimizer.register_step_post_hook(fail)
    other.step()
    with pytest.raises(Enough, match=r"^enough$"):
        optimizer.step()
    assert is_like(optimizer, other)  # the hook comes after the step


# ---- No memory --------------------------------------------------------------------------------------------------------

NO_MEMORY = """
import resource
import sys
import torch
from torch_adadelta import AdadeltaKeras

def limit(megabytes):
    pages = int(open("/proc/self/statm").read().split()[0])
    most = pages * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))

options = eval(sys.argv[1])
torch.set_num_threads(1)
small, large = (torch.nn.Parameter(torch.zeros(n)) for n in (10, 2**25))
optimizer = AdadeltaKeras([small, large], 1.0, **options)
small.grad, large.grad = torch.ones(10), torch.zeros(2**25)  # zeros take no memory before they are written to
limit(200)
try:
    optimizer.step()
except (MemoryError, RuntimeError) as error:
    print(f"{type(error).__name__}: {error}")
print(len(optimizer.state), optimizer.iterations, small.sum().item())
large.grad = None
optimizer.step()
print(len(optimizer.state), optimizer.iterations, small.sum().item() < 0)
"""


def test_no_memory_for_the_state_changes_nothing(path: Path) -> None:
    if path.capability not in (None, "default"):
        pytest.skip("state is made before an instruction set matters")
    command = [sys.executable, "-c", NO_MEMORY, repr(path.options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    refused, unchanged, after = done.stdout.strip().split("\n")
    assert "allocate memory" in refused or "MemoryError" in refused
    assert PARTIAL not in refused
    assert unchanged == "0 0 0.0"
    assert after == "1 1 True"


NO_MEMORY_AMID = (
    NO_MEMORY.partition("options =")[0]
    + """
options, numels, steps_before, megabytes = map(eval, sys.argv[1:])
torch.set_num_threads(1)
params = [torch.nn.Parameter(torch.zeros(numel)) for numel in numels]
optimizer = AdadeltaKeras(params, 1.0, **options)
for param in params:
    param.grad = torch.ones_like(param)
for _ in range(steps_before):
    optimizer.step()

def written():
    return [[x.ravel()[0].item() for x in (p, *optimizer.state.get(p, {}).values())] for p in params]

before = written()
limit(megabytes)
try:
    optimizer.step()
except (MemoryError, RuntimeError) as error:
    print(f"{type(error).__name__}: {error}")
print(optimizer.iterations == steps_before, [x != y for x, y in zip(written(), before)])
"""
)


@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize(
    ("name", "numels", "megabytes", "changed"),
    [
        # The for-loop computes all of a parameter before it writes to it, and goes on to the next.
        ("single_tensor", [10, 2**24], 40, [True, False]),
        ("single_tensor", [2**24, 10], 40, [False, False]),
        # foreach updates all averages before anything else; one temporary fits, and a root takes more.
        ("multi_tensor", [10, 2**24], 40, [False, False]),
        ("multi_tensor", [10, 2**24], 100, [True, True]),
    ],
)
def test_no_memory_amid_the_updates(
    path: Path, name: str, numels: list[int], megabytes: int, changed: list[bool], steps_before: int
) -> None:
    """An update in Python needs more than parameters and state have. Either the step says that it is partial, or it has
    done nothing; the fused update needs nothing.
    """
    if path.name != name:
        pytest.skip("of another path")
    if steps_before == 0:
        megabytes += 2 * 64  # for the state
        is_partial = any(changed)
        changed = [is_partial] * 2  # there is state, where there was none
    arguments = [path.options, numels, steps_before, megabytes]
    done = subprocess.run(
        [sys.executable, "-c", NO_MEMORY_AMID, *map(repr, arguments)], capture_output=True, text=True, check=True
    )
    refused, after = done.stdout.strip().split("\n")
    assert "allocate memory" in refused or "MemoryError" in refused
    assert (PARTIAL in refused) == any(changed)
    assert after == f"True {changed}"


# ---- Killed while it writes a checkpoint ------------------------------------------------------------------------------

STEPS = 60


class Killing:
    """A file that kills its process, as kill -9 does, once so many bytes were written; none, if negative."""

    def __init__(self, path: FilePath, bytes_left: int) -> None:
        self.file = path.open("wb", buffering=0)
        self.bytes_left = bytes_left

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if 0 <= self.bytes_left < len(view):
            self.file.write(view[: self.bytes_left])
            os.kill(os.getpid(), signal.SIGKILL)
        self.bytes_left -= len(view) if self.bytes_left >= 0 else 0
        return self.file.write(view)

    def flush(self) -> None:
        os.fsync(self.file.fileno())


def train(folder: str, kill_at_step: int, kill_at_byte: int) -> None:
    """A loop as in the examples, which begins where its last checkpoint ends. A new one replaces it once it is whole."""
    torch.set_num_threads(1)
    checkpoint = FilePath(folder) / "checkpoint.pt"
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimizer = AdadeltaKeras(model.parameters(), schedules.ExponentialDecay(1.0, 20, 0.9), clipnorm=1.0, decay=0.01)
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
        first = saved["step"]
    for step in range(first, STEPS):
        optimizer.zero_grad()
        inputs = torch.randn(16, 5)
        (model(inputs) - inputs.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        saved = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "step": step + 1,
        }
        new = checkpoint.with_suffix(".new")
        file = Killing(new, kill_at_byte if step == kill_at_step else -1)
        torch.save(saved, file)
        file.flush()
        file.file.close()
        new.replace(checkpoint)


def test_killed_twenty_times_while_it_writes_a_checkpoint(tmp_path: FilePath) -> None:
    """It ends with the same bits as if nobody had killed it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch_adadelta"])

    def run(folder: FilePath, step: int = -1, byte: int = -1) -> int | None:
        folder.mkdir(exist_ok=True)
        process = context.Process(target=train, args=(str(folder), step, byte))
        process.start()
        process.join()
        return process.exitcode

    assert run(tmp_path / "whole") == 0
    size = (tmp_path / "whole" / "checkpoint.pt").stat().st_size
    kills = torch.Generator().manual_seed(0)
    for number in range(20):
        byte = int(torch.randint(size - 100, (), generator=kills)) if number else 0
        assert run(tmp_path / "killed", step=3 * number, byte=byte) == -signal.SIGKILL
        assert (tmp_path / "killed" / "checkpoint.new").stat().st_size == byte
    assert run(tmp_path / "killed") == 0
    whole, killed = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "killed"))
    assert whole["step"] == killed["step"] == STEPS
    assert killed["optimizer"]["param_groups"] == whole["optimizer"]["param_groups"]
    for name, weight in whole["model"].items():
        assert_same_bits(killed["model"][name], weight, name)
    for index, state in whole["optimizer"]["state"].items():
        for key, tensor in state.items():
            assert_same_bits(killed["optimizer"]["state"][index][key], tensor, key)
