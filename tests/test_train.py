import copy
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config

from srlm_utils import chat, train
from srlm_utils.errors import ParamError, StepFailed
from srlm_utils.params import Dpo, Sft

ANSWERS = [
    ("Name a fruit.", "Apples are a fine fruit."),
    ("Name a colour.", "Blue."),
    ("Why?", "Because it is so."),
] * 4
PAIRS = [
    {"prompt": q, "chosen": a, "rejected": "No no no no.", "chosen_ended": True, "rejected_ended": False}
    for q, a in ANSWERS
]


class FakeStep:
    """What `train.train` needs of a step."""

    def progress(self, total, unit):
        self.n = 0
        return self

    def update(self, n=1):
        self.n += n

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass


def params(**kw):
    values = (Sft if "rank_weight" in kw else Dpo)(
        **(
            {
                "device": "cpu",
                "dtype": "float32",
                "lora_r": 4,
                "lora_alpha": 8,
                "learning_rate": 1e-2,
                "final_learning_rate": 1e-3,
                "train_batch_size": 4,
                "micro_batch_size": 2,
                "save_steps": 0,
            }
            | kw
        )
    )
    return SimpleNamespace(**({"rank_weight": 0.0, "ift_epochs": 0} | values.model_dump()))


def test_loss_falls_on_the_assistants_tokens_alone(tiny, tmp_path):
    p = params()
    net, tok = train.load(tiny, p)
    rows, dropped = train.sft_rows(tok, [{"prompt": q, "response": a} for q, a in ANSWERS], 512)
    assert dropped == 0
    trainer = train.sft_trainer(net, tok, rows, p, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["attention_mask"].ndim == 2
    for ids, targets in zip(batch["input_ids"], batch["targets"], strict=True):
        target = targets[targets != -100].tolist()
        assert tok.decode(target).rstrip().endswith("<|im_end|>")
        assert tok.decode(target[:-1]) in {a for _, a in ANSWERS}
        first = int((targets != -100).nonzero()[0])
        assert tok.decode(ids[: first + 1]).endswith("<|im_start|>assistant\n")
    logits = net(batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=batch["position_ids"]).logits
    by_hand = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=-100)
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(by_hand.item(), rel=1e-4)


def test_a_step_is_the_mean_of_its_micro_batches(tiny, tmp_path):
    """Gradients of one step of four rows are those of two micro-batches of two, and of four of one."""
    grads = []
    for micro in (4, 2, 1):
        p = params(lora_r=0, train_batch_size=4, micro_batch_size=micro, learning_rate=1e-6)
        net, tok = train.load(tiny, p)
        same_length = [{"prompt": q, "response": "One two three."} for q in ("A?", "B?", "C?", "D?")]
        rows, _ = train.sft_rows(tok, same_length, 512)
        trainer = train.sft_trainer(net, tok, rows, p, tmp_path / str(micro))
        log = train.train(trainer, FakeStep())
        assert len(log) == 1
        grads.append((log.loss.iloc[0], log.grad_norm.iloc[0]))
    assert grads[1] == pytest.approx(grads[0], rel=1e-3) and grads[2] == pytest.approx(grads[0], rel=1e-3)


def test_rows_that_are_too_long_are_dropped_and_counted(tiny):
    _, tok = train.load(tiny, params())
    rows, dropped = train.sft_rows(
        tok, [{"prompt": "x", "response": "word " * 200}, {"prompt": "x", "response": "y"}], 64
    )
    assert (len(rows), dropped) == (1, 1)
    rows, dropped = train.dpo_rows(tok, [PAIRS[0] | {"rejected": "word " * 200}, PAIRS[1]], 64)
    assert (len(rows), dropped) == (1, 1)


def test_a_cut_off_answer_is_trained_without_an_end(tiny):
    _, tok = train.load(tiny, params())
    row = train.dpo_rows(tok, PAIRS[:1], 512)[0][0]
    assert row["chosen_ids"][-1] == chat.end_of_turn(tok)
    assert row["rejected_ids"] == chat.text_ids(tok, "No no no no.")


def test_every_row_comes_once_an_epoch():
    order = train.batch_order(list(range(30)), 4, 2, seed=1)
    assert sorted(order[:30]) == sorted(order[30:]) == list(range(30))
    assert order[:30] != order[30:]


def log_probs(model, prompt, answer):
    """Sum of the answer's token log-probabilities, by hand."""
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        lp = model(ids).logits[0, :-1].log_softmax(-1)
    return sum(float(lp[i - 1, ids[0, i]]) for i in range(len(prompt), ids.shape[1]))


@pytest.fixture(scope="module")
def m1(tiny, tmp_path_factory):
    """A model that differs from M0, saved; its config still names M0, as a merged model's may."""
    folder = tmp_path_factory.mktemp("m1") / "model"
    p = params(dtype="bfloat16", learning_rate=2e-2)
    net, tok = train.load(tiny, p)
    rows, _ = train.sft_rows(tok, [{"prompt": q, "response": a} for q, a in ANSWERS], 512)
    trainer = train.sft_trainer(net, tok, rows, p, folder.parent)
    train.train(trainer, FakeStep())
    train.save(trainer.model, tok, folder, p, card="# M1\n")
    return folder


@pytest.mark.parametrize("lora_r", [4, 0])
def test_the_reference_policy_is_the_starting_model(tiny, m1, tmp_path, lora_r):
    p = params(lora_r=lora_r)
    net, tok = train.load(str(m1), p)
    net.config._name_or_path = tiny  # trl's own default would reload the reference from here
    rows, _ = train.dpo_rows(tok, PAIRS, 512)
    trainer = train.dpo_trainer(net, tok, rows, p, tmp_path)
    start = AutoModelForCausalLM.from_pretrained(m1, dtype=torch.float32)
    other = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    for row in trainer.train_dataset.select(range(3)):
        for side in ("chosen", "rejected"):
            by_hand = log_probs(start, row["prompt_ids"], row[f"{side}_ids"])
            assert row[f"ref_{side}_logps"] == pytest.approx(by_hand, rel=1e-3)
            assert abs(by_hand - log_probs(other, row["prompt_ids"], row[f"{side}_ids"])) > 0.5  # M0 is not M1
    log = train.train(trainer, FakeStep())
    assert log.loss.iloc[0] == pytest.approx(math.log(2), abs=1e-4)  # policy = reference at the start
    assert log["rewards/margins"].iloc[0] == pytest.approx(0, abs=1e-4)
    assert log.loss.iloc[-1] < math.log(2)


@pytest.mark.parametrize("lora_r,dtype", [(4, "float32"), (0, "float32"), (4, "bfloat16")])
def test_saved_weights_are_the_trained_ones(tiny, tmp_path, lora_r, dtype):
    p = params(lora_r=lora_r, dtype=dtype)
    net, tok = train.load(tiny, p)
    start = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    rows, _ = train.sft_rows(tok, [{"prompt": q, "response": a} for q, a in ANSWERS], 512)
    trainer = train.sft_trainer(net, tok, rows, p, tmp_path)
    train.train(trainer, FakeStep())
    ids = torch.tensor([chat.prompt_ids(tok, chat.user("Name a fruit."))])
    with torch.no_grad():
        before = start(ids).logits
        trained = trainer.model.float()(ids).logits
        train.save(trainer.model, tok, tmp_path / "model", p, card="# card\n")
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)(ids).logits
    change = float((trained - before).norm())
    assert change > 0.1
    assert float((saved - trained).norm()) < (1e-3 if dtype == "float32" else 0.2) * change
    assert (tmp_path / "model" / "README.md").read_text() == "# card\n"
    assert not list((tmp_path / "model").glob("*.bin"))


def test_dropout_without_adapters_is_that_of_attention_and_is_not_saved(tiny, tmp_path):
    shutil.copytree(tiny, dropping := tmp_path / "dropping")
    own = json.loads((dropping / "config.json").read_text())
    (dropping / "config.json").write_text(json.dumps(own | {"attention_dropout": 0.9}))
    ids = torch.tensor([[5, 6, 7, 8]])
    for folder, dropout in ((tiny, 0.9), (tiny, 0.0), (dropping, 0.0)):
        net, _ = train.load(str(folder), params(lora_r=0, dropout=dropout))
        net.train()
        with torch.no_grad():
            assert torch.equal(net(ids).logits, net(ids).logits) == (dropout == 0)
        net.save_pretrained(tmp_path / "saved")
        saved = json.loads((tmp_path / "saved/config.json").read_text())
        assert saved["attention_dropout"] == (0.0 if folder == tiny else 0.9)


def test_adapters_on_the_last_layers_leave_the_first_alone(tiny, tmp_path):
    p = params(lora_layers=1)
    net, tok = train.load(tiny, p)
    start = {n: x.clone() for n, x in net.named_parameters()}
    rows, _ = train.sft_rows(tok, [{"prompt": q, "response": a} for q, a in ANSWERS], 512)
    trainer = train.sft_trainer(net, tok, rows, p, tmp_path)
    train.train(trainer, FakeStep())
    plain = train.merged(trainer.model, "float32", 0)
    changed = {n for n, x in plain.named_parameters() if not torch.equal(x, start[n])}
    last = net.config.num_hidden_layers - 1
    assert changed and all(f".layers.{last}." in n for n in changed)
    assert {n.split(".")[-2] for n in changed} >= {"q_proj", "o_proj", "down_proj"}
    with pytest.raises(ParamError, match="lora_layers = 99: this model has"):
        train.lora_config(net, params(lora_layers=99))


def test_rounding_keeps_an_update_that_nearest_loses():
    start = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    update = 1e-4 * torch.ones_like(start)
    kept = train.round_to_bfloat16(start + update, torch.Generator().manual_seed(0)).float() - start
    nearest = (start + update).bfloat16().float() - start
    assert float(nearest.mean()) < 0.5e-4
    assert float(kept.mean()) == pytest.approx(1e-4, rel=0.1)
    assert torch.equal(train.round_to_bfloat16(start, torch.Generator()).float(), start)  # exact values stay


@pytest.mark.parametrize("lora_r", [4, 0])
def test_a_model_is_rounded_weight_by_weight_and_ties_stay(tiny, monkeypatch, lora_r):
    """The same bits as if all weights were rounded side by side, which takes half as much memory again."""
    p = params(lora_r=lora_r, dtype="bfloat16")
    net, _ = train.load(tiny, p)
    net.lm_head.weight = net.get_input_embeddings().weight
    if lora_r:
        net = train.get_peft_model(net, train.lora_config(net, p))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for w in net.parameters():
            w.add_(0.01 * torch.randn(w.shape, generator=generator))
    whole = copy.deepcopy(net).float()
    whole = whole.merge_and_unload() if lora_r else whole
    generator = torch.Generator().manual_seed(7)
    expected = {n: train.round_to_bfloat16(w.detach(), generator) for n, w in whole.named_parameters()}
    base, to_do, of_one = net.get_base_model() if lora_r else net, [], train.round_to_bfloat16

    def counted(w, generator):
        to_do.append(sum(w.dtype == torch.float32 for w in base.parameters()))
        return of_one(w, generator)

    monkeypatch.setattr(train, "round_to_bfloat16", counted)
    plain = train.merged(net, "bfloat16", 7)
    assert to_do == list(range(len(expected), 0, -1))
    assert plain.lm_head.weight is plain.get_input_embeddings().weight
    found = dict(plain.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], w) and found[n].dtype == torch.bfloat16 for n, w in expected.items())


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("four_bit", [True, False])
def test_adapters_of_a_model_in_4_bits_learn_in_float32(tiny, tmp_path, kind, four_bit):
    """bitsandbytes needs a GPU: here the model says of itself that it is in 4 bits, and its base stays as it was."""
    p = params(dtype="bfloat16")
    net, tok = train.load(tiny, p)
    net.is_loaded_in_4bit = four_bit
    if kind == "sft":
        rows, _ = train.sft_rows(tok, [{"prompt": q, "response": a} for q, a in ANSWERS], 512)
        trainer = train.sft_trainer(net, tok, rows, p, tmp_path)
    else:
        trainer = train.dpo_trainer(net, tok, train.dpo_rows(tok, PAIRS, 512)[0], p, tmp_path)
    assert trainer.optimizer is None
    learning = {w.dtype for w in trainer.model.parameters() if w.requires_grad}
    frozen = {w.dtype for w in trainer.model.parameters() if not w.requires_grad}
    assert (learning, frozen) == ({torch.float32}, {torch.bfloat16})


def test_a_batch_that_does_not_divide_is_refused(tiny, tmp_path):
    p = params(train_batch_size=4, micro_batch_size=3)
    net, tok = train.load(tiny, p)
    rows, _ = train.sft_rows(tok, [{"prompt": "x", "response": "y"}] * 4, 512)
    with pytest.raises(ParamError, match="micro_batch_size"):
        train.sft_trainer(net, tok, rows, p, tmp_path)


def judgement(digit):
    more = {"format": "score_first", "score": digit, "rank": 5 - digit, "group": "g", "prompt_id": f"j{digit}"}
    return {"prompt": f"Judge: {digit}", "response": ""} | more


def test_ift_comes_once_more_at_the_end(tiny, tmp_path):
    """Passes over the answers alone follow those over all rows, and the cosine begins anew for them."""
    answers = [{"prompt": q, "response": a} for q, a in ANSWERS]  # three steps a pass
    logs = {}
    for passes in (0, 2):
        p = params(rank_weight=0.0, ift_epochs=passes, epochs=2, warmup_steps=2)
        net, tok = train.load(tiny, p)
        rows, _ = train.sft_rows(tok, [*answers, *map(judgement, (1, 4))], 512)
        trainer = train.sft_trainer(net, tok, rows, p, tmp_path / str(passes))
        logs[passes] = train.train(trainer, FakeStep())
    once, more = logs[0], logs[2]
    n, m = len(once), len(more)
    assert m == n + 6 and more.score_loss.notna().any() and more.score_loss[-6:].isna().all()
    assert more.learning_rate[:n].tolist() == pytest.approx(once.learning_rate.tolist(), rel=1e-6)
    assert more.loss[:n].tolist() == pytest.approx(once.loss.tolist(), rel=1e-5)
    rates = more.learning_rate[n:].tolist()
    assert rates[0] == pytest.approx(1e-2) and rates == sorted(rates, reverse=True) and 1e-3 < rates[-1] < 2e-3


@pytest.mark.parametrize("more", [{"epochs": 2}, {"rank_weight": 0.0, "ift_epochs": 1}])
def test_training_continues_from_its_checkpoint(tiny, tmp_path, more):
    def run(folder, stop_at=None):
        p = params(save_steps=2, **more)
        net, tok = train.load(tiny, p)
        rows, _ = train.sft_rows(tok, [{"prompt": q, "response": a} for q, a in ANSWERS], 512)
        trainer = train.sft_trainer(net, tok, rows, p, folder)
        if stop_at:
            from transformers import TrainerCallback

            class Stop(TrainerCallback):
                def on_step_begin(self, args, state, control, **kw):
                    if state.global_step == stop_at:
                        raise KeyboardInterrupt

            trainer.add_callback(Stop())
        return train.train(trainer, FakeStep())

    whole = run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", stop_at=3)
    assert [d.name for d in (tmp_path / "b" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    continued = run(tmp_path / "b")
    assert continued.step.tolist() == whole.step.tolist() == [1, 2, 3, 4, 5, 6]
    assert continued.loss.tolist() == pytest.approx(whole.loss.tolist(), rel=1e-4)
    assert continued.learning_rate.tolist() == pytest.approx(whole.learning_rate.tolist())


def test_a_trainer_without_a_checkpoint_does_not_begin_from_what_it_has_learned(tiny, tmp_path):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == 2:
                raise KeyboardInterrupt

    net, tok = train.load(tiny, p := params(save_steps=0))
    trainer = train.dpo_trainer(net, tok, train.dpo_rows(tok, PAIRS, 512)[0], p, tmp_path)
    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        train.train(trainer, FakeStep())
    trainer.remove_callback(Stop)
    with pytest.raises(StepFailed, match="stopped at step 2 and has no checkpoint"):
        train.train(trainer, FakeStep())


def test_adapters_find_the_layers_of_other_kinds_of_models():
    small = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 16, "n_positions": 16}
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(**small))
    config = train.lora_config(gpt2, params(lora_layers=1))
    # a model of images and text has its layers in a config of their own
    inner = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=2))
    both = SimpleNamespace(config=inner, named_modules=gpt2.named_modules, get_output_embeddings=lambda: gpt2.lm_head)
    assert train.lora_config(both, params(lora_layers=1)).layers_to_transform == [1]
    names = {n for n, w in get_peft_model(gpt2, config).named_parameters() if w.requires_grad}
    assert names and all(".h.1." in n for n in names) and any("c_attn" in n for n in names)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_loss_that_is_no_number_stops_the_step_and_names_its_rows(tiny, tmp_path, kind):
    """Before a checkpoint holds it; transformers would log the mean of the losses before instead."""
    p = params(save_steps=1, micro_batch_size=1, train_batch_size=2)
    net, tok = train.load(tiny, p)
    if kind == "sft":
        data = [{"prompt_id": f"p{i}", "prompt": q, "response": a} for i, (q, a) in enumerate(ANSWERS)]
        trainer = train.sft_trainer(net, tok, train.sft_rows(tok, data, 512)[0], p, tmp_path)
    else:
        data = [r | {"prompt_id": f"p{i}"} for i, r in enumerate(PAIRS)]
        trainer = train.dpo_trainer(net, tok, train.dpo_rows(tok, data, 512)[0], p, tmp_path)
    seen, loss = [], trainer.compute_loss

    def spoilt(model, inputs, *args, **kw):
        seen.append(loss(model, inputs, *args, **kw))
        out = seen[-1]
        return out * math.nan if len(seen) == 4 else out  # the second micro-batch of step 2

    trainer.compute_loss = spoilt
    with pytest.raises(StepFailed, match=r"(loss|grad_norm) became nan at step 2, on rows p\d+, p\d+\. Look") as e:
        train.train(trainer, FakeStep())
    expected = [i for batch in trainer.row_ids[2:4] for i in batch]
    assert ", ".join(expected) in str(e.value)
    assert [d.name for d in (tmp_path / "checkpoints").glob("checkpoint-*")] == ["checkpoint-1"]


def test_training_goes_on_from_the_newest_checkpoint_that_is_whole(tmp_path):
    """What is written last is the trainer's state, and a death may leave the beginning of it."""
    assert train.last_checkpoint(tmp_path) is None
    for step, state in ((10, '{"global_step": 10}'), (20, ""), (30, '{"global_st'), (40, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert train.last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
