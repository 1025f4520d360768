#!/usr/bin/env bash
#SBATCH --job-name=fedsim
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120
# A Ray cluster of all nodes of the allocation, and one run on it:
#   sbatch --nodes=4 examples/slurm.sh configs/cifar100.toml --rounds 50
#   RESUME=runs/20261123-000916 sbatch --nodes=4 examples/slurm.sh
# Needs fedsim in the same environment on all nodes (FEDSIM_BIN, by default that of the shell).
set -euo pipefail

bin="${FEDSIM_BIN:-$(dirname "$(command -v fedsim)")}"
port="${RAY_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
address="$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}'):$port"
cpus="${SLURM_CPUS_PER_TASK:-1}"
gpus="${SLURM_GPUS_ON_NODE:-0}"
# Short: the path of a socket has room for about 100 characters.
folder="/tmp/ray-$SLURM_JOB_ID"
export RAY_TMPDIR="$folder" RAY_USAGE_STATS_ENABLED=0

steps=()
stop() {
    trap - EXIT
    kill "${steps[@]}" 2>/dev/null || true
    wait || true
}
trap stop EXIT

srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
    "$bin/ray" start --head --port="$port" --temp-dir="$folder" --include-dashboard=false \
    --num-cpus="$cpus" --num-gpus="$gpus" --block &
steps+=($!)
until "$bin/ray" health-check --address "$address" 2>/dev/null; do
    kill -0 "${steps[0]}"
    sleep 1
done
others=$((SLURM_JOB_NUM_NODES - 1))
if ((others > 0)); then
    srun --overlap --nodes="$others" --ntasks="$others" --exclude="$head" \
        "$bin/ray" start --address="$address" --num-cpus="$cpus" --num-gpus="$gpus" --block &
    steps+=($!)
fi
until (($("$bin/python" -c "
import sys
from ray._raylet import GcsClient
print(sum(n.state == 0 for n in GcsClient(address=sys.argv[1]).get_all_node_info().values()))
" "$address") == SLURM_JOB_NUM_NODES)); do
    kill -0 "${steps[@]}"
    sleep 1
done

if [[ -n "${RESUME:-}" ]]; then
    command=(resume "$RESUME")
else
    command=(run)
fi
"$bin/fedsim" "${command[@]}" "$@" --ray-address "$address" &
run=$!
# Slurm tells this script alone that the time is nearly over.
trap 'kill -TERM "$run"' TERM
code=0
wait "$run" || code=$?
if kill -0 "$run" 2>/dev/null; then
    code=0
    wait "$run" || code=$?
fi
exit "$code"
