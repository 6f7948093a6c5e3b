"""Kills a process with SIGKILL at a step of a swap, once, when a file of the step's name appears in a folder.

`environment(folder)` has every Python process that is started with it do so: Python imports `sitecustomize` by itself.
"""

import os
import pathlib

# Step -> the module and the function in it before whose call the process is killed, or after it.
STEPS = {
    "manifest": ("lepton_xla.compiler.loading", "read_trusted_manifest", "before"),
    "weights": ("lepton_xla.compiler.loading", "read_all", "before"),
    "checked": ("lepton_xla.compiler.loading", "check_weights", "after"),
    "warm": ("lepton_xla.serve.batching.engine", "Engine.warm_up", "before"),
    "opened": ("lepton_xla.serve.loader", "ArtifactLoader.open", "after"),
    "commit": ("lepton_xla.serve.models.host", "Host.commit", "before"),
    "committed": ("lepton_xla.serve.models.host", "Host.commit", "after"),
    "freed": ("lepton_xla.serve.loader", "ArtifactLoader.close", "before"),
}

_HOOK = """
import functools, importlib.util, operator, os, signal, sys

FOLDER, STEPS = {folder!r}, {steps!r}


def kill(step):
    try:
        os.unlink(os.path.join(FOLDER, step))
    except OSError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def patch(module, path, step, when):
    *owner, name = path.split(".")
    owner = operator.attrgetter(".".join(owner))(module) if owner else module
    function = getattr(owner, name)

    @functools.wraps(function)
    def killed(*args, **kwargs):
        if when == "before":
            kill(step)
        result = function(*args, **kwargs)
        if when == "after":
            kill(step)
        return result

    setattr(owner, name, killed)


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        steps = [(step, function, when) for step, (module, function, when) in STEPS.items() if module == name]
        if not steps:
            return None
        sys.meta_path.remove(Finder)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, Finder)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            for step, function, when in steps:
                patch(module, function, step, when)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder)
"""


def environment(folder):
    """What to add to the environment of a process; a step is armed by creating a file of its name in the folder."""
    hook = pathlib.Path(folder) / "hook"
    hook.mkdir(parents=True)
    (hook / "sitecustomize.py").write_text(_HOOK.format(folder=str(folder), steps=STEPS))
    return {"PYTHONPATH": os.pathsep.join([str(hook), *filter(None, [os.environ.get("PYTHONPATH")])])}
