"""Kills a process at every call into the system that a change of a repository makes, and looks after each.

Run as `python repository_kills.py FOLDER CHANGE`; prints how many kills there were. It is a process of its own because
it forks, which a process with JAX's threads must not.
"""

import hashlib
import os
import pathlib
import signal
import sys

from fake_artifacts import is_whole, make_artifact

from lepton_xla.serve.models.repository import Repository
from lepton_xla.serve.models.uploads import Uploads


def upload(repository, artifact):
    """Send what is missing, as a client does, and make a version of it."""
    uploads, digest = Uploads(repository), ""
    for file in sorted(artifact.rglob("*"), key=lambda file: file.name == "manifest.json"):
        if file.is_file():
            data = file.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            size = uploads.sizes([digest])[digest]
            while size < len(data):
                size = uploads.write(digest, size, data[size : size + 5000])
    uploads.publish(digest, "m")


CHANGES = {
    "upload": upload,
    "push": lambda repository, artifact: repository.push(artifact, "m"),
    "promote": lambda repository, artifact: repository.promote("m", "3"),
    "rollback": lambda repository, artifact: repository.rollback("m"),
    "remove": lambda repository, artifact: repository.remove("m", "3"),
}


STEPS = {
    "open",
    "mkdir",
    "rename",
    "replace",
    "unlink",
    "rmdir",
    "fsync",
    "write",
    "close",
    "flush",
    "flock",
    "listdir",
}


def killed_at(step, change):
    """Run a change in a process that kills itself before the call of this number; tell whether it got so far."""
    child = os.fork()
    if child == 0:
        count = 0

        def look(_frame, event, function):
            nonlocal count
            if event == "c_call" and function.__name__ in STEPS:
                count += 1
                if count > step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(look)
        change()
        sys.setprofile(None)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def state(repository):
    found = repository.scan()["m"]
    assert found.problem is None, found.problem
    assert all(is_whole(path) for path in found.versions.values())
    return (tuple(found.versions), found.settings.labels.get("stable"))


def fresh(root, artifact):
    repository = Repository(root)
    for _ in range(3):
        repository.push(artifact, "m")
    repository.promote("m", "1")
    repository.promote("m", "2")
    return repository


def main(folder, change):
    folder = pathlib.Path(folder)
    artifact = make_artifact(folder / "a.lepton")
    step = 0
    while True:
        repository = fresh(folder / str(step), artifact)
        before = state(repository)
        was_killed = killed_at(step, lambda repository=repository: CHANGES[change](repository, artifact))
        after = state(repository)
        done = {
            "push": (("1", "2", "3", "4"), "2"),
            "upload": (("1", "2", "3", "4"), "2"),
            "promote": (before[0], "3"),
            "rollback": (before[0], "1"),
            "remove": (("1", "2"), "2"),
        }[change]
        assert after in (before, done), (step, after)
        if not was_killed:
            assert after == done, after
            break
        # Whatever was left behind, the next changes do what they should.
        if after == before:
            CHANGES[change](repository, artifact)
        assert state(repository) == done, (step, state(repository))
        if change == "promote":
            assert repository.rollback("m") == ("3", "2"), step
        if change in ("promote", "remove"):
            assert repository.rollback("m") == ("2", "1"), step
        repository.promote("m", "1", "next")
        assert not list((folder / str(step) / "m").glob(".*.part")), step
        step += 1
    sys.stdout.write(str(step))


if __name__ == "__main__":
    main(*sys.argv[1:])
