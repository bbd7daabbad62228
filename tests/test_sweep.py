"""Sweeps: what cells share is made once, what they leave is enough to compare them, and the comparison finds what was
planted."""

import hashlib
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from srlm_utils import cells, metrics, sweep, sweep_report
from srlm_utils.artefacts import describe, read_jsonl, write_json, write_jsonl, write_text
from srlm_utils.errors import DataError, Interrupted, ParamError, StepFailed
from srlm_utils.params import Experiment
from srlm_utils.paths import EXAMPLE
from srlm_utils.plan import external_inputs, fingerprint, list_steps, plan, status
from srlm_utils.report import COLUMNS
from tests.conftest import ROOT, cli

SMOKE = ROOT / "params/smoke.yaml"
SHARED = {"01_seed_data@run", "02_sft@SFT", "03_build_eft@SFT", "02_sft@M1", "04_self_instruct@M1", "05_judge@M1"}
SHARED |= {f"08_evaluate@{m}" for m in ("M0", "SFT", "M1")}

# ---- a runner that makes small files instead of models, each from nothing but its parameters and inputs


def fake_step(step, params, run):
    now = fingerprint(step, params, run)
    mark = hashlib.sha256(json.dumps([step.name, now], sort_keys=True).encode()).hexdigest()[:12]
    prompts = [{"prompt_id": f"t{i}", "prompt": f"Question {i}?"} for i in range(4)]
    replies = [{"reply_id": f"r{k}", "text": "x" * k, "rank": k} for k in range(2)]
    for name in step.writes:
        path = run / name
        if name.endswith("/model"):
            shutil.rmtree(path, ignore_errors=True)
            write_text(path / "model.safetensors", mark)
        elif name == "report":
            write_text(path / "metrics.csv", ",".join(COLUMNS) + "\n")
        elif name == "seed/test_prompts.jsonl":
            write_jsonl(path, prompts)
        elif name == "seed/ranked_eval.jsonl":
            write_jsonl(path, [{"prompt_id": "r", "prompt": "R?", "set": "exam", "replies": replies}])
        elif name.endswith("eval/answers.jsonl"):
            made = {"text": f"{step.model} says {mark}", "n_tokens": 3, "ended": True}
            write_jsonl(path, [p | made for p in prompts])
        elif name.endswith("eval/answer_scores.jsonl"):
            row = {"judge": "M1", "judge_rev": now["inputs"]["M1/model"][:12], "score": int(mark, 16) / 16**12}
            write_jsonl(path, [row | {"prompt_id": p["prompt_id"]} for p in prompts])
        elif name.endswith("eval/judgements.jsonl"):
            write_jsonl(path, [{"id": f"r/r{k}", "judge_mode": "expected", "score": float(k)} for k in range(2)])
        elif "/verdicts/" in name:
            a, b = path.stem.split("_vs_")
            row = {"model_a": a, "model_b": b, "judge": "M1", "judge_mode": "score", "order": "none", "p_first": 1.0}
            write_jsonl(path, [row | {"prompt_id": p["prompt_id"]} for p in prompts])
        else:
            write_text(path, json.dumps({"mark": mark}) + "\n")
    inputs = {p: describe(run / p) for p in step.reads}
    inputs |= {n: describe(p) for n, p in external_inputs(params).items()}
    manifest = {"step": step.name, "params": params, "inputs": inputs, "git": "abc", "seconds": 6.0}
    write_json(run / "steps" / f"{step.name}.json", manifest | {"outputs": {p: describe(run / p) for p in step.writes}})


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Steps that were made, as (cell, step), of ``made.run(variants, seeds)``; ``made.fails`` has cells that cannot."""

    class Made(list):
        fails: dict = {}
        reports: list = []

        def execute(self, experiment, run, command):
            if error := self.fails.get(run.name):
                raise error
            write_text(run / "params.yaml", json.dumps(experiment.tree))
            for step in list_steps(experiment):
                params = experiment.flat(step.stage, step.model, str(run))
                if not status(step, params, run)[0]:
                    fake_step(step, params, run)
                    self.append((run.name, step.name))

        def run(self, variants, n_seeds, sets=()):
            self.clear()
            self.reports = []
            base = Experiment.load([SMOKE], sets)
            return sweep.run(base, variants, n_seeds, "x", "srlm sweep")

        def report(self, folder):
            self.reports.append(sorted(p.name for p in folder.iterdir()))
            return folder / "report.html"

    made = Made()
    monkeypatch.setattr(sweep, "RESULTS", tmp_path)
    monkeypatch.setattr(sweep.runner, "execute", made.execute)
    monkeypatch.setattr(sweep.sweep_report, "write", made.report)
    return made


def test_what_cells_share_is_made_once_a_seed(made, tmp_path, capsys):
    assert made.run(["default", "random_pairs"], 2) == []
    steps = {s.name for s in list_steps(Experiment.load([SMOKE]))}
    by_cell = {c: {s for cell, s in made if cell == c} for c in ("default-0", "random_pairs-0", "default-1")}
    assert by_cell["default-0"] == by_cell["default-1"] == steps  # another seed shares nothing
    assert by_cell["random_pairs-0"] == steps - SHARED
    assert len(made) == len({*made}) == 2 * (2 * len(steps) - len(SHARED))
    assert [len(cells) for cells in made.reports] == [1, 2, 3, 4] and made.reports[0] == ["default-0"]
    made.run(["default"], 1)
    assert made == [] and [len(cells) for cells in made.reports] == [4]
    one, other = (tmp_path / f"sweep-x/{c}/M1/model/model.safetensors" for c in ("default-0", "random_pairs-0"))
    assert one.samefile(other)
    assert not (tmp_path / "sweep-x/default-0/M2/model").samefile(tmp_path / "sweep-x/random_pairs-0/M2/model")
    out = capsys.readouterr().out
    assert "cell 2/4: random_pairs, seed 0 · about" in out and "taken over from other cells: 01_seed_data@run" in out


def test_a_step_of_other_parameters_or_inputs_is_made_again(made):
    made.run(["default"], 1)
    made.run(["default", "without_eft"], 1)
    own = {s for c, s in made if c == "without_eft-0"}
    assert "02_sft@M1" in own and "05_judge@M1" in own and "08_evaluate@M0" in own  # M1, which judges, is another
    assert not own & {"01_seed_data@run", "02_sft@SFT"}


def test_what_was_changed_by_hand_is_not_taken_over(made, tmp_path):
    made.run(["default"], 1)
    write_text(tmp_path / "sweep-x/default-0/SFT/model/model.safetensors", "edited")
    made.run(["default", "random_pairs"], 1)
    assert ("random_pairs-0", "02_sft@SFT") in made and ("random_pairs-0", "01_seed_data@run") not in made


def test_a_later_command_adds_cells_and_finds_those_of_the_first(made, tmp_path):
    made.run(["default"], 2)
    made.run(["longer_wins"], 1)
    assert {c for c, _ in made} == {"longer_wins-0"} and not {s for _, s in made} & SHARED
    assert {c.variant for c in cells.read_all(tmp_path / "sweeps/x")} == {"default", "longer_wins"}


def test_the_same_command_resumes_on_another_machine(made, tmp_path, capsys):
    made.fails = {"random_pairs-0": StepFailed("07_dpo@M2 failed"), "random_pairs-1": DataError("a bad row")}
    assert made.run(["default", "random_pairs"], 2) == ["random_pairs-0", "random_pairs-1"]
    assert {c for c, _ in made} == {"default-0", "default-1"}  # the rest went on
    assert "random_pairs-0 failed: StepFailed: 07_dpo@M2 failed" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "sweep-x")  # git carries the results alone
    made.fails = {}
    assert made.run(["default", "random_pairs"], 2) == []
    assert {c for c, _ in made} == {"random_pairs-0", "random_pairs-1"}
    assert "4 cells, 2 of them done before" in capsys.readouterr().out
    assert made.run(["default", "random_pairs"], 2) == [] and not made


def test_an_error_is_said_without_secrets(made, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghij")
    made.fails = {"default-0": StepFailed("hf_abcdefghij is refused\x1b[2J")}
    assert made.run(["default"], 1) == ["default-0"]
    assert "failed: StepFailed: [HF_TOKEN] is refused␛[2J\n" in capsys.readouterr().out


def test_a_report_that_cannot_be_written_fails_no_cell(made, tmp_path, monkeypatch, capsys):
    def report(folder):
        raise DataError("blind_reading.csv: row 2 has no reader")

    monkeypatch.setattr(sweep.sweep_report, "write", report)
    assert made.run(["default", "random_pairs"], 1) == []
    out = capsys.readouterr().out
    assert out.count("  report: not written (DataError: blind_reading.csv: row 2 has no reader)\n") == 2
    assert " · about " in out and "failed" not in out  # the cell counts


def test_an_interrupted_sweep_stops(made):
    made.fails = {"default-0": Interrupted("stopped")}
    with pytest.raises(Interrupted):
        made.run(["default", "random_pairs"], 1)
    assert not made


def test_results_of_other_parameters_are_not_overwritten(made):
    made.run(["default"], 1)
    with pytest.raises(ParamError, match=r"default-0 was made with other parameters \(dpo.beta: None there, 0.3 now\)"):
        made.run(["default"], 1, ["dpo.beta=0.3"])


def test_a_base_of_other_parameters_is_refused_for_variants_not_asked_for_again(made, tmp_path):
    made.run(["default"], 1)
    kept = tmp_path / "sweeps/x"
    with pytest.raises(ParamError, match=r"default-0 was made with other parameters \(dpo.beta: None there, 0.3 now\)"):
        made.run(["random_pairs"], 1, ["dpo.beta=0.3"])
    assert not made
    (kept / "default-0").rename(kept / "gone-0")  # an overlay that is no more
    assert made.run(["random_pairs"], 1, ["dpo.beta=0.3"]) == [] and made


def test_an_empty_section_changes_no_cell(made, tmp_path):
    made.run(["default"], 1)
    experiment = sweep.experiments(Experiment.load([SMOKE]), ["default"], 1)["default", 0]
    more = Experiment(experiment.tree | {"report": {}})
    assert sweep.is_done(tmp_path / "sweeps/x/default-0", more)


def test_where_models_run_changes_no_cell(made, tmp_path):
    node1, node2 = (["judge.tensor_parallel_size=2", f"common.server_urls=[http://node{i}:8000/v1]"] for i in (1, 2))
    made.run(["default"], 1, node1)
    kept = tmp_path / "sweeps/x/default-0/params.yaml"
    assert "server_urls" not in kept.read_text() and "tensor_parallel_size" not in kept.read_text()
    made.run(["default"], 1, node2)
    assert not made
    of_node1 = sweep.experiments(Experiment.load([SMOKE], node1), ["default"], 1)["default", 0].tree
    write_text(kept, yaml.safe_dump(of_node1))  # as an earlier kit left it
    made.run(["default"], 1, node2)
    assert not made
    shown = sweep_report.differences([planted("default", 1, params=of_node1), planted("other", 1)])
    assert not [name for name in shown.index if "server_urls" in name]


def test_the_seed_is_read_once_for_cells_that_share_it(made, monkeypatch):
    loaded = []
    monkeypatch.setattr(sweep, "load_seeds", loaded.append)
    assert made.run(["default", "random_pairs"], 2) == [] and len(loaded) == 1
    assert made.run(["default", "random_pairs"], 2) == [] and len(loaded) == 1  # nor where all is done


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminated"])
def test_a_sweep_that_is_told_to_end_says_how_to_go_on(monkeypatch, number):
    def told(*_, **__):
        signal.raise_signal(number)  # between two steps: no notebook hears it

    monkeypatch.setattr(sweep, "run", told)
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # a shell's background job hears none
        pytest.skip("Ctrl-C is ignored here")
    words = ["params/smoke.yaml", "--set", "dpo.beta=0.2", "--variants", "default", "--seeds", "2", "--name", "x"]
    result = cli("sweep", *words)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == f"  continue with: srlm sweep {' '.join(words)}"


@pytest.mark.parametrize("variants,n,message", [(["nope"], 1, "no such overlay"), (["default"] * 2, 1, "differ")])
def test_bad_sweeps(made, variants, n, message):
    with pytest.raises(ParamError, match=message):
        made.run(variants, n)
    assert not made


def test_the_command_line_refuses_before_anything_runs():
    for args in (["--variants", "nope"], ["--variants", "default", "--name", "../x"]):
        result = cli("sweep", "params/smoke.yaml", *args)
        assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1, result.stderr


# ---- what a cell holds


def test_a_cell_comes_back_as_it_was_and_with_the_same_bytes(tmp_path):
    cell = cells.from_run(EXAMPLE)
    for name in ("a", "b"):
        cells.write(cell, tmp_path / name / "default-0")
    (again,) = cells.read_all(tmp_path / "a")
    assert again.answers == cell.answers and again.verdicts == cell.verdicts and again.metrics.equals(cell.metrics)
    sizes = 0
    for path in (tmp_path / "a/default-0").iterdir():
        assert path.read_bytes() == (tmp_path / "b/default-0" / path.name).read_bytes()
        sizes += path.stat().st_size
    assert sizes < cells.MAX_BYTES


def test_agreement_rows_give_the_runs_own_figure():
    cell = cells.from_run(EXAMPLE)
    own = cell.metrics.query("metric == 'agreement_gain' and model == 'M3' and opponent == 'M1'")
    found = sweep_report.measured(cell, "M3", cell, "M1")
    assert len(own) == 2
    for row in own.to_dict("records"):
        values = found["agreement_gain", row["set"], "", row["judge_mode"]].values()
        assert sum(c for c, _ in values) / sum(n for _, n in values) == pytest.approx(row["value"])


def test_the_rankings_of_one_prompt_are_one_row_of_a_cell():
    replies = [{"reply_id": str(i), "text": "x", "rank": i} for i in range(2)]
    ranked = [{"prompt_id": f"p{k}", "prompt": "P?", "set": "s", "replies": replies} for k in range(3)]
    scores = {"p0": (4, 2), "p1": (2, 4), "p2": (3, 3)}
    judged = [{"id": f"{p}/{i}", "judge_mode": "expected", "score": s[i]} for p, s in scores.items() for i in range(2)]
    who = {"model": "M1", "set": "s", "judge_mode": "expected", "prompt_id": "p0"}
    assert cells._agreement("M1", ranked, judged) == [who | {"credit": 1.5, "n_pairs": 3}]


def test_a_large_cell_leaves_out_answers_between_first_and_last(tmp_path, capsys):
    rng = np.random.default_rng(0)
    cell = planted("default", 0, n=64)
    for a in cell.answers:
        a["text"] = rng.bytes(1500).hex()
    cells.write(cell, tmp_path / "default-0")
    kept = {a["model"] for a in cells.read(tmp_path / "default-0").answers}
    assert {"M1", "M3"} <= kept < {"M0", "SFT", "M1", "M2", "M3"}
    assert "answers of M2, " in capsys.readouterr().out  # which nothing outside its run is compared with


# ---- comparisons of cells made by hand


def planted(variant, seed, *, n=64, wins=0.5, longer=1, ended=1.0, score=0.0, rev="m1", text="fine", params=None):
    """M3 wins `wins` of its verdicts against M1, is `longer` times as long, ends `ended` of its answers; the judge
    gives it `score` points more than a cell of score 0."""
    ids = [f"t{i:03d}" for i in range(n)]
    answers, scores, agreement = [], [], []
    for k, pid in enumerate(ids):
        for m in ("M0", "SFT", "M1", "M2", "M3"):
            said = text * 5 * (longer if m == "M3" else 1)
            said = variant[0] + said[1:]  # two variants do not say the very same
            ends = m != "M3" or k < ended * n
            answers.append(
                {"model": m, "prompt_id": pid, "prompt": f"{pid}?", "text": said, "n_tokens": 5, "ended": ends}
            )
            value = k / n + (score if m == "M3" else 0)
            scores.append({"model": m, "prompt_id": pid, "judge": "M1", "judge_rev": rev, "score": value})
            who = {"model": m, "set": "exam", "judge_mode": "expected", "prompt_id": pid}
            agreement.append(who | {"credit": float(k % 2 or m == "M3"), "n_pairs": 1})
    who = {"model_a": "M3", "model_b": "M1", "judge": "M1", "judge_mode": "score", "order": "none"}
    verdicts = [who | {"prompt_id": pid, "p_first": float(k < wins * n)} for k, pid in enumerate(ids)]
    tree = {"common": {"variant": variant, "seed": seed}} | (params or {})
    return cells.Cell(tree, {"git": "abc"}, pd.DataFrame(columns=COLUMNS), answers, scores, verdicts, agreement)


def row(table, variant, against, metric, seed=""):
    (found,) = table[
        (table.variant == variant) & (table.against == against) & (table.metric == metric) & (table.seed == seed)
    ].to_dict("records")
    return found


def test_planted_differences_are_found():
    table = sweep_report.compare(
        [
            planted("default", 0, wins=0.75, score=0.5),
            planted("random_pairs", 0, wins=0.5),
            planted("longer_wins", 0, wins=0.1, longer=2, ended=0.5),
        ]
    )
    assert row(table, "default", "default", "win_rate")["verdict"] == "better"
    assert row(table, "random_pairs", "random_pairs", "win_rate")["verdict"] == "not shown"
    assert row(table, "longer_wins", "longer_wins", "win_rate")["verdict"] == "worse"
    assert row(table, "default", "random_pairs", "win_rate")["value"] == 1
    against = row(table, "longer_wins", "default", "win_rate")
    assert (against["value"], against["verdict"], against["n"], against["n_seeds"]) == (0, "worse", 64, 1)
    length = row(table, "longer_wins", "longer_wins", "answer_chars")
    assert (length["value"], length["verdict"], length["n"]) == (pytest.approx(2), "longer", 64)
    assert row(table, "longer_wins", "default", "ended_rate")["value"] == -0.5
    assert row(table, "longer_wins", "default", "ended_rate")["verdict"] == "worse"
    gain = row(table, "default", "default", "agreement_gain")
    assert (gain["value"], gain["verdict"]) == (0.5, "better")
    assert list(dict.fromkeys(table.variant)) == ["default", "random_pairs", "longer_wins"]


def test_figures_show_the_default_against_its_control_once():
    table = sweep_report.compare([planted(v, 0) for v in ("default", "random_pairs", "replay")])
    names = ["default vs random_pairs", "replay vs default"]
    assert [*dict.fromkeys(sweep_report.drawn(table, ["win_rate"], inside=False)[1].name)] == names
    assert row(table, "random_pairs", "default", "win_rate")["value"] == 0.5  # the table has both


def test_a_table_of_figures_says_whom_a_variant_was_set_against():
    table = sweep_report.compare([planted(v, 0) for v in ("default", "random_pairs")])
    facts = sweep_report.figures_table(table, ["ended_rate"])
    assert facts.index.names == ["variant", "whom"]
    rows = [("default", "its own M1"), ("default", "M3 of random_pairs"), ("random_pairs", "its own M1")]
    assert [*facts.index] == [*rows, ("random_pairs", "M3 of default")]


def test_panels_of_variants_stand_three_in_a_row():
    table = sweep_report.compare([planted(v, 0) for v in ("default", "random_pairs")])
    names = ["instruction_strict_accuracy", "ended_rate", "repeated_4grams", "list_rate", "answer_chars"]
    fig, rows = sweep_report.drawn(table, names, inside=False)
    n = rows.panel.nunique()
    assert n > 3 and fig.axes[0].get_subplotspec().get_gridspec().ncols == 3
    assert [ax.get_visible() for ax in fig.axes] == [i < n for i in range(len(fig.axes))]
    assert fig.get_size_inches()[0] <= 11.1


def test_models_are_told_apart_by_their_weights_not_by_their_cards(tmp_path):
    found = []
    for name in ("a", "b"):
        shutil.copytree(EXAMPLE, tmp_path / name)
        write_text(tmp_path / name / "M1/model/model.safetensors", "the same")
        write_text(tmp_path / name / "M1/model/README.md", f"# M1 of {name}")
        found.append(cells.from_run(tmp_path / name).about["weights"])
    assert found[0] == found[1] and [*found[0]] == ["M1"]


def test_steps_of_a_rendered_run_are_taken_over_with_their_rows(tmp_path):
    experiment = Experiment.load([EXAMPLE / "params.yaml"])
    taken = sweep.adopt(experiment, tmp_path / "run", [EXAMPLE])
    assert taken == ["01_seed_data@run"]
    done = {step.name for step, _, is_done, _ in plan(experiment, tmp_path / "run") if is_done}
    assert done == {*taken}


def test_the_same_text_wins_against_itself_in_no_judges_eyes():
    found = [planted("default", 0), planted("random_pairs", 0, score=0.1)]
    for a in found[1].answers[: 5 * 32]:
        a["text"] = "d" + a["text"][1:]  # as the default's
    won = row(sweep_report.compare(found), "random_pairs", "default", "win_rate")
    assert (won["value"], won["n"]) == (0.75, 64)


def test_repetition_counts_against_a_variant():
    looped = planted("longer_wins", 0, text="the same four words again ")
    for a in looped.answers:
        a["text"] = "a b c d e f" if a["model"] != "M3" else a["text"]
    assert row(sweep_report.compare([looped]), "longer_wins", "longer_wins", "repeated_4grams")["verdict"] == "worse"


def test_lists_are_counted_and_not_called_better_or_worse():
    listed = planted("longer_wins", 0)
    for a in listed.answers:
        a["text"] = "- a\n- b" if a["model"] == "M3" else a["text"]
    found = row(sweep_report.compare([listed]), "longer_wins", "longer_wins", "list_rate")
    assert (found["value"], found["verdict"]) == (1.0, "more")
    assert found["low"] == found["high"] == 1  # a difference is no share, which would have a bound here


def test_seeds_are_a_sample_too():
    apart = [planted("default", s, wins=w) for s, w in ((0, 0.9), (1, 0.45), (2, 0.75))]
    table = sweep_report.compare(apart)
    whole = row(table, "default", "default", "win_rate")
    assert whole["value"] == pytest.approx(0.7, abs=0.01) and whole["n_seeds"] == 3 and whole["n"] == 3 * 64
    assert whole["verdict"] == "not shown" and whole["low"] < 0.4  # one lucky seed is no finding
    assert [row(table, "default", "default", "win_rate", str(s))["verdict"] for s in range(3)][0] == "better"
    alike = sweep_report.compare([planted("default", s, wins=0.7) for s in range(3)])
    assert row(alike, "default", "default", "win_rate")["verdict"] == "better"


@pytest.mark.parametrize(
    "n_seeds,n_prompts,seed_sd", [(3, 64, 0.0), (3, 64, 0.08), (3, 256, 0.05), (2, 64, 0.05), (2, 256, 0.08)]
)
def test_intervals_over_prompts_and_seeds_cover(n_seeds, n_prompts, seed_sd):
    """Win rates of 0.6 whose prompts favour one side in all seeds, and whose seeds differ."""
    rng, hits, wide = np.random.default_rng(0), [], []
    for _ in range(2000):
        p = 0.6 + rng.normal(0, seed_sd, (n_seeds, 1)) + rng.uniform(-0.25, 0.25, (1, n_prompts))
        y = (rng.random((n_seeds, n_prompts)) < p).astype(float)
        f = metrics.ratio_over_seeds(y, np.ones_like(y))
        hits.append(f["low"] <= 0.6 <= f["high"])
        wide.append(f["high"] - f["low"])
    assert np.mean(hits) >= 0.93, np.mean(hits)
    if seed_sd == 0 and n_seeds == 3:
        assert np.mean(wide) < 0.27  # one seed alone has 0.24


def test_without_a_judge_of_the_same_weights_nobody_says_who_wins():
    found = [planted("default", 0, rev="one"), planted("longer_wins", 0, rev="another", score=1)]
    table = sweep_report.compare(found)
    assert not len(table[(table.against != table.variant) & (table.metric == "win_rate")])
    said = sweep_report.verdicts_table(table)
    assert said[said.compared.str.contains("of default")].verdict.tolist() == ["nobody to say"]


def test_a_variant_has_a_control_of_its_own_or_the_default():
    found = [planted(name, 0) for name in ("default", "meta_judge", "written_judge")]

    def against(cells):
        table = sweep_report.compare(cells)
        return {*table[(table.variant == "meta_judge") & (table.against != "meta_judge")].against}

    assert against(found) == {"written_judge"} and against(found[:2]) == {"default"}


def test_other_prompts_under_the_same_id_are_no_pair():
    one, other = planted("default", 0), planted("longer_wins", 0)
    for a in other.answers[: 5 * 32]:
        a["prompt"] = "another"
    for r in other.agreement[: 5 * 16]:  # and a ranked prompt of other rankings
        r["n_pairs"] = 2
    table = sweep_report.compare([one, other])
    for metric, n in (("ended_rate", 32), ("win_rate", 32), ("agreement_gain", 48)):
        assert row(table, "longer_wins", "default", metric)["n"] == n


def test_a_seed_is_set_against_its_control_of_the_same_seed():
    """Seeds differ by more than variants do; the third has no control yet, as in a sweep that still runs."""
    found = [planted("default", s, score=float(s)) for s in (0, 1)]
    table = sweep_report.compare([*found, *(planted("longer_wins", s, score=0.5) for s in (0, 1, 2))])
    won = {s: row(table, "longer_wins", "default", "win_rate", s) for s in ("0", "1", "")}
    assert [won[s]["value"] for s in ("0", "1", "")] == [1, 0, 0.5] and won[""]["n_seeds"] == 2
    assert row(table, "longer_wins", "longer_wins", "win_rate")["n_seeds"] == 3


def test_a_run_of_one_iteration_is_not_set_against_itself():
    one = planted("default", 0, params={"common": {"variant": "default", "seed": 0, "iterations": 1}})
    assert one.last == "M1" and sweep_report.compare([one]).empty
    assert {*sweep_report.ladder([one]).opponent} == {"M0", "SFT"}


def test_an_answer_to_an_empty_one_counts_in_the_length():
    cell = planted("default", 0, longer=2)
    next(a for a in cell.answers if a["model"] == "M1")["text"] = ""
    length = row(sweep_report.compare([cell]), "default", "default", "answer_chars")
    assert length["value"] == pytest.approx(2 * 64 / 63) and length["n"] == 64


def test_a_comparison_is_replaced_whole(tmp_path, monkeypatch):
    cells.write(planted("default", 0, n=4), tmp_path / "default-0")
    path = tmp_path / "comparison.csv"
    path.write_text("the old one")
    for name in ("compare", "ladder"):
        monkeypatch.setattr(sweep_report, name, lambda found: pd.DataFrame({"variant": ["a", "b"]}))
    monkeypatch.setattr(sweep_report, "verdicts_table", lambda table: 1 / 0)  # figures are another matter
    with open(path) as reader:  # nor does a kill leave half of it
        with pytest.raises(ZeroDivisionError):
            sweep_report.write(tmp_path)
        assert reader.read() == "the old one"
    assert path.read_text() == "variant\na\nb\n"


def test_the_report_is_one_escaped_file(tmp_path):
    evil = "<script>alert(1)</script><img src=x>"
    for cell in (
        *(planted("default", s, text=evil, params={"dpo": {"beta": 0.1}}) for s in (0, 1)),
        planted("longer_wins", 0, params={"dpo": {"beta": 0.1}, "build_pairs": {"pair_rule": evil}}),
    ):
        cells.write(cell, tmp_path / f"{cell.variant}-{cell.seed}")
    html = sweep_report.write(tmp_path).read_text()
    assert "<script" not in html and "src=x" not in html.replace("&lt;img src=x&gt;", "")
    assert "over prompts only (one seed)" in html and "over prompts and 2 seeds" in html
    assert "build_pairs.pair_rule" in html and "dpo.beta" not in html and "Candidates and the pair" not in html
    table = pd.read_csv(tmp_path / "comparison.csv", keep_default_na=False, na_values={"value": ""})
    assert list(table.columns) == sweep_report.COLUMNS
    figures = {p.name for p in (tmp_path / "figures").iterdir()}
    assert {"win_rates_m1.png", "win_rates_m1.csv", "answers_control.png", "agreement_m1.png"} <= figures
    assert len(cells.read_all(tmp_path)) == 3  # what the report left is no cell


def test_instructions_a_program_can_verify_travel_with_the_answers():
    cell = planted("default", 0, n=8)
    for k, a in enumerate(cell.answers):
        a |= {"n_instructions": 2, "n_followed": 2 if a["model"] == "M3" else k % 2}
    found = row(sweep_report.compare([cell]), "default", "default", "instruction_strict_accuracy")
    assert found["verdict"] == "better" and found["n"] == 16


@pytest.mark.parametrize(
    "file,content,message",
    [
        ("params.yaml", "common: [1", "cannot be read"),
        ("params.yaml", "common: {seed: many}", "common.seed is 'many'"),
        ("params.yaml", "- 1", "expected sections"),
        ("params.yaml", "common: {variant: other, seed: 0}", "is of other, seed 0"),
        ("cell.json", "[]", "expected an object"),
        ("metrics.csv", "a,b\n1,2\n", "found columns a, b"),
        ("metrics.csv", "", "not a table"),
        ("answers.jsonl.gz", "no gzip", "cannot be unpacked"),
        ("verdicts.jsonl.gz", None, "no verdicts.jsonl.gz"),
    ],
)
def test_damaged_cells_say_what_is_wrong(tmp_path, file, content, message):
    cells.write(planted("default", 0, n=2), tmp_path / "default-0")
    path = tmp_path / "default-0" / file
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(DataError, match=message):
        cells.read_all(tmp_path)


@pytest.mark.parametrize(
    "name,change",
    [
        ("verdicts", {"p_first": 7}),
        ("answers", {"text": None}),
        ("scores", {"score": "high"}),
        ("agreement", {"n_pairs": 0}),
    ],
)
def test_bad_rows_are_named(tmp_path, name, change):
    cells.write(planted("default", 0, n=2), tmp_path / "default-0")
    path = tmp_path / "default-0" / f"{name}.jsonl.gz"
    rows = read_jsonl(path)
    rows[1] |= change
    write_jsonl(path, rows)
    with pytest.raises(DataError, match=f"row 2: {next(iter(change))}"):
        cells.read_all(tmp_path)


def test_a_folder_without_cells_is_no_sweep(tmp_path):
    with pytest.raises(DataError, match="no finished cell"):
        cells.read_all(tmp_path)


def test_what_a_killed_write_left_is_no_cell(tmp_path):
    cells.write(planted("default", 0, n=2), tmp_path / "default-0")
    write_text(tmp_path / ".default-1.tmp/params.yaml", "common: {seed: 1}")
    assert [c.seed for c in cells.read_all(tmp_path)] == [0]


@pytest.mark.slow
@pytest.mark.long
def test_a_real_sweep_of_two_variants():
    name = "test-sweep"
    folders = [ROOT / f"results/sweep-{name}", ROOT / f"results/sweeps/{name}"]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    sets = ["--set", "common.iterations=2"]
    args = ["sweep", str(Path("params/smoke.yaml")), *sets, "--variants", "default,random_pairs", "--name", name]
    try:
        result = cli(*args)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "taken over from other cells: 01_seed_data@run, 02_sft@SFT" in result.stdout
        one, other = cells.read_all(folders[1])
        assert one.about["weights"]["M1"] == other.about["weights"]["M1"]
        assert one.about["weights"]["M2"] != other.about["weights"]["M2"]
        table = sweep_report.compare([one, other])
        assert {"M1"} == {*table[(table.variant != table.against) & (table.metric == "win_rate")].judge}
        assert (folders[1] / "report.html").is_file()
        assert "2 of them done before" in cli(*args).stdout
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("n,verdict", [(3, "not shown"), (12, "worse")])
def test_a_handful_of_prompts_shows_nothing(n, verdict):
    more = [0.02, 0.4, 0.1] * (n // 3)
    side = {("repeated_4grams", "test_prompts", "", ""): {f"p{i}": (d, 1.0) for i, d in enumerate(more)}}
    (row,) = sweep_report._rows({0: side})
    assert row["verdict"] == verdict and row["low"] > 0


def test_each_round_is_set_against_the_one_before(tmp_path):
    cell = planted("default", 0)
    who = {"judge": "M1", "judge_mode": "score", "order": "none"}
    for a, b, wins in (("M2", "M1", 0.8), ("M3", "M2", 0.5), ("M3", "M0", 0.9), ("M3", "SFT", 0.1), ("M2", "M0", 0.9)):
        cell.verdicts.extend(
            who | {"model_a": a, "model_b": b, "prompt_id": f"t{k:03d}", "p_first": float(k < wins * 64)}
            for k in range(64)
        )
    table = sweep_report.ladder([cell])
    won = table[table.metric == "win_rate"]
    assert [*zip(won.model, won.opponent, won.verdict, strict=True)] == [
        ("M2", "M1", "better"),
        ("M3", "M2", "not shown"),
        ("M3", "M0", "better"),
        ("M3", "SFT", "worse"),
    ]
    cells.write(cell, tmp_path / "default-0")
    assert "M2 with its own M1" in sweep_report.write(tmp_path).read_text()
    kept = pd.read_csv(tmp_path / "comparison.csv", keep_default_na=False)
    assert len(kept[(kept.metric == "win_rate")]) == 5  # and M3 against M1
    cell.answers[:] = [a for a in cell.answers if a["model"] in ("M1", "M3")]  # as `cells.write` leaves a large one
    again = sweep_report.ladder([cell])
    assert [*again[again.metric == "win_rate"].verdict] == [*won.verdict]


def test_what_stands_in_two_tables_of_the_report_is_one_row_of_its_file(tmp_path):
    """Of a run of one round M2 against M1 is both the whole loop and its only round."""
    cell = planted("default", 0, params={"common": {"variant": "default", "seed": 0, "iterations": 2}})
    cell.answers[:] = [a for a in cell.answers if a["model"] != "M3"]
    cell.verdicts[:] = [v | {"model_a": "M2"} for v in cell.verdicts]
    cells.write(cell, tmp_path / "default-0")
    sweep_report.write(tmp_path)
    kept = pd.read_csv(tmp_path / "comparison.csv", keep_default_na=False)
    won = kept[kept.metric == "win_rate"]
    assert [*zip(won.model, won.opponent, strict=True)] == [("M2", "M1")]
    for table in (sweep_report.compare([cell]), sweep_report.ladder([cell])):
        assert [*table[table.metric == "win_rate"].model] == ["M2"]
