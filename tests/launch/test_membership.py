"""Which process of which run this is, from the environment of each launcher."""

import pytest

from lepton_xla.errors import LaunchError
from lepton_xla.launch.membership import ALONE, Membership, explicit, first_host, slurm

OURS = {"JAX_COORDINATOR_ADDRESS": "host:1234", "LEPTON_NUM_PROCESSES": "4", "LEPTON_PROCESS_ID": "3"}
TASK = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_NODELIST": "n[07-08]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_GPUS_ON_NODE": "8",
}


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


def test_what_our_launcher_says():
    assert explicit(OURS) == Membership(3, 4, "host:1234")
    assert explicit({}) is None
    assert explicit({"JAX_COORDINATOR_ADDRESS": "host:1"}) is None  # SLURM may know the rest
    assert explicit({"LEPTON_NUM_PROCESSES": "1"}) == ALONE


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        (without(OURS, "LEPTON_PROCESS_ID"), "LEPTON_PROCESS_ID is missing"),
        (without(OURS, "LEPTON_NUM_PROCESSES"), "LEPTON_NUM_PROCESSES is missing"),
        (without(OURS, "JAX_COORDINATOR_ADDRESS"), "JAX_COORDINATOR_ADDRESS is missing"),
        (OURS | {"LEPTON_PROCESS_ID": "4"}, "process 4 of 4"),
        (OURS | {"LEPTON_PROCESS_ID": "-1"}, "LEPTON_PROCESS_ID='-1' is not a whole number"),
        (OURS | {"LEPTON_NUM_PROCESSES": "0"}, "process 3 of 0"),
        (OURS | {"LEPTON_NUM_PROCESSES": "two"}, "'two' is not a whole number"),
    ],
)
def test_what_our_variables_may_not_be(environ, said):
    with pytest.raises(LaunchError, match=said):
        explicit(environ)


def test_a_task_of_srun():
    # JAX's own port for the job: 61440 + 4100 % 4096.
    assert slurm(TASK) == Membership(11, 16, "n07:61444", (3,))
    assert slurm(TASK | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:99"}).coordinator == "10.0.0.1:99"
    assert slurm(TASK | {"JAX_COORDINATOR_PORT": "99"}).coordinator == "n07:99"
    assert slurm({}) is None
    assert slurm(TASK | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None


@pytest.mark.parametrize(
    ("changes", "devices"),
    [
        ({}, (3,)),  # eight tasks share eight GPUs
        ({"CUDA_VISIBLE_DEVICES": "3"}, None),  # --gpus-per-task=1: each task sees its own only
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}, None),  # one task a node has all
        ({"SLURM_STEP_TASKS_PER_NODE": "4,2", "SLURM_LOCALID": "1"}, (4, 5, 6, 7)),  # the second node's two tasks
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_LOCALID": "3"}, (6, 7)),
        ({"SLURM_GPUS_ON_NODE": ""}, None),  # no GPUs
        ({"JAX_LOCAL_DEVICE_IDS": "5"}, None),  # JAX reads it
    ],
)
def test_the_gpus_of_a_task(changes, devices):
    assert slurm(TASK | changes).local_devices == devices


def test_gpus_that_cannot_be_divided():
    with pytest.raises(LaunchError, match="8 GPUs cannot be divided among the 3 tasks"):
        slurm(TASK | {"SLURM_STEP_TASKS_PER_NODE": "3(x2)"})


@pytest.mark.parametrize(
    "missing",
    [
        ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),  # an ssh session into a node
        ("SLURM_STEP_NODELIST",),  # the batch script itself
        ("SLURM_LOCALID",),
    ],
)
def test_inside_a_job_but_no_task(missing):
    with pytest.raises(LaunchError, match=rf"inside a SLURM job, but {', '.join(missing)} .* missing.*LEPTON_CLUSTER"):
        slurm(without(TASK, *missing))


def test_a_job_of_one_task_needs_no_srun():
    assert slurm({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1"}) is None
    assert slurm({"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1"}) is None


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("node001", "node001"), ("node001,host2", "node001"), ("node[001-0015],host2", "node001"), ("a[3,7-9]b", "a3b")],
)
def test_the_first_host(nodes, host):
    assert first_host(nodes) == host


def test_no_host():
    with pytest.raises(LaunchError, match="names no node"):
        first_host("")
