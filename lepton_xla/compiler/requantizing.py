"""New float weights for an artifact that keeps its float master: made small by the same steps, without compiling."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Mapping
from typing import Any

import jax
import msgspec
import numpy as np

from lepton_xla.arguments import takes
from lepton_xla.compiler import _xla
from lepton_xla.compiler.artifact import Artifact
from lepton_xla.compiler.build import made_by
from lepton_xla.compiler.fingerprint import Fingerprint
from lepton_xla.compiler.golden import Golden
from lepton_xla.compiler.manifest import Manifest
from lepton_xla.compiler.masters import Master
from lepton_xla.compiler.names import check_name
from lepton_xla.compiler.opening import open_files, read_manifest
from lepton_xla.compiler.storage import Store, consistently
from lepton_xla.errors import ArtifactError


@takes(location=(str, os.PathLike), weights=Mapping)
def requantize(
    location: str | os.PathLike[str],
    weights: Mapping[str, Any],
    *,
    name: str | None = None,
    version: str = "1",
    nearest: bool = False,
    decrypt_key: str | os.PathLike[str] | None = None,
) -> Artifact:
    """Make an artifact of weights alone from new float weights, by the steps that made an artifact's own.

    Nothing is traced, and nothing is compiled where the artifact has code for this machine. Masks, factors and ranges
    that were found on calibration data or on the old weights stay as they are. The same weights give the same bytes on
    the machine that made the artifact.

    Args:
        location: an artifact that was compiled with `keep_master=True`, whole or of weights alone.
        weights: path -> array, with the paths, shapes and dtypes of `master_weights`.
        name: the model's name, by default the artifact's.
        version: the model's version.
        nearest: whether codes may be rounded to nearest where the artifact's were chosen for calibration data (GPTQ,
            SparseGPT); without it, such an artifact is refused.
        decrypt_key: file of the private key, if the artifact is encrypted.

    Returns:
        The artifact, with the new weights as its float master, to be saved. It carries no golden answers, which are
        those of other weights, but golden rows with labels.

    Raises:
        ArtifactError: if there is no float master, a step cannot be taken again, or the weights have other paths,
            shapes or dtypes, or are not finite; names the first.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> small = lx.optimize(program, lx.Recipe.load("int8-weight-only"), keep_master=True)
    >>> manifest = lx.compile(small, {"batch": (1,)}, name="net", keep_master=True).save("net.lepton")
    >>> from lepton_xla.compiler import requantize
    >>> manifest = requantize("net.lepton", {"w": 3 * np.eye(4, dtype=np.float32)}).save("net-2.lepton")
    >>> lx.load("net-2.lepton", base=lx.load("net.lepton"))(x=[[1.0, 0.0, 2.0, 0.0]])["output"].round(4).tolist()
    [[3.0, 0.0, 6.0, 0.0]]
    """
    if name is not None:
        check_name(name)

    kept = read_kept(location, decrypt_key=decrypt_key)
    return with_weights(kept, weights, name=name, version=version, nearest=nearest)


@dataclasses.dataclass(frozen=True)
class Kept:
    """What an artifact keeps to be made anew: its manifest, its float master, and its golden rows, if there are any."""

    manifest: Manifest
    master: Master
    golden: Golden | None


def read_kept(location: str | os.PathLike[str], *, decrypt_key: str | os.PathLike[str] | None = None) -> Kept:
    """Read what an artifact keeps.

    Raises:
        ArtifactError: if there is no float master, or a file is damaged.
    """

    def read(store: Store) -> Kept:
        manifest = read_manifest(store)
        files = open_files(store, manifest, decrypt_key)
        entry = manifest.golden
        golden = None if entry is None else Golden.read(entry, files.read(entry.file))
        return Kept(manifest, Master.read(manifest, files, store.location), golden)

    return consistently(location, read)


def with_weights(
    kept: Kept,
    weights: Mapping[str, Any],
    *,
    name: str | None = None,
    version: str = "1",
    nearest: bool = False,
) -> Artifact:
    """As `requantize`, of what was read."""
    manifest, master, golden = kept.manifest, kept.master, kept.golden
    if not manifest.fit:
        raise ArtifactError(f"{manifest.name!r} was compiled without a digest of its program: compile it again")
    master.check(nearest=nearest)
    checked = master.checked(weights, "the new weights")
    arrays = master.lowered(checked, nearest=nearest)
    for leaf, array in zip(manifest.weights, arrays, strict=True):
        if (leaf.shape, leaf.dtype) != (array.shape, array.dtype.name):
            raise ArtifactError(f"weight {leaf.path!r} would be {array.dtype}{list(array.shape)}, and does not fit")
    made = msgspec.structs.replace(
        manifest,
        name=name or manifest.name,
        version=version,
        programs=(),
        expand=None,
        executables={},
        compile_s={},
        programs_note="",
        metrics={},
        certificate=None,  # it was measured of other weights
        golden=None,
        generation=manifest.generation and manifest.generation.bare(),
        files={},
        encryption=None,
        made_by=made_by(Fingerprint.of(_xla.first_device(), 1)),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    after = dataclasses.replace(master, weights=checked)
    rows = None if golden is None or golden.label is None else dataclasses.replace(golden, outputs={})
    return Artifact(made, tuple(map(jax.device_put, arrays)), {}, (), golden=rows, master=after)


def master_weights(
    location: str | os.PathLike[str], *, decrypt_key: str | os.PathLike[str] | None = None
) -> dict[str, np.ndarray]:
    """Read the float weights that an artifact keeps, to train them on, say.

    Args:
        location: an artifact that was compiled with `keep_master=True`.
        decrypt_key: file of the private key, if the artifact is encrypted.

    Returns:
        Path -> array, as the model had them before it was optimized; without weights that nothing reads.

    Raises:
        ArtifactError: if there is no float master, or a file is damaged.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> small = lx.optimize(program, lx.Recipe.load("int8-weight-only"), keep_master=True)
    >>> manifest = lx.compile(small, {"batch": (1,)}, keep_master=True).save("net.lepton")
    >>> from lepton_xla.compiler import master_weights
    >>> master_weights("net.lepton")["w"].dtype.name
    'float32'
    """

    return dict(read_kept(location, decrypt_key=decrypt_key).master.weights)
