#!/bin/bash
# @{title}
# Written by `leptonx launch slurm`. Submit it with `sbatch FILE`, from the folder in which the command is to run.

# What squeue shows, and part of the log's name.
#SBATCH --job-name=@{name}
# Machines, tasks of each, and what each machine gives to the job.
#SBATCH --nodes=@{nodes}
#SBATCH --ntasks-per-node=@{tasks}
#SBATCH --gpus-per-node=@{gpus}
#SBATCH --cpus-per-task=@{cpus}
#SBATCH --time=@{time}
#SBATCH --partition=@{partition}
#SBATCH --account=@{account}
@{more}
# SIGTERM to every task this long before the time limit: training saves, and ends with exit code 75.
#SBATCH --signal=TERM@@@{warn_s}
# After a preemption or the failure of a machine, SLURM queues the job again.
#SBATCH --requeue
# One log for all its starts.
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append

@{setup}
export SRUN_CPUS_PER_TASK=@{cpus}  # srun does not take it from the options above

# A failure or a hang ends all tasks (--kill-on-bad-exit), and all are started again on the same machines, from the last
# checkpoint. Exit code 2 is wrong use, 75 a preemption: neither gets better here.
restart=0
while true; do
  # Where the tasks meet: on the first machine, at another port each time, in case one is taken.
  export JAX_COORDINATOR_PORT=$((61440 + (SLURM_JOB_ID + 997 * restart) % 4096))
  srun --kill-on-bad-exit=1 \
    @{command}
  code=$?
  if ((code == 0 || code == 2 || code == 75 || restart == @{max_restarts})); then break; fi
  restart=$((restart + 1))
  echo "exit code $code: restart $restart of @{max_restarts}"
done

# Saved because it was told to stop: back into the queue, to go on later.
if ((code == 75)); then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
