"""Packed sequences compute what their rows compute alone."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from srlm_utils import attention, chat, eft, judge, packing, train
from srlm_utils.errors import DataError, ParamError
from tests.test_train import params

REPLIES = ["Blue is a colour.", "Blue.", "I like the sea and the sky.", "Blue is a fruit, blue blue."]


def judgements(replies=REPLIES, prompt="Name a colour.", group="p"):
    rows = [
        {
            "prompt_id": group,
            "reply_id": str(i),
            "rank": i,
            "prompt": prompt,
            "reply": reply,
            "score": 5 - i,
            "justification": f"It names {i} colours.",
        }
        for i, reply in enumerate(replies)
    ]
    return eft.training_rows(rows, judge.Rubric("short"), list(judge.FORMATS))


def load(tiny):
    net = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    attention.use(net)
    return net


@pytest.fixture
def net(tiny):
    return load(tiny)


def trainer_of(tiny, net, rows, tmp_path, **kw):
    p = params(**{"lora_r": 0, "train_batch_size": 16, "micro_batch_size": 16} | kw)
    tok = chat.load_tokenizer(tiny)
    made, dropped = train.sft_rows(tok, rows, 2048)
    assert not dropped
    return train.sft_trainer(net, tok, made, p, tmp_path), made


def test_a_packed_sequence_reads_what_is_shared_once(tiny):
    tok = chat.load_tokenizer(tiny)
    rows, _ = train.sft_rows(tok, judgements(), 2048)
    (packed,) = packing.sequences(rows, 8)
    assert len(packed["input_ids"]) < 0.5 * sum(len(r["input_ids"]) for r in rows)
    assert packed["n_rows"] == 8 and sum(r != packing.NO_RANK for r in packed["ranks"]) == 4
    for i, parent in enumerate(packed["parents"]):
        assert parent < i and packed["positions"][i] == (packed["positions"][parent] + 1 if parent >= 0 else 0)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_every_row_can_be_read_back_from_its_sequence(tiny, size):
    tok = chat.load_tokenizer(tiny)
    rows, _ = train.sft_rows(tok, judgements() + [{"prompt": "Hi?", "response": "Hello."}], 2048)
    seen = []
    assert max(s["n_rows"] for s in packing.sequences(rows, size)) == size
    for s in packing.sequences(rows, size):
        children = set(s["parents"])
        for leaf in (i for i in range(len(s["parents"])) if i not in children):
            path, at = [], leaf
            while at >= 0:
                path.append(at)
                at = s["parents"][at]
            ids = [s["input_ids"][i] for i in reversed(path)]
            targets = [s["targets"][i] for i in reversed(path)]
            seen.append((ids + [targets[-1]], [t for t in targets if t != packing.NO_TARGET]))
    expected = [(r["input_ids"], [t for t in r["labels"] if t != -100]) for r in rows]
    assert sorted(seen) == sorted(expected)


def alone(net, rows):
    """Mean cross-entropy over text tokens and over digits, each row by itself with nothing shared."""
    text, digits = [], []
    for r in rows:
        ids, labels = torch.tensor([r["input_ids"]]), torch.tensor(r["labels"])
        nll = torch.nn.functional.cross_entropy(net(ids).logits[0, :-1], labels[1:], reduction="none")
        (digits if r["kind"] == "score_first" else text).append(nll[labels[1:] != -100])
    return torch.cat(text).mean(), torch.cat(digits).mean()


def test_loss_and_gradients_are_those_of_the_rows_alone(tiny, net, tmp_path):
    trainer, rows = trainer_of(tiny, net, judgements() + judgements(REPLIES[:2], "Name a shape.", "q"), tmp_path)
    net.eval()
    sum(alone(net, rows)).backward()
    by_hand = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    (batch,) = trainer.get_train_dataloader()
    assert batch["attention_mask"].ndim == 4 and len(batch["input_ids"]) == 2
    loss = trainer.compute_loss(net, dict(batch))
    loss.backward()
    with torch.no_grad():
        assert loss.item() == pytest.approx(float(sum(alone(net, rows))), abs=1e-5)
    for name, p in net.named_parameters():
        if name in by_hand:
            torch.testing.assert_close(p.grad, by_hand[name], atol=1e-5, rtol=1e-4)


def test_the_ranking_loss_is_of_expected_scores_within_a_prompt(tiny, net, tmp_path):
    trainer, rows = trainer_of(
        tiny, net, judgements() + judgements(REPLIES[:2], "Name a shape.", "q"), tmp_path, rank_weight=0.5
    )
    (batch,) = trainer.get_train_dataloader()
    net.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(net, dict(batch)).item()
        tok = chat.load_tokenizer(tiny)
        digits = judge.score_tokens(tok)[1]
        scores = {}
        for r in (r for r in rows if r["kind"] == "score_first"):
            probs = net(torch.tensor([r["input_ids"][:-1]])).logits[0, -1, digits].softmax(-1)
            scores.setdefault(r["group"], {})[r["rank"]] = float(probs @ torch.arange(6.0))
        gaps = [s[a] - s[b] for s in scores.values() for a in s for b in s if a < b]
        rank_loss = sum(float(torch.nn.functional.softplus(torch.tensor(-2.0 * g))) for g in gaps) / len(gaps)
        assert len(gaps) == 7  # six pairs of four replies, one of two; none between prompts
        assert loss == pytest.approx(float(sum(alone(net, rows))) + 0.5 * rank_loss, abs=1e-4)
    logged = trainer._metrics["train"]
    assert logged["rank_loss"][-1] == pytest.approx(rank_loss, abs=1e-4)
    assert logged["rank_accuracy"][-1] == pytest.approx(sum(g > 0 for g in gaps) / 7)


def test_equal_ranks_make_no_pair():
    logits, targets, one = torch.randn(3, 8), torch.tensor([1, 2, 3]), torch.zeros(3, dtype=torch.long)
    same = train.supervised_losses(logits, targets, torch.tensor([0, 0, 0]), one, [0, 1, 2, 3, 4, 5], 1.0)
    assert set(same) == {"score_loss"}
    two = train.supervised_losses(logits, targets, torch.tensor([0, 0, 1]), one, [0, 1, 2, 3, 4, 5], 1.0)
    assert set(two) == {"score_loss", "rank_loss", "rank_accuracy"}


def test_training_learns_an_order_that_only_the_ranks_give(tiny, tmp_path):
    rows = [r for r in judgements() if r["format"] == "score_first"]
    for i, r in enumerate(rows):
        r["score"] = i % 2  # the digits say nothing of the order
    net = load(tiny)
    trainer, _ = trainer_of(tiny, net, rows, tmp_path, rank_weight=20.0, epochs=30, learning_rate=3e-3)
    trainer.train()
    accuracy = [r["rank_accuracy"] for r in trainer.state.log_history if "rank_accuracy" in r]
    assert accuracy[0] < accuracy[-1] == 1.0


def test_a_ranking_loss_without_anything_to_compare_is_an_error(tiny, tmp_path):
    net = load(tiny)
    unscored = [r for r in judgements() if r["format"] == "justify_first"]
    with pytest.raises(ParamError, match="rank_weight = 1: no judgement begins .* put score_first into"):
        trainer_of(tiny, net, unscored, tmp_path, rank_weight=1.0)
    for micro in (1, 4):
        with pytest.raises(ParamError, match=f"up to 8 judgements .* holds {micro}: raise micro_batch_size to 8"):
            trainer_of(tiny, net, judgements(), tmp_path, rank_weight=1.0, micro_batch_size=micro)
    trainer_of(tiny, net, judgements(), tmp_path, rank_weight=1.0, micro_batch_size=8)
    answers = [{"prompt": "Hi?", "response": "Hello."}]  # the SFT baseline has nothing to rank, and that is fine
    trainer_of(tiny, net, answers, tmp_path, rank_weight=1.0)


def test_micro_batches_hold_one_kind_and_every_sequence_once_an_epoch():
    packed = [{"input_ids": [0] * n, "kind": "ift", "n_rows": 1} for n in range(17)]
    packed += [{"input_ids": [0] * (50 + n), "kind": "eft", "n_rows": 8} for n in range(5)]
    batches = packing.micro_batches(packed, 8, range(2), seed=1)
    assert sorted(i for b in batches for i in b) == sorted(2 * list(range(22)))
    assert all(len({packed[i]["kind"] for i in b}) == 1 for b in batches)
    assert all(sum(packed[i]["n_rows"] for i in b) <= 8 for b in batches)
    assert len(batches) == 2 * (3 + 5)
    again, other = (packing.micro_batches(packed, 8, range(2), seed=seed) for seed in (1, 2))
    assert batches == again != other
    answers = packing.micro_batches(packed, 8, range(2, 4), seed=1, kinds=("ift",))
    assert sorted(i for b in answers for i in b) == sorted(2 * [i for i, s in enumerate(packed) if s["kind"] == "ift"])


def test_micro_batches_are_of_similar_length_and_of_another_order_each_epoch():
    packed = [{"input_ids": [0] * n, "kind": "ift" if n % 4 else "eft", "n_rows": 1} for n in range(64)]
    first, second = (packing.micro_batches(packed, 4, range(e, e + 1), seed=1) for e in range(2))
    assert packing.micro_batches(packed, 4, range(2), seed=1) == first + second  # and so it continues from any epoch
    assert first != second and sorted(map(sorted, first)) != sorted(map(sorted, second))
    for batches in (first, second):
        kinds = [packed[b[0]]["kind"] for b in batches]
        assert kinds != sorted(kinds) != kinds[::-1]  # neither kind is learned before the other
        # four answers among 32 that were drawn from 48 lengths span a dozen at most, any four of 48 far more
        spans = [len(packed[b[-1]]["input_ids"]) - len(packed[b[0]]["input_ids"]) for b in batches]
        assert sum(spans) / len(spans) < 16 and min(spans) >= 0


def test_packing_computes_the_same_under_autocast(tiny, net, tmp_path):
    """As training in bfloat16 does it: float32 weights stand in for the adapters' base."""
    trainer, rows = trainer_of(tiny, net, judgements(), tmp_path)
    (batch,) = trainer.get_train_dataloader()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert bool(batch["attention_mask"].bfloat16().isfinite().all())
        assert trainer.compute_loss(net, dict(batch)).item() == pytest.approx(float(sum(alone(net, rows))), abs=0.02)


def test_kernels_use_one_gpu_at_most():
    for n, kept in ((0, 0), (1, 1), (8, 1)):
        args = SimpleNamespace(n_gpu=n)
        train._one_device(args)
        assert args._n_gpu == kept


@pytest.mark.parametrize(
    "config,shares",
    [
        ({}, True),
        ({"sliding_window": 64}, False),
        ({"sliding_window": 2048}, True),
        ({"layer_types": ["full_attention", "sliding_attention"]}, True),
        ({"layer_types": ["full_attention", "linear_attention"]}, False),
        ({"attention_chunk_size": 64}, False),
        ({"_attn_implementation": "sdpa"}, False),
    ],
)
def test_only_plain_attention_shares(config, shares):
    text = SimpleNamespace(**{"_attn_implementation": "grouped"} | config)
    assert attention.is_full(SimpleNamespace(get_text_config=lambda: text), 2048) is shares


def test_rows_of_an_older_version_are_named(tiny):
    old = [{k: v for k, v in r.items() if k != "rank"} for r in judgements()]
    with pytest.raises(DataError, match="row p/0/score_first has no rank.*03_build_eft"):
        train.sft_rows(chat.load_tokenizer(tiny), old, 2048)


def test_a_window_shorter_than_a_row_is_not_packed(tiny, net, tmp_path):
    rows = judgements()
    trainer, _ = trainer_of(tiny, net, rows, tmp_path)
    assert len(trainer.data_collator.packed) == 1
    net.config.sliding_window = 64
    trainer, _ = trainer_of(tiny, net, rows, tmp_path)
    assert len(trainer.data_collator.packed) == len(rows)
    (batch,) = trainer.get_train_dataloader()
    assert batch["attention_mask"].ndim == 2
    with pytest.raises(ParamError, match="lower max_length to its window"):
        trainer_of(tiny, net, rows, tmp_path, rank_weight=1.0)
