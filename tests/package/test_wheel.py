"""The check of a wheel's libraries: what is installed here passes, and each thing that it forbids is noticed."""

import importlib.util
import io
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from torch_adadelta.backends import kernels

ROOT = Path(__file__).resolve().parents[2]
CHECK = ROOT / "scripts" / "check_wheel.py"
COMPILER = shutil.which("g++")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHECK.exists(), reason="needs the source tree"),
    pytest.mark.skipif(importlib.util.find_spec("elftools") is None, reason="needs pyelftools"),
]


@pytest.fixture(scope="module")
def check() -> Any:
    spec = importlib.util.spec_from_file_location("check_wheel", CHECK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")
def test_the_library_takes_nothing_but_the_stable_abi(check: Any) -> None:
    library = kernels.LIBRARY_PATH.read_bytes()
    assert check.mistakes_of_library(library) == []
    symbols = {symbol.name for symbol in check.undefined_symbols(check.ELFFile(io.BytesIO(library)))}
    assert {"torch_parallel_for", "torch_list_get_item", "aoti_torch_library_init_def"} <= symbols


@pytest.mark.skipif(COMPILER is None, reason="no g++")
@pytest.mark.parametrize(
    ("source", "mistake"),
    [
        ('extern "C" int PyErr_Occurred(); int f() { return PyErr_Occurred(); }', "takes PyErr_Occurred from Python"),
        ('extern "C" int _Py_NoneStruct; int f() { return _Py_NoneStruct; }', "takes _Py_NoneStruct from Python"),
        ("namespace at { int clone(); } int f() { return at::clone(); }", "takes _ZN2at5cloneEv, which is no function"),
        ("namespace c10 { int g(); } int f() { return c10::g(); }", "takes _ZN3c101gEv, which is no function"),
        # Declared by a younger PyTorch than the oldest one that the wheel is for.
        (
            'extern "C" int torch_from_blob(); int f() { return torch_from_blob(); }',
            "takes torch_from_blob, which is no",
        ),
        ('extern "C" int f(int x) { return x; }', ""),
    ],
    ids=["python", "python-data", "at", "c10", "younger", "harmless"],
)
def test_what_is_forbidden_is_noticed(check: Any, tmp_path: Path, source: str, mistake: str) -> None:
    (tmp_path / "x.cpp").write_text(source)
    library = tmp_path / "x.so"
    subprocess.run([str(COMPILER), "-shared", "-fPIC", str(tmp_path / "x.cpp"), "-o", str(library)], check=True)
    found = check.mistakes_of_library(library.read_bytes())
    assert len(found) == bool(mistake), found
    assert not mistake or found[0].startswith(mistake)


@pytest.mark.skipif(COMPILER is None, reason="no g++")
def test_another_library_is_noticed(check: Any, tmp_path: Path) -> None:
    for name, flags in (("libtorch_python.so", ["-shared"]), ("x.so", ["-shared", "-Wl,--no-as-needed"])):
        linked = [str(tmp_path / "libtorch_python.so")] if name == "x.so" else []
        command = [str(COMPILER), *flags, "-fPIC", "-x", "c++", "/dev/null", "-x", "none", *linked]
        soname = [f"-Wl,-soname,{name}"]
        subprocess.run([*command, *soname, "-o", str(tmp_path / name)], check=True)
    found = check.mistakes_of_library((tmp_path / "x.so").read_bytes())
    assert found == ["asks for libtorch_python.so, which is neither the system's nor PyTorch's"]


@pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")
def test_tags(check: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = tmp_path / "torch_adadelta-0.1.0-py3-none-manylinux_2_28_x86_64.whl"
    linux = tmp_path / "torch_adadelta-0.1.0-py3-none-linux_x86_64.whl"
    pinned = tmp_path / "torch_adadelta-0.1.0-cp311-cp311-manylinux_2_28_x86_64.whl"
    empty = tmp_path / "torch_adadelta-0.1.1-py3-none-manylinux_2_28_x86_64.whl"
    for wheel in (good, linux, pinned, empty):
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("torch_adadelta/__init__.py", "")
            if wheel != empty:
                archive.write(kernels.LIBRARY_PATH, "torch_adadelta/_C.so")
    assert check.mistakes_of_wheel(good) == []
    assert check.mistakes_of_wheel(linux) == check.mistakes_of_wheel(pinned) == ["its tag is not py3-none-manylinux…"]
    assert check.mistakes_of_wheel(empty) == ["there is no library in it"]
    assert check.main([str(good)]) == 0
    assert check.main([str(good), str(linux)]) == 1
    assert "linux_x86_64.whl: \n  its tag is not py3-none-manylinux" in capsys.readouterr().out
