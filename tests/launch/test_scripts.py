"""Files that start a run elsewhere: they say what the page says, fit the published schemas, and run."""

import dataclasses
import json
import os
import pathlib
import re
import shlex
import subprocess

import pytest
import yaml
from click.testing import CliRunner
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from lepton_xla.cli import main
from lepton_xla.errors import LaunchError
from lepton_xla.launch.jobset import JobSet, hosts_of
from lepton_xla.launch.slurm import SlurmJob
from lepton_xla.launch.tpu_vm import TpuVm

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    leptonx (launch .* --output (launch/\S+) -- .*)$", PAGE, re.MULTILINE)
TRAIN = ("python", "train.py", "--name", "a 'b' $c @{d}", "--rate=1e-3")


@pytest.fixture
def bin_folder(tmp_path, monkeypatch):
    """A folder at the head of PATH, for programs that stand for others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def stand_in(folder, name, body):
    """A program that writes its arguments and some variables down, one JSON line a call, and then does something."""
    record = f"""
import json, os, sys
number = len(open({str(folder / "calls")!r}).readlines()) if os.path.exists({str(folder / "calls")!r}) else 0
names = ("JAX_COORDINATOR_PORT", "SRUN_CPUS_PER_TASK", "SETUP")
with open({str(folder / "calls")!r}, "a") as out:
    call = [{name!r}, *sys.argv[1:]], {{name: os.environ[name] for name in names if name in os.environ}}
    print(json.dumps(call), file=out)
{body}
"""
    (folder / f"{name}.py").write_text(record)
    (folder / name).write_text(f'#!/bin/bash\nexec python3 "{folder / name}.py" "$@"\n')
    (folder / name).chmod(0o755)


def calls(folder):
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


# The checked-in files.


def test_the_page_has_a_command_for_each_file():
    assert sorted(path for _, path in COMMANDS) == sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "launch").iterdir()
    )


@pytest.mark.parametrize(("command", "path"), COMMANDS, ids=[path for _, path in COMMANDS])
def test_the_checked_in_files_are_what_the_commands_write(command, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "launch").mkdir()
    done = CliRunner().invoke(main, shlex.split(command))
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    assert (tmp_path / path).read_text() == (ROOT / path).read_text(encoding="utf-8")
    assert os.access(tmp_path / path, os.X_OK) == path.endswith(".sh")


@pytest.mark.parametrize("path", sorted(path.name for path in (ROOT / "launch").glob("*.sh")))
def test_bash_reads_the_scripts(path):
    subprocess.run(["bash", "-n", ROOT / "launch" / path], check=True)


def test_the_file_is_printed_or_wrapped_in_json():
    command = ["slurm", "--nodes", "1", "--gpus-per-node", "0"]
    text = CliRunner().invoke(main, ["launch", *command, "--", *TRAIN]).stdout
    assert text.startswith("#!/bin/bash\n# Trains on 1 machine: 1 task.\n")
    document = json.loads(CliRunner().invoke(main, ["launch", *command, "--json", "--", *TRAIN]).stdout)
    assert document == {"file": None, "text": text}


# Kubernetes.


def unknown(given, read, path="JobSet"):
    """Fields of a manifest that its API does not have: they are lost in reading it."""
    if isinstance(given, dict):
        read = read if isinstance(read, dict) else {}
        for name, value in given.items():
            if name not in read:
                yield f"{path}.{name}"
            else:
                yield from unknown(value, read[name], f"{path}.{name}")
    elif isinstance(given, list):
        assert isinstance(read, list)
        assert len(read) == len(given)
        for number, (value, other) in enumerate(zip(given, read, strict=True)):
            yield from unknown(value, other, f"{path}[{number}]")
    elif given != read:
        yield f"{path}: {given!r} is read as {read!r}"


def validated(text):
    """A manifest, checked strictly against the published models of the JobSet API and of the core API in it."""
    manifest = yaml.safe_load(text)
    assert not list(unknown(manifest, JobsetV1alpha2JobSet.from_dict(manifest).to_dict()))
    return manifest


GPUS = JobSet(TRAIN, "example/train:1", hosts=4, gpus=8, claims={"/checkpoints": "mine"}, selector={"a/b": "yes"})
TPUS = JobSet(TRAIN, "example/train:1", topology="4x8", accelerator="tpu-v6e-slice", slices=2, namespace="ml")


@pytest.mark.parametrize(
    "job",
    [
        GPUS,
        TPUS,
        dataclasses.replace(GPUS, hosts=1, claims={}, selector={}, accelerator="nvidia-h100-80gb"),
        dataclasses.replace(TPUS, claims={"/a": "a", "/b": "b"}, topology="1x1", watch=("--watchdog-s", "60")),
    ],
)
def test_manifests_fit_the_published_api(job):
    manifest = validated(job.manifest())
    spec = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = spec["template"]["spec"]
    assert pod["containers"][0]["command"][-len(TRAIN) :] == list(TRAIN)
    assert pod["terminationGracePeriodSeconds"] > int(pod["containers"][0]["command"][4])
    # These are enumerations of the API, which its models have as plain texts.
    assert manifest["spec"]["failurePolicy"]["restartStrategy"] in ("Recreate", "BlockingRecreate", "InPlaceRestart")
    assert {rule["action"] for rule in manifest["spec"]["failurePolicy"]["rules"]} <= {
        "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts",
    }  # fmt: skip
    assert spec["completionMode"] == "Indexed"
    names = {mount["name"] for mount in pod["containers"][0].get("volumeMounts", [])}
    assert names == {volume["name"] for volume in pod.get("volumes", [])}


def test_a_pod_with_gpus_knows_its_place():
    manifest = validated(GPUS.manifest())
    [job] = manifest["spec"]["replicatedJobs"]
    assert (job["replicas"], job["template"]["spec"]["parallelism"], job["template"]["spec"]["completions"]) == (
        1,
        4,
        4,
    )
    container = job["template"]["spec"]["template"]["spec"]["containers"][0]
    env = {entry["name"]: entry for entry in container["env"]}
    # The first pod's name: JobSet, replicated job, its number, the pod's number, in the subdomain of the JobSet.
    assert env["JAX_COORDINATOR_ADDRESS"]["value"] == "train-worker-0-0.train:8476"
    assert env["LEPTON_NUM_PROCESSES"]["value"] == "4"
    field = env["LEPTON_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}


def test_a_tpu_slice_is_a_job():
    manifest = validated(TPUS.manifest())
    [job] = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["parallelism"], spec["completions"]) == (2, 8, 8)  # 32 chips, 4 a machine
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x8",
    }
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}


def test_the_check_sees_what_the_api_does_not_have():
    manifest = yaml.safe_load(GPUS.manifest())
    manifest["spec"]["failurePolicy"]["maxRestart"] = 3
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    pod["containers"][0]["imag"] = "x"
    found = list(unknown(manifest, JobsetV1alpha2JobSet.from_dict(manifest).to_dict()))
    assert [text.rpartition(".")[2] for text in found] == ["maxRestart", "imag"]
    manifest["spec"]["failurePolicy"]["maxRestarts"] = "3"
    with pytest.raises(ValueError, match="valid integer"):
        JobsetV1alpha2JobSet.from_dict(manifest)


def test_hosts_of_a_topology():
    assert [hosts_of(text, 4) for text in ("1x1", "2x2", "4x4", "2x2x4")] == [1, 1, 4, 4]
    assert hosts_of("4x4", 8) == 2


# SLURM.


@pytest.fixture
def slurm(bin_folder, monkeypatch):
    """Runs a script with programs that stand for SLURM's; srun ends with the given codes, one after the other."""

    def run(job, *codes):
        stand_in(bin_folder, "srun", f"sys.exit({list(codes)}[number])")
        stand_in(bin_folder, "scontrol", "")
        for name, value in {"SLURM_JOB_ID": "4100", "SLURM_JOB_NODELIST": "n[1-2]"}.items():
            monkeypatch.setenv(name, value)
        done = subprocess.run(["bash"], input=job.script(), capture_output=True, text=True, check=False)
        return done, calls(bin_folder)

    return run


JOB = SlurmJob(TRAIN, nodes=2, gpus_per_node=8, max_restarts=2)


def test_srun_gets_the_command_as_it_was_given(slurm):
    job = dataclasses.replace(JOB, cpus_per_task=6, setup=("export SETUP='a b'",), watch=("--watchdog-s", "600"))
    done, [(words, environ)] = slurm(job, 0)
    assert (done.returncode, done.stdout) == (0, "")
    supervisor = ["leptonx", "launch", "local", "--grace-s", "110", "--watchdog-s", "600", "--"]
    assert words == ["srun", "--kill-on-bad-exit=1", *supervisor, *TRAIN]
    assert environ == {"JAX_COORDINATOR_PORT": "61444", "SRUN_CPUS_PER_TASK": "6", "SETUP": "a b"}


def test_a_failure_starts_all_tasks_again_at_another_port(slurm):
    done, made = slurm(JOB, 1, 124, 0)
    assert done.returncode == 0
    assert done.stdout.splitlines() == ["exit code 1: restart 1 of 2", "exit code 124: restart 2 of 2"]
    assert len({environ["JAX_COORDINATOR_PORT"] for _, environ in made}) == 3


def test_restarts_are_bounded_on_slurm(slurm):
    done, made = slurm(JOB, 1, 1, 137)
    assert done.returncode == 137
    assert [words[0] for words, _ in made] == ["srun"] * 3


def test_a_preempted_job_is_queued_again(slurm):
    done, made = slurm(JOB, 75)
    assert done.returncode == 75
    assert [words for words, _ in made][1:] == [["scontrol", "requeue", "4100"]]


def test_wrong_use_is_final(slurm):
    done, made = slurm(JOB, 2)
    assert (done.returncode, len(made)) == (2, 1)


def test_options_of_sbatch():
    job = dataclasses.replace(JOB, time="1:00:00", partition="gpu", account="us", more=("--qos=high", "-C a100"))
    options = re.findall(r"^#SBATCH (.*)$", job.script(), re.MULTILINE)
    assert options == [
        "--job-name=train", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=1:00:00",
        "--partition=gpu", "--account=us", "--qos=high", "-C a100", "--signal=TERM@120", "--requeue",
        "--output=%x-%j.log", "--open-mode=append",
    ]  # fmt: skip
    assert "--ntasks-per-node=1\n" in dataclasses.replace(JOB, tasks_per_node=1).script()
    assert "gpus" not in dataclasses.replace(JOB, gpus_per_node=0).script()


def test_submit_hands_the_script_to_sbatch(bin_folder):
    stand_in(
        bin_folder, "sbatch", "print('Submitted batch job 7' if sys.stdin.readline() == '#!/bin/bash\\n' else 'no')"
    )
    command = ["launch", "slurm", "--nodes", "1", "--gpus-per-node", "1", "--submit", "--", "true"]
    done = CliRunner().invoke(main, command)
    assert (done.exit_code, done.stdout) == (0, "Submitted batch job 7\n")
    stand_in(bin_folder, "sbatch", "sys.exit('sbatch: error: invalid partition')")
    done = CliRunner().invoke(main, command)
    assert (done.exit_code, done.stderr) == (
        2,
        "leptonx: sbatch refused the script: sbatch: error: invalid partition\n",
    )


def test_submit_without_slurm(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = CliRunner().invoke(main, ["launch", "slurm", "--nodes", "1", "--gpus-per-node", "1", "--submit", "--", "a"])
    assert done.exit_code == 2
    assert "sbatch cannot be started: No such file or directory" in done.stderr


# TPU machines.


@pytest.fixture
def tpu(bin_folder):
    """Runs the script of a TPU slice with a program that stands for gcloud; training ends with the given codes."""

    def run(job, verb, *codes):
        stand_in(
            bin_folder,
            "gcloud",
            f"codes, count = {list(codes)}, open({str(bin_folder / 'calls')!r}).read().count('exec leptonx')\n"
            "if 'exec leptonx' in sys.argv[-1]: sys.exit(codes[count - 1])\n"
            "for word in sys.argv:\n"
            "    name, _, path = word.partition('startup-script=')\n"
            f"    if path: open({str(bin_folder / 'startup')!r}, 'w').write(open(path).read())",
        )
        done = subprocess.run(["bash", "-s", verb], input=job.script(), capture_output=True, text=True, check=False)
        return done, [words for words, _ in calls(bin_folder)]

    return run


VM = TpuVm(TRAIN, "v5litepod-16", "v2-alpha-tpuv5-lite", "us-east5-a", project="mine", max_restarts=2)
WHERE = ["--zone=us-east5-a", "--project=mine"]


def test_create_gives_machines_a_startup_script(tpu, bin_folder):
    done, [words] = tpu(dataclasses.replace(VM, spot=True, setup=("echo 'a  b' $HOME",)), "create")
    assert done.returncode == 0, done.stderr
    assert words[:-1] == [
        "gcloud", "compute", "tpus", "tpu-vm", "create", "train", *WHERE,
        "--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot",
    ]  # fmt: skip
    lines = (bin_folder / "startup").read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    assert "echo 'a  b' $HOME" in lines
    assert not pathlib.Path(words[-1].partition("startup-script=")[2]).exists()  # it was a temporary file


def test_run_starts_the_command_on_every_machine(tpu):
    done, made = tpu(VM, "run", 0)
    assert done.returncode == 0
    ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "train", *WHERE, "--worker=all"]
    assert [words[:-1] for words in made] == [ssh, ssh]  # the first waits for the startup script
    remote = made[1][-1].removeprefix("--command=")
    words = shlex.split(remote)
    assert words[:2] == ["cd", "train"]
    assert words[-len(TRAIN) :] == list(TRAIN)


@pytest.mark.parametrize(("codes", "code"), [((1, 124, 0), 0), ((1, 1, 137), 137), ((75,), 75), ((2,), 2)])
def test_run_starts_all_again_a_bounded_number_of_times(tpu, codes, code):
    done, made = tpu(VM, "run", *codes)
    assert done.returncode == code
    assert sum("exec leptonx" in words[-1] for words in made) == len(codes)
    assert sum("pkill -KILL" in words[-1] for words in made) == len(codes) - 1


def test_other_verbs(tpu):
    assert tpu(VM, "stop")[1][0][-1].startswith("--command=pkill -TERM")
    assert tpu(VM, "delete")[1][-1] == ["gcloud", "compute", "tpus", "tpu-vm", "delete", "train", *WHERE, "--quiet"]
    assert tpu(VM, "copy")[1][-1][5:8] == ["--recurse", ".", "train:train"]
    done, _ = tpu(VM, "fly")
    assert (done.returncode, done.stderr) == (2, "usage: bash create|copy|run|stop|delete\n")


# What cannot be.


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        (JOB, {"nodes": 0}, "nodes must be at least 1, not 0"),
        (JOB, {"command": ()}, "give the command to start"),
        (JOB, {"name": "a b"}, "may not have blanks"),
        (JOB, {"time": "1:00\n#SBATCH --nodes=99"}, "expected one line"),
        (JOB, {"more": ("qos=high",)}, "no option of sbatch"),
        (JOB, {"setup": ("a\nb",)}, "expected one line"),
        (JOB, {"warn_s": 10}, "warn_s must be at least 11"),
        (GPUS, {"hosts": 0}, "give either hosts"),
        (GPUS, {"topology": "4x4"}, "give either hosts"),
        (GPUS, {"name": "Train"}, "expected at most 40 lower-case letters"),
        (GPUS, {"image": ""}, "give the container's image"),
        (GPUS, {"claims": {"relative": "claim"}}, "expected an absolute path"),
        (GPUS, {"command": ("python", "a\nb")}, "expected one line"),
        (TPUS, {"topology": "4by4"}, "is no TPU topology"),
        (TPUS, {"topology": "3x3"}, "9 chips of the topology 3x3 do not fill machines of 4"),
        (TPUS, {"accelerator": ""}, "needs the kind of TPU"),
        (VM, {"zone": "a; rm -rf ."}, "zone 'a; rm"),
        (VM, {"folder": "a b"}, "expected a path without blanks"),
        (VM, {"setup": ("STARTUP",)}, "ends the startup script"),
        (VM, {"max_restarts": -1}, "at least 0"),
    ],
)
def test_what_cannot_be_is_refused(kind, fields, said):
    with pytest.raises(LaunchError, match=said):
        written(kind, fields)


def written(kind, fields):
    changed = dataclasses.replace(kind, **fields)
    return changed.manifest() if isinstance(changed, JobSet) else changed.script()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["slurm", "--nodes", "0", "--gpus-per-node", "1", "--", "a"], "--nodes"),
        (["slurm", "--nodes", "1", "--gpus-per-node", "1"], "COMMAND"),
        (["jobset", "--image", "i", "--", "a"], "give either hosts"),
        (["jobset", "--image", "i", "--hosts", "1", "--claim", "/a", "--", "a"], "'/a': expected PATH=CLAIM"),
        (["slurm", "--nodes", "1", "--gpus-per-node", "1", "--output", "no/such/file", "--", "a"], "does not exist"),
        (["slurm", "--nodes", "1", "--gpus-per-node", "1", "--output", ".", "--", "a"], "is a folder"),
        (["jobset", "--image", "i", "--hosts", "1", "--watchdog-compile-s", "5", "--", "a"], "need --watchdog-s"),
    ],
)
def test_the_command_line_refuses_in_one_line(args, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["launch", *args])
    assert done.exit_code == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
