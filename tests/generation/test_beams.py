"""Beam search against NumPy searches without cache or slots: on tables, and on small compiled models."""

import itertools

import jax
import numpy as np
import pytest
from generation_models import START, Decoder, Seq2Seq, decoder_weights, seq2seq_weights

import lepton_xla as lx
from lepton_xla.errors import InputError
from lepton_xla.generation import Engine, Sampling
from lepton_xla.generation.beams import Beams

VOCABULARY = 7


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def searched(logits_of, count, limit, ends=(), penalty=1.0):
    """Beam search as a textbook has it: `logits_of(tokens)` reads everything anew, candidates are sorted as a list."""
    live, ended = [((), 0.0)], []
    for length in range(1, limit + 1):
        candidates = []
        for tokens, total in live:
            chances = log_softmax(logits_of(tokens))
            candidates += [(total + chance, (*tokens, token)) for token, chance in enumerate(chances)]
        candidates.sort(key=lambda each: -each[0])
        live = []
        for rank, (total, tokens) in enumerate(candidates):
            if tokens[-1] in ends:
                if rank < count:
                    ended.append((total / length**penalty, tokens[:-1]))
            elif len(live) < count:
                live.append((tokens, total))
        ended = sorted(ended, key=lambda each: -each[0])[:count]
        if len(ended) == count and live[0][1] / length**penalty <= ended[-1][0]:
            break
    else:
        ended += [(total / limit**penalty, tokens) for tokens, total in live]
    return max(ended, key=lambda each: each[0])[1]


class Tables:
    """Logits depend on all tokens that a slot was given, drawn from a seed; a copied slot has those of its source."""

    slots, capacity, vocabulary, first_position = 6, 30, VOCABULARY, None
    end_tokens, longest_prompt, most_beams = (0,), 6, 6

    def __init__(self, seed):
        self.seed, self.cache = seed, {}

    def logits(self, tokens):
        drawn = np.random.default_rng([self.seed, len(tokens), *tokens])
        return drawn.standard_normal(VOCABULARY).astype(np.float32) * 2

    def prefill(self, tokens, slot):
        self.cache[slot] = tuple(tokens)
        return self.logits(self.cache[slot])

    def decode(self, tokens, positions):
        out = np.full((self.slots, VOCABULARY), np.nan, np.float32)
        for slot, (token, position) in enumerate(zip(tokens, positions, strict=True)):
            if position:
                assert position == len(self.cache[slot]), "each token follows the one before"
                self.cache[slot] += (token,)
                out[slot] = self.logits(self.cache[slot])
        return out

    def copy(self, sources):
        self.cache |= {slot: self.cache[source] for slot, source in sources.items()}

    def reset(self):
        self.cache.clear()


@pytest.mark.parametrize("seed", range(12))
def test_the_search_finds_what_a_search_without_slots_finds(seed):
    steps = Tables(seed)
    for count, penalty, limit in ((2, 1.0, 8), (3, 0.0, 6), (6, 2.0, 10), (4, -1.0, 5)):
        expected = searched(lambda tokens: steps.logits((3, 5, *tokens)), count, limit, (0,), penalty)
        sampling = Sampling(num_beams=count, length_penalty=penalty, max_tokens=limit)
        (found,) = Engine(steps).generate([[3, 5]], sampling)
        assert found.tokens == expected
        assert found.finish == ("length" if len(expected) == limit else "stop")


def test_enough_beams_find_the_best_of_all_continuations():
    steps = Tables(11)

    def total(tokens):
        return sum(log_softmax(steps.logits((2, *tokens[:place])))[token] for place, token in enumerate(tokens))

    best = max(itertools.product(range(VOCABULARY), repeat=2), key=total)
    steps.slots = steps.most_beams = VOCABULARY
    engine = Engine(steps)
    assert engine.generate([[2]], num_beams=VOCABULARY, max_tokens=2, ignore_end=True)[0].tokens == best
    greedy = engine.generate([[2]], max_tokens=2, ignore_end=True)[0].tokens
    assert total(greedy) < total(best), "the case tells a search from greedy decoding"


def test_searches_and_others_share_slots_and_leave_them():
    steps = Tables(1)
    alone = [Engine(Tables(1)).generate([[prompt]], num_beams=beams, max_tokens=6)[0].tokens
             for prompt, beams in ((1, 4), (2, 1), (3, 3), (4, 1), (5, 6))]  # fmt: skip
    engine = Engine(steps)
    sequences = [engine.sequence([prompt], Sampling(num_beams=beams, max_tokens=6))
                 for prompt, beams in ((1, 4), (2, 1), (3, 3), (4, 1), (5, 6))]  # fmt: skip
    for sequence in sequences:
        engine.add(sequence)
    while engine.step():
        assert engine.load[1] <= steps.slots
    assert [tuple(each.tokens) for each in sequences] == alone
    given_up = engine.sequence([1], Sampling(num_beams=6, max_tokens=20, ignore_end=True))
    engine.add(given_up)
    engine.step()
    assert engine.load == (0, 6)
    engine.cancel(given_up)
    assert engine.load == (0, 0)
    assert engine.generate([[5]], num_beams=6, max_tokens=6)[0].tokens == alone[4]


def test_fewer_possible_tokens_than_beams_and_none():
    beams = Beams(3, 1.0, limit=3, end_tokens=())
    assert beams.advance(np.array([[0.0, -np.inf]])) == [0]
    assert beams.advance(np.array([[0.0, 0.0]])) == [0, 0]
    assert [beam.tokens for beam in beams.live] == [(0, 0), (0, 1)]
    only_ends = Beams(1, 1.0, limit=3, end_tokens=(0,))
    assert only_ends.advance(np.array([[0.0, -np.inf]])) == []
    assert (only_ends.live, only_ends.best.ended) == ([], True)
    for logits in ([[np.nan, 0.0]] * 2, [[-np.inf, -np.inf]] * 2):
        with pytest.raises(ValueError, match="no numbers"):
            Beams(2, 1.0, 4, ()).advance(np.array(logits[:1]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_beams": 0}, "num_beams is 0; it must be at least 1"),
        ({"num_beams": 7}, "num_beams is 7; the model has 6 slots, one for each beam"),
        ({"num_beams": 2, "temperature": 0.5}, "temperature does not go with num_beams = 2"),
        ({"num_beams": 2, "stop": ("x",)}, "stop does not go with num_beams = 2"),
        ({"num_beams": 2, "length_penalty": float("nan")}, "length_penalty is nan; it must be -10 to 10"),
        ({"length_penalty": 2.0}, "length_penalty is 2.0 without beam search: give num_beams too"),
    ],
)
def test_what_cannot_be_searched_for_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Engine(Tables(0)).generate([[1]], **fields)


def test_artifacts_that_do_not_say_which_axes_are_slots_generate_without_beams():
    steps = Tables(0)
    steps.most_beams = 1
    with pytest.raises(InputError, match="compile it again"):
        Engine(steps).generate([[1]], num_beams=2)
    assert Engine(steps).generate([[1]], max_tokens=1)[0].tokens


@pytest.mark.parametrize("kind", ["scanned", "seq2seq"])
def test_compiled_models_are_searched_as_in_numpy(kind, tmp_path):
    """The axes of slots differ: behind that of layers, and first."""
    if kind == "scanned":
        model, weights, more = Decoder(scanned=True), decoder_weights(), {}
    else:
        model, weights, more = Seq2Seq(), seq2seq_weights(), {"encoder_decoder": True}
    generator = lx.Generator(model.init_cache, model.prefill, model.decode, weights, slots=4, capacity=24, **more)
    lx.compile(generator.program, {"length": (4,)}, name="searched").save(tmp_path / "searched.lepton")
    engine = lx.load(tmp_path / "searched.lepton").generator
    read = jax.jit(model.prefill if kind == "scanned" else model.whole)

    def logits_of(prompt, tokens):
        if kind == "scanned":
            padded = np.zeros((1, 16), "int32")
            padded[0, : len(prompt) + len(tokens)] = [*prompt, *tokens]
            return read(weights, padded, np.array([len(prompt) + len(tokens)], "int32"))[0][0]
        told, said = np.zeros((1, 16), "int32"), np.zeros((1, 16), "int32")
        told[0, : len(prompt)], said[0, : 1 + len(tokens)] = prompt, [START, *tokens]
        return read(weights, told, np.array([len(prompt)], "int32"), said)[0, len(tokens)]

    for prompt, count, end in (([5, 3, 9], 4, 2), ([1, 20], 3, 7)):
        expected = searched(lambda tokens, prompt=prompt: logits_of(prompt, tokens), count, 8, (end,))
        found = engine.generate([prompt], num_beams=count, max_tokens=8, end_tokens=(end,))
        assert found[0].tokens == expected
