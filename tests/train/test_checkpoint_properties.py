"""Checkpoints, as properties: every tree of arrays comes back bit for bit, and no damaged file is read."""

import collections
import gc
import pathlib
import shutil
import tempfile

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lepton_xla as lx
from lepton_xla.train.checkpoints import CheckpointFolder, Checkpoints

# Orbax leaves coroutines behind when a restore fails.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]
DTYPES = [
    "bool", "int2", "int4", "int8", "int16", "int32", "uint8", "uint16", "uint32", "float16", "bfloat16", "float32",
    "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn", "complex64",
]  # fmt: skip
Moments = collections.namedtuple("Moments", ["mu", "nu"])


@pytest.fixture(autouse=True)
def _collected():
    yield
    gc.collect()


def array(dtype, shape, seed):
    """An array of random bits, so also of NaNs with payloads, subnormal numbers and signed zeros."""
    dtype, count = jnp.dtype(dtype), int(np.prod(shape))
    data = np.random.default_rng(seed).bytes(count * dtype.itemsize)
    codes = np.frombuffer(data, np.uint8)
    if dtype.name in ("bool", "int2", "int4", "float4_e2m1fn"):  # a byte each, of which few bits count
        values = codes.astype(np.int8) % (2 if dtype.name == "bool" else 4 if dtype.name == "int2" else 7)
        return jnp.asarray((values - (2 if dtype.name == "int2" else 0)).astype(dtype).reshape(shape))
    return jnp.asarray(codes.view(dtype).reshape(shape))


def key(seed, shape, impl):
    made = jax.random.key(seed, impl=impl)
    return jax.random.split(made, shape) if shape else made


seeds = st.integers(0, 2**31 - 1)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
leaves = st.builds(array, st.sampled_from(DTYPES), shapes, seeds) | st.builds(
    key, seeds, st.sampled_from([(), (2,), (1, 3)]), st.sampled_from(["threefry2x32", "rbg"])
)
names = st.text("ab0/.:+# _é", min_size=1, max_size=6)
trees = st.recursive(
    leaves | st.sampled_from([{}, (), None]),
    lambda inner: (
        st.dictionaries(names, inner, max_size=3)
        | st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.builds(Moments, inner, inner)
    ),
    max_leaves=8,
)


def bits(leaf):
    data = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return str(leaf.dtype), leaf.shape, np.asarray(data).tobytes()


def check_round_trip(tree):
    tree = {"step": jnp.int32(1), "tree": tree}  # Orbax refuses a tree without any array, which no state is
    with tempfile.TemporaryDirectory() as place:
        with CheckpointFolder(Checkpoints(place), {}) as folder:
            folder.save(1, tree, {"data": 1})
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
        with CheckpointFolder(Checkpoints(place), {}) as folder:
            assert folder.latest() == 1
            found = folder.restore(1, target)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    assert [bits(leaf) for leaf in jax.tree.leaves(found)] == [bits(leaf) for leaf in jax.tree.leaves(tree)]


@hypothesis.settings(max_examples=20)
@hypothesis.given(trees)
def test_every_tree_comes_back(tree):
    check_round_trip(tree)


@pytest.mark.slow
@hypothesis.settings(max_examples=300)
@hypothesis.given(trees)
def test_every_tree_comes_back_at_length(tree):
    check_round_trip(tree)


@pytest.mark.parametrize("dtype", ["uint2", "uint4"])
def test_what_cannot_be_stored_is_refused_by_name(tmp_path, dtype):
    """Before any step."""
    weights = {"w": jnp.eye(2), "codes": jnp.zeros(4, dtype)}
    program = lx.trace(lambda w, x: x @ w["w"], weights, {"x": lx.TensorSpec(("batch", 2), "float32")})
    read = []
    with pytest.raises(lx.CheckpointError, match=f"'model_state/codes' is {dtype}, which a checkpoint cannot hold"):
        lx.train.fit(
            program, lx.train.supervised(program), optax.sgd(0.1), read.append, steps=1,
            checkpoint=Checkpoints(tmp_path),
        )  # fmt: skip
    assert not read


TREE = {"w": array("float32", (40, 40), 1), "count": jnp.int32(3), "keys": key(1, (2,), "rbg"), "nothing": {}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints 1 and 2 of one tree."""
    place = tmp_path_factory.mktemp("saved")
    with CheckpointFolder(Checkpoints(place), {}) as folder:
        for step in (1, 2):
            folder.save(step, TREE, {"data": step})
    return place


def files(place):
    return sorted(path.relative_to(place) for path in (place / "2").rglob("*") if path.is_file())


def check_damage(saved, draw):
    """Cut or change one file: the checkpoint is refused by name, or is not there; what is read is what was saved."""
    name = draw.draw(st.sampled_from(files(saved)))
    data = (saved / name).read_bytes()
    at = draw.draw(st.integers(0, max(len(data) - 1, 0)))
    how = draw.draw(st.sampled_from(["cut", "flip", "remove"]))
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(saved, place, dirs_exist_ok=True)
        file = pathlib.Path(place) / name
        if how == "remove":
            file.unlink()
        elif how == "cut":
            file.write_bytes(data[:at])
        elif data:
            changed = data[at] ^ (1 << draw.draw(st.integers(0, 7)))
            file.write_bytes(data[:at] + bytes([changed]) + data[at + 1 :])
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), TREE)
        refused = None
        with CheckpointFolder(Checkpoints(place), {}) as folder:
            step = folder.latest()
            assert step in (1, 2)
            try:
                assert folder.about(step) == {"data": step}
                found = folder.restore(step, target)
                assert [bits(leaf) for leaf in jax.tree.leaves(found)] == [bits(leaf) for leaf in jax.tree.leaves(TREE)]
            except lx.CheckpointError as error:
                refused = str(error)
                assert f"checkpoint 2 in {place} cannot be read" in refused
                assert "Remove the folder 2 to go on from step 1, which is whole" in refused
        part, *rest = name.parts[1:]
        if part == "state" and rest[-1] != "commit_success.txt" and (data or how == "remove"):
            assert step == 1 or (refused is not None and "/".join(rest) in refused), (name, how, at)


@hypothesis.settings(max_examples=30)
@hypothesis.given(st.data())
def test_no_damaged_file_is_read(saved, data):
    check_damage(saved, data)


@pytest.mark.slow
@hypothesis.settings(max_examples=600)
@hypothesis.given(st.data())
def test_no_damaged_file_is_read_at_length(saved, data):
    check_damage(saved, data)
