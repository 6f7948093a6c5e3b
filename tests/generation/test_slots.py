"""Sequences that come and go in any order get the same tokens as alone, and no slot is lost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_xla.errors import ExecutionError, InputError
from lepton_xla.generation import Engine, Sampling
from lepton_xla.generation.slots import Slots, sequence_of

VOCABULARY = 13


class Hashing:
    """A model whose logits depend on all tokens that its slot was given, and on their positions."""

    slots, capacity, vocabulary, first_position = 3, 20, VOCABULARY, None
    end_tokens, longest_prompt, most_beams = (0,), 6, 3

    def __init__(self):
        self.cache, self.fails, self.resets = {}, 0, 0

    def logits(self, slot):
        return np.random.default_rng(self.cache[slot]).standard_normal(VOCABULARY).astype(np.float32) * 3

    def prefill(self, tokens, slot):
        self.cache[slot] = list(tokens)
        return self.logits(slot)

    def decode(self, tokens, positions):
        if self.fails:
            self.fails -= 1
            raise ExecutionError("no memory")
        out = np.full((self.slots, VOCABULARY), np.nan, np.float32)
        for slot, (token, position) in enumerate(zip(tokens, positions, strict=True)):
            if position and slot in self.cache:
                assert position == len(self.cache[slot]), "each token follows the one before"
                self.cache[slot].append(token)
                out[slot] = self.logits(slot)
        return out

    def reset(self):
        self.resets += 1
        self.cache.clear()


prompts = st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=6)
samplings = st.builds(
    Sampling,
    max_tokens=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 1, 3]),
    top_p=st.sampled_from([0.4, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    seed=st.integers(0, 99),
)


def alone(prompt, sampling):
    (found,) = Engine(Hashing()).generate([prompt], sampling)
    return found.tokens, found.finish


@settings(max_examples=60)
@given(
    st.lists(st.tuples(prompts, samplings), min_size=1, max_size=7),
    st.lists(st.integers(-1, 6), max_size=40),
    st.sets(st.integers(0, 6), max_size=2),
)
def test_every_order_of_arrivals_and_ends_gives_the_tokens_of_each_alone(requests, order, given_up):
    slots, coming = Slots(steps := Hashing()), list(enumerate(requests))
    begun, seen = {}, []
    for event in order:  # -1: another one comes; else a step, which may be followed by somebody going away
        if event < 0 and coming:
            index, (prompt, sampling) = coming.pop(0)
            begun[index] = sequence_of(steps, None, prompt, sampling)
            slots.add(begun[index])
        else:
            slots.step()
            if event in given_up and event in begun:
                slots.cancel(begun[event])
                assert begun[event].finish
                assert begun[event] not in slots.running.values()
        assert len(slots.running) <= steps.slots
    for index, (prompt, sampling) in coming:
        begun[index] = sequence_of(steps, None, prompt, sampling)
        slots.add(begun[index])
    while not slots.idle:
        slots.step()
    for index, sequence in begun.items():
        tokens, finish = alone(*requests[index])
        seen.append(sequence.finish)
        if sequence.finish == "cancelled":
            assert tuple(sequence.tokens) == tokens[: len(sequence.tokens)]
        else:
            assert (tuple(sequence.tokens), sequence.finish) == (tokens, finish)
    assert sorted(slots._free) == [0, 1, 2], "no slot is lost"


def test_a_sequence_that_ends_makes_room_at_once():
    slots = Slots(steps := Hashing())
    short = [sequence_of(steps, None, [n], Sampling(max_tokens=2, ignore_end=True)) for n in (1, 2, 3)]
    late = sequence_of(steps, None, [4], Sampling(max_tokens=2, ignore_end=True))
    for sequence in (*short, late):
        slots.add(sequence)
    for _ in range(3):
        slots.step()
    assert [each.finish for each in short] == ["length"] * 3
    slots.step()
    assert late.finish == "length"


def test_what_fails_ends_all_that_run_and_the_next_ones_go_on():
    engine = Engine(steps := Hashing())
    steps.fails = 1
    with pytest.raises(ExecutionError, match="no memory"):
        engine.generate([[1, 2], [3]], max_tokens=4, ignore_end=True)
    assert steps.resets == 1
    assert len(engine.generate([[1, 2]], max_tokens=4, ignore_end=True)[0].tokens) == 4


def test_a_stream_that_is_closed_frees_its_slot():
    engine = Engine(Hashing())
    streams = [engine.stream([n], max_tokens=12, ignore_end=True) for n in (1, 2, 3)]
    for stream in streams:
        next(stream)
    assert engine.load == (0, 3)
    streams[0].close()
    assert engine.load == (0, 2)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1] * 7, {}, "has 7 tokens; the model takes at most 6"),
        ([VOCABULARY], {}, "token 13 of the prompt is not one of the 13 tokens"),
        ([-1], {}, "token -1 of the prompt"),
        ([1.5], {}, "token 1.5 of the prompt is not an integer"),
        ([True], {}, "token True of the prompt is not an integer"),
        ("words", {}, "carries no tokenizer"),
        ({"a": 1}, {}, "is a dict"),
        ([1, 2], {"max_tokens": 20}, "room for 19"),
        ([1], {"max_tokens": 0}, "max_tokens is 0"),
        ([1], {"temperature": -0.1}, "temperature is -0.1"),
        ([1], {"temperature": float("nan")}, "temperature is nan"),
        ([1], {"temperature": float("inf")}, "temperature is inf"),
        ([1], {"top_p": 0.0}, "top_p is 0.0"),
        ([1], {"top_p": 1.01}, "top_p is 1.01"),
        ([1], {"top_k": -1}, "top_k is -1"),
        ([1], {"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ([1], {"seed": -1}, "seed is -1"),
        ([1], {"seed": 1 << 64}, "seed is 18446744073709551616"),
        ([1], {"stop": ("x",)}, "carries no tokenizer"),
        ([1], {"stop": ("",)}, "a stop text has 0 characters"),
        ([1], {"end_tokens": (99,)}, "end token 99"),
        ([1], {"best_of": 3}, "best_of"),
    ],
)
def test_bad_requests_are_refused_before_any_work(prompt, options, message):
    engine = Engine(steps := Hashing())
    with pytest.raises(InputError, match=message):
        engine.generate([prompt], **options)
    assert not steps.cache


def test_the_last_position_of_the_cache_is_used():
    assert len(Engine(Hashing()).generate([[1, 2]], max_tokens=19, ignore_end=True)[0].tokens) == 19
