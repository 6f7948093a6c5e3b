"""A compression schedule: what a recipe does to a model while it is trained, and at which steps."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax

from lepton_xla.errors import RecipeError
from lepton_xla.passes.core.calibration import needs_range
from lepton_xla.recipe import Recipe
from lepton_xla.recipe.rules import check_target
from lepton_xla.train.schedules import Schedule
from lepton_xla.train.sparsity import Regrow

_SHRINK = {
    "sparsity", "flops", "bytes", "latency_ms", "importance", "scope", "round_to", "protect", "on_unsupported", "sizes",
}  # fmt: skip


class Change(NamedTuple):
    """A change of the stage, before the step of this number: `shrink`, `quantize` or `freeze`."""

    step: int
    name: str


@dataclasses.dataclass(frozen=True)
class Compression:
    """What a recipe does to a model in training, and when.

    Only the blocks `[[quantize]]`, `[[prune]]` and `[shrink]` are used, each with the step that is given for it. What a
    recipe says about trained models, such as `fold` or `rescale`, is not done: training makes up for what these do.

    Attributes:
        recipe: the recipe, or the name or path of one.
        quantize_from: first step at which the recipe's `[[quantize]]` sites are computed with rounded values.
        freeze_ranges_at: step at which static ranges are measured and frozen; until then, sites with `dynamic = false`
            have dynamic scales. Default: `quantize_from`.
        learn_scales: whether scales are trained with the weights (LSQ), from `quantize_from` on, or from when the
            ranges are frozen.
        scale_optimizer: their optimizer; default: Adam with a learning rate of 1e-3, and no weight decay.
        sparsify: when the recipe's `[[prune]]` sites are pruned: a `Schedule`, or a function of the step.
        regrow: how pruned elements come back, if at all.
        shrink_at: step at which channels, hidden units and heads are removed physically.
        shrink: arguments of `passes.shrink`, such as `{"flops": 0.5}`; default: the recipe's `[shrink]` table, of whose
            `round_to` the first value is taken. `importance = "taylor"` ranks by the training loss.

    Raises:
        RecipeError: if steps and recipe do not fit together.

    >>> compression = lx.train.Compression("int8", quantize_from=100, shrink_at=20, shrink={"flops": 0.5})
    >>> [(change.step, change.name) for change in compression.changes]
    [(20, 'shrink'), (100, 'quantize')]
    >>> compression.rules.name, compression.shrink_options
    ('int8', {'flops': 0.5})
    """

    recipe: Recipe | str | None = None
    quantize_from: int | None = None
    freeze_ranges_at: int | None = None
    learn_scales: bool = False
    scale_optimizer: optax.GradientTransformation | None = None
    sparsify: Schedule | Callable[[Any], Any] | None = None
    regrow: Regrow | None = None
    shrink_at: int | None = None
    shrink: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        recipe = self.rules
        recipe.check()
        for name in ("quantize_from", "freeze_ranges_at", "shrink_at"):
            step = getattr(self, name)
            if step is not None and not (isinstance(step, numbers.Integral) and int(step) >= 0):
                raise RecipeError(f"compression: {name} = {step!r}: expected a step, a whole number of at least 0")
        self._check_quantize(recipe)
        if self.sparsify is not None and not recipe.prune:
            raise RecipeError("compression: sparsify is given, but the recipe has no [[prune]] block")
        if self.sparsify is None and self.regrow is not None:
            raise RecipeError("compression: regrow needs a schedule; give sparsify too")
        if self.shrink is not None and self.shrink_at is None:
            raise RecipeError("compression: shrink says how much to remove; say when with shrink_at")
        if self.shrink_at is not None:
            self._check_shrink()

    def _check_quantize(self, recipe: Recipe) -> None:
        if self.quantize_from is None:
            for name in ("freeze_ranges_at", "learn_scales", "scale_optimizer"):
                if getattr(self, name):
                    raise RecipeError(f"compression: {name} needs quantize_from, the step at which rounding begins")
            return
        if not recipe.quantize:
            raise RecipeError("compression: quantize_from is given, but the recipe has no [[quantize]] block")
        if self.freeze_ranges_at is not None and not any(map(needs_range, recipe.quantize)):
            raise RecipeError(
                "compression: freeze_ranges_at is given, but the recipe's scales are dynamic; set dynamic = false"
            )
        if self.freeze_ranges_at is not None and self.freeze_ranges_at < self.quantize_from:
            raise RecipeError(
                f"compression: freeze_ranges_at = {self.freeze_ranges_at} is before quantize_from = "
                f"{self.quantize_from}, so nothing would use the ranges"
            )
        if self.scale_optimizer is not None and not self.learn_scales:
            raise RecipeError("compression: scale_optimizer is given, but learn_scales is False")

    def _check_shrink(self) -> None:
        options = self.shrink_options
        if not options:
            raise RecipeError("compression: shrink_at is given, but neither shrink nor a [shrink] table of the recipe")
        unknown = options.keys() - _SHRINK
        if unknown:
            raise RecipeError(f"compression: shrink has no {sorted(unknown)[0]!r}; it has {', '.join(sorted(_SHRINK))}")
        sparsity, flops, size, latency = (options.get(name) for name in ("sparsity", "flops", "bytes", "latency_ms"))
        check_target(sparsity, flops, size, latency, options.get("round_to", 1))
        if options.get("scope", "local") not in ("local", "global"):
            raise RecipeError(f"compression: shrink.scope = {options['scope']!r}: expected 'local' or 'global'")

    @functools.cached_property
    def rules(self) -> Recipe:
        """The recipe."""
        given = self.recipe
        return Recipe() if given is None else given if isinstance(given, Recipe) else Recipe.load(given)

    @property
    def changes(self) -> tuple[Change, ...]:
        """The steps before which the stage changes, in order."""
        found = [("shrink", self.shrink_at), ("quantize", self.quantize_from)]
        if self.quantize_from is not None and any(map(needs_range, self.rules.quantize)):
            found.append(("freeze", self.quantize_from if self.freeze_ranges_at is None else self.freeze_ranges_at))
        made = [Change(step, name) for name, step in found if step is not None]
        return tuple(sorted(made, key=lambda change: change.step))

    @property
    def shrink_options(self) -> dict[str, Any]:
        """The arguments of `shrink`."""
        if self.shrink is not None:
            return dict(self.shrink)
        rule = self.rules.shrink
        if rule is None:
            return {}
        targets = {name: getattr(rule, name) for name in ("sparsity", "flops", "bytes", "latency_ms")}
        options = {name: value for name, value in targets.items() if value is not None}
        return options | {
            "importance": rule.importance,
            "scope": rule.scope,
            "round_to": rule.multiples[0],
            "protect": rule.protect,
            "on_unsupported": self.rules.on_unsupported,
        }
