"""`leptonx launch local` with real processes that are killed, hang, are told to stop, and leave children behind."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

# What the processes run: `mode` says what happens, and when.
RANK = """
import os, signal, subprocess, sys, time
from lepton_xla.launch import beat
rank, mode = int(os.environ.get("LEPTON_PROCESS_ID", 0)), sys.argv[1]
start = int(open("checkpoint").read()) if os.path.exists("checkpoint") else 0
asked = []
if mode != "deaf":
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
else:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if rank == 1 and mode == "child":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("ready", flush=True)
for step in range(start, 60):
    beat(step, "step")
    time.sleep(0.02)
    if asked:
        sys.exit(75)
    if rank == 1 and step == 20:
        open("starts", "a").write(f"{start}\\n")
        match mode:
            case "fails": raise ZeroDivisionError
            case "usage": sys.exit(2)
            case "preempted": sys.exit(75)
            case "killed" | "child": os.kill(os.getpid(), signal.SIGKILL)
            case "sleeps": time.sleep(60)  # in its data iterator, say: its heartbeat to JAX goes on
            case "once" if start == 0:
                open("checkpoint", "w").write("10")
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(60)
    held_up = rank == 0 and step == 22 and (mode == "sleeps" or mode == "once" and start == 0)
    if mode in ("waits", "deaf") or held_up:
        while not asked:  # in a collective, for rank 1
            time.sleep(0.02)
        sys.exit(75)
print(f"done {rank}")
"""


class Launcher:
    """`leptonx launch local` in a folder of its own, and what became of it."""

    def __init__(self, folder, *args, mode="ok", **environ):
        self.folder = folder
        (folder / "rank.py").write_text(RANK)
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "LEPTON_P"))}
        root = pathlib.Path(__file__).resolve().parents[2]
        clean |= {"PYTHONPATH": str(root), "TMPDIR": str(folder), **environ}
        command = [sys.executable, "-m", "lepton_xla", "launch", "local", *map(str, args)]
        command += ["--", sys.executable, "rank.py", mode]
        self.began = time.monotonic()
        # What ran these tests may ignore SIGHUP, as nohup does; processes inherit that.
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
        self.process = subprocess.Popen(
            command, cwd=folder, env=clean, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        signal.signal(signal.SIGHUP, before)

    def end(self):
        self.out, self.err = self.process.communicate(timeout=60)
        self.seconds = time.monotonic() - self.began
        return self.process.returncode

    def await_processes(self, count):
        """Waits for processes to be ready; returns their numbers."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            found = self.processes()
            if len(found) >= count and len(list(self.folder.glob("leptonx-*/rank-*"))) >= count:
                return found
            time.sleep(0.02)
        raise AssertionError("the processes did not start")

    def processes(self):
        return running(str(self.folder))

    def starts(self):
        return [int(line) for line in (self.folder / "starts").read_text().split()]


def running(folder):
    """Processes whose working directory is this folder, without the launcher and the guard."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and os.readlink(entry / "cwd") == folder:
                words = (entry / "cmdline").read_text().split("\0")
                if "-m" not in words and not any("guard" in word for word in words) and words != [""]:
                    found.append(int(entry.name))
    return found


@pytest.fixture
def launch(tmp_path):
    started = []

    def start(*args, **kwargs):
        started.append(Launcher(tmp_path, *args, **kwargs))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
            each.process.communicate()
    deadline = time.monotonic() + 10
    while running(str(tmp_path)):  # whatever the test did, nothing may be left
        assert time.monotonic() < deadline, "processes are left behind"
        time.sleep(0.02)


def test_all_goes_well(launch):
    run = launch("--processes", 2, "--devices", 3)
    assert run.end() == 0
    assert sorted(run.out.splitlines()) == ["[0] done 0", "[0] ready", "[1] done 1", "[1] ready"]
    assert run.err == ""
    assert not list(run.folder.glob("leptonx-*"))


def test_one_process_is_not_labelled_and_is_not_told_a_coordinator(launch):
    run = launch(JAX_COORDINATOR_ADDRESS="outer:1")
    assert run.end() == 0
    assert run.out.splitlines() == ["ready", "done 0"]


@pytest.mark.parametrize(
    ("mode", "code", "why"),
    [
        ("killed", 137, "rank 1 was killed by SIGKILL"),
        ("fails", 1, "rank 1 ended with exit code 1"),
        ("child", 137, "rank 1 was killed by SIGKILL"),
    ],
)
def test_one_that_dies_ends_all(launch, mode, code, why):
    run = launch("--processes", 2, mode=mode)
    assert run.end() == code
    assert f"leptonx: {why}; all are ended" in run.err
    assert "done 0" not in run.out
    assert run.seconds < 20


def test_one_that_hangs_is_found_and_named(launch):
    """Nothing but the watchdog can tell: every process is alive, and JAX's own heartbeat would go on."""
    run = launch("--processes", 2, "--watchdog-s", 1, mode="sleeps")
    assert run.end() == 124
    line = next(line for line in run.err.splitlines() if "hangs" in line)
    assert line.startswith("leptonx: rank 1 hangs: no progress for 1.")
    assert "it is at step 20 in phase step; rank 0 is at step 22 in phase step; all are ended" in line
    assert run.seconds < 20


def test_without_a_watchdog_it_waits(launch):
    run = launch("--processes", 2, mode="sleeps")
    run.await_processes(2)
    with pytest.raises(subprocess.TimeoutExpired):
        run.process.communicate(timeout=3)


def test_it_goes_on_from_the_checkpoint(launch):
    run = launch("--processes", 2, "--watchdog-s", 1, "--max-restarts", 1, "--json", mode="once")
    assert run.end() == 0
    assert run.starts() == [0, 10]
    document = json.loads(run.out)
    assert document["exit_code"] == 0
    first, second = document["attempts"]
    assert (first["code"], first["resumed_at"], first["step"]) == (124, 0, 22)
    assert (second["code"], second["resumed_at"], second["why"]) == (0, 10, "")
    assert "starting again from the last checkpoint: restart 1 of 1" in run.err
    assert "[0] done 0" in run.err  # with --json, stdout has the document alone


def test_restarts_are_bounded(launch):
    run = launch("--processes", 2, "--max-restarts", 2, mode="killed")
    assert run.end() == 137
    assert run.starts() == [0, 0, 0]


def test_restarts_are_counted_anew_when_training_gets_on(tmp_path, launch):
    """Each attempt leaves a newer checkpoint until the fourth, which fails where the third did."""
    (tmp_path / "program.py").write_text(
        "import os, sys\nfrom lepton_xla.launch import beat\n"
        "start = int(open('at').read()) if os.path.exists('at') else 0\n"
        "beat(start, 'step')\nopen('starts', 'a').write(f'{start}\\n')\n"
        "open('at', 'w').write(str(min(start + 10, 20)))\nsys.exit(1)\n"
    )
    command = [sys.executable, "-m", "lepton_xla", "launch", "local", "--max-restarts", "1", "--"]
    done = subprocess.run([*command, sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).resolve().parents[2])},
                          check=False)  # fmt: skip
    assert done.returncode == 1
    assert (tmp_path / "starts").read_text().split() == ["0", "10", "20", "20"]


@pytest.mark.parametrize(("mode", "code"), [("usage", 2), ("preempted", 75)])
def test_these_codes_are_passed_on(launch, mode, code):
    run = launch("--processes", 2, "--max-restarts", 3, "--grace-s", 1, mode=mode)
    assert run.end() == code
    assert run.starts() == [0]


def test_preempted_processes_are_started_again_if_asked(launch):
    run = launch("--processes", 2, "--max-restarts", 1, "--restart-preempted", "--grace-s", 1, mode="preempted")
    assert run.end() == 75
    assert run.starts() == [0, 0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_stop_is_passed_on(launch, number):
    run = launch("--processes", 2, "--max-restarts", 3, mode="waits")
    run.await_processes(2)
    run.process.send_signal(number)
    # SIGTERM is handled by the processes, which end with 75; SIGHUP kills them.
    assert run.end() == (75 if number == signal.SIGTERM else 128 + signal.SIGHUP)
    assert "starting again" not in run.err


def test_a_preempted_task_of_a_larger_run_waits_for_the_others(launch):
    """SLURM ends all tasks as soon as one has ended, and reports the highest code: that of a signal, if it can."""
    run = launch(mode="waits", SLURM_PROCID="1")
    run.await_processes(1)
    time.sleep(0.5)  # until its handler is set
    run.process.terminate()
    deadline = time.monotonic() + 10
    while run.processes():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)
    run.process.terminate()
    time.sleep(0.5)
    assert run.process.poll() is None
    assert run.end() == 75


def test_processes_that_do_not_stop_are_killed(launch):
    run = launch("--processes", 2, "--grace-s", 0.3, mode="deaf")
    run.await_processes(2)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 137
    assert "killing rank 0, 1, which has not ended within 0.3 s" in run.err


def test_a_second_signal_kills_at_once(launch):
    run = launch("--processes", 2, "--grace-s", 60, mode="deaf")
    run.await_processes(2)
    run.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 137
    assert run.seconds < 30


def test_nothing_is_left_when_the_launcher_is_killed(launch):
    """Not the processes, which ignore SIGTERM and would wait for ever, and not the folder of their heartbeats."""
    run = launch("--processes", 2, mode="deaf")
    run.await_processes(2)
    assert len(run.processes()) == 2
    run.process.kill()
    run.process.communicate()
    deadline = time.monotonic() + 10
    while run.processes() or list(run.folder.glob("leptonx-*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_port_in_use_is_refused(launch):
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as server:
        port = server.getsockname()[1]
        run = launch("--processes", 2, "--port", port)
        assert run.end() == 2
    said = f"the coordinator's port {port} is in use: another program listens on 127.0.0.1:{port}"
    assert run.err == f"leptonx: {said}\n"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--processes", "0", "--", "true"], "--processes"),
        (["--", "no-such-command"], "no-such-command: no such command"),
        (["--", "./plain"], "./plain: this file is not executable"),
        ([], "Missing argument 'COMMAND...'"),
        (["--max-restarts", "-1", "--", "true"], "--max-restarts"),
        (["--watchdog-s", "0", "--", "true"], "--watchdog-s"),
        (["--watchdog-compile-s", "5", "--", "true"], "need --watchdog-s"),
        (["--nothing", "--", "true"], "No such option '--nothing'"),
        (["--port", "65536", "--", "true"], "--port"),
    ],
)
def test_what_is_refused(args, said, tmp_path, monkeypatch):
    from click.testing import CliRunner

    from lepton_xla.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain").write_text("")
    done = CliRunner().invoke(main, ["launch", "local", *args])
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr


def test_the_launcher_imports_no_jax():
    code = (
        "import sys, lepton_xla.launch, lepton_xla.launch.supervisor, lepton_xla.cli.launch\n"
        "print(sorted({'jax', 'numpy', 'flax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
