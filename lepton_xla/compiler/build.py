"""Ahead-of-time compilation of a program: one executable per bucket, and a portable program."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import logging
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import msgspec
import numpy as np
from jax.sharding import Mesh

from lepton_xla.arguments import takes
from lepton_xla.callbacks import without_callbacks
from lepton_xla.compiler import _xla, weights
from lepton_xla.compiler.artifact import Artifact
from lepton_xla.compiler.buckets import bucket_name, check_bucket_sizes, combinations
from lepton_xla.compiler.code import Code
from lepton_xla.compiler.devices import Devices, Spec, spec_of
from lepton_xla.compiler.fingerprint import Fingerprint
from lepton_xla.compiler.fitting import fit_digest
from lepton_xla.compiler.flattening import Flat, compile_flat, flat_functions
from lepton_xla.compiler.generating import check_generation, check_steps, compile_steps, entry_of, part
from lepton_xla.compiler.golden import Golden
from lepton_xla.compiler.independence import Checked, check_padding, check_rows, default_tolerance, product_dtypes
from lepton_xla.compiler.manifest import EXPAND, SCHEMA, ExecutableSet, Manifest, Tensor
from lepton_xla.compiler.masters import Master
from lepton_xla.compiler.names import check_name
from lepton_xla.compiler.portable import export_programs
from lepton_xla.compiler.probes import table_sizes
from lepton_xla.compiler.runtime import Runtime, run_expand
from lepton_xla.compiler.stepping import Stepper
from lepton_xla.compiler.topologies import Elsewhere, compile_elsewhere, mesh_elsewhere
from lepton_xla.conversion.steps import Summary
from lepton_xla.errors import CompileError, ShardingError
from lepton_xla.program import Program, TensorSpec
from lepton_xla.rows import check_rows_lead, row_symbol
from lepton_xla.sharding.meshes import mesh as mesh_of
from lepton_xla.sharding.placement import as_placed, is_placed
from lepton_xla.sharding.rules import Rules
from lepton_xla.sharding.specs import as_spec, fits
from lepton_xla.trees import name_leaves

_LOG = logging.getLogger(__name__)

type Progress = Callable[[str, int, int], None]
"""`progress(step, steps_done, steps_total)`."""


@takes(
    program=Program,
    buckets=Mapping,
    metrics=Mapping,
    examples=Mapping,
    mesh=(Mesh, str),
    rules=Rules,
    topology=str,
    golden=Mapping,
)
def compile(
    program: Program,
    buckets: Mapping[str, Sequence[int]],
    *,
    name: str | None = None,
    version: str = "1",
    recipe: Any = None,
    plan: Any = None,
    metrics: Mapping[str, Any] | None = None,
    examples: Mapping[str, Any] | None = None,
    tolerance: float | None = None,
    mesh: Mesh | str | None = None,
    rules: Rules | None = None,
    topology: str | None = None,
    golden: Mapping[str, Any] | None = None,
    keep_master: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Compile a program for every combination of bucket sizes, on this process's first device or on a mesh.

    Args:
        program: the model; its weights stay arguments of the compiled code.
        buckets: symbolic dimension -> ascending sizes, such as `{"batch": (1, 8, 32)}`; `{}` for a model without
            symbolic dimensions.
        name: the model's name, `model` by default.
        version: the model's version.
        recipe, plan: plain JSON, stored in the manifest.
        metrics: the user's own metrics, stored in the manifest.
        examples: real inputs by name, any number of rows, for the check that rows and padding do not affect other rows.
        tolerance: largest difference between two executables that this check allows, relative to the largest value of
            an output. By default 1e-3 if weights and products are float32, 3e-2 for 16 bits, 5e-2 for fewer bits.
        mesh: several devices to compile for, or the text of `lx.sharding.mesh`. Each holds its part of the weights;
            rows of a batch are split over the axis `data`, if the mesh has one.
        rules: how the mesh cuts weights and batches. If they say nothing of weights, weights that are on such a mesh
            already, as after `Placement.put` and `optimize`, stay as they are.
        topology: devices to compile for that are not here, where their compiler is installed: TPUs such as `v5e:4x4`
            (`jax[tpu]`), or GPUs such as `h100:8` (`jax[cuda12]`). The mesh, given as text, is of those then; for this
            machine the program is compiled for one device, on which it is checked.
        golden: rows whose answers are known, which the artifact carries: arrays by the names of inputs and outputs.
            Without outputs, those that this model gives are kept. See `check` of `load`.
        keep_master: whether the artifact keeps the float weights that the program was optimized from, and how they were
            made small, so that `requantize` can make others small likewise. They take the room of the float model.
            `optimize` has to be told so too.
        progress: called before each step.

    Raises:
        ShardingError: if the mesh or the rules do not fit the devices, the weights or the buckets.
        CompileError: if the buckets do not fit the program, XLA refuses it, it holds large constants or Python
            callbacks (except for debugging calls, which are dropped), or rows or padding change the results of other
            rows, or golden rows are answered wrong.
        ExecutionError: if there is no device, or the compiled code fails in the check.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> manifest = lx.compile(program, {"batch": (1, 8)}, name="tiny").save("tiny.lepton")
    >>> manifest.name, manifest.buckets
    ('tiny', {'batch': (1, 8)})
    """
    from lepton_xla.passes.core import memory
    from lepton_xla.passes.core.inventory import (
        weights_report,
    )  # imported here, because loading and serving must not import a pass

    check_name(name or "model")
    bucket_sizes = check_bucket_sizes(program.symbols, buckets)
    check_rows_lead(program.inputs, program.outputs)
    bucket_list = combinations(bucket_sizes)
    parts = generation = None
    if program.generation is not None:
        check_generation(program, bucket_sizes, one_device=mesh is None and topology is None)
        generation, parts = program.generation, part(program, bucket_sizes["length"][0])
        program = parts.model
        examples = {"lengths": np.array([max(1, bucket_sizes["length"][0] // 2)], np.int32)} | dict(examples or {})
    program = without_callbacks(program, bucket_list[0])
    if topology is not None:
        if isinstance(mesh, Mesh):
            raise ShardingError(f"topology {topology!r} has devices of its own; give the mesh as text: 'data=-1'")
        mesh_elsewhere(topology, mesh)  # fails early
    devices, program = _spread(program, *((mesh, rules) if topology is None else (None, None)))
    for sizes in bucket_list:
        devices.check_rows(program.inputs, sizes)
    leaves = name_leaves(program.weights)
    # Without a mesh, weights that are sharded are gathered on the one device that the executables are for.
    one = devices.mesh is None
    arrays = [_on_device(path, leaf, devices.first) if one else leaf for path, leaf in leaves.items()]
    entries = tuple(
        weights.describe(path, index, array, spec_of(array.sharding))
        for index, (path, array) in enumerate(zip(leaves, arrays, strict=True))
    )
    memory.give_back()  # such as float weights that the caller let go of
    expand, flat = flat_functions(program)
    examples = _check_examples(program, program.converted(examples or {}))
    steps = len(bucket_list) + 2
    tell = progress or (lambda stage, done, total: None)

    executables: dict[str, Code] = {}
    compile_s: dict[str, float] = {}
    stored = arrays
    expander = None
    unpacked: tuple[Spec, ...] = ()
    if expand is not None:
        unpacked = _unpacked_specs(expand, arrays, devices)
        shardings = devices.unpacking(arrays, unpacked)
        expander = compile_flat(expand, arrays, [], "the unpacking of its weights", shardings)
        arrays = run_expand(expander.loaded, stored, devices, unpacked)
    runtime = Runtime(program.inputs, program.outputs, arrays, devices)
    shardings = devices.shardings(arrays, program.inputs, program.outputs)
    for done, sizes in enumerate(bucket_list):
        key = bucket_name(sizes)
        tell(f"compile {key}", done, steps)
        started = time.perf_counter()
        executables[key] = compile_flat(flat, arrays, program.abstract_inputs(sizes), f"bucket {key}", shardings)
        compile_s[key] = time.perf_counter() - started
        runtime.add(sizes, executables[key].loaded)

    steps_made = None
    if parts is not None and generation is not None:
        started = time.perf_counter()
        steps_made, codes = compile_steps(parts, generation, arrays, bucket_sizes)
        executables |= codes
        compile_s["steps of generation"] = time.perf_counter() - started

    tell("check that rows and padding do not affect other rows", steps - 2, steps)
    jaxpr = program.jaxpr(bucket_list[0])
    dtypes = {entry.dtype for entry in entries} | product_dtypes(jaxpr)
    limit = default_tolerance(dtypes) if tolerance is None else tolerance
    model = Checked(
        runtime.run,
        program.inputs,
        program.outputs,
        bucket_sizes,
        limit,
        examples,
        table_sizes(jaxpr, list(program.inputs)),
    )

    def compile_sizes(sizes: Mapping[str, int]) -> _xla.Loaded:
        return compile_flat(flat, arrays, program.abstract_inputs(sizes), bucket_name(sizes), shardings).loaded

    _check_independence(model, runtime, compile_sizes)

    tell("export StableHLO", steps - 1, steps)
    shapes = [_shape(leaf) for leaf in arrays]
    programs, note = export_programs(flat, shapes, program.inputs, bucket_sizes)
    unpacking = None
    if expand is not None:
        assert expander is not None
        executables[EXPAND] = expander
        (unpacking,), why = export_programs(expand, [_shape(leaf) for leaf in stored], {}, {})
        note = "; ".join(part for part in (note, why) if part)
    if note:
        _LOG.warning("%s", note)

    target = Fingerprint.of(devices.first, len(devices.all))
    if any(code.calls_kernels for code in executables.values()):
        target = target.with_kernels()
    unwritten = {key: code.why_none for key, code in executables.items() if code.blob is None}
    for key, why in unwritten.items():
        _LOG.warning(
            "XLA cannot serialize the code of bucket %s, so loading will compile it from StableHLO: %s", key, why
        )
    manifest = Manifest(
        schema=SCHEMA,
        name=name or "model",
        version=version,
        inputs=tensors_of(program.inputs),
        outputs=tensors_of(program.outputs),
        weights=entries,
        mesh=devices.entry,
        unpacked=unpacked,
        buckets=bucket_sizes,
        generation=entry_of(generation) if generation is not None else None,
        conversion=program.conversion and Summary.of(program.conversion),
        programs=(),
        programs_note=note,
        executables={target.digest: ExecutableSet(target=target, files={}, unwritten=unwritten)},
        compile_s=compile_s,
        recipe=recipe,
        plan=plan,
        float32_bytes=float32_bytes(program),
        reports=tuple(report.to_json() for report in (*program.history, weights_report(program, sizes=bucket_list[0]))),
        metrics=dict(metrics or {}),
        made_by=made_by(target),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        files={},
    )
    artifact = Artifact(
        manifest, tuple(stored), executables, tuple(programs), unpacking, devices,
        steps=steps_made, conversion=program.conversion,
    )  # fmt: skip
    if keep_master:
        if devices.mesh is not None or topology is not None:
            raise CompileError("a float master is kept for one device only; compile without a mesh")
        tell("keep the float master", steps, steps)
        artifact = dataclasses.replace(artifact, master=Master.made(program))
    if parts is not None and generation is not None:
        codes = {name: code.loaded for name, code in executables.items()}
        check_steps(Stepper.of(manifest, bucket_sizes, codes, runtime), limit, rounds=generation.cache_codes != "none")
    if golden is not None:
        rows = Golden.made(
            program.converted(golden), program.inputs, program.outputs, artifact.servable().compute, limit
        )
        artifact = dataclasses.replace(artifact, golden=rows)
    if topology is not None:
        tell(f"compile for {topology}", steps, steps)
        assert not isinstance(mesh, Mesh)
        artifact = _with(artifact, compile_elsewhere(program, flat, expand, bucket_list, topology, mesh, rules))
    tell("done", steps, steps)
    # The last step, because code for other devices brings their mesh.
    steps_of = (*artifact.steps.prefill, *artifact.steps.decode) if artifact.steps is not None else ()
    fit = fit_digest(artifact.manifest, programs, unpacking, steps_of)
    return dataclasses.replace(artifact, manifest=msgspec.structs.replace(artifact.manifest, fit=fit))


def _with(artifact: Artifact, other: Elsewhere) -> Artifact:
    """Add executables for devices that are not here. Its mesh is then the artifact's."""
    manifest, digest = artifact.manifest, other.target.digest
    unwritten = {key: code.why_none for key, code in other.codes.items() if code.blob is None}
    added = ExecutableSet(target=other.target, files={}, unwritten=unwritten)
    leaves = [
        msgspec.structs.replace(leaf, spec=spec) for leaf, spec in zip(manifest.weights, other.specs, strict=True)
    ]
    manifest = msgspec.structs.replace(
        manifest,
        weights=tuple(leaves) if other.devices.mesh is not None else manifest.weights,
        mesh=other.devices.entry,
        unpacked=other.unpacked,
        executables={**manifest.executables, digest: added},
    )
    return dataclasses.replace(artifact, manifest=manifest, elsewhere={digest: other.codes})


def _spread(program: Program, mesh: Mesh | str | None, rules: Rules | None) -> tuple[Devices, Program]:
    """The devices to compile for, and the program with its weights on them, if there are several."""
    if mesh is None:
        if rules is not None:
            raise ShardingError("rules say how a mesh cuts the weights; give compile the mesh, too")
        return Devices(_xla.first_device()), program
    made = mesh_of(mesh) if isinstance(mesh, str) else mesh
    if made.is_multi_process:
        raise ShardingError("an artifact runs in one process, and this mesh has devices of several")
    rules = rules or Rules()
    if rules.of_batches_only and any(is_placed(leaf, made) for leaf in jax.tree.leaves(program.weights)):
        placement = as_placed(program.weights, made, rules.batch_axes(made))
    else:
        placement = rules.resolve(program, made)
    devices = Devices(made.devices.flat[0], made, placement.batch_axes)
    return devices, program.replace(weights=placement.put(program.weights))


def _unpacked_specs(expand: Flat, stored: Sequence[jax.Array], devices: Devices) -> tuple[Spec, ...]:
    """How unpacked weights are cut: as XLA does it, where that gives equal parts."""
    if devices.mesh is None:
        return ()
    made = jax.jit(expand, keep_unused=True).lower(*stored).compile()
    chosen = map(spec_of, made.output_shardings)
    return tuple(
        spec if fits(as_spec(spec), leaf.shape, devices.mesh.shape) else ()
        for spec, leaf in zip(chosen, jax.eval_shape(expand, *stored), strict=True)
    )


def _on_device(path: str, leaf: Any, device: _xla.Device) -> jax.Array:
    try:
        return jax.device_put(leaf, device)
    except RuntimeError as error:  # no memory, or the array was deleted, for example by donation
        raise CompileError(f"weight {path!r} cannot be put on {device}: {_xla.reason(error)}") from error


def _shape(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def float32_bytes(program: Program) -> int:
    """Bytes of the weights in float32; a quantized matrix counts with its dequantized shape."""
    shaped = jax.tree.leaves(program.weights, is_leaf=lambda node: hasattr(node, "shape"))
    return 4 * sum(math.prod(array.shape) for array in shaped)


def _check_independence(
    model: Checked, runtime: Runtime, compile_sizes: Callable[[Mapping[str, int]], _xla.Loaded]
) -> None:
    rows = row_symbol(model.inputs)
    if rows is not None:
        check_rows(model, rows)
    for symbol, compiled_sizes in model.bucket_sizes.items():
        if symbol == rows:
            continue
        smaller = list(compiled_sizes[:-1])
        if not smaller and compiled_sizes[0] > 1:
            # With a single size there is no second executable to compare with, so compile one for this check.
            smaller = [compiled_sizes[0] // 2]
            sizes = {name: sizes[0] if name == rows else sizes[-1] for name, sizes in model.bucket_sizes.items()}
            sizes[symbol] = smaller[0]
            runtime.add(sizes, compile_sizes(sizes))
        for small in smaller:
            check_padding(model, symbol, small, compiled_sizes[-1], rows)


def _check_examples(program: Program, examples: Mapping[str, Any]) -> dict[str, np.ndarray]:
    checked: dict[str, np.ndarray] = {}
    for name, value in examples.items():
        spec = program.inputs.get(name)
        if spec is None:
            raise CompileError(f"examples name {name!r}; the model's inputs are {', '.join(program.inputs)}")
        array = np.asarray(value)
        fits = len(array.shape) == len(spec.shape) and all(
            size > 0 and (isinstance(dim, str) or dim == size)
            for dim, size in zip(spec.shape, array.shape, strict=True)
        )
        if not fits:
            raise CompileError(f"examples[{name!r}] has shape {array.shape}; the model takes {spec}")
        checked[name] = array
    return checked


def tensors_of(specs: Mapping[str, TensorSpec]) -> tuple[Tensor, ...]:
    """Inputs or outputs as the manifest describes them."""
    return tuple(Tensor(name=name, shape=spec.shape, dtype=spec.dtype) for name, spec in specs.items())


def made_by(target: Fingerprint) -> dict[str, Any]:
    """Versions of the software, and the machine."""
    return {
        "lepton_xla": importlib.metadata.version("lepton-xla"),
        "jax": jax.__version__,
        "jaxlib": target.jaxlib,
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": target.machine,
        "fingerprint": target.digest,
    }
