"""95 % intervals over prompts: in closed form for shares, from resampling for everything else.

Which method a figure has was decided by simulation (LOG.md): plain percentile intervals of a bootstrap are too narrow
where prompts are few or results lopsided.
"""

from collections.abc import Iterator

import numpy as np


def share_interval(num: np.ndarray, den: np.ndarray) -> tuple[float, float]:
    """Interval of sum(num) / sum(den), a share in 0 to 1; one entry per prompt, 0 <= num <= den, two prompts at least.

    Wilson's score interval (1927), n being the number of independent trials that has the variance found between prompts
    (as Korn and Graubard 1998) and Student's t in place of the normal quantile. Where all prompts are alike nothing
    varies, and the bound is exact (Clopper and Pearson 1934, one-sided): 12 of 12 wins are [78, 100] %.
    """
    value = num.sum() / den.sum()
    off = num - value * den
    if np.abs(off).max() < 1e-12 * den.max():
        unseen = unseen_share(den)
        return value * (1 - unseen), value + (1 - value) * unseen
    n = len(num)
    trials = value * (1 - value) * den.sum() ** 2 / ((off**2).sum() * n / (n - 1))
    return _wilson(value, trials, _t(n))


def seeds_interval(num: np.ndarray, den: np.ndarray, *, share: bool) -> tuple[float, float]:
    """Interval of the mean over seeds of sum(num) / sum(den); both (seeds, prompts), two of each at least.

    Seeds answer the same prompts, so both are samples: the variance is that of the prompts' means over seeds, divided
    by their number, plus that of the seeds' figures, divided by theirs. What one seed did on one prompt counts in both.
    Nothing is drawn, since three seeds are too few to draw from; Student's t with Satterthwaite's degrees of freedom
    (1946) pays for the few. Two seeds often agree by chance and would pay nothing then: their t is the mean of both
    parts' own, weighted by variance (Cochran and Cox 1957). Shares have Wilson's form.
    """
    n_seeds, n_prompts = num.shape
    totals = den.sum(1, keepdims=True)
    values = num.sum(1, keepdims=True) / totals
    off = ((num - values * den) * n_prompts / totals).mean(0)  # what each prompt adds to the mean over seeds
    parts = np.array([off.var(ddof=1) / n_prompts, values.var(ddof=1) / n_seeds])
    value, variance = float(values.mean()), float(parts.sum())
    if variance < 1e-24:
        if not share:
            return value, value
        unseen = unseen_share(den.sum(0))
        return value * (1 - unseen), value + (1 - value) * unseen
    if n_seeds == 2:
        t = float((parts * (_t(n_prompts), _t(n_seeds))).sum() / variance)
    else:
        t = _t(1 + variance**2 / (parts**2 / (n_prompts - 1, n_seeds - 1)).sum())
    if not share:
        half = float(t * variance**0.5)
        return value - half, value + half
    return _wilson(value, value * (1 - value) / variance, t)


def _wilson(value: float, trials: float, t: float) -> tuple[float, float]:
    z2 = t**2
    middle = (value + z2 / (2 * trials)) / (1 + z2 / trials)
    half = np.sqrt(z2 * (value * (1 - value) / trials + z2 / (4 * trials**2))) / (1 + z2 / trials)
    return max(float(middle - half), 0.0), min(float(middle + half), 1.0)


def unseen_share(den: np.ndarray) -> float:
    """The largest share of prompts that is missing from a sample in 5 % of cases; near 3 / n (the rule of three).

    Prompts of different size count as fewer (Kish 1965), since one of them can hold most rows.
    """
    return float(1 - 0.05 ** ((den**2).sum() / den.sum() ** 2))


GROUPS = 1000  # what is left out at most: of more prompts, a random group each time
AT_ONCE = 4_000_000  # numbers held in memory at a time, about


def n_left_out(n: int) -> int:
    """How many times some of n prompts are left out: each prompt by itself, or `GROUPS` groups where n is larger."""
    return min(n, GROUPS)


def weights(n: int, n_draws: int, seed: int = 0, width: int = 0) -> Iterator[np.ndarray]:
    """How often each of n prompts counts, some (rows, n) at a time: the sample, parts of it, the draws.

    1 + `n_left_out` + n_draws rows in all; `width` is how many numbers a caller makes of a row, if not n. Memory hardly
    grows with n, and time as n does. Left out are at most `GROUPS` random groups: they measure a statistic's skewness
    as single prompts do, because what independent prompts add to its third moment and to its variance adds up.
    """
    at_once, n_groups = max(1, AT_ONCE // (width or n)), n_left_out(n)
    group = np.arange(n) if n == n_groups else np.random.default_rng([seed, 1]).permutation(n) % n_groups
    yield np.ones((1, n))
    for i in range(0, n_groups, at_once):
        yield (group != np.arange(i, min(i + at_once, n_groups))[:, None]).astype(float)
    rng = np.random.default_rng(seed)
    for i in range(0, n_draws, at_once):
        k = min(at_once, n_draws - i)
        drawn = rng.integers(n, size=(k, n)) + n * np.arange(k)[:, None]
        draws = np.bincount(drawn.ravel(), minlength=k * n)  # 5 times as fast as multinomial
        yield draws.reshape(k, n).astype(float)


def totals(columns: np.ndarray, n_draws: int, seed: int = 0) -> np.ndarray:
    """Sums of (prompts, columns) by the rows of `weights`: (1 + n_left_out + n_draws, columns)."""
    return np.vstack([w @ columns for w in weights(len(columns), n_draws, seed)])


def interval(values: np.ndarray, n: int) -> tuple[float, float]:
    """BCa interval (Efron 1987) of a statistic of n prompts, from its values on the rows of `weights`.

    Bias from the draws (those that equal the value count half), acceleration from leaving out prompts; Student's t
    times the root of n / (n - 1) for the normal quantile (Hesterberg 2015). Undefined values are left out.
    """
    from scipy.special import ndtr, ndtri  # not needed to import the package

    value, without, draws = values[0], values[1 : n_left_out(n) + 1], values[n_left_out(n) + 1 :]
    without, draws = without[~np.isnan(without)], np.sort(draws[~np.isnan(draws)])
    if not len(draws):
        return float(value), float(value)
    near = 1e-9 * max(abs(value), 1e-3)  # the same counts, summed in another order, differ by roundings
    below = np.searchsorted(draws, (value - near, value + near)).mean() / len(draws)
    bias = ndtri(np.clip(below, 0.5 / len(draws), 1 - 0.5 / len(draws)))
    off = without.mean() - without if len(without) else np.zeros(1)
    spread = (off**2).sum()
    acceleration = (off**3).sum() / (6 * spread**1.5) if spread > 0 else 0.0
    z = bias + np.array([-1, 1]) * _t(n) * np.sqrt(n / (n - 1))
    low, high = np.quantile(draws, ndtr(bias + z / np.maximum(1 - acceleration * z, 1e-9)))
    return min(float(low), float(value)), max(float(high), float(value))


def logistic(x: np.ndarray, y: np.ndarray | float, weights: np.ndarray, *, ridge: float) -> np.ndarray:
    """Coefficients of weighted logistic models, one a row of `weights` (models, rows), by Newton's steps.

    `x` (rows, coefficients), `y` one number, (rows,) or (models, rows) in 0 to 1; `ridge` is the precision of the
    coefficients' prior, which keeps them finite.
    """
    k = x.shape[1]
    beta = np.zeros((len(weights), k))
    products, eye = np.einsum("ni,nj->nij", x, x).reshape(len(x), k * k), np.eye(k)
    for _ in range(60):
        p = 1 / (1 + np.exp(-np.clip(beta @ x.T, -30, 30)))
        gradient = (weights * (y - p)) @ x - ridge * beta
        hessian = ((weights * p * (1 - p)) @ products).reshape(-1, k, k) + ridge * eye
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        size = np.abs(step).max(-1, keepdims=True)
        beta += step * np.minimum(1, 4 / np.maximum(size, 1e-12))  # near separation a full step overshoots
        if size.max() < 1e-8:
            break
    return beta


def _t(n: float) -> float:
    """Student's t that 2.5 % of samples of n exceed."""
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, 0.975))
