"""Reads the checkpoints of TensorFlow (``NAME.index`` and ``NAME.data-00000-of-00001``), without TensorFlow.

The index is a sorted string table in the format of LevelDB, whose values are small protocol buffers; the data files
hold the tensors one after the other. Every length and offset is checked before it is used, and every block and tensor
against its CRC-32C.

Sources: ``tensorflow/core/util/tensor_bundle/tensor_bundle.h``, ``tensorflow/core/protobuf/tensor_bundle.proto``,
``tensorflow/core/protobuf/trackable_object_graph.proto``, and ``doc/table_format.md`` of LevelDB.
"""

import mmap
import re
import struct
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from torch_adadelta.keras.errors import Array, KerasFileError, LazyArray, checked_shape

_MAGIC: Final = 0xDB4775248B80FB57
_FOOTER: Final = 48
_MAX_INDEX: Final = 1 << 30

OBJECT_GRAPH: Final = "_CHECKPOINTABLE_OBJECT_GRAPH"

# DataType of types.proto. bfloat16 is read as its bits.
_BFLOAT16, _STRING = 14, 7
_DTYPES: Final[dict[int, np.dtype[Any]]] = {
    1: np.dtype("<f4"),
    2: np.dtype("<f8"),
    3: np.dtype("<i4"),
    4: np.dtype("u1"),
    5: np.dtype("<i2"),
    6: np.dtype("i1"),
    9: np.dtype("<i8"),
    10: np.dtype("?"),
    _BFLOAT16: np.dtype("<u2"),
    17: np.dtype("<u2"),
    19: np.dtype("<f2"),
    22: np.dtype("<u4"),
    23: np.dtype("<u8"),
}

# ---- CRC-32C --------------------------------------------------------------------------------------------------------

_ROW: Final = 1024


@cache
def _crc_table() -> Array:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1).astype(np.uint32)
    return table


@cache
def _shift_tables() -> list[list[int]]:
    """What a checksum becomes behind `_ROW` zero bytes, a linear function: a table for each of its four bytes."""
    table = _crc_table()
    crc = np.arange(256, dtype=np.uint32)[None, :] << np.array([[0], [8], [16], [24]], dtype=np.uint32)
    for _ in range(_ROW):
        crc = (crc >> 8) ^ table[crc & 0xFF]
    return [[int(entry) for entry in row] for row in crc]


def crc32c(data: Any) -> int:
    """The CRC-32C of bytes. Rows of 1024 bytes are done side by side, for Python takes a byte at a time."""
    table = _crc_table()
    view = np.frombuffer(data, dtype=np.uint8)
    crc = 0xFFFFFFFF
    rows = view[: len(view) // _ROW * _ROW].reshape(-1, _ROW)
    if len(rows):
        own = np.zeros(len(rows), dtype=np.uint32)
        for column in np.ascontiguousarray(rows.T):
            own = (own >> 8) ^ table[(own ^ column) & 0xFF]
        first, second, third, fourth = _shift_tables()
        for value in own.tolist():
            crc = first[crc & 255] ^ second[crc >> 8 & 255] ^ third[crc >> 16 & 255] ^ fourth[crc >> 24] ^ value
    entries = table.tolist()
    for byte in view[rows.size :].tolist():
        crc = (crc >> 8) ^ entries[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _masked_crc(data: Any) -> int:
    """As TensorFlow and LevelDB store it."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# ---- Protocol buffers -----------------------------------------------------------------------------------------------


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise KerasFileError("a number is cut off")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a message: their numbers, with an int or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        value: Any
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value = int.from_bytes(data[at : at + size], "little")
            at += size
        elif kind == 2:
            size, at = _varint(data, at)
            value = data[at : at + size]
            at += size
        else:
            raise KerasFileError(f"a protocol buffer has a field of kind {kind}")
        if at > len(data):
            raise KerasFileError("a protocol buffer is cut off")
        yield key >> 3, value


def _message(data: Any, repeated: tuple[int, ...] = ()) -> dict[int, Any]:
    """The fields by their numbers; those that may repeat as lists."""
    if not isinstance(data, bytes):
        raise KerasFileError("a protocol buffer has a number where there should be a message")
    found: dict[int, Any] = {number: [] for number in repeated}
    for number, value in _fields(data):
        if number in repeated:
            found[number].append(value)
        else:
            found[number] = value
    return found


def _text(value: Any) -> str:
    if not isinstance(value, bytes):
        raise KerasFileError("a protocol buffer has a number where there should be a text")
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise KerasFileError(f"a name is no UTF-8: {value[:40]!r}") from error


def _integer(value: Any) -> int:
    if not isinstance(value, int):
        raise KerasFileError("a protocol buffer has a text where there should be a number")
    return _signed(value)


# ---- The index ------------------------------------------------------------------------------------------------------


def _handle(data: bytes, at: int) -> tuple[int, int, int]:
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return offset, size, at


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of one block."""
    if offset + size + 5 > len(data):
        raise KerasFileError("the index ends before one of its blocks does")
    block, trailer = data[offset : offset + size], data[offset + size : offset + size + 5]
    if _masked_crc(block + trailer[:1]) != int.from_bytes(trailer[1:], "little"):
        raise KerasFileError("a block of the index does not have its checksum")
    if trailer[0] != 0:
        raise KerasFileError("a block of the index is compressed, which TensorFlow does not do")
    if size < 4:
        raise KerasFileError("a block of the index is too short")
    restarts = int.from_bytes(block[-4:], "little")
    end = size - 4 - 4 * restarts
    if end < 0:
        raise KerasFileError("a block of the index has more restarts than room")
    at, key = 0, b""
    while at < end:
        shared, at = _varint(block, at)
        unshared, at = _varint(block, at)
        length, at = _varint(block, at)
        if shared > len(key) or at + unshared + length > end:
            raise KerasFileError("an entry of the index is cut off")
        key = key[:shared] + block[at : at + unshared]
        at += unshared
        yield key, block[at : at + length]
        at += length


def _table(data: bytes) -> dict[bytes, bytes]:
    if len(data) < _FOOTER or struct.unpack("<Q", data[-8:])[0] != _MAGIC:
        raise KerasFileError("it is no index of a TensorFlow checkpoint, or cut off")
    footer = data[-_FOOTER:]
    _, _, at = _handle(footer, 0)
    offset, size, _ = _handle(footer, at)
    entries: dict[bytes, bytes] = {}
    seen: set[int] = set()
    for _, handle in _block(data, offset, size):
        block_offset, block_size, _ = _handle(handle, 0)
        if block_offset in seen:
            raise KerasFileError("the index has a block twice")
        seen.add(block_offset)
        for key, value in _block(data, block_offset, block_size):
            if key in entries:
                raise KerasFileError(f"the index has {key[:60]!r} twice")
            entries[key] = value
    return entries


# ---- Tensors --------------------------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int | None


def _entry(name: str, data: bytes) -> _Entry:
    message = _message(data, repeated=(7,))
    if message[7]:
        raise KerasFileError(f"{name} is stored in slices, as a partitioned variable is; save it unpartitioned")
    shape = _message(message.get(2, b""), repeated=(2,))
    sizes = tuple(_integer(_message(dim).get(1, 0)) for dim in shape[2])
    numbers = (_integer(message.get(number, 0)) for number in (1, 3, 4, 5))
    dtype, shard, offset, size = numbers
    return _Entry(dtype, sizes, shard, offset, size, message.get(6))


class Node(NamedTuple):
    """An object of the saved graph: a layer, an optimizer or a variable."""

    children: list[tuple[str, int]]  # by the name of the attribute
    full_name: str | None  # of a variable
    key: str | None  # of its value in the checkpoint
    slots: list[tuple[int, str, int]]  # of an optimizer: the variable, the name of the slot, the slot


class Bundle:
    """A checkpoint of TensorFlow by its prefix, such as ``run/ckpt-7`` for ``run/ckpt-7.index``."""

    def __init__(self, prefix: Path) -> None:
        index = prefix.with_name(prefix.name + ".index")
        if index.stat().st_size > _MAX_INDEX:
            raise KerasFileError(f"the index has {index.stat().st_size} bytes")
        entries = _table(index.read_bytes())
        header = _message(entries.pop(b"", b""))
        self._shards = _integer(header.get(1, 1))
        if _integer(header.get(2, 0)) != 0:
            raise KerasFileError("it was written on a big-endian machine")
        if not 1 <= self._shards <= 100_000:
            raise KerasFileError(f"it has {self._shards} data files")
        self._prefix = prefix
        self._maps: dict[int, Any] = {}
        self._entries = {_text(key): _entry(_text(key), value) for key, value in entries.items()}

    def close(self) -> None:
        """Lets go of the data files."""
        self._maps.clear()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def _data(self, shard: int) -> Any:
        if not 0 <= shard < self._shards:
            raise KerasFileError(f"a tensor is in data file {shard} of {self._shards}")
        if shard not in self._maps:
            name = f"{self._prefix.name}.data-{shard:05d}-of-{self._shards:05d}"
            path = self._prefix.with_name(name)
            if not path.is_file():
                raise KerasFileError(f"its data file {name} is missing; it belongs beside the index")
            with path.open("rb") as file:
                is_empty = path.stat().st_size == 0
                self._maps[shard] = b"" if is_empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[shard]

    def _bytes(self, name: str, entry: _Entry) -> bytes:
        data = self._data(entry.shard)
        if entry.offset < 0 or entry.size < 0 or entry.offset + entry.size > len(data):
            raise KerasFileError(f"{name} lies beyond the end of its data file; the file is cut off")
        found = bytes(data[entry.offset : entry.offset + entry.size])
        if entry.dtype != _STRING and entry.crc is not None and _masked_crc(found) != entry.crc:
            raise KerasFileError(f"{name} does not have its checksum; the file is damaged")
        return found

    def stored(self, name: str) -> LazyArray:
        """A tensor of numbers, to be read later. bfloat16 becomes float32.

        Raises:
            KerasFileError: there is none of this name, or it is no tensor of numbers.
        """
        if name not in self._entries:
            raise KerasFileError(f"it holds no {name}")
        entry = self._entries[name]
        if entry.dtype not in _DTYPES:
            raise KerasFileError(f"{name} is a tensor of kind {entry.dtype}, not of numbers")
        dtype = _DTYPES[entry.dtype]
        data_size = len(self._data(entry.shard))
        if checked_shape(name, entry.shape, dtype.itemsize, entry.size, data_size) != entry.size:
            raise KerasFileError(f"{name} has shape {entry.shape} and {entry.size} bytes, which do not fit each other")
        is_bfloat16 = entry.dtype == _BFLOAT16
        return LazyArray(
            name,
            entry.shape,
            np.dtype("<f4") if is_bfloat16 else dtype,
            partial(self._read, name, entry, dtype, is_bfloat16),
        )

    def _read(self, name: str, entry: _Entry, dtype: np.dtype[Any], is_bfloat16: bool) -> Array:
        array = np.frombuffer(self._bytes(name, entry), dtype).reshape(entry.shape)
        if is_bfloat16:
            return (array.astype("<u4") << 16).view("<f4")
        return array

    def object_graph(self) -> list[Node]:
        """The objects that were saved; the first is the root.

        Raises:
            KerasFileError: there is no such graph, for it is a checkpoint of TensorFlow 1.
        """
        if OBJECT_GRAPH not in self._entries:
            raise KerasFileError(
                "it holds no graph of objects, for it is a checkpoint of TensorFlow 1; save it with "
                "tf.train.Checkpoint(model=model, optimizer=optimizer)"
            )
        entry = self._entries[OBJECT_GRAPH]
        if entry.dtype != _STRING or entry.shape != ():
            raise KerasFileError("its graph of objects is no text")
        data = self._bytes(OBJECT_GRAPH, entry)
        length, at = _varint(data, 0)
        checksum, text = data[at : at + 4], data[at + 4 :]
        if len(checksum) < 4 or length != len(text):
            raise KerasFileError("its graph of objects is cut off")
        crc = crc32c(struct.pack("<I" if length < 2**32 else "<Q", length))
        if ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF != int.from_bytes(checksum, "little"):
            raise KerasFileError("the length of its graph of objects does not have its checksum")
        if entry.crc is not None and _string_crc(length, checksum, text) != entry.crc:
            raise KerasFileError("its graph of objects does not have its checksum")
        nodes = [_node(node) for node in _message(text, repeated=(1,))[1]]
        for node in nodes:
            ids = [number for _, number in node.children]
            ids += [number for variable, _, slot in node.slots for number in (variable, slot)]
            if any(not 0 <= number < len(nodes) for number in ids):
                raise KerasFileError("its graph of objects refers to objects that are not there")
        if not nodes:
            raise KerasFileError("its graph of objects is empty")
        return nodes


def _string_crc(length: int, checksum: bytes, text: bytes) -> int:
    return _masked_crc(struct.pack("<I" if length < 2**32 else "<Q", length) + checksum + text)


def _node(data: Any) -> Node:
    message = _message(data, repeated=(1, 2, 3))
    children = [_message(child) for child in message[1]]
    attributes = [_message(attribute) for attribute in message[2]]
    slots = [_message(slot) for slot in message[3]]
    values = [a for a in attributes if _text(a.get(1, b"")) == "VARIABLE_VALUE"]
    return Node(
        [(_text(child.get(2, b"")), _integer(child.get(1, 0))) for child in children],
        _text(values[0].get(2, b"")) if values else None,
        _text(values[0].get(3, b"")) if values else None,
        [(_integer(s.get(1, 0)), _text(s.get(2, b"")), _integer(s.get(3, 0))) for s in slots],
    )


def find_prefix(path: Path) -> Path | None:
    """The prefix of the checkpoint that a path means: a prefix, its index, a directory of checkpoints, a SavedModel."""
    if path.is_dir():
        if (path / "variables" / "variables.index").is_file():
            return path / "variables" / "variables"
        listing = path / "checkpoint"
        if not listing.is_file() or listing.stat().st_size > 1 << 20:
            return None
        match = re.search(rb'^model_checkpoint_path: "([^"\n]+)"', listing.read_bytes(), re.MULTILINE)
        name = match[1].decode(errors="replace").rpartition("/")[2] if match else ""
        path = path / name
    if path.suffix == ".index" and path.is_file():
        return path.with_suffix("")
    return path if path.with_name(path.name + ".index").is_file() else None
