"""NVIDIA's own client, sync and asyncio, unmodified, against a running server."""

import asyncio

import numpy as np
import pytest
from serve_fakes import Affine, Identity

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
    return pytest.importorskip("tritonclient.http")


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
    utils = pytest.importorskip("tritonclient.utils")
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
    aio = pytest.importorskip("tritonclient.http.aio")

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
    assert server.metrics.requests == 60
    assert server.metrics.batch_rows.count < 60 * 61 / 2 / 4


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint64", "int8", "int16", "int64", "float16", "float64"])
def test_every_dtype_of_numpy_round_trips(make_server, http, dtype):
    utils = pytest.importorskip("tritonclient.utils")
    server = make_server(Identity(dtype))
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype)
    given = http.InferInput("x", [2, 3], utils.np_to_triton_dtype(array.dtype))
    given.set_data_from_numpy(array)
    with http.InferenceServerClient(server.url.removeprefix("http://")) as client:
        got = client.infer("identity", [given]).as_numpy("y")
    assert got.dtype == array.dtype
    np.testing.assert_array_equal(got, array)


def test_a_client_gets_503_while_the_queue_is_full(make_server, http):
    utils = pytest.importorskip("tritonclient.utils")
    affine = Affine()
    server = make_server(affine, max_queue_rows=8)
    affine.gate.clear()
    affine.running.clear()
    with http.InferenceServerClient(server.url.removeprefix("http://"), concurrency=8) as client:
        # A refusal while others wait: one runs, one fills the queue, the third is too many.
        handles = [client.async_infer("affine", inputs_of(http, 8, True)) for _ in range(3)]
        # Asked for on eight connections, so which of the three is refused is open; the first error says.
        errors = []
        for handle in reversed(handles):
            try:
                handle.get_result(timeout=5)
            except utils.InferenceServerException as error:
                errors.append((error.status(), error.message()))
                affine.gate.set()
    assert errors == [("503", "the queue is full")]
