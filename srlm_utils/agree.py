"""``srlm agree``: how well one model judges, on any ranked set, without a run."""

import itertools
import json
import sys
from collections import Counter
from pathlib import Path

from srlm_utils import evaluate, judge, metrics, rankings, seed_model, seeds, sources
from srlm_utils.artefacts import is_there
from srlm_utils.errors import DataError, ParamError

SAMPLING = {
    "n_samples": 3,
    "temperature": 0.7,
    "top_p": 0.9,
    "max_new_tokens": 256,
    "seed": 0,
}  # the paper's judgements
MAX_RESPONSE_TOKENS = 1024


def ranked_rows(source: str, *, language: str = "en", all_turns: bool = False, limit: int = 0):
    """(ranked rows of a source, its kind, what was left out by reason). Raises `DataError` if nothing is left."""
    drops: Counter = Counter()
    of_kind = sources.kind_of(source)
    if of_kind in ("ranked", "ift"):
        rows = iter(sources.kit_rows(source, "ranked"))
    else:
        rows = sources.conversations(source, drops, language=language, all_turns=all_turns)
        rows = sources.ranked(rows, drops)
    found = list(itertools.islice(rows, limit or None))
    if not found:
        raise DataError(f"{source}: no prompt with ranked replies is left ({dict(drops)}).")
    return found, of_kind, drops


def engine_of(model: str):
    """An engine of an embedded model, a hub id, a folder of weights, or a run's pointer at its seed model (``M0``)."""
    from srlm_utils.engine import Engine

    pointer = Path(model) / "model.json"
    if pointer.is_file():
        info = seed_model.read_pointer(pointer)
        return Engine(info["path"], chat_template=info["chat_template"])
    if model not in (*seed_model.EMBEDDED, seed_model.TINY) and Path(model).is_dir():
        model = str(Path(model).resolve())  # as every path of a command line, from where one stands
    return Engine(seed_model.fetch(model)["path"])


def scores_of(model: str, rubric: judge.Rubric, rows: list[dict], mode: str) -> list[dict]:
    """Judgement rows of all replies; progress goes to stderr."""
    from tqdm import tqdm

    items, judged = rankings.items(rows), []
    batches = judge.scores(engine_of(model), rubric, items, mode, max_response_tokens=MAX_RESPONSE_TOKENS, **SAMPLING)
    with tqdm(total=len(items), unit=" judgements", file=sys.stderr, desc=Path(model).name) as bar:
        for batch in batches:
            judged += batch
            bar.update(len(batch))
    return judged


def report(args) -> str:
    """The command's output: a table, or one JSON object."""
    if args.limit < 0:
        raise ParamError(f"--limit {args.limit}: expected the number of prompts to use, or 0 for all.")
    rubric = judge.Rubric(args.rubric)
    # as every path of a command line, from where one stands
    source = str(Path(args.ranked).resolve()) if is_there(Path(args.ranked)) else args.ranked
    rows, of_kind, drops = ranked_rows(source, language=args.language, all_turns=args.all_turns, limit=args.limit)
    name = seeds.set_name(source)
    judged = scores_of(args.model, rubric, rows, args.mode)
    figures = _figures(evaluate.agreement_rows(args.model, rows, judged, args.mode, name))
    if args.against:
        theirs = scores_of(args.against, rubric, rows, args.mode)
        gain = evaluate.gain_rows(args.model, args.against, rows, judged, theirs, args.mode, name)
        figures |= _figures(gain)
    about = {"model": args.model} | ({"against": args.against} if args.against else {})
    about |= {"ranked": args.ranked, "judge_mode": args.mode}
    if of_kind in ("tree", "message"):
        about["turns"] = "all" if args.all_turns else "first"
    about |= {"rubric": args.rubric, "n_prompts": len(rows), "n_replies": len(judged)}
    about |= {"n_cut": sum(r["cut"] for r in judged), "left_out": dict(drops)}
    if args.json:
        return json.dumps(about | figures)
    lines = [f"{key:<28}{value}" for key, value in about.items() if value != {}]
    lines += ["", f"{'':<28}{'value':>8}  {'95 % interval':<16}{'n':>6}"]
    for metric, f in figures.items():
        value, low, high = ("" if f[k] is None else f"{f[k]:.3f}" for k in ("value", "low", "high"))
        interval = f"{low} to {high}" if low else ""
        lines.append(f"{metric:<28}{value:>8}  {interval:<16}{f['n']:>6}  {metrics.METRICS[metric][1]}")
    return "\n".join(lines)


def _figures(rows: list[dict]) -> dict[str, dict]:
    return {r["metric"]: {k: r[k] for k in ("value", "low", "high", "n")} for r in rows}
