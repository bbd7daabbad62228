import itertools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import srlm_utils
from srlm_utils import evaluate, metrics, report
from srlm_utils.paths import EXAMPLE

NUMBERS = itertools.count()


def prompt(ranks, scores, lengths=None, text=None):
    """A ranking, of a prompt of its own unless `text` says which."""
    text = text or f"prompt {next(NUMBERS)}"
    return {"prompt": text, "ranks": ranks, "scores": scores, "lengths": lengths or [10] * len(ranks)}


def values(*prompts):
    return {k: v["value"] for k, v in metrics.agreement(list(prompts)).items()}


def test_agreement_by_hand():
    # pairs (better, worse): 0>1 right, 0>2 right, 1>2 wrong; second prompt: one pair, tied
    found = metrics.agreement([prompt([0, 1, 2], [4, 1, 2], [9, 5, 7]), prompt([0, 1], [3, 3], [4, 8])])
    assert found["pairwise_accuracy"]["value"] == pytest.approx(2 / 3) and found["pairwise_accuracy"]["n"] == 3
    assert found["tie_rate"]["value"] == pytest.approx(1 / 4)
    assert found["pairwise_accuracy_half_ties"]["value"] == pytest.approx(2.5 / 4)
    assert found["longer_baseline"]["value"] == pytest.approx(2 / 4)  # 9>5, 9>7 right; 5>7, 4>8 wrong
    assert found["exact_match"]["value"] == 0
    # ranks 0,1,2 against scores 4,1,2: rho = 1 - 6 * (0 + 1 + 1) / (3 * 8) = 0.5; the tied prompt counts 0
    assert found["spearman"]["value"] == pytest.approx(0.25)


def test_correlations_equal_scipys():
    rng = np.random.default_rng(0)
    for _ in range(20):
        ranks, scores = rng.permutation(5).tolist(), rng.integers(0, 4, 5).tolist()
        if len(set(scores)) == 1:
            continue
        found = values(prompt(ranks, scores))
        assert found["spearman"] == pytest.approx(stats.spearmanr(scores, [-r for r in ranks]).statistic)
        assert found["kendall"] == pytest.approx(stats.kendalltau(scores, [-r for r in ranks]).statistic)


def test_a_perfect_judge_and_its_opposite():
    ones = ("pairwise_accuracy", "pairwise_accuracy_half_ties", "similar_length_accuracy", "five_best", "exact_match")
    found = values(prompt([0, 1, 2], [5, 3, 1]))
    assert found == dict.fromkeys(ones, 1) | dict.fromkeys(("spearman", "kendall"), pytest.approx(1)) | {
        "tie_rate": 0,
        "longer_baseline": 0.5,
        "unscored_rate": 0,
        "score_beyond_length": None,  # one prompt
    }
    assert values(prompt([0, 1, 2], [1, 3, 4]))["pairwise_accuracy"] == 0


def test_pairs_of_similar_length_are_those_within_a_fifth():
    # pairs (better, worse) by length: 100 and 80 (right), 100 and 79 (too far), 80 and 79 (tied)
    found = metrics.agreement([prompt([0, 1, 2], [4, 2, 2], [100, 80, 79])])["similar_length_accuracy"]
    assert (found["value"], found["n"]) == (0.75, 2)


def logistic_pairs(rng, a, b, n=200):
    """Prompts of three pairs whose preference follows the score by `a` and the length by `b`."""
    out = []
    for _ in range(n):
        pairs = []
        for _ in range(3):
            score, length = rng.normal(size=2)
            better = rng.random() < 1 / (1 + np.exp(-a * score - b * length))
            pairs.append((score, length) if better else (-score, -length))
        out.append(pairs)
    return out


def test_what_a_score_says_beyond_length_is_a_logistic_models_weight():
    from scipy.optimize import minimize

    pairs = logistic_pairs(np.random.default_rng(0), 0.8, 1.5)
    x = np.array([p for of_prompt in pairs for p in of_prompt])
    x = x / np.sqrt((x**2).mean(0))
    best = minimize(lambda w: np.logaddexp(0, -x @ w).sum() + (w**2).sum() / 200, np.zeros(2)).x
    found = metrics.beyond_length(pairs)
    assert found["value"] == pytest.approx(best[0], abs=1e-4) and found["n"] == 600
    assert 0 < found["low"] < found["value"] < found["high"]


@pytest.mark.parametrize("weight", [0.0, 0.8])  # 0: a score that follows length alone
def test_the_interval_of_that_weight_covers_the_planted_one(weight):
    rng, misses = np.random.default_rng(1), 0
    for _ in range(100):
        found = metrics.beyond_length(logistic_pairs(rng, weight, 1.0, n=80), n_draws=200)
        misses += not found["low"] <= weight <= found["high"]
    assert misses <= 12  # 5 are expected


def test_replies_in_perfect_order_have_a_finite_weight():
    all_right = metrics.beyond_length([[(1.0, 0.5)], [(2.0, -0.5)], [(1.5, 0.1)]])
    assert np.isfinite([all_right[k] for k in ("value", "low", "high")]).all()


def test_replies_without_a_score_are_left_out():
    found = metrics.agreement([prompt([0, 1, 2], [4, None, 2]), prompt([0, 1], [None, 3])])
    assert found["pairwise_accuracy"]["n"] == 1 and found["pairwise_accuracy"]["value"] == 1


def test_equal_human_ranks_make_no_pair():
    assert metrics.agreement([prompt([0, 0, 1], [1, 5, 0])])["tie_rate"]["n"] == 2


def test_five_best_counts_who_got_a_five():
    found = metrics.agreement([prompt([0, 1], [4.6, 4.5]), prompt([0, 1], [4.4, 1])])
    assert (found["five_best"]["value"], found["five_best"]["n"]) == (0.5, 2)


def test_nothing_to_measure_is_none_not_zero():
    found = metrics.agreement([prompt([0, 1], [None, None])])
    missed, lost = found.pop("exact_match"), found.pop("unscored_rate")
    assert (missed["value"], missed["n"], lost["value"], lost["n"]) == (0, 1, 1, 2)
    assert all(v["value"] is None and v["n"] == 0 for v in found.values())
    assert metrics.agreement([]) == dict.fromkeys(metrics.AGREEMENT, metrics.no_interval(None, 0))


def test_what_could_not_be_read_makes_no_judge_better():
    right = prompt([0, 1, 2], [5, 3, 1])
    found = metrics.agreement([right, prompt([0, 1, 2], [5, None, 1]), prompt([0, 1], [4.5, None])])
    assert (found["exact_match"]["value"], found["exact_match"]["n"]) == (pytest.approx(1 / 3), 3)
    assert (found["unscored_rate"]["value"], found["unscored_rate"]["n"]) == (0.25, 8)
    assert (found["five_best"]["value"], found["five_best"]["n"]) == (1, 3)
    assert (found["spearman"]["value"], found["spearman"]["n"]) == (pytest.approx(1), 2)


def test_intervals():
    one = metrics.ratio([1, 0, 1, 1, 0], [1, 1, 1, 1, 1])
    assert one["low"] <= one["value"] <= one["high"] and one == metrics.ratio([1, 0, 1, 1, 0], [1] * 5)
    assert metrics.ratio([1], [2]) == {"value": 0.5, "low": None, "high": None, "n": 2}
    assert metrics.ratio([0, 0], [0, 0])["value"] is None


@pytest.mark.parametrize("n", [20, 64])
def test_means_of_numbers_that_are_no_shares_cover(monkeypatch, n):
    monkeypatch.setattr(metrics, "N_BOOTSTRAP", 1000)
    rng = np.random.default_rng(1)
    figures = [metrics.mean(rng.gamma(4, 0.5, n)) for _ in range(2000)]
    assert 0.93 <= np.mean([f["low"] <= 2 <= f["high"] for f in figures]) <= 0.97


@pytest.mark.parametrize("n", [10, 20, 64, 200])
@pytest.mark.parametrize("centre,spread", [(0.3, 1), (2, 1.5)])  # accuracy 0.56 and 0.81
def test_pairwise_accuracy_over_prompts_of_one_to_six_pairs_covers(n, centre, spread):
    def right(rng, n):  # prompts differ in how hard they are
        return 1 / (1 + np.exp(-centre - spread * rng.normal(size=n)))

    truth = right(np.random.default_rng(0), 1_000_000).mean()
    rng, hits = np.random.default_rng(1), []
    for _ in range(2000):
        pairs = rng.integers(1, 7, n)
        m = metrics.ratio(rng.binomial(pairs, right(rng, n)), pairs)
        hits.append(m["low"] <= truth <= m["high"])
    assert 0.93 <= np.mean(hits) <= 0.97


@pytest.mark.parametrize("n", [2, 12, 200])
def test_what_is_always_so_has_an_exact_bound(n):
    least = 0.05 ** (1 / n)  # a share whose n trials all succeed in 5 % of cases
    always, never, ties = (metrics.mean([v] * n) for v in (True, 0.0, 0.5))
    assert (always["value"], always["low"], always["high"]) == (1, pytest.approx(least), 1)
    assert (never["value"], never["low"], never["high"]) == (0, 0, pytest.approx(1 - least))
    assert (ties["low"], ties["high"]) == pytest.approx((0.5 * least, 1 - 0.5 * least))


def test_a_bound_counts_prompts_and_a_prompt_of_many_rows_makes_them_fewer():
    assert metrics.ratio([3] * 8, [3] * 8)["low"] == pytest.approx(0.05 ** (1 / 8))
    assert metrics.ratio([9, 1, 1, 1], [9, 1, 1, 1])["low"] == pytest.approx(0.05 ** (84 / 144))


def test_numbers_that_are_no_shares_have_no_bound():
    flat = metrics.mean([0.0] * 12, share=False)
    assert flat["low"] == flat["high"] == 0
    found = metrics.agreement([prompt([0, 1], [3, 3]) for _ in range(12)])
    assert found["spearman"]["high"] == 0 and found["exact_match"]["high"] > 0.2


def verdict(pid, order, p_first):
    return {"prompt_id": pid, "order": order, "p_first": p_first}


def test_both_orders_must_agree():
    rows = [
        *(verdict("win", o, p) for o, p in (("AB", 0.9), ("BA", 0.2))),  # A first: A; B first: not B
        *(verdict("loss", o, p) for o, p in (("AB", 0.1), ("BA", 0.7))),
        *(verdict("tie", o, p) for o, p in (("AB", 0.9), ("BA", 0.9))),  # the first one, whoever it is
        verdict("alone", "none", 1.0),
    ]
    assert metrics.outcomes(rows) == {"win": 1.0, "loss": 0.0, "tie": 0.5, "alone": 1.0}
    found = {k: v["value"] for k, v in metrics.head_to_head(rows).items()}
    assert found["win_rate"] == pytest.approx(2.5 / 4)
    assert (found["win"], found["tie"], found["loss"]) == (0.5, 0.25, 0.25)
    # shown first and preferred: yes no, no yes, yes yes
    assert found["first_position_rate"] == pytest.approx(4 / 6)
    assert found["order_disagreement"] == pytest.approx(1 / 3)


def test_a_reply_that_says_nothing_is_no_tie():
    rows = [verdict(pid, o, float(o == "AB")) for pid in ("win", "mute") for o in ("AB", "BA")]
    rows[-1] |= {"p_first": 0.5, "unread": True}
    assert metrics.outcomes(rows) == {"win": 1.0}
    assert metrics.outcomes(pd.DataFrame(rows).to_dict("records")) == {"win": 1.0}  # as the report reads them
    found = metrics.head_to_head(rows)
    assert {k: (f["value"], f["n"]) for k, f in found.items()} == dict.fromkeys(("win_rate", "win"), (1, 1)) | {
        "tie": (0, 1),
        "loss": (0, 1),
        "first_position_rate": (0.5, 2),
        "order_disagreement": (0, 1),
        "unread_rate": (0.5, 2),
    }


def test_every_figure_is_in_the_table_of_metrics():
    unread = verdict("b", "AB", 0.5) | {"unread": True}
    figures = metrics.agreement([prompt([0, 1], [2, 1])]) | metrics.head_to_head([verdict("a", "AB", 0.4), unread])
    rows = metrics.metric_rows(figures, model="M1")
    assert {r["metric"] for r in rows} == set(figures) <= set(metrics.METRICS)
    assert all(r["unit"] and r["opponent"] == "" for r in rows)


def test_kendall_by_hand():
    # ranks 0,1,2 against scores 4,1,2: two of three pairs right, one wrong, (2 - 1) / 3
    assert values(prompt([0, 1, 2], [4, 1, 2]))["kendall"] == pytest.approx(1 / 3)


def test_equal_ranks_and_scores_equal_scipys():
    ranks, scores = [0, 0, 1, 2], [5, 3, 3, 1]
    found = values(prompt(ranks, scores))
    assert found["spearman"] == pytest.approx(-stats.spearmanr(scores, ranks).statistic)
    assert found["kendall"] == pytest.approx(-stats.kendalltau(scores, ranks).statistic)
    # pairs 0>2, 0>3, 1>2 (tied by the judge), 1>3, 2>3
    assert found["tie_rate"] == pytest.approx(1 / 5) and found["pairwise_accuracy"] == 1
    assert found["pairwise_accuracy_half_ties"] == pytest.approx(4.5 / 5)
    assert found["exact_match"] == 0  # a tie is a miss


def test_a_tied_prompt_has_no_correlation_and_no_accuracy():
    found = values(prompt([0, 1, 2], [3, 3, 3]))
    assert found["spearman"] == 0 == found["kendall"] and found["pairwise_accuracy"] is None
    assert found["tie_rate"] == 1 and found["pairwise_accuracy_half_ties"] == 0.5


def test_prompts_that_people_rank_alike_do_not_count():
    assert metrics.agreement([prompt([0, 0], [5, 1]), prompt([0, 1], [5, 1])])["exact_match"]["n"] == 1


def test_a_ranking_without_scores_leaves_its_prompts_correlation_to_the_others():
    """Three rankings of one prompt, one of which the judge scored nothing of: the mean is over two."""
    found = metrics.agreement([prompt([0, 1], s, text="Q?") for s in ([4, 2], [5, 1], [None, None])])
    for name in ("spearman", "kendall"):
        assert (found[name]["value"], found[name]["n"]) == (pytest.approx(1), 1)
    assert found["exact_match"]["value"] == pytest.approx(2 / 3)


def test_exact_match_by_hand():
    two = [prompt([0, 1, 2], [5, 3, 1]), prompt([0, 1, 2], [5, 1, 3])]
    assert values(*two)["exact_match"] == 1 / 2


@pytest.mark.parametrize("lengths,share", [([9, 5], 1), ([5, 9], 0), ([7, 7], 0.5)])
def test_longer_baseline_knows_nothing_but_length(lengths, share):
    assert {values(prompt([0, 1], s, lengths))["longer_baseline"] for s in ([5, 1], [1, 5], [3, 3])} == {share}


def test_a_best_reply_without_a_score_does_not_make_the_next_one_best():
    found = metrics.agreement([prompt([0, 1, 2], [None, 5, 1])])["five_best"]
    assert (found["value"], found["n"]) == (0, 1)


def test_no_fives_is_none():
    assert values(prompt([0, 1], [4.4, 1]))["five_best"] is None


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, 1, 2.5])
@pytest.mark.parametrize("n", [2, 20, 60])
def test_the_interval_of_equal_values_contains_them(value, n):
    m = metrics.mean([value] * n)
    assert m["low"] <= m["value"] <= m["high"]


def test_the_interval_contains_the_value():
    rng = np.random.default_rng(2)
    for _ in range(20):
        den = rng.integers(0, 5, 12)
        num = rng.binomial(den, 0.4)
        m = metrics.ratio(num, den)
        assert m["low"] <= m["value"] <= m["high"] and m["n"] == den.sum()


def test_means_of_little():
    assert metrics.mean([3.0]) == {"value": 3.0, "low": None, "high": None, "n": 1}
    assert metrics.mean([]) == {"value": None, "low": None, "high": None, "n": 0}
    assert metrics.ratio([0], [0]) == {"value": None, "low": None, "high": None, "n": 0}


def test_replies_are_resampled_with_their_prompt():
    # two prompts of 100 pairs, one all right and one all wrong: two trials, not 200
    m = metrics.ratio([100, 0], [100, 100])
    assert (m["value"], m["n"]) == (0.5, 200) and m["low"] < 0.01 and m["high"] > 0.99
    m = metrics.ratio([100, 0], [100, 100], share=False)  # a draw is 0, 0.5 or 1
    assert (m["low"], m["high"]) == (0, 1)


def test_many_pairs_of_one_prompt_are_one_entry_of_the_sample():
    """Ten prompts of twenty pairs, as preference sets have them; the judge is right on seven prompts."""
    replies = [{"reply_id": str(i), "text": "x" * (i + 1), "rank": i} for i in range(2)]
    ranked = [
        {"prompt_id": f"p{i}-{k}", "prompt": f"{i}?", "set": "s", "replies": replies}
        for i in range(10)
        for k in range(20)
    ]

    def judged(n_right):
        scores = {row["prompt_id"]: (4, 2) if i < 20 * n_right else (2, 4) for i, row in enumerate(ranked)}
        return [
            {"id": f"{pid}/{k}", "score": s[k], "mass": s[0] / 4, "samples": [{"score": s[0]}]}
            for pid, s in scores.items()
            for k in range(2)
        ]

    rows = evaluate.agreement_rows("M1", ranked, judged(7), "expected", "s")
    rows += evaluate.gain_rows("M1", "M0", ranked, judged(7), judged(0), "expected", "s")
    found = {r["metric"]: r for r in rows}
    assert found["pairwise_accuracy"]["value"] == found["agreement_gain"]["value"] == 0.7
    assert found["pairwise_accuracy"]["n"] == 200 and found["exact_match"]["n"] == found["kendall"]["n"] == 10
    alone = metrics.mean([1] * 7 + [0] * 3)
    for name in ("pairwise_accuracy", "pairwise_accuracy_half_ties", "exact_match"):
        assert (found[name]["low"], found[name]["high"]) == pytest.approx((alone["low"], alone["high"]))
    assert found["agreement_gain"]["low"] < 0.45 and found["kendall"]["low"] < -0.1
    assert found["score_mass"]["high"] - found["score_mass"]["low"] > 0.2
    places = evaluate.calibration(ranked, judged(7))
    assert all(row["high"] - row["low"] > 0.4 for row in places)


def test_one_order_without_a_preference_makes_a_tie():
    assert metrics.outcomes([verdict("p", "AB", 0.9), verdict("p", "BA", 0.5)]) == {"p": 0.5}


@pytest.mark.parametrize(
    "figure,value",
    [
        ("tie", 1),
        ("win_rate", 0.5),
        ("order_disagreement", 0),  # neither verdict is opposite to the other
        ("first_position_rate", 0.5),  # "0.5 is a judge without position bias"
    ],
)
def test_a_judge_without_preference_is_not_biased(figure, value):
    found = metrics.head_to_head([verdict(p, o, 0.5) for p in "ab" for o in ("AB", "BA")])
    assert found[figure]["value"] == value


def test_a_judge_of_single_answers_has_no_position():
    found = metrics.head_to_head([verdict("a", "none", 1.0), verdict("b", "none", 0.5), verdict("c", "none", 0.0)])
    assert set(found) == {"win_rate", "win", "tie", "loss"}
    assert [found[k]["value"] for k in ("win", "tie", "loss")] == [pytest.approx(1 / 3)] * 3


def test_always_the_first_is_all_bias():
    found = metrics.head_to_head([verdict(p, o, 0.8) for p in "ab" for o in ("AB", "BA")])
    assert found["first_position_rate"]["value"] == 1 == found["order_disagreement"]["value"]
    assert found["tie"]["value"] == 1


@pytest.mark.parametrize("mode", ["expected", "sampled"])
def test_agreement_rows_of_an_evaluation(mode):
    replies = [{"reply_id": r, "text": "x" * n, "rank": i} for i, (r, n) in enumerate([("a", 5), ("b", 3)])]
    ranked = [{"prompt_id": "p", "prompt": "Q?", "replies": replies}]
    judged = [{"id": f"p/{r}", "score": s, "mass": 0.9, "samples": [{"score": s}]} for r, s in (("a", 4.0), ("b", 2.0))]
    rows = evaluate.agreement_rows("M1", ranked, judged + [{"id": "other/a", "score": 0}], mode, "ranked_eval")
    by = {r["metric"]: r["value"] for r in rows}
    assert set(by) <= set(metrics.METRICS) and set(metrics.AGREEMENT) <= set(by)
    assert by["pairwise_accuracy"] == 1 == by["longer_baseline"] and by["score_std"] == pytest.approx(2**0.5)
    assert by["score_mass" if mode == "expected" else "parse_rate"] == pytest.approx(0.9 if mode == "expected" else 1)


def test_columns_of_metric_rows():
    (row,) = metrics.metric_rows({"score_std": metrics.no_interval(0.5, 7)}, model="M2", set="test_prompts")
    assert row == {
        "model": "M2", "opponent": "", "set": "test_prompts", "judge": "", "judge_mode": "", "metric": "score_std",
        "value": 0.5, "low": None, "high": None, "n": 7, "unit": "points"}  # fmt: skip
    with pytest.raises(KeyError):
        metrics.metric_rows({"no_such_metric": metrics.no_interval(1, 1)})


def test_agreement_gain_by_hand():
    ours = [prompt([0, 1, 2], [4, 2, 1]), prompt([0, 1], [3, 3])]  # 3 right; a tie
    theirs = [prompt([0, 1, 2], [4, 4, 5]), prompt([0, 1], [None, 2])]  # a tie, two reversed; unscored
    found = metrics.agreement_gain(ours, theirs)
    assert found["value"] == pytest.approx((3 + 0.5 - 0.5 - 0.5) / 4) and found["n"] == 4
    back = metrics.agreement_gain(theirs, ours)
    assert back["value"] == -found["value"] and back["low"] == pytest.approx(-found["high"], abs=1e-9)
    same = metrics.agreement_gain(ours, ours)
    assert same["low"] == same["value"] == same["high"] == 0  # paired: the same judge gains nothing, surely


def test_gain_rows_take_the_replies_of_their_set_alone():
    def ranked(pid):
        replies = [{"reply_id": r, "text": "x", "rank": i} for i, r in enumerate("ab")]
        return {"prompt_id": pid, "prompt": "Q?", "replies": replies, "set": "s"}

    def judged(a, b):
        return [{"id": f"{p}/{r}", "score": s} for p in ("p", "q") for r, s in (("a", a), ("b", b))]

    (row,) = evaluate.gain_rows("M1", "M0", [ranked("p")], judged(4, 2), judged(1, 2), "expected", "s")
    assert (row["metric"], row["value"], row["n"], row["opponent"]) == ("agreement_gain", 1.0, 1, "M0")
    assert report.rate(row) == "100.0 points, n=1"
    both = [ranked("p"), ranked("q")]  # the other model judged one of them alone
    (row,) = evaluate.gain_rows("M1", "M0", both, judged(4, 2), judged(1, 2)[:2], "expected", "s")
    assert (row["value"], row["n"]) == (1.0, 1)


def test_a_training_figure_shows_the_parts_of_the_loss():
    import pandas as pd

    from srlm_utils import plots

    sft = pd.DataFrame({"model": "M1", "step": [1, 2], "loss": [3.0, 2.0], "text_loss": [2.0, 1.0]})
    dpo = pd.DataFrame({"model": "M2", "step": [1, 2], "loss": [0.7, 0.6], "rewards/margins": [0.0, 0.1]})
    both = pd.concat([sft.assign(score_loss=[1.0, 1.0], rank_accuracy=[0.5, None]), dpo])
    titles = [
        [ax.get_title(loc="left") or ax.get_title() for ax in plots.training(t)[0].axes]
        for t in (both[both.model == "M1"], both[both.model == "M2"])
    ]
    parts = ["loss of answers and justifications", "loss of score digits", "training replies ordered right, %"]
    assert titles[0] == parts
    assert titles[1] == ["loss", "reward margin"]


def test_a_dpo_figure_shows_both_rewards_where_the_log_has_them():
    import pandas as pd

    from srlm_utils import plots

    def titles(fig):
        return [ax.get_title(loc="left") or ax.get_title() for ax in fig.axes]

    log = pd.DataFrame({"model": "M2", "step": [1, 2], "loss": [0.7, 0.6], "rewards/accuracies": [0.5, 1.0]})
    log = log.assign(
        **{"rewards/margins": [0.1, 0.2], "rewards/chosen": [-0.1, -0.3], "rewards/rejected": [-0.2, -0.5]}
    )
    fig, _ = plots.training(log)
    assert titles(fig)[3] == "reward of chosen, and (dashed) rejected"
    solid, dashed, zero = fig.axes[3].lines[1:]
    assert [*solid.get_ydata()] == pytest.approx([-0.1, -0.2]) and [*dashed.get_ydata()] == pytest.approx([-0.2, -0.35])
    assert dashed.get_linestyle() == "--" and dashed.get_color() == solid.get_color() and zero.get_ydata()[0] == 0
    assert all(x == int(x) for ax in fig.axes for x in ax.get_xticks())
    assert len(plots.training(log.drop(columns=["rewards/rejected"]))[0].axes[3].lines) == 3
    assert len(titles(plots.training(log.drop(columns=["rewards/chosen", "rewards/rejected"]))[0])) == 3


def test_numbers_can_be_read_on_every_models_colour():
    from matplotlib.colors import to_rgb

    from srlm_utils import plots

    def luminance(shade):
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(shade)]
        return np.dot([0.2126, 0.7152, 0.0722], parts)

    for model in ("M0", "SFT", "M1", "M2", "M3", "M4", "M5", "M6"):
        shade = plots.color(model)
        low, high = sorted([luminance(shade), luminance(plots._ink(shade))])
        assert (high + 0.05) / (low + 0.05) > 4.5, model
    assert [plots._ink(plots.color(m)) for m in ("SFT", "M1")] == ["black", "white"]


def test_a_funnel_says_in_words_why_something_was_dropped():
    import pandas as pd

    from srlm_utils import pairs, plots

    drops = ["", "keyword", "not_needed", "of a rule of my own"]
    steps = pd.DataFrame([{"model": "M1", "stage": "prompts written", "n": 3, "drop": d} for d in drops])
    labels = [t.get_text() for t in plots.funnel(steps)[0].axes[0].get_yticklabels()]
    said = ["  – asks for pictures, files, links", "  – more than wanted", "  – of a rule of my own"]
    assert labels == ["prompts written", *said]
    rules = {"rule": "longer", "chosen_ended": True, "same_form": True}
    assert pairs.build_pairs([], [], [], **rules)[1].keys() | pairs.build_positives([], [], [])[1].keys() <= {
        *plots._DROPS
    }


@pytest.mark.parametrize("dpi", [110, 150])  # of a notebook's figure and of a saved one
def test_a_figure_in_a_palette_keeps_each_models_colour(tmp_path, dpi):
    from matplotlib.colors import to_rgb
    from PIL import Image

    from srlm_utils import plots, rendered

    plots.use_style()
    fig, _ = plots.agreement(srlm_utils.open_run(EXAMPLE).metrics())
    fig.savefig(tmp_path / "drawn.png", dpi=dpi, bbox_inches="tight")
    with Image.open(tmp_path / "drawn.png") as image:
        before, after = (np.asarray(i.convert("RGB"), int) for i in (image, rendered.palette(image)))
    for model in ("M0", "SFT", "M1", "M2", "M3"):
        marks = (before == [round(255 * part) for part in to_rgb(plots.color(model))]).all(axis=-1)
        assert marks.sum() > 100 and np.abs(before - after)[marks].max() <= 5, model


def test_no_pair_counts_as_wrong_before_the_first_step():
    import pandas as pd

    from srlm_utils import plots

    log = {"model": "M2", "step": [1, 2, 3], "rewards/margins": [-2e-8, 0.1, 0.2], "rewards/accuracies": [0, 0.8, 0.9]}
    fig, _ = plots.training(pd.DataFrame(log))
    (right,) = [ax for ax in fig.axes if (ax.get_title(loc="left") or ax.get_title()) == "pairs ordered right, %"]
    assert min(y for line in right.lines[:2] for y in line.get_ydata()) >= 80


def test_the_line_of_a_training_begins_where_its_loss_does():
    import pandas as pd

    from srlm_utils import plots

    log = {"model": "M3", "step": [1, 2, 3], "loss": [0.693, 0.703, 0.65], "rewards/margins": [0.0, 0.1, 0.2]}
    ax = plots.training(pd.DataFrame(log))[0].axes[0]
    assert ax.lines[1].get_ydata()[:2] == pytest.approx([0.693, 0.698])


@pytest.mark.parametrize("n,labels,title", [([64, 64], ["M0", "M1"], "(n=64)"), ([3, 64], ["M0\nn=3", "M1\nn=64"], "")])
def test_answers_of_models_on_other_prompts_have_an_n_each(n, labels, title):
    import pandas as pd

    from srlm_utils import plots

    rows = [
        {
            "metric": name,
            "model": m,
            "value": 0.5,
            "low": 0.4,
            "high": 0.6,
            "n": k,
            "judge": "M1",
            "judge_mode": "score",
        }
        for name in ("answer_chars", "ended_rate", "mean_score")
        for m, k in zip(("M0", "M1"), n, strict=True)
    ]
    for draw in (plots.answers, plots.mean_scores):
        ax = draw(pd.DataFrame(rows))[0].axes[0]
        assert [t.get_text() for t in ax.get_xticklabels()] == labels
        said = ax.get_title(loc="left") or ax.get_title()
        assert title.strip("()") in said and ("n=" in said) == bool(title)


@pytest.mark.parametrize("scored,said", [(3, "vs chance +20"), (90, "vs M0 +20")])
def test_a_gain_over_a_model_that_writes_no_scores_is_one_over_chance(scored, said):
    import pandas as pd

    from srlm_utils import plots

    row = {"set": "eval", "judge_mode": "sampled", "opponent": "", "low": 0.1, "high": 0.3}
    rows = [
        row | {"metric": "pairwise_accuracy", "model": "M0", "value": 0.5, "n": scored},
        row | {"metric": "pairwise_accuracy", "model": "M1", "value": 0.7, "n": 90},
        row | {"metric": "agreement_gain", "model": "M1", "opponent": "M0", "value": 0.2, "n": 95},
        *(row | {"metric": "tie_rate", "model": m, "value": 0.1, "n": 95} for m in ("M0", "M1")),
        row | {"metric": "longer_baseline", "model": "M1", "value": 0.5, "n": 95},
    ]
    ax = plots.agreement(pd.DataFrame(rows))[0].axes[0]
    assert said in ax.get_xticklabels()[1].get_text()


def test_p_values_keep_three_digits():
    row = {"unit": "p", "low": None, "high": None, "n": 64}
    assert [report.rate(row | {"value": v}) for v in (0.0004, 0.0412)] == ["p < 0.001, n=64", "p = 0.041, n=64"]


def test_calibration_by_hand():
    ranked = [
        {"prompt_id": "p", "prompt": "P", "replies": [{"reply_id": str(i), "text": "x", "rank": i} for i in range(3)]},
        {"prompt_id": "q", "prompt": "Q", "replies": [{"reply_id": str(i), "text": "x", "rank": i} for i in range(2)]},
        {
            "prompt_id": "flat",
            "prompt": "F",
            "replies": [{"reply_id": "0", "text": "x", "rank": 0}, {"reply_id": "1", "text": "x", "rank": 0}],
        },
    ]
    scores = {"p/0": 4.6, "p/1": 3.5, "p/2": 0.2, "q/0": 4.0, "q/1": None, "flat/0": 4.0, "flat/1": 4.0}
    rows = evaluate.calibration(ranked, [{"id": k, "score": v} for k, v in scores.items()])
    assert [(r["score"], r["value"], r["n"]) for r in rows] == [(0, 1.0, 1), (4, 0.25, 2), (5, 0.0, 1)]
    assert rows[0]["low"] is None and rows[1]["low"] < 0.25 < rows[1]["high"] < 1


def test_the_agreement_table_is_empty_where_a_model_was_not_measured():
    table = report.agreement_table(srlm_utils.open_run(EXAMPLE).metrics())
    assert not table.isna().any(axis=None)
    written = table.loc[("ranked_eval", "sampled")]
    assert written.loc["pairwise_accuracy", "M1"] and written.loc["pairwise_accuracy", "M2"] == ""


def test_an_accuracy_over_a_few_pairs_is_left_out():
    row = {"set": "eval", "judge_mode": "sampled", "opponent": "", "low": None, "high": None, "unit": "share"}
    figures = [("pairwise_accuracy", "M0", 1), ("pairwise_accuracy", "M1", 10), ("tie_rate", "M0", 9)]
    figures += [("parse_rate", "M0", 3)]  # of judgements, not of pairs
    rows = [row | {"metric": name, "model": m, "value": 1.0, "n": n} for name, m, n in figures]
    table = report.agreement_table(pd.DataFrame(rows)).loc[("eval", "sampled")]
    assert [*table.loc["pairwise_accuracy"]] == ["– (n=1)", "100.0 %, n=10"]
    assert table.loc["tie_rate", "M0"] == "– (n=9)" and table.loc["parse_rate", "M0"] == "100.0 %, n=3"


@pytest.mark.filterwarnings("error")
def test_a_table_of_metrics_says_what_they_are_whatever_its_levels():
    said = metrics.METRICS["tie_rate"][1]
    plain = pd.DataFrame({"M1": ["x"]}, index=["tie_rate"])
    assert report.explained(plain).meaning.tolist() == [said] and [*plain.columns] == ["M1"]
    two = pd.DataFrame([["x"]], index=["tie_rate"], columns=pd.MultiIndex.from_tuples([("eval", "sampled")]))
    assert report.explained(two)[("meaning", "")].tolist() == [said]
    deep = pd.DataFrame({"M1": ["x"]}, index=pd.MultiIndex.from_tuples([("eval", "sampled", "tie_rate")]))
    assert report.explained(deep).meaning.tolist() == [said]
    assert report.meanings(["tie_rate"]) == f"tie_rate: {said}"


def test_a_scratch_report_says_what_was_made_here():
    reads = ("M2/eval/answers.jsonl", "M1/aift/health.json")

    def said(own, reads=reads, scratch=True):
        declared = SimpleNamespace(reads=reads)
        return report.origin(SimpleNamespace(scratch=scratch, declared=declared, is_borrowed=lambda p: p not in own))

    assert said(reads, scratch=False) == ""
    assert "made here: M1/aift/health.json (by M0" in said(reads[1:])  # whoever was evaluated
    assert "made here: nothing (" in said(())
    many = [f"M{i}/eval/metrics.json" for i in range(9)]
    assert f"made here: {', '.join(many[:6])} and 3 more (by M0" in said(many, many[::-1])


def test_a_reports_texts_show_code_as_code(tmp_path):
    section = {"title": "T", "text": "`ranked_eval` is <b>written</b>, `<i>`, and a ` alone"}
    report.write_html(tmp_path / "r.html", title="", lead="", sections=[section], pairs=None, answers=[], foot="")
    said = "<code>ranked_eval</code> is &lt;b&gt;written&lt;/b&gt;, <code>&lt;i&gt;</code>, and a ` alone"
    assert said in (tmp_path / "r.html").read_text()


def test_a_reports_pairs_are_those_that_were_learned_from():
    pair = {"prompt_id": "p", "prompt": "Q?", "chosen_id": "b", "rejected_id": "a", "chosen": "b", "rejected": "a"}
    # borrowed pairs beside candidates of a scratch run's own
    others = [pair | {"chosen": "of the example"}, pair | {"chosen_id": "c", "prompt_id": "q"}]
    rows = {
        "M1/aift/pairs.jsonl": [pair | {"chosen_id": "a", "rejected_id": "c"}],
        "F2/aift/pairs.jsonl": [*others, pair],
        "F2/aift/judgements.jsonl": [{"id": i, "score": s} for i, s in (("a", 1.0), ("b", 3.0))],
        "F2/aift/candidates.jsonl": [{"cand_id": i, "prompt_id": "p", "text": i} for i in "ab"],
    }
    step = SimpleNamespace(rows=rows.__getitem__, params=SimpleNamespace(drafts=["F2"], iterations=2))
    (shown,) = report.example_pairs(step, 3)
    assert [(c["cand_id"], c["role"]) for c in shown["candidates"]] == [("b", "chosen"), ("a", "rejected")]
    table = pd.DataFrame([{"metric": "pair_yield", "model": m, "value": 1.0, "n": 1} for m in ("F2", "M1")])
    table = table.assign(low=None, high=None, unit="share")
    assert [*report.wide(table, ["pair_yield"]).columns] == ["M1", "F2"]


def test_a_reply_is_no_prompt_of_its_own():
    """Ten replies to each of two prompts: as far as intervals go, two of a kind."""
    replies = [{"reply_id": str(i), "rank": i, "text": "a"} for i in range(10)]
    ranked = [{"prompt_id": p, "prompt": f"{p}?", "replies": replies} for p in "pq"]
    judged = [{"id": f"{p}/{i}", "score": float(i), "mass": m} for p, m in (("p", 0.2), ("q", 0.8)) for i in range(10)]
    (mass,) = [r for r in evaluate.agreement_rows("M1", ranked, judged, "expected", "s") if r["metric"] == "score_mass"]
    assert mass["value"] == pytest.approx(0.5) and mass["high"] - mass["low"] > 0.5 and mass["n"] == 20


def test_a_run_of_one_iteration_has_no_scores_of_its_own():
    rows = {
        "M1/aift/judgements.jsonl": [{"id": "a", "score": 1.0}, {"id": "b", "score": None}],
        "M1/aift/candidates.jsonl": [{"cand_id": i, "prompt_id": "p", "text": i} for i in "ab"],
    }
    empty, table = (
        report.score_table(SimpleNamespace(rows=rows.__getitem__, params=SimpleNamespace(iterations=n))) for n in (1, 2)
    )
    assert len(empty) == 0 and {*empty.columns} == {"model", "id", "score"}
    assert table.score.dtype == float and [*table.id] == ["a", "b"] and set(table.model) == {"M1"}


def test_metrics_are_read_as_they_were_written(tmp_path):
    table = report.read_metrics(EXAMPLE / "report/metrics.csv")
    assert (table.opponent == "").any() and table.low.isna().any()
    assert not table.drop(columns=["value", "low", "high"]).isna().any(axis=None)
    assert [*table.columns] == report.COLUMNS and table.value.dtype == float
    named = table.assign(variant="NA").head(2)
    named.to_csv(tmp_path / "metrics.csv", index=False)
    pd.testing.assert_frame_equal(report.read_metrics(tmp_path / "metrics.csv"), named)
