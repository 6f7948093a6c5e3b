"""Alert rules as text, and what becomes of them."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lepton_xla.errors import LeptonError, ServeError
from lepton_xla.serve.monitor.exports import expression, prometheus_rules
from lepton_xla.serve.monitor.rules import QUANTITIES, Condition, Rules, parse_condition

GOOD = {
    "p99 > 50ms for 2m": Condition("p99", "", ">", 0.05, 60.0, 120.0),
    "p99.9>=1s over 5m": Condition("p99.9", "", ">=", 1.0, 300.0, 0.0),
    "drift(image) > 0.2": Condition("drift", "image", ">", 0.2, 500.0, 0.0),
    "drift > 0.2 over 2000 for 30s": Condition("drift", "", ">", 0.2, 2000.0, 30.0),
    "accuracy < 0.95 over 1000": Condition("accuracy", "", "<", 0.95, 1000.0, 0.0),
    "recall(3) < 90%": Condition("recall", "3", "<", 0.9, 1000.0, 0.0),
    "errors > 1% for 1m": Condition("errors", "", ">", 0.01, 60.0, 60.0),
    "requests <= 10/s": Condition("requests", "", "<=", 10.0, 60.0, 0.0),
    "queue > 100 for 10s": Condition("queue", "", ">", 100.0, 0.0, 10.0),
    "missing(x:projection 2) > 0": Condition("missing", "x:projection 2", ">", 0.0, 500.0, 0.0),
}

BAD = {
    "": "is no condition",
    "p99": "is no condition",
    "p99 > fast": "is no condition",
    "p99 > 50ms and drift > 1": "is no condition",
    "p98 > 50ms": "unknown quantity 'p98'",
    "p99 > 50%": "no unit '%'",
    "p99(x) > 1s": "takes nothing in parentheses",
    "recall < 0.9": "needs a class",
    "accuracy < 0.9 over 10m": "over a number of rows, not a time",
    "accuracy < 0.9 over 0": "1 to 1000000",
    "p99 > 1s over 100": "a duration needs a unit",
    "p99 > 1s for 2h": "at most an hour",
    "queue > 1 over 5m": "as it is now",
}


@pytest.mark.parametrize("text", GOOD)
def test_conditions(text):
    condition = parse_condition(text)
    assert condition == GOOD[text] or (
        condition.value == pytest.approx(GOOD[text].value) and condition.over == GOOD[text].over
    )


@pytest.mark.parametrize("text", BAD)
def test_conditions_that_do_not_parse(text):
    with pytest.raises(ServeError) as caught:
        parse_condition(text)
    assert BAD[text] in str(caught.value)


@given(st.text(max_size=80))
def test_no_text_does_anything_but_parse_or_be_refused(text):
    try:
        condition = parse_condition(text)
    except ServeError:
        return
    assert condition.quantity in QUANTITIES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rule = 3", "write each rule as"),
        ("[[rules]]\nname = 'a'", "unknown key 'rules'"),
        ("[[rule]]\nname = 'a'", "rule 1 has no when"),
        ("[[rule]]\nwhen = 'p99 > 1s'", "rule 1 has no name"),
        ("[[rule]]\nname = 'a'\nwhen = 'p99 > 1s'\nhold = '2m'", "unknown key 'hold'"),
        ("[[rule]]\nname = 'a'\nwhen = 3", "when = 3 is not text"),
        ("[[rule]]\nname = 'a'\nwhen = 'p99'", r"rule 1 \(a\)"),
        ("[[rule]]\nname = 'a'\nwhen = 'p99 > 1s'\n" * 2, "two rules have the name 'a'"),
        ("[[webhook]]\nurl = 'file:///etc/passwd'", "must be http"),
        ("[[webhook]]\nurl = 'http://user:secret@host/'", "without a user name"),
        ("[[webhook]]\nurl = 'http://host:port/'", "must be http"),
        ("not toml", "Expected"),
    ],
)
def test_files_that_do_not_parse(text, message):
    with pytest.raises(ServeError, match=message) as caught:
        Rules.parse(text)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_not_there_or_too_large(tmp_path):
    with pytest.raises(LeptonError, match="cannot be read: No such file"):
        Rules.load(tmp_path / "none.toml")
    (tmp_path / "large.toml").write_text("#" * (2 << 20))
    with pytest.raises(LeptonError, match="larger than"):
        Rules.load(tmp_path / "large.toml")
    (tmp_path / "latin.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(LeptonError, match="not UTF-8"):
        Rules.load(tmp_path / "latin.toml")


def rule(when, **keys):
    lines = [f'{key} = "{value}"' for key, value in {"name": "it", "when": when, **keys}.items()]
    return Rules.parse("[[rule]]\n" + "\n".join(lines))


def test_the_prometheus_file_is_yaml_with_the_same_rules():
    text = "\n".join(f"[[rule]]\nname = 'rule {number}'\nwhen = '{when}'" for number, when in enumerate(GOOD))
    document = yaml.safe_load(prometheus_rules(Rules.parse(text)))
    (group,) = document["groups"]
    assert [each["alert"] for each in group["rules"]] == [f"rule {number}" for number in range(len(GOOD))]
    assert [each.get("for") for each in group["rules"]] == [
        "2m",
        None,
        None,
        "30s",
        None,
        None,
        "1m",
        None,
        "10s",
        None,
    ]
    assert yaml.safe_load(prometheus_rules(Rules()))["groups"][0]["rules"] == []


def test_promql():
    buckets = 'lepton_request_seconds_bucket{model="digits"}'
    found = expression(rule("p99 > 50ms over 5m", model="digits").rules[0])
    assert found == f"histogram_quantile(0.99, sum by (model, version, le) (rate({buckets}[5m]))) > 0.05"
    assert expression(rule("queue > 7").rules[0]) == "sum by (model, version) (lepton_queue_rows) > 7"
    assert expression(rule("recall(3) < 90%").rules[0]) == 'lepton_rule_value{rule="it"} < 0.9'
