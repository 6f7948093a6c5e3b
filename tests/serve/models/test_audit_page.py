"""GET /v2/audit: who changed what, for admins only."""

import json
import shutil

import pytest
from numbered import make_numbered, wait
from serve_fakes import exchange

from lepton_xla.serve import Options, Server
from lepton_xla.serve.access.tokens import create_token
from lepton_xla.serve.models.repository import Repository
from lepton_xla.serve.observe.audit import Audit


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_numbered(tmp_path_factory.mktemp("made"), (1, 2))


@pytest.fixture
def repository(tmp_path, made):
    repository = Repository(tmp_path / "MODELS")
    repository.push(made[1], "m")
    return repository


@pytest.fixture
def tokens(tmp_path):
    return {
        scope: create_token(tmp_path / "tokens.jsonl", f"my-{scope}", [scope]) for scope in ("admin", "read", "infer")
    }


@pytest.fixture
def server(tmp_path, repository, tokens):
    options = Options(port=0, explicit=True, token_file=tmp_path / "tokens.jsonl", audit_log=tmp_path / "audit.jsonl")
    with Server(options=options, repository=repository.root) as server:
        yield server


def ask(server, method, path, token=None, body=b""):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    status, _, answer = exchange(server, method, path, body, headers)
    return status, json.loads(answer)


def entries(server, tokens, query=""):
    status, answer = ask(server, "GET", f"/v2/audit{query}", tokens["admin"])
    assert status == 200, answer
    return answer


def told(server, tokens):
    return [(each["who"], each["action"], each["target"], each["outcome"]) for each in entries(server, tokens)]


def test_only_admins_read_it(server, tokens):
    assert [ask(server, "GET", "/v2/audit", tokens.get(scope))[0] for scope in (None, "read", "infer", "admin")] == [
        401, 403, 403, 200,
    ]  # fmt: skip


def test_every_change_through_the_server_is_told(server, tokens, repository, made):
    admin = tokens["admin"]
    assert ask(server, "POST", "/v2/repository/models/m/load", admin, b"{}")[0] == 200
    repository.push(made[2], "m", "2")
    assert ask(server, "POST", "/v2/repository/models/m/labels/stable", admin, b'{"version": "2"}')[0] == 200
    assert ask(server, "POST", "/v2/repository/models/m/labels/stable", admin, b'{"version": "7"}')[0] == 404
    assert ask(server, "POST", "/v2/repository/models/m/labels/stable", admin, b'{"version": "1"}')[0] == 200
    assert ask(server, "POST", "/v2/repository/models/m/labels/stable", admin, b'{"rollback": true}')[0] == 200
    assert ask(server, "POST", "/v2/repository/models/m/labels/beta", admin, b'{"rollback": true}')[0] == 404
    assert ask(server, "DELETE", "/v2/repository/models/m/versions/1", admin)[0] == 200
    assert ask(server, "POST", "/v2/repository/models/m/unload", admin, b"{}")[0] == 200
    wanted = [
        ("my-admin", "load", "m/1", "done"),
        ("my-admin", "promote", "m/2", "done"),
        ("my-admin", "promote", "m", "refused"),
        ("my-admin", "promote", "m/1", "done"),
        ("my-admin", "rollback", "m/2", "done"),
        ("my-admin", "rollback", "m", "refused"),
        ("my-admin", "remove", "m/1", "done"),
        ("my-admin", "unload", "m/1", "done"),
    ]
    wait(lambda: len(told(server, tokens)) == 8)
    assert sorted(told(server, tokens)) == sorted(wanted)  # two threads write
    found = {(each["action"], each["target"], each["outcome"]): each["details"] for each in entries(server, tokens)}
    assert all(details["address"] == "127.0.0.1" for details in found.values())
    stood = {version: found[action, f"m/{version}", "done"] for action, version in (("promote", 1), ("rollback", 2))}
    assert [(each["label"], each["stood_on"]) for each in stood.values()] == [("stable", "2"), ("stable", "1")]
    assert found["promote", "m/2", "done"]["stood_on"] == ""
    assert "7" in found["promote", "m", "refused"]["reason"]
    assert found["load", "m/1", "done"]["digest"] == json.loads((made[1] / "manifest.json").read_text())["sha256"]


def test_what_could_not_be_loaded_is_told(server, tokens, repository, made):
    shutil.copytree(made[2], repository.root / "m" / "2.lepton")
    (repository.root / "m" / "2.lepton" / "weights/packed/c/0/0").write_bytes(b"")
    assert ask(server, "POST", "/v2/repository/models/m/load", tokens["admin"], b"{}")[0] == 400
    wait(lambda: ("my-admin", "load", "m/2", "failed") in told(server, tokens))
    failed = next(each for each in entries(server, tokens) if each["outcome"] == "failed")
    assert "damaged" in failed["details"]["reason"]


def test_what_nobody_may_do_is_not_told(server, tokens):
    for scope in (None, "read", "infer"):
        assert ask(server, "POST", "/v2/repository/models/m/load", tokens.get(scope), b"{}")[0] in (401, 403)
    assert entries(server, tokens) == []


def test_no_secret_is_in_it(server, tokens, tmp_path):
    admin = tokens["admin"]
    for secret in tokens.values():
        ask(server, "POST", f"/v2/repository/models/{secret}/load", admin, b"{}")
        ask(server, "POST", f"/v2/repository/models/m/labels/{secret}", admin, b'{"version": "1"}')
        ask(server, "DELETE", f"/v2/repository/models/{secret}/versions/1", admin)
    wait(lambda: len(entries(server, tokens)) >= 3)
    text = (tmp_path / "audit.jsonl").read_text()
    assert not any(secret in text for secret in tokens.values())


def test_the_latest_are_asked_for(server, tokens, tmp_path):
    audit = Audit(tmp_path / "audit.jsonl")
    for number in range(150):
        audit.record("ci", "load", f"m/{number}", "done")
    assert [each["target"] for each in entries(server, tokens, "?limit=3")] == ["m/147", "m/148", "m/149"]
    assert len(entries(server, tokens)) == 100
    assert len(entries(server, tokens, "?limit=1000")) == 150
    assert exchange(server, "HEAD", "/v2/audit", b"", {"Authorization": f"Bearer {tokens['admin']}"})[0] == 200


@pytest.mark.parametrize("query", ["0", "-1", "1001", "x", "", "1&limit=2", "1&offset=2", "%31%30", "9" * 300])
def test_other_queries_are_refused(server, tokens, query):
    status, answer = ask(server, "GET", f"/v2/audit?limit={query}", tokens["admin"])
    assert (status, answer) == (
        (200, []) if query == "%31%30" else (400, {"error": "the only parameter is limit, a number from 1 to 1000"})
    )


def test_without_a_log_it_says_how_to_have_one(tmp_path, repository):
    with Server(options=Options(port=0, explicit=True), repository=repository.root) as server:
        assert ask(server, "GET", "/v2/audit") == (
            501,
            {"error": "this server keeps no audit log: start it with --audit-log"},
        )
