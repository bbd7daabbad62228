"""Candidates: the kit against transformers, one at a time and in fixed batches of 32."""

import torch

from benchmarks.measure import bundled, fraction, in_turn, ratio
from srlm_utils import chat
from srlm_utils.engine import Engine
from srlm_utils.seed_model import fetch

SAMPLING = {"temperature": 0.7, "top_p": 0.9}
MAX_NEW_TOKENS = 96


def load():
    """(the kit's engine, the same weights as transformers loads them by default)."""
    from transformers import AutoModelForCausalLM

    folder = fetch("smollm2-135m-instruct")["path"]
    engine = Engine(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=engine.model.dtype).to(engine.device).eval()
    return engine, plain


def prompts(engine, n: int) -> list[list[int]]:
    return [chat.prompt_ids(engine.tokenizer, chat.user(r["prompt"])) for r in bundled("test_prompts")[:n]]


def kit(engine, ids: list[list[int]], n: int, temperature: float) -> int:
    """Tokens written by the kit."""
    requests = [(f"p{i}", p) for i, p in enumerate(ids)]
    batches = engine.generate(
        requests, n=n, max_new_tokens=MAX_NEW_TOKENS, temperature=temperature, top_p=SAMPLING["top_p"], seed=0
    )
    return sum(s.n_tokens for batch in batches for s in batch)


def without_ends(engine, ids: list[list[int]], temperature: float) -> int:
    """Tokens of texts that all use up their budget, so that every step has the same batch."""
    ends, engine._ends = engine._ends, set()
    try:
        return kit(engine, ids[:32], 4, temperature)
    finally:
        engine._ends = ends


def transformers_generate(engine, plain, ids: list[list[int]], n: int) -> int:
    """Tokens before EOS written by one call of `generate`."""
    inputs, mask = engine._left_pad(ids)
    out = plain.generate(
        input_ids=inputs,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        **SAMPLING,
        num_return_sequences=n,
        max_new_tokens=MAX_NEW_TOKENS,
        pad_token_id=engine.tokenizer.pad_token_id,
    )[:, inputs.shape[1] :]
    ends = torch.tensor(sorted(engine._ends), device=out.device)
    return int((torch.isin(out, ends).int().cumsum(-1) == 0).sum())


def transformers_continuous(plain, ids: list[list[int]], n: int) -> int:
    """Tokens written by `generate_batch`, transformers' own continuous batching."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=True, top_k=0, **SAMPLING, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=plain.config.eos_token_id
    )
    out = plain.generate_batch(inputs=[p for p in ids for _ in range(n)], generation_config=config, progress_bar=False)
    ends = {plain.config.eos_token_id}
    return sum(sum(t not in ends for t in o.generated_tokens) for o in out.values())


def rows(limit: dict[str, float]) -> list[dict]:
    engine, plain = load()
    ids = prompts(engine, 64)
    kit(engine, ids[:8], 1, 0.7), transformers_generate(engine, plain, ids[:1], 1)  # first calls are slower
    cases = {
        "kit": lambda: kit(engine, ids, 4, SAMPLING["temperature"]),
        "kit, sampling, no ends": lambda: without_ends(engine, ids, SAMPLING["temperature"]),
        "kit, greedy, no ends": lambda: without_ends(engine, ids, 0.0),
        "generate, one at a time": lambda: sum(transformers_generate(engine, plain, [p], 1) for p in ids[3:57:18]),
        "generate, batches of 32": lambda: transformers_generate(engine, plain, ids[::8], 4),
    }
    note = ""
    try:
        transformers_continuous(plain, ids[:2], 1)
        cases["generate_batch"] = lambda: transformers_continuous(plain, ids[::16], 4)
    except Exception as e:  # not every version of it runs on a CPU
        note = f"{type(e).__name__}: {str(e).splitlines()[0][:160] if str(e) else ''}"
        print(f"  generate_batch does not run here: {note}")
    rates = in_turn(cases)
    n = sum(p.numel() for p in engine.model.parameters())
    share = {"of_limit": fraction(sorted(rates["kit"])[len(rates["kit"]) // 2], n, 1, limit["matmul_gflops"])}
    out = [
        ratio("candidates_vs_one_at_a_time", rates, "kit", "generate, one at a time", 30, unit="tok/s", **share),
        ratio("candidates_vs_generate_b32", rates, "kit", "generate, batches of 32", 2, unit="tok/s", **share),
        ratio(
            "sampling_vs_greedy", rates, "kit, sampling, no ends", "kit, greedy, no ends", 0.9, unit="tok/s", **share
        ),
    ]
    if "generate_batch" in cases:
        out.append(ratio("candidates_vs_generate_batch", rates, "kit", "generate_batch", None, unit="tok/s", **share))
    else:
        out.append({"name": "candidates_vs_generate_batch", "ratio": None, "target": None, "note": note})
    return out
