"""AdadeltaKeras: constructor, param groups, properties, checkpoints, and a `step()` that leaves the work to `step/`."""

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
    r"""Adadelta, computed exactly as ``tf.keras.optimizers.Adadelta`` of TensorFlow 2.4 computes it.

    For the gradient :math:`g_t` and the parameter :math:`\theta`, with :math:`a_0 = u_0 = 0`:

    .. math::
        a_t &= \rho\, a_{t-1} + (1 - \rho)\, g_t^2 \\
        d_t &= \sqrt{u_{t-1} + \epsilon}\, \frac{1}{\sqrt{a_t + \epsilon}}\, g_t \\
        u_t &= \rho\, u_{t-1} + (1 - \rho)\, d_t^2 \\
        \theta_t &= \theta_{t-1} - \text{lr}\, d_t

    :math:`a` is ``state[param]["square_avg"]`` (``accum_grad`` in Keras), :math:`u` is ``state[param]["acc_delta"]``
    (``accum_var``); both have the parameter's shape and layout and, without ``state_dtype``, its dtype, and appear when
    it first has a gradient. The arithmetic runs in float64 for float64 (and complex128) parameters, else in float32;
    16-bit parameters and state are rounded once, when they are stored. Complex parameters are pairs of reals. All
    implementations give the same bits.

    Args:
        params: parameters, named parameters or param groups, as for every ``torch.optim`` optimizer. A group may set
            ``lr`` (or ``learning_rate``), ``rho``, ``epsilon``, weight decay and the flags for itself.
        learning_rate: the factor lr: a number >= 0, a one-element Tensor, a callable without arguments that returns one
            of them, or a `schedules.LearningRateSchedule`. The default is that of Keras; the paper and
            ``torch.optim.Adadelta`` use 1.0.
        rho: the decay rate of both averages, in [0, 1]: a number, a one-element Tensor or a callable.
        epsilon: added under both roots: a number >= 0, a one-element Tensor or a callable. None and 0 mean 1e-7, as in
            Keras.
        name: the name of the optimizer, as Keras keeps it in its configuration.
        lr: another name for ``learning_rate``; wins if both are given.
        decay: the learning rate of step t, counted from 0, is divided by ``1 + decay * t``; a number >= 0 or a
            one-element Tensor on the CPU.
        clipvalue: every element of a gradient is clipped to [-clipvalue, clipvalue]; a number >= 0 or None.
        clipnorm: a gradient whose norm exceeds this is scaled down to it, each by itself; a number >= 0 or None.
        global_clipnorm: all gradients are scaled together so that their common norm does not exceed this; a number >= 0
            or None. Not together with ``clipnorm``.
        gradient_aggregator: called once a step with a list of (gradient, parameter) tuples, and returns the like: to
            combine gradients between processes, before they are clipped. `distributed.all_reduce_sum` is a ready one.
        gradient_transformers: callables like the aggregator, called in their order after it. Not together with a clip
            option.
        norm_group: a process group, or "world" for the default one, each of whose processes has another part of the
            parameters, as under ``ZeroRedundancyOptimizer``: the norm of ``global_clipnorm`` is taken over all of them,
            and all count the step if one of them has gradients. Every process then must make every step. It is not for
            DDP, where each process has all gradients, nor for DTensors, which know where their parts are.
        norm_variables: for `clipnorm`, the variables of Keras that are not one to one with parameters: lists of pieces
            that have one norm together, each a parameter or (parameter, first row, row behind the last).
        weight_decay: the parameter is decayed by ``weight_decay * lr`` of itself before it is updated, as in Keras 3: a
            number >= 0, a one-element Tensor or a callable. 0 and None mean none. A parameter without a gradient does
            not decay; see `exclude_from_weight_decay`.
        decoupled_weight_decay: False adds ``weight_decay`` times the parameter to its gradient instead, as
            ``torch.optim.Adadelta`` does. Not together with a clip option, and not for sparse gradients.
        use_ema: keep a moving average of each parameter that requires a gradient, as Keras 3 does: after every step
            ``average = ema_momentum * average + (1 - ema_momentum) * param``. It is ``state[param]["average"]``, in the
            dtype of the arithmetic. See `swap_averages` and `finalize_variable_values`.
        ema_momentum: in [0, 1]. In the first step it counts as 0: the average begins as the updated parameter.
        ema_overwrite_frequency: after every so many updates the parameters become their averages; an int >= 1 or None.
        gradient_accumulation_steps: update once in so many steps, with the mean of their gradients; an int >= 2 or
            None. The sums are ``state[param]["gradient_accumulator"]``. `iterations` counts updates,
            ``param_groups[0]["iterations"]``, which schedules see, steps.
        loss_scale_factor: what gradients are divided by before anything else; a number > 0 or None. See `scale_loss`.
        master_weights: let a bfloat16 parameter be the upper half of a float32 master, on which the update runs, and
            keep the lower one in ``state[param]["remainder"]`` (int16). Parameters of float32 and float64 are their
            own masters. Not for parameters of float16 and complex ones. See `master_params` and `to_bfloat16`.
        state_dtype: the dtype of ``square_avg`` and ``acc_delta``: ``torch.float32``, ``torch.bfloat16``, or None for
            that of the parameter. Not for parameters of float64 and complex ones.
        maximize: ascend instead of descend.
        foreach: True for PyTorch's multi-tensor operations, False for single-tensor operations, None for the best that
            applies.
        fused: True for the compiled kernel, False to do without it, None to use it where it applies.
        capturable: keep ``iterations`` on the parameters' device, so that ``step()`` can be captured in a CUDA graph.
        differentiable: let autograd record ``step()``, which then runs single-tensor operations.

    A sparse gradient (``torch.sparse_coo``, as of ``nn.Embedding(..., sparse=True)``) updates the rows that occur in
    it, and leaves all others of the parameter and its state as they are. Weight decay and averages are of all rows.

    A Python number for ``learning_rate``, ``rho`` or ``decay`` is rounded to float32 first, as Keras does, whatever the
    dtype of the parameters; a Tensor or NumPy scalar keeps its precision. Other options are not rounded. A callable is
    called once in each step that updates. Aggregator and transformers see gradients in the opmath dtype and may
    overwrite them: they are copies. ``.grad`` is never written to.

    Raises:
        TypeError: an argument of the wrong type, a parameter that is neither floating-point nor complex.
        ValueError: a hyperparameter that is negative, nan, infinite or out of range; options that exclude each other; a
            parameter that is sparse, overlaps itself, or is in two groups; ``clipvalue`` for a complex parameter.
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
        """Adds a param group, whose missing options are the optimizer's defaults.

        Raises what the constructor raises, and then leaves the optimizer as it was.
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
        """The state as a dictionary of Tensors and plain Python values, as of every ``torch.optim`` optimizer.

        A schedule is in it as its configuration. Of callables, the aggregator and the transformers it holds the names:
        the optimizer that loads it must have been given them.
        """
        self.check_not_swapped("no state_dict can be taken")
        self._sync_groups()
        self._sources.update_metadata(self.param_groups, self._callbacks)
        state_dict = super().state_dict()
        checkpoint.save_groups(state_dict.get("param_groups", ()))  # a hook may have returned something else
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, or a checkpoint of ``torch.optim.Adadelta``.

        All of it is checked before anything is taken over. What others keep in the state of a parameter comes along:
        its dtype stays, and Tensors move to the parameter's device.

        Raises:
            ValueError: groups or state do not fit, or something that cannot be saved was not given beforehand.
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
        """The learning rate of the first param group as it was given: a number, Tensor, callable or schedule.

        Setting it sets all groups, and replaces a schedule.
        """,
    )
    lr = _option("learning_rate", "Another name for `learning_rate`.")
    rho = _option("rho", "The decay rate of the first param group as it was given. Setting it sets all groups.")
    epsilon = _option(
        "epsilon",
        "The epsilon of the first param group as it was given, 1e-7 for None and 0. Setting it sets all groups.",
    )
    weight_decay = _option(
        "weight_decay",
        "The weight decay of the first param group as it was given, 0.0 for None. Setting it sets all groups.",
    )
    decoupled_weight_decay = _option(
        "decoupled_weight_decay",
        "Whether weight decay is taken off the parameters, not added to their gradients. Setting it sets all groups.",
    )
    decay = _option("decay", "The learning rate of step t, counted from 0, is divided by 1 + decay * t. Can be set.")
    clipvalue = _option("clipvalue", "The largest absolute value of an element of a gradient, or None. Can be set.")
    clipnorm = _option("clipnorm", "The largest norm of each gradient, or None. Can be set.")
    global_clipnorm = _option("global_clipnorm", "The largest norm of all gradients together, or None. Can be set.")
    use_ema = _option("use_ema", "Whether there are moving averages of the parameters. Can be set.")
    ema_momentum = _option("ema_momentum", "What a moving average is multiplied by in each step. Can be set.")
    ema_overwrite_frequency = _option(
        "ema_overwrite_frequency", "In how many updates parameters become their averages once, or None. Can be set."
    )
    gradient_accumulation_steps = _option(
        "gradient_accumulation_steps",
        """The number of steps whose gradients make one update, or None.

        Can be set when no gradients wait for their update.
        """,
    )
    loss_scale_factor = _option("loss_scale_factor", "What gradients are divided by first, or None. Can be set.")
    master_weights = _option(
        "master_weights",
        """Whether bfloat16 parameters have float32 masters.

        Setting it sets all groups: the masters begin as the parameters, or what they have more than these is dropped.
        """,
    )
    state_dtype = _option(
        "state_dtype",
        """The dtype of `square_avg` and `acc_delta`, or None for that of the parameters.

        Setting it sets all groups, and converts the state.
        """,
    )

    @property
    def name(self) -> str:
        """The name of the optimizer."""
        return self.param_groups[0]["optimizer_name"]

    @property
    def gradient_aggregator(self) -> Callback | None:
        """What combines the gradients before they are clipped, or None. Can be set."""
        return self._callbacks.aggregator

    @gradient_aggregator.setter
    def gradient_aggregator(self, value: Callback | None) -> None:
        self._set_callbacks(Callbacks(value, self._callbacks.transformers))

    @property
    def gradient_transformers(self) -> list[Callback]:
        """What changes the gradients after they were aggregated, in this order. Can be set."""
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
        """The process group over which the norm of `global_clipnorm` is taken, "world", or None. Can be set."""
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
        """Excludes parameters from weight decay, and no others: a later call replaces an earlier one.

        Args:
            var_list: parameters.
            var_names: regular expressions, which are searched in the names of the parameters. These are known if the
                optimizer was given ``model.named_parameters()``.

        Raises:
            TypeError: an argument is of another type.
            ValueError: a step was taken already; a parameter is none of the optimizer's; parameters have no names.
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
        """The variables of Keras that are not one to one with parameters, or None if all are. Can be set."""
        return norm_variables.given_in(self.param_groups)

    @norm_variables.setter
    def norm_variables(self, value: Any) -> None:
        norm_variables.set_in(self.param_groups, value, self._norm_group is not None or self._is_made_by_zero)

    @property
    def iterations(self) -> int:
        """The number of updates, which is that of the steps taken unless gradients are accumulated.

        Can be set to an int >= 0 when no gradients wait for their update.
        """
        return int(self.param_groups[0]["iterations"]) // accumulation.steps_of(self.param_groups[0])

    @iterations.setter
    def iterations(self, value: int) -> None:
        self._check_nothing_pending(f"iterations={value!r}")
        self.set_calls(options.checked_iterations(value) * accumulation.steps_of(self.param_groups[0]))

    def set_calls(self, value: int) -> None:
        """Sets how many times `step` was called, of which ``gradient_accumulation_steps`` make an iteration."""
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
        """Each parameter with its master: what the update sees of it.

        With ``master_weights=True`` that of a bfloat16 parameter is a new float32 Tensor. Else it is the parameter
        itself, detached.

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
        """Gives a parameter other values, which its master keeps in float32 if it has one.

        Args:
            param: one of the optimizer's parameters.
            value: of its shape, in any dtype.

        Raises:
            KeyError: it is none of them.
            ValueError: the shapes differ, or one of both is a DTensor.
            RuntimeError: inside of `swap_averages`.
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
        """What a step begins with, where a parameter has no state by this key yet."""
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
        """Sets parameters to their averages, as Keras' `fit` does in the end. Without `use_ema` it does nothing.

        Under FSDP2 call ``model.reshard()`` afterwards, for a model may have kept its unsharded parameters.

        Args:
            var_list: these parameters only; None for all. One without an average is left as it is.

        Raises:
            TypeError, ValueError: `var_list` is no list of the optimizer's parameters.
            RuntimeError: inside of `swap_averages`; or under ZeRO, which would have to tell other processes.
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
        """A context in which parameters and averages have changed places, to evaluate a model with its averages.

        Afterwards, and after an exception too, both are what they were, to the bit. No step can be taken inside, and
        nothing saved or loaded. Under FSDP2 call ``model.reshard()`` at the beginning and the end of the context, for a
        model may have kept its unsharded parameters.

        Raises:
            ValueError: without `use_ema`.
            RuntimeError: inside of another; or under ZeRO, which would have to tell other processes.

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
        """Raises RuntimeError inside of `swap_averages`."""
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
        """``loss * loss_scale_factor``, or the loss where there is none."""
        return loss if self.loss_scale_factor is None else loss * self.loss_scale_factor

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
            IndexError: a sparse gradient has an index that its parameter has not.
            ValueError, TypeError: a param group holds an invalid hyperparameter.
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
        """All that a step depends on, for `step/`."""
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
        """What `torch.compile` calls, after a break of the graph, where the step cannot be traced."""
        self._take_step()

    def _init_group(self, *arguments: Any) -> int:
        """What `torch.compile` runs while it traces, by this name, with the real tensors; see step/compiled.py."""
        return self._traced.init_group(self.step_request(), *arguments)
