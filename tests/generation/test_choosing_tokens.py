"""Each rule of sampling against a plain computation in float64, and the text of tokens."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lepton_xla.errors import InputError
from lepton_xla.generation.sampling import Chooser, Sampling
from lepton_xla.generation.texts import TextStream

SIZE = 9
logits_of = st.lists(st.floats(-5, 5, width=32), min_size=SIZE, max_size=SIZE).map(lambda v: np.array(v, np.float32))


def expected(logits, sampling, context, generated):
    """The distribution by the definitions, one token at a time."""
    x = [float(value) for value in logits]
    for token in {*context, *generated}:
        x[token] = x[token] / sampling.repetition_penalty if x[token] > 0 else x[token] * sampling.repetition_penalty
    for token in set(generated):
        x[token] -= sampling.presence_penalty + generated.count(token) * sampling.frequency_penalty
    ranked = sorted(range(SIZE), key=lambda token: (-x[token], token))
    kept = ranked[: sampling.top_k] if sampling.top_k else ranked
    shares = {token: np.exp((x[token] - x[ranked[0]]) / sampling.temperature) for token in kept}
    total, running, nucleus = sum(shares.values()), 0.0, {}
    for token in kept:
        nucleus[token] = shares[token]
        running += shares[token]
        assume(abs(running / total - sampling.top_p) > 1e-9 or sampling.top_p == 1)  # rounding would decide
        if running >= sampling.top_p * total * (1 - 1e-12):
            break
    return {token: share / sum(nucleus.values()) for token, share in nucleus.items()}


@given(
    logits_of,
    st.sampled_from([0.5, 1.0, 2.0]),
    st.integers(0, SIZE),
    st.sampled_from([0.3, 0.6, 0.9, 1.0]),
    st.sampled_from([1.0, 1.3]),
    st.sampled_from([0.0, 0.5]),
    st.integers(0, 1 << 32),
)
def test_a_draw_is_the_quantile_of_the_distribution(logits, temperature, top_k, top_p, penalty, other, seed):
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty, presence_penalty=other,
        frequency_penalty=other / 2, seed=seed,
    )  # fmt: skip
    context, generated = [1, 2, 2], []
    chooser, draws = Chooser(sampling, context), np.random.Generator(np.random.Philox(key=seed))
    for _ in range(4):
        shares = expected(logits, sampling, context, generated)
        point, place = draws.random(), 0.0
        token = chooser.choose(logits)
        # Tokens in order of their numbers divide the line from 0 to 1.
        for known in sorted(shares):
            if known == token:
                assert place - 1e-9 <= point <= place + shares[known] + 1e-9
                break
            place += shares[known]
        else:
            raise AssertionError(f"{token} is not among {shares}")
        generated.append(token)


def test_shares_of_many_draws():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    chooser = Chooser(Sampling(temperature=1.0, top_p=0.9, seed=3), ())
    counts = np.bincount([chooser.choose(logits) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(counts, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03)


def test_temperature_zero_takes_the_first_of_the_largest_and_changes_no_logits():
    logits = np.array([1, 3, 3, 0], np.float32)
    assert Chooser(Sampling(repetition_penalty=1.1), [0]).choose(logits) == 1
    assert logits.tolist() == [1, 3, 3, 0]


def test_a_penalty_makes_greedy_choose_another_token():
    chooser = Chooser(Sampling(frequency_penalty=2.0), ())
    assert [chooser.choose(np.array([0.0, 5.0, 4.0])) for _ in range(4)] == [1, 2, 1, 2]


def test_equal_seeds_draw_equal_tokens_and_none_draws_others():
    flat = np.zeros(1000)
    one, two = (Chooser(Sampling(temperature=1.0, seed=5), ()) for _ in range(2))
    assert [one.choose(flat) for _ in range(5)] == [two.choose(flat) for _ in range(5)]
    assert len({Chooser(Sampling(temperature=1.0), ()).choose(flat) for _ in range(20)}) > 10


def test_logits_that_are_no_numbers_are_an_error():
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=0)):
        with pytest.raises(ValueError, match="no numbers"):
            Chooser(sampling, ()).choose(np.full(4, np.nan))


class Utf8:
    """Tokens are bytes."""

    def decode(self, tokens):
        return bytes(tokens).decode("utf-8", "replace")


@given(st.text(min_size=1, max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_told_text_is_the_text_up_to_the_first_stop_text(text, stops):
    stream = TextStream(Utf8(), stops)
    told = "".join(stream.add(byte) for byte in text.encode("utf-8", "replace"))
    told += stream.end()
    whole = text.encode("utf-8", "replace").decode()
    if "\N{REPLACEMENT CHARACTER}" in whole:
        return  # cannot be told from half of a character
    cuts = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    first = min(cuts)[0] if cuts else None
    starts = [start for end, start in cuts if end == first]
    assert told == stream.text == (whole if first is None else whole[: min(starts)])
    assert stream.stopped == bool(cuts)


def test_a_stop_text_is_found_across_tokens_and_never_told():
    stream = TextStream(Utf8(), ["stop"])
    assert [stream.add(byte) for byte in b"a sstopx"] == ["a", " ", "", "s", "", "", "", ""]
    assert stream.stopped
    assert stream.text == "a s"


def test_a_single_stop_text_is_no_tuple_of_letters():
    with pytest.raises(InputError, match="stop is a single text; give a tuple"):
        Sampling(stop="END").check(vocabulary=100)
