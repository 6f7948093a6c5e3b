"""One-shot pruning: sets elements of weights to zero and adds masks (Han et al. 2015, arXiv:1506.02626)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lepton_xla.arguments import takes
from lepton_xla.derivations import Step
from lepton_xla.errors import ModelError, RecipeError
from lepton_xla.passes.core.plans import Plan
from lepton_xla.passes.core.precomputation import for_plan
from lepton_xla.passes.pruning.held import earlier_masks
from lepton_xla.passes.pruning.masks import find_masks
from lepton_xla.passes.pruning.ranking import Ranking, keep_largest, keep_largest_on_host
from lepton_xla.passes.pruning.scores import element_scores
from lepton_xla.passes.pruning.shares import nothing_left, rule_shares
from lepton_xla.passes.pruning.targets import Target, plan_targets
from lepton_xla.program import Program, check_masks
from lepton_xla.recipe.rules import DATA_METHODS, check_rule
from lepton_xla.report import PassReport, SiteReport, unchanged
from lepton_xla.trees import leaf_bytes, name_leaves

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float


def magnitude_masks(weights: Sequence[Float[Array, "*_"]], sparsity: float) -> list[Bool[Array, "*_"]]:
    """Masks of the elements to keep, ranked by magnitude over all weights together.

    Runs on the host, on real arrays, in time linear in the number of elements.

    Args:
        weights: arrays of any shapes. NaN counts as the largest, so that it stays visible.
        sparsity: share of all elements to prune, in [0, 1).

    Returns:
        A bool array per weight. In total exactly `round(sparsity * elements)` are False: those with the smallest
        magnitudes, the first in a tie.

    >>> [mask.tolist() for mask in lx.passes.magnitude_masks([jnp.array([1.0, -4.0]), jnp.array([3.0, 2.0])], 0.5)]
    [[False, True], [True, False]]
    """
    dropped = round(sparsity * sum(weight.size for weight in weights))
    return keep_largest_on_host([Ranking(weights, dropped)])[0]


@takes(program=Program, plan=Plan)
def prune(program: Program, plan: Plan, *, seed: int = 0) -> Program:
    """Set elements of each planned weight to zero, by methods that need no data.

    Elements that the program's masks hold at zero stay zero and count towards the target: 30 % of a weight with 50 %
    held changes nothing, 70 % prunes another fifth.

    Sharded arrays are pruned on their devices, with the same zeros as on a single one.

    Args:
        program: a program whose planned weights are float arrays.
        plan: the sites to prune, and their sparsity, pattern and method. With `distribution = "uniform"` each weight,
            and each step of a stacked weight, loses the same share; with `"global"` all weights of a rule are ranked
            together; with `"erk"` wide weights lose more.
        seed: for `method = "random"`.

    Returns:
        The program with pruned weights, and with their masks, so that training can continue with the zeros held.

    Raises:
        RecipeError: if a rule's method needs gradients, or a weight would be pruned entirely. With `keep` in the recipe
            its largest element stays instead.
        ModelError: if a planned weight is not finite.

    >>> weights = {"w": jnp.array([[1.0, -4.0], [3.0, 2.0]])}
    >>> program = lx.trace(lambda w, x: x @ w["w"], weights, {"x": lx.TensorSpec(("batch", 2), "float32")})
    >>> pruned = lx.passes.prune(program, lx.passes.resolve(lx.Recipe.load("prune50"), program))
    >>> pruned.weights["w"].tolist(), pruned.masks["w"].tolist()
    ([[0.0, -4.0], [3.0, 0.0]], [[False, True], [True, False]])
    """
    program = for_plan(program, plan)
    start = time.perf_counter()
    targets = pruned_targets(program, plan, lambda method: method not in DATA_METHODS)
    weights = held_weights(program, targets)
    key = jax.random.key(seed)
    scores = {target.path: element_scores(target, weights[target.path], key=key) for target in targets}
    cut = any(len(weight.sharding.device_set) > 1 for weight in weights.values())
    rank = jax.jit(keep_largest) if cut else keep_largest_on_host
    earlier = earlier_masks(targets, program.masks)
    spare = plan.recipe.on_unsupported == "keep"
    masks = find_masks(targets, scores, rule_shares(targets), rank=rank, earlier=earlier, spare=spare)
    last = "its largest is all that stays: something of every weight does"
    reasons = {
        target.path: last
        for target in targets
        if spare and masks[target.path].sum() <= 1 < math.prod(target.like.shape)
    }
    kept = [unchanged(entry.site.name, entry.not_pruned) for entry in plan.sites if entry.not_pruned]
    return with_masks(program, plan, "prune", start, targets, masks, reasons=reasons, kept=kept)


def pruned_targets(program: Program, plan: Plan, wanted: Callable[[str], bool]) -> list[Target]:
    """The weights that a plan prunes by the wanted methods, checked to be finite.

    Raises:
        RecipeError: if a rule is inconsistent.
        ModelError: if one of them is not finite.
    """
    for index, rule in enumerate(plan.recipe.prune):
        check_rule(rule, f"recipe {plan.recipe.name!r}: prune[{index}]")
    targets = [target for target in plan_targets(plan, program.weights) if wanted(target.rule.method)]
    for target in targets:
        check_finite(target.path, program.weights[target.path])
    return targets


def held_weights(program: Program, targets: Sequence[Target]) -> dict[str, jax.Array]:
    """Path -> the weight of each target, with zeros where the program's masks hold them."""
    found: dict[str, jax.Array] = {}
    for path in (target.path for target in targets):
        weight = program.weights[path]
        found[path] = (
            jnp.where(program.masks[path], weight, jnp.zeros_like(weight)) if path in program.masks else weight
        )
    return found


def with_masks(
    program: Program,
    plan: Plan,
    name: str,
    start: float,
    targets: Sequence[Target],
    masks: Mapping[str, jax.Array],
    *,
    weights: Mapping[str, jax.Array] | None = None,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    reasons: Mapping[str, str] | None = None,
    kept: Sequence[SiteReport] = (),
) -> Program:
    """Apply masks to a program, and add a report.

    Args:
        program, plan: the program to prune, and its plan.
        name: name of the pass.
        start: when the pass began, by `time.perf_counter`.
        targets: the pruned weights.
        masks: path -> mask of each.
        weights: path -> a replacement of the weight, before masking.
        metrics, reasons: path -> further metrics, and a reason for the report.
        kept: reports of sites that were left unchanged.

    Raises:
        RecipeError: if a weight would be pruned entirely, unless the recipe says `keep`.
    """
    changed = dict(program.weights)
    found: dict[str, jax.Array] = {}
    lines: list[SiteReport] = []
    steps: list[Step] = []
    for target in targets:
        path, mask = target.path, masks[target.path]
        if path in program.masks:
            mask = mask & program.masks[path]  # masks only grow
        sites = [entry.site.name for entry in plan.sites if entry.prune is not None and entry.site.path == path]
        if reason := nothing_left(target, mask):
            if plan.recipe.on_unsupported == "error":
                raise RecipeError(f"{reason}; lower its sparsity or exclude it")
            lines += [unchanged(site, reason) for site in sites]
            continue
        found[path] = mask
        weight: Any = (weights or changed).get(path, changed[path])
        changed[path] = _held(weight, mask)[0]
        steps.append(Step(name, (path,), (path,), _held, (jnp.asarray(mask),)))
        if weight is not program.weights[path] and path in (weights or {}):
            why = "the weights that stay were changed for the calibration data"
            steps.append(Step(name, gives=(path,), reason=why, skippable=True))
        size = leaf_bytes(weight.shape, weight.dtype)
        figures = {"sparsity": 1 - float(jnp.mean(mask))} | dict((metrics or {}).get(path, {}))
        said = (reasons or {}).get(path, "")
        # If several sites share a weight, its bytes are reported once.
        sizes = [size, *([0] * (len(sites) - 1))]
        lines += [SiteReport(site, "pruned", said, b, b, figures) for site, b in zip(sites, sizes, strict=True)]
    report = PassReport(name, time.perf_counter() - start, (*lines, *kept))
    history, derivation = (*program.history, report), program.derived(*steps)
    return program.replace(weights=changed, masks=program.masks | found, history=history, derivation=derivation)


def _held(weight: jax.Array, mask: jax.Array) -> tuple[jax.Array]:
    return (jnp.where(mask, weight, jnp.zeros_like(weight)),)


def check_finite(path: str, weight: jax.Array) -> None:
    """Check that a weight holds no NaN or infinity.

    Raises:
        ModelError: naming it.
    """
    if not bool(jnp.all(jnp.isfinite(weight))):
        raise ModelError(f"weight {path!r} is not finite, so its elements cannot be ranked")


@takes(fn=Callable, masks=Mapping)
def masked(
    fn: Callable[..., Any], masks: Mapping[str, Bool[Array, "*_"]], *, straight_through: bool = False
) -> Callable[..., Any]:
    """Hold pruned weights at zero during training.

    Combines with `fake_quant` in either order: `masked(fake_quant(fn, plan), masks)` and `fake_quant(masked(fn, masks),
    plan)` are equal, and zero stays zero in every format.

    Args:
        fn: `fn(weights, *args)`, weights any pytree.
        masks: weight path -> bool array of the weight's shape; other weights are not changed.
        straight_through: whether masked elements get the gradient that they would have without the mask, so that they
            can come back (Bengio et al. 2013, arXiv:1308.3432); otherwise they get none.

    Returns:
        A function like `fn` that multiplies each weight by its mask.

    Raises:
        ModelError: when called, if a mask has no weight or another shape.

    >>> fn = lx.passes.masked(lambda w, x: x @ w["w"], {"w": jnp.array([[True], [False]])})
    >>> jax.grad(lambda w: fn(w, jnp.ones((1, 2))).sum())({"w": jnp.ones((2, 1))})["w"].tolist()
    [[1.0], [0.0]]
    """

    def hold(leaf: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.where(mask, leaf, _nothing(leaf) if straight_through else jnp.zeros_like(leaf))

    def run(weights: Any, *args: Any, **kwargs: Any) -> Any:
        named = name_leaves(weights, prefix="weights")
        check_masks(masks, named)
        held = [hold(leaf, masks[name]) if name in masks else leaf for name, leaf in named.items()]
        return fn(jax.tree.unflatten(jax.tree.structure(weights), held), *args, **kwargs)

    return run


@jax.custom_jvp
def _nothing(weight: jax.Array) -> jax.Array:
    """Zeros with the gradient of the weight, so that a selection from both has the full gradient."""
    return jnp.zeros_like(weight)


@_nothing.defjvp
def _nothing_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _nothing(*primals), tangents[0]
