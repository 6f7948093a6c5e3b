"""Feedback: the right answers of requests that were answered, and how many of the model's agreed.

Answers are kept by request id, for a while, as the bytes that were sent; what they mean is only looked at when feedback
comes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lepton_xla.serve.errors import HTTPError

# Labels beyond these are counted as right or wrong only.
_MOST_LABELS = 128


class Feedback:
    """The answers of one model version, and their right answers.

    Args:
        dtype: of the output that is judged.
        classes: elements a row of that output: the largest is the answer.
        most: answers kept, the latest.
        most_bytes: bytes of them.

    Attributes:
        right, wrong: rows by whether the answer was the label.
        labels: label -> rows with the label that were answered so, rows with the label, rows that were answered so.
        taken: called with the labels that were judged, request id -> the right class of each row.

    >>> feedback = Feedback(np.dtype("float32"), classes=3)
    >>> feedback.remember("a", np.float32([[0, 2, 1]]).tobytes())
    >>> feedback.judge({"a": [2]})
    1
    >>> feedback.right, feedback.wrong, feedback.labels["2"]
    (0, 1, [0, 1, 0])
    """

    def __init__(self, dtype: np.dtype[Any], classes: int, most: int = 100_000, most_bytes: int = 64 << 20) -> None:
        self._dtype = dtype
        self._classes = classes
        self._most = most
        self._most_bytes = most_bytes
        # None in the place of an answer that was judged, so that a second label for it is told from an unknown id.
        self._answers: OrderedDict[str, bytes | None] = OrderedDict()
        self._bytes = 0
        self.right = self.wrong = 0
        self.labels: dict[str, list[int]] = {}
        self.taken: Callable[[Mapping[str, Sequence[int]]], object] | None = None

    def remember(self, request_id: str, output: bytes | memoryview) -> None:
        """Keeps an answer; one with the same id is forgotten."""
        answers = self._answers
        old = answers.pop(request_id, None)
        if old is not None:
            self._bytes -= len(old)
        if len(output) > self._most_bytes // 16:
            return
        answers[request_id] = kept = bytes(output)
        self._bytes += len(kept)
        while len(answers) > self._most or self._bytes > self._most_bytes:
            self._bytes -= len(answers.popitem(last=False)[1] or b"")

    def forget(self) -> None:
        """Drops all answers; what was counted stays. Nobody asks a version that is not loaded to judge."""
        self._answers.clear()
        self._bytes = 0

    def knows(self, request_id: str) -> bool:
        """Whether the answer of a request is kept, or was judged."""
        return request_id in self._answers

    def check(self, labels: Mapping[str, Sequence[int]]) -> None:
        """Checks labels without counting them.

        Args:
            labels: request id -> the right class of each row.

        Raises:
            HTTPError: 404 for an id that is not known, 409 for one that was judged, 400 for labels that do not fit.
        """
        for request_id, right in labels.items():
            self._predicted(request_id, right)

    def judge(self, labels: Mapping[str, Sequence[int]]) -> int:
        """Counts right answers: all of them, or none.

        Args:
            labels: request id -> the right class of each row.

        Returns:
            How many rows were judged.

        Raises:
            HTTPError: as `check`.
        """
        predicted = {request_id: self._predicted(request_id, right) for request_id, right in labels.items()}
        for request_id, answers in predicted.items():
            for label, answer in zip(labels[request_id], answers, strict=True):
                self._count(label, answer)
            self._bytes -= len(self._answers[request_id] or b"")
            self._answers[request_id] = None
        if self.taken is not None:
            self.taken(labels)
        return sum(map(len, predicted.values()))

    def _predicted(self, request_id: str, labels: Sequence[int]) -> list[int]:
        if request_id not in self._answers:
            raise HTTPError(404, "feedback is for a request that this model has not answered, or not lately")
        kept = self._answers[request_id]
        if kept is None:
            raise HTTPError(409, "this request has had its feedback")
        rows = np.frombuffer(kept, self._dtype).reshape(-1, self._classes)
        if len(labels) != len(rows):
            raise HTTPError(400, f"the request had {len(rows)} rows, the feedback has {len(labels)} labels")
        if any(not 0 <= label < self._classes for label in labels):
            raise HTTPError(400, f"a label is none of the model's classes, 0 to {self._classes - 1}")
        return rows.argmax(axis=1).tolist()

    def _count(self, label: int, answer: int) -> None:
        if label == answer:
            self.right += 1
        else:
            self.wrong += 1
        for value, place in ((label, 1), (answer, 2)):
            name = str(value)
            if name in self.labels or len(self.labels) < _MOST_LABELS:
                counts = self.labels.setdefault(name, [0, 0, 0])
                counts[place] += 1
                if label == answer and place == 1:
                    counts[0] += 1

    def counts(self) -> dict[str, Any]:
        """What was counted, to be added to that of other processes."""
        return {
            "right": self.right,
            "wrong": self.wrong,
            "labels": {key: list(each) for key, each in self.labels.items()},
        }
