"""Open files, of which each connection is one: as many connections as there is room for, and the reserve beside them.

Where accepting fails because no file can be opened, the reserve of connections that ask for health is of no use.
"""

from __future__ import annotations

import dataclasses
import logging
import resource

from lepton_xla.errors import ServeError
from lepton_xla.serve.http.reserve import RESERVED
from lepton_xla.serve.limits import Limits

_log = logging.getLogger("lepton_xla.serve")

# Files that a serving process has open beside its connections, with room to spare; and where few may be open.
_OTHERS = 256
_FEWEST_OTHERS = 64


def make_room(limits: Limits) -> Limits:
    """Lets this process, and those it starts, open as many files as it may have connections, as far as the system lets.

    Args:
        limits: what was asked for.

    Returns:
        The same, or with fewer connections where there would be no file left to answer for health beyond them.

    Raises:
        ServeError: where not even one connection has room.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.max_connections + RESERVED + _OTHERS
    if hard != resource.RLIM_INFINITY and hard < wanted:
        others = min(_OTHERS, max(_FEWEST_OTHERS, hard // 4))
        room = hard - RESERVED - others
        if room < 1:
            raise ServeError(
                f"this process may open {hard} files, and a server needs {RESERVED + others + 1}: raise the hard limit "
                "(ulimit -Hn)"
            )
        if room < limits.max_connections:
            _log.warning(
                "this process may open %d files: --max-connections is %d, not %d, so that health is answered beyond it",
                hard, room, limits.max_connections,
            )  # fmt: skip
            limits = dataclasses.replace(limits, max_connections=room)
        wanted = hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return limits
