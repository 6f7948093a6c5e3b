"""The steps after training that all applications share, each by the command that users type.

`leptonx tune` makes the trained model small, `leptonx serve` serves it. Then come requests as the model knows them, and
requests that have changed, with the right answers as feedback: the alert must fire at the latter and not before, and
`leptonx learn` must bring back what the change costs. At the end `leptonx load` asks 100 times a second.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import reports

from lepton_xla.serve.client import Client

ROWS, PACE_S = 8, 0.02  # of a request, and between two
PATIENCE_S = 600.0  # for an answer: nothing here depends on how fast a busy machine is
STAGES = {"stages": [{"shadow": 0.5, "answers": 30}, {"share": 0.5, "answers": 60}], "rollback": ["errors > 1%"]}

type Rows = tuple[dict[str, Any], Sequence[Any]]
"""Inputs of a request by name, and the right class of each of its rows; or the right reply to each text."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an application's users do.

    Attributes:
        ask: `ask(number, shifted)`: the request of a number, before or after the shift.
        score: `score(answer, labels)`: how good an answer is, 0 to 1.
        shift: what the shift is, for people.
        judges: numbers of requests that nobody sends, by which the model is judged before and after.
        generates: whether an input `text` is answered with replies, and a right answer is the right one.
        rule: when to alert.
        most: tokens of a reply.
        calm: requests before the shift, or as many more as it takes until the server has counted enough.
        learned: requests after the shift that are learned from.
        patience_s: seconds after the shift within which the alert must fire, and before it those within which enough
            must have been counted: a server counts what it sees in at most a hundredth of its time, which large answers
            take long to fill.
    """

    ask: Callable[[int, bool], Rows]
    score: Callable[[Mapping[str, np.ndarray], Sequence[Any]], float]
    shift: str
    judges: Sequence[int]
    generates: bool = False
    rule: str = "drift > 0.5 over 200"
    most: int = 64
    calm: int = 150
    learned: int = 250
    patience_s: float = 60.0


# What every application aims at beside its own figures. `watched`: the rule saw enough requests before the shift, so it
# could have alerted; `forgotten`: what learning costs of requests as before.
AIMS = {
    "watched": (">=", 1), "false_alarm": ("<=", 0), "alert": (">=", 1), "regained": (">=", 0.8),
    "forgotten": ("<=", 0.05),
}  # fmt: skip


def at_least_one(text: str) -> int:
    """A number of an option."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def above_zero(text: str) -> float:
    """Seconds or minutes of an option."""
    if not 0 < (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def leptonx(*arguments: object, fine: Sequence[int] = (0,)) -> dict[str, Any]:
    """What a command says, as JSON, if it ends with one of these exit codes."""
    command = [sys.executable, "-m", "lepton_xla", *map(str, arguments), "--json"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    if ended.returncode not in fine:
        sys.exit(f"leptonx {' '.join(map(str, arguments))}: {ended.stderr[-2000:]}")
    return json.loads(ended.stdout)


def tuned(target: str, folder: pathlib.Path, name: str, *limits: object, compiled: str | None = None) -> dict[str, Any]:
    """Find the smallest recipe within limits, and compile with it to `NAME.lepton`; what `leptonx tune` says.

    The artifact keeps its float weights, which `leptonx learn` begins with and makes small by the same steps.

    Args:
        target: the model, as FILE.py:NAME.
        folder: for all files.
        name: of the model.
        limits: more options of `leptonx tune`.
        compiled: what is compiled, if it is not the target.
    """
    aside = folder / "tuning.jsonl.old"
    aside.unlink(missing_ok=True)
    found = leptonx(
        "tune", target, "--objective", "bytes", *limits, "-o", folder / "recipe.toml", "--report",
        folder / "tune.html", "--journal", folder / "tuning.jsonl", "--new-journal",
    )  # fmt: skip
    if aside.exists():
        print("  all is measured anew: the journal was of another model, other data or another version", flush=True)
    leptonx(
        "compile", compiled or target, "--recipe", folder / "recipe.toml", "--name", name, "--keep-master", "-o",
        folder / f"{name}.lepton", "--overwrite",
    )  # fmt: skip
    return found


@contextlib.contextmanager
def served(artifact: pathlib.Path, folder: pathlib.Path, rule: str) -> Generator[str]:
    """A server of the artifact in a repository of its own, which keeps samples in `FOLDER/samples`; its URL."""
    for each in ("models", "samples", "learning"):
        shutil.rmtree(folder / each, ignore_errors=True)
    (folder / "models").mkdir(parents=True)
    leptonx("repo", "push", folder / "models", artifact, "--name", artifact.stem)
    (folder / "alerts.toml").write_text(f'[[rule]]\nname = "drifted"\nwhen = "{rule}"\n')
    command = [
        sys.executable, "-m", "lepton_xla", "serve", folder / "models", "--port", 0, "--samples", folder / "samples",
        "--alerts", folder / "alerts.toml", "--repository-poll-s", 0.2, "--json",
    ]  # fmt: skip
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=log, text=True)
        assert server.stdout is not None
        try:
            url = next((e["url"] for e in map(json.loads, server.stdout) if e.get("event") == "listening"), None)
            if url is None:
                sys.exit(f"the server stopped before it took requests: {(folder / 'server.log').read_text()[-2000:]}")
            # Nobody reads what else it prints; a full pipe would stop it.
            rest = threading.Thread(target=server.stdout.read)
            rest.start()
            yield url
            server.send_signal(signal.SIGTERM)
            rest.join()
        finally:
            server.terminate()
            server.wait(60)
            server.stdout.close()


def loaded(url: str, name: str, source: str, seconds: float) -> dict[str, float]:
    """Latency of 100 requests/s of one row, ms."""
    found = leptonx("load", url, "--model", name, "--rate", 100, "--seconds", seconds, "--input", source, fine=(0, 1))
    (run,) = found["runs"]
    # Exit code 1 says that some failed: they are counted.
    return {
        "p50_ms": 1e3 * run["latency_s"]["p50"], "p99_ms": 1e3 * run["latency_s"]["p99"],
        "failed": run["errors"],
    }  # fmt: skip


class _Users:
    """Sends requests with their feedback; prompts all at once, as many people would."""

    def __init__(self, url: str, client: Client, name: str, plan: Plan) -> None:
        self._url, self._client, self._name, self._plan = url, client, name, plan
        self._people = ThreadPoolExecutor(ROWS)
        self.sent = 0
        self.curve: list[tuple[float, float]] = []  # requests, and the greatest drift
        self.watched = False  # whether the server has counted enough for a drift

    def send(self, shifted: bool) -> None:
        """The next request, and what its answer should have been."""
        inputs, labels = self._plan.ask(self.sent, shifted)
        self._answer(inputs, f"{self.sent}")
        if self._plan.generates:
            given: dict[str, Any] = {f"{self.sent}-{at}": label for at, label in enumerate(labels)}
        else:
            given = {f"{self.sent}": [int(each) for each in labels]}
        self._client.feedback(self._name, given)
        self.sent += 1

    def _answer(self, inputs: dict[str, Any], request_id: str | None = None) -> Mapping[str, np.ndarray]:
        if not self._plan.generates:
            return self._client.infer(self._name, inputs, request_id=request_id)

        def reply(at: int) -> str:
            told = {"text_input": str(inputs["text"][at]), "id": f"{request_id}-{at}" if request_id else ""}
            body = json.dumps(told | {"max_tokens": self._plan.most}).encode()
            with urllib.request.urlopen(
                f"{self._url}/v2/models/{self._name}/generate", body, timeout=PATIENCE_S
            ) as answer:
                return json.load(answer)["text_output"]

        return {"text": np.array(list(self._people.map(reply, range(len(inputs["text"])))), object)}

    def firing(self) -> bool:
        """Whether the alert fires; notes the drift."""
        known = self._client.monitor(self._name)["drift"]
        by_chance = self._plan.rule.startswith("shift")
        self.watched = self.watched or bool(known)
        drifts = [each["psi"] - (each["noise"] if by_chance else 0) for each in known]
        self.curve.append((ROWS * self.sent, max(drifts, default=0.0)))
        with urllib.request.urlopen(f"{self._url}/v2/alerts", timeout=PATIENCE_S) as answer:
            alerts = json.load(answer)["alerts"]
        return any(each["rule"] == "drifted" and each["state"] == "firing" for each in alerts)

    def judged(self, shifted: bool) -> float:
        """The mean score of the requests that nobody sends."""
        scores: list[float] = []
        for number in self._plan.judges:
            inputs, labels = self._plan.ask(number, shifted)
            scores.append(self._plan.score(self._answer(inputs), labels))
        return float(np.mean(scores))

    @contextlib.contextmanager
    def sending(self) -> Generator[None]:
        """Shifted requests all the time, from a thread; one that fails does not end them, and is raised at the end."""
        stop, failures = threading.Event(), list[Exception]()

        def run() -> None:
            while not stop.wait(PACE_S):
                try:
                    self.send(True)
                except Exception as error:  # whatever it is, it is raised below
                    failures.append(error)
                    self.sent += 1  # its number may have been taken

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        if failures:
            raise failures[0]

    def close(self) -> None:
        """Ends the threads of the people."""
        self._people.shutdown()


def lived(artifact: pathlib.Path, target: str, folder: pathlib.Path, plan: Plan, steps: int, source: str = "",
          seconds: float = 0.0, *options: object) -> dict[str, Any]:  # fmt: skip
    """Serve, load, shift, learn and promote.

    Args:
        artifact: what is served; its file name is the model's.
        target: the `TrainSpec` of `leptonx learn`, as FILE.py:NAME.
        folder: for all files.
        plan: what users do.
        steps: of learning.
        source: input of `leptonx load`; empty where that is measured elsewhere.
        seconds: of load, if there is an input.
        options: more of `leptonx learn`.
    """
    name = artifact.stem
    (folder / "rollout.json").write_text(json.dumps(STAGES))
    with (
        served(artifact, folder, plan.rule) as url,
        Client(url, timeout_s=PATIENCE_S) as client,
        contextlib.closing(_Users(url, client, name, plan)) as users,
    ):
        clean = users.judged(False)
        false_alarm = _watched(users, False, plan.calm, 0.0)
        began_s = time.monotonic()
        while not (false_alarm or users.watched) and time.monotonic() - began_s < plan.patience_s:
            false_alarm = _watched(users, False, 50, 0.0)
        watched = users.watched
        if not watched:
            print("  too few requests as before were counted for a drift, so none could have alerted", flush=True)
        shift_at = users.sent
        fired = _watched(users, True, 1, plan.patience_s)
        alert_rows = ROWS * (users.sent - shift_at)
        print(f"  alert: {'FALSE ALARM, ' if false_alarm else ''}"
              f"{f'after {alert_rows} shifted rows' if fired else 'NONE'}", flush=True)  # fmt: skip
        while users.sent - shift_at < plan.learned:
            users.send(True)
        before = clean, users.judged(True)
        with users.sending():
            learned = leptonx(
                "learn", target, "--samples", folder / "samples", "--base", artifact, "--server", url, "--folder",
                folder / "learning", "--steps", steps, "--rollout", folder / "rollout.json", *options,
            )  # fmt: skip
        after = users.judged(False), users.judged(True)
        print(f"  learned: {learned['phase']}: shifted {before[1]:.4f} -> {after[1]:.4f}, as before {before[0]:.4f} -> "
              f"{after[0]:.4f}", flush=True)  # fmt: skip
        found: dict[str, Any] = {}
        if source:  # at the end: the same request again and again is a drift
            found = loaded(url, name, source, seconds)
            print(f"  p99 at 100 requests/s: {found['p99_ms']:.1f} ms, {found['failed']} failed", flush=True)
    lost = before[0] - before[1]
    found |= {
        "watched": watched, "false_alarm": false_alarm, "alert": fired, "alert_rows": alert_rows if fired else None,
        "clean_before": before[0], "shifted_before": before[1], "clean_after": after[0], "shifted_after": after[1],
        # Where the change costs nothing, nothing shows that it can be learned.
        "regained": (after[1] - before[1]) / lost if lost > 0 else 0.0, "forgotten": before[0] - after[0],
        "round": learned["phase"], "round_reason": learned["reason"], "version": learned["version"],
        "drift": users.curve, "shift_at": ROWS * shift_at,
    }  # fmt: skip
    return found


def _watched(users: _Users, shifted: bool, least: int, seconds: float) -> bool:
    """Send so many requests, for so long, looking once a second until the alert fires: whether it did."""
    began_s = looked_s = time.monotonic()
    sent, over = 0, False
    while not over:
        users.send(shifted)
        sent += 1
        time.sleep(PACE_S)
        over = sent >= least and time.monotonic() - began_s > seconds
        if over or time.monotonic() - looked_s > 1:
            looked_s = time.monotonic()
            if users.firing():
                return True
    return False


def parts(found: Mapping[str, Any], plan: Plan, folder: pathlib.Path, names: Sequence[str]) -> list[str]:
    """Of a page: the life of the model, then the pages of `leptonx tune` and others."""
    marks = {"shift": found["shift_at"]}
    if found["alert"]:
        marks["alert"] = found["shift_at"] + found["alert_rows"]
    by_chance = ", beyond chance" if plan.rule.startswith("shift") else ""
    level = float(plan.rule.split(">")[1].split()[0])
    rows = [
        ["as before", f"{found['clean_before']:.4f}", f"{found['clean_after']:.4f}"],
        ["shifted", f"{found['shifted_before']:.4f}", f"{found['shifted_after']:.4f}"],
    ]
    served_at: list[str] = []
    if "p99_ms" in found:
        served_at = [
            "<h2>Served</h2>",
            "<p>100 requests/s: p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms, {failed} failed.</p>".format_map(found),
        ]
    made = [
        *served_at,
        f"<h2>Shifted: {reports.escaped(plan.shift)}</h2>",
        reports.lines({f"population stability index{by_chance}": found["drift"]}, "rows", marks, (plan.rule, level)),
        f"<h2>Learned: {reports.escaped(found['round'])}</h2><p>{reports.escaped(found['round_reason'])}</p>",
        reports.drawn_table(["requests", "before", "after"], rows),
    ]
    return made + [reports.body(folder / name) for name in names if (folder / name).exists()]
