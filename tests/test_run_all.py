"""Run All on a notebook's own defaults, with the real model: what a newcomer does first."""

import json
import os
import shutil
from pathlib import Path

import nbformat
import papermill as pm
import pytest

from srlm_utils import rankings, warm
from srlm_utils.artefacts import read_jsonl

ROOT = Path(__file__).resolve().parents[1]
READING = "12_compare"  # opened by people, no step of a run; test_tour runs the other two
NOTEBOOKS = sorted(p for p in (ROOT / "notebooks").glob("*.ipynb") if p.stem not in ("00_tour", "11_label"))


@pytest.fixture(scope="module", autouse=True)
def fresh_scratch():
    shutil.rmtree(ROOT / "results/scratch", ignore_errors=True)
    yield


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_run_all_on_defaults(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")  # where JupyterLab starts a notebook
    out = tmp_path / path.name
    pm.execute_notebook(str(path), str(out), kernel_name="python3", progress_bar=False, **warm.kernels())
    nb = nbformat.read(out, as_version=4)
    outputs = [o for c in nb.cells if c.cell_type == "code" for o in c.outputs]
    text = json.dumps(outputs)
    if path.stem != READING:
        step = (
            "run" if path.stem in ("01_seed_data", "09_report") else {"07_dpo": "M2", "13_future": "F2"}.get(path.stem)
        )
        assert " done in " in text and "results/scratch" in text
        assert step is None or f"{path.stem}@{step} done" in text
    if path.stem in ("05_judge", "07_dpo", "09_report", "12_compare"):
        assert any("image/png" in o.get("data", {}) for o in outputs)
    if path.stem == "12_compare":  # the sweep that README speaks of, with its controls
        assert "of results/sweeps/standard" in text and "random_pairs" in text
    if path.stem == "09_report":  # steps were run in scratch before, on a few prompts
        said = (ROOT / "results/scratch/report/report.html").read_text()
        assert "A scratch run: made here: M1/aift/" in said and "of results/example." in said


@pytest.mark.slow
def test_human_rankings_of_open_assistant_can_be_judged(tmp_path):
    """Real ranked replies, where such a file is at hand: the rows load, and the seed model scores them."""
    trees = Path(os.environ.get("SRLM_OASST_TREES", ROOT.parent / "shared/data/oasst_en_40_trees.jsonl"))
    if not trees.is_file():
        pytest.skip("no Open Assistant trees at hand (set SRLM_OASST_TREES to an export)")
    from srlm_utils import evaluate, judge
    from srlm_utils.engine import Engine
    from srlm_utils.rows import RankedRow, load_rows
    from srlm_utils.seed_model import fetch

    rows = []
    for tree in read_jsonl(trees):
        replies = [r for r in tree["prompt"]["replies"] if r.get("rank") is not None and not r["deleted"]]
        if len(replies) >= 2 and min(r["rank"] for r in replies) == 0:
            rows.append(
                {
                    "prompt_id": tree["message_tree_id"],
                    "prompt": tree["prompt"]["text"],
                    "replies": [{"reply_id": r["message_id"], "text": r["text"], "rank": r["rank"]} for r in replies],
                }
            )
    path = tmp_path / "ranked.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    ranked = [r for r in load_rows(path, RankedRow) if sum(len(x["text"]) for x in r["replies"]) < 3000][:8]
    engine = Engine(fetch("smollm2-135m-instruct")["path"], device="cpu", batch_size=4)
    judged = [r for b in judge.expected_scores(engine, judge.Rubric("short"), rankings.items(ranked)) for r in b]
    figures = {r["metric"]: r for r in evaluate.agreement_rows("M0", ranked, judged, "expected", "oasst")}
    assert figures["tie_rate"]["value"] < 0.05
    assert 0 <= figures["pairwise_accuracy"]["value"] <= 1 and figures["pairwise_accuracy"]["n"] >= 8


def test_no_estimate_is_made_of_start_up_alone(monkeypatch, tmp_path):
    """A first step that fetches a model in 25 seconds says nothing of the hours of training behind it."""
    import io
    import time

    from srlm_utils.runner import ProgressLine

    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    out = io.StringIO()
    line = ProgressLine([("01_seed_data@run", 800.0), ("02_sft@SFT", 45_000.0), ("02_sft@M1", 600_000.0)], out)
    for i, seconds in enumerate((25, 72)):
        line.begin(i, tmp_path / "none")
        now[0] += seconds
        line.end(i)
    line.begin(2, tmp_path / "none")
    assert [" left" in text for text in out.getvalue().splitlines()] == [False, False, True]
    assert "about 21 min left" in out.getvalue()  # 97 s for 45,800 of 645,800
