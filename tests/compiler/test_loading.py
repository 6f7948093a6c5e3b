import json
import logging
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import compiler_models as models
import jax
import ml_dtypes
import msgspec
import numpy as np
import pytest

from lepton_xla import compiler
from lepton_xla.compiler import _xla, loading
from lepton_xla.errors import ArtifactError
from lepton_xla.program import TensorSpec, trace

_FRESH = """
import json, sys
sys.path[:0] = {path!r}
import jax
events = []
jax.monitoring.register_event_duration_secs_listener(lambda event, _, **__: events.append(event))
import numpy as np
from lepton_xla import compiler
jax.devices()
"""


def fresh(code: str, *args: str, environment: dict[str, str] | None = None) -> dict:
    """Runs code in a fresh process; `events` holds JAX's timing events."""
    path = [*sys.path, str(pathlib.Path(__file__).parent)]
    command = [sys.executable, "-c", _FRESH.format(path=path) + code, *args]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **(environment or {})},
    )
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "stderr": done.stderr}


def compilations(events: list[str]) -> list[str]:
    return [event for event in events if event.startswith(("/jax/core/compile/", "/jax/compilation_cache/"))]


@pytest.fixture
def events() -> list[str]:
    found: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, _, **__: found.append(event))
    return found


def pretend_elsewhere(monkeypatch: pytest.MonkeyPatch, **changes: object) -> compiler.Fingerprint:
    """Makes this process have another fingerprint."""
    changes = changes or {"jaxlib": "0.0.1"}
    other = msgspec.structs.replace(compiler.Fingerprint.of(), **changes)
    monkeypatch.setattr(loading.Fingerprint, "of", staticmethod(lambda device=None, count=1: other))
    return other


def test_loading_on_the_same_machine_compiles_nothing(saved_dense: pathlib.Path, events: list[str]) -> None:
    jax.jit(lambda x: x * 1.25 + 3)(np.ones(3, np.float32))
    assert compilations(events), "the listener would not notice a compilation"
    events.clear()
    servable = compiler.load(saved_dense)
    x = np.ones((11, 12), np.float32)
    np.testing.assert_allclose(servable(x=x)["output"], models.dense_reference(x), rtol=1e-5)
    assert servable.route == "executables"
    assert compilations(events) == []


def test_loading_in_a_fresh_process_compiles_nothing(saved_dense: pathlib.Path) -> None:
    code = """
servable = compiler.load(sys.argv[1])
out = servable(x=np.ones((11, 12), np.float32))["output"]
print(json.dumps({"events": events, "route": servable.route, "out": out.tolist(), "scipy": "scipy" in sys.modules}))
"""
    result = fresh(code, str(saved_dense))
    assert compilations(result["events"]) == []
    assert (result["route"], result["scipy"]) == ("executables", False)
    np.testing.assert_allclose(result["out"], models.dense_reference(np.ones((11, 12))), rtol=1e-5)
    assert "mismatch" not in result["stderr"].lower()


def test_code_that_calls_lapack_runs_in_a_fresh_process(tmp_path: pathlib.Path) -> None:
    random = np.random.default_rng(0)
    shift = (4 * np.eye(4) + random.standard_normal((4, 4))).astype(np.float32)
    inputs = {"x": TensorSpec(("batch", 4, 4), "float32")}
    program = trace(lambda w, x: jax.numpy.linalg.inv(x + w["shift"][None]), {"shift": shift}, inputs)
    compiler.compile(program, {"batch": (2,)}).save(tmp_path / "inverse.lepton")
    code = """
out = compiler.load(sys.argv[1])(x=np.ones((1, 4, 4), np.float32))["output"]
print(json.dumps({"out": out.tolist()}))
"""
    result = fresh(code, str(tmp_path / "inverse.lepton"))
    np.testing.assert_allclose(result["out"], np.linalg.inv(1.0 + shift.astype(np.float64))[None], rtol=1e-4)


def test_on_another_target_the_portable_program_is_compiled(
    saved_dense: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, events: list[str]
) -> None:
    pretend_elsewhere(monkeypatch, jaxlib="0.0.1")
    monkeypatch.setattr(_xla, "deserialize", lambda *_: pytest.fail("foreign code was deserialized"))
    with caplog.at_level(logging.WARNING):
        servable = compiler.load(saved_dense)
    assert "compiling 3 buckets from StableHLO: jaxlib: '0.0.1' here" in caplog.text
    assert servable.route == "stablehlo"
    assert "/jax/core/compile/backend_compile_duration" in events
    x = np.random.default_rng(0).standard_normal((13, 12)).astype(np.float32)
    np.testing.assert_allclose(servable(x=x)["output"], models.dense_reference(x), rtol=1e-5, atol=1e-6)


def test_write_back(copy_dense: Callable[[], pathlib.Path], monkeypatch: pytest.MonkeyPatch, events: list[str]) -> None:
    path = copy_dense()
    other = pretend_elsewhere(monkeypatch)
    compiler.load(path, buckets={"batch": [4]}, write_back=True)
    assert compiler.verify(path).extra == ()
    assert compiler.load(path, buckets={"batch": (4,)}).route == "executables"
    assert compiler.load(path, write_back=True).route == "stablehlo"
    events.clear()
    servable = compiler.load(path)
    assert servable.route == "executables"
    assert compilations(events) == []
    assert set(servable.manifest.executables[other.digest].files) == {"batch=1", "batch=4", "batch=8"}
    monkeypatch.undo()
    assert compiler.load(path).route == "executables"


def test_write_back_that_fails_is_a_warning(
    copy_dense: Callable[[], pathlib.Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = copy_dense()
    before = (path / "manifest.json").read_bytes()
    pretend_elsewhere(monkeypatch)

    def refuse(store: object, name: str, data: bytes) -> None:
        raise ArtifactError(f"{name} cannot be written: Read-only file system")

    monkeypatch.setattr(loading.Store, "write", refuse)
    assert compiler.load(path, write_back=True).route == "stablehlo"
    assert "not written back" in caplog.text
    assert (path / "manifest.json").read_bytes() == before


def test_a_part_of_the_buckets(saved_dense: pathlib.Path) -> None:
    servable = compiler.load(saved_dense, buckets={"batch": (4,)})
    assert servable.buckets == {"batch": (4,)}
    assert servable(x=np.ones((9, 12), np.float32))["output"].shape == (9, 5)
    with pytest.raises(KeyError):
        servable.run({"batch": 1}, [np.ones((1, 12), np.float32)])
    for wanted in ({"batch": (2,)}, {"seq": (4,)}, {"batch": ()}):
        with pytest.raises(ArtifactError, match="is not in the artifact"):
            compiler.load(saved_dense, buckets=wanted)


def test_code_without_a_digest_is_never_run(copy_dense: Callable[[], pathlib.Path]) -> None:
    path = copy_dense()
    manifest = json.loads((path / "manifest.json").read_text())
    name = next(name for name in manifest["files"] if name.endswith(".xla"))
    del manifest["files"][name]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="has no entry in files, so its digest is unknown"):
        compiler.load(path)


def test_nothing_is_deserialized_before_every_file_in_use_is_verified(
    copy_dense: Callable[[], pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy_dense()
    (pack,) = path.glob("weights/packed/c/0/0")
    pack.write_bytes(pack.read_bytes()[::-1])
    monkeypatch.setattr(_xla, "deserialize", lambda *_: pytest.fail("deserialized before all was verified"))
    with pytest.raises(ArtifactError, match="weights/packed/c/0/0 is damaged"):
        compiler.load(path)


def test_quantized_weights_keep_their_dtypes_on_disk_and_on_the_device(tmp_path: pathlib.Path) -> None:
    random = np.random.default_rng(0)
    small = random.integers(-8, 8, (16, 6))
    weights = {
        "int8": {
            "values": random.integers(-127, 128, (12, 16)).astype(np.int8),
            "scale": np.full(16, 0.01, np.float32),
        },
        "int4": small.astype(np.int8).astype(ml_dtypes.int4),
        "half": random.standard_normal(6).astype(ml_dtypes.bfloat16),
    }

    def fn(w: dict, x: jax.Array) -> jax.Array:
        hidden = x @ (w["int8"]["values"].astype(np.float32) * w["int8"]["scale"][None])
        return hidden @ w["int4"].astype(np.float32) + w["half"].astype(np.float32)[None]

    program = trace(fn, weights, {"x": TensorSpec(("batch", 12), "float32")})
    compiler.compile(program, {"batch": (1, 4)}).save(tmp_path / "q.lepton")
    servable = compiler.load(tmp_path / "q.lepton")
    assert [leaf.dtype for leaf in servable.manifest.weights] == ["bfloat16", "int4", "float32", "int8"]
    assert [array.dtype.name for array in servable.runtime.weights] == ["bfloat16", "int4", "float32", "int8"]
    stored = {leaf.path: sum(piece.size for piece in leaf.pieces) for leaf in servable.manifest.weights}
    assert stored == {"half": 12, "int4": 48, "int8/scale": 64, "int8/values": 192}
    x = random.standard_normal((3, 12)).astype(np.float32)
    expected = x.astype(np.float64) @ (weights["int8"]["values"] * 0.01) @ small + weights["half"].astype(np.float64)
    np.testing.assert_allclose(servable(x=x)["output"], expected, rtol=1e-4, atol=1e-4)


def test_weights_are_not_copied_to_the_device(saved_dense: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[np.ndarray] = []
    real = loading.read_all

    def read_all(*args: object) -> list[np.ndarray]:
        read.extend(real(*args))
        return read

    monkeypatch.setattr(loading, "read_all", read_all)
    servable = compiler.load(saved_dense)
    assert [array.unsafe_buffer_pointer() for array in servable.runtime.weights] == [
        array.ctypes.data for array in read
    ]


def test_loading_takes_little_more_memory_than_the_weights(tmp_path: pathlib.Path) -> None:
    random = np.random.default_rng(0)
    weights = {f"w{index}": random.standard_normal((2000, 1500)).astype(np.float32) for index in range(10)}
    weights["packed"] = (random.integers(0, 2, (3000, 4000)) * 3).astype(np.int8)
    total = sum(array.nbytes for array in weights.values())
    inputs = {"x": TensorSpec(("batch", 1500), "float32")}
    program = trace(lambda w, x: x + w["w0"][:1] + w["packed"][:1, :1].astype(np.float32), weights, inputs)
    compiler.compile(program, {"batch": (1, 4)}).save(tmp_path / "big.lepton")
    del weights, program
    code = """
def memory(key):
    return int(open("/proc/self/status").read().split(key)[1].split()[0]) * 1024
jax.jit(lambda x: x + 1)(np.ones(3, np.float32)).block_until_ready()
before = memory("VmRSS:")
open("/proc/self/clear_refs", "w").write("5")
servable = compiler.load(sys.argv[1])
servable(x=np.ones((4, 1500), np.float32))
print(json.dumps({"before": before, "peak": memory("VmHWM:")}))
"""
    result = fresh(code, str(tmp_path / "big.lepton"))
    assert result["peak"] - result["before"] >= total, "the measure misses the weights themselves"
    assert result["peak"] - result["before"] <= 1.3 * total


def test_nothing_here_unpickles() -> None:
    root = pathlib.Path(compiler.__file__).parent
    for file in root.glob("*.py"):
        text = file.read_text().replace("`jax.experimental.serialize_executable`", "")
        assert "import pickle" not in text
        assert "serialize_executable" not in text.replace("deserialize_executable", "")
