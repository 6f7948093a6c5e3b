"""Names that passes make beside those that users gave; none is the name of something else, whatever users write.

Weights bring their paths, which may hold any character. A name that is made ends in a mark, `#1` or `:bias`, and where
a weight has that very name the next number, or one more mark, is taken. Nothing reads a name to find out what it was
made of: what belongs to a site is found under the pair of the site's name and what it is.
"""

from __future__ import annotations

from collections.abc import Container

type Key = tuple[str, str]
"""A site's name, and what of it: `("layer/kernel", "activation_scale")`."""


def fresh(base: str, what: str, taken: Container[str]) -> str:
    """`base:what`, or with more of `:what` the first such name that is not taken."""
    name = f"{base}:{what}"
    while name in taken:
        name += f":{what}"
    return name


class SiteNames:
    """Names of the sites of one program, given in the order in which they are met.

    The first site of a weight has the weight's path for a name, further ones `path#1`, `path#2`; a product without a
    weight is `scope/primitive#0`, `#1`. Names that are weights' paths are passed over.
    """

    def __init__(self, paths: Container[str]) -> None:
        self._paths = paths
        self._next: dict[str, int] = {}

    def of_weight(self, path: str) -> str:
        """The name of the next site of a weight."""
        if path not in self._next:
            self._next[path] = 1
            return path
        return self._numbered(path)

    def of_activations(self, scope: str, kind: str) -> str:
        """The name of the next product of activations of this kind in a scope."""
        base = "/".join(part for part in (scope, kind) if part)
        while base in self._paths:  # else its names could be those of further sites of that weight
            base += "#"
        return self._numbered(base)

    def _numbered(self, base: str) -> str:
        number = self._next.get(base, 0)
        while (name := f"{base}#{number}") in self._paths:
            number += 1
        self._next[base] = number + 1
        return name
