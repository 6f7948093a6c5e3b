"""The audit log: lines that were acknowledged stay, in order, whatever else goes wrong."""

import errno
import json
import os
import stat
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_xla.errors import ServeError
from lepton_xla.serve.observe.audit import Audit

SECRET = "leptonx_" + "a1-_" * 11


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit.jsonl"


def numbers(audit, n=10_000):
    return [entry.details["n"] for entry in audit.tail(n)]


def test_what_is_recorded(path):
    audit = Audit(path, clock=lambda: 1_790_000_000.125)
    audit.record("ci", "load", "digits/3", "done", address="10.0.0.7", digest="ab12", bytes=7, alpha=0.5, kept=True)
    assert json.loads(path.read_text()) == {
        "time": "2026-09-21T14:13:20.125+00:00",
        "who": "ci",
        "action": "load",
        "target": "digits/3",
        "outcome": "done",
        "details": {"address": "10.0.0.7", "digest": "ab12", "bytes": 7, "alpha": 0.5, "kept": True},
    }
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_latest_come_last(path):
    audit = Audit(path)
    assert audit.tail(5) == []
    for n in range(7):
        audit.record("ci", "load", "digits", "done", n=n)
    assert numbers(audit, 3) == [4, 5, 6]
    assert numbers(audit) == list(range(7))
    assert audit.tail(0) == audit.tail(-1) == []


def test_full_files_are_kept_and_the_oldest_goes(path):
    audit = Audit(path, max_bytes=1000, kept_files=2)
    for n in range(60):
        audit.record("ci", "load", "digits", "done", n=n)
    files = sorted(path.parent.iterdir())
    assert [file.name for file in files] == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    assert all(file.stat().st_size <= 1000 for file in files)
    found = numbers(audit)
    assert found == list(range(60 - len(found), 60))
    assert len(found) > 16  # three files of seven or eight lines
    assert numbers(audit, 12) == list(range(48, 60))  # across files


def test_no_full_file_is_kept(path):
    audit = Audit(path, max_bytes=300, kept_files=0)
    for n in range(10):
        audit.record("ci", "load", "digits", "done", n=n)
    assert os.listdir(path.parent) == [path.name]
    assert numbers(audit)[-1] == 9


def test_reads_files_larger_than_a_block(path):
    audit = Audit(path)
    for n in range(300):
        audit.record("ci", "load", "digits", "done", n=n, reason="x" * 500)
    assert path.stat().st_size > 2 * 64 << 10
    assert numbers(audit) == list(range(300))


@pytest.mark.parametrize("cut", [1, 30, 60])
def test_a_line_that_was_cut_short_costs_only_itself(path, cut):
    audit = Audit(path)
    for n in range(3):
        audit.record("ci", "load", "digits", "done", n=n)
    os.truncate(path, path.stat().st_size - cut)
    audit.record("ci", "load", "digits", "done", n=3)
    # A line that lacks nothing but its end is whole.
    assert numbers(audit) == ([0, 1, 2, 3] if cut == 1 else [0, 1, 3])


@pytest.mark.parametrize("failing", ["write", "short", "fsync"])
def test_a_full_disk_is_an_error_and_leaves_the_file_as_it_was(path, monkeypatch, failing):
    audit = Audit(path)
    audit.record("ci", "load", "digits", "done", n=0)
    before, write = path.read_bytes(), os.write

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, *(("fsync", full) if failing == "fsync" else ("write", full)))
        if failing == "short":
            patched.setattr(os, "write", lambda file, data: write(file, data[:20]))
        with pytest.raises(ServeError, match=r"audit\.jsonl cannot be used: (No space left|only 20 of)"):
            audit.record("ci", "load", "digits", "done", n=1)
    assert path.read_bytes() == before
    audit.record("ci", "load", "digits", "done", n=2)
    assert numbers(audit) == [0, 2]


@pytest.mark.parametrize("name", ["missing/audit.jsonl", ".", "a\0b"])
def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path, name):
    with pytest.raises(ServeError):
        Audit(tmp_path / name)


def test_no_secret_is_written(path):
    audit = Audit(path)
    audit.record(SECRET, f"load {SECRET}", f"{SECRET}/1", SECRET, reason=f"{'x' * 505}{SECRET}", **{SECRET: SECRET})
    text = path.read_text()
    assert SECRET not in text
    assert "a1-_" not in text


def test_a_line_is_bounded(path):
    audit = Audit(path)
    audit.record("w" * 10**6, "a", "t", "o", **{f"key{n}": "\0" * 10**5 for n in range(100)})
    assert path.stat().st_size < 33 << 10
    assert audit.tail(1)[0].details == {"omitted": "too long"}


WRITER = """
import sys
from lepton_xla.serve.observe.audit import Audit

audit = Audit(sys.argv[1], max_bytes=4000, kept_files=100)
for n in range(40):
    audit.record(f"worker {sys.argv[2]}", "load", "digits", "done", n=n)
"""


def test_processes_share_a_file(path):
    workers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(worker)]) for worker in range(4)]
    assert [worker.wait() for worker in workers] == [0] * 4
    entries = Audit(path, kept_files=100).tail(1000)
    assert len(entries) == 160
    for worker in range(4):
        assert [each.details["n"] for each in entries if each.who == f"worker {worker}"] == list(range(40))


TEXTS = st.text(st.characters(), max_size=40)  # lone surrogates and control characters too


@given(st.lists(st.tuples(TEXTS, TEXTS, TEXTS, TEXTS, TEXTS), max_size=5))
def test_any_text_is_one_line(tmp_path_factory, given_entries):
    path = tmp_path_factory.mktemp("audit") / "audit.jsonl"
    audit = Audit(path)
    for who, action, target, outcome, reason in given_entries:
        audit.record(who, action, target, outcome, reason=reason)
    assert len(path.read_bytes().splitlines()) == len(given_entries)
    for entry, (who, *_, reason) in zip(audit.tail(9), given_entries, strict=True):
        for text, written in ((who, entry.who), (reason, entry.details["reason"])):
            assert written == text.encode("utf-8", "backslashreplace").decode()
