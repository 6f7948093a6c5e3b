"""Strict JAX for every test: two fake devices, no implicit dtype or rank promotion, no silent 64-bit."""

import hypothesis
import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# How long an example takes says something about the machine, not about the code.
hypothesis.settings.register_profile(
    "lepton", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("lepton")
