"""`POST /v2/models/NAME/explain` asks the model beside it."""

import json

import numpy as np
import pytest
from serve_fakes import exchange

import lepton_xla as lx
from lepton_xla.serve import Options, Server


@pytest.fixture(scope="module")
def server():
    program = lx.trace(lambda w, x: x @ w, np.float32([[1, 2], [3, 5]]), {"x": lx.TensorSpec(("batch", 2), "float32")})
    explained = lx.explanation.integrated_gradients(program, steps=1)
    with Server(lx.compile(explained, {"batch": (1, 2)}, name="linear-explain").servable(), Options(port=0)) as running:
        yield running


def ask(server, model, *inputs):
    body = {"inputs": [{"name": n, "shape": list(np.shape(v)), "datatype": t, "data": v} for n, t, v in inputs]}
    status, _, answer = exchange(server, "POST", f"/v2/models/{model}/explain", json.dumps(body).encode())
    return status, json.loads(answer)


def test_attributions_are_the_terms_of_a_linear_model(server):
    status, answer = ask(server, "linear", ("x", "FP32", [[10.0, 1.0], [1.0, 1.0]]), ("target", "INT32", [0, -1]))
    assert status == 200, answer
    found = {each["name"]: each["data"] for each in answer["outputs"]}
    assert found["target"] == [0, 1]
    assert found["attribution/x"] == pytest.approx([10, 3, 2, 5], rel=1e-5)


def test_a_model_without_one_says_which_is_missing(server):
    status, answer = ask(server, "other", ("x", "FP32", [[1.0, 1.0]]), ("target", "INT32", [0]))
    assert status == 404
    assert "'other-explain' is not found" in answer["error"]
