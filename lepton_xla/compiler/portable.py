"""The portable program: StableHLO with symbolic dimensions, which any machine can compile."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lepton_xla.compiler import _xla
from lepton_xla.compiler.buckets import BucketSizes, bucket_name, combinations
from lepton_xla.compiler.code import Code
from lepton_xla.deferred import jax, jnp
from lepton_xla.errors import ArtifactError, CompileError
from lepton_xla.kernels.installation import without_kernels
from lepton_xla.program import TensorSpec

# Platforms of servers; "cuda" is JAX's name for NVIDIA GPUs in lowering.
_PLATFORMS = ("cpu", "cuda", "tpu")


@dataclasses.dataclass(frozen=True)
class Portable:
    """One serialized program.

    Attributes:
        name: name of its file.
        blob: the bytes of `jax.export.Exported.serialize`, a flatbuffer.
        sizes: its bucket; None if its dimensions are symbolic.
        platforms: platforms that it can be compiled for.
        digest: SHA-256 of what it computes: of its text, without the lines of Python that it came from.
    """

    name: str
    blob: bytes
    sizes: dict[str, int] | None
    platforms: tuple[str, ...]
    digest: str = ""


def export_programs(
    fn: Callable[..., Any],
    weights: Sequence[jax.ShapeDtypeStruct],
    inputs: Mapping[str, TensorSpec],
    bucket_sizes: BucketSizes,
) -> tuple[list[Portable], str]:
    """Export a function of flat weights and inputs.

    Returns:
        The programs, and why they are not a single symbolic program for all platforms (empty if they are).

    Raises:
        CompileError: if not even a program with fixed sizes for this platform can be exported.
    """
    notes: list[str] = []
    here = _lowering_platform()
    for platforms in (_PLATFORMS if here in _PLATFORMS else (*_PLATFORMS, here), (here,)):
        try:
            shapes = _symbolic_inputs(inputs, bucket_sizes)
            return [_export("symbolic" if bucket_sizes else "fixed", fn, weights, shapes, None, platforms)], "; ".join(
                notes
            )
        except Exception as error:  # record the reason and try the next option
            notes.append(f"no symbolic program for {', '.join(platforms)}: {_xla.reason(error)}")
    try:
        programs = [
            _export(bucket_name(sizes), fn, weights, [spec.at(sizes) for spec in inputs.values()], sizes, (here,))
            for sizes in combinations(bucket_sizes)
        ]
    except Exception as error:
        raise CompileError(f"the model cannot be exported as StableHLO: {_xla.reason(error)}") from error
    return programs, "; ".join(notes)


def compile_portable(
    blob: bytes,
    name: str,
    weights: Sequence[jax.ShapeDtypeStruct | None],
    inputs: Sequence[jax.ShapeDtypeStruct],
    shardings: Mapping[str, Any] | None = None,
) -> Code:
    """Compile a serialized program for one bucket on this machine.

    Args:
        blob: the program.
        name: its file, for messages.
        weights, inputs: the shapes of its arguments; None: as the program has that of a weight.
        shardings: `in_shardings` and `out_shardings` of `jax.jit`, for several devices.

    Raises:
        ArtifactError: if it is not such a program or does not fit this machine; names the file.
    """
    try:
        from jax import export

        exported = export.deserialize(bytearray(blob))
        known = [
            jax.ShapeDtypeStruct(own.shape, own.dtype) if leaf is None else leaf
            for leaf, own in zip(weights, exported.in_avals, strict=False)
        ]
        return Code.made(jax.jit(exported.call, keep_unused=True, **(shardings or {})).lower(*known, *inputs))
    except Exception as error:  # version, platform, custom call, or XLA itself
        raise ArtifactError(f"{name} cannot be compiled here: {_xla.reason(error)}") from error


def _export(
    name: str,
    fn: Callable[..., Any],
    weights: Sequence[jax.ShapeDtypeStruct],
    inputs: Sequence[jax.ShapeDtypeStruct],
    sizes: dict[str, int] | None,
    platforms: tuple[str, ...],
) -> Portable:
    from jax import export

    # A function of its own, because JAX may have lowered `fn` with kernels, which other machines lack.
    plain = jax.jit(lambda *args: fn(*args), keep_unused=True)
    with without_kernels():
        exported = export.export(plain, platforms=platforms)(*weights, *inputs)
    digest = hashlib.sha256(_xla.program_text(exported).encode()).hexdigest()
    return Portable(name, bytes(exported.serialize()), sizes, platforms, digest)


def _symbolic_inputs(inputs: Mapping[str, TensorSpec], bucket_sizes: BucketSizes) -> list[jax.ShapeDtypeStruct]:
    from jax import export

    # Bound each dimension by its largest bucket: a table of position embeddings, for example, is only that long.
    constraints = [f"{name} <= {compiled_sizes[-1]}" for name, compiled_sizes in bucket_sizes.items()]
    symbols = list(bucket_sizes)
    dims = export.symbolic_shape(", ".join(symbols), constraints=constraints) if symbols else ()
    named = dict(zip(symbols, dims, strict=True))
    return [
        jax.ShapeDtypeStruct(
            tuple(named[dim] if isinstance(dim, str) else dim for dim in spec.shape), jnp.dtype(spec.dtype)
        )
        for spec in inputs.values()
    ]


def _lowering_platform() -> str:
    platform = jax.default_backend()
    return "cuda" if platform == "gpu" else platform
