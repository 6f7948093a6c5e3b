import contextlib
import hashlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import compiler_models as models
import numpy as np
import pytest
from keeping import nothing_kept

from lepton_xla import compiler
from lepton_xla.compiler.storage import Store
from lepton_xla.errors import ArtifactError

_WORKER = """
import sys
sys.path[:0] = {path!r}
import numpy as np
from lepton_xla import compiler
from lepton_xla.errors import LeptonError
from lepton_xla.program import TensorSpec, trace
random = np.random.default_rng(0)
weights = {{f"w{{i}}": random.standard_normal(({rows}, 64)).astype("float32") for i in range({leaves})}}
inputs = {{"x": TensorSpec(("batch", 64), "float32")}}
artifact = compiler.compile(trace(lambda w, x: x + w["w0"][:1], weights, inputs), {{"batch": (1,)}})
"""


def worker(code: str, *, rows: int = 64, leaves: int = 2) -> list[str]:
    path = [*sys.path, str(pathlib.Path(__file__).parent)]
    return [sys.executable, "-W", "ignore", "-c", _WORKER.format(path=path, rows=rows, leaves=leaves) + code]


def files_of(path: pathlib.Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def test_the_layout(saved_dense: pathlib.Path) -> None:
    manifest = json.loads((saved_dense / "manifest.json").read_text())
    digest = compiler.Fingerprint.of().digest
    assert sorted(manifest["files"]) == [name for name in files_of(saved_dense) if name != "manifest.json"]
    assert {name for name in manifest["files"] if not name.startswith("weights/")} == {
        "programs/symbolic.stablehlo",
        *(f"executables/{digest}/batch={size}.xla" for size in (1, 4, 8)),
    }
    assert [(leaf["path"], leaf["shape"], leaf["dtype"]) for leaf in manifest["weights"]] == [
        ("bias", [5], "float32"), ("kernel", [12, 5], "float32"), ("large", [50, 60], "float32"),
    ]  # fmt: skip
    assert {name for name in manifest["files"] if name.startswith("weights/")} == {
        "weights/00002-large/zarr.json", "weights/00002-large/c/0/0",
        "weights/packed/zarr.json", "weights/packed/c/0/0",
    }  # fmt: skip
    assert [leaf["encoding"] for leaf in manifest["weights"]] == ["packed", "packed", "zstd"]
    assert manifest["float32_bytes"] == 4 * (5 + 12 * 5 + 50 * 60)
    assert manifest["schema"] == 3
    assert manifest["recipe"] == {"name": "none"}
    assert manifest["buckets"] == {"batch": [1, 4, 8]}


def test_large_weights_are_zarr_that_other_tools_read(saved_dense: pathlib.Path) -> None:
    import tensorstore as ts

    (folder,) = (saved_dense / "weights").glob("*large")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}
    large = ts.open(spec, open=True).result().read().result()
    np.testing.assert_array_equal(large, models.dense_weights()["large"])


def test_verify_counts_and_lists_extra_files(copy_dense: Callable[[], pathlib.Path]) -> None:
    path = copy_dense()
    found = compiler.verify(path)
    sizes = [(path / name).stat().st_size for name in files_of(path) if name != "manifest.json"]
    assert (found.files, found.size_bytes, found.extra) == (len(sizes), sum(sizes), ())
    (path / "executables" / "stray.xla").write_bytes(b"x")
    assert compiler.verify(path).extra == ("executables/stray.xla",)


def _flip(file: pathlib.Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _truncate(file: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _empty(file: pathlib.Path) -> None:
    file.write_bytes(b"")


def _grow(file: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def _replace_by_folder(file: pathlib.Path) -> None:
    file.unlink()
    file.mkdir()


def _link_outside(file: pathlib.Path) -> None:
    (artifact,) = [parent for parent in file.parents if parent.suffix == ".lepton"]
    outside = artifact.parent / f"outside-{time.monotonic_ns()}"
    file.rename(outside)
    file.symlink_to(outside)


@pytest.mark.parametrize(
    "damage", [_flip, _truncate, _empty, _grow, pathlib.Path.unlink, _replace_by_folder, _link_outside]
)
def test_damage_to_any_file_is_found_and_the_file_named(
    copy_dense: Callable[[], pathlib.Path], saved_dense: pathlib.Path, damage: Callable[[pathlib.Path], None]
) -> None:
    names = files_of(saved_dense)
    assert len(names) == 9
    for name in names:
        for check in (compiler.verify, compiler.load):
            path = copy_dense()
            damage(path / name)
            with pytest.raises(ArtifactError, match=re.escape(name)):
                check(path)


def test_weights_that_cannot_be_read_are_not_kept_by_the_error(
    copy_dense: Callable[[], pathlib.Path], saved_dense: pathlib.Path
) -> None:
    path = copy_dense()
    _flip(path / next(name for name in files_of(saved_dense) if "weights" in name))
    with pytest.raises(ArtifactError):
        compiler.load(path)
    with nothing_kept(), contextlib.suppress(ArtifactError):
        compiler.load(path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(schema=1), "schema version 1; this version of lepton_xla reads 3: compile the model again"),
        (
            lambda m: m.update(schema=4),
            "schema version 4; this version of lepton_xla reads 3: load it with the version",
        ),
        (lambda m: m.pop("schema"), "missing required field `schema`"),
        (lambda m: m.pop("weights"), "missing required field `weights`"),
        (lambda m: m.update(surprise=1), "unknown field `surprise`"),
        (lambda m: m.update(name=3), r"Expected `str`, got `int` - at `\$.name`"),
        (lambda m: m.update(name="../x"), "model name '../x'"),
        (lambda m: m["buckets"].update(seq=[1]), "buckets name 'seq'"),
        (lambda m: m["buckets"].update(batch=[8, 1]), "must ascend"),
        (lambda m: m["weights"][0].update(dtype="float3"), "float3"),
        (lambda m: m["weights"][0].update(shape=[-5]), "negative size"),
        (lambda m: m["weights"][0].update(shape=[6]), "weight 'bias' cannot be decoded: 20 bytes, not 24"),
        (
            lambda m: m["weights"][0].update(shape=[1 << 62]),
            r"take 18446744073709\d+ bytes, and this machine has \d+",
        ),
        (
            lambda m: m["weights"][0].update(shape=[1 << 20]),
            r"weight 'bias': 1 pieces; float32\[1048576\] in 'packed' has 8",
        ),
        (lambda m: m["weights"][0].update(encoding="gaps"), "weight 'bias': 1 pieces; "),
        (lambda m: m.update(packed_rows=[1 << 62]), r"take 46116860184\d+ bytes, and this machine has \d+"),
        (lambda m: m.update(packed_rows=[0]), r"Expected `int` >= 1 - at `\$.packed_rows"),
        (lambda m: m.update(packed_rows=[300, 9]), "'weights/packed/c/1/0' has no entry in files"),
        (
            lambda m: m["weights"][0].update(encoding="lzma"),
            r"Invalid enum value 'lzma' - at `\$.weights\[0\].encoding`",
        ),
        (lambda m: m["weights"][0].update(encoding="zstd"), "'/zarr.json' has no entry in files"),
        (
            lambda m: m["weights"][0].update(pieces=[[0, 1, 400]]),
            "weight 'bias' has a piece beyond the end of weights/packed",
        ),
        (lambda m: m["weights"][0].update(pieces=[[0, -1, 20]]), r"Expected `int` >= 0 - at `\$.weights\[0\].pieces"),
        (
            lambda m: m["weights"][0].update(pieces=[[1, 0, 20]]),
            "weight 'bias' has a piece beyond the end of weights/packed",
        ),
        (
            lambda m: m["weights"][0].update(shape=[0], pieces=[[9, 0, 0]]),
            "weight 'bias' has a piece beyond the end of weights/packed",
        ),
        (lambda m: m["weights"][2].update(shape=[6]), r"holds float32\[50, 60\]; the manifest says float32\[6\]"),
        (lambda m: m["weights"][2].update(folder="weights/x"), "'weights/x/zarr.json' has no entry in files"),
        (lambda m: m["programs"][0].update(file="../p"), "'../p' has no entry in files"),
        (lambda m: m["files"].update({"../p": {"size": 1, "sha256": "0" * 64}}), "'../p' is not a valid name"),
        (lambda m: m["files"].update({"/etc/passwd": {"size": 1, "sha256": "0" * 64}}), "not a valid name"),
        (lambda m: m["files"].update({"a//b": {"size": 1, "sha256": "0" * 64}}), "not a valid name"),
        (lambda m: m["files"].update({"a": {"size": -1, "sha256": "0" * 64}}), "no valid size and SHA-256"),
        (lambda m: m["files"].update({"a": {"size": 1, "sha256": "zz"}}), "no valid size and SHA-256"),
        (lambda m: m["executables"].update({"0" * 16: next(iter(m["executables"].values()))}), "not the digest of"),
    ],
)
def test_an_edited_manifest_is_refused(
    copy_dense: Callable[[], pathlib.Path], edit: Callable[[dict], object], message: str
) -> None:
    path = copy_dense()
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest)
    (path / "manifest.json").write_text(sealed(manifest))
    with pytest.raises(ArtifactError, match=message):
        compiler.load(path)


def sealed(manifest: dict) -> str:
    """The manifest with the digest it should have, as one who edits on purpose would write it."""
    plain = json.dumps(manifest | {"sha256": ""}, separators=(",", ":"), ensure_ascii=False)
    return json.dumps(manifest | {"sha256": hashlib.sha256(plain.encode()).hexdigest()})


def test_an_edit_that_leaves_the_digest_is_seen(copy_dense: Callable[[], pathlib.Path]) -> None:
    path = copy_dense()
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"version": "1"', '"version": "2"'))
    assert (path / "manifest.json").read_text() != text
    with pytest.raises(ArtifactError, match=r"manifest\.json: its SHA-256 does not match"):
        compiler.load(path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"schema": "1"}', "\xff", "[" * 200_000, '{"schema":1,"a":' + "[" * 200_000]
)
def test_a_manifest_that_is_not_one(copy_dense: Callable[[], pathlib.Path], text: str) -> None:
    path = copy_dense()
    (path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        compiler.verify(path)


def test_a_huge_manifest_is_not_read(copy_dense: Callable[[], pathlib.Path]) -> None:
    path = copy_dense()
    os.truncate(path / "manifest.json", 1 << 40)
    with pytest.raises(ArtifactError, match=r"manifest\.json has 1099511627776 bytes"):
        compiler.verify(path)


@pytest.mark.parametrize("location", ["nothing-here.lepton", "memory://nothing-here/", "nosuchscheme://x/"])
def test_nothing_there(tmp_path: pathlib.Path, location: str) -> None:
    with pytest.raises(ArtifactError, match=location.rstrip("/")):
        compiler.load(location if "://" in location else tmp_path / location)


def test_saving_over_something(tmp_path: pathlib.Path, dense_artifact: compiler.Artifact) -> None:
    path = tmp_path / "m.lepton"
    dense_artifact.save(path)
    before = files_of(path)
    with pytest.raises(ArtifactError, match="exists; give another path"):
        dense_artifact.save(path)
    (path / "stray").write_text("x")
    dense_artifact.save(path, overwrite=True)
    assert files_of(path) == before
    assert os.listdir(tmp_path) == ["m.lepton"]
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    with pytest.raises(ArtifactError, match="is not an artifact"):
        dense_artifact.save(precious, overwrite=True)
    assert files_of(precious) == ["thesis.txt"]


@pytest.mark.parametrize("location", ["memory://bucket/models/dense/", "file://"])
def test_addresses(tmp_path: pathlib.Path, dense_artifact: compiler.Artifact, location: str) -> None:
    location = f"file://{tmp_path}/a b.lepton" if location == "file://" else location
    dense_artifact.save(location)
    with pytest.raises(ArtifactError, match="exists; give another path"):
        dense_artifact.save(location)
    dense_artifact.save(location, overwrite=True)
    assert compiler.verify(location).extra == ()
    x = np.ones((3, 12), np.float32)
    np.testing.assert_allclose(compiler.load(location)(x=x)["output"], models.dense_reference(x), rtol=1e-5)


@pytest.mark.parametrize("base", ["local", "memory"])
def test_a_write_that_fails_leaves_nothing(
    tmp_path: pathlib.Path, dense_artifact: compiler.Artifact, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    location = tmp_path / "m.lepton" if base == "local" else "memory://full/"
    real = Store.write
    for fail_at in range(1, 9):
        count = iter(range(1, 100))

        def write(store: Store, name: str, data: bytes, fail_at: int = fail_at, count=count) -> None:
            if next(count) == fail_at:
                raise ArtifactError(f"{name} cannot be written: No space left on device")
            real(store, name, data)

        monkeypatch.setattr(Store, "write", write)
        with pytest.raises(ArtifactError, match="No space left"):
            dense_artifact.save(location)
        assert os.listdir(tmp_path) == []
        assert Store(location).names() == []


def test_a_full_disk_leaves_nothing_and_keeps_the_old_artifact(tmp_path: pathlib.Path) -> None:
    code = """
import resource
artifact.save(sys.argv[1] + "/old.lepton")
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for name, overwrite in (("new.lepton", False), ("old.lepton", True)):
    try:
        artifact.save(sys.argv[1] + "/" + name, overwrite=overwrite)
    except LeptonError as error:
        print(type(error).__name__, error)
"""
    done = subprocess.run([*worker(code, rows=1000), str(tmp_path)], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(
        line.startswith("ArtifactError") and "weights/00000-w0/c/0/0 cannot be written" in line for line in lines
    )
    assert os.listdir(tmp_path) == ["old.lepton"]
    compiler.verify(tmp_path / "old.lepton")


def test_a_process_killed_while_saving_leaves_no_artifact_in_sight_and_the_next_save_cleans_up(
    tmp_path: pathlib.Path, dense_artifact: compiler.Artifact
) -> None:
    code = "print('saving', flush=True)\nartifact.save(sys.argv[1] + '/m.lepton')"
    process = subprocess.Popen([*worker(code, leaves=400), str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"saving\n"
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".*.tmp/weights/00020*")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".m.lepton.")
    assert not (tmp_path / left / "manifest.json").exists()
    with pytest.raises(ArtifactError, match=r"manifest\.json is missing"):
        compiler.load(tmp_path / "m.lepton")
    others = [".m.lepton.0123456789abcdef.tmp.mine", ".other.lepton.0123456789abcdef.tmp", ".m.lepton.tmp"]
    for name in (left, *others):
        (tmp_path / name).mkdir(exist_ok=True)
    dense_artifact.save(tmp_path / "m.lepton")
    assert sorted(os.listdir(tmp_path)) == sorted([left, *others, "m.lepton"])  # for all that is known, it is new
    for name in (left, *others):
        os.utime(tmp_path / name, (0, 0))
    dense_artifact.save(tmp_path / "m.lepton", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "m.lepton"])


def test_what_another_process_is_saving_is_not_removed(
    tmp_path: pathlib.Path, dense_artifact: compiler.Artifact
) -> None:
    code = """
from lepton_xla.compiler.storage import atomic_store
with atomic_store(sys.argv[1] + "/m.lepton", overwrite=True) as store:
    store.write("a", b"a")
    print("saving", flush=True)
    sys.stdin.read()
"""
    command = [*worker(code), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"saving\n"
        (left,) = os.listdir(tmp_path)
        os.utime(tmp_path / left, (0, 0))
        dense_artifact.save(tmp_path / "m.lepton")
        assert sorted(os.listdir(tmp_path)) == [left, "m.lepton"]
    assert process.returncode == 0
    assert os.listdir(tmp_path) == ["m.lepton"]


def test_an_artifact_moved_aside_is_kept_while_it_is_the_only_one(
    tmp_path: pathlib.Path, dense_artifact: compiler.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    aside = tmp_path / ".m.lepton.0123456789abcdef.old"
    dense_artifact.save(aside)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", _full)
        with pytest.raises(ArtifactError, match="cannot be written"):
            dense_artifact.save(tmp_path / "m.lepton")
    assert os.listdir(tmp_path) == [aside.name]
    for _ in range(2):
        dense_artifact.save(tmp_path / "m.lepton", overwrite=True)
    assert os.listdir(tmp_path) == ["m.lepton"]


def _full(store: Store, name: str, data: bytes) -> None:
    raise ArtifactError(f"{name} cannot be written: No space left on device")
