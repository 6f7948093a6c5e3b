"""Trees of arrays: paths, bytes and shapes of leaves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import ml_dtypes  # noqa: F401 # pyright: ignore[reportUnusedImport] (with it NumPy knows bfloat16 and others by name)
import numpy as np

from lepton_xla.deferred import jax
from lepton_xla.errors import ModelError


def some_names(names: Iterable[str], limit: int = 6) -> str:
    """The first few names, for a message.

    >>> some_names("abcdefgh", limit=3)
    'a, b, c, ... and 5 more'
    """
    listed = list(names)
    more = f", ... and {len(listed) - limit} more" if len(listed) > limit else ""
    return (", ".join(listed[:limit]) or "there is none") + more


def abstract(tree: Any) -> Any:
    """Replace every array of a tree by its shape and dtype.

    >>> abstract({"w": np.ones((2, 3), np.int8)})["w"].shape
    (2, 3)
    """
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays in a tree in memory; dtypes below one byte count as packed.

    >>> tree_bytes({"w": np.ones((2, 3), np.float32), "b": np.ones(3, np.int8)})
    27
    """
    return sum(leaf_bytes(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree))


def leaf_bytes(shape: Sequence[int], dtype: Any) -> int:
    """Count the bytes of one array; int4 and uint4 count half a byte.

    >>> leaf_bytes((3, 5), "float32"), leaf_bytes((3, 5), "int4")
    (60, 8)
    """
    kind = np.dtype(dtype)
    width = 4 if kind.name in ("int4", "uint4") else kind.itemsize * 8
    return (math.prod(shape) * width + 7) // 8


def name_leaves(tree: Any, *, single: str | None = None, prefix: str = "") -> dict[str, Any]:
    """Flatten a tree into `{path: leaf}`, paths joined by `/`.

    Args:
        tree: any pytree.
        single: name of the leaf if the tree is a single leaf.
        prefix: prefix of the names of leaves in a tuple or list: `output` gives `output_0`, `output_1`.

    Raises:
        ModelError: if two leaves have the same path, as in `{"a/b": x, "a": {"b": y}}`.

    >>> name_leaves({"dense": {"kernel": 1, "bias": 2}, "scales": [3, 4]})
    {'dense/bias': 2, 'dense/kernel': 1, 'scales/0': 3, 'scales/1': 4}
    """
    try:
        flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    except (TypeError, ValueError) as error:  # keys that Python cannot sort
        raise ModelError(
            f"a dictionary has keys of different types, such as 1 and '1'; use strings only: {error}"
        ) from error
    names: list[str] = []
    for path, _ in flat:
        name = "/".join(map(key_name, path)) or (single if single is not None else prefix)
        names.append(f"{single}_{name}" if single is not None and name.split("/")[0].isdigit() else name)
    # Attribute names, as in a `QTensor`, are not the user's: if a dictionary key has the same path, the key keeps it.
    parts = [any(isinstance(key, jax.tree_util.GetAttrKey) for key in path) for path, _ in flat]
    keys = {name for name, part in zip(names, parts, strict=True) if not part}
    named: dict[str, Any] = {}
    for name, part, (_, leaf) in zip(names, parts, flat, strict=True):
        while part and (name in keys or name in named):
            name += ":"
        if name in named:
            raise ModelError(f"two leaves have the path {name!r}; rename one of the dictionary keys")
        named[name] = leaf
    return named


def key_name(key: Any) -> str:
    """Give one part of a leaf's path: a dictionary's key, a position or an attribute.

    >>> key_name(jax.tree_util.DictKey("kernel")), key_name(jax.tree_util.SequenceKey(3))
    ('kernel', '3')
    """
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
