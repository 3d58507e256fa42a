#!/usr/bin/env bash
# Trains and measures a model on a GPU that is paid by the minute. Stages, in this order, some or all in a call:
#
#   tools/gpu/run.sh collect       take the part that came with the working tree; join them when all are there
#   tools/gpu/run.sh setup         an environment with the wheels that came along, on top of the machine's torch
#   tools/gpu/run.sh smoke         a few updates, package, calibration
#   tools/gpu/run.sh throughput    images a second by batch, precision and compiler
#   tools/gpu/run.sh train         train RECIPE within TRAIN_TIME; continues where an earlier call stopped
#   tools/gpu/run.sh weights       weights in fp16, in parts below 16 MiB
#   tools/gpu/run.sh attack        AutoAttack (standard) on IMAGES test images
#   tools/gpu/run.sh benchmarks    training step and counterfactuals beside their floors
#
# A stage that failed is reported at the end and does not stop the others. Results are copied to OUT every minute.
# Settings are environment variables; see the defaults below and tools/gpu/README.md.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
STATE=${STATE:-$HOME/ratioctl-gpu}          # stays between calls
OUT=${OUT:-$STATE/out}                      # what is to be brought back
DATA=${DATA:-$STATE/data}
RECIPE=${RECIPE:-tools/gpu/cifar10-ratio-w64.toml}
TRAIN_TIME=${TRAIN_TIME:-7m}
TRAIN_OPTIONS=${TRAIN_OPTIONS:-}            # more options of `ratioctl train`, such as --init DIR --set KEY=VALUE
SMOKE_OPTIONS=${SMOKE_OPTIONS:---set optim.epochs=0.02 --set optim.validate_images=256}
TEST=${TEST:-$DATA/cifar10.tar.xz:test}
IMAGES=${IMAGES:-1000}
PIECE=${PIECE:-250}
WIDTH=${WIDTH:-64}
BATCHES=${BATCHES:-256,512,1024}
MEASURE_SECONDS=${MEASURE_SECONDS:-2}
BENCHMARK_OPTIONS=${BENCHMARK_OPTIONS:---batch 256 --images 10000}
COUNTERFACTUAL_OPTIONS=${COUNTERFACTUAL_OPTIONS:-}
DEVICE=${DEVICE:-auto}
PROCESSES=${PROCESSES:-}                    # of training; by default one for each GPU
PART_BYTES=${PART_BYTES:-15M}
EVERY=${EVERY:-60}
export RATIOCTL_CACHE=${RATIOCTL_CACHE:-$STATE/cache}
PYTHON=${PYTHON:-python3}
[ -x "$STATE/venv/bin/python" ] && PYTHON="$STATE/venv/bin/python"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export DATA
PACKAGE="$STATE/run/package"

collect() (
  [ -d build/gpu/transfer ] || { echo "build/gpu/transfer: nothing came along; see tools/gpu/pack.sh" >&2; return 2; }
  mkdir -p "$STATE/parts" "$DATA"
  cp build/gpu/transfer/* "$STATE/parts/" && cd "$STATE/parts" || return
  here=0 all=0
  while read -r _ name; do
    all=$(( all + 1 ))
    [ ! -f "$name" ] || here=$(( here + 1 ))
  done < manifest
  echo "$here of $all parts are here" >&2
  [ "$here" = "$all" ] || return 0
  sha256sum --check --quiet manifest >&2 && cat part-* | tar -xf - -C "$DATA" && rm -f part-*
)

setup() {
  "$PYTHON" -m venv --system-site-packages "$STATE/venv" || return
  PYTHON="$STATE/venv/bin/python"
  if [ -d "$DATA/wheels" ]; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps "$DATA"/wheels/*.whl || return
  fi
  "$PYTHON" -m ratioctl --version
}

prepared() {  # recipe, with the data's folder in place of DATA
  mkdir -p "$STATE"
  sed "s|\$DATA|$DATA|g" "$RECIPE" > "$STATE/$(basename "$RECIPE")" && echo "$STATE/$(basename "$RECIPE")"
}

launch() {  # python -m ratioctl train, by torchrun where there are several GPUs
  local count=${PROCESSES:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 1)')}
  local -a start=("$PYTHON")
  [ "$count" -le 1 ] || start+=(-m torch.distributed.run --nproc-per-node "$count" --standalone)
  "${start[@]}" -m ratioctl train "$@"
}

smoke() {
  rm -rf "$STATE/smoke"
  # shellcheck disable=SC2086
  launch "$(prepared)" --out "$STATE/smoke" --device "$DEVICE" $TRAIN_OPTIONS $SMOKE_OPTIONS \
    && cp "$STATE/smoke/metrics.jsonl" "$OUT/smoke.jsonl"
}

throughput() {
  "$PYTHON" -m tools.gpu.throughput --width "$WIDTH" --batches "$BATCHES" --seconds "$MEASURE_SECONDS" \
    --device "$DEVICE" ${COMPILE:+--compile} --json "$OUT/throughput.json" >/dev/null
}

train() {
  # shellcheck disable=SC2086
  launch "$(prepared)" --out "$STATE/run" --device "$DEVICE" --resume \
    --max-time "$TRAIN_TIME" $TRAIN_OPTIONS
}

weights() {
  rm -rf "$STATE/half" "$OUT/weights"
  mkdir -p "$OUT/weights"
  "$PYTHON" -m ratioctl calibrate "$PACKAGE" --weights fp16 --out "$STATE/half/package" --device "$DEVICE" || return
  tar -cf - -C "$STATE/half" package | split -b "$PART_BYTES" -d -a 2 - "$OUT/weights/package.tar."
  echo 'cat package.tar.* | tar -xf -' > "$OUT/weights/join.sh"
}

model() { if [ -d "$STATE/half/package" ]; then echo "$STATE/half/package"; else echo "$PACKAGE"; fi; }

attack() {
  local device=$DEVICE
  if [ "$device" = auto ]; then
    device=$("$PYTHON" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
  fi
  "$PYTHON" -m benchmarks.autoattack "$TEST" --model "$(model)" --images "$IMAGES" --piece "$PIECE" --sides own \
    --device "$device" --parts "$STATE/attack" --json "$OUT/autoattack.json" >/dev/null
}

benchmarks() {
  # shellcheck disable=SC2086
  "$PYTHON" -m benchmarks.training --width "$WIDTH" $BENCHMARK_OPTIONS --device "$DEVICE" \
    --json "$OUT/training.json" >/dev/null || return
  # shellcheck disable=SC2086
  "$PYTHON" -m benchmarks.counterfactual --model "$(model)" $COUNTERFACTUAL_OPTIONS \
    --json "$OUT/counterfactual.json" >/dev/null
}

copy_results() {
  cp "$STATE/log" "$OUT/log" 2>/dev/null
  cp "$STATE/run/metrics.jsonl" "$OUT/metrics.jsonl" 2>/dev/null
  mkdir -p "$OUT/attack" && cp "$STATE"/attack/*/*.json "$OUT/attack/" 2>/dev/null
  true
}

mkdir -p "$STATE" "$OUT"
[ $# -gt 0 ] || { sed -n '2,16s/^# \{0,1\}//p' "$0"; exit 2; }
( while sleep "$EVERY"; do copy_results; done ) >/dev/null 2>&1 & watcher=$!
trap 'kill "$watcher" 2>/dev/null; copy_results' EXIT
failed=
for stage in "$@"; do
  case "$stage" in
    collect|setup|smoke|throughput|train|weights|attack|benchmarks) ;;
    *) echo "$stage: no such stage" >&2; exit 2 ;;
  esac
  began=$SECONDS
  echo "== $stage" | tee -a "$STATE/log" >&2
  if "$stage" 2> >(tee -a "$STATE/log" >&2); then state=done; else state=FAILED; failed="$failed $stage"; fi
  echo "== $stage: $state after $(( SECONDS - began )) s" | tee -a "$STATE/log" >&2
done
[ -z "$failed" ] || { echo "failed:$failed; see $STATE/log" >&2; exit 1; }
