"""Feedback: the right answers of requests that were answered, and how many of the model's agreed.

Answers are kept by request id, for a while, as the bytes that were sent; what they mean is only looked at when feedback
comes.
"""

from __future__ import annotations

import operator
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from lepton_xla.dtypes import classes_of
from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.protocol.monitoring import MAX_ID, RightAnswers

# Labels beyond these are counted as right or wrong only.
_MOST_LABELS = 128


type Held = dict[str, tuple[Sequence[int | str], bytes]]
"""Request id -> the right class of each row, or the right reply; and the answer."""


class Feedback:
    """The answers of one model version, and their right answers.

    Args:
        dtype: of the output that is judged.
        classes: elements a row of that output: the largest is the answer.
        most: answers kept, the latest.
        most_bytes: bytes of them and of their ids.

    Attributes:
        right, wrong: rows by whether the answer was the label.
        labels: label -> rows with the label that were answered so, rows with the label, rows that were answered so.
        weighted: of rows whose version was drawn with a known probability p, the sums of 1, 1/p, 1/p^2, r/p and r/p^2,
            with r 1 for a right answer; what an off-policy estimate needs.
        taken: called with the labels that were judged.

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
        self._read = type(self), dtype, classes
        self._row_bytes = dtype.itemsize * classes
        # In the place of an answer that was judged, a hash of its labels: the same may come again, others may not.
        self._answers: OrderedDict[str, bytes | int] = OrderedDict()
        self._bytes = 0
        self.right = self.wrong = 0
        self.labels: dict[str, list[int]] = {}
        self.weighted = [0.0] * 5
        self._propensities: dict[str, float] = {}
        self.taken: Callable[[RightAnswers], object] | None = None

    def remember(self, request_id: str, output: bytes | memoryview, propensity: float = 0.0) -> None:
        """Keeps an answer; one with the same id is forgotten.

        Args:
            request_id: as the client sent it. Of one that is longer than feedback can name nothing is kept.
            output: the bytes of the answer.
            propensity: the probability with which this version was drawn to answer; 0 where it was not drawn.
        """
        answers = self._answers
        before = answers.pop(request_id, None)
        if before is not None:
            self._bytes -= _size(request_id, before)
            self._propensities.pop(request_id, None)
        if len(output) > self._most_bytes // 16 or len(request_id) > MAX_ID:
            return
        answers[request_id] = bytes(output)
        self._bytes += len(request_id) + len(output)
        if propensity:
            self._propensities[request_id] = propensity
        while len(answers) > self._most or self._bytes > self._most_bytes:
            oldest, dropped = answers.popitem(last=False)
            self._bytes -= _size(oldest, dropped)
            self._propensities.pop(oldest, None)

    def after(self, before: Feedback) -> Feedback:
        """What judges answers when this takes the place of another: the other itself, if answers are read alike.

        Otherwise this one, and what the other has counted goes on in it.
        """
        if self._read == before._read:
            return before
        self.right, self.wrong, self.weighted = before.right, before.wrong, before.weighted
        self.labels = before.labels
        return self

    @property
    def count(self) -> int:
        """Number of answers that are kept, or were judged."""
        return len(self._answers)

    @property
    def nbytes(self) -> int:
        """Bytes of the answers that are kept, and of all ids."""
        return self._bytes

    def forget(self) -> None:
        """Drops all answers; what was counted stays."""
        self._answers.clear()
        self._propensities.clear()
        self._bytes = 0

    def known(self, request_ids: Iterable[str]) -> list[str]:
        """Those of some requests whose answer is kept, or was judged."""
        return [each for each in request_ids if each in self._answers]

    def hold(self, labels: RightAnswers) -> Held:
        """Checks labels without counting them, and holds the answers that they are for, whatever is dropped meanwhile.

        Returns:
            What `settle` takes, without labels that were counted before, as retries bring them.

        Raises:
            HTTPError: 404 for an id that is not known, 409 for one that was judged by other labels, 400 for labels that
                do not fit.
        """
        held: Held = {}
        for request_id, right in labels.items():
            kept = self._answers.get(request_id)
            if kept is None:
                raise HTTPError(404, "feedback is for a request that this model has not answered, or not lately")
            if isinstance(kept, int):
                if kept != hash(tuple(right)):
                    raise HTTPError(409, "this request has had other feedback")
                continue
            self._check(right, kept)
            held[request_id] = right, kept
        return held

    def _check(self, right: Sequence[int | str], kept: bytes) -> None:
        known = True
        for each in right:
            if isinstance(each, str):
                raise HTTPError(400, "a label is a text; this model's are classes")
            known = known and 0 <= each < self._classes
        if len(right) * self._row_bytes != len(kept):
            rows = len(kept) // self._row_bytes
            raise HTTPError(400, f"the request had {rows} rows, the feedback has {len(right)} labels")
        if not known:
            raise HTTPError(400, f"a label is none of the model's classes, 0 to {self._classes - 1}")

    def _answers_of(self, kept: Sequence[bytes]) -> Sequence[int | str]:
        return classes_of(np.frombuffer(b"".join(kept), self._dtype).reshape(-1, self._classes)).tolist()

    def settle(self, held: Held) -> None:
        """Counts what was held; what somebody else has counted meanwhile, not again."""
        now = self._answers
        held = {request_id: each for request_id, each in held.items() if not isinstance(now.get(request_id), int)}
        if not held:
            return
        answers = self._answers_of([answer for _, answer in held.values()])
        self._count([label for right, _ in held.values() for label in right], answers)
        at = 0
        for request_id, (right, answer) in held.items():
            if self._propensities:
                self._weigh(self._propensities.pop(request_id, 0.0), right, answers[at : at + len(right)])
            at += len(right)
            if now.get(request_id) is answer:  # neither dropped, nor is there another answer with this id
                now[request_id] = hash(tuple(right))
                self._bytes -= len(answer)
        if self.taken is not None:
            self.taken({request_id: right for request_id, (right, _) in held.items()})

    def judge(self, labels: RightAnswers) -> int:
        """Counts right answers: all of them, or none. Labels that come again, as retries do, are not counted again.

        Returns:
            How many rows were judged, then or before.

        Raises:
            HTTPError: as `hold`.
        """
        self.settle(self.hold(labels))
        return sum(map(len, labels.values()))

    def _count(self, labels: Sequence[int | str], answers: Sequence[int | str]) -> None:
        for (label, answer), rows in Counter(zip(labels, answers, strict=True)).items():
            if label == answer:
                self.right += rows
            else:
                self.wrong += rows
            for value, place in ((label, 1), (answer, 2)):
                if isinstance(value, str) or value < 0:
                    continue  # no class was answered
                name = str(value)
                if name in self.labels or len(self.labels) < _MOST_LABELS:
                    counts = self.labels.setdefault(name, [0, 0, 0])
                    counts[place] += rows
                    if label == answer and place == 1:
                        counts[0] += rows

    def _weigh(self, propensity: float, labels: Sequence[int | str], answers: Sequence[int | str]) -> None:
        if propensity:
            rows, right = len(answers), sum(map(operator.eq, labels, answers))
            weight = 1 / propensity
            more = (rows, rows * weight, rows * weight**2, right * weight, right * weight**2)
            self.weighted = [before + each for before, each in zip(self.weighted, more, strict=True)]

    def counts(self) -> dict[str, Any]:
        """What was counted, to be added to that of other processes."""
        return {
            "right": self.right,
            "wrong": self.wrong,
            "weighted": list(self.weighted),
            "labels": {key: list(each) for key, each in self.labels.items()},
        }


class ReplyFeedback(Feedback):
    """The replies of a model that generates, and what they should have been: right is what is equal.

    >>> feedback = ReplyFeedback()
    >>> feedback.remember("a", "Hello!".encode())
    >>> feedback.judge({"a": ["Hello."]}), feedback.right, feedback.wrong
    (1, 0, 1)
    """

    def __init__(self) -> None:
        super().__init__(np.dtype(np.uint8), classes=1)

    def _check(self, right: Sequence[int | str], kept: bytes) -> None:
        if len(right) != 1 or not isinstance(right[0], str):
            raise HTTPError(400, "this model generates: the label is the right reply, a text")

    def _answers_of(self, kept: Sequence[bytes]) -> Sequence[int | str]:
        return [each.decode("utf-8", "surrogatepass") for each in kept]


def _size(request_id: str, kept: bytes | int) -> int:
    return len(request_id) + (len(kept) if isinstance(kept, bytes) else 0)


type Part = tuple[Feedback, RightAnswers]
"""What judges some labels, and these labels."""


def divide(judges: Sequence[Feedback], labels: RightAnswers) -> tuple[list[Part], RightAnswers]:
    """Divide labels by what knows the answers; the second result are those that nothing knows.

    >>> first, second = (Feedback(np.dtype("float32"), classes=3) for _ in range(2))
    >>> second.remember("a", np.float32([[0, 2, 1]]).tobytes())
    >>> parts, rest = divide([first, second], {"a": [1], "b": [0]})
    >>> [judge is second for judge, _ in parts], rest
    ([True], {'b': [0]})
    """
    parts: list[Part] = []
    rest = dict(labels)
    for judge in judges:
        part: RightAnswers = {request_id: rest.pop(request_id) for request_id in judge.known(rest)}
        if part:
            parts.append((judge, part))
    return parts, rest
