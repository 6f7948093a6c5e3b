"""Annotations say the shapes and dtypes that public functions of `quant` take and return."""

import dataclasses
import functools
import inspect
import types
import typing

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from lepton_xla import quant


@functools.cache
def declared(item):
    """Annotations of a function or of a class's fields, by name."""
    names = item.__globals__ if inspect.isfunction(item) else vars(inspect.getmodule(item))
    return typing.get_type_hints(item, {**names, **vars(jaxtyping), "Array": jax.Array})


def fits(value, kind):
    """Whether a value is of a kind, as far as the kind is a class, or one of some."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return any(not isinstance(one, type) or isinstance(value, one) for one in kinds)


def checked(function, *args, **kwargs):
    """What a function returns; its arguments and that are checked, one size for each name."""
    kinds = declared(function)
    given = inspect.signature(function).bind(*args, **kwargs).arguments
    with jaxtyping.jaxtyped("context"):
        for name, value in given.items():
            assert fits(value, kinds.get(name, object)), f"{function.__name__}: {name}"
        result = function(*args, **kwargs)
        assert fits(result, kinds["return"]), f"{function.__name__}: what it returns"
    return result


def check_fields(item):
    with jaxtyping.jaxtyped("context"):
        for field in dataclasses.fields(item):
            assert fits(getattr(item, field.name), declared(type(item))[field.name]), field.name


@pytest.mark.parametrize(
    ("name", "granularity"),
    [("int8", "channel"), ("int4", "group:4"), ("uint4", "channel"), ("fp8_e4m3", "tensor"), ("codebook4", "tensor")],
)
def test_arrays_are_as_annotated(name, granularity):
    target, matrix = quant.FORMATS[name], jnp.asarray(np.linspace(-1, 1, 48, dtype=np.float32).reshape(2, 8, 3))
    check_fields(checked(quant.make_grid, matrix, target, granularity))
    tensor = checked(quant.quantize, matrix, name, granularity)
    check_fields(tensor)
    codes = checked(quant.QTensor.codes, tensor)
    assert codes.shape == checked(quant.QTensor.dequantize, tensor, "bfloat16").shape == matrix.shape
    if granularity == "channel" and not target.learned:
        zero = tensor.zero_point
        np.testing.assert_array_equal(checked(quant.encode, matrix, tensor.scale, target, zero), codes)
        checked(quant.fake_quantize, matrix, codes, tensor.scale, target, zero)


def test_a_scale_is_as_annotated():
    largest = checked(quant.magnitude, jnp.ones((4, 3), jnp.bfloat16), [0])
    assert checked(quant.absmax_scale, largest, quant.FORMATS["int8"]).shape == (1, 3)


def test_the_check_sees_another_shape_and_dtype():
    with pytest.raises(AssertionError, match="encode: scale"):
        checked(quant.encode, jnp.ones((4, 3)), jnp.ones((1, 2)), quant.FORMATS["int8"])
    with pytest.raises(AssertionError, match="quantize: matrix"):
        checked(quant.quantize, jax.ShapeDtypeStruct((4, 3), jnp.float32), "int8")
    with pytest.raises(AssertionError, match="absmax_scale: absmax"):
        checked(quant.absmax_scale, jnp.ones(3, jnp.int8), quant.FORMATS["int8"])
