"""KServe's own REST client, unmodified, against a running server.

The package is no dependency of development: it needs psutil below 6 and protobuf below 7, and brings 300 MB of others
(pandas, kubernetes, grpc). To run this beside what is installed:

    uv pip install --target /tmp/kserve kserve
    PYTHONPATH=/tmp/kserve python -m pytest tests/serve/test_kserve.py
"""

import asyncio

import numpy as np
import pytest
from serve_fakes import Identity

client_module = pytest.importorskip("kserve.inference_client", exc_type=ImportError)
kserve = pytest.importorskip("kserve", exc_type=ImportError)
infer_type = pytest.importorskip("kserve.protocol.infer_type", exc_type=ImportError)

X = np.arange(32, dtype=np.float32).reshape(8, 4)
N = np.arange(8, dtype=np.int32)


def request_of(rows, binary, *, binary_output=None, outputs=None):
    x = kserve.InferInput("x", [rows, 4], "FP32")
    n = kserve.InferInput("n", [rows], "INT32")
    x.set_data_from_numpy(X[:rows], binary_data=binary)
    n.set_data_from_numpy(N[:rows], binary_data=binary)
    parameters = None if binary_output is None else {"binary_data_output": binary_output}
    wanted = None
    if outputs is not None:
        wanted = [infer_type.RequestedOutput(name, {"binary_data": flag}) for name, flag in outputs.items()]
    return kserve.InferRequest("affine", [x, n], parameters=parameters, request_outputs=wanted)


def check(answer, rows):
    outputs = {output.name: output.as_numpy() for output in answer.outputs}
    np.testing.assert_array_equal(outputs["y"].reshape(rows, 4), 2 * X[:rows] + N[:rows, None].astype(np.float32))
    np.testing.assert_array_equal(outputs["twice"].reshape(rows), 2 * N[:rows])


def ask(server, work):
    async def main():
        async with client_module.InferenceRESTClient(client_module.RESTConfig(protocol="v2")) as client:
            return await work(client)

    return asyncio.run(main())


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("wanted", [{}, {"binary_output": True}, {"outputs": {"twice": True, "y": False}}])
def test_infer(server, binary, wanted):
    async def work(client):
        for rows in (1, 8):
            check(await client.infer(server.url, request_of(rows, binary, **wanted), model_name="affine"), rows)

    ask(server, work)


def test_a_request_as_a_dict_of_nulls(server):
    """What `InferInput.to_dict` gives."""
    inputs = [entry.to_dict() for entry in request_of(2, False).inputs]
    body = {"id": None, "parameters": None, "outputs": None, "inputs": inputs}

    async def work(client):
        check(await client.infer(server.url, body, model_name="affine"), 2)

    ask(server, work)


def test_health_and_errors(server):
    async def work(client):
        assert await client.is_server_live(server.url)
        assert await client.is_server_ready(server.url)
        assert await client.is_model_ready(server.url, "affine")
        assert not await client.is_model_ready(server.url, "nobody")
        with pytest.raises(Exception, match="Request for unknown model: 'nobody' is not found, '404 Not Found'"):
            await client.infer(server.url, request_of(1, True), model_name="nobody")

    ask(server, work)


def test_half_precision_goes_as_binary(make_server):
    server = make_server(Identity("float16"))
    given = kserve.InferInput("x", [1, 3], "FP16")
    array = np.array([[1.5, -2.0, 3.25]], np.float16)
    given.set_data_from_numpy(array, binary_data=True)
    request = kserve.InferRequest("identity", [given], parameters={"binary_data_output": True})

    async def work(client):
        answer = await client.infer(server.url, request, model_name="identity")
        np.testing.assert_array_equal(answer.outputs[0].as_numpy(), array)

    ask(server, work)
