"""Flower's two apps: what runs in a process of its own at the server, and in one at each client."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import pathlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from lepton_xla.errors import FederatedError, LeptonError, first_line
from lepton_xla.federated.client_rounds import Client
from lepton_xla.federated.coordination import Coordinator
from lepton_xla.federated.flower.messages import (
    flower,
    read_answer,
    read_task,
    write_answer,
    write_refusal,
    write_task,
)
from lepton_xla.federated.flower.secure import Workflow, answer_secure, is_secure
from lepton_xla.federated.members import Answer, Member, digest_of
from lepton_xla.federated.partitions import part_of, place_of
from lepton_xla.federated.results import RoundReport
from lepton_xla.federated.settings import Federation
from lepton_xla.federated.specs import FederatedSpec
from lepton_xla.modelspec import load_named
from lepton_xla.tables import printable
from lepton_xla.train.checkpoints import CheckpointFolder, Checkpoints

LOG = logging.getLogger(__name__)

_POLL_S = 0.5


# The client.


def make_client_app() -> Any:
    """The app of a client. Its node's configuration names the target and the folder, so the server knows neither.

    `target`: FILE.py:NAME of a FederatedSpec. `folder`: what it keeps. `part`: `K/N` takes the K-th of N parts of the
    rows, for trials; `concentration`: splits them by label. `most_epsilon`: of `Member`.
    """
    app = flower("clientapp").ClientApp()

    @app.train()
    def train(message: Any, context: Any) -> Any:  # pyright: ignore[reportUnusedFunction]
        _end_with_parent()
        return answer_message(message, context)

    return app


def answer_message(message: Any, context: Any) -> Any:
    """A client's reply to a message; it says so if it cannot take part.

    Raises:
        LeptonError: in secure aggregation, which takes a client that fails for one that has vanished.
    """
    if is_secure(message):
        node = message.metadata.dst_node_id
        return answer_secure(message, context, lambda vector, task: _take_part(vector, task, context.node_config, node))
    try:
        content = write_answer(_answer(message, context.node_config))
    except LeptonError as error:
        content = write_refusal(str(error))
    return flower("app").Message(content, reply_to=message)


def _answer(message: Any, config: Any) -> Answer:
    vector, task = read_task(message.content)
    return _take_part(vector, task, config, message.metadata.dst_node_id)


def _take_part(vector: np.ndarray, task: Any, config: Any, node: int) -> Answer:
    try:
        settings, round_, digest = Federation.of_json(str(task["settings"])), int(task["round"]), task["model"]
    except (KeyError, ValueError) as error:
        raise FederatedError(f"the server sent no task that this version understands: {first_line(error)}") from error
    target, folder = str(config["target"]), pathlib.Path(str(config["folder"]))
    most = config.get("most_epsilon")
    part, concentration = str(config.get("part", "")), float(config.get("concentration", 0.0))
    member = _member(target, folder, part, concentration, None if most is None else float(most))
    if digest != digest_of(Client(member.weights, settings)):
        raise FederatedError("the server's model has other weights than this client's: paths or shapes differ")
    # In a trial it is the client of this place in the simulation, whose rows come in the same order.
    number = place_of(part)[0] - 1 if part else node % (1 << 31)
    return member.answer(vector, settings, round_, number)


@functools.lru_cache(maxsize=8)
def _member(target: str, folder: pathlib.Path, part: str, concentration: float, most: float | None) -> Member:
    # Flower starts a process for each message; what XLA compiled for the last one is read again.
    jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    spec = load_named(target, FederatedSpec)
    if part:
        spec = spec.replace(rows=part_of(spec.table(), part, spec.label, concentration))
    return Member(spec, folder, most)


# The server.


def make_server_app() -> Any:
    """The app of the server. The run's configuration has `target`, `settings`, `folder`, `clients`, `wait_s`,
    `round_s`."""
    app = flower("serverapp").ServerApp()

    @app.main()
    def main(grid: Any, context: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        _end_with_parent()
        run_server(grid, context)

    return app


def run_server(grid: Any, context: Any) -> None:
    """Do all rounds, and write into the folder how each went (`rounds.jsonl`) and how it ended (`outcome.json`)."""
    config = context.run_config
    folder = pathlib.Path(str(config["folder"]))
    try:
        spec = load_named(str(config["target"]), FederatedSpec)
        settings = Federation.of_json(str(config["settings"]))
        coordinator = Coordinator(spec, settings)
        carrier = Carrier(grid, context, coordinator, settings)
        with CheckpointFolder(checkpoints(folder), coordinator.identity()) as saved:
            coordinator.run(carrier.ask, saved, functools.partial(_append, folder / "rounds.jsonl"))
        outcome: dict[str, Any] = {"error": None}
    except LeptonError as error:
        outcome = {"error": str(error)}
    beside = folder / "outcome.json.new"
    beside.write_text(json.dumps(outcome), encoding="utf-8")
    beside.replace(folder / "outcome.json")


def checkpoints(folder: pathlib.Path) -> Checkpoints:
    """Where the server of this folder saves its rounds."""
    return Checkpoints(folder / "checkpoints", every=1)


class Carrier:
    """Carries tasks to clients and answers back, over Flower's grid.

    Args:
        grid: Flower's.
        context: of the server app. In its configuration: `clients`, that must be connected before a round begins;
            `wait_s`, how long to wait for them; `round_s`, how long a client may take.
        coordinator: gives the digest of the model.
        settings: the settings.
    """

    def __init__(self, grid: Any, context: Any, coordinator: Coordinator, settings: Federation) -> None:
        self._grid, self._coordinator, self._settings = grid, coordinator, settings
        config = context.run_config
        self._clients, self._wait_s = int(config["clients"]), float(config["wait_s"])
        self._round_s = float(config["round_s"])
        self._secure = Workflow(grid, context, settings, self._round_s)

    def ask(self, round_: int, vector: np.ndarray) -> Iterator[tuple[str, Answer | str]]:
        """Send a round's task to the clients that take part; gives their answers, and who sent none."""
        chosen = self._choose(round_)
        task = {"settings": self._settings.to_json(), "round": round_, "model": self._coordinator.digest}
        if self._settings.secure:
            yield "all", self._secure.run(round_, vector, task, chosen)
            return
        content = write_task(vector, task)
        message = flower("app").Message
        # Flower counts how long a message is valid from here: an answer that comes later belongs to no round.
        tasks = [message(content, node, "train", ttl=self._round_s, group_id=str(round_)) for node in chosen]
        waiting = set(chosen)
        for reply in self._grid.send_and_receive(tasks, timeout=self._round_s):
            node = reply.metadata.src_node_id
            if reply.has_error() and node not in waiting:  # of Flower's server, about a node that it does not name
                LOG.warning("a message of round %d was not answered: %s", round_ + 1, reply.error.reason)
                continue
            waiting.discard(node)
            if reply.has_error():
                yield str(node), f"Flower says: {printable(reply.error.reason or reply.error.code)}"[:300]
            else:
                yield str(node), read_answer(reply.content, self._coordinator.shapes)
        for node in sorted(waiting):
            yield str(node), f"it sent nothing within {self._round_s:g} s"

    def _choose(self, round_: int) -> list[int]:
        end = time.monotonic() + self._wait_s
        while len(nodes := sorted(self._grid.get_node_ids())) < self._clients:
            if time.monotonic() > end:
                raise FederatedError(
                    f"{len(nodes)} of {self._clients} clients are connected after {self._wait_s:g} s; start the "
                    "others, or ask for fewer"
                )
            time.sleep(_POLL_S)
        count = max(self._settings.least_clients, math.ceil(self._settings.participation * len(nodes)))
        random = np.random.default_rng([self._settings.seed, 1, round_])
        return sorted(int(node) for node in random.permutation(np.asarray(nodes, np.uint64))[:count])


def _end_with_parent() -> None:
    """End this process when Flower's, which started it in a session of its own, was killed.

    Otherwise it would hold the folder of its training until Flower's client library gives up.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, name="lepton-parent", daemon=True).start()


def _append(path: pathlib.Path, done: RoundReport) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(done.to_dict()) + "\n")
        file.flush()
        os.fsync(file.fileno())
