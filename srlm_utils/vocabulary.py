"""What training and scoring ask of logits: log-probabilities of targets in one pass, a few logits without rounding.

`torch.nn.functional.cross_entropy` wants float32 logits and keeps their softmax, and each choice of rows or columns has
a gradient of full size: for a micro-batch's text, digits and ranks that was 4 % of a training step (LOG.md). Here rows
are read a few at a time, while they fit into the processor's cache, and one gradient is made, from the logits.
"""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

ROWS = {"cpu": 32, "cuda": 256}  # read at once: their float32 logits are what is made beside the gradient


class Read(NamedTuple):
    """Of each of n target tokens; gradients go through the first two.

    `log_probs` (n,), nats; `chosen` (n, choices), the logits of the tokens asked for. Where figures are wanted:
    `entropy` (n,), nats; `mean_logits` (n,); `is_top1` (n,), whether it is the likeliest, the first of several. All
    float32 but the last, a bool.
    """

    log_probs: torch.Tensor
    chosen: torch.Tensor
    entropy: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None


def read(logits: torch.Tensor, targets: torch.Tensor, choices: tuple[int, ...] = (), *, figures: bool = False) -> Read:
    """Read `logits` (n, vocabulary) for `targets` (n,); `choices` are the token ids whose logits are wanted as well."""
    return Read(*_Read.apply(logits, targets, torch.tensor(choices, dtype=torch.long, device=logits.device), figures))


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, choices, figures):
        size = ROWS.get(logits.device.type, 256)
        parts = [_read(*part, figures) for part in zip(logits.split(size), targets.split(size), strict=True)]
        log_probs, top, log_total, *rest = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(logits, targets, choices, top, log_total)
        ctx.size = size
        ctx.mark_non_differentiable(*rest)
        return log_probs, logits[:, choices].float(), *rest

    @staticmethod
    @once_differentiable
    def backward(ctx, d_log_probs, d_chosen, *_):
        logits, targets, choices, *sums = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        columns = (logits, targets, *sums, d_log_probs, d_chosen, gradient)
        for x, target, top, log_total, d, d_some, out in zip(*(c.split(ctx.size) for c in columns), strict=True):
            part = (x.float() - top[:, None]).sub_(log_total[:, None]).exp_().mul_(-d[:, None])
            part.scatter_add_(1, target[:, None], d[:, None])
            out.copy_(part.index_add_(1, choices, d_some))
        return gradient, None, None, None


def _read(logits: torch.Tensor, targets: torch.Tensor, figures: bool) -> tuple[torch.Tensor, ...]:
    """(log-probability, highest logit, log of the sum of the exponentials above it, figures) of a few rows."""
    logits = logits.float()
    top = logits.amax(-1)
    more = [logits.mean(-1), logits.argmax(-1) == targets] if figures else []
    logits = logits - top[:, None]
    of_target = logits.gather(-1, targets[:, None]).squeeze(-1)
    weights = logits.exp()
    total = weights.sum(-1)
    log_total = total.log()
    if figures:
        more.insert(0, log_total - weights.mul_(logits).sum(-1) / total)
    return of_target - log_total, top, log_total, *more


@contextlib.contextmanager
def unrounded(model, tokens: Sequence[int]):
    """While inside, `model` gives the logits of the token ids `tokens` in float32, computed from its last hidden state.

    Between 16 and 32 bfloat16 has steps of an eighth: that alone moved expected scores by 0.02, as much as all layers
    before it (LOG.md). Other logits keep their steps. Nothing changes without tokens, for a model in float32 and where
    the last layer is no plain matrix. What a model does to logits behind that layer, such as capping, is still done.
    """
    tokens, head = list(tokens), model.get_output_embeddings()
    half = isinstance(head, torch.nn.Linear) and head.weight.dtype in (torch.bfloat16, torch.float16)
    if not tokens or not half:
        yield
        return

    def again(head, inputs, logits):
        some = [None if x is None else x[tokens].float() for x in (head.weight, head.bias)]
        logits = logits.float()
        logits[..., tokens] = torch.nn.functional.linear(inputs[0].float(), *some)
        return logits

    hook = head.register_forward_hook(again)
    try:
        yield
    finally:
        hook.remove()
