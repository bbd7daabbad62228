"""``srlm compare``: runs side by side: what was set differently, figures overlaid, differences with their intervals.

Differences are from the first run. Where both runs measured a figure on the same prompts (and, for scores and verdicts,
by the same judge) the prompts are resampled together, and the difference has a 95 % interval; where not, the table says
what differs and gives none.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from srlm_utils import measures, metrics, pages, plots, rankings, rendered
from srlm_utils.artefacts import find_jsonl, is_there, new_folder, read_json, read_jsonl, read_optional, write_text
from srlm_utils.cards import recorded
from srlm_utils.errors import DataError
from srlm_utils.lineage import is_model_name
from srlm_utils.report import rate, read_metrics
from srlm_utils.share import check_replaceable

KEY = ["metric", "set", "judge", "judge_mode", "model", "opponent"]
# name: (title, y axis, factor); what is drawn
OVERLAID = {
    "pairwise_accuracy": ("Reward agreement", "pairs ordered as ranked, % of untied", 100),
    "win_rate": ("Win rates, half ties", "win rate, %", 100),
    "mean_score": ("Score of the test answers", "mean score, 0 to 5", 1),
    "answer_chars": ("Length of the test answers", "characters", 1),
    "ended_rate": ("Answers that end by themselves", "%", 100),
    "repeated_4grams": ("Repetition in the test answers", "repeated 4-grams, %", 100),
    "list_rate": ("Answers that hold a list", "%", 100),
}


@dataclass
class Rows:
    """The rows behind one figure: (numerator, denominator) by prompt, and what two runs must share to be paired."""

    parts: dict[str, tuple[float, float]]
    same: dict[str, str]

    @property
    def value(self) -> float | None:
        num, den = (sum(p[i] for p in self.parts.values()) for i in (0, 1))
        return num / den if den else None


def compare(runs: list[Path], out: Path) -> None:
    """Write ``index.html``, ``metrics.csv``, ``differences.csv``, ``params.csv`` and figures to `out`, whole or not."""
    names = _names(runs)
    tables = [
        read_metrics(run / "report/metrics.csv").drop_duplicates(KEY).assign(run=name)
        for run, name in zip(runs, names, strict=True)
    ]
    check_replaceable(out, "srlm compare")
    with new_folder(out) as tmp:
        _write(runs, names, tables, tmp)


def _write(runs: list[Path], names: list[str], tables: list[pd.DataFrame], to: Path) -> None:
    private = rendered.absolute_paths(*(value for run in runs for value in recorded(run)))
    settings = parameters(runs, names)
    table = differences(runs, names, tables)
    figures = pd.concat(tables, ignore_index=True)
    drawn = []
    plots.use_style()
    for name, (title, label, factor) in OVERLAID.items():
        rows = figures[(figures.metric == name) & figures.value.notna()]
        rows = rows[rows.n >= plots.MIN_PAIRS] if name == "pairwise_accuracy" else rows
        if len(rows):
            fig = plots.overlay(rows, names, label, factor)
            plots.save(fig, rows, to / "figures", name)
            plots.plt.close(fig)
            drawn.append((title, pages.image(to / "figures" / f"{name}.png")))
    page = pages.render(
        "compare.html.jinja",
        title="Runs compared: " + ", ".join(names),
        first=names[0],
        settings=pages.table(settings, index=False) if len(settings) else "",
        figures=drawn,
        paired=_shown(table[(table.paired == "yes") & table.metric.isin(OVERLAID)]),
        others=_shown(table[(table.paired == "yes") & ~table.metric.isin(OVERLAID)]),
        unpaired=_shown(table[table.paired != "yes"]),
        n_unpaired=int((table.paired != "yes").sum()),
        n_paired=int((table.paired == "yes").sum()),
        n_apart=int(((table.low > 0) | (table.high < 0)).sum()),
    )
    for name, text in (
        ("index.html", page),
        ("metrics.csv", figures.to_csv(index=False)),
        ("differences.csv", table.to_csv(index=False)),
        ("params.csv", settings.to_csv(index=False)),
    ):
        write_text(to / name, rendered.forget_machine(text, private))


def _names(runs: list[Path]) -> list[str]:
    """Names to tell the runs apart: of the folders, numbered where two are alike."""
    if len(runs) < 2:
        raise DataError("srlm compare needs two runs or more, such as results/quickstart results/beta03.")
    names = [run.name for run in runs]
    return [f"{n} ({names[:i].count(n) + 1})" if names.count(n) > 1 else n for i, n in enumerate(names)]


# ---- what was set


def parameters(runs: list[Path], names: list[str]) -> pd.DataFrame:
    """Columns parameter and one a run: what differs between the manifests of the same steps, and the kit's revision.

    Named ``stage.name`` where it is so for each model of the stage, else ``stage@model.name``; a step that some runs do
    not have is one row.
    """
    manifests = [{m["step"]: m for m in map(read_json, sorted((run / "steps").glob("*.json")))} for run in runs]
    rows: dict[str, list[str]] = {}
    for stage in sorted({step.partition("@")[0] for m in manifests for step in m}):
        steps = sorted({step for m in manifests for step in m if step.partition("@")[0] == stage})
        rows |= {step: ["made" if step in m else "not there" for m in manifests] for step in steps}
        steps = [step for step in steps if all(step in m for m in manifests)]
        given = [[m[s]["params"] for m in manifests] for s in steps]
        for key in sorted({k for step in given for params in step for k in params} - {"run_dir", "model"}):
            values = [[_written(params.get(key, ...)) for params in step] for step in given]
            if all(v == values[0] for v in values):
                rows[f"{stage}.{key}"] = values[0]
            else:
                rows |= {f"{step}.{key}": v for step, v in zip(steps, values, strict=True)}
    rows["kit revision"] = [", ".join(sorted({m.get("git") or "?" for m in steps.values()})) for steps in manifests]
    different = {k: v for k, v in rows.items() if len(set(v)) > 1}
    return pd.DataFrame([[k, *v] for k, v in different.items()], columns=["parameter", *names])


def _written(value) -> str:
    return "not there" if value is ... else json.dumps(value, ensure_ascii=False)


# ---- differences


def differences(runs: list[Path], names: list[str], tables: list[pd.DataFrame]) -> pd.DataFrame:
    """One row per figure and run after the first: both values, the difference, its interval, whether it is paired."""
    first, *others = (_by_key(t) for t in tables)
    rows_of, out = [rows_behind(run) for run in runs], []
    for i, other in enumerate(others, 1):
        for key in [k for k in first if k in other]:
            a, b = first[key], other[key]
            if a["value"] is None or b["value"] is None:
                continue
            figure, paired = _difference(rows_of[0].get(key), rows_of[i].get(key), a["value"], b["value"])
            out.append(
                dict(zip(KEY, key, strict=True))
                | {"run": names[i], "baseline": names[0], "value": b["value"], "baseline_value": a["value"]}
                | {"difference": figure.pop("value"), **figure, "unit": a["unit"], "paired": paired}
            )
    columns = [*KEY, "run", "baseline", "value", "baseline_value", "difference", "low", "high", "n", "unit", "paired"]
    return pd.DataFrame(out, columns=columns).astype({"n": "Int64"})


def _by_key(table: pd.DataFrame) -> dict[tuple, dict]:
    table = table.astype(object).where(table.notna(), None)
    return {tuple(row[k] for k in KEY): row for row in table.to_dict("records")}


def _difference(ours: Rows | None, theirs: Rows | None, a: float, b: float) -> tuple[dict, str]:
    """The figure of b - a, and "yes" or why it has no interval."""
    alone = {"value": b - a, "low": None, "high": None, "n": None}
    if ours is None or theirs is None:
        return alone, "no rows for it here"
    for rows, value in ((ours, a), (theirs, b)):
        if rows.value is None or abs(rows.value - value) > 1e-6 * max(1, abs(value)):
            return alone, "rows and metrics.csv disagree"
    apart = [what for what, digest in ours.same.items() if theirs.same.get(what) != digest]
    if apart:
        return alone, f"not the same {' and '.join(apart)}"
    ids = sorted(ours.parts)
    if ids != sorted(theirs.parts):
        return alone, "not the same prompts"
    sides = [list(zip(*(rows.parts[i] for i in ids), strict=True)) for rows in (theirs, ours)]
    n = sum(any(side[1][k] for side in sides) for k in range(len(ids)))  # prompts that say something about it
    return metrics.ratio_difference(*sides) | {"n": n}, "yes"


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def rows_behind(run: Path) -> dict[tuple, Rows]:
    """The rows behind the figures of a run that are means or ratios over prompts, by the figure's key."""
    out: dict[tuple, Rows] = {}
    ranked = read_optional(run / "seed" / "ranked_eval.jsonl")
    for folder in sorted(run.glob("*/eval")):
        model = folder.parent.name
        if is_model_name(model) and is_there(folder / "answers.jsonl"):
            out |= _agreement_rows(model, ranked, folder) | _answer_rows(model, folder) | _verdict_rows(run, model)
    return out


def _agreement_rows(model: str, ranked: list[dict], folder: Path) -> dict[tuple, Rows]:
    if not (ranked and is_there(folder / "judgements.jsonl")):
        return {}
    by_mode: dict[str, list[dict]] = {}
    for row in read_jsonl(folder / "judgements.jsonl"):
        by_mode.setdefault(row["judge_mode"], []).append(row)
    out = {}
    for mode, judged in by_mode.items():
        for name, part in rankings.by_set(ranked).items():
            part = rankings.judged_by_all(part, judged)
            counts = metrics.agreement_counts(rankings.scored_prompts(part, judged))
            same = {"ranked replies": _digest(part)}
            for metric, of in (metrics.RATIOS | {"exact_match": lambda c: (c["exact"], 1)}).items():
                parts = {i: of(c[0]) if c else (0, 0) for i, c in counts.items()}
                out[metric, name, model, mode, model, ""] = Rows(parts, same)
    return out


def _answer_rows(model: str, folder: Path) -> dict[tuple, Rows]:
    answers = read_jsonl(folder / "answers.jsonl")
    prompts = _digest(sorted({(a["prompt_id"], a["prompt"]) for a in answers}))
    of: dict[str, list[dict]] = {}
    for a in answers:
        of.setdefault(a["prompt_id"], []).append(a)
    out = {}
    for metric, measure in measures.OF_AN_ANSWER.items():
        parts = {i: (sum(map(measure, its)) / len(its), 1) for i, its in of.items()}
        out[metric, "test_prompts", "", "", model, ""] = Rows(parts, {"prompts": prompts})
    scores: dict[str, list[dict]] = {}
    for row in read_optional(folder / "answer_scores.jsonl"):
        scores.setdefault(row["judge"], []).append(row)
    for judge, rows in scores.items():
        parts = {r["prompt_id"]: (r["score"], 1) for r in rows}
        same = {"prompts": prompts, "judge": _digest(sorted({r["judge_rev"] for r in rows}))}
        out["mean_score", "test_prompts", judge, "expected", model, ""] = Rows(parts, same)
    return out


def _verdict_rows(run: Path, model: str) -> dict[tuple, Rows]:
    out = {}
    for path in find_jsonl(run / model / "eval" / "verdicts", "*.jsonl"):
        by_judge: dict[tuple, list[dict]] = {}
        for v in read_jsonl(path):
            by_judge.setdefault((v["model_b"], v["judge"], v["judge_mode"]), []).append(v)
        for (opponent, judge, mode), rows in by_judge.items():
            theirs = run / opponent / "eval" / "answers.jsonl"
            same = {
                "judge": _digest(sorted({r["judge_rev"] for r in rows})),
                "opponent's answers": _digest(
                    sorted((a["prompt_id"], a["prompt"], a["text"]) for a in read_jsonl(theirs))
                    if is_there(theirs)
                    else str(theirs)
                ),
            }
            results = metrics.outcomes(rows)
            for metric, worth in {"win_rate": None, "win": 1.0, "tie": 0.5, "loss": 0.0}.items():
                parts = {i: (float(r == worth) if worth is not None else r, 1) for i, r in results.items()}
                out[metric, "test_prompts", judge, mode, model, opponent] = Rows(parts, same)
    return out


def _shown(table: pd.DataFrame) -> str | pages.Markup:
    """Differences as people read them; "" for none."""
    if table.empty:
        return ""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    unit = {"share": "share difference", "p": ""}  # the difference of two p-values is none
    cells = [
        rate(
            {"value": r["difference"], "low": r["low"], "high": r["high"], "n": r["n"] or "?"}
            | {"unit": unit.get(r["unit"], r["unit"])}
        )
        for r in rows
    ]
    plain = {"low": None, "high": None}
    out = pd.DataFrame(
        {
            "figure": [r["metric"] for r in rows],
            "model": [f"{r['model']} vs {r['opponent']}" if r["opponent"] else r["model"] for r in rows],
            "on": [r["set"] for r in rows],
            "judge": [", ".join(filter(None, (r["judge"], r["judge_mode"]))) for r in rows],
            "run": [r["run"] for r in rows],
            "first run": [rate(r | plain | {"value": r["baseline_value"]}).rpartition(",")[0] for r in rows],
            "this run": [rate(r | plain).rpartition(",")[0] for r in rows],
            "difference": [c if r["n"] else c.rpartition(",")[0] for c, r in zip(cells, rows, strict=True)],
            "paired": [r["paired"] for r in rows],
        }
    )
    return pages.table(out.drop(columns="paired") if (table.paired == "yes").all() else out, index=False)
