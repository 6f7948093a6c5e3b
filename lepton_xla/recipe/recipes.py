"""What to do to a model, as data: a recipe is a TOML file."""

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
            raise RecipeError(f"recipe {name!r}: {reason(error, text, Recipe)}") from error
        recipe = recipe if recipe.name else msgspec.structs.replace(recipe, name=name)
        recipe.check()
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
        """Refuses a value that its key does not take, or that does not go with another one.

        A recipe that Python code builds is checked like a file's.

        Raises:
            RecipeError: naming the key.
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
    return importlib.resources.files("lepton_xla.recipe").joinpath("presets")
