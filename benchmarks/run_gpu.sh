#!/usr/bin/env bash
# All that wants a GPU, on a bare CUDA machine (torch, triton, cmake, ninja, pybind11; no network), in two commands of at most
# nine minutes each, correctness first: build in place, the gpu-marked tests, compute-sanitizer on small shapes; then which
# claims of the static audit hold, and benchmarks, most telling first. Without --only, one after the other.
#
#     benchmarks/run_gpu.sh --only tests [OUT]
#     benchmarks/run_gpu.sh --only bench [OUT]        [--dry-run] with both
#
# OUT (default benchmarks/results/gpu) gets one JSON file per benchmark, written as it comes, and log.txt: few files, of
# which none is lost if this is killed. A step that fails does not stop those after it; the exit code tells. The last thing
# printed is a table of at most 40 lines.
# --dry-run does everything but the timings, without a GPU: benchmarks run on the CPU, on the smallest blocks.
set -uo pipefail
cd "$(dirname "$0")/.."

dry='' only='' out=benchmarks/results/gpu
while [[ $# -gt 0 ]]; do
    case $1 in
        --dry-run) dry=1 ;;
        --only) only=${2:?--only needs tests or bench}; shift ;;
        -*) echo "run_gpu.sh: unknown option $1" >&2; exit 2 ;;
        *) out=$1 ;;
    esac
    shift
done
mkdir -p "$out" || exit 2
python=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
begun=$SECONDS failed=()

log=$out/log.txt
: >"$log" || exit 2

# step NAME SECONDS COMMAND...: one step, within what is left of this half; its output goes to the log, the end of it to the
# terminal. What runs out of time is interrupted as from the keyboard: pytest then still says what failed, and why.
half_end=$((SECONDS + 530)) lines=3
step() {
    local name=$1 limit=$2 start=$SECONDS before left=$((half_end - SECONDS - 10))
    shift 2
    if ((left < 15)); then
        failed+=("$name (no time left)")
        return
    fi
    ((limit < left)) || limit=$left
    printf '=== %s (at %d s)\n' "$name" $((SECONDS - begun)) | tee -a "$log"
    before=$(wc -l <"$log")
    timeout -s INT -k 10 "$limit" "$@" >>"$log" 2>&1 </dev/null
    local code=$?
    [[ $code == 0 ]] || failed+=("$name (exit $code)")
    tail -n +$((before + 1)) "$log" | tail -n "$lines"
    printf -- '--- %s: exit %d after %d s\n' "$name" $code $((SECONDS - start)) | tee -a "$log"
}

step environment 60 "$python" -m orepa_kernels.info
if [[ -e CMakeLists.txt ]]; then
    step build 300 env OREPA_CUDA="$([[ $dry ]] && echo AUTO || echo ON)" \
        "$python" -m pip install --no-build-isolation --no-deps --no-index -e .
fi

if [[ $only != bench ]]; then
    pytest=("$python" -m pytest -m gpu -v --tb=short -p no:cacheprovider)
    # Processes of their own: a kernel that reads where it may not takes its process's CUDA down, and every later test.
    step tests-cuda 100 "${pytest[@]}" tests/kernels/test_gpu.py -k "not triton"
    parallel=()
    if "$python" -c 'import xdist' 2>/dev/null; then parallel=(-n 6 --dist worksteal); fi  # compilers use most of the time
    step tests-others 200 "${pytest[@]}" ${parallel[@]+"${parallel[@]}"} -k "triton or not test_gpu"
    # Only kernels of this project are worth the wait; the sanitizer slows them by an order of magnitude.
    sanitize=("$python" benchmarks/sanitize.py)
    if [[ ! $dry ]] && command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck; do
            step "sanitizer-$tool" 120 compute-sanitizer --tool "$tool" --error-exitcode 9 "${sanitize[@]}"
        done
    else
        step sanitizer-shapes 120 "${sanitize[@]}"
    fi
fi

if [[ $only != tests ]]; then
    bench=("$python" -m orepa bench)
    [[ $only ]] || half_end=$((SECONDS + 530))
    lines=40 step audit-claims 100 "$python" benchmarks/gpu_claims.py
    if [[ $dry ]]; then
        tiny=(--device cpu --threads 1 --processes 1 --rounds 2 --seconds 1 --providers "eager,reference,gemms,copy")
        step squeeze-fp32 120 "$python" benchmarks/squeeze.py --shapes "8,8,3" "${tiny[@]}" --out "$out/squeeze-fp32.json"
        step step-r18 120 "${bench[@]}" step --models test_resnet --batch-sizes 2 --img-size 32 --device cpu --threads 1 \
            --variants plain,orepa-reference --rounds 2 --seconds 1 --out "$out/step-r18.json"
    else
        # Not compile-max-autotune, which would take most of the time to tune matrix products.
        squeeze=("$python" benchmarks/squeeze.py --device cuda --providers eager,compile,reference,triton,cuda,gemms,copy)
        step squeeze-fp32 150 "${squeeze[@]}" --seconds 60 --out "$out/squeeze-fp32.json"
        step step-r18 150 "${bench[@]}" step --models resnet18 --device cuda --autocast bf16 --channels-last --seconds 60 \
            --variants plain,orepa-reference,orepa-triton,orepa-cuda,orepa-compile,dbb-offline --out "$out/step-r18.json"
        step host-overhead 30 "$python" benchmarks/host_overhead.py --out "$out/host-overhead.json"
        step squeeze-bf16 100 "${squeeze[@]}" --dtypes bf16 --precision high --seconds 40 --out "$out/squeeze-bf16.json"
        step step-r50 130 "${bench[@]}" step --models resnet50 --device cuda --autocast bf16 --channels-last --seconds 40 \
            --variants plain,orepa-reference,orepa-triton,orepa-cuda --out "$out/step-r50.json"
        step squeeze-models 150 "$python" benchmarks/squeeze.py --device cuda --models all --mode both --seconds 60 \
            --providers eager,triton,cuda,reference,gemms,copy --out "$out/squeeze-models.json"
    fi
fi

printf '\n'
"$python" benchmarks/digest.py "$out"/*.json 2>&1 | head -n 34
printf 'after %d s, in %s\n' $((SECONDS - begun)) "$out"
if ((${#failed[@]})); then
    printf 'FAILED: %s\n' "${failed[*]}"
    exit 1
fi
