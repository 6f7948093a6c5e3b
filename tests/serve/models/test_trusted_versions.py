"""A repository whose versions have to be signed: what is not stays out, and the old version goes on serving."""

import datetime
import json
import shutil

import pytest
from numbered import Clients, make_numbered, wait
from serve_fakes import exchange

import lepton_xla as lx
from lepton_xla.errors import TrustError
from lepton_xla.serve import Options, Server
from lepton_xla.serve.loader import _buckets
from lepton_xla.serve.models.repository import Repository


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Artifacts by version, of which 1 and 4 are signed by `release`, and 3 and 5 by `other`."""
    folder = tmp_path_factory.mktemp("made")
    made = make_numbered(folder, (1, 2, 3, 4, 5))
    for name in ("release", "other"):
        lx.trust.create_keys(folder / name)
    for number, name in ((1, "release"), (3, "other"), (4, "release"), (5, "other")):
        lx.sign(made[number], key=folder / f"{name}.key")
    return {**made, "keys": folder}


def reason(server, version):
    body = exchange(server, "POST", "/v2/repository/index")[2]
    (found,) = [each.get("reason") for each in json.loads(body) if each.get("version") == version] or [None]
    return found or ""


def test_only_signed_versions_are_loaded(tmp_path, made):
    trust = tmp_path / "trust"
    trust.mkdir()
    shutil.copy(made["keys"] / "release.pub", trust)
    repository = Repository(tmp_path / "MODELS")
    repository.push(made[1], "m")
    options = Options(port=0, repository_poll_s=0.02, trust=trust)
    with Server(options=options, repository=repository.root) as server, Clients(server, count=1) as clients:
        repository.push(made[2], "m")
        wait(lambda: "is not signed" in reason(server, "2"))
        repository.push(made[3], "m")
        wait(lambda: "is of a key that is not trusted here" in reason(server, "3"))
        assert str(repository.root) not in reason(server, "2") + reason(server, "3")
        assert server.models.versions("m") == ["1"]
        repository.push(made[4], "m")
        wait(lambda: server.models.versions("m") == ["4"])
        # Keys are read again with each artifact.
        shutil.copy(made["keys"] / "other.pub", trust)
        repository.push(made[5], "m")
        wait(lambda: clients.answers.get("5", 0) > 5)
    assert set(clients.answers) == {"1", "4", "5"}


def test_a_version_that_is_signed_later_is_loaded_then(tmp_path, made):
    repository = Repository(tmp_path / "MODELS")
    repository.push(made[2], "m", "2")
    options = Options(port=0, repository_poll_s=0.02, trust=made["keys"] / "release.pub")
    with Server(options=options, repository=repository.root) as server:
        wait(lambda: "is not signed" in reason(server, "2"))
        lx.sign(repository.root / "m" / "2.lepton", key=made["keys"] / "release.key")
        wait(lambda: server.models.versions("m") == ["2"])


def test_sizes_of_an_untrusted_manifest_are_not_looked_at(made):
    """They are asked for before the artifact is loaded, where a client wants smaller batches."""
    trusted = lx.trust.TrustedKeys.read(made["keys"] / "release.pub")
    assert _buckets(made[1], 8, trusted) == {"batch": (1, 8)}
    with pytest.raises(TrustError, match="is not signed"):
        _buckets(made[2], 8, trusted)


def test_an_old_signed_artifact_is_no_new_version(tmp_path, made):
    repository = Repository(tmp_path / "MODELS")
    for number in (1, 4):
        repository.push(made[number], "m", str(number))
    options = Options(port=0, repository_poll_s=0.02, trust=made["keys"] / "release.pub")
    with Server(options=options, repository=repository.root) as server:
        repository.push(made[1], "m", "9")
        wait(lambda: "or later is trusted" in reason(server, "9"))
        # What was newer is remembered when somebody removes it.
        for number in (1, 4):
            shutil.move(repository.root / "m" / f"{number}.lepton", tmp_path / f"{number}.lepton")
        repository.push(made[1], "m", "10")
        wait(lambda: "or later is trusted" in reason(server, "10"))
    # Who starts anew sees it beside the newer one; a label may stand on what is older.
    repository.remove("m", "9")
    repository.remove("m", "10")
    for number in (1, 4):
        shutil.move(tmp_path / f"{number}.lepton", repository.root / "m" / f"{number}.lepton")
    repository.push(made[1], "m", "9")
    with Server(options=options, repository=repository.root) as server:
        wait(lambda: "or later is trusted" in reason(server, "9"))
        repository.promote("m", "1")
        wait(lambda: "1" in server.models.versions("m"))
        # Signed again it is meant to be used.
        lx.sign(repository.root / "m" / "9.lepton", key=made["keys"] / "release.key")
        wait(lambda: "9" in server.models.versions("m"))


def test_a_policy_among_the_keys_says_from_when_on(tmp_path, made):
    trust = tmp_path / "trust"
    trust.mkdir()
    shutil.copy(made["keys"] / "release.pub", trust)
    (trust / "policy.toml").write_text("not_before = 2026-01-01T00:00:00Z")
    assert lx.load(made[1], trust=trust).name
    signed_at = datetime.datetime.fromisoformat(lx.verify(made[1], trust=trust).signed_at)
    assert abs((datetime.datetime.now(datetime.UTC) - signed_at).total_seconds()) < 600
    (trust / "policy.toml").write_text("not_before = 2999-01-01T02:00:00+02:00")
    with pytest.raises(TrustError, match=r"only what was signed at 2999-01-01T00:00:00.000Z or later"):
        lx.load(made[1], trust=trust)
    with pytest.raises(TrustError, match="or later"):
        lx.verify(made[1], trust=trust)
