"""SFT and DPO: the kit's trainers against trl's on the same rows with the same adapters."""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from benchmarks.measure import bundled, fraction, in_turn, ratio
from srlm_utils import eft, judge, train
from srlm_utils.devices import keep_memory, pick_device, pick_dtype
from srlm_utils.params import Experiment
from srlm_utils.paths import PROJ_ROOT
from srlm_utils.seed_model import fetch

N_PROMPTS, N_ANSWERS, N_PAIRS = 4, 8, 8


def _params(stage: str, model: str) -> SimpleNamespace:
    """The quickstart's parameters, one pass, nothing saved on the way."""
    flat = Experiment.load([PROJ_ROOT / "params" / "quickstart.yaml"]).flat(stage, model)
    return SimpleNamespace(**flat | {"epochs": 1, "save_steps": 0})


def _run(trainer) -> None:
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()


def _plain(folder: str, params):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, pick_dtype()))
    return model, train.lora_config(model, params)


def _trl_args(kind, **config):
    """trl's configuration for one pass over a few rows, nothing saved; the rest is trl's default or `config`."""
    return kind(
        output_dir=tempfile.mkdtemp(),
        num_train_epochs=1,
        use_cpu=pick_device() == "cpu",
        max_length=None,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **config,
    )


def _same() -> dict:
    """trl's settings that make it compute what the kit computes, in the same dtype."""
    return {"bf16": pick_dtype() == "bfloat16", "gradient_checkpointing": False}


def sft_cases(folder: str) -> tuple[dict, int]:
    """Judgements of a few prompts and some answers, as M1 learns them; (cases, tokens of the rows)."""
    p = _params("02_sft", "M1")
    _, tokenizer = train.load(folder, p)
    replies = [
        {"prompt_id": row["prompt_id"], "prompt": row["prompt"], "reply": r["text"]} | r
        for name in ("onpolicy_train", "ranked_train")
        for row in bundled(name)[: N_PROMPTS // 2]
        for r in row["replies"]
    ]
    texts = eft.training_rows(replies, judge.Rubric("short"), list(judge.FORMATS)) + bundled("ift")[:N_ANSWERS]
    rows, _ = train.sft_rows(tokenizer, texts, p.max_length)
    n_tokens = sum(len(r["input_ids"]) for r in rows)

    def kit(epochs: int = 1, keep: bool = True):
        model, _ = train.load(folder, p)
        passes = SimpleNamespace(**vars(p) | {"epochs": epochs})
        trainer = train.sft_trainer(model, tokenizer, rows, passes, Path(tempfile.mkdtemp()))
        trainer.kept = trainer.kept if keep else None
        _run(trainer)
        return epochs * n_tokens

    def trl(**config):
        model, lora = _plain(folder, p)
        data = Dataset.from_list(
            [{"input_ids": r["input_ids"], "completion_mask": [int(x != -100) for x in r["labels"]]} for r in rows]
        )
        args = _trl_args(SFTConfig, per_device_train_batch_size=8, completion_only_loss=True, **config)
        trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=lora)
        _run(trainer)
        return n_tokens

    cases = {
        "kit, SFT": kit,
        "trl, SFT": lambda: trl(**_same()),
        "trl's defaults, SFT": trl,
        "two passes, frozen layers' output kept": lambda: kit(2),
        "two passes, computed twice": lambda: kit(2, keep=False),
    }
    return cases, n_tokens


def dpo_cases(folder: str) -> tuple[dict, int]:
    """Best and worst sampled answers of the bundled seed as pairs; (cases, tokens of the rows)."""
    p = _params("07_dpo", "M2")
    _, tokenizer = train.load(folder, p)
    pairs = []
    for row in bundled("onpolicy_train")[:N_PAIRS]:
        best, *_, worst = sorted(row["replies"], key=lambda r: r["rank"])
        pairs.append(
            {"prompt": row["prompt"], "chosen": best["text"], "rejected": worst["text"]}
            | {"chosen_ended": True, "rejected_ended": True}
        )
    rows, _ = train.dpo_rows(tokenizer, pairs, p.max_length)
    n_tokens = sum(2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows)

    def kit():
        model, _ = train.load(folder, p)
        _run(train.dpo_trainer(model, tokenizer, rows, p, Path(tempfile.mkdtemp())))
        return n_tokens

    def trl(**config):
        model, lora = _plain(folder, p)
        accumulation = max(1, p.train_batch_size // p.micro_batch_size)
        sizes = {"per_device_train_batch_size": p.micro_batch_size, "gradient_accumulation_steps": accumulation}
        args = _trl_args(DPOConfig, **sizes, **config)
        data = Dataset.from_list(rows).remove_columns("id")
        # the same token ids: trl's own tokenisation takes no time worth measuring
        trainer = type("Tokenised", (DPOTrainer,), {"_prepare_dataset": lambda self, dataset, *a, **k: dataset})(
            model=model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=lora
        )
        _run(trainer)
        return n_tokens

    cases = {
        "kit, DPO": kit,
        "trl, DPO": lambda: trl(**_same()),
        "trl's defaults, DPO": trl,
    }
    return cases, n_tokens


def rows(limit: dict[str, float]) -> list[dict]:
    keep_memory()
    folder, out = fetch("smollm2-135m-instruct")["path"], []
    for name, make in (("sft", sft_cases), ("dpo", dpo_cases)):
        cases, n_tokens = make(folder)
        kit, trl, defaults, *two_passes = cases
        rates = in_turn(cases)
        median = sorted(rates[kit])[len(rates[kit]) // 2]
        # forward through all layers and back through half: 1.5 forward passes of every row in full
        more = {"unit": "tok/s", "n_tokens": n_tokens}
        more["of_limit"] = fraction(median, 134_500_000, 1.5, limit["matmul_gflops"])
        out.append(ratio(f"{name}_vs_trl", rates, kit, trl, 1.3, **more))
        out.append(ratio(f"{name}_vs_trl_defaults", rates, kit, defaults, None, **more))
        if two_passes:
            out.append(ratio("two_passes_kept_vs_computed", rates, *two_passes, None, unit="tok/s", n_tokens=n_tokens))
    return out
