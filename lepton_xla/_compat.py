"""JAX internals: jaxprs, equations, and differences between JAX versions. Only this file and `compiler/_xla.py` use
them.

Written for jax 0.11.1 to 0.12.
"""

from __future__ import annotations

import contextlib
import re
import zlib
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import clusters, config, debugging, dispatch, distributed, source_info_util
from jax._src.core import ShapedArray, Tracer
from jax._src.interpreters import partial_eval
from jax._src.sharding_impls import ShardingContext, parse_flatten_op_sharding
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend import core as jex_core
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

type Jaxpr = Any
type Equation = Any

LITERAL = jex_core.Literal


def open_jaxpr(jaxpr: Jaxpr) -> tuple[Jaxpr, Sequence[Any]]:
    """The open jaxpr and its constants, from a closed or an open jaxpr."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def is_traced(value: Any) -> bool:
    """Tell whether a value is a tracer of an active trace, not an array."""
    return isinstance(value, Tracer)


def is_jaxpr(value: Any) -> bool:
    """Tell whether a parameter of an equation is a jaxpr, open or closed."""
    return hasattr(value, "eqns")


def inner_jaxprs(eqn: Equation) -> list[Jaxpr]:
    """All jaxprs in an equation's parameters, one level deep.

    The scalar functions that combine two elements in reductions and scatters are excluded: they are not the user's
    code.
    """
    if eqn.primitive.name.startswith(("reduce", "scatter", "select_and_scatter")):
        return []
    found = []
    for value in eqn.params.values():
        members = value if isinstance(value, (tuple, list)) else (value,)
        found.extend(member for member in members if is_jaxpr(member))
    return found


@contextlib.contextmanager
def equation_context(eqn: Equation) -> Generator[None, None, None]:
    """The name stack, traceback, mesh and configuration under which the equation was traced."""
    name_stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=name_stack), eqn.ctx.manager:
        yield


def bind(eqn: Equation, values: Sequence[Any], **changes: Any) -> list[Any]:
    """Evaluate an equation on other values, with some parameters changed; returns its outputs as a list.

    It runs in the caller's context; `equation_context` gives the equation's own.
    """
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params | changes))
    return list(out) if eqn.primitive.multiple_results else [out]


def live(jaxpr: Jaxpr) -> tuple[list[Equation], set[Any]]:
    """The equations of an open jaxpr that its outputs or effects need, and the variables these read."""
    needed = {atom for atom in jaxpr.outvars if not isinstance(atom, LITERAL)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(var in needed for var in eqn.outvars):
            kept.append(eqn)
            needed.update(atom for atom in eqn.invars if not isinstance(atom, LITERAL))
    return kept[::-1], needed


def settings() -> Any:
    """JAX's settings in this thread, as a comparable value; context managers set them per thread."""
    return config.trace_context()


def compile_settings() -> str:
    """The settings of this process that change how XLA compiles a program, as text."""
    names = ("jax_disable_most_optimizations", "jax_optimization_level")
    return ", ".join(f"{name} = {jax.config.values.get(name)}" for name in names)


def runtime_version(device: Any) -> str:
    """What a device's client says of its runtime: a CUDA version, a libtpu build, or just `cpu`."""
    return str(device.client.platform_version)


def inputs_read(jaxpr: Jaxpr, wanted: Sequence[bool]) -> list[bool]:
    """Which inputs of an open jaxpr the wanted outputs depend on, analyzing the bodies of `jit`, `scan` and so on."""
    _, used = partial_eval.dce_jaxpr(jaxpr, list(wanted))
    return list(used)


def handed_through(jaxpr: Jaxpr) -> list[int | None]:
    """For each output of an open jaxpr: the index of the input that it is, passed on unchanged; else None."""
    places: dict[Any, int | None] = {var: index for index, var in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        inner = inner_jaxprs(eqn)
        if eqn.primitive.name in ("jit", "remat2", "checkpoint") and len(inner) == 1:
            for var, place in zip(eqn.outvars, handed_through(open_jaxpr(inner[0])[0]), strict=True):
                given = None if place is None else eqn.invars[place]
                places[var] = None if given is None or isinstance(given, LITERAL) else places.get(given)
    return [None if isinstance(atom, LITERAL) else places.get(atom) for atom in jaxpr.outvars]


def scan_split(eqn: Equation) -> tuple[int, int]:
    """Number of constants and of carries among a scan's operands."""
    consts, carry, _ = eqn.params["ft_in"].update(eqn.invars).unpack()
    return len(list(consts)), len(list(carry))


def is_manual(eqn: Equation) -> bool:
    """Tell whether an equation was traced inside a `shard_map`, at any depth."""
    return bool(getattr(eqn.ctx.cur_abstract_mesh, "manual_axes", ()))


def varying(value: Any) -> frozenset[str]:
    """The manual mesh axes along which an array, or its shape, varies; empty if `shard_map` does not check them."""
    manual = (value if isinstance(value, jax.ShapeDtypeStruct) else jax.typeof(value)).manual_axis_type
    return frozenset(manual.varying) if manual is not None else frozenset()


def vary(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Mark an array as varying along these manual mesh axes."""
    return jax.lax.pcast(array, tuple(sorted(axes)), to="varying") if axes else array


def user_shardings(shardings: Sequence[Any]) -> tuple[Any, ...]:
    """A jit equation's shardings in the form that `jax.jit` takes: None where the user gave none."""
    return tuple(s if isinstance(s, jax.sharding.Sharding) else None for s in shardings)


def scope(eqn: Equation) -> str:
    """The names of the modules and scopes an equation was traced in, joined by `/`, transforms stripped."""
    text = str(eqn.source_info.name_stack)
    return "/".join(part for part in re.sub(r"\b\w+\(|\)", "", text).split("/") if part)


_DEBUG_EFFECTS = frozenset({debugging.debug_effect, debugging.ordered_debug_effect})
DEBUG_CALLS = frozenset({"debug_callback", "debug_print", "inspect_sharding"})
HOST_CALLS = frozenset({"pure_callback", "io_callback", "buffer_callback"})


def calls_of(jaxpr: Jaxpr, names: frozenset[str]) -> list[Equation]:
    """The equations of these primitives in a jaxpr, at any depth."""
    found: list[Equation] = []
    for eqn in open_jaxpr(jaxpr)[0].eqns:
        if eqn.primitive.name in names:
            found.append(eqn)
        found.extend(call for inner in inner_jaxprs(eqn) for call in calls_of(inner, names))
    return found


def without_debugging(jaxpr: Jaxpr) -> Jaxpr:
    """Remove `DEBUG_CALLS`, which have no outputs, from a jaxpr at any depth."""
    inner, _ = open_jaxpr(jaxpr)
    if inner is not jaxpr:
        return jaxpr.replace(jaxpr=without_debugging(inner))
    kept = [
        eqn.replace(
            params={name: _each_jaxpr(value) for name, value in eqn.params.items()},
            effects=eqn.effects - _DEBUG_EFFECTS,
        )
        for eqn in jaxpr.eqns
        if eqn.primitive.name not in DEBUG_CALLS
    ]
    return jaxpr.replace(eqns=kept, effects=jaxpr.effects - _DEBUG_EFFECTS)


def _each_jaxpr(value: Any) -> Any:
    if is_jaxpr(value):
        return without_debugging(value)
    if type(value) in (tuple, list):
        return type(value)(map(_each_jaxpr, value))
    return value


def source_of(eqn: Equation) -> str:
    """The location in the user's code that made an equation, such as `model.py:12:4 (forward)`."""
    return source_info_util.summarize(eqn.source_info)


def evaluate(jaxpr: Jaxpr, values: Sequence[Any]) -> list[Any]:
    """The outputs of a closed jaxpr."""
    return list(jex_core.jaxpr_as_fun(jaxpr)(*values))


def cluster_is_detected() -> bool:
    """Tell whether JAX finds by itself which process of which run this is: in TPU slices and under Open MPI.

    SLURM and Kubernetes are left out, because `lepton_xla.launch` reads their variables itself.
    """
    return any(
        kind.is_env_present()
        for kind in clusters.ClusterEnv._cluster_types  # pyright: ignore[reportPrivateUsage]
        if not kind.opt_in_only_method and kind.name not in ("slurm", "")  # Kubernetes's has no name
    )


def coordinator() -> Any:
    """The client of the coordinator of a run of several processes: a store of texts by name.

    Raises:
        RuntimeError: if this process has not joined a run.
    """
    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("this process has joined no run; call lx.launch.initialize() first")
    return client


def row_primitive(
    name: str,
    shape: Callable[..., tuple[tuple[Any, ...], Any]],
    by_xla: Callable[..., jax.Array],
    call: Callable[..., tuple[str, tuple[Any, ...], dict[str, Any]] | None],
    by_row: tuple[int, ...] = (0,),
    axes: Callable[..., str] | None = None,
) -> Any:
    """Make an operation on the rows of its first operand, [M, ...], that a custom call may compute on a CPU.

    It is one equation for all passes, and lowered for each platform where it is compiled. Rows are independent, so
    `vmap` over operands of as many rows makes more rows.

    Args:
        name: of the primitive.
        shape: `shape(*operands, **params)`: shape and dtype of the result, [M, ...].
        by_xla: `by_xla(*operands, **params)`: the same in XLA's own operations.
        call: `call(*operands, **params)`: target, operands and attributes of the custom call; None if there is none
            here.
        by_row: indices of the operands that have as many rows as the result, or none at all.
        axes: `axes(**params)`: letters of the axes of operands and result, such as `mk,nk->mn`. Several devices may
            each compute a part of an axis of the result, of the parts of operands that have its letter. By default of
            rows.
    """
    primitive = jex_core.Primitive(name)
    dispatch.prim_requires_devices_during_lowering.add(primitive)

    def shaped(*operands: Any, **params: Any) -> Any:
        return ShapedArray(*shape(*operands, **params), manual_axis_type=operands[0].manual_axis_type)

    def evaluate_now(*operands: Any, **params: Any) -> Any:
        return jax.jit(lambda *given: primitive.bind(*given, **params))(*operands)

    generic = mlir.lower_fun(by_xla, multiple_results=False)

    def on_cpu(context: Any, *operands: Any, **params: Any) -> Any:
        places = {id(operand): place for place, operand in enumerate(operands)}
        found = call(*operands, **params)
        if found is None:
            return generic(context, *operands, **params)
        if _on_several_devices(context):
            return mlir.lower_fun(cut, multiple_results=False)(context, *operands, **params)
        target, given, attributes = found
        kept = context.replace(avals_in=[context.avals_in[places[id(operand)]] for operand in given])
        return jax.ffi.ffi_lowering(target)(kept, *given, **attributes)

    def cut(*operands: Any, **params: Any) -> Any:
        rows = ",".join("m" if place in by_row else "" for place in range(len(operands)))
        letters = axes(**params) if axes else f"{rows}->m"
        return _cut(
            lambda *given: primitive.bind(*given, **params), operands, letters, f"{name} {sorted(params.items())}"
        )

    def batched(operands: Sequence[Any], axes: Sequence[int | None], **params: Any) -> tuple[Any, int]:
        size = next(operand.shape[axis] for operand, axis in zip(operands, axes, strict=True) if axis is not None)
        moved = [
            operand if axis is None else jnp.moveaxis(operand, axis, 0)
            for operand, axis in zip(operands, axes, strict=True)
        ]
        if all(axis is None for place, axis in enumerate(axes) if place not in by_row):
            rows = moved[0].shape[0 if axes[0] is None else 1]
            for place in by_row:
                if moved[place].shape[0] == 0:
                    continue
                if axes[place] is None:
                    moved[place] = jnp.broadcast_to(moved[place][None], (size, *moved[place].shape))
                moved[place] = jnp.reshape(moved[place], (size * rows, *moved[place].shape[2:]))
            out = primitive.bind(*moved, **params)
            return jnp.reshape(out, (size, rows, *out.shape[1:])), 0

        def one(parts: Sequence[Any]) -> Any:
            rest = iter(parts)
            given = [operand if axis is None else next(rest) for operand, axis in zip(moved, axes, strict=True)]
            return primitive.bind(*given, **params)

        mapped = [operand for operand, axis in zip(moved, axes, strict=True) if axis is not None]
        return jax.lax.map(one, mapped), 0

    primitive.def_impl(evaluate_now)
    primitive.def_abstract_eval(shaped)
    mlir.register_lowering(primitive, generic)
    mlir.register_lowering(primitive, on_cpu, platform="cpu")
    batching.primitive_batchers[primitive] = batched
    return primitive


def _on_several_devices(context: Any) -> bool:
    """Whether something is lowered for several devices of a mesh, among which XLA is to share it."""
    axes = context.module_context.axis_context
    shardy = config.use_shardy_partitioner.value  # only it takes the rules of `_cut`
    return shardy and isinstance(axes, ShardingContext) and axes.num_devices > 1 and bool(axes.abstract_mesh)


def _cut(compute: Callable[..., Any], operands: Sequence[Any], axes: str, text: str) -> Any:
    """Compute something on several devices, each the part that is its own of the axes of the result.

    Args:
        compute: computes a part, of parts of the operands.
        operands: all of them.
        axes: as in `row_primitive`.
        text: says what is computed. JAX's cache of compiled programs sees operands and rule, not what a part computes.
    """
    *given, result = axes.replace("->", ",").split(",")
    out = jax.eval_shape(compute, *operands)
    sizes = dict(zip(result, out.shape, strict=False))
    # What is missing has no elements, and what is the same for all has size one: neither is cut.
    kept = [place for place, operand in enumerate(operands) if operand.size]
    tag = jnp.full(1, zlib.crc32(text.encode()), jnp.uint32)

    def letters(place: int) -> list[str | None]:
        names = [*given[place], *(None for _ in operands[place].shape)]
        found = zip(names, operands[place].shape, strict=False)
        return [name if name is not None and sizes.get(name) == size else None for name, size in found]

    def part(_tag: Any, *there: Any) -> Any:
        every = [jnp.zeros(operand.shape, operand.dtype) for operand in operands]
        for place, operand in zip(kept, there, strict=True):
            every[place] = operand
        return compute(*every)

    def partition(mesh: Any, _shapes: Any, whole: Any) -> tuple[Any, ...]:
        try:
            (spec,) = parse_flatten_op_sharding(whole.sharding._to_xla_hlo_sharding(out.ndim), mesh)
        except (ValueError, KeyError, AssertionError, NotImplementedError):
            spec = PartitionSpec()  # a part of a mesh's axis has no name: everything is gathered
        cuts: dict[str | None, Any] = dict(zip(result, spec, strict=False))

        def sharding(names: Iterable[str | None]) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*(cuts.get(name) for name in names)))

        return mesh, part, sharding(result), (sharding([None]), *(sharding(letters(place)) for place in kept))

    def factors(of: str, names: Sequence[str | None], rank: int) -> str:
        padded = [*names, *(None for _ in range(rank - len(names)))]
        return " ".join(name or f"{of}_{axis}" for axis, name in enumerate(padded))

    rule = ", ".join(["tag", *(factors(f"x{place}", letters(place), operands[place].ndim) for place in kept)])
    call = custom_partitioning(part)
    call.def_partition(
        partition, decode_shardings=False, sharding_rule=f"{rule} -> {factors('y', list(result), out.ndim)}"
    )
    return call(tag, *(operands[place] for place in kept))
