"""`leptonx launch`: starts the processes of a run here, or writes the files with which others start them."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any

import click

from lepton_xla.cli import _common

_COMMAND = {"ignore_unknown_options": False, "allow_interspersed_args": False}
_command = click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
_seconds = click.FloatRange(0, min_open=True)


@click.group()
def launch() -> None:
    """Start a command in several processes that train together.

    \b
      leptonx launch local --processes 2 -- python train.py     starts them here, and watches them

    In the command, call lepton_xla.launch.initialize() first: it joins the process to the others.
    """


def _watchdog_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        (
            click.option(
                "--watchdog-s",
                "step_s",
                type=_seconds,
                help="End all processes if one makes no progress for so many seconds while it trains. Training tells "
                "its progress by lepton_xla.launch.beat, as fit does. By default nothing is watched.",
            ),
            click.option(
                "--watchdog-compile-s",
                "compile_s",
                type=_seconds,
                help="The same until the first step and while it compiles. By default ten times --watchdog-s.",
            ),
            click.option(
                "--watchdog-evaluate-s",
                "evaluate_s",
                type=_seconds,
                help="The same while it evaluates or saves. By default ten times --watchdog-s.",
            ),
        )
    ):
        command = option(command)
    return command


@launch.command("local", context_settings=_COMMAND)
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True, help="Number of processes.")
@click.option(
    "--devices",
    type=click.IntRange(1),
    help="Devices of each process: on the CPU so many fake ones; of accelerators each process gets its own.",
)
@_watchdog_options
@click.option(
    "--max-restarts",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="How often all are started again after one has failed or hangs. Counted anew whenever training has gone on "
    "from a newer checkpoint. Exit code 2 (wrong use) is final.",
)
@click.option(
    "--restart-preempted",
    is_flag=True,
    help="Start again also after exit code 75: told to stop, and saved. By default it is passed on, for a scheduler.",
)
@click.option(
    "--grace-s",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    help="Seconds that processes have after SIGTERM, SIGINT or SIGHUP, which are passed on, before they are killed.",
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, help="Port on which they meet; by default a free one."
)
@_common.json_option
@_command
def local(
    command: tuple[str, ...],
    *,
    step_s: float | None,
    compile_s: float | None,
    evaluate_s: float | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Start COMMAND in several processes on this machine, and exit with its code.

    If one process ends by an error, is killed, or hangs, all are ended, since the others would wait for it. With
    --max-restarts they are started again, and training goes on from its last checkpoint. Each line of their output
    begins with the number of the process.

    With one process, the command joins the run of the environment it is in, such as that of a SLURM task; so the
    watchdog can be had there too.

    Exit code: that of the first process that failed; 128 plus the number of the signal that killed it; 124 if it hung.
    With --json all output of the processes goes to stderr, and stdout gets one document: how each attempt ended.
    """
    from lepton_xla.errors import LaunchError
    from lepton_xla.launch.local import Options
    from lepton_xla.launch.supervisor import Supervisor
    from lepton_xla.launch.watchdog import Limits

    if step_s is None and (compile_s or evaluate_s):
        raise LaunchError("--watchdog-compile-s and --watchdog-evaluate-s need --watchdog-s")
    limits = None if step_s is None else Limits(step_s, compile_s or 0.0, evaluate_s or 0.0)
    supervisor = Supervisor(
        Options(command, limits=limits, **settings), os.environ, out=sys.stderr if as_json else None
    )
    code = supervisor.run()
    if as_json:
        attempts = [dataclasses.asdict(attempt) for attempt in supervisor.attempts]
        _common.print_json({"exit_code": code, "attempts": attempts})
    sys.exit(code)
