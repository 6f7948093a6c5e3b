#!/bin/bash
# Trains on 2 machines with 8 GPUs each: 16 tasks.
# Written by `leptonx launch slurm`. Submit it with `sbatch FILE`, from the folder in which the command is to run.

# What squeue shows, and part of the log's name.
#SBATCH --job-name=train
# Machines, tasks of each, and what each machine gives to the job.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
# SIGTERM to every task this long before the time limit: training saves, and ends with exit code 75.
#SBATCH --signal=TERM@120
# After a preemption or the failure of a machine, SLURM queues the job again.
#SBATCH --requeue
# One log for all its starts.
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append


# A failure or a hang ends all tasks (--kill-on-bad-exit), and all are started again on the same machines, from the last
# checkpoint. Exit code 2 is wrong use, 75 a preemption: neither gets better here.
restart=0
while true; do
  # Where the tasks meet: on the first machine, at another port each time, in case one is taken.
  export JAX_COORDINATOR_PORT=$((61440 + (SLURM_JOB_ID + 997 * restart) % 4096))
  srun --kill-on-bad-exit=1 \
    leptonx launch local --grace-s 110 --watchdog-s 600 -- python train.py
  code=$?
  if ((code == 0 || code == 2 || code == 75 || restart == 3)); then break; fi
  restart=$((restart + 1))
  echo "exit code $code: restart $restart of 3"
done

# Saved because it was told to stop: back into the queue, to go on later.
if ((code == 75)); then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
