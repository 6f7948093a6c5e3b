import gc
import json
import shutil
import weakref

import cli_models as models
import jax
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.sharding import topologies


def on_disk(path) -> int:
    return sum(file.stat().st_size for file in (path / "weights").rglob("*") if file.is_file())


def test_the_figures_of_a_compile(compiled):
    path, found = compiled
    elements = models.HIDDEN * (models.IN + models.OUT)
    assert found["weights_bytes_float"] == 4 * elements
    # One float32 scale for each output channel.
    assert found["weights_bytes_optimized"] == elements + 4 * (models.HIDDEN + models.OUT)
    assert found["weights_bytes_on_disk"] == on_disk(path)
    everything = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert found["artifact_bytes"] == everything - (path / "manifest.json").stat().st_size
    assert found["buckets"] == {"batch": [1, 4]}
    assert [report["name"] for report in found["passes"]] == ["fold", "quantize"]
    assert [site["action"] for site in found["passes"][1]["sites"]] == ["int8 x int8", "int8 x int8"]
    assert found["compile_s"] >= sum(found["compile_s_by_bucket"].values()) > 0
    assert (found["path"], found["name"], found["recipe"]) == (str(path), "plain", "int8")


def test_metrics_are_those_of_the_two_models_and_in_the_manifest(compiled):
    path, found = compiled
    exact = models.reference(models.data())
    np.testing.assert_allclose(found["metrics"]["float"]["mean"], exact.mean(), rtol=1e-4)
    np.testing.assert_allclose(found["metrics"]["float"]["largest"], exact.max(), rtol=1e-5)
    outputs = lx.load(path)(x=models.data())["output"]
    assert found["metrics"]["optimized"]["largest"] == float(outputs.max())
    assert found["metrics"]["optimized"] != found["metrics"]["float"]
    assert json.loads((path / "manifest.json").read_text())["metrics"] == found["metrics"]


def test_the_float_weights_are_gone_when_the_model_is_compiled(cli, plain, files, tmp_path, monkeypatch):
    weights, left = [], []
    program, compiled = lx.ModelSpec.program, lx.compile

    def made(spec):
        found = program(spec)
        weights.extend(map(weakref.ref, found.weights.values()))
        return found

    def compile(*args, **kwargs):
        gc.collect()
        left.extend(path() is not None for path in weights)
        return compiled(*args, **kwargs)

    monkeypatch.setattr(lx.ModelSpec, "program", made)
    monkeypatch.setattr("lepton_xla.compiler.compile", compile)
    cli.ok("compile", plain, "--recipe", files / "int8.toml", "-o", tmp_path / "small.lepton")
    assert left == [False, False]


def test_the_manifest_tells_recipe_and_plan(cli, artifact, plain, files):
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["recipe"]["name"] == "int8"
    assert manifest["recipe"]["quantize"][0]["sites"] == ".*"
    planned = cli.json("plan", plain, "--recipe", files / "int8.toml")["sites"]
    assert manifest["plan"] == [{key: value for key, value in site.items() if key != "flops"} for site in planned]


def test_without_a_recipe_the_model_stays_float(cli, plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = cli.ok("compile", plain, "--buckets", "batch=2", "--no-evaluate")
    assert "the float model is compiled unchanged" in text
    manifest = json.loads((tmp_path / "plain_model.lepton" / "manifest.json").read_text())
    assert (manifest["name"], manifest["recipe"], manifest["plan"]) == ("plain_model", None, None)
    assert manifest["buckets"] == {"batch": [2]}
    assert manifest["metrics"] == {}
    outputs = lx.load(tmp_path / "plain_model.lepton")(x=models.data())["output"]
    np.testing.assert_allclose(outputs, models.reference(models.data()), rtol=1e-4, atol=1e-4)


def test_a_linen_model_with_a_preset(cli, files, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    path = tmp_path / "net.lepton"
    target = f"{files / 'linen_model.py'}:model"
    text = cli.ok("compile", target, "--recipe", "int8-prune50", "--buckets", "batch=1,2", "-o", path, "--name", "cnn")
    assert "a model file may print" not in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert {"fold", "prune", "quantize", "weights"} <= set(rows)
    assert "cnn, recipe int8-prune50" in text
    servable = lx.load(path)
    assert (servable.name, servable.buckets) == ("cnn", {"batch": (1, 2)})
    assert servable(image=np.ones((3, 6, 6, 1), np.float32))["output"].shape == (3, 5)


def test_progress_names_every_step(cli, plain, files, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("lepton_xla.cli._common._line", lambda stage, done, total: told.append(stage) or stage)
    cli.ok("compile", plain, "--recipe", files / "static.toml", "-o", tmp_path / "x.lepton")
    expected = [
        f"load {plain}", "fold and plan", "calibrate", "evaluate the float model", "compile batch=1",
        "compile batch=4", "export StableHLO", "evaluate the compiled model",
    ]  # fmt: skip
    assert [stage for stage in told if stage in expected] == expected


def test_calibration_from_a_generator_reaches_calibrate_whole(cli, variant, files, tmp_path):
    # The largest value is in the first batch, which the look at it must not use up.
    target = variant(
        "calibration=batches", "def batches():\n    yield {'x': 100 * data[:4]}\n    yield {'x': data[:4]}"
    )
    found = cli.json("compile", target, "--recipe", files / "static.toml", "-o", tmp_path / "x.lepton")
    [calibrated] = [report for report in found["passes"] if report["name"] == "calibrate"]
    ranges = {site["site"]: site["metrics"]["absmax"] for site in calibrated["sites"]}
    np.testing.assert_allclose(ranges["hidden"], np.abs(100 * models.data()[:4]).max(), rtol=1e-5)


def test_calibration_is_checked_also_where_no_pass_needs_it(cli, variant, tmp_path):
    target = variant("calibration=[{'x': data * np.nan}]")
    assert "calibration batch 0, input 'x' holds NaN" in cli.refused("compile", target, "-o", tmp_path / "x.lepton")
    assert not (tmp_path / "x.lepton").exists()


def test_the_check_of_rows_is_run_on_calibration_data(cli, variant, tmp_path):
    # Random inputs, which are near zero, show nothing of this model: all its outputs would be NaN.
    before = "def far(weights, x): return jnp.log(x - 50)"
    cli.ok("compile", variant("fn=far, calibration=[{'x': 100 + data}]", before), "-o", tmp_path / "x.lepton")
    line = cli.refused("compile", variant("fn=far, calibration=None", before), "-o", tmp_path / "y.lepton")
    assert "no finite value on the test inputs" in line


def test_an_artifact_is_replaced_only_on_request(cli, plain, artifact, tmp_path):
    path = shutil.copytree(artifact, tmp_path / "there.lepton")
    before = (path / "manifest.json").read_bytes()
    line = cli.refused("compile", plain, "-o", path)
    assert "exists; give another --output, or --overwrite" in line
    assert (path / "manifest.json").read_bytes() == before
    found = cli.json("compile", plain, "-o", path, "--overwrite", "--no-evaluate")
    assert found["weights_bytes_optimized"] == found["weights_bytes_float"]
    assert (path / "manifest.json").read_bytes() != before
    assert [file.name for file in tmp_path.iterdir()] == ["there.lepton"]


@pytest.mark.parametrize(
    ("changes", "before", "part"),
    [
        ("buckets={}", "", "no sizes to compile for dimension 'batch': add --buckets batch=1,8,32"),
        ("buckets={'rows': (1,), 'batch': (1,)}", "", "buckets name 'rows'"),
        ("fn=mixes, calibration=None", "def mixes(weights, x): return fn(weights, x) - fn(weights, x).mean(0)[None]",
         "the rows along 'batch' affect each other"),
        ("calibration=[{'x': data[:, :9]}]", "", "calibration batch 0, input 'x': expected float32[batch, 16]"),
        ("calibration=[{'x': data.astype(np.float64)}]", "", "got float64[32, 16]"),
        ("calibration=[{'y': data}]", "", "calibration batch 0 has inputs ['y']"),
        ("calibration=[{'x': data * np.nan}]", "", "input 'x' holds NaN or infinity"),
        ("calibration=[{'x': data}, {'x': data * np.inf}]", "", "calibration batch 1, input 'x' holds NaN"),
        ("calibration=[]", "", "calibration data is empty"),
        ("calibration=None", "", "need calibration data"),
        ("calibration=broken", "def broken(): raise OSError('no data')", "calibration fails: OSError: no data"),
        (
            "calibration=broken",
            "def broken():\n    yield {'x': data}\n    raise OSError('no\\nmore')",
            "calibration fails: OSError: no more",
        ),
        ("calibration=[{'x': data}, None]", "", "calibration batch 1 is a NoneType, not a dict"),
        ("fn=far", "def far(weights, x): return fn(weights, x * 1e30 * 1e30)", "'hidden' is not finite on the calibr"),
        ("evaluate=broken", "def broken(predict): return {}['a']", "evaluate fails: KeyError"),
        ("evaluate=broken", "def broken(predict): return predict(y=data)", "got inputs ['y']"),
        ("evaluate=broken", "def broken(predict): return {'a': 'good'}", "evaluate fails: ValueError"),
    ],
)  # fmt: skip
def test_what_cannot_be_compiled_leaves_nothing(cli, variant, files, tmp_path, changes, before, part):
    target = variant(changes, before)
    # A float model whose rows mix is refused by its own check; int8 arithmetic is beside the point there.
    recipe = [] if "mixes" in changes else ["--recipe", files / "static.toml"]
    folder = tmp_path / "out"
    folder.mkdir()
    assert part in cli.refused("compile", target, *recipe, "-o", folder / "x.lepton")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "part"), [(["--name", "a/b"], "model name 'a/b'"), (["-o", "/dev/null/x"], "cannot be created")]
)
def test_where_it_cannot_be_put(cli, plain, tmp_path, monkeypatch, args, part):
    monkeypatch.chdir(tmp_path)
    assert part in cli.refused("compile", plain, "--no-evaluate", *args)
    assert list(tmp_path.iterdir()) == []


def test_a_topology_without_its_mesh_is_refused_before_the_model_is_loaded(cli, plain, monkeypatch):
    monkeypatch.setattr(topologies, "topology_devices", lambda _: jax.devices())
    monkeypatch.setattr("lepton_xla.cli._models.load_target", lambda _: pytest.fail("the model was loaded"))
    assert "has 2 devices; give a mesh" in cli.refused("compile", plain, "--topology", "v5e:1x2")
