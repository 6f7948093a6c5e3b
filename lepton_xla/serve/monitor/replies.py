"""Has what a model that generates is asked and answers watched, judged and kept, as other answers are."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from lepton_xla.generation.rows import CERTAINTY, PROMPT, REPLY, Sequenced, rows_of
from lepton_xla.serve.monitor.monitor import Monitor
from lepton_xla.serve.monitor.sampler import Sampler
from lepton_xla.serve.protocol.datatypes import datatype_of
from lepton_xla.serve.protocol.signature import Signature, Tensor

if TYPE_CHECKING:
    from lepton_xla.generation.slots import Steps

_ROW, _PROMPT_TOKENS, _REPLY_TOKENS = "replies", "prompt tokens", "reply tokens"
# Counting a group of replies takes tens of milliseconds, which no answer is to wait for. What waits is bounded; replies
# beyond are not counted.
_counting = ThreadPoolExecutor(1, "lepton-replies")
_room = threading.Semaphore(256)


def signature_of_replies(signature: Signature, steps: Steps) -> Signature:
    """The signature of a model that generates, as if a prompt were a row of an input and its reply one of an output.

    Args:
        signature: of the model, which gives the next token.
        steps: of the model.
    """
    ids, floats = datatype_of("int32"), datatype_of("float32")
    return Signature(
        name=signature.name,
        version=signature.version,
        inputs=(Tensor(PROMPT, ids, (_ROW, _PROMPT_TOKENS)),),
        outputs=(Tensor(REPLY, ids, (_ROW, _REPLY_TOKENS)), Tensor(CERTAINTY, floats, (_ROW,))),
        batch=_ROW,
        bucket_sizes=(1,),
        others=(_PROMPT_TOKENS, _REPLY_TOKENS),
        buckets={_PROMPT_TOKENS: (steps.longest_prompt,), _REPLY_TOKENS: (steps.capacity,)},
    )


class Replies:
    """Told of each reply of a model version. On the event loop.

    Args:
        steps: of the model.
        monitor: watches it, by `signature_of_replies`; None if the server does not monitor.
        sampler: keeps samples, by the same; None if the server keeps none.
    """

    def __init__(self, steps: Steps, monitor: Monitor | None, sampler: Sampler | None) -> None:
        self._steps = steps
        self._monitor = monitor
        self._sampler = sampler

    def answered(self, request_id: str, sequence: Sequenced, text: str, propensity: float = 0.0) -> None:
        """Takes a reply.

        Args:
            request_id: what feedback will call it; empty if nobody can.
            sequence: that has ended.
            text: of the reply.
            propensity: see `Feedback.remember`.
        """
        monitor, sampler = self._monitor, self._sampler if request_id else None
        if monitor is not None and request_id and monitor.feedback is not None:
            monitor.feedback.remember(request_id, text.encode("utf-8", "surrogatepass"), propensity)
        counting = None if monitor is None or monitor.profile is None else monitor
        if counting is None and sampler is None:
            return
        inputs, outputs = rows_of([sequence], self._steps)
        if counting is not None and _room.acquire(blocking=False):
            _counting.submit(_count, counting, list(inputs.values()), list(outputs.values()))
        if sampler is not None:
            sizes = {_ROW: 1, _PROMPT_TOKENS: len(sequence.prompt), _REPLY_TOKENS: len(sequence.tokens)}
            sampler.replied(
                request_id,
                [inputs[PROMPT][:, : len(sequence.prompt)].tobytes()],
                [outputs[REPLY][:, : len(sequence.tokens)].tobytes(), outputs[CERTAINTY].tobytes()],
                sizes,
            )


def _count(monitor: Monitor, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
    """Has a reply counted, on the thread that counts."""
    _room.release()
    monitor.saw(inputs, outputs, 1)
