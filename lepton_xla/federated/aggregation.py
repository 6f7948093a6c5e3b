"""What the server does: takes good updates, averages them, and moves the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lepton_xla.adjustments import move_weights
from lepton_xla.errors import FederatedError
from lepton_xla.federated.settings import Federation
from lepton_xla.federated.updates import Layout

# Of FedAdam: the second decay, and what is added to the root.
_SECOND_DECAY, _TAU = 0.99, 1e-3


@dataclasses.dataclass(frozen=True)
class ServerState:
    """The weights of the server, and what its rule remembers.

    Attributes:
        round: rounds that are done.
        weights: path -> array: those that clients train, and the model's state.
        first: vector, float32: decaying sum or mean of the moves; zeros before any.
        second: vector, float32: decaying mean of their squares; zeros before any.

    >>> ServerState.begin({"w": np.zeros(2, np.float32)}, 2).first.tolist()
    [0.0, 0.0]
    """

    round: int
    weights: dict[str, np.ndarray]
    first: np.ndarray
    second: np.ndarray

    @staticmethod
    def begin(weights: Mapping[str, Any], length: int) -> ServerState:
        """The state before the first round, for vectors of this length."""
        arrays = {path: np.asarray(leaf) for path, leaf in weights.items()}
        return ServerState(0, arrays, np.zeros(length, np.float32), np.zeros(length, np.float32))


def move(state: ServerState, mean: np.ndarray, layout: Layout, settings: Federation) -> ServerState:
    """Do a round: `theta <- theta + alpha (theta* - theta)`, by the rule that a server of a model follows too.

    Args:
        state: the state.
        mean: vector, the weighted mean of the clients' changes.
        layout: of the vector.
        settings: the rule, `alpha` and `momentum`.

    Raises:
        InputError: if a weight or the mean is NaN.

    >>> state, layout = ServerState.begin({"w": np.float32([1.0, 2.0])}, 2), Layout({"w": np.zeros(2)})
    >>> move(state, np.array([2.0, 0.0]), layout, lx.federated.Federation(alpha=0.5)).weights["w"].tolist()
    [2.0, 2.0]
    """
    step = np.asarray(mean, np.float64)
    first, second = state.first.astype(np.float64), state.second.astype(np.float64)
    if settings.rule == "momentum":
        first = settings.momentum * first + step
        step = first
    elif settings.rule == "adam":
        first = settings.momentum * first + (1 - settings.momentum) * step
        second = _SECOND_DECAY * second + (1 - _SECOND_DECAY) * np.square(step)
        step = first / (np.sqrt(second) + _TAU)
    target = dict(state.weights)
    for path, change in layout.unflatten(step).items():
        own = state.weights[path]
        target[path] = (own.astype(np.float64) + change).astype(own.dtype)
    moved = move_weights(state.weights, target, settings.alpha)
    # As checkpoints keep them, so that a run that goes on computes the same.
    return ServerState(state.round + 1, moved, first.astype(np.float32), second.astype(np.float32))


class Mean:
    """The weighted mean of updates as they come; each is checked first.

    Args:
        settings: `most_rows`, `most_norm` and `least_clients` count.
        length: of the vectors.

    Attributes:
        rows: rows of the clients that were taken.
        clients: number of those clients.

    >>> mean = Mean(lx.federated.Federation(), 2)
    >>> mean.add("a", np.float32([1.0, 0.0]), 1)
    >>> mean.add("b", np.float32([4.0, 3.0]), 2)
    >>> mean.result().tolist()
    [3.0, 2.0]
    >>> mean.add("b", np.float32([4.0, 3.0]), 2)
    Traceback (most recent call last):
    lepton_xla.errors.FederatedError: it has sent an update of this round before
    """

    def __init__(self, settings: Federation, length: int) -> None:
        self._settings = settings
        self._sum = np.zeros(length)
        self._names: set[str] = set()
        self.rows = self.clients = 0

    def add(self, client: str, vector: Any, rows: int, clients: int = 1) -> None:
        """Take an update, or the mean of the updates of several clients.

        Raises:
            FederatedError: if the client has sent one, the vector has another length or is not finite, or the number of
                rows is out of bounds. Nothing was taken then.
        """
        if client in self._names:
            raise FederatedError("it has sent an update of this round before")
        if (
            isinstance(rows, bool)
            or not isinstance(rows, int | np.integer)
            or not 1 <= rows <= self._settings.most_rows * clients
        ):
            raise FederatedError(f"it says it has {str(rows)[:80]} rows; expected 1 to {self._settings.most_rows}")
        values = np.asarray(vector, np.float64)
        if values.shape != self._sum.shape:
            raise FederatedError(f"the update has the shape {list(values.shape)}; expected {list(self._sum.shape)}")
        if not np.isfinite(values).all():
            raise FederatedError("the update holds NaN or infinity")
        self._sum += int(rows) * clipped(values, self._settings.most_norm)
        self.rows += int(rows)
        self.clients += clients
        self._names.add(client)

    def result(self) -> np.ndarray | None:
        """The mean, float64; None if too few clients were taken."""
        return self._sum / self.rows if self.clients >= self._settings.least_clients else None


def clipped(vector: Any, most_norm: float | None) -> Any:
    """Scale a vector of NumPy down to this norm, if it is larger.

    >>> clipped(np.array([3.0, 4.0]), 2.5).tolist()
    [1.5, 2.0]
    """
    norm = float(np.linalg.norm(vector))
    return vector if most_norm is None or norm <= most_norm else vector * (most_norm / norm)
