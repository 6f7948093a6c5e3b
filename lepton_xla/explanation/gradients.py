"""Integrated gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.errors import ModelError
from lepton_xla.explanation.targets import check_explained, chosen_inputs, explaining, judged_output
from lepton_xla.program import Program


def integrated_gradients(
    program: Program,
    *,
    inputs: Sequence[str] | None = None,
    output: str | None = None,
    baseline: Mapping[str, float] | None = None,
    steps: int = 32,
) -> Program:
    """Make the program that attributes a class' score to the elements of float inputs.

    The gradients of the score are averaged on the way from a baseline to the input, and multiplied by the way. They add
    up to `score - baseline` (completeness), up to the error of the sum; where a program rounds activations its
    gradients are zero, which that shows. Source: Sundararajan et al., "Axiomatic Attribution for Deep Networks" (2017);
    the sum is Gauss-Legendre's.

    Args:
        program: the model; its rows are independent.
        inputs: names of the inputs that get attributions; by default all of floats. They go from the baseline together.
        output: the output that is explained; by default the first with classes.
        baseline: input -> the value that stands for nothing; 0 by default.
        steps: points of the sum; each costs a forward and a backward pass.

    Returns:
        A program with one more input, `target`, int32 `[batch]`: the class, or -1 for the most likely one. Its outputs
        are `target`, `score`, `baseline`, and `attribution/NAME` of the shape of each input.

    Raises:
        ModelError: if there is no such input or output, the baseline names one without attributions, or steps is less
            than 1.

    >>> program = lx.trace(lambda w, x: x @ w, jnp.eye(2), {"x": lx.TensorSpec(("batch", 2), "float32")})
    >>> explained = integrated_gradients(program)
    >>> found = explained(explained.weights, jnp.array([[3.0, 5.0]]), jnp.array([-1], jnp.int32))
    >>> found["target"].tolist(), found["attribution/x"].round(4).tolist()
    ([1], [[0.0, 5.0]])
    """
    if steps < 1:
        raise ModelError(f"steps is {steps}; at least 1 is needed")
    judged = judged_output(program, output)
    chosen = chosen_inputs(program, inputs, floats=True)
    check_explained("baseline", baseline, chosen)
    points, weights = np.polynomial.legendre.leggauss(steps)
    points, weights = ((points + 1) / 2).astype(np.float32), (weights / 2).astype(np.float32)
    values = {name: (baseline or {}).get(name, 0.0) for name in chosen}

    def real(array: jax.Array) -> jax.Array:
        return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(jnp.float32)

    def attribute(
        score: Callable[..., jax.Array], given: dict[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        ends = {name: real(given[name]) for name in chosen}
        given = given | ends
        starts = {name: jnp.full_like(given[name], values[name]) for name in chosen}
        gradient = jax.grad(lambda at: jnp.sum(score(**{**given, **at})))

        def step(total: dict[str, jax.Array], place: tuple[jax.Array, jax.Array]) -> tuple[dict[str, jax.Array], None]:
            point, weight = place
            at = {k: starts[k] + point.astype(end.dtype) * (end - starts[k]) for k, end in ends.items()}
            found = gradient(at)
            return {k: total[k] + weight * found[k].astype(jnp.float32) for k in ends}, None

        zeros = {name: jnp.zeros(end.shape, jnp.float32) for name, end in ends.items()}
        total, _ = jax.lax.scan(step, zeros, (jnp.asarray(points), jnp.asarray(weights)))
        made = {name: total[name] * (ends[name] - starts[name]).astype(jnp.float32) for name in ends}
        return made, score(**{**given, **starts})

    return explaining(program, judged, chosen, attribute)
