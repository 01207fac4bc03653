#!/usr/bin/env bash
# Trains a recipe on a Cloud TPU slice, and goes on after every preemption.
# See usage() below. Not yet run on a TPU: --dry_run prints every command.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: tools/launch_tpu_vm.sh --name NAME --zone ZONE --type TYPE \
         --workdir gs://BUCKET/RUN --config RECIPE [options] [-- FLAGS OF train]

Asks Google Cloud for a TPU slice, copies this checkout and the data to every worker,
installs, starts the same command on all of them and shows the log of worker 0. When the
slice is preempted it asks for another one and starts the same command again, which
resumes from the last checkpoint in --workdir. When the run is over the slice is deleted.

  --name NAME          name of the queued resource and of the TPU VM
  --zone ZONE          for example europe-west4-b
  --type TYPE          accelerator type, for example v5litepod-16 or v6e-8
  --workdir gs://...   run folder; must be a bucket, which all workers share
  --config RECIPE      recipe in this checkout, for example configs/vit_s16_i1k.py:size=224

  --data gs://...      folder of prepared TFDS sets, or of images; copied to a local folder
                       of every worker, where recipes without data_dir look for sets
  --data_folder PATH   that folder (default data, in the home folder); mind that all of
                       it must fit: df -h on a worker shows its disks, and /dev/shm,
                       which is memory
  --version RUNTIME    TPU runtime; default: the one for TYPE
  --project PROJECT    default: gcloud's own
  --spot               cheaper, may be preempted
  --max_restarts N     give up after N restarts (default 100)
  --keep               do not delete the slice when the run is over
  --dry_run            print every command, run none
  --help

What follows -- goes to big_vision_lite.train as it is, for example:
  tools/launch_tpu_vm.sh --name s16 --zone europe-west4-b --type v5litepod-16 --spot \
    --workdir gs://BUCKET/runs/s16 --data gs://BUCKET/tensorflow_datasets \
    --config configs/vit_s16_i1k.py:size=224 -- --config.num_epochs=300

Needs gcloud, logged in: https://cloud.google.com/sdk/docs/install
TEXT
}

fail() {
  printf 'error: %s\n' "$1" >&2
  printf 'All options: tools/launch_tpu_vm.sh --help\n' >&2
  exit 2
}

say() { printf '%s\n' "$*" >&2; }

# Quotes words so that the line could be pasted into a shell.
quoted() {
  local word line=''
  for word in "$@"; do
    if [[ ! $word =~ ^[-A-Za-z0-9_./:=,@%+]+$ ]]; then
      word="'${word//\'/\'\\\'\'}'"
    fi
    line+=" $word"
  done
  printf '%s' "${line# }"
}

# Prints a command, and runs it unless this is a dry run.
run() {
  printf '+ %s\n' "$(quoted "$@")"
  [[ $dry_run == yes ]] || "$@"
}

name='' zone='' type='' version='' workdir='' config='' project=''
data='' data_folder=data
spot=no keep=no dry_run=no max_restarts=100
flags=() command=()
# Exit codes of an attempt: installing or starting failed; somebody else ended the run.
not_started=64 interrupted=143

parse() {
  while (($#)); do
    local option=$1
    shift
    case $option in
      --) flags=("$@"); return ;;
      --help | -h) usage; exit 0 ;;
      --spot) spot=yes; continue ;;
      --keep) keep=yes; continue ;;
      --dry_run) dry_run=yes; continue ;;
      --*=*) set -- "${option#*=}" "$@"; option=${option%%=*} ;;
    esac
    case $option in
      --name | --zone | --type | --version | --workdir | --config | --project | \
        --data | --data_folder | --max_restarts)
        (($#)) && [[ $1 != --* ]] || fail "$option needs a value."
        printf -v "${option#--}" '%s' "$1"
        shift
        ;;
      --config.*) fail "$option is a flag of train: put it after --" ;;
      *) fail "There is no option $option. Flags of train go after --" ;;
    esac
  done
}

check() {
  local option
  for option in name zone type workdir config; do
    [[ -n ${!option} ]] || fail "--$option is missing."
  done
  [[ $name =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] ||
    fail "--name $name: Google Cloud wants small letters, digits and -, a letter first."
  [[ $workdir == gs://?* ]] ||
    fail "--workdir $workdir is not a bucket. Every worker has a disk of its own, and it is gone with the slice; use gs://BUCKET/RUN."
  [[ -z $data || $data == gs://?* ]] ||
    fail "--data $data is not a folder of a bucket. Copy it there first: gcloud storage rsync --recursive $data gs://BUCKET/FOLDER"
  [[ -n $data || $data_folder == data ]] ||
    fail "--data_folder $data_folder says where --data is copied to: give --data gs://BUCKET/FOLDER, too."
  [[ $max_restarts =~ ^[0-9]+$ ]] || fail "--max_restarts $max_restarts is not a number."
  [[ -f $root/${config%%:*} ]] ||
    fail "There is no recipe ${config%%:*} in $root. Recipes: $(recipes)"
  if [[ -z $version ]]; then
    version=$(runtime) ||
      fail "Which runtime goes with --type $type? Give --version; the list is on https://cloud.google.com/tpu/docs/runtimes"
  fi
  [[ $dry_run == no ]] || return 0
  command -v gcloud >/dev/null ||
    fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install (--dry_run does without)."
  [[ -e $root/.git ]] ||
    fail "$root is no git checkout, so that it is not known what to copy: git clone it."
}

recipes() { (cd "$root" && printf '%s ' configs/*.py); }

runtime() {
  case $type in
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-* | v5e-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) return 1 ;;
  esac
}

# Appends the place to a gcloud command: in the array `command`.
tpus() {
  command=(gcloud compute tpus "$@" --zone="$zone")
  [[ -z $project ]] || command+=(--project="$project")
}

# Says the state in gcloud's own words, MISSING if there is nothing of that name.
state_of() {
  local kind=$1 field=$2 answer
  tpus "$kind" describe "$name" --format="value($field)"
  if answer=$("${command[@]}" 2>&1); then
    printf '%s\n' "$answer"
  elif [[ $answer == *NOT_FOUND* || $answer == *"not found"* ]]; then
    printf 'MISSING\n'
  else
    # No network or no permission says nothing about the slice.
    say "$answer"
    printf 'UNKNOWN\n'
  fi
}

vm_state() { state_of tpu-vm state; }

create() {
  local spot_flag=()
  [[ $spot == no ]] || spot_flag=(--spot)
  tpus queued-resources create "$name" --node-id="$name" \
    --accelerator-type="$type" --runtime-version="$version" "${spot_flag[@]}"
  run "${command[@]}"
}

delete() {
  tpus queued-resources delete "$name" --force --quiet
  run "${command[@]}"
}

# Returns when the slice is ready, whatever state it is in now.
obtain() {
  local state known=no
  if [[ $dry_run == yes ]]; then
    say "(asks for the state every 30 s, deletes what was preempted or failed, then)"
    create
    return
  fi
  while true; do
    state=$(state_of queued-resources state.state)
    # Later it may be the network; at first it is what gcloud has just said.
    [[ $state != UNKNOWN || $known == yes ]] || exit 1
    known=yes
    case $state in
      ACTIVE)
        state=$(vm_state)
        case $state in
          READY) return ;;
          CREATING | STARTING | RESTARTING | REPAIRING | UNKNOWN) ;;
          *) say "the TPU VM is $state" && delete ;;
        esac
        ;;
      MISSING) create ;;
      FAILED | SUSPENDED) say "the queued resource is $state" && delete ;;
      *) say "the queued resource is $state" ;;
    esac
    sleep 30
  done
}

on_workers() {
  tpus tpu-vm ssh "$name" --worker="$1" --command="$2"
  run "${command[@]}"
}

# Writes what every worker runs: its process id, log and exit code go to files, so that
# the run outlives the connection.
write_train_script() {
  local where=()
  [[ -z $data ]] || where=("export TFDS_DATA_DIR=\"\$(realpath $(quoted "$data_folder"))\"")
  printf '%s\n' '#!/usr/bin/env bash' "echo \$\$ > train.pid" "${where[@]}" 'cd code || exit 1' \
    "$(quoted ../venv/bin/python -u -m big_vision_lite.train --config="$config" \
      --workdir="$workdir" "${flags[@]}")" "echo \$? > ../exit_code" >"$1"
}

install() {
  local archive=$scratch/code.tar.gz script=$scratch/train.sh
  # What git knows, and what is new and not ignored: a recipe may be an hour old.
  local list=(git -C "$root" ls-files --cached --others --exclude-standard -z)
  printf '+ %s > %s\n' "$(quoted "${list[@]}")" "$scratch/files"
  [[ $dry_run == yes ]] || "${list[@]}" >"$scratch/files" || return
  run tar -C "$root" --null --files-from="$scratch/files" --ignore-failed-read \
    -czf "$archive" && write_train_script "$script" || return
  if [[ $dry_run == yes ]]; then
    printf '%s:\n' "$script"
    sed 's/^/    /' "$script"
  fi
  tpus tpu-vm scp "$archive" "$script" "$name:" --worker=all
  run "${command[@]}" || return
  # The system's Python is too old on today's runtimes; uv brings one.
  on_workers all "set -e; rm -rf code; mkdir code; tar -C code -xzf code.tar.gz; \
python3 -m pip install --quiet --user uv; \
test -d venv || ~/.local/bin/uv venv --quiet --python 3.12 venv; \
~/.local/bin/uv pip install --quiet --python venv/bin/python -e 'code[tpu,gcs]'" || return
  [[ -z $data ]] || copy_data
}

# The records are read at random all the time, which a mounted bucket is too slow for.
# After a restart on the same slice only what is missing is copied.
copy_data() {
  local folder
  folder=$(quoted "$data_folder")
  on_workers all "mkdir -p $folder && \
gcloud storage rsync --recursive $(quoted "$data" "$data_folder")"
}

# $ and ` below belong to the workers' shells.
# shellcheck disable=SC2016
{
  going='test -s train.pid && kill -0 "$(cat train.pid)" 2> /dev/null'
  # A process of an earlier attempt may still wait for one that is gone.
  launch='if test -s train.pid; then kill -- "-$(cat train.pid)" 2> /dev/null && sleep 5; fi; '
  launch+='rm -f train.pid train.log exit_code; '
  launch+='setsid nohup bash train.sh > train.log 2>&1 < /dev/null &'
  show='until test -s train.pid; do sleep 1; done; '
  show+='tail -n +1 -f --pid="$(cat train.pid)" train.log; '
  show+="exit \"\$(cat exit_code 2> /dev/null || echo $interrupted)\""
}

# Installs, starts and follows one attempt; returns the exit code of worker 0's run.
attempt() {
  local code state
  if [[ $dry_run == no ]] && on_workers 0 "$going"; then
    say "the run is already going: showing its log"
  else
    install && on_workers all "$launch" || return "$not_started"
  fi
  while true; do
    code=0
    on_workers 0 "$show" || code=$?
    ((code == 255)) || return "$code"
    # 255 is ssh's own: if the slice is still there, only the connection is gone.
    sleep 10
    state=$(vm_state)
    [[ $state == READY || $state == UNKNOWN ]] || return "$interrupted"
  done
}

main() {
  parse "$@"
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  check
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  local by_hand restarts code
  tpus queued-resources delete "$name" --force
  by_hand=$(quoted "${command[@]}")
  for ((restarts = 0; restarts <= max_restarts; restarts++)); do
    obtain
    code=0
    attempt || code=$?
    if ((code == 0)) && [[ $keep == yes ]]; then
      say "The run is over. The slice is kept, and paid for, until: $by_hand"
      return
    elif ((code == 0)); then
      delete
      return
    fi
    sleep 60 # a slice under notice of preemption still calls itself ready
    if ((code < 128)) && [[ $(vm_state) == READY ]]; then
      say "error: exit code $code, and the slice is there: the message above says why."
      say "Mend it and type the same command again. The slice is paid for until: $by_hand"
      exit "$code"
    fi
    say "interrupted (exit code $code): once more"
  done
  fail "$max_restarts restarts were not enough. The same command goes on."
}

main "$@"
