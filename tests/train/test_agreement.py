"""What processes agree on: threads stand for them, and a dict for JAX's coordinator."""

import concurrent.futures
import threading

import jax
import pytest

import lepton_xla as lx
from lepton_xla import _compat
from lepton_xla.train.agreement import Agreement, OtherProcessError, problem_of

COUNT = 3


class Board(dict):
    """The coordinator's store."""

    def key_value_set(self, name, text):
        assert name not in self  # the coordinator refuses to replace
        self[name] = text

    def key_value_dir_get(self, folder):
        return [(name, text) for name, text in list(self.items()) if name.startswith(folder)]

    def key_value_delete(self, name):
        del self[name]


@pytest.fixture
def board(monkeypatch):
    board, local = Board(), threading.local()
    monkeypatch.setattr(jax, "process_count", lambda: COUNT)
    monkeypatch.setattr(jax, "process_index", lambda: local.index)
    monkeypatch.setattr(_compat, "coordinator", lambda: board)
    board.local = local
    return board


@pytest.fixture
def each(board):
    """Runs a function in each process; gives what each returned."""

    def run(function):
        def one(index):
            board.local.index = index
            agreements[index]._name = "run"
            return function(index, agreements[index])

        with concurrent.futures.ThreadPoolExecutor(COUNT) as pool:
            return list(pool.map(one, range(COUNT)))

    agreements = [Agreement() for _ in range(COUNT)]
    return run


def test_all_see_the_first_problem(each):
    assert each(lambda index, one: one.problem(None)) == [None] * COUNT
    found = each(lambda index, one: one.problem([None, "no space", "no rights"][index]))
    assert found == ["process 1: no space"] * COUNT


def test_the_one_that_failed_is_named_and_not_those_that_failed_for_it(each):
    other = problem_of(OtherProcessError())
    assert each(lambda index, one: one.problem([other, other, "no space"][index])) == ["process 2: no space"] * COUNT
    assert each(lambda index, one: one.problem([None, other, None][index])) == [f"process 1: {other}"] * COUNT


def test_the_first_ones_text_is_that_of_all(each):
    long = "x" * 10_000
    assert each(lambda index, one: one.first(long + str(index))) == [long + "0"] * COUNT


def test_one_that_skips_barriers_of_a_save_ends_it_for_all(each):
    def save(index, one, fails):
        one.begin_save()
        passed = []
        for key in ("start", "written", "committed", "end"):
            if fails and index == 1 and key in ("written", "committed"):
                continue
            try:
                one.barrier(key=key, timeout_ms=10_000)
            except OtherProcessError:
                continue
            passed.append(key)
        return passed

    whole = ["start", "written", "committed", "end"]
    assert each(lambda index, one: save(index, one, fails=False)) == [whole] * COUNT
    assert each(lambda index, one: save(index, one, fails=True)) == [["start"]] * COUNT
    assert each(lambda index, one: save(index, one, fails=False)) == [whole] * COUNT


def test_what_was_read_is_removed(board, each):
    for _ in range(20):
        each(lambda index, one: (one.first("a"), one.begin_save(), one.barrier(key="end", timeout_ms=10_000)))
    assert len(board) == COUNT


def test_waiting_has_an_end(board):
    board.local.index = 0
    with pytest.raises(lx.CheckpointError, match=r"2 of 3 processes did not come to ask-1 within"):
        Agreement(0.05).problem(None)


def test_the_reason_of_a_long_error_is_kept():
    """TensorStore's: the file first, what was wrong with it last."""
    error = ValueError("Error writing 'w' in " + "folder/" * 100 + ": No space left on device")
    assert problem_of(error).endswith("No space left on device")
    assert problem_of(error).startswith("Error writing 'w'")
    assert len(problem_of(error)) < 300
    later = OtherProcessError()
    later.__context__ = error
    assert problem_of(later) == problem_of(error)
