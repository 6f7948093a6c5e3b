"""docs/start.md as a newcomer does it: its files are saved and its commands run, in their order."""

import os
import pathlib
import shlex
import signal
import subprocess
import sys

import pytest
from blocks import ROOT, blocks

BIN = pathlib.Path(sys.executable).parent
PAGE = ROOT / "docs" / "start.md"


def environment():
    kept = {name: value for name, value in os.environ.items() if name != "LEPTON_CACHE"}
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return kept | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu",
        "LEPTON_CACHE": "off", "LEPTON_PORT": "0",
    }  # fmt: skip


@pytest.mark.slow
def test_five_minutes(tmp_path):
    server, url, printed = None, "", ""
    try:
        for block in blocks(PAGE.read_text(encoding="utf-8")):
            code = block.code.replace("http://127.0.0.1:8000", url or "http://127.0.0.1:8000")
            if block.title:
                (tmp_path / block.title).write_text(code, encoding="utf-8")
            elif block.language == "sh" and not block.not_run:
                for line in code.strip().splitlines():
                    if line.startswith("leptonx serve"):
                        words = shlex.split(line.replace("--port 8000", "--port 0"))
                        server = subprocess.Popen(
                            words, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
                        )
                        url = server.stdout.readline().split()[-1]
                    else:
                        words = ["bash", "-c", line]
                        done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True,
                                              timeout=280, check=False)  # fmt: skip
                        assert done.returncode == 0, (line, done.stderr)
                        printed += done.stdout
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
    finally:
        if server is not None:
            server.kill()
            server.stdout.close()
    assert "2 of 2 sites change" in printed
    assert '"name":"digits"' in printed
    assert "[0 1 2 3 4] [0 1 2 3 4]" in printed
