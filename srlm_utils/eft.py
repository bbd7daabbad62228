"""EFT: judge prompts with the justification and score to learn (Yuan et al. 2024, sections 2.1 and 3.1)."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable

from srlm_utils import judge
from srlm_utils.errors import ParamError
from srlm_utils.metrics import ordered_pairs

ADVICE = (
    "A model too small to justify its scores can learn scores made of the ranks: set build_eft.scores_from: ranks and "
    "build_eft.formats: [score_first]."
)


def has_scores(row: dict) -> bool:
    """Whether every reply of a ranked prompt already carries a score and a justification."""
    return all(r.get("score") is not None and r.get("justification") for r in row["replies"])


def agrees(ranks: list[int], scores: list[float], rule: str = "no_reversal") -> bool:
    """Whether scores order replies as they are ranked. Where two replies are ranked alike, any order agrees.

    The paper says no more than that the rankings agree. "strict": every pair of unlike ranks is in order.
    "no_reversal": none is reversed, and one at least is in order; so some may be tied.
    """
    pairs = ordered_pairs(ranks)
    if rule == "strict":
        return all(scores[i] > scores[j] for i, j in pairs)
    return all(scores[i] >= scores[j] for i, j in pairs) and any(scores[i] > scores[j] for i, j in pairs)


def accept(ranked: list[dict], judged: list[dict], rule: str = "no_reversal") -> tuple[list[dict], dict[str, int]]:
    """Rejection against the human ranking: keep judgements whose scores agree with it.

    `judged` are `judge.sampled_scores` rows with ids ``<prompt_id>/<reply_id>``. The s-th judgement of
    every reply of a prompt makes the s-th try; the first try that is parsed and justified for all replies and
    `agrees`, its scores rounded as they are learned (of 3.9 and 3.6 neither is the higher one then), is kept. Returns
    ({prompt_id, reply_id, rank, prompt, reply, score, justification} rows, drops by reason).
    """
    samples = {row["id"]: row["samples"] for row in judged}
    kept, drops = [], {"unparsed": 0, "disagrees": 0}
    for row in ranked:
        tries = list(zip(*(samples[f"{row['prompt_id']}/{r['reply_id']}"] for r in row["replies"]), strict=True))
        ranks = [r["rank"] for r in row["replies"]]
        parsed = [t for t in tries if all(s["score"] is not None and judge.justification(s["text"]) for s in t)]
        good = next((t for t in parsed if agrees(ranks, [judge.rounded(s["score"]) for s in t], rule)), None)
        if good is None:
            drops["disagrees" if parsed else "unparsed"] += 1
            continue
        for r, s in zip(row["replies"], good, strict=True):
            kept.append(_judged(row, r, judge.rounded(s["score"]), judge.justification(s["text"])))
    return kept, drops


def from_scored(ranked: list[dict]) -> list[dict]:
    """The same rows from seeds that already carry score and justification."""
    return [_judged(row, r, r["score"], r["justification"]) for row in ranked for r in row["replies"]]


def from_ranks(ranked: list[dict]) -> list[dict]:
    """The same rows from ranks alone: the best reply of a prompt gets 5, the worst 1, those between evenly spaced
    scores. There is nothing to justify them with, so they are for the score-first format. Prompts whose replies all
    rank alike are left out."""
    rows = []
    for row in ranked:
        ranks = sorted({r["rank"] for r in row["replies"]})
        if len(ranks) < 2:
            continue
        for r in row["replies"]:
            place = ranks.index(r["rank"]) / (len(ranks) - 1)
            rows.append(_judged(row, r, judge.rounded(5 - 4 * place), ""))
    return rows


def _judged(row: dict, reply: dict, score: float, justification: str) -> dict:
    of_reply = {"reply_id": reply["reply_id"], "rank": reply["rank"], "prompt": row["prompt"], "reply": reply["text"]}
    return {"prompt_id": row["prompt_id"]} | of_reply | {"score": score, "justification": justification}


def thin_modal_score(rows: list[dict], max_share: float, seed: int) -> tuple[list[dict], int]:
    """Drop judgements with the score that most have until it is at most `max_share` of them; (rows left, dropped).

    The paper resamples because too many judgements score 4. Which ones go is a seeded choice. One score alone is
    thinned: the next most common one may have a larger share afterwards.
    """
    by_score = defaultdict(list)
    for r in rows:
        by_score[r["score"]].append(r)
    if len(by_score) < 2:
        return rows, 0
    modal = max(by_score, key=lambda s: len(by_score[s]))
    others = len(rows) - len(by_score[modal])
    allowed = int(max_share / (1 - max_share) * others + 1e-9) if max_share < 1 else len(rows)

    def shuffled(r: dict) -> str:  # reply ids are unique within their prompt only
        return hashlib.sha256(f"{seed}:{r.get('prompt_id')}/{r['reply_id']}".encode()).hexdigest()

    order = sorted(by_score[modal], key=shuffled)
    gone = {id(r) for r in order[allowed:]}
    return [r for r in rows if id(r) not in gone], len(gone)


def training_rows(rows: list[dict], rubric: judge.Rubric, formats: list[str]) -> list[dict]:
    """Judgements as (prompt, response) rows for supervised training, one for each format.

    `group` is the ranked prompt: its rows are trained together, and `rank` is the order they are taught in. Raises
    `ParamError` where a judgement without a justification is to be written in full.
    """
    if "justify_first" in formats and not all(r["justification"].strip() for r in rows):
        raise ParamError(
            "formats: justify_first needs a justification of every score, and scores made of ranks have none: "
            "set build_eft.formats to [score_first]."
        )
    return [
        {
            "prompt_id": f"{r['prompt_id']}/{r['reply_id']}/{fmt}",
            "group": r["prompt_id"],
            "rank": r["rank"],
            "format": fmt,
            "score": r["score"],
            "prompt": rubric.render(r["prompt"], r["reply"], fmt),
            "response": judge.target(r["justification"], r["score"], fmt),
        }
        for r in rows
        for fmt in dict.fromkeys(formats)
    ]


def fit_replies(rows: list[dict], tokenizer_of: Callable, max_response_tokens: int) -> tuple[list[dict], int]:
    """(rows with their replies as the judge will see them, `judge.fit`, number of replies that were cut).

    `tokenizer_of()` is called only where a reply may be too long.
    """
    if not max_response_tokens or all(judge.surely_fits(r["reply"], max_response_tokens) for r in rows):
        return rows, 0
    tokenizer = tokenizer_of()
    fitted = [r | {"reply": judge.fit(tokenizer, r["reply"], max_response_tokens)} for r in rows]
    return fitted, sum(a["reply"] != b["reply"] for a, b in zip(rows, fitted, strict=True))


def score_counts(rows: list[dict]) -> dict[int, int]:
    """How many judgements give each score, 0 to 5."""
    c = Counter(r["score"] for r in rows)
    return {s: c.get(s, 0) for s in range(judge.MIN_SCORE, judge.MAX_SCORE + 1)}
