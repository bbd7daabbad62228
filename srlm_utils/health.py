"""A round's vital signs: what 06_build_pairs writes to health.json and the report shows."""

import math
from collections import Counter

from srlm_utils.judge import rounded
from srlm_utils.lineage import is_draft
from srlm_utils.metrics import mean, metric_rows, no_interval, ratio, std
from srlm_utils.pairs import by_a_draft, by_the_model, consistency, scored_candidates

OF_A_DRAFT = ("pair_yield", "draft_chosen_rate", "chosen_chars", "rejected_chars")


def round_metrics(
    model: str, prompts: list[dict], candidates: list[dict], judgements: list[dict], kept: list[dict]
) -> list[dict]:
    """Metric rows of one round, set "aift": pair yield, parse rate or the scores' mass, their spread and ties, lengths.

    Scores are those of the model's own candidates. Of a draft only what is its own: yield, lengths and whose the chosen
    ones are; the rest would be the figures of the round it drafts for, once more.
    """
    own = by_the_model(candidates)
    ids, kept_ids = {c["cand_id"] for c in own}, {r["prompt_id"] for r in kept}
    by_id = {j["id"]: j for j in judgements if j["id"] in ids}
    by_prompt = scored_candidates(own, [*by_id.values()])
    judged = [[by_id[c["cand_id"]] for c in cs if c["cand_id"] in by_id] for cs in by_prompt.values()]
    figures = {"pair_yield": mean([p["prompt_id"] in kept_ids for p in prompts])}
    figures |= _of_judgements(judged) | _of_scores([*by_prompt.values()])
    if any("meta" in j for j in by_id.values()):
        figures |= _of_meta_judge(judged, len(prompts))
    if drafted := {c["cand_id"] for c in candidates if by_a_draft(c)}:
        figures["draft_chosen_rate"] = mean([r.get("chosen_id") in drafted for r in kept])
    if kept and "chosen" in kept[0]:
        figures["chosen_chars"] = mean([len(r["chosen"]) for r in kept])
        figures["rejected_chars"] = mean([len(r["rejected"]) for r in kept])
    if is_draft(model):
        figures = {name: figures[name] for name in OF_A_DRAFT if name in figures}
    first = next(iter(by_id.values()), {"judge_mode": ""})
    judge = first.get("judge", model)
    return metric_rows(figures, model=model, set="aift", judge=judge, judge_mode=first["judge_mode"])


def _of_judgements(judged: list[list[dict]]) -> dict[str, dict]:
    """How much of it could be read, was cut, or lay on the six scores: `judged` has the judgements of each prompt."""
    parsed = [[s["score"] is not None for j in js for s in j.get("samples", [j])] for js in judged]
    masses = [[j["mass"] for j in js if j.get("mass") is not None] for js in judged]
    figures = {
        "candidate_parse_rate": ratio([sum(t) for t in parsed], [len(t) for t in parsed]),
        "cut_rate": ratio([sum(bool(j.get("cut")) for j in js) for js in judged], [len(js) for js in judged]),
    }
    if any(masses):  # an expected score is one however little the digits hold: this says whether it means anything
        figures["candidate_score_mass"] = ratio([sum(m) for m in masses], [len(m) for m in masses])
    return figures


def _of_scores(scored: list[list[dict]]) -> dict[str, dict]:
    """How scores differ: `scored` has the candidates of each prompt (`scored_candidates`)."""
    from scipy import stats  # slow to import

    scores = [[c["score"] for c in cs if c["score"] is not None] for cs in scored]
    flat = [s for values in scores for s in values]
    within = [s for values in scores if (s := std(values)) is not None]
    ties = [_ties(values) for values in scores]
    shares = [n / len(flat) for n in Counter(map(rounded, flat)).values()]
    lengths = [len(c["text"]) for cs in scored for c in cs if c["score"] is not None]
    constant = len(set(flat)) < 2 or len(set(lengths)) < 2
    rho = None if constant else float(stats.spearmanr(flat, lengths).statistic)
    figures = {
        "candidate_score_std": no_interval(std(flat), len(flat)),
        "within_prompt_score_std": mean(within, share=False) if within else no_interval(None, 0),
        "candidate_tie_rate": ratio([t for t, _ in ties], [n for _, n in ties]),
        "modal_share": no_interval(max(shares, default=None), len(flat)),
        "score_entropy": no_interval(-sum(p * math.log2(p) for p in shares) if shares else None, len(flat)),
        "score_length_correlation": no_interval(rho, len(flat)),
    }
    if any(c["implicit"] is not None for cs in scored for c in cs):
        found = [consistency(cs) for cs in scored]
        figures["reward_consistency"] = mean([c for c in found if c is not None])
    return figures


def _of_meta_judge(judged: list[list[dict]], n_prompts: int) -> dict[str, dict]:
    """What a model's verdicts on its own judgements follow, and how many pairs of judgements they leave."""
    told = [[j["meta"] for j in js if "meta" in j] for js in judged]
    firsts = [sum(t["first"] for t in ts) for ts in told]
    made = [any(t["pair"] for t in ts) for ts in told]
    return {
        "meta_first_place_rate": ratio(firsts, [sum(t["first"] + t["second"] for t in ts) for ts in told]),
        "judge_pair_yield": mean(made + [False] * (n_prompts - len(made))),
    }


def _ties(scores: list[float]) -> tuple[int, int]:
    """(pairs of equal scores, pairs) of one prompt's candidates."""
    counts = Counter(scores).values()
    return sum(math.comb(n, 2) for n in counts), math.comb(len(scores), 2)


def ailments(metrics: list[dict], limits: dict[str, float], *, weighed: bool = False) -> list[str]:
    """What is outside `limits`, ``min_<name>`` and ``max_<name>``, in words; a self-judge may come to give one score.

    Figures that could not be measured are no ailment. `weighed`: pairs count as far as two rewards agree (`pairs`).
    """
    names = {name: f"candidate_{name}" for name in ("parse_rate", "score_mass", "tie_rate")}
    values, found = {m["metric"]: m["value"] for m in metrics}, []
    for limit, bound in limits.items():
        side, _, name = limit.partition("_")
        value = values.get(names.get(name, name))
        if value is not None and (value < bound if side == "min" else value > bound):
            than = "less" if side == "min" else "more"
            found.append(f"{names.get(name, name)} is {value:.2f}, {than} than {limit} = {bound:g}")
    # no limit to choose: by a weight of less than a half a pair is learned the other way round
    if weighed and (agree := values.get("reward_consistency")) is not None and agree < 0.5:
        found.append(f"reward_consistency is {agree:.2f}, less than 0.5: pairs are learned the other way round")
    return found
