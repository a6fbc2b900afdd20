"""Writes stubs of the system's libraries, as they were in manylinux_2_28, to link against.

    python scripts/link_stubs.py FOLDER
    LDFLAGS=-LFOLDER python setup.py build_ext

A linker binds each symbol to the newest version that the library of this system has, so that the result asks for a
system as new as this one: for glibc 2.34 as soon as it calls `dlsym`, though that function is the same since 2.2.5. The
stubs hold the same names without the versions that are too new, and no code. What is linked against them asks for the
systems of PyTorch's own wheels: RHEL 8, Debian 10, Ubuntu 20.04 and whatever is newer.

What those systems lack is linked in, hidden: the few functions of libstdc++ that are newer come out of `libstdc++.a`.
The rest of libstdc++ stays the system's. A whole one inside would be wrong. PyTorch catches what the library throws,
and each libstdc++ counts the exceptions under way by itself: `std::uncaught_exceptions()` would be -1 after the first.
What can be had nowhere stays undefined; `scripts/check_wheel.py` then refuses the wheel.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

# What auditwheel admits for manylinux_2_28.
NEWEST: Final = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}

LIBRARIES: Final = ("libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libstdc++.so.6")

# Where functions were that glibc has in libc.so.6 since 2.34, if their names begin so.
FORMER_LIBRARIES: Final = {
    r"dl": "libdl.so.2",
    r"pthread_|sem_": "libpthread.so.0",
    r"aio_|lio_|mq_|shm_|timer_": "librt.so.1",
}

# Whether the process has one thread only, which shared_ptr asks: "no" is always right.
ADDITIONS: Final = """\
.globl __libc_single_threaded
.hidden __libc_single_threaded
.type __libc_single_threaded, STT_OBJECT
.bss
__libc_single_threaded: .zero 1
.section .note.GNU-stack, ""
"""


def path_of(name: str) -> str:
    """Where the compiler finds a file of the system."""
    return subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def versions_of(library: str) -> dict[str, tuple[str, dict[tuple[int, ...], str]]]:
    """For each symbol that a library of the system offers: its type, and its versions by their numbers."""
    command = ["readelf", "--wide", "--dyn-syms", path_of(library)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pattern = r"(\w+) +(?:GLOBAL|WEAK|UNIQUE) +DEFAULT +\d+ ([^@\s]+)@@?(([A-Z]+)_([\d.]+))$"
    symbols: dict[str, tuple[str, dict[tuple[int, ...], str]]] = {}
    for kind, name, version, of, number in re.findall(pattern, listed, re.MULTILINE):
        if of in NEWEST:
            symbols.setdefault(name, (kind, {}))[1][tuple(map(int, number.split(".")))] = version
    return symbols


def write_stub(path: Path, symbols: dict[str, tuple[str, str]]) -> None:
    """Writes a library that offers symbols, given as their types and versions, and does nothing."""
    code, nodes = [], {}
    for name, (kind, version) in symbols.items():
        section = '.section .tbss, "awT"' if kind == "TLS" else ".text"
        code.append(
            f'{section}\n.globl "{name}"\n.type "{name}", STT_{kind.replace("IFUNC", "FUNC")}\n"{name}": .zero 8'
        )
        nodes.setdefault(version, []).append(f'"{name}";')
    source, script = path.with_suffix(".s"), path.with_suffix(".map")
    source.write_text("\n".join([*code, '.section .note.GNU-stack, ""\n']))
    script.write_text("".join(f"{version} {{ {' '.join(names)} }};\n" for version, names in nodes.items()))
    options = ["-shared", "-nostdlib", f"-Wl,--version-script={script},-soname={path.name}"]
    subprocess.run(["g++", *options, str(source), "-o", str(path)], check=True)


def main(folder: Path) -> None:
    """Writes the stubs, and the names under which the linker looks for them."""
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    stubs: dict[str, dict[str, tuple[str, str]]] = {library: {} for library in LIBRARIES}
    for library in LIBRARIES:
        for name, (kind, versions) in versions_of(library).items():
            newest = max(versions)
            of = next(of for of in NEWEST if versions[newest].startswith(f"{of}_"))
            admitted = [number for number in versions if number <= NEWEST[of]]
            if not admitted:
                continue
            home = library
            if library == "libc.so.6" and newest > NEWEST[of]:
                home = next((former for start, former in FORMER_LIBRARIES.items() if re.match(start, name)), home)
            stubs[home][name] = kind, versions[max(admitted)]
    for library, symbols in stubs.items():
        write_stub(folder / library, symbols)
        (folder / f"{library.partition('.so')[0]}.so").write_text(f"INPUT({folder / library})\n")
    (folder / "libstdc++.so").write_text(f"INPUT({folder / 'libstdc++.so.6'} {path_of('libstdc++.a')})\n")
    (folder / "additions.s").write_text(ADDITIONS)
    subprocess.run(["g++", "-c", str(folder / "additions.s"), "-o", str(folder / "additions.o")], check=True)
    subprocess.run(["ar", "rcs", str(folder / "additions.a"), str(folder / "additions.o")], check=True)
    # The system's own script, with the rest that it names.
    former = " ".join(str(folder / library) for library in ("libdl.so.2", "libpthread.so.0", "librt.so.1"))
    libc = f"{folder / 'libc.so.6'} {folder / 'additions.a'} AS_NEEDED ( {former} )"
    script = Path(path_of("libc.so")).read_text()
    (folder / "libc.so").write_text(re.sub(r"\S+/libc\.so\.6\b", libc, script))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/link_stubs.py FOLDER")
    main(Path(sys.argv[1]))
