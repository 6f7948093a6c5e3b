"""Traffic of a repository over HTTP: shares, sticky clients, what is refused, a restart, and who may."""

import asyncio
import contextlib
import json
import math
import shutil

import numpy as np
import pytest
from numbered import ROW, make_numbered, wait
from serve_fakes import connect, exchange, raw_request, read_response

from lepton_xla.errors import RepositoryError
from lepton_xla.serve import Options, Server
from lepton_xla.serve.access.tokens import create_token
from lepton_xla.serve.client import AsyncClient, RequestError
from lepton_xla.serve.client.repository import RepositoryClient
from lepton_xla.serve.models import plans
from lepton_xla.serve.models.repository import Repository
from lepton_xla.serve.protocol.traffic import RolloutRequest, Traffic

HALVES = {"shares": {"stable": 0.5, "canary": 0.5}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_numbered(tmp_path_factory.mktemp("made"), (1, 2))


@pytest.fixture
def repository(tmp_path, made):
    repository = Repository(tmp_path / "MODELS")
    for number in (1, 2):
        repository.push(made[number], "m")
    repository.promote("m", "1")
    repository.promote("m", "2", "canary")
    return repository


@pytest.fixture
def start(repository):
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(
            Server(
                options=Options(**({"port": 0, "repository_poll_s": 0.02} | options)), repository=repository.root
            )
        )  # fmt: skip


def answers(server, count, headers=None, ids=None, path="/v2/models/m/infer"):
    """The versions that answer so many requests on one connection, each checked against its numbers."""
    found = []
    with connect(server) as sock:
        for number in range(count):
            body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": ROW}]}
            if ids is not None:
                body = {**body, "id": ids[number]} if number % 2 else {"id": ids[number], **body}
            sock.sendall(raw_request("POST", path, json.dumps(body).encode(), headers))
            status, _, told = read_response(sock)
            assert status == 200, told
            told = json.loads(told)
            version = told["model_version"]
            np.testing.assert_allclose(told["outputs"][0]["data"], np.float32(ROW) * int(version), rtol=1e-6)
            found.append(version)
    return found


def refused(function, *arguments):
    with pytest.raises(RequestError) as caught:
        function(*arguments)
    return caught.value.status, str(caught.value)


def test_shares_hold_and_a_request_that_names_a_version_gets_it(start, repository):
    server = start()
    with RepositoryClient(server.url) as client:
        assert set(answers(server, 20)) == {"1"}
        shown = client.set_traffic("m", {"shares": {"stable": 0.7, "canary": 0.3}})
        # In force when the answer comes.
        found, total = answers(server, 400), 400
        assert abs(found.count("2") - 0.3 * total) < 5 * math.sqrt(total * 0.21)
        assert set(answers(server, 20, path="/v2/models/m/versions/1/infer")) == {"1"}
        assert set(answers(server, 20, path="/v2/models/m/labels/canary/infer")) == {"2"}
        assert shown["traffic"]["shares"] == {"stable": 0.7, "canary": 0.3}
        one, two = client.traffic("m")["versions"]
        assert (one["version"], one["labels"], one["share"]) == ("1", ["stable"], 0.7)
        assert one["requests"] + two["requests"] == 460
        assert two["requests"] == found.count("2") + 20
        assert 0 < two["p50_s"] <= two["p99_s"]
        client.clear_traffic("m")
        assert set(answers(server, 20)) == {"1"}


def test_it_survives_a_restart_and_the_folder_may_be_changed_while_nobody_serves(start, repository):
    with Server(options=Options(port=0), repository=repository.root) as server, RepositoryClient(server.url) as client:
        client.set_traffic("m", HALVES)
    server = start()
    assert set(answers(server, 60)) == {"1", "2"}
    repository.replan("m", lambda plan, found: plans.with_traffic(plan, found, Traffic(shares={"2": 1.0})))
    wait(lambda: set(answers(server, 10)) == {"2"})


def test_equal_headers_and_ids_stay_at_one_version(start):
    server = start()
    with RepositoryClient(server.url) as client:
        client.set_traffic("m", HALVES | {"sticky": "x-user"})
        by_user = {user: set(answers(server, 8, {"X-User": str(user)})) for user in range(40)}
        assert all(len(each) == 1 for each in by_user.values())
        assert {version for each in by_user.values() for version in each} == {"1", "2"}
        assert set(answers(server, 60)) == {"1", "2"}  # without the header each request is drawn for
        client.set_traffic("m", HALVES | {"sticky": "id"})
        ids = [f"request {number}" for number in range(60)]
        first = answers(server, 60, ids=ids)
        assert first == answers(server, 60, ids=ids[::1]) == answers(server, 61, ids=["x", *ids])[1:]
        assert set(first) == {"1", "2"}


@pytest.mark.parametrize(
    ("traffic", "status", "text"),
    [
        ({"shares": {"stable": 0.5, "canary": 0.6}}, 400, "add up to 1.1"),
        ({"shares": {"stable": -0.5, "canary": 1.5}}, 400, "the share of 'stable' is -0.5"),
        ({"shares": {"stable": 0.5, "blue": 0.5}}, 404, "has no label 'blue'; there: canary, stable"),
        ({"shares": {"1": 0.5, "9": 0.5}}, 404, "has no version 9; there: 1, 2"),
        ({"shadow": {"to": "blue"}}, 404, "no label 'blue'"),
        ({"shadow": {"to": "canary", "fraction": 0}}, 400, "fraction"),
        ({"share": {}}, 400, "unknown field"),
        ({"sticky": "traceparent"}, 400, "differs on every request"),
        (["stable"], 400, "Expected `object`"),
    ],
)
def test_what_is_refused_changes_nothing(start, repository, traffic, status, text):
    server = start()
    with RepositoryClient(server.url) as client:
        told = refused(client.set_traffic, "m", traffic)
        assert told[0] == status
        assert text in told[1]
        assert str(repository.root) not in told[1]
        assert client.traffic("m")["traffic"]["shares"] == {}
    assert not (repository.root / "m" / plans.PLAN).exists()


def test_versions_that_are_not_loaded_or_not_there_are_refused_by_name(start, repository, made):
    repository.push(made[2], "m")
    (repository.root / "m" / "model.toml").write_text('versions = ["1"]\n[labels]\nstable = "1"\n')
    server = start()
    with RepositoryClient(server.url) as client:
        status, text = refused(client.set_traffic, "m", {"shares": {"1": 0.5, "3": 0.5}})
        assert status == 409
        assert "version 3 of model 'm' is not loaded" in text
        assert refused(client.set_traffic, "nothing", HALVES)[0] == 404
        assert refused(client.traffic, "nothing")[0] == 404
        assert refused(client.rollout, "m")[0] == 404
        # A version with a part in it cannot be removed.
        (repository.root / "m" / "model.toml").write_text('versions = ["1", "2"]\n[labels]\nstable = "1"\n')
        wait(lambda: server.models.versions("m") == ["1", "2"])
        client.set_traffic("m", {"shares": {"1": 0.5, "2": 0.5}})
        assert "has a part in its traffic" in refused(client.remove, "m", "2")[1]


def test_a_version_that_goes_by_itself_loses_its_share_and_no_request(start, repository):
    server = start()
    with RepositoryClient(server.url) as client:
        client.set_traffic("m", {"shares": {"1": 0.5, "2": 0.5}})
        (repository.root / "m" / "model.toml").write_text('[labels]\nstable = "1"\n')
        shutil.rmtree(repository.root / "m" / "2.lepton")
        wait(lambda: server.models.versions("m") == ["1"])
        assert set(answers(server, 40)) == {"1"}


def test_only_admins_change_it_and_the_audit_log_says_who(start, tmp_path):
    tokens, log = tmp_path / "tokens.jsonl", tmp_path / "audit.jsonl"
    secrets = {scope: create_token(tokens, scope, scopes=[scope]) for scope in ("admin", "read")}
    server = start(token_file=tokens, audit_log=log)
    with RepositoryClient(server.url, token=secrets["read"]) as client:
        assert refused(client.set_traffic, "m", HALVES)[0] == 403
        assert refused(client.start_rollout, "m", {"version": "2"})[0] == 403
        assert client.traffic("m")["traffic"]["shares"] == {}
    with RepositoryClient(server.url, token=secrets["admin"]) as client:
        client.set_traffic("m", HALVES | {"sticky": "x-user"})
        refused(client.set_traffic, "m", {"shares": {"blue": 1.0}})

    def told():
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        return [each for each in lines if each["action"] == "traffic"]

    wait(lambda: len(told()) == 2)
    done, not_done = told()
    assert (done["who"], done["target"], done["outcome"]) == ("admin", "m", "done")
    assert done["details"]["shares"] == "stable=0.5 canary=0.5"
    assert (not_done["outcome"], not_done["details"]["reason"][:16]) == ("refused", "model 'm' has no")


def test_the_asynchronous_client_asks_too(start):
    server = start()

    async def ask():
        async with AsyncClient(server.url) as client:
            assert (await client.traffic("m"))["model"] == "m"
            with pytest.raises(RequestError, match="has had no rollout"):
                await client.rollout("m")

    asyncio.run(ask())


def asked(**more):
    return RolloutRequest(version="2", **more)


def test_rollouts_that_cannot_begin(repository, made):
    def begin(request, name="m"):
        with pytest.raises(RepositoryError) as caught:
            repository.replan(name, lambda plan, found: plans.with_rollout(plan, found, request, "me", 0.0))
        return caught.value.kind, str(caught.value)

    assert begin(asked(rollback=("p98 > 1s",)))[0] == "invalid"
    assert begin(RolloutRequest(version="7")) == ("missing", "model 'm' has no version 7; there: 1, 2")
    assert "no label 'blue'" in begin(RolloutRequest(version="blue"))[1]
    assert "is the stable one already" in begin(RolloutRequest(version="1"))[1]
    repository.push(made[1], "other")
    assert "stands nowhere" in begin(RolloutRequest(version="1"), "other")[1]
    repository.replan("m", lambda plan, found: plans.with_traffic(plan, found, Traffic(shares={"2": 1.0})))
    assert "clear them first" in begin(asked())[1]
    repository.replan("m", lambda plan, found: plans.with_traffic(plan, found, Traffic()))
    repository.replan("m", lambda plan, found: plans.with_rollout(plan, found, asked(), "me", 0.0))
    kind, text = begin(asked())
    assert kind == "conflict"
    assert "a rollout of version 2 that goes on" in text
    for version in ("1", "2"):
        with pytest.raises(RepositoryError, match=r"stands on|has a part in its rollout"):
            repository.remove("m", version)
    with pytest.raises(RepositoryError, match="a rollout of version 2 that goes on"):
        repository.replan("m", lambda plan, found: plans.with_traffic(plan, found, Traffic()))
    repository.replan("m", lambda plan, found: plans.with_stop(plan, found, "me", 1.0))
    with pytest.raises(RepositoryError, match="has no rollout that goes on"):
        repository.replan("m", lambda plan, found: plans.with_stop(plan, found, "me", 1.0))


def test_a_damaged_file_is_the_problem_of_its_model_and_what_serves_stays(start, repository):
    server = start()
    (repository.root / "m" / plans.PLAN).write_text('{"traffic": {"shares": {"1": 2}}}')
    status, _, body = exchange(server, "GET", "/v2/models/m/traffic")
    assert (status, "traffic.json" in json.loads(body)["error"]) == (400, True)
    assert set(answers(server, 10)) == {"1"}
