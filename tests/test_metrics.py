import numpy as np
import pytest
from scipy import stats

from srlm_utils import metrics


def prompt(ranks, scores, lengths=None):
    return {"ranks": ranks, "scores": scores, "lengths": lengths or [10] * len(ranks)}


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
    assert values(prompt([0, 1, 2], [5, 3, 1])) | {"tie_rate": 0} == {
        "pairwise_accuracy": 1, "tie_rate": 0, "pairwise_accuracy_half_ties": 1, "longer_baseline": 0.5,
        "five_best": 1, "exact_match": 1, "spearman": pytest.approx(1), "kendall": pytest.approx(1)}  # fmt: skip
    assert values(prompt([0, 1, 2], [1, 3, 4]))["pairwise_accuracy"] == 0


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
    assert all(v["value"] is None and v["n"] == 0 for v in found.values())


def test_intervals():
    one = metrics.ratio([1, 0, 1, 1, 0], [1, 1, 1, 1, 1])
    assert one["low"] <= one["value"] <= one["high"] and one == metrics.ratio([1, 0, 1, 1, 0], [1] * 5)
    assert metrics.ratio([1], [2]) == {"value": 0.5, "low": None, "high": None, "n": 2}
    assert metrics.ratio([0, 0], [0, 0])["value"] is None


def test_the_interval_covers_the_truth_about_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(metrics, "N_BOOTSTRAP", 500)
    rng = np.random.default_rng(1)
    hits = 0
    for i in range(200):
        m = metrics.mean(rng.random(60) < 0.7, seed=i)
        hits += m["low"] <= 0.7 <= m["high"]
    assert 0.88 <= hits / 200 <= 0.99


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


def test_repeated_ngrams():
    assert metrics.repeated_ngrams("a b c d e") == 0
    assert metrics.repeated_ngrams("a b c d a b c d") == pytest.approx(1 / 5)  # abcd again, of five 4-grams
    assert metrics.repeated_ngrams("no no no no no no") == pytest.approx(2 / 3)
    assert metrics.repeated_ngrams("a b") == 0


def test_every_figure_is_in_the_table_of_metrics():
    figures = metrics.agreement([prompt([0, 1], [2, 1])]) | metrics.head_to_head([verdict("a", "AB", 0.4)])
    figures |= metrics.answer_figures([{"text": "x", "n_tokens": 1, "ended": True}])
    rows = metrics.metric_rows(figures, model="M1")
    assert {r["metric"] for r in rows} == set(figures) <= set(metrics.METRICS)
    assert all(r["unit"] and r["opponent"] == "" for r in rows)
