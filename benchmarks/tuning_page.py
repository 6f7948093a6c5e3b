"""The page of `tuning.py`, `searches.py` and `predicting.py`: docs/benchmarks/tuning.md."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import harness

MODELS = ("digits", "lenet5", "residual", "transformer", "minilm")
# A point counts if it is so many times smaller or faster than the best preset.
SMALLER, FASTER = 1.3, 1.2
# Of MiniLM's float bytes, at a drop of at most so many points on the rows that chose nothing.
SMALL, SMALL_DROP = 0.2, 0.2
INTRODUCTION = """\
`benchmarks/tuning.py` writes this page from `tuning.json`. For each model and objective, the first row is the best
preset that keeps to the bound on the drop, the second what `leptonx tune` found within the minutes; presets are among
its trials, so it is never worse. The drop is that on the half of the test rows that chose nothing, with its 95 %
interval, paired with the float model row by row; candidates were chosen by the other half, those of MiniLM called
`cosine` and `small` by their cosine to the float model's embeddings. Time is a share of that of the float program in
the same rounds, the geometric mean over the buckets."""
LEFT = [
    "preset",
    "drop, points (95 %)",
    "bytes on disk",
    "of float's time",
    "times smaller found",
    "times faster found",
]
HEADER = ["", "recipe", "drop, points (95 %)", "bytes on disk", "of float's", "of float's time", "beside the preset"]
PEERS = ["", "drop, points (95 %)", "bytes of weights", "of float's", "of its own float's time", "note"]


def cells(name: str, objective: str, result: Mapping[str, Any]) -> list[list[str]]:
    """The best preset, if one is compared with, and what was found."""
    rows: list[list[str]] = []
    for which in ("preset", "best"):
        if which not in result:
            continue
        trial = result[which]
        if trial is None:
            rows.append([f"{name}, {objective}", f"no {which} holds", "", "", "", "", ""])
            continue
        more = f", cosine {trial['cosine']:.5f}" if "cosine" in trial and objective in ("cosine", "small") else ""
        share = trial["bytes"] / result["float_bytes"]
        rows.append(
            [
                f"{name}, {objective}",
                trial["name"],
                trial["drop"] + more,
                f"{trial['bytes']:,}",
                f"{share:.3f}",
                f"{trial['latency']:.2f}",
                _beside(objective, result) if which == "best" else "",
            ]
        )
    return rows


def _beside(objective: str, result: Mapping[str, Any]) -> str:
    if not result.get("better"):
        return ""
    text = f"{result['better']:.2f} times {'smaller' if objective == 'bytes' else 'faster'}"
    return f"{text}; {result['apart']} beside it" if result.get("apart") else text


def counts(objective: str, result: Mapping[str, Any]) -> bool:
    """Whether a point is enough better than the best preset, at an accuracy that is not told from the preset's."""
    wanted = {"bytes": SMALLER, "latency": FASTER}.get(objective)
    enough = wanted is not None and (result.get("better") or 0) >= wanted
    return enough and result.get("apart_low", 1) <= 0


def aims(results: Mapping[str, Any]) -> list[list[str]]:
    """What the search is to reach, and what it reached."""
    known = {name: results[name]["objectives"] for name in MODELS if name in results}
    ahead = [name for name, found in known.items() if any(counts(each, result) for each, result in found.items())]
    wanted = (
        f"for 3 models a point {FASTER} times faster or {SMALLER} times smaller than the best preset, at an accuracy "
        "that the paired interval on the reported rows does not tell from the preset's"
    )
    rows = [[wanted, f"{len(ahead)} of {len(known)}: {', '.join(ahead)}", _met(len(ahead) >= 3)]]
    minilm = known.get("minilm", {})
    if (small := minilm.get("small") or minilm.get("bytes")) and small["best"]:
        share, best = small["best"]["bytes"] / small["float_bytes"], small["best"]
        met = share <= SMALL and best["points"] <= SMALL_DROP
        rows.append(["MiniLM, at most 0.2 points: at most 0.2 of the bytes", f"{share:.3f}, {best['drop']}", _met(met)])
    if (same := minilm.get("cosine")) and same["best"]:
        cosine = same["best"]["cosine"]
        rows.append(["MiniLM at int8's bytes: cosine of at least 0.9995", f"{cosine:.5f}", _met(cosine >= 0.9995)])
    trained = known.get("residual", {}).get("trained")
    if trained:
        best = trained["best"]
        found, met = "no candidate held", False
        if best:
            smaller, faster = trained["float_bytes"] / best["bytes"], 1 / best["latency"]
            met = smaller >= 6 and faster >= 3 and best.get("points", 1) <= 0
            found = f"{smaller:.2f} and {faster:.2f}, {best['drop']}"
        rows.append(["residual CNN, trained, at no loss: 6 times fewer bytes, 3 times faster", found, _met(met)])
    if searches := results.get("searches"):
        own, median = searches["optuna"], searches["median"]
        found = f"{own:,} and {median:,.0f} bytes"
        wanted = (
            f"digits, {searches['trials']} trainings: Optuna's best at most the bytes of the median of "
            f"{len(searches['random'])} random searches"
        )
        rows.append([wanted, found, _met(own <= median)])
    return rows


def _met(met: bool) -> str:
    return "met" if met else "missed"


def page(results: Mapping[str, Any]) -> str:
    """The page, from all that was measured so far."""
    parts = ["# Tuning", INTRODUCTION, harness.markdown(["aim", "found", "note"], aims(results))]
    for name in [name for name in MODELS if name in results]:
        found = results[name]
        rows = [row for objective, result in found["objectives"].items() for row in cells(name, objective, result)]
        parts += [f"## {name}", f"{found['data']}.", harness.markdown(HEADER, rows), *_ended(found)]
        presets = _presets(found)
        if presets:
            parts += ["What each preset leaves, at no larger drop on the rows that candidates are chosen by:",
                      harness.markdown(LEFT, presets)]  # fmt: skip
        if found.get("peers"):
            rows = [
                [each[key] for key in ("name", "drop", "bytes", "share", "latency", "note")] for each in found["peers"]
            ]
            parts += ["Beside other tools on the same weights and rows:", harness.markdown(PEERS, rows)]
        parts += [harness.provenance(run) for run in _runs(found)]
    if searches := results.get("searches"):
        each = ", ".join(f"{size:,}" for size in searches["random"])
        said = (
            f"digits, at most 0.5 points lost, {searches['trials']} candidates a search, trained in at most "
            f"{searches['steps']} steps each; a search can be killed and goes on (`benchmarks/searches.py`). "
            f"Bytes of the best: Optuna's {searches['optuna']:,}; of random "
            f"settings, by seed, {each}."
        )
        parts += ["## Searches of training settings", said, harness.provenance(searches["run"])]
    if predicted := results.get("predicted"):
        said = (
            "An MLP of 784-512-10 in float32: microseconds of a call as the TPU's compiler predicts them "
            "(`optimal_seconds`), with which `leptonx tune --slo` compares targets. No TPU was there, so how far off "
            "they are is not known."
        )
        head = ["target", "rows of a call", "predicted, us"]
        parts += ["## Predictions for TPUs", said, harness.markdown(head, predicted["rows"])]
        parts.append(harness.provenance(predicted["run"]))
    return "\n\n".join(parts) + "\n"


def _ended(found: Mapping[str, Any]) -> Iterator[str]:
    for objective, result in found["objectives"].items():
        ranks = ", ".join(f"{kind} {value:.2f}" for kind, value in result["correlations"].items())
        limits = ", ".join(f"{key} {value:,g}" for key, value in result["limits"].items())
        yield (
            f"For {objective} ({limits}): {result['trials']} recipes measured in {result['seconds']:.0f} s (ended: "
            f"{result['stopped']}); rank correlations of estimates and measurements over {result['chosen']} chosen "
            f"ones: {ranks or 'too few'}.{_off(result.get('predicted'))}"
        )


def _off(predicted: Sequence[float] | None) -> str:
    """How far the times that `leptonx tune --slo` takes for a CPU where nothing was measured are off."""
    if not predicted:
        return ""
    middle = statistics.median(predicted)
    return (
        f" Predicted times of these on this CPU were {min(predicted):.2f} to {max(predicted):.2f} times the measured "
        f"ones, the median {middle:.2f} times."
    )


def _presets(found: Mapping[str, Any]) -> list[list[str]]:
    presets: dict[str, dict[str, Any]] = {}
    for result in found["objectives"].values():
        for each in result.get("presets", []):
            known = presets.setdefault(each["name"], dict(each))
            known |= {key: max(known[key], each[key]) for key in ("smaller", "faster")}
    return [
        [each["name"], each["drop"], f"{each['bytes']:,}", f"{each['latency']:.2f}", f"{each['smaller']:.2f}",
         f"{each['faster']:.2f}"]
        for each in presets.values()
    ]  # fmt: skip


def _runs(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The runs that a model's rows are from, each once."""
    runs = [result["run"] for result in found["objectives"].values()]
    runs += [found["peers_run"]] if found.get("peers") else []
    return [run for index, run in enumerate(runs) if run["command"] not in [each["command"] for each in runs[:index]]]
