"""From scored candidates to what the next model learns: preference pairs, or positives only."""

import hashlib
from collections import defaultdict


def _tie_key(seed: int, cand_id: str) -> str:
    # a seeded, fixed order among equals that does not depend on where a row stands in a file
    return hashlib.sha256(f"{seed}:{cand_id}".encode()).hexdigest()


def scored_candidates(candidates: list[dict], judgements: list[dict]) -> dict[str, list[dict]]:
    """Candidates by prompt_id, each with its judge's `score` (None where no judgement could be parsed)."""
    score = {j["id"]: j["score"] for j in judgements}
    by_prompt = defaultdict(list)
    for c in candidates:
        by_prompt[c["prompt_id"]].append(c | {"score": score.get(c["cand_id"])})
    return by_prompt


def build_pairs(
    prompts: list[dict], candidates: list[dict], judgements: list[dict], *, seed: int = 0, min_margin: float = 0.0
) -> tuple[list[dict], dict[str, int]]:
    """One pair a prompt: highest against lowest mean score (Yuan et al. 2024, section 2.4).

    Returns (pairs, drops). Equal scores discard the prompt. Where several candidates share the highest
    or the lowest score, a seeded hash of their ids picks one. Candidates without a valid score take no
    part: unparsed is not "worst". Reasons: few_scored (fewer than two valid scores), tie (all equal),
    small_margin (below `min_margin`), same_text, empty_chosen.
    """
    by_prompt = scored_candidates(candidates, judgements)
    pairs, drops = [], dict.fromkeys(("few_scored", "tie", "small_margin", "same_text", "empty_chosen"), 0)
    for p in prompts:
        valid = [c for c in by_prompt[p["prompt_id"]] if c["score"] is not None]
        if len(valid) < 2:
            drops["few_scored"] += 1
            continue
        chosen = min(valid, key=lambda c: (-c["score"], _tie_key(seed, c["cand_id"])))
        rejected = min(valid, key=lambda c: (c["score"], _tie_key(seed, c["cand_id"])))
        margin = chosen["score"] - rejected["score"]
        reason = (
            "tie"
            if margin == 0
            else "small_margin"
            if margin < min_margin
            else "same_text"
            if chosen["text"] == rejected["text"]
            else "empty_chosen"
            if not chosen["text"]
            else None
        )
        if reason:
            drops[reason] += 1
            continue
        pairs.append(
            {
                "prompt_id": p["prompt_id"],
                "prompt": p["prompt"],
                "chosen_id": chosen["cand_id"],
                "rejected_id": rejected["cand_id"],
                "chosen": chosen["text"],
                "rejected": rejected["text"],
                "chosen_score": chosen["score"],
                "rejected_score": rejected["score"],
                "chosen_ended": chosen["ended"],
                "rejected_ended": rejected["ended"],
            }
        )
    return pairs, drops


def build_positives(
    prompts: list[dict], candidates: list[dict], judgements: list[dict], *, seed: int = 0, min_score: float = 4.5
) -> tuple[list[dict], dict[str, int]]:
    """The positives-only variant (appendix A.4): the best candidate of a prompt if it scores `min_score`.

    The paper takes perfect 5s; an expected score counts as 5 from 4.5, where it rounds to it. Answers
    that did not end are left out, since they would be learned with an end they never had.
    """
    by_prompt = scored_candidates(candidates, judgements)
    positives, drops = [], dict.fromkeys(("few_scored", "low_score"), 0)
    for p in prompts:
        valid = [c for c in by_prompt[p["prompt_id"]] if c["score"] is not None and c["ended"] and c["text"]]
        if not valid:
            drops["few_scored"] += 1
            continue
        best = min(valid, key=lambda c: (-c["score"], _tie_key(seed, c["cand_id"])))
        if best["score"] < min_score:
            drops["low_score"] += 1
            continue
        positives.append(
            {
                "prompt_id": p["prompt_id"],
                "prompt": p["prompt"],
                "response": best["text"],
                "cand_id": best["cand_id"],
                "score": best["score"],
            }
        )
    return positives, drops
