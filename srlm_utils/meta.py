"""Meta-judge: the model compares its own judgements, so that it also learns to judge (Wu et al. 2024, Meta-Rewarding).

Of each prompt the candidate is taken on which the model's written judgements differ most. It is asked of every two of
them, in both orders, which is better; the best and the worst by Elo become a preference pair for the judge's prompt.
The verdict is read from the probabilities of the letters A and B, where the paper samples an explanation first.
"""

from collections import defaultdict
from itertools import permutations

import numpy as np

from srlm_utils import chat
from srlm_utils.judge import Rubric, as_written, escape_tags, fit, load_template
from srlm_utils.pairs import by_the_model
from srlm_utils.paths import PROMPTS
from srlm_utils.verdicts import choice_ids
from srlm_utils.winrates import elo

CANDIDATES_AT_ONCE = 256  # whose questions are in memory as token ids


def disputed(candidates: list[dict], rows: list[dict]) -> list[tuple[dict, list[str]]]:
    """(candidate, its judgements) of each prompt: the model's own one whose scores have the highest variance, above 0.

    `rows` are those of `judge.sampled_scores`; in mode sampled_expected the scores are those that were written, since
    judgements that say the same are nothing to compare. Judgements count that were parsed and ended, each text once.
    """
    digits = as_written([r for r in rows if r["judge_mode"] == "sampled_expected"])
    found = {r["id"]: r for r in (*rows, *digits)}
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
    done, letters, n_too_long = {(r["id"], r["first"], r["second"]) for r in log.rows}, choice_ids(engine.tokenizer), 0
    todo = {
        key: [two for two in permutations(range(len(t)), 2) if (key, *two) not in done] for key, t in judgements.items()
    }
    keys = [key for key, twos in todo.items() if twos]
    with step.progress(sum(map(len, todo.values())), "verdicts") as bar:
        for start in range(0, len(keys), CANDIDATES_AT_ONCE):
            requests, asked = [], []
            for key in keys[start : start + CANDIDATES_AT_ONCE]:
                texts = [escape_tags(text) for text in judgements[key]]
                questions = [
                    chat.user(template.render(task=tasks[key], first=texts[i], second=texts[j])) for i, j in todo[key]
                ]
                ids = [chat.prompt_ids(engine.tokenizer, question) for question in questions]
                if engine.context and max(map(len, ids)) >= engine.context:
                    n_too_long += 1
                    bar.update(len(ids))
                    continue
                requests += [(str(len(asked) + n), tokens) for n, tokens in enumerate(ids)]
                asked += [{"id": key, "first": i, "second": j} for i, j in todo[key]]
            for batch in engine.choice_probs(requests, letters):
                log.extend([asked[int(n)] | {"p_first": round(p[0], 6)} for n, p, _ in batch])
                bar.update(len(batch))
    if n_too_long:
        print(f"{n_too_long} candidates left out: two judgements of them are longer than the judge's context")
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
) -> tuple[list[dict], dict, list[dict]]:
    """(pairs of judgements as `pairs.build_pairs` has them of answers, figures of the meta-judge, `rows` with `meta`).

    `prompts` are texts by prompt_id; `max_tokens` is what the judge saw of a response. Judgements of equal Elo make no
    pair. Figures: candidates that were disputed, how often the first place won, and pairs. `meta` stands in the rows of
    disputed candidates: {"first", "second" (verdicts that each place won), "pair" (whether there is one)}.
    """
    chosen_from = {c["cand_id"]: (c, texts) for c, texts in disputed(candidates, rows)}
    tasks = {
        key: rubric.render(prompts[c["prompt_id"]], fit(engine.tokenizer, c["text"], max_tokens), "justify_first")
        for key, (c, _) in chosen_from.items()
    }
    verdicts = compare(step, engine, tasks, {key: texts for key, (_, texts) in chosen_from.items()})
    weights, pairs, told, of = position_weights(verdicts), [], {}, defaultdict(list)
    for v in verdicts:
        of[v["id"]].append(v)
    for key, (_, texts) in chosen_from.items():
        ratings = elo(battles(of[key], len(texts), weights))
        best, worst = int(ratings.argmax()), int(ratings.argmin())
        won = [sum(v["p_first"] > 0.5 for v in of[key]), sum(v["p_first"] < 0.5 for v in of[key])]
        told[key] = {"first": won[0], "second": won[1], "pair": bool(ratings[best] - ratings[worst] > 1e-6)}
        if told[key]["pair"]:
            pairs.append(
                {"prompt_id": f"{key}/judge", "prompt": tasks[key], "chosen": texts[best], "rejected": texts[worst]}
                | {"chosen_ended": True, "rejected_ended": True}
            )
    if not tasks:
        print("WARNING: no judgement to learn from: those of one candidate never differ in what they score")
    elif verdicts and not pairs:
        print(f"WARNING: no judgement to learn from: the first place won {weights[1]:.0%} of {len(verdicts)} verdicts")
    figures = {"n_disputed": len(tasks), "first_place_rate": round(weights[1], 4), "n_judge_pairs": len(pairs)}
    return pairs, figures, [row | ({"meta": told[row["id"]]} if row["id"] in told else {}) for row in rows]
