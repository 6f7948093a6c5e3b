"""Adjustments: a server moves its weights towards others in steps, as long as accuracy holds."""

import asyncio
import errno
import hashlib
import json
import shutil
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from serve_fakes import exchange

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from numbered import wait
from test_traffic_of_servers import Served

import lepton_xla as lx
from lepton_xla.adjustments import move_weights
from lepton_xla.compiler import master_weights, requantize
from lepton_xla.compiler.artifact import Artifact
from lepton_xla.errors import ArtifactError
from lepton_xla.serve import Options, Server
from lepton_xla.serve.app import frontend
from lepton_xla.serve.client.repository import RepositoryClient
from lepton_xla.serve.client.transport import RequestError
from lepton_xla.serve.models import movements
from lepton_xla.serve.models.manager import Entry
from lepton_xla.serve.models.repository import Repository
from lepton_xla.serve.protocol.adjustment import AdjustmentRequest
from lepton_xla.serve.traffic.adjuster import Adjuster

RANDOM = np.random.default_rng(0)
RIGHT = {"w": RANDOM.standard_normal((16, 4)).astype(np.float32)}
X = RANDOM.standard_normal((200, 16)).astype(np.float32)
LABEL = (X @ RIGHT["w"]).argmax(1)
BETTER = {"w": 2 * RIGHT["w"]}
WORSE = {"w": -RIGHT["w"]}


def compiled(weights, **more):
    program = lx.trace(lambda w, x: x @ w["w"], weights, {"x": lx.TensorSpec(("batch", 16), "float32")})
    recipe = lx.Recipe.load("int8-weight-only").replace({"measure": False})
    return lx.compile(lx.optimize(program, recipe, keep_master=True), {"batch": (1, 8)}, name="m", **more)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An artifact with labelled golden rows and its float master, and updates of it by name."""
    folder = tmp_path_factory.mktemp("made")
    compiled(RIGHT, golden={"x": X, "label": LABEL}, keep_master=True).save(folder / "base.lepton")
    compiled(RIGHT).save(folder / "plain.lepton")
    for name, weights in (("better", BETTER), ("worse", WORSE)):
        requantize(folder / "base.lepton", weights).save(folder / f"{name}.lepton")
    return folder


@pytest.fixture
def repository(tmp_path, made):
    repository = Repository(tmp_path / "MODELS")
    repository.push(made / "base.lepton", "m")
    return repository


def answered(server):
    row = {"name": "x", "datatype": "FP32", "shape": [1, 16], "data": X[0].tolist()}
    status, _, body = exchange(server, "POST", "/v2/models/m/infer", json.dumps({"inputs": [row]}).encode())
    assert status == 200, body
    told = json.loads(body)
    return told["model_version"], np.float32(told["outputs"][0]["data"])


@pytest.mark.parametrize("label", [False, True])
def test_weights_move_by_the_formula_and_the_last_step_serves(repository, made, monkeypatch, tmp_path, label):
    monkeypatch.setattr(frontend, "_LOOK_S", 0.02)
    if label:
        repository.promote("m", "1")
    log = tmp_path / "audit.jsonl"
    options = Options(port=0, repository_poll_s=0.05, audit_log=log)
    with Server(options=options, repository=repository.root) as server, RepositoryClient(server.url) as client:
        begun = client.adjust(made / "better.lepton", "m", alpha=0.5, steps=3, every_s=0.05)
        assert (begun["state"], begun["base"], begun["step"]) == ("running", "1", 0)
        wait(lambda: client.adjustment("m")["state"] == "done")
        shown = client.adjustment("m")
        assert (shown["step"], shown["labelled"], shown["accuracy_before"]) == (3, 200, shown["accuracy_before"])
        assert shown["accuracy_before"] > 0.95
        assert [each["step"] for each in shown["decisions"]] == [0, 1, 2, 3, 3]
        weights = RIGHT
        for _ in range(3):
            weights = move_weights(weights, BETTER, 0.5)
        serving = repository.root / "m" / f"{shown['version']}.lepton"
        np.testing.assert_array_equal(master_weights(serving)["w"], weights["w"])
        version, answer = answered(server)
        assert version == shown["version"]
        np.testing.assert_allclose(answer, X[0] @ weights["w"], atol=0.1)
        gauge = f'lepton_adjustment_step{{model="m",version="{version}"}} 3.0'
        wait(lambda: gauge in exchange(server, "GET", "/metrics")[2].decode())
        found = repository.find("m")
        assert set(found.versions) == {"1", version}
        assert found.settings.labels == ({"stable": version} if label else {})
        wait(lambda: not (repository.root / "m" / ".adjustment").exists())
    told = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [each for each in told if each["action"] == "adjust"]
    assert [(each["outcome"], each["details"]["step"]) for each in steps] == [
        ("done", 1), ("done", 2), ("done", 3), ("done", 3),
    ]  # fmt: skip


def test_a_step_that_would_be_worse_is_not_put(repository, made, monkeypatch):
    monkeypatch.setattr(frontend, "_LOOK_S", 0.02)
    options = Options(port=0, repository_poll_s=0.05)
    with Server(options=options, repository=repository.root) as server, RepositoryClient(server.url) as client:
        # 1 -> 0.6 -> 0.28 -> 0.02 -> -0.18: the classes hold until the sign changes.
        client.adjust(made / "worse.lepton", "m", alpha=0.2, steps=5, every_s=0.0, max_drop=0.1)
        wait(lambda: client.adjustment("m")["state"] != "running")
        shown = client.adjustment("m")
        assert (shown["state"], shown["step"]) == ("stopped", 3)
        assert "the next step would be right on 0" in shown["reason"]
        version, answer = answered(server)
        assert version == shown["version"]
        assert int(answer.argmax()) == LABEL[0]


def test_feedback_that_falls_makes_it_go_back(repository, made, monkeypatch):
    monkeypatch.setattr(frontend, "_LOOK_S", 0.02)
    monkeypatch.setattr(
        frontend.HTTPFrontEnd, "_judged", lambda self, name, version: (90, 10) if version == "1" else (50, 150)
    )
    options = Options(port=0, repository_poll_s=0.05)
    with Server(options=options, repository=repository.root) as server, RepositoryClient(server.url) as client:
        client.adjust(made / "better.lepton", "m", alpha=0.1, steps=100, every_s=0.5)
        wait(lambda: client.adjustment("m")["state"] != "running")
        shown = client.adjustment("m")
        assert (shown["state"], shown["version"], shown["feedback_before"]) == ("went back", "1", 0.9)
        wait(lambda: answered(server)[0] == "1")
        assert set(repository.find("m").versions) == {"1"}


def test_it_stops_when_asked_or_when_somebody_puts_another_version(repository, made, monkeypatch):
    monkeypatch.setattr(frontend, "_LOOK_S", 0.02)
    options = Options(port=0, repository_poll_s=0.05)
    with Server(options=options, repository=repository.root) as server, RepositoryClient(server.url) as client:
        client.adjust(made / "better.lepton", "m", alpha=0.1, steps=100, every_s=60)
        wait(lambda: client.adjustment("m")["step"] == 1)
        with pytest.raises(RequestError, match=r"being adjusted.*HTTP 409"):
            client.adjust(made / "better.lepton", "m")
        for change in (lambda: client.start_rollout("m", {"version": "1"}), lambda: client.set_traffic("m", {})):
            with pytest.raises(RequestError, match=r"being adjusted.*HTTP 409"):
                change()
        assert client.stop_adjustment("m")["state"] == "stopped"
        with pytest.raises(RequestError, match=r"no adjustment that goes on.*HTTP 404"):
            client.stop_adjustment("m")
        kept = client.adjustment("m")["version"]
        assert answered(server)[0] == kept

        client.adjust(made / "better.lepton", "m", alpha=0.1, steps=100, every_s=60)
        wait(lambda: client.adjustment("m")["step"] == 1)
        pushed = client.push(made / "base.lepton", "m")
        wait(lambda: client.adjustment("m")["state"] == "stopped")
        assert f"version {pushed} was put in the place" in client.adjustment("m")["reason"]
        wait(lambda: answered(server)[0] == pushed)


def test_bad_input_is_refused_and_leaves_nothing(repository, made, tmp_path):
    other = tmp_path / "other.lepton"
    program = lx.trace(lambda w, x: x @ w["w"] + 1, RIGHT, {"x": lx.TensorSpec(("batch", 16), "float32")})
    recipe = lx.Recipe.load("int8-weight-only").replace({"measure": False})
    lx.compile(lx.optimize(program, recipe, keep_master=True), {"batch": (1, 8)}, name="m", keep_master=True).save(
        other
    )
    with (
        Server(options=Options(port=0), repository=repository.root) as server,
        RepositoryClient(server.url) as client,
    ):
        for plan in ({"alpha": 0}, {"alpha": 1.1}, {"steps": 0}, {"every_s": -1}, {"max_drop": 2}, {"beta": 1}):
            with pytest.raises(RequestError, match=r"the body is not what this route takes.*HTTP 400"):
                client.adjust(made / "better.lepton", "m", **plan)
        with pytest.raises(RequestError, match=r"has no float master.*HTTP 400"):
            client.adjust(made / "plain.lepton", "m")
        with pytest.raises(RequestError, match=r"the programs differ.*HTTP 400"):
            client.adjust(other, "m")
        with pytest.raises(RequestError, match="HTTP 404"):
            client.adjust(made / "better.lepton", "nothing")
        with pytest.raises(RequestError, match=r"has had no adjustment.*HTTP 404"):
            client.adjustment("m")
        assert [each for each in (repository.root / "m").iterdir() if each.name.startswith(".")] == []
        assert answered(server)[0] == "1"


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--workers", "2")])
def test_kill_9_in_the_middle_and_it_goes_on(repository, made, flags):
    with Served(repository.root, *flags) as served, RepositoryClient(served.url) as client:
        client.adjust(made / "better.lepton", "m", alpha=0.3, steps=6, every_s=0.3)
        wait(lambda: client.adjustment("m")["step"] >= 2, 60)
        served.kill()
    with Served(repository.root, *flags) as served, RepositoryClient(served.url) as client:
        wait(lambda: client.adjustment("m")["state"] == "done", 60)
        shown = client.adjustment("m")
        weights = RIGHT
        for _ in range(6):
            weights = move_weights(weights, BETTER, 0.3)
        serving = repository.root / "m" / f"{shown['version']}.lepton"
        np.testing.assert_array_equal(master_weights(serving)["w"], weights["w"])
        until = time.monotonic() + 20
        while {answered(served)[0] for _ in range(8)} != {shown["version"]}:
            assert time.monotonic() < until


def adjuster(repository, clock, faulty=()):
    """An adjuster beside no server: whatever is in the repository counts as loaded."""

    async def index():
        return [
            Entry(folder.name, each, "READY")
            for folder in repository.root.iterdir()
            for each in repository.find(folder.name).versions
        ]

    async def reroute(name, who):
        pass

    def loaded(name):
        if name in faulty:
            raise RuntimeError("a fault")
        return []

    return Adjuster(
        repository.root, index, reroute, loaded, lambda name, version: (0, 0), lambda *_, **__: None, lambda: clock[0]
    )


def begun(repository, made, name, steps=1):
    asked = AdjustmentRequest(manifest="0" * 64, alpha=0.5, steps=steps, every_s=0.0)
    target = movements.folder_of(repository.root, name) / movements.TARGET
    target.parent.mkdir()
    shutil.copytree(made / "better.lepton", target)
    repository.replan(name, lambda plan, found: movements.begun(plan, found, asked, "me", 0.0))


def test_the_fault_of_one_adjustment_stops_no_other(repository, made):
    repository.push(made / "base.lepton", "n")
    begun(repository, made, "m")
    begun(repository, made, "n")
    asyncio.run(adjuster(repository, [1.0], faulty=("m",)).look(["m", "n"]))
    states = {name: repository.find(name).plan.adjustment for name in ("m", "n")}
    assert {name: each.step for name, each in states.items()} == {"m": 0, "n": 1}
    assert states["m"].running


@pytest.mark.parametrize("where", ["step", "commit"])
def test_a_full_disk_delays_an_adjustment(repository, made, monkeypatch, where):
    full, clock = [True], [1.0]

    def out_of_room(real, error):
        def call(*args, **kwargs):
            if full:
                raise error from OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        return call

    begun(repository, made, "m")
    if where == "step":
        monkeypatch.setattr(Artifact, "save", out_of_room(Artifact.save, ArtifactError("step.lepton: cannot write")))
    else:
        real = Repository.commit
        monkeypatch.setattr(Repository, "commit", out_of_room(real, OSError(errno.ENOSPC, "No space left on device")))
    adjusting = adjuster(repository, clock)
    asyncio.run(adjusting.look(["m"]))
    assert (repository.find("m").plan.adjustment.running, set(repository.find("m").versions)) == (True, {"1"})
    full.clear()
    clock[0] += 5  # not yet tried again
    asyncio.run(adjusting.look(["m"]))
    assert repository.find("m").plan.adjustment.step == 0
    clock[0] += 6
    asyncio.run(adjusting.look(["m"]))
    found = repository.find("m")
    assert (found.plan.adjustment.step, found.plan.adjustment.version) == (1, "2")
    np.testing.assert_array_equal(
        master_weights(found.versions["2"])["w"], move_weights(RIGHT, BETTER, 0.5)["w"]
    )  # fmt: skip


def killed_around_a_step(repository, made):
    """What a server leaves that is killed before it puts its first step, and where that is."""
    asked = AdjustmentRequest(manifest="0" * 64, alpha=0.5, steps=2, every_s=0.0)
    target = movements.folder_of(repository.root, "m") / movements.TARGET
    target.parent.mkdir()
    shutil.copytree(made / "better.lepton", target)
    once, step = move_weights(RIGHT, BETTER, 0.5), target.parent / "step.lepton"
    requantize(made / "base.lepton", once).save(step)
    digest = hashlib.sha256((step / "manifest.json").read_bytes()).hexdigest()

    def begin(plan, found):
        begun = movements.begun(plan, found, asked, "me", time.time())
        pending = msgspec.structs.replace(begun.adjustment, pending="2", pending_digest=digest)
        return msgspec.structs.replace(begun, adjustment=pending)

    repository.replan("m", begin)
    return once, step


def test_what_another_pushed_with_the_number_of_a_step_is_not_taken_for_it(repository, made, monkeypatch):
    monkeypatch.setattr(frontend, "_LOOK_S", 0.02)
    killed_around_a_step(repository, made)
    repository.push(made / "worse.lepton", "m", "2")
    options = Options(port=0, repository_poll_s=0.05)
    with Server(options=options, repository=repository.root) as server, RepositoryClient(server.url) as client:
        wait(lambda: client.adjustment("m")["state"] == "stopped")
        shown = client.adjustment("m")
        assert (shown["step"], shown["reason"]) == (0, "version 2 was put in the place of version 1")


@pytest.mark.parametrize("put", [False, True])
def test_a_server_that_was_killed_around_a_step_makes_it_once(repository, made, monkeypatch, put):
    monkeypatch.setattr(frontend, "_LOOK_S", 0.02)
    once, step = killed_around_a_step(repository, made)
    if put:
        repository.push(step, "m", "2")
    options = Options(port=0, repository_poll_s=0.05)
    with Server(options=options, repository=repository.root) as server, RepositoryClient(server.url) as client:
        wait(lambda: client.adjustment("m")["state"] == "done")
        shown = client.adjustment("m")
        assert (shown["step"], shown["version"]) == (2, "3")
        twice = move_weights(once, BETTER, 0.5)
        np.testing.assert_array_equal(master_weights(repository.root / "m" / "3.lepton")["w"], twice["w"])
        wait(lambda: answered(server)[0] == "3")


def test_a_step_that_cannot_be_loaded_leaves_the_one_before(repository, made, monkeypatch):
    monkeypatch.setattr(frontend, "_LOOK_S", 0.02)
    commit = Repository.commit

    def damaged(self, staged, name, version=None):
        for file in (each for each in (staged / "weights").rglob("0") if each.is_file()):
            file.write_bytes(file.read_bytes()[:-1] + b"?")
        return commit(self, staged, name, version)

    monkeypatch.setattr(Repository, "commit", damaged)
    options = Options(port=0, repository_poll_s=0.05)
    with Server(options=options, repository=repository.root) as server, RepositoryClient(server.url) as client:
        client.adjust(made / "better.lepton", "m", alpha=0.5, steps=2, every_s=0)
        wait(lambda: client.adjustment("m")["state"] == "stopped")
        shown = client.adjustment("m")
        assert (shown["step"], shown["version"]) == (0, "1")
        assert "step 1 cannot be loaded" in shown["reason"]
        wait(lambda: set(repository.find("m").versions) == {"1"})
        assert answered(server)[0] == "1"
