"""Feedback: answers that are kept, and what becomes of labels for them."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from lepton_xla.serve.app.feedback import FeedbackPage
from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.monitor.feedback import Feedback
from lepton_xla.serve.observe.server_metrics import LATE_S, MOST_KEPT, ServerMetrics
from lepton_xla.serve.protocol.monitoring import MAX_ID


def answer(*classes, of=4):
    return np.eye(of, dtype=np.float32)[list(classes)].tobytes()


def known(feedback, ids):
    """Those of some ids whose answer is kept, or was judged."""
    return [request_id for request_id, *_ in feedback.hold({each: [0] for each in ids})[0]]


@pytest.fixture
def feedback():
    return Feedback(np.dtype("float32"), classes=4, most=3)


def test_a_confusion_by_hand(feedback):
    feedback.remember("a", answer(0, 1, 1, 3))
    feedback.remember("b", answer(2))
    assert feedback.judge({"a": [0, 1, 2, 1], "b": [2]}) == 5
    assert (feedback.right, feedback.wrong) == (3, 2)
    # label -> answered right, rows of the class, rows answered so
    assert feedback.labels == {"0": [1, 1, 1], "1": [1, 2, 2], "2": [1, 2, 1], "3": [0, 0, 1]}


def test_an_answer_that_is_no_number_is_wrong_whatever_the_label(feedback):
    feedback.remember("a", np.float32([[np.nan] * 4, [0, 1, np.nan, 0]]).tobytes())
    assert feedback.judge({"a": [0, 2]}) == 2
    assert (feedback.right, feedback.wrong) == (0, 2)
    assert feedback.labels == {"0": [0, 1, 0], "2": [0, 1, 0]}


@pytest.mark.parametrize(
    ("labels", "status"),
    [({"b": [0]}, 404), ({"a": [0, 1]}, 400), ({"a": [4]}, 400), ({"a": [0], "b": [0]}, 404)],
)
def test_what_does_not_fit_is_refused_whole(feedback, labels, status):
    feedback.remember("a", answer(0))
    with pytest.raises(HTTPError) as caught:
        feedback.judge(labels)
    assert caught.value.status == status
    assert (feedback.right, feedback.wrong, feedback.labels) == (0, 0, {})
    assert feedback.judge({"a": [0]}) == 1


def test_a_body_of_many_is_counted_as_a_loop_counts():
    draw = np.random.default_rng(0)
    feedback, confusion, labels = Feedback(np.dtype("float32"), classes=5), np.zeros((5, 5), int), {}
    for number in range(300):
        rows = np.float32(draw.normal(size=(draw.integers(1, 4), 5)))
        feedback.remember(str(number), memoryview(rows.tobytes()))
        labels[str(number)] = draw.integers(0, 5, len(rows)).tolist()
        for label, answer in zip(labels[str(number)], rows.argmax(1), strict=True):
            confusion[label, answer] += 1
    assert feedback.judge(dict(list(labels.items())[:100])) == sum(len(each) for each in list(labels.values())[:100])
    assert feedback.judge(labels) == confusion.sum()
    assert (feedback.right, feedback.wrong) == (confusion.trace(), confusion.sum() - confusion.trace())
    for each in range(5):
        assert feedback.labels[str(each)] == [confusion[each, each], confusion[each].sum(), confusion[:, each].sum()]


def test_the_same_feedback_may_come_again_and_no_other(feedback):
    """A client whose answer was lost asks again."""
    told = []
    feedback.taken = told.append
    feedback.remember("a", answer(0, 1))
    feedback.remember("b", answer(2))
    for labels in ({"a": [0, 2]}, {"a": [0, 2]}, {"a": [0, 2], "b": [2]}):
        assert feedback.judge(labels) == sum(map(len, labels.values()))
    assert (feedback.right, feedback.wrong) == (2, 1)
    assert told == [{"a": [0, 2]}, {"b": [2]}]
    with pytest.raises(HTTPError) as caught:
        feedback.judge({"a": [0, 1]})
    assert (caught.value.status, feedback.right) == (409, 2)


def test_only_the_latest_answers_are_kept(feedback):
    for name in "abcd":
        feedback.remember(name, answer(0))
    assert known(feedback, "abcd") == ["b", "c", "d"]
    feedback.remember("b", answer(1))  # the same id again: the later answer is meant
    feedback.remember("e", answer(0))
    assert known(feedback, "bcde") == ["b", "d", "e"]
    feedback.judge({"b": [1]})
    assert feedback.right == 1


def test_old_answers_are_dropped_many_at_a_time():
    feedback = Feedback(np.dtype("float32"), classes=4, most=320)
    for number in range(1, 1001):
        feedback.remember(str(number), answer(0))
        kept = known(feedback, map(str, range(number + 1)))
        assert min(number, 301) <= len(kept) == feedback.count <= 320
        assert kept == [str(each) for each in range(number - len(kept) + 1, number + 1)]


def test_the_bytes_of_answers_and_their_ids_are_bounded():
    feedback = Feedback(np.dtype("float32"), classes=4, most_bytes=(16 + 3) * 64)
    for number in range(100, 1000):
        feedback.remember(str(number), answer(0))
    assert len(known(feedback, map(str, range(1000)))) == 64
    feedback.remember("large", answer(*[0] * 100))
    assert not known(feedback, ["large"])
    for number in range(936, 1000):
        feedback.judge({str(number): [0]})
    assert feedback.nbytes == 3 * 64
    for number in range(100):
        feedback.remember(f"{number}".zfill(MAX_ID), answer(0))
    assert known(feedback, ["98".zfill(MAX_ID), "99".zfill(MAX_ID)]) == ["98".zfill(MAX_ID), "99".zfill(MAX_ID)]
    assert (feedback.count, feedback.nbytes) == (2, 2 * (16 + MAX_ID))
    feedback.remember("x" * (MAX_ID + 1), answer(0))  # no feedback can name it
    assert feedback.count == 2


@pytest.fixture
def closing():
    """Counters of a server, and a function that opens versions with some answers and closes them."""
    clock = SimpleNamespace(now=0.0)
    metrics = ServerMetrics(lambda: clock.now)

    def closed(version, answers, rows=1, model="m"):
        monitor = metrics.opened(model, version).monitor = SimpleNamespace(
            feedback=Feedback(np.dtype("float32"), classes=4)
        )
        for number in range(answers):
            monitor.feedback.remember(f"{version}:{number}", answer(*[0] * rows))
        metrics.closed(model, version)
        return monitor.feedback

    return metrics, clock, closed


def test_a_version_that_is_loaded_no_more_takes_late_feedback_for_a_while(feedback, closing):
    metrics, clock, _ = closing
    counted = metrics.opened("m", "1")
    counted.monitor = SimpleNamespace(feedback=feedback)
    metrics.opened("m", "1")  # a new one takes over before the old one is gone
    for name in "ab":
        feedback.remember(name, answer(0))
    metrics.closed("m", "1")
    clock.now = 2 * LATE_S
    assert (metrics.judges("m"), known(feedback, "ab")) == ([feedback], ["a", "b"])
    metrics.closed("m", "1")
    clock.now += LATE_S
    assert (metrics.judges("m"), metrics.judges("other")) == ([feedback], [])
    feedback.judge({"a": [0]})
    clock.now += 1.0
    metrics.bring_up_to_date()  # as every second; no feedback need come
    assert (metrics.judges("m"), known(feedback, "ab"), feedback.nbytes, feedback.right) == ([], [], 0, 1)


def test_one_that_comes_back_is_closed_anew(closing):
    metrics, clock, closed = closing
    one = closed("1", 3)
    metrics.opened("m", "1")
    two = closed("2", 3)
    clock.now = 2 * LATE_S
    assert metrics.judges("m") == [one]
    metrics.closed("m", "1")
    clock.now += LATE_S
    assert (metrics.judges("m"), one.count, two.count) == ([one], 3, 0)


def test_answers_of_closed_versions_are_bounded_together(closing):
    metrics, _, closed = closing
    many = [closed(str(number), 30_000) for number in range(5)]
    assert metrics.judges("m") == many[:1:-1]  # three have 90,000
    large = [closed(str(number), 100, 1 << 14, model="large") for number in range(4)]  # 26 MB each
    assert [each.count for each in many] == [0] * 5
    assert metrics.judges("large") == large[:1:-1]
    few = [closed(str(number), 1, model="few") for number in range(100)]
    assert metrics.judges("few") == few[: -MOST_KEPT - 1 : -1]


@pytest.mark.parametrize("meanwhile", ["dropped", "judged", "answered anew"])
def test_what_happens_while_others_count_leaves_the_feedback_whole(meanwhile):
    metrics = ServerMetrics()
    own = metrics.opened("m", "1")
    own.monitor = SimpleNamespace(feedback=Feedback(np.dtype("float32"), classes=4))
    feedback = own.monitor.feedback
    feedback.remember("here", answer(1), 0.5)

    class Others:
        async def judge(self, model, labels):
            assert labels == {"there": [2]}
            if meanwhile == "dropped":
                feedback.forget()
            elif meanwhile == "judged":
                feedback.judge({"here": [1]})
            else:
                feedback.remember("here", answer(3))
            return 1

    page = FeedbackPage(metrics, lambda *refused: None, Others())
    model = SimpleNamespace(signature=SimpleNamespace(name="m"))
    taken = asyncio.run(page._judge(model, {"here": [1], "there": [2]}))
    assert (taken.rows, feedback.right, feedback.wrong) == (2, 1, 0)
    kept = {"dropped": 0, "judged": len("here"), "answered anew": len("here") + 16}[meanwhile]
    assert feedback.nbytes == kept
    if meanwhile == "answered anew":
        assert feedback.judge({"here": [3]}) == 1
        assert feedback.right == 2
