"""Long requests to generate are read in pieces: what comes out is what the JSON library reads at once."""

import json

import hypothesis
import hypothesis.strategies as st
import msgspec
import pytest

from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.protocol import generation, prompts
from lepton_xla.serve.protocol.prompts import MARK, cut_prompts

IDS = st.lists(st.integers(0, 1 << 20), max_size=12)
TEXTS = st.text(st.sampled_from('ab"\\[]{},:\né\u2028𝄞'), max_size=8)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(prompts, "PIECE_BYTES", 8)
    monkeypatch.setattr(prompts, "REST_S", 0.0)
    monkeypatch.setattr(generation, "PIECE_BYTES", 0)


@hypothesis.given(
    prompt=IDS | st.lists(IDS | TEXTS, max_size=5) | TEXTS,
    beside=st.dictionaries(TEXTS, TEXTS | st.integers() | st.none() | st.dictionaries(TEXTS, IDS), max_size=3),
    first=st.booleans(),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
)
@hypothesis.settings(
    max_examples=80, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_pieces_give_what_the_whole_gives(small_pieces, prompt, beside, first, indent, ascii_only):
    document = {"prompt": prompt, **beside} if first else {**beside, "prompt": prompt}
    document |= {"model": "prompt"}
    body = json.dumps(document, indent=indent, ensure_ascii=ascii_only).encode()
    request, fields = generation.read(body, generation.CompletionRequest)
    assert (request.model, request.prompt) == ("prompt", prompt)
    assert {key: fields[key] for key in beside} == beside
    asked = generation.read_asked(body, generation.CompletionRequest)
    assert asked.model == "prompt"
    assert asked.request[0].prompt == prompt


@pytest.mark.parametrize(
    "array",
    [
        "[1,,2]", "[1,2,]", "[,1]", "[1 2]", "[1,2", "[[1],[2,]]", "[[1][2]]", '["a""b"]', '["a",]', "[[[1]]]",
        '[{"a": 1}]', '[1, "a"]', "[1.5]", "[true]", '["\\x"]', '["a]', "[1}",
        "[1, 2, 3, 4, 5, 6, 7, 8,]", "[1, 2, 3, 4, 5, , 7, 8]",
    ],
)  # fmt: skip
def test_what_is_no_array_of_prompts_is_refused(small_pieces, array):
    body = f'{{"model": "m", "prompt": {array}, "n": 1}}'.encode()
    with pytest.raises(HTTPError) as caught:
        generation.read(body, generation.CompletionRequest)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ('{"prompt": [1], "prompt": [2], "model": "m"}', 400),
        (f'{{"prompt": [1], "model": "m", "user": [{"1," * 5000}1]}}', 400),
        (f'{{"prompt": [1], "model": "m", "user": [{'"",' * 20_000}1]}}', 400),
        (f'{{"prompt": [{"[]," * 30_000}[1]], "model": "m"}}', 413),
        (f'{{"prompt": [{"1," * (1 << 20)}1], "model": "m"}}', 413),
        (f'{{"prompt": "{"a" * (2 << 20)}", "model": "m"}}', 400),
        (f'{{"prompt": ["a"{" " * 70_000}, "b"], "model": "m"}}', 400),
        (f'{{"prompt": [1{" " * 140_000}, 2], "model": "m"}}', 400),
        (f'{{"messages": [{f'"{"a" * 900_000}",' * 3}1], "model": "m"}}', 413),
    ],
)
def test_what_would_keep_the_interpreter_is_refused_before_it_is_parsed(monkeypatch, body, status):
    monkeypatch.setattr(generation, "PIECE_BYTES", 0)
    monkeypatch.setattr(generation, "_decoded", lambda *_: pytest.fail("parsed"))
    monkeypatch.setattr(prompts, "REST_S", 0.0)
    with pytest.raises(HTTPError) as caught:
        generation.read(body.encode(), generation.CompletionRequest)
    assert caught.value.status == status


def test_no_client_s_array_is_taken_for_the_mark(small_pieces):
    body = json.dumps({"model": "m", "prompt": MARK, "input_ids": [1]}).encode()
    request, fields = generation.read(body, generation.CompletionRequest)
    assert request.prompt == MARK
    assert (fields["prompt"], fields["input_ids"]) == (MARK, [1])
    assert cut_prompts(body, "messages") == (body, None)
    assert msgspec.json.decode(cut_prompts(body, "prompt")[0])["input_ids"] == [1]


@pytest.mark.parametrize("prompt", [list(range(100_000)), [list(range(1000))] * 100, ["ab" * 1000] * 300])
def test_no_call_into_the_json_library_sees_much(monkeypatch, prompt):
    seen = []

    class Counted:
        def __init__(self, decoder):
            self.decoder = decoder

        def decode(self, text):
            seen.append(len(text))
            return self.decoder.decode(text)

    def decoded(rest, found, kind):
        seen.append(len(rest))
        return original(rest, found, kind)

    original = generation._decoded
    monkeypatch.setattr(generation, "_decoded", decoded)
    monkeypatch.setattr(prompts, "_IDS", Counted(prompts._IDS))
    monkeypatch.setattr(prompts, "_TEXT", Counted(prompts._TEXT))
    body = json.dumps({"model": "m", "prompt": prompt}).encode()
    asked = generation.read_asked(body, generation.CompletionRequest)
    assert asked.request[0].prompt == prompt
    assert max(seen) < prompts.PIECE_BYTES + 100 < len(body) / 4
