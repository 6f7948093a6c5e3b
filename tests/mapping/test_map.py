"""`leptonx map`: results against NumPy, the same bytes whoever makes them or dies, and rows that do not fit."""

import errno
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile

import ml_dtypes
import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

import lepton_xla as lx
from lepton_xla.cli import main
from lepton_xla.compiler.artifact import read_manifest
from lepton_xla.compiler.storage import Store
from lepton_xla.errors import InputError
from lepton_xla.files.folders import held
from lepton_xla.mapping import pool
from lepton_xla.mapping.columns import as_input
from lepton_xla.mapping.pool import run_here
from lepton_xla.mapping.sinks import join
from lepton_xla.mapping.sources import NpzSource, open_source
from lepton_xla.mapping.work import begun, make_plan
from lepton_xla.mapping.worker import Mapper

ROWS = 1000


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """y = tanh(x w) and n = 2 k: two inputs, one of them a number a row."""
    weights = {"w": np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)}

    def fn(weights, x, k):
        import jax.numpy as jnp

        return {"y": jnp.tanh(x.reshape(-1, 4) @ weights["w"]), "n": 2 * k}

    inputs = {"x": lx.TensorSpec(("batch", 2, 2), "float32"), "k": lx.TensorSpec(("batch",), "int32")}
    folder = tmp_path_factory.mktemp("artifact") / "m.lepton"
    lx.compile(lx.trace(fn, weights, inputs), {"batch": (1, 8)}).save(folder)
    return folder


@pytest.fixture(scope="module")
def rows():
    random = np.random.default_rng(1)
    return {"x": random.standard_normal((ROWS, 2, 2)).astype(np.float32), "k": np.arange(ROWS, dtype=np.int32)}


@pytest.fixture(scope="module")
def expected(rows):
    w = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32).astype(np.float64)
    return {"y": np.tanh(rows["x"].reshape(-1, 4) @ w), "n": 2 * rows["k"]}


def write(path, rows, **more):
    kind = path.suffix
    if kind == ".npz":
        (np.savez_compressed if more.get("compressed") else np.savez)(path, **rows)
    elif kind == ".jsonl":
        lists = {name: array.tolist() for name, array in rows.items()}
        path.write_bytes(
            b"".join(
                msgspec.json.encode({name: values[row] for name, values in lists.items()}) + b"\n"
                for row in range(len(rows["k"]))
            )
        )
    else:
        pa = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        x = pa.array(rows["x"].tolist(), pa.list_(pa.list_(pa.float32())))
        flat = pa.FixedSizeListArray.from_arrays(pa.array(rows["x"].reshape(-1).astype(np.float64)), 4)
        table = pa.table({"x": flat if more.get("flat") else x, "k": rows["k"].astype(np.int64), "note": ["a"] * ROWS})
        parquet.write_table(table, path, row_group_size=more.get("group", 300))
    return path


def read(path):
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return dict(arrays)
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return {name: np.array([line[name] for line in lines]) for name in lines[0]}
    table = pytest.importorskip("pyarrow.parquet").read_table(path)
    return {name: np.array(table.column(name).to_pylist()) for name in table.column_names}


def refused(*args):
    """The one line of a run that fails before a process starts, in this process."""
    result = CliRunner().invoke(main, ["map", *map(str, args)])
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("... ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def mapped(artifact, source, output, part_rows, parts=None):
    """Runs parts, by default all, in this process; joins them if they are all."""
    model = lx.load(artifact)
    digest = read_manifest(Store(str(artifact))).sha256
    plan = make_plan(str(artifact), digest, model.inputs, model.outputs, 8, str(source), str(output), {}, part_rows)
    with begun(str(output), plan) as work:
        mapper = Mapper(work.folder, model)
        for part in range(len(plan.parts)) if parts is None else parts:
            mapper.run(part)
        if parts is None:
            join([work.file(part) for part in range(len(plan.parts))], plan.kind, output, lambda done: None)
            work.remove()


def test_every_row_of_every_format(artifact, rows, expected, tmp_path):
    """Each input format with another output format; what is ignored, flat or wider is taken."""
    pairs = [("a.npz", "b.jsonl", {"compressed": True}), ("a.jsonl", "b.npz", {})]
    if importlib.util.find_spec("pyarrow") is not None:
        pairs += [("a.parquet", "b.parquet", {"flat": True}), ("c.parquet", "b.npz", {"group": 7})]
    for source, output, more in pairs:
        write(tmp_path / source, rows, **more)
        mapped(artifact, tmp_path / source, tmp_path / output, 96)
        found = read(tmp_path / output)
        np.testing.assert_allclose(found["y"], expected["y"], atol=1e-5)
        np.testing.assert_array_equal(found["n"], expected["n"])
        assert not list(tmp_path.glob(".*")), "nothing is left beside the output"


def children(pid):
    """The worker processes that a process has started."""
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(each.split()[0]) for each in listed.stdout.splitlines() if "lepton_xla.mapping.worker" in each]


def test_the_same_bytes_although_a_worker_is_killed(artifact, rows, tmp_path):
    source = write(tmp_path / "a.npz", {name: np.concatenate([array] * 5) for name, array in rows.items()})
    mapped(artifact, source, tmp_path / "one.npz", 32)
    model = lx.load(artifact)
    output = str(tmp_path / "two.npz")
    plan = make_plan(str(artifact), "d", model.inputs, model.outputs, 8, str(source), output, {}, 32)
    done, killed = [], []

    def tell(part):
        done.append(part)
        if len(done) == 20:
            killed.extend(children(os.getpid()))
            for worker in killed:
                os.kill(worker, signal.SIGKILL)

    with begun(output, plan) as work:
        run_here(work, work.missing(), 2, tell)
        join([work.file(part) for part in range(len(plan.parts))], "npz", tmp_path / "two.npz", lambda done: None)
    assert len(killed) == 2
    assert sorted(done) == list(range(len(plan.parts)))
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_a_run_goes_on_where_an_earlier_one_was(artifact, rows, tmp_path):
    source, output = write(tmp_path / "a.npz", rows), tmp_path / "b.jsonl"
    mapped(artifact, source, tmp_path / "c.jsonl", 50)
    mapped(artifact, source, output, 50, parts=range(12))
    (tmp_path / ".b.jsonl.parts" / ".00000012.jsonl.0.tmp").write_text("half of a part")
    assert "another run" in refused(artifact, source, output, "--part-rows", "70")
    result = CliRunner().invoke(main, ["map", *map(str, (artifact, source, output, "--part-rows", 50, "--json"))])
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert (said["rows"], said["rows_kept"], said["tried_again"]) == (ROWS, 600, 0)
    assert output.read_bytes() == (tmp_path / "c.jsonl").read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_a_command_that_is_killed_leaves_no_worker_and_goes_on(artifact, rows, tmp_path):
    source = write(tmp_path / "a.npz", {name: np.concatenate([array] * 40) for name, array in rows.items()})
    output = tmp_path / "b.jsonl"
    command = [sys.executable, "-m", "lepton_xla", "map", *map(str, (artifact, source, output, "--part-rows", 50))]
    parts = tmp_path / ".b.jsonl.parts"
    with subprocess.Popen([*command, "--processes", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 60
        while len(list(parts.glob("*.jsonl"))) < 30 and time.monotonic() < until and process.poll() is None:
            time.sleep(0.005)
        workers = children(process.pid)
        process.kill()
        process.communicate()
    assert workers
    until = time.monotonic() + 20
    while any(pathlib.Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < until, "workers end with their parent"
        time.sleep(0.05)
    assert not output.exists()
    kept = len(list(parts.glob("0*.jsonl")))
    assert kept >= 30
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows_kept"] == kept * 50
    mapped(artifact, source, tmp_path / "c.jsonl", 50)
    assert output.read_bytes() == (tmp_path / "c.jsonl").read_bytes()


def lines(*rows):
    return b"".join(msgspec.json.encode(row) + b"\n" for row in rows)


GOOD = {"x": [[1, 2], [3, 4]], "k": 5}


@pytest.mark.parametrize(
    ("bad", "parts"),
    [
        (lines(GOOD, GOOD | {"k": None}), ["column 'k'", "line 2", "None is not made of numbers"]),
        (lines(GOOD, GOOD | {"k": 1.5}), ["column 'k'", "line 2", "1.5 is not an int32"]),
        (lines(GOOD, GOOD, GOOD | {"k": 2**40}), ["column 'k'", "line 3", "1099511627776 is not an int32"]),
        (lines(GOOD, GOOD | {"x": [[1, 2], [3]]}), ["column 'x'", "line 2", "lists of different lengths"]),
        (lines(GOOD, GOOD | {"x": [1, 2, 3]}), ["column 'x'", "line 2", "a row of shape [3]"]),
        (lines(GOOD, GOOD | {"x": [[1, 2], [3, 1e300]]}), ["column 'x'", "line 2", "1e+300 is not a float32"]),
        (lines(GOOD, GOOD | {"x": "1234"}), ["column 'x'", "line 2", "'1234' is not made of numbers"]),
        (lines(GOOD, {"x": GOOD["x"]}), ["line 2: no column 'k'"]),
        (lines(GOOD) + b"{broken\n", ["line 2: not a JSON object"]),
        (lines(GOOD) + b"\n", ["line 2: not a JSON object"]),
    ],
)
def test_the_row_and_the_column_that_do_not_fit_are_named(artifact, bad, parts, tmp_path):
    """By the code that workers run, without their processes."""
    source, output = tmp_path / "bad.jsonl", str(tmp_path / "out.jsonl")
    source.write_bytes(bad)
    model = lx.load(artifact)
    plan = make_plan(str(artifact), "d", model.inputs, model.outputs, 8, str(source), output, {}, None)
    with begun(output, plan) as work:
        report = Mapper(work.folder, model).report(0)
    assert report.error.startswith(str(source))
    for part in parts:
        assert part in report.error


def test_a_bad_row_ends_the_command_with_one_line(artifact, tmp_path):
    source = tmp_path / "bad.jsonl"
    source.write_bytes(lines(*[GOOD] * 50, GOOD | {"k": "x"}))
    said = refused(artifact, source, tmp_path / "out.npz", "--part-rows", "8")
    assert "bad.jsonl, column 'k', line 51: 'x' is not made of numbers; the model takes int32[batch]" in said
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize(
    ("source", "output", "more", "part"),
    [
        ("a.csv", "b.npz", (), "a.csv: expected a file of rows named .npz, .jsonl or .parquet"),
        ("a.npz", "b.csv", (), "b.csv: expected a file of rows"),
        ("missing.npz", "b.npz", (), "missing.npz: cannot be read: No such file"),
        ("text.npz", "b.npz", (), "text.npz: cannot be read: File is not a zip file"),
        ("a.npz", "none/b.npz", (), "does not exist"),
        ("a.npz", "a.npz", (), "is the file of rows itself"),
        ("other.npz", "b.npz", (), "no column 'k' for the input 'k'; its columns: 'x'"),
        ("uneven.npz", "b.npz", (), "expected equal numbers"),
        ("objects.npz", "b.npz", (), "holds Python objects"),
        ("empty.jsonl", "b.npz", (), "no column"),
        ("none.npz", "b.npz", (), "none.npz has no rows"),
        ("a.npz", "b.npz", ("--column", "z=y"), "the model has no input 'z'; it takes 'x', 'k'"),
        ("a.npz", "b.npz", ("--column", "x"), "expected INPUT=COLUMN"),
    ],
)
def test_what_cannot_be_mapped_is_refused_before_a_process_starts(artifact, rows, source, output, more, part, tmp_path):
    write(tmp_path / "a.npz", rows)
    (tmp_path / "text.npz").write_text("no zip")
    np.savez(tmp_path / "other.npz", x=rows["x"])
    np.savez(tmp_path / "uneven.npz", x=rows["x"], k=rows["k"][:5])
    np.savez(tmp_path / "objects.npz", x=np.array([{}]), k=rows["k"])
    np.savez(tmp_path / "none.npz", x=rows["x"][:0], k=rows["k"][:0])
    (tmp_path / "empty.jsonl").touch()
    assert part in refused(artifact, tmp_path / source, tmp_path / output, *more)
    assert not list(tmp_path.glob("b.*"))


def test_a_missing_extra_says_how_to_get_it(artifact, rows, tmp_path, monkeypatch):
    write(tmp_path / "a.npz", rows)
    for module in ("pyarrow", "ray"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "pip install 'lepton-xla[parquet]'" in refused(artifact, tmp_path / "a.npz", tmp_path / "b.parquet")
    assert "pip install 'lepton-xla[ray]'" in refused(artifact, tmp_path / "a.npz", tmp_path / "b.npz", "--ray")


def test_one_run_at_a_time_works_on_an_output(artifact, rows, tmp_path):
    write(tmp_path / "a.npz", rows)
    folder = tmp_path / ".b.npz.parts"
    folder.mkdir()
    with held(folder) as is_free:
        assert is_free
        assert "another run works on it" in refused(artifact, tmp_path / "a.npz", tmp_path / "b.npz")


def test_what_the_system_refuses_is_told_in_one_line(artifact, rows, tmp_path, monkeypatch):
    write(tmp_path / "a.npz", rows)
    (tmp_path / ".b.npz.parts/plan.json").mkdir(parents=True)
    said = refused(artifact, tmp_path / "a.npz", tmp_path / "b.npz")
    assert ".b.npz.parts: cannot be read or written: Is a directory" in said

    def none(*_, **__):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(pool.subprocess, "Popen", none)
    said = refused(artifact, tmp_path / "a.npz", tmp_path / "c.npz", "--processes", "2")
    assert "a worker process cannot be started: Resource temporarily unavailable" in said


def test_a_part_that_kills_every_process_is_named(artifact, rows, tmp_path, monkeypatch):
    write(tmp_path / "a.npz", rows)
    dying = "import sys, os; print('{}', flush=True); sys.stdin.readline(); os.kill(os.getpid(), 9)"
    popen = subprocess.Popen
    monkeypatch.setattr(
        pool.subprocess, "Popen", lambda command, **options: popen([sys.executable, "-c", dying], **options)
    )
    said = refused(artifact, tmp_path / "a.npz", tmp_path / "b.npz", "--part-rows", "1000", "--processes", "2")
    assert "rows 0 to 999 (counted from 0) failed 3 times; the last time: its process was ended by SIGKILL" in said
    monkeypatch.setattr(
        pool.subprocess, "Popen", lambda command, **options: popen([sys.executable, "-c", "exit(3)"], **options)
    )
    said = refused(artifact, tmp_path / "a.npz", tmp_path / "b.npz", "--part-rows", "1000")
    assert "a worker process ends before it has run anything: its process ended with 3" in said


@pytest.mark.parametrize("compressed", [False, True])
def test_an_npz_is_read_part_by_part_in_any_order(tmp_path, compressed):
    """Several arrays at once, longer than what is read ahead: `zipfile` of Python 3.12.1 mixes them up in `seek`."""
    x, k = np.random.default_rng(0).standard_normal((50_000, 3)), np.arange(50_000)
    (np.savez_compressed if compressed else np.savez)(tmp_path / "a.npz", x=x, k=k)
    source = NpzSource(str(tmp_path / "a.npz"))
    parts = source.parts(777)
    assert sum(part.count for part in parts) == 50_000
    for part in (*parts, parts[3], parts[0], parts[-1]):
        found, rows = source.read(part, ["x", "k"]), slice(part.start, part.start + part.count)
        np.testing.assert_array_equal(found["x"], x[rows])
        np.testing.assert_array_equal(found["k"], k[rows])


def test_lines_are_read_part_by_part(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(msgspec.json.encode({"a": "\u00e4" * row, "n": row}) for row in range(50)))
    source = open_source(path)
    for part in reversed(source.parts(8)):
        assert source.read(part, ["n"])["n"] == list(range(part.start, part.start + part.count))


@pytest.mark.parametrize(
    ("values", "dtype", "want"),
    [
        (np.array([1, 255], np.int64), "uint8", [1, 255]),
        (np.array([0.0, 1.0]), "bool", [False, True]),
        (np.array([1.5, np.nan]), "float32", [1.5, np.nan]),
        (np.array([1, 2], ml_dtypes.bfloat16).view("V2"), "bfloat16", [1, 2]),
        ([True, False], "int32", [1, 0]),
    ],
)
def test_values_keep_what_they_are(values, dtype, want):
    found = as_input(values, lx.TensorSpec(("batch",), dtype), str)
    assert found.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(found.astype(np.float64), want)


@pytest.mark.parametrize(
    ("values", "dtype", "part"),
    [
        (np.array([1, -1], np.int64), "uint64", "1: -1 is not an uint64"),
        (np.array([1, 256], np.int64), "uint8", "1: 256 is not an uint8"),
        (np.array([1.0, np.nan]), "int32", "1: nan is not an int32"),
        (np.array([1.0, 2.0]), "bool", "1: 2.0 is not a bool"),
        (np.array([1.0, 1e39]), "float32", "1: 1e\\+39 is not a float32"),
    ],
)
def test_values_that_a_dtype_does_not_hold(values, dtype, part):
    with pytest.raises(InputError, match=part):
        as_input(values, lx.TensorSpec(("batch",), dtype), str)


def test_memory_stays_bounded(artifact, tmp_path):
    """The largest of the two processes holds a few parts of a file of 80 MB, never all of it."""
    rows = 4_000_000
    with open(tmp_path / "k.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i4", "fortran_order": False, "shape": (rows,)})
        file.truncate(file.tell() + 4 * rows)
    with open(tmp_path / "x.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (rows, 4)})
        file.truncate(file.tell() + 16 * rows)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name in ("x", "k"):
            archive.write(tmp_path / f"{name}.npy", f"{name}.npy")
    source = open_source(tmp_path / "a.npz")
    tracemalloc.start()
    for part in source.parts(1 << 16)[-2:]:
        assert source.read(part, ["x", "k"])["x"].shape[1:] == (4,)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
