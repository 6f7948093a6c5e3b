"""Which clients take part in a round of a simulation."""

from __future__ import annotations

import math

import numpy as np

from lepton_xla.federated.settings import Federation


def participants(settings: Federation, clients: int, round_: int) -> np.ndarray:
    """The clients of a round, sorted: drawn without replacement until each has taken part once, then anew.

    So how often a client takes part is known beforehand, which the accounting of privacy needs.

    >>> settings = lx.federated.Federation(participation=0.5)
    >>> sorted([*participants(settings, 4, 0), *participants(settings, 4, 1)]) == [0, 1, 2, 3]
    True
    """
    cycle = _cycle(settings, clients)
    random = np.random.default_rng([settings.seed, 1, round_ // cycle])
    return np.sort(np.array_split(random.permutation(clients), cycle)[round_ % cycle])


def most_participations(settings: Federation, clients: int) -> int:
    """How often a client takes part at most.

    >>> most_participations(lx.federated.Federation(rounds=5, participation=0.5), 4)
    3
    """
    return math.ceil(settings.rounds / _cycle(settings, clients))


def most_participants(settings: Federation, clients: int) -> int:
    """How many clients take part in a round at most.

    >>> most_participants(lx.federated.Federation(participation=0.5), 5)
    3
    """
    return math.ceil(clients / _cycle(settings, clients))


def _cycle(settings: Federation, clients: int) -> int:
    """Rounds until each client has taken part once."""
    return min(clients, max(1, round(1 / settings.participation)))
