"""Chooses the next token from logits, on the host, one sequence at a time: the result depends on nothing else.

In this order, as in Hugging Face transformers: penalties, temperature, top-k, top-p, one draw. The repetition penalty
is that of CTRL (Keskar et al. 2019), top-p that of Holtzman et al. 2020; the other two penalties are OpenAI's.
"""

from __future__ import annotations

import math
import os
from typing import Any

import msgspec
import numpy as np

from lepton_xla.errors import InputError

MAX_STOPS = 16
_BEAMS_ALONE = ("temperature", "top_k", "top_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "stop")
_MAX_STOP_CHARACTERS = 256


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a sequence is continued.

    Attributes:
        max_tokens: largest number of new tokens; by default 16, or fewer if the cache has no room for them.
        temperature: divides the logits; 0 chooses the most likely token.
        top_k: number of most likely tokens to draw from; 0 for all.
        top_p: draws from the fewest tokens whose probabilities add up to at least this; 1 for all.
        repetition_penalty: divides positive logits of tokens that occurred, and multiplies negative ones.
        presence_penalty, frequency_penalty: are subtracted from the logits of generated tokens, once or each time.
        seed: equal seeds draw equal tokens, whatever else is generated; None draws one.
        stop: texts that end a sequence; they are left out of it. They need a tokenizer.
        end_tokens: tokens that end a sequence, beside those of the model.
        ignore_end: whether tokens that end a sequence do not: it ends with its length.
        num_beams: number of continuations that beam search follows, each in a slot; 1 for no search. Its tokens come
            all at its end, and fields that draw, penalize tokens or stop by a text do not go with it.
        length_penalty: of beam search: a continuation's log-probability is divided by its length to this power.

    Raises:
        InputError: from `check`, for a value out of range; names it.

    >>> from lepton_xla.generation import Sampling
    >>> Sampling(temperature=0.8, top_k=40, seed=1).check(vocabulary=100)
    >>> Sampling(top_p=1.5).check(vocabulary=100)
    Traceback (most recent call last):
    lepton_xla.errors.InputError: top_p is 1.5; it must be above 0 and at most 1
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    end_tokens: tuple[int, ...] = ()
    ignore_end: bool = False
    num_beams: int = 1
    length_penalty: float = 1.0

    def check(self, vocabulary: int) -> None:
        """Check the ranges of all values, for a model of so many tokens.

        >>> Sampling(seed=-1).check(vocabulary=100)
        Traceback (most recent call last):
        lepton_xla.errors.InputError: seed is -1; it must be 0 to 18446744073709551615
        """
        bounds: tuple[tuple[str, float | None, bool, str], ...] = (
            ("max_tokens", self.max_tokens, self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, 0 <= self.temperature <= 100, "0 to 100"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty <= 100,
             "above 0 and at most 100"),
            ("presence_penalty", self.presence_penalty, abs(self.presence_penalty) <= 100, "-100 to 100"),
            ("frequency_penalty", self.frequency_penalty, abs(self.frequency_penalty) <= 100, "-100 to 100"),
            ("num_beams", self.num_beams, self.num_beams >= 1, "at least 1"),
            ("length_penalty", self.length_penalty, abs(self.length_penalty) <= 10, "-10 to 10"),
            ("seed", self.seed, self.seed is None or 0 <= self.seed < 1 << 64, f"0 to {(1 << 64) - 1}"),
        )  # fmt: skip
        for name, value, holds, wanted in bounds:
            if not holds:  # also where it is NaN
                raise InputError(f"{name} is {value}; it must be {wanted}")
        if isinstance(self.stop, str):
            raise InputError("stop is a single text; give a tuple of texts")
        if len(self.stop) > MAX_STOPS or len(self.end_tokens) > MAX_STOPS:
            raise InputError(f"there are more than {MAX_STOPS} stop texts or end tokens")
        for text in self.stop:
            if not 0 < len(text) <= _MAX_STOP_CHARACTERS:
                raise InputError(f"a stop text has {len(text)} characters; it must have 1 to {_MAX_STOP_CHARACTERS}")
        if self.num_beams > 1:
            defaults = Sampling()
            for name in _BEAMS_ALONE:
                if getattr(self, name) != getattr(defaults, name):
                    raise InputError(f"{name} does not go with num_beams = {self.num_beams}: beam search is greedy")
        elif self.length_penalty != 1:
            raise InputError(f"length_penalty is {self.length_penalty} without beam search: give num_beams too")
        for token in self.end_tokens:
            if not 0 <= token < vocabulary:
                raise InputError(f"end token {token} is not one of the {vocabulary} tokens")


class Chooser:
    """Chooses the tokens of one sequence.

    Args:
        sampling: how.
        context: tokens that count as having occurred: the prompt, if the model continues it.
    """

    def __init__(self, sampling: Sampling, context: Any) -> None:
        self._sampling = sampling
        self._seen = np.unique(np.asarray(context, np.int64))
        self._counts: dict[int, int] = {}
        seed = int.from_bytes(os.urandom(8), "little") if sampling.seed is None else sampling.seed
        self._random = np.random.Generator(np.random.Philox(key=seed)) if sampling.temperature else None

    def choose(self, logits: np.ndarray) -> int:
        """The next token, by logits of shape `[tokens]`. It counts as having occurred from then on.

        Raises:
            ValueError: if no logit is a number.

        >>> Chooser(Sampling(), ()).choose(np.array([0.0, 2.0, 1.0], np.float32))
        1
        """
        sampling = self._sampling
        plain = sampling.repetition_penalty == 1 and not (sampling.presence_penalty or sampling.frequency_penalty)
        if not plain:
            logits = self._penalized(logits.astype(np.float64))
        token = int(np.argmax(logits)) if self._random is None else self._drawn(logits.astype(np.float64))
        if np.isnan(logits[token]):  # argmax finds the first NaN
            raise ValueError("the model gives logits that are no numbers")
        if not plain:
            self._counts[token] = self._counts.get(token, 0) + 1
            if sampling.repetition_penalty != 1:
                self._seen = np.union1d(self._seen, [token])
        return token

    def _penalized(self, logits: np.ndarray) -> np.ndarray:
        sampling, seen = self._sampling, self._seen
        if sampling.repetition_penalty != 1 and len(seen):
            old = logits[seen]
            logits[seen] = np.where(old > 0, old / sampling.repetition_penalty, old * sampling.repetition_penalty)
        for token, count in self._counts.items():
            logits[token] -= sampling.presence_penalty + count * sampling.frequency_penalty
        return logits

    def _drawn(self, logits: np.ndarray) -> int:
        assert self._random is not None
        if np.isnan(logits).any():
            return int(np.argmax(logits))
        sampling, count = self._sampling, len(logits)
        kept = np.arange(count)
        if 0 < sampling.top_k < count:
            # Equal logits at the edge: the first ones are kept, as `argmax` does.
            edge = np.partition(logits, count - sampling.top_k)[count - sampling.top_k]
            above, level = np.flatnonzero(logits > edge), np.flatnonzero(logits == edge)
            kept = np.sort(np.concatenate([above, level[: sampling.top_k - len(above)]]))
        scaled = logits[kept] / max(sampling.temperature, 1e-6)
        weights = np.exp(scaled - scaled.max())
        if not math.isfinite(weights.sum()):  # an infinite logit
            return int(kept[np.argmax(scaled)])
        if sampling.top_p < 1:
            order = np.argsort(-scaled, kind="stable")  # weights of unequal logits may be equal
            sums = np.cumsum(weights[order])
            last = int(np.searchsorted(sums, sampling.top_p * sums[-1]))
            chosen = np.sort(order[: last + 1])
            kept, weights = kept[chosen], weights[chosen]
        sums = np.cumsum(weights)
        place = int(np.searchsorted(sums, self._random.random() * sums[-1], side="right"))
        return int(kept[min(place, len(kept) - 1)])
