"""The blocks of a recipe: what is pruned, quantized and shrunk, and by what."""

from __future__ import annotations

import math
import numbers
import re
from typing import Annotated, Literal, get_args

import msgspec

from lepton_xla.errors import RecipeError
from lepton_xla.quant.formats import FORMATS
from lepton_xla.quant.grid import group_size
from lepton_xla.recipe.patterns import Pattern

# Methods that choose a mask from calibration data; passes of their own do it.
DATA_METHODS = ("wanda", "sparsegpt")
type WeightFormat = Literal[
    "int8", "int4", "uint8", "uint4", "fp8_e4m3", "fp8_e5m2", "nf4",
    "codebook2", "codebook4", "codebook8", "codebook16", "codebook32", "codebook64", "codebook128", "codebook256",
]  # fmt: skip
type ActivationFormat = Literal["int8", "int4", "fp8_e4m3", "fp8_e5m2", "none"]


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What both kinds of rule share.

    Attributes:
        sites: regular expression that must match a site's whole name; the first block that matches a site wins.
        exclude: regular expressions for sites that this block leaves to the blocks after it; one, or a list.
    """

    sites: str
    exclude: str | tuple[str, ...] = ""

    def matches(self, name: str) -> bool:
        """Whether this rule is for the site, or weight, of this name."""
        return bool(re.fullmatch(self.sites, name)) and not any(
            re.fullmatch(pattern, name) for pattern in self.exclusions
        )

    @property
    def exclusions(self) -> tuple[str, ...]:
        """What `exclude` gives, none or several."""
        patterns = (self.exclude,) if isinstance(self.exclude, str) else self.exclude
        return tuple(pattern for pattern in patterns if pattern)


class PruneRule(Rule, frozen=True, forbid_unknown_fields=True, kw_only=True):
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


class QuantizeRule(Rule, frozen=True, forbid_unknown_fields=True, kw_only=True):
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
    """Refuses a rule whose parts do not go together.

    Args:
        rule: the rule.
        where: names it in messages.
        needs_sparsity: whether something has to say how much is dropped.

    Raises:
        RecipeError: naming the key.
    """
    has = f"{where}.sparsity = {rule.sparsity}"
    if rule.sparsity is not None and not (isinstance(rule.sparsity, numbers.Real) and 0 <= rule.sparsity < 1):
        raise RecipeError(f"{has}: expected a share in [0, 1)")
    try:  # a rule need not come from a file
        msgspec.convert(msgspec.to_builtins(msgspec.structs.replace(rule, sparsity=None)), type(rule))
    except (msgspec.MsgspecError, TypeError) as error:
        raise RecipeError(f"{where}: {str(error).splitlines()[0]}") from error
    pattern = Pattern.parse(rule.pattern)
    if pattern.kind == "groups" and not 0 < pattern.kept < pattern.rows:
        raise RecipeError(f"{where}.pattern = {rule.pattern!r}: expected N:M with 0 < N < M, such as '2:4'")
    if rule.method.startswith("deviation"):
        if rule.sparsity is not None or rule.pattern != "unstructured" or rule.distribution != "uniform":
            raise RecipeError(
                f"{where}.method = {rule.method!r} says by itself what is dropped of each weight; leave out sparsity, "
                f"pattern and distribution"
            )
        return
    if pattern.sparsity is not None and rule.sparsity not in (None, pattern.sparsity):
        raise RecipeError(f"{has}: pattern = {rule.pattern!r} is a sparsity of {pattern.sparsity:g}; leave it out")
    if pattern.kind == "groups" and rule.distribution != "uniform":
        raise RecipeError(
            f"{where}.distribution = {rule.distribution!r}: pattern {rule.pattern!r} is the same everywhere"
        )
    if rule.method in DATA_METHODS:
        if rule.distribution == "global":
            raise RecipeError(f"{where}.distribution = 'global': method = {rule.method!r} ranks each weight by itself")
        if pattern.kind not in ("unstructured", "groups"):
            raise RecipeError(
                f"{where}.pattern = {rule.pattern!r}: method = {rule.method!r} knows unstructured and N:M"
            )
    if needs_sparsity and sparsity_of(rule) is None:
        raise RecipeError(f"{where}.sparsity is missing: give a share in [0, 1)")


def sparsity_of(rule: PruneRule) -> float | None:
    """The share that a rule drops in the end, where it says so."""
    return rule.sparsity if rule.sparsity is not None else Pattern.parse(rule.pattern).sparsity


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


def check_target(
    sparsity: float | None, flops: float | None, size: float | None, latency_ms: float | None, round_to: int
) -> None:
    """Refuses what `shrink` cannot aim at.

    Raises:
        RecipeError: unless exactly one target is given, and it and `round_to` are in range.
    """
    targets = {"sparsity": sparsity, "flops": flops, "bytes": size, "latency_ms": latency_ms}
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise RecipeError(f"shrink takes one of {', '.join(targets)}; {' and '.join(given) or 'none'} given")
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
