#!/usr/bin/env bash
{{ header }}
#
#   bash launch/local.sh [CONFIG.yaml] [key=value]...
#
# {{ local.workers }} workers on this machine's CPUs, by the same steps as on a cluster: a Ray head of its own, then `ray job submit` with
# this folder as the working directory. At the end, or on Ctrl-C, what it started is gone; other Ray clusters are not touched.
# The dashboard asks for a token: yours, where RAY_AUTH_TOKEN is set.

set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
config={{ local.config }}
if [[ ${1:-} == *.yaml ]]; then
  config=$1
  shift
fi
name=local-$(date +%Y%m%d-%H%M%S)-$$
run=("storage=$PWD/runs" "name=$name")

temp=$(mktemp -d /tmp/densenet-XXXXXX) # short: Unix sockets lie in it
RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(python -c 'import secrets; print(secrets.token_hex(32))')}
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
{% for key, value in env.items() %}
export {{ key }}={{ value }}
{% endfor %}
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # nobody needs this cluster when the run has ended
unset RAY_ADDRESS
read -r -a port < <(python -c '
import socket
sockets = [socket.socket() for _ in range(5)]
for s in sockets:
    s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in sockets))')

head='' job=''
clean_up() {
  trap - EXIT INT TERM
  [[ -z $job ]] || kill "$job" 2>/dev/null || true
  if [[ -n $head ]]; then
    kill "$head" 2>/dev/null || true # with --block it ends all that it has started
    wait "$head" 2>/dev/null || true
  fi
  rm -rf "$temp"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

ray start --head --block --node-ip-address=127.0.0.1 --port="${port[0]}" --num-cpus={{ local.workers }} --num-gpus=0 \
  --dashboard-host=127.0.0.1 --dashboard-port="${port[1]}" --dashboard-agent-listen-port="${port[2]}" \
  --ray-client-server-port="${port[3]}" --metrics-export-port="${port[4]}" \
  --temp-dir="$temp" --disable-usage-stats >"$temp/head.log" 2>&1 &
head=$!
address=http://127.0.0.1:${port[1]}
until python -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1] + "/api/gcs_healthz", timeout=2)' \
  "$address" 2>/dev/null; do
  kill -0 "$head" 2>/dev/null || { cat "$temp/head.log" >&2; exit 3; }
  sleep 0.5
done

echo "dashboard $address, metrics http://127.0.0.1:${port[4]}/metrics"
# In the background: Bash hears signals while it waits. STOPPED would end with 0 as well, so the run itself is asked.
ray job submit --address "$address" --submission-id "$name" --working-dir . -- \
  python -m densenet_dist train "$config" "${run[@]}" "data.root=$PWD/data" cluster.workers={{ local.workers }} cluster.device=cpu "$@" &
job=$!
wait "$job"
python launch/start.py finished "${run[@]}" "$@"
