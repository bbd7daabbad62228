"""Head-to-head verdicts between two models' answers: by a judge that compares, by one that scores, by people."""

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from srlm_utils import chat
from srlm_utils.artefacts import read_jsonl
from srlm_utils.errors import DataError, ModelError, cut
from srlm_utils.judge import escape_tags, load_template
from srlm_utils.lineage import OUTSIDE, is_model_name
from srlm_utils.paths import PROMPTS


def judge_label(judge: str, mode: str = "") -> str:
    """How a figure names a win judge: a model of the run is inside the loop that is being measured."""
    if judge == OUTSIDE:
        return "outside judge"
    if mode == "human":
        return f"people ({Path(judge).name})"
    where = ""
    if is_model_name(judge):
        where = " (the models descend from it)" if judge in ("M0", "SFT") else " (inside the loop)"
    return f"{judge}{', ' + mode if mode else ''}{where}"


def choice_ids(tokenizer) -> list[int]:
    """Token ids of the two answers A and B."""
    ids = [chat.answer_ids(tokenizer, letter, ended=False) for letter in "AB"]
    if any(len(i) != 1 for i in ids) or ids[0] == ids[1]:
        raise ModelError("this judge's tokenizer does not write A and B as one token each; use <model>:score.")
    return [i[0] for i in ids]


@lru_cache(maxsize=1)
def _template():
    return load_template(PROMPTS / "pairwise.jinja")


def question(prompt: str, first: str, second: str) -> str:
    """What a pairwise judge is asked; tags in any of the three are escaped."""
    return _template().render(prompt=escape_tags(prompt), first=escape_tags(first), second=escape_tags(second))


def questions(prompts: dict[str, str], a: dict[str, str], b: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(``<prompt_id>\\t<order>``, the judge's prompt) of both orders; answers by prompt_id."""
    for pid in a:
        for order, first, second in (("AB", a[pid], b[pid]), ("BA", b[pid], a[pid])):
            yield f"{pid}\t{order}", question(prompts[pid], first, second)


def compare(engine, prompts: dict[str, str], a: dict[str, str], b: dict[str, str]) -> Iterator[list[dict]]:
    """Ask in both orders which of two answers is better; answers by prompt_id.

    The choice is read from the probabilities of the letters, so that a small judge still says
    something. Yields rows {"prompt_id", "order" ("AB", "BA"), "p_first" (0 to 1)}.
    """
    requests = [(key, chat.prompt_ids(engine.tokenizer, chat.user(text))) for key, text in questions(prompts, a, b)]
    for batch in engine.choice_probs(requests, choice_ids(engine.tokenizer)):
        yield [
            {"prompt_id": key.split("\t")[0], "order": key.split("\t")[1], "p_first": round(p[0], 6)}
            for key, p, _ in batch
        ]


def from_scores(a: dict[str, float], b: dict[str, float], same: set[str]) -> list[dict]:
    """Verdicts of a judge that scores each answer alone: the higher score wins, equal scores tie.

    `same` are the prompts to which both answers are one text. They tie, too: a text's score changes a little with the
    batch that it is scored in.
    """
    gaps = {pid: 0.0 if pid in same else a[pid] - b[pid] for pid in a}
    return [
        {"prompt_id": pid, "order": "none", "p_first": 1.0 if gap > 0 else 0.0 if gap < 0 else 0.5}
        for pid, gap in gaps.items()
    ]


def read_votes(path: Path) -> list[dict]:
    """People's verdict rows; raises `DataError` for a row that is none.

    Row: {"prompt_id", "model_a", "model_b", "order" ("AB", "BA": which answer was shown first; "none" where neither
    was, and A counts as the first), "p_first" (1 the first wins, 0.5 tie, 0 the second), "judge" (who)}: what a model
    judge writes, too.
    """
    rows = read_jsonl(path)
    for i, row in enumerate(rows, 1):
        if wrong := _wrong_with(row):
            raise DataError(f"{path}: row {i} is no verdict: {wrong}.")
    return rows


def _wrong_with(row: dict) -> str:
    if missing := sorted({"prompt_id", "model_a", "model_b", "order", "p_first"} - row.keys()):
        return f"it has no {missing[0]}"
    for name in ("prompt_id", "model_a", "model_b"):
        if not isinstance(row[name], str):  # a number names no prompt of any run: its votes would be lost
            return f"{name} is {cut(row[name])}, expected a text"
    if row["order"] not in ("AB", "BA", "none"):
        return f"order is {cut(row['order'])}, expected AB, BA or none"
    if row["p_first"] not in (0, 0.5, 1):
        return f"p_first is {cut(row['p_first'])}, expected 1 (first wins), 0.5 (tie) or 0"
    return ""


def answers_digest(a: str, b: str) -> str:
    """12 digits that say which two texts a verdict is about, whichever stands first."""
    return hashlib.sha256(json.dumps(sorted([a, b])).encode()).hexdigest()[:12]


def check_answers(votes: list[dict], model: str, opponent: str, ours: dict, theirs: dict, source: str) -> None:
    """`DataError` where votes on two models (`read_votes`) say that they are about other texts than these, by
    prompt_id. Votes that do not say (no "answers") are taken as they are."""
    for row in votes:
        pid = row["prompt_id"]
        if {row["model_a"], row["model_b"]} != {model, opponent} or pid not in ours or pid not in theirs:
            continue
        digest = answers_digest(ours[pid], theirs[pid])
        if row.get("answers", digest) != digest:
            raise DataError(
                f"{source} has verdicts on other answers of {model} and {opponent} than this run's ({pid}). "
                "Give these answers a labels file of their own."
            )


def from_votes(votes: list[dict], model: str, opponent: str, prompt_ids) -> list[dict]:
    """Verdicts of people (`read_votes`) on `model` against `opponent`, one row per prompt: the majority of its readers.

    The two models may stand in either place; without a majority it is a tie. (`readers.results` gives a pair to whoever
    has more votes: a tie of one reader leaves it to the others there.)
    """
    sides: dict[str, list[float]] = {}
    for row in votes:
        if {row["model_a"], row["model_b"]} == {model, opponent} and row["prompt_id"] in prompt_ids:
            a = 1 - row["p_first"] if row["order"] == "BA" else row["p_first"]
            sides.setdefault(row["prompt_id"], []).append(a if row["model_a"] == model else 1 - a)
    return [
        {
            "prompt_id": pid,
            "order": "none",
            "p_first": next((side for side in (1.0, 0.0) if 2 * s.count(side) > len(s)), 0.5),
        }
        for pid, s in sides.items()
    ]
