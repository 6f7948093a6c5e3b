"""`leptonx alerts`."""

import json

import yaml
from click.testing import CliRunner

from lepton_xla.cli import main

RULES = """
[[rule]]
name = "slow"
when = "p99 > 50ms for 2m"
[[rule]]
name = "wrong"
when = "accuracy < 0.95 over 1000"
severity = "page"
[[webhook]]
url = "https://example.org/secret"
"""


def run(*arguments):
    return CliRunner().invoke(main, ["alerts", *map(str, arguments)])


def test_check_shows_how_rules_are_read(tmp_path):
    (tmp_path / "alerts.toml").write_text(RULES)
    result = run("check", tmp_path / "alerts.toml")
    assert result.exit_code == 0
    assert "2 rules and 1 webhooks are well formed" in result.output
    assert "secret" not in result.output
    found = json.loads(run("check", tmp_path / "alerts.toml", "--json").output)["rules"]
    assert [(each["over"], each["for"], each["severity"]) for each in found] == [
        ("60 s", "120 s", "warning"), ("1000 rows", "0 s", "page"),
    ]  # fmt: skip


def test_prometheus_prints_a_rule_file(tmp_path):
    (tmp_path / "alerts.toml").write_text(RULES)
    document = yaml.safe_load(run("prometheus", tmp_path / "alerts.toml").output)
    assert [each["alert"] for each in document["groups"][0]["rules"]] == ["slow", "wrong"]


def test_quantities_are_listed():
    names = [each["quantity"] for each in json.loads(run("quantities", "--json").output)]
    assert {"p99", "drift[(TENSOR)]", "recall(CLASS)"} <= set(names)
    assert "Kolmogorov" in run("quantities").output


def test_a_bad_rule_is_one_line(tmp_path):
    (tmp_path / "alerts.toml").write_text("[[rule]]\nname = 'a'\nwhen = 'p99 > soon'")
    result = run("check", tmp_path / "alerts.toml")
    assert result.exit_code == 2
    assert result.output.startswith("leptonx: ")
    assert "rule 1 (a): 'p99 > soon' is no condition" in result.output
    assert len(result.output.splitlines()) == 1
