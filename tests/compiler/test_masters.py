"""Artifacts that keep their float master: other float weights become small by the same steps."""

import jax
import msgspec
import numpy as np
import pytest
from compiler_models import CERTIFICATE

import lepton_xla as lx
from lepton_xla.compiler import _xla, load, master_weights, requantize
from lepton_xla.compiler.manifest import manifest_from_json, manifest_to_json
from lepton_xla.errors import ArtifactError, CompileError, TrustError

X = np.random.default_rng(1).standard_normal((5, 16)).astype(np.float32)
BUCKETS = {"batch": (1, 8)}
# Without calibration data nothing is chosen by it, and every preset but those that shrink can be taken again.
EXACT = ["int8"]
REST = [
    "bfloat16",
    "codebook16",
    "fp8-weight-only",
    "int4-channel-weight-only",
    "int4-weight-only",
    "int8-prune50",
    "int8-weight-only",
    "nf4-weight-only",
    "prune50",
    "w4a4",
]


def weights(seed=0):
    random = np.random.default_rng(seed)
    shapes = {"a": (16, 64), "scale": (1, 64), "shift": (1, 64), "c": (64, 8)}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def forward(w, x):
    return jax.nn.relu((x @ w["a"]) * w["scale"] + w["shift"]) @ w["c"]


def program(given=None):
    return lx.trace(forward, given or weights(), {"x": lx.TensorSpec(("batch", 16), "float32")})


def small(recipe, given=None, calibration=None, **changes):
    if recipe == "bfloat16":
        recipe, changes = "float", {"cast": recipe}
    chosen = lx.Recipe.load(recipe).replace({"measure": False, **changes})
    return lx.optimize(program(given), chosen, calibration=calibration, buckets=BUCKETS, keep_master=True)


def compiled(optimized):
    return lx.compile(optimized, BUCKETS, name="net", keep_master=True)


def as_bytes(arrays):
    return [np.asarray(array).tobytes() for array in arrays]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    path = tmp_path_factory.mktemp("master") / "net.lepton"
    compiled(small("int8-weight-only")).with_certificate(CERTIFICATE).save(path)
    return path


@pytest.mark.parametrize("recipe", [*EXACT, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)])
def test_the_same_master_gives_the_same_bytes_and_another_that_of_optimizing_it(recipe, tmp_path):
    artifact = compiled(small(recipe))
    artifact.save(tmp_path / "net.lepton")
    master = master_weights(tmp_path / "net.lepton")
    assert as_bytes(requantize(tmp_path / "net.lepton", master).weights) == as_bytes(artifact.weights)

    other = {name: array for name, array in weights(2).items() if name in master}
    assert other.keys() == master.keys()
    made = requantize(tmp_path / "net.lepton", other)
    if "prune" not in recipe:  # masks stay, and are others for other weights
        known = small(recipe, other | weights(2)).weights
        assert as_bytes(made.weights) == as_bytes(jax.tree.leaves(known))


def test_an_update_runs_on_the_code_of_its_artifact_and_keeps_the_new_master(kept, tmp_path):
    other = weights(3)
    requantize(kept, other, version="2").save(tmp_path / "update.lepton")
    base = load(kept)
    served = load(tmp_path / "update.lepton", base=base)
    assert (base.certificate, served.certificate) == (CERTIFICATE, None)  # nobody measured the new weights
    wide = {name: array.astype(np.float64) for name, array in other.items()}
    exact = np.maximum(X @ wide["a"] * wide["scale"] + wide["shift"], 0) @ wide["c"]
    answer = served(x=X)["output"]
    assert np.abs(answer - exact).max() < 0.02 * np.abs(exact).max()
    np.testing.assert_array_equal(master_weights(tmp_path / "update.lepton")["a"], other["a"])
    again = requantize(tmp_path / "update.lepton", weights())
    assert as_bytes(again.weights) == as_bytes(base.runtime.weights)


def test_requantizing_neither_traces_nor_compiles(kept, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("traced or compiled")

    monkeypatch.setattr("lepton_xla.compiler.masters.compile_portable", refuse)
    monkeypatch.setattr("lepton_xla.compiler.masters.export_programs", refuse)
    requantize(kept, weights(4))


@pytest.mark.parametrize("recipe", ["int8-weight-only", pytest.param("int8", marks=pytest.mark.slow)])
def test_what_was_chosen_by_data_is_refused_by_name_or_rounded_to_nearest_if_asked(recipe, tmp_path):
    data = [{"x": np.random.default_rng(5).standard_normal((64, 16)).astype(np.float32)}]
    compiled(small(recipe, calibration=data)).save(tmp_path / "net.lepton")
    with pytest.raises(ArtifactError, match="gptq: it chooses codes for the calibration data; --nearest rounds"):
        requantize(tmp_path / "net.lepton", weights())
    made = requantize(tmp_path / "net.lepton", weights(), nearest=True)
    base = load(tmp_path / "net.lepton")
    made.save(tmp_path / "update.lepton")
    one, two = base(x=X)["output"], load(tmp_path / "update.lepton", base=base)(x=X)["output"]
    assert 0 < np.abs(one - two).max() < 0.03 * np.abs(one).max()  # SmoothQuant's factors were taken again


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        pytest.param("shrink50", {}, marks=pytest.mark.slow),
        ("int8-weight-only", {"correct_bias": True, "rounding": "nearest"}),
    ],
)
def test_what_cannot_be_taken_again_is_refused_even_then(recipe, changes, tmp_path):
    data = [{"x": X}]
    compiled(small(recipe, calibration=data, **changes)).save(tmp_path / "net.lepton")
    with pytest.raises(ArtifactError, match=r"shrink|bias_correction"):
        requantize(tmp_path / "net.lepton", master_weights(tmp_path / "net.lepton"), nearest=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"a": None}, "it lacks weight 'a'"),
        ({"d": np.ones(3, np.float32)}, "weight 'd' is not in the float master"),
        (
            {"a": np.ones((16, 63), np.float32)},
            r"weight 'a' is float32\[16, 63\], and the float master has float32\[16, 64\]",
        ),
        ({"a": np.ones((16, 64))}, "weight 'a' is float64"),
        ({"a": np.full((16, 64), np.nan, np.float32)}, "weight 'a' holds NaN or infinity"),
        ({"c": np.full((64, 8), np.inf, np.float32)}, "weight 'c' holds NaN or infinity"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(kept, change, said):
    given = {name: array for name, array in (weights() | change).items() if array is not None}
    with pytest.raises(ArtifactError, match=said):
        requantize(kept, given)


def test_an_artifact_without_a_master_says_how_to_keep_one(tmp_path):
    lx.compile(small("int8-weight-only"), BUCKETS).save(tmp_path / "net.lepton")
    with pytest.raises(ArtifactError, match="has no float master; compile it with keep_master=True"):
        requantize(tmp_path / "net.lepton", weights())


def test_weights_that_were_changed_outside_of_passes_keep_no_master():
    optimized = small("int8-weight-only")
    changed = optimized.replace(weights=optimized.weights | {"c": small("int8-weight-only", weights(9)).weights["c"]})
    with pytest.raises(CompileError, match="its steps do not give weight 'c' as it is"):
        compiled(changed)


def test_a_manifest_whose_steps_refer_to_nothing_is_refused(kept):
    manifest = manifest_from_json((kept / "manifest.json").read_bytes())
    master = manifest.master
    step = master.steps[-1]
    for wrong in ({"takes": ("gone",)}, {"program": "0" * 64}, {"data": (7,)}):
        steps = (*master.steps[:-1], msgspec.structs.replace(step, **wrong))
        changed = msgspec.structs.replace(manifest, master=msgspec.structs.replace(master, steps=steps))
        with pytest.raises(ArtifactError, match="of the float master"):
            manifest_from_json(manifest_to_json(changed))


@pytest.mark.parametrize("alone", [False, True])
def test_weights_that_are_others_on_the_device_are_refused(kept, tmp_path, monkeypatch, alone):
    requantize(kept, weights(6)).save(tmp_path / "update.lepton")
    path, base = (tmp_path / "update.lepton", load(kept)) if alone else (kept, None)
    load(path, base=base, check=True)
    put = _xla.putter

    def putter(shape, dtype, device):
        def wrong(array):
            changed = array.copy()
            if changed.shape == (1, 64):
                changed[0, 5] += 1
            return put(shape, dtype, device)(changed)

        return wrong

    monkeypatch.setattr(_xla, "putter", putter)
    with pytest.raises(ArtifactError, match=r"weight '.*': what is on the device is not what was read"):
        load(path, base=base, check=True)
    if not alone:
        load(path)


def test_the_master_of_an_encrypted_artifact_is_encrypted(kept, tmp_path):
    private, public = lx.trust.create_keys(tmp_path / "server", "encryption")
    lx.encrypt(kept, tmp_path / "sealed.lepton", to=public)
    sealed = (tmp_path / "sealed.lepton" / "master" / "weights.bin").read_bytes()
    assert weights()["a"].tobytes() in (kept / "master" / "weights.bin").read_bytes()
    assert weights()["a"].tobytes()[:64] not in sealed
    given = weights(7)
    made = requantize(tmp_path / "sealed.lepton", given, decrypt_key=private)
    assert as_bytes(made.weights) == as_bytes(requantize(kept, given).weights)
    with pytest.raises(TrustError, match="is encrypted for"):
        requantize(tmp_path / "sealed.lepton", given)


def test_optimize_frees_the_float_weights_unless_it_keeps_them():
    recipe = lx.Recipe.load("int8-weight-only").replace({"measure": False})
    whole = program()
    forgotten = lx.optimize(whole, recipe, buckets=BUCKETS)
    assert forgotten.derivation is None
    assert (
        lx.optimize(whole, recipe, buckets=BUCKETS, keep_master=True).derivation.weights.keys() == whole.weights.keys()
    )
    with pytest.raises(CompileError, match="optimized without keep_master=True"):
        compiled(forgotten)
