"""What the CUDA compiler makes of the kernels: registers, spills, arithmetic, instructions. No emulation shows them.

The instructions of the update's inner loops are compared with those recorded in instructions/cuda.json. After a change
that is meant to cost more, or for another compiler, record them anew, and commit the file:

    python tests/csrc/test_cuda_build.py
"""

import atexit
import functools
import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree"),
    pytest.mark.skipif(NVCC is None, reason="no nvcc, the compiler of the CUDA toolkit"),
]

# With more, an SM would hold fewer than two blocks of 512 threads.
MOST_REGISTERS = 64


SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))

# What is compiled of one source serves all of its tests, if they run in one process.
of_each_source = pytest.mark.parametrize(
    "source", [pytest.param(path, id=path.stem, marks=pytest.mark.xdist_group(path.name)) for path in SOURCES]
)


@functools.cache
def scratch() -> Path:
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return Path(folder.name)


def nvcc(source: Path, output: Path, *arguments: str, flags: list[str] | None = None) -> str:
    """Compiles a file with the flags of setup.py, or others, and returns what the compiler said."""
    if flags is None:
        listed = re.search(r"CUDA_FLAGS = \[(.*?)\n\]", (ROOT / "setup.py").read_text(), re.DOTALL)
        assert listed is not None
        flags = re.findall(r'"(-[^"{]+)"', listed[1])
        assert {"--fmad=false", "--prec-div=true", "--prec-sqrt=true", "--ftz=false"} <= set(flags)
    assert NVCC is not None
    own = ["-std=c++20", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    includes = [f"-I{path}" for path in include_paths()]
    command = [NVCC, *own, *flags, *includes, *arguments, str(source), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stderr


@functools.cache
def ptx_of(source: Path) -> str:
    output = scratch() / f"{source.stem}.ptx"
    nvcc(source, output, "-ptx", "-arch=compute_80")
    return output.read_text()


@functools.cache
def cubin_of(source: Path, architecture: str) -> tuple[Path, str]:
    """The code for an architecture, and what ptxas reported."""
    output = scratch() / f"{source.stem}.{architecture}.cubin"
    return output, nvcc(source, output, "-cubin", f"-arch={architecture}", "-Xptxas=-v")


class Kernel(NamedTuple):
    name: str
    stack: int
    spills: int
    registers: int


def compiled(source: Path, architecture: str) -> list[Kernel]:
    """What ptxas reports of every kernel in a file."""
    _, report = cubin_of(source, architecture)
    pattern = (
        r"Compiling entry function '(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    return [
        Kernel(name, int(stack), int(stores) + int(loads), int(registers))
        for name, stack, stores, loads, registers in re.findall(pattern, report, re.DOTALL)
    ]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@of_each_source
def test_kernels_stay_in_their_registers(source: Path, architecture: str) -> None:
    kernels = compiled(source, architecture)
    in_float = [kernel for kernel in kernels if "kernelId" not in kernel.name]  # mangled: of double
    assert len(kernels) >= 4
    assert in_float
    for kernel in kernels:
        assert kernel.stack == 0, kernel
        assert kernel.spills == 0, kernel
    for kernel in in_float:
        assert kernel.registers <= MOST_REGISTERS, kernel


# Arithmetic in PTX, and the part of it that rounds as IEEE 754 has it, each operation by itself: what is not told how to
# round, ptxas may fuse.
ARITHMETIC = (
    r"\b(?:add|sub|mul|mad|fma|div|sqrt|rsqrt|rcp|ex2|lg2|sin|cos|tanh)(?:\.\w+)*\.(?:f16x2|bf16x2|f16|bf16|f32|f64)\b"
)
EXACT = {f"{name}.rn.{dtype}" for name in ("add", "sub", "mul", "div", "rcp", "sqrt") for dtype in ("f32", "f64")}


@of_each_source
def test_nothing_is_fused_or_approximated(source: Path) -> None:
    """The PTX of every kernel, which ptxas translates for each architecture as it stands."""
    text = ptx_of(source)
    kernels = re.findall(r"\.entry (\w+)\((.*?)^}", text, re.MULTILINE | re.DOTALL)
    assert len(kernels) >= 4
    for name, body in kernels:
        # Whole numbers are multiplied and added, too.
        found = set(re.findall(ARITHMETIC, body))
        assert found <= EXACT, name
        if "update" in name:
            dtype = "f64" if re.search("kernelId", name) else "f32"
            assert {f"{operation}.rn.{dtype}" for operation in ("add", "sub", "mul", "rcp", "sqrt")} <= found, name
        assert not re.search(r"\.ftz\b|\.approx\b|\.full\b", body), name
        assert not re.search(r"\bcall\b|\.local\b", body), name


def test_the_check_sees_what_it_looks_for(tmp_path: Path) -> None:
    """With the compiler's own defaults, products and sums are fused, and it says so."""
    (source,) = (path for path in SOURCES if path.stem == "adadelta")
    output = tmp_path / "kernels.ptx"
    nvcc(source, output, "-ptx", "-arch=compute_80", flags=["--use_fast_math"])
    text = output.read_text()
    found = set(re.findall(ARITHMETIC, text))
    assert {"fma.rn.ftz.f32", "fma.rn.f64", "sqrt.approx.ftz.f32"} <= found, found


@of_each_source
def test_vectors_are_read_and_written_whole(source: Path) -> None:
    """16 bytes at a time for every dtype, or for the larger of two: as four or two words, whatever is in them."""
    text = ptx_of(source)
    patterns = {
        "ld": r"\bld\.global(?:\.nc)?\.v(?:4\.[bfu]32|2\.[bfu]64)",
        "st": r"\bst\.global\.v(?:4\.[bfu]32|2\.[bfu]64)",
    }
    for name, body in re.findall(r"\.entry (\w+)\((.*?)^}", text, re.MULTILINE | re.DOTALL):
        if re.search(r"\d(?:update|square_sums)_kernel", name):
            assert re.search(patterns["ld"], body), name
        if re.search(r"\dupdate_kernel", name):
            # Of a parameter and its state, all that have as many bytes as the largest of them.
            state_is_larger = re.search(r"kernelIf(?!NS0_5PlainIf)", name)
            param_is_larger = re.search(r"kernelI(?!f)\w*?PlainIf", name)
            least = 2 if state_is_larger else 1 if param_is_larger else 3
            assert len(re.findall(patterns["st"], body)) >= least, name


# ---- Instructions ---------------------------------------------------------------------------------------------------

COUNTS = Path(__file__).with_name("instructions") / "cuda.json"
ARCHITECTURE = "sm_90"

# Of an H200: the instructions that its lanes can issue in a second, and the bytes that a device copy moves in one.
LANE_INSTRUCTIONS = 132 * 128 * 1.98e9
BYTES = 4.3e12

MOST_OF_ROOM = 0.7
MOST_GROWTH = 0.05

ITEM_SIZES = {"float": 4, "double": 8, "__half": 2, "__nv_bfloat16": 2}


class Loop(NamedTuple):
    """A vectorised loop of an update kernel, for gradients of the parameter's dtype or of any other."""

    turn: int  # instructions of a turn whose elements need no slow path and no option of the gradient
    whole: int  # all instructions, those of slow paths and options included
    loads: list[int]  # the bytes that each access reads
    stores: list[int]


class Layout(NamedTuple):
    """The bytes of an item of each tensor that a kernel reads and writes."""

    param: int
    state: int
    has_remainder: bool
    has_average: bool

    @classmethod
    def of(cls, kernel: str) -> "Layout":
        state, param, averages, remainders = re.findall(r"<(\w+), (.+?), (?:true|false), .*?<(\w+), (\w+)>", kernel)[0]
        item = re.sub(r".*<(\w+)>", r"\1", param).replace("Master", "__nv_bfloat16")
        return cls(ITEM_SIZES[item], ITEM_SIZES[state], remainders == "true", averages == "true")

    @property
    def average(self) -> int:
        return max(4, self.param)

    @property
    def elements(self) -> int:
        """Of a turn: those that fill 16 bytes in the larger dtype."""
        return 16 // max(self.param, self.state)

    @property
    def bytes(self) -> int:
        """That an element moves."""
        return 3 * self.param + 4 * self.state + 4 * self.has_remainder + 2 * self.average * self.has_average

    @property
    def stores(self) -> list[int]:
        """The bytes of each access of a turn that writes; those that read are the same, and the gradient's."""
        items = [self.param, self.state, self.state, *[2] * self.has_remainder]
        accesses = [item * self.elements for item in items]
        if self.has_average:
            accesses += [16] * (self.average * self.elements // 16)
        return sorted(accesses)

    @property
    def room(self) -> float:
        """The instructions an element that take no longer than memory does. Half as many are of double precision."""
        instructions = LANE_INSTRUCTIONS * self.bytes / BYTES
        return instructions / 2 if self.param == 8 else instructions


def disassembler() -> str | None:
    """That of the CUDA toolkit, or of the package nvidia-cuda-nvdisasm."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else ()
    found = (str(path) for folder in folders for path in Path(folder).glob("*/bin/nvdisasm"))
    return shutil.which("nvdisasm") or next(found, None)


def shortest_turn(lines: list[str], labels: dict[str, int], first: int, last: int) -> int:
    """The instructions on the shortest way through a loop."""
    lengths = {first: 1}
    queue = deque([first])
    while last not in lengths:
        at = queue.popleft()
        branch = re.search(r"\bBRA\b.*?(\.L_x_\d+)", lines[at])
        is_conditional = lines[at].startswith("@") or re.search(r"\bBRA\S* !?U?P\d", lines[at]) is not None
        following = [labels[branch[1]]] if branch else []
        if is_conditional or not re.search(r"\b(?:BRA|EXIT|RET)\b", lines[at]):
            following.append(at + 1)
        for to in following:
            if first <= to <= last and to not in lengths:
                lengths[to] = lengths[at] + 1
                queue.append(to)
    return lengths[last]


def accesses(loop: list[str], operation: str) -> list[int]:
    """The bytes of each access to global memory, or by an address of which the compiler does not know the space."""
    names = {"U8": 1, "U16": 2, "64": 8, "128": 16}
    widths = (re.findall(rf"\b{operation}G?\.E(\S*)", line) for line in loop)
    return sorted(next((names[part] for part in width[0].split(".") if part in names), 4) for width in widths if width)


def loops_of(code: str) -> Iterator[Loop]:
    """The vectorised loops in the instructions of a kernel: the innermost that read and write 16 bytes at once."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?) ;", line):
            lines.append(instruction[1])
    for last, line in enumerate(lines):
        branch = re.search(r"\bBRA\b.*?(\.L_x_\d+)", line)
        if branch and (first := labels.get(branch[1], last + 1)) <= last:
            loop = lines[first : last + 1]
            loads, stores = accesses(loop, "LD"), accesses(loop, "ST")
            if 16 in loads and 16 in stores:
                yield Loop(shortest_turn(lines, labels, first, last), len(loop), loads, stores)


@functools.cache
def update_loops() -> dict[str, list[Loop]]:
    """The vectorised loops of each update kernel, first that for gradients of the parameter's dtype: with fewer loads."""
    (source,) = (path for path in SOURCES if path.stem == "adadelta")
    cubin, _ = cubin_of(source, ARCHITECTURE)
    tool = disassembler()
    if tool is None:
        pytest.skip("there is no nvdisasm, the disassembler of the CUDA toolkit")
    text = subprocess.run([tool, "--print-code", str(cubin)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\.text\.(\S+):$", text, flags=re.MULTILINE)[1:]
    names = subprocess.run(
        ["c++filt"], input="\n".join(parts[::2]), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return {
        name.replace("torch_adadelta::cuda::", "").removeprefix("void ").partition("(")[0]: sorted(
            loops_of(code), key=lambda loop: len(loop.loads) / len(loop.stores)
        )
        for name, code in zip(names, parts[1::2], strict=True)
        if " torch_adadelta::cuda::update_kernel<" in name
    }


def toolchain() -> str:
    assert NVCC is not None
    output = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    return f"nvcc {re.findall(r'release ([0-9.]+)', output)[0]}, {ARCHITECTURE}"


def counts() -> dict[str, list[int]]:
    """The instructions of each loop: of the shortest turn, and of all."""
    return {
        f"{name}, gradients of {dtype}": [loop.turn, loop.whole]
        for name, loops in update_loops().items()
        for dtype, loop in zip(("the same dtype", "any dtype"), loops, strict=True)
    }


needs_disassembler = pytest.mark.skipif(disassembler() is None, reason="there is no nvdisasm")
in_one_process = pytest.mark.xdist_group("adadelta.cu")


@needs_disassembler
@in_one_process
def test_a_turn_takes_less_than_its_memory_does() -> None:
    loops = update_loops()
    assert len(loops) >= 40
    for name, (same_dtype, any_dtype) in loops.items():
        layout = Layout.of(name)
        for loop in (same_dtype, any_dtype):
            elements = layout.elements * len(loop.stores) // len(layout.stores)  # the compiler may unroll
            assert loop.turn / elements <= MOST_OF_ROOM * layout.room, (name, loop, layout.room)
        if ", true, Optionals" in name:  # a kernel without options: nothing but slow paths is left out
            elements = layout.elements * len(same_dtype.stores) // len(layout.stores)
            assert same_dtype.whole / elements <= MOST_OF_ROOM * layout.room, (name, same_dtype, layout.room)


@needs_disassembler
@in_one_process
def test_accesses_of_a_turn_are_as_wide_as_they_can_be() -> None:
    for name, (same_dtype, _) in update_loops().items():
        layout = Layout.of(name)
        turns, rest = divmod(len(same_dtype.stores), len(layout.stores))
        assert rest == 0, name
        assert same_dtype.stores == sorted(turns * layout.stores), name
        assert same_dtype.loads == sorted(turns * [*layout.stores, layout.param * layout.elements]), name


@needs_disassembler
@in_one_process
def test_loops_take_no_more_instructions_than_recorded() -> None:
    known: dict[str, dict[str, list[int]]] = json.loads(COUNTS.read_text())
    if toolchain() not in known:
        pytest.skip(f"no instruction counts are recorded for {toolchain()}, only for {'; '.join(known)}")
    recorded, now = known[toolchain()], counts()
    assert now.keys() == recorded.keys(), f"run `python {Path(__file__).relative_to(ROOT)}` to record them anew"
    grown = {
        name: (pair, recorded[name])
        for name, pair in now.items()
        if any(count > (1 + MOST_GROWTH) * before for count, before in zip(pair, recorded[name], strict=True))
    }
    assert not grown


def record() -> None:
    """Writes the counts of the compiler in use to instructions/cuda.json, beside those of others."""
    known = json.loads(COUNTS.read_text()) if COUNTS.exists() else {}
    known[toolchain()] = counts()
    lines = json.dumps(known, indent=2)
    COUNTS.write_text(re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", lines) + "\n")
    print(f"recorded {len(known[toolchain()])} counts of {toolchain()} in {COUNTS}")


if __name__ == "__main__":
    record()
