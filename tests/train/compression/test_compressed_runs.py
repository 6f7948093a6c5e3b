"""`fit` with a compression schedule: it ends as planned, and as it would have ended without an interruption."""

import jax
import numpy as np
import optax
import pytest
from test_stages import SHRINK, STATIC, batch, program

import lepton_xla as lx
from lepton_xla.train import Checkpoints, Compression, fit, polynomial, supervised

# Each stage is compiled; in short, test_stages.py resumes one.
pytestmark = pytest.mark.slow
COMPRESSION = Compression(
    STATIC.replace(prune=[{"sites": ".*", "sparsity": 0.5}]),
    quantize_from=4,
    freeze_ranges_at=5,
    learn_scales=True,
    shrink_at=2,
    shrink=SHRINK,
    sparsify=polynomial(0, 5, every=1),
)


@pytest.fixture(autouse=True)
def lenient():
    """Promotion as users have it, which optax needs."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def run(steps, **options):
    model = program()
    optimizer, loss = optax.adam(1e-2), supervised(model)
    return fit(model, loss, optimizer, batch, steps=steps, compression=COMPRESSION, ema=0.9, **options)


@pytest.mark.parametrize("stops_at", [3, 4, 6])
def test_a_run_goes_on_in_the_stage_where_it_was(tmp_path, stops_at):
    whole = run(8)
    folder = Checkpoints(tmp_path, every=1)
    run(stops_at, checkpoint=folder)
    resumed = run(8, checkpoint=folder)
    assert resumed.stage.decided.passed == ("shrink", "quantize", "freeze")
    jax.tree.map(np.testing.assert_array_equal, resumed.state.replace(key=()), whole.state.replace(key=()))
    assert resumed.program.weights["mid"].shape == (4, 4)
    stored = resumed.quantized()
    assert stored.weights["mid"].format == "int8"
    assert [report.name for report in stored.history][:1] == ["shrink"]


def test_a_compressed_run_on_a_mesh():
    alone, shared = run(8), run(8, mesh="data=2", accumulate=2)
    assert shared.stage.decided.passed == alone.stage.decided.passed
    assert jax.tree.map(np.shape, shared.state.weights) == jax.tree.map(np.shape, alone.state.weights)
    assert np.isfinite(shared.metrics["loss"])
    weights = shared.program.weights["mid"]
    assert isinstance(weights, jax.Array)
    assert lx.passes.cost(shared.program, {"batch": 1}).flops == lx.passes.cost(alone.program, {"batch": 1}).flops
