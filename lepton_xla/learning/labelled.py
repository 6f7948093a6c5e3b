"""Labelled rows: the sampled requests that have feedback and fit a model, as arrays."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping

import numpy as np

from lepton_xla.errors import LearningError
from lepton_xla.generation.rows import PROMPT
from lepton_xla.program import TensorSpec
from lepton_xla.samples import Sample

LENGTHS = "lengths"


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Rows with their right classes.

    Attributes:
        inputs: name -> array `[rows, ...]`.
        labels: int32 `[rows]`; of a model that generates the right replies, as objects.
        places: float64 `[rows]`, uniform in 0 to 1: a hash of the request's id, equal for all of its rows.
        foreign: samples that were left out, because they do not fit the model.
        why: what is wrong with the first of those; empty without one.
    """

    inputs: dict[str, np.ndarray]
    labels: np.ndarray
    places: np.ndarray
    foreign: int = 0
    why: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def split(self, held_out: float) -> tuple[Labelled, Labelled]:
        """Cut off a share to judge by. A request is on the same side in every round, so no judge was ever trained on.

        Args:
            held_out: the share.

        Returns:
            What to train on, and what to judge by.

        >>> rows = Labelled({"x": np.arange(3)}, np.arange(3), np.array([0.1, 0.9, 0.3]))
        >>> [part.labels.tolist() for part in rows.split(0.2)]
        [[1, 2], [0]]
        """
        return self.only(self.places >= held_out), self.only(self.places < held_out)

    def only(self, chosen: np.ndarray) -> Labelled:
        """The rows where an array of booleans, `[rows]`, is true."""
        inputs = {name: array[chosen] for name, array in self.inputs.items()}
        return dataclasses.replace(self, inputs=inputs, labels=self.labels[chosen], places=self.places[chosen])


def read_labelled(
    samples: Iterable[Sample], inputs: Mapping[str, TensorSpec], most_rows: int | None = None, secret: bytes = b""
) -> Labelled:
    """Join samples with labels into arrays.

    Args:
        samples: in the order of their time.
        inputs: what the model takes; its first dimension must be the row.
        most_rows: the latest of the rows that are kept.
        secret: what nobody who sends requests knows: see `place_of`.

    Returns:
        The rows of the samples that fit. Those of another signature, without labels, or of which an input was dropped
        or hashed are counted.

    Raises:
        LearningError: if the model's rows are not its inputs' first dimension.

    >>> x = {"x": np.float32([[1, 2], [3, 4]])}
    >>> one = Sample("a", "1", 0.0, x, {}, frozenset(), (0, 1))
    >>> other = Sample("b", "1", 1.0, {"y": np.zeros(1)}, {}, frozenset(), (0,))
    >>> found = read_labelled([one, other], {"x": lx.TensorSpec(("batch", 2), "float32")})
    >>> found.inputs["x"].tolist(), found.labels.tolist(), found.foreign
    ([[1.0, 2.0], [3.0, 4.0]], [0, 1], 1)
    """
    symbols = {spec.shape[0] if spec.shape else None for spec in inputs.values()}
    if len(symbols) != 1 or not isinstance(next(iter(symbols)), str):
        raise LearningError(
            "only models whose inputs all begin with the same symbolic dimension can learn from samples: their rows "
            "are what is mixed into batches"
        )
    kept: list[Sample] = []
    rows, foreign, why = 0, 0, ""
    for sample in samples:
        problem = _problem(sample, inputs)
        if problem or sample.labels is None:
            foreign, why = foreign + 1, why or f"request {sample.id[:64]!r}: {problem or 'no feedback'}"
            continue
        kept.append(sample)
        rows += len(sample.labels)
        while most_rows is not None and rows > most_rows and len(kept) > 1:
            rows -= len(kept.pop(0).labels or ())
    arrays = {
        name: np.concatenate([sample.inputs[name] for sample in kept])
        if kept
        else np.empty((0, *(size if isinstance(size, int) else 0 for size in spec.shape[1:])), spec.dtype)
        for name, spec in inputs.items()
    }
    labels = [label for sample in kept for label in sample.labels or ()]
    places = [place for sample in kept for place in [place_of(sample.id, secret)] * len(sample.labels or ())]
    return Labelled(arrays, np.array(labels, np.int32), np.array(places, np.float64), foreign, why)


def read_replies(
    samples: Iterable[Sample], longest: int, most_rows: int | None = None, secret: bytes = b""
) -> Labelled:
    """As `read_labelled`, of a model that generates: prompts `tokens[rows, longest]` of `lengths[rows]`, right replies.

    Args:
        samples: in the order of their time.
        longest: tokens of a prompt.
        most_rows: the latest of the rows that are kept.
        secret: as of `read_labelled`.

    >>> one = Sample("a", "1", 0.0, {"tokens": np.int32([[7, 8]])}, {}, frozenset(), None, "Hello!")
    >>> found = read_replies([one], longest=3)
    >>> found.inputs["tokens"].tolist(), found.labels.tolist()
    ([[7, 8, 0]], ['Hello!'])
    """
    kept: list[Sample] = []
    foreign, why = 0, ""
    for sample in samples:
        prompt = sample.inputs.get(PROMPT)
        if sample.reply is None:
            problem = "no right reply"
        elif prompt is None or PROMPT in sample.hashed:
            problem = "the prompt is dropped or hashed"
        elif prompt.ndim != 2 or len(prompt) != 1 or not 0 < prompt.shape[1] <= longest:
            problem = f"the prompt is {list(prompt.shape)}, and the model takes {longest} tokens"
        else:
            kept.append(sample)
            continue
        foreign, why = foreign + 1, why or f"request {sample.id[:64]!r}: {problem}"
    kept = kept[-most_rows:] if most_rows is not None else kept
    tokens = np.zeros((len(kept), longest), np.int32)
    for row, sample in zip(tokens, kept, strict=True):
        row[: sample.inputs[PROMPT].shape[1]] = sample.inputs[PROMPT][0]
    places = [place_of(sample.id, secret) for sample in kept]
    replies = np.array([sample.reply for sample in kept], object)
    lengths = np.array([sample.inputs[PROMPT].shape[1] for sample in kept], np.int32)
    return Labelled({PROMPT: tokens, LENGTHS: lengths}, replies, np.array(places, np.float64), foreign, why)


def place_of(request_id: str, secret: bytes = b"") -> float:
    """A number from 0 to 1 that a request's id and a secret decide, and that says nothing about whether it is sampled.

    Without the secret, whoever chooses the ids of requests would choose which of them judge.

    >>> 0 <= place_of("a") < 1, place_of("a") == place_of("b")
    (True, False)
    """
    digest = hashlib.blake2b(request_id.encode(), digest_size=8, key=secret, person=b"held out").digest()
    return int.from_bytes(digest, "little") / 2**64


def _problem(sample: Sample, inputs: Mapping[str, TensorSpec]) -> str:
    """Why a sample does not fit; empty if it does."""
    rows = len(sample.labels or ())
    for name, spec in inputs.items():
        array = sample.inputs.get(name)
        if array is None:
            return f"the input {name!r} is missing, or is dropped"
        if name in sample.hashed:
            return f"of the input {name!r} only hashes are kept"
        fits = array.ndim == len(spec.shape) and all(
            size == want for size, want in zip(array.shape[1:], spec.shape[1:], strict=True)
        )
        if not fits or array.dtype.name != spec.dtype or array.shape[0] != rows:
            return f"the input {name!r} is {array.dtype.name}{list(array.shape)}, and the model takes {spec}"
    return ""
