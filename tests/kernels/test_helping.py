"""Threads of XLA's pool that take parts of kernels."""

import concurrent.futures
import os
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lepton_xla.kernels import convolution
from lepton_xla.kernels.convolution import Geometry

GEOMETRY = Geometry((3, 3), padding=((1, 1), (1, 1)))


def program(seed):
    """A convolution that is spread over threads, its operands, and its result by XLA."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((1, 24, 24, 32)).astype(np.float32)
    weight = random.standard_normal((3, 3, 32, 32)).astype(np.float32)
    compute = jax.jit(lambda x, weight: convolution.convolve(x, weight, GEOMETRY))
    expected = jax.lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return compute, (jnp.asarray(x), jnp.asarray(weight)), np.asarray(expected)


def test_programs_that_run_at_once(kernels):
    """They share the threads that help, and none gets another one's parts."""

    def run(seed):
        compute, operands, expected = program(seed)
        for _ in range(50):
            np.testing.assert_allclose(compute(*operands), expected, rtol=1e-4, atol=1e-3)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(run, seed) for seed in range(4)]:
            done.result()


def helpers():
    """The threads of XLA's pool."""
    tasks = pathlib.Path("/proc/self/task").iterdir()
    return [int(task.name) for task in tasks if (task / "comm").read_text().startswith("tf_XLAEigen")]


@pytest.mark.skipif(sys.platform != "linux", reason="only there threads are kept to processors")
def test_threads_keep_the_processors_that_somebody_gives_them(kernels):
    """Who wakes them lends them others for that moment only."""
    compute, operands, _ = program(0)

    def run():
        for _ in range(20):
            compute(*operands).block_until_ready()
            time.sleep(0.001)  # so that they sleep, and are woken again

    run()
    threads = helpers()
    before = {thread: os.sched_getaffinity(thread) for thread in threads}
    assert all(mask == os.sched_getaffinity(0) for mask in before.values())
    for one in sorted(os.sched_getaffinity(0))[:2]:
        for thread in threads:
            os.sched_setaffinity(thread, {one})
        run()
        assert all(os.sched_getaffinity(thread) == {one} for thread in threads)
    for thread, mask in before.items():
        os.sched_setaffinity(thread, mask)
