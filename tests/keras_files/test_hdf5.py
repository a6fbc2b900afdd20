"""HDF5 files: what Keras writes is read; what a hostile file holds is refused, and neither followed nor read."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

pytest.importorskip("h5py", reason="needs the extra 'keras'")

import h5py
from keras_stored import DATA, KERNEL, assert_refused, build

from torch_adadelta.keras import KerasFileError, hdf5, load_keras
from torch_adadelta.keras.hdf5 import Hdf5, read_in_sandbox

Fill = Callable[[Any], Any]


def opened(fill: Fill) -> Hdf5:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        fill(file)
    return Hdf5(buffer, len(buffer.getvalue()))


def setting(name: str, value: Any) -> Fill:
    return lambda file: file.__setitem__(name, value)


def created(*args: Any, **options: Any) -> Fill:
    return lambda file: file.create_dataset("x", *args, **options)


def attributes(**values: Any) -> Fill:
    return lambda file: file.attrs.update(values)


# ---- Datasets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", "<i8", "<i4", "u1", "?"])
@pytest.mark.parametrize("shape", [(), (3, 2), (0, 4)])
def test_numbers_are_read_as_they_are(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    stored = opened(setting("a/x", array)).stored("a/x")
    assert (stored.name, stored.shape) == ("a/x", shape)
    assert stored.dtype == array.dtype
    np.testing.assert_array_equal(stored.read(), array)


def test_a_compact_dataset_is_read() -> None:
    def fill(file: Any) -> None:
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple((2,))
        h5py.h5d.create(file.id, b"x", h5py.h5t.NATIVE_FLOAT, space, plan).write(
            h5py.h5s.ALL, h5py.h5s.ALL, np.array([1.5, -2.0], "f4")
        )

    assert opened(fill).stored("x").read().tolist() == [1.5, -2.0]


@pytest.mark.parametrize("dtype", ["V2", "<u2"])
def test_bfloat16_becomes_float32(dtype: str) -> None:
    """Keras 3 writes the bits, and says what they are in an attribute."""

    def fill(file: Any) -> None:
        file["x"] = np.array([[0x3F80], [0xC000], [0x0001]], "<u2").view(dtype)
        file["x"].attrs["dtype"] = "bfloat16"

    stored = opened(fill).stored("x")
    assert (stored.shape, stored.dtype) == ((3, 1), np.dtype("<f4"))
    np.testing.assert_array_equal(stored.read(), np.array([[1.0], [-2.0], [2.0**-133]], "f4"), strict=True)


def virtual(file: Any) -> None:
    layout = h5py.VirtualLayout((3, 2), "f4")
    layout[:] = h5py.VirtualSource(str(DATA / "legacy.h5"), KERNEL, (3, 2))
    file.create_virtual_dataset("x", layout)


SECRET: Final = [(__file__, 0, 24)]

REFUSED: Final[dict[str, tuple[Fill, str]]] = {
    "nothing": (lambda file: None, "it holds no dataset x"),
    "a group": (setting("x/y", 1.0), "it holds no dataset x"),
    "no space": (setting("x", h5py.Empty("f4")), "x holds nothing"),
    "more than the file has": (created((1 << 20, 1 << 20), "f4"), "made to exhaust the memory"),
    "chunks": (created((1 << 20, 1 << 20), "f4", chunks=(1024, 1024)), "is stored in chunks"),
    "compressed": (created(data=np.zeros((4096, 4096), "f4"), compression="gzip"), "is stored in chunks"),
    "another file": (created((3, 2), "f4", external=SECRET), "x is stored in another file"),
    "a virtual dataset": (virtual, "x is stored in another file"),
    "too many axes": (setting("x", np.zeros((1,) * 9)), "which no weight has"),
    "texts": (setting("x", np.array([b"a"])), r"dtype \|S1, not one of numbers"),
    "complex": (setting("x", np.ones(2, "c8")), "not one of numbers"),
    "records": (setting("x", np.ones(2, [("x", "f4")])), "not one of numbers"),
    "bits without a name": (setting("x", np.zeros(2, "V2")), "not one of numbers"),
    "an external link": (setting("x", h5py.ExternalLink(DATA / "new.h5", "/x")), "/x is a link to elsewhere"),
    "a soft link": (lambda file: file.update({"y": 1.0, "x": h5py.SoftLink("/y")}), "/x is a link to elsewhere"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_array_of_this_file_is_refused(name: str) -> None:
    fill, message = REFUSED[name]
    with pytest.raises(KerasFileError, match=message):
        opened(fill).stored("x")


def test_wide_bits_are_no_bfloat16() -> None:
    def fill(file: Any) -> None:
        file["x"] = np.zeros(2, "V4")
        file["x"].attrs["dtype"] = "bfloat16"

    with pytest.raises(KerasFileError, match="not one of numbers"):
        opened(fill).stored("x")


# ---- Groups ---------------------------------------------------------------------------------------------------------


def test_paths_lead_downwards_only() -> None:
    file = opened(setting("a/b/x", 1.0))
    assert file.has("a/b/x")
    assert file.get("a/b").name == "/a/b"
    for path in ("", "/a", "a//b", "a/.", "a/b/..", "a/b/x/y", "a/c", "b"):
        assert not file.has(path), path


def test_datasets_come_with_their_paths() -> None:
    file = opened(lambda file: file.update({"b": 1, "a/y": 2, "a/b/x": 3, "a/c": 4}))
    assert sorted(name for name, _ in file.datasets()) == ["a/b/x", "a/c", "a/y", "b"]
    assert sorted((name, dataset[()]) for name, dataset in file.datasets("a")) == [("b/x", 3), ("c", 4), ("y", 2)]
    assert list(file.datasets("b")) == list(file.datasets("c")) == []


def test_links_are_not_followed_on_the_way() -> None:
    file = opened(lambda file: file.update({"a/x": 1.0, "b": h5py.SoftLink("/a")}))
    for search in (lambda: file.get("b/x"), lambda: list(file.datasets())):
        with pytest.raises(KerasFileError, match="/b is a link to elsewhere"):
            search()


def test_groups_that_no_model_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def nested(depth: int) -> Hdf5:
        return opened(setting("/".join(["a"] * depth) + "/x", 1.0))

    assert len(list(nested(63).datasets())) == 1
    for file in (nested(64), opened(lambda file: file.update({"a/x": 1.0}) or file["a"].__setitem__("b", file["a"]))):
        with pytest.raises(KerasFileError, match="nested 64 deep"):
            list(file.datasets())
    monkeypatch.setattr(hdf5, "_MAX_OBJECTS", 5)
    assert len(list(opened(lambda file: file.update({str(n): n for n in range(5)})).datasets())) == 5
    with pytest.raises(KerasFileError, match="hold 6 objects"):
        list(opened(lambda file: file.update({str(n): n for n in range(6)})).datasets())


# ---- Attributes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fill", "expected"),
    [
        (attributes(), None),
        (attributes(names=[b"a", "\u00e9".encode()]), ["a", "é"]),
        (attributes(names=np.array(["a", "bc"], h5py.string_dtype())), ["a", "bc"]),
        (attributes(names="one"), ["one"]),
        (attributes(names=np.zeros(0)), []),
        # What does not fit into the header of an object, Keras writes in several attributes.
        (attributes(names0=[b"a", b"b"], names1=[b"c"], names2="d", names4=[b"e"]), ["a", "b", "c", "d"]),
        (attributes(names=[b"a"], names0=[b"b"]), ["a"]),
    ],
)
def test_lists_of_names(fill: Fill, expected: list[str] | None) -> None:
    assert opened(fill).attribute_list("", "names") == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[b"a"]], "names is no list of names"),
        (h5py.Empty("f4"), "names is no list of names"),
        (np.array([b"\xff"]), "names is no UTF-8"),
        ([1, 2], "names is no text but int64"),
    ],
)
def test_lists_that_are_none(value: Any, message: str) -> None:
    with pytest.raises(KerasFileError, match=message):
        opened(attributes(names=value)).attribute_list("", "names")


def test_texts() -> None:
    file = opened(lambda file: (attributes(a="text", b=np.bytes_(b"bytes"), c=3)(file), setting("x", 1.0)(file)))
    assert (file.root_text("a"), file.root_text("b"), file.root_text("d")) == ("text", "bytes", None)
    assert file.attribute_text(file.get("x"), "a") is None
    with pytest.raises(KerasFileError, match="c is no text but int64"):
        file.root_text("c")
    assert file.attribute_list("nothing", "a") is None


@pytest.mark.parametrize("text", ["[]", "[1, 2, 3]"])
def test_a_text_of_fixed_length_gets_the_length_that_it_needs(text: str) -> None:
    def fill(file: Any) -> None:
        file.attrs.create("a", b"[1, 2]", dtype=h5py.string_dtype("ascii", 6))
        hdf5.set_text(file, "a", text)

    assert opened(fill).root_text("a") == text


def test_an_attribute_larger_than_the_file_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as filled:
        filled.attrs["names"] = np.array([b"a" * 500] * 10)
    monkeypatch.setattr(hdf5, "MAX_EXPANSION", 1)
    assert Hdf5(buffer, 5000).attribute_list("", "names") == ["a" * 500] * 10
    file = Hdf5(buffer, 4999)
    with pytest.raises(KerasFileError, match="the attribute names has 5000 bytes, and the file"):
        file.attribute_list("", "names")


# ---- The process that looks first -----------------------------------------------------------------------------------


def test_a_file_that_hdf5_cannot_read_is_refused_by_path_or_by_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DATA)
    read_in_sandbox(Path("k3.h5"))
    read_in_sandbox(None, (DATA / "k3.h5").read_bytes())
    for arguments in ((Path("README.md"),), (None, b"nothing"), (None,)):
        with pytest.raises(KerasFileError, match=r"it is damaged, or no file of Keras \(OSError: "):
            read_in_sandbox(*arguments)
    monkeypatch.setattr(sys, "executable", "")  # as in an application that embeds Python
    read_in_sandbox(None, b"nothing")


@pytest.mark.usefixtures("sandboxed")
def test_hdf5_that_loops_waits_or_crashes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a mock of the process, but of what goes wrong in it."""
    script = tmp_path / "hdf5_sandbox.py"
    monkeypatch.setattr(hdf5, "SANDBOX_SECONDS", 1)
    monkeypatch.setattr(hdf5, "_SANDBOX", script)
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[3]), 9)); "
    for code, wait, message in (
        (limit + "\nwhile True: pass", 1800, "HDF5 was still reading it after 1 seconds of work"),
        ("import threading; threading.Event().wait()", 0.5, "HDF5 was still reading it after 0.5 seconds"),
        ("import os; os.abort()", 1800, r"HDF5 crashes on it \(signal 6\)"),
        ("import sys; sys.exit('OSError: bad')", 1800, r"no file of Keras \(OSError: bad\)"),
        (f"import sys; assert sys.argv[1] == {str(DATA / 'k3.h5')!r}, sys.argv[1]; sys.exit('right')", 1800, "right"),
    ):
        monkeypatch.setattr(hdf5, "_WAIT_SECONDS", wait)
        script.write_text(code)
        assert_refused(DATA / "k3.h5", message)


def test_without_h5py(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of TensorFlow are read."""
    monkeypatch.setattr(hdf5, "h5py", None)
    with pytest.raises(ImportError, match="or h5py alone"):
        read_in_sandbox(DATA / "k3.h5")
    model, optimizer = build()
    with pytest.warns(UserWarning, match="not in the file"):
        load_keras(DATA / "tf24_tfck2", optimizer, model)
    assert optimizer.iterations == 4
    for name in ("tf24.h5", "k3.keras", "k3.weights.h5"):
        with pytest.raises(ImportError, match=r"pip install 'torch_adadelta\[keras\]'"):
            load_keras(DATA / name, optimizer, model)
