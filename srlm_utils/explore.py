"""A run folder to read: ``run = srlm_utils.open_run("results/example")``. No model is loaded, nothing is written.

Tables are plain DataFrames, one row per thing, with the files' own ids and the texts exactly as they were written.
Cards are for the eye: whatever a model wrote is text there, never markup, and control characters are spelt out.
"""

import textwrap
from functools import cached_property, lru_cache
from pathlib import Path

import pandas as pd
from jinja2 import Environment
from markupsafe import escape

from srlm_utils import metrics
from srlm_utils.artefacts import count_rows, find_jsonl, is_there, read_jsonl, read_optional
from srlm_utils.errors import MissingInputError, ParamError
from srlm_utils.lineage import init_model, is_draft, is_model_name
from srlm_utils.paths import PACKAGE, RESULTS, resolve, run_folder, shown
from srlm_utils.printable import printable
from srlm_utils.report import read_metrics
from srlm_utils.step import maker

# what each method reads below the model's folder
FILES = {
    "prompts": "aift/prompts.jsonl",
    "candidates": "aift/candidates.jsonl",
    "judgements": "aift/judgements.jsonl",
    "pairs": "aift/pairs.jsonl",
    "positives": "aift/positives.jsonl",
    "answers": "eval/answers.jsonl",
}
_TEXTS = ("prompt", "text", "chosen", "rejected", "reference")


class Run:
    """A run folder. Its methods take filters, as `where` does: ``run.candidates("M1", search="tea", score=(3, None))``.

    Tables: `models`, `prompts`, `candidates`, `judgements`, `pairs`, `answers`, `verdicts`, `metrics`. A draft's ("F2")
    are those of its round with its answers among them.
    Cards: `show_prompt` (with its scored candidates), `show_pair`, `side_by_side` (two or more models' answers).
    """

    def __init__(self, folder: str | Path):
        path = resolve(folder)
        self.folder = path if path.is_dir() or Path(folder).name != str(folder) else RESULTS / folder
        self.name = self.folder.name
        run_folder(self.folder)

    # ---- tables

    @cached_property
    def models(self) -> pd.DataFrame:
        """One row per model: what it was made from, and how many rows of each kind it has."""
        found = [p.name for p in self.folder.iterdir() if p.is_dir() and is_model_name(p.name)]
        found.sort(key=lambda m: (m != "M0", m != "SFT", int(m[1:]) if m != "SFT" else 0))
        rows = [
            {"model": m, "made_from": "" if m == "M0" else init_model(m)}
            | {what: _count(self.folder / m / file) for what, file in FILES.items()}
            for m in found
        ]
        return pd.DataFrame(rows, columns=["model", "made_from", *FILES]).set_index("model")

    def prompts(self, model: str, **filters) -> pd.DataFrame:
        """The new prompts of a round: prompt_id, prompt, category, written_by, attempt_id."""
        return where(self._prompts(model), **filters)

    def candidates(self, model: str, **filters) -> pd.DataFrame:
        """A model's answers to its round's prompts, with the score it gave them and what they became.

        Columns cand_id, prompt_id, prompt, category, text, score (NaN: none, or unparsed), n_tokens, n_chars, ended
        (False: cut off at the token budget), role (chosen, rejected, positive or "").
        """
        table = self._table(model, "candidates")
        scores = {r["id"]: r["score"] for r in self._rows(model, "judgements", optional=True)}
        roles = {r["cand_id"]: "positive" for r in self._rows(model, "positives", optional=True)}
        for r in self._rows(model, "pairs", optional=True):
            roles |= {r["chosen_id"]: "chosen", r["rejected_id"]: "rejected"}
        table = self._with_prompts(table, self._prompts(model)).assign(
            score=pd.to_numeric(table.cand_id.map(scores)),
            n_chars=table.text.str.len(),
            role=table.cand_id.map(roles).fillna(""),
        )
        columns = [
            "cand_id",
            "prompt_id",
            "prompt",
            "category",
            "text",
            "score",
            "n_tokens",
            "n_chars",
            "ended",
            "role",
        ]
        return where(table[columns], **filters)

    def judgements(self, model: str, **filters) -> pd.DataFrame:
        """A model's judgements of its own candidates: the file's columns (`judge.scores`) behind what was judged."""
        mine = self.candidates(model)[["cand_id", "prompt_id", "prompt", "category", "text", "n_chars"]]
        return where(mine.merge(self._table(model, "judgements").rename(columns={"id": "cand_id"})), **filters)

    def pairs(self, model: str, **filters) -> pd.DataFrame:
        """The preference pairs of a round, with category, margin and lengths; score and length filter by the chosen."""
        table = self._with_prompts(self._table(model, "pairs").drop(columns="prompt"), self._prompts(model))
        table = table.assign(
            margin=table.chosen_score - table.rejected_score,
            chosen_chars=table.chosen.str.len(),
            rejected_chars=table.rejected.str.len(),
        )
        return where(table, **filters)

    def answers(self, model: str, **filters) -> pd.DataFrame:
        """A model's answers to the held-out test prompts.

        Columns prompt_id, prompt, category, text, score and scored_by (where a judge of win rates scored them; the
        first that did), n_tokens, n_chars, ended, reference (a good answer, where the prompt has one).
        """
        table = self._table(model, "answers")
        scored = read_optional(self.folder / model / "eval/answer_scores.jsonl")
        judge = scored[0]["judge"] if scored else ""
        seed = {r["prompt_id"]: r for r in read_optional(self.folder / "seed/test_prompts.jsonl")}
        table = table.assign(
            category=[seed.get(i, {}).get("category", "") for i in table.prompt_id],
            reference=[seed.get(i, {}).get("reference", "") for i in table.prompt_id],
            score=pd.to_numeric(
                table.prompt_id.map({r["prompt_id"]: r["score"] for r in scored if r["judge"] == judge})
            ),
            scored_by=judge,
            n_chars=table.text.str.len(),
        )
        columns = ["prompt_id", "prompt", "category", "text", "score", "scored_by"]
        columns += ["n_tokens", "n_chars", "ended", "reference"]
        return where(table[columns], **filters)

    def verdicts(self, model: str, opponent: str, **filters) -> pd.DataFrame:
        """Who won, one row per prompt and judge: judge, judge_mode, result (1 `model`, 0.5 tie, 0 `opponent`)."""
        self._check(model)
        self._check(opponent)
        for a, b in ((model, opponent), (opponent, model)):
            path = self.folder / a / f"eval/verdicts/{a}_vs_{b}.jsonl"
            if is_there(path):
                break
        else:
            there = find_jsonl(self.folder, "*/eval/verdicts/*_vs_*.jsonl")
            pairs = sorted(p.stem.replace("_vs_", " and ") for p in there)
            raise MissingInputError(
                f"{self.name}: {model} and {opponent} were not compared. Compared are {', '.join(pairs) or 'none'}."
            )
        by_judge: dict[tuple, list[dict]] = {}
        for r in read_jsonl(path):
            by_judge.setdefault((r["judge"], r["judge_mode"]), []).append(r)
        rows = [
            {"prompt_id": pid, "judge": judge, "judge_mode": mode, "result": result if a == model else 1 - result}
            for (judge, mode), part in by_judge.items()
            for pid, result in metrics.outcomes(part).items()
        ]
        table = pd.DataFrame(rows, columns=["prompt_id", "judge", "judge_mode", "result"])
        return where(self._with_prompts(table, self.answers(model)), **filters)

    def metrics(self) -> pd.DataFrame:
        """Every figure of the run: report/metrics.csv."""
        return read_metrics(self.folder / "report/metrics.csv")

    # ---- cards

    def show_prompt(self, model: str, *, n: int = 1, **filters) -> "Cards":
        """The first `n` prompts with a candidate that the filters let through, each with all its scored candidates."""
        all_, found = self.candidates(model), self.candidates(model, **filters).prompt_id.unique()
        why = {
            r["id"]: [s["text"] for s in r.get("samples", [])] for r in self._rows(model, "judgements", optional=True)
        }
        cards = []
        for pid in found[:n]:
            mine = all_[all_.prompt_id == pid].sort_values("score", ascending=False)
            replies = [_reply(r.cand_id, r._asdict(), notes=why.get(r.cand_id, [])) for r in mine.itertuples()]
            cards.append(_card(mine.iloc[0], replies, f"written in {model}'s round"))
        return Cards(cards, len(found), "prompts")

    def show_pair(self, model: str, *, n: int = 1, **filters) -> "Cards":
        """The first `n` preference pairs that the filters let through."""
        table, cands = self.pairs(model, **filters), self.candidates(model).set_index("cand_id", drop=False)
        cards = [
            _card(r, [_reply(i, cands.loc[i]) for i in (r.chosen_id, r.rejected_id)], f"margin {r.margin:.2f}")
            for r in table.head(n).itertuples()
        ]
        return Cards(cards, len(table), "pairs")

    def side_by_side(self, *models: str, n: int = 1, **filters) -> "Cards":
        """The first `n` test prompts, answered by each of the models; score and length filter by the first one's."""
        if not models:
            raise ParamError("side_by_side: name the models whose answers to show, such as 'M1', 'M3'.")
        answers = {m: self.answers(m).set_index("prompt_id") for m in models}
        first = self.answers(models[0])
        shared = first[[all(i in t.index for t in answers.values()) for i in first.prompt_id]]
        words = filters.pop("search", "")
        table = where(shared, **filters)
        hits = [i for i in table.prompt_id if any(len(where(t.loc[[i]], search=words)) for t in answers.values())]
        cards = []
        for pid in hits[:n]:
            row = answers[models[0]].loc[pid]
            replies = [_reply(m, answers[m].loc[pid]) for m in models]
            if row.reference:
                replies.append({"label": "a good answer", "role": "", "text": row.reference, "notes": []})
            cards.append(_card(row, replies, f"scores by {row.scored_by}" if row.scored_by else "", pid))
        return Cards(cards, len(hits), "prompts")

    def __repr__(self) -> str:
        return f"Run {shown(self.folder)}\n{self.models.astype(str).to_string()}"

    def _repr_html_(self) -> str:
        return f"<p>Run <code>{escape(shown(self.folder))}</code></p>{self.models.to_html(border=0, escape=True)}"

    # ---- reading

    def _check(self, model: str) -> None:
        """Raise if there is no such model. Drafts are not in the table of models, but have rows to read."""
        if model not in self.models.index and not (is_draft(model) and (self.folder / model).is_dir()):
            raise MissingInputError(f"{self.name} has no model {model!r}; it has {', '.join(self.models.index)}.")

    def _rows(self, model: str, what: str, *, optional: bool = False) -> list[dict]:
        self._check(model)
        path = self.folder / model / FILES[what]
        if is_there(path):
            return read_jsonl(path)
        if optional:
            return []
        have = [m for m in self.models.index if is_there(self.folder / m / FILES[what])]
        raise MissingInputError(
            f"{self.name}: {model} has no {what} ({shown(path)}; {maker(f'{model}/{FILES[what]}')} makes it). "
            f"Models with {what}: {', '.join(have) or 'none'}."
        )

    def _table(self, model: str, what: str) -> pd.DataFrame:
        rows = self._rows(model, what)
        if not rows:
            raise MissingInputError(f"{self.name}: {FILES[what]} of {model} has no rows.")
        return pd.DataFrame(rows)

    def _prompts(self, model: str) -> pd.DataFrame:
        table = self._table(model, "prompts")
        return table.assign(category=table.category.fillna("") if "category" in table else "")

    @staticmethod
    def _with_prompts(table: pd.DataFrame, prompts: pd.DataFrame) -> pd.DataFrame:
        return table.merge(prompts[["prompt_id", "prompt", "category"]], how="left", on="prompt_id")


def where(
    table: pd.DataFrame,
    *,
    search: str = "",
    score: tuple[float | None, float | None] | None = None,
    length: tuple[int | None, int | None] | None = None,
    category: str = "",
    prompt_id: str = "",
) -> pd.DataFrame:
    """The rows of a run's table that fit all that is given.

    `search` is words to find in any text, in either case; `score` and `length` (characters) are (lowest, highest), None
    for no end; `category` and `prompt_id` are whole names.
    """
    keep = pd.Series(True, index=table.index)
    if search:
        texts = table[[c for c in _TEXTS if c in table]].astype(str)
        keep &= texts.apply(lambda t: t.str.contains(search, case=False, regex=False)).any(axis=1)
    for name, limits, columns in (
        ("score", score, ("score", "chosen_score")),
        ("length", length, ("n_chars", "chosen_chars")),
    ):
        if limits is None:
            continue
        column = next((c for c in columns if c in table), None)
        if column is None or len(limits) != 2:
            raise ParamError(
                f"{name}={limits!r}: " + ("these rows have none." if column is None else "expected (lowest, highest).")
            )
        low, high = limits
        keep &= table[column].notna()
        keep &= True if low is None else table[column] >= low
        keep &= True if high is None else table[column] <= high
    for name, value in (("category", category), ("prompt_id", prompt_id)):
        if value and value not in set(table[name]):
            known = sorted(set(table[name]) - {""})
            raise ParamError(f"no row has the {name} {value!r}; there are {', '.join(known[:20]) or 'none'}.")
        keep &= table[name] == value if value else True
    return table[keep].reset_index(drop=True)


class Cards:
    """Prompts with replies beside each other: HTML in a notebook, plain text elsewhere.

    A card is {"title", "prompt", "replies": [{"label", "role", "text", "notes"}]}.
    """

    def __init__(self, cards: list[dict], n_found: int, unit: str):
        self.cards = cards
        self.note = f"{len(cards)} of {n_found} {unit}" + "; n=... shows more" * (n_found > len(cards))

    def __len__(self) -> int:
        return len(self.cards)

    def __repr__(self) -> str:
        parts = []
        for c in self.cards:
            parts.append(f"{printable(c['title'])}\n{_indented(c['prompt'])}")
            for r in c["replies"]:
                parts.append(f"[{printable(r['label'])}]\n{_indented(r['text'])}")
                parts += [f"    judged: {_indented(note).strip()}" for note in r["notes"]]
        return "\n\n".join([*parts, self.note])

    def _repr_html_(self) -> str:
        return cards_html(self.cards, self.note)


def cards_html(cards: list[dict], note: str = "") -> str:
    """Cards as HTML that brings no script, style sheet or request; every text is escaped."""
    return _template().render(cards=cards, note=note)


@lru_cache(maxsize=1)
def _template():
    env = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    env.filters["printable"] = printable
    return env.from_string((PACKAGE / "cards.html.jinja").read_text(encoding="utf-8"))


def _card(row, replies: list[dict], about: str, prompt_id: str = "") -> dict:
    title = " · ".join(x for x in (prompt_id or row.prompt_id, row.category, about) if x)
    return {"title": title, "prompt": row.prompt, "replies": replies}


def _reply(name: str, row, notes: list[str] = ()) -> dict:
    """A reply of a card from a row of `candidates` or `answers`."""
    row = dict(row)
    role, score = row.get("role", ""), row["score"]
    facts = [name, role, f"score {score:.2f}" if pd.notna(score) else "no score", f"{row['n_tokens']} tokens"]
    facts += [f"{row['n_chars']} characters", "" if row["ended"] else "cut off"]
    return {"label": " · ".join(f for f in facts if f), "role": role, "text": row["text"], "notes": list(notes)}


def _indented(text: str) -> str:
    lines = printable(text).split("\n")
    return "\n".join(textwrap.fill(x, 100, initial_indent="    ", subsequent_indent="    ") if x else "" for x in lines)


def _count(path: Path) -> int:
    return count_rows(path) if is_there(path) else 0
