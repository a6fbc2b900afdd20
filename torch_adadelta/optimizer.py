"""AdadeltaKeras: constructor, param groups, properties, checkpoints, and a `step()` that delegates to `step/`."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from torch_adadelta import checkpoint, distributed, options
from torch_adadelta.backends import dtensor, masters
from torch_adadelta.backends.batch import has_state
from torch_adadelta.distributed import NormGroup
from torch_adadelta.keras_interface import KerasInterface
from torch_adadelta.options import BY_NAME, OPTIMIZER_WIDE, OPTIONS, Kind, Option
from torch_adadelta.schedules import LearningRateSchedule
from torch_adadelta.step import (
    accumulation,
    averages,
    compiled,
    exclusions,
    execution,
    norm_variables,
    planning,
    precision,
    selection,
    validation,
)
from torch_adadelta.step.callbacks import Callback, Callbacks
from torch_adadelta.step.planning import PartitionCache, StepRequest
from torch_adadelta.step.sources import Source, Sources, bind_group, bind_hyperparameter

Hyperparameter = float | Tensor | Callable[[], Any]

_is_compiling: Final = torch.compiler.is_compiling

# What pickle and deepcopy keep besides what every optimizer has.
_OWN_ATTRIBUTES: Final = ("_sources", "_callbacks", "_norm_group", "_is_made_by_zero")


def _option(name: str, doc: str) -> property:
    """The property of an option: its value in the first group; setting it sets all groups."""
    option = BY_NAME[name]

    def get(self: "AdadeltaKeras") -> Any:
        return self._get(option)

    def set_(self: "AdadeltaKeras", value: Any) -> None:
        self._set(option, value)

    return property(get, set_, doc=doc)


@torch.no_grad()
def _restore(tensors: Iterable[Tensor | None], values: Iterable[Tensor | None]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        if tensor is not None and value is not None:
            tensor.copy_(value)


class AdadeltaKeras(KerasInterface):
    r"""Implements Adadelta with the exact numbers of ``tf.keras.optimizers.Adadelta`` in TensorFlow 2.4.

    For the gradient :math:`g_t` and the parameter :math:`\theta`, with :math:`a_0 = u_0 = 0`:

    .. math::
        a_t &= \rho\, a_{t-1} + (1 - \rho)\, g_t^2 \\
        d_t &= \sqrt{u_{t-1} + \epsilon}\, \frac{1}{\sqrt{a_t + \epsilon}}\, g_t \\
        u_t &= \rho\, u_{t-1} + (1 - \rho)\, d_t^2 \\
        \theta_t &= \theta_{t-1} - \text{lr}\, d_t

    :math:`a` is ``state[param]["square_avg"]`` (``accum_grad`` in Keras). :math:`u` is ``state[param]["acc_delta"]``
    (``accum_var``). Both are created when the parameter first has a gradient. They have its shape and layout, and its
    dtype unless ``state_dtype`` is set.

    The opmath dtype is float64 for float64 and complex128 parameters, and float32 for all others. Parameters and state
    in 16 bits are rounded once, when they are stored. Complex parameters are treated as pairs of real numbers. All
    implementations give the same bits.

    Args:
        params (iterable): parameters, named parameters, or dicts that define param groups. A group can have its own
            ``lr`` (or ``learning_rate``), ``rho``, ``epsilon``, ``weight_decay``, ``decoupled_weight_decay``,
            ``master_weights``, ``state_dtype``, ``maximize``, ``foreach``, ``fused``, ``capturable`` and
            ``differentiable``.
        learning_rate (float, Tensor, Callable or LearningRateSchedule, optional): the factor lr, >= 0. A Tensor has one
            element. A callable takes no arguments and returns a number or such a Tensor. The default is that of Keras;
            the paper and ``torch.optim.Adadelta`` use 1.0. (default: 0.001)
        rho (float, Tensor or Callable, optional): the decay rate of both averages, in [0, 1]. (default: 0.95)
        epsilon (float, Tensor or Callable, optional): the term under both roots, >= 0. None and 0 mean 1e-7, as in
            Keras. (default: 1e-7)
        name (str, optional): the name of the optimizer in its Keras configuration. (default: "Adadelta")
        lr (float, Tensor, Callable or LearningRateSchedule, optional): another name for ``learning_rate``. It takes
            precedence if both are given. (default: None)
        decay (float or Tensor, optional): divides the learning rate of step t, counted from 0, by ``1 + decay * t``. A
            number >= 0 or a one-element CPU Tensor. (default: 0.0)
        clipvalue (float, optional): clips every element of a gradient to [-clipvalue, clipvalue]. (default: None)
        clipnorm (float, optional): scales each gradient with a greater norm down to this norm. (default: None)
        global_clipnorm (float, optional): scales all gradients together so that their global norm does not exceed this
            value. It cannot be combined with ``clipnorm``. (default: None)
        gradient_aggregator (Callable, optional): a function that takes a list of (gradient, parameter) tuples and
            returns such a list. It is called once a step, before clipping, to combine gradients between processes. See
            `distributed.all_reduce_sum`. (default: None)
        gradient_transformers (iterable of Callable, optional): functions of the same form, called in order after the
            aggregator. They cannot be combined with a clip option. (default: None)
        norm_group (ProcessGroup or "world", optional): the processes over which ``global_clipnorm`` takes its norm, if
            each of them has other parameters, as under ``ZeroRedundancyOptimizer``. "world" is the default group. All
            processes must call every step, and all count it if one of them has a gradient. Do not set it under DDP,
            where each process has all gradients, or for DTensors, whose norm covers all shards anyway. (default: None)
        norm_variables (iterable, optional): for ``clipnorm``, the Keras variables that do not correspond to exactly one
            parameter. Each is a list of pieces that share one norm. A piece is a parameter or a tuple (parameter, first
            row, row behind the last). (default: None)
        weight_decay (float, Tensor or Callable, optional): subtracts ``weight_decay * lr * param`` from a parameter
            before its update, as Keras 3 does. A number >= 0; None means 0. A parameter without a gradient does not
            decay. See `exclude_from_weight_decay`. (default: None)
        decoupled_weight_decay (bool, optional): if False, ``weight_decay * param`` is added to the gradient instead, as
            in ``torch.optim.Adadelta``. False cannot be combined with a clip option or sparse gradients.
            (default: True)
        use_ema (bool, optional): keeps a moving average of each parameter that requires a gradient, as Keras 3 does.
            After every step, ``average = ema_momentum * average + (1 - ema_momentum) * param``. The average is
            ``state[param]["average"]``, in the opmath dtype. See `swap_averages` and `finalize_variable_values`.
            (default: False)
        ema_momentum (float, optional): the momentum of the averages, in [0, 1]. The first step uses 0, so that an
            average begins as the updated parameter. (default: 0.99)
        ema_overwrite_frequency (int, optional): overwrites the parameters by their averages after every so many
            updates, >= 1. (default: None)
        gradient_accumulation_steps (int, optional): the number of steps, >= 2, whose mean gradient makes one update.
            The sums are ``state[param]["gradient_accumulator"]``. `iterations` counts updates.
            ``param_groups[0]["iterations"]``, which schedules receive, counts steps. (default: None)
        loss_scale_factor (float, optional): divides all gradients before anything else, > 0. See `scale_loss`.
            (default: None)
        master_weights (bool, optional): updates a float32 master of each bfloat16 parameter. The parameter is the upper
            half of the master, and ``state[param]["remainder"]`` (int16) the lower one. float32 and float64 parameters
            are their own masters; float16 and complex parameters are refused. See `master_params` and `to_bfloat16`.
            (default: False)
        state_dtype (torch.dtype, optional): the dtype of ``square_avg`` and ``acc_delta``: ``torch.float32``,
            ``torch.bfloat16``, or None for the dtype of the parameter. float64 and complex parameters need None.
            (default: None)
        maximize (bool, optional): maximizes the objective instead of minimizing it. (default: False)
        foreach (bool, optional): True runs PyTorch's multi-tensor operations, False single-tensor operations. None
            chooses the fastest implementation that applies. (default: None)
        fused (bool, optional): True runs the compiled kernel, False does not. None runs it where it applies.
            (default: None)
        capturable (bool, optional): keeps ``iterations`` on the device of the parameters, so that a CUDA graph can
            capture ``step()``. (default: False)
        differentiable (bool, optional): lets autograd record ``step()``, which then runs single-tensor operations.
            (default: False)

    A sparse gradient (``torch.sparse_coo``, as of ``nn.Embedding(..., sparse=True)``) updates only the rows that occur
    in it. Weight decay and averages apply to all rows.

    A Python number for ``learning_rate``, ``rho`` or ``decay`` is first rounded to float32, as in Keras, whatever the
    dtype of the parameters. Tensors, NumPy scalars and the other options keep their precision. A callable is called
    once in each step that updates. The aggregator and the transformers receive copies of the gradients in the opmath
    dtype and may overwrite them. ``.grad`` is never written to.

    Raises:
        TypeError: if an argument has the wrong type, or a parameter is neither floating-point nor complex.
        ValueError: if a hyperparameter is negative, nan, infinite or out of range; if options exclude each other; if a
            parameter is sparse, overlaps itself or is in two groups; if ``clipvalue`` is set for a complex parameter.
        RuntimeError: if ``foreach=True`` or ``fused=True`` cannot run. The message gives the reason.

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

    # Set by GradScaler around a step: what the gradients are divided by, and whether one of them is infinite or nan. At
    # other times GradScaler wants them to be absent, or None.
    grad_scale: Tensor | None
    found_inf: Tensor | None = None

    # What `step_in_backward` returned, while it is on.
    in_backward: Any = None

    _norm_group: NormGroup | None = None
    _is_made_by_zero = False
    _are_swapped = False  # parameters and averages
    _tolerated_step: Any = None  # what schedulers of torch.optim had made of `step` when a schedule was set
    _loading: Any = None  # the state_dict that is being loaded

    def __init__(
        self,
        params: ParamsT,
        learning_rate: Hyperparameter | LearningRateSchedule = 0.001,
        rho: Hyperparameter = 0.95,
        epsilon: Hyperparameter | None = 1e-7,
        name: str = "Adadelta",
        *,
        lr: Hyperparameter | LearningRateSchedule | None = None,
        decay: float | Tensor = 0.0,
        clipvalue: float | None = None,
        clipnorm: float | None = None,
        global_clipnorm: float | None = None,
        gradient_aggregator: Callback | None = None,
        gradient_transformers: Iterable[Callback] | None = None,
        norm_group: Any = None,
        norm_variables: Iterable[Iterable[Any]] | None = None,
        weight_decay: Hyperparameter | None = None,
        decoupled_weight_decay: bool = True,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        gradient_accumulation_steps: int | None = None,
        loss_scale_factor: float | None = None,
        master_weights: bool = False,
        state_dtype: torch.dtype | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        given = locals()  # the arguments, by their names
        options.canonicalize(BY_NAME["name"], name)
        if lr is not None:
            if learning_rate != BY_NAME["learning_rate"].default:
                options.warn_of_two_rates(lr, learning_rate)
            given["learning_rate"] = lr
        defaults = {option.key: given[option.name] for option in OPTIONS} | options.new_metadata()
        self._sources = Sources(bind_group(defaults, {}, 0))
        self._callbacks = Callbacks(gradient_aggregator, gradient_transformers)
        self._callbacks.check_clip_options(defaults)
        self._partitions = PartitionCache()
        self._traced = compiled.TracedStep()
        self._norm_group = None if norm_group is None else NormGroup(norm_group)
        self._is_made_by_zero = distributed.is_made_by_zero()
        distributed.check_norm_group(self._norm_group, defaults, self._is_made_by_zero)
        super().__init__(params, defaults)
        if given["norm_variables"] is not None:
            self.norm_variables = given["norm_variables"]

    # ---- Param groups -------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group. Options that it does not set are the optimizer's defaults.

        Raises what the constructor raises, and then leaves the optimizer unchanged.

        Args:
            param_group (dict): the parameters, under the key ``params``, and the options of the group.
        """
        self._sync_groups()  # some may have been removed
        sources: dict[str, Source] = {}
        if isinstance(param_group, dict):
            param_group = dict(param_group)  # a callable in the user's own must stay there
            sources = self._complete_group(param_group)
        count = len(self.param_groups)
        try:
            super().add_param_group(param_group)
            group = self.param_groups[-1]
            self._sources.of_groups.append(sources)
            group["iterations"] = options.iterations_for(group, group["iterations"])
            for index, param in enumerate(group["params"]):
                validation.check_param(partial(validation.name_in, self.param_groups, count, index), param)
            validation.check_dtypes(self.param_groups, first=count)
            norm_variables.canonicalize(self.param_groups, self._norm_group is not None or self._is_made_by_zero)
            selection.check_params(group)
            options.warn_of_rho(group)
            self._sources.update_metadata(self.param_groups, self._callbacks, first=count)
        except BaseException:
            del self.param_groups[count:], self._sources.of_groups[count:], self._sources.snapshots[count:]
            raise

    def _complete_group(self, group: dict[str, Any]) -> dict[str, Source]:
        """Gives a new group the options that it lacks, checked; returns its schedules and callables."""
        if "eps" in group:
            raise ValueError(f"a param group has eps={group['eps']!r}; here the key is `epsilon`")
        rate = group.pop("learning_rate", None)
        if rate is not None and "lr" in group:
            options.warn_of_two_rates(group["lr"], rate)
        elif rate is not None:
            group["lr"] = rate
        own = {key: value for key, value in group.items() if key in self.defaults}
        first = self.param_groups[0] if self.param_groups else self.defaults
        for option in OPTIMIZER_WIDE:
            if own.setdefault(option.key, first[option.key]) != first[option.key]:
                raise ValueError(
                    f"{option.name} belongs to the whole optimizer, which has {first[option.key]!r}; a param group "
                    f"cannot have {own[option.key]!r}"
                )
        inherited = {key: source.given for key, source in self._sources.defaults.items()}
        group.update({**self.defaults, **options.new_metadata(), **inherited, **own})
        if self.param_groups:
            group["iterations"] = first["iterations"]
        return bind_group(group, self._sources.defaults, group.setdefault("iterations", 0))

    def _sync_groups(self) -> None:
        self._sources.sync(self.param_groups, self._callbacks)

    def _name_of(self, param: Tensor) -> str:
        return validation.name_of(self.param_groups, param)

    # ---- Checkpoints --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the optimizer as a dict of Tensors and plain Python values.

        A schedule is stored as its configuration. Callables, the aggregator and the transformers are stored by name
        only, and must be given to the optimizer that loads the state dict.

        Raises:
            RuntimeError: inside `swap_averages`.
        """
        self.check_not_swapped("no state_dict can be taken")
        self._sync_groups()
        self._sources.update_metadata(self.param_groups, self._callbacks)
        state_dict = super().state_dict()
        checkpoint.save_groups(state_dict.get("param_groups", ()))  # a hook may have returned something else
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of ``torch.optim.Adadelta``.

        The whole state dict is checked before anything is loaded. State entries that are not the optimizer's own are
        loaded, too: they keep their dtype, and Tensors move to the parameter's device.

        Args:
            state_dict (dict): what `state_dict` returned.

        Raises:
            ValueError: if groups or state do not fit, or if the optimizer lacks a callable, aggregator or transformer
                with which the state was saved.
            RuntimeError: inside `swap_averages`.
        """

        def note(optimizer: Any, state_dict: Any) -> None:
            self._loading = state_dict

        self.check_not_swapped("no state_dict can be loaded")
        hook = self.register_load_state_dict_pre_hook(note)  # the last one, which sees what the others have made of it
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
            self._loading = None

    def __getstate__(self) -> dict[str, Any]:
        self.check_not_swapped("no copy can be taken")
        self._sync_groups()
        self._sources.update_metadata(self.param_groups, self._callbacks)
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in _OWN_ATTRIBUTES}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes what pickle, deepcopy, `load_state_dict` and users restore, a part of it or all, once it is checked."""
        known = {"_sources": Sources({}), "_callbacks": Callbacks(None, None), "state": {}, **self.__dict__, **state}
        groups, params = known["param_groups"], known["state"]
        if not isinstance(known["_sources"], Sources):
            raise RuntimeError("the optimizer was pickled by version 0.1; pickle its state_dict() there, and load that")
        sources: Sources = known["_sources"].copy()
        if "param_groups" in state:
            previous = self.__dict__.get("param_groups", [])
            if any("eps" in group for group in groups):
                checkpoint.convert_torch_adadelta(groups, params, previous)
            known["_callbacks"].check_known(groups)
            sources.of_groups = checkpoint.restore_groups(groups, known["defaults"], sources, previous)
            exclusions.check(groups)
            is_part = known.get("_norm_group") is not None or known.get("_is_made_by_zero", False)
            norm_variables.canonicalize(groups, is_part)
            if not is_part:  # others may have the sums
                accumulation.check_pending(groups, params)
            for group in groups[:1]:
                known["_callbacks"].check_clip_options(group)
        for group_index, group in enumerate(groups):
            for index, param in enumerate(group["params"]):
                checkpoint.check_state(validation.name_in(groups, group_index, index), param, params.get(param))
        if "defaults" not in state:  # which a copy of the whole has
            checkpoint.take_over(params, groups, self._loading)
        super().__setstate__({**state, "_sources": sources, "_callbacks": known["_callbacks"]})
        self._partitions, self._traced = PartitionCache(), compiled.TracedStep()
        self._sources.snapshots = []
        self._sources.update_metadata(self.param_groups, self._callbacks)

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """A context that an exception leaves with param groups, options and state as they were when it was entered."""
        groups, own = list(self.param_groups), [dict(group) for group in self.param_groups]
        defaults, state, sources = dict(self.defaults), dict(self.state), self._sources.copy()
        try:
            yield
        except BaseException:
            for group, was in zip(groups, own, strict=True):
                group.clear()
                group.update(was)
            self.param_groups[:] = groups
            self.defaults.clear()
            self.defaults.update(defaults)
            self.state.clear()
            self.state.update(state)
            self._sources = sources
            self._sources.update_metadata(self.param_groups, self._callbacks)
            raise

    # ---- Options ------------------------------------------------------------------------------------------------

    def _get(self, option: Option) -> Any:
        self._sync_groups()
        source = self._sources.of_groups[0].get(option.key)
        return self.param_groups[0][option.key] if source is None else source.given

    def _set(self, option: Option, value: Any) -> None:
        if option.kind is Kind.HYPERPARAMETER:
            self._set_hyperparameter(option, value)
        elif option.kind in (Kind.FLAG, Kind.DTYPE):
            self._set_in_groups(option, value)
        else:
            self._set_wide(option, value)

    def _set_hyperparameter(self, option: Option, value: Any) -> None:
        self._sync_groups()
        bound: list[tuple[dict[str, Any], dict[str, Source], dict[str, Any], Source | None]] = []
        all_sources = (self._sources.defaults, *self._sources.of_groups)
        for group, sources in zip((self.defaults, *self.param_groups), all_sources, strict=True):
            new = {option.key: value, **options.new_metadata()}
            source = bind_hyperparameter(new, option, None, self.iterations)
            bound.append((group, sources, new, source))
            number = new[option.key] if source is None else None
            options.check_combinations({**group, option.key: number})
            options.warn_of_rho({**group, option.key: number})
        for group, sources, new, source in bound:
            group[option.key] = new[option.key]
            if option.takes_schedule:
                group["schedule"] = new["schedule"]
            sources.pop(option.key, None)
            if source is not None:
                sources[option.key] = source
        if option.takes_schedule:
            self._tolerated_step = self.__dict__.get("step")
        self._sources.update_metadata(self.param_groups, self._callbacks)

    def _set_wide(self, option: Option, value: Any) -> None:
        new = {number.key: self.param_groups[0][number.key] for number in OPTIMIZER_WIDE} | {option.key: value}
        options.canonicalize_wide(new)
        self._callbacks.check_clip_options(new)
        distributed.check_norm_group(self._norm_group, new, self._is_made_by_zero)
        validation.check_dtypes([{**group, **new} for group in self.param_groups])
        for group in self.param_groups:
            options.check_combinations({**group, **new})
        if option.key == "gradient_accumulation_steps":
            self._check_nothing_pending(f"gradient_accumulation_steps={value!r}")
            accumulation.check_pending([{**self.param_groups[0], **new}], {})
        if option.key == "use_ema" and not self.param_groups[0]["use_ema"]:  # averages of before are none any more
            for state in self.state.values():
                state.pop(averages.KEY, None)
        for group in (self.defaults, *self.param_groups):
            group[option.key] = new[option.key]

    def _set_in_groups(self, option: Option, value: Any) -> None:
        value = options.canonicalize(option, value)
        new = [{**group, option.key: value} for group in self.param_groups]
        for group in new:
            options.check_combinations(group)
            options.warn_of_rho(group)
        validation.check_dtypes(new)
        if option.key in ("master_weights", "state_dtype"):
            precision.convert_state(new, self.state)
        for group in (self.defaults, *self.param_groups):
            group[option.key] = value

    learning_rate = _option(
        "learning_rate",
        """The learning rate of the first param group, as given (a number, Tensor, callable or schedule).

        Setting it sets all groups and replaces a schedule.
        """,
    )
    lr = _option("learning_rate", "Another name for `learning_rate`.")
    rho = _option("rho", "The decay rate of the first param group, as given. Setting it sets all groups.")
    epsilon = _option(
        "epsilon",
        "The epsilon of the first param group, as given. None and 0 read as 1e-7. Setting it sets all groups.",
    )
    weight_decay = _option(
        "weight_decay",
        "The weight decay of the first param group, as given. None reads as 0.0. Setting it sets all groups.",
    )
    decoupled_weight_decay = _option(
        "decoupled_weight_decay",
        "Whether weight decay is subtracted from parameters, not added to gradients. Setting it sets all groups.",
    )
    decay = _option("decay", "Divides the learning rate of step t, counted from 0, by ``1 + decay * t``. Can be set.")
    clipvalue = _option("clipvalue", "The largest absolute value of a gradient's elements, or None. Can be set.")
    clipnorm = _option("clipnorm", "The largest norm of each gradient, or None. Can be set.")
    global_clipnorm = _option("global_clipnorm", "The largest norm of all gradients together, or None. Can be set.")
    use_ema = _option("use_ema", "Whether the optimizer keeps moving averages of the parameters. Can be set.")
    ema_momentum = _option("ema_momentum", "The momentum of the moving averages. Can be set.")
    ema_overwrite_frequency = _option(
        "ema_overwrite_frequency",
        "The parameters are overwritten by their averages after every so many updates, or never if None. Can be set.",
    )
    gradient_accumulation_steps = _option(
        "gradient_accumulation_steps",
        """The number of steps whose gradients make one update, or None.

        Can be set unless accumulated gradients wait for their update.
        """,
    )
    loss_scale_factor = _option("loss_scale_factor", "Divides all gradients first, or None. Can be set.")
    master_weights = _option(
        "master_weights",
        """Whether bfloat16 parameters have float32 masters.

        Setting it sets all groups. True initializes the masters from the parameters; False drops the remainders.
        """,
    )
    state_dtype = _option(
        "state_dtype",
        """The dtype of `square_avg` and `acc_delta`, or None for that of the parameters.

        Setting it sets all groups and converts the state.
        """,
    )

    @property
    def name(self) -> str:
        """The name of the optimizer."""
        return self.param_groups[0]["optimizer_name"]

    @property
    def gradient_aggregator(self) -> Callback | None:
        """The function that combines the gradients before they are clipped, or None. Can be set."""
        return self._callbacks.aggregator

    @gradient_aggregator.setter
    def gradient_aggregator(self, value: Callback | None) -> None:
        self._set_callbacks(Callbacks(value, self._callbacks.transformers))

    @property
    def gradient_transformers(self) -> list[Callback]:
        """The functions that transform the gradients after the aggregator, in order. Can be set."""
        return self._callbacks.transformers

    @gradient_transformers.setter
    def gradient_transformers(self, value: Iterable[Callback] | None) -> None:
        self._set_callbacks(Callbacks(self._callbacks.aggregator, value))

    def _set_callbacks(self, callbacks: Callbacks) -> None:
        callbacks.check_clip_options(self.param_groups[0])
        self._sync_groups()
        self._callbacks = callbacks
        self._sources.update_metadata(self.param_groups, self._callbacks)

    @property
    def norm_group(self) -> Any:
        """The process group over which `global_clipnorm` takes its norm, "world", or None. Can be set."""
        return None if self._norm_group is None else self._norm_group.given

    @norm_group.setter
    def norm_group(self, value: Any) -> None:
        norm_group = None if value is None else NormGroup(value)
        distributed.check_norm_group(norm_group, self.param_groups[0], self._is_made_by_zero)
        norm_variables.check(self.param_groups, norm_group is not None or self._is_made_by_zero)
        self._norm_group = norm_group

    def exclude_from_weight_decay(
        self, var_list: Iterable[Tensor] | None = None, var_names: Iterable[str] | None = None
    ) -> None:
        """Excludes parameters from weight decay. A later call replaces the exclusions of an earlier one.

        Args:
            var_list (iterable of Tensor, optional): the parameters to exclude. (default: None)
            var_names (iterable of str, optional): regular expressions. A parameter is excluded if one of them is found
                in its name. They need an optimizer that was constructed with ``model.named_parameters()``.
                (default: None)

        Raises:
            TypeError: if an argument has the wrong type.
            ValueError: if a step was taken already, if a parameter is not one of the optimizer's, or if names are
                needed and missing.
        """
        if int(self.iterations) or any(map(has_state, self.state.values())):
            raise ValueError(
                "exclude_from_weight_decay must be called before the first step. Give the parameters a param group "
                "with weight_decay=0 instead"
            )
        if self._is_made_by_zero:
            raise ValueError(
                "exclude_from_weight_decay is not for ZeroRedundancyOptimizer, which keeps what it knows of param "
                "groups itself. Give the parameters a param group with weight_decay=0"
            )
        places = exclusions.find(self.param_groups, var_list, var_names)
        for group, own in zip(self.param_groups, places, strict=True):
            group[exclusions.KEY] = own

    @property
    def norm_variables(self) -> list[list[tuple[Tensor, int, int]]] | None:
        """The Keras variables that do not correspond to exactly one parameter, or None. Can be set."""
        return norm_variables.given_in(self.param_groups)

    @norm_variables.setter
    def norm_variables(self, value: Any) -> None:
        norm_variables.set_in(self.param_groups, value, self._norm_group is not None or self._is_made_by_zero)

    @property
    def iterations(self) -> int:
        """The number of updates. Without gradient accumulation, it is the number of steps.

        Can be set to an int >= 0, unless accumulated gradients wait for their update.
        """
        return int(self.param_groups[0]["iterations"]) // accumulation.steps_of(self.param_groups[0])

    @iterations.setter
    def iterations(self, value: int) -> None:
        self._check_nothing_pending(f"iterations={value!r}")
        self.set_calls(options.checked_iterations(value) * accumulation.steps_of(self.param_groups[0]))

    def set_calls(self, value: int) -> None:
        """Sets the number of calls of `step`, ``gradient_accumulation_steps`` times that of updates."""
        counts = [options.iterations_for(group, value) for group in self.param_groups]
        for group, count in zip(self.param_groups, counts, strict=True):
            group["iterations"] = count

    def _check_nothing_pending(self, what: str) -> None:
        if accumulation.has_pending(self.param_groups[0]):
            raise ValueError(
                f"{what} cannot be set while gradients wait for their update: take "
                "the steps that are left of gradient_accumulation_steps first, or load other state"
            )

    # ---- Masters ------------------------------------------------------------------------------------------------

    def master_params(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields each parameter with its master, the tensor that the update sees.

        With ``master_weights=True``, the master of a bfloat16 parameter is a new float32 Tensor. All other parameters
        are their own masters, and are yielded detached.

        Example:
            >>> param = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
            >>> optimizer = AdadeltaKeras([param], master_weights=True)
            >>> for param, master in optimizer.master_params():
            ...     print(param.dtype, master.dtype)
            torch.bfloat16 torch.float32
        """
        for group in self.param_groups:
            for param in group["params"]:
                if selection.is_lazy(param):  # and has no values yet
                    continue
                remainder = precision.remainder_in(group, param, self.state)
                master = masters.master_of(param, remainder)
                is_whole = remainder is not None or not precision.needs_remainder(group, param)
                yield param, master if is_whole else master.float()

    def set_master(self, param: Tensor, value: Tensor) -> None:
        """Sets a parameter and its master, which keeps the value in float32, from one Tensor.

        Args:
            param (Tensor): a parameter of the optimizer.
            value (Tensor): the new value, in the shape of the parameter and any dtype.

        Raises:
            KeyError: if `param` is not a parameter of the optimizer.
            ValueError: if the shapes differ, or if only one of the two is a DTensor.
            RuntimeError: inside `swap_averages`.
        """
        self.check_not_swapped("no master can be set")
        group = precision.group_of(self.param_groups, param)
        ours, theirs = (f"{type(x).__name__} of shape {tuple(x.shape)}" for x in (param, value))
        if value.shape != param.shape or dtensor.is_dtensor(value) is not dtensor.is_dtensor(param):
            raise ValueError(f"{self._name_of(param)} is a {ours}, and its master cannot be a {theirs}")
        (value,) = dtensor.aligned([param], [value])
        masters.set_master(param, self._remainder_of(group, param), value)

    def _remainder_of(self, group: dict[str, Any], param: Tensor) -> Tensor | None:
        """What a parameter lacks of its master, made if it is missing; None if it is its own."""
        return (
            precision.remainder_of(param, self.state, self.state) if precision.needs_remainder(group, param) else None
        )

    def initial_state(self, param: Tensor, key: str) -> Tensor:
        """Returns the value with which a step begins if the parameter has no state under this key yet."""
        group = precision.group_of(self.param_groups, param)
        if key == averages.KEY:
            return averages.new_average(param, precision.remainder_in(group, param, self.state))
        return accumulation.new_sum(param) if key == accumulation.KEY else precision.new_state(group, param)[key]

    # ---- Averages -----------------------------------------------------------------------------------------------

    def _averages(self) -> list[tuple[Tensor, Tensor | None, Tensor]]:
        """Each parameter with an average, its remainder if it has one, and the average."""
        return [
            (param, self._remainder_of(group, param), self.state[param][averages.KEY])
            for group in self.param_groups
            for param in group["params"]
            if averages.KEY in self.state.get(param, {})
        ]

    def finalize_variable_values(self, var_list: Iterable[Tensor] | None = None) -> None:
        """Overwrites parameters with their averages, as Keras' `fit` does at its end. Does nothing without `use_ema`.

        Under FSDP2, call ``model.reshard()`` afterwards: the model may still hold its unsharded parameters.

        Args:
            var_list (iterable of Tensor, optional): the parameters to overwrite, or None for all. Parameters without an
                average stay unchanged. (default: None)

        Raises:
            TypeError: if `var_list` is not a list of Tensors.
            ValueError: if `var_list` has a Tensor that is not a parameter of the optimizer.
            RuntimeError: inside `swap_averages`, and under ZeroRedundancyOptimizer, whose other processes would not see
                the change.
        """
        wanted = None if var_list is None else exclusions.known_ids(self.param_groups, var_list)
        if not self.use_ema:
            return
        self._check_averages_are_here("finalize_variable_values")
        for param, remainder, average in self._averages():
            if wanted is None or id(param) in wanted:
                masters.set_master(param, remainder, average)

    @contextmanager
    def swap_averages(self) -> Iterator[None]:
        """Returns a context manager that swaps parameters and averages, to evaluate a model with its averages.

        On exit, also after an exception, both are restored to the bit. Inside, no step can be taken and nothing can be
        saved or loaded. Under FSDP2, call ``model.reshard()`` at the beginning and at the end of the context: the model
        may still hold its unsharded parameters.

        Raises:
            ValueError: without `use_ema`.
            RuntimeError: inside another `swap_averages`, and under ZeroRedundancyOptimizer, whose other processes would
                not see the change.

        Example:
            >>> param = torch.nn.Parameter(torch.ones(3))
            >>> optimizer = AdadeltaKeras([param], learning_rate=1.0, use_ema=True)
            >>> param.grad = torch.ones(3)
            >>> optimizer.step()
            >>> with optimizer.swap_averages():
            ...     loss = param.sum()
        """
        if not self.use_ema:
            raise ValueError("swap_averages needs averages: make the optimizer with use_ema=True")
        if self._are_swapped:
            raise RuntimeError("swap_averages is on already")
        self._check_averages_are_here("swap_averages")
        rows = self._averages()
        kept: Any = [[None if tensor is None else tensor.detach().clone() for tensor in row] for row in rows]
        own = [masters.master_of(param, remainder) for param, remainder, _ in kept]
        self._are_swapped = True
        try:
            for (param, remainder, average), master in zip(rows, own, strict=True):
                masters.set_master(param, remainder, average)
                average.copy_(master)
            yield
        finally:
            for row, before in zip(rows, kept, strict=True):
                _restore(row, before)
            self._are_swapped = False

    def check_not_swapped(self, what: str) -> None:
        """Raises RuntimeError inside `swap_averages`."""
        if self._are_swapped:
            raise RuntimeError(f"{what} inside of swap_averages: the parameters are the averages now. Leave it first")

    def _check_averages_are_here(self, what: str) -> None:
        self.check_not_swapped(f"{what} cannot be called")
        if self._is_made_by_zero:
            raise RuntimeError(
                f"{what} would change the parameters of this process only: ZeroRedundancyOptimizer spreads them over "
                "several. Use ema_overwrite_frequency, or DistributedDataParallel without it"
            )

    def scale_loss(self, loss: Any) -> Any:
        """Returns ``loss * loss_scale_factor``, or the loss unchanged if `loss_scale_factor` is None."""
        return loss if self.loss_scale_factor is None else loss * self.loss_scale_factor

    # ---- The step -----------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs a single optimization step.

        Every parameter that has a gradient is updated, and `iterations` advances. If no parameter has a gradient,
        nothing happens and the step is not counted. A step that raises changes nothing, unless it is interrupted or
        runs out of memory during its writes. The message then says that the step is partial.

        Args:
            closure (Callable, optional): a closure that reevaluates the model and returns the loss. It is called once,
                with gradients enabled. (default: None)

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: if a gradient or a state does not fit its parameter, if ``foreach=True`` or ``fused=True``
                cannot run, or inside `swap_averages`.
            IndexError: if an index of a sparse gradient is out of range.
            ValueError: if a hyperparameter in a param group is out of range.
            TypeError: if a hyperparameter in a param group has the wrong type.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if _is_compiling():
            compiled.step(self, is_plain=self._is_traceable())
        else:
            self._take_step()
        return loss

    def _take_step(self) -> None:
        grad_enabled = torch.is_grad_enabled()
        try:
            torch._C._set_grad_enabled(False)  # the function behind torch.no_grad
            plan = planning.plan(self.step_request())  # may raise, and writes nothing
            if plan is not None:
                execution.run_plan(plan)
        finally:
            torch._C._set_grad_enabled(grad_enabled)

    def step_request(self) -> StepRequest:
        """Returns all that a step depends on, for `step/`."""
        if self._are_swapped:
            self.check_not_swapped("no step can be taken")
        return StepRequest(
            self.param_groups,
            self.state,
            self._sources,
            self._callbacks,
            self._partitions,
            self._explicit,
            getattr(self, "grad_scale", None),
            self.found_inf,
            self._norm_group,
            self._is_made_by_zero,
            self._has_scheduler,
            self.step_request,
        )

    def _is_traceable(self) -> bool:
        return (
            self._explicit is None
            and not self._callbacks.transformers
            and self._norm_group is None
            and not self._are_swapped
            and self.found_inf is None
            and (self.param_groups[0]["clipnorm"] is None or not norm_variables.any_in(self.param_groups))
            and getattr(self, "grad_scale", None) is None
        )

    def _has_scheduler(self) -> bool:
        # A scheduler attached before a schedule was set may be gone, but what it made of `step` stays.
        is_attached = self.__dict__.get("step") is not self._tolerated_step
        return is_attached and getattr(self.step, "_wrapped_by_lr_sched", False)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells GradScaler to leave unscaling, and skipping what is not finite, to the fused update."""
        if self.in_backward is not None:
            raise RuntimeError(
                "step_in_backward applies gradients as soon as they are there, when no GradScaler has unscaled them "
                "yet: the parameters were updated with scaled gradients. Use bfloat16, which needs no scaler, or "
                "call step()"
            )
        if options.counts_on_host(self.param_groups[0]) is not None:
            return False  # the host must know whether a step is skipped
        return all(group["fused"] for group in self.param_groups)

    @torch._disable_dynamo
    def untraced_step(self) -> None:
        """Takes a step that `torch.compile` cannot trace, after a graph break."""
        self._take_step()

    def _init_group(self, *arguments: Any) -> int:
        """What `torch.compile` runs while it traces, by this name, with the real tensors; see step/compiled.py."""
        return self._traced.init_group(self.step_request(), *arguments)
