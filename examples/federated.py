"""A server and three clients, each in processes of its own, over TLS on this machine: minutes, as Flower starts many.

    python examples/federated.py [--rounds N] [--clients N] [--updates int4] [--alike] [--secure]

The digits are split by label, so that each client has other ones (`--alike`: evenly); no client's images leave it.
Needs the extra `federated`, and the package `trustme` for certificates. Writes build/federated/: `digits.lepton`, each
end's log, and summary.json with the accuracy on 450 held-out images and the bytes of each round, beside the simulation
of the same clients and a training that has all rows. The same by hand, in four shells:

    leptonx federate server examples/federated.py:federated --clients 3 -o digits.lepton
    leptonx federate client examples/federated.py:federated --server 127.0.0.1:9092 --folder one --part 1/3
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import digits
import jax.numpy as jnp
import numpy as np
import optax

import lepton_xla as lx
from lepton_xla.federated.flower.secure import quantization_step
from lepton_xla.federated.settings import FORMATS

FOLDER = pathlib.Path(__file__).parent.parent / "build" / "federated"
CONCENTRATION = 0.5


def program() -> lx.Program:
    """An untrained network, the same at all ends."""
    random = np.random.default_rng(0)
    made = lambda rows, columns: jnp.asarray(random.normal(size=(rows, columns)) / rows**0.5, jnp.float32)  # noqa: E731
    weights = {"body/kernel": made(64, 64), "body/bias": jnp.zeros(64), "head/kernel": made(64, 10)}

    def fn(w, image):
        hidden = jnp.maximum(image.reshape(image.shape[0], 64) @ w["body/kernel"] + w["body/bias"][None], 0)
        return hidden @ w["head/kernel"]

    return lx.trace(fn, weights, {"image": lx.TensorSpec(("batch", 8, 8, 1), "float32")})


def rows() -> dict[str, np.ndarray]:
    """The training images; `--part` gives each client its own."""
    images, labels, _, _ = digits.data()
    return {"image": images, "label": labels}


def federated() -> lx.federated.FederatedSpec:
    """What `leptonx federate` trains."""
    settings = lx.federated.Federation(rounds=3, epochs=10, batch_rows=16, updates="int4", most_rows=1500)
    return lx.federated.FederatedSpec(program, rows, optax.sgd(0.2), settings, evaluate=digits.evaluate)


def certificates(folder: pathlib.Path) -> dict[str, str]:
    """A certificate of the server and the authority that signed it."""
    import trustme

    authority = trustme.CA()
    server = authority.issue_cert("127.0.0.1", "localhost")
    files = {name: str(folder / f"{name}.pem") for name in ("ca", "cert", "key")}
    authority.cert_pem.write_to_path(files["ca"])
    server.cert_chain_pems[0].write_to_path(files["cert"])
    server.private_key_pem.write_to_path(files["key"])
    return files


def step_of_secure_mean(clients: int) -> float:
    """How far a secure mean of the updates may be off, since what the server adds up is rounded."""
    settings = federated().federation
    return quantization_step(settings) * settings.most_rows * clients / len(rows()["label"])


def simulation(clients: list[dict[str, np.ndarray]], options: argparse.Namespace) -> dict[str, float]:
    """The same rounds in this process."""
    spec = federated()
    last = lx.federated.simulate(
        spec, clients, spec.federation.replace(rounds=options.rounds, updates=options.updates)
    ).rounds[-1]
    return {"accuracy": last.evaluation["accuracy"], "loss": last.metrics["loss"]}


def main() -> None:
    """Start all ends, and wait for the server."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--updates", default="int4", choices=FORMATS)
    parser.add_argument("--alike", action="store_true", help="deal the rows out evenly, instead of by label")
    parser.add_argument("--secure", action="store_true", help="the server learns sums only; with --updates float32")
    options = parser.parse_args()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    files = certificates(FOLDER)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "lepton_xla", "federate"]
    target = f"{pathlib.Path(__file__).resolve()}:federated"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    clients = []
    for number in range(1, options.clients + 1):
        args = ["client", target, "--server", f"127.0.0.1:{port}", "--folder", str(FOLDER / f"client-{number}")]
        args += ["--tls-ca", files["ca"], "--part", f"{number}/{options.clients}"]
        args += [] if options.alike else ["--by-label", str(CONCENTRATION)]
        clients.append(subprocess.Popen([*command, *args], env=environment))
    args = ["server", target, "--port", str(port), "--clients", str(options.clients), "--rounds", str(options.rounds)]
    args += ["--secure"] if options.secure else []
    args += ["--updates", options.updates, "--folder", str(FOLDER / "server"), "-o", str(FOLDER / "digits.lepton")]
    args += ["--tls-cert", files["cert"], "--tls-key", files["key"], "--tls-ca", files["ca"], "--json"]
    try:
        done = subprocess.run([*command, *args], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        for client in clients:
            client.terminate()
            client.wait()
    rounds = json.loads(done.stdout)["rounds"]
    served = lx.load(FOLDER / "digits.lepton")
    label = None if options.alike else "label"
    parts = lx.federated.partition(rows(), options.clients, label=label, concentration=CONCENTRATION)
    simulated = simulation(parts, options)
    central = simulation([rows()], options)
    summary = {
        "accuracy": digits.evaluate(served)["accuracy"],
        "loss": rounds[-1]["metrics"].get("loss"),  # not with secure aggregation: the server learns a sum alone
        "simulated": simulated,
        "central": central,
        **({"step": step_of_secure_mean(options.clients)} if options.secure else {}),
        "rounds": [{name: each[name] for name in ("clients", "bytes_up", "bytes_down", "seconds")} for each in rounds],
    }
    (FOLDER / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    for each in rounds:
        print(f"round {each['round']}: {each['clients']} clients, {each['bytes_up']:,} bytes, {each['seconds']:.0f} s")
    for name, found in (("federated", summary), ("simulated", simulated), ("all rows in one place", central)):
        loss = "" if found["loss"] is None else f", loss of the last round {found['loss']:.5f}"
        print(f"{name}: accuracy {found['accuracy']:.2%}{loss}")


if __name__ == "__main__":
    main()
