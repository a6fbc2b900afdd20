"""`clipnorm` by Keras' variables, where these and parameters are not one to one: bits, checkpoints, and what is refused."""

import copy
import io
import itertools
import json
import pickle
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import pytest
import torch
import torch.distributed as dist
from cases import (
    DTYPES,
    LAYOUTS,
    REAL_DTYPES,
    Path,
    assert_same_bits,
    assert_unchanged,
    gradients,
    randn,
    snapshot,
    to_numpy,
)
from processes import Processes
from reference.oracle import OracleOptimizer
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter
from training import (
    assert_like_oracles,
    assert_same_training,
    give_gradients,
    numpy_or_none,
    oracle_of_all,
    params_of,
)

from torch_adadelta import AdadeltaKeras, step_in_backward
from torch_adadelta.backends import kernels

Rows = Sequence[Sequence[tuple[int, int, int]]]
SHAPES: Final = [(6, 3), (4,), (2, 3, 4), (), (0, 2), (300, 17), (5, 2)]

# Rows of one parameter, a part of one beside the whole of another, and pieces of three in an order of their own. What is
# left are rows in the middle, rows at both ends, and a parameter that has a norm of its own.
VARIABLES: Final[Rows] = [[(0, 0, 2)], [(0, 4, 6), (1, 0, 4)], [(5, 100, 260), (3, 0, 1), (2, 0, 1)]]


def variables_of(params: Sequence[Tensor], rows: Rows = VARIABLES) -> list[list[tuple[Tensor, int, int]]]:
    return [[(params[number], first, end) for number, first, end in pieces] for pieces in rows]


def oracle_of(params: Sequence[Tensor], rows: Rows = VARIABLES, **options: Any) -> OracleOptimizer:
    return oracle_of_all(params, norm_variables=rows, **options)


def small(path: Path | None = None, **options: Any) -> tuple[AdadeltaKeras, list[Parameter]]:
    """Two parameters in two groups: a part of the first has one norm with the second."""
    params = [Parameter(torch.ones(4, 2)), Parameter(torch.ones(3))]
    own: Any = {} if path is None else path.options
    options = {"clipnorm": 0.5, "norm_variables": [[(params[0], 0, 3), params[1]]], **options}
    return AdadeltaKeras([{"params": [p]} for p in params], 1.0, **options, **own), params


# ---- The bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clipvalue", [None, 0.5])
def test_steps_are_those_of_the_oracle(path: Path, clipvalue: float | None) -> None:
    """For parameters of each dtype; clipvalue is for real numbers."""
    generator = torch.Generator().manual_seed(1)
    clip: Any = {"clipnorm": 0.7, "clipvalue": clipvalue}
    for dtype in DTYPES if clipvalue is None else REAL_DTYPES:
        params = [Parameter(randn(shape, dtype, generator)) for shape in SHAPES]
        groups: Any = [{"params": params[:2]}, {"params": params[2:]}, {"params": []}]
        optimizer = AdadeltaKeras(groups, 1.0, **clip, norm_variables=variables_of(params), **path.options)
        expected = oracle_of(params, **clip)
        for step in range(4):
            grads: list[Any] = give_gradients(params, step)
            for absent in {1: [3, 4], 2: [0]}.get(step, []):  # a piece is without gradient, or several
                grads[absent] = params[absent].grad = None
            optimizer.step()
            expected.step(numpy_or_none(grads))
            assert_like_oracles(optimizer, expected, f"of {dtype} at step {step}")


def test_groups_keep_their_hyperparameters(path: Path) -> None:
    """A batch has a segment of rows for each group, whatever became of its parameters."""
    params = [Parameter(torch.ones(4, 2)) for _ in range(4)]
    groups = [
        {"params": params[:1], "lr": 1.0, "maximize": True},
        {"params": params[1:3], "lr": 0.25, "rho": 0.5},
        {"params": params[3:], "lr": 0.5, "epsilon": 1e-3},
    ]
    rows = [[(0, 1, 2), (1, 0, 3)], [(2, 0, 2)], [(2, 2, 3)]]
    variables = variables_of(params, rows)
    optimizer = AdadeltaKeras(groups, clipnorm=0.7, norm_variables=variables, **path.options)  # type: ignore[arg-type]
    expected = oracle_of(params, rows, clipnorm=0.7)
    for step in range(3):
        grads = give_gradients(params, step)
        clipped = expected.clip([(i, to_numpy(grad)) for i, grad in enumerate(grads) if grad is not None])
        for number, (oracle, g) in enumerate(zip(expected.oracles, clipped, strict=True)):
            oracle.learning_rate = [1.0, 0.25, 0.25, 0.5][number]
            oracle.rho, oracle.maximize = (0.95, 0.5, 0.5, 0.95)[number], number == 0
            oracle.epsilon = 1e-3 if number == 3 else 1e-7
            oracle.step(g)
        expected.iterations += 1
        optimizer.step()
        assert_like_oracles(optimizer, expected, f"at step {step}")


def test_mixed_dtypes(path: Path) -> None:
    dtypes = (*REAL_DTYPES, *reversed(REAL_DTYPES))
    params = [Parameter(torch.zeros(4, 3, dtype=dtype)) for dtype in dtypes]
    rows = [[(i, 1, 3) for i in range(len(params))], [(0, 0, 1), (7, 3, 4)]]
    variables = variables_of(params, rows)
    optimizer = AdadeltaKeras(params, 1.0, decay=0.1, clipnorm=0.7, norm_variables=variables, **path.options)
    expected = oracle_of(params, rows, decay=0.1, clipnorm=0.7)
    for step in range(3):
        explicit = [(gradients(p.shape, torch.float64, 1, seed=10 * step + i)[0], p) for i, p in enumerate(params)]
        expected.step([to_numpy(grad) for grad, _ in explicit])
        optimizer.apply_gradients(explicit)  # of another dtype than the parameters
        assert_like_oracles(optimizer, expected, f"at step {step}")


@pytest.mark.parametrize("is_reversed", [False, True])
def test_squares_are_added_in_the_order_of_the_parameters(path: Path, is_reversed: bool) -> None:
    """Wherever these are in the batches, and however variables and gradients are given.

    1 is half a unit in the last place of the first sum of squares, and lost sixteen times; in another order it is not.
    """
    params = [Parameter(torch.zeros(3, 2, dtype=torch.float64)), *(Parameter(torch.zeros(2)) for _ in range(16))]
    rows = [[(0, 0, 1), *((number, 0, 1) for number in range(1, 17))]]
    given = [list(reversed(rows[0]))] if is_reversed else rows
    optimizer = AdadeltaKeras(params, 1.0, clipnorm=0.7, norm_variables=variables_of(params, given), **path.options)
    expected = oracle_of(params, rows, clipnorm=0.7)
    explicit: list[tuple[Tensor, Tensor]] = [(torch.ones_like(param), param) for param in params]
    explicit[0][0][0] = 2.0**26
    for step in range(2):
        expected.step([to_numpy(grad) for grad, _ in explicit])
        optimizer.apply_gradients(reversed(explicit) if is_reversed else explicit)
        assert_like_oracles(optimizer, expected, f"at step {step}")


def test_layouts(path: Path) -> None:
    """A parameter for every pair of its layout and that of its gradient; some rows of all have one norm."""
    shape = (5, 17, 1, 90)
    generator = torch.Generator().manual_seed(3)
    pairs = [pair for pair in itertools.product(LAYOUTS, repeat=2) if pair[0] != "transposed"]
    params = [LAYOUTS[layout](randn(shape, torch.float32, generator)).requires_grad_() for layout, _ in pairs]
    rows = [[(i, 1, 3) for i in range(len(params))]]
    options: Any = {"norm_variables": variables_of(params, rows), **path.options}
    optimizer = AdadeltaKeras(params, 1.0, clipnorm=0.7, **options)
    expected = oracle_of(params, rows, clipnorm=0.7)
    for step in range(2):
        for index, (param, (_, layout)) in enumerate(zip(params, pairs, strict=True)):
            param.grad = LAYOUTS[layout](gradients(shape, torch.float32, 1, seed=100 * step + index)[0])
        expected.step(numpy_or_none(param.grad for param in params))
        optimizer.step()
        assert_like_oracles(optimizer, expected, f"at step {step}")


def test_aggregated_and_scaled_gradients(path: Path) -> None:
    """The aggregator sees whole gradients, before they are clipped; the fused update divides by the scale before."""

    def doubled(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        assert [grad.shape for grad, _ in pairs] == [(4, 2), (3,)]
        return [(grad * 2, param) for grad, param in pairs]

    (one, params), (other, plain) = small(path, gradient_aggregator=doubled), small(path)
    for step in range(3):
        give_gradients(params, step)
        for param, grad in zip(plain, give_gradients(plain, step), strict=True):
            param.grad = grad * 2
        one.step()
        other.step()
    assert_same_training(one, other)
    if path.options.get("fused"):
        (scaled, params), (other, plain) = small(path), small(path)
        for step in range(3):
            for param, grad in zip(params, give_gradients(plain, step), strict=True):
                param.grad = grad * 1024
            scaled.grad_scale, scaled.found_inf = torch.tensor(1024.0), torch.tensor(float(step == 1))
            scaled.step()
            if step != 1:
                other.step()
        assert_same_training(scaled, other)
        assert scaled.iterations == 2


def test_autograd_records_it() -> None:
    start = [torch.randn(4, 2, dtype=torch.float64), torch.randn(3, dtype=torch.float64)]

    def stepped(*grads: Tensor) -> tuple[Tensor, ...]:
        params = [p.clone().requires_grad_().clone() for p in start]
        variables = [[(params[0], 0, 3), params[1]]]
        optimizer = AdadeltaKeras(params, 1.0, 0.5, 0.1, clipnorm=0.5, differentiable=True, norm_variables=variables)
        for _ in range(2):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            optimizer.step()
        return tuple(params)

    grads = [torch.randn_like(p).requires_grad_() for p in start]
    assert torch.autograd.gradcheck(stepped, grads)
    plain = [Parameter(p.clone()) for p in start]
    optimizer = AdadeltaKeras(plain, 1.0, 0.5, 0.1, clipnorm=0.5, norm_variables=[[(plain[0], 0, 3), plain[1]]])
    for _ in range(2):
        for param, grad in zip(plain, grads, strict=True):
            param.grad = grad.detach()
        optimizer.step()
    for ours, theirs in zip(stepped(*grads), plain, strict=True):
        assert_same_bits(ours, theirs.detach())


def test_only_clipnorm_asks_for_it(path: Path) -> None:
    """Without, it does nothing; it counts as soon as clipnorm is set, and as soon as it is set itself."""
    (one, params), (other, plain) = small(path, clipnorm=None), small(path, clipnorm=None, norm_variables=None)
    expected = oracle_of(params, [])
    rows = [[(0, 0, 3), (1, 0, 3)]]
    changes: list[tuple[float | None, Rows | None]] = [
        (None, rows),
        (0.5, rows),
        (0.5, None),
        (0.5, rows),
        (None, rows),
    ]
    for step, (clipnorm, set_rows) in enumerate(changes):
        for optimizer, own in ((one, params), (other, plain)):
            optimizer.clipnorm = clipnorm
            optimizer.norm_variables = None if set_rows is None else variables_of(own, set_rows)
            for again in range(2):  # with the partition of the last step, too
                grads = give_gradients(own, 2 * step + again)
                optimizer.step()
                if optimizer is one:
                    expected.clipnorm, expected.norm_variables = clipnorm, set_rows or []
                    expected.step(numpy_or_none(grads))
        assert_like_oracles(one, expected, f"after change {step}")
        assert_same_training(one, other)


def test_a_version_is_counted_up_for_autograd(path: Path) -> None:
    optimizer, params = small(path)
    give_gradients(params, 0)
    saved = (params[0] * params[0]).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


@pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")
def test_a_compiled_step_notices_it() -> None:
    torch.compiler.reset()
    (compiled, params), (eager, plain) = small(norm_variables=None), small(norm_variables=None)
    step = torch.compile(compiled.step, backend="eager")
    for number in range(6):
        for own, optimizer, take in ((params, compiled, step), (plain, eager, eager.step)):
            optimizer.norm_variables = None if number in (0, 1, 4) else [[(own[0], 0, 3), own[1]]]
            give_gradients(own, number)
            take()
    assert_same_training(compiled, eager)


def test_plain_parameters_beside_distributed_ones() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        far = Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
        ours = [Parameter(torch.ones(4, 2)), far, Parameter(torch.ones(3))]
        plain = [Parameter(torch.ones(4, 2)), Parameter(torch.ones(4)), Parameter(torch.ones(3))]
        optimizers = [
            AdadeltaKeras(own, 1.0, clipnorm=0.5, norm_variables=[[(own[0], 1, 3), own[2]]]) for own in (ours, plain)
        ]
        for step in range(3):
            give_gradients(plain, step)
            grads = [param.grad for param in plain]
            ours[0].grad, ours[2].grad = grads[0], grads[2]
            ours[1].grad = distribute_tensor(grads[1], mesh, [Shard(0)])  # type: ignore[arg-type]
            for optimizer in optimizers:
                optimizer.step()
        for one, other in zip(ours, plain, strict=True):
            assert_same_bits(one.full_tensor() if one is far else one, other.detach())  # type: ignore[operator]
        with pytest.raises(
            ValueError, match=r"parameter 1 of group 0 is a DTensor, whose rows are elsewhere; leave it out"
        ):
            optimizers[0].norm_variables = [[far, ours[2]]]
    finally:
        dist.destroy_process_group()


# ---- What is kept ---------------------------------------------------------------------------------------------------


def _through_torch_save(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def _through_json(state: Any) -> Any:
    """Which makes lists of tuples."""
    return {**state, "param_groups": json.loads(json.dumps(state["param_groups"]))}


def _loaded(through: Callable[[Any], Any]) -> Callable[[AdadeltaKeras], AdadeltaKeras]:
    def loaded(optimizer: AdadeltaKeras) -> AdadeltaKeras:
        other = copy.deepcopy(optimizer)
        other.norm_variables = None
        other.load_state_dict(through(optimizer.state_dict()))
        return other

    return loaded


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda x: pickle.loads(pickle.dumps(x)),
        _loaded(copy.deepcopy),
        _loaded(_through_torch_save),
        _loaded(_through_json),
    ],
    ids=["deepcopy", "pickle", "state_dict", "torch.save", "json"],
)
def test_copies_go_on_with_the_same_bits(copied: Callable[[AdadeltaKeras], AdadeltaKeras]) -> None:
    optimizer, params = small()
    give_gradients(params, 0)
    optimizer.step()
    other = copied(optimizer)
    theirs = params_of(other)
    assert other.norm_variables is not None
    number = {id(param): index for index, param in enumerate(theirs)}
    assert [[(number[id(p)], *rows) for p, *rows in own] for own in other.norm_variables] == [[(0, 0, 3), (1, 0, 3)]]
    assert [group["norm_variables"] for group in other.param_groups] == [((0, 0, 0, 3),), ((0, 0, 0, 3),)]
    for own, one in ((params, optimizer), (theirs, other)):
        give_gradients(own, 1)
        one.step()
    assert_same_training(optimizer, other)


def test_a_checkpoint_without_it_leaves_it(path: Path) -> None:
    """One of an older version, or of torch.optim.Adadelta; None in a checkpoint counts."""
    optimizer, params = small(path)
    given = optimizer.norm_variables
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["norm_variables"]
    optimizer.load_state_dict(state)
    assert str(optimizer.norm_variables) == str(given)
    theirs = torch.optim.Adadelta([{"params": [p]} for p in params])
    optimizer.load_state_dict(theirs.state_dict())
    assert str(optimizer.norm_variables) == str(given)
    optimizer.load_state_dict(small(path, norm_variables=None)[0].state_dict())
    assert optimizer.norm_variables is None
    # What was pickled then has none.
    state = optimizer.__getstate__()
    for group in state["param_groups"]:
        del group["norm_variables"]
    other = AdadeltaKeras.__new__(AdadeltaKeras)
    other.__setstate__(state)
    assert other.norm_variables is None


def test_what_is_given_and_what_comes_back() -> None:
    params = [Parameter(torch.ones(4, 2)), Parameter(torch.ones(3)), Parameter(torch.ones(()))]
    optimizer = AdadeltaKeras(params)
    assert optimizer.norm_variables is None
    optimizer.norm_variables = iter([(params[1], params[0]), [(params[2], 0, 1)]])
    assert optimizer.norm_variables is not None
    expected = [[(params[0], 0, 4), (params[1], 0, 3)], [(params[2], 0, 1)]]
    for actual, own in zip(optimizer.norm_variables, expected, strict=True):
        for (one, *rows), (other, *other_rows) in zip(actual, own, strict=True):
            assert one is other
            assert rows == other_rows
    optimizer.norm_variables = optimizer.norm_variables
    assert optimizer.param_groups[0]["norm_variables"] == ((0, 0, 0, 4), (0, 1, 0, 3), (1, 2, 0, 1))
    optimizer.norm_variables = []
    assert optimizer.norm_variables is None
    # Groups of another optimizer bring theirs.
    optimizer.norm_variables = expected
    assert str(AdadeltaKeras(optimizer.param_groups).norm_variables) == str(optimizer.norm_variables)


def test_groups_come_and_go(path: Path) -> None:
    """A group that is removed takes its pieces along, and those of the others stay where they are."""
    params = [Parameter(torch.ones(3, 2)) for _ in range(4)]
    options: Any = {"norm_variables": variables_of(params, [[(1, 0, 2), (2, 0, 3)], [(0, 0, 1)]]), **path.options}
    optimizer = AdadeltaKeras([{"params": [p]} for p in params[:3]], 1.0, clipnorm=0.5, **options)
    expected = oracle_of(params, [[(1, 0, 2), (2, 0, 3)], [(0, 0, 1)]], clipnorm=0.5)

    def step(seed: int, absent: int) -> None:
        grads: list[Any] = give_gradients(params, seed)
        params[absent].grad = grads[absent] = None
        optimizer.step()
        expected.step(numpy_or_none(grads))

    step(0, absent=3)
    del optimizer.param_groups[0]
    optimizer.add_param_group({"params": [params[3]]})
    for seed in (1, 2):
        step(seed, absent=0)
    for param, one in zip(params, expected.oracles, strict=True):
        assert_same_bits(param, one.p)
        assert_same_bits(optimizer.state[param]["acc_delta"], one.acc_delta)


# ---- What is refused ------------------------------------------------------------------------------------------------

FORM: Final = (
    "give a list of variables, each a list of pieces, each a parameter or (parameter, first row, row behind the last)"
)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (lambda p: 3, f"norm_variables is 3; {FORM}"),
        (lambda p: [3], f"norm_variables[0] is 3; {FORM}"),
        (lambda p: [[3]], f"norm_variables[0] is 3; {FORM}"),
        (lambda p: [[(p[0], 1)]], "a piece in norm_variables[0] is (Parameter containing:"),
        (lambda p: [[(p[0], 0.0, 1)]], "group 0 has (0, 0, 0.0, 1) among its norm_variables, which is no piece: numbers"),
        (lambda p: [[p[0]], []], "norm_variables[1] has no pieces; leave it out"),
        (
            lambda p: [[torch.ones(2, 7)]],
            "norm_variables[0] has a tensor of shape (2, 7) that is no parameter of this optimizer; pass it to the "
            "constructor or to add_param_group before",
        ),
        (
            lambda p: [[(p[0], 2, 5)]],
            "parameter 0 of group 0 ('w') has 4 rows, and norm_variables the rows [2, 5) of it; give rows that it has",
        ),
        (lambda p: [[(p[0], 2, 2)]], "('w') has 4 rows, and norm_variables the rows [2, 2) of it"),
        (lambda p: [[(p[0], -1, 2)]], "('w') has 4 rows, and norm_variables the rows [-1, 2) of it"),
        (lambda p: [[(p[3], 0, 2)]], "parameter 1 of group 1 ('s') has 1 rows, and norm_variables the rows [0, 2) of it"),
        (
            lambda p: [[(p[0], 0, 2), p[1]], [(p[0], 1, 4)]],
            "parameter 0 of group 0 ('w') has the rows [0, 2) and [1, 4) in norm_variables, which overlap; give each row "
            "once",
        ),
        (lambda p: [[p[1], p[1]]], "parameter 1 of group 0 ('b') has the rows [0, 3) and [0, 3) in norm_variables"),
        (
            lambda p: [[(p[2], 0, 1)]],
            "parameter 0 of group 1 ('t'): it has rows that lie between each other in memory (shape (3, 4), strides (1, "
            "3)), and norm_variables splits them. Use .contiguous()",
        ),
    ],
)  # fmt: skip
def test_what_is_refused_changes_nothing(given: Callable[[list[Parameter]], Any], error: str) -> None:
    params = [Parameter(torch.ones(4, 2)), Parameter(torch.ones(3)), Parameter(torch.ones(4, 3).t())]
    params.append(Parameter(torch.ones(())))
    named = [{"params": [("w", params[0]), ("b", params[1])]}, {"params": [("t", params[2]), ("s", params[3])]}]
    optimizer = AdadeltaKeras(named, clipnorm=0.5, norm_variables=[[params[1], params[2]]])  # type: ignore[arg-type]
    give_gradients(params, 0)
    optimizer.step()
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError), match=re.escape(error)):
        optimizer.norm_variables = given(params)
    assert_unchanged(optimizer, before)
    with pytest.raises((TypeError, ValueError), match=re.escape(error)):
        AdadeltaKeras(named, norm_variables=given(params))  # type: ignore[arg-type]


def test_parameters_that_cannot_have_pieces() -> None:
    lazy = torch.nn.LazyLinear(3)
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 has no shape yet; materialise it before"):
        AdadeltaKeras(lazy.parameters(), norm_variables=[list(lazy.parameters())])
    param = Parameter(torch.ones(3, 2))
    with pytest.warns(UserWarning, match="duplicate"):
        twice = AdadeltaKeras([param, param])
    with pytest.raises(
        ValueError, match=r"parameter 0 of group 0 is listed twice in its group; norm_variables takes it"
    ):
        twice.norm_variables = [[(param, 0, 1)]]


def test_what_a_group_is_given_by_hand_is_checked_before_a_step(path: Path) -> None:
    optimizer, params = small(path)
    give_gradients(params, 0)
    optimizer.step()
    for value, error in {
        ((0, 0, 0, 5),): r"parameter 0 of group 1 has 3 rows, and norm_variables the rows \[0, 5\) of it",
        ((0, 1, 0, 1),): r"group 1 has 1 parameters, and norm_variables for its parameter 1. Set optimizer.norm_var",
        (7,): r"group 1 has 7 among its norm_variables, which is no piece: numbers of a variable",
    }.items():
        optimizer.param_groups[1]["norm_variables"] = value
        before = snapshot(optimizer)
        with pytest.raises((TypeError, ValueError), match=error):
            optimizer.step()
        assert_unchanged(optimizer, before)
    optimizer.param_groups[1]["norm_variables"] = given = [[0, 0, 0, 3]]
    optimizer.step()
    assert optimizer.param_groups[1]["norm_variables"] is given  # a step writes nothing there


def test_a_checkpoint_that_does_not_fit_changes_nothing() -> None:
    optimizer, params = small(norm_variables=None)
    state = small()[0].state_dict()
    state["param_groups"][0]["norm_variables"] = ((0, 0, 0, 7),)
    give_gradients(params, 0)
    optimizer.step()
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 has 4 rows, and norm_variables the rows \[0, 7\)"):
        optimizer.load_state_dict(state)
    assert_unchanged(optimizer, before)
    with pytest.raises(ValueError, match=r"parameter 0 of group 2 has 1 rows"):
        optimizer.add_param_group({"params": [Parameter(torch.ones(1))], "norm_variables": ((0, 0, 0, 2),)})
    assert len(optimizer.param_groups) == 2


def test_gradients_that_do_not_fit_change_nothing(path: Path) -> None:
    for steps in (0, 2):
        optimizer, params = small(path)
        for step in range(steps):
            give_gradients(params, step)
            optimizer.step()
        give_gradients(params, 9)
        before = snapshot(optimizer)
        for bad, error in (
            (
                torch.ones(4, 2).to_sparse(1),
                "parameter 0 of group 0 has a sparse gradient, which norm_variables has no",
            ),
            (torch.ones(2, 2), r"parameter 0 of group 0 has shape \(4, 2\), but its gradient has shape \(2, 2\)"),
        ):
            good, params[0].grad = params[0].grad, None
            params[0].grad = bad if bad.is_sparse else good
            if not bad.is_sparse:
                assert params[0].grad is not None
                params[0].grad.data = bad
            with pytest.raises(RuntimeError, match=error):
                optimizer.step()
            assert_unchanged(optimizer, before)
            give_gradients(params, 9)
        optimizer.step()


def test_state_that_cannot_be_parted_changes_nothing(path: Path) -> None:
    optimizer, params = small(path)
    give_gradients(params, 0)
    optimizer.step()
    state = optimizer.state[params[0]]
    state["acc_delta"] = torch.zeros(2, 4).t()
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"parameter 0 of group 0: its acc_delta has rows that lie between each other"):
        optimizer.step()
    assert_unchanged(optimizer, before)
    state["acc_delta"] = state["square_avg"]
    with pytest.raises(
        RuntimeError, match=r"parameter 0 of group 0: its state square_avg and its state acc_delta share"
    ):
        optimizer.step()


def test_it_is_for_all_parameters() -> None:
    """Not for optimizers of which each process has a part; and not for steps in the backward pass, as clipnorm."""
    error = "norm_variables is for an optimizer that has all parameters: not for norm_group"
    with pytest.raises(ValueError, match=error):
        small(norm_group="world")
    optimizer, _ = small()
    with pytest.raises(ValueError, match=error):
        optimizer.norm_group = "world"
    assert optimizer.norm_group is None
    with pytest.raises(ValueError, match=r"clipnorm=0\.5 cannot be applied"):
        step_in_backward(optimizer)


def _refused_by_zero() -> list[str]:
    """What a ZeroRedundancyOptimizer is refused: now, and with the step after a checkpoint that has it."""
    # Not at the top: what it does to TorchScript keeps cycles of parameters from being collected, in this very process.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    params = [Parameter(torch.ones(4, 2)) for _ in range(2)]
    options: Any = {"clipnorm": 0.5, "norm_variables": [[(param, 0, 1)] for param in params]}
    errors = []
    try:
        ZeroRedundancyOptimizer(params, AdadeltaKeras, lr=1.0, **options)
    except ValueError as error:
        errors.append(str(error))
    sharded = ZeroRedundancyOptimizer(params, AdadeltaKeras, lr=1.0, clipnorm=0.5)
    sharded.load_state_dict(AdadeltaKeras(params, **options).state_dict())
    for param in params:
        param.grad = torch.ones(4, 2)
    try:
        sharded.step()
    except ValueError as error:
        errors.append(str(error))
    assert all(bool((param == 1).all()) for param in params)
    return errors


def test_zero_is_refused(two: Processes) -> None:
    for errors in two.run(_refused_by_zero):
        assert len(errors) == 2
        assert all("nor for ZeroRedundancyOptimizer. Set optimizer.norm_variables to None" in error for error in errors)
