"""Memory that belongs to two parameters: refused by name on every path, before anything is written, or allowed on all."""

import random
from collections.abc import Callable
from typing import Any

import direct
import pytest
import torch
from cases import PATHS, Path, assert_same_bits, assert_unchanged, gradients, snapshot
from torch import Tensor
from torch.nn import Parameter

from torch_adadelta import AdadeltaKeras
from torch_adadelta.backends import kernels
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


def _state_dict_of_another(state: State, p: Parameter, q: Parameter) -> None:
    state[q] = state[p]


def _square_avg_of_another(state: State, p: Parameter, q: Parameter) -> None:
    state[q]["square_avg"] = state[p]["square_avg"]


def _acc_delta_is_square_avg_of_another(state: State, p: Parameter, q: Parameter) -> None:
    state[q]["acc_delta"] = state[p]["square_avg"]


def _states_in_one_buffer_that_overlap(state: State, p: Parameter, q: Parameter) -> None:
    buffer = torch.zeros(40)
    state[p]["acc_delta"], state[q]["acc_delta"] = buffer[:24].view(6, 4), buffer[16:].view(6, 4)


def _state_is_another_parameter(state: State, p: Parameter, q: Parameter) -> None:
    state[q]["square_avg"] = p.detach()


def _gradient_is_another_parameter(state: State, p: Parameter, q: Parameter) -> None:
    q.grad = p.detach()


def _gradient_is_a_part_of_another_parameter(state: State, p: Parameter, q: Parameter) -> None:
    q.grad = p.detach()[5:].expand(6, 4)


def _gradient_is_state_of_another(state: State, p: Parameter, q: Parameter) -> None:
    q.grad = state[p]["acc_delta"]


SPOILERS: dict[Callable[[State, Parameter, Parameter], None], str] = {
    _state_dict_of_another: "{p}: its state square_avg and the state square_avg of {q} share memory",
    _square_avg_of_another: "{p}: its state square_avg and the state square_avg of {q} share memory",
    _acc_delta_is_square_avg_of_another: "{p}: its state square_avg and the state acc_delta of {q} share memory",
    _states_in_one_buffer_that_overlap: "{p}: its state acc_delta and the state acc_delta of {q} share memory",
    _state_is_another_parameter: "{p}: it and the state square_avg of {q} share memory",
    _gradient_is_another_parameter: "{q}: its gradient and {p} share memory",
    _gradient_is_a_part_of_another_parameter: "{q}: its gradient and {p} share memory",
    _gradient_is_state_of_another: "{q}: its gradient and the state acc_delta of {p} share memory",
}


@pytest.mark.parametrize(
    "options", [{}, {"clipnorm": 0.5}, {"rho": lambda: 0.9}], ids=["plain", "clipnorm", "callable"]
)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__.strip("_"))
def test_it_is_refused_by_name_and_nothing_is_written(
    path: Path, spoil: Callable[[State, Parameter, Parameter], None], groups: int, options: dict[str, Any]
) -> None:
    optimizer = stepped(path, groups, **options)
    params = params_of(optimizer)
    p, q = params[0], params[-1]
    spoil(optimizer.state, p, q)
    before = snapshot(optimizer)
    names = {"p": r"parameter 0 of group 0", "q": rf"parameter {COUNT // groups - 1} of group {groups - 1}"}
    for _ in range(2):  # what was refused once is not known to be good
        with pytest.raises(RuntimeError, match=f"{SPOILERS[spoil].format(**names)}. Use .clone()"):
            optimizer.step()
        assert_unchanged(optimizer, before)
    optimizer.state[q] = {key: tensor.clone() for key, tensor in optimizer.state[q].items()}
    optimizer.state[p] = {key: tensor.clone() for key, tensor in optimizer.state[p].items()}
    give_gradients(params, 7)
    optimizer.step()
    assert optimizer.iterations == 3


def test_a_gradient_that_moves_is_looked_at_again(path: Path) -> None:
    """From step to step the library compares where everything is with where it was."""
    optimizer = stepped(path, 1)
    p, q = (params_of(optimizer)[i] for i in (1, 2))
    good = q.grad
    for bad in (p.detach(), optimizer.state[p]["square_avg"]):
        for _ in range(2):
            q.grad = bad
            before = snapshot(optimizer)
            with pytest.raises(RuntimeError, match=r"parameter 2 of group 0: its gradient and .* share memory"):
                optimizer.step()
            assert_unchanged(optimizer, before)
            q.grad = good
            optimizer.step()
    optimizer.param_groups[0]["params"].pop()
    optimizer.step()
    q.grad = p.detach()
    with pytest.raises(RuntimeError, match="share memory"):
        optimizer.step()


@pytest.mark.parametrize("which", ["square_avg", "acc_delta", "values of state", "values of a parameter"])
def test_sparse_gradients(path: Path, which: str) -> None:
    params = [Parameter(torch.ones(6, 4)) for _ in range(3)]
    optimizer = AdadeltaKeras(params, 1.0, **path.options)
    for p in params:
        p.grad = torch.sparse_coo_tensor(torch.tensor([[1, 4]]), torch.ones(2, 4), (6, 4), check_invariants=False)
    optimizer.step()
    if which in ("square_avg", "acc_delta"):
        optimizer.state[params[2]][which] = optimizer.state[params[0]][which]
        message = f"parameter 0 of group 0: its state {which} and the state {which} of parameter 2 of group 0"
    else:
        table = params[0].detach() if which == "values of a parameter" else optimizer.state[params[0]]["acc_delta"]
        params[2].grad = torch.sparse_coo_tensor(torch.tensor([[0, 5]]), table[2:4], (6, 4), check_invariants=False)
        of = "" if which == "values of a parameter" else "the state acc_delta of "
        message = f"parameter 2 of group 0: its gradient and {of}parameter 0 of group 0"
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=f"{message} share memory"):
        optimizer.step()
    assert_unchanged(optimizer, before)


# ---- What may be shared -----------------------------------------------------------------------------------------------


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


def _listed_twice_with_itself_as_gradient(params: list[Parameter]) -> list[Parameter]:
    params[0].grad = params[0].detach()
    return [*params, params[0]]


def _parameters_with_one_memory(params: list[Parameter]) -> list[Parameter]:
    other = Parameter(params[0].detach())
    other.grad = torch.full((6, 4), -0.5)
    return [*params, other]


def _parameters_that_overlap(params: list[Parameter]) -> list[Parameter]:
    other = Parameter(params[1].detach().view(-1)[:12].view(3, 4))
    other.grad = torch.full((3, 4), -0.5)
    return [*params, other]


def _columns_of_one_matrix(params: list[Parameter]) -> list[Parameter]:
    matrix = torch.ones(6, 8)
    columns = [Parameter(matrix[:, :4]), Parameter(matrix[:, 4:])]
    for column, param in zip(columns, params, strict=False):
        column.grad = param.grad
    return columns


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize(
    "share",
    [
        _one_gradient_for_all,
        _gradients_that_overlap,
        _listed_twice_with_itself_as_gradient,
        _parameters_with_one_memory,
        _parameters_that_overlap,
        _columns_of_one_matrix,
    ],
    ids=lambda share: share.__name__.strip("_"),
)
def test_it_works_with_the_bits_of_the_for_loop(
    path: Path, share: Callable[[list[Parameter]], list[Parameter]]
) -> None:
    results = []
    for chosen in (PATHS[0], path):
        params = [Parameter(torch.full((6, 4), 1.0 + i)) for i in range(3)]
        give_gradients(params, 0)
        params = share(params)
        optimizer = AdadeltaKeras(params, 1.0, **chosen.options)
        for _ in range(3):
            optimizer.step()
        results.append([tensor for p in params for tensor in (p, *optimizer.state[p].values())])
    for expected, actual in zip(*results, strict=True):
        assert_same_bits(actual, expected)


def test_two_parameters_of_one_memory_may_have_one_state(path: Path) -> None:
    """As one parameter that is listed twice."""
    results = []
    for chosen in (PATHS[0], path):
        one = Parameter(torch.ones(6, 4))
        params = [one, Parameter(torch.ones(2)), Parameter(one.detach())]
        for i, param in enumerate(params):
            param.grad = gradients(param.shape, torch.float32, 1, i)[0]
        optimizer = AdadeltaKeras(params, 1.0, **chosen.options)
        optimizer.step()
        optimizer.state[params[2]] = optimizer.state[one]
        optimizer.step()
        results.append([one, *optimizer.state[one].values()])
    for expected, actual in zip(*results, strict=True):
        assert_same_bits(actual, expected)


# ---- The same verdict in Python and in C++ ----------------------------------------------------------------------------


def drawn_rows(draw: random.Random, base: Tensor) -> list[validation.Row]:
    """Three rows of slices of one buffer, most of which lie apart."""
    length = draw.randint(1, 4)
    slices = [base[begin : begin + length] for begin in range(0, length * 12, length)]
    for _ in range(draw.randint(0, 3)):
        begin = draw.randint(0, length * 11)
        slices[draw.randrange(12)] = draw.choice([*slices, base[begin : begin + length]])
    if draw.random() < 0.3:  # the same parameter again, perhaps with the same state
        slices[8] = slices[0]
        if draw.random() < 0.7:
            slices[10:12] = slices[2:4]
    return [tuple(slices[i : i + 4]) for i in (0, 4, 8)]  # type: ignore[misc]


@pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")
def test_drawn_overlaps_have_the_same_verdict_in_python_and_in_the_library() -> None:
    draw = random.Random(0)
    base = torch.zeros(64)
    verdicts = []
    for _ in range(4000):
        rows = drawn_rows(draw, base)
        refusals = []
        for check in (
            lambda: validation.check_apart(rows, lambda param: "parameter"),  # noqa: B023
            lambda: direct.check(*map(list, zip(*rows, strict=True))),  # type: ignore[arg-type]  # noqa: B023
        ):
            try:
                check()
                refusals.append(False)
            except RuntimeError:
                refusals.append(True)
        assert refusals[0] == refusals[1], [[tensor.storage_offset() for tensor in row] for row in rows]
        verdicts.append(refusals[0])
    assert 400 < sum(verdicts) < 3600
