"""A SLURM cluster of two nodes on this machine, of Debian's packages, of which nothing is installed."""

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import time

PACKAGES = (
    "slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge", "libmunge2", "libhwloc15",
)  # fmt: skip
RETRIES = "-oAcquire::Retries=5"

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
PluginDir={root}/usr/lib/x86_64-linux-gnu/slurm-wlm
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=2 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class SlurmCluster:
    """Starts a controller and two nodes as processes of this one. A context manager.

    Raises:
        AssertionError: if the packages cannot be had or the cluster does not start; a test that needs it must fail.
    """

    def __init__(self, folder):
        self._folder = pathlib.Path(folder)
        self._root = self._folder / "root"
        self._daemons = []

    def __enter__(self):
        self._download()
        libraries = self._root / "usr/lib/x86_64-linux-gnu"
        self.environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))},
            "SLURM_CONF": str(self._folder / "slurm.conf"),
            "LD_LIBRARY_PATH": f"{libraries / 'slurm-wlm'}:{libraries}",
            "PATH": f"{self._root / 'usr/bin'}:{os.environ['PATH']}",
        }
        host, port = socket.gethostname().split(".")[0], _three_ports()
        (self._folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=host, root=self._root, folder=self._folder, port=port, first=port + 1, last=port + 2
            )
        )
        for name in ("state", "spool-n1", "spool-n2"):
            (self._folder / name).mkdir()
        try:
            self._start("slurmctld-wlm", "-D")
            for node in ("n1", "n2"):
                self._start("slurmd-wlm", "-D", "-N", node, "-d", self._root / "usr/sbin/slurmstepd-wlm")
            self.wait_until(self.is_idle, 60)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc):
        with contextlib.suppress(AssertionError):
            self.run("scancel", "--user=root")
            self.wait_until(lambda: not self.run("squeue", "-h"), 20)
        for daemon in self._daemons:
            daemon.terminate()
        for daemon in self._daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(timeout=5)
            daemon.kill()
            daemon.wait()

    def run(self, *command, **kwargs):
        """Standard output of a command that must succeed."""
        done = subprocess.run(
            command, env=self.environ, capture_output=True, text=True, timeout=120, check=False, **kwargs
        )
        assert done.returncode == 0, f"{command[0]}: {done.stderr}{self._logs()}"
        return done.stdout

    def is_idle(self):
        """Whether both nodes are done with all that they ran."""
        return self.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2"

    def job(self, number):
        """The fields of `scontrol show job`."""
        words = self.run("scontrol", "show", "job", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_until(self, condition, seconds):
        """Waits for a condition; errors of commands count as not yet."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(AssertionError):
                if condition():
                    return
            assert time.monotonic() < deadline, f"not within {seconds} s{self._logs()}"
            time.sleep(0.2)

    def _start(self, program, *args):
        with open(self._folder / "daemons.log", "a") as log:
            command = [self._root / "usr/sbin" / program, "-f", self._folder / "slurm.conf", *args]
            self._daemons.append(subprocess.Popen(command, env=self.environ, stdout=log, stderr=log))

    def _logs(self):
        log = self._folder / "daemons.log"
        return "\n" + "\n".join(log.read_text().splitlines()[-20:]) if log.exists() else ""

    def _download(self):
        packages = self._folder / "packages"
        packages.mkdir()
        if not _downloaded(packages):
            subprocess.run(["apt-get", RETRIES, "update"], capture_output=True, timeout=240, check=False)
            done = _downloaded(packages)
            assert done, "Debian's packages of SLURM cannot be had: apt-get download failed"
        for package in packages.glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, self._root], check=True, timeout=60)


def _downloaded(folder):
    assert shutil.which("apt-get"), "this test needs Debian's apt-get"
    done = subprocess.run(
        ["apt-get", RETRIES, "download", *PACKAGES], cwd=folder, capture_output=True, timeout=240, check=False
    )
    return done.returncode == 0


def _three_ports():
    """The first of three free ports in a row."""
    for port in range(17000, 18000, 3):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for number in range(port, port + 3):
                stack.enter_context(socket.create_server(("", number)))
            return port
    raise AssertionError("no three free ports in a row")
