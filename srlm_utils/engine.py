"""Generation and scoring on transformers: batched, sampled exactly, each row with a stream of its own."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from srlm_utils import chat
from srlm_utils.errors import ModelError
from srlm_utils.sampling import sample, uniforms


@dataclass
class Sample:
    """One generated text. `ended`: it wrote EOS (or a stop token) before its token budget was used up."""

    key: str
    text: str
    n_tokens: int
    ended: bool


def pick_device(device: str = "auto") -> str:
    """`device` itself, or for "auto" cuda where there is one, else cpu."""
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def pick_dtype(dtype: str = "auto", device: str = "auto") -> str:
    """`dtype` itself; "auto" is bfloat16 where the hardware computes in it and float32 elsewhere.

    On a processor without bfloat16 instructions every product is emulated: a seventh of float32's
    speed on one with AVX2 alone (LOG.md).
    """
    if dtype != "auto":
        return dtype
    if pick_device(device) == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    has = torch.cpu.get_capabilities()
    return "bfloat16" if has.get("avx512_bf16") or has.get("amx_bf16") else "float32"


class Engine:
    """A model and its tokenizer, loaded for generation.

    Sampling asks for the same random numbers whatever the batch size (`sampling.uniforms`). In
    bfloat16 the logits themselves still differ by rounding between batch shapes, so texts repeat
    exactly for the same batch size and nearly always, but not always, for another.
    """

    def __init__(
        self,
        folder: str,
        *,
        revision: str = "",
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 32,
        chat_template: str = "",
        trust_remote_code: bool = False,
    ):
        from transformers import AutoModelForCausalLM

        self.tokenizer = chat.load_tokenizer(
            folder, revision=revision, chat_template=chat_template, trust_remote_code=trust_remote_code
        )
        self.device = pick_device(device)
        self.batch_size = batch_size
        try:
            self.model = (
                AutoModelForCausalLM.from_pretrained(
                    folder,
                    revision=revision or None,
                    dtype=getattr(torch, pick_dtype(dtype, device)),
                    use_safetensors=True,
                    trust_remote_code=trust_remote_code,
                )
                .to(self.device)
                .eval()
            )
        except (OSError, ValueError) as e:
            raise ModelError(
                f"{folder}: the model could not be loaded ({str(e).splitlines()[0]}). Expected "
                "a transformers causal language model with safetensors weights."
            ) from e
        eos = self.model.generation_config.eos_token_id
        eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
        self._ends = {self.tokenizer.eos_token_id, chat.end_of_turn(self.tokenizer), *eos}

    # ---- sampling

    @torch.inference_mode()
    def generate(
        self,
        requests: list[tuple[str, list[int]]],
        *,
        n: int = 1,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        stop_ids: tuple[int, ...] = (),
        on_token=None,
    ) -> Iterator[list[Sample]]:
        """Sample `n` texts for each request ``(key, prompt token ids)``; yields them batch by batch.

        A sample's key is ``<request key>-<index>``. Requests run longest first, so that a batch holds
        prompts of one length and the largest batch comes first; the `n` samples of a prompt share one
        prefill; rows that have ended leave the batch. Temperature 0 is greedy. EOS and `stop_ids` end
        a text and are not part of it. `on_token(n)` is told of tokens as they are made.
        """
        requests = sorted(requests, key=lambda r: (-len(r[1]), r[0]))
        per_batch = max(1, self.batch_size // n)
        for i in range(0, len(requests), per_batch):
            yield self._generate_batch(
                requests[i : i + per_batch],
                n,
                max_new_tokens,
                temperature,
                top_p,
                seed,
                self._ends | {*stop_ids},
                on_token,
            )

    def _generate_batch(self, batch, n, max_new_tokens, temperature, top_p, seed, stops, on_token):
        keys = [f"{key}-{j}" for key, _ in batch for j in range(n)]
        u = np.stack([uniforms(seed, key, max_new_tokens) for key in keys])
        u = torch.from_numpy(u.astype(np.float32)).to(self.device)
        stops_t = torch.tensor(sorted(stops), device=self.device)
        ids, mask = self._left_pad([p for _, p in batch])
        out = self.model(
            input_ids=ids, attention_mask=mask, position_ids=_positions(mask), use_cache=True, logits_to_keep=1
        )
        cache, logits = out.past_key_values, out.logits[:, -1]
        if n > 1:
            cache.batch_repeat_interleave(n)
            logits, mask = (t.repeat_interleave(n, 0) for t in (logits, mask))
        tokens: list[list[int]] = [[] for _ in keys]
        ended = [False] * len(keys)
        alive = torch.arange(len(keys), device=self.device)  # row of the batch -> index of the sample
        for step in range(max_new_tokens):
            next_ids = sample(logits, u[alive, step], temperature, top_p)
            going = ~torch.isin(next_ids, stops_t)
            for row, (token, goes) in enumerate(zip(next_ids.tolist(), going.tolist(), strict=True)):
                if goes:
                    tokens[alive[row]].append(token)
                else:
                    ended[alive[row]] = True
            if on_token:
                on_token(int(going.sum()))
            if step == max_new_tokens - 1 or not bool(going.any()):
                break
            if not bool(going.all()):  # finished rows leave, cache and all
                rows = going.nonzero().squeeze(-1)
                cache.batch_select_indices(rows)
                alive, mask, next_ids = alive[rows], mask[rows], next_ids[rows]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            out = self.model(
                input_ids=next_ids[:, None],
                attention_mask=mask,
                past_key_values=cache,
                position_ids=mask.sum(-1, keepdim=True) - 1,
                use_cache=True,
            )
            logits = out.logits[:, -1]
        return [
            Sample(k, chat.decode(self.tokenizer, t), len(t), e) for k, t, e in zip(keys, tokens, ended, strict=True)
        ]

    # ---- scoring

    @torch.inference_mode()
    def choice_probs(
        self, groups: list[list[tuple[str, list[int]]]], choices: list[int]
    ) -> Iterator[list[tuple[str, list[float], float]]]:
        """Probability of each of the token ids `choices` as the next token, in one forward pass.

        `groups` hold requests ``(key, token ids)`` that begin alike, such as the judge prompts of the
        candidates of one prompt: what a group shares is read once. Yields batches of ``(key,
        probabilities that sum to 1 over the choices, mass)``, where mass is the share of the full
        distribution that the choices held before renormalising: near 0, the model was about to write
        something else and the figures mean little.
        """
        groups = sorted((g for g in groups if g), key=lambda g: (-max(len(ids) for _, ids in g), g[0][0]))
        batch: list = []
        for group in groups:
            if batch and sum(map(len, batch)) + len(group) > max(1, self.batch_size // 2):
                yield self._choice_batch(batch, choices)
                batch = []
            batch.append(group)
        if batch:
            yield self._choice_batch(batch, choices)

    def _choice_batch(self, groups, choices):
        # all but the last token of the shortest may be shared: every request needs one of its own to ask with
        shared = [os.path.commonprefix([ids[:-1] for _, ids in g]) for g in groups]
        rows = [(key, ids[len(s) :], i) for i, (g, s) in enumerate(zip(groups, shared, strict=True)) for key, ids in g]
        ids, mask = self._left_pad([rest for _, rest, _ in rows])
        past = None
        if all(shared):
            # padding may stand between the two parts: positions count real tokens, and the mask hides the rest
            head, head_mask = self._left_pad(shared)
            past = self.model(
                input_ids=head,
                attention_mask=head_mask,
                position_ids=_positions(head_mask),
                use_cache=True,
                logits_to_keep=1,
            ).past_key_values
            group_of = torch.tensor([i for *_, i in rows], device=self.device)
            past.batch_select_indices(group_of)
            mask = torch.cat([head_mask[group_of], mask], 1)
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=_positions(mask)[:, -ids.shape[1] :],
            past_key_values=past,
            use_cache=past is not None,
            logits_to_keep=1,
        ).logits[:, -1]
        probs = logits.float().softmax(-1)[:, choices]
        mass = probs.sum(-1)
        return [(key, p.tolist(), float(m)) for (key, *_), p, m in zip(rows, probs / mass[:, None], mass, strict=True)]

    def _left_pad(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        return ids, mask


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


class Meter:
    """Tokens a second since it was made; for the line a notebook prints under a long cell."""

    def __init__(self):
        self.start, self.n = time.monotonic(), 0

    def __call__(self, n: int) -> None:
        self.n += n

    def __str__(self) -> str:
        seconds = time.monotonic() - self.start
        return f"{self.n:,} tokens in {seconds:.0f} s ({self.n / max(seconds, 1e-9):.0f} tok/s)"
