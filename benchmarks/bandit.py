"""Regret of sharing requests by Thompson sampling, beside equal shares, a rollout, and always the best version.

    python benchmarks/bandit.py [--seeds 20 | --quick] [--json FILE]

Simulated with the server's own code: the shares are those of `serve/traffic/bandit.py`, computed anew every so many
requests, with a least share for each version, and the feedback comes one update late. Regret is the number of answers
that would have been right with the best version and were not, in expectation. The off-policy estimate is made from the
rows with their propensities, and its error is over the seeds; `naive` is the share of right answers of all rows.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np

from lepton_xla.cli.tables import Table, show
from lepton_xla.serve.traffic.bandit import Rewards, off_policy, propensities, surely_best

SCENES = {
    "two, 5 points apart": (0.90, 0.95),
    "two, 1 point apart": (0.94, 0.95),
    "five": (0.80, 0.85, 0.90, 0.92, 0.95),
    "two, equal": (0.95, 0.95),
}
REQUESTS, EVERY, LEAST = 20_000, 200, 0.02


def simulate(accuracy: tuple[float, ...], seed: int, requests: int, policy: str) -> dict[str, Any]:
    """One run: regret, the requests until one arm is surely the best, and the estimates of all arms."""
    draw = np.random.default_rng(seed)
    arms = [str(number) for number in range(len(accuracy))]
    shares = dict.fromkeys(arms, 1 / len(arms))
    right, wrong = dict.fromkeys(arms, 0), dict.fromkeys(arms, 0)
    sums = {arm: np.zeros(5) for arm in arms}
    regret, sure_at, chosen, late = 0.0, None, None, dict[str, tuple[int, int]]()
    for start in range(0, requests, EVERY):
        for arm, (good, bad) in late.items():
            right[arm], wrong[arm] = right[arm] + good, wrong[arm] + bad
        if policy == "Thompson":
            shares = propensities({arm: Rewards(right[arm], wrong[arm]) for arm in arms}, LEAST, seed=seed + start)
        counts = draw.multinomial(EVERY, [shares[arm] for arm in arms])
        late = {}
        for arm, count, accurate in zip(arms, counts, accuracy, strict=True):
            good = int(draw.binomial(count, accurate))
            late[arm] = good, int(count) - good
            weight = 1 / shares[arm]
            sums[arm] += [count, count * weight, count * weight**2, good * weight, good * weight**2]
            regret += count * (max(accuracy) - accurate)
        best = surely_best({arm: off_policy(sums[arm].tolist()) for arm in arms})
        if best is not None and sure_at is None:
            sure_at, chosen = start + EVERY, best
    return {
        "regret": regret,
        "sure_at": sure_at,
        "chose_wrong": chosen is not None and accuracy[int(chosen)] < max(accuracy),
        "estimates": [off_policy(sums[arm].tolist()).value for arm in arms],
        "naive": [(right[arm] + late[arm][0]) / max(sums[arm][0], 1) for arm in arms],
    }


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="few seeds and requests: to see that it runs")
    parser.add_argument("--json", metavar="FILE", help="write all figures here")
    options = parser.parse_args()
    seeds, requests = (3, 2000) if options.quick else (options.seeds, REQUESTS)
    rows: list[dict[str, Any]] = []
    for scene, accuracy in SCENES.items():
        for policy in ("Thompson", "equal shares"):
            runs = [simulate(accuracy, seed, requests, policy) for seed in range(seeds)]
            regrets = np.array([run["regret"] for run in runs])
            sure = [run["sure_at"] for run in runs if run["sure_at"] is not None]
            errors = np.array([run["estimates"] for run in runs]) - np.array(accuracy)
            rows.append(
                {
                    "scene": scene, "policy": policy, "regret": float(regrets.mean()),
                    "regret_least": float(regrets.min()), "regret_most": float(regrets.max()), "sure": len(sure),
                    "sure_at": float(np.median(sure)) if sure else None,
                    "chose_wrong": sum(run["chose_wrong"] for run in runs),
                    "estimate_bias": float(np.nanmean(errors)),
                    "estimate_error": float(np.sqrt(np.nanmean(errors**2))),
                }
            )  # fmt: skip
        rows.append({"scene": scene, "policy": "always the best", "regret": 0.0})
    cells = [
        (
            row["scene"], row["policy"], f"{row['regret']:.0f}",
            f"{row['regret_least']:.0f} to {row['regret_most']:.0f}" if "regret_least" in row else "",
            f"{row['sure']} of {seeds}" if "sure" in row else "",
            f"{row['sure_at']:.0f}" if row.get("sure_at") else "", row.get("chose_wrong", ""),
            f"{100 * row['estimate_bias']:+.2f} ± {100 * row['estimate_error']:.2f}" if "estimate_bias" in row else "",
        )
        for row in rows
    ]  # fmt: skip
    columns = ("versions", "policy", ">regret", ">of seeds", ">surely best", ">after", ">wrongly", ">estimate, points")
    show(Table(f"{seeds} seeds of {requests} requests", columns, cells))
    print("repeat with: python benchmarks/bandit.py" + " --quick" * options.quick)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"seeds": seeds, "requests": requests, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
