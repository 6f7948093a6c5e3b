"""`leptonx repo` and `leptonx weights push` on a folder."""

import json
import shutil

import pytest

from lepton_xla import compiler


@pytest.fixture
def models(tmp_path):
    return tmp_path / "MODELS"


def test_push_list_promote_roll_back_remove(cli, compiled, models):
    artifact, _ = compiled
    size = sum(entry.size for entry in compiler.verify(artifact).manifest.files.values())
    assert cli.json("repo", "push", models, artifact) == {"name": "plain", "version": "1", "size_bytes": size}
    assert "other: version 7" in cli.ok("repo", "push", models, artifact, "--name", "other", "--version", 7)
    told = cli.json("repo", "push", models, artifact, "--promote", "canary")
    assert (told["version"], told["label"], told["stood_on"]) == ("2", "canary", None)
    assert cli.json("repo", "promote", models, "plain", 1)["stood_on"] is None
    assert cli.ok("repo", "promote", models, "plain", 2) == "plain: stable stands on version 2, before 1\n"
    assert cli.json("repo", "rollback", models, "plain") == {
        "name": "plain", "label": "stable", "stood_on": "2", "stands_on": "1",
    }  # fmt: skip
    assert "what 'stable' stands on" in cli.refused("repo", "remove", models, "plain", 1)
    cli.ok("repo", "push", models, artifact)
    assert cli.ok("repo", "remove", models, "plain", 3) == "plain: removed version 3\n"
    (other, plain) = cli.json("repo", "list", models)
    assert [(v["version"], v["labels"], v["wanted"], v["size_bytes"]) for v in plain["versions"]] == [
        ("1", ["stable"], True, size), ("2", ["canary"], True, size),
    ]  # fmt: skip
    assert (other["name"], other["problem"], other["ignored"]) == ("other", None, [])
    table = cli.ok("repo", "list", models)
    assert "plain" in table
    assert "canary" in table
    assert compiler.load(models / "plain" / "2.lepton").name == "plain"


def test_what_is_wrong_is_listed(cli, compiled, models):
    cli.ok("repo", "push", models, compiled[0])
    shutil.copytree(models / "plain" / "1.lepton", models / "plain" / "v2.lepton")
    shutil.copytree(models / "plain" / "1.lepton", models / "plain" / "3.lepton")
    manifest = json.loads((models / "plain" / "3.lepton" / "manifest.json").read_text())
    (models / "plain" / "3.lepton" / "manifest.json").write_text(json.dumps(manifest | {"name": "tampered"}))
    (found,) = cli.json("repo", "list", models)
    assert "SHA-256 does not match" in found["problem"]
    assert found["ignored"] == ["v2.lepton"]
    assert "not versions, so ignored: v2.lepton" in cli.ok("repo", "list", models)


def test_refusals_are_one_line(cli, compiled, models, tmp_path):
    assert "cannot be read" in cli.refused("repo", "list", models)
    assert "no such file" in cli.refused("repo", "push", models, tmp_path / "nothing.lepton").lower()
    assert "model name '../x'" in cli.refused("repo", "push", models, compiled[0], "--name", "../x")
    assert "version '01'" in cli.refused("repo", "push", models, compiled[0], "--version", "01")
    assert "label 'a b'" in cli.refused("repo", "push", models, compiled[0], "--promote", "a b")
    assert "there is no model" in cli.refused("repo", "rollback", models, "plain")
    waiting = cli.refused("repo", "push", models, compiled[0], "--promote", "stable", "--wait", "1m")
    assert "--wait is for a server" in waiting
    assert not models.exists() or not list(models.iterdir())
    assert "no answer" in cli.refused("repo", "list", "http://127.0.0.1:9")


def test_a_push_whose_label_cannot_move_says_what_it_pushed(cli, compiled, models):
    (models / "plain").mkdir(parents=True)
    (models / "plain" / "model.toml").write_text("versions = [")
    said = cli.refused("repo", "push", models, compiled[0], "--promote", "stable")
    assert "plain: version 1 is pushed, and 'stable' was not moved to it: model.toml: " in said
    assert (models / "plain" / "1.lepton").is_dir()


def test_weights_alone_are_pushed_where_they_fit(cli, compiled, models, tmp_path):
    update = tmp_path / "u.lepton"
    cli.ok("weights", "make", compiled[0], compiled[0], "-o", update)
    assert "push the artifact that they were made for first" in cli.refused("weights", "push", models, update)
    cli.ok("repo", "push", models, compiled[0])
    assert cli.json("weights", "push", models, update, "--promote", "stable")["version"] == "2"
    assert "is a whole artifact" in cli.refused("weights", "push", models, compiled[0])
    assert "version 2 runs on" in cli.refused("repo", "remove", models, "plain", 1)


def test_changes_of_a_folder_are_told_in_an_audit_log(cli, compiled, models, tmp_path):
    log = tmp_path / "audit.jsonl"

    def told():
        entries = [json.loads(line) for line in log.read_text().splitlines()]
        assert len({each["who"] for each in entries}) == 1
        return [(each["action"], each["target"], each["outcome"], each["details"].get("label")) for each in entries]

    cli.ok("repo", "push", models, compiled[0], "--audit-log", log)
    cli.ok("repo", "push", models, compiled[0], "--promote", "canary", "--audit-log", log)
    for version in (1, 2):
        cli.ok("repo", "promote", models, "plain", version, "--audit-log", log)
    cli.ok("repo", "rollback", models, "plain", "--audit-log", log)
    cli.refused("repo", "remove", models, "plain", 1, "--audit-log", log)
    cli.refused("repo", "push", models, compiled[0], "--version", "01", "--audit-log", log)
    assert told() == [
        ("push", "plain/1", "done", None),
        ("push", "plain/2", "done", "canary"),
        ("promote", "plain/1", "done", "stable"),
        ("promote", "plain/2", "done", "stable"),
        ("rollback", "plain/1", "done", "stable"),
        ("remove", "plain", "refused", None),
        ("push", str(compiled[0]), "refused", None),
    ]
    # A log that cannot be written stops a change before it is made.
    assert "cannot be used" in cli.refused("repo", "push", models, compiled[0], "--audit-log", tmp_path / "no" / "log")
    assert [each["version"] for each in cli.json("repo", "list", models)[0]["versions"]] == ["1", "2"]
    assert "keeps its own" in cli.refused("repo", "rollback", "http://127.0.0.1:9", "plain", "--audit-log", log)
