"""A federation in one process: its clients are spread over devices, several clients a device."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from lepton_xla.arguments import takes
from lepton_xla.federated.accounting import calibrate_noise, epsilon
from lepton_xla.federated.aggregation import ServerState, move
from lepton_xla.federated.client_rounds import Client
from lepton_xla.federated.local_rounds import make_local_round, private_steps
from lepton_xla.federated.participation import most_participants, most_participations, participants
from lepton_xla.federated.partitions import Rows, stack
from lepton_xla.federated.results import Result, RoundReport
from lepton_xla.federated.saved_rounds import load_rounds, save_rounds
from lepton_xla.federated.settings import Federation
from lepton_xla.federated.specs import FederatedSpec
from lepton_xla.train.checkpoints import CheckpointFolder, Checkpoints
from lepton_xla.train.evaluations import Evaluation, Predictor
from lepton_xla.train.preemption import Preempted, Preemption

_AXIS = "clients"


@takes(spec=FederatedSpec)
def simulate(
    spec: FederatedSpec,
    clients: Sequence[Rows],
    federation: Federation | None = None,
    *,
    checkpoint: Checkpoints | None = None,
    devices: Sequence[Any] | None = None,
    report: Callable[[RoundReport], None] | None = None,
) -> Result:
    """Train with many clients in this process, as they would with a server and a process each.

    A client's round is the same pure function in both. Here it runs under `shard_map` over an axis of clients, one
    after another on each device, and only the clients that take part are computed. Secure aggregation is left out: the
    sum is the same.

    Args:
        spec: the model, its loss and optimizer. Its own rows are not used.
        clients: the rows of each client, columns of equal names, shapes and dtypes; `partition` makes them of a table.
        federation: the settings; by default the spec's.
        checkpoint: where rounds are saved, each `every`; a run that was interrupted goes on with the same result.
        devices: the devices; by default all of this process.
        report: called after each round.

    Returns:
        The program and the report of each round.

    Raises:
        FederatedError: if clients' rows differ in names, shapes or dtypes, the settings do not fit, or privacy's budget
            cannot be kept.
        ModelError: if the model cannot be trained.
        CheckpointError: if the folder is another run's, is in use, or cannot be read.
        Preempted: after SIGTERM, when the round is saved; a `SystemExit` with code 75.

    >>> x = lx.TensorSpec(("batch", 2), "float32")
    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.zeros((2, 2))}, {"x": x})
    >>> rows = {"x": np.tile(np.eye(2, dtype=np.float32), (8, 1)), "label": np.tile(np.int32([0, 1]), 8)}
    >>> spec = lx.federated.FederatedSpec(program, rows)
    >>> settings = lx.federated.Federation(rounds=3, batch_rows=4, updates="int8")
    >>> result = lx.federated.simulate(spec, lx.federated.partition(rows, 4), settings)
    >>> result.rounds[-1].clients, result.rounds[-1].metrics["accuracy"]
    (4, 1.0)
    """
    return Simulation(spec, clients, federation or spec.federation, devices).run(checkpoint, report)


class Simulation:
    """One call of `simulate`."""

    def __init__(
        self, spec: FederatedSpec, clients: Sequence[Rows], settings: Federation, devices: Sequence[Any] | None
    ) -> None:
        self._settings, self._clients = settings, len(clients)
        self._columns, self._counts = stack(clients)
        self._model = spec.trained()
        weights = {**self._model.weights, **self._model.state}
        self._client = Client(weights, settings)
        self._noise: float | None = None
        if settings.privacy is not None:
            self._noise = calibrate_noise(settings, most_participations(settings, self._clients))
        self._state = ServerState.begin(weights, self._client.layout.length)
        kept = self._client.begin(weights)
        self._kept = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf)[None], self._clients, 0), kept)
        self._taken = np.zeros(self._clients, np.int64)
        self._reports: list[RoundReport] = []
        self._mesh, self._many = self._compiled(spec, devices)
        evaluate = spec.evaluate
        self._evaluation = None if evaluate is None else Evaluation(evaluate, every=1)
        self._predictor = Predictor(self._model.program, None, lambda: None)

    def run(self, checkpoint: Checkpoints | None, report: Callable[[RoundReport], None] | None) -> Result:
        """Do all rounds."""
        if checkpoint is None:
            self._rounds(None, report)
            return self._result()
        with CheckpointFolder(checkpoint, self._identity()) as folder, Preemption() as preemption:
            self._resume(folder)
            self._rounds(folder, report, preemption)
            folder.wait()
        return self._result()

    def _rounds(
        self,
        folder: CheckpointFolder | None,
        report: Callable[[RoundReport], None] | None,
        preemption: Preemption | None = None,
    ) -> None:
        while self._state.round < self._settings.rounds:
            if folder is not None and preemption is not None and preemption.requested(self._state.round):
                self._save(folder)
                folder.wait()
                raise Preempted(self._state.round)
            self._advance()
            done = self._state.round
            if folder is not None and (done % folder.every == 0 or done == self._settings.rounds):
                self._save(folder)
            if report is not None:
                report(self._reports[-1])

    def _advance(self) -> None:
        start = time.perf_counter()
        chosen = participants(self._settings, self._clients, self._state.round)
        devices = self._mesh.size
        slots = -(-most_participants(self._settings, self._clients) // devices) * devices
        # Padding is a client without rows.
        places = np.concatenate([chosen, np.zeros(slots - len(chosen), chosen.dtype)])
        counts = np.where(np.arange(slots) < len(chosen), self._counts[places], 0).astype(np.int32)
        data = {"rows": {name: column[places] for name, column in self._columns.items()}, "count": counts}
        key = jax.random.fold_in(jax.random.key(self._settings.seed), self._state.round)
        kept = jax.tree.map(lambda leaf: leaf[places], self._kept)
        found = jax.device_get(self._many(self._state.weights, kept, data, places.astype(np.int32), key))
        total, rows, metrics, kept, good = found
        self._kept = jax.tree.map(lambda all_, new: _put(all_, chosen, new), self._kept, kept)
        self._taken[chosen] += 1
        taken = int(good[: len(chosen)].sum())
        if taken >= self._settings.least_clients:
            mean = np.asarray(total, np.float64) / float(rows)
            self._state = move(self._state, mean, self._client.layout, self._settings)
        else:
            self._state = dataclasses.replace(self._state, round=self._state.round + 1)
        refused = {
            str(client): "its update holds NaN or infinity"
            for client, one in zip(chosen, good[: len(chosen)], strict=True)
            if not one
        }
        means = {name: float(value) / max(float(rows), 1.0) for name, value in metrics.items()}
        self._report(len(chosen), taken, refused, int(rows), means, start)

    def _report(
        self, sent: int, taken: int, refused: dict[str, str], rows: int, metrics: dict[str, float], start: float
    ) -> None:
        privacy, spent = self._settings.privacy, None
        if privacy is not None:
            assert self._noise is not None
            spent = epsilon(privacy, self._noise, int(self._taken.max()) * private_steps(self._settings))
        self._reports.append(
            RoundReport(
                self._state.round, taken, refused, rows, metrics, self._evaluate(),
                sent * self._client.codec.size_bytes, sent * 4 * self._client.layout.length, spent,
                time.perf_counter() - start,
            )
        )  # fmt: skip

    def _evaluate(self) -> dict[str, float]:
        if self._evaluation is None:
            return {}
        if not self._client.personal:
            return self._evaluation.run(self._predictor(self._state.weights))
        if self._state.round < self._settings.rounds:
            return {}  # as many evaluations as there are clients
        own = [{path: leaf[client] for path, leaf in self._kept["personal"].items()} for client in range(self._clients)]
        found = [self._evaluation.run(self._predictor({**self._state.weights, **each})) for each in own]
        return {name: float(np.mean([each[name] for each in found])) for name in found[0]}

    def _result(self) -> Result:
        weights = {path: jnp.asarray(leaf) for path, leaf in self._state.weights.items()}
        program = self._model.program.replace(weights={**self._model.program.weights, **weights})
        return Result(program, tuple(self._reports), self._noise, dict(self._kept["personal"]))

    # The computation of a round.

    def _compiled(self, spec: FederatedSpec, devices: Sequence[Any] | None) -> tuple[Mesh, Any]:
        local = list(jax.local_devices() if devices is None else devices)
        used = local[: most_participants(self._settings, self._clients)]
        mesh = jax.make_mesh((len(used),), (_AXIS,), devices=used, axis_types=(jax.sharding.AxisType.Auto,))
        local_round = make_local_round(
            self._model, spec.loss_of(self._model), spec.optimizer, self._settings, noise=self._noise or 0.0
        )
        client_round = self._client.make_round(local_round)
        codec, most_norm = self._client.codec, self._settings.most_norm

        def one(shared: Any, total: Any, each: Any) -> Any:
            kept, data, key = each
            update, kept, n, metrics = client_round(shared, kept, data, key)
            vector = codec.decode(update)
            good = (n > 0) & (metrics.pop("finite") > 0) & jnp.isfinite(vector).all()
            if most_norm is not None:
                vector = vector * jnp.minimum(1.0, most_norm / jnp.maximum(jnp.linalg.norm(vector), 1e-30))
            weight = jnp.where(good, n, 0).astype(jnp.float32)
            weighted = jax.tree.map(
                lambda sum_, leaf: sum_ + jnp.where(good, leaf, 0) * weight, total[0], (vector, metrics)
            )
            return (weighted, total[1] + weight), (kept, good)

        def per_device(shared: Any, kept: Any, data: Any, clients: Any, key: Any) -> Any:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, clients)
            each = (kept, data, keys)
            first = jax.tree.map(lambda leaf: leaf[0], each)
            shapes = jax.eval_shape(client_round, shared, *first)[3]
            zeros = {name: jnp.zeros((), jnp.float32) for name in shapes if name != "finite"}
            begin = ((jnp.zeros(self._client.layout.length, jnp.float32), zeros), jnp.zeros((), jnp.float32))
            ((vector, metrics), rows), (kept, good) = lax.scan(lambda *args: one(shared, *args), begin, each)
            vector, metrics, rows = lax.psum((vector, metrics, rows), _AXIS)
            return vector, rows, metrics, kept, good

        whole, split = PartitionSpec(), PartitionSpec(_AXIS)
        many = jax.shard_map(
            per_device,
            mesh=mesh,
            in_specs=(whole, split, split, split, whole),
            out_specs=(whole, whole, whole, split, split),
            check_vma=False,
        )
        return mesh, jax.jit(many)

    # Checkpoints.

    def _identity(self) -> dict[str, str]:
        settings = self._settings.replace(rounds=1, least_clients=1)
        shapes = sorted((path, leaf.shape, str(leaf.dtype)) for path, leaf in self._state.weights.items())
        rows = sorted((name, column.shape, str(column.dtype)) for name, column in self._columns.items())
        named = {
            "settings": (settings.to_json(), self._noise), "model": shapes, "clients": (rows, self._counts.tolist()),
        }  # fmt: skip
        return {name: hashlib.sha256(repr(value).encode()).hexdigest()[:16] for name, value in named.items()}

    def _save(self, folder: CheckpointFolder) -> None:
        save_rounds(folder, self._state, self._reports, self._taken.tolist(), kept=self._kept)

    def _resume(self, folder: CheckpointFolder) -> None:
        found = load_rounds(folder, self._state, kept=self._kept)
        if found is not None:
            self._state, self._reports, taken, arrays = found
            self._taken, self._kept = np.asarray(taken, np.int64), arrays["kept"]


def _put(everyone: np.ndarray, chosen: np.ndarray, new: np.ndarray) -> np.ndarray:
    after = everyone.copy()
    after[chosen] = new[: len(chosen)]
    return after
