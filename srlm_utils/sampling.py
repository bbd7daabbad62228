"""Drawing the next token: temperature and an exact nucleus (top-p) without sorting the vocabulary."""

import hashlib

import numpy as np
import torch

TOP_K = 64  # wide enough to hold p = 0.9 in 99 of 100 rows (LOG.md); four times as many take twice as long
CHUNK = 64  # rows


def uniforms(seed: int, key: str, n: int) -> np.ndarray:
    """`n` uniform draws in [0, 1) that depend on (seed, key) alone.

    One stream a sample makes what is drawn independent of the batch it was drawn in: a resumed run
    or another batch size asks for the same random numbers.
    """
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random(n)


def check_finite(x: torch.Tensor) -> None:
    if not bool(torch.isfinite(x).all()):
        raise FloatingPointError("NaN or infinity")


def nucleus(
    logits: torch.Tensor, temperature: float, top_p: float, k: int = TOP_K
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept probabilities (normalised, descending) and their token ids, both (rows, `k` if there are so many, or more);
    what is behind the kept ones has probability 0.

    The nucleus is the smallest set of most likely tokens whose mass reaches `top_p` (Holtzman et al.
    2020). Only the `k` largest logits are sorted: a token's probability needs the sum over the
    vocabulary, not its order. Rows in which they do not hold `top_p` are sorted further, so the distribution is the
    exact one either way.
    """
    size = logits.shape[-1]
    k = min(k, size) if top_p < 1 else size
    top, ids = logits.topk(k, dim=-1)
    highest = top[:, :1]
    # in place: on a CPU a copy of the vocabulary's logits costs as much as their exponentials
    total = logits.to(torch.float32, copy=True).sub_(highest).div_(temperature).exp_().sum(-1, keepdim=True)
    check_finite(total)  # a logit that is NaN or infinite is the highest, and spoils the sum
    probs = ((top.float() - highest) / temperature).exp() / total
    short = probs.sum(-1) < top_p
    before = probs.cumsum(-1) - probs
    probs = torch.where(before < top_p, probs, 0.0)  # the first token has mass 0 before it: always kept
    probs /= probs.sum(-1, keepdim=True)
    if k < size and bool(short.any()):
        more_probs, more_ids = nucleus(logits[short], temperature, top_p, 8 * k)
        wider = (0, more_ids.shape[-1] - k)
        probs, ids = torch.nn.functional.pad(probs, wider), torch.nn.functional.pad(ids, wider)
        probs[short], ids[short] = more_probs, more_ids
    return probs, ids


def sample(logits: torch.Tensor, u: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """One token id a row, (rows,), by inverting the nucleus's distribution at `u` (rows,) in [0, 1).

    `temperature` 0 takes the most likely token. Raises FloatingPointError for logits that are NaN or infinite.
    """
    if temperature == 0:
        highest, ids = logits.max(-1)
        check_finite(highest)
        return ids
    if len(logits) > CHUNK:  # what is made of a chunk's logits stays in a processor's cache
        parts = zip(logits.split(CHUNK), u.split(CHUNK), strict=True)
        return torch.cat([sample(part, its_u, temperature, top_p) for part, its_u in parts])
    probs, ids = nucleus(logits, temperature, top_p)
    index = torch.searchsorted(probs.cumsum(-1), u[:, None].float(), right=True)
    # rounding can leave the last kept cumulative sum a hair under 1; never step past the kept tokens
    n_kept = (probs > 0).sum(-1, keepdim=True)
    return ids.gather(-1, torch.minimum(index, n_kept - 1)).squeeze(-1)
