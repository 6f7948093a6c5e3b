"""Recipes: how to optimize a model, as a TOML file or a `Recipe`."""

from __future__ import annotations

import importlib.resources
import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec

from lepton_xla.errors import RecipeError
from lepton_xla.recipe.changes import changed, excluded
from lepton_xla.recipe.messages import reason
from lepton_xla.recipe.rules import PruneRule, QuantizeRule, ShrinkRule, check_rule, check_target


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to optimize a model.

    Attributes:
        name: shown in tables and stored in the artifact; by default the stem of the file.
        description: one line for people.
        fold: whether to fold batch norms into the preceding weights, and to remove dead code and common subexpressions.
        on_unsupported: what to do at a site that a rule matches but a pass cannot handle: raise an `error`, or `keep`
            the site unchanged and report it. With `keep`, also: a weight that would be pruned entirely keeps its
            largest element, `[shrink]` goes as far towards its target as it can, and a model without products is left
            unchanged.
        measure: whether to time integer arithmetic, and alternative implementations of what XLA is slow at (such as
            depthwise convolutions), at the compiled sizes, and to use them only where they win. False: use all planned
            integer arithmetic and no alternative implementation.
        unpack: when to unpack weights that are stored small but multiplied in float. `measured`: once, when the
            artifact is loaded, if that is faster than on each call; `never`: on each call, so that they stay small in
            memory.
        equalize: whether to balance the ranges of consecutive weights before rounding (cross-layer equalization).
        rescale: how to scale input channels to reduce the rounding error: `none`; `smooth:A`, SmoothQuant with alpha A
            in [0, 1]; or `awq`. Needs calibration data.
        rounding: `nearest`, or `gptq`: round weights so that the outputs on calibration data change least. `gptq` needs
            calibration data.
        correct_bias: whether biases compensate the mean error that rounding makes in the outputs. Needs calibration
            data.
        without_calibration: what to do about `rescale`, `rounding`, `correct_bias` and pruning by `wanda` or
            `sparsegpt` without calibration data: raise an `error`, or `skip` them (and prune by magnitude), with a line
            in the history.
        cast: `bfloat16` or `float16`: compute the products that are still in float with operands of this type and
            float32 sums, and store weights that are used only there in it. Quantized weights and integer products
            (which were timed against float32) stay as they are, and so does everything between products. `float16`
            overflows above 65504.
        cache: `int8`: store the cache of a model that generates tokens in int8 codes with a scale for each position and
            head, a quarter of float32's bytes and a little more. `decode` must write the position that it is given and
            no other. An error for other models.
        shrink: the `[shrink]` table; None to remove nothing.
        prune: `[[prune]]` blocks.
        quantize: `[[quantize]]` blocks.

    >>> recipe = lx.Recipe.load("int8-prune50")
    >>> recipe.prune[0].sparsity, recipe.quantize[0].weights
    (0.5, 'int8')
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
    cache: Literal["float", "int8"] = "float"
    shrink: ShrinkRule | None = None
    prune: tuple[PruneRule, ...] = ()
    quantize: tuple[QuantizeRule, ...] = ()

    @staticmethod
    def load(name_or_path: str | pathlib.Path) -> Recipe:
        """Read a preset by name, or a TOML file by path.

        Raises:
            RecipeError: if there is no such preset or file, or it is malformed; the message names the key.

        >>> lx.Recipe.load("int4-weight-only").quantize[0].granularity
        'group:~64'
        """
        path = pathlib.Path(name_or_path)
        if str(name_or_path) in presets():
            text = preset_text(str(name_or_path))
        else:
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:  # ValueError: not text, or a null byte in the name
                raise RecipeError(
                    f"recipe {str(name_or_path)!r}: neither a preset ({', '.join(presets())}) nor a readable TOML file"
                ) from error
        return Recipe.parse(text, name=path.name.removesuffix(".toml"))

    @staticmethod
    def parse(text: str, *, name: str) -> Recipe:
        """Read a recipe from TOML text; `name` is used in messages, and as the recipe's name if the text has none.

        Raises:
            RecipeError: for malformed TOML, an unknown key, a wrong type, or an invalid pattern.

        >>> lx.Recipe.parse('cast = "bfloat16"', name="half").cast
        'bfloat16'
        """
        try:
            recipe = msgspec.toml.decode(text.removeprefix("\ufeff"), type=Recipe)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # tomllib raises these too
            raise RecipeError(f"recipe {name!r}: {reason(error, text, Recipe)}") from error
        recipe = recipe if recipe.name else msgspec.structs.replace(recipe, name=name)
        recipe.check()
        return recipe

    def replace(
        self, changes: Mapping[str, Any] | None = None, /, *, exclude: str | Sequence[str] = (), **fields: Any
    ) -> Recipe:
        """Return the recipe with other values, validated like a file's.

        Args:
            changes: dotted key -> value, such as `{"quantize.0.weights": "int4"}`; None restores the default.
            exclude: regular expressions for sites to leave unchanged, and for weights not to shrink.
            fields: keys of the recipe itself, such as `rescale="awq"`.

        Raises:
            RecipeError: for an unknown key or an invalid value; the message names the key.

        >>> Recipe.load("int8").replace({"quantize.0.weights": "int4"}, exclude="head").quantize[0].exclude
        ('head',)
        """
        given: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))
        plain = msgspec.to_builtins({**(changes or {}), **fields})
        given = changed(given, plain)
        if patterns := [exclude] if isinstance(exclude, str) else list(exclude):
            given = excluded(given, patterns)
        try:
            recipe = msgspec.convert(given, Recipe)
        except msgspec.MsgspecError as error:
            raise RecipeError(f"recipe {self.name!r}: {reason(error, given, Recipe)}") from error
        recipe.check()
        return recipe

    def check(self) -> None:
        """Validate all values and their combinations.

        Recipes built in Python are checked like those of files.

        Raises:
            RecipeError: if a value is invalid; names the key.

        >>> lx.Recipe(name="mine", prune=(PruneRule(sites="["),)).check()
        Traceback (most recent call last):
        lepton_xla.errors.RecipeError: recipe 'mine': prune[0].sparsity is missing: give a share in [0, 1)
        """
        given = msgspec.to_builtins(self)
        try:
            msgspec.convert(given, Recipe)
        except msgspec.MsgspecError as error:
            raise RecipeError(f"recipe {self.name!r}: {reason(error, given, Recipe)}") from error
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


def presets() -> tuple[str, ...]:
    """Names of the presets: the recipes that come with the package.

    >>> from lepton_xla.recipe import presets
    >>> "int8" in presets()
    True
    """
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in _preset_folder().iterdir() if entry.is_file()))


def preset_text(name: str) -> str:
    """The TOML text of a preset.

    Raises:
        RecipeError: if there is no such preset.

    >>> from lepton_xla.recipe import preset_text
    >>> print(preset_text("prune50").partition("[[")[2])
    prune]]
    sites = ".*"
    sparsity = 0.5
    distribution = "global"
    <BLANKLINE>
    """
    if name not in presets():
        raise RecipeError(f"recipe {name!r}: no such preset; the presets are {', '.join(presets())}")
    return _preset_folder().joinpath(f"{name}.toml").read_text(encoding="utf-8")


def _preset_folder() -> Any:
    return importlib.resources.files("lepton_xla.recipe").joinpath("presets")
