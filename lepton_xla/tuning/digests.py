"""Digests that tell what a journal, a study or a certificate is of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


def digest_of(batches: Iterable[Mapping[str, Any]], *, before: str = "", after: str = "") -> str:
    """SHA-256 of arrays: of their names, dtypes, shapes and elements, in order.

    Args:
        batches: arrays by name.
        before, after: text that is in the digest too.

    >>> digest_of([{"x": np.zeros(2)}]) == digest_of([{"x": np.zeros((2, 1))}])
    False
    """
    found = hashlib.sha256(before.encode())
    for batch in batches:
        for name, value in batch.items():
            array = np.asarray(value)
            found.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    found.update(after.encode())
    return found.hexdigest()
