"""`leptonx inspect`, `verify`, `eval` and `bench`."""

import json
import statistics

import cli_models as models
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.cli import bench


def test_verify_counts_what_is_there(cli, artifact):
    files = [file for file in artifact.rglob("*") if file.is_file() and file.name != "manifest.json"]
    size_bytes = sum(file.stat().st_size for file in files)
    found = cli.json("verify", artifact)
    assert (found["ok"], found["files"], found["size_bytes"], found["extra"]) == (True, len(files), size_bytes, [])
    assert f"{len(files)} files, {size_bytes:,} bytes, all intact" in cli.ok("verify", artifact)


def test_verify_names_what_is_not_listed(cli, damaged):
    (damaged / "notes.txt").write_text("mine")
    assert cli.json("verify", damaged)["extra"] == ["notes.txt"]
    assert "notes.txt" in cli.ok("verify", damaged)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-7])


def edit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("harm", [lambda file: file.unlink(), lambda file: file.write_bytes(b""), truncate, edit])
@pytest.mark.parametrize("kind", ["*.xla", "weights/packed/c/*/0", "*.stablehlo"])
def test_a_damaged_file_is_named(cli, damaged, harm, kind):
    file = sorted(damaged.rglob(kind))[0]
    harm(file)
    name = file.relative_to(damaged).as_posix()
    for args in (["verify", damaged], ["verify", damaged, "--json"], ["bench", damaged]):
        assert name in cli.refused(*args)


@pytest.mark.parametrize("harm", [lambda file: file.unlink(), lambda file: file.write_bytes(b""), truncate])
def test_a_damaged_manifest_is_named(cli, damaged, plain, harm):
    harm(damaged / "manifest.json")
    for args in (["inspect"], ["verify"], ["bench"], ["predict", "--input", "-"], ["eval", plain]):
        assert "manifest.json" in cli.refused(*args, damaged, input="{}")


def test_another_schema_is_refused(cli, damaged):
    manifest = json.loads((damaged / "manifest.json").read_text())
    (damaged / "manifest.json").write_text(json.dumps(manifest | {"schema": 99}))
    for name in ("inspect", "verify"):
        assert "schema version 99" in cli.refused(name, damaged)


def test_inspect_agrees_with_the_files(cli, artifact):
    found = cli.json("inspect", artifact)
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert found["manifest"]["files"] == manifest["files"]
    assert found["route"]["route"] == "executables"
    by_name = {weight["name"]: weight for weight in found["weights"]}
    assert by_name["hidden/values"]["dtype"] == "int8"
    assert by_name["hidden/values"]["shape"] == [models.HIDDEN, models.IN]  # column-major
    assert by_name["hidden/values"]["size_bytes"] == models.IN * models.HIDDEN
    disk_bytes = sum(file.stat().st_size for file in (artifact / "weights").rglob("*") if file.is_file())
    metadata = (artifact / "weights" / "packed" / "zarr.json").stat().st_size  # which no leaf has for itself
    told = sum(weight["disk_bytes"] for weight in found["weights"])
    assert told == pytest.approx(disk_bytes - metadata, abs=len(found["weights"]) / 2)
    for leaf in manifest["weights"]:
        weight = by_name[leaf["path"]]
        assert weight["encoding"] == leaf["encoding"]
        assert weight["ratio"] == weight["size_bytes"] / weight["disk_bytes"]
    elements = models.IN * models.HIDDEN + models.HIDDEN * models.OUT
    assert (found["float32_bytes"], found["weights_bytes_on_disk"]) == (4 * elements, disk_bytes)
    assert found["float32_ratio"] == 4 * elements / disk_bytes


def test_inspect_tells_zarr_arrays_from_pieces(cli, tmp_path):
    table = np.random.default_rng(0).integers(0, 256, (64, 256)).astype(np.uint8)
    program = lx.trace(
        lambda w, x: x @ w["table"].astype("float32"), {"table": table}, {"x": lx.TensorSpec((2, 64), "float32")}
    )
    lx.compile(program, {}).save(tmp_path / "m.lepton")
    (weight,) = cli.json("inspect", tmp_path / "m.lepton")["weights"]
    files = sum(file.stat().st_size for file in (tmp_path / "m.lepton" / "weights").rglob("*") if file.is_file())
    assert (weight["encoding"], weight["size_bytes"], weight["disk_bytes"]) == ("plain", 64 * 256, files)
    assert 1 < files / (64 * 256) < 1.05


def test_inspect_prints_all_of_it(cli, artifact, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    text = cli.ok("inspect", artifact)
    lines = {" ".join(line.split()) for line in text.splitlines()}
    assert "input x float32 batch, 16" in lines
    assert "output output float32 batch, 4" in lines
    assert any(line.startswith("hidden/values 64x16 int8 ") and line.endswith("x") for line in lines)
    assert any(line.startswith("float32 would take 5,120 bytes, ") for line in lines)
    assert any(line.startswith("batch=4 ") for line in lines)
    assert "quantize[0].weights int8" in lines
    assert "quantize head int8 x int8" in lines
    assert any(line.startswith("float.largest ") for line in lines)
    assert "on this machine: loads compiled code without compiling" in text


def test_inspect_says_why_it_would_compile(cli, artifact, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2")
    found = cli.json("inspect", artifact)["route"]
    [differences] = found["differences"].values()
    assert found["route"] == "stablehlo"
    assert differences == ["xla_flags: '--xla_cpu_max_isa=AVX2' here, '' there"]
    text = cli.ok("inspect", artifact)
    assert "loading would compile the StableHLO" in text
    assert differences[0] in text


def test_eval_compares_the_artifact_with_the_float_model(cli, plain, artifact):
    found = cli.json("eval", plain, artifact)
    exact, small = models.reference(models.data()), lx.load(artifact)(x=models.data())["output"]
    np.testing.assert_allclose(found["float"]["largest"], exact.max(), rtol=1e-5)
    assert found["artifact"]["largest"] == float(small.max())
    assert found["difference"]["largest"] == found["artifact"]["largest"] - found["float"]["largest"] != 0
    assert found["route"] == "executables"
    row = next(line for line in cli.ok("eval", plain, artifact).splitlines() if line.strip().startswith("largest"))
    assert row.split()[1:3] == [f"{exact.max():.6g}", f"{small.max():.6g}"]


def test_eval_needs_something_to_evaluate_on(cli, variant, artifact):
    target = variant("evaluate=None")
    assert f"add rows=... or evaluate=... to the ModelSpec of {target}, or --rows" in cli.refused(
        "eval", target, artifact
    )
    assert "there is nothing to evaluate on: add --rows FILE.npz" in cli.refused("eval", artifact)


@pytest.mark.parametrize("args", [["eval", "{target}", "{path}"], ["bench", "{path}", "--target", "{target}"]])
def test_another_model_is_not_compared(cli, variant, artifact, args):
    target = variant("inputs={'x': lx.TensorSpec(('rows', 16), 'float32')}, buckets={'rows': (1,)}")
    line = cli.refused(*(arg.format(target=target, path=artifact) for arg in args))
    assert "has inputs x: float32[batch, 16], but" in line


def test_bench_beside_float(cli, plain, artifact):
    found = cli.json("bench", artifact, "--target", plain, "--rounds", "7")
    assert [(entry["bucket"], entry["rows"], entry["rounds"]) for entry in found["buckets"]] == [
        ("batch=1", 1, 7),
        ("batch=4", 4, 7),
    ]
    for entry in found["buckets"]:
        for side in ("float", "artifact"):
            assert 0 < entry[side]["median_s"] <= entry[side]["p99_s"] < 1
            assert entry[side]["rows_per_s"] == pytest.approx(entry["rows"] / entry[side]["median_s"])
        assert entry["speedup"] == pytest.approx(entry["float"]["median_s"] / entry["artifact"]["median_s"])
        assert entry["float_jit_s"] > entry["float"]["median_s"]
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert found["compile_s"] == pytest.approx(sum(manifest["compile_s"].values()))
    assert found["compile_over_load"] == pytest.approx(found["compile_s"] / found["load_s"])
    elements = models.HIDDEN * (models.IN + models.OUT)
    assert found["weights_bytes_float"] == 4 * elements
    assert found["weights_bytes"] == elements + 4 * (models.HIDDEN + models.OUT)
    assert (found["inputs"], found["route"]) == ("calibration data", "executables")


def test_bench_prints_a_table(cli, plain, artifact, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    alone = cli.ok("bench", artifact, "--rounds", "5")
    assert "5 calls at each bucket; inputs: random" in alone
    text = cli.ok("bench", artifact, "--rounds", "5", "--target", plain)
    row = next(line for line in text.splitlines() if line.strip().startswith("batch=4"))
    assert row.rstrip().endswith("x")
    assert "5 calls at each bucket, the two in turn; inputs: calibration data" in text
    assert "from compiled code" in text


def test_bench_calls_in_turn_after_a_warm_up():
    order = []
    calls = {name: lambda name=name, **inputs: order.append((name, inputs)) for name in ("float", "artifact")}
    times = bench._measure(calls, {"x": 1}, 20, 60.0)
    assert order == [("float", {"x": 1}), ("artifact", {"x": 1})] * (20 + bench._WARM_UP)
    assert [len(found) for found in times.values()] == [20, 20]


def test_bench_stops_when_its_time_is_up():
    times = bench._measure({"artifact": lambda: None}, {}, 10**9, 1e-9)
    assert len(times["artifact"]) == bench._LEAST_ROUNDS


def test_bench_summary():
    times = [float(number) for number in range(200, 0, -1)]
    summary = bench._summary(times, rows=8)
    assert summary == {"median_s": statistics.median(times), "p99_s": 198.0, "rows_per_s": 8 / 100.5}
    assert bench._summary([1.0, 5.0], rows=1)["p99_s"] == 5.0
