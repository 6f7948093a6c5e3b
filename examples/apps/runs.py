"""What was trained and what was measured, each in a file of its own: a run that was broken off goes on where it was."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import lepton_xla


def once(file: pathlib.Path, train: Callable[[], Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """What the file holds; without one, what `train` gives, which then becomes the file."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part.npz")
        np.savez(part, allow_pickle=False, **{path: np.asarray(leaf) for path, leaf in train().items()})
        part.rename(file)
    with np.load(file, allow_pickle=False) as known:
        return dict(known)


@functools.cache
def code() -> str:
    """A digest of all that measures: the applications and the package as they are now, and JAX's version."""
    digest = hashlib.sha256(jax.__version__.encode())
    for root in (pathlib.Path(__file__).resolve().parent, pathlib.Path(lepton_xla.__file__).resolve().parent):
        for file in sorted(each for kind in ("*.py", "*.json") for each in root.rglob(kind)):
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def measured(
    file: pathlib.Path, known: Any, measure: Callable[[], Mapping[str, Any]], made: Sequence[pathlib.Path] = ()
) -> dict[str, Any]:
    """What the file says of a measurement; measured, if it does not say it of this.

    Args:
        file: of one measurement, JSON.
        known: what the figures depend on beside the code, such as how long was trained: JSON.
        measure: gives the figures, as JSON.
        made: files that measuring makes too, without which it is done again.
    """
    of = hashlib.sha256(json.dumps([code(), known], sort_keys=True).encode()).hexdigest()
    if file.exists() and all(each.exists() for each in made):
        kept = json.loads(file.read_text())
        if kept["of"] == of:
            print(f"  {file.stem}: as measured before", flush=True)
            return kept["figures"]
    file.unlink(missing_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"of": of, "figures": dict(measure())})
    part = file.with_suffix(".part")
    part.write_text(text)
    os.replace(part, file)
    return json.loads(text)["figures"]
