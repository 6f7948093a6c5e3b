"""What a model was asked and has generated, as rows of tensors: what profiles, drift and samples are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from lepton_xla.generation.slots import Steps

PROMPT, REPLY, CERTAINTY = "tokens", "reply", "certainty"
PADDED = (PROMPT, REPLY)
"""Those whose rows vary in length, and are padded with zeros."""


class Sequenced(Protocol):
    """A sequence that has ended: `Generation` and `Generated`."""

    @property
    def prompt(self) -> Sequence[int]: ...
    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def certainty(self) -> float: ...


type Rows = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
"""Inputs and outputs by name, a sequence each row."""


def rows_of(sequences: Sequence[Sequenced], steps: Steps) -> Rows:
    """The tokens of prompts and replies, padded to the longest that a model takes, and how certain each beginning was.

    Args:
        sequences: that have ended.
        steps: the model.

    >>> from types import SimpleNamespace
    >>> from lepton_xla.generation import Generated
    >>> steps = SimpleNamespace(longest_prompt=3, capacity=4)
    >>> rows_of([Generated((7, 8), "", "stop", prompt=(5,), certainty=0.5)], steps)[0]["tokens"].tolist()
    [[5, 0, 0]]
    """
    inputs = {PROMPT: _padded([each.prompt for each in sequences], steps.longest_prompt)}
    certainties = np.array([each.certainty for each in sequences], np.float32)
    return inputs, {REPLY: _padded([each.tokens for each in sequences], steps.capacity), CERTAINTY: certainties}


def text_of_tokens(tokens: Sequence[int]) -> str:
    """The text of a reply of a model without a tokenizer, as feedback knows it: its tokens, separated by blanks.

    >>> text_of_tokens([5, 3])
    '5 3'
    """
    return " ".join(map(str, tokens))


def _padded(rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
    found = np.zeros((len(rows), length), np.int32)
    for into, row in zip(found, rows, strict=True):
        into[: len(row)] = row[:length]
    return found
