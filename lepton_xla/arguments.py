"""Arguments of public functions: what is of the wrong kind is refused by name, before any work is done."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol

from lepton_xla.errors import LeptonError, ModelError, RecipeError

# Kind -> what is raised where it is missing, and how to get one.
_MADE: dict[str, tuple[type[LeptonError], str]] = {
    "Program": (ModelError, "trace, from_linen and from_nnx make one"),
    "Plan": (RecipeError, "passes.resolve(recipe, program) makes one"),
    "Recipe": (RecipeError, "Recipe.load and Recipe.parse read one"),
    "Groups": (LeptonError, "passes.find_groups(program) finds them"),
}


class _Decorator(Protocol):
    def __call__[**P, T](self, fn: Callable[P, T], /) -> Callable[P, T]: ...


def takes(**kinds: Any) -> _Decorator:
    """Make a function refuse arguments that are not instances of what is named here.

    None is taken too where it is the default.

    Args:
        kinds: parameter -> class, or several.

    Raises:
        LeptonError: when the function is called, naming it, the parameter, what came, and what makes the right thing.
    """

    def decorate[**P, T](fn: Callable[P, T], /) -> Callable[P, T]:
        parameters = inspect.signature(fn).parameters

        @functools.wraps(fn)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            given = dict(zip(parameters, args, strict=False)) | kwargs
            for name, kind in kinds.items():
                value = given.get(name, parameters[name].default)
                if not isinstance(value, kind) and value is not parameters[name].default:
                    raise _refused(f"{getattr(fn, '__name__', 'this')}: {name}", value, kind)
            return fn(*args, **kwargs)

        return checked

    return decorate


def _refused(what: str, value: Any, kind: Any) -> LeptonError:
    names = [each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,))]
    error, made = _MADE.get(names[0], (LeptonError, ""))
    shown = f" = {value!r:.80}" if isinstance(value, str | int | float) else ""  # of an array nobody wants to read all
    said = f"{what}{shown} is a {type(value).__name__}, not a {' or '.join(names)}"
    return error(f"{said}; {made}" if made else said)
