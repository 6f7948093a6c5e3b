"""Weights that are kept are packed once; what is not kept is read on each call."""

import concurrent.futures
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_integer_product import array, reference, stored

import lepton_xla as lx
from lepton_xla.kernels import convolution, integer_product, keeping
from lepton_xla.quant import QTensor

ROWS, DEPTH, COLUMNS = 20, 100, 130


@pytest.fixture
def product():
    """Multiplies by a weight in memory that NumPy may change behind JAX's back; the memory, and the weight."""
    room = np.zeros(DEPTH * COLUMNS + 64, np.int8)
    start = -room.ctypes.data % 64
    memory = room[start : start + DEPTH * COLUMNS].reshape(COLUMNS, DEPTH)
    memory[:] = np.asarray(stored(DEPTH, COLUMNS).values)
    codes = jax.device_put(memory)
    if codes.unsafe_buffer_pointer() != memory.ctypes.data:
        pytest.skip("this JAX copies aligned arrays")
    scale = stored(DEPTH, COLUMNS).scale
    weight = QTensor(codes, scale, "int8", DEPTH, transposed=True)
    x = array(ROWS, DEPTH)
    multiply = jax.jit(integer_product.multiply)
    return memory, weight, x, lambda: np.asarray(multiply(x, weight))


def test_a_kept_weight_is_packed_once_and_released_ones_are_read_again(variants, product):
    memory, weight, x, multiply = product
    for variant in variants():
        memory[:] = np.asarray(stored(DEPTH, COLUMNS).values)
        before = reference(x, weight)
        with keeping.Kept([weight.values, weight.scale]) as kept:
            assert kept.count == 1
            np.testing.assert_array_equal(multiply(), before)
            memory[:] = -memory  # nobody may do so: it shows whether the weight was read
            after = reference(x, weight)
            np.testing.assert_array_equal(multiply(), after if variant == "portable" else before)
        np.testing.assert_array_equal(multiply(), after)


def test_it_is_kept_until_the_last_one_lets_go(variants, product):
    memory, weight, x, multiply = product
    next(variants())
    before = reference(x, weight)
    first, second = (keeping.Kept([weight.values]) for _ in range(2))
    multiply()
    memory[:] = 0
    first.close()
    first.close()
    np.testing.assert_array_equal(multiply(), before)
    del second
    gc.collect()
    np.testing.assert_array_equal(multiply(), 0 * before)


def test_bytes_of_packed_copies_are_counted_while_they_are_there(variants, product):
    memory, weight, _, multiply = product
    for variant in variants():
        kept = keeping.Kept([weight.values, weight.scale])
        assert kept.nbytes == 0  # nothing is packed before it is needed
        multiply()
        multiply()
        assert kept.nbytes == 0 if variant == "portable" else memory.nbytes <= kept.nbytes < 4 * memory.nbytes
        kept.close()
        assert kept.nbytes == 0


def test_a_loaded_artifact_counts_what_kernels_packed_of_it(variants, tmp_path):
    if next(variants()) == "portable":
        pytest.skip("the portable kernels pack nothing")
    spec = {"x": lx.TensorSpec(("batch", 256), "float32")}
    plain = lx.trace(lambda w, x: x @ w["w"], {"w": array(256, 256)}, spec)
    small = plain.replace(fn=lambda w, x: integer_product.multiply(x, w["w"]), weights={"w": stored(256, 256)})
    lx.compile(small, {"batch": (16,)}).save(tmp_path / "small.lepton")
    servable = lx.load(tmp_path / "small.lepton")
    before = servable.nbytes
    servable(x=np.ones((16, 256), np.float32))
    assert servable.nbytes - before >= 256 * 256


def test_threads_that_pack_at_once(variants):
    weight, x = stored(384, 700), array(40, 384)
    expected = reference(x, weight)
    multiply = jax.jit(integer_product.multiply)
    multiply(x, weight)
    for _ in variants():
        for _ in range(5):
            with keeping.Kept([weight.values]), concurrent.futures.ThreadPoolExecutor(4) as pool:
                for got in pool.map(lambda _: multiply(x, weight), range(8)):
                    np.testing.assert_array_equal(got, expected)


def test_few_rows_of_a_kept_weight_and_many(variants):
    for rows, depth, columns in [(1, 384, 384), (7, 100, 70), (3, 5, 2), (33, 1536, 65), (410, 200, 130)]:
        weight, x = stored(depth, columns), array(rows, depth)
        for _ in variants():
            with keeping.Kept([weight.values]):
                for _ in range(2):
                    np.testing.assert_array_equal(
                        integer_product.multiply(jnp.asarray(x), weight), reference(x, weight)
                    )


def test_what_no_kernel_multiplies_is_not_kept(monkeypatch, kernels):
    del kernels
    others = [jnp.ones((4, 4)), jnp.ones(4, jnp.int8), np.ones((4, 4), np.int8)]
    assert keeping.Kept(others).count == 0
    monkeypatch.setenv("LEPTON_KERNELS", "off")
    assert keeping.Kept([jnp.ones((4, 4), jnp.int8)]).count == 0


def test_convolutions_of_kept_codes(variants):
    """The same codes as windows with several dilations, which are packed differently."""
    images = array(2, 9, 9, 6)
    codes = jax.random.randint(jax.random.key(0), (3 * 3 * 6, 21), -127, 128, jnp.int8)
    weight = QTensor(codes, jnp.full((1, 21), 0.01), "int8", 54)
    geometries = [convolution.Geometry((3, 3), dilation=(size, size)) for size in (1, 2)]
    for _ in variants():
        convolve = [jax.jit(functools.partial(convolution.convolve_codes, geometry=each)) for each in geometries]
        before = [each(images, weight) for each in convolve]
        with keeping.Kept([codes]) as kept:
            assert kept.count == 1
            for _ in range(2):
                for each, expected in zip(convolve, before, strict=True):
                    np.testing.assert_array_equal(each(images, weight), expected)
