"""`Placement`: which part of each weight a device holds, and why."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lepton_xla.deferred import jax
from lepton_xla.errors import ShardingError
from lepton_xla.sharding.meshes import AnyMesh
from lepton_xla.sharding.specs import as_spec, axes_of, pieces, spec_text
from lepton_xla.tables import Table, size
from lepton_xla.trees import key_name, leaf_bytes, some_names, tree_bytes

# Columns that a printed placement takes at most.
_WIDTH = 80


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one weight is.

    Attributes:
        path: name of the weight.
        shape: its whole shape.
        dtype: name of its dtype.
        spec: which mesh axes cut which of its axes.
        size_bytes: bytes of the whole weight.
        device_bytes: bytes that one device holds of it.
        reason: what decided, or why the weight stays whole on every device.

    >>> mesh = lx.sharding.mesh("model=1", jax.devices()[:1])
    >>> rules = lx.sharding.Rules([("w", ("", "model"))])
    >>> entry = rules.resolve({"w": jnp.ones((4, 6))}, mesh).entries[0]
    >>> entry.spec, entry.device_bytes, entry.reason
    (P(None, 'model'), 96, "rule 'w'")
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    size_bytes: int
    device_bytes: int
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Return the entry as JSON: the spec is a list of lists of mesh axes.

        >>> Entry("w", (4, 6), "int8", PartitionSpec(None, "model"), 24, 12, "rule 'w'").to_json()["spec"]
        [[], ['model']]
        """
        return dataclasses.asdict(self) | {"shape": list(self.shape), "spec": [list(axes_of(p)) for p in self.spec]}


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the weights of a model are on a mesh. `str` of it is a table of at most 80 columns.

    Attributes:
        mesh: the mesh; may be abstract, if only the table is wanted.
        entries: one for each weight, in the order of the weights.
        shardings: the sharding of each weight by path; for a `QTensor`, a tree of them.
        batch_axes: mesh axes that a batch's rows are split over.

    >>> mesh = lx.sharding.mesh("data=1", jax.devices()[:1])
    >>> placement = lx.sharding.Rules(fallback="data", fallback_bytes=0).resolve({"w": jnp.ones((4, 6))}, mesh)
    >>> placement.shardings["w"].spec, placement.batch.spec, placement.device_bytes
    (P(None, 'data'), P('data',), 96)
    >>> placement.put({"w": np.ones((4, 6))})["w"].sharding == placement.shardings["w"]
    True
    >>> placement.batch_pieces, placement.to_json()["mesh"], placement.table().title
    (1, {'data': 1}, 'weights on data=1 (1 device)')
    """

    mesh: AnyMesh
    entries: tuple[Entry, ...]
    shardings: dict[str, Any]
    batch_axes: tuple[str, ...] = ()

    @property
    def device_bytes(self) -> int:
        """Bytes of weights that one device holds."""
        return sum(entry.device_bytes for entry in self.entries)

    @property
    def batch(self) -> NamedSharding:
        """The sharding of an array of rows; axis 0 is the row."""
        axes = self.batch_axes[0] if len(self.batch_axes) == 1 else self.batch_axes or None
        return NamedSharding(self.mesh, PartitionSpec(axes) if axes else PartitionSpec())

    @property
    def batch_pieces(self) -> int:
        """Number of pieces that the rows of a batch are split into; it must divide their number."""
        return pieces(self.batch_axes, self.mesh.shape)

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Check that the mesh can split a batch.

        Args:
            batch: name -> array, or its shape; axis 0 is the row.

        Raises:
            ShardingError: if an array has no rows, or a number of rows that the mesh cannot split evenly.

        >>> placement = lx.sharding.Rules().resolve({}, lx.sharding.mesh("data=1", jax.devices()[:1]))
        >>> placement.check_batch({"x": np.ones((3, 2))})
        """
        for name, array in batch.items():
            shape = tuple(np.shape(array))
            if not shape:
                raise ShardingError(f"batch[{name!r}] is a scalar; every array of a batch has rows on its first axis")
            if shape[0] % self.batch_pieces:
                cut = " and ".join(f"{axis}={self.mesh.shape[axis]}" for axis in self.batch_axes)
                raise ShardingError(
                    f"batch[{name!r}] has {shape[0]} rows, which {cut} cannot split evenly; give a multiple of "
                    f"{self.batch_pieces} rows"
                )

    def put(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """Put weights on the devices. Each process gives the whole weights and keeps the parts of its devices.

        Raises:
            ShardingError: for a weight that the placement does not have, or has in another shape.

        >>> mesh = lx.sharding.mesh("model=1", jax.devices()[:1])
        >>> lx.sharding.Rules().resolve({"w": jnp.ones(3)}, mesh).put({"v": jnp.ones(3)})
        Traceback (most recent call last):
        lepton_xla.errors.ShardingError: weight 'v' is not in the placement, which has w
        """
        if not isinstance(self.mesh, Mesh):
            raise ShardingError("the mesh is abstract, so there are no devices; resolve the rules on a mesh of devices")
        shapes = {entry.path: entry.shape for entry in self.entries}
        for path, leaf in weights.items():
            if path not in shapes:
                raise ShardingError(f"weight {path!r} is not in the placement, which has {some_names(shapes)}")
            shape = tuple(getattr(leaf, "shape", ()))
            if shape != shapes[path]:
                raise ShardingError(f"weight {path!r} has shape {shape}, the placement {shapes[path]}")
        return {path: jax.tree.map(put_array, leaf, self.shardings[path]) for path, leaf in weights.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the placement as JSON."""
        return {
            "mesh": dict(self.mesh.shape),
            "batch": list(self.batch_axes),
            "device_bytes": self.device_bytes,
            "weights": [entry.to_json() for entry in self.entries],
        }

    def table(self) -> Table:
        """Return the table that is printed: one row for each weight."""
        rows = [
            (entry.path, "x".join(map(str, entry.shape)), spec_text(entry.spec), size(entry.device_bytes), entry.reason)
            for entry in self.entries
        ]
        axes = ", ".join(f"{name}={count}" for name, count in self.mesh.shape.items())
        devices = math.prod(self.mesh.shape.values())
        title = f"weights on {axes} ({devices} {'device' if devices == 1 else 'devices'})"
        whole = f"of {size(sum(entry.size_bytes for entry in self.entries))}"
        total = ("total", "", "", size(self.device_bytes), whole)
        return Table(title, ("weight", "shape", "spec", ">a device", "why"), rows, total)

    def __str__(self) -> str:
        table = self.table()
        return "\n".join((table.title, *table.lines(_WIDTH)))


def put_array(array: Any, sharding: NamedSharding) -> Any:
    """Put an array, which each process has whole, where a sharding says."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    whole = np.asarray(array)  # not `device_put`, which would compare the arrays of all processes
    return jax.make_array_from_callback(whole.shape, sharding, lambda part: whole[part])


def placed(leaf: Any, spec: PartitionSpec, mesh: AnyMesh) -> Any:
    """The sharding of a weight; for a quantized matrix, a tree of the shardings of its parts.

    A part (codes, scales) is cut as the matrix `[..., K, N]` is, but along no axis that the cut does not divide. Codes
    that are stored column-major are cut so, too.

    >>> mesh = lx.sharding.mesh("model=1", jax.devices()[:1])
    >>> placed(np.ones((4, 6)), PartitionSpec("model"), mesh).spec
    P('model',)
    """
    if jax.tree_util.all_leaves([leaf]):
        return NamedSharding(mesh, spec)
    cuts = [axes_of(part) for part in spec] + [()] * (len(leaf.shape) - len(spec))

    def of(key: Any, part: Any) -> NamedSharding:
        turned = getattr(leaf, "transposed", False) and key_name(key[-1]) == "values"
        order = [*cuts[:-2], cuts[-1], cuts[-2]] if turned else cuts
        fits = [
            cut if length % pieces(cut, mesh.shape) == 0 else ()
            for cut, length in zip(order[: part.ndim], part.shape, strict=True)
        ]
        return NamedSharding(mesh, as_spec(fits))

    return jax.tree_util.tree_map_with_path(of, leaf)


def is_placed(array: Any, mesh: Mesh) -> bool:
    """Whether an array is on a mesh with the same axes already.

    >>> is_placed(jnp.ones(4), lx.sharding.mesh("model=1", jax.devices()[:1]))
    False
    """
    found = getattr(array, "sharding", None)
    return isinstance(found, NamedSharding) and dict(found.mesh.shape) == dict(mesh.shape)


def as_placed(weights: Mapping[str, Any], mesh: Mesh, batch_axes: tuple[str, ...]) -> Placement:
    """The placement of weights where they are; whole, if they are not on such a mesh.

    Args:
        weights: path -> array, or a tree of arrays.
        mesh: the mesh.
        batch_axes: its axes that split batches.

    >>> mesh = lx.sharding.mesh("model=1", jax.devices()[:1])
    >>> array = jax.device_put(jnp.ones(4), NamedSharding(mesh, PartitionSpec("model")))
    >>> as_placed({"w": array}, mesh, ()).entries[0].spec
    P('model',)
    """

    def of(part: Any) -> NamedSharding:
        return NamedSharding(mesh, as_spec(part.sharding.spec) if is_placed(part, mesh) else PartitionSpec())

    shardings = {path: jax.tree.map(of, leaf) for path, leaf in weights.items()}
    entries: list[Entry] = []
    for path, leaf in weights.items():
        largest = max(
            zip(jax.tree.leaves(leaf), jax.tree.leaves(shardings[path]), strict=True), key=lambda pair: pair[0].size
        )
        entries.append(entry_of(path, leaf, largest[1].spec, shardings[path], "as it was placed"))
    return Placement(mesh, tuple(entries), shardings, batch_axes)


def entry_of(path: str, leaf: Any, spec: PartitionSpec, shardings: Any, reason: str) -> Entry:
    """Make the entry of one weight.

    >>> mesh = lx.sharding.mesh("model=1", jax.devices()[:1])
    >>> whole = NamedSharding(mesh, PartitionSpec())
    >>> entry_of("w", np.ones((4, 6), np.int8), PartitionSpec(), whole, "").device_bytes
    24
    """
    parts = zip(jax.tree.leaves(leaf), jax.tree.leaves(shardings), strict=True)
    held = sum(leaf_bytes(sharding.shard_shape(tuple(part.shape)), part.dtype) for part, sharding in parts)
    dtype = str(getattr(leaf, "dtype", getattr(leaf, "format", "")))
    return Entry(path, tuple(leaf.shape), dtype, spec, tree_bytes(leaf), held, reason)
