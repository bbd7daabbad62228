"""Reading the seed of a run and keeping what is measured apart from what is learned."""

from srlm_utils.plan import SEED_FILES, external_inputs
from srlm_utils.rows import IftRow, PromptRow, RankedRow, load_rows
from srlm_utils.self_instruct import Pool

HELD_OUT = ("ranked_eval", "valid_prompts", "test_prompts")
_SHAPES = (IftRow, RankedRow, RankedRow, PromptRow, PromptRow)
_LIMITS = ("n_ift", "n_ranked_train", "n_ranked_eval", "n_valid", "n_test")


def load_seeds(params: dict) -> dict[str, list[dict]]:
    """The five seed files by name (`SEED_FILES`), every row checked, cut to the parameters' counts."""
    paths = external_inputs("01_seed_data", params).values()
    return {
        name: load_rows(path, shape, params[limit])
        for name, path, shape, limit in zip(SEED_FILES, paths, _SHAPES, _LIMITS, strict=True)
    }


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
