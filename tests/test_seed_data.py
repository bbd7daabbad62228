"""The bundled seed: schema, counts, spread, and that it can neither leak nor be ranked without reading."""

import json
import math
import re
from collections import Counter

import pytest

from srlm_utils import metrics
from srlm_utils.artefacts import read_json, read_jsonl
from srlm_utils.errors import DataError, ParamError
from srlm_utils.instructions import followed
from srlm_utils.params import Experiment, SeedData
from srlm_utils.paths import PROJ_ROOT as ROOT
from srlm_utils.paths import SEED_DATA, seed_path
from srlm_utils.rows import IftRow, PromptRow, RankedRow, load_rows
from srlm_utils.seeds import drop_leaks, load_seeds, pairs_won_by_longer
from srlm_utils.self_instruct import Pool
from srlm_utils.tokens import SEED_ROWS
from tests.surface_ranker import pairwise_accuracy

SHAPES = {
    "ift": IftRow,
    "ranked_train": RankedRow,
    "ranked_eval": RankedRow,
    "onpolicy_train": RankedRow,
    "onpolicy_eval": RankedRow,
    "onpolicy_more": RankedRow,
    "judge_train": RankedRow,
    "judge_onpolicy": RankedRow,
    "valid_prompts": PromptRow,
    "test_prompts": PromptRow,
    "safety_prompts": PromptRow,
}
AUTHORED = ("ranked_train", "ranked_eval", "judge_train")
ONPOLICY = ("onpolicy_train", "onpolicy_eval", "onpolicy_more", "judge_onpolicy")


@pytest.fixture(scope="module")
def files():
    return {name: load_rows(seed_path(name), shape) for name, shape in SHAPES.items()}


def replies(rows):
    return [r for row in rows for r in row["replies"]]


def test_every_file_is_known(files):
    assert {p.stem for p in SEED_DATA.glob("*.jsonl")} == {*SHAPES, "mt_bench_sample"}
    assert {n: len(files[n]) for n in SEED_ROWS} == SEED_ROWS  # what the token estimates reckon with


def test_counts(files):
    n = {name: len(rows) for name, rows in files.items()}
    assert n["ift"] >= 240 and n["judge_train"] >= 80 and min(n["judge_onpolicy"], n["onpolicy_more"]) >= 100
    assert n["ranked_train"] + n["ranked_eval"] >= 160 and n["onpolicy_train"] + n["onpolicy_eval"] >= 120
    for kind in ("ranked", "onpolicy"):
        held_out, learned = n[f"{kind}_eval"], n[f"{kind}_train"]
        assert 0.23 <= held_out / (held_out + learned) <= 0.27
    assert (n["valid_prompts"], n["test_prompts"], n["safety_prompts"]) == (48, 256, 24)
    assert Counter(r["expected"] for r in files["safety_prompts"]) == {"refuse": 12, "comply": 12}


def test_ids_are_unique_across_files(files):
    ids = Counter(r["prompt_id"] for rows in files.values() for r in rows)
    assert max(ids.values()) == 1
    assert all(
        r["reply_id"].startswith(row["prompt_id"])
        for n in AUTHORED + ONPOLICY
        for row in files[n]
        for r in row["replies"]
    )


def test_answers_are_of_many_kinds_and_short(files):
    kinds = Counter(r["category"] for r in files["ift"])
    assert len(kinds) >= 12 and min(kinds.values()) >= 12
    assert max(len(r["response"].split()) for r in files["ift"]) <= 125
    assert len({r["category"] for r in files["test_prompts"]}) >= 12


@pytest.mark.parametrize("name", AUTHORED + ONPOLICY)
def test_ranked_rows_are_whole_and_scores_follow_ranks(files, name):
    for row in files[name]:
        assert 3 <= len(row["replies"]) <= 4 and len({r["text"] for r in row["replies"]}) == len(row["replies"])
        assert sorted({r["rank"] for r in row["replies"]}) == list(range(len({r["rank"] for r in row["replies"]})))
        for a in row["replies"]:
            assert name.startswith("judge") or 8 <= len(re.findall(r"\w+", a["justification"])) <= 45
            for b in row["replies"]:
                assert a["score"] <= b["score"] or a["rank"] < b["rank"], (
                    row["prompt_id"],
                    a["reply_id"],
                    b["reply_id"],
                )


@pytest.mark.parametrize("name", AUTHORED)
def test_scores_of_written_replies_fall_strictly_with_the_rank(files, name):
    for row in files[name]:
        by_rank = sorted(row["replies"], key=lambda r: r["rank"])
        assert [r["rank"] for r in by_rank] == list(range(len(by_rank)))
        assert all(a["score"] > b["score"] for a, b in zip(by_rank, by_rank[1:], strict=False))


@pytest.mark.parametrize("name", AUTHORED + ONPOLICY)
def test_scores_are_spread(files, name):
    count = Counter(r["score"] for r in replies(files[name]))
    assert set(count) == {0, 1, 2, 3, 4, 5}
    assert max(count.values()) <= (0.36 if name == "judge_onpolicy" else 0.35) * sum(count.values())


@pytest.mark.parametrize("name", AUTHORED)
def test_replies_fail_in_many_ways(files, name):
    defects = Counter(r["defect"] for r in replies(files[name]))
    n = defects.total()
    del defects["none"]
    assert len(defects) >= 10 and max(defects.values()) <= 0.15 * n


@pytest.mark.parametrize("name", AUTHORED)
def test_length_does_not_give_the_rank_away(files, name):
    share, n = pairs_won_by_longer(files[name])
    assert 0.45 <= share <= 0.55 and n >= 200


@pytest.mark.parametrize("l2", [0.01, 0.1, 1])
@pytest.mark.parametrize("words,surface", [(True, True), (True, False), (False, True)])
def test_the_exam_cannot_be_passed_without_reading(files, words, surface, l2):
    found = pairwise_accuracy(files["ranked_train"], files["ranked_eval"], words=words, surface=surface, l2=l2)
    assert found < 0.65


def test_the_ranker_that_does_not_read_does_learn():
    def row(i):
        texts = ["good answer of plain words", "bad bad answer of plain words"]
        return {"prompt": f"Question {i}?", "replies": [{"text": t, "rank": k} for k, t in enumerate(texts)]}

    rows = [row(i) for i in range(20)]
    assert pairwise_accuracy(rows[:10], rows[10:], words=True, surface=True, l2=0.1) == 1


def test_candidates_say_how_they_were_sampled(files):
    made = read_json(SEED_DATA / "onpolicy_sampling.json")
    assert made["model"] == "smollm2-135m-instruct" and re.fullmatch("[0-9a-f]{64}", made["weights_sha256"])
    for name in ONPOLICY:
        for r in replies(files[name]):
            assert r["source"] == made["model"] and r["n_tokens"] <= made["max_new_tokens"]
            assert r["ended"] or r["n_tokens"] == made["max_new_tokens"]


def test_a_third_of_the_test_prompts_can_be_checked_by_a_program(files):
    rows = [r for r in files["test_prompts"] if "instruction_id_list" in r]
    assert len(rows) >= 256 / 3
    for r in rows:
        done = followed(r["reference"], r["instruction_id_list"], r["kwargs"])
        assert done and all(done), (r["prompt_id"], r["instruction_id_list"], done)


def test_references_are_there(files):
    assert all(r["reference"].strip() for n in ("valid_prompts", "test_prompts") for r in files[n])


# ---- nothing leaks


def test_no_prompt_stands_twice_or_nearly(files):
    pool = Pool(0.7)
    for name, rows in files.items():
        for row in rows:
            assert pool.nearest(row["prompt"]) is None, (f"{name}/{row['prompt_id']}", pool.nearest(row["prompt"]))
            pool.add(row["prompt"], f"{name}/{row['prompt_id']}")


def test_the_seed_of_a_run():
    seeds = load_seeds(SeedData(run_dir="x").model_dump())[0]
    assert Counter(r["set"] for r in seeds["ranked_eval"]).keys() == {"onpolicy_eval", "ranked_eval"}
    assert drop_leaks(seeds, 0.7)[1] == []


def test_more_judgements_come_to_those_of_the_default(files):
    overlay = Experiment.load([ROOT / "params" / name for name in ("quickstart.yaml", "variants/more_judgements.yaml")])
    more = load_seeds(overlay.flat("01_seed_data", "run", "run"))[0]["ranked_train"]
    default = load_seeds(SeedData(run_dir="x").model_dump())[0]["ranked_train"]
    assert len(more) == len(default) + len(files["onpolicy_more"])
    assert sum(len(r["replies"]) for r in more) == 1453  # what the overlay's header says
    assert {r["prompt_id"] for r in default} < {r["prompt_id"] for r in more}


def test_a_training_prompt_near_a_test_prompt_is_dropped():
    seeds = load_seeds(SeedData(run_dir="x", n_ift=20, n_ranked_train=5).model_dump())[0]
    test = seeds["test_prompts"][0]
    leak = {"prompt_id": "leak", "prompt": test["prompt"] + " Please.", "response": "x"}
    same_id = {
        "prompt_id": test["prompt_id"],
        "prompt": "Something else altogether, about tin openers.",
        "response": "x",
    }
    cleaned, drops = drop_leaks(seeds | {"ift": [leak, same_id, *seeds["ift"]]}, 0.7)
    assert cleaned["ift"] == seeds["ift"]
    assert [(d["prompt_id"], d["why"][:7]) for d in drops] == [("leak", "ROUGE-L"), (test["prompt_id"], "same id")]


def test_limits_take_the_first_rows_of_each_file():
    few = load_seeds(SeedData(run_dir="x", n_ift=3, n_test=2, n_ranked_train=4).model_dump())[0]
    assert (len(few["ift"]), len(few["test_prompts"])) == (3, 2)
    assert Counter(r["set"] for r in few["ranked_train"]) == {"onpolicy_train": 4, "ranked_train": 4}
    assert len({r["category"] for r in load_seeds(SeedData(run_dir="x", n_ift=14).model_dump())[0]["ift"]}) == 14


def test_own_rows_are_checked(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(
        '{"prompt_id": "a", "prompt": "x", "response": "y"}\n{"prompt_id": "b", "prompt": "x", "respnse": "y"}\n'
    )
    with pytest.raises(DataError, match=r"mine\.jsonl: row 2 \(b\): response"):
        load_rows(path, IftRow)


def test_one_id_in_two_ranked_files_is_refused(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(read_jsonl(seed_path("ranked_train"))[0]) + "\n")
    with pytest.raises(DataError, match=r"mine\.jsonl: prompt_id rt-\d+ stands in ranked_train too"):
        load_seeds(SeedData(run_dir="x", ranked_train_files=["ranked_train", str(path)]).model_dump())


def test_the_card_gives_the_figures_of_the_files(files):
    card = (SEED_DATA / "DATA_CARD.md").read_text()
    for name, rows in files.items():
        (line,) = [x for x in card.splitlines() if x.startswith(f"| `{name}.jsonl`")]
        assert re.findall(r"\d+", line)[0] == str(len(rows)), line
    for name in AUTHORED + ONPOLICY:
        share, n = pairs_won_by_longer(files[name])
        assert f"| `{name}` | {n} | {100 * share:.1f} % |" in card


def test_ranks_of_sampled_replies_can_tie(files):
    pairs = sum(len(metrics.ordered_pairs([r["rank"] for r in row["replies"]])) for row in files["onpolicy_eval"])
    assert pairs >= 150


@pytest.mark.parametrize("name", ["ranked_train_files", "ranked_eval_files"])
def test_no_ranked_file_is_refused_by_name(name):
    with pytest.raises(ParamError, match=rf"seed_data\.{name} = \[\]: expected one source of ranked replies or more"):
        load_seeds(SeedData(run_dir="x", **{name: []}).model_dump())


def test_a_ranked_set_of_ties_alone_has_no_share_of_longer_replies():
    tied = {"replies": [{"rank": 1, "text": "a"}, {"rank": 1, "text": "bb"}]}
    for rows in ([], [tied]):
        share, n = pairs_won_by_longer(rows)
        assert math.isnan(share) and n == 0
