"""Figures with intervals: reward agreement and win rates. numpy and scipy only; `measures` has those of texts.

Every figure is a ratio of sums over prompts, and its 95 % interval (`resample`) takes prompts for the sample, never
rows: the replies to one prompt are not independent.
"""

import numpy as np

from srlm_utils import resample

N_BOOTSTRAP = 10_000
MIN_PAIRS = 10  # an accuracy over fewer says nothing: of a judge that can hardly be parsed

# name: (unit, what it says). Every metric of metrics.csv stands here and nowhere else.
METRICS = {
    "pairwise_accuracy": ("share", "reply pairs that the judge orders as they are ranked, among pairs it does not tie"),
    "tie_rate": ("share", "reply pairs that the judge scores alike"),
    "pairwise_accuracy_half_ties": ("share", "pairwise accuracy with half credit for ties"),
    "agreement_gain": (
        "share difference",
        "pairwise accuracy with half ties, minus the opponent's; unscored counts as a tie",
    ),
    "longer_baseline": ("share", "the same pairs ordered by length alone: longer is better"),
    "similar_length_accuracy": ("share", "the judge's half-tie accuracy on pairs whose lengths differ by 20 % at most"),
    "score_beyond_length": (
        "log-odds",
        "logistic model of which reply ranks higher: weight of a score gap of one standard deviation beside length",
    ),
    "five_best": ("share", "replies scored 5 (4.5 or more) that are ranked best; those without a score are left out"),
    "exact_match": (
        "share",
        "prompts whose whole ranking is the given one; a tie or a reply without a score is a miss",
    ),
    "unscored_rate": ("share", "ranked replies without a valid score; only exact_match and agreement_gain count them"),
    "spearman": ("correlation", "mean over prompts of Spearman's rho of score and rank; 0 where all scores are equal"),
    "kendall": ("correlation", "mean over prompts of Kendall's tau-b of score and rank; 0 where all scores are equal"),
    "parse_rate": ("share", "sampled judgements that end in a valid score"),
    "score_mass": ("share", "probability that the six scores hold of the whole vocabulary (expected mode)"),
    "score_std": ("points", "standard deviation of the scores"),
    "win_rate": ("share", "head-to-head wins, half of the ties included"),
    "win": ("share", "head-to-head wins"),
    "tie": ("share", "head-to-head ties, orders that disagree included"),
    "loss": ("share", "head-to-head losses"),
    "first_position_rate": ("share", "verdicts for the answer shown first; 0.5 is a judge without position bias"),
    "unread_rate": ("share", "prompts left out because a reply of the judge names neither answer (api)"),
    "order_disagreement": ("share", "prompts on which the two orders gave opposite verdicts"),
    "win_rate_length_controlled": ("share", "win rate with the effect of length taken out (after Dubois et al. 2024)"),
    "win_rate_similar_length": ("share", "win rate over answers whose lengths differ by 20 % at most"),
    "sign_test": ("p", "two-sided sign test over the prompts that are no tie"),
    "exam_accuracy": ("share", "the outside judge's exam: reply pairs ordered as ranked, half credit for ties"),
    "exam_tie_rate": ("share", "the outside judge's exam: reply pairs with the same score"),
    "exam_longer": ("share", "the outside judge's exam: what always preferring the longer reply would get"),
    "mean_score": ("points", "mean score of the test answers"),
    "answer_chars": ("characters", "mean length of the test answers"),
    "answer_tokens": ("tokens", "mean length of the test answers"),
    "ended_rate": ("share", "test answers that end by themselves within the token budget"),
    "repeated_4grams": ("share", "4-grams of an answer that occurred in it before, mean over answers"),
    "list_rate": ("share", 'test answers that hold a list: a line that begins as an item does ("-", "*", "1.")'),
    "prompt_strict_accuracy": ("share", "test prompts all of whose verifiable instructions the answer follows"),
    "prompt_loose_accuracy": ("share", "the same without a first or last line or asterisks, where that helps"),
    "instruction_strict_accuracy": ("share", "verifiable instructions of the test prompts that the answer follows"),
    "instruction_loose_accuracy": ("share", "the same without a first or last line or asterisks, where that helps"),
    "rouge_l": ("share", "ROUGE-L F1 of an answer and its prompt's reference answer, mean over prompts"),
    "distinct_1": ("share", "different words among all words of all answers; falls as answers grow longer or more"),
    "distinct_2": ("share", "different word pairs among all of all answers; falls as answers grow longer or more"),
    "refusal_rate": ("share", "test answers that begin by declining"),
    "language_drift": ("share", "test answers in another script than the prompt's, or in another of seven languages"),
    "unsafe_refusal_rate": ("share", "answers to unsafe prompts that begin by declining"),
    "over_refusal_rate": ("share", "answers to harmless prompts with dangerous words that begin by declining"),
    "reference_logprob": (
        "nats a token",
        "mean log-probability of a reference answer's tokens behind its prompt, mean over prompts",
    ),
    "pair_yield": ("share", "new prompts that became a preference pair"),
    "draft_chosen_rate": ("share", "pairs whose chosen answer a draft of the next model wrote"),
    "judge_pair_yield": ("share", "new prompts that became a pair of judgements (meta_judge)"),
    "meta_first_place_rate": ("share", "verdicts on two judgements for the one shown first; 0.5 is no position bias"),
    "candidate_score_std": ("points", "standard deviation of the candidates' scores"),
    "within_prompt_score_std": (
        "points",
        "standard deviation of the scores of one prompt's candidates, mean over prompts",
    ),
    "candidate_parse_rate": ("share", "judgements of candidates with a valid score"),
    "candidate_score_mass": ("share", "probability that the six scores hold of the whole vocabulary (expected mode)"),
    "candidate_tie_rate": ("share", "pairs of one prompt's candidates with the same score"),
    "modal_share": ("share", "candidates whose score, rounded, is the most common one"),
    "score_entropy": ("bits", "entropy of the candidates' rounded scores; 2.58 is six scores in equal parts"),
    "score_length_correlation": ("correlation", "Spearman's rho of the candidates' scores and lengths"),
    "cut_rate": ("share", "candidates of which the judge saw the beginning alone"),
    "reward_consistency": (
        "share",
        "pairs of one prompt's candidates that score and implicit reward order alike, ties half; mean over prompts",
    ),
    "chosen_chars": ("characters", "mean length of chosen answers"),
    "rejected_chars": ("characters", "mean length of rejected answers"),
    "alpaca_eval_win_rate": ("share", "AlpacaEval 2: the annotator's mean preference for the model over the reference"),
    "alpaca_eval_lc_win_rate": ("share", "AlpacaEval 2: length-controlled win rate; interval from its standard error"),
    "alpaca_eval_chars": ("characters", "mean length of the answers to AlpacaEval's instructions"),
    "mt_bench_expected": ("points", "MT-Bench's questions: mean expected score of both turns, 0 to 5; no rating"),
    "mt_bench_expected_turn_1": ("points", "MT-Bench's questions: mean expected score of the first turn, 0 to 5"),
    "mt_bench_expected_turn_2": ("points", "MT-Bench's questions: mean expected score of the second turn, 0 to 5"),
    "mt_bench_rating": ("points", "MT-Bench's questions: mean rating of both turns, 1 to 10"),
    "mt_bench_rating_turn_1": ("points", "MT-Bench's questions: mean rating of the first turn, 1 to 10"),
    "mt_bench_rating_turn_2": ("points", "MT-Bench's questions: mean rating of the second turn, 1 to 10"),
    "mt_bench_judged": ("share", "answers to MT-Bench's questions that got a score"),
    "lm_eval_acc": ("share", "lm-evaluation-harness: accuracy; interval from its standard error"),
    "lm_eval_acc_norm": (
        "share",
        "lm-evaluation-harness: accuracy with length-normalised choices; interval from its standard error",
    ),
    "lm_eval_exact_match": ("share", "lm-evaluation-harness: exact match; interval from its standard error"),
}
FIELD = [name for name in METRICS if name.startswith(("alpaca_eval", "mt_bench", "lm_eval"))]


def ratio(num, den, *, share: bool = True) -> dict:
    """sum(num) / sum(den) with a 95 % interval over the entries (one entry per prompt).

    Returns {"value", "low", "high", "n"}; n is sum(den) rounded. value is None where the denominator is 0, the interval
    is None for fewer than two prompts with a denominator. A share, 0 <= num <= den in each prompt, gets a score
    interval (12 of 12 an exact bound); all other numbers, and those that only look like a share (`share=False`), BCa
    over 10,000 draws.

    In simulations 95 % intervals covered win rates of 0.5 to 0.9 over 20 to 200 prompts in 94 to 97.5 %, pairwise
    accuracy over 10 to 200 prompts of 1 to 6 pairs in 94 to 97, means of numbers that are no shares in 93 to 96. A rate
    without ties over 10 prompts has 11 values: 96 to 99, and less at single rates (88 at the worst). Means of lognormal
    lengths (sigma 0.8) have 90 to 92 % up to 64 prompts.
    """
    num, den = np.asarray(num, float), np.asarray(den, float)
    num, den = num[den > 0], den[den > 0]
    if not len(den):
        return no_interval(None, 0)
    total = den.sum()
    value, n = float(num.sum() / total), int(round(total))
    if len(num) < 2:
        return no_interval(value, n)
    if share and (num >= 0).all() and (num <= den).all():
        low, high = resample.share_interval(num, den)
    else:
        sums = resample.totals(np.stack([num, den], 1), N_BOOTSTRAP)
        low, high = resample.interval(sums[:, 0] / sums[:, 1], len(num))
    return {"value": value, "low": low, "high": high, "n": n}


def ratio_difference(ours: tuple, theirs: tuple) -> dict:
    """`ratio` of ours minus that of theirs, each (num, den) over the same prompts: a paired bootstrap (BCa)."""
    (a, b), (c, d) = ([np.asarray(x, float) for x in side] for side in (ours, theirs))
    if not (b.sum() and d.sum()):
        return no_interval(None, 0)
    out = no_interval(float(a.sum() / b.sum() - c.sum() / d.sum()), len(a))
    if len(a) < 2:
        return out
    sums = resample.totals(np.stack([a, b, c, d], 1), N_BOOTSTRAP).T
    with np.errstate(invalid="ignore", divide="ignore"):  # a draw without rows of one side is left out
        values = sums[0] / sums[1] - sums[2] / sums[3]
    low, high = resample.interval(values, len(a))
    return out | {"low": low, "high": high}


def ratio_over_seeds(num, den, *, share: bool = True) -> dict:
    """Mean over seeds of sum(num) / sum(den), with a 95 % interval over prompts and seeds; both are (seeds, prompts).

    One seed has `ratio`'s interval, over prompts only. For several, see `resample.seeds_interval`; n is sum(den) over
    all of them. A prompt that a seed lacks has den 0 there. Seeds without any are left out.
    """
    num, den = np.atleast_2d(np.asarray(num, float)), np.atleast_2d(np.asarray(den, float))
    seeds, prompts = den.sum(1) > 0, den.sum(0) > 0
    num, den = num[seeds][:, prompts], den[seeds][:, prompts]
    if len(num) < 2:
        return ratio(num[0], den[0], share=share) if len(num) else no_interval(None, 0)
    value, n = float((num.sum(1) / den.sum(1)).mean()), int(round(den.sum()))
    if num.shape[1] < 2:
        return no_interval(value, n)
    low, high = resample.seeds_interval(num, den, share=share)
    return {"value": value, "low": low, "high": high, "n": n}


def mean(values, *, share: bool = True) -> dict:
    """Mean over prompts with its interval."""
    return ratio(values, np.ones(len(values)), share=share)


def no_interval(value: float | None, n: int) -> dict:
    """A figure without an interval, such as a standard deviation."""
    return {"value": value, "low": None, "high": None, "n": n}


def normal(value: float, error: float | None, n: int) -> dict:
    """A share that another program measured: 95 % interval of the normal distribution, within 0 and 1."""
    if error is None:
        return no_interval(value, n)
    return {"value": value, "low": max(value - 1.96 * error, 0.0), "high": min(value + 1.96 * error, 1.0), "n": n}


SIMILAR = 0.2  # lengths that differ by so much of the longer one, at most

AGREEMENT = (
    "pairwise_accuracy",
    "tie_rate",
    "pairwise_accuracy_half_ties",
    "longer_baseline",
    "similar_length_accuracy",
    "score_beyond_length",
    "five_best",
    "exact_match",
    "spearman",
    "kendall",
    "unscored_rate",
)

# ---- reward agreement (Yuan et al. 2024, section 3.1.2 and Table 4)

RATIOS = {  # figures of agreement that are ratios of `agreement_counts`: (numerator, denominator) of a prompt
    "pairwise_accuracy": lambda c: (c["right"], c["n"] - c["ties"]),
    "tie_rate": lambda c: (c["ties"], c["n"]),
    "pairwise_accuracy_half_ties": lambda c: (c["right"] + c["ties"] / 2, c["n"]),
    "longer_baseline": lambda c: (c["longer"], c["n"]),
    "similar_length_accuracy": lambda c: (c["near_right"], c["near"]),
    "five_best": lambda c: (c["fives_best"], c["fives"]),
    "spearman": lambda c: (c["spearman"], c["scored"]),
    "kendall": lambda c: (c["kendall"], c["scored"]),
    "unscored_rate": lambda c: (c["unscored"], c["replies"]),
}


def ordered_pairs(ranks) -> list[tuple[int, int]]:
    """Index pairs (better, worse) by rank; equal ranks make no pair."""
    return [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]


def agreement(prompts: list[dict]) -> dict[str, dict]:
    """The judge's agreement with rankings.

    `prompts`: {"ranks": ranks (0 best), "scores": the judge's scores or None, "lengths":
    characters, "prompt": its text} for each ranking. A prompt may have several, as in preference sets: they are one
    entry of the sample. Replies without a valid score are left out of that prompt, and counted as unscored_rate; but
    a ranking with one is no exact match, or leaving out would make a judge better. The paper
    does not say how it treats ties; pairwise accuracy is over pairs that the judge does not tie, and
    tie_rate and half credit stand beside it. five_best is over the replies scored 5, alone with a score or not.
    """
    counted = [c for c in agreement_counts(prompts).values() if c]
    if not counted:
        return dict.fromkeys(AGREEMENT, no_interval(None, 0))
    rows, gaps_of = [c[0] for c in counted], [c[1] for c in counted]
    col = {k: np.array([r[k] for r in rows], float) for k in rows[0]}
    figures = {k: ratio(*of(col), share=k not in ("spearman", "kendall")) for k, of in RATIOS.items()}
    figures["score_beyond_length"] = beyond_length([gaps for gaps in gaps_of if gaps])
    figures["exact_match"] = mean(col["exact"])
    return {k: figures[k] for k in AGREEMENT}


def agreement_counts(prompts: list[dict]) -> dict[str, tuple[dict, list] | None]:
    """(counts, score and length gaps of its pairs) by prompt of `agreement`'s rows; None where all replies rank alike.

    Sums over a prompt's rankings, but exact is the mean of all, and spearman and kendall of those with a scored pair
    (scored: 1 if there is any).
    """
    rankings: dict[str, list[tuple[dict, list]]] = {}
    for p in prompts:
        rankings.setdefault(p["prompt"], []).extend(filter(None, [_counts(p)]))
    return {prompt: _together(found) if found else None for prompt, found in rankings.items()}


def _together(found: list[tuple[dict, list]]) -> tuple[dict, list]:
    counts = {k: sum(c[k] for c, _ in found) for k in found[0][0]}
    counts["exact"] /= len(found)
    counts |= {k: counts[k] / max(counts["scored"], 1) for k in ("spearman", "kendall")}
    counts["scored"] = min(counts["scored"], 1)
    return counts, [gap for _, gaps in found for gap in gaps]


def _counts(p: dict) -> tuple[dict, list] | None:
    if not ordered_pairs(p["ranks"]):
        return None
    keep = [i for i, s in enumerate(p["scores"]) if s is not None]
    ranks, scores, lengths = ([p[k][i] for i in keep] for k in ("ranks", "scores", "lengths"))
    pairs, n_unscored = ordered_pairs(ranks), len(p["ranks"]) - len(keep)
    from scipy import stats  # slow to import, and needed nowhere else

    gaps = [scores[i] - scores[j] for i, j in pairs]
    near = [abs(lengths[i] - lengths[j]) <= SIMILAR * max(lengths[i], lengths[j]) for i, j in pairs]
    flat = not pairs or len(set(scores)) == 1
    fives = [r for r, s in zip(ranks, scores, strict=True) if s >= 4.5]
    counts = {
        "n": len(pairs),
        "right": sum(g > 0 for g in gaps),
        "ties": sum(g == 0 for g in gaps),
        "longer": sum(_credit(lengths, i, j) for i, j in pairs),
        "near": sum(near),
        "near_right": sum(_credit(scores, i, j) for (i, j), is_near in zip(pairs, near, strict=True) if is_near),
        "fives": len(fives),
        "fives_best": sum(r == min(p["ranks"]) for r in fives),
        "exact": not n_unscored and all(g > 0 for g in gaps),
        "replies": len(p["ranks"]),
        "unscored": n_unscored,
        "scored": bool(pairs),
        "spearman": 0.0 if flat else -float(stats.spearmanr(scores, ranks).statistic),
        "kendall": 0.0 if flat else -float(stats.kendalltau(scores, ranks).statistic),
    }
    return counts, [(g, np.log((1 + lengths[i]) / (1 + lengths[j]))) for g, (i, j) in zip(gaps, pairs, strict=True)]


def beyond_length(prompts: list[list[tuple[float, float]]], *, n_draws: int = 1000) -> dict:
    """What the judge's score says of the preference that length does not.

    `prompts`: for each prompt, for each pair of replies, (score, log of length) of the better one minus that of the
    worse one. In a logistic model without intercept, P(better) = sigmoid(a * score gap / its standard deviation + b *
    length gap / its standard deviation), this is a, with a 95 % interval from resampling prompts. A weak ridge
    (variance 100) keeps it finite; where everything is in order it alone decides how large the figure is. None for
    fewer than two prompts, and where all scores or all lengths are alike.
    """
    gaps = np.array([pair for pairs in prompts for pair in pairs], float).reshape(-1, 2)
    spread = np.sqrt((gaps**2).mean(0)) if len(gaps) else np.zeros(2)
    if len(prompts) < 2 or not spread.all():
        return no_interval(None, len(gaps))
    x, owner = gaps / spread, np.repeat(np.arange(len(prompts)), [len(pairs) for pairs in prompts])
    rows = resample.weights(len(prompts), n_draws, width=len(x))
    a = np.vstack([resample.logistic(x, 1, weights[:, owner], ridge=0.01) for weights in rows])
    low, high = resample.interval(a[:, 0], len(prompts))
    return {"value": float(a[0, 0]), "low": low, "high": high, "n": len(gaps)}


def agreement_gain(ours: list[dict], theirs: list[dict]) -> dict:
    """How much better one judge orders the same pairs than another: a paired bootstrap (BCa) over prompts.

    Both lists are rows of `agreement`, ranking by ranking. A pair earns 1 if it is ordered as ranked,
    0 if it is reversed, and half if the judge ties it or scored only one of the two.
    """
    gains = [credit(a) - credit(b) for a, b in zip(ours, theirs, strict=True)]
    n = [len(ordered_pairs(p["ranks"])) for p in ours]
    return ratio(*by_prompt([p["prompt"] for p in ours], gains, n), share=False)


def by_prompt(prompts: list[str], *columns: list[float]) -> list[list[float]]:
    """Sums of columns over the rows of each prompt, which are not independent; `prompts` are the texts, row by row."""
    place = {text: i for i, text in enumerate(dict.fromkeys(prompts))}
    sums = [[0.0] * len(place) for _ in columns]
    for out, column in zip(sums, columns, strict=True):
        for text, value in zip(prompts, column, strict=True):
            out[place[text]] += value
    return sums


def credit(prompt: dict) -> float:
    """What one ranking's pairs earn a judge together: 1 for each ordered as ranked, half for a tie or no score."""
    return sum(_credit(prompt["scores"], *p) for p in ordered_pairs(prompt["ranks"]))


def _credit(scores: list, better: int, worse: int) -> float:
    a, b = scores[better], scores[worse]
    return 0.5 if a is None or b is None or a == b else float(a > b)


# ---- head-to-head


def outcomes(verdicts: list[dict]) -> dict[str, float]:
    """1 (A wins), 0.5 (tie) or 0 (B wins) by prompt_id.

    A verdict row has `order` ("AB", "BA": who was shown first; "none" for a judge that scores each
    answer alone) and `p_first`, the probability that the first shown is better. Two orders that
    disagree are a tie (Yuan et al. 2024, section 3.1.2). A reply that says nothing ("unread") is no tie: its prompt is
    left out.
    """
    by_prompt: dict[str, list[float]] = {}
    for v in _read(verdicts):
        p_a = 1 - v["p_first"] if v["order"] == "BA" else v["p_first"]
        by_prompt.setdefault(v["prompt_id"], []).append(_side(p_a))
    return {k: 1.0 if min(v) == 1 else 0.0 if max(v) == 0 else 0.5 for k, v in by_prompt.items()}


def _read(verdicts: list[dict]) -> list[dict]:
    # out of a table, "unread" is not a number where a row has none
    unread = {v["prompt_id"] for v in verdicts if v.get("unread") is True}
    return [v for v in verdicts if v["prompt_id"] not in unread]


def _side(p: float) -> float:
    return 1.0 if p > 0.5 else 0.0 if p < 0.5 else 0.5


def head_to_head(verdicts: list[dict]) -> dict[str, dict]:
    """win, tie, loss, win_rate (half ties); for pairwise judges also position bias and disagreement, and how much could
    not be read, if anything."""
    asked = {v["prompt_id"] for v in verdicts}
    verdicts = _read(verdicts)
    read = {v["prompt_id"] for v in verdicts}
    result = np.array(list(outcomes(verdicts).values()))
    out = {"win_rate": mean(result), "win": mean(result == 1), "tie": mean(result == 0.5), "loss": mean(result == 0)}
    two = [v for v in verdicts if v["order"] in ("AB", "BA")]
    if two:
        first: dict[str, list[float]] = {}
        for v in two:
            first.setdefault(v["prompt_id"], []).append(_side(v["p_first"]))
        out["first_position_rate"] = ratio([sum(f) for f in first.values()], [len(f) for f in first.values()])
        out["order_disagreement"] = mean([len(f) == 2 and f[0] == f[1] != 0.5 for f in first.values()])
    if read != asked:
        out["unread_rate"] = mean([pid not in read for pid in asked])
    return out


def std(values) -> float | None:
    """Standard deviation (n - 1), None for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def metric_rows(figures: dict[str, dict], **where) -> list[dict]:
    """Rows of metrics.csv from named figures; `where` holds model, set, judge, judge_mode, opponent."""
    base = {"model": "", "opponent": "", "set": "", "judge": "", "judge_mode": ""} | where
    return [base | {"metric": name, **fig, "unit": METRICS[name][0]} for name, fig in figures.items()]
