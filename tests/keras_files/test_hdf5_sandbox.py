"""The script that looks at a whole HDF5 file in a process of its own."""

import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("h5py", reason="needs the extra 'keras'")

import h5py
from keras_stored import DATA

from torch_adadelta.keras import hdf5_sandbox


def visit(fill: Callable[[Any], Any], damage: Callable[[bytes], bytes] = bytes) -> None:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        fill(file)
    with h5py.File(io.BytesIO(damage(buffer.getvalue())), "r") as file:
        hdf5_sandbox.visit(file, h5py)


def test_it_follows_hard_links_once_and_no_others() -> None:
    def fill(file: Any) -> None:
        file["a/b/x"] = 1.0
        file["a/b/itself"] = file["a"]
        file["a/elsewhere"] = h5py.ExternalLink("/no/such/file", "/x")
        file["a/dangling"] = h5py.SoftLink("/nothing")

    visit(fill)


@pytest.mark.parametrize("where", ["/", "a", "a/x"])
def test_it_reads_every_attribute(where: str) -> None:
    """Of texts of variable length, whose heap is damaged here."""

    def fill(file: Any) -> None:
        file["a/x"] = 1.0
        file[where].attrs["text"] = "of variable length"

    visit(fill)
    with pytest.raises(OSError, match=r"heap|read"):
        visit(fill, lambda data: data.replace(b"GCOL", b"LOCG"))


def test_it_opens_every_dataset() -> None:
    def fill(file: Any) -> None:
        file["a/b/x"] = [1.5, 2.5]

    def damage(data: bytes) -> bytes:  # of its datatype, which no link and no attribute needs
        changed = data.replace(bytes.fromhex("1120 3f00 0800 0000"), bytes.fromhex("ff20 3f00 0800 0000"))
        assert changed != data
        return changed

    visit(fill)
    with pytest.raises((OSError, KeyError, TypeError, ValueError)):
        visit(fill, damage)


def test_it_counts_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(file: Any) -> None:
        for number in range(9):
            file[f"x{number}"] = number

    monkeypatch.setattr(hdf5_sandbox, "OBJECTS", 10)
    visit(fill)
    monkeypatch.setattr(hdf5_sandbox, "OBJECTS", 9)
    with pytest.raises(ValueError, match="it holds more than 9 objects"):
        visit(fill)


def run(*arguments: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, *arguments], input=data, capture_output=True, check=False)


def test_it_limits_itself() -> None:
    limits = "getattr(resource, f'RLIMIT_{name}')) for name in ('CPU', 'AS', 'CORE')"
    code = f"import resource, runpy; runpy.run_path({hdf5_sandbox.__file__!r})['main']({str(DATA / 'k3.h5')!r}, 7); "
    done = run("-c", code + f"print([resource.getrlimit({limits}])")
    assert done.stdout.decode().strip() == str([(7, 8), (8 << 30, 8 << 30), (0, 0)])


def test_it_takes_a_path_or_stdin_and_says_what_is_wrong() -> None:
    script = (hdf5_sandbox.__file__, "", hdf5_sandbox.__file__, "60")
    good = (DATA / "k3.h5").read_bytes()
    for data, code, message in (
        (good, 0, b""),
        (good[:1000], 1, b"OSError: "),
        (good.replace(b"GCOL", b"LOCG"), 1, b"OSError: "),  # which only a visit finds
        (b"nothing", 1, b"OSError: "),
    ):
        done = run(*script, data=data)
        assert (done.returncode, done.stderr[: len(message)]) == (code, message)
    assert b"GCOL" in good
    for name, code, message in (("k3.h5", 0, b""), ("nothing.h5", 1, b"FileNotFoundError")):
        done = run(hdf5_sandbox.__file__, str(DATA / name), hdf5_sandbox.__file__, "60", data=b"nothing")
        assert (done.returncode, done.stderr[: len(message)]) == (code, message)
