"""Continuous batching: sequences come and go while others are decoded. No threads, no clock.

Each sequence has a slot of the model's cache. A step reads the prompt of at most one waiting sequence, and then decodes
one token of every sequence. A sequence that ends leaves its slot at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from lepton_xla.errors import InputError, LeptonError
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

    def prefill(self, tokens: Sequence[int], slot: int) -> np.ndarray:
        """Read a prompt into a slot; give the logits of the next token, `[tokens]`."""
        ...

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        """Read one token for each slot; give the logits of the next ones, `[slots, tokens]`."""
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
        """Read the prompt of one waiting sequence, if there is a slot for it, and decode a token of each."""
        if self.waiting and self._free:
            self._begin(self.waiting.popleft(), self._free.pop())
        if not self.running:
            return
        tokens, positions = [0] * self._steps.slots, [0] * self._steps.slots
        first = self._steps.first_position
        for slot, sequence in self.running.items():
            tokens[slot] = sequence.tokens[-1]
            positions[slot] = (len(sequence.prompt) if first is None else first) + len(sequence.tokens) - 1
        try:
            logits = self._steps.decode(tokens, positions)
        except LeptonError as error:  # the cache is lost, and with it all sequences
            self._fail(error)
            return
        for slot, sequence in tuple(self.running.items()):
            self._take(slot, sequence, logits[slot])

    def _begin(self, sequence: Generation, slot: int) -> None:
        self.running[slot] = sequence
        continues = self._steps.first_position is None
        sequence.chooser = Chooser(sequence.sampling, sequence.prompt if continues else ())
        try:
            logits = self._steps.prefill(sequence.prompt, slot)
        except LeptonError as error:
            self._fail(error)
            return
        self._take(slot, sequence, logits)

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
    room = steps.capacity if steps.first_position is not None else steps.capacity - len(tokens) + 1
    wanted = sampling.max_tokens
    if wanted is not None and wanted > room:
        raise InputError(
            f"max_tokens is {wanted}; after a prompt of {len(tokens)} tokens the cache has room for {room}"
        )
    limit = min(DEFAULT_TOKENS, room) if wanted is None else wanted
    text = TextStream(tokenizer, sampling.stop) if tokenizer is not None else None
    return Generation(tokens, sampling, limit, text, told)


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
            raise InputError(f"token {token!r} of the prompt is not an integer")
        if not 0 <= token < steps.vocabulary:
            raise InputError(f"token {token} of the prompt is not one of the {steps.vocabulary} tokens of the model")
        tokens.append(int(token))
    return tokens
