"""OpenAI's Python client against a running server, unmodified. Skipped where it is not installed."""

import pytest
from test_generation import Ascii, Letters

openai = pytest.importorskip("openai")


@pytest.fixture
def client(make_server):
    host, port = make_server(Letters(Ascii())).address[:2]
    with openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models_and_completions(client):
    assert [each.id for each in client.models.list()] == ["letters"]
    made = client.completions.create(model="letters", prompt="a", max_tokens=3, temperature=0, seed=1, stop=["z"])
    assert (made.choices[0].text, made.choices[0].finish_reason, made.usage.total_tokens) == ("bcd", "length", 4)
    pieces = client.completions.create(model="letters", prompt="a", max_tokens=3, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == "bcd"


def test_chats(client):
    messages = [{"role": "user", "content": "x"}]
    made = client.chat.completions.create(model="letters", messages=messages, max_completion_tokens=3, temperature=0)
    assert made.choices[0].message.content == ";<="
    pieces = client.chat.completions.create(
        model="letters", messages=messages, max_tokens=3, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    pieces = list(pieces)
    assert "".join(piece.choices[0].delta.content for piece in pieces if piece.choices) == ";<="
    assert pieces[-1].usage.completion_tokens == 3


def test_errors(client):
    with pytest.raises(openai.BadRequestError, match="n = 2 is not supported"):
        client.completions.create(model="letters", prompt="a", n=2)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt="a")
