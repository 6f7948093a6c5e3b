"""Compiled code that is in memory once, however many models have it: their weights are its arguments.

Fifty models of one program run in turn. With code of its own each, the processor's caches hold none of it when it is
needed.

What is equal is told by the digest of all that code depends on (`fit`), as where an update runs on its base's code: the
bytes are not equal, since XLA numbers modules and orders functions anew each time that it compiles one program. Nobody
computes that digest again on loading, so whoever trusts certain keys shares code only with who trusts the same.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Sequence

from lepton_xla.compiler import _xla
from lepton_xla.compiler.code import Code


class Shared:
    """Loaded code. It goes with the last model that holds this.

    Args:
        loaded: the executable.
        nbytes: of its serialized form.

    Attributes:
        loaded, nbytes: as given.
        users: what runs it, which may be gone at any time.
    """

    __slots__ = ("__weakref__", "loaded", "nbytes", "users")

    def __init__(self, loaded: _xla.Loaded, nbytes: int) -> None:
        self.loaded = loaded
        self.nbytes = nbytes
        self.users: weakref.WeakSet[object] = weakref.WeakSet()


type _Key = tuple[tuple[str, ...], tuple[_xla.Device, ...]]

_ALL: weakref.WeakValueDictionary[_Key, Shared] = weakref.WeakValueDictionary()
_LOCK = threading.Lock()


def shared_code(blob: bytes, devices: Sequence[_xla.Device], name: str, program: str) -> Shared:
    """Load serialized code, or take what another model of this process has loaded of the same program.

    Args:
        blob: the code. Code that calls other kernels is other code, though its program is the same.
        devices: what it runs on. Nothing else is chosen when code is loaded.
        name: of its bucket.
        program: tells the program, what it was compiled for and by, and who is trusted to have done it; empty if that
            is unknown: then equal bytes are.

    Raises:
        ArtifactError: if the bytes are not code for these devices; names the bucket.
    """
    what = (program, name, *_xla.kernels_called(blob)) if program else (hashlib.sha256(blob).hexdigest(),)
    key = what, tuple(devices)
    with _LOCK:
        found = _ALL.get(key)
    if found is None:
        made = Shared(Code.read(blob, devices, name).loaded, len(blob))  # not under the lock: others load meanwhile
        with _LOCK:
            found = _ALL.setdefault(key, made)
    return found
