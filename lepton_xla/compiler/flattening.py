"""A program as functions of flat arrays, which is what executables are, and their compilation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lepton_xla.compiler import _xla
from lepton_xla.compiler.code import Code
from lepton_xla.errors import CompileError
from lepton_xla.program import Program
from lepton_xla.trees import abstract, name_leaves

_LOG = logging.getLogger(__name__)
_CONSTANTS_WARNING_BYTES = 1 << 20
_CONSTANTS_LIMIT_BYTES = 32 << 20

type Flat = Callable[..., tuple[Any, ...]]


def flat_functions(program: Program) -> tuple[Flat | None, Flat]:
    """Returns the program as functions of flat arrays: the unpacking of its weights (or None), and the model.

    The model takes the weight leaves (unpacked, if there is an unpacking), then the inputs, and returns the outputs in
    order.
    """
    stored = jax.tree.structure(program.weights)
    if program.expansion is None:
        return None, _model(stored, program.fn, list(program.outputs))
    expand = program.expansion.expand

    def flat_expand(*leaves: Any) -> tuple[Any, ...]:
        return tuple(jax.tree.leaves(expand(jax.tree.unflatten(stored, leaves))))

    expanded = jax.tree.structure(jax.eval_shape(expand, abstract(program.weights)))
    return flat_expand, _model(expanded, program.expansion.fn, list(program.outputs))


def _model(treedef: Any, fn: Callable[..., Any], names: Sequence[str]) -> Flat:
    count = treedef.num_leaves

    def flat(*args: Any) -> tuple[Any, ...]:
        outputs = name_leaves(fn(jax.tree.unflatten(treedef, args[:count]), *args[count:]), single="output")
        return tuple(outputs[name] for name in names)

    return flat


def compile_flat(
    fn: Flat,
    arrays: Sequence[jax.Array],
    inputs: Sequence[jax.ShapeDtypeStruct],
    what: str,
    options: Mapping[str, Any] | None,
) -> Code:
    """Compile a function of flat arrays.

    Args:
        fn: the function.
        arrays: its weights.
        inputs: shapes of what follows them.
        what: what it is, for messages.
        options: of `jax.jit`, such as shardings.

    Raises:
        CompileError: if XLA refuses it, or it holds large constants.
    """
    try:
        traced = jax.jit(fn, keep_unused=True, **(options or {})).trace(*arrays, *inputs)
        _check_constants(traced.jaxpr.consts)
        return Code.made(traced.lower())
    except CompileError:
        raise
    except Exception as error:  # a model or XLA may raise anything
        raise CompileError(f"the model does not compile for {what}: {_xla.reason(error)}") from error


def _check_constants(constants: Sequence[Any]) -> None:
    """Refuse large constants: they would be copied into every executable, and no pass or update could reach them."""
    total = sum(
        constant.nbytes if hasattr(constant, "nbytes") else np.asarray(constant).nbytes for constant in constants
    )
    advice = f"the model closes over {total / 2**20:.1f} MiB of constant arrays; pass learned arrays as weights"
    if total > _CONSTANTS_LIMIT_BYTES:
        raise CompileError(f"{advice} (limit: {_CONSTANTS_LIMIT_BYTES >> 20} MiB)")
    if total > _CONSTANTS_WARNING_BYTES:
        _LOG.warning("%s: they are stored in the executable of every bucket", advice)
