#!/usr/bin/env bash
# Several processes on this machine that run one command together, as several hosts would:
#   launch/local.sh NUM_PROCESSES COMMAND ...
#   launch/local.sh 2 python -m experiments.finetune --config=configs/base.py --recipe=default --workdir=runs/two \
#     --config.cpu_devices=2 --config.parallel.fsdp=0
# Each process has `cpu_devices` devices of its own. A signal goes to all of them; the exit code is the first that is not 0.
set -uo pipefail
if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
  sed -n 's/^# \{0,1\}//p' "${BASH_SOURCE[0]}" | tail -n +2 >&2
  exit 2
fi
number=$1
shift
port=${PORT:-$(( 20000 + RANDOM % 20000 ))}
processes=()
trap 'kill -TERM "${processes[@]}" 2>/dev/null' TERM INT
for (( id = 0; id < number; id++ )); do
  "$@" --coordinator="localhost:$port" --num_processes="$number" --process_id="$id" &
  processes+=($!)
done
code=0
for process in "${processes[@]}"; do
  # A signal ends `wait`, not the process, whose exit code bash remembers.
  while kill -0 "$process" 2>/dev/null; do wait "$process"; done
  wait "$process"
  found=$?
  (( code == 0 )) && code=$found
done
exit "$code"
