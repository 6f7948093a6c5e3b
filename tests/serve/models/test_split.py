"""Which version answers: shares within binomial noise, sticky keys, propensities."""

import math
import random
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_xla.serve.app.generation import GenerationPages
from lepton_xla.serve.models.split import Choice, Split
from lepton_xla.serve.protocol.traffic import Shadow, Traffic

LOADED = {"stable": "3", "canary": "4", "3": "3", "4": "4", "5": "5"}


def split(shares, default="3", versions=LOADED, seed=0, **more):
    return Split("m", Traffic(shares=shares, **more), default, versions, random.Random(seed))


def counted(chosen):
    found = {}
    for choice in chosen:
        found[choice.version] = found.get(choice.version, 0) + 1
    return found


def within_noise(count, total, share):
    return abs(count - total * share) <= 5 * math.sqrt(total * share * (1 - share)) + 1


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("shares", [{"stable": 0.95, "canary": 0.05}, {"3": 0.2, "4": 0.3, "5": 0.5}])
def test_shares_hold_within_binomial_noise(shares, by_key):
    subject, total = split(shares, sticky="x-user" if by_key else ""), 20_000
    chosen = [subject.choose(b"user %d" % number if by_key else None) for number in range(total)]
    found = counted(chosen)
    for arm, share in shares.items():
        assert within_noise(found[LOADED[arm]], total, share)
        assert Choice(LOADED[arm], share) in chosen
    assert len(found) == len(shares)


def test_equal_keys_stay_at_one_version_in_every_process():
    one, other = (split({"3": 0.5, "4": 0.5}, seed=seed, sticky="x-user") for seed in (1, 2))
    for number in range(500):
        key = b"%d" % number
        assert one.choose(key) == one.choose(key) == other.choose(key)


@given(st.floats(0.01, 0.98), st.floats(0.001, 0.5))
def test_a_share_that_grows_only_gains_keys(share, more):
    more = min(more, 0.99 - share)
    before = split({"stable": 1 - share, "canary": share})
    after = split({"stable": 1 - share - more, "canary": share + more})
    keys = [b"%d" % number for number in range(300)]
    held = {key for key in keys if before.choose(key).version == "4"}
    assert held <= {key for key in keys if after.choose(key).version == "4"}


def test_arms_that_are_not_loaded_and_shares_of_nothing_go_to_the_default():
    subject = split({"9": 0.5, "canary": 0.5, "5": 0.0})
    assert subject.shares == {"3": 0.5, "4": 0.5}
    assert set(counted(subject.choose() for _ in range(200))) == {"3", "4"}
    assert split({}).choose() == Choice("3", 1.0)
    # Two arms at one version are one version.
    assert split({"stable": 0.5, "3": 0.25, "4": 0.25}).shares == {"3": 0.75, "4": 0.25}


def test_a_fraction_is_mirrored_and_nothing_to_who_answered():
    subject, total = split({}, shadow=Shadow(to="canary", fraction=0.2)), 20_000
    assert within_noise(sum(subject.mirrors() for _ in range(total)), total, 0.2)
    assert (subject.has_shadow("3"), subject.has_shadow("4")) == (True, False)
    assert not split({}, shadow=Shadow(to="9")).has_shadow("3")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"shares": {"stable": 0.5, "canary": 0.4}}, "add up to 0.9, not to 1"),
        ({"shares": {"a b": 1.0}}, "neither a label nor a version"),
        ({"shares": {str(number): 1 / 17 for number in range(1, 18)}}, "at most 16"),
        ({"sticky": "X User"}, "the name of a request header"),
        ({"sticky": "x-request-id"}, "differs on every request"),
        ({"shares": {"3": 1.0}, "bandit": {}}, "at least two shares"),
    ],
)
def test_documents_that_are_refused(document, message):
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert(document, Traffic)


@pytest.mark.parametrize(("sticky", "stays"), [("x-user", True), ("", False), ("id", False)])
def test_requests_to_generate_by_the_name_in_their_body_stay_too(sticky, stays):
    shared = split({"3": 0.5, "4": 0.5}, sticky=sticky)
    models = SimpleNamespace(split=lambda name: shared, find=lambda name, version, label=None: version)
    found = GenerationPages(models, None, None, None, None)._find
    asked = [SimpleNamespace(head=SimpleNamespace(headers={b"x-user": b"ada", b"id": b"1"})) for _ in range(40)]
    assert {found("m", each) for each in asked} == ({shared.choose(b"ada").version} if stays else {"3", "4"})
    assert {each.choice for each in asked} == {(0.5, None)}
