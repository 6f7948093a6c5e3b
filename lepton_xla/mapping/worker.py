"""A process that runs parts: told their numbers on stdin, one a line, it says on stdout what became of each.

    python -m lepton_xla.mapping.worker FOLDER

It ends with its stdin, so that nothing stays when its parent is killed.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import msgspec

from lepton_xla.compiler import Servable, load
from lepton_xla.errors import InputError, LeptonError, first_line
from lepton_xla.mapping.columns import as_input
from lepton_xla.mapping.sinks import write_part
from lepton_xla.mapping.sources import open_source
from lepton_xla.mapping.work import Work


class Report(msgspec.Struct, omit_defaults=True):
    """What a worker says.

    Attributes:
        part: the part that it is about; -1 for the worker itself, which is ready.
        error: why the part cannot be run, and will not be by another process.
        failed: what failed, and may not in another process.
    """

    part: int = -1
    error: str = ""
    failed: str = ""


class Mapper:
    """Runs parts of a work's rows through its model, one after the other."""

    def __init__(self, folder: str | os.PathLike[str], model: Servable | None = None) -> None:
        self._work = Work.load(folder)
        self._model = model if model is not None else load(self._work.plan.artifact)
        self._source = open_source(self._work.plan.source)

    def run(self, number: int) -> None:
        """Run a part and write its results.

        Raises:
            InputError: for a row that does not fit; names it.
            LeptonError: if it cannot run or the results cannot be written.
        """
        plan, source = self._work.plan, self._source
        part = plan.parts[number]
        values = source.read(part, list(plan.columns.values()))
        inputs: dict[str, Any] = {}
        for name, column in plan.columns.items():
            if name not in self._model.inputs:
                inputs[name] = values[column]  # the model converts it
                continue
            try:
                inputs[name] = as_input(
                    values[column], self._model.inputs[name], lambda row: source.where(part.start + row)
                )
            except InputError as error:
                raise InputError(f"{plan.source}, column {column!r}, {error}") from None
        outputs = self._model(**inputs)
        write_part(self._work.file(number), plan.kind, outputs, lambda row: source.where(part.start + row))

    def report(self, number: int) -> Report:
        """Run a part, and say what became of it instead of raising."""
        try:
            self.run(number)
        except LeptonError as error:
            return Report(number, error=str(error))
        except Exception as error:  # XLA's and the system's; another process may have more luck
            return Report(number, failed=f"{type(error).__name__}: {first_line(error)}")
        return Report(number)


def main() -> None:
    """Runs parts until stdin ends."""
    said = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what else prints, prints elsewhere
    try:
        mapper = Mapper(sys.argv[1])
    except LeptonError as error:
        said.write(msgspec.json.encode(Report(error=str(error))) + b"\n")
        return
    said.write(msgspec.json.encode(Report()) + b"\n")
    for line in sys.stdin:
        said.write(msgspec.json.encode(mapper.report(int(line))) + b"\n")


if __name__ == "__main__":
    main()
