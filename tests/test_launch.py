"""The launch script of TPU VMs, against a gcloud that only pretends."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest
from prepared import prepare

from big_vision_lite import train
from big_vision_lite.recipes import command_line

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "tools" / "launch_tpu_vm.sh"
RECIPE = "configs/quickstart.py"
NEEDED = {
    "name": "run-1",
    "zone": "europe-west4-b",
    "type": "v6e-8",
    "workdir": "gs://bucket/runs/first",
    "config": RECIPE,
}

# What a slice does, in three files: is it there, how is it, and what its runs end with
# (one word an attempt: an exit code, "lost" for a broken connection, "preempted").
GCLOUD = r"""#!/usr/bin/env bash
cd "$(dirname "$0")" || exit 9
printf '%s\n' "$*" >> calls
case "$*" in
  *"queued-resources describe"*)
    if [[ -e forbidden ]]; then echo "PERMISSION_DENIED" >&2; exit 1; fi
    if [[ ! -e there ]]; then echo "NOT_FOUND: no such" >&2; exit 1; fi
    echo ACTIVE ;;
  *"queued-resources create"*) touch there; echo READY > vm ;;
  *"queued-resources delete"*) rm there ;;
  *"tpu-vm describe"*) cat vm ;;
  *"storage rsync"*) if [[ -e no_data ]]; then echo "no such bucket" >&2; exit 1; fi ;;
  *"tpu-vm scp"*) for word in "$@"; do
      if [[ $word == */train.sh ]]; then cp "$word" "train.$(date +%N)"; fi; done ;;
  *"kill -0"*) [[ -e going ]] ;;
  *exit_code*tail* | *tail*exit_code*)
    read -r -a ends < ends; echo "${ends[@]:1}" > ends
    case ${ends[0]} in
      preempted) echo PREEMPTED > vm; exit 255 ;;
      lost) exit 255 ;;
      *) echo "step 1/2"; exit "${ends[0]}" ;;
    esac ;;
esac
"""


def launch(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=dict(os.environ, PATH=path or os.environ["PATH"]),
    )


def options(**changes: str | None) -> list[str]:
    given = NEEDED | changes
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


def commands(text: str) -> list[list[str]]:
    """Splits the printed commands as a shell would."""
    return [shlex.split(line[2:]) for line in text.splitlines() if line[:2] == "+ "]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> pathlib.Path:
    """Makes sure that no test reaches a gcloud that is installed."""
    for name, content in (("gcloud", GCLOUD), ("sleep", "#!/bin/sh\n")):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


@pytest.fixture
def cloud(folder):
    """Returns (folder of the pretended cloud, function that launches there)."""

    def run(ends: str, *more: str) -> subprocess.CompletedProcess:
        (folder / "ends").write_text(f"{ends}\n")
        return launch(*options(), *more)

    return folder, run


def calls(folder: pathlib.Path, word: str) -> int:
    return (folder / "calls").read_text().count(word)


def test_the_script_is_shellcheck_clean():
    found = shutil.which("shellcheck", path=pathlib.Path(sys.executable).parent)
    assert found, "pip install -e '.[test]' installs it"
    checked = subprocess.run(
        [found, SCRIPT], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


def test_a_dry_run_prints_every_command_and_runs_none(cloud):
    folder, run = cloud
    shown = run("0", "--spot", "--project=p", "--dry_run", "--", "--config.num_steps=9")
    assert shown.returncode == 0, shown.stderr
    assert not (folder / "calls").exists()
    printed = [" ".join(command[:5]) for command in commands(shown.stdout)]
    assert printed == [
        "gcloud compute tpus queued-resources create",
        f"git -C {ROOT} ls-files --cached",
        f"tar -C {ROOT} --null {commands(shown.stdout)[2][4]}",
        "gcloud compute tpus tpu-vm scp",
        "gcloud compute tpus tpu-vm ssh",
        "gcloud compute tpus tpu-vm ssh",
        "gcloud compute tpus tpu-vm ssh",
        "gcloud compute tpus queued-resources delete",
    ]
    create = commands(shown.stdout)[0]
    assert {"--accelerator-type=v6e-8", "--spot", "--project=p"} <= set(create)
    assert "--runtime-version=v2-alpha-tpuv6e" in create
    assert "--workdir=gs://bucket/runs/first --config.num_steps=9" in shown.stdout
    workers = [c[6] for c in commands(shown.stdout) if c[4] == "ssh"]
    assert workers == ["--worker=all", "--worker=all", "--worker=0"]


def test_flags_with_spaces_and_quotes_reach_train_as_they_were(cloud):
    folder, run = cloud
    flags = ["--config.a=two words", "--config.b=it's", '--config.c="$HOME" `x` *\\']
    assert run("0", "--", *flags).returncode == 0
    (script,) = folder.glob("train.*")
    line = script.read_text().splitlines()[-2]
    assert shlex.split(line)[-3:] == flags
    # And as the workers' shell reads it, not only as Python does.
    echoed = subprocess.run(
        ["bash", "-c", line.replace("../venv/bin/python", "printf '%s\\n'", 1)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert echoed.stdout.splitlines()[-3:] == flags


@pytest.mark.parametrize("missing", NEEDED)
def test_a_missing_option_is_named(missing):
    refused = launch(*options(**{missing: None}), "--dry_run")
    assert refused.returncode == 2
    assert f"error: --{missing} is missing" in refused.stderr
    assert not refused.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (options(workdir="runs/first"), "use gs://BUCKET/RUN"),
        (options(config="configs/quikstart.py"), RECIPE),
        (options(type="v99-8"), "Give --version"),
        (options(name="Run 1"), "small letters"),
        (options(data="/home/me/sets"), "rsync --recursive /home/me/sets gs://"),
        (options(data_folder="/dev/shm/sets"), "give --data gs://"),
        ([*options(), "--max_restarts=x"], "not a number"),
        ([*options(), "--zone"], "--zone needs a value"),
        ([*options(), "--sopt"], "no option --sopt"),
        ([*options(), "--config.num_steps=9"], "put it after --"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_asked_for(arguments, message):
    refused = launch(*arguments, "--dry_run")
    assert refused.returncode == 2
    assert message in refused.stderr
    assert not refused.stdout


def test_gcloud_is_asked_for_only_where_it_is_needed(tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("bash", "dirname", "mktemp", "sed", "rm", "cat"):
        (bare / name).symlink_to(str(shutil.which(name)))
    refused = launch(*options(), path=str(bare))
    assert refused.returncode == 2
    assert "gcloud is not installed" in refused.stderr
    assert launch(*options(), "--dry_run", path=str(bare)).returncode == 0


def test_help_shows_every_option():
    shown = launch("--help")
    assert shown.returncode == 0
    for option in (*NEEDED, "version", "spot", "keep", "max_restarts", "dry_run"):
        assert f"--{option}" in shown.stdout
    for option in ("data", "data_folder", "project"):
        assert f"--{option} " in shown.stdout


def test_the_example_of_the_help_trains_on_the_data_that_it_copies(
    tmp_path, monkeypatch
):
    """Followed as a worker would: the copied folder, what train.sh exports and runs."""
    text = launch("--help").stdout.replace("\\\n", " ")
    (example,) = [line for line in text.splitlines() if "--name s16" in line]
    shown = launch("--dry_run", *shlex.split(example)[1:])
    assert shown.returncode == 0, shown.stderr
    source, folder = copies(shown.stdout)
    assert source == "gs://BUCKET/tensorflow_datasets"
    home = tmp_path / "a home"
    prepare(
        home / folder,
        "imagenet2012",
        shape=(40, 48, 3),
        num_classes=1000,
        splits={"train": 200, "validation": 50},
    )
    script = [line for line in shown.stdout.splitlines() if line[:4] == "    "]
    export, train_line = script[2].strip(), script[4].strip()
    exported = subprocess.run(
        ["bash", "-c", f'{export}; echo "$TFDS_DATA_DIR"'],
        capture_output=True,
        text=True,
        check=True,
        cwd=home,
    )
    monkeypatch.setenv("TFDS_DATA_DIR", exported.stdout.strip())
    monkeypatch.chdir(ROOT)
    words = shlex.split(train_line)
    config = command_line.parse(words[3:], train.define_flags).config
    assert config.num_epochs == 300
    assert len(config.data.source) == 198
    assert len(config.evaluators["val"].source) == 50


def copies(printed: str) -> list[str]:
    """Returns what is copied to all workers, and the folder it is copied to."""
    (command,) = [words for words in commands(printed) if "rsync" in " ".join(words)]
    assert command[6] == "--worker=all"
    return shlex.split(command[7])[-2:]


@pytest.mark.parametrize("local", ["/dev/shm/my sets", "sets"])
def test_the_data_is_copied_where_it_is_asked_for(cloud, local):
    folder, run = cloud
    ended = run("0", "--data=gs://bucket/tfds", f"--data_folder={local}")
    assert ended.returncode == 0, ended.stderr
    assert copies(ended.stdout) == ["gs://bucket/tfds", local]
    (script,) = folder.glob("train.*")
    assert f"realpath {shlex.quote(local)}" in script.read_text()


def test_without_the_data_nothing_is_started(cloud):
    folder, run = cloud
    (folder / "no_data").touch()
    ended = run("0", "--data=gs://bucket/tfds")
    assert ended.returncode == 64 and "no such bucket" in ended.stderr
    assert calls(folder, "tail") == 0


def test_a_preempted_slice_is_made_again_and_the_same_command_resumes(cloud):
    folder, run = cloud
    ended = run("preempted 134 0")
    assert ended.returncode == 0, ended.stderr
    assert "the TPU VM is PREEMPTED" in ended.stderr
    # Once after the preemption; the crash (134) left the slice where it was.
    assert calls(folder, "queued-resources create") == 2
    assert calls(folder, "queued-resources delete") == 2  # preempted, and at the end
    assert calls(folder, "tpu-vm scp") == 3
    assert len({path.read_text() for path in folder.glob("train.*")}) == 1


def test_a_broken_connection_does_not_start_the_run_again(cloud):
    folder, run = cloud
    assert run("lost lost 0", "--keep").returncode == 0
    assert calls(folder, "tpu-vm scp") == 1
    assert calls(folder, "tail") == 3
    assert calls(folder, "queued-resources delete") == 0


def test_a_run_that_is_going_is_followed_and_not_started_again(cloud):
    folder, run = cloud
    for name, content in (("there", ""), ("going", ""), ("vm", "READY\n")):
        (folder / name).write_text(content)
    assert run("0").returncode == 0
    assert calls(folder, "tpu-vm scp") == 0
    assert calls(folder, "queued-resources create") == 0


def test_a_mistake_of_the_run_ends_the_script_and_keeps_the_slice(cloud):
    folder, run = cloud
    ended = run("1 0")
    assert ended.returncode == 1
    assert "queued-resources delete run-1 --force" in ended.stderr
    assert (folder / "there").exists()
    assert calls(folder, "tail") == 1


def test_a_project_without_permission_is_said_at_once(cloud):
    folder, run = cloud
    (folder / "forbidden").touch()
    ended = run("0")
    assert ended.returncode == 1
    assert "PERMISSION_DENIED" in ended.stderr
    assert calls(folder, "queued-resources create") == 0


def test_restarts_have_an_end(cloud):
    folder, run = cloud
    ended = run("134 134 134 0", "--max_restarts=2")
    assert ended.returncode == 2
    assert "2 restarts were not enough" in ended.stderr
    assert calls(folder, "tail") == 3
