"""Lossless compression of pruned and quantized weights: two encodings that decode with array operations.

`gaps` omits the most frequent code (zero, in a pruned weight). For every other code it stores the number of omitted
codes before it, and the code. `deflate` stores every code. Both are streams of bytes, Huffman-coded by DEFLATE if that
makes them smaller. This is Han, Mao, Dally 2016, Deep Compression, arXiv:1510.00149 (relative indices in section 2,
Huffman coding in section 4), with gaps along whichever axis makes them smaller.

A code is the bits of an element as an unsigned integer, or one of several codes that were packed into a byte.

An encoded array, numbers little-endian:

    1 byte      bits 0-2: log2 of the bits of a code; bit 3: codes are in column order; bit 4: there is a palette
    gaps only   the code left out, as bytes of a code; 4 bytes: how many gap bytes
    palette     1 byte: its codes, less one; then the codes
    gaps only   the stream of gap bytes
    the rest    one stream for each byte of a code, lowest first; with a palette one, of indices into it

    a stream    4 bytes: twice its size, plus one where it is DEFLATE (RFC 1951); then its bytes
    a gap byte  under 255: so many codes left out, then one that is not; 255: 255 left out, and no other yet. One more
                code, which is not there, stands at the end of the array, so that its size is known
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numpy as np

from lepton_xla.errors import ArtifactError

_LONG_GAP = 255
_COLUMNS, _PALETTE = 8, 16
_LARGEST_PALETTE = 256
# Sample size: more than 256 distinct values in the sample rule out a palette.
_PALETTE_SAMPLE = 4096
# Column order must save at least this much, because decoding it needs a transpose.
_COLUMNS_WORTHWHILE = 0.995
# Raw DEFLATE with the largest blocks: each block has its own code table, but weights have the same distribution
# throughout.
_WINDOW, _MEMORY = -15, 9


class Encoded(NamedTuple):
    """Encoded bytes, and the number of Huffman-coded symbols, which determines the decoding time."""

    data: bytes
    symbols: int


def encode(words: np.ndarray, *, gaps: bool) -> Encoded:
    """Encode an array of words with the width and order of codes that give the fewest bytes.

    Args:
        words: result of `packing.to_words`, not empty. The last two axes are a matrix.
        gaps: whether to omit the most frequent code.

    >>> words = np.zeros(1000, np.uint8)
    >>> encoded = encode(words, gaps=True)
    >>> out = np.empty_like(words)
    >>> decode(encoded.data, out, gaps=True)
    >>> len(encoded.data) < 100, bool((out == words).all())
    (True, True)
    """
    bits = _code_bits(words)
    codes, header, head, streams = _split(words, bits), bits.bit_length() - 1, b"", list[np.ndarray]()
    if gaps:
        # Wide words (floats) rarely repeat, except for the zeros of pruning; so do not count them.
        left_out = int(np.bincount(codes.reshape(-1)).argmax()) if codes.itemsize == 1 else 0
        steps = _gap_bytes(codes, left_out)
        if codes.ndim > 1:
            columns = np.swapaxes(codes, -1, -2)
            by_column = _gap_bytes(columns, left_out)
            if _entropy_bytes(np.bincount(by_column)) < _COLUMNS_WORTHWHILE * _entropy_bytes(np.bincount(steps)):
                codes, steps, header = columns, by_column, header | _COLUMNS
        codes = codes[codes != left_out]
        head += left_out.to_bytes(codes.itemsize, "little") + steps.size.to_bytes(4, "little")
        streams.append(steps)
    codes = codes.reshape(-1)
    palette = _palette_of(codes)
    if palette is None:
        streams += list(codes.view(np.uint8).reshape(-1, codes.itemsize).T)
    else:
        header |= _PALETTE
        head += bytes([palette.size - 1]) + palette.tobytes()
        streams.append(np.searchsorted(palette, codes).astype(np.uint8))
    coded = [_stream(stream) for stream in streams]
    symbols = sum(stream.size for stream, data in zip(streams, coded, strict=True) if data[0] & 1)
    return Encoded(b"".join((bytes([header]), head, *coded)), symbols)


def decode(data: bytes | memoryview, out: np.ndarray, *, gaps: bool) -> None:
    """Decode the result of `encode` into an array of words of the same shape and dtype.

    Allocates memory in proportion to `out` only, whatever the data claim.

    Raises:
        ArtifactError: if the data do not encode such an array.
    """
    reader = _Reader(data)
    header = reader.number(1)
    bits, columns = 1 << (header & 7), bool(header & _COLUMNS)
    if header > 31 or (bits not in (2, 4, 8) if out.itemsize == 1 else bits != out.itemsize * 8):
        raise ArtifactError(f"header {header} is invalid for {out.itemsize}-byte words")
    if columns and out.ndim < 2:
        raise ArtifactError("column order in an array without columns")
    count = out.size * (out.itemsize * 8 // bits)
    left_out, steps = (reader.number(out.itemsize), reader.number(4)) if gaps else (0, 0)
    palette = reader.words(reader.number(1) + 1, out.dtype) if header & _PALETTE else None
    if not gaps:
        codes = _values(reader, count, out.dtype, palette)
    else:
        positions = _positions(reader, steps, count)
        codes = np.full(count, left_out, out.dtype)
        codes[positions] = _values(reader, positions.size, out.dtype, palette)
    reader.end()
    if bits < 8 and codes.size and int(codes.max()) >> bits:
        raise ArtifactError(f"a code of more than {bits} bits")
    _join(codes, bits, columns, out)


def estimate(words: np.ndarray) -> tuple[float, float]:
    """Estimate the fewest bytes and symbols of either encoding, from counts alone.

    Counts wide words with all their bits, although an eighth of a float's bits is not random.
    """
    if words.itemsize == 1:
        counts = np.bincount(words.reshape(-1), minlength=256)
        size = min(_entropy_bytes(_code_counts(counts, bits)) for bits in (8, 4, 2))
        return size, min(words.size, 2 * (words.size - int(counts.max())))
    if _palette_of(words.reshape(-1)) is not None:
        return words.size, words.size
    others = int(np.count_nonzero(words))
    return _entropy_bytes(np.array([words.size - others, others])) + others * words.itemsize, others


def _code_bits(words: np.ndarray) -> int:
    """The width of codes at which independent codes and their table take the fewest bytes."""
    if words.itemsize > 1:
        return words.itemsize * 8
    counts = np.bincount(words.reshape(-1), minlength=256)

    def size(bits: int) -> float:
        found = _code_counts(counts, bits)
        return _entropy_bytes(found) + np.count_nonzero(found) / 2

    return min((8, 4, 2), key=size)


def _code_counts(counts: np.ndarray, bits: int) -> np.ndarray:
    """Convert counts of bytes to counts of codes of a width: float [2 ** bits]."""
    byte, mask = np.arange(256), (1 << bits) - 1
    parts = [np.bincount(byte >> place & mask, counts, minlength=1 << bits) for place in range(0, 8, bits)]
    return np.sum(parts, axis=0)


def _entropy_bytes(counts: np.ndarray) -> float:
    """Entropy of independent codes with these counts, in bytes."""
    counts = counts[counts > 0].astype(np.float64)
    return float((counts * np.log2(counts.sum() / counts)).sum() / 8)


def _split(words: np.ndarray, bits: int) -> np.ndarray:
    """Split words into codes; the codes of a byte belong to different blocks of rows, as in `quant.packing`."""
    if bits == words.itemsize * 8:
        return words
    mask = np.uint8((1 << bits) - 1)
    blocks = [words >> np.uint8(place) & mask for place in range(0, 8, bits)]
    return np.concatenate(blocks, axis=max(words.ndim - 2, 0))


def _join(codes: np.ndarray, bits: int, columns: bool, out: np.ndarray) -> None:
    """The inverse of `_split`, from flat codes in either order."""
    per_word = out.itemsize * 8 // bits
    axis = max(out.ndim - 2, 0)
    shape = list(out.shape)
    shape[axis] *= per_word
    if columns:
        shape[-2:] = shape[:-3:-1]
    codes = codes.reshape(shape)
    if columns:
        codes = np.swapaxes(codes, -1, -2)
    blocks = np.split(codes, per_word, axis)
    np.copyto(out, blocks[0])
    for place, block in enumerate(blocks[1:], 1):
        out |= block << np.uint8(place * bits)


def _gap_bytes(codes: np.ndarray, left_out: int) -> np.ndarray:
    positions = np.append(np.flatnonzero(codes != left_out), codes.size)
    gaps = np.diff(positions, prepend=-1) - 1
    long = gaps // _LONG_GAP
    steps = np.full(gaps.size + int(long.sum()), _LONG_GAP, np.uint8)
    steps[np.arange(gaps.size) + np.cumsum(long)] = gaps % _LONG_GAP
    return steps


def _palette_of(codes: np.ndarray) -> np.ndarray | None:
    """The distinct values of wide words, ascending, if there are few (weights that share values); else None."""
    if codes.itemsize == 1 or not codes.size or np.unique(codes[:_PALETTE_SAMPLE]).size > _LARGEST_PALETTE:
        return None
    palette = np.unique(codes)
    return palette if palette.size <= _LARGEST_PALETTE else None


def _stream(data: np.ndarray) -> bytes:
    """Encode bytes with Huffman codes, with Huffman and run-length coding, or not at all, whichever is smallest."""
    plain, best, is_deflate = data.tobytes(), data.tobytes(), 0
    if _entropy_bytes(np.bincount(data, minlength=256)) < data.size:
        for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE):
            coder = zlib.compressobj(9, zlib.DEFLATED, _WINDOW, _MEMORY, strategy)
            coded = coder.compress(plain) + coder.flush()
            if len(coded) < len(best):
                best, is_deflate = coded, 1
    return (len(best) << 1 | is_deflate).to_bytes(4, "little") + best


class _Reader:
    """Parses an encoding from its start, and checks everything."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data)

    def take(self, size: int) -> memoryview:
        if size > len(self._data):
            raise ArtifactError(f"{size - len(self._data)} bytes are missing at its end")
        taken, self._data = self._data[:size], self._data[size:]
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def end(self) -> None:
        if len(self._data):
            raise ArtifactError(f"{len(self._data)} bytes too many")

    def stream(self, size: int) -> np.ndarray:
        """Read a stream of this many bytes."""
        head = self.number(4)
        coded = self.take(head >> 1)
        if not head & 1:
            if len(coded) != size:
                raise ArtifactError(f"a stream has {len(coded)} bytes, not {size}")
            return np.frombuffer(coded, np.uint8)
        decoder = zlib.decompressobj(_WINDOW)
        try:
            plain = decoder.decompress(coded, size + 1)
        except zlib.error as error:
            raise ArtifactError(f"a stream is not DEFLATE: {error}") from error
        if len(plain) != size or not decoder.eof or decoder.unused_data:
            raise ArtifactError(f"a stream does not end after {size} bytes")
        return np.frombuffer(plain, np.uint8)

    def words(self, count: int, dtype: np.dtype[Any]) -> np.ndarray:
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)


def _positions(reader: _Reader, size: int, count: int) -> np.ndarray:
    """Positions of the codes that were not omitted, among `count` codes, from `size` gap bytes."""
    if size > count + 1 + count // _LONG_GAP:
        raise ArtifactError(f"{size} gaps among {count} codes")
    steps = reader.stream(size)
    single = steps != _LONG_GAP
    positions = np.cumsum(steps + single, dtype=np.int64) - 1
    if not single.all():
        positions = positions[single]
    if not positions.size or positions[-1] != count:
        raise ArtifactError(f"the gaps are not those of {count} codes")
    return positions[:-1]


def _values(reader: _Reader, count: int, dtype: np.dtype[Any], palette: np.ndarray | None) -> np.ndarray:
    """Read `count` codes: indices into a palette, or one stream for each byte of a code."""
    if palette is not None:
        indices = reader.stream(count)
        if count and indices.max() >= palette.size:
            raise ArtifactError(f"an index beyond a palette of {palette.size}")
        return palette[indices]
    if dtype.itemsize == 1:
        return reader.stream(count)
    planes = np.empty((count, dtype.itemsize), np.uint8)
    for place in range(dtype.itemsize):
        planes[:, place] = reader.stream(count)
    return planes.view(dtype).reshape(-1)
