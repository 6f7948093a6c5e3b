"""Feedback: the right answers of requests that were answered, and how many of the model's agreed.

Answers are kept by request id, for a while, as the bytes that were sent; what they mean is only looked at when feedback
comes.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lepton_xla.dtypes import classes_of
from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.protocol.monitoring import MAX_ID, RightAnswers

# Labels beyond these are counted as right or wrong only.
_MOST_LABELS = 128
# Answers are dropped a piece at a time: dropping the oldest one for each that comes takes longer than keeping it.
_PIECES = 16


class _Piece:
    """Answers that came after one another.

    Attributes:
        answers: request id -> answer. In the place of one that was judged, a hash of its labels: the same may come
            again, others may not.
        propensities: request id -> propensity, where it is not 0.
        nbytes: bytes of answers and ids.
    """

    __slots__ = ("answers", "nbytes", "propensities")

    def __init__(self) -> None:
        self.answers: dict[str, bytes | int] = {}
        self.propensities: dict[str, float] = {}
        self.nbytes = 0

    def drop(self, request_id: str) -> None:
        """Forgets an answer, if it is here."""
        kept = self.answers.pop(request_id, None)
        if kept is not None:
            self.nbytes -= len(request_id) + (len(kept) if isinstance(kept, bytes) else 0)
            self.propensities.pop(request_id, None)


type Held = list[tuple[str, Sequence[int | str], bytes | int, _Piece]]
"""Request ids, the right class of each row or the right reply, what is kept of the answer, and where."""


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
        self._most_bytes, self._most_output_bytes = most_bytes, most_bytes // _PIECES
        self.forget()
        self._most_pieces = min(_PIECES, most)
        self._piece_answers, self._piece_bytes = most // self._most_pieces, most_bytes // self._most_pieces
        self._read = type(self), dtype, classes
        self._row_bytes = dtype.itemsize * classes
        self.right = self.wrong = 0
        self.labels: dict[str, list[int]] = {}
        self.weighted = [0.0] * 5
        self.taken: Callable[[RightAnswers], object] | None = None

    def remember(self, request_id: str, output: bytes | memoryview, propensity: float = 0.0) -> None:
        """Keeps an answer; one with the same id is forgotten.

        Args:
            request_id: as the client sent it. Of one that is longer than feedback can name nothing is kept.
            output: the bytes of the answer.
            propensity: the probability with which this version was drawn to answer; 0 where it was not drawn.
        """
        output_bytes, id_length = len(output), len(request_id)
        if output_bytes > self._most_output_bytes or id_length > MAX_ID:
            for piece in self._pieces:
                piece.drop(request_id)
            return
        piece, size = self._latest, id_length + output_bytes
        answers = piece.answers
        if len(answers) >= self._piece_answers or piece.nbytes + size > self._piece_bytes:
            piece = self._begin(size)
            answers = piece.answers
        elif request_id in answers:
            piece.drop(request_id)
        answers[request_id] = bytes(output)
        piece.nbytes += size
        if propensity:
            piece.propensities[request_id] = propensity

    def _begin(self, size: int) -> _Piece:
        """Begins a piece, which has room for so many bytes."""
        pieces = self._pieces
        room = self._most_bytes - max(size, self._piece_bytes)
        while len(pieces) >= self._most_pieces or (pieces and self.nbytes > room):
            pieces.pop()
        self._latest = _Piece()
        pieces.appendleft(self._latest)
        return self._latest

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
        return sum(len(piece.answers) for piece in self._pieces)

    @property
    def nbytes(self) -> int:
        """Bytes of the answers that are kept, and of all ids."""
        return sum(piece.nbytes for piece in self._pieces)

    def forget(self) -> None:
        """Drops all answers; what was counted stays."""
        self._latest = _Piece()
        self._pieces = deque([self._latest])  # the latest first

    def hold(self, labels: RightAnswers) -> tuple[Held, RightAnswers]:
        """Finds the answers that labels are for, and holds them, whatever is dropped meanwhile.

        Returns:
            What `check` and `settle` take, and the labels of answers that are not known here.
        """
        held: Held = []
        unknown: dict[str, Sequence[int | str]] = {}
        for request_id, right in labels.items():
            for piece in self._pieces:
                kept = piece.answers.get(request_id)
                if kept is not None:
                    held.append((request_id, right, kept, piece))
                    break
            else:
                unknown[request_id] = right
        return held, unknown

    def check(self, held: Held) -> None:
        """Checks labels without counting them.

        Raises:
            HTTPError: 409 for answers that were judged by other labels, 400 for labels that do not fit.
        """
        for _, right, kept, _ in held:
            if isinstance(kept, bytes):
                self._check(right, kept)
            elif kept != hash(tuple(right)):
                raise HTTPError(409, "this request has had other feedback")

    def _check(self, right: Sequence[int | str], kept: bytes) -> None:
        if len(right) * self._row_bytes != len(kept):
            rows = len(kept) // self._row_bytes
            raise HTTPError(400, f"the request had {rows} rows, the feedback has {len(right)} labels")
        for each in right:
            if isinstance(each, str):
                raise HTTPError(400, "a label is a text; this model's are classes")
            if not 0 <= each < self._classes:
                raise HTTPError(400, f"a label is none of the model's classes, 0 to {self._classes - 1}")

    def _answers_of(self, kept: Sequence[bytes]) -> Sequence[int | str]:
        return classes_of(np.frombuffer(b"".join(kept), self._dtype).reshape(-1, self._classes)).tolist()

    def settle(self, held: Held) -> None:
        """Counts what was held and checked; what was counted before, as retries bring it, or meanwhile, not again."""
        new: dict[str, Sequence[int | str]] = {}
        kept: list[bytes] = []
        weighed: list[tuple[int, float]] = []
        for request_id, right, answer, piece in held:
            now = piece.answers.get(request_id)
            if isinstance(answer, int) or isinstance(now, int):
                continue
            if now is answer:  # neither dropped, nor is there another answer with this id
                piece.answers[request_id] = hash(tuple(right))
                piece.nbytes -= len(answer)
                if piece.propensities:
                    weighed.append((len(new), piece.propensities.pop(request_id, 0.0)))
            new[request_id] = right
            kept.append(answer)
        if not new:
            return
        labels = list(itertools.chain.from_iterable(new.values()))
        answers = self._answers_of(kept)
        self._count(labels, answers)
        starts = [0, *itertools.accumulate(map(len, new.values()))] if weighed else []
        for number, propensity in weighed:
            rows = slice(starts[number], starts[number + 1])
            self._weigh(propensity, labels[rows], answers[rows])
        if self.taken is not None:
            self.taken(new)

    def judge(self, labels: RightAnswers) -> int:
        """Counts right answers: all of them, or none. Labels that come again, as retries do, are not counted again.

        Returns:
            How many rows were judged, then or before.

        Raises:
            HTTPError: as `check`; 404 for an id that is not known.
        """
        held, unknown = self.hold(labels)
        self.check(held)
        if unknown:
            raise unknown_answer()
        self.settle(held)
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


def unknown_answer() -> HTTPError:
    """The error for feedback that is for nothing known."""
    return HTTPError(404, "feedback is for a request that this model has not answered, or not lately")


type Part = tuple[Feedback, Held]
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
    for judge in judges:
        held, labels = judge.hold(labels)
        if held:
            parts.append((judge, held))
    return parts, labels


def rows_of(parts: Sequence[Part]) -> int:
    """Number of rows that parts have labels for."""
    return sum(len(right) for _, held in parts for _, right, _, _ in held)
