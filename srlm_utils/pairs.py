"""From scored candidates to what the next model learns: preference pairs, or positives only."""

import hashlib
from collections import defaultdict
from collections.abc import Callable
from itertools import combinations

from srlm_utils.errors import DataError
from srlm_utils.lineage import is_draft
from srlm_utils.measures import has_list


def _tie_key(seed: int, cand_id: str) -> str:
    # a seeded, fixed order among equals that does not depend on where a row stands in a file
    return hashlib.sha256(f"{seed}:{cand_id}".encode()).hexdigest()


def scored_candidates(candidates: list[dict], judgements: list[dict]) -> dict[str, list[dict]]:
    """Candidates by prompt_id, each with its judge's `score` (None where no judgement could be parsed) and its
    `implicit` reward (None where there is none)."""
    found = {j["id"]: j for j in judgements}
    by_prompt = defaultdict(list)
    for c in candidates:
        judgement = found.get(c["cand_id"], {})
        by_prompt[c["prompt_id"]].append(c | {name: judgement.get(name) for name in ("score", "implicit")})
    return by_prompt


def consistency(candidates: list[dict]) -> float | None:
    """How far two rewards order one prompt's candidates alike: (Kendall's tau + 1) / 2 of `score` and `implicit`.

    1 for the same order, 0 for the reverse; a pair that either reward ties counts a half. None for fewer than two.
    """
    both = [(c["score"], c["implicit"]) for c in candidates if None not in (c["score"], c["implicit"])]
    signs = [(a - b) * (x - y) for (a, x), (b, y) in combinations(both, 2)]
    return sum(1.0 if s > 0 else 0.5 if s == 0 else 0.0 for s in signs) / len(signs) if signs else None


def by_the_model(candidates: list[dict]) -> list[dict]:
    """Those of `candidates` that the model in training wrote itself: all but an anchor's and a draft's."""
    return [c for c in candidates if not c.get("author")]


def by_a_draft(candidate: dict) -> bool:
    """Whether a draft of the next model wrote it (13_future)."""
    return is_draft(candidate.get("author", ""))


# `RULES`: each takes the candidates that may be chosen, the model's own and a draft's, those that may be rejected, its
# own and an anchor's, a seeded order among equals, and length_rho


def _best_and_worst(good: list[dict], bad: list[dict], order, _) -> tuple[dict, dict]:
    # where two are equal the model's own come first
    best = min(good, key=lambda c: (-c["score"], bool(c.get("author")), order(c)))
    return best, min(bad, key=lambda c: (c["score"], bool(c.get("author")), order(c)))


def _at_random(good: list[dict], bad: list[dict], order, _) -> tuple[dict, dict]:
    chosen = next(c for c in sorted(good, key=order) if c["text"] and any(b["text"] != c["text"] for b in bad))
    return chosen, next(c for c in sorted(bad, key=order) if c["text"] != chosen["text"])


def _longest_and_shortest(good: list[dict], bad: list[dict], order, _) -> tuple[dict, dict]:
    longest = min(good, key=lambda c: (-len(c["text"]), order(c)))
    return longest, min(bad, key=lambda c: (len(c["text"]), order(c)))


def _shortest_and_longest(good: list[dict], bad: list[dict], order, _) -> tuple[dict, dict]:
    # nobody is to learn that an empty answer is the better one
    shortest = min((c for c in good if c["text"]), key=lambda c: (len(c["text"]), order(c)))
    return shortest, min(bad, key=lambda c: (-len(c["text"]), order(c)))


def _length_controlled(good: list[dict], bad: list[dict], order, rho: float) -> tuple[dict, dict]:
    top, bottom = max(c["score"] for c in good), min(c["score"] for c in bad)
    slack = rho * (top - bottom)
    good = [c for c in good if c["score"] >= top - slack and c["text"]]
    bad = [c for c in bad if c["score"] <= bottom + slack]
    chosen = min(good, key=lambda c: (len(c["text"]), -c["score"], order(c)))
    return chosen, min(bad, key=lambda c: (-len(c["text"]), c["score"], order(c)))


def _of_one_form(good: list[dict], bad: list[dict]) -> tuple[list[dict], list[dict]]:
    """Those of both that hold a list, or that do not: whose scores lie further apart. Empty if no form has both."""
    sides = [[[c for c in side if has_list(c["text"]) == form] for side in (good, bad)] for form in (False, True)]
    sides = [(g, b) for g, b in sides if g and b and len({c["text"] for c in (*g, *b)}) > 1]
    return max(sides, key=lambda s: max(c["score"] for c in s[0]) - min(c["score"] for c in s[1]), default=([], []))


RULES = {  # by params.PairRule
    "score": _best_and_worst,
    "random": _at_random,
    "longer": _longest_and_shortest,
    "shorter": _shortest_and_longest,
    "length_control": _length_controlled,
}


def build_pairs(
    prompts: list[dict],
    candidates: list[dict],
    judgements: list[dict],
    *,
    seed: int = 0,
    min_margin: float = 0.0,
    rule: str = "score",
    length_rho: float = 0.0,
    chosen_ended: bool = False,
    same_form: bool = False,
    implicit_rule: str = "",
) -> tuple[list[dict], dict[str, int]]:
    """One pair a prompt; (pairs, drops by reason).

    `rule` says which two candidates:

    - score: highest against lowest mean score (Yuan et al. 2024, section 2.3). Among several that share it a
      seeded hash of their ids picks one.
    - length_control: of the candidates within `length_rho` of the way from the highest score to the lowest the
      shortest, against the longest within as much of the lowest (Wu et al. 2024); below 0.5 the two cannot meet.
    - controls that no score decides: random (two candidates by a seeded hash), longer (the longest over the
      shortest, in characters), shorter (the reverse).

    Whatever the rule, a prompt qualifies where its best and its worst candidate would make a pair, so that rules learn
    from the same prompts. An anchor's candidates may be rejected, never chosen, and a draft's chosen, never rejected:
    so with "score" the anchor's worst is rejected where it scores below the model's own worst, and the draft's best is
    chosen where it scores above the model's own best (Wang et al. 2025). Candidates without a valid score take no part:
    unparsed is not "worst"; nor do those without a token to learn from, empty and not ended. Reasons to drop a prompt:
    few_scored (fewer than two that take part, or none of them the model's own), tie (all equal), small_margin (best and
    worst are nearer than `min_margin`), same_text, empty_chosen; and same_length, where longer and shorter have nothing
    to choose between.

    `chosen_ended`: only answers that ended by themselves may be chosen, so that nobody learns to be cut off. A prompt
    without one, or where none of them scores above another answer though one that was cut off does, is dropped as
    none_ended.

    `same_form`: the pair is made among the answers that hold a list, or among those that hold none, whichever has the
    larger margin: so that what is learned is not to write lists, which a small model that judges itself prefers
    (LOG.md). A prompt whose pairs of one form have no margin is dropped as other_form. An addition of this kit.

    `implicit_rule` "agree" keeps a pair only if the implicit reward prefers the same answer (Zhou et al. 2025); others
    are dropped as rewards_disagree. "weigh" gives every pair the round's mean `consistency`, by which `train` weighs
    what it teaches (Wang et al. 2024).
    """
    if implicit_rule and all(j.get("implicit") is None for j in judgements):
        raise DataError(
            "the judgements hold no implicit rewards, which implicit_rule needs: set judge.implicit_reference to an "
            "earlier model such as M0 and run 05_judge again."
        )
    asked = {
        "same_length": rule in ("longer", "shorter"),
        "none_ended": chosen_ended,
        "other_form": same_form,
        "rewards_disagree": implicit_rule == "agree",
    }
    pairs, drops = [], dict.fromkeys(("few_scored", "tie", "small_margin", "same_text", "empty_chosen"), 0)
    drops |= {reason: 0 for reason, on in asked.items() if on}

    def order(c: dict) -> str:
        return _tie_key(seed, c["cand_id"])

    how = {"rule": rule, "length_rho": length_rho, "min_margin": min_margin}
    how |= {"chosen_ended": chosen_ended, "same_form": same_form}
    by_prompt = scored_candidates(candidates, judgements)
    for p in prompts:
        of_prompt = by_prompt[p["prompt_id"]]
        picked = _pick(of_prompt, order, **how)
        if implicit_rule == "agree" and not isinstance(picked, str) and not _rewards_agree(*picked):
            picked = "rewards_disagree"
        if isinstance(picked, str):
            drops[picked] += 1
        else:
            pairs.append(_row(p, *picked))
    if implicit_rule == "weigh" and pairs:
        weight = _mean_consistency(by_prompt)
        pairs = [p | {"consistency": weight} for p in pairs]
    return pairs, drops


def _pick(
    candidates: list[dict],
    order: Callable[[dict], str],
    *,
    rule: str,
    length_rho: float,
    min_margin: float,
    chosen_ended: bool,
    same_form: bool,
) -> tuple[dict, dict] | str:
    """(chosen, rejected) of one prompt's candidates, or the reason why they make no pair."""
    valid = [c for c in candidates if c["score"] is not None and (c["text"] or c["ended"])]
    if len(valid) < 2 or not by_the_model(valid):
        return "few_scored"
    able = [c for c in valid if not c.get("author") or by_a_draft(c)]
    good = [c for c in able if c["ended"] or not chosen_ended]
    bad = [c for c in valid if not by_a_draft(c)]
    if not good:
        return "none_ended"
    chosen, rejected = _best_and_worst(good, bad, order, length_rho)
    margin = chosen["score"] - rejected["score"]
    if margin <= 0:  # an answer that was cut off would have made a pair, or none would
        return "none_ended" if max(c["score"] for c in able) > rejected["score"] else "tie"
    if margin < min_margin:
        return "small_margin"
    if same_form:
        good, bad = _of_one_form(good, bad)
        if not good:
            return "other_form"
        chosen, rejected = _best_and_worst(good, bad, order, length_rho)
        margin = chosen["score"] - rejected["score"]
        if margin <= 0:
            return "other_form"
        if margin < min_margin:
            return "small_margin"
    if chosen["text"] == rejected["text"]:
        return "same_text"
    if not chosen["text"]:
        return "empty_chosen"
    chosen, rejected = RULES[rule](good, bad, order, length_rho)
    longer = len(chosen["text"]) - len(rejected["text"])
    # the other way round where only a draft's answer may be chosen and only the model's own be rejected
    if rule == "longer" and longer <= 0 or rule == "shorter" and longer >= 0:
        return "same_length"
    return "same_text" if chosen["text"] == rejected["text"] else (chosen, rejected)


def _rewards_agree(chosen: dict, rejected: dict) -> bool:
    """Whether the implicit reward prefers the chosen one, too; without one it does not."""
    implicit = [c["implicit"] for c in (chosen, rejected)]
    return None not in implicit and implicit[0] > implicit[1]


def _mean_consistency(by_prompt: dict[str, list[dict]]) -> float:
    """A round's mean `consistency` of the model's own answers; `DataError` where no prompt has one."""
    found = [consistency(by_the_model(of_prompt)) for of_prompt in by_prompt.values()]
    found = [c for c in found if c is not None]
    if not found:
        raise DataError(
            "implicit_rule weigh asks how far two rewards order the model's own answers to a prompt alike, and no "
            "prompt has two that both score: raise self_instruct.n_candidates and run 04_self_instruct again."
        )
    return sum(found) / len(found)


def _row(prompt: dict, chosen: dict, rejected: dict) -> dict:
    """A row of pairs.jsonl."""
    return {
        "prompt_id": prompt["prompt_id"],
        "prompt": prompt["prompt"],
        "chosen_id": chosen["cand_id"],
        "rejected_id": rejected["cand_id"],
        "chosen": chosen["text"],
        "rejected": rejected["text"],
        "chosen_score": chosen["score"],
        "rejected_score": rejected["score"],
        "chosen_ended": chosen["ended"],
        "rejected_ended": rejected["ended"],
    }


ADVICE = {
    "few_scored": "two scored candidates make a pair: raise self_instruct.n_candidates (max_new_tokens, where they are "
    "empty), or take judge_mode expected",
    "tie": "look at the score histogram of 05_judge; in judge_mode expected hardly any two scores are equal",
    "small_margin": "lower min_margin",
    "same_text": "raise self_instruct.temperature: the candidates are alike",
    "empty_chosen": "look at the candidates: the best of them are empty",
    "none_ended": "raise self_instruct.max_new_tokens: hardly an answer ends, or hardly a good one",
    "other_form": "raise self_instruct.n_candidates: good and bad answers hardly ever share a form",
    "low_score": "lower positive_min_score",
}


def advice(drops: dict[str, int]) -> str:
    """What to do about the most common reason to drop a prompt."""
    reason = max(drops, key=drops.get)
    return ADVICE.get(reason, "read the candidates and their scores") if drops[reason] else "no prompts came"


def replayed(pairs: list[dict], share: float, seed: int = 0) -> list[dict]:
    """The `share` of an earlier round's pairs that is learned from again: a seeded hash of their prompts' ids picks."""
    return _some(pairs, round(share * len(pairs)), seed)


def capped(pairs: list[dict], share: float, n_others: int, seed: int = 0) -> list[dict]:
    """As many of `pairs` as make up `share`, below 1, of all when they join `n_others`; picked as by `replayed`."""
    return _some(pairs, int(share / (1 - share) * n_others + 1e-9), seed)


def _some(pairs: list[dict], n: int, seed: int) -> list[dict]:
    picked = {p["prompt_id"] for p in sorted(pairs, key=lambda p: _tie_key(seed, p["prompt_id"]))[:n]}
    return [p for p in pairs if p["prompt_id"] in picked]


def build_positives(
    prompts: list[dict], candidates: list[dict], judgements: list[dict], *, seed: int = 0, min_score: float = 4.5
) -> tuple[list[dict], dict[str, int]]:
    """The positives-only variant (appendix A.4): the best candidate of a prompt if it scores `min_score`.

    The paper takes perfect 5s; an expected score counts as 5 from 4.5, where it rounds to it. Answers
    that did not end are left out, since they would be learned with an end they never had. Reasons to drop a prompt:
    few_scored (no valid score), none_ended (no scored answer that ended and says something), low_score.
    """
    by_prompt = scored_candidates(by_the_model(candidates), judgements)
    positives, drops = [], dict.fromkeys(("few_scored", "none_ended", "low_score"), 0)
    for p in prompts:
        scored = [c for c in by_prompt[p["prompt_id"]] if c["score"] is not None]
        valid = [c for c in scored if c["ended"] and c["text"]]
        if not valid:
            drops["none_ended" if scored else "few_scored"] += 1
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
