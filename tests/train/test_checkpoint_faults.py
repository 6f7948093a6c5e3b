"""Checkpoints on storage that fails: files are cut or gone, the folder is away, a save was not completed."""

import gc
import json
import logging
import shutil
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import lepton_xla as lx
from lepton_xla.train.checkpoints import CheckpointFolder, Checkpoints

# Orbax leaves coroutines behind when a save or a restore fails.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]
IDENTITY = {"model": "a", "optimizer": "b"}


@pytest.fixture(autouse=True)
def _collected():
    """Collects what Orbax began and gave up, before another test does."""
    yield
    gc.collect()


def opened(path, identity=IDENTITY, **options):
    return CheckpointFolder(Checkpoints(path, **options), identity)


def target_of(tree, sharding=None):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def small(value):
    return {"w": jnp.full(8, value, jnp.float32), "count": jnp.int32(value)}


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_reads_what_was_saved(tmp_path):
    random = np.random.default_rng(0)
    weights = {"dense/kernel": jnp.asarray(random.normal(size=(4, 4)), jnp.float32)}
    optimizer = lx.train.sparsify(optax.adam(0.1), {".*kernel": 0.5}, schedule=lx.train.one_shot(at=0))
    with jax.numpy_dtype_promotion("standard"):  # optax' Adam
        _, state = optimizer.update(jax.tree.map(jnp.cos, weights), optimizer.init(weights), weights)
    odd = np.array([np.nan, -0.0, np.inf, 1e-40], np.float32)  # not a number, a signed zero and a subnormal
    tree = {
        "weights": weights,
        "optimizer": state,
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(8, impl="rbg"), 3),
        "half": jnp.asarray(random.normal(size=(3, 5)).astype(ml_dtypes.bfloat16)),
        "int8": jnp.asarray(random.integers(-128, 128, (7,)), jnp.int8),
        "odd": jnp.asarray(odd),
        "scalar": jnp.float32(0.1),
        "nothing": {},
        "inside": {"also": {}, "pair": ((), jnp.uint32(2**32 - 1))},
        "empty": jnp.zeros((0, 3)),
    }
    with opened(tmp_path) as folder:
        folder.save(3, tree, {"data": [1, None]})
    with opened(tmp_path) as folder:
        assert folder.latest() == 3
        assert folder.about(3) == {"data": [1, None]}
        assert_same_bits(folder.restore(3, target_of(tree)), tree)


def test_a_saved_array_may_be_donated_at_once(tmp_path):
    with opened(tmp_path) as folder:
        state = small(1)
        folder.save(1, state, {})
        jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 2, tree), donate_argnums=0)(state)
        assert_same_bits(folder.restore(1, target_of(small(1))), small(1))


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"w": jnp.zeros(9)}, r"'w' is float32\[8\] there, and float32\[9\] in this run"),
        ({"w": jnp.zeros(8, jnp.bfloat16)}, r"'w' is float32\[8\] there, and bfloat16\[8\] in this run"),
        ({"w": jnp.zeros(8), "b": jnp.zeros(2)}, r"'b' is missing there, and float32\[2\] in this run"),
        ({}, r"'w' is float32\[8\] there, and missing in this run"),
    ],
)
def test_refuses_other_leaves(tmp_path, other, says):
    with opened(tmp_path) as folder:
        folder.save(1, {"w": jnp.zeros(8)}, {})
        with pytest.raises(lx.CheckpointError, match=says):
            folder.restore(1, target_of(other))


def test_refuses_a_file(tmp_path):
    file = tmp_path / "run"
    file.write_text("not a folder")
    for path in (file, file / "below", "/proc/lepton"):  # nobody, not even root, makes a folder in the last
        with pytest.raises(lx.CheckpointError, match="cannot be used for checkpoints"), opened(path):
            pass


def test_is_free_if_it_could_not_be_opened(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("not yours")

    with monkeypatch.context() as patched:
        patched.setattr("orbax.checkpoint.CheckpointManager", refuse)
        with pytest.raises(lx.CheckpointError, match="not yours"), opened(tmp_path):
            pass
    with opened(tmp_path):
        pass


def _truncate(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _truncate_arrays(folder):
    _truncate(folder / "state")


def _remove_state(folder):
    shutil.rmtree(folder / "state")


def _remove_about(folder):
    shutil.rmtree(folder / "about")


def _remove_files(folder):
    for file in (folder / "state").rglob("*"):
        if file.is_file():
            file.unlink()


def _describe_another(folder):
    for file in (folder / "about").rglob("metadata"):
        file.write_text(json.dumps({"something": "else"}))


@pytest.mark.parametrize(
    "damage", [_truncate, _truncate_arrays, _remove_state, _remove_about, _remove_files, _describe_another]
)
def test_says_which_checkpoint_is_damaged(tmp_path, damage):
    with opened(tmp_path) as folder:
        folder.save(1, small(1), {})
        folder.save(2, small(2), {})
    damage(tmp_path / "2")
    says = r"checkpoint 2 in .* cannot be read: .*Remove the folder 2 to go on from step 1"
    with opened(tmp_path) as folder, pytest.raises(lx.CheckpointError, match=says):
        folder.restore(folder.latest(), target_of(small(2)))
    shutil.rmtree(tmp_path / "2")
    with opened(tmp_path) as folder:
        assert folder.latest() == 1
        assert_same_bits(folder.restore(1, target_of(small(1))), small(1))


def test_reads_nothing_incomplete(tmp_path):
    with opened(tmp_path) as folder:
        folder.save(1, small(1), {})
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")  # what a killed process leaves
    (tmp_path / "2.orbax-checkpoint-tmp" / "_CHECKPOINT_METADATA").unlink()
    with opened(tmp_path) as folder:
        assert folder.latest() == 1
        folder.save(2, small(2), {})
        assert_same_bits(folder.restore(2, target_of(small(2))), small(2))


def test_goes_on_while_the_folder_is_away(tmp_path, caplog):
    """A network's file system that is gone for a while: a file is in the folder's place."""
    run, away = tmp_path / "run", tmp_path / "away"
    before = set(threading.enumerate())
    with opened(run) as folder, caplog.at_level(logging.WARNING, "lepton_xla"):
        folder.save(1, small(1), {})
        folder.wait()
        run.rename(away)
        run.write_text("")
        for step in (2, 3):
            folder.save(step, small(step), {})
            folder.wait()
        run.unlink()
        away.rename(run)
        assert "could not be saved" in caplog.text
        folder.save(4, small(4), {})
        folder.wait()
        assert folder.latest() == 4
        assert_same_bits(folder.restore(1, target_of(small(1))), small(1))
    # Threads that wait for what never comes would hold up the end of the process, for five minutes.
    waiting = [thread for thread in threading.enumerate() if thread not in before and "Signal" in type(thread).__name__]
    assert not waiting
