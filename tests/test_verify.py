"""`srlm verify`: the example passes, and each kind of damage is one line that says where and what."""

import json
import re
import shutil
import sys

import pytest

from srlm_utils import cli, example
from srlm_utils.artefacts import describe, read_json, read_jsonl, write_json, write_jsonl
from srlm_utils.errors import MissingInputError
from srlm_utils.params import Experiment
from srlm_utils.paths import EXAMPLE
from srlm_utils.plan import make_step, status
from srlm_utils.verify import _Check, verify


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(EXAMPLE, tmp_path / "run", ignore=shutil.ignore_patterns("notebooks"))
    return tmp_path / "run"


@pytest.fixture
def run(copied, monkeypatch):
    """A copy of the example; prompts are not held against the held-out ones, which takes longer than all else."""
    monkeypatch.setattr(_Check, "held_out", lambda self: None)
    return copied


def edit(run, file, change, *, signed=True):
    """Rewrite the rows of a file; `signed`: the manifests say so too, so that rows alone can give it away."""
    rows = read_jsonl(run / file)
    write_jsonl(run / file, change(rows) or rows)
    if not signed:
        return
    for path in (run / "steps").glob("*.json"):
        manifest = read_json(path)
        for part in ("inputs", "outputs"):
            if file in manifest[part]:
                manifest[part][file] = describe(run / file)
        write_json(path, manifest)


def test_the_example_is_whole_and_says_what_it_leaves_out(capsys):
    assert cli.main(["verify", str(EXAMPLE)]) == 0
    out = capsys.readouterr().out
    assert "note: M1/model is not here: a rendered run leaves it out" in out
    assert out.splitlines()[-1].endswith("0 findings")


def first(**values):
    return lambda rows: rows[0].update(values)


def twice(rows):
    return [*rows, rows[0]]


PAIRS, CANDIDATES, JUDGED = (f"M1/aift/{n}.jsonl" for n in ("pairs", "candidates", "judgements"))
IFT = "seed/ift.jsonl"
DAMAGE = {
    "candidate twice": (CANDIDATES, twice, "M1-p0000-0: found a second row of this id"),
    "answer twice": ("M2/eval/answers.jsonl", twice, "test-001: found a second row of this id"),
    "verdict twice": ("M1/eval/verdicts/M1_vs_M0.jsonl", twice, "found a second row of this id"),
    "no id": (JUDGED, lambda rows: rows[0].pop("id") and None, "row 1: found no id"),
    "candidate gone": (CANDIDATES, lambda rows: rows[1:], "M1-p0000: found 7 candidates; expected 8 of each prompt"),
    "prompt unknown": (CANDIDATES, first(prompt_id="M1-p9999"), "M1-p0000-0: found prompt_id M1-p9999; expected one"),
    "attempt dropped": (
        "M1/aift/attempts.jsonl", first(reason="similar"), "M1-p0000: found attempt_id M1-a00000; expected one of"),
    "judgement gone": (JUDGED, lambda rows: rows[1:], "M1-p0000-0: found no judgement; expected one of each candidate"),
    "judged nothing": (JUDGED, first(id="M1-p9999-0"), "M1-p9999-0: found id M1-p9999-0; expected one of"),
    "pair of another prompt": (PAIRS, first(chosen_id="M1-p0001-0"), "chosen_id M1-p0001-0; expected a candidate"),
    "pair's text": (PAIRS, first(rejected="never said"), "found another text than that of"),
    "pair's score": (PAIRS, first(chosen_score=5.0), "found chosen_score 5.0; expected"),
    "pair upside down": (PAIRS, first(chosen_score=0.1), "expected a chosen answer that scores above the rejected one"),
    "answer to no test": ("M1/eval/answers.jsonl", first(prompt_id="x"), "prompt_id x; expected one of seed/test"),
    "score of no answer": (
        "M2/eval/answer_scores.jsonl", first(prompt_id="x"), "found prompt_id x; expected one of M2/eval/answers"),
    "judged no reply": ("M1/eval/judgements.jsonl", first(id="op-004/none"), "found id op-004/none; expected one of"),
    "an exam without replies": ("seed/ranked_eval.jsonl", first(replies=None), "expected one of seed/ranked_eval"),
    "verdict on no answer": (
        "M1/eval/verdicts/M1_vs_M0.jsonl", first(prompt_id="x"), "found prompt_id x; expected one of M1/eval/answers"),
    "verdict of another": (
        "M1/eval/verdicts/M1_vs_M0.jsonl", first(model_b="M2"), "found a verdict on M1 and M2; expected the two"),
}  # fmt: skip


@pytest.mark.parametrize("file,change,says", DAMAGE.values(), ids=DAMAGE)
def test_rows_are_held_together(run, file, change, says):
    edit(run, file, change)
    found = [str(f) for f in verify(run).findings]
    assert any(says in line for line in found), found
    assert all("; expected " in line and "; next: " in line and "\n" not in line for line in found)


NO_NAMES = [
    (CANDIDATES, "cand_id"), (CANDIDATES, "prompt_id"), ("M1/aift/prompts.jsonl", "attempt_id"), (JUDGED, "id"),
    ("M1/aift/attempts.jsonl", "attempt_id"), (PAIRS, "chosen_id"), (PAIRS, "prompt_id"), (IFT, "prompt_id"),
    ("seed/test_prompts.jsonl", "prompt_id"), ("M1/eval/answers.jsonl", "prompt_id"),
]  # fmt: skip


@pytest.mark.parametrize("file,name", NO_NAMES)
def test_a_name_that_is_a_list_or_an_object_is_a_finding(run, file, name):
    edit(run, file, lambda rows: rows[0].update({name: ["x"]}) or rows[1].update({name: {"x": 1}}))
    found = [str(f) for f in verify(run).findings]
    for i, says in ((1, "['x']"), (2, "{'x': 1}")):
        assert any(f"{file}: row {i}: found {name} {says}; expected a text or a number" in line for line in found)


def test_a_learned_prompt_whose_id_is_a_list_is_held_against_held_out_ones(tmp_path):
    (tmp_path / "steps").mkdir()
    for file in (IFT, "seed/test_prompts.jsonl", "SFT/eft/train.jsonl"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / file, [{"prompt_id": ["x"], "group": ["x"], "prompt": "Name three trees of the north."}])
    found = [str(f) for f in verify(tmp_path).findings]
    assert any(f"{IFT}: ['x']: found an id of test_prompts" in line for line in found)


@pytest.mark.parametrize("row,home", [("test-001", "test_prompts"), ("op-118", "ranked_eval")])
def test_an_id_that_is_measured_on_is_found_in_training_data(copied, row, home):
    edit(copied, IFT, first(prompt_id=row))
    (found,) = map(str, verify(copied).findings)
    assert f"{row}: found an id of {home}; expected no prompt that is measured on; next: " in found


@pytest.mark.parametrize(
    "change,says",
    [
        ({}, None),
        ({"cand_id": "M1-p0001-0"}, "cand_id M1-p0001-0; expected a candidate of this prompt"),
        ({"response": "never said"}, "another text than that of M1-p0000-0 as response"),
        ({"score": 9.0}, "score 9.0; expected"),
    ],
)
def test_answers_that_are_learned_by_themselves_are_held_together(run, change, says):
    (own,) = [r for r in read_jsonl(run / CANDIDATES) if r["cand_id"] == "M1-p0000-0"]
    (score,) = [r["score"] for r in read_jsonl(run / JUDGED) if r["id"] == "M1-p0000-0"]
    row = {"prompt_id": "M1-p0000", "cand_id": "M1-p0000-0", "response": own["text"], "score": score}
    write_jsonl(run / "M1/aift/positives.jsonl", [row | change])
    check = _Check(run)
    check.round("M1")
    found = [str(f) for f in check.out.findings]
    assert len(found) == bool(says) and all(says in line for line in found), found


def test_a_judge_that_was_asked_for_some_owes_no_judgement_of_the_others(tmp_path):
    write_jsonl(tmp_path / CANDIDATES, [{"cand_id": i, "prompt_id": "p", "text": i} for i in "abc"])
    write_jsonl(tmp_path / JUDGED, [{"id": i, "judge_mode": "expected", "score": 1.0} for i in "ab"])
    for max_rows, found in ((0, ["c"]), (2, [])):
        check = _Check(tmp_path)
        check.steps["05_judge@M1"] = {"params": {"max_rows": max_rows}}
        check.round("M1")
        assert [f.row for f in check.out.findings] == found


def test_all_that_is_learned_is_held_against_all_that_is_measured(tmp_path):
    """Each kind of training data and each held-out set; of judgements to learn from, by the id of what they judge."""
    asked = {
        "ranked_eval": "Name three rivers that flow north.",
        "valid_prompts": "How do I clean a wooden flute?",
        "test_prompts": "Why are ripe bananas sweet?",
    }
    for name, text in asked.items():
        write_jsonl(tmp_path / f"seed/{name}.jsonl", [{"prompt_id": name, "prompt": text}])
    learned = [IFT, "seed/ranked_train.jsonl", "M1/aift/prompts.jsonl"]
    for file, text in zip(learned, asked.values(), strict=True):
        own = {"prompt_id": f"own of {file}", "prompt": "Write a song about the winter in a port."}
        write_jsonl(tmp_path / file, [own, {"prompt_id": file, "prompt": text}])
    write_jsonl(tmp_path / "SFT/eft/train.jsonl", [{"group": g} for g in ("own", "valid_prompts", "valid_prompts")])
    check = _Check(tmp_path)
    check.held_out()
    assert [(f.file, f.row, f.found) for f in check.out.findings] == [
        *((file, file, f"ROUGE-L 1.00 with {name} {name}") for file, name in zip(learned, asked, strict=True)),
        ("SFT/eft/train.jsonl", "valid_prompts", "an id of valid_prompts"),
    ]


def test_a_control_that_no_score_decides_may_choose_the_lower_score(run):
    path, other = run / "steps/06_build_pairs@M1.json", {"chosen": "rejected", "rejected": "chosen"}

    def turned(row):
        return {re.sub("^chosen|^rejected", lambda m: other[m[0]], name): value for name, value in row.items()}

    edit(run, PAIRS, lambda rows: [turned(rows[0]), *rows[1:]])
    assert len(verify(run).findings) == 1
    manifest = read_json(path)
    write_json(path, manifest | {"params": manifest["params"] | {"pair_rule": "random"}})
    assert not verify(run).findings


@pytest.fixture
def judged(run):
    """The run with written judgements, and a pair of them to learn from."""

    def said(row):
        whole = [{"text": f"{i} of {row['id']}.\nScore: {i}", "status": "ok", "ended": True} for i in (1, 4)]
        return row | {"samples": [*whole, {"text": "cut off", "status": "ok", "ended": False}]}

    edit(run, JUDGED, lambda rows: [said(r) for r in rows])
    two = [f"{i} of M1-p0000-0.\nScore: {i}" for i in (4, 1)]
    row = {"prompt_id": "M1-p0000-0/judge", "prompt": "?", "chosen": two[0], "rejected": two[1]}
    write_jsonl(run / JUDGE_PAIRS, [row])
    return run


JUDGE_PAIRS = "M1/aift/judge_pairs.jsonl"


def test_pairs_of_judgements_are_held_together(judged):
    assert not verify(judged).findings
    for change, says in [
        (first(prompt_id="M1-p9999-0/judge"), "found candidate M1-p9999-0; expected one of M1/aift/judgements.jsonl"),
        (first(chosen="never said"), "found a judgement that M1-p0000-0 did not get as chosen; expected one of its"),
        (first(rejected="cut off"), "found a judgement that M1-p0000-0 did not get as rejected"),
        (lambda rows: rows[0].update(rejected=rows[0]["chosen"]), "found one text as chosen and rejected"),
        (twice, "found a second row of this id"),
    ]:
        before = (judged / JUDGE_PAIRS).read_bytes()
        edit(judged, JUDGE_PAIRS, change)
        (found,) = verify(judged).findings
        assert found.file == JUDGE_PAIRS and says in str(found)
        (judged / JUDGE_PAIRS).write_bytes(before)


SELECTED = ["step,compared_with,win_rate,low,high,n,ties,kept", "2,0,0.6,0.2,0.9,3,0,False", "4,2,0.8,0.3,1.0,3,0,True"]
SAID = "M2/selection_answers.jsonl"


@pytest.fixture
def selected(run):
    """The run with three checkpoints that answered three validation prompts."""
    valid = read_jsonl(run / "seed/valid_prompts.jsonl")[:3]
    write_jsonl(run / SAID, [{"step": n, "prompt_id": r["prompt_id"], "text": "x"} for n in (0, 2, 4) for r in valid])
    (run / "M2/selection.csv").write_text("\n".join(SELECTED) + "\n")
    return run


@pytest.mark.parametrize(
    "was,now,says",
    [
        ("True", "False", "found kept none; expected 4, which the win rates say"),
        ("0.8", "0.1", "found kept 4; expected 2"),
        ("4,2,", "4,0,", "step 4: found compared_with 0; expected 2"),
        ("0.6", "often", "found ValueError"),
        ("win_rate", "rate", "found KeyError 'win_rate'"),
        ("0.9,3,", "0.9,4,", "step 2: found 3 answers; expected 4, as M2/selection.csv has"),
    ],
)
def test_a_selection_follows_from_its_comparisons(selected, was, now, says):
    assert not verify(selected).findings
    path = selected / "M2/selection.csv"
    path.write_text(path.read_text().replace(was, now))
    found = [str(f) for f in verify(selected).findings]
    assert any(says in line for line in found), found


def test_a_selection_is_checked_without_what_trains(selected, monkeypatch):
    for name in ("torch", "trl", "srlm_utils.checkpoints", "srlm_utils.train"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    check = _Check(selected)
    check.selection("M2")
    assert not check.out.findings


def test_answers_of_checkpoints_are_held_together(selected):
    edit(selected, SAID, lambda rows: [*rows[:-1], rows[-1] | {"step": 6}])
    assert {(f.row, f.found) for f in verify(selected).findings} == {
        ("step 4", "2 answers"),
        (read_jsonl(selected / SAID)[-1]["prompt_id"], "step 6"),
    }
    edit(selected, SAID, lambda rows: [*rows[:-1], rows[0] | {"prompt_id": "x", "step": 4}, rows[0]])
    found = {f.found for f in verify(selected).findings}
    assert found == {"prompt_id x", "a second row of this id"}


@pytest.fixture
def drafted(run):
    """A run whose draft F2 answered the first prompt of M1's round once, better than the answer that was chosen."""
    folder = run / "F2/aift"
    shutil.copytree(run / "M1/aift", folder, ignore=shutil.ignore_patterns("attempts*"))
    cand_id, own = "M1-p0000-F2-0", {"prompt_id": "M1-p0000", "text": "Better.", "ended": True, "author": "F2"}
    edit(run, "F2/aift/candidates.jsonl", lambda rows: [*rows, {"cand_id": cand_id, **own}])
    edit(run, "F2/aift/judgements.jsonl", lambda rows: [*rows, {"id": cand_id, "judge_mode": "expected", "score": 4.9}])
    raised = {"chosen_id": cand_id, "chosen": "Better.", "chosen_score": 4.9, "chosen_ended": True}
    edit(run, "F2/aift/pairs.jsonl", first(**raised))
    return run


def last(**values):
    return lambda rows: rows[-1].update(values)


@pytest.mark.parametrize(
    "file,change,says",
    [
        ("candidates", last(prompt_id="M1-p9999"), "prompt_id M1-p9999"),
        ("candidates", last(text="Other."), "another text than that of M1-p0000-F2-0 as chosen"),
        ("candidates", lambda rows: rows[1:], "7 candidates"),
        ("judgements", last(id="M1-p0000-F2-9"), "id M1-p0000-F2-9"),
        ("judgements", lambda rows: rows[:-1], "no judgement"),
        ("pairs", first(chosen_score=4.0), "chosen_score 4.0"),
    ],
)
def test_what_a_draft_wrote_is_held_together(drafted, file, change, says):
    assert verify(drafted).findings == []
    edit(drafted, f"F2/aift/{file}.jsonl", change)
    assert any(f.found == says for f in verify(drafted).findings if f.file.startswith("F2/")), verify(drafted).findings


def test_an_anchors_answers_are_no_candidates_too_many(run):
    anchors = [{"cand_id": "M1-p0000-M0-0", "prompt_id": "M1-p0000", "text": "a", "ended": True, "author": "M0"}]
    judged = {"id": "M1-p0000-M0-0", "judge_mode": "expected", "score": 1.0}
    edit(run, CANDIDATES, lambda rows: rows + anchors)
    edit(run, JUDGED, lambda rows: [*rows, judged])
    assert verify(run).findings == []


def test_a_drafts_prompts_are_held_against_test_prompts_as_its_rounds_are(copied):
    """They are the same prompts, so what the round was allowed is no fault of its draft."""
    asked = []
    check = _Check(copied)
    check.param = lambda step, name, default: asked.append((step, name)) or default
    (copied / "F3/aift").mkdir(parents=True)
    write_jsonl(copied / "F3/aift/prompts.jsonl", read_jsonl(copied / "M2/aift/prompts.jsonl")[:1])
    check.held_out()
    assert not check.out.findings and ("04_self_instruct@M2", "rouge_l_max") in asked
    assert {step for step, _ in asked} == {"01_seed_data@run", "04_self_instruct@M1", "04_self_instruct@M2"}


def test_a_test_prompt_in_training_data_is_found_in_other_words(copied):
    test = read_jsonl(copied / "seed/test_prompts.jsonl")[0]["prompt"]
    edit(copied, "M2/aift/prompts.jsonl", first(prompt=f"{test.upper()} Please."))
    (found,) = [f for f in verify(copied).findings if f.file == "M2/aift/prompts.jsonl"]
    assert found.row == "M2-p0000" and found.found.startswith("ROUGE-L") and "test_prompts" in found.found


def test_every_file_of_a_manifest_is_hashed(run, capsys):
    n = len(read_jsonl(run / PAIRS))
    edit(run, PAIRS, lambda rows: rows[1:], signed=False)
    assert cli.main(["verify", str(run)]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(PAIRS))
    then = read_json(run / "steps/06_build_pairs@M1.json")["outputs"][PAIRS]["sha256"]
    assert f"{n - 1} rows; expected sha256 {then[:12]}, {n} rows" in line and "--only 06_build_pairs@M1 --force" in line
    (run / "report/metrics.csv").write_text("")
    (run / "M2/eval/metrics.json").unlink()
    assert {f.file for f in verify(run).findings} == {PAIRS, "report", "M2/eval/metrics.json"}


def test_a_step_made_from_an_older_input_is_named(run):
    path = run / "steps/06_build_pairs@M1.json"
    manifest = read_json(path)
    manifest["inputs"][CANDIDATES]["sha256"] = "0" * 64
    write_json(path, manifest)
    (found,) = verify(run).findings
    assert (found.file, found.row) == ("steps/06_build_pairs@M1.json", CANDIDATES)
    assert "the last that 04_self_instruct@M1 wrote" in found.expected


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"step": "x", "params": {}, "inputs": {}, "outputs": {}}', "\x00"]
)
def test_a_damaged_manifest_is_named(run, text):
    (run / "steps/05_judge@M1.json").write_text(text)
    (found,) = verify(run).findings
    assert found.file == "steps/05_judge@M1.json" and found.next.startswith("delete it")


def test_a_file_that_cannot_be_read_is_one_finding(run):
    (run / "M1/eval/answers.jsonl").write_bytes(b'{"prompt_id": "test-001"\n')
    found = [f for f in verify(run).findings if f.file == "M1/eval/answers.jsonl"]
    assert [f.expected.partition(",")[0] for f in found][1:] == ["rows that can be read"]


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: data[:500] + b"?" + data[501:], lambda data: b"<html>"]
)
def test_a_compressed_file_that_cannot_be_unpacked_is_one_finding_and_stale(run, damage):
    files, experiment = ("M1/aift/candidates.jsonl", "seed/ranked_train.jsonl"), Experiment.load([run / "params.yaml"])
    for path in (run / f"{file}.gz" for file in files):
        path.write_bytes(damage(path.read_bytes()))
    graded = "M1/benchmarks/mt_bench/grades.jsonl"  # no row of it is looked at
    write_jsonl(run / graded, read_jsonl(EXAMPLE / files[0]))
    manifest = {"step": "10_benchmarks@M1", "params": {}, "inputs": {}, "outputs": {graded: describe(run / graded)}}
    write_json(run / "steps/10_benchmarks@M1.json", manifest)
    example.pack(run / graded)
    assert not [f for f in verify(run).findings if f.file == graded]
    (run / f"{graded}.gz").write_bytes(damage((run / f"{graded}.gz").read_bytes()))
    found = {f.file: f.found for f in verify(run).findings if f.expected.startswith("rows")}
    assert found.keys() == {*files, graded}
    assert all("cannot be unpacked" in said and str(run) not in said for said in found.values())
    stale = {("01_seed_data", "run"): "output was changed: seed", ("06_build_pairs", "M1"): "M1/aift/candidates"}
    for (stage, model), says in stale.items():
        params = experiment.flat(stage, model, str(run))
        done, why = status(make_step(stage, model, params), params, run)
        assert not done and says in why


def test_missing_weights_of_a_run_that_has_weights_are_a_fault(run):
    (run / "M1/model").mkdir()
    (run / "M1/model/model.safetensors").write_bytes(b"x")
    found = {f.file: f.found for f in verify(run).findings}
    assert found["M2/model"] == "no such file" and found["M1/model"].startswith("sha256")


def test_an_unfinished_step_is_no_fault_and_no_run_is_bad_input(run, tmp_path):
    (run / "steps/08_evaluate@M3.json").unlink()
    (run / "steps/08_evaluate@M3.work").mkdir()
    out = verify(run)
    assert not out.findings and "08_evaluate@M3 was begun and not finished; srlm run continues it" in out.notes
    assert json.dumps(out.notes).count("09_report@run read M3/eval") > 0
    with pytest.raises(MissingInputError, match="no run here"):
        verify(tmp_path / "none")
