"""`leptonx learn`: trains a model on from sampled requests and their feedback, and has a server take the result."""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from typing import TYPE_CHECKING, Any

import click

from lepton_xla.cli import _common
from lepton_xla.errors import LearningError, LeptonError, first_line

if TYPE_CHECKING:
    from lepton_xla.learning import Learner
    from lepton_xla.learning.rounds import Round
    from lepton_xla.learning.tracking import Window

_EVERY = "10m"


@click.command()
@click.argument("target")
@click.option("--samples", required=True, metavar="DIR", help="What `leptonx serve --samples` was given.")
@click.option(
    "--base",
    required=True,
    metavar="NAME.lepton",
    help="The artifact that is served, or was first: its code runs the new weights, its recipe makes them.",
)
@click.option("--server", metavar="URL", help="Where to push the result.")
@click.option("--model", metavar="NAME", help="Its name on the server; by default the artifact's.")
@click.option(
    "--folder",
    default="learning",
    show_default=True,
    metavar="FOLDER",
    help="Where the learner keeps its weights and the round under way; it goes on with what is there.",
)
@click.option(
    "--checkpoint",
    metavar="FOLDER",
    help="Begin with the weights of the run that `leptonx train --checkpoint` saved here; by default with the "
    "float master of --base, if `leptonx compile --keep-master` kept one, else with the TrainSpec's own.",
)
@click.option("--once/--loop", default=True, show_default=True, help="One round, or one after another.")
@click.option(
    "--every", metavar="DURATION", help=f"With --loop: time between rounds, such as 10m; by default {_EVERY}."
)
@click.option("--steps", type=click.IntRange(min=1), help="Steps of each round; by default the TrainSpec's.")
@click.option("--fresh", type=float, default=0.5, show_default=True, help="Share of a batch that is samples.")
@click.option("--held-out", type=float, default=0.2, show_default=True, help="Share of the samples that only judges.")
@click.option("--least-rows", type=int, default=200, show_default=True, help="New labelled rows that a round needs.")
@click.option(
    "--max-drop", type=float, default=0.02, show_default=True, help="How far a metric on old data may get worse."
)
@click.option(
    "--lower-is-better",
    multiple=True,
    metavar="METRIC",
    help="A metric on old data that is better when it is smaller, as the one of an Evaluation whose mode is min, and "
    "those whose names hold loss, error or perplexity, are anyway. Repeatable.",
)
@click.option(
    "--rollout",
    metavar="FILE.json",
    help="`stages`, `rollback` and `promote` of the rollout; by default the server's own.",
)
@click.option("--direct", is_flag=True, help="Promote as soon as the version is loaded, without a rollout.")
@click.option(
    "-o",
    "--output",
    metavar="NAME.lepton",
    help="Instead of --server: where to write what is better than --base, with which each round begins.",
)
@_common.overwrite_option
@click.option("--plot", metavar="FILE.png", help="Draw accuracy over time; needs lepton-xla[plot].")
@click.option("--key", metavar="FILE", help="Sign the result with this private key, for `leptonx serve --trust`.")
@click.option(
    "--token-file",
    metavar="FILE",
    help="File with the token for the server, of the scope admin. By default $LEPTON_TOKEN.",
)
@click.option("--tls-ca", metavar="FILE", help="Certificates (PEM) to trust.")
@_common.json_option
def learn(
    target: str,
    *,
    samples: str,
    base: str,
    server: str | None,
    model: str | None,
    folder: str,
    checkpoint: str | None,
    once: bool,
    every: str | None,
    steps: int | None,
    fresh: float,
    held_out: float,
    least_rows: int,
    max_drop: float,
    lower_is_better: tuple[str, ...],
    rollout: str | None,
    direct: bool,
    output: str | None,
    overwrite: bool,
    plot: str | None,
    key: str | None,
    token_file: str | None,
    tls_ca: str | None,
    as_json: bool,
) -> None:
    """Train the model of the TrainSpec TARGET on from sampled requests with feedback, and push what is better.

    Each round reads the samples, keeps a share of them to judge by, trains on the others mixed with old data, lowers
    the weights as the served artifact's were, and compares: the result must be right more often on the samples held
    out, beyond chance, and as good on old data. Only then it is pushed as weights alone, which the server runs without
    compiling, and rolled out: as a shadow, to a share of the requests, to all; or back. Of a model that generates,
    right replies are learned; its TrainSpec says by `examples` what they are in a batch.

    It may be killed at any time: the server goes on, and the same command goes on where it was.

    \b
      leptonx serve MODELS --samples kept
      leptonx learn digits.py:training --samples kept --base digits.lepton --server http://127.0.0.1:8000
      leptonx learn digits.py:training --samples kept --base digits.lepton --server URL --loop --every 10m
      leptonx learn digits.py:training --samples kept --base digits.lepton -o better.lepton
    """
    if every is not None and once:
        raise click.UsageError("--every is for rounds one after another; give --loop too")
    seconds = _common.duration(every or _EVERY, "--every")
    if not seconds:
        raise click.UsageError(f"--every {every}: leave some time between rounds, such as 10s")
    if (server is None) == (output is None):
        raise click.UsageError("give --server to push the result, or --output to keep it")
    _common.check_goes_with("server", "direct", "rollout", "token_file", "tls_ca")
    _common.check_goes_with("output", "overwrite")
    if output is not None:
        _common.check_free(output, overwrite=overwrite)
        if not once and not overwrite:
            raise click.UsageError("--loop writes --output once a round; give --overwrite too")
    _common.check_folder(plot)
    figure = None if plot is None else _common.figure()

    from lepton_xla import train as training
    from lepton_xla.learning import Learner, LearningPlan
    from lepton_xla.learning.pushing import Push
    from lepton_xla.serve.client.repository import RepositoryClient

    plan = LearningPlan(
        steps=steps, fresh=fresh, held_out=held_out, least_rows=least_rows, max_drop=max_drop,
        lower_is_better=lower_is_better, direct=direct,
        **({} if rollout is None else _rollout(rollout)),
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        step = stack.enter_context(_common.progress())
        step("load JAX")
        from lepton_xla.cli import _models

        spec = _models.load_target(target, training.TrainSpec)
        push = None
        if server is not None:
            client = stack.enter_context(
                RepositoryClient(server, token_file=token_file, tls_ca=tls_ca, timeout_s=120.0)
            )
            push = Push(client, model or _name_of(base))
        learner = Learner(spec, base, samples, folder, push=push, plan=plan, trained=checkpoint, key=key, tell=step)
        while True:
            ended: Round | None = None
            try:
                ended = learner.once(output, overwrite=overwrite)
            except LeptonError as error:
                if once:
                    raise
                click.echo(f"leptonx: {first_line(error)}", err=True)
            if ended is not None:
                _tell(ended, learner, as_json=as_json, output=output, one=once)
            if figure is not None and plot is not None:
                _draw(figure, plot, learner)
            if once:
                break
            step(f"wait {every or _EVERY}")
            time.sleep(seconds)


def _name_of(base: str) -> str:
    from lepton_xla.files.copies import listing_of

    return listing_of(pathlib.Path(base))[0].name


def _rollout(path: str) -> dict[str, Any]:
    """What of a rollout a file says."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise LearningError(f"{path} cannot be read: {first_line(error)}") from error
    known = ("stages", "rollback", "promote")
    if not isinstance(found, dict) or not set(found) <= set(known):
        raise LearningError(f"{path}: expected an object with {', '.join(known)}")
    for name, value in found.items():
        if not isinstance(value, list):
            raise LearningError(f"{path}: {name} = {value!r:.80}; expected a list")
    return {name: tuple(value) for name, value in found.items()}


def _tell(ended: Round, learner: Learner, *, as_json: bool, output: str | None, one: bool) -> None:
    windows = learner.tracked()
    if as_json:
        import msgspec

        document = {**msgspec.to_builtins(ended), "accuracy": [window._asdict() for window in windows]}
        if output is not None and ended.phase == "kept":
            document["path"] = output
        _common.print_json(document, line=not one)
        return
    kept = f" as {output}" if output is not None and ended.phase == "kept" else ""
    version = f", version {ended.version}" if ended.version else ""
    click.echo(f"round {ended.number}: {ended.phase}{kept}{version}: {ended.reason}")
    for note in ended.notes:
        click.echo(f"  {note}")
    rows = [
        (time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.start_s)), each.rows, f"{each.accuracy:.1%}",
         ", ".join(each.versions))
        for each in windows
    ]  # fmt: skip
    if not rows:
        _common.show(
            "Of no answer is known whether it was right: samples without their outputs, or with hashes of them."
        )
        return
    _common.show(_common.table("accuracy of what was answered", ("from", ">rows", ">accuracy", "version"), rows))


def _draw(figure: Any, path: str, learner: Learner) -> None:
    """Accuracy over time, with the rounds that promoted a version."""
    windows: list[Window] = learner.tracked()
    figure.clear()
    axes = figure.add_subplot()
    begun_s = windows[0].start_s if windows else 0.0
    axes.plot([(each.stop_s - begun_s) / 60 for each in windows], [each.accuracy for each in windows], marker="o")
    for ended in learner.history():
        if ended.phase == "promoted":
            axes.axvline((ended.ended_s - begun_s) / 60, linestyle="--", color="gray")
    axes.set(xlabel="minutes", ylabel="accuracy of what was answered", ylim=(0, 1.02))
    _common.write(path, lambda: figure.savefig(path))
