"""A tokenizer of Hugging Face's `tokenizers`, carried by an artifact as data."""

import jax
import jax.numpy as jnp
import pytest

import lepton_xla as lx
from lepton_xla.conversion.huggingface import HuggingFace
from lepton_xla.generation.texts import TextStream

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def data():
    """One token for each byte."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return made.to_str().encode()


@pytest.mark.parametrize("text", ["plain words", "Grüße, 世界 🎈", " two  blanks ", "\n"])
def test_text_comes_back_and_is_told_whole_characters_at_a_time(data, text):
    tokenizer = HuggingFace(data)
    tokens = tokenizer.encode(text)
    assert len(tokens) == len(text.encode())
    assert tokenizer.decode(tokens) == text
    stream = TextStream(tokenizer)
    told = [stream.add(token) for token in tokens]
    assert "".join(told) + stream.end() == text
    assert [piece for piece in told if piece] == list(text)


def test_a_tokenizer_that_is_none_and_half_a_character_are_refused(data):
    with pytest.raises(lx.ArtifactError, match="cannot be read"):
        HuggingFace(b"{}")
    with pytest.raises(lx.InputError, match="not valid Unicode"):
        HuggingFace(data).encode("\ud800")
    words = HuggingFace(tokenizers.Tokenizer(tokenizers.models.WordLevel({"known": 0})).to_str().encode(), 4)
    assert words.encode("known") == [0]
    for call, text in ((words.encode, "other"), (words.encode_all, ["known", "other"])):
        with pytest.raises(lx.InputError, match="no tokens for"):
            call(text)


def test_an_artifact_takes_and_gives_text(data, tmp_path):
    successor = jnp.roll(jnp.eye(256), 1, axis=1)  # after token t comes t + 1

    def step(w, cache, token, position):
        return jax.nn.one_hot(token, 256) @ w, cache

    def prefill(w, tokens, length):
        last = jnp.take_along_axis(tokens, (length - 1)[:, None], axis=1)[:, 0]
        return step(w, jnp.zeros(1, "int32"), last, length)

    generator = lx.Generator(
        lambda w, B, S: jnp.zeros(B, "int32"), prefill, step, successor, slots=2, capacity=32, tokenizer=data
    )
    lx.compile(generator.program, {"length": (8,)}).save(tmp_path / "letters.lepton")
    lx.verify(tmp_path / "letters.lepton")
    model = lx.load(tmp_path / "letters.lepton").generator
    found = model.generate(["say a", [64]], max_tokens=4)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    first = letters.index("a")
    assert found[0].text == HuggingFace(data).decode(range(first + 1, first + 5)) == "bcde"
    stopped = model.generate(["say a"], max_tokens=20, stop=("fg",))[0]
    assert (stopped.text, stopped.finish) == ("bcde", "stop")
