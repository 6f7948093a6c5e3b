"""The score that is explained, and what an explaining program takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lepton_xla.errors import ModelError
from lepton_xla.explanation import converted
from lepton_xla.program import Program, TensorSpec, trace

TARGET = "target"


def judged_output(program: Program, asked: str | None) -> str:
    """The output whose classes are explained: the one asked for, or the first of floats `[batch, classes]`.

    Raises:
        ModelError: if there is none, or the model's rows are no first dimension of all inputs.

    >>> program = lx.trace(lambda w, x: x @ w, jnp.eye(4), {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> judged_output(program, None)
    'output'
    """
    found = {
        name: spec
        for name, spec in program.outputs.items()
        if len(spec.shape) == 2 and isinstance(spec.shape[0], str) and jnp.issubdtype(spec.dtype, jnp.floating)
    }
    said = ", ".join(f"{name}: {spec}" for name, spec in program.outputs.items())
    if asked is not None and asked not in found:
        raise ModelError(f"output {asked!r} has no classes to explain, [batch, classes] floats; the model gives {said}")
    if not found:
        raise ModelError(f"no output has classes to explain, [batch, classes] floats; the model gives {said}")
    name = asked if asked is not None else next(iter(found))
    rows = found[name].shape[0]
    for each, spec in program.inputs.items():
        if not spec.shape or spec.shape[0] != rows:
            raise ModelError(f"input {each!r} is {spec}; a model is explained row by row, so {rows!r} has to be first")
    if TARGET in program.inputs:
        raise ModelError(f"the model has an input {TARGET!r}, which is the name of the class that is explained")
    return name


def explaining(
    program: Program,
    output: str,
    explained: Sequence[str],
    attribute: Callable[[Callable[..., jax.Array], dict[str, jax.Array]], tuple[dict[str, jax.Array], jax.Array]],
) -> Program:
    """The program of attributions.

    Args:
        program: the model.
        output: the output that is explained.
        explained: its inputs that get attributions.
        attribute: `attribute(score, inputs) -> (attributions, baseline)`, where `score(**inputs)` is that of the
            explained class, `[batch]`, and `baseline` the score where nothing of the input is left.

    Returns:
        A program of the same weights and inputs, and one more: `target`, int32 `[batch]`, the class, or -1 for the most
        likely one. Its outputs are `target`; its `score`; the `baseline`; an attribution for each input; `seen/NAME`
        for what the host made of texts and images, which clients still send; and `label`, if classes have names.
    """
    names, seen = converted.classes(program, output), converted.seen(program)

    def fn(weights: Any, *given: jax.Array) -> dict[str, jax.Array]:
        *arrays, wanted = given
        inputs = dict(zip(program.inputs, arrays, strict=True))

        def scores(inputs: Mapping[str, jax.Array]) -> jax.Array:
            return program.named_outputs(weights, *(inputs[name] for name in program.inputs))[output]

        found = scores(inputs)
        chosen = jnp.where(wanted < 0, jnp.argmax(found, 1).astype(jnp.int32), wanted)
        # A class that does not exist is the last one: an index must not leave the array.
        chosen = jnp.minimum(chosen, found.shape[1] - 1)

        def of_class(found: jax.Array) -> jax.Array:
            return jnp.take_along_axis(found, chosen[:, None], 1)[:, 0].astype(jnp.float32)

        def score(**inputs: jax.Array) -> jax.Array:
            return of_class(scores(inputs))

        attributions, baseline = attribute(score, inputs)
        named = {f"attribution/{name}": attributions[name] for name in explained}
        back = {f"{converted.SEEN}{name}": inputs[name] for name in seen}
        label = {converted.LABEL: chosen} if names else {}
        return {"target": chosen, "score": of_class(found), "baseline": baseline, **named, **back, **label}

    rows = program.outputs[output].shape[0]
    made = trace(fn, program.weights, {**program.inputs, TARGET: TensorSpec((rows,), "int32")})
    # The names of the weights stay those of the program.
    return made.replace(
        fn=fn, weights=program.weights, masks=program.masks, history=program.history, axes=program.axes,
        conversion=converted.conversion(program, names),
    )  # fmt: skip


def chosen_inputs(program: Program, asked: Sequence[str] | None, *, floats: bool) -> list[str]:
    """The inputs that get attributions: those asked for, or all that can but masks of tokens and sizes of images.

    Pixels, which the host makes of a file and compiled code turns to floats, count as floats.

    Raises:
        ModelError: if one does not exist, or is not of floats where it must be.
    """
    real = converted.pixels(program)
    can = [
        n for n, spec in program.inputs.items() if not floats or n in real or jnp.issubdtype(spec.dtype, jnp.floating)
    ]
    for name in asked or ():
        if name not in program.inputs:
            raise ModelError(f"there is no input {name!r}; the model takes {', '.join(program.inputs)}")
        if name not in can:
            raise ModelError(f"input {name!r} is {program.inputs[name].dtype} and has no gradient; use occlusion")
    rest = converted.beside(program)
    chosen = list(asked) if asked else [name for name in can if name not in rest]
    if not chosen:
        raise ModelError("no input is of floats, so none has a gradient; use occlusion")
    return chosen


def check_explained(what: str, given: Mapping[str, Any] | None, explained: Sequence[str]) -> None:
    """Check that an argument names only inputs that get attributions.

    Raises:
        ModelError: if it names another.

    >>> check_explained("fill", {"image": 1.0}, ["x"])
    Traceback (most recent call last):
    lepton_xla.errors.ModelError: fill names 'image', which is no input that gets attributions; those are x
    """
    for name in given or ():
        if name not in explained:
            raise ModelError(
                f"{what} names {name!r}, which is no input that gets attributions; those are {', '.join(explained)}"
            )
