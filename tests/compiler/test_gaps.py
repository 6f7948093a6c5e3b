import contextlib
import itertools
import tracemalloc
import zlib
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_xla.compiler import gaps, weights
from lepton_xla.compiler.elements import from_words, to_words
from lepton_xla.errors import ArtifactError
from lepton_xla.quant.qtensor import quantize

WORDS = ("u1", "<u2", "<u4", "<u8")
_SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)


def example(word: str, shape: tuple[int, ...], content: str, seed: int) -> np.ndarray:
    """An array of words as they come in weights, and as they do not."""
    random, kind = np.random.default_rng(seed), np.dtype(word)
    every = random.integers(0, 1 << (8 * kind.itemsize), shape, dtype=kind.newbyteorder("="))
    few = random.choice(every.reshape(-1), 3)[random.integers(0, 3, shape)]
    kept = random.random(shape) < 0.2
    nibbles = (
        random.normal(7, 2, (2, *shape)).clip(1, 15).astype(np.uint8) << np.array([0, 4]).reshape(2, *[1] * len(shape))
    ).sum(0)
    made = {
        "random": every,
        "zeros": np.zeros(shape),
        "equal": np.full(shape, every.reshape(-1)[0]),
        "pruned": np.where(kept, every, 0),
        "few": few,
        "few and pruned": np.where(kept, few, 0),
        "nibbles": nibbles,
    }  # fmt: skip
    return made[content].astype(kind)


def decoded(streams: gaps.Streams, like: np.ndarray) -> np.ndarray:
    found = np.empty_like(like)
    gaps.from_streams(*(np.frombuffer(stream, np.uint8) for stream in streams), found)
    return found


def slow_decode(streams: gaps.Streams, shape: tuple[int, ...], size: int) -> list[int]:
    """The words, from the module's description of the format and nothing else, one number at a time."""

    def number(data: Iterable[int]) -> int:
        return sum(byte << (8 * place) for place, byte in enumerate(data))

    header, left_out = streams.gaps[0], number(streams.gaps[1 : 1 + size])
    bits, columns = 2 ** (header % 8), header // 8
    count = len(streams.codes) // size
    planes = [streams.codes[place * count : (place + 1) * count] for place in range(size)]
    following = iter([number(part) for part in zip(*planes, strict=True)])
    codes: list[object] = []
    for step in streams.gaps[1 + size :]:
        codes += [left_out] * step
        if step < 255:
            codes.append(next(following, "end"))
    assert codes.pop() == "end"
    # Blocks of rows: code (r, c) of block b is at row b * rows + r.
    *lead, rows, width = (*(1,) * (2 - len(shape)), *shape) if len(shape) > 1 else (shape[0], 1)
    per_word = 8 * size // bits
    words = []
    for step, row, column in itertools.product(range(int(np.prod(lead))), range(rows), range(width)):
        word = 0
        for block in range(per_word):
            tall = block * rows + row
            place = column * rows * per_word + tall if columns else tall * width + column
            word += codes[step * rows * per_word * width + place] << (block * bits)
        words.append(word)
    return words


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(WORDS),
    _SHAPES,
    st.sampled_from(["random", "zeros", "equal", "pruned", "few", "few and pruned", "nibbles"]),
    st.integers(0, 1000),
)
def test_words_come_back_and_as_a_slow_decoder_reads_them(
    word: str, shape: tuple[int, ...], content: str, seed: int
) -> None:
    array = example(word, shape, content, seed)
    streams = gaps.to_streams(array)
    np.testing.assert_array_equal(decoded(streams, array), array)
    assert slow_decode(streams, shape, array.itemsize) == array.reshape(-1).tolist()


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 1020])
def test_gaps_around_a_byte_s_limit(gap: int) -> None:
    for behind in (0, 1, gap):
        array = np.array([*[0] * gap, 9, *[0] * gap, 8, *[0] * behind], np.uint8)
        streams = gaps.to_streams(array)
        np.testing.assert_array_equal(decoded(streams, array), array)
        assert slow_decode(streams, array.shape, 1) == array.tolist()


@pytest.mark.parametrize("word", WORDS)
def test_byte_planes_come_back(word: str) -> None:
    array = example(word, (5, 7), "random", 0)
    data = gaps.to_planes(array)
    assert data[: array.size] == bytes((array.reshape(-1) & np.array(255, array.dtype)).astype(np.uint8))
    np.testing.assert_array_equal(gaps.from_planes(np.frombuffer(data, np.uint8), array.dtype), array.reshape(-1))


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(WORDS), st.sampled_from(["random", "pruned", "few and pruned", "nibbles"]), st.data())
def test_damaged_streams_are_an_error_or_another_array_and_nothing_else(
    word: str, content: str, data: st.DataObject
) -> None:
    array = example(word, (12, 20), content, 3)
    good = gaps.to_streams(array)
    bad = list(map(bytearray, good))
    for _ in range(data.draw(st.integers(1, 3))):
        stream = bad[data.draw(st.integers(0, 1))]
        stream[data.draw(st.integers(0, min(len(stream), 60) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(ArtifactError):  # what the codec cannot see is seen by the file's digest
        decoded(gaps.Streams(*map(bytes, bad)), array)


def test_every_truncation_is_an_error() -> None:
    for content in ("pruned", "few and pruned", "random"):
        array = example("<u4", (8, 9), content, 0)
        good = gaps.to_streams(array)
        for cut in range(len(good.gaps)):
            with pytest.raises(ArtifactError):
                decoded(gaps.Streams(good.gaps[:cut], good.codes), array)
        for cut in range(len(good.codes)):
            with pytest.raises(ArtifactError, match="bytes of codes"):
                decoded(gaps.Streams(good.gaps, good.codes[:cut]), array)


@pytest.mark.parametrize(
    ("stream", "codes", "message"),
    [
        (b"", b"", "less than their header"),
        (bytes([4, 0, 12]), b"", "header 4 does not fit words of 1 bytes"),
        (bytes([7, 0, 12]), b"", "header 7 does not fit"),
        (bytes([0, 0, 12]), b"", "header 0 does not fit"),
        (bytes([16 + 3, 0, 12]), b"", "header 19 does not fit"),
        (bytes([2, 16, 24]), b"", "a code has more than 4 bits"),
        (bytes([2, 0, 0, 23]), bytes([16]), "a code has more than 4 bits"),
        (bytes([3, 0, *[0] * 99]), bytes(99), "99 gap bytes for 12 codes"),
        (bytes([3, 0, 6, 9]), b"x", "do not add up to 12 codes"),
        (bytes([3, 0, 6, 4]), b"x", "do not add up to 12 codes"),
        (bytes([3, 0, 255]), b"", "do not add up to 12 codes"),
        (bytes([3, 0]), b"", "do not add up to 12 codes"),
        (bytes([3, 0, 6, 5]), b"xy", "2 bytes of codes, not 1"),
    ],
)
def test_hostile_streams_are_refused_and_take_no_memory(stream: bytes, codes: bytes, message: str) -> None:
    tracemalloc.start()
    with pytest.raises(ArtifactError, match=message):
        decoded(gaps.Streams(stream, codes), np.empty((3, 4), np.uint8))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_column_order_needs_columns() -> None:
    with pytest.raises(ArtifactError, match="no columns"):
        decoded(gaps.Streams(bytes([8 + 3, 0, 12]), b""), np.empty(12, np.uint8))


@pytest.mark.parametrize(
    "name", ["int8", "int4", "uint8", "uint4", "fp8_e4m3", "fp8_e5m2", "nf4", "codebook2", "codebook4", "codebook32"]
)
def test_quantized_matrices_of_every_kind_come_back(name: str) -> None:
    random = np.random.default_rng(0)
    matrix = np.where(random.random((24, 10)) < 0.3, random.standard_normal((24, 10)), 0).astype(np.float32)
    found = quantize(jnp.asarray(matrix), name, "group:8")
    parts = {part: getattr(found, part) for part in ("values", "scale", "zero_point", "codebook")}
    for part, array in parts.items():
        if array is None:
            continue
        whole = np.asarray(array)
        words = to_words(whole)
        back = from_words(decoded(gaps.to_streams(words), words), whole.shape, whole.dtype.name)
        assert back.dtype == whole.dtype, part
        assert back.tobytes() == whole.tobytes(), part


def compressed(streams: gaps.Streams) -> int:
    """Bytes of both streams under Huffman codes."""
    coders = [zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY) for _ in streams]
    return sum(len(coder.compress(stream) + coder.flush()) for coder, stream in zip(coders, streams, strict=True))


def test_neither_the_order_of_axes_nor_codes_that_share_bytes_cost_anything() -> None:
    random = np.random.default_rng(0)
    # Of an image's inputs, those at its border have lost nearly all of their weights.
    density = np.where(np.arange(200) % 20 < 10, 0.002, 0.2)[:, None]
    codes = np.where(random.random((200, 60)) < density, random.integers(1, 4, (200, 60)), 0).astype(np.uint8)
    sizes = [
        compressed(gaps.to_streams(array))
        for array in (codes, np.ascontiguousarray(codes.T), codes[:100] | codes[100:] << 4)
    ]
    assert max(sizes) <= 1.005 * min(sizes)
    shuffled = random.permutation(codes.reshape(-1)).reshape(codes.shape)
    assert sizes[0] < 0.95 * compressed(gaps.to_streams(shuffled))


def lenet300(density: float, levels: int, seed: int = 0) -> tuple[list[np.ndarray], float]:
    """The codes of LeNet-300-100's three matrices, normal weights pruned by size and then clustered, and their bound.

    The bound is Shannon's for codes that do not depend on each other, zeros among them, in bytes.
    """
    random = np.random.default_rng(seed)
    made, bound = [], 0.0
    for shape in ((784, 300), (300, 100), (100, 10)):
        values = random.standard_normal(shape)
        kept = np.abs(values) > np.quantile(np.abs(values), 1 - density)
        centres = np.quantile(values[kept], (np.arange(levels - 1) + 0.5) / (levels - 1))
        for _ in range(20):  # k-means
            nearest = np.searchsorted((centres[1:] + centres[:-1]) / 2, values[kept])
            sums, counts = (np.bincount(nearest, part, levels - 1) for part in (values[kept], None))
            centres = np.where(counts > 0, sums / np.maximum(counts, 1), centres)
        codes = np.zeros(shape, np.uint8)
        codes[kept] = 1 + nearest
        _, counts = np.unique(codes, return_counts=True)
        bound += float(-(counts * np.log2(counts / codes.size)).sum() / 8)
        made.append(codes)
    return made, bound


@pytest.mark.parametrize("levels", [16, 64])
@pytest.mark.parametrize("density", [0.05, 0.08])
def test_lenet300_takes_hardly_more_than_its_entropy(density: float, levels: int) -> None:
    codes, bound = lenet300(density, levels)
    if levels == 16:  # two to a byte, by blocks of rows
        codes = [code[: len(code) // 2] | code[len(code) // 2 :] << 4 for code in codes]
    biases = [np.random.default_rng(1).standard_normal(size).astype(np.float32) for size in (300, 100, 10)]
    arrays = [*codes, *biases, np.zeros(levels, np.float32)]
    leaves = [weights.describe(f"leaf{index}", index, array) for index, array in enumerate(arrays)]
    written: dict[str, bytes] = {}
    stored, _ = weights.write_all(leaves, arrays, written.__setitem__)
    assert [leaf.encoding for leaf in stored[:2]] == ["gaps", "gaps"]
    total = sum(map(len, written.values()))
    fixed = 4 * (410 + levels) + 3 * 100  # what is not codes, and three leaves' tables of Huffman codes
    assert bound < total < 1.04 * bound + fixed
    if levels == 16:
        float32 = 4 * (266_200 + 410)
        assert float32 / total > {0.05: 60, 0.08: 41}[density]
