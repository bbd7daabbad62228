"""A run as tables and cards: joined, filtered, and safe to look at."""

import re
import shutil
import subprocess
import sys

import pytest

import srlm_utils
from srlm_utils.artefacts import read_jsonl, write_jsonl
from srlm_utils.errors import DataError, MissingInputError, ParamError
from srlm_utils.paths import EXAMPLE, PROJ_ROOT

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)> [x](javascript:alert(3)) \x1b[2J\x07\u202eabc $4 or $5"


@pytest.fixture(scope="module")
def run():
    return srlm_utils.open_run("results/example")


@pytest.fixture
def made(tmp_path):
    """A small run whose rows this test wrote: two prompts, one of them hostile, one candidate unparsed."""
    folder = tmp_path / "made"
    (folder / "steps").mkdir(parents=True)
    aift, answers = folder / "M1/aift", {m: folder / m / "eval" for m in ("M1", "M2")}
    prompts = [{"prompt_id": "p0", "prompt": EVIL, "category": EVIL}, {"prompt_id": "p1", "prompt": "Name a tea."}]
    texts = {"p0-0": EVIL, "p0-1": "short", "p1-0": "Assam.", "p1-1": "Tea of the Assam valley."}
    write_jsonl(aift / "prompts.jsonl", prompts)
    rows = [
        {"cand_id": i, "prompt_id": i[:2], "text": t, "n_tokens": 3, "ended": i != "p1-1"} for i, t in texts.items()
    ]
    write_jsonl(aift / "candidates.jsonl", rows)
    scores = {"p0-0": 4.0, "p0-1": 1.0, "p1-0": 2.5, "p1-1": None}
    sample = {"text": EVIL, "score": 4, "status": "ok"}
    judged = [{"id": i, "judge_mode": "sampled", "score": s, "samples": [sample]} for i, s in scores.items()]
    write_jsonl(aift / "judgements.jsonl", judged)
    pair = {"prompt_id": "p0", "prompt": EVIL, "chosen_id": "p0-0", "rejected_id": "p0-1", "chosen": EVIL}
    pair |= {"rejected": "short", "chosen_score": 4.0, "rejected_score": 1.0}
    write_jsonl(aift / "pairs.jsonl", [pair])
    for folder_, text in zip(answers.values(), (EVIL, "Green tea."), strict=True):
        row = {"cand_id": "t0-0", "prompt_id": "t0", "prompt": "Which tea?", "text": text, "n_tokens": 3, "ended": True}
        write_jsonl(folder_ / "answers.jsonl", [row])
    return srlm_utils.open_run(folder)


def test_tables_have_every_row_of_the_files(run):
    assert list(run.models.index) == ["M0", "SFT", "M1", "M2", "M3"]
    assert run.models.made_from["M1"] == "M0" and run.models.candidates["M1"] == 800
    c, files = run.candidates("M1"), {r["cand_id"]: r for r in read_jsonl(EXAMPLE / "M1/aift/candidates.jsonl")}
    assert {r.cand_id: r.text for r in c.itertuples()} == {i: r["text"] for i, r in files.items()}
    scores = {r["id"]: r["score"] for r in read_jsonl(EXAMPLE / "M1/aift/judgements.jsonl")}
    assert dict(zip(c.cand_id, c.score, strict=True)) == scores
    pairs = run.pairs("M1")
    assert set(c[c.role == "chosen"].cand_id) == set(pairs.chosen_id) and len(pairs) == len(
        read_jsonl(EXAMPLE / "M1/aift/pairs.jsonl")
    )
    assert (pairs.margin > 0).all() and (c.n_chars == c.text.str.len()).all() and c.prompt.notna().all()
    j = run.judgements("M1")
    assert len(j) == 800 and "probs" in j and "text" in j
    a = run.answers("M3")
    assert len(a) == 64 and set(a.scored_by) == {"outside"} and (a.category != "").all() and a.reference.str.len().all()


def test_verdicts_are_the_figures_of_the_report_from_either_side(run):
    v, m = run.verdicts("M3", "M1"), run.metrics()
    for judge in ("outside", "M1"):
        figure = m[
            (m.metric == "win_rate") & (m.model == "M3") & (m.opponent == "M1") & (m.judge == judge)
        ].value.item()
        assert v[v.judge == judge].result.mean() == pytest.approx(figure)
        back = run.verdicts("M1", "M3")
        assert back[back.judge == judge].result.mean() == pytest.approx(1 - figure)


def test_filters(run, made):
    c = run.candidates("M1")
    found = run.candidates("M1", score=(2, 3), length=(None, 400), search="TEA")
    texts = (c.prompt + c.text).str.lower()
    assert (
        len(found)
        and len(found) == ((c.score >= 2) & (c.score <= 3) & (c.n_chars <= 400) & texts.str.contains("tea")).sum()
    )
    assert set(run.answers("M3", category="email").category) == {"email"}
    assert len(made.candidates("M1", score=(None, None))) == 3  # an unparsed score is in no range
    assert list(made.candidates("M1", search="(").cand_id) == ["p0-0", "p0-1"]  # words, no pattern
    assert len(made.pairs("M1", length=(0, 5))) == 0  # by the chosen one's
    assert len(made.side_by_side("M1", "M2", search="green")) == 1  # in any model's answer
    assert len(made.side_by_side("M1", "M2", search="coffee")) == 0


@pytest.mark.parametrize(
    "ask, error, words",
    [
        (lambda run: srlm_utils.open_run("no_such"), MissingInputError, ["results/no_such", "example"]),
        (lambda run: run.candidates("M9"), MissingInputError, ["example", "M9", "M0, SFT, M1, M2, M3"]),
        (lambda run: run.pairs("M3"), MissingInputError, ["06_build_pairs@M3", "Models with pairs: M1, M2"]),
        (lambda run: run.verdicts("M1", "M1"), MissingInputError, ["not compared", "M3 and M1"]),
        (lambda run: run.answers("M1", category="emial"), ParamError, ["emial", "email"]),
        (lambda run: run.prompts("M1", score=(1, 2)), ParamError, ["score", "have none"]),
        (lambda run: run.candidates("M1", score=(1, 2, 3)), ParamError, ["(lowest, highest)"]),
        (lambda run: run.side_by_side(), ParamError, ["name the models"]),
    ],
)
def test_errors_say_what_there_is(run, ask, error, words):
    with pytest.raises(error) as e:
        ask(run)
    assert all(w in str(e.value) for w in words), e.value


def test_a_run_without_figures_or_scores_is_read_as_far_as_it_goes(made):
    (made.folder / "M1/aift/judgements.jsonl").unlink()
    assert made.candidates("M1").score.isna().all() and "no score" in repr(made.show_prompt("M1"))
    with pytest.raises(MissingInputError, match="09_report@run"):
        made.metrics()


@pytest.mark.parametrize("content,says", [(b"", "not a table"), (b"a,b\n1,2\n", "found columns a, b")])
def test_a_foreign_file_of_figures_is_named(made, content, says):
    (made.folder / "report").mkdir()
    (made.folder / "report/metrics.csv").write_bytes(content)
    with pytest.raises(DataError, match=rf"report/metrics\.csv: {says}"):
        made.metrics()


def test_a_figure_without_an_opponent_has_an_empty_one(run):
    table = run.metrics()
    assert set(table[table.metric == "answer_chars"].opponent) == {""}


def test_a_positives_only_round(made):
    (made.folder / "M1/aift/pairs.jsonl").unlink()
    write_jsonl(made.folder / "M1/aift/positives.jsonl", [{"prompt_id": "p0", "cand_id": "p0-0"}])
    assert list(made.candidates("M1").role) == ["positive", "", "", ""]


def test_what_a_model_wrote_is_text_in_html_and_in_a_terminal(made):
    for cards in (made.show_prompt("M1"), made.show_pair("M1"), made.side_by_side("M1", "M2")):
        html, plain = cards._repr_html_(), repr(cards)
        assert "&lt;script&gt;" in html and "&lt;img src=x onerror" in html
        tags = set(re.findall(r"<([^\s>/]+)", html))
        assert tags <= {"div", "small", "pre", "details", "summary"}
        # no attribute but ours, nothing that asks for anything outside
        assert set(re.findall(r"\s([a-z]+)=\"", html)) == {"class", "style"} and "mathjax_ignore" in html
        for text in (html, plain):
            assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
            assert "␛[2J␇\ufffdabc" in text
    folder = made.folder.with_name("<b>run")
    shutil.copytree(made.folder, folder)
    assert "<b>" not in srlm_utils.open_run(folder)._repr_html_()


def test_cards_show_what_the_judge_wrote_and_the_role(made):
    cards = made.show_prompt("M1", prompt_id="p0")
    assert "chosen · score 4.00" in repr(cards) and "judged:" in repr(cards) and "1 of 1 prompts" in repr(cards)
    assert repr(cards).index("p0-0") < repr(cards).index("p0-1")  # best first
    assert "p1-1 · no score · 3 tokens · 24 characters · cut off" in repr(made.show_prompt("M1", prompt_id="p1"))


def test_opening_a_run_loads_no_model_library():
    code = (
        "import sys, srlm_utils; assert 'pandas' not in sys.modules; r = srlm_utils.open_run(); r.candidates('M1');"
        "print([m for m in ('torch', 'transformers', 'trl') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=PROJ_ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_torn_line_of_one_model_leaves_the_others_readable(tmp_path):
    shutil.copytree(EXAMPLE, tmp_path / "run", ignore=shutil.ignore_patterns("notebooks"))
    path = tmp_path / "run/M3/eval/answers.jsonl"
    path.write_text(path.read_text().rstrip()[:-5])
    torn = srlm_utils.open_run(tmp_path / "run")
    assert len(torn.pairs("M1")) == 84
    with pytest.raises(DataError, match="answers.jsonl:64"):
        torn.answers("M3")
