"""The speed table is made of ratios in one run; its file has what readers of it expect."""

import json

import pytest
import torch

from benchmarks import __main__ as bench
from benchmarks import loop, measure
from srlm_utils.paths import PROJ_ROOT

NAMES = {
    "candidates_vs_one_at_a_time",
    "candidates_vs_generate_b32",
    "sampling_vs_greedy",
    "expected_vs_plain",
    "expected_vs_sampled_one_at_a_time",
    "sft_vs_trl",
    "dpo_vs_trl",
    "step_overhead_s",
    "quickstart_min",
    "growth_time",
    "growth_memory",
}


def test_a_ratio_is_taken_round_by_round():
    rates = {"kit": [10.0, 30.0, 20.0], "other": [1.0, 10.0, 4.0]}
    row = measure.ratio("x", rates, "kit", "other", 4)
    assert (row["ratio"], row["low"], row["high"], row["rate"]) == (5.0, 3.0, 10.0, 20.0)
    assert row["target"] == 4 and row["lower_is_better"] is False


def test_cases_take_turns():
    order = []
    cases = {name: lambda name=name: order.append(name) or 1 for name in "ab"}
    rates = measure.in_turn(cases, repeats=2)
    assert order == ["a", "b", "a", "b"] and all(len(r) == 2 for r in rates.values())


def test_limits_are_those_of_the_device_that_is_measured(monkeypatch):
    """Here the device is "meta", which computes nothing."""
    monkeypatch.setattr(measure, "pick_device", lambda: "meta")
    seen, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w: seen.append(x.device.type) or linear(x, w))
    assert all(figure > 0 for figure in measure.limits().values())
    assert set(seen) == {"meta"}


def test_the_figure_is_drawn_from_rows(tmp_path):
    rows = [
        measure.row("fast", [3.0, 2.0, 4.0], 2),
        measure.row("slow", [5.0], 4, lower_is_better=True),
        {"name": "absent", "ratio": None, "target": 20, "note": "not measured"},
    ]
    bench.figure(rows, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_a_quickstart_that_never_ran_is_said_so(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "PROJ_ROOT", tmp_path)
    row = loop.quickstart(again=False)
    assert row["ratio"] is None and "no finished results/quickstart" in row["note"]


def test_the_saved_table_has_every_row_with_its_target():
    saved = json.loads((PROJ_ROOT / "benchmarks" / "latest.json").read_text())
    rows = {r["name"]: r for r in saved["rows"]}
    assert set(rows) >= NAMES and saved["machine"] and saved["date"] and saved["limits"]["matmul_gflops"] > 0
    for name in NAMES:
        assert {"ratio", "low", "high", "target", "lower_is_better"} <= set(rows[name]), name
        if rows[name]["ratio"] is None:
            assert rows[name]["note"], name
        else:
            assert rows[name]["low"] <= rows[name]["ratio"] <= rows[name]["high"], name


def test_an_unknown_part_is_named(capsys):
    assert bench.main(["trainig"]) == 2
    assert "no part 'trainig'" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.long
def test_growth_is_measured_in_a_process_of_its_own():
    import subprocess
    import sys

    out = subprocess.run([sys.executable, "-m", "benchmarks.loop", "8"], cwd=PROJ_ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    found = json.loads(out.stdout.splitlines()[-1])
    assert found["seconds"] > 0 and 0.2 < found["memory_gb"] < 20
