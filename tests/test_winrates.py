"""Statistics of comparisons: known answers, planted effects recovered, intervals that cover what they promise."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from srlm_utils import metrics, plots, report, winrates
from srlm_utils.errors import DataError

N_SIMULATIONS, N_PROMPTS = 500, 200


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def coverage(figures: list[dict], truth: float) -> float:
    """Share of intervals that hold the truth."""
    return sum(f["low"] <= truth <= f["high"] for f in figures) / len(figures)


# ---- by hand


def test_sign_test_counts_no_ties():
    # 8 of 10: P(8 or more, or 2 or fewer) = 112 / 1024
    figure = winrates.sign_test([1] * 8 + [0] * 2 + [0.5] * 30)
    assert figure == {"value": pytest.approx(112 / 1024), "low": None, "high": None, "n": 10}
    assert winrates.sign_test([0.5, 0.5]) == {"value": None, "low": None, "high": None, "n": 0}


def test_similar_length_takes_a_fifth_of_the_longer_answer():
    figure = winrates.similar_length([1, 1, 0, 0.5], [100, 100, 100, 0], [80, 79, 125, 0])
    assert figure["n"] == 3 and figure["value"] == pytest.approx((1 + 0 + 0.5) / 3)


def test_length_control_without_lengths_is_the_raw_rate():
    raw = metrics.mean([1, 1, 0, 0.5])
    assert winrates.length_controlled([1] * 12, range(12)) == metrics.mean([1] * 12)
    assert winrates.length_controlled([1, 1, 0, 0.5], [0, 0, 0, 0]) == raw
    assert winrates.length_controlled([1], [30])["low"] is None


def test_length_control_admits_doubt_where_one_side_won_nearly_everything():
    """Draws without a loss are alike: seven of eight wins had an interval of [94, 100]."""
    for n in (8, 64):
        results, gaps = [1.0] * (n - 1) + [0.0], np.random.default_rng(n).normal(size=n)
        figure, raw = winrates.length_controlled(results, gaps), metrics.mean(results)
        assert figure["low"] <= raw["low"] and figure["high"] >= raw["high"]


def test_length_control_stays_finite_where_length_decides_everything():
    figure = winrates.length_controlled([1] * 10 + [0] * 10, [*range(1, 11), *range(-10, 0)])
    assert 0 <= figure["low"] < figure["value"] < figure["high"] <= 1


def test_two_models_have_the_rating_of_their_win_rate():
    results = {str(i): float(i < 75) for i in range(100)}
    figures = winrates.bradley_terry([("B", "A", results)], anchor="A")
    assert figures["B"]["value"] == pytest.approx(400 * math.log10(3), abs=0.5)  # 3 : 1
    assert figures["A"] == {"value": 0, "low": 0, "high": 0, "n": 100}
    assert figures["B"]["low"] < figures["B"]["value"] < figures["B"]["high"]


def test_ratings_do_not_depend_on_the_order_of_duels():
    rng = np.random.default_rng(0)
    duels = [(a, b, {str(i): float(rng.choice([0, 0.5, 1])) for i in range(40)}) for a, b in ("AB", "BC", "AC")]
    one = winrates.bradley_terry(duels, anchor="A")
    turned = [(b, a, {k: 1 - v for k, v in r.items()}) for a, b, r in duels[::-1]]
    other = winrates.bradley_terry(turned, anchor="A")
    assert all(one[m]["value"] == pytest.approx(other[m]["value"], abs=1e-6) for m in "ABC")


def test_a_model_without_a_way_to_the_anchor_is_named():
    with pytest.raises(DataError, match="C was compared with no model that leads to A"):
        winrates.bradley_terry([("A", "B", {"p": 1.0}), ("C", "D", {"p": 1.0})], anchor="A")


def test_a_rating_counts_the_comparisons_of_its_model_alone():
    duels = [("B", "A", {str(i): 1.0 for i in range(9)}), ("C", "B", {"0": 1.0, "1": 0.0}), ("C", "A", {"x": 0.5})]
    figures = winrates.bradley_terry(duels, anchor="A")
    assert {m: f["n"] for m, f in figures.items()} == {"B": 11, "A": 10, "C": 3}


def test_a_comparison_of_no_prompts_ties_nobody_to_the_anchor():
    duels = [("B", "A", {"p": 1.0}), ("C", "A", {})]
    assert winrates.connected(duels, "A") == {"A", "B"} and winrates.connected(duels, "D") == set()
    with pytest.raises(DataError, match="C was compared with no model"):
        winrates.bradley_terry(duels, anchor="A")


def test_a_model_that_wins_all_has_a_finite_rating():
    figure = winrates.bradley_terry([("B", "A", {str(i): 1.0 for i in range(30)})], anchor="A")["B"]
    assert 400 < figure["value"] < 10_000 and figure["high"] >= figure["value"]
    least = metrics.mean([1] * 30)["low"]  # the win rate it may have all the same
    assert figure["low"] == pytest.approx(400 * math.log10(least / (1 - least)), abs=1)


@pytest.mark.parametrize("n", [2, 3, 4, 10])
def test_a_model_that_loses_all_is_the_mirror_image(n):
    won, lost = (
        winrates.bradley_terry([("B", "A", {str(i): result for i in range(n)})], anchor="A")["B"]
        for result in (1.0, 0.0)
    )
    assert [lost[k] for k in ("value", "low", "high")] == pytest.approx([-won[k] for k in ("value", "high", "low")])


def test_one_comparison_has_a_rating_without_an_interval_and_a_figure():
    vote = {"judge": "labels.jsonl", "judge_mode": "human", "model": "M1", "opponent": "M0", "prompt_id": "t"}
    table = report.ratings_table(pd.DataFrame([vote | {"result": 1.0, "category": "x", "chars": 10.0}]))
    (m1,) = table[table.model == "M1"].itertuples()
    assert m1.value > 0 and m1.n == 1 and pd.isna(m1.low) and pd.isna(m1.high)
    plots.ratings(table)


def test_wins_over_one_model_alone_leave_the_others_interval_as_it_was():
    even = ("B", "A", {str(i): float(i % 2) for i in range(30)})
    figures = winrates.bradley_terry([even, ("C", "B", {str(i): 1.0 for i in range(30)})], anchor="A")
    alone = winrates.bradley_terry([even], anchor="A")["B"]
    assert [figures["B"][k] for k in ("low", "high")] == pytest.approx([alone[k] for k in ("low", "high")], abs=1)
    assert figures["C"]["low"] < figures["C"]["value"] - 100


def test_breakdown_and_buckets():
    figures = winrates.breakdown({"a": 1, "b": 0, "c": 1}, {"a": "x", "b": "x", "c": "y", "d": "z"})
    assert {g: (f["value"], f["n"]) for g, f in figures.items()} == {"x": (0.5, 2), "y": (1, 1)}
    assert [*winrates.breakdown({"a": 1, "b": 0}, {"b": "z", "a": "m"})] == ["z", "m"]  # as a caller has ordered them
    assert figures["x"]["low"] < 0.01 and figures["y"]["low"] is None
    buckets = winrates.length_buckets({str(i): 10 * i for i in range(9, -1, -1)})
    assert list(dict.fromkeys(buckets.values())) == ["up to 30 characters", "up to 60", "more than 60"]
    assert [buckets[k] for k in ("3", "4", "7")] == ["up to 30 characters", "up to 60", "more than 60"]


def test_kappa_by_hand():
    a = dict(enumerate([1, 1, 1, 0, 0, 0.5]))
    b = dict(enumerate([1, 1, 0, 0, 0, 1]))
    # agreement 4/6; chance (3*3 + 2*3 + 1*0) / 36
    assert winrates.kappa(a, b)["value"] == pytest.approx((4 / 6 - 15 / 36) / (1 - 15 / 36))
    same = winrates.kappa(a, a)  # 6 prompts without a disagreement; chance (3*3 + 2*2 + 1*1) / 36
    assert (same["value"], same["high"]) == (1, 1)
    assert same["low"] == pytest.approx(1 - (1 - 0.05 ** (1 / 6)) / (1 - 14 / 36))
    same = {i: 1 for i in range(5)}
    assert winrates.kappa(same, same)["value"] is None
    assert winrates.kappa(a, {9: 1})["n"] == 0
    two = dict.fromkeys(range(20), 1), {i: float(i > 0) for i in range(20)}
    for ones in (winrates.kappa(*two), winrates.kappa(*two[::-1])):
        assert (ones["value"], ones["low"], ones["high"], ones["n"]) == (0, None, None, 20)  # whatever the other says


def test_kappa_resamples_prompts_not_comparisons():
    rng = np.random.default_rng(1)
    a, b = ({i: float(v) for i, v in enumerate(rng.integers(0, 2, 40))} for _ in range(2))
    once = winrates.kappa(a, b)
    four = winrates.kappa(
        {(m, k): v for k, v in a.items() for m in range(4)}, {(m, k): v for k, v in b.items() for m in range(4)}
    )
    assert four["n"] == 160 and four["value"] == pytest.approx(once["value"])
    assert four["high"] - four["low"] == pytest.approx(once["high"] - once["low"], rel=0.05)


def test_duels_leave_out_verdicts_on_answers_that_are_not_here():
    def answers(*ids):
        return [{"prompt_id": pid, "text": "abcd"} for pid in ids]

    def verdict(pid, p):
        return {"prompt_id": pid, "order": "none", "p_first": p, "judge": "M1", "judge_mode": "score"}

    files = {"seed/test_prompts.jsonl": [{"prompt_id": p, "category": "list"} for p in "abc"]}
    files |= {"M0/eval/answers.jsonl": answers("a", "b", "c"), "SFT/eval/answers.jsonl": answers("a", "b", "c")}
    files |= {"M1/eval/answers.jsonl": answers("a"), "SFT/eval/verdicts/SFT_vs_M0.jsonl": [verdict("b", 1.0)]}
    files |= {f"M1/eval/verdicts/M1_vs_{o}.jsonl": [verdict("a", 0.0), verdict("b", 1.0)] for o in ("M0", "SFT")}
    borrowed = set(files)
    step = SimpleNamespace(
        params=SimpleNamespace(iterations=1), rows=files.__getitem__, is_borrowed=lambda path: path in borrowed
    )
    found = report.duels(step)
    assert list(zip(found.model, found.opponent, found.prompt_id, found.result, strict=True)) == [
        ("SFT", "M0", "b", 1.0),
        ("M1", "M0", "a", 0.0),
        ("M1", "SFT", "a", 0.0),
    ]
    assert set(found.chars) == {4} and set(found.category) == {"list"}
    borrowed.remove(
        "SFT/eval/answers.jsonl"
    )  # a scratch run has answered anew: what was said of the others is not of them
    assert set(report.duels(step).opponent) == {"M0"} and set(report.duels(step).model) == {"M1"}
    borrowed.remove("SFT/eval/verdicts/SFT_vs_M0.jsonl")  # and has compared them
    assert list(report.duels(step).model) == ["SFT", "M1"]


def test_a_judge_rates_the_models_that_its_votes_tie_to_m0():
    def votes(judge, *fought):
        return [(judge, "human", a, b, str(i), float(i % 3 > 0), "list", 9) for a, b in fought for i in range(9)]

    columns = ["judge", "judge_mode", "model", "opponent", "prompt_id", "result", "category", "chars"]
    table = pd.DataFrame(
        votes("few.jsonl", ("M3", "SFT")) + votes("apart.jsonl", ("M1", "M0"), ("M3", "M2")), columns=columns
    )
    found = report.ratings_table(table)
    assert list(zip(found.judge, found.model, strict=True)) == [("apart.jsonl", "M0"), ("apart.jsonl", "M1")]
    assert found.value[1] == pytest.approx(400 * math.log10(2), abs=2)
    assert report.ratings_table(table[table.judge == "few.jsonl"]).empty


# ---- planted effects


def test_win_rates_without_ties_cover_exactly():
    for n in (10, 20, 64, 200):
        figures = [metrics.mean([1] * k + [0] * (n - k)) for k in range(n + 1)]
        for p in (0.5, 0.7, 0.9):
            covered = sum(binom.pmf(k, n, p) for k, f in enumerate(figures) if f["low"] <= p <= f["high"])
            # over 10 or 20 prompts a rate has few values: none of them lets an interval cover 95 %
            assert 0.93 <= covered <= {10: 0.99, 20: 0.98}.get(n, 0.97), (n, p)


@pytest.mark.parametrize("n", [20, 64, 200])
@pytest.mark.parametrize("rate", [0.5, 0.7, 0.9])
def test_win_rates_with_ties_cover(n, rate):
    rng = np.random.default_rng(0)
    shares = [rate - 0.1, 0.2, 1 - rate - 0.1]
    figures = [metrics.mean(rng.choice([1, 0.5, 0], n, p=np.maximum(shares, 0))) for _ in range(2000)]
    assert 0.93 <= coverage(figures, rate) <= 0.97


@pytest.mark.parametrize("n,truth", [(64, 0.4), (64, 0.8), (200, 0.8)])
def test_kappa_covers(n, truth):
    """Two judges, each for the first model in 70 %, that agree beyond chance by `truth`."""
    both, one = 0.49 + truth * 0.21, (1 - truth) * 0.21
    figures = []
    for seed in range(N_SIMULATIONS):
        u = np.random.default_rng(seed).random(n)
        a, b = u < both + one, (u < both) | ((u >= both + one) & (u < both + 2 * one))
        figures.append(
            winrates.kappa(*(dict(enumerate(judge.astype(float).tolist())) for judge in (a, b)), n_draws=400)
        )
    assert 0.93 <= coverage(figures, truth) <= 0.97


def simulate_length(seed: int, theta: float, phi: float, longer_by: float, n: int = N_PROMPTS):
    """Verdicts of a judge that has an opinion (theta) and likes length (phi): results, gaps in units of their scale."""
    rng = np.random.default_rng(seed)
    gaps = rng.normal(longer_by, 1, n)
    p = sigmoid(theta + phi * np.tanh(gaps / math.sqrt(1 + longer_by**2)))
    return (rng.random(n) < p).astype(float), gaps


def test_a_pure_length_effect_is_removed():
    raw, controlled = [], []
    for seed in range(100):
        results, gaps = simulate_length(seed, 0.0, 2.0, 1.0)
        raw.append(np.mean(results))
        controlled.append(winrates.length_controlled(results, gaps, n_draws=2)["value"])
    assert np.mean(raw) > 0.65
    assert np.mean(controlled) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("n", [64, N_PROMPTS])
def test_length_controlled_intervals_cover(n):
    theta = 0.5
    figures = [
        winrates.length_controlled(*simulate_length(s, theta, 1.0, 0.4, n), n_draws=300) for s in range(N_SIMULATIONS)
    ]
    assert np.mean([f["value"] for f in figures]) == pytest.approx(sigmoid(theta), abs=0.01)
    assert 0.93 <= coverage(figures, sigmoid(theta)) <= 0.97


def simulate_judge(seed: int, quality: float, bias: float, n: int) -> list[dict]:
    """A judge asked in both orders: `quality` in favour of A on average, prompts differ, and `bias` for the first."""
    rng = np.random.default_rng(seed)
    rows = []
    for i, q in enumerate(quality + rng.normal(0, 1, n)):
        for order, sign in (("AB", 1), ("BA", -1)):
            rows.append(
                {"prompt_id": str(i), "order": order, "p_first": float(rng.random() < sigmoid(sign * q + bias))}
            )
    return rows


def planted(quality: float, bias: float) -> tuple[float, float]:
    """True win rate with half ties, and share of verdicts for the first, of `simulate_judge`."""
    q = quality + np.random.default_rng(12345).normal(0, 1, 400_000)
    ab, ba = sigmoid(q + bias), 1 - sigmoid(-q + bias)  # A wins, by order
    win, loss = ab * ba, (1 - ab) * (1 - ba)
    return float(np.mean(win + (1 - win - loss) / 2)), float(np.mean((ab + 1 - ba) / 2))


@pytest.mark.parametrize("n", [20, 64, N_PROMPTS])
def test_planted_win_rate_and_position_bias_are_recovered(n):
    win_rate, first = planted(0.6, 0.8)
    figures = [metrics.head_to_head(simulate_judge(s, 0.6, 0.8, n)) for s in range(N_SIMULATIONS)]
    for name, truth in (("win_rate", win_rate), ("first_position_rate", first)):
        mine = [f[name] for f in figures]
        assert np.mean([f["value"] for f in mine]) == pytest.approx(truth, abs=0.01)
        assert 0.93 <= coverage(mine, truth) <= 0.97, name


@pytest.mark.parametrize("n", [64, N_PROMPTS])
def test_planted_ratings_are_recovered(n):
    truth = {"M0": 0.0, "M1": 60.0, "M2": 150.0}
    figures: dict[str, list] = {m: [] for m in truth}
    for seed in range(N_SIMULATIONS):
        rng = np.random.default_rng(seed)
        duels = []
        for a, b in (("M1", "M0"), ("M2", "M0"), ("M2", "M1")):
            p = 1 / (1 + 10 ** ((truth[b] - truth[a]) / 400))
            duels.append((a, b, {str(i): float(x < p) for i, x in enumerate(rng.random(n))}))
        for m, f in winrates.bradley_terry(duels, anchor="M0", n_draws=400).items():
            figures[m].append(f)
    for m in ("M1", "M2"):
        assert np.mean([f["value"] for f in figures[m]]) == pytest.approx(truth[m], abs=6)
        assert 0.93 <= coverage(figures[m], truth[m]) <= 0.97, m
