"""The devices that the executables of a model run on: one, or a mesh of several."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from lepton_xla.compiler import _xla
from lepton_xla.deferred import jax
from lepton_xla.errors import ShardingError
from lepton_xla.program import TensorSpec
from lepton_xla.rows import row_symbol
from lepton_xla.sharding.meshes import mesh
from lepton_xla.sharding.specs import as_spec, axes_of, pieces

if TYPE_CHECKING:
    from jax.sharding import Mesh, PartitionSpec

type Spec = tuple[tuple[str, ...], ...]
"""For each axis of an array, the mesh axes that cut it; axes at the end that nothing cuts are left out."""


class MeshEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The mesh that an artifact's executables were compiled for.

    Attributes:
        axes: size by axis, in order.
        batch: the axes that the rows of a batch are split over.
    """

    axes: dict[str, int]
    batch: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of devices."""
        return math.prod(self.axes.values())

    def __str__(self) -> str:
        return ", ".join(f"{name}={size}" for name, size in self.axes.items())


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of one model.

    Attributes:
        first: the first device.
        mesh: the mesh, if there are several.
        batch: the axes of the mesh that the rows of a batch are split over.
    """

    first: _xla.Device
    mesh: Mesh | None = None
    batch: tuple[str, ...] = ()

    @classmethod
    def of(cls, entry: MeshEntry | None, number: int = 0) -> Devices:
        """This process's first devices, as many as the artifact was compiled for; for one device that of this number.

        Raises:
            ExecutionError: if there is no device.
            ShardingError: if there are fewer than the artifact was compiled for.
        """
        if entry is None:
            return cls(_xla.device_numbered(number))
        first = _xla.first_device()
        return cls(first, mesh(entry.axes, jax.devices()[: entry.count]), entry.batch)

    @property
    def is_usual(self) -> bool:
        """Whether JAX uses it where nobody says otherwise: not a mesh, nor another device of this process."""
        return self.mesh is None and _xla.is_first(self.first)

    def put(self, array: np.ndarray, spec: Spec = ()) -> jax.Array:
        """An array on these devices, cut so; on a CPU it may share the memory."""
        if self.mesh is None:
            return _xla.putter(array.shape, array.dtype, self.first)(array)
        return jax.device_put(array, self.sharding(spec))

    @property
    def read(self) -> Callable[[jax.Array], np.ndarray]:
        """The function that gives the elements of an array on these devices."""
        return _xla.reader(self.first)

    @property
    def all(self) -> tuple[_xla.Device, ...]:
        """The devices in the order in which executables number them."""
        return (self.first,) if self.mesh is None else tuple(self.mesh.devices.flat)

    @property
    def entry(self) -> MeshEntry | None:
        """What the manifest says of them."""
        return None if self.mesh is None else MeshEntry(axes=dict(self.mesh.shape), batch=self.batch)

    def sharding(self, spec: Spec = ()) -> jax.sharding.Sharding:
        """The sharding of an array that is cut so."""
        if self.mesh is None:
            return jax.sharding.SingleDeviceSharding(self.first)
        return jax.sharding.NamedSharding(self.mesh, as_spec(spec))

    def row_specs(self, of: Mapping[str, TensorSpec], inputs: Mapping[str, TensorSpec]) -> list[Spec]:
        """How inputs or outputs are cut: along their first axis, if that is the rows, else not.

        Args:
            of: the inputs or outputs.
            inputs: the inputs, which tell what the rows are.
        """
        rows = row_symbol(inputs)
        return [(self.batch,) if spec.shape[:1] == (rows,) else () for spec in of.values()]

    def of_rows(self, of: Mapping[str, TensorSpec], inputs: Mapping[str, TensorSpec]) -> list[jax.sharding.Sharding]:
        """The shardings of inputs or outputs; see `row_specs`."""
        return [self.sharding(spec) for spec in self.row_specs(of, inputs)]

    def putters(
        self, inputs: Mapping[str, TensorSpec], sizes: Mapping[str, int]
    ) -> list[Callable[[np.ndarray], jax.Array]]:
        """For each input, the function that puts arrays of its shape at these sizes where it belongs."""
        if self.mesh is None:
            return [_xla.putter(spec.shape_at(sizes), np.dtype(spec.dtype), self.first) for spec in inputs.values()]
        return [functools.partial(jax.device_put, device=place) for place in self.of_rows(inputs, inputs)]

    def executor(self, executable: _xla.Loaded, specs: Sequence[Spec]) -> Callable[[list[jax.Array]], list[jax.Array]]:
        """The function that runs an executable whose outputs are cut so, on arrays that are on these devices."""
        if self.mesh is None:
            return _xla.executor(executable)
        counts = [tuple(pieces(part, self.mesh.shape) for part in spec) for spec in specs]
        return _xla.executor_of_several(executable, list(zip(counts, map(self.sharding, specs), strict=True)))

    def shardings(
        self, weights: Sequence[jax.Array], inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]
    ) -> dict[str, Any] | None:
        """Where `jax.jit` must put what a model takes and returns, and how cut; None for the first device."""
        if self.is_usual:
            return None
        return {
            "in_shardings": (*(leaf.sharding for leaf in weights), *self.of_rows(inputs, inputs)),
            "out_shardings": tuple(self.of_rows(outputs, inputs)),
        }

    def unpacking(self, stored: Sequence[jax.Array], unpacked: Sequence[Spec]) -> dict[str, Any] | None:
        """Where `jax.jit` must put what the unpacking of weights takes and returns; None for the first device."""
        if self.is_usual:
            return None
        if self.mesh is None:
            return {"in_shardings": tuple(leaf.sharding for leaf in stored)}
        return {
            "in_shardings": tuple(leaf.sharding for leaf in stored),
            "out_shardings": tuple(map(self.sharding, unpacked)),
        }

    def check_rows(self, inputs: Mapping[str, TensorSpec], sizes: Mapping[str, int]) -> None:
        """Check that the mesh can split the rows of a bucket.

        Raises:
            ShardingError: if not; names the bucket.
        """
        rows, count = row_symbol(inputs), 1 if self.mesh is None else pieces(self.batch, self.mesh.shape)
        if rows is not None and sizes[rows] % count:
            cut = " and ".join(f"{axis}={self.mesh.shape[axis]}" for axis in self.batch) if self.mesh else ""
            raise ShardingError(
                f"bucket {rows}={sizes[rows]} cannot be split over {cut}; choose multiples of {count}, or rules with "
                "batch = [], which give every device all rows"
            )


def part_shape(shape: Sequence[int], spec: Spec, mesh: MeshEntry) -> tuple[int, ...]:
    """The shape of the part of an array that one device holds.

    >>> part_shape((8, 6), ((), ("model",)), MeshEntry(axes={"model": 2}))
    (8, 3)
    """
    counts = [pieces(part, mesh.axes) for part in spec] + [1] * (len(shape) - len(spec))
    return tuple(size // count for size, count in zip(shape, counts, strict=True))


def devices_here(entry: MeshEntry | None) -> int:
    """Number of devices that an artifact runs on in this process: all of its mesh, or one.

    >>> devices_here(None), devices_here(MeshEntry(axes={"model": 1000}))
    (1, 1)
    """
    return 1 if entry is None or len(jax.devices()) < entry.count else entry.count


def platform_here() -> str:
    """`cpu`, `gpu` or `tpu`: what the first device of this process is.

    Raises:
        ExecutionError: if there is none.

    >>> platform_here()
    'cpu'
    """
    return _xla.device_numbered(0, quick=True).platform


def count_here() -> int:
    """Number of devices of this process.

    Raises:
        ExecutionError: if there is none.

    >>> count_here() >= 1
    True
    """
    return _xla.count_devices()


def spec_of(sharding: jax.sharding.Sharding) -> Spec:
    """How a sharding cuts an array, for the manifest.

    >>> spec_of(jax.NamedSharding(jax.make_mesh((1,), ("model",), devices=jax.devices()[:1]), jax.P(None, "model")))
    ((), ('model',))
    """
    parts: PartitionSpec | tuple[()] = sharding.spec if isinstance(sharding, jax.sharding.NamedSharding) else ()
    return tuple(axes_of(part) for part in as_spec(parts))
