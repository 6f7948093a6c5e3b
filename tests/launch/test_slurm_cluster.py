"""The script of `leptonx launch slurm` on a real SLURM of two nodes: a hang, a preemption, and the end.

It runs as root on Debian on x86-64, and fails there, rather than being left out, if Debian's packages cannot be had.
"""

import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys

import pytest
from slurm_cluster import SlurmCluster

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not (shutil.which("apt-get") and platform.machine() == "x86_64" and os.geteuid() == 0),
    reason="SLURM's daemons are run as root, from Debian's packages for x86-64",
)

# A collective in every step, as in training. The second process hangs in the job's first attempt. The run goes on until
# it is told to stop, and ends by itself once SLURM has started the job again.
PROGRAM = """
import os, pathlib, sys, time
import numpy as np
import lepton_xla as lx

place = lx.launch.initialize(timeout_s=60)
import jax
from jax.experimental import multihost_utils

checkpoint = pathlib.Path("checkpoint")
start = int(checkpoint.read_text()) if checkpoint.exists() else 0
print(f"process {place.index} of {place.count} goes on at step {start}", flush=True)
restarted = "SLURM_RESTART_COUNT" in os.environ
lx.launch.beat(start, "compile")
step = start
while not (restarted and step == start + 10):
    lx.launch.beat(step, "step")
    ranks = multihost_utils.process_allgather(np.array([place.index]), tiled=True)
    assert ranks.tolist() == [0, 1], ranks
    if step == 7 and start == 0 and place.index == 1:
        time.sleep(600)
    step += 1
    stop = multihost_utils.reached_preemption_sync_point(step)
    if place.index == 0 and (step % 5 == 0 or stop):
        pathlib.Path("new").write_text(str(step))
        os.replace("new", checkpoint)
    if stop:
        print(f"process {place.index} saved step {step}", flush=True)
        sys.exit(75)
    time.sleep(0.02)
print(f"process {place.index} is done at step {step}", flush=True)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        cluster.environ |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        cluster.environ["PATH"] = f"{pathlib.Path(sys.executable).parent}:{cluster.environ['PATH']}"
        yield cluster


def test_a_run_hangs_is_preempted_and_is_done(cluster, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    # The names of these nodes do not resolve.
    address = "export JAX_COORDINATOR_ADDRESS=127.0.0.1:$JAX_COORDINATOR_PORT"
    launch = [sys.executable, "-m", "lepton_xla", "launch", "slurm", "--nodes", "2", "--gpus-per-node", "0"]
    options = ["--watchdog-s", "5", "--watchdog-compile-s", "60", "--max-restarts", "1", "--time", "10:00", "--submit"]
    said = cluster.run(*launch, *options, "--", "bash", "-c", f"{address}; exec python program.py", cwd=tmp_path)
    number = int(re.fullmatch(r"Submitted batch job (\d+)\n", said)[1])
    log = tmp_path / f"train-{number}.log"

    # The watchdog of process 1 finds the hang, srun ends the other, and the script starts both again.
    cluster.wait_until(lambda: "restart 1 of 1" in log.read_text() if log.exists() else False, 240)
    assert "leptonx: rank 1 hangs: no progress for 5." in log.read_text()
    assert "it is at step 7 in phase step" in log.read_text()
    cluster.wait_until(lambda: int((tmp_path / "checkpoint").read_text()) >= 15, 180)
    assert resumed(log) == [0, 0, 5, 5]

    # Preempted: both save the same step, and SLURM queues the job again.
    cluster.run("scancel", "--signal=TERM", str(number))
    cluster.wait_until(lambda: {"Restarts": "1", "Reason": "BeginTime"}.items() <= cluster.job(number).items(), 240)
    saved = [int(step) for step in re.findall(r"process \d saved step (\d+)", log.read_text())]
    assert len(saved) == 2
    assert len(set(saved)) == 1
    assert int((tmp_path / "checkpoint").read_text()) == saved[0]

    # SLURM would wait for two minutes. A batch script that ends after that would end the job that has begun again; so
    # would a node that revokes the job's credential in the second in which it begins again ("Job credential revoked").
    cluster.wait_until(cluster.is_idle, 60)
    cluster.run("scontrol", "update", f"JobId={number}", "StartTime=now+5")
    cluster.wait_until(lambda: cluster.job(number)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), 240)
    assert cluster.job(number)["JobState"] == "COMPLETED", log.read_text()
    assert resumed(log)[-2:] == [saved[0]] * 2
    assert log.read_text().count(f"is done at step {saved[0] + 10}") == 2


def resumed(log):
    """The steps at which processes went on, in the order of the log."""
    return [int(step) for step in re.findall(r"process \d of 2 goes on at step (\d+)", log.read_text())]


def test_the_batch_script_itself_is_no_task(cluster, tmp_path):
    """Nor is an ssh session: variables are there in part."""
    code = "import lepton_xla as lx; lx.launch.initialize()"
    done = subprocess.run(
        ["sbatch", "--wait", "--nodes=2", "--output=out", f"--wrap={sys.executable} -c '{code}'"],
        cwd=tmp_path, env=cluster.environ, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    last = (tmp_path / "out").read_text().splitlines()[-1]
    assert re.search(r"LaunchError: SLURM_JOB_ID=\d+ says .* SLURM_STEP_NODELIST.* missing.* start it with srun", last)
