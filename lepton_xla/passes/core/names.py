"""Names that passes make. They never collide with the names of users' weights.

Paths of weights may hold any character. A made name ends in a suffix such as `#1` or `:bias`; if a weight has that
name, the next number, or another suffix, is used. No code parses a name: values that belong to a site are stored under
a `Key`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

type Key = tuple[str, str]
"""A site's name and a property of it: `("layer/kernel", "activation_scale")`."""


def fresh(base: str, what: str, taken: Container[str]) -> str:
    """Make the name `base:what`; append `:what` until the name is not taken.

    >>> fresh("dense", "bias", {"dense:bias"})
    'dense:bias:bias'
    """
    name = f"{base}:{what}"
    while name in taken:
        name += f":{what}"
    return name


def fresh_names(keys: Iterable[Key], taken: Iterable[str]) -> dict[Key, str]:
    """Make a name for each key, all different and none taken.

    >>> list(fresh_names([("dense", "scale"), ("a", "b:c"), ("a:b", "c")], ["dense:scale"]).values())
    ['dense:scale:scale', 'a:b:c', 'a:b:c:c']
    """
    used, names = set(taken), dict[Key, str]()
    for site, what in keys:
        names[site, what] = fresh(site, what, used)
        used.add(names[site, what])
    return names


class SiteNames:
    """Names the sites of a program in the order in which they are found.

    The first site of a weight is named by the weight's path, further ones `path#1`, `path#2`; products without a weight
    are `scope/primitive#0`, `#1`. Names that are paths of weights are skipped.
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
        while base in self._paths:  # otherwise its names could be those of further sites of that weight
            base += "#"
        return self._numbered(base)

    def _numbered(self, base: str) -> str:
        number = self._next.get(base, 0)
        while (name := f"{base}#{number}") in self._paths:
            number += 1
        self._next[base] = number + 1
        return name
