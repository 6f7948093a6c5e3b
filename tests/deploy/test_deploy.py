"""Files under deploy/: they fit the published schemas, use flags and metrics that exist, and the page quotes them."""

import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from lepton_xla.cli.serve import serve
from lepton_xla.serve.app.options import Options
from lepton_xla.serve.observe.exposition import render
from lepton_xla.serve.observe.server_metrics import ServerMetrics
from lepton_xla.serve.ray import Settings

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="comes with the dev extra")
jsonschema = pytest.importorskip("jsonschema", reason="comes with kubernetes-validate")

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
VERSIONS = ("1.27", "1.37")  # the oldest and the newest that the package has schemas of and our fields exist in


def documents(name):
    return [each for each in yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")) if each]


KUBERNETES = documents("kubernetes.yaml")
KSERVE = documents("kserve.yaml")
DEPLOYMENT = KUBERNETES[0]["spec"]["template"]["spec"]
COMMANDS = {
    "kubernetes.yaml": DEPLOYMENT["containers"][0]["args"],
    "kserve.yaml": KSERVE[0]["spec"]["containers"][0]["args"],
    "Dockerfile": json.loads(re.search(r"^CMD (.*)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)[1]),
    "lepton.service": shlex.split(re.search(r"ExecStart=\S+ (.*)", (DEPLOY / "lepton.service").read_text())[1]),
}


def exported():
    """Names of what a server exports, its model's included."""
    metrics = ServerMetrics()
    metrics.of("m", "1")
    return set(re.findall(r"^# TYPE (\w+)", render(metrics).decode(), re.MULTILINE))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("document", KUBERNETES, ids=lambda each: each["kind"])
def test_manifests_fit_kubernetes_own_schemas(document, version):
    kubernetes_validate.validate(document, version, strict=True)


def test_what_does_not_fit_is_seen():
    wrong = json.loads(json.dumps(KUBERNETES[0]))
    wrong["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[1], strict=True)


def validate(document):
    name = {"ClusterServingRuntime": "clusterservingruntimes", "InferenceService": "inferenceservices"}
    schema = json.loads((ROOT / "tests/deploy/schemas" / f"{name[document['kind']]}.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(document)


@pytest.mark.parametrize("document", KSERVE, ids=lambda each: each["kind"])
def test_resources_fit_kserves_own_schemas(document):
    validate(document)
    spec = document["spec"]
    for wrong in ({**spec, "canaries": []}, {**spec, next(iter(spec)): 7}):
        with pytest.raises(jsonschema.ValidationError):
            validate({**document, "spec": wrong})


def test_a_canary_needs_the_field_name_of_its_model():
    wrong = json.loads(json.dumps(KSERVE[1]))
    del wrong["spec"]["canary"][0]["predictor"]["model"]["name"]
    with pytest.raises(jsonschema.ValidationError, match="'name' is a required property"):
        validate(wrong)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_server_takes_the_flags(name):
    command, *args = COMMANDS[name]
    assert command == "serve"
    given = serve.make_context("serve", [ROOT.as_posix(), *args[1:]]).params
    assert given["host"] in ("0.0.0.0", "127.0.0.1")
    if given["host"] == "0.0.0.0":
        assert given["token_file"] or given["insecure_public"], "it would refuse to listen"


def test_pods_end_after_the_server_has_and_probes_ask_for_what_there_is():
    given = serve.make_context("serve", [ROOT.as_posix(), *COMMANDS["kubernetes.yaml"][2:]]).params
    readiness = DEPLOYMENT["containers"][0]["readinessProbe"]
    assert given["lame_duck_s"] > readiness["periodSeconds"] * readiness["failureThreshold"]
    assert DEPLOYMENT["terminationGracePeriodSeconds"] > given["lame_duck_s"] + given["stop_timeout_s"]
    for container in (DEPLOYMENT["containers"][0], KSERVE[0]["spec"]["containers"][0]):
        for probe in ("startupProbe", "readinessProbe"):
            assert container[probe]["httpGet"]["path"] == "/v2/health/ready"
        assert container["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
    stop = int(re.search(r"TimeoutStopSec=(\d+)", (DEPLOY / "lepton.service").read_text())[1])
    assert stop > Options().lame_duck_s + Options().stop_timeout_s


def test_scaling_goes_by_metrics_that_the_server_exports():
    rules = documents("prometheus-adapter.yaml")[0]["rules"]["custom"]
    asked = {each["pods"]["metric"]["name"] for each in KUBERNETES[2]["spec"]["metrics"]}
    assert asked == {rule["name"]["as"] for rule in rules}
    names = {name.removesuffix("_sum") for rule in rules for name in re.findall(r"lepton_\w+", rule["seriesQuery"])}
    assert names <= exported()
    for rule in rules:
        series = re.match(r"\w+", rule["seriesQuery"])[0]
        assert series in rule["metricsQuery"]


def test_selectors_and_ports_meet():
    labels = KUBERNETES[0]["spec"]["template"]["metadata"]["labels"]
    ports = {each["name"]: each["containerPort"] for each in DEPLOYMENT["containers"][0]["ports"]}
    assert ports == {"http": 8000}
    by_kind = {each["kind"]: each["spec"] for each in KUBERNETES}
    assert by_kind["Service"]["selector"] == labels
    assert by_kind["PodDisruptionBudget"]["selector"]["matchLabels"] == labels
    assert by_kind["NetworkPolicy"]["podSelector"]["matchLabels"] == labels
    assert by_kind["Service"]["ports"][0]["targetPort"] == "http"
    assert by_kind["HorizontalPodAutoscaler"]["scaleTargetRef"]["name"] == KUBERNETES[0]["metadata"]["name"]
    mounts = {each["name"] for each in DEPLOYMENT["containers"][0]["volumeMounts"]}
    assert mounts == {each["name"] for each in DEPLOYMENT["volumes"]}


def test_the_ray_application_takes_its_arguments():
    (found,) = documents("ray.yaml")[0]["applications"]
    module, _, name = found["import_path"].partition(":")
    assert hasattr(sys.modules[module], name)
    assert set(found["args"]) <= set(Settings.__struct_fields__)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_unit_is_one(tmp_path):
    text = (DEPLOY / "lepton.service").read_text()
    unit = tmp_path / "lepton.service"
    unit.write_text(text.replace("/opt/lepton/bin/leptonx", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    unit.write_text(unit.read_text().replace("ProtectHome", "ProtectHouse"))
    assert (
        "ProtectHouse"
        in subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False).stderr
    )
    assert "MemoryDenyWriteExecute" not in text, "XLA maps code"


def squeezed(text):
    return " ".join(text.split())


def test_the_page_explains_each_file_and_quotes_what_is_there():
    sections = dict(re.findall(r"^## `deploy/(.*?)`\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
    assert sorted(sections) == sorted(path.name for path in DEPLOY.iterdir())
    for name, section in sections.items():
        text = squeezed((DEPLOY / name).read_text())
        quoted = re.findall(r"^\| `(.*?)` \|", section, re.MULTILINE)
        assert quoted, name
        for line in quoted:
            assert squeezed(line) in text, (name, line)
