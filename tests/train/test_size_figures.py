"""What `size` says, compared with what is: the benchmark's two tables."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from lepton_xla.sharding import topologies

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "sizes.py"


def table(part, folder):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, SCRIPT, "--only", part, "--json", folder / "figures.json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "figures.json").read_text())[part]


@pytest.mark.slow
@pytest.mark.skipif(not topologies.has_compiler("v5e:4x4"), reason="needs the package libtpu")
def test_what_is_sent_is_within_5_percent_of_the_textbooks_bytes(tmp_path):
    rows = table("sent", tmp_path)
    aimed = {row["case"]: row["ratio"] for row in rows if row["aimed"]}
    assert len(aimed) == 4
    assert aimed == pytest.approx(dict.fromkeys(aimed, 1.0), abs=0.05)
    # TPU's compiler writes a reduce-scatter over all 16 chips as an all-reduce; should it cease to, the pages change.
    assert [row["ratio"] for row in rows if not row["aimed"]] == pytest.approx([1.5], abs=0.05)


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads resident memory from /proc")
def test_memory_grows_as_it_says(tmp_path):
    growth = [row["growth_ratio"] for row in table("memory", tmp_path) if "growth_ratio" in row]
    assert growth == pytest.approx([1.0, 1.0], abs=0.2)
