"""`leptonx eval`: compares the accuracy of an artifact with the float model's."""

from __future__ import annotations

import click

from lepton_xla.cli import _common
from lepton_xla.errors import ModelError


@click.command(name="eval")
@click.argument("target")
@click.argument("path")
@_common.json_option
def eval(target: str, path: str, as_json: bool) -> None:
    """Evaluate the artifact at PATH and the float model with the evaluate function of the model TARGET.

    \b
      leptonx eval digits.py:model digits.lepton
      leptonx eval digits.py:model digits.lepton --json | jq .difference.accuracy
    """
    with _common.progress() as step:
        step("load JAX")
        from lepton_xla.cli import _models
        from lepton_xla.compiler import load

        step(f"load {path}")
        servable = load(path)
        step(f"load {target}")
        spec = _models.load_target(target)
        if spec.evaluate is None:
            raise ModelError(f"{target} has no evaluate; add evaluate=..., a function of predict, to its ModelSpec")
        program = spec.program()
        _models.check_same_inputs(servable, program, path, target)
        step("evaluate the float model")
        before = _models.evaluate(spec, _models.float_predict(program))
        step("evaluate the artifact")
        after = _models.evaluate(spec, servable)
    if as_json:
        difference = {name: after[name] - before[name] for name in before if name in after}
        sides = {"float": before, "artifact": after, "difference": difference}
        _common.print_json({"target": target, "path": path, "route": servable.route, **sides})
    else:
        rows = _common.metric_rows(before, after)
        _common.show(_common.table(f"{path} against {target}", ("metric", ">float", ">artifact", ">difference"), rows))
