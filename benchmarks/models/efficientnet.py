"""EfficientNet-B0 (Tan and Le 2019, arXiv:1905.11946) in Flax Linen: depthwise windows of 3 and 5, squeeze-excite."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax

from models.base import BenchModel
from models.untrained import normed, untrained

# Expansion, window, output channels, blocks, stride of the first of them: table 1 of the paper.
STAGES = (
    (1, 3, 16, 1, 1), (6, 3, 24, 2, 2), (6, 5, 40, 2, 2), (6, 3, 80, 3, 2), (6, 5, 112, 3, 1), (6, 5, 192, 4, 2),
    (6, 3, 320, 1, 1),
)  # fmt: skip

_normed = functools.partial(normed, epsilon=1e-3)


class _SqueezeExcite(nn.Module):
    """Scales each channel by what the means of all channels say (Hu et al. 2017, arXiv:1709.01507)."""

    squeezed: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        means = x.mean((1, 2), keepdims=True)
        narrow = nn.silu(nn.Conv(self.squeezed, (1, 1))(means))
        return x * nn.sigmoid(nn.Conv(x.shape[-1], (1, 1))(narrow))


class _Block(nn.Module):
    """An inverted residual block with squeeze-excite."""

    expansion: int
    window: int
    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        width = x.shape[-1] * self.expansion
        y = nn.silu(_normed(width)(x, train)) if self.expansion > 1 else x
        y = nn.silu(_normed(width, self.window, self.stride, depthwise=True)(y, train))
        y = _SqueezeExcite(max(1, x.shape[-1] // 4))(y)
        y = _normed(self.features)(y, train)
        return x + y if self.stride == 1 and x.shape[-1] == self.features else y


class EfficientNetB0(nn.Module):
    """Float32 [batch, 224, 224, 3] to 1000 logits."""

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        x = nn.silu(_normed(32, 3, 2)(image, train))
        for expansion, window, features, blocks, stride in STAGES:
            for block in range(blocks):
                x = _Block(expansion, window, features, 1 if block else stride)(x, train)
        return nn.Dense(1000)(nn.silu(_normed(1280)(x, train)).mean((1, 2)))


def model(*, quick: bool = False) -> BenchModel:
    """The network with random weights."""
    return untrained("efficientnet-b0", EfficientNetB0(), quick=quick)
