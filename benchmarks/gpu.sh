#!/usr/bin/env bash
# What medv does on this GPU: benchmarks/gpu.sh [PART ...], parts tests, sampler, generate,
# loss, training, step; default all.
# Results are JSON files named after the card, in OUT (default benchmarks/results): sampler_h100.json, ... A part whose file
# is there is skipped, so that a stopped run goes on; each takes less than 8 minutes on an H100. PYTHON names the interpreter.
# The exit code is 1 where a part or a measurement in it failed; the rest is measured all the same.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3} out=${OUT:-benchmarks/results}
mkdir -p "$out"
card=$("$python" -c 'import re, torch; print(re.sub(r"\W+", "_", re.sub(r"NVIDIA |GeForce | .*HBM.*| PCIe| NVL", "", torch.cuda.get_device_name())).lower())') || {
  echo "benchmarks/gpu.sh: no CUDA device is here" >&2
  exit 2
}
failed=0
for part in "${@:-all}"; do
  case $part in
    all) parts="tests sampler generate loss training step" ;;
    tests | sampler | generate | loss | training | step) parts=$part ;;
    *) echo "benchmarks/gpu.sh: unknown part $part: use tests, sampler, generate, loss, training or step" >&2; exit 2 ;;
  esac
  for name in $parts; do
    file="$out/${name}_$card.json"
    if [ -s "$file" ]; then
      echo "== $name: $file is there"
      continue
    fi
    echo "== $name"
    started=$SECONDS
    case $name in
      tests) "$python" benchmarks/gpu_tests.py --out "$file" ;;
      generate) "$python" benchmarks/generate.py --out "$file" ;;
      step) "$python" benchmarks/step_profile.py --out "$file" ;;
      training) "$python" -m medv bench training --preset gpu --rows 8 --out "$file" ;;
      *) "$python" -m medv bench "$name" --preset gpu --out "$file" ;;
    esac || failed=1
    echo "== $name: $((SECONDS - started)) s"
  done
done
exit $failed
