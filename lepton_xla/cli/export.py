"""`leptonx export`: writes an artifact in another framework's format."""

from __future__ import annotations

import click

from lepton_xla.cli import _common


@click.command()
@click.argument("artifact")
@click.option("--to", "form", required=True, metavar="stablehlo|saved-model|tflite|onnx|qonnx", help="The format.")
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="PATH",
    help="Where to write: a folder for stablehlo and saved-model, else a file.",
)
@click.option(
    "--rows",
    metavar="FILE.npz",
    help="Inputs by name to compare on, at most the largest size that was compiled. By default eight rows are drawn, "
    "integers as zeros.",
)
@_common.overwrite_option
@_common.json_option
def export(artifact: str, *, form: str, output: str, rows: str | None, overwrite: bool, as_json: bool) -> None:
    """Write what the artifact ARTIFACT computes in another format, read it again, and compare the answers.

    stablehlo needs JAX alone to run, or any tool that reads StableHLO. saved-model and tflite need the extra
    `tensorflow`, onnx and qonnx the extra `onnx`. Weights stay as they are stored, and sizes of batches
    symbolic, up to the largest that was compiled; qonnx has that size alone.

    \b
      leptonx export digits.lepton --to stablehlo -o digits
      leptonx export digits.lepton --to saved-model -o digits_tf --rows held_out.npz
      leptonx export digits.lepton --to tflite -o digits.tflite
      leptonx export digits.lepton --to onnx -o digits.onnx
    """
    with _common.progress() as step:
        step("load JAX")
        import dataclasses

        from lepton_xla import exporting
        from lepton_xla.cli import _arrays

        inputs = None if rows is None else _arrays.read_all((rows,))
        step(f"write {output}")
        found = exporting.export(artifact, output, form, rows=inputs, overwrite=overwrite)
    if as_json:
        _common.print_json(dataclasses.asdict(found))
        return
    cells = [
        (name, f"{difference:.3g}", f"{found.largest[name]:.3g}") for name, difference in found.differences.items()
    ]
    columns = ("output", ">largest difference", ">largest value")
    _common.show(_common.table(f"{found.rows} rows, beside {artifact}", columns, cells), f"wrote {found.path}")
