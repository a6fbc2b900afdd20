"""The methods of a Keras optimizer that `torch.optim` does not have, for custom training loops ported from Keras."""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from torch_adadelta import schedules
from torch_adadelta.backends.batch import has_state
from torch_adadelta.options import OPTIONS, without_neutral
from torch_adadelta.step import accumulation, averages
from torch_adadelta.step.planning import ExplicitGradients

# The names of the state in Keras.
SLOTS: Final = {"accum_grad": "square_avg", "accum_var": "acc_delta"}

# What newer generations of Keras add to the configuration, and has no meaning here.
_MEANINGLESS: Final = ("jit_compile", "is_legacy_optimizer")


class KerasInterface(Optimizer):
    """`apply_gradients`, `minimize`, configuration, weights and slots, as in ``tf.keras.optimizers.Optimizer``."""

    _explicit: ExplicitGradients | None = None

    name: Any
    iterations: Any
    learning_rate: Any
    decay: Any
    rho: Any
    epsilon: Any
    clipvalue: Any
    clipnorm: Any
    global_clipnorm: Any

    def _name_of(self, param: Tensor) -> str:
        raise NotImplementedError

    def set_calls(self, value: int) -> None:
        raise NotImplementedError

    def _check_nothing_pending(self, what: str) -> None:
        raise NotImplementedError

    def check_not_swapped(self, what: str) -> None:
        """Raises RuntimeError inside `swap_averages`."""
        raise NotImplementedError

    def initial_state(self, param: Tensor, key: str) -> Tensor:
        """Returns the value with which a step begins if the parameter has no state under this key yet."""
        raise NotImplementedError

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    # ---- Gradients ----------------------------------------------------------------------------------------------

    def apply_gradients(
        self,
        grads_and_vars: Iterable[tuple[Tensor | None, Tensor]],
        name: str | None = None,
        experimental_aggregate_gradients: bool = True,
    ) -> None:
        """Takes a step with the given gradients instead of those in `.grad`. Hooks run as for `step()`.

        Args:
            grads_and_vars (iterable): (gradient, parameter) tuples, as from ``zip(grads, params)``. A gradient of None
                is skipped with a warning. An empty list does nothing and counts no step.
            name (str, optional): ignored. It exists for code written for Keras. (default: None)
            experimental_aggregate_gradients (bool, optional): whether to call the `gradient_aggregator`.
                (default: True)

        Raises:
            TypeError: if `grads_and_vars` does not consist of such tuples.
            ValueError: if all gradients are None, or if a tensor is not a parameter of this optimizer.

        Also raises what `step()` raises.
        """
        if not isinstance(grads_and_vars, Iterable):
            raise TypeError(f"grads_and_vars must consist of tuples, got {type(grads_and_vars).__name__}")
        given = list(grads_and_vars)  # what a generator raises is the user's
        try:
            pairs = [(grad, param) for grad, param in given]
        except (TypeError, ValueError):
            raise TypeError(
                "grads_and_vars must consist of (gradient, parameter) tuples, as of zip(grads, params)"
            ) from None
        known = set(map(id, self._params()))
        for index, (grad, param) in enumerate(pairs):
            if not isinstance(param, Tensor) or not (grad is None or isinstance(grad, Tensor)):
                got = (type(grad).__name__, type(param).__name__)
                raise TypeError(f"tuple {index} of grads_and_vars must be (Tensor, parameter), got ({', '.join(got)})")
            if id(param) not in known:
                raise ValueError(
                    f"tuple {index} of grads_and_vars has a tensor of shape {tuple(param.shape)} that is no parameter "
                    "of this optimizer; pass it to the constructor or to add_param_group"
                )
        if not pairs:
            return
        without = [param for grad, param in pairs if grad is None]
        if without:
            names = ", ".join(map(self._name_of, without[:5])) + (", ..." if len(without) > 5 else "")
            if len(without) == len(pairs):
                raise ValueError(f"No gradients provided for any variable: {names}.")
            warnings.warn(f"Gradients do not exist for variables: {names}.", stacklevel=2)
        outer = self._explicit
        self._explicit = ExplicitGradients(
            [(grad, param) for grad, param in pairs if grad is not None], bool(experimental_aggregate_gradients)
        )
        try:
            self.step()
        finally:
            self._explicit = outer

    def minimize(
        self,
        loss: Tensor | Callable[[], Tensor],
        var_list: Sequence[Tensor] | Callable[[], Sequence[Tensor]],
        grad_loss: Tensor | None = None,
        name: str | None = None,
    ) -> None:
        """Computes the gradients of a loss and applies them. `.grad` is neither read nor written.

        The hooks of DistributedDataParallel run in `backward()` only. Call `backward()` and `step()` there instead.

        Args:
            loss (Tensor or Callable): the loss, or a callable without arguments that returns it. Several elements are
                summed. There is no tape argument: a Tensor carries its graph.
            var_list (sequence of Tensor or Callable): the parameters, or a callable that returns them. The callable
                runs after `loss`.
            grad_loss (Tensor, optional): the upstream gradient, in the shape of `loss`, as ``grad_outputs`` of
                ``torch.autograd.grad``. None means ones. (default: None)
            name (str, optional): ignored. (default: None)

        Raises what `apply_gradients` raises.
        """
        if not isinstance(loss, Tensor):
            with torch.enable_grad():
                loss = loss()
        params = _flattened(var_list() if callable(var_list) else var_list)
        self.apply_gradients(zip(_gradients(loss, params, grad_loss), params, strict=True), name)

    def get_gradients(self, loss: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
        """Returns the gradients of a loss with respect to parameters. `.grad` is neither read nor written.

        Args:
            loss (Tensor): the loss. Several elements are summed.
            params (sequence of Tensor): the parameters.

        Raises:
            ValueError: if the loss does not depend on one of the parameters.
        """
        params = _flattened(params)
        grads = _gradients(loss, params, None)
        for index, (grad, param) in enumerate(zip(grads, params, strict=True)):
            if grad is None:
                raise ValueError(
                    f"Variable {index} of shape {tuple(param.shape)} has `None` for gradient: the loss does not depend "
                    "on it through differentiable operations."
                )
        return grads  # type: ignore[return-value]

    # ---- Configuration ------------------------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """Returns the configuration as plain Python values, under the names of Keras.

        `from_config` and Keras construct the same optimizer from it. It describes the first param group. A schedule
        becomes ``{"class_name": ..., "config": ...}``, a Tensor its number, and a callable its present value. The
        aggregator, the transformers and the state are not included.
        """
        config: dict[str, Any] = {}
        for option in OPTIONS:
            if option.keras is None:
                continue
            value = getattr(self, option.name)
            if isinstance(value, schedules.LearningRateSchedule):
                value = schedules.serialize(value)
            elif callable(value) and not isinstance(value, Tensor):
                value = value()
            is_default = option.is_keras3 and not isinstance(value, Tensor) and value == option.default
            if value is not None and not is_default:
                config[option.keras] = value.item() if hasattr(value, "item") else value  # a Tensor or NumPy scalar
        if any(option.is_keras3 and option.keras in config for option in OPTIONS) and config["decay"] == 0:
            del config["decay"]  # which Keras 3 warns of
        return config

    @classmethod
    def from_config(
        cls, config: dict[str, Any], params: Any, custom_objects: dict[str, Any] | None = None, **options: Any
    ) -> Any:
        """Constructs an optimizer from a configuration of `get_config`, ``tf.keras`` or Keras.

        Args:
            config (dict): the configuration. It is not modified. `lr` is read as `learning_rate`.
            params (iterable): as for the constructor.
            custom_objects (dict, optional): classes of schedules by name, for those that `schedules` does not have.
                (default: None)
            options: further arguments of the constructor, such as `fused`.

        Raises what the constructor raises.
        """
        config = without_neutral({key: value for key, value in config.items() if key not in _MEANINGLESS})
        if "lr" in config:
            config["learning_rate"] = config.pop("lr")
        if isinstance(config.get("learning_rate"), dict):
            config["learning_rate"] = schedules.deserialize(config["learning_rate"], custom_objects)
        return cls(params, **{**config, **options})

    # ---- Weights and slots --------------------------------------------------------------------------------------

    def get_slot_names(self) -> list[str]:
        """Returns ``["accum_grad", "accum_var"]``, the names that Keras uses for `square_avg` and `acc_delta`."""
        return list(SLOTS)

    def get_slot(self, var: Tensor, slot_name: str) -> Tensor:
        """Returns a state tensor of a parameter by its Keras name.

        Args:
            var (Tensor): the parameter.
            slot_name (str): "accum_grad" for `square_avg`, or "accum_var" for `acc_delta`.

        Raises:
            KeyError: if there is no such slot, or if the parameter has no state yet.
        """
        if slot_name not in SLOTS:
            raise KeyError(f"no slot {slot_name!r}; there are {', '.join(SLOTS)}")
        if not has_state(self.state.get(var)):
            raise KeyError(
                f"a tensor of shape {tuple(var.shape)} has no state; the first step with a gradient makes it"
            )
        slot: Tensor = self.state[var][SLOTS[slot_name]]
        return slot

    def variables(self) -> list[Tensor]:
        """Returns the number of steps, then the `square_avg` of all parameters, then the `acc_delta` of all parameters.

        With `use_ema`, all averages follow; with `gradient_accumulation_steps`, all sums of gradients. The state is not
        copied. A parameter without state contributes zeros, and its own values as the average.
        """
        keys = self._optional_keys()
        states = [self._state_of(param, keys) for param in self._params()]
        count = self.param_groups[0]["iterations"]
        iterations = count if isinstance(count, Tensor) else torch.tensor(count, dtype=torch.int64)
        return [iterations, *(state[key] for key in (*SLOTS.values(), *keys) for state in states)]

    def _optional_keys(self) -> list[str]:
        """The keys of the state besides the accumulators that are in use."""
        wanted = {
            averages.KEY: self.param_groups[0]["use_ema"],
            accumulation.KEY: self.param_groups[0]["gradient_accumulation_steps"] is not None,
        }
        return [key for key, is_used in wanted.items() if is_used or any(key in entry for entry in self.state.values())]

    def _state_of(self, param: Tensor, optional_keys: Iterable[str]) -> dict[str, Tensor]:
        """The state of a parameter beside what others keep there; what a step would begin with if there is none yet."""
        state = dict(self.state.get(param) or {})
        for key in (*SLOTS.values(), *optional_keys):
            if key not in state:
                state[key] = self.initial_state(param, key)
        return state

    @property
    def weights(self) -> list[Tensor]:
        """The same as `variables()`."""
        return self.variables()

    def get_weights(self) -> list[Any]:
        """Returns copies of `variables()` as NumPy arrays. bfloat16 becomes float32, complex32 becomes complex64."""
        return [_to_numpy(tensor) for tensor in self.variables()]

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets the number of steps and all state.

        Args:
            weights (sequence of array or Tensor): the values in the order of `get_weights`. Averages and sums of
                gradients can be left out. The number of steps can then be left out, too, as in old files; it becomes 0.

        Raises:
            ValueError: if the number of weights or a shape is wrong, or if accumulated gradients wait for their update
                and the weights have no sums. Nothing is set then.
            RuntimeError: inside `swap_averages`.
        """
        self.check_not_swapped("no weights can be set")
        params = self._params()
        values = [torch.as_tensor(weight) for weight in weights]
        if len(values) == 2 * len(params):
            values.insert(0, torch.tensor(0))
        keys, optional_keys = list(SLOTS.values()), self._optional_keys()
        if len(values) != 1 + len(keys) * len(params):
            keys += optional_keys
        if len(values) != 1 + len(keys) * len(params):
            raise ValueError(
                f"You called `set_weights(weights)` on optimizer {self.name} with a weight list of length "
                f"{len(weights)}, but the optimizer was expecting {1 + len(keys) * len(params)} weights."
            )
        if values[0].numel() != 1 or values[0].is_complex():
            raise ValueError(f"the first weight is the number of iterations, got shape {tuple(values[0].shape)}")
        count = values[0].item()
        if not math.isfinite(count) or count != int(count):
            raise ValueError(f"the first weight is the number of iterations, got {count!r}")
        if accumulation.KEY not in keys:
            self._check_nothing_pending("the state")
            accumulation.check_pending([{**self.param_groups[0], "iterations": int(count)}], {})
        states = [self._state_of(param, optional_keys) for param in params]
        slots = [state[key] for key in keys for state in states]
        for index, (slot, value) in enumerate(zip(slots, values[1:], strict=True), 1):
            if slot.shape != value.shape:
                raise ValueError(
                    f"Optimizer weight shape {tuple(slot.shape)} not compatible with provided weight shape "
                    f"{tuple(value.shape)} (weight {index})."
                )
            if value.is_complex() and not slot.is_complex():
                raise ValueError(f"weight {index} is complex, the parameter is real")
        with torch.no_grad():
            # All that may fail comes first; and a value may be a slot of this optimizer.
            copies = [torch.empty_like(slot).copy_(value) for slot, value in zip(slots, values[1:], strict=True)]
            self.set_calls(int(count))
            for slot, copy in zip(slots, copies, strict=True):
                slot.copy_(copy)
        for param, state in zip(params, states, strict=True):
            self.state[param] = state


def _flattened(params: Any) -> list[Tensor]:
    if isinstance(params, Tensor):
        return [params]
    if isinstance(params, dict):
        params = params.values()
    return [tensor for item in params for tensor in _flattened(item)]


def _gradients(loss: Any, params: list[Tensor], grad_loss: Tensor | None) -> list[Tensor | None]:
    """The gradients of a loss, None where it does not depend on a parameter."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"the loss must be a Tensor, or a callable that returns one, got {type(loss).__name__}")
    watched = [param for param in params if param.requires_grad]
    if not loss.requires_grad or not watched:
        return [None] * len(params)
    grad_outputs = torch.ones_like(loss) if grad_loss is None else grad_loss
    found = iter(torch.autograd.grad(loss, watched, grad_outputs, allow_unused=True))
    return [next(found) if param.requires_grad else None for param in params]


def _to_numpy(tensor: Tensor) -> Any:
    tensor = tensor.detach().to("cpu", copy=True)
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.float()
    if tensor.dtype is torch.complex32:
        tensor = tensor.to(torch.complex64)
    return tensor.numpy()
