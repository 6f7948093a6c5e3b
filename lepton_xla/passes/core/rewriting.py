"""`rewrite`: transforms a function by replacing equations of its jaxpr."""

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
        rules: primitive name -> rule; or a function that makes this table from the jaxpr.
        follow: rules that are applied only if an operand is a `TracedValue`: how such a value moves through layout
            operations. The rule `"*"` is applied after the others, also to equations on literals alone and to whole
            containers.
        inline: False keeps `jit`, `remat` and custom derivatives, for functions that will be trained; True inlines
            them, for inference.
        on_unknown: what to do with an unknown container that holds a primitive of `rules`.
        example: `example(*args) -> args`: arguments to trace `fn` with, if the new function takes other weights than
            `fn`.
        prepare: `prepare(*args) -> args`: replaces leaves by `TracedValue`; the tree is that of `example`.
        with_taps: whether the new function returns `(outputs, taps)`.
        constant: replaces each array that a jaxpr closes over, and each literal that enters a container; by default
            they stay.

    Returns:
        A function with the signature of `fn`.

    Raises:
        UnsupportedError: when called, if an unknown container holds a primitive of `rules`.

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
