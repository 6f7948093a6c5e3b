"""A repository in an object store, here fsspec's in memory: what is fetched, checked, kept and pushed."""

import os
import threading

import fsspec
import pytest
from fake_artifacts import is_whole, make_artifact

from lepton_xla.cli import _traffic
from lepton_xla.errors import ArtifactError, RepositoryError
from lepton_xla.serve.models.plans import with_rollout
from lepton_xla.serve.models.remote import RemoteRepository, open_repository
from lepton_xla.serve.models.repository import Repository
from lepton_xla.serve.protocol.traffic import Plan, RolloutRequest


@pytest.fixture
def url():
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pseudo_dirs[:] = [""]
    return "memory://bucket/models"


@pytest.fixture
def repository(url, tmp_path):
    return RemoteRepository(url, tmp_path / "cache")


@pytest.fixture
def artifact(tmp_path):
    return make_artifact(tmp_path / "a.lepton", {"weights/a": b"weights" * 999, "empty": b""})


def kind(function, *arguments):
    with pytest.raises(RepositoryError) as caught:
        function(*arguments)
    return caught.value.kind


def reads(repository, monkeypatch):
    """The files that are read from the store."""
    found, real = [], repository._fs.get_file

    def get_file(path, target, **more):
        found.append(path.rpartition("/models/")[2])
        return real(path, target, **more)

    monkeypatch.setattr(repository._fs, "get_file", get_file)
    return found


def test_what_is_wanted_is_fetched_once_and_what_is_not_goes(repository, artifact, monkeypatch):
    read = reads(repository, monkeypatch)
    assert [repository.push(artifact, "m") for _ in range(3)] == ["1", "2", "3"]
    repository.promote("m", "1")
    assert read == []
    found = repository.scan()["m"]
    assert (list(found.versions), found.wanted, found.problem) == (["1", "2", "3"], ("1", "3"), None)
    assert sorted(read) == [f"m/{v}.lepton/{f}" for v in "13" for f in ("empty", "weights/a")]
    assert all(is_whole(found.versions[version]) for version in found.wanted)
    assert set(found.stamps) == {"1", "3"}
    read.clear()
    assert repository.scan()["m"].stamps == found.stamps
    assert RemoteRepository(repository.location, repository.root).scan()["m"].stamps == found.stamps
    assert read == []
    repository.promote("m", "2")
    assert repository.scan()["m"].wanted == ("2", "3")
    assert sorted(os.listdir(repository.root / "m")) == ["2.lepton", "3.lepton"]
    assert repository.rollback("m") == ("2", "1")
    assert kind(repository.remove, "m", "1") == "conflict"
    repository.remove("m", "2")
    assert list(repository.scan()["m"].versions) == ["1", "3"]
    (described,) = repository.describe()
    assert [(each["version"], each["labels"], each["size_bytes"]) for each in described["versions"]] == [
        ("1", ["stable"], 6993), ("3", [], 6993),
    ]  # fmt: skip


def test_a_version_without_a_manifest_is_none_and_one_that_is_damaged_is_not_used(repository, artifact):
    repository.push(artifact, "m")
    before = repository.scan()["m"]
    fs, path = repository._fs, repository._path
    fs.makedirs(f"{path}/m/7.lepton", exist_ok=True)
    fs.pipe_file(f"{path}/m/7.lepton/weights", b"half a copy")
    found = repository.scan()["m"]
    assert (list(found.versions), found.ignored, found.problem) == (["1"], ("7.lepton",), None)
    assert repository.push(artifact, "m") == "8"
    fs.pipe_file(f"{path}/m/8.lepton/weights/a", b"weights" * 998 + b"weighty")
    found = repository.scan()["m"]
    assert "version 8 cannot be fetched: weights/a is damaged" in found.problem
    fs.rm_file(f"{path}/m/8.lepton/weights/a")
    assert "weights/a is missing" in repository.scan()["m"].problem
    assert os.listdir(repository.root / "m") == ["1.lepton"]  # what is served stays
    assert is_whole(before.versions["1"])
    fs.pipe_file(f"{path}/m/8.lepton/weights/a", b"weights" * 999)
    assert repository.scan()["m"].problem is None


@pytest.mark.parametrize("data", [b"weights" * 998 + b"weighty", b"", None])
def test_a_copy_that_was_damaged_on_the_disk_is_fetched_again_by_the_next_process(repository, artifact, data):
    repository.push(artifact, "m")
    file = repository.scan()["m"].versions["1"] / "weights/a"
    file.unlink()
    if data is not None:
        file.write_bytes(data)
    found = RemoteRepository(repository.location, repository.root).scan()["m"]
    assert found.problem is None
    assert is_whole(found.versions["1"])


def test_a_replaced_version_is_fetched_again(repository, artifact, tmp_path):
    repository.push(artifact, "m")
    stamp = repository.scan()["m"].stamps["1"]
    other = make_artifact(tmp_path / "b.lepton", {"weights/a": b"others" * 500, "empty": b""})
    for file in ("weights/a", "manifest.json"):
        repository._fs.pipe_file(f"{repository._path}/m/1.lepton/{file}", (other / file).read_bytes())
    found = repository.scan()["m"]
    assert found.stamps["1"] != stamp
    assert (found.versions["1"] / "weights/a").read_bytes() == b"others" * 500


def test_a_signature_goes_with_it_and_may_come_later(repository, artifact):
    (artifact / "model.sig").write_bytes(b"one")
    repository.push(artifact, "m")
    folder = repository.scan()["m"].versions["1"]
    assert (folder / "model.sig").read_bytes() == b"one"
    repository._fs.pipe_file(f"{repository._path}/m/1.lepton/model.sig", b"two")
    assert repository.scan()["m"].problem is None
    assert (folder / "model.sig").read_bytes() == b"two"


def test_weights_alone_are_fetched_with_their_base(repository, tmp_path):
    whole = make_artifact(tmp_path / "w.lepton", {"code": b"code"}, "m", "some fit")
    update = make_artifact(tmp_path / "u.lepton", {"weights": b"w"}, "m", "some fit", [])
    assert kind(repository.push, update, "m") == "missing"
    assert [repository.push(each, "m") for each in (whole, whole, update)] == ["1", "2", "3"]
    assert repository.scan()["m"].wanted == ("3",)
    assert sorted(os.listdir(repository.root / "m")) == ["2.lepton", "3.lepton"]
    assert repository.find_base("m", "3") == repository.root / "m" / "2.lepton"
    repository.remove("m", "1")
    assert kind(repository.remove, "m", "2") == "conflict"


def test_two_pushes_at_once_do_not_mix(url, repository, tmp_path, monkeypatch):
    lock, real = threading.Lock(), type(repository._fs).pipe_file

    def pipe_file(*arguments, **more):
        with lock:  # one at a time, as a put on a condition is in S3, GCS and Azure; fsspec's memory looks first
            return real(*arguments, **more)

    monkeypatch.setattr(type(repository._fs), "pipe_file", pipe_file)
    sources = [make_artifact(tmp_path / f"{n}.lepton", {"f": bytes([n]) * 1000}) for n in range(6)]
    start, landed, refused = threading.Barrier(6), [], []

    def push(number):
        other = RemoteRepository(url, tmp_path / "cache")
        real, first = other._names, [True]

        def names(path):
            found = real(path)
            if first and first.pop():
                start.wait()  # all have looked before one claims a number
            return found

        other._names = names
        try:
            landed.append(other.push(sources[number], "m", "9" if number % 2 else None))
        except RepositoryError as error:
            refused.append(error.kind)

    threads = [threading.Thread(target=push, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(landed), refused) == (4, ["conflict"] * 2)
    repository._write("m", "model.toml", b'versions = "all"')
    found = repository.scan()["m"]
    assert set(found.versions) == set(landed)
    assert found.problem is None
    assert all(map(is_whole, found.versions.values()))


def test_a_damaged_artifact_leaves_nothing(repository, artifact):
    (artifact / "weights/a").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="weights/a is damaged"):
        repository.push(artifact, "m")
    assert repository._look("m") is None
    for name, version in (("../m", None), ("m", "01"), (".m", None)):
        assert kind(repository.push, artifact, name, version) == "invalid"
    assert kind(repository.find, "m") == "missing"


def test_a_store_that_cannot_be_reached_changes_nothing_of_the_copy(repository, artifact, monkeypatch):
    repository.push(artifact, "m")
    repository.scan()

    def gone(*_, **__):
        raise RuntimeError("no such bucket\nand more")

    monkeypatch.setattr(repository._fs, "ls", gone)
    with pytest.raises(RepositoryError, match=r"cannot be listed: no such bucket$") as caught:
        repository.scan()
    assert caught.value.kind == "failed"
    assert kind(repository.find, "m") == "failed"  # it is not the model that is wrong
    assert list(Repository(repository.root).scan()["m"].versions) == ["1"]


def test_a_copy_that_cannot_be_kept_is_told(url, repository, artifact, tmp_path, monkeypatch):
    """A server of a repository that raised anything else would not look at it again."""
    repository.push(artifact, "m")
    (tmp_path / "file").touch()
    with pytest.raises(
        RepositoryError, match="file/copy: the copy of memory://bucket/models cannot be kept there: Not a"
    ) as caught:
        RemoteRepository(url, tmp_path / "file/copy").scan()
    assert caught.value.kind == "failed"
    repository.scan()
    repository.push(artifact, "m")
    monkeypatch.setattr(Repository, "_delete", lambda *_: os.rmdir(tmp_path))
    assert "what is not wanted cannot be removed from the copy: Directory not empty" in repository.scan()["m"].problem


def test_a_model_that_is_gone_goes_from_the_copy(repository, artifact):
    repository.push(artifact, "m")
    repository.push(artifact, "other")
    assert set(repository.scan()) == {"m", "other"}
    repository._fs.rm(f"{repository._path}/other", recursive=True)
    assert set(repository.scan()) == {"m"}
    assert os.listdir(repository.root) == ["m"]


def test_addresses(tmp_path, monkeypatch):
    monkeypatch.setenv("LEPTON_CACHE", str(tmp_path))
    one, two = open_repository("memory://a"), open_repository("memory://b/")
    assert one.root != two.root
    assert one.root.parent == two.root.parent == tmp_path / "models"
    for location in (tmp_path / "a b", f"file://{tmp_path}/a%20b"):
        local = open_repository(location)
        assert (type(local), local.root) == (Repository, tmp_path / "a b")
    assert kind(open_repository, "nonsense://a") == "invalid"
    with pytest.raises(RepositoryError, match=r"lepton-xla\[remote\]") as caught:
        open_repository("dropbox://a")  # fsspec knows it, and its package is not there
    assert caught.value.kind == "invalid"


def test_what_a_server_of_a_folder_carries_out_is_refused(repository, artifact):
    """A rollout in an object store would stand at its first stage for ever."""
    for _ in range(2):
        repository.push(artifact, "m")
    repository.promote("m", "1")
    shares = {"1": 0.5, "2": 0.5}
    with pytest.raises(RepositoryError, match="memory://bucket/models: rollouts are carried out by a server of a rep"):
        _traffic.started(repository, "m", {"version": "2"})
    with pytest.raises(RepositoryError, match="bandits are carried out"):
        _traffic.changed(repository, "m", {"shares": shares, "bandit": {}})
    assert repository.find("m").plan == Plan()
    assert _traffic.changed(repository, "m", {"shares": shares})["traffic"]["shares"] == shares
    # One that somebody has put there can be stopped.
    _traffic.changed(repository, "m", {})
    Repository.replan(
        repository, "m", lambda plan, found: with_rollout(plan, found, RolloutRequest(version="2"), "x", 1)
    )
    assert _traffic.stopped(repository, "m")["state"] == "stopped"
