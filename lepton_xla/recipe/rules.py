"""The blocks of a recipe: what to prune, quantize and shrink, and how."""

from __future__ import annotations

import math
import numbers
import re
from typing import Annotated, Literal, get_args

import msgspec

from lepton_xla.errors import RecipeError, first_line
from lepton_xla.quant.formats import FORMATS
from lepton_xla.quant.grid import group_size
from lepton_xla.recipe.patterns import Pattern

# Methods that choose masks from calibration data, each in a pass of its own.
DATA_METHODS = ("wanda", "sparsegpt")
type WeightFormat = Literal[
    "int8", "int4", "uint8", "uint4", "fp8_e4m3", "fp8_e5m2", "nf4",
    "codebook2", "codebook4", "codebook8", "codebook16", "codebook32", "codebook64", "codebook128", "codebook256",
]  # fmt: skip
type ActivationFormat = Literal["int8", "int4", "fp8_e4m3", "fp8_e5m2", "none"]


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Common parts of `[[prune]]` and `[[quantize]]` blocks.

    Attributes:
        sites: regular expression that must match the whole name of a site; the first block that matches a site wins.
        exclude: regular expressions (one, or a list) for sites that this block does not match; later blocks may.

    >>> rule = Rule(sites=".*kernel", exclude="head/.*")
    >>> rule.matches("dense/kernel"), rule.matches("head/kernel"), rule.exclusions
    (True, False, ('head/.*',))
    """

    sites: str
    exclude: str | tuple[str, ...] = ""

    def matches(self, name: str) -> bool:
        """Tell whether this rule applies to the site, or weight, of this name."""
        return bool(re.fullmatch(self.sites, name)) and not any(
            re.fullmatch(pattern, name) for pattern in self.exclusions
        )

    @property
    def exclusions(self) -> tuple[str, ...]:
        """The patterns of `exclude`, as a tuple."""
        patterns = (self.exclude,) if isinstance(self.exclude, str) else self.exclude
        return tuple(pattern for pattern in patterns if pattern)


class PruneRule(Rule, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A `[[prune]]` block.

    Attributes:
        sparsity: share of elements to set to zero, in [0, 1); leave it out if pattern or method imply it.
        distribution: `uniform`: the same share of each weight; `global`: rank the elements of all weights of the block
            together, so that weights with large elements lose fewer (a rule that would prune a weight entirely is
            refused; in training its largest element stays); `erk`: more of wide weights, in proportion to the sum of
            their dimensions (Erdos-Renyi-Kernel).
        pattern: which elements of the matrix `[K, N]` of a product (K is contracted) are pruned together:
            `unstructured`: single elements; `N:M`, such as `2:4`: all but N of each M neighbours along K; `block:RxC`:
            blocks of R by C; `channel`: output channels.
        method: which elements to prune first: `magnitude`: the smallest; `deviation:F`: all below F standard
            deviations; `saliency`: the smallest weight times gradient, in training only; `random`; `wanda` or
            `sparsegpt`: those that change outputs on calibration data least; `sparsegpt` also adjusts the remaining
            elements to compensate.

    >>> from lepton_xla.recipe import PruneRule
    >>> rule = PruneRule(sites=".*kernel", exclude="head/.*", pattern="2:4")
    >>> rule.describe(), rule.matches("head/kernel"), rule.exclusions
    ('prune 50% 2:4', False, ('head/.*',))
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
        """Describe the rule in a few words."""
        share, plain = sparsity_of(self), self.pattern == "unstructured"
        words = (
            f"{100 * share:.4g}%" if share is not None else "",
            self.distribution if share is not None and (plain or self.distribution != "uniform") else "",
            "" if plain else self.pattern,
            "" if self.method == "magnitude" else self.method,
        )
        return " ".join(["prune", *filter(None, words)])


class QuantizeRule(Rule, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A `[[quantize]]` block.

    Attributes:
        weights: the format that weights are stored in: `int8`, `int4`, `uint8` or `uint4` with a zero point,
            `fp8_e4m3`, `fp8_e5m2`, `nf4`, or `codebookN` with N = 2, 4, ... 256 levels learned from each weight.
        activations: the format that activations are rounded to for quantized products, or `none` to quantize weights
            only.
        granularity: `channel`: one scale per output channel; `tensor`: one per weight; `group:G`: one for each G
            weights of a channel along the contracted dimension; `group:~G`: likewise, with a group size near G that
            divides the weight, chosen by `nearest_group`.
        weight_range: how to choose the scale of a weight: `absmax`: cover the largest magnitude; `mse`: search for the
            smallest squared error of rounding and saturation, which needs no data. Not for codebooks, whose levels
            already minimize it.
        products: which products the block applies to: `weights`: those with a weight; `all`: also those of two
            activations, such as attention's. Both operands of these are rounded to the format `activations` with
            dynamic scales (whatever `dynamic` says), one for each row of the left and each column of the right operand.
        dynamic: True computes activation scales at run time, one per row; False uses one per tensor from calibration
            data.
        calibration: how to choose a static range from data: `absmax`, `percentile:P` with P in (0, 100] (of the
            magnitudes), `mse` (the smallest squared error of rounding and saturation) or `entropy` (the smallest
            Kullback-Leibler divergence, as TensorRT does).
        aggregate: how to combine batches: `pooled`: one range from the values of all batches; `max`, `mean` or `ema:M`:
            from the ranges of the batches; M in [0, 1) is the share of the old value in the moving average.

    >>> from lepton_xla.recipe import QuantizeRule
    >>> rule = QuantizeRule(sites=".*", weights="int4", activations="none", granularity="group:64")
    >>> rule.group, rule.percentile, rule.matches("dense/kernel"), rule.exclusions
    (64, 100.0, True, ())
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
        """Number of weights that share a scale under `group:G`; 0 for other granularities, `group:~G` included."""
        return 0 if "~" in self.granularity else group_size(self.granularity)

    @property
    def percentile(self) -> float:
        """The percentile of the magnitudes that the static range covers; 100 for absmax."""
        return float(self.calibration.partition(":")[2] or 100)


class ShrinkRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `[shrink]` table: how many channels, hidden units and heads to remove. Give one of the first four keys.

    Attributes:
        sparsity: share of units to remove, in [0, 1).
        flops: share of floating-point operations to keep, in (0, 1], at the smallest of the compiled sizes.
        bytes: share of the weights' bytes to keep, in (0, 1].
        latency_ms: target for the measured time of one call, in milliseconds, at the smallest of the compiled sizes.
        importance: how units are ranked: by the norm of their weights (`l1`, `l2`), by the scale of their norm layer
            (`scale`; set `fold = false`, because folding removes the scales) or by their activations on calibration
            data (`activation`). `taylor` needs a loss, so only `passes.shrink` takes it.
        scope: `local`: every group loses the same share of its units; `global`: the units of all groups are ranked
            together.
        round_to: the number of units that a group keeps is a multiple of this. Of several values, the one that measures
            fastest at the compiled sizes, or the first one if the recipe has `measure = false`.
        protect: regular expressions (one, or a list) for groups or weights that lose no units.

    >>> from lepton_xla.recipe import ShrinkRule
    >>> lx.Recipe(shrink=ShrinkRule(flops=0.5, round_to=(8, 16))).shrink.multiples
    (8, 16)
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
        """The values of `round_to`, as a tuple."""
        return self.round_to if isinstance(self.round_to, tuple) else (self.round_to,)


def check_rule(rule: PruneRule | QuantizeRule, where: str, *, needs_sparsity: bool = True) -> None:
    """Validate a rule's values and their combinations.

    Args:
        rule: the rule.
        where: name of the rule in messages.
        needs_sparsity: whether the rule must determine how much is pruned.

    Raises:
        RecipeError: if a value is invalid; names the key.

    >>> check_rule(PruneRule(sites=".*", sparsity=1.5), "mine")
    Traceback (most recent call last):
    lepton_xla.errors.RecipeError: mine.sparsity = 1.5: expected a share in [0, 1)
    """
    if isinstance(rule, PruneRule):
        _check_prune_rule(rule, where, needs_sparsity=needs_sparsity)
    else:
        _check_quantize_rule(rule, where)
    for key, patterns in (("sites", (rule.sites,)), ("exclude", rule.exclusions)):
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise RecipeError(f"{where}.{key} = {pattern!r} is not a regular expression: {error}") from error


def _check_prune_rule(rule: PruneRule, where: str, *, needs_sparsity: bool = True) -> None:
    """Validate a `[[prune]]` block.

    Args:
        rule: the rule.
        where: name of the rule in messages.
        needs_sparsity: whether the rule must determine how much is pruned.

    Raises:
        RecipeError: if a value is invalid; names the key.
    """
    has = f"{where}.sparsity = {rule.sparsity}"
    if rule.sparsity is not None and not (isinstance(rule.sparsity, numbers.Real) and 0 <= rule.sparsity < 1):
        raise RecipeError(f"{has}: expected a share in [0, 1)")
    try:  # the rule may not come from a file
        msgspec.convert(msgspec.to_builtins(msgspec.structs.replace(rule, sparsity=None)), type(rule))
    except (msgspec.MsgspecError, TypeError) as error:
        raise RecipeError(f"{where}: {first_line(error)}") from error
    pattern = Pattern.parse(rule.pattern)
    if pattern.kind == "n_m" and not 0 < pattern.kept < pattern.rows:
        raise RecipeError(f"{where}.pattern = {rule.pattern!r}: expected N:M with 0 < N < M, such as '2:4'")
    if rule.method.startswith("deviation"):
        if rule.sparsity is not None or rule.pattern != "unstructured" or rule.distribution != "uniform":
            raise RecipeError(
                f"{where}.method = {rule.method!r} determines the sparsity; leave out sparsity, pattern and "
                "distribution"
            )
        return
    if pattern.sparsity is not None and rule.sparsity not in (None, pattern.sparsity):
        raise RecipeError(
            f"{has}: pattern = {rule.pattern!r} implies a sparsity of {pattern.sparsity:g}; leave sparsity out"
        )
    if pattern.kind == "n_m" and rule.distribution != "uniform":
        raise RecipeError(
            f"{where}.distribution = {rule.distribution!r}: pattern {rule.pattern!r} removes the same share "
            "everywhere; leave distribution out"
        )
    if rule.method in DATA_METHODS:
        if rule.distribution == "global":
            raise RecipeError(f"{where}.distribution = 'global': method = {rule.method!r} ranks each weight on its own")
        if pattern.kind not in ("unstructured", "n_m"):
            raise RecipeError(
                f"{where}.pattern = {rule.pattern!r}: method = {rule.method!r} supports unstructured and N:M"
            )
    if needs_sparsity and sparsity_of(rule) is None:
        raise RecipeError(f"{where}.sparsity is missing: give a share in [0, 1)")


def sparsity_of(rule: PruneRule) -> float | None:
    """The final sparsity that a rule asks for; None if it does not determine one.

    >>> sparsity_of(PruneRule(sites=".*", pattern="1:4")), sparsity_of(PruneRule(sites=".*", method="deviation:1"))
    (0.75, None)
    """
    return rule.sparsity if rule.sparsity is not None else Pattern.parse(rule.pattern).sparsity


def _check_quantize_rule(rule: QuantizeRule, where: str) -> None:
    if rule.activations != "none":
        weights, activations = FORMATS[rule.weights].kind, FORMATS[rule.activations].kind
        if weights != activations:
            raise RecipeError(
                f"{where}.activations = {rule.activations!r}: there is no quantized product "
                f"with weights = {rule.weights!r}; set activations = 'none'" + _alternative(weights)
            )
        if rule.calibration == "entropy" and not rule.dynamic and activations != "int":
            raise RecipeError(
                f"{where}.calibration = 'entropy' needs evenly spaced codes; activations = {rule.activations!r} are "
                "not evenly spaced. Set calibration = 'mse'"
            )
    if not 0 < rule.percentile <= 100:
        raise RecipeError(f"{where}.calibration = {rule.calibration!r}: the percentile must be in (0, 100]")
    if rule.weight_range != "absmax" and FORMATS[rule.weights].learned:
        raise RecipeError(
            f"{where}.weight_range = {rule.weight_range!r}: the levels of weights = {rule.weights!r} are learned and "
            "minimize the squared error already; leave weight_range out"
        )


def _alternative(kind: str) -> str:
    fitting = [name for name in get_args(ActivationFormat.__value__) if name in FORMATS and FORMATS[name].kind == kind]
    return f", or one of {', '.join(map(repr, fitting))}" if fitting else ""


def check_target(
    sparsity: float | None, flops: float | None, size: float | None, latency_ms: float | None, round_to: int
) -> None:
    """Validate the target of `shrink`.

    Raises:
        RecipeError: unless exactly one target is given, and it and `round_to` are in range.

    >>> check_target(0.5, None, 0.5, None, 1)
    Traceback (most recent call last):
    lepton_xla.errors.RecipeError: shrink takes exactly one of sparsity, flops, bytes, latency_ms; ...
    """
    targets = {"sparsity": sparsity, "flops": flops, "bytes": size, "latency_ms": latency_ms}
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise RecipeError(f"shrink takes exactly one of {', '.join(targets)}; {' and '.join(given) or 'none'} given")
    ((name, value),) = given.items()
    allowed = isinstance(value, numbers.Real) and {
        "sparsity": 0 <= value < 1,
        "latency_ms": 0 < value < math.inf,
    }.get(name, 0 < value <= 1)
    if not allowed:
        ranges = {"sparsity": "[0, 1): at least one unit of each group stays", "latency_ms": "(0, inf)"}
        raise RecipeError(f"shrink: {name} = {value} is not in {ranges.get(name, '(0, 1]')}")
    if not isinstance(round_to, numbers.Integral) or round_to < 1:
        raise RecipeError(f"shrink: round_to = {round_to} is not a whole number of at least 1")
