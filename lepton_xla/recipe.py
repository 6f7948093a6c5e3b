"""What to do to a model, as data: a recipe is a TOML file, a plan is a recipe resolved against one program's sites."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import pathlib
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from lepton_xla.errors import RecipeError, UnsupportedError
from lepton_xla.passes.products import unsupported
from lepton_xla.passes.sites import Site, find_sites
from lepton_xla.program import Program, leaf_bytes


class _Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What both kinds of rule share.

    Attributes:
        sites: regular expression that must match a site's whole name; the first block that matches a site wins.
        exclude: regular expression for sites that this block leaves to the blocks after it; empty for none.
    """

    sites: str
    exclude: str = ""

    def matches(self, site: Site) -> bool:
        """Whether this rule is for the site."""
        return bool(re.fullmatch(self.sites, site.name)) and not (
            self.exclude and re.fullmatch(self.exclude, site.name)
        )


class PruneRule(_Rule, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A `[[prune]]` block.

    Attributes:
        sparsity: share of elements set to zero, in [0, 1).
        distribution: `uniform`: the same share of each weight; `global`: that share of all weights of the block,
            ranked together, so that small sensitive weights lose less.
        pattern: `unstructured`: any elements, the smallest magnitudes first.
    """

    sparsity: Annotated[float, msgspec.Meta(ge=0, lt=1)]
    distribution: Literal["uniform", "global"] = "uniform"
    pattern: Literal["unstructured"] = "unstructured"


class QuantizeRule(_Rule, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A `[[quantize]]` block.

    Attributes:
        weights: the format that weights are stored in.
        activations: the format that activations are rounded to for integer arithmetic, or `none` for weights only.
        granularity: `channel`: one scale for each output channel; `tensor`: one for the weight.
        dynamic: True takes activation scales at run time, one a row; False takes one a tensor from calibration data.
        calibration: how a static range is taken from data: `absmax`, or `percentile:P` with P in (0, 100].
    """

    weights: Literal["int8"] = "int8"
    activations: Literal["int8", "none"] = "int8"
    granularity: Literal["channel", "tensor"] = "channel"
    dynamic: bool = True
    calibration: Annotated[str, msgspec.Meta(pattern=r"^(absmax|percentile:\d+(\.\d+)?)$")] = "absmax"

    @property
    def percentile(self) -> float:
        """The percentile of the magnitudes that the static range covers; 100 for absmax."""
        return float(self.calibration.partition(":")[2] or 100)


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What to do to a model.

    Attributes:
        name: for tables and the artifact; a file's stem where the file gives none.
        description: one line for people.
        fold: whether batch norm is folded into the weights before it, and dead and common code removed.
        on_unsupported: what to do at a site that a rule names and a pass cannot handle: `error`, or `keep` it as it
            is and say so in the report.
        measure: whether integer arithmetic is timed against float at the compiled sizes and reverted where it loses.
        prune: `[[prune]]` blocks.
        quantize: `[[quantize]]` blocks.
    """

    name: str = ""
    description: str = ""
    fold: bool = True
    on_unsupported: Literal["error", "keep"] = "error"
    measure: bool = True
    prune: tuple[PruneRule, ...] = ()
    quantize: tuple[QuantizeRule, ...] = ()

    @staticmethod
    def load(name_or_path: str | pathlib.Path) -> Recipe:
        """Reads a preset by name, or a TOML file by path.

        Raises:
            RecipeError: if there is no such preset or file, or it is malformed; the message names the key.
        """
        path = pathlib.Path(name_or_path)
        if str(name_or_path) in presets():
            text = preset_text(str(name_or_path))
        else:
            try:
                text = path.read_text()
            except (OSError, UnicodeDecodeError) as error:
                raise RecipeError(
                    f"recipe {str(name_or_path)!r}: neither a preset ({', '.join(presets())}) nor a readable TOML file"
                ) from error
        return Recipe.parse(text, name=path.name.removesuffix(".toml"))

    @staticmethod
    def parse(text: str, *, name: str) -> Recipe:
        """Reads a recipe from TOML text; `name` is for messages, and the recipe's name where it gives none.

        Raises:
            RecipeError: for malformed TOML, an unknown key, a wrong type, or an invalid pattern.
        """
        try:
            recipe = msgspec.toml.decode(text, type=Recipe)
        except msgspec.MsgspecError as error:
            raise RecipeError(f"recipe {name!r}: {error}") from error
        for kind, rules in (("prune", recipe.prune), ("quantize", recipe.quantize)):
            for index, rule in enumerate(rules):
                _check_rule(rule, f"recipe {name!r}: {kind}[{index}]")
        return recipe if recipe.name else msgspec.structs.replace(recipe, name=name)

    def resolve(self, program: Program, *, sites: Sequence[Site] | None = None) -> Plan:
        """Decides what each site of a program gets.

        Args:
            program: the program.
            sites: its sites, where the caller has found them already.

        Raises:
            RecipeError: if a pattern matches no site, or two rules would treat one weight differently.
            UnsupportedError: if a rule names a site that a pass cannot handle and `on_unsupported` is `error`.
        """
        found = tuple(sites) if sites is not None else find_sites(program)
        for kind, rules in (("prune", self.prune), ("quantize", self.quantize)):
            for index, rule in enumerate(rules):
                if not any(rule.matches(site) for site in found):
                    raise RecipeError(
                        f"recipe {self.name!r}: {kind}[{index}].sites = {rule.sites!r} matches none of the program's "
                        f"{len(found)} sites: {_some([site.name for site in found])}"
                    )
        decided = tuple(self._decide(site) for site in found)
        _check_shared(decided, self.name)
        return Plan(self, decided)

    def _decide(self, site: Site) -> SitePlan:
        prune = next((rule for rule in self.prune if rule.matches(site)), None)
        quantize = next((rule for rule in self.quantize if rule.matches(site)), None)
        kept: list[str] = []
        # A table of embeddings looks like any weight, but its rows are used one at a time; only a name prunes it.
        if prune is not None and (site.path is None or site.kind == "gather"):
            kept.append(f"not pruned: {'no weight' if site.path is None else 'an embedding'}")
            prune = None
        reason = unsupported(site) if quantize is not None else None
        if reason is not None:
            kept.append(f"not quantized: {reason}")
            quantize = None
        if kept and self.on_unsupported == "error":
            raise UnsupportedError(
                f"recipe {self.name!r}: site {site.name!r} ({site.kind}): {'; '.join(kept)}. Exclude the site, or set "
                f"on_unsupported = 'keep'"
            )
        return SitePlan(site, prune, quantize, "; ".join(kept))


@dataclasses.dataclass(frozen=True)
class SitePlan:
    """What one site gets.

    Attributes:
        site: the site.
        prune: the rule it is pruned by, or None.
        quantize: the rule it is quantized by, or None.
        kept: why something that a rule asks for is not done here; empty otherwise.
    """

    site: Site
    prune: PruneRule | None
    quantize: QuantizeRule | None
    kept: str = ""

    def describe(self) -> str:
        """The decision in a few words."""
        parts = [f"prune {self.prune.sparsity:.0%} {self.prune.distribution}"] if self.prune else []
        if self.quantize:
            acts = self.quantize.activations
            scales = (
                "" if acts == "none" else (" dynamic" if self.quantize.dynamic else f" {self.quantize.calibration}")
            )
            parts.append(
                f"{self.quantize.weights} weights" + (f", {acts} activations{scales}" if acts != "none" else "")
            )
        return " + ".join(parts) or "float"

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        weight = self.site.weight if self.site.path is not None else None
        return {
            "site": self.site.name,
            "kind": self.site.kind,
            "shape": list(weight.shape) if weight else None,
            "weight_bytes": leaf_bytes(weight.shape, weight.dtype) * _steps(self.site) if weight else 0,
            "repeats": self.site.repeats,
            "decision": self.describe(),
            "kept": self.kept,
        }


@dataclasses.dataclass(frozen=True)
class Plan:
    """A recipe resolved against a program: one entry a site, in the order of execution."""

    recipe: Recipe
    sites: tuple[SitePlan, ...]

    def __getitem__(self, name: str) -> SitePlan | None:
        """The plan of the site with this name, or None."""
        return self._by_name.get(name)

    @functools.cached_property
    def _by_name(self) -> dict[str, SitePlan]:
        return {planned.site.name: planned for planned in self.sites}

    def to_json(self) -> list[dict[str, Any]]:
        """Plain dicts, lists and numbers."""
        return [planned.to_json() for planned in self.sites]


def presets() -> tuple[str, ...]:
    """Names of the recipes that come with the package."""
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in _preset_folder().iterdir() if entry.is_file()))


def preset_text(name: str) -> str:
    """A preset as TOML, to read or to start from.

    Raises:
        RecipeError: if there is no such preset.
    """
    if name not in presets():
        raise RecipeError(f"recipe {name!r}: no such preset; there are {', '.join(presets())}")
    return _preset_folder().joinpath(f"{name}.toml").read_text(encoding="utf-8")


def _preset_folder() -> Any:
    return importlib.resources.files("lepton_xla").joinpath("presets")


def _check_rule(rule: PruneRule | QuantizeRule, where: str) -> None:
    for key in ("sites", "exclude"):
        try:
            re.compile(getattr(rule, key))
        except re.error as error:
            raise RecipeError(f"{where}.{key} = {getattr(rule, key)!r} is not a regular expression: {error}") from error
    if isinstance(rule, QuantizeRule) and not 0 < rule.percentile <= 100:
        raise RecipeError(f"{where}.calibration = {rule.calibration!r}: the percentile must be in (0, 100]")


def _check_shared(planned: Sequence[SitePlan], recipe: str) -> None:
    """A weight used at several sites is one array: it is pruned and quantized one way."""
    first: dict[str, SitePlan] = {}
    for entry in planned:
        if entry.site.path is None:
            continue
        other = first.setdefault(entry.site.path, entry)
        if (other.prune, other.quantize) != (entry.prune, entry.quantize) and not (other.kept or entry.kept):
            raise RecipeError(
                f"recipe {recipe!r}: sites {other.site.name!r} and {entry.site.name!r} use one weight but get "
                f"different treatment ({other.describe()}; {entry.describe()}); give both the same rule"
            )


def _steps(site: Site) -> int:
    return site.repeats if site.stacked else 1


def _some(names: Sequence[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f", ... and {len(names) - limit} more" if len(names) > limit else "")
