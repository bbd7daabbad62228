"""Stages without training, killed at every write, flush, rename and removal, and continued.

The stages are the notebooks' own cells; what a model writes, and how it judges, follows from what it is asked. A child
process runs them and ends with `os._exit`, as a kill would end it: nothing is closed, flushed or cleaned up. What a
killed write had got to the disk stays.
"""

import errno
import os
import random
import shutil
import subprocess
import sys
import traceback
import zlib
from contextlib import redirect_stderr
from functools import cache
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest

from srlm_utils import chat, context, plots, report, resources, self_instruct, step
from srlm_utils.artefacts import read_json, read_jsonl, write_json, write_jsonl, write_text
from srlm_utils.engine import Sample
from srlm_utils.params import STAGES, stage_key
from srlm_utils.paths import EXAMPLE, NOTEBOOKS
from srlm_utils.seed_model import fetch
from srlm_utils.step import StepRun

KILLS = 1000  # of the slow test, over all stages
FIGURES = ("agreement", "answer_lengths", "answers", "calibration", "funnel", "length_control", "mean_scores")
FIGURES += ("score_histogram", "training", "win_rates")
OPERATIONS = ("write", "fsync", "replace", "rename", "truncate", "unlink", "rmdir", "mkdir")
KILLED = 137

SEED = {"seed_model": "tiny-random", "n_ift": 8, "n_ranked_train": 2, "n_ranked_eval": 2, "n_valid": 2, "n_test": 3}
WRITE = {"n_prompts": 7, "n_candidates": 3}
JUDGE = {"judge_mode": "sampled", "meta_judge": True}
MEASURE = {"win_judges": ["M0:pairwise", "M1:score"], "judge_modes": ["expected", "sampled"], "safety_file": ""}
STAGE = {
    "01_seed_data@run": SEED,
    "04_self_instruct@M1": WRITE,
    "05_judge@M1": JUDGE,
    "06_build_pairs@M1": {"max_tie_rate": 1.0},
    "08_evaluate@M0": MEASURE,
    "08_evaluate@SFT": MEASURE,
    "09_report@run": {},
}
WORDS = ["river", "stone", "bread", "lamp", "cloud", "table", "music", "winter", "garden", "letter", "engine", "paper"]


class Author:
    """Writes, and judges by, what depends on what it is asked for alone, a few rows at a time."""

    tokenizer, context = SimpleNamespace(decode=str), 0

    def generate(self, requests, *, n=1, **how):
        for i in range(0, len(requests), 2):
            for key, _ in requests[i : i + 2]:
                texts = [f"{key} é\u2028 {j}\nScore: {number(key, j) % 6}" for j in range(n)]
                yield [Sample(f"{key}-{j}", text, 5, j != 1) for j, text in enumerate(texts)]

    def choice_probs(self, requests, choices):
        for i in range(0, len(requests), 3):
            shares = [[number(ids, c) % 97 + 1 for c in choices] for _, ids in requests[i : i + 3]]
            yield [
                (key, [s / sum(of_key) for s in of_key], 0.5)
                for (key, _), of_key in zip(requests[i : i + 3], shares, strict=True)
            ]

    def target_logprobs(self, requests):
        for key, _, ids in requests:
            yield [(key, [-number(key, i) % 7 - 0.5 for i in range(len(ids))])]


def number(*what) -> int:
    """The same for the same arguments, in every process."""
    return zlib.crc32(repr(what).encode())


def drawn(*args, **kw):
    """In place of a figure, which takes longer than all that is tested here."""
    return None, pd.DataFrame()


def save(fig, data, folder, name):
    for kind in ("png", "csv"):
        write_text(folder / f"{name}.{kind}", name)


def written(engine, ids, demos, kept, params, stop_ids):
    """In place of `self_instruct.write_prompts`: what comes depends on what was kept before."""
    rng = random.Random(f"{ids} {kept}")
    texts = [" ".join(rng.sample(WORDS, 5)) if rng.random() < 0.6 else "too short"[: rng.randrange(9)] for _ in ids]
    return [(i, Sample(f"{i}-0", t, 5, bool(t))) for i, t in zip(ids, texts, strict=True)]


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """Run a stage of the folder `tmp_path/run`; the folder holds what the stages before it made."""
    monkeypatch.setenv(step.BATCH, "1")
    monkeypatch.setattr(step, "git_revision", lambda: "")
    monkeypatch.setattr(self_instruct, "WAVE", 5)
    monkeypatch.setattr(self_instruct, "write_prompts", written)
    monkeypatch.setattr(chat, "newline_ids", lambda tokenizer: [])
    monkeypatch.setattr(chat, "prompt_ids", lambda tokenizer, messages, **how: [number(messages)])
    monkeypatch.setattr(chat, "answer_ids", lambda tokenizer, text, **how: list(text.encode()))
    monkeypatch.setattr(StepRun, "engine", lambda self, model: Author())
    tokenizer = SimpleNamespace(added_tokens_decoder={}, chat_template="")
    monkeypatch.setattr(StepRun, "tokenizer", lambda self, model: tokenizer)
    fetch("tiny-random")
    monkeypatch.setattr(step, "versions", lambda: {})
    import scipy.stats  # noqa: F401  (once here, not in every child)

    for name in STAGE:
        exec(cells(name)[0], {})  # imports
    return tmp_path / "run"


@pytest.fixture
def undrawn(monkeypatch):
    """Nothing is drawn, and nothing resampled for the report."""
    for name in FIGURES:
        monkeypatch.setattr(plots, name, drawn)
    monkeypatch.setattr(plots, "save", save)
    for name in ("ratings_table", "kinds_table", "judges_table"):
        monkeypatch.setattr(report, name, lambda *args: pd.DataFrame())


@cache
def cells(name):
    nb = nbformat.read(NOTEBOOKS / f"{name.partition('@')[0]}.ipynb", 4)
    code = [c for c in nb.cells if c.cell_type == "code" and "parameters" not in c.metadata.get("tags", [])]
    return [compile(c.source.replace("%load_ext autoreload\n%autoreload 2", ""), name, "exec") for c in code]


def run_stage(run, name, **params):
    stage, _, model = name.partition("@")
    defaults = STAGES[stage_key(stage)]().model_dump()
    space = {**defaults, **STAGE.get(name, {}), **params, "run_dir": str(run), "model": model, "display": print}
    for cell in cells(name):
        exec(cell, space)


def child(work, arm=None) -> int:
    """Exit code of `work()` in a process of its own, whose calls to the system go through `arm(name, call)`."""
    pid = os.fork()
    if not pid:
        try:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            for name in OPERATIONS if arm else ():
                setattr(os, name, arm(name, getattr(os, name)))
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def count(log):
    """Note every operation and the size of what it writes, a line each."""

    def arm(name, call):
        def counted(*args, **kw):
            log.write(f"{name} {len(args[1]) if name == 'write' else 0}\n")
            log.flush()
            return call(*args, **kw)

        return counted

    return arm


def kill(at, after=0):
    """Die before operation number `at`; of a write, after that many of its bytes."""
    state = SimpleNamespace(n=-1)

    def arm(name, call):
        def counted(*args, **kw):
            state.n += 1
            if state.n == at:
                if name == "write" and after:
                    call(args[0], args[1][:after])
                os._exit(KILLED)
            return call(*args, **kw)

        return counted

    return arm


def finish(run, name, **params):
    assert child(lambda: run_stage(run, name, **params)) == 0


def prepared(run, name):
    """What stands in the folder before the stage, made by the stages before it."""
    if name == "09_report@run":
        shutil.copytree(EXAMPLE, run, ignore=shutil.ignore_patterns("report", "notebooks", f"{name}.json"))
    if name == "05_judge@M1":
        prepared(run, "04_self_instruct@M1")
        finish(run, "04_self_instruct@M1")
    if name == "08_evaluate@SFT":
        prepared(run, "04_self_instruct@M1")
        write_json(run / "SFT/model/config.json", {})
        finish(run, "08_evaluate@M0")
    if name == "06_build_pairs@M1":
        prepared(run, "04_self_instruct@M1")
        finish(run, "04_self_instruct@M1")
        scored = [r["cand_id"] for r in read_jsonl(run / "M1/aift/candidates.jsonl")]
        rows = [{"id": i, "judge_mode": "expected", "score": n % 5 + 0.5, "cut": False} for n, i in enumerate(scored)]
        write_jsonl(run / "M1/aift/judgements.jsonl", rows)
    if name == "04_self_instruct@M1":
        finish(run, "01_seed_data@run")
        write_json(run / "M1/model/config.json", {})


def outputs(run):
    """All that stands in a run folder; of manifests what does not tell the time."""
    files = {p.relative_to(run).as_posix(): p for p in run.rglob("*") if p.is_file()}
    read = {name: path.read_bytes() for name, path in files.items() if not name.startswith("steps/")}
    for name, path in files.items():
        if name.startswith("steps/"):
            read[name] = {k: v for k, v in read_json(path).items() if k in ("step", "inputs", "outputs", "figures")}
    return read


def scenarios(operations, n, rng):
    """(operation, bytes of it done) of `n` kills: each operation once, then writes at other bytes, at random; some of
    the operations where `n` is less."""
    found = [(i, rng.randrange(size) if size else 0) for i, (_, size) in enumerate(operations)]
    if n < len(found):  # those in the middle of what is written first
        return sorted(rng.sample(found, len(found)), key=lambda kill: operations[kill[0]][0] != "write")[:n]
    writes = [(i, size) for i, (name, size) in enumerate(operations) if name == "write"]
    while len(found) < n:
        i, size = rng.choice(writes)
        found.append((i, rng.choice([0, 1, size - 1, size, rng.randrange(size)])))
    return found


def torture(run, name, n, again):
    """Kill the stage `n` times, each time from the start; `again`: and up to three times more while it continues."""
    rng, before, whole = random.Random(name), run.with_name("before"), run.with_name("whole")
    prepared(run, name)
    run.mkdir(exist_ok=True)  # so that every attempt has the same operations
    shutil.copytree(run, before)
    log = run.with_name("operations")
    with open(log, "w") as f:
        assert child(lambda: run_stage(run, name), count(f)) == 0
    operations = [(op, int(size)) for op, size in map(str.split, log.read_text().splitlines())]
    assert {op for op, _ in operations} >= {"write", "fsync", "replace", "unlink"}
    shutil.rmtree(whole, ignore_errors=True)
    run.rename(whole)
    expected = outputs(whole)
    n = n or len(operations)
    for at, after in scenarios(operations, n, rng):
        shutil.copytree(before, run)
        untouched = {p: p.read_bytes() for p in (run / "steps").glob("*.json")}
        kills = [(at, after)] + [(rng.randrange(len(operations)), 1) for _ in range(rng.randrange(4) if again else 0)]
        for k, (at_, after_) in enumerate(kills):
            code = child(lambda: run_stage(run, name), kill(at_, after_))  # noqa: B023
            assert code == KILLED if k == 0 else code in (KILLED, 0), kills
        finish(run, name)
        assert outputs(run) == expected, kills
        assert all(p.read_bytes() == data for p, data in untouched.items()), kills
        shutil.rmtree(run)
    return n


def test_a_stage_killed_at_each_operation_ends_as_if_it_had_not_been(stages):
    assert torture(stages, "06_build_pairs@M1", 0, again=False) > 15


def test_rows_of_a_killed_stage_are_neither_lost_nor_made_twice(stages):
    torture(stages, "04_self_instruct@M1", 12, again=True)


def test_judgements_and_verdicts_of_a_killed_stage_are_neither_lost_nor_made_twice(stages, undrawn):
    torture(stages, "05_judge@M1", 6, again=True)
    rows = read_jsonl(stages.with_name("whole") / "M1/aift/judge_pairs.jsonl")
    assert rows and all(r["chosen"] != r["rejected"] for r in rows)


def test_answers_and_scores_of_a_killed_evaluation_are_neither_lost_nor_made_twice(stages, undrawn):
    torture(stages, "08_evaluate@SFT", 4, again=True)
    assert len(read_jsonl(stages.with_name("whole") / "SFT/eval/verdicts/SFT_vs_M0.jsonl")) == 3 * (2 + 1)


def test_a_report_is_whole_or_not_there(stages, undrawn):
    torture(stages, "09_report@run", 3, again=False)
    assert (stages.with_name("whole") / "report/figures/win_rates.csv").is_file()


def test_one_prompt_and_two_candidates_go_through_every_stage(stages):
    """With the figures drawn: intervals over one prompt, spreads of one score."""
    run, one = stages, {"n_ift": 1, "n_ranked_train": 1, "n_ranked_eval": 1, "n_valid": 1, "n_test": 1}
    finish(run, "01_seed_data@run", **one)
    for model in ("SFT", "M1"):
        write_json(run / model / "model/config.json", {})
    finish(run, "04_self_instruct@M1", n_prompts=1, n_candidates=2)
    finish(run, "05_judge@M1", meta_judge=False)
    finish(run, "06_build_pairs@M1")
    assert len(read_jsonl(run / "M1/aift/pairs.jsonl")) == 1
    finish(run, "08_evaluate@M0")
    finish(run, "08_evaluate@SFT")
    rates = [r for r in read_json(run / "SFT/eval/metrics.json") if r["metric"] == "win_rate"]
    assert [r["n"] for r in rates] == [1, 1] and all(r["low"] is None for r in rates)


def test_one_candidate_a_prompt_makes_no_pair_and_may_make_a_positive(stages):
    run, name = stages, "06_build_pairs@M1"
    prepared(run, "04_self_instruct@M1")
    finish(run, "04_self_instruct@M1", n_prompts=2, n_candidates=1)
    finish(run, "05_judge@M1", judge_mode="expected", meta_judge=False)
    said = refused(run, name)
    assert "no pairs out of 2 prompts ({'few_scored': 2," in said and "raise self_instruct.n_candidates" in said
    finish(run, name, learn_from="positives", positive_min_score=0.0)
    assert len(read_jsonl(run / "M1/aift/positives.jsonl")) == 2


def test_no_candidates_are_said(stages):
    run = stages
    prepared(run, "04_self_instruct@M1")
    for file in ("prompts", "candidates", "judgements"):
        write_jsonl(run / f"M1/aift/{file}.jsonl", [])
    assert "candidates.jsonl holds no candidates: nothing to judge. Run 04_self_instruct" in refused(run, "05_judge@M1")
    said = refused(run, "06_build_pairs@M1")
    assert "no pairs out of 0 prompts" in said and "no prompts came" in said


def test_a_seed_that_no_judgement_is_kept_of_is_said(stages):
    run, name = stages, "03_build_eft@SFT"
    finish(run, "01_seed_data@run")
    write_json(run / "SFT/model/config.json", {})
    rows = read_jsonl(run / "seed/ranked_train.jsonl")
    alike = [{"reply_id": r["reply_id"], "text": r["text"], "rank": 0} for r in rows[0]["replies"]]
    write_jsonl(run / "seed/ranked_train.jsonl", [rows[0] | {"replies": alike}])
    said = refused(run, name, scores_from="ranks", formats=["score_first"])
    assert "no judgement of 1 prompts was kept" in said and "build_eft.scores_from: ranks" in said


def test_an_unhealthy_round_stops_where_it_is_told_to(stages):
    run, name = stages, "06_build_pairs@M1"
    prepared(run, name)
    finish(run, name, max_modal_share=0.01)
    (ill,) = read_json(run / "M1/aift/health.json")["ailments"]
    assert ill.startswith("modal_share is")
    assert f"the round is not healthy: {ill}" in refused(run, name, max_modal_share=0.01, on_unhealthy="stop")


def test_texts_without_room_in_the_context_are_refused_before_a_model_is_loaded(stages, monkeypatch):
    prepared(stages, "04_self_instruct@M1")
    monkeypatch.setattr(StepRun, "engine", lambda self, model: 1 / 0)
    monkeypatch.setattr(chat, "load_tokenizer", lambda **source: None)
    monkeypatch.setattr(context, "of_folder", lambda folder: 400)
    said = refused(stages, "04_self_instruct@M1", max_prompt_tokens=60, max_new_tokens=360)
    assert "a new prompt (1 and 420): " in said and "than the 400 that the model" in said and "lower max_new" in said
    said = refused(stages, "04_self_instruct@M1", max_prompt_tokens=150, max_new_tokens=100)
    assert "demonstrations (1 and 450): " in said and "n_seed_demos" in said
    said = refused(stages, "08_evaluate@M0", max_new_tokens=400)
    assert "test-" in said and "(1 and 400)" in said
    shutil.rmtree(stages)
    monkeypatch.setattr(context, "of_folder", lambda folder: 1)
    assert "(1 and 1)" in refused(stages, "01_seed_data@run")
    assert not (stages / "M0/model.json").exists()


def test_no_prompt_kept_is_said_and_its_attempts_stay(stages, monkeypatch):
    name = "04_self_instruct@M1"
    prepared(stages, name)
    monkeypatch.setattr(
        self_instruct, "write_prompts", lambda engine, ids, *how: [(i, Sample(i, "no", 1, True)) for i in ids]
    )
    assert "no prompt was kept: see the reasons above" in refused(stages, name)
    assert len(read_jsonl(stages / f"steps/{name}.work/attempts.jsonl")) >= 7


def full_after(n):
    """Every write fails once `n` bytes were written, as on a disk that is full."""
    state = SimpleNamespace(left=n)

    def arm(name, call):
        def counted(*args, **kw):
            if name == "write":
                done = call(args[0], args[1][: max(state.left, 0)]) if state.left > 0 else 0
                state.left -= done
                if not done:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return done
            return call(*args, **kw)

        return counted

    return arm


def refused(run, name, arm=None, **params):
    """The kit's own error of a stage that cannot write, or does not want to."""
    with open(run.with_name("said"), "w+") as said:
        with redirect_stderr(said):
            assert child(lambda: run_stage(run, name, **params), arm) == 1
        said.seek(0)
        return said.read().splitlines()[-1]


def test_a_disk_that_fills_up_loses_nothing(stages):
    run, name = stages, "04_self_instruct@M1"
    prepared(run, name)
    shutil.copytree(run, run.with_name("before"))
    finish(run, name)
    expected = outputs(run)
    for n in (0, 1500, 3000, 6000):
        shutil.rmtree(run)
        shutil.copytree(run.with_name("before"), run)
        assert "the disk is full. What was made is kept" in refused(run, name, full_after(n))
        finish(run, name)
        assert outputs(run) == expected


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 200 kB; `small_disk(options)` mounts it again with others."""
    place, mount = tmp_path / "disk", ["mount", "-t", "tmpfs", "tmpfs"]
    place.mkdir()
    if os.geteuid() or subprocess.run([*mount, "-o", "size=200k", place], capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    yield lambda options: subprocess.run([*mount[:-1], "-o", f"remount,{options}", place], check=True)
    subprocess.run(["umount", "-l", place], check=True)


def test_a_real_disk_fills_up_and_a_folder_is_read_only(stages, small_disk, monkeypatch):
    monkeypatch.setattr(resources, "MARGIN", 0)
    run, name = stages, "04_self_instruct@M1"
    prepared(run, name)
    finish(run.rename(run.with_name("whole")), name)
    disk = run.with_name("disk")
    for part in ("seed", "M0", "M1", "steps"):
        shutil.copytree(run.with_name("whole") / part, disk / part)
    for path in [*(disk / "M1/aift").glob("*"), disk / f"steps/{name}.json"]:
        path.unlink()
    filler = disk / "filler"
    filler.write_bytes(b"x" * (shutil.disk_usage(disk).free - 12_000))
    assert "the disk is full" in refused(disk, name)
    small_disk("ro,size=200k")
    assert "cannot be written to" in refused(disk, name)
    small_disk("rw,size=400k")
    filler.unlink()
    finish(disk, name)
    assert outputs(disk) == outputs(run.with_name("whole"))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    "name,share",
    [
        ("01_seed_data@run", 0.1),
        ("04_self_instruct@M1", 0.4),
        ("05_judge@M1", 0.2),
        ("06_build_pairs@M1", 0.1),
        ("08_evaluate@SFT", 0.15),
        ("09_report@run", 0.05),
    ],
)
def test_a_thousand_kills(stages, undrawn, name, share):
    assert torture(stages, name, round(KILLS * share), again=True) == round(KILLS * share)
