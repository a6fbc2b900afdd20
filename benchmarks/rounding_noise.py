"""How far float32 Adadelta is from the truth: our implementations, TensorFlow's, PyTorch's, and NumPy, in one run.

Every element gets gradients from N(0, 1) times a scale of its own, from 1e-8 to 1e12, starting from p = 0: around any
other p the rounding of p itself hides everything else. The truth is the same recurrence in float64 with the float32
values of the coefficients. Reported are, after some numbers of steps, the maximum and the mean over all elements of

- square_avg and acc_delta: the distance from the truth in units in the last place (ulp);
- path: abs(p - truth) / sum abs(lr * d) in units of 2**-24, the error as a share of the distance travelled.

A maximum grows with the number of elements, and the largest of all is a matter of luck: see `Noise.block_max`.

    python benchmarks/rounding_noise.py
    python benchmarks/rounding_noise.py --elements 200 --steps 100
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from report import Table, facts_text
from timing import machine

from torch_adadelta import AdadeltaKeras
from torch_adadelta.backends import kernels

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from reference.oracle import Float64Recurrence, Oracle, ulp_error

Array = npt.NDArray[Any]

SCALES: Final = tuple(10.0**exponent for exponent in range(-8, 13))
HYPERPARAMETERS: Final = (1.0, 0.95, 1e-7)  # learning_rate, rho, epsilon
BLOCK: Final = 50
QUANTITIES: Final = ("square_avg", "acc_delta", "path")

TENSORFLOW: Final = "TensorFlow"
ORACLE: Final = "NumPy oracle"
TORCH: Final = "torch.optim.Adadelta"


class State(NamedTuple):
    """What an implementation holds after some steps."""

    p: Array
    square_avg: Array
    acc_delta: Array


class Noise(NamedTuple):
    """The distance from the truth over all elements, in ulp or 2**-24.

    `block_max` is the largest in a tensor of 50 elements, as an average over all such blocks. Which of two
    implementations has the single largest error (`max`) changes with the seed, though one of them be the better.
    """

    max: float
    mean: float
    block_max: float


class Result(NamedTuple):
    """One implementation, after each of the numbers of steps asked for."""

    name: str
    states: dict[int, State]
    noise: dict[tuple[str, int], Noise]  # by quantity and number of steps


# Takes a gradient, steps from p = 0, and gives what it then holds (no copy).
Stepper = Callable[[Array], State]


def _torch_stepper(make: Callable[[list[torch.Tensor]], torch.optim.Optimizer], elements: int) -> Stepper:
    param = torch.zeros(elements)
    optimizer = make([param])

    def step(grad: Array) -> State:
        param.grad = torch.from_numpy(grad)
        optimizer.step()
        state = optimizer.state[param]
        return State(param.numpy(), state["square_avg"].numpy(), state["acc_delta"].numpy())

    return step


def _oracle_stepper(elements: int) -> Stepper:
    oracle = Oracle(np.zeros(elements, np.float32), *HYPERPARAMETERS)

    def step(grad: Array) -> State:
        oracle.step(grad)
        return State(oracle.p, oracle.square_avg, oracle.acc_delta)

    return step


def _tensorflow_stepper(elements: int) -> Stepper:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf
    import tf_keras

    tf.config.set_visible_devices([], "GPU")
    variable = tf.Variable(np.zeros(elements, np.float32))
    optimizer = tf_keras.optimizers.legacy.Adadelta(*HYPERPARAMETERS)

    def step(grad: Array) -> State:
        optimizer.apply_gradients([(tf.constant(grad), variable)])
        slots = (optimizer.get_slot(variable, name) for name in ("accum_grad", "accum_var"))
        return State(variable.numpy(), *(slot.numpy() for slot in slots))

    return step


def our_paths() -> dict[str, dict[str, Any]]:
    """The implementations that this installation has, by name, each as the flags that choose it."""
    paths: dict[str, dict[str, Any]] = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}}
    return {**paths, "fused": {"fused": True}} if kernels.is_loaded else paths


def implementations() -> dict[str, Callable[[int], Stepper]]:
    """Every implementation that can run here, by name; each takes the number of elements."""
    found: dict[str, Callable[[int], Stepper]] = {}
    if importlib.util.find_spec("tf_keras"):
        found[TENSORFLOW] = _tensorflow_stepper
    found[ORACLE] = _oracle_stepper
    lr, rho, eps = HYPERPARAMETERS
    for name, flags in our_paths().items():
        found[name] = partial(_torch_stepper, partial(AdadeltaKeras, lr=lr, rho=rho, epsilon=eps, **flags))
    found[TORCH] = partial(_torch_stepper, partial(torch.optim.Adadelta, lr=lr, rho=rho, eps=eps))
    return found


def _gradients(scale: Array, steps: int, seed: int) -> Iterator[tuple[int, Array]]:
    rng = np.random.default_rng(seed)
    for t in range(1, steps + 1):
        yield t, (rng.standard_normal(scale.size) * scale).astype(np.float32)


def _noise(state: State, truth: State, path: Array) -> dict[str, Noise]:
    errors = {
        "square_avg": ulp_error(state.square_avg, truth.square_avg),
        "acc_delta": ulp_error(state.acc_delta, truth.acc_delta),
        "path": np.abs(state.p - truth.p) / path * 2.0**24,
    }
    noise = {}
    for quantity, error in errors.items():
        block_max = np.maximum.reduceat(error, np.arange(0, error.size, BLOCK))
        noise[quantity] = Noise(float(error.max()), float(error.mean()), float(block_max.mean()))
    return noise


def measure(elements: int = 500, at: Sequence[int] = (1, 10, 1000), seed: int = 0) -> list[Result]:
    """Runs all implementations on the same gradients, one after the other: their threads would disturb each other.

    Args:
        elements: how many elements for each of the `SCALES`.
        at: the numbers of steps after which to measure.
        seed: of the gradients. The same seed gives the same gradients everywhere.
    """
    scale = np.repeat(np.array(SCALES), elements)
    recurrence = Float64Recurrence(np.zeros(scale.size, np.float32), *HYPERPARAMETERS)
    truths: dict[int, tuple[State, Array]] = {}
    for t, grad in _gradients(scale, max(at), seed):
        recurrence.step(grad)
        if t in at:
            state = State(*map(np.copy, (recurrence.p, recurrence.square_avg, recurrence.acc_delta)))
            truths[t] = state, np.copy(recurrence.path)

    results = []
    for name, make in implementations().items():
        step = make(scale.size)
        result = Result(name, {}, {})
        for t, grad in _gradients(scale, max(at), seed):
            state = step(grad)
            if t in at:
                result.states[t] = State(*map(np.copy, state))
                noise = _noise(state, *truths[t])
                result.noise.update({(quantity, t): noise[quantity] for quantity in QUANTITIES})
        results.append(result)
    return results


def columns(at: Sequence[int]) -> list[tuple[str, int]]:
    """What the table shows: the first, an early and the last number of steps, less what says nothing new."""
    first, *between = at
    late = between[-1:]
    return [
        *(("square_avg", t) for t in (first, *late)),
        *(("acc_delta", t) for t in at),
        *(("path", t) for t in between),
    ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="How far float32 Adadelta is from the truth.")
    parser.add_argument("--elements", type=int, default=500, help="for each gradient scale (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="at least 1 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the gradients (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.elements < 1 or arguments.steps < 1:
        parser.error("--elements and --steps must be at least 1")

    at = sorted({1, min(10, arguments.steps), arguments.steps})
    results = measure(arguments.elements, at, arguments.seed)
    units = {"square_avg": "ulp", "acc_delta": "ulp", "path": "2^-24"}
    header = ["implementation", *(f"{quantity}, t={t}, {units[quantity]}" for quantity, t in columns(at))]
    rows = []
    for result in results:
        noise = [result.noise[column] for column in columns(at)]
        rows.append([result.name, *(f"{n.max:.2f} / {n.mean:.2f}" for n in noise)])
    scales = f"gradient scales {SCALES[0]:.0e} to {SCALES[-1]:.0e}, {arguments.elements} elements each, p0 = 0"
    values = f"learning_rate, rho, epsilon = {HYPERPARAMETERS}; seed {arguments.seed}"
    title = f"Rounding noise in float32, max / mean of {arguments.elements * len(SCALES)} elements"
    print(Table(title, header, rows, (scales, values, facts_text(machine()))).section())


if __name__ == "__main__":
    main()
