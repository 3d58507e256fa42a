#!/usr/bin/env bash
# Cuts data into parts that fit one transfer each together with the working tree.
#
#   tools/gpu/pack.sh [--limit 64MiB] [--send 'COMMAND'] FILE|FOLDER...
#   tools/gpu/pack.sh stage K | restore
#
# FILEs (archives of images) and FOLDERs (a start package, build/gpu/wheels) are cut into parts in build/gpu/parts.
# A transfer carries the tracked files of the working tree, without assets/models, and one part in
# build/gpu/transfer. With --send, COMMAND runs once for each part, assets/models being moved aside for it and put
# back even if it fails or is interrupted; it has to send the tree and to run `tools/gpu/run.sh collect` there.
# Without --send the order of commands is printed, to be run by hand.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
work=${RATIOCTL_GPU_WORK:-build/gpu}
aside="$work/aside"

restore() {
  rm -rf "$work/transfer"
  if [ -d "$aside/models" ]; then
    [ ! -d assets/models ] || rmdir assets/models  # fails unless empty: nothing of yours is replaced
    mv "$aside/models" assets/models
  fi
}

stage() {
  local part
  part=$(printf '%s/parts/part-%03d' "$work" "$1")
  [ -f "$part" ] || { echo "$part: no such part; run pack.sh with the files first" >&2; return 2; }
  mkdir -p "$aside"
  if [ -d assets/models ] && [ ! -d "$aside/models" ]; then mv assets/models "$aside/models"; fi
  rm -rf "$work/transfer"
  mkdir -p "$work/transfer"
  ln "$part" "$work/transfer/" 2>/dev/null || cp "$part" "$work/transfer/"
  cp "$work/parts/manifest" "$work/transfer/"
}

bytes() {  # "64MiB" -> 67108864
  case "$1" in
    *GiB) echo $(( ${1%GiB} << 30 )) ;;
    *MiB) echo $(( ${1%MiB} << 20 )) ;;
    *KiB) echo $(( ${1%KiB} << 10 )) ;;
    *[!0-9]*|'') echo "--limit $1: use a value such as 64MiB" >&2; return 2 ;;
    *) echo "$1" ;;
  esac
}

tree_bytes() {  # of the tracked files that travel, each with a header of a tar
  git ls-files -z --cached --others --exclude-standard -- . ':!assets/models' \
    | xargs -0 stat -c %s 2>/dev/null | awk '{ total += $1 + 1024 } END { printf "%d", total + 65536 }'
}

case "${1:-}" in
  stage) stage "${2:?which part}"; exit ;;
  restore) restore; exit ;;
esac
limit=64MiB
send=
while [ $# -gt 0 ]; do
  case "$1" in
    --limit) limit=$2; shift 2 ;;
    --send) send=$2; shift 2 ;;
    -h|--help) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit ;;
    -*) echo "$1: no such option" >&2; exit 2 ;;
    *) break ;;
  esac
done
[ $# -gt 0 ] || { echo "name the files to send; see $0 --help" >&2; exit 2; }
most=$(( $(bytes "$limit") - $(tree_bytes) ))
[ "$most" -gt 4096 ] || { echo "--limit $limit: the working tree alone takes more" >&2; exit 2; }
for name in "$@"; do [ -e "$name" ] || { echo "$name: no such file" >&2; exit 2; }; done

rm -rf "$work/parts"
mkdir -p "$work/parts"
names=()
for name in "$@"; do
  path=$(realpath "$name")
  names+=(-C "$(dirname "$path")" "$(basename "$path")")
done
tar -cf - --dereference "${names[@]}" | split -b "$most" -d -a 3 - "$work/parts/part-"
(cd "$work/parts" && sha256sum part-* > manifest)
count=$(wc -l < "$work/parts/manifest")
echo "$count parts of at most $most bytes in $work/parts" >&2

if [ -n "$send" ]; then
  trap restore EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  for (( k = 0; k < count; k++ )); do
    stage "$k"
    sh -c "$send"
  done
  exit
fi
for (( k = 0; k < count; k++ )); do
  echo "tools/gpu/pack.sh stage $k    # then send the working tree with $work/transfer, and there:"
  echo "    tools/gpu/run.sh collect"
done
echo "tools/gpu/pack.sh restore"
