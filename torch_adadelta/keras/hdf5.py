"""HDF5 files that nobody vouches for: what is read of them is bounded by what they store.

Only what Keras writes is followed: hard links, and datasets of numbers that lie in the file itself. A link to another
file, or a dataset that is stored in one, would let a checkpoint read any file of the user's.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import numpy as np

from torch_adadelta.keras.errors import MAX_EXPANSION, Array, KerasFileError, LazyArray, checked_shape

try:
    import h5py
except ImportError:
    h5py = None

# Keras nests a few groups for each level of a model.
_MAX_DEPTH: Final = 64
_MAX_OBJECTS: Final = 1_000_000

# How long a processor may work to read the metadata of a file, which for a large model is a second; and how long that
# may take where the processor has other things to do, or where its time cannot be limited.
SANDBOX_SECONDS: Final = 60
_WAIT_SECONDS: Final = 1800.0

_SANDBOX: Final = Path(__file__).with_name("hdf5_sandbox.py")


def read_in_sandbox(path: Path | None, data: bytes | None = None) -> None:
    """Raises KerasFileError if HDF5 cannot read all metadata of a file in a process of its own.

    Args:
        path: the file, or None for `data`.
        data: the contents of the file.
    """
    required()
    if not sys.executable:
        return  # an application that embeds Python: there is no interpreter to start
    start = f"import runpy, sys; sys.path[:] = {json.dumps(sys.path)}; runpy.run_path(sys.argv[2], run_name='__main__')"
    name = "" if path is None else str(path.absolute())
    command = [sys.executable, "-c", start, name, str(_SANDBOX), str(SANDBOX_SECONDS)]
    try:
        done = subprocess.run(command, input=data or b"", capture_output=True, timeout=_WAIT_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise KerasFileError(f"HDF5 was still reading it after {_WAIT_SECONDS:g} seconds; it is damaged") from error
    if done.returncode == -getattr(signal, "SIGXCPU", 0):
        raise KerasFileError(f"HDF5 was still reading it after {SANDBOX_SECONDS} seconds of work; it is damaged")
    if done.returncode < 0:
        raise KerasFileError(f"HDF5 crashes on it (signal {-done.returncode}); it is damaged")
    if done.returncode:
        message = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise KerasFileError(f"it is damaged, or no file of Keras ({message})")


def required() -> Any:
    """The module h5py.

    Raises:
        ImportError: it is not installed, with how to install it.
    """
    if h5py is None:
        raise ImportError("HDF5 files of Keras are read with h5py: pip install 'torch_adadelta[keras]', or h5py alone")
    return h5py


class Hdf5:
    """An HDF5 file, or the bytes of one.

    Args:
        file: an open binary file.
        size: its size in bytes.
    """

    def __init__(self, file: Any, size: int) -> None:
        self._source = file
        self._file = required().File(file, "r")
        self._size = size

    @classmethod
    def sandboxed(cls, path: Path | None, data: bytes | None = None) -> "Hdf5":
        """Opens what `read_in_sandbox` could read.

        Args:
            path: the file, or None for `data`.
            data: the contents of the file.
        """
        read_in_sandbox(path, data)
        source: Any = BytesIO(data or b"") if path is None else path.open("rb")
        try:
            return cls(source, len(data or b"") if path is None else path.stat().st_size)
        except BaseException:
            source.close()
            raise

    def close(self) -> None:
        """Closes the file; arrays that were not read cannot be read any more."""
        self._file.close()
        self._source.close()

    def _children(self, group: Any) -> dict[str, Any]:
        found = {}
        for name in group:
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise KerasFileError(f"{group.name}/{name} is a link to elsewhere, which Keras does not write")
            found[name] = group[name]
        return found

    def get(self, path: str) -> Any:
        """The group or dataset at a path, or None."""
        found = self._file
        for part in path.split("/"):
            if not isinstance(found, h5py.Group) or part in ("", ".", "..") or part not in found:
                return None
            if not isinstance(found.get(part, getlink=True), h5py.HardLink):
                raise KerasFileError(f"{found.name}/{part} is a link to elsewhere, which Keras does not write")
            found = found[part]
        return found

    def has(self, path: str) -> bool:
        """Whether there is a group or dataset at the path."""
        return self.get(path) is not None

    def datasets(self, path: str = "") -> Iterator[tuple[str, Any]]:
        """The datasets below a group, with their paths from there.

        Raises:
            KerasFileError: the groups are nested as no model is.
        """
        top = self.get(path) if path else self._file
        todo = [("", top, 0)] if isinstance(top, h5py.Group) else []
        count = 0
        while todo:
            prefix, group, depth = todo.pop()
            for name, child in self._children(group).items():
                count += 1
                if depth >= _MAX_DEPTH or count > _MAX_OBJECTS:
                    raise KerasFileError(f"its groups are nested {depth} deep and hold {count} objects; it is no model")
                if isinstance(child, h5py.Group):
                    todo.append((f"{prefix}{name}/", child, depth + 1))
                elif isinstance(child, h5py.Dataset):
                    yield prefix + name, child

    def stored(self, path: str) -> LazyArray:
        """The dataset at a path, to be read later. bfloat16 becomes float32.

        Raises:
            KerasFileError: there is none, or it is not one of numbers in this file.
        """
        dataset = self.get(path)
        if not isinstance(dataset, h5py.Dataset):
            raise KerasFileError(f"it holds no dataset {path}")
        return self.of_dataset(path, dataset)

    def of_dataset(self, path: str, dataset: Any) -> LazyArray:
        """The same of a dataset that `datasets` gave."""
        plan = dataset.id.get_create_plist()
        if plan.get_external_count() or plan.get_layout() == h5py.h5d.VIRTUAL:
            raise KerasFileError(f"{path} is stored in another file, which Keras does not do")
        if plan.get_layout() == h5py.h5d.CHUNKED:
            raise KerasFileError(
                f"{path} is stored in chunks, perhaps compressed, which Keras does not do; "
                "h5repack -l CONTI -f NONE writes it in one piece"
            )
        shape = dataset.shape
        if shape is None:
            raise KerasFileError(f"{path} holds nothing")
        is_bfloat16 = self.attribute_text(dataset, "dtype") == "bfloat16"
        if dataset.dtype.kind not in "fiub" and not (is_bfloat16 and dataset.dtype.itemsize == 2):
            raise KerasFileError(f"{path} has dtype {dataset.dtype}, not one of numbers")
        # A compact dataset lies in the header of the object, and counts as stored; so does an empty one.
        checked_shape(path, shape, dataset.dtype.itemsize, dataset.id.get_storage_size(), self._size)
        return LazyArray(
            path,
            tuple(shape),
            np.dtype("<f4") if is_bfloat16 else dataset.dtype,
            partial(_read, dataset, is_bfloat16),
        )

    def _attribute(self, item: Any, name: str) -> Any:
        if not item.attrs.__contains__(name):
            return None
        attribute = item.attrs.get_id(name)
        size = attribute.dtype.itemsize
        for length in attribute.shape or ():
            size *= length
        # A text of variable length takes a descriptor here, and what it holds lies in the file.
        if size > MAX_EXPANSION * self._size:
            raise KerasFileError(f"the attribute {name} has {size} bytes, and the file {self._size}")
        return item.attrs[name]

    def attribute_text(self, item: Any, name: str) -> str | None:
        """An attribute that is a text, or None if there is none."""
        value = self._attribute(item, name)
        return None if value is None else _decoded(name, value)

    def root_text(self, name: str) -> str | None:
        """The same of the file itself."""
        return self.attribute_text(self._file, name)

    def attribute_list(self, path: str, name: str) -> list[str] | None:
        """An attribute that is a list of texts, or None; Keras splits a long one over ``name0``, ``name1``, …"""
        item = self.get(path) if path else self._file
        if item is None:
            return None
        if item.attrs.__contains__(name):
            parts = [self._attribute(item, name)]
        else:
            parts = []
            while item.attrs.__contains__(f"{name}{len(parts)}"):
                parts.append(self._attribute(item, f"{name}{len(parts)}"))
            if not parts:
                return None
        found: list[str] = []
        for part in parts:
            if not isinstance(part, np.ndarray) or part.ndim != 1:
                if isinstance(part, np.ndarray | h5py.Empty):
                    raise KerasFileError(f"the attribute {name} is no list of names")
                part = [part]
            found += [_decoded(name, value) for value in part] if len(part) else []
        return found


def set_text(item: Any, name: str, text: str) -> None:
    """Sets an attribute to a text, in the form that it has: what h5py 2 wrote as bytes it has to read as bytes."""
    form = h5py.check_string_dtype(item.attrs.get_id(name).dtype)
    encoding = "utf-8" if form is None else form.encoding
    data = text.encode()
    length = len(data) if form is not None and form.length is not None else None
    item.attrs.create(name, data, dtype=h5py.string_dtype(encoding, length))


def _decoded(name: str, value: Any) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise KerasFileError(f"the attribute {name} is no UTF-8") from error
    if not isinstance(value, str):
        raise KerasFileError(f"the attribute {name} is no text but {type(value).__name__}")
    return value


def _read(dataset: Any, is_bfloat16: bool) -> Array:
    array: Array = np.asarray(dataset[()])
    if is_bfloat16:
        return (array.view("<u2").astype("<u4") << 16).view("<f4")
    return array
