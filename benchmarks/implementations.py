"""The optimizers that are compared, each as a callable that makes one whole step; and what else is timed.

Each belongs to a family, whose implementations run in a process of their own (workers.py): frameworks bring threads,
memory pools and ideas of the processor along, and would disturb each other in one. What a family needs is imported
there, and not before. All of Adadelta have our rho, epsilon and learning rate, and the same gradients and state.
"""

import itertools
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from timing import Step
from torch import Tensor
from torch.optim.optimizer import Optimizer
from workloads import Tensors, Workload

from torch_adadelta import AdadeltaKeras

LR: Final = 1e-3
RHO: Final = 0.95
EPSILON: Final = 1e-7

FUSED: Final = "AdadeltaKeras, fused"
FUSED_FLOAT32: Final = "AdadeltaKeras, fused, float32"
REPLAY: Final = "AdadeltaKeras, fused, graph replay"
CLIPVALUE: Final = "AdadeltaKeras, fused, clipvalue"
CLIPNORM: Final = "AdadeltaKeras, fused, clipnorm"
GLOBAL_CLIPNORM: Final = "AdadeltaKeras, fused, global_clipnorm"
FOREACH: Final = "AdadeltaKeras, foreach"
FOR_LOOP: Final = "AdadeltaKeras, for-loop"
TORCH_FOREACH: Final = "torch.optim.Adadelta, foreach"
TORCH_FOR_LOOP: Final = "torch.optim.Adadelta, for-loop"
TORCH_COMPILED: Final = "torch.optim.Adadelta, torch.compile"
ADAM: Final = "torch.optim.Adam, fused"
ADAGRAD: Final = "torch.optim.Adagrad, fused"
PYTORCH_OPTIMIZER: Final = "pytorch_optimizer.AdaDelta"
KERAS: Final = "Keras 3 on torch"
KERAS3: Final = "torch_adadelta.keras3, Keras 3 on torch"
TF_EAGER: Final = "tf_keras legacy (TensorFlow's op), eager"
TF_GRAPH: Final = "tf_keras legacy (TensorFlow's op), graph"
OPTAX: Final = "optax.adadelta, jax.jit"
SPARSE_ADAM: Final = "torch.optim.SparseAdam"
SPARSE_ADAGRAD: Final = "torch.optim.Adagrad, for-loop"
DENSE: Final = ", dense gradient"  # after the name of one that gets a dense gradient of a table
EMPTY: Final = "an empty Optimizer.step()"
ADD: Final = "a.add_(b, alpha=c)"
COPY: Final = "a device copy"

# Never reached, so that the state keeps its fixed point; the work is the same as if it were.
CLIPPED: Final[dict[str, dict[str, Any]]] = {
    CLIPVALUE: {"clipvalue": 1e6},
    CLIPNORM: {"clipnorm": 1e6},
    GLOBAL_CLIPNORM: {"global_clipnorm": 1e6},
}

# Tensors that must be moved: a step reads the gradient, and reads and writes the parameter and two states; add_ reads
# both of its tensors and writes one.
STEP_TENSORS: Final = 7
TENSORS_MOVED: Final = {ADD: 3, COPY: 2, **dict.fromkeys((FUSED, REPLAY, ADAM, TORCH_COMPILED), STEP_TENSORS)}

# ---- PyTorch --------------------------------------------------------------------------------------------------------


class EmptyStep(Optimizer):
    """An optimizer that does nothing: what remains are the hooks that PyTorch puts around every step."""

    def __init__(self, params: list[Any]) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> Any:
        """Does nothing."""


def with_state(optimizer: Optimizer, tensors: Tensors, **more: Callable[[], Tensor]) -> Optimizer:
    """Gives an Adadelta its state; `more` makes what else it keeps for each parameter."""
    for param, square_avg, acc_delta in zip(tensors.params, tensors.square_avgs, tensors.acc_deltas, strict=True):
        state = {"square_avg": square_avg, "acc_delta": acc_delta}
        optimizer.state[param] = {**{name: make() for name, make in more.items()}, **state}
    return optimizer


def keras_like(tensors: Tensors, **options: Any) -> Step:
    """Our optimizer: the fused kernel, or one of the Python paths."""
    optimizer = with_state(AdadeltaKeras(tensors.params, LR, RHO, EPSILON, **options), tensors)
    return by_other_rows(optimizer, tensors) if tensors.grads[0].is_sparse else optimizer.step


fused: Final = partial(keras_like, fused=True)


def replay(tensors: Tensors) -> Step:
    """Our step in a CUDA graph."""
    step = fused(tensors, capturable=True)
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def by_other_rows(optimizer: Optimizer, tensors: Tensors) -> Step:
    """Steps by sparse gradients of a table, which take turns."""
    (table,) = tensors.params
    grads = itertools.cycle(tensors.grads)

    def step() -> None:
        table.grad = next(grads)
        optimizer.step()

    return step


def torch_adadelta(tensors: Tensors, *, foreach: bool) -> Step:
    """PyTorch's optimizer."""
    optimizer = torch.optim.Adadelta(tensors.params, lr=LR, rho=RHO, eps=EPSILON, foreach=foreach)
    return with_state(optimizer, tensors, step=partial(torch.zeros, ())).step


def torch_compiled(tensors: Tensors) -> Step:
    """PyTorch's optimizer under torch.compile; it compiles in its first call."""
    step = torch_adadelta(tensors, foreach=True)
    return torch.compile(lambda: step(), fullgraph=False)


def torch_adam(tensors: Tensors) -> Step:
    """PyTorch's fused Adam, which moves as many bytes as Adadelta."""
    optimizer = torch.optim.Adam(tensors.params, lr=LR, fused=True)
    for param, grad, _, _ in zip(*tensors, strict=True):
        step = torch.zeros((), device=param.device)
        optimizer.state[param] = {"step": step, "exp_avg": grad.clone(), "exp_avg_sq": grad.square()}
    return optimizer.step


def pytorch_optimizer(tensors: Tensors) -> Step:
    """The Adadelta of the package pytorch_optimizer."""
    from pytorch_optimizer import AdaDelta

    optimizer = with_state(AdaDelta(tensors.params, lr=LR, rho=RHO, eps=EPSILON), tensors)
    optimizer.param_groups[0]["step"] = 0
    return optimizer.step


def torch_sparse_adam(tensors: Tensors) -> Step:
    """PyTorch's Adam that updates the rows of a sparse gradient alone."""
    optimizer = torch.optim.SparseAdam(tensors.params, lr=LR)
    state = {"step": 0, "exp_avg": tensors.square_avgs[0], "exp_avg_sq": tensors.acc_deltas[0]}
    optimizer.state[tensors.params[0]] = state
    return by_other_rows(optimizer, tensors)


def add(tensors: Tensors) -> Step:
    """What memory can do, read and written."""
    (b,) = tensors.grads
    a = b.clone()
    return lambda: a.add_(b, alpha=LR)


def copy(tensors: Tensors) -> Step:
    """What the memory of a CUDA device can do."""
    (source,) = tensors.grads
    return partial(torch.empty_like(source).copy_, source)


# ---- Other frameworks -----------------------------------------------------------------------------------------------


def as_numpy(tensor: Tensor) -> Any:
    """The numbers of a tensor; bfloat16 with the help of ml_dtypes, which all frameworks bring along."""
    if tensor.dtype is not torch.bfloat16:
        return tensor.detach().numpy()
    import ml_dtypes

    return tensor.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def keras(tensors: Tensors, *, fused: bool) -> Step:
    """Adadelta of Keras 3 on the PyTorch backend: Keras' own, or ours with the fused update."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    from torch_adadelta import keras3

    dtype = str(tensors.params[0].dtype).removeprefix("torch.")
    variables = [keras.Variable(param.detach(), dtype=dtype) for param in tensors.params]
    optimizer = (keras3.Adadelta if fused else keras.optimizers.Adadelta)(LR, RHO, EPSILON)
    optimizer.build(variables)
    for states in (optimizer._accumulated_grads, optimizer._accumulated_delta_vars):
        for state, square in zip(states, tensors.square_avgs, strict=True):
            state.assign(square)
    return partial(optimizer.apply, tensors.grads, variables)


def tf_keras(tensors: Tensors, *, graph: bool) -> Step:
    """TensorFlow's op, tf.raw_ops.ResourceApplyAdadelta, called by the class of TensorFlow 2.4."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf
    import tf_keras

    optimizer = tf_keras.optimizers.legacy.Adadelta(LR, RHO, EPSILON)
    variables = [tf.Variable(as_numpy(param)) for param in tensors.params]
    optimizer._create_all_weights(variables)
    for variable, square in zip(variables, tensors.square_avgs, strict=True):
        for slot in ("accum_grad", "accum_var"):
            optimizer.get_slot(variable, slot).assign(as_numpy(square))
    if tensors.grads[0].is_sparse:
        values = tf.constant(as_numpy(tensors.grads[0]._values()))  # of all of them
        rows = itertools.cycle([tf.constant(as_numpy(grad._indices()[0])) for grad in tensors.grads])

        def apply(rows: Any) -> None:
            optimizer.apply_gradients([(tf.IndexedSlices(values, rows, variables[0].shape), variables[0])])

        in_graph = tf.function(apply)
        return lambda: (in_graph if graph else apply)(next(rows))
    grads = [tf.constant(as_numpy(grad)) for grad in tensors.grads]
    pairs = list(zip(grads, variables, strict=True))

    def step() -> None:
        optimizer.apply_gradients(pairs)

    return tf.function(step) if graph else step


def optax(tensors: Tensors) -> Step:
    """Adadelta of optax, compiled as a whole with the update of the parameters, which are donated to it."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import optax

    transformation = optax.adadelta(LR, RHO, EPSILON)

    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = transformation.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(update, donate_argnums=(0, 1))
    grads = [jax.numpy.array(as_numpy(grad)) for grad in tensors.grads]
    params = [jax.numpy.array(as_numpy(param)) for param in tensors.params]
    squares = [[jax.numpy.array(as_numpy(s)) for s in tensors.square_avgs] for _ in range(2)]
    state = optax.tree.set(transformation.init(params), e_g=squares[0], e_x=squares[1])
    held = [params, state]

    def step() -> None:
        held[:] = jax.block_until_ready(compiled(*held, grads))

    return step


# ---- Everything but the step ----------------------------------------------------------------------------------------

OURS: Final = "AdadeltaKeras"
THEIRS: Final = "torch.optim.Adadelta"
Maker = Callable[[Tensors], Optimizer]
MAKERS: Final[dict[str, Maker]] = {
    OURS: lambda tensors: AdadeltaKeras(tensors.params, LR, RHO, EPSILON),
    THEIRS: lambda tensors: torch.optim.Adadelta(tensors.params, lr=LR, rho=RHO, eps=EPSILON),
}


def giving_back(tensors: Tensors) -> Step:
    """Gives the parameters their gradients, which zero_grad has taken."""

    def give_back() -> None:
        for param, grad in zip(tensors.params, tensors.grads, strict=True):
            param.grad = grad

    return give_back


def first_step(make: Maker, tensors: Tensors) -> Step:
    """A step that allocates the state."""
    optimizer = make(tensors)

    def step() -> None:
        optimizer.state.clear()
        optimizer.step()

    return step


def zero_grad(make: Maker, tensors: Tensors) -> Step:
    """Takes the gradients, which must be given back for the next time."""
    optimizer, give_back = make(tensors), giving_back(tensors)
    return lambda: (optimizer.zero_grad(), give_back())


def after_a_step(make: Maker, tensors: Tensors) -> Optimizer:
    """An optimizer with state."""
    optimizer = make(tensors)
    optimizer.step()
    return optimizer


OPERATIONS: Final[dict[str, Callable[[Maker, Tensors], Step]]] = {
    "construction": partial,
    "first step": first_step,
    "state_dict": lambda make, tensors: after_a_step(make, tensors).state_dict,
    "load_state_dict": lambda make, tensors: partial(
        make(tensors).load_state_dict, after_a_step(make, tensors).state_dict()
    ),
    "zero_grad": zero_grad,
}
RESTORING: Final = "giving the gradients back"

# ---- A whole training -----------------------------------------------------------------------------------------------

ALONE: Final = "no optimizer: forward and backward alone"
BATCH_SIZE: Final = 32


def epochs(make: Callable[[Any], Optimizer] | None, _: Tensors) -> Step:
    """An epoch of a small convolutional net on handwritten digits, from the same weights at every call."""
    sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
    import common

    digits = common.load_tensors(torch.device("cpu"), torch.float32, (1, 8, 8))
    torch.manual_seed(0)
    model = common.convolutional_net(torch.nn.ReLU, torch.nn.MaxPool2d)
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = make(model.parameters()) if make else None
    count = len(digits.train_labels)
    batches = torch.randperm(count).tensor_split(math.ceil(count / BATCH_SIZE))

    def epoch() -> None:
        model.load_state_dict(initial)
        for indices in batches:
            model.zero_grad()
            output = model(digits.train_images[indices])
            torch.nn.functional.cross_entropy(output, digits.train_labels[indices]).backward()
            if optimizer:
                optimizer.step()

    return epoch


TRAINING: Final[dict[str, Callable[[Any], Optimizer] | None]] = {
    ALONE: None,
    OURS: lambda params: AdadeltaKeras(params, 1.0),
    f"{OURS}, clipnorm": lambda params: AdadeltaKeras(params, 1.0, clipnorm=1.0),
    TORCH_FOREACH: lambda params: torch.optim.Adadelta(params, lr=1.0, foreach=True),
    TORCH_FOR_LOOP: lambda params: torch.optim.Adadelta(params, lr=1.0, foreach=False),
    ADAM: lambda params: torch.optim.Adam(params, fused=True),
}

# ---- All of them ----------------------------------------------------------------------------------------------------

Builder = Callable[[Tensors], Step]

# What makes a step, by the family whose process it runs in. Those whose ratio matters most stand side by side.
_TORCH: Final[dict[str, Builder]] = {
    ADD: add,
    COPY: copy,
    FUSED: fused,
    **{name: partial(fused, **options) for name, options in CLIPPED.items()},
    FUSED_FLOAT32: fused,
    REPLAY: replay,
    EMPTY: lambda tensors: EmptyStep(tensors.params).step,
    ADAM: torch_adam,
    ADAGRAD: lambda tensors: torch.optim.Adagrad(tensors.params, lr=LR, fused=True).step,
    TORCH_COMPILED: torch_compiled,
    TORCH_FOREACH: partial(torch_adadelta, foreach=True),
    TORCH_FOR_LOOP: partial(torch_adadelta, foreach=False),
    FOREACH: partial(keras_like, foreach=True),
    FOR_LOOP: partial(keras_like, foreach=False),
    PYTORCH_OPTIMIZER: pytorch_optimizer,
    SPARSE_ADAM: torch_sparse_adam,
    SPARSE_ADAGRAD: lambda tensors: by_other_rows(torch.optim.Adagrad(tensors.params, lr=LR), tensors),
    FUSED + DENSE: fused,
    TORCH_FOREACH + DENSE: partial(torch_adadelta, foreach=True),
}
CUDA: Final = "cuda"
_ON_CUDA: Final = (COPY, FUSED, CLIPNORM, GLOBAL_CLIPNORM, FUSED_FLOAT32, REPLAY, ADAM, TORCH_FOREACH, TORCH_COMPILED)
STEPS: Final[dict[str, dict[str, Builder]]] = {
    "torch": {name: build for name, build in _TORCH.items() if name not in (COPY, REPLAY)},
    "keras": {KERAS3: partial(keras, fused=True), KERAS: partial(keras, fused=False)},
    "tensorflow": {TF_EAGER: partial(tf_keras, graph=False), TF_GRAPH: partial(tf_keras, graph=True)},
    "jax": {OPTAX: optax},
    CUDA: {name: _TORCH[name] for name in (*_ON_CUDA, SPARSE_ADAM, FUSED + DENSE)},
}
FAMILIES: Final = {name: family for family, names in STEPS.items() for name in names if family != CUDA}
ORDER: Final = list(dict.fromkeys((*_TORCH, *FAMILIES)))

# Whose times are drawn against the number of elements, or of tensors.
CURVES: Final = {
    "elements": (FUSED, ADD, ADAM, TORCH_FOREACH, TF_GRAPH, OPTAX),
    "tensors": (FUSED, ADAM, TORCH_FOREACH, TORCH_FOR_LOOP),
}

# Under the operation's name, a colon and the optimizer's.
OTHER: Final[dict[str, dict[str, Builder]]] = {
    "operations": {
        RESTORING: giving_back,
        **{f"{what}: {whose}": partial(do, make) for what, do in OPERATIONS.items() for whose, make in MAKERS.items()},
    },
    "training": {name: partial(epochs, make) for name, make in TRAINING.items()},
}


def builder(part: str, family: str, name: str) -> Builder:
    """What makes a step, or an operation or an epoch, if these are the part of the benchmark."""
    return OTHER.get(part, STEPS[family])[name]


# Whom sparse gradients are given to, and who is there for their sake.
ROWS_ONLY: Final = (SPARSE_ADAM, SPARSE_ADAGRAD, FUSED + DENSE, TORCH_FOREACH + DENSE)
ROWS_FIELD: Final = (FUSED, GLOBAL_CLIPNORM, FOR_LOOP, TF_EAGER, TF_GRAPH, *ROWS_ONLY)
MOST_ROWS_IF_DENSE: Final = 1_000_000

# Where ours runs in Python, a step takes 40 to 70 times as long as the fused one.
MOST_ELEMENTS_IN_PYTHON: Final = 2**25


def field_of(workload: Workload, device: str, *, with_compile: bool = True) -> tuple[list[str], dict[str, str]]:
    """Everybody who can be compared on a workload; and who is left out on purpose, and why."""
    names: list[str] = []
    left_out: dict[str, str] = {}
    probes = len(workload.shapes) == 1 and not workload.fits_cache
    for name in STEPS[CUDA] if device == CUDA else FAMILIES:
        if name not in ROWS_FIELD if workload.occurring else name in ROWS_ONLY:
            continue
        if name in (ADD, COPY) and not probes:
            continue
        if name in CLIPPED and not workload.clips:
            continue
        if name == FUSED_FLOAT32 and (workload.dtype is torch.float32 or len(set(workload.shapes)) > 1):
            continue  # the models are there in float32
        if workload.threads is not None and FAMILIES[name] != "torch":
            continue  # they take their threads from the machine
        if name.endswith(DENSE) and workload.shapes[0][0] > MOST_ROWS_IF_DENSE:
            left_out[name] = "too much to move"
        elif name in (FOREACH, FOR_LOOP) and not workload.occurring and workload.numel > MOST_ELEMENTS_IN_PYTHON:
            left_out[name] = "a step takes seconds"
        elif name == TORCH_COMPILED and not with_compile:
            left_out[name] = "compiling was not asked for"
        elif name == TORCH_COMPILED and not workload.compiles:
            left_out[name] = "takes long to compile"
        else:
            names.append(name)
    return names, left_out
