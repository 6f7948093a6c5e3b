"""Runs `killable.py`, alone or in several processes by `leptonx launch local`."""

import dataclasses
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Ran:
    """How a run ended.

    Attributes:
        code: its exit code.
        steps: the steps whose data the first process asked for.
        samples: the samples of each batch, with `GRAIN`.
        digest: that of state and evaluations; None if the run did not get to its end.
        said: all it wrote.
    """

    code: int
    steps: list[int]
    samples: list[list[int]]
    digest: str | None
    said: str


def ran(folder, processes=1, launch=(), **environ):
    environment = {name: value for name, value in os.environ.items() if name not in ("STRIKE", "STEPS", "GRAIN")}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "LEPTON_CACHE": "off", **environ}
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / "build" / "test-cache"))
    command = [sys.executable, ROOT / "tests" / "train" / "killable.py", folder]
    if processes > 1:
        launcher = [sys.executable, "-m", "lepton_xla", "launch", "local", "--processes", processes, "--devices", 1]
        command = [*launcher, *launch, "--", *command]
    done = subprocess.run(
        [str(word) for word in command], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    lines = [line.removeprefix("[0] ").split() for line in done.stdout.splitlines() if not line.startswith("[1] ")]
    told = {kind: [line[1:] for line in lines if line and line[0] == kind] for kind in ("data", "samples", "digest")}
    return Ran(
        done.returncode,
        [int(words[-1]) for words in told["data"]],
        [[int(word) for word in words] for words in told["samples"]],
        told["digest"][0][0] if told["digest"] else None,
        done.stdout + done.stderr,
    )


def complete(folder):
    """Steps of the complete checkpoints."""
    return sorted(int(each.name) for each in folder.iterdir() if each.name.isdigit())
