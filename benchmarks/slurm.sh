#!/bin/bash
# Stage 2 of the paper on two nodes of four 80 GB GPUs under ZeRO-3: sbatch benchmarks/slurm.sh
# One torchrun per node; --out and --init must be on a file system that every node sees. If a process or a node is lost, Slurm
# ends the job; submitting it again goes on from the last checkpoint. The number of nodes and GPUs must then be the same.
#SBATCH --job-name=medv
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=48:00:00

set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 .venv/bin/torchrun --nnodes "$SLURM_NNODES" --nproc_per_node 4 \
    --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$first:29500" \
    -m medv train instruct --profile paper --deepspeed zero3 \
    --data llava_med_instruct --data-dir data/llava_med --init runs/paper/stage1 --out runs/paper/stage2
