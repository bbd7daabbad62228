#!/bin/bash
# On the nodes behind the first, started by run.slurm: wait for launched trainings of runs in this kit's folder, and join
# them, until the job ends. MASTER_ADDR is the first node.
#
# The kernel on the first node writes job.json of a training before it launches, and the training leaves log.json when it
# is over. What lies there from an earlier job is no training yet: the kernel that continues it writes job.json anew.
set -euo pipefail

rank=${1:-$((${SLURM_PROCID:-0} + 1))}
python=${SRLM_BIN:-.venv/bin}/python
declare -A seen
started=""
while true; do
    for job in results/*/steps/*.work/launched/job.json; do
        now="$job $(stat -c %.9Y "$job" 2> /dev/null || true)"
        if [ -n "${seen[$now]:-}" ] || [ ! -e "$job" ]; then continue; fi
        seen[$now]=1
        folder=$(dirname "$job")
        if [ -z "$started" ] || [ -e "$folder/log.json" ]; then continue; fi
        mapfile -t words < <("$python" -c 'import json, sys; print(*json.load(open(sys.argv[1]))["launcher"], sep="\n")' "$job")
        if [ "${#words[@]}" = 0 ]; then continue; fi
        echo "machine $rank joins $folder"
        "$python" -m accelerate.commands.launch "${words[@]}" --machine_rank "$rank" \
            --main_process_ip "$MASTER_ADDR" -m srlm_utils.launched "$PWD/$job" ||
            echo "machine $rank: its part of $folder ended with $?"
    done
    [ -n "$started" ] || echo "machine $rank waits for launched trainings"
    started=1
    sleep "${JOIN_SECONDS:-2}"
done
