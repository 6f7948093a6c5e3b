"""Chooses one thing for each group within budgets, exactly: an integer program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

type Costs = Mapping[str, Sequence[np.ndarray]]
"""Kind of cost -> for each group float64 [choices]: what each choice costs."""

# Costs and limits of very different sizes are scaled to 1, and a sum may exceed its limit by this share of it.
TOLERANCE = 1e-7


def choose_within(costs: Costs, objective: Mapping[str, float], limits: Mapping[str, float]) -> tuple[int, ...] | None:
    """Choose for each group what together costs least, within limits.

    Solved by `scipy.optimize.milp` (HiGHS) to optimality, with one binary variable for each choice of each group.

    Args:
        costs: what each choice for each group costs.
        objective: kind of cost -> its weight in what is to be least.
        limits: kind of cost -> what the sum over all groups must not exceed.

    Returns:
        For each group the index of its choice; None if no choice keeps to the limits.

    >>> size, error = [np.array([4.0, 1.0]), np.array([8.0, 2.0])], [np.array([0.0, 3.0]), np.array([0.0, 1.0])]
    >>> costs = {"bytes": size, "error": error}
    >>> choose_within(costs, {"error": 1.0}, {"bytes": 7.0})
    (0, 1)
    >>> choose_within(costs, {"error": 1.0}, {"bytes": 2.0}) is None
    True
    """
    from scipy.optimize import LinearConstraint, milp
    from scipy.sparse import csr_array

    sizes = [len(each) for each in next(iter(costs.values()), ())]
    if not sizes:
        return () if all(limit >= 0 for limit in limits.values()) else None
    rows = {kind: np.concatenate([np.asarray(each, np.float64) for each in costs[kind]]) for kind in costs}
    wanted = np.zeros(sum(sizes))
    for kind, weight in objective.items():
        wanted += weight * rows[kind]
    scale = np.abs(wanted).max()
    owners = np.repeat(np.arange(len(sizes)), sizes)
    one_each = csr_array((np.ones(len(owners)), (owners, np.arange(len(owners)))))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for kind, limit in limits.items():
        unit = max(abs(limit), np.abs(rows[kind]).max() * 1e-9, 1e-300)
        constraints.append(LinearConstraint(rows[kind][None] / unit, -np.inf, limit / unit + TOLERANCE))
    found = milp(
        wanted / (scale or 1.0),
        constraints=constraints,
        integrality=np.ones(len(wanted)),
        bounds=(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        return None
    ends = np.cumsum(sizes)[:-1]
    return tuple(int(np.argmax(part)) for part in np.split(np.asarray(found.x), ends))


def total(costs: Costs, kind: str, picked: Sequence[int]) -> float:
    """What a choice for each group costs together.

    >>> total({"bytes": [np.array([4.0, 1.0]), np.array([8.0, 2.0])]}, "bytes", (0, 1))
    6.0
    """
    return float(sum(each[index] for each, index in zip(costs[kind], picked, strict=True)))
