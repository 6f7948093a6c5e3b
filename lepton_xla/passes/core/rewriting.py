"""A function in, the same function with some of its equations replaced out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

from lepton_xla.arguments import takes
from lepton_xla.passes.core.containers import CONTAINERS
from lepton_xla.passes.core.walker import Frame, Rule, TracedValue, Walk, materialize


@takes(fn=Callable, follow=Mapping, example=Callable, prepare=Callable, constant=Callable)
def rewrite(
    fn: Callable[..., Any],
    rules: Mapping[str, Rule] | Callable[[Any], Mapping[str, Rule]],
    *,
    follow: Mapping[str, Rule] | None = None,
    inline: bool = False,
    on_unknown: Literal["error", "keep"] = "error",
    example: Callable[..., tuple[Any, ...]] | None = None,
    prepare: Callable[..., Any] | None = None,
    with_taps: bool = False,
    constant: Callable[[Any], Any] | None = None,
) -> Callable[..., Any]:
    """Transform a function by replacing equations of its jaxpr.

    Args:
        fn: any function that `jax.make_jaxpr` can trace.
        rules: primitive name -> rule; or a function that makes this table of the jaxpr that is about to be evaluated.
        follow: rules asked only when an operand is a `TracedValue`: how such a value moves through layout operations.
            The one under `"*"` is asked after those, also of equations on literals alone and of whole containers.
        inline: False keeps `jit`, `remat`, and custom derivatives as containers, for functions that will be trained;
            True evaluates their bodies in place, for inference.
        on_unknown: what to do with a container the walker does not know that holds a primitive of `rules`.
        example: `example(*args) -> args` to trace `fn` with, where the new function takes other weights than `fn`.
        prepare: `prepare(*args) -> args`, with `TracedValue` leaves where the pass wants them; the tree is `example`'s.
        with_taps: whether the new function returns `(outputs, taps)`.
        constant: what takes the place of an array that a jaxpr closes over, and of a literal that enters a container;
            the array itself by default.

    Returns:
        A function with the signature of `fn`.

    Raises:
        UnsupportedError: when called, for an unknown container that holds a primitive of `rules`.

    >>> fn = lx.passes.rewrite(lambda x: jnp.sin(x) + 1, {"sin": lambda context, eqn, values: [values[0] * 2]})
    >>> float(fn(3.0))
    7.0
    """

    @functools.wraps(fn)
    def rewritten(*args: Any, **kwargs: Any) -> Any:
        traced = example(*args) if example else args
        closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*traced, **kwargs)
        given = prepare(*args) if prepare else args
        values = jax.tree.leaves((given, kwargs), is_leaf=lambda leaf: isinstance(leaf, TracedValue))
        table = rules(closed) if callable(rules) else rules
        walk = Walk(table, follow or {}, CONTAINERS, inline, on_unknown, with_taps, constant)
        outs, taps = walk.call(closed, values, Frame())
        result = jax.tree.unflatten(jax.tree.structure(out_shape), [materialize(out) for out in outs])
        return (result, taps) if with_taps else result

    return rewritten
