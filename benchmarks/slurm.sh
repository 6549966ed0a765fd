#!/bin/bash
# A training on two nodes of four 80 GB GPUs: stage 2 of the paper under ZeRO-3, or the stage and options that are given.
#   sbatch benchmarks/slurm.sh
#   sbatch --nodes=4 benchmarks/slurm.sh align --profile paper --deepspeed zero3 --data llava_med_align --data-dir data/llava_med \
#       --init runs/paper/start --out runs/paper/stage1
# Submit it from the source tree. One torchrun per node; --out, --init and the data must be on a file system that every node
# sees. If a process or a node is lost, Slurm ends the job; submitting it again, with the same number of nodes and GPUs, resumes
# from the last checkpoint.
#SBATCH --job-name=medv
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=48:00:00

set -euo pipefail
if [ $# -eq 0 ]; then
    set -- instruct --profile paper --deepspeed zero3 --data llava_med_instruct --data-dir data/llava_med \
        --init runs/paper/stage1 --out runs/paper/stage2
fi
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)  # reads to the end: with head, a long list would end the script
srun --kill-on-bad-exit=1 .venv/bin/torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-4}" \
    --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$first:29500" -m medv train "$@"
