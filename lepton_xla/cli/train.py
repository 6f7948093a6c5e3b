"""`leptonx train`: trains a model, compresses it on the way, and compiles it into an artifact."""

from __future__ import annotations

import math
import os
import pathlib
from typing import Any

import click

from lepton_xla.cli import _common


@click.command()
@click.argument("target")
@click.option(
    "--recipe",
    metavar="NAME|FILE.toml",
    help="Compress with this recipe meanwhile; replaces the TrainSpec's compression.",
)
@_common.set_option
@_common.exclude_option
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="Number of steps; by default the TrainSpec's.")
@click.option(
    "--teacher",
    metavar="TARGET|FOLDER",
    help="Learn from the logits of this model (FILE.py:NAME, a ModelSpec), or from the answers that `leptonx teach` "
    "stored in this folder.",
)
@_common.mesh_option
@_common.rules_option
@click.option("--checkpoint", metavar="FOLDER", help="Save the run here, and go on with what is saved here.")
@click.option("--every", type=click.IntRange(min=1), metavar="N", help="Steps between checkpoints; by default 500.")
@click.option(
    "--resume/--no-resume",
    default=True,
    help="Whether a run that the folder has is continued; without it a folder that has one is refused.",
)
@click.option("--seed", type=int, help="Seed of dropout and the like; by default 0.")
@click.option("--log", metavar="FILE.jsonl", help="Append metrics to this file.")
@click.option("--tensorboard", metavar="FOLDER", help="Write TensorBoard events; needs tensorboardX.")
@_common.artifact_options
@_common.json_option
def train(
    target: str,
    *,
    recipe: str | None,
    settings: tuple[str, ...],
    exclude: tuple[str, ...],
    steps: int | None,
    teacher: str | None,
    mesh: str | None,
    rules: str | None,
    checkpoint: str | None,
    every: int | None,
    resume: bool,
    seed: int | None,
    log: str | None,
    tensorboard: str | None,
    buckets: tuple[str, ...],
    output: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Train the model of the TrainSpec TARGET, compress it meanwhile, and compile it into an artifact.

    With --recipe, channels are removed after a fifth of the steps, elements are pruned until half of them, and the
    second half rounds weights and activations as they will be served; what the recipe has no block for does not happen.
    A run that was interrupted goes on with the same command. On SIGTERM it saves and exits with code 75.

    \b
      leptonx train digits.py:training --steps 500 -o digits.lepton
      leptonx train digits.py:training --recipe int8 --checkpoint runs/1 -o digits.lepton
      leptonx train digits.py:training --recipe shrink50 --teacher digits.py:model
      leptonx train digits.py:training --mesh data=-1 --log metrics.jsonl
      leptonx launch local --processes 2 -- leptonx train digits.py:training --mesh data=-1 --checkpoint runs/2
    """
    given = _common.parse_buckets(buckets)
    if output is not None:
        _common.check_free(output, overwrite=overwrite)
    _common.check_goes_with("recipe", "settings", "exclude")
    _common.check_goes_with("checkpoint", "every", *([] if resume else ["resume"]))

    from lepton_xla import launch
    from lepton_xla import train as training

    launch.initialize()
    import jax

    from lepton_xla.cli import _models
    from lepton_xla.sharding import Rules
    from lepton_xla.train.agreement import Agreement

    # Check everything that does not need the model first, so that a typo fails early.
    chosen = None if recipe is None else _models.load_recipe(recipe, settings, exclude)
    spec = _models.load_target(target, training.TrainSpec)
    count = steps or spec.steps
    model = spec.trained()
    compression = spec.compression if chosen is None else training.schedule(chosen, count)
    if teacher is None:
        loss = spec.loss or training.supervised(model)
    elif os.path.isdir(teacher):
        loss = training.distill(model, training.Answers.load(teacher))
    else:
        loss = training.distill(model, _models.load_target(teacher).program())
    own = {"every": every} if every else {}
    kept = None if checkpoint is None else training.Checkpoints(checkpoint, resume=resume, **own)
    given_here = {
        "mesh": mesh,
        "rules": None if rules is None else Rules.load(rules),
        "log": log,
        "tensorboard": tensorboard,
        "seed": seed,
    }
    options: dict[str, Any] = {"progress": True, **spec.options}
    options |= {name: value for name, value in given_here.items() if value is not None}
    result = training.fit(
        model,
        loss,
        spec.updates(count),
        spec.data,
        steps=count,
        evaluate=spec.evaluation(count),
        compression=compression,
        checkpoint=kept,
        **options,
    )
    # The first process makes the artifact. At its end a process waits five minutes for the others, and then aborts.
    launch.beat(count, "compile")
    ended = Agreement(math.inf)
    if jax.process_index() != 0:
        ended.first("")
        return
    document: dict[str, Any] = {
        "steps": int(result.state.step),
        "stopped": result.stopped,
        "best_step": result.best_step,
        "metrics": result.metrics,
        "evaluations": list(result.history),
        "weights_bytes_float": model.program.weights_bytes,
        "weights_bytes": result.program.weights_bytes,
    }
    if output is not None:
        from lepton_xla.optimization.pipeline import grid

        sizes = dict.fromkeys(result.program.symbols, (1, 8, 32)) | {**spec.buckets, **given}
        program = result.program
        if result.stage.plan is not None:
            program = result.quantized(sizes=grid(program, sizes))
        document["weights_bytes"] = program.weights_bytes
        document["path"] = output
        _write(program, sizes, output, overwrite=overwrite)
    if as_json:
        _common.print_json(document)
    else:
        _print(document)
    ended.first("")


def _write(program: Any, buckets: dict[str, tuple[int, ...]], output: str, *, overwrite: bool) -> None:
    from lepton_xla import compiler
    from lepton_xla.compiler.names import check_name

    name = check_name(pathlib.PurePath(output).name.removesuffix(".lepton"))
    compiler.compile(program, buckets, name=name).save(output, overwrite=overwrite)


def _print(document: dict[str, Any]) -> None:
    last = document["evaluations"][-1] if document["evaluations"] else document["metrics"]
    figures = "  ".join(f"{name} {value:.4g}" for name, value in last.items() if name != "step")
    before, after = document["weights_bytes_float"], document["weights_bytes"]
    click.echo(f"{document['steps']} steps, stopped by {document['stopped']}: {figures}")
    click.echo(f"weights: {before:,} -> {after:,} bytes ({before / max(after, 1):.1f} times smaller)")
    if "path" in document:
        click.echo(f"wrote {document['path']}")
