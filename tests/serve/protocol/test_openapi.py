"""The document of the API: that it is the table of routes, and that a fuzzer made from it finds nothing."""

import json
import re
import subprocess
import sys

import msgspec
import pytest
from serve_fakes import Identity, exchange

from lepton_xla.serve.protocol.openapi import document
from lepton_xla.serve.protocol.routes import CONTROL, ROUTES
from lepton_xla.serve.protocol.signature import signature_of

SERVED = [route for route in ROUTES if not route.refusal and route.name not in CONTROL | {"audit"}]


@pytest.fixture(scope="module")
def served():
    from serve_fakes import Affine, label

    from lepton_xla.serve import Options, Server

    with Server(Affine(), Options(port=0)) as running:
        label(running, stable="3")
        yield running


def test_it_lists_exactly_what_is_served(served):
    status, headers, body = exchange(served, "GET", "/v2/openapi.json")
    assert (status, headers["content-type"]) == (200, "application/json")
    listed = {(method, path) for path, item in json.loads(body)["paths"].items() for method in item}
    assert listed == {(route.method.lower(), path) for route in SERVED for path in route.paths}


def test_without_models_or_labels_it_has_no_routes_of_them():
    assert not any("{model}" in path for path in document([])["paths"])
    assert not any("{label}" in path for path in document([signature_of(Identity())])["paths"])


def test_every_reference_leads_somewhere_and_every_operation_has_its_own_name():
    spec = msgspec.json.decode(msgspec.json.encode(document([signature_of(Identity())], ["stable"])))
    for reference in set(re.findall(r'"\$ref":"#/([^"]+)"', msgspec.json.encode(spec).decode())):
        place = spec
        for key in reference.split("/"):
            place = place[key]
    operations = [operation["operationId"] for item in spec["paths"].values() for operation in item.values()]
    assert len(set(operations)) == len(operations)
    for path, item in spec["paths"].items():
        for operation in item.values():
            given = {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "path"}
            assert given == set(re.findall(r"{(\w+)}", path))


def test_its_example_is_a_request_that_is_answered(served):
    spec = json.loads(exchange(served, "GET", "/v2/openapi.json")[2])
    content = spec["paths"]["/v2/models/{model}/infer"]["post"]["requestBody"]["content"]
    for kind in content.values():
        value = kind["examples"]["zeros"]["value"]
        body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        status, _, answer = exchange(served, "POST", "/v2/models/affine/infer", body)
        assert status == 200, answer


@pytest.mark.parametrize("examples", [3, pytest.param(15, marks=pytest.mark.slow)])
def test_schemathesis_finds_no_server_error_and_no_answer_that_is_not_documented(served, tmp_path, examples):
    """Examples, edges of every field, random requests, and chains of them; valid ones and invalid ones."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/v2/openapi.json", "--no-color"]
    # A request can be right by its schema and still not fit the model, which no schema says.
    command += ["--max-examples", str(examples), "--exclude-checks", "positive_data_acceptance", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    # A few examples may all be refused, which is told as a warning.
    assert re.search(r"(\d+) generated, \1 passed", done.stdout), done.stdout
