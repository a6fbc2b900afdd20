"""Keras' own Adadelta with the fused update, for Keras 3 on its PyTorch backend.

It is `keras.optimizers.Adadelta` in everything but speed: options, state, files and configuration are those of Keras.
It overrides only methods that backends of Keras may override. Each method keeps its meaning, so that a subclass may
override it. Each falls back to that of Keras where a graph is traced or a scope redirects variables.

Importing this module imports Keras.
"""

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from torch_adadelta.backends import functional, kernels
from torch_adadelta.backends.batch import Backend, Batch, Segment
from torch_adadelta.backends.opmath import Value

try:
    import keras
except ImportError as error:
    if error.name == "keras":
        raise ImportError("torch_adadelta.keras3 needs Keras 3: pip install keras", name="keras") from error
    raise ImportError(
        f"torch_adadelta.keras3 cannot import Keras ({error}). It is for Keras' torch backend: set KERAS_BACKEND=torch "
        "before keras is imported",
        name=error.name,
    ) from error

if int(keras.__version__.partition(".")[0]) < 3:
    raise ImportError(f"torch_adadelta.keras3 needs Keras 3, this is Keras {keras.__version__}: pip install 'keras>=3'")

__all__ = ["Adadelta"]

# What keras.optimizers.Adadelta(...) is an instance of: with the torch backend, a multi-tensor version of it.
_KerasAdadelta: Any = type(keras.optimizers.Adadelta.__new__(keras.optimizers.Adadelta))

_PLAIN_TYPES: Final = frozenset((torch.Tensor, torch.nn.Parameter))


@keras.saving.register_keras_serializable(package="torch_adadelta")
class Adadelta(_KerasAdadelta):
    """`keras.optimizers.Adadelta` whose update is one fused pass over memory, for Keras' torch backend.

    For the gradient g, as in Keras 3:

        accumulated_grad      = rho * accumulated_grad + (1 - rho) * g²
        d                     = sqrt(accumulated_delta_var + epsilon) / sqrt(accumulated_grad + epsilon) * g
        accumulated_delta_var = rho * accumulated_delta_var + (1 - rho) * d²
        variable              = variable - learning_rate * d

    Keras' `Adadelta` differs in the last bits, because it multiplies by g before it divides, and rounds `1 - rho` from
    a double. The state has the same order, so each class loads the other's files. An epsilon of 0 stays 0, and rho
    stays a double.

    Where the fused update cannot run (complex variables, a device without kernels, no compiled library), Keras' own
    update runs, and one warning gives the reason.

    Args:
        learning_rate (float, schedule or callable, optional): the factor of the step. (default: 0.001)
        rho (float, optional): the decay rate of both averages. (default: 0.95)
        epsilon (float, optional): added under both roots. (default: 1e-7)
        weight_decay (float, optional): variables decay by `weight_decay * learning_rate` of themselves. (default: None)
        clipnorm (float, optional): the largest norm of each gradient. (default: None)
        clipvalue (float, optional): the largest absolute value of an element of a gradient. (default: None)
        global_clipnorm (float, optional): the largest norm of all gradients together. (default: None)
        use_ema (bool, optional): keep moving averages of the variables. (default: False)
        ema_momentum (float, optional): the decay rate of these averages. (default: 0.99)
        ema_overwrite_frequency (int, optional): the number of iterations after which averages replace variables.
            (default: None)
        loss_scale_factor (float, optional): the loss is multiplied by it, and gradients are divided by it.
            (default: None)
        gradient_accumulation_steps (int, optional): the number of calls for one update. (default: None)
        name (str, optional): the name of the optimizer. (default: "adadelta")

    Raises:
        RuntimeError: the backend of Keras is not torch.

    Example:
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        >>> model.compile(optimizer=Adadelta(1.0), loss="mse")
        >>> history = model.fit(np.ones((8, 3)), np.ones((8, 1)), verbose=0)
    """

    @functools.wraps(_KerasAdadelta.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        backend = keras.backend.backend()
        if backend != "torch":
            raise RuntimeError(
                f"torch_adadelta.keras3.Adadelta is for Keras' torch backend, and the backend is {backend}: set "
                "KERAS_BACKEND=torch before keras is imported, or take keras.optimizers.Adadelta, which loads its "
                "state. To load a model without its optimizer: keras.saving.load_model(path, compile=False)"
            )
        super().__init__(*args, **kwargs)
        self._has_warned = False

    # ---- The update --------------------------------------------------------------------------------------------------

    def _backend_apply_gradients(self, grads: Any, trainable_variables: Any) -> None:
        # Keras 3 decays the averages of all rows, and fails with sparse gradients on this backend.
        grads = [grad.to_dense() if isinstance(grad, Tensor) and grad.is_sparse else grad for grad in grads]
        super()._backend_apply_gradients(grads, trainable_variables)

    @torch.no_grad()
    def _backend_update_step(self, grads: Sequence[Tensor], trainable_variables: Any, learning_rate: Any) -> None:
        grads, variables = list(grads), list(trainable_variables)
        why = self._update(grads, variables, learning_rate)
        if why is not None:
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    f"torch_adadelta.keras3.Adadelta runs Keras' own update, which is slower: {why}",
                    RuntimeWarning,
                    stacklevel=2,
                )
            super()._backend_update_step(grads, variables, learning_rate)

    def _update(self, grads: list[Tensor], variables: list[Any], learning_rate: Any) -> str | None:
        """The fused update; or why it cannot run, when nothing is written."""
        params = _tensors(variables)
        if not _PLAIN_TYPES.issuperset(map(type, (*params, *grads))):
            return "variables and gradients are not plain tensors"
        if any(dtype.is_complex for dtype in {param.dtype for param in params}):
            return "Keras takes the complex square of a gradient"
        if not _has_kernel_for(params[0]):
            return kernels.why_no_kernel(params[0].device.type)
        indices = [self._get_variable_index(variable) for variable in variables]
        if len(set(indices)) < len(indices):
            return "a variable is given twice"
        square_avgs = _tensors([self._accumulated_grads[index] for index in indices])
        acc_deltas = _tensors([self._accumulated_delta_vars[index] for index in indices])
        lr, rho, epsilon = (_value_of(x, params[0].device) for x in (learning_rate, self.rho, self.epsilon))
        segment = Segment(len(params), lr, rho, epsilon)
        if torch.compiler.is_compiling():
            arguments = kernels.hyperparameter_arguments([segment])
            kernels.adadelta_(params, grads, square_avgs, acc_deltas, [], [], *arguments)
            return None
        batch = Batch(Backend.FUSED, False, False, params, grads, square_avgs, acc_deltas, [segment])
        refusal = kernels.update(batch)
        if refusal is None:
            return None
        of = "" if refusal.param is None else f"{variables[refusal.param].path}: "
        return f"{of}{refusal.message}"

    # ---- Before the update -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _apply_weight_decay(self, variables: Any) -> None:
        if self.weight_decay is None:
            return
        params = _tensors([variable for variable in variables if self._use_weight_decay(variable)])
        if params:  # Keras fails where all are excluded
            lr = self._get_current_learning_rate()
            lr = lr.value if isinstance(lr, keras.Variable) else lr
            torch._foreach_mul_(params, 1 - self.weight_decay * lr)

    @torch.no_grad()
    def _clip_gradients(self, grads: Any) -> Any:
        grads = list(grads)
        if not _are_clipped_here(grads):
            return super()._clip_gradients(grads)
        # Of these options Keras takes the first that is set.
        clipnorm, global_clipnorm, clipvalue = self.clipnorm, self.global_clipnorm, self.clipvalue
        if (clipnorm and clipnorm > 0) or (global_clipnorm and global_clipnorm > 0):
            sums = kernels.square_sums(grads, grads)
            if not isinstance(sums, Tensor):  # they are on several devices
                return super()._clip_gradients(grads)
            if clipnorm and clipnorm > 0:
                return torch._foreach_mul(grads, _clip_factors(sums.float(), clipnorm))
            return torch._foreach_mul(grads, functional.global_factor(global_clipnorm, sums, torch.float32))
        if clipvalue and clipvalue > 0:
            clipped = torch._foreach_clamp_min(grads, -clipvalue)
            torch._foreach_clamp_max_(clipped, clipvalue)
            return clipped
        return grads

    @torch.no_grad()
    def _backend_increment_gradient_accumulators(self, grads: Any, acc_grads: Any) -> None:
        torch._foreach_add_(_tensors(acc_grads), list(grads))

    @torch.no_grad()
    def _backend_reset_gradient_accumulators(self) -> None:
        torch._foreach_zero_(_tensors([variable for variable in self._accumulated_gradients if variable is not None]))

    # ---- After the update --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _update_model_variables_moving_average(self, trainable_variables: Any) -> None:
        pairs = self._pairs_of_averages(trainable_variables)
        if pairs is None:
            super()._update_model_variables_moving_average(trainable_variables)
            return
        is_not_first = keras.ops.not_equal(self.iterations, 0)  # at first the average becomes the variable
        for dtype, device in {(average.dtype, average.device) for _, average in pairs}:
            of_kind = [pair for pair in pairs if pair[1].dtype is dtype and pair[1].device == device]
            params, averages = map(list, zip(*of_kind, strict=True))
            # With the roundings of Keras, which does this for each variable.
            factor = keras.ops.cast(is_not_first, keras.backend.standardize_dtype(dtype))
            momentum = keras.ops.multiply(factor, self.ema_momentum).to(device)
            rest = keras.ops.subtract(1, momentum).to(device)
            if momentum.is_cpu:
                torch._foreach_mul_(averages, float(momentum))
                torch._foreach_add_(averages, params, alpha=float(rest))
            else:  # without a look at the device
                torch._foreach_mul_(averages, momentum)
                torch._foreach_add_(averages, torch._foreach_mul(params, rest))

    @torch.no_grad()
    def _overwrite_model_variables_with_average_value(self, trainable_variables: Any) -> None:
        pairs = self._pairs_of_averages(trainable_variables)
        if pairs is None:
            super()._overwrite_model_variables_with_average_value(trainable_variables)
        else:
            for param, average in pairs:
                param.copy_(average)

    def _pairs_of_averages(self, trainable_variables: Any) -> list[tuple[Tensor, Tensor]] | None:
        """The tensors of variables and their averages; None if that is for Keras to do."""
        variables, averages = list(trainable_variables), self._model_variables_moving_average
        if len(variables) != len(averages) or torch.compiler.is_compiling():
            return None
        pairs = [pair for pair in zip(variables, averages, strict=True) if pair[1] is not None]
        if not pairs or any(_is_redirected(variable) for variable in pairs[0]):
            return None
        return [(variable._value, average._value) for variable, average in pairs]


def _is_redirected(variable: Any) -> bool:
    """Whether a scope of Keras, of a stateless or symbolic call or of autocasting, puts another value in its place."""
    return variable.value is not variable._value


def _tensors(variables: Sequence[Any]) -> list[Tensor]:
    """The values of variables. To look for scopes takes a microsecond each, so the first is asked for all."""
    if torch.compiler.is_compiling() or not variables or _is_redirected(variables[0]):
        return [variable.value for variable in variables]
    return [variable._value for variable in variables]


def _value_of(x: Any, device: torch.device) -> Value:
    """A hyperparameter as the op takes it."""
    x = x.value if isinstance(x, keras.Variable) else x
    return x.to(device) if isinstance(x, Tensor) else float(x)


def _has_kernel_for(tensor: Tensor) -> bool:
    """`kernels.has_kernel_for`, which torch.compile cannot trace."""
    return (tensor.is_cpu and kernels.is_loaded) or (tensor.is_cuda and kernels.is_cuda_loaded)


def _clip_factors(square_sums: Tensor, clipnorm: float) -> Any:
    """What clipnorm multiplies gradients by, as numbers or Tensors; nan for a nan norm."""
    if not square_sums.is_cpu:
        return (clipnorm / square_sums.sqrt().clamp(min=clipnorm)).unbind()
    norms = map(math.sqrt, square_sums.tolist())  # a root of a short vector may wake all threads up
    return [1.0 if norm <= clipnorm else clipnorm / norm for norm in norms]


def _are_clipped_here(grads: list[Any]) -> bool:
    """Whether gradients can be clipped all at once with Keras' numbers.

    Of others these are special: in float64, Keras rounds norms to float32, in 16 bits every operation.
    """
    if not grads or torch.compiler.is_compiling() or not _PLAIN_TYPES.issuperset(map(type, grads)):
        return False
    return _has_kernel_for(grads[0]) and {grad.dtype for grad in grads} == {torch.float32}
