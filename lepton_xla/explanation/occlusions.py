"""Occlusion: what a score loses where a window of the input is covered."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.errors import ModelError
from lepton_xla.explanation import converted
from lepton_xla.explanation.targets import check_explained, chosen_inputs, explaining, judged_output
from lepton_xla.program import Program

_PARTS = 8  # windows on a side of an image


def occlusion(
    program: Program,
    *,
    windows: Mapping[str, Sequence[int]] | None = None,
    strides: Mapping[str, Sequence[int]] | None = None,
    output: str | None = None,
    fill: Mapping[str, float] | None = None,
) -> Program:
    """Make the program that attributes a class' score to windows of any inputs, tokens included.

    A window is covered by the fill value at every place, one after the other; an element's attribution is what the
    score loses, the mean over the windows that cover it. It asks the model as it is, so it holds for rounded
    activations too. Source: Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks" (2014).

    Args:
        program: the model; its rows are independent.
        windows: input -> size of the window along each axis but the first; by default one element of all inputs, and of
            an image that is read from a file an eighth of each side, in all channels.
        strides: input -> step from window to window; by default 1 along each axis, of such an image half a window.
        output: the output that is explained; by default the first with classes.
        fill: input -> the value that stands for nothing, such as the token of a mask; by default 0, and the one behind
            the end of a text.

    Returns:
        A program with one more input, `target`, int32 `[batch]`: the class, or -1 for the most likely one. Its outputs
        are `target`, `score`, `baseline` (all inputs covered), and `attribution/NAME`, float32 of each input's shape.

    Raises:
        ModelError: if there is no such input or output, strides or fill names one without attributions, or a window has
            another rank or does not fit.

    >>> table = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 4.0]])
    >>> program = lx.trace(lambda w, ids: w[ids].sum(1), table, {"ids": lx.TensorSpec(("batch", 3), "int32")})
    >>> explained = occlusion(program)
    >>> found = explained(explained.weights, jnp.array([[1, 2, 2]]), jnp.array([1], jnp.int32))
    >>> found["attribution/ids"].tolist()
    [[0.0, 4.0, 4.0]]
    """
    judged = judged_output(program, output)
    chosen = chosen_inputs(program, list(windows) if windows else None, floats=False)
    check_explained("strides", strides, chosen)
    check_explained("fill", fill, chosen)
    pads = {name: step.pad for name, step in converted.tokens(program).items()}
    wide = {
        name: (-(-step.height // _PARTS), -(-step.width // _PARTS), step.channels)
        for name, step in converted.pixels(program).items()
    }
    half = {name: (-(-size[0] // 2), -(-size[1] // 2), size[2]) for name, size in wide.items()}
    values = pads | dict(fill or {})
    ranks = {name: len(program.inputs[name].shape) - 1 for name in chosen}
    sizes = {name: _checked(name, (wide | dict(windows or {})).get(name), ranks[name], "window") for name in chosen}
    half = {name: size for name, size in half.items() if name not in (windows or {})}
    steps = {name: _checked(name, (half | dict(strides or {})).get(name), ranks[name], "stride") for name in chosen}

    def attribute(
        score: Callable[..., jax.Array], given: dict[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        whole = score(**given)
        made = {
            name: _lost(score, given, name, whole, window=sizes[name], stride=steps[name], fill=values.get(name, 0))
            for name in chosen
        }
        covered = {name: jnp.full_like(given[name], values.get(name, 0)) for name in chosen}
        return made, score(**{**given, **covered})

    return explaining(program, judged, chosen, attribute)


def _lost(
    score: Callable[..., jax.Array],
    given: dict[str, jax.Array],
    name: str,
    whole: jax.Array,
    *,
    window: Sequence[int],
    stride: Sequence[int],
    fill: float,
) -> jax.Array:
    """What the score `whole` loses by the windows that cover each element of an input, their mean."""
    array = given[name]
    places = _places(name, array.shape[1:], window, stride)
    cover = jnp.asarray(fill, array.dtype)

    def step(sums: tuple[jax.Array, jax.Array], place: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        inside = jnp.ones(array.shape[1:], bool)
        for axis, size in enumerate(window):
            index = jax.lax.broadcasted_iota(jnp.int32, array.shape[1:], axis)
            inside &= (index >= place[axis]) & (index < place[axis] + size)
        loss = whole - score(**{**given, name: jnp.where(inside[None], cover, array)})
        covered = inside.astype(jnp.float32)
        lost = loss.reshape(-1, *[1] * (array.ndim - 1)) * covered[None]
        return (sums[0] + lost, sums[1] + covered), None

    zeros = jnp.zeros(array.shape, jnp.float32), jnp.zeros(array.shape[1:], jnp.float32)
    (total, count), _ = jax.lax.scan(step, zeros, jnp.asarray(places))
    return total / jnp.maximum(count, 1)[None]


def _checked(name: str, given: Sequence[int] | None, rank: int, what: str) -> tuple[int, ...]:
    sizes = (1,) * rank if given is None else tuple(given)
    if len(sizes) != rank or min(sizes, default=1) < 1:
        raise ModelError(f"the {what} of input {name!r} is {sizes}; it takes {rank} sizes of at least 1")
    return sizes


def _places(name: str, shape: Sequence[int], sizes: Sequence[int], steps: Sequence[int]) -> np.ndarray:
    """Where windows begin, int32 `[windows, axes]`; the last may reach beyond the end."""
    for size, dim in zip(sizes, shape, strict=True):
        if size > dim:
            raise ModelError(f"the window of input {name!r} is {tuple(sizes)}, and a row of it {tuple(shape)}")
    starts = [
        range(0, -(-(dim - size) // step) * step + 1, step) for dim, size, step in zip(shape, sizes, steps, strict=True)
    ]
    return np.array(list(itertools.product(*starts)), np.int32).reshape(-1, len(shape))
