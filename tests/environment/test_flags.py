"""Flags under which XLA:CPU computes int8 slowly: named at optimize and at load, judged as XLA takes them."""

import logging
import os
import subprocess
import sys

import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.environment.flags import slow_flags, warn_of_slow_flags

FLAG = "--xla_cpu_experimental_ynn_fusion_type"
# What XLA's program text said of a product and a convolution of int8 under each (jaxlib 0.12.0.1).
CASES = {
    "": "products and convolutions",
    "reduce": "products and convolutions",
    "dot": "products and convolutions",
    "individual_dot": "convolutions",
    "-individual_dot": "products",
    "-individual_convolution": "convolutions",
    "-reduce": "",
    "+reduce": "",
    "-dot": "",
    "individual_dot,individual_convolution": "",
}


@pytest.mark.parametrize(("value", "slow"), CASES.items())
def test_what_a_flag_takes_away(value, slow):
    said = slow_flags(f"--xla_cpu_max_isa=AVX512 {FLAG}={value}")
    assert said == (f"{FLAG}={value}: it disables kernels without which int8 {slow} are many times slower" * bool(slow))


def test_the_last_one_counts_and_other_flags_do_not():
    assert slow_flags("") == slow_flags("--xla_cpu_max_isa=AVX2") == slow_flags(f"{FLAG}= {FLAG}=-reduce") == ""
    assert slow_flags(f"{FLAG}=-reduce {FLAG}=").startswith(f"{FLAG}=: ")


def test_optimize_and_load_warn(monkeypatch, caplog, tmp_path):
    program = lx.trace(
        lambda w, x: x @ w["w"], {"w": np.ones((4, 4), np.float32)}, {"x": lx.TensorSpec((2, 4), "float32")}
    )
    lx.compile(program, {}).save(tmp_path / "a.lepton")
    monkeypatch.setenv("XLA_FLAGS", f"{FLAG}=")
    uses = (lambda: lx.optimize(program, lx.Recipe(name="none", fold=False)), lambda: lx.load(tmp_path / "a.lepton"))
    for use in uses:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            use()
        assert f"XLA_FLAGS has {FLAG}=: it disables" in caplog.text
    caplog.clear()
    warn_of_slow_flags(logging.getLogger("lepton_xla"), "gpu")
    assert not caplog.text


@pytest.mark.parametrize("value", ["-individual_dot", "individual_dot"])
def test_xla_itself_agrees(value):
    """Whether a product and a convolution of int8 are handed over, as XLA's program text says."""
    code = """
import jax, jax.numpy as jnp
ones = lambda *shape: jnp.ones(shape, jnp.int8)
dot = lambda a, b: jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
numbers = ("NHWC", "HWIO", "NHWC")
conv = lambda x, k: jax.lax.conv_general_dilated(
    x, k, (1, 1), "SAME", dimension_numbers=numbers, preferred_element_type=jnp.int32
)
for fn, args in ((dot, (ones(32, 1024), ones(1024, 1024))), (conv, (ones(1, 16, 16, 64), ones(3, 3, 64, 64)))):
    print("ynn" not in jax.jit(fn).lower(*args).compile().as_text())
"""
    environment = os.environ | {"XLA_FLAGS": f"{FLAG}={value}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    said = slow_flags(f"{FLAG}={value}")
    assert done.stdout.split() == [str("products" in said), str("convolutions" in said)]
