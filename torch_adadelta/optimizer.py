"""AdadeltaKeras: param groups, state and `step()`. How an update is computed is the business of `update.py`."""

from collections.abc import Callable, Collection, Iterable
from functools import partial
from itertools import accumulate, chain, islice, repeat
from operator import is_, itemgetter
from typing import Any, Final, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from torch_adadelta import gradients, hyperparameters, ops, param_groups, shards, sparse, step_hooks
from torch_adadelta import update as updates
from torch_adadelta.arithmetic import arithmetic_dtypes
from torch_adadelta.buckets import NO_CLIP, Bucket, by_device, by_T, choose, clip_keywords, recording, split
from torch_adadelta.compiled import CompiledStep
from torch_adadelta.distributed import NormGroup
from torch_adadelta.gradients import Callback
from torch_adadelta.hyperparameters import Source
from torch_adadelta.keras_interface import KerasInterface
from torch_adadelta.schedules import LearningRateSchedule
from torch_adadelta.signature import Lists, Update

_HAS_CUDA: Final = torch.version.cuda is not None

# State of more elements is not held: what replaced it would wait in memory for the next step, and for large tensors it
# makes no difference to speed.
_MOST_HELD: Final = 2**22

_is_compiling, _count_dispatch_modes = torch.compiler.is_compiling, torch._C._len_torch_dispatch_stack

_get_square_avg, _get_acc_delta = itemgetter("square_avg"), itemgetter("acc_delta")

# Belongs to the whole optimizer, and is a key of every group because that is what a state_dict keeps.
_get_options = itemgetter(*hyperparameters.NUMBERS, "schedule", "callables")
_NO_OPTIONS: Final[Any] = (0.0, None, None, None, None, [])

# What pickle and deepcopy keep besides what every optimizer has.
_OWN_ATTRIBUTES: Final = (
    "_sources",
    "_default_sources",
    "_gradient_aggregator",
    "_gradient_transformers",
    "_norm_group",
    "_is_made_by_zero",
)

Hyperparameter = float | Tensor | Callable[[], Any]


_NewState = dict[Tensor, dict[str, Tensor]]

# What a source gave: the group, its key, the value.
_NewValue = tuple[dict[str, Any], str, Any, Source]

# A step, checked and ready to be written: the buckets, the keywords of `gradients.clip` for each, state that is new,
# what sources gave, and whether the one bucket is a fused call, which checks its own lists.
_Plan = tuple[Iterable[Bucket], Iterable[dict[str, Any]], _NewState, Iterable[_NewValue], bool]

# The step of a process that has nothing to update, while others have.
_COUNT_ONLY: Final[_Plan] = ((), (), {}, (), True)

# Parameters of one group, their gradients, and which number each has among all gradients of the step.
_Rows = tuple[list[Tensor], list[Tensor], list[int]]


class _IsMixed(Exception):
    """A group turned out to be on several devices, or to have sparse gradients, before anything was written."""


class AdadeltaKeras(CompiledStep, KerasInterface):
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
        maximize: ascend instead of descend.
        foreach: True for PyTorch's multi-tensor operations, False for the for-loop, None for the best that applies.
        fused: True for the compiled kernel, False to do without it, None to use it where it applies.
        capturable: keep ``iterations`` on the parameters' device, so that ``step()`` can be captured in a CUDA graph.
        differentiable: let autograd record ``step()``, which then runs the for-loop.

    A sparse gradient (``torch.sparse_coo``, as of ``nn.Embedding(..., sparse=True)``) updates the rows that occur in
    it, and leaves all others of the parameter and its state as they are.

    A Python number for ``learning_rate``, ``rho`` or ``decay`` is rounded to float32 first, as Keras does, whatever the
    dtype of the parameters; a Tensor or NumPy scalar keeps its precision. ``epsilon`` is not rounded. A callable is
    called once a step. Aggregator and transformers see gradients in the arithmetic type and may overwrite them: they
    are copies. ``.grad`` is never written to.

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

    # With this, in place of its own, PyTorch wraps the `step` of each class when its first instance is made.
    profile_hook_step = staticmethod(step_hooks.profile_hook_step)

    # Whether a group was seen whose parameters are on several devices, or that has sparse gradients. To ask each one at
    # each step costs too much.
    _groups_are_mixed = False

    # The state of the only bucket of a plain step on the CPU, as the compiled library knows it.
    _held_state: ops.HeldState | None = None

    # Set by GradScaler around a step: what the gradients are divided by, and whether one of them is infinite or nan. At
    # other times GradScaler wants them to be absent, or None.
    grad_scale: Tensor | None
    found_inf: Tensor | None = None

    # The schedules and callables of each group, by the group's key, and those that a new group would get.
    _sources: list[dict[str, Source]]
    _default_sources: dict[str, Source]
    _gradient_aggregator: Callback | None = None
    _gradient_transformers: list[Callback]
    _norm_group: NormGroup | None = None
    _is_made_by_zero = False
    _followed: list[param_groups.Followed]
    _in_backward: Any = None
    _tolerated_step: Any = None  # what schedulers of torch.optim had made of `step` when a schedule was set
    _has_callables = False  # whether there are any of those but transformers, which may be appended to their list

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
            "decay": decay,
            "clipvalue": clipvalue,
            "clipnorm": clipnorm,
            "global_clipnorm": global_clipnorm,
            "schedule": None,
            "callables": [],
        }
        self._sources = []
        self._default_sources = param_groups.normalise(defaults, {}, 0)
        self._gradient_aggregator = param_groups.checked_callback("gradient_aggregator", gradient_aggregator)
        self._gradient_transformers = param_groups.checked_transformers(gradient_transformers)
        param_groups.check_transformers(self._gradient_transformers, defaults)
        self._followed = []
        self._norm_group = None if norm_group is None else NormGroup(norm_group)
        self._is_made_by_zero = shards.is_made_by_zero()
        self._check_norm_group(defaults)
        super().__init__(params, defaults)

    # ---- Param groups -------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, whose missing options are the optimizer's defaults.

        Raises what the constructor raises, and then leaves the optimizer as it was.
        """
        sources: dict[str, Source] = {}
        if isinstance(param_group, dict):
            param_group = dict(param_group)  # a callable in the user's own must stay there
            param_groups.check_keys(param_group)
            own = {key: value for key, value in param_group.items() if key in self.defaults}
            if "learning_rate" in param_group:
                own.setdefault("lr", param_group["learning_rate"])
            inherited = {key: source.given for key, source in self._default_sources.items()}
            shared = self.param_groups[0] if self.param_groups else self.defaults
            for key in hyperparameters.NUMBERS:
                if own.setdefault(key, shared[key]) != shared[key]:
                    raise ValueError(
                        f"{key} belongs to the whole optimizer, which has {shared[key]!r}; a param group cannot have "
                        f"{own[key]!r}"
                    )
            options = {**self.defaults, "schedule": None, "callables": [], **inherited, **own}
            iterations = self.param_groups[0]["iterations"] if self.param_groups else param_group.get("iterations", 0)
            sources = param_groups.normalise(options, self._default_sources, iterations)
            param_group.pop("learning_rate", None)
            param_group.update(options, iterations=iterations)
        count = len(self.param_groups)
        try:
            super().add_param_group(param_group)
            group = self.param_groups[-1]
            self._sources.append(sources)
            group["iterations"] = param_groups.iterations_for(group, group["iterations"])
            for index, param in enumerate(group["params"]):
                updates.check_param(partial(param_groups.name_of, len(self.param_groups) - 1, group, index), param)
            param_groups.check_not_complex(self.param_groups, first=len(self.param_groups) - 1)
            if group["fused"] or group["foreach"]:
                for indices in by_device(group["params"]).values():
                    choose(group, [group["params"][i] for i in indices])
            self._name_callables(first=len(self.param_groups) - 1)
        except BaseException:
            del self.param_groups[count:], self._sources[count:], self._followed[count:]
            raise

    def __getstate__(self) -> dict[str, Any]:
        self._name_callables()
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in _OWN_ATTRIBUTES}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes what pickle, deepcopy and `load_state_dict` restore, once all of it has been checked."""
        known = {"_sources": [], "_default_sources": {}, **self.__dict__, **state}
        groups = state["param_groups"]
        if any("eps" in group for group in groups):
            param_groups.convert_torch_adadelta(groups, state["state"], self.__dict__.get("param_groups", []))
        callbacks = {
            key.removeprefix("_"): known.get(key) for key in ("_gradient_aggregator", "_gradient_transformers")
        }
        param_groups.check_callbacks(groups, callbacks)
        sources = []
        for index, group in enumerate(groups):
            for key, value in {**known["defaults"], "schedule": None, "callables": []}.items():
                group.setdefault(key, value)
            group.setdefault("iterations", 0)
            previous = known["_sources"][index] if index < len(known["_sources"]) else known["_default_sources"]
            sources.append(param_groups.normalise(group, previous, group["iterations"]))
            group["iterations"] = param_groups.iterations_for(group, group["iterations"])
        counts = {int(group["iterations"]) for group in groups}
        if len(counts) > 1:
            raise ValueError(f"the param groups disagree on iterations: {sorted(counts)}; they count the same steps")
        param_groups.check_agreement(groups)
        param_groups.check_not_complex(groups)
        param_groups.check_transformers(known.get("_gradient_transformers"), groups[0])
        for group_index, group in enumerate(groups):
            for index, param in enumerate(group["params"]):
                saved = state["state"].get(param)
                param_groups.check_state(param_groups.name_of(group_index, group, index), param, saved)
                if saved and "defaults" not in state:
                    # Optimizer.load_state_dict casts real state only, and hands over tensors that fit as they are: to
                    # keep them would be to write to the checkpoint, or to another optimizer's state.
                    state["state"][param] = {key: tensor.to(param.dtype, copy=True) for key, tensor in saved.items()}
        self._held_state = None
        super().__setstate__({**state, "_sources": sources, "_followed": []})
        self._name_callables()

    def _name_callables(self, first: int = 0) -> None:
        """Leaves in each group, from `first` on, the names of what was given and a state_dict cannot hold."""
        given = {
            "gradient_aggregator": self._gradient_aggregator is not None,
            "gradient_transformers": bool(self._gradient_transformers),
        }
        shared = [kind for kind, is_given in given.items() if is_given]
        self._has_callables = self._gradient_aggregator is not None or any(self._sources)
        del self._followed[first:]
        for group, sources in zip(self.param_groups[first:], self._sources[first:], strict=True):
            if _is_scheduled(sources):  # whose configuration may have changed
                config = param_groups.config_of(sources["lr"].given)
                group["schedule"] = group["schedule"] if group["schedule"] == config else config
            own = [source.name for key, source in sources.items() if key != "lr" or group["schedule"] is None]
            group["callables"] = group["callables"] if group["callables"] == shared + own else shared + own
            self._followed.append(param_groups.Followed(group, group["schedule"], group["callables"]))

    def _follow_groups(self) -> None:
        """Brings `_sources` in line with groups that were removed, or written to past the methods of this class."""
        followed = self._followed
        if len(followed) == len(self.param_groups) and all(
            was.is_current(group) for was, group in zip(followed, self.param_groups, strict=True)
        ):
            return
        known = {id(was.group): (was, sources) for was, sources in zip(followed, self._sources, strict=True)}
        taken: list[dict[str, Source]] = []
        for group in self.param_groups:
            if id(group) not in known:
                raise RuntimeError("param_groups was changed from outside; use add_param_group")
            was, sources = known[id(group)]
            if not was.is_current(group):
                callbacks: dict[str, Any] = {
                    "gradient_aggregator": self._gradient_aggregator,
                    "gradient_transformers": self._gradient_transformers,
                }
                param_groups.check_callbacks([group], callbacks)
                sources = param_groups.normalise(group, sources, group["iterations"])
                group["iterations"] = param_groups.iterations_for(group, group["iterations"])
            taken.append(sources)
        self._sources, self._followed = taken, []
        self._name_callables()

    def state_dict(self) -> dict[str, Any]:
        """The state as a dictionary of Tensors and plain Python values, as of every ``torch.optim`` optimizer.

        A schedule is in it as its configuration. Of callables, the aggregator and the transformers it holds the names:
        the optimizer that loads it must have been given them.
        """
        self._follow_groups()
        self._name_callables()
        state_dict = super().state_dict()
        names = {**param_groups.HYPERPARAMETERS, **{name: name for name in hyperparameters.NUMBERS}}
        for group in state_dict.get("param_groups", ()):  # a hook may have returned something else
            for key, name in names.items():
                group[key] = hyperparameters.as_saved(name, group[key])
        return state_dict

    # ---- Hyperparameters ----------------------------------------------------------------------------------------

    def _get(self, key: str) -> Any:
        self._follow_groups()
        source = self._sources[0].get(key)
        return self.param_groups[0][key] if source is None else source.given

    def _set(self, key: str, value: Any) -> None:
        self._follow_groups()
        taken: list[tuple[dict[str, Any], dict[str, Source], dict[str, Any], Source | None]] = []
        all_sources = (self._default_sources, *self._sources)
        for group, sources in zip((self.defaults, *self.param_groups), all_sources, strict=True):
            options: dict[str, Any] = {key: value, "schedule": None, "callables": []}
            taken.append((group, sources, options, param_groups.take(options, key, None, self.iterations)))
        for group, sources, options, source in taken:
            group[key] = options[key]
            if key == "lr":
                group["schedule"] = options["schedule"]
            sources.pop(key, None)
            if source is not None:
                sources[key] = source
        if key == "lr":
            self._tolerated_step = self.__dict__.get("step")
        self._name_callables()

    @property
    def learning_rate(self) -> Any:
        """The learning rate of the first param group as it was given: a number, Tensor, callable or schedule.

        Setting it sets all groups, and replaces a schedule.
        """
        return self._get("lr")

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        self._set("lr", value)

    @property
    def lr(self) -> Any:
        """Another name for `learning_rate`."""
        return self.learning_rate

    @lr.setter
    def lr(self, value: Any) -> None:
        self.learning_rate = value

    @property
    def rho(self) -> Any:
        """The decay rate of the first param group as it was given. Setting it sets all groups."""
        return self._get("rho")

    @rho.setter
    def rho(self, value: Any) -> None:
        self._set("rho", value)

    @property
    def epsilon(self) -> Any:
        """The epsilon of the first param group as it was given, 1e-7 for None and 0. Setting it sets all groups."""
        return self._get("epsilon")

    @epsilon.setter
    def epsilon(self, value: Any) -> None:
        self._set("epsilon", value)

    def _set_option(self, key: str, value: Any) -> None:
        options = {**{name: self.param_groups[0][name] for name in hyperparameters.NUMBERS}, key: value}
        param_groups.check_options(options)
        param_groups.check_transformers(self._gradient_transformers, options)
        self._check_norm_group(options)
        if key == "clipvalue":
            param_groups.check_not_complex([{**group, key: value} for group in self.param_groups])
        for group in (self.defaults, *self.param_groups):
            group[key] = options[key]

    @property
    def decay(self) -> float | Tensor:
        """The learning rate of step t, counted from 0, is divided by 1 + decay * t. Can be set."""
        return self.param_groups[0]["decay"]

    @decay.setter
    def decay(self, value: float | Tensor) -> None:
        self._set_option("decay", value)

    @property
    def clipvalue(self) -> float | None:
        """The largest absolute value of an element of a gradient, or None. Can be set."""
        return self.param_groups[0]["clipvalue"]

    @clipvalue.setter
    def clipvalue(self, value: float | None) -> None:
        self._set_option("clipvalue", value)

    @property
    def clipnorm(self) -> float | None:
        """The largest norm of each gradient, or None. Can be set."""
        return self.param_groups[0]["clipnorm"]

    @clipnorm.setter
    def clipnorm(self, value: float | None) -> None:
        self._set_option("clipnorm", value)

    @property
    def global_clipnorm(self) -> float | None:
        """The largest norm of all gradients together, or None. Can be set."""
        return self.param_groups[0]["global_clipnorm"]

    @global_clipnorm.setter
    def global_clipnorm(self, value: float | None) -> None:
        self._set_option("global_clipnorm", value)

    @property
    def gradient_aggregator(self) -> Callback | None:
        """What combines the gradients before they are clipped, or None. Can be set."""
        return self._gradient_aggregator

    @gradient_aggregator.setter
    def gradient_aggregator(self, value: Callback | None) -> None:
        self._gradient_aggregator = param_groups.checked_callback("gradient_aggregator", value)
        self._name_callables()

    @property
    def gradient_transformers(self) -> list[Callback]:
        """What changes the gradients after they were aggregated, in this order. Can be set."""
        return self._gradient_transformers

    @gradient_transformers.setter
    def gradient_transformers(self, value: Iterable[Callback] | None) -> None:
        transformers = param_groups.checked_transformers(value)
        param_groups.check_transformers(transformers, self.param_groups[0])
        self._gradient_transformers = transformers
        self._name_callables()

    @property
    def norm_group(self) -> Any:
        """The process group over which the norm of `global_clipnorm` is taken, "world", or None. Can be set."""
        return None if self._norm_group is None else self._norm_group.given

    @norm_group.setter
    def norm_group(self, value: Any) -> None:
        before = self._norm_group
        self._norm_group = None if value is None else NormGroup(value)
        try:
            self._check_norm_group(self.param_groups[0])
        except ValueError:
            self._norm_group = before
            raise

    def _check_norm_group(self, options: dict[str, Any]) -> None:
        if self._is_made_by_zero and self._norm_group is None and options["global_clipnorm"] is not None:
            raise ValueError(
                f"global_clipnorm={options['global_clipnorm']!r} needs the gradients of all parameters, and under "
                "ZeroRedundancyOptimizer each process has those of its own parameters only. Pass "
                'norm_group="world", or the process group, to take the norm over all processes; or use clipnorm, which '
                "takes each gradient by itself"
            )

    @property
    def iterations(self) -> int:
        """The number of steps taken. Can be set to an int >= 0."""
        return int(self.param_groups[0]["iterations"])

    @iterations.setter
    def iterations(self, value: int) -> None:
        counts = [param_groups.iterations_for(group, value) for group in self.param_groups]
        for group, count in zip(self.param_groups, counts, strict=True):
            group["iterations"] = count

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells GradScaler to leave unscaling, and skipping what is not finite, to the fused update."""
        if self._in_backward is not None:
            raise RuntimeError(
                "step_in_backward applies gradients as soon as they are there, when no GradScaler has unscaled them "
                "yet: the parameters were updated with scaled gradients. Use bfloat16, which needs no scaler, or "
                "call step()"
            )
        return all(group["fused"] for group in self.param_groups)

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
            IndexError: a sparse gradient has an index that its parameter has not.
            ValueError, TypeError: a param group holds an invalid hyperparameter.
        """
        if _is_compiling():
            return self._traced_step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            if self._apply_held():
                return loss
        except _IsMixed:
            self._groups_are_mixed = True
        grad_enabled = torch.is_grad_enabled()
        try:
            torch._C._set_grad_enabled(False)  # the function behind torch.set_grad_enabled
            try:
                self._apply()
            except _IsMixed:
                self._groups_are_mixed = True
                self._apply()
        finally:
            torch._C._set_grad_enabled(grad_enabled)
        return loss

    def _apply_held(self) -> bool:
        """Takes the step, if it is a single update with the state that is held, and returns whether it was: most are.

        It computes nothing that autograd might record.
        """
        plan = self._plan_held()
        if plan is None:
            return False
        group, update, lists, values = plan
        has_written = False
        try:
            update(*lists, *values, group["maximize"])
            has_written = True
            for group in self.param_groups:
                group["iterations"] += 1
        except BaseException as error:
            self._failed(error, ((plan,), repeat(NO_CLIP), {}, (), True), has_written)
            raise
        return True

    def _apply(self) -> None:
        plan = self._plan_plain()
        if plan is None:
            return
        buckets, clips, new_state, new_values, checks_itself = plan
        if checks_itself:  # there is one bucket, or, to count only, none
            buckets = [self._with_held_state(bucket) for bucket in buckets]
        if _HAS_CUDA and _is_capturing():
            self._check_capture(buckets, new_state)
        has_written = False
        versions = None
        try:
            if new_state:
                self.state.update(new_state)
            for (group, update, lists, values), clip in zip(buckets, clips, strict=False):
                if not checks_itself:
                    versions = None if has_written else _versions(update, lists)
                if group["differentiable"]:
                    with torch.enable_grad():
                        update(*lists, *values, group["maximize"], **clip)
                else:
                    update(*lists, *values, group["maximize"], **clip)
                has_written = True
            if has_written or plan is _COUNT_ONLY:
                for group in self.param_groups:
                    if self.found_inf is None:
                        group["iterations"] += 1  # in place where it is a Tensor
                    else:
                        _advance_unless(self.found_inf, group)
            _write_values(new_values)
        except BaseException as error:
            wrote_nothing = not has_written and versions is not None and versions == _versions(update, lists)
            self._failed(error, plan, has_written, wrote_nothing)
            raise

    def _failed(self, error: BaseException, plan: _Plan, has_written: bool, wrote_nothing: bool = False) -> None:
        """After the writing of a plan raised: undoes and explains what the first update refused; or says it is partial.

        `has_written`: whether an update has returned. `wrote_nothing`: whether it is known that none has written yet.
        """
        buckets, clips, new_state, _, checks_itself = plan
        is_fused = checks_itself or any(bucket[1] is updates.fused for bucket in islice(buckets, 1))
        may_be_refusal = isinstance(error, Exception) and not has_written and is_fused
        # A fused update writes nothing if it raises, which is a RuntimeError unless an argument was none at all.
        is_refusal = may_be_refusal and (
            (isinstance(error, RuntimeError) and _is_raised_by_op(error))
            or self._refuses(next(iter(buckets)), next(iter(clips)))
        )
        if is_refusal or wrote_nothing:
            for param in new_state:
                del self.state[param]
            if is_refusal and checks_itself:
                self._explain(next(iter(buckets)))
        else:
            _say_partial(error)

    def _finish_step(self, new_values: Iterable[_NewValue]) -> None:
        """Counts a step that was taken parameter by parameter."""
        for group in self.param_groups:
            group["iterations"] += 1
        _write_values(new_values)

    def _check_capture(self, buckets: Iterable[Bucket], new_state: _NewState) -> None:
        """Raises if what a CUDA graph captures of this step would do something else when it is replayed."""
        for index, group in enumerate(self.param_groups):
            for key, name in param_groups.HYPERPARAMETERS.items():
                if isinstance(group[key], Tensor) and group[key].device.type == "cpu":
                    raise RuntimeError(
                        f"step() is being captured in a CUDA graph, but {name} of group {index} is a Tensor on the "
                        "CPU, of which a graph keeps the number that it holds now. Give a Tensor on the device, or a "
                        "number"
                    )
            if not group["capturable"]:
                raise RuntimeError(
                    f"step() is being captured in a CUDA graph, but group {index} has capturable=False, so iterations "
                    "would stand still when it is replayed. Pass capturable=True"
                )
        for param in new_state:
            raise RuntimeError(
                f"step() is being captured in a CUDA graph, but {self._name_of(param)} has no state yet, which every "
                "replay would reset to zeros. Take a step before the capture"
            )
        for _, _, (params, *_), _ in buckets:
            if params[0].device.type == "cpu":
                raise RuntimeError(
                    f"step() is being captured in a CUDA graph, but {self._name_of(params[0])} is on the CPU, where no "
                    "replay would update it. Move it to the device, or leave it to another optimizer"
                )

    # ---- Planning a step, all of which may fail, before the first write -----------------------------------------

    def _is_plain(self) -> bool:
        """Whether this step is without callbacks, sources, gradients handed over, GradScaler and `norm_group`."""
        return not (
            self._has_callables
            or self._gradient_transformers
            or self._given is not None
            or self.found_inf is not None
            or "grad_scale" in self.__dict__
            or self._norm_group is not None
        )

    def _plan_held(self) -> Bucket | None:
        """The only bucket of a plain step without options, if all its state is held; else None."""
        held_state = self._held_state
        if held_state is None or self._groups_are_mixed or not self._is_plain():
            return None
        if _count_dispatch_modes() or (_HAS_CUDA and _is_capturing()):
            return None
        bucket: Bucket | None = None
        for group in self.param_groups:
            if _get_options(group) != _NO_OPTIONS:
                return None
            params, grads = _with_gradient(group)
            if not grads:
                continue
            if bucket is not None or not held_state.holds(self._states_of(params)):
                return None
            # As `updates.choose` does, which saw that the parameters are plain tensors before their state was held.
            foreach, fused = group["foreach"], group["fused"]
            if foreach or fused is False or (foreach is False and fused is None) or group["differentiable"]:
                return None
            lists = params, grads, held_state.square_avgs, held_state.acc_deltas
            values = hyperparameters.for_step(group["lr"], group["rho"], group["epsilon"])
            bucket = (group, held_state.adadelta_, lists, values)
        return bucket

    def _plan_plain(self) -> _Plan | None:
        """The plan of a step without clipping, decay, callbacks, sources or gradients handed over."""
        if not self._is_plain():
            return self._plan()
        buckets: list[Bucket] = []
        new_state: _NewState = {}
        for group in self.param_groups:
            if _get_options(group) != _NO_OPTIONS:
                return self._plan()
            params, grads = _with_gradient(group)
            if not grads:
                continue
            lists = self._with_state(params, grads, new_state)
            values = hyperparameters.for_step(group["lr"], group["rho"], group["epsilon"], group["differentiable"])
            buckets += split(group, lists, values, self._groups_are_mixed)
        if not buckets:
            return self._without_gradients()
        if new_state and self._makes_state_only():
            return (), (), new_state, (), False
        checks_itself = self._check_all(buckets, new_state)
        return buckets, repeat(NO_CLIP), new_state, (), checks_itself

    def _with_held_state(self, bucket: Bucket) -> Bucket:
        """A fused bucket with state on the CPU as one that need not hand that over anew, in this step and the next."""
        group, _, lists, values = bucket
        if _is_compiling() or _count_dispatch_modes():
            return bucket
        if self._held_state is not None and lists[2] is self._held_state.square_avgs:  # see _with_state
            return group, self._held_state.adadelta_, lists, values
        self._held_state = None
        if not lists[0][0].is_cpu:
            return bucket
        if not all(isinstance(tensor, Tensor) for tensor in chain(*lists[2:])) or not lists[2][0].is_cpu:
            return bucket
        try:
            if any(n > _MOST_HELD for n in accumulate(map(Tensor.numel, lists[2]))):
                return bucket
            self._held_state = ops.HeldState(*lists[2:])
        except RuntimeError as error:
            if not _is_raised_by_op(error):
                raise
            return bucket  # there is some that cannot be held; if no update can be with it, that will say which it is
        return group, self._held_state.adadelta_, lists, values

    def _without_gradients(self) -> _Plan | None:
        """The plan of a step that has nothing to update: none; but a part of an optimizer keeps count with the others.

        One without parameters is such a part, too.
        """
        is_part = self._is_made_by_zero or not any(group["params"] for group in self.param_groups)
        return _COUNT_ONLY if is_part else None

    def _numbered_plan(self) -> tuple[list[Bucket], list[list[int]], _NewState] | None:
        """The buckets of a step without callbacks and sources, and the numbers of their gradients, all checked.

        For `torch.compile`, which must know them while it traces.
        """
        if self._has_callables or self._gradient_transformers:
            raise RuntimeError("callables cannot be traced")
        plan = self._plan()
        if plan is None or plan is _COUNT_ONLY:
            return None
        buckets, _, new_state, _, _ = plan
        number_of = {
            id(param): number for params, _, where in self._rows() for param, number in zip(params, where, strict=True)
        }
        buckets = list(buckets)
        return buckets, [[number_of[id(param)] for param in bucket[2][0]] for bucket in buckets], new_state

    def _plan(self) -> _Plan | None:
        param_groups.check_agreement(self.param_groups)
        param_groups.check_options(self.param_groups[0])
        param_groups.check_not_complex(self.param_groups)
        param_groups.check_transformers(self._gradient_transformers, self.param_groups[0])
        makes_state_only = self._check_sources()
        rows = self._rows()
        aggregates = self._gradient_aggregator is not None and (self._given is None or self._given.aggregates)
        new_state: _NewState = {}
        if makes_state_only:
            for params, grads, _ in rows:
                self._with_state(params, grads, new_state)
            return (), (), new_state, (), False
        calls_back = aggregates or bool(self._gradient_transformers)
        if calls_back:
            rows = self._run_callbacks(rows, aggregates)
        has_gradients = any(params for params, _, _ in rows)
        reductions, others_have_gradients = self._reductions(rows)
        if not has_gradients:
            if any(reductions):  # others wait for this process
                clip_keywords([], [], self.param_groups[0], None, None, *reductions)
            return _COUNT_ONLY if others_have_gradients else self._without_gradients()

        buckets: list[Bucket] = []
        numbers: list[list[int]] = []
        new_values: list[_NewValue] = []
        called: dict[Any, Any] = {}
        # To find out by a refusal, and then to plan anew, would call what was called already.
        may_be_mixed = self._groups_are_mixed or calls_back or any(self._sources)
        for group, sources, (params, grads, where) in zip(self.param_groups, self._sources, rows, strict=True):
            if not params:
                continue
            lists = self._with_state(params, grads, new_state)
            for T, indices in _rows_by_T(group, sources, params).items():
                values_here, new_here = _values_of(group, sources, T, called)
                new_values += new_here
                # The number of each gradient travels as a fifth column, for the norm of all gradients has an order.
                columns: Any = (*lists, where)
                if len(indices) < len(params):
                    columns = tuple([column[i] for i in indices] for column in columns)
                for _, update, selected, values in split(group, columns, values_here, may_be_mixed):
                    *tensors, numbers_here = selected
                    buckets.append((group, update, tuple(tensors), values))  # type: ignore[arg-type]
                    numbers.append(numbers_here)  # type: ignore[arg-type]
        checks_itself = self._check_all(buckets, new_state)
        grad_scale = None if calls_back else getattr(self, "grad_scale", None)
        try:
            clips = clip_keywords(buckets, numbers, self.param_groups[0], grad_scale, self.found_inf, *reductions)
        except Exception:
            self._explain(buckets[0])
            raise
        return buckets, clips, new_state, new_values, checks_itself

    def _rows(self) -> list[_Rows]:
        """What is to be updated of each group."""
        if self._given is None:
            rows = []
            count = 0
            for group in self.param_groups:
                params, grads = _with_gradient(group)
                rows.append((params, grads, list(range(count, count + len(params)))))
                count += len(params)
            return rows
        group_of = {id(p): index for index, group in enumerate(self.param_groups) for p in group["params"]}
        rows = [([], [], []) for _ in self.param_groups]
        for number, (grad, param) in enumerate(self._given.pairs):
            for column, value in zip(rows[group_of[id(param)]], (param, grad, number), strict=True):
                column.append(value)  # type: ignore[attr-defined]
        return rows

    def _run_callbacks(self, rows: list[_Rows], aggregates: bool) -> list[_Rows]:
        """The same with the gradients that aggregator and transformers return.

        The aggregator is called for an empty list too: other processes may have gradients, and wait for this one.
        """
        in_order = sorted(
            (number, group_index, param, grad)
            for group_index, columns in enumerate(rows)
            for param, grad, number in zip(*columns, strict=True)
        )
        params = [param for _, _, param, _ in in_order]
        callbacks = [("gradient_transformers:", callback) for callback in self._gradient_transformers if params]
        if aggregates and self._gradient_aggregator is not None:
            callbacks.insert(0, ("gradient_aggregator:", self._gradient_aggregator))
        for _, _, param, grad in in_order:
            updates.check_gradient(partial(self._name_of, param), param, grad)
        with recording(any(group["differentiable"] for group in self.param_groups)):
            scale = getattr(self, "grad_scale", None)
            grads = [gradients.for_callback(param, grad, scale) for _, _, param, grad in in_order]
            for kind, callback in callbacks:
                grads = gradients.run_callback(callback, kind, params, grads, self._name_of)
        return [(group_params, [grads[number] for number in numbers], numbers) for group_params, _, numbers in rows]

    def _check_sources(self) -> bool:
        """Raises if somebody else wrote what a schedule or callable is there to give.

        Returns whether this step only makes state: PyTorch's distributed checkpointing sets lr to 0 and steps, to have
        state to load into.
        """
        self._follow_groups()
        if self._makes_state_only():
            return True
        for index, (group, sources) in enumerate(zip(self.param_groups, self._sources, strict=True)):
            for key, source in sources.items():
                value = group[key]
                # A scheduler attached before the schedule was set may be gone, but what it made of `step` stays.
                is_attached = self.__dict__.get("step") is not self._tolerated_step
                if key == "lr" and is_attached and getattr(self.step, "_wrapped_by_lr_sched", False):
                    raise RuntimeError(
                        f"the learning rate is given by {param_groups.describe(source)}, and a scheduler of "
                        "torch.optim is attached too: use one of them. A number for optimizer.learning_rate removes "
                        "the former"
                    )
                if source.is_foreign(value):
                    raise RuntimeError(
                        f"group {index} has {key}={value!r}, but its {source.name} is given by "
                        f"{param_groups.describe(source)}, which would overwrite that. Set optimizer.{source.name} to "
                        "use the value instead"
                    )
        return False

    def _makes_state_only(self) -> bool:
        if any(self.state.values()) or not all(_is_zero(group["lr"]) for group in self.param_groups):
            return False
        # A zero under a schedule is foreign. Without one it may be meant, and then the step counts.
        has_schedule = any("lr" in sources for sources in self._sources)
        if not has_schedule and not shards.is_called_to_make_state():
            return False
        rows = self._rows()
        params = [param for params, _, _ in rows for param in params]
        return not shards.any_nonzero(params, [grad for _, grads, _ in rows for grad in grads])

    def _reductions(self, rows: list[_Rows]) -> tuple[tuple[Any, Any, bool], bool]:
        """What `clip_keywords` passes sums of squares through, where this process does not have all gradients.

        Also whether other processes of `norm_group` have gradients.
        """
        others_have_gradients = False
        self._check_norm_group(self.param_groups[0])
        clipnorm, global_clipnorm = (self.param_groups[0][key] for key in ("clipnorm", "global_clipnorm"))
        over_parts, over_processes, in_double = None, None, False
        if self._norm_group is not None:
            T_here = arithmetic_dtypes(chain.from_iterable(params for params, _, _ in rows))
            others_have_gradients, in_double = self._norm_group.agree(
                self.iterations, bool(T_here), torch.float64 in T_here, global_clipnorm
            )
            over_processes = self._norm_group.sum if global_clipnorm is not None and others_have_gradients else None
        if clipnorm is not None or global_clipnorm is not None:
            all_params = self._params()
            if shards.has_dtensor(all_params):
                iterations = self.param_groups[0]["iterations"]
                over_parts = partial(shards.sum_over_parts, all_params=all_params, iterations=iterations)
        return (over_parts, over_processes, in_double), others_have_gradients

    def _states_of(self, params: list[Tensor]) -> Collection[Any]:
        if len(self.state) == len(params) and all(map(is_, self.state, params)):
            return self.state.values()  # in the same order; to hash a thousand parameters takes much longer
        return list(map(self.state.get, params))

    def _with_state(self, params: list[Tensor], grads: list[Tensor], new_state: _NewState) -> Lists:
        """Parameters and gradients with their state. State that is missing is made and left in `new_state`."""
        states = self._states_of(params)
        held_state = self._held_state
        if held_state is not None and held_state.holds(states):
            return params, grads, held_state.square_avgs, held_state.acc_deltas
        try:
            return params, grads, list(map(_get_square_avg, states)), list(map(_get_acc_delta, states))
        except (KeyError, TypeError):  # some parameter has no state yet, or an empty one
            states = [self._complete(p, state, new_state) for p, state in zip(params, states, strict=True)]
            return params, grads, list(map(_get_square_avg, states)), list(map(_get_acc_delta, states))

    def _complete(self, param: Tensor, state: Any, new_state: _NewState) -> dict[str, Tensor]:
        """The state of a parameter: what it has, or else a new one."""
        if not state:
            if param not in new_state:
                updates.check_param(partial(self._name_of, param), param)
                new_state[param] = self._new_state(param)
            return new_state[param]
        if not isinstance(state, dict) or not state.keys() >= set(param_groups.STATE_KEYS):
            raise RuntimeError(
                f"{self._name_of(param)}: its state holds {sorted(state)}, not square_avg and acc_delta; delete "
                "optimizer.state[param] to begin anew"
            )
        return state

    def _new_state(self, param: Tensor) -> dict[str, Tensor]:
        return {
            key: torch.zeros_like(param, memory_format=torch.preserve_format, requires_grad=False)
            for key in param_groups.STATE_KEYS
        }

    def _name_of(self, param: Tensor) -> str:
        for group_index, group in enumerate(self.param_groups):
            for index, candidate in enumerate(group["params"]):
                if candidate is param:
                    return param_groups.name_of(group_index, group, index)
        raise KeyError(param)

    def _check_all(self, buckets: list[Bucket], new_state: _NewState) -> bool:
        """Raises, naming the parameter, unless all buckets can be updated; or leaves that to a single fused call.

        Returns whether it did: such a call checks its own lists before it writes.
        """
        checks_itself = len(buckets) == 1 and buckets[0][1] is updates.fused
        if not checks_itself or new_state:
            self._check_buckets(buckets)
        return checks_itself

    def _check_buckets(self, buckets: list[Bucket]) -> None:
        """Raises, naming the parameter, unless all buckets can be updated."""
        in_python: list[Bucket] = []
        on_device: dict[torch.device, list[Bucket]] = {}
        for bucket in buckets:
            _, update, lists, _ = bucket
            if update is updates.fused:
                on_device.setdefault(lists[0][0].device, []).append(bucket)
            elif update is not sparse.fused:  # of which _check_indices finds it all
                self._check_rows(bucket)
                in_python.append(bucket)
        for fused in on_device.values():
            self._check_fused(fused)
        self._check_memory(in_python)
        self._check_indices(buckets)

    def _check_fused(self, buckets: list[Bucket]) -> None:
        """Raises, naming the parameter, unless all of these buckets of one device can be updated."""
        lists: Any = buckets[0][2]
        if len(buckets) > 1:
            columns = zip(*(bucket[2] for bucket in buckets), strict=True)
            lists = tuple(list(chain.from_iterable(column)) for column in columns)
        try:
            updates.check_fused(lists)
        except Exception:
            for bucket in buckets:
                self._explain(bucket)
            self._check_memory(buckets)
            raise

    def _check_indices(self, buckets: list[Bucket]) -> None:
        """Raises IndexError, naming the parameter, unless all sparse gradients are of rows that there are."""
        found = []
        for bucket in buckets:
            _, update, lists, _ = bucket
            if update not in sparse.UPDATES:
                continue
            if _HAS_CUDA and _is_capturing():
                raise RuntimeError(
                    f"step() is being captured in a CUDA graph, but {self._name_of(lists[0][0])} has a sparse "
                    "gradient, whose indices the host must check. Use sparse=False in the layer that made it, or "
                    ".to_dense()"
                )
            try:
                found.append((lists, sparse.first_bad_indices(update, lists)))
            except RuntimeError:
                self._explain(bucket)
                raise
        sparse.check_indices(found, self._name_of)

    def _refuses(self, bucket: Bucket, clip: dict[str, Any]) -> bool:
        """Whether the fused update refuses this: then what was raised was its refusal, and it has written nothing.

        What a signal handler raises, or another thread in this one, looks the same, but may have come after the writes.
        """
        group, _, lists, values = bucket
        try:
            self._check_rows(bucket)
            updates.check_fused(lists)
            empty = [param.new_empty(0) for param in lists[0]]
            updates.fused(empty, empty, empty, empty, *values, group["maximize"], **clip)
        except Exception:
            return True
        return False

    def _explain(self, bucket: Bucket) -> None:
        """After the compiled op refused a bucket, by the index: raises the same by the name, if it can be found."""
        params, grads, _, _ = bucket[2]
        if not self._groups_are_mixed and (len(by_device(params)) > 1 or any(map(sparse.is_sparse, grads))):
            raise _IsMixed from None
        try:
            self._check_rows(bucket)
            self._check_memory([bucket])
        except (RuntimeError, TypeError, ValueError) as explained:
            raise explained from None

    def _check_rows(self, bucket: Bucket) -> None:
        group, _, lists, _ = bucket
        for param, *tensors in zip(*lists, strict=True):
            updates.check_row(partial(self._name_of, param), param, *tensors, differentiable=group["differentiable"])

    def _check_memory(self, buckets: list[Bucket]) -> None:
        """Raises, naming the parameters, if memory that these buckets write to belongs to more than one of them."""
        updates.check_memory([row for _, _, lists, _ in buckets for row in zip(*lists, strict=True)], self._name_of)


def _write_values(new_values: Iterable[_NewValue]) -> None:
    """Leaves in the groups what schedules and callables gave."""
    for group, key, value, source in new_values:
        group[key] = value
        source.wrote(value)


def _versions(update: Update, lists: Lists) -> list[int] | None:
    """What tells whether one of the updates in Python has written to some tensor; None where nothing does."""
    if update not in (updates.for_loop, updates.foreach, sparse.for_loop) or torch.is_inference_mode_enabled():
        return None
    params, _, square_avgs, acc_deltas = lists
    return [tensor._version for tensor in chain(params, square_avgs, acc_deltas)]


# Where ops are called from.
_CALLERS: Final = frozenset(
    function.__code__.co_filename for function in (ops.adadelta_, torch._ops.OpOverload.__call__)
)


def _is_raised_by_op(error: BaseException) -> bool:
    """Whether this came out of an op itself; what a signal handler raises comes out of the handler."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and traceback.tb_frame.f_code.co_filename in _CALLERS


def _say_partial(error: BaseException) -> None:
    what = "(the step is partial: some parameters and state were updated, others not)"
    error.args = (f"{str(error) or type(error).__name__} {what}",)
    if what not in str(error) and hasattr(error, "add_note"):  # its class makes a text of its own
        error.add_note(what)


def _advance_unless(found_inf: Tensor, group: dict[str, Any]) -> None:
    """Counts the step on the device, where it is known whether it was skipped."""
    if not isinstance(group["iterations"], Tensor):
        # Not torch.tensor, which would copy from the host, and wait.
        group["iterations"] = torch.full((), group["iterations"], dtype=torch.int64, device=found_inf.device)
    counts = found_inf.reshape(()) == 0
    group["iterations"] += counts.to(group["iterations"].device, non_blocking=group["iterations"].is_cuda)


def _with_gradient(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters of a group that have a gradient, and their gradients."""
    params: list[Tensor] = group["params"]
    grads = [grad for param in params if (grad := param.grad) is not None]
    if len(grads) != len(params):
        params = [param for param in params if param.grad is not None]
    return params, grads


# ---- Hyperparameters of a step --------------------------------------------------------------------------------------


def _rows_by_T(group: dict[str, Any], sources: dict[str, Source], params: list[Tensor]) -> dict[torch.dtype, list[int]]:
    """The indices of the parameters by their arithmetic type, if the learning rate depends on it; else all as one."""
    if group["decay"] or _is_scheduled(sources):
        return by_T(params)
    return {torch.float32: list(range(len(params)))}


def _is_scheduled(sources: dict[str, Source]) -> bool:
    return "lr" in sources and sources["lr"].is_schedule


def _values_of(
    group: dict[str, Any], sources: dict[str, Source], T: torch.dtype, called: dict[Any, Any]
) -> tuple[hyperparameters.StepValues, list[_NewValue]]:
    """The hyperparameters of a group in this step, and what is to be written to the group."""
    raw = _raw_values(group, sources, T, called) if sources else group
    lr, rho, epsilon = hyperparameters.for_step(
        raw["lr"], raw["rho"], raw["epsilon"], group["differentiable"], _is_scheduled(sources)
    )
    if group["decay"]:
        lr = hyperparameters.decayed(lr, group["decay"], group["iterations"], T)
    return (lr, rho, epsilon), [(group, key, raw[key], source) for key, source in sources.items()]


def _raw_values(
    group: dict[str, Any], sources: dict[str, Source], T: torch.dtype, called: dict[Any, Any]
) -> dict[str, Any]:
    """The hyperparameters of this step as the user gives them. `called` keeps what was returned."""
    raw = {key: group[key] for key in param_groups.HYPERPARAMETERS}
    for key, source in sources.items():
        if source.is_schedule:
            if (id(source.given), T) not in called:
                called[id(source.given), T] = hyperparameters.at_step(source.given, group["iterations"], T)
            raw[key] = called[id(source.given), T]
        else:
            if id(source.given) not in called:
                called[id(source.given)] = source.given()
            raw[key] = hyperparameters.validated(source.name, called[id(source.given)])
        if group["capturable"] and not isinstance(raw[key], Tensor) and _is_capturing():
            raise RuntimeError(
                f"{param_groups.describe(source)} gives {source.name} as a Python number, which a CUDA graph would "
                f"repeat for ever. Give a Tensor on the device for {source.name}, and fill it between replays"
            )
    return raw


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _is_zero(value: Any) -> bool:
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return False  # to look would be to wait for the device
    return bool(value == 0)
