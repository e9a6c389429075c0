# Settings of this site, sourced by every sbatch file: edit once, here. Nothing in it belongs to one job.
# `source slurm/env.sh` before you submit makes account and partition known to sbatch, too.

# --- who pays, where it runs ---
# export SBATCH_ACCOUNT=my-project SBATCH_PARTITION=cpu

# --- Python: what is active when you submit comes along; otherwise the checkout's own environment ---
# module load python/3.11 cuda/12.4
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f .venv/bin/activate ]; then
    source .venv/bin/activate
fi

# --- threads: the work is spread over processes, so each has one; global stages take all (stage.sbatch) ---
export OMP_NUM_THREADS=1
export NUMBA_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

# --- caches: not in a home directory with a quota ---
# export HF_HOME=/scratch/$USER/huggingface TMPDIR=/scratch/$USER/tmp
# export HF_HUB_OFFLINE=1    # compute nodes without network: models are named by path, or were downloaded before

# --- several nodes (train_chunk.sbatch): one process per GPU, and the network that they talk over ---
# export PROCESSES_PER_NODE=8     # where Slurm does not say how many GPUs a node has
# export MASTER_ADDR=10.0.0.1     # where the first node's name does not resolve
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# --- memory: tcmalloc gives memory back to the system, glibc's malloc keeps it in worker processes ---
for library in /usr/lib/*/libtcmalloc_minimal.so.4 /usr/lib64/libtcmalloc_minimal.so.4; do
    if [ -e "$library" ]; then
        export LD_PRELOAD="$library${LD_PRELOAD:+:$LD_PRELOAD}"
        break
    fi
done
