import dataclasses
import hashlib
import re
import secrets
from collections.abc import Sequence

import jax.numpy as jnp
import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_xla.compiler import reading, weights
from lepton_xla.compiler.elements import from_bytes, to_bytes
from lepton_xla.compiler.manifest import WeightLeaf
from lepton_xla.compiler.storage import Store, VerifiedFiles
from lepton_xla.errors import ArtifactError
from lepton_xla.files.listing import FileEntry

DTYPES = (
    "bool", "int2", "int4", "int8", "int16", "int32", "int64", "uint2", "uint4", "uint8", "uint16", "uint32", "uint64",
    "float16", "bfloat16", "float32", "float64", "complex64", "float4_e2m1fn", "float8_e3m4", "float8_e4m3",
    "float8_e4m3fn", "float8_e4m3fnuz", "float8_e4m3b11fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
)  # fmt: skip
_NARROW = {"int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4}


def random_bits(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Every bit pattern that the dtype has, NaNs and negative zeros among them."""
    random = np.random.default_rng(seed)
    kind, size = jnp.dtype(dtype), int(np.prod(shape))
    if dtype == "bool":
        return random.integers(0, 2, shape).astype(bool)
    if dtype in _NARROW:
        bits = _NARROW[dtype]
        values = random.integers(0, 1 << bits, size).astype(np.uint8)
        if dtype.startswith("float"):
            return values.view(kind).reshape(shape)
        values = values.astype(np.int8) - ((1 << (bits - 1)) if dtype.startswith("int") else 0)
        return values.astype(kind).reshape(shape)
    return random.integers(0, 256, size * kind.itemsize).astype(np.uint8).view(kind).reshape(shape)


@dataclasses.dataclass
class Written:
    """What `write_all` made of some arrays."""

    rows: tuple[int, ...]
    files: dict[str, bytes]


def write(arrays: Sequence[np.ndarray]) -> tuple[tuple[WeightLeaf, ...], Written]:
    files: dict[str, bytes] = {}
    described = [weights.describe("layer/kernel", index, array) for index, array in enumerate(arrays)]
    leaves, rows = weights.write_all(described, arrays, files.__setitem__)
    return leaves, Written(rows, files)


def stored(array: np.ndarray, encoding: str | None = None) -> tuple[WeightLeaf, Written]:
    """The leaf and its files, in the encoding that is chosen or in this one."""
    with pytest.MonkeyPatch.context() as patch:
        if encoding is not None:
            patch.setattr(weights, "_choose", lambda *_, **__: encoding)
        (leaf,), written = write([array])
    return leaf, written


def read(leaves: Sequence[WeightLeaf], written: Written) -> list[np.ndarray]:
    store = Store(f"memory://{secrets.token_hex(8)}/")
    files: dict[str, FileEntry] = {}
    for name, data in written.files.items():
        files[name] = FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())
        store.write(name, data)
    return reading.read_all(leaves, written.rows, VerifiedFiles(store, files))


def as_bytes(array: np.ndarray) -> bytes:
    if array.dtype.name in _NARROW and not array.dtype.name.startswith("float"):
        return array.astype(np.int8).tobytes()
    return array.tobytes()


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 5), max_size=4).map(tuple),
    st.integers(0, 1000),
    st.sampled_from(["plain", "zstd", "packed", "gaps", None]),
)
def test_every_dtype_and_shape_comes_back_bit_for_bit(
    dtype: str, shape: tuple[int, ...], seed: int, encoding: str | None
) -> None:
    array = random_bits(dtype, shape, seed)
    leaf, written = stored(array, encoding)
    (found,) = read([leaf], written)
    assert leaf.encoding == (encoding or leaf.encoding)
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    assert as_bytes(found) == as_bytes(array)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("content", ["random", "repeated", "pruned"])
def test_large_leaves_are_cut_and_stored_by_what_is_smallest(dtype: str, content: str) -> None:
    array = random_bits(dtype, (2501, 1999), 0)
    if content == "repeated":
        array = np.tile(array[:1], (2501, 1))
    if content == "pruned":
        array = np.where(np.random.default_rng(1).random(array.shape) < 0.1, array, np.zeros_like(array))
    leaf, written = stored(array)
    (found,) = read([leaf], written)
    assert as_bytes(found) == as_bytes(array)
    assert max(map(len, written.files.values())) <= weights.CHUNK_BYTES + 1024
    assert leaf.encoding == {"random": "plain", "repeated": "zstd", "pruned": "gaps"}[content]
    total = sum(map(len, written.files.values()))
    bits = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}[dtype]
    # Each of a tenth's positions takes 4.69 bits, and random values nothing less than all of theirs.
    largest = {"random": 1.02 * bits, "repeated": 0.1 * bits, "pruned": 1.02 * 0.1 * (4.69 + bits)}[content]
    assert total <= largest * array.size / 8


@pytest.mark.parametrize(("density", "encoding"), [(1.0, "plain"), (0.5, "zstd"), (0.2, "gaps")])
def test_large_weights_do_not_take_longer_to_load_for_a_few_bytes(density: float, encoding: str) -> None:
    values = np.random.default_rng(0).normal(0, 40, (2300, 2000))
    kept = np.abs(values) >= np.quantile(np.abs(values), 1 - density)
    codes = np.where(kept, values, 0).clip(-127, 127).astype(np.int8)
    assert stored(codes)[0].encoding == encoding
    part = codes[:400]
    leaf, written = stored(part)  # a small model's
    assert leaf.encoding != "plain"
    assert sum(map(len, written.files.values())) < 0.97 * part.size


def test_leaves_share_rows_of_bounded_size() -> None:
    kept = np.random.default_rng(0).random((44, 1 << 19)) < 0.2
    arrays = [np.where(mask, random_bits("int8", mask.shape, 0), np.int8(0)) for mask in kept]
    leaves, written = write(arrays)
    assert {leaf.encoding for leaf in leaves} == {"gaps"}
    # A fifth of 22 MiB: 4.4 MiB of gaps, and as much of codes.
    assert len(written.rows) == 4
    assert max(written.rows) <= weights.CHUNK_BYTES
    for array, found in zip(arrays, read(leaves, written), strict=True):
        np.testing.assert_array_equal(found, array)


def test_small_leaves_take_little_more_than_their_bytes() -> None:
    arrays = [random_bits("float32", (size,), size) for size in (1, 10, 100, 300, 1000)]
    leaves, written = write(arrays)
    assert {leaf.encoding for leaf in leaves} == {"packed"}
    assert sorted(written.files) == ["weights/packed/c/0/0", "weights/packed/zarr.json"]
    assert sum(map(len, written.files.values())) <= sum(array.nbytes for array in arrays) + 350


@pytest.mark.parametrize("encoding", ["packed", "gaps"])
def test_a_piece_that_is_not_of_its_leaf_is_refused_by_name(encoding: str) -> None:
    array = np.where(np.arange(600) % 5, 0, np.arange(600)).astype(np.int16).reshape(20, 30)
    leaf, written = stored(array, encoding)
    for index, piece in enumerate(leaf.pieces):
        for change in ({"size": piece.size - 1}, {"start": piece.start + 1, "size": piece.size - 1}):
            cut = msgspec.structs.replace(piece, **change)
            harmed = msgspec.structs.replace(leaf, pieces=(*leaf.pieces[:index], cut, *leaf.pieces[index + 1 :]))
            with pytest.raises(ArtifactError, match="weights/packed: weight 'layer/kernel' cannot be decoded"):
                read([harmed], written)
    other = msgspec.structs.replace(leaf, shape=(30, 20, 2))
    with pytest.raises(ArtifactError, match="weight 'layer/kernel'"):
        read([other], written)
    with pytest.raises(ArtifactError, match="pieces; int16"):
        read([msgspec.structs.replace(leaf, pieces=leaf.pieces[1:])], written)


def test_rows_of_another_size_than_the_manifest_s_are_refused() -> None:
    leaf, written = stored(np.arange(100, dtype=np.float32), "packed")
    written.rows = (written.rows[0] + 1,)
    with pytest.raises(ArtifactError, match=r"zarr.json: holds uint8\[1, 400\]; the manifest says uint8\[1, 401\]"):
        read([leaf], written)


def test_arrays_start_on_a_64_byte_boundary() -> None:
    for size in (1, 3, 1000):
        for encoding in ("plain", "packed", "gaps"):
            leaf, written = stored(np.arange(size, dtype=np.float32), encoding)
            (found,) = read([leaf], written)
            assert found.ctypes.data % 64 == 0


def test_int4_is_packed_two_to_a_byte_first_in_the_low_bits() -> None:
    array = np.array([1, -1, 7, -8, 3]).astype(ml_dtypes.int4)
    assert to_bytes(array).tolist() == [0xF1, 0x87, 0x03]
    assert from_bytes(np.array([0xF1, 0x87, 0x03], np.uint8), (5,), "int4").astype(np.int8).tolist() == [
        1,
        -1,
        7,
        -8,
        3,
    ]


def test_a_tall_array_of_long_rows_is_cut_along_its_second_axis_too() -> None:
    shape = weights.chunk_shape((3, 4 << 20), 4)
    assert shape[0] == 1
    assert np.prod(shape) * 4 <= weights.CHUNK_BYTES


def test_names_that_would_collide_get_folders_of_their_own() -> None:
    one = np.zeros(1, np.float32)
    folders = {weights.describe(path, index, one).folder for index, path in enumerate(["a", "a/b", "a.b", "../x", "é"])}
    assert len(folders) == 5
    assert not any(".." in folder for folder in folders)


def test_metadata_of_another_shape_is_refused_by_name() -> None:
    leaf, written = stored(np.zeros((3, 2), np.float32), "plain")
    with pytest.raises(ArtifactError, match=r"zarr.json: holds float32\[3, 2\]; the manifest says float32\[2, 3\]"):
        read([msgspec.structs.replace(leaf, shape=(2, 3))], written)


def test_uncompressed_arrays_are_read_without_tensorstore(monkeypatch: pytest.MonkeyPatch) -> None:
    array = random_bits("bfloat16", (1100, 1024, 3), 5)
    leaf, written = stored(array, "plain")
    monkeypatch.setattr(reading, "open_array", lambda *_, **__: pytest.fail("it was opened"))
    (found,) = read([leaf], written)
    assert as_bytes(found) == as_bytes(array)


@pytest.mark.parametrize(
    ("old", "new", "refused"),
    [
        (b'{"name":"default"}', b'{"configuration":{"separator":"/"},"name":"default"}', ""),
        (b'"fill_value":0.0', b'"attributes":{"by":"another"},"fill_value":0.0', ""),
        (b'"chunk_shape":[2,3]', b'"chunk_shape":[0,3]', "zarr.json is not valid zarr metadata"),
        (b'"chunk_shape":[2,3]', b'"chunk_shape":[-2,3]', "zarr.json is not valid zarr metadata"),
        (b'"chunk_shape":[2,3]', b'"chunk_shape":[6]', "zarr.json is not valid zarr metadata"),
        (b'"chunk_shape":[2,3]', b'"chunk_shape":[3,3]', "c/0/0 cannot be decoded"),
        (b'"chunk_shape":[2,3]', b'"chunk_shape":[1,3]', "/c/"),
        (b'"float32"', b'"int32"', "holds int32"),
        (b'"default"', b'"v2"', "zarr.json: chunks are named by {'name': 'v2'}"),
        (b'{"chunk_grid"', b'["chunk_grid"', "zarr.json is not valid zarr metadata"),
    ],
)
def test_metadata_that_others_wrote_is_read_or_refused_by_name(old: bytes, new: bytes, refused: str) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    leaf, written = stored(array, "plain")
    name = f"{leaf.folder}/zarr.json"
    assert old in written.files[name]
    written.files[name] = written.files[name].replace(old, new)
    if refused:
        with pytest.raises(ArtifactError, match=re.escape(refused)):
            read([leaf], written)
    else:
        (found,) = read([leaf], written)
        assert found.tolist() == array.tolist()
