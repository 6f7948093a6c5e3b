"""MiniLM in a fifth of its bytes by one `leptonx train` command; `leptonx eval` and `leptonx bench` judge it."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import harness

from students import base, sentences

TARGET = "benchmarks/small_minilm.py"


def commands(folder: pathlib.Path) -> dict[str, list[str]]:
    """The commands whose output is on the page."""
    path = str(folder / "small.lepton")
    kept = ["--checkpoint", str(folder / "checkpoint"), "--every", "50"]
    return {
        "train": ["train", f"{TARGET}:small", "--recipe", "int8", *kept, "-o", path, "--overwrite"],
        "eval": ["eval", f"{TARGET}:whole", path],
        "bench": ["bench", path, "--target", f"{TARGET}:whole"],
    }


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What the three commands say. The artifact is that of the last `train`."""
    task = sentences.load(quick=True)  # raises if the model or the questions are not here
    folder = pathlib.Path(tempfile.mkdtemp()) if options.quick else base.FOLDER / "smaller"
    found: dict[str, Any] = {"tested": task.tested if options.quick else 3080}
    for name, arguments in commands(folder).items():
        more = {"train": ["--steps", "4"], "bench": ["--rounds", "5"]}.get(name, []) if options.quick else []
        found[name] = options.rows.row(f"smaller: {name}", lambda given=[*arguments, *more]: _run(given, options.quick))
    yield found


def _run(arguments: list[str], quick: bool) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "lepton_xla", *arguments, "--json"],
        cwd=harness.ROOT,
        env={**os.environ, "PYTHONPATH": str(harness.ROOT)} | ({"LEPTON_QUICK": "1"} if quick else {}),
        stdout=subprocess.PIPE,
        check=True,
    )
    found = json.loads(done.stdout)
    return found | {"path": pathlib.Path(found["path"]).name}  # where it was is of no interest
