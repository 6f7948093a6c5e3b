"""Profiles: what known rows look like, and counting others into the same bins."""

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lepton_xla import profiles
from lepton_xla.errors import LeptonError
from lepton_xla.profiles import Profile, Sketch, profile_of, tensor_of

RNG = np.random.default_rng(0)


def naive(feature, values):
    """Bin by bin, as `Feature` says: above the edge before, up to its own; then above the last; then not finite."""
    counts = [0] * len(feature.counts)
    for value in values:
        if not np.isfinite(value):
            counts[-1] += 1
        else:
            counts[sum(value > edge for edge in feature.edges)] += 1
    return counts


def test_the_known_rows_fall_into_ten_equal_bins():
    rows = np.float32(RNG.normal(size=(1000, 3)))
    profile = profile_of({"x": rows}, {"y": rows[:, :1]})
    for feature in profile.features:
        assert feature.counts[-1] == 0
        assert all(99 <= count <= 101 for count in feature.counts[:-1])


def test_a_sketch_of_the_known_rows_is_the_profile():
    rows = np.float32(RNG.normal(size=(300, 64)))
    outputs = np.float32(RNG.normal(size=(300, 10)))
    profile = profile_of({"x": rows}, {"y": outputs})
    sketch = Sketch(profile)
    for start in range(0, 300, 100):  # in any grouping
        sketch.add({"x": rows[start : start + 100]}, {"y": outputs[start : start + 100]})
    assert sketch.counts == {feature.name: list(feature.counts) for feature in profile.features}


def test_class_and_confidence_are_those_of_a_softmax():
    logits = np.float32(RNG.normal(size=(200, 4)) * 3)
    shares = np.exp(logits.astype(np.float64))
    shares /= shares.sum(axis=1, keepdims=True)
    found = {}
    for name, output in (("logits", logits), ("shares", np.float32(shares))):
        profile = profile_of({"x": logits[:, :1]}, {name: output})
        assert profile.logits == (("logits",) if name == "logits" else ())
        found[name] = {feature.name.rpartition(":")[2]: feature for feature in profile.features if ":" in feature.name}
    classes = np.bincount(shares.argmax(axis=1), minlength=4).tolist()
    for features in found.values():
        assert list(features["class"].counts) == [0, *classes, 0, 0]
    np.testing.assert_allclose(found["logits"]["confidence"].edges, found["shares"]["confidence"].edges, rtol=1e-5)
    expected = np.quantile(shares.max(axis=1), np.arange(1, 10) / 10)
    np.testing.assert_allclose(found["logits"]["confidence"].edges, expected, rtol=1e-5)


def test_what_is_not_finite_has_a_bin_of_its_own():
    rows = np.float32([[1.0], [2.0], [np.nan], [np.inf]])
    profile = profile_of({"x": rows}, {"y": rows})
    (x, _) = profile.features
    assert (x.counts[-1], sum(x.counts)) == (2, 4)


def test_padding_is_not_counted():
    short, long = np.zeros((2, 8), np.int32), np.zeros((2, 32), np.int32)
    short[:, :3] = long[:, :3] = [5, 6, 7]
    profile = profile_of({"ids": short}, {"y": np.ones((2, 1), np.float32)}, padded=["ids"])
    sketch = Sketch(profile)
    sketch.add({"ids": long}, {"y": np.ones((2, 1), np.float32)})
    assert sketch.counts["ids:length"] == list(next(f.counts for f in profile.features if f.name == "ids:length"))
    assert sketch.counts["ids:mean"] == list(next(f.counts for f in profile.features if f.name == "ids:mean"))


@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.uint64, np.float16, np.float64, ml_dtypes.bfloat16])
def test_every_dtype_that_is_served_has_features(dtype):
    rows = np.arange(40).reshape(20, 2).astype(dtype)
    profile = profile_of({"x": rows}, {"y": rows})
    assert [feature.name for feature in profile.features][:2] == ["x[0]", "x[1]"]


def test_statistics_of_many_elements_are_numpys():
    images = RNG.normal(3, 2, size=(100, 50, 60)).astype(np.float32)
    found = dict(profiles._statistics("image", images, padded=False))
    flat = images.reshape(100, -1).astype(np.float64)
    np.testing.assert_allclose(found["image:mean"], flat.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(found["image:deviation"], flat.std(axis=1), rtol=1e-12)
    projected = np.stack([found[f"image:projection {index}"] for index in range(8)], axis=1)
    np.testing.assert_allclose(projected, flat @ profiles._directions(3000), rtol=1e-9, atol=1e-9)
    assert len(found) == 10


def test_texts_have_none():
    profile = profile_of({"text": np.array([b"a", b"b"], object)}, {"y": np.float32([[1], [2]])})
    assert [feature.name for feature in profile.features] == ["y[0]"]


def test_rows_that_differ_or_lack_are_refused():
    with pytest.raises(LeptonError, match="at least one"):
        profile_of({"x": np.zeros((0, 2))}, {"y": np.zeros((0, 2))})
    with pytest.raises(LeptonError, match=r"\[2, 3\]"):
        profile_of({"x": np.zeros((2, 2))}, {"y": np.zeros((3, 2))})


values = arrays.arrays(np.float64, st.tuples(st.integers(1, 30), st.just(2)), elements=st.floats(allow_nan=True))


@settings(deadline=None)
@given(known=values, seen=values)
def test_counts_are_what_a_loop_counts(known, seen):
    with np.errstate(all="ignore"):
        profile = profile_of({"x": known}, {"y": known[:, :1]})
        sketch = Sketch(profile)
        sketch.add({"x": seen}, {"y": seen[:, :1]})
    for index in range(2):
        feature = profile.features[index]
        assert sketch.counts[feature.name] == naive(feature, seen[:, index])
        assert list(feature.counts) == naive(feature, known[:, index])


@settings(deadline=None)
@given(known=values)
def test_a_profile_is_read_back(known):
    with np.errstate(all="ignore"):
        profile = profile_of({"x": known}, {"y": known})
    assert msgspec.json.decode(msgspec.json.encode(profile), type=Profile) == profile


@pytest.mark.parametrize(
    "change",
    [{"edges": [2.0, 1.0]}, {"edges": [1.0]}, {"counts": [1, -1, 0, 0]}],
)
def test_a_profile_that_cannot_be_is_refused(change):
    feature = {"name": "x[0]", "edges": [1.0, 2.0], "counts": [1, 1, 1, 0], **change}
    data = msgspec.json.encode({"rows": 3, "features": [feature]})
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(data, type=Profile)


def test_a_colon_in_a_tensors_name():
    assert tensor_of("a:b:mean") == "a:b"
