"""Checkpoints of TensorFlow: those that it wrote, and such as are written here, right in all but one thing."""

import struct
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from keras_bundles import HEADER, block, entry, graph, masked, message, node, table, varint, written

from torch_adadelta.keras import KerasFileError, tf_checkpoint
from torch_adadelta.keras.tf_checkpoint import Bundle, Node, crc32c, find_prefix

DATA: Final = Path(__file__).resolve().parents[1] / "data" / "keras"

# ---- Tensors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "number"),
    [("<f4", 1), ("<f8", 2), ("<i4", 3), ("u1", 4), ("<i2", 5), ("i1", 6), ("<i8", 9), ("?", 10), ("<u2", 17),
     ("<f2", 19), ("<u4", 22), ("<u8", 23)],
)  # fmt: skip
def test_numbers_are_read_as_they_are(dtype: str, number: int, tmp_path: Path) -> None:
    array = np.array([[0, 1, 2], [1, 0, 100]]).astype(dtype)
    one = np.array(1).astype(dtype)
    data = array.tobytes() + one.tobytes()
    names = {"x/a": entry(number, (2, 3), 0, array.tobytes()), "x/b": entry(number, (), array.nbytes, one.tobytes())}
    found = written(tmp_path, names, data)
    assert list(found) == ["x/a", "x/b"]
    for name, expected in (("x/a", array), ("x/b", one)):
        stored = found.stored(name)
        assert (stored.name, stored.shape, stored.dtype) == (name, expected.shape, expected.dtype)
        np.testing.assert_array_equal(stored.read(), expected, strict=True)


def test_bfloat16_becomes_float32(tmp_path: Path) -> None:
    data = struct.pack("<3H", 0x3F80, 0xC000, 0x0001)
    stored = written(tmp_path, {"x": entry(14, (3, 1), 0, data)}, data).stored("x")
    assert stored.dtype == np.dtype("<f4")
    np.testing.assert_array_equal(stored.read(), np.array([[1.0], [-2.0], [2.0**-133]], "f4"), strict=True)


def test_tensors_in_several_data_files(tmp_path: Path) -> None:
    values = [np.float32(1.5).tobytes(), np.float32(2.5).tobytes()]
    entries = {f"x{n}": entry(1, (), 0, value, shard=n) for n, value in enumerate(values)}
    found = written(tmp_path, entries, header=message((1, 2)))
    for number, value in enumerate(values):
        with pytest.raises(KerasFileError, match=rf"its data file c\.data-0000{number}-of-00002 is missing"):
            found.stored(f"x{number}")
        (tmp_path / f"c.data-0000{number}-of-00002").write_bytes(value)
    assert [float(found.stored(name).read()) for name in found] == [1.5, 2.5]
    found.close()


FOUR: Final = np.arange(4, dtype="<f4").tobytes()


def changed(message: str, dtype: int = 1, shape: tuple[int, ...] = (4,), **fields: Any) -> tuple[bytes, str]:
    return entry(dtype, shape, 0, FOUR, **fields), message


@pytest.mark.parametrize(
    ("value", "message"),
    [
        changed("x is a tensor of kind 7, not of numbers", dtype=7),
        changed("x is a tensor of kind 8, not of", dtype=8),
        changed("12 bytes, which do not fit", size=12),
        changed(r"shape \(3,\) and 16 bytes, which do not fit", shape=(3,)),
        changed("20 bytes, for which the file of 16 bytes holds 20|do not fit each other", shape=(5,)),
        changed("for which the file of 16 bytes holds 17", size=17, shape=(17,), dtype=4),
        changed("which no weight has", shape=(-1,)),
        changed("exhaust the memory", shape=(2**40,)),
        changed("a tensor is in data file 1 of 1", shard=1),
        changed("a tensor is in data file -1 of 1", shard=-1),
        changed("lies beyond the end of its data file", offset=4),
        changed("lies beyond the end", offset=-4),
        changed("x does not have its checksum", crc=b"\1\2\3\4"),
        changed("x is stored in slices", extra=message((7, message((1, b""))))),
        changed("a number where there should be a message", extra=message((2, 3))),
        changed("a text where there should be a number", extra=message((4, b"a"))),
        changed("a protocol buffer is cut off", extra=varint(5 << 3 | 2) + varint(9)),
        changed("a protocol buffer has a field of kind 3", extra=varint(8 << 3 | 3)),
        changed("a number is cut off", extra=b"\x80"),
        changed("a number is cut off|field of kind", extra=b"\xff" * 12),
    ],
    ids=range(20),
)
def test_a_tensor_that_is_not_what_the_index_says_is_refused(value: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(KerasFileError, match=message):
        written(tmp_path, {"x": value}, FOUR).stored("x").read()


def test_a_tensor_without_a_checksum_or_a_file_without_bytes(tmp_path: Path) -> None:
    found = written(
        tmp_path,
        {
            "w": entry(1, (4,), 0, FOUR, extra=message((9, 1))),
            "x": entry(1, (4,), 0, FOUR, crc=b""),
            "y": entry(1, (0, 3), 0, b""),
        },
        FOUR,
    )
    assert found.stored("w").read().tolist() == [0, 1, 2, 3]
    assert found.stored("x").read().tolist() == [0, 1, 2, 3]
    assert found.stored("y").read().shape == (0, 3)
    with pytest.raises(KerasFileError, match="it holds no z"):
        found.stored("z")
    assert written(tmp_path, {"y": entry(1, (0, 3), 0, b"")}).stored("y").read().shape == (0, 3)


# ---- The index ------------------------------------------------------------------------------------------------------

ROWS: Final = [(b"", HEADER), (b"x", entry(1, (4,), 0, FOUR))]
GOOD: Final = block(ROWS)


def without_checksum(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def sealed(content: bytes) -> bytes:
    """A block of these bytes, whatever they are."""
    return content + b"\0" + struct.pack("<I", masked(content + b"\0"))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"short", "it is no index of a TensorFlow checkpoint, or cut off"),
        (table(GOOD, magic=1), "it is no index"),
        (table(without_checksum(GOOD)), "a block of the index does not have its checksum"),
        (table(block(ROWS, compression=1)), "a block of the index is compressed"),
        (table(block(ROWS, restarts=1000)), "more restarts than room"),
        (table(sealed(b"abc")), "a block of the index is too short"),
        (
            table(sealed(varint(1) + varint(1) + varint(0) + b"k" + struct.pack("<II", 0, 1))),
            "an entry of the index is cut off",
        ),
        (table(sealed(varint(0) + varint(1) + varint(9) + b"k" + bytes(8))), "an entry of the index is cut off"),
        (table(GOOD, handles=[0, 0]), "the index has a block twice"),
        (table(GOOD, block(ROWS[1:])), r"the index has b'x' twice"),
        (table(block([(b"", message((1, 1), (2, 1))), ROWS[1]])), "big-endian"),
        (table(block([(b"", message((1, 0)))])), "it has 0 data files"),
        (table(block([(b"", message((1, 100_001)))])), "it has 100001 data files"),
        (table(block([*ROWS, (b"\xff", ROWS[1][1])])), "a name is no UTF-8"),
        (
            table(GOOD)[:-48] + (varint(0) * 2 + varint(900) + varint(9)).ljust(40, b"\0") + table(GOOD)[-8:],
            "ends before",
        ),
    ],
    ids=range(15),
)
def test_an_index_that_is_none_is_refused(index: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.index").write_bytes(index)
    with pytest.raises(KerasFileError, match=message):
        Bundle(tmp_path / "c")


def test_an_index_without_a_header_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.index").write_bytes(table(block(ROWS[1:]), sealed(bytes(4))))  # the last block is empty
    assert list(Bundle(tmp_path / "c")) == ["x"]
    monkeypatch.setattr(tf_checkpoint, "_MAX_INDEX", 10)
    with pytest.raises(KerasFileError, match=r"the index has 1\d\d bytes"):
        Bundle(tmp_path / "c")


# ---- The graph of objects -------------------------------------------------------------------------------------------


def test_a_graph_of_objects(tmp_path: Path) -> None:
    variable = node(variable=("dense/kernel", "model/kernel/.ATTRIBUTES/VARIABLE_VALUE"))
    optimizer = node(("iter", 1), slots=[(1, "accum_grad", 3), (1, "accum_var", 1)])
    assert graph(tmp_path, node(("model", 1), ("opt", 2)), variable, optimizer, node()).object_graph() == [
        Node([("model", 1), ("opt", 2)], None, None, []),
        Node([], "dense/kernel", "model/kernel/.ATTRIBUTES/VARIABLE_VALUE", []),
        Node([("iter", 1)], None, None, [(1, "accum_grad", 3), (1, "accum_var", 1)]),
        Node([], None, None, []),
    ]


@pytest.mark.parametrize(
    ("nodes", "options", "message"),
    [
        ([node(("a", 1))], {}, "refers to objects that are not there"),
        ([node(("a", -1))], {}, "refers to objects that are not there"),
        ([node(slots=[(1, "accum_grad", 0)])], {}, "refers to objects that are not there"),
        ([node(slots=[(0, "accum_grad", 1)])], {}, "refers to objects that are not there"),
        ([], {}, "its graph of objects is empty"),
        ([node()], {"length": 9}, "its graph of objects is cut off"),
        ([node()], {"edit": lambda data: data[:3]}, "its graph of objects is cut off"),
        ([node()], {"edit": lambda data: data[:1] + b"\0" + data[2:]}, "the length of .* does not have its checksum"),
        ([node(("a", 0))], {"crc": b"\1\2\3\4"}, "its graph of objects does not have its checksum"),
        ([node()], {"dtype": 1}, "its graph of objects is no text"),
        ([node()], {"shape": (1,)}, "its graph of objects is no text"),
        ([(1, message((1, message((1, b"a")))))], {}, "a text where there should be a number"),
        ([(1, message((1, message((2, 3)))))], {}, "a number where there should be a text"),
    ],
    ids=range(13),
)
def test_a_graph_that_is_none_is_refused(nodes: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(KerasFileError, match=message):
        graph(tmp_path, *nodes, **options).object_graph()


def test_a_checkpoint_of_tensorflow_1_has_none(tmp_path: Path) -> None:
    with pytest.raises(KerasFileError, match="it is a checkpoint of TensorFlow 1"):
        written(tmp_path, {"x": entry(1, (4,), 0, FOUR)}, FOUR).object_graph()


def test_those_of_tensorflow_are_read() -> None:
    for generation in ("tf24", "legacy", "new"):
        found = Bundle(DATA / f"{generation}_tfck" / "w")
        nodes = found.object_graph()
        named = {node.full_name: node.key for node in nodes if node.key is not None}
        kernel = next(key for name, key in named.items() if name is not None and name.endswith("d1/kernel"))
        assert found.stored(kernel).read().shape == (3, 2)


# ---- Paths ----------------------------------------------------------------------------------------------------------


def test_which_checkpoint_a_path_means(tmp_path: Path) -> None:
    for name in ("c-1.index", "c-2.index", "saved/variables/variables.index", "outside.index", "w.01.index", "m.index"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_prefix(tmp_path / "c-1") == find_prefix(tmp_path / "c-1.index") == tmp_path / "c-1"
    assert find_prefix(tmp_path / "w.01") == find_prefix(tmp_path / "w.01.index") == tmp_path / "w.01"
    assert find_prefix(tmp_path / "m.h5") is None
    assert find_prefix(tmp_path / "saved") == tmp_path / "saved/variables/variables"
    for missing in ("c-3", "c-3.index", "nothing", "."):
        assert find_prefix(tmp_path / missing) is None
    listing = tmp_path / "checkpoint"
    all_paths = 'all_model_checkpoint_paths: "c-1"\n'
    for text, expected in (
        ('model_checkpoint_path: "c-2"\n' + all_paths, "c-2"),
        (all_paths + 'model_checkpoint_path: "/elsewhere/c-2"\n', "c-2"),
        (all_paths, None),
        ("", None),
        ('model_checkpoint_path: "c-2"\n' + " " * (1 << 20), None),
    ):
        listing.write_text(text)
        assert find_prefix(tmp_path) == (None if expected is None else tmp_path / expected)
    listing.write_bytes(b'model_checkpoint_path: "\xff"\n')
    assert find_prefix(tmp_path) is None
    # A listing does not lead out of its directory.
    (tmp_path / "saved" / "checkpoint").write_text('model_checkpoint_path: "../outside"\n')
    (tmp_path / "saved" / "variables" / "variables.index").unlink()
    assert find_prefix(tmp_path / "saved") is None


@pytest.mark.parametrize("length", [0, 9, 1023, 1024, 1025, 5000])
def test_the_checksum_is_that_of_castagnoli(length: int) -> None:
    assert crc32c(b"123456789") == 0xE3069283
    data = np.random.default_rng(0).integers(0, 256, length, dtype=np.uint8).tobytes()
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    assert crc32c(data) == crc ^ 0xFFFFFFFF
