"""`leptonx sensitivity`: quantizes one weight at a time and ranks the errors."""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING, Any

import click

from lepton_xla.cli import _common

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lepton_xla.tuning import Sensitivity

DEFAULT_RECIPE = "int8"


@click.command()
@click.argument("target")
@click.option(
    "--recipe",
    default=DEFAULT_RECIPE,
    metavar="NAME|FILE.toml",
    help="Recipe whose [[quantize]] rules to apply: a preset (see `leptonx recipes`) or a TOML file. By default "
    f"{DEFAULT_RECIPE}.",
)
@_common.set_option
@_common.exclude_option
@click.option(
    "--metric",
    metavar="NAME",
    help="Rank by this metric of the ModelSpec's evaluate, such as accuracy, or by output: the relative error of the "
    "outputs on the calibration data. By default accuracy, else evaluate's first metric, else output.",
)
@click.option("--lower-is-better", is_flag=True, help="The metric is a loss: lower is better.")
@click.option("--top", type=click.IntRange(min=1), metavar="N", help="Print only the N most sensitive weights.")
@click.option(
    "--latency", is_flag=True, help="Also time each product alone, in float and quantized, at the smallest sizes."
)
@_common.buckets_option
@click.option("-o", "--output", metavar="FILE.json", help="Also write the full JSON document to this file.")
@click.option("--plot", metavar="FILE.png", help="Draw the ranking; needs matplotlib.")
@_common.json_option
def sensitivity(
    target: str,
    *,
    recipe: str,
    settings: tuple[str, ...],
    exclude: tuple[str, ...],
    metric: str | None,
    lower_is_better: bool,
    top: int | None,
    latency: bool,
    buckets: tuple[str, ...],
    output: str | None,
    plot: str | None,
    as_json: bool,
) -> None:
    """Quantize one weight of the model TARGET at a time and rank the weights by the resulting error.

    Each weight, and the activation it multiplies, is rounded by the recipe's rule for it. The model is then judged by
    the evaluate of its ModelSpec, and by how much its outputs on the calibration data change. Exclude the most
    sensitive weights from the recipe, or give them more bits.

    \b
      leptonx sensitivity digits.py:model
      leptonx sensitivity digits.py:model --set quantize.0.weights=int4 --set quantize.0.activations=none
      leptonx sensitivity digits.py:model --recipe w4a4.toml --metric output --top 10
      leptonx sensitivity digits.py:model --latency -o ranking.json --plot ranking.png
      leptonx sensitivity digits.py:model --json | jq -r '.sites[:3][].site'
    """
    given = _common.parse_buckets(buckets)
    figure = _common.figure() if plot is not None else None
    for path in (output, plot):
        _common.check_folder(path)
    with _common.progress() as step:
        step("load JAX")
        from lepton_xla.cli import _models
        from lepton_xla.tuning import sensitivity as measure

        chosen = _models.load_recipe(recipe, settings, exclude)
        step(f"load {target}")
        spec = _models.load_target(target)
        program = spec.program()
        sizes: list[dict[str, int]] = []
        if latency:
            bucket_sizes = _models.bucket_sizes(spec, program, given)
            sizes = [{symbol: min(bucket_sizes[symbol]) for symbol in program.symbols}]
        batches, _ = _models.calibration(spec, program)
        found = measure(
            program,
            chosen,
            calibration=batches,
            evaluate=(lambda predict: _models.evaluate(spec, predict)) if spec.evaluate is not None else None,
            metric=metric,
            lower_is_better=lower_is_better,
            sizes=sizes,
            progress=step,
        )
    document = {"target": target, **found.to_json()}
    if output is not None:
        _common.write(
            output, lambda: pathlib.Path(output).write_text(json.dumps(_common.plain(document), indent=2) + "\n")
        )
    if plot is not None and figure is not None:
        _common.write(plot, lambda: _draw(figure, document, top, plot))
    if as_json:
        _common.print_json(document)
    else:
        _print(document, top, found)


def _draw(figure: Any, document: Mapping[str, Any], top: int | None, path: str) -> None:
    """Draw one horizontal bar per weight, the most sensitive at the top."""
    sites = document["sites"][:top]
    figure.set_size_inches(9, 1.2 + 0.28 * len(sites))
    axes = figure.add_subplot()
    axes.barh([site["site"] for site in sites], [site["drop"] for site in sites], color="#3b6ea5")
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(_heading(document["metric"]))
    axes.set_title(f"{document['target']}: one weight at a time by recipe {document['recipe']}", loc="left")
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, bbox_inches="tight", dpi=150)


def _heading(metric: str) -> str:
    return "relative error of the outputs" if metric == "output" else f"loss of {metric}"


def _print(document: Mapping[str, Any], top: int | None, found: Sensitivity) -> None:
    sites, metric = document["sites"], document["metric"]
    judged = metric != "output"
    timed = any(site["latency_ratio"] is not None for site in sites)
    rules = sorted({site["decision"] for site in sites})
    columns = ["site"]
    columns += [f">{metric}", ">loss"] if judged else []
    columns += [">error", ">cosine", ">saved"] + ([">time"] if timed else []) + (["rule"] if len(rules) > 1 else [])

    def row(entry: Mapping[str, Any], name: str, rule: str) -> list[str]:
        cells = [name]
        cells += [f"{entry['metrics'][metric]:.6g}", f"{entry['drop']:+.3g}"] if judged else []
        cells += [_number(entry["output_error"], ".3g"), _number(entry["cosine"], ".6f")]
        cells += [_common.size(entry["bytes_saved"])] + ([_number(entry["latency_ratio"], ".2f")] if timed else [])
        return cells + ([rule] if len(rules) > 1 else [])

    rows = [row(entry, " ".join(entry["sites"]), entry["decision"]) for entry in sites[:top]]
    lines = [f"{len(sites) - len(rows)} less sensitive weights are not shown."] if len(rows) < len(sites) else []
    lines += [f"The rule: {rules[0]}."] if len(rules) == 1 else []
    if judged:
        lines.append(f"The float model has {metric} {document['float'][metric]:.6g}.")
    if document["together"]["output_error"] is not None:
        lines.append("error: relative error of the outputs on the calibration data.")
    if timed:
        lines.append("time: of the quantized product alone; float is 1.")
    lines += [f"{site} stays in float: {reason}" for site, reason in found.kept.items()]
    title = f"{document['target']}, recipe {document['recipe']}, one weight at a time, the most sensitive first"
    _common.show(
        _common.table(title, columns, rows, total=row(document["together"], "all together", "")),
        *lines,
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
