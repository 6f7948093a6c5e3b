"""Students that start from some layers of their teacher."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lepton_xla.errors import TrainingError
from lepton_xla.trees import some_names

type _Keys = tuple[str, ...]


def every_nth_layer(
    weights: Mapping[str, Any], stack: str, n: int | None = None, *, layers: Sequence[int] | None = None
) -> dict[str, Any]:
    """Take every n-th layer of a stack, as the weights of a shallower student (DistilBERT, arXiv:1910.01108).

    Args:
        weights: those of the teacher: a flat dict by path, such as `Program.weights`, or nested dicts, such as Flax's
            variables.
        stack: where the layers are. `params/layer_{}` stands for layers of their own, where `{}` is the number from 0;
            a path without `{}`, such as `params/layers`, for leaves whose first axis is the layer.
        n: takes layers n-1, 2n-1, ...; so with n = 2, layer i of the student is layer 2i+1 of the teacher.
        layers: which layers instead, such as `[0, 2, 5]`.

    Returns:
        The student's weights, in the form of the given ones; layers are numbered from 0, everything else is the same.

    Raises:
        TrainingError: if there is no such stack, a number is missing in it, or no such layer.

    >>> weights = {f"layer_{k}/w": jnp.full((2,), k) for k in range(4)} | {"head": jnp.zeros(2)}
    >>> {path: float(leaf[0]) for path, leaf in lx.train.every_nth_layer(weights, "layer_{}", 2).items()}
    {'layer_0/w': 1.0, 'layer_1/w': 3.0, 'head': 0.0}
    >>> lx.train.every_nth_layer({"layers": {"w": jnp.arange(4)}}, "layers", layers=[0, 3])["layers"]["w"].tolist()
    [0, 3]
    """
    if (n is None) == (layers is None):
        raise TrainingError("every_nth_layer: give either n, such as 2, or layers, such as [0, 2, 5]")
    leaves = dict(_leaves(weights))
    return _nested(_unrolled(leaves, stack, n, layers) if "{}" in stack else _stacked(leaves, stack, n, layers))


def _unrolled(leaves: Mapping[_Keys, Any], stack: str, n: int | None, layers: Sequence[int] | None) -> dict[_Keys, Any]:
    before, _, after = stack.partition("{}")
    pattern = re.compile(f"{re.escape(before)}(\\d+){re.escape(after)}(?![0-9A-Za-z_])")
    numbered: dict[int, dict[_Keys, Any]] = {}
    found: dict[_Keys, Any] = {}
    for keys, leaf in leaves.items():
        match = pattern.match("/".join(keys))
        if match is None:
            found[keys] = leaf
        else:
            # Other layers' paths differ in this number only.
            numbered.setdefault(int(match[1]), {})[_placed(keys, match.span(1))] = leaf
    if sorted(numbered) != list(range(len(numbered))):
        raise TrainingError(f"the layers {stack!r} have the numbers {sorted(numbered)}; expected all from 0 on")
    chosen = _chosen(len(numbered), stack, n, layers, leaves)
    return {
        **{
            tuple(key.replace("\0", str(place)) for key in keys): leaf
            for place, number in enumerate(chosen)
            for keys, leaf in numbered[number].items()
        },
        **found,
    }


def _placed(keys: _Keys, span: tuple[int, int]) -> _Keys:
    """The keys with a null character in place of the number at this span of their joined text."""
    start, end = span
    made: list[str] = []
    for key in keys:
        made.append(f"{key[:start]}\0{key[end:]}" if 0 <= start < len(key) else key)
        start, end = start - len(key) - 1, end - len(key) - 1
    return tuple(made)


def _stacked(leaves: Mapping[_Keys, Any], stack: str, n: int | None, layers: Sequence[int] | None) -> dict[_Keys, Any]:
    inside = [keys for keys in leaves if f"{'/'.join(keys)}/".startswith(f"{stack.rstrip('/')}/")]
    lengths = {"/".join(keys): np.shape(leaves[keys])[:1] for keys in inside}
    if len(set(lengths.values())) > 1 or () in lengths.values():
        first = {length: path for path, length in lengths.items()}
        shapes = ", ".join(f"{path}: {length[0] if length else 'none'}" for length, path in first.items())
        raise TrainingError(f"the leaves of the stack {stack!r} have different numbers of layers: {shapes}")
    chosen = np.array(_chosen(next(iter(lengths.values()), (0,))[0], stack, n, layers, leaves))
    return {keys: leaf[chosen] if keys in inside else leaf for keys, leaf in leaves.items()}


def _chosen(
    count: int, stack: str, n: int | None, layers: Sequence[int] | None, leaves: Mapping[_Keys, Any]
) -> list[int]:
    if not count:
        raise TrainingError(f"there are no layers {stack!r}; the weights are {some_names('/'.join(k) for k in leaves)}")
    try:
        step = 0 if n is None else operator.index(n)
        wanted = list(range(step - 1, count, step)) if step > 0 else [operator.index(layer) for layer in layers or ()]
    except TypeError:
        wanted = []
    if not wanted or not all(0 <= layer < count for layer in wanted):
        given = f"n = {n!r}" if layers is None else f"layers = {layers!r}"
        raise TrainingError(f"every_nth_layer: {given}, but {stack!r} has the {count} layers 0 to {count - 1}")
    return wanted


def _leaves(weights: Mapping[str, Any], around: _Keys = ()) -> Iterator[tuple[_Keys, Any]]:
    for key, value in weights.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*around, key))
        else:
            yield (*around, key), value


def _nested(leaves: Mapping[_Keys, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for keys, leaf in leaves.items():
        place = made
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = leaf
    return made
