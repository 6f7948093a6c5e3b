"""Run as a program: leads the process group of one attempt, and kills it if the launcher dies.

The launcher holds the other end of this process's stdin. It never writes to it, so the end of the file means that the
launcher is gone, however it died. Run by path with only Python's standard library, so it starts in milliseconds.
"""

import os
import shutil
import signal
import sys


def main() -> None:
    """Wait for the end of stdin, then remove the folder given as argument and kill the group, this process included."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 4096):
        pass
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
