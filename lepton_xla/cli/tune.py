"""`leptonx tune`: finds the best recipe within constraints, by measurement."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from lepton_xla.cli import _common
from lepton_xla.errors import TuningError

if TYPE_CHECKING:
    from lepton_xla.compiler import Artifact
    from lepton_xla.modelspec import ModelSpec
    from lepton_xla.program import Program
    from lepton_xla.tuning import Trial, Tuning
    from lepton_xla.tuning.deployments import Deployments

# Rows of the table of ways to serve.
_SHOWN = 12


def _latencies(context: click.Context, option: click.Parameter, value: str | None) -> float | tuple[float, ...] | None:
    """Read milliseconds: one number for all buckets, or one for each."""
    if value is None:
        return None
    try:
        found = [float(each) for each in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r}: expected milliseconds, such as 3 or 0.5,3", context, option) from None
    return tuple(found) if len(found) > 1 else found[0]


@click.command()
@click.argument("target")
@click.option(
    "--max-drop",
    type=float,
    metavar="POINTS",
    help="By how much the metric may fall, in hundredths of it: 0.5 is half a point of accuracy.",
)
@click.option(
    "--max-bytes",
    metavar="BYTES",
    callback=_common.parse_bytes,
    help="Bytes of the weights on disk, such as 2MB or 800000.",
)
@click.option("--max-memory", metavar="BYTES", callback=_common.parse_bytes, help="Bytes of the weights in memory.")
@click.option(
    "--max-latency-ms",
    metavar="MS[,MS]",
    callback=_latencies,
    help="Milliseconds of a call, at every bucket; or several, one for each bucket, in order.",
)
@click.option(
    "--max-operations",
    metavar="N",
    callback=_common.parse_operations,
    help="Multiply-adds of a call at the smallest buckets, by weights that are not zero, such as 500k or 2.5M.",
)
@click.option(
    "--min-speedup",
    type=float,
    metavar="N",
    help="How many times as fast as the float model calls must be, the geometric mean over the buckets.",
)
@click.option(
    "--objective",
    type=click.Choice(["latency", "bytes", "memory", "operations", "metric"]),
    default="latency",
    show_default=True,
    help="What is to be least: time of a call, bytes on disk, bytes in memory, multiply-adds, or the drop of the "
    "metric.",
)
@click.option(
    "--minutes",
    type=float,
    default=10.0,
    show_default=True,
    help="Time for scoring, building, measuring, training and the artifact, after the model is loaded.",
)
@click.option("--trials", type=int, metavar="N", help="Measure at most N candidates.")
@click.option(
    "--train",
    metavar="TARGET",
    help="Also train candidates, with the data, optimizer and steps of this TrainSpec, in half of the minutes; needs "
    "the extra tune.",
)
@click.option("--trainings", type=int, metavar="N", default=30, show_default=True, help="Train at most N candidates.")
@click.option(
    "--storage",
    metavar="URL|FILE",
    help="Where Optuna keeps what was trained: a file, or a database such as sqlite:///study.db. Processes that share "
    "it share the trials. By default a file beside the journal.",
)
@click.option("--metric", help="The metric of --max-drop. By default accuracy, else the first that evaluate returns.")
@click.option("--lower-is-better", is_flag=True, help="The metric is a loss.")
@_common.buckets_option
@click.option("--seed", type=int, default=0, show_default=True, help="Of the split of the rows, and of the estimates.")
@click.option(
    "--journal",
    metavar="FILE.jsonl",
    help="Keep what is measured here. The same command goes on where a killed one was, and other constraints start "
    "from what is there.",
)
@click.option(
    "--new-journal",
    is_flag=True,
    help="Put a journal of another model, other data or another version aside, as FILE.jsonl.old, and begin a new one.",
)
@click.option("-o", "--output", metavar="FILE.toml", help="Write the best recipe here, for leptonx compile --recipe.")
@click.option("--artifact", metavar="PATH", help="Compile the best into an artifact.")
@click.option(
    "--key",
    type=click.Path(),
    metavar="FILE",
    help="Sign the artifact, and with it the certificate that it has, with this private key.",
)
@_common.overwrite_option
@click.option("--points", metavar="FOLDER", help="Write the recipe of every point of the frontier into this folder.")
@click.option(
    "--slo",
    metavar="p99=20ms",
    help="Also find the cheapest way to serve with requests that take at most this long: target, recipe, buckets and "
    "replicas. Needs --rate and --prices.",
)
@click.option("--rate", type=float, metavar="N", help="With --slo: requests of one row a second.")
@click.option(
    "--targets",
    default="cpu",
    metavar="T,T",
    show_default=True,
    help="With --slo: cpu (a machine like this one, measured), v5e:1x1, h100: predicted by their compilers.",
)
@click.option(
    "--prices",
    metavar="FILE.toml",
    help="With --slo: [per_hour] has the price of each target; [[measured]] times that were measured elsewhere.",
)
@click.option("--report", metavar="FILE.html", help="Write a page with a plot, a table and what each weight became.")
@_common.json_option
def tune(
    target: str,
    *,
    max_drop: float | None,
    max_bytes: int | None,
    max_memory: int | None,
    max_latency_ms: float | tuple[float, ...] | None,
    max_operations: int | None,
    min_speedup: float | None,
    objective: Any,
    minutes: float,
    trials: int | None,
    train: str | None,
    trainings: int,
    storage: str | None,
    metric: str | None,
    lower_is_better: bool,
    buckets: tuple[str, ...],
    seed: int,
    journal: str | None,
    new_journal: bool,
    output: str | None,
    artifact: str | None,
    key: str | None,
    overwrite: bool,
    points: str | None,
    slo: str | None,
    rate: float | None,
    targets: str,
    prices: str | None,
    report: str | None,
    as_json: bool,
) -> None:
    """Find the recipe for the model TARGET that is best at an objective and keeps to constraints.

    One pass over the calibration data estimates what every format would do to every weight. What is chosen by these
    estimates is built and measured whole, until constraints hold by measurement. Candidates are judged on one half of
    the rows of the ModelSpec's evaluate; the drop that is shown is that of the other half, with its 95 % interval.
    Ctrl-C ends the search and shows the best so far.

    \b
      leptonx tune digits.py:model --max-drop 0.5 --objective bytes -o small.toml
      leptonx tune digits.py:model --max-drop 0.5 --max-bytes 2MB --max-latency-ms 3 --minutes 10
      leptonx tune digits.py:model --max-bytes 20kB --objective metric --journal digits.jsonl --report digits.html
      leptonx tune digits.py:model --max-drop 0.5 --train train_digits.py:training --artifact small.lepton
      leptonx tune digits.py:model --max-drop 0.5 --slo p99=20ms --rate 500 --targets cpu,v5e:1x1 --prices prices.toml
      leptonx compile digits.py:model --recipe small.toml
    """
    given = _common.parse_buckets(buckets)
    if (slo is None) != (rate is None) or (slo is None) != (prices is None):
        raise click.UsageError("--slo, --rate and --prices belong together")
    _common.check_goes_with("train", "storage", "trainings")
    _common.check_goes_with("journal", "new_journal")
    _common.check_goes_with("artifact", "key", "overwrite")
    _common.check_goes_with("slo", "targets")
    if artifact is not None:
        _common.check_free(artifact, overwrite=overwrite)
    for path in (output, report, journal):
        _common.check_folder(path)
    if points is not None and not pathlib.Path(points).is_dir():
        _common.check_folder(points)
        if pathlib.Path(points).exists():
            raise click.UsageError(f"--points {points} is a file; give a folder")
    with _common.progress() as step:
        step("load JAX")
        from lepton_xla import compiler
        from lepton_xla.cli import _models
        from lepton_xla.compiler.names import check_name
        from lepton_xla.train import TrainSpec
        from lepton_xla.trust.keys import signing_key
        from lepton_xla.tuning import Budget, Constraints
        from lepton_xla.tuning import tune as search
        from lepton_xla.tuning.constraints import check_objective
        from lepton_xla.tuning.pages import page

        # Everything that does not need the model first, so that a typo fails early.
        name = "" if artifact is None else check_name(pathlib.PurePath(artifact).name.removesuffix(".lepton"))
        if key is not None:
            signing_key(key)
        constraints = Constraints(max_drop, max_bytes, max_memory, max_latency_ms, max_operations, min_speedup)
        check_objective(objective, constraints)
        cheapest = None
        if slo is not None and rate is not None and prices is not None:
            step(f"find the compilers of {targets}")
            cheapest = _cheapest(slo, rate, targets, prices)
        budget = Budget(minutes, trials, trainings, rebuild=artifact is not None)
        step(f"load {target}")
        spec = _models.load_target(target)
        training = None if train is None else _models.load_target(train, TrainSpec)
        if spec.evaluate is None:
            raise TuningError(f"{target} has no evaluate; add evaluate=..., a function of predict, to its ModelSpec")
        program = spec.program()
        batches, _ = _models.calibration(spec, program)
        if batches is None and program.generation is not None and spec.calibration is not None:
            raise TuningError(
                f"{target} generates, and its calibration data are prompts; tune a program of one step, as "
                "examples/apps/service/targets.py does"
            )
        if batches is None:
            raise TuningError(f"{target} has no calibration data; add calibration=... to its ModelSpec")
        sizes = _models.bucket_sizes(spec, program, given)
        found = search(
            program,
            lambda predict: _models.evaluate(spec, predict),
            batches,
            constraints=constraints,
            objective=objective,
            budget=budget,
            metric=metric,
            lower_is_better=lower_is_better,
            buckets=sizes,
            seed=seed,
            journal=journal,
            progress=step,
            training=training,
            storage=storage,
            new_journal=new_journal,
        )
    if not as_json:  # before anything that takes long, or may fail
        _print(target, found)
    served = None
    try:
        with _common.progress() as step:
            if output is not None and found.best is not None:
                text = found.best.recipe
                _common.write(output, lambda: pathlib.Path(output).write_text(text, encoding="utf-8"))
            if points is not None:
                _common.write(points, lambda: _write_points(pathlib.Path(points), found))
            if report is not None:
                _common.write(report, lambda: pathlib.Path(report).write_text(page(target, found), encoding="utf-8"))
            if artifact is not None and found.best is not None:
                step(f"build {found.best.name} again")
                made = _compiled(spec, found, sizes, name, step)
                made.save(artifact, overwrite=overwrite)
                if key is not None:
                    compiler.sign(artifact, key=key)
            served = None if cheapest is None else cheapest(program, found, step)
    finally:  # one document: with all that there is, also where something has failed
        if as_json:
            more = {} if served is None else {"deployments": dataclasses.asdict(served)}
            _common.print_json({"target": target, **found.to_json(), **more})
    if served is not None and slo is not None and not as_json:
        _print_served(served, slo)
    if found.best is None:
        why = next((f": {trial.failure}" for trial in found.trials if trial.failure), "")
        nearest = f"the nearest is {found.nearest.name}" if found.nearest is not None else f"nothing was measured{why}"
        raise TuningError(f"no recipe that was measured keeps to the constraints; {nearest}")


type _Cheapest = Callable[[Program, Tuning, _common.Step], Deployments]


def _cheapest(slo: str, rate: float, targets: str, prices: str) -> _Cheapest:
    """Checks what is asked for, and returns what finds the cheapest way to serve what was tuned."""
    from lepton_xla.tuning.deployments import CPU, Prices, Slo, deploy, predicted_us, why_unknown
    from lepton_xla.tuning.trials import as_loaded

    limit, priced = Slo.parse(slo), Prices.load(prices)
    names = list(dict.fromkeys(each.strip() for each in targets.split(",") if each.strip()))
    # Before anything is tuned: a target without a price, or a rate that is none.
    deploy({}, lambda _target, _recipe: {}, targets=names, prices=priced, slo=limit, rate=rate)
    unknown = {each: why_unknown(each, priced) for each in names}
    for name, why in unknown.items():
        if why and name != CPU and not any(each.target == name for each in priced.measured):
            click.echo(f"{name}: {why}", err=True)

    def find(program: Program, found: Tuning, step: _common.Step) -> Deployments:
        shape = next(iter(program.inputs.values())).shape
        batch = shape[0] if shape and isinstance(shape[0], str) else None
        holding = [each for each in found.trials if each.excess(found.constraints) == 0]
        chosen = {each.name: each for each in (*holding, *([found.best] if found.best is not None else []))}

        def by_rows(values: Sequence[float]) -> dict[int, float]:
            """Rows of a call -> its microseconds, the longest where several sizes have as many rows."""
            times: dict[int, float] = {}
            for at, us in zip(found.sizes, values, strict=True):
                rows = at.get(batch, 1) if batch is not None else 1
                times[rows] = max(us, times.get(rows, 0.0))
            return times

        here = {name: by_rows(each.us) for name, each in chosen.items()}
        if chosen:
            here = {"float": by_rows(next(iter(chosen.values())).float_us), **here}

        @functools.cache
        def built(recipe: str) -> Program:
            if recipe == "float":
                return program
            if chosen[recipe].training and chosen[recipe] != found.best:
                raise TuningError("of what was trained, times are predicted of the best only: others take a training")
            step(f"build {recipe} again, for compilers that predict its times")
            return as_loaded(found.build(chosen[recipe]))

        def predict(target: str, recipe: str) -> dict[int, float]:
            step(f"predict and simulate servers of {recipe} on {target}")
            if target == CPU and recipe in chosen and "latency" in chosen[recipe].estimates:
                share = chosen[recipe].estimates["latency"]
                return by_rows([share * us for us in chosen[recipe].float_us])
            if unknown[target]:
                raise TuningError(unknown[target])
            return by_rows([predicted_us(built(recipe), at, target) for at in found.sizes])

        return deploy(here, predict, targets=names, prices=priced, slo=limit, rate=rate)

    return find


def _print_served(served: Deployments, slo: str) -> None:
    money = f">{served.currency} a million"
    columns = ("target", "mesh", "recipe", "buckets", ">replicas", f">{slo.partition('=')[0]}", money, "times")
    rows = [
        [
            each.target, each.mesh, each.recipe, ",".join(map(str, each.buckets)), str(each.replicas),
            _common.seconds(each.seconds), f"{each.per_million:.4g}", each.source,
        ]
        for each in served.found[:_SHOWN]
    ]  # fmt: skip
    more = len(served.found) - len(rows)
    title = f"the cheapest ways to serve within {slo}" if rows else f"nothing serves within {slo}"
    reasons = {f"{target}: {why}" for target, _, why in served.refused}
    shares: dict[str, list[float]] = {}
    for each, _, _, predicted, measured in served.compared:
        shares.setdefault(each, []).append(predicted / measured)
    off = [
        f"{each}: {len(found)} calls were predicted and measured; predictions were {min(found):.2f} to "
        f"{max(found):.2f} times what was measured, the median {statistics.median(found):.2f} times"
        for each, found in shares.items()
    ]
    others = [f"and {more} dearer ones, which --json shows"] if more > 0 else []
    _common.show(_common.table(title, columns, rows), *others, *sorted(reasons), *off)
    if not off:
        _common.show("Nothing was both predicted and measured, so how far predictions are off is not known.")


def _compiled(
    spec: ModelSpec, found: Tuning, sizes: Mapping[str, Sequence[int]], name: str, step: _common.Step
) -> Artifact:
    """The artifact of the best, with its recipe, the profile of the calibration data and a certificate."""
    import msgspec

    from lepton_xla import compiler
    from lepton_xla.cli import _models
    from lepton_xla.compiler.weights import stored_bytes
    from lepton_xla.recipe import Recipe
    from lepton_xla.trees import name_leaves

    assert found.best is not None
    program = found.build()
    batches, examples = _models.calibration(spec, program)
    # `leptonx learn` lowers what it has learned by the recipe that it finds in the artifact.
    recipe = msgspec.to_builtins(Recipe.parse(found.best.recipe, name=found.best.name))
    step(f"compile {found.best.name}")
    made = compiler.compile(program, sizes, name=name, examples=examples, recipe=recipe).with_profile(batches or ())
    step(f"certify {found.best.name}")
    weights_bytes = stored_bytes(name_leaves(program.weights))
    return made.with_certificate(found.certify(made.servable(), weights_bytes))


def _write_points(folder: pathlib.Path, found: Tuning) -> None:
    folder.mkdir(exist_ok=True)
    for trial in found.frontier:
        (folder / f"{trial.name}.toml").write_text(trial.recipe, encoding="utf-8")


def _print(target: str, found: Tuning) -> None:
    from lepton_xla.tuning.summaries import summary

    columns = (
        "recipe", "from", f">{found.metric}", "drop on rows held back", ">on disk", ">in memory",
        ">operations", ">time", "",
    )  # fmt: skip
    marks = {trial.name: "on the frontier" for trial in found.frontier}
    if found.best is not None:
        marks[found.best.name] = "the best"
    rows = [_row(trial, found.metric, marks.get(trial.name, "")) for trial in found.trials]
    sites = [f"{site}: {became}" for site, became in found.best.choices.items()] if found.best is not None else []
    title = f"{target}: {len(rows)} recipe{'s' * (len(rows) != 1)} measured"
    _common.show(_common.table(title, columns, rows), *summary(found), *sites)


def _row(trial: Trial, metric: str, mark: str) -> list[str]:
    if trial.failure:
        return [trial.name, trial.origin, "", "", "", "", "", "", f"failed: {trial.failure}"]
    return [
        trial.name,
        trial.origin,
        f"{trial.metrics[metric]:.6g}",
        str(trial.reported),
        _common.size(trial.bytes),
        _common.size(trial.memory),
        _common.short(trial.operations),
        f"{trial.latency:.2f}",
        mark,
    ]
