"""Reading the seed of a run and keeping what is measured apart from what is learned."""

import hashlib
import math
from collections import Counter
from pathlib import Path

from srlm_utils import metrics, sources
from srlm_utils.errors import DataError, ParamError
from srlm_utils.paths import is_hub_id, seed_path
from srlm_utils.rows import PromptRow, load_rows
from srlm_utils.self_instruct import Pool

HELD_OUT = ("ranked_eval", "valid_prompts", "test_prompts")


def load_seeds(params: dict) -> tuple[dict[str, list[dict]], dict[str, Counter]]:
    """The five seed sets by name (`plan.SEED_FILES`), every row checked, cut to the parameters' counts; and what was
    left out of each source, by reason.

    Ranked rows of several sources stand one source after the other, each row with the source's name in `set`. A source
    that is named for several sets is divided between them by prompt (`share`).
    """
    p = params
    names = {"ift": [p["ift_file"]]} | {name: p[f"{name}_files"] for name in ("ranked_train", "ranked_eval")}
    for name, of_use in names.items():
        if not of_use:
            raise ParamError(f"seed_data.{name}_files = []: expected one source of ranked replies or more.")
    drops: dict[str, Counter] = {}
    dealt: dict[str, dict[str, list[dict]]] = {}
    for name in dict.fromkeys(n for of_use in names.values() for n in of_use):
        drops[name] = Counter()
        dealt[name] = _deal(name, {use for use, of_use in names.items() if name in of_use}, p, drops[name])
    sets = {}
    for use, of_use in names.items():
        if clash := [n for n, count in Counter(map(set_name, of_use)).items() if count > 1]:
            raise ParamError(f"{use}_files: two sources are called {clash[0]}. Give one of the files another name.")
        sets[use], home = [], {}
        for name in of_use:
            for row in dealt[name][use]:
                if (pid := row["prompt_id"]) in home:
                    raise DataError(
                        f"{name}: prompt_id {pid} stands in {home[pid]} too. Give each row an id of its own."
                    )
                home[pid] = name
                sets[use].append(row if use == "ift" else row | {"set": set_name(name)})
        if not sets[use]:
            raise DataError(f"{use}: no rows are left of {', '.join(of_use)} ({_reasons(drops)}).")
    return sets | {
        "valid_prompts": load_rows(seed_path(p["valid_file"]), PromptRow, p["n_valid"]),
        "test_prompts": load_rows(seed_path(p["test_file"]), PromptRow, p["n_test"]),
    }, drops


def _deal(name: str, uses: set[str], p: dict, drops: Counter) -> dict[str, list[dict]]:
    """The rows of one source by use, at most as many as the parameters say. It is read once, no further than that."""
    of_kind, out = sources.kind_of(name), {use: [] for use in uses}
    own = of_kind in ("ift", "ranked")
    if of_kind == "ift" and uses != {"ift"}:
        raise DataError(f"{name}: holds answers (prompt, response); expected ranked replies for {sorted(uses)[-1]}.")
    for row in sources.kit_rows(name, of_kind) if own else sources.conversations(name, drops, language=p["language"]):
        use = next(iter(uses)) if len(uses) == 1 else share(row, uses, p["ift_share"], p["eval_share"])
        best_is_gone = row.pop("best_is_gone", False)
        if use != "ift" and not own and not sources.can_rank(row):
            drops[sources.NOTHING_TO_RANK] += 1
        elif use == "ift" and best_is_gone:  # what is left is no answer to learn, though it may be ranked
            drops[sources.BEST_IS_GONE] += 1
        elif not p[f"n_{use}"] or len(out[use]) < p[f"n_{use}"]:
            out[use].append(sources.best(row) if use == "ift" and of_kind != "ift" else row)
        elif all(p[f"n_{u}"] and len(out[u]) >= p[f"n_{u}"] for u in uses):
            break
    return out


def share(row: dict, uses: set[str], ift_share: float, eval_share: float) -> str:
    """Which of `uses` ("ift", "ranked_train", "ranked_eval") a prompt of one source is for.

    The same for a prompt in every run and with every seed, so that no exam of one run is taught in another.
    `eval_share` of the prompts with ranked replies are for ranked_eval, and of the others `ift_share` for
    ift. A prompt with nothing to rank is for ift, where that is among the uses.
    """
    if "ift" in uses and not sources.can_rank(row):
        return "ift"
    digest = hashlib.sha256(" ".join(row["prompt"].lower().split()).encode()).digest()
    at, rest = int.from_bytes(digest[:8]) / 2**64, sorted(uses - {"ranked_eval"})  # ift before ranked_train
    if "ranked_eval" in uses:
        if at < eval_share:
            return "ranked_eval"
        at = (at - eval_share) / (1 - eval_share)
    return rest[0] if len(rest) == 1 or at < ift_share else rest[1]


def set_name(source: str) -> str:
    """What figures call a source: its file's name without what says how it is stored."""
    name = source.partition(":")[0] if is_hub_id(source) else source
    return Path(name).name.removesuffix(".gz").removesuffix(".jsonl")


def _reasons(drops: dict[str, Counter]) -> str:
    found = [f"{n} x {why}" for of_source in drops.values() for why, n in of_source.items()]
    return "left out: " + ", ".join(found) if found else "none was left out"


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
        if not out[name]:
            raise DataError(f"{name}: every prompt also stands, nearly, in a held-out set; the first: {drops[-1]}.")
    return out, drops


def pairs_won_by_longer(ranked: list[dict]) -> tuple[float, int]:
    """(share of ordered reply pairs in which the better one is longer in characters, pairs); NaN where none is."""
    rows = [
        {"ranks": [r["rank"] for r in row["replies"]], "scores": [len(r["text"]) for r in row["replies"]]}
        for row in ranked
    ]
    n = sum(len(metrics.ordered_pairs(row["ranks"])) for row in rows)
    return (sum(map(metrics.credit, rows)) / n if n else math.nan), n
