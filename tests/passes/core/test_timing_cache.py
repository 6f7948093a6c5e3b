"""The disk cache of measured times: hits, misses, and tolerance of every disk error."""

import dataclasses
import logging
import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.passes.core import timing_cache
from lepton_xla.passes.core.targets import Target
from lepton_xla.passes.core.timing import Timer, time_programs
from lepton_xla.passes.core.timing_cache import Times, TimingCache

INPUTS = [jax.ShapeDtypeStruct((3,), jnp.float32)]


def twice(w, x):
    return w * x * 2


def thrice(w, x):
    return w * x * 3


def timed(folder, functions=(twice, thrice), inputs=INPUTS, target=None):
    """A new timer, as a new process would have it, after it has timed these functions; and the times."""
    timer = Timer(target, TimingCache(folder))
    return timer, time_programs([(fn, jnp.ones(3)) for fn in functions], inputs, timer, 0.01)


def test_what_was_measured_is_not_measured_or_compiled_again(tmp_path, monkeypatch):
    first, times = timed(tmp_path)
    assert (first.measured, first.recalled) == (2, 0)
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)
    monkeypatch.setattr(Timer, "medians_us", None)
    second, again = timed(tmp_path)
    assert again == times
    assert (second.measured, second.recalled) == (0, 2)


def test_other_programs_and_targets_are_measured(tmp_path):
    here = Target.here()
    timed(tmp_path, target=here)
    others = [
        {"functions": (thrice, twice)},
        {"functions": (twice,)},
        {"inputs": [jax.ShapeDtypeStruct((1,), jnp.float32)]},
        {"inputs": [jax.ShapeDtypeStruct((3,), jnp.bfloat16)], "functions": (lambda w, x: w.astype(x.dtype) * x,)},
    ]
    for field in dataclasses.fields(Target):
        others.append({"target": dataclasses.replace(here, **{field.name: 99 if field.name == "cores" else "other"})})
    for other in others:
        timer, _ = timed(tmp_path, **other)
        assert timer.recalled == 0, other
    assert timed(tmp_path, target=here)[0].recalled == 2


def test_a_target_is_what_the_machine_and_the_process_are(monkeypatch):
    here = Target.here()
    assert here == Target.here()
    assert (here.platform, here.cores) == ("cpu", len(os.sched_getaffinity(0)))
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/x --xla_cpu_max_isa=AVX2")
    assert dataclasses.replace(here, xla_flags="--xla_cpu_max_isa=AVX2") == Target.here()


def test_optimizing_again_decides_the_same_without_measuring(tmp_path, monkeypatch):
    monkeypatch.setenv("LEPTON_CACHE", str(tmp_path))
    random = np.random.default_rng(0)
    weights = {name: jnp.asarray(random.normal(size=(48, 48)), jnp.float32) for name in "ab"}
    program = lx.trace(
        lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"], weights, {"x": lx.TensorSpec(("batch", 48), "float32")}
    )
    recipe = lx.Recipe.parse('[[quantize]]\nsites = ".*"', name="codes")
    first, second = (lx.optimize(program, recipe, buckets={"batch": (1, 4)}) for _ in range(2))
    counted = [next(each for each in small.history if each.name == "quantize").metrics for small in (first, second)]
    assert counted[0]["times"]["from the cache"] == 0
    assert counted[1]["times"] == {"measured": 0, "from the cache": counted[0]["times"]["measured"]}
    assert counted[1]["whole_program"] == counted[0]["whole_program"]
    sites = [[(site.site, site.action, site.reason) for site in small.history[-1].sites] for small in (first, second)]
    assert sites[0] == sites[1]
    for one, other in zip(*(jax.tree.leaves(small.weights) for small in (first, second)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[1.0, 2.0]",
        b'{"us": [1.0]}',
        b'{"us": [1.0, -2.0]}',
        b'{"us": [1.0, null]}',
        b'{"us": [1.0, 2.0], "more": 1}',
        b'{"us": [1.0, 2.0]' + b" " * 2**17 + b"}",
    ],
)
def test_a_damaged_file_is_told_of_and_replaced(tmp_path, caplog, content):
    timed(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        timer, times = timed(tmp_path)
    assert timer.measured == 2
    assert str(file) in caplog.text
    assert "measured again and replaced" in caplog.text
    again, recalled = timed(tmp_path)
    assert (again.recalled, recalled) == (2, times)


def test_a_result_that_is_not_finite_stays_so(tmp_path):
    cache = TimingCache(tmp_path)
    cache.put("a", Times([1.5, 2.5], None))
    assert TimingCache(tmp_path).get("a", 2) == Times([1.5, 2.5], None)


@pytest.mark.parametrize("kind", ["a file", "below a file", "a folder in its place"])
def test_where_nothing_can_be_written_times_are_measured_and_no_more_is_said(tmp_path, kind, caplog):
    folder = tmp_path / "times"
    if kind == "a folder in its place":
        timed(folder)
        (file,) = folder.iterdir()
        file.unlink()
        (file / "in it").mkdir(parents=True)
    else:
        folder.write_text("no folder")
        folder = folder / "below" if kind == "below a file" else folder
    with caplog.at_level(logging.WARNING):
        timer, times = timed(folder)
    assert (timer.measured, len(times)) == (2, 2)
    assert caplog.text == ""
    assert not list(tmp_path.rglob("*.tmp"))


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LEPTON_CACHE")
    folder = lambda: TimingCache.default().folder  # noqa: E731
    assert folder() == pathlib.Path("/home/someone/.cache/lepton_xla/times")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert folder() == pathlib.Path("/home/someone/.cache/lepton_xla/times")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert folder() == pathlib.Path("/var/cache/lepton_xla/times")
    monkeypatch.setenv("LEPTON_CACHE", str(tmp_path))
    assert folder() == tmp_path / "times"
    monkeypatch.setenv("LEPTON_CACHE", "off")
    assert folder() is None
    TimingCache.default().put("a", Times([1.0]))
    assert TimingCache.default().get("a", 1) is None


def test_no_more_than_so_many_files_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(timing_cache, "MAX_FILES", 6)
    cache = TimingCache(tmp_path)
    for number in range(8):
        cache.put(f"{number}", Times([1.0]))
        os.utime(tmp_path / f"{number}.json", (number, number))
    old, new = tmp_path / "a.tmp", tmp_path / "b.tmp"
    for file in (old, new):
        file.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    TimingCache(tmp_path).put("new", Times([1.0]))
    assert {file.name for file in tmp_path.iterdir()} == {"4.json", "5.json", "6.json", "7.json", "new.json", "b.tmp"}


WRITER = """
import importlib.util, logging, pathlib, sys
logging.basicConfig(level=logging.INFO)
spec = importlib.util.spec_from_file_location("timing_cache", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["timing_cache"] = module
spec.loader.exec_module(module)
cache, own = module.TimingCache(pathlib.Path(sys.argv[2])), float(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
seen = set()
for turn in range(300):
    for key in "abc":
        cache.put(key, module.Times([own] * 500))
        times = cache.get(key, 500)
        assert times is not None and len(set(times.us)) == 1, times
        seen.add(times.us[0])
print(sorted(seen))
"""


def test_two_processes_that_read_and_write_at_once_see_whole_files(tmp_path):
    command = [sys.executable, "-c", WRITER, str(timing_cache.__file__), str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([*command, own], **pipes) for own in ("1.0", "2.0")]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    results = [writer.communicate(timeout=60) for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], results
    assert [errors for _, errors in results] == ["", ""]
    assert "[1.0, 2.0]\n" in {out for out, _ in results}, "they never met"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "b.json", "c.json"]
