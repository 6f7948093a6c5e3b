"""MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) in Flax Linen: depthwise convolutions between narrow layers."""

from __future__ import annotations

import flax.linen as nn
import jax

from models.base import BenchModel
from models.untrained import normed, untrained

# Expansion, output channels, blocks, stride of the first of them: table 2 of the paper.
STAGES = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip


class _Block(nn.Module):
    """An inverted residual block: wider, depthwise, narrower."""

    expansion: int
    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        width = x.shape[-1] * self.expansion
        y = nn.relu6(normed(width)(x, train)) if self.expansion > 1 else x
        y = nn.relu6(normed(width, 3, self.stride, depthwise=True)(y, train))
        y = normed(self.features)(y, train)
        return x + y if self.stride == 1 and x.shape[-1] == self.features else y


class MobileNetV2(nn.Module):
    """Float32 [batch, 224, 224, 3] to 1000 logits."""

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu6(normed(32, 3, 2)(image, train))
        for expansion, features, blocks, stride in STAGES:
            for block in range(blocks):
                x = _Block(expansion, features, 1 if block else stride)(x, train)
        return nn.Dense(1000)(nn.relu6(normed(1280)(x, train)).mean((1, 2)))


def model(*, quick: bool = False) -> BenchModel:
    """The network with random weights."""
    return untrained("mobilenetv2", MobileNetV2(), quick=quick)
