import hashlib
import secrets

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_xla.compiler import reading, weights
from lepton_xla.compiler.manifest import FileEntry
from lepton_xla.compiler.packing import pack, unpack
from lepton_xla.compiler.storage import Store, VerifiedFiles
from lepton_xla.errors import ArtifactError

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


def round_trip(array: np.ndarray) -> tuple[np.ndarray, dict[str, bytes]]:
    leaf = weights.describe("layer/kernel", 0, array)
    store = Store(f"memory://{secrets.token_hex(8)}/")
    written = dict(weights.encode(leaf, array))
    files = {name: FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in written.items()}
    for name, data in written.items():
        store.write(name, data)
    (found,) = reading.read_all([leaf], VerifiedFiles(store, files))
    return found, written


def as_bytes(array: np.ndarray) -> bytes:
    if array.dtype.name in _NARROW and not array.dtype.name.startswith("float"):
        return array.astype(np.int8).tobytes()
    return array.tobytes()


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 5), max_size=4).map(tuple),
    st.integers(0, 1000),
)
def test_every_dtype_and_shape_comes_back_bit_for_bit(dtype: str, shape: tuple[int, ...], seed: int) -> None:
    array = random_bits(dtype, shape, seed)
    found, _ = round_trip(array)
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    assert as_bytes(found) == as_bytes(array)


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
@pytest.mark.parametrize("compressible", [True, False])
def test_large_leaves_are_cut_into_chunks(dtype: str, compressible: bool) -> None:
    array = random_bits(dtype, (2501, 1999), 0)
    if compressible:
        array = np.where(np.arange(1999) % 3 == 0, array, np.zeros_like(array))
    found, written = round_trip(array)
    assert as_bytes(found) == as_bytes(array)
    assert max(map(len, written.values())) <= weights.CHUNK_BYTES + 1024
    bits = {"float32": 32, "int8": 8, "int4": 4}[dtype]
    stored, plain = sum(map(len, written.values())), array.size * bits // 8
    assert stored < 0.75 * plain if compressible else stored < 1.02 * plain
    assert (b"zstd" in written["weights/00000-layer.kernel/zarr.json"]) is compressible


def test_arrays_start_on_a_64_byte_boundary() -> None:
    for size in (1, 3, 1000):
        found, _ = round_trip(np.arange(size, dtype=np.float32))
        assert found.ctypes.data % 64 == 0


def test_int4_is_packed_two_to_a_byte_first_in_the_low_bits() -> None:
    array = np.array([1, -1, 7, -8, 3]).astype(ml_dtypes.int4)
    assert pack(array).tolist() == [0xF1, 0x87, 0x03]
    assert unpack(np.array([0xF1, 0x87, 0x03], np.uint8), (5,), "int4").astype(np.int8).tolist() == [1, -1, 7, -8, 3]


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
    leaf = weights.describe("w", 0, np.zeros((2, 3), np.float32))
    store = Store("memory://foreign/")
    files: dict[str, FileEntry] = {}
    for name, data in weights.encode(weights.describe("w", 0, np.zeros((3, 2))), np.zeros((3, 2), np.float32)):
        store.write(name, data)
        files[name] = FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(ArtifactError, match=r"zarr.json: holds float32\[3, 2\]; the manifest says float32\[2, 3\]"):
        reading.read_all([leaf], VerifiedFiles(store, files))
