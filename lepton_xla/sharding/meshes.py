"""Meshes of devices from text such as `data=-1,model=2`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lepton_xla.arguments import takes
from lepton_xla.deferred import jax
from lepton_xla.errors import ShardingError

if TYPE_CHECKING:
    from jax.sharding import AbstractMesh, Mesh

type AnyMesh = Mesh | AbstractMesh


@takes(sizes=(str, Mapping), devices=Sequence)
def mesh(
    sizes: str | Mapping[str, int], devices: Sequence[Any] | None = None, *, explicit: bool = False
) -> jax.sharding.Mesh:
    """Arrange devices in a grid with named axes.

    Neighbours on the last axis are closest to each other, so tensor parallelism belongs there. Devices of several
    slices (TPU pods that a slower network connects) are split along the first axis that the number of slices divides.

    Args:
        sizes: size by axis, such as `"data=-1,model=2"` or `{"data": -1, "model": 2}`. One size may be -1: all devices
            that the others leave.
        devices: the devices to use; by default all devices of all processes.
        explicit: whether axes are Explicit, so that shardings are part of types. By default they are Auto: the compiler
            chooses the shardings of intermediate values, and any model works.

    Raises:
        ShardingError: if the text has another form, an axis occurs twice, two sizes are -1, the sizes do not use all
            devices, or no axis can be split over the slices.

    >>> lx.sharding.mesh("data=-1,model=1").axis_names
    ('data', 'model')
    >>> lx.sharding.mesh("data=3", jax.devices()[:1])
    Traceback (most recent call last):
    lepton_xla.errors.ShardingError: mesh 'data=3' takes 3 devices, but there is 1: ...
    """
    found = list(jax.devices()) if devices is None else list(devices)
    shape = mesh_sizes(sizes, len(found))
    axis_type = jax.sharding.AxisType
    kind = axis_type.Explicit if explicit else axis_type.Auto
    grid = arranged(shape, found, described(sizes))
    return jax.sharding.Mesh(grid, tuple(shape), axis_types=(kind,) * len(shape))


def abstract_mesh(sizes: str | Mapping[str, int], count: int) -> AbstractMesh:
    """Make a mesh without devices, for placements on a machine that does not have them.

    Args:
        sizes: as `mesh` takes them.
        count: number of devices that -1 distributes. If the other sizes take more, -1 becomes 1.

    Raises:
        ShardingError: as `mesh`, but the sizes need not use `count` devices.

    >>> abstract_mesh("data=-1,model=4", 8).shape, abstract_mesh("data=-1,model=4", 1).shape
    (OrderedDict({'data': 2, 'model': 4}), OrderedDict({'data': 1, 'model': 4}))
    """
    given = parsed(sizes)
    rest = math.prod(size for size in given.values() if size != -1)
    shape = {name: max(count // rest, 1) if size == -1 else size for name, size in given.items()}
    kinds = (jax.sharding.AxisType.Auto,) * len(shape)
    return jax.sharding.AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=kinds)


def parsed(sizes: str | Mapping[str, int]) -> dict[str, int]:
    """Read the sizes of axes; one may be -1.

    Raises:
        ShardingError: if the text has another form, an axis occurs twice, or two sizes are -1.

    >>> parsed("data=-1, model=2")
    {'data': -1, 'model': 2}
    """
    pairs = [part.partition("=")[::2] for part in sizes.split(",")] if isinstance(sizes, str) else list(sizes.items())
    text, found = described(sizes), dict[str, int]()
    for axis, value in pairs:
        name, size = str(axis).strip(), str(value).strip()
        digits = size.removeprefix("-")
        if not name.isidentifier() or not (digits.isascii() and digits.isdigit() and (int(size) > 0 or size == "-1")):
            raise ShardingError(
                f"mesh {text!r}: expected axes with sizes of at least 1, or -1 for one, such as data=-1,model=2"
            )
        if name in found:
            raise ShardingError(f"mesh {text!r} names the axis {name!r} twice")
        found[name] = int(size)
    if not found:
        raise ShardingError("a mesh needs at least one axis, such as data=-1")
    if sum(size == -1 for size in found.values()) > 1:
        raise ShardingError(f"mesh {text!r}: only one size can be -1; the others must be given")
    return found


def mesh_sizes(sizes: str | Mapping[str, int], count: int) -> dict[str, int]:
    """Find the size of each axis on `count` devices.

    Raises:
        ShardingError: if the sizes do not use all devices.

    >>> mesh_sizes("data=-1,model=2", 8)
    {'data': 4, 'model': 2}
    """
    shape, text = parsed(sizes), described(sizes)
    rest = math.prod(size for size in shape.values() if size != -1)
    there = f"there {'is' if count == 1 else 'are'} {count}"
    if -1 in shape.values():
        if count % rest or count < rest:
            raise ShardingError(
                f"mesh {text!r}: the given sizes take {rest} devices, which do not divide those there are ({count}); "
                f"choose sizes that divide {count}"
            )
        return {name: count // rest if size == -1 else size for name, size in shape.items()}
    if rest > count:
        raise ShardingError(
            f"mesh {text!r} takes {rest} devices, but {there}: choose smaller sizes, -1 for one of them, or a machine "
            "with more devices (on a CPU, JAX_NUM_CPU_DEVICES gives any number)"
        )
    if rest < count:
        raise ShardingError(
            f"mesh {text!r} takes {rest} {'device' if rest == 1 else 'devices'}, but {there}: set one size to -1, or "
            f"choose them: devices=jax.devices()[:{rest}]"
        )
    return shape


def described(sizes: str | Mapping[str, int]) -> str:
    """The text of a mesh.

    >>> described({"data": 4, "model": 2})
    'data=4,model=2'
    """
    return sizes if isinstance(sizes, str) else ",".join(f"{name}={size}" for name, size in sizes.items())


def arranged(shape: Mapping[str, int], devices: Sequence[Any], text: str) -> np.ndarray[Any, Any]:
    """Put devices into a grid: neighbours of the last axis are closest, several slices are split along one axis.

    Args:
        shape: size by axis.
        devices: as many as the sizes multiply to.
        text: name of the mesh in messages.

    Raises:
        ShardingError: if no axis can be split over the slices.

    >>> arranged({"data": 1}, jax.devices()[:1], "data=1").shape
    (1,)
    """
    sizes = tuple(shape.values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    from jax.experimental import mesh_utils

    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    outer = next((place for place, size in enumerate(sizes) if size % slices == 0), None)
    if outer is None:
        raise ShardingError(
            f"mesh {text!r}: the devices are in {slices} slices, so the size of one axis must be divisible by {slices}"
        )
    between = tuple(slices if place == outer else 1 for place in range(len(sizes)))
    within = tuple(size // many for size, many in zip(sizes, between, strict=True))
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
