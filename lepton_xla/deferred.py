"""Modules that are imported when one of their names is first used, above all JAX.

Importing JAX takes longer than loading a model and answering.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax as jax
    import jax.numpy as jnp
else:

    class _Deferred(ModuleType):
        """A module that is imported when an attribute is first read."""

        def __getattr__(self, name: str) -> object:
            module = vars(self).get("_module")
            if module is None:
                module = self._module = importlib.import_module(self.__name__)
            return getattr(module, name)

    jax = _Deferred("jax")
    jnp = _Deferred("jax.numpy")

__all__ = ["exports", "jax", "jnp"]


def exports(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package whose names are imported on first use.

    Args:
        package: its name.
        homes: its modules, without its own name, and the names that each of them has.
    """
    home = {name: f"{package}.{module}" for module, names in homes.items() for name in names}

    def get(name: str) -> object:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(home[name]), name)
        setattr(sys.modules[package], name, value)  # so that it is not asked for again
        return value

    def names() -> list[str]:
        module = sys.modules[package]
        return sorted({*vars(module), *module.__all__})

    return get, names
