"""Kernels on two devices: each computes its part of the result, of its parts of the operands, and gathers nothing."""

import dataclasses
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lepton_xla.kernels import attention, installation, integer_product, norm, weight_only
from lepton_xla.kernels.epilogue import Epilogue
from lepton_xla.quant import quantize


def array(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


WEIGHT, EPILOGUE = jnp.asarray(array(64, 32)), (array(32), array(8, 32))
INT4, INT8 = quantize(WEIGHT, "int4", "group:16"), quantize(WEIGHT, "int8", "channel").by_columns()


def multiply(x, values, scale, bias, residual):
    weight = dataclasses.replace(INT4, values=values, scale=scale)
    return weight_only.multiply(x, weight, Epilogue(bias, "relu", residual))


def multiply_integers(x, codes, scale, bias, residual):
    weight = dataclasses.replace(INT8, values=codes, scale=scale)
    return integer_product.multiply(x, weight, None, Epilogue(bias, "relu", residual))


def attend(*operands):
    return attention.attend(*operands, heads_first=True)


PRODUCT = (array(8, 64), INT4.values, INT4.scale, *EPILOGUE)
INTEGERS = (array(8, 64), INT8.values, INT8.scale, *EPILOGUE)
HEADS = (array(2, 5, 4, 8), array(2, 4, 7, 8), array(2, 4, 7, 8), array(2, 1, 5, 1))
# What is computed, of what, and how the operands and the result are cut.
CASES = {
    "rows": (multiply, PRODUCT, ("d,;,;,;;d,", "d,")),
    "columns": (multiply, PRODUCT, (",;,d;,d;d;,d", ",d")),
    "rows of integers": (multiply_integers, INTEGERS, ("d,;,;,;;d,", "d,")),
    "columns of integers": (multiply_integers, INTEGERS, (",;d,;,d;d;,d", ",d")),
    "examples": (attend, HEADS, ("d,,,;d,,,;d,,,;d,,,", "d,,,")),
    "heads": (attend, HEADS, (",,d,;,d,,;,d,,;,,,", ",,d,")),
    "norms": (norm.normalize, (array(8, 64), array(64), array(64)), ("d,;;", "d,")),
}


ON_FOUR = """
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
from lepton_xla.kernels import attention, installation
mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
x = jax.random.normal(jax.random.key(0), (2, 5, 16))
columns = jax.NamedSharding(mesh, jax.P(None, None, "model"))
w = jax.device_put(jax.random.normal(jax.random.key(1), (3, 16, 16)), columns)
def fn(x, w):
    query, key, value = ((x @ each).reshape(2, 5, 2, 8) for each in w)
    return attention.attend(query, key, value)
compiled = jax.jit(fn).lower(x, w).compile()
assert installation.PREFIX in compiled.as_text()
np.testing.assert_allclose(compiled(x, w), jax.jit(fn)(x, np.asarray(w)), rtol=1e-5, atol=1e-5)
"""


def test_two_heads_on_four_devices(kernels):
    environ = {name: each for name, each in os.environ.items() if name not in ("LEPTON_KERNELS", "XLA_FLAGS")}
    done = subprocess.run([sys.executable, "-c", ON_FOUR], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_cache_of_compiled_programs_tells_what_is_computed_from_something_else(kernels):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    given = [jax.device_put(each, cut(mesh, "d,,,")) for each in HEADS[:3]]
    texts = set()
    for scale in (1.0, 0.5):
        lowered = jax.jit(lambda *operands, scale=scale: attention.attend(*operands, heads_first=True, scale=scale))
        texts.add(re.sub(r"backend_config = .*?[,}]", "", lowered.lower(*given).as_text()))
    assert len(texts) == 2


def cut(mesh, axes):
    return jax.NamedSharding(mesh, jax.P(*(axis or None for axis in axes.split(","))))


@pytest.mark.parametrize(("fn", "operands", "axes"), CASES.values(), ids=CASES.keys())
def test_each_device_computes_its_part(kernels, fn, operands, axes):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    given = [jax.device_put(each, cut(mesh, part)) for each, part in zip(operands, axes[0].split(";"), strict=True)]
    compiled = jax.jit(fn).lower(*given).compile()
    text = compiled.as_text()
    assert installation.PREFIX in text
    assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
    out = compiled(*given)
    assert out.sharding.is_equivalent_to(cut(mesh, axes[1]), out.ndim)
    np.testing.assert_array_equal(out, jax.jit(fn)(*map(jnp.asarray, operands)))
