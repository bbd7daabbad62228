"""Supervised fine-tuning and DPO on trl's trainers, with the kit's own tokenisation and batch order.

Rows are tokenised here, by the functions that sampling and judging use, and given to trl as token ids.
What is trained on is the text that was sampled, tokenised again: without the blanks at its ends or a
character that the budget cut in two (`chat.decode`), and now and then in other tokens than it was
written in. Only the assistant's tokens carry loss.
"""

import contextlib
import copy
import importlib.util
import json
import math
import os
import random
import warnings
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import torch
from datasets import Dataset
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
from transformers.pytorch_utils import Conv1D
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from srlm_utils import (
    attention,
    chat,
    context,
    frozen,
    judge,
    packing,
    ranks,
    tracking,
    training_params,
    vocabulary,
)
from srlm_utils.artefacts import CARD, new_folder, write_text
from srlm_utils.devices import keep_memory, pick_device, pick_dtype
from srlm_utils.errors import DataError, ModelError, ParamError, ResourceError, StepFailed, first_line
from srlm_utils.pair_forward import share_prompts
from srlm_utils.resources import check_weights, out_of_memory, too_large

# trl 1.16 sets this itself, whatever is passed
warnings.filterwarnings("ignore", message=".*gradient_checkpointing. is deprecated", category=FutureWarning)


def load(
    folder: str,
    params,
    *,
    chat_template: str = "",
    trust_remote_code: bool = False,
    four_bit: bool = False,
    place: bool = True,
):
    """(model, tokenizer) to train. LoRA keeps the base in `params.dtype`; full training uses float32
    weights, since bfloat16 weights would round small updates away.

    `four_bit` is QLoRA: the base in 4 bits (NF4, its constants quantised too). Raises `ParamError` without CUDA.
    `place` False leaves the model where it was loaded, for what shards it.
    Raises `ParamError` before anything is loaded where rows might be longer than the model's context.
    """
    if 0 < (most := context.of_folder(folder)) < params.max_length:
        raise ParamError(f"max_length = {params.max_length}: this model attends to {most} tokens; lower it to that.")
    tokenizer = chat.load_tokenizer(folder, chat_template=chat_template, trust_remote_code=trust_remote_code)
    device = pick_device(params.device)
    if device == "cpu":
        keep_memory()
    dtype = getattr(torch, pick_dtype(params.dtype, device)) if params.lora_r else torch.float32
    check_weights(folder)
    how = {"quantization_config": _four_bit(params, dtype)} if four_bit else {}
    if four_bit:
        place, how["device_map"] = False, {"": torch.cuda.current_device()}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code, **how
        )
        model = model.to(device) if place else model
    except (OSError, ValueError) as e:
        raise ModelError(f"{folder}: the model could not be loaded ({first_line(e)}).") from e
    except (RuntimeError, MemoryError) as e:
        raise (too_large(folder) if out_of_memory(e) else e) from None
    attention.use(model)
    if not params.lora_r:
        _drop_attention(model, params.dropout)
    return model, tokenizer


def _drop_attention(model, dropout: float) -> None:
    """Have attention drop this share of its weights in training, whatever the model's config says.

    Its layers copied the config when they were built. The config itself is saved, and later trainings would drop too.
    """
    for module in model.modules():
        own = getattr(module, "attention_dropout", None)
        if isinstance(own, torch.nn.Dropout):
            own.p = dropout
        elif isinstance(own, int | float):
            module.attention_dropout = dropout


def _four_bit(params, dtype: torch.dtype) -> BitsAndBytesConfig:
    """How the base is quantised (Dettmers et al. 2023). Stored in the type it computes in: FSDP shards no other."""
    if pick_device(params.device) == "cpu":
        raise ParamError("load_in_4bit = True needs a CUDA GPU; load_in_4bit: false trains the same adapters without.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ParamError(
            "load_in_4bit = True: the package bitsandbytes is not installed. .venv/bin/pip install -c constraints.txt "
            "-e '.[qlora]' brings it."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


# ---- rows -> token ids


def sft_rows(tokenizer, rows: list[dict], max_length: int) -> tuple[list[dict], int]:
    """({"input_ids", "labels", "kind", "id"} rows, number dropped for being longer than `max_length`).

    `rows` hold prompt and response; kind is the EFT format, or "ift". Labels are -100 on the prompt. Of a
    score-first judgement the digit alone carries loss: "Score: " is put in the judge's mouth when its
    expected score is read, and so it is here. EFT rows keep their `group`; score-first ones their `rank`.
    Raises `DataError` for a score-first row without a rank, and `ModelError` for one where the tokenizer does not
    write a score as one token.
    """
    out = []
    if unranked := next((r for r in rows if r.get("format") == "score_first" and "rank" not in r), None):
        raise DataError(
            f"SFT/eft/train.jsonl: row {unranked['prompt_id']} has no rank: it was made by an older version. Make it "
            "again: srlm run ... --from 03_build_eft@SFT --force."
        )
    scored = any(r.get("format") == "score_first" for r in rows)
    start, digits = judge.score_tokens(tokenizer) if scored else ([], [])
    for r in rows:
        prompt = chat.prompt_ids(tokenizer, chat.user(r["prompt"]))
        kept = {"kind": r.get("format", "ift"), "id": r.get("prompt_id", "?")} | (
            {"group": r["group"]} if "group" in r else {}
        )
        if kept["kind"] == "score_first":
            prompt, answer = prompt + start, [digits[r["score"]]]
            kept["rank"] = r["rank"]
        else:
            answer = chat.answer_ids(tokenizer, r["response"])
        if len(prompt) + len(answer) <= max_length:
            out.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer} | kept)
    return out, len(rows) - len(out)


def dpo_rows(tokenizer, pairs: list[dict], max_length: int) -> tuple[list[dict], int]:
    """({"prompt_ids", "chosen_ids", "rejected_ids", "id"} rows, number dropped for length).

    An answer that was cut off by its token budget gets no end-of-turn token: it never wrote one.
    """
    out = []
    for p in pairs:
        prompt = chat.prompt_ids(tokenizer, chat.user(p["prompt"]))
        chosen, rejected = (chat.answer_ids(tokenizer, p[s], ended=p[f"{s}_ended"]) for s in ("chosen", "rejected"))
        if len(prompt) + max(len(chosen), len(rejected)) <= max_length:
            row = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
            out.append(row | {"id": p.get("prompt_id", "?")})
    return out, len(pairs) - len(out)


def batch_order(lengths: list[int], batch_size: int, epochs: int, seed: int) -> list[int]:
    """Row indices for `epochs` passes, in shuffled batches of rows of similar length.

    Every row comes once an epoch.
    """
    order, n = [], len(lengths)
    for epoch in range(epochs):
        rng = random.Random(f"{seed}:{epoch}")
        batches = packing.length_batches(range(n), lengths, [1] * n, batch_size, rng)
        rng.shuffle(batches)
        # a short batch anywhere but at a pass's end would shift every batch of the pass behind it
        batches.sort(key=lambda b: len(b) < batch_size)
        order += [i for b in batches for i in b]
    return order


# ---- trainers


def as_it_comes(trainer, on: bool = True) -> None:
    """Have adapters take their input as it is, where autocast rounds it to bfloat16 anyway.

    peft turns it into float32 first, as their weights are: two copies of each input for the same bits. (Behind
    dropout they stay.) Without autocast the conversion is needed, and `on` False brings it back. FSDP has adapters of
    its own dtype and no autocast.
    """
    if getattr(trainer.accelerator.state, "fsdp_plugin", None) or not trainer.accelerator.native_amp:
        return
    for module in trainer.model.modules():
        if hasattr(module, "lora_dropout") and all(type(d) is torch.nn.Identity for d in module.lora_dropout.values()):
            module.cast_input_dtype_enabled = not on


def learn_in_float32(model) -> None:
    """Give the adapters of a model in 4 bits the dtype that all others have.

    trl turns them into bfloat16, where most small updates round away, and AdamW's averages would follow. No optimizer
    may know them yet.
    """
    if getattr(model, "is_loaded_in_4bit", False):
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.float()


def base_of(model):
    """The transformers model itself; adapters, if there are any, are in its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def require_rows(rows: list[dict], params) -> None:
    """Raise `DataError` where there is nothing to learn from."""
    if not rows:
        raise DataError(
            f"no row is left to learn from: none came, or all are longer than max_length = {params.max_length} tokens."
        )


def less_memory(params, least: int, longest: int) -> str:
    """What to lower where memory ran out on rows of at most `longest` tokens; `least` rows a micro-batch must hold.

    It is not lowered unasked, as it is in sampling: the loss of a micro-batch is a mean over its tokens, and over the
    pairs of replies that it holds for the ranking loss, so smaller ones would train another model.
    """
    micro, _ = training_params.batch_sizes(vars(params))
    smaller = next((m for m in range(micro // 2, least - 1, -1) if not params.train_batch_size % m), 0)
    ways = [f"lower micro_batch_size from {micro} to {smaller}"] if smaller else []
    ways.append(f"lower max_length from {params.max_length} to {longest * 3 // 4}, which drops longer rows")
    if not params.gradient_checkpointing:
        ways.append("set gradient_checkpointing to true")
    return "; or ".join(ways)


def is_sharded() -> bool:
    """Whether the accelerate config that launched this process divides weights among processes by FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def common_args(params, work: Path, *, per_device: int, accumulation: int, n_items: int, world: int = 1) -> dict:
    """`accumulation` counts the micro-batches of a step on all `world` processes."""
    device = pick_device(params.device)
    steps = math.ceil(n_items / (per_device * accumulation))
    return dict(
        output_dir=str(work / "checkpoints"),
        num_train_epochs=1,  # the batch order holds all epochs
        train_sampling_strategy="sequential",
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation // world,
        average_tokens_across_devices=False,  # see `ranks`
        learning_rate=params.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": min(params.final_learning_rate, params.learning_rate)},
        warmup_steps=min(params.warmup_steps, max(steps - 1, 0)),
        weight_decay=params.weight_decay,
        max_length=None,  # longer rows were dropped and counted
        gradient_checkpointing=params.gradient_checkpointing,
        use_cpu=device == "cpu",
        bf16=pick_dtype(params.dtype, device) == "bfloat16",
        save_strategy="steps" if params.save_steps else "no",
        save_steps=params.save_steps or 500,
        save_total_limit=1,
        logging_steps=1,
        logging_nan_inf_filter=False,  # or a loss that is no number would be logged as the mean of those before it
        # else each card keeps whole gradients, in float32, from a step's first micro-batch to its last
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": True}} if is_sharded() else None,
        **tracking.arguments(params, work),
        disable_tqdm=True,
        seed=params.seed,
        data_seed=params.seed,
    )


def _one_device(args) -> None:
    """Keep Trainer from spreading a kernel over every GPU it sees: batches are made for one device."""
    args._n_gpu = min(args.n_gpu, 1)


def lora_config(model, params):
    """LoRA on every linear layer, or on those of the last `lora_layers` blocks; None trains all weights.

    Where only the last blocks learn, nothing is sent back through the others: with 15 of SmolLM2's 30
    a step takes two thirds of the time.
    """
    if not params.lora_r:
        return None
    from peft import LoraConfig

    n = model.config.get_text_config().num_hidden_layers
    if params.lora_layers > n:
        raise ParamError(f"lora_layers = {params.lora_layers}: this model has {n} layers; 0 takes all of them.")
    where: dict = {"target_modules": "all-linear"}
    if params.lora_layers:  # peft takes layer numbers with names alone, not with "all-linear"
        head = model.get_output_embeddings()
        linear = {
            k.rpartition(".")[2]
            for k, m in model.named_modules()
            if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not head  # GPT-2's are Conv1D
        }
        where = {"target_modules": sorted(linear), "layers_to_transform": list(range(n - params.lora_layers, n))}
    return LoraConfig(
        r=params.lora_r,
        lora_alpha=params.lora_alpha,
        lora_dropout=params.dropout,
        task_type="CAUSAL_LM",
        **where,
    )


# How far apart two expected scores must be before the ranking loss is satisfied: half a point is one logit.
RANK_SHARPNESS = 2.0


class PackedSFTTrainer(ranks.AcrossRanks, SFTTrainer):
    """SFTTrainer whose dataset rows are micro-batches of packed sequences.

    The loss of a micro-batch is the mean cross-entropy of its text tokens plus that of its score digits
    (a digit would be lost among the tokens of a justification) plus `rank_weight` times the ranking loss.
    """

    def __init__(self, *args, score_ids: list[int], rank_weight: float, restart: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.score_ids, self.rank_weight, self.restart = score_ids, rank_weight, restart
        learn_in_float32(self.model)
        as_it_comes(self)
        self.model_accepts_loss_kwargs = False  # the loss is a mean: Trainer divides it by the accumulation steps
        self.kept = None

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """The cosine of the arguments; with `restart` it ends there, and a second one follows without a warm-up."""
        if not self.restart:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(self.restart)
        least = self.args.lr_scheduler_kwargs["min_lr"] / self.args.learning_rate

        def rate(step: int) -> float:
            if step < min(warmup, self.restart):
                return step / warmup
            start, end = (warmup, self.restart) if step < self.restart else (self.restart, num_training_steps)
            share = (step - start) / max(end - start, 1)
            return least + (1 - least) * (1 + math.cos(math.pi * min(share, 1.0))) / 2

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, rate)
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        targets, order = inputs.pop("targets"), inputs.pop("ranks")
        rows, share = (inputs.pop("sequences"), inputs.pop("lengths")), inputs.pop("weight")
        at = targets != packing.NO_TARGET  # only these are projected through the vocabulary
        with self.kept.reading(*rows) if self.kept else contextlib.nullcontext():
            outputs = model(**inputs, use_cache=False, logits_to_keep=at)
        logits, sequence = outputs.logits.view(-1, outputs.logits.shape[-1]), at.nonzero()[:, 0]
        losses = supervised_losses(logits, targets[at], order[at], sequence, self.score_ids, self.rank_weight)
        for name, value in losses.items() if share else ():
            self._metrics["train"][name].append(value.item())
        weight = {"text_loss": 1.0, "score_loss": 1.0, "rank_loss": self.rank_weight}
        loss = share * sum(weight[name] * value for name, value in losses.items() if name in weight)
        return (loss, outputs) if return_outputs else loss


def supervised_losses(
    logits: torch.Tensor, targets: torch.Tensor, ranks: torch.Tensor, sequence, score_ids: list[int], rank_weight: float
) -> dict[str, torch.Tensor]:
    """The parts of the supervised loss that a micro-batch has, by name.

    ``text_loss`` and ``score_loss``: mean cross-entropy (nats) over text tokens and over score digits.
    ``rank_loss``: for each two replies in one sequence of unlike ranks, ``softplus(-2 (s_better -
    s_worse))`` of their expected scores, the Bradley-Terry loss; `rank_accuracy` is the share in order.
    A few hundred judgements hardly teach that order by cross-entropy alone, and it is all that preference pairs
    are made of (LOG.md). `logits` (targets, vocabulary); `targets`, `ranks` and `sequence`, the packed sequence that
    each stands in, (targets,); digits are the targets with a rank.
    """
    digits, out = ranks != packing.NO_RANK, {}
    found = vocabulary.read(logits, targets, tuple(score_ids))
    for name, where in (("text_loss", ~digits), ("score_loss", digits)):
        if where.any():
            out[name] = -found.log_probs[where].mean()
    if rank_weight and digits.any():
        values = torch.arange(len(score_ids), dtype=torch.float32, device=logits.device)
        expected = found.chosen[digits].softmax(-1) @ values
        sequence, rank = sequence[digits], ranks[digits]
        better = (sequence[:, None] == sequence[None]) & (rank[:, None] < rank[None])
        gaps = (expected[:, None] - expected[None])[better]
        if len(gaps):
            out["rank_loss"] = torch.nn.functional.softplus(-RANK_SHARPNESS * gaps).mean()
            out["rank_accuracy"] = (gaps > 0).float().mean()
    return out


def _check_ranking(rows: list[dict], micro: int, share: bool, rank_weight: float) -> None:
    """Raise `ParamError` where the ranking loss would compare less than it promises."""
    groups = Counter(r["group"] for r in rows if "group" in r)
    if not groups:
        return  # the SFT baseline: nothing to rank
    if not share:
        wrong = "this model's attention is not plain over max_length tokens: lower max_length to its window, or take 0."
    elif not any("rank" in r for r in rows):
        wrong = "no judgement begins with its score: put score_first into build_eft.formats."
    elif (most := max(groups.values())) > micro:
        wrong = (
            f"a prompt has up to {most} judgements (replies times formats) and a micro-batch holds {micro}: raise "
            f"micro_batch_size to {most}, and train_batch_size to a multiple of it."
        )
    else:
        return
    raise ParamError(f"rank_weight = {rank_weight:g}: {wrong}")


def sft_trainer(model, tokenizer, rows: list[dict], params, work: Path, world: int = 1) -> PackedSFTTrainer:
    """trl's SFTTrainer on tokenised rows: cross-entropy on the assistant's tokens, and the ranking loss.

    `world` processes share the micro-batches of a step (`ranks`). With `ift_epochs` so many passes over IFT alone
    follow, and the learning rate's cosine begins anew: beside many judgements a few answers teach little (LOG.md).

    Replies share what they have in common, and are compared, within a micro-batch. So with `rank_weight` a
    micro-batch must hold all judgements of a prompt: its replies times the EFT formats.
    """
    require_rows(rows, params)
    share = attention.is_full(model.config, params.max_length)
    micro, accumulation = training_params.batch_sizes(vars(params))
    if params.rank_weight:
        _check_ranking(rows, micro, share, params.rank_weight)
    packed = packing.sequences(rows, micro, share=share)
    batches = packing.micro_batches(packed, micro, range(params.epochs), params.seed)
    last = range(params.epochs, params.epochs + params.ift_epochs)
    answers = packing.micro_batches(packed, micro, last, params.seed, ("ift",))
    restart = len(batches) // accumulation if answers else 0
    batches += answers
    batches, weights = ranks.fill_steps(batches, accumulation, world)
    args = SFTConfig(
        **common_args(params, work, per_device=1, accumulation=accumulation, n_items=len(batches), world=world),
        remove_unused_columns=False,
    )
    _one_device(args)
    trainer = PackedSFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"sequences": batches, "weight": weights}),
        data_collator=packing.Collator(packed, torch.bfloat16 if args.bf16 else torch.float32),
        processing_class=tokenizer,
        peft_config=lora_config(model, params),
        score_ids=judge.score_tokens(tokenizer)[1] if any("rank" in r for r in rows) else [],
        rank_weight=params.rank_weight,
        restart=restart,
    )
    trainer.row_ids = [[i for s in batch for i in packed[s]["ids"]] for batch in batches]
    trainer.lengths = {r.get("id", "?"): len(r["input_ids"]) for r in rows}
    groups = Counter(r["group"] for r in rows if "group" in r)
    trainer.less_memory = partial(less_memory, params, max(groups.values(), default=1) if params.rank_weight else 1)
    if share:
        trainer.kept = frozen.keep(trainer, params, sum(len(s["input_ids"]) for s in packed), last.stop)
    return trainer


class TokenisedDPOTrainer(DPOTrainer):
    """DPOTrainer for rows that are token ids already.

    `share`: a pair's prompt is read once (`pair_forward`); `keep(trainer)` makes what keeps the frozen layers' output.
    `ids` are those of the rows, `lengths` their tokens by id; `less_memory(longest)` says what to lower.
    """

    def __init__(self, *args, share: bool, keep, ids: list[str], lengths: dict[str, int], less_memory, **kwargs):
        self.share, self.keep, self.lengths, self.less_memory = share, keep, lengths, less_memory
        self._to_read = iter(ids)
        super().__init__(*args, **kwargs)
        learn_in_float32(self.model)
        as_it_comes(self)

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def _precompute_ref_logps(self, *args, **kwargs):
        if self.share:  # what trl puts into the model's place is there by now
            base = base_of(self.model)
            share_prompts(base, self.keep(self))
        return super()._precompute_ref_logps(*args, **kwargs)

    def compute_ref_log_probs(self, model, inputs):
        ids = list(islice(self._to_read, len(inputs["input_ids"]) // 2))  # a pair is two rows
        try:
            return super().compute_ref_log_probs(model, inputs)
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e):
                raise
        raise _ran_out("while the reference read", ids, self)


def weighed_losses(consistency: float, nll_weight: float) -> dict:
    """trl's losses and weights for ``consistency * L(chosen > rejected) + (1 - consistency) * L(rejected > chosen)``
    plus `nll_weight` of the chosen answers' likelihood.

    trl has no such loss, but its "robust" one is ``(0.75 L(c > r) - 0.25 L(r > c)) / 0.5`` at a smoothing of 0.25.
    """
    losses = {"sigmoid": 3 - 2 * consistency, "robust": 2 * consistency - 2, "sft": nll_weight}
    losses = {name: weight for name, weight in losses.items() if weight}
    return {"loss_type": list(losses), "loss_weights": list(losses.values()), "label_smoothing": 0.25}


def split_ids(rows: list[dict], params) -> tuple[list[str], list[dict], list[int]]:
    """(ids, rows without them, tokens of each with its longer answer) of `dpo_rows`; `DataError` where none came."""
    require_rows(rows, params)
    ids, rows = [r.get("id", "?") for r in rows], [{k: r[k] for k in r if k != "id"} for r in rows]
    return ids, rows, [len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows]


def dpo_parts(model, tokenizer, params, ids: list[str], lengths: list[int], consistency: float, how: dict) -> dict:
    """What a `TokenisedDPOTrainer` is made of, on one process or several; `how` holds arguments of trl's DPOConfig."""
    args = DPOConfig(
        **how,
        beta=params.beta,
        **weighed_losses(consistency, params.nll_weight),
        precompute_ref_log_probs=True,
        disable_dropout=not params.dropout,
    )
    _one_device(args)
    return {
        "model": model,
        "args": args,
        "processing_class": tokenizer,
        "peft_config": lora_config(model, params),
        "share": attention.is_full(model.config, 2 * params.max_length),
        "ids": ids,
        "lengths": dict(zip(ids, lengths, strict=True)),
        "less_memory": partial(less_memory, params, 1),
    }


def dpo_trainer(model, tokenizer, rows: list[dict], params, work: Path, consistency: float = 1.0) -> DPOTrainer:
    """trl's DPOTrainer with `model` itself as the reference policy.

    The reference log-probabilities are computed once, before the first step, from the model as it is
    now (with the new adapter switched off, or before any weight has moved), and kept beside the rows.
    So the reference is the round's starting model in every case, and no second model is in memory;
    trl's own default would reload whatever ``config._name_or_path`` says.

    `params.nll_weight` adds that much of the chosen answers' mean negative log-likelihood (Pang et al. 2024). trl
    takes the mean over the tokens of a micro-batch, the paper over those of each answer. `consistency` says how far
    the pairs' order is trusted (`weighed_losses`); 1 is DPO.
    """
    ids, rows, lengths = split_ids(rows, params)
    n_tokens = sum(len(ids) for r in rows for ids in r.values())
    order = batch_order(lengths, params.train_batch_size, params.epochs, params.seed)
    micro, accumulation = training_params.batch_sizes(vars(params))
    how = common_args(params, work, per_device=micro, accumulation=accumulation, n_items=len(order))
    trainer = TokenisedDPOTrainer(
        train_dataset=Dataset.from_list(rows),
        keep=lambda trainer: frozen.keep(trainer, params, n_tokens, 1 + params.epochs),
        **dpo_parts(model, tokenizer, params, ids, lengths, consistency, how),
    )
    trainer.row_ids = [[ids[i]] for i in order]
    trainer.train_dataset = trainer.train_dataset.select(order)  # the reference read each pair once; now all epochs
    return trainer


class _Report(TrainerCallback):
    """Moves the step's progress, and stops at a loss or gradient that is no number, before it is in a checkpoint.

    `row_ids` has the ids of the rows of each micro-batch, in the order in which they are trained. `n_done` counts the
    micro-batches of the step under way that are done.
    """

    def __init__(self, progress, row_ids: list[list[str]]):
        self.progress, self.row_ids, self.n_done = progress, row_ids, 0

    def on_substep_end(self, args, state, control, **kwargs):
        self.n_done += 1

    def on_step_end(self, args, state, control, **kwargs):
        self.n_done = 0
        self.progress.update(state.global_step - self.progress.n)

    def under_way(self, args, state) -> list[str]:
        """Ids of the rows of the micro-batch under way, in this process."""
        n = state.global_step * args.gradient_accumulation_steps + self.n_done
        first = (n * args.world_size + args.process_index) * args.per_device_train_batch_size
        return [i for ids in self.row_ids[first : first + args.per_device_train_batch_size] for i in ids]

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "grad_norm"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(float(value)):
                size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
                rows = self.row_ids[(state.global_step - 1) * size : state.global_step * size]
                ids = ", ".join(dict.fromkeys(i for batch in rows for i in batch))
                raise StepFailed(
                    f"{name} became {value} at step {state.global_step}, on rows {ids}. Look at these rows, or lower "
                    "learning_rate."
                )


def _ran_out(when: str, ids: list[str], trainer) -> ResourceError:
    lower = trainer.less_memory(max((trainer.lengths[i] for i in ids), default=max(trainer.lengths.values())))
    return ResourceError(f"memory ran out {when} rows {', '.join(dict.fromkeys(ids))}: {lower}.")


def train(trainer, step, selection=None) -> pd.DataFrame:
    """Run a trainer to its end, from the last checkpoint of an interrupted attempt if there is one.

    Raises `ResourceError`, which names the rows and what to lower, where memory runs out.
    Returns the log, one row per optimizer step. With a `checkpoints.Selection` the trainer's model has the weights of
    the step that it kept, else those of the last.
    """
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    total = math.ceil(
        len(trainer.train_dataset)
        / (
            trainer.args.per_device_train_batch_size
            * trainer.args.gradient_accumulation_steps
            * trainer.args.world_size
        )
    )
    last = last_checkpoint(Path(trainer.args.output_dir))
    if not last and trainer.state.global_step:  # else its first step would be taken from weights that have learned
        raise StepFailed(
            f"this training was stopped at step {trainer.state.global_step} and has no checkpoint (save_steps). Run "
            "the cell that begins it again, then this one."
        )
    if last and trainer.is_world_process_zero():
        print(f"continuing from step {step_of(last)} of {total}", flush=True)
    with step.progress(total, "steps") as progress:
        trainer.add_callback(report := _Report(progress, trainer.row_ids))
        if selection:
            selection.watch(trainer)
        ran_out = False
        try:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        except (RuntimeError, MemoryError) as e:
            if not (ran_out := out_of_memory(e)):
                raise
        if ran_out:  # not within the except clause: the error holds all that stood in memory
            now = report.under_way(trainer.args, trainer.state)
            raise _ran_out(f"at step {trainer.state.global_step + 1}, on", now, trainer)
    if selection:
        selection.restore(trainer)
    return pd.DataFrame([r for r in trainer.state.log_history if "loss" in r])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint: the state of the trainer is what is written last, in place, so it must be whole."""
    states = folder.glob("checkpoint-*/trainer_state.json")
    return max((p.parent for p in states if _is_whole(p)), key=step_of, default=None)


def _is_whole(state: Path) -> bool:
    try:
        return bool(json.loads(state.read_text(encoding="utf-8")))
    except ValueError:
        return False


def step_of(checkpoint: Path) -> int:
    """Optimizer steps behind a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def round_to_bfloat16(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Round float32 up or down to bfloat16, each with the probability that makes the mean exact.

    A fine-tuned weight lies close to the bfloat16 weight it started from. Rounding to nearest takes
    most of them right back: of a LoRA DPO round at learning rate 2e-5 it keeps 6 % of the update, at
    2e-4 half (LOG.md). Stochastic rounding keeps all of it on average, and what it adds is noise that
    no direction of the update shares.
    """
    bits = x.float().contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, dtype=torch.int32).to(bits.device)
    return noise.add_(bits).bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()


def merged(model, dtype: str, seed: int):
    """`model` without adapters: they are added to the weights in float32, which are then rounded once.

    `model` itself is used up: it is moved to main memory, of which this takes four bytes a weight, since a card that
    a training filled with two has no room for them; and it is rounded one weight after the other.
    """
    model = model.to("cpu", torch.float32)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    if dtype == "bfloat16":
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.data = round_to_bfloat16(p.detach(), generator)
    return model.to(getattr(torch, dtype))


def save(model, tokenizer, folder: Path, params, *, card: str = "", adapter_of: str = "") -> None:
    """Write a trained model without adapters, in the dtype of the run, its tokenizer and model card; `folder` appears
    whole.

    Every later use loads just these weights, in the same dtype: sampling, judging, and training the
    next model see the same policy. `adapter_of`, the name of the base, also keeps the adapters (`save_adapter`).
    """
    with new_folder(folder) as tmp:
        if adapter_of:
            save_adapter(model, tmp / "adapter", adapter_of)
        merged(model, pick_dtype(params.dtype, params.device), params.seed).save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        if card:
            write_text(tmp / CARD, card)


def whole(source: dict, params, weights):
    """The model of `source` (`StepRun.model_source`) in main memory, in float32, with the `weights` that were trained.

    They are (name, tensor) (`ranks.trained_weights`); where `params` has adapters, theirs alone. So what is merged
    and saved does not depend on how the model was sharded or quantised.
    """
    plainly = SimpleNamespace(**vars(params) | {"device": "cpu", "dtype": "float32"})
    model, _ = load(params=plainly, **source)
    if config := lora_config(model, plainly):
        model = get_peft_model(model, config)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in weights:
            own[name].copy_(tensor)
    return model


def save_adapter(model, folder: Path, base: str) -> None:
    """The adapters of a peft `model` in peft's own form, not rounded; `base` is what they belong on."""
    folder.mkdir(parents=True)
    config = copy.copy(model.peft_config["default"])
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(folder)
    weights = {k: v.detach().cpu().contiguous() for k, v in get_peft_model_state_dict(model).items()}
    save_file(weights, folder / "adapter_model.safetensors")
