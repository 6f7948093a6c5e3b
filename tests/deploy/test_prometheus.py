"""Alert rules, dashboard and Alertmanager's settings, judged by Prometheus' own tools and by what a server exports."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "serve"))

from serve_fakes import exchange

import lepton_xla as lx
from lepton_xla.serve.monitor.exports import prometheus_rules
from lepton_xla.serve.monitor.rules import QUANTITIES, Rules

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana.json").read_text())
RULES = Rules.load(DEPLOY / "alerts.toml")
PATH = os.pathsep.join([str(ROOT / "build/prometheus/usr/bin"), os.environ.get("PATH", "")])
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
# One of every quantity, with names and texts that YAML, PromQL and Prometheus' templates could take for their own.
HARD = "\n".join(
    f"[[rule]]\nname = '{name} \"{{{{ $x }}}}\" \\ \U0001f525 é'\n"
    f"when = '{name}{argument} > 1{quantity.units[0]} {over}'\n"
    f"model = 'm\"\\'\nseverity = '{{{{'\nsummary = '{{{{ .No }}}} end: # \U0001f525'"
    for name, quantity in QUANTITIES.items()
    for argument in ([f"({next(iter(quantity.arguments), 3)})"] if quantity.argument == "required" else [""])
    for over in (["over 500ms for 250us"] if quantity.window == "time" else ["for 90s"])
)

needs_tools = pytest.mark.skipif(
    shutil.which("promtool", path=PATH) is None or shutil.which("amtool", path=PATH) is None,
    reason="`make build/prometheus/.ready` unpacks promtool and amtool",
)


def run(*command, **options):
    done = subprocess.run(
        [shutil.which(command[0], path=PATH), *map(str, command[1:])],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False, **options,
    )  # fmt: skip
    return done.returncode, done.stdout


def without_variables(expression):
    """PromQL with values in the place of Grafana's variables."""
    return re.sub(r"\$__rate_interval", "1m", expression).replace("$model", ".*").replace("$version", ".*")


def metrics_of(expression):
    """Names of the metrics in PromQL: words that no string holds, no bracket follows and no function is."""
    bare = re.sub(r'"(\\.|[^"\\])*"', "", expression)
    return set(re.findall(r"\b(?:lepton|process|nv)_\w+", bare))


@pytest.fixture(scope="module")
def exported():
    """All series that a server with a profile, rules, feedback and a shadow exports, and its text."""
    known = np.float32(np.random.default_rng(0).normal(size=(600, 4)))
    program = lx.trace(lambda w, x: x @ w, 5 * jnp.eye(4), {"x": lx.TensorSpec(("batch", 4), "float32")})
    model = lx.compile(program, {"batch": (8,)}, name="m").with_profile([{"x": known}]).servable()
    with lx.serve.Server(model, lx.serve.Options(port=0, alerts=DEPLOY / "alerts.toml")) as server:
        feedback = []
        for start in range(0, 512, 8):
            rows = known[start : start + 8]
            tensor = {"name": "x", "datatype": "FP32", "shape": [8, 4], "data": rows.ravel().tolist()}
            body = json.dumps({"id": str(start), "inputs": [tensor]}).encode()
            assert exchange(server, "POST", "/v2/models/m/infer", body)[0] == 200
            feedback.append({"id": str(start), "label": rows.argmax(1).tolist()})
        body = json.dumps({"feedback": feedback}).encode()
        assert exchange(server, "POST", "/v2/models/m/feedback", body)[0] == 200
        server.metrics.of("m", "1").shadow["same"] += 1  # tests/serve/traffic has real ones
        deadline = time.monotonic() + 20
        text = ""
        while "lepton_drift_psi{" not in text:
            assert time.monotonic() < deadline
            time.sleep(0.2)
            text = exchange(server, "GET", "/metrics")[2].decode()
    return set(re.findall(r"^([a-z_]+)[{ ]", text, re.MULTILINE)), text


def test_the_dashboard_and_the_rules_name_what_a_server_exports(exported):
    series, text = exported
    labels = {
        name: set(re.findall(r'([a-z]+)="', first))
        for name, first in re.findall(r"^([a-z_]+)\{(.*?)\} ", text, re.MULTILINE)
    }
    rules = yaml.safe_load((DEPLOY / "prometheus-rules.yaml").read_text())["groups"][0]["rules"]
    named = set()
    for title, expression in [*EXPRESSIONS, *((rule["alert"], rule["expr"]) for rule in rules)]:
        found = metrics_of(expression)
        assert found, title
        assert found <= series, (title, found - series)
        named |= found
        for by in re.findall(r"by \((.*?)\)", expression):
            # `instance` is Prometheus' own.
            assert set(by.split(", ")) - {"instance"} <= set().union(*(labels.get(name, set()) for name in found)), (
                title
            )
    for variable in DASHBOARD["templating"]["list"]:
        assert metrics_of(variable["query"]) <= series
    assert len(named) > 20


def test_the_dashboard_is_one_of_grafana():
    places = set()
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert not cells & places, panel["title"]
        assert max(x for x, _ in cells) < 24
        places |= cells
    sources = {target["datasource"]["uid"] for panel in PANELS for target in (panel, *panel["targets"])}
    assert sources == {"${datasource}"}, "a dashboard that is imported has no data source of its own"
    variables = {each["name"] for each in DASHBOARD["templating"]["list"]}
    used = {name for _, expression in EXPRESSIONS for name in re.findall(r"\$(\w+)", expression)}
    assert used - {"__rate_interval"} <= variables


def lost(given, kept, place=""):
    """What is in one JSON value and not in another."""
    if isinstance(given, dict):
        for key, value in given.items():
            if key in kept:
                yield from lost(value, kept[key], f"{place}.{key}")
            else:
                yield f"{place}.{key}"
    elif isinstance(given, list):
        for index, (value, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(value, other, f"{place}[{index}]")
    elif given != kept:
        yield place


def test_the_dashboard_fits_grafanas_own_types():
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard", reason="comes with the dev extra")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder

    def kept(document):
        return json.loads(JSONEncoder().encode(models.Dashboard.from_json(document)))

    assert list(lost(DASHBOARD, kept(DASHBOARD))) == []
    wrong = json.loads(json.dumps(DASHBOARD))
    wrong["panels"][1]["fieldConfigs"] = {}
    assert list(lost(wrong, kept(wrong))) == [".panels[1].fieldConfigs"]


def test_the_rules_of_prometheus_are_made_from_ours():
    assert (DEPLOY / "prometheus-rules.yaml").read_text() == prometheus_rules(RULES)


@needs_tools
def test_promtool_takes_every_query_of_the_dashboard(tmp_path):
    rules = [
        {"record": f"panel:{number}", "expr": without_variables(expression)}
        for number, (_, expression) in enumerate(EXPRESSIONS)
    ]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    code, told = run("promtool", "check", "rules", file)
    assert code == 0, told
    assert f"{len(rules)} rules found" in told
    rules[0]["expr"] += ")"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert run("promtool", "check", "rules", file)[0] != 0


@needs_tools
def test_promtool_takes_rules_of_every_quantity_and_hard_texts(tmp_path):
    file = tmp_path / "rules.yaml"
    rules = Rules.parse(HARD)
    file.write_text(prometheus_rules(rules))
    code, told = run("promtool", "check", "rules", file)
    assert code == 0, told
    assert f"{len(QUANTITIES)} rules found" in told
    series = f'lepton_rule_value{{rule="{quoted(rules, "drift")}", model="m\\"\\\\", version="1"}}'
    summary = "{{ .No }} end: # \U0001f525"
    labels = {"model": 'm"\\', "version": "1", "severity": "{{", "rule": names(rules)["drift"]}
    code, told = promtool_test(
        tmp_path, file, [{"series": series, "values": "2x10"}], {
            names(rules)["drift"]: [{"exp_labels": labels, "exp_annotations": {"summary": summary}}]
        }, at="5m",
    )  # fmt: skip
    assert code == 0, told


def names(rules):
    return {rule.condition.quantity: rule.name for rule in rules.rules}


def quoted(rules, quantity):
    return names(rules)[quantity].replace("\\", "\\\\").replace('"', '\\"')


def promtool_test(folder, file, series, alerts, at):
    """What `promtool test rules` says of alerts at a time; no entry of an alert says nothing about it."""
    test = {
        "rule_files": [str(file)],
        "evaluation_interval": "30s",
        "tests": [
            {
                "interval": "30s",
                "input_series": series,
                "alert_rule_test": [
                    {"eval_time": at, "alertname": name, "exp_alerts": found} for name, found in alerts.items()
                ],
            }
        ],
    }
    (folder / "test.yaml").write_text(yaml.safe_dump(test, allow_unicode=True))
    return run("promtool", "test", "rules", folder / "test.yaml")


def counters(version, **steps):
    """Counters of a version that grow by so much every 30 s."""
    names = ("requests", "failures", "rejected", "expired")
    return [
        {
            "series": f'lepton_inference_{name}_total{{model="m", version="{version}"}}',
            "values": f"0+{steps.get(name, 0)}x60",
        }
        for name in names
    ]


@needs_tools
def test_alerts_fire_on_series_that_call_for_them_and_on_no_others(tmp_path):
    def slow(version, fast, slow):
        buckets = {"0.1": fast, "0.25": fast, "0.5": fast + slow, "+Inf": fast + slow}
        return [
            {"series": f'lepton_request_seconds_bucket{{model="m", version="{version}", le="{bound}"}}',
             "values": f"0+{step}x60"}
            for bound, step in buckets.items()
        ]  # fmt: skip

    def value(rule, version, values):
        return {
            "series": f'lepton_rule_value{{rule="{rule}", model="m", version="{version}"}}', "values": values,
        }  # fmt: skip

    # Of version 1 everything is wrong; of version 2 everything is just right.
    series = [
        *counters(1, requests=900, failures=20, rejected=50, expired=30),
        *counters(2, requests=970, failures=10, rejected=10, expired=10),
        *slow(1, 980, 20), *slow(2, 995, 5),
        value("LeptonDrift", 1, "0.3x60"), value("LeptonDrift", 2, "0.25x60"),
        value("LeptonNotFinite", 1, "0.01x60"), value("LeptonNotFinite", 2, "0x60"),
        value("LeptonWrong", 1, "0.89x60"), value("LeptonWrong", 2, "0.9x60"),
    ]  # fmt: skip
    alerts = {}
    for rule in RULES.rules:
        labels = {"model": "m", "version": "1", "severity": rule.severity}
        if rule.condition.quantity in ("drift", "missing", "accuracy"):
            labels["rule"] = rule.name
        alerts[rule.name] = [
            {"exp_labels": labels, "exp_annotations": {"summary": f"m version 1: {rule.when}"}},
        ]
    file = DEPLOY / "prometheus-rules.yaml"
    code, told = promtool_test(tmp_path, file, series, alerts, at="20m")
    assert code == 0, told
    # What holds for too short a time is not told yet, and what ends is told no more.
    early = {name: found for name, found in alerts.items() if name in ("LeptonWrong", "LeptonNotFinite", "LeptonDrift")}
    code, told = promtool_test(tmp_path, file, series, early | {"LeptonFails": [], "LeptonSlow": []}, at="1m")
    assert code == 0, told
    ended = [value("LeptonDrift", 1, "0.3x4 0.1x60")]
    code, told = promtool_test(tmp_path, file, ended, {"LeptonDrift": []}, at="10m")
    assert code == 0, told
    assert promtool_test(tmp_path, file, series, {"LeptonFails": []}, at="20m")[0] != 0


@needs_tools
def test_promtool_takes_what_the_server_exports(exported):
    code, told = run("promtool", "check", "metrics", input=exported[1])
    ours = [line for line in told.splitlines() if not line.startswith("nv_")]
    assert ours == [], code


@needs_tools
def test_amtool_takes_alertmanagers_settings(tmp_path):
    file = DEPLOY / "alertmanager.yaml"
    code, told = run("amtool", "check-config", file)
    assert code == 0, told
    for severity in sorted({rule.severity for rule in RULES.rules}):
        code, told = run("amtool", "config", "routes", "test", "--config.file", file, f"severity={severity}")
        assert (code, told.splitlines()[-1]) == (0, "page" if severity == "page" else "chat")
    wrong = tmp_path / "alertmanager.yaml"
    wrong.write_text(file.read_text().replace("receiver: page", "receiver: pager"))
    assert run("amtool", "check-config", wrong)[0] != 0


def test_alertmanager_is_told_names_that_there_are():
    settings = yaml.safe_load((DEPLOY / "alertmanager.yaml").read_text())
    matchers = [
        each for rule in settings["inhibit_rules"] for side in ("source", "target") for each in rule[f"{side}_matchers"]
    ]
    named = {name for each in matchers for name in re.search(r'"(.*)"', each)[1].split("|")}
    assert named <= {rule.name for rule in RULES.rules}
