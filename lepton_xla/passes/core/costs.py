"""Counts floating-point operations, bytes moved and parameters of a program's jaxpr, site by site.

Counts refer to the program as written, before compilation: a multiply and an add are two operations. A convolution
counts its whole window at every output position, padding included, as tables in papers do (XLA's count excludes
padding, so it is lower for `SAME` padding and equal for `VALID`). The body of a `scan` counts once per step, that of a
`while` once, every branch of a `cond` as if taken, and the body of a `shard_map` for one device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lepton_xla import _compat
from lepton_xla.arguments import takes
from lepton_xla.passes.core.rewriting import rewrite
from lepton_xla.passes.core.sites import SITE_PRIMITIVES, site_name, takes_rows
from lepton_xla.passes.core.walker import Context, TracedValue, Values
from lepton_xla.program import Program, probe_sizes
from lepton_xla.tables import Table, short, size
from lepton_xla.trees import abstract, leaf_bytes, tree_bytes


@dataclasses.dataclass(frozen=True)
class SiteCost:
    """The cost of a site in one call of the program.

    Attributes:
        site: the site's name, as from `find_sites`; a weight that is dequantized first keeps its name.
        kind: the primitive.
        repeats: number of runs: the product of the lengths of the surrounding scans.
        container: the innermost surrounding control flow; empty at the top level.
        flops: operations over all repeats; 0 for an embedding.
        parameters: elements of the stored weight, of the whole stack; 0 for a product of two activations.
        weights_bytes: bytes of the stored weight in memory, scales included.
        weights_read_bytes: bytes of the weight read over all repeats: an embedding reads the rows that it looks up; a
            weight that every step of a scan uses is read at every step.
        inputs_bytes: bytes of the activations read over all repeats.
        outputs_bytes: bytes of the results written over all repeats.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> (site,) = lx.passes.cost(program, {"batch": 2}).sites
    >>> site.flops, site.bytes_moved
    (64, 128)
    """

    site: str
    kind: str
    repeats: int
    container: str
    flops: int
    parameters: int
    weights_bytes: int
    weights_read_bytes: int
    inputs_bytes: int
    outputs_bytes: int

    @property
    def bytes_moved(self) -> int:
        """Bytes read and written over all repeats, without any caching."""
        return self.weights_read_bytes + self.inputs_bytes + self.outputs_bytes


@dataclasses.dataclass(frozen=True)
class CostReport:
    """The cost of one call of a program.

    Attributes:
        sizes: sizes of the symbolic dimensions of the call.
        sites: one entry per site, in the order of execution.
        other_flops: operations outside of sites: one per element of an element-wise result, of a reduction's operand,
            and of a pooling window; moving and converting data is free.
        parameters: elements of all weights, model state included, each weight once.
        weights_bytes: their bytes in memory.
        uncounted: primitives whose arithmetic is not counted, because it cannot be inspected.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> report = lx.passes.cost(program, {"batch": 2})
    >>> report.site_flops, report.flops, report.bytes_moved
    (64, 64, 128)
    """

    sizes: dict[str, int]
    sites: tuple[SiteCost, ...]
    other_flops: int
    parameters: int
    weights_bytes: int
    uncounted: tuple[str, ...] = ()

    @property
    def site_flops(self) -> int:
        """Operations at the sites."""
        return sum(site.flops for site in self.sites)

    @property
    def flops(self) -> int:
        """All operations."""
        return self.site_flops + self.other_flops

    @property
    def bytes_moved(self) -> int:
        """Bytes read and written at the sites."""
        return sum(site.bytes_moved for site in self.sites)

    def to_json(self) -> dict[str, Any]:
        """Give plain dicts, lists and numbers, totals included."""
        totals = {"flops": self.flops, "site_flops": self.site_flops, "bytes_moved": self.bytes_moved}
        sites = [dataclasses.asdict(site) | {"bytes_moved": site.bytes_moved} for site in self.sites]
        return dataclasses.asdict(self) | totals | {"sites": sites, "uncounted": list(self.uncounted)}

    def __str__(self) -> str:
        rows = [
            (
                site.site, site.kind, str(site.repeats), short(site.flops), short(site.parameters),
                size(site.weights_bytes), size(site.bytes_moved),
            )
            for site in self.sites
        ]  # fmt: skip
        rows.append(("elsewhere", "", "", short(self.other_flops), "", "", ""))
        total = short(self.flops), short(self.parameters), size(self.weights_bytes), size(self.bytes_moved)
        columns = ("site", "kind", ">runs", ">FLOPs", ">parameters", ">weights", ">moved")
        at = ", ".join(f"{name}={at}" for name, at in self.sizes.items())
        title = "cost of one call" + (f" at {at}" if at else "")
        notes = [f"not counted: {', '.join(self.uncounted)}"] if self.uncounted else []
        return "\n".join([title, *Table(title, columns, rows, ("total", "", "", *total)).lines(), *notes])


@takes(program=Program, sizes=Mapping)
def cost(program: Program, sizes: Mapping[str, int] | None = None) -> CostReport:
    """Count the cost of one call of a program.

    Args:
        program: any program, before or after passes.
        sizes: sizes of the symbolic dimensions, such as `{"batch": 1}`; chosen by default.

    Raises:
        ModelError: if a size is missing.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> lx.passes.cost(program, {"batch": 2}).flops  # 2 * 2 * 4 * 4
    64
    """
    chosen = dict(sizes) if sizes is not None else probe_sizes(program.fn, program.weights, program.inputs)[0]
    counter = _Counter(program)

    def prepare(weights: Mapping[str, Any], *inputs: Any) -> tuple[Any, ...]:
        marked = {
            path: jax.tree.map(functools.partial(_Constant, path=path), weight) for path, weight in weights.items()
        }
        return marked, *inputs

    counted = rewrite(program.fn, {"*": counter.visit}, inline=True, on_unknown="keep", prepare=prepare)
    jax.eval_shape(counted, abstract(program.weights), *program.abstract_inputs(chosen))
    return CostReport(
        sizes=chosen,
        sites=tuple(counter.sites.values()),
        other_flops=sum(counter.other_flops.values()),
        parameters=sum(map(_size, program.weights.values())),
        weights_bytes=program.weights_bytes,
        uncounted=tuple(dict.fromkeys(counter.uncounted.values())),
    )


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["path"])
@dataclasses.dataclass(frozen=True)
class _Constant(TracedValue):
    """An array that depends on no input; `path` is the largest weight that it depends on, None if there is none."""

    value: jax.Array
    path: str | None

    def materialize(self) -> jax.Array:
        return self.value


class _Counter:
    """The counts of one walk, by equation, because a walk may trace a body more than once."""

    def __init__(self, program: Program) -> None:
        self.weights = program.weights
        self.sites: dict[Any, SiteCost] = {}
        self.other_flops: dict[Any, int] = {}
        self.uncounted: dict[Any, str] = {}

    def visit(self, context: Context, eqn: Any, values: Values) -> Values | None:
        """Count an equation, without changing it."""
        kind = eqn.primitive.name
        paths = [value.path if isinstance(value, _Constant) else None for value in values]
        weights = [path for path in paths if path is not None]
        if _is_site(eqn, paths):
            self.sites[context.key] = self._site(context, eqn, paths)
            return None
        if _is_opaque(eqn):
            self.uncounted[context.key] = kind
            return None
        flops = _product_flops(eqn) if kind in SITE_PRIMITIVES else _elementwise_flops(eqn)
        self.other_flops[context.key] = flops * context.repeats
        constant = all(
            isinstance(atom, _compat.LITERAL) or isinstance(value, _Constant)
            for atom, value in zip(eqn.invars, values, strict=True)
        )
        if not constant or eqn.effects:
            return None
        largest = max(weights, key=lambda path: _size(self.weights[path]), default=None)
        return [_Constant(out, largest) for out in context.bind(eqn, values)]

    def _site(self, context: Context, eqn: Any, paths: Sequence[str | None]) -> SiteCost:
        kind = eqn.primitive.name
        path = next((path for path in paths if path is not None), None)
        parameters = stored_bytes = read = 0
        if path is not None:
            parameters, stored_bytes = _size(self.weights[path]), tree_bytes(self.weights[path])
            touched = eqn.outvars[0] if kind == "gather" else eqn.invars[paths.index(path)]
            read = stored_bytes * _size(touched.aval) * context.repeats // max(parameters, 1)
        activations = [atom for atom, path in zip(eqn.invars, paths, strict=True) if path is None]
        return SiteCost(
            site=site_name(context, kind, path, self.weights),
            kind=kind,
            repeats=context.repeats,
            container=context.container,
            flops=_product_flops(eqn) * context.repeats,
            parameters=parameters,
            weights_bytes=stored_bytes,
            weights_read_bytes=read,
            inputs_bytes=sum(map(_bytes, activations)) * context.repeats,
            outputs_bytes=_bytes(eqn.outvars[0]) * context.repeats,
        )


def _is_site(eqn: Any, paths: Sequence[str | None]) -> bool:
    """Whether a weight, or an activation, multiplies an activation here; `paths` are the operands' weights."""
    if eqn.primitive.name == "gather":
        return paths[0] is not None and takes_rows(eqn)
    return eqn.primitive.name in SITE_PRIMITIVES and sum(path is not None for path in paths[:2]) < 2


def _product_flops(eqn: Any) -> int:
    """Operations of one run of a product: two per multiply-add."""
    left, right = (atom.aval.shape for atom in eqn.invars[:2])
    out = _size(eqn.outvars[0].aval)
    match eqn.primitive.name:
        case "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            return 2 * out * math.prod(left[axis] for axis in contracted)
        case "conv_general_dilated":
            channels = right[eqn.params["dimension_numbers"].rhs_spec[0]]
            return 2 * out * math.prod(right) // max(channels, 1)
        case "ragged_dot_general":
            numbers = eqn.params["ragged_dot_dimension_numbers"]
            (contracted, _), _ = numbers.dot_dimension_numbers
            depth = math.prod(left[axis] for axis in contracted)
            # If groups are ragged along the contracted dimension, they share its length.
            shared = set(numbers.lhs_ragged_dimensions) <= set(contracted)
            return 2 * out * depth // (eqn.invars[2].aval.shape[-1] if shared else 1)
        case _:
            return 0


# Primitives that move, convert or name data and compute nothing.
_FREE = {
    "bitcast_convert_type", "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "copy_p", "device_put",
    "dynamic_slice", "dynamic_update_slice", "expand_dims", "gather", "iota", "name", "optimization_barrier", "pad",
    "pcast", "pvary", "random_clone", "random_seed", "random_unwrap", "random_wrap", "reduce_precision", "reshape",
    "rev", "scatter", "select_n", "sharding_constraint", "slice", "sort", "split", "squeeze", "stack", "transpose",
    "unstack",
}  # fmt: skip
# Primitives whose operations are not proportional to their elements.
_ALGORITHMS = {
    "cholesky", "eig", "eigh", "fft", "geqrf", "hessenberg", "householder_product", "lu", "qr", "schur", "svd",
    "triangular_solve", "tridiagonal", "tridiagonal_solve",
}  # fmt: skip


def product_flops(jaxpr: Any) -> int:
    """Count the operations of all products in a jaxpr, two per multiply-add; a scan's body as often as it runs.

    Bodies of `while` count once, of the branches of a `cond` the largest.

    >>> product_flops(jax.make_jaxpr(lambda x: x @ x)(jnp.eye(4)))  # 2 * 4 * 4 * 4
    128
    """
    total = 0
    for eqn in _compat.open_jaxpr(jaxpr)[0].eqns:
        inner = [product_flops(each) for each in _compat.inner_jaxprs(eqn)]
        if eqn.primitive.name in SITE_PRIMITIVES:
            total += _product_flops(eqn)
        elif eqn.primitive.name == "cond":
            total += max(inner)
        else:
            total += sum(inner) * int(eqn.params["length"] if eqn.primitive.name == "scan" else 1)
    return total


def _elementwise_flops(eqn: Any) -> int:
    name = eqn.primitive.name
    if name in _FREE:
        return 0
    results = max((_size(var.aval) for var in eqn.outvars), default=0)
    if name.startswith("reduce_window"):
        return results * math.prod(eqn.params["window_dimensions"])
    if name.startswith("scatter"):
        return _size(eqn.invars[-1].aval)
    if name.startswith(("reduce", "argm")):
        return max(_size(atom.aval) for atom in eqn.invars)
    return results


def _is_opaque(eqn: Any) -> bool:
    """Whether an equation may compute anything: an external call, or a container that the walker does not know."""
    name = eqn.primitive.name
    return name in _ALGORITHMS or "call" in name or bool(_compat.inner_jaxprs(eqn))


def _size(array: Any) -> int:
    """Number of elements of an array; a quantized one counts with its dequantized shape."""
    shape = getattr(array, "shape", None)
    return math.prod(shape) if shape is not None else sum(map(_size, jax.tree.leaves(array)))


def _bytes(atom: Any) -> int:
    return leaf_bytes(atom.aval.shape, atom.aval.dtype)
