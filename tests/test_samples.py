"""Files of samples: what is read from them, whatever was cut off, overwritten or put there by others."""

import pathlib

import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.samples import Kept, LabelHead, SampleHead, Samples, record


def sample(name, rows, time_s=0.0, version="1"):
    x, y = np.float32(rows), np.int64([len(rows)] * len(rows))
    head = SampleHead(
        name, version, time_s, (Kept("x", "float32", x.shape),), (Kept("y", "int64", y.shape),)
    )  # fmt: skip
    return record(head, x.tobytes() + y.tobytes())


def labels(name, found, time_s=1.0, version="1"):
    return record(LabelHead(name, version, time_s, tuple(found)))


@pytest.fixture
def kept(tmp_path):
    """Writes files of the model `m`, and gives what is read from them."""

    def write(*files):
        (tmp_path / "m").mkdir(exist_ok=True)
        for number, content in enumerate(files):
            (tmp_path / "m" / f"{number}-1.samples").write_bytes(content)
        return Samples(tmp_path, "m")

    return write


def test_labels_join_the_request_they_are_for(kept):
    samples = kept(
        sample("a", [[1], [2]], 0.0) + sample("b", [[3]], 1.0),
        # In another file, and earlier in the order of files than what they are for.
        labels("b", [7], 9.0) + labels("never", [1]) + sample("c", [[4]], 0.5) + labels("a", [5, 6], 2.0),
    )
    assert [(each.id, each.labels) for each in samples] == [("a", (5, 6)), ("c", None), ("b", (7,))]
    assert [each.inputs["x"].tolist() for each in samples.with_labels()] == [[[1], [2]], [[3]]]
    assert [each.outputs["y"].tolist() for each in samples.with_labels(most=1)] == [[1]]
    assert (samples.count, samples.labelled, samples.damaged_bytes) == (3, 2, 0)


def test_an_id_that_is_used_again_means_the_last_request_before_the_labels(kept):
    samples = kept(
        sample("a", [[1]], 1.0), sample("a", [[2]], 3.0) + sample("a", [[3]], 5.0), labels("a", [8], 4.0),
        sample("a", [[4]], 3.5, version="2"),
    )  # fmt: skip
    assert [(float(each.inputs["x"][0, 0]), each.labels) for each in samples] == [
        (1, None), (2, (8,)), (4, None), (3, None),
    ]  # fmt: skip


def test_labels_of_another_number_of_rows_or_of_an_earlier_time_join_nothing(kept):
    samples = kept(sample("a", [[1]], 1.0) + labels("a", [1, 2], 2.0), sample("b", [[1]], 5.0) + labels("b", [1], 4.0))
    assert samples.labelled == 0


def test_every_cut_of_a_file_leaves_the_records_before_it(kept):
    parts = [sample("a", [[1], [2]]), sample("b", [[3]]), labels("b", [2]), sample("c", [[4]])]
    whole = b"".join(parts)
    ends = np.cumsum([len(part) for part in parts])
    near = {end + step for end in (0, *ends) for step in (-1, 0, 1, 19, 20, 21)}
    for cut in sorted({*range(0, len(whole), 7), *near} & set(range(len(whole)))):
        samples = kept(whole[:cut])
        assert samples.count == sum(cut >= ends[index] for index in (0, 1, 3))
        assert samples.labelled == (cut >= ends[2])
        assert samples.damaged_bytes == (cut if 0 < cut < ends[0] else 0)
        assert len(list(samples)) == samples.count


def test_damage_anywhere_costs_one_record_and_is_told(kept):
    parts = [sample("a", [[1], [2]]), sample("b", [[3]]), sample("c", [[4]])]
    whole = b"".join(parts)
    for place in range(len(parts[0]), len(parts[0]) + len(parts[1])):
        spoiled = bytearray(whole)
        spoiled[place] ^= 0xFF
        samples = kept(bytes(spoiled))
        assert [each.id for each in samples] == ["a", "c"]
        head = place < len(parts[0]) + len(parts[1]) - 12  # the body is looked at when it is read
        assert samples.damaged_bytes == (len(parts[1]) if head and samples.count == 2 else 0)
        assert samples.count == (2 if samples.damaged_bytes else 3)


@pytest.mark.parametrize(
    "content",
    [
        b"not samples at all" * 100,
        b"LxS1" + b"\xff" * 16,
        record(SampleHead("a", "1", 0.0, (Kept("x", "float32", (1 << 40, 1 << 40)),), ()), b"1234"),
        record(SampleHead("a", "1", 0.0, (Kept("x", "float32", (-1, -1)),), ()), b"1234"),
        record(SampleHead("a", "1", 0.0, (Kept("x", "object", (1,)),), ()), b"12345678"),
        record(LabelHead("a", "1", 0.0, (1,))).replace(b'"labels"', b'"pickle"', 1),
    ],
)
def test_what_is_no_sample_is_passed_over(kept, content):
    samples = kept(content, sample("b", [[3]]))
    assert [each.id for each in samples] == ["b"]
    assert samples.damaged_bytes in (0, len(content))


def test_a_folder_without_samples(tmp_path):
    with pytest.raises(lx.SampleError, match="no samples of this model: start the server with --samples"):
        Samples(tmp_path, "m")
    (tmp_path / "m").write_text("")
    with pytest.raises(lx.SampleError, match="cannot be read: Not a directory"):
        Samples(tmp_path, "m")


def test_files_that_go_while_they_are_read(kept, tmp_path):
    samples = kept(sample("a", [[1]]), sample("b", [[2]]))
    pathlib.Path(tmp_path / "m" / "0-1.samples").unlink()
    assert [each.id for each in samples] == ["b"]
