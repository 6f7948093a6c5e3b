import time

import click
import pytest

from lepton_xla.cli import _common


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (512, "512 B"), (999, "999 B"), (1000, "1.00 kB"), (46_000, "46.0 kB"), (345_600, "346 kB"),
     (999_499, "999 kB"), (999_999, "1.00 MB"), (8_300_000, "8.30 MB"), (2.5e15, "2.50 PB")],
)  # fmt: skip
def test_sizes(number, text):
    assert _common.size(number) == text


@pytest.mark.parametrize(
    ("value_s", "text"), [(3.1e-6, "3.1 us"), (0.00099, "990.0 us"), (0.0451, "45.1 ms"), (12.34, "12.3 s")]
)
def test_seconds(value_s, text):
    assert _common.seconds(value_s) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [("800000", 800_000), ("12 B", 12), ("2MB", 2_000_000), ("1.5 MiB", 1_572_864), ("3k", 3000), ("4Gi", 2**32),
     ("512mib", 2**29), ("1TB", 10**12)],
)  # fmt: skip
def test_numbers_of_bytes(text, count):
    option = click.Option(["--memory"])
    assert _common.parse_bytes(click.Context(click.Command("serve")), option, text) == count


@pytest.mark.parametrize("text", ["0", "0.5", "2 apples", "-1", "1e6", "1XB", "MB", "", "9" * 400, "9" * 5000,
                                  "99999999999T", "٣"])  # fmt: skip
def test_what_is_no_number_of_bytes_is_refused(text):
    with pytest.raises(click.BadParameter, match=f"{text!r}: expected bytes, such as 800000, 2MB or 4GiB"):
        _common.parse_bytes(click.Context(click.Command("serve")), click.Option(["--memory"]), text)


@pytest.mark.parametrize("text", ["0", "1e6", "2.5X", "-1", "", "9" * 400, "99999999999T"])
def test_what_is_no_number_of_operations_is_refused(text):
    with pytest.raises(click.BadParameter, match=f"{text!r}: expected multiply-adds"):
        _common.parse_operations(click.Context(click.Command("tune")), click.Option(["--max-operations"]), text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("10s", 10.0), ("2 m", 120.0), ("1.5h", 5400.0), ("7d", 604_800.0), ("3", 3.0)],
)
def test_durations(text, seconds):
    assert _common.duration(text, "--wait") == seconds


@pytest.mark.parametrize("text", ["", "soon", "-1s", "1e3s", "10 apples", "nan", "2y", "400d", "9" * 400 + "s"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(click.UsageError, match=f"--wait {text!r}: expected a duration such as 10s, 2m or 1h"):
        _common.duration(text, "--wait")


def test_buckets_ascend_without_repeats():
    assert _common.parse_buckets(["batch=32,1,8,8", "seq= 128"]) == {"batch": (1, 8, 32), "seq": (128,)}


def test_json_holds_no_nan(capsys):
    _common.print_json({"a": float("nan"), "b": (1, float("inf")), "c": {"d": 0.5}})
    assert (
        capsys.readouterr().out == '{\n  "a": null,\n  "b": [\n    1,\n    null\n  ],\n  "c": {\n    "d": 0.5\n  }\n}\n'
    )


def test_text_from_a_file_cannot_steer_the_terminal(capsys):
    _common.show(_common.table("t\x1b[2J", ("a",), [("x\x1b]0;title\x07\n[red]y",)]), "z\x1b[2J")
    out = capsys.readouterr().out
    assert not set(out) & {"\x1b", "\x07"}
    assert "[red]y" in out


def test_metrics_side_by_side():
    rows = _common.metric_rows({"a": 0.5, "b": 1.0}, {"a": 0.25, "c": 2.0})
    assert rows == [("a", "0.5", "0.25", "-0.25"), ("b", "1", "", ""), ("c", "", "2", "")]


def test_progress_off_a_terminal_tells_what_takes_long(capsys, monkeypatch):
    monkeypatch.setattr(_common, "_NOTICEABLE_S", 0.05)
    with _common.progress() as step:
        step("quick")
        step("slow", 1, 3)
        deadline = time.monotonic() + 10
        err = ""
        while "slow" not in err and time.monotonic() < deadline:
            time.sleep(0.01)
            err += capsys.readouterr().err
    captured = capsys.readouterr()
    assert err + captured.err == "... slow (2 of 3)\n"
    assert captured.out == ""


def test_progress_off_a_terminal_is_silent_when_all_is_quick(capsys):
    with _common.progress() as step:
        step("quick")
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_cleans_up_after_itself(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with _common.progress() as step:
        step("slow [red]", 0, 2)
    captured = capsys.readouterr()
    assert "slow [red] (1 of 2)" in captured.err
    assert "\x1b[" in captured.err
    assert captured.out == ""
