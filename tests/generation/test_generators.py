"""Greedy tokens equal those of the framework's own decoding, in memory, saved and loaded, and quantized."""

import functools

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from flax import nnx
from generation_models import (
    VOCABULARY,
    WIDTH,
    Decoder,
    NnxDecoder,
    Seq2Seq,
    decoder_weights,
    linen_decoder,
    linen_reference,
    nnx_reference,
    normal,
    seq2seq_weights,
)

import lepton_xla as lx
from lepton_xla.compiler import generating, loading, stepping
from lepton_xla.compiler.flattening import flat_functions

CAPACITY = 24
PROMPTS = [[5, 3, 9], [1], [7, 7, 2, 20, 11, 4, 1, 2], [22, 0, 3, 3, 8]]


def functions(model):
    return model.init_cache, model.prefill, model.decode


def made(kind):
    """The generator of a kind of model, and its own greedy decoding."""
    options = {"slots": 3, "capacity": CAPACITY}
    if kind in ("loop", "scanned"):
        model, weights = Decoder(kind == "scanned"), decoder_weights()
        generator = lx.Generator(*functions(model), weights, **options)
        return generator, lambda prompt, count: model.reference(weights, prompt, count)
    if kind == "seq2seq":
        model, weights = Seq2Seq(), seq2seq_weights()
        generator = lx.Generator(*functions(model), weights, encoder_decoder=True, **options)
        return generator, lambda prompt, count: model.reference(weights, prompt, count)
    if kind == "linen":
        module, variables = linen_decoder()
        generator = lx.Generator.from_linen(module, variables, **options)
        return generator, lambda prompt, count: linen_reference(module, variables, prompt, count, CAPACITY)
    module = NnxDecoder(nnx.Rngs(1))
    generator = lx.Generator.from_nnx(module, **options)
    return generator, lambda prompt, count: nnx_reference(module, prompt, count, CAPACITY)


@functools.cache
def compiled(kind):
    """An artifact in memory of a kind of model, made once, and its own greedy decoding."""
    generator, reference = made(kind)
    return lx.compile(generator.program, {"length": (4, 8)}, name=kind), reference


SLOW = pytest.mark.slow


@pytest.mark.parametrize("kind", [pytest.param("loop", marks=SLOW), "scanned", "seq2seq", "linen", "nnx"])
def test_greedy_tokens_are_those_of_the_framework(kind, tmp_path):
    artifact, reference = compiled(kind)
    expected = [tuple(reference(prompt, 12)) for prompt in PROMPTS]
    assert len({tokens for row in expected for tokens in row}) > 4, "a model that repeats itself shows little"
    found = artifact.servable().generator.generate(PROMPTS, max_tokens=12)
    assert [each.tokens for each in found] == expected
    artifact.save(tmp_path / "model.lepton")
    loaded = lx.load(tmp_path / "model.lepton")
    assert loaded.route == "executables"
    assert [each.tokens for each in loaded.generator.generate(PROMPTS, max_tokens=12)] == expected


def test_the_model_itself_gives_the_logits_of_the_next_token():
    artifact, reference = compiled("scanned")
    model = artifact.servable()
    logits = model(tokens=np.array([[5, 3, 9]], np.int32), lengths=np.array([3], np.int32))["logits"]
    assert int(logits.argmax()) == reference([5, 3, 9], 1)[0]


@pytest.mark.parametrize(
    ("recipe", "share"), [pytest.param("int8-weight-only", 0.4, marks=SLOW), ("int4-weight-only", 0.35)]
)
def test_both_steps_use_one_set_of_quantized_weights(recipe, share, tmp_path):
    generator, _ = made("scanned")
    small = lx.optimize(generator.program, lx.Recipe.load(recipe), buckets={"length": (8,)})
    assert small.weights_bytes < share * generator.program.weights_bytes
    lx.compile(small, {"length": (8,)}).save(tmp_path / "small.lepton")
    servable = lx.load(tmp_path / "small.lepton")
    weights = {"layers": {}}
    for name, leaf in small.weights.items():
        folder, _, last = name.rpartition("/")
        dense = leaf.dequantize() if hasattr(leaf, "dequantize") else leaf
        if folder:
            weights["layers"][last] = dense
        else:
            weights[name] = dense if dense.shape[-1] == WIDTH else dense.T  # a stored table is [D, V]
    found = servable.generator.generate(PROMPTS, max_tokens=8)
    assert [list(each.tokens) for each in found] == [Decoder(True).reference(weights, p, 8) for p in PROMPTS]


@SLOW
@pytest.mark.parametrize("device", [0, 1])
def test_on_another_machine_or_device_the_portable_steps_do_the_same(device, tmp_path, monkeypatch):
    artifact, reference = compiled("scanned")
    artifact.save(tmp_path / "model.lepton")
    expected = [tuple(reference(prompt, 6)) for prompt in PROMPTS]
    here = lx.load(tmp_path / "model.lepton", device=device)
    target = loading._target
    monkeypatch.setattr(loading, "_target", lambda *of: msgspec.structs.replace(target(*of), jaxlib="0.0.1"))
    elsewhere = lx.load(tmp_path / "model.lepton", device=device)
    assert (here.route, elsewhere.route) == ("executables", "stablehlo")
    for servable in (here, elsewhere):
        assert [each.tokens for each in servable.generator.generate(PROMPTS, max_tokens=6)] == expected
        assert servable.stepper._cache[0].devices() == {jax.devices()[device]}


def test_nothing_is_traced_when_it_is_loaded_and_run(tmp_path, monkeypatch):
    compiled("scanned")[0].save(tmp_path / "model.lepton")

    def refuse(*_, **__):
        raise AssertionError("traced")

    monkeypatch.setattr(jax, "jit", refuse)
    monkeypatch.setattr(jax.export, "deserialize", refuse)
    assert len(lx.load(tmp_path / "model.lepton").generator.generate([[1, 2]], max_tokens=3)[0].tokens) == 3


def test_the_cache_is_changed_where_it_lies():
    stepper = compiled("scanned")[0].servable().stepper
    stepper.prefill([1, 2], 0)
    before = stepper._cache
    places = [array.unsafe_buffer_pointer() for array in before]
    stepper.decode([1, 0, 0], [2, 0, 0])
    assert all(array.is_deleted() for array in before)
    assert [array.unsafe_buffer_pointer() for array in stepper._cache] == places


def test_other_weights_take_the_place_of_the_first_ones(tmp_path):
    from lepton_xla.compiler import make_update

    model = Decoder(True)
    first, second = decoder_weights(), jax.tree.map(lambda leaf: -leaf, decoder_weights())
    generators = [lx.Generator(*functions(model), w, slots=2, capacity=CAPACITY) for w in (first, second)]
    base = lx.compile(generators[0].program, {"length": (4,)}).servable()
    make_update(base, generators[1].program, version="2").save(tmp_path / "two.lepton")
    updated = lx.load(tmp_path / "two.lepton", base=base)
    assert list(updated.generator.generate([[5, 3]], max_tokens=6)[0].tokens) == model.reference(second, [5, 3], 6)
    assert list(base.generator.generate([[5, 3]], max_tokens=6)[0].tokens) == model.reference(first, [5, 3], 6)


def test_the_profile_is_of_what_is_asked_and_answered():
    from lepton_xla.cli import _models

    generator, artifact = made("scanned")[0], compiled("scanned")[0]
    asked = [{"prompt": [[5, 3], [7, 2, 4]], "max_tokens": 3}, {"prompt": [[1]], "max_tokens": 3}]
    spec = lx.ModelSpec(generator=generator, calibration=asked)
    assert _models.calibration(spec, generator.program) == (None, None)
    known = artifact.with_profile(_models.to_profile(spec, generator.program)).servable().profile
    assert known is not None
    lengths = {feature.name: feature for feature in known.features}["tokens:length"]
    assert (known.rows, lengths.edges[1:], lengths.counts) == (3, (1, 2, 3), (0, 1, 1, 1, 0, 0))
    assert {feature.tensor for feature in known.features} == {"tokens", "reply", "certainty"}
    with pytest.raises(lx.CompileError, match="batch 0 of the data to profile has no 'prompt'"):
        artifact.with_profile([{"tokens": [[1]]}])


def broken(**changed):
    model, weights = Decoder(True), decoder_weights()
    parts = {"init_cache": model.init_cache, "prefill": model.prefill, "decode": model.decode} | changed
    return lx.Generator(*parts.values(), weights, slots=2, capacity=8)


def others_matter(w, cache, token, position):
    logits, after = Decoder(True).decode(w, cache, token, position)
    return logits - logits.mean(0, keepdims=True), after


def one_too_far(w, cache, token, position):
    return Decoder(True).decode(w, cache, token, position + 1)


def padding_matters(w, tokens, length):
    return Decoder(True).prefill(w, tokens, jnp.full_like(length, tokens.shape[1]))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"decode": others_matter}, "slots affect each other"),
        ({"decode": one_too_far}, "does not go on where prefill stops"),
        ({"prefill": padding_matters}, "padded with zeros along 'length'"),
    ],
)
def test_a_model_that_breaks_the_contract_is_refused_when_it_is_compiled(changed, message):
    with pytest.raises(lx.CompileError, match=message):
        lx.compile(broken(**changed).program, {"length": (4, 8)})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"init_cache": lambda w, B, S: jnp.zeros(S)}, "needs one axis of sequences"),
        ({"init_cache": lambda w, B, S: {}}, "returns no array"),
        ({"decode": lambda w, cache, token, position: token}, "decode returns a ShapeDtypeStruct"),
        ({"decode": lambda w, cache, token, position: (token, cache)}, "logits of decode"),
        ({"decode": lambda w, cache, token, position: 1 / 0}, "decode cannot be traced: ZeroDivisionError"),
        ({"prefill": lambda w, tokens, length: (jnp.zeros((1, 3)), {})}, "prefill gives logits"),
    ],
)
def test_functions_that_do_not_fit_are_refused_with_their_names(changed, message):
    with pytest.raises(lx.ModelError, match=message):
        broken(**changed)


def test_a_prompt_may_not_be_longer_than_the_cache():
    with pytest.raises(lx.CompileError, match="the cache has 8 positions"):
        lx.compile(broken().program, {"length": (16,)})


def test_modules_without_a_cache_are_refused():
    with pytest.raises(lx.ModelError, match="no part with a cache"):
        lx.Generator.from_nnx(nnx.Embed(VOCABULARY, 4, rngs=nnx.Rngs(0)))


INT8_CACHE = lx.Recipe(name="cache", fold=False, measure=False, cache="int8")


@pytest.mark.parametrize(
    "kind", ["scanned", "seq2seq", pytest.param("linen", marks=SLOW), pytest.param("nnx", marks=SLOW)]
)
def test_a_cache_in_int8_is_a_third_and_gives_nearly_the_same_logits(kind, tmp_path):
    generator, _ = made(kind)
    exact = compiled(kind)[0].servable().stepper
    small = lx.optimize(generator.program, INT8_CACHE, buckets={"length": (4, 8)})
    lx.compile(small, {"length": (4, 8)}).save(tmp_path / "small.lepton")
    rounded = lx.load(tmp_path / "small.lepton").stepper
    # A scale of four bytes for WIDTH or WIDTH / HEADS codes, instead of four bytes each.
    assert rounded.cache_bytes <= 0.4 * exact.cache_bytes
    first = exact.first_position
    for stepper in (exact, rounded):
        for slot, prompt in enumerate(PROMPTS[:3]):
            stepper.prefill(prompt, slot)
    for step in range(8):
        positions = [(len(prompt) if first is None else first) + step for prompt in PROMPTS[:3]]
        tokens = [3 + step, 9, 2 * step]
        a, b = (stepper.decode(tokens, positions) for stepper in (exact, rounded))
        assert 0 < np.abs(a - b).max() < 0.03 * np.abs(a).max()


def test_codes_of_positions_that_are_written_stay_as_they_are():
    small = lx.optimize(made("scanned")[0].program, INT8_CACHE, buckets={"length": (4, 8)})
    stepper = lx.compile(small, {"length": (4, 8)}).servable().stepper
    stepper.prefill([5, 3, 9], 1)
    before = [np.asarray(array) for array in stepper._cache]
    for step in range(3):
        stepper.decode([0, 7, 0], [0, 3 + step, 0])
    for old, new in zip(before, map(np.asarray, stepper._cache), strict=True):
        assert old.dtype in (np.int8, np.float32)
        np.testing.assert_array_equal(old[:, 1, :3], new[:, 1, :3])
        assert not np.array_equal(old[:, 1, 3:6], new[:, 1, 3:6])


def shifts(w, cache, token, position):
    logits, after = Decoder(True).decode(w, cache, token, position)
    return logits, jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=2), after)


def test_int8_is_refused_where_it_cannot_be():
    with pytest.raises(lx.UnsupportedError, match="at other positions than its own"):
        lx.optimize(broken(decode=shifts).program, INT8_CACHE, buckets={"length": (4,)})
    plain = lx.trace(lambda w, x: x @ w, jnp.eye(4), {"x": lx.TensorSpec(("batch", 4), "float32")})
    with pytest.raises(lx.RecipeError, match="no cache"):
        lx.optimize(plain, INT8_CACHE)


def test_a_step_of_one_sequence_copies_no_cache():
    def init_cache(w, B, S):
        return jnp.zeros((B, 2, S, 8), "float32")

    def prefill(w, tokens, length):
        return decode(w, init_cache(w, len(tokens), CAPACITY), tokens[:, 0], length)

    def decode(w, cache, token, position):
        query = w[token].reshape(-1, 2, 8)
        cache = cache.at[jnp.arange(len(token)), :, position].set(query)
        shares = jax.nn.softmax(jnp.einsum("bhd,bhsd->bhs", query, cache), axis=-1)
        return jnp.einsum("bhs,bhsd->bhd", shares, cache).reshape(-1, 16) @ w.T, cache

    weights = normal(0, 10, 16)
    program = lx.Generator(init_cache, prefill, decode, weights, slots=1, capacity=CAPACITY).program
    step = generating.part(program, 4).decode
    (_, flat), shapes = flat_functions(step), step.abstract_inputs({})
    text = jax.jit(flat, **stepping.donation([weights], 2, shapes)).lower(weights, *shapes).compile().as_text()
    assert f"f32[1,2,{CAPACITY},8]" in text
    assert not [line for line in text.splitlines() if f" = f32[1,2,{CAPACITY},8]" in line and " copy(" in line]
