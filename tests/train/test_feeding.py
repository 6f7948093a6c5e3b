"""Batches: what is taken, where it goes on, and what is refused."""

import grain
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.train.feeding import Feed

COUNT = 7


def rows(index):
    return {"x": np.full((2, 3), index, np.float32)}


class Twice:
    """An iterable that is begun again."""

    def __iter__(self):
        return map(rows, range(COUNT))


def dataset():
    return grain.MapDataset.source([{"x": np.full(3, index, np.float32)} for index in range(2 * COUNT)]).batch(2)


class Rows:
    """What Grain's loader reads from; it compares the text of the source."""

    def __repr__(self):
        return "Rows()"

    def __len__(self):
        return 2 * COUNT

    def __getitem__(self, index):
        return {"x": np.full(3, index, np.float32)}


def loader():
    sampler = grain.samplers.IndexSampler(2 * COUNT, shuffle=True, seed=3, num_epochs=1)
    return grain.DataLoader(data_source=Rows(), sampler=sampler, operations=[grain.transforms.Batch(2)], worker_count=0)


KINDS = {
    "function": lambda: lambda index: rows(index % COUNT),
    "list": lambda: [rows(index) for index in range(COUNT)],
    "iterable": Twice,
    "generator": lambda: map(rows, (index % COUNT for index in range(3 * COUNT))),
    "grain map": lambda: dataset().shuffle(3),
    "grain iter": lambda: dataset().shuffle(3).to_iter_dataset(),
    "grain loader": lambda: loader(),
}


def values(feed, count):
    return [feed.next()["x"].tolist() for _ in range(count)]


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_goes_on_where_it_was(make):
    whole = values(Feed(make()), 20)
    assert whole[:COUNT] == whole[COUNT : 2 * COUNT]  # a second pass, whole and in the same order
    assert len({str(value) for value in whole[:COUNT]}) == COUNT
    for before in (0, 3, COUNT, COUNT + 2):
        feed = Feed(make())
        values(feed, before)
        position = feed.position()
        again = Feed(make())
        again.seek(position)
        assert values(again, 20 - before) == whole[before:]


def test_can_go_on_after_going_back():
    feed = Feed([rows(index) for index in range(COUNT)])
    values(feed, 2)
    position = feed.position()
    first = values(feed, 3)
    feed.seek(position)
    assert values(feed, 3) == first


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "the data is empty"),
        (iter([]), "the data is empty"),
        (iter([rows(0)]), "ended after 1 batches"),
        (rows(0), "the data is a dict"),
        (5, "the data is a int"),
        ([[1.0]], "batch 0 of the data is a list"),
        ([{}], "batch 0 of the data is a dict"),
        ([{"x": np.zeros((2, 3)), "y": np.zeros(3)}], "numbers of rows"),
        ([{"x": np.zeros((0, 3))}], "numbers of rows"),
        ([{"x": np.float32(1)}], "'x' is no array with rows"),
        ([{"x": np.array(["a", None])}], "'x' is no array with rows"),
        ([rows(0), {"x": np.zeros((2, 4), np.float32)}], r"'x' is float32\[2, 4\], in the first batch float32\[2, 3\]"),
        ([rows(0), {"x": np.zeros((2, 3), np.int32)}], r"'x' is int32\[2, 3\], in the first batch float32"),
        ([rows(0), {"z": np.zeros((2, 3))}], "'x' is missing"),
    ],
)
def test_refuses(data, said):
    with pytest.raises(lx.TrainingError, match=said):
        values(Feed(data), 2)


@pytest.mark.parametrize("position", [{}, {"batches": "x"}, {"batches": 99, "taken": 99}, {"batches": 1}])
def test_refuses_a_position_of_other_data(position):
    with pytest.raises(lx.TrainingError, match="cannot go on at"):
        Feed(Twice()).seek(position)
