"""A forward pass for DPO that reads the prompt of a pair once, and scores answers alone.

trl asks its model for the log-probabilities of the labelled tokens of (chosen, rejected) rows. Here a pair is one
packed sequence, prompt, chosen and rejected answer, and only positions that predict an answer's token are projected
through the vocabulary. The figures are the same (tests/test_pair_forward.py).
"""

import contextlib
from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from srlm_utils import packing, vocabulary


@dataclass
class Figures(ModelOutput):
    """What trl asks of answer tokens, each (rows, tokens - 1). In another container FSDP sees no gradients."""

    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None


def share_prompts(model, kept=None) -> None:
    """Have `model`, a transformers causal language model, answer trl's calls with ``fused_lm_head=True`` by pairs.

    Rows 0 .. n-1 of such a call are the chosen answers, n .. 2n-1 the rejected ones to the same prompts. `kept`, a
    `frozen.Kept`, has what the frozen layers make of a pair.
    """
    plain, other = type(model).forward.__get__(model), model.forward

    def forward(*args, labels=None, fused_lm_head=False, **kwargs):
        if not fused_lm_head:
            return other(*args, labels=labels, **kwargs)
        return _forward_pairs(plain, kept, labels=labels, **kwargs)

    model.forward = forward


def _forward_pairs(forward, kept, input_ids, attention_mask, labels, **kwargs) -> Figures:
    n, device = len(input_ids) // 2, input_ids.device
    starts = (labels != packing.NO_TARGET).int().argmax(-1).tolist()
    real = attention_mask.bool()
    rows = [ids[keep].tolist() for ids, keep in zip(input_ids, real, strict=True)]
    skipped = real.int().argmax(-1).tolist()  # padding on the left, if there is any
    trees, paths = [], []
    for i in range(n):
        both = (i, i + n)
        tree, of_both = packing.tree([rows[j][:-1] for j in both], [starts[j] - skipped[j] for j in both])
        trees.append(tree)
        paths += zip(both, [i, i], of_both, strict=True)
    kind = device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    inputs = packing.tensors(trees, device, dtype)
    width = inputs["input_ids"].shape[1]

    row, column, target, at = [], [], [], []  # of each answer token: where trl wants it; where its logits are
    for j, tree, path in paths:
        for place in range(starts[j], skipped[j] + len(rows[j])):
            row.append(j)
            column.append(place - 1)
            target.append(rows[j][place - skipped[j]])
            at.append(tree * width + path[place - skipped[j] - 1])
    asked, number = torch.unique(torch.tensor(at, device=device), return_inverse=True)
    keep = torch.zeros(n * width, dtype=torch.bool, device=device)
    keep[asked] = True
    pairs = [(tuple(rows[i]), tuple(rows[i + n])) for i in range(n)]
    lengths = [len(tree["input_ids"]) for tree in trees]
    with kept.reading(pairs, lengths) if kept else contextlib.nullcontext():
        logits = forward(**inputs, logits_to_keep=keep.view(n, width), **kwargs).logits
    logits, target = logits.view(-1, logits.shape[-1])[number], torch.tensor(target, device=device)
    found = vocabulary.read(logits, target, figures=True)
    size = (2 * n, labels.shape[1] - 1)
    return Figures(
        **{
            name: value.new_zeros(size).index_put((torch.tensor(row), torch.tensor(column)), value)
            for name, value in found._asdict().items()
            if name != "chosen"
        }
    )
