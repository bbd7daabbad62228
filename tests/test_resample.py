"""Resampling many prompts: the same draws and intervals as by one large array, in memory that does not grow."""

import tracemalloc

import numpy as np
import pytest
from scipy import stats

from srlm_utils import metrics, resample, winrates


def whole(n, n_draws, seed):
    return np.vstack([*resample.weights(n, n_draws, seed)])


@pytest.mark.parametrize("n", [2, 7, 50])
def test_rows_are_the_sample_each_prompt_left_out_and_the_draws(monkeypatch, n):
    drawn = np.random.default_rng(3).integers(n, size=(40, n))
    draws = [np.bincount(d, minlength=n) for d in drawn]
    for at_once in (1, 3 * n, 10**6):  # however many are held at a time
        monkeypatch.setattr(resample, "AT_ONCE", at_once)
        assert (whole(n, 40, 3) == np.vstack([np.ones((1, n)), 1 - np.eye(n), draws])).all()


def test_a_caller_that_makes_more_of_a_row_gets_fewer_rows():
    sizes = [len(rows) for rows in resample.weights(10, 1000, 0, width=resample.AT_ONCE // 100)]
    assert max(sizes) == 100 and sum(sizes) == 1011


def test_groups_leave_out_every_prompt_once(monkeypatch):
    monkeypatch.setattr(resample, "GROUPS", 8)
    rows = whole(30, 5, 0)
    assert resample.n_left_out(30) == 8 and rows.shape == (1 + 8 + 5, 30)
    left_out = 1 - rows[1:9]
    assert (left_out.sum(0) == 1).all() and {*left_out.sum(1)} == {3, 4}


def test_totals_are_weighted_sums(monkeypatch):
    columns = np.random.default_rng(1).normal(size=(40, 3))
    monkeypatch.setattr(resample, "AT_ONCE", 200)
    assert np.allclose(resample.totals(columns, 100, 5), whole(40, 100, 5) @ columns)


@pytest.mark.parametrize("order", [lambda x: x, np.sort])  # rows that come sorted are no trap
def test_groups_give_the_intervals_of_single_prompts(monkeypatch, order):
    values = order(np.random.default_rng(0).lognormal(sigma=1.5, size=3000))
    figures = []
    for groups in (3000, 1000):
        monkeypatch.setattr(resample, "GROUPS", groups)
        sums = resample.totals(np.stack([values, np.ones(3000)], 1), 2000, 0)
        figures.append(resample.interval(sums[:, 0] / sums[:, 1], 3000))
    single, grouped = np.array(figures)
    centre = (single[1] + single[0]) / 2
    assert abs(centre - values.mean()) > 0.02 * (single[1] - single[0])  # skewness shows: else nothing is compared
    assert np.abs(grouped - single).max() < 0.02 * (single[1] - single[0])


@pytest.mark.parametrize("side", [1, -1])
def test_the_interval_of_a_skewed_sample_leans_to_its_long_tail(side):
    """Percentiles of the same draws, at the same level, miss more often on that side."""
    values = side * np.random.default_rng(0).lognormal(size=30)
    figure = metrics.mean(values, share=False)
    sums = resample.totals(values[:, None], metrics.N_BOOTSTRAP)[1 + 30 :, 0] / 30
    z = stats.t.ppf(0.975, 29) * (30 / 29) ** 0.5
    low, high = np.quantile(sums, stats.norm.cdf([-z, z]))
    assert min(side * (figure["low"] - low), side * (figure["high"] - high)) > 0.03 * (high - low)


def test_an_interval_over_two_seeds_by_hand():
    """Seeds of mean 2 and 5 over three prompts, whose means over seeds are off by -1.5, -0.5 and 2."""
    figure = metrics.ratio_over_seeds([[1, 2, 3], [3, 4, 8]], np.ones((2, 3)), share=False)
    prompts, seeds = (1.5**2 + 0.5**2 + 2**2) / 2 / 3, (1.5**2 + 1.5**2) / 2
    t = (prompts * stats.t.ppf(0.975, 2) + seeds * stats.t.ppf(0.975, 1)) / (prompts + seeds)
    half = t * (prompts + seeds) ** 0.5
    assert (figure["value"], figure["n"]) == (3.5, 6)
    assert (figure["low"], figure["high"]) == pytest.approx((3.5 - half, 3.5 + half))


def test_an_interval_over_three_seeds_by_hand():
    """Seeds of mean 2, 4 and 3 over four prompts, whose means over seeds are off by -3, -1, 1 and 3."""
    figure = metrics.ratio_over_seeds([[0, 2, 2, 4], [0, 2, 6, 8], [0, 2, 4, 6]], np.ones((3, 4)), share=False)
    prompts, seeds = (9 + 1 + 1 + 9) / 3 / 4, (1 + 1 + 0) / 2 / 3
    freedom = (prompts + seeds) ** 2 / (prompts**2 / 3 + seeds**2 / 2)
    half = stats.t.ppf(0.975, freedom) * (prompts + seeds) ** 0.5
    assert (figure["low"], figure["high"]) == pytest.approx((3 - half, 3 + half))


def test_what_is_so_in_all_seeds_has_the_bound_of_its_prompts():
    """Three seeds that agree on twelve prompts are no 36 trials, and not three."""
    figure = metrics.ratio_over_seeds(np.ones((3, 12)), np.ones((3, 12)))
    assert (figure["low"], figure["high"]) == (pytest.approx(0.05 ** (1 / 12)), 1)
    flat = metrics.ratio_over_seeds(np.ones((3, 12)), np.ones((3, 12)), share=False)
    assert flat["low"] == flat["high"] == 1  # no share, and so without a bound


def test_a_seed_counts_once_however_much_it_measured():
    figure = metrics.ratio_over_seeds([[1, 1], [1, 1], [0, 0]], [[1, 1], [4, 4], [0, 0]])
    assert (figure["value"], figure["n"]) == (pytest.approx((1 + 1 / 4) / 2), 10)  # the third measured nothing
    one = metrics.ratio_over_seeds([[1, 0, 1], [0, 0, 0]], [[1, 1, 1], [0, 0, 0]])
    assert one == metrics.ratio([1, 0, 1], [1, 1, 1])
    assert metrics.ratio_over_seeds([[0], [0]], [[0], [0]]) == metrics.no_interval(None, 0)


@pytest.mark.slow
def test_means_cover_when_groups_are_left_out(monkeypatch):
    monkeypatch.setattr(metrics, "N_BOOTSTRAP", 1000)
    monkeypatch.setattr(resample, "GROUPS", 32)
    rng = np.random.default_rng(1)
    figures = [metrics.mean(rng.gamma(4, 0.5, 64)) for _ in range(2000)]
    assert 0.93 <= np.mean([f["low"] <= 2 <= f["high"] for f in figures]) <= 0.97


def _peak_mb(call) -> float:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mean", "gain", "beyond_length", "length_controlled", "kappa", "ratings"])
def test_memory_over_4000_prompts(name):
    """An array of all draws would hold 450 MB for a mean, one of all its pairs 160 MB three times over for a model."""
    n, rng = 4000, np.random.default_rng(0)
    results, gaps, ids = rng.choice([0, 0.5, 1], n), rng.normal(size=n), [f"p{i}" for i in range(n)]
    of = dict(zip(ids, results, strict=True))
    call = {
        "mean": lambda: metrics.mean(gaps, share=False),
        "gain": lambda: metrics.ratio_difference((results, np.ones(n)), (results[::-1], np.ones(n))),
        "beyond_length": lambda: metrics.beyond_length(
            [[(g, -g + r), (r, g)] for g, r in zip(gaps, results, strict=True)]
        ),
        "length_controlled": lambda: winrates.length_controlled(results, gaps),
        "kappa": lambda: winrates.kappa(of, dict(zip(ids, results[::-1], strict=True))),
        "ratings": lambda: winrates.bradley_terry([("B", "A", of), ("C", "A", of), ("C", "B", of)], anchor="A"),
    }[name]
    assert _peak_mb(call) < 250
