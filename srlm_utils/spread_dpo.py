"""DPO on several processes: as `train.dpo_trainer`, but the reference is read by the model that trains, in its parts.

trl reads the reference before the model is sharded, which a large one does not survive, and under FSDP it loads a
second model for it where all weights train. Here it is read when the model stands on its devices and no step has been
taken: the policy is the reference then, adapters included, since they begin as nothing. So no second model is held. It
is kept in a file of the work folder: an attempt that continues reads it from there, when the policy is another.
"""

import math
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import TrainerCallback
from trl.trainer import dpo_trainer as trl_dpo

from srlm_utils import ranks, train, training_params
from srlm_utils.artefacts import read_json, write_json
from srlm_utils.errors import StepFailed
from srlm_utils.pair_forward import share_prompts


class _NoSecondModel(TrainerCallback):
    """Hides FSDP from the second half of trl's constructor, which asks for it only to load a reference model."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_init_end(self, args, state, control, **kwargs):
        self.trainer.is_fsdp_enabled = False


class _ReferenceFirst(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.read_reference()


class SpreadDPOTrainer(ranks.AcrossRanks, train.TokenisedDPOTrainer):
    """DPOTrainer whose dataset rows are micro-batches: {"pairs": indices into `rows`, "weight": of its loss}."""

    def __init__(self, *args, rows: list[dict], micro: int, kept: Path, **kwargs):
        self.rows, self.micro, self.file, self.reference = rows, micro, kept, None
        hashed, trl_dpo.hash_module = trl_dpo.hash_module, lambda _: ""  # of all weights, for a cache that is not used
        try:
            super().__init__(*args, callbacks=[_NoSecondModel(self)], keep=lambda _: None, **kwargs)
        finally:
            trl_dpo.hash_module = hashed
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None
        self.collate, self.data_collator = self.data_collator, self._batch
        # figures are averaged in `log`: the last micro-batch may be shorter than those of the other processes, and
        # tensors of several lengths cannot be gathered
        self.accelerator.gather = self.accelerator.gather_for_metrics = lambda x: x
        self.add_callback(_ReferenceFirst(self))

    def _precompute_ref_logps(self, dataset, name, batch_size):
        if self.share:
            share_prompts(train.base_of(self.model))
        return dataset

    def _batch(self, rows: list[dict]) -> dict:
        (row,) = rows
        named = ("ref_chosen_logps", "ref_rejected_logps")
        pairs = [self.rows[i] | dict(zip(named, self.reference[i], strict=True)) for i in row["pairs"]]
        return self.collate(pairs) | {"weight": row["weight"]}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weight, figures = inputs.pop("weight"), self._metrics["train"]
        before, tokens = {name: len(values) for name, values in figures.items()}, self._total_train_tokens
        loss = super().compute_loss(model, inputs)
        if not weight:  # only here so that all processes call the model equally often
            for name, values in figures.items():
                del values[before.get(name, 0) :]
            self._total_train_tokens, figures["num_tokens"] = tokens, [tokens]
        return weight * loss

    def read_reference(self) -> None:
        """Have each process read its share of the pairs, and all of them know the result."""
        if not self.file.exists():
            if self.state.global_step:
                raise StepFailed(f"{self.file.name} is missing beside a checkpoint of step {self.state.global_step}.")
            found: list = [None] * self.args.world_size
            if self.args.world_size > 1:
                dist.all_gather_object(found, self._own_reference())
            else:
                found = [self._own_reference()]
            of_row = {i: figures for part in found for i, figures in part.items()}
            self.reference = [of_row[i] for i in range(len(self.rows))]
            if self.is_world_process_zero():  # for an attempt that continues; another machine may not see it yet
                write_json(self.file, self.reference)
            self.accelerator.wait_for_everyone()
        else:
            self.reference = read_json(self.file)

    def _own_reference(self) -> dict[int, list[float]]:
        size, world, rank = self.micro, self.args.world_size, self.args.process_index
        parts = [range(i, min(i + size, len(self.rows))) for i in range(0, len(self.rows), size)]
        model, out = self.model_wrapped, {}
        model.eval()
        for k in range(math.ceil(len(parts) / world)):
            at = k * world + rank
            part = parts[min(at, len(parts) - 1)]  # all processes call the model equally often
            inputs = self._prepare_inputs(self.collate([self.rows[i] for i in part]))
            mask = inputs.pop("completion_mask")
            labels = inputs["input_ids"].masked_fill(mask == 0, -100)
            with torch.no_grad():
                scored = model(**inputs, use_cache=False, labels=labels, fused_lm_head=True).log_probs
            chosen, rejected = scored[:, -(mask.shape[1] - 1) :].sum(1).chunk(2)
            if at < len(parts):
                out |= {i: [c.item(), r.item()] for i, c, r in zip(part, chosen, rejected, strict=True)}
        return out


def trainer(
    model, tokenizer, rows: list[dict], params, work: Path, world: int, reference: Path, consistency: float = 1.0
) -> SpreadDPOTrainer:
    """`train.dpo_trainer` for `world` processes: the same rows in the same order.

    The file `reference` gets [[log-probability of the chosen answer, of the rejected one], ...] by row.
    """
    ids, rows, lengths = train.split_ids(rows, params)
    order = train.batch_order(lengths, params.train_batch_size, params.epochs, params.seed)
    micro, accumulation = training_params.batch_sizes(vars(params))
    batches = [order[i : i + micro] for i in range(0, len(order), micro)]
    batches, weights = ranks.fill_steps(batches, accumulation, world)
    how = train.common_args(
        params, work, per_device=1, accumulation=accumulation, n_items=len(batches), world=world
    ) | {"remove_unused_columns": False}
    out = SpreadDPOTrainer(
        train_dataset=Dataset.from_dict({"pairs": batches, "weight": weights}),
        rows=rows,
        micro=micro,
        kept=reference,
        **train.dpo_parts(model, tokenizer, params, ids, lengths, consistency, how),
    )
    out.row_ids = [[ids[i] for i in batch] for batch in batches]
    return out
