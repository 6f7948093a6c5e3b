"""What all workers hold, as the budget of memory sees it."""

import gc
import time
import weakref

from lepton_xla.serve.models.changes import Change, Source
from lepton_xla.serve.models.settings import Serving
from lepton_xla.serve.processes.child import Child
from lepton_xla.serve.processes.roster import Roster


def test_a_version_takes_what_it_takes_in_the_worker_where_it_is_largest_until_it_is_freed():
    workers = [Child("one"), Child("two")]
    roster = Roster(workers)
    roster.prepared(1, {"1": 10})
    roster.prepared(1, {"1": 12})
    pinned = Source("m/1.lepton", serving=Serving(pinned=True))
    assert roster.committed(1, Change("m", {"1": pinned})) == []
    (kept,) = roster
    assert (kept.name, kept.nbytes, kept.pinned, kept.devices, roster.names()) == ("m", 12, True, (0,), ["m"])
    roster.prepared(2, {"2": 5})
    gone = roster.committed(2, Change("m", {"2": Source("m/2.lepton")}, retire=("1",)))
    assert gone == [kept]
    assert [each.nbytes for each in roster] == [5]
    told = weakref.ref(kept)
    del kept
    assert told() is not None  # some worker has it still
    gone.clear()
    gc.collect()
    assert told() is None
    assert len(roster.committed(3, Change("m", retire=("2",)))) == 1
    assert roster.names() == []


def test_use_is_what_any_worker_has_reported_last():
    workers = [Child("one"), Child("two")]
    roster = Roster(workers)
    before = time.time()
    roster.prepared(1, {"1": 70})
    roster.committed(1, Change("m", {"1": Source("m/1.lepton")}))
    (kept,) = roster
    assert kept.nbytes == 70
    assert before <= kept.used_s <= time.time()
    assert not kept.busy
    later = time.time() + 100
    assert kept.requests == 0
    first = {"last_s": later, "now": {"queue_requests": 0, "model_bytes": 100.0}, "request_s": [2, 3, 7.5]}
    workers[0].counts = {"m/1": first, "m/2": {"last_s": later + 9, "request_s": [9, 9, 9.0]}}
    workers[1].counts = {"m/1": {"last_s": later - 1, "now": {"queue_requests": 3.0}, "request_s": [1, 0, 0.5]}}
    assert kept.used_s == later
    assert kept.requests == 6
    assert kept.busy
    assert kept.nbytes == 100  # nothing shares its code any more
    workers[1].forget()
    assert not kept.busy
