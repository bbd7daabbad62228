#!/bin/bash
# One Slurm job a step, each after the one before it: steps that load no model take no GPU, and a failed step stops those
# behind it. A step that is requeued continues where it was. Run it again to submit what is not done.
#
#   bash params/cluster/steps.sh params/node_8gpu.yaml [--set dpo.beta=0.2] [--run-name beta02]
#
# SBATCH_GPU and SBATCH_CPU are options for the two kinds of job, e.g. SBATCH_CPU="--partition=cpu". Steps of one run
# share its folder and its lock, so they run one at a time; several runs are several calls of this script.
set -euo pipefail

bin=${SRLM_BIN:-.venv/bin}
read -r -a gpu <<< "${SBATCH_GPU:-}"
read -r -a cpu <<< "${SBATCH_CPU:-}"
before=""
plan=$("$bin/srlm" plan "$@")
while read -r state step _; do
    [ "$state" = run ] || continue
    case $step in
        01_* | 06_* | 09_*) kind=(--nodes=1 --gpus-per-node=0 --cpus-per-task=8 --mem=32G ${cpu[@]+"${cpu[@]}"}) ;;
        *) kind=(${gpu[@]+"${gpu[@]}"}) ;;
    esac
    after=(${before:+--dependency=afterok:$before --kill-on-invalid-dep=yes})
    before=$(sbatch --parsable --job-name="$step" ${after[@]+"${after[@]}"} "${kind[@]}" \
        params/cluster/run.slurm "$@" --only "$step")
    before=${before%%;*} # a federation adds its cluster's name
    echo "$before  $step"
done <<< "$plan"
if [ -z "$before" ]; then echo "all steps are done"; fi
