"""Labelling by people: blind, saved at once, resumed, and read by the evaluation as any judge's verdicts."""

import json
import re

import pandas as pd
import pytest

import srlm_utils
from srlm_utils import labelling, verdicts
from srlm_utils.artefacts import read_jsonl, write_jsonl
from srlm_utils.errors import DataError, ParamError
from srlm_utils.plots import judge_agreement

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\x1b[2J"


@pytest.fixture(scope="module")
def run():
    return srlm_utils.open_run("results/example")


@pytest.fixture
def study(run, tmp_path, monkeypatch):
    monkeypatch.setattr(labelling, "QUIET_S", 0)
    return labelling.Study(run, "M3", "SFT", tmp_path / "labels.jsonl", n_prompts=10)


def shown(page) -> list[str]:
    return re.findall(r"<pre[^>]*>(.*?)</pre>", page.pair.value, re.S)


def label(study, reader, better) -> None:
    """`reader` labels everything; `better(text_a, text_b)` gives A's result: 1, 0.5 or 0."""
    page = study.page(reader)
    while page.current:
        pid, order = page.current
        p = better(*study.items.loc[pid, ["text_a", "text_b"]])
        page.press({1: "1", 0.5: "t", 0: "2"}[p if order == "AB" else 1 - p])


def test_clicks_and_keys_become_verdicts_that_the_evaluation_reads(study, run):
    page = study.page("anna")
    given = []
    for i, key in enumerate(("1", "2", "t", "1")):
        given.append((*page.current, labelling.P_FIRST[key]))
        if i % 2:
            page.buttons[key].click()
        else:
            page.field.value = key
        assert page.field.value == "" and f"{i + 1} of 10" in page.head.value
        assert len(read_jsonl(study.path)) == i + 1  # on disk at once
    votes = verdicts.read_votes(study.path)
    assert [(v["prompt_id"], v["order"], v["p_first"]) for v in votes] == given
    assert {(v["model_a"], v["model_b"], v["judge"], v["judge_mode"]) for v in votes} == {
        ("M3", "SFT", "anna", "human")
    }
    texts = {v["prompt_id"]: study.items.loc[v["prompt_id"], ["text_a", "text_b"]] for v in votes}
    assert all(v["answers"] == verdicts.answers_digest(*texts[v["prompt_id"]]) for v in votes)  # what they are about
    model_rows = read_jsonl(run.folder / "M3/eval/verdicts/M3_vs_SFT.jsonl")
    assert set(model_rows[0]) - {"judge_rev"} <= set(votes[0])
    out = verdicts.from_votes(votes, "M3", "SFT", set(study.items.index))
    pid, order, p = given[0]
    assert {r["prompt_id"]: r["p_first"] for r in out}[pid] == (p if order == "AB" else 1 - p)


def test_the_page_is_blind_and_shows_the_order_that_it_saves(study):
    page, places = study.page("anna"), set()
    while page.current:
        pid, order = page.current
        texts = study.items.loc[pid, ["text_a", "text_b"]]
        first, second = texts if order == "AB" else texts[::-1]
        assert [re.sub(r"&#?\w+;", "", t) for t in shown(page)[1:]] == [
            re.sub(r"[&<>'\"]", "", t) for t in (first, second)
        ]
        words = page.head.value + re.sub(r"<pre.*?</pre>", "", page.pair.value, flags=re.S)
        assert not re.search(r"\bM3\b|\bSFT\b|\bAB\b|\bBA\b|test-", words)
        places.add(order)
        page.press("t")
    assert places == {"AB", "BA"} and page.buttons["1"].disabled
    page.press("1")
    assert len(study.votes()) == 10


def test_readers_get_the_same_prompts_in_orders_of_their_own_and_seeds_repeat(study, run):
    anna, bert = study.todo("anna"), study.todo("bert")
    assert {i for i, _ in anna} == {i for i, _ in bert} and anna != bert and anna == study.todo("anna")
    again = labelling.Study(run, "M1", "SFT", study.path, n_prompts=10)
    assert list(again.items.index) == list(study.items.index)  # M1, M2 and M3 against SFT on the same prompts
    assert list(labelling.Study(run, "M3", "SFT", study.path, n_prompts=10, seed=1).items.index) != list(
        study.items.index
    )


def test_a_killed_kernel_resumes_at_the_pair_it_was_at(study, run):
    page = study.page("anna")
    page.press("1"), page.press("t")
    at = page.current
    study.path.write_text(study.path.read_text() + '{"model_a": "M3", "model_b": "SF')  # the third was being written
    fresh = labelling.Study(run, "M3", "SFT", study.path, n_prompts=10).page("anna")
    assert fresh.current == at and "2 of 10" in fresh.head.value
    fresh.press("2")
    assert len(verdicts.read_votes(study.path)) == 3


def test_undo_takes_back_ones_own_last_verdict(study):
    anna, bert = study.page("anna"), study.page("bert")
    anna.press("1")
    first = study.votes()
    at = anna.current
    anna.press("2"), bert.press("t")
    anna.buttons["u"].click()
    assert (
        anna.current == at and [v["judge"] for v in study.votes()] == ["anna", "bert"] and study.votes()[0] == first[0]
    )
    anna.press("u"), anna.press("u")  # the second finds nothing
    assert [v["judge"] for v in study.votes()] == ["bert"] and "0 of 10" in anna.head.value


def test_a_key_held_down_is_one_verdict(study, monkeypatch):
    monkeypatch.setattr(labelling, "QUIET_S", 60)
    page = study.page("anna")
    for _ in range(5):
        page.field.value = "1"
    assert len(study.votes()) == 1 and "too fast" in page.head.value


def test_other_keys_and_a_field_not_yet_emptied(study):
    page = study.page("anna")
    page.field.value = "x"
    assert study.votes() == []
    page.field.value = "x1"  # typed before the x was taken out
    assert len(study.votes()) == 1


def test_a_second_page_of_one_reader_gives_no_second_verdict(study):
    one, two = study.page("anna"), study.page("anna")
    one.press("1"), two.press("2")
    assert [v["p_first"] for v in study.votes()] == [1.0]
    assert two.current == one.current  # it moved on


def test_a_file_that_an_editor_left_without_its_last_newline_keeps_all_verdicts(study):
    page = study.page("anna")
    for key in "12":
        page.press(key)
    whole = study.path.read_bytes()
    study.path.write_bytes(whole[:-1])
    assert len(study.votes()) == 2 and study.path.read_bytes() == whole
    study.path.write_bytes(whole[:-1])
    page.press("t")
    assert len(study.votes()) == 3


def test_answers_are_escaped_on_the_page(tmp_path):
    for m in ("M1", "SFT"):
        row = {"cand_id": "t-0", "prompt_id": "t", "prompt": EVIL, "text": EVIL + m, "n_tokens": 3, "ended": True}
        write_jsonl(tmp_path / "r" / m / "eval/answers.jsonl", [row])
    (tmp_path / "r/steps").mkdir()
    made = labelling.Study(srlm_utils.open_run(tmp_path / "r"), "M1", "SFT", tmp_path / "l.jsonl")
    page = made.page("<b>anna")
    html = page.head.value + page.pair.value
    assert "<script" not in html and "<img" not in html and "<b>anna" not in html and "\x1b" not in html


def test_changed_answers_are_not_mixed_up(study, run):
    study.page("anna").press("1")
    row = json.loads(study.path.read_text())
    write_jsonl(study.path, [row | {"answers": "0" * 12}])
    with pytest.raises(DataError, match="a labels file of their own"):
        labelling.Study(run, "M3", "SFT", study.path, n_prompts=10)
    write_jsonl(study.path, [row | {"p_first": 0.3}])
    with pytest.raises(DataError, match="row 1 is no verdict"):
        labelling.Study(run, "M3", "SFT", study.path, n_prompts=10)


def test_whoever_labels_has_a_name_and_two_models(study, run):
    with pytest.raises(ParamError, match="annotator"):
        study.page(" ")
    with pytest.raises(ParamError, match="two models"):
        labelling.Study(run, "M3", "M3", study.path)


def test_majority_and_agreement_with_readers_and_judges(study, run):
    label(study, "anna", lambda a, b: float(len(a) > len(b)))
    label(study, "bert", lambda a, b: float(len(a) > len(b)))
    label(study, "carl", lambda a, b: 1 - float(len(a) > len(b)))
    tally, agreement = study.tally(3), study.agreement(3)
    judge = "M1, score (inside the loop)"
    assert list(tally.index) == ["anna", "bert", "carl", labelling.MAJORITY, "outside judge", judge]
    assert (tally.n == 10).all() and tally.win[labelling.MAJORITY] == tally.win["anna"] == tally.loss["carl"]
    kappa = agreement.set_index(["first", "second"])
    assert kappa.value["anna", "bert"] == 1 and kappa.same["anna", "carl"] == 0 and kappa.value["anna", "carl"] < 0
    v = run.verdicts("M3", "SFT")
    v = v[v.judge == "M1"].set_index("prompt_id").result
    longer = study.items.text_a.str.len() > study.items.text_b.str.len()
    assert kappa.same[labelling.MAJORITY, judge] == (v[study.items.index] == longer.astype(float)).mean()
    assert (labelling.MAJORITY, "anna") not in kappa.index and len(agreement) == 3 + 2 * 3 + 2
    judge_agreement(agreement.dropna(subset="value"))  # the report's own figure takes it


def test_a_reader_without_a_name_is_one_too(study):
    label(study, "anna", lambda a, b: float(len(a) > len(b)))
    rows = [json.loads(line) for line in study.path.read_text().splitlines()]
    nobody = [{k: v for k, v in r.items() if k != "judge"} | {"order": "none"} for r in rows]
    study.path.write_text("".join(json.dumps(r) + "\n" for r in rows + nobody))
    tally, kappa = study.tally(2), study.agreement(2).set_index(["first", "second"])
    assert ("anna", "unnamed") in kappa.index and tally.first_shown.notna()["anna"]
    assert pd.isna(tally.first_shown["unnamed"])  # nothing stood first there


def test_a_reader_whom_places_sway_shows(study):
    for reader, key in (("anna", "1"), ("bert", "2"), ("carl", "t")):
        page = study.page(reader)
        while page.current:
            page.press(key)
    assert study.tally(4).first_shown[["anna", "bert", "carl"]].to_list() == [1, 0, 0.5]


def test_no_majority_before_all_readers_have_read(study):
    study.page("anna").press("1")
    assert labelling.MAJORITY not in study.tally(3).index and len(study.tally(3)) == 3
    assert len(labelling.Study(study.run, "M3", "SFT", study.path.with_name("none.jsonl")).agreement()) == 0


def test_without_a_live_notebook_the_page_is_a_line(study):
    assert repr(study.page("anna")) == "Page: 0 of 10 labelled by anna (needs a live notebook)"
