"""Workers on a Ray cluster, by Ray Data. Artifact, rows and output are on a file system that all nodes share."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lepton_xla.environment.extras import Needs
from lepton_xla.errors import ExecutionError, InputError
from lepton_xla.mapping.pool import TRIES
from lepton_xla.mapping.work import Work


def run_on_ray(work: Work, parts: Sequence[int], processes: int, tell: Callable[[int], None]) -> int:
    """Run parts in actors of a Ray cluster: the one that `RAY_ADDRESS` names, else one started on this machine.

    Ray replaces actors that die and gives their parts to others.

    Args:
        work: what the parts are of.
        parts: their numbers.
        processes: how many actors.
        tell: called with the number of each part that is done.

    Returns:
        How often a part was tried again because running it failed; Ray does not tell of actors that died.

    Raises:
        InputError: for rows that do not fit the model.
        ExecutionError: if a part fails again and again.
        MissingPackageError: if Ray is not installed.
    """
    with Needs("ray", "--ray"):
        ray = importlib.import_module("ray")
        data = importlib.import_module("ray.data")
    with contextlib.redirect_stdout(sys.stderr):  # where Ray tells of actors that died
        is_ours = not ray.is_initialized()
        if is_ours:
            ray.init(log_to_driver=False)
        try:
            return _run(data, work, parts, processes, tell)
        finally:
            if is_ours:
                ray.shutdown()


def _run(data: Any, work: Work, parts: Sequence[int], processes: int, tell: Callable[[int], None]) -> int:
    left, again = list(parts), 0
    failed: dict[int, str] = {}
    for _ in range(TRIES):
        failed = {}
        # One block a part, for blocks are what Ray deals to actors.
        numbers = data.from_items([{"part": part} for part in left], override_num_blocks=len(left))
        reports = numbers.map_batches(
            _Runner, batch_size=1, concurrency=min(processes, len(left)), fn_constructor_args=(str(work.folder),)
        )
        for report in reports.iter_rows():
            if report["error"]:
                raise InputError(report["error"])
            if report["failed"]:
                failed[report["part"]] = report["failed"]
            else:
                tell(report["part"])
        if not failed:
            return again
        left, again = list(failed), again + len(failed)
    part = work.plan.parts[left[0]]
    raise ExecutionError(f"rows from {part.start} on failed {TRIES} times; the last time: {failed[left[0]]}")


class _Runner:
    """An actor: loads the model once and runs the parts that it is given."""

    def __init__(self, folder: str) -> None:
        from lepton_xla.mapping.worker import Mapper

        self._mapper = Mapper(folder)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        reports = [self._mapper.report(int(part)) for part in batch["part"]]
        return {
            "part": [report.part for report in reports],
            "error": [report.error for report in reports],
            "failed": [report.failed for report in reports],
        }
