"""What others do about 16 bits, restated in NumPy for Adadelta, from their papers and sources.

They differ in what they keep between two steps. The update is that of the oracle, in float32, for all of them; where
nothing else is said, square_avg and acc_delta are kept in bfloat16. Its values are float32 arrays, as in the oracle.
"""

import sys
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from reference.formats import round_to_bfloat16
from reference.oracle import Coefficients, Updated, update

Array = npt.NDArray[Any]


class Baseline:
    """A parameter and its state between two steps."""

    name: ClassVar[str]
    bytes_kept: ClassVar[float]  # of weights and state, an element
    bytes_moved: ClassVar[float]  # by a step, a bfloat16 gradient included

    def __init__(self, p: Array) -> None:
        self.p = p  # bfloat16: what the forward pass sees
        self.square_avg, self.acc_delta = np.zeros_like(p), np.zeros_like(p)

    @property
    def master(self) -> Array:
        """The parameter as the training knows it, in float32."""
        return self.p

    def step(self, g: Array, by: Coefficients) -> None:
        """Moves on by one gradient."""
        new = update(self.master, g, self.square_avg, self.acc_delta, by)
        self.keep_param(new, by)
        self.square_avg, self.acc_delta = self.kept_state(new.square_avg), self.kept_state(new.acc_delta)

    def keep_param(self, new: Updated, by: Coefficients) -> None:
        """Keeps a parameter."""
        raise NotImplementedError

    def kept_state(self, x: Array) -> Array:
        """What is left of square_avg or acc_delta at the next step."""
        return round_to_bfloat16(x)


class StochasticRounding(Baseline):
    """torchao, `bf16_stochastic_round=True` (torchao/optim/quant_utils.py, `_fp32_to_bf16_sr`).

    A parameter is rounded away from zero with the probability that its lower 16 bits are of 2**16, else towards zero.
    """

    name = "stochastic rounding (torchao)"
    bytes_kept = 2 + 2 * 2
    bytes_moved = 2 + 2 * bytes_kept

    def __init__(self, p: Array, seed: int = 0) -> None:
        super().__init__(p)
        self.rng = np.random.default_rng(seed)

    def keep_param(self, new: Updated, by: Coefficients) -> None:
        bits = new.p.view(np.uint32)
        noise = self.rng.integers(0, 1 << 16, bits.shape, np.uint32)
        self.p = ((bits + noise) & np.uint32(0xFFFF0000)).view(np.float32)


class Kahan(Baseline):
    """Zamirai et al., Revisiting BFloat16 Training (arXiv 2010.06192), in the form of optimi's documentation.

    With the compensation c in bfloat16, every operation rounded to it: u = c - lr * d;  p' = p + u;  c = u + (p - p').
    """

    name = "Kahan summation (optimi)"
    bytes_kept = 2 + 2 + 2 * 2
    bytes_moved = 2 + 2 * bytes_kept

    def __init__(self, p: Array) -> None:
        super().__init__(p)
        self.compensation = np.zeros_like(p)

    @property
    def master(self) -> Array:
        return self.p + self.compensation

    def keep_param(self, new: Updated, by: Coefficients) -> None:
        u = round_to_bfloat16(self.compensation - by.lr * new.d)
        p = round_to_bfloat16(self.p + u)
        self.compensation = round_to_bfloat16(u + round_to_bfloat16(self.p - p))
        self.p = p


class Float32Copy(Baseline):
    """Micikevicius et al., Mixed Precision Training (arXiv 1710.03740): a float32 copy of the weights; float32 state.

    A step reads and writes the copy and the state, and writes the bfloat16 weights.
    """

    name = "float32 copy of the weights"
    bytes_kept = 2 + 4 + 2 * 4
    bytes_moved = 2 + 2 + 2 * (4 + 2 * 4)

    def __init__(self, p: Array) -> None:
        super().__init__(p)
        self.copy = p

    @property
    def master(self) -> Array:
        return self.copy

    def keep_param(self, new: Updated, by: Coefficients) -> None:
        self.copy, self.p = new.p, round_to_bfloat16(new.p)

    def kept_state(self, x: Array) -> Array:
        return x


class FlashOptimMasters(Baseline):
    """Gonzalez Ortiz et al., FlashOptim (arXiv 2602.23349, Algorithm 1; databricks/flashoptim), with `quantize=False`.

    Masters of 24 bits: what the nearest bfloat16 lacks, in 127ths of half a unit in its last place, as int8.
    """

    name = "24-bit masters, float32 state (FlashOptim)"
    bytes_kept: ClassVar[float] = 2 + 1 + 2 * 4
    bytes_moved: ClassVar[float] = 2 + 2 * bytes_kept

    def __init__(self, p: Array) -> None:
        super().__init__(p)
        self.error = np.zeros(p.shape, np.int8)

    @property
    def half_ulp(self) -> Array:
        """Half a unit in the last place of the bfloat16 parameters."""
        exponent = np.maximum((self.p.view(np.uint32) >> np.uint32(23)).astype(np.int32) & 0xFF, 1)
        return np.ldexp(np.float32(1), exponent - (127 + 7 + 1))

    @property
    def master(self) -> Array:
        return self.p + self.error.astype(np.float32) / np.float32(127) * self.half_ulp

    def keep_param(self, new: Updated, by: Coefficients) -> None:
        self.p = round_to_bfloat16(new.p)
        share = np.clip((new.p - self.p) / self.half_ulp, -1, 1) * np.float32(127)
        self.error = np.copysign(np.floor(np.abs(share) + np.float32(0.5)), share).astype(np.int8)

    def kept_state(self, x: Array) -> Array:
        return x


class FlashOptim(FlashOptimMasters):
    """The same at its defaults: state of 8 bits, too (Algorithm 3).

    Both accumulators are second moments, as its variance is: it keeps their roots in 255ths of the largest root in each
    group of 32, as uint8, and that largest root in float16.
    """

    name = "24-bit masters, 8-bit state (FlashOptim)"
    bytes_kept = 2 + 1 + 2 * (1 + 2 / 32)
    bytes_moved = 2 + 2 * bytes_kept

    GROUP: Final = 32

    def kept_state(self, x: Array) -> Array:
        root = np.sqrt(np.pad(x, (0, -x.size % self.GROUP)).reshape(-1, self.GROUP))
        largest = np.maximum(root.max(axis=1, keepdims=True), np.float32(1e-12))
        level = np.floor(root / largest * np.float32(255) + np.float32(0.5))
        kept = level / np.float32(255) * largest.astype(np.float16).astype(np.float32)
        return (kept * kept).reshape(-1)[: x.size]


BASELINES: Final[tuple[type[Baseline], ...]] = (StochasticRounding, Kahan, Float32Copy, FlashOptimMasters, FlashOptim)
