#!/usr/bin/env bash
# One training run on all hosts of a Cloud TPU VM (a slice of any size), from this checkout.
#
#     TPU=my-v5e-16 ZONE=us-east5-b ./launch/tpu_vm.sh --config=mixlora --workdir=/mnt/shared/runs/mixlora
#
# What is committed here goes to every host, is installed there with the extra [tpu], and the same command starts on each:
# the hosts find each other (jax.distributed). The arguments are those of `launch.train`. The workdir and a base from a
# folder lie on a disk that all hosts mount (Filestore); PROJECT=NAME where gcloud has another default.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${TPU:?set TPU=NAME of the TPU VM}" "${ZONE:?set ZONE=NAME, such as us-east5-b}"
if [ $# -eq 0 ]; then
  echo "launch/tpu_vm.sh: got no arguments; expected those of launch.train, such as --config=mixlora --workdir=DIR" >&2
  exit 2
fi
at=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"} --worker=all)
tar="$(mktemp -d)/molora_jax.tar"
trap 'rm -rf "$(dirname "$tar")"' EXIT
git archive --output="$tar" HEAD
gcloud compute tpus tpu-vm scp "$tar" "$TPU:/tmp/molora_jax.tar" "${at[@]}"
gcloud compute tpus tpu-vm ssh "$TPU" "${at[@]}" --command="set -e
mkdir -p ~/molora_jax && tar -xf /tmp/molora_jax.tar -C ~/molora_jax && cd ~/molora_jax
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install -qq -e '.[tpu,data]'
exec .venv/bin/python -m launch.train $(printf '%q ' "$@")"
