"""Plans: what is done to each site of a program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

from lepton_xla.passes.core.sites import Site
from lepton_xla.recipe import PruneRule, QuantizeRule, Recipe


@dataclasses.dataclass(frozen=True)
class SitePlan:
    """The plan for one site.

    Attributes:
        site: the site.
        prune: the rule it is pruned by, or None.
        quantize: the rule it is quantized by, or None.
        not_pruned: why the rule's pruning is not done; empty if it is done or not requested.
        not_quantized: the same of quantization.
        weight_bytes: bytes of the site's weight in the program.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> planned = lx.passes.resolve(lx.Recipe.load("int8"), program)["w"]
    >>> planned.describe(), planned.kept, planned.to_json()["weight_bytes"]
    ('int8 weights, int8 activations dynamic', '', 64)
    """

    site: Site
    prune: PruneRule | None
    quantize: QuantizeRule | None
    not_pruned: str = ""
    not_quantized: str = ""
    weight_bytes: int = 0

    def without_pruning(self, reasons: Mapping[str, str]) -> SitePlan:
        """Drop pruning if the site's weight is in `reasons`."""
        reason = reasons.get(self.site.path or "") if self.prune is not None else None
        return dataclasses.replace(self, prune=None, not_pruned=reason) if reason else self

    @property
    def kept(self) -> str:
        """Why something that a rule asks for is not done; else empty."""
        parts = (("not pruned", self.not_pruned), ("not quantized", self.not_quantized))
        return "; ".join(f"{what}: {why}" for what, why in parts if why)

    def describe(self) -> str:
        """Describe the decision in a few words."""
        parts = [self.prune.describe()] if self.prune else []
        if self.quantize and self.site.path is None:
            parts.append(f"{self.quantize.weights} x {self.quantize.activations} activations dynamic")
        elif self.quantize:
            acts = self.quantize.activations
            scales = (
                "" if acts == "none" else (" dynamic" if self.quantize.dynamic else f" {self.quantize.calibration}")
            )
            groups = f" in groups of {self.quantize.group}" if self.quantize.group else ""
            searched = ", range by mse" if self.quantize.weight_range == "mse" else ""
            parts.append(
                f"{self.quantize.weights} weights{groups}{searched}"
                + (f", {acts} activations{scales}" if acts != "none" else "")
            )
        return " + ".join(parts) or "float"

    def to_json(self) -> dict[str, Any]:
        """Give plain dicts, lists and numbers."""
        weight = self.site.weight if self.site.path is not None else None
        return {
            "site": self.site.name,
            "weight": self.site.path,
            "kind": self.site.kind,
            "shape": list(weight.shape) if weight else None,
            "weight_bytes": self.weight_bytes,
            "repeats": self.site.repeats,
            "decision": self.describe(),
            "kept": self.kept,
            "computed_from": list(self.site.source.weights) if self.site.source is not None else [],
        }


def by_weight(entries: Iterable[SitePlan]) -> dict[str, list[SitePlan]]:
    """What sites with a weight get, by the weight's path, in order: several may share one."""
    groups: dict[str, list[SitePlan]] = {}
    for entry in entries:
        if entry.site.path is not None:
            groups.setdefault(entry.site.path, []).append(entry)
    return groups


@dataclasses.dataclass(frozen=True)
class Plan:
    """A recipe resolved against a program: one entry per site, in the order of execution.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> plan = lx.passes.resolve(lx.Recipe.load("int8"), program)
    >>> plan["w"].quantize.weights, plan.to_json()[0]["site"]
    ('int8', 'w')
    """

    recipe: Recipe
    sites: tuple[SitePlan, ...]

    @property
    def quantized(self) -> dict[str, list[SitePlan]]:
        """The sites whose weights are quantized, by weight.

        >>> x = lx.TensorSpec(("n", 3), "float32")
        >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.ones((3, 2))}, {"x": x})
        >>> recipe = lx.Recipe.parse('[[quantize]]\\nsites = "w"', name="one")
        >>> list(lx.passes.resolve(recipe, program).quantized)
        ['w']
        """
        return by_weight(entry for entry in self.sites if entry.quantize is not None)

    @property
    def pruned(self) -> dict[str, list[SitePlan]]:
        """The sites whose weights are pruned, by weight.

        >>> x = lx.TensorSpec(("n", 3), "float32")
        >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.ones((3, 2))}, {"x": x})
        >>> recipe = lx.Recipe.parse('[[prune]]\\nsites = "w"\\nsparsity = 0.5', name="one")
        >>> list(lx.passes.resolve(recipe, program).pruned)
        ['w']
        """
        return by_weight(entry for entry in self.sites if entry.prune is not None)

    def __getitem__(self, name: str) -> SitePlan | None:
        """Give the plan of the site with this name, or None."""
        return self._by_name.get(name)

    def __str__(self) -> str:
        rows = [(entry.site.name, entry.site.kind, entry.describe(), entry.kept) for entry in self.sites]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
        cast = "" if self.recipe.cast == "none" else f", products left in float are made {self.recipe.cast}"
        lines = [f"recipe {self.recipe.name}: {len(rows)} sites{cast}"]
        for *cells, kept in rows:
            line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            lines.append(f"  {line}{f'  ({kept})' if kept else ''}".rstrip())
        return "\n".join(lines)

    @functools.cached_property
    def _by_name(self) -> dict[str, SitePlan]:
        return {planned.site.name: planned for planned in self.sites}

    def to_json(self) -> list[dict[str, Any]]:
        """Give plain dicts, lists and numbers."""
        return [planned.to_json() for planned in self.sites]
