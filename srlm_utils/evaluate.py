"""The three questions of 08_evaluate: does it judge as replies are ranked, what does it answer, who wins."""

from srlm_utils import api, judge, metrics, outside, rankings, verdicts, winrates
from srlm_utils.errors import DataError
from srlm_utils.lineage import OUTSIDE
from srlm_utils.paths import resolve
from srlm_utils.plan import parse_win_judge


def judge_ranked(step, engine, rubric: judge.Rubric, ranked: list[dict], modes: list[str]) -> dict[str, list[dict]]:
    """Score every reply of the ranked sets, by judge mode. Both modes that write judgements share what is written."""
    p = step.params
    how = {"n_samples": p.n_samples, "temperature": p.judge_temperature, "top_p": p.judge_top_p, "seed": p.seed}
    how |= {"max_new_tokens": p.judge_max_new_tokens, "max_response_tokens": p.max_response_tokens}
    both, judged = {"sampled", "sampled_expected"} <= {*modes}, {}
    for mode in modes:
        if not (both and mode == "sampled"):
            log = f"judgements_{mode}.jsonl"
            judged[mode] = judge.judge_items(step, engine, rubric, rankings.items(ranked), mode, log=log, **how)
    if both:
        judged["sampled"] = judge.as_written(judged["sampled_expected"])
    return {mode: judged[mode] for mode in modes}


def agreement_rows(model: str, ranked: list[dict], judged: list[dict], mode: str, set_name: str) -> list[dict]:
    """Metric rows of a judge's agreement with one ranked set; `judged` may hold replies of others."""
    ids = {item["id"] for item in rankings.items(ranked)}
    judged = [r for r in judged if r["id"] in ids]
    figures = metrics.agreement(rankings.scored_prompts(ranked, judged))
    valid = [r["score"] for r in judged if r["score"] is not None]
    figures["score_std"] = metrics.no_interval(metrics.std(valid), len(valid))
    if mode != "expected":
        tries = {r["id"]: [s["score"] is not None for s in r["samples"]] for r in judged}
        figures["parse_rate"] = metrics.ratio(*rankings.of_prompts(ranked, tries))
    else:
        figures["score_mass"] = metrics.ratio(*rankings.of_prompts(ranked, {r["id"]: [r["mass"]] for r in judged}))
    return metrics.metric_rows(figures, model=model, set=set_name, judge=model, judge_mode=mode)


def calibration(ranked: list[dict], judged: list[dict]) -> list[dict]:
    """Where the replies that got each score, rounded, are ranked: rows {"score", "value", "low", "high", "n"}.

    `value` is the mean place, 0 for the best reply of a prompt and 1 for the worst, with its interval over prompts. A
    judge is calibrated if it falls from score to score. Prompts whose replies all rank alike are left out.
    """
    by_prompt: dict[str, dict[int, list[float]]] = {}
    for row in rankings.scored_prompts(ranked, judged):
        if worst := max(row["ranks"]):
            places = by_prompt.setdefault(row["prompt"], {})
            for rank, score in zip(row["ranks"], row["scores"], strict=True):
                if score is not None:
                    places.setdefault(judge.rounded(score), []).append(rank / worst)
    out = []
    for score in range(judge.MIN_SCORE, judge.MAX_SCORE + 1):
        having = [places[score] for places in by_prompt.values() if score in places]
        if having:
            out.append({"score": score} | metrics.ratio([sum(x) for x in having], [len(x) for x in having]))
    return out


def gain_rows(
    model: str, opponent: str, ranked: list[dict], judged: list[dict], theirs: list[dict], mode: str, set_name: str
) -> list[dict]:
    """Metric row of how much better `model` judges than `opponent` on the same replies."""
    shared = rankings.judged_by_all(ranked, judged, theirs)
    gain = metrics.agreement_gain(rankings.scored_prompts(shared, judged), rankings.scored_prompts(shared, theirs))
    where = {"model": model, "opponent": opponent, "set": set_name, "judge": model, "judge_mode": mode}
    return metrics.metric_rows({"agreement_gain": gain}, **where)


def score_answers(step, engine, rubric: judge.Rubric, name: str, answers: list[dict]) -> list[dict]:
    """Expected scores of test answers by one scoring win judge; the outside judge has a rubric of its own."""
    rubric = outside.rubric() if name == OUTSIDE else rubric
    items = [{"id": a["prompt_id"], "prompt": a["prompt"], "response": a["text"]} for a in answers]
    batches = judge.expected_scores(engine, rubric, items, max_response_tokens=step.params.max_response_tokens)
    rows = sorted((r for batch in batches for r in batch), key=lambda r: r["id"])
    who = {"judge": name, "judge_rev": step.model_revision(name)}
    return [{"prompt_id": r["id"], **who, "score": r["score"]} for r in rows]


def check_judges(judges: list[str], params) -> None:
    """Find what is wrong about `judges` before a model is loaded: files of verdicts, endpoints, their key."""
    for name, mode in map(parse_win_judge, judges):
        if mode == "human":
            verdicts.read_votes(resolve(name))
        if mode == "api":
            api.Api.from_params(name, params).check_key()


def pairwise_judge(step, name: str, mode: str):
    """``compare(prompts, a, b)`` of a judge that sees both answers, for `verdicts.compare`'s rows; loads its model."""
    if mode == "api":
        endpoint = api.Api.from_params(name, step.params)
        return lambda prompts, a, b: api.compare(endpoint, prompts, a, b)
    engine = step.engine(name)
    return lambda prompts, a, b: verdicts.compare(engine, prompts, a, b)


def exam_rows(step, engine) -> list[dict]:
    """Metric rows of the outside judge's own exam on the bundled ranked sets."""
    figures = outside.exam(step, engine)
    where = {"model": OUTSIDE, "judge": OUTSIDE, "judge_mode": "expected"}
    return [r for name, figs in figures.items() for r in metrics.metric_rows(figs, set=name, **where)]


def compare_answers(
    step,
    name: str,
    mode: str,
    model: str,
    answers: list[dict],
    opponent: str,
    opponent_answers: list[dict],
    *,
    scores: list[dict] = (),
    compare=None,
) -> list[dict]:
    """Verdict rows of one win judge on `model` against `opponent`, over the prompts both answered.

    Mode `score` needs the judge's `scores` of `model`'s answers, a judge that sees both answers the `compare` of
    `pairwise_judge`.
    """
    theirs = {a["prompt_id"]: a["text"] for a in opponent_answers}
    ours = {a["prompt_id"]: a["text"] for a in answers if a["prompt_id"] in theirs}
    if mode == "human":
        votes = verdicts.read_votes(resolve(name))
        verdicts.check_answers(votes, model, opponent, ours, theirs, name)
        rows = verdicts.from_votes(votes, model, opponent, ours)
    elif mode == "score":
        rows = _by_scores(step, name, scores, opponent, ours, theirs)
    else:
        prompts = {a["prompt_id"]: a["prompt"] for a in answers}
        rows = [v for batch in compare(prompts, ours, {pid: theirs[pid] for pid in ours}) for v in batch]
        n_unread = len({v["prompt_id"] for v in rows if v.get("unread")})
        if 2 * n_unread > len(ours):
            said = f"what it says of {n_unread} of {len(ours)} prompts is no verdict"
            raise DataError(f"{name}: {said}. Take another judge.")
    who = {"model_a": model, "model_b": opponent, "judge": name, "judge_mode": mode}
    who |= {"judge_rev": step.model_revision(name)}
    return [who | r for r in sorted(rows, key=lambda r: (r["prompt_id"], r["order"]))]


def _by_scores(step, name: str, scores: list[dict], opponent: str, ours: dict, theirs: dict) -> list[dict]:
    """`verdicts.from_scores` of one judge's scores of both; `DataError` where they are not by the same weights."""
    known = scores, step.rows(f"{opponent}/eval/answer_scores.jsonl")
    sides = [[r for r in table if r["judge"] == name and r["prompt_id"] in ours] for table in known]
    differ = len({r["judge_rev"] for side in sides for r in side}) > 1
    if differ and step.scratch:  # its opponent stands in the example
        print(f"scratch run: another {name} scored the answers of {opponent}: this win rate means nothing")
    elif differ:
        raise DataError(
            f"{opponent}/eval/answer_scores.jsonl is by other weights of {name} than the present ones (another "
            f"machine, or an emptied cache). Score its answers again: --only 08_evaluate@{opponent} --force."
        )
    if missing := sorted(ours.keys() - {r["prompt_id"] for r in sides[1]}):
        raise DataError(
            f"{opponent}/eval/answer_scores.jsonl has no score of {name} for {missing[0]}: it was evaluated "
            f"without this win judge. Score its answers, too: --only 08_evaluate@{opponent} --force."
        )
    same = {pid for pid, text in ours.items() if text == theirs[pid]}
    return verdicts.from_scores(*({r["prompt_id"]: r["score"] for r in side} for side in sides), same)


def duel_rows(verdict_rows: list[dict], answers: list[dict], theirs: list[dict], **where) -> list[dict]:
    """Metric rows of one comparison: who wins, by the judge's word and with the effect of length taken out.

    `where` names model, opponent, judge and judge_mode. Lengths are characters of the answers, as in AlpacaEval.
    """
    results = metrics.outcomes(verdict_rows)
    if not results:
        return []
    ours, others = ({a["prompt_id"]: len(a["text"]) for a in rows} for rows in (answers, theirs))
    values, mine, its = ([d[pid] for pid in results] for d in (results, ours, others))
    figures = metrics.head_to_head(verdict_rows) | {
        "win_rate_length_controlled": winrates.length_controlled(
            values, [a - b for a, b in zip(mine, its, strict=True)]
        ),
        "win_rate_similar_length": winrates.similar_length(values, mine, its),
        "sign_test": winrates.sign_test(values),
    }
    return metrics.metric_rows(figures, set="test_prompts", **where)
