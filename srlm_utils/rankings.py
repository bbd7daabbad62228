"""Ranked rows, and what a judge says of them: items to judge, and the figures' counts by prompt."""

from srlm_utils import metrics


def items(ranked: list[dict]) -> list[dict]:
    """Replies of ranked rows as items to judge, with ids ``<prompt_id>/<reply_id>``."""
    return [
        {"id": f"{row['prompt_id']}/{r['reply_id']}", "prompt": row["prompt"], "response": r["text"]}
        for row in ranked
        for r in row["replies"]
    ]


def by_set(ranked: list[dict]) -> dict[str, list[dict]]:
    """Ranked rows by the file they came from."""
    sets: dict[str, list[dict]] = {}
    for row in ranked:
        sets.setdefault(row["set"], []).append(row)
    return sets


def scored_prompts(ranked: list[dict], judged: list[dict]) -> list[dict]:
    """What `metrics.agreement` takes: prompt, ranks, lengths and one judge's scores of every ranked row."""
    score = {r["id"]: r["score"] for r in judged}
    return [
        {
            "prompt": row["prompt"],
            "ranks": [r["rank"] for r in row["replies"]],
            "lengths": [len(r["text"]) for r in row["replies"]],
            "scores": [score[f"{row['prompt_id']}/{r['reply_id']}"] for r in row["replies"]],
        }
        for row in ranked
    ]


def judged_by_all(ranked: list[dict], *judged: list[dict]) -> list[dict]:
    """Rankings all of whose replies are in each list of judgements; a judge may have judged fewer (`max_rows`)."""
    ids = set.intersection(*({r["id"] for r in rows} for rows in judged))
    return [row for row in ranked if all(item["id"] in ids for item in items([row]))]


def of_prompts(ranked: list[dict], values: dict[str, list[float]]) -> list[list[float]]:
    """What `metrics.ratio` takes: sum and number of each prompt's `values`, by reply as in `items`."""
    found = [[v for r in row["replies"] for v in values[f"{row['prompt_id']}/{r['reply_id']}"]] for row in ranked]
    return metrics.by_prompt([row["prompt"] for row in ranked], [sum(f) for f in found], [len(f) for f in found])
