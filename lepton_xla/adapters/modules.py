"""Converts Flax modules, Linen and NNX, to programs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lepton_xla.adapters.metadata import linen_axes, nnx_axes
from lepton_xla.adapters.written import written
from lepton_xla.environment.extras import Needs
from lepton_xla.errors import ModelError
from lepton_xla.program import Program, TensorSpec, probe_sizes, trace
from lepton_xla.trees import abstract, name_leaves, some_names

# Arguments by which Linen modules are told that they are not trained.
INFERENCE = {
    "train": False,
    "training": False,
    "is_training": False,
    "deterministic": True,
    "use_running_average": True,
}


def from_linen(
    module: Any,
    variables: Mapping[str, Any],
    inputs: Mapping[str, TensorSpec],
    *,
    method: str | None = None,
    **kwargs: Any,
) -> Program:
    """Make a `Program` from a Flax Linen module and its variables.

    Args:
        module: a `flax.linen.Module`.
        variables: every collection the module reads (`params`, `batch_stats`, ...); all of it becomes weights. Boxes
            such as `nn.Partitioned` are removed; their names become `Program.axes`.
        inputs: name -> spec, in the order of the module's positional arguments.
        method: the module's method to call; `__call__` by default.
        **kwargs: static keyword arguments. Arguments named `train`, `training` or `is_training` are set False,
            `deterministic` and `use_running_average` True, unless given here.

    Raises:
        ModelError: as `trace`.

    >>> import flax.linen as nn
    >>> module = nn.Dense(3)
    >>> variables = module.init(jax.random.key(0), jnp.ones((1, 4)))
    >>> program = lx.from_linen(module, variables, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> sorted(program.weights), str(program.outputs["output"])
    (['params/bias', 'params/kernel'], 'float32[batch, 3]')
    """
    static = mode_arguments(method_of(module, method or "__call__"), kwargs, training=False)

    def fn(weights: Any, *args: Any) -> Any:
        return module.apply(weights, *args, method=method, **static)

    plain, axes = linen_axes(dict(variables))
    return trace(fn, plain, inputs).replace(axes=axes)


def from_nnx(module: Any, inputs: Mapping[str, TensorSpec], *, method: str | None = None, **kwargs: Any) -> Program:
    """Make a `Program` from a Flax NNX module, whose state becomes the weights.

    A copy of the module is put into inference mode (`module.eval()`); the given module is not changed. A program is
    stateless, so a module that writes state when it is called (`nnx.Cache`, a batch norm in training mode, a counter)
    is refused. Intermediates (`nnx.Intermediate`) are dropped. Random streams may advance, as `nnx.split_rngs` does, if
    no output depends on them. The `out_sharding` of its variables becomes `Program.axes`.

    Args:
        module: a `flax.nnx.Module`.
        inputs: name -> spec, in the order of the method's positional arguments.
        method: the module's method to call; `__call__` by default.
        **kwargs: static keyword arguments for the call.

    Raises:
        ModelError: as `trace`; or if a call writes state, with its name.

    >>> from flax import nnx
    >>> module = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    >>> program = lx.from_nnx(module, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> sorted(program.weights), str(program.outputs["output"])
    (['bias', 'kernel'], 'float32[batch, 3]')
    """
    with Needs("flax", "a Flax module"):
        from flax import nnx

    if not isinstance(module, nnx.Module):
        raise ModelError(
            f"from_nnx takes a flax.nnx.Module, not a {type(module).__name__}; `trace` takes any function of weights "
            f"and inputs"
        )
    name = method or "__call__"
    method_of(module, name)
    inference = nnx.clone(module)
    inference.eval()
    graph, variables, rest = nnx.split(inference, nnx.Not(nnx.RngState), ...)
    pure = nnx.to_pure_dict(variables)
    suspects: set[str] = set()

    def call(weights: Any, random: Any, *args: Any) -> tuple[Any, Any, Any]:
        """Return the outputs and the state after the call: first the non-random, then the random part."""
        state, streams = jax.tree.map(lambda leaf: leaf, (variables, rest))
        nnx.replace_by_pure_dict(state, weights)
        nnx.replace_by_pure_dict(streams, random)
        called = nnx.merge(graph, state, streams)
        out = getattr(called, name)(*args, **kwargs)
        after = nnx.state(called, nnx.RngState, nnx.Not(nnx.Intermediate))
        return out, nnx.to_pure_dict(after[1]), nnx.to_pure_dict(after[0])

    def fn(weights: Any, *args: Any) -> Any:
        random = nnx.to_pure_dict(rest)
        out, *after = call(weights, random, *args)
        for given, left in zip((weights, random), after, strict=True):
            known = name_leaves(given)
            suspects.update(name for name, leaf in name_leaves(left).items() if known.get(name) is not leaf)
        return out

    program = trace(fn, pure, inputs)
    if suspects:
        _refuse_written(call, pure, nnx.to_pure_dict(rest), inputs)
    return program.replace(axes=nnx_axes(variables))


def _refuse_written(call: Callable[..., Any], weights: Any, random: Any, inputs: Mapping[str, TensorSpec]) -> None:
    """Raise `ModelError` if a call writes state, or if its outputs depend on a random stream that it advances."""
    trees = [jax.tree.structure(part) for part in (weights, random)]
    names = [list(name_leaves(part)) for part in (weights, random)]
    streams = set(names[1])

    def flat_call(state: Mapping[str, Any], *args: Any) -> tuple[Any, Any]:
        parts = [jax.tree.unflatten(t, [state[name] for name in own]) for t, own in zip(trees, names, strict=True)]
        out, *after = call(*parts, *args)
        return out, name_leaves(after[0]) | name_leaves(after[1])

    state = abstract(name_leaves(weights) | name_leaves(random))
    sizes, _ = probe_sizes(lambda flat, *args: flat_call(flat, *args)[0], state, inputs)
    changed, read = written(flat_call, state, *(spec.at(sizes) for spec in inputs.values()))
    kept = [name for name in changed if name not in streams]
    if kept:
        raise ModelError(
            f"calling the module writes its state {some_names(map(repr, kept))}, but a program is stateless; make the "
            "state an input and an output"
        )
    drawn = [name for name in read if name in streams]
    if drawn:
        raise ModelError(
            f"the outputs depend on random numbers from {some_names(map(repr, drawn))}, which would be the same in "
            "every call of a program; make them, or their key, an input"
        )


def method_of(module: Any, name: str) -> Callable[..., Any]:
    """Find a method of a module.

    Raises:
        ModelError: if the module has none of this name.
    """
    found = getattr(type(module), name, None)
    if not callable(found):
        raise ModelError(f"a {type(module).__name__} has no method {name!r}")
    return found


def mode_arguments(function: Callable[..., Any], given: Mapping[str, Any], *, training: bool) -> dict[str, Any]:
    """Keyword arguments that put a Linen module into training or inference mode, unless they are given."""
    parameters = inspect.signature(function).parameters
    mode = {name: value != training for name, value in INFERENCE.items() if name in parameters}
    return mode | dict(given)
