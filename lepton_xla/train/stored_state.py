"""The state of a run as Orbax writes it: its leaves, how they are described, and their checksums."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any, override

import jax
import orbax.checkpoint as ocp
from etils import epath

from lepton_xla.errors import CheckpointError
from lepton_xla.train.checksums import write_checksums
from lepton_xla.trees import name_leaves

# TensorStore's zarr has no such arrays.
_NOT_STORED = ("uint2", "uint4")


def describe(tree: Any) -> dict[str, str]:
    """Dtype and shape of each leaf.

    Raises:
        CheckpointError: if a leaf cannot be stored.

    >>> describe({"w": jnp.zeros((2, 3))})
    {'w': 'float32[2, 3]'}
    """
    leaves = name_leaves(tree, single="state")
    for name, leaf in leaves.items():
        if str(leaf.dtype) in _NOT_STORED:
            raise CheckpointError(f"{name!r} is {leaf.dtype}, which a checkpoint cannot hold; make it uint8")
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}


def without_empty(tree: Any) -> Any:
    """A tree without its arrays of no elements, which Orbax refuses to save."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, tree)


def digest(about: Mapping[str, Any]) -> str:
    """The SHA-256 of a description."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


class StateHandler(ocp.StandardCheckpointHandler):
    """Orbax's handler of trees; it adds checksums before the checkpoint is complete."""

    @override
    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        write_checksums(pathlib.Path(directory))


@ocp.args.register_with_handler(StateHandler, for_save=True)
@dataclasses.dataclass
class StateSave(ocp.args.StandardSave):
    """Orbax finds a handler by the type of its arguments."""


@ocp.args.register_with_handler(StateHandler, for_restore=True)
@dataclasses.dataclass
class StateRestore(ocp.args.StandardRestore):
    """As `StateSave`."""
