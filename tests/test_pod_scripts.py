"""The scripts for pods, with the schedulers' commands faked: what they would start, and with which arguments."""

import os
import pathlib
import re
import subprocess

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]


def run(script, *arguments, folder, commands, **env):
    """The script with fake commands that print their name and arguments; each may end with a status."""
    for name, status in commands.items():
        fake = folder / name
        fake.write_text(f'#!/bin/bash\nprintf "<%s>" {name} "$@"; echo\nexit {status}\n')
        fake.chmod(0o755)
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder), **env}
    return subprocess.run(
        ["bash", str(ROOT / "launch" / script), *arguments], env=env, capture_output=True, text=True, cwd=folder
    )


def test_tpu_vm_sends_the_tree_and_starts_the_same_command_on_all_hosts(tmp_path):
    arguments = ("--config=mixlora", "--workdir=/mnt/a run")
    done = run("tpu_vm.sh", *arguments, folder=tmp_path, commands=dict(gcloud=0, git=0), TPU="pod", ZONE="z")
    assert done.returncode == 0, done.stderr
    archive, copy, start = re.split(r"\n(?=<g)", done.stdout.strip())
    assert archive.startswith("<git><archive>")
    assert copy.startswith("<gcloud><compute><tpus><tpu-vm><scp>") and "<--worker=all>" in copy
    assert "<ssh><pod><--zone=z><--worker=all>" in start
    assert start.rstrip(" >").endswith(r"-m launch.train --config=mixlora --workdir=/mnt/a\ run")


@pytest.mark.parametrize("script", ["tpu_vm.sh", "slurm.sbatch"])
def test_without_arguments_they_say_what_they_want(tmp_path, script):
    done = run(script, folder=tmp_path, commands=dict(gcloud=0, srun=0), TPU="pod", ZONE="z")
    assert done.returncode == 2 and "launch.train" in done.stderr and not done.stdout


@pytest.mark.parametrize("status, requeued", [(0, False), (1, False), (143, True)])
def test_slurm_queues_a_run_again_only_where_it_was_told_to_stop(tmp_path, status, requeued):
    commands = dict(srun=status, scontrol=0)
    env = dict(SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(tmp_path))
    done = run("slurm.sbatch", "--config=mixlora", "--workdir=w", folder=tmp_path, commands=commands, **env)
    assert done.returncode == status
    start, *more = done.stdout.splitlines()
    assert start.endswith("<.venv/bin/python><-m><launch.train><--config=mixlora><--workdir=w>")
    assert more == (["<scontrol><requeue><7>"] if requeued else [])


def test_gke_is_an_indexed_job_whose_pods_can_find_each_other():
    given = dict(IMAGE="r/molora", HOSTS="4", CHIPS="4", TYPE="tpu", TOPOLOGY="4x4", CLAIM="disk", NAME="mola")
    text = re.sub(r"\$([A-Z]+)", lambda found: given[found[1]], (ROOT / "launch/gke.yaml").read_text())
    service, job = yaml.safe_load_all(text)
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {"job-name": "mola"}
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    pod = spec["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    assert container["command"] == ["molora", "train", "--config=mola", "--workdir=/shared/runs/mola"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
