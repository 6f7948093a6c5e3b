"""What a client sends is bounded before it is worked on: what is processed is counted, not how long it takes."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_fakes import Affine, affine_json

from lepton_xla.serve.errors import HTTPError, shortened
from lepton_xla.serve.limits import Limits
from lepton_xla.serve.protocol import jsondata, outline, request
from lepton_xla.serve.protocol.encoding import choose
from lepton_xla.serve.protocol.outline import check_members, outline_of
from lepton_xla.serve.protocol.signature import signature_of
from lepton_xla.serve.protocol.wire import Decoder

MIB = 1 << 20
SIZE = MIB
LIMITS = Limits(max_tensors=256)
LEFT = 256 << 10  # of the JSON part of a request, beside data


def fill(start, unit, end=""):
    return (start + unit * ((SIZE - len(start) - len(end)) // len(unit)) + end).encode()


def one_input(mark, **changes):
    """What is before and behind a mark in the JSON of one input."""
    fields = {"name": '"x"', "datatype": '"FP32"', "shape": "[1, 4]", "data": "[1, 2, 3, 4]"} | changes
    return ('{"inputs": [{' + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}]}").split(mark)


def hostile():
    start, end = one_input("@", shape="[@1]")
    yield "shape", fill(start, "1,", end)
    yield "size", fill(start, "1", end)
    start, end = one_input("@", parameters="{@}")
    yield "parameters", fill(start, '"a": 1, ', '"b": 1' + end)
    yield "spaced colons", fill(start, '"a"   :   1, ', '"b": 1' + end)
    start, end = one_input("@", name='"@"')
    yield "name", fill(start, "x", end)
    yield "escapes", fill(start, "\\u00e9", end)
    yield "escaped quotes", fill(start, '\\"', end)
    yield "backslashes", fill(start, "\\\\", end)
    start, end = one_input("@", datatype='"@"')
    yield "datatype", fill(start, "x", end)
    start, end = one_input("@", data="[@]")
    yield "data", fill(start, "1,", "1" + end)
    yield "digits", fill(start, "1", end)
    yield "space", fill(start, " ", "1" + end)
    yield "empty lists", fill(start, "[],", "[]" + end)
    yield "nested data", fill(start, "[", "1" + end)
    yield "strings", fill(start, '"a",', '"a"' + end)
    yield "objects", fill(start, "{},", "{}" + end)
    yield "key of data escaped", fill(start.replace("data", "d\\u0061ta"), "1,", "1" + end)
    yield "no end", fill(start, "1,")
    yield "inputs", fill('{"inputs": [', '{"name": "x", "datatype": "FP32", "shape": [1]}, ', "{}]}")
    yield "outputs", fill('{"inputs": [], "outputs": [', '{"name": "y"}, ', "{}]}")
    yield "unknown", fill('{"inputs": [], "a": [', "[[]],", "1]}")
    yield "members", fill("{", '"a": 1, ', '"inputs": []}')
    yield "deep", fill("", "[")
    yield "id", fill('{"inputs": [], "id": "', "x", '"}')
    yield "quotes", fill("", '"')
    yield "commas", fill("", ",")


@pytest.mark.parametrize("body", [pytest.param(body, id=name) for name, body in hostile()])
def test_a_refusal_costs_little_whatever_came(monkeypatch, body):
    """No call into the JSON library sees more than a quarter of it, and little memory is taken."""
    seen = []

    class Counted:
        def __init__(self, real):
            self.real = real

        def decode(self, text):
            seen.append(len(text))
            return self.real.decode(text)

    monkeypatch.setattr(request, "_DECODER", Counted(request._DECODER))
    real = jsondata._decoder
    monkeypatch.setattr(jsondata, "_decoder", lambda name: Counted(real(name)))
    decoder = Decoder(signature_of(Affine()), LIMITS, 4096)
    tracemalloc.start()
    try:
        with pytest.raises(HTTPError) as caught:
            decoder.decode(body, None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.status == 400
    assert len(caught.value.message) < 600
    assert max(seen, default=0) <= LEFT
    assert sum(seen) <= LEFT + 4 * jsondata.PIECE_BYTES  # data up to the first number too many
    assert peak < 2.5 * MIB


def test_a_short_body_makes_few_objects_too():
    members = ", ".join(f'"{index:04}": 1' for index in range(8192)).encode()
    check_members(b"{" + members[:-11], 1024)
    with pytest.raises(HTTPError, match="more than 8192 members"):
        check_members(b"{" + members + b', "a": 1}', 1024)
    check_members(json.dumps({"a": ":" * 9000, 'b\\"': "\\"}).encode(), 1024)


def verdict(body):
    try:
        got = Decoder(signature_of(Affine()), LIMITS, 4096).decode(body, None)
    except HTTPError as refusal:
        return refusal.status
    return got.spec.id, got.spec.rows, got.spec.outputs, [bytes(each) for each in got.tensors]


TEXT = st.text(st.sampled_from('"\\[]{},: data1é'), max_size=8)


@settings(max_examples=60)
@given(data=st.data())
def test_a_request_is_the_same_however_long_ones_are_read(data):
    """As the JSON library reads it whole: with odd strings, keys, spacing, and a byte changed somewhere."""
    rows = data.draw(st.integers(1, 3))
    draw = {name: data.draw(TEXT) for name in ("id", "key", "value")}
    given_ = json.loads(affine_json(np.arange(4 * rows).reshape(rows, 4), range(rows), id=draw["id"]))
    given_["inputs"][0]["parameters"] = {draw["key"]: draw["value"]}
    given_["inputs"][1][draw["key"] + "?"] = {"data": [1, 2], "more": draw["value"], "empty": {"data": []}}
    if data.draw(st.booleans()):
        given_["inputs"][0]["data"] = np.ravel(given_["inputs"][0]["data"]).tolist()
    body = bytearray(json.dumps(given_, indent=data.draw(st.sampled_from([None, 0, 2]))).encode())
    if data.draw(st.booleans()):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.sampled_from(b'"\\[]{},: 1'))
    with pytest.MonkeyPatch.context() as patch:
        whole = verdict(bytes(body))
        patch.setattr(request, "PIECE_BYTES", 0)
        patch.setattr(jsondata, "PIECE_BYTES", 8)
        patch.setattr(jsondata, "REST_S", 0.0)
        assert verdict(bytes(body)) == whole


def test_data_is_cut_out_and_nothing_else():
    x = "[" + ", ".join(["1.0"] * 40_000) + "]"
    start, end = one_input("@", shape="[10000, 4]", data="@")
    left, arrays = outline_of((start + x + end).encode(), 1024)
    ((mark, span),) = arrays.items()
    assert left == (start + mark.decode() + end).encode()
    assert span == (len(start), len(start) + len(x))
    assert outline._MARK.encode() in mark


@pytest.mark.parametrize("unit", [b"x", b'\\"', b"\\\\"])
def test_a_string_is_searched_for_its_end_so_far_and_no_further(unit):
    """Each escaped quote is a step, so that these are bounded before all that is left is."""
    most = outline._LONGEST_STRING
    fits = b'"%b"' % (unit * ((most - 2) // len(unit)))
    assert outline_of(fits, 1024).text == fits
    with pytest.raises(HTTPError, match=f"no end within {most} bytes"):
        outline_of(b'"%b"' % (unit * (most // len(unit))), 1024)


@pytest.mark.parametrize(
    ("data", "same"),
    [
        ("[1, [2]]", True),
        ("[1 2]", True),
        ("[[1]", True),
        ("[" * 70 + "]" * 70, True),
        ("[1" + ", 1" * SIZE + "]", False),
    ],
    ids=["fine", "no JSON", "open", "deep", "long"],
)
def test_data_that_belongs_to_no_tensor_is_ignored_but_bounded_json(monkeypatch, data, same):
    text = affine_json(np.arange(1, 5).reshape(1, 4), [1], more={"data": 0})
    text = text.replace(b'"data": 0', f'"data": {data}'.encode())
    monkeypatch.setattr(request, "PIECE_BYTES", 1 << 30)
    whole = verdict(text)
    monkeypatch.setattr(request, "PIECE_BYTES", 0)
    assert verdict(text) == (whole if same else 400)


GOOD = "[[1.0, 2.0, 3.0, 4.0]]"
BAD = (
    "[1[, 2, 3, 4]]", "[[1, 2, 3], 4]", "[[1, 2, 3, ]4]", "[1, 2, 3, 4]]", "[1, 2, 3, 4,]", "[1, 2] [3, 4]",
    "[,1, 2, 3]", "[1, 2, , 3]", "[[1, 2, 3, 4]5]", "[[[1, 2, 3, 4]]", "5[[1, 2, 3, 4]]", "[1, 2, 3, 4",
    "[1, 2, 3 4]", "[[1, 2, 3, 4]", "[]", "[1, 2, 3, 4] 5",
)  # fmt: skip


@pytest.mark.parametrize("piece", [4, 8, 1 << 16])
@pytest.mark.parametrize("data", BAD)
def test_lists_that_are_no_json_are_refused_where_the_json_library_does_not_see_them(monkeypatch, data, piece):
    monkeypatch.setattr(request, "PIECE_BYTES", 0)
    monkeypatch.setattr(jsondata, "PIECE_BYTES", piece)
    text = affine_json(np.arange(1, 5).reshape(1, 4), [1])
    assert verdict(text)[1] == 1
    assert verdict(text.replace(GOOD.encode(), data.encode())) == 400


@pytest.mark.parametrize(
    ("value", "text"),
    [("x", "'x'"), ("x" * 10**6, f"'{'x' * 100}'..."), ([1, 2], "[1, 2]"), ([1] * 10**6, "[" + "1, " * 8 + "...]"),
     ([[[1]], {"a": 1}, [], {}], "[[...], {...}, [], {}]"), ({"a": [1] * 10**6}, "{...}"), (10**18, str(10**18)),
     (None, "None"), (["y" * 200], f"['{'y' * 100}'...]")],
)  # fmt: skip
def test_what_a_message_quotes_is_short(value, text):
    assert shortened(value) == text


def test_of_what_a_client_accepts_a_kilobyte_is_read():
    assert choose("br," * 200 + "gzip") == "gzip"
    assert choose("," * 2000 + "gzip") is None
