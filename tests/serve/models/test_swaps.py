"""Versions of real artifacts that take each other's place while clients ask, and artifacts that must not."""

import gc
import importlib
import json
import os
import shutil
import subprocess
import threading
import time
import weakref

import numpy as np
import pytest
from numbered import Clients, make_numbered, wait
from serve_fakes import exchange, start_script

from lepton_xla.errors import RepositoryError
from lepton_xla.serve import Options, Server
from lepton_xla.serve.access.tokens import create_token
from lepton_xla.serve.batching.engine import Engine
from lepton_xla.serve.models.repository import Repository
from lepton_xla.serve.observe.audit import Audit


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_numbered(tmp_path_factory.mktemp("made"), (1, 2, 3, 4))


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


def index(server):
    status, _, body = exchange(server, "POST", "/v2/repository/index")
    assert status == 200, body
    return {(each["name"], each.get("version", "")): each for each in json.loads(body)}


def swap(server, repository, artifact, version):
    repository.push(artifact, "m", version)
    wait(lambda: server.models.versions("m") == [version])


def test_weights_are_freed_beside_the_event_loop(start, repository, made):
    server, threads = start(), []
    # No handle here: what a model's weights are referred to by last is what frees them.
    for weight in server.models.find("m").model.runtime.weights:
        weakref.finalize(weight, lambda: threads.append(threading.current_thread().name)).atexit = False
    del weight
    swap(server, repository, made[2], "2")
    wait(lambda: threads)
    assert {name.partition("_")[0] for name in threads} == {"lepton-free"}


def test_no_answer_is_lost_refused_or_mixed_while_versions_change(start, repository, made):
    server = start()
    gone = []
    with Clients(server) as clients:
        for number in (2, 3, 4):
            handle = server.models.find("m")
            gone += [weakref.ref(handle), weakref.ref(handle.model)]
            del handle
            before = clients.answers.get(str(number), 0)
            swap(server, repository, made[number], str(number))
            wait(lambda n=number, b=before: clients.answers.get(str(n), 0) > b + 20)
    assert set(clients.answers) == {"1", "2", "3", "4"}
    text = exchange(server, "GET", "/metrics")[2].decode()
    for version, count in clients.answers.items():
        assert f'lepton_inference_requests_total{{model="m",version="{version}"}} {float(count)}\n' in text
    wait(lambda: [each["state"] for each in index(server).values()] == ["READY"])
    wait(lambda: not any(each() for each in gone))


def test_one_that_comes_again_is_not_timed_anew(start, monkeypatch):
    known, real = [], Engine.warm_up

    def warm_up(self, *args, same_program=False, **more):
        known.append(same_program)
        return real(self, *args, same_program=same_program, **more)

    monkeypatch.setattr(Engine, "warm_up", warm_up)
    server = start(explicit=True, load=("m",))
    before = server.models.find("m").scheduler.engine.measured
    for action in ("unload", "load"):
        assert exchange(server, "POST", f"/v2/repository/models/m/{action}")[0] == 200
    assert server.models.find("m").scheduler.engine.measured is before
    assert known == [False, True]


def test_labels_move_without_a_break_and_each_route_keeps_its_version(start, repository, made):
    for number in (2, 3):
        repository.push(made[number], "m")
    repository.promote("m", "1")
    repository.promote("m", "3", "canary")
    server = start()
    assert server.models.versions("m") == ["1", "3"]
    with Clients(server) as stable, Clients(server, route="/labels/canary/infer") as canary:
        for version in ("3", "1", "3"):
            repository.promote("m", version)
            wait(lambda v=version: server.models.labels("m").get("stable") == v)
            before = stable.answers.get(version, 0)
            wait(lambda v=version, b=before: stable.answers.get(v, 0) > b + 5)
        repository.rollback("m", "stable")
        wait(lambda: server.models.labels("m") == {"stable": "1", "canary": "3"})
        before = stable.answers["1"]
        wait(lambda: stable.answers["1"] > before + 5)
    assert (set(stable.answers), set(canary.answers)) == ({"1", "3"}, {"3"})
    with pytest.raises(RepositoryError, match="stands on"):
        repository.remove("m", "3")


def torn(path, made):
    """An artifact one of whose files is cut short."""
    shutil.copytree(made[2], path)
    biggest = max((each for each in path.rglob("*") if each.is_file()), key=lambda each: each.stat().st_size)
    with open(biggest, "r+b") as file:
        file.truncate(biggest.stat().st_size // 2)


def half_copied(path, made):
    """What `cp -r` has written when it is half done: the manifest, and some of the files."""
    shutil.copytree(made[2], path)
    files = sorted(each for each in path.rglob("*") if each.is_file() and each.name != "manifest.json")
    for each in files[len(files) // 2 :]:
        each.unlink()


def no_manifest(path, made):
    path.mkdir()
    (path / "manifest.json").write_text("{")


def foreign(path, made):
    """Another program's folder."""
    path.mkdir()
    (path / "manifest.json").write_text(json.dumps({"name": "m", "framework": "other"}))


def poisoned(path, made):
    import jax.numpy as jnp

    import lepton_xla as lx

    weights = {"first": jnp.eye(4), "second": jnp.eye(4).at[2, 3].set(jnp.nan)}
    program = lx.trace(
        lambda w, x: {"first": x @ w["first"], "second": x @ w["second"]},
        weights,
        {"x": lx.TensorSpec(("batch", 4), "float32")},
    )
    lx.compile(program, {"batch": (1,)}, name="m").save(path)


@pytest.mark.parametrize("make", [torn, half_copied, no_manifest, foreign, poisoned])
def test_a_bad_artifact_leaves_the_old_one_serving_and_says_why(start, repository, made, make):
    server = start()
    with Clients(server, count=1) as clients:
        make(repository.root / "m" / "2.lepton", made)
        wait(lambda: index(server).get(("m", "2"), {}).get("state") == "UNAVAILABLE")
        reason = index(server)["m", "2"]["reason"]
        assert str(repository.root) not in reason
        assert reason
        if make is poisoned:
            assert "'second' holds NaN" in reason
        assert exchange(server, "GET", "/v2/health/ready")[0] == 200
        assert server.models.versions("m") == ["1"]
        assert server.metrics.of("m", "2").load_failures >= 1
        before = clients.answers["1"]
        wait(lambda: clients.answers["1"] > before + 20)
        repository.push(made[3], "m")
        wait(lambda: server.models.versions("m") == ["3"])
        wait(lambda: clients.answers.get("3", 0) > 5)


def test_a_copy_that_is_under_way_is_loaded_once_it_is_whole(start, repository, made):
    """By `cp -r` and not by `leptonx repo push`: the manifest may be there long before the weights."""
    server = start()
    half_copied(repository.root / "m" / "2.lepton", made)
    wait(lambda: index(server).get(("m", "2"), {}).get("state") == "UNAVAILABLE")
    shutil.copytree(made[2], repository.root / "m" / "2.lepton", dirs_exist_ok=True)
    wait(lambda: server.models.versions("m") == ["2"])


def test_a_version_that_is_removed_while_it_loads(start, repository, made, monkeypatch):
    from lepton_xla.serve.loader import ArtifactLoader

    server = start()
    loading, go_on, load = threading.Event(), threading.Event(), ArtifactLoader.load

    def slow(self, name, version, source, others):
        loading.set()
        assert go_on.wait(20)
        return load(self, name, version, source, others)

    monkeypatch.setattr(ArtifactLoader, "load", slow)
    with Clients(server, count=1) as clients:
        repository.push(made[2], "m")
        assert loading.wait(20)
        assert index(server)["m", "2"]["state"] == "LOADING"
        shutil.rmtree(repository.root / "m" / "2.lepton")
        go_on.set()
        wait(lambda: ("m", "2") not in index(server))
        before = clients.answers["1"]
        wait(lambda: clients.answers["1"] > before + 5)
    assert set(clients.answers) == {"1"}


def test_a_model_whose_folder_goes_is_unloaded_and_comes_again(start, repository, made):
    server = start()
    shutil.rmtree(repository.root / "m")
    wait(lambda: server.models.names() == [])
    assert exchange(server, "POST", "/v2/models/m/infer", b"{}")[0] == 404
    assert [exchange(server, "GET", f"/v2/health/{what}")[0] for what in ("live", "ready")] == [200, 503]
    repository.push(made[1], "m")
    wait(lambda: exchange(server, "GET", "/v2/health/ready")[0] == 200)
    assert server.models.names() == ["m"]
    text = exchange(server, "GET", "/metrics")[2].decode()
    assert 'lepton_model_loads_total{model="m",version="1"} 2.0\n' in text
    assert 'lepton_model_ready{model="m",version="1"} 1.0\n' in text


def test_an_unreadable_repository_changes_nothing(start, repository, made):
    server = start()
    os.rename(repository.root, repository.root.with_name("away"))
    time.sleep(0.2)
    assert server.models.versions("m") == ["1"]
    os.rename(repository.root.with_name("away"), repository.root)
    swap(server, repository, made[2], "2")


def control(server, name, action, parameters=None):
    body = b"" if parameters is None else json.dumps({"parameters": parameters}).encode()
    status, _, answer = exchange(server, "POST", f"/v2/repository/models/{name}/{action}", body)
    return status, json.loads(answer).get("error", "")


def test_triton_s_routes_load_and_unload(start, repository, made):
    server = start(explicit=True)
    assert server.models.names() == []
    assert index(server) == {("m", ""): {"name": "m"}}
    assert exchange(server, "GET", "/v2/health/ready")[0] == 200, "clients say what is loaded"
    assert exchange(server, "GET", "/v2/models/m/ready")[0] == 404
    assert control(server, "m", "load") == (200, "")
    with Clients(server, count=2) as clients:
        repository.push(made[2], "m")
        assert control(server, "m", "load") == (200, "")
        wait(lambda: clients.answers.get("2", 0) > 5)
    torn(repository.root / "m" / "3.lepton", made)
    status, error = control(server, "m", "load")
    assert status == 400
    assert error.startswith("failed to load 'm', version 3: ")
    assert str(repository.root) not in error
    assert server.models.versions("m") == ["2"]
    assert control(server, "m", "unload", {"unload_dependents": True}) == (200, "")
    assert server.models.names() == []
    for name, action, wanted in (
        ("m", "unload", (404, "failed to unload 'm', there is no model 'm' loaded")),
        ("nobody", "load", (404, "failed to load 'nobody', the repository has no model of that name")),
        ("..%2f..%2fetc", "load", (400, "failed to load '../../etc', the repository has no model of that name")),
    ):
        assert control(server, name, action) == wanted
    shutil.rmtree(repository.root / "m" / "3.lepton")
    for config, wanted in (
        ('{"max_batch_size": "1"}', 200), ('{"max_batch_size": 3}', 400), ('{"max_batch_size": -1}', 400),
        ('{"backend": "python"}', 400), ("{", 400), ('{"dynamic_batching": {"max_queue_delay_microseconds": 7}}', 200),
    ):  # fmt: skip
        status, error = control(server, "m", "load", {"config": config})
        assert (status, bool(error)) == (wanted, wanted != 200), config
        assert wanted == 200 or error.startswith("failed to load 'm', ")
    shown = json.loads(exchange(server, "GET", "/v2/models/m/config")[2])
    assert shown["dynamic_batching"]["max_queue_delay_microseconds"] == 7
    status, error = control(server, "m", "load", {"config": "{}", "file:1/model.py": "aW1wb3J0IG9z"})
    assert status == 400
    assert "unknown field" in error
    assert "model_repository" in json.loads(exchange(server, "GET", "/v2")[2])["extensions"]


# gevent, which the client is built on, warns on import and when a loop is left open.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_tritons_client_loads_and_unloads(start, repository, made):
    triton = importlib.import_module("tritonclient.http")
    refused = importlib.import_module("tritonclient.utils").InferenceServerException
    repository.push(made[1], "other")
    server = start(explicit=True)
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        assert client.get_model_repository_index() == [{"name": "m"}, {"name": "other"}]
        client.load_model("m")
        assert client.is_model_ready("m", "1")
        client.load_model("m", config=json.dumps({"max_batch_size": 1}))
        assert client.get_model_config("m")["max_batch_size"] == 1
        index = [{"name": "m", "version": "1", "state": "READY"}, {"name": "other"}]
        assert client.get_model_repository_index() == index
        with pytest.raises(refused, match=r"failed to load 'm', .* unknown field"):
            client.load_model("m", config="{}", files={"file:1/model.onnx": b"x"})
        with pytest.raises(refused, match="failed to load 'nobody'"):
            client.load_model("nobody")
        client.unload_model("m", unload_dependents=True)
        assert not client.is_model_ready("m")
        with pytest.raises(refused, match="failed to unload 'm'"):
            client.unload_model("m")


def test_only_a_token_for_admin_changes_models(start, repository, tmp_path):
    tokens = {}
    for scope in ("read", "infer", "admin"):
        tokens[scope] = create_token(tmp_path / "tokens.jsonl", scope, [scope])
    server = start(explicit=True, token_file=tmp_path / "tokens.jsonl")

    def status(action, scope):
        headers = {"Authorization": f"Bearer {tokens[scope]}"} if scope else {}
        return exchange(server, "POST", f"/v2/repository/models/m/{action}", b"", headers)[0]

    for action in ("load", "unload"):
        assert [status(action, scope) for scope in (None, "read", "infer", "admin")] == [401, 403, 403, 200]


def test_the_audit_log_says_who_changed_what(start, repository, made, tmp_path):
    token = create_token(tmp_path / "tokens.jsonl", "deployer", ["admin"])
    server = start(explicit=True, token_file=tmp_path / "tokens.jsonl", audit_log=tmp_path / "audit.jsonl")
    torn(repository.root / "m" / "2.lepton", made)
    for action in ("load", "unload"):
        exchange(server, "POST", f"/v2/repository/models/m/{action}", b"", {"Authorization": f"Bearer {token}"})
        shutil.rmtree(repository.root / "m" / "2.lepton", ignore_errors=True)
    exchange(server, "POST", "/v2/repository/models/m/load", b"", {"Authorization": f"Bearer {token}"})
    server.stop()
    told = [(each.who, each.action, each.target, each.outcome) for each in Audit(tmp_path / "audit.jsonl").tail(9)]
    assert told == [("deployer", "load", "m/2", "failed"), ("deployer", "load", "m/1", "done")]


def test_a_version_that_cannot_be_opened_changes_nothing(start, repository, made, monkeypatch):
    from lepton_xla.serve.loader import ArtifactLoader

    server = start()
    opened, broken = ArtifactLoader.open, [True]

    def fragile(self, loaded):
        if loaded.signature.version == "2" and broken:
            raise ValueError("its settings do not go together")
        return opened(self, loaded)

    monkeypatch.setattr(ArtifactLoader, "open", fragile)
    with Clients(server, count=1) as clients:
        repository.push(made[2], "m")
        wait(lambda: index(server).get(("m", "2"), {}).get("state") == "UNAVAILABLE")
        assert index(server)["m", "2"]["reason"] == "ValueError: its settings do not go together"
        assert server.models.versions("m") == ["1"]
        broken.clear()
        wait(lambda: clients.answers.get("2", 0) > 5)


def test_settings_of_a_model_hold_and_change(start, repository):
    server = start()
    settings = repository.root / "m" / "model.toml"
    settings.write_text("[serving]\nmax_queue_rows = 2\nmax_delay_us = 9\n")
    wait(lambda: server.models.find("m").scheduler.max_rows == 2)
    assert server.models.find("m").scheduler.max_delay_s == pytest.approx(9e-6)
    settings.write_text("[serving]\nmax_queue_rowz = 2\n")
    wait(lambda: index(server).get(("m", ""), {}).get("state") == "UNAVAILABLE")
    assert "max_queue_rowz" in index(server)["m", ""]["reason"]
    assert server.models.find("m").scheduler.max_rows == 2


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1", "2"])
def test_a_stop_does_not_wait_for_what_is_being_loaded(repository, made, version):
    """Version 1 is loaded before the server listens, version 2 while it serves."""
    script = f"""
        import time
        from lepton_xla.cli.serve import serve
        from lepton_xla.serve.loader import ArtifactLoader

        load = ArtifactLoader.load

        def slow(self, name, version, *more):
            if version == "{version}":
                print("loading", flush=True)
                time.sleep(30)
            return load(self, name, version, *more)

        ArtifactLoader.load = slow
        serve()
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    flags = ("--json", "--port", "0", "--repository-poll-s", "0.05")
    process = start_script(script, repository.root, *flags, environment=environment, stdout=subprocess.PIPE)
    with process:
        if version == "2":
            assert json.loads(process.stdout.readline())["event"] == "listening"
            repository.push(made[2], "m")
        assert process.stdout.readline() == "loading\n"
        began = time.monotonic()
        process.terminate()
        assert json.loads(process.stdout.readline()) == {"event": "stopped", "all_answered": True}
        assert process.wait(20) == 0
    assert time.monotonic() - began < 5


@pytest.mark.slow
def test_memory_stays_flat_over_hundreds_of_reloads(start, repository, made):
    import psutil

    process = psutil.Process()
    server = start(explicit=True, load=("m",))
    sizes = []
    with Clients(server, count=1):
        for turn in range(300):
            status, error = control(server, "m", "load", {"config": json.dumps({"max_batch_size": 1 + 7 * (turn % 2)})})
            assert status == 200, error
            if turn % 50 == 49:
                gc.collect()
                sizes.append(process.memory_info().rss)
    grown = np.diff(sizes[1:])
    assert grown.sum() < 8 << 20, [size >> 20 for size in sizes]


def test_what_is_loaded_beside_others_leaves_the_cores_to_them(start, repository, made, monkeypatch):
    from lepton_xla.serve.loader import ArtifactLoader

    niceness, load = [], ArtifactLoader.load

    def noted(self, *arguments):
        niceness.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return load(self, *arguments)

    monkeypatch.setattr(ArtifactLoader, "load", noted)
    server = start()
    swap(server, repository, made[2], "2")
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    assert niceness == [usual, min(usual + 10, 19)]
