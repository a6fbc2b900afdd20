"""benchmarks/rounding_noise.py, run small; that we are no further from the truth than TensorFlow, test_live.py has."""

import os
import sys
from pathlib import Path
from typing import Final

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
pytest.importorskip("tf_keras", reason="needs the extra 'parity'")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import rounding_noise

pytestmark = pytest.mark.xdist_group("tensorflow")

AT: Final = (1, 10, 100)
OURS: Final = tuple(rounding_noise.our_paths())


@pytest.fixture(scope="module")
def results() -> dict[str, rounding_noise.Result]:
    return {result.name: result for result in rounding_noise.measure(elements=4000, at=AT, seed=0)}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("t", AT)
def test_our_paths_have_the_bits_of_the_oracle(results: dict[str, rounding_noise.Result], name: str, t: int) -> None:
    ours, oracle = results[name].states[t], results[rounding_noise.ORACLE].states[t]
    for field in ours._fields:
        x, y = (getattr(state, field).view(np.uint32) for state in (ours, oracle))
        np.testing.assert_array_equal(x, y, err_msg=f"{field}, bits", strict=True)


@pytest.mark.parametrize("t", AT)
def test_square_avg_has_the_bits_of_tensorflow(results: dict[str, rounding_noise.Result], t: int) -> None:
    ours, theirs = results[OURS[0]].states[t].square_avg, results[rounding_noise.TENSORFLOW].states[t].square_avg
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32), strict=True)


@pytest.mark.parametrize("t", AT)
def test_torch_adadelta_is_biased(results: dict[str, rounding_noise.Result], t: int) -> None:
    """It rounds 1 - rho from float64: proof that the measure sees a difference of one bit in a coefficient."""
    ours, theirs = (results[who].noise["square_avg", t].mean for who in (OURS[0], rounding_noise.TORCH))
    assert theirs > 2 * ours


def test_columns() -> None:
    assert rounding_noise.columns((1, 10, 1000)) == [
        ("square_avg", 1),
        ("square_avg", 1000),
        ("acc_delta", 1),
        ("acc_delta", 10),
        ("acc_delta", 1000),
        ("path", 10),
        ("path", 1000),
    ]
    assert rounding_noise.columns((1,)) == [("square_avg", 1), ("acc_delta", 1)]
