"""Pruned weights as two streams of bytes: the gaps between the codes that are left, and those codes.

The most frequent code, a pruned weight's zero, is left out: each other code is stored with the number of left-out codes
before it (Han, Mao, Dally 2016, Deep Compression, arXiv:1510.00149, section 2). Gaps run along rows or columns,
whichever takes fewer bytes. A code is an element's bits as an unsigned integer, or a part of a byte into which several
codes are packed. Both streams are compressed where they are stored, by zstd.

    gap stream   1 byte: bits 0-2: log2 of the bits of a code; bit 3: the codes are in column order
                 the code that is left out, as wide as a word
                 gap bytes: below 255: that many codes are left out, then comes one that is not; 255: 255 codes are left
                 out, and the gap goes on. One more code, which does not exist, ends the array.
    codes        byte planes: the lowest byte of every code, then the next byte of every code, and so on

Numbers are little-endian.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lepton_xla.errors import ArtifactError

_LONG_GAP = 255
_COLUMNS = 8
# Decoding column order ends with a transpose, so columns must save at least half a percent.
_COLUMNS_WORTHWHILE = 0.995


class Streams(NamedTuple):
    """The two streams of one array."""

    gaps: bytes
    codes: bytes


def to_streams(words: np.ndarray) -> Streams:
    """Split an array of words into gaps and codes, in the code width and order that take the fewest bytes.

    Args:
        words: as `elements.to_words` gives them, not empty. The last two axes are a matrix.
    """
    bits = _code_bits(words)
    codes, header = _split(words, bits), bits.bit_length() - 1
    # In wide words only zero repeats, because pruning makes it; counting other values would tell nothing.
    left_out = int(np.bincount(codes.reshape(-1)).argmax()) if codes.itemsize == 1 else 0
    gap_bytes = _gap_bytes(codes, left_out)
    if codes.ndim > 1:
        columns = np.swapaxes(codes, -1, -2)
        by_column = _gap_bytes(columns, left_out)
        if _entropy_bytes(np.bincount(by_column)) < _COLUMNS_WORTHWHILE * _entropy_bytes(np.bincount(gap_bytes)):
            codes, gap_bytes, header = columns, by_column, header | _COLUMNS
    head = bytes([header]) + left_out.to_bytes(codes.itemsize, "little")
    return Streams(head + gap_bytes.tobytes(), to_planes(codes[codes != left_out]))


def from_streams(gaps: np.ndarray, codes: np.ndarray, out: np.ndarray) -> None:
    """Invert `to_streams`, into an array of words of the same shape and dtype.

    What it allocates is bounded by the sizes of its arguments, whatever the streams say.

    Args:
        gaps, codes: the streams, as uint8 arrays.
        out: the array to fill.

    Raises:
        ArtifactError: if the streams do not encode such an array.
    """
    width = out.itemsize
    if gaps.size < 1 + width:
        raise ArtifactError(f"its gaps take {gaps.size} bytes, less than their header")
    header, left_out = int(gaps[0]), gaps[1 : 1 + width].view(out.dtype)
    bits, columns = 1 << (header & 7), bool(header & _COLUMNS)
    if header > 15 or (bits not in (2, 4, 8) if width == 1 else bits != width * 8):
        raise ArtifactError(f"header {header} does not fit words of {width} bytes")
    if columns and out.ndim < 2:
        raise ArtifactError("its header says column order, but the array has no columns")
    count = out.size * (width * 8 // bits)
    positions = _positions(gaps[1 + width :], count)
    if codes.size != positions.size * width:
        raise ArtifactError(f"{codes.size} bytes of codes, not {positions.size * width}")
    whole = np.full(count, left_out[0], out.dtype)
    whole[positions] = from_planes(codes, out.dtype)
    if bits < 8 and whole.size and int(whole.max()) >> bits:
        raise ArtifactError(f"a code has more than {bits} bits")
    _join(whole, bits, columns, out)


def to_planes(words: np.ndarray) -> bytes:
    """Put the lowest bytes of all words first, then their next bytes, and so on: alike bytes stand together."""
    flat = np.ascontiguousarray(words).reshape(-1)
    return flat.view(np.uint8).reshape(-1, flat.itemsize).T.tobytes()


def from_planes(data: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Invert `to_planes`: make flat words of a uint8 array."""
    return np.ascontiguousarray(data.reshape(dtype.itemsize, -1).T).view(dtype).reshape(-1)


def _code_bits(words: np.ndarray) -> int:
    """Choose the code width that takes the fewest bytes if codes are independent of one another."""
    if words.itemsize > 1:
        return words.itemsize * 8
    byte, counts = np.arange(256), np.bincount(words.reshape(-1), minlength=256)

    def size(bits: int) -> float:
        mask = (1 << bits) - 1
        parts = [np.bincount(byte >> place & mask, counts, minlength=mask + 1) for place in range(0, 8, bits)]
        found = np.sum(parts, axis=0)
        return _entropy_bytes(found) + np.count_nonzero(found) / 2

    return min((8, 4, 2), key=size)


def _entropy_bytes(counts: np.ndarray) -> float:
    """Compute Shannon's bound for independent codes of these frequencies, in bytes."""
    counts = counts[counts > 0].astype(np.float64)
    return float((counts * np.log2(counts.sum() / counts)).sum() / 8)


def _split(words: np.ndarray, bits: int) -> np.ndarray:
    """Split words into codes: those of a byte go to different blocks of rows, as `quant.packing` packs them."""
    if bits == words.itemsize * 8:
        return words
    mask = np.uint8((1 << bits) - 1)
    blocks = [words >> np.uint8(place) & mask for place in range(0, 8, bits)]
    return np.concatenate(blocks, axis=max(words.ndim - 2, 0))


def _join(codes: np.ndarray, bits: int, columns: bool, out: np.ndarray) -> None:
    """Invert `_split`, from flat codes in either order."""
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
    found = np.full(gaps.size + int(long.sum()), _LONG_GAP, np.uint8)
    found[np.arange(gaps.size) + np.cumsum(long)] = gaps % _LONG_GAP
    return found


def _positions(gap_bytes: np.ndarray, count: int) -> np.ndarray:
    """Find the positions, among `count` codes, of those that were not left out."""
    if gap_bytes.size > count + 1 + count // _LONG_GAP:
        raise ArtifactError(f"{gap_bytes.size} gap bytes for {count} codes")
    single = gap_bytes != _LONG_GAP
    positions = np.cumsum(gap_bytes + single, dtype=np.int64) - 1
    if not single.all():
        positions = positions[single]
    if not positions.size or positions[-1] != count:
        raise ArtifactError(f"the gaps do not add up to {count} codes")
    return positions[:-1]
