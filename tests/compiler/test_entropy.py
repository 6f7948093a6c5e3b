import itertools
import tracemalloc
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_xla.compiler import entropy, weights
from lepton_xla.compiler.packing import from_words, to_words
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


def slow_decode(data: bytes, shape: tuple[int, ...], size: int, *, gaps: bool) -> list[int]:
    """The words, by the module's description of the format and nothing else, one number at a time."""
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        at += count
        assert at <= len(data)
        return data[at - count : at]

    def number(count: int) -> int:
        return sum(byte << (8 * place) for place, byte in enumerate(take(count)))

    def stream() -> list[int]:
        head = number(4)
        return list(zlib.decompress(take(head // 2), -15) if head % 2 else take(head // 2))

    header = number(1)
    bits, columns, with_palette = 2 ** (header % 8), header // 8 % 2, header // 16
    left_out, count = (number(size), number(4)) if gaps else (0, 0)
    entries = [number(size) for _ in range(number(1) + 1)] if with_palette else []
    steps = stream() if gaps else []
    assert len(steps) == count
    if with_palette:
        values = [entries[index] for index in stream()]
    else:
        planes = [stream() for _ in range(size)]
        values = [sum(byte << (8 * place) for place, byte in enumerate(part)) for part in zip(*planes, strict=True)]
    assert at == len(data)
    codes, following = [], iter(values)
    for step in steps:
        codes += [left_out] * step
        if step < 255:
            codes.append(next(following, "end"))
    if gaps:
        assert codes.pop() == "end"
    codes += following
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


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(WORDS),
    _SHAPES,
    st.sampled_from(["random", "zeros", "equal", "pruned", "few", "few and pruned", "nibbles"]),
    st.integers(0, 1000),
    st.booleans(),
)
def test_words_come_back_and_as_a_slow_decoder_reads_them(
    word: str, shape: tuple[int, ...], content: str, seed: int, gaps: bool
) -> None:
    array = example(word, shape, content, seed)
    data = entropy.encode(array, gaps=gaps).data
    found = np.empty_like(array)
    entropy.decode(data, found, gaps=gaps)
    np.testing.assert_array_equal(found, array)
    assert slow_decode(data, shape, array.itemsize, gaps=gaps) == array.reshape(-1).tolist()


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 1020])
def test_gaps_around_a_byte_s_limit(gap: int) -> None:
    for behind in (0, 1, gap):
        array = np.array([*[0] * gap, 9, *[0] * gap, 8, *[0] * behind], np.uint8)
        data, found = entropy.encode(array, gaps=True).data, np.empty_like(array)
        entropy.decode(data, found, gaps=True)
        np.testing.assert_array_equal(found, array)
        assert slow_decode(data, array.shape, 1, gaps=True) == array.tolist()


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(WORDS),
    st.sampled_from(["random", "pruned", "few", "few and pruned", "nibbles"]),
    st.booleans(),
    st.data(),
)
def test_damaged_bytes_are_an_error_or_another_array_and_nothing_else(
    word: str, content: str, gaps: bool, data: st.DataObject
) -> None:
    array = example(word, (12, 20), content, 3)
    good = entropy.encode(array, gaps=gaps).data
    harmed = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        harmed[data.draw(st.integers(0, min(len(good), 60) - 1))] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(good)))
    for bad in (bytes(harmed), good[:cut], bytes(harmed)[:cut], good + b"\0"):
        out = np.empty_like(array)
        try:
            entropy.decode(bad, out, gaps=gaps)
        except ArtifactError:
            continue
        # What the codec cannot see is seen by the file's digest.
        assert len(bad) == len(good)


def test_every_truncation_is_an_error() -> None:
    for content, gaps in itertools.product(("pruned", "few and pruned", "random"), (True, False)):
        array = example("<u4", (8, 9), content, 0)
        good = entropy.encode(array, gaps=gaps).data
        for cut in range(len(good)):
            with pytest.raises(ArtifactError):
                entropy.decode(good[:cut], np.empty_like(array), gaps=gaps)


def stream(size: int, coded: bytes, deflate: bool) -> bytes:
    assert size >= 0
    return (len(coded) * 2 + deflate).to_bytes(4, "little") + coded


def bomb(size: int) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    return coder.compress(bytes(size)) + coder.flush()


@pytest.mark.parametrize(
    ("data", "gaps", "message"),
    [
        (bytes([3]) + stream(0, bomb(1 << 28), True), False, "does not end after 12 bytes"),
        (bytes([3]) + stream(12, bomb(12)[:-1], True), False, "does not end|not DEFLATE"),
        (bytes([3]) + stream(12, bomb(12) + b"x", True), False, "does not end after 12 bytes"),
        (bytes([3]) + stream(12, b"\xff" * 9, True), False, "not DEFLATE"),
        (bytes([3]) + stream(11, bytes(11), False), False, "has 11 bytes, not 12"),
        (bytes([4]) + stream(24, bytes(24), False), False, "header 4 is none"),
        (bytes([7]) + bytes(99), False, "header 7 is none"),
        (bytes([0]) + bytes(99), False, "header 0 is none"),
        (bytes([32 + 3]) + bytes(99), False, "header 35 is none"),
        (bytes([2]) + stream(24, bytes([*range(8)] * 2 + [16] * 8), False), False, "a code of more than 4 bits"),
        (bytes([2, 16, 1, 0, 0, 0]) + stream(1, bytes([24]), False) + stream(0, b"", False), True, "more than 4 bits"),
        (bytes([3, 0]) + (1 << 31).to_bytes(4, "little") + bytes(99), True, "2147483648 gaps among 12 codes"),
        (bytes([3, 0, 2, 0, 0, 0]) + stream(2, bytes([6, 9]), False) + bytes(99), True, "not those of 12 codes"),
        (bytes([3, 0, 2, 0, 0, 0]) + stream(2, bytes([6, 4]), False) + bytes(99), True, "not those of 12 codes"),
        (bytes([3, 0, 1, 0, 0, 0]) + stream(1, bytes([255]), False) + bytes(99), True, "not those of 12 codes"),
        (bytes([3, 0, 0, 0, 0, 0]) + stream(0, b"", False) + bytes(99), True, "not those of 12 codes"),
        (bytes([19, 1, 7, 8]) + stream(12, bytes([0, 1, 2] * 4), False), False, "an index beyond a palette of 2"),
    ],
)  # fmt: skip
def test_hostile_bytes_are_refused_and_take_no_memory(data: bytes, gaps: bool, message: str) -> None:
    tracemalloc.start()
    with pytest.raises(ArtifactError, match=message):
        entropy.decode(data, np.empty((3, 4), np.uint8), gaps=gaps)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20
    if data[0] in (3, 19):
        with pytest.raises(ArtifactError, match="columns"):
            entropy.decode(bytes([data[0] + 8]) + data[1:], np.empty(12, np.uint8), gaps=gaps)


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
        for gaps in (True, False):
            words = to_words(whole)
            out = np.empty_like(words)
            entropy.decode(entropy.encode(words, gaps=gaps).data, out, gaps=gaps)
            back = from_words(out, whole.shape, whole.dtype.name)
            assert back.dtype == whole.dtype, part
            assert back.tobytes() == whole.tobytes(), part


def test_neither_the_order_of_axes_nor_codes_that_share_bytes_cost_anything() -> None:
    random = np.random.default_rng(0)
    # Of an image's inputs, those at its border have lost nearly all of their weights.
    density = np.where(np.arange(200) % 20 < 10, 0.002, 0.2)[:, None]
    codes = np.where(random.random((200, 60)) < density, random.integers(1, 4, (200, 60)), 0).astype(np.uint8)
    sizes = [
        len(entropy.encode(array, gaps=True).data)
        for array in (codes, np.ascontiguousarray(codes.T), codes[:100] | codes[100:] << 4)
    ]
    assert max(sizes) <= 1.005 * min(sizes)
    shuffled = random.permutation(codes.reshape(-1)).reshape(codes.shape)
    assert sizes[0] < 0.95 * len(entropy.encode(shuffled, gaps=True).data)


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
    stored = weights.write_all(leaves, arrays, written.__setitem__)
    assert [leaf.encoding for leaf in stored[:2]] == ["gaps", "gaps"]
    total = sum(map(len, written.values()))
    fixed = 4 * (410 + levels) + 3 * 100  # what is not codes, and three leaves' tables of Huffman codes
    assert bound < total < 1.04 * bound + fixed
    if levels == 16:
        float32 = 4 * (266_200 + 410)
        assert float32 / total > {0.05: 60, 0.08: 41}[density]
