"""Text of tokens, which may not be told before more is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

# What an incomplete character is decoded to.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# Tokens before the new ones that are decoded with them: some decoders drop the blank before the first word.
_CONTEXT = 4


class Tokenizer(Protocol):
    """Text to tokens and back."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        ...


class TextStream:
    """The text of a sequence while its tokens come.

    Text is told when it is certain: not half of a character, nor the beginning of a stop text.

    Args:
        tokenizer: decodes.
        stop: texts that end the sequence.

    Attributes:
        text: what is certain so far.
        stopped: whether a stop text came.

    >>> class Letters:
    ...     def decode(self, tokens):
    ...         return "".join(map(chr, tokens))
    >>> stream = TextStream(Letters(), ("END",))
    >>> [stream.add(ord(letter)) for letter in "xENyENDz"], stream.stopped, stream.text
    (['x', '', '', 'ENy', '', '', '', ''], True, 'xENy')
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._start = self._told = 0
        self._held = ""
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Add a token; give the text that has become certain."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        before = self._tokenizer.decode(self._tokens[self._start : self._told])
        now = self._tokenizer.decode(self._tokens[self._start :])
        if len(now) <= len(before) or now.endswith(_INCOMPLETE):
            return ""
        self._start, self._told = max(self._told - _CONTEXT, self._start), len(self._tokens)
        return self._certain(now[len(before) :])

    def end(self) -> str:
        """The sequence has ended: give what was held back."""
        if self.stopped:
            return ""
        before = self._tokenizer.decode(self._tokens[self._start : self._told])
        rest = self._tokenizer.decode(self._tokens[self._start :])[len(before) :]
        self._told = len(self._tokens)
        told = self._certain(rest) + ("" if self.stopped else self._held)
        self.text = self.text if self.stopped else self.text + self._held
        self._held = ""
        return told

    def _certain(self, new: str) -> str:
        """Cut at the first stop text, and hold back what may become one."""
        text = self._held + new
        places = [place for place in map(text.find, self._stop) if place >= 0]
        if places:
            self.stopped = True
            told, self._held = text[: min(places)], ""
        else:
            held = max((_overlap(text, stop) for stop in self._stop), default=0)
            told, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += told
        return told


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop text.

    >>> _overlap("the EN", "END")
    2
    """
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
