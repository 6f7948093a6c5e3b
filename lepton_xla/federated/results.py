"""What a federated training gives: the program, and what happened in each round."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lepton_xla.errors import FederatedError
from lepton_xla.program import Program


@dataclasses.dataclass(frozen=True)
class RoundReport:
    """What happened in a round.

    Attributes:
        round: its number, from 1.
        clients: number of clients whose updates were taken.
        refused: client -> why its update was not taken.
        rows: rows of the clients that were taken.
        metrics: means of the clients' training metrics by their rows; empty with privacy.
        evaluation: what `evaluate` returned.
        bytes_up: bytes of the updates that clients sent.
        bytes_down: bytes of the weights that they got, float32.
        epsilon: what the rounds so far cost the client that took part most often; None without privacy.
        seconds: how long it took.

    >>> RoundReport.of({**RoundReport(1, 2, {}, 10, {}, {}, 8, 8, None, 0.5).to_dict()}).clients
    2
    """

    round: int
    clients: int
    refused: dict[str, str]
    rows: int
    metrics: dict[str, float]
    evaluation: dict[str, float]
    bytes_up: int
    bytes_down: int
    epsilon: float | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON's types."""
        return dataclasses.asdict(self)

    @staticmethod
    def of(found: Mapping[str, Any]) -> RoundReport:
        """From what `to_dict` gave."""
        return RoundReport(**found)


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of a federated training.

    Attributes:
        program: the program with the shared weights; it goes on to `lx.optimize`, `lx.tuning` and `lx.compile`.
        rounds: the report of each round.
        noise: the noise multiplier; None without privacy.
        personal: path -> the clients' own weights, `[clients, ...]`; of a simulation.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(2)}, {"x": lx.TensorSpec((2, 2), "float32")})
    >>> Result(program, (), None, {"w": np.zeros((3, 2, 2))}).program_of(1).weights["w"].tolist()
    [[0.0, 0.0], [0.0, 0.0]]
    """

    program: Program
    rounds: tuple[RoundReport, ...]
    noise: float | None = None
    personal: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict[str, np.ndarray])

    @property
    def epsilon(self) -> float | None:
        """What the training cost; None without privacy.

        >>> reports = (RoundReport(1, 2, {}, 10, {}, {}, 8, 8, 0.7, 0.5),)
        >>> Result(None, reports, 1.1).epsilon
        0.7
        """
        return self.rounds[-1].epsilon if self.rounds else None

    def program_of(self, client: int) -> Program:
        """The program with a client's own weights.

        Raises:
            FederatedError: if there is no such client, or clients have none of their own.
        """
        clients = len(next(iter(self.personal.values()), ()))
        if not 0 <= client < clients:
            raise FederatedError(f"client {client}: {clients} clients have weights of their own")
        own = {path: jnp.asarray(leaf[client]) for path, leaf in self.personal.items()}
        return self.program.replace(weights={**self.program.weights, **own})
