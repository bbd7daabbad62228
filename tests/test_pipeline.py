"""The whole pipeline on the tiny model, through papermill and the command line, as a user runs it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from srlm_utils import cards, hub, open_run, plots, runner, selection, share
from srlm_utils.artefacts import model_sha256, read_json, read_jsonl
from srlm_utils.errors import SrlmError
from srlm_utils.metrics import METRICS
from srlm_utils.params import Experiment
from srlm_utils.paths import EXAMPLE
from srlm_utils.report import COLUMNS
from srlm_utils.verify import verify
from tests.conftest import ROOT, before_dpo, cli, srlm
from tests.test_judge_modes import MODES

MODELS = ["M0", "SFT", "M1", "M2", "M3"]


def test_every_step_left_notebook_and_manifest(smoke):
    steps = {p.stem for p in (smoke / "steps").glob("*.json")}
    assert (
        steps
        == {p.stem for p in (smoke / "notebooks").glob("*.ipynb")}
        == {
            "01_seed_data@run",
            "02_sft@SFT",
            "03_build_eft@SFT",
            "02_sft@M1",
            "09_report@run",
            *(f"08_evaluate@{m}" for m in MODELS),
            "07_dpo@M2",
            "07_dpo@M3",
            *(f"{s}@{m}" for s in ("04_self_instruct", "05_judge", "06_build_pairs") for m in ("M1", "M2")),
        }
    )
    assert not list((smoke / "steps").glob("*.work")) and not list((smoke / "steps").glob("*.lock"))
    m = read_json(smoke / "steps" / "07_dpo@M2.json")
    assert m["figures"]["reference_revision"] == model_sha256(smoke / "M1/model")[:12]
    assert m["inputs"]["M1/aift/pairs.jsonl"]["n_rows"] == m["figures"]["n_pairs"] > 0
    assert {"torch", "transformers", "trl", "peft", "papermill"} <= set(m["versions"])
    assert m["seconds"] > 0 and m["params"]["beta"] == 0.1


def test_rows_refer_to_each_other(smoke):
    for m in ("M1", "M2"):
        prompts, candidates, judgements, pairs = (
            read_jsonl(smoke / m / "aift" / f"{n}.jsonl") for n in ("prompts", "candidates", "judgements", "pairs")
        )
        ids = {p["prompt_id"] for p in prompts}
        assert len(candidates) == 4 * len(prompts)
        assert {c["prompt_id"] for c in candidates} == ids
        assert {j["id"] for j in judgements} == {c["cand_id"] for c in candidates}
        score = {j["id"]: j["score"] for j in judgements}
        for p in pairs:
            mine = [score[c["cand_id"]] for c in candidates if c["prompt_id"] == p["prompt_id"]]
            assert (p["chosen_score"], p["rejected_score"]) == (max(mine), min(mine))
        health = read_json(smoke / m / "aift" / "health.json")
        assert len(pairs) + sum(health["drops"].values()) == len(prompts)


def test_new_prompts_stay_away_from_the_seed(smoke):
    from srlm_utils.self_instruct import rouge_l, words

    held = [
        words(r["prompt"])
        for n in ("ift", "ranked_eval", "test_prompts")
        for r in read_jsonl(smoke / f"seed/{n}.jsonl")
    ]
    for p in read_jsonl(smoke / "M1/aift/prompts.jsonl"):
        assert max(rouge_l(words(p["prompt"]), h) for h in held) < 0.7


def test_eft_rows_come_in_both_formats(smoke):
    rows = read_jsonl(smoke / "SFT/eft/train.jsonl")
    assert {r["format"] for r in rows} == {"justify_first", "score_first"}
    assert all(r["response"] == f"Score: {r['score']}" for r in rows if r["format"] == "score_first")
    assert all(r["response"].endswith(f"\nScore: {r['score']}") for r in rows if r["format"] == "justify_first")


def test_metrics_csv(smoke):
    table = pd.read_csv(smoke / "report/metrics.csv", keep_default_na=False, na_values=[""])
    assert list(table.columns) == COLUMNS
    assert set(table.metric) <= set(METRICS)
    shares = table[(table.unit == "share") & table.value.notna()]
    assert shares.value.between(0, 1).all()
    bounded = shares[shares.low.notna()]
    assert ((bounded.low <= bounded.value + 1e-9) & (bounded.value <= bounded.high + 1e-9)).all()
    assert shares.n.gt(0).all()
    agreement = table[table.metric == "pairwise_accuracy"]
    assert set(zip(agreement.model, agreement.set, agreement.judge_mode, strict=True)) == {
        (m, name, mode) for m in MODELS for name in ("onpolicy_eval", "ranked_eval") for mode in MODES
    }
    gains = table[table.metric == "agreement_gain"]
    assert len(gains) == 10 * 2 * len(MODES) and gains.value.between(-1, 1).all()  # ten pairs of models, two sets
    h2h = table[table.metric.isin(["win", "tie", "loss"])].groupby(["model", "opponent", "judge"]).value.sum()
    assert len(h2h) == 20 and h2h.between(1 - 1e-9, 1 + 1e-9).all()  # ten pairs, two judges
    assert {"M0", "M1"} == set(table[table.metric == "win_rate"].judge)
    for name in ("win_rate_length_controlled", "sign_test"):  # beside every win rate
        assert len(table[table.metric == name]) == 20
    for name in ("reference_logprob", "instruction_strict_accuracy", "over_refusal_rate", "unsafe_refusal_rate"):
        assert set(table[table.metric == name].model) == set(MODELS), name


def test_verdict_rows_say_who_judged_and_in_which_order(smoke):
    rows = read_jsonl(smoke / "M3/eval/verdicts/M3_vs_M2.jsonl")
    assert {(r["judge"], r["judge_mode"], r["order"]) for r in rows} == {
        ("M0", "pairwise", "AB"),
        ("M0", "pairwise", "BA"),
        ("M1", "score", "none"),
    }
    assert all(0 <= r["p_first"] <= 1 and r["judge_rev"] for r in rows)


def test_report_is_one_file_without_outside_requests(smoke):
    html = (smoke / "report/report.html").read_text()
    assert "Content-Security-Policy" in html
    assert not re.search(r'(src|href)="(?!data:)', html) and "<script" not in html
    figures = {p.stem for p in (smoke / "report/figures").glob("*.png")}
    assert (
        figures
        == {p.stem for p in (smoke / "report/figures").glob("*.csv")}
        >= {"agreement", "win_rates", "answers", "funnel", "scores", "sft", "dpo", "mean_scores"}
        | {"length_control", "ratings", "categories", "judge_agreement", "answer_lengths"}
    )
    assert html.count("data:image/png") == len(figures)


def test_every_model_has_a_card_that_the_hub_reads(smoke):
    from huggingface_hub import ModelCard

    for m in MODELS[1:]:
        card = ModelCard.load(smoke / m / "model/README.md")
        assert card.data.library_name == "transformers" and "self-rewarding" in card.data.tags
        assert "## Lineage" in card.text and "## Limits" in card.text and "Nothing had been measured" in card.text
        later = ModelCard(cards.from_run(smoke, m))  # the folder, which manifests know by its hash, is as it was
        assert "Nothing had been measured" not in later.text and later.data.eval_results
    assert "M2 was made from M1" in ModelCard.load(smoke / "M3/model/README.md").text


def test_executed_notebooks_need_no_widget_and_are_shared(smoke, tmp_path):
    for path in (smoke / "notebooks").glob("*.ipynb"):
        text = path.read_text()
        assert path.stat().st_size < 2e6 and "widget-view" not in text and not re.search(r"\d+%\|", text)
        assert str(ROOT) not in text
    files = share.share(smoke, tmp_path / "share")
    assert sum(p.stat().st_size for p in files) < 15e6
    assert {p.stem for p in (tmp_path / "share/models").glob("*.html")} == set(MODELS[1:])


def test_a_judge_of_the_run_is_named_as_inside_the_loop():
    from srlm_utils.verdicts import judge_label

    assert judge_label("M1", "score") == "M1, score (inside the loop)"
    assert judge_label("M0", "pairwise") == "M0, pairwise (the models descend from it)"
    assert judge_label("gemma-3-270m", "pairwise") == "gemma-3-270m, pairwise"


def test_a_second_run_does_nothing(smoke):
    before = {p: p.stat().st_mtime_ns for p in smoke.rglob("*.json*")}
    result = cli("run", "params/smoke.yaml", "--run-name", smoke.name)
    assert result.returncode == 0 and "all 18 steps are done" in result.stdout
    assert before == {p: p.stat().st_mtime_ns for p in smoke.rglob("*.json*")}
    assert "18 of 18 steps done" in cli("plan", "params/smoke.yaml", "--run-name", smoke.name).stdout
    status = cli("status", str(smoke)).stdout
    assert "18 steps done" in status and "07_dpo@M3" in status


def test_from_only_and_force_run_the_steps_they_name(smoke, monkeypatch):
    ran = []
    monkeypatch.setattr(runner, "_run_notebook", lambda step, *rest: ran.append(step.name))
    words = "run", "params/smoke.yaml", "--run-name", smoke.name
    last = ["08_evaluate@M3", "09_report@run"]
    for options, expected in (
        (["--from", last[0], "--force"], last),
        (["--only", "05_judge@M1", "--force"], ["05_judge@M1"]),
        (["--from", last[0]], []),
        (["--only", "05_judge@M1"], []),
    ):
        ran.clear()
        result = cli(*words, *options)
        assert result.returncode == 0 and ran == expected, (options, result.stderr)
        assert ("done already; --force runs it again" in result.stdout) == (not ran)


def test_what_comes_out_the_same_makes_nothing_else_run(smoke):
    (smoke / "steps/06_build_pairs@M1.json").unlink()
    result = cli("run", "params/smoke.yaml", "--run-name", smoke.name)
    assert result.returncode == 0 and "06_build_pairs@M1" in result.stdout
    assert "07_dpo@M2" not in result.stdout and "09_report@run" not in result.stdout


@pytest.mark.slow
@pytest.mark.long
def test_positives_only_runs_to_its_end():
    run = ROOT / "results" / "test-positives"
    shutil.rmtree(run, ignore_errors=True)
    # the random model's scores are near 2.5 and few of its answers end
    sets = ["common.iterations=2", "build_pairs.positive_min_score=1.0", "self_instruct.max_new_tokens=200"]
    args = [a for s in sets for a in ("--set", s)]
    result = cli("run", "params/smoke.yaml", "params/variants/positives.yaml", *args, "--run-name", run.name)
    try:
        assert result.returncode == 0, result.stdout + result.stderr
        positives = read_jsonl(run / "M1/aift/positives.jsonl")
        sft = read_json(run / "steps/02_sft@M2.json")
        assert sft["figures"]["n_rows"] == 16 + len(positives) and len(positives) > 0
        assert "M1/model" in sft["inputs"] and (run / "report/report.html").is_file()
    finally:
        shutil.rmtree(run, ignore_errors=True)


@pytest.mark.slow
def test_variants_laid_over_each_other_run_to_their_end():
    run = ROOT / "results" / "test-variants"
    shutil.rmtree(run, ignore_errors=True)
    names = ["length_control", "frozen_judge", "without_eft", "dpo_nll", "replay"]
    names += ["anchored_rejects", "consistency_weighted", "future_chosen"]
    files = [f"params/variants/{name}.yaml" for name in names]
    result = cli("run", "params/smoke.yaml", *files, "--run-name", run.name)
    try:
        assert result.returncode == 0, result.stdout + result.stderr
        steps = {p.stem: read_json(p) for p in (run / "steps").glob("*.json")}
        assert "03_build_eft@SFT" not in steps and "SFT/eft/train.jsonl" not in steps["02_sft@M1"]["inputs"]
        candidates = read_jsonl(run / "M2/aift/candidates.jsonl")
        assert {c.get("author") for c in candidates} == {None, "M0"}
        judged = read_jsonl(run / "M2/aift/judgements.jsonl")
        assert len(judged) == len(candidates) and {j["judge"] for j in judged} == {"M1"}
        assert any(abs(j["implicit"]) > 0.1 for j in judged if j["implicit"] is not None)
        dpo, pairs = steps["07_dpo@M3"], {m: read_jsonl(run / m / "aift/pairs.jsonl") for m in ("M1", "M2")}
        learned_from = {name for name in dpo["inputs"] if name.endswith("pairs.jsonl")}
        assert learned_from == {"F3/aift/pairs.jsonl", "F2/aift/pairs.jsonl"} and "M2/model" in dpo["inputs"]
        draft, future = steps["07_dpo@F3"], steps["13_future@F3"]
        learned_from = {name for name in draft["inputs"] if name.endswith("pairs.jsonl")}
        assert learned_from == {"M2/aift/pairs.jsonl", "F2/aift/pairs.jsonl"} and "M2/model" in draft["inputs"]
        new = [pair for pair in read_jsonl(run / "F3/aift/pairs.jsonl") if "-F3-" in pair["chosen_id"]]
        judged = {j["id"]: j for j in read_jsonl(run / "F3/aift/judgements.jsonl")}
        assert new and {judged[pair["chosen_id"]]["judge"] for pair in new} == {"M1"}  # frozen, as in 05_judge
        assert "M1/model" in future["inputs"]
        rate = {r["metric"]: r for r in read_json(run / "F3/aift/health.json")["metrics"]}["draft_chosen_rate"]
        assert rate["value"] == pytest.approx(len(new) / rate["n"])
        table = pd.read_csv(run / "report/metrics.csv")
        assert [*table[table.metric == "draft_chosen_rate"].model] == ["F2", "F3"]
        opened = open_run(run)
        assert (
            set(opened.candidates("F3").cand_id) >= {pair["chosen_id"] for pair in new}
            and "F3" not in opened.models.index
        )
        assert "F3, a draft of M3" in cards.from_run(run, "M3")
        assert "F3/pairs.jsonl" in hub._aift(run, "M3")
        assert verify(run).findings == []
        pairs = {m: read_jsonl(run / f"F{int(m[1]) + 1}/aift/pairs.jsonl") for m in ("M1", "M2")}
        n_old = round(len(pairs["M1"]) / 2)
        assert dpo["figures"]["n_pairs"] == len(pairs["M2"]) + n_old > n_old > 0
        total = len(pairs["M2"]) * pairs["M2"][0]["consistency"] + n_old * pairs["M1"][0]["consistency"]
        assert dpo["figures"]["consistency"] == pytest.approx(total / dpo["figures"]["n_pairs"], abs=1e-3)
        # the likelihood of the tiny model's answers stands on top of log 2
        assert dpo["figures"]["first_loss"] > 2 and steps["07_dpo@M2"]["figures"]["n_pairs"] == len(pairs["M1"])
        assert (run / "report/report.html").is_file()
    finally:
        shutil.rmtree(run, ignore_errors=True)


def test_a_steps_accuracies_are_those_of_enough_pairs(smoke):
    """One parsed pair that happens to be right is no accuracy of 1.0, in `srlm status` or the tour."""
    few = 0
    for model in MODELS:
        figures = read_json(smoke / f"steps/08_evaluate@{model}.json")["figures"]
        rows = [r for r in read_json(smoke / model / "eval/metrics.json") if r["metric"] == "pairwise_accuracy"]
        told = {f"{r['set']}_{r['judge_mode']}_accuracy" for r in rows if r["n"] >= plots.MIN_PAIRS}
        assert {name for name in figures if name.endswith("_accuracy")} == told
        few += len(rows) - len(told)
    assert few  # the tiny model hardly writes a valid judgement


def test_plan_says_what_a_change_touches(smoke):
    out = cli("plan", "params/smoke.yaml", "--run-name", smoke.name, "--set", "dpo.beta=0.3").stdout
    state = {line.split()[1]: line for line in out.splitlines() if "@" in line}
    assert "beta changed: 0.1 -> 0.3" in state["07_dpo@M2"]
    assert "after 07_dpo@M2" in state["08_evaluate@M2"] and state["05_judge@M2"].startswith("run")
    for untouched in ("02_sft@M1", "06_build_pairs@M1", "08_evaluate@M1"):
        assert state[untouched].startswith("done")


def test_an_input_edited_by_hand_makes_its_steps_stale(smoke):
    path = smoke / "M1/aift/candidates.jsonl"
    original = path.read_bytes()
    try:
        path.write_bytes(original.replace(b'"ended": ', b'"ended":  ', 1))
        out = cli("plan", "params/smoke.yaml", "--run-name", smoke.name).stdout
        assert "output was changed: M1/aift/candidates.jsonl" in out
        assert "input changed: M1/aift/candidates.jsonl" in out
    finally:
        path.write_bytes(original)


def test_replay_with_plain_papermill(smoke):
    params = smoke / "params/06_build_pairs@M1.yaml"
    out = smoke / "replayed.ipynb"
    before = (smoke / "M1/aift/pairs.jsonl").read_bytes()
    subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            "notebooks/06_build_pairs.ipynb",
            str(out),
            "-f",
            str(params),
            "--no-progress-bar",
            "-k",
            "python3",
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    assert (smoke / "M1/aift/pairs.jsonl").read_bytes() == before


def copy_of(run, name):
    target = run.parent / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(run, target)
    return target


def test_a_killed_run_resumes_and_skips(smoke):
    """Kill runner and kernel in the middle of a step; the next run continues it and repeats nothing."""
    run = copy_of(smoke, "test-killed")
    try:
        # one written judgement after the other: slow enough to be killed in the middle
        command = [sys.executable, "-m", "srlm_utils.cli", "run", "params/smoke.yaml", "--run-name", run.name]
        command += ["--only", "05_judge@M1"]
        for value in ("judge_mode=sampled", "n_samples=2", "batch_size=2", "max_new_tokens=60"):
            command += ["--set", f"judge.{value}"]
        whole = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert whole.returncode == 0, whole.stdout + whole.stderr
        expected = read_jsonl(run / "M1/aift/judgements.jsonl")
        (run / "steps/05_judge@M1.json").unlink()
        (run / "M1/aift/judgements.jsonl").unlink()
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        log = run / "steps/05_judge@M1.work/judgements.jsonl"
        deadline = time.time() + 120
        while time.time() < deadline and not (log.is_file() and log.read_bytes().count(b"\n") >= 2):
            time.sleep(0.005)
        owner = (run / "steps/05_judge@M1.owner").read_text()
        os.kill(int(re.search(r"process (\d+)", owner).group(1)), signal.SIGKILL)  # the kernel
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 1 and "continue with: srlm run params/smoke.yaml" in output, output
        kept = log.read_bytes().count(b"\n")
        assert 2 <= kept < len(expected), "the kernel was killed too late to test anything"
        with open(log, "ab") as f:
            f.write(b'{"id": "half a ro')  # as if the kill had hit a write
        before = (run / "steps/02_sft@M1.json").read_bytes()
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stdout + result.stderr
        notebook = (run / "notebooks/05_judge@M1.ipynb").read_text()
        assert f"continuing: {kept} rows of judgements.jsonl were made before" in notebook
        assert "dropped an incomplete last row" in notebook
        rows = read_jsonl(run / "M1/aift/judgements.jsonl")
        assert rows == expected  # the same random numbers, and the same texts
        assert (run / "steps/02_sft@M1.json").read_bytes() == before
    finally:
        shutil.rmtree(run, ignore_errors=True)


def test_a_kernel_ends_with_its_runner(smoke):
    """A runner that is killed leaves no kernel behind that would hold the step's lock."""
    run = copy_of(smoke, "test-orphan")
    try:
        (run / "steps/02_sft@M1.json").unlink()
        command = [sys.executable, "-m", "srlm_utils.cli", "run", "params/smoke.yaml", "--run-name", run.name]
        process = subprocess.Popen(
            [*command, "--set", "by_model.M1.sft.epochs=200"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        owner, deadline = run / "steps/02_sft@M1.owner", time.time() + 120
        while time.time() < deadline and not (owner.is_file() and owner.read_text()):
            time.sleep(0.05)
        kernel = int(re.search(r"process (\d+)", owner.read_text()).group(1))
        assert Path(f"/proc/{kernel}").exists()
        process.kill()
        process.wait()
        deadline = time.time() + 20
        while time.time() < deadline and Path(f"/proc/{kernel}").exists():
            time.sleep(0.1)
        assert not Path(f"/proc/{kernel}").exists(), "the kernel outlived its runner"
    finally:
        shutil.rmtree(run, ignore_errors=True)


def test_executed_notebooks_show_their_figures(smoke):
    for step in ("02_sft@M1", "05_judge@M1", "07_dpo@M2", "08_evaluate@M2", "09_report@run"):
        assert '"image/png"' in (smoke / f"notebooks/{step}.ipynb").read_text(), step


def test_a_failing_cell_is_named_with_the_command_that_resumes(smoke):
    run = copy_of(smoke, "test-failing")
    try:
        # a row that no check looks at, but pairing needs
        path = run / "M1/aift/candidates.jsonl"
        rows = [{k: v for k, v in r.items() if k != "ended"} for r in read_jsonl(path)]
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        result = cli("run", "params/smoke.yaml", "--run-name", run.name, "--only", "06_build_pairs@M1")
        assert result.returncode == 1
        assert re.search(
            r"06_build_pairs@M1 failed in results/test-failing/notebooks/06_build_pairs@M1\.ipynb, cell \d+: "
            r"KeyError: 'ended'",
            result.stderr,
        ), result.stderr
        assert "continue with: srlm run params/smoke.yaml --run-name test-failing" in result.stderr
    finally:
        shutil.rmtree(run, ignore_errors=True)


@pytest.mark.slow
def test_a_run_from_open_assistant_trees(tmp_path):
    """One export for answers, judgements and the exam; a judge that learns scores made of ranks."""
    from tests.test_sources import many, save

    path = save(tmp_path / "oa.jsonl.gz", many(60))
    run, sets = ROOT / "results" / "test-oa", []
    for name, value in {
        "seed_data.ift_file": path,
        "seed_data.ranked_train_files": f"[{path}]",
        "seed_data.ranked_eval_files": f"[{path}]",
        "seed_data.n_ranked_train": 4,
        "build_eft.scores_from": "ranks",
        "build_eft.formats": "[score_first]",
        "build_eft.max_response_tokens": 3,
    }.items():
        sets += ["--set", f"{name}={value}"]
    try:
        for step in ("01_seed_data@run", "02_sft@SFT", "03_build_eft@SFT", "02_sft@M1", "08_evaluate@M0"):
            result = cli("run", "params/smoke.yaml", *sets, "--only", step, "--run-name", run.name)
            assert result.returncode == 0, result.stdout + result.stderr
        rows = read_jsonl(run / "SFT/eft/train.jsonl")
        assert sorted({(r["rank"], r["score"]) for r in rows}) == [(0, 5), (1, 3), (2, 1)]
        figures = read_json(run / "steps/03_build_eft@SFT.json")["figures"]
        assert figures["n_prompts"] == 4 and figures["n_cut"] == 12
        assert {r["set"] for r in read_json(run / "M0/eval/metrics.json") if r["metric"] == "tie_rate"} == {"oa"}
        read = {n: {r["prompt_id"] for r in read_jsonl(run / f"seed/{n}.jsonl")} for n in ("ift", "ranked_eval")}
        assert read["ift"] and read["ranked_eval"] and not read["ift"] & read["ranked_eval"]
    finally:
        shutil.rmtree(run, ignore_errors=True)


@pytest.mark.slow
def test_the_pipeline_compares_and_keeps(smoke):
    for model, stage in (("SFT", "02_sft"), ("M1", "02_sft"), ("M2", "07_dpo"), ("M3", "07_dpo")):
        table = pd.read_csv(smoke / model / "selection.csv")
        assert list(table) == selection.COLUMNS and (table.n == 2).all()
        log, manifest = (
            pd.read_csv(smoke / model / "training_log.csv"),
            read_json(smoke / f"steps/{stage}@{model}.json"),
        )
        assert table.step.iloc[-1] == log.step.iloc[-1], "the last step is compared"
        assert (table.step[:-1] % 2 == 0).all() and table.kept.sum() == 1
        kept = int(table.step[table.kept].iloc[0])
        assert manifest["figures"]["kept_step"] == kept
        assert {f"{model}/selection.csv", f"{model}/selection_answers.jsonl"} <= manifest["outputs"].keys()
        assert "seed/valid_prompts.jsonl" in manifest["inputs"]
        card = (smoke / model / "model/README.md").read_text()
        assert f"after step {kept} of {len(log)}: of the checkpoints compared" in card
        answers = read_jsonl(smoke / model / "selection_answers.jsonl")
        assert {r["step"] for r in answers} == {0, *table.step} and len(answers) == 2 * (1 + len(table))
        valid = {r["prompt_id"]: r["prompt"] for r in read_jsonl(smoke / "seed/valid_prompts.jsonl")}
        assert all(valid[r["prompt_id"]] == r["prompt"] for r in answers)
        notebook = json.loads((smoke / f"notebooks/{stage}@{model}.ipynb").read_text())
        cell = next(c for c in notebook["cells"] if "select.show(" in "".join(c["source"]))
        text = json.dumps(cell["outputs"])
        assert "image/png" in text and "compared_with" in text
    assert not list((smoke / "steps").glob("*.work"))


@pytest.mark.slow
def test_a_run_launches_a_training_and_compares_its_checkpoints(smoke):
    run = smoke.with_name("test-launch")
    before_dpo(smoke, run)
    sets = ["train_batch_size=4", "micro_batch_size=2", "epochs=4", "launch=params/accelerate/cpu_ddp.yaml"]
    try:
        args = ["run", "params/smoke.yaml", "--only", "07_dpo@M2", "--run-name", run.name]
        result = cli(*args, *(x for s in sets for x in ("--set", f"dpo.{s}")))
        assert result.returncode == 0, result.stdout + result.stderr
        log, selection = (pd.read_csv(run / f"M2/{name}.csv") for name in ("training_log", "selection"))
        assert len(log) > 3 and selection.step.tolist() == [*range(2, len(log), 2), len(log)]
        assert selection.kept.sum() == 1
        text = (run / "notebooks/07_dpo@M2.ipynb").read_text()
        assert "2 processes, MULTI_CPU, on cpu" in text and "it/s" not in text
        assert not [p for p in run.rglob("*") if p.name.endswith((".tmp", ".work"))]
    finally:
        shutil.rmtree(run, ignore_errors=True)


# ---- bad input: one clear message, exit code 2, before any model loads, nothing overwritten


@pytest.mark.parametrize(
    "args,message",
    [
        (["--set", "dpo.betta=0.2"], "Did you mean 'beta'"),
        (["--set", "dpo.beta=high"], "'high' is no float"),
        (["--set", "judge.judge_mode=guess"], "is no"),
        (["--set", "common.iterations=0"], "iterations"),
        (["--set", "seed_data.ift_file=none.jsonl"], "none.jsonl: no such file"),
        (["--only", "05_judge@M7"], "no step '05_judge@M7'"),
        (["--run-name", "../outside"], "plain folder name"),
        (["--set", "evaluate.win_judges=[M3:score]"], "exists before|before it does"),
    ],
)
def test_bad_parameters(args, message):
    name = [] if "--run-name" in args else ["--run-name", "test-bad"]
    result = cli("run", "params/smoke.yaml", *args, *name)
    assert result.returncode == 2, result.stdout + result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (ROOT / "results/test-bad/steps").exists()
    shutil.rmtree(ROOT / "results/test-bad", ignore_errors=True)


def test_a_malformed_seed_row_stops_before_any_step(tmp_path):
    bad = tmp_path / "ift.jsonl"
    bad.write_text('{"prompt_id": "a", "prompt": "Hi", "response": 7}\n')
    result = cli("run", "params/smoke.yaml", "--set", f"seed_data.ift_file={bad}", "--run-name", "test-bad")
    assert result.returncode == 2
    assert "row 1 (a): response" in result.stderr and "found 7" in result.stderr
    assert not (ROOT / "results/test-bad").exists()


def test_the_seed_is_read_again_only_where_its_step_has_to_run(tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(runner, "load_seeds", loaded.append)
    monkeypatch.setattr(runner, "_run_notebook", lambda *_: None)
    run, step = tmp_path / "run", "01_seed_data@run"
    shutil.copytree(EXAMPLE, run)
    experiment = Experiment.load([EXAMPLE / "params.yaml"])
    for options, n in (({}, 0), ({"force": True}, 1)):
        loaded.clear()
        runner.execute(experiment, run, "srlm run", only=step, **options)
        assert len(loaded) == n, options
    loaded.clear()
    (run / "steps" / f"{step}.json").unlink()
    runner.execute(experiment, run, "srlm run", only=step)
    assert len(loaded) == 1


@pytest.mark.parametrize(
    "sets,says",
    [
        ({"judge": {"rubric": "shrot"}}, "05_judge: rubric = 'shrot': no such template"),
        ({"evaluate": {"rubric": "shrot"}}, "08_evaluate: rubric = 'shrot': no such template"),
        ({"dpo": {"select_steps": 2, "select_rubric": "shrot"}}, "07_dpo: select_rubric = 'shrot': no such template"),
        ({"evaluate": {"win_judges": ["gpt-4:api"]}}, "OPENAI_API_KEY is not set"),
        ({"dpo": {"select_steps": 2, "select_judge": "gpt-4:api"}}, "OPENAI_API_KEY is not set"),
        ({"evaluate": {"win_judges": ["no/votes.jsonl:human"]}}, r"win_judges: .*no/votes\.jsonl: no such file"),
        ({"evaluate": {"safety_file": "./none.jsonl"}}, r"safety_file: .*none\.jsonl: no such file"),
        ({"evaluate": {"win_judges": ["./models/none:score"]}}, r"win_judges: \./models/none: no such folder"),
        ({"dpo": {"select_steps": 2, "select_judge": "./none:pairwise"}}, r"select_judge: \./none: no such folder"),
        ({"judge": {"judge_model": "./models/none"}}, r"judge_model: \./models/none: no such folder"),
    ],
)
def test_what_a_late_step_names_and_is_not_there_stops_a_run_before_its_first(tmp_path, monkeypatch, sets, says):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(runner, "load_seeds", lambda params: None)
    ran = []
    monkeypatch.setattr(runner, "_run_notebook", lambda step, *_: ran.append(step.name) or pytest.fail("it ran"))
    with pytest.raises(SrlmError, match=says):
        runner.execute(Experiment(sets), tmp_path / "run", "srlm run")
    assert not ran and not (tmp_path / "run/params.yaml").exists()
    with pytest.raises(pytest.fail.Exception):  # a step that is not asked for needs none of it
        runner.execute(Experiment(sets), tmp_path / "run", "srlm run", only="01_seed_data@run")
    assert ran == ["01_seed_data@run"]


def test_a_missing_upstream_file_names_the_step_that_makes_it():
    result = cli("run", "params/smoke.yaml", "--only", "05_judge@M1", "--run-name", "test-upstream")
    shutil.rmtree(ROOT / "results/test-upstream", ignore_errors=True)
    assert result.returncode == 2
    assert re.search(r"is missing: run (02_sft|04_self_instruct)@M1 first", result.stderr), result.stderr


def test_a_seed_model_without_tokenizer_stops_the_run(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    result = cli("run", "params/smoke.yaml", "--set", f"common.seed_model={folder}", "--run-name", "test-no-tok")
    shutil.rmtree(ROOT / "results/test-no-tok", ignore_errors=True)
    assert result.returncode == 2
    assert "no tokenizer_config.json" in result.stderr


def test_what_goes_on_with_one_step_names_that_step(monkeypatch):
    from srlm_utils import cli, runner

    told = []
    monkeypatch.setattr(runner, "execute", lambda experiment, run, command, **options: told.append(command))
    words = ["run", "params/smoke.yaml", "--run-name", "test-one", "--only", "05_judge@M1"]
    assert cli.main(words) == 0 and told == [" ".join(["srlm", *words])]


@pytest.mark.parametrize("on_path,program", [("/bin/srlm", "srlm"), (None, ".venv/bin/srlm")])
def test_the_command_that_goes_on_is_one_that_this_shell_finds(monkeypatch, on_path, program):
    from srlm_utils import cli

    told = []
    monkeypatch.setattr(runner, "execute", lambda experiment, run, command, **options: told.append(command))
    monkeypatch.setattr(cli.shutil, "which", lambda name: on_path)
    monkeypatch.setattr(sys, "argv", [".venv/bin/srlm"])
    assert cli.main(["run", "params/smoke.yaml"]) == 0 and told == [f"{program} run params/smoke.yaml"]


def test_two_runs_of_one_folder(smoke):
    from filelock import FileLock

    with FileLock(smoke / ".run.lock"):
        result = srlm("run", "params/smoke.yaml", "--run-name", smoke.name)
    assert result.returncode == 2 and "another process" in result.stderr


def test_positives_only_variant_trains_on_positives():
    from srlm_utils.plan import list_steps

    e = Experiment.load([Path(ROOT / "params/smoke.yaml"), Path(ROOT / "params/variants/positives.yaml")])
    steps = {s.name: s for s in list_steps(e)}
    assert "07_dpo@M2" not in steps
    compared = "seed/valid_prompts.jsonl", "M0/model.json"  # the checkpoints' answers, and their judge
    assert steps["02_sft@M2"].reads == ("M1/model", "seed/ift.jsonl", "M1/aift/positives.jsonl", *compared)
    assert "M1/aift/positives.jsonl" in steps["06_build_pairs@M1"].writes


@pytest.mark.slow
def test_steps_without_a_model_run_in_a_copy_of_the_example():
    """The README's try-out in a minute."""
    run = ROOT / "results" / "test-margin"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(ROOT / "results" / "example", run)
    how = ("run", "params/quickstart.yaml", "--run-name", run.name, "--set", "build_pairs.min_margin=1.5", "--only")
    try:
        before = read_jsonl(run / "M1/aift/pairs.jsonl")
        for step in ("06_build_pairs@M1", "09_report@run"):
            result = cli(*how, step)
            assert result.returncode == 0, result.stdout + result.stderr
        after = read_jsonl(run / "M1/aift/pairs.jsonl")
        assert 0 < len(after) < len(before) and all(p in before for p in after)
        assert read_json(run / "steps/06_build_pairs@M1.json")["params"]["min_margin"] == 1.5
        assert ">NaN<" not in (run / "report/report.html").read_text()
    finally:
        shutil.rmtree(run, ignore_errors=True)
