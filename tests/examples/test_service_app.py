"""Customer service: its tokenizer, its network by steps and at once, its page, and all of it on invented questions."""

import contextlib
import http.client
import http.server
import importlib
import json
import pathlib
import socket
import sys
import threading

import jax
import numpy as np
import pytest

from lepton_xla.conversion.huggingface import HuggingFace
from lepton_xla.generation.texts import TextStream

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "examples" / "apps"
PARTS = ("run", "targets", "loop", "training", "network", "words", "questions", "page", "reports", "runs")

pytest.importorskip("tokenizers")


@pytest.fixture
def app(monkeypatch):
    """The modules of the application, by name."""
    for folder in (FOLDER, FOLDER / "service"):
        monkeypatch.syspath_prepend(str(folder))
    for name in PARTS:
        sys.modules.pop(name, None)
    # The example is written as users write.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield {name: importlib.import_module(name) for name in PARTS}
    for name in PARTS:
        sys.modules.pop(name, None)


@pytest.fixture
def made(app):
    """The tokenizer of four kinds of question and `unknown`, and the task."""
    task = app["questions"].made_up(4)
    return app["words"].make(task.kinds, task.replies, task.train[0]), task


def test_there_is_a_reply_to_every_kind_and_no_question_is_in_both_parts(app):
    task = app["questions"].made_up()
    assert (len(task.kinds), task.kinds[-1], len(set(task.replies))) == (78, "unknown", 78)
    assert not set(task.train[0]) & set(task.test[0])
    assert set(task.train[1]) == set(task.test[1]) == set(range(77))
    assert not set(task.strangers) & set(task.others)


@pytest.mark.parametrize(
    ("text", "said"),
    [("a,b\n1,2\n", "with columns text and category"), ("text,category\nHi,gold\n", "without a reply in .*: gold")],
)
def test_questions_that_are_none_of_banking77s_are_refused(app, tmp_path, monkeypatch, text, said):
    monkeypatch.setenv("LEPTON_DATA", str(tmp_path))
    (tmp_path / "banking77").mkdir()
    (tmp_path / "banking77" / "train.csv").write_text(text)
    with pytest.raises(SystemExit, match=said):
        app["questions"].load()


def test_replies_are_told_word_by_word_as_they_are_written(app, made):
    words, task = made
    tokenizer = HuggingFace(words.data)
    for kind, reply in enumerate(task.replies):
        tokens = words.replies[kind].tolist()
        assert tokens[0] == kind
        ids = [words.first + token for token in tokens[: tokens.index(words.end)]]
        stream = TextStream(tokenizer)
        pieces = [stream.add(token) for token in ids]
        assert pieces[0] == "", "the kind has no text"
        assert "".join(pieces) + stream.end() == reply
        assert sum(piece != "" for piece in pieces) >= len(reply.split())


def test_the_last_question_of_a_chat_is_read_as_if_it_came_alone(made):
    tokenizer = HuggingFace(made[0].data)
    question = "Where is my card? user: me"
    alone = tokenizer.encode(question)
    for before in ("", "user: Hello\nassistant: Hello!\n", "system: Be kind.\n"):
        assert tokenizer.encode(f"{before}user: {question}\nassistant:") == alone
    assert tokenizer.encode("what does user: mean") != tokenizer.encode("mean")


def test_tokens_of_replies_are_no_words_of_a_question(app, made):
    words, task = made
    tokens, lengths = app["words"].tokens_of(words, [*task.test[0], "\u2581Your \u2582."], 16)
    assert tokens[:-1].max() < words.first
    assert lengths.max() <= 16
    weights = app["network"].small_encoder(words.first, 0)
    encode = jax.jit(app["network"].encode)
    marked, unknown = (encode(weights, np.array([[2, each]]), np.array([2])) for each in (words.first + 3, 1))
    np.testing.assert_array_equal(marked, unknown)


def test_decoding_step_by_step_gives_the_logits_of_decoding_at_once(app, made):
    words, _ = made
    network = app["network"]
    weights = network.small_encoder(words.first, 0)
    weights |= network.decoder(words, network.SMALL_WIDTH, 0)
    init_cache, prefill, decode = network.steps(words)
    tokens, lengths = np.array([[2, 9, 12, 3], [2, 7, 3, 0]], np.int32), np.array([4, 3], np.int32)
    said = np.array(words.replies[[1, 2], :4])

    def both(weights):
        states = network.encode(weights, tokens, lengths)
        whole = network.replay(weights, states, np.arange(4)[None] < lengths[:, None], said)
        return whole, *prefill(weights, tokens, lengths)

    whole, first, cache = jax.jit(both)(weights)
    np.testing.assert_allclose(first[:, words.first :][:, : words.kinds], whole[:, 0, : words.kinds], atol=2e-5)
    assert (first[:, words.first + words.kinds :] < -1e8).all(), "the first token is a kind"
    longer = init_cache(weights, 2, 8)
    cache = jax.tree.map(
        lambda to, of: np.pad(of, [(0, a - b) for a, b in zip(to.shape, of.shape, strict=True)]), longer, cache
    )
    step = jax.jit(decode)
    for place in range(4):
        logits, cache = step(weights, cache, words.first + said[:, place], np.full(2, place + 1, np.int32))
        np.testing.assert_allclose(logits[:, words.first :], whole[:, place + 1], atol=2e-5)
        assert (logits[:, : words.first] < -1e8).all()


def test_what_is_not_certain_enough_is_unknown(app, made):
    words, network = made[0], app["network"]
    logits = np.full((3, words.count), 9.0, np.float32)  # words are not kinds, however likely
    logits[:, : words.kinds] = np.log(
        [[0.7, 0.1, 0.1, 0.05, 0.05], [0.3, 0.2, 0.2, 0.2, 0.1], [0.3, 0.02, 0.02, 0.06, 0.6]]
    )
    np.testing.assert_allclose(network.certainty(logits, words)[:, 0], [0.7, 0.3, 0.3], rtol=1e-5)
    for threshold, expected in ((0.0, [0, 0, 4]), (0.29, [0, 0, 4]), (0.5, [0, 4, 4]), (0.9, [4, 4, 4])):
        found = network.decided({"threshold": np.float32(threshold)}, logits, words)
        assert np.argmax(found, -1).tolist() == expected


def test_the_reader_tells_the_kind_that_the_network_begins_with(app, made):
    words, task = made
    network, targets, training = app["network"], app["targets"], app["training"]
    weights = dict(training.untrained(words, None, 0).program.weights) | {"threshold": np.float32(0.25)}
    program = training.untrained(words, None, 0).program.replace(weights=weights)
    reader = targets.reader(program, words)
    asked = [*task.test[0][:6], "nothing of the kind at all " * 20]
    found = np.asarray(jax.jit(reader.fn)(reader.weights, reader.converted({"text": asked})["tokens"])["kinds"])
    tokens, lengths = app["words"].tokens_of(words, asked, training.LENGTH)
    first, _ = jax.jit(network.steps(words)[1])(weights, tokens, lengths)
    np.testing.assert_array_equal(found.argmax(-1), first.argmax(-1) - words.first)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)


def test_before_a_kind_was_asked_about_nothing_else_is_missing(app):
    questions, training = app["questions"], app["training"]
    task = questions.made_up()
    new = questions.new_kinds(task)
    assert {task.kinds[kind] for kind in new} >= {"top_up_failed", "topping_up_by_card"}
    assert len(new) == 10
    before, rows = training.without(task, new)
    assert set(before.train[1]) == set(range(77)) - set(new)
    texts = training.texts_of(task)
    assert [texts[row] for row in rows] == training.texts_of(before)
    assert questions.new_kinds(questions.made_up(4)) == [3], "where nobody asks about that, the last kind is new"


def test_replies_that_are_not_known_are_not_learned(app, made, monkeypatch):
    words, task = made
    targets, training = app["targets"], app["training"]
    own = targets.Setting(task, words, None, 1, (4,))
    monkeypatch.setattr(targets, "setting", lambda: own)
    program = training.untrained(words, None, 0).program
    program = program.replace(weights=dict(program.weights) | {"threshold": np.float32(0.25)})
    monkeypatch.setattr(training, "trained", lambda *_: (program, 0.25))
    examples = targets.learning().examples
    found = examples([[7, 8], [9], [5]], [task.replies[2], "whatever", task.replies[1]])
    assert found["tokens"][:, :3].tolist() == [[7, 8, 0], [5, 0, 0]]
    assert found["kind"].tolist() == [2, 1]
    assert len(examples([[1]], ["whatever"])["kind"]) == 0


class Upstream(http.server.BaseHTTPRequestHandler):
    """A model's server that answers with two words and an end."""

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Host")))
        if self.headers.get("Last-Event-ID") == "ended":
            self.send_response(204)
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for said in ({"text_output": "<b>Hello"}, {"text_output": " there"}, {"text_output": "", "details": {}}):
            self.wfile.write(b"id: ended\n" * ("details" in said) + b"data: " + json.dumps(said).encode() + b"\n\n")

    def log_message(self, *_):
        pass


def test_the_report_has_each_seed_beside_float(app):
    runs = [{"accuracy": each, "accuracy_float": 0.5, "p99_ms": 1234.5} for each in (0.25, 0.75)]
    figures = {**runs[0], "questions": "<made up>", "strangers": "others", "questions_per_s": 10.0}
    page = "".join(app["run"]._page(figures, runs))
    cells = "".join(f'<td class="n">{each}</td>' for each in ("0.25", "0.75", "0.25", "0.5"))
    assert f"<td>accuracy</td>{cells}" in page
    assert "1,234" in page
    assert "&lt;made up&gt;" in page
    assert "accuracy float" not in page


@pytest.fixture
def page(app):
    """The page in front of `Upstream`."""
    with contextlib.ExitStack() as stack:
        upstream = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Upstream))
        upstream.asked = []
        page = stack.enter_context(app["page"].Page(0, upstream.server_address))
        page.asked = upstream.asked
        for server in (upstream, page):
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
        yield page


def asked(page, path, **headers):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", page.server_port, timeout=20)) as connection:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()


def test_the_page_passes_on_one_route_and_only_under_its_own_name(app, page):
    status, headers, body = asked(page, "/")
    assert (status, body[:15]) == (200, b"<!doctype html>")
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    stream = app["page"].STREAM
    status, headers, body = asked(page, f"{stream}?text_input=a+b&max_tokens=5")
    assert (status, headers["Content-Type"], body.count(b"data: ")) == (200, "text/event-stream", 3)
    assert page.asked[0][0] == f"{stream}?text_input=a+b&max_tokens=5"
    assert asked(page, stream, **{"Last-Event-ID": "ended"})[0] == 204
    count = len(page.asked)
    for path in ("/metrics", "/v2/models", f"{stream}/../../../metrics", "/page.py", "/../run.py", f"/x{stream}"):
        assert asked(page, path)[0] == 404
    for host in ("elsewhere.example", f"elsewhere.example:{page.server_port}", "127.0.0.1"):
        assert asked(page, stream, Host=host)[0] == 421
    assert len(page.asked) == count


def test_the_page_answers_requests_that_cannot_be_passed_on(app, page):
    stream, host = app["page"].STREAM.encode(), f"Host: 127.0.0.1:{page.server_port}\r\n".encode()
    for target in (b"caf\xc3\xa9", b"\xff", b"a\x01b"):
        with socket.create_connection(("127.0.0.1", page.server_port), 20) as connection:
            connection.sendall(b"GET " + stream + b"?text_input=" + target + b" HTTP/1.1\r\n" + host + b"\r\n")
            assert b" 400 " in connection.recv(65536)
    assert page.asked == []
    with socket.create_server(("127.0.0.1", 0)) as gone:
        page.upstream = gone.getsockname()
    assert asked(page, app["page"].STREAM)[0] == 502


def test_in_a_browser_a_question_is_answered_word_by_word(browser, page):
    browser.goto(page.url)
    browser.fill("#question", "Where is <i>my</i> card?")
    browser.click("#send")
    browser.wait_for_function("!document.getElementById('send').disabled")
    said = browser.eval_on_selector_all("#talk li", "lines => lines.map(line => [line.className, line.textContent])")
    assert said == [["asked", "Where is <i>my</i> card?"], ["told", "<b>Hello there"]]
    assert browser.said == []
    assert page.asked == [(f"{page.asked[0][0]}", page.asked[0][1])], "it was asked once"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_application_runs_and_its_page_talks(app, tmp_path, monkeypatch, request):
    monkeypatch.setenv("LEPTON_APPS", str(tmp_path))
    figures = app["run"].main(["--quick"])
    assert figures["accuracy"] >= 0.9
    assert figures["no_known_reply"] == 0
    assert figures["weights_bytes"] < figures["weights_bytes_float"] / 3
    assert 0 < figures["first_p99_ms"] <= figures["p99_ms"]
    assert (figures["false_alarm"], figures["alert"]) == (False, True)
    assert figures["round"] == "promoted", figures["round_reason"]
    assert figures["shifted_before"] < 0.5 < figures["shifted_after"]
    assert figures["clean_after"] >= figures["clean_before"] - 0.1
    assert figures["clean_windows_alert"] == 0
    assert json.loads((tmp_path / "summary.json").read_text())["service"]["accuracy"] == figures["accuracy"]
    task = app["questions"].made_up(6)
    with app["page"].running(tmp_path / "service" / "service.lepton") as page:
        threading.Thread(target=page.serve_forever, daemon=True).start()
        told = asked(page, f"{app['page'].STREAM}?text_input=what+about+card+arrival&max_tokens=64")[2].decode()
        pieces = [json.loads(event.partition("data: ")[2]) for event in told.split("\n\n")[:-1]]
        assert "".join(piece["text_output"] for piece in pieces) == task.replies[0]
        chat = {
            "model": "service",
            "messages": [{"role": "user", "content": "what about card arrival"}],
            "max_tokens": 64,
        }
        with contextlib.closing(http.client.HTTPConnection(*page.upstream, timeout=60)) as connection:
            connection.request("POST", "/v1/chat/completions", json.dumps(chat))
            answer = json.loads(connection.getresponse().read())
        assert answer["choices"][0]["message"]["content"] == task.replies[0]
        browser = request.getfixturevalue("browser")  # here, so that all else is tried without one
        browser.goto(page.url)
        browser.fill("#question", "what about card arrival")
        browser.click("#send")
        browser.wait_for_function("!document.getElementById('send').disabled")
        assert browser.eval_on_selector_all("#talk li", "lines => lines.map(line => line.textContent)") == [
            "what about card arrival", task.replies[0],
        ]  # fmt: skip
        assert browser.said == []
        page.shutdown()
