"""How good a ranking is, and two rankings that need no network."""

from __future__ import annotations

import numpy as np

CANDIDATES, TOP = 99, 20


def judge(scores: np.ndarray, last: np.ndarray, seen: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Rank the left-out film of each user among all unseen films, and among 99 unseen ones drawn uniformly.

    Args:
        scores: of each film, `[users, films + 1]`.
        last: the left-out film.
        seen: which films are out of the question.
        seed: of the draw.

    Returns:
        Of all films `recall@20`, `precision@20` and `ndcg@20`; of 100 `pairwise` accuracy and the hit rate `hit@20`.
    """
    random, users = np.random.default_rng(seed), np.arange(len(last))
    own = scores[users, last]
    # A score that equals the film's own counts half.
    rivals = np.where(seen, -np.inf, scores)
    rivals[users, last] = -np.inf
    rank = (rivals > own[:, None]).sum(1) + (rivals == own[:, None]).sum(1) / 2
    hit = rank < TOP
    pairs = np.zeros(len(last))
    for user in users:
        free = ~seen[user]
        free[last[user]] = False
        drawn = random.choice(np.flatnonzero(free), CANDIDATES, replace=False)
        pairs[user] = (scores[user, drawn] < own[user]).sum() + (scores[user, drawn] == own[user]).sum() / 2
    return {
        "recall@20": float(hit.mean()),
        "precision@20": float(hit.mean() / TOP),
        "ndcg@20": float(np.where(hit, 1 / np.log2(rank + 2), 0).mean()),
        "pairwise": float(pairs.mean() / CANDIDATES),
        "hit@20": float((CANDIDATES - pairs < TOP).mean()),
    }


def popularity(sessions: list[np.ndarray], films: int) -> np.ndarray:
    """How many users saw each film, leaving out everybody's last, `[users, films + 1]`."""
    counts = np.bincount(np.concatenate([session[:-1] for session in sessions]), minlength=films + 1)
    return np.broadcast_to(counts.astype(np.float64), (len(sessions), films + 1))


def item_neighbours(sessions: list[np.ndarray], films: int, recent: int = 50) -> np.ndarray:
    """Item-kNN: the cosine of each film's users with those of a session's films, added up (Sarwar et al. 2001)."""
    seen = np.zeros((len(sessions), films + 1), np.float32)
    for row, session in zip(seen, sessions, strict=True):
        row[session[:-1]] = 1
    # A little regularization, so that films of one user do not have cosines of one.
    scaled = seen / np.sqrt(seen.sum(0) + 5.0)
    found = np.zeros((len(sessions), films + 1))
    for user, session in enumerate(sessions):
        found[user] = (scaled[:, session[:-1][-recent:]].sum(1)) @ scaled
    return found
