"""Judgements: the kit's expected and sampled scores against plain batches and one at a time."""

import torch

from benchmarks.generation import load
from benchmarks.measure import bundled, fraction, in_turn, ratio
from srlm_utils import chat, judge, rankings

SAMPLING = {"temperature": 0.7, "top_p": 0.9}
MAX_NEW_TOKENS = 80
PLAIN_BATCH = 16


def plain_expected(engine, plain, rubric, items: list[dict]) -> int:
    """Scores by forward passes of the full prompts, in padded batches of similar length."""
    start, digits = judge.score_tokens(engine.tokenizer)
    ids = [
        chat.prompt_ids(engine.tokenizer, chat.user(rubric.render(it["prompt"], it["response"], "score_first"))) + start
        for it in items
    ]
    ids.sort(key=len)
    with torch.inference_mode():
        for i in range(0, len(ids), PLAIN_BATCH):
            inputs, mask = engine._left_pad(ids[i : i + PLAIN_BATCH])
            logits = plain(input_ids=inputs, attention_mask=mask, use_cache=False, logits_to_keep=1).logits
            logits[:, -1, digits].float().softmax(-1).tolist()
    return len(items)


def one_at_a_time(engine, plain, rubric, items: list[dict], n: int) -> int:
    """`n` sampled judgements of each item, each by its own call of `generate`."""
    for it in items:
        ids = chat.prompt_ids(engine.tokenizer, chat.user(rubric.render(it["prompt"], it["response"], "justify_first")))
        for _ in range(n):
            plain.generate(
                input_ids=torch.tensor([ids], device=engine.device),
                do_sample=True,
                top_k=0,
                **SAMPLING,
                max_new_tokens=MAX_NEW_TOKENS,
                pad_token_id=engine.tokenizer.pad_token_id,
            )
    return len(items)


def rows(limit: dict[str, float]) -> list[dict]:
    engine, plain = load()
    rubric, items = judge.Rubric("short"), rankings.items(bundled("onpolicy_eval"))
    sampled = {"n_samples": 3, "max_new_tokens": MAX_NEW_TOKENS, "seed": 0} | SAMPLING
    cases = {
        "kit, expected": lambda: sum(len(b) for b in judge.expected_scores(engine, rubric, items)),
        "plain batches": lambda: plain_expected(engine, plain, rubric, items),
        "kit, sampled x3": lambda: sum(len(b) for b in judge.sampled_scores(engine, rubric, items[:64], **sampled)),
        "one at a time x3": lambda: one_at_a_time(engine, plain, rubric, items[::60], 3),
    }
    cases["plain batches"](), cases["kit, expected"]()  # first calls are slower
    rates = in_turn(cases)
    n = sum(p.numel() for p in engine.model.parameters())
    texts = [rubric.render(it["prompt"], it["response"], "score_first") for it in items]
    tokens = sum(len(chat.prompt_ids(engine.tokenizer, chat.user(t))) for t in texts) / len(texts)
    median = {name: sorted(r)[len(r) // 2] for name, r in rates.items()}
    # of the prompts' tokens, as if each had been read in full: sharing can take this over 1
    share = {"of_limit": fraction(median["kit, expected"] * tokens, n, 1, limit["matmul_gflops"])}
    unit = {"unit": "judgements/s"}
    return [
        ratio("expected_vs_plain", rates, "kit, expected", "plain batches", 1.6, **unit, **share),
        ratio("expected_vs_sampled_one_at_a_time", rates, "kit, expected", "one at a time x3", 60, **unit, **share),
        ratio("sampled_vs_one_at_a_time", rates, "kit, sampled x3", "one at a time x3", None, **unit),
    ]
