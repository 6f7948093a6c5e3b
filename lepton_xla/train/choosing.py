"""Several adapters on one base, of which each row of a batch chooses one.

A row's product with a weight is the base's, computed for all rows together, plus that with the row's low-rank weights:
no row has a whole weight of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla._compat import bind
from lepton_xla.arguments import takes
from lepton_xla.errors import ModelError
from lepton_xla.passes.core.layouts import LayoutOp
from lepton_xla.passes.core.sites import Site, find_sites, rewrite_sites
from lepton_xla.passes.core.tracking import Escapes
from lepton_xla.passes.core.walker import Context, Values, materialize
from lepton_xla.program import Program, TensorSpec, abstract_outputs, probe_sizes
from lepton_xla.raw_inputs import take_categories
from lepton_xla.rows import check_rows_lead, row_symbol
from lepton_xla.train.models import Model
from lepton_xla.train.transfer import LEFT, RIGHT, scale_of, summed

_WHOLE = ":of_each"

type _Pair = tuple[jax.Array, jax.Array]


@takes(adapters=Mapping)
def per_row(
    adapters: Mapping[str, Program], base: Model | Program, *, name: str = "adapter", alpha: float | None = None
) -> Program:
    """Put several adapters on one base: the input `name` says for each row which of them it is for.

    Low-rank weights are looked up by row, and applied beside the base's weights, which are there once. Weights that an
    adapter has as a whole, such as those of `also_train` and the statistics of batch norm, are there once for each. So
    are sums with low-rank weights where these cannot be applied by themselves, as beside a weight that is used for
    more than products.

    Args:
        adapters: what clients call each -> what training a `low_rank` model of the base gave. The base may be one.
        base: what `low_rank` was given.
        name: of the new input, words; an unknown one is refused.
        alpha: what `low_rank` was given, one for all adapters.

    Raises:
        ModelError: for an adapter that is not of this base, a base that is quantized or whose inputs have no rows, or a
            name that is taken.
        CompileError: for an output that has not one result for each row.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> german = lx.train.low_rank(program, 1).program
    >>> both = lx.train.per_row({"none": program, "german": german}, program)
    >>> {path: weight.shape for path, weight in both.weights.items()}
    {'w': (4, 4), 'w:low_rank/left': (2, 4, 1), 'w:low_rank/right': (2, 1, 4)}
    >>> both.converted({"adapter": ["german", "none"]})["adapter.index"].tolist()
    [1, 0]
    """
    program = Model.of(base).program
    symbol = row_symbol(program.inputs)
    if symbol is None or program.generation is not None:
        raise ModelError("the base's inputs have no rows, of which each could choose an adapter")
    check_rows_lead(program.inputs, program.outputs)
    if not jax.tree_util.all_leaves(list(program.weights.values())):
        raise ModelError("the base is quantized: choose among adapters first, and optimize what comes of it")
    if name in program.inputs:
        raise ModelError(f"the program has an input {name!r} already; choose another name")
    if not adapters:
        raise ModelError("there are no adapters")
    for called, adapter in adapters.items():
        if not isinstance(called, str) or not isinstance(adapter, Program):
            raise ModelError(
                f"adapter {called!r} is {type(adapter).__name__}; expected names -> Programs, such as `result.program`"
            )
        _check(called, adapter, program.weights)
    beside = [path for path in program.weights if any(path + LEFT in each.weights for each in adapters.values())]
    changed = {path for path in program.weights if any(_differs(each, program, path) for each in adapters.values())}
    pairs = {path: _pair(path, adapters, program.weights[path], alpha) for path in beside if path not in changed}
    for path in _inseparable(program, symbol, pairs):
        del pairs[path]
        changed.add(path)
    weights = {path: leaf for path, leaf in program.weights.items() if path not in changed}
    for path in (each for each in program.weights if each in changed):
        weights[path + _WHOLE] = jnp.stack([_whole(path, each, alpha) for each in adapters.values()])
    for path, (left, right) in pairs.items():
        weights |= {path + LEFT: left, path + RIGHT: right}
    # Names only: arrays would live as long as the function.
    fn, order, separate, count = program.fn, tuple(program.weights), tuple(pairs), len(adapters)
    axes = [0 if spec.symbols else None for spec in program.inputs.values()]

    def chosen(flat: Mapping[str, Any], *given: Any) -> Any:
        *inputs, which = given

        def row(at: jax.Array, *one: Any) -> Any:
            def of_row(path: str) -> jax.Array:
                # Not as a row of a matrix: that would be an embedding, which recipes round.
                return flat[path][:, None].at[at, 0].get(mode="fill")

            own = {path: of_row(path + _WHOLE) if path in changed else flat[path] for path in order}
            low = {path: (of_row(path + LEFT), of_row(path + RIGHT)) for path in separate}
            whole = [each if axis is None else each[None] for each, axis in zip(one, axes, strict=True)]
            escapes = Escapes()
            found = _with_low_rank(fn, low, escapes)(own, *whole)
            if lost := sorted(escapes.paths & low.keys()):
                raise ModelError(f"at these sizes weight {lost[0]!r} is used for more than products; merge adapters")
            return jax.tree.map(lambda leaf: leaf[0], found)

        # A negative number would be counted from the end, and is none of an adapter either.
        return jax.vmap(row, (0, *axes))(jnp.where(which < 0, count, which), *inputs)

    inputs = {**program.inputs, name: TensorSpec((symbol,), "int32")}
    kept = {path: mask for path, mask in program.masks.items() if path in weights}
    made = program.replace(fn=chosen, weights=weights, inputs=inputs, masks=kept, axes={}, derivation=None)
    return take_categories(made, name, adapters, others=False)


def _check(name: str, adapter: Program, weights: Mapping[str, Any]) -> None:
    """Check that an adapter is of a base with these weights."""
    known = {path + side for path in weights for side in ("", LEFT, RIGHT)}
    fits = all(
        path in adapter.weights and np.shape(adapter.weights[path]) == np.shape(leaf) for path, leaf in weights.items()
    )
    if not fits or not adapter.weights.keys() <= known:
        raise ModelError(f"adapter {name!r} is not what low_rank made of this base")


def _differs(adapter: Program, base: Program, path: str) -> bool:
    own, plain = adapter.weights[path], base.weights[path]
    return own is not plain and np.asarray(own).tobytes() != np.asarray(plain).tobytes()


def _pair(path: str, adapters: Mapping[str, Program], weight: Any, alpha: float | None) -> _Pair:
    """The low-rank weights of all adapters, of the largest rank, and zeros where one has fewer or none."""
    found = [_low_rank_of(path, each, alpha) for each in adapters.values()]
    known = [each for each in found if each is not None]
    rank = max(left.shape[-1] for left, _ in known)
    *layers, rows, _ = known[0][0].shape
    lefts = np.zeros((len(found), *layers, rows, rank), weight.dtype)
    rights = np.zeros((len(found), *layers, rank, known[0][1].shape[-1]), weight.dtype)
    for at, each in enumerate(found):
        if each is not None:
            lefts[at, ..., : each[0].shape[-1]], rights[at, ..., : each[0].shape[-1], :] = each
    return jnp.asarray(lefts), jnp.asarray(rights)


def _low_rank_of(path: str, adapter: Program, alpha: float | None) -> _Pair | None:
    """The low-rank weights of an adapter beside a weight, the second one scaled."""
    if path + LEFT not in adapter.weights:
        return None
    left, right = adapter.weights[path + LEFT], adapter.weights[path + RIGHT]
    return left, right * jnp.asarray(scale_of(left.shape[-1], alpha), right.dtype)


def _whole(path: str, adapter: Program, alpha: float | None) -> jax.Array:
    """The weight of an adapter, low-rank ones added."""
    left = adapter.weights.get(path + LEFT)
    return summed(path, adapter.weights, 1.0 if left is None else scale_of(left.shape[-1], alpha))


def _inseparable(program: Program, symbol: str, pairs: Mapping[str, _Pair]) -> set[str]:
    """Weights that are used elsewhere than where low-rank weights can be applied by themselves."""
    # A scan steps over low-rank weights as over the stored weight, if it steps over that.
    unlike = {
        site.path
        for site in find_sites(program)
        if site.path is not None
        and site.path in pairs
        and (
            site.stacked != pairs[site.path][0].ndim - 3
            or any(isinstance(op, LayoutOp) for op in site.layout[: site.stacked])
        )
    }
    pairs = {path: pair for path, pair in pairs.items() if path not in unlike}
    escapes = Escapes()
    of_one = {path: (left[0], right[0]) for path, (left, right) in pairs.items()}
    sizes = probe_sizes(program.fn, program.weights, program.inputs)[0] | {symbol: 1}
    abstract_outputs(_with_low_rank(program.fn, of_one, escapes), program.weights, program.inputs, sizes)
    return (escapes.paths & pairs.keys()) | unlike


def _with_low_rank(
    fn: Callable[..., Any], pairs: Mapping[str, _Pair], escapes: Escapes | None = None
) -> Callable[..., Any]:
    """The function with low-rank weights beside some weights."""

    def rule(site: Site, context: Context, eqn: Any, values: Values) -> Values | None:
        if site.path not in pairs or site.weight_operand is None:
            return None
        weight, other = values[site.weight_operand], materialize(values[1 - site.weight_operand])
        pair = _laid_out(site, weight.side_inputs[site.path, "left"], weight.side_inputs[site.path, "right"])
        more = None if pair is None else _product(site, eqn, other, *pair)
        if more is None:
            return None
        operands = (other, weight.value) if site.weight_operand == 1 else (weight.value, other)
        (out,) = context.bind(eqn, operands)
        return [out + more.astype(out.dtype)]

    side_inputs = {path: {(path, "left"): left, (path, "right"): right} for path, (left, right) in pairs.items()}
    return rewrite_sites(fn, rule, inline=True, on_unknown="keep", side_inputs=side_inputs, escapes=escapes)


def _laid_out(site: Site, left: jax.Array, right: jax.Array) -> _Pair | None:
    """Two factors whose product over their last and first axis is the operand that low-rank weights make."""
    ops = [op for op in site.layout if isinstance(op, LayoutOp)]
    if any(isinstance(op, LayoutOp) for op in site.layout[: len(site.layout) - len(ops)]):
        return None  # a scan steps over what is not the stored weight
    shape = ops[0].eqn.invars[0].aval.shape if ops else site.weight.shape
    left = left.reshape(*shape[:-1], left.shape[-1])
    for op in ops:
        match op.eqn.primitive.name:
            case "convert_element_type":
                dtype = op.eqn.params["new_dtype"]
                left, right = left.astype(dtype), right.astype(dtype)
            case "transpose" if left.ndim == 2:
                left, right = right.T, left.T
            case _:
                return None
    return left, right


def _product(site: Site, eqn: Any, other: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array | None:
    """The site's product of `left @ right`; None if it is not that of one after the other."""
    if site.kind == "dot_general":
        return _dot(site, other, left, right)
    numbers = site.params["dimension_numbers"]
    if site.kind == "gather":
        axis = numbers.offset_dims[-1]
        (found,) = bind(eqn, [left, other], slice_sizes=(1, left.shape[-1]))
    elif (
        site.kind == "conv_general_dilated"
        and site.weight_operand == 1
        and numbers.rhs_spec[0] == left.ndim - 1
        and site.params["feature_group_count"] == site.params["batch_group_count"] == 1
    ):
        axis = numbers.out_spec[1]
        (found,) = bind(eqn, [other, left])
    else:
        return None
    return jnp.moveaxis(jnp.tensordot(found, right, (axis, 0)), -1, axis)


def _dot(site: Site, other: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array | None:
    at, (contracted, batch) = site.weight_operand or 0, site.params["dimension_numbers"]
    own, of_other = tuple(contracted[at]), contracted[1 - at]
    if batch[at]:
        return None
    if left.ndim - 1 in own:
        if left.ndim != 2 or own != (1,):
            return None
        left, right, own = right.T, left.T, (0,)
    kinds = {name: site.params[name] for name in ("precision", "preferred_element_type")}
    found = jax.lax.dot_general(other, left, ((of_other, own), ((), ())), **kinds)
    found = jnp.tensordot(found, right, 1, precision=kinds["precision"])
    free = other.ndim - len(of_other)
    return found if at == 1 else jnp.moveaxis(found, range(free), range(-free, 0))
