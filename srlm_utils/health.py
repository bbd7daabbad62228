"""A round's vital signs: what 06_build_pairs writes to health.json and the report shows."""

from srlm_utils.metrics import mean, metric_rows, plain, ratio, std
from srlm_utils.pairs import scored_candidates


def round_metrics(
    model: str, prompts: list[dict], candidates: list[dict], judgements: list[dict], kept: list[dict]
) -> list[dict]:
    """Metric rows of one round, set "aift": pair yield, parse rate, spread of scores, lengths."""
    kept_ids = {r["prompt_id"] for r in kept}
    by_prompt = scored_candidates(candidates, judgements)
    scores = {pid: [c["score"] for c in cs if c["score"] is not None] for pid, cs in by_prompt.items()}
    flat = [s for values in scores.values() for s in values]
    within = [s for values in scores.values() if (s := std(values)) is not None]
    tries = {j["id"]: j.get("samples", [j]) for j in judgements}
    by_judgement = [[s["score"] is not None for s in tries[c["cand_id"]]] for c in candidates if c["cand_id"] in tries]
    figures = {
        "pair_yield": mean([p["prompt_id"] in kept_ids for p in prompts]),
        "candidate_parse_rate": ratio([sum(t) for t in by_judgement], [len(t) for t in by_judgement]),
        "candidate_score_std": plain(std(flat), len(flat)),
        "within_prompt_score_std": mean(within) if within else plain(None, 0),
    }
    if kept and "chosen" in kept[0]:
        figures["chosen_chars"] = mean([len(r["chosen"]) for r in kept])
        figures["rejected_chars"] = mean([len(r["rejected"]) for r in kept])
    mode = judgements[0]["judge_mode"] if judgements else ""
    return metric_rows(figures, model=model, set="aift", judge=model, judge_mode=mode)
