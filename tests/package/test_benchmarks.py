"""benchmarks/: the shapes of published models, how implementations are timed, and a quick run from end to end."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BENCHMARKS.exists(), reason="needs the source tree")]
sys.path.insert(0, str(BENCHMARKS))

NEEDED_HERE = ("matplotlib", "rich", "sklearn", "tabulate")


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
    import implementations
    from timing import count_abnormal
    from workloads import Tensors, Workload

    tensors = Tensors.of(Workload("", ((3, 5), (2**20 + 3,))))
    before = [square.clone() for square in tensors.square_avgs]
    step = implementations.builder("steps", "torch", implementations.FOR_LOOP)(tensors)
    for _ in range(5):
        step()
    for square_avg, acc_delta, square in zip(tensors.square_avgs, tensors.acc_deltas, before, strict=True):
        torch.testing.assert_close(square_avg, square, rtol=1e-5, atol=0)
        torch.testing.assert_close(acc_delta, square, rtol=1e-5, atol=0)
    assert sum(map(count_abnormal, (*tensors.params, *tensors.grads, *tensors.square_avgs))) == 0
    assert count_abnormal(torch.tensor([1.0, 0.0, 1e-40, float("inf"), float("nan")])) == 3


class Clock:
    """Timers that take the seconds they are told, and record who was called with which arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int, bool]] = []

    def timer(self, name: str, seconds: float):
        def build():
            def timed(calls: int, warm_up: int = 0, *, cold: bool = False) -> dict[str, float]:
                self.calls.append((name, calls, warm_up, cold))
                return {"step": seconds, **({"cold": 3 * seconds} if cold else {})}

            return timed

        return build


def record_of(name: str, *seconds: dict[str, list[float]], memory: dict[str, int] | None = None, part: str = "steps"):
    """A record of one of the workloads, with a run for each of these seconds of implementations."""
    from results import Record
    from timing import Run
    from workloads import WORKLOADS

    workload = next(workload for workload in WORKLOADS if workload.name == name)
    runs = [Run({who: {"step": values} for who, values in one.items()}, {}, {}, memory or {}) for one in seconds]
    return Record.of(part, workload, runs[0])._replace(runs=runs)


def test_implementations_take_turns_in_both_directions() -> None:
    from results import Record
    from timing import interleave
    from workloads import Workload

    clock = Clock()
    builders = {name: clock.timer(name, seconds) for name, seconds in (("a", 1e-3), ("b", 2e-3), ("c", 4e-3))}
    run = interleave(builders, budget=1.0, turn=4e-3, fits_cache=False, rounds=3)
    assert "".join(call[0] for call in clock.calls).endswith("abccbaabc")
    assert [call[1:] for call in clock.calls[-3:]] == [(5, 0, False), (2, 0, False), (1, 0, False)]
    record = Record.of("steps", Workload("", ((1,),)), run)
    assert record.ratio("c", "a").median == pytest.approx(4)
    assert record.difference("b", "a").median == pytest.approx(1e-3)


def test_what_fits_into_the_caches_is_measured_warm_and_cold() -> None:
    from timing import _other_work, interleave, timer

    clock = Clock()
    run = interleave({"a": clock.timer("a", 1e-3)}, budget=1.0, turn=4e-3, fits_cache=True, rounds=2)
    assert clock.calls[-1] == ("a", 5, 5, True)
    assert run.seconds == {"a": {"step": [1e-3] * 2, "cold": [3e-3] * 2}}

    done: list[int] = []  # how often the other work was done before each call
    timed = timer(lambda: done.append(_other_work()._version))
    before = _other_work()._version
    assert timed(2, 3, cold=True).keys() == {"step", "cold"}
    assert timed(1).keys() == {"step"}
    assert [count - before for count in done] == [0, 0, 0, 0, 0, 1, 1]


def test_a_turn_has_no_more_calls_than_allowed() -> None:
    from timing import interleave

    clock = Clock()
    interleave({"a": clock.timer("a", 1e-6)}, budget=1.0, turn=1.0, fits_cache=False, rounds=4, most_calls=70)
    assert [call[1] for call in clock.calls[-4:]] == [70] * 4
    assert max(call[1] for call in clock.calls) == 70


def test_who_cannot_run_is_absent_and_a_slow_one_has_few_rounds() -> None:
    from timing import SLOW_ROUNDS, interleave

    def build():
        raise RuntimeError("it is not installed\nand more")

    clock = Clock()
    builders = {"a": clock.timer("a", 1e-3), "missing": build, "slow": clock.timer("slow", 2.0)}
    run = interleave(builders, budget=0.05, turn=1e-3, fits_cache=True)
    assert run.absent == {"missing": "it is not installed"}
    assert len(run.seconds["slow"]["step"]) == SLOW_ROUNDS < len(run.seconds["a"]["step"])
    assert run.first == {"a": 1e-3, "slow": 2.0}


def test_a_worker_that_ended_or_keeps_memory_makes_way_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    import workers
    from implementations import ADD
    from workloads import Workload

    workload = Workload("", ((2**10,),))
    with workers.Workers(1) as some:
        first = some.of("torch")
        first.call("build", "steps", workload, ADD)
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
        third.call("build", "steps", workload, ADD)
        assert third.call("time", ADD, 1, 2, cold=True).keys() == {"step", "cold"}


def test_a_figure_is_the_median_of_the_runs() -> None:
    record = record_of(
        "1000x16", {"a": [1.0], "b": [8.0]}, {"a": [5.0, 5.0, 5.0], "b": [5.0, 5.0, 5.0]}, {"a": [2.0], "b": [6.0]}
    )
    assert record.spread("a") == (2.0, 2.0, 2.0)
    assert record.ratio("b", "a").median == 3.0
    with pytest.raises(KeyError):
        record.spread("a", "cold")


def test_what_was_measured_comes_back_from_json(tmp_path: Path) -> None:
    from results import Results, judged

    seconds = {"AdadeltaKeras, fused": [1.0, 2.0], "torch.optim.Adam, fused": [8.0, 8.0]}
    results = Results({"torch": "2.13"}, "a full run", 2, 3.0, [])
    for run in (seconds, seconds):
        results.add(record_of("1000x16", run))
        results.add(record_of("1000x16", {}, memory={"AdadeltaKeras, fused": 2_000_000}, part="memory"))
    results.add(record_of("1x16M", {**seconds, "AdadeltaKeras, fused, clipnorm": [9.0, 9.0]}))
    assert [len(record.runs) for record in results.records] == [2, 2, 1]
    results.write(tmp_path / "bench.json")
    assert Results.read(tmp_path / "bench.json") == results

    by_what = {(outcome.workload, outcome.what): outcome.result for outcome in judged(results)}
    assert by_what["1000x16", "speed against torch's fused Adam"] == "pass"  # 6, and 4 are asked for
    assert by_what["1000x16", "speed against torch.optim.Adadelta's better path"] == "not measured"
    assert by_what["1000x16", "extra memory: AdadeltaKeras, fused"] == "fail"
    assert by_what["1x16M", "time with clipnorm against the unclipped step"] == "a figure"  # whatever it is
    on_cuda = judged(results._replace(machine={"GPU": "a GPU"}))
    assert "a graph replay" in {outcome.what for outcome in on_cuda}


def test_tables_go_where_a_page_asks_for_them(tmp_path: Path) -> None:
    from report import fill_in
    from results import Results

    results = Results({"date": "today"}, "", 1, 0.0, [record_of("1x16", {"import torch": [0.1]}, part="setup")])
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench: setup -->\nold\n<!-- end -->\nafter\n")
    fill_in(page, results)
    assert page.read_text().startswith("before\n<!-- bench: setup -->\n| what ")
    assert "| import torch | 100 ms ± 0 % |" in page.read_text()
    assert page.read_text().endswith("<!-- end -->\nafter\n")
    page.write_text("<!-- bench: nothing -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="nothing"):
        fill_in(page, results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--docs", "--quick"], "--docs needs three full runs on the CPU"),
        (["--docs", "--runs", "2"], "--docs needs three full runs on the CPU"),
        (["--runs", "0"], "must be at least 1"),
        (["--workload", "1x64M"], "--workload 1x64M: choose from 1x16M"),
        (["--device", "cuda", "--part", "training"], "--device cuda has steps, sparse"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import bench

    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not (ROOT / "docs" / "performance.md").exists(), reason="needs the source tree")
def test_pages_have_their_tables_and_pictures() -> None:
    import precision
    from bench import PAGES

    pages = [(ROOT / page, (ROOT / page).read_text()) for page in (*PAGES, precision.PAGE)]
    for page, text in pages:
        blocks = re.findall(r"<!-- bench: ([\w-]+) -->\n(.*?)<!-- end -->", text, re.DOTALL)
        assert blocks, page
        for name, content in blocks:
            assert content.strip(), f"{page} has no {name}: run `make bench BENCH=--docs`"
        for picture in re.findall(r"\]\((images/[^)]+)\)", text):
            assert (page.parent / picture).read_bytes().startswith(b"\x89PNG")


def test_baselines_keep_what_their_papers_say() -> None:
    import numpy as np
    from precision_baselines import FlashOptim, FlashOptimMasters, Float32Copy, Kahan, StochasticRounding
    from reference.formats import round_to_bfloat16
    from reference.oracle import Oracle, coefficients

    rng = np.random.default_rng(0)
    start = round_to_bfloat16(rng.uniform(0.6, 0.9, 1000).astype(np.float32))
    ulp = 2.0**-8  # of a bfloat16 number of that size
    grads = [rng.standard_normal(1000).astype(np.float32) for _ in range(20)]
    by = coefficients(1.0, 0.95, 1e-7, np.float32)
    oracle = Oracle(start, 1.0)
    baselines = {make: make(start) for make in (StochasticRounding, Kahan, Float32Copy, FlashOptimMasters, FlashOptim)}
    for grad in grads:
        oracle.step(grad)
        for baseline in baselines.values():
            baseline.step(grad, by)
            np.testing.assert_array_equal(round_to_bfloat16(baseline.p), baseline.p)
    np.testing.assert_array_equal(baselines[Float32Copy].master, oracle.p)
    np.testing.assert_array_equal(baselines[FlashOptimMasters].half_ulp, ulp / 2)
    assert np.abs(oracle.p - start).max() > 2 * ulp
    assert np.abs(baselines[Kahan].p - oracle.p).max() < ulp
    assert np.abs(baselines[Kahan].master - oracle.p).max() < ulp / 16
    # A step rounds to a 127th of half a last place, so 20 are at most 10 of them apart.
    assert np.abs(baselines[FlashOptimMasters].master - oracle.p).max() < 10.5 / 127 * ulp / 2

    # The roots of state are within half a step of the largest in their group, whose scale is a float16.
    state = rng.random(1000, np.float32)
    roots = np.sqrt(np.pad(state, (0, 24))).reshape(-1, 32)
    apart = np.sqrt(np.pad(baselines[FlashOptim].kept_state(state), (0, 24))).reshape(-1, 32) - roots
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
    for package in NEEDED_HERE:
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


def test_a_quick_run_measures_draws_and_writes_everything(tmp_path: Path) -> None:
    for package in NEEDED_HERE:
        pytest.importorskip(package, reason="needs the extra 'bench'")
    import bench
    from results import Results

    command = [sys.executable, str(BENCHMARKS / "bench.py"), "--quick", "--rounds", "2", "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    results = Results.read(tmp_path / "bench.json")
    assert {record.part for record in results.records} == set(bench.PARTS["cpu"])
    not_here = ("is not installed", "compiling was not asked for", "left out")
    for record in results.records:
        assert all(reason.endswith(not_here) for reason in record.absent.values()), record.absent
        assert record.runs[0].abnormal == 0, record.name
        for name in record.names:
            assert record.spread(name).median > 0
    steps = results.of("steps")
    assert all(record.has("AdadeltaKeras, fused", "cold") for record in steps)
    names = {name for record in steps for name in record.names}
    for package, name in (("keras", "Keras 3 on torch"), ("optax", "optax.adadelta, jax.jit")):
        assert (name in names) == (importlib.util.find_spec(package) is not None)
    assert names >= {"AdadeltaKeras, fused", "AdadeltaKeras, for-loop", "torch.optim.Adam, fused"}
    report = (tmp_path / "report.md").read_text()
    for heading in ("A whole step, float32", "A step that clips", "Threads", "Importing and building", "Targets"):
        assert f"### {heading}" in report

    # All tables and pictures of the pages, in a copy of them.
    from report import tables_of

    for page in bench.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        text = (ROOT / page).read_text()
        if "compiling" not in tables_of(results):  # nothing takes long enough to compile
            text = text.replace("<!-- bench: compiling -->", "")
        (tmp_path / page).write_text(text)
    bench.write_docs(results, tmp_path)
    assert "100x16-float16" in (tmp_path / "docs" / "performance.md").read_text()
    for picture in ("implementations.png", "elements.png", "tensors.png", "rows.png", "options.png"):
        assert (tmp_path / "docs" / "images" / picture).read_bytes().startswith(b"\x89PNG")


def test_measuring_needs_no_package_that_a_machine_with_a_gpu_lacks(tmp_path: Path) -> None:
    """As there, where only PyTorch and NumPy are: plain lines and JSON."""
    for package in ("tabulate", "matplotlib", "rich", "pandas"):
        (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('no {package}', name='{package}')")
    command = [sys.executable, str(BENCHMARKS / "bench.py"), "--quick", "--workload", "100x16", "--part", "steps"]
    command += ["--rounds", "2", "--output", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "  AdadeltaKeras, fused: median " in result.stdout
    assert "tabulate is not installed" in result.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bench.json"]
