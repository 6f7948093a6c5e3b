"""What a kernel computes after a product, while the result is in the cache: bias, activation, sum with a matrix."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

# In the order of `Activation` in kernels/src/epilogue.h.
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "": lambda x: x,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """`activation(product + bias) + residual`.

    Attributes:
        bias: float32 [N]; None: none.
        activation: a key of `ACTIVATIONS`.
        residual: float32 [M, N]; None: none.

    >>> Epilogue(bias=jnp.array([1.0, -3.0]), activation="relu").apply(jnp.ones((1, 2))).tolist()
    [[2.0, 0.0]]
    """

    bias: jax.Array | None = None
    activation: str = ""
    residual: jax.Array | None = None

    def operands(self) -> tuple[jax.Array, jax.Array, int]:
        """Bias, residual and number of the activation, as kernels take them: what is missing has no elements."""
        bias = jnp.zeros(0, jnp.float32) if self.bias is None else self.bias
        residual = jnp.zeros((0, 0), jnp.float32) if self.residual is None else self.residual
        return bias, residual, list(ACTIVATIONS).index(self.activation)

    @classmethod
    def of_operands(cls, bias: jax.Array, residual: jax.Array, activation: int) -> Epilogue:
        """The epilogue of `operands`."""
        return cls(
            None if bias.shape[0] == 0 else bias,
            list(ACTIVATIONS)[activation],
            None if residual.shape[0] == 0 else residual,
        )

    def apply(self, product: jax.Array) -> jax.Array:
        """Compute it in XLA's own operations, for a product [M, N]."""
        biased = product if self.bias is None else product + self.bias[None]
        activated = ACTIVATIONS[self.activation](biased)
        return activated if self.residual is None else activated + self.residual
