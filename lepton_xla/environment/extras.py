"""Imports of packages that only an extra brings."""

from __future__ import annotations

import dataclasses
from types import TracebackType

from lepton_xla.errors import MissingPackageError, first_line


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
        name = getattr(error, "name", None) or ""
        if not isinstance(error, ImportError) or name.startswith("lepton_xla"):
            return
        package = f"the package {name.partition('.')[0]}" if name else "packages that cannot be imported"
        # One that is there, but is too old or broken, says why.
        why = "" if isinstance(error, ModuleNotFoundError) else f" ({first_line(error)})"
        raise MissingPackageError(
            f"{self.what} needs {package}: pip install 'lepton-xla[{self.extra}]'{why}", name=error.name
        ) from error
