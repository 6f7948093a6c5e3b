"""Fake quantization: rounds weights and activations to a plan's formats, for training and as a reference."""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import msgspec
from jax import lax
from jax.custom_derivatives import SymbolicZero

from lepton_xla import _compat
from lepton_xla.arguments import takes
from lepton_xla.errors import ModelError, RecipeError, UnsupportedError
from lepton_xla.passes.core.computed import Computed
from lepton_xla.passes.core.layouts import lay_out, layout_key
from lepton_xla.passes.core.matrix import code_matrix, code_operand, contracted_size
from lepton_xla.passes.core.names import Key
from lepton_xla.passes.core.plans import Plan, SitePlan
from lepton_xla.passes.core.precomputation import computed_weights
from lepton_xla.passes.core.sites import Site, made_of, operand_value, rewrite_sites, stored_like, stored_weight
from lepton_xla.passes.core.targets import Target
from lepton_xla.passes.core.tracking import Escapes, Tracked
from lepton_xla.passes.core.walker import Context, Values
from lepton_xla.passes.quantization import eligibility, products
from lepton_xla.passes.quantization.products import RANGE, SCALE
from lepton_xla.quant import FORMATS, Format, encode, fake_quantize, make_grid
from lepton_xla.quant.grid import matrix_codes, matrix_values, settle
from lepton_xla.quant.learned import LOG2, initial_scale, learned_quantize, raw_scales, stochastic_quantize
from lepton_xla.quant.qtensor import straight_through
from lepton_xla.recipe import QuantizeRule
from lepton_xla.trees import name_leaves, some_names

if TYPE_CHECKING:
    from jaxtyping import Array, Float

type Scales = dict[str, dict[str, jax.Array]]
"""Weight path -> parts of its grid (`scale`, `zero_point`, `codebook`, stacked axes leading); site name -> the scale
of its `activation`. `log2_scale` and `log2_activation` are logarithms of scales. `quantize` takes the same."""

_PARTS = ("scale", "zero_point", "codebook")
_KEY = "key"


@takes(fn=Callable, plan=Plan, ranges=Mapping)
def fake_quant(
    fn: Callable[..., Any],
    plan: Plan,
    ranges: Mapping[str, Float[Array, "*steps"]] | None = None,
    *,
    start: int = 0,
    delay: int = 0,
    target: Target | None = None,
) -> Callable[..., Any]:
    """Make a function compute with quantized values, differentiable by the straight-through estimator.

    A `dot_general` of symmetric integer formats, with a scale per channel or tensor, is computed from the codes, bit
    for bit like in `quantize`. Other products are computed from the dequantized values. The gradient is that of the
    float product in both cases. For products of codes, the backward pass keeps codes instead of floats.

    Combines with `masked` in either order.

    Args:
        fn: `fn(weights, *inputs)`, weights any pytree whose paths are those of the plan's program.
        plan: which sites get what.
        ranges: site name -> calibrated range of its activation, from `calibrate`, for static scales.
        start: the training step at which quantization begins, if the new function gets the step.
        delay: number of steps after `start` in which only weights are rounded, not activations.
        target: the device that the model will be served on, which decides what has a product of codes; default: this
            process's device.

    Returns:
        A function like `fn`, for use inside `jit`, `grad`, `vmap` and sharding, with further keyword arguments:
        `scales`: a `Scales` tree that replaces the scales from ranges. Integer scales get a gradient (LSQ); to train
        them, begin with `initial_scales`. Levels of a codebook get one too, except for a level of zero;
        `step`: int32, the training step for `start` and `delay`; all stages are in one compiled program. Without it
        everything is rounded;
        `key`: a `jax.random` key for stochastic rounding, which does not apply to products of two activations.

    Raises:
        RecipeError: if `delay` is negative.
        CalibrationError: when called, if a static site has no range.
        ModelError: when called, if a weight that the plan quantizes is missing.
        UnsupportedError: when called, if a key is given and a format is not integer; or if anything but a mask changes
            a planned weight before its product, which would then stay float.

    >>> weights = {"w": jnp.array([[7.0], [2.6]])}
    >>> program = lx.trace(lambda w, x: x @ w["w"], weights, {"x": lx.TensorSpec(("batch", 2), "float32")})
    >>> recipe = lx.Recipe.load("int4-channel-weight-only").replace({"quantize.0.weight_range": "absmax"})
    >>> quantized = lx.passes.fake_quant(program.fn, lx.passes.resolve(recipe, program))
    >>> float(quantized(weights, jnp.ones((1, 2)))[0, 0])  # 2.6 is rounded to 3
    10.0
    """
    if delay < 0:
        raise RecipeError(f"fake_quant: delay = {delay} is negative; activations cannot be rounded before weights are")
    target = target or Target.here()
    planned = [entry for entry in plan.sites if entry.quantize is not None and entry.site.path is not None]
    paths = {path for entry in planned for path in (entry.site.path, *made_of(entry.site))}
    computed = Computed(computed_weights([entry.site for entry in planned]))

    def through_mask(context: Context, eqn: Any, values: Values) -> Values | None:
        """Follow a weight through a selection of its elements, as made by `masked`."""
        weights = [value for value in values[1:] if isinstance(value, Tracked)]
        if len(weights) != 1 or weights[0].path not in paths:
            return None
        (held,) = context.bind(eqn, [operand_value(value) for value in values])
        return [dataclasses.replace(weights[0], value=held)]

    def run(
        weights: Any,
        *inputs: Any,
        scales: Mapping[str, Mapping[str, jax.Array]] | None = None,
        step: jax.Array | int | None = None,
        key: jax.Array | None = None,
        **kwargs: Any,
    ) -> Any:
        met, escapes = set[str](), Escapes()

        def rule(
            site: Site, context: Context, eqn: Any, values: Values, *, weights_alone: bool = False
        ) -> Values | None:
            entry = plan[site.name] or _same_use(site, plan)
            if entry is None or entry.quantize is None:
                return None
            site = dataclasses.replace(site, name=entry.site.name)  # scales and keys are under the plan's name
            met.add(site.name)
            decision = entry.quantize
            if weights_alone:
                decision = msgspec.structs.replace(decision, activations="none")
            operands = [operand_value(value) for value in values]
            if site.weight_operand is None:
                # At other sizes than the plan's, a different product may have this name.
                if eligibility.unsupported(site, decision) or eligibility.float_reason(site, decision, target):
                    return None
                rounded = _round_pair(site, operands, decision)
            else:
                tracked = values[site.weight_operand]
                side_inputs = tracked.side_inputs if isinstance(tracked, Tracked) else {}
                if site.kind == "gather" and _rows_alone(site, decision, side_inputs):
                    (rows,) = context.bind(eqn, operands)
                    return [_fake_rows(site, rows, decision)]
                rounded = _round_operands(site, operands, decision, tracked, side_inputs)
            order = None if eligibility.float_reason(site, decision, target) else _code_order(site, decision, rounded)
            if order is not None:
                return [_quantized_dot(site, rounded, order)]
            return context.bind(eqn, [part.value for part in rounded])

        def rounding(*, weights_alone: bool = False) -> Any:
            chosen = functools.partial(rule, weights_alone=weights_alone)
            moves = {"select_n": through_mask}
            rewritten = rewrite_sites(
                fn, chosen, side_inputs=side_inputs, escapes=escapes, follow=moves, computed=computed
            )
            out = rewritten(weights, *inputs, **kwargs)
            _check_met(plan, met, escapes)
            return out

        side_inputs = _side_inputs(planned, ranges or {}, raw_scales(scales), key, weights)
        if step is None:
            return rounding()
        # One branch for the whole function, so that each step does the work of one stage only.
        stages = {start: functools.partial(rounding, weights_alone=True), start + delay: rounding}
        begun = [jnp.asarray(step) >= at for at in stages]
        return lax.switch(
            sum(flag.astype(jnp.int32) for flag in begun), [lambda: fn(weights, *inputs, **kwargs), *stages.values()]
        )

    return run


@takes(plan=Plan, ranges=Mapping)
def initial_scales(weights: Any, plan: Plan, ranges: Mapping[str, Float[Array, "*steps"]] | None = None) -> Scales:
    """Make initial scales to train with the weights (LSQ, arXiv:1902.08153), for `fake_quant` and then `quantize`.

    They are logarithms (as in TQT, arXiv:1903.08066, section 4), which an optimizer can train directly: Adam moves
    every parameter by about its learning rate, which for a logarithm is the same share of any scale and never crosses
    zero. Do not apply weight decay to them: it would pull every scale to 1.

    Args:
        weights: the weights, a pytree whose paths are those of the plan's program.
        plan: which sites get what.
        ranges: site name -> calibrated range; the activation of a site without one keeps its dynamic scale.

    Returns:
        float32 leaves: for each weight path a `log2_scale`, with the stacked axes leading; for each site with a range a
        `log2_activation`.

    Raises:
        UnsupportedError: if the format of a site is not a symmetric integer format.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> plan = lx.passes.resolve(lx.Recipe.load("int8"), program)
    >>> scales = lx.passes.initial_scales(program.weights, plan)
    >>> jax.tree.map(jnp.shape, scales)
    {'w': {'log2_scale': (1, 4)}}
    """
    named = _named(weights, plan.sites)
    scales: Scales = {}
    for entry in plan.sites:
        site, rule = entry.site, entry.quantize
        if rule is None or site.path is None:
            continue
        target = FORMATS[rule.weights]
        if target.kind != "int":
            raise UnsupportedError(f"site {site.name!r}: scales are trained for int8 and int4, not for {target.name}")
        make = lambda step, site=site, target=target, rule=rule: initial_scale(  # noqa: E731
            code_matrix(site, step), target, rule.granularity
        )
        for _ in range(site.stacked):
            make = jax.vmap(make)
        if LOG2 + "scale" not in scales.get(site.path, {}):
            scale = make(lay_out(stored_weight(site, named), site.layout))
            scales.setdefault(site.path, {})[LOG2 + "scale"] = jnp.log2(scale)
        if rule.activations != "none" and site.name in (ranges or {}):
            scale = products.absmax_scale(jnp.asarray((ranges or {})[site.name]), FORMATS[rule.activations])
            scales.setdefault(site.name, {})[LOG2 + "activation"] = jnp.log2(scale)
    return scales


@dataclasses.dataclass(frozen=True)
class _Rounded:
    """A rounded operand of a product.

    Attributes:
        value: the dequantized values, in the operand's dtype, with the gradient for training.
        codes: the codes, in the operand's shape; None if it has none or is not rounded.
        scale: scale of the codes, float32, broadcastable to the operand, without a gradient.
    """

    value: jax.Array
    codes: jax.Array | None = None
    scale: jax.Array | None = None


def _round(
    array: jax.Array,
    scale: jax.Array,
    target: Format,
    zero_point: jax.Array | None = None,
    *,
    shared: int | None = None,
    clips: bool = True,
) -> _Rounded:
    """Round an operand to the nearest code.

    Args:
        array: the operand.
        scale: float32, broadcastable to it.
        target: the format.
        zero_point: likewise, for affine formats.
        shared: number of elements that share a trained scale; None if it is not trained.
        clips: whether values may saturate; they get no gradient then.
    """
    fixed = lax.stop_gradient(scale)
    codes = encode(lax.stop_gradient(array), fixed, target, zero_point)
    if shared is not None:
        return _Rounded(learned_quantize(array, codes, scale, target, shared, zero_point), codes, fixed)
    return _Rounded(fake_quantize(array, codes, fixed, target, zero_point, clips=clips), codes, fixed)


def _round_operands(
    site: Site, operands: Sequence[jax.Array], rule: QuantizeRule, tracked: Any, side_inputs: Mapping[Key, jax.Array]
) -> list[_Rounded]:
    """The operands of a site with a weight."""
    side = site.weight_operand
    assert side is not None
    keys = _site_keys(side_inputs.get((site.name, _KEY)))
    rounded = [_Rounded(operand) for operand in operands]
    rounded[side] = _round_weight(site, operands[side], rule, side_inputs, keys[0])
    if rule.activations != "none":
        rounded[1 - side] = _round_activation(site, operands[1 - side], rule, tracked, keys[1])
    return rounded


def _round_weight(
    site: Site, weight: jax.Array, rule: QuantizeRule, side_inputs: Mapping[Key, jax.Array], key: jax.Array | None
) -> _Rounded:
    target = FORMATS[rule.weights]
    given = {part: side_inputs[site.name, part] for part in _PARTS if (site.name, part) in side_inputs}
    matrix = code_matrix(site, weight)
    grid = make_grid(matrix, target, rule.granularity, rule.weight_range, **given)
    if target.learned:  # its levels have the leading axes of the matrix
        codes = matrix_codes(lax.stop_gradient(matrix), grid, target)
        rounded = code_operand(site, matrix_values(codes, grid, target))
        # Trained levels get a gradient (Deep Compression, arXiv:1510.00149, section 3.3).
        return _Rounded(_with_gradient_of_both(weight, rounded))
    if "scale" in given:
        grid = dataclasses.replace(grid, scale=settle(given["scale"], rule.granularity))
    scale, zero_point = (_spread(site, part) for part in (grid.scale, grid.zero_point))
    assert scale is not None
    scale = scale.astype(jnp.float32)
    if key is not None:
        return _Rounded(stochastic_quantize(weight, scale, target, key, zero_point))
    shared = None
    if "scale" in given and target.kind in ("int", "affine"):
        shared = max(1, math.prod(site.weight.shape) // math.prod(grid.scale.shape))
    clips = "scale" in given or rule.weight_range != "absmax"
    return _round(weight, scale, target, zero_point, shared=shared, clips=clips)


def _round_activation(
    site: Site, activation: jax.Array, rule: QuantizeRule, weight: Any, key: jax.Array | None
) -> _Rounded:
    target = FORMATS[rule.activations]
    static = products.static_scale(site, rule, weight)
    scale = products.activation_scale(site, activation, rule.activations, static)
    if key is not None:
        return _Rounded(stochastic_quantize(activation, scale, target, key))
    if isinstance(weight, Tracked) and (site.name, SCALE) in weight.side_inputs and target.kind == "int":
        shared = math.prod(activation.shape[axis] for axis in products.activation_axes(site))
        return _round(activation, settle(scale, "tensor"), target, shared=shared)
    return _round(activation, scale, target, clips=static is not None)


def _round_pair(site: Site, operands: Sequence[jax.Array], rule: QuantizeRule) -> list[_Rounded]:
    """Round both operands of a product of two activations to the nearest code."""
    scales = products.pair_scales(site, operands[0], operands[1], rule.activations)
    target = FORMATS[rule.activations]
    return [_round(operand, scale, target, clips=False) for operand, scale in zip(operands, scales, strict=True)]


def _code_order(site: Site, rule: QuantizeRule, rounded: Sequence[_Rounded]) -> tuple[int, int] | None:
    """The order of the operands in a product of their codes; None for a product of floats."""
    if site.kind != "dot_general" or FORMATS[rule.weights].kind != "int":
        return None
    return products.code_order(site) if all(part.codes is not None for part in rounded) else None


def _quantized_dot(site: Site, rounded: Sequence[_Rounded], order: tuple[int, int]) -> jax.Array:
    """The product of codes, with the gradient of the float product of their values."""
    values = [part.value for part in rounded]
    codes = [part.codes for part in rounded]
    scales = [part.scale for part in rounded]

    @jax.custom_jvp
    def product(values: Sequence[jax.Array], codes: Any, scales: Any) -> jax.Array:
        del values  # only for the derivative; the codes hold the same numbers
        return products.multiply_in_place(site, codes, scales, order)

    def derivative(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        values, codes, scales = primals
        codes = lax.optimization_barrier(codes)  # round once; XLA would round again for each use
        moving = {side: t for side, t in enumerate(tangents[0]) if not isinstance(t, SymbolicZero)}

        def linear(codes: Any, scales: Any, moving: dict[int, jax.Array]) -> jax.Array:
            floats = [
                (code.astype(jnp.float32) * scale).astype(operand.dtype)
                for code, scale, operand in zip(codes, scales, site.operands, strict=True)
            ]
            terms = [
                _compat.bind(site.eqn, [tangent if k == side else floats[k] for k in range(2)])[0]
                for side, tangent in moving.items()
            ]
            return terms[0] if len(terms) == 1 else terms[0] + terms[1]

        # Save codes for the backward pass, which dequantizes them: a quarter of the bytes of floats.
        return product(values, codes, scales), jax.checkpoint(linear, prevent_cse=False)(codes, scales, moving)

    product.defjvp(derivative, symbolic_zeros=True)
    return product(values, codes, scales)


def _rows_alone(site: Site, rule: QuantizeRule, side_inputs: Mapping[Key, jax.Array]) -> bool:
    """Whether the rows of a table are rounded independently, so that only the rows looked up need rounding."""
    given = any((site.name, what) in side_inputs for what in (_KEY, *_PARTS))
    return not given and rule.granularity != "tensor" and not FORMATS[rule.weights].learned


def _fake_rows(site: Site, rows: jax.Array, rule: QuantizeRule) -> jax.Array:
    """Round the rows that a gather has looked up, as the table would be rounded."""
    target = FORMATS[rule.weights]
    axis = site.params["dimension_numbers"].offset_dims[-1]  # the first one may be the kept row dimension
    exact = jnp.moveaxis(rows.astype(jnp.float32), axis, 0)
    matrix = exact.reshape((exact.shape[0], -1))
    grid = make_grid(matrix, target, rule.granularity, rule.weight_range)
    rounded = matrix_values(matrix_codes(lax.stop_gradient(matrix), grid, target), grid, target)
    faked = straight_through(exact, rounded.reshape(exact.shape), True)
    return jnp.moveaxis(faked, 0, axis).astype(rows.dtype)


def _with_gradient_of_both(weight: jax.Array, rounded: jax.Array) -> jax.Array:
    through = weight.astype(jnp.float32)
    return (rounded + (through - lax.stop_gradient(through))).astype(weight.dtype)


def _spread(site: Site, part: jax.Array | None) -> jax.Array | None:
    """Reshape a part of a grid [..., G, N] for broadcasting to the weight operand."""
    if part is None:
        return None
    groups = part.shape[-2]
    rows = contracted_size(site) // groups
    return code_operand(site, jnp.repeat(part, rows, axis=-2) if groups > 1 else part)


def _side_inputs(
    planned: list[SitePlan],
    ranges: Mapping[str, jax.Array],
    scales: Mapping[str, Mapping[str, jax.Array]],
    key: jax.Array | None,
    weights: Any,
) -> dict[str, dict[Key, jax.Array]]:
    """The side inputs of each weight, which its sites get one step of a stack at a time."""
    _check_names(scales, planned)
    named = _named(weights, planned)
    arrays: dict[Key, jax.Array] = {(name, RANGE): jnp.asarray(value) for name, value in ranges.items()}
    for entry in planned:
        site = entry.site
        assert site.path is not None
        for part, value in scales.get(site.path, {}).items():
            if part in _PARTS:
                arrays[site.name, part] = value
        if "activation" in scales.get(site.name, {}):
            arrays[site.name, SCALE] = scales[site.name]["activation"]
        if key is not None:
            own = jax.random.fold_in(key, zlib.crc32(site.name.encode()))
            like = stored_like(site, named)
            laid = jax.eval_shape(lambda array, site=site: lay_out(array, site.layout), like)
            steps = tuple(laid.shape[: site.stacked])
            arrays[site.name, _KEY] = jax.random.split(own, (*steps, 2))
    return products.arrange_side_inputs([entry.site for entry in planned], arrays)


def _named(weights: Any, planned: Iterable[SitePlan]) -> dict[str, Any]:
    """Name the leaves of the weights by path, and check that all quantized weights are there."""
    named = name_leaves(weights, prefix="weights")
    for entry in planned:
        site = entry.site
        if entry.quantize is None or site.path in named:
            continue
        missing = [path for path in made_of(site) if path not in named]
        if missing:
            raise ModelError(
                f"the plan quantizes weight {missing[0]!r}, which is not among {some_names(named)}; give the tree of "
                f"weights that the plan's program has"
            )
    return named


def _same_use(site: Site, plan: Plan) -> SitePlan | None:
    """The plan of the same use of a weight: a loss may run its model more than once."""
    use = lambda one: (one.kind, one.weight_operand, one.weight.shape, layout_key(one.layout), _dimensions(one))  # noqa: E731
    uses = plan.quantized.get(site.path, ()) if site.path is not None else ()
    return next((entry for entry in uses if use(entry.site) == use(site)), None)


def _dimensions(site: Site) -> str:
    return str(site.params.get("dimension_numbers", site.params.get("ragged_dot_dimension_numbers")))


def _check_met(plan: Plan, met: set[str], escapes: Escapes) -> None:
    """Refuse a function that uses a planned weight but not at its site, where it would silently stay float."""
    planned = [entry for entry in plan.sites if entry.quantize is not None]
    pairs = [entry.site.name for entry in planned if entry.site.path is None]
    if pairs and met.isdisjoint(pairs):
        raise UnsupportedError(
            f"fake_quant: the function has none of the plan's products of two activations ({some_names(pairs)}), which "
            f"are named by their scopes; trace the program under the scopes that the function has"
        )
    for entry in planned:
        name, path = entry.site.name, entry.site.path
        if name not in met and not escapes.paths.isdisjoint((path, *made_of(entry.site))):
            where = f"site {name!r}" if name != path else "its product"
            raise UnsupportedError(
                f"fake_quant: weight {path!r} is changed before it reaches {where}, which would stay float; what "
                f"changes it belongs outside, as in masked(fake_quant(fn, plan), masks)"
            )


def _check_names(scales: Mapping[str, Mapping[str, Any]], planned: list[SitePlan]) -> None:
    known = {entry.site.path for entry in planned} | {entry.site.name for entry in planned}
    for name in scales:
        if name not in known:
            raise ModelError(f"scales are given for {name!r}, which the plan does not quantize")


def _site_keys(keys: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
    """Keys for the weight and for the activation."""
    return (None, None) if keys is None else (keys[0], keys[1])
