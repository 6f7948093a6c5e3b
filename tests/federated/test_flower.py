"""Server and clients over Flower's messages: in this process, and as real processes over loopback with TLS."""

import copy
import importlib
import io
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import fleets
import jax
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.federated import Federation, simulate
from lepton_xla.federated.coordination import Coordinator
from lepton_xla.federated.flower import messages
from lepton_xla.federated.flower.processes import tls_of_server
from lepton_xla.federated.members import Answer, Member
from lepton_xla.train.checkpoints import CheckpointFolder, Checkpoints


def uneven(*sizes):
    rows = fleets.table(sum(sizes))
    ends = np.cumsum(sizes)
    return [
        {name: column[end - size : end] for name, column in rows.items()} for size, end in zip(sizes, ends, strict=True)
    ]


def members(tmp_path, clients):
    return [Member(fleets.spec().replace(rows=rows), tmp_path / str(index)) for index, rows in enumerate(clients)]


def asking(found, settings):
    def ask(round_, vector):
        for index, member in enumerate(found):
            try:
                yield str(index), member.answer(vector, settings, round_, index)
            except lx.FederatedError as error:
                yield str(index), str(error)

    return ask


SETTINGS = Federation(rounds=3, batch_rows=8, updates="int4", personal=("head",), seed=5)


@pytest.fixture(scope="module")
def simulated():
    clients = uneven(8, 6, 11)
    return clients, simulate(fleets.spec(), clients, SETTINGS)


def test_members_and_coordinator_are_the_simulation(tmp_path, simulated):
    clients, expected = simulated
    result = Coordinator(fleets.spec(), SETTINGS).run(asking(members(tmp_path, clients), SETTINGS))
    np.testing.assert_allclose(result.program.weights["body"], expected.program.weights["body"], atol=1e-5)
    for one, other in zip(result.rounds, expected.rounds, strict=True):
        assert (one.clients, one.rows, one.bytes_up, one.bytes_down) == (
            other.clients, other.rows, other.bytes_up, other.bytes_down,
        )  # fmt: skip
        np.testing.assert_allclose(one.metrics["loss"], other.metrics["loss"], atol=1e-5)


def test_both_ends_may_be_killed_at_any_time(tmp_path, simulated):
    """The server comes back without its last round, and each client with what it kept before that."""
    clients, expected = simulated
    checkpoint = Checkpoints(tmp_path / "server", every=1)
    server = Coordinator(fleets.spec(), SETTINGS)

    def dying(round_, vector):
        yield from asking(members(tmp_path, clients), SETTINGS)(round_, vector)
        if round_ == 1:
            raise KeyboardInterrupt  # all clients have done this round, and the server has not saved it

    with CheckpointFolder(checkpoint, server.identity()) as folder, pytest.raises(KeyboardInterrupt):
        server.run(dying, folder)
    again = Coordinator(fleets.spec(), SETTINGS)
    with CheckpointFolder(checkpoint, again.identity()) as folder:
        result = again.run(asking(members(tmp_path, clients), SETTINGS), folder)
    assert [done.round for done in result.rounds] == [1, 2, 3]
    np.testing.assert_allclose(result.program.weights["body"], expected.program.weights["body"], atol=1e-5)


def good(value=1.0):
    return Answer({"values": np.full(15, value, np.float32)}, 10, {})


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("it sent nothing within 60 s", "sent nothing"),
        (Answer({"values": np.full(15, np.nan, np.float32)}, 10, {}), "NaN"),
        (Answer({"values": np.zeros(16, np.float32)}, 10, {}), r"float32[16]; expected float32[15]"),
        (Answer({"values": np.zeros(15, np.float32), "more": np.zeros(1)}, 10, {}), "not asked for"),
        (Answer({"values": np.zeros(15, np.float32)}, 10**12, {}), "1000000000000 rows"),
        (Answer({"values": np.zeros(15, np.float32)}, float("inf"), {}), "inf rows"),
        (Answer({"values": np.zeros(15, np.float32)}, [10], {}), "[10] rows"),
        (Answer({"values": np.zeros(15, np.float32)}, 10, {"loss": [1.0]}), "'loss' is [1.0]"),
        (Answer({"values": np.zeros(15, np.float32)}, 10, {"\x1b[2J": 1.0}), "a metric named"),
        (Answer({"values": np.zeros(15, np.float32)}, 10, dict.fromkeys(map(str, range(65)), 1.0)), "65 metrics"),
    ],
)
def test_a_client_that_does_wrong_is_left_out_and_named(bad, reason):
    server = Coordinator(fleets.spec(), Federation(rounds=1))
    twice = [("good", good()), ("bad", bad), ("good", good(9.0))]
    result = server.run(lambda round_, vector: twice[:2])
    np.testing.assert_allclose(
        result.program.weights["head"], np.asarray(fleets.program().weights["head"]) + 1, rtol=1e-6
    )
    assert list(result.rounds[0].refused) == ["bad"]
    assert reason in result.rounds[0].refused["bad"]


def test_a_metric_that_is_no_number_somewhere_is_the_mean_of_the_others():
    def answer(**metrics):
        return Answer({"values": np.zeros(15, np.float32)}, 10, metrics)

    answers = [("a", answer(loss=1.0, recall=np.nan)), ("b", answer(loss=3.0, recall=0.5)), ("c", answer(loss=1e300))]
    (round_,) = Coordinator(fleets.spec(), Federation(rounds=1)).run(lambda *_: answers).rounds
    assert (round_.clients, round_.refused, round_.metrics) == (3, {}, {"loss": 2.0, "recall": 0.5})


def npy(array=None, header="", data=b""):
    if array is not None:
        np.save(file := io.BytesIO(), array)
        return file.getvalue()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


NUMBERS = npy(np.zeros(15, np.float32))
SHAPED = "{'descr': '<f4', 'fortran_order': False, 'shape': %s, }\n"


@pytest.mark.parametrize(
    "data",
    [
        b"", NUMBERS[:5], NUMBERS[:30], NUMBERS[:-7], b"\x80\x04N.", b"PK\x03\x04" + bytes(40),
        b"PK\x05\x06" + bytes(18),
        npy(header=SHAPED % "(10000000000000,)"), npy(header=SHAPED % "(9223372036854775807, 9223372036854775807)"),
        npy(header=SHAPED % f"({'9' * 100},)"), npy(header=SHAPED % "(-15,)", data=bytes(60)),
        npy(header=SHAPED % "(((((("), npy(header="'''"), npy(header="(" * 200 + ")" * 200),
    ],
)  # fmt: skip
def test_bytes_that_are_no_array_are_an_answer_that_cannot_be_read(data):
    app = pytest.importorskip("flwr.app")
    record = app.ArrayRecord({"values": app.Array(dtype="float32", shape=(15,), stype="numpy.ndarray", data=data)})
    sent = app.RecordDict({"update": record, "numbers": app.MetricRecord({"rows": 10})})
    said = messages.read_answer(sent, {"values": ((15,), np.dtype("float32"))})
    assert said.startswith("it sent no answer that can be read: an array that NumPy cannot read")


def test_what_a_refusing_client_says_controls_no_terminal():
    app = pytest.importorskip("flwr.app")
    sent = app.RecordDict({"refused": app.ConfigRecord({"why": "\x1b[2J" + "no\n" * 300})})
    said = messages.read_answer(sent, {})
    assert said.isprintable()
    assert len(said) == 300


def test_an_update_that_comes_twice_counts_once():
    server = Coordinator(fleets.spec(), Federation(rounds=1))
    result = server.run(lambda round_, vector: [("a", good()), ("a", good(9.0)), ("b", good(3.0))])
    np.testing.assert_allclose(result.program.weights["head"], 2.0)
    assert "before" in result.rounds[0].refused["a"]


def test_three_rounds_without_updates_end_the_training():
    server = Coordinator(fleets.spec(), Federation(rounds=10, least_clients=2))
    with pytest.raises(lx.FederatedError, match="3 rounds in a row got fewer than 2 good updates: b: gone"):
        server.run(lambda round_, vector: [("a", good()), ("b", "gone")])


def test_a_member_refuses_what_does_not_fit(tmp_path):
    member = members(tmp_path, uneven(8))[0]
    with pytest.raises(lx.FederatedError, match=r"float32\[16\] of weights, and this model shares float32\[15\]"):
        member.answer(np.zeros(16, np.float32), Federation(), 0, 0)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "kept.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(lx.FederatedError, match=r"kept\.npz cannot be read"):
        member.answer(np.zeros(15, np.float32), Federation(), 0, 0)


def test_others_are_reached_with_tls_only(tmp_path):
    with pytest.raises(lx.FederatedError, match=r"others can reach 0\.0\.0\.0"):
        tls_of_server("0.0.0.0", None, None, None)
    with pytest.raises(lx.FederatedError, match="--tls-key, --tls-ca is missing"):
        tls_of_server("127.0.0.1", "cert.pem", None, None)
    with pytest.raises(lx.FederatedError, match="there is no such file"):
        tls_of_server("127.0.0.1", *(str(tmp_path / name) for name in ("cert", "key", "ca")))


class Grid:
    """Flower's grid within this process: messages go through its records, to the app of the node."""

    def __init__(self, contexts, spoil=None, gone=()):
        self.contexts, self.spoil, self.gone = contexts, spoil, gone
        self.masked = []

    def get_node_ids(self):
        return list(self.contexts)

    def send_and_receive(self, messages, *, timeout):
        return list(self._replies(messages))

    def _replies(self, messages):
        from flwr.app import Message

        from lepton_xla.federated.flower.apps import answer_message

        for message in sorted(messages, key=lambda each: each.metadata.dst_node_id):
            node = message.metadata.dst_node_id
            trains = any("fitins" in name for name in message.content)
            if node in self.gone and trains:  # vanishes after it has given its keys
                continue
            if node in self.gone and "secaggplus" in str(list(message.content)) and self.masked:
                continue
            sent = Message(copy.deepcopy(message.content), node, "train", ttl=message.metadata.ttl, group_id="0")
            reply = answer_message(sent, self.contexts[node])
            reply.metadata._src_node_id = node
            if trains:
                self.masked.append(masked_of(reply))
            if self.spoil is not None:
                self.spoil(node, reply)
            yield reply


def masked_of(reply):
    from flwr.common import bytes_to_ndarray
    from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key

    parts = reply.content.config_records[RECORD_KEY_CONFIGS][Key.MASKED_PARAMETERS]
    return np.concatenate([np.ravel(bytes_to_ndarray(part)) for part in parts]).astype(np.float64)


def context(**fields):
    from flwr.app import Context, RecordDict

    given = {"run_id": 1, "node_id": 0, "node_config": {}, "state": RecordDict(), "run_config": {}, **fields}
    return Context(**given)


def three(target, folder):
    return {
        number: context(
            node_id=number,
            node_config={"target": target, "folder": str(folder / str(number)), "part": f"{number}/3"},
        )
        for number in (1, 2, 3)
    }


@pytest.fixture
def own_cache():
    """The app of a client keeps what XLA compiles in its own folder."""
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def target(own_cache, tmp_path, monkeypatch):
    """A spec in a file, and Flower's apps as if one task of Flower ran them all."""
    pytest.importorskip("flwr")
    identity = importlib.import_module("flwr.supercore.task_identity").TaskIdentity
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(identity, name, 1)
    (tmp_path / "net.py").write_text(
        f"import sys; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})\n"
        "import fleets\nspec = fleets.spec().replace(rows=fleets.table(25))\n"
    )
    return f"{tmp_path / 'net.py'}:spec"


def config_of(target, settings, folder):
    return {
        "target": target, "settings": settings.to_json(), "folder": str(folder), "clients": 3, "wait_s": 1.0,
        "round_s": 60.0,
    }  # fmt: skip


def test_apps_of_flower_carry_a_training(tmp_path, target):
    from lepton_xla.federated.flower import apps

    contexts = three(target, tmp_path)

    def spoil(node, reply):
        if node == 3 and "update" in reply.content:
            from flwr.app import Array

            reply.content["update"]["codes"] = Array(ndarray=np.zeros(10**6, np.int8))

    config = config_of(target, SETTINGS, tmp_path)
    apps.run_server(Grid(contexts, spoil), context(run_config=config))
    assert json.loads((tmp_path / "outcome.json").read_text()) == {"error": None}
    rounds = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [done["clients"] for done in rounds] == [2, 2, 2]
    assert "'codes' has 1000128 bytes" in rounds[0]["refused"]["3"]
    assert rounds[2]["metrics"]["loss"] < rounds[0]["metrics"]["loss"]

    (tmp_path / "other").mkdir()
    other = {**config, "wait_s": 0.0, "folder": str(tmp_path / "other")}
    apps.run_server(Grid({1: contexts[1]}), context(run_config=other))
    outcome = json.loads((tmp_path / "other" / "outcome.json").read_text())
    assert outcome["error"].startswith("1 of 3 clients are connected after 0 s")


@pytest.mark.parametrize("gone", [(), (2,)])
def test_a_secure_sum_is_the_plain_one_within_its_step(tmp_path, target, gone):
    from lepton_xla.federated.flower import apps, secure

    settings = Federation(rounds=1, batch_rows=8, secure=True, most_rows=16, most_norm=2.0)
    config = config_of(target, settings, tmp_path)
    grid = Grid(three(target, tmp_path), gone=gone)
    server = context(run_config=config)
    apps.run_server(grid, server)
    assert json.loads((tmp_path / "outcome.json").read_text()) == {"error": None}
    found = json.loads((tmp_path / "rounds.jsonl").read_text())
    assert found["clients"] == 3 - len(gone)
    assert found["bytes_up"] > found["clients"] * 15 * 4
    with CheckpointFolder(
        apps.checkpoints(tmp_path), (coordinator := Coordinator(fleets.spec(), settings)).identity()
    ) as saved:
        weights = coordinator.run(lambda round_, vector: (), saved).program.weights
    parts = lx.federated.partition(fleets.table(25), 3)
    plain = settings.replace(secure=False)
    alone = members(tmp_path / "plain", parts)
    vector = np.concatenate([np.asarray(fleets.program().weights[path]).ravel() for path in ("body", "head")])
    answers = [alone[number - 1].answer(vector, plain, 0, number - 1) for number in (1, 2, 3) if number not in gone]
    rows = [answer.rows for answer in answers]
    mean = np.average([answer.update["values"] for answer in answers], axis=0, weights=rows)
    moved = np.concatenate([np.asarray(weights[path]).ravel() for path in ("body", "head")]) - vector
    step = secure.quantization_step(settings) * 16 * len(rows) / sum(rows)
    assert 0 < np.abs(moved - mean).max() <= step + 3e-7
    # What the server saw of each client is no more like its update than noise is.
    for masked, answer in zip(grid.masked, answers, strict=True):
        assert abs(np.corrcoef(masked[-15:], answer.update["values"])[0, 1]) < 0.9


class Nonsense:
    """Flower's grid, where all clients answer without what was asked for."""

    def send_and_receive(self, messages, *, timeout):
        from flwr.app import ConfigRecord, Message, RecordDict
        from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS

        return [Message(RecordDict({RECORD_KEY_CONFIGS: ConfigRecord()}), reply_to=message) for message in messages]


def test_nonsense_spoils_a_secure_round_and_no_more(target):
    from lepton_xla.federated.flower.secure import Workflow

    workflow = Workflow(Nonsense(), context(), Federation(secure=True, most_rows=16), 1.0)
    found = workflow.run(0, np.zeros(15, np.float32), {}, [1, 2, 3])
    assert found.startswith("a client sent what cannot be added up: ")

    class Gone:
        def send_and_receive(self, messages, *, timeout):
            raise ConnectionError("the link is gone")

    with pytest.raises(ConnectionError, match="link"):  # no client's fault: the round is not done
        Workflow(Gone(), context(), Federation(secure=True, most_rows=16), 1.0).run(0, np.zeros(15), {}, [1, 2, 3])


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.timeout(1200)
@pytest.mark.slow  # nine Python processes import JAX and Flower: minutes on a busy machine
def test_real_processes_over_tls(tmp_path):
    pytest.importorskip("flwr")
    import trustme

    authority = trustme.CA()
    server = authority.issue_cert("127.0.0.1", "localhost")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    server.private_key_pem.write_to_path(tmp_path / "key.pem")
    server.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    (tmp_path / "net.py").write_text(
        f"import sys; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})\n"
        "import fleets\nspec = fleets.spec().replace(rows=fleets.table(60))\n"
    )
    port = free_port()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "lepton_xla", "federate"]
    started = []
    try:
        for part in ("1/3", "2/3", "3/3"):
            folder = tmp_path / part[0]
            args = ["client", "net.py:spec", "--server", f"127.0.0.1:{port}", "--tls-ca", "ca.pem", "--part", part]
            started.append(subprocess.Popen([*command, *args, "--folder", str(folder)], cwd=tmp_path, env=environment))
        args = ["server", "net.py:spec", "--port", str(port), "--clients", "3", "--rounds", "3", "--batch-rows", "8"]
        args += ["--tls-cert", "cert.pem", "--tls-key", "key.pem", "--tls-ca", "ca.pem", "--json"]
        first = subprocess.Popen([*command, *args], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
        started.append(first)
        reports = tmp_path / "federation" / "rounds.jsonl"
        end = time.monotonic() + 600
        while not reports.exists() and time.monotonic() < end:
            time.sleep(0.5)
        assert reports.exists(), "no round was done"
        first.kill()  # and goes on with the same command
        first.wait()
        done = subprocess.run([*command, *args], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert [each["round"] for each in found["rounds"]] == [1, 2, 3]
        assert all(each["clients"] == 3 for each in found["rounds"])
        settings = Federation(rounds=3, batch_rows=8)
        same = simulate(fleets.spec(), lx.federated.partition(fleets.table(60), 3), settings)
        losses = [[each.metrics["loss"] for each in same.rounds], [each["metrics"]["loss"] for each in found["rounds"]]]
        np.testing.assert_allclose(*losses, rtol=1e-5)
    finally:
        for process in started:
            process.send_signal(signal.SIGTERM)
            process.wait()
