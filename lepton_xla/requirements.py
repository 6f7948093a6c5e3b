"""What this package asks for, as its metadata says, and what is installed of it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections.abc import Iterable
from types import TracebackType

from lepton_xla.errors import MissingPackageError

PACKAGE = "lepton-xla"

_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9._-]+)\s*(?:\[([^\]]*)\])?\s*\(?([^;)]*)\)?\s*(?:;(.*))?")
_EXTRA = re.compile(r"""extra\s*==\s*['"]([^'"]+)['"]""")
_CLAUSE = re.compile(r"\s*(==|!=|>=|<=|~=|<|>)\s*([^\s,]+)\s*")


@dataclasses.dataclass(frozen=True)
class Needs:
    """A block that imports packages of an extra; says which extra it is if one of them is missing.

    Attributes:
        extra: the extra that brings them.
        what: what needs them, for the message.

    >>> with Needs("train", "lx.train"):
    ...     import json
    """

    extra: str
    what: str

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not isinstance(error, ModuleNotFoundError) or not error.name or error.name.startswith("lepton_xla"):
            return
        package = error.name.partition(".")[0]
        raise MissingPackageError(
            f"{self.what} needs the package {package}: pip install '{PACKAGE}[{self.extra}]'", name=error.name
        ) from error


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
        return self.installed is not None and fits(self.installed, self.versions)


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
    for text in given:
        match = _REQUIREMENT.fullmatch(text)
        if match is None or match[1].lower().replace("_", "-") == PACKAGE:  # an extra that names others
            continue
        extra = _EXTRA.search(match[4] or "")
        name = f"{match[1]}[{match[2]}]" if match[2] else match[1]
        found.append(Requirement(name, match[3].strip(), extra[1] if extra else "", _version(match[1], match[2])))
    return found


def fits(version: str, versions: str) -> bool:
    """Whether a version is among those of a requirement. Suffixes such as `rc1` are ignored.

    >>> fits("0.12.0.1", ">=0.11.1,<0.13"), fits("0.13", ">=0.11.1,<0.13"), fits("1.0", "==1.0.0"), fits("5.1", "~=5.0")
    (True, False, True, True)
    """
    here = _numbers(version)
    for operator, wanted in _CLAUSE.findall(versions):
        there = _numbers(wanted)
        length = max(len(here), len(there))
        first, second = (each + (0,) * (length - len(each)) for each in (here, there))
        if not {
            "==": first == second,
            "!=": first != second,
            ">=": first >= second,
            "<=": first <= second,
            ">": first > second,
            "<": first < second,
            "~=": first >= second and here[: len(there) - 1] == there[:-1],
        }[operator]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"\d+(?:\.\d+)*", version.rpartition("!")[2])
    return tuple(map(int, release[0].split("."))) if release else ()


def _version(name: str, extras: str | None = None) -> str | None:
    """The installed version of a package; None if it, or what one of these extras of it asks for, is missing."""
    try:
        version = importlib.metadata.version(name)
        asked = importlib.metadata.requires(name) or [] if extras else []
    except importlib.metadata.PackageNotFoundError:
        return None
    wanted = {extra.strip() for extra in (extras or "").split(",")}
    for match in filter(None, map(_REQUIREMENT.fullmatch, asked)):
        extra = _EXTRA.search(match[4] or "")
        if extra is not None and extra[1] in wanted and _version(match[1]) is None:
            return None
    return version
