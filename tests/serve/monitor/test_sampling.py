"""Samples of a running server: what is kept, what is not, within which bounds, and that no answer waits for it."""

import contextlib
import errno
import hashlib
import hmac
import json
import os
import signal
import subprocess
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
from serve_fakes import exchange, start_script

import lepton_xla as lx
from lepton_xla.samples import LabelHead, Samples, record
from lepton_xla.serve.models.settings import parse_settings
from lepton_xla.serve.monitor import sampler as writing
from lepton_xla.serve.monitor.sampler import SampleWriter
from lepton_xla.serve.monitor.sampling import Sampling
from lepton_xla.serve.monitor.segments import Segments
from lepton_xla.serve.protocol.signature import signature_of
from lepton_xla.serve.protocol.wire import InferRequest, RequestSpec

ROWS = np.float32(np.random.default_rng(0).normal(size=(64, 4)))


@pytest.fixture(scope="module")
def classifier():
    """The class of a row is its largest element; a user's number is given and not used."""
    inputs = {"x": lx.TensorSpec(("batch", 4), "float32"), "user": lx.TensorSpec(("batch",), "int32")}
    program = lx.trace(lambda w, x, user: x @ w["w"], {"w": jnp.eye(4)}, inputs)
    return lx.compile(program, {"batch": (1, 8)}, name="largest", version="5").servable()


def post(server, path, body):
    status, _, answer = exchange(server, "POST", path, json.dumps(body).encode())
    return status, json.loads(answer)


def infer(server, rows, request_id):
    inputs = [
        {"name": "x", "datatype": "FP32", "shape": list(rows.shape), "data": rows.ravel().tolist()},
        {"name": "user", "datatype": "INT32", "shape": [len(rows)], "data": list(range(len(rows)))},
    ]
    status, _ = post(
        server, "/v2/models/largest/infer", {"inputs": inputs} | ({"id": request_id} if request_id else {})
    )
    assert status == 200


def feedback(server, labels):
    entries = [{"id": name, "label": label} for name, label in labels.items()]
    return post(server, "/v2/models/largest/feedback", {"feedback": entries})[0]


def until(check, seconds=10):
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def counted(server):
    (metrics,) = server.metrics
    return metrics.samples


def test_requests_answers_and_the_feedback_that_comes_later(make_server, classifier, tmp_path):
    server = make_server(classifier, samples=tmp_path)
    for number in range(6):
        infer(server, ROWS[number : number + number % 3 + 1], f"request {number}")
    infer(server, ROWS[:1], None)  # nobody could say what was right
    assert feedback(server, {"request 1": [3, 0], "request 3": 2}) == 200
    assert feedback(server, {"request 3": 1}) == 409  # is not kept either
    assert feedback(server, {"request 0": 9}) == 400
    until(lambda: counted(server)["kept"] == 8)
    metrics = exchange(server, "GET", "/metrics")[2].decode()
    assert 'lepton_samples_total{model="largest",result="kept",version="5"} 8.0' in metrics
    found = {each.id: each for each in Samples(tmp_path, "largest")}
    assert sorted(found) == [f"request {number}" for number in range(6)]
    for number in range(6):
        rows, each = ROWS[number : number + number % 3 + 1], found[f"request {number}"]
        np.testing.assert_array_equal(each.inputs["x"], rows)
        np.testing.assert_array_equal(each.outputs["output"], rows)  # the weights are the identity
        assert each.inputs["user"].tolist() == list(range(len(rows)))
        assert (each.version, each.inputs["x"].dtype, each.hashed) == ("5", np.float32, frozenset())
        assert abs(each.time_s - time.time()) < 60
        assert each.labels == {1: (3, 0), 3: (2,)}.get(number)
    assert (tmp_path / "largest").stat().st_mode & 0o77 == 0


def request_of(name, rows, user=7):
    """A decoded request of `classifier`, and the bytes of its answer."""
    spec = RequestSpec(
        rows=len(rows), key=(), sizes={"batch": len(rows)}, cut=False, slices=(), tail_bytes=0,
        outputs=((0, True),), id=name,
    )  # fmt: skip
    tensors = [memoryview(rows.tobytes()), memoryview(np.full(len(rows), user, np.int32).tobytes())]
    return InferRequest(spec, tensors, sum(map(len, tensors))), [rows.tobytes()]


@pytest.fixture
def writer(tmp_path):
    made = SampleWriter(tmp_path / "kept")
    yield made
    made.close()


def sampler_of(writer, classifier, sampling=None):
    """A sampler, and on the writer what became of its records."""
    writer.counts = {"kept": 0, "left_out": 0, "lost": 0}
    return writer.sampler(signature_of(classifier), sampling or Sampling(), writer.counts)


def kept(writer):
    writer.close()
    return list(Samples(writer._folder, "largest"))


def test_fields_are_dropped_and_hashed_with_a_key(writer, classifier):
    sampling = Sampling(drop=("output",), hash=("user",), hash_id=True)
    sampler = sampler_of(writer, classifier, sampling)
    sampler.answered(*request_of("a", ROWS[:2]))
    sampler.labelled({"a": [1, 2]})
    (sample,) = kept(writer)
    key = (writer._folder / ".key").read_bytes()

    def hashed(data):
        return hmac.new(key, data, hashlib.sha256).digest()

    assert (sample.id, sample.labels) == (hashed(b"a").hex(), (1, 2))
    assert sample.outputs == {}
    np.testing.assert_array_equal(sample.inputs["x"], ROWS[:2])
    digest = list(hashed(np.int32(7).tobytes()))
    assert (sample.hashed, sample.inputs["user"].tolist()) == ({"user"}, [digest, digest])
    assert len(key) == 32
    assert SampleWriter(writer._folder)._key == key  # those of other processes agree
    files = b"".join(file.read_bytes() for file in (writer._folder / "largest").iterdir())
    assert np.full(2, 7, np.int32).tobytes() not in files


def test_a_field_that_the_model_does_not_have_is_refused(make_server, classifier, tmp_path):
    settings = parse_settings('[serving.samples]\ndrop = ["usr"]\nrate = 0.5')
    with pytest.raises(lx.SampleError, match="names 'usr', which the model does not have; it has x, user, output"):
        sampler_of(SampleWriter(tmp_path), classifier, settings.serving.samples)
    for wrong in ("rate = 1.5", "max_bytes = 1", "max_age_s = 0", "dorp = []"):
        with pytest.raises(lx.RepositoryError):
            parse_settings(f"[serving.samples]\n{wrong}")


@pytest.mark.parametrize(("rate", "of_model"), [(0.25, None), (1.0, 0.25), (0.0, None)])
def test_the_rate_is_a_matter_of_the_id_so_that_all_processes_agree(tmp_path, classifier, rate, of_model):
    found = []
    for folder in ("one", "two"):
        writer = SampleWriter(tmp_path / folder, rate)
        sampler = sampler_of(writer, classifier, Sampling(rate=of_model))
        for number in range(2000):
            sampler.answered(*request_of(f"id-{number}", ROWS[:1]))
            sampler.labelled({f"id-{number}": [1]})
        samples = kept(writer)
        assert all(each.labels == (1,) for each in samples)
        found.append([each.id for each in samples])
    assert found[0] == found[1]
    # Binomial: 500 of 2000, standard deviation 19.4.
    assert abs(len(found[0]) - 500) < 5 * 19.4 if rate else not found[0]


def test_what_a_slow_disk_cannot_take_is_left_out_and_no_answer_waits(writer, classifier, monkeypatch):
    gate = threading.Event()
    write = Segments.write
    monkeypatch.setattr(Segments, "write", lambda self, data: (gate.wait(20), write(self, data)))
    monkeypatch.setattr(writing, "_MOST_WAITING", 100_000)
    sampler = sampler_of(writer, classifier)
    request, outputs = request_of("a", np.zeros((1000, 4), np.float32))
    start = time.monotonic()
    for _ in range(1000):
        sampler.answered(request, outputs)
    assert time.monotonic() - start < 2
    gate.set()
    assert len(kept(writer)) == 2
    assert writer.counts == {"kept": 2, "left_out": 998, "lost": 0}


def test_ids_texts_and_the_records_themselves_are_in_the_bound(classifier):
    reserved = []
    sampler = writing.Sampler(
        signature_of(classifier), Sampling(), 1.0, b"key", lambda size: reserved.append(size), None
    )
    sampler.answered(*request_of("\u00e4" * 100, ROWS[:1]))
    sampler.labelled({"a": ["\u20ac" * 50]})
    assert reserved == [512 + 200 + (16 + 4) + 16, 512 + 1 + 8 + 150]


def test_a_full_disk_costs_samples_and_nothing_else(writer, classifier, monkeypatch, caplog):
    sampler = sampler_of(writer, classifier)
    write, full = os.write, threading.Event()

    def until_full(file, data):
        if full.is_set() and threading.current_thread().name == "lepton-samples":
            if len(data) > 50:
                return write(file, data[:50])  # the last bytes that there is room for
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data)

    monkeypatch.setattr(os, "write", until_full)
    monkeypatch.setattr(writing, "_PAUSE_S", 0.0)
    sampler.answered(*request_of("a", ROWS[:1]))
    until(lambda: writer.counts["kept"] == 1)
    full.set()
    sampler.answered(*request_of("b", ROWS[:1]))
    until(lambda: writer.counts["lost"] == 1)
    full.clear()
    sampler.answered(*request_of("c", ROWS[:1]))
    writer.close()
    samples = Samples(writer._folder, "largest")
    assert ([each.id for each in samples], samples.damaged_bytes) == (["a", "c"], 0)
    assert "samples of largest are not kept for 0 s: No space left on device" in caplog.text


def test_a_folder_that_cannot_be_written_to_is_an_error_at_the_start(classifier, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(lx.SampleError, match="samples cannot be kept there"):
        lx.serve.Server(classifier, lx.serve.Options(port=0, samples=tmp_path / "file"))
    with pytest.raises(lx.ServeError, match="without `monitor`"):
        lx.serve.Options(samples=tmp_path, monitor=False)
    with pytest.raises(lx.ServeError, match="samples_rate must be 0 to 1"):
        lx.serve.Options(samples=tmp_path, samples_rate=2)


# Retention.


class Clock:
    now = 1e9

    def __call__(self):
        self.now += 1e-3
        return self.now


def held(folder):
    return sum(file.stat().st_size for file in folder.iterdir())


def test_the_bytes_of_all_processes_are_bounded_and_the_latest_stay(tmp_path, monkeypatch):
    clock = Clock()
    both = [Segments(tmp_path / "m", 1 << 18, 1e9, clock) for _ in range(2)]
    for number in range(2000):
        monkeypatch.setattr(os, "getpid", lambda number=number: number % 2)
        both[number % 2].write(record(LabelHead(f"{number:06d}", "1", clock.now, (1,) * 300)))
        if number % 7 == 0:
            assert held(tmp_path / "m") <= 1 << 18
    last = [each.read_bytes() for each in (tmp_path / "m").iterdir()]
    assert all(f'"{number:06d}"'.encode() in b"".join(last) for number in range(1800, 2000))
    assert held(tmp_path / "m") > 1 << 16


def test_files_of_a_process_that_was_killed_go_with_the_others_and_those_under_way_stay(tmp_path):
    clock = Clock()
    other, mine = (Segments(tmp_path / "m", 1 << 18, 50.0, clock) for _ in range(2))
    dead = Segments(tmp_path / "m", 1 << 18, 50.0, clock)
    for each in (dead, other, mine):
        each.write(record(LabelHead("a", "1", clock.now, (1,))))
    dead.close()  # as the system does
    for file in (tmp_path / "m").iterdir():
        os.utime(file, (clock.now, clock.now))
    clock.now += 60
    mine.remove_old()
    assert len(list((tmp_path / "m").iterdir())) == 1  # the other one's, which is locked
    other.remove_old()
    mine.remove_old()
    assert not list((tmp_path / "m").iterdir())


def test_samples_of_models_that_are_not_served_any_more_go_too(tmp_path, classifier):
    old = time.time() - 100
    for name, bounds in (("brief", '{"max_age_s": 50}'), ("long", '{"max_age_s": 1e6}'), ("none", "?")):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".bounds.json").write_text(bounds)
        (tmp_path / name / "1-1.samples").write_bytes(b"")
        os.utime(tmp_path / name / "1-1.samples", (old, old))
    writer = SampleWriter(tmp_path)
    sampler_of(writer, classifier, Sampling(max_age_s=77.0))
    until(lambda: not (tmp_path / "brief" / "1-1.samples").exists())
    writer.close()
    assert (tmp_path / "long" / "1-1.samples").exists()
    assert (tmp_path / "none" / "1-1.samples").exists()  # within the week that is the default
    assert json.loads((tmp_path / "largest" / ".bounds.json").read_text())["max_age_s"] == 77.0


def test_a_killed_process_leaves_samples_that_can_be_read(tmp_path):
    script = """
        import sys, pathlib
        from lepton_xla.samples import LabelHead, record
        from lepton_xla.serve.monitor.segments import Segments
        segments = Segments(pathlib.Path(sys.argv[1]) / "m", 1 << 24, 1e9)
        number = 0
        while True:
            segments.write(record(LabelHead(str(number), "1", float(number), (1,) * 1000)))
            number += 1
            if number == 100:
                print("begun", flush=True)
    """
    with start_script(script, tmp_path, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    samples = Samples(tmp_path, "m")
    assert samples.damaged_bytes == 0
    heads = [head for file in samples._files() for _, head in samples._heads(file)]
    assert len(heads) >= 100
    assert [head.id for head in heads] == [str(number) for number in range(len(heads))]


@pytest.mark.slow
def test_each_worker_has_files_of_its_own_and_feedback_joins(classifier, tmp_path):
    path = tmp_path / "largest.lepton"
    inputs = {"x": lx.TensorSpec(("batch", 4), "float32"), "user": lx.TensorSpec(("batch",), "int32")}
    program = lx.trace(lambda w, x, user: x @ w["w"], {"w": jnp.eye(4)}, inputs)
    lx.compile(program, {"batch": (1, 8)}, name="largest").save(path)
    process = start_script(
        "from lepton_xla.cli.serve import serve; serve()",
        path, "--json", "--port", "0", "--workers", "2", "--samples", tmp_path / "kept",
        environment=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE,
    )  # fmt: skip
    with process, contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        url = json.loads(process.stdout.readline())["url"]
        for number in range(40):  # each on a connection of its own, so that both workers get some
            with lx.serve.Client(url) as client:
                client.infer("largest", request_id=f"r{number}", x=ROWS[:1], user=np.int32([1]))
            with lx.serve.Client(url) as client:  # the feedback may reach the other one
                client.feedback("largest", {f"r{number}": 2})
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    samples = Samples(tmp_path / "kept", "largest")
    assert {each.id for each in samples} == {f"r{number}" for number in range(40)}
    assert len({file.name.split("-")[1] for file in samples._files()}) == 2
    assert samples.labelled == 40
