"""Stored answers of a teacher, which take its place in training."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils

from lepton_xla.errors import TrainingError
from lepton_xla.program import Program, TensorSpec
from lepton_xla.train.distillation import stored
from lepton_xla.train.models import entries
from lepton_xla.trees import name_leaves, some_names

# Entries of a batch that `Answers.join` adds.
INDICES, LOGITS, REST = "teacher:indices", "teacher:logits", "teacher:rest"


class Deployed(Protocol):
    """A compiled teacher, such as a `Servable`."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]: ...
    @property
    def outputs(self) -> Mapping[str, TensorSpec]: ...
    @property
    def manifest(self) -> Any: ...
    def __call__(self, /, **inputs: Any) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """Answers of a teacher to the samples of a data set: the `top_k` largest logits, and the sum of the rest.

    They are exact for the temperatures that they were made for: the divergence is that of the distribution over the
    `top_k` classes and one class for all others. Leaving the others out would reward a student for putting probability
    there.

    Attributes:
        folder: where they are.
        header: what they are of: digest of the teacher's weights, number of classes, `top_k`, temperatures.
        count: number of samples.

    >>> teacher = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(3)}, {"x": lx.TensorSpec(("batch", 3), "float32")})
    >>> batches = [{"id": np.array([7, 9]), "x": np.eye(3, dtype=np.float32)[:2]}]
    >>> answers = lx.train.teach(teacher, batches, "answers", top_k=2)
    >>> answers.count, answers.lookup([9])["teacher:indices"].tolist()
    (2, [[1, 0]])
    >>> loaded = lx.train.Answers.load("answers", teacher=teacher)
    >>> sorted(loaded.join(batches[0]))
    ['id', 'teacher:indices', 'teacher:logits', 'teacher:rest', 'x']
    """

    folder: pathlib.Path
    header: stored.Header
    count: int
    _shards: tuple[dict[str, np.ndarray], ...] = dataclasses.field(repr=False)
    _ids: np.ndarray = dataclasses.field(repr=False)
    _rows: np.ndarray = dataclasses.field(repr=False)

    @staticmethod
    def load(
        folder: str | os.PathLike[str], *, teacher: Program | Deployed | None = None, verify: bool = True
    ) -> Answers:
        """Read answers that `teach` or `leptonx teach` wrote.

        Args:
            folder: where they are.
            teacher: if given, the answers must be of this model's weights.
            verify: whether to check the digest of every file.

        Raises:
            TrainingError: if there are none, they are incomplete or damaged, or of other weights.
        """
        place = pathlib.Path(folder)
        if not (place / stored.MANIFEST).is_file():
            raise TrainingError(
                f"{place}: the answers are not complete; run `teach` again, and it will go on"
                if (place / stored.PROGRESS).is_file()
                else f"{place}: there are no answers of a teacher, no {stored.MANIFEST}"
            )
        contents = stored.read_json(place / stored.MANIFEST, stored.Contents)
        stored.check_format(contents.header, place)
        if teacher is not None and digest_of(teacher) != contents.header.digest:
            raise TrainingError(f"{place}: the answers are of another teacher, or of other weights of it")
        for shard in contents.shards if verify else ():
            stored.check_files(place, shard)
        shards = tuple(stored.read_arrays(place, shard) for shard in contents.shards)
        found = np.concatenate([shard["ids"] for shard in shards]) if shards else np.zeros(0, np.int64)
        order = np.argsort(found, kind="stable")
        return Answers(place, contents.header, len(found), shards, found[order], order)

    def lookup(self, ids: Any) -> dict[str, np.ndarray]:
        """Get the answers to samples.

        Args:
            ids: int `[rows]`.

        Returns:
            Entries of a batch: classes, int32 `[rows, ..., top_k]`; their logits, as the bits of float32, which keeps a
            loop from casting them; and the rest for each temperature, likewise.

        Raises:
            TrainingError: if a sample has no answer.
        """
        wanted = np.asarray(ids)
        if wanted.ndim != 1 or wanted.dtype.kind not in "iu":
            raise TrainingError(f"ids of samples are {wanted.dtype}{list(wanted.shape)}; expected integers, one a row")
        places = np.minimum(np.searchsorted(self._ids, wanted), max(self.count - 1, 0))
        missing = wanted[self._ids[places] != wanted] if self.count else wanted
        if missing.size:
            raise TrainingError(
                f"{self.folder} has no answer to {some_names(map(str, missing.tolist()))}; run `teach` on all samples"
            )
        rows = self._rows[places]
        starts = np.cumsum([0, *(len(shard["ids"]) for shard in self._shards)])
        which = np.searchsorted(starts, rows, side="right") - 1
        shape, k = (len(wanted), *self.header.positions), self.header.top_k
        indices = np.empty((*shape, k), np.int32)
        logits = np.empty((*shape, k), np.float32)
        rest = np.empty((*shape, len(self.header.temperatures)), np.float32)
        for number in np.unique(which):
            mine = which == number
            for name, out in (("indices", indices), ("logits", logits), ("rest", rest)):
                out[mine] = self._shards[number][name][rows[mine] - starts[number]]
        return {INDICES: indices, LOGITS: logits.view(np.int32), REST: rest.view(np.int32)}

    def join(self, batch: Mapping[str, Any], id: str = "id") -> dict[str, Any]:
        """Add the answers to a batch.

        Args:
            batch: the batch, on the host.
            id: the entry with the ids of samples.

        Raises:
            TrainingError: if the batch has no ids, or a sample has no answer.
        """
        return {**batch, **self.lookup(entries(batch, (id,))[0])}


def digest_of(teacher: Program | Deployed) -> str:
    """The digest of a teacher's weights; of an artifact that of its manifest, which holds those of its weights."""
    if not isinstance(teacher, Program):
        return f"artifact:{teacher.manifest.sha256}"
    digest = hashlib.sha256()
    for path, leaf in sorted(name_leaves(teacher.weights).items()):
        array = np.ascontiguousarray(np.asarray(_whole(leaf)))
        digest.update(f"{path}\0{array.dtype.name}\0{array.shape}\0".encode())
        digest.update(array.view(np.uint8).data if array.ndim else array.tobytes())
    return digest.hexdigest()


def _whole(leaf: Any) -> Any:
    """An array; one that the processes of a run share is gathered, so all of them must ask."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return leaf
    return multihost_utils.process_allgather(leaf, tiled=True)


@functools.partial(jax.jit, static_argnums=(1, 2))
def shorten(logits: jax.Array, top_k: int, temperatures: Sequence[float]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cut logits down to the largest.

    Args:
        logits: `[..., classes]`.
        top_k: how many to keep.
        temperatures: at which the rest is summed.

    Returns:
        Classes and logits, `[..., top_k]`, largest first; and for each temperature T the logsumexp of all other logits
        divided by T, `[..., temperatures]`, minus infinity if there are none.

    >>> classes, kept, rest = shorten(jnp.log(jnp.array([1.0, 4.0, 2.0, 3.0])), 2, (1.0,))
    >>> classes.tolist(), [round(value, 4) for value in jnp.exp(rest).tolist()]
    ([1, 3], [3.0])
    """
    values = logits.astype(jnp.float32)
    kept, classes = lax.top_k(values, top_k)
    others = _without(values, classes)
    rest = [jax.nn.logsumexp(others / temperature, -1) for temperature in temperatures]
    return classes, kept, jnp.stack(rest, -1)


def stored_divergence(
    logits: jax.Array, batch: Mapping[str, Any], header: stored.Header, temperature: float
) -> jax.Array:
    """`KL(p || q)` over the stored classes and one class for all others, for each row and position.

    Args:
        logits: the student's, `[rows, ..., classes]`.
        batch: a batch with answers.
        header: what they are of.
        temperature: T, one of those of the answers unless these have all classes.

    Raises:
        TrainingError: if the batch has no answers, or they have other positions than the logits.
    """
    if not all(name in batch for name in (INDICES, LOGITS, REST)):
        raise TrainingError(
            "the batch has no answers of the teacher: pass each batch through the loss's `prepare`, as fit does"
        )
    classes = batch[INDICES]
    kept, rest = (lax.bitcast_convert_type(batch[name], jnp.float32) for name in (LOGITS, REST))
    if classes.shape[:-1] != logits.shape[:-1]:
        raise TrainingError(
            f"the teacher's answers have shape {classes.shape[:-1]}, the student's {logits.shape[:-1]}, without classes"
        )
    whole = header.top_k == header.classes
    theirs = kept / temperature
    own = logits.astype(jnp.float32) / temperature
    found = _each_row(lambda row, at: row[at], own, classes)
    total = jax.nn.logsumexp(own, -1, keepdims=True)
    if not whole:
        at = header.temperatures.index(temperature)
        theirs = jnp.concatenate([theirs, rest[..., at : at + 1]], -1)
        found = jnp.concatenate([found, jax.nn.logsumexp(_without(own, classes), -1, keepdims=True)], -1)
    log_target = jax.nn.log_softmax(theirs)
    target = jnp.exp(log_target)
    counts = target > 0
    zero = jnp.zeros_like(target)
    return jnp.sum(target * (jnp.where(counts, log_target, zero) - jnp.where(counts, found - total, zero)), -1)


def _without(logits: jax.Array, classes: jax.Array) -> jax.Array:
    """The logits with these classes at minus infinity."""
    return _each_row(lambda row, at: row.at[at].set(-jnp.inf, unique_indices=True), logits, classes)


def _each_row(fn: Callable[..., jax.Array], logits: jax.Array, classes: jax.Array) -> jax.Array:
    """Apply a function to each row and position. With `put_along_axis` devices that share the rows would gather."""
    for _ in range(logits.ndim - 1):
        fn = jax.vmap(fn)
    return fn(logits, classes)
