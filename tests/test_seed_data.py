"""The bundled seed: schema, counts, and that nothing leaks from what is learned into what is measured."""

import pytest

from srlm_utils.params import SeedData
from srlm_utils.rows import load_rows
from srlm_utils.seeds import drop_leaks, load_seeds, pairs_won_by_longer
from srlm_utils.self_instruct import Pool


@pytest.fixture(scope="module")
def seeds():
    return load_seeds(SeedData(run_dir="x").model_dump())


def test_counts(seeds):
    assert {k: len(v) for k, v in seeds.items()} == {
        "ift": 72,
        "ranked_train": 36,
        "ranked_eval": 16,
        "valid_prompts": 16,
        "test_prompts": 64,
    }


def test_no_prompt_stands_twice_or_nearly(seeds):
    pool = Pool(0.7)
    for name, rows in seeds.items():
        for row in rows:
            assert pool.nearest(row["prompt"]) is None, f"{name}/{row['prompt_id']}"
            pool.add(row["prompt"], f"{name}/{row['prompt_id']}")
    assert drop_leaks(seeds, 0.7)[1] == []


@pytest.mark.parametrize("name", ["ranked_train", "ranked_eval"])
def test_ranked_rows_carry_score_and_reason(seeds, name):
    for row in seeds[name]:
        replies = sorted(row["replies"], key=lambda r: r["rank"])
        assert [r["rank"] for r in replies] == list(range(len(replies)))
        assert all(a["score"] > b["score"] for a, b in zip(replies, replies[1:], strict=False))
        assert all(r["justification"] for r in replies)


@pytest.mark.parametrize("name", ["ranked_train", "ranked_eval"])
def test_length_does_not_give_the_rank_away(seeds, name):
    share, n = pairs_won_by_longer(seeds[name])
    assert 0.45 <= share <= 0.55 and n >= 60


def test_scores_are_spread(seeds):
    scores = [r["score"] for row in seeds["ranked_train"] for r in row["replies"]]
    assert set(scores) == {0, 1, 2, 3, 4, 5}
    assert max(scores.count(s) for s in range(6)) / len(scores) <= 0.35


def test_a_training_prompt_near_a_test_prompt_is_dropped(seeds):
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


def test_limits_take_the_first_rows():
    few = load_seeds(SeedData(run_dir="x", n_ift=3, n_test=2).model_dump())
    assert (len(few["ift"]), len(few["test_prompts"]), len(few["ranked_train"])) == (3, 2, 36)


def test_own_rows_are_checked(tmp_path):
    from srlm_utils.errors import DataError
    from srlm_utils.rows import IftRow

    path = tmp_path / "mine.jsonl"
    path.write_text(
        '{"prompt_id": "a", "prompt": "x", "response": "y"}\n{"prompt_id": "b", "prompt": "x", "respnse": "y"}\n'
    )
    with pytest.raises(DataError, match=r"mine\.jsonl: row 2 \(b\): response"):
        load_rows(path, IftRow)
