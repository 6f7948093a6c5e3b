"""Progress of a process, written to a file and read by another."""

import time

import pytest

from lepton_xla.launch import heartbeat
from lepton_xla.launch.heartbeat import Beat, Heartbeat


def test_the_last_beat_is_read(tmp_path):
    path = tmp_path / "rank"
    heart = Heartbeat(path)
    assert Heartbeat.read(path) is None
    heart.beat(1234567890, "evaluate")
    heart.beat(7, "step")  # a shorter record leaves nothing of a longer one
    assert Heartbeat.read(path) == Beat(7, 7, "step")
    heart.beat(9, "step")
    assert Heartbeat.read(path) == Beat(9, 7, "step")


def test_the_first_step_is_that_of_the_phase_step(tmp_path):
    heart = Heartbeat(tmp_path / "rank")
    heart.beat(0, "start")
    assert Heartbeat.read(tmp_path / "rank") == Beat(0, -1, "start")
    heart.beat(500, "compile")
    heart.beat(500, "step")
    heart.beat(501, "save")
    assert Heartbeat.read(tmp_path / "rank") == Beat(501, 500, "save")


def test_a_file_that_cannot_be_written_does_not_stop_training(tmp_path, caplog):
    heart = Heartbeat(tmp_path / "gone" / "rank")
    heart.beat(1, "step")
    heart.beat(2, "save")
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/gone/rank cannot be written: No such file or directory; the watchdog hears nothing more"
    ]


@pytest.mark.parametrize("text", ["", "1 2", "a b c", "1 2 step more"])
def test_what_is_no_beat_is_none(tmp_path, text):
    (tmp_path / "rank").write_text(text)
    assert Heartbeat.read(tmp_path / "rank") is None


def test_the_variable_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv(heartbeat.FILE_VARIABLE, str(tmp_path / "rank"))
    heartbeat._own.cache_clear()
    try:
        heartbeat.beat(3, "step")
    finally:
        heartbeat._own.cache_clear()
    assert Heartbeat.read(tmp_path / "rank") == Beat(3, 3, "step")


def test_a_beat_is_cheap(tmp_path):
    heart = Heartbeat(tmp_path / "rank")
    least = min(_timed(heart) for _ in range(20))
    assert least < 25e-6  # half a percent of a step of 5 ms; measured: 2 us


def _timed(heart):
    began = time.perf_counter()
    for step in range(1000):
        heart.beat(step, "step")
    return (time.perf_counter() - began) / 1000
