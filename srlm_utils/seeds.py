"""Reading the seed of a run and keeping what is measured apart from what is learned."""

from srlm_utils.errors import DataError
from srlm_utils.plan import seed_path
from srlm_utils.rows import IftRow, PromptRow, RankedRow, load_rows
from srlm_utils.self_instruct import Pool

HELD_OUT = ("ranked_eval", "valid_prompts", "test_prompts")


def load_seeds(params: dict) -> dict[str, list[dict]]:
    """The five seed sets by name (`plan.SEED_FILES`), every row checked, cut to the parameters' counts.

    Ranked rows of several files stand one file after the other, each row with the file's name in `set`.
    """
    p = params
    return {
        "ift": load_rows(seed_path(p["ift_file"]), IftRow, p["n_ift"]),
        "ranked_train": _ranked(p["ranked_train_files"], p["n_ranked_train"]),
        "ranked_eval": _ranked(p["ranked_eval_files"], p["n_ranked_eval"]),
        "valid_prompts": load_rows(seed_path(p["valid_file"]), PromptRow, p["n_valid"]),
        "test_prompts": load_rows(seed_path(p["test_file"]), PromptRow, p["n_test"]),
    }


def _ranked(files: list[str], limit: int) -> list[dict]:
    rows, home = [], {}
    for path in map(seed_path, files):
        for row in load_rows(path, RankedRow, limit):
            if row["prompt_id"] in home:
                raise DataError(
                    f"{path}: prompt_id {row['prompt_id']} stands in {home[row['prompt_id']]} too. "
                    "Give each row of the ranked files an id of its own."
                )
            home[row["prompt_id"]] = path
            rows.append(row | {"set": path.stem})
    return rows


def drop_leaks(seeds: dict[str, list[dict]], rouge_l_max: float) -> tuple[dict[str, list[dict]], list[dict]]:
    """Training rows without those whose prompt also stands, nearly, in a held-out set.

    Checked by id and by ROUGE-L at or above `rouge_l_max`. Returns (seeds, drops), a drop being
    {"set", "prompt_id", "held_out", "why"}.
    """
    pool, ids = Pool(rouge_l_max), {}
    for name in HELD_OUT:
        for row in seeds[name]:
            pool.add(row["prompt"], f"{name}/{row['prompt_id']}")
            ids[row["prompt_id"]] = name
    out, drops = dict(seeds), []
    for name in ("ift", "ranked_train"):
        out[name] = []
        for row in seeds[name]:
            near = pool.nearest(row["prompt"])
            if row["prompt_id"] in ids:
                drops.append(
                    {"set": name, "prompt_id": row["prompt_id"], "held_out": ids[row["prompt_id"]], "why": "same id"}
                )
            elif near:
                drops.append(
                    {"set": name, "prompt_id": row["prompt_id"], "held_out": near[1], "why": f"ROUGE-L {near[0]:.2f}"}
                )
            else:
                out[name].append(row)
    return out, drops


def pairs_won_by_longer(ranked: list[dict]) -> tuple[float, int]:
    """(share of ordered reply pairs in which the better one is longer in characters, pairs)."""
    gaps = [
        len(a["text"]) - len(b["text"])
        for row in ranked
        for a in row["replies"]
        for b in row["replies"]
        if a["rank"] < b["rank"]
    ]
    return sum((g > 0) + 0.5 * (g == 0) for g in gaps) / len(gaps), len(gaps)
