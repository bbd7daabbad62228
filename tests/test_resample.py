"""Resampling many prompts: the same draws and intervals as by one large array, in memory that does not grow."""

import tracemalloc

import numpy as np
import pytest

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
