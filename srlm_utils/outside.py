"""The outside judge: another base model, taught pairwise verdicts by data that no model of a run learns from.

A judge out of the run marks its own homework. This one is Gemma 3 270M, fine-tuned on `judge_train.jsonl` to say which
of two answers is better. It is made once, kept in the cache, and sits an exam of its own: how often it orders the
replies of the bundled ranked sets as they are ranked, and how often it simply takes the first. Those figures stand
beside every win rate that it decides.
"""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

from srlm_utils import seed_model, verdicts
from srlm_utils.artefacts import read_json, read_jsonl, write_json
from srlm_utils.metrics import ordered_pairs
from srlm_utils.paths import PROMPTS, SEED_DATA, cache_dir
from srlm_utils.plan import OUTSIDE

NAME = OUTSIDE
BASE = "gemma-3-270m"
LESSONS = SEED_DATA / "judge_train.jsonl"
EXAMS = ("onpolicy_eval", "ranked_eval")
RECIPE = {
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_layers": 0,
    "dropout": 0.0,
    "learning_rate": 3e-4,
    "final_learning_rate": 3e-5,
    "warmup_steps": 5,
    "weight_decay": 0.0,
    "epochs": 2,
    "train_batch_size": 16,
    "micro_batch_size": 8,
    "max_length": 510,  # Gemma's sliding window is 512: no token is out of sight
    "gradient_checkpointing": False,
    "save_steps": 20,
    "rank_weight": 0.0,
    "seed": 0,
}


def version() -> str:
    """12 digits that change with anything the judge is made from: base, lessons, question and recipe."""
    parts = [seed_model.EMBEDDED[BASE].gguf_sha256, LESSONS.read_text(), (PROMPTS / "pairwise.jinja").read_text()]
    return hashlib.sha256(json.dumps([*parts, RECIPE]).encode()).hexdigest()[:12]


def fetch(step) -> str:
    """Folder of the outside judge; made by `step`, with its device and dtype, if the cache does not hold it.

    An interrupted making continues from its last checkpoint.
    """

    def make(folder: Path) -> None:
        print("the outside judge is made once: about fifteen minutes on 2 CPU cores", flush=True)
        work = cache_dir() / "models" / f".{NAME}-{version()}.work"
        train_judge(step, seed_model.fetch(BASE)["path"], read_jsonl(LESSONS), work, folder)

    return str(seed_model.cached(NAME, version(), make))


def train_judge(step, base: str, ranked: list[dict], work: Path, folder: Path, **recipe) -> None:
    """Fine-tune `base` to answer `verdicts.question` about ranked replies in both orders; `folder` appears whole."""
    from srlm_utils import train

    p = SimpleNamespace(
        **{"device": step.params.device, "dtype": step.params.dtype, "report_to": "none"} | RECIPE | recipe
    )
    model, tokenizer = train.load(base, p)
    rows = lessons(tokenizer, ranked, p.max_length)
    trainer = train.sft_trainer(model, tokenizer, rows, p, work)
    train.train(trainer, step)
    card = (
        f"# Outside judge\n\nMade from {BASE} on {len(rows)} verdicts; it decides win rates and answers nothing else. "
        f"{seed_model.EMBEDDED[BASE].license} apply.\n\n```json\n{json.dumps(RECIPE | recipe, indent=1)}\n```\n"
    )
    train.save(trainer, tokenizer, folder, p, card)


def lessons(tokenizer, ranked: list[dict], max_length: int) -> list[dict]:
    """Rows for `train.sft_trainer`: every two replies of different rank, in both orders; the letter alone carries loss.

    Rows longer than `max_length` tokens are left out.
    """
    from srlm_utils import chat

    letters, rows = verdicts.choice_ids(tokenizer), []
    for _, prompt, better, worse in reply_pairs(ranked):
        for right, (first, second) in enumerate(((better, worse), (worse, better))):
            ids = chat.prompt_ids(tokenizer, chat.user(verdicts.question(prompt, first, second)))
            if len(ids) < max_length:
                rows.append(
                    {
                        "input_ids": [*ids, letters[right]],
                        "labels": [-100] * len(ids) + [letters[right]],
                        "kind": "verdict",
                    }
                )
    return rows


def reply_pairs(ranked: list[dict]):
    """(id, prompt, better text, worse text) of every two replies that people ranked apart."""
    for row in ranked:
        for i, j in ordered_pairs([r["rank"] for r in row["replies"]]):
            better, worse = row["replies"][i], row["replies"][j]
            yield (
                f"{row['prompt_id']}/{better['reply_id']}/{worse['reply_id']}",
                row["prompt"],
                better["text"],
                worse["text"],
            )


def exam(step, compare) -> dict[str, dict]:
    """The outside judge's exam on the bundled ranked sets, {set: figures} of `examine`; sat once, then cached.

    `compare` is `evaluate.pairwise_judge`'s.
    """
    path = cache_dir() / "models" / f"{NAME}-{version()}-exam.json"
    if not path.is_file():
        print("the outside judge sits its exam, once: about three minutes on 2 CPU cores", flush=True)
        sets = {name: read_jsonl(SEED_DATA / f"{name}.jsonl") for name in EXAMS}
        with step.progress(sum(2 for ranked in sets.values() for _ in reply_pairs(ranked)), "verdicts") as bar:
            write_json(path, {name: examine(compare, ranked, bar.update) for name, ranked in sets.items()})
    return read_json(path)


def examine(compare, ranked: list[dict], progress=lambda n: None) -> dict[str, dict]:
    """How a pairwise judge does on ranked replies: figures by name (`metrics.METRICS`).

    Both orders are asked and a disagreement is a tie, as in a win rate. n of the accuracy is pairs; intervals are
    over prompts.
    """
    prompts, better, worse = {}, {}, {}
    for key, prompt, good, bad in reply_pairs(ranked):
        prompts[key], better[key], worse[key] = prompt, good, bad
    rows = []
    for batch in compare(prompts, better, worse):
        rows += batch
        progress(len(batch))
    return verdicts.exam_figures(rows)
