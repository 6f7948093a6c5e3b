import contextlib
import importlib
import json
import math
import struct

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from serve_fakes import Affine, Identity, Tokens, affine_binary, affine_json

from lepton_xla.errors import ServeError
from lepton_xla.program import TensorSpec
from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.limits import Limits
from lepton_xla.serve.protocol import request
from lepton_xla.serve.protocol.datatypes import DATATYPES, datatype_of
from lepton_xla.serve.protocol.jsondata import slices
from lepton_xla.serve.protocol.request import check_depth
from lepton_xla.serve.protocol.response import write_response
from lepton_xla.serve.protocol.signature import signature_of
from lepton_xla.serve.protocol.wire import Decoder

# The protocol's table, written out by hand: name, bytes, NumPy name.
TABLE = [
    ("BOOL", 1, "bool"),
    ("UINT8", 1, "uint8"),
    ("UINT16", 2, "uint16"),
    ("UINT32", 4, "uint32"),
    ("UINT64", 8, "uint64"),
    ("INT8", 1, "int8"),
    ("INT16", 2, "int16"),
    ("INT32", 4, "int32"),
    ("INT64", 8, "int64"),
    ("FP16", 2, "float16"),
    ("FP32", 4, "float32"),
    ("FP64", 8, "float64"),
    ("BF16", 2, "bfloat16"),
]
JSON_TABLE = [row for row in TABLE if row[0] not in ("FP16", "BF16")]


def decoder(servable, max_rows=4096, **limits):
    return Decoder(signature_of(servable), Limits(**limits), max_rows)


def refused(servable, body, size=None, status=400, **kwargs):
    """The message of the refusal that this body must get."""
    with pytest.raises(HTTPError) as caught:
        decoder(servable, **kwargs).decode(body, size)
    assert caught.value.status == status
    return caught.value.message


def one(data=None, shape=(1, 3), datatype="FP32", name="x", **more):
    """The JSON of a request with one input; `data` may be raw JSON text."""
    entry = {"name": name, "shape": list(shape), "datatype": datatype, **more}
    text = json.dumps(entry)[:-1]
    if data is not None:
        text += f', "data": {data}'
    return f'{{"inputs": [{text}}}]}}'.encode()


def asking(**fields):
    """A request of `Identity` that is right as far as its input goes."""
    return one("[1,2,3]")[:-1] + b", " + json.dumps(fields).encode()[1:]


def test_the_table_of_datatypes_is_the_protocols():
    assert [(row.name, row.item_bytes, row.dtype.name) for row in DATATYPES.values() if row.dtype] == TABLE
    assert set(DATATYPES) == {row[0] for row in TABLE} | {"BYTES"}
    for name, _, dtype in TABLE:
        assert datatype_of(dtype).name == name


@pytest.mark.parametrize("dtype", ["int4", "uint4", "float8_e4m3fn", "complex64"])
def test_a_model_with_a_dtype_the_wire_cannot_carry_is_refused_at_start(dtype):
    with pytest.raises(ServeError, match=dtype):
        signature_of(Identity(dtype))


@pytest.mark.parametrize("name", ["", "a/b", "..", " a", "a\n", "stats", "a\\b"])
def test_a_name_that_cannot_be_in_a_url_is_refused_at_start(name):
    with pytest.raises(ServeError, match=r"name|called"):
        signature_of(Identity(), name)


def test_the_batch_symbol_must_lead_every_tensor():
    assert signature_of(Affine()).batch == "batch"
    assert signature_of(Tokens()).others == ("seq",)
    mixed = Affine()
    mixed.inputs["n"] = TensorSpec((2,), "int32")
    assert signature_of(mixed).batch is None
    assert signature_of(mixed).others == ("batch",)


@pytest.mark.parametrize(("datatype", "size", "dtype"), TABLE)
@given(data=st.data())
def test_binary_bytes_arrive_as_they_were_sent(datatype, size, dtype, data):
    """Against the rule of the extension: little-endian, C order, no padding, sliced at the end of the JSON."""
    rows = data.draw(st.integers(1, 5))
    raw = data.draw(st.binary(min_size=rows * 3 * size, max_size=rows * 3 * size))
    if datatype == "BOOL":
        raw = bytes(byte & 1 for byte in raw)
    head = one(shape=(rows, 3), datatype=datatype, parameters={"binary_data_size": len(raw)})
    head = head[:-1] + b', "parameters": {"binary_data_output": true}}'
    request = decoder(Identity(dtype)).decode(head + raw, len(head))
    assert bytes(request.tensors[0]) == raw
    assert request.spec.rows == rows


def pack(datatype, values):
    """An encoder of our own: struct's formats, not NumPy's."""
    letter = dict(zip([row[0] for row in JSON_TABLE], "?BHIQbhiqfd", strict=True))[datatype]
    return struct.pack(f"<{len(values)}{letter}", *values)


def elements(datatype):
    if datatype == "BOOL":
        return st.booleans()
    if datatype.startswith("FP"):
        return st.floats(width=32 if datatype == "FP32" else 64, allow_nan=False, allow_infinity=False)
    bits = int(datatype.lstrip("UINT"))
    low = 0 if datatype.startswith("U") else -(2 ** (bits - 1))
    return st.integers(low, low + 2**bits - 1)


@pytest.mark.parametrize(("datatype", "size", "dtype"), JSON_TABLE)
@given(data=st.data())
def test_json_data_flat_or_nested_gives_the_packed_bytes(datatype, size, dtype, data):
    rows = data.draw(st.integers(1, 4))
    values = data.draw(st.lists(elements(datatype), min_size=rows * 3, max_size=rows * 3))
    nested = [values[start : start + 3] for start in range(0, len(values), 3)]
    for form in (values, nested):
        request = decoder(Identity(dtype)).decode(one(json.dumps(form), (rows, 3), datatype), None)
        assert bytes(request.tensors[0]) == pack(datatype, values)


@pytest.mark.parametrize(("datatype", "size", "dtype"), TABLE)
@given(data=st.data())
def test_tritonclients_encoder_is_understood(datatype, size, dtype, data):
    http = importlib.import_module("tritonclient.http")
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    rows = data.draw(st.integers(1, 4))
    raw = data.draw(st.binary(min_size=rows * 3 * size, max_size=rows * 3 * size))
    array = np.frombuffer(raw, np.uint8) & 1 if dtype == "bool" else np.frombuffer(raw, np.uint8)
    array = array.view(kind).reshape(rows, 3)
    binary = data.draw(st.booleans()) or datatype in ("FP16", "BF16") or not np.isfinite(array).all()
    given_input = http.InferInput("x", [rows, 3], datatype)
    given_input.set_data_from_numpy(array, binary_data=binary)
    wanted = http.InferRequestedOutput("y", binary_data=True)
    body, size = http.InferenceServerClient.generate_request_body(
        [given_input], outputs=data.draw(st.sampled_from([None, [wanted]])), request_id="7"
    )
    request = decoder(Identity(dtype)).decode(body, size)
    assert bytes(request.tensors[0]) == array.tobytes()
    assert request.spec.outputs == ((0, True),)
    assert request.spec.id == "7"


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.just(4)), elements=st.floats(-1e6, 1e6, width=32)),
    st.sampled_from(
        [None, [("y", True)], [("y", False)], [("twice", True), ("y", False)], [("y", True), ("twice", True)]]
    ),
)
def test_response_is_what_triton_reads(y, wanted):
    http = importlib.import_module("tritonclient.http")
    affine = Affine()
    rows = len(y)
    twice = np.arange(rows, dtype=np.int32)
    outputs = None
    if wanted is not None:
        outputs = [{"name": name, "parameters": {"binary_data": binary}} for name, binary in wanted]
    extra = {"id": "abc"} | ({} if outputs is None else {"outputs": outputs})
    request = decoder(affine).decode(affine_json(np.zeros((rows, 4)), np.zeros(rows), **extra), None)
    results = {"y": y, "twice": twice}
    names = list(affine.outputs)
    raws = [results[names[index]].tobytes() for index, _ in request.spec.outputs]
    head, tail = write_response(signature_of(affine), request.spec, raws)
    body = head + b"".join(tail)
    result = http.InferResult.from_response_body(body, header_length=len(head) if tail else None)
    asked = wanted or [("y", False), ("twice", False)]
    for name, _ in asked:
        np.testing.assert_array_equal(result.as_numpy(name), results[name])
    response = json.loads(head)
    assert [output["name"] for output in response["outputs"]] == [name for name, _ in asked]
    assert (response["id"], response["model_name"], response["model_version"]) == ("abc", "affine", "3")


def test_inputs_may_come_in_any_order_with_json_and_binary_mixed():
    n = np.array([5, 6], np.int32)
    inputs = [
        {"name": "n", "datatype": "INT32", "shape": [2], "parameters": {"binary_data_size": 8}},
        {"name": "x", "datatype": "FP32", "shape": [2, 4], "data": list(range(8))},
    ]
    head = json.dumps({"inputs": inputs}).encode()
    request = decoder(Affine()).decode(head + n.tobytes(), len(head))
    assert bytes(request.tensors[0]) == np.arange(8, dtype="<f4").tobytes()
    assert bytes(request.tensors[1]) == n.tobytes()


@pytest.mark.parametrize("blanks", [0, 10**6])
def test_a_request_counts_with_the_memory_that_it_holds(blanks):
    """Its tensors are views of the body, which stays whole for them."""
    x = np.ones(3, np.float32)
    head = one(parameters={"binary_data_size": 12}) + b" " * blanks
    request = decoder(Identity()).decode(head + x.tobytes(), len(head))
    assert request.nbytes == len(request.tensors[0].obj)
    request = decoder(Identity()).decode(one([1, 2, 3]), None)
    assert request.nbytes == len(request.tensors[0].obj) == 12


def test_equal_heads_share_a_plan_and_the_cache_is_bounded():
    subject = decoder(Affine())
    body, headers = affine_binary(np.ones((1, 4)), [1])
    size = int(headers["Inference-Header-Content-Length"])
    specs = {id(subject.decode(body, size).spec) for _ in range(3)}
    assert len(specs) == 1
    for index in range(2000):
        body, headers = affine_binary(np.ones((1, 4)), [1], custom=str(index))
        subject.decode(body, int(headers["Inference-Header-Content-Length"]))
    assert len(subject._specs) <= 512


def test_a_head_that_begins_or_goes_on_as_the_last_one_is_another():
    subject = decoder(Identity())
    head = one(parameters={"binary_data_size": 12})
    for _ in range(3):
        subject.decode(head + bytes(12), len(head))
    for body, size in ((head + b"x" + bytes(12), len(head) + 1), (head + bytes(11), len(head) - 1)):
        with pytest.raises(HTTPError):
            subject.decode(body, size)
    assert subject.decode(head + b" " + bytes(12), len(head) + 1).spec is not subject.decode(
        head + bytes(12), len(head)
    ).spec  # fmt: skip


def test_requests_with_an_id_of_their_own_do_not_push_others_out_of_the_cache():
    subject = decoder(Affine())
    body, headers = affine_binary(np.ones((1, 4)), [1])
    size = int(headers["Inference-Header-Content-Length"])
    spec = subject.decode(body, size).spec
    for index in range(1000):
        other, headers = affine_binary(np.ones((1, 4)), [1], id=str(index))
        assert subject.decode(other, int(headers["Inference-Header-Content-Length"])).spec.id == str(index)
    assert subject.decode(body, size).spec is spec


@pytest.mark.parametrize("again", [b'"id": "second"', b'"\\u0069d": "second"'])
def test_an_id_given_twice_is_the_last_one_and_no_other_requests(again):
    subject = decoder(Identity())
    rest = one(parameters={"binary_data_size": 12})[1:-1] + b", " + again + b"}"
    for first in (b"first", b"second", b"third"):
        head = b'{"id": "' + first + b'", ' + rest
        assert subject.decode(head + bytes(12), len(head)).spec.id == "second"
    assert subject.decode(b"{" + rest + bytes(12), len(rest) + 1).spec.id == "second"


def test_json_data_is_never_cached():
    subject = decoder(Affine())
    for value in (1.0, 2.0):
        request = subject.decode(affine_json(np.full((1, 4), value), [1]), None)
        assert bytes(request.tensors[0]) == np.full(4, value, "<f4").tobytes()
    assert not subject._specs


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "nan", "1e999", "-1e999"])
def test_what_is_no_json_number_is_refused(literal):
    refused(Identity(), one(f"[1, 2, {literal}]"))


@pytest.mark.parametrize(
    ("datatype", "dtype", "value"),
    [
        ("UINT8", "uint8", 256),
        ("UINT8", "uint8", -1),
        ("INT8", "int8", 128),
        ("INT16", "int16", -32769),
        ("INT32", "int32", 2**31),
        ("INT64", "int64", 2**63),
        ("UINT64", "uint64", 2**64),
        ("UINT64", "uint64", -1),
        ("INT32", "int32", 1.5),
        ("INT32", "int32", True),
        ("INT32", "int32", "1"),
        ("INT32", "int32", None),
        ("BOOL", "bool", 2),
        ("BOOL", "bool", "true"),
        ("FP32", "float32", 1e39),
        ("FP32", "float32", "1.0"),
        ("FP32", "float32", True),
        ("FP32", "float32", None),
        ("FP64", "float64", {"a": 1.0}),
        ("FP16", "float16", 1.0),
        ("BF16", "bfloat16", 1.0),
    ],
)
def test_a_json_value_outside_its_datatype_is_refused(datatype, dtype, value):
    message = refused(Identity(dtype), one(json.dumps([0, 0, value]), datatype=datatype))
    assert datatype in message


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not a valid"),
        (b"{}", "inputs"),
        (b"[]", "not a valid"),
        (b"\xff\xfe", "not a valid"),
        (b'{"inputs": [', "not a valid"),
        (b'{"inputs": []}', "missing"),
        (b'{"inputs": 3}', "inputs"),
        (one("[1,2,3]") + b"x", "not a valid"),
        (one("[1,2,3]", name="z"), "no input 'z'"),
        (one("[1,2]"), "3 elements"),
        (one("[1,2,3,4]"), "3 elements"),
        (one("[[1,2],[3]]", shape=(1, 3)), "neither flat nor nested"),
        (one("[[1,2,3],[1,2,3]]", shape=(1, 3)), "neither flat nor nested"),
        (one("[[1],[2],[3]]", shape=(1, 3)), "neither flat nor nested"),
        (one('{"a": 1}'), "not a list"),
        (one('[{"a": 1}, 2, 3]'), "FP32"),
        (one("3"), "not a list"),
        (one(), "neither data"),
        (one("[1,2,3]", parameters={"binary_data_size": 12}), "both"),
        (one("[1,2,3]", shape=(3,)), "rank"),
        (one("[]", shape=(0, 3)), "at least one row"),
        (one("[1,2,3]", shape=(-1, 3)), "no size"),
        (one("[1,2,3]", shape=(2**63, 3)), "no size"),
        (one("[1,2,3]", shape=(10**30, 3)), "size"),
        (one("[1,2,3]", shape=(1, 4)), "takes 3"),
        (one("[1,2,3]", datatype="FP64"), "takes FP32"),
        (one("[1,2,3]", datatype="FP31"), "no datatype"),
        (one("[1,2,3]", datatype="BYTES"), "takes FP32"),
        (one(parameters={"shared_memory_region": "a"}), "shared memory"),
        (one(parameters={"binary_data_size": 12.5}), "binary_data_size"),
        (one(parameters={"binary_data_size": -1}), "binary_data_size"),
        (one(parameters={"binary_data_size": True}), "binary_data_size"),
        (one(parameters={"binary_data_size": 8}), "12 bytes"),
        (one(parameters={"binary_data_size": 12}), "12 bytes after"),
        (one(shape=(2**62, 3), parameters={"binary_data_size": 12}), "elements"),
        (one("[1,2,3]").replace(b"}]}", b'}], "outputs": [{"name": "q"}]}'), "no output 'q'"),
        (one("[1,2,3]").replace(b"}]}", b'}], "outputs": [{"name": "y"}, {"name": "y"}]}'), "twice"),
        (one("[1,2,[3]]"), "neither flat nor nested"),
        (asking(outputs=[{"name": "y", "parameters": {"classification": -1}}]), "whole number"),
        (asking(outputs=[{"name": "y", "parameters": {"classification": 1.0}}]), "whole number"),
        (asking(outputs=[{"name": "y", "parameters": {"classification": True}}]), "whole number"),
        (asking(outputs=[{"name": "y", "parameters": {"shared_memory_region": "a"}}]), "shared memory"),
        (asking(parameters={"binary_data_output": 1}), "true or false"),
        (asking(parameters={"triton_x": 1}), "reserved"),
        (asking(parameters={"headers": "x"}), "reserved"),
        (asking(parameters={"sequence_id": 7}), "no sequences"),
        (asking(parameters={"sequence_id": "abc"}), "no sequences"),
        (asking(parameters={"sequence_start": True}), "no sequences"),
        (asking(parameters={"sequence_end": True}), "no sequences"),
        (asking(parameters={"timeout": -1}), "'timeout' must be a whole number"),
        (asking(parameters={"timeout": 1.5}), "'timeout' must be a whole number"),
        (asking(parameters={"timeout": "9"}), "'timeout' must be a whole number"),
        (asking(parameters={"timeout": 2**64}), "'timeout' must be a whole number"),
        (asking(parameters={"priority": True}), "'priority' must be a whole number"),
        (asking(parameters={"priority": -1}), "'priority' must be a whole number"),
        (asking(parameters={"priority": None}), "'priority' must be a whole number"),
    ],
)
def test_malformed_requests_are_refused(body, says):
    assert says in refused(Identity(), body)


def test_timeout_and_priority_are_read():
    spec = decoder(Identity()).decode(asking(parameters={"timeout": 1500, "priority": 2}), None).spec
    assert (spec.timeout_s, spec.priority) == (0.0015, 2)
    # The protocol's own defaults, and a sequence that is none: what some clients send with every request.
    default = {"timeout": 0, "priority": 0, "sequence_id": 0, "sequence_start": False, "sequence_end": False}
    for parameters in ({}, default, {"anything": "else", "and": None, "more": 1.5}):
        spec = decoder(Identity()).decode(asking(parameters=parameters), None).spec
        assert (spec.timeout_s, spec.priority) == (None, 0)


def test_a_duplicate_input_is_refused():
    entry = '{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}'
    assert "twice" in refused(Identity(), f'{{"inputs": [{entry}, {entry}]}}'.encode())


def test_sizes_that_disagree_between_inputs_are_refused():
    assert "'batch'" in refused(Affine(), affine_json(np.zeros((2, 4)), np.zeros(3)))


def test_too_many_rows_is_413():
    refused(Identity(), one(json.dumps([0] * 12), (4, 3)), status=413, max_rows=3)


@pytest.mark.parametrize("delta", [-4, -1, 1, 400])
def test_a_binary_tail_of_another_length_is_refused(delta):
    head = one(parameters={"binary_data_size": 12})
    assert "bytes" in refused(Identity(), head + bytes(12 + delta if delta < 12 else 412), len(head))


@pytest.mark.parametrize("size", [1, 5, 10**9])
def test_a_header_length_that_lies_is_refused(size):
    head = one(parameters={"binary_data_size": 12})
    refused(Identity(), head + bytes(12), size)


def test_a_bool_byte_must_be_zero_or_one():
    head = one(datatype="BOOL", parameters={"binary_data_size": 3})
    assert "BOOL" in refused(Identity("bool"), head + b"\0\1\2", len(head))


def test_half_precision_outputs_must_be_asked_for_as_binary():
    head = one(datatype="BF16", parameters={"binary_data_size": 6})
    assert "binary_data" in refused(Identity("bfloat16"), head + bytes(6), len(head))


def test_raw_mode_takes_one_row_of_the_only_input():
    raw = np.arange(3, dtype="<f4").tobytes()
    request = decoder(Identity()).decode(raw, 0)
    assert bytes(request.tensors[0]) == raw
    assert (request.spec.rows, request.spec.outputs) == (1, ((0, True),))
    refused(Identity(), raw + b"\0", 0)
    refused(Identity(), raw + raw, 0)
    refused(Affine(), raw, 0)
    tokens = decoder(Tokens()).decode(bytes(20), 0)
    assert tokens.spec.sizes == {"batch": 1, "seq": 5}
    assert "'seq'" in refused(Tokens(), bytes(4 * 9), 0)
    assert "'seq'" in refused(Tokens(), b"", 0)


@given(st.integers(1, 12))
def test_other_symbols_are_padded_to_their_next_compiled_size(seq):
    body = one(json.dumps([1] * seq), (1, seq), "INT32", "tokens")
    if seq > 8:
        assert "'seq'" in refused(Tokens(), body)
        return
    spec = decoder(Tokens()).decode(body, None).spec
    assert spec.key == (4 if seq <= 4 else 8,)
    assert spec.cut == (seq not in (4, 8))


def test_nan_in_an_output_asked_for_as_json_is_an_error_and_as_binary_is_not():
    signature = signature_of(Identity())
    nan = np.array([[1.0, math.nan, 2.0]], np.float32).tobytes()
    spec = decoder(Identity()).decode(one("[1,2,3]"), None).spec
    with pytest.raises(HTTPError) as caught:
        write_response(signature, spec, [nan])
    assert caught.value.status == 400
    head = one(parameters={"binary_data_size": 12}).replace(b"}]}", b'}], "parameters": {"binary_data_output": true}}')
    spec = decoder(Identity()).decode(head + bytes(12), len(head)).spec
    head, tail = write_response(signature, spec, [nan])
    assert json.loads(head)["outputs"][0]["parameters"] == {"binary_data_size": 12}
    assert tail == [nan]


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_json_is_refused_beyond_the_depth_limit_only(opening):
    closing = {"[": "]", '{"a":': "}"}[opening]
    for depth in (1, 99, 100, 101, 5000):
        text = (opening * depth + "1" + closing * depth).encode()
        if depth <= 100:
            check_depth(text, 100)
        else:
            with pytest.raises(HTTPError, match="nested"):
                check_depth(text, 100)
    check_depth(json.dumps([[1, 2]] * 500).encode(), 100)
    late = b"[" + b"[]," * 100_000 + b"[" * 100 + b"]" * 101
    with pytest.raises(HTTPError, match="nested"):
        check_depth(late, 100)
    check_depth(late, 101)
    check_depth(json.dumps("[" * 500 + '\\"[').encode(), 100)


@given(
    st.lists(st.sampled_from(['"', "\\", "[", "]", "{", "}", "a", '\\"', "\\\\", '"[["', '"\\""']), max_size=40),
    st.integers(1, 9),
    st.integers(1, 6),
)
def test_depth_is_counted_outside_strings_only_wherever_the_text_is_cut(pieces, step, limit):
    text = "".join(pieces)
    depth = deepest = 0
    quoted = escaped = False
    for char in text:
        if quoted:
            quoted = escaped or char != '"'
            escaped = char == "\\" and not escaped
        elif char == '"':
            quoted = True
        elif char in "[]{}":
            depth += 1 if char in "[{" else -1
            deepest = max(deepest, depth)
        elif char == "\\":
            return  # no JSON: a backslash outside of a string

    def cut(size):
        return slices(size, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request, "slices", cut)
        if deepest <= limit:
            check_depth(text.encode(), limit)
        else:
            with pytest.raises(HTTPError, match="nested"):
                check_depth(text.encode(), limit)


@pytest.mark.parametrize("step", range(1, 12))
def test_no_cut_falls_between_a_backslash_and_what_it_escapes(monkeypatch, step):
    monkeypatch.setattr(request, "slices", lambda size: slices(size, step))
    for text in (rb'"\"[[[["', rb'"\\" []', rb'"\\\"[[[["', rb'"a\\\\"[]'):
        check_depth(text, 1)
        with pytest.raises(HTTPError):
            check_depth(text + b"[[", 1)


def test_deep_json_in_a_field_nobody_reads_is_refused_without_a_crash():
    deep = "[" * 200_000 + "]" * 200_000
    refused(Identity(), f'{{"inputs": [], "x": {deep}}}'.encode())
    refused(Identity(), one(deep, shape=(1, 3)))
    refused(Identity(), ("[" * 200_000).encode())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
field = st.sampled_from(["name", "shape", "datatype", "parameters", "data", "inputs", "outputs", "id"])


@given(
    st.dictionaries(field, json_values, max_size=6),
    st.lists(st.dictionaries(field, json_values, max_size=5), max_size=2),
)
def test_json_of_any_shape_is_decoded_or_refused(fields, inputs):
    body = msgspec.json.encode(fields | {"inputs": inputs})
    with contextlib.suppress(HTTPError):
        decoder(Identity()).decode(body, None)


SERVABLES = [
    Affine(),
    Identity(),
    Identity("bool"),
    Identity("bfloat16"),
    Tokens(),
    Identity(shape=(2, 3), bucket_sizes=()),
]


@given(
    st.sampled_from(SERVABLES),
    st.binary(max_size=60) | st.sampled_from([b"{", b"[]", b"{}", b"null", b'{"inputs": []}']),
    st.none() | st.integers(0, 70),
)
def test_any_bytes_are_decoded_or_refused(servable, body, size):
    subject = decoder(servable)
    with contextlib.suppress(HTTPError):
        decoded = subject.decode(body, size)
        inputs = signature_of(servable).inputs
        assert [len(data) for data in decoded.tensors] == [
            math.prod(tensor.at(decoded.spec.sizes)) * tensor.dtype.itemsize for tensor in inputs
        ]


@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(0, 250)), st.integers(0, 300))
def test_a_valid_request_cut_or_overwritten_is_decoded_or_refused(noise, size, at):
    body, headers = affine_binary(np.ones((2, 4)), [1, 2])
    if size is None:
        size = int(headers["Inference-Header-Content-Length"])
    damaged = body[:at] + noise + body[at + len(noise) :]
    with contextlib.suppress(HTTPError):
        request = decoder(Affine()).decode(damaged, size)
        assert [len(tensor) for tensor in request.tensors] == [request.spec.rows * 16, request.spec.rows * 4]
