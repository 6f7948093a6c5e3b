"""An optimizer that prunes: masks are in its state, are updated on schedule inside `jit`, and hold weights at zero."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer

from lepton_xla.arguments import takes
from lepton_xla.errors import ModelError, RecipeError
from lepton_xla.passes.core.plans import Plan
from lepton_xla.passes.pruning.carrying import Carrier
from lepton_xla.passes.pruning.magnitude import check_finite
from lepton_xla.passes.pruning.masks import Regrowth, find_masks
from lepton_xla.passes.pruning.scores import element_scores, random_scores
from lepton_xla.passes.pruning.shares import rule_shares, something_left
from lepton_xla.passes.pruning.targets import Target, leaf_targets, plan_targets
from lepton_xla.program import check_masks
from lepton_xla.recipe import PruneRule
from lepton_xla.recipe.rules import DATA_METHODS, check_rule, sparsity_of
from lepton_xla.train.schedules import Schedule
from lepton_xla.trees import key_name, name_leaves, some_names

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float32, Int32

type Rules = Plan | Mapping[str, float | None] | Sequence[PruneRule]


class SparsityState(NamedTuple):
    """State of an optimizer made by `sparsify`.

    Attributes:
        step: number of updates so far, int32.
        masks: weight path -> bool array of the weight's shape; True keeps an element.
        sparsity: path of the pruned weight, which may be a computed one -> float32 scalar: the last requested sparsity.
        inner: state of the wrapped optimizer.

    >>> import optax
    >>> optimizer = lx.train.sparsify(optax.sgd(0.1), {".*kernel": 0.5}, schedule=lx.train.one_shot(at=100))
    >>> state = optimizer.init({"kernel": jnp.ones((2, 2))})
    >>> int(state.step), state.masks["kernel"].tolist()
    (0, [[True, True], [True, True]])
    """

    step: Int32[Array, ""]
    masks: dict[str, Bool[Array, "*_"]]
    sparsity: dict[str, Float32[Array, ""]]
    inner: Any


@dataclasses.dataclass(frozen=True)
class Regrow:
    """Regrowth: at each update, a share of the kept elements is pruned and as many others are regrown.

    Attributes:
        by: which elements to regrow: `gradient`: those with the largest gradient (RigL, Evci et al. 2019,
            arXiv:1911.11134); `random` (SET, Mocanu et al. 2018, arXiv:1707.04780).
        share: share to replace: a float, or a function of the step; RigL uses `optax.cosine_decay_schedule(0.3,
            steps)`.

    Raises:
        RecipeError: if the share is not in [0, 1].

    >>> lx.train.Regrow(by="gradient", share=2.0)
    Traceback (most recent call last):
    lepton_xla.errors.RecipeError: ...
    """

    by: Literal["gradient", "random"] = "gradient"
    share: float | Callable[[jax.Array], Any] = 0.3

    def __post_init__(self) -> None:
        if self.by not in ("gradient", "random"):
            raise RecipeError(f"Regrow(by={self.by!r}): expected 'gradient' or 'random'")
        if not callable(self.share) and not (isinstance(self.share, numbers.Real) and 0 <= self.share <= 1):
            raise RecipeError(f"Regrow(share={self.share}): expected a share in [0, 1]")


@takes(masks=Mapping)
def sparsify(
    optimizer: optax.GradientTransformation,
    rules: Rules,
    *,
    schedule: Schedule | Callable[[Any], Any],
    regrow: Regrow | None = None,
    straight_through: bool = False,
    masks: Mapping[str, Bool[Array, "*_"]] | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that it prunes the weights it trains.

    On scheduled steps, masks are computed from the weights before the update, and apply from that update on: pruned
    elements become exactly zero, and their gradients do not reach the wrapped optimizer. Masks only grow: pruned
    elements stay pruned and count towards later targets. Only `regrow` and `straight_through` bring elements back, and
    prune others instead, so the sparsity never falls. On all other steps nothing is ranked. This must be the outermost
    transformation, because a later one would move the zeros.

    No weight, and no step of a stacked weight, is pruned entirely: with `distribution = "global"` or the method
    `deviation` the largest unit of each is kept, and others are pruned instead.

    Args:
        optimizer: any optax optimizer.
        rules: a plan, whose products define the matrix `[K, N]` of each weight (if a weight is computed from others by
            layout, concatenation and slicing alone, the masks are those of the others); or rules for the paths of a
            pytree, `{".*kernel": 0.5}` or `PruneRule`s, of which the first match wins. Without a plan the last axis of
            a leaf is N and the others are K. Leaves with fewer than two axes, embeddings, and biases and norm scales of
            stacked layers or several heads are skipped, unless a rule matches nothing else.
        schedule: when to prune, and to which sparsity. A function of the step, such as an optax schedule, gives the
            sparsity of all rules, every 100 steps; `Schedule.of` has more options. N:M prunes the nearest number of
            elements per group; `deviation:F` prunes by its factor from the first scheduled step on.
        regrow: how to regrow elements, if at all.
        straight_through: keep weights dense and mask them only where they are used, so that pruned elements are still
            trained and can come back. The loss must use `masked(fn, masks_of(state), straight_through=True)`.
        masks: initial masks, such as `Program.masks`; they hold like later ones. By default everything is kept.
        seed: seed of random choices.

    Returns:
        A transformation with a `SparsityState`. Its `update` needs the parameters. `finalize` returns the final weights
        and masks.

    Raises:
        RecipeError: if rules, schedule and regrowth do not fit together; from `init` and `update`, if a rule matches
            nothing or would prune a weight entirely.
        UnsupportedError: from `init` and `update`, if a pattern does not divide a weight.
        ModelError: from `init` and `update`, if a weight is missing, not float, not finite (where that can be checked)
            or computed from others in a way that masks cannot follow, or if masks or the state belong to other weights.

    >>> import optax
    >>> optimizer = lx.train.sparsify(optax.sgd(0.1), {".*kernel": 0.5}, schedule=lx.train.one_shot(at=0))
    >>> weights = {"kernel": jnp.array([[1.0, -4.0], [3.0, 2.0]])}
    >>> updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, weights), optimizer.init(weights), weights)
    >>> optax.apply_updates(weights, updates)["kernel"].tolist()
    [[0.0, -4.0], [3.0, 0.0]]
    """
    chosen = _prune_rules(rules)
    if not isinstance(schedule, Schedule) and not callable(schedule):
        raise RecipeError(f"sparsify: schedule = {schedule!r}: expected a Schedule, or a function of the step")
    when = schedule if isinstance(schedule, Schedule) else Schedule.of(schedule)
    for index, rule in enumerate(chosen):
        _check(rule, f"prune[{index}]", when, regrow)
    if regrow is not None and straight_through:
        raise RecipeError("sparsify: straight_through regrows elements itself; leave regrow out")
    inner = optax.with_extra_args_support(optimizer)

    def targets_of(named: Mapping[str, Any]) -> tuple[list[Target], Carrier]:
        carrier = Carrier.of(rules, named) if isinstance(rules, Plan) else Carrier({})
        shapes = carrier.shapes(named)
        found = plan_targets(rules, shapes) if isinstance(rules, Plan) else leaf_targets(chosen, shapes)
        if not found:
            raise RecipeError("sparsify: the plan prunes no weight; its sites give the reasons")
        if not when.overrides:
            something_left(found)
        return found, carrier

    def init(params: Any) -> SparsityState:
        named = _named(params)
        targets, carrier = targets_of(named)
        carrier.check_apart([target.path for target in targets], named)
        paths = carrier.origins(target.path for target in targets)
        check_masks(masks or {}, {path: named[path] for path in paths})
        for path in paths:
            if isinstance(named[path], jax.Array) and not isinstance(named[path], Tracer):
                check_finite(path, named[path])
        kept = {path: _first_mask(named[path], (masks or {}).get(path)) for path in paths}
        nothing = {target.path: jnp.zeros((), jnp.float32) for target in targets}
        return SparsityState(jnp.zeros((), jnp.int32), kept, nothing, inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, SparsityState]:
        if params is None:
            raise ModelError(
                "sparsify prunes parameters, so its update needs them: optimizer.update(grads, state, params)"
            )
        weights, gradients = _named(params), _named(updates)
        targets, carrier = targets_of(weights)
        _check_state(state, carrier.origins(target.path for target in targets), weights)

        def renew() -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
            # Masks are found for the matrices of products, and held on the weights that these are made of.
            earlier, used, slopes = (carrier.there(arrays, weights) for arrays in (state.masks, weights, gradients))
            found, asked = _renewed(targets, state.step, earlier, used, slopes, when, regrow, straight_through, seed)
            return carrier.back(found, weights), asked

        new, sparsity = lax.cond(when.due(state.step), renew, lambda: (state.masks, state.sparsity))
        if not straight_through:
            updates = _each(updates, state.masks, _kept)
        updates, after = inner.update(updates, state.inner, params, **extra)
        if not straight_through:
            # Regrown elements start at zero.
            held = new if regrow is None else {path: mask & state.masks[path] for path, mask in new.items()}
            updates = _each(updates, held, _zeroing, weights)
        return updates, SparsityState(state.step + 1, new, sparsity, after)

    return optax.GradientTransformationExtraArgs(init, update)


def _renewed(
    targets: Sequence[Target],
    step: jax.Array,
    masks: Mapping[str, jax.Array],
    weights: Mapping[str, jax.Array],
    gradients: Mapping[str, jax.Array],
    schedule: Schedule,
    regrow: Regrow | None,
    straight_through: bool,
    seed: int,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Update the masks; return them and the requested sparsity of each weight."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    used = {target.path: weights[target.path] for target in targets}
    if not straight_through:
        used = {path: _kept(masks[path], leaf) for path, leaf in used.items()}
    scores = {t.path: element_scores(t, used[t.path], gradient=gradients[t.path], key=key) for t in targets}
    shares = rule_shares(targets, lambda rule: _share(rule, schedule, step))
    regrowth = None
    if regrow is not None:
        other = jax.random.fold_in(key, 1)
        promise = {
            t.path: jnp.abs(gradients[t.path].astype(jnp.float32))
            if regrow.by == "gradient"
            else random_scores(t, other)
            for t in targets
        }
        replaced = regrow.share(step) if callable(regrow.share) else regrow.share
        regrowth = Regrowth(masks, promise, replaced)
    found = find_masks(
        targets, scores, shares, regrowth=regrowth, earlier=masks, exchange=straight_through or regrow is not None
    )
    # Keep NaN, so that it shows. A mask is sharded like its weight.
    found = {path: mask | (used[path] != used[path]) for path, mask in found.items()}
    return found, {path: jnp.asarray(share, jnp.float32) for path, share in shares.items()}


def _share(rule: PruneRule, schedule: Schedule, step: jax.Array) -> jax.Array:
    final = sparsity_of(rule) or 0.0
    return jnp.asarray(schedule.sparsity(step, jnp.float32(final)), jnp.float32)


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by path; the leaves of an NNX state get the names that `from_nnx` gives them."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    # An NNX variable holds its array in the attribute `value`; a user's dictionary may have a key `value` instead.
    if paths and all(path and path[-1] == jax.tree_util.GetAttrKey("value") for path, _ in paths):
        return {"/".join(map(key_name, path[:-1])): leaf for path, leaf in paths}
    return name_leaves(tree, prefix="weights")


def _each(tree: Any, by: Mapping[str, jax.Array], function: Callable[..., Any], *others: Mapping[str, Any]) -> Any:
    """Replace the leaves that `by` names by `function(by[path], leaf, ...)`."""
    leaves = [
        function(by[path], leaf, *(other[path] for other in others)) if path in by else leaf
        for path, leaf in _named(tree).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _kept(mask: jax.Array, leaf: jax.Array) -> jax.Array:
    leaf = _placed_as(mask, leaf)
    return jnp.where(mask, leaf, jnp.zeros_like(leaf))


def _placed_as(mask: jax.Array, leaf: jax.Array) -> jax.Array:
    """Shard a leaf like its mask, under explicit sharding: gradients may arrive replicated."""
    here, wanted = jax.typeof(leaf).sharding, jax.typeof(mask).sharding
    return leaf if here == wanted else jax.reshard(leaf, wanted)


def _zeroing(mask: jax.Array, update: jax.Array, weight: jax.Array) -> jax.Array:
    """An update that makes pruned elements exactly zero."""
    kind = np.promote_types(update.dtype, weight.dtype)  # so that the weight keeps its precision
    return jnp.where(mask, _placed_as(mask, update.astype(kind)), _placed_as(mask, -weight.astype(kind)))


def _first_mask(weight: jax.Array, given: jax.Array | None) -> jax.Array:
    kept = jnp.ones_like(weight, dtype=bool)
    return kept if given is None else kept & jnp.asarray(given, bool)


def _prune_rules(rules: Rules) -> tuple[PruneRule, ...]:
    if isinstance(rules, Plan):
        chosen = tuple(rules.recipe.prune)
    elif isinstance(rules, Mapping):
        chosen = tuple(PruneRule(sites=sites, sparsity=sparsity) for sites, sparsity in rules.items())
    elif isinstance(rules, Sequence) and all(isinstance(rule, PruneRule) for rule in rules):
        chosen = tuple(rules)
    else:
        raise RecipeError(
            f"sparsify: rules = {rules!r}: expected a plan, {{regular expression: sparsity}}, or a list of PruneRule"
        )
    if not chosen:
        raise RecipeError("sparsify: no rule prunes anything")
    return chosen


def _check(rule: PruneRule, where: str, schedule: Schedule | None, regrow: Regrow | None) -> None:
    check_rule(rule, where, needs_sparsity=not (schedule is None or schedule.overrides))
    if rule.method in DATA_METHODS:
        raise RecipeError(
            f"{where}.method = {rule.method!r} prunes a trained model once, with calibration data: use lx.optimize"
        )
    fixed = rule.method.startswith("deviation") or (":" in rule.pattern and not rule.pattern.startswith("block"))
    if regrow is not None and fixed:
        raise RecipeError(f"{where}: {rule.describe()} fixes which elements are kept; leave regrow out")


def _check_state(state: Any, paths: Sequence[str], weights: Mapping[str, Any]) -> None:
    """Refuse a state of other weights or rules, such as from an old checkpoint."""
    if not isinstance(state, SparsityState):
        raise ModelError(
            f"sparsify: its state is a {type(state).__name__}, not a SparsityState; restore a checkpoint into the tree "
            f"that optimizer.init(params) gives"
        )
    check_masks(state.masks, weights)
    pruned = {path: tuple(weights[path].shape) for path in paths}
    for path in sorted(pruned.keys() ^ state.masks.keys()):
        shape = f"weight {path!r} of shape {pruned.get(path, tuple(weights[path].shape))}"
        has = (
            f"has no mask of {shape}, which the rules prune"
            if path in pruned
            else f"has a mask of {shape}, which no rule prunes"
        )
        raise ModelError(
            f"sparsify: the state {has}; it belongs to other weights or rules (it has masks of "
            f"{some_names(state.masks)})"
        )


def state_of(optimizer_state: Any) -> SparsityState:
    """Find the `SparsityState` in the state of an optimizer, at any depth.

    Raises:
        ModelError: if there is not exactly one.

    >>> import optax
    >>> optimizer = sparsify(optax.sgd(0.1), {".*": 0.5}, schedule=Schedule.of(lambda step: 0.5))
    >>> int(state_of((optimizer.init({"kernel": jnp.ones((2, 2))}), "another's state")).step)
    0
    """
    leaves = jax.tree.leaves(optimizer_state, is_leaf=lambda leaf: isinstance(leaf, SparsityState))
    found = [leaf for leaf in leaves if isinstance(leaf, SparsityState)]
    if len(found) != 1:
        raise ModelError(f"expected exactly one state made by sparsify, found {len(found)}")
    return found[0]


def masks_of(optimizer_state: Any) -> dict[str, Bool[Array, "*_"]]:
    """Weight path -> mask, from the state of an optimizer made by `sparsify`, at any depth.

    Raises:
        ModelError: if it holds no such state, or more than one.

    >>> import optax
    >>> optimizer = lx.train.sparsify(optax.sgd(0.1), {".*kernel": 0.5}, schedule=lx.train.one_shot(at=100))
    >>> lx.train.masks_of(optimizer.init({"kernel": jnp.ones((1, 2))}))["kernel"].tolist()
    [[True, True]]
    """
    return state_of(optimizer_state).masks


def finalize(params: Any, optimizer_state: Any) -> tuple[Any, dict[str, Bool[Array, "*_"]]]:
    """Return the trained weights with exact zeros, and masks for `Program.masks`.

    Args:
        params: the trained parameters.
        optimizer_state: the optimizer's state, with the `SparsityState` at any depth.

    Returns:
        The parameters with pruned elements zero, and weight path -> bool array.

    Raises:
        ModelError: if a pruned weight is not finite, or masks and weights do not belong together.

    >>> import optax
    >>> masks = {"kernel": jnp.array([[True, False]])}
    >>> optimizer = lx.train.sparsify(optax.sgd(0.1), {".*": 0.5}, schedule=lx.train.one_shot(at=100), masks=masks)
    >>> weights = {"kernel": jnp.array([[3.0, 2.0]])}
    >>> weights, masks = lx.train.finalize(weights, optimizer.init(weights))
    >>> weights["kernel"].tolist(), masks["kernel"].tolist()
    ([[3.0, 0.0]], [[True, False]])
    """
    masks = masks_of(optimizer_state)
    named = _named(params)
    check_masks(masks, named)
    for path in masks:
        check_finite(path, named[path])
    return _each(params, masks, _kept), dict(masks)
