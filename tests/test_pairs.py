import math
import os
import random
from typing import get_args

import pytest
from scipy import stats

from srlm_utils import health, pairs
from srlm_utils.artefacts import read_jsonl, write_jsonl
from srlm_utils.errors import MissingInputError, ParamError
from srlm_utils.measures import has_list
from srlm_utils.params import BuildPairs, Experiment, PairRule, read_yaml
from srlm_utils.paths import EXAMPLE, PARAMS
from srlm_utils.plan import list_steps
from srlm_utils.step import StepRun


def case(scores, texts=None, ended=True, pid="p"):
    cands = [
        {"cand_id": f"{pid}-{i}", "prompt_id": pid, "text": texts[i] if texts else f"answer {i}", "ended": ended}
        for i in range(len(scores))
    ]
    judged = [{"id": c["cand_id"], "judge_mode": "expected", "score": s} for c, s in zip(cands, scores, strict=True)]
    return [{"prompt_id": pid, "prompt": "Q?"}], cands, judged


def test_the_papers_example():
    (pair,), drops = pairs.build_pairs(*case([4.3, 2.1, 4.3, 1.0]))
    assert (pair["chosen_score"], pair["rejected_score"], pair["rejected_id"]) == (4.3, 1.0, "p-3")
    assert pair["chosen_id"] in ("p-0", "p-2")
    assert sum(drops.values()) == 0


@pytest.mark.parametrize(
    "scores,texts,reason",
    [
        ([3.0, 3.0, 3.0], None, "tie"),
        ([3.0, None, None], None, "few_scored"),
        ([None, None], None, "few_scored"),
        ([3.0, 2.9], None, "small_margin"),
        ([4.0, 2.0], ["same", "same"], "same_text"),
        ([4.0, 2.0], ["", "something"], "empty_chosen"),
    ],
)
def test_drops_are_counted_with_their_reason(scores, texts, reason):
    made, drops = pairs.build_pairs(*case(scores, texts), min_margin=0.5)
    assert made == [] and drops[reason] == 1 and sum(drops.values()) == 1


def test_a_draft_below_answers_that_are_all_equal_makes_a_tie():
    prompts, cands, judged = case([2.0, 3.0, 3.0], ["aa", "bb", "cc"])
    cands[0]["author"] = "F2"
    cands[1]["ended"] = cands[2]["ended"] = False
    made, drops = pairs.build_pairs(prompts, cands, judged, chosen_ended=True)
    assert made == [] and drops["tie"] == 1 and drops["small_margin"] == 0


@pytest.mark.parametrize("rule,own", [("longer", "ccc"), ("shorter", "c")])
def test_a_rule_of_length_is_not_turned_round_where_a_drafts_answer_alone_may_be_chosen(rule, own):
    prompts, cands, judged = case([3.0, 2.0], ["bb", own])
    cands[0]["author"], cands[1]["ended"] = "F2", False
    assert pairs.build_pairs(prompts, cands, judged, rule=rule, chosen_ended=True)[1]["same_length"] == 1
    assert len(pairs.build_pairs(prompts, cands, judged, rule="score", chosen_ended=True)[0]) == 1


def test_every_rule_of_the_parameter_is_there():
    assert {*pairs.RULES} == {*get_args(PairRule)}


def test_a_scratch_run_gives_its_own_candidates_no_scores_of_the_example(tmp_path):
    run = tmp_path / "scratch"
    step = StepRun("06_build_pairs", BuildPairs().model_dump() | {"run_dir": str(run)})
    assert step.input("M1/aift/judgements.jsonl") == EXAMPLE / "M1/aift/judgements.jsonl"
    write_jsonl(run / "M1/aift/candidates.jsonl", [])
    for _ in range(2):
        with pytest.raises(MissingInputError, match="which belong to other candidates: run 05_judge first"):
            step.input("M1/aift/judgements.jsonl")
        write_jsonl(run / "M1/aift/judgements.jsonl", [])  # of candidates that were there before
        os.utime(run / "M1/aift/judgements.jsonl", (1, 1))
    write_jsonl(run / "M1/aift/judgements.jsonl", [])
    assert step.input("M1/aift/judgements.jsonl") == run / "M1/aift/judgements.jsonl"


def test_unparsed_is_never_rejected():
    (pair,), _ = pairs.build_pairs(*case([4.0, None, 2.0]))
    assert (pair["chosen_id"], pair["rejected_id"]) == ("p-0", "p-2")


def test_ties_among_the_best_are_broken_by_the_seed_not_by_position():
    prompts, cands, judged = case([4.0, 4.0, 4.0, 1.0])
    picked = {s: pairs.build_pairs(prompts, cands, judged, seed=s)[0][0]["chosen_id"] for s in range(20)}
    again = {s: pairs.build_pairs(prompts, cands[::-1], judged[::-1], seed=s)[0][0]["chosen_id"] for s in range(20)}
    assert picked == again and len(set(picked.values())) == 3


def test_every_prompt_is_a_pair_or_a_drop():
    parts = [case(s, pid=f"p{i}") for i, s in enumerate([[1, 2], [2, 2], [None, 1], [5, 0, 3]])]
    prompts, cands, judged = ([r for p in parts for r in p[k]] for k in range(3))
    made, drops = pairs.build_pairs(prompts, cands, judged)
    assert len(made) + sum(drops.values()) == 4 and len(made) == 2


def test_positives_are_good_ended_answers():
    (row,), _ = pairs.build_positives(*case([4.6, 4.9, 1.0]))
    assert (row["cand_id"], row["response"]) == ("p-1", "answer 1")
    assert pairs.build_positives(*case([4.4, 1.0]))[1]["low_score"] == 1
    assert pairs.build_positives(*case([5.0], ended=False))[1]["none_ended"] == 1


def test_the_overlay_leaves_positives_of_a_small_judge():
    least = read_yaml(PARAMS / "variants" / "positives.yaml")["build_pairs"]["positive_min_score"]
    for model, at_four in (("M1", 0), ("M2", 17)):
        tables = [read_jsonl(EXAMPLE / model / "aift" / f"{n}.jsonl") for n in ("prompts", "candidates", "judgements")]
        assert len(pairs.build_positives(*tables, min_score=least)[0]) >= 20  # of 100 prompts
        assert len(pairs.build_positives(*tables, min_score=4.0)[0]) == at_four  # what the header says


def test_an_answer_without_a_token_is_never_rejected():
    prompts, cands, judged = case([4.0, 2.0, 1.0], ["good", "bad", ""], ended=False)
    (pair,), _ = pairs.build_pairs(prompts, cands, judged)
    assert pair["rejected_id"] == "p-1"
    cands[2]["ended"] = True  # its end is a token
    (pair,), _ = pairs.build_pairs(prompts, cands, judged)
    assert pair["rejected_id"] == "p-2"


def test_health_figures():
    prompts, cands, judged = case([1.0, 3.0], ["brief", "much longer"])
    made, _ = pairs.build_pairs(prompts, cands, judged)
    rows = {r["metric"]: r for r in health.round_metrics("M1", prompts, cands, judged, made)}
    assert rows["pair_yield"]["value"] == 1
    assert rows["candidate_score_std"]["value"] == pytest.approx(2**0.5)  # of 1 and 3
    assert (rows["chosen_chars"]["value"], rows["rejected_chars"]["value"]) == (len("much longer"), len("brief"))
    assert rows["candidate_parse_rate"]["value"] == 1


def test_a_margin_at_the_minimum_is_kept():
    assert len(pairs.build_pairs(*case([3.0, 2.5]), min_margin=0.5)[0]) == 1
    assert pairs.build_pairs(*case([3.0, 2.5]), min_margin=0.75)[1]["small_margin"] == 1


def test_a_candidate_that_was_not_judged_takes_no_part():
    prompts, cands, judged = case([4.0, 1.0, 2.0])
    (pair,), _ = pairs.build_pairs(prompts, cands, [j for j in judged if j["id"] != "p-1"])
    assert pair["rejected_id"] == "p-2"


def test_a_pair_carries_what_training_needs():
    (pair,), _ = pairs.build_pairs(*case([1.0, 4.0]))
    assert pair == {
        "prompt_id": "p", "prompt": "Q?", "chosen_id": "p-1", "rejected_id": "p-0", "chosen": "answer 1",
        "rejected": "answer 0", "chosen_score": 4.0, "rejected_score": 1.0, "chosen_ended": True,
        "rejected_ended": True}  # fmt: skip


def test_random_rounds_lose_no_prompt_and_ignore_row_order():
    rng = random.Random(0)
    parts = [
        case([rng.choice([None, 1, 1.5, 3]) for _ in range(4)], [rng.choice(["", "a", "b"]) for _ in range(4)],
             pid=f"p{i}") for i in range(200)
    ]  # fmt: skip
    prompts, cands, judged = ([r for p in parts for r in p[k]] for k in range(3))
    made, drops = pairs.build_pairs(prompts, cands, judged, seed=3, min_margin=1)
    assert len({r["prompt_id"] for r in made}) == len(made) and len(made) + sum(drops.values()) == 200
    assert min(drops.values()) > 0  # every reason occurs
    score = {j["id"]: j["score"] for j in judged}
    for r in made:
        valid = [score[c["cand_id"]] for c in cands if c["prompt_id"] == r["prompt_id"]]
        valid = [s for s in valid if s is not None]
        assert (r["chosen_score"], r["rejected_score"]) == (max(valid), min(valid))
        assert r["chosen"] and r["chosen"] != r["rejected"]
    rng.shuffle(cands)
    rng.shuffle(judged)
    assert pairs.build_pairs(prompts, cands, judged, seed=3, min_margin=1) == (made, drops)


@pytest.mark.parametrize(
    "scores,texts,reason",
    [([None, None], None, "few_scored"), ([5.0], [""], "none_ended"), ([4.49, 1.0], None, "low_score")],
)
def test_prompts_without_a_positive_are_counted_once(scores, texts, reason):
    made, drops = pairs.build_positives(*case(scores, texts))
    assert made == [] and drops[reason] == 1 and sum(drops.values()) == 1


def test_positives_take_one_score_and_choose_among_equals_by_seed():
    assert len(pairs.build_positives(*case([4.5]))[0]) == 1  # the least that counts as a 5
    assert len(pairs.build_positives(*case([3.0]), min_score=3.0)[0]) == 1
    prompts, cands, judged = case([5.0, 5.0, 5.0])
    picked = [pairs.build_positives(prompts, cands, judged, seed=s)[0][0]["cand_id"] for s in range(20)]
    again = [pairs.build_positives(prompts, cands[::-1], judged, seed=s)[0][0]["cand_id"] for s in range(20)]
    assert picked == again and len(set(picked)) == 3


def test_health_of_a_sampled_round_by_hand():
    prompts, cands, judged = ([*a, *b] for a, b in zip(case([1, 3], pid="p"), case([2, 2], pid="q"), strict=True))
    tries = {"p-0": [1.0, None], "p-1": [3.0, 3.0], "q-0": [2.0, 2.0], "q-1": [None, 2.0]}
    judged = [j | {"judge_mode": "sampled", "samples": [{"score": s} for s in tries[j["id"]]]} for j in judged]
    made, _ = pairs.build_pairs(prompts, cands, judged)
    rows = {r["metric"]: r for r in health.round_metrics("M1", prompts, cands, judged, made)}
    assert rows["pair_yield"]["value"] == 1 / 2  # p; q is a tie
    assert (rows["candidate_parse_rate"]["value"], rows["candidate_parse_rate"]["n"]) == (6 / 8, 8)
    # 1, 3, 2, 2 about 2: (1 + 1 + 0 + 0) / 3
    assert rows["candidate_score_std"]["value"] == pytest.approx((2 / 3) ** 0.5)
    assert rows["within_prompt_score_std"]["value"] == pytest.approx(2**0.5 / 2)  # sqrt 2 and 0
    assert {(r["set"], r["judge"], r["judge_mode"]) for r in rows.values()} == {("aift", "M1", "sampled")}


def test_health_of_a_round_that_kept_nothing():
    prompts, cands, judged = case([None])
    rows = {r["metric"]: r for r in health.round_metrics("M1", prompts, cands, judged, [])}
    assert rows["pair_yield"]["value"] == 0 == rows["candidate_parse_rate"]["value"]
    assert rows["within_prompt_score_std"]["value"] is None and "chosen_chars" not in rows


def collapsed(scores, texts=("a", "bb", "ccc")):
    """One prompt a list of scores."""
    prompts = [{"prompt_id": f"p{i}", "prompt": f"Q{i}"} for i in range(len(scores))]
    cands, judged = [], []
    for i, of_prompt in enumerate(scores):
        for j, score in enumerate(of_prompt):
            key = f"p{i}-c{j}"
            cands.append({"prompt_id": f"p{i}", "cand_id": key, "text": texts[j], "ended": True, "n_tokens": 3})
            judged.append({"id": key, "judge_mode": "sampled", "score": score, "cut": j == 0})
    made, _ = pairs.build_pairs(prompts, cands, judged, seed=0)
    return health.round_metrics("M1", prompts, cands, judged, made)


def test_vital_signs_of_scores_by_hand():
    found = {r["metric"]: r["value"] for r in collapsed([[4, 4, 4.2], [4, 2, 0]])}
    assert found["candidate_tie_rate"] == pytest.approx(1 / 6)  # one pair of six
    assert found["modal_share"] == pytest.approx(4 / 6)
    assert found["score_entropy"] == pytest.approx(-(4 / 6 * math.log2(4 / 6) + 2 * (1 / 6) * math.log2(1 / 6)))
    assert found["cut_rate"] == pytest.approx(1 / 3)
    assert found["score_length_correlation"] == pytest.approx(
        stats.spearmanr([4, 4, 4.2, 4, 2, 0], [1, 2, 3, 1, 2, 3]).statistic
    )


def test_a_candidate_without_a_score_has_no_length_to_go_with_it():
    found = {r["metric"]: r for r in collapsed([[1, None, 3], [4, 2, 0]])}["score_length_correlation"]
    assert found["value"] == pytest.approx(stats.spearmanr([1, 3, 4, 2, 0], [1, 3, 1, 2, 3]).statistic)
    assert found["n"] == 5


def test_what_stands_at_its_limit_is_no_ailment():
    """A limit of 1 or 0 is how a preset switches one off."""
    limits = {"max_modal_share": 1.0, "max_tie_rate": 1.0, "min_pair_yield": 0.0}
    assert health.ailments(collapsed([[4, 4, 4], [4, 4, 4]]), limits) == []


def test_a_judge_that_gives_one_score_is_ill():
    limits = {"min_parse_rate": 0.5, "max_modal_share": 0.8, "max_tie_rate": 0.5, "min_pair_yield": 0.3}
    ill = health.ailments(collapsed([[4, 4, 4], [4, 4, 4]]), limits)
    assert [a.partition(" is ")[0] for a in ill] == ["modal_share", "candidate_tie_rate", "pair_yield"]
    assert ill[0] == "modal_share is 1.00, more than max_modal_share = 0.8"
    assert health.ailments(collapsed([[4, 1, 3], [5, 2, 0]]), limits) == []
    unparsed = health.ailments(collapsed([[None, None, None], [4, None, None]]), limits)
    assert unparsed[0] == "candidate_parse_rate is 0.17, less than min_parse_rate = 0.5"


def test_a_judge_that_hardly_thinks_of_a_score_is_ill():
    parts = [case([1, 3], pid="p"), case([2, 4], pid="q")]
    prompts, cands, judged = ([*a, *b] for a, b in zip(*parts, strict=True))

    def ill(masses):
        rows = [j | {"mass": m} for j, m in zip(judged, masses, strict=True)]
        metrics = health.round_metrics("M1", prompts, cands, rows, pairs.build_pairs(prompts, cands, rows)[0])
        found = {r["metric"]: r for r in metrics}
        assert found["candidate_score_mass"]["value"] == pytest.approx(sum(masses) / 4)
        assert found["candidate_score_mass"]["low"] is not None and found["candidate_parse_rate"]["value"] == 1
        return health.ailments(metrics, {"min_parse_rate": 0.5, "min_score_mass": 0.5})

    assert ill([1e-6] * 4) == ["candidate_score_mass is 0.00, less than min_score_mass = 0.5"]
    assert ill([0.8, 0.9, 0.7, 0.8]) == []


def test_health_of_no_candidates_at_all():
    assert health.round_metrics("M1", [{"prompt_id": "p", "prompt": "Q"}], [], [], [])[0]["value"] == 0


@pytest.mark.parametrize(
    "drops,says",
    [
        ({"few_scored": 3, "tie": 1}, "n_candidates"),
        ({"few_scored": 0, "tie": 2}, "hardly any two scores are equal"),
        ({"few_scored": 1, "low_score": 2}, "positive_min_score"),
        ({"few_scored": 0, "rewards_disagree": 2}, "read the candidates"),
        ({"few_scored": 0}, "no prompts came"),
    ],
)
def test_what_to_do_follows_from_what_was_dropped(drops, says):
    assert says in pairs.advice(drops)


def test_a_pair_of_one_candidate_is_refused_before_a_run():
    one = {"self_instruct": {"n_candidates": 1}}
    with pytest.raises(ParamError, match="n_candidates: found 1, and a pair is made of two"):
        list_steps(Experiment(one))
    list_steps(Experiment(one | {"common": {"learn_from": "positives"}}))
    list_steps(Experiment({"self_instruct": {"n_candidates": 1, "anchor_model": "M0"}}))


def test_rewards_that_contradict_each_other_are_an_ailment():
    def of(agree):
        return [{"metric": "reward_consistency", "value": agree}]

    assert health.ailments(of(0.51), {}, weighed=True) == [] == health.ailments(of(None), {}, weighed=True)
    assert "the other way round" in health.ailments(of(0.33), {}, weighed=True)[0] and not health.ailments(of(0.33), {})


def test_an_answer_that_was_cut_off_is_not_chosen():
    prompts, cands, judged = case([5.0, 3.0, 1.0])
    cands[0]["ended"] = False
    (pair,), drops = pairs.build_pairs(prompts, cands, judged, chosen_ended=True)
    assert (pair["chosen_id"], pair["rejected_id"], sum(drops.values())) == ("p-1", "p-2", 0)
    cands[2]["ended"] = False  # may still be rejected
    assert pairs.build_pairs(prompts, cands, judged, chosen_ended=True)[0] == [pair | {"rejected_ended": False}]
    for rule in ("random", "longer", "shorter", "length_control"):
        made, _ = pairs.build_pairs(prompts, cands, judged, chosen_ended=True, rule=rule)
        assert all(p["chosen_id"] == "p-1" for p in made)
    judged[1]["score"] = 0.5  # the only one that ended is the worst
    for rule in ("score", "random"):
        made, drops = pairs.build_pairs(prompts, cands, judged, chosen_ended=True, rule=rule)
        assert made == [] and (drops["none_ended"], drops["tie"]) == (1, 0)
    alike = [j | {"score": 2.0} for j in judged]
    assert pairs.build_pairs(prompts, cands, alike, chosen_ended=True)[1]["tie"] == 1
    cands[1]["ended"] = False
    assert pairs.build_pairs(prompts, cands, judged, chosen_ended=True)[1]["none_ended"] == 1
    assert pairs.build_pairs(prompts, cands, judged)[0][0]["chosen_id"] == "p-0"


def test_a_pair_of_one_form_is_of_two_lists_or_of_none():
    texts = ["- a\n- b", "- c", "prose", "more prose", "- d"]
    prompts, cands, judged = case([5.0, 2.5, 4.0, 1.0, 3.0], texts)
    (pair,), drops = pairs.build_pairs(prompts, cands, judged, same_form=True)
    assert (pair["chosen_id"], pair["rejected_id"]) == ("p-2", "p-3")  # 3 points apart, the lists 2.5
    assert sum(drops.values()) == 0 and "other_form" not in pairs.build_pairs(prompts, cands, judged)[1]
    for rule in ("random", "longer", "shorter", "length_control"):
        (p,), _ = pairs.build_pairs(prompts, cands, judged, same_form=True, rule=rule)
        assert has_list(p["chosen"]) == has_list(p["rejected"])
    cands[2]["ended"] = False  # may be rejected, not chosen: what is left are the lists
    (pair,), _ = pairs.build_pairs(prompts, cands, judged, same_form=True, chosen_ended=True)
    assert (pair["chosen_id"], pair["rejected_id"]) == ("p-0", "p-1")
    made, drops = pairs.build_pairs(*case([5.0, 1.0], ["- a", "prose"]), same_form=True)
    assert made == [] and drops["other_form"] == 1
    assert pairs.build_pairs(*case([2.0, 2.0], ["- a", "prose"]), same_form=True)[1]["tie"] == 1
    near = case([5.0, 4.9], ["- a", "prose"])
    assert pairs.build_pairs(*near, same_form=True, min_margin=0.5)[1]["small_margin"] == 1
    # whatever the prose scores, the two lists are as near as that, or tied
    lists = ["- a", "- b", "prose"]
    assert pairs.build_pairs(*case([5.0, 4.8, 1.0], lists), same_form=True, min_margin=0.5)[1]["small_margin"] == 1
    assert pairs.build_pairs(*case([5.0, 5.0, 1.0], lists), same_form=True)[1]["other_form"] == 1
    one_text = case([5.0, 1.0, 4.0, 2.0], ["- a", "- a", "prose", "more"])
    assert pairs.build_pairs(*one_text, same_form=True)[0][0]["chosen_id"] == "p-2"


def test_drafts_and_anchors_make_pairs_of_one_form_too():
    prompts, cands, judged = case([5.0, 3.0, 2.0, 0.5], ["- of a draft", "- own", "own", "an anchor's"])
    cands[0]["author"], cands[3]["author"] = "F2", "M0"
    (pair,), _ = pairs.build_pairs(prompts, cands, judged, same_form=True)
    assert (pair["chosen_id"], pair["rejected_id"]) == ("p-0", "p-1")  # 2 points apart, own and anchor's 1.5
