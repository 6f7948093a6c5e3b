"""`leptonx eval`: metrics of models side by side, on the same rows."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from lepton_xla.cli import _common
from lepton_xla.errors import InputError, ModelError

if TYPE_CHECKING:
    from lepton_xla.cli._contestants import Contestants
    from lepton_xla.evaluation import Comparison


@click.command(name="eval")
@click.argument("models", nargs=-1, required=True)
@click.option(
    "--recipe",
    "recipes",
    multiple=True,
    metavar="NAME|FILE.toml",
    help="Also the model of the first FILE.py:NAME, optimized by this recipe. Repeatable.",
)
@click.option(
    "--rows",
    "file",
    metavar="FILE.npz",
    help="Labelled rows: arrays by the names of inputs, and `label`, the class of each row. By default `rows` of the "
    "ModelSpec.",
)
@click.option("--output", metavar="NAME", help="The output that is judged. By default the first with classes.")
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Rows of a call.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the bootstrap.")
@click.option("--report", metavar="FILE.html", help="Write a page with plots: calibration, lost classes, confusion.")
@_common.json_option
def eval(
    models: tuple[str, ...],
    *,
    recipes: tuple[str, ...],
    file: str | None,
    output: str | None,
    batch: int,
    seed: int,
    report: str | None,
    as_json: bool,
) -> None:
    """Evaluate MODELS on the same rows, and compare them with the first.

    Each is a float model (FILE.py:NAME), an artifact, or a model on a server (http://HOST:PORT/NAME). On labelled rows
    there are accuracy, recall, precision, F1, AUC and calibration error with 95 % intervals, paired for differences;
    which classes lost; confusion; time and size. The metrics of the ModelSpec's evaluate are shown beside them.

    \b
      leptonx eval digits.py:model digits.lepton
      leptonx eval digits.py:model digits.lepton --json | jq .difference.accuracy
      leptonx eval digits.py:model --recipe int8 --recipe int4 --report digits.html
      leptonx eval digits.lepton http://127.0.0.1:8000/digits --rows test.npz
    """
    _common.check_folder(report)
    with _common.progress() as step, contextlib.ExitStack() as stack:
        step("load JAX")
        from lepton_xla.cli import _contestants
        from lepton_xla.evaluation import compare, page

        made = _contestants.load_all(models, recipes, stack, step)
        rows = _contestants.rows_of(made, file)
        judged = made.judged(step)
        if rows is None and not any(judged.values()):
            where = f"rows=... or evaluate=... to the ModelSpec of {made.target}, or " if made.spec is not None else ""
            raise ModelError(f"there is nothing to evaluate on: add {where}--rows FILE.npz")
        if rows is None and report is not None:
            raise InputError("--report needs labelled rows: add rows=... to the ModelSpec, or --rows FILE.npz")
        found = None
        if rows is not None:
            inputs, labels = rows
            found = compare(
                {each.name: each.predict for each in made.models},
                inputs,
                labels,
                output=output,
                batch=batch,
                seed=seed,
                resources={each.name: each.resources for each in made.models},
                progress=step,
            )
            if report is not None:
                text = page(", ".join(each.name for each in made.models), found)
                _common.write(report, lambda: pathlib.Path(report).write_text(text, encoding="utf-8"))
    if as_json:
        _common.print_json(_document(made, judged, found))
    else:
        _print(made, judged, found)


def _document(made: Contestants, judged: Mapping[str, Mapping[str, float]], found: Comparison | None) -> dict[str, Any]:
    document: dict[str, Any] = {"models": [each.name for each in made.models]}
    if made.spec is not None:
        document["target"] = made.target
    figures = list(judged.values())
    if found is not None and not any(figures):
        figures = [dict(side.figures.metrics) for side in found.sides]
    if len(figures) == 2:
        before, after = figures
        difference = {name: after[name] - before[name] for name in before if name in after}
        document |= {"path": made.models[1].name, "route": made.models[1].route}
        document |= {"float": before, "artifact": after, "difference": difference}
    document["evaluate"] = dict(judged)
    document["comparison"] = found.to_json() if found is not None else None
    return document


def _print(made: Contestants, judged: Mapping[str, Mapping[str, float]], found: Comparison | None) -> None:
    baseline = made.models[0]
    for each in [] if not any(judged.values()) else made.models[1:] or [baseline]:
        rows = _common.metric_rows(judged[baseline.name], judged[each.name])
        if each is baseline:
            _common.show(_common.table(each.name, ("metric", ">value"), [row[:2] for row in rows]))
        else:
            head = ("metric", ">float" if baseline.kind == "program" else ">first", f">{each.kind}", ">difference")
            _common.show(_common.table(f"{each.name} against {made.target or baseline.name}", head, rows))
    if found is None:
        return
    rows: list[tuple[str, ...]] = []
    for name in found.sides[0].figures.metrics:
        for side in found.sides:
            value, paired = side.differences.get(name, (0.0, None))
            said = f"{value:+.4f}" + (f" ({paired.low:+.4f} to {paired.high:+.4f})" if paired is not None else "")
            rows.append(
                (
                    name.replace("_", " "),
                    side.name,
                    f"{side.figures.metrics[name]:.4f}",
                    str(side.intervals.get(name, "")),
                    said if side.differences else "",
                )
            )
    columns = ("metric", "model", ">value", ">95 % interval", ">difference (paired 95 %)")
    _common.show(
        _common.table(f"{found.rows:,} rows, output {found.output}", columns, rows),
        "Accuracy: Wilson, and Newcombe for paired differences. Others: bootstrap of rows, percentiles.",
    )
    for side in found.sides[1:]:
        lost = [each for each in side.damage if each.difference < 0][:8]
        cells = [
            (each.label, each.rows, f"{each.before:.4f}", f"{each.after:.4f}", each.lost, each.gained,
             "surely" if each.surely else "within chance")
            for each in lost
        ]  # fmt: skip
        if cells:
            head = (">class", ">rows", ">recall before", ">after", ">lost", ">gained", "")
            _common.show(_common.table(f"classes that lost most in {side.name}", head, cells))
    sizes = list(found.sides[0].latency)
    kinds = list(dict.fromkeys(kind for side in found.sides for kind in side.resources))
    costs = [
        (
            side.name,
            *(f"{_common.seconds(side.latency[size][0])} ({_common.seconds(side.latency[size][1])})" for size in sizes),
            _common.seconds(side.cpu_s),
            *(_common.size(side.resources[kind]) if kind in side.resources else "" for kind in kinds),
        )
        for side in found.sides
    ]
    head = ("model", *(f">{size} row{'s' * (size > 1)} (p99)" for size in sizes), ">processor\na row")
    _common.show(_common.table("time and size", (*head, *(f">{kind.replace('_', ' ')}" for kind in kinds)), costs))
