"""A client of a federation: its own rows, and a folder with what it keeps between rounds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import secrets
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.errors import FederatedError, first_line
from lepton_xla.federated.accounting import calibrate_noise, epsilon
from lepton_xla.federated.client_rounds import Client, Kept
from lepton_xla.federated.local_rounds import make_local_round, private_steps
from lepton_xla.federated.settings import Federation
from lepton_xla.federated.specs import FederatedSpec

_FILE = "kept.npz"


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a client sends after a round.

    Attributes:
        update: the arrays of its update, NumPy, see `Codec`.
        rows: its number of rows.
        metrics: means of its training metrics; empty with privacy.
        clients: number of clients whose mean it is; more than one with secure aggregation.
        size_bytes: bytes that were sent, if other than those of the update.

    >>> Answer({"values": np.zeros(2, np.float32)}, 10, {"loss": 0.5}).rows
    10
    """

    update: Mapping[str, Any]
    rows: int
    metrics: Mapping[str, float]
    clients: int = 1
    size_bytes: int | None = None


class Member:
    """A client. It may be killed at any time: what it keeps is written before its answer leaves.

    Args:
        spec: model, loss, optimizer and this client's rows.
        folder: its own; it is made if it is missing.
        most_epsilon: it takes part only with differential privacy of at most this budget; None for any settings.

    Attributes:
        weights: path -> array of the model, before any round.

    >>> x = lx.TensorSpec(("batch", 2), "float32")
    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.zeros((2, 2))}, {"x": x})
    >>> rows = {"x": np.eye(2, dtype=np.float32), "label": np.int32([0, 1])}
    >>> member = Member(lx.federated.FederatedSpec(program, rows), "kept")
    >>> answer = member.answer(np.zeros(4, np.float32), lx.federated.Federation(batch_rows=2), round_=0, number=0)
    >>> answer.rows, (answer.update["values"] > 0).tolist()
    (2, [True, False, False, True])
    """

    def __init__(self, spec: FederatedSpec, folder: str | os.PathLike[str], most_epsilon: float | None = None) -> None:
        self._most_epsilon = most_epsilon
        self._spec = spec
        self._model = spec.trained()
        self.weights = {**self._model.weights, **self._model.state}
        self._rows = spec.table()
        self._path = pathlib.Path(folder) / _FILE
        self._rounds: dict[str, Any] = {}

    def answer(self, vector: np.ndarray, settings: Federation, round_: int, number: int) -> Answer:
        """Take part in a round.

        A round that comes again, because the server went back to a checkpoint, begins with what was kept before it; its
        privacy is paid for again.

        Args:
            vector: the shared weights, as `layout` orders them, float32.
            settings: the server's.
            round_: its number, from 0.
            number: of this client, for the orders of its rows.

        Raises:
            FederatedError: if the weights do not fit the model, the privacy's budget is used up or its settings have
                changed, the folder cannot be used, or the round came to something that is not finite.
        """
        client = Client(self.weights, settings)
        given = np.asarray(vector)
        if given.shape != (client.layout.length,) or given.dtype != np.float32:
            raise FederatedError(
                f"the server sent {given.dtype}{list(given.shape)} of weights, and this model shares "
                f"float32[{client.layout.length}]; both need the same model and the same personal weights"
            )
        about, before = self._read(client, round_)
        noise = self._pay(settings, about)
        parts = client.layout.unflatten(given)
        shared = {
            path: jnp.asarray(parts[path]).astype(leaf.dtype) if path in parts else leaf
            for path, leaf in self.weights.items()
        }
        data = {"rows": self._rows, "count": jnp.int32(len(next(iter(self._rows.values()))))}
        run = self._compiled(client, settings, noise)
        update, kept, rows, metrics = jax.device_get(run(shared, before, data, self._key(settings, round_, number)))
        finite = bool(metrics.pop("finite"))
        self._write({**about, "round": round_}, kept, before)
        if not finite:
            raise FederatedError("training came to NaN or infinity: look at the rows, or lower the learning rate")
        return Answer(update, int(rows), {name: float(value) for name, value in metrics.items()})

    def _key(self, settings: Federation, round_: int, number: int) -> jax.Array:
        if settings.privacy is not None:
            # Noise that the server could compute would hide nothing from it.
            return jax.random.wrap_key_data(jnp.asarray(np.frombuffer(secrets.token_bytes(8), np.uint32)))
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(settings.seed), round_), number)

    def _compiled(self, client: Client, settings: Federation, noise: float) -> Any:
        name = f"{settings.to_json()} {noise}"
        if name not in self._rounds:
            spec = self._spec
            made = make_local_round(self._model, spec.loss_of(self._model), spec.optimizer, settings, noise=noise)
            self._rounds = {name: jax.jit(client.make_round(made))}
        return self._rounds[name]

    def _pay(self, settings: Federation, about: dict[str, Any]) -> float:
        """Count a round against the budget of privacy; gives the noise. The client trusts its own count alone."""
        privacy, most = settings.privacy, self._most_epsilon
        if most is not None and (privacy is None or privacy.epsilon > most):
            asked = "no privacy" if privacy is None else f"epsilon = {privacy.epsilon:g}"
            raise FederatedError(
                f"privacy: this client takes part with epsilon up to {most:g}; the server asks for {asked}"
            )
        if privacy is None and "privacy" not in about:
            return 0.0
        terms: dict[str, Any] | None = None
        if privacy is not None:
            terms = {"rounds": settings.rounds, "epochs": settings.epochs, **dataclasses.asdict(privacy)}
        if about.setdefault("privacy", terms) != terms or privacy is None:
            raise FederatedError(
                f"privacy: the server now asks for {terms or 'none'}, and rounds before were under {about['privacy']}; "
                "what was spent cannot be added up, so begin anew with an empty folder and other rows"
            )
        noise = calibrate_noise(settings, settings.rounds)
        taken = about.get("taken", 0) + 1
        costs = epsilon(privacy, noise, taken * private_steps(settings))
        if costs > privacy.epsilon * (1 + 1e-6):
            raise FederatedError(
                f"privacy: round {taken} of this client would cost epsilon = {costs:.3g}, more than its budget of "
                f"{privacy.epsilon:g}; it takes part no more"
            )
        about["taken"] = taken
        # Written before anything is computed: a client that is killed has paid.
        self._save(about)
        return noise

    # What is kept.

    def _read(self, client: Client, round_: int) -> tuple[dict[str, Any], Kept]:
        fresh = client.begin(self.weights)
        about, arrays = self._load()
        names = _named(fresh)
        # Of a round that comes again; a folder may also be of other settings, such as another format of updates.
        which = "before" if about.get("round") == round_ else "after"
        found = {name: arrays.get(f"{which}:{name}") for name in names}
        if any(leaf is None or leaf.shape != names[name].shape for name, leaf in found.items()):
            if client.personal and any(name.startswith("after:personal") for name in arrays):
                raise FederatedError(f"{self._path} has personal weights of another model; give an empty folder")
            return about, fresh
        return about, {
            "residual": jnp.asarray(found["residual"]),
            "personal": {
                path: jnp.asarray(found[f"personal:{path}"]).astype(leaf.dtype)
                for path, leaf in fresh["personal"].items()
            },
        }

    def _load(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        if not self._path.exists():
            return {}, {}
        try:
            with self._path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            return json.loads(arrays.pop("about").tobytes()), arrays
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise FederatedError(f"{self._path} cannot be read: {first_line(error)}; give an empty folder") from error

    def _write(self, about: dict[str, Any], after: Kept, before: Kept) -> None:
        arrays = {f"after:{name}": leaf for name, leaf in _named(after).items()}
        self._save(about, arrays | {f"before:{name}": leaf for name, leaf in _named(before).items()})

    def _save(self, about: dict[str, Any], arrays: Mapping[str, Any] | None = None) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            kept = self._load()[1] if arrays is None else arrays
            beside = self._path.with_name(f"{_FILE}.{os.getpid()}")
            with beside.open("wb") as file:
                named: dict[str, Any] = {name: np.asarray(leaf, np.float32) for name, leaf in kept.items()}
                np.savez(file, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **named)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._path)
        except OSError as error:
            raise FederatedError(f"{self._path} cannot be written: {first_line(error)}") from error


def digest_of(client: Client) -> str:
    """What server and clients must have in common: paths and shapes of the shared weights.

    >>> one = Client({"w": jnp.zeros(2)}, lx.federated.Federation())
    >>> digest_of(one) == digest_of(Client({"v": jnp.zeros(2)}, lx.federated.Federation()))
    False
    """
    return hashlib.sha256(repr(sorted(client.layout.shapes.items())).encode()).hexdigest()[:16]


def _named(kept: Kept) -> dict[str, Any]:
    return {"residual": kept["residual"], **{f"personal:{path}": leaf for path, leaf in kept["personal"].items()}}
