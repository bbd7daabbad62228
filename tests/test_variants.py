"""The method's variants and controls: what each overlay changes, on rows made by hand."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from scipy import stats

from srlm_utils import chat, health, implicit, pairs, train
from srlm_utils.answers import write_answers
from srlm_utils.artefacts import RowLog
from srlm_utils.errors import DataError, ParamError
from srlm_utils.params import Experiment
from srlm_utils.paths import PARAMS
from srlm_utils.plan import fingerprint, list_steps, make_step
from srlm_utils.step import maker
from srlm_utils.tokens import step_tokens
from tests.test_pairs import case
from tests.test_train import log_probs

TEXTS = ["aa", "a", "aaaa", "aaa"]  # 1 is the shortest, 2 the longest


def steps(tree):
    return {s.name: s for s in list_steps(Experiment(tree))}


@pytest.mark.parametrize(
    "rule,chosen,rejected", [("score", "p-0", "p-3"), ("longer", "p-2", "p-1"), ("shorter", "p-1", "p-2")]
)
def test_who_wins_by_rule(rule, chosen, rejected):
    (pair,), drops = pairs.build_pairs(*case([5.0, 3.0, 2.0, 1.0], TEXTS), rule=rule)
    assert (pair["chosen_id"], pair["rejected_id"]) == (chosen, rejected) and not sum(drops.values())
    assert pair["chosen"] == TEXTS[int(chosen[-1])]
    assert pair["chosen_score"] == {"p-0": 5.0, "p-1": 3.0, "p-2": 2.0}[chosen]


def test_random_pairs_go_by_the_seed_and_not_by_score_or_place():
    prompts, cands, judged = case([5.0, 3.0, 2.0, 1.0], TEXTS)
    found = [pairs.build_pairs(prompts, cands, judged, seed=s, rule="random")[0][0] for s in range(300)]
    again = pairs.build_pairs(prompts, cands[::-1], judged[::-1], seed=7, rule="random")[0][0]
    assert again == found[7]
    counts = {(p["chosen_id"], p["rejected_id"]): 0 for p in found}
    for p in found:
        counts[p["chosen_id"], p["rejected_id"]] += 1
    assert len(counts) == 12 and min(counts.values()) > 8 and max(counts.values()) < 50  # 25 expected of each


@pytest.mark.parametrize("preset", ["quickstart", "standard"])
@pytest.mark.parametrize(
    "overlay,chosen",
    [("", "p-3"), ("paper_pairs", "p-0"), ("longer_wins", "p-2"), ("shorter_wins", "p-1"), ("random_ended", "p-3")],
)
def test_what_presets_and_their_controls_may_choose(preset, overlay, chosen):
    prompts, cands, judged = case([5.0, 4.0, 1.0, 3.0], TEXTS)  # p-3 alone ended by itself
    cands = [c | {"ended": c["cand_id"] == "p-3"} for c in cands]
    files = [PARAMS / f"{preset}.yaml", *([PARAMS / "variants" / f"{overlay}.yaml"] if overlay else [])]
    p = Experiment.load(files).flat("06_build_pairs", "M1")
    (pair,), _ = pairs.build_pairs(prompts, cands, judged, rule=p["pair_rule"], chosen_ended=p["chosen_ended"])
    assert pair["chosen_id"] == chosen


def test_the_random_control_chooses_among_all():
    p = Experiment.load([PARAMS / "quickstart.yaml", PARAMS / "variants" / "random_pairs.yaml"])
    p = p.flat("06_build_pairs", "M1")
    assert (p["pair_rule"], p["chosen_ended"]) == ("random", False)


@pytest.mark.parametrize("rule", ["random", "longer", "shorter", "length_control"])
def test_every_rule_learns_from_the_prompts_that_the_papers_rule_keeps(rule):
    parts = [
        case([4, 1, 2], TEXTS, pid="kept"),
        case([3, 3, 3], TEXTS, pid="tied"),
        case([3, None], TEXTS, pid="few"),
        case([3, 2.9], TEXTS, pid="near"),
        case([4, 1], ["same", "same"], pid="same"),
        case([4, 1, 2], ["", "b", "cc"], pid="empty"),
    ]
    prompts, cands, judged = ([r for p in parts for r in p[k]] for k in range(3))
    made, drops = pairs.build_pairs(prompts, cands, judged, min_margin=0.5, rule=rule)
    of_paper, drops_of_paper = pairs.build_pairs(prompts, cands, judged, min_margin=0.5)
    assert [p["prompt_id"] for p in made] == [p["prompt_id"] for p in of_paper] == ["kept"]
    assert {k: drops[k] for k in drops_of_paper} == drops_of_paper


def test_controls_take_no_unscored_candidate_and_choose_no_empty_one():
    prompts, cands, judged = case([None, 3.0, 1.0, 2.0], ["a" * 9, "aaa", "", "aa"])
    for seed in range(20):
        for rule in ("random", "longer", "shorter"):
            (pair,), _ = pairs.build_pairs(prompts, cands, judged, seed=seed, rule=rule)
            assert pair["chosen"] in ("aa", "aaa") and pair["rejected_id"] != "p-0"
    shorter = pairs.build_pairs(prompts, cands, judged, rule="shorter")[0][0]
    assert (shorter["chosen"], shorter["rejected"]) == ("aa", "aaa")
    assert pairs.build_pairs(prompts, cands, judged, rule="longer")[0][0]["rejected"] == ""


@pytest.mark.parametrize("rule", ["longer", "shorter"])
def test_length_decides_nothing_among_equals(rule):
    made, drops = pairs.build_pairs(*case([4.0, 1.0], ["ab", "cd"]), rule=rule)
    assert made == [] and drops["same_length"] == 1 == sum(drops.values())


@pytest.mark.parametrize("rule", ["longer", "shorter", "length_control"])
def test_the_seed_decides_among_equal_lengths_not_the_order_of_rows(rule):
    prompts, cands, judged = case([4.0, 4.0, 1.0, 1.0], ["aa", "bb", "c", "d"])

    def picked(*rows):
        made = [pairs.build_pairs(*rows, seed=seed, rule=rule)[0][0] for seed in range(20)]
        return [(p["chosen_id"], p["rejected_id"]) for p in made]

    assert picked(prompts, cands, judged) == picked(prompts, cands[::-1], judged[::-1])
    assert len({*picked(prompts, cands, judged)}) == 4


def test_length_control_by_hand():
    texts = ["aaaa", "aa", "aaa", "a", "aaaaa"]
    rows = case([5.0, 4.0, 3.0, 1.5, 1.0], texts)
    # rho 0.3 of 4 points: good from 3.8 (4 and 2 characters), bad up to 2.2 (1 and 5)
    (pair,), _ = pairs.build_pairs(*rows, rule="length_control", length_rho=0.3)
    assert (pair["chosen_id"], pair["rejected_id"]) == ("p-1", "p-4")
    # rho 0.2: good from 4.2 alone; rho 0.1: bad up to 1.4 alone
    assert pairs.build_pairs(*rows, rule="length_control", length_rho=0.2)[0][0]["chosen_id"] == "p-0"
    swapped = case([5.0, 4.0, 3.0, 1.5, 1.0], ["aaaa", "aa", "aaa", "aaaaa", "a"])
    got = [pairs.build_pairs(*swapped, rule="length_control", length_rho=r)[0][0]["rejected_id"] for r in (0.3, 0.1)]
    assert got == ["p-3", "p-4"]
    # rho 0 is the paper's rule, with length among equals
    tied = case([5.0, 5.0, 1.0, 1.0], ["aa", "a", "b", "bb"])
    (pair,), _ = pairs.build_pairs(*tied, rule="length_control", length_rho=0.0)
    assert (pair["chosen"], pair["rejected"]) == ("a", "bb")


def test_length_control_takes_the_better_score_of_equal_lengths():
    rows = case([5.0, 4.9, 1.1, 1.0], ["ab", "cd", "ef", "gh"])
    for seed in range(9):
        (pair,), _ = pairs.build_pairs(*rows, seed=seed, rule="length_control", length_rho=0.3)
        assert (pair["chosen_id"], pair["rejected_id"]) == ("p-0", "p-3")


def test_a_text_that_is_both_the_shortest_good_and_the_longest_bad_makes_no_pair():
    rows = case([5.0, 4.5, 1.0, 1.0], ["aaaa", "bb", "bb", "c"])  # the judge was of two minds about "bb"
    assert pairs.build_pairs(*rows, rule="length_control", length_rho=0.3)[1]["same_text"] == 1
    assert pairs.build_pairs(*rows)[0][0]["chosen"] == "aaaa"


def test_length_control_never_prefers_the_worse_score_or_an_empty_answer():
    rows = case([5.0, 4.9, 3.0, 2.9], ["aaa", "", "aa", "a"])
    (pair,), _ = pairs.build_pairs(*rows, rule="length_control", length_rho=0.49)
    assert (pair["chosen"], pair["rejected"]) == ("aaa", "aa")
    with pytest.raises(ParamError, match="length_rho = 0.5"):
        Experiment({"build_pairs": {"length_rho": 0.5}})


def test_a_frozen_judge_is_what_the_judging_step_reads():
    default, frozen = steps({}), steps({"judge": {"judge_model": "M1"}})
    assert "M2/model" in default["05_judge@M2"].reads
    assert "M1/model" in frozen["05_judge@M2"].reads and "M2/model" not in frozen["05_judge@M2"].reads
    assert frozen["05_judge@M1"] == default["05_judge@M1"]
    assert steps({"judge": {"judge_model": "a/b"}})["05_judge@M2"].reads[0] == "M2/aift/prompts.jsonl"
    for judge, says in (("M2", "M2 does not exist yet when the candidates of M1"), ("outside", "it would be inside")):
        with pytest.raises(ParamError, match=says):
            steps({"judge": {"judge_model": judge}})
    only_later = {"by_model": {"M2": {"judge": {"judge_model": "M2"}}}}
    assert steps(only_later)["05_judge@M2"] == default["05_judge@M2"]


def test_a_judges_folder_counts_by_its_contents(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    params = Experiment({"judge": {"judge_model": str(tmp_path)}}).flat("05_judge", "M1")
    step = make_step("05_judge", "M1", params)
    run = tmp_path / "run"
    for path in step.reads:
        (run / path).parent.mkdir(parents=True, exist_ok=True)
        (run / path).write_text("{}\n")
    before = fingerprint(step, params, run)["inputs"]
    (tmp_path / "config.json").write_text("{ }")
    assert fingerprint(step, params, run)["inputs"] != before


def test_without_eft_m1_learns_from_ift_alone():
    default, without = steps({}), steps({"sft": {"use_eft": False}})
    assert set(default) - set(without) == {"03_build_eft@SFT"} and not set(without) - set(default)
    assert without["02_sft@M1"].reads == ("M0/model.json", "seed/ift.jsonl")
    assert default["02_sft@M1"].reads == ("M0/model.json", "seed/ift.jsonl", "SFT/eft/train.jsonl")
    trained = [step_tokens(s["02_sft@M1"], Experiment({})) for s in (default, without)]
    assert trained[0]["trained"] > trained[1]["trained"] > 0


def test_positives_are_trained_on_and_counted():
    tree = {"common": {"learn_from": "positives", "select_steps": 5}, "sft": {"epochs": 2}}
    tree["self_instruct"] = {"n_prompts": 100, "max_new_tokens": 96}
    found = steps(tree)
    sft, m2 = (step_tokens(found[f"02_sft@{m}"], Experiment(tree)) for m in ("SFT", "M2"))
    assert m2["trained"] - sft["trained"] == 2 * 100 * (30 + 30 + 80)  # chat, prompt and answer, in two passes
    assert m2["generated"] > sft["generated"]  # more rows are more checkpoints that answer
    assert step_tokens(found["02_sft@M3"], Experiment(tree)) == m2  # a round's own positives, not those before


def test_replay_reads_the_pairs_of_all_rounds_before():
    tree = {"common": {"iterations": 4}, "dpo": {"replay": 0.5}}
    found = steps(tree)
    assert found["07_dpo@M2"] == steps({"common": {"iterations": 4}})["07_dpo@M2"]
    assert found["07_dpo@M4"].reads == ("M3/model", *(f"M{i}/aift/pairs.jsonl" for i in (3, 2, 1)))
    costs = [step_tokens(found[f"07_dpo@M{i}"], Experiment(tree))["trained"] for i in (2, 3, 4)]
    assert costs == [costs[0], 1.5 * costs[0], 2 * costs[0]]
    tree["dpo"] |= {"select_steps": 2, "select_judge": "M0:score"}  # and more checkpoints are compared
    found = steps(tree)
    written = [step_tokens(found[f"07_dpo@M{i}"], Experiment(tree))["generated"] for i in (2, 3, 4)]
    assert written[0] < written[1] < written[2]


def test_a_share_of_old_pairs_is_picked_by_the_seed():
    old = [{"prompt_id": f"p{i}"} for i in range(9)]
    assert pairs.replayed(old, 1.0) == old and pairs.replayed(old, 0.0) == []
    assert len(pairs.replayed(old, 0.75)) == 7  # of 6.75
    picked = {tuple(p["prompt_id"] for p in pairs.replayed(old, 0.5, seed)) for seed in range(9)}
    assert {len(ids) for ids in picked} == {4} and len(picked) > 5
    again = pairs.replayed(old[::-1], 0.5, 3)
    assert again[::-1] == pairs.replayed(old, 0.5, 3)


def with_others(own, others, author, texts=None):
    """One prompt whose candidates are the model's own and another author's; ids p-0 .. and p-<author>-0 .."""
    prompts, cands, judged = case([*own, *others], texts)
    for i, (c, j) in enumerate(zip(cands, judged, strict=True)):
        if i >= len(own):
            c["cand_id"] = j["id"] = f"p-{author}-{i - len(own)}"
            c["author"] = author
    return prompts, cands, judged


def anchored(own, anchor, texts=None):
    return with_others(own, anchor, "M0", texts)


def drafted(own, draft, texts=None):
    return with_others(own, draft, "F2", texts)


@pytest.mark.parametrize(
    "own,anchor,chosen,rejected",
    [
        ([4.0, 2.0], [3.0, 1.0], "p-0", "p-M0-1"),
        ([4.0, 1.0], [3.0, 2.0], "p-0", "p-1"),
        ([4.0, 2.0], [5.0, 2.0], "p-0", "p-1"),  # only below, and never chosen
        ([4.0], [3.0, None], "p-0", "p-M0-0"),
    ],
)
def test_the_anchors_worst_is_rejected_where_it_is_below_the_models_own(own, anchor, chosen, rejected):
    (pair,), _ = pairs.build_pairs(*anchored(own, anchor))
    assert (pair["chosen_id"], pair["rejected_id"]) == (chosen, rejected)


def test_an_anchors_answers_are_no_choice_whatever_the_rule():
    rows = anchored([3.0, 2.0], [5.0, 1.0], ["aa", "aaa", "a", "aaaa"])
    for rule in ("score", "length_control", "random", "longer", "shorter"):
        for seed in range(9):
            (pair,), _ = pairs.build_pairs(*rows, seed=seed, rule=rule, length_rho=0.1)
            assert pair["chosen_id"] in ("p-0", "p-1"), rule
    assert pairs.build_pairs(*anchored([None], [5.0, 1.0]))[1]["few_scored"] == 1
    assert pairs.build_pairs(*anchored([1.0], [5.0]))[1]["tie"] == 1  # the best of its own is the worst of all
    assert pairs.build_positives(*anchored([3.0], [5.0]))[1]["low_score"] == 1


def test_an_anchor_is_read_answers_and_leaves_the_vital_signs_alone():
    default, found = steps({}), steps({"self_instruct": {"anchor_model": "M0"}})
    assert {*found["04_self_instruct@M2"].reads} - {*default["04_self_instruct@M2"].reads} == {"M0/model.json"}
    for anchor in ("M1", "M2", "a/b"):
        with pytest.raises(ParamError, match="a model that was there before M1: M0, SFT"):
            steps({"self_instruct": {"anchor_model": anchor}})
    own, both = case([4.0, 2.0]), anchored([4.0, 2.0], [1.0, 1.0])
    rows = [
        {r["metric"]: r["value"] for r in health.round_metrics("M1", *x, pairs.build_pairs(*x)[0])} for x in (own, both)
    ]
    assert rows[0] == rows[1]


def test_an_anchors_answers_carry_its_name(engine, tmp_path):
    sampling = {"max_new_tokens": 4, "temperature": 1.0, "top_p": 1.0, "seed": 0}
    bar = SimpleNamespace(update=lambda n: None)
    step = SimpleNamespace(
        params=SimpleNamespace(**sampling),
        log=lambda name: RowLog(tmp_path / name),
        progress=lambda *_: contextlib.nullcontext(bar),
    )
    prompts = [{"prompt_id": f"M1-p000{i}", "prompt": "Q"} for i in range(3)]
    found = write_answers(step, engine, prompts, n=2, log="a.jsonl", author="M0")
    assert [r["cand_id"] for r in found] == [f"M1-p000{i}-M0-{j}" for i in range(3) for j in range(2)]
    assert [(r["prompt_id"], r["author"]) for r in found[::2]] == [(p["prompt_id"], "M0") for p in prompts]
    own = write_answers(step, engine, prompts, n=2, log="b.jsonl")
    assert [r["cand_id"] for r in own[:2]] == ["M1-p0000-0", "M1-p0000-1"] and "author" not in own[0]
    assert [r["text"] for r in own] != [r["text"] for r in found]  # random numbers of their own
    idle = SimpleNamespace(tokenizer=engine.tokenizer, generate=lambda requests, **_: iter(requests))
    assert write_answers(step, idle, prompts, n=2, log="a.jsonl", author="M0") == found  # nothing is asked twice


def test_a_draft_comes_before_its_model_and_is_made_as_it_is():
    tree = {"common": {"iterations": 4}, "dpo": {"future_chosen": True, "replay": 0.5}}
    tree["by_model"] = {"M3": {"dpo": {"learning_rate": 3e-5}}, "M2": {"judge": {"rubric": "additive", "top_p": 0.5}}}
    tree["by_model"]["M2"]["build_pairs"] = {"min_margin": 0.5}
    found, experiment = steps(tree), Experiment(tree)
    order = [name for name in found if name.split("@")[1] in ("M1", "F2", "M2")][2:]
    assert order == [
        "04_self_instruct@M1", "05_judge@M1", "06_build_pairs@M1", "07_dpo@F2", "13_future@F2", "06_build_pairs@F2",
        "07_dpo@M2", "08_evaluate@M2", "04_self_instruct@M2", "05_judge@M2", "06_build_pairs@M2",
    ]  # fmt: skip
    assert found["07_dpo@F3"].reads == ("M2/model", "M2/aift/pairs.jsonl", "F2/aift/pairs.jsonl")
    of_round = [f"M2/aift/{name}.jsonl" for name in ("prompts", "candidates", "judgements")]
    assert found["13_future@F3"].reads == ("F3/model", "M2/model", *of_round)
    assert found["06_build_pairs@F3"].reads == found["13_future@F3"].writes
    assert found["07_dpo@M3"].reads == ("M2/model", "F3/aift/pairs.jsonl", "F2/aift/pairs.jsonl")
    assert "F4/aift/health.json" in found["09_report@run"].reads
    draft, own = (experiment.flat("07_dpo", model) for model in ("F3", "M3"))
    assert draft | {"model": "M3"} == own and own["learning_rate"] == 3e-5
    assert experiment.flat("06_build_pairs", "F3")["min_margin"] == 0.5
    flat, judging = experiment.flat("13_future", "F3"), experiment.flat("05_judge", "M2")
    assert flat["rubric"] == "additive" == judging["rubric"] and flat["judge_top_p"] == 0.5 == judging["top_p"]
    assert flat["top_p"] == experiment.flat("04_self_instruct", "M2")["top_p"] == 0.9
    assert not any("F" in name.replace("SFT", "") for name in steps({}))
    costs = [step_tokens(found[name], experiment) for name in ("13_future@F3", "04_self_instruct@M2")]
    assert 0 < costs[0]["generated"] < costs[1]["generated"] and costs[0]["judged"] > 0
    assert maker("F3/aift/candidates.jsonl") == "13_future@F3" and maker("F2/model") == "07_dpo@F2"


@pytest.mark.parametrize(
    "tree,says",
    [
        ({"future": {"n_candidates": 2}}, "unknown section 'future'"),
        ({"common": {"judge_temperature": 0.5}}, "unknown parameter common.judge_temperature"),
        ({"common": {"learn_from": "positives"}}, "does nothing with learn_from: positives"),
        (
            {"dpo": {"replay": 0.5, "future_chosen": False}, "by_model": {"M3": {"dpo": {"future_chosen": True}}}},
            "M3 a",
        ),
        ({"judge": {"dtype": "float32"}}, "Set common.dtype"),
        ({"judge": {"implicit_reference": "M0"}, "build_pairs": {"implicit_rule": "agree"}}, "no implicit reward"),
    ],
)
def test_drafts_that_cannot_be(tree, says):
    with pytest.raises(ParamError, match=says):
        steps({"dpo": {"future_chosen": True}} | tree)


@pytest.mark.parametrize(
    "own,draft,chosen,rejected",
    [
        ([4.0, 2.0], [5.0, 4.5], "p-F2-0", "p-1"),
        ([4.0, 2.0], [4.0, 1.0], "p-0", "p-1"),  # as good is not better, and the draft's are never rejected
        ([3.0, 3.0], [3.5, 1.0], "p-F2-0", None),  # its own tie, and there is a pair all the same
        ([3.0, None], [3.5, None], "p-F2-0", "p-0"),
    ],
)
def test_a_drafts_answer_is_chosen_where_it_scores_higher(own, draft, chosen, rejected):
    (pair,), _ = pairs.build_pairs(*drafted(own, draft))
    assert pair["chosen_id"] == chosen and pair["rejected_id"] in ([rejected] if rejected else ["p-0", "p-1"])
    assert pair["chosen_score"] == max([s for s in own + draft if s is not None])


def test_a_draft_is_rejected_by_no_rule_and_leaves_its_rounds_signs_alone():
    rows = drafted([3.0, 2.0], [5.0, 1.0], ["aa", "aaa", "a", "aaaa"])
    for rule in ("score", "length_control", "random", "longer", "shorter"):
        for seed in range(9):
            (pair,), _ = pairs.build_pairs(*rows, seed=seed, rule=rule, length_rho=0.1)
            assert pair["rejected_id"] in ("p-0", "p-1") and pair["chosen"] != pair["rejected"], rule
    for seed in range(9):  # its own single answer cannot be both
        (pair,), _ = pairs.build_pairs(*drafted([2.0], [5.0, 1.0]), seed=seed, rule="random")
        assert pair["rejected_id"] == "p-0" != pair["chosen_id"]
    assert pairs.build_pairs(*drafted([None], [5.0, 1.0]))[1]["few_scored"] == 1
    own, both = case([4.0, 2.0]), drafted([4.0, 2.0], [5.0, 1.0])
    old, new = (
        {r["metric"]: r["value"] for r in health.round_metrics("M1", *x, pairs.build_pairs(*x)[0])} for x in (own, both)
    )
    assert new.pop("draft_chosen_rate") == 1.0 and "draft_chosen_rate" not in old
    assert {k: v for k, v in new.items() if "chars" not in k} == {k: v for k, v in old.items() if "chars" not in k}
    # of a draft nothing is said that is its round's
    found = {r["metric"]: r["value"] for r in health.round_metrics("F2", *both, pairs.build_pairs(*both)[0])}
    assert {*found} == {*health.OF_A_DRAFT} and found["draft_chosen_rate"] == 1.0


def rewarded(scores, implicit, texts=None):
    prompts, cands, judged = case(scores, texts)
    return prompts, cands, [j | {"implicit": r} for j, r in zip(judged, implicit, strict=True)]


@pytest.mark.parametrize(
    "scores,implicit,found",
    [
        ([3, 2, 1], [0.3, 0.2, 0.1], 1.0),
        ([3, 2, 1], [0.1, 0.2, 0.3], 0.0),
        ([3, 2, 1], [0.3, 0.1, 0.2], 2 / 3),
        ([3, 3, 1], [0.3, 0.2, 0.1], 5 / 6),  # a tie is half
        ([3, None, 1], [0.3, 0.9, 0.1], 1.0),
        ([3, 2], [0.3, None], None),
    ],
)
def test_consistency_of_two_rewards_by_hand(scores, implicit, found):
    prompts, cands, judged = rewarded(scores, implicit)
    (of_prompt,) = pairs.scored_candidates(cands, judged).values()
    assert pairs.consistency(of_prompt) == (found if found is None else pytest.approx(found))
    if found is not None and 3 not in scores[1:] and None not in scores:
        assert found == pytest.approx((stats.kendalltau(scores, implicit).statistic + 1) / 2)
    rows = {r["metric"]: r["value"] for r in health.round_metrics("M1", prompts, cands, judged, [])}
    assert rows["reward_consistency"] == (found if found is None else pytest.approx(found))


@pytest.mark.parametrize(
    "implicit,kept", [([2.0, 9.0, -1.0], 1), ([-2.0, 9.0, -1.0], 0), ([1.0, 9.0, 1.0], 0), ([None, 9.0, -1.0], 0)]
)
def test_pairs_on_which_the_rewards_disagree_are_dropped(implicit, kept):
    made, drops = pairs.build_pairs(*rewarded([4.0, 2.0, 1.0], implicit), implicit_rule="agree")
    assert len(made) == kept == 1 - drops["rewards_disagree"] and "consistency" not in (made or [{}])[0]
    assert pairs.build_pairs(*rewarded([4.0, 2.0, 1.0], implicit))[1].get("rewards_disagree") is None


def test_rewards_that_are_not_there_are_no_disagreement():
    for rule in ("agree", "weigh"):
        with pytest.raises(DataError, match="judge.implicit_reference"):
            pairs.build_pairs(*case([4.0, 2.0]), implicit_rule=rule)


def test_pairs_of_a_round_carry_its_mean_consistency():
    parts = [rewarded([3, 1], [2.0, 1.0]), rewarded([3, 2, 1], [0.3, 0.1, 0.2])]
    for prompts, cands, judged in parts[1:]:
        prompts[0]["prompt_id"] = "q"
        for c, j in zip(cands, judged, strict=True):
            c["cand_id"] = j["id"] = f"q-{c['cand_id']}"
            c["prompt_id"] = "q"
    prompts, cands, judged = ([r for p in parts for r in p[k]] for k in range(3))
    made, _ = pairs.build_pairs(prompts, cands, judged, implicit_rule="weigh")
    assert [p["consistency"] for p in made] == pytest.approx([(1 + 2 / 3) / 2] * 2)


def test_a_rounds_consistency_is_of_the_models_own_answers():
    prompts, cands, judged = rewarded([3.0, 1.0, 0.0], [2.0, 1.0, 9.0])
    cands[2]["author"] = "M0"  # the two rewards order the anchor's answer the other way round: that is not the model's
    lone = case([2.0], pid="q")  # one answer has no order
    rows = [prompts + lone[0], cands + lone[1], judged + [j | {"implicit": 0.5} for j in lone[2]]]
    (pair,), _ = pairs.build_pairs(*rows, implicit_rule="weigh")
    assert (pair["rejected_id"], pair["consistency"]) == ("p-2", 1.0)


def test_pairs_that_nothing_weighs_are_refused():
    prompts, cands, judged = rewarded([3.0, 1.0], [2.0, 1.0])
    cands[1]["author"] = "M0"  # each prompt has one answer of the model's own, and an anchor's
    with pytest.raises(DataError, match="raise self_instruct.n_candidates"):
        pairs.build_pairs(prompts, cands, judged, implicit_rule="weigh")
    one = {"self_instruct": {"n_candidates": 1, "anchor_model": "M0"}, "judge": {"implicit_reference": "M0"}}
    steps(one | {"build_pairs": {"implicit_rule": "agree"}})
    with pytest.raises(ParamError, match="implicit_rule: weigh .*n_candidates to 2 or more"):
        steps(one | {"build_pairs": {"implicit_rule": "weigh"}})


@pytest.mark.parametrize("c", [1.0, 0.8, 0.5, 0.0])
@pytest.mark.parametrize("nll", [0.0, 0.5])
def test_trls_losses_add_up_to_the_weighed_one(c, nll):
    args = train.weighed_losses(c, nll)
    if (c, nll) == (1.0, 0.0):
        assert args["loss_type"] == ["sigmoid"] and args["loss_weights"] == [1.0]
    z, e = torch.linspace(-3, 3, 13), args["label_smoothing"]
    right, wrong = -torch.nn.functional.logsigmoid(z), -torch.nn.functional.logsigmoid(-z)
    made_of = {"sigmoid": right, "robust": ((1 - e) * right - e * wrong) / (1 - 2 * e), "sft": torch.full_like(z, 7.0)}
    found = sum(w * made_of[name] for name, w in zip(args["loss_type"], args["loss_weights"], strict=True))
    torch.testing.assert_close(found, c * right + (1 - c) * wrong + nll * 7.0, atol=1e-5, rtol=1e-5)


def test_the_implicit_reward_is_the_summed_log_ratio(engine, tmp_path):
    other = copy.copy(engine)
    other.model = copy.deepcopy(engine.model)
    with torch.no_grad():
        other.model.get_input_embeddings().weight.add_(0.05)
    engines, bar = {"M1": other, "M0": engine}, SimpleNamespace(update=lambda n: None)
    step = SimpleNamespace(
        engine=engines.get,
        log=lambda name: RowLog(tmp_path / name),
        progress=lambda *_: contextlib.nullcontext(bar),
    )
    texts = [("a", "An apple is a fruit.", True), ("b", "Cut off", False), ("c", "", False), ("d", "", True)]
    cands = [{"cand_id": i, "prompt_id": "p", "text": t, "ended": e} for i, t, e in texts]
    found = implicit.rewards(step, "M1", "M0", {"p": "Name a fruit."}, cands)
    assert set(found) == {"a", "b", "d"}  # nothing was written of c
    tok = engine.tokenizer
    prompt = chat.prompt_ids(tok, chat.user("Name a fruit."))
    for i, text, ended in texts[:2]:
        ids = chat.answer_ids(tok, text, ended=ended)
        by_hand = log_probs(other.model, prompt, ids) - log_probs(engine.model, prompt, ids)
        assert found[i] == pytest.approx(by_hand, abs=1e-3) and abs(by_hand) > 1e-2
    assert implicit.rewards(step, "M1", "M0", {"p": "Name a fruit."}, cands) == found


def test_a_likelihood_that_is_there_is_not_asked_for_again(tmp_path, monkeypatch):
    monkeypatch.setattr(implicit.chat, "prompt_ids", lambda tokenizer, messages: [0])
    monkeypatch.setattr(implicit.chat, "answer_ids", lambda tokenizer, text, ended: [1] * (len(text) + ended))
    asked = []

    def target_logprobs(requests):
        asked.extend(key for key, *_ in requests)
        yield [(key, [-0.5] * len(ids)) for key, _, ids in requests]

    step = SimpleNamespace(
        engine=lambda name: SimpleNamespace(tokenizer=None, target_logprobs=target_logprobs),
        log=lambda name: RowLog(tmp_path / name),
        progress=lambda *_: contextlib.nullcontext(SimpleNamespace(update=lambda n: None)),
    )
    RowLog(tmp_path / "likelihoods_M1.jsonl").extend([{"id": "a", "logprob": -9.0}])
    cands = [{"cand_id": i, "prompt_id": "p", "text": "abc", "ended": i == "b"} for i in "abc"]
    found = implicit.log_likelihoods(step, "M1", {"p": "Q"}, cands)
    assert asked == ["b", "c"] and found == {"a": -9.0, "b": -2.0, "c": -1.5}
    assert implicit.log_likelihoods(step, "M1", {"p": "Q"}, cands) == found and len(asked) == 2


def test_the_implicit_reward_needs_an_earlier_model():
    tree = {"judge": {"implicit_reference": "M0", "judge_model": "a/b"}, "build_pairs": {"implicit_rule": "agree"}}
    assert steps(tree)["05_judge@M2"].reads[:2] == ("M2/model", "M0/model.json")
    with pytest.raises(ParamError, match="implicit_rule needs judge.implicit_reference"):
        steps({"build_pairs": {"implicit_rule": "weigh"}})
    with pytest.raises(ParamError, match="implicit_reference: found 'M1', expected a model that was there before M1"):
        steps({"judge": {"implicit_reference": "M1"}})


def test_health_names_who_judged():
    prompts, cands, judged = case([1.0, 3.0])
    judged = [j | {"judge": "M1"} for j in judged]
    assert {r["judge"] for r in health.round_metrics("M2", prompts, cands, judged, [])} == {"M1"}
