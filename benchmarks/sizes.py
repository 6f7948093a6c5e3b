"""What `lx.train.size` says beside what is: bytes sent beside the textbook's, and memory beside a process' own.

    python benchmarks/sizes.py [--only sent|memory] [--json FILE]

Bytes sent are those of `fit`'s step in the text that TPU's own compiler makes for a topology; that table takes the
package libtpu (`pip install 'jax[tpu]'`), but no TPU. The textbook: all-reduces send 2 (n - 1) / n of the array, all-
gathers and reduce-scatters (n - 1) / n. Tensor parallelism all-reduces the activations of each block forward, and
backward but for the first; data parallelism the gradients. FSDP gathers each weight once, since it stays for the
backward pass, and scatters its gradient. Memory is the largest resident memory of a process of its own that trains
for three steps on this machine's CPU; its growth from one batch to the next is compared with that of the size.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import lepton_xla as lx
from lepton_xla.sharding import Rules, topologies
from lepton_xla.sharding.collectives import sent_by_kind

WIDTH, HIDDEN, BLOCKS, ROWS = 1024, 4096, 2, 4096
FSDP = Rules(fallback="data", fallback_bytes=0)
TENSOR = Rules([(".*up", ("", "model")), (".*down", ("model",))])
BOTH = Rules([(".*up", ("data", "model")), (".*down", ("model", "data"))])
# Name, topology, mesh, rules, and whether the aim of 5 % is reached there.
CASES = [
    ("data parallel", "v5e:4x4", {"data": 16}, Rules(), True),
    ("tensor and data parallel", "v5e:4x4", {"data": 4, "model": 4}, TENSOR, True),
    ("FSDP over 4, tensor parallel", "v5e:4x4", {"data": 4, "model": 4}, BOTH, True),
    ("FSDP over 8", "v5e:2x4", {"data": 8}, FSDP, True),
    ("FSDP over 16", "v5e:4x4", {"data": 16}, FSDP, False),
]
MEMORY_ROWS = (8192, 16384, 24576)
console = Console(width=120, highlight=False)


def blocks(count: int, width: int, hidden: int) -> lx.Program:
    """Residual blocks of two products each."""

    def fn(weights: Any, x: jax.Array) -> jax.Array:
        for index in range(count):
            x = x + jnp.tanh(x @ weights[f"{index}up"]) @ weights[f"{index}down"]
        return x

    shapes = {"up": (width, hidden), "down": (hidden, width)}
    weights = {f"{index}{name}": jnp.ones(shapes[name]) * 0.01 for index in range(count) for name in shapes}
    return lx.trace(fn, weights, {"x": lx.TensorSpec(("batch", width), "float32")})


def squares(program: lx.Program) -> Any:
    """Mean squared error."""

    def loss(weights: Any, batch: Any, key: Any, state: Any) -> Any:
        error = program.fn(weights, batch["x"]) - batch["y"]
        return jnp.mean(jnp.square(error).astype(jnp.float32)), {}, state

    return loss


def textbook(mesh: dict[str, int]) -> float:
    """Bytes that each device sends in a step, in bfloat16."""
    data, model = mesh.get("data", 1), mesh.get("model", 1)
    weights = 2 * WIDTH * HIDDEN * BLOCKS * 2 / model
    activations = ROWS / data * WIDTH * 2 * (2 * BLOCKS - 1)
    gradients = 2 * weights * (data - 1) / data  # gathered and scattered, or all-reduced: the same bytes
    return gradients + activations * 2 * (model - 1) / model


def sent() -> list[dict[str, Any]]:
    """Compile each case for its topology, and count."""
    program = blocks(BLOCKS, WIDTH, HIDDEN)
    batch = {name: jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32) for name in ("x", "y")}
    found: list[dict[str, Any]] = []
    for name, topology, mesh, rules, aimed in CASES:
        size = lx.train.size(
            program, squares(program), optax.adam(1e-3), batch, topology=topology, rules=rules,
            mesh=",".join(f"{axis}={count}" for axis, count in mesh.items()), compute_dtype="bfloat16",
        )  # fmt: skip
        kinds = sent_by_kind(size.collectives)
        expected = textbook(mesh)
        found.append(
            {
                "case": name, "topology": topology, "mesh": mesh, "sent_bytes": kinds, "textbook_bytes": expected,
                "ratio": sum(kinds.values()) / expected, "aimed": aimed,
            }
        )  # fmt: skip
    return found


def memory() -> list[dict[str, Any]]:
    """Train in a process for each batch, and compare how its largest memory grows with the sizes."""
    found: list[dict[str, Any]] = []
    for rows in MEMORY_ROWS:
        done = subprocess.run(
            [sys.executable, __file__, "--trains", str(rows)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        found.append(json.loads(done.stdout))
    for before, after in itertools.pairwise(found):
        grown = {name: after[name] - before[name] for name in ("resident_bytes", "said_bytes")}
        after["growth_ratio"] = grown["said_bytes"] / grown["resident_bytes"]
    return found


def train(rows: int) -> dict[str, Any]:
    """Size three steps of this many rows, run them, and read the largest resident memory of this process."""
    program = blocks(1, 64, HIDDEN)
    batch = {name: np.zeros((rows, 64), np.float32) for name in ("x", "y")}
    size = lx.train.size(program, squares(program), optax.adam(1e-3), batch)
    lx.train.fit(program, squares(program), optax.adam(1e-3), [batch], steps=3)
    status = pathlib.Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return {"rows": rows, "said_bytes": size.total_bytes, "resident_bytes": peak * 1024}


def show(document: dict[str, Any]) -> None:
    """Print the tables."""
    if "sent" in document:
        table = Table("case", "topology", "mesh", "sent a step", "textbook", "ratio", title="bytes that a device sends")
        for row in document["sent"]:
            mesh = ",".join(f"{axis}={count}" for axis, count in row["mesh"].items())
            kinds = ", ".join(
                f"{kind} {count / 1e6:.2f} MB" for kind, count in row["sent_bytes"].items() if count > 999
            )
            cells = (row["case"], row["topology"], mesh, kinds, f"{row['textbook_bytes'] / 1e6:.2f} MB")
            table.add_row(*cells, f"{row['ratio']:.3f}")
        console.print(table)
    if "memory" in document:
        table = Table("rows", "said", "resident", "growth said / resident", title="memory of a process that trains")
        for row in document["memory"]:
            cells = (f"{row['rows']:,}", f"{row['said_bytes'] / 1e6:.0f} MB", f"{row['resident_bytes'] / 1e6:.0f} MB")
            table.add_row(*cells, f"{row['growth_ratio']:.3f}" if "growth_ratio" in row else "")
        console.print(table)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["sent", "memory"])
    parser.add_argument("--json", metavar="FILE", type=pathlib.Path)
    parser.add_argument("--trains", metavar="ROWS", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.trains is not None:
        print(json.dumps(train(given.trains)))
        return
    document: dict[str, Any] = {}
    if given.only != "memory":
        if topologies.has_compiler("v5e:4x4"):
            document["sent"] = sent()
        else:
            console.print("what is sent is not counted: TPU's compiler is not installed (pip install 'jax[tpu]')")
    if given.only != "sent":
        document["memory"] = memory()
    show(document)
    if given.json is not None:
        given.json.write_text(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
