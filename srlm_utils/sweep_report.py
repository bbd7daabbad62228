"""A sweep's cells side by side: comparison.csv, figures and one self-contained report.html.

Each variant's last model is set against M1 of its own run, and against the last model of its control with the same
seed, prompt by prompt. Between two runs only a judge with the same weights in both can say who wins: M1 of a seed, as
long as the variants share it. Intervals: `metrics.ratio_over_seeds`.
"""

from pathlib import Path

import pandas as pd

from srlm_utils import cells, measures, metrics, plots, readers, report
from srlm_utils.artefacts import write_text
from srlm_utils.cells import DEFAULT, Cell
from srlm_utils.step import git_revision
from srlm_utils.verdicts import from_scores, judge_label

CONTROL = {DEFAULT: "random_pairs", "meta_judge": "written_judge"}  # of every other variant it is the default

# metric: (unit, its value where nothing differs, what a lower and a higher one is)
FIGURES = {
    "win_rate": ("share", 0.5, ("worse", "better")),
    "agreement_gain": ("share difference", 0.0, ("worse", "better")),
    "instruction_strict_accuracy": ("share difference", 0.0, ("worse", "better")),
    "ended_rate": ("share difference", 0.0, ("worse", "better")),
    "repeated_4grams": ("share difference", 0.0, ("better", "worse")),
    "list_rate": ("share difference", 0.0, ("fewer", "more")),
    "answer_chars": ("times", 1.0, ("shorter", "longer")),
}
COLUMNS = ["variant", "model", "against", "opponent", "metric", "set", "judge", "judge_mode", "seed", "n_seeds"]
COLUMNS += ["value", "low", "high", "n", "unit", "verdict"]

# a mean of fewer prompts, no share, shows nothing: in a simulation 28 % of intervals over three miss, 8 % over six
MIN_PROMPTS = 6
# what says how a round went, from its health
ROUND = ["pair_yield", "candidate_tie_rate", "modal_share", "within_prompt_score_std", "score_length_correlation"]
ROUND += ["chosen_chars", "rejected_chars"]
# of some variants alone
ROUND_OF_SOME = ["draft_chosen_rate", "judge_pair_yield", "meta_first_place_rate"]


def by_variant(found: list[Cell]) -> dict[str, dict[int, Cell]]:
    """Cells by variant and seed; the default first, its control next, then by name."""
    first = [DEFAULT, CONTROL[DEFAULT]]
    names = sorted({c.variant for c in found}, key=lambda n: (first.index(n) if n in first else len(first), n))
    return {n: {c.seed: c for c in sorted(found, key=lambda c: c.seed) if c.variant == n} for n in names}


def compare(found: list[Cell]) -> pd.DataFrame:
    """All comparisons; `seed` is "" over all seeds, and rows of single seeds follow where there are several."""
    variants, rows = by_variant(found), []
    for name, of_seed in variants.items():
        inside = {s: measured(c, c.last, c, "M1") for s, c in of_seed.items() if c.last not in ("M0", "M1")}
        last = next(iter(of_seed.values())).last
        rows += _rows(inside, variant=name, model=last, against=name, opponent="M1")
        control = CONTROL.get(name, DEFAULT)
        if control not in variants and name != DEFAULT:
            control = DEFAULT
        if control in variants:
            both = {s: (c, variants[control][s]) for s, c in of_seed.items() if s in variants[control]}
            sides = {s: measured(a, a.last, b, b.last) for s, (a, b) in both.items()}
            opponent = next(iter(variants[control].values())).last
            rows += _rows(sides, variant=name, model=last, against=control, opponent=opponent)
    return pd.DataFrame(rows, columns=COLUMNS)


def ladder(found: list[Cell]) -> pd.DataFrame:
    """Round by round within each variant, in the columns of `compare`: each model after M1 against the one before it,
    and the last against M0 and SFT."""
    rows = []
    for name, of_seed in by_variant(found).items():
        models = next(iter(of_seed.values())).models
        steps = [*zip(models[3:], models[2:-1], strict=True), *((models[-1], o) for o in ("M0", "SFT"))]
        for model, opponent in steps:
            sides = {s: measured(c, model, c, opponent) for s, c in of_seed.items()}
            rows += _rows(sides, variant=name, model=model, against=name, opponent=opponent)
    return pd.DataFrame(rows, columns=COLUMNS)


def measured(a: Cell, model: str, b: Cell, opponent: str) -> dict[tuple, dict[str, tuple[float, float]]]:
    """What two models differ in, by (metric, set, judge, judge_mode) and prompt_id: a numerator and a denominator.

    Only prompts that both answered, and that read alike, count. A run's own verdicts need no answers: those of its
    middle models may have been too large to keep (`cells.write`).
    """
    ours, theirs = ({r["prompt_id"]: r for r in c.answers if r["model"] == m} for c, m in ((a, model), (b, opponent)))
    pairs = {i: (x, theirs[i]) for i, x in ours.items() if i in theirs and theirs[i]["prompt"] == x["prompt"]}
    tests = "test_prompts", "", ""
    out = {
        ("win_rate", "test_prompts", *judge): {i: (result, 1) for i, result in won.items()}
        for judge, won in _wins(a, model, b, opponent, pairs).items()
    }
    for key, credit in _credits(a, model).items():
        other = _credits(b, opponent).get(key, {})
        shared = {i: (c - other[i][0], n) for i, (c, n) in credit.items() if i in other and other[i][1] == n}
        out["agreement_gain", key[0], "", key[1]] = shared
    out["instruction_strict_accuracy", *tests] = {
        i: (x.get("n_followed", 0) - y.get("n_followed", 0), x["n_instructions"])
        for i, (x, y) in pairs.items()
        if x.get("n_instructions", 0) > 0
    }
    for name in ("ended_rate", "repeated_4grams", "list_rate"):
        measure = measures.OF_AN_ANSWER[name]
        out[name, *tests] = {i: (measure(x) - measure(y), 1) for i, (x, y) in pairs.items()}
    # an empty answer has a length too; a prompt without a denominator would be left out
    out["answer_chars", *tests] = {i: (len(x["text"]), len(y["text"]) or 1e-9) for i, (x, y) in pairs.items()}
    return {key: values for key, values in out.items() if values}


def _wins(a: Cell, model: str, b: Cell, opponent: str, prompts) -> dict[tuple[str, str], dict[str, float]]:
    """Results by (judge, judge_mode): a run's own verdicts; between two runs, scores of a judge of the same weights."""
    if a is b:
        rows = [v for v in a.verdicts if (v["model_a"], v["model_b"]) == (model, opponent)]
        judges = dict.fromkeys((v["judge"], v["judge_mode"]) for v in rows)
        return {j: metrics.outcomes([v for v in rows if (v["judge"], v["judge_mode"]) == j]) for j in judges}
    scores: list[dict[tuple[str, str], dict[str, float]]] = [{}, {}]
    for of_judge, cell, name in ((scores[0], a, model), (scores[1], b, opponent)):
        for r in cell.scores:
            if r["model"] == name and r["prompt_id"] in prompts:
                of_judge.setdefault((r["judge"], r["judge_rev"]), {})[r["prompt_id"]] = r["score"]
    out, same = {}, {i for i, (x, y) in prompts.items() if x["text"] == y["text"]}
    for (judge, rev), ours in scores[0].items():
        theirs = scores[1].get((judge, rev), {})
        shared = {i: s for i, s in ours.items() if i in theirs}
        if shared:
            out[judge, "score"] = metrics.outcomes(from_scores(shared, theirs, same))
    return out


def _credits(cell: Cell, model: str) -> dict[tuple[str, str], dict[str, tuple[float, int]]]:
    """(credit, pairs) by (set, judge_mode) and prompt."""
    out: dict[tuple[str, str], dict[str, tuple[float, int]]] = {}
    for r in cell.agreement:
        if r["model"] == model:
            out.setdefault((r["set"], r["judge_mode"]), {})[r["prompt_id"]] = r["credit"], r["n_pairs"]
    return out


def _rows(sides: dict[int, dict], **who) -> list[dict]:
    out = []
    for key in dict.fromkeys(k for found in sides.values() for k in found):
        metric, name, judge, mode = key
        unit, same, words = FIGURES[metric]
        of_seed = {s: found[key] for s, found in sides.items() if key in found}
        for seeds in [[*of_seed], *([[s] for s in of_seed] if len(of_seed) > 1 else [])]:
            ids = sorted({i for s in seeds for i in of_seed[s]})
            grid = [[of_seed[s].get(i, (0, 0)) for i in ids] for s in seeds]
            num, den = ([[cell[k] for cell in row] for row in grid] for k in (0, 1))
            figure = metrics.ratio_over_seeds(num, den, share=metric == "win_rate")
            if metric == "answer_chars":
                figure["n"] = sum(len(of_seed[s]) for s in seeds)  # answers, not characters
            low, high = figure["low"], figure["high"]
            few = metric != "win_rate" and sum(map(any, zip(*den, strict=True))) < MIN_PROMPTS
            verdict = "not shown" if few or low is None or low <= same <= high else words[int(low > same)]
            seed = "" if seeds == [*of_seed] else str(seeds[0])
            where = {"metric": metric, "set": name, "judge": judge, "judge_mode": mode, "unit": unit}
            out.append(who | where | {"seed": seed, "n_seeds": len(seeds)} | figure | {"verdict": verdict})
    return out


def over(n_seeds: int) -> str:
    return "over prompts only (one seed)" if n_seeds == 1 else f"over prompts and {n_seeds} seeds"


def verdicts_table(table: pd.DataFrame) -> pd.DataFrame:
    """Who is better, plainly: one row per comparison and judge; where no judge can say, a row says so."""
    out, whole = [], table[table.seed == ""]
    for (variant, *_), rows in whole.groupby(["variant", "against", "model", "opponent"], sort=False):
        first = rows.iloc[0]
        who = {"variant": variant, "compared": f"{first.model} with {_whom(first)}"}
        wins = rows[rows.metric == "win_rate"].to_dict("records")
        for r in wins:
            judge = judge_label(r["judge"], r["judge_mode"])
            how = {"judge": judge, "win rate": report.rate(r), "interval": over(r["n_seeds"])}
            out.append(who | how | {"verdict": r["verdict"]})
        if not wins:
            nobody = {"judge": "none of the same weights judged both", "win rate": "", "interval": ""}
            out.append(who | nobody | {"verdict": "nobody to say"})
    return pd.DataFrame(out, columns=["variant", "compared", "verdict", "win rate", "judge", "interval"])


def figures_table(table: pd.DataFrame, metric_names: list[str]) -> pd.DataFrame:
    """One row per comparison, one column per metric, cells with interval, n and what they show; `whom` is what a
    variant's last model was set against."""
    rows = table[(table.seed == "") & table.metric.isin(metric_names)]
    if not len(rows):
        return pd.DataFrame()
    rows = rows.assign(
        cell=[f"{report.rate(r)}: {r['verdict']}" for r in rows.to_dict("records")],
        column=[_panel(r) for r in rows.to_dict("records")],
        whom=[_whom(r) for r in rows.to_dict("records")],
    )
    order = list(dict.fromkeys(rows.column))
    index = ["variant", "whom"]
    return rows.pivot_table(index=index, columns="column", values="cell", aggfunc="first", sort=False)[order].fillna("")


def _side(table: pd.DataFrame, inside: bool) -> pd.DataFrame:
    """Comparisons with M1 of the same run (`inside`), or with another variant."""
    return table[(table.variant == table.against) == inside]


def _whom(row: dict) -> str:
    return (
        f"its own {row['opponent']}" if row["against"] == row["variant"] else f"{row['opponent']} of {row['against']}"
    )


def _panel(row: dict) -> str:
    if row["metric"] == "win_rate":
        return judge_label(row["judge"], row["judge_mode"])
    if row["metric"] == "agreement_gain":
        return f"{row['set']}, {row['judge_mode']}"
    return {
        "answer_chars": "length",
        "ended_rate": "ended by themselves",
        "repeated_4grams": "repeated 4-grams",
        "list_rate": "with a list",
        "instruction_strict_accuracy": "instructions followed",
    }[row["metric"]]


def drawn(table: pd.DataFrame, metric_names: list[str], *, inside: bool):
    """`plots.variants` of some metrics: against M1 of the same run (`inside`), or another variant; None for no row."""
    rows = _side(table[table.metric.isin(metric_names)], inside)
    if not len(rows):
        return None
    if not inside:  # the default's control against the default is what the default against its control is
        rows = rows[rows.variant != CONTROL[DEFAULT]]
    names = rows.variant if inside else rows.variant + " vs " + rows.against
    rows = rows.assign(panel=[_panel(r) for r in rows.to_dict("records")], name=names)
    others = "The last model against another variant's (its control, else the default)"
    return plots.variants(rows, "The last model against M1" if inside else others)


def differences(found: list[Cell]) -> pd.DataFrame:
    """Parameters in which the variants differ: one row each, one column per variant; – where a variant sets nothing."""
    trees = {n: cells.flat_params(next(iter(of_seed.values())).params) for n, of_seed in by_variant(found).items()}
    names = dict.fromkeys(k for tree in trees.values() for k in tree)
    rows = {
        k: [tree.get(k, "–") for tree in trees.values()] for k in names if k not in ("common.seed", "common.variant")
    }
    rows = {k: v for k, v in rows.items() if any(x != v[0] for x in v)}
    return pd.DataFrame.from_dict({k: map(str, v) for k, v in rows.items()}, orient="index", columns=[*trees])


def rounds(found: list[Cell]) -> pd.DataFrame:
    """How each round went: one row per variant, seed and judging model, one column per measure of its health."""
    frames = [
        c.metrics[c.metrics.metric.isin(ROUND + ROUND_OF_SOME)].assign(variant=c.variant, seed=c.seed) for c in found
    ]
    table = pd.concat(frames, ignore_index=True)
    if not len(table):
        return pd.DataFrame(columns=ROUND)
    wide = table.pivot_table(index=["variant", "seed", "model"], columns="metric", values="value", aggfunc="first")
    return wide.reindex(columns=ROUND + [name for name in ROUND_OF_SOME if name in wide]).round(2)


def cells_table(found: list[Cell]) -> pd.DataFrame:
    rows = [
        {"variant": c.variant, "seed": c.seed, "weights of M1": (c.about.get("weights") or {}).get("M1", "")}
        | {"minutes, shared steps included": c.about.get("minutes"), "revision": c.about.get("git")}
        for of_seed in by_variant(found).values()
        for c in of_seed.values()
    ]
    return pd.DataFrame(rows)


def example_answers(found: list[Cell], n: int) -> list[dict]:
    """`n` test prompts, answered by the last model of every variant with the first seed."""
    first = [next(iter(of_seed.values())) for of_seed in by_variant(found).values()]
    answers = {c.variant: {a["prompt_id"]: a for a in c.answers if a["model"] == c.last} for c in first}
    ids = sorted(set.intersection(*(set(a) for a in answers.values())))
    return [
        {
            "prompt": answers[first[0].variant][i]["prompt"],
            "answers": [
                (f"{c.variant}, {c.last}", *(answers[c.variant][i][k] for k in ("text", "ended"))) for c in first
            ],
        }
        for i in (ids[k * len(ids) // n] for k in range(min(n, len(ids))))
    ]


METHOD = (
    "A figure over several seeds is the mean of the seeds' figures. Its 95 % interval takes both prompts and seeds for "
    "samples (the variance between prompts of their means over seeds, plus that between seeds; Student's t), and so "
    "holds for other prompts and other seeds. With one seed it is over prompts only, and says nothing of other seeds. "
    "“Not shown” means that the interval holds the value of no difference; it does not mean that there is none. The "
    "verdicts are as many as there are rows: of twenty without any difference one is expected to show one."
)


READERS = (
    "They read both answers without knowing whose they are; a pair goes to the model with more of its readers' votes, "
    "and ties count half. The first interval holds for other prompts and these models, the second for other seeds, "
    "too. The file does not say who the readers were; in the sweeps that come with the kit they were language models."
)


QUESTIONS = [  # title, text, name of the figures, metrics
    (
        "Who wins",
        "The win rate with half ties, by the judge above each panel; grey dots are single seeds. M1 made the data "
        "that the models learned from: its word shows what was optimised. Between two variants only scores by a "
        "judge of the same weights count.",
        "win_rates",
        ["win_rate"],
    ),
    (
        "What are the answers like",
        "Differences to the opponent's answers to the same prompts; length as a multiple of its mean.",
        "answers",
        ["instruction_strict_accuracy", "ended_rate", "repeated_4grams", "list_rate", "answer_chars"],
    ),
    (
        "Does it judge better",
        "Reply pairs ordered as ranked, half credit for ties, minus the opponent's on the same pairs.",
        "agreement",
        ["agreement_gain"],
    ),
]


def _questions(sweep: Path, table: pd.DataFrame) -> list[dict]:
    """Sections of the report, two a question, with figures, which are saved in the sweep's folder."""
    sections = []
    for title, text, name, names in QUESTIONS:
        for inside, where in ((True, "against M1"), (False, "against another variant")):
            if figure := drawn(table, names, inside=inside):
                file = f"{name}_{'m1' if inside else 'control'}"
                plots.save(*figure, sweep / "figures", file)
                plots.plt.close(figure[0])
                shown = {
                    "figure": sweep / "figures" / f"{file}.png",
                    "table": figures_table(_side(table, inside), names),
                }
                sections.append({"title": f"{title}, {where}?", "text": text} | shown)
    return sections


def write(sweep: Path) -> Path:
    """comparison.csv, figures/ and report.html of all cells of a sweep's folder; the report's path."""
    found, votes = cells.read_all(sweep), readers.read(sweep)
    table, sections = compare(found), []
    plots.use_style()
    climbed = ladder(found)
    everything = pd.concat([table, climbed], ignore_index=True).drop_duplicates()
    write_text(sweep / "comparison.csv", everything.to_csv(index=False, lineterminator="\n"))
    sections.append({"title": "Verdicts", "text": METHOD, "table": verdicts_table(table)})
    sections += _questions(sweep, table)
    text = "Each model against the one before it, and the last one against those that the loop began with."
    sections.append({"title": "Round by round", "text": text, "table": verdicts_table(climbed)})
    if len(votes):
        sections.append({"title": "Blind readers", "text": READERS, "table": readers.table(votes)})
    differ = differences(found)
    if len(differ):
        sections.append({"title": "What differs", "text": "– is the kit's default.", "table": differ})
    sections.append(
        {"title": "How the rounds went", "text": "By the judging model's own scores.", "table": rounds(found)}
    )
    text = "M1 of a seed is shared where its weights are the same."
    sections.append({"title": "The cells", "text": text, "table": cells_table(found)})
    report.write_html(
        sweep / "report.html",
        title=f"Sweep: {sweep.name}",
        lead=f"{len(found)} cells; {len(by_variant(found))} variants.",
        sections=sections,
        pairs=None,
        answers=example_answers(found, 3),
        foot=f"Report by kit revision {git_revision() or 'unknown'}.",
    )
    return sweep / "report.html"
