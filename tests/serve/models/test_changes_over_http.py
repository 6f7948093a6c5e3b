"""A repository that is changed through its server: versions and weights sent in pieces, labels, and who may."""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import fsspec
import jax.numpy as jnp
import pytest
from fake_artifacts import make_artifact
from numbered import Clients, make_numbered, wait
from serve_fakes import exchange

import lepton_xla as lx
from lepton_xla.compiler import make_update
from lepton_xla.errors import ServeError
from lepton_xla.serve import Limits, Options, Server
from lepton_xla.serve.access.tokens import create_token
from lepton_xla.serve.app import repository as pages
from lepton_xla.serve.client import RequestError
from lepton_xla.serve.client import repository as client_module
from lepton_xla.serve.client.repository import RepositoryClient
from lepton_xla.serve.models.remote import RemoteRepository
from lepton_xla.serve.models.repository import Repository
from lepton_xla.serve.models.uploads import Uploads


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_numbered(tmp_path_factory.mktemp("made"), (1, 2))


@pytest.fixture(scope="module")
def updates(made, tmp_path_factory):
    """Weights alone, by number, for the code of the first."""
    base, folder = lx.load(made[1]), tmp_path_factory.mktemp("updates")
    found = {}
    for number in (2, 3, 4):
        program = lx.trace(
            lambda w, x: {"first": x @ w["first"], "second": x @ w["second"]},
            {key: jnp.eye(4) * number for key in ("first", "second")},
            {"x": lx.TensorSpec(("batch", 4), "float32")},
        )
        found[number] = folder / f"{number}.lepton"
        make_update(base, program).save(found[number])
    return found


@pytest.fixture
def repository(tmp_path, made):
    repository = Repository(tmp_path / "MODELS")
    repository.push(made[1], "m")
    return repository


@pytest.fixture
def start(repository):
    started = []

    def make(**options):
        options = {"port": 0, "repository_poll_s": 0.02} | options
        started.append(Server(options=Options(**options), repository=repository.root).start())
        return started[-1]

    yield make
    for server in started:
        server.stop()


def status(function, *arguments):
    with pytest.raises(RequestError) as caught:
        function(*arguments)
    return caught.value.status


def test_versions_are_pushed_promoted_rolled_back_and_removed(start, repository, made):
    server = start()
    with RepositoryClient(server.url) as client:
        assert client.push(made[2], "m") == "2"
        wait(lambda: server.models.versions("m") == ["2"])
        assert client.promote("m", "1") is None
        wait(lambda: server.models.versions("m") == ["1", "2"])
        assert client.promote("m", "2") == "1"
        assert client.rollback("m") == ("2", "1")
        assert status(client.remove, "m", "1") == 409
        client.remove("m", "2")
        wait(lambda: server.models.versions("m") == ["1"])
        (found,) = client.models()
        assert [(each["version"], each["labels"]) for each in found["versions"]] == [("1", ["stable"])]
        assert client.push(made[2], "other", "7") == "7"
        wait(lambda: server.models.versions("other") == ["7"])
    assert set(repository.scan()) == {"m", "other"}


def test_a_promotion_waits_until_the_server_answers_by_it(start, repository, made, tmp_path, monkeypatch):
    monkeypatch.setattr(client_module, "_SURE_S", 0.2)
    server = start()
    with RepositoryClient(server.url) as client:
        client.promote("m", client.push(made[2], "m"))
        client.wait("m", "2", "stable")
        assert server.models.labels("m") == {"stable": "2"}
        client.promote("m", client.push(make_artifact(tmp_path / "a.lepton"), "m"))
        with pytest.raises(ServeError, match="version 3 of model 'm' does not answer: m/3: manifest"):
            client.wait("m", "3", "stable")
        assert server.models.labels("m") == {"stable": "2"}
        # A number that is used again: the old version answers, and is not the one that was pushed.
        client.rollback("m")
        shutil.rmtree(repository.root / "m" / "2.lepton")
        shutil.copytree(make_artifact(tmp_path / "b.lepton"), repository.root / "m" / "2.lepton")
        wait(lambda: any(each.get("reason") for each in client.index() if each["version"] == "2"))
        with pytest.raises(ServeError, match="version 2 of model 'm' does not answer: m/2: manifest"):
            client.wait("m", "2", "stable")
        with pytest.raises(ServeError, match="version 9 of model 'm' does not answer after 0 s"):
            client.wait("m", "9", seconds=0)


def test_a_signature_is_sent_with_its_artifact(start, repository, made, tmp_path):
    shutil.copytree(made[2], tmp_path / "a.lepton")
    (tmp_path / "a.lepton" / "model.sig").write_bytes(b"signature")
    with RepositoryClient(start().url) as client:
        client.push(tmp_path / "a.lepton", "m")
    assert (repository.root / "m" / "2.lepton" / "model.sig").read_bytes() == b"signature"


def test_new_weights_take_the_place_of_old_ones_on_the_same_code(start, updates):
    server = start()
    code = server.models.find("m").model.runtime._executables
    with Clients(server) as clients, RepositoryClient(server.url) as client:
        for number in (2, 3, 4):
            assert client.push(updates[number], "m") == str(number)
            wait(lambda n=number: server.models.versions("m") == [str(n)])
            wait(lambda n=number: clients.answers.get(str(n), 0) > 20)
    assert set(clients.answers) == {"1", "2", "3", "4"}
    now = server.models.find("m").model
    assert now.route == "shared"
    assert [executable for _, executable in now.runtime._executables] == [executable for _, executable in code]


def test_weights_alone_are_loaded_at_the_start_from_a_base_on_the_disk(start, repository, updates):
    repository.push(updates[3], "m")
    server = start()
    assert server.models.versions("m") == ["2"]
    status_code, _, body = exchange(
        server, "POST", "/v2/models/m/infer",
        json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}).encode(),
    )  # fmt: skip
    assert status_code == 200
    assert json.loads(body)["outputs"][0]["data"] == [3.0, 6.0, 9.0, 12.0]


def test_a_store_is_served_and_watched(made, updates):
    store = fsspec.filesystem("memory")
    store.store.clear()
    remote = RemoteRepository("memory://served/models")
    remote.push(made[1], "m")
    options = Options(port=0, repository_poll_s=0.02)
    with Server(options=options, repository="memory://served/models") as server, Clients(server) as clients:
        remote.push(updates[3], "m", "3")
        wait(lambda: clients.answers.get("3", 0) > 20)
        assert server.models.find("m").model.route == "shared"
        with RepositoryClient(server.url) as client:
            assert status(client.push, made[2], "m") == 501  # it has no folder that it may write to


def test_poisoned_weights_leave_the_old_ones_serving(start, repository, updates, made, tmp_path):
    server = start()
    base = lx.load(made[1])
    program = lx.trace(
        lambda w, x: {"first": x @ w["first"], "second": x @ w["second"]},
        {key: jnp.eye(4) for key in ("first", "second")},
        {"x": lx.TensorSpec(("batch", 4), "float32")},
    )
    good = make_update(base, program)
    dataclasses.replace(good, weights=tuple(jnp.full((4, 4), jnp.nan) for _ in range(2))).save(tmp_path / "nan.lepton")
    with RepositoryClient(server.url) as client:
        client.push(tmp_path / "nan.lepton", "m")

    def said():
        entries = json.loads(exchange(server, "POST", "/v2/repository/index")[2])
        return [each.get("reason", "") for each in entries if each.get("version") == "2"]

    wait(lambda: any("holds NaN" in reason for reason in said()))
    assert server.models.versions("m") == ["1"]


def test_who_may(start, tmp_path, made):
    tokens = tmp_path / "tokens.jsonl"
    secrets = {scope: create_token(tokens, scope, (scope,)) for scope in ("infer", "read", "admin")}
    server = start(token_file=tokens)
    digest = hashlib.sha256(b"x").hexdigest()
    changes = [
        lambda client: client.push(made[2], "m"),
        lambda client: client.promote("m", "1"),
        lambda client: client.rollback("m"),
        lambda client: client.remove("m", "1"),
        lambda client: client._sizes([digest]),
    ]
    for scope in ("infer", "read"):
        with RepositoryClient(server.url, token=secrets[scope]) as client:
            assert [status(change, client) for change in changes] == [403] * len(changes)
    with RepositoryClient(server.url, token="leptonx_" + "x" * 43) as client:
        assert [status(change, client) for change in changes] == [401] * len(changes)
    with RepositoryClient(server.url, token=secrets["admin"]) as client:
        assert client.push(made[2], "m") == "2"
        assert client.promote("m", "1") is None
        assert status(client.models) == 403  # no scope includes another
    with RepositoryClient(server.url, token=secrets["read"]) as client:
        assert len(client.models()) == 1


def test_who_changed_what_is_in_the_audit_log(start, tmp_path, made):
    secret = create_token(tmp_path / "tokens.jsonl", "deploy", ("admin",))
    server = start(token_file=tmp_path / "tokens.jsonl", audit_log=tmp_path / "audit.jsonl")
    with RepositoryClient(server.url, token=secret) as client:
        client.push(made[2], "m")
        client.promote("m", "1")
        client.promote("m", "2")
        client.rollback("m")
        assert status(client.remove, "m", "1") == 409
        client.remove("m", "2")
    server.stop()
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    told = [
        (line["action"], line["target"], line["outcome"], line["details"].get("label"))
        for line in lines
        if line["who"] == "deploy"
    ]
    assert told == [
        ("push", "m/2", "done", None), ("promote", "m/1", "done", "stable"), ("promote", "m/2", "done", "stable"),
        ("rollback", "m/1", "done", "stable"), ("remove", "m/1", "refused", None), ("remove", "m/2", "done", None),
    ]  # fmt: skip
    (refused,) = [line for line in lines if line["outcome"] == "refused"]
    assert "stands on" in refused["details"]["reason"]
    assert str(tmp_path) not in json.dumps(lines)


REQUESTS = [
    ("PUT", "/v2/repository/blobs/{sha}", b"x", 400),
    ("PUT", "/v2/repository/blobs/{sha}?offset=-1", b"x", 400),
    ("PUT", "/v2/repository/blobs/{sha}?offset=1e3", b"x", 400),
    ("PUT", "/v2/repository/blobs/{sha}?offset=0&offset=1", b"x", 400),
    ("PUT", "/v2/repository/blobs/{sha}?offset=7", b"x", 409),
    ("PUT", "/v2/repository/blobs/..%2Fx?offset=0", b"x", 400),
    ("PUT", "/v2/repository/blobs/{sha}?offset=0", b"x" * 5000, 413),
    ("POST", "/v2/repository/blobs", b"{}", 400),
    ("POST", "/v2/repository/blobs", b'{"sha256": ["../x"]}', 400),
    ("POST", "/v2/repository/models/m/versions", b"", 400),
    ("POST", "/v2/repository/models/m/versions", b'{"manifest": "{sha}"}', 404),
    ("POST", "/v2/repository/models/m/versions/1", b'{"manifest": "{sha}"}', 409),
    ("POST", "/v2/repository/models/m/versions/01", b'{"manifest": "{sha}"}', 400),
    ("POST", "/v2/repository/models/..%2Fm/versions", b'{"manifest": "{sha}"}', 400),
    ("POST", "/v2/repository/models/.m/versions", b'{"manifest": "{sha}"}', 400),
    ("POST", "/v2/repository/models/%00/versions", b'{"manifest": "{sha}"}', 400),
    ("POST", "/v2/repository/models/m/labels/stable", b"{}", 400),
    ("POST", "/v2/repository/models/m/labels/stable", b'{"version": "1", "rollback": true}', 400),
    ("POST", "/v2/repository/models/m/labels/stable", b'{"version": 1}', 400),
    ("POST", "/v2/repository/models/m/labels/stable", b'{"version": "9"}', 404),
    ("POST", "/v2/repository/models/m/labels/a%20b", b'{"version": "1"}', 400),
    ("POST", "/v2/repository/models/none/labels/stable", b'{"version": "1"}', 404),
    ("POST", "/v2/repository/models/m/labels/stable", b'{"rollback": true}', 404),
    ("DELETE", "/v2/repository/models/m/versions/9", b"", 404),
    ("DELETE", "/v2/repository/models/m/versions", b"", 405),
]


def test_what_is_refused_changes_nothing(start, repository):
    server = start(limits=Limits(max_body_bytes=4096))
    sha = hashlib.sha256(b"x").hexdigest()
    for method, path, body, code in REQUESTS:
        path, sent = path.replace("{sha}", sha), body.replace(b"{sha}", sha.encode())
        found, _, answer = exchange(server, method, path, sent)
        assert found == code, (method, path, body, answer)
        assert str(repository.root).encode() not in answer
        assert json.loads(answer)["error"]
    assert sorted(os.listdir(repository.root)) == [".uploads", "m"]
    assert os.listdir(repository.root / ".uploads") == []
    assert os.listdir(repository.root / "m") == ["1.lepton"]


def test_pushes_are_bounded_and_nobody_waits_for_them(start, repository, made, monkeypatch):
    monkeypatch.setattr(pages, "_MOST_LONG", 2)
    publishing, go_on, threads = threading.Semaphore(0), threading.Event(), []
    original = Uploads.publish

    def slow(*arguments):
        threads.append(threading.current_thread().name)
        publishing.release()
        assert go_on.wait(20)
        return original(*arguments)

    monkeypatch.setattr(Uploads, "publish", slow)
    repository.push(made[2], "m")
    server = start()
    with concurrent.futures.ThreadPoolExecutor(3) as pool, RepositoryClient(server.url) as client:
        manifest = (made[2] / "manifest.json").read_text()
        body = json.dumps({"manifest": hashlib.sha256(manifest.encode()).hexdigest()}).encode()
        pushes = [pool.submit(exchange, server, "POST", f"/v2/repository/models/m/versions/{n}", body) for n in "78"]
        try:
            assert publishing.acquire(timeout=20)
            assert publishing.acquire(timeout=20)
            # Two are all that may be under way. What is short does not wait for them, nor what others do.
            assert exchange(server, "POST", "/v2/repository/models/m/versions/9", body)[0] == 503
            assert client.promote("m", "1") is None
            assert [each["name"] for each in client.models()] == ["m"]
            assert len(threads) == 2
        finally:
            go_on.set()
        assert {each.result()[0] for each in pushes} == {404}  # nobody has sent the files
    assert {each.rpartition("_")[0] for each in threads} == {"lepton-change"}


def test_pieces_are_no_longer_than_the_server_takes(start, made):
    with RepositoryClient(start(limits=Limits(max_body_bytes=3000)).url) as client:
        assert client.push(made[2], "m") == "2"


def test_two_who_push_the_same_at_once_both_succeed(start, made):
    pushed = []
    with RepositoryClient(start().url) as client:

        def tell(sent, total):
            if sent == total and not pushed:  # the inner push takes the files before the outer makes a version of them
                pushed.append("?")
                pushed[0] = client.push(made[2], "other")

        assert (client.push(made[2], "m", tell=tell), pushed) == ("2", ["1"])
        assert {each["name"] for each in client.models()} == {"m", "other"}
        with pytest.raises(RequestError, match="409"):
            client.push(made[2], "m", "2")


def test_a_push_goes_on_where_others_send_the_files_again(tmp_path, monkeypatch):
    """They lack when a version is made of them, and are there when it is asked what lacks."""
    artifact = make_artifact(tmp_path / "a.lepton")
    with RepositoryClient("http://127.0.0.1:9") as client:
        monkeypatch.setattr(client, "_sizes", lambda digests: dict.fromkeys(digests, 1 << 20))
        for failing, made in ((1, True), (2, False)):
            answers = [RequestError(404, "missing")] * failing + [{"version": "1"}]

            def change(*_, answers=answers):
                answer = answers.pop(0)
                if isinstance(answer, Exception):
                    raise answer
                return answer

            monkeypatch.setattr(client, "_change", change)
            if made:
                assert client.push(artifact, "m") == "1"
            else:
                with pytest.raises(RequestError, match="missing"):
                    client.push(artifact, "m")


def test_a_server_of_one_artifact_has_no_repository(made):
    with Server(lx.load(made[1]), Options(port=0)) as server, RepositoryClient(server.url) as client:
        assert status(client.models) == 501
        assert status(client.push, made[2], "m") == 501


PUSHER = """
import sys
from lepton_xla.serve.client import repository
repository.PIECE_BYTES = 200
repository.RepositoryClient(sys.argv[1]).push(sys.argv[2], "m", tell=lambda sent, total: print(sent, flush=True))
"""


def test_a_pusher_that_is_killed_leaves_nothing_visible_and_the_next_goes_on(start, repository, made, monkeypatch):
    server = start()
    pusher = subprocess.Popen([sys.executable, "-c", PUSHER, server.url, made[2]], stdout=subprocess.PIPE, text=True)
    for line in pusher.stdout:
        if int(line) > 2000:
            pusher.send_signal(signal.SIGKILL)
            break
    pusher.stdout.close()
    pusher.wait()
    assert os.listdir(repository.root / "m") == ["1.lepton"]
    there = sum(file.stat().st_size for file in (repository.root / ".uploads").iterdir())
    assert there > 2000
    sent = []
    monkeypatch.setattr(client_module, "PIECE_BYTES", 200)
    with RepositoryClient(server.url) as client:
        request = client._request

        def counted(method, path, *body):
            sent.extend(len(piece) for piece in body if method == "PUT")
            return request(method, path, *body)

        client._request = counted
        assert client.push(made[2], "m") == "2"
    total = sum(file.stat().st_size for file in made[2].rglob("*") if file.is_file())
    assert sum(sent) <= total - there  # what was there was not sent again; a last piece may have come after the look
    wait(lambda: server.models.versions("m") == ["2"])
    assert os.listdir(repository.root / ".uploads") == []


def test_a_file_that_was_sent_wrong_is_refused_and_sent_again(start, repository, made):
    server = start()
    manifest = (made[2] / "manifest.json").read_bytes()
    entry = next(iter(json.loads(manifest)["files"].values()))
    code, _, _ = exchange(server, "PUT", f"/v2/repository/blobs/{entry['sha256']}?offset=0", b"\0" * entry["size"])
    assert code == 200
    with RepositoryClient(server.url) as client:
        assert status(client.push, made[2], "m") == 400
        assert os.listdir(repository.root / "m") == ["1.lepton"]
        assert client.push(made[2], "m") == "2"


def test_the_document_of_the_server_has_these_routes(start):
    paths = json.loads(exchange(start(), "GET", "/v2/openapi.json")[2])["paths"]
    assert set(paths["/v2/repository/models/{model}/versions/{version}"]) == {"post", "delete"}
    (offset,) = [each for each in paths["/v2/repository/blobs/{sha256}"]["put"]["parameters"] if each["in"] == "query"]
    assert offset["name"] == "offset"


@pytest.mark.slow
def test_schemathesis_finds_no_server_error_in_a_repository(start, repository, made, tmp_path):
    repository.push(made[2], "m")
    repository.promote("m", "1")
    server = start()
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/v2/openapi.json", "--no-color"]
    command += ["--include-path-regex", "repository|traffic|rollout", "--max-examples", "8", "--seed", "1"]
    command += ["--exclude-checks", "positive_data_acceptance"]  # what is right by its schema may be wrong here
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
