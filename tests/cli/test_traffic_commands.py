"""`leptonx traffic` and `leptonx rollout` on a folder."""

import pytest


@pytest.fixture
def models(cli, compiled, tmp_path):
    folder = tmp_path / "MODELS"
    for _ in range(2):
        cli.ok("repo", "push", folder, compiled[0])
    cli.ok("repo", "promote", folder, "plain", 1)
    return folder


def test_shares_are_set_shown_and_cleared(cli, models):
    told = cli.json("traffic", "set", models, "plain", "stable=0.9", "2=0.1", "--sticky", "x-user", "--shadow", "2=0.2")
    assert told["traffic"] == {
        "shares": {"stable": 0.9, "2": 0.1}, "sticky": "x-user", "shadow": {"to": "2", "fraction": 0.2}, "bandit": None,
    }  # fmt: skip
    text = cli.ok("traffic", "show", models, "plain")
    assert "plain: stable gets 0.9 of the requests\nplain: 2 gets 0.1 of the requests\nsticky by header x-user" in text
    assert cli.json("traffic", "clear", models, "plain")["traffic"]["shares"] == {}
    assert "one version answers all" in cli.ok("traffic", "show", models, "plain")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stable=0.5", "2=0.6"], "the shares add up to 1.1, not to 1"),
        (["stable=70", "2=30"], "the share of 'stable' is 70; write a part of 1"),
        (["stable=0.5", "blue=0.5"], "has no label 'blue'; there: stable"),
        (["stable=0.5", "7=0.5"], "has no version 7; there: 1, 2"),
        (["stable"], "expected VERSION=SHARE"),
        (["stable=0.5", "stable=0.5"], "has two shares"),
        (["stable=much"], "is no number"),
        ([], "give shares"),
    ],
)
def test_shares_that_are_refused(cli, models, arguments, message):
    assert message in cli.refused("traffic", "set", models, "plain", *arguments)


def test_a_rollout_begins_and_is_stopped(cli, models, tmp_path):
    told = cli.json("rollout", "start", models, "plain", 2, "--stage", "shadow=0.5:10", "--stage", "0.25:100")
    assert (told["state"], told["version"], told["stable"]) == ("shadow", "2", "1")
    assert "a rollout says so" in cli.ok("traffic", "show", models, "plain")
    assert "a rollout of version 2 that goes on" in cli.refused("rollout", "start", models, "plain", 2)
    assert "a rollout of version 2 that goes on" in cli.refused("traffic", "set", models, "plain", "1=0.5", "2=0.5")
    assert "version 2 for 1: shadow, stage 1 of 2" in cli.ok("rollout", "show", models, "plain")
    assert cli.json("rollout", "stop", models, "plain")["state"] == "stopped"
    assert "has no rollout that goes on" in cli.refused("rollout", "stop", models, "plain")
    file = tmp_path / "rollout.toml"
    file.write_text('rollback = ["errors > 5%"]\n[[stages]]\nshare = 0.5\nanswers = 10\n')
    told = cli.json("rollout", "start", models, "plain", 2, "--file", file, "--promote", "accuracy > 0.9 surely")
    assert (told["state"], told["share"], told["plan"]["rollback"]) == ("canary", 0.5, ["errors > 5%"])
    assert told["plan"]["promote"] == ["accuracy > 0.9 surely"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([1], "is the stable one already"),
        ([7], "has no version 7"),
        ([2, "--rollback", "p98 > 1s"], "unknown quantity 'p98'"),
        ([2, "--rollback", "p99 > stable * 2ms"], "a factor has no unit"),
        ([2, "--stage", "0.5"], "expected SHARE:ANSWERS"),
        ([2, "--stage", "1.5:10"], "stages"),
        ([2, "--stage", "0:10"], "a stage needs a share or a shadow"),
        ([2, "--file", "nothing.toml"], "cannot be read"),
    ],
)
def test_rollouts_that_are_refused(cli, models, arguments, message):
    assert message in cli.refused("rollout", "start", models, "plain", *arguments)
    assert "has had no rollout" in cli.refused("rollout", "show", models, "plain")
