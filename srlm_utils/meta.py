"""Meta-judge: the model compares its own judgements, so that it also learns to judge (Wu et al. 2024, Meta-Rewarding).

Of each prompt the candidate is taken on which the model's written judgements differ most. It is asked of every two of
them, in both orders, which is better; the best and the worst by Elo become a preference pair for the judge's prompt.
The verdict is read from the probabilities of the letters A and B, where the paper samples an explanation first.
"""

from itertools import permutations

import numpy as np

from srlm_utils import chat
from srlm_utils.judge import Rubric, fit, inert, load_template
from srlm_utils.pairs import by_the_model
from srlm_utils.paths import PROMPTS
from srlm_utils.verdicts import choice_ids
from srlm_utils.winrates import elo


def disputed(candidates: list[dict], rows: list[dict]) -> list[tuple[dict, list[str]]]:
    """(candidate, its judgements) of each prompt: the model's own one whose scores have the highest variance, above 0.

    `rows` are those of `judge.sampled_scores`. Judgements count that were parsed and ended, each text once.
    """
    found = {r["id"]: r for r in rows}
    best: dict[str, dict] = {}
    for c in by_the_model(candidates):
        variance = found.get(c["cand_id"], {}).get("variance") or 0
        if variance > (best[c["prompt_id"]]["variance"] if c["prompt_id"] in best else 0):
            best[c["prompt_id"]] = c | {"variance": variance}
    out = []
    for c in best.values():
        valid = [s["text"] for s in found[c["cand_id"]]["samples"] if s["status"] == "ok" and s["ended"]]
        if len(texts := list(dict.fromkeys(valid))) > 1:
            out.append((c, texts))
    return out


def compare(step, engine, tasks: dict[str, str], judgements: dict[str, list[str]]) -> list[dict]:
    """Verdicts on every two judgements in both orders; `tasks` (what the judge was asked) and `judgements` by cand_id.

    Rows {"id", "first", "second" (places in the list), "p_first" (0 to 1)}; continues a row log of the step. Candidates
    whose questions are longer than the judge's context are left out, and counted on the screen.
    """
    template, log = load_template(PROMPTS / "meta_judge.jinja"), step.log("meta_verdicts.jsonl")
    done, requests, asked, n_too_long = {(r["id"], r["first"], r["second"]) for r in log.rows}, [], [], 0
    for key, texts in judgements.items():
        of_key: list = []
        for i, j in permutations(range(len(texts)), 2):
            if (key, i, j) not in done:
                text = template.render(task=tasks[key], first=inert(texts[i]), second=inert(texts[j]))
                ids = chat.prompt_ids(engine.tokenizer, chat.user(text))
                of_key.append(({"id": key, "first": i, "second": j}, ids))
        if engine.context and any(len(ids) > engine.context for _, ids in of_key):
            n_too_long += 1
            continue
        for what, ids in of_key:
            requests.append((str(len(asked)), ids))
            asked.append(what)
    if n_too_long:
        print(f"{n_too_long} candidates left out: two judgements of them are longer than the judge's context")
    with step.progress(len(requests), "verdicts") as bar:
        for batch in engine.choice_probs(requests, choice_ids(engine.tokenizer)):
            log.extend([asked[int(n)] | {"p_first": round(p[0], 6)} for n, p, _ in batch])
            bar.update(len(batch))
    return log.rows


def position_weights(verdicts: list[dict]) -> tuple[float, float]:
    """What a win counts in the first and in the second place: the share of wins that the other place has."""
    first = sum(v["p_first"] > 0.5 for v in verdicts)
    second = sum(v["p_first"] < 0.5 for v in verdicts)
    return (second / (first + second), first / (first + second)) if first + second else (0.0, 0.0)


def battles(verdicts: list[dict], n: int, weights: tuple[float, float]) -> np.ndarray:
    """(n, n) weighted wins of one judgement over another, of the verdicts on one candidate."""
    wins = np.zeros((n, n))
    for v in verdicts:
        if v["p_first"] > 0.5:
            wins[v["first"], v["second"]] += weights[0]
        elif v["p_first"] < 0.5:
            wins[v["second"], v["first"]] += weights[1]
    return wins


def judge_pairs(
    step, engine, rubric: Rubric, prompts: dict[str, str], candidates: list[dict], rows: list[dict], max_tokens: int
) -> tuple[list[dict], dict]:
    """(pairs of judgements as `pairs.build_pairs` has them of answers, figures of the meta-judge).

    `prompts` are texts by prompt_id; `max_tokens` is what the judge saw of a response. Judgements of equal Elo make no
    pair. Figures: candidates that were disputed, and how often the first place won.
    """
    chosen_from = {c["cand_id"]: (c, texts) for c, texts in disputed(candidates, rows)}
    tasks = {
        key: rubric.render(prompts[c["prompt_id"]], fit(engine.tokenizer, c["text"], max_tokens), "justify_first")
        for key, (c, _) in chosen_from.items()
    }
    verdicts = compare(step, engine, tasks, {key: texts for key, (_, texts) in chosen_from.items()})
    weights, pairs = position_weights(verdicts), []
    for key, (_, texts) in chosen_from.items():
        ratings = elo(battles([v for v in verdicts if v["id"] == key], len(texts), weights))
        best, worst = int(ratings.argmax()), int(ratings.argmin())
        if ratings[best] - ratings[worst] > 1e-6:
            pairs.append(
                {"prompt_id": f"{key}/judge", "prompt": tasks[key], "chosen": texts[best], "rejected": texts[worst]}
                | {"chosen_ended": True, "rejected_ended": True}
            )
    if verdicts and not pairs:
        print(f"WARNING: no judgement to learn from: the first place won {weights[1]:.0%} of {len(verdicts)} verdicts")
    return pairs, {"n_disputed": len(tasks), "first_place_rate": round(weights[1], 4)}
