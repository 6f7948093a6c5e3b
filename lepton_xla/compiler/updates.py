"""Updates: artifacts of weights alone, for the compiled code of another artifact."""

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
from lepton_xla.callbacks import without_callbacks
from lepton_xla.compiler import weights
from lepton_xla.compiler.artifact import Artifact
from lepton_xla.compiler.buckets import combinations
from lepton_xla.compiler.build import float32_bytes, made_by, tensors_of
from lepton_xla.compiler.fingerprint import Fingerprint
from lepton_xla.compiler.fitting import check_fit, check_weights, fit_digest
from lepton_xla.compiler.flattening import flat_functions
from lepton_xla.compiler.generating import export_steps, part
from lepton_xla.compiler.golden import Golden
from lepton_xla.compiler.masters import Master
from lepton_xla.compiler.names import check_name
from lepton_xla.compiler.opening import open_files, read_manifest
from lepton_xla.compiler.portable import export_programs
from lepton_xla.compiler.reading import read_all
from lepton_xla.compiler.runtime import run_expand
from lepton_xla.compiler.servable import Servable
from lepton_xla.compiler.storage import Store, consistently
from lepton_xla.errors import ArtifactError
from lepton_xla.program import Program
from lepton_xla.trees import name_leaves

# Used where the base carries no golden rows whose tolerance could be taken.
_TOLERANCE = 1e-3


@takes(base=Servable, source=(Program, Artifact, str, os.PathLike), golden=Mapping, metrics=Mapping)
def make_update(
    base: Servable,
    source: Program | Artifact | str | os.PathLike[str],
    *,
    name: str | None = None,
    version: str = "1",
    golden: Mapping[str, Any] | None = None,
    tolerance: float | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Artifact:
    """Make an artifact of weights alone, which runs on the compiled code of another. Compiles nothing.

    The weights must be stored as the base's: the same paths, shapes, dtypes and formats, in the same program. So a
    program is optimized with the recipe of the base before, for the same buckets; a program
    that differs from the base's, because a measurement on another machine chose otherwise, say, is refused.

    Args:
        base: the loaded model whose compiled code the weights are for.
        source: a program or an artifact with the new weights, or where such an artifact is.
        name: the model's name, by default the base's.
        version: the model's version.
        golden: rows whose answers are known, as for `compile`; by default those of the artifact, if it is one.
        tolerance: the largest difference from a known answer, relative to the largest value of that output.
        metrics: the user's own metrics.

    Returns:
        The artifact, to be saved. Load it with `load(path, base=...)`.

    Raises:
        ArtifactError: if the weights do not fit the base, or are not finite; names the first difference.
        CompileError: if the program cannot be exported, or golden rows are answered wrong.

    >>> from lepton_xla.compiler import make_update
    >>> def model(scale):
    ...     weights = {"w": scale * jnp.eye(4)}
    ...     return lx.trace(lambda w, x: x @ w["w"], weights, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> base = lx.compile(model(1.0), {"batch": (1, 8)}, name="scale").servable()
    >>> manifest = make_update(base, model(3.0), version="2").save("scale-2.lepton")
    >>> lx.load("scale-2.lepton", base=base)(x=[[1.0, 0.0, 2.0, 0.0]])["output"]
    array([[3., 0., 6., 0.]], dtype=float32)
    """
    check_name(name or base.name)
    if not base.manifest.fit:
        raise ArtifactError(f"{base.name!r} was compiled without a digest of its program: compile it again")
    if isinstance(source, Program):
        made, where = _of_program(base, source), "the program"
    elif isinstance(source, Artifact):
        made, where = source, "the artifact"
    else:
        made, where = consistently(source, _read), os.fsdecode(source)
    check_fit(made.manifest, base.manifest, where)
    manifest = msgspec.structs.replace(
        made.manifest,
        name=name or base.name,
        version=version,
        programs=(),
        expand=None,
        generation=made.manifest.generation and made.manifest.generation.bare(),
        executables={},
        compile_s={},
        programs_note="",
        metrics=dict(metrics) if metrics is not None else made.manifest.metrics,
        files={},
        encryption=None,
    )
    devices = base.runtime.devices
    arrays = [
        devices.put(np.asarray(array), leaf.spec)
        for leaf, array in zip(made.manifest.weights, made.weights, strict=True)
    ]
    unpacked = arrays
    if base.expander is not None:
        unpacked = run_expand(base.expander, arrays, base.runtime.devices, base.manifest.unpacked)
    servable = Servable(manifest, base.buckets, base.runtime.sharing(unpacked), "shared", base.expander)
    check_weights(servable, base, where)
    rows = made.golden
    if golden is not None:
        carried = rows or base.manifest.golden
        known = _TOLERANCE if carried is None else carried.tolerance
        limit = known if tolerance is None else tolerance
        rows = Golden.made(golden, servable.inputs, servable.outputs, servable, limit)
    elif rows is not None:
        rows.check(servable, where)
    return dataclasses.replace(made, manifest=manifest, golden=rows)


def _read(store: Store) -> Artifact:
    """Read the weights and golden rows of an artifact."""
    manifest = read_manifest(store)
    files = open_files(store, manifest)
    entry = manifest.golden
    golden = None if entry is None else Golden.read(entry, files.read(entry.file))
    arrays = read_all(manifest.weights, manifest.packed_rows, files)
    master = None if manifest.master is None else Master.read(manifest, files, store.location)
    return Artifact(manifest, tuple(map(jax.device_put, arrays)), {}, (), golden=golden, master=master)


def _of_program(base: Servable, program: Program) -> Artifact:
    """Describe a program as if it were compiled as the base was."""
    theirs = base.manifest
    if theirs.mesh is not None:
        raise ArtifactError(
            f"{base.name!r} was compiled for a mesh: compile the new weights for it, then make the update of that"
        )
    generation, parts = program.generation, None
    if generation is not None and set(program.symbols) == set(theirs.buckets):
        parts = part(program, theirs.buckets["length"][0])
        program = parts.model
    program = without_callbacks(program, combinations(theirs.buckets)[0])
    leaves = name_leaves(program.weights)
    entries = tuple(weights.describe(path, index, array) for index, (path, array) in enumerate(leaves.items()))
    manifest = msgspec.structs.replace(
        theirs,
        inputs=tensors_of(program.inputs),
        outputs=tensors_of(program.outputs),
        weights=entries,
        fit="",
        golden=None,
        metrics={},
        certificate=None,  # it was measured of other weights
        float32_bytes=float32_bytes(program),
        reports=tuple(report.to_json() for report in program.history),
        made_by=made_by(Fingerprint.of(base.runtime.devices.first, 1)),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    expand, flat = flat_functions(program)
    stored = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves.values()]
    unpacked = stored if expand is None else list(jax.eval_shape(expand, *stored))
    unpacking = None
    if set(program.symbols) == set(theirs.buckets):  # otherwise the inputs differ, which is said later
        programs, _ = export_programs(flat, unpacked, program.inputs, theirs.buckets)
        if expand is not None:
            (unpacking,), _ = export_programs(expand, stored, {}, {})
        steps = ()
        if parts is not None and generation is not None:
            exported = export_steps(parts, generation, unpacked, theirs.buckets)
            steps = (*exported.prefill, *exported.decode)
        manifest = msgspec.structs.replace(manifest, fit=fit_digest(manifest, programs, unpacking, steps))
    master = Master.made(program) if theirs.master is not None else None
    return Artifact(manifest, tuple(leaves.values()), {}, (), master=master)
