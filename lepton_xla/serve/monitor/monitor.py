"""Watches one model version: counts its rows into the profile's bins, and keeps its answers for feedback."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any

import numpy as np

from lepton_xla.profiles import Profile, Sketch
from lepton_xla.serve.monitor.feedback import Feedback, ReplyFeedback
from lepton_xla.serve.protocol.signature import Signature

_log = logging.getLogger("lepton_xla.serve")

# Rows are counted in groups, since NumPy's overhead is that of a call.
_GROUP_ROWS = 256
_GROUP_BYTES = 16 << 20
SHARE = 0.01
"""Copying and counting rows take at most this part of the time; rows beyond are left out, evenly."""
# Saved up for bursts.
_SAVED_S = 0.01


class Monitor:
    """What is known of the answers of one model version.

    `saw` is called by whatever thread runs the model, everything else on the event loop.

    Args:
        signature: the model's.
        profile: of the known data; None counts no rows.
        clock: seconds, monotonic.
        before: of what the version was until now, if another artifact takes its place; its feedback goes on.
        generates: whether what is answered are texts that the model has generated.

    Attributes:
        signature, profile: as given.
        feedback: judges answers; None if no output has a class.
    """

    def __init__(
        self,
        signature: Signature,
        profile: Profile | None = None,
        clock: Callable[[], float] = monotonic,
        before: Monitor | None = None,
        *,
        generates: bool = False,
    ) -> None:
        self.profile = profile
        self.signature = signature
        self._clock = clock
        self._sketch = None if profile is None else Sketch(profile)
        self._lock = threading.Lock()
        self._inputs: list[list[np.ndarray]] = []
        self._outputs: list[list[np.ndarray]] = []
        self._rows = self._bytes = 0
        self._allowance_s, self._last_s = _SAVED_S, clock()
        self._judged = judged_output(signature)
        self.feedback: Feedback | None = ReplyFeedback() if generates else None
        if self._judged is not None:
            tensor = signature.outputs[self._judged]
            self.feedback = Feedback(tensor.dtype, int(tensor.shape[1]))
        if self.feedback is not None and before is not None and before.feedback is not None:
            self.feedback = self.feedback.after(before.feedback)

    def saw(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray], rows: int) -> None:
        """Counts the rows of a batch. The arrays may be written to afterwards.

        Args:
            inputs, outputs: in the order of the signature, rows first, padding rows last.
            rows: without padding.
        """
        if self._sketch is None or self.signature.batch is None:
            return
        with self._lock:
            started = self._clock()
            self._allowance_s = min(_SAVED_S, self._allowance_s + SHARE * (started - self._last_s))
            self._last_s = started
            if self._allowance_s <= 0:
                return
            if self._inputs and [array.shape[1:] for array in self._inputs[-1]] != [each.shape[1:] for each in inputs]:
                self._count()
            self._inputs.append([array[:rows].copy() for array in inputs])
            self._outputs.append([array[:rows].copy() for array in outputs])
            self._rows += rows
            self._bytes += sum(array.nbytes for array in (*self._inputs[-1], *self._outputs[-1]))
            if self._rows >= _GROUP_ROWS or self._bytes >= _GROUP_BYTES:
                self._count()
            self._allowance_s -= self._clock() - started

    def _count(self) -> None:
        inputs, outputs = self._inputs, self._outputs
        self._inputs, self._outputs, self._rows, self._bytes = [], [], 0, 0
        assert self._sketch is not None
        try:
            self._sketch.add(
                _joined([tensor.name for tensor in self.signature.inputs], inputs),
                _joined([tensor.name for tensor in self.signature.outputs], outputs),
            )
        except Exception:
            # What is counted must never fail an answer.
            _log.exception("the inputs and outputs of %s could not be counted", self.signature.name)
            self._sketch = None

    def answered(
        self,
        request_id: str,
        asked: Sequence[tuple[int, bool]],
        outputs: Sequence[bytes | memoryview],
        propensity: float = 0.0,
    ) -> None:
        """Keeps an answer for feedback.

        Args:
            request_id: as the client sent it.
            asked: `Spec.outputs` of the request.
            outputs: the bytes of each.
            propensity: see `Feedback.remember`.
        """
        feedback, at = self.feedback, 0
        if feedback is not None:
            for index, _ in asked:  # each request comes here, and `enumerate` takes longer
                if index == self._judged:
                    feedback.remember(request_id, outputs[at], propensity)
                    return
                at += 1

    def counts(self) -> dict[str, Any]:
        """What was counted; that of other processes may be added.

        `sketch` is `Profile.bins` -> feature -> rows by bin, so rows of other bins are not added to these.
        """
        with self._lock:
            if self._rows:
                started = self._clock()
                self._count()
                self._allowance_s -= self._clock() - started
            found: dict[str, Any] = {}
            if self._sketch is not None and self.profile is not None:
                found["sketch"] = {self.profile.bins: self._sketch.counts}
        if self.feedback is not None:
            found["feedback"] = self.feedback.counts()
        return found


def judged_output(signature: Signature) -> int | None:
    """Index of the output whose largest element is a row's answer: the only one of floats with classes; else None."""
    found = [
        index
        for index, tensor in enumerate(signature.outputs)
        if len(tensor.shape) == 2
        and isinstance(tensor.shape[1], int)
        and tensor.shape[1] >= 2
        and tensor.shape[0] == signature.batch
        and tensor.datatype.name.startswith(("FP", "BF"))
    ]
    return found[0] if len(found) == 1 else None


def _joined(names: Sequence[str], groups: Sequence[Sequence[np.ndarray]]) -> Mapping[str, np.ndarray]:
    return {name: np.concatenate(parts) for name, parts in zip(names, zip(*groups, strict=True), strict=True)}
