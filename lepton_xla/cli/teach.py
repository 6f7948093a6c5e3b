"""`leptonx teach`: stores a teacher's answers to data, for training a student."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from typing import Any

import click

from lepton_xla.cli import _common
from lepton_xla.errors import TrainingError


@click.command()
@click.argument("teacher", metavar="TARGET|ARTIFACT")
@click.argument("data", nargs=-1, required=True, metavar="DATA...")
@click.option("--top-k", type=click.IntRange(min=1), required=True, metavar="K", help="How many logits to keep.")
@click.option("-o", "--output", required=True, metavar="FOLDER", help="Where the answers go.")
@click.option(
    "--temperatures",
    default="1,2,4",
    show_default=True,
    metavar="T,T,...",
    help="Temperatures at which a student may learn from the answers.",
)
@click.option("--logits", metavar="NAME", help="The model's output with the logits; needed if it has several outputs.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="How logits are stored.",
)
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, metavar="N", help="Rows at a time.")
@_common.json_option
def teach(
    teacher: str,
    *,
    data: tuple[str, ...],
    top_k: int,
    output: str,
    temperatures: str,
    logits: str | None,
    dtype: str,
    batch: int,
    as_json: bool,
) -> None:
    """Store the answers of the model TARGET, or of an artifact, to the rows of DATA.

    A student then learns from the folder (`lx.train.distill(student, lx.train.Answers.load(FOLDER))`) without running
    the teacher. Each answer is the K largest logits, and one number for all others. If the command is interrupted, run
    it again: it goes on where it was.

    DATA are files as for `leptonx predict`: NAME=FILE.npy, FILE.npz or FILE.json. Several with the same names are
    joined, row after row. The entry `id` numbers the samples; without it they are numbered from 0.

    \b
      leptonx teach teacher.py:model train.npz --top-k 16 -o answers
      leptonx teach teacher.lepton ids=ids.npy mask=mask.npy --top-k 77 --temperatures 2 -o answers
    """
    wanted = _temperatures(temperatures)
    with _common.progress() as step:
        step("load JAX")
        from lepton_xla.cli import _models
        from lepton_xla.compiler import load
        from lepton_xla.train import teach as store

        step(f"load {teacher}")
        model = load(teacher) if os.path.isdir(teacher) else _models.load_target(teacher).program()
        step("read data")
        arrays = _read(data, model.inputs)
        rows = len(arrays["id"])
        found = store(
            model,
            _batches(arrays, batch, rows),
            output,
            top_k=top_k,
            temperatures=wanted,
            output=logits,
            dtype=dtype,
            progress=lambda done: step("answer", done, rows),
        )
    header = found.header
    size_bytes = sum(file.stat().st_size for file in found.folder.rglob("*") if file.is_file())
    if as_json:
        _common.print_json(
            {
                "folder": output,
                "samples": found.count,
                "classes": header.classes,
                "top_k": header.top_k,
                "temperatures": header.temperatures,
                "bytes": size_bytes,
                "digest": header.digest,
            }
        )
    else:
        click.echo(
            f"{output}: {found.count} answers, the {header.top_k} largest of {header.classes} logits each, "
            f"{_common.size(size_bytes)}"
        )


def _temperatures(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise TrainingError(f"--temperatures {text!r}: expected numbers above 0, such as 1,2,4") from None


def _read(sources: tuple[str, ...], specs: Mapping[str, Any]) -> dict[str, Any]:
    """Read the data: all arrays by name, rows joined, with the entry `id`."""
    import numpy as np

    from lepton_xla.cli import _arrays

    parts: dict[str, list[Any]] = {}
    for source in sources:
        for name, leaf in _arrays.as_declared(_arrays.read(source), specs).items():
            parts.setdefault(name, []).append(np.asarray(leaf))
    arrays: dict[str, Any] = {}
    for name, leaves in parts.items():
        if len({(leaf.shape[1:], leaf.dtype) for leaf in leaves}) > 1 or any(leaf.ndim == 0 for leaf in leaves):
            kinds = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves)
            raise TrainingError(f"the files' {name!r} cannot be joined row after row: {kinds}")
        arrays[name] = np.concatenate(leaves)
    missing = [name for name in specs if name not in arrays]
    if missing:
        raise TrainingError(f"the data has no {missing[0]!r}; the model takes it as {specs[missing[0]]}")
    rows = {name: len(leaf) for name, leaf in arrays.items()}
    if len(set(rows.values())) > 1:
        raise TrainingError(f"the data has these numbers of rows: {rows}; expected equal numbers")
    return {"id": np.arange(max(rows.values())), **arrays}


def _batches(arrays: Mapping[str, Any], size: int, rows: int) -> Generator[dict[str, Any], None, None]:
    for start in range(0, rows, size):
        yield {name: leaf[start : start + size] for name, leaf in arrays.items()}
