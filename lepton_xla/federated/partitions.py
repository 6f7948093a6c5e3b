"""Splits rows among clients, for trials: alike, or with other classes for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lepton_xla.errors import FederatedError

if TYPE_CHECKING:
    from jaxtyping import Int

type Rows = Mapping[str, np.ndarray]
"""Columns of rows by name: arrays `[rows, ...]` with equal numbers of rows."""

_TRIES = 1000


def partition(
    rows: Rows, clients: int, *, label: str | None = None, concentration: float = 0.3, seed: int = 0
) -> list[dict[str, np.ndarray]]:
    """Split rows among clients.

    Args:
        rows: the rows; their order does not matter.
        clients: number of clients; each gets at least one row.
        label: a column of classes, which are then spread unevenly: the shares of each class are drawn from a Dirichlet
            distribution (Hsu et al. 2019, arXiv:1909.06335). None deals the rows out evenly.
        concentration: of the distribution: 100 is nearly even, with 0.1 most clients have one or two classes.
        seed: of the split.

    Returns:
        The rows of each client; every row is in one of them.

    Raises:
        FederatedError: if there are fewer rows than clients, columns differ in their numbers of rows, there is no such
            column, or no split gives each client a row.

    >>> parts = lx.federated.partition({"x": np.arange(6), "label": np.array([0, 0, 0, 1, 1, 1])}, 3)
    >>> [len(part["x"]) for part in parts], sorted(np.concatenate([part["x"] for part in parts]).tolist())
    ([2, 2, 2], [0, 1, 2, 3, 4, 5])
    """
    columns = {name: np.asarray(column) for name, column in rows.items()}
    count = rows_of(columns)
    if isinstance(clients, bool) or not isinstance(clients, int) or not 1 <= clients <= count:
        raise FederatedError(f"{count} rows cannot be split among {clients!r} clients, each with at least one")
    random = np.random.default_rng(seed)
    if label is None:
        places = [np.sort(part) for part in np.array_split(random.permutation(count), clients)]
    else:
        if label not in columns:
            raise FederatedError(f"the rows have no column {label!r}; they have {', '.join(columns)}")
        places = _by_label(columns[label], clients, concentration, random)
    return [{name: column[part] for name, column in columns.items()} for part in places]


def place_of(part: str) -> tuple[int, int]:
    """K and N of `K/N`, the client of a trial and how many there are.

    Raises:
        FederatedError: if it is anything else.

    >>> place_of("1/3")
    (1, 3)
    """
    try:
        number, count = (int(text) for text in part.split("/"))
        if not 1 <= number <= count:
            raise ValueError
    except ValueError:
        raise FederatedError(f"part = {part!r}; expected K/N, such as 1/3") from None
    return number, count


def part_of(rows: Rows, part: str, label: str, concentration: float) -> dict[str, np.ndarray]:
    """The rows of one client of a trial.

    Args:
        rows: all rows.
        part: `K/N`.
        label: a column of classes.
        concentration: of `partition`, which then spreads the classes unevenly; 0 deals the rows out evenly.

    Raises:
        FederatedError: if there is no such part, or the rows cannot be split.

    >>> part_of({"x": np.arange(6), "label": np.zeros(6)}, "1/3", "label", 0.0)["x"].shape
    (2,)
    """
    number, count = place_of(part)
    parts = partition(rows, count, label=label if concentration else None, concentration=concentration or 1.0)
    return parts[number - 1]


def rows_of(columns: Mapping[str, Any]) -> int:
    """The number of rows.

    Raises:
        FederatedError: if there is no column or row, or columns differ in it; names two.

    >>> rows_of({"x": np.zeros((3, 2)), "label": np.zeros(3)})
    3
    """
    counts = {name: len(column) if np.ndim(column) else -1 for name, column in columns.items()}
    if not counts or min(counts.values()) < 1:
        raise FederatedError("there are no rows to train on" if counts else "the rows have no column")
    first, *others = counts
    for name in others:
        if counts[name] != counts[first]:
            raise FederatedError(f"column {first!r} has {counts[first]} rows and {name!r} has {counts[name]}")
    return counts[first]


def _by_label(
    labels: np.ndarray, clients: int, concentration: float, random: np.random.Generator
) -> list[Int[np.ndarray, " rows"]]:
    if labels.ndim != 1:
        raise FederatedError(f"labels have the shape {list(labels.shape)}; expected one class for each row")
    if not concentration > 0:
        raise FederatedError(f"concentration = {concentration!r}; expected a number above 0, such as 0.3")
    for _ in range(_TRIES):
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for value in np.unique(labels):
            places = random.permutation(np.flatnonzero(labels == value))
            shares = random.dirichlet(np.full(clients, concentration))
            cuts = np.round(np.cumsum(shares)[:-1] * len(places)).astype(int)
            for part, cut in zip(parts, np.split(places, cuts), strict=True):
                part.append(cut)
        found = [np.sort(np.concatenate(part)) for part in parts]
        if all(map(len, found)):
            return found
    raise FederatedError(
        f"{_TRIES} draws left a client without rows: give a larger concentration than {concentration:g}, or fewer "
        f"than {clients} clients"
    )


def stack(clients: Sequence[Rows]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Columns `[clients, most rows, ...]`, padded with zeros, and the number of rows of each client.

    Raises:
        FederatedError: if there are no clients or no rows, or columns differ in names, shapes or dtypes; names one.

    >>> columns, counts = stack([{"x": np.ones(1)}, {"x": np.ones(2)}])
    >>> columns["x"].tolist(), counts.tolist()
    ([[1.0, 0.0], [1.0, 1.0]], [1, 2])
    """
    tables = [{name: np.asarray(column) for name, column in rows.items()} for rows in clients]
    if not tables:
        raise FederatedError("there are no clients")
    counts: list[int] = []
    kinds: list[dict[str, Any]] = []
    for number, table in enumerate(tables):
        try:
            counts.append(rows_of(table))
        except FederatedError as error:
            raise FederatedError(f"client {number}: {error}") from error
        kinds.append({name: (column.shape[1:], column.dtype) for name, column in table.items()})
        for name in sorted({*kinds[0], *kinds[-1]}):
            if kinds[0].get(name) != kinds[-1].get(name):
                one, other = (_kind(each.get(name)) for each in (kinds[0], kinds[-1]))
                raise FederatedError(f"client {number}: column {name!r} is {other}, and client 0's is {one}")
    columns = {
        name: np.zeros((len(tables), max(counts), *first.shape[1:]), first.dtype) for name, first in tables[0].items()
    }
    for number, table in enumerate(tables):
        for name, column in table.items():
            columns[name][number, : len(column)] = column
    return columns, np.asarray(counts)


def _kind(found: tuple[tuple[int, ...], Any] | None) -> str:
    return "missing" if found is None else f"{found[1]}[rows{''.join(f', {size}' for size in found[0])}]"
