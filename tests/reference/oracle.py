"""The update of `AdadeltaKeras` in NumPy: the slow, plain statement of what every fast path must compute, to the bit.

NumPy rounds after every operation, never fuses two, and its `sqrt` and `/` are those of IEEE 754. Nothing here knows
torch, so no bug can be shared with it.

Arrays are held in the opmath dtype T of their dtype, with values of that dtype: what NumPy has no type for
(bfloat16, complex32) is a float32 or complex64 array whose values are rounded already, and so is float16. Widening a
16-bit tensor to float32 is exact, so comparing after it still compares bits.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from reference.formats import FORMATS, Array, join_master, split_master

DEFAULT_EPSILON: Final = 1e-7


def as_real(x: Array) -> Array:
    """A complex array as pairs of reals along a new last axis."""
    return np.stack((x.real, x.imag), axis=-1)


def as_complex(x: Array) -> Array:
    """The inverse of `as_real`. Not `re + 1j * im`, which makes nan of an infinity."""
    result = np.empty(x.shape[:-1], np.result_type(x.dtype, np.complex64))
    result.real, result.imag = x[..., 0], x[..., 1]
    return result


class Coefficients(NamedTuple):
    """The hyperparameters of one step, as NumPy scalars of one type."""

    lr: Any
    rho: Any
    one_minus_rho: Any
    eps: Any


def coefficients(learning_rate: Any, rho: Any, epsilon: Any, T: Any) -> Coefficients:
    """The hyperparameters in T, as Keras gets them there.

    A Python number for `learning_rate` or `rho` is rounded to float32 on the way, a NumPy scalar is not, and neither is
    `epsilon`, of which None and 0 mean 1e-7. `1 - rho` is taken in T: float32 gives 0.050000012, not 0.05.
    """
    lr, rho = (T(value) if isinstance(value, np.generic) else T(np.float32(value)) for value in (learning_rate, rho))
    return Coefficients(lr, rho, T(1) - rho, T(epsilon or DEFAULT_EPSILON))


class Updated(NamedTuple):
    """What one update gives, in T; `d` is the step before it is multiplied by lr."""

    p: Array
    square_avg: Array
    acc_delta: Array
    d: Array


def rsqrt(x: Array) -> Array:
    """1 / sqrt(x), the root rounded, then the quotient."""
    quotient: Array = x.dtype.type(1) / np.sqrt(x)
    return quotient


def update(
    p: Array,
    g: Array,
    square_avg: Array,
    acc_delta: Array,
    by: Coefficients,
    rsqrt: Callable[[Array], Array] = rsqrt,
) -> Updated:
    """One update, in which every operation is rounded on its own to the one type T of everything given.

    `rsqrt` is the one operation that TensorFlow's float32 kernels do otherwise; with theirs, this gives their bits.
    """
    assert all(x.dtype == p.dtype for x in (g, square_avg, acc_delta, *by)), "NumPy would compute in the wider type"
    lr, rho, one_minus_rho, eps = by
    a, u = square_avg, acc_delta
    with np.errstate(all="ignore"):
        a = a * rho + (g * g) * one_minus_rho
        d = np.sqrt(u + eps) * rsqrt(a + eps) * g
        u = u * rho + (d * d) * one_minus_rho
        p = p - d * lr
    return Updated(p, a, u, d)


# ---- Clipping -------------------------------------------------------------------------------------------------------

# The tree in which squares are summed: chunks of 32 rows of 128 lanes.
LANES: Final = 128
CHUNK: Final = 32 * LANES


def pairwise_sum(x: Array) -> Any:
    """The float64 sum of a vector: neighbours are added, then neighbours of those, until one is left; 0 if empty."""
    x = np.asarray(x, np.float64)
    while len(x) > 1:
        x = np.append(x, 0.0) if len(x) % 2 else x
        with np.errstate(all="ignore"):
            x = x[0::2] + x[1::2]
    return x[0] if len(x) else np.float64(0)


def square_sum(g: Array) -> Any:
    """The float64 sum of abs(g)**2, whose terms are rounded to T, over the fixed tree.

    In a chunk, lane j adds its elements j, j + 128, j + 256, ... one after the other; the second half of the lanes is
    added to the first until one is left; the chunks are added pairwise.

    Args:
        g: a real or complex array in T, its dimensions in the order in which the parameter's memory has them.
    """
    g = np.asarray(g).reshape(-1)
    sums = []
    with np.errstate(all="ignore"):
        squares = (g.real * g.real + g.imag * g.imag) if np.iscomplexobj(g) else g * g
        for begin in range(0, len(squares), CHUNK):
            chunk = squares[begin : begin + CHUNK].astype(np.float64)
            lanes = np.zeros(LANES)
            for row in range(0, len(chunk), LANES):
                part = chunk[row : row + LANES]
                lanes[: len(part)] += part
            while len(lanes) > 1:
                half = len(lanes) // 2
                lanes = lanes[:half] + lanes[half:]
            sums.append(lanes[0])
    return pairwise_sum(np.array(sums))


def global_square_sum(gs: Sequence[Array]) -> Any:
    """The float64 sum of the sums of squares of several gradients."""
    return pairwise_sum(np.array([square_sum(g) for g in gs]))


def clip_by_value(g: Array, c: Any) -> Array:
    """max(min(g, c), -c), where nan stays nan."""
    c = g.dtype.type(c)
    return np.where(g > c, c, np.where(g < -c, -c, g))


def scaled(g: Array, factor: Any, divisor: Any = None) -> Array:
    """(g * factor) / divisor of the reals in g."""
    with np.errstate(all="ignore"):
        reals = (as_real(g) if np.iscomplexobj(g) else g) * factor
        reals = reals if divisor is None else reals / divisor
    return as_complex(reals) if np.iscomplexobj(g) else reals


def clip_by_norm(g: Array, c: Any, squares: Any) -> Array:
    """(g * c) / max(norm, c), where `squares` is the float64 sum of the squares of g."""
    T = g.real.dtype.type
    with np.errstate(all="ignore"):
        norm = np.sqrt(T(squares))
    return scaled(g, T(c), np.maximum(norm, T(c)))


def memory_order(x: Array) -> list[int]:
    """The dimensions of an array, outermost in memory first."""
    return sorted(range(x.ndim), key=lambda d: (x.shape[d] != 1, -x.strides[d]))


def global_factor(c: Any, squares: Any, T: Any) -> Any:
    """The factor c * min(1/n, 1/c) + (n - n) in T, where `squares` is the float64 sum of the squares of all gradients."""
    with np.errstate(all="ignore"):
        n, c = np.sqrt(T(squares)), T(c)
        return c * np.minimum(T(1) / n, T(1) / c) + (n - n)


# ---- Sparse gradients -----------------------------------------------------------------------------------------------


class SparseGradient(NamedTuple):
    """A gradient of which only some rows are given, each as often as it occurs.

    Column k of `indices`, [sparse dimensions, entries], is an index into the first dimensions of the parameter;
    `values[k]` belongs to what it selects.
    """

    indices: Array
    values: Array


def sum_duplicates(gradient: SparseGradient) -> dict[tuple[int, ...], Array]:
    """The gradient of each row that occurs: its COO entries added to 0, in their order."""
    sums: dict[tuple[int, ...], Array] = {}
    for index, value in zip(gradient.indices.T.tolist(), gradient.values, strict=True):
        row = tuple(index)
        with np.errstate(all="ignore"):
            sums[row] = sums.get(row, np.zeros_like(value)) + value
    return sums


class Oracle:
    """One parameter and its state, stepped with the gradients of your choice.

    Args:
        p: the initial parameter, real or complex; rounded to `dtype`, never written to.
        learning_rate, rho: a Python number, rounded to float32 before it is cast to T; or a NumPy scalar, cast to T.
        epsilon: a Python number or NumPy scalar, cast to T; None and 0 mean 1e-7.
        dtype: the parameter's dtype, a name in `formats.DTYPES`; None for that of `p`.
        maximize: negate the gradients.
        weight_decay: a Python number or NumPy scalar, cast to T; 0 for none.
        decoupled_weight_decay: whether it is taken off the parameter, or else added to the gradient.
        master_weights: whether a bfloat16 parameter has a `remainder`, and the update runs on what they make together.
        state_dtype: the dtype of square_avg and acc_delta, a name in `formats.DTYPES`; None for that of the parameter.

    `p`, `square_avg` and `acc_delta` are arrays in T (see the top of this file), or in complex T. They, `remainder`, the
    hyperparameters and `rsqrt` (that of `update`) may be assigned to between steps.
    """

    def __init__(
        self,
        p: Array,
        learning_rate: Any = 0.001,
        rho: Any = 0.95,
        epsilon: Any = DEFAULT_EPSILON,
        *,
        dtype: str | None = None,
        maximize: bool = False,
        weight_decay: Any = 0.0,
        decoupled_weight_decay: bool = True,
        master_weights: bool = False,
        state_dtype: str | None = None,
    ) -> None:
        p = np.asarray(p)
        dtype = dtype or p.dtype.name
        self.format = FORMATS[dtype]
        self.store_state = FORMATS[state_dtype or dtype].store
        self.remainder = np.zeros(p.shape, np.int16) if master_weights and dtype == "bfloat16" else None
        self.learning_rate, self.rho, self.epsilon, self.maximize = learning_rate, rho, epsilon, maximize
        self.weight_decay, self.decoupled_weight_decay = weight_decay, decoupled_weight_decay
        self.rsqrt = rsqrt
        self.p = self._kept(self.format.store(self._in_T(p)))
        self.square_avg = np.zeros_like(self.p)
        self.acc_delta = np.zeros_like(self.p)

    def step(self, grad: Array | SparseGradient | None) -> None:
        """Updates parameter and state in place of the old ones. None, no gradient, changes nothing.

        Args:
            grad: an array of the parameter's shape and any floating (or complex) dtype; or a `SparseGradient` of it,
                which leaves the rows that do not occur as they are, but for weight decay: that is a pass of its own over
                all rows.
        """
        if grad is None:
            return
        by = coefficients(self.learning_rate, self.rho, self.epsilon, self.format.T)
        if isinstance(grad, SparseGradient):
            assert self.decoupled_weight_decay or not self.weight_decay, "no gradient of rows that do not occur"
            values = self._signed(self._in_T(grad.values))
            self.set_param(self._kept(self._decayed(self._in_T(self.master), by)))
            p, a, u = self.master.copy(), self.square_avg.copy(), self.acc_delta.copy()
            for row, g in sum_duplicates(SparseGradient(grad.indices, values)).items():
                p[row], a[row], u[row] = self._updated(g, p[row], a[row], u[row], by)
        else:
            g = self._signed(self._in_T(grad))
            if self.weight_decay and not self.decoupled_weight_decay:
                with np.errstate(all="ignore"):
                    g = g + self._in_T(self.master) * self.format.T(self.weight_decay)
            p, a, u = self._updated(g, self.master, self.square_avg, self.acc_delta, by, decays=True)
        self.set_param(p)
        self.square_avg, self.acc_delta = a, u

    @property
    def master(self) -> Array:
        """The parameter as the update sees it."""
        return self.p if self.remainder is None else join_master(self.p, self.remainder)

    def set_param(self, p: Array) -> None:
        """Stores a parameter, which is in T or in complex T."""
        if self.remainder is not None:
            self.p, self.remainder = split_master(p)
        else:
            self.p = self._kept(self.format.store(self._in_T(p)))

    def _signed(self, g: Array) -> Array:
        return -g if self.maximize else g

    def _decayed(self, p: Array, by: Coefficients) -> Array:
        """A parameter in T less its decoupled weight decay."""
        if not self.weight_decay or not self.decoupled_weight_decay:
            return p
        with np.errstate(all="ignore"):
            decayed: Array = p - (p * self.format.T(self.weight_decay)) * by.lr
        return decayed

    def _updated(
        self, g: Array, p: Array, square_avg: Array, acc_delta: Array, by: Coefficients, decays: bool = False
    ) -> tuple[Array, Array, Array]:
        """The parameter, not rounded yet, and the state, which is."""
        wide = self._decayed(self._in_T(p), by) if decays else self._in_T(p)
        new = update(wide, g, self._in_T(square_avg), self._in_T(acc_delta), by, self.rsqrt)
        square_avg, acc_delta = (self._kept(self.store_state(x)) for x in new[1:3])
        return self._kept(new.p), square_avg, acc_delta

    def gradient(self, grad: Array | SparseGradient | None) -> Array:
        """A gradient as the pipeline sees it: in T, or in complex T; of a sparse one the values."""
        return self._kept(self._in_T(grad.values if isinstance(grad, SparseGradient) else grad))

    def _in_T(self, x: Array | None) -> Array:
        x = np.asarray(x)
        if self.format.is_complex:
            x = as_real(x)
        elif np.iscomplexobj(x):
            raise TypeError(f"a complex array of {x.dtype} for a real parameter")
        with np.errstate(over="ignore"):
            return np.asarray(x.astype(self.format.T))

    def _kept(self, x: Array) -> Array:
        return as_complex(x) if self.format.is_complex else np.asarray(x)


class OracleOptimizer:
    """Several parameters that are stepped together: decay, a schedule, clipping, and the order of all that.

    Args:
        params: the initial parameters; the order in which a square is summed is that of their memory.
        learning_rate: as for `Oracle`, or a function of the step, given in T, that returns it as a NumPy scalar.
        rho, epsilon, maximize: as for `Oracle`.
        decay, clipvalue, clipnorm, global_clipnorm: Python numbers, as Keras has them.
        dtypes: the dtype of each parameter, a name in `formats.DTYPES`; None for those of the arrays.
        norm_variables: for `clipnorm`, lists of rows (number of the parameter, first, end) that have one norm; the rows of
            such a parameter that are in none have one of their own.
        weight_decay, decoupled_weight_decay: as for `Oracle`.
        excluded: the numbers of the parameters without weight decay.
        master_weights, state_dtype: as for `Oracle`.
        use_ema, ema_momentum, ema_overwrite_frequency, gradient_accumulation_steps, loss_scale_factor: Python numbers, as
            Keras 3 has them.

    `iterations` counts calls; `averages` and `accumulators` are in T, or in complex T, and None as long as there are none.
    """

    def __init__(
        self,
        params: Sequence[Array],
        learning_rate: Any = 0.001,
        rho: Any = 0.95,
        epsilon: Any = DEFAULT_EPSILON,
        *,
        decay: Any = 0.0,
        clipvalue: float | None = None,
        clipnorm: float | None = None,
        global_clipnorm: float | None = None,
        dtypes: Sequence[str] | None = None,
        maximize: bool = False,
        norm_variables: Sequence[Sequence[tuple[int, int, int]]] = (),
        weight_decay: Any = 0.0,
        decoupled_weight_decay: bool = True,
        excluded: Sequence[int] = (),
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        gradient_accumulation_steps: int | None = None,
        loss_scale_factor: float | None = None,
        master_weights: bool = False,
        state_dtype: str | None = None,
    ) -> None:
        names: Sequence[str | None] = dtypes or [None] * len(params)
        self.oracles = [
            Oracle(
                p,
                0.0,
                rho,
                epsilon,
                dtype=name,
                maximize=maximize,
                weight_decay=0.0 if i in excluded else weight_decay,
                decoupled_weight_decay=decoupled_weight_decay,
                master_weights=master_weights,
                state_dtype=state_dtype,
            )
            for i, (p, name) in enumerate(zip(params, names, strict=True))
        ]
        self.use_ema, self.ema_momentum, self.ema_overwrite_frequency = use_ema, ema_momentum, ema_overwrite_frequency
        self.gradient_accumulation_steps = gradient_accumulation_steps or 1
        self.loss_scale_factor = loss_scale_factor
        self.averages: list[Array] | None = None
        self.accumulators: list[Array] | None = None
        self.params = params
        self.orders = [memory_order(p) for p in params]
        self.norm_variables = norm_variables
        self.learning_rate, self.decay = learning_rate, decay
        self.clipvalue, self.clipnorm, self.global_clipnorm = clipvalue, clipnorm, global_clipnorm
        self.iterations = 0
        # TensorFlow adds in another order; with its sums, all else can be compared bit by bit.
        self.square_sum = square_sum
        self.global_square_sum = global_square_sum

    def step(self, grads: Sequence[Array | SparseGradient | None]) -> None:
        """One call; gradients that are None are left out. Without any, nothing happens and nothing is counted."""
        rows = [i for i, grad in enumerate(grads) if grad is not None]
        if not rows:
            return
        n = self.gradient_accumulation_steps
        if self.use_ema and self.averages is None:
            self.averages = [oracle.master for oracle in self.oracles]
        grads = [None if grad is None else self.unscaled(i, grad) for i, grad in enumerate(grads)]
        if n > 1:
            grads = self.accumulated(grads)
        if (self.iterations + 1) % n == 0:
            self.update(grads)
        if self.use_ema:
            self.average(self.iterations // n)
        self.iterations += 1

    def update(self, grads: Sequence[Array | SparseGradient | None]) -> None:
        """Updates the parameters that have a gradient."""
        rows = [i for i, grad in enumerate(grads) if grad is not None]
        clipped = self.clip([(i, grads[i]) for i in rows])
        for i, g in zip(rows, clipped, strict=True):
            oracle = self.oracles[i]
            oracle.learning_rate = self.learning_rate_at(self.iterations, oracle.format.T)
            oracle.step(g)

    def unscaled(self, i: int, grad: Array | SparseGradient) -> Array | SparseGradient:
        """A gradient divided by the factor of the loss, in T."""
        if self.loss_scale_factor is None:
            return grad
        T = self.oracles[i].format.T
        g = scaled(self.oracles[i].gradient(grad), T(1), T(self.loss_scale_factor))
        return SparseGradient(grad.indices, g) if isinstance(grad, SparseGradient) else g

    def accumulated(self, grads: Sequence[Array | SparseGradient | None]) -> list[Array | SparseGradient | None]:
        """Adds gradients to their sums; returns the means, and sets the sums to 0, where it is time for an update."""
        if self.accumulators is None:
            self.accumulators = [np.zeros_like(oracle.p) for oracle in self.oracles]
        n = self.gradient_accumulation_steps
        means: list[Array | SparseGradient | None] = []
        for i, grad in enumerate(grads):
            oracle, mean = self.oracles[i], None
            if grad is not None:
                total = self.accumulators[i].copy()
                gradient = oracle.gradient(grad)
                with np.errstate(all="ignore"):
                    if isinstance(grad, SparseGradient):
                        for row, g in sum_duplicates(SparseGradient(grad.indices, gradient)).items():
                            total[row] = total[row] + g
                    else:
                        total = total + gradient
                self.accumulators[i] = total
                mean = scaled(total, oracle.format.T(1), oracle.format.T(n))
            means.append(mean)
            if (self.iterations + 1) % n == 0:
                self.accumulators[i] = np.zeros_like(oracle.p)
        return means

    def average(self, i: int) -> None:
        """Moves the averages on at update i, and overwrites the parameters with them where it is time for that."""
        assert self.averages is not None
        for number, oracle in enumerate(self.oracles):
            p = oracle.master
            T = p.real.dtype.type
            m = T(self.ema_momentum) if i else T(0)
            e = p.copy()
            if m:
                with np.errstate(all="ignore"):
                    e = scaled(self.averages[number], m) + scaled(p, T(1) - m)
            self.averages[number] = e
            if self.ema_overwrite_frequency and (i + 1) % self.ema_overwrite_frequency == 0:
                oracle.set_param(e)

    def learning_rate_at(self, t: int, T: Any) -> Any:
        """The learning rate of step t, in T."""
        rate = self.learning_rate
        if callable(rate):
            rate = rate(T(t))
        lr, decay = (T(x) if isinstance(x, np.generic) else T(np.float32(x)) for x in (rate, self.decay))
        return lr / (T(1) + decay * T(t)) if decay else lr

    def clip(
        self, gradients: Sequence[tuple[int, Array | SparseGradient | None]]
    ) -> list[Array | SparseGradient | None]:
        """The gradients of the parameters with these indices, in T, clipped; sparse ones by their values as given."""
        gs = [self.oracles[i].gradient(grad) for i, grad in gradients]
        if self.clipvalue is not None:
            gs = [clip_by_value(g, self.clipvalue) for g in gs]
        in_order = [
            g if isinstance(grad, SparseGradient) else g.transpose(self.orders[i])
            for g, (i, grad) in zip(gs, gradients, strict=True)
        ]
        if self.clipnorm is not None and self.norm_variables:
            gs = self.clip_by_variables({i: g for g, (i, _) in zip(gs, gradients, strict=True)})
        elif self.clipnorm is not None:
            gs = [clip_by_norm(g, self.clipnorm, self.square_sum(x)) for g, x in zip(gs, in_order, strict=True)]
        if self.global_clipnorm is not None:
            widest = np.result_type(*(g.real.dtype for g in gs)).type
            wide = [x.astype(np.result_type(x.dtype, widest)) for x in in_order]
            factor = global_factor(self.global_clipnorm, self.global_square_sum(wide), widest)
            gs = [scaled(g, g.real.dtype.type(factor)) for g in gs]
        return [
            SparseGradient(grad.indices, g) if isinstance(grad, SparseGradient) else g
            for g, (_, grad) in zip(gs, gradients, strict=True)
        ]

    def clip_by_variables(self, gs: dict[int, Array]) -> list[Array]:
        """Gradients by the numbers of their parameters, clipped by the norms of variables."""
        variables = [list(pieces) for pieces in self.norm_variables]
        for i in gs:
            covered = [range(first, end) for pieces in variables for j, first, end in pieces if j == i]
            rest = [row for row in range(len(gs[i]) if gs[i].ndim else 1) if not any(row in rows for rows in covered)]
            # Rows in a row are one piece.
            cuts = [k for k in range(1, len(rest)) if rest[k] != rest[k - 1] + 1]
            runs = [rest[a:b] for a, b in zip([0, *cuts], [*cuts, len(rest)], strict=True)] if rest else [[]]
            if rest or not covered:
                variables.append([(i, run[0], run[-1] + 1) if run else (i, 0, 0) for run in runs])
        clipped = {i: g.copy() for i, g in gs.items()}
        for pieces in variables:
            here = [(i, slice(first, end) if gs[i].ndim else ...) for i, first, end in sorted(pieces) if i in gs]
            squares = np.float64(0)
            for number, (i, rows) in enumerate(here):
                own = self.square_sum(gs[i][rows].transpose(memory_order(self.params[i][rows])))
                with np.errstate(all="ignore"):
                    squares = squares + own if number else own
            for i, rows in here:
                clipped[i][rows] = clip_by_norm(gs[i][rows], self.clipnorm, squares)
        return list(clipped.values())


class Float64Recurrence:
    """The same recurrence for float32 data, in float64: the truth that float32 implementations are measured against.

    Its coefficients are those of float32, `1 - rho` and `epsilon` included, so that what remains is the rounding of the
    operations. `path` is the sum of all abs(lr * d), the scale on which errors of `p` are measured.
    """

    def __init__(self, p: Array, learning_rate: Any = 0.001, rho: Any = 0.95, epsilon: Any = DEFAULT_EPSILON) -> None:
        self.by = Coefficients(*map(np.float64, coefficients(learning_rate, rho, epsilon, np.float32)))
        self.p = p.astype(np.float64)
        self.square_avg, self.acc_delta, self.path = (np.zeros_like(self.p) for _ in range(3))

    def step(self, grad: Array | SparseGradient) -> None:
        """Moves on by one gradient, which is widened to float64; a sparse one once it has been summed up."""
        if isinstance(grad, SparseGradient):
            for row, g in sum_duplicates(grad).items():
                self._move(row, g)
        else:
            self._move((), grad)

    def _move(self, row: tuple[int, ...], g: Array) -> None:
        arrays = (self.p, self.square_avg, self.acc_delta)
        new = update(arrays[0][row], g.astype(np.float64), arrays[1][row], arrays[2][row], self.by)
        for x, updated in zip(arrays, new[:3], strict=True):
            x[row] = updated
        self.path[row] += np.abs(new.d * self.by.lr)


def ulp_error(x: Array, truth: Array) -> Array:
    """The distance of float32 `x` from float64 `truth`, in units in the last place of the float32 nearest to it."""
    return np.abs(x.astype(np.float64) - truth) / np.spacing(np.abs(truth.astype(np.float32))).astype(np.float64)
