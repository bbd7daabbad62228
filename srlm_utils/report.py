"""Collecting a run's figures into metrics.csv and one self-contained report.html."""

from pathlib import Path

import pandas as pd

from srlm_utils import metrics, pages, winrates
from srlm_utils.artefacts import read_json, write_text
from srlm_utils.errors import DataError, MissingInputError
from srlm_utils.lineage import draft_of, model_names, models_before, next_model
from srlm_utils.pairs import by_the_model
from srlm_utils.paths import EXAMPLE, shown
from srlm_utils.printable import printable
from srlm_utils.verdicts import judge_label

COLUMNS = [
    "run",
    "variant",
    "seed",
    "model",
    "opponent",
    "set",
    "judge",
    "judge_mode",
    "metric",
    "value",
    "low",
    "high",
    "n",
    "unit",
]

_NUMBERS = ("value", "low", "high")  # which may be empty

# rows of the agreement table: the figures of Table 4 of the paper, then what says how far to trust them
AGREEMENT = [*metrics.AGREEMENT, "parse_rate", "score_mass", "score_std"]

# those whose n is pairs
OF_PAIRS = ["pairwise_accuracy", "tie_rate", "pairwise_accuracy_half_ties", "longer_baseline"]
OF_PAIRS += ["similar_length_accuracy"]

# what answers are like without a judge
ANSWERS = [
    "answer_chars",
    "answer_tokens",
    "ended_rate",
    "repeated_4grams",
    "list_rate",
    "distinct_1",
    "distinct_2",
    "prompt_strict_accuracy",
    "prompt_loose_accuracy",
    "instruction_strict_accuracy",
    "instruction_loose_accuracy",
    "rouge_l",
    "reference_logprob",
    "refusal_rate",
    "language_drift",
    "unsafe_refusal_rate",
    "over_refusal_rate",
]


def metrics_table(step) -> pd.DataFrame:
    """metrics.csv: one row per figure, from every model's metrics.json and every round's health.json."""
    p, rows = step.params, []
    names = model_names(p.iterations)
    for m in names:
        rows += read_json(step.input(f"{m}/eval/metrics.json"))
    for m in (*names[2:-1], *p.drafts):
        rows += read_json(step.input(f"{m}/aift/health.json"))["metrics"]
    for m in p.benchmarked:
        rows += read_json(step.input(f"{m}/benchmarks/metrics.json"))
    table = pd.DataFrame(rows).assign(run=step.run.name, variant=p.variant, seed=p.seed)
    return table[COLUMNS].drop_duplicates()  # the outside judge's exam stands in every model's file


def read_metrics(path: Path) -> pd.DataFrame:
    """A metrics.csv as `metrics_table` made it: texts may be "", figures alone NaN. `DataError` for another file."""
    if not path.is_file():
        raise MissingInputError(f"{shown(path)} is missing: run 09_report@run first.")
    types = dict.fromkeys(COLUMNS, str) | dict.fromkeys(_NUMBERS, float) | {"seed": int, "n": int}
    try:
        table = pd.read_csv(path, keep_default_na=False, na_values=dict.fromkeys(_NUMBERS, ""), dtype=types)
    except (ValueError, OSError) as e:  # pandas' own parser errors are ValueErrors
        raise DataError(f"{shown(path)}: not a table of metrics ({e}).") from None
    if list(table.columns) != COLUMNS:
        raise DataError(f"{shown(path)}: found columns {', '.join(table.columns)}; expected {', '.join(COLUMNS)}.")
    return table


def learned_from(step, model: str) -> str:
    """Whose folder has what was learned from the round of `model`: its own, or that of the next model's draft."""
    draft = draft_of(next_model(model))
    return draft if draft in step.params.drafts else model


def funnel_table(step) -> pd.DataFrame:
    """Rows of `plots.funnel` for every round."""
    rows = []
    for m in model_names(step.params.iterations)[2:-1]:
        attempts = pd.DataFrame(step.rows(f"{m}/aift/attempts.jsonl"))
        health = read_json(step.input(f"{learned_from(step, m)}/aift/health.json"))
        rows.append((m, "prompts written", len(attempts), ""))
        dropped = attempts[attempts.reason != "kept"].reason.value_counts()
        rows += [(m, "prompts written", int(n), reason) for reason, n in dropped.items()]
        rows.append((m, "prompts kept", int((attempts.reason == "kept").sum()), ""))
        rows += [(m, "prompts kept", n, reason) for reason, n in health["drops"].items() if n]
        rows.append((m, health["kind"], health["n_kept"], ""))
    return pd.DataFrame(rows, columns=["model", "stage", "n", "drop"])


def training_table(step) -> pd.DataFrame:
    """All training logs under each other, with the model's name."""
    logs = [
        pd.read_csv(step.input(f"{m}/training_log.csv")).assign(model=m)
        for m in model_names(step.params.iterations)[1:]
    ]
    return pd.concat(logs, ignore_index=True)


def score_table(step) -> pd.DataFrame:
    """Scores of the models' own candidates: columns model, id, score."""
    # without a round there are none; with the types of a round's, which would else become objects
    frames = [pd.DataFrame(columns=["id", "score", "model"]).astype({"id": str, "score": float, "model": str})]
    for m in model_names(step.params.iterations)[2:-1]:
        scores = pd.DataFrame(step.rows(f"{m}/aift/judgements.jsonl"))[["id", "score"]]
        own = [c["cand_id"] for c in by_the_model(step.rows(f"{m}/aift/candidates.jsonl"))]
        frames.append(scores[scores.id.isin(own)].assign(model=m))
    return pd.concat(frames, ignore_index=True)


def example_pairs(step, n: int) -> list[dict]:
    """The first `n` pairs of the first round, each with all candidates and their scores."""
    m = learned_from(step, "M1")
    try:
        pairs = step.rows(f"{m}/aift/pairs.jsonl")
    except MissingInputError:  # a positives-only run
        return []
    scores = {j["id"]: j["score"] for j in step.rows(f"{m}/aift/judgements.jsonl")}
    by_prompt: dict[str, list[dict]] = {}
    for c in step.rows(f"{m}/aift/candidates.jsonl"):
        by_prompt.setdefault(c["prompt_id"], []).append(c | {"score": scores.get(c["cand_id"])})
    # a scratch run's own candidates have the ids of the example's, whose pairs it may have borrowed
    texts = {c["cand_id"]: c["text"] for found in by_prompt.values() for c in found}
    pairs = [p for p in pairs if all(texts.get(p[f"{side}_id"]) == p[side] for side in ("chosen", "rejected"))]
    out = []
    for pair in pairs[:n]:
        cands = sorted(by_prompt[pair["prompt_id"]], key=lambda c: -(c["score"] if c["score"] is not None else -1))
        for c in cands:
            c["role"] = {pair["chosen_id"]: "chosen", pair["rejected_id"]: "rejected"}.get(c["cand_id"], "")
        out.append({"prompt": pair["prompt"], "candidates": cands})
    return out


def example_answers(step, n: int) -> list[dict]:
    """`n` test prompts with every model's answer."""
    names = model_names(step.params.iterations)
    answers = {m: {a["prompt_id"]: a for a in step.rows(f"{m}/eval/answers.jsonl")} for m in names}
    ids = [i for i in answers[names[0]] if all(i in answers[m] for m in names)]
    picked = [ids[i * len(ids) // n] for i in range(min(n, len(ids)))]
    return [
        {
            "prompt": answers[names[0]][pid]["prompt"],
            "answers": [(m, answers[m][pid]["text"], answers[m][pid]["ended"]) for m in names],
        }
        for pid in picked
    ]


def rate(row) -> str:
    """``63.2 % [51.0, 74.1], n=112`` for shares, points for differences, p-values as such, else plain numbers."""
    if row["value"] is None or pd.isna(row["value"]):
        return f"– (n={row['n']})"
    if row["unit"] == "p":
        return ("p < 0.001" if row["value"] < 0.001 else f"p = {row['value']:.3f}") + f", n={row['n']}"
    scale, unit = {"share": (100, " %"), "share difference": (100, " points")}.get(row["unit"], (1, ""))
    digits = 1 if row["unit"] in ("share", "share difference", "characters", "tokens") else 2
    text = f"{scale * row['value']:.{digits}f}{unit}"
    if row["low"] is not None and not pd.isna(row["low"]):
        text += f" [{scale * row['low']:.{digits}f}, {scale * row['high']:.{digits}f}]"
    return f"{text}, n={row['n']}"


def wide(table: pd.DataFrame, names: list[str], **where) -> pd.DataFrame:
    """Chosen metrics as a table: one row per metric, one column per model, cells with interval and n."""
    rows = table[table.metric.isin(names)]
    for column, value in where.items():
        rows = rows[rows[column] == value]
    rows = rows.assign(cell=[rate(r) for r in rows.to_dict("records")])
    table = rows.pivot_table(index="metric", columns="model", values="cell", aggfunc="first")
    everyone = model_names(20)
    order = [m for m in (*everyone, *map(draft_of, everyone[3:])) if m in table.columns]
    return table.reindex([n for n in names if n in table.index])[order].fillna("")


def explained(table: pd.DataFrame) -> pd.DataFrame:
    """A table with a metric a row, the last level of its index, and beside each what it is (`metrics.METRICS`)."""
    name = "meaning" if table.columns.nlevels == 1 else ("meaning",) + ("",) * (table.columns.nlevels - 1)
    out = table.copy()
    out[name] = [metrics.METRICS[metric][1] for metric in table.index.get_level_values(-1)]
    return out


def meanings(names) -> str:
    """What metrics are, a line each: for a table with a metric a column."""
    return "\n".join(f"{name}: {metrics.METRICS[name][1]}" for name in names)


def agreement_table(table: pd.DataFrame) -> pd.DataFrame:
    """`wide` of reward agreement, ranked sets and judge modes under each other; "" where a model was not measured.

    Shares of fewer than `metrics.MIN_PAIRS` pairs are left out, their n is not: 1 of 1 is no accuracy.
    """
    few = table.metric.isin(OF_PAIRS) & (table.n < metrics.MIN_PAIRS)
    table = table.assign(value=table.value.mask(few))
    judging = table[table.metric == "pairwise_accuracy"]
    found = {
        (name, mode): wide(table, AGREEMENT, judge_mode=mode, set=name, opponent="")
        for name, mode in sorted(set(zip(judging.set, judging.judge_mode, strict=True)))
    }
    return pd.concat(found).fillna("")


def origin(step) -> str:
    """What a scratch report is made of, for its lead; "" for that of a run."""
    if not step.scratch:
        return ""
    own = sorted(path for path in step.declared.reads if not step.is_borrowed(path))
    more = f" and {len(own) - 6} more" if len(own) > 6 else ""
    return (
        f"A scratch run: made here: {', '.join(own[:6]) or 'nothing'}{more} (by M0 where a model was never trained "
        f"here); all else is of {shown(EXAMPLE)}. "
    )


def duels(step) -> pd.DataFrame:
    """Every comparison of two answers, a row each.

    Columns judge, judge_mode, model, opponent, prompt_id, result, category, chars.
    `result` is 1 where model won, 0.5 for a tie, 0; `chars` the mean length of the two answers. Verdicts on answers
    that are not here are left out: a scratch run borrows verdicts on more prompts than it answered itself, and on
    answers in whose place it has its own.
    """
    names = model_names(step.params.iterations)
    kind = {r["prompt_id"]: r.get("category", "other") for r in step.rows("seed/test_prompts.jsonl")}
    chars = {m: {a["prompt_id"]: len(a["text"]) for a in step.rows(f"{m}/eval/answers.jsonl")} for m in names}
    out = []
    for m in names:
        for o in models_before(m):
            path = f"{m}/eval/verdicts/{m}_vs_{o}.jsonl"
            if step.is_borrowed(path) and not all(step.is_borrowed(f"{a}/eval/answers.jsonl") for a in (m, o)):
                continue
            rows = pd.DataFrame(step.rows(path))
            here = kind.keys() & chars[m].keys() & chars[o].keys()
            for (judge, mode), part in rows.groupby(["judge", "judge_mode"], sort=False) if len(rows) else ():
                for pid, result in metrics.outcomes(part[part.prompt_id.isin(here)].to_dict("records")).items():
                    length = (chars[m][pid] + chars[o][pid]) / 2
                    out.append((judge, mode, m, o, pid, result, kind[pid], length))
    columns = ["judge", "judge_mode", "model", "opponent", "prompt_id", "result", "category", "chars"]
    return pd.DataFrame(out, columns=columns)


def ratings_table(duels: pd.DataFrame) -> pd.DataFrame:
    """Bradley-Terry ratings by each judge, M0 at 0; one row per judge and model.

    A judge rates the models that its comparisons tie to M0: people, who vote on few, may rate none.
    """
    out = []
    for (judge, mode), part in duels.groupby(["judge", "judge_mode"], sort=False):
        fought = [
            (m, o, dict(zip(rows.prompt_id, rows.result, strict=True)))
            for (m, o), rows in part.groupby(["model", "opponent"], sort=False)
        ]
        rated = winrates.connected(fought, "M0")
        if not rated:
            continue
        figures = winrates.bradley_terry([duel for duel in fought if duel[0] in rated], anchor="M0")
        out += [{"judge": judge, "judge_mode": mode, "model": m} | figures[m] for m in model_names(20) if m in figures]
    return pd.DataFrame(out, columns=["judge", "judge_mode", "model", "value", "low", "high", "n"])


def kinds_table(duels: pd.DataFrame, model: str, opponent: str) -> pd.DataFrame:
    """Win rate of `model` against `opponent` by category of prompt, and by length of the two answers."""
    out = []
    for (judge, mode), part in duels[(duels.model == model) & (duels.opponent == opponent)].groupby(
        ["judge", "judge_mode"], sort=False
    ):
        results = dict(zip(part.prompt_id, part.result, strict=True))
        by_category = dict(zip(part.prompt_id, part.category, strict=True))
        by_length = winrates.length_buckets(dict(zip(part.prompt_id, part.chars, strict=True)))
        for by, groups in (("category", by_category), ("length", by_length)):
            for group, figure in winrates.breakdown(results, groups).items():
                out.append(
                    {"judge": judge, "judge_mode": mode, "model": model, "opponent": opponent, "by": by, "group": group}
                    | figure
                )
    return pd.DataFrame(out)


def judges_table(duels: pd.DataFrame) -> pd.DataFrame:
    """Cohen's kappa of every two win judges over the comparisons that both decided."""
    judges = [
        (
            judge_label(*who),
            dict(zip(zip(part.model, part.opponent, part.prompt_id, strict=True), part.result, strict=True)),
        )
        for who, part in duels.groupby(["judge", "judge_mode"], sort=False)
    ]
    return pd.DataFrame(
        [
            {"first": a, "second": b} | winrates.kappa(x, y)
            for i, (a, x) in enumerate(judges)
            for b, y in judges[i + 1 :]
        ],
        columns=["first", "second", "value", "low", "high", "n"],
    ).dropna(subset="value")  # undefined where both always say the same


def benchmark_table(table: pd.DataFrame) -> pd.DataFrame:
    """The field's benchmarks: one row per figure, set and judge, one column per model, cells with interval, n."""
    rows = table[table.metric.isin(metrics.FIELD)]
    rows = rows.assign(cell=[rate(r) for r in rows.to_dict("records")])
    out = rows.pivot_table(
        index=["set", "judge", "metric", "judge_mode"], columns="model", values="cell", aggfunc="first"
    )
    return out[[m for m in model_names(20) if m in out.columns]].fillna("")


def write_html(
    path: Path, *, title: str, lead: str, sections: list[dict], pairs: list[dict] | None, answers: list[dict], foot: str
) -> None:
    """report.html: one file, no script, no outside request; everything a model wrote is escaped.

    A section is {"title", "text", "figure" (PNG path or None), "table" (DataFrame or None)}, with `code` in its text.
    `pairs` None leaves that part out.
    """
    filled = [
        {
            "title": s["title"],
            "text": pages.inline(s["text"]),
            "image": pages.image(s["figure"]) if s.get("figure") else "",
            "table": pages.table(s["table"]) if s.get("table") is not None else None,
        }
        for s in sections
    ]
    page = pages.render(
        "report.html.jinja", title=title, lead=lead, sections=filled, pairs=pairs, answers=answers, foot=foot
    )
    write_text(path, printable(page))
