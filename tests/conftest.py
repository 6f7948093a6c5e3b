"""Strict JAX for every test: two fake devices, no implicit dtype or rank promotion, no silent 64-bit."""

import os

import hypothesis
import jax
import pytest

os.environ["LEPTON_CACHE"] = "off"  # no test reads or writes the user's; also of processes that tests start
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# How long an example takes says something about the machine, not about the code.
hypothesis.settings.register_profile(
    "lepton", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("lepton")

# Folders of tests that compare what is computed with NumPy. They compile for most of their time, and optimizations of
# LLVM are not what they look at. What is compiled to be timed, kept or served is compiled as users do.
_MATHEMATICS = {"passes", "quant", "train"}
_TIMED = {"test_attention", "test_lower", "test_measure", "test_products"}


@pytest.fixture(autouse=True, scope="module")
def _compiled_quickly(request):
    mathematics = request.path.parent.name in _MATHEMATICS and request.path.stem not in _TIMED
    jax.config.update("jax_disable_most_optimizations", mathematics)
