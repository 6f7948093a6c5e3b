"""Number formats that weights and activations can be stored in."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp

type Kind = Literal["int", "affine", "float", "codebook"]

# The 16 levels of NF4: quantiles of a normal distribution, including zero and both ends. Dettmers et al. 2023, QLoRA,
# arXiv:2305.14314, appendix E.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Format:
    """A number format.

    Attributes:
        name: the name in recipes.
        kind: the value of a code. `int`: code * scale; `affine`: (code - zero_point) * scale; `float`: small_float *
            scale; `codebook`: level[code] * scale.
        bits: bits per code.
        lowest: the smallest code, or its value at scale 1.
        largest: the largest code, or its value at scale 1; an absmax scale maps the largest magnitude to it.
        dtype: dtype of a code. Codes of fewer than eight bits are packed into `uint8` for storage.
        levels: levels of a codebook that all weights share; empty for a learned one.

    >>> int4 = FORMATS["int4"]
    >>> int4.per_byte, int4.learned, int4.symmetric, int4.integer, FORMATS["nf4"].integer
    (2, False, False, True, False)
    """

    name: str
    kind: Kind
    bits: int
    lowest: float
    largest: float
    dtype: jnp.dtype
    levels: tuple[float, ...] = ()

    @property
    def per_byte(self) -> int:
        """Number of codes per byte: 1, 2, 4 or 8."""
        return max(count for count in (1, 2, 4, 8) if count * self.bits <= 8)

    @property
    def learned(self) -> bool:
        """Whether the levels are learned from each weight."""
        return self.kind == "codebook" and not self.levels

    @property
    def symmetric(self) -> bool:
        """Whether the negative of every value is a value too."""
        if self.levels:
            return self.levels == tuple(-level for level in reversed(self.levels))
        return self.lowest == -self.largest

    @property
    def integer(self) -> bool:
        """Whether values are proportional to integer codes, as integer products require."""
        return self.kind == "int"


def _formats() -> dict[str, Format]:
    int8, uint8 = jnp.dtype("int8"), jnp.dtype("uint8")
    made = [
        Format("int8", "int", 8, -127, 127, int8),
        # An absmax scale leaves -8 unused, but a searched scale profits from the sixteenth code.
        Format("int4", "int", 4, -8, 7, int8),
        Format("uint8", "affine", 8, 0, 255, uint8),
        Format("uint4", "affine", 4, 0, 15, uint8),
        Format("fp8_e4m3", "float", 8, -448, 448, jnp.dtype("float8_e4m3fn")),
        Format("fp8_e5m2", "float", 8, -57344, 57344, jnp.dtype("float8_e5m2")),
        Format("nf4", "codebook", 4, -1, 1, uint8, NF4_LEVELS),
        *(Format(f"codebook{2**bits}", "codebook", bits, -1, 1, uint8) for bits in range(1, 9)),
    ]
    return {target.name: target for target in made}


FORMATS = _formats()
"""Formats by name. `codebookN` has N learned levels (Han et al. 2016, Deep Compression, arXiv:1510.00149)."""
