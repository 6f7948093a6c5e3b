"""Checkpoints: the same bits on any devices, and clear errors for what is foreign, damaged, in use or not written."""

import gc
import pathlib
import resource

import jax
import jax.numpy as jnp
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
IDENTITY = {"model": "a", "optimizer": "adam"}


@pytest.fixture(autouse=True)
def _collected():
    """Collects what Orbax began and gave up, before another test does."""
    yield
    gc.collect()


def folder_of(path, identity=IDENTITY, **options):
    return CheckpointFolder(Checkpoints(path / "run", **options), identity)


def shapes(tree, sharding=None):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def bits(leaf):
    data = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return np.asarray(data).tobytes()


def test_every_kind_of_leaf_is_restored_bit_for_bit_on_other_devices(tmp_path):
    random = np.random.default_rng(0)
    values = jnp.asarray(random.normal(size=(4, 6)), jnp.float32)
    tree = {
        "weights": {"a/b": values, "a": values[:2].astype(jnp.bfloat16)},
        "codes": jnp.arange(-4, 4, dtype=jnp.int8),
        "not_finite": jnp.array([jnp.nan, jnp.inf, -0.0], jnp.float32),
        "keys": jax.random.split(jax.random.key(3), 2),
        "optimizer": optax.adam(0.1).init({"w": values}),
        "empty": {},
        "no_elements": jnp.zeros((0, 3), jnp.float32),
        "other_key": jax.random.key(1, impl="rbg"),
        "step": jnp.array(7, jnp.int32),
    }
    mesh = lx.sharding.mesh("data=2")
    split = jax.sharding.NamedSharding(mesh, jax.P("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.P())
    target = shapes(tree, whole)
    target["weights"]["a/b"] = jax.ShapeDtypeStruct((4, 6), jnp.float32, sharding=split)
    with folder_of(tmp_path) as folder:
        folder.save(7, tree, {"data": [1, 2]})
        restored = folder.restore(folder.latest(), target)
        assert folder.about(7) == {"data": [1, 2]}
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    assert restored["weights"]["a/b"].sharding.is_equivalent_to(split, 2)
    for path, leaf in jax.tree.leaves_with_path(tree):
        found = dict(jax.tree.leaves_with_path(restored))[path]
        assert found.dtype == leaf.dtype, path
        assert bits(found) == bits(leaf), path


def test_latest_is_complete_also_while_it_is_saved(tmp_path):
    with folder_of(tmp_path) as folder:
        assert folder.latest() is None
        folder.save(1, {"w": jnp.ones((512, 512))}, {})
        assert folder.latest() == 1
        assert (tmp_path / "run" / "1" / "commit_success.txt").exists()


def test_newest_and_those_of_every_kth_step_are_kept(tmp_path):
    with folder_of(tmp_path, keep=2, keep_every=4) as folder:
        for step in range(1, 8):
            folder.save(step, {"w": jnp.ones(3)}, {})
    assert sorted(int(path.name) for path in (tmp_path / "run").iterdir() if path.name.isdigit()) == [4, 6, 7]


def test_one_run_at_a_time(tmp_path):
    with folder_of(tmp_path), pytest.raises(lx.CheckpointError, match="run is in use by another run"):
        folder_of(tmp_path).__enter__()
    with folder_of(tmp_path):
        pass


def test_what_belongs_to_another_run_is_refused_by_name(tmp_path):
    with folder_of(tmp_path) as folder:
        folder.save(1, {"w": jnp.ones((3, 2))}, {})
        folder.wait()
        for other in ({"w": jnp.ones((2, 3))}, {"w": jnp.ones((3, 2), jnp.bfloat16)}, {}):
            with pytest.raises(lx.CheckpointError, match="'w' is float32"):
                folder.restore(1, shapes(other))
        with pytest.raises(lx.CheckpointError, match="'v' is missing there"):
            folder.restore(1, shapes({"w": jnp.ones((3, 2)), "v": jnp.ones(1)}))
    with (
        folder_of(tmp_path, {**IDENTITY, "model": "b"}) as folder,
        pytest.raises(lx.CheckpointError, match="another run: the model differ"),
    ):
        folder.restore(1, shapes({"w": jnp.ones((3, 2))}))


def test_a_damaged_checkpoint_is_refused_and_a_whole_one_named(tmp_path):
    tree = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)}
    with folder_of(tmp_path) as folder:
        for step in (1, 2):
            folder.save(step, tree, {})
    refused = []
    for path in sorted(path for path in (tmp_path / "run" / "2").rglob("*") if path.is_file()):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        with folder_of(tmp_path) as folder:
            if folder.latest() == 2:
                try:
                    assert bits(folder.restore(2, shapes(tree))["w"]) == bits(tree["w"]), path
                except lx.CheckpointError as error:
                    refused.append(str(error))
        path.write_bytes(data)
    assert len(refused) >= 2
    for text in refused:
        assert "checkpoint 2 in" in text
        assert "Remove the folder 2 to go on from step 1, which is whole" in text


def test_a_full_disk_costs_one_checkpoint_and_no_older_one(tmp_path, caplog):
    tree = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(1024, 512)), jnp.float32)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with folder_of(tmp_path) as folder:
        folder.save(1, tree, {})
        folder.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
        try:
            folder.save(2, tree, {})
            folder.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        failures = [record for record in caplog.records if "could not be saved" in record.getMessage()]
        assert len(failures) == 1
        assert "File too large" in failures[0].getMessage()
        assert folder.latest() == 1
        folder.save(3, tree, {})
        assert folder.latest() == 3
        for step in (1, 3):
            assert bits(folder.restore(step, shapes(tree))["w"]) == bits(tree["w"])
    assert not list(pathlib.Path(tmp_path / "run").glob("*tmp*"))


def test_a_flipped_bit_is_found_in_every_file(tmp_path):
    random = np.random.default_rng(1)
    tree = {"w": jnp.asarray(random.normal(size=(64, 64)), jnp.float32)}
    with folder_of(tmp_path) as folder:
        for step in (1, 2):
            folder.save(step, tree, {"data": step})
        folder.wait()
        refused = []
        for file in sorted((tmp_path / "run" / "2").rglob("*")):
            data = file.read_bytes() if file.is_file() else b""
            if not data:
                continue
            middle = len(data) // 2
            file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
            try:
                assert folder.about(2) == {"data": 2}
                assert bits(folder.restore(2, shapes(tree))["w"]) == bits(tree["w"])
            except lx.CheckpointError as error:
                refused.append(str(error))
            file.write_bytes(data)
        assert len(refused) > 3
        assert all("Remove the folder 2 to go on from step 1, which is whole" in text for text in refused)
        assert bits(folder.restore(2, shapes(tree))["w"]) == bits(tree["w"])


def test_a_folder_that_has_a_run_is_refused_if_it_shall_not_go_on(tmp_path):
    for _ in range(2):  # a folder without a checkpoint is taken
        with folder_of(tmp_path, resume=False) as folder:
            assert folder.latest() is None
    with folder_of(tmp_path, resume=False) as folder:
        folder.save(1, {"w": jnp.ones(3)}, {})
    with pytest.raises(lx.CheckpointError, match="run has checkpoints"), folder_of(tmp_path, resume=False):
        pass
    with folder_of(tmp_path) as folder:  # and is free again
        assert folder.latest() == 1
