"""Reads all metadata of an HDF5 file in a process of its own, and exits with 0 if that ends well.

The library HDF5 was not written for files that somebody made to hurt, and some damage makes it loop for ever or crash.
That is better found out here. `hdf5.py` runs this file as a script, with a limit on its time; it imports h5py alone.
"""

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

MEMORY = 8 << 30
OBJECTS = 1_000_000


def visit(file: Any, h5py: Any) -> None:
    """Looks at every object that hard links lead to: its attributes, and what is stored, but not the numbers."""
    seen = set()
    todo = [file]
    while todo:
        item = todo.pop()
        address = h5py.h5o.get_info(item.id).addr
        if address in seen:
            continue
        seen.add(address)
        if len(seen) > OBJECTS:
            raise ValueError(f"it holds more than {OBJECTS} objects")
        for name in item.attrs:
            _ = item.attrs[name]
        if isinstance(item, h5py.Dataset):
            plan = item.id.get_create_plist()
            _ = (item.shape, item.dtype, plan.get_layout(), plan.get_external_count(), item.id.get_storage_size())
        elif isinstance(item, h5py.Group):
            for name in item:
                if isinstance(item.get(name, getlink=True), h5py.HardLink):
                    todo.append(item[name])


def main(path: str, seconds: int) -> None:
    """Visits the file at a path, or the one that stdin holds if that is empty, in so many seconds of processor time."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import h5py

    data = None if path else io.BytesIO(sys.stdin.buffer.read())
    with data or Path(path).open("rb") as source, h5py.File(source, "r") as file:
        visit(file, h5py)


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[3]))
    except BaseException as error:
        sys.exit(f"{type(error).__name__}: {error}")
