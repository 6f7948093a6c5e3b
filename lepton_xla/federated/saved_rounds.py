"""Checkpoints of a federated training: the server's state and reports, and what else a run keeps between rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.federated.aggregation import ServerState
from lepton_xla.federated.results import RoundReport
from lepton_xla.train.checkpoints import CheckpointFolder
from lepton_xla.trees import abstract


def save_rounds(
    folder: CheckpointFolder, state: ServerState, reports: Sequence[RoundReport], taken: Any, **arrays: Any
) -> None:
    """Save a round.

    Args:
        folder: an open folder.
        state: the state of the server after the round.
        reports: those of all rounds so far.
        taken: how often each client took part, as JSON.
        arrays: more to keep, trees of arrays by name.

    Raises:
        CheckpointError: if the folder cannot be written.
    """
    about = {"rounds": [each.to_dict() for each in reports], "taken": taken}
    folder.save(state.round, jax.tree.map(jnp.asarray, _arrays(state) | arrays), about)


def load_rounds(
    folder: CheckpointFolder, state: ServerState, **arrays: Any
) -> tuple[ServerState, list[RoundReport], Any, dict[str, Any]] | None:
    """Load what `save_rounds` saved last; None if there is nothing.

    Args:
        folder: an open folder.
        state: one of the same shapes.
        arrays: more that was saved, of the same shapes and names.

    Returns:
        The state, the reports, `taken`, and the arrays by name, of NumPy.

    Raises:
        CheckpointError: if the checkpoint is another run's, or cannot be read.
    """
    latest = folder.latest()
    if latest is None:
        return None
    about = folder.about(latest)
    found = jax.tree.map(np.asarray, folder.restore(latest, abstract(_arrays(state) | arrays)))
    restored = ServerState(latest, *(found.pop(name) for name in _arrays(state)))
    return restored, [RoundReport.of(each) for each in about["rounds"]], about["taken"], found


def _arrays(state: ServerState) -> dict[str, Any]:
    return {"weights": state.weights, "first": state.first, "second": state.second}
