"""How many tokens a run makes, judges and trains: the table at the head of each params file, and the
weights by which the runner estimates the time left.

Lengths are typical ones of the bundled seed with SmolLM2's tokenizer; what a run really did is in its
report. The work of a step adds its tokens, weighted by how long each kind took relative to a generated one.
"""

import math

from srlm_utils import units
from srlm_utils.lineage import init_model, models_before
from srlm_utils.params import Experiment, stage_key
from srlm_utils.plan import Step, list_steps, parse_win_judge

# relative to one sampled token on two CPU cores (LOG.md has the rates)
COST = {"generated": 1.0, "judged": 0.2, "trained": 1.1}
STEP_OVERHEAD = 800  # start of a kernel and loading a model, in sampled tokens
SEED_ROWS = {  # bundled
    "ift": 244,
    "ranked_train": 129,
    "onpolicy_train": 130,
    "onpolicy_more": 113,
    "ranked_eval": 43,
    "onpolicy_eval": 44,
    "valid_prompts": 48,
    "test_prompts": 256,
    "safety_prompts": 24,
}
CHAT, PROMPT, ANSWER, REPLY, JUSTIFICATION, REPLIES = 30, 30, 80, 80, 32, 3.85
RUBRIC = {"short": 70, "additive": 285, "multiple_choice": 265}
BENCHMARK_TEXTS = {"alpaca_eval_file": 805, "mt_bench_file": 160}  # answers to the whole of each
TAIL = 25  # of a rubric: what stands behind the reply, once a format


def _rows(experiment: Experiment, name: str, *, unscored: bool = False) -> int:
    """Rows of a seed set, or those of its files of one's own (`unscored`: the bundled replies have scores).

    A file of one's own counts as its limit, or 1,000 rows without one.
    """
    p = experiment.flat("01_seed_data", "run")
    limit, n = p[f"n_{name}"], 0
    for file in p[f"{name}_files"] if f"{name}_files" in p else [p[f"{name}_file"]]:
        has = SEED_ROWS.get(file, limit or 1000)
        n += 0 if unscored and file in SEED_ROWS else min(limit or has, has)
    return n


def step_tokens(step: Step, experiment: Experiment) -> dict[str, int]:
    """{"generated", "judged" (read in one pass), "trained" (rows x epochs)} of one step."""
    n = {"generated": 0.0, "judged": 0.0, "trained": 0.0}
    if count := _COUNTED.get(stage_key(step.stage)):
        count(n, step, experiment, experiment.flat(step.stage, step.model))
    return {k: int(v) for k, v in n.items()}


def _sft(n: dict, step: Step, experiment: Experiment, p: dict) -> None:
    n_rows = _rows(experiment, "ift")
    answers, judgements = n_rows * (CHAT + PROMPT + ANSWER), 0.0
    if "SFT/eft/train.jsonl" in step.reads:
        eft = experiment.flat("03_build_eft", "SFT")
        shared = _frame(eft["rubric"]) - TAIL  # read once for a prompt's judgements
        n_formats, size = len({*eft["formats"]}), min(p["micro_batch_size"], p["train_batch_size"])
        parts = math.ceil(REPLIES * n_formats / size)  # sequences a prompt's judgements are packed into
        own = REPLY * (1 if size >= n_formats else n_formats) + TAIL * n_formats
        own += JUSTIFICATION * ("justify_first" in eft["formats"])
        judgements = _rows(experiment, "ranked_train") * (parts * shared + REPLIES * own)
        n_rows += _rows(experiment, "ranked_train") * REPLIES * n_formats
    for path in step.reads:
        if path.endswith("/aift/positives.jsonl"):
            source = experiment.flat("04_self_instruct", path.partition("/")[0])
            answer = min(ANSWER, _written(source))  # it has ended
            answers += source["n_prompts"] * (CHAT + PROMPT + answer)
            n_rows += source["n_prompts"]
    n["trained"] = (answers + judgements) * p["epochs"] + answers * p["ift_epochs"]
    _add_selection(n, p, n_rows, _rows(experiment, "valid"))


def _build_eft(n: dict, step: Step, experiment: Experiment, p: dict) -> None:
    if p["scores_from"] == "judge":
        items = _rows(experiment, "ranked_train", unscored=True) * REPLIES
        n["judged"] = items * (_frame(p["rubric"]) + REPLY)
        n["generated"] = items * p["n_samples"] * _judgement(p["max_new_tokens"])


def _self_instruct(n: dict, step: Step, experiment: Experiment, p: dict) -> None:
    # about every second attempt is kept, and each reads eight demonstrations
    n["generated"] = p["n_prompts"] * (2 * 20 + _candidates(p) * _written(p))
    n["judged"] = p["n_prompts"] * 2 * 8 * 25


def _judge(n: dict, step: Step, experiment: Experiment, p: dict) -> None:
    source = experiment.flat("04_self_instruct", step.model)
    items = source["n_prompts"] * _candidates(source)
    n["judged"] = items * (_frame(p["rubric"]) + _written(source))
    if p["implicit_reference"]:
        n["judged"] += items * 2 * (CHAT + PROMPT + _written(source))
    written = _add_judgements(n, p, items, p["max_new_tokens"])
    if p["meta_judge"]:  # every two judgements of one candidate a prompt, both orders
        asked = source["n_prompts"] * p["n_samples"] * (p["n_samples"] - 1)
        n["judged"] += asked * (_frame(p["rubric"]) + _written(source) + 2 * written)


def _future(n: dict, step: Step, experiment: Experiment, p: dict) -> None:
    items = experiment.flat("04_self_instruct", init_model(step.model))["n_prompts"] * p["n_candidates"]
    n["generated"], n["judged"] = items * _written(p), items * (_frame(p["rubric"]) + _written(p))
    _add_judgements(n, p, items, p["judge_max_new_tokens"])


def _dpo(n: dict, step: Step, experiment: Experiment, p: dict) -> None:
    tokens, n_rows, new = 0, 0, int(step.model[1:]) - 1
    for i in range(1 if p["replay"] else new, new + 1):
        source = experiment.flat("04_self_instruct", f"M{i}")
        share = 1 if i == new else p["replay"]
        ended = experiment.flat("06_build_pairs", f"M{i}")["chosen_ended"]
        chosen = min(ANSWER, _written(source)) if ended else _written(source)
        pair = CHAT + PROMPT + chosen + _written(source)  # the prompt is read once
        tokens += share * source["n_prompts"] * pair
        n_rows += share * source["n_prompts"]
    tokens, n_rows = tokens / (1 - p["judge_share"]), n_rows / (1 - p["judge_share"])
    n["trained"], n["judged"] = tokens * p["epochs"], tokens  # the reference reads every pair once
    _add_selection(n, p, n_rows, _rows(experiment, "valid"))


def _evaluate(n: dict, step: Step, experiment: Experiment, p: dict) -> None:
    frame, replies, tests = _frame(p["rubric"]), _rows(experiment, "ranked_eval") * REPLIES, _rows(experiment, "test")
    n["judged"] = len(p["judge_modes"]) * replies * (frame + REPLY)
    if {*p["judge_modes"]} - {"expected"}:
        n["generated"] = replies * p["n_samples"] * _judgement(p["judge_max_new_tokens"])
    safety = SEED_ROWS.get(p["safety_file"], 100 if p["safety_file"] else 0)
    n["generated"] += (tests + safety) * _written(p)
    n["judged"] += tests * (CHAT + PROMPT + ANSWER)  # how likely the reference answers are
    for mode in (parse_win_judge(judge)[1] for judge in p["win_judges"]):
        if mode == "pairwise":
            n["judged"] += tests * 2 * len(models_before(step.model)) * (frame + 2 * _written(p))
        if mode == "score":
            n["judged"] += tests * (frame + _written(p))


def _benchmarks(n: dict, step: Step, experiment: Experiment, p: dict) -> None:
    texts = [BENCHMARK_TEXTS[name] for name in BENCHMARK_TEXTS if p[name]]
    n["generated"] = sum(min(p["max_rows"] or n_texts, n_texts) for n_texts in texts) * _written(p)


_COUNTED = {  # what a stage adds to the counts of a step; the others run no model
    "sft": _sft,
    "build_eft": _build_eft,
    "self_instruct": _self_instruct,
    "judge": _judge,
    "future": _future,
    "dpo": _dpo,
    "evaluate": _evaluate,
    "benchmarks": _benchmarks,
}


def _frame(rubric: str) -> int:
    """All that a judge reads but the answer."""
    return CHAT + PROMPT + RUBRIC.get(rubric, 200)


def _judgement(max_new_tokens: int) -> int:
    """Tokens of a written judgement."""
    return min(max_new_tokens, JUSTIFICATION + 15)


def _candidates(params: dict) -> int:
    """Candidates of a prompt: the model's own, and as many of an anchor."""
    return params["n_candidates"] * (1 + bool(params["anchor_model"]))


def _add_judgements(n: dict, p: dict, items: int, max_new_tokens: int) -> int:
    """Add what a judge of `items` answers writes, and reads again for digits' probabilities; a judgement's tokens."""
    written = _judgement(max_new_tokens)
    if p["judge_mode"] != "expected":
        n["generated"] += items * p["n_samples"] * written
    if p["judge_mode"] == "sampled_expected":
        n["judged"] += items * p["n_samples"] * written
    return written


def _add_selection(n: dict, p: dict, n_rows: float, n_valid: int) -> None:
    """Add what the checkpoints of a training on `n_rows` rows write, and what their judge reads."""
    if not p["select_steps"]:
        return
    checkpoints = math.ceil(math.ceil(n_rows * p["epochs"] / p["train_batch_size"]) / p["select_steps"])
    prompts = min(p["select_prompts"] or n_valid, n_valid)
    written, mode = min(p["select_max_new_tokens"], 300), parse_win_judge(p["select_judge"])[1]
    n["generated"] += (1 + checkpoints) * prompts * written  # the first are the starting model's
    if mode == "score":
        n["judged"] += (1 + checkpoints) * prompts * (_frame(p["select_rubric"]) + written)
    if mode == "pairwise":
        n["judged"] += 2 * checkpoints * prompts * (_frame("") + 2 * written)


def _written(params: dict) -> int:
    """Typical length of a sampled answer: small models use up a small budget."""
    return min(params["max_new_tokens"], 300)


def step_work(step: Step, experiment: Experiment) -> float:
    """Expected duration of a step in units of one sampled token."""
    return STEP_OVERHEAD + sum(COST[k] * v for k, v in step_tokens(step, experiment).items())


def token_table(experiment: Experiment) -> str:
    """The table of a params file's header, one line per stage, all models together."""
    total: dict[str, dict[str, int]] = {}
    for step in list_steps(experiment):
        row = total.setdefault(step.stage, {"generated": 0, "judged": 0, "trained": 0})
        for k, v in step_tokens(step, experiment).items():
            row[k] += v
    lines = [f"{'stage':<18}{'generated':>14}{'judged':>14}{'trained':>14}"]
    lines += [
        f"{stage:<18}" + "".join(f"{units.tokens(v):>14}" for v in row.values())
        for stage, row in sorted(total.items())
        if any(row.values())
    ]
    return "\n".join(lines)
