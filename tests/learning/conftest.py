import dataclasses
import types

import jax
import learning_model
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.learning import rounds
from lepton_xla.samples import Kept, LabelHead, SampleHead, record

INT8 = lx.Recipe.parse('measure = false\n[[quantize]]\nsites = ".*"', name="int8 here")


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Artifacts of the trained model, in float and int8."""
    folder = tmp_path_factory.mktemp("bases")
    program, buckets = learning_model.trained(), {"batch": (1, 8, 64)}
    lx.compile(program, buckets, name="blobs").save(folder / "float.lepton")
    small = lx.optimize(program, INT8, buckets=buckets, keep_master=True)
    lx.compile(small, buckets, name="blobs", recipe=INT8).save(folder / "int8.lepton")
    kept = lx.compile(small, buckets, name="blobs", recipe=INT8, keep_master=True)
    kept.save(folder / "master.lepton")
    return {"master": folder / "master.lepton", "float": folder / "float.lepton", "int8": folder / "int8.lepton"}


@dataclasses.dataclass
class Sampled:
    """A folder of samples of the model, as a server would have written them."""

    folder: object
    count: int = 0

    def add(self, x, labels, *, version="1", labelled=True, time_s=None):
        records = []
        for row, label in zip(x, labels, strict=True):
            name, at = f"r{self.count}", float(self.count) if time_s is None else time_s
            self.count += 1
            out = np.zeros((1, learning_model.CLASSES), np.float32)
            kept = Kept("x", row.dtype.name, (1, *row.shape)), Kept("output", "float32", out.shape)
            head = SampleHead(name, version, at, kept[:1], kept[1:])
            records.append(record(head, row.tobytes() + out.tobytes()))
            if labelled:
                records.append(record(LabelHead(name, version, at + 0.5, (int(label),))))
        (self.folder / "blobs").mkdir(exist_ok=True)
        (self.folder / "blobs" / f"{self.count:020d}-1.samples").write_bytes(b"".join(records))


@pytest.fixture
def sampled(tmp_path):
    (tmp_path / "samples").mkdir()
    return Sampled(tmp_path / "samples")


@pytest.fixture(autouse=True)
def same_split(monkeypatch):
    """Which samples judge depends on a secret."""
    monkeypatch.setattr(rounds, "secrets", types.SimpleNamespace(token_bytes=bytes))


@pytest.fixture(autouse=True)
def on_first_device():
    with jax.default_device(jax.devices()[0]):
        yield
