"""Folders that look like artifacts to those who only copy them."""

import hashlib
import json

import msgspec

from lepton_xla.files.listing import MANIFEST, sealing_digest


def make_artifact(path, files=None, name="tiny", fit="", programs=("p",)):
    """Write an artifact whose manifest lists these files."""
    files = {"weights/a/c/0": b"weights" * 999, "programs/p.stablehlo": b"program"} if files is None else files
    entries = {}
    for file, data in files.items():
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_bytes(data)
        entries[file] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    document = {"name": name, "files": entries, "fit": fit, "programs": programs, "sha256": ""}
    document["sha256"] = sealing_digest(msgspec.json.encode(document))
    path.mkdir(parents=True, exist_ok=True)
    (path / MANIFEST).write_text(json.dumps(document))
    return path


def is_whole(path):
    """Whether every file that a manifest lists is there, as listed."""
    listed = json.loads((path / MANIFEST).read_text())["files"]
    return all(
        hashlib.sha256((path / file).read_bytes()).hexdigest() == each["sha256"] for file, each in listed.items()
    )
