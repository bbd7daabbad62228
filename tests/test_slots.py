"""Continuous batching and packed reading give what each prompt gives alone."""

import gc

import pytest
import torch

from srlm_utils import attention, chat, judge, sampling
from srlm_utils.engine import Engine
from srlm_utils.prefill import read
from srlm_utils.slots import BLOCK, Slots
from tests.test_engine import PROMPTS, generate, requests

MORE = [f"{p} Number {i}, please." for i in range(4) for p in PROMPTS]


def alone(engine, ids, n_new):
    """Greedy continuation by whole forward passes, nothing cached."""
    out = list(ids)
    with torch.no_grad():
        for _ in range(n_new):
            out.append(int(engine.model(torch.tensor([out])).logits[0, -1].argmax()))
            if out[-1] in engine._ends:
                return out[len(ids) : -1]
    return out[len(ids) :]


@pytest.mark.parametrize("batch_size", [1, 3, 16, 0])
def test_slots_are_refilled_and_every_text_is_the_one_it_would_be_alone(tiny, batch_size):
    engine = Engine(tiny, dtype="float32", device="cpu", batch_size=batch_size)
    reqs = requests(engine, MORE)
    # an early end in the middle makes room at different times
    stop = int(alone(engine, reqs[3][1], 6)[-1])
    engine._ends.add(stop)
    found = generate(engine, reqs, n=2, max_new_tokens=BLOCK + 3)
    assert len(found) == 2 * len(reqs)
    for key, ids in reqs:
        expected = alone(engine, ids, BLOCK + 3)
        for i in range(2):
            assert found[f"{key}-{i}"].n_tokens == len(expected)
            assert found[f"{key}-{i}"].text == chat.decode(engine.tokenizer, expected)
    assert len({s.n_tokens for s in found.values()}) > 1, "all texts had one length: nothing was refilled"


@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_a_seed_gives_the_same_texts_for_any_batch_size(tiny, engine, batch_size):
    other = Engine(tiny, dtype="float32", device="cpu", batch_size=batch_size)
    kw = {"n": 3, "temperature": 0.1, "top_p": 0.9, "seed": 5, "max_new_tokens": 20}
    assert generate(engine, requests(engine, MORE), **kw) == generate(other, requests(other, MORE), **kw)


def test_models_that_are_not_plain_give_the_same_in_whole_batches(engine, monkeypatch):
    reqs, kw = requests(engine, MORE[:7]), {"n": 2, "temperature": 0.8, "top_p": 0.9, "max_new_tokens": 9}
    plain = generate(engine, reqs, **kw), sorted(r for b in engine.choice_probs(reqs, [5, 6, 7]) for r in b)
    monkeypatch.setattr(attention, "is_full", lambda *_: False)
    other = generate(engine, reqs, **kw), sorted(r for b in engine.choice_probs(reqs, [5, 6, 7]) for r in b)
    assert plain[0] == other[0]
    for (key, probs, mass), (other_key, other_probs, other_mass) in zip(plain[1], other[1], strict=True):
        assert key == other_key
        assert [*probs, mass] == pytest.approx([*other_probs, other_mass], abs=1e-5)


def test_what_prompts_share_is_read_once(engine):
    rubric = judge.Rubric("short")
    items = [
        {
            "id": f"{p}/{r}",
            "prompt": f"Name {p} fruits that grow in a garden.",
            "response": f"Apples, pears {'and ' * r}figs.",
        }
        for p in range(3)
        for r in range(4)
    ]
    calls = []
    hook = engine.model.model.register_forward_pre_hook(
        lambda m, args, kw: calls.append(kw.get("input_ids", args[0] if args else None).numel()), with_kwargs=True
    )
    scores = {r["id"]: r["score"] for b in judge.expected_scores(engine, rubric, items) for r in b}
    hook.remove()
    start, digits = judge.score_tokens(engine.tokenizer)
    in_full = 0
    for it in items:
        ids = chat.prompt_ids(engine.tokenizer, chat.user(rubric.render(it["prompt"], it["response"], "score_first")))
        in_full += len(ids + start)
        with torch.no_grad():
            p = engine.model(torch.tensor([ids + start])).logits[0, -1, digits].softmax(-1)
        assert scores[it["id"]] == pytest.approx(float(p @ torch.arange(6.0)), abs=1e-4)
    assert sum(calls) < 0.6 * in_full


def test_a_reading_knows_where_each_prompts_tokens_are(engine):
    """Keys copied into a slot are those of the prompt read alone, whatever it was packed with."""
    ids = [i for _, i in requests(engine, MORE)]
    with torch.inference_mode():
        for reading in read(engine.model, ids):
            slots = Slots(engine.model, len(reading.prompts), max(map(len, ids)) + 1)
            slots.put([[i] for i in range(len(reading.prompts))], reading)
            for i, number in enumerate(reading.prompts):
                own = engine.model(torch.tensor([ids[number]]), use_cache=True)
                n = len(ids[number])
                assert reading.lengths[i] == n == int(slots.lengths[i])
                torch.testing.assert_close(reading.logits[i], own.logits[0, -1], atol=1e-4, rtol=1e-4)
                for mine, theirs in zip(slots.layers, own.past_key_values.layers, strict=True):
                    torch.testing.assert_close(mine.keys[i, :, :n], theirs.keys[0], atol=1e-4, rtol=1e-4)
                    torch.testing.assert_close(mine.values[i, :, :n], theirs.values[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [BLOCK - 1, BLOCK, BLOCK + 1])
def test_slots_go_on_from_the_edge_of_a_block(engine, length):
    ids = (requests(engine)[4][1] * 4)[:length]
    with torch.inference_mode():
        (reading,) = read(engine.model, [ids, ids[:20]])
        slots = Slots(engine.model, 2, length + 5)
        slots.put([[0], [1]], reading)
        slots.keep(torch.tensor([reading.prompts.index(0)]))
        for token in (5, 6, 7):
            logits = slots.step(torch.tensor([token]), torch.tensor([True]))
            ids = [*ids, token]
            torch.testing.assert_close(logits[0], engine.model(torch.tensor([ids])).logits[0, -1], atol=1e-4, rtol=1e-4)


def test_logits_are_those_of_the_slots_that_are_alive(engine):
    ids = [i for _, i in requests(engine)[:3]]
    with torch.inference_mode():
        (reading,) = read(engine.model, ids)
        slots = Slots(engine.model, 3, max(map(len, ids)) + 2)
        slots.put([[i] for i in reading.prompts], reading)
        logits = slots.step(torch.tensor([5, 6, 7]), torch.tensor([True, False, True]))
        for row, i, token in ((0, 0, 5), (1, 2, 7)):
            alone = engine.model(torch.tensor([[*ids[i], token]])).logits[0, -1]
            torch.testing.assert_close(logits[row], alone, atol=1e-4, rtol=1e-4)
    assert len(logits) == 2 and slots.lengths.tolist() == [len(ids[0]) + 1, len(ids[1]), len(ids[2]) + 1]


def test_slots_are_given_back_when_all_texts_are_there(engine):
    gc.collect()
    gc.disable()  # a cycle would keep them until it runs
    try:
        generate(engine, requests(engine), n=2)
        assert not [x for x in gc.get_objects() if type(x) is Slots]
        texts = engine.generate(requests(engine), max_new_tokens=3, temperature=0, top_p=1.0, seed=0)
        next(texts)
        texts.close()  # in the middle
        assert not [x for x in gc.get_objects() if type(x) is Slots]
    finally:
        gc.enable()


def test_no_requests_give_no_texts(engine):
    assert generate(engine, []) == {}
    assert list(engine.choice_probs([], [1, 2])) == []


@pytest.mark.parametrize("n,dtype", [(1, torch.bfloat16), (1, torch.float32), (7, torch.bfloat16), (7, torch.float32)])
def test_grouped_attention_is_attention(n, dtype):
    q, k, v = (torch.randn(2, h, t, 16).to(dtype) for h, t in ((6, n), (2, 9), (2, 9)))
    mask = torch.zeros(2, 1, n, 9, dtype=dtype).masked_fill(torch.rand(2, 1, n, 9) < 0.3, torch.finfo(dtype).min)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True
    module.eval()
    out, _ = attention.grouped_attention(module, q, k, v, mask, scaling=0.25)
    k, v = (x.float().repeat_interleave(3, 1) for x in (k, v))
    expected = ((q.float() @ k.transpose(2, 3)) * 0.25 + mask.float()).softmax(-1) @ v
    torch.testing.assert_close(
        out.float(), expected.transpose(1, 2), **({"atol": 0.03, "rtol": 0.03} if dtype == torch.bfloat16 else {})
    )


class OnCuda(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize("kind", [torch.Tensor, OnCuda])
def test_a_mask_of_another_dtype_becomes_the_querys_and_stays_finite(monkeypatch, kind):
    """CUDA's fused attention takes no other; and a row that sees nothing must not become NaN."""
    q, k, v = (torch.randn(1, 2, 5, 16).bfloat16() for _ in range(3))
    mask = torch.zeros(1, 1, 5, 5).masked_fill(torch.ones(5, 5).triu(1) > 0, torch.finfo(torch.float32).min)
    mask[..., 0, :] = torch.finfo(torch.float32).min
    seen = []

    def sdpa(module, query, key, value, attention_mask, **kwargs):
        seen.append(attention_mask)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attention_mask), None

    monkeypatch.setattr(attention, "sdpa_attention_forward", sdpa)
    out, _ = attention.grouped_attention(torch.nn.Module().eval(), q.as_subclass(kind), k, v, mask)
    assert bool(torch.isfinite(out).all())
    assert [m.dtype for m in seen] == [torch.bfloat16] * (kind is OnCuda)
    assert all(bool(torch.isfinite(m).all()) for m in seen)


def test_sampling_in_chunks_and_of_float32_leaves_the_logits_as_they_are():
    logits, u = torch.randn(3 * sampling.CHUNK + 5, 500), torch.rand(3 * sampling.CHUNK + 5)
    before = logits.clone()
    together = sampling.sample(logits, u, 0.7, 0.9)
    assert torch.equal(logits, before)
    one_by_one = torch.cat([sampling.sample(logits[i : i + 1], u[i : i + 1], 0.7, 0.9) for i in range(len(u))])
    assert torch.equal(together, one_by_one)
