"""A repository of models in a folder: what is pushed, promoted and removed, and that nothing half-written is seen."""

import hashlib
import itertools
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import threading

import msgspec
import pytest
from fake_artifacts import is_whole, make_artifact
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from lepton_xla.errors import ArtifactError, RepositoryError
from lepton_xla.files.listing import sealing_digest
from lepton_xla.serve.models import repository as module
from lepton_xla.serve.models.labels import with_label
from lepton_xla.serve.models.repository import Found, Repository
from lepton_xla.serve.models.settings import ModelSettings, Serving, parse_settings

HERE = pathlib.Path(__file__).parent


@pytest.fixture
def artifact(tmp_path):
    return make_artifact(tmp_path / "a.lepton")


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path / "models")


def kind(function, *arguments):
    with pytest.raises(RepositoryError) as caught:
        function(*arguments)
    return caught.value.kind


def test_versions_count_up_and_are_whole(repository, artifact):
    assert [repository.push(artifact, "digits") for _ in range(11)] == [str(n) for n in range(1, 12)]
    assert repository.push(artifact, "digits", "40") == "40"
    assert repository.push(artifact, "digits") == "41"
    found = repository.scan()["digits"]
    assert list(found.versions) == [*map(str, range(1, 12)), "40", "41"]  # by number, not by letter
    assert all(map(is_whole, found.versions.values()))
    assert found.wanted == ("41",)
    assert sorted(os.listdir(repository.root / "digits")) == sorted(f"{v}.lepton" for v in found.versions)


def test_a_signature_goes_with_an_artifact(repository, artifact):
    """Loading checks it; here it is any bytes."""
    repository.push(artifact, "digits")
    (artifact / "model.sig").write_bytes(b"signed")
    repository.push(artifact, "digits")
    first, second = repository.scan()["digits"].versions.values()
    assert not (first / "model.sig").exists()
    assert (second / "model.sig").read_bytes() == b"signed"
    os.truncate(artifact / "model.sig", 1 << 40)
    with pytest.raises(ArtifactError, match=r"model\.sig has more than the limit"):
        repository.push(artifact, "digits")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a\\b", ".a", "a\n", " a", "a\0b", "x" * 129, "stats", "\ud800"]
)
def test_names_that_no_model_may_have(repository, artifact, name):
    for change in (
        lambda: repository.push(artifact, name),
        lambda: repository.promote(name, "1"),
        lambda: repository.rollback(name),
        lambda: repository.remove(name, "1"),
        lambda: repository.find(name),
    ):
        assert kind(change) == "invalid"
    assert not repository.root.exists() or not os.listdir(repository.root)


@pytest.mark.parametrize("version", ["", "0", "01", "-1", "+1", "1.0", "v1", "1/2", "..", " 1", "\u0661", "9" * 19])
def test_versions_that_are_no_numbers(repository, artifact, version):
    repository.push(artifact, "m")
    assert kind(repository.push, artifact, "m", version) == "invalid"
    assert kind(repository.promote, "m", version) == "invalid"
    assert kind(repository.remove, "m", version) == "invalid"
    assert os.listdir(repository.root / "m") == ["1.lepton"]


def test_what_is_not_there_and_what_stands_against_a_change(repository, artifact):
    repository.push(artifact, "m", "2")
    assert kind(repository.push, artifact, "m", "2") == "conflict"
    assert kind(repository.promote, "m", "3") == "missing"
    assert kind(repository.promote, "other", "2") == "missing"
    assert kind(repository.rollback, "m") == "missing"
    repository.promote("m", "2")
    assert kind(repository.rollback, "m") == "missing"
    assert kind(repository.remove, "m", "2") == "conflict"
    assert kind(repository.remove, "m", "7") == "missing"
    (repository.root / "m" / "9.lepton").write_text("a file in the way")
    assert kind(repository.push, artifact, "m", "9") == "conflict"
    assert repository.push(artifact, "m") == "10"
    assert repository.scan()["m"].ignored == ("9.lepton",)


def test_a_damaged_artifact_is_refused_and_leaves_nothing(repository, artifact):
    (artifact / "weights/a/c/0").write_bytes(b"weights" * 998 + b"weighty")
    with pytest.raises(ArtifactError, match=r"weights/a/c/0 is damaged"):
        repository.push(artifact, "m")
    for data in (b"", b"weights" * 1000):
        (artifact / "weights/a/c/0").write_bytes(data)
        with pytest.raises(ArtifactError, match=r"weights/a/c/0 is damaged"):
            repository.push(artifact, "m")
    os.unlink(artifact / "weights/a/c/0")
    with pytest.raises(ArtifactError, match=r"weights/a/c/0 cannot be read: No such file"):
        repository.push(artifact, "m")
    os.mkfifo(artifact / "weights/a/c/0")
    manifest = (artifact / "manifest.json").read_text()
    (artifact / "manifest.json").write_text(manifest.replace("tiny", "tidy"))
    with pytest.raises(ArtifactError, match=r"SHA-256 does not match"):
        repository.push(artifact, "m")
    assert repository.scan() == {}
    assert os.listdir(repository.root / "m") == []


@pytest.mark.parametrize("file", ["../out", "/etc/x", ".hidden", "a//b", "manifest.json", "a/../b"])
def test_a_manifest_cannot_write_outside(repository, tmp_path, file):
    artifact = make_artifact(tmp_path / "a.lepton", {})
    document = {"name": "m", "files": {file: {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}}, "sha256": ""}
    document["sha256"] = sealing_digest(msgspec.json.encode(document))
    (artifact / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match="is not a valid name"):
        repository.push(artifact, "m")
    assert repository.scan() == {}


def test_one_bad_model_hides_no_other(repository, artifact):
    repository.push(artifact, "good")
    repository.push(artifact, "bad")
    (repository.root / "bad" / "model.toml").write_text("versions = 3")
    for folder in ("a\nb", ".hidden", "empty", "bytes"):
        (repository.root / folder).mkdir()
    (repository.root / "bytes" / "model.toml").write_bytes(b"\xff")
    (repository.root / "notes.txt").write_text("a file")
    (repository.root / "circle").symlink_to("circle")
    (repository.root / "good" / "v3.lepton").mkdir()
    (repository.root / "good" / "03.lepton").mkdir()
    (repository.root / "good" / "3.lepton").mkdir()  # no manifest
    found = repository.scan()
    assert set(found) == {"good", "bad", "a\nb", "bytes"}
    assert found["good"].problem is None
    assert list(found["good"].versions) == ["1"]
    assert found["good"].ignored == ("03.lepton", "3.lepton", "v3.lepton")
    assert "model.toml" in found["bad"].problem
    assert "$.versions" in found["bad"].problem
    assert "not UTF-8" in found["bytes"].problem
    assert "no slashes" in found["a\nb"].problem
    shutil.rmtree(repository.root)
    assert kind(repository.scan) == "failed"


def test_weights_alone_need_a_version_with_the_code_that_they_fit(repository, tmp_path):
    def pushed(fit, programs=()):
        return repository.push(make_artifact(tmp_path / f"{fit}{len(programs)}.lepton", None, "m", fit, programs), "m")

    assert kind(pushed, "one") == "missing"
    assert repository.scan() == {}
    assert [pushed("one", ("p",)), pushed("two", ("p",)), pushed("one"), pushed("one")] == ["1", "2", "3", "4"]
    assert kind(pushed, "three") == "missing"
    assert [repository.find_base("m", version) for version in ("1", "2")] == [None, None]
    assert repository.find_base("m", "4") == repository.find("m").versions["1"]
    assert kind(repository.remove, "m", "1") == "conflict"
    assert pushed("one", ("p",)) == "5"
    repository.remove("m", "1")
    assert repository.find_base("m", "3") == repository.find("m").versions["5"]
    for version in ("3", "4", "5"):
        repository.remove("m", version)
    assert list(repository.find("m").versions) == ["2"]
    assert kind(repository.find_base, "m", "3") == "missing"


def test_a_replaced_version_has_another_stamp(repository, artifact):
    repository.push(artifact, "m")
    before = repository.scan()["m"].stamps["1"]
    assert repository.scan()["m"].stamps["1"] == before
    shutil.rmtree(repository.root / "m" / "1.lepton")
    repository.push(artifact, "m", "1")
    assert repository.scan()["m"].stamps["1"] != before


def test_labels_move_and_go_back(repository, artifact):
    for _ in range(4):
        repository.push(artifact, "m")
    assert [repository.promote("m", version) for version in ("1", "2", "2", "3")] == [None, "1", "2", "2"]
    assert repository.promote("m", "4", "canary") is None
    assert repository.rollback("m") == ("3", "2")
    assert repository.rollback("m") == ("2", "1")
    assert kind(repository.rollback, "m") == "missing"
    assert repository.find("m").settings.labels == {"stable": "1", "canary": "4"}
    for version in ("2", "3", "4"):
        repository.promote("m", version)
    repository.remove("m", "3")
    assert repository.rollback("m") == ("4", "2")  # what was removed is passed over


def test_a_label_moved_by_hand_can_go_back(repository, artifact):
    for _ in range(3):
        repository.push(artifact, "m")
    repository.promote("m", "1")
    (repository.root / "m" / "model.toml").write_text('[labels]\nstable = "3"')
    assert repository.rollback("m") == ("3", "1")
    (repository.root / "m" / ".labels.json").write_text("{")
    assert kind(repository.rollback, "m") == "missing"


def test_the_rest_of_model_toml_stays_as_it_is_written(repository, artifact):
    for _ in range(2):
        repository.push(artifact, "m")
    text = (
        '# ours\nversions = "all"\r\n\n[labels]  # who answers\ncanary = "1" # new\n\n[serving]\nweight = 2.0 # twice\n'
    )
    (repository.root / "m" / "model.toml").write_bytes(text.encode())
    repository.promote("m", "2", "canary")
    assert (repository.root / "m" / "model.toml").read_bytes().decode() == text.replace('"1"', '"2"')
    assert repository.find("m").wanted == ("1", "2")
    repository.promote("m", "2")
    assert repository.find("m").settings == ModelSettings(
        versions="all", labels={"canary": "2", "stable": "2"}, serving=Serving(weight=2.0)
    )
    (repository.root / "m" / "model.toml").write_text('labels = {stable = "1"}')
    assert kind(repository.promote, "m", "2") == "conflict"
    assert (repository.root / "m" / "model.toml").read_text() == 'labels = {stable = "1"}'


LABELS = st.from_regex(r"[a-zA-Z][a-zA-Z0-9_-]{0,8}", fullmatch=True)
VERSIONS = st.integers(1, 10**18 - 1).map(str)


@settings(max_examples=40)
@given(st.dictionaries(LABELS, VERSIONS, max_size=4), LABELS, VERSIONS, st.booleans())
def test_a_label_is_set_and_no_other_changes(labels, label, version, has_more):
    text = "[labels]\n" + "".join(f"{key} = '{value}'\n" for key, value in labels.items())
    text += "[serving]\npinned = true\n" if has_more else ""
    changed = parse_settings(with_label(text, label, version))
    assert changed == ModelSettings(labels={**labels, label: version}, serving=Serving(pinned=has_more))


@given(st.sets(VERSIONS, max_size=8), st.integers(1, 9), st.lists(VERSIONS, max_size=3))
def test_policies(there, count, others):
    ordered = tuple(sorted(there, key=int))
    assert ModelSettings(versions=f"latest:{count}").wanted(there) == ordered[-count:]
    assert ModelSettings(versions="all").wanted(there) == ordered
    assert ModelSettings(versions=tuple(others)).wanted(there) == tuple(v for v in ordered if v in others)


@pytest.mark.parametrize(
    "text",
    [
        'versions = "latest"', 'versions = "latest:0"', 'versions = "newest:1"', "versions = [3]", 'versions = ["03"]',
        '[labels]\n"a/b" = "3"', "[labels]\nstable = 3", '[labels]\nstable = "latest"', "[serving]\nweight = -1.0",
        "[serving]\nweight = nan", "[serving]\nmax_queue_rows = 0", "[serving]\npined = true", "x = 1", "x = ",
        "x = 1e", "[serving]\nrate = inf",
    ],
)  # fmt: skip
def test_settings_that_are_refused(text):
    with pytest.raises(RepositoryError, match=r"^model\.toml: ") as caught:
        parse_settings(text)
    assert caught.value.kind == "invalid"


def test_two_pushes_at_once(repository, tmp_path):
    """All that ask for no version land; of those that ask for the same one, one does."""
    sources = [make_artifact(tmp_path / f"{n}.lepton", {"f": bytes([n]) * 1000}) for n in range(8)]
    start, landed, refused = threading.Barrier(16), [], []

    def push(source, version):
        start.wait()
        try:
            landed.append(Repository(repository.root).push(source, "m", version))
        except RepositoryError as error:
            refused.append(error.kind)

    threads = [threading.Thread(target=push, args=(source, version)) for source in sources for version in (None, "500")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused == ["conflict"] * 7
    assert len(set(landed)) == 9
    found = repository.scan()["m"]
    assert set(found.versions) == set(landed)
    assert all(map(is_whole, found.versions.values()))
    assert len(os.listdir(repository.root / "m")) == 9


@pytest.mark.parametrize("limit", [0, 100, 5000])
def test_a_full_disk_leaves_nothing(repository, artifact, limit):
    """Files may have `limit` bytes: the manifest's 300 fit, or the first of the weights' 6993."""
    repository.push(artifact, "m")
    code = (
        "import resource, signal, sys\n"
        "from lepton_xla.errors import RepositoryError\n"
        "from lepton_xla.serve.models.repository import Repository\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "try:\n"
        "    Repository(sys.argv[1]).push(sys.argv[2], 'm')\n"
        "except RepositoryError as error:\n"
        "    assert error.kind == 'failed', error\n"
        "    sys.exit(7)\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    run = subprocess.run([sys.executable, "-c", code, repository.root, artifact], check=False)
    assert run.returncode == 7
    assert os.listdir(repository.root / "m") == ["1.lepton"]


def test_leftovers_of_killed_pushes_go_with_the_next(repository, artifact):
    repository.push(artifact, "m")
    old, young, foreign = (repository.root / "m" / f".{name}.tmp" for name in ("0" * 16, "1" * 16, "mine"))
    for folder in (old, young, foreign):
        folder.mkdir()
    os.utime(old, (0, 0))
    repository.push(artifact, "m")
    assert sorted(os.listdir(repository.root / "m")) == [young.name, foreign.name, "1.lepton", "2.lepton"]


@pytest.mark.parametrize(
    "change",
    ["push", "promote", *(pytest.param(name, marks=pytest.mark.slow) for name in ("upload", "rollback", "remove"))],
)
def test_killed_at_every_step(tmp_path, change):
    """See `repository_kills.py`: before or after, never between, and the next change does what it should."""
    run = subprocess.run(
        [sys.executable, HERE / "repository_kills.py", tmp_path, change],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 10


class Model(RuleBasedStateMachine):
    """The repository beside a dictionary of what it should hold."""

    def __init__(self):
        super().__init__()
        self.repository = Repository(self.folder / str(next(self.numbers)))
        self.versions, self.stack = set(), []

    @rule(version=st.none() | st.integers(1, 6).map(str))
    def push(self, version):
        if version in self.versions:
            assert kind(self.repository.push, self.artifact, "m", version) == "conflict"
            return
        expected = version or str(max(map(int, self.versions), default=0) + 1)
        assert self.repository.push(self.artifact, "m", version) == expected
        self.versions.add(expected)

    @rule(version=st.integers(1, 8).map(str))
    def promote(self, version):
        if version not in self.versions:
            assert kind(self.repository.promote, "m", version) == "missing"
            return
        stands = self.stack[-1] if self.stack else None
        assert self.repository.promote("m", version) == stands
        if version != stands:
            self.stack.append(version)

    @rule()
    def rollback(self):
        there = [v for v in self.stack[:-1] if v in self.versions and v != self.stack[-1]]
        if not there:
            assert kind(self.repository.rollback, "m") == "missing"
            return
        stood = self.stack.pop()
        while self.stack[-1] not in self.versions or self.stack[-1] == stood:
            self.stack.pop()
        assert self.repository.rollback("m") == (stood, self.stack[-1])

    @rule(version=st.integers(1, 8).map(str))
    def remove(self, version):
        if version not in self.versions or (self.stack and self.stack[-1] == version):
            assert kind(self.repository.remove, "m", version) in ("missing", "conflict")
            return
        self.repository.remove("m", version)
        self.versions.discard(version)

    @invariant()
    def agree(self):
        found = self.repository.scan().get("m", Found("m")) if self.repository.root.exists() else Found("m")
        assert list(found.versions) == sorted(self.versions, key=int)
        assert found.settings.labels.get("stable") == (self.stack[-1] if self.stack else None)
        assert found.problem is None
        assert all(map(is_whole, found.versions.values()))


def test_any_changes_in_any_order(tmp_path, artifact, monkeypatch):
    monkeypatch.setattr(module, "flush", lambda path: None)
    monkeypatch.setattr(module, "flush_tree", lambda path: None)
    Model.folder, Model.artifact, Model.numbers = tmp_path / "states", artifact, itertools.count()
    run_state_machine_as_test(Model, settings=settings(max_examples=25, stateful_step_count=20))
