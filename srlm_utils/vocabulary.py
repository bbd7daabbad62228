"""What training and scoring ask of logits: log-probabilities of target tokens, in one pass over the vocabulary.

`torch.nn.functional.cross_entropy` wants float32 logits and keeps their softmax, and each choice of rows or columns has
a gradient of full size: for a micro-batch's text, digits and ranks that was a fifth of a training step. Here rows are
read a few at a time, while they fit into the processor's cache, and the gradient is made once, from the logits that the
model keeps anyway (`benchmarks/` has what it gains).
"""

from typing import NamedTuple

import torch

ROWS = {"cpu": 32, "cuda": 256}  # read at once: their float32 logits are all that is made beside the gradient


class Read(NamedTuple):
    """Of each of n target tokens; gradients go through the first two.

    `log_probs` (n,), nats; `chosen` (n, choices), the logits of the tokens asked for; `entropy` (n,), nats;
    `mean_logits` (n,); `is_top1` (n,), whether no token is likelier. All float32 but the last, a bool.
    """

    log_probs: torch.Tensor
    chosen: torch.Tensor
    entropy: torch.Tensor
    mean_logits: torch.Tensor
    is_top1: torch.Tensor


def read(logits: torch.Tensor, targets: torch.Tensor, choices: tuple[int, ...] = ()) -> Read:
    """Read `logits` (n, vocabulary) for `targets` (n,); `choices` are the token ids whose logits are wanted as well."""
    return Read(*_Read.apply(logits, targets, list(choices)))


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, choices):
        size = ROWS.get(logits.device.type, 256)
        parts = [_read(*part) for part in zip(logits.split(size), targets.split(size), strict=True)]
        log_probs, log_sums, *rest = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(logits, targets, log_sums)
        ctx.choices, ctx.size = choices, size
        ctx.mark_non_differentiable(*rest)
        return log_probs, logits[:, choices].float(), *rest

    @staticmethod
    def backward(ctx, d_log_probs, d_chosen, *_):
        logits, targets, log_sums = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        columns = (logits, targets, log_sums, d_log_probs, d_chosen, gradient)
        for x, target, log_sum, d, d_some, out in zip(*(c.split(ctx.size) for c in columns), strict=True):
            part = (x.float() - log_sum[:, None]).exp_().mul_(-d[:, None])
            part.scatter_add_(1, target[:, None], d[:, None])
            part[:, ctx.choices] += d_some
            out.copy_(part)
        return gradient, None, None


def _read(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(log-probability, log of the sum over the vocabulary, entropy, mean logit, top 1) of a few rows."""
    logits = logits.float()
    top, mean = logits.amax(-1), logits.mean(-1)
    logits = logits - top[:, None]
    of_target = logits.gather(-1, targets[:, None]).squeeze(-1)
    weights = logits.exp()
    total = weights.sum(-1)
    log_total = total.log()
    entropy = log_total - weights.mul_(logits).sum(-1) / total
    return of_target - log_total, top + log_total, entropy, mean, of_target == 0
