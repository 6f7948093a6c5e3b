"""How much memory, communication and time a training step takes on devices that need not be here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from lepton_xla.arguments import takes
from lepton_xla.environment.machine import DeviceFigures
from lepton_xla.errors import CompileError, TrainingError, first_line
from lepton_xla.passes.core.costs import product_flops
from lepton_xla.program import Program
from lepton_xla.sharding import Rules
from lepton_xla.sharding.collectives import Collective, find_collectives, sent_by_kind
from lepton_xla.sharding.meshes import mesh as mesh_of
from lepton_xla.sharding.topologies import Topology, find_topology
from lepton_xla.train.compression import Compression, Stage
from lepton_xla.train.compression.decisions import Decisions
from lepton_xla.train.layout import Layout, first_state, state_shapes, trace_step
from lepton_xla.train.models import Loss, Model
from lepton_xla.train.state import State

# XLA's status code of a program that does not fit.
_EXHAUSTED = "RESOURCE_EXHAUSTED"
# The largest batch is known when the next that is too large is at most this part of it larger.
_FINE = 1 / 32
# A batch is not tried beyond this many rows.
_MOST_ROWS = 1 << 24


@dataclasses.dataclass(frozen=True)
class Size:
    """What one training step takes. All bytes are those of one device.

    Attributes:
        topology: the devices.
        mesh: size by axis.
        rows: rows of a batch, over all devices.
        unit: rows must be a multiple of this: pieces of the mesh times microbatches.
        stage: `float`, or `rounded` if weights and activations are rounded in the step.
        parts: bytes of what stays from step to step: `weights`, `optimizer`, `model state`, `scales`, `averages`; of
            the loss' own arrays, such as a teacher's weights (`loss`); and of the `batch`.
        gradients_bytes: bytes of all gradients. They are among the temporaries, unless XLA consumes each at once.
        temporary_bytes: bytes of activations, gradients and all else that lives within a step; None if it does not fit.
        total_bytes: all that the device must hold; None if it does not fit.
        memory_bytes: what the device has for it; None if not known.
        collectives: what devices send each other in a step.
        flops: operations of the products, of the whole step, divided by the number of devices.
        seconds: predicted times: `products` at the peak for bfloat16, `memory` traffic, `collectives`; `compiler`, if
            the compiler predicts one. Only what is known.
        refusal: what the compiler says of a step that does not fit; empty otherwise.

    >>> import optax
    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(2)}, {"x": lx.TensorSpec(("batch", 2), "float32")})
    >>> batch = {"x": np.eye(2, dtype=np.float32), "label": np.array([1, 0])}
    >>> found = lx.train.size(program, lx.train.supervised(program), optax.sgd(0.1, 0.9), batch, memory_bytes=1 << 30)
    >>> found.parts["weights"], found.parts["optimizer"], found.flops, found.fits
    (16, 16, 32, True)
    >>> found.to_json()["sent_bytes"], found.step_seconds  # what this machine can do is not known
    ({}, None)
    """

    topology: Topology
    mesh: dict[str, int]
    rows: int
    unit: int
    stage: str
    parts: dict[str, int]
    gradients_bytes: int
    temporary_bytes: int | None
    total_bytes: int | None
    memory_bytes: int | None
    collectives: tuple[Collective, ...]
    flops: int
    seconds: dict[str, float]
    refusal: str = ""

    @property
    def fits(self) -> bool | None:
        """Whether the step fits the memory; None if that is not known."""
        if self.refusal:
            return False
        if self.memory_bytes is None or self.total_bytes is None:
            return True if self.topology.is_exact and self.topology.figures else None
        return self.total_bytes <= self.memory_bytes

    @property
    def step_seconds(self) -> tuple[float, float] | None:
        """Predicted time of a step: if products, memory and collectives overlap wholly, and if not at all.

        None if the device is not known, or not what devices send each other in a second.
        """
        if self.collectives and "collectives" not in self.seconds:
            return None
        parts = [value for name, value in self.seconds.items() if name != "compiler"]
        return (max(parts), sum(parts)) if parts else None

    def to_json(self) -> dict[str, Any]:
        """Return the size as JSON."""
        times = self.step_seconds
        return {
            "topology": self.topology.name,
            "device_kind": self.topology.kind,
            "exact": self.topology.is_exact,
            "mesh": self.mesh,
            "devices": len(self.topology.devices),
            "rows": self.rows,
            "stage": self.stage,
            "bytes": self.parts,
            "gradients_bytes": self.gradients_bytes,
            "temporary_bytes": self.temporary_bytes,
            "total_bytes": self.total_bytes,
            "memory_bytes": self.memory_bytes,
            "fits": self.fits,
            "refusal": self.refusal,
            "sent_bytes": sent_by_kind(self.collectives),
            "collectives": len(self.collectives),
            "flops": self.flops,
            "seconds": self.seconds,
            "step_seconds_least": None if times is None else times[0],
            "step_seconds_most": None if times is None else times[1],
        }


@takes(model=(Model, Program), loss=Callable, optimizer=optax.GradientTransformation, batch=Mapping)
def size(
    model: Model | Program,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    batch: Mapping[str, Any],
    *,
    topology: str | Topology | None = None,
    mesh: str | None = None,
    rules: Rules | None = None,
    rows: int | None = None,
    memory_bytes: int | None = None,
    accumulate: int = 1,
    compute_dtype: str | None = None,
    clip_norm: float | None = None,
    ema: float | None = None,
    keep_best: bool = False,
    compression: Compression | None = None,
) -> Size:
    """Size the step that `fit` runs with the same arguments, by compiling it; nothing is run.

    Args:
        model: the model.
        loss: the loss, as for `fit`.
        optimizer: the optimizer.
        batch: name -> array, or its shape; the whole batch of a step.
        topology: devices that need not be here, such as `v5e:4x4` or `h100:8`. Where their compiler is installed
            (`jax[tpu]`, `jax[cuda12]`), memory and collective operations are exactly those of the step that would run.
            Otherwise CPU devices of this process stand for them. By default this machine's devices.
        mesh: their mesh; by default `data=-1`.
        rules: where weights go.
        rows: rows of the batch, if not those of `batch`.
        memory_bytes: memory of a device; by default what is known of the topology.
        accumulate, compute_dtype, clip_norm, ema: as for `fit`.
        keep_best: whether the run keeps its best weights, too.
        compression: as for `fit`; if it rounds, a step that rounds is sized. Nothing is shrunk: sizes are those before.

    Raises:
        CompileError: if there is no such topology, or the step does not compile.
        ShardingError: if the mesh, the rules and the batch do not fit.
        TrainingError: if an argument is out of range, the loss cannot be used, or the microbatches do not divide the
            batch.

    >>> import optax
    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(2)}, {"x": lx.TensorSpec(("batch", 2), "float32")})
    >>> batch = {"x": np.eye(2, dtype=np.float32), "label": np.array([1, 0])}
    >>> lx.train.size(program, lx.train.supervised(program), optax.sgd(0.1), batch, topology="v5e:no").fits
    Traceback (most recent call last):
    lepton_xla.errors.CompileError: topology 'v5e:no': ...
    """
    for name, value in (("rows", rows), ("memory_bytes", memory_bytes), ("accumulate", accumulate)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise TrainingError(f"size: {name} = {value!r}; expected a whole number of at least 1")
    if rules is not None and mesh is None and topology is None:
        raise TrainingError("rules say where weights go on a mesh; give mesh or topology too, such as mesh='data=-1'")
    where = topology if isinstance(topology, Topology) else _here(mesh) if topology is None else find_topology(topology)
    made = None if topology is None and mesh is None else mesh_of(mesh or "data=-1", where.devices)
    stage = Stage.begin(compression or Compression(), Model.of(model), loss, optimizer)
    rounds = any(change.name == "quantize" for change in stage.compression.changes)
    if rounds:
        stage = dataclasses.replace(stage, decided=Decisions(("quantize",)))
    fresh = jax.eval_shape(lambda key: first_state(stage, key, ema=ema is not None, best=keep_best), jax.random.key(0))
    layout = Layout.of(stage, state_shapes(stage, fresh), made, rules or Rules())
    shapes = _batch_shapes(stage, batch, rows, layout)
    arrays = jax.tree.map(lambda leaf: _placed(leaf, layout), getattr(stage.loss, "arrays", None))
    traced = trace_step(
        stage, layout, layout.placed, shapes, arrays,
        platform=where.devices[0].platform if where.is_exact else "",  # a loop over microbatches, as on the topology
        accumulate=accumulate, compute_dtype=compute_dtype, clip_norm=clip_norm, ema=ema, mesh=made,
    )  # fmt: skip
    parts = _parts(layout.placed, shapes, arrays)
    found = Size(
        topology=where,
        mesh=dict(made.shape) if made is not None else {},
        rows=next(iter(shapes.values())).shape[0],
        unit=layout.batch_pieces * accumulate,
        stage="rounded" if rounds else "float",
        parts={name: count for name, count in parts.items() if count or name in ("weights", "optimizer", "batch")},
        gradients_bytes=parts["weights"],
        temporary_bytes=None,
        total_bytes=None,
        memory_bytes=memory_bytes or (None if where.figures is None else where.figures.memory_bytes),
        collectives=(),
        flops=product_flops(traced.jaxpr) // len(where.devices),
        seconds={},
    )
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if error.error_code_string == _EXHAUSTED:
            return dataclasses.replace(found, refusal=first_line(error))
        raise CompileError(f"the step does not compile for {where.name}: {first_line(error)}") from error
    return _compiled(found, compiled)


def largest_batch(at: Callable[[int], Size], start: Size) -> tuple[Size | None, int | None]:
    """Find the largest batch that fits, by interpolation and bisection; each try compiles.

    Args:
        at: gives the size at a number of rows.
        start: the size at some number of rows, to begin with.

    Returns:
        The size of the largest batch, to one part in 32, None if not even `start.unit` rows fit; and a number of
        rows that does not fit, None if none was found.

    Raises:
        TrainingError: if it is not known what fits.

    >>> from types import SimpleNamespace
    >>> at = lambda rows: SimpleNamespace(rows=rows, unit=8, fits=rows <= 1000, total_bytes=None, memory_bytes=None)
    >>> fitting, refused = lx.train.largest_batch(at, at(8))
    >>> fitting.rows <= 1000 < refused, refused - fitting.rows <= 32
    (True, True)
    """
    if start.fits is None:
        raise TrainingError("what fits is not known: the memory of this kind of device is not; give memory_bytes")
    unit = start.unit
    low, high, before = (start, None, None) if start.fits else (None, start.rows, None)
    if low is None:
        low = at(unit) if high != unit else None
        if low is None or not low.fits:
            return None, unit
    while high is None or high - low.rows > max(unit, low.rows * _FINE):
        if high is None and low.rows >= _MOST_ROWS:
            return low, None
        guess = _guess(low, before)
        middle = low.rows * 2 if high is None else (low.rows + high) // 2
        chosen = middle if guess is None else guess if high is None or low.rows < guess < high else middle
        chosen = min(max(chosen // unit * unit, low.rows + unit), (high or 2 * _MOST_ROWS) - unit)
        tried = at(chosen)
        if tried.fits:
            low, before = tried, low
        else:
            high, before = chosen, None
    return low, high


def _guess(low: Size, before: Size | None) -> int | None:
    """Rows at which memory is just used up, if it grows as between these two."""
    if before is None or low.memory_bytes is None or low.total_bytes is None or before.total_bytes is None:
        return None
    growth = (low.total_bytes - before.total_bytes) / (low.rows - before.rows)
    return None if growth <= 0 else min(low.rows + int((low.memory_bytes - low.total_bytes) / growth), _MOST_ROWS)


def _here(mesh: str | None) -> Topology:
    """This machine's devices: one, or all for a mesh."""
    devices = tuple(jax.devices() if mesh is not None else jax.devices()[:1])
    return Topology("this machine", devices[0].device_kind, devices, True, None)


def _batch_shapes(stage: Stage, batch: Mapping[str, Any], rows: int | None, layout: Layout) -> dict[str, Any]:
    prepare = getattr(stage.loss, "prepare", None)
    arrays = {name: np.asarray(leaf) for name, leaf in prepare(batch).items()} if prepare is not None else batch
    found: dict[str, Any] = {}
    for name, leaf in arrays.items():
        shape = tuple(leaf.shape)
        if not shape or not shape[0]:
            raise TrainingError(f"batch[{name!r}] has no rows; its shape is {shape}")
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        found[name] = jax.ShapeDtypeStruct((shape[0] if rows is None else rows, *shape[1:]), dtype)
    if layout.placement is None:
        return found
    for name, leaf in found.items():
        layout.placement.check_batch({name: np.broadcast_to(np.zeros((), np.int8), leaf.shape)})
    sharding = layout.placement.batch
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) for name, leaf in found.items()}


def _placed(leaf: Any, layout: Layout) -> jax.ShapeDtypeStruct:
    """The shape of an array that every device has whole."""
    sharding = None if layout.shardings is None else layout.shardings.step
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _parts(state: State, batch: Any, arrays: Any) -> dict[str, int]:
    """Bytes on one device, by part."""
    trees: dict[str, Any] = {
        "weights": state.weights, "optimizer": state.optimizer, "model state": state.model_state,
        "scales": state.scales, "averages": (state.ema, state.best), "loss": arrays, "batch": batch,
    }  # fmt: skip
    return {name: sum(map(_device_bytes, jax.tree.leaves(tree))) for name, tree in trees.items()}


def _device_bytes(leaf: Any) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def _compiled(found: Size, compiled: jax.stages.Compiled) -> Size:
    """Add what the compiled step tells."""
    memory: Any = compiled.memory_analysis()
    collectives = tuple(find_collectives(compiled.as_text() or ""))
    total = (
        memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    )  # fmt: skip
    costs: Mapping[str, float] = compiled.cost_analysis() or {}
    return dataclasses.replace(
        found,
        temporary_bytes=int(memory.temp_size_in_bytes),
        total_bytes=int(total),
        collectives=collectives,
        seconds=_seconds(found.topology.figures, found.flops, collectives, costs, exact=found.topology.is_exact),
    )


def _seconds(
    figures: DeviceFigures | None,
    flops: int,
    collectives: tuple[Collective, ...],
    costs: Mapping[str, float],
    *,
    exact: bool,
) -> dict[str, float]:
    if figures is None:
        return {}
    found = {"products": flops / figures.peak_flops}
    if exact and figures.memory_bandwidth and costs.get("bytes accessed"):
        found["memory"] = costs["bytes accessed"] / figures.memory_bandwidth
    if figures.link_bandwidth:
        found["collectives"] = sum(each.sent_bytes for each in collectives) / figures.link_bandwidth
    # TPU's compiler counts -1 for what it cannot predict, such as a collective operation.
    if exact and not collectives and costs.get("optimal_seconds", -1.0) > 0:
        found["compiler"] = costs["optimal_seconds"]
    return found
