"""What a model that generates is asked and answers: its drift, the right replies as feedback, and samples of both."""

import http.client
import json
import math
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from serve_fakes import Ascii, exchange

import lepton_xla as lx
from lepton_xla.generation import Engine
from lepton_xla.generation.rows import PADDED, rows_of
from lepton_xla.profiles import Sketch, profile_of
from lepton_xla.samples import Samples
from lepton_xla.serve import Options, Server
from lepton_xla.serve.models.settings import parse_settings
from lepton_xla.serve.monitor import replies
from lepton_xla.serve.monitor.drift import drifts

VOCABULARY = 128


class Steps:
    """After token t comes t + 1, as likely as 15 to the others' 1 each."""

    slots, capacity, vocabulary, first_position = 2, 32, VOCABULARY, None
    end_tokens, longest_prompt, most_beams = (VOCABULARY - 1,), 16, 2

    def logits(self, token):
        return np.float32(math.log(15)) * np.eye(VOCABULARY, dtype=np.float32)[min(token + 1, VOCABULARY - 1)]

    def prefill(self, tokens, slot):
        return self.logits(tokens[-1])

    def decode(self, tokens, positions):
        return np.stack([self.logits(token) for token in tokens])

    def reset(self):
        pass


class Letters:
    """A model that generates the alphabet."""

    name, version = "letters", "1"

    def __init__(self, tokenizer=None):
        self.inputs = {"tokens": lx.TensorSpec((1, "length"), "int32")}
        self.outputs = {"logits": lx.TensorSpec((1, VOCABULARY), "float32")}
        self.buckets = {"length": (4,)}
        self.stepper = Steps()
        self.generator = Engine(self.stepper, tokenizer)
        random = np.random.default_rng(0)
        prompts = [random.integers(97, 107, 3).tolist() for _ in range(200)]
        known = rows_of(self.generator.generate(prompts, max_tokens=4), self.stepper)
        self.profile = profile_of(*known, PADDED)

    def run(self, sizes, arrays):
        return [np.zeros((1, VOCABULARY), np.float32)]


def post(server, path, body):
    status, _, answer = exchange(server, "POST", path, json.dumps(body).encode())
    return status, json.loads(answer)


def ask(server, prompt, request_id="", **more):
    kind = "text_input" if isinstance(prompt, str) else "input_ids"
    status, answer = post(
        server, "/v2/models/letters/generate", {kind: prompt, "id": request_id, "max_tokens": 4} | more
    )
    assert status == 200, answer
    return answer


def feedback(server, labels, model="letters"):
    entries = [{"id": name, "label": label} for name, label in labels.items()]
    return post(server, f"/v2/models/{model}/feedback", {"feedback": entries})


def until(look):
    for _ in range(400):
        if found := look():
            return found
        time.sleep(0.02)
    raise AssertionError("it did not come about")


def test_features_of_replies_are_those_of_their_rows():
    # Worked by hand: lengths without padding, and the probability 15 / (15 + 127) of each first token.
    generated = Letters().generator.generate([[97], [98, 99, 100]], max_tokens=2)
    inputs, outputs = rows_of(generated, Steps())
    assert inputs["tokens"].tolist() == [[97, *[0] * 15], [98, 99, 100, *[0] * 13]]
    assert outputs["reply"][:, :3].tolist() == [[98, 99, 0], [101, 102, 0]]
    np.testing.assert_allclose(outputs["certainty"], 15 / 142, rtol=1e-5)
    names = [feature.name for feature in profile_of(inputs, outputs, PADDED).features]
    assert names[:3] == ["tokens:length", "tokens:mean", "tokens:projection 0"]
    assert "reply:length" in names


def test_other_words_of_the_same_number_and_mean_drift():
    random = np.random.default_rng(1)
    known, other = random.integers(1, 9, (600, 16)), 2 * random.integers(1, 5, (600, 16)) - random.integers(0, 2)
    profile = profile_of({"tokens": known.astype(np.int32)}, {}, ("tokens",))
    found = {}
    for name, rows in (("same", random.integers(1, 9, (600, 16))), ("other", other)):
        sketch = Sketch(profile)
        sketch.add({"tokens": rows.astype(np.int32)}, {})
        found[name] = {feature: each.shift for feature, each in drifts(profile, sketch.counts).items()}
    assert max(found["same"].values()) < 0
    assert max(each for feature, each in found["other"].items() if "projection" in feature) > 0.5


def test_replies_are_watched_on_every_route(make_server):
    server = make_server(Letters(Ascii()))
    for prompt in ("abc", "ghi"):
        ask(server, prompt)
        post(server, "/v1/completions", {"model": "letters", "prompt": [prompt, prompt], "max_tokens": 4})
        connection = http.client.HTTPConnection(*server.address, timeout=20)
        connection.request("POST", "/v2/models/letters/generate_stream", json.dumps({"text_input": prompt}))
        assert connection.getresponse().read().endswith(b"\n\n")
        connection.close()

    def counted():
        found = server.metrics.of("letters", "1").counts()
        (sketch,) = found["sketch"].values()
        return found if sum(found["request_s"][:-1]) == 6 and sum(sketch["tokens:length"]) == 8 else None

    counts = until(counted)
    (sketch,) = counts["sketch"].values()
    assert {sum(each) for each in sketch.values()} == {8}
    assert sketch["tokens:length"][-1] == 0
    assert server.metrics.all_codes()[200] >= 6


def test_no_reply_waits_for_those_before_to_be_counted_and_what_waits_is_bounded(monkeypatch):
    started, gate, counted = threading.Event(), threading.Event(), []

    def saw(inputs, outputs, rows):
        started.set()
        assert gate.wait(20)
        counted.append((inputs[0][0, :1].tolist(), rows))

    monkeypatch.setattr(replies, "_room", threading.Semaphore(3))
    told = replies.Replies(Steps(), SimpleNamespace(profile=object(), feedback=None, saw=saw), None)
    made = Letters().generator.generate([[97 + number] for number in range(9)], max_tokens=2)
    told.answered("", made[0], "")
    assert started.wait(20)
    for each in made[1:]:
        told.answered("", each, "")
    gate.set()
    replies._counting.submit(lambda: None).result(20)
    assert counted == [([97 + number], 1) for number in range(4)]


def test_the_right_reply_is_feedback(make_server):
    server = make_server(Letters(Ascii()))
    assert ask(server, "abc", "a")["text_output"] == "defg"
    ask(server, "abc", "b")
    assert feedback(server, {"a": "defg", "b": "defh"}) == (200, {"rows": 2})
    assert feedback(server, {"a": "defg"}) == (200, {"rows": 1}), "a retry is answered and not counted"
    counts = server.metrics.of("letters", "1").feedback_counts()
    assert (counts["right"], counts["wrong"], counts["labels"]) == (1, 1, {})
    assert feedback(server, {"a": "other"})[0] == 409
    assert feedback(server, {"nobody": "x"})[0] == 404
    ask(server, "abc", "c")
    for wrong in (3, [1, 2]):
        status, answer = feedback(server, {"c": wrong})
        assert (status, "right reply" in answer["error"]) == (400, True)
    # OpenAI's routes give the id themselves; several prompts have a number each.
    greedy = {"model": "letters", "max_tokens": 2, "temperature": 0}
    _, one = post(server, "/v1/completions", {**greedy, "prompt": "abc"})
    _, two = post(server, "/v1/completions", {**greedy, "prompt": ["abc", "b"]})
    assert feedback(server, {one["id"]: "de", f"{two['id']}/0": "de", f"{two['id']}/1": "cd"}) == (200, {"rows": 3})
    assert server.metrics.of("letters", "1").feedback_counts()["right"] == 4


def test_without_a_tokenizer_the_right_reply_is_its_tokens(make_server):
    server = make_server(Letters())
    ask(server, [97], "a")
    assert feedback(server, {"a": "98 99 100 101"})[0] == 200
    assert server.metrics.of("letters", "1").feedback_counts()["right"] == 1


def test_a_text_is_no_class(make_server):
    program = lx.trace(lambda w, x: x @ w, np.eye(4, dtype=np.float32), {"x": lx.TensorSpec(("batch", 4), "float32")})
    server = make_server(lx.compile(program, {"batch": (1,)}, name="classes").servable())
    body = {"id": "a", "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 0, 0, 0]}]}
    assert post(server, "/v2/models/classes/infer", body)[0] == 200
    status, answer = feedback(server, {"a": "first"}, "classes")
    assert (status, answer["error"]) == (400, "a label is a text; this model's are classes")


def test_prompts_replies_and_right_replies_are_kept(tmp_path):
    server = Server(Letters(Ascii()), Options(port=0, samples=tmp_path)).start()
    try:
        ask(server, "abc", "a")
        ask(server, "no id")
        feedback(server, {"a": "degf"})
        until(lambda: sum(server.metrics.of("letters", "1").samples.values()) == 2)
    finally:
        server.stop()
    (sample,) = Samples(tmp_path, "letters").with_labels()
    assert sample.inputs["tokens"].tolist() == [[97, 98, 99]]
    assert sample.outputs["reply"].tolist() == [[100, 101, 102, 103]]
    assert (sample.id, sample.reply, sample.labels) == ("a", "degf", None)


@pytest.mark.parametrize("rule", ["drop", "hash"])
def test_a_right_reply_is_not_kept_where_replies_are_not(tmp_path, rule):
    from lepton_xla.serve.monitor.sampler import SampleWriter
    from lepton_xla.serve.protocol.signature import signature_of

    model, counts = Letters(Ascii()), {"kept": 0, "left_out": 0, "lost": 0}
    settings = parse_settings(f'[serving.samples]\n{rule} = ["reply"]').serving.samples
    writer = SampleWriter(tmp_path)
    sampler = writer.sampler(replies.signature_of_replies(signature_of(model), model.stepper), settings, counts)
    (made,) = model.generator.generate(["abc"], max_tokens=2)
    replies.Replies(model.stepper, None, sampler).answered("a", made, made.text)
    sampler.labelled({"a": ["secret"]})
    writer.close()
    assert counts == {"kept": 1, "left_out": 0, "lost": 0}
    data = b"".join(each.read_bytes() for each in (tmp_path / "letters").glob("*.samples"))
    assert b"secret" not in data
    (sample,) = Samples(tmp_path, "letters")
    assert sample.reply is None
    assert sample.hashed == ({"reply"} if rule == "hash" else set())
    assert sample.inputs["tokens"].tolist() == [[97, 98, 99]]
