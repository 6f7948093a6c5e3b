"""Calls back into Python: refused by name in what is to be compiled, but for those that are there to debug."""

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
    """The program without `jax.debug.print`, `jax.debug.callback` and the like, and a line in its report that says so.

    Args:
        program: the program.
        sizes: sizes of its symbolic dimensions to look at it.

    Raises:
        CompileError: for a callback whose result the model uses, or that has an effect: compiled code runs in another
            process, where that function is not.
    """
    jaxpr = program.jaxpr(sizes)
    for eqn in _compat.calls_of(jaxpr, _compat.HOST_CALLS):
        called = eqn.params.get("callback")
        name = getattr(getattr(called, "callback_func", called), "__name__", "a function")
        raise CompileError(
            f"the model calls {name!r} in Python ({eqn.primitive.name} at {_compat.source_of(eqn)}), which is not "
            f"there where compiled code runs: write it in JAX, or compute it before or after the model"
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
