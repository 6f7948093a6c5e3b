"""The server of a federation: its rounds, whoever carries the messages."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lepton_xla.errors import FederatedError
from lepton_xla.federated.accounting import calibrate_noise, epsilon
from lepton_xla.federated.aggregation import Mean, ServerState, move
from lepton_xla.federated.client_rounds import Client
from lepton_xla.federated.local_rounds import private_steps
from lepton_xla.federated.members import Answer, digest_of
from lepton_xla.federated.results import Result, RoundReport
from lepton_xla.federated.saved_rounds import load_rounds, save_rounds
from lepton_xla.federated.settings import Federation
from lepton_xla.federated.specs import FederatedSpec
from lepton_xla.train.checkpoints import CheckpointFolder
from lepton_xla.train.evaluations import Evaluation, Predictor

type Ask = Callable[[int, np.ndarray], Iterable[tuple[str, Answer | str]]]
"""`ask(round, vector) -> (client, its answer, or why there is none)`, each as it comes."""

# Rounds in a row without enough good updates, after which the training ends.
_FAILURES = 3
# Of a client's metrics: how many, and how long a name may be.
_MOST_METRICS, _MOST_NAME = 64, 64
_LARGEST = float(np.finfo(np.float32).max)


class Coordinator:
    """The server's side of a federated training.

    Args:
        spec: the model and its evaluation; the rows are not used.
        settings: the settings.

    Attributes:
        digest: what clients compare with their own model.
        shapes: name -> shape and dtype of each array of an update.

    >>> x = lx.TensorSpec(("batch", 2), "float32")
    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.zeros((2, 1))}, {"x": x})
    >>> server = Coordinator(lx.federated.FederatedSpec(program, {}), lx.federated.Federation(rounds=1))
    >>> one, gone = Answer({"values": np.float32([1.0, 2.0])}, 10, {}), "it sent nothing within 60 s"
    >>> result = server.run(lambda round_, vector: [("a", one), ("b", gone)])
    >>> result.program.weights["w"].ravel().tolist(), result.rounds[0].refused
    ([1.0, 2.0], {'b': 'it sent nothing within 60 s'})
    """

    def __init__(self, spec: FederatedSpec, settings: Federation) -> None:
        self._settings = settings
        self._model = spec.trained()
        weights = {**self._model.weights, **self._model.state}
        self._client = Client(weights, settings)
        self.digest = digest_of(self._client)
        self.shapes = self._client.codec.shapes
        self._state = ServerState.begin(weights, self._client.layout.length)
        self._noise = None if settings.privacy is None else calibrate_noise(settings, settings.rounds)
        self._evaluation = None if spec.evaluate is None else Evaluation(spec.evaluate, every=1)
        self._predictor = Predictor(self._model.program, None, lambda: None)
        self._taken: dict[str, int] = {}
        self._reports: list[RoundReport] = []

    def identity(self) -> dict[str, str]:
        """What must be equal for a saved run to go on."""
        settings = self._settings.replace(least_clients=1)
        named = {"settings": settings.to_json(), "model": self.digest}
        return {name: hashlib.sha256(value.encode()).hexdigest()[:16] for name, value in named.items()}

    def run(
        self, ask: Ask, folder: CheckpointFolder | None = None, report: Callable[[RoundReport], None] | None = None
    ) -> Result:
        """Do all rounds, or those that a folder lacks.

        Raises:
            FederatedError: if three rounds in a row got too few good updates; says why those of the last were refused.
        """
        if folder is not None:
            self._resume(folder)
        failures = 0
        while self._state.round < self._settings.rounds:
            done = self._advance(ask)
            failures = 0 if done.clients >= self._settings.least_clients else failures + 1
            if folder is not None:
                save_rounds(folder, self._state, self._reports, self._taken)
                folder.wait()  # a round costs its clients more than this costs the server
            if report is not None:
                report(done)
            if failures == _FAILURES:
                why = "; ".join(f"{client}: {reason}" for client, reason in done.refused.items()) or "nobody answered"
                raise FederatedError(
                    f"{_FAILURES} rounds in a row got fewer than {self._settings.least_clients} good updates: {why}"
                )
        return self.result()

    def result(self) -> Result:
        """The outcome so far."""
        weights = {path: jnp.asarray(leaf) for path, leaf in self._state.weights.items()}
        program = self._model.program.replace(weights={**self._model.program.weights, **weights})
        return Result(program, tuple(self._reports), self._noise)

    def _advance(self, ask: Ask) -> RoundReport:
        start = time.perf_counter()
        settings, client = self._settings, self._client
        vector = np.asarray(
            client.layout.flatten({path: jnp.asarray(leaf) for path, leaf in self._state.weights.items()})
        )
        mean = Mean(settings, client.layout.length)
        refused: dict[str, str] = {}
        sums: dict[str, float] = {}
        rows: dict[str, int] = {}  # of the clients that have the metric
        sent = 0
        for name, answer in ask(self._state.round, vector):
            if isinstance(answer, str):
                refused[name] = answer
                continue
            # A client has paid for what it sent, whether it is of use or not.
            self._taken[name] = self._taken.get(name, 0) + 1
            try:
                client.codec.check(answer.update)
                metrics = _usable(answer.metrics)
                sent += client.codec.size_bytes if answer.size_bytes is None else answer.size_bytes
                mean.add(name, np.asarray(client.codec.decode(answer.update)), answer.rows, answer.clients)
            except FederatedError as error:
                refused[name] = str(error)
                continue
            for metric, value in metrics.items():
                sums[metric] = sums.get(metric, 0.0) + value * answer.rows
                rows[metric] = rows.get(metric, 0) + answer.rows
        moved = mean.result()
        if moved is None:
            self._state = ServerState(self._state.round + 1, self._state.weights, self._state.first, self._state.second)
        else:
            self._state = move(self._state, moved, client.layout, settings)
        metrics = {name: total / rows[name] for name, total in sums.items()}
        evaluation = {}
        if self._evaluation is not None and not client.personal:
            evaluation = self._evaluation.run(self._predictor(self._state.weights))
        asked = mean.clients + len(refused)
        done = RoundReport(
            self._state.round, mean.clients, refused, mean.rows, metrics, evaluation, sent,
            asked * 4 * client.layout.length, self._spent(), time.perf_counter() - start,
        )  # fmt: skip
        self._reports.append(done)
        return done

    def _spent(self) -> float | None:
        if self._settings.privacy is None:
            return None
        assert self._noise is not None
        most = max(self._taken.values(), default=0)
        return epsilon(self._settings.privacy, self._noise, most * private_steps(self._settings))

    def _resume(self, folder: CheckpointFolder) -> None:
        found = load_rounds(folder, self._state)
        if found is not None:
            self._state, self._reports, taken, _ = found
            self._taken = dict(taken)


def _usable(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics that came from elsewhere, as they go into means, reports and checkpoints.

    One that is NaN or beyond float32 is left out: a client may have no row of a class, and its update is right.

    Raises:
        FederatedError: if they are too many, or one has a name that nobody would print or is no number.
    """
    if len(metrics) > _MOST_METRICS:
        raise FederatedError(f"it sent {len(metrics)} metrics; expected at most {_MOST_METRICS}")
    for name, value in metrics.items():
        if len(name) > _MOST_NAME or not name.isprintable():
            raise FederatedError(f"it sent a metric named {name[:_MOST_NAME]!r}")
        if not isinstance(value, int | float):
            raise FederatedError(f"its metric {name!r} is {str(value)[:_MOST_NAME]}, which is no number")
    return {name: value for name, value in metrics.items() if abs(value) <= _LARGEST}  # NaN is not
