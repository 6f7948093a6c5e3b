"""`teach`: stores a teacher's answers, so that training need not run it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lepton_xla.errors import TrainingError
from lepton_xla.program import Program
from lepton_xla.train.distillation import stored
from lepton_xla.train.distillation.answers import Answers, Deployed, digest_of, shorten
from lepton_xla.train.distillation.terms import choose_output, is_number
from lepton_xla.train.models import entries

_ROWS = 8192
_LOCK = "lock"
_DTYPES = ("float32", "float16")


def teach(
    teacher: Program | Deployed,
    data: Iterable[Mapping[str, Any]],
    folder: str | os.PathLike[str],
    *,
    top_k: int,
    temperatures: Sequence[float] = (1.0, 2.0, 4.0),
    output: str | None = None,
    dtype: str = "float32",
    id: str = "id",
    shard_rows: int = _ROWS,
    progress: Callable[[int], None] | None = None,
) -> Answers:
    """Store a teacher's answers to samples; a run that was interrupted goes on where it was.

    Args:
        teacher: a program, or a loaded artifact.
        data: batches with the teacher's inputs, and the id of each sample: an integer that no other sample has.
        folder: where the answers go; made if it is missing.
        top_k: how many logits of each answer to keep, at most the number of classes. The rest becomes one number for
            each temperature.
        temperatures: those that `Logits` may have with these answers; it may have any if `top_k` is the number of
            classes.
        output: the teacher's output with the logits, `[rows, ..., classes]`; None if it has only one.
        dtype: how logits are stored: `float32` or `float16`.
        id: the entry with the ids.
        shard_rows: samples in one file; what is lost at most if the process is killed.
        progress: called with the number of answers after each batch.

    Returns:
        The answers.

    Raises:
        TrainingError: if an argument or a batch does not fit, an id occurs twice, an answer is not finite, the folder
            is in use, or it has answers of another teacher or of other settings.

    >>> teacher = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(3)}, {"x": lx.TensorSpec(("batch", 3), "float32")})
    >>> batches = [{"id": np.arange(3), "x": np.eye(3, dtype=np.float32)}]
    >>> lx.train.teach(teacher, batches, "answers", top_k=1).count
    3
    """
    header = _header(teacher, top_k, temperatures, output, dtype)
    if not isinstance(shard_rows, int) or shard_rows < 1:
        raise TrainingError(f"teach: shard_rows = {shard_rows!r}; expected at least 1")
    place = pathlib.Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with _locked(place):
            _write(place, header, teacher, data, id, shard_rows, progress or (lambda _: None))
    except OSError as error:
        raise TrainingError(f"{place}: {error.strerror or error}; what was stored stays") from error
    return Answers.load(place, verify=False)


def _header(
    teacher: Program | Deployed, top_k: int, temperatures: Sequence[float], output: str | None, dtype: str
) -> stored.Header:
    name = choose_output(teacher.outputs, output, "the teacher")
    spec = teacher.outputs[name]
    classes, positions = spec.shape[-1] if len(spec.shape) > 1 else None, spec.shape[1:-1]
    if not isinstance(classes, int) or not all(isinstance(size, int) for size in positions):
        raise TrainingError(
            f"the teacher's output {name!r} is {spec}; expected [rows, ..., classes], with fixed sizes but for the rows"
        )
    if not isinstance(top_k, int) or not 1 <= top_k <= classes:
        raise TrainingError(f"teach: top_k = {top_k!r}; the teacher has {classes} classes, so expected 1 to {classes}")
    if not temperatures or not all(is_number(value, 0, strictly=True) for value in temperatures):
        raise TrainingError(f"teach: temperatures = {temperatures!r}; expected numbers above 0")
    if dtype not in _DTYPES:
        raise TrainingError(f"teach: dtype = {dtype!r}; expected {' or '.join(_DTYPES)}")
    sizes = tuple(size for size in positions if isinstance(size, int))
    return stored.Header(
        digest=digest_of(teacher),
        output=name,
        classes=classes,
        positions=sizes,
        top_k=top_k,
        dtype=dtype,
        temperatures=tuple(float(value) for value in temperatures),
    )


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Generator[None, None, None]:
    with (folder / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainingError(f"{folder}: another process is writing answers there") from error
        yield


def _write(
    folder: pathlib.Path,
    header: stored.Header,
    teacher: Program | Deployed,
    data: Iterable[Mapping[str, Any]],
    id: str,
    shard_rows: int,
    progress: Callable[[int], None],
) -> None:
    known = _known_header(folder)
    if known is not None and known != header:
        fields = [name for name in header.__struct_fields__ if getattr(known, name) != getattr(header, name)]
        raise TrainingError(
            f"{folder} has answers with another {' and '.join(fields)}; give another folder, or delete this one"
        )
    if known is None:
        own = (_LOCK, f"{stored.PROGRESS}{stored.TEMPORARY}")
        if others := [path.name for path in folder.iterdir() if path.name not in own]:
            raise TrainingError(f"{folder} has other files, such as {sorted(others)[0]}; give a folder of its own")
        stored.write_json(folder / stored.PROGRESS, header)
    shards = stored.finished_shards(folder)
    done = {int(one) for shard in shards for one in stored.read_arrays(folder, shard)["ids"]}
    number = max((int(shard.name) for shard in shards), default=-1) + 1
    answer = _answering(teacher, header)
    waiting: list[dict[str, np.ndarray]] = []
    seen: set[int] = set()

    def flush() -> None:
        nonlocal number
        arrays = {name: np.concatenate([part[name] for part in waiting]) for name in stored.ARRAYS}
        shards.append(stored.write_shard(folder, number, arrays))
        number += 1
        waiting.clear()

    for count, batch in enumerate(data):
        ids = _ids(batch, id, f"batch {count}")
        twice = [one for one in ids.tolist() if one in seen or seen.add(one)]
        if twice:
            raise TrainingError(f"batch {count}: the id {twice[0]} occurs twice; each sample needs its own")
        new = np.array([one not in done for one in ids.tolist()], bool)
        if new.any():
            found = answer(batch)
            if len(found["logits"]) != len(ids):
                raise TrainingError(f"batch {count} has {len(ids)} ids and {len(found['logits'])} answers")
            _check_finite(found, ids, f"batch {count}")
            waiting.append({"ids": ids[new], **{name: leaf[new] for name, leaf in found.items()}})
            if sum(len(part["ids"]) for part in waiting) >= shard_rows:
                flush()
        progress(len(seen))
    if waiting:
        flush()
    if not shards:
        raise TrainingError("teach: the data is empty")
    stored.write_json(folder / stored.MANIFEST, stored.Contents(header=header, shards=tuple(shards)))
    (folder / stored.PROGRESS).unlink(missing_ok=True)


def _known_header(folder: pathlib.Path) -> stored.Header | None:
    for name in (stored.MANIFEST, stored.PROGRESS):
        path = folder / name
        if path.is_file():
            kind = stored.read_json(path, stored.Contents if name == stored.MANIFEST else stored.Header)
            header = kind.header if isinstance(kind, stored.Contents) else kind
            stored.check_format(header, folder)
            return header
    return None


def _answering(
    teacher: Program | Deployed, header: stored.Header
) -> Callable[[Mapping[str, Any]], dict[str, np.ndarray]]:
    """Make the function from a batch to the arrays of a shard, without ids."""
    names = tuple(teacher.inputs)
    if isinstance(teacher, Program):
        compiled = jax.jit(lambda weights, *inputs: teacher.named_outputs(weights, *inputs)[header.output])
        run = lambda batch: compiled(teacher.weights, *entries(batch, names))  # noqa: E731
    else:
        run = lambda batch: teacher(**dict(zip(names, entries(batch, names), strict=True)))[header.output]  # noqa: E731
    index = np.min_scalar_type(header.classes - 1)

    def answer(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        classes, logits, rest = jax.device_get(shorten(run(batch), header.top_k, header.temperatures))
        with np.errstate(over="ignore"):  # what float16 cannot hold is found not finite
            return {"indices": classes.astype(index), "logits": logits.astype(header.dtype), "rest": rest}

    return answer


def _ids(batch: Mapping[str, Any], id: str, where: str) -> np.ndarray:
    if not isinstance(batch, Mapping):
        raise TrainingError(f"{where} is a {type(batch).__name__}; expected a mapping of names to arrays")
    ids = np.asarray(entries(batch, (id,))[0])
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise TrainingError(f"{where}: {id!r} is {ids.dtype}{list(ids.shape)}; expected integers, one a row")
    return ids.astype(np.int64)


def _check_finite(found: Mapping[str, np.ndarray], ids: np.ndarray, where: str) -> None:
    # Minus infinity excludes a class.
    wrong = [np.isnan(found[name]) | np.isposinf(found[name]) for name in ("logits", "rest")]
    rows = np.any([part.reshape(len(ids), -1).any(-1) for part in wrong], 0)
    if rows.any():
        raise TrainingError(
            f"{where}: the teacher's answer to sample {ids[rows][0]} is NaN or infinite as {found['logits'].dtype}"
        )
