"""benchmarks/: the shapes of published models, how contenders are timed, and a quick run from end to end."""

import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BENCHMARKS.exists(), reason="needs the source tree")]
sys.path.insert(0, str(BENCHMARKS))


@pytest.mark.parametrize(
    ("model", "tensors", "elements"),
    [("resnet50", 161, 25_557_032), ("vit_b16", 152, 86_567_656), ("gpt2_small", 148, 124_439_808)],
)
def test_shapes_of_models_have_the_published_totals(model: str, tensors: int, elements: int) -> None:
    import shapes

    found = getattr(shapes, model)()
    assert len(found) == tensors
    assert shapes.count(found) == elements


def test_a_fixed_point_stays_one_and_normal() -> None:
    """Whoever steps first must leave the same work to those after it."""
    import contenders
    from measure import count_abnormal
    from workloads import Tensors, Workload

    workload = Workload("", ((3, 5), (2**20 + 3,)))
    tensors = Tensors.of(workload)
    before = [square.clone() for square in tensors.square_avgs]
    step = contenders.STEPS["torch"][contenders.FOR_LOOP](tensors)
    for _ in range(5):
        step()
    for square_avg, acc_delta, square in zip(tensors.square_avgs, tensors.acc_deltas, before, strict=True):
        torch.testing.assert_close(square_avg, square, rtol=1e-5, atol=0)
        torch.testing.assert_close(acc_delta, square, rtol=1e-5, atol=0)
    assert sum(map(count_abnormal, (*tensors.params, *tensors.grads, *tensors.square_avgs))) == 0


class Clock:
    """Timers that take the seconds they are told, in the order that `calls` records."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def timer(self, name: str, seconds: float):
        def build():
            def timed(calls: int) -> float:
                self.calls.append(name)
                return calls * seconds

            return timed

        return build


def test_contenders_take_turns_in_both_directions() -> None:
    from measure import interleave

    clock = Clock()
    contenders = {name: clock.timer(name, seconds) for name, seconds in (("a", 1e-3), ("b", 2e-3), ("c", 4e-3))}
    timings = interleave(contenders, budget=1.0, turn=4e-3, fits_cache=False, rounds=3)
    assert "".join(clock.calls).endswith("abccbaabc")
    assert timings.rounds == 3
    assert timings.ratio("c", "a").median == pytest.approx(4)
    assert timings.difference("b", "a").median == pytest.approx(1e-3)


def test_a_turn_has_no_more_calls_than_allowed() -> None:
    from measure import interleave

    turns: list[int] = []

    def timed(calls: int) -> float:
        turns.append(calls)
        return calls * 1e-6

    timings = interleave({"a": lambda: timed}, budget=1.0, turn=1.0, fits_cache=False, rounds=4, most_calls=70)
    assert turns[-4:] == [70] * 4
    assert max(turns) == 70
    assert timings.spread("a").median == pytest.approx(1e-6)


def test_a_contender_that_cannot_run_is_absent_and_a_slow_one_has_few_rounds() -> None:
    from measure import SLOW_ROUNDS, interleave

    def build():
        raise RuntimeError("it is not installed\nand more")

    clock = Clock()
    contenders = {"a": clock.timer("a", 1e-3), "missing": build, "slow": clock.timer("slow", 2.0)}
    timings = interleave(contenders, budget=0.05, turn=1e-3, fits_cache=True)
    assert timings.absent == {"missing": "it is not installed"}
    assert len(timings.seconds["slow"]) == SLOW_ROUNDS < len(timings.seconds["a"])
    assert timings.first == {"a": pytest.approx(1e-3), "slow": pytest.approx(2.0)}
    assert timings.ratio("slow", "a").median == pytest.approx(2000)


@pytest.mark.skipif(
    sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2 or shutil.which(os.environ.get("CC", "cc")) is None,
    reason="needs Linux, a C compiler and two processors",
)
def test_a_line_of_memory_is_handed_over_and_the_thread_stays_free() -> None:
    from measure import handover

    before = os.sched_getaffinity(0)
    seconds = handover()
    assert seconds is not None
    assert 1e-9 < seconds < 1e-2
    assert os.sched_getaffinity(0) == before


def test_rounds_are_told_apart_by_their_handovers() -> None:
    from measure import Timings, interleave
    from report import handovers_table
    from results import Record, Results
    from workloads import WORKLOADS

    said = iter((30e-9, 31e-9, 160e-9, 150e-9, 155e-9))
    clock = Clock()
    timings = interleave(
        {"a": clock.timer("a", 1e-3)}, budget=1.0, turn=1e-3, fits_cache=False, rounds=4, handover=lambda: next(said)
    )
    assert timings.handovers == [30e-9, 31e-9, 160e-9, 150e-9, 155e-9]
    assert timings._replace(handovers=[30e-9, 30e-9, 40e-9, 45e-9, 900e-9]).by_handover() == []  # an accident
    assert timings._replace(handovers=[30e-9, 160e-9, 30e-9, 160e-9, 30e-9]).by_handover() == []  # always moved
    assert timings._replace(handovers=None).by_handover() == []

    # In the second round the processors were moved.
    seconds = {"AdadeltaKeras, fused": [1.0, 2.0, 3.0, 4.0], "torch.optim.Adam, fused": [6.0, 8.0, 12.0]}
    timings = Timings(seconds, {}, {}, None, timings.handovers)
    short, long = timings.by_handover()
    assert short.seconds == {"AdadeltaKeras, fused": [1.0], "torch.optim.Adam, fused": [6.0]}
    assert long.seconds == {"AdadeltaKeras, fused": [3.0, 4.0], "torch.optim.Adam, fused": [12.0]}
    assert long.handovers == [160e-9, 150e-9]

    workload = next(w for w in WORKLOADS if w.name == "1000x16")
    results = Results.empty({}, "")._replace(steps=[Record.of(workload, timings)])
    table = handovers_table(results)
    assert table is not None
    assert ("1000x16", "speed against torch's fused Adam", "≥ 4 x", "6 x (6-6)", "4 x (4-4)") in table.rows
    assert table.notes == ["1000x16: a handover took 30.0 ns in 1 round and 155 ns in 2 rounds"]


def test_a_worker_that_ended_or_keeps_memory_makes_way_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    import workers
    from contenders import ADD
    from workloads import Workload

    workload = Workload("", ((2**10,),))
    with workers.Workers(1) as some:
        first = some.of("torch")
        first.call("build_step", workload, ADD)
        some.clear()
        assert some.of("torch") is first
        with pytest.raises(RuntimeError):
            first.call("time", ADD, 1)  # forgotten

        monkeypatch.setattr(workers, "MOST_KEPT", 1)
        some.clear()
        second = some.of("torch")
        assert second is not first
        assert not first.process.is_alive()

        second.process.kill()
        second.process.join()
        some.clear()
        third = some.of("torch")
        third.call("build_step", workload, ADD)
        assert third.call("time", ADD, 1) > 0


def test_what_a_run_measured_comes_back_from_json(tmp_path: Path) -> None:
    from measure import Timings
    from results import Record, Results, verdicts
    from workloads import WORKLOADS

    seconds = {"AdadeltaKeras, fused": [1.0, 2.0], "torch.optim.Adam, fused": [8.0, 8.0]}
    workload = next(w for w in WORKLOADS if w.name == "1000x16")
    record = Record.of(workload, Timings(seconds, {}, {"x": "absent"}, 0.0))
    results = Results.empty({"torch": "2.13"}, "a full run")._replace(
        steps=[record], memory={"1000x16": {"AdadeltaKeras, fused": 1}}, imports={"torch": [0.1]}, build=3.0
    )
    results.write(tmp_path / "bench.json")
    assert Results.read(tmp_path / "bench.json") == results
    by_what = {verdict.what: verdict.is_met for verdict in verdicts(results)}
    assert by_what["speed against torch's fused Adam"] is True  # 6, and 4 are asked for
    assert by_what["speed against torch.optim.Adadelta's better path"] is None
    assert by_what["extra memory during a fused step"] is True


def test_an_update_replaces_what_was_measured_again() -> None:
    from measure import Timings
    from results import Record, Results
    from workloads import WORKLOADS

    def record(position: int, seconds: float) -> Record:
        return Record.of(WORKLOADS[position], Timings({"a": [seconds]}, {}, {}, None))

    old = Results.empty({"torch": "2.13", "date": "1"}, "")._replace(
        steps=[record(0, 1.0), record(1, 2.0)], training=[record(2, 3.0)], build=4.0
    )
    new = Results.empty({"torch": "2.13", "date": "2"}, "")._replace(steps=[record(0, 5.0), record(3, 6.0)])
    both = old.updated(new)
    assert both.steps == [record(0, 5.0), record(1, 2.0), record(3, 6.0)]
    assert (both.training, both.build, both.machine["date"]) == (old.training, 4.0, "2")
    with pytest.raises(ValueError, match="another torch"):
        old.updated(new._replace(machine={"torch": "2.10"}))


def test_tables_go_where_a_page_asks_for_them(tmp_path: Path) -> None:
    from report import fill_in
    from results import Results

    results = Results.empty({"date": "today"}, "")._replace(imports={"torch": [0.1]}, build=3.0)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench: setup -->\nold\n<!-- end -->\nafter\n")
    fill_in(page, results)
    assert page.read_text().startswith("before\n<!-- bench: setup -->\n| what | time |\n")
    assert "| import torch | 100 ms ± 0 % |" in page.read_text()
    assert page.read_text().endswith("<!-- end -->\nafter\n")
    page.write_text("<!-- bench: nothing -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="nothing"):
        fill_in(page, results)


@pytest.mark.skipif(not (ROOT / "docs" / "performance.md").exists(), reason="needs the source tree")
def test_pages_have_their_tables_and_pictures() -> None:
    import precision
    from bench import PAGES

    pages = [(page, page.read_text()) for page in (*PAGES, precision.PAGE)]
    for page, text in pages:
        blocks = re.findall(r"<!-- bench: ([\w-]+) -->\n(.*?)<!-- end -->", text, re.DOTALL)
        assert blocks, page
        for name, content in blocks:
            assert content.strip(), f"{page} has no {name}: run `make bench BENCH=--docs`"
        for picture in re.findall(r"\]\((images/[^)]+)\)", text):
            assert (page.parent / picture).read_bytes().startswith(b"\x89PNG")


def test_peers_keep_what_their_papers_say() -> None:
    import numpy as np
    from precision_peers import FlashOptim, FlashOptimMasters, Float32Copy, Kahan, StochasticRounding
    from reference.formats import round_to_bfloat16
    from reference.oracle import Oracle, coefficients

    rng = np.random.default_rng(0)
    start = round_to_bfloat16(rng.uniform(0.6, 0.9, 1000).astype(np.float32))
    ulp = 2.0**-8  # of a bfloat16 number of that size
    grads = [rng.standard_normal(1000).astype(np.float32) for _ in range(20)]
    by = coefficients(1.0, 0.95, 1e-7, np.float32)
    oracle = Oracle(start, 1.0)
    peers = {make: make(start) for make in (StochasticRounding, Kahan, Float32Copy, FlashOptimMasters, FlashOptim)}
    for grad in grads:
        oracle.step(grad)
        for peer in peers.values():
            peer.step(grad, by)
            np.testing.assert_array_equal(round_to_bfloat16(peer.p), peer.p)
    np.testing.assert_array_equal(peers[Float32Copy].master, oracle.p)
    np.testing.assert_array_equal(peers[FlashOptimMasters].half_ulp, ulp / 2)
    assert np.abs(oracle.p - start).max() > 2 * ulp
    assert np.abs(peers[Kahan].p - oracle.p).max() < ulp
    assert np.abs(peers[Kahan].master - oracle.p).max() < ulp / 16
    # A step rounds to a 127th of half a last place, so 20 are at most 10 of them apart.
    assert np.abs(peers[FlashOptimMasters].master - oracle.p).max() < 10.5 / 127 * ulp / 2

    # The roots of state are within half a step of the largest in their group, whose scale is a float16.
    state = rng.random(1000, np.float32)
    roots = np.sqrt(np.pad(state, (0, 24))).reshape(-1, 32)
    apart = np.sqrt(np.pad(peers[FlashOptim].kept_state(state), (0, 24))).reshape(-1, 32) - roots
    assert np.all(np.abs(apart) <= roots.max(axis=1, keepdims=True) * (0.5 / 255 + 2.0**-11 + 1e-6))

    # Rounded at random: up or down, and right on average.
    p = np.float32(1 + 2.0**-9)  # a quarter of the way from 1 to the next
    many = StochasticRounding(np.zeros(100_000, np.float32))
    many.keep_param(oracle_update(p, 100_000), by)
    assert set(np.unique(many.p)) == {1.0, 1 + 2.0**-7}
    assert np.mean(many.p) == pytest.approx(p, abs=5e-5)


def oracle_update(p: float, count: int):
    """An update that gives this parameter everywhere."""
    import numpy as np
    from reference.oracle import Updated

    return Updated(*(np.full(count, p, np.float32) for _ in range(4)))


def test_a_quick_run_measures_what_16_bits_keep_and_lose(tmp_path: Path) -> None:
    for package in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(package, reason="needs the extra 'bench'")
    import precision

    tables = precision.main(["--quick", "--output", str(tmp_path)])
    kept = {row[0]: row[1:3] for row in tables["losses"].rows}
    assert kept["float32"] == ("12", "28")
    assert kept["bfloat16"] == ("6", "14")
    assert kept["bfloat16, masters"] == ("8", "18")
    assert kept["bfloat16, masters, float32 state"] == ("12", "26")
    lost = {row[0]: row[3:] for row in tables["losses"].rows}
    assert lost["bfloat16, masters, float32 state"] == lost["float32 copy of the weights"] == ("0", "0", "0")
    assert lost["bfloat16, masters"] == lost["float32, bfloat16 state"] != ("0", "0", "0")
    assert len(tables["digits"].rows) == 8
    assert len(tables["times"].rows) == 12
    for picture in ("precision_digits.png", "precision_times.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


# What a contender needs that is not installed everywhere: of the extras `bench` and `keras`.
NEEDED = {
    "Keras 3 on torch": "keras",
    "torch_adadelta.keras3, Keras 3 on torch": "keras",
    "tf_keras legacy (TensorFlow's op), eager": "tf_keras",
    "tf_keras legacy (TensorFlow's op), graph": "tf_keras",
    "optax.adadelta, jax.jit": "optax",
    "pytorch_optimizer.AdaDelta": "pytorch_optimizer",
}


def test_a_quick_run_measures_draws_and_writes_everything(tmp_path: Path) -> None:
    for package in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(package, reason="needs the extra 'bench'")
    command = [sys.executable, str(BENCHMARKS / "bench.py"), "--quick", "--rounds", "2", "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    data = json.loads((tmp_path / "bench.json").read_text())
    for part in ("steps", "by_elements", "by_tensors", "by_threads", "by_rows", "operations", "training"):
        assert data[part], part
        for record in data[part]:
            absent = record["timings"]["absent"]
            assert all(importlib.util.find_spec(NEEDED[name]) is None for name in absent), absent
            assert record["abnormal"] == 0, record["name"]
            for seconds in record["timings"]["seconds"].values():
                assert min(seconds) > 0
    measured = set(itertools.chain(*(record["timings"]["seconds"] for record in data["steps"])))
    present = {name for name, package in NEEDED.items() if importlib.util.find_spec(package)}
    assert measured >= present | {"AdadeltaKeras, fused", "AdadeltaKeras, for-loop", "torch.optim.Adam, fused"}
    report = (tmp_path / "report.md").read_text()
    for heading in ("A whole step, float32", "A step that clips", "Threads", "Importing and building", "Bars"):
        assert f"### {heading}" in report
    for picture in ("peers.png", "elements.png", "tensors.png", "rows.png", "options.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
