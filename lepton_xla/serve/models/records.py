"""Writes changes of models to the audit log, in order and off the event loop."""

from __future__ import annotations

import concurrent.futures
import logging
from pathlib import Path

from lepton_xla.errors import ArtifactError, ServeError
from lepton_xla.files.copies import listing_of
from lepton_xla.serve.observe.audit import Audit, Value

_log = logging.getLogger("lepton_xla.serve")


class Records:
    """Takes what happened, and has a thread write it.

    Args:
        path: the audit log; None for none.

    Raises:
        ServeError: if the file cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._audit = None if path is None else Audit(path)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "lepton-audit")

    def __call__(self, who: str, action: str, target: str, outcome: str, **details: Value) -> None:
        """Has a line written; see `Audit.record`. A line that cannot be written is told in the log.

        Args:
            who: who asked, and after an `@` the address that it was asked from.
            action: see `AuditEntry`, as what follows.
            target: see there.
            outcome: see there.
            details: see there; `artifact`, the path of one, becomes `digest`, that of its manifest.
        """
        if self._audit is not None:
            name, _, address = who.partition("@")
            if address:
                details["address"] = address
            self._thread.submit(self._write, self._audit, name, action, target, outcome, details)

    def close(self) -> None:
        """Waits until all is written."""
        self._thread.shutdown()

    @staticmethod
    def _write(audit: Audit, who: str, action: str, target: str, outcome: str, details: dict[str, Value]) -> None:
        try:
            if (artifact := details.pop("artifact", None)) is not None:
                details["digest"] = _digest(str(artifact))
            audit.record(who, action, target, outcome, **details)
        except ServeError as error:
            _log.error("%s; not in the audit log: %s %s %s %s", error, who, action, target, outcome)


def _digest(artifact: str) -> str | None:
    """The digest of an artifact's manifest; None if it is gone already."""
    try:
        return listing_of(Path(artifact))[0].sha256
    except ArtifactError:
        return None
