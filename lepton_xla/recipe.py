"""What to do to a model, as data: a recipe is a TOML file, a plan is a recipe resolved against one program's sites."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.resources
import pathlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args, get_type_hints

import jax.numpy as jnp
import msgspec

from lepton_xla import recipe_changes
from lepton_xla.errors import RecipeError, UnsupportedError
from lepton_xla.passes.core.expressions import stored_shape
from lepton_xla.passes.core.sites import Site, find_sites
from lepton_xla.passes.pruning.masks import (
    check_prune_rule,
    other_matrix,
    plan_targets,
    something_left,
    sparsity_of,
    unprunable,
)
from lepton_xla.passes.quantization.products import contracted_size, not_float, unstorable, unsupported
from lepton_xla.passes.shrinking.removal import check_target
from lepton_xla.program import Program, leaf_bytes, name_leaves, some_names
from lepton_xla.quant.formats import FORMATS
from lepton_xla.quant.grid import group_size, nearest_group

type WeightFormat = Literal[
    "int8", "int4", "uint8", "uint4", "fp8_e4m3", "fp8_e5m2", "nf4",
    "codebook2", "codebook4", "codebook8", "codebook16", "codebook32", "codebook64", "codebook128", "codebook256",
]  # fmt: skip
type ActivationFormat = Literal["int8", "int4", "fp8_e4m3", "fp8_e5m2", "none"]


class _Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What both kinds of rule share.

    Attributes:
        sites: regular expression that must match a site's whole name; the first block that matches a site wins.
        exclude: regular expressions for sites that this block leaves to the blocks after it; one, or a list.
    """

    sites: str
    exclude: str | tuple[str, ...] = ""

    def matches(self, site: Site) -> bool:
        """Whether this rule is for the site."""
        return self.matches_path(site.name)

    def matches_path(self, path: str) -> bool:
        """Whether this rule is for what has this name."""
        return bool(re.fullmatch(self.sites, path)) and not any(
            re.fullmatch(pattern, path) for pattern in self.exclusions
        )

    @property
    def exclusions(self) -> tuple[str, ...]:
        """What `exclude` gives, none or several."""
        patterns = (self.exclude,) if isinstance(self.exclude, str) else self.exclude
        return tuple(pattern for pattern in patterns if pattern)


class PruneRule(_Rule, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A `[[prune]]` block.

    Attributes:
        sparsity: share of elements set to zero, in [0, 1); not needed where pattern or method say it.
        distribution: `uniform`: the same share of each weight; `global`: that share of all weights of the block,
            ranked together, so that small sensitive weights lose less (to lose all of a weight is refused; while
            training, its largest element stays); `erk`: wide weights lose more, in proportion to the sum of their
            dimensions (Erdos-Renyi-Kernel).
        pattern: what is dropped together, of the matrix `[K, N]` of a product, K what is summed over:
            `unstructured`: any elements; `N:M`, such as `2:4`: all but N of each M neighbours along K; `block:RxC`:
            blocks of R by C; `channel`: output channels.
        method: what goes first: `magnitude`: the smallest; `deviation:F`: all below F standard deviations;
            `saliency`: the smallest weight times gradient, while training only; `random`; `wanda` or `sparsegpt`:
            what changes outputs on calibration data least, where the latter also makes up for it with what is left.
    """

    sparsity: Annotated[float, msgspec.Meta(ge=0, lt=1)] | None = None
    distribution: Literal["uniform", "global", "erk"] = "uniform"
    pattern: Annotated[
        str, msgspec.Meta(pattern=r"^(unstructured|channel|\d{1,4}:\d{1,4}|block:[1-9]\d{0,4}x[1-9]\d{0,4})$")
    ] = "unstructured"
    method: Annotated[
        str, msgspec.Meta(pattern=r"^(magnitude|saliency|random|wanda|sparsegpt|deviation:\d{1,4}(\.\d{1,9})?)$")
    ] = "magnitude"

    def describe(self) -> str:
        """The rule in a few words."""
        share, plain = sparsity_of(self), self.pattern == "unstructured"
        words = (
            f"{100 * share:.4g}%" if share is not None else "",
            self.distribution if share is not None and (plain or self.distribution != "uniform") else "",
            "" if plain else self.pattern,
            "" if self.method == "magnitude" else self.method,
        )
        return " ".join(["prune", *filter(None, words)])


class QuantizeRule(_Rule, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A `[[quantize]]` block.

    Attributes:
        weights: the format that weights are stored in: `int8`, `int4`, `uint8` or `uint4` with a zero point,
            `fp8_e4m3`, `fp8_e5m2`, `nf4`, or `codebookN` with N = 2, 4, ... 256 levels learned from each weight.
        activations: the format that activations are rounded to for products of codes, or `none` for weights only.
        granularity: `channel`: one scale for each output channel; `tensor`: one for the weight; `group:G`: one for
            each G weights of a channel that are summed over; `group:~G`: likewise, of each weight the size of about G
            that divides it, as `nearest_group` finds it.
        weight_range: how a weight's scale is chosen: `absmax`: it covers the largest magnitude; `mse`: rounding and
            saturation have the smallest squared error, which a search over scales finds without any data. Not for
            codebooks, whose levels have it of themselves.
        products: which products the block is for: `weights`: those with a weight; `all`: those of two activations
            too, such as attention's. Both operands of these have the format `activations`, and scales at run time
            whatever `dynamic` says: one for each row of the left and each column of the right one.
        dynamic: True takes activation scales at run time, one a row; False takes one a tensor from calibration data.
        calibration: how a static range is taken from data: `absmax`, `percentile:P` with P in (0, 100] (of the
            magnitudes), `mse` (the smallest squared error of rounding and saturation) or `entropy` (the smallest
            Kullback-Leibler divergence, as TensorRT does).
        aggregate: how batches come together: `pooled`: one range from what all of them hold; `max`, `mean` or `ema:M`:
            of the ranges of each, the moving average keeping the share M of what there was before, in [0, 1).
    """

    weights: WeightFormat = "int8"
    activations: ActivationFormat = "int8"
    granularity: Annotated[str, msgspec.Meta(pattern=r"^(channel|tensor|group:~?[1-9]\d{0,8})$")] = "channel"
    weight_range: Literal["absmax", "mse"] = "absmax"
    products: Literal["weights", "all"] = "weights"
    dynamic: bool = True
    calibration: Annotated[str, msgspec.Meta(pattern=r"^(absmax|percentile:\d+(\.\d+)?|mse|entropy)$")] = "absmax"
    aggregate: Annotated[str, msgspec.Meta(pattern=r"^(pooled|max|mean|ema:0?\.\d+)$")] = "pooled"

    @property
    def group(self) -> int:
        """How many weights share a scale under `group:G`; else 0, also where it depends on the weight (`group:~G`)."""
        return 0 if "~" in self.granularity else group_size(self.granularity)

    @property
    def percentile(self) -> float:
        """The percentile of the magnitudes that the static range covers; 100 for absmax."""
        return float(self.calibration.partition(":")[2] or 100)


class ShrinkRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `[shrink]` table: channels, hidden units and heads that are removed. One of the first four keys.

    Attributes:
        sparsity: share of units to remove, in [0, 1).
        flops: share of floating-point operations to reach, in (0, 1], at the smallest of the compiled sizes.
        bytes: share of the weights' bytes to reach, in (0, 1].
        latency_ms: measured time of one call to reach, in milliseconds, at the smallest of the compiled sizes.
        importance: how units are ranked: by the norm of their weights (`l1`, `l2`), by the scale of their norm
            (`scale`; set `fold = false`, which else takes scales away) or by calibration data (`activation`).
            `taylor` needs a loss, so only `passes.shrink` takes it.
        scope: `local`: every group of units loses the same share; `global`: all are ranked together.
        round_to: what stays of a group is a multiple of this; of several, the one that measures fastest at the compiled
            sizes, or the first where the recipe has `measure = false`.
        protect: regular expressions for groups, or weights, that lose nothing; one, or a list.
    """

    sparsity: float | None = None
    flops: float | None = None
    bytes: float | None = None
    latency_ms: float | None = None
    importance: Literal["l1", "l2", "scale", "activation"] = "l2"
    scope: Literal["local", "global"] = "local"
    round_to: int | tuple[int, ...] = 1
    protect: str | tuple[str, ...] = ()

    @property
    def multiples(self) -> tuple[int, ...]:
        """What `round_to` gives, one or several."""
        return self.round_to if isinstance(self.round_to, tuple) else (self.round_to,)


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What to do to a model.

    Attributes:
        name: for tables and the artifact; a file's stem where the file gives none.
        description: one line for people.
        fold: whether batch norm is folded into the weights before it, and dead and common code removed.
        on_unsupported: what to do at a site that a rule names and a pass cannot handle: `error`, or `keep` it as it
            is and say so in the report. With `keep`, a weight of which nothing would be left keeps its largest element,
            `[shrink]` goes as far towards its target as it can, and a model without any product is left as it is.
        measure: whether integer arithmetic, and other ways to compute what XLA is slow at, such as depthwise
            convolutions, are timed at the compiled sizes and left out where they lose; False: planned integer
            arithmetic is all used, the other ways are not.
        unpack: what becomes of weights that are stored small but multiplied in float. `measured`: they are unpacked
            once, when an artifact is loaded, where that is faster than on each call; `never`: they stay small in
            memory, and every call unpacks them.
        equalize: whether the ranges of weights that follow one another are evened out before rounding.
        rescale: whether input channels are scaled so that rounding hurts less: `none`; `smooth:A`, SmoothQuant with
            alpha A in [0, 1]; or `awq`. Needs calibration data.
        rounding: `nearest`, or `gptq`: weights are rounded so that outputs on calibration data change least.
        correct_bias: whether the mean shift of outputs by rounding is taken out by biases. Needs calibration data.
        without_calibration: what becomes of `rescale`, `rounding`, `correct_bias` and pruning by `wanda` or
            `sparsegpt` where no calibration data is given: an `error`, or they are left out (`skip`; pruning is then by
            magnitude), with a line in the history.
        cast: `bfloat16` or `float16`: what is still multiplied in float in the end is multiplied in it, with float32
            sums, and weights that only go there are stored in it. Quantized weights keep their codes, integer products
            their integers (they are timed against float32); what is between products stays as it is. `float16` has no
            magnitudes above 65504.
        shrink: the `[shrink]` table; None where nothing is removed.
        prune: `[[prune]]` blocks.
        quantize: `[[quantize]]` blocks.
    """

    name: str = ""
    description: str = ""
    fold: bool = True
    on_unsupported: Literal["error", "keep"] = "error"
    measure: bool = True
    unpack: Literal["measured", "never"] = "measured"
    equalize: bool = False
    rescale: Annotated[str, msgspec.Meta(pattern=r"^(none|awq|smooth:(0(\.\d+)?|1(\.0+)?))$")] = "none"
    rounding: Literal["nearest", "gptq"] = "nearest"
    correct_bias: bool = False
    without_calibration: Literal["error", "skip"] = "error"
    cast: Literal["none", "bfloat16", "float16"] = "none"
    shrink: ShrinkRule | None = None
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
                text = path.read_text(encoding="utf-8-sig")
            except (OSError, ValueError) as error:  # ValueError: not text, or a null byte in the name
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
            recipe = msgspec.toml.decode(text.removeprefix("\ufeff"), type=Recipe)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # tomllib lets some of its own through
            raise RecipeError(f"recipe {name!r}: {_reason(error, text)}") from error
        recipe = recipe if recipe.name else msgspec.structs.replace(recipe, name=name)
        recipe._check()
        return recipe

    def replace(
        self, changes: Mapping[str, Any] | None = None, /, *, exclude: str | Sequence[str] = (), **fields: Any
    ) -> Recipe:
        """The recipe with other values, checked as those of a file are.

        Args:
            changes: dotted key -> value, such as `{"quantize.0.weights": "int4"}`; None takes a key back to its
                default.
            exclude: regular expressions for sites that no block changes, and weights that shrinking leaves whole.
            fields: keys of the recipe itself, such as `rescale="awq"`.

        Raises:
            RecipeError: for an unknown key or a value that is none of its key; the message names the key.

        >>> Recipe.load("int8").replace({"quantize.0.weights": "int4"}, exclude="head").quantize[0].exclude
        ('head',)
        """
        given: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))
        plain = msgspec.to_builtins({**(changes or {}), **fields})
        given = recipe_changes.changed(given, plain)
        if patterns := [exclude] if isinstance(exclude, str) else list(exclude):
            given = recipe_changes.excluded(given, patterns)
        try:
            recipe = msgspec.convert(given, Recipe)
        except msgspec.MsgspecError as error:
            raise RecipeError(f"recipe {self.name!r}: {_reason(error, given)}") from error
        recipe._check()
        return recipe

    def resolve(self, program: Program, *, sites: Sequence[Site] | None = None) -> Plan:
        """Decides what each site of a program gets.

        Args:
            program: the program.
            sites: its sites, where the caller has found them already.

        Raises:
            RecipeError: if a value is none that a file could hold, a pattern matches no site, a block is left none by
                those before it, two rules would treat one weight differently, or nothing would be left of a weight, as
                far as its shape tells.
            UnsupportedError: if a rule names a site that a pass cannot handle and `on_unsupported` is `error`.
        """
        self._check()
        found = tuple(sites) if sites is not None else find_sites(program)
        for kind, rules in (("prune", self.prune), ("quantize", self.quantize)):
            if found or self.on_unsupported == "error":
                _check_used(rules, found, f"recipe {self.name!r}: {kind}")
        stored = name_leaves(program.weights)
        stored |= {
            site.path: stored_shape(site.source, program.weights)
            for site in found
            if site.path is not None and site.source is not None
        }
        lookups = [rule for rule in self.prune if _names_lookups(rule, found)]
        decided = _share([self._decide(site, stored, lookups) for site in found], self.name)
        decided = [_with_own_group(entry) for entry in decided]
        for entry in decided:
            if entry.kept and self.on_unsupported == "error":
                raise UnsupportedError(
                    f"recipe {self.name!r}: site {entry.site.name!r} ({entry.site.kind}): {entry.kept}. Exclude the "
                    f"site, or set on_unsupported = 'keep'"
                )
        plan = Plan(self, tuple(decided))
        empty = something_left(plan_targets(plan, stored), keep=self.on_unsupported == "keep")
        return dataclasses.replace(plan, sites=tuple(entry.without_pruning(empty) for entry in plan.sites))

    def _check(self) -> None:
        """Refuses what is no value of its key, or not beside another; a recipe need not come from a file."""
        given = msgspec.to_builtins(self)
        try:
            msgspec.convert(given, Recipe)
        except msgspec.MsgspecError as error:
            raise RecipeError(f"recipe {self.name!r}: {_reason(error, given)}") from error
        for kind, rules in (("prune", self.prune), ("quantize", self.quantize)):
            for index, rule in enumerate(rules):
                check_rule(rule, f"recipe {self.name!r}: {kind}[{index}]")
        if (aim := self.shrink) is not None:
            try:
                if not aim.multiples:
                    raise RecipeError("shrink: round_to is an empty list")
                for multiple in aim.multiples:
                    check_target(aim.sparsity, aim.flops, aim.bytes, aim.latency_ms, multiple)
            except RecipeError as error:
                raise RecipeError(f"recipe {self.name!r}: {error}") from error

    def _decide(self, site: Site, stored: Mapping[str, Any], lookups: Sequence[PruneRule]) -> SitePlan:
        prune = next((rule for rule in self.prune if rule.matches(site)), None)
        quantize = next((rule for rule in self.quantize if rule.matches(site)), None)
        if quantize is not None and site.kind == "gather":  # a table is looked up, not multiplied
            quantize = msgspec.structs.replace(quantize, activations="none")
        if quantize is not None and site.path is None and quantize.activations != "none":  # both operands are alike
            both = quantize.activations
            quantize = msgspec.structs.replace(quantize, weights=both, granularity="channel", dynamic=True)
        leaf = stored.get(site.path) if site.path is not None else None
        return SitePlan(
            site,
            prune,
            quantize,
            not_pruned=unprunable(prune, site, leaf, named=prune in lookups) if prune is not None else "",
            not_quantized=_unquantizable(site, quantize, leaf) if quantize is not None else "",
            weight_bytes=leaf_bytes(leaf.shape, leaf.dtype) if leaf is not None else 0,
        )


@dataclasses.dataclass(frozen=True)
class SitePlan:
    """What one site gets.

    Attributes:
        site: the site.
        prune: the rule it is pruned by, or None.
        quantize: the rule it is quantized by, or None.
        not_pruned: why the rule's pruning is not done here; empty where it is, or where none is asked for.
        not_quantized: the same of quantization.
        weight_bytes: bytes of the site's weight as the program holds it.
    """

    site: Site
    prune: PruneRule | None
    quantize: QuantizeRule | None
    not_pruned: str = ""
    not_quantized: str = ""
    weight_bytes: int = 0

    def without_pruning(self, reasons: Mapping[str, str]) -> SitePlan:
        """The same, not pruned where its weight has a reason."""
        reason = reasons.get(self.site.path or "") if self.prune is not None else None
        return dataclasses.replace(self, prune=None, not_pruned=reason) if reason else self

    @property
    def kept(self) -> str:
        """Why something that a rule asks for is not done here; empty otherwise."""
        parts = (("not pruned", self.not_pruned), ("not quantized", self.not_quantized))
        return "; ".join(f"{what}: {why}" for what, why in parts if why)

    def describe(self) -> str:
        """The decision in a few words."""
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
        """Plain dicts, lists and numbers."""
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


@dataclasses.dataclass(frozen=True)
class Plan:
    """A recipe resolved against a program: one entry a site, in the order of execution."""

    recipe: Recipe
    sites: tuple[SitePlan, ...]

    def __getitem__(self, name: str) -> SitePlan | None:
        """The plan of the site with this name, or None."""
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


# What a value may be, by its key, where that is neither a type nor one of a few words.
_SPELLINGS = {
    "granularity": "channel, tensor, group:G or group:~G, G a whole number of at least 1",
    "calibration": "absmax, percentile:P with P in (0, 100], mse or entropy",
    "aggregate": "pooled, max, mean or ema:M with M in [0, 1), such as ema:0.9",
    "rescale": "none, awq or smooth:A with A in [0, 1]",
    "pattern": "unstructured, channel, N:M or block:RxC",
    "method": "magnitude, saliency, random, wanda, sparsegpt or deviation:F",
}


def _reason(error: Exception, given: Any) -> str:
    """What msgspec or tomllib say, in one line that names key and value.

    Args:
        error: theirs.
        given: the TOML text, or the recipe as plain dicts and lists.
    """
    reason = (str(error).splitlines() or ["no message"])[0]
    place = re.fullmatch(r"(.*) - at `\$\.?(.*)`", reason)
    if place is None:
        return _unknown_key(reason, Recipe, "")
    what, key = place[1], place[2]
    names = re.match(r"(?:(prune|quantize|shrink)\b(?:\[\d+\])?\.?)?(\w*)", key)
    assert names is not None
    table = {"prune": PruneRule, "quantize": QuantizeRule, "shrink": ShrinkRule}.get(names[1], Recipe)
    if not names[2] or "unknown field" in what or "missing required field" in what:
        return _unknown_key(what, table, key)
    value = _value_at(given, key)
    if names[2] == "importance" and value == "taylor":
        return (
            "shrink.importance = 'taylor' needs a loss, which a file cannot hold: call lx.passes.shrink(program, "
            "importance='taylor', loss=..., calibration=...) and leave [shrink] out"
        )
    said = f"{key} = {value!r:.80}: " if value is not None else f"{key}: "
    if "matching regex" in what and names[2] in _SPELLINGS:
        return f"{said}expected {_SPELLINGS[names[2]]}"
    if what.startswith("Invalid enum value"):
        kind = get_type_hints(table)[names[2]]
        return f"{said}expected one of {', '.join(get_args(getattr(kind, '__value__', kind)))}"
    return said + what[:1].lower() + what[1:]


def _unknown_key(what: str, table: Any, where: str) -> str:
    """A message of msgspec's on a key that is not there, or should not be; with the nearest that there is."""
    at = f"{where}: " if where else ""
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", what)
    if unknown is None:
        return at + what
    keys = list(table.__struct_fields__)
    near = difflib.get_close_matches(unknown[1], keys, 1, 0.75)
    return f"{at}unknown key {unknown[1]!r}; " + (
        f"did you mean {near[0]!r}?" if near else f"keys are {', '.join(keys)}"
    )


def _value_at(given: Any, key: str) -> Any:
    """The value at a key such as `quantize[0].weights`, None where it cannot be found."""
    try:
        value = tomllib.loads(given) if isinstance(given, str) else given
        for name in re.findall(r"\w+", key):
            value = value[int(name)] if isinstance(value, Sequence) else value[name]
    except (LookupError, TypeError, ValueError, RecursionError):
        return None
    return value


def check_rule(rule: PruneRule | QuantizeRule, where: str, *, needs_sparsity: bool = True) -> None:
    """Refuses a rule with a value that is none of its key, or does not go with the others.

    Args:
        rule: the rule.
        where: names it in messages.
        needs_sparsity: whether something has to say how much is pruned.

    Raises:
        RecipeError: naming the key.
    """
    if isinstance(rule, PruneRule):
        check_prune_rule(rule, where, needs_sparsity=needs_sparsity)
    else:
        _check_quantize_rule(rule, where)
    for key, patterns in (("sites", (rule.sites,)), ("exclude", rule.exclusions)):
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise RecipeError(f"{where}.{key} = {pattern!r} is not a regular expression: {error}") from error


def _check_quantize_rule(rule: QuantizeRule, where: str) -> None:
    if rule.activations != "none":
        weights, activations = FORMATS[rule.weights].kind, FORMATS[rule.activations].kind
        if weights != activations:
            raise RecipeError(
                f"{where}.activations = {rule.activations!r}: there is no product with weights = {rule.weights!r}; "
                f"set activations = 'none'" + _alternative(weights)
            )
        if rule.calibration == "entropy" and not rule.dynamic and activations != "int":
            raise RecipeError(
                f"{where}.calibration = 'entropy' needs evenly spaced codes, which activations = {rule.activations!r} "
                f"have not; set calibration = 'mse'"
            )
    if not 0 < rule.percentile <= 100:
        raise RecipeError(f"{where}.calibration = {rule.calibration!r}: the percentile must be in (0, 100]")
    if rule.weight_range != "absmax" and FORMATS[rule.weights].learned:
        raise RecipeError(
            f"{where}.weight_range = {rule.weight_range!r}: the levels of weights = {rule.weights!r} are learned, with "
            f"the least squared error of themselves; leave weight_range out"
        )


def _alternative(kind: str) -> str:
    fitting = [name for name in get_args(ActivationFormat.__value__) if name in FORMATS and FORMATS[name].kind == kind]
    return f", or one of {', '.join(map(repr, fitting))}" if fitting else ""


def _check_used(rules: Sequence[_Rule], sites: Sequence[Site], where: str) -> None:
    """Refuses a pattern that matches nothing, and a block that those before it leave nothing to do."""
    have = f"the program's {len(sites)} sites: {some_names([site.name for site in sites])}"
    left = list(sites)
    for index, rule in enumerate(rules):
        if not any(re.fullmatch(rule.sites, site.name) for site in sites):
            raise RecipeError(f"{where}[{index}].sites = {rule.sites!r} matches none of {have}")
        for pattern in rule.exclusions:
            if not any(re.fullmatch(pattern, site.name) for site in sites):
                raise RecipeError(f"{where}[{index}].exclude = {pattern!r} matches none of {have}")
        if not any(rule.matches(site) for site in sites):
            raise RecipeError(f"{where}[{index}].exclude = {rule.exclude!r} leaves out all that its sites match")
        if not any(rule.matches(site) for site in left):
            raise RecipeError(
                f"{where}[{index}].sites = {rule.sites!r} only matches sites that earlier blocks take; the first block "
                f"that matches a site wins, so put it before them"
            )
        left = [site for site in left if not rule.matches(site)]


def _names_lookups(rule: PruneRule, sites: Sequence[Site]) -> bool:
    """Whether a rule is for embeddings, which are left out where one matches them among others, or matches anything."""
    return not re.fullmatch(rule.sites, "\0") and all(site.kind == "gather" for site in sites if rule.matches(site))


def _share(planned: Sequence[SitePlan], recipe: str) -> list[SitePlan]:
    """What each site gets, all sites of one weight the same: it is one array, pruned and quantized one way."""
    groups: dict[str, list[SitePlan]] = {}
    for entry in planned:
        if entry.site.path is not None:
            groups.setdefault(entry.site.path, []).append(entry)
    return [_with_group(entry, groups.get(entry.site.path or "", [entry]), recipe) for entry in planned]


def _with_group(entry: SitePlan, group: Sequence[SitePlan], recipe: str) -> SitePlan:
    first = group[0]
    if not _alike(first, entry):
        raise RecipeError(
            f"recipe {recipe!r}: sites {first.site.name!r} and {entry.site.name!r} use one weight but get different "
            f"treatment ({first.describe()}; {entry.describe()}); give both the same rule"
        )
    changes: dict[str, Any] = {}
    if entry.prune is not None:
        reason = entry.not_pruned or _because_of([(other, other.not_pruned) for other in group])
        reason = reason or other_matrix(entry.prune, [other.site for other in group])
        changes |= {"prune": None, "not_pruned": reason} if reason else {}
    if entry.quantize is not None:
        reason = entry.not_quantized or _because_of([(other, other.not_quantized) for other in group])
        if not reason and entry.site.path is not None:
            reason = unstorable([other.site for other in group])
        changes |= {"quantize": None, "not_quantized": reason} if reason else {}
    return dataclasses.replace(entry, **changes)


def _with_own_group(entry: SitePlan) -> SitePlan:
    """The plan with `group:~G` made the `group:g` of its own weight; all sites of a weight have the same matrix."""
    rule = entry.quantize
    if rule is None or "~" not in rule.granularity:
        return entry
    size = nearest_group(contracted_size(entry.site), int(rule.granularity.partition("~")[2]))
    return dataclasses.replace(entry, quantize=msgspec.structs.replace(rule, granularity=f"group:{size}"))


def _unquantizable(site: Site, rule: QuantizeRule, stored: Any) -> str:
    """Why a site's weight cannot be quantized; empty if it can."""
    if stored is not None and not jnp.issubdtype(stored.dtype, jnp.floating):
        return not_float(stored.dtype)
    return unsupported(site, rule) or ""


def _alike(first: SitePlan, second: SitePlan) -> bool:
    """Whether two sites treat their weight the same way; a table that is looked up has no use for activations."""
    rules = [first.quantize, second.quantize]
    if "gather" in (first.site.kind, second.site.kind):
        rules = [rule and msgspec.structs.replace(rule, activations="none") for rule in rules]
    return first.prune == second.prune and rules[0] == rules[1]


def _because_of(reasons: Sequence[tuple[SitePlan, str]]) -> str:
    """The first reason that another site of the same weight has."""
    return next((f"its weight is shared with {other.site.name!r}: {why}" for other, why in reasons if why), "")
