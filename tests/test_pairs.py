import pytest

from srlm_utils import health, pairs


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
    assert pairs.build_positives(*case([5.0], ended=False))[1]["few_scored"] == 1


def test_health_figures():
    prompts, cands, judged = case([1.0, 3.0])
    made, _ = pairs.build_pairs(prompts, cands, judged)
    rows = {r["metric"]: r for r in health.round_metrics("M1", prompts, cands, judged, made)}
    assert rows["pair_yield"]["value"] == 1
    assert rows["candidate_score_std"]["value"] == pytest.approx(2**0.5)  # of 1 and 3
    assert rows["chosen_chars"]["value"] == len("answer 1")
    assert rows["candidate_parse_rate"]["value"] == 1
