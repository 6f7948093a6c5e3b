import threading

import compiler_models as models
import jax.numpy as jnp
import numpy as np
import pytest

from lepton_xla import compiler
from lepton_xla.errors import InputError
from lepton_xla.program import TensorSpec, trace


@pytest.fixture(scope="module")
def dense(dense_artifact: compiler.Artifact) -> compiler.Servable:
    return dense_artifact.servable()


@pytest.fixture(scope="module")
def text(text_artifact: compiler.Artifact) -> compiler.Servable:
    return text_artifact.servable()


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 9, 16, 21])
def test_any_batch_is_padded_split_and_cut(dense: compiler.Servable, rows: int) -> None:
    x = np.random.default_rng(rows).standard_normal((rows, 12)).astype(np.float32)
    out = dense(x=x)
    assert list(out) == ["output"]
    np.testing.assert_allclose(out["output"], models.dense_reference(x), rtol=1e-5, atol=1e-6)
    assert out["output"].dtype == np.float32


@pytest.mark.parametrize(("rows", "seq"), [(1, 4), (3, 3), (4, 16), (6, 11), (9, 1)])
def test_two_symbolic_dimensions(text: compiler.Servable, rows: int, seq: int) -> None:
    inputs = models.text_inputs(rows, seq)
    out, expected = text(**inputs), models.text_reference(**inputs)
    assert out["tokens"].shape == (rows, seq, models.CLASSES)
    for name, value in expected.items():
        np.testing.assert_allclose(out[name], value, rtol=1e-5, atol=1e-6)


def test_no_rows_give_no_rows(text: compiler.Servable) -> None:
    out = text(**models.text_inputs(0, 7))
    assert {name: value.shape for name, value in out.items()} == {"pooled": (0, 16), "tokens": (0, 7, 8)}


def test_nan_passes_through_its_own_row_only(dense: compiler.Servable) -> None:
    x = np.ones((3, 12), np.float32)
    x[1, 5] = np.nan
    assert np.isnan(dense(x=x)["output"]).all(1).tolist() == [False, True, False]


def test_lists_and_strided_arrays(dense: compiler.Servable) -> None:
    x = np.random.default_rng(0).standard_normal((12, 4)).astype(np.float32)
    expected = models.dense_reference(x.T)
    np.testing.assert_allclose(dense(x=x.T)["output"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dense(x=x.T.tolist())["output"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input 'x' is missing"),
        ({"x": np.zeros((1, 12), np.float32), "y": 1}, "unknown input 'y'; the model takes 'x'"),
        ({"x": np.zeros((1, 12))}, r"dtype float64, expected float32; cast it with .astype\('float32'\)"),
        ({"x": np.zeros(12, np.float32)}, r"has 1 dimensions, shape \(12,\); expected float32\[batch, 12\]"),
        ({"x": np.zeros((2, 11), np.float32)}, "dimension 1 is 11, expected 12"),
        ({"x": [["a"] * 12]}, "holds <U1 values"),
        ({"x": [[1.0], [1.0, 2.0]]}, "cannot be made an array"),
    ],
)
def test_bad_inputs_say_what_came_and_what_was_expected(dense: compiler.Servable, inputs: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        dense(**inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": np.zeros((2, 5), np.int64)}, "dtype int64, expected int32"),
        ({"ids": [[0.5] * 5] * 2}, "values that int32 cannot"),
        ({"ids": [[2**40] * 5] * 2}, "values that int32 cannot"),
        ({"ids": np.zeros((3, 5), np.int32)}, r"dimension 0 \(batch\) is 2, but it is 3 in input 'ids'"),
        (models.text_inputs(2, 17), "'seq' is 17, larger than the largest compiled size 16"),
    ],
)
def test_bad_sizes_and_values(text: compiler.Servable, change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        text(**{**models.text_inputs(2, 5), **change})


def test_run_takes_exactly_a_bucket(dense: compiler.Servable) -> None:
    x = np.random.default_rng(0).standard_normal((4, 12)).astype(np.float32)
    for out in (dense.run({"batch": 4}, [x]), dense.runner({"batch": 4})([x])):
        np.testing.assert_allclose(out[0], models.dense_reference(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match=r"got float32\(3, 12\), expected float32\(4, 12\)"):
        dense.run({"batch": 4}, [x[:3]])
    with pytest.raises(InputError, match="float64"):
        dense.run({"batch": 4}, [x.astype(np.float64)])
    with pytest.raises(KeyError):
        dense.run({"batch": 3}, [x[:3]])


def test_threads_get_their_own_answers(dense: compiler.Servable) -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(200):
            x = random.standard_normal((int(random.integers(1, 12)), 12)).astype(np.float32)
            if np.abs(dense(x=x)["output"] - models.dense_reference(x)).max() > 1e-5:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_attributes(text: compiler.Servable) -> None:
    assert (text.name, text.version, text.route, text.row_symbol) == ("text", "1", "executables", "batch")
    assert text.buckets == {"batch": (1, 4), "seq": (4, 16)}
    assert list(text.inputs) == ["ids", "mask"]
    assert str(text.outputs["tokens"]) == "float32[batch, seq, 8]"
    assert text.weights_bytes == 4 * (50 * 16 + 16 * 8)


def aligned(shape, dtype=np.float32, offset=0):
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def test_a_bound_run_sees_what_the_arrays_and_the_weights_are_then():
    program = trace(lambda w, x, n: (x @ w["w"], n + 1), {"w": jnp.eye(4)}, {
        "x": TensorSpec(("batch", 4), "float32"), "n": TensorSpec(("batch",), "int32"),
    })  # fmt: skip
    servable = compiler.compile(program, {"batch": (1, 8)}).servable()
    x, n = aligned((8, 4)), aligned((8,), np.int32)
    run = servable.bind({"batch": 8}, [x, n])
    assert run is not None
    kept = []
    for step in range(3):
        x[...] = np.arange(32).reshape(8, 4) + step
        n[...] = step
        kept.append(run())
    servable.runtime.weights = [2 * weight for weight in servable.runtime.weights]
    kept.append(run())
    for step, (product, number) in enumerate(kept[:3]):
        np.testing.assert_array_equal(product, np.arange(32).reshape(8, 4) + step)
        np.testing.assert_array_equal(number, np.full(8, step + 1))
    np.testing.assert_array_equal(kept[3][0], 2 * kept[2][0])
    # What XLA would copy cannot be bound; a wrong shape would have it read memory outside of the array.
    assert servable.bind({"batch": 8}, [aligned((8, 4), offset=4), n]) is None
    with pytest.raises(InputError, match="input 'x': got float32"):
        servable.bind({"batch": 8}, [aligned((4, 4)), n])
    with pytest.raises(KeyError):
        servable.bind({"batch": 3}, [x, n])
