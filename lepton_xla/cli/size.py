"""`leptonx size`: what a training step takes on devices that need not be here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lepton_xla.cli import _common

if TYPE_CHECKING:
    from lepton_xla.train import Size


@click.command()
@click.argument("target")
@click.option(
    "--topology",
    metavar="NAME",
    help="The devices: TPUs such as v5e:4x4 (v5p, v6e); GPUs such as h100:8, or h100:2x8 on two machines (h200, b200). "
    "By default those of this machine.",
)
@_common.mesh_option
@_common.rules_option
@click.option("--recipe", metavar="NAME|FILE.toml", help="Size the step that rounds as this recipe says.")
@_common.set_option
@_common.exclude_option
@click.option("--batch", "rows", type=click.IntRange(min=1), metavar="N", help="Rows of a batch, over all devices.")
@click.option("--accumulate", type=click.IntRange(min=1), metavar="K", help="Microbatches that a batch is cut into.")
@click.option(
    "--compute-dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Dtype of the loss' computations; the weights stay float32.",
)
@click.option(
    "--memory",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GIB",
    help="Memory of a device in GiB. By default what XLA may use of the topology's devices: of a GPU three quarters.",
)
@click.option(
    "--largest/--no-largest",
    default=True,
    help="Whether to find the largest batch that fits, which compiles about ten times.",
)
@_common.json_option
def size(
    target: str,
    *,
    topology: str | None,
    mesh: str | None,
    rules: str | None,
    recipe: str | None,
    settings: tuple[str, ...],
    exclude: tuple[str, ...],
    rows: int | None,
    accumulate: int | None,
    compute_dtype: str | None,
    memory: float | None,
    largest: bool,
    as_json: bool,
) -> None:
    """Show what a training step of the TrainSpec TARGET takes, on devices that need not be here. Nothing is trained.

    The step that `leptonx train` would run is compiled for the devices, and what the compiler says is shown: bytes of
    one device by part, bytes that each device sends to others, operations, the time that these take at least (all at
    once) and at most (one after another), and the largest batch that fits.

    Sizes are exact where the devices' own compiler is installed: pip install 'jax[tpu]' or 'jax[cuda12]'; neither needs
    a TPU or GPU. Otherwise CPU devices stand for them, and the output says so: weights and optimizer are exact then,
    but temporaries and collective operations are those that XLA chooses on CPUs.

    \b
      leptonx size examples/train_digits.py:training --topology v5e:4x4
      leptonx size lm.py:training --topology v5e:4x4 --mesh data=4,model=4 --rules tensor_parallel.toml
      leptonx size lm.py:training --topology h100:8 --compute-dtype bfloat16 --batch 64 --accumulate 4
      leptonx size lm.py:training --topology v6e:8x8 --recipe int8 --no-largest --json
    """
    _common.check_goes_with("recipe", "settings", "exclude")
    with _common.progress() as step:
        step("load JAX")
        from lepton_xla import train as training
        from lepton_xla.cli import _models
        from lepton_xla.sharding import Rules, topologies
        from lepton_xla.train.feeding import Feed

        # Check everything that does not need the model first, so that a typo fails early.
        given_rules = None if rules is None else Rules.load(rules)
        chosen = None if recipe is None else _models.load_recipe(recipe, settings, exclude)
        if topology is not None:
            topologies.provide_stand_ins(topology)
        where = None if topology is None else topologies.find_topology(topology)
        step(f"load {target}")
        spec = _models.load_target(target, training.TrainSpec)
        model = spec.trained()
        evaluation = spec.evaluation(spec.steps)
        known = ("mesh", "rules", "accumulate", "compute_dtype", "clip_norm", "ema")
        options: dict[str, Any] = {name: spec.options[name] for name in known if name in spec.options}
        given = {"mesh": mesh, "rules": given_rules, "accumulate": accumulate, "compute_dtype": compute_dtype}
        options |= {name: value for name, value in given.items() if value is not None}
        loss, optimizer, batch = (
            spec.loss or training.supervised(model),
            spec.updates(spec.steps),
            Feed(spec.data).next(),
        )
        compression = spec.compression if chosen is None else training.schedule(chosen, spec.steps)

        def at(count: int | None) -> Size:
            step("compile the step" if count is None else f"compile the step for {count} rows")
            return training.size(
                model, loss, optimizer, batch, topology=where, rows=count, compression=compression,
                memory_bytes=None if memory is None else int(memory * 2**30),
                keep_best=evaluation is not None and evaluation.metric is not None, **options,
            )  # fmt: skip

        found = at(rows)
        document = {"target": target, **found.to_json()}
        if largest and found.fits is not None:
            fitting, refused = training.largest_batch(at, found)
            document |= {"largest_rows": 0 if fitting is None else fitting.rows, "rows_that_do_not_fit": refused}
    if as_json:
        _common.print_json(document)
    else:
        _print(document, found.unit)


def _print(document: dict[str, Any], unit: int) -> None:
    axes = ", ".join(f"{name}={count}" for name, count in document["mesh"].items())
    where = (
        f"{document['topology']}{f', mesh {axes}' if axes else ''}: {document['devices']} x {document['device_kind']}"
    )
    rows = [(name, _common.size(count)) for name, count in document["bytes"].items()]
    rows.append(("temporaries", _or_unknown(document["temporary_bytes"], _common.size)))
    title = f"{document['target']} on {where}, {document['rows']:,} rows a step"
    total = ("total", _or_unknown(document["total_bytes"], _common.size))
    _common.show(_common.table(title, ("memory of one device", ">bytes"), rows, total=total))
    lines = [
        "compiled by the devices' own compiler"
        if document["exact"]
        else "their compiler is not installed, so CPU devices stand for them: temporaries and what is sent are those "
        "of XLA's CPU compiler",
        f"all gradients take {_common.size(document['gradients_bytes'])}, which are among the temporaries",
    ]
    if document["stage"] == "rounded":
        lines.append("weights and activations are rounded in the step")
    memory = "" if document["memory_bytes"] is None else f" the {_common.size(document['memory_bytes'])} of a device"
    if document["refusal"]:
        lines.append(f"does not fit{memory}: {document['refusal']}")
    elif document["fits"] is not None:
        lines.append(f"{'fits' if document['fits'] else 'does not fit'}{memory}")
    sent = ", ".join(f"{kind} {_common.size(count)}" for kind, count in document["sent_bytes"].items())
    if document["total_bytes"] is not None:
        lines.append(f"each device sends: {sent or 'nothing'}")
    lines.append(f"each device computes: {_common.short(document['flops'])}FLOP in products")
    if document["step_seconds_least"] is not None and document["total_bytes"] is not None:
        least, most = (_common.seconds(document[f"step_seconds_{which}"]) for which in ("least", "most"))
        parts = ", ".join(f"{name} {_common.seconds(value)}" for name, value in document["seconds"].items())
        lines.append(f"predicted time of a step: {least} to {most} ({parts})")
    if "largest_rows" in document:
        lines.append(_largest(document["largest_rows"], document["rows_that_do_not_fit"], unit))
    _common.show(*lines)


def _largest(rows: int, refused: int | None, unit: int) -> str:
    if rows == 0:
        return (
            f"no batch fits, not even one of {unit} {'row' if unit == 1 else 'rows'}: cut the weights over more "
            "devices (--mesh, --rules), or compute in --compute-dtype bfloat16"
        )
    return f"largest batch that fits: {rows:,} rows{f' ({refused:,} do not)' if refused is not None else ' at least'}"


def _or_unknown(value: Any, form: Any) -> str:
    return "not known" if value is None else str(form(value))
