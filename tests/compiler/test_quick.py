"""Loading and serving without JAX: the same answers as with it, and what needs JAX imports it later."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jaxlib import xla_client

from lepton_xla import _jaxlib
from lepton_xla.program import TensorSpec, trace

_LOAD = """
import sys
sys.path[:0] = {path!r}
{before}
import numpy as np
import lepton_xla as lx
def rows(servable, count=3):
    return {{
        name: np.arange(count * 4, dtype=np.float32).astype(spec.dtype).reshape(count, 4) / 8
        for name, spec in servable.inputs.items()
    }}
def said(servable):
    return {{name: value.astype(np.float64).tolist() for name, value in servable(**rows(servable)).items()}}
def has_jax():
    return "jax" in sys.modules
import json
"""


def fresh(code: str, *args: object, before: str = "", environment: dict[str, str] | None = None) -> dict:
    """Runs code in a process of its own, which prints one JSON document at the end."""
    path = [*sys.path, str(pathlib.Path(__file__).parent)]
    names = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_FLAGS"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _LOAD.format(path=path, before=before) + code, *map(str, args)],
        capture_output=True, text=True, check=False, env=names | {"JAX_PLATFORMS": "cpu"} | (environment or {}),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}


def program(dtype: str = "float32", scale: float = 1.0):
    weights = {"w": scale * jax.random.normal(jax.random.key(0), (4, 5)).astype(dtype), "b": jax.numpy.ones(5, dtype)}

    def model(weights, x):
        return {"sum": x @ weights["w"] + weights["b"], "most": jax.numpy.argmax(x, axis=1)}

    return trace(model, weights, {"x": TensorSpec(("batch", 4), dtype)})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An artifact that was compiled where it is loaded: in a process with one device, as tests have two."""
    folder = tmp_path_factory.mktemp("quick")
    done = fresh(
        """
import jax, test_quick
from lepton_xla import compiler
for dtype in ("float32", "bfloat16"):
    compiler.compile(test_quick.program(dtype), {"batch": (1, 8)}, name="tiny").save(sys.argv[1] + "/" + dtype)
    base = lx.load(sys.argv[1] + "/" + dtype)
    compiler.make_update(base, test_quick.program(dtype, scale=2.0), version="2").save(sys.argv[1] + "/new-" + dtype)
recipe = lx.Recipe.load("int8-weight-only").replace({"measure": False})
small = lx.optimize(test_quick.program(), recipe, keep_master=True)
compiler.compile(small, {"batch": (1,)}, keep_master=True).save(sys.argv[1] + "/kept")
print(json.dumps({"made": True}))
""",
        folder,
    )
    assert done["made"]
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_answers_without_jax_what_it_answers_with_it(saved: pathlib.Path, dtype: str):
    code = """
servable = lx.load(sys.argv[1])
answers, device = said(servable), servable.runtime.devices.first
from lepton_xla import _jaxlib
from lepton_xla.compiler import _xla
from lepton_xla.kernels import installation, keeping
matrix = _xla.putter((4, 4), "int8", device)(np.ones((4, 4), np.int8))  # kept so that kernels pack it once
kept, before = [keeping.Kept([matrix]).count, installation.usable()], has_jax()
print(json.dumps({"answers": answers, "jax": before, "route": servable.route, "bytes": servable.nbytes, "kept": kept}))
"""
    quick, usual = fresh(code, saved / dtype), fresh(code, saved / dtype, before="import jax")
    assert not quick["jax"]
    assert usual["jax"]
    for each in (quick, usual):
        assert each.pop("stderr") == ""
        del each["jax"]
    assert quick == usual
    assert quick["route"] == "executables"
    assert quick["kept"] in ([1, True], [0, False])


def test_jax_may_be_imported_later(saved: pathlib.Path):
    found = fresh(
        """
import threading
servable = lx.load(sys.argv[1])
first = said(servable)
assert not has_jax()
seen = []
thread = threading.Thread(target=lambda: [seen.append(said(servable) == first) for _ in range(200)])
thread.start()
import jax, jax.numpy as jnp
thread.join()
other = lx.load(sys.argv[1])
product = float(jax.jit(lambda a: a @ a)(jnp.ones((3, 3))).sum())
shardings = [str(jnp.ones(2).sharding), str(jax.jit(lambda a: 2 * a)(jnp.ones(2)).sharding)]
print(json.dumps({"seen": all(seen) and len(seen) == 200, "same": said(other) == first == said(servable),
    "product": product, "shardings": shardings}))
""",
        saved / "float32",
    )
    assert found["seen"]
    assert found["same"]
    assert found["product"] == 27
    assert all(text.startswith("SingleDeviceSharding") for text in found["shardings"])


def test_new_weights_of_any_dtype_run_on_code_that_was_loaded_without_jax(saved: pathlib.Path):
    found = fresh(
        """
base = lx.load(sys.argv[1] + "/float32")
swapped = lx.load(sys.argv[1] + "/new-float32", base=base)
narrow = said(lx.load(sys.argv[1] + "/new-bfloat16", base=lx.load(sys.argv[1] + "/bfloat16")))
said(base)  # what jaxlib makes after code has run without JAX has no shape for JAX
quick = has_jax()
kept = sys.argv[1] + "/kept"
doubled = {path: 2 * each for path, each in lx.compiler.master_weights(kept).items()}
lx.compiler.requantize(kept, doubled).save(sys.argv[1] + "/doubled")
import test_quick
lx.compiler.make_update(base, test_quick.program(scale=2.0), version="3").save(sys.argv[1] + "/again")
again = lx.load(sys.argv[1] + "/again", base=base)
print(json.dumps({"quick": quick, "base": said(base), "swapped": said(swapped), "again": said(again), "narrow": narrow,
    "doubled": said(lx.load(sys.argv[1] + "/doubled", base=lx.load(kept)))}))
""",
        saved,
    )
    assert not found["quick"]
    expected = 2 * (np.array(found["base"]["sum"]) - 1) + 1
    np.testing.assert_allclose(found["swapped"]["sum"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["narrow"]["sum"], expected, rtol=0.02, atol=0.02)
    np.testing.assert_allclose(found["doubled"]["sum"], 2 * np.array(found["base"]["sum"]), rtol=0.02, atol=0.02)
    assert found["again"] == found["swapped"]


@pytest.mark.parametrize(
    "environment",
    [{"JAX_NUM_CPU_DEVICES": "2"}, {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}, {"JAX_ENABLE_X64": "1"}],
)
def test_other_settings_of_jax_are_left_to_jax(saved: pathlib.Path, environment: dict[str, str]):
    code = """
servable = lx.load(sys.argv[1])
print(json.dumps({"jax": has_jax(), "answers": said(servable)}))
"""
    assert fresh(code, saved / "float32", environment=environment)["jax"]


def test_what_must_be_compiled_is_compiled_by_jax(saved: pathlib.Path):
    found = fresh(
        """
import pathlib, shutil
from lepton_xla import _jaxlib
shutil.copytree(sys.argv[1], "copy.lepton")
from lepton_xla.compiler import fingerprint
real = fingerprint._xla.jaxlib_version
fingerprint._xla.jaxlib_version = lambda: "0.0.1"
there = lx.load("copy.lepton")
fingerprint._xla.jaxlib_version = real
print(json.dumps({"jax": has_jax(), "route": there.route, "same": said(there) == said(lx.load(sys.argv[1]))}))
""".replace('"copy.lepton"', repr(str(saved / "copy.lepton"))),
        saved / "float32",
    )
    assert found["jax"]
    assert found["route"] == "stablehlo"
    assert found["same"]
    assert "compiling 2 buckets" in found["stderr"]


@pytest.mark.parametrize(
    "change", ["VERSION = '0.13.0'", "putter = lambda *_: None", "_jax.SingleDeviceSharding = None"]
)
def test_another_jaxlib_is_left_to_jax(saved: pathlib.Path, change: str):
    found = fresh(
        f"""
from lepton_xla import _jaxlib
real = _jaxlib._jax.SingleDeviceSharding
_jaxlib.{change}
assert _jaxlib.quick_device() is None
_jaxlib._jax.SingleDeviceSharding = real
servable = lx.load(sys.argv[1])
print(json.dumps({{"jax": has_jax(), "answers": said(servable)}}))
""",
        saved / "float32",
    )
    assert found["jax"]


def test_code_that_calls_what_jax_registers_is_left_to_jax(saved: pathlib.Path):
    """Code that calls LAPACK without JAX would jump to address zero, or be refused."""
    for name in xla_client.custom_call_targets("cpu"):
        known = name.startswith("lepton_kernel_") or name == "dce_sink"  # the last is none of its own
        assert known or _jaxlib.needs_jax(name.encode()), name
    assert _jaxlib.needs_jax(b"...lapack_sgetrf_ffi...")


def test_only_the_plain_processor_is_quick(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in os.environ if name.startswith("JAX_")]:
        monkeypatch.delenv(name)
    assert _jaxlib._is_plain() == (not _jaxlib._other_devices())
    monkeypatch.setattr(_jaxlib.importlib.metadata, "entry_points", lambda group: ["a plugin"])
    assert not _jaxlib._is_plain()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert _jaxlib._is_plain()
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    assert not _jaxlib._is_plain()


def test_a_server_answers_without_jax(saved: pathlib.Path):
    found = fresh(
        """
from lepton_xla.serve import Client, Options, Server
from lepton_xla.serve.runtime import run_on_calling_thread
run_on_calling_thread()
x = rows(lx.load(sys.argv[1]))["x"]
with Server(lx.load(sys.argv[1]), Options(port=0)) as server, Client(server.url) as client:
    answers = client.infer("tiny", x=x)
    jax = has_jax()
print(json.dumps({"jax": jax, "sum": answers["sum"].tolist(), "direct": said(lx.load(sys.argv[1]))["sum"]}))
""",
        saved / "float32",
    )
    assert not found["jax"]
    assert found["sum"] == found["direct"]


def test_a_repository_takes_whole_versions_and_weights_without_jax(saved: pathlib.Path, tmp_path: pathlib.Path):
    found = fresh(
        """
import time
from lepton_xla.serve import Client, Options, Server
from lepton_xla.serve.models.repository import Repository
repository = Repository(sys.argv[2])
repository.push(sys.argv[1] + "/float32", "tiny")
x = rows(lx.load(sys.argv[1] + "/float32"))["x"]
sums = []
with Server(options=Options(port=0, repository_poll_s=0.05), repository=sys.argv[2]) as server:
    with Client(server.url) as client:
        sums.append(client.infer("tiny", x=x)["sum"].tolist())
        repository.push(sys.argv[1] + "/new-float32", "tiny")
        for _ in range(600):
            if "2" in server.models.versions("tiny"):
                break
            time.sleep(0.05)
        sums.append(client.infer("tiny", x=x)["sum"].tolist())
print(json.dumps({"jax": has_jax(), "sums": sums}))
""",
        saved,
        tmp_path / "MODELS",
    )
    assert not found["jax"]
    before, after = map(np.array, found["sums"])
    np.testing.assert_allclose(after, 2 * (before - 1) + 1, rtol=1e-5)
