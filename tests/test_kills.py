"""Real kills, at random moments of real runs: kill -9 of the runner, of a kernel, or of both."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from safetensors.torch import load_file

from srlm_utils.artefacts import read_jsonl
from srlm_utils.verify import verify
from tests.conftest import ROOT, before_dpo, srlm

KILLS = 20  # of the smoke run, and again of DPO
SMOKE = ["run", "params/smoke.yaml"]

pytestmark = [pytest.mark.slow, pytest.mark.long]


def start(args):
    command = [sys.executable, "-m", "srlm_utils.cli", *args]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kernels(run):
    """Processes that say they hold a step of the run."""
    for owner in (run / "steps").glob("*.owner"):
        pid = int(re.search(r"process (\d+)", owner.read_text()).group(1))
        if os.path.exists(f"/proc/{pid}"):
            yield pid


def kill(run, runner, who):
    pids = ([runner.pid] if who != "kernel" else []) + (list(kernels(run)) if who != "runner" else [])
    pids = pids or [runner.pid]  # between two steps there is no kernel
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    runner.wait(timeout=120)  # a runner whose kernel died ends by itself, and a kernel ends with its runner
    deadline = time.time() + 30
    while list(kernels(run)) and time.time() < deadline:
        time.sleep(0.1)
    assert not list(kernels(run)), f"a kernel outlived its runner by 30 s ({who} was killed)"


def finished(run):
    return {p: p.read_bytes() for p in (run / "steps").glob("*.json")}


def ids(run):
    """Ids of all rows of a run, by file."""
    names = ("attempt_id", "cand_id", "id", "prompt_id")
    return {
        p.relative_to(run).as_posix(): [next((r[n] for n in names if n in r), None) for r in read_jsonl(p)]
        for p in run.rglob("*.jsonl")
        if ".work/" not in p.as_posix()
    }


def metrics(run):
    return pd.read_csv(run / "report/metrics.csv", keep_default_na=False, na_values=[""]).drop(columns="run")


def assert_undisturbed(run, smoke):
    assert ids(run) == ids(smoke)
    assert not verify(run).findings
    assert not [p for p in run.rglob("*") if p.name.endswith((".tmp", ".work", ".lock", ".owner"))]
    pd.testing.assert_frame_equal(metrics(run), metrics(smoke), rtol=1e-3, atol=1e-4)


def test_a_smoke_run_killed_again_and_again_ends_as_an_undisturbed_one(smoke):
    run, rng, n_killed = smoke.with_name("test-kills"), random.Random(0), 0
    shutil.rmtree(run, ignore_errors=True)
    try:
        while n_killed < KILLS:
            before, runner = (finished(run) if run.is_dir() else {}), start([*SMOKE, "--run-name", run.name])
            try:
                runner.wait(timeout=rng.uniform(3, 12))
            except subprocess.TimeoutExpired:
                kill(run, runner, rng.choice(["runner", "kernel", "both"]))
                n_killed += 1
                assert all(path.read_bytes() == data for path, data in before.items())
            else:  # it came to its end between two kills; the others are for another run
                assert_undisturbed(run, smoke)
                shutil.rmtree(run)
        result = srlm(*SMOKE, "--run-name", run.name, timeout=3600)
        assert result.returncode == 0, result.stdout + result.stderr
        assert_undisturbed(run, smoke)
    finally:
        shutil.rmtree(run, ignore_errors=True)


def test_dpo_killed_again_and_again_continues_its_loss_curve(smoke):
    runs, rng = [smoke.with_name(f"test-dpo-{name}") for name in ("whole", "killed")], random.Random(1)
    try:
        for run in runs:
            before_dpo(smoke, run)
        args = [*SMOKE, "--only", "07_dpo@M2"]
        for value in ("epochs=40", "save_steps=1", "train_batch_size=2", "micro_batch_size=2"):
            args += ["--set", f"dpo.{value}"]
        whole, killed = runs
        result = srlm(*args, "--run-name", whole.name)
        assert result.returncode == 0, result.stdout + result.stderr
        work, n_killed = killed / "steps/07_dpo@M2.work", 0
        for _ in range(KILLS):
            reached = _steps(work)
            runner = start([*args, "--run-name", killed.name])
            while runner.poll() is None and _steps(work) <= reached:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.3))
            if runner.poll() is None:
                kill(killed, runner, rng.choice(["runner", "kernel", "both"]))
                n_killed += 1
        assert n_killed == KILLS, "it ended before it could be killed so often"
        result = srlm(*args, "--run-name", killed.name)
        assert result.returncode == 0, result.stdout + result.stderr
        logs = [pd.read_csv(run / "M2/training_log.csv") for run in runs]
        assert logs[0].step.tolist() == logs[1].step.tolist()
        assert logs[0].loss.tolist() == pytest.approx(logs[1].loss.tolist(), rel=1e-4)
        weights = [load_file(run / "M2/model/model.safetensors") for run in runs]
        for name, tensor in weights[0].items():
            assert (tensor.float() - weights[1][name].float()).abs().max() < 1e-3, name
    finally:
        for run in runs:
            shutil.rmtree(run, ignore_errors=True)


def _steps(work):
    """The last checkpoint of a step."""
    return max((int(p.name.rpartition("-")[2]) for p in work.glob("checkpoints/checkpoint-*")), default=0)
