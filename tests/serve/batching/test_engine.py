"""Rows in, rows out: what the engine copies where."""

import threading
import time
import weakref

import numpy as np
import pytest
from serve_fakes import Tokens

from lepton_xla.errors import ArtifactError
from lepton_xla.serve.batching.engine import Engine, Staging, Timing, Work
from lepton_xla.serve.batching.tickets import Batch, Part
from lepton_xla.serve.protocol.signature import signature_of
from lepton_xla.serve.protocol.wire import InferRequest, RequestSpec

SIGNATURE = signature_of(Tokens())


def work(tokens):
    rows, seq = tokens.shape
    key = 4 if seq <= 4 else 8
    spec = RequestSpec(
        rows=rows, key=(key,), sizes={"batch": rows, "seq": seq}, cut=seq != key, slices=(), tail_bytes=0,
        outputs=((0, True), (1, True)),
    )  # fmt: skip
    return Work(rows, (key,), 0.0, request=InferRequest(spec, [memoryview(tokens.tobytes())], tokens.nbytes))


@pytest.mark.parametrize("key", [4, 8])
@pytest.mark.parametrize("seqs", [(3, 3), (3, 4), (4, 2), (4, 4)])
def test_each_request_of_a_padded_batch_gets_its_own_rows(key, seqs):
    given = [np.arange(1, 1 + rows * seq, dtype=np.int32).reshape(rows, seq) * 100 ** rows for rows, seq in
             zip((1, 2), seqs, strict=True)]  # fmt: skip
    works = [work(tokens) for tokens in given]
    batch = Batch([Part(works[0], 0, 1, 0), Part(works[1], 0, 2, 1)], 3, 4, (key,))
    completion = Engine(Tokens(), SIGNATURE).execute(batch)
    for part, tokens in zip(batch.parts, given, strict=True):
        out, length = completion.results(part, SIGNATURE.outputs)
        np.testing.assert_array_equal(np.frombuffer(out, np.int32).reshape(tokens.shape), tokens + 1)
        np.testing.assert_array_equal(np.frombuffer(length, np.int32), tokens.shape[1])


def test_a_request_split_over_batches_is_cut_piece_by_piece():
    tokens = np.arange(1, 16, dtype=np.int32).reshape(5, 3)
    ticket = work(tokens)
    engine = Engine(Tokens(), SIGNATURE)
    for part in (Part(ticket, 0, 3, 1), Part(ticket, 3, 2, 0)):
        other = Part(work(np.full((1, 3), 7, np.int32)), 0, 1, 0 if part.offset else 2)
        completion = engine.execute(Batch([part, other], part.rows + 1, 4, (4,)))
        out, _ = completion.results(part, SIGNATURE.outputs)
        kept = tokens[part.start : part.start + part.rows]
        np.testing.assert_array_equal(np.frombuffer(out, np.int32).reshape(kept.shape), kept + 1)


def test_engines_that_share_their_arrays_leave_one_another_no_rows():
    seen = []

    class Seeing(Tokens):
        def run(self, sizes, arrays):
            seen.append((arrays[0].ctypes.data, arrays[0].copy()))
            held.append(weakref.ref(arrays[0]))
            return super().run(sizes, arrays)

    held = []
    staging = Staging()
    engines = [Engine(Seeing(), SIGNATURE, staging=staging) for _ in range(2)]
    many, few = work(np.full((4, 4), 7, np.int32)), work(np.full((3, 4), 5, np.int32))
    for engine, ticket in zip(engines, (many, few), strict=True):
        engine.execute(Batch([Part(ticket, 0, ticket.rows, 0)], ticket.rows, 4, (4,)))
    (first, _), (second, rows) = seen
    assert first == second
    np.testing.assert_array_equal(rows, [[5] * 4] * 3 + [[0] * 4])
    # Arrays of their own for those that may run at once, and none that nobody holds.
    Engine(Seeing(), SIGNATURE).execute(Batch([Part(few, 0, 3, 0)], 3, 4, (4,)))
    assert seen[-1][0] != first
    for engine in engines:
        engine.free()
    assert [each() for each in held[:2]] == [None, None]


def test_how_many_processors_executions_keep_busy_is_measured():
    class Busy(Tokens):
        def run(self, sizes, arrays):
            until = time.thread_time() + 1e-3
            while time.thread_time() < until:
                pass
            return super().run(sizes, arrays)

    class Asleep(Tokens):
        def run(self, sizes, arrays):
            time.sleep(1e-3)
            return super().run(sizes, arrays)

    busy, asleep = Engine(Busy(), SIGNATURE), Engine(Asleep(), SIGNATURE)
    busy.warm_up()
    asleep.warm_up()
    assert 0 < 2 * asleep.busy_processors < busy.busy_processors < 1.5


class Paced(Tokens):
    """Takes so long, by a clock of its own: no test depends on what else the machine does."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.now = seconds, 0.0

    def run(self, sizes, arrays):
        self.now += self.seconds
        return super().run(sizes, arrays)


def paced(model):
    return Engine(model, SIGNATURE, clock=lambda: model.now)


def test_times_of_a_like_model_are_taken_if_a_few_runs_agree():
    first = paced(Paced(2e-3))
    measured = first.warm_up()
    same = Paced(2e-3)
    second = paced(same)
    assert second.warm_up(like=first) == measured
    assert second.busy_processors == first.busy_processors
    assert len(same.runs) == 4 * 4, "one run and three more of each of four sizes"
    slower = paced(Paced(8e-3))
    assert all(
        seconds == pytest.approx(8e-3) for sizes in slower.warm_up(like=first).values() for seconds in sizes.values()
    )


def test_the_same_code_is_run_once_and_its_times_are_taken():
    first, servable = paced(Paced(2e-3)), Tokens()
    second = Engine(servable, SIGNATURE)
    assert second.warm_up(like=first, same_code=True) != first.measured, "that one was not measured"
    measured = first.warm_up()
    servable.runs.clear()
    third = Engine(servable, SIGNATURE)
    assert third.warm_up(like=first, same_code=True) is measured
    assert set(servable.runs) == {(1, 4)}
    assert third.busy_processors == first.busy_processors


def test_sizes_that_take_long_are_left_for_later_and_estimated():
    slow = Paced(0.03)
    engine = paced(slow)
    measured = engine.warm_up(within_s=0.1)
    smallest = measured[4,][1]
    assert set(slow.runs) == {(1, 4)}, "only the smallest was run"
    assert smallest == pytest.approx(0.03)
    # As many bytes, as much time: the other batch size has 4 rows, the other length 8.
    assert measured[4,][4] == pytest.approx(4 * smallest)
    assert measured[8,][1] == pytest.approx(2 * smallest)
    learned = {}
    engine.warm_up_rest(lambda function: function(), lambda key, size, seconds: learned.update({(key, size): seconds}))
    assert set(learned) == {((4,), 4), ((8,), 1), ((8,), 4)}
    assert all(seconds == pytest.approx(0.03) for seconds in learned.values())
    slow.runs.clear()
    engine.warm_up_rest(lambda function: function(), lambda *_: pytest.fail("nothing is left"))
    assert not slow.runs
    quick = Engine(Tokens(), SIGNATURE)
    quick.warm_up(within_s=1.0)
    quick.warm_up_rest(lambda function: function(), lambda *_: pytest.fail("all was run"))


def test_each_size_of_the_same_program_is_run_once_and_known_times_are_taken():
    kept, servable = Timing({(4,): {1: 2.0, 8: 3.0}}, 0.7), Tokens()
    engine = Engine(servable, SIGNATURE)
    assert engine.warm_up(like=kept, same_program=True) is kept.measured
    sizes = [(size, *key) for key in SIGNATURE.shape_keys() for size in SIGNATURE.bucket_sizes]
    assert sorted(servable.runs) == sorted(sizes)
    assert engine.busy_processors == 0.7


@pytest.mark.parametrize("error", [None, ArtifactError("the tokenizer cannot be read")])
def test_the_tokenizer_is_read_when_the_model_warms_up_and_not_at_the_first_request(error):
    read = []

    class Generating(Tokens):
        stepper = object()

        @property
        def generator(self):
            read.append(threading.current_thread())
            if error is not None:
                raise error
            return object()

    Engine(Generating(), SIGNATURE).warm_up()
    assert read == [threading.current_thread()]


def test_a_batch_that_nobody_waits_for_is_not_run():
    servable = Tokens()
    works = [work(np.ones((1, 4), np.int32)) for _ in range(2)]
    batch = Batch([Part(works[0], 0, 1, 0), Part(works[1], 0, 1, 1)], 2, 4, (4,))
    engine = Engine(servable, SIGNATURE)
    works[0].closed = True
    assert engine.execute(batch).outputs
    works[1].closed = True
    assert not engine.execute(batch).outputs
    assert servable.runs == [(4, 4)]
