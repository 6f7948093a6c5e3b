"""An optimizer that prunes: masks live in its state, change on schedule inside `jit`, and hold weights at zero."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

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

type Rules = Plan | Mapping[str, float | None] | Sequence[PruneRule]


class SparsityState(NamedTuple):
    """The state of an optimizer that `sparsify` made.

    Attributes:
        step: how many updates there were, int32.
        masks: weight path -> bool array of the weight's shape: what is kept.
        sparsity: path of the pruned weight, which may be computed -> float32 scalar: the share last asked to drop.
        inner: the state of the optimizer inside.
    """

    step: jax.Array
    masks: dict[str, jax.Array]
    sparsity: dict[str, jax.Array]
    inner: Any


@dataclasses.dataclass(frozen=True)
class Regrow:
    """Elements come back: each time, a share of those that are kept is dropped, and as many others take their place.

    Attributes:
        by: `gradient`: those whose gradient is largest (RigL, Evci et al. 2019, arXiv:1911.11134); `random`: any (SET,
            Mocanu et al. 2018, arXiv:1707.04780).
        share: how many, a float, or a function of the step: RigL's is `optax.cosine_decay_schedule(0.3, steps)`.

    Raises:
        RecipeError: for a share that is not in [0, 1].
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
    masks: Mapping[str, jax.Array] | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that it prunes what it trains.

    Masks are found by what the weights are before the update of a step that is due, and hold from that update on:
    dropped elements become exactly zero, and their gradients do not reach the optimizer inside. What is dropped stays
    so, whatever the schedule asks for later, and counts towards that: masks only ever grow. With `regrow` or
    `straight_through` elements come back as others go; then no fewer are dropped than before. On all other steps
    nothing is ranked. It must be the outermost transformation, since what comes after it would move the zeros.

    Something is left of every weight, and of every step of one that is stacked for a scan: where several are ranked
    together (`distribution = "global"`), or a factor decides (`deviation`), the largest unit of each is never dropped,
    and others go in its place.

    Args:
        optimizer: any.
        rules: a plan, whose products say what the matrix `[K, N]` of each weight is, and where a weight is made of
            others by layout, concatenation and cutting alone, the masks are those of these others; or rules for the
            paths of a pytree, `{".*kernel": 0.5}` or `PruneRule`s, the first that matches a path winning. The last
            axis of a leaf is then N, all others are K, and leaves of less than two axes, biases and norms' scales of
            stacked layers or of several heads, and embeddings are left out unless a rule matches nothing else.
        schedule: when, and how much by then. A function of the step, such as optax has, gives the sparsity of all
            rules, every 100 steps; `Schedule.of` has more to choose. N:M drops the nearest number of each group by
            then; `deviation:F` drops by its factor from the first step that is due.
        regrow: how elements come back, if they do.
        straight_through: weights stay dense and are only used masked, so that dropped elements are trained on and can
            come back. The loss has to use them so: `masked(fn, masks_of(state), straight_through=True)`.
        masks: masks to begin with, such as `Program.masks`; everything is kept otherwise. They hold as those that are
            found later do.
        seed: for what is random.

    Returns:
        A transformation whose state is a `SparsityState`: its `update` needs the parameters. `finalize` gives the
        weights and masks at the end.

    Raises:
        RecipeError: if rules, schedule and regrowth do not go together; by `init` and `update`, if a rule matches
            nothing, or asks for more than leaves something of every weight.
        UnsupportedError: by `init` and `update`, if a pattern does not divide a weight.
        ModelError: by `init` and `update`, if a weight is missing, not of floats, not finite (where that is known), or
            is computed from others in a way that masks do not follow, or if masks, or the state, are of other weights.
    """
    chosen = _prune_rules(rules)
    if not isinstance(schedule, Schedule) and not callable(schedule):
        raise RecipeError(f"sparsify: schedule = {schedule!r}: expected a Schedule, or a function of the step")
    when = schedule if isinstance(schedule, Schedule) else Schedule.of(schedule)
    for index, rule in enumerate(chosen):
        _check(rule, f"prune[{index}]", when, regrow)
    if regrow is not None and straight_through:
        raise RecipeError("sparsify: with straight_through elements come back by themselves; leave regrow out")
    inner = optax.with_extra_args_support(optimizer)

    def targets_of(named: Mapping[str, Any]) -> tuple[list[Target], Carrier]:
        carrier = Carrier.of(rules, named) if isinstance(rules, Plan) else Carrier({})
        shapes = carrier.shapes(named)
        found = plan_targets(rules, shapes) if isinstance(rules, Plan) else leaf_targets(chosen, shapes)
        if not found:
            raise RecipeError("sparsify: none of the plan's weights is pruned; its sites say why")
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
            # What has only just come back begins at zero.
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
    """Masks found anew, and the sparsity asked of each weight."""
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
    # NaN is never dropped, so that it is seen; and a mask is cut over devices as its weight is.
    found = {path: mask | (used[path] != used[path]) for path, mask in found.items()}
    return found, {path: jnp.asarray(share, jnp.float32) for path, share in shares.items()}


def _share(rule: PruneRule, schedule: Schedule, step: jax.Array) -> jax.Array:
    final = sparsity_of(rule) or 0.0
    return jnp.asarray(schedule.sparsity(step, jnp.float32(final)), jnp.float32)


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by path; those of an NNX state are named as `from_nnx` names them."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    # What a variable holds is its attribute `value`; a user's dictionary may have a key of that name.
    if paths and all(path and path[-1] == jax.tree_util.GetAttrKey("value") for path, _ in paths):
        return {"/".join(map(key_name, path[:-1])): leaf for path, leaf in paths}
    return name_leaves(tree, prefix="weights")


def _each(tree: Any, by: Mapping[str, jax.Array], function: Callable[..., Any], *beside: Mapping[str, Any]) -> Any:
    """The tree with `function(by[path], leaf, ...)` in the place of the leaves that `by` names."""
    leaves = [
        function(by[path], leaf, *(other[path] for other in beside)) if path in by else leaf
        for path, leaf in _named(tree).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _kept(mask: jax.Array, leaf: jax.Array) -> jax.Array:
    leaf = _placed_as(mask, leaf)
    return jnp.where(mask, leaf, jnp.zeros_like(leaf))


def _placed_as(mask: jax.Array, leaf: jax.Array) -> jax.Array:
    """The leaf, where arrays carry their sharding in their type, cut as its mask is: gradients may come whole."""
    here, wanted = jax.typeof(leaf).sharding, jax.typeof(mask).sharding
    return leaf if here == wanted else jax.reshard(leaf, wanted)


def _zeroing(mask: jax.Array, update: jax.Array, weight: jax.Array) -> jax.Array:
    """An update that takes dropped elements to exactly zero."""
    kind = np.promote_types(update.dtype, weight.dtype)  # so that the weight loses nothing
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
        raise RecipeError("sparsify: there is no rule that prunes anything")
    return chosen


def _check(rule: PruneRule, where: str, schedule: Schedule | None, regrow: Regrow | None) -> None:
    check_rule(rule, where, needs_sparsity=not (schedule is None or schedule.overrides))
    if rule.method in DATA_METHODS:
        raise RecipeError(
            f"{where}.method = {rule.method!r} prunes a trained model once, with calibration data: use lx.optimize"
        )
    fixed = rule.method.startswith("deviation") or (":" in rule.pattern and not rule.pattern.startswith("block"))
    if regrow is not None and fixed:
        raise RecipeError(f"{where}: {rule.describe()} leaves no choice of what grows back; leave regrow out")


def _check_state(state: Any, paths: Sequence[str], weights: Mapping[str, Any]) -> None:
    """Refuses a state that was made with other weights, or with other rules, as a checkpoint may hold."""
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
            f"sparsify: the state {has}; it was made with other weights or rules, its masks are of "
            f"{some_names(state.masks)}"
        )


def state_of(optimizer_state: Any) -> SparsityState:
    """The `SparsityState` in the state of an optimizer, at any depth.

    Raises:
        ModelError: if there is not exactly one.
    """
    leaves = jax.tree.leaves(optimizer_state, is_leaf=lambda leaf: isinstance(leaf, SparsityState))
    found = [leaf for leaf in leaves if isinstance(leaf, SparsityState)]
    if len(found) != 1:
        raise ModelError(f"expected the state of one optimizer that sparsify made, found {len(found)} in it")
    return found[0]


def masks_of(optimizer_state: Any) -> dict[str, jax.Array]:
    """Weight path -> mask, from the state of an optimizer that `sparsify` made, at any depth.

    Raises:
        ModelError: if there is no such state in it, or more than one.
    """
    return state_of(optimizer_state).masks


def finalize(params: Any, optimizer_state: Any) -> tuple[Any, dict[str, jax.Array]]:
    """What training leaves: weights with exact zeros, and masks for `Program.masks`.

    Args:
        params: the trained parameters.
        optimizer_state: the state of the optimizer, with what `sparsify` made at any depth.

    Returns:
        The parameters with dropped elements zero, and weight path -> bool array.

    Raises:
        ModelError: if a pruned weight is not finite, or masks and weights do not belong together.
    """
    masks = masks_of(optimizer_state)
    named = _named(params)
    check_masks(masks, named)
    for path in masks:
        check_finite(path, named[path])
    return _each(params, masks, _kept), dict(masks)
