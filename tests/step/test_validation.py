"""Checks that name a parameter: memory that two tensors share, and what a parameter, its gradient and state may be."""

import re
from collections.abc import Callable
from typing import Any

import direct
import pytest
import torch
from cases import DTYPES, PATHS, Path, assert_same_bits, assert_unchanged, gradients, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter, UninitializedParameter

from torch_adadelta import AdadeltaKeras
from torch_adadelta.backends import kernels
from torch_adadelta.backends.batch import Backend, Row
from torch_adadelta.step import validation

COUNT = 4

State = dict[Tensor, dict[str, Tensor]]


def stepped(path: Path, groups: int, steps: int = 2, **options: Any) -> AdadeltaKeras:
    """Four parameters in some groups, with state, and with gradients for another step."""
    params = [Parameter(torch.full((6, 4), 1.0 + i)) for i in range(COUNT)]
    param_groups = [{"params": params[i::groups]} for i in range(groups)]
    optimizer = AdadeltaKeras(param_groups, 1.0, **{**path.options, **options})
    for step in range(steps + 1):
        if step > 0:
            optimizer.step()
        give_gradients(params, step)
    return optimizer


def give_gradients(params: list[Parameter], seed: int) -> None:
    for i, param in enumerate(params):
        param.grad = gradients((6, 4), param.dtype, 1, 10 * seed + i)[0]


def params_of(optimizer: AdadeltaKeras) -> list[Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def sparse(values: Tensor, *rows: int) -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, (6, 4), check_invariants=False)


# ---- Memory that two tensors share ----------------------------------------------------------------------------------


def _state_dict_of_another(state: State, p: Parameter, q: Parameter) -> None:
    state[q] = state[p]


def _square_avg_of_another(state: State, p: Parameter, q: Parameter) -> None:
    state[q]["square_avg"] = state[p]["square_avg"]


def _acc_delta_is_square_avg_of_another(state: State, p: Parameter, q: Parameter) -> None:
    state[q]["acc_delta"] = state[p]["square_avg"]


def _states_share_one_element(state: State, p: Parameter, q: Parameter) -> None:
    buffer = torch.zeros(47)
    state[p]["acc_delta"], state[q]["acc_delta"] = buffer[:24].view(6, 4), buffer[23:].view(6, 4)


def _state_is_another_parameter(state: State, p: Parameter, q: Parameter) -> None:
    state[q]["square_avg"] = p.detach()


def _both_states_in_one(state: State, p: Parameter, q: Parameter) -> None:
    state[p]["acc_delta"] = state[p]["square_avg"]


def _state_is_the_parameter(state: State, p: Parameter, q: Parameter) -> None:
    state[p]["acc_delta"] = p.detach()


def _gradient_is_another_parameter(state: State, p: Parameter, q: Parameter) -> None:
    q.grad = p.detach()


def _gradient_is_a_part_of_another_parameter(state: State, p: Parameter, q: Parameter) -> None:
    q.grad = p.detach()[5:].expand(6, 4)


def _gradient_is_state_of_another(state: State, p: Parameter, q: Parameter) -> None:
    q.grad = state[p]["acc_delta"]


def _gradient_is_the_parameter(state: State, p: Parameter, q: Parameter) -> None:
    q.grad = q.detach()


def _gradient_is_the_parameter_turned(state: State, p: Parameter, q: Parameter) -> None:
    q.grad = q.detach().flip(0).set_(q.detach().untyped_storage(), 0, (6, 4), (1, 6))


def _gradient_is_its_state(state: State, p: Parameter, q: Parameter) -> None:
    q.grad = state[q]["square_avg"]


def _parameters_overlap(state: State, p: Parameter, q: Parameter) -> None:
    memory = torch.ones(47)
    p.data, q.data = memory[:24].view(6, 4), memory[23:].view(6, 4)


def _two_parameters_of_one_memory(state: State, p: Parameter, q: Parameter) -> None:
    q.data = p.data


def _columns_of_one_matrix(state: State, p: Parameter, q: Parameter) -> None:
    matrix = torch.ones(6, 8)
    p.data, q.data = matrix[:, :4], matrix[:, 4:]


def _values_of_another_parameter(state: State, p: Parameter, q: Parameter) -> None:
    q.grad = sparse(p.detach()[2:4], 0, 5)


def _values_of_state(state: State, p: Parameter, q: Parameter) -> None:
    p.grad = sparse(torch.ones(2, 4), 1, 4)  # of one batch
    q.grad = sparse(state[p]["acc_delta"][2:4], 0, 5)


def _values_of_the_parameter(state: State, p: Parameter, q: Parameter) -> None:
    q.grad = sparse(q.detach()[2:4], 0, 5)


SPOILERS: dict[Callable[[State, Parameter, Parameter], None], str] = {
    _state_dict_of_another: "{p}: its state square_avg and the state square_avg of {q}",
    _square_avg_of_another: "{p}: its state square_avg and the state square_avg of {q}",
    _acc_delta_is_square_avg_of_another: "{p}: its state square_avg and the state acc_delta of {q}",
    _states_share_one_element: "{p}: its state acc_delta and the state acc_delta of {q}",
    _state_is_another_parameter: "{p}: it and the state square_avg of {q}",
    _both_states_in_one: "{p}: its state square_avg and its state acc_delta",
    _state_is_the_parameter: "{p}: it and its state acc_delta",
    _gradient_is_another_parameter: "{q}: its gradient and {p}",
    _gradient_is_a_part_of_another_parameter: "{q}: its gradient and {p}",
    _gradient_is_state_of_another: "{q}: its gradient and the state acc_delta of {p}",
    _gradient_is_the_parameter: "{q}: it and its gradient",
    _gradient_is_the_parameter_turned: "{q}: it and its gradient",
    _gradient_is_its_state: "{q}: its gradient and its state square_avg",
    _parameters_overlap: "{p}: it and {q}",
    _two_parameters_of_one_memory: "{p}: it and {q}",
    _columns_of_one_matrix: "{p}: it and {q}",
    _values_of_another_parameter: "{q}: its gradient and {p}",
    _values_of_state: "{q}: its gradient and the state acc_delta of {p}",
    _values_of_the_parameter: "{q}: it and its gradient",
}

SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "one group": (1, {}),
    "two groups, clipnorm": (2, {"clipnorm": 0.5}),
    "two groups, callable": (2, {"rho": lambda: 0.9}),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__.strip("_"))
def test_it_is_refused_by_name_and_nothing_is_written(
    path: Path, spoil: Callable[[State, Parameter, Parameter], None], setting: str
) -> None:
    groups, options = SETTINGS[setting]
    optimizer = stepped(path, groups, **options)
    params = params_of(optimizer)
    p, q = params[0], params[-1]
    spoil(optimizer.state, p, q)
    before = snapshot(optimizer)
    names = {"p": "parameter 0 of group 0", "q": f"parameter {COUNT // groups - 1} of group {groups - 1}"}
    for _ in range(2):  # what was refused once is not known to be good
        with pytest.raises(RuntimeError, match=f"^{SPOILERS[spoil].format(**names)} share memory. Use .clone()"):
            optimizer.step()
        assert_unchanged(optimizer, before)
    for param in (p, q):
        optimizer.state[param] = {key: tensor.clone() for key, tensor in optimizer.state[param].items()}
        param.data = param.data.clone()
    give_gradients(params, 7)
    optimizer.step()
    assert optimizer.iterations == 3


@pytest.mark.parametrize(
    "spoil", [_two_parameters_of_one_memory, _square_avg_of_another, _gradient_is_state_of_another]
)
def test_it_is_refused_between_a_dense_and_a_sparse_gradient(
    path: Path, spoil: Callable[[State, Parameter, Parameter], None]
) -> None:
    """Which two calls update: looked at where one of the parameters, or its kind of gradient, is new."""
    optimizer = stepped(path, 1)
    params = params_of(optimizer)
    params[0].grad = sparse(torch.ones(2, 4), 1, 4)
    spoil(optimizer.state, params[0], params[-1])
    before = snapshot(optimizer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"share memory\. Use \.clone\(\)"):
            optimizer.step()
        assert_unchanged(optimizer, before)


def test_a_gradient_that_moves_is_looked_at_again(path: Path) -> None:
    """From step to step the library compares where everything is with where it was."""
    optimizer = stepped(path, 1)
    p, q = (params_of(optimizer)[i] for i in (1, 2))
    good = q.grad
    for bad in (p.detach(), optimizer.state[p]["square_avg"], q.detach()):
        for _ in range(2):
            q.grad = bad
            before = snapshot(optimizer)
            with pytest.raises(RuntimeError, match=r"parameter 2 of group 0: it.* and .* share memory"):
                optimizer.step()
            assert_unchanged(optimizer, before)
            q.grad = good
            optimizer.step()
    optimizer.param_groups[0]["params"].pop()
    optimizer.step()
    q.grad = p.detach()
    with pytest.raises(RuntimeError, match="share memory"):
        optimizer.step()


# ---- What may be shared ---------------------------------------------------------------------------------------------


def _one_gradient_for_all(params: list[Parameter]) -> list[Parameter]:
    shared = torch.full((6, 4), 0.25)
    for param in params:
        param.grad = shared
    return params


def _gradients_that_overlap(params: list[Parameter]) -> list[Parameter]:
    buffer = torch.arange(48.0)
    for i, param in enumerate(params):
        param.grad = buffer[4 * i : 4 * i + 24].view(6, 4)
    return params


def _listed_twice(params: list[Parameter]) -> list[Parameter]:
    return [*params, params[0]]


def _views_of_one_buffer(params: list[Parameter]) -> list[Parameter]:
    memory, grads = torch.arange(72.0), torch.arange(72.0).neg()
    views = [Parameter(memory[i : i + 24].view(6, 4)) for i in (0, 24, 48)]
    for i, view in enumerate(views):
        view.grad = grads[24 * i : 24 * i + 24].view(6, 4)
    return views


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize(
    "share",
    [_one_gradient_for_all, _gradients_that_overlap, _listed_twice, _views_of_one_buffer],
    ids=lambda share: share.__name__.strip("_"),
)
def test_what_may_be_shared_gives_the_bits_of_clones(
    path: Path, share: Callable[[list[Parameter]], list[Parameter]]
) -> None:
    """Of each parameter by itself, one after the other."""
    params = [Parameter(torch.full((6, 4), 1.0 + i)) for i in range(3)]
    give_gradients(params, 0)
    params = share(params)
    places = [next(i for i, other in enumerate(params) if other is param) for param in params]
    alone = [Parameter(param.detach().clone()) for param in params]
    steps = [AdadeltaKeras([param], 1.0, foreach=False) for param in alone]
    optimizer = AdadeltaKeras(params, 1.0, **path.options)
    for _ in range(3):
        optimizer.step()
        for place, param in zip(places, params, strict=True):
            alone[place].grad = param.grad
            steps[place].step()
    for place, param in zip(places, params, strict=True):
        assert_same_bits(param, alone[place])
        for key, value in optimizer.state[param].items():
            assert_same_bits(value, steps[place].state[alone[place]][key])


@pytest.mark.parametrize("is_sparse", [False, True])
def test_two_parameters_of_one_memory_and_one_state(path: Path, is_sparse: bool) -> None:
    """As one parameter that is listed twice; also where two calls update them."""
    results = []
    for chosen in (PATHS[0], path):
        one = Parameter(torch.ones(6, 4))
        params = [one, Parameter(torch.ones(2)), Parameter(one.detach())]
        optimizer = AdadeltaKeras(params, 1.0, **chosen.options)
        state = {"square_avg": torch.zeros(6, 4), "acc_delta": torch.zeros(6, 4)}
        optimizer.state[one], optimizer.state[params[2]] = state, dict(state)
        for step in range(3):
            for i, param in enumerate(params):
                param.grad = gradients(param.shape, torch.float32, 1, 10 * step + i)[0]
            if is_sparse:
                assert one.grad is not None
                one.grad = one.grad.to_sparse(1)
            optimizer.step()
        results.append([one, *state.values()])
    for expected, actual in zip(*results, strict=True):
        assert_same_bits(actual, expected)


# ---- The same verdict in Python and in C++ --------------------------------------------------------------------------

BASE = torch.zeros(120, dtype=torch.bfloat16)


@st.composite
def _rows(draw: st.DrawFn) -> list[Row]:
    """Three rows of slices of one buffer, most of which lie apart. All have remainders, or none has."""
    length = draw(st.integers(1, 4))
    stride = draw(st.sampled_from([1, 1, 2]))

    def piece(begin: int) -> Tensor:
        return BASE[begin : begin + stride * (length - 1) + 1 : stride]

    slices = [piece(number * stride * length) for number in range(15)]
    places = st.integers(0, 14)
    for _ in range(draw(st.integers(0, 2))):
        elsewhere = st.builds(piece, st.integers(0, 14 * length * stride))
        slices[draw(places)] = draw(st.one_of(places.map(slices.__getitem__), elsewhere))
    if draw(st.booleans()):  # the same parameter again, perhaps with the same state
        slices[10] = slices[0]
        if draw(st.integers(0, 3)):
            slices[12:15] = slices[2:5]
    has_remainders = draw(st.booleans())
    rows = (slices[i : i + 5] for i in (0, 5, 10))
    return [Row(*row, None, rest.view(torch.int16) if has_remainders else None) for *row, rest in rows]


def _refusal(check: Callable[[], None]) -> set[str]:
    """Which parameters are named, if any."""
    try:
        check()
    except RuntimeError as error:
        return set(re.findall(r"parameter (\d)", str(error)))
    return set()


@pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")
@settings(max_examples=600, deadline=None)
@given(_rows())
def test_drawn_rows_have_the_same_verdict_in_python_and_in_the_library(rows: list[Row]) -> None:
    numbers = {id(row[0]): number for number, row in reversed(list(enumerate(rows)))}
    in_python = _refusal(lambda: validation.check_apart(rows, lambda param: f"parameter {numbers[id(param)]}"))
    *lists, _, remainders = map(list, zip(*rows, strict=True))
    has_masters = remainders[0] is not None
    options = {"has_masters": has_masters, "remainders": remainders if has_masters else []}
    in_library = _refusal(lambda: direct.check(*lists, **options))
    places = [[(x.storage_offset(), x.stride()) for x in row if x is not None] for row in rows]
    assert bool(in_python) == bool(in_library), places
    assert bool(in_python) == _overlap(rows), places


def _bytes(x: Tensor) -> range:
    return range(x.storage_offset(), x.storage_offset() + x.stride(0) * (x.numel() - 1) + 1)


def _overlap(rows: list[Row]) -> bool:
    """The rule, spelled out: every pair of tensors of which one is written to, but for a parameter that is repeated."""
    distinct: list[Any] = []
    for row in rows:
        ranges = [_bytes(x) for x in row if x is not None]
        if not any(ranges[:1] + ranges[2:] == known[:1] + known[2:] for known in distinct):
            distinct.append(ranges)
    written = [place for ranges in distinct for place in (ranges[0], *ranges[2:])]
    read = [_bytes(row[1]) for row in rows]
    pairs = [(x, y) for i, x in enumerate(written) for y in (*written[:i], *read)]
    return any(x.start < y.stop and y.start < x.stop for x, y in pairs)


# ---- What a parameter, its gradient and its state may be ------------------------------------------------------------

ONES = torch.ones(2, 3)
OVERLAPPING = torch.ones(1, 3).expand(2, 3)
LAZY = torch._neg_view(torch.ones(2, 3))
NEGATED = r"a lazily conjugated or negated view. Use .resolve_conj\(\).resolve_neg\(\)"

with torch.inference_mode():
    INFERENCE = torch.ones(2, 3)
    INFERENCE_REMAINDER = torch.ones(2, 3, dtype=torch.int16)

# The row with one tensor replaced, and what is said of it.
ROWS: list[tuple[dict[int, Any], type[Exception], str]] = [
    ({0: ONES.long()}, TypeError, "p has dtype torch.int64; Adadelta trains floating-point and complex parameters"),
    ({0: ONES.to_sparse()}, ValueError, "p has layout torch.sparse_coo; only dense parameters can be trained"),
    ({0: LAZY}, ValueError, NEGATED),
    ({0: (ONES + 0j).conj()}, ValueError, NEGATED),
    ({0: OVERLAPPING}, ValueError, r"p overlaps itself in memory \(shape \(2, 3\), strides \(0, 1\)\)"),
    ({1: ONES.to_sparse_csr()}, RuntimeError, "p has a gradient of layout torch.sparse_csr; only dense and"),
    ({1: ONES[:1]}, RuntimeError, r"p has shape \(2, 3\), but its gradient has shape \(1, 3\)"),
    ({1: ONES.to("meta")}, RuntimeError, "p is on cpu, but its gradient is on meta. Move it there"),
    ({1: ONES + 0j}, RuntimeError, "p has dtype torch.float32, but its gradient has dtype torch.complex64"),
    ({1: ONES.long()}, RuntimeError, "p has dtype torch.float32, but its gradient has dtype torch.int64"),
    ({2: None}, RuntimeError, r"p: its state square_avg is None, not a Tensor. Delete optimizer.state\[param\]"),
    ({3: 0.5}, RuntimeError, "p: its state acc_delta is 0.5, not a Tensor"),
    ({3: torch.ones(3)}, RuntimeError, r"p has shape \(2, 3\), but its state acc_delta has shape \(3,\)"),
    ({2: ONES.to("meta")}, RuntimeError, "p is on cpu, but its state square_avg is on meta"),
    ({2: ONES + 0j}, RuntimeError, "p has dtype torch.float32, but its state square_avg has dtype torch.complex64"),
    ({2: ONES.double()}, RuntimeError, "its state square_avg has dtype torch.float64. Convert the state too"),
    ({3: ONES.double()}, RuntimeError, "its state acc_delta has dtype torch.float64. Convert the state too"),
    ({2: OVERLAPPING}, RuntimeError, "p: its state square_avg is not a dense tensor of its own memory"),
    ({3: ONES.to_sparse()}, RuntimeError, "p: its state acc_delta is not a dense tensor of its own memory"),
    ({3: LAZY}, RuntimeError, "its state acc_delta is " + NEGATED),
    ({4: ONES.double()}, RuntimeError, "its state average has dtype torch.float64, not torch.float32"),
    ({4: OVERLAPPING}, RuntimeError, "p: its state average is not a dense tensor of its own memory"),
    ({4: INFERENCE}, RuntimeError, "p: its state average was made in inference mode"),
    ({5: ONES}, RuntimeError, "p: its state remainder has dtype torch.float32, not torch.int16. Delete it"),
    ({5: 0}, RuntimeError, "p: its state remainder is 0, not a Tensor"),
    ({5: ONES[:1].short()}, RuntimeError, r"p has shape \(2, 3\), but its state remainder has shape \(1, 3\)"),
    ({5: ONES.short().to("meta")}, RuntimeError, "p is on cpu, but its state remainder is on meta"),
    ({5: OVERLAPPING.short()[:1].expand(2, 3)}, RuntimeError, "p: its state remainder is not a dense tensor"),
    ({5: INFERENCE_REMAINDER}, RuntimeError, "p: its state remainder was made in inference mode"),
    ({0: INFERENCE}, RuntimeError, "p or its state was made in inference mode"),
    ({3: INFERENCE}, RuntimeError, "p or its state was made in inference mode"),
]


@pytest.mark.parametrize(("spoil", "error", "message"), ROWS)
def test_rows_that_are_refused(spoil: dict[int, Any], error: type[Exception], message: str) -> None:
    row = [spoil.get(place, ONES if place < 4 else None) for place in range(6)]
    with pytest.raises(error, match=message):
        validation.check_row(lambda: "p", Row(*row), torch.float32)


def test_rows_that_are_not_refused() -> None:
    rows = [[ONES.to(dtype)] * 4 for dtype in DTYPES]
    rows += [
        [ONES, grad, ONES.t().contiguous().t(), ONES] for grad in (ONES.half(), ONES.to_sparse(1), OVERLAPPING, LAZY)
    ]
    for row in rows:
        validation.check_row(lambda: "p", Row(*row), row[0].dtype)
    with torch.inference_mode():
        validation.check_row(lambda: "p", Row(*(INFERENCE,) * 4), torch.float32)
    validation.check_param(lambda: "p", UninitializedParameter())


def test_rows_that_autograd_is_to_follow() -> None:
    leaf = Parameter(ONES)
    validation.check_row(lambda: "p", Row(leaf.clone(), ONES, ONES, ONES), torch.float32, True)
    for row, message in (
        ((leaf, ONES, ONES, ONES), "p is a leaf that requires grad: with differentiable=True pass a clone of it"),
        ((ONES, ONES.to_sparse(1), ONES, ONES), "sparse gradient, which autograd cannot follow"),
    ):
        with pytest.raises(RuntimeError, match=message):
            validation.check_row(lambda: "p", Row(*row), torch.float32, True)


def test_state_that_no_backend_sees() -> None:
    validation.check_state(lambda: "p", Row(ONES, ONES, ONES.double(), ONES), torch.float32)  # which a backend does
    for state in ((None, ONES), (ONES, 3), (ONES, LAZY), (LAZY, ONES)):
        with pytest.raises(RuntimeError, match="p: its state"):
            validation.check_state(lambda: "p", Row(ONES, ONES, *state), torch.float32)  # type: ignore[arg-type]
    validation.check_keys(lambda: "p", {"square_avg": 1, "acc_delta": 2, "more": 3})
    for entry in ({"square_avg": ONES, "step": 3}, {"acc_delta": ONES}, {}):
        with pytest.raises(RuntimeError, match=re.escape(f"p: its state holds {sorted(entry)}, not square_avg and")):
            validation.check_keys(lambda: "p", entry)
    with pytest.raises(RuntimeError, match="p: its state holds"):
        validation.check_keys(lambda: "p", [])


@pytest.mark.parametrize(
    ("option", "dtype", "why"),
    [
        ({"clipvalue": 0.5}, torch.complex64, "clipvalue=0.5 is for real numbers"),
        ({"clipvalue": 0.5}, torch.float64, None),
        *(
            ({"master_weights": True}, dtype, "master_weights=True is for bfloat16 parameters")
            for dtype in (torch.float16, torch.complex32, torch.complex128)
        ),
        *(({"master_weights": True}, dtype, None) for dtype in (torch.float32, torch.float64, torch.bfloat16)),
        *(
            (
                {"state_dtype": torch.float32},
                dtype,
                "state_dtype=torch.float32 is for real parameters of 16 and 32 bits",
            )
            for dtype in (torch.float64, torch.complex32, torch.complex64)
        ),
        *(({"state_dtype": torch.bfloat16}, dtype, None) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    ],
    ids=str,
)
def test_options_are_for_some_dtypes(option: dict[str, Any], dtype: torch.dtype, why: str | None) -> None:
    neutral = {"clipvalue": None, "master_weights": False, "state_dtype": None}
    groups: list[dict[str, Any]] = [
        {"params": [torch.ones(1, dtype=dtype)], **neutral},
        {"params": [ONES, torch.ones(2, dtype=dtype)], "param_names": ["a", "b"], **neutral, **option},
    ]
    validation.check_dtypes(groups, first=2)
    if why is None:
        validation.check_dtypes(groups)
        return
    for first in (0, 1):
        with pytest.raises(ValueError, match=re.escape(f"parameter 1 of group 1 ('b') has dtype {dtype}, and {why}")):
            validation.check_dtypes(groups, first)


def test_names() -> None:
    a, b, c = torch.ones(1), torch.ones(1), torch.ones(1)
    groups = [{"params": [a]}, {"params": [b, c], "param_names": ["weight", "bias"]}]
    assert validation.name_of(groups, a) == "parameter 0 of group 0"
    assert validation.name_of(groups, c) == "parameter 1 of group 1 ('bias')"
    with pytest.raises(KeyError):
        validation.name_of(groups, torch.ones(1))


# ---- Batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("indices", "shape", "message"),
    [
        ([[7, 5, 0]], (5, 3), "has 5 rows, but its sparse gradient has the index 7 at position 0"),
        ([[0, 5, 7]], (5, 3), "has 5 rows, but its sparse gradient has the index 5 at position 1"),
        ([[0, 1, -1]], (5, 3), "has 5 rows, but its sparse gradient has the index -1 at position 2"),
        ([[0, 4], [0, 3]], (5, 3), r"has shape \(5, 3\), but its sparse gradient has the index \(4, 3\) at position 1"),
    ],
)
def test_indices_out_of_range_are_named(path: Path, indices: list[list[int]], shape: Any, message: str) -> None:
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(5, 3)), Parameter(torch.ones(shape))]
    optimizer = AdadeltaKeras(params, 1.0, **path.options)
    for param in params:
        param.grad = torch.ones_like(param)
    params[1].grad = torch.ones(5, 3).to_sparse(1)
    values = torch.ones(len(indices[0]), *shape[len(indices) :])
    params[2].grad = torch.sparse_coo_tensor(indices, values, shape, check_invariants=False)
    before = snapshot(optimizer)
    with pytest.raises(IndexError, match=f"^parameter 2 of group 0 {message}$"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def batch(backend: Backend, *params: Tensor, **options: Any) -> Any:
    return direct.batch_of(backend, list(params), *([torch.ones_like(p) for p in params] for _ in range(3)), **options)


@pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")
def test_every_batch_but_the_first_fused_one_is_checked() -> None:
    """Which its op checks before it writes."""

    def names(param: Tensor) -> str:
        return f"parameter of {param.numel()}"

    first, second = batch(Backend.FUSED, torch.ones(1)), batch(Backend.FUSED, torch.ones(2), torch.ones(3))
    assert validation.check_batches([first, second], names) is None
    second.acc_deltas[1] = torch.ones(4)
    assert validation.check_batches([second, first], names) is None
    refused = validation.check_batches([first, second], names)
    assert refused is not None
    assert refused[0] is second
    with pytest.raises(RuntimeError, match=r"^parameter of 3 has shape \(3,\), but its state acc_delta"):
        validation.raise_named(*refused, names)
    assert torch.equal(first.params[0], torch.ones(1)), "only checked"
    for backend in (Backend.SINGLE_TENSOR, Backend.MULTI_TENSOR):
        bad = batch(backend, torch.ones(3))
        bad.square_avgs[0] = bad.params[0]
        for order in ([bad], [first, bad], [bad, first]):
            with pytest.raises(RuntimeError, match=r"^parameter of 3: it and its state square_avg share memory\."):
                validation.check_batches(order, names)
        bad.square_avgs[0] = torch.ones(3).double()
        with pytest.raises(RuntimeError, match=r"^parameter of 3 has dtype .* square_avg has dtype torch\.float64"):
            validation.check_batches([first, bad], names)


def test_what_only_the_op_has_words_for() -> None:
    made = batch(Backend.FUSED, torch.ones(2), torch.ones(3))
    for param, message in ((1, "parameter of 3: something"), (None, "something")):
        with pytest.raises(RuntimeError, match=f"^{message}$"):
            validation.raise_named(made, validation.Refusal("something", param), lambda p: f"parameter of {p.numel()}")


def test_what_a_cuda_graph_would_do_otherwise_is_refused() -> None:
    on_meta = torch.ones(2, device="meta")  # stands in for CUDA: not the CPU
    hyperparameters = {"lr": 1.0, "rho": 0.9, "epsilon": 1e-7, "weight_decay": 0.0}

    def check(group: dict[str, Any], param: Tensor = on_meta, new_state: list[Tensor] | None = None) -> None:
        groups = [{**hyperparameters, "params": [param], "capturable": True, **group}]
        validation.check_capture(groups, [batch(Backend.FUSED, param)], new_state or [], lambda p: "parameter p")

    check({})
    check({"lr": torch.tensor(1.0, device="meta")})
    for arguments, message in (
        (({"lr": torch.tensor(1.0)},), "learning_rate of group 0 is a Tensor on the CPU|lr of group 0 is a Tensor on"),
        (({"capturable": False},), "group 0 has capturable=False, so iterations would stand still"),
        (({}, on_meta, [on_meta]), "parameter p has no state yet, which every replay would reset to zeros"),
        (({}, torch.ones(2)), "parameter p is on the CPU, where no replay would update it"),
    ):
        with pytest.raises(RuntimeError, match=f"^step\\(\\) is being captured in a CUDA graph, but ({message})"):
            check(*arguments)
