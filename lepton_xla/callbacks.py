"""Python callbacks in a model: debugging calls are removed before compiling, all others refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lepton_xla import _compat
from lepton_xla.errors import CompileError
from lepton_xla.program import Program
from lepton_xla.report import PassReport


def without_callbacks(program: Program, sizes: Mapping[str, int]) -> Program:
    """Remove debugging calls such as `jax.debug.print` from a program, with a line in its report.

    Args:
        program: the program.
        sizes: sizes of its symbolic dimensions at which to trace it.

    Raises:
        CompileError: if a callback has an effect or the model uses its result: compiled code runs in another process,
            where that function does not exist.
    """
    jaxpr = program.jaxpr(sizes)
    for eqn in _compat.calls_of(jaxpr, _compat.HOST_CALLS):
        called = eqn.params.get("callback")
        name = getattr(getattr(called, "callback_func", called), "__name__", "a function")
        raise CompileError(
            f"the model calls {name!r} in Python ({eqn.primitive.name} at {_compat.source_of(eqn)}), which does not "
            "exist where compiled code runs: write it in JAX, or compute it before or after the model"
        )
    found = _compat.calls_of(jaxpr, _compat.DEBUG_CALLS)
    if not found:
        return program
    places = ", ".join(dict.fromkeys(f"{eqn.primitive.name} at {_compat.source_of(eqn)}" for eqn in found))
    report = PassReport("debugging", metrics={"left out, for inference": places})
    expansion = program.expansion
    if expansion is not None:
        expansion = dataclasses.replace(expansion, fn=_quiet(expansion.fn))
    history = (*program.history, report)
    return dataclasses.replace(program, fn=_quiet(program.fn), expansion=expansion, history=history)


def _quiet(fn: Callable[..., Any]) -> Callable[..., Any]:
    def quiet(weights: Any, *inputs: Any) -> Any:
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(weights, *inputs)
        outs = _compat.evaluate(_compat.without_debugging(closed), jax.tree.leaves((weights, inputs)))
        return jax.tree.unflatten(jax.tree.structure(shape), outs)

    return quiet
