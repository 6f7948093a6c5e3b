"""Weights for compiled code that is loaded already: which fit, what is shared, and what is checked before use."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from compiler_models import CERTIFICATE

import lepton_xla as lx
from lepton_xla import compiler
from lepton_xla.compiler import make_update
from lepton_xla.compiler.golden import Golden
from lepton_xla.errors import ArtifactError, CompileError, InputError
from lepton_xla.program import Expansion

BUCKETS = {"batch": (1, 4)}
X = np.random.default_rng(1).standard_normal((3, 6)).astype(np.float32)


def weights(seed=0):
    random = np.random.default_rng(seed)
    return {
        "hidden": random.standard_normal((6, 64)).astype(np.float32),
        "head": random.standard_normal((64, 5)).astype(np.float32),
    }


def forward(w, x):
    return jnp.tanh(x @ w["hidden"]) @ w["head"]


def program(given=None, fn=forward, shape=("batch", 6), dtype="float32"):
    return lx.trace(fn, weights() if given is None else given, {"x": lx.TensorSpec(shape, dtype)})


def reference(given, x=X):
    wide = {name: np.asarray(value, np.float64) for name, value in given.items()}
    return np.tanh(x.astype(np.float64) @ wide["hidden"]) @ wide["head"]


@pytest.fixture(scope="module")
def artifact():
    return compiler.compile(program(), BUCKETS, name="net").with_certificate(CERTIFICATE)


@pytest.fixture(scope="module")
def base(artifact, tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.lepton"
    artifact.save(path)
    return compiler.load(path)


def live():
    return len(jax.local_devices()[0].client.live_executables())


def test_new_weights_run_on_the_code_of_the_base(base, tmp_path):
    make_update(base, program(weights(1)), version="2").save(tmp_path / "two.lepton")
    before, answers = live(), base(x=X)["output"]
    two = compiler.load(tmp_path / "two.lepton", base=base)
    three = compiler.load(tmp_path / "two.lepton", base=two)  # an update is a base as good as any
    assert live() == before  # the code is there once
    assert (two.route, two.version, two.name, two.buckets) == ("shared", "2", "net", base.buckets)
    assert (base.certificate, two.certificate) == (CERTIFICATE, None)  # nobody measured the new weights
    for servable in (two, three):
        np.testing.assert_allclose(servable(x=X)["output"], reference(weights(1)), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(base(x=X)["output"], answers)
    np.testing.assert_allclose(answers, reference(weights()), rtol=1e-4, atol=1e-5)
    size = sum(entry.size for entry in two.manifest.files.values())
    assert size < 1.1 * sum(each.nbytes for each in weights().values()) + 1000
    assert not [name for name in two.manifest.files if name.startswith(("programs", "executables"))]
    assert compiler.verify(tmp_path / "two.lepton").files == len(two.manifest.files)


def test_weights_that_are_those_of_the_base_are_in_memory_once(base, tmp_path):
    other = weights() | {"head": weights(1)["head"]}
    make_update(base, program(other)).save(tmp_path / "head.lepton")
    found = compiler.load(tmp_path / "head.lepton", base=base)
    same = {
        leaf.path: array is before
        for leaf, array, before in zip(found.manifest.weights, found.runtime.weights, base.runtime.weights, strict=True)
    }
    assert same == {"hidden": True, "head": False}
    np.testing.assert_allclose(found(x=X)["output"], reference(other), rtol=1e-4, atol=1e-5)


def test_the_base_may_go(artifact, tmp_path):
    artifact.save(tmp_path / "base.lepton")
    base = compiler.load(tmp_path / "base.lepton")
    make_update(base, program(weights(1))).save(tmp_path / "two.lepton")
    two = compiler.load(tmp_path / "two.lepton", base=base)
    del base
    np.testing.assert_allclose(two(x=X)["output"], reference(weights(1)), rtol=1e-4, atol=1e-5)


RECIPES = {
    "int8": "[[quantize]]\nsites='.*'\nweights='int8'\nactivations='int8'",
    "int8, static scales": "[[quantize]]\nsites='.*'\nweights='int8'\nactivations='int8'\ndynamic=false",
    "int4 in groups": "[[quantize]]\nsites='.*'\nweights='int4'\ngranularity='group:~32'",
}


@pytest.mark.parametrize(
    "recipe",
    ["int8, static scales", *(pytest.param(name, marks=pytest.mark.slow) for name in ("int8", "int4 in groups"))],
)
def test_quantized_weights_fit_if_lowered_by_the_same_recipe(recipe, tmp_path):
    chosen = lx.Recipe.parse(f"measure=false\n{RECIPES[recipe]}", name=recipe)

    def lowered(seed):
        return lx.optimize(program(weights(seed)), chosen, buckets=BUCKETS, calibration=[{"x": X}])

    compiler.compile(lowered(0), BUCKETS).save(tmp_path / "0.lepton")
    compiler.compile(lowered(1), BUCKETS).save(tmp_path / "1.lepton")
    base, whole = compiler.load(tmp_path / "0.lepton"), compiler.load(tmp_path / "1.lepton")
    for number, source in enumerate((lowered(1), tmp_path / "1.lepton")):
        make_update(base, source).save(tmp_path / f"update{number}.lepton")
        update = compiler.load(tmp_path / f"update{number}.lepton", base=base)
        np.testing.assert_array_equal(update(x=X)["output"], whole(x=X)["output"])  # bit for bit
    with pytest.raises(ArtifactError, match=r"do not fit 'model' version 1: "):
        make_update(base, program(weights(1)))  # not lowered


def test_stored_weights_are_unpacked_by_the_code_of_the_base(tmp_path):
    def unpack(w):
        return {"dense": w["codes"].astype(jnp.float32) * w["scale"]}

    def made(seed):
        random = np.random.default_rng(seed)
        given = {"codes": random.integers(-127, 128, (6, 3)).astype(np.int8), "scale": np.float32([[0.1, 0.2, 0.3]])}
        stored = lx.trace(lambda w, x: x @ unpack(w)["dense"], given, {"x": lx.TensorSpec(("batch", 6), "float32")})
        return given, stored.replace(expansion=Expansion(unpack, lambda w, x: x @ w["dense"]))

    compiler.compile(made(0)[1], BUCKETS).save(tmp_path / "0.lepton")
    base, (given, program) = compiler.load(tmp_path / "0.lepton"), made(1)
    make_update(base, program).save(tmp_path / "u.lepton")
    before = live()
    update = compiler.load(tmp_path / "u.lepton", base=base)
    again = compiler.load(tmp_path / "u.lepton", base=update)
    assert live() == before
    want = X.astype(np.float64) @ (given["codes"].astype(np.float64) * given["scale"])
    for servable in (update, again):
        assert [weight.dtype for weight in servable.runtime.weights] == [np.float32]
        np.testing.assert_allclose(servable(x=X)["output"], want, rtol=1e-5)
    with pytest.raises(ArtifactError, match=r"the programs differ"):
        make_update(base, program.replace(expansion=Expansion(lambda w: {"dense": 2 * unpack(w)["dense"]}, base_fn)))


def base_fn(w, x):
    return x @ w["dense"]


def test_code_that_differs_in_its_lines_only_is_the_same(base):
    def elsewhere(w, x):
        # These lines are others.
        return jnp.tanh(x @ w["hidden"]) @ w["head"]

    update = make_update(base, program(weights(1), fn=elsewhere))
    assert update.manifest.fit == base.manifest.fit


OTHERS = {
    "another shape": (lambda: program({"hidden": weights(1)["hidden"][:, :32], "head": weights(1)["head"][:32]}),
                      r"weight 'head' is float32\[32, 5\], there float32\[64, 5\]"),
    "another dtype": (lambda: program({**weights(1), "head": jnp.asarray(weights(1)["head"], jnp.bfloat16)},
                                      fn=lambda w, x: jnp.tanh(x @ w["hidden"]) @ w["head"].astype(jnp.float32)),
                      r"weight 'head' is bfloat16\[64, 5\], there float32\[64, 5\]"),
    "another name": (lambda: program({"hidden": weights(1)["hidden"], "top": weights(1)["head"]},
                                     fn=lambda w, x: jnp.tanh(x @ w["hidden"]) @ w["top"]),
                     r"it lacks weight 'head'"),
    "one more": (lambda: program({**weights(1), "more": np.ones(5, np.float32)}), r"weight 'more' is not there"),
    "another program": (lambda: program(weights(1), fn=lambda w, x: jax.nn.relu(x @ w["hidden"]) @ w["head"]),
                        r"the programs differ"),
    "another constant": (lambda: program(weights(1), fn=lambda w, x: 2 * (jnp.tanh(x @ w["hidden"]) @ w["head"])),
                         r"the programs differ"),
    "another input": (lambda: program(weights(1), dtype="bfloat16",
                                      fn=lambda w, x: forward(w, x.astype(jnp.float32))),
                      r"input 'x': bfloat16\['batch', 6\] is 'x': float32\['batch', 6\] there"),
    "no batch": (lambda: program(weights(1), shape=(2, 6)), r"input 'x': float32\[2, 6\] is"),
    "another output": (lambda: program(weights(1), fn=lambda w, x: {"y": forward(w, x)}), r"output 'y': .* is"),
    "two outputs": (lambda: program(weights(1), fn=lambda w, x: {"output": forward(w, x), "x": x}),
                    r"it has 2 outputs, there are 1"),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_what_does_not_fit_is_refused_by_name(base, other, tmp_path):
    make, said = OTHERS[other]
    with pytest.raises(ArtifactError, match=rf"^the program: its weights do not fit 'net' version 1: {said}"):
        make_update(base, make())
    compiler.compile(make(), {"batch": (1, 4)} if other != "no batch" else {}, tolerance=1.0).save(
        tmp_path / "a.lepton"
    )
    with pytest.raises(ArtifactError, match=rf"a\.lepton: its weights do not fit 'net' version 1: {said}"):
        make_update(base, tmp_path / "a.lepton")


def test_an_update_of_another_base_is_refused_on_loading(base, tmp_path):
    other = compiler.compile(program(fn=lambda w, x: jax.nn.relu(x @ w["hidden"]) @ w["head"]), BUCKETS).servable()
    make_update(other, program(weights(1), fn=lambda w, x: jax.nn.relu(x @ w["hidden"]) @ w["head"])).save(
        tmp_path / "u.lepton"
    )
    with pytest.raises(ArtifactError, match=r"u\.lepton: its weights do not fit 'net' version 1: the programs differ"):
        compiler.load(tmp_path / "u.lepton", base=base)
    with pytest.raises(ArtifactError, match=r"u\.lepton has weights only: load it with base="):
        compiler.load(tmp_path / "u.lepton")
    with pytest.raises(ArtifactError, match=r"buckets are those of the base"):
        compiler.load(tmp_path / "u.lepton", base=other, buckets={"batch": (1,)})
    with pytest.raises(ArtifactError, match=r"has weights only"):
        make_update(other, tmp_path / "u.lepton").servable()


def test_other_buckets_do_not_fit(base, tmp_path):
    compiler.compile(program(weights(1)), {"batch": (1, 8)}).save(tmp_path / "a.lepton")
    with pytest.raises(ArtifactError, match=r"compiled for \{'batch': \(1, 8\)\}, that one for \{'batch': \(1, 4\)\}"):
        make_update(base, tmp_path / "a.lepton")


def test_a_whole_artifact_shares_code_that_its_weights_fit(base, tmp_path):
    compiler.compile(program(weights(1)), BUCKETS, name="net").save(tmp_path / "same.lepton")
    compiler.compile(program(weights(1)), {"batch": (2,)}, name="net").save(tmp_path / "other.lepton")
    before = live()
    same = compiler.load(tmp_path / "same.lepton", base=base)
    assert (same.route, live()) == ("shared", before)
    other = compiler.load(tmp_path / "other.lepton", base=base)
    assert (other.route, live()) == ("executables", before + 1)
    np.testing.assert_allclose(same(x=X)["output"], other(x=X)["output"], rtol=1e-5, atol=1e-6)


def test_a_whole_artifact_whose_code_is_damaged_is_refused_though_that_of_the_base_would_do(base, tmp_path):
    compiler.compile(program(weights(1)), BUCKETS, name="net").save(tmp_path / "a.lepton")
    files = [*(tmp_path / "a.lepton").rglob("*.xla"), *(tmp_path / "a.lepton").rglob("*.stablehlo")]
    assert len(files) == 3
    for file in files:
        good = file.read_bytes()
        file.write_bytes(good[:-1])
        with pytest.raises(ArtifactError, match=rf"{file.name} is damaged"):
            compiler.load(tmp_path / "a.lepton", base=base)
        file.write_bytes(good)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused(base, value, tmp_path):
    bad = weights(1)
    bad["head"][63, 4] = value
    said = "NaN" if np.isnan(value) else "infinity, and the base's does not"
    with pytest.raises(ArtifactError, match=rf"the program: weight 'head' holds {said}"):
        make_update(base, program(bad))
    # One that something else has written, and a whole artifact that is to be checked.
    update = dataclasses.replace(
        make_update(base, program(weights(1))), weights=tuple(map(jnp.asarray, (bad["head"], bad["hidden"])))
    )
    update.save(tmp_path / "u.lepton")
    with pytest.raises(ArtifactError, match=rf"u\.lepton: weight 'head' holds {said}"):
        compiler.load(tmp_path / "u.lepton", base=base)
    compiler.compile(program(bad), BUCKETS, tolerance=1.0).save(tmp_path / "whole.lepton")
    if np.isnan(value):
        with pytest.raises(ArtifactError, match=r"whole\.lepton: weight 'head' holds NaN"):
            compiler.load(tmp_path / "whole.lepton", check=True)
    else:
        compiler.load(tmp_path / "whole.lepton", check=True)


def test_weights_whose_sum_overflows_are_numbers(base, tmp_path):
    large = {name: np.full_like(value, 3e38) for name, value in weights().items()}
    make_update(base, program(large)).save(tmp_path / "large.lepton")
    compiler.load(tmp_path / "large.lepton", base=base)


def test_infinity_is_no_fault_where_the_base_has_it(tmp_path):
    def masked(w, x):
        return jnp.maximum(x @ w["w"], w["least"][None])

    def made(scale):
        given = {"w": scale * jnp.eye(6), "least": jnp.full(6, -jnp.inf)}
        return lx.trace(masked, given, {"x": lx.TensorSpec(("batch", 6), "float32")})

    base = compiler.compile(made(1.0), BUCKETS).servable()
    make_update(base, made(2.0)).save(tmp_path / "u.lepton")
    np.testing.assert_array_equal(compiler.load(tmp_path / "u.lepton", base=base)(x=X)["output"], 2 * X)


def test_damaged_weights_are_refused(base, tmp_path):
    make_update(base, program(weights(1))).save(tmp_path / "u.lepton")
    files = [file for file in (tmp_path / "u.lepton").rglob("*") if file.is_file()]
    assert len(files) >= 3
    for file in files:
        good = file.read_bytes()
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(ArtifactError, match=r"is damaged|manifest\.json"):
            compiler.load(tmp_path / "u.lepton", base=base)
        file.write_bytes(good)
    compiler.load(tmp_path / "u.lepton", base=base)


def test_golden_rows_are_answered_before_use(base, tmp_path):
    answers = reference(weights(1)).astype(np.float32)
    update = make_update(base, program(weights(1)), golden={"x": X, "output": answers})
    update.save(tmp_path / "u.lepton")
    compiler.load(tmp_path / "u.lepton", base=base)
    np.testing.assert_array_equal(update.golden.outputs["output"], answers)
    # The same rows with the weights of another: poisoned, and every digest right.
    poisoned = dataclasses.replace(update, weights=tuple(map(jnp.asarray, (weights(2)["head"], weights(2)["hidden"]))))
    poisoned.save(tmp_path / "poisoned.lepton")
    with pytest.raises(
        ArtifactError, match=r"poisoned\.lepton: golden row 0 is answered wrong: output 'output' differs"
    ):
        compiler.load(tmp_path / "poisoned.lepton", base=base)
    with pytest.raises(CompileError, match=r"the compiled model: golden row 0 is answered wrong"):
        make_update(base, program(weights(2)), golden={"x": X, "output": answers})


def test_golden_rows_of_a_whole_artifact(tmp_path):
    compiler.compile(program(), BUCKETS, golden={"x": X}).save(tmp_path / "a.lepton")
    loaded = compiler.load(tmp_path / "a.lepton", check=True)
    entry = loaded.manifest.golden
    golden = Golden.read(entry, (tmp_path / "a.lepton" / entry.file).read_bytes())
    np.testing.assert_array_equal(golden.inputs["x"], X)
    np.testing.assert_allclose(golden.outputs["output"], reference(weights()), rtol=1e-4, atol=1e-5)
    # An update that is made of it has its rows.
    assert make_update(loaded, tmp_path / "a.lepton").golden is not None


@pytest.mark.parametrize(
    ("rows", "error", "said"),
    [
        ({}, InputError, "input 'x' is missing"),
        ({"y": X}, CompileError, r"'y' is neither an input \(x\) nor an output \(output\)"),
        ({"x": X[:, :3]}, InputError, "dimension 1 is 3"),
        ({"x": X.astype(np.float64)}, InputError, "dtype float64"),
        ({"x": X[:0]}, CompileError, "there are none"),
        ({"x": X, "output": np.zeros((2, 5), np.float32)}, CompileError, r"is float32\[2, 5\], and the model's is"),
        ({"x": X, "output": np.zeros((3, 5), np.float64)}, CompileError, r"is float64\[3, 5\], and the model's is"),
        ({"x": X, "output": np.full((3, 5), np.nan, np.float32)}, CompileError, "golden row 0 is answered wrong"),
    ],
)
def test_golden_rows_that_are_none(artifact, base, rows, error, said):
    with pytest.raises(error, match=said):
        make_update(base, program(), golden=rows)


KINDS = ["float32", "bfloat16", "float8_e4m3fn", "int32", "int8", "uint8", "bool", "complex64", "int4"]


def test_golden_rows_of_every_dtype_are_read_as_written():
    arrays = {kind: np.asarray([[0, 1], [1, 0], [1, 1]]).astype(jnp.dtype(kind)) for kind in KINDS}
    rows = Golden(arrays, {"y": X}, 0.0)
    read = Golden.read(rows.entry(), rows.data())
    for kind, array in arrays.items():
        assert read.inputs[kind].dtype == array.dtype
        np.testing.assert_array_equal(read.inputs[kind].astype(complex), array.astype(complex))
    np.testing.assert_array_equal(read.outputs["y"], X)
    with pytest.raises(ArtifactError, match="too few for its tensors"):
        Golden.read(rows.entry(), rows.data()[:-1])


@pytest.mark.parametrize(
    ("expected", "answer", "is_right"),
    [
        ([1.0, 100.0], [1.05, 100.0], True),  # relative to the largest
        ([1.0, 100.0], [1.2, 100.0], False),
        ([np.nan, 1.0], [np.nan, 1.0], True),
        ([np.nan, 1.0], [0.0, 1.0], False),
        ([0.0, 1.0], [np.nan, 1.0], False),
        ([np.inf, 1.0], [np.inf, 1.0], True),
        ([np.inf, 1.0], [-np.inf, 1.0], False),
        ([1.0, 1.0], [np.inf, 1.0], False),
    ],
)
def test_how_far_a_golden_row_may_differ(expected, answer, is_right):
    rows = Golden({"x": X[:2]}, {"y": np.float32(expected)}, 1e-3)
    if is_right:
        rows.check(lambda x: {"y": np.float32(answer)}, "it")
    else:
        with pytest.raises(ArtifactError, match="golden row 0 is answered wrong"):
            rows.check(lambda x: {"y": np.float32(answer)}, "it")


def test_integers_must_be_the_same():
    rows = Golden({"x": X}, {"y": np.int32([1, 2, 3])}, 1.0)
    rows.check(lambda x: {"y": np.int32([1, 2, 3])}, "it")
    with pytest.raises(ArtifactError, match="golden row 2 is answered wrong"):
        rows.check(lambda x: {"y": np.int32([1, 2, 4])}, "it")


def test_an_artifact_without_a_digest_of_its_program_is_no_base(artifact):
    old = dataclasses.replace(artifact, manifest=msgspec.structs.replace(artifact.manifest, fit="")).servable()
    with pytest.raises(ArtifactError, match="compile it again"):
        make_update(old, program())


def test_a_manifest_without_programs_must_be_an_update(artifact, tmp_path):
    for changes in ({"fit": ""}, {}):
        manifest = msgspec.structs.replace(artifact.manifest, **changes)
        dataclasses.replace(artifact, manifest=manifest, programs=()).save(tmp_path / f"{len(changes)}.lepton")
        with pytest.raises(ArtifactError, match="has no program, and is no update of weights either"):
            compiler.load(tmp_path / f"{len(changes)}.lepton")


def test_on_a_mesh_an_update_is_made_of_an_artifact(tmp_path):
    compiler.compile(program(), BUCKETS, mesh="model=2", rules=None, name="net").save(tmp_path / "0.lepton")
    compiler.compile(program(weights(1)), BUCKETS, mesh="model=2", name="net").save(tmp_path / "1.lepton")
    base, whole = compiler.load(tmp_path / "0.lepton"), compiler.load(tmp_path / "1.lepton")
    make_update(base, tmp_path / "1.lepton").save(tmp_path / "u.lepton")
    update = compiler.load(tmp_path / "u.lepton", base=base)
    assert update.runtime.weights[0].sharding == whole.runtime.weights[0].sharding
    np.testing.assert_array_equal(update(x=X)["output"], whole(x=X)["output"])
    with pytest.raises(ArtifactError, match="compiled for a mesh"):
        make_update(base, program(weights(1)))


@pytest.mark.slow
def test_every_pair_of_programs_has_its_own_digest():
    programs = [program(), *(make() for name, (make, _) in OTHERS.items() if name not in ("no batch",))]
    fits = [compiler.compile(each, BUCKETS, tolerance=1.0).manifest.fit for each in programs]
    assert all(one != two for one, two in itertools.combinations(fits, 2))


def test_labels_of_golden_rows_are_kept_and_judge(tmp_path):
    given = weights()
    label = reference(given).argmax(1)
    label[0] = (label[0] + 1) % 5
    compiler.compile(program(given), BUCKETS, golden={"x": X, "label": label}).save(tmp_path / "net.lepton")
    entry = compiler.load(tmp_path / "net.lepton", check=True).manifest.golden
    rows = Golden.read(entry, (tmp_path / "net.lepton" / entry.file).read_bytes())
    np.testing.assert_array_equal(rows.label, label)
    assert rows.accuracy(compiler.load(tmp_path / "net.lepton")) == pytest.approx(2 / 3)
    for wrong in (label[:2], label.astype(np.float32), label + 5, label - 5):
        with pytest.raises(CompileError, match=r"'label' is .*; expected 3 integers from 0 to 4"):
            compiler.compile(program(given), BUCKETS, golden={"x": X, "label": wrong})
