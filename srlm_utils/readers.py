"""Blind readers of a sweep: whose answer each row goes to, by more of their votes.

`blind_reading.csv` beside a sweep's cells has one row per reader and pair of answers: seed, prompt_id, model, opponent,
reader and `preferred`, which is model, opponent or tie. Names are free: ``M3``, or ``M3 of random_pairs`` for that of
another variant.
"""

from pathlib import Path

import pandas as pd

from srlm_utils import metrics, report
from srlm_utils.errors import DataError

FILE = "blind_reading.csv"
COLUMNS = ["seed", "prompt_id", "model", "opponent", "reader", "preferred"]


def read(sweep: Path) -> pd.DataFrame:
    """Votes, a row each; empty where nobody has read.

    `DataError` for a column that is missing, an empty cell, a verdict that is none, a second verdict of a reader, and
    for two models that stand both ways round, whose votes would be counted apart.
    """
    path = sweep / FILE
    if not path.is_file():
        return pd.DataFrame(columns=COLUMNS)
    try:
        rows = pd.read_csv(path, dtype={"prompt_id": str, "reader": str})
    except (ValueError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: cannot be read as CSV ({e}).") from None
    missing = [c for c in COLUMNS if c not in rows]
    if missing:
        raise DataError(f"{path}: no column {missing[0]}; expected {', '.join(COLUMNS)}.")
    for column in COLUMNS:
        if len(empty := rows[rows[column].isna()]):
            raise DataError(f"{path}: row {empty.index[0] + 2} has no {column}, which every vote needs.")
    pairs = {*zip(rows.model, rows.opponent, strict=True)}
    if turned := sorted((a, b) for a, b in pairs if (b, a) in pairs):
        a, b = turned[0]
        raise DataError(f"{path}: {a} and {b} stand both ways round as model and opponent; write each pair one way.")
    bad = rows[~((rows.preferred == "tie") | (rows.preferred == rows.model) | (rows.preferred == rows.opponent))]
    if len(bad):
        r = bad.iloc[0]
        raise DataError(
            f"{path}: row {bad.index[0] + 2} prefers {r.preferred!r}, expected {r.model}, {r.opponent} or tie."
        )
    twice = rows[rows.duplicated(COLUMNS[:-1])]
    if len(twice):
        raise DataError(f"{path}: row {twice.index[0] + 2} is this reader's second verdict on one pair of answers.")
    return rows


def results(votes: pd.DataFrame) -> pd.DataFrame:
    """One row per pair of answers: model, opponent, seed, prompt_id, `result`.

    The result is 1 where model has more votes than opponent, 0.5 where it has as many, else 0.
    """
    for_model = (votes.preferred == votes.model).astype(int) - (votes.preferred == votes.opponent).astype(int)
    keys = ["model", "opponent", "seed", "prompt_id"]
    more = votes.assign(more=for_model).groupby(keys, sort=False).more.sum()
    return ((more > 0) + 0.5 * (more == 0)).rename("result").reset_index()


def table(votes: pd.DataFrame) -> pd.DataFrame:
    """One row per model and opponent: votes, and how often model is preferred (half ties), over prompts and seeds."""
    out = []
    for (model, opponent), rows in results(votes).groupby(["model", "opponent"], sort=False):
        grid = rows.pivot(index="seed", columns="prompt_id", values="result")
        num, den = grid.fillna(0).to_numpy(), grid.notna().to_numpy(float)
        # a prompt's rows of several seeds are one draw
        over_prompts = metrics.ratio(num.sum(0), den.sum(0)) | {"n": len(rows), "unit": "share"}
        over_seeds = metrics.ratio_over_seeds(num, den) | {"n": len(grid), "unit": "share"}
        out.append(
            {
                "compared": f"{model} with {opponent}",
                "more votes": f"{(rows.result == 1).sum()} to {(rows.result == 0).sum()}",
                "preferred, over prompts": report.rate(over_prompts),
                "over prompts and seeds": report.rate(over_seeds).replace("n=", "seeds: ") if len(grid) > 1 else "",
                "by seed": ", ".join(f"{s}: {100 * r:.0f} %" for s, r in rows.groupby("seed").result.mean().items()),
            }
        )
    return pd.DataFrame(out)
