"""`leptonx compile`: optimizes a model and compiles it into an artifact."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import click

from lepton_xla.cli import _common


@click.command()
@click.argument("target")
@_common.recipe_option
@_common.set_option
@_common.exclude_option
@_common.buckets_option
@click.option(
    "-o",
    "--output",
    metavar="NAME.lepton",
    help="Where to write the artifact. By default NAME.lepton in this folder.",
)
@click.option(
    "--name",
    help="Name of the model, used in its URL when served. By default from --output, else from the model's file.",
)
@_common.overwrite_option
@click.option(
    "--evaluate/--no-evaluate",
    default=True,
    help="Evaluate the float and the compiled model with the ModelSpec's evaluate.",
)
@_common.mesh_option
@_common.rules_option
@click.option(
    "--topology",
    metavar="NAME",
    help="Also compile for devices that are not here; --mesh is of those then. TPUs such as v5e:4x4 take jax[tpu], "
    "GPUs such as h100:8 (h200, b200) jax[cuda12].",
)
@click.option(
    "--target",
    "targets",
    metavar="NAME,...",
    help="Also make sure that it runs there: cpu-avx2 and cpu-avx512 add code for any CPU with these instructions; "
    "aarch64, cuda and tpu compile the portable program when it is loaded.",
)
@_common.golden_option
@click.option(
    "--keep-master",
    is_flag=True,
    help="Keep the float weights in the artifact too, so that others can take their place without this model's code.",
)
@click.option(
    "--explain",
    type=click.Choice(["gradients", "occlusion"]),
    help="Also write NAME-explain.lepton, which says what inputs a class comes from, for `leptonx explain`: by "
    "integrated gradients, for float inputs, or by covering one element after the other, for any.",
)
@_common.json_option
def compile(
    target: str,
    *,
    recipe: str,
    settings: tuple[str, ...],
    exclude: tuple[str, ...],
    buckets: tuple[str, ...],
    output: str | None,
    name: str | None,
    overwrite: bool,
    evaluate: bool,
    mesh: str | None,
    rules: str | None,
    topology: str | None,
    targets: str | None,
    golden: str | None,
    keep_master: bool,
    explain: str | None,
    as_json: bool,
) -> None:
    """Optimize the model TARGET with a recipe and compile it ahead of time into an artifact.

    The artifact is a folder with compiled code for this machine, a portable program for others, the weights, and
    reports of what was done. It is written atomically. Compiling checks that rows of a batch do not affect each other;
    it uses the first batch of the calibration data, if the model has any.

    Times that were measured before on this machine are taken from ~/.cache/lepton_xla (or $XDG_CACHE_HOME/lepton_xla).
    LEPTON_CACHE=DIR moves them, LEPTON_CACHE=off measures everything.

    With --mesh the artifact is for several devices of this machine, each of which holds its part of the weights. With
    --topology it also has code for TPUs or GPUs that are not here.

    \b
      leptonx compile digits.py:model --recipe int8-prune50 -o digits.lepton
      leptonx compile my_package.models:encoder --recipe int8 --buckets batch=1,8,32 --buckets seq=32,128
      leptonx compile digits.py:model --recipe int8 --exclude '.*head' --set rescale=awq
      leptonx compile my_package.models:encoder --mesh data=2,model=4 --rules rules.toml
      leptonx compile my_package.models:encoder --topology v5e:4x4 --mesh data=4,model=4 --rules rules.toml
      leptonx compile digits.py:model --topology h100:1
      leptonx compile digits.py:model --target cpu-avx2,cpu-avx512,aarch64
      leptonx compile digits.py:model                        without a recipe: the float model
    """
    given = _common.parse_buckets(buckets)
    with _common.progress() as step:
        step("load JAX")
        import msgspec

        from lepton_xla import compiler, explanation
        from lepton_xla.cli import _arrays, _models
        from lepton_xla.compiler.buckets import check_bucket_sizes
        from lepton_xla.compiler.names import check_name
        from lepton_xla.compiler.targets import add_targets, check_targets
        from lepton_xla.compiler.topologies import mesh_elsewhere
        from lepton_xla.errors import CompileError
        from lepton_xla.optimization.pipeline import apply_plan, plan_for

        # Check everything that does not need the model first, so that a typo fails early.
        elsewhere = check_targets([name.strip() for name in (targets or "").split(",") if name.strip()])
        if elsewhere and (mesh or topology):
            raise CompileError("--target is for one device; give neither --mesh nor --topology with it")
        if topology is not None:
            mesh_elsewhere(topology, mesh)
        rows = None if golden is None else _arrays.read_golden(golden)
        chosen = _models.load_recipe(recipe, settings, exclude)
        stem = pathlib.PurePath(output).name.removesuffix(".lepton") if output else _models.default_name(target)
        model_name = check_name(name or stem)
        location = output or f"{model_name}.lepton"
        _common.check_free(location, overwrite=overwrite)
        explaining = f"{location.rstrip('/').removesuffix('.lepton')}-explain.lepton"
        if explain is not None:
            _common.check_free(explaining, overwrite=overwrite)

        step(f"load {target}")
        spec = _models.load_target(target)
        program = spec.program()
        spread = _models.put_on_mesh(program, mesh, rules, here=topology is None)
        program = spread.program
        bucket_sizes = check_bucket_sizes(program.symbols, _models.bucket_sizes(spec, program, given))
        batches, examples = _models.calibration(spec, program)

        started = time.perf_counter()
        step("fold and plan")
        planned_program, plan = plan_for(program, chosen, calibration=batches, buckets=bucket_sizes)
        small = apply_plan(
            planned_program, plan, calibration=batches, buckets=bucket_sizes, progress=step, keep_master=keep_master
        )
        optimize_s = time.perf_counter() - started

        metrics: dict[str, Any] = {}
        if evaluate and spec.evaluate is not None:
            step("evaluate the float model")
            metrics["float"] = _models.evaluate(spec, _models.float_predict(program))
        # Compiling a large model takes memory, and needs the float weights no more.
        float_bytes, its_mesh, its_rules = program.weights_bytes, spread.mesh, spread.rules
        del program, planned_program, spread

        as_is = recipe == _common.NO_RECIPE and not settings
        started = time.perf_counter()
        artifact = compiler.compile(
            small,
            bucket_sizes,
            name=model_name,
            recipe=None if as_is else msgspec.to_builtins(chosen),
            plan=None if as_is else plan.to_json(),
            examples=examples,
            mesh=its_mesh,
            rules=its_rules,
            topology=topology,
            golden=rows,
            keep_master=keep_master,
            progress=step,
        )
        compile_s = time.perf_counter() - started

        # The data again: optimizing may have read it to its end.
        known = _models.to_profile(spec, small)
        if known is not None:
            step("profile the calibration data")
            artifact = artifact.with_profile(known)
        servable = artifact.servable()
        if evaluate and spec.evaluate is not None:
            step("evaluate the compiled model")
            metrics["optimized"] = _models.evaluate(spec, servable)
            manifest = msgspec.structs.replace(artifact.manifest, metrics=metrics)
            artifact = dataclasses.replace(artifact, manifest=manifest)
        step(f"save {location}")
        manifest = artifact.save(location, overwrite=overwrite)
        if elsewhere:
            step(f"compile for {', '.join(elsewhere)}")
        added = add_targets(location, elsewhere) if elsewhere else []
        if explain is not None:
            step(f"compile {explaining}")
            passes = {"gradients": explanation.integrated_gradients, "occlusion": explanation.occlusion}
            explained = compiler.compile(
                passes[explain](small), bucket_sizes, name=f"{model_name}-explain", examples=examples, progress=step
            )
            explained.save(explaining, overwrite=overwrite)
    document = {
        "path": location,
        "explanation": explaining if explain is not None else None,
        "name": model_name,
        "recipe": chosen.name,
        "buckets": manifest.buckets,
        "passes": [report.to_json() for report in small.history],
        "weights": manifest.reports[-1],
        "weights_bytes_float": float_bytes,
        "weights_bytes_optimized": servable.weights_bytes,
        "weights_bytes_on_disk": _common.weights_on_disk(manifest),
        "artifact_bytes": manifest.size_bytes,
        "targets": [msgspec.to_builtins(target) for target in added],
        "metrics": metrics,
        "optimize_s": optimize_s,
        "compile_s": compile_s,
        "compile_s_by_bucket": manifest.compile_s,
    }
    if as_json:
        _common.print_json(document)
    else:
        _print(document)


def _print(document: Mapping[str, Any]) -> None:
    from lepton_xla.cli import _reports

    if document["passes"]:
        _common.show(_reports.passes_table(document["passes"]), _reports.weights_table([document["weights"]]))
        _common.show(*_reports.remarks(document["passes"]))
    else:
        _common.show("no recipe: the float model is compiled unchanged", "")
    large, small = document["weights_bytes_float"], document["weights_bytes_optimized"]
    disk = document["weights_bytes_on_disk"]
    rows = [
        ("weights in memory", _common.size(large), _common.size(small), _common.ratio(small, large)),
        ("weights on disk", f"{_common.size(large)} raw", _common.size(disk), _common.ratio(disk, large)),
    ]
    if document["metrics"]:
        rows += _common.metric_rows(document["metrics"]["float"], document["metrics"]["optimized"])
    columns = ("", ">float", ">optimized", ">ratio or difference")
    passes_s = sum(report["seconds"] for report in document["passes"])
    compiled = ", ".join(f"{bucket} {_common.seconds(s)}" for bucket, s in document["compile_s_by_bucket"].items())
    _common.show(
        _common.table(f"{document['name']}, recipe {document['recipe']}", columns, rows),
        f"optimized in {_common.seconds(document['optimize_s'])}, of which passes took {_common.seconds(passes_s)}; "
        f"compiled, checked and exported in "
        f"{_common.seconds(document['compile_s'])} ({compiled})",
        f"wrote {document['path']}, {_common.size(document['artifact_bytes'])}",
        *([f"wrote {document['explanation']}"] if document["explanation"] else []),
        *(
            f"{target['name']}: compiled code"
            if not target["reason"]
            else f"{target['name']}: portable program, compiled when it is loaded ({target['reason']})"
            for target in document["targets"]
        ),
    )
