"""Runs side by side: known differences come out as they were put in, and what cannot be paired is said so."""

import re
import shutil

import numpy as np
import pandas as pd
import pytest

from srlm_utils import compare, metrics
from srlm_utils.artefacts import read_json, read_jsonl, write_json, write_jsonl
from srlm_utils.errors import DataError, MissingInputError
from srlm_utils.paths import EXAMPLE
from srlm_utils.report import COLUMNS
from tests.conftest import cli
from tests.test_share import Links


def edit(path, change) -> None:
    """Rewrite a JSON Lines file, row by row."""
    rows = read_jsonl(path)
    for i, row in enumerate(rows):
        change(i, row)
    write_jsonl(path, rows)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """results/example with known differences: longer answers of M3, another judge of M2, other rows, another beta."""
    run = tmp_path_factory.mktemp("runs") / "beta03"
    shutil.copytree(EXAMPLE, run, ignore=shutil.ignore_patterns("share", "notebooks"))
    edit(run / "M3/eval/answers.jsonl", lambda i, row: row.update(text=row["text"] + "!" * (10 if i % 2 else 30)))
    edit(run / "M2/eval/answer_scores.jsonl", lambda i, row: row.update(judge_rev="another"))
    edit(run / "M1/eval/answers.jsonl", lambda i, row: row.update(ended=True))
    edit(run / "M2/eval/answers.jsonl", lambda i, row: row.update(text="X" + row["text"][1:]))
    table = pd.read_csv(run / "report/metrics.csv", keep_default_na=False, na_values={"value": [""]})
    table.loc[(table.metric == "answer_chars") & (table.model == "M3"), "value"] += 20
    table.to_csv(run / "report/metrics.csv", index=False)
    edit(run / "seed/ranked_eval.jsonl", lambda i, row: row.update(prompt="x") if row["set"] == "ranked_eval" else None)
    manifest = read_json(run / "steps/07_dpo@M2.json")
    manifest["params"] |= {"beta": 0.3}
    write_json(run / "steps/07_dpo@M2.json", manifest)
    for path in (run / "steps").glob("02_sft@*.json"):
        manifest = read_json(path)
        manifest["params"] |= {"weight_decay": 0.5}
        write_json(path, manifest)
    return run


@pytest.fixture(scope="module")
def pages(copy, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared") / "pages"
    compare.compare([EXAMPLE, copy], out)
    return out


def row(table, metric, model, **where):
    for column, value in {"metric": metric, "model": model, **where}.items():
        table = table[table[column] == value]
    assert len(table) == 1
    return table.iloc[0]


def test_known_differences_come_out(pages):
    table = pd.read_csv(pages / "differences.csv", keep_default_na=False, na_values={c: [""] for c in ("low", "high")})
    longer = row(table, "answer_chars", "M3")
    assert longer.paired == "yes" and longer.n == "64" and longer.difference == pytest.approx(20)
    # half of the 64 prompts by 10, half by 30: resampled, the mean moves by 10 / sqrt(64)
    assert longer.high - longer.low == pytest.approx(2 * 1.96 * 10 / 8, rel=0.1)
    same = row(table, "answer_chars", "M0")
    assert (same.difference, same.low, same.high) == (0, 0, 0)
    assert row(table, "mean_score", "M2", judge="M1").paired == "not the same judge"
    assert row(table, "ended_rate", "M1").paired == "rows and metrics.csv disagree"
    assert row(table, "win_rate", "M3", opponent="M2", judge="M1").paired == "not the same opponent's answers"
    assert row(table, "win_rate", "M3", opponent="M0", judge="M1").paired == "yes"
    assert row(table, "pairwise_accuracy", "M1", set="ranked_eval", judge_mode="expected").paired.startswith("not the")
    assert row(table, "pairwise_accuracy", "M1", set="onpolicy_eval", judge_mode="sampled").paired == "yes"
    assert set(table[table.paired != "yes"].low.isna()) == {True}


def test_parameters_that_differ(pages):
    settings = pd.read_csv(pages / "params.csv", dtype=str).set_index("parameter")
    assert dict(settings.loc["07_dpo@M2.beta"]) == {"example": "0.1", "beta03": "0.3"}  # M3's is as it was
    assert dict(settings.loc["02_sft.weight_decay"]) == {"example": "0.0", "beta03": "0.5"}
    assert not any("run_dir" in name for name in settings.index)


def test_the_page_opens_offline(pages):
    html = (pages / "index.html").read_text()
    found = Links(html)
    assert "default-src 'none'" in html and "script" not in found.tags
    assert all(s.startswith("data:image/png") for s in found.sources) and len(found.sources) == 6
    assert all((pages / link).is_file() for link in found.links if not link.startswith("data:"))
    metrics_csv = pd.read_csv(pages / "metrics.csv")
    assert set(metrics_csv.run) == {"example", "beta03"}


def test_the_example_and_itself_do_not_differ(tmp_path):
    result = cli("compare", str(EXAMPLE), str(EXAMPLE), "--out", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    table = pd.read_csv(tmp_path / "out/differences.csv")
    assert (table.difference == 0).all() and (table.low.dropna() == 0).all()
    agreement = table[table.metric.isin(metrics.RATIOS)]
    assert {*agreement.metric} == {*metrics.RATIOS} and (agreement.paired == "yes").all()
    html = (tmp_path / "out/index.html").read_text()
    assert "n=44" in html and not re.search(r"n=\d+\.\d", html)
    assert "example (1)" in html and "None: the steps of these runs had the same parameters" in html
    again = cli("compare", str(EXAMPLE), str(EXAMPLE), "--out", str(tmp_path))
    assert again.returncode == 2 and "was not written by srlm compare" in again.stderr


def test_an_error_half_way_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_, **__):
        assert (tmp_path / ".out.tmp").is_dir()
        raise DataError("a figure that cannot be drawn")

    monkeypatch.setattr(compare, "parameters", fail)
    with pytest.raises(DataError, match="cannot be drawn"):
        compare.compare([EXAMPLE, EXAMPLE], tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_the_difference_of_two_p_values_is_no_p_value():
    row = {"metric": "sign_test", "model": "M3", "opponent": "M1", "set": "test_prompts", "judge": "M1", "run": "b"}
    row |= {"judge_mode": "score", "unit": "p", "baseline_value": 0.5, "value": 0.03, "difference": -0.47, "n": None}
    said = str(compare._shown(pd.DataFrame([row | {"low": None, "high": None, "paired": "no"}])))
    assert "-0.47" in said and "p = 0.500" in said and "p = 0.030" in said and "0.001" not in said


def test_a_ratios_difference_by_hand():
    """Two prompts: 3 of 4 and 1 of 2 pairs right, against 1 of 4 and 1 of 2. Of equally many draws each way."""
    d = metrics.ratio_difference(([3, 1], [4, 2]), ([1, 1], [4, 2]))
    assert d["value"] == pytest.approx(4 / 6 - 2 / 6)
    # the draws are (first, first), (first, second), (second, second): 2/4, 2/6, 0
    assert (d["low"], d["high"]) == (0, 0.5)
    assert metrics.ratio_difference(([1], [1]), ([0], [1])) == {"value": 1, "low": None, "high": None, "n": 1}
    parts = {f"p{i}": (0.0, float(i < 4)) for i in range(9)}  # five prompts have no pair
    figure, paired = compare._difference(compare.Rows(parts, {}), compare.Rows(parts, {}), 0.0, 0.0)
    assert (figure["n"], paired) == (4, "yes")
    assert metrics.ratio_difference(([0], [0]), ([0], [1]))["value"] is None


def test_figures_over_some_of_the_prompts_have_no_paired_interval():
    """As people's verdicts are, who have labelled more of one run than of the other."""
    few, more = (compare.Rows({f"p{i}": (1.0, 1.0) for i in range(n)}, {}) for n in (2, 3))
    for sides in ((few, more), (more, few)):
        figure, paired = compare._difference(*sides, 1.0, 1.0)
        assert (paired, figure["low"], figure["n"]) == ("not the same prompts", None, None)


def test_wins_ties_and_losses_of_two_runs_by_hand(tmp_path):
    """The first run wins one prompt, ties one, loses one; the second wins two and loses one: none of them is a tie."""
    for name, first in (("a", [1.0, 0.5, 0.0]), ("b", [1.0, 1.0, 0.0])):
        who = {"model_a": "M3", "model_b": "M1", "judge": "M1", "judge_rev": "x", "judge_mode": "score"}
        rows = [who | {"prompt_id": f"p{i}", "order": "none", "p_first": p} for i, p in enumerate(first)]
        write_jsonl(tmp_path / name / "M3/eval/verdicts/M3_vs_M1.jsonl", rows)
        write_jsonl(tmp_path / name / "M1/eval/answers.jsonl", [{"prompt_id": "p0", "prompt": "q", "text": "same"}])
    a, b = (compare._verdict_rows(tmp_path / name, "M3") for name in "ab")
    where = "test_prompts", "M1", "score", "M3", "M1"
    means = {"win_rate": (1.5 / 3, 2 / 3), "win": (1 / 3, 2 / 3), "tie": (1 / 3, 0), "loss": (1 / 3, 1 / 3)}
    for metric, values in means.items():
        for side, value in zip((a, b), values, strict=True):
            assert side[metric, *where].value == pytest.approx(value)
        figure, paired = compare._difference(a[metric, *where], b[metric, *where], *values)
        assert (figure["n"], paired) == (3, "yes") and figure["value"] == pytest.approx(values[1] - values[0])


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=200)
    a, b, ones = hard, hard + 0.1 + 0.1 * rng.normal(size=200), np.ones(200)
    paired = metrics.ratio_difference((b, ones), (a, ones))
    assert 0.07 < paired["low"] < 0.1 < paired["high"] < 0.13
    assert paired["high"] - paired["low"] < metrics.mean(a)["high"] - metrics.mean(a)["low"]


def test_hand_made_runs(tmp_path):
    """Three prompts, one model, no seed rows: b's answers are 4, 0 and 2 characters longer, c's are to others."""
    for name, prompt, texts in (
        ("a", "q", ["1", "22", "3"]),
        ("b", "q", ["11111", "22", "333"]),
        ("c", "another", ["11111", "22", "333"]),
    ):
        rows = [
            {"prompt_id": f"p{i}", "prompt": prompt, "text": t, "n_tokens": 1, "ended": True}
            for i, t in enumerate(texts)
        ]
        write_jsonl(tmp_path / name / "M1/eval/answers.jsonl", rows)
        value = sum(map(len, texts)) / 3
        where = {"model": "M1", "set": "test_prompts", "metric": "answer_chars", "unit": "characters"}
        empty = dict.fromkeys(["opponent", "judge", "judge_mode", "low", "high"], "")
        (tmp_path / name / "report").mkdir()
        made = where | empty | {"run": name, "variant": "default", "seed": 0, "value": value, "n": 3}
        pd.DataFrame([made], columns=COLUMNS).to_csv(tmp_path / name / "report/metrics.csv", index=False)
    compare.compare([tmp_path / name for name in "abc"], tmp_path / "out")
    line, other = pd.read_csv(tmp_path / "out/differences.csv").to_dict("records")
    assert line["difference"] == pytest.approx(2) and (line["low"], line["high"], line["n"]) == (0, 4, 3)
    assert (line["run"], line["baseline"], other["run"]) == ("b", "a", "c")
    assert (other["paired"], other["difference"]) == ("not the same prompts", pytest.approx(2))  # whatever their ids
    with pytest.raises(DataError, match="two runs or more"):
        compare.compare([tmp_path / "a"], tmp_path / "out")
    (tmp_path / "b/report/metrics.csv").write_text("")
    with pytest.raises(DataError, match=r"b/report/metrics\.csv: not a table of metrics"):
        compare.compare([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    (tmp_path / "b/report/metrics.csv").unlink()
    with pytest.raises(MissingInputError, match="run 09_report@run first"):
        compare.compare([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
