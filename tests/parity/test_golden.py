"""Every implementation, and the oracle, against recorded runs of TensorFlow 2.4.4: see golden/README.md."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import pytest
import torch
from cases import Path, bits, to_numpy
from reference.oracle import Float64Recurrence, OracleOptimizer, SparseGradient, global_square_sum, square_sum

from torch_adadelta import AdadeltaKeras, schedules

_RECORDED: Final = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "recorded.json").read_text())
CASES: Final = {case["name"]: case for case in _RECORDED["cases"]}

REPLAYED: Final = list(CASES)

# golden/README.md: TensorFlow does not fix the order in which it sums squares, so the last bit of a norm is open.
NORM_CLIPPED: Final = [name for name in REPLAYED if {"clipnorm", "global_clipnorm"} & CASES[name]["ctor"].keys()]


class Snapshot(NamedTuple):
    """Parameters and state after a step, one array for each parameter; 16-bit values are widened to float32."""

    p: list[np.ndarray]
    square_avg: list[np.ndarray]
    acc_delta: list[np.ndarray]


def decode(tensor: dict[str, Any], dtype: str) -> np.ndarray:
    """A recorded tensor as the oracle holds it: 16-bit values as float32."""
    raw = b"".join(map(bytes.fromhex, tensor["bits"]))
    if dtype == "bfloat16":
        values = (np.frombuffer(raw, ">u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        values = np.frombuffer(raw, np.dtype(dtype).newbyteorder(">"))
    return values.reshape(tensor["shape"]).astype(np.float64 if dtype == "float64" else np.float32)


def decode_all(tensors: list[dict[str, Any] | None], dtype: str) -> list[np.ndarray | SparseGradient | None]:
    """Tensors, or gradients, of all parameters."""
    return [
        SparseGradient(np.array([tensor["indices"]]), decode(tensor["values"], dtype))
        if tensor is not None and "indices" in tensor
        else None
        if tensor is None
        else decode(tensor, dtype)
        for tensor in tensors
    ]


def to_torch(grad: np.ndarray | SparseGradient | None, param: torch.Tensor) -> torch.Tensor | None:
    if isinstance(grad, SparseGradient):
        values = torch.from_numpy(grad.values).to(param.dtype)
        return torch.sparse_coo_tensor(grad.indices, values, param.shape, check_invariants=True)
    return None if grad is None else torch.from_numpy(grad).to(param.dtype)


def run_ours(case: dict[str, Any], path: Path) -> list[Snapshot]:
    dtype = getattr(torch, case["dtype"])
    params = [torch.from_numpy(decode(t, case["dtype"])).to(dtype).requires_grad_() for t in case["init"]]
    optimizer = AdadeltaKeras(params, **options_of(case), **path.options)
    snapshots = []
    for step in case["steps"]:
        for param, grad in zip(params, decode_all(step["grads"], case["dtype"]), strict=True):
            param.grad = to_torch(grad, param)
        optimizer.step()
        _, *slots = [to_numpy(weight).copy() for weight in optimizer.variables()]
        snapshots.append(
            Snapshot([to_numpy(param).copy() for param in params], slots[: len(params)], slots[len(params) :])
        )
    assert optimizer.iterations == case["iterations"]
    return snapshots


def options_of(case: dict[str, Any]) -> dict[str, Any]:
    if case["schedule"] is None:
        return dict(case["ctor"])
    return {**case["ctor"], "learning_rate": schedules.deserialize(case["schedule"])}


def oracle_options_of(case: dict[str, Any]) -> dict[str, Any]:
    options = options_of(case)
    schedule = options.get("learning_rate")
    if isinstance(schedule, schedules.LearningRateSchedule):  # whose values have tests of their own
        options["learning_rate"] = lambda t: np.float32(schedule(float(t)))
    return options


def run_oracle(case: dict[str, Any]) -> list[Snapshot]:
    dtypes = [case["dtype"]] * len(case["init"])
    oracle = OracleOptimizer([decode(t, case["dtype"]) for t in case["init"]], dtypes=dtypes, **oracle_options_of(case))
    snapshots = []
    for step in case["steps"]:
        oracle.step(decode_all(step["grads"], case["dtype"]))
        o = oracle.oracles
        snapshots.append(Snapshot([x.p for x in o], [x.square_avg for x in o], [x.acc_delta for x in o]))
    assert oracle.iterations == case["iterations"]
    return snapshots


def assert_same_bits(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
    assert actual.shape == expected.shape, what
    np.testing.assert_array_equal(bits(actual), bits(expected), err_msg=what, strict=True)


def truths_of(case: dict[str, Any]) -> Iterator[list[Float64Recurrence]]:
    """The float64 recurrences of all parameters after each step, with the clipped gradients and the learning rates."""
    dtypes = [case["dtype"]] * len(case["init"])
    init = [decode(t, case["dtype"]) for t in case["init"]]
    oracle = OracleOptimizer(init, dtypes=dtypes, **oracle_options_of(case))
    ctor = {key: case["ctor"][key] for key in ("rho", "epsilon") if key in case["ctor"]}
    truths = [Float64Recurrence(p, **ctor) for p in init]
    for t, step in enumerate(case["steps"]):
        grads = [(i, g) for i, g in enumerate(decode_all(step["grads"], case["dtype"])) if g is not None]
        for (i, _), g in zip(grads, oracle.clip(grads), strict=True):
            truths[i].by = truths[i].by._replace(lr=np.float64(oracle.learning_rate_at(t, np.float32)))
            truths[i].step(g)
        yield truths


def assert_matches_recording(case: dict[str, Any], snapshots: list[Snapshot]) -> None:
    """Asserts what golden/README.md calls a match, for a float32 or float64 case."""
    dtype = case["dtype"]
    # The distance travelled is taken from the float64 recurrence: no implementation sets its own tolerance.
    for t, (step, snapshot, truths) in enumerate(zip(case["steps"], snapshots, truths_of(case), strict=True)):
        for i, truth in enumerate(truths):
            where = f"{case['name']}, step {t}, parameter {i}"
            p = decode(step["params"][i], dtype)
            if dtype == "float64":
                assert_same_bits(snapshot.p[i], p, f"{where}, p")
            else:
                error = np.abs(snapshot.p[i].astype(np.float64) - p)
                assert (error <= 4 * 2.0**-24 * truth.path).all(), f"{where}, p: {(error / truth.path).max()}"
            if "accum_grad" not in step:
                continue
            square_avg = decode(step["accum_grad"][i], dtype)
            if case["name"] in NORM_CLIPPED and t == 0:
                assert_an_ulp_of_the_norm_explains(case, i, snapshot.square_avg[i])
            elif case["name"] in NORM_CLIPPED:
                np.testing.assert_allclose(
                    snapshot.square_avg[i], square_avg, rtol=3.1e-7, atol=0, err_msg=f"{where}, square_avg"
                )
            else:
                assert_same_bits(snapshot.square_avg[i], square_avg, f"{where}, square_avg")
            acc_delta = decode(step["accum_var"][i], dtype)
            if dtype == "float64":
                assert_same_bits(snapshot.acc_delta[i], acc_delta, f"{where}, acc_delta")
            else:
                np.testing.assert_allclose(
                    snapshot.acc_delta[i], acc_delta, rtol=6e-7, atol=0, err_msg=f"{where}, acc_delta"
                )


def assert_an_ulp_of_the_norm_explains(case: dict[str, Any], i: int, square_avg: np.ndarray) -> None:
    """After the first step: ours are the bits of the oracle, the recorded ones those of it with a sum an ulp away."""
    ours, *others = (first_square_avg(case, i, ulps) for ulps in (0, -1, 1))
    recorded = decode(case["steps"][0]["accum_grad"][i], case["dtype"])
    assert_same_bits(square_avg, ours, f"{case['name']}, parameter {i}, square_avg")
    assert any((bits(recorded) == bits(x)).all() for x in (ours, *others)), f"{case['name']}, parameter {i}"


def first_square_avg(case: dict[str, Any], i: int, ulps: int) -> np.ndarray:
    """The oracle's `square_avg` of parameter `i` after one step with float32 sums of squares that are so many ulps off."""

    def off(square_sum: Any) -> Any:
        square_sum = np.float32(square_sum)
        return np.nextafter(square_sum, np.float32(np.copysign(np.inf, ulps))) if ulps else square_sum

    dtypes = [case["dtype"]] * len(case["init"])
    oracle = OracleOptimizer([decode(t, case["dtype"]) for t in case["init"]], dtypes=dtypes, **oracle_options_of(case))
    oracle.square_sum = lambda g: off(square_sum(g))
    oracle.global_square_sum = lambda gs: off(global_square_sum(gs))
    oracle.step(decode_all(case["steps"][0]["grads"], case["dtype"]))
    return oracle.oracles[i].square_avg


def is_16_bit(name: str) -> bool:
    return CASES[name]["dtype"] in ("float16", "bfloat16")


NOT_16_BIT: Final = [name for name in REPLAYED if not is_16_bit(name)]
ONLY_16_BIT: Final = [name for name in REPLAYED if is_16_bit(name)]


@pytest.mark.parametrize("name", NOT_16_BIT)
def test_oracle_matches_recording(name: str) -> None:
    assert_matches_recording(CASES[name], run_oracle(CASES[name]))


@pytest.mark.parametrize("name", NOT_16_BIT)
def test_matches_recording(name: str, path: Path) -> None:
    assert_matches_recording(CASES[name], run_ours(CASES[name], path))


@pytest.mark.parametrize("name", REPLAYED)
def test_same_bits_as_the_oracle(name: str, path: Path) -> None:
    steps = zip(run_ours(CASES[name], path), run_oracle(CASES[name]), strict=True)
    for t, (ours, expected) in enumerate(steps):
        for field in Snapshot._fields:
            for i, (x, y) in enumerate(zip(getattr(ours, field), getattr(expected, field), strict=True)):
                assert_same_bits(x, y, f"{name}, step {t}, parameter {i}, {field}")


@pytest.mark.parametrize("name", ONLY_16_BIT)
def test_16_bit_oracle_is_nearer_to_the_truth_than_the_recording(name: str) -> None:
    """The reason to deviate: one rounding for each store instead of one for each operation."""
    case = CASES[name]
    last, step = run_oracle(case)[-1], case["steps"][-1]
    recorded = [decode_all(step[key], case["dtype"]) for key in ("params", "accum_grad", "accum_var")]
    *_, truths = truths_of(case)
    for i, truth in enumerate(truths):
        for field, tensors in zip(Snapshot._fields, recorded, strict=True):
            expected = getattr(truth, field)
            ours, theirs = (np.abs(x - expected).mean() for x in (getattr(last, field)[i], tensors[i]))
            assert ours <= theirs, f"parameter {i}, {field}: {ours} against {theirs}"


def test_the_recording_is_whole() -> None:
    assert len(CASES) == len(_RECORDED["cases"]) == 30
    assert len(NORM_CLIPPED) == 6
