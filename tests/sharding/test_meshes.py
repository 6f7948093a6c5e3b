"""Meshes from text: sizes, order of devices, slices, and what does not fit."""

import types

import jax
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.sharding.meshes import abstract_mesh, arranged, mesh, mesh_sizes

AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit


def test_a_mesh_has_all_devices_in_order_and_auto_axes():
    made = mesh("data=-1, model=1")
    assert dict(made.shape) == {"data": 2, "model": 1}
    assert made.devices.ravel().tolist() == jax.devices()
    assert made.axis_types == (AUTO, AUTO)
    assert mesh({"data": 2}, explicit=True).axis_types == (EXPLICIT,)
    assert mesh("data=-1", jax.devices()[1:]).devices.tolist() == jax.devices()[1:]


@pytest.mark.parametrize(
    ("text", "count", "shape"),
    [("data=-1,model=2", 8, (4, 2)), ("a=2,b=-1,c=2", 8, (2, 2, 2)), ("data=-1", 1, (1,)), ("a=2,b=4", 8, (2, 4))],
)
def test_minus_one_takes_the_devices_that_are_left(text, count, shape):
    assert tuple(mesh_sizes(text, count).values()) == shape


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data=3", "'data=3' takes 3 devices, but there are 2"),
        ("data=1", "takes 1 device, but there are 2: set one size to -1"),
        ("data=-1,model=4", "take 4 devices, which do not divide those there are .2."),
        ("data=-1,model=-1", "only one size can be -1"),
        ("data=1,data=2", "names the axis 'data' twice"),
        ("data=0", "sizes of at least 1"),
        ("data=-2", "sizes of at least 1"),
        ("data=--1", "sizes of at least 1"),
        ("data=two", "sizes of at least 1"),
        ("data", "sizes of at least 1"),
        ("", "sizes of at least 1"),
        ("=2", "sizes of at least 1"),
        ({"a b": 2}, "sizes of at least 1"),
        ({}, "at least one axis"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(text, said):
    with pytest.raises(lx.ShardingError, match=said):
        mesh(text)


def test_an_abstract_mesh_needs_no_devices():
    assert dict(abstract_mesh("data=-1,model=4", 64).shape) == {"data": 16, "model": 4}
    assert dict(abstract_mesh("data=-1,model=64", 2).shape) == {"data": 1, "model": 64}
    with pytest.raises(lx.ShardingError, match="only one size"):
        abstract_mesh("data=-1,model=-1", 2)


def slices(count, each):
    """Fake devices of several slices, not in order."""
    made = [
        types.SimpleNamespace(
            id=number, slice_index=number // each, process_index=0, platform="fake", device_kind="fake"
        )
        for number in range(count * each)
    ]
    return made[::2] + made[1::2]


@pytest.mark.parametrize(("shape", "outer"), [((4, 2), 0), ((1, 8), 1), ((3, 4), 1)])
def test_slices_are_split_along_one_axis(shape, outer):
    sizes = dict(zip("ab", shape, strict=True))
    count = int(np.prod(shape)) // 2
    grid = arranged(sizes, slices(2, count), "test")
    assert grid.shape == shape
    index = np.vectorize(lambda device: device.slice_index)(grid)
    first, second = np.split(index, 2, axis=outer)
    assert (first == 0).all()
    assert (second == 1).all()


def test_slices_that_no_axis_can_hold_are_refused():
    with pytest.raises(lx.ShardingError, match=r"'a=3,b=5': the devices are in 2 slices, so .* divisible by 2"):
        arranged({"a": 3, "b": 5}, slices(2, 8)[:15], "a=3,b=5")
