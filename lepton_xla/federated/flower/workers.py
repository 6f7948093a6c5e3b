"""Run as a program: Flower's workers as forks of this process, which has imported everything.

Flower's SuperExec starts a command for each message and gives it 30 s to ask for its task. Python takes seconds of CPU
to import Flower and JAX, on a busy machine more than those 30 s, and a task that was not asked for in time is lost.
Here the command is a line of shell that writes its arguments into a pipe, and the process at the other end forks.
"""

from __future__ import annotations

import importlib
import os
import pathlib
import shlex
import signal
import sys
import traceback
import warnings

import numpy as np

from lepton_xla.federated.flower.messages import flower

# Where Flower has the function of each command.
_MODULES = {"flwr-clientapp": "supernode.cli", "flwr-serverapp": "superlink.cli"}
_PIPE, _MOST_BYTES = "calls", 1 << 16


def ready(folder: pathlib.Path) -> bool:
    """Whether the workers of this folder take calls."""
    return (folder / _PIPE).exists()


def write_command(folder: pathlib.Path, name: str) -> None:
    """Write the command `name`, which comes before Flower's own if `folder` comes first in PATH.

    >>> write_command(pathlib.Path("bin"), "flwr-clientapp")
    >>> os.access("bin/flwr-clientapp", os.X_OK), ready(pathlib.Path("bin"))
    (True, False)
    """
    folder.mkdir(parents=True, exist_ok=True)
    pipe = (folder / _PIPE).resolve()
    pipe.unlink(missing_ok=True)
    program = folder / name
    # Opened for reading too, so that nothing waits for the other end.
    program.write_text(f'#!/bin/sh\necho "$@" 1<>{shlex.quote(str(pipe))}\n', encoding="utf-8")
    program.chmod(0o755)


def main(folder: str, name: str) -> None:
    """Import what workers need, then fork for each call of the command, until the process is ended."""
    work = getattr(flower(_MODULES[name]), name.replace("-", "_"))
    importlib.import_module("lepton_xla.federated.flower.apps")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for workers
    made = pathlib.Path(folder) / f"{_PIPE}.new"
    made.unlink(missing_ok=True)
    os.mkfifo(made)
    pipe = os.open(made, os.O_RDWR)
    made.rename(made.with_name(_PIPE))
    # Threads of libraries for linear algebra, which know about forks; JAX has not started any.
    warnings.simplefilter("ignore", DeprecationWarning)
    while True:
        # A call is one write and far shorter than a pipe's atomic 4,096 bytes, so no line comes in parts.
        for call in os.read(pipe, _MOST_BYTES).decode().splitlines():
            if not os.fork():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.close(pipe)
                np.random.seed()  # Flower rounds by it, and every fork would do so alike
                sys.argv = [name, *call.split()]
                _work_and_end(work)


def _work_and_end(work: object) -> None:
    code = 1
    try:
        assert callable(work)
        work()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:  # nothing may return into the loop of the parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
