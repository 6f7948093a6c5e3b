"""Another process, which may use one core only."""

import pathlib

ON_ONE_CORE = """
import os, sys
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
sys.path.insert(0, {here!r})
from {module} import digest
print(digest())
"""


def here():
    """The folder of the tests, for `ON_ONE_CORE`."""
    return str(pathlib.Path(__file__).parent)
