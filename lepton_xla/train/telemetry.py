"""What people and machines see of a run: a progress bar or lines on stderr, JSON lines, TensorBoard."""

from __future__ import annotations

import contextlib
import logging
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import msgspec

from lepton_xla.environment.extras import Needs
from lepton_xla.errors import TrainingError

LOG = logging.getLogger(__name__)

# Seconds between lines where there is no terminal to draw a bar on.
LINE_EVERY_S = 10.0


class Telemetry:
    """Writes metrics to all places that were asked for. Only one process of a run has one that writes.

    >>> telemetry = Telemetry(total=10, progress=False)
    >>> telemetry.record(5, {"loss": 0.5}, kind="train")
    """

    def __init__(
        self,
        total: int,
        *,
        log: str | pathlib.Path | None = None,
        tensorboard: str | pathlib.Path | None = None,
        progress: bool | None = None,
    ) -> None:
        """Open the files.

        Args:
            total: number of steps of the run.
            log: file to which a JSON object is appended for each record.
            tensorboard: folder of TensorBoard events; needs the package `tensorboardX`.
            progress: whether to show progress on stderr; None: only on a terminal.

        Raises:
            TrainingError: if a file cannot be written.
            MissingPackageError: if `tensorboardX` is not installed.
        """
        self._total = total
        self._file: TextIO | None = None
        self._bar: Any = None
        self._task: Any = None
        self._said = float("-inf")
        self._shown = sys.stderr.isatty() if progress is None else progress
        if log is not None:
            try:
                pathlib.Path(log).parent.mkdir(parents=True, exist_ok=True)
                self._file = open(log, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by `close`
            except OSError as error:
                raise TrainingError(f"the log {log} cannot be written: {error.strerror}") from error
        self._events = None if tensorboard is None else _events(tensorboard)

    def record(self, step: int, metrics: Mapping[str, float], *, kind: str) -> None:
        """Write the metrics of a step: `kind` is `train`, `evaluation`, or what happened."""
        if self._file is not None:
            try:
                self._file.write(
                    msgspec.json.encode({"step": step, "kind": kind, "time": time.time(), **metrics}).decode() + "\n"
                )
            except OSError as error:  # a full disk ends no run
                LOG.warning("the log cannot be written, and is not written to any more: %s", error.strerror)
                self._file = None
        if self._events is not None:
            for name, value in metrics.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)
        if self._shown:
            self._show(step, metrics, kind)

    def close(self) -> None:
        """Close the files and the bar."""
        for each in (self._file, self._events):
            if each is not None:
                with contextlib.suppress(OSError):
                    each.close()
        if self._bar is not None:
            self._bar.stop()

    def _show(self, step: int, metrics: Mapping[str, float], kind: str) -> None:
        text = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name != "finite")
        if not sys.stderr.isatty():
            now = time.monotonic()
            if kind != "train" or step >= self._total or now - self._said >= LINE_EVERY_S:
                self._said = now
                sys.stderr.write(f"step {step}/{self._total}  {kind}: {text}\n")
            return
        bar = self._bar or self._begin_bar()
        if kind == "train":
            bar.update(self._task, completed=step, text=text)
        else:
            bar.console.print(f"step {step}  {kind}: {text}", highlight=False)

    def _begin_bar(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("train", total=self._total, text="")
        self._bar.start()
        return self._bar


def _events(folder: str | pathlib.Path) -> Any:
    with Needs("tensorboard", "tensorboard = ..."):
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    return SummaryWriter(str(folder))
