"""Returns freed memory to the system, and keeps large results where the system can take their memory back."""

from __future__ import annotations

import ctypes
import mmap
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lepton_xla.trees import tree_bytes

# Of models with so many bytes of weights the weights that a pass changes are kept in files.
LARGE_BYTES = 1 << 29
# Smaller arrays stay in memory: a file is mapped by whole pages.
_ARRAY_BYTES = 1 << 20


def give_back() -> None:
    """Make the C library return freed memory; glibc keeps hundreds of MB of small blocks.

    A no-op with other C libraries.
    """
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def in_file(array: jax.Array, weights: Mapping[str, Any]) -> jax.Array:
    """Move a new weight of a large model to a file without a name, in the system's folder for such files.

    The array shares the memory of the mapped file. Its pages are like those of any file that was read: the system
    drops them when memory is short, and reads them again when they are used. Without this a pass would hold the float
    weights before and after it in memory, beside those of the caller.

    Args:
        array: the weight.
        weights: all weights of the model.

    Returns:
        An equal array; the same if the model or the array is small, or it is on another device than a CPU or on
        several.
    """
    if not _is_here(array) or array.nbytes < _ARRAY_BYTES or tree_bytes(weights) < LARGE_BYTES:
        return array
    host = np.asarray(array)
    with tempfile.TemporaryFile(prefix="lepton-") as file:
        file.write(memoryview(np.ascontiguousarray(host).reshape(-1).view(np.uint8)))
        file.flush()
        mapped = mmap.mmap(file.fileno(), host.nbytes, prot=mmap.PROT_READ)
    return jax.device_put(
        np.frombuffer(mapped, host.dtype).reshape(host.shape), array.sharding if array.committed else None
    )


def _is_here(array: Any) -> bool:
    """Whether an array is whole on one CPU."""
    devices = array.devices() if isinstance(array, jax.Array) else set[Any]()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"
