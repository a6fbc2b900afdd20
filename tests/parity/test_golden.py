"""Every implementation, and the oracle, against recorded runs of TensorFlow 2.4.4: see golden/README.md."""

import importlib.util
import json
import pathlib
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
import pytest
import torch
from cases import Path, bits, to_numpy
from reference.oracle import Float64Recurrence, Oracle

from torch_adadelta import AdadeltaKeras

_RECORDED: Final = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "recorded.json").read_text())
CASES: Final = {case["name"]: case for case in _RECORDED["cases"]}

# Every case of the file is in exactly one of these two.
REPLAYED: Final = (
    "defaults_float32",
    "defaults_float64",
    "defaults_float16",
    "defaults_bfloat16",
    "scale_1e-12_f32",
    "scale_10000_f32",
    "eps_none_f32",
    "big_eps_rho1_f32",
    "zero_init_lr1_float32",
    "zero_init_lr1_float16",
    "zero_init_lr1_bfloat16",
)
NOT_YET: Final = {  # by the first feature that is missing
    "decay_f32": "decay",
    "none_grads_f32": "decay",
    "clipvalue_f32": "clipvalue",
    "clipvalue+clipnorm_f32": "clipvalue",
    "clipnorm_f32": "clipnorm",
    "clipnorm_not_reached_f32": "clipnorm",
    "clipnorm_f16": "clipnorm",
    "global_clipnorm_f32": "global_clipnorm",
    "sparse_f32": "sparse gradients",
    "sparse_clipnorm_f32": "sparse gradients",
    "zero_init_sparse_f16": "sparse gradients",
    "sched_exp_f32": "schedules",
    "sched_exp_stair_f32": "schedules",
    "sched_piecewise_f32": "schedules",
    "sched_poly_f32": "schedules",
    "sched_inv_f32": "schedules",
    "sched_inv_stair_f32": "schedules",
    "sched_cosine_f32": "schedules",
    "sched_lincos_f32": "schedules",
}
# The schedules' own values, _RECORDED["schedules"], wait for the schedules too.


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


def decode_all(tensors: list[dict[str, Any] | None], dtype: str) -> list[np.ndarray | None]:
    return [None if tensor is None else decode(tensor, dtype) for tensor in tensors]


def run_ours(case: dict[str, Any], path: Path) -> list[Snapshot]:
    dtype = getattr(torch, case["dtype"])
    params = [torch.from_numpy(decode(t, case["dtype"])).to(dtype).requires_grad_() for t in case["init"]]
    optimizer = AdadeltaKeras(params, **case["ctor"], **path.options)
    snapshots = []
    for step in case["steps"]:
        for param, grad in zip(params, decode_all(step["grads"], case["dtype"]), strict=True):
            param.grad = None if grad is None else torch.from_numpy(grad).to(dtype)
        optimizer.step()
        states = [optimizer.state[param] for param in params]
        snapshots.append(
            Snapshot(
                [to_numpy(param).copy() for param in params],
                [to_numpy(state["square_avg"]).copy() for state in states],
                [to_numpy(state["acc_delta"]).copy() for state in states],
            )
        )
    assert optimizer.iterations == case["iterations"]
    return snapshots


def run_oracle(case: dict[str, Any]) -> list[Snapshot]:
    oracles = [Oracle(decode(t, case["dtype"]), dtype=case["dtype"], **case["ctor"]) for t in case["init"]]
    snapshots = []
    for step in case["steps"]:
        for oracle, grad in zip(oracles, decode_all(step["grads"], case["dtype"]), strict=True):
            oracle.step(grad)
        snapshots.append(
            Snapshot([o.p for o in oracles], [o.square_avg for o in oracles], [o.acc_delta for o in oracles])
        )
    return snapshots


def assert_same_bits(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
    assert actual.shape == expected.shape, what
    np.testing.assert_array_equal(bits(actual), bits(expected), err_msg=what, strict=True)


def assert_matches_recording(case: dict[str, Any], snapshots: list[Snapshot]) -> None:
    """Asserts what golden/README.md calls a match, for a float32 or float64 case without a norm clip."""
    dtype = case["dtype"]
    # The distance travelled is taken from the float64 recurrence: no implementation sets its own tolerance.
    truths = [Float64Recurrence(decode(t, dtype), **case["ctor"]) for t in case["init"]]
    for t, (step, snapshot) in enumerate(zip(case["steps"], snapshots, strict=True)):
        for i, (truth, grad) in enumerate(zip(truths, decode_all(step["grads"], dtype), strict=True)):
            if grad is not None:
                truth.step(grad)
            where = f"{case['name']}, step {t}, parameter {i}"
            p = decode(step["params"][i], dtype)
            if dtype == "float64":
                assert_same_bits(snapshot.p[i], p, f"{where}, p")
            else:
                error = np.abs(snapshot.p[i].astype(np.float64) - p)
                assert (error <= 4 * 2.0**-24 * truth.path).all(), f"{where}, p: {(error / truth.path).max()}"
            if "accum_grad" not in step:
                continue
            assert_same_bits(snapshot.square_avg[i], decode(step["accum_grad"][i], dtype), f"{where}, square_avg")
            acc_delta = decode(step["accum_var"][i], dtype)
            if dtype == "float64":
                assert_same_bits(snapshot.acc_delta[i], acc_delta, f"{where}, acc_delta")
            else:
                np.testing.assert_allclose(
                    snapshot.acc_delta[i], acc_delta, rtol=6e-7, atol=0, err_msg=f"{where}, acc_delta"
                )


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
    for i, init in enumerate(case["init"]):
        truth = Float64Recurrence(decode(init, case["dtype"]), **case["ctor"])
        for s in case["steps"]:
            truth.step(decode(s["grads"][i], case["dtype"]))
        for field, tensors in zip(Snapshot._fields, recorded, strict=True):
            expected = getattr(truth, field)
            ours, theirs = (np.abs(x - expected).mean() for x in (getattr(last, field)[i], tensors[i]))
            assert ours <= theirs, f"parameter {i}, {field}: {ours} against {theirs}"


def test_every_case_is_replayed_or_listed_as_not_yet() -> None:
    assert sorted([*REPLAYED, *NOT_YET]) == sorted(CASES)
    assert len(CASES) == len(_RECORDED["cases"])


def _sparse_step() -> None:
    param = torch.zeros(6, 4, requires_grad=True)
    param.grad = torch.eye(6, 4).to_sparse(1)
    AdadeltaKeras([param]).step()


def _keyword(**options: float) -> Callable[[], None]:
    return lambda: AdadeltaKeras([torch.zeros(1)], **options)  # type: ignore[arg-type]


_MISSING: Final = {
    "decay": (_keyword(decay=0.1), TypeError),
    "clipvalue": (_keyword(clipvalue=0.7), TypeError),
    "clipnorm": (_keyword(clipnorm=0.7), TypeError),
    "global_clipnorm": (_keyword(global_clipnorm=0.7), TypeError),
    "sparse gradients": (_sparse_step, RuntimeError),
}


@pytest.mark.parametrize("feature", sorted(set(NOT_YET.values())))
def test_what_is_listed_as_not_yet_is_missing(feature: str) -> None:
    """Fails once the feature exists: then its cases belong in REPLAYED (and the runner may need to learn it)."""
    if feature == "schedules":
        assert importlib.util.find_spec("torch_adadelta.schedules") is None
        return
    use, error = _MISSING[feature]
    with pytest.raises(error, match=feature.split()[0]):
        use()
