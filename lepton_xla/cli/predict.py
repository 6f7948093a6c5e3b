"""`leptonx predict`: runs an artifact on input files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from lepton_xla.cli import _common
from lepton_xla.errors import InputError


@click.command()
@click.argument("path")
@click.option(
    "--input",
    "sources",
    multiple=True,
    required=True,
    metavar="NAME=FILE.npy|NAME=FILE.jpg|FILE.npz|FILE.json|-",
    help="Inputs: a named array, image (.jpg, .png) or text (.txt), all arrays of an .npz, or JSON {NAME: nested list} "
    "from a file or stdin. Repeatable.",
)
@click.option(
    "-o", "--output", metavar="FILE.npz", help="Write the outputs to this file instead of printing them as JSON."
)
@_common.json_option
def predict(path: str, *, sources: tuple[str, ...], output: str | None, as_json: bool) -> None:
    """Run the artifact at PATH on input files; print the outputs as JSON or write them to an .npz.

    Takes any number of rows: they are padded to a compiled size, or split. Arrays from files must have the model's
    dtype. JSON numbers are converted to it, or refused if it cannot hold them. bfloat16 and fp8 outputs are written to
    an .npz as float32.

    \b
      leptonx predict digits.lepton --input image=images.npy
      leptonx predict encoder.lepton --input ids=ids.npy --input mask=mask.npy -o out.npz
      echo '{"x": [[1, 2, 3, 4]]}' | leptonx predict tiny.lepton --input -
    """
    with _common.progress() as step:
        step("load JAX")
        from lepton_xla.cli import _arrays
        from lepton_xla.compiler import load

        inputs = _arrays.read_all(sources)
        step(f"load {path}")
        servable = load(path)
        step("run")
        outputs = servable(**_arrays.as_declared(inputs, servable.inputs))
        if output is not None:
            _arrays.write_npz(output, outputs)
    shapes = {name: {"dtype": str(array.dtype), "shape": list(array.shape)} for name, array in outputs.items()}
    if output is None:
        click.echo(_as_json(outputs))
    elif as_json:
        _common.print_json({"output": output, "outputs": shapes})
    else:
        rows = [(name, entry["dtype"], ", ".join(map(str, entry["shape"]))) for name, entry in shapes.items()]
        _common.show(_common.table(f"wrote {output}", ("output", "dtype", "shape"), rows))


def _as_json(outputs: Mapping[str, Any]) -> str:
    try:
        return json.dumps({name: array.tolist() for name, array in outputs.items()}, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise InputError(f"an output cannot be printed as JSON ({error}); write it with --output FILE.npz") from error
