"""NVIDIA's own client, sync and asyncio, unmodified, against a running server."""

import asyncio
import importlib

import numpy as np
import pytest
from serve_fakes import Affine, Identity, counted, exchange

# gevent, which the sync client is built on, warns on import and when a loop is left open; that is the client's affair.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

X = np.arange(400, dtype=np.float32).reshape(100, 4)
N = np.arange(100, dtype=np.int32)


@pytest.fixture
def http():
    return importlib.import_module("tritonclient.http")


def inputs_of(http, rows, binary):
    x = http.InferInput("x", [rows, 4], "FP32")
    n = http.InferInput("n", [rows], "INT32")
    x.set_data_from_numpy(X[:rows], binary_data=binary)
    n.set_data_from_numpy(N[:rows], binary_data=binary)
    return [x, n]


def check(result, rows):
    np.testing.assert_array_equal(result.as_numpy("y"), 2 * X[:rows] + N[:rows, None].astype(np.float32))
    np.testing.assert_array_equal(result.as_numpy("twice"), 2 * N[:rows])


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("outputs", [None, "binary", "json", "mixed"])
@pytest.mark.parametrize("coding", [None, "gzip", "deflate"])
def test_sync_infer(server, http, binary_in, outputs, coding):
    wanted = None
    if outputs is not None:
        wanted = [
            http.InferRequestedOutput("y", binary_data=outputs == "binary"),
            http.InferRequestedOutput("twice", binary_data=outputs != "json"),
        ]
    with http.InferenceServerClient(server.url.removeprefix("http://")) as client:
        for rows in (1, 8, 100):
            result = client.infer(
                "affine",
                inputs_of(http, rows, binary_in),
                outputs=wanted,
                request_id="r1",
                request_compression_algorithm=coding,
                response_compression_algorithm=coding,
            )
            check(result, rows)
            assert result.get_response()["id"] == "r1"


def test_sync_everything_else(server, http):
    utils = importlib.import_module("tritonclient.utils")
    with http.InferenceServerClient(server.url.removeprefix("http://"), concurrency=8) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("affine")
        assert client.is_model_ready("affine", "3")
        assert not client.is_model_ready("affine", "4")
        assert client.get_server_metadata()["name"] == "lepton_xla"
        assert client.get_model_metadata("affine")["inputs"][0]["shape"] == [-1, 4]
        assert client.get_model_config("affine")["max_batch_size"] == 8
        assert client.get_model_repository_index()[0]["state"] == "READY"
        handles = [client.async_infer("affine", inputs_of(http, rows, True)) for rows in range(1, 17)]
        for rows, handle in enumerate(handles, 1):
            check(handle.get_result(), rows)
        stats = client.get_inference_statistics("affine")["model_stats"][0]
        assert stats["inference_stats"]["success"]["count"] == 16
        with pytest.raises(utils.InferenceServerException, match="unknown model: 'nobody' is not found") as caught:
            client.infer("nobody", inputs_of(http, 1, True))
        assert caught.value.status() == "404"
        with pytest.raises(utils.InferenceServerException, match="no output 'z'"):
            client.infer("affine", inputs_of(http, 1, True), outputs=[http.InferRequestedOutput("z")])


@pytest.mark.parametrize("coding", [None, "gzip", "deflate"])
def test_aio_infer(server, http, coding):
    aio = importlib.import_module("tritonclient.http.aio")

    async def main():
        async with aio.InferenceServerClient(server.url.removeprefix("http://")) as client:
            assert await client.is_server_ready()
            assert (await client.get_model_metadata("affine"))["name"] == "affine"

            async def one(rows, binary):
                result = await client.infer(
                    "affine",
                    inputs_of(http, rows, binary),
                    request_compression_algorithm=coding,
                    response_compression_algorithm=coding,
                )
                check(result, rows)

            await asyncio.gather(*(one(rows, rows % 2 == 0) for rows in range(1, 60)))
            await one(100, True)

    asyncio.run(main())
    assert counted(server).requests == 60
    assert counted(server).batch_rows.count < 60 * 61 / 2 / 2


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint64", "int8", "int16", "int64", "float16", "float64"])
def test_every_dtype_of_numpy_round_trips(make_server, http, dtype):
    utils = importlib.import_module("tritonclient.utils")
    server = make_server(Identity(dtype))
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype)
    given = http.InferInput("x", [2, 3], utils.np_to_triton_dtype(array.dtype))
    given.set_data_from_numpy(array)
    with http.InferenceServerClient(server.url.removeprefix("http://")) as client:
        got = client.infer("identity", [given]).as_numpy("y")
    assert got.dtype == array.dtype
    np.testing.assert_array_equal(got, array)


def test_a_client_gets_503_while_the_queue_is_full(make_server, http):
    utils = importlib.import_module("tritonclient.utils")
    affine = Affine()
    server = make_server(affine, max_queue_rows=8)
    affine.gate.clear()
    affine.running.clear()
    with http.InferenceServerClient(server.url.removeprefix("http://"), concurrency=8) as client:
        # A refusal while others wait: one runs, one fills the queue, the third is too many.
        handles = [client.async_infer("affine", inputs_of(http, 8, True)) for _ in range(3)]
        # Asked for on eight connections, so which of the three is refused is open.
        errors, waiting = [], list(handles)
        while waiting:
            handle = waiting.pop(0)
            try:
                handle.get_result(timeout=0.2)
            except utils.InferenceServerException as error:
                if error.status() is None:  # no answer yet
                    waiting.append(handle)
                else:
                    errors.append((error.status(), error.message()))
                    affine.gate.set()
    assert errors == [("503", "the queue is full")]


@pytest.fixture(params=["sync", "aio"])
def ask(request, http):
    """Calls a method of either client, each time from a client of its own."""
    if request.param == "sync":

        def call(server, method, *args, **kwargs):
            with http.InferenceServerClient(server.url.removeprefix("http://")) as client:
                return getattr(client, method)(*args, **kwargs)

        return call
    aio = importlib.import_module("tritonclient.http.aio")

    def call_aio(server, method, *args, **kwargs):
        async def main():
            async with aio.InferenceServerClient(server.url.removeprefix("http://")) as client:
                return await getattr(client, method)(*args, **kwargs)

        return asyncio.run(main())

    return call_aio


@pytest.mark.parametrize("request_coding", [None, "gzip", "deflate"])
@pytest.mark.parametrize("response_coding", [None, "gzip", "deflate"])
def test_infer_with_every_option_at_once(server, http, ask, request_coding, response_coding):
    for rows in (1, 100):
        result = ask(
            server,
            "infer",
            "affine",
            inputs_of(http, rows, binary=True),
            model_version="3",
            outputs=[http.InferRequestedOutput("twice", binary_data=False), http.InferRequestedOutput("y")],
            request_id="é/1",
            priority=1,
            timeout=20_000_000,
            headers={"X-Thing": "1", "traceparent": "00-" + "1" * 32 + "-" + "2" * 16 + "-01"},
            query_params={"a": 1, "b": ["x", "y z"]},
            request_compression_algorithm=request_coding,
            response_compression_algorithm=response_coding,
            parameters={"custom": "text", "count": 3, "share": 0.5, "flag": True},
        )
        check(result, rows)
        response = result.get_response()
        assert (response["id"], response["model_name"], response["model_version"]) == ("é/1", "affine", "3")
        assert [output["name"] for output in response["outputs"]] == ["twice", "y"]


def test_everything_that_can_be_asked_of_a_server(server, ask):
    options = {"headers": {"X-Thing": "1"}, "query_params": {"a": 1}}
    assert ask(server, "is_server_live", **options)
    assert ask(server, "is_server_ready", **options)
    assert ask(server, "is_model_ready", "affine", **options)
    assert ask(server, "is_model_ready", "affine", "3", **options)
    assert not ask(server, "is_model_ready", "other", **options)
    extensions = ask(server, "get_server_metadata", **options)["extensions"]
    assert {"binary_tensor_data", "classification", "statistics", "model_configuration"} <= set(extensions)
    assert not {"system_shared_memory", "cuda_shared_memory", "sequence", "model_repository"} & set(extensions)
    for version in ("", "3"):
        assert ask(server, "get_model_metadata", "affine", version, **options)["versions"] == ["3"]
        assert ask(server, "get_model_config", "affine", version, **options)["input"][1]["dims"] == []
        (stats,) = ask(server, "get_inference_statistics", "affine", version, **options)["model_stats"]
        assert (stats["name"], stats["version"]) == ("affine", "3")
    assert len(ask(server, "get_inference_statistics", **options)["model_stats"]) == 1
    index = ask(server, "get_model_repository_index", **options)
    assert index == [{"name": "affine", "version": "3", "state": "READY"}]
    assert ask(server, "get_log_settings", **options)["log_error"] is True
    for name in (None, "affine"):
        assert ask(server, "get_trace_settings", name, **options)["trace_level"] == ["OFF"]


@pytest.mark.parametrize(
    ("method", "args", "status", "says"),
    [
        ("load_model", ("affine",), "501", "cannot be loaded or unloaded"),
        ("unload_model", ("affine",), "501", "cannot be loaded or unloaded"),
        ("update_log_settings", ({"log_info": False},), "405", "settings cannot be changed"),
        ("update_trace_settings", ("affine", {"trace_rate": "1"}), "405", "settings cannot be changed"),
        ("update_trace_settings", (None, {"trace_rate": "1"}), "405", "settings cannot be changed"),
        ("get_system_shared_memory_status", (), "501", "shared memory"),
        ("get_system_shared_memory_status", ("region",), "501", "shared memory"),
        ("register_system_shared_memory", ("region", "/key", 64), "501", "shared memory"),
        ("unregister_system_shared_memory", ("region",), "501", "shared memory"),
        ("unregister_system_shared_memory", (), "501", "shared memory"),
        ("get_cuda_shared_memory_status", (), "501", "shared memory"),
        ("register_cuda_shared_memory", ("region", b"aGFuZGxl", 0, 64), "501", "shared memory"),
        ("unregister_cuda_shared_memory", (), "501", "shared memory"),
        ("get_model_metadata", ("nobody",), "404", "unknown model: 'nobody'"),
        ("get_model_config", ("affine", "9"), "404", "version '9' is not found"),
        ("get_inference_statistics", ("a b",), "404", "unknown model: 'a b'"),
    ],
)
def test_what_is_not_there_is_an_error_of_the_server_and_not_one_of_decoding(server, ask, method, args, status, says):
    utils = importlib.import_module("tritonclient.utils")
    with pytest.raises(utils.InferenceServerException, match=says) as caught:
        ask(server, method, *args)
    assert caught.value.status() == status


def test_shared_memory_and_sequences_in_a_request_are_refused(server, http, ask):
    utils = importlib.import_module("tritonclient.utils")
    shared = inputs_of(http, 1, binary=True)
    shared[0].set_shared_memory("region", 16)
    output = http.InferRequestedOutput("y")
    output.set_shared_memory("region", 16)
    for inputs, options, says in (
        (shared, {}, "shared memory is not supported"),
        (inputs_of(http, 1, binary=True), {"outputs": [output]}, "shared memory is not supported"),
        (inputs_of(http, 1, binary=True), {"sequence_id": 5, "sequence_start": True}, "no sequences"),
        (inputs_of(http, 1, binary=True), {"sequence_id": "five"}, "no sequences"),
    ):
        with pytest.raises(utils.InferenceServerException, match=says) as caught:
            ask(server, "infer", "affine", inputs, **options)
        assert caught.value.status() == "400"


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(("count", "kept"), [(1, 1), (3, 3), (9, 4)])
def test_classification(server, http, ask, binary, count, kept):
    wanted = [http.InferRequestedOutput("y", binary_data=binary, class_count=count), http.InferRequestedOutput("twice")]
    result = ask(server, "infer", "affine", inputs_of(http, 8, binary=True), outputs=wanted)
    found = result.as_numpy("y")
    assert (found.shape, result.get_output("y")["datatype"]) == ((8, kept), "BYTES")
    y = 2 * X[:8] + N[:8, None].astype(np.float32)
    for row, texts in zip(y, found, strict=True):
        expected = [f"{row[index]}:{index}" for index in np.argsort(-row, kind="stable")[:kept]]
        assert [text.decode() if isinstance(text, bytes) else text for text in texts] == expected
    np.testing.assert_array_equal(result.as_numpy("twice"), 2 * N[:8])


def test_bfloat16_goes_as_binary_only(make_server, http, ask):
    utils = importlib.import_module("tritonclient.utils")
    server = make_server(Identity("bfloat16"))
    # float32 in older clients, ml_dtypes' own in newer ones; these numbers are the same in both.
    array = np.array([[1.5, -2.0, 3.25], [0.0, 2.0**100, -0.0]]).astype(utils.triton_to_np_dtype("BF16"))
    given = http.InferInput("x", [2, 3], "BF16")
    given.set_data_from_numpy(array)
    result = ask(server, "infer", "identity", [given])
    np.testing.assert_array_equal(result.as_numpy("y").astype(np.float32), array.astype(np.float32))
    with pytest.raises(utils.InferenceServerException, match="BF16, which JSON cannot carry; ask for binary_data"):
        ask(server, "infer", "identity", [given], outputs=[http.InferRequestedOutput("y", binary_data=False)])
    top = [http.InferRequestedOutput("y", binary_data=False, class_count=1)]
    classes = ask(server, "infer", "identity", [given], outputs=top).as_numpy("y")
    assert [text.split(":")[1] for text in classes.ravel()] == ["2", "1"]


def test_strings_for_a_model_of_numbers_are_refused(server, http, ask):
    utils = importlib.import_module("tritonclient.utils")
    for binary in (True, False):
        inputs = inputs_of(http, 1, binary=True)
        inputs[0] = http.InferInput("x", [1, 4], "BYTES")
        inputs[0].set_data_from_numpy(np.array([[b"1", b"2", b"3", b"4"]], np.object_), binary_data=binary)
        with pytest.raises(utils.InferenceServerException, match="datatype is 'BYTES'; the model takes FP32"):
            ask(server, "infer", "affine", inputs)


def test_inputs_are_reused_with_other_data_other_shapes_and_other_forms(server, http, ask):
    inputs = inputs_of(http, 1, binary=True)
    for rows in (1, 5, 2):
        for binary in (True, False, True):
            inputs[0].set_shape([rows, 4]).set_data_from_numpy(X[:rows], binary_data=binary)
            inputs[1].set_shape([rows]).set_data_from_numpy(N[:rows], binary_data=not binary)
            check(ask(server, "infer", "affine", inputs), rows)


def test_bodies_made_and_read_by_the_client_without_its_transport(server, http):
    body, size = http.InferenceServerClient.generate_request_body(inputs_of(http, 2, binary=True), request_id="7")
    headers = {"Inference-Header-Content-Length": str(size)}
    status, answered, answer = exchange(server, "POST", "/v2/models/affine/infer", body, headers)
    assert status == 200
    length = int(answered["inference-header-content-length"])
    check(http.InferenceServerClient.parse_response_body(answer, header_length=length), 2)


def test_nan_and_infinity_travel_as_binary_and_are_refused_in_json(make_server, http, ask):
    utils = importlib.import_module("tritonclient.utils")
    server = make_server(Identity())
    array = np.array([[np.nan, np.inf, -np.inf]], np.float32)
    given = http.InferInput("x", [1, 3], "FP32")
    given.set_data_from_numpy(array)
    np.testing.assert_array_equal(ask(server, "infer", "identity", [given]).as_numpy("y"), array)
    with pytest.raises(utils.InferenceServerException, match="NaN or infinity, which JSON cannot carry") as caught:
        ask(server, "infer", "identity", [given], outputs=[http.InferRequestedOutput("y", binary_data=False)])
    assert caught.value.status() == "400"
    # In JSON the client writes bare words, which are none.
    given.set_data_from_numpy(array, binary_data=False)
    with pytest.raises(utils.InferenceServerException, match="not a valid inference request") as caught:
        ask(server, "infer", "identity", [given])
    assert caught.value.status() == "400"


def test_priorities_and_timeouts_that_are_none_are_refused(server, http, ask):
    utils = importlib.import_module("tritonclient.utils")
    for option in ({"timeout": -1}, {"timeout": 1.5}, {"priority": -1}):
        with pytest.raises(utils.InferenceServerException, match="must be a whole number"):
            ask(server, "infer", "affine", inputs_of(http, 1, binary=True), **option)
