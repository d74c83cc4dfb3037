#!/usr/bin/env bash
# Everything for a GPU machine, in order: a warm-up, the proof, the record, the kernels' tests. From a plain checkout with
# torch, triton, numpy and pytest alone: `bash benchmarks/on_gpu.sh FOLDER`. All that it finds is left in the folder.
set -uo pipefail
out=$(mkdir -p "${1:?expected a folder for what is found}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
# "auto" finds there what is proven here, and it comes back with the rest.
export XDG_CACHE_HOME=$out PYTHONPATH=$PWD
worst=0
step() {
    echo "== $1"
    shift
    "$@" 2>&1 | tee -a "$out/on_gpu.log"
    local code=${PIPESTATUS[0]}
    ((code > worst)) && worst=$code
    echo "== exit code $code after $SECONDS s in all"
}
step "warm-up" python3 -c 'import torch, triton; print(torch.zeros(1, device="cuda").sum().item(), torch.cuda.get_device_name())'
step "proof" python3 -m bigru.prove
step "record" python3 -m benchmarks.gpu --out "$out" --minutes "${MINUTES:-9}"
mapfile -t parallel < <(python3 -c 'import os, xdist; print("-n", min(12, os.cpu_count()), sep="\n")' 2>/dev/null)
step "tests" python3 -m pytest tests/kernels tests/proof -q -p no:cacheprovider "${parallel[@]}"
exit "$worst"
