"""Keeping the frozen layers' output changes no figure of a training run and spares them every later pass."""

import pytest
import torch

from srlm_utils import frozen, train
from tests.test_packing import judgements
from tests.test_train import ANSWERS, PAIRS, FakeStep, params

EPOCHS = 3


def sft(net, tok, p, folder):
    texts = [{"prompt": q + str(i), "response": a} for i, (q, a) in enumerate(ANSWERS)]
    texts += judgements() + judgements(prompt="Name a town.", group="q")
    rows, _ = train.sft_rows(tok, texts, 512)
    return train.sft_trainer(net, tok, rows, p, folder)


def dpo(net, tok, p, folder):
    rows, _ = train.dpo_rows(tok, [pair | {"prompt": pair["prompt"] * (1 + i)} for i, pair in enumerate(PAIRS)], 512)
    return train.dpo_trainer(net, tok, rows, p, folder)


def losses(tiny, folder, make, **kw):
    """(the log's losses, weights that learned, tokens that each layer has read)."""
    extra = {"rank_weight": 1.0} if make is sft else {}
    p = params(epochs=EPOCHS, train_batch_size=8, micro_batch_size=8, lora_layers=1, **extra | kw)
    torch.manual_seed(0)
    net, tok = train.load(tiny, p)
    read = [0] * len(net.model.layers)
    for i, layer in enumerate(net.model.layers):  # what is inside a layer runs only where the layer computes
        layer.mlp.register_forward_pre_hook(lambda m, x, i=i: read.__setitem__(i, read[i] + x[0].shape[0]))
    trainer = make(net, tok, p, folder)
    log = train.train(trainer, FakeStep())
    weights = {n: w.detach() for n, w in trainer.model.named_parameters() if w.requires_grad}
    return log["loss"].tolist(), weights, read


@pytest.mark.parametrize("make", [sft, dpo])
def test_losses_and_weights_are_those_of_computing_every_pass(tiny, tmp_path, monkeypatch, make):
    kept = losses(tiny, tmp_path / "kept", make)
    monkeypatch.setattr(frozen, "free_memory", lambda: 0)  # no room
    computed = losses(tiny, tmp_path / "computed", make)
    assert kept[0] == pytest.approx(computed[0], abs=1e-5) and kept[0][0] != pytest.approx(kept[0][-1], abs=1e-3)
    for name, weight in computed[1].items():
        torch.testing.assert_close(kept[1][name], weight, atol=1e-5, rtol=1e-4)
    passes = EPOCHS + (make is dpo)  # the reference pass
    first, last = kept[2][0], kept[2][-1]
    assert computed[2][0] == last == passes * first


@pytest.mark.parametrize("why", [{"gradient_checkpointing": True}, {"lora_layers": 0}, {"epochs": 1}, {"lora_r": 0}])
def test_nothing_is_kept_where_layers_learn_or_are_read_once(tiny, tmp_path, why):
    p = params(**{"rank_weight": 0.0, "epochs": 2, "lora_layers": 1} | why)
    net, tok = train.load(tiny, p)
    assert sft(net, tok, p, tmp_path).kept is None


def test_nothing_is_kept_of_a_model_with_dropout(tiny, tmp_path):
    p = params(rank_weight=0.0, epochs=2, lora_layers=1)
    for name in ("attention_dropout", "hidden_dropout_prob", "resid_pdrop"):
        net, tok = train.load(tiny, p)
        setattr(net.config, name, 0.1)
        assert sft(net, tok, p, tmp_path).kept is None


def test_a_row_that_is_not_there_is_computed(tiny, tmp_path):
    """As after a restart in the middle of an epoch: some rows of a batch were never read by this process."""
    p = params(rank_weight=0.0, epochs=2, lora_layers=1)
    net, tok = train.load(tiny, p)
    trainer = sft(net, tok, p, tmp_path)
    batches = list(trainer.get_train_dataloader())
    twice = [trainer.compute_loss(trainer.model, dict(b)).item() for b in batches]
    known = dict(trainer.kept.rows)
    assert len(known) == len(trainer.data_collator.packed)
    for key in list(known)[::2]:
        del trainer.kept.rows[key]
    assert [trainer.compute_loss(trainer.model, dict(b)).item() for b in batches] == pytest.approx(twice, abs=1e-6)
    for key, row in known.items():
        torch.testing.assert_close(trainer.kept.rows[key], row, atol=1e-5, rtol=1e-4)
