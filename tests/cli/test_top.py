"""`leptonx top`: from two scrapes to a table, and from a real server."""

import json
import time
import types

import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.cli.top import figures_of, rows_of
from lepton_xla.serve import Client, Options, Server

BEFORE = """
lepton_inference_requests_total{model="a",version="1"} 100
lepton_compute_seconds_sum{model="a",version="1"} 1.0
lepton_request_seconds_bucket{le="0.001",model="a",version="1"} 100
lepton_request_seconds_bucket{le="0.01",model="a",version="1"} 100
lepton_request_seconds_bucket{le="+Inf",model="a",version="1"} 100
"""
AFTER = """
lepton_inference_requests_total{model="a",version="1"} 300
lepton_compute_seconds_sum{model="a",version="1"} 2.0
lepton_request_seconds_bucket{le="0.001",model="a",version="1"} 290
lepton_request_seconds_bucket{le="0.01",model="a",version="1"} 299
lepton_request_seconds_bucket{le="+Inf",model="a",version="1"} 300
lepton_model_ready{model="a",version="1"} 1
lepton_model_bytes{model="a",version="1"} 2e6
lepton_queue_rows{model="a",version="1"} 7
lepton_model_devices{device="3",model="a",version="1"} 1
lepton_model_devices{device="0",model="a",version="1"} 2
"""


def test_what_is_no_scrape_and_what_is_no_number():
    with pytest.raises(lx.ServeError, match="what /metrics says is not in Prometheus' format"):
        figures_of("<html>no</html>")
    for series in ('request_seconds_bucket{le="soon",', "request_seconds_bucket{", 'model_devices{device="cpu",'):
        with pytest.raises(lx.ServeError, match="what /metrics says is not in Prometheus' format"):
            figures_of(f'lepton_{series}model="a",version="1"}} 1')
    odd = figures_of('lepton_model_bytes{model="a",version="1"} +Inf\nlepton_queue_rows{model="a",version="1"} NaN')
    assert rows_of({}, odd, 1.0, {}) == []


def test_rates_are_those_between_two_scrapes():
    # 200 requests in 4 s, of which 190 within 1 ms and 199 within 10; a second of the device in four.
    (row, other) = rows_of(figures_of(BEFORE), figures_of(AFTER), 4.0, {("b", "2"): "LOADING"})
    assert row == {
        "model": "a", "version": "1", "state": "READY", "devices": [0, 3], "bytes": 2_000_000,
        "requests_per_s": 50.0, "p50_s": 0.001, "p99_s": 0.01, "queue_rows": 7, "device_share": 0.25,
    }  # fmt: skip
    assert (other["model"], other["state"], other["requests_per_s"], other["p99_s"]) == ("b", "LOADING", 0.0, None)


def test_a_server_that_started_anew_has_no_negative_rates():
    (row,) = rows_of(figures_of(AFTER), figures_of(BEFORE), 1.0, {})
    assert (row["requests_per_s"], row["device_share"], row["state"]) == (0.0, 0.0, "UNAVAILABLE")


@pytest.mark.parametrize("as_json", [True, False])
def test_a_real_server_until_ctrl_c(cli, as_json, monkeypatch):
    def sleep(seconds):
        if next(left, None) is None:
            raise KeyboardInterrupt

    left = iter(range(2))
    monkeypatch.setattr("lepton_xla.cli.top.time", types.SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    program = lx.trace(lambda w, x: x @ w, np.eye(4, dtype=np.float32), {"x": lx.TensorSpec(("batch", 4), "float32")})
    with Server(lx.compile(program, {"batch": (1,)}, name="tiny").servable(), Options(port=0)) as server:
        with Client(server.url) as client:
            client.infer("tiny", x=np.ones((1, 4), np.float32))
        flags = ["--json"] if as_json else []
        once, result = cli("top", server.url, "--once", *flags), cli("top", server.url, *flags)
    assert (once.exit_code, result.exit_code, result.stderr) == (0, 0, "")
    assert result.output.splitlines()[0] == once.output.splitlines()[0]
    if as_json:
        (row,) = json.loads(result.output)["models"]
        assert (row["model"], row["state"], row["devices"]) == ("tiny", "READY", [0])
        assert row["bytes"] >= 64
    else:
        assert "ready" in once.output
        assert result.output.count("tiny") == 1


def test_nobody_there_is_one_line(cli):
    assert "127.0.0.1:1" in cli.refused("top", "http://127.0.0.1:1", "--once")
