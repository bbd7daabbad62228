"""Statistics of comparisons: known answers, planted effects recovered, intervals that cover what they promise."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from srlm_utils import metrics, report, winrates
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
    assert winrates.length_controlled([1, 1, 0, 0.5], [0, 0, 0, 0]) == raw
    assert winrates.length_controlled([1], [30])["low"] is None


def test_length_control_stays_finite_where_everything_is_won():
    figure = winrates.length_controlled([1] * 20, list(range(1, 21)))
    assert 0.5 < figure["value"] <= 1 and figure["high"] <= 1


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


def test_a_model_that_wins_all_has_a_finite_rating():
    figure = winrates.bradley_terry([("B", "A", {str(i): 1.0 for i in range(30)})], anchor="A")["B"]
    assert 400 < figure["value"] < 10_000 and math.isfinite(figure["high"])


def test_breakdown_and_buckets():
    figures = winrates.breakdown({"a": 1, "b": 0, "c": 1}, {"a": "x", "b": "x", "c": "y", "d": "z"})
    assert {g: (f["value"], f["n"]) for g, f in figures.items()} == {"x": (0.5, 2), "y": (1, 1)}
    assert figures["x"]["low"] < 0.01 and figures["y"]["low"] is None
    buckets = winrates.length_buckets({str(i): 10 * i for i in range(9, -1, -1)})
    assert list(dict.fromkeys(buckets.values())) == ["up to 30 characters", "up to 60", "more than 60"]
    assert [buckets[k] for k in ("3", "4", "7")] == ["up to 30 characters", "up to 60", "more than 60"]


def test_kappa_by_hand():
    a = dict(enumerate([1, 1, 1, 0, 0, 0.5]))
    b = dict(enumerate([1, 1, 0, 0, 0, 1]))
    # agreement 4/6; chance (3*3 + 2*3 + 1*0) / 36
    assert winrates.kappa(a, b)["value"] == pytest.approx((4 / 6 - 15 / 36) / (1 - 15 / 36))
    assert winrates.kappa(a, a)["value"] == 1
    same = {i: 1 for i in range(5)}
    assert winrates.kappa(same, same)["value"] is None
    assert winrates.kappa(a, {9: 1})["n"] == 0


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
    step = SimpleNamespace(params=SimpleNamespace(iterations=1), rows=files.__getitem__)
    found = report.duels(step)
    assert list(zip(found.model, found.opponent, found.prompt_id, found.result, strict=True)) == [
        ("SFT", "M0", "b", 1.0),
        ("M1", "M0", "a", 0.0),
        ("M1", "SFT", "a", 0.0),
    ]
    assert set(found.chars) == {4} and set(found.category) == {"list"}


# ---- planted effects


def simulate_length(seed: int, theta: float, phi: float, longer_by: float):
    """Verdicts of a judge that has an opinion (theta) and likes length (phi): results, gaps in units of their scale."""
    rng = np.random.default_rng(seed)
    gaps = rng.normal(longer_by, 1, N_PROMPTS)
    p = sigmoid(theta + phi * np.tanh(gaps / math.sqrt(1 + longer_by**2)))
    return (rng.random(N_PROMPTS) < p).astype(float), gaps


def test_a_pure_length_effect_is_removed():
    raw, controlled = [], []
    for seed in range(100):
        results, gaps = simulate_length(seed, 0.0, 2.0, 1.0)
        raw.append(np.mean(results))
        controlled.append(winrates.length_controlled(results, gaps, n_draws=2)["value"])
    assert np.mean(raw) > 0.65
    assert np.mean(controlled) == pytest.approx(0.5, abs=0.02)


def test_length_controlled_intervals_cover():
    theta = 0.5
    figures = [
        winrates.length_controlled(*simulate_length(s, theta, 1.0, 0.4), n_draws=400) for s in range(N_SIMULATIONS)
    ]
    assert np.mean([f["value"] for f in figures]) == pytest.approx(sigmoid(theta), abs=0.01)
    assert 0.93 <= coverage(figures, sigmoid(theta)) <= 0.97


def simulate_judge(seed: int, quality: float, bias: float) -> tuple[list[dict], float, float]:
    """A judge asked in both orders: `quality` in favour of A on average, prompts differ, and `bias` for the first."""
    rng = np.random.default_rng(seed)
    rows = []
    for i, q in enumerate(quality + rng.normal(0, 1, N_PROMPTS)):
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


def test_planted_win_rate_and_position_bias_are_recovered(monkeypatch):
    monkeypatch.setattr(metrics, "N_BOOTSTRAP", 600)
    win_rate, first = planted(0.6, 0.8)
    figures = [metrics.head_to_head(simulate_judge(s, 0.6, 0.8)) for s in range(N_SIMULATIONS)]
    for name, truth in (("win_rate", win_rate), ("first_position_rate", first)):
        mine = [f[name] for f in figures]
        assert np.mean([f["value"] for f in mine]) == pytest.approx(truth, abs=0.01)
        assert 0.93 <= coverage(mine, truth) <= 0.97, name


def test_planted_ratings_are_recovered():
    truth = {"M0": 0.0, "M1": 60.0, "M2": 150.0}
    figures: dict[str, list] = {m: [] for m in truth}
    for seed in range(N_SIMULATIONS):
        rng = np.random.default_rng(seed)
        duels = []
        for a, b in (("M1", "M0"), ("M2", "M0"), ("M2", "M1")):
            p = 1 / (1 + 10 ** ((truth[b] - truth[a]) / 400))
            duels.append((a, b, {str(i): float(x < p) for i, x in enumerate(rng.random(N_PROMPTS))}))
        for m, f in winrates.bradley_terry(duels, anchor="M0", n_draws=400).items():
            figures[m].append(f)
    for m in ("M1", "M2"):
        assert np.mean([f["value"] for f in figures[m]]) == pytest.approx(truth[m], abs=4)
        assert 0.93 <= coverage(figures[m], truth[m]) <= 0.97, m
