"""Shrinking through operations that return values unchanged: results are right and every layer is reported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lepton_xla.passes import find_groups, shrink
from lepton_xla.program import TensorSpec, trace

same = jax.jit(lambda x: x)


@jax.custom_jvp
def own(x):
    return x


own.defjvp(lambda primals, tangents: (primals[0], tangents[0]))


@jax.custom_vjp
def pulled(x):
    return x


pulled.defvjp(lambda x: (x, None), lambda _, cotangent: (cotangent,))


def sharded(function):
    return jax.shard_map(function, mesh=jax.make_mesh((1,), ("x",)), in_specs=jax.P(), out_specs=jax.P())


SHRINKS = {
    "jit": same,
    "nested jit": jax.jit(lambda x: same(x)),
    "remat": jax.checkpoint(lambda x: x),
    "custom_jvp": own,
    "custom_vjp": pulled,
    "vmap of custom_jvp": jax.vmap(own),
    "one input twice": lambda x: sum(jax.jit(lambda y: (y, y))(x)),
    "an unused output": lambda x: jax.jit(lambda y: (y + 1, y))(x)[1],
    "a used and an identical output": lambda x: jnp.add(*jax.jit(lambda y: (jnp.tanh(y), y))(x)),
    "a literal output": lambda x: jnp.multiply(*jax.jit(lambda y: (y, 2.0))(x)),
    "constant outputs": lambda x: sum(jax.jit(lambda y: (y, jnp.zeros((1, 8)), np.ones((1, 8), "float32")))(x)),
    "hstack": lambda x: jnp.hstack([x[:, :4], x[:, 4:]]),
    "atleast_1d": jnp.atleast_1d,
    "clip without bounds": jnp.clip,
    "clip": lambda x: jnp.clip(x, 0, 6),
    "split": lambda x: jnp.concatenate(jnp.split(x, 2, -1), -1),
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 1)))[:, 1:-1],
    "where": lambda x: jnp.where(x > 0.1, x, 0.0),
    "roll": lambda x: jnp.roll(x, 3, -1),
    "half a turn": lambda x: x + jnp.roll(x, 4, -1),
    "cond": lambda x: jax.lax.cond(x.sum() > 0, lambda y: y, lambda y: y, x),
    "scan": lambda x: jax.lax.scan(lambda c, _: (c, None), x, None, length=3)[0],
    "scan over rows": lambda x: jax.lax.scan(lambda c, row: (c, row), 0.0, x)[1],
    "while": lambda x: jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1]), (0, x))[1],
}
KEPT = {
    "flip": (lambda x: jnp.flip(x, -1), "`rev` runs along it"),
    "custom_jvp in shard_map": (sharded(own), "`shard_map` depends on it"),
    "jit in shard_map": (sharded(lambda x: jax.nn.relu(same(x))), "`shard_map` depends on it"),
    "roll and add": (lambda x: x + jnp.roll(x, 3, -1), "its positions are tied to one another, so that none can go"),
    "roll by a value": (lambda x: jnp.roll(x, jnp.argmax(x[0]), -1), "`argmax` runs over it"),
    "sort": (lambda x: jnp.sort(x, -1), "`sort` runs along it"),
}


def program_of(passing):
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(shape, "float32") for name, shape in (("w1", (4, 8)), ("w2", (8, 8)))}

    def fn(w, x):
        return jax.nn.relu(passing(jax.nn.relu(x @ w["w1"])) @ w["w2"]) @ w["w3"]

    weights["w3"] = rng.standard_normal((8, 3), "float32")
    return trace(fn, weights, {"x": TensorSpec((2, 4), "float32")})


@pytest.mark.parametrize("name", [*SHRINKS, *KEPT])
def test_the_smaller_model_is_the_one_with_those_weights_zero(name):
    passing, reason = KEPT[name] if name in KEPT else (SHRINKS[name], "")
    program = program_of(passing)
    groups = find_groups(program)
    for path in program.weights:  # what each layer makes stands in the groups, removable or with a reason
        made = [group for group in groups if any(member.startswith(f"{path}[1") for member in group.members)]
        assert sum(group.units * group.inner for group in made) >= program.weights[path].shape[1] // 2
        if path == "w1":
            assert all(group.protected.startswith(reason) and bool(group.protected) == bool(reason) for group in made)
    small = shrink(program, sparsity=0.5)
    assert (small.weights["w1"].size < program.weights["w1"].size) == (not reason)
    assert small.weights["w2"].size < program.weights["w2"].size
    kept = {path: np.isin(weight, small.weights[path]) for path, weight in program.weights.items()}
    masked = {path: jnp.where(kept[path], weight, 0.0) for path, weight in program.weights.items()}
    x = np.random.default_rng(1).standard_normal((2, 4), "float32")
    np.testing.assert_allclose(small.fn(small.weights, x), program.fn(masked, x), rtol=1e-5, atol=1e-5)
    tangents = [
        jax.grad(lambda w, p=p: p.fn(w, x).sum())(w)["w3"] for p, w in ((small, small.weights), (program, masked))
    ]
    np.testing.assert_allclose(tangents[0], tangents[1][kept["w3"].all(1)], rtol=1e-5, atol=1e-5)
