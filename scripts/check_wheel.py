"""Checks that the libraries in a wheel run on every PyTorch and every Python that the wheel admits.

    python scripts/check_wheel.py WHEEL...

The rules, for each ELF file in a wheel:

- every symbol that it takes from PyTorch is a C function of LibTorch's stable ABI: one that the installed PyTorch
  declares in torch/csrc/stable/c/shim.h or in torch/csrc/inductor/aoti_torch, and none that is younger than the
  oldest PyTorch admitted;
- it takes no symbol from Python, and asks for no library of Python's;
- whatever else it takes has a version of glibc, libstdc++, or libgcc, which the wheel's manylinux tag vouches for;
- the wheel's tag is py3-none, and a manylinux one.

Needs pyelftools, which comes with auditwheel, and the PyTorch that the wheel was built against.
"""

import io
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import torch
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection, GNUVerSymSection
from elftools.elf.sections import SymbolTableSection

# What a library may ask for. The libraries of PyTorch have been loaded before.
SYSTEM_LIBRARIES: Final = re.compile(
    r"(libc|libm|libdl|libpthread|librt|libgcc_s|libstdc\+\+|ld-linux[\w-]*)\.so(\.\d+)*"
)
TORCH_LIBRARIES: Final = re.compile(r"(libtorch|libtorch_cpu|libtorch_cuda|libc10|libc10_cuda)\.so")

# Weak symbols that the compiler's own start-up code looks for.
TOOLCHAIN_SYMBOLS: Final = {
    "__cxa_finalize",
    "__gmon_start__",
    "_ITM_deregisterTMCloneTable",
    "_ITM_registerTMCloneTable",
}

TAG: Final = re.compile(r"-py3-none-(manylinux_\d+_\d+_\w+|manylinux\d+_\w+)(\.manylinux\w+)*\.whl$")


class Symbol(NamedTuple):
    """A symbol that a library takes from another one, with the version that it asks for, if it asks for one."""

    name: str
    version: str | None


def undefined_symbols(elf: ELFFile) -> list[Symbol]:
    """The symbols that the library takes from others."""
    table = elf.get_section_by_name(".dynsym")
    assert isinstance(table, SymbolTableSection)
    versions = elf.get_section_by_name(".gnu.version")
    needs = elf.get_section_by_name(".gnu.version_r")
    names = {}
    if isinstance(needs, GNUVerNeedSection):
        names = {aux["vna_other"]: aux.name for _, auxes in needs.iter_versions() for aux in auxes}
    symbols = []
    for index, symbol in enumerate(table.iter_symbols()):
        if symbol["st_shndx"] == "SHN_UNDEF" and symbol.name:
            number = versions.get_symbol(index)["ndx"] if isinstance(versions, GNUVerSymSection) else None
            symbols.append(Symbol(symbol.name, names.get(number)))
    return symbols


def needed_libraries(elf: ELFFile) -> list[str]:
    """The libraries that the loader has to find for it."""
    section = elf.get_section_by_name(".dynamic")
    assert isinstance(section, DynamicSection)
    return [tag.needed for tag in section.iter_tags() if tag.entry.d_tag == "DT_NEEDED"]


def stable_functions() -> set[str]:
    """The C functions of LibTorch's stable ABI that the installed PyTorch declares, without those younger than 2.10."""
    include = Path(torch.__file__).parent / "include" / "torch" / "csrc"
    declared: set[str] = set()
    for header in [include / "stable" / "c" / "shim.h", *(include / "inductor" / "aoti_torch").rglob("*.h")]:
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", header.read_text(), flags=re.DOTALL)
        # #if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_11_0 … #endif; these blocks do not nest in PyTorch's headers.
        text = re.sub(
            r"#if TORCH_FEATURE_VERSION >= TORCH_VERSION_(\d+)_(\d+)_\d+(.*?)#endif",
            lambda block: block[3] if (int(block[1]), int(block[2])) <= (2, 10) else "",
            text,
            flags=re.DOTALL,
        )
        declared.update(re.findall(r"\b(aoti_torch_\w+|torch_\w+)\s*\(", text))
    return declared


def _mistakes_of_symbol(symbol: Symbol, stable: set[str]) -> Iterator[str]:
    name, version = symbol
    if re.match(r"_?Py[A-Z_]", name) or "pybind" in name:
        yield f"takes {name} from Python"
    elif version is None and name not in stable and name not in TOOLCHAIN_SYMBOLS:
        yield f"takes {name}, which is no function of LibTorch's stable ABI in PyTorch 2.10"
    elif version is not None and not re.match(r"GLIBC_|GLIBCXX_|CXXABI_|GCC_", version):
        yield f"takes {name}@{version}, which no manylinux tag vouches for"


def mistakes_of_library(content: bytes) -> list[str]:
    """What keeps a library from running everywhere, in words."""
    elf = ELFFile(io.BytesIO(content))
    stable = stable_functions()
    found = [mistake for symbol in undefined_symbols(elf) for mistake in _mistakes_of_symbol(symbol, stable)]
    for library in needed_libraries(elf):
        if not SYSTEM_LIBRARIES.fullmatch(library) and not TORCH_LIBRARIES.fullmatch(library):
            found.append(f"asks for {library}, which is neither the system's nor PyTorch's")
    return found


def mistakes_of_wheel(wheel: Path) -> list[str]:
    """What keeps a wheel from running everywhere, in words."""
    found = [] if TAG.search(wheel.name) else ["its tag is not py3-none-manylinux…"]
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if name.endswith(".so")]
        if not libraries:
            found.append("there is no library in it")
        for name in libraries:
            found += [f"{name} {mistake}" for mistake in mistakes_of_library(archive.read(name))]
    return found


def main(wheels: list[str]) -> int:
    """Prints what is wrong with each wheel; returns 1 if something is."""
    result = 0
    for wheel in wheels:
        mistakes = mistakes_of_wheel(Path(wheel))
        print(f"{Path(wheel).name}: " + ("\n  ".join(["", *mistakes]) if mistakes else "runs on PyTorch >= 2.10"))
        result |= bool(mistakes)
    return int(result)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
