"""Artifacts for several devices: outputs, what each device holds and reads, and what does not fit."""

import json
import logging
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.compiler import _xla, loading, reading, weights
from lepton_xla.compiler.devices import MeshEntry
from lepton_xla.compiler.manifest import manifest_from_json, manifest_to_json
from lepton_xla.sharding import Rules

RULES = Rules([("up", (None, "model")), ("down", ("model",)), ("stack", (None, None, "model"))])


def network(w, x):
    x = jnp.tanh(x @ w["up"]) @ w["down"] + w["bias"]
    x, _ = jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, w["stack"])
    return {"y": x, "norm": jnp.sum(x * x, axis=1)}


def make():
    random = np.random.default_rng(0)
    shapes = {"up": (16, 64), "down": (64, 16), "stack": (3, 16, 16), "bias": (1, 16)}
    weights = {path: jnp.asarray(random.standard_normal(shape) / 4, jnp.float32) for path, shape in shapes.items()}
    return lx.trace(network, weights, {"x": lx.TensorSpec(("batch", 16), "float32")})


@pytest.fixture(scope="module")
def program():
    return make()


X = np.random.default_rng(1).standard_normal((5, 16)).astype(np.float32)


def expected(program):
    """In NumPy and float64."""
    w = {path: np.asarray(weight, np.float64) for path, weight in program.weights.items()}
    x = np.tanh(X @ w["up"]) @ w["down"] + w["bias"]
    for layer in w["stack"]:
        x = np.tanh(x @ layer)
    return x


@pytest.fixture(scope="module")
def parallel(program, tmp_path_factory):
    """An artifact that is tensor parallel on two devices."""
    path = tmp_path_factory.mktemp("sharded") / "model.lepton"
    lx.compile(program, {"batch": (1, 4)}, mesh="model=2", rules=RULES).save(path)
    return path


def check(servable, program, tolerance=1e-5):
    got = servable(x=X)
    np.testing.assert_allclose(got["y"], expected(program), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(got["norm"], np.sum(expected(program) ** 2, 1), rtol=tolerance, atol=tolerance)


def test_a_tensor_parallel_artifact_gives_what_the_program_gives(program, parallel):
    servable = lx.load(parallel)
    assert servable.route == "executables"
    check(servable, program)
    up, down = (
        dict(zip(sorted(program.weights), servable.runtime.weights, strict=True))[name] for name in ("up", "down")
    )
    assert [part.data.shape for part in up.addressable_shards] == [(16, 32)] * 2
    assert [part.data.shape for part in down.addressable_shards] == [(32, 16)] * 2
    cut = sum(program.weights[path].nbytes for path in ("up", "down", "stack"))
    assert servable.weights_bytes == program.weights_bytes - cut // 2


def test_a_data_parallel_artifact_splits_rows(program, tmp_path):
    artifact = lx.compile(program, {"batch": (2, 4)}, mesh="data=2")
    check(artifact.servable(), program)
    artifact.save(tmp_path / "rows.lepton")
    servable = lx.load(tmp_path / "rows.lepton")
    check(servable, program)
    assert servable.weights_bytes == program.weights_bytes
    assert servable.manifest.mesh == MeshEntry(axes={"data": 2}, batch=("data",))
    places = servable.runtime.devices.of_rows(servable.outputs, servable.inputs)
    assert [place.spec for place in places] == [jax.P("data"), jax.P("data")]


def test_an_optimized_program_stays_where_it_is(program, tmp_path):
    mesh = lx.sharding.mesh("model=2")
    sharded = program.replace(weights=RULES.resolve(program, mesh).put(program.weights))
    recipe = lx.Recipe.parse('measure = false\n[[quantize]]\nsites = ".*"\n', name="int8")
    small = lx.optimize(sharded, recipe, buckets={"batch": (4,)})
    wanted = jax.jit(small.fn)(small.weights, np.pad(X[:4], ((0, 0), (0, 0))))
    lx.compile(small, {"batch": (4,)}, mesh=mesh).save(tmp_path / "small.lepton")
    servable = lx.load(tmp_path / "small.lepton")
    np.testing.assert_allclose(servable(x=X[:4])["y"], wanted["y"], rtol=1e-5, atol=1e-6)
    specs = {leaf.path: leaf.spec for leaf in servable.manifest.weights}
    # Column-major codes: N, the columns, come first.
    assert specs["up/values"] == (("model",),)
    assert specs["down/values"] == ((), ("model",))
    assert specs["up/scale"] == ((), ("model",))
    assert servable.weights_bytes < 0.62 * small.weights_bytes


def test_rules_cut_quantized_matrices(program):
    recipe = lx.Recipe.parse(
        'measure = false\n[[quantize]]\nsites = ".*"\nweights = "int4"\nactivations = "none"', name="t"
    )
    small = lx.optimize(program, recipe, buckets={"batch": (4,)})
    servable = lx.compile(small, {"batch": (4,)}, mesh="model=2", rules=RULES).servable()
    wanted = jax.jit(small.fn)(small.weights, X[:4])
    np.testing.assert_allclose(servable(x=X[:4])["y"], wanted["y"], rtol=1e-5, atol=1e-6)
    parts = dict(zip((leaf.path for leaf in servable.manifest.weights), servable.manifest.weights, strict=True))
    assert (parts["up/values"].spec, parts["up/scale"].spec) == (((), ("model",)),) * 2
    assert (parts["down/values"].spec, parts["down/scale"].spec) == ((("model",),), ())  # one scale a column


def test_no_whole_weight_is_read(program, parallel, monkeypatch):
    made = []
    real = reading.aligned_empty
    monkeypatch.setattr(reading, "aligned_empty", lambda shape, dtype: made.append(tuple(shape)) or real(shape, dtype))
    check(lx.load(parallel), program)
    for path in ("up", "down", "stack"):
        assert program.weights[path].shape not in made
    assert made.count((16, 32)) == 2
    assert made.count((32, 16)) == 2
    assert made.count((3, 16, 8)) == 2


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((24, 8), 1), ((20, 4), 0), ((3, 8, 24), 2), ((8,), 0)],
    ids=["columns", "rows", "stack", "vector"],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_parts_are_read_from_chunks_of_their_own(shape, axis, compressed, monkeypatch, tmp_path):
    """Parts of several chunks, plain and compressed; each file is read once."""
    monkeypatch.setattr(weights, "CHUNK_BYTES", 64)
    monkeypatch.setattr(weights.part_chunk, "__defaults__", (64,))
    values = np.zeros(shape, np.float32) if compressed else np.random.default_rng(2).standard_normal(shape)
    values = jnp.asarray(values, jnp.float32).at[0].set(1)
    spec = [None] * axis + ["model"]
    program = lx.trace(lambda w, x: x * jnp.sum(w["w"]), {"w": values}, {"x": lx.TensorSpec(("batch",), "float32")})
    artifact = lx.compile(program, {"batch": (1,)}, mesh="model=2", rules=Rules([("w", spec)]))
    manifest = artifact.save(tmp_path / "w.lepton")
    (leaf,) = manifest.weights
    assert leaf.is_zarr
    if shape != (8,):
        assert sum(name.startswith(f"{leaf.folder}/c/") for name in manifest.files) > 2
    read = []
    for way in ("read", "read_into"):
        real = getattr(reading.VerifiedFiles, way)

        def noted(files, name, *more, real=real):
            read.append(name)
            return real(files, name, *more)

        monkeypatch.setattr(reading.VerifiedFiles, way, noted)
    (array,) = lx.load(tmp_path / "w.lepton").runtime.weights
    chunks = [name for name in read if "/c/" in name]
    assert sorted(chunks) == sorted(name for name in manifest.files if "/c/" in name)
    np.testing.assert_array_equal(array, values)
    assert array.sharding.spec == jax.P(*spec)


def test_another_machine_compiles_the_portable_program(program, parallel, monkeypatch, caplog):
    other = msgspec.structs.replace(lx.compiler.Fingerprint.of(None, 2), jaxlib="0.0.1")
    monkeypatch.setattr(loading.Fingerprint, "of", staticmethod(lambda device=None, count=1: other))
    with caplog.at_level(logging.WARNING):
        servable = lx.load(parallel)
    assert servable.route == "stablehlo"
    assert "jaxlib" in caplog.text
    assert len(servable.runtime.devices.all) == 2
    check(servable, program)


def test_with_fewer_devices_it_runs_on_one_if_it_fits(program, parallel, monkeypatch, caplog):
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one)
    with caplog.at_level(logging.WARNING):
        servable = lx.load(parallel)
    assert "compiled for 2 devices (model=2), and there are 1: running on one" in caplog.text
    assert servable.weights_bytes == program.weights_bytes
    check(servable, program)
    monkeypatch.setattr(_xla, "memory_bytes", lambda _: program.weights_bytes - 1)
    with pytest.raises(lx.ShardingError, match=rf"its weights take {program.weights_bytes} bytes, and one device has"):
        lx.load(parallel)


@pytest.mark.parametrize(
    ("buckets", "options", "said"),
    [
        ((1, 4), {"mesh": "data=2"}, "bucket batch=1 cannot be split over data=2; choose multiples of 2"),
        ((4,), {"rules": RULES}, "give compile the mesh, too"),
        ((4,), {"mesh": "data=3"}, "takes 3 devices"),
        ((4,), {"mesh": "model=2", "rules": Rules([("up", ("model",)), ("up", ())])}, "is never reached"),
        ((4,), {"mesh": "model=2", "rules": Rules([("nothing", ("model",))])}, "matches no weight"),
        ((4,), {"mesh": "model=2", "rules": Rules([("bias", ("model",))])}, "2 does not divide 1"),
    ],
)
def test_what_does_not_fit_is_refused(program, buckets, options, said):
    with pytest.raises(lx.ShardingError, match=said):
        lx.compile(program, {"batch": buckets}, **options)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(mesh=None), "is cut over devices, but there is no mesh"),
        (lambda m: m["mesh"]["axes"].update(model=3), "3 does not divide"),
        (lambda m: m["mesh"]["axes"].update(model=0), "sizes of at least 1"),
        (lambda m: m["mesh"]["axes"].update(model=-1), "do not divide"),
        (lambda m: m["mesh"].update(batch=["data"]), "the mesh has no axis 'data'"),
        (lambda m: m["weights"][2].update(spec=[["model"]] * 5), "has 5 entries"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(parallel, change, said):
    manifest = json.loads((parallel / "manifest.json").read_text())
    change(manifest)
    with pytest.raises(lx.ArtifactError, match=said):
        manifest_from_json(json.dumps(manifest).encode())


def test_a_mesh_survives_the_manifest(parallel):
    manifest = manifest_from_json((parallel / "manifest.json").read_bytes())
    assert manifest.mesh == MeshEntry(axes={"model": 2})
    assert manifest_from_json(manifest_to_json(manifest)).mesh == manifest.mesh
    assert {entry.target.device_count for entry in manifest.executables.values()} == {2}


def test_the_server_runs_it(program, parallel):
    from lepton_xla.serve import Options, Server
    from lepton_xla.serve.client import Client

    with Server(lx.load(parallel), Options(port=0)) as server, Client(server.url) as client:
        got = client.infer("model", x=X)["y"]
    np.testing.assert_allclose(got, expected(program), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_tensor_and_data_parallel_on_eight_devices(program, tmp_path):
    """Weights are read by a process of its own, with 8, then with 2 devices."""
    code = (
        "import sys, numpy as np, jax, jax.numpy as jnp\n"
        "import lepton_xla as lx\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import test_sharded as t\n"
        "program = t.make()\n"
        "path = sys.argv[2]\n"
        "if len(jax.devices()) == 8:\n"
        "    lx.compile(program, {'batch': (2, 8)}, mesh='data=2,model=4', rules=t.RULES).save(path)\n"
        "servable = lx.load(path)\n"
        "t.check(servable, program)\n"
        "print(servable.route, len(servable.runtime.devices.all), servable.weights_bytes)\n"
    )
    folder = pathlib.Path(__file__).parent
    said = []
    for count in (8, 2):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(count), "PYTHONPATH": str(folder.parents[1]),
        }  # fmt: skip
        command = [sys.executable, "-c", code, str(folder), str(tmp_path / "eight.lepton")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]
        said.append(done.stdout.split())
    cut = sum(program.weights[path].nbytes for path in ("up", "down", "stack"))
    assert said[0] == ["executables", "8", str(program.weights_bytes - cut * 3 // 4)]
    assert said[1] == ["stablehlo", "1", str(program.weights_bytes)]
