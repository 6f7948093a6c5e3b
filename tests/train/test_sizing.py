"""What `size` says of a step: parts by hand, the compiler's figures, what fits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lepton_xla as lx
from lepton_xla.sharding import Rules, topologies
from lepton_xla.sharding.collectives import sent_by_kind
from lepton_xla.train import sizing

D, H = 16, 64
PAIR = Rules([("up", (None, "model")), ("down", ("model",))])
needs_tpu = pytest.mark.skipif(not topologies.has_compiler("v5e:1x1"), reason="needs the package libtpu")
needs_gpu = pytest.mark.skipif(not topologies.has_compiler("h100:1"), reason="needs JAX's CUDA plugin")


@pytest.fixture(scope="module")
def program():
    weights = {"up": jnp.ones((D, H)), "down": jnp.ones((H, D)), "bias": jnp.ones(D)}
    inputs = {"x": lx.TensorSpec(("batch", D), "float32")}
    return lx.trace(lambda w, x: jnp.tanh(x @ w["up"]) @ w["down"] + w["bias"][None], weights, inputs)


def squares(program):
    def loss(weights, batch, key, state):
        return jnp.mean(jnp.square(program.fn(weights, batch["x"]) - batch["y"])), {}, state

    return loss


def batch(rows):
    return {name: np.zeros((rows, D), np.float32) for name in ("x", "y")}


def sized(program, rows=8, **options):
    options = {"topology": "v5e:1x2", **options}
    return lx.train.size(program, squares(program), optax.sgd(0.1, 0.9), batch(rows), **options)


WEIGHTS = 4 * (2 * D * H + D)


def test_the_parts_of_data_parallel_training(program):
    found = sized(program, ema=0.9, keep_best=True)
    assert found.parts == {
        "weights": WEIGHTS, "optimizer": WEIGHTS, "averages": 2 * WEIGHTS, "batch": 2 * 4 * D * 4,
    }  # fmt: skip
    # Up and down: a product forward, and two backward, of which the first layer needs one.
    assert found.flops == 8 * 2 * D * H * (2 + 3) // 2
    assert found.mesh == {"data": 2}
    assert found.stage == "float"
    assert found.gradients_bytes == WEIGHTS
    # Gradients, and the sum of squares.
    assert sent_by_kind(found.collectives)["all-reduce"] == pytest.approx(WEIGHTS, rel=0.01)
    # The new state takes the memory of the old one; metrics, the key and code are small, but for a TPU's code.
    rest = found.total_bytes - sum(found.parts.values()) - found.temporary_bytes
    assert 0 <= rest < WEIGHTS / 2 or found.topology.is_exact


def test_the_parts_of_tensor_parallel_training(program):
    found = sized(program, mesh="data=1,model=2", rules=PAIR)
    assert found.parts["weights"] == found.parts["optimizer"] == 4 * (D * H + D)
    assert found.parts["batch"] == 2 * 4 * D * 8
    # The sum over the parts of `down`, forward; nothing backward, where no layer is below.
    assert sent_by_kind(found.collectives)["all-reduce"] == pytest.approx(8 * D * 4, rel=0.05)


def test_accumulation_takes_less_memory(program):
    whole, cut = (sized(program, 4096, accumulate=number) for number in (1, 8))
    # On a TPU, whose own compiler may be installed, so few fit the memory on the chip and take none.
    assert cut.topology.is_exact or cut.temporary_bytes < 0.6 * whole.temporary_bytes
    assert cut.flops == whole.flops


def test_what_is_sized_is_what_fit_runs(program, monkeypatch):
    """The step of `fit` and that of `size` are the same program."""
    texts = []
    lower = jax.stages.Traced.lower

    def spy(traced, *args, **kwargs):
        lowered = lower(traced, *args, **kwargs)
        texts.append(lowered.as_text())
        return lowered

    monkeypatch.setattr(jax.stages.Traced, "lower", spy)
    options = {"accumulate": 2, "compute_dtype": "bfloat16", "clip_norm": 1.0, "ema": 0.9}
    rules = Rules(fallback="data", fallback_bytes=0)
    sized(program, topology=None, mesh="data=2", rules=rules, **options)
    (step,) = [text for text in texts if "jit_step" in text]
    texts.clear()
    lx.train.fit(
        program, squares(program), optax.sgd(0.1, 0.9), [batch(8)], steps=1, mesh="data=2", rules=rules, **options
    )
    assert step in texts


def test_a_recipe_sizes_the_step_that_rounds(program):
    compression = lx.train.Compression("int8", quantize_from=100)
    plain, rounded = sized(program, 64), sized(program, 64, compression=compression)
    assert (plain.stage, rounded.stage) == ("float", "rounded")
    assert rounded.parts == plain.parts
    assert rounded.total_bytes != plain.total_bytes


def test_a_teachers_weights_are_counted(program):
    """Each device has the whole teacher."""
    loss = lx.train.distill(program, program)
    found = lx.train.size(program, loss, optax.sgd(0.1), {"x": batch(8)["x"]}, topology="v5e:1x2")
    assert found.parts["loss"] == WEIGHTS
    assert found.flops == 8 * 2 * D * H * (2 + 3 + 2) // 2


def test_rows_replace_those_of_the_batch(program):
    assert (
        sized(program, rows=8).parts["batch"] * 4
        == lx.train.size(program, squares(program), optax.sgd(0.1), batch(8), rows=32, topology="v5e:1x2").parts[
            "batch"
        ]
    )


def test_fits_is_what_the_memory_says(program):
    found = sized(program)
    assert found.memory_bytes == int(15.75 * 2**30)
    assert found.fits
    need = found.total_bytes
    assert sized(program, memory_bytes=need).fits
    assert not sized(program, memory_bytes=need - 1).fits
    assert sized(program, topology=None, mesh=None).fits is None


def test_stand_ins_are_told_from_the_platforms_own_compiler(program):
    there = topologies.has_compiler("v5e:1x2")
    assert sized(program).topology.is_exact == there
    document = sized(program).to_json()
    assert (document["exact"], document["device_kind"], document["devices"]) == (there, "TPU v5 lite", 2)


@pytest.mark.parametrize("exact", [True, False])
def test_predicted_times(exact):
    figures = topologies.DeviceFigures(1e12, memory_bandwidth=1e9, link_bandwidth=1e8)
    found = sizing._seconds(
        figures, 2 * 10**12, (sizing.Collective("all-gather", 10**8, 2),), {"bytes accessed": 3e9}, exact=exact
    )
    # Bytes that a CPU's compiler counts say nothing of another device's memory.
    assert found == {"products": 2.0, "collectives": 0.5} | ({"memory": 3.0} if exact else {})


def test_no_time_is_predicted_over_a_network_of_unknown_speed(program):
    one, two = (sized(program, topology=name) for name in ("h100:2", "h100:2x1"))
    assert one.step_seconds is not None
    assert two.step_seconds is None
    assert two.seconds["products"] == one.seconds["products"]


@pytest.mark.parametrize("limit", [1, 7, 8, 63, 64, 1000, 100_000])
@pytest.mark.parametrize("begin", [8, 512])
@pytest.mark.parametrize("grows", ["evenly", "in jumps", "unknown"])
def test_the_largest_batch_is_found(program, limit, begin, grows):
    tries = []

    def at(rows):
        tries.append(rows)
        assert rows % 8 == 0
        used = {"evenly": 10 + rows, "in jumps": 10 + (rows // 100) * 100, "unknown": None}[grows]
        fits = rows <= limit if used is None else used <= 10 + limit
        return dataclasses.replace(
            like, rows=rows, total_bytes=used, memory_bytes=10 + limit, refusal="" if fits else "x"
        )

    like = sized_once(program)
    like = dataclasses.replace(like, unit=8, topology=dataclasses.replace(like.topology, is_exact=True))
    fitting, refused = lx.train.largest_batch(at, at(begin))
    assert len(tries) < 50
    fits = [rows for rows in (begin, *tries) if at(rows).fits]
    assert (fitting.rows if fitting else None) == max(fits, default=None)
    assert refused not in fits
    assert refused - (fitting.rows if fitting else 0) <= max(8, max(fits, default=0) / 32)


def sized_once(program, cache={}):  # noqa: B006
    if not cache:
        cache["found"] = sized(program)
    return cache["found"]


def test_what_fits_has_to_be_known(program):
    with pytest.raises(lx.TrainingError, match="give memory_bytes"):
        lx.train.largest_batch(lambda rows: None, sized(program, topology=None))


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"topology": "v9:2x2"}, lx.CompileError, "topology 'v9:2x2': "),
        ({"topology": "v5e:2x"}, lx.CompileError, "topology 'v5e:2x': "),
        ({"mesh": "data=3"}, lx.ShardingError, "takes 3 devices, but there are 2"),
        ({"rows": 7}, lx.ShardingError, "has 7 rows, which data=2 cannot split"),
        ({"accumulate": 3}, lx.TrainingError, "accumulate = 3 does not divide the batch: 8 rows on 2 pieces"),
        ({"rows": 0}, lx.TrainingError, r"batch\['x'\] has no rows; its shape is \(0, 16\)"),
        ({"accumulate": 0}, lx.TrainingError, "accumulate = 0; expected a whole number of at least 1"),
        ({"memory_bytes": 1.5}, lx.TrainingError, "memory_bytes = 1.5; expected a whole number of at least 1"),
        ({"topology": None, "rules": PAIR}, lx.TrainingError, "give mesh or topology too"),
        ({"rules": Rules([("nothing", ("data",))])}, lx.ShardingError, "matches no weight"),
    ],
)
def test_what_cannot_be_sized_is_refused(program, options, error, said):
    with pytest.raises(error, match=said):
        sized(program, **options)


def test_a_number_of_rows_that_is_none_is_refused(program):
    with pytest.raises(lx.TrainingError, match="size: rows = 0; expected a whole number"):
        lx.train.size(program, squares(program), optax.sgd(0.1), batch(8), rows=0)


@pytest.mark.skipif(topologies.has_compiler("v5e:1x1"), reason="its compiler needs no stand-ins")
def test_too_few_stand_ins(program):
    with pytest.raises(lx.ShardingError, match=r"16 CPU devices .* has 2: set JAX_NUM_CPU_DEVICES=16"):
        sized(program, topology="v5e:4x4")


class _ExhaustedError(jax.errors.JaxRuntimeError):
    error_code_string = "RESOURCE_EXHAUSTED"


class _OtherError(jax.errors.JaxRuntimeError):
    error_code_string = "INTERNAL"


def test_the_compilers_verdict_is_one_line(program, monkeypatch):
    def refuse(error):
        def compile(lowered):
            raise error("Ran out of memory on HBM: 28.05G exceeds 15.75G\nSee a page.")

        return compile

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse(_ExhaustedError))
    found = sized(program)
    assert (found.fits, found.refusal) == (False, "Ran out of memory on HBM: 28.05G exceeds 15.75G")
    assert found.total_bytes is None
    assert found.parts["weights"] == WEIGHTS
    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse(_OtherError))
    with pytest.raises(lx.CompileError, match="the step does not compile for v5e:1x2: Ran out"):
        sized(program)


@pytest.mark.slow
@needs_tpu
def test_tpus_compiler_refuses_what_does_not_fit():
    weights = {"w": jnp.ones((4096, 4096))}
    program = lx.trace(
        lambda w, x: jnp.tanh(x @ w["w"]) @ w["w"], weights, {"x": lx.TensorSpec(("n", 4096), "float32")}
    )
    shapes = {name: jax.ShapeDtypeStruct((1 << 20, 4096), jnp.float32) for name in ("x", "y")}
    found = lx.train.size(program, squares(program), optax.sgd(0.1), shapes, topology="v5e:1x1")
    assert found.topology.is_exact
    assert found.fits is False
    assert "exceeds available HBM" in found.refusal
    assert "\n" not in found.refusal


@pytest.mark.slow
@needs_gpu
@pytest.mark.parametrize("topology", ["h100:2", "h200:2", "b200:2x1"])
def test_gpus_by_their_description(program, topology):
    found = sized(program, 64, topology=topology, compute_dtype="bfloat16")
    assert found.topology.is_exact
    assert found.fits
    assert found.parts["weights"] == WEIGHTS
    assert sent_by_kind(found.collectives)["all-reduce"] == pytest.approx(WEIGHTS, rel=0.6)
