#!/usr/bin/env bash
# The digits example on one Slurm node of four tasks; for more nodes set --nodes and Trainer(num_nodes=...) alike.
#
#     sbatch examples/slurm.sh
#
# Slurm starts the ranks, one task each: --ntasks-per-node must be Trainer(devices=...). Ninety seconds before the time
# is up it sends SIGUSR1; all ranks then save hpc_ckpt_N.ckpt under Trainer(default_root_dir=...) at the end of the same
# step, and the first requeues the job, which goes on from there.
#SBATCH --job-name=mimo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=4
#SBATCH --time=04:00:00
#SBATCH --signal=SIGUSR1@90
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

export CUDA_DEVICE_MAX_CONNECTIONS=1
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

srun .venv/bin/python examples/train_digits.py "$@"
