"""What this package asks for, as its metadata says, and what is installed of it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections.abc import Collection, Iterable

import packaging.requirements
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

PACKAGE = "lepton-xla"

_EXTRA = re.compile(r"""extra\s*==\s*['"]([^'"]+)['"]""")


@dataclasses.dataclass(frozen=True)
class Requirement:
    """One package that this one asks for.

    Attributes:
        name: its name, with the extras of it that are asked for, such as `jax[cuda12]`.
        versions: the versions that fit, such as `>=0.11.1,<0.13`; empty if all do.
        extra: the extra that asks for it; empty if every installation does.
        installed: the version that is installed; None if it is not.
    """

    name: str
    versions: str
    extra: str = ""
    installed: str | None = None

    @property
    def fits(self) -> bool:
        """Whether it is installed in a version that fits.

        >>> Requirement("jax", ">=0.11.1,<0.13", installed="0.12.0.1").fits, Requirement("jax", "").fits
        (True, False)
        """
        return self.installed is not None and SpecifierSet(self.versions).contains(self.installed, prereleases=True)


def requirements(texts: Iterable[str] | None = None) -> list[Requirement]:
    """What this package asks for.

    Args:
        texts: requirements in the form of the metadata; by default those of the installed package.

    Raises:
        PackageNotFoundError: if it is not installed.

    >>> found = requirements(['numpy>=2.2', 'grain>=0.2; extra == "train"'])
    >>> [(each.name, each.versions, each.extra) for each in found]
    [('numpy', '>=2.2', ''), ('grain', '>=0.2', 'train')]
    """
    given = importlib.metadata.requires(PACKAGE) or [] if texts is None else texts
    found: list[Requirement] = []
    for parsed, extra in map(_parsed, given):
        if canonicalize_name(parsed.name) == PACKAGE:  # an extra that names others
            continue
        name = f"{parsed.name}[{','.join(sorted(parsed.extras))}]" if parsed.extras else parsed.name
        found.append(Requirement(name, str(parsed.specifier), extra, _version(parsed.name, parsed.extras)))
    return found


def _parsed(text: str) -> tuple[packaging.requirements.Requirement, str]:
    """A requirement, and the extra that asks for it; empty if every installation does."""
    parsed = packaging.requirements.Requirement(text)
    extra = _EXTRA.search(str(parsed.marker or ""))
    return parsed, extra[1] if extra else ""


def _version(name: str, extras: Collection[str] = ()) -> str | None:
    """The installed version of a package; None if it, or what one of these extras of it asks for, is missing."""
    try:
        version = importlib.metadata.version(name)
        asked = importlib.metadata.requires(name) or [] if extras else []
    except importlib.metadata.PackageNotFoundError:
        return None
    missing = any(extra in extras and _version(parsed.name) is None for parsed, extra in map(_parsed, asked))
    return None if missing else version
