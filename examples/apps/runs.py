"""Trained weights, each in a file of its own, so that a run that was broken off need not train again."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def once(file: pathlib.Path, train: Callable[[], Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """What the file holds; without one, what `train` gives, which then becomes the file."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part.npz")
        np.savez(part, allow_pickle=False, **{path: np.asarray(leaf) for path, leaf in train().items()})
        part.rename(file)
    with np.load(file, allow_pickle=False) as known:
        return dict(known)
