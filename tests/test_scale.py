"""A round of many prompts, without a model: the same code as benchmarks/scale.py at a size that a test can afford."""

import json
import subprocess
import sys

import pytest

from benchmarks import scale
from srlm_utils.paths import PROJ_ROOT


def test_synthetic_rows_are_a_run_that_every_part_takes():
    found = scale.run_once(20)
    assert set(found["parts"]) == {"write_run", "build", "measure", "tables"}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_of_4000_prompts_and_their_308000_judgements():
    """In a process of its own, since memory is that of its peak: a fifth of 20,000 prompts within a GB and a half."""
    command = [sys.executable, "-m", "benchmarks.scale", "4000"]
    out = subprocess.run(command, cwd=PROJ_ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout.splitlines()[-1])["memory_gb"] < 1.5
