"""Bytes of pruned and quantized weights by encoding, and how fast each decodes: LeNet-300-100 and LeNet-5.

    python benchmarks/storage.py [--json FILE]

Weights are normal, pruned by size to a density and then clustered to 16 values by k-means, one matrix at a time, as in
Han, Mao, Dally 2016, Deep Compression, arXiv:1510.00149. `entropy` is Shannon's bound for codes that do not depend on
each other. A bitmap with values, and rANS over all codes (Duda 2013, arXiv:1311.2540), in NumPy with so many lanes, are
what was tried and not taken. `artifact` is all that is stored: float32 biases, scales and levels too.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from lepton_xla.compiler import gaps, weights

MODELS = {
    "LeNet-300-100": ((784, 300), (300, 100), (100, 10)),
    "LeNet-5": ((25, 20), (500, 50), (800, 500), (500, 10)),
}
DENSITIES = (0.05, 0.08, 0.10)
LEVELS = 16
LANES = (64, 1024)
_SLOT_BITS, _STATE_BITS = 12, 16


def codes_of(shape: tuple[int, int], density: float, random: np.random.Generator) -> np.ndarray:
    """A matrix of codes: 0 is pruned, 1 to 15 are clusters."""
    values = random.standard_normal(shape)
    kept = np.abs(values) > np.quantile(np.abs(values), 1 - density)
    centres = np.quantile(values[kept], (np.arange(LEVELS - 1) + 0.5) / (LEVELS - 1))
    for _ in range(30):
        nearest = np.searchsorted((centres[1:] + centres[:-1]) / 2, values[kept])
        sums, counts = (np.bincount(nearest, part, LEVELS - 1) for part in (values[kept], None))
        centres = np.where(counts > 0, sums / np.maximum(counts, 1), centres)
    codes = np.zeros(shape, np.uint8)
    codes[kept] = 1 + nearest
    return codes


def pack(codes: np.ndarray) -> np.ndarray:
    """Two codes a byte, the second half of the rows in the high bits, as quantized weights are held."""
    half = -(-len(codes) // 2)
    packed = codes[:half].copy()
    packed[: len(codes) - half] |= codes[half:] << 4
    return packed


def bound(codes: np.ndarray) -> float:
    """Shannon's, in bytes."""
    counts = np.bincount(codes.reshape(-1))
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / codes.size)).sum() / 8)


def bitmap(codes: np.ndarray) -> tuple[int, Callable[[], np.ndarray]]:
    """A bit for each code and the values of those that are not zero, both under Huffman codes: bytes and decoder."""
    mask = codes.reshape(-1) != 0
    streams = np.packbits(mask).tobytes(), codes.reshape(-1)[mask].tobytes()
    coders = [zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY) for _ in streams]
    coded = [coder.compress(data) + coder.flush() for coder, data in zip(coders, streams, strict=True)]

    def decode() -> np.ndarray:
        bits, values = (np.frombuffer(zlib.decompress(data, -15), np.uint8) for data in coded)
        out = np.zeros(codes.size, np.uint8)
        out[np.unpackbits(bits, count=codes.size).view(bool)] = values
        return out.reshape(codes.shape)

    return sum(map(len, coded)), decode


def rans(codes: np.ndarray, lanes: int) -> tuple[int, Callable[[], np.ndarray]]:
    """Interleaved rANS, 32-bit states, 16 bits at a time: bytes with a table of 12-bit frequencies, and decoder."""
    flat = codes.reshape(-1)
    share = np.bincount(flat, minlength=LEVELS) / flat.size * (1 << _SLOT_BITS)
    counts = np.where(share > 0, np.maximum(1, np.round(share)), 0).astype(np.int64)
    counts[counts.argmax()] += (1 << _SLOT_BITS) - counts.sum()
    starts = np.cumsum(counts) - counts
    steps = np.zeros((-(-flat.size // lanes), lanes), np.int64)
    steps.reshape(-1)[: flat.size] = flat
    state, words = np.full(lanes, 1 << _STATE_BITS, np.int64), list[np.ndarray]()
    for step in steps[::-1]:
        full = state >= counts[step] << (32 - _SLOT_BITS)
        words.append((state[full] & 0xFFFF).astype(np.uint16)[::-1])
        state = np.where(full, state >> 16, state)
        state = (state // counts[step] << _SLOT_BITS) + state % counts[step] + starts[step]
    stored = np.concatenate(words)[::-1].copy()
    symbols = np.repeat(np.arange(LEVELS, dtype=np.uint8), counts)
    count_at, offset_at = (part.astype(np.uint32) for part in (counts[symbols], np.arange(4096) - starts[symbols]))

    def decode() -> np.ndarray:
        out, now, at = np.empty(steps.shape, np.uint8), state.astype(np.uint32), 0
        for row in out:
            slot = now & np.uint32(4095)
            np.take(symbols, slot, out=row)
            now = (now >> np.uint32(_SLOT_BITS)) * count_at[slot] + offset_at[slot]
            low = now < np.uint32(1 << _STATE_BITS)
            taken = int(np.count_nonzero(low))
            now[low] = now[low] << np.uint32(16) | stored[at : at + taken]
            at += taken
        return out.reshape(-1)[: flat.size].reshape(codes.shape)

    return stored.nbytes + 4 * lanes + LEVELS * _SLOT_BITS // 8, decode


def own(codes: np.ndarray) -> tuple[int, Callable[[], np.ndarray]]:
    """An artifact's encoding: gaps and codes, each stream under zstd."""
    packed = pack(codes)
    handles: list[ts.TensorStore] = []
    size = 0
    for stream in gaps.to_streams(packed):
        array, context = np.frombuffer(stream, np.uint8), ts.Context()
        codecs = [*weights.plain_codecs(1), {"name": "zstd", "configuration": {"level": 19}}]
        metadata = {"data_type": "uint8", "shape": list(array.shape), "codecs": codecs}
        handles.append(weights.open_array(context, metadata=metadata, create=True))
        handles[-1].write(array).result()
        size += len(ts.KvStore.open(weights.SCRATCH, context=context).result().read("c/0").result().value)

    def decode() -> np.ndarray:
        out = np.empty_like(packed)
        first, second = (np.asarray(handle.read().result()) for handle in handles)
        gaps.from_streams(first, second, out)
        return np.concatenate([out & 15, out >> 4])[: len(codes)]

    return size, decode


def artifact(matrices: Sequence[np.ndarray]) -> int:
    """Bytes of a whole model's files: packed codes, scales, levels and float32 biases."""
    random = np.random.default_rng(1)
    arrays: list[np.ndarray] = []
    for codes in matrices:
        bias = random.standard_normal(codes.shape[1]).astype(np.float32)
        arrays += [bias, pack(codes), np.ones((1, 1), np.float32), np.arange(LEVELS, dtype=np.float32)]
    leaves = [weights.describe(f"leaf{index}", index, array) for index, array in enumerate(arrays)]
    files: dict[str, bytes] = {}
    weights.write_all(leaves, arrays, files.__setitem__)
    return sum(map(len, files.values()))


def measure(matrices: Sequence[np.ndarray]) -> dict[str, Any]:
    """Bytes of all matrices by encoding, and the largest one's decoding in millions of codes a second."""
    packed = [pack(codes) for codes in matrices]
    found: dict[str, Any] = {
        "entropy": {"bytes": round(sum(map(bound, matrices)))},
        "packed": {"bytes": sum(part.nbytes for part in packed)},
        "packed, zstd": {"bytes": round(sum(weights.zstd_share(part) * part.nbytes for part in packed))},
    }
    makers: dict[str, Callable[[np.ndarray], tuple[int, Callable[[], np.ndarray]]]] = {
        "bitmap": bitmap,
        **{f"rANS, {lanes} lanes": lambda codes, lanes=lanes: rans(codes, lanes) for lanes in LANES},
        "gaps": own,
    }
    largest = max(range(len(matrices)), key=lambda index: matrices[index].size)
    for name, make in makers.items():
        made = [make(codes) for codes in matrices]
        decode, codes = made[largest][1], matrices[largest]
        assert (decode() == codes).all(), name
        times = []
        for _ in range(15):
            started = time.perf_counter()
            decode()
            times.append(time.perf_counter() - started)
        found[name] = {"bytes": sum(size for size, _ in made), "codes_per_s": codes.size / min(times)}
    total = artifact(matrices)
    float32 = 4 * sum(codes.size + codes.shape[1] for codes in matrices)
    found["artifact"] = {"bytes": total, "float32_bytes": float32, "ratio": float32 / total}
    return found


def main() -> None:
    """Prints a table for each model and density."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for name, shapes in MODELS.items():
        for density in DENSITIES:
            random = np.random.default_rng(0)
            found = measure([codes_of(shape, density, random) for shape in shapes])
            results[f"{name} {density}"] = found
            print(f"{name}, {density:.0%} not zero, {LEVELS} values")
            least = found["entropy"]["bytes"]
            for encoding, figures in found.items():
                line = f"  {encoding:<16}{figures['bytes']:>9,} bytes {100 * (figures['bytes'] / least - 1):>+8.1f} %"
                line += f"{figures['codes_per_s'] / 1e6:>8.0f} million codes/s" if "codes_per_s" in figures else ""
                print(line + (f"   {figures['ratio']:.1f} x less than float32" if "ratio" in figures else ""))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
