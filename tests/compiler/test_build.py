import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lepton_xla import compiler
from lepton_xla.compiler.independence import default_tolerance, product_dtypes
from lepton_xla.errors import ArtifactError, CompileError
from lepton_xla.program import Program, TensorSpec, trace

ROWS = {"x": TensorSpec(("batch", 6), "float32")}
TOKENS = {"x": TensorSpec(("batch", "seq", 4), "float32")}
WEIGHTS = {"scale": np.linspace(0.5, 2, 6, dtype=np.float32)}


def program(fn: Any, inputs: dict[str, TensorSpec] = ROWS, weights: Any = WEIGHTS) -> Program:
    return trace(fn, weights, inputs)


def batch_norm(w: Any, x: jax.Array) -> jax.Array:
    return (x - x.mean(0, keepdims=True)) * w["scale"][None]


def batch_softmax(w: Any, x: jax.Array) -> jax.Array:
    return jax.nn.softmax(x * w["scale"][None], axis=0)


def per_tensor_quantization(w: Any, x: jax.Array) -> jax.Array:
    step = jnp.abs(x).max() / 127
    return jnp.round(x / step) * step * w["scale"][None]


def divided_by_batch(w: Any, x: jax.Array) -> jax.Array:
    return x * w["scale"][None] / x.shape[0]


def position_in_batch(w: Any, x: jax.Array) -> jax.Array:
    return x * w["scale"][None] + jnp.arange(x.shape[0], dtype=jnp.float32)[:, None]


def running_sum(w: Any, x: jax.Array) -> jax.Array:
    return jnp.cumsum(x * w["scale"][None], axis=0)


def nan_from_zero_rows(w: Any, x: jax.Array) -> jax.Array:
    normed = x / jnp.linalg.norm(x, axis=1, keepdims=True)
    return x * w["scale"][None] + 0 * normed.sum()


def argmax_over_batch(w: Any, x: jax.Array) -> jax.Array:
    return jnp.where(x == x.max(0, keepdims=True), 1, 0)


MIXING = [
    batch_norm, batch_softmax, per_tensor_quantization, divided_by_batch, position_in_batch, running_sum,
    nan_from_zero_rows, argmax_over_batch,
]  # fmt: skip


@pytest.mark.parametrize(
    ("fn", "compiled_sizes"),
    # In one bucket size only, the size of the batch is a constant.
    [
        (fn, compiled_sizes)
        for fn in MIXING
        for compiled_sizes in ((1, 4), (4,))
        if fn is not divided_by_batch or len(compiled_sizes) > 1
    ],
)
def test_rows_that_see_each_other_are_refused(fn: Any, compiled_sizes: tuple[int, ...]) -> None:
    with pytest.raises(CompileError, match="rows along 'batch' affect each other"):
        compiler.compile(program(fn), {"batch": compiled_sizes})


def test_an_output_without_the_rows_is_refused() -> None:
    with pytest.raises(CompileError, match=r"output 'output' is float32\[6\], so it does not have one result per row"):
        compiler.compile(program(lambda w, x: x.mean(0) * w["scale"]), {"batch": (1, 4)})


def test_rows_of_their_own_are_accepted_though_zero_rows_are_nan() -> None:
    def normalize(w: Any, x: jax.Array) -> jax.Array:
        return x / jnp.sqrt((x * x).sum(1, keepdims=True)) * w["scale"][None]

    servable = compiler.compile(program(normalize), {"batch": (4,)}).servable()
    x = np.ones((1, 6), np.float32)
    np.testing.assert_allclose(servable(x=x)["output"], WEIGHTS["scale"][None] / np.sqrt(6), rtol=1e-6)


def unmasked_mean(w: Any, x: jax.Array) -> jax.Array:
    return x.mean(1)


def unmasked_attention(w: Any, x: jax.Array) -> jax.Array:
    scores = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", x, x), -1)
    return jnp.einsum("bqk,bkd->bqd", scores, x)


def masked_mean(w: Any, x: jax.Array) -> jax.Array:
    real = (jnp.abs(x).sum(-1, keepdims=True) > 0).astype(jnp.float32)
    return (x * real).sum(1) / real.sum(1)


def per_token(w: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x)


@pytest.mark.parametrize("compiled_sizes", [(2, 8), (8,)])
@pytest.mark.parametrize("fn", [unmasked_mean, unmasked_attention])
def test_padding_that_changes_results_is_refused(fn: Any, compiled_sizes: tuple[int, ...]) -> None:
    with pytest.raises(CompileError, match="padded with zeros along 'seq', which changes this model's results"):
        compiler.compile(program(fn, TOKENS), {"batch": (1, 2), "seq": compiled_sizes})


@pytest.mark.parametrize("fn", [masked_mean, per_token])
def test_padding_that_is_masked_is_accepted(fn: Any) -> None:
    servable = compiler.compile(program(fn, TOKENS), {"batch": (1, 2), "seq": (2, 8)}).servable()
    x = np.random.default_rng(0).standard_normal((3, 5, 4)).astype(np.float32)
    expected = x.astype(np.float64).mean(1) if fn is masked_mean else np.tanh(x.astype(np.float64))
    np.testing.assert_allclose(servable(x=x)["output"], expected, rtol=1e-5, atol=1e-6)


def test_examples_are_the_probes_where_random_numbers_show_nothing() -> None:
    model = program(lambda w, x: jnp.log(x - 100) * w["scale"][None])
    with pytest.raises(CompileError, match="no finite value on the test inputs"):
        compiler.compile(model, {"batch": (2,)})
    compiler.compile(model, {"batch": (2,)}, examples={"x": np.full((3, 6), 200.0, np.float32)})


@pytest.mark.parametrize(
    ("examples", "message"),
    [({"y": np.zeros((1, 6))}, "examples name 'y'"), ({"x": np.zeros((1, 5))}, r"examples\['x'\] has shape \(1, 5\)")],
)
def test_bad_examples_are_refused(examples: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(CompileError, match=message):
        compiler.compile(program(lambda w, x: x), {"batch": (2,)}, examples=examples)


def test_large_constants_are_refused_and_middling_ones_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    def closing_over(size: int) -> Program:
        table = np.ones((size, 6), np.float32)
        return program(lambda w, x: x * w["scale"][None] + jnp.asarray(table)[:1])

    with pytest.raises(CompileError, match=r"closes over 45.8 MiB of constant arrays"):
        compiler.compile(closing_over(2_000_000), {"batch": (1,)})
    with caplog.at_level(logging.WARNING):
        compiler.compile(closing_over(100_000), {"batch": (1,)})
    assert "closes over 2.3 MiB" in caplog.text


def test_executables_hold_no_weights() -> None:
    weights = {"kernel": np.random.default_rng(0).standard_normal((1000, 1000)).astype(np.float32)}
    inputs = {"x": TensorSpec(("batch", 1000), "float32")}
    artifact = compiler.compile(trace(lambda w, x: x @ w["kernel"], weights, inputs), {"batch": (1, 8)})
    manifest = artifact.save("memory://no-weights-inside/")
    code = [entry.size for name, entry in manifest.files.items() if not name.startswith("weights/")]
    assert max(code) < 100_000


def test_progress_and_manifest() -> None:
    seen: list[tuple[str, int, int]] = []
    artifact = compiler.compile(
        program(lambda w, x: x * w["scale"][None]), {"batch": (1, 2)},
        name="scaled", version="3", metrics={"accuracy": np.float32(0.5)}, progress=lambda *step: seen.append(step),
    )  # fmt: skip
    assert [done for _, done, _ in seen] == [0, 1, 2, 3, 4]
    assert {total for *_, total in seen} == {4}
    assert artifact.manifest.buckets == {"batch": (1, 2)}
    assert artifact.manifest.programs_note == ""
    assert set(artifact.manifest.compile_s) == {"batch=1", "batch=2"}
    artifact.save("memory://progress/")
    servable = compiler.load("memory://progress/")
    assert (servable.name, servable.version) == ("scaled", "3")
    assert servable.manifest.metrics == {"accuracy": 0.5}


def test_a_plan_that_is_not_json_is_refused_at_save() -> None:
    artifact = compiler.compile(program(lambda w, x: x), {"batch": (1,)}, plan={"site": object()})
    with pytest.raises(ArtifactError, match="must be plain JSON"):
        artifact.save("memory://not-json/")


def test_a_model_that_cannot_be_symbolic_is_exported_per_bucket(tmp_path: Any, caplog: Any) -> None:
    def fn(w: Any, x: jax.Array) -> jax.Array:
        out = x * w["scale"][None]
        # The number of steps depends on the size, which no symbolic program can express.
        for _ in range(x.shape[0]):
            out = out + 0.0
        return out

    with caplog.at_level(logging.WARNING):
        artifact = compiler.compile(program(fn), {"batch": (1, 3)})
    assert "no symbolic program" in caplog.text
    assert "no symbolic program" in artifact.manifest.programs_note
    manifest = artifact.save(tmp_path / "m.lepton")
    assert [entry.sizes for entry in manifest.programs] == [{"batch": 1}, {"batch": 3}]


def test_a_model_that_xla_refuses_is_named_with_its_bucket() -> None:
    def fn(w: Any, x: jax.Array) -> jax.Array:
        if x.shape[0] == 2:
            raise ValueError("not two")
        return x

    with pytest.raises(CompileError, match="bucket batch=2: ValueError: not two"):
        compiler.compile(program(fn), {"batch": (1, 2)})


def test_narrow_weights_do_not_hide_a_faint_mixing_of_rows() -> None:
    """Between two executables int8 may differ by several percent, between two runs of one by nothing."""

    def fn(w: Any, x: jax.Array) -> jax.Array:
        return x * w["scale"].astype(jnp.float32)[None] + 0.02 * x.mean(0, keepdims=True)

    weights = {"scale": np.arange(1, 7, dtype=np.int8)}
    with pytest.raises(CompileError, match="next to other rows"):
        compiler.compile(program(fn, weights=weights), {"batch": (4,)})


def test_few_bits_may_differ_more_whether_weights_have_them_or_products() -> None:
    def narrow(x: jax.Array, dtype: Any) -> jax.Array:
        return jax.lax.map(lambda row: row.astype(dtype) @ row.astype(dtype), x).astype(jnp.float32)

    model = program(lambda w, x: narrow(x, jnp.bfloat16) + x @ w["scale"])
    found = product_dtypes(model.jaxpr({"batch": 2}))
    assert found == {"float32", "bfloat16"}
    assert default_tolerance(found) == default_tolerance(["bfloat16"]) == 3e-2
    assert default_tolerance(["float32", "bool", "int32"]) == 1e-3
    rounding = program(lambda w, x: narrow(x, jnp.int8) + x @ w["scale"])
    assert default_tolerance(product_dtypes(rounding.jaxpr({"batch": 2}))) == 5e-2
