"""What a TPU's compiler predicts of the calls of a model, as `leptonx tune --slo` has it: no TPU is needed.

    python benchmarks/predicting.py [--targets v5e:1x1,v5e:2x2] [--rows 8,1024] [--json FILE]

Needs the package `libtpu` (Linux on x86-64, 137 MB). Writes to docs/benchmarks/tuning.md. The model is an MLP of
784-512-10 in float32.
"""

from __future__ import annotations

import argparse
import os
import pathlib

import harness
import jax.numpy as jnp
from tuning_page import page

import lepton_xla as lx
from lepton_xla.tuning.deployments import predicted_us


def main() -> int:
    """Predicts, prints, writes; exit code 1 where the compiler is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--targets", default="v5e:1x1,v5e:2x2", help="topologies; default: v5e:1x1,v5e:2x2")
    parser.add_argument("--rows", type=harness.numbers(int), default=(8, 1024), help="of a call; default: 8,1024")
    harness.add_pages(parser)
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    options = parser.parse_args()
    weights = {"in": jnp.ones((784, 512)), "out": jnp.ones((512, 10))}
    image = lx.TensorSpec(("batch", 784), "float32")
    program = lx.trace(lambda w, x: jnp.maximum(x @ w["in"], 0) @ w["out"], weights, {"x": image})
    rows: list[list[str]] = []
    try:
        for target in options.targets.split(","):
            for count in options.rows:
                rows.append([target, f"{count:,}", f"{predicted_us(program, {'batch': count}, target):.2f}"])
                print(rows[-1], flush=True)
    except lx.LeptonError as error:
        print(error)
        return 1
    run = harness.machine(["libtpu"]) | {"command": harness.command(), "load": f"{os.getloadavg()[0]:.1f}"}
    if options.pages:
        harness.publish("tuning", {"predicted": {"rows": rows, "run": run}}, page)
    harness.write_json(options.json, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
