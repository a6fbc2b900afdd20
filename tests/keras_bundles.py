"""A writer of TensorFlow checkpoints, right or wrong in one thing, for the tests of `torch_adadelta.keras`."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from torch_adadelta.keras.tf_checkpoint import OBJECT_GRAPH, Bundle, crc32c


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def message(*fields: tuple[int, int | bytes]) -> bytes:
    """A protocol buffer."""
    return b"".join(
        varint(number << 3) + varint(value)
        if isinstance(value, int)
        else varint(number << 3 | 2) + varint(len(value)) + value
        for number, value in fields
    )


def masked(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def block(entries: list[tuple[bytes, bytes]], compression: int = 0, restarts: int = 1) -> bytes:
    """Entries of a table, each key without what it shares with the one before, and the trailer."""
    found, last = b"", b""
    for key, value in entries:
        shared = next((n for n, (a, b) in enumerate(zip(key, last, strict=False)) if a != b), min(len(key), len(last)))
        found += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    found += struct.pack("<I", 0) * min(restarts, 1) + struct.pack("<I", restarts)
    return found + bytes([compression]) + struct.pack("<I", masked(found + bytes([compression])))


def table(*blocks: bytes, handles: list[int] | None = None, magic: int = 0xDB4775248B80FB57) -> bytes:
    """An index of blocks, with a footer."""
    starts = [sum(map(len, blocks[:number])) for number in range(len(blocks))]
    spots = [(starts[n], len(blocks[n]) - 5) for n in (range(len(blocks)) if handles is None else handles)]
    index = block([(bytes([n]), varint(start) + varint(size)) for n, (start, size) in enumerate(spots)])
    data = b"".join(blocks)
    footer = varint(0) * 2 + varint(len(data)) + varint(len(index) - 5)
    return data + index + footer.ljust(40, b"\0") + struct.pack("<Q", magic)


def entry(dtype: int, shape: tuple[int, ...], at: int, data: bytes, **changed: int | bytes) -> bytes:
    """What the index says of a tensor; some of it otherwise, or more (`extra`)."""
    sizes = message(*[(2, message((1, size))) for size in shape])
    fields: dict[str, Any] = {"dtype": dtype, "shape": sizes, "shard": 0, "offset": at, "size": len(data)}
    fields |= {"crc": struct.pack("<I", masked(data))} | changed
    numbers = {"dtype": 1, "shape": 2, "shard": 3, "offset": 4, "size": 5}
    plain = message(*[(number, fields[name]) for name, number in numbers.items()])
    crc = varint(6 << 3 | 5) + fields["crc"] if fields["crc"] else b""
    return plain + crc + fields.get("extra", b"")


HEADER: Final = message((1, 1))


def written(folder: Path, entries: dict[str, bytes], data: bytes = b"", header: bytes = HEADER) -> Bundle:
    rows = [(b"", header), *((name.encode(), value) for name, value in sorted(entries.items()))]
    half = len(rows) // 2
    (folder / "c.index").write_bytes(table(block(rows[:half]), block(rows[half:])))
    (folder / "c.data-00000-of-00001").write_bytes(data)
    return Bundle(folder / "c")


def node(*children: tuple[str, int], variable: tuple[str, str] | None = None, slots: Any = ()) -> tuple[int, bytes]:
    fields = [(1, message((1, number), (2, name.encode()))) for name, number in children]
    if variable is not None:
        fields.append((2, message((1, b"OTHER"), (2, b"no"), (3, b"no"))))
        fields.append((2, message((1, b"VARIABLE_VALUE"), (2, variable[0].encode()), (3, variable[1].encode()))))
    fields += [(3, message((1, of), (2, name.encode()), (3, slot))) for of, name, slot in slots]
    return 1, message(*fields)


Edit = Callable[[bytes], bytes]


def graph(
    folder: Path,
    *nodes: tuple[int, bytes],
    length: int | None = None,
    edit: Edit = bytes,
    dtype: int = 7,
    shape: tuple[int, ...] = (),
    tensors: dict[str, np.ndarray] | None = None,
    **options: Any,
) -> Bundle:
    """A checkpoint of these objects, and of tensors by their keys."""
    text = message(*nodes)
    size = len(text) if length is None else length
    width = struct.pack("<I", size)
    data = varint(size) + struct.pack("<I", masked(width)) + text
    crc = struct.pack("<I", masked(width + struct.pack("<I", masked(width)) + text))
    options = {"crc": crc, **options}
    data = edit(data)
    entries = {OBJECT_GRAPH: entry(dtype, shape, 0, data, **options)}
    for name, array in (tensors or {}).items():
        number = {"f": 1, "i": 9}[array.dtype.kind]
        entries[name] = entry(number, array.shape, len(data), array.tobytes())
        data += array.tobytes()
    return written(folder, entries, data)
