#!/usr/bin/env bash
# A TPU slice from the queue, this repository on all its hosts, one command on all of them.
#
#   tpu/pod.sh --name=srpo --zone=us-central1-a --type=v5e-64 [--spot] [--dry_run] COMMAND
#
#   create    queue for the slice and wait until it is there
#   copy      this repository's last commit to every host
#   install   Python 3.11, a virtual environment, the package with its TPU extra
#   mount --share=SERVER:/PATH   mount an NFS share (Filestore, say) as /mnt/srpo on every host: checkpoint, data and work
#             directory must lie where all hosts see them
#   run -- SCRIPT [FLAGS]   start `python SCRIPT --distributed FLAGS` on every host; goes on when the terminal closes. A run
#             that ends with code 75 (preempted, or another host was lost) is started again and resumes
#   logs      the last lines of every host
#   collect --workdir=/mnt/srpo/... --output=FOLDER   bring the work directory and the first host's log here
#   delete    give the slice back
#
# --dry_run prints exactly the commands that would be executed. Needs the gcloud CLI, logged in and with a project.
set -euo pipefail

name='' zone='' type='' share='' workdir='' output='' command='' spot=() dry=false

fail() { echo "pod.sh: $*" >&2; exit 2; }
do_it() { if $dry; then printf '%q ' "$@"; echo; else "$@"; fi; }
need() { [ -n "${!1}" ] || fail "--$1 is missing; see the head of $0"; }

while [ $# -gt 0 ]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --share=*) share=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --output=*) output=${1#*=} ;;
    --spot) spot=(--spot) ;;
    --dry_run) dry=true ;;
    --) shift; break ;;
    -*) fail "unknown option $1" ;;
    *) [ -z "$command" ] || fail "two commands: $command and $1"; command=$1 ;;
  esac
  shift
done

# The names of the cloud for a slice, and of the system that its hosts start with.
accelerator() {
  case $type in
    v5e-*) echo "v5litepod-${type#v5e-} v2-alpha-tpuv5-lite" ;;
    v5p-*) echo "$type v2-alpha-tpuv5" ;;
    v6e-*) echo "$type v2-alpha-tpuv6e" ;;
    *) fail "--type=$type: give v5e-N, v5p-N or v6e-N" ;;
  esac
}

everywhere() { do_it gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }

state() { gcloud compute tpus queued-resources describe "$name" --zone="$zone" --format='value(state.state)'; }

create() {
  need type
  local kind system names
  names=$(accelerator)
  read -r kind system <<<"$names"
  do_it gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone" \
    --accelerator-type="$kind" --runtime-version="$system" "${spot[@]}"
  $dry && return
  local now
  while now=$(state); [ "$now" != ACTIVE ]; do
    case $now in FAILED | SUSPENDED) fail "the request is $now; look at it with gcloud, and delete it" ;; esac
    echo "$(date +%T) $now"
    sleep 30
  done
}

copy() {
  local archive=${TMPDIR:-/tmp}/$name.tar.gz
  do_it git archive --format=tar.gz --output="$archive" HEAD
  do_it gcloud compute tpus tpu-vm scp "$archive" "$name:srpo_jax.tar.gz" --zone="$zone" --worker=all
  everywhere 'rm -rf srpo_jax && mkdir srpo_jax && tar -xzf srpo_jax.tar.gz -C srpo_jax'
}

install() {
  everywhere 'sudo apt-get -qq update && sudo apt-get -qq install -y python3.11-venv && cd srpo_jax && python3.11 -m venv .venv && .venv/bin/pip install --quiet ".[tpu]"'
}

mount_share() {
  need share
  everywhere "sudo apt-get -qq install -y nfs-common && sudo mkdir -p /mnt/srpo && sudo mount -t nfs $(printf '%q' "$share") /mnt/srpo"
}

run() {
  [ $# -gt 0 ] || fail "run -- SCRIPT [FLAGS]"
  local script=$1 line
  shift
  line="PYTHONPATH=. $(printf '%q ' .venv/bin/python "$script" --distributed "$@")"
  everywhere "cd srpo_jax && nohup setsid bash -c $(printf '%q' "while :; do $line; code=\$?; [ \$code = 75 ] || exit \$code; done") > ../srpo.log 2>&1 < /dev/null &"
}

collect() {
  need workdir
  need output
  do_it mkdir -p "$output"
  do_it gcloud compute tpus tpu-vm scp --recurse "$name:$workdir" "$output" --zone="$zone" --worker=0
  do_it gcloud compute tpus tpu-vm scp "$name:srpo.log" "$output/host0.log" --zone="$zone" --worker=0
}

need name
need zone
case $command in
  create | copy | install) "$command" ;;
  mount) mount_share ;;
  run) run "$@" ;;
  logs) everywhere 'tail -n 5 srpo.log' ;;
  collect) collect ;;
  delete) do_it gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force --quiet ;;
  *) fail "unknown command '$command'; see the head of $0" ;;
esac
