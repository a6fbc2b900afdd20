"""AdadeltaKeras: param groups, state and `step()`. How an update is computed is the business of `update.py`."""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any, Final, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from torch_adadelta import hyperparameters
from torch_adadelta import update as updates

_STATE_KEYS: Final = ("square_avg", "acc_delta")

# The hyperparameters by their key in a param group.
_HYPERPARAMETERS: Final = {"lr": "learning_rate", "rho": "rho", "epsilon": "epsilon"}

_get_grad = attrgetter("grad")
_get_square_avg, _get_acc_delta = itemgetter("square_avg"), itemgetter("acc_delta")


# Parameters of one group that one call updates: the group, the call, the parameters with their gradients and state, and
# the hyperparameters of this step. A plain tuple, for a step of one small tensor is made of such small things.
_Bucket = tuple[dict[str, Any], updates.Update, updates.Lists, hyperparameters.StepValues]


class _SpansDevices(Exception):
    """The parameters of a group turned out to be on several devices, before anything was written."""


class AdadeltaKeras(Optimizer):
    r"""Adadelta, computed exactly as ``tf.keras.optimizers.Adadelta`` of TensorFlow 2.4 computes it.

    For the gradient :math:`g_t` and the parameter :math:`\theta`, with :math:`a_0 = u_0 = 0`:

    .. math::
        a_t &= \rho\, a_{t-1} + (1 - \rho)\, g_t^2 \\
        d_t &= \sqrt{u_{t-1} + \epsilon}\, \frac{1}{\sqrt{a_t + \epsilon}}\, g_t \\
        u_t &= \rho\, u_{t-1} + (1 - \rho)\, d_t^2 \\
        \theta_t &= \theta_{t-1} - \text{lr}\, d_t

    :math:`a` is ``state[param]["square_avg"]`` (``accum_grad`` in Keras), :math:`u` is ``state[param]["acc_delta"]``
    (``accum_var``); both have the parameter's shape, layout and dtype, and appear when it first has a gradient. The
    arithmetic runs in float64 for float64 (and complex128) parameters, else in float32; 16-bit parameters and state
    are rounded once, when they are stored. Complex parameters are pairs of reals. All implementations give the same
    bits.

    Args:
        params: parameters, named parameters or param groups, as for every ``torch.optim`` optimizer. A group may set
            ``lr`` (or ``learning_rate``), ``rho``, ``epsilon`` and the flags for itself.
        learning_rate: the factor lr, a number >= 0 or a one-element Tensor. The default is that of Keras; the paper and
            ``torch.optim.Adadelta`` use 1.0.
        rho: the decay rate of both averages, in [0, 1]; a number or a one-element Tensor.
        epsilon: added under both roots; a number >= 0 or a one-element Tensor. None and 0 mean 1e-7, as in Keras.
        name: the name of the optimizer, as Keras keeps it in its configuration.
        lr: another name for ``learning_rate``; wins if both are given.
        maximize: ascend instead of descend.
        foreach: True for PyTorch's multi-tensor operations, False for the for-loop, None for the best that applies.
        fused: True for the compiled kernel, False to do without it, None to use it where it applies.
        capturable: keep ``iterations`` on the parameters' device, so that ``step()`` can be captured in a CUDA graph.
        differentiable: let autograd record ``step()``, which then runs the for-loop.

    A Python number for ``learning_rate`` or ``rho`` is rounded to float32 first, as Keras does, whatever the dtype of
    the parameters; a Tensor or NumPy scalar keeps its precision. ``epsilon`` is not rounded.

    Raises:
        TypeError: an argument of the wrong type, a parameter that is neither floating-point nor complex.
        ValueError: a hyperparameter that is negative, nan, infinite or out of range; a parameter that is sparse,
            overlaps itself, or is in two groups.
        RuntimeError: ``foreach`` or ``fused`` was asked for and cannot run, with the reason.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = AdadeltaKeras(model.parameters(), learning_rate=1.0)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.iterations
        1

    Source: M. D. Zeiler, "ADADELTA: An Adaptive Learning Rate Method", https://arxiv.org/abs/1212.5701, in the form of
    ``tensorflow/python/keras/optimizer_v2/adadelta.py``, TensorFlow 2.4.
    """

    # Whether a group was seen whose parameters are on several devices. To ask each one at each step costs too much.
    _groups_span_devices = False

    def __init__(
        self,
        params: ParamsT,
        learning_rate: float | Tensor = 0.001,
        rho: float | Tensor = 0.95,
        epsilon: float | Tensor | None = 1e-7,
        name: str = "Adadelta",
        *,
        lr: float | Tensor | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, got {name!r} of type {type(name).__name__}")
        defaults: dict[str, Any] = {
            "lr": learning_rate if lr is None else lr,
            "rho": rho,
            "epsilon": epsilon,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "differentiable": differentiable,
            # Not "name": people name their param groups with that key.
            "optimizer_name": name,
        }
        _normalise(defaults)
        super().__init__(params, defaults)

    # ---- Param groups -------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, whose missing options are the optimizer's defaults.

        Raises what the constructor raises, and then leaves the optimizer as it was.
        """
        if isinstance(param_group, dict):
            _check_group_keys(param_group)
            options = {key: value for key, value in param_group.items() if key in self.defaults}
            if "learning_rate" in param_group:
                options.setdefault("lr", param_group["learning_rate"])
            options = {**self.defaults, **options}
            _normalise(options)
            iterations = self.param_groups[0]["iterations"] if self.param_groups else param_group.get("iterations", 0)
            param_group.pop("learning_rate", None)
            param_group.update(options, iterations=iterations)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            group["iterations"] = _iterations_for(group, group["iterations"])
            for index, param in enumerate(group["params"]):
                updates.check_param(partial(_name, len(self.param_groups) - 1, group, index), param)
            if group["fused"] or group["foreach"]:
                for indices in _by_device(group["params"]).values():
                    _choose(group, [group["params"][i] for i in indices])
        except Exception:
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes what pickle, deepcopy and `load_state_dict` restore, once all of it has been checked."""
        groups = state["param_groups"]
        defaults = state.get("defaults") or self.defaults
        previous = self.__dict__.get("param_groups", [])
        if any("eps" in group for group in groups):
            _convert_torch_adadelta(groups, state["state"], previous)
        for group in groups:
            for key, value in defaults.items():
                group.setdefault(key, value)
            group.setdefault("iterations", 0)
            _normalise(group)
            group["iterations"] = _iterations_for(group, group["iterations"])
        counts = {int(group["iterations"]) for group in groups}
        if len(counts) > 1:
            raise ValueError(f"the param groups disagree on iterations: {sorted(counts)}; they count the same steps")
        for group_index, group in enumerate(groups):
            for index, param in enumerate(group["params"]):
                saved = state["state"].get(param)
                _check_state(_name(group_index, group, index), param, saved)
                if saved and param.is_complex():  # Optimizer.load_state_dict casts real state only
                    state["state"][param] = {key: tensor.to(param.dtype) for key, tensor in saved.items()}
        super().__setstate__(state)

    # ---- Hyperparameters ----------------------------------------------------------------------------------------

    def _set(self, key: str, value: Any) -> None:
        value = hyperparameters.validated(_HYPERPARAMETERS[key], value)
        self.defaults[key] = value
        for group in self.param_groups:
            group[key] = value

    @property
    def learning_rate(self) -> float | Tensor:
        """The learning rate as it was given: that of the first param group. Setting it sets all groups."""
        return self.param_groups[0]["lr"]

    @learning_rate.setter
    def learning_rate(self, value: float | Tensor) -> None:
        self._set("lr", value)

    @property
    def lr(self) -> float | Tensor:
        """Another name for `learning_rate`."""
        return self.learning_rate

    @lr.setter
    def lr(self, value: float | Tensor) -> None:
        self.learning_rate = value

    @property
    def rho(self) -> float | Tensor:
        """The decay rate as it was given: that of the first param group. Setting it sets all groups."""
        return self.param_groups[0]["rho"]

    @rho.setter
    def rho(self, value: float | Tensor) -> None:
        self._set("rho", value)

    @property
    def epsilon(self) -> float | Tensor:
        """The epsilon of the first param group, 1e-7 if None or 0 was given. Setting it sets all groups."""
        return self.param_groups[0]["epsilon"]

    @epsilon.setter
    def epsilon(self, value: float | Tensor | None) -> None:
        self._set("epsilon", value)

    @property
    def iterations(self) -> int:
        """The number of steps taken. Can be set to an int >= 0."""
        return int(self.param_groups[0]["iterations"])

    @iterations.setter
    def iterations(self, value: int) -> None:
        counts = [_iterations_for(group, value) for group in self.param_groups]
        for group, count in zip(self.param_groups, counts, strict=True):
            group["iterations"] = count

    @property
    def name(self) -> str:
        """The name of the optimizer."""
        return self.param_groups[0]["optimizer_name"]

    # ---- The step -----------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every parameter that has a gradient, once, and counts the step in `iterations`.

        Without any gradient nothing happens and nothing is counted. A step that raises changes nothing; only if it is
        interrupted, or memory runs out, amid its writes, the exception's message says that it is partial.

        Args:
            closure: reevaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: a gradient or a state does not fit its parameter, or an explicit choice cannot run.
            ValueError, TypeError: a param group holds an invalid hyperparameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # the function behind torch.set_grad_enabled
        try:
            try:
                self._apply()
            except _SpansDevices:
                self._groups_span_devices = True
                self._apply()
        finally:
            torch._C._set_grad_enabled(grad_enabled)
        return loss

    def _apply(self) -> None:
        buckets: list[_Bucket] = []
        new_state: dict[Tensor, dict[str, Tensor]] = {}
        for group in self.param_groups:
            lists = self._gather(group, new_state)
            if lists is not None:
                buckets.extend(_split(group, lists, self._groups_span_devices))
        if not buckets:
            return
        first_update = buckets[0][1]
        if len(buckets) == 1 and first_update is updates.fused:
            # A fused call checks its own lists before it writes. All else is checked here, before the first write.
            if new_state:
                self._check(buckets[0])
        else:
            for bucket in buckets:
                self._check(bucket)

        self.state.update(new_state)
        has_written = False
        try:
            for group, update, lists, values in buckets:
                if group["differentiable"]:
                    with torch.enable_grad():
                        update(*lists, *values, group["maximize"])
                else:
                    update(*lists, *values, group["maximize"])
                has_written = True
            for group in self.param_groups:
                group["iterations"] += 1  # in place where it is a Tensor
        except BaseException as error:
            if isinstance(error, Exception) and first_update is updates.fused and not has_written:
                for param in new_state:
                    del self.state[param]
                self._explain(buckets[0])
            else:
                what = str(error) or type(error).__name__
                error.args = (f"{what} (the step is partial: some parameters and state were updated, others not)",)
            raise

    def _gather(self, group: dict[str, Any], new_state: dict[Tensor, dict[str, Tensor]]) -> updates.Lists | None:
        """The parameters of a group that have a gradient, with it and their state, or None if there are none.

        State that is missing is made and left in `new_state`.
        """
        params: list[Tensor] = group["params"]
        grads = list(map(_get_grad, params))
        if type(None) in map(type, grads):
            params = [p for p in params if p.grad is not None]
            grads = list(map(_get_grad, params))
        if not grads:
            return None
        states: Iterable[Any]
        if len(self.state) == len(params) and all(map(is_, self.state, params)):
            states = self.state.values()  # in the same order; to hash a thousand parameters takes much longer
        else:
            states = list(map(self.state.get, params))
        try:
            return params, grads, list(map(_get_square_avg, states)), list(map(_get_acc_delta, states))
        except (KeyError, TypeError):  # some parameter has no state yet, or an empty one
            states = [self._complete(p, state, new_state) for p, state in zip(params, states, strict=True)]
            return params, grads, list(map(_get_square_avg, states)), list(map(_get_acc_delta, states))

    def _complete(self, param: Tensor, state: Any, new_state: dict[Tensor, dict[str, Tensor]]) -> dict[str, Tensor]:
        """The state of a parameter: what it has, or else a new one."""
        if not state:
            if param not in new_state:
                updates.check_param(partial(self._name_of, param), param)
                new_state[param] = {
                    key: torch.zeros_like(param, memory_format=torch.preserve_format) for key in _STATE_KEYS
                }
            return new_state[param]
        if not isinstance(state, dict) or not state.keys() >= set(_STATE_KEYS):
            raise RuntimeError(
                f"{self._name_of(param)}: its state holds {sorted(state)}, not square_avg and acc_delta; delete "
                "optimizer.state[param] to begin anew"
            )
        return state

    def _name_of(self, param: Tensor) -> str:
        for group_index, group in enumerate(self.param_groups):
            for index, candidate in enumerate(group["params"]):
                if candidate is param:
                    return _name(group_index, group, index)
        raise KeyError(param)

    def _check(self, bucket: _Bucket) -> None:
        """Raises, naming the parameter, unless all of the bucket can be updated."""
        _, update, lists, _ = bucket
        if update is not updates.fused:
            self._check_rows(bucket)
            return
        try:
            updates.check_fused(*lists)
        except Exception:
            self._explain(bucket)
            raise

    def _explain(self, bucket: _Bucket) -> None:
        """After the compiled op refused a bucket, by the index: raises the same by the name, if it can be found."""
        params = bucket[2][0]
        if not self._groups_span_devices and len(_by_device(params)) > 1:
            raise _SpansDevices from None
        try:
            self._check_rows(bucket)
        except (RuntimeError, TypeError, ValueError) as explained:
            raise explained from None

    def _check_rows(self, bucket: _Bucket) -> None:
        group, _, lists, _ = bucket
        for param, *tensors in zip(*lists, strict=True):
            updates.check_row(partial(self._name_of, param), param, *tensors, differentiable=group["differentiable"])


# ---- From lists to buckets ------------------------------------------------------------------------------------------


def _choose(group: dict[str, Any], params: list[Tensor]) -> updates.Update:
    return updates.choose(params, group["foreach"], group["fused"], group["differentiable"])


def _split(group: dict[str, Any], lists: updates.Lists, by_device: bool) -> Iterable[_Bucket]:
    """Splits the parameters of a group by device and, where the implementation needs it, by dtype.

    Without `by_device`, a group that the fused update can take by its first parameter is taken to be on one device;
    the update refuses it if it is not.
    """
    values = hyperparameters.for_step(group["lr"], group["rho"], group["epsilon"], group["differentiable"])
    params = lists[0]
    # Not through _choose: every step of every group passes here, and each call counts.
    choice = updates.choose(params, group["foreach"], group["fused"], group["differentiable"])
    if choice is updates.fused and not by_device:
        return ((group, updates.fused, lists, values),)
    buckets: list[_Bucket] = []
    for on_device in _by_device(params).values():
        update = _choose(group, [params[i] for i in on_device])
        by_dtype: dict[torch.dtype | None, list[int]] = {}
        for i in on_device:
            by_dtype.setdefault(params[i].dtype if update is updates.foreach else None, []).append(i)
        for same in by_dtype.values():
            selected: Any = tuple([tensors[i] for i in same] for tensors in lists)
            buckets.append((group, update, selected, values))
    return buckets


def _by_device(params: list[Tensor]) -> dict[torch.device, list[int]]:
    indices: dict[torch.device, list[int]] = {}
    for index, param in enumerate(params):
        indices.setdefault(param.device, []).append(index)
    return indices


# ---- Param groups and state -----------------------------------------------------------------------------------------


def _name(group_index: int, group: dict[str, Any], index: int) -> str:
    names = group.get("param_names")
    return f"parameter {index} of group {group_index}" + (f" ({names[index]!r})" if names else "")


def _check_group_keys(group: dict[str, Any]) -> None:
    if "eps" in group:
        raise ValueError(f"a param group has eps={group['eps']!r}; here the key is `epsilon`")
    if group.get("weight_decay"):
        raise ValueError(
            f"a param group has weight_decay={group['weight_decay']!r}; Keras' Adadelta has none. Add the "
            "penalty to the loss, or leave the key out"
        )


def _normalise(options: dict[str, Any]) -> None:
    """Checks the options of a group, or the defaults, and brings them to the form in which they are kept."""
    for key, name in _HYPERPARAMETERS.items():
        options[key] = hyperparameters.validated(name, options[key])
    for key in ("maximize", "capturable", "differentiable"):
        if not isinstance(options[key], bool):
            raise TypeError(f"{key} must be True or False, got {options[key]!r}")
    for key in ("foreach", "fused"):
        if options[key] is not None and not isinstance(options[key], bool):
            raise TypeError(f"{key} must be True, False or None, got {options[key]!r}")
    updates.check_choice(options["foreach"], options["fused"], options["differentiable"])


def _checked_iterations(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"iterations must be an int, got {value!r} of type {type(value).__name__}")
    if not 0 <= value < 2**63:
        raise ValueError(f"iterations must be >= 0 and fit 64 bits, got {value}")
    return value


def _iterations_for(group: dict[str, Any], iterations: Any) -> int | Tensor:
    """`iterations` as the group keeps it: an int, or an int64 Tensor of its own on the device if it is capturable."""
    count = _checked_iterations(int(iterations) if isinstance(iterations, Tensor) else iterations)
    if not group["capturable"]:
        return count
    device = group["params"][0].device if group["params"] else None
    return torch.tensor(count, dtype=torch.int64, device=device)


def _check_state(name: str, param: Tensor, state: Any) -> None:
    if not state:
        return
    if not isinstance(state, dict) or set(state) != set(_STATE_KEYS):
        raise ValueError(f"{name}: its state must hold square_avg and acc_delta, got {sorted(state)}")
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.shape != param.shape:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else repr(tensor)
            raise ValueError(f"{name} has shape {tuple(param.shape)}, but the state {key} to load is {got}")


def _convert_torch_adadelta(
    groups: list[dict[str, Any]], state: dict[Any, dict[str, Any]], previous: list[dict[str, Any]]
) -> None:
    """Turns the groups and state of a `torch.optim.Adadelta` checkpoint into ours, in place.

    `foreach` and `fused` say how to compute, not what: they stay as they are in the optimizer that loads.
    """
    for index, group in enumerate(groups):
        if group.get("weight_decay"):
            raise ValueError(
                f"group {index} of the torch.optim.Adadelta checkpoint has weight_decay={group['weight_decay']!r}; "
                "Keras' Adadelta has none, so training would go on differently. Set it to 0 in the checkpoint to "
                "accept that"
            )
        if group["eps"] == 0:
            raise ValueError(
                f"group {index} of the torch.optim.Adadelta checkpoint has eps=0, which would mean 1e-7 here. Set "
                "it to the value you want in the checkpoint"
            )
    iterations = max((int(s["step"]) for s in state.values() if "step" in s), default=0)
    for s in state.values():
        s.pop("step", None)
    live = chain(previous, [{}] * len(groups))
    for group, was in zip(groups, live, strict=False):
        group.pop("weight_decay", None)
        group["epsilon"] = group.pop("eps")
        group["iterations"] = iterations
        group["foreach"], group["fused"] = was.get("foreach"), was.get("fused")
