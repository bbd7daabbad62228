"""Who holds a run, and how a run ends that is told to."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from filelock import FileLock

from srlm_utils import locks, step, sweep
from srlm_utils.artefacts import write_json, write_jsonl
from srlm_utils.errors import LockedError
from srlm_utils.params import BuildPairs, Experiment
from srlm_utils.step import begin_step
from tests.conftest import ROOT, srlm

HOLD = """
import sys, time
from pathlib import Path
from srlm_utils import locks
lock = locks.take(Path(sys.argv[1]), "")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder():
    """Another process that holds a lock, as a kernel does that outlived its runner."""
    running = []

    def hold(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", HOLD, str(path)]
        running.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        assert running[-1].stdout.readline() == "held\n"
        return running[-1]

    yield hold
    for process in running:
        process.kill()
        process.wait()


def begin(run):
    for name in ("prompts", "candidates", "judgements"):
        write_jsonl(run / f"M1/aift/{name}.jsonl", [])
    return begin_step("06_build_pairs", BuildPairs().model_dump() | {"run_dir": str(run)})


def test_a_step_that_another_kernel_writes_says_which(tmp_path, holder):
    lock = tmp_path / "steps/06_build_pairs@M1.lock"
    kernel = holder(lock)
    write_json(tmp_path / "steps/06_build_pairs@M1.work/half.json", {})
    with pytest.raises(
        LockedError, match=rf"06_build_pairs@M1 is being written by process {kernel.pid} on .+ since 20"
    ):
        begin(tmp_path)
    assert (tmp_path / "steps/06_build_pairs@M1.work/half.json").exists()  # the other one's work is left alone
    kernel.kill()
    kernel.wait()
    begin(tmp_path)  # a dead one holds nothing, whatever its file says
    assert f"process {os.getpid()} " in lock.with_suffix(".owner").read_text()
    locks.drop(step._held.pop(str(lock)))
    assert not lock.exists() and not lock.with_suffix(".owner").exists()


def test_a_run_that_another_process_runs_says_which(holder):
    run = ROOT / "results/test-held"
    shutil.rmtree(run, ignore_errors=True)
    other = holder(run / ".run.lock")
    try:
        result = srlm("run", "params/smoke.yaml", "--run-name", run.name)
        assert result.returncode == 2 and result.stderr.count("\n") == 1
        assert re.search(rf"results/test-held is being run by process {other.pid} on .+ since 20", result.stderr)
    finally:
        shutil.rmtree(run, ignore_errors=True)


def test_a_sweep_that_another_process_runs_says_which(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(sweep, "RESULTS", tmp_path)
    other = holder(tmp_path / "sweep-x/.lock")
    with pytest.raises(LockedError, match=rf"sweep-x is being run by process {other.pid} on .+ since 20"):
        sweep.run(Experiment.load([ROOT / "params/smoke.yaml"]), ["default"], 1, "x", "srlm sweep")


def test_a_lock_is_never_dropped_under_another_holder(tmp_path, monkeypatch):
    """Its file goes while it is held: once it is released, the file may be the lock of another."""
    path, there, release = tmp_path / "a.lock", [], FileLock.release

    def watched(self, *args, **kw):
        there.append(path.exists())
        release(self, *args, **kw)

    monkeypatch.setattr(FileLock, "release", watched)
    lock = locks.take(path, "a run")
    assert path.exists()
    locks.drop(lock)
    assert there[:1] == [False] and not lock.is_locked


def started(run, *sets):
    """A run whose first step with a model takes minutes; returns when that step's kernel holds its lock."""
    command = [sys.executable, "-m", "srlm_utils.cli", "run", "params/smoke.yaml", "--run-name", run.name]
    process = subprocess.Popen(
        [*command, *sets],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # tests that a shell began in the background hear no Ctrl-C, and hand that on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    owner, deadline = run / "steps/02_sft@SFT.owner", time.time() + 240
    while time.time() < deadline and not owner.is_file():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    return process, int(re.search(r"process (\d+)", owner.read_text()).group(1))


@pytest.fixture
def slow_run():
    run = ROOT / "results/test-told"
    shutil.rmtree(run, ignore_errors=True)
    process, kernel = started(run, "--set", "sft.epochs=300")
    yield process, kernel
    for pid in (process.pid, kernel):
        if os.path.exists(f"/proc/{pid}"):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    shutil.rmtree(run, ignore_errors=True)


RESUME = "  continue with: srlm run params/smoke.yaml --set sft.epochs=300 --run-name test-told"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminated"])
def test_a_run_that_is_told_to_end_says_how_to_go_on(slow_run, number):
    process, kernel = slow_run
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1, output
    assert "02_sft@SFT was interrupted; what it made is kept" in output
    assert output.splitlines()[-1] == RESUME and "Traceback" not in output
    assert not os.path.exists(f"/proc/{kernel}") and not (ROOT / "results/test-told/.run.lock").exists()


@pytest.mark.slow
def test_a_kernel_that_is_killed_is_reported_as_such(slow_run):
    process, kernel = slow_run
    os.kill(kernel, signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1, output
    assert "02_sft@SFT: its kernel died" in output and "lower sft.micro_batch_size (now 4)" in output
    assert output.splitlines()[-1] == RESUME
    assert not (ROOT / "results/test-told/steps/02_sft@SFT.json").exists()
