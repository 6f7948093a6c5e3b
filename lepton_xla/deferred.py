"""JAX, imported when one of its names is first used: importing it takes longer than loading a model and answering."""

from __future__ import annotations

import importlib
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

__all__ = ["jax", "jnp"]
