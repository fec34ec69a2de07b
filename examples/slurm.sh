#!/usr/bin/env bash
# A run on two Slurm nodes of eight GPUs each; what follows the script is for `mimo fit`.
#
#     sbatch examples/slurm.sh --config examples/configs/two-nodes.yaml --trainer.default_root_dir=runs/NAME
#
# Slurm starts the ranks, one task each: --nodes must be trainer.num_nodes and --ntasks-per-node trainer.devices.
# Ninety seconds before the time is up it sends SIGUSR1; all ranks then save hpc_ckpt_N.ckpt in
# trainer.default_root_dir at the end of the same step, and the first requeues the job, which goes on from there. A run
# without --ckpt_path goes on from any hpc_ckpt_N.ckpt that is there, so each experiment needs a folder of its own.
#SBATCH --job-name=mimo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --signal=SIGUSR1@90
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

export CUDA_DEVICE_MAX_CONNECTIONS=1
export TRITON_CACHE_AUTOTUNING=1
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

srun .venv/bin/mimo fit "$@"
