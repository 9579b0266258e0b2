#!/usr/bin/env bash
# A run on a TPU pod made with gcloud: create, install, train, watch, fetch, delete. Every host gets the same command.
#
#   export TPU=gvpo ZONE=us-west4-a PROJECT=my-project BUCKET=gs://my-bucket
#   ./gcloud.sh create v5litepod-64     # once
#   ./gcloud.sh install                 # once, and after every change of the code
#   ./gcloud.sh train configs/my_run.yaml run.dir=/bucket/runs/first
#   ./gcloud.sh log                     # the first host's output
#   ./gcloud.sh train ...               # the same line again goes on from the last checkpoint
#   ./gcloud.sh fetch runs/first
#   ./gcloud.sh delete
#
# BUCKET is mounted on all hosts as /bucket: run folders have to lie where every host sees them.
set -euo pipefail
cd "$(dirname "$0")/../.." # the root of the checkout

: "${TPU:?name of the TPU}" "${ZONE:?its zone}" "${PROJECT:?the project}" "${BUCKET:?gs://NAME}"
here=(--zone "$ZONE" --project "$PROJECT")

on_all() { # a command on every host
  gcloud compute tpus tpu-vm ssh "$TPU" "${here[@]}" --worker=all --command "$1"
}

case "${1:-}" in
  create) # SPOT=--spot takes cheap machines that may be taken away
    case "$2" in
      v5litepod-*) version=v2-alpha-tpuv5-lite ;;
      v5p-*) version=v2-alpha-tpuv5 ;;
      v6e-*) version=v2-alpha-tpuv6e ;;
      *) echo "gcloud.sh: $2 is none of v5litepod-N, v5p-N, v6e-N" >&2; exit 2 ;;
    esac
    gcloud compute tpus queued-resources create "$TPU" --node-id "$TPU" "${here[@]}" \
      --accelerator-type "$2" --runtime-version "$version" ${SPOT:-}
    echo "wait until it is ACTIVE: gcloud compute tpus queued-resources describe $TPU ${here[*]}"
    ;;
  install)
    git archive --format=tar.gz -o "${TMPDIR:-/tmp}/gvpo-jax.tar.gz" HEAD
    gcloud compute tpus tpu-vm scp "${TMPDIR:-/tmp}/gvpo-jax.tar.gz" "$TPU:" "${here[@]}" --worker=all
    on_all "set -e
      rm -rf gvpo-jax && mkdir gvpo-jax && tar xzf gvpo-jax.tar.gz -C gvpo-jax
      sudo apt-get update -q && sudo apt-get install -yq python3.11-venv  # the image's own is 3.10
      python3.11 -m venv venv
      venv/bin/pip install -q 'jax[tpu]' './gvpo-jax[tasks,math]'
      command -v gcsfuse || { echo 'install gcsfuse first, as its documentation says' >&2; exit 1; }
      sudo mkdir -p /bucket && sudo chown \$USER /bucket
      mountpoint -q /bucket || gcsfuse --implicit-dirs --rename-dir-limit 100000 ${BUCKET#gs://} /bucket"
    ;;
  train)
    shift
    # always: these machines tell of each other through their metadata server alone
    on_all "kill -0 \$(cat train.pid) 2>/dev/null && { echo 'a run is under way: gcloud.sh stop' >&2; exit 1; }
      cd gvpo-jax
      nohup ../venv/bin/gvpo-jax train$(printf ' %q' "$@") distributed.initialize=always > ../train.log 2>&1 < /dev/null &
      echo \$! > ~/train.pid
      sleep 5; tail -n 3 ~/train.log"
    ;;
  log)
    gcloud compute tpus tpu-vm ssh "$TPU" "${here[@]}" --worker=0 --command "tail -n 50 -f train.log"
    ;;
  stop) # SIGTERM: all hosts save the same step and end
    on_all 'kill -TERM $(cat train.pid)'
    ;;
  fetch)
    gcloud storage cp --recursive "$BUCKET/$2" "$OLDPWD"
    ;;
  delete)
    gcloud compute tpus queued-resources delete "$TPU" "${here[@]}" --force
    ;;
  *)
    sed -n '2,13p' "$0"
    exit 2
    ;;
esac
