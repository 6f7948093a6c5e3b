"""Executables for TPUs and GPUs that this machine does not have, where their compiler is installed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from lepton_xla.compiler import _xla
from lepton_xla.compiler.buckets import bucket_name
from lepton_xla.compiler.code import Code
from lepton_xla.compiler.devices import Devices, Spec, spec_of
from lepton_xla.compiler.fingerprint import Fingerprint
from lepton_xla.compiler.manifest import EXPAND
from lepton_xla.errors import CompileError, ShardingError
from lepton_xla.program import Program
from lepton_xla.sharding import topologies
from lepton_xla.sharding.meshes import mesh as mesh_of
from lepton_xla.sharding.rules import Rules
from lepton_xla.sharding.specs import as_spec, fits


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """What was compiled for devices that are not here.

    Attributes:
        target: their fingerprint.
        devices: the devices.
        specs: how each stored weight is cut, in argument order.
        unpacked: how each unpacked weight is cut, if weights are unpacked.
        codes: bucket name (or `expand`) -> code, which cannot run here.
    """

    target: Fingerprint
    devices: Devices
    specs: tuple[Spec, ...]
    unpacked: tuple[Spec, ...]
    codes: dict[str, Code]


def mesh_elsewhere(topology: str, mesh: str | None) -> tuple[list[Any], Mesh]:
    """The devices of a topology, and their mesh.

    Raises:
        CompileError: if there is no such topology, or its compiler is not installed.
        ShardingError: if there are several devices and no mesh, or it does not fit them.
    """
    found = topologies.topology_devices(topology)
    if mesh is None and len(found) > 1:
        raise ShardingError(f"topology {topology!r} has {len(found)} devices; give a mesh, such as 'data=-1'")
    return found, mesh_of(mesh or "data=1", found)


def compile_elsewhere(
    program: Program,
    model: Callable[..., Any],
    expand: Callable[..., Any] | None,
    bucket_list: Sequence[Mapping[str, int]],
    topology: str,
    mesh: str | None,
    rules: Rules | None,
) -> Elsewhere:
    """Compile a program for the devices of a topology.

    Args:
        program: the program.
        model: the program as a function of flat weights (unpacked, if there is an unpacking) and inputs.
        expand: the unpacking of flat weights, or None.
        bucket_list: the sizes to compile for.
        topology: such as `v5e:4x4` or `h100:8`.
        mesh: the mesh of its devices, if there are several.
        rules: how the mesh cuts weights and batches.

    Raises:
        CompileError: if there is no such topology, its compiler is not installed, or it refuses the program.
        ShardingError: if the mesh or the rules do not fit.
    """
    found, made = mesh_elsewhere(topology, mesh)
    placement = (rules or Rules()).resolve(program, made)
    devices = Devices(found[0]) if mesh is None else Devices(found[0], made, placement.batch_axes)
    for sizes in bucket_list:
        devices.check_rows(program.inputs, sizes)
    stored = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(program.weights)]
    specs = tuple(map(spec_of, jax.tree.leaves(placement.shardings)))
    codes: dict[str, Code] = {}
    taken, taken_specs, unpacked = stored, specs, tuple[Spec, ...]()
    if expand is not None:
        taken = list(jax.eval_shape(expand, *stored))
        places = tuple(map(devices.sharding, specs))
        chosen = jax.jit(expand, keep_unused=True, in_shardings=places).lower(*stored).compile().output_shardings
        taken_specs = tuple(
            spec if fits(as_spec(spec), leaf.shape, made.shape) else ()
            for spec, leaf in zip(map(spec_of, chosen), taken, strict=True)
        )
        unpacked = taken_specs if devices.mesh is not None else ()
        codes[EXPAND] = _made(expand, stored, specs, taken_specs, devices, f"{topology}, unpacking")
    inputs = tuple(devices.row_specs(program.inputs, program.inputs))
    outputs = tuple(devices.row_specs(program.outputs, program.inputs))
    for sizes in bucket_list:
        key = bucket_name(sizes)
        shapes = [*taken, *program.abstract_inputs(sizes)]
        codes[key] = _made(model, shapes, (*taken_specs, *inputs), outputs, devices, f"{topology}, bucket {key}")
    return Elsewhere(Fingerprint.of(found[0], len(devices.all)), devices, specs, unpacked, codes)


def _made(
    fn: Callable[..., Any],
    shapes: Sequence[jax.ShapeDtypeStruct],
    taken: Sequence[Spec],
    returned: Sequence[Spec],
    devices: Devices,
    what: str,
) -> Code:
    into, out = (tuple(map(devices.sharding, specs)) for specs in (taken, returned))
    try:
        return Code.made(jax.jit(fn, keep_unused=True, in_shardings=into, out_shardings=out).lower(*shapes))
    except Exception as error:  # a model or XLA may raise anything
        raise CompileError(f"the model does not compile for {what}: {_xla.reason(error)}") from error
