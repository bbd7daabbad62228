"""What two engines on the same weights must agree on; needs what an engine needs, and no pytest."""

from srlm_utils import chat, judge

PROMPTS = [
    "Hi.",
    "Explain how rainbows form in two short sentences, please.",
    "List three fruits.",
    "Write a long letter to a friend about the garden, the weather, the dog and the new neighbours.",
]


def requests(engine):
    return [(f"q{i}", chat.prompt_ids(engine.tokenizer, chat.user(p))) for i, p in enumerate(PROMPTS)]


def figures(engine):
    """(greedy texts, expected scores, log-probabilities of given texts) by key, as JSON has them."""
    greedy = {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "seed": 0}
    samples = [s for batch in engine.generate(requests(engine), **greedy) for s in batch]
    texts = {s.key: [s.text, s.n_tokens, s.ended] for s in samples}
    items = [{"id": f"a{i}", "prompt": p, "response": p[::-1]} for i, p in enumerate(PROMPTS)]
    batches = judge.expected_scores(engine, judge.Rubric("short"), items)
    scores = {r["id"]: r["score"] for batch in batches for r in batch}
    targets = [(key, ids, ids[3:9]) for key, ids in requests(engine)]
    return texts, scores, dict(row for batch in engine.target_logprobs(targets) for row in batch)
