#!/usr/bin/env bash
# Everything for a GPU machine, in order: a warm-up, the proof, the record, the kernels' tests. From a plain checkout with
# torch, triton, numpy and pytest alone: `bash benchmarks/on_gpu.sh FOLDER`. All that it finds is left in the folder.
# MINUTES: for the record (9). SMOKE=1: the same steps, tiny, on a machine without a GPU.
set -uo pipefail
out=$(mkdir -p "${1:?expected a folder for what is found}" && cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
exec > >(tee -ia "$out/on_gpu.log") 2>&1
log=$! worst=0 minutes=${MINUTES:-9} device=cuda prove=() record=() tests=(tests/kernels tests/proof tests/training/test_step.py)
if [[ -n ${SMOKE-} ]]; then
    device=cpu prove=(--hidden 8 --batch 2 --steps 3) record=(--cpu-smoke) tests=(tests/proof)
fi
# "auto" finds there what is proven here, and it comes back with the rest.
export XDG_CACHE_HOME=$out PYTHONPATH=$PWD
# What is late, or hangs, leaves their turn to the steps after it; a signal to this script is one to its step.
step() {
    echo "== $1"
    timeout --kill-after=30 "$2" "${@:3}" </dev/null &
    running=$!
    wait "$running"
    local code=$?
    ((code > worst)) && worst=$code
    echo "== exit code $code$( ((code == 124)) && echo ": late") after $SECONDS s in all"
}
trap 'kill "$running"; wait "$running"; exit 130' INT TERM
step "warm-up" 300 python3 -c "import torch, triton; print(torch.zeros(1, device='$device').sum().item(), torch.__version__, triton.__version__)"
((worst)) && exit "$worst"
step "proof" 300 python3 -m bigru.prove "${prove[@]}"
step "record" "$((${minutes%.*} + 3))m" python3 -m benchmarks.gpu --out "$out" --minutes "$minutes" "${record[@]}"
mapfile -t parallel < <(python3 -c 'import os, xdist; print("-n", min(12, os.cpu_count()), sep="\n")' 2>/dev/null)
step "tests" 20m python3 -m pytest "${tests[@]}" -q -p no:cacheprovider "${parallel[@]}"
exec >&- 2>&-
wait "$log"
exit "$worst"
