"""Requests of texts, files and words: V2 in JSON and binary, bodies of one value, and what is refused."""

import asyncio
import base64
import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.conversion.pictures import Decoder
from lepton_xla.serve import Limits, Options, Server
from lepton_xla.serve.client import Client
from lepton_xla.serve.protocol import raw

sys.path.insert(0, str(Path(__file__).parents[1] / "conversion"))

from conversion_models import WORDS, colors_of, file_of, plain

tritonclient = pytest.importorskip("tritonclient.http")
pytest.importorskip("PIL.Image")
pytest.importorskip("tokenizers")


def jpeg(color=(10, 240, 10)):
    return file_of(plain(color, 20, 30), "JPEG")


def models():
    colors = lx.compile(colors_of(), {"batch": (1, 4)}, name="colors").servable()
    inputs = {
        "tokens": lx.TensorSpec(("batch", "length"), "int32"),
        "mask": lx.TensorSpec(("batch", "length"), "int32"),
        "kind": lx.TensorSpec(("batch",), "int32"),
        "x": lx.TensorSpec(("batch", 4), "float32"),
    }

    def count(w, tokens, mask, kind, x):
        return (w[tokens] * mask[..., None].astype(jnp.float32)).sum(1) * kind[:, None].astype(jnp.float32) + x

    program = lx.take_texts(lx.trace(count, jnp.eye(4), inputs), WORDS, mask="mask", length=8, pad=3)
    program = lx.take_categories(program, "kind", ["one", "two"])
    words = lx.compile(program, {"batch": (1, 4), "length": (2, 8)}, name="words").servable()
    return [colors, words]


@pytest.fixture(scope="module")
def url():
    server = Server(models(), Options(port=0, limits=Limits(max_body_bytes=1 << 16))).start()
    yield server.url
    server.stop()


def post(url, data, **headers):
    """Status and document, or bytes if it is none."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, data, named)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]


def tensor(name, data, datatype="BYTES", shape=None):
    return {"name": name, "datatype": datatype, "shape": shape or [len(data)], "data": data}


def outputs(answer):
    return {each["name"]: each["data"] for each in answer["outputs"]}


def test_metadata_tells_what_clients_send(url):
    with urllib.request.urlopen(f"{url}/v2/models/words") as answer:
        told = json.loads(answer.read())
    inputs = {each["name"]: (each["datatype"], each["shape"]) for each in told["inputs"]}
    assert inputs == {"text": ("BYTES", [-1]), "kind": ("BYTES", [-1]), "x": ("FP32", [-1, 4])}
    with urllib.request.urlopen(f"{url}/v2/models/colors/config") as answer:
        told = json.loads(answer.read())
    assert [each["data_type"] for each in told["output"]] == ["TYPE_STRING", "TYPE_FP32"]
    assert told["input"][0]["data_type"] == "TYPE_STRING"


def test_texts_and_words_in_json(url):
    x = [[0.0, 0.0, 0.0, 0.5]] * 2
    sent = [tensor("text", ["red blue", "blue"]), tensor("kind", ["two", "one"]), tensor("x", x, "FP32", [2, 4])]
    status, answer = post(f"{url}/v2/models/words/infer", json.dumps({"inputs": sent}).encode())
    assert status == 200
    assert outputs(answer)["output"] == [0, 2, 2, 0.5, 0, 0, 1, 0.5]


def test_a_file_in_base64(url):
    sent = [tensor("image", [base64.b64encode(jpeg()).decode(), base64.b64encode(jpeg((250, 0, 0))).decode()])]
    status, answer = post(f"{url}/v2/models/colors/infer", json.dumps({"inputs": sent, "id": "a"}).encode())
    assert (status, answer["id"], outputs(answer)["label"]) == (200, "a", ["grün", "red"])


def test_a_body_that_is_a_file(url):
    """What `curl --data-binary @image.jpg -H 'Content-Type: image/jpeg'` sends."""
    status, answer = post(f"{url}/v2/models/colors/infer", jpeg((0, 0, 250)), Content_Type="image/jpeg")
    assert (status, outputs(answer)["label"]) == (200, ["blue"])


def test_tritons_client_sends_and_gets_bytes(url):
    with tritonclient.InferenceServerClient(url.removeprefix("http://")) as client:
        sent = tritonclient.InferInput("image", [5], "BYTES")  # more rows than the largest bucket
        sent.set_data_from_numpy(np.array([jpeg()] * 4 + [jpeg((250, 0, 0))], object))
        found = client.infer("colors", [sent])
        assert [each.decode() for each in found.as_numpy("label")] == ["grün"] * 4 + ["red"]
        raw = tritonclient.InferInput("text", [1], "BYTES")
        raw.set_data_from_numpy(np.array(["red red red"], object))
        kind = tritonclient.InferInput("kind", [1], "BYTES")
        kind.set_data_from_numpy(np.array(["one"], object))
        x = tritonclient.InferInput("x", [1, 4], "FP32")
        x.set_data_from_numpy(np.zeros((1, 4), np.float32))
        np.testing.assert_array_equal(client.infer("words", [x, kind, raw]).as_numpy("output"), [[0, 3, 0, 0]])


def test_our_client(url):
    with Client(url) as client:
        found = client.infer("words", {"text": ["red", "blue blue"], "kind": ["two", "?"], "x": np.zeros((2, 4), "f")})
        np.testing.assert_array_equal(found["output"], [[0, 2, 0, 0], [0, 0, 0, 0]])
        image = client.infer("colors", {"image": np.array([jpeg()], object)}, outputs=["label"])
        assert list(image) == ["label"]


def test_the_models_own_inputs_are_taken_too(url):
    pixels = np.zeros((1, 16, 16, 3), np.uint8)
    pixels[..., 2] = 200
    with Client(url) as client:
        found = client.infer("colors", {"image.pixels": pixels, "image.size": np.int32([[16, 16]])})
    assert found["label"].tolist() == [b"blue"]


@pytest.mark.parametrize(
    ("model", "inputs", "status", "said"),
    [
        ("colors", [tensor("image", ["no base64!"])], 400, "base64"),
        ("colors", [tensor("image", [base64.b64encode(jpeg()[:50]).decode()])], 400, "row 0 is no whole JPEG"),
        ("colors", [tensor("image", [base64.b64encode(b"x").decode()] * 100)], 413, "send fewer rows"),
        ("colors", [tensor("image", [""], shape=[2])], 400, "needs 2 elements, not 1"),
        ("colors", [tensor("image", [1.0], "FP32")], 400, "the model takes BYTES"),
        ("colors", [tensor("image", [1.0])], 400, "not strings"),
        ("colors", [tensor("image", [[base64.b64encode(jpeg()).decode()]], shape=[2])], 400, "not strings"),
        ("colors", [tensor("image", base64.b64encode(jpeg()).decode(), shape=[2])], 400, "not strings"),
        ("colors", [{**tensor("image", [""]), "parameters": {"binary_data_size": 4}}], 400, "both data and binary"),
        ("colors", [{"name": "image", "datatype": "BYTES", "shape": [1]}], 400, "neither data nor binary"),
        ("colors", [], 400, "is missing"),
        ("words", [tensor("text", ["red"])], 400, "'kind' is missing"),
        (
            "words",
            [tensor("text", ["red " * 9]), tensor("kind", ["a"]), tensor("x", [0.0] * 4, "FP32", [1, 4])],
            400,
            "9 tokens; the model takes 8",
        ),
        (
            "words",
            [tensor("text", ["red"]), tensor("kind", ["a"] * 2), tensor("x", [0.0] * 4, "FP32", [1, 4])],
            400,
            "but 1 in another dimension",
        ),
    ],
)
def test_what_is_refused(url, model, inputs, status, said):
    found, why = post(f"{url}/v2/models/{model}/infer", json.dumps({"inputs": inputs}).encode())
    assert found == status
    assert said in why


@pytest.mark.parametrize("cut", [3, 10, -1])
def test_bytes_that_are_cut_short(url, cut):
    data = len(jpeg()).to_bytes(4, "little") + jpeg()
    data = data[:cut]
    parameters = {"binary_data_size": len(data)}
    head = json.dumps({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "parameters": parameters}]})
    sent = head.encode() + data
    status, why = post(
        f"{url}/v2/models/colors/infer", sent, Inference_Header_Content_Length=str(len(head)),
        Content_Type="application/octet-stream",
    )  # fmt: skip
    assert status == 400
    assert "cut short" in why


def test_the_event_loop_goes_on_while_images_are_decoded(url, monkeypatch):
    """A decoder that holds its thread for a second holds nobody else."""
    decode, loops = Decoder.decode, []

    def slow(self, *args):
        loops.append(asyncio._get_running_loop())
        time.sleep(0.3)
        return decode(self, *args)

    monkeypatch.setattr(Decoder, "decode", slow)
    status, _ = post(f"{url}/v2/models/colors/infer", jpeg(), Content_Type="image/jpeg")
    assert (status, loops) == (200, [None])


def test_what_one_request_may_have_decoded_is_bounded(url, monkeypatch):
    monkeypatch.setattr(raw, "_IMAGES", 0)
    monkeypatch.setattr(Decoder, "decode", None)
    status, why = post(f"{url}/v2/models/colors/infer", jpeg(), Content_Type="image/jpeg")
    assert status == 400
    assert "send fewer images at once" in why
