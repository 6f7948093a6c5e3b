"""Which weights fit which compiled code, and what is checked of weights before they are used."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from lepton_xla.compiler.manifest import GenerationEntry, Manifest
from lepton_xla.compiler.portable import Portable
from lepton_xla.compiler.servable import Servable
from lepton_xla.dtypes import is_inexact
from lepton_xla.errors import ArtifactError
from lepton_xla.pieces import executor, rest

# Elements that are looked at together: they stay in a core's cache.
_BLOCK = 1 << 16
_MOST_THREADS = 8


def fit_digest(
    manifest: Manifest, programs: Sequence[Portable], expand: Portable | None, steps: Sequence[Portable] = ()
) -> str:
    """Digest of all that compiled code depends on but the values of the weights.

    That is the StableHLO (which holds the formats of quantized weights, and constants), the
    signature, the buckets, the mesh, and of each stored weight its path, shape, dtype and how it is cut.
    """
    document = [
        manifest.inputs,
        manifest.outputs,
        sorted(manifest.buckets.items()),
        manifest.mesh,
        manifest.unpacked,
        [(leaf.path, leaf.shape, leaf.dtype, leaf.spec) for leaf in manifest.weights],
        [(program.sizes, program.digest) for program in programs],
        expand.digest if expand is not None else None,
        # Only where there is one: models that generate nothing keep their digests.
        *((_described(manifest.generation), [program.digest for program in steps]) if manifest.generation else ()),
    ]
    return hashlib.sha256(msgspec.json.encode(document, order="sorted")).hexdigest()


def _described(generation: GenerationEntry) -> dict[str, Any]:
    """What code depends on; the programs say which axes are of slots, so artifacts that do not keep their digests."""
    return {name: value for name, value in msgspec.to_builtins(generation.bare()).items() if name != "axes"}


def check_fit(update: Manifest, base: Manifest, where: str) -> None:
    """Check that the weights of an artifact fit the compiled code of another.

    Raises:
        ArtifactError: naming the first difference: an input or output, a weight with its shape or dtype, or the
            program.
    """
    if update.fit and update.fit == base.fit:
        return
    said = f"{where}: its weights do not fit {base.name!r} version {base.version}"
    for what in ("inputs", "outputs"):
        mine, theirs = getattr(update, what), getattr(base, what)
        for one, two in zip(mine, theirs, strict=False):
            if one != two:
                raise ArtifactError(f"{said}: {what[:-1]} {_tensor(one)} is {_tensor(two)} there")
        if len(mine) != len(theirs):
            raise ArtifactError(f"{said}: it has {len(mine)} {what}, there are {len(theirs)}")
    leaves = {leaf.path: leaf for leaf in update.weights}
    others = {leaf.path: leaf for leaf in base.weights}
    for path in others:
        if path not in leaves:
            raise ArtifactError(f"{said}: it lacks weight {path!r}")
    for path, leaf in leaves.items():
        other = others.get(path)
        if other is None:
            raise ArtifactError(f"{said}: weight {path!r} is not there")
        if (leaf.shape, leaf.dtype) != (other.shape, other.dtype):
            raise ArtifactError(
                f"{said}: weight {path!r} is {leaf.dtype}{list(leaf.shape)}, there {other.dtype}{list(other.shape)}"
            )
    if update.buckets != base.buckets:
        raise ArtifactError(f"{said}: it was compiled for {update.buckets}, that one for {base.buckets}")
    if update.mesh != base.mesh or [leaf.spec for leaf in leaves.values()] != [leaf.spec for leaf in others.values()]:
        raise ArtifactError(f"{said}: they are cut otherwise over devices")
    raise ArtifactError(
        f"{said}: the programs differ, in their plan, in constants, or in the version of JAX that traced them"
    )


def check_weights(servable: Servable, base: Servable | None, where: str) -> None:
    """Check that the weights of a loaded model are numbers.

    Raises:
        ArtifactError: naming the first that holds NaN, or infinity where the base's does not.
    """
    paths = [leaf.path for leaf in servable.manifest.weights]
    weights, read = servable.runtime.weights, servable.runtime.devices.read
    others = base.runtime.weights if base is not None and base.manifest.fit == servable.manifest.fit else None
    names = paths if len(paths) == len(weights) else [f"unpacked, number {index}" for index in range(len(weights))]
    with executor(_MOST_THREADS, "lepton-check") as pool:
        finite = list(pool.map(lambda weight: _is_finite(read(weight)), weights))
    for index, is_finite in enumerate(finite):
        if is_finite:
            continue
        has_nan = bool(np.isnan(read(weights[index])).any())
        if has_nan or (others is not None and _is_finite(read(others[index]))):
            what = "NaN" if has_nan else "infinity, and the base's does not"
            raise ArtifactError(f"{where}: weight {names[index]!r} holds {what}")


def _is_finite(array: np.ndarray) -> bool:
    if not is_inexact(array.dtype):
        return True
    flat, wide = array.reshape(-1), array.dtype.name in ("float32", "float64")
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        # A sum is finite only if all are, and reads them once. Finite ones may overflow: then each is looked at.
        with np.errstate(over="ignore", invalid="ignore"):
            finite = wide and np.isfinite(np.add.reduce(block))
        if not finite and not np.isfinite(block).all():
            return False
        rest()
    return True


def _tensor(tensor: msgspec.Struct) -> str:
    """An input or output as text."""
    described = msgspec.structs.asdict(tensor)
    return f"{described['name']!r}: {described['dtype']}{list(described['shape'])}"
