"""The recorded run of Keras that examples/train_digits.py repeats, begun again by a running Keras."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BATCHES = 20

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "examples").exists(), reason="needs the source tree"),
]


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-5), ("float64", 1e-12)])
def test_keras_trains_as_it_was_recorded(dtype: str, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(package, reason="needs the extra 'examples'")
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "data"))
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import common
    import record_keras_run
    import train_digits

    digits = common.load()
    setting = train_digits.setting(len(digits.train_labels))
    file = json.loads(train_digits.RECORDED.read_text())
    assert file["sha256"] == train_digits.fingerprint(digits, setting)
    assert len(file["losses"][dtype]) == len(setting.batches)
    losses, _ = record_keras_run.train(setting._replace(batches=setting.batches[:BATCHES]), dtype)
    assert losses == pytest.approx(file["losses"][dtype][:BATCHES], rel=most)
