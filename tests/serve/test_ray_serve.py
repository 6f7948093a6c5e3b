"""The Ray Serve application, where the extra `ray` is installed: two replicas, right answers, throughput printed."""

import asyncio
import time

import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.errors import ServeError
from lepton_xla.serve import AsyncClient, Client, Options, Server
from lepton_xla.serve.ray import application


@pytest.mark.parametrize(
    ("args", "part"),
    [
        ({}, "missing required field `artifact`"),
        ({"artifact": "a", "replica": 2}, "unknown field `replica`"),
        ({"artifact": "a", "replicas": "two"}, "replicas"),
        ({"artifact": "a", "replicas": "0"}, r"Expected `int` >= 1 - at `\$.replicas`"),
        ({"artifact": "a", "cpus": "nan"}, "cpus"),
        ({"artifact": "a", "max_ongoing_requests": -1}, "max_ongoing_requests"),
    ],
)
def test_arguments_that_it_does_not_take(args, part):
    with pytest.raises(ServeError, match=part):
        application(args)


def throughput(url, x, seconds=4.0):
    """Answers a second to 32 clients at once."""

    async def main():
        async with AsyncClient(url, model="m", timeout_s=60) as client:
            until = time.monotonic() + seconds

            async def ask():
                count = 0
                while time.monotonic() < until:
                    await client.infer(x=x)
                    count += 1
                return count

            await client.infer(x=x)
            return sum(await asyncio.gather(*(ask() for _ in range(32)))) / seconds

    return asyncio.run(main())


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.filterwarnings("ignore")
def test_two_replicas_answer_as_the_server_does(tmp_path, capsys):
    pytest.importorskip("ray", reason="needs the extra ray")
    ray_serve = pytest.importorskip("ray.serve", reason="needs the extra ray")
    import ray

    weights = {"w": np.random.default_rng(0).standard_normal((784, 10)).astype(np.float32)}
    program = lx.trace(lambda w, x: {"y": x @ w["w"]}, weights, {"x": lx.TensorSpec(("batch", 784), "float32")})
    lx.compile(program, {"batch": (1, 8, 32)}, name="m").save(tmp_path / "m.lepton")
    x = np.random.default_rng(1).standard_normal((1, 784)).astype(np.float32)
    with Server(lx.load(tmp_path / "m.lepton"), Options(port=0)) as server:
        bare = throughput(server.url, x)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        ray_serve.start(http_options={"host": "127.0.0.1", "port": 8123})
        ray_serve.run(application({"artifact": str(tmp_path / "m.lepton"), "replicas": "2"}), route_prefix="/")
        status = ray_serve.status().applications["default"].deployments["lepton"]
        assert status.replica_states == {"RUNNING": 2}
        url = "http://127.0.0.1:8123"
        with Client(url, model="m", timeout_s=60) as client:
            np.testing.assert_allclose(client.infer(x=x)["y"], x @ weights["w"], atol=1e-3)
            assert client.metadata()["inputs"][0]["shape"] == [-1, 784]
            assert client.ready()
            assert client.ready("m")
            assert not client.ready("other")
        with Client(url, model="m", binary=False) as client:
            np.testing.assert_allclose(client.infer(x=x)["y"], x @ weights["w"], atol=1e-3)
        through_ray = throughput(url, x)
    finally:
        ray_serve.shutdown()
        ray.shutdown()
    with capsys.disabled():
        print(f"\n32 clients, 784 floats: {bare:.0f} requests/s bare, {through_ray:.0f} through Ray Serve (2 replicas)")  # noqa: T201
    assert through_ray > 10
