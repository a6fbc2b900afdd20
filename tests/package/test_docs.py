"""The code in README.md, docs/ and CONTRIBUTING.md: Python blocks run, section by section, or by torchrun in several
processes; those that cannot run here are compiled and counted; and commands name what there is.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
DOCS: Final = ROOT / "docs"
PAGES: Final = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts),
]

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="needs the source tree")

# Python blocks that the tests do not run, each marked on its page with the reason: two need a GPU, two a framework that
# the test environment does not have.
MOST_NOT_RUN: Final = 5

_BLOCK: Final = re.compile(
    r"(<!-- not run: [^\n]+ -->\n|<!-- run by torchrun: in \d+ processes -->\n)?```python\n(.*?)```", re.DOTALL
)

# What the extras of the tests bring along.
_FRAMEWORKS: Final = {
    "accelerate": "frameworks",
    "lightning": "frameworks",
    "transformers": "frameworks",
    "keras": "parity",
    "tensorflow": "parity",
    "tf_keras": "parity",
}


class Section(NamedTuple):
    """The blocks under one heading, or of the whole README, which share their variables."""

    page: str
    heading: str
    blocks: list[tuple[bool, str]]  # whether it is to be run here, and the code

    def __str__(self) -> str:
        return f"{self.page}: {self.heading}"


def sections() -> list[Section]:
    found = []
    for page in PAGES:
        whole = page.read_text() if page.exists() else ""
        for text in [whole] if page.name == "README.md" else re.split(r"^## ", whole, flags=re.MULTILINE):
            blocks = [(match[1] is None, match[2]) for match in _BLOCK.finditer(text)]
            if blocks:
                found.append(Section(page.name, text.partition("\n")[0], blocks))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("section", sections(), ids=str)
@pytest.mark.filterwarnings("ignore")  # the frameworks' own
def test_blocks_run(section: Section, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DISABLE_MLFLOW_INTEGRATION"):
        monkeypatch.setenv(name, "1")
    # Training frameworks and process groups leave files, settings of the process, and references to tensors.
    # Keras chooses its backend when it is imported.
    runs_alone = section.page in ("frameworks.md", "keras3.md")
    for library, extra in _FRAMEWORKS.items():
        pattern = rf"^(?:import|from) {library}\b"
        if any(re.search(pattern, code, re.MULTILINE) for is_run, code in section.blocks if is_run):
            pytest.importorskip(library, reason=f"needs the extra '{extra}'")
            runs_alone = runs_alone or extra == "frameworks"
    if any("torch_adadelta.keras" in code for is_run, code in section.blocks if is_run):
        pytest.importorskip("h5py", reason="needs the extra 'keras'")
    if runs_alone:
        program = tmp_path / "blocks.py"
        program.write_text("\n".join(code for is_run, code in section.blocks if is_run))
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        result = subprocess.run(
            [sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False
        )
        assert result.returncode == 0, result.stderr
    namespace: dict[str, Any] = {"__name__": f"docs.{Path(section.page).stem}"}
    for number, (is_run, code) in enumerate(section.blocks, 1):
        compiled = compile(code, f"{section}, block {number}", "exec")
        if is_run and not runs_alone:
            exec(compiled, namespace)


def in_processes() -> list[Any]:
    """The blocks for several processes, each a program by itself, and in how many to run it."""
    found = []
    for page in PAGES:
        blocks = [(match[1] or "", match[2]) for match in _BLOCK.finditer(page.read_text() if page.exists() else "")]
        counted = [(re.search(r"torchrun: in (\d+)", marked), code) for marked, code in blocks]
        found += [pytest.param(int(count[1]), code, id=page.name) for count, code in counted if count]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "code"), in_processes())
def test_blocks_run_in_processes(processes: int, code: str, tmp_path: Path) -> None:
    # Without Python's own end: gloo's threads may let go of the last tensors meanwhile, which aborts the process.
    (tmp_path / "block.py").write_text(code + "\nimport os\nos._exit(0)\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, str(tmp_path / "block.py")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_every_block_is_found() -> None:
    not_run = []
    for page in PAGES:
        text = page.read_text()
        assert text.count("```python") == len(_BLOCK.findall(text))
        assert len(re.findall("^<!-- (?:not run|run by)", text, re.MULTILINE)) == sum(
            bool(marked) for marked, _ in _BLOCK.findall(text)
        )
        # Directives of the generator, and nothing else, are the other blocks.
        assert set(re.findall(r"^```(.*)", text, re.MULTILINE)) <= {
            "",
            "python",
            "{toctree}",
            "{eval-rst}",
            "{include} ../README.md",
            "{include} ../CHANGELOG.md",
        }
        not_run += [f"{page.name}: {marked}" for marked, _ in _BLOCK.findall(text) if "not run" in marked]
    assert len(not_run) <= MOST_NOT_RUN, "\n".join(not_run)


def commands() -> list[tuple[str, str]]:
    """The page and the text of each command line in an indented block, without its comment."""
    programs = r"make|\.venv/bin/\w+|python|pip|scripts/\S+|CXX=\S+ pip|(?:\w+=\S* )*python"
    found = []
    for page in PAGES:
        for line in re.findall(rf"^    ((?:{programs}) .*|scripts/\S+)$", page.read_text(), re.MULTILINE):
            found.append((page.name, re.sub(r"\s+# .*", "", line)))
    return found


@pytest.mark.parametrize(("page", "command"), commands(), ids=" ".join)
def test_commands_name_what_there_is(page: str, command: str) -> None:
    words = [word for word in command.split() if "=" not in word]
    if words[0] == "make":
        targets = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in " ".join(targets).split()
    for word in words:
        if re.fullmatch(r"(?!\.venv)[\w./]+/[\w./]+|\w+\.py", word):
            assert (ROOT / word).exists(), f"{page} tells of {word}"
    if "-m" in words and (module := words[words.index("-m") + 1]) == "torch_adadelta":
        assert (ROOT / module / "__main__.py").exists()
    assert words[0] in ("make", "python", "pip") or (ROOT / words[0]).exists() or words[0].startswith(".venv/bin/")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        other = page.parent / name if name else page
        assert other.exists(), target
        if anchor and other.suffix == ".md":
            anchors = {
                re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
                for heading in re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
            }
            assert anchor in anchors, target


def test_the_repository_layout_has_every_file() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    for folder in ("torch_adadelta", "torch_adadelta/keras", "csrc", "csrc/cpu"):
        for path in (ROOT / folder).iterdir():
            if path.suffix in (".py", ".h", ".cpp") and path.name not in ("__init__.py", "__main__.py"):
                assert f"`{path.name}`" in page, path
    for path in [*(ROOT / "tests").iterdir(), *(ROOT / "csrc").iterdir(), *(ROOT / "torch_adadelta").iterdir()]:
        if path.is_dir() and not path.name.startswith((".", "__")):
            assert f"`{path.name}/`" in page, path
    folders = ("torch_adadelta", "csrc", "tests", "benchmarks", "examples", "scripts")
    there_are = [str(path) for folder in folders for path in (ROOT / folder).rglob("*.*")]
    for name in re.findall(r"`([\w/]+\.(?:py|h|cpp|cuh|sh))`", page):
        assert any(path.endswith(f"/{name}") for path in there_are), f"there is no {name}"


# Source files whose tests have another name: most have no behaviour of their own.
_TESTS_ELSEWHERE: Final = {
    "torch_adadelta/compatibility.py": "package/test_install.py",
    "torch_adadelta/version.py": "package/test_install.py",
    "torch_adadelta/__main__.py": "package/test_install.py",
    "torch_adadelta/keras/__main__.py": "keras_files/test_keras_main.py",
    "csrc/adadelta.h": "csrc/test_cpu_update.py",
    "csrc/dtypes.h": "csrc/test_cpu_blocks.py",
    "csrc/gradients.h": "csrc/test_cpu_square_sums.py",
    "csrc/gil.h": "csrc/test_ops.py",
    "csrc/refusal.h": "csrc/test_tensor_lists.py",
    "csrc/schemas.h": "csrc/test_ops.py",
    "csrc/cpu/kernels/all.h": "csrc/test_cpu_update.py",
    "csrc/cpu/kernels/kernel_table.h": "csrc/test_cpu_update.py",
    "csrc/cpu/kernels/default.cpp": "csrc/test_cpu_dispatch.py",
    "csrc/cpu/kernels/avx2.cpp": "csrc/test_cpu_dispatch.py",
    "csrc/cpu/kernels/avx512.cpp": "csrc/test_cpu_update_avx512.py",
    "csrc/cpu/kernels/avx512_bf16.cpp": "csrc/test_cpu_convert.py",
    "csrc/cuda/adadelta.cu": "csrc/test_cuda_build.py",
}


def test_each_source_file_has_tests_of_its_name() -> None:
    tests = ROOT / "tests"
    sources = [path for folder in ("torch_adadelta", "csrc") for path in (ROOT / folder).rglob("*.*")]
    for path in sources:
        name = str(path.relative_to(ROOT))
        if path.suffix not in (".py", ".h", ".cpp", ".cu", ".cuh") or path.name == "__init__.py":
            continue
        kind = "".join(f"{part}_" for part in ("cpu", "cuda") if part in path.parts)
        elsewhere = _TESTS_ELSEWHERE.get(name)
        found = [tests / elsewhere] if elsewhere else list(tests.rglob(f"test_{kind or '*'}{path.stem}*.py"))
        assert any(test.exists() for test in found), f"{name} has no tests of its name"


def test_troubleshooting_knows_what_the_diagnostics_print() -> None:
    """Each line of `python -m torch_adadelta`, and each message that the page quotes as ours, stands in the sources."""
    page = (DOCS / "troubleshooting.md").read_text()
    printed = subprocess.run(
        [sys.executable, "-m", "torch_adadelta"], capture_output=True, text=True, check=True
    ).stdout
    labels = re.findall(r"^ {0,2}(\w+(?:[ -]\w+)?)(?: {2,}| \d)", printed, re.MULTILINE)
    assert {"Python", "CPU library", "CPU kernels", "single_tensor", "fused"} <= set(labels)
    for label in labels:
        assert f"`{label}`" in page, label
    sources = " ".join(
        re.sub(r'"\s*\n\s*f?"', "", path.read_text())
        for path in [*(ROOT / "torch_adadelta").rglob("*.py"), ROOT / "setup.py"]
    )
    for quoted in re.findall(r"^\*\*`([^`]+)`", page, re.MULTILINE) + re.findall(r"warning `([^`]+)`", page):
        assert quoted in sources, quoted
