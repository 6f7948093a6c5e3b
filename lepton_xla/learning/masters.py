"""Float weights between rounds: a NumPy archive without pickles that appears whole or not at all."""

from __future__ import annotations

import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lepton_xla.errors import LearningError, first_line
from lepton_xla.files.folders import flush

_DTYPES = "__dtypes__"
_DAMAGED = (zipfile.BadZipFile, zlib.error)


def write_master(path: pathlib.Path, weights: Mapping[str, Any]) -> None:
    """Write float weights by path.

    Raises:
        LearningError: if the disk refuses them; what was there stays.

    >>> write_master(pathlib.Path("master.npz"), {"w": jnp.ones((2,), "bfloat16")})
    >>> read_master(pathlib.Path("master.npz"))["w"].dtype
    dtype(bfloat16)
    """
    arrays = {name: np.asarray(leaf) for name, leaf in weights.items()}
    # NumPy's format has no narrow floats: their bits are stored.
    stored = {f"w:{name}": array.reshape(-1).view(np.uint8) for name, array in arrays.items()}
    told = json.dumps({name: [array.dtype.name, array.shape] for name, array in arrays.items()})
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, allow_pickle=False, **{_DTYPES: np.frombuffer(told.encode(), np.uint8)}, **stored)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise LearningError(f"{path} cannot be written: {first_line(error)}") from error


def read_master(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Read what `write_master` wrote.

    Raises:
        LearningError: if it is damaged.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as found:
            told = json.loads(found[_DTYPES].tobytes())
            return {
                name: found[f"w:{name}"].view(jnp.dtype(dtype)).reshape(shape) for name, (dtype, shape) in told.items()
            }
    # A wrong bit may also say that the archive is encrypted, or compressed in a way that Python does not know.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RuntimeError, *_DAMAGED) as error:
        raise LearningError(
            f"{path} is damaged ({first_line(error)}): remove the learner's folder to begin with the model's own "
            "weights"
        ) from error
