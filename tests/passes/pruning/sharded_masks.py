"""Run by test_masks with eight devices: masks on meshes of 1, 2 and 8 devices are equal, and no weight is gathered."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

from lepton_xla.passes.planning import resolve  # noqa: E402
from lepton_xla.passes.pruning.masks import Regrowth, find_masks  # noqa: E402
from lepton_xla.passes.pruning.ranking import keep_largest, keep_largest_on_host  # noqa: E402
from lepton_xla.passes.pruning.scores import element_scores  # noqa: E402
from lepton_xla.passes.pruning.shares import rule_shares  # noqa: E402
from lepton_xla.passes.pruning.targets import Target, plan_targets  # noqa: E402
from lepton_xla.program import TensorSpec, trace  # noqa: E402
from lepton_xla.recipe import Recipe  # noqa: E402
from lepton_xla.recipe.rules import sparsity_of  # noqa: E402

# A stacked weight for each, and one more for some.
RULES = {
    "uniform": "sparsity = 0.5",
    "global": 'sparsity = 0.7\ndistribution = "global"',
    "groups": 'pattern = "2:4"',
    "blocks": 'sparsity = 0.5\npattern = "block:4x2"',
    "channels": 'sparsity = 0.5\npattern = "channel"',
    "deviation": 'method = "deviation:1"',
    "random": 'method = "random"\nsparsity = 0.3',
}
HEADS = ("uniform", "global", "channels")
ROWS, COLUMNS = (jax.P(None, "d", None), jax.P("d", None)), (jax.P(None, None, "d"), jax.P(None, "d"))
AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit


def network(w, x):
    outs = []
    for name in RULES:
        y, _ = jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, w[f"{name}/stack"])
        outs.append(y @ w[f"{name}/head"] if name in HEADS else y[:, :16])
    return jnp.stack(outs)


random = np.random.default_rng(0)
weights = {}
for name in RULES:  # the stacks are rounded, so that thresholds fall among equal ones
    weights[f"{name}/stack"] = jnp.asarray(np.round(random.standard_normal((2, 32, 32)) * 8) / 8, jnp.float32)
    if name in HEADS:
        weights[f"{name}/head"] = jnp.asarray(random.standard_normal((32, 16)), jnp.float32)
weights["global/stack"] = weights["global/stack"].at[0].mul(1e-3)  # all of this layer would go, but for one element
promise = {path: jnp.asarray(random.random(leaf.shape), jnp.float32) for path, leaf in weights.items()}
program = trace(network, weights, {"x": TensorSpec(("b", 32), "float32")})
blocks = "".join(f'\n[[prune]]\nsites = "{name}/.*"\n{rule}' for name, rule in RULES.items())
targets = plan_targets(resolve(Recipe.parse(blocks, name="test"), program), weights)


def share(rule):
    return jnp.float32(sparsity_of(rule) or 0)


def find(weights, promise, rank=keep_largest):
    def scores(of: list[Target]):
        return {target.path: element_scores(target, weights[target.path], key=jax.random.key(0)) for target in of}

    shares = rule_shares(targets, share)
    growing = [target for target in targets if target.path.startswith("uniform")]
    regrowth = Regrowth({path: leaf > 0 for path, leaf in weights.items()}, promise, 0.3)
    grown = find_masks(growing, scores(growing), shares, regrowth=regrowth, rank=rank)
    return find_masks(targets, scores(targets), shares, rank=rank), grown


def masks_on(count, cut, kind):
    mesh = jax.make_mesh((count,), ("d",), axis_types=(kind,), devices=jax.devices()[:count])
    place = {path: jax.NamedSharding(mesh, cut[path.endswith("head")]) for path in weights}
    with jax.set_mesh(mesh):
        given = jax.device_put(weights, place), jax.device_put(promise, place)
        compiled = jax.jit(find).lower(*given).compile()
        found = jax.tree.map(np.asarray, compiled(*given))
    moved = re.findall(r"= \S+ (all-gather|all-to-all|collective-permute)\(", compiled.as_text())
    assert not moved, f"on {count} devices, {kind}, cut {cut}: {moved}"
    assert " all-reduce(" in compiled.as_text()
    return found


# On one device, by NumPy: an independent way to the same thresholds.
alone = find(weights, promise, keep_largest_on_host)
assert alone[0]["global/stack"].sum((1, 2)).tolist()[0] == 1
for case in ((2, ROWS, EXPLICIT), (8, COLUMNS, AUTO)):
    for masks, others in zip(alone, masks_on(*case), strict=True):
        for path, mask in masks.items():
            np.testing.assert_array_equal(mask, others[path], err_msg=f"{case} {path}")
sys.stdout.write("all alike")
