"""Files that are sent in pieces, and versions that are made of them: checked, bounded, resumable."""

import hashlib
import json
import os
import subprocess
import sys
import threading

import msgspec
import pytest
from fake_artifacts import is_whole, make_artifact
from hypothesis import given
from hypothesis import strategies as st

from lepton_xla.errors import ArtifactError, RepositoryError
from lepton_xla.files.listing import MANIFEST, sealing_digest
from lepton_xla.serve.models import uploads as module
from lepton_xla.serve.models.repository import Repository
from lepton_xla.serve.models.uploads import FOLDER, UploadLimits, Uploads


def sha(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path / "models")


@pytest.fixture
def uploads(repository):
    return Uploads(repository)


@pytest.fixture
def artifact(tmp_path):
    twice = b"the same" * 100
    return make_artifact(tmp_path / "a.lepton", {"weights/a": twice, "weights/b": twice, "empty": b"", "p": b"program"})


def kind(function, *arguments):
    with pytest.raises(RepositoryError) as caught:
        function(*arguments)
    return caught.value.kind


def send(uploads, artifact, leave_out=()):
    """Send all files, the manifest last; returns its digest."""
    digest = ""
    for file in sorted(artifact.rglob("*"), key=lambda file: file.name == "manifest.json"):
        data = file.read_bytes() if file.is_file() else b""
        digest = sha(data)
        if data and file.name not in leave_out and not uploads.sizes([digest])[digest]:
            assert uploads.write(digest, 0, data) == len(data)
    return digest


def test_a_version_is_made_of_what_was_sent(repository, uploads, artifact):
    version, listing = uploads.publish(send(uploads, artifact), "m")
    assert (version, set(listing.files)) == ("1", {"weights/a", "weights/b", "empty", "p"})
    (path,) = repository.find("m").versions.values()
    assert is_whole(path)
    assert os.listdir(repository.root / FOLDER) == []
    assert uploads.publish(send(uploads, artifact), "m")[0] == "2"
    assert set(repository.scan()) == {"m"}  # the folder of uploads is no model


def test_a_file_that_is_listed_often_is_there_once(repository, uploads, tmp_path):
    """A small upload cannot fill the disk, nor have the server read for hours."""
    twice = b"the same" * 100
    artifact = make_artifact(tmp_path / "a.lepton", {f"weights/{number}": twice for number in range(50)})
    uploads.publish(send(uploads, artifact), "m")
    (path,) = repository.find("m").versions.values()
    assert is_whole(path)
    assert len({file.stat().st_ino for file in (path / "weights").iterdir()}) == 1


@pytest.mark.parametrize("bounds", [{"max_files": 3}, {"max_bytes": 1000}])
def test_an_artifact_of_too_much_is_refused_before_anything_is_moved(repository, uploads, artifact, bounds):
    manifest = send(uploads, artifact)
    waiting = set(os.listdir(repository.root / FOLDER))
    with pytest.raises(ArtifactError, match="lists 4 files of 1607 bytes; one that is sent may have"):
        Uploads(repository, UploadLimits(**bounds)).publish(manifest, "m")
    assert set(os.listdir(repository.root / FOLDER)) - {".lock"} == waiting - {".lock"}


def test_a_signature_goes_with_it(repository, uploads, artifact):
    uploads.write(sha(b"signature"), 0, b"signature")
    version, _ = uploads.publish(send(uploads, artifact), "m", None, sha(b"signature"))
    assert (repository.root / "m" / f"{version}.lepton" / "model.sig").read_bytes() == b"signature"
    assert os.listdir(repository.root / FOLDER) == []
    manifest = send(uploads, artifact)
    assert kind(uploads.publish, manifest, "m", None, sha(b"never sent")) == "missing"
    assert uploads.publish(manifest, "m")[0] == "2"


def test_what_was_not_sent_is_named_and_the_rest_stays(repository, uploads, artifact):
    manifest = send(uploads, artifact, leave_out=["p"])
    with pytest.raises(RepositoryError, match=sha(b"program")) as caught:
        uploads.publish(manifest, "m")
    assert caught.value.kind == "missing"
    assert repository.scan() == {}
    assert uploads.write(sha(b"program"), 0, b"prog") == 4
    assert kind(uploads.publish, manifest, "m") == "missing"  # in part
    assert uploads.write(sha(b"program"), 4, b"ram") == 7
    assert uploads.publish(manifest, "m")[0] == "1"


def test_what_was_sent_wrong_is_refused_and_can_be_sent_again(repository, uploads, artifact):
    uploads.write(sha(b"program"), 0, b"pr0gram")
    manifest = send(uploads, artifact)
    with pytest.raises(ArtifactError, match="is something else: send it again"):
        uploads.publish(manifest, "m")
    assert repository.scan() == {}
    assert uploads.sizes([sha(b"program")]) == {sha(b"program"): 0}
    assert uploads.publish(send(uploads, artifact), "m")[0] == "1"


def test_an_empty_file_of_the_same_digest_does_not_hide_another(uploads, tmp_path):
    artifact = make_artifact(tmp_path / "a.lepton", {"a": b"", "b": b"program"})
    document = json.loads((artifact / MANIFEST).read_text()) | {"sha256": ""}
    document["files"]["a"]["sha256"] = sha(b"program")
    document["sha256"] = sealing_digest(msgspec.json.encode(document))
    data = json.dumps(document).encode()
    for digest, content in ((sha(data), data), (sha(b"program"), b"another")):
        uploads.write(digest, 0, content)
    with pytest.raises(ArtifactError, match="what was sent is something else"):
        uploads.publish(sha(data), "m")


def test_without_locks_who_comes_second_is_told_what_is_missing(uploads, artifact, monkeypatch):
    manifest = send(uploads, artifact, leave_out={"p"})
    monkeypatch.setattr(module, "_size", lambda file: 1 << 20)  # as it was before another took it
    with pytest.raises(RepositoryError, match=f"file {sha(b'program')} was not sent"):
        uploads.publish(manifest, "m")


def test_a_manifest_that_is_none(repository, uploads):
    data = b'{"name": "m", "files": {}}'
    uploads.write(sha(data), 0, data)
    with pytest.raises(ArtifactError, match="SHA-256 does not match"):
        uploads.publish(sha(data), "m")
    assert kind(uploads.publish, sha(b"never sent"), "m") == "missing"
    assert repository.scan() == {}


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "0" * 63, "0" * 65, "A" * 64, "0" * 63 + "\n"])
def test_files_are_named_by_digests_only(uploads, digest):
    assert kind(uploads.write, digest, 0, b"x") == "invalid"
    assert kind(uploads.sizes, [digest]) == "invalid"
    assert kind(uploads.publish, digest, "m") == "invalid"


@given(cuts=st.lists(st.integers(0, 60), max_size=6), wrong=st.integers(1, 100))
def test_pieces_go_on_where_the_last_ended(tmp_path_factory, cuts, wrong):
    uploads = Uploads(Repository(tmp_path_factory.mktemp("r")))
    data = bytes(range(60))
    ends = sorted({*cuts, 60})
    start = 0
    for end in ends:
        assert kind(uploads.write, sha(data), start + wrong, data[start:end]) == "conflict"
        assert uploads.write(sha(data), start, data[start:end]) == end
        assert uploads.sizes([sha(data)]) == {sha(data): end}
        start = end


def test_bounds(repository):
    now = [0.0]
    limits = UploadLimits(max_bytes=10, max_files=2, max_age_s=100.0)
    uploads = Uploads(repository, limits, clock=lambda: now[0])
    one, two, three = (sha(name) for name in (b"1", b"2", b"3"))
    uploads.write(one, 0, b"12345")
    for file in (repository.root / FOLDER).iterdir():
        os.utime(file, (0, 0))
    assert kind(uploads.write, two, 0, b"123456") == "failed"
    assert uploads.sizes([two]) == {two: 0}
    uploads.write(two, 0, b"12345")
    assert kind(uploads.write, two, 5, b"6") == "failed"
    assert kind(uploads.write, three, 0, b"") == "failed"
    now[0] = 101.0
    os.utime(repository.root / FOLDER / two, (50, 50))
    assert uploads.write(three, 0, b"12345") == 5  # the first is old now
    assert uploads.sizes([one, two, three]) == {one: 0, two: 5, three: 5}


def test_several_send_the_same_file(repository):
    data = os.urandom(20_000)
    done = []

    def push():
        uploads = Uploads(repository)
        size = 0
        while size < len(data):
            try:
                size = uploads.write(sha(data), size, data[size : size + 100])
            except RepositoryError:
                size = uploads.sizes([sha(data)])[sha(data)]
        done.append(size)

    threads = [threading.Thread(target=push) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [len(data)] * 4
    assert (repository.root / FOLDER / sha(data)).read_bytes() == data


def test_names_and_versions_are_checked_before_anything_is_moved(repository, uploads, artifact):
    manifest = send(uploads, artifact)
    assert kind(uploads.publish, manifest, "../m") == "invalid"
    assert kind(uploads.publish, manifest, "m", "01") == "invalid"
    assert uploads.publish(manifest, "m", "3")[0] == "3"
    manifest = send(uploads, artifact)
    assert kind(uploads.publish, manifest, "m", "3") == "conflict"
    assert uploads.publish(manifest, "m", "4")[0] == "4"


def test_weights_that_fit_nothing_are_refused_before_they_are_moved(uploads, tmp_path):
    manifest = send(uploads, make_artifact(tmp_path / "u.lepton", None, "m", "some fit", []))
    assert kind(uploads.publish, manifest, "m") == "missing"
    whole = send(uploads, make_artifact(tmp_path / "b.lepton", {"x": b"x"}, "m", "some fit"))
    assert uploads.publish(whole, "m")[0] == "1"
    assert uploads.publish(manifest, "m")[0] == "2"


def test_a_piece_that_does_not_fit_on_the_disk_leaves_nothing(repository, uploads):
    """In a process whose files may have 5000 bytes: of the piece, the first 2000 fit."""
    data = bytes(range(256)) * 40
    assert uploads.write(sha(data), 0, data[:3000]) == 3000
    code = (
        "import resource, signal, sys\n"
        "from lepton_xla.errors import RepositoryError\n"
        "from lepton_xla.serve.models.repository import Repository\n"
        "from lepton_xla.serve.models.uploads import Uploads\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "try:\n"
        "    Uploads(Repository(sys.argv[1])).write(sys.argv[2], 3000, bytes(range(256)) * 28)\n"
        "except RepositoryError as error:\n"
        "    assert error.kind == 'failed', error\n"
        "    sys.exit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, repository.root, sha(data)], check=False).returncode == 7
    assert uploads.sizes([sha(data)]) == {sha(data): 3000}
    assert uploads.write(sha(data), 3000, data[3000:]) == len(data)
    assert (repository.root / FOLDER / sha(data)).read_bytes() == data
