#!/usr/bin/env bash
# Builds, tests, sanitizes and measures on a machine with an NVIDIA GPU, from this repository alone:
#
#     bench/device.sh [build|test|sanitize|bench|solver|llm_scale|all] [--out DIR]        (default: all, device-out)
#
# Uses that machine's own python3 (with torch, scikit-build-core, pybind11, cmake, ninja, pytest and
# what the tests import) and nvcc; needs no network. Each stage ends within 9 minutes and leaves
# DIR/STAGE.log; the benchmarks leave JSON, and DIR/summary.json says how each stage went.
set -euo pipefail

stages="build test sanitize bench solver llm_scale"
out=device-out
while [ $# -gt 0 ]; do
  case $1 in
    build | test | sanitize | bench | solver | llm_scale) stages=$1 ;;
    all) ;;
    --out) out=${2:?--out needs a folder} && shift ;;
    *) sed -n '2,5p' "$0" >&2 && exit 2 ;;
  esac
  shift
done

root=$(cd "$(dirname "$0")/.." && pwd)
site=$root/build/device-site
mkdir -p "$out" "$site"
out=$(cd "$out" && pwd)
export root site out
export PATH="$site/bin:$PATH:/usr/local/cuda/bin" PYTHONPATH="$site" PYTHONUNBUFFERED=1 SST_REQUIRE_CUDA=1
unset PIP_CONSTRAINT
cd "$out" # away from the sources, which hold no compiled module

stage_build() {
  rm -rf "$site"
  python3 -m pip install --no-build-isolation --no-deps --no-index --target "$site" "$root"
  python3 -c 'import sst_kernels as k; print(k.build_info()); assert k.build_info()["cuda"], "built without CUDA"'
}

# pytest, after the given command prefix, on this repository's tests.
run_pytest() {
  "$@" -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider
}

stage_test() {
  run_pytest python3 -m pytest "$root/tests"
}

stage_sanitize() {
  # Without torch's caching allocator every tensor is an allocation of its own, which the tools check.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck initcheck synccheck; do
    echo "=== $tool"
    run_pytest compute-sanitizer --tool "$tool" --error-exitcode 1 \
      python3 -m pytest -m sanitize -k cuda "$root/tests/kernels"
  done
}

stage_bench() {
  for question in khatri_rao syrk symm_thin grouped exact_fisher collection accumulation small_pencils top_select; do
    python3 "$root/bench/$question.py" --device cuda --out "$out/$question.json"
  done
}

stage_solver() {
  for row in small32 small64 many large; do
    python3 "$root/bench/gpu_eigensolver.py" --only "$row" --out "$out/gpu_eigensolver_$row.json"
  done
}

stage_llm_scale() {
  python3 "$root/bench/llm_scale.py" --device cuda --scale 1 --repeats 1 --out "$out/llm_scale.json"
}

export -f stage_build stage_test stage_sanitize stage_bench stage_solver stage_llm_scale run_pytest
failed=0
summary=
for stage in $stages; do
  echo "=== $stage"
  start=$SECONDS
  status=0
  timeout --kill-after=10 520 bash -euo pipefail -c "stage_$stage" 2>&1 | tee "$out/$stage.log" || status=$?
  summary+="${summary:+, }\"$stage\": {\"exit_status\": $status, \"seconds\": $((SECONDS - start))}"
  echo "{$summary}" >"$out/summary.json"
  [ "$status" = 0 ] && continue
  failed=1
  [ "$stage" != build ] || break # nothing to run without a build
done
cat "$out/summary.json"
exit "$failed"
