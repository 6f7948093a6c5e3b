"""End-to-end demo on real digits: train, optimize, compile, save, load, serve, and check a thousand answers.

    make demo

Writes all printed results to build/demo/summary.json.
"""

from __future__ import annotations

import http.client
import json
import pathlib
import queue
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.parse

import digits
import jax
import numpy as np
from rich.console import Console

import lepton_xla as lx
from lepton_xla.cli.tables import Table, show

RECIPE = "int8-prune50"
REQUESTS = 1000
CLIENTS = 16
ROUNDS = 200
FOLDER = pathlib.Path(__file__).parent.parent / "build" / "demo"
console = Console(width=100, highlight=False)


def main() -> None:
    """Run all steps and print a table."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    artifact_path = FOLDER / "digits.lepton"
    console.print("training a small CNN on scikit-learn's handwritten digits ...")
    spec = digits.model()
    program = spec.program()

    console.print(f"optimizing with recipe {RECIPE} and compiling for batch {spec.buckets['batch']} ...")
    small = lx.optimize(program, lx.Recipe.load(RECIPE), calibration=spec.calibration_batches(), buckets=spec.buckets)
    start = time.perf_counter()
    artifact = lx.compile(small, spec.buckets, name="digits")
    compile_s = time.perf_counter() - start
    artifact.save(artifact_path, overwrite=True)
    start = time.perf_counter()
    servable = lx.load(artifact_path)
    load_s = time.perf_counter() - start

    compiled = jax.jit(program.named_outputs)
    float_predict = lambda **inputs: jax.device_get(compiled(program.weights, *inputs.values()))  # noqa: E731
    summary = {
        "accuracy_float": digits.evaluate(float_predict)["accuracy"],
        "accuracy_optimized": digits.evaluate(servable)["accuracy"],
        "weights_bytes_float": program.weights_bytes,
        "weights_bytes_optimized": sum(f.stat().st_size for f in (artifact_path / "weights").rglob("*") if f.is_file()),
        "latency_ms": latency_ms({"float": float_predict, "optimized": servable}, (1, 32)),
        "compile_s": compile_s,
        "load_s": load_s,
    }
    print_table(summary)
    console.print(f"serving {artifact_path.name}, {REQUESTS} one-row requests from {CLIENTS} clients ...")
    summary |= serve_and_ask(artifact_path, servable)
    console.print(
        f"{summary['requests_ok']} of {summary['requests']} answers right, "
        f"{summary['requests_per_s']:.0f} requests/s, p50 {summary['p50_ms']:.2f} ms, p99 {summary['p99_ms']:.2f} ms"
    )
    (FOLDER / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    console.print(f"wrote {(FOLDER / 'summary.json').relative_to(FOLDER.parent.parent)}")
    if summary["requests_ok"] != summary["requests"]:
        sys.exit("some answers were wrong")


def latency_ms(models: dict, batches: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Median latency of a call (NumPy in, NumPy out) by model and batch; the models take turns."""
    _, _, images, _ = digits.data()
    times = {name: {str(batch): [] for batch in batches} for name in models}
    for batch in batches:
        for round_number in range(ROUNDS + 5):
            for name, predict in models.items():
                start = time.perf_counter()
                predict(image=images[:batch])
                if round_number >= 5:
                    times[name][str(batch)].append((time.perf_counter() - start) * 1e3)
    return {name: {b: statistics.median(values) for b, values in by.items()} for name, by in times.items()}


def print_table(summary: dict) -> None:
    """Print the comparison of the float and the optimized model."""
    rows: list[tuple[str, ...]] = []
    small, large = summary["accuracy_optimized"], summary["accuracy_float"]
    lost = f"{(small - large) * 100:+.2f} points"
    rows.append(("accuracy, 450 held-out images", f"{large:.2%}", f"{small:.2%}", lost))
    for label, figures, form in (
        (
            "weight bytes (float in memory, optimized on disk)",
            ("weights_bytes_float", "weights_bytes_optimized"),
            "{:,}",
        ),
        ("compile, then load (s)", ("compile_s", "load_s"), "{:.3f}"),
    ):
        before, after = (summary[key] for key in figures)
        rows.append((label, form.format(before), form.format(after), f"{after / before:.2f}"))
    for batch in summary["latency_ms"]["float"]:
        before, after = (summary["latency_ms"][name][batch] for name in ("float", "optimized"))
        rows.append((f"latency at batch {batch} (ms)", f"{before:.3f}", f"{after:.3f}", f"{after / before:.2f}"))
    headings = ("", ">float", ">optimized", ">optimized / float")
    show(Table("handwritten digits: float against optimized", headings, rows))


def serve_and_ask(artifact_path: pathlib.Path, local: lx.Servable) -> dict[str, float]:
    """Start a server, send requests over many connections at once, and compare each answer with the local model."""
    _, _, images, _ = digits.data()
    command = [sys.executable, "-m", "lepton_xla", "serve", str(artifact_path), "--port", "0", "--json"]
    log = (FOLDER / "server.log").open("w")
    with log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as server:
        try:
            address = urllib.parse.urlsplit(listening_url(server))
            rows: queue.SimpleQueue[int] = queue.SimpleQueue()
            for number in range(REQUESTS):
                rows.put(number % len(images))
            expected = local(image=images)["output"]
            results: list[tuple[bool, float]] = []
            clients = [
                threading.Thread(target=ask, args=(address, rows, images, expected, results)) for _ in range(CLIENTS)
            ]
            start = time.perf_counter()
            for client in clients:
                client.start()
            for client in clients:
                client.join()
            elapsed = time.perf_counter() - start
        finally:
            server.send_signal(signal.SIGTERM)
            server.communicate()
    if server.returncode != 0:
        sys.exit(f"the server ended with exit code {server.returncode}")
    times = sorted(ms for _, ms in results)
    return {
        "requests": REQUESTS,
        "requests_ok": sum(right for right, _ in results),
        "requests_per_s": len(results) / elapsed,
        "p50_ms": times[len(times) // 2],
        "p99_ms": times[int(len(times) * 0.99)],
    }


def listening_url(server: subprocess.Popen) -> str:
    """The address that the server prints when it accepts requests."""
    for line in server.stdout:
        event = json.loads(line)
        if event.get("event") == "listening":
            return event["url"]
    sys.exit("the server stopped before it took requests")


def ask(address, rows: queue.SimpleQueue, images: np.ndarray, expected: np.ndarray, results: list) -> None:
    """Run one client, which sends row after row over one connection (Open Inference Protocol, JSON)."""
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=30)
    while True:
        try:
            row = rows.get_nowait()
        except queue.Empty:
            break
        tensor = {"name": "image", "datatype": "FP32", "shape": [1, 8, 8, 1], "data": images[row].ravel().tolist()}
        body = json.dumps({"inputs": [tensor]})
        start = time.perf_counter()
        connection.request("POST", "/v2/models/digits/infer", body)
        answer = connection.getresponse()
        payload = json.loads(answer.read())
        ms = (time.perf_counter() - start) * 1e3
        # On GPUs, TensorFloat-32 results depend on the number of rows; these logits reach 20.
        right = answer.status == 200 and np.allclose(payload["outputs"][0]["data"], expected[row], rtol=1e-3, atol=2e-2)
        results.append((bool(right), ms))
    connection.close()


if __name__ == "__main__":
    main()
