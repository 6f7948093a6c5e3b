"""`leptonx launch`: starts the processes of a run here, or writes the files with which others start them."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import click

from lepton_xla.cli import _common
from lepton_xla.errors import LaunchError

_COMMAND = {"ignore_unknown_options": False, "allow_interspersed_args": False}
_command = click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
_seconds = click.FloatRange(0, min_open=True)


@click.group()
def launch() -> None:
    """Start a command in several processes that train together.

    \b
      leptonx launch local --processes 2 -- python train.py                        here, and watches them
      leptonx launch slurm --nodes 2 --gpus-per-node 8 -- python train.py          writes a script for sbatch
      leptonx launch jobset --image IMAGE --hosts 2 -- python train.py             writes a Kubernetes manifest
      leptonx launch tpu-vm --accelerator v5litepod-16 --zone Z -- python train.py writes a script of gcloud commands

    In the command, call lepton_xla.launch.initialize() first: it joins the process to the others.
    """


def _watchdog_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of the watchdog. The command gets the seconds that are given as `watch`, as `Limits` names them."""

    @functools.wraps(command)
    def watched(
        *args: Any, step_s: float | None, compile_s: float | None, evaluate_s: float | None, **rest: Any
    ) -> None:
        if step_s is None and (compile_s or evaluate_s):
            raise LaunchError("--watchdog-compile-s and --watchdog-evaluate-s need --watchdog-s")
        given = {"step_s": step_s, "compile_s": compile_s, "evaluate_s": evaluate_s}
        command(*args, watch={name: value for name, value in given.items() if value is not None}, **rest)

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
        watched = option(watched)
    return watched


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
    watch: dict[str, float],
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
    from lepton_xla.launch.local import Options
    from lepton_xla.launch.supervisor import Supervisor
    from lepton_xla.launch.watchdog import Limits

    limits = Limits(**watch) if watch else None
    supervisor = Supervisor(
        Options(command, limits=limits, **settings), os.environ, out=sys.stderr if as_json else None
    )
    code = supervisor.run()
    if as_json:
        attempts = [dataclasses.asdict(attempt) for attempt in supervisor.attempts]
        _common.print_json({"exit_code": code, "attempts": attempts})
    sys.exit(code)


def _file_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of the commands that write a file."""
    options = (
        _common.json_option,
        click.option("--output", metavar="FILE", help="Write the file there. By default it goes to stdout."),
        click.option("--name", help="Name of the run.", default="train", show_default=True),
    )
    for option in options:
        command = option(command)
    return _watchdog_options(command)


def _words(watch: Mapping[str, float]) -> tuple[str, ...]:
    """The watchdog's options, for the command line of another `leptonx launch local`."""
    names = {"step_s": "--watchdog-s", "compile_s": "--watchdog-compile-s", "evaluate_s": "--watchdog-evaluate-s"}
    return tuple(word for name, value in watch.items() for word in (names[name], f"{value:g}"))


def _deliver(text: str, output: str | None, as_json: bool) -> None:
    """Write or print a file."""
    from lepton_xla.launch.rendering import write

    if output is not None:
        _common.check_folder(output)
        write(text, output)
    if as_json:
        _common.print_json({"file": output, "text": text})
    elif output is None:
        click.echo(text, nl=False)


_setup_option = click.option(
    "--setup", multiple=True, metavar="LINE", help="A line of shell that runs first. Repeatable, in order."
)


@launch.command("slurm", context_settings=_COMMAND)
@click.option("--nodes", type=click.IntRange(1), required=True, help="Machines.")
@click.option("--gpus-per-node", type=click.IntRange(0), required=True, help="GPUs of each machine; 0 trains on CPUs.")
@click.option(
    "--tasks-per-node",
    type=click.IntRange(1),
    help="Processes on each machine, which share its GPUs. By default one for each GPU; without GPUs one.",
)
@click.option("--cpus-per-task", type=click.IntRange(1), help="CPUs of each process.")
@click.option("--time", default="", metavar="LIMIT", help="Time limit, such as 24:00:00.")
@click.option("--partition", default="", help="Partition to queue in.")
@click.option("--account", default="", help="Account to charge.")
@click.option("--sbatch", "more", multiple=True, metavar="OPTION", help="Another option, as --qos=high. Repeatable.")
@_setup_option
@click.option(
    "--max-restarts",
    type=click.IntRange(0),
    default=3,
    show_default=True,
    help="How often all processes are started again on the same machines after one has failed or hangs.",
)
@click.option(
    "--warn-s",
    type=click.IntRange(11),
    default=120,
    show_default=True,
    help="Seconds before the time limit at which training is told to save and end; the job is then queued again.",
)
@click.option("--submit", is_flag=True, help="Hand the script to sbatch, and print what it says.")
@_file_options
@_command
def slurm(
    command: tuple[str, ...],
    *,
    watch: dict[str, float],
    output: str | None,
    submit: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Write a script for sbatch that runs COMMAND on the machines of a SLURM cluster.

    \b
      leptonx launch slurm --nodes 2 --gpus-per-node 8 --time 24:00:00 --watchdog-s 600 -- python train.py > train.sh
      sbatch train.sh

    A failed or hanging task ends all, and all are started again on the same machines. Before the time limit and when
    SLURM preempts the job, training saves, ends with exit code 75, and is queued again.
    """
    from lepton_xla.launch.slurm import SlurmJob, send

    script = SlurmJob(command, watch=_words(watch), **settings).script()
    if not submit:
        _deliver(script, output, as_json)
        return
    if output is not None:
        _deliver(script, output, as_json=False)
    said = send(script)
    if as_json:
        _common.print_json({"file": output, "text": script, "sbatch": said})
    else:
        click.echo(said)


def _pairs(context: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise click.BadParameter(f"{text!r}: expected {option.make_metavar(context)}", context, option)
        found[name] = value
    return found


@launch.command("jobset", context_settings=_COMMAND)
@click.option("--image", required=True, help="Container image that holds the command and leptonx.")
@click.option("--hosts", type=click.IntRange(0), default=0, help="For GPUs: machines.")
@click.option("--gpus", type=click.IntRange(1), default=8, show_default=True, help="For GPUs: GPUs of each machine.")
@click.option("--topology", default="", help="For TPUs: chips of a slice, such as 4x4.")
@click.option("--chips", type=click.IntRange(1), default=4, show_default=True, help="For TPUs: chips of each machine.")
@click.option("--slices", type=click.IntRange(1), default=1, show_default=True, help="For TPUs: slices.")
@click.option(
    "--accelerator",
    default="",
    help="Kind of accelerator, as the nodes' label names it: tpu-v5-lite-podslice, nvidia-h100-80gb.",
)
@click.option("--namespace", default="", help="Kubernetes namespace.")
@click.option(
    "--node-selector", "selector", multiple=True, metavar="LABEL=VALUE", callback=_pairs,
    help="A label that nodes must have. Repeatable.",
)  # fmt: skip
@click.option(
    "--claim", "claims", multiple=True, metavar="PATH=CLAIM", callback=_pairs,
    help="Mount a persistent volume claim there, such as one for checkpoints. Repeatable.",
)  # fmt: skip
@click.option(
    "--max-restarts",
    type=click.IntRange(0),
    default=10,
    show_default=True,
    help="How often all pods are started again after one has failed or hangs. Preemptions do not count.",
)
@click.option(
    "--warn-s",
    type=click.IntRange(11),
    default=120,
    show_default=True,
    help="Seconds that a pod has to save after SIGTERM.",
)
@_file_options
@_command
def jobset(
    command: tuple[str, ...],
    *,
    watch: dict[str, float],
    output: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Write a JobSet manifest that runs COMMAND on GPUs or TPU slices of a Kubernetes cluster.

    \b
      leptonx launch jobset --image example/train:1 --hosts 2 --gpus 8 --watchdog-s 600 -- python train.py
      leptonx launch jobset --image example/train:1 --accelerator tpu-v5-lite-podslice --topology 4x4 -- python train.py
    """
    from lepton_xla.launch.jobset import JobSet

    manifest = JobSet(command, watch=_words(watch), **settings).manifest()
    _deliver(manifest, output, as_json)


@launch.command("tpu-vm", context_settings=_COMMAND)
@click.option("--accelerator", required=True, help="Type and size of the slice, such as v5litepod-16.")
@click.option("--version", required=True, help="Image of the machines, such as v2-alpha-tpuv5-lite.")
@click.option("--zone", required=True, help="Where the slice is, such as us-east5-a.")
@click.option("--project", default="", help="The project; by default gcloud's own setting.")
@click.option("--spot", is_flag=True, help="Cheaper machines, which may be taken away.")
@click.option(
    "--folder", default="train", show_default=True, help="Where the program is on the machines, from the home folder."
)
@_setup_option
@click.option(
    "--max-restarts",
    type=click.IntRange(0),
    default=3,
    show_default=True,
    help="How often all machines are started again after one has failed or hangs.",
)
@_file_options
@_command
def tpu_vm(
    command: tuple[str, ...],
    *,
    watch: dict[str, float],
    output: str | None,
    as_json: bool,
    setup: tuple[str, ...],
    **settings: Any,
) -> None:
    """Write a script of gcloud commands that creates a TPU slice and runs COMMAND on all its machines.

    \b
      leptonx launch tpu-vm --accelerator v5litepod-16 --version v2-alpha-tpuv5-lite --zone us-east5-a \\
          --watchdog-s 600 --output train.sh -- python train.py
      ./train.sh create && ./train.sh copy && ./train.sh run; ./train.sh delete
    """
    from lepton_xla.launch.tpu_vm import TpuVm

    if setup:
        settings["setup"] = setup
    script = TpuVm(command, watch=_words(watch), **settings).script()
    _deliver(script, output, as_json)
