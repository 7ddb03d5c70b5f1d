#!/usr/bin/env bash
# Tries an image from within, on CPUs:
#
#   docker run --rm --shm-size=2g --volume "$PWD/launch/try_image.sh:/try_image.sh:ro" IMAGE bash /try_image.sh
#
# Who it is and what doctor says; a run through a Ray of its own; then, by the commands that KubeRay starts in pods, a head
# and a worker with a token, their probes, and a job. Wants 2 cores and some minutes.

set -euo pipefail
runs=/tmp/runs
small=(train.epochs=1 data.limit=640 data.test_limit=640 "storage=$runs")

failed() {
  echo "error: $1" >&2
  exit 1
}

echo "== user and files"
[[ $(id -u):$(id -g) == 1000:1000 ]] || failed "user $(id -u), group $(id -g); 1000 and 1000 are expected"
[[ $HOME == /home/ray && -w $HOME ]] || failed "HOME is $HOME; /home/ray is expected, with the right to write"
[[ ! -w /app && ! -w /usr/local ]] || failed "user 1000 may write to the program's own files"
for command in bash g++ gcc ray rsync ssh tensorboard tini; do
  command -v "$command" >/dev/null || failed "$command is not in the image"
done
# Without CUDA (TORCH_INDEX) DALI is missing, and is meant to be.
broken=$(python -m pip check | grep -v -e '^No broken requirements' -e 'requires nvidia-dali-[a-z0-9]*, which is not installed' || true)
[[ -z $broken ]] || failed "$broken"
twice=$(python -c 'from importlib.metadata import distributions; print(*(d.name for d in distributions()), sep="\n")' | sort | uniq -d)
[[ -z $twice ]] || failed "in the image twice: $twice"

echo "== doctor"
densenet-dist doctor /app/configs/quickstart.yaml "storage=$runs" | tee /tmp/doctor.txt
grep -q 'C++ kernels' /tmp/doctor.txt || failed "g++ of the image cannot build the fused block's kernels"

echo "== a run through a Ray of its own"
densenet-dist train /app/configs/quickstart.yaml "${small[@]}" name=own
python /app/launch/start.py finished "storage=$runs" name=own

echo "== a head and a worker as KubeRay starts them, and a job"
export RAY_AUTH_MODE=token OMP_WAIT_POLICY=passive RAY_JOB_STOP_WAIT_TIME_S=20
export RAY_TRAIN_ENABLE_STATE_TRACKING=1 RAY_worker_niceness=0
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN
nodes=()
clean_up() {
  kill "${nodes[@]}" 2>/dev/null || true # with --block they end all that they have started
  wait
}
trap clean_up EXIT
healthy() {
  local url
  for url in "$@"; do # KubeRay asks these, without a token
    until python -c 'import sys, urllib.request as u; sys.exit(b"success" not in u.urlopen(sys.argv[1], timeout=2).read())' \
      "$url" 2>/dev/null; do
      ((SECONDS < deadline)) || failed "$url does not say success; more: /tmp/head.log, /tmp/worker.log"
      sleep 1
    done
    echo "healthy: $url"
  done
}
deadline=$((SECONDS + 120))
ulimit -n 65536 || true # KubeRay goes on as well
ray start --head --block --num-cpus=0 --memory=2147483648 --dashboard-host=0.0.0.0 --dashboard-agent-listen-port=52365 \
  --metrics-export-port=8080 >/tmp/head.log 2>&1 &
nodes+=($!)
healthy http://127.0.0.1:52365/api/healthz http://127.0.0.1:8265/api/gcs_healthz
# Beside the head, so it needs ports of its own for the agent and the metrics.
ray start --block --address=127.0.0.1:6379 --num-cpus=2 --memory=2147483648 --dashboard-agent-listen-port=52366 \
  --metrics-export-port=8081 >/tmp/worker.log 2>&1 &
nodes+=($!)
healthy http://127.0.0.1:52366/api/healthz
ray job submit --address http://127.0.0.1:8265 --submission-id job --no-wait -- \
  python /app/launch/start.py train /app/configs/quickstart.yaml "${small[@]}" name=job data.root=/tmp/data \
  cluster.workers=2 cluster.cpus_per_worker=1 cluster.device=cpu cluster.timeout_s=300
ray job logs --address http://127.0.0.1:8265 --follow job
python /app/launch/start.py finished "storage=$runs" name=job || failed "the job left no finished run"
densenet-dist evaluate "$runs/job" --split val
echo "the image works on CPUs"
