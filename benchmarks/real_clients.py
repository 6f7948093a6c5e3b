"""Clients in processes of their own, over Flower with TLS on this machine: sections of `federated.py`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import harness
import numpy as np

import lepton_xla as lx

FOLDER = harness.ROOT / "build" / "federated"

ABOUT = """## Real clients

Three clients and a server, each in processes of its own, over Flower with TLS on this machine
(`examples/federated.py`): 64-64-10 units on scikit-learn's digits, float32 updates, rounds of ten epochs. `simulated`:
the same rounds in one process. `central`: all rows in one place, as many passes. `by label` has a concentration of 0.5
here."""

ABOUT_SECURE = """## Secure sums

With secure aggregation (SecAgg+) the server gets a sum of masked updates, rounded to steps. The same round
of three real clients, with it and without: the largest difference between the weights after the round."""


def run(*arguments: str) -> dict[str, Any]:
    """A run of the example; its figures, and the weights that came out."""
    subprocess.run(
        [sys.executable, harness.ROOT / "examples" / "federated.py", "--updates", "float32", *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    servable = lx.load(FOLDER / "digits.lepton")
    weights = np.concatenate([np.asarray(leaf).ravel() for leaf in servable.runtime.weights])
    return json.loads((FOLDER / "summary.json").read_text()) | {"weights": weights}


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Training evenly and by label beside the simulation."""
    rounds = "1" if options.quick else "3"
    found: dict[str, Any] = {"rounds": int(rounds), "rows": []}
    for split in ((), ("--alike",)):
        done = run("--rounds", rounds, *split)
        found["rows"].append(
            {
                "by_label": not split, "accuracy": done["accuracy"], "bytes": done["rounds"][-1]["bytes_up"],
                "simulated": done["simulated"]["accuracy"], "central": done["central"]["accuracy"],
                "loss": abs(done["loss"] - done["simulated"]["loss"]),
            }
        )  # fmt: skip
        yield found


def measure_secure(_: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A secure sum beside the plain one."""
    plain, secure = (run("--rounds", "1", "--alike", *more) for more in ((), ("--secure",)))
    yield {
        "difference": float(np.abs(plain["weights"] - secure["weights"]).max()),
        "step": secure["step"],
        "largest": float(np.abs(plain["weights"]).max()),
        "bytes": [each["rounds"][0]["bytes_up"] for each in (plain, secure)],
    }


def tables(found: Mapping[str, Any]) -> list[str]:
    """The trainings."""
    rows = [
        (
            f"3, {'by label' if row['by_label'] else 'alike'}", str(found["rounds"]),
            *(harness.percent(row[name]) for name in ("accuracy", "simulated", "central")),
            f"{row['loss']:.1e}", f"{row['bytes']:,}",
        )
        for row in found["rows"]
    ]  # fmt: skip
    header = ("clients", "rounds", "accuracy", "simulated", "central", "loss, off the simulation's", "bytes a round")
    return [harness.markdown(header, rows)]


def tables_secure(found: Mapping[str, Any]) -> list[str]:
    """The two sums."""
    plain_bytes, secure_bytes = (f"{size:,}" for size in found["bytes"])
    row = (f"{found['difference']:.1e}", f"{found['step']:.1e}", f"{found['largest']:.2f}", secure_bytes, plain_bytes)
    return [
        harness.markdown(
            ("largest difference", "one step of the mean", "largest weight", "bytes of the round", "without"), [row]
        )
    ]
