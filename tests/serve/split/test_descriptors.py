"""What front-ends and the engine tell each other: it comes out as it went in, and garbage is refused."""

import contextlib
import itertools
import struct

import hypothesis
import msgspec
import numpy as np
import pytest
from hypothesis import strategies as st
from serve_fakes import Affine, Tokens

from lepton_xla.serve.batching.scheduler import Times
from lepton_xla.serve.errors import RefusedError
from lepton_xla.serve.protocol.signature import signature_of
from lepton_xla.serve.protocol.wire import Plan
from lepton_xla.serve.split import descriptors, hello
from lepton_xla.serve.split.blocks import SMALLEST

TOKENS = signature_of(Tokens())
MAX_ROWS = 4096

blocks = st.integers(0, 2**32 - 1).map(lambda place: place << SMALLEST)
texts = st.text(max_size=300)


@st.composite
def plans(draw):
    batch, seq = draw(st.integers(1, MAX_ROWS)), draw(st.integers(1, 8))
    outputs = draw(st.lists(st.integers(0, 1), unique=True))
    return Plan(
        rows=batch,
        key=(4 if seq <= 4 else 8,),
        sizes=draw(st.permutations([("batch", batch), ("seq", seq)]).map(dict)),
        cut=seq not in (4, 8),
        slices=((0, batch * seq * 4),),
        tail_bytes=batch * seq * 4,
        outputs=tuple((index, draw(st.booleans())) for index in outputs),
        id=draw(st.none() | texts),
        timeout_s=draw(st.none() | st.floats(1e-6, 1e12)),
        priority=draw(st.integers(0, 2**64 - 1)),
    )


@hypothesis.given(plans())
def test_the_engine_works_out_the_plan_of_the_front_end(plan):
    sent = descriptors.pack(TOKENS, plan)
    got = descriptors.unpack(TOKENS, sent.terms, MAX_ROWS)
    for name in ("rows", "key", "sizes", "cut", "timeout_s", "priority"):
        assert getattr(got.plan, name) == getattr(plan, name)
    assert [index for index, _ in got.plan.outputs] == [index for index, _ in plan.outputs]
    assert (got.inputs, got.outputs, got.order) == (sent.inputs, sent.outputs, sent.order)
    batch, seq = plan.sizes["batch"], plan.sizes["seq"]
    assert sent.inputs == ((0, batch * seq * 4),)
    expected = {0: batch * seq * 4, 1: batch * 4}
    assert [stop - start for start, stop in sent.outputs] == [expected[index] for index, _ in plan.outputs]
    for slices in (sent.inputs, sent.outputs):
        assert all(start % 64 == 0 for start, _ in slices)
        assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(slices))
        assert all(stop <= 1 << sent.order for _, stop in slices)


entries_to_engine = st.lists(
    st.tuples(st.just("run"), plans(), blocks, st.floats(0, 1e12))
    | st.tuples(st.just("cancel"), blocks)
    | st.tuples(st.just("ping"))
)


@hypothesis.given(entries_to_engine)
def test_what_a_front_end_says_comes_out_as_it_went_in(entries):
    packet, expected = b"", []
    for kind, *rest in entries:
        if kind == "run":
            plan, block, arrival_s = rest
            layout = descriptors.pack(TOKENS, plan)
            packet += descriptors.run(layout, block, arrival_s)
            expected.append((descriptors.RUN, block, arrival_s, layout.terms))
        elif kind == "cancel":
            packet += descriptors.cancel(*rest)
            expected.append((descriptors.CANCEL, rest[0], 0.0, b""))
        else:
            packet += descriptors.ping()
            expected.append((descriptors.PING, 0, 0.0, b""))
    assert list(descriptors.said(packet)) == expected


@hypothesis.given(
    st.lists(
        st.tuples(st.sampled_from([descriptors.OK, descriptors.CANCELLED]), blocks)
        | st.tuples(st.integers(400, 599), blocks, texts, st.lists(texts, max_size=3))
        | st.builds(Times, *[st.floats(allow_nan=False)] * 3, *[st.integers(0, 2**32 - 1)] * 2)
    )
)
def test_what_the_engine_answers_comes_out_as_it_went_in(entries):
    packet = b""
    for entry in entries:
        if isinstance(entry, Times):
            packet += descriptors.ran(entry)
            continue
        status, block, *words = entry
        if words:
            packet += descriptors.refusal(RefusedError(status, words[0], *words[1]), block)
        else:
            packet += descriptors.answer(status, block)
    got = list(descriptors.answered(packet))
    for (got_status, got_block, refusal), entry in zip(got, entries, strict=True):
        if isinstance(entry, Times):
            assert (got_status, refusal) == (descriptors.RAN, entry)
            continue
        status, block, *words = entry
        assert (got_status, got_block, refusal is None) == (status, block, not words)
        if refusal is not None:
            assert (refusal.status, refusal.message, refusal.headers) == (status, words[0], tuple(words[1]))


@hypothesis.given(st.binary(max_size=200))
def test_garbage_is_a_value_error_and_nothing_else(packet):
    for read in (descriptors.said, descriptors.answered):
        with contextlib.suppress(ValueError):
            list(read(packet))
    with contextlib.suppress(ValueError):
        descriptors.unpack(TOKENS, packet, MAX_ROWS)
    with contextlib.suppress(ValueError):
        hello.decode(packet)


def test_what_is_cut_short_is_refused():
    layout = descriptors.pack(TOKENS, next(iter(_plan())))
    whole = descriptors.run(layout, 0, 1.0)
    for size in range(1, len(whole)):
        with pytest.raises(ValueError):
            list(descriptors.said(whole[:size]))
    whole = descriptors.refusal(RefusedError(503, "no", "Retry-After: 1"), 0)
    for size in range(1, len(whole)):
        with pytest.raises(ValueError):
            list(descriptors.answered(whole[:size]))


def _plan(batch=2, seq=5):
    yield Plan(
        rows=batch, key=(8,), sizes={"batch": batch, "seq": seq}, cut=True, slices=(), tail_bytes=0,
        outputs=((0, True),),
    )  # fmt: skip


@pytest.mark.parametrize(
    "terms",
    [
        ((0, 4), (0,), None, 0),
        ((MAX_ROWS + 1, 4), (0,), None, 0),
        ((1, 0), (0,), None, 0),
        ((1, 9), (0,), None, 0),
        ((1,), (0,), None, 0),
        ((1, 4, 4), (0,), None, 0),
        ((1, -4), (0,), None, 0),
        ((1, 4), (2,), None, 0),
        ((1, 4), (-1,), None, 0),
        ((1, 4), (0, 0), None, 0),
        ((1, 4), (0,), 0.0, 0),
        ((1, 4), (0,), -1.0, 0),
        ((1, 4), (0,), None, -1),
        ((1, 4), (0,), "soon", 0),
        ((1, 2.5), (0,), None, 0),
    ],
)
def test_terms_that_do_not_fit_the_model_are_refused(terms):
    with pytest.raises(ValueError):
        descriptors.unpack(TOKENS, msgspec.msgpack.encode(terms), MAX_ROWS)


def test_times_that_are_none_are_refused():
    for arrival_s in (float("nan"), float("inf"), -1.0):
        packet = struct.pack("<HHId", descriptors.CANCEL, 0, 0, arrival_s)
        with pytest.raises(ValueError):
            list(descriptors.said(packet))


@pytest.mark.parametrize("servable", [Affine(), Tokens()])
def test_a_hello_describes_the_model(servable):
    signature = signature_of(servable, "other")
    said = hello.decode(hello.encode(signature, 77))
    assert said.signature == signature
    assert said.max_rows == 77
    assert said.signature.inputs[0].dtype == np.dtype(servable.inputs[signature.inputs[0].name].dtype)
