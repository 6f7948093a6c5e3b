"""Strict JAX for every test: two fake devices, no implicit dtype or rank promotion, no silent 64-bit."""

import gc
import os
import shutil

import hypothesis
import jax
import pytest

os.environ["LEPTON_KERNELS"] = "off"  # what is installed changes no test; those of tests/kernels use them
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


def pytest_configure(config):
    """Keeps what XLA compiles for the next run, and for the other process of this one.

    Two thirds of the time of most tests is XLA's. Entries are keyed by the program, the options, and the versions of
    jaxlib and XLA. `compiler/` never reads them. `JAX_COMPILATION_CACHE_DIR` names another folder, which CI may keep.
    """
    cache = config.rootpath / "build" / "test-cache"
    if not hasattr(config, "workerinput") and sum(file.stat().st_size for file in cache.glob("*")) > 1 << 30:
        shutil.rmtree(cache, ignore_errors=True)
    jax.config.update("jax_compilation_cache_dir", jax.config.jax_compilation_cache_dir or str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_finish():
    """Modules and tests stay to the end: the collector need not walk through them each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _walked_once():
    """What JAX keeps of a module's tests stays too; a twentieth of the time of all tests was the collector's."""
    yield
    gc.collect()
    gc.freeze()


# Tests that compare what is computed with NumPy. They compile for most of their time, and optimizations of LLVM are not
# what they look at. What is compiled to be timed or served is compiled as users do, but for tests of commands.
_MATHEMATICS = {"passes", "quant", "train", "tuning", "test_pipeline", "test_preset_zoo", "test_program", "test_nnx"}
_MATHEMATICS |= {"federated", "test_recipe_frameworks", "test_recipe_methods", "test_transformer", "test_callbacks"}
_MATHEMATICS |= {"cli", "evaluation", "explanation", "exporting", "generation", "learning", "sharding", "test_waiting"}
_TIMED = {"test_attention", "test_integer_arithmetic", "test_measure", "test_products"}


@pytest.fixture(autouse=True, scope="module")
def _compiled_quickly(request):
    names = request.path.relative_to(request.config.rootpath).with_suffix("").parts
    mathematics = bool(_MATHEMATICS.intersection(names)) and not _TIMED.intersection(names)
    jax.config.update("jax_disable_most_optimizations", mathematics)


@pytest.fixture
def browser():
    """A page of a headless Chromium. Neither it nor playwright is a package of the project."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as run:
        running = run.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = running.new_page(viewport={"width": 390, "height": 800})
        page.said = []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("dialog", lambda dialog: dialog.accept())
        yield page
        running.close()
