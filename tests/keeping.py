"""What errors keep alive."""

import contextlib
import gc
import types


@contextlib.contextmanager
def nothing_kept():
    """Fails if what runs inside leaves cycles that hold an exception, a traceback or a frame."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield
        gc.collect()
        kinds = BaseException | types.TracebackType | types.FrameType
        left = [repr(each)[:200] for each in gc.garbage if isinstance(each, kinds)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
        gc.collect()
    assert not left, left
