"""The outside judge: another base model, taught to score by data that no model of a run learns from.

A judge out of the run marks its own homework. This one is Gemma 3 270M, fine-tuned on `judge_train.jsonl` (written
replies) and `judge_onpolicy.jsonl` (answers of the embedded seed model) to give each the score and the order that a
reader gave it. It scores answers one by one, so none stands first. It is made once, kept in the cache, and sits an
exam: how often it orders the replies of the bundled ranked sets as they are ranked. Those figures stand beside every
win rate that it decides. Asked for verdicts on two answers at once, a model of this size takes the first one, whatever
it is taught (LOG.md).
"""

import gc
import hashlib
import inspect
import json
import random
from pathlib import Path
from types import SimpleNamespace

from srlm_utils import eft, judge, metrics, rankings, seed_model
from srlm_utils.artefacts import read_json, read_jsonl, write_json
from srlm_utils.lineage import OUTSIDE
from srlm_utils.paths import PROMPTS, SEED_DATA, cache_dir, seed_path
from srlm_utils.plan import OUTSIDE_LESSONS

BASE = "gemma-3-270m"
RUBRIC = "short"
LESSONS = [seed_path(name) for name in OUTSIDE_LESSONS]
EXAMS = ("onpolicy_eval", "ranked_eval")
MAX_RESPONSE_TOKENS = 320  # of an exam's reply, as in the quickstart
RECIPE = {
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_layers": 0,
    "dropout": 0.0,
    "learning_rate": 5e-4,
    "final_learning_rate": 5e-5,
    "warmup_steps": 5,
    "weight_decay": 0.0,
    "epochs": 3,
    "train_batch_size": 8,
    "micro_batch_size": 8,
    "max_length": 510,  # Gemma's sliding window is 512: no token is out of sight
    "gradient_checkpointing": False,
    "save_steps": 20,
    "report_to": "none",
    "rank_weight": 4.0,
    "seed": 0,
}


def version() -> str:
    """12 digits that change with anything the judge is made from: base, lessons, question and recipe."""
    parts = [seed_model.EMBEDDED[BASE].gguf_sha256, (PROMPTS / f"{RUBRIC}.jinja").read_text()]
    parts += [*(path.read_text(encoding="utf-8") for path in LESSONS), inspect.getsource(coarsened)]
    return hashlib.sha256(json.dumps([*parts, RECIPE]).encode()).hexdigest()[:12]


def rubric() -> judge.Rubric:
    """The question that it was taught, whatever the run asks its own judges."""
    return judge.Rubric(RUBRIC)


def fetch(step) -> str:
    """Folder of the outside judge; made by `step`, with its device and dtype, if the cache does not hold it.

    An interrupted making continues from its last checkpoint. It needs the card: the step's servers end, and come back
    when they are asked again.
    """

    def make(folder: Path) -> None:
        import torch

        step.release()
        print("the outside judge is made once: on a CPU from several minutes to most of an hour", flush=True)
        work = cache_dir() / "models" / f".{OUTSIDE}-{version()}.work"
        ranked = [row for path in LESSONS for row in read_jsonl(path)]
        train_judge(step, seed_model.fetch(BASE)["path"], ranked, work, folder)
        gc.collect()  # trainer and model hold each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    return str(seed_model.cached(OUTSIDE, version(), make))


def train_judge(step, base: str, ranked: list[dict], work: Path, folder: Path, **recipe) -> None:
    """Fine-tune `base` to score ranked replies (`train.supervised_losses`); `folder` appears whole."""
    from srlm_utils import train

    dtype = step.params.dtype if step.params.dtype != "float16" else "auto"  # which a step may write in, not train
    p = SimpleNamespace(**{"device": step.params.device, "dtype": dtype, "ift_epochs": 0} | RECIPE | recipe)
    model, tokenizer = train.load(base, p)
    rows = lessons(tokenizer, coarsened(ranked, p.seed), p.max_length)
    trainer = train.sft_trainer(model, tokenizer, rows, p, work)
    train.train(trainer, step)
    card = (
        f"# Outside judge\n\nMade from {BASE} on {len(rows)} scored replies; it decides win rates and answers nothing "
        f"else. {seed_model.EMBEDDED[BASE].license} apply.\n\n```json\n{json.dumps(RECIPE | recipe, indent=1)}\n```\n"
    )
    train.save(trainer.accelerator.unwrap_model(trainer.model), tokenizer, folder, p, card=card)


def coarsened(ranked: list[dict], seed: int) -> list[dict]:
    """Each prompt whose best reply is good (a score of 4 or 5) with two more replies, plainly worse than its own and
    ranked behind them: coarse lessons before fine ones. Two of four kinds, by a seeded draw: a reply to another prompt
    and the prompt itself (score 0), the best reply ending in a loop and the best reply broken off (score 1)."""
    rng, out = random.Random(seed), []
    for row in ranked:
        best = min(row["replies"], key=lambda r: r["rank"])
        if best["score"] < 4:  # most of the sampled ones are as bad as what would be made of them
            out.append(row)
            continue
        good = best["text"]
        other = rng.choice([r for r in ranked if r is not row] or [row])
        loop = rng.choice([s for s in good.replace("\n", " ").split(". ") if s])
        made = [
            ("off", rng.choice(other["replies"])["text"], 0),
            ("loop", " ".join([good[: len(good) // 2], *[loop + "."] * rng.randint(4, 8)]), 1),
            ("cut", good[: max(8, int(len(good) * rng.uniform(0.15, 0.5)))], 1),
            ("echo", row["prompt"], 0),
        ]
        rng.shuffle(made)
        worst = max(r["rank"] for r in row["replies"])
        more = [{"reply_id": k, "text": t, "rank": worst + 2 - score, "score": score} for k, t, score in made[:2]]
        out.append(row | {"replies": [*row["replies"], *more]})
    return out


def lessons(tokenizer, ranked: list[dict], max_length: int) -> list[dict]:
    """Rows for `train.sft_trainer`: each reply behind the rubric; the digit of its score alone carries loss.

    Rows longer than `max_length` tokens are left out.
    """
    from srlm_utils import train

    replies = [row | {"replies": [{"justification": ""} | r for r in row["replies"]]} for row in ranked]
    rows = eft.training_rows(eft.from_scored(replies), rubric(), ["score_first"])
    return train.sft_rows(tokenizer, rows, max_length)[0]


def exam(step, engine) -> dict[str, dict]:
    """The outside judge's exam on the bundled ranked sets, {set: figures} of `examine`; sat once, then cached."""
    asked = [*((SEED_DATA / f"{name}.jsonl").read_text(encoding="utf-8") for name in EXAMS), MAX_RESPONSE_TOKENS]
    of_exam = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]
    path = cache_dir() / "models" / f"{OUTSIDE}-{step.model_revision(OUTSIDE)}-exam-{of_exam}.json"
    if not path.is_file():
        print("the outside judge sits its exam, once: some minutes on a CPU", flush=True)
        sets = {name: read_jsonl(SEED_DATA / f"{name}.jsonl") for name in EXAMS}
        with step.progress(sum(len(r["replies"]) for ranked in sets.values() for r in ranked), "scores") as bar:
            write_json(path, {name: examine(engine, ranked, bar.update) for name, ranked in sets.items()})
    return read_json(path)


def examine(engine, ranked: list[dict], progress=lambda n: None) -> dict[str, dict]:
    """How a scoring judge orders ranked replies: figures by name (`metrics.METRICS`); n is pairs."""
    judged, items = [], rankings.items(ranked)
    for batch in judge.expected_scores(engine, rubric(), items, max_response_tokens=MAX_RESPONSE_TOKENS):
        judged += batch
        progress(len(batch))
    figures = metrics.agreement(rankings.scored_prompts(ranked, judged))
    names = {
        "exam_accuracy": "pairwise_accuracy_half_ties",
        "exam_tie_rate": "tie_rate",
        "exam_longer": "longer_baseline",
    }
    return {name: figures[source] for name, source in names.items()}
