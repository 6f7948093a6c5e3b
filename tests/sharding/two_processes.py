"""Run twice by test_processes: a placement over the devices of two processes."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(
    sys.argv[1], 2, int(sys.argv[2]), cluster_detection_method="deactivate", initialization_timeout=60
)

import lepton_xla as lx  # noqa: E402

mesh = lx.sharding.mesh("data=-1,model=2")
weights = {"up": np.arange(32, dtype=np.float32).reshape(8, 4), "whole": jnp.ones(3), "cut": np.arange(8.0)}
rules = lx.sharding.Rules([("up", (None, "model"))], fallback="data", fallback_bytes=20)
put = rules.resolve(weights, mesh).put(weights)
total = jax.jit(lambda weights: sum(leaf.astype(jnp.float32).sum() for leaf in weights.values()))(put)
program = lx.trace(lambda w, x: x @ w["up"], {"up": weights["up"]}, {"x": lx.TensorSpec(("batch", 8), "float32")})
try:
    lx.compile(program, {"batch": (2,)}, mesh=mesh)
except lx.ShardingError as error:
    refused = str(error)
shapes = {path: [list(part.data.shape) for part in leaf.addressable_shards] for path, leaf in put.items()}
sys.stdout.write(json.dumps({"total": float(total), "shapes": shapes, "refused": refused}) + "\n")
