"""What the speed of judging and sampling rests on, checked on SmolLM2-135M itself."""

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from srlm_utils import chat, judge, rankings, sampling, vocabulary
from srlm_utils.artefacts import read_jsonl
from srlm_utils.devices import pick_dtype
from srlm_utils.engine import Engine
from srlm_utils.paths import seed_path
from srlm_utils.seed_model import fetch

pytestmark = pytest.mark.slow


def engine_of(dtype: str) -> Engine:
    return Engine(fetch("smollm2-135m-instruct")["path"], device="cpu", dtype=dtype)


@pytest.fixture(scope="module")
def full():
    return engine_of("float32")


def scores(engine, items):
    rubric = judge.Rubric("short")
    return {r["id"]: r["score"] for batch in judge.expected_scores(engine, rubric, items) for r in batch}


def plain_scores(engine, items):
    """Each full prompt in a forward pass of its own."""
    start, digits = judge.score_tokens(engine.tokenizer)
    out, rubric = {}, judge.Rubric("short")
    for it in items:
        text = rubric.render(it["prompt"], it["response"], "score_first")
        ids = torch.tensor([chat.prompt_ids(engine.tokenizer, chat.user(text)) + start])
        with torch.no_grad(), vocabulary.unrounded(engine.model, digits):
            p = engine.model(ids, logits_to_keep=1).logits[0, -1, digits].softmax(-1)
        out[it["id"]] = float(p @ torch.arange(6.0))
    return out


@pytest.fixture(scope="module")
def items():
    return rankings.items(read_jsonl(seed_path("onpolicy_eval"))[:10])


@pytest.fixture(scope="module")
def plain(full, items):
    return plain_scores(full, items)


def test_scores_with_shared_prefixes_are_those_of_full_prompts(full, items, plain):
    assert scores(full, items) == pytest.approx(plain, abs=1e-4)


@pytest.mark.skipif(
    pick_dtype("auto", "cpu") != "bfloat16", reason="this processor emulates bfloat16, five minutes for this"
)
def test_in_bfloat16_too(items, plain):
    half = engine_of("bfloat16")
    shared, alone = scores(half, items), plain_scores(half, items)

    def off(found, wanted):
        return np.mean([abs(found[k] - wanted[k]) for k in wanted])

    assert off(shared, alone) < 0.02
    assert stats.spearmanr([shared[k] for k in alone], [*alone.values()]).statistic >= 0.99
    # what bfloat16 does to the layers, whatever the program: sharing must not move scores further
    assert off(shared, plain) < min(0.03, 2 * off(alone, plain))


def test_greedy_texts_are_transformers_own(full):
    rows = read_jsonl(seed_path("test_prompts"))[:12]
    requests = [(r["prompt_id"], chat.prompt_ids(full.tokenizer, chat.user(r["prompt"]))) for r in rows]
    assert len({len(ids) for _, ids in requests}) > 6  # mixed lengths
    ours = full.generate(requests, max_new_tokens=24, temperature=0.0, top_p=1.0, seed=0)
    ours = {s.key: s for batch in ours for s in batch}
    for key, ids in requests:
        out = full.model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=0)[
            0, len(ids) :
        ]
        tokens = [t for t in out.tolist() if t not in full._ends]
        assert ours[f"{key}-0"].text == chat.decode(full.tokenizer, tokens), key


def test_draws_of_a_real_next_token_follow_the_reference_warpers(full):
    ids = chat.prompt_ids(full.tokenizer, chat.user("Write a story."))
    with torch.no_grad():
        logits = full.model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1:]
    warped = TopPLogitsWarper(0.95)(None, TemperatureLogitsWarper(1.2)(None, logits.clone()))
    expected = warped.softmax(-1)[0]
    n = 4000
    u = torch.from_numpy(sampling.uniforms(3, "real", n).astype(np.float32))
    drawn = sampling.sample(logits.expand(n, -1), u, 1.2, 0.95)
    counts = torch.bincount(drawn, minlength=len(expected)).double()
    assert counts[expected == 0].sum() == 0
    often = expected * n >= 5  # the rest as one class
    rest = [float(counts[~often].sum()), float(expected[~often].sum() * n)]
    seen, wanted = counts[often].tolist(), (expected[often].double() * n).tolist()
    if rest[1] > 1:
        seen, wanted = [*seen, rest[0]], [*wanted, rest[1]]
    wanted = np.array(wanted) * sum(seen) / sum(wanted)
    assert len(seen) > 2 and stats.chisquare(seen, wanted).pvalue > 1e-3
