"""`leptonx weights`: artifacts of weights alone, for compiled code that is loaded already."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from lepton_xla.cli import _common, _repositories

if TYPE_CHECKING:
    from collections.abc import Callable

    from lepton_xla.compiler import Servable
    from lepton_xla.program import Program
    from lepton_xla.serve.client.repository import RepositoryClient
    from lepton_xla.serve.models.repository import Repository


@click.group()
def weights() -> None:
    """Make artifacts of weights alone, which a server puts into compiled code that it runs already.

    New weights of a model that was trained further need no compilation, and a server that has the model loaded needs
    memory for the weights only. They must be stored as those before: the same names, shapes, dtypes and formats, in the
    same program. What does not fit is refused, by name.

    \b
      leptonx weights make digits.lepton digits.py:model -o new.lepton    the model with its weights of today
      leptonx weights make digits.lepton digits2.lepton -o new.lepton     the weights of another artifact
      leptonx weights make digits.lepton float.npz -o new.lepton          float weights, made small likewise
      leptonx weights master digits.lepton -o float.npz                   the float weights that it keeps
      leptonx weights push MODELS new.lepton                              to a folder, or the URL of a server
    """


@weights.command("make")
@click.argument("base")
@click.argument("source")
@click.option("-o", "--output", required=True, metavar="NAME.lepton", help="Where to write the artifact.")
@click.option("--name", help="Name of the model; by default that of BASE.")
@click.option("--version", default="1", show_default=True, help="Version of the model.")
@_common.golden_option
@click.option(
    "--nearest",
    is_flag=True,
    help="With float weights: round to nearest where BASE's codes were chosen for calibration data (GPTQ).",
)
@_common.overwrite_option
@_common.json_option
def make(
    base: str,
    source: str,
    *,
    output: str,
    name: str | None,
    version: str,
    golden: str | None,
    nearest: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Make an artifact of the weights of SOURCE, to run on the compiled code of the artifact BASE.

    SOURCE is an artifact, or a model as FILE.py:NAME, which is optimized by the recipe that is stored in BASE. Times
    that were measured for BASE on this machine are taken from the cache, so that the same program comes of it.

    SOURCE may also be an .npz of float weights by their paths, if BASE was compiled with --keep-master: they are made
    small by the steps that BASE keeps, without the model's code, and what cannot be done again is refused by name.

    The weights are loaded onto BASE, must be finite, and must answer golden rows.
    """
    _common.check_free(output, overwrite=overwrite)
    with _common.progress() as step:
        step("load JAX")
        from lepton_xla import compiler
        from lepton_xla.cli import _arrays

        rows = None if golden is None else _arrays.read_golden(golden)
        step(f"load {base}")
        loaded = compiler.load(base)
        is_artifact = "://" in source or os.path.isdir(source)
        if source.endswith(".npz") and not is_artifact:
            step("make small")
            made_from = compiler.requantize(base, _arrays.read_weights(source), nearest=nearest)
        else:
            made_from = source if is_artifact else _optimized(source, loaded, step)
        step("fit")
        update = compiler.make_update(loaded, made_from, name=name, version=version, golden=rows)
        step(f"save {output}")
        manifest = update.save(output, overwrite=overwrite)
    size_bytes = manifest.size_bytes
    if as_json:
        facts = {"path": output, "name": manifest.name, "version": version, "fit": manifest.fit}
        _common.print_json({**facts, "size_bytes": size_bytes, "golden": manifest.golden is not None})
        return
    _common.show(f"wrote {output}, {_common.size(size_bytes)}: weights for {manifest.name}, fit {manifest.fit[:12]}")


@weights.command("master")
@click.argument("artifact")
@click.option("-o", "--output", required=True, metavar="FILE.npz", help="Where to write them.")
@_common.overwrite_option
@_common.json_option
def master(artifact: str, *, output: str, overwrite: bool, as_json: bool) -> None:
    """Write the float weights that ARTIFACT keeps (compile --keep-master) to a file, by their paths."""
    _common.check_free(output, overwrite=overwrite)
    with _common.progress() as step:
        step("load JAX")
        from lepton_xla import compiler
        from lepton_xla.cli import _arrays

        found = compiler.master_weights(artifact)
        _arrays.write_weights(output, found)
    total = sum(array.nbytes for array in found.values())
    if as_json:
        _common.print_json({"path": output, "weights": list(found), "size_bytes": total})
        return
    _common.show(f"wrote {output}: {len(found)} weights, {_common.size(total)}")


@weights.command("push")
@click.argument("models", metavar="MODELS")
@click.argument("artifact", required=False)
@click.option("--to", "url", metavar="URL", help="Server to push to: leptonx weights push ARTIFACT --to URL.")
@click.option("--name", help="Name in the repository; by default the artifact's own.")
@click.option("--version", help="A version that is not there yet; by default one more than the greatest.")
@click.option("--promote", "label", metavar="LABEL", help="Then move this label to it, such as stable or canary.")
@_repositories.wait_option
@click.option(
    "--alpha",
    type=float,
    help="Move towards the new weights in steps, each this part of the way: above 0, at most 1.",
)
@click.option("--steps", type=int, help="Steps, with --alpha.  [default: 5]")
@click.option("--every", metavar="DURATION", help="Time between two steps, such as 10s or 2m.  [default: 10s]")
@click.option(
    "--max-drop", type=float, help="How much accuracy may fall, 0.01 for one row of a hundred.  [default: 0.01]"
)
@click.option("--nearest", is_flag=True, help="Round to nearest where codes were chosen for calibration data (GPTQ).")
@_repositories.server_options
@_common.json_option
def push(
    models: str,
    artifact: str | None,
    *,
    url: str | None,
    name: str | None,
    version: str | None,
    label: str | None,
    wait: str | None,
    alpha: float | None,
    steps: int | None,
    every: str | None,
    max_drop: float | None,
    nearest: bool,
    token_file: str | None,
    tls_ca: str | None,
    as_json: bool,
) -> None:
    """Copy ARTIFACT, of weights alone, into MODELS as a new version: a folder, or the URL of a server.

    MODELS must have a version with the compiled code that the weights fit. A server that has it loaded puts the weights
    in its place between two batches, without compiling.

    With --alpha the server moves its weights towards the new ones in steps instead, each a version of its own, and
    looks at accuracy between them: on golden rows with labels (compile --golden), and on feedback. If that falls by
    more than --max-drop, it stops, or goes back. Both must keep their float master (compile --keep-master). After n
    steps, 1 - (1 - alpha)^n of the way is gone. GET /v2/models/NAME/adjustment says how far it is.

    \b
      leptonx weights push MODELS new.lepton
      leptonx weights push new.lepton --to http://127.0.0.1:8000 --alpha 0.2 --steps 5 --every 10s --max-drop 0.01
    """
    _common.check_goes_with("alpha", "steps", "every", "max_drop", "nearest")
    if (artifact is None) == (url is None):
        raise click.UsageError("give MODELS and ARTIFACT, or ARTIFACT and --to URL")
    place, source = (models, artifact) if artifact is not None else (url or "", models)
    asked = {
        "steps": steps,
        "every_s": None if every is None else _common.duration(every, "--every"),
        "max_drop": max_drop,
    }
    asked = {key: value for key, value in asked.items() if value is not None}
    repository = _repositories.opened(place, token_file, tls_ca)
    if alpha is None:
        _repositories.push(
            repository, source, name=name, version=version, label=label, wait=wait, as_json=as_json, only_weights=True
        )
        return
    if version is not None or label is not None or wait is not None:
        raise click.UsageError("--alpha makes versions of its own: leave --version, --promote and --wait out")
    _adjust(repository, source, name, {"alpha": alpha, "nearest": nearest, **asked}, as_json)


def _adjust(
    repository: Repository | RepositoryClient, source: str, name: str | None, plan: dict[str, Any], as_json: bool
) -> None:
    import pathlib

    from lepton_xla.errors import InputError
    from lepton_xla.files.copies import listing_of
    from lepton_xla.serve.models.repository import Repository

    if not 0 < plan["alpha"] <= 1:
        raise InputError(f"--alpha {plan['alpha']}: expected a number above 0 and at most 1")
    if plan.get("steps", 1) < 1:
        raise InputError(f"--steps {plan['steps']}: expected at least 1")
    if isinstance(repository, Repository):
        raise InputError("--alpha needs a running server, which moves the weights: give its URL")
    with _common.progress() as step:
        step(f"push {source}")
        called = name or listing_of(pathlib.Path(source))[0].name
        tell = lambda sent, total: step(f"push {source}: {100 * sent // max(total, 1)} %")  # noqa: E731
        begun = repository.adjust(source, called, tell=tell, **plan)
    if as_json:
        _common.print_json(begun)
        return
    asked = begun["plan"]
    _common.show(
        f"{called}: version {begun['base']} moves in {asked['steps']} steps of {asked['alpha']:g}, one every "
        f"{asked['every_s']:g} s"
    )


def _optimized(target: str, base: Servable, step: Callable[[str], None]) -> Program:
    """The model of a target, optimized as the base was."""
    import msgspec

    from lepton_xla.cli import _models
    from lepton_xla.optimization.pipeline import apply_plan, plan_for
    from lepton_xla.recipe import Recipe

    step(f"load {target}")
    spec = _models.load_target(target)
    program = spec.program()
    stored: Any = base.manifest.recipe
    recipe = _models.load_recipe(_common.NO_RECIPE) if stored is None else msgspec.convert(stored, Recipe)
    batches, _ = _models.calibration(spec, program)
    buckets = {name: sizes for name, sizes in base.manifest.buckets.items() if name in program.symbols}
    step("fold and plan")
    planned, plan = plan_for(program, recipe, calibration=batches, buckets=buckets)
    return apply_plan(planned, plan, calibration=batches, buckets=buckets, progress=step)
