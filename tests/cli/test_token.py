"""`leptonx token`."""

import datetime
import hashlib
import json
import stat

import pytest


@pytest.fixture
def file(tmp_path):
    return tmp_path / "tokens.jsonl"


def test_a_secret_is_printed_once_and_only_its_digest_is_kept(cli, file):
    result = cli("token", "create", file, "ci", "--scope", "infer", "--days", 2, "--requests-per-s", 5, "--burst", 9)
    assert result.exit_code == 0
    (secret,) = result.stdout.split()
    assert len(secret) >= 43  # 256 bits in base 64
    (line,) = file.read_text().splitlines()
    kept = json.loads(line)
    expires = datetime.datetime.fromisoformat(kept.pop("expires"))
    assert 0 <= 2 - (expires - datetime.datetime.now(datetime.UTC)) / datetime.timedelta(days=1) < 0.01
    digest = hashlib.sha256(secret.encode()).hexdigest()
    assert kept == {"name": "ci", "sha256": digest, "scopes": ["infer"], "requests_per_s": 5.0, "burst": 9}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert secret not in result.stderr + cli.ok("token", "list", file) + json.dumps(cli.json("token", "list", file))
    assert digest not in cli.ok("token", "list", file) + json.dumps(cli.json("token", "list", file))


def test_every_secret_is_another(cli, file):
    secrets = {cli.json("token", "create", file, f"t{n}")["token"] for n in range(5)}
    assert len(secrets) == 5
    assert [entry["name"] for entry in cli.json("token", "list", file)] == [f"t{n}" for n in range(5)]
    assert cli.json("token", "list", file)[0]["scopes"] == ["infer", "read"]


def test_revoking_takes_one_away_and_keeps_the_file_private(cli, file):
    for name in ("a", "b"):
        cli.ok("token", "create", file, name)
    cli.ok("token", "revoke", file, "a")
    assert [entry["name"] for entry in cli.json("token", "list", file)] == ["b"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert "no token 'a'" in cli.refused("token", "revoke", file, "a")


def test_a_link_is_followed(cli, file):
    link = file.with_name("link")
    link.symlink_to(file)
    cli.ok("token", "create", link, "a")
    cli.ok("token", "create", link, "b")
    assert link.is_symlink()
    assert len(file.read_text().splitlines()) == 2


def test_an_expired_token_is_listed_as_such(cli, file):
    file.write_text(
        json.dumps({"name": "a", "sha256": "0" * 64, "scopes": ["read"], "expires": "2020-01-01T00:00:00Z"})
    )
    file.chmod(0o600)
    assert "(expired)" in cli.ok("token", "list", file)
    assert cli.json("token", "list", file)[0]["expired"] is True


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["create", "FILE", "a b"], "a b"),
        (["create", "FILE", "-"], "'-'"),
        (["create", "FILE", "taken"], "already has a token 'taken'"),
        (["create", "FILE", "x", "--scope", "root"], "root"),
        (["create", "FILE", "x", "--days", "0"], "--days"),
        (["create", "FILE", "x", "--requests-per-s", "nan"], "nan"),
        (["create", "FILE", "x", "--requests-per-s", "inf"], "inf"),
        (["create", "FILE", "x", "--burst", "3"], "requests a second"),
        (["create", "/nowhere/at/all", "x"], "No such file"),
        (["list", "/nowhere/at/all"], "No such file"),
        (["revoke", "FILE", "nobody"], "nobody"),
        (["create", "FILE"], "Missing argument 'NAME'"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_changes_nothing(cli, file, args, part):
    cli.ok("token", "create", file, "taken")
    before = file.read_bytes()
    assert part in cli.refused("token", *(file if arg == "FILE" else arg for arg in args))
    assert file.read_bytes() == before
