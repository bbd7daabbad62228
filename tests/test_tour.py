"""The two notebooks that need no model, run as a newcomer does: on their defaults, from JupyterLab's folder."""

import json
import re
import resource
from pathlib import Path

import nbformat
import papermill as pm
import pytest

from srlm_utils.artefacts import read_jsonl, write_jsonl

ROOT = Path(__file__).resolve().parents[1]


def run_notebook(name, tmp_path, monkeypatch, **parameters):
    """(outputs, texts and HTML of them, processor seconds) of a notebook run by papermill."""
    monkeypatch.chdir(ROOT / "notebooks")
    out, start = tmp_path / f"{name}.ipynb", resource.getrusage(resource.RUSAGE_CHILDREN)
    pm.execute_notebook(f"{name}.ipynb", str(out), parameters=parameters, kernel_name="python3", progress_bar=False)
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime
    assert out.stat().st_size < 2_000_000  # or GitHub does not show it
    outputs = [o for c in nbformat.read(out, as_version=4).cells if c.cell_type == "code" for o in c.outputs]
    texts = [str(v) for o in outputs for k, v in o.get("data", {}).items() if k.startswith("text/")]
    return outputs, "\n".join(texts + [o.text for o in outputs if o.output_type == "stream"]), seconds


def test_tour_follows_one_prompt_within_20_seconds(tmp_path, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in (ROOT / "results/example").rglob("*")}
    outputs, text, seconds = run_notebook("00_tour", tmp_path, monkeypatch)
    prompt = read_jsonl(ROOT / "results/example/M1/aift/prompts.jsonl")[0]["prompt"]
    assert f"M1 continued the list with:\n{prompt}" in text and re.search(r"^8\. ", text, re.M)
    pairs = read_jsonl(ROOT / "results/example/M1/aift/pairs.jsonl")
    pair = pairs[0]
    assert pair["prompt_id"] == "M1-p0000"
    assert f"{pair['chosen_id']} · chosen · score {pair['chosen_score']:.2f}" in text
    assert "M3 · score" in text and f"M2 from M1: {len(pairs)} pairs" in text
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 4
    assert seconds < 20, f"{seconds:.0f} s"  # of the processor: a busy machine is not the tour's fault
    assert before == {p: p.stat().st_mtime_ns for p in (ROOT / "results/example").rglob("*")}  # it writes nothing


def test_tour_follows_another_round_that_was_shown_what_came_before(tmp_path, monkeypatch):
    _, text, _ = run_notebook("00_tour", tmp_path, monkeypatch, model="M2", prompt="")
    n = len(read_jsonl(ROOT / "results/example/M2/aift/pairs.jsonl"))
    assert "M2 continued the list with:" in text and f"M3 from M2: {n} pairs" in text


@pytest.mark.parametrize("labelled", [False, True])
def test_labelling_notebook_runs_before_and_after_it_was_used(tmp_path, monkeypatch, labelled):
    labels = tmp_path / "labels.jsonl"
    if labelled:
        rows = read_jsonl(ROOT / "results/example/M3/eval/verdicts/M3_vs_SFT.jsonl")
        people = {"anna": rows, "bert": [r | {"p_first": 1 - r["p_first"]} for r in rows[:20]]}
        write_jsonl(labels, [r | {"judge": who, "judge_mode": "human"} for who, rs in people.items() for r in rs])
    how = {"n_prompts": 64, "n_readers": 2} if labelled else {}
    outputs, text, _ = run_notebook("11_label", tmp_path, monkeypatch, labels=str(labels), **how)
    assert f"Page: 0 of {64 if labelled else 50} labelled by reader-1" in text
    assert any("image/png" in o.get("data", {}) for o in outputs) == labelled
    assert ("majority of readers" in text) == labelled and labels.exists() == labelled
    assert ("M1, score (inside the loop)" in json.dumps(outputs)) == labelled
