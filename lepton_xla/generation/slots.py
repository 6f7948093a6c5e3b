"""Continuous batching: sequences come and go while others are decoded. No threads, no clock.

Each sequence has a slot of the model's cache, or one for each of its beams. A step reads the prompt of at most one
waiting sequence, and then decodes one token of every sequence. A sequence that ends leaves its slots at once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from lepton_xla.errors import InputError, LeptonError
from lepton_xla.generation.beams import Beams
from lepton_xla.generation.sampling import Chooser, Sampling
from lepton_xla.generation.texts import TextStream, Tokenizer

type Finish = Literal["", "stop", "length", "cancelled", "failed"]
DEFAULT_TOKENS = 16


class Steps(Protocol):
    """The compiled steps of a model."""

    slots: int
    capacity: int
    vocabulary: int
    first_position: int | None
    end_tokens: tuple[int, ...]
    longest_prompt: int
    most_beams: int

    def prefill(self, tokens: Sequence[int], slot: int) -> np.ndarray:
        """Read a prompt into a slot; give the logits of the next token, `[tokens]`."""
        ...

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        """Read one token for each slot; give the logits of the next ones, `[slots, tokens]`."""
        ...

    def copy(self, sources: Mapping[int, int]) -> None:
        """Make slots copies of others: slot -> the one it becomes a copy of, as that is before."""
        ...

    def reset(self) -> None:
        """Empty the cache."""
        ...


class Generation:
    """One sequence.

    Args:
        prompt: its tokens.
        sampling: how it is continued.
        limit: largest number of new tokens.
        text: the text of the new tokens, if the model has a tokenizer.
        told: called after each token with its text (empty if none is certain yet), and at the end with token None.

    Attributes:
        tokens: new tokens, without the one that ended it.
        finish: why it ended; empty while it goes on.
        error: what failed, if something did.
        beams: its continuations, if it is found by beam search.
        slots: its own, those of its beams that go on first.
        certainty: the probability of the likeliest first token; NaN while there is none.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        limit: int,
        text: TextStream | None = None,
        told: Callable[[Generation, int | None, str], object] = lambda *_: None,
    ) -> None:
        self.prompt = tuple(prompt)
        self.sampling = sampling
        self.limit = limit
        self.text = text
        self.told = told
        self.tokens: list[int] = []
        self.finish: Finish = ""
        self.error: Exception | None = None
        self.chooser: Chooser | None = None
        self.beams: Beams | None = None
        self.slots: list[int] = []
        self.certainty = math.nan


class Slots:
    """Decodes sequences together.

    Args:
        steps: the compiled model.

    Attributes:
        waiting: sequences without a slot, in order.
        running: sequence by slot.
    """

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._free = list(range(steps.slots))[::-1]
        self.waiting: deque[Generation] = deque()
        self.running: dict[int, Generation] = {}

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.running

    def add(self, sequence: Generation) -> None:
        """Have a sequence generated."""
        self.waiting.append(sequence)

    def cancel(self, sequence: Generation) -> None:
        """Give a sequence up: its slot is free for the next step."""
        if sequence.finish:
            return
        self._end(sequence, "cancelled")
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        for slot, other in tuple(self.running.items()):
            if other is sequence:
                self._leave(slot)

    def fail_all(self, error: Exception) -> None:
        """End all sequences, those that wait too: something is wrong that no next step mends."""
        self._fail(error)
        while self.waiting:
            sequence = self.waiting.popleft()
            sequence.error = error
            self._end(sequence, "failed")

    def step(self) -> None:
        """Read the prompt of one waiting sequence, if there are slots for it, and decode a token of each."""
        if self.waiting and len(self._free) >= self.waiting[0].sampling.num_beams:
            self._begin(self.waiting.popleft())
        if not self.running:
            return
        tokens, positions = [0] * self._steps.slots, [0] * self._steps.slots
        first = self._steps.first_position
        for slot, sequence in self.running.items():
            said: Sequence[int] = sequence.tokens
            if sequence.beams is not None:
                live, index = sequence.beams.live, sequence.slots.index(slot)
                if index >= len(live):
                    continue
                said = live[index].tokens
            tokens[slot] = said[-1]
            positions[slot] = (len(sequence.prompt) if first is None else first) + len(said) - 1
        try:
            logits = self._steps.decode(tokens, positions)
            for sequence in dict.fromkeys(each for each in self.running.values() if each.beams is not None):
                assert sequence.beams is not None
                self._search(sequence, sequence.beams, logits[sequence.slots[: len(sequence.beams.live)]])
        except LeptonError as error:  # the cache is lost, and with it all sequences
            self._fail(error)
            return
        for slot, sequence in tuple(self.running.items()):
            if sequence.beams is None:
                self._take(slot, sequence, logits[slot])

    def _begin(self, sequence: Generation) -> None:
        sampling, steps = sequence.sampling, self._steps
        sequence.slots = [self._free.pop() for _ in range(sampling.num_beams)]
        self.running |= dict.fromkeys(sequence.slots, sequence)
        slot = sequence.slots[0]
        sequence.chooser = Chooser(sampling, sequence.prompt if steps.first_position is None else ())
        try:
            logits = steps.prefill(sequence.prompt, slot)
            sequence.certainty = _certainty(logits)
            if sampling.num_beams > 1:
                ends = () if sampling.ignore_end else (*steps.end_tokens, *sampling.end_tokens)
                sequence.beams = Beams(sampling.num_beams, sampling.length_penalty, sequence.limit, ends)
                self._search(sequence, sequence.beams, logits[None])
                return
        except LeptonError as error:
            self._fail(error)
            return
        self._take(slot, sequence, logits)

    def _search(self, sequence: Generation, beams: Beams, logits: np.ndarray) -> None:
        """Take the next tokens of all beams of a sequence; each goes on in a slot that has its tokens before."""
        parents: Sequence[int] = ()
        try:
            parents = beams.advance(logits)
        except ValueError as error:
            sequence.error = error
            self._end(sequence, "failed")
        else:
            if not beams.live:
                for token in beams.best.tokens:
                    sequence.tokens.append(token)
                    sequence.told(sequence, token, sequence.text.add(token) if sequence.text is not None else "")
                self._end(sequence, "stop" if beams.best.ended else "length")
        if sequence.finish:
            for slot in sequence.slots:
                self._leave(slot)
            return
        # The first beam of a parent goes on in its slot; its others get slots that nobody goes on in.
        before, unused, sources = sequence.slots, list(sequence.slots), dict[int, int]()
        for parent in dict.fromkeys(parents):
            unused.remove(before[parent])
        taken: set[int] = set()
        after: list[int] = []
        for parent in parents:
            slot = before[parent]
            if slot in taken:
                slot = unused.pop(0)
                sources[slot] = before[parent]
            taken.add(slot)
            after.append(slot)
        sequence.slots = after + unused
        if sources:
            self._steps.copy(sources)

    def _take(self, slot: int, sequence: Generation, logits: np.ndarray) -> None:
        """Take the next token of a sequence, which may end it."""
        sampling = sequence.sampling
        assert sequence.chooser is not None
        try:
            token = sequence.chooser.choose(logits)
        except ValueError as error:
            sequence.error = error
            self._end(sequence, "failed")
        else:
            if not sampling.ignore_end and token in (*self._steps.end_tokens, *sampling.end_tokens):
                self._end(sequence, "stop")
            else:
                sequence.tokens.append(token)
                text = sequence.text.add(token) if sequence.text is not None else ""
                stopped = sequence.text is not None and sequence.text.stopped
                sequence.told(sequence, token, text)
                if stopped or len(sequence.tokens) >= sequence.limit:
                    self._end(sequence, "stop" if stopped else "length")
        if sequence.finish:
            self._leave(slot)

    def _leave(self, slot: int) -> None:
        if self.running.pop(slot, None) is not None:
            self._free.append(slot)

    def _end(self, sequence: Generation, finish: Finish) -> None:
        if not sequence.finish:
            sequence.finish = finish
            # Nobody reads the text of others, and a tokenizer may be what has failed.
            rest = sequence.text.end() if sequence.text is not None and finish in ("stop", "length") else ""
            sequence.told(sequence, None, rest)

    def _fail(self, error: Exception) -> None:
        self._steps.reset()
        for slot, sequence in tuple(self.running.items()):
            sequence.error = error
            self._end(sequence, "failed")
            self._leave(slot)


def sequence_of(
    steps: Steps,
    tokenizer: Tokenizer | None,
    prompt: Any,
    sampling: Sampling,
    told: Callable[[Generation, int | None, str], object] = lambda *_: None,
) -> Generation:
    """Make a sequence of a prompt, checked before any work is done.

    Args:
        steps: the compiled model.
        tokenizer: of texts, if the model has one.
        prompt: token ids, or a text.
        sampling: how it is continued.
        told: see `Generation`.

    Raises:
        InputError: for a prompt that is empty, too long or of unknown tokens, a text without a tokenizer, or a value of
            `sampling` that is out of range; names it.
    """
    sampling.check(steps.vocabulary)
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InputError("the prompt is a text, and the model carries no tokenizer: give a list of token ids")
        # A token has at least one byte in most tokenizers: what is far too long is not worth tokenizing.
        if len(prompt) > 64 * steps.longest_prompt:
            raise InputError(f"the prompt has {len(prompt)} characters, too many for {steps.longest_prompt} tokens")
        prompt = tokenizer.encode(prompt)
    if sampling.stop and tokenizer is None:
        raise InputError("there are stop texts, and the model carries no tokenizer: use end_tokens")
    tokens = _tokens(prompt, steps)
    if sampling.num_beams > steps.most_beams:
        raise InputError(f"num_beams is {sampling.num_beams}; {_beams_of(steps)}")
    room = steps.capacity if steps.first_position is not None else steps.capacity - len(tokens) + 1
    wanted = sampling.max_tokens
    if wanted is not None and wanted > room:
        raise InputError(
            f"max_tokens is {wanted}; after a prompt of {len(tokens)} tokens the cache has room for {room}"
        )
    limit = min(DEFAULT_TOKENS, room) if wanted is None else wanted
    text = TextStream(tokenizer, sampling.stop) if tokenizer is not None else None
    return Generation(tokens, sampling, limit, text, told)


def _certainty(logits: np.ndarray) -> float:
    with np.errstate(invalid="ignore", over="ignore"):
        return float(1 / np.exp(logits - logits.max()).sum())


def _beams_of(steps: Steps) -> str:
    if steps.most_beams < steps.slots:
        return "the model was compiled by an older version, without beam search: compile it again"
    return f"the model has {steps.slots} slots, one for each beam"


def _tokens(prompt: Any, steps: Steps) -> list[int]:
    if not isinstance(prompt, (list, tuple, np.ndarray)):
        raise InputError(f"the prompt is a {type(prompt).__name__}, not a text or a list of token ids")
    if not len(prompt):
        raise InputError("the prompt is empty")
    if len(prompt) > steps.longest_prompt:
        raise InputError(f"the prompt has {len(prompt)} tokens; the model takes at most {steps.longest_prompt}")
    tokens: list[int] = []
    for token in prompt:
        if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
            told = repr(token) if isinstance(token, (bool, float)) else f"of type {type(token).__name__}"
            raise InputError(f"token {told} of the prompt is not an integer")
        if not 0 <= token < steps.vocabulary:
            raise InputError(f"token {token} of the prompt is not one of the {steps.vocabulary} tokens of the model")
        tokens.append(int(token))
    return tokens
