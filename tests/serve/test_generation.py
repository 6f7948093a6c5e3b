"""Generation through a running server: Triton's, KServe's and OpenAI's forms, streams, clients that go away."""

import concurrent.futures
import gzip
import http.client
import json
import socket
import struct
import threading
import time

import numpy as np
import pytest
from serve_fakes import Ascii, counted, exchange, raw_request

from lepton_xla.generation import Engine
from lepton_xla.program import TensorSpec
from lepton_xla.serve.app import generation as pages
from lepton_xla.serve.protocol import generation

VOCABULARY = 128


class Steps:
    """After token t comes t + 1, wherever it is; the last one ends a sequence. `gate` holds every step back."""

    slots, capacity, vocabulary, first_position = 2, 64, VOCABULARY, None
    end_tokens, longest_prompt, most_beams = (VOCABULARY - 1,), 32, 2

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.decoded = []
        self.fails = False

    def logits(self, token):
        return np.eye(VOCABULARY, dtype=np.float32)[min(token + 1, VOCABULARY - 1)]

    def prefill(self, tokens, slot):
        return self.logits(tokens[-1])

    def decode(self, tokens, positions):
        if self.fails:
            raise RuntimeError("/secret/path")
        assert self.gate.wait(20)
        time.sleep(1e-3)
        self.decoded.append(sum(map(bool, positions)))
        return np.stack([self.logits(token) for token in tokens])

    def copy(self, sources):
        """It keeps nothing."""

    def reset(self):
        pass


class Letters:
    """A served model that generates the alphabet."""

    name, version = "letters", "1"

    def __init__(self, tokenizer):
        self.inputs = {"tokens": TensorSpec((1, "length"), "int32")}
        self.outputs = {"logits": TensorSpec((1, VOCABULARY), "float32")}
        self.buckets = {"length": (4,)}
        self.stepper = Steps()
        self.gate = self.stepper.gate
        self.generator = Engine(self.stepper, tokenizer)

    def run(self, sizes, arrays):
        return [np.zeros((1, VOCABULARY), np.float32)]


@pytest.fixture
def letters():
    return Letters(Ascii())


@pytest.fixture
def served(make_server, letters):
    return make_server(letters)


GENERATE = "/v2/models/letters/generate"


def post(server, path, body, headers=None):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, _, answer = exchange(server, "POST", path, data, headers)
    return status, json.loads(answer)


def stream(server, path, body=None, method="POST"):
    """Events of a stream as they are told, by a client of the standard library."""
    connection = http.client.HTTPConnection(*server.address, timeout=20)
    connection.request(method, path, None if body is None else json.dumps(body))
    answer = connection.getresponse()
    assert answer.status == 200
    assert answer.getheader("content-type") == "text/event-stream"
    events = answer.read().decode().split("\n\n")
    assert events.pop() == ""
    connection.close()
    return [each.removeprefix("data: ") for each in events]


def until(holds):
    for _ in range(2000):
        if holds():
            return
        time.sleep(5e-3)
    raise AssertionError("it did not come about")


def test_generate_in_triton_s_form(served):
    status, body = post(served, GENERATE, {"text_input": "ab", "parameters": {"max_tokens": 3}, "id": "7"})
    assert status == 200, body
    assert body == {
        "model_name": "letters", "model_version": "1", "id": "7", "text_output": "cde", "token_ids": [99, 100, 101],
        "details": {"finish_reason": "length", "generated_tokens": 3},
    }  # fmt: skip
    # As Triton's own examples send it: parameters beside the text.
    assert (
        post(served, GENERATE, {"text_input": "ab", "max_tokens": 2, "bad_words": "", "stop_words": ""})[1][
            "text_output"
        ]
        == "cd"
    )


def test_a_search_is_told_at_its_end_and_leaves_its_slots(served, letters):
    request = {"text_input": "a", "max_tokens": 3, "beam_width": 2, "length_penalty": 2.0}
    assert post(served, GENERATE, request)[1]["text_output"] == "bcd"
    events = [json.loads(each) for each in stream(served, f"{GENERATE}_stream", request)]
    assert [each["text_output"] for each in events] == ["b", "c", "d", ""]
    assert letters.generator.load == (0, 0)
    status, body = post(served, GENERATE, {"text_input": "a", "num_beams": 3})
    assert (status, body["error"]) == (400, "num_beams is 3; the model has 2 slots, one for each beam")
    made = post(
        served,
        "/v1/completions",
        {"model": "letters", "prompt": "a", "max_tokens": 3, "num_beams": 2, "temperature": 0},
    )
    assert made[1]["choices"][0]["text"] == "bcd"


def test_the_end_token_ends_it(served):
    _, body = post(served, GENERATE, {"text_input": "|", "parameters": {"max_tokens": 20}})
    assert (body["text_output"], body["details"]["finish_reason"]) == ("}~", "stop")


def test_generate_stream_tells_each_token(served):
    events = [json.loads(each) for each in stream(served, f"{GENERATE}_stream", {"text_input": "a", "max_tokens": 4})]
    assert [each["text_output"] for each in events] == ["b", "c", "d", "e", ""]
    assert events[-1]["details"]["finish_reason"] == "length"


def test_an_event_source_gets_the_same_and_does_not_ask_again(served):
    path = f"{GENERATE}_stream?text_input=a&max_tokens=20&stop=ef&stop=xyz"
    *events, last = stream(served, path, method="GET")
    assert last.startswith("id: ended\ndata: ")
    told = [json.loads(each) for each in events]
    assert "".join(each["text_output"] for each in told) == "bcd"
    assert json.loads(last.partition("data: ")[2])["details"]["finish_reason"] == "stop"
    connection = http.client.HTTPConnection(*served.address, timeout=20)
    for method, headers, status in (("GET", {"Last-Event-ID": "ended"}, 204), ("HEAD", {}, 200)):
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (status, b"")
    connection.close()


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "either text_input or input_ids"),
        ("text_input=", "the prompt is empty"),
        ("text_input=%ff", "not UTF-8"),
        ("text_input=a&text_input=b", "has 'text_input' 2 times"),
        ("input_ids=1,x", "not numbers"),
        ("input_ids=1,128", "is not one of the 128 tokens"),
        ("text_input=a&temperature=hot", "temperature"),
        ("text_input=a&wishes=3", "unknown parameter 'wishes'"),
        ("text_input=a&" + "&".join(f"a{n}=1" for n in range(80)), "too many fields"),
    ],
)
def test_bad_queries_are_refused_before_any_work(served, letters, query, message):
    status, _, body = exchange(served, "GET", f"{GENERATE}_stream?{query}")
    assert (status, letters.stepper.decoded) == (400, [])
    assert message in json.loads(body)["error"]


@pytest.mark.slow
def test_in_a_browser_an_event_source_reads_one_stream_and_ends(browser, served, letters):
    browser.goto("http://{}:{}/ui".format(*served.address[:2]))
    said = browser.evaluate(
        """path => new Promise(resolve => {
            const source = new EventSource(path), texts = [];
            source.onmessage = event => texts.push(JSON.parse(event.data).text_output);
            source.onerror = () => { if (source.readyState === EventSource.CLOSED) resolve(texts); };
        })""",
        f"{GENERATE}_stream?text_input=a&max_tokens=4",
    )
    assert said == ["b", "c", "d", "e", ""]
    assert len(letters.stepper.decoded) == 3, "it was generated once"


def test_a_stop_text_across_tokens_is_never_told(served):
    body = {"text_input": "a", "parameters": {"max_tokens": 20, "stop": ["ef"]}}
    events = [json.loads(each) for each in stream(served, f"{GENERATE}_stream", body)]
    assert "".join(each["text_output"] for each in events) == "bcd"
    assert events[-1]["details"]["finish_reason"] == "stop"


def test_completions_in_openai_s_form(served):
    request = {"model": "letters", "prompt": ["ab", [65]], "max_tokens": 2, "temperature": 0, "n": 1, "user": "me"}
    status, body = post(served, "/v1/completions", request)
    assert status == 200
    assert body["object"] == "text_completion"
    assert [(each["text"], each["index"], each["finish_reason"]) for each in body["choices"]] == [
        ("cd", 0, "length"), ("BC", 1, "length"),
    ]  # fmt: skip
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert json.loads(exchange(served, "GET", "/v1/models")[2])["data"][0]["id"] == "letters"


def test_chat_in_openai_s_form_whole_and_streamed(served):
    request = {"model": "letters", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "temperature": 0}
    status, body = post(served, "/v1/chat/completions", request)
    assert status == 200
    assert body["choices"][0]["message"] == {"role": "assistant", "content": ";<="}  # after the colon of "assistant:"
    more = {"stream": True, "stream_options": {"include_usage": True}}
    *events, usage, done = stream(served, "/v1/chat/completions", request | more)
    deltas = [json.loads(each)["choices"][0]["delta"] for each in events]
    assert "".join(each["content"] for each in deltas) == ";<="
    assert [each.get("role") for each in deltas] == ["assistant", None, None, None]
    assert json.loads(usage)["usage"]["completion_tokens"] == 3
    assert done == "[DONE]"


def test_what_is_null_or_given_twice_alike_asks_for_nothing_more_and_a_message_may_have_parts(served):
    parts = [{"type": "text", "text": text} for text in "xy"]
    alike = {"max_tokens": 2, "max_completion_tokens": 2, "stop": ["q"], "stop_words": "q"}
    request = {"model": "letters", "messages": [{"role": "user", "content": parts}], "temperature": 0}
    status, body = post(served, "/v1/chat/completions", request | alike | {"stream": None, "n": None})
    assert (status, body["choices"][0]["message"]["content"]) == (200, ";<")
    assert body["usage"]["prompt_tokens"] == len("user: x\ny\nassistant:")


def test_a_client_that_reads_slowly_holds_up_nobody(served, letters):
    with socket.create_connection(served.address, 10) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 10)
        slow.sendall(raw_request("POST", f"{GENERATE}_stream", b'{"text_input": "!", "max_tokens": 60}'))
        assert slow.recv(15) == b"HTTP/1.1 200 OK"
        for _ in range(3):
            assert post(served, GENERATE, {"text_input": "a", "max_tokens": 3})[1]["text_output"] == "bcd"
        until(lambda: letters.generator.load == (0, 0))


def test_token_ids_in_and_out_without_a_tokenizer(make_server):
    server = make_server(Letters(None))
    assert post(server, GENERATE, {"input_ids": [5], "max_tokens": 3})[1]["token_ids"] == [6, 7, 8]
    body = post(server, "/v1/completions", {"model": "letters", "prompt": [5], "max_tokens": 2, "temperature": 0})[1]
    assert body["choices"][0]["token_ids"] == [6, 7]
    assert post(server, GENERATE, {"text_input": "a"})[0] == 400


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (GENERATE, b'{"text_input": "\xff"}', 400, "not as it should be"),
        (GENERATE, b"{", 400, "not as it should be"),
        (GENERATE, b'{"text_input": "\\ud800"}', 400, ""),
        (GENERATE, {"text_input": ""}, 400, "the prompt is empty"),
        (GENERATE, {"text_input": "a" * 33}, 400, "at most 32"),
        (GENERATE, {"input_ids": [VOCABULARY]}, 400, "is not one of the 128 tokens"),
        (GENERATE, {"input_ids": [1.5]}, 400, "not as it should be"),
        (GENERATE, {"text_input": "a", "input_ids": [1]}, 400, "either text_input or input_ids"),
        (GENERATE, {"text_input": "a", "max_tokens": 65}, 400, "room for 64"),
        (GENERATE, {"text_input": "a", "temperature": -1}, 400, "temperature is -1"),
        (GENERATE, {"text_input": "a", "seed": 1 << 64}, 400, "seed"),
        (GENERATE, {"text_input": "a", "seed": -1}, 400, "seed is -1"),
        (GENERATE, {"text_input": "a", "top_p": "x"}, 400, "top_p"),
        (GENERATE, {"text_input": "a", "wishes": 3}, 400, "unknown parameter 'wishes'"),
        (GENERATE, {"text_input": "a", "n": 2}, 400, "n = 2 is not supported"),
        (GENERATE, {"text_input": "a", "id": "x" * 513}, 400, "the id has 513 characters; it may have 512"),
        (GENERATE, {"input_ids": [1 << 63]}, 400, "token 9223372036854775808 of the prompt is not one of"),
        (GENERATE, b'{"input_ids": [1' + b"0" * 5000 + b"]}", 400, "not as it should be"),
        (GENERATE, b'{"input_ids": [' + b"1," * 40_000 + b"18446744073709551616]}", 400, "has 40001 tokens"),
        (GENERATE, b'{"text_input": "a", "parameters": {"x": ' + b"[" * 5000 + b"]" * 5000 + b"}}", 400, "recursion"),
        (GENERATE, {"text_input": "a", "stop": ["", "c"]}, 400, "a stop text has 0 characters"),
        (GENERATE, {"text_input": "a", "max_tokens": 2, "max_new_tokens": 3}, 400, "have different values"),
        ("/v1/completions", {"model": "letters", "prompt": "a", "n": True}, 400, "n = True is not supported"),
        ("/v1/completions", {"model": "letters", "prompt": "a", "best_of": 3}, 400, "best_of = 3 is not supported"),
        # Of the tokens themselves: these are not told, so it is not the same as false.
        ("/v1/completions", {"model": "letters", "prompt": "a", "logprobs": 0}, 400, "logprobs = 0 is not supported"),
        ("/v1/completions", {"model": "letters", "prompt": ["a", 5]}, 400, "the prompt is a int"),
        ("/v1/completions", {"model": "letters", "prompt": ["a", "b", ""]}, 400, "the prompt is empty"),
        (
            "/v1/chat/completions",
            {"model": "letters", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "image_url",
        ),
        (GENERATE, {"text_input": "a" * 200_000}, 413, "are enough"),
        ("/v1/completions", {"model": "nobody", "prompt": "a"}, 404, ""),
        ("/v1/completions", {"prompt": "a"}, 400, "model"),
        ("/v1/chat/completions", {"model": "letters", "messages": []}, 400, "messages is empty"),
        # Sizes are checked first: as decoded requests these would be refused with 400.
        ("/v1/chat/completions", {"model": "letters", "messages": "a" * 200_000}, 413, "are enough"),
        ("/v1/completions", {"model": "letters", "prompt": {"a": "a" * (8 << 20)}}, 413, "too long"),
        ("/v2/models/nobody/generate", {"text_input": "a"}, 404, ""),
    ],
)
def test_bad_requests_are_refused_before_any_work(served, letters, path, body, status, message):
    found, answer = post(served, path, body)
    assert found == status
    told = answer["error"]["message"] if path.startswith("/v1") else answer["error"]
    assert message in told
    assert letters.stepper.decoded == []


@pytest.mark.parametrize("path", [GENERATE, f"{GENERATE}_stream", "/v1/completions", "/v1/chat/completions"])
def test_compressed_bodies_are_refused_as_such(served, path):
    status, body = post(served, path, gzip.compress(b'{"model": "letters"}'), {"Content-Encoding": "gzip"})
    assert status == 415
    assert "without Content-Encoding" in json.dumps(body)


def test_a_client_that_goes_away_frees_its_slot_within_a_step(served, letters):
    letters.gate.clear()
    socks = []
    for _ in range(2):
        sock = socket.create_connection(served.address, 10)
        sock.sendall(raw_request("POST", f"{GENERATE}_stream", b'{"text_input": "!", "max_tokens": 60}'))
        socks.append(sock)
    until(lambda: letters.generator.load[1] >= 1)
    letters.gate.set()
    until(lambda: letters.stepper.decoded[-1:] == [2])
    for sock in socks:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    until(lambda: letters.generator.load == (0, 0))
    assert len(letters.stepper.decoded) < 58, "they were given up, and not generated to their ends"
    until(lambda: counted(served).generations_cancelled == 2)
    assert post(served, GENERATE, {"text_input": "a", "max_tokens": 2})[1]["text_output"] == "bc"


def test_more_clients_than_slots_all_get_their_own_text(served, letters):
    def ask(index):
        letter = chr(65 + index)
        return post(served, GENERATE, {"text_input": letter, "max_tokens": 10})[1]["text_output"]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    assert found == ["".join(chr(66 + index + n) for n in range(10)) for index in range(8)]
    assert max(letters.stepper.decoded) == 2


@pytest.mark.parametrize("path", [GENERATE, "/v1/completions"])
def test_tens_of_thousands_of_token_ids_are_a_prompt(served, letters, path):
    letters.stepper.longest_prompt, letters.stepper.capacity = 40_000, 50_000
    ids, rest = [1] * 39_999 + [65], {"max_tokens": 2, "temperature": 0}
    body = {"input_ids": ids} if path == GENERATE else {"model": "letters", "prompt": ids}
    status, answer = post(served, path, body | rest)
    assert status == 200
    assert (answer if path == GENERATE else answer["choices"][0])["token_ids"] == [66, 67]


@pytest.mark.parametrize("text", ["ab", "abcdef"])
def test_long_prompts_become_tokens_beside_the_event_loop(make_server, monkeypatch, text):
    threads = []

    class Slow(Ascii):
        def encode(self, text):
            threads.append(threading.current_thread().name)
            return super().encode(text)

    monkeypatch.setattr(pages, "_AT_ONCE", 4)
    server = make_server(Letters(Slow()))
    body = post(server, GENERATE, {"text_input": text, "max_tokens": 1})[1]
    assert body["text_output"] == chr(ord(text[-1]) + 1)
    asked = {"model": "letters", "prompt": [text, text], "max_tokens": 1, "temperature": 0}
    assert [each["text"] for each in post(server, "/v1/completions", asked)[1]["choices"]] == [body["text_output"]] * 2
    events = stream(server, f"{GENERATE}_stream", {"text_input": text, "max_tokens": 1})
    assert json.loads(events[0])["text_output"] == body["text_output"]
    assert {each == "lepton-serve" for each in threads} == {len(text) <= 2}
    # Refused, in the words of either form, on the same way.
    assert post(server, GENERATE, {"text_input": text * 20, "max_tokens": 1})[0] == 400
    status, told = post(server, "/v1/completions", asked | {"prompt": text * 20})
    assert (status, told["error"]["type"]) == (400, "invalid_request_error")
    assert "at most 32" in told["error"]["message"]


def test_others_are_answered_while_a_long_body_is_read(make_server, letters, monkeypatch):
    reading, go_on, threads = threading.Event(), threading.Event(), []
    original = generation._cut

    def slow(body, kind):
        if len(body) > 1 << 16:
            threads.append(threading.current_thread().name)
            reading.set()
            assert go_on.wait(10)
        return original(body, kind)

    monkeypatch.setattr(generation, "_cut", slow)
    server = make_server(letters)
    few = {"max_tokens": 1, "temperature": 0, "user": "x" * (1 << 16)}
    asked = [
        ("/v1/completions", {"model": "letters", "prompt": [[1, 2], [3]]} | few),
        ("/v1/chat/completions", {"model": "letters", "messages": [{"role": "user", "content": "a"}]} | few),
        (GENERATE, {"input_ids": [1, 2]} | few),
    ]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(post, server, *each) for each in asked]
        assert reading.wait(10)
        assert post(server, GENERATE, {"text_input": "a", "max_tokens": 1})[0] == 200
        go_on.set()
        answers = [each.result() for each in waiting]
    assert [status for status, _ in answers] == [200] * 3
    assert [each["token_ids"] for each in answers[0][1]["choices"]] == [[3], [4]]
    assert answers[2][1]["token_ids"] == [3]
    assert "lepton-serve" not in threads
    assert len(threads) == 3


def test_too_many_prompts_are_refused(make_server, letters):
    from lepton_xla.serve import Limits

    server = make_server(letters, limits=Limits(max_waiting_prompts=1))
    letters.gate.clear()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(post, server, GENERATE, {"text_input": "a", "max_tokens": 3}) for _ in range(3)]
        until(lambda: letters.generator.load[1] == 1)
        time.sleep(0.3)  # for the two others, which the thread has not seen yet
        status, body = post(server, GENERATE, {"text_input": "a", "max_tokens": 3})
        letters.gate.set()
        assert [each.result()[0] for each in waiting] == [200] * 3
    assert status == 503
    assert "more than 1 prompts wait" in body["error"]


def test_what_fails_is_told_without_its_text_and_the_next_requests_are_answered(served, letters):
    letters.stepper.fails = True
    assert post(served, GENERATE, {"text_input": "a"}) == (500, {"error": "generation failed"})
    events = stream(served, f"{GENERATE}_stream", {"text_input": "a"})
    assert json.loads(events[-1]) == {"error": "generation failed"}
    letters.stepper.fails = False
    assert post(served, GENERATE, {"text_input": "a", "max_tokens": 1})[1]["text_output"] == "b"


def test_metrics_tell_times_and_tokens(served):
    post(served, GENERATE, {"text_input": "abc", "max_tokens": 5})
    text = exchange(served, "GET", "/metrics")[2].decode()
    for line in (
        'lepton_generated_tokens_total{model="letters",version="1"} 5.0',
        'lepton_prompt_tokens_total{model="letters",version="1"} 3.0',
        'lepton_first_token_seconds_count{model="letters",version="1"} 1.0',
        'lepton_next_token_seconds_count{model="letters",version="1"} 4.0',
    ):
        assert line in text


def test_a_model_that_does_not_generate_says_so(server):
    status, body = post(server, "/v2/models/affine/generate", {"text_input": "a"})
    assert (status, body["error"]) == (400, "model 'affine' does not generate tokens; use infer")


def test_requests_after_a_stream_on_the_same_connection_are_answered_in_order(served):
    with socket.create_connection(served.address, 10) as sock:
        body = b'{"text_input": "a", "max_tokens": 3}'
        sock.sendall(
            raw_request("POST", f"{GENERATE}_stream", body)
            + raw_request("GET", "/v2/health/live", headers={"Connection": "close"})
        )
        data = b""
        while part := sock.recv(65536):
            data += part
    first, _, second = data.partition(b"0\r\n\r\n")
    assert first.count(b"data: ") == 4
    assert second.startswith(b"HTTP/1.1 200")
    assert second.endswith(b'{"live":true}')


def test_a_stream_needs_chunks(served):
    with socket.create_connection(served.address, 10) as sock:
        sock.sendall(raw_request("POST", f"{GENERATE}_stream", b'{"text_input": "a"}', version="1.0"))
        assert sock.recv(65536).startswith(b"HTTP/1.1 505")


def test_the_load_generator_measures_streams(served):
    from click.testing import CliRunner

    from lepton_xla.cli import main

    url = "http://{}:{}".format(*served.address[:2])
    call = [
        "load",
        url,
        "--generate",
        "5",
        "--connections",
        "1,3",
        "--seconds",
        "0.5",
        "--warmup",
        "0.1",
        "--size",
        "4",
    ]
    done = CliRunner().invoke(main, [*call, "--json"])
    assert done.exit_code == 0, done.output
    one, three = json.loads(done.stdout)["runs"]
    for run in (one, three):
        assert run["requests"] >= 1
        assert not run["errors"]
        assert run["tokens_per_s"] >= 5 * (run["requests"] - 3)
        assert 0 <= run["next_token_s"]["p50"] <= run["next_token_s"]["p99"] < 2
        assert run["first_token_s"]["p50"] > 0
    assert "tokens/s" in CliRunner().invoke(main, call).stdout
    began = time.monotonic()
    refused = CliRunner().invoke(main, [*call[:3], "100000", *call[4:], "--seconds", "60"])
    assert (refused.exit_code, refused.stderr.count("HTTP 400")) == (2, 1)
    assert "the first 3 requests were all refused: " in refused.stderr
    assert "100000" in refused.stderr, "the server's reason"
    assert time.monotonic() - began < 30, "it ends before its time"
    assert CliRunner().invoke(main, [*call, "--rate", "3"]).exit_code == 2


def test_prompts_of_a_file_are_sent_in_turn_and_end_by_themselves(served, letters, tmp_path):
    from lepton_xla.serve.client.endpoint import endpoint
    from lepton_xla.serve.load.streams import stream as load

    read, seen = letters.stepper.prefill, []
    letters.stepper.prefill = lambda tokens, slot: seen.append(bytes(tokens)) or read(tokens, slot)
    found = load(
        endpoint("http://{}:{}".format(*served.address[:2])), "letters", connections=1, seconds=0.3, warmup_s=0,
        timeout_s=9, prompt=0, tokens=50, texts=["ab{", "z"],
    )  # fmt: skip
    assert seen[:4] == [b"ab{", b"z"] * 2
    # From { three letters are left, from z four.
    assert 3 * (len(seen) - 2) <= found.tokens <= 4 * len(seen)
