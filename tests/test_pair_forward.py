"""Reading a pair's prompt once gives trl the figures it would compute itself."""

import pytest
import torch

from srlm_utils import attention, train
from tests.test_train import ANSWERS, params

PAIRS = [
    {"prompt": q, "chosen": a, "rejected": r, "chosen_ended": True, "rejected_ended": i % 2 == 0}
    for i, ((q, a), r) in enumerate(
        zip(
            ANSWERS[:3],
            ["Apples are no.", "A longer answer that says nothing at all.", "Because it is so. Yes."],
            strict=True,
        )
    )
]


def one_step(tiny, folder, monkeypatch, share, lora_r, **more):
    monkeypatch.setattr(attention, "is_full", lambda *_: share)
    p = params(lora_r=lora_r, train_batch_size=3, micro_batch_size=3, **more)
    torch.manual_seed(0)
    net, tok = train.load(tiny, p)
    rows, _ = train.dpo_rows(tok, PAIRS, 512)
    trainer = train.dpo_trainer(net, tok, rows, p, folder)
    for name, weight in trainer.model.named_parameters():  # away from the reference, where the loss is log 2
        if weight.requires_grad:
            with torch.no_grad():
                weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    (batch,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    grads = {n: w.grad for n, w in trainer.model.named_parameters() if w.grad is not None}
    refs = [trainer.train_dataset["ref_chosen_logps"], trainer.train_dataset["ref_rejected_logps"]]
    return loss.item(), grads, refs, {k: v[-1] for k, v in trainer._metrics["train"].items()}


@pytest.mark.parametrize("lora_r", [0, 4])
def test_loss_gradients_and_metrics_are_those_of_trl(tiny, tmp_path, monkeypatch, lora_r):
    theirs = one_step(tiny, tmp_path / "trl", monkeypatch, False, lora_r)
    ours = one_step(tiny, tmp_path / "kit", monkeypatch, True, lora_r)
    assert ours[0] == pytest.approx(theirs[0], abs=1e-5) and abs(ours[0] - 0.6931) > 1e-4
    assert set(ours[1]) == set(theirs[1])
    for name, grad in theirs[1].items():
        torch.testing.assert_close(ours[1][name], grad, atol=1e-5, rtol=1e-3)
    for mine, other in zip(ours[2], theirs[2], strict=True):
        torch.testing.assert_close(torch.tensor(list(mine)), torch.tensor(list(other)), atol=1e-4, rtol=1e-5)
    for name in theirs[3]:
        assert ours[3][name] == pytest.approx(theirs[3][name], rel=1e-3, abs=1e-4), name


def test_the_likelihood_of_chosen_answers_is_added_by_its_weight(tiny, tmp_path, monkeypatch):
    with_nll = {share: one_step(tiny, tmp_path / f"{share}", monkeypatch, share, 4, nll_weight=0.5) for share in (0, 1)}
    assert with_nll[1][0] == pytest.approx(with_nll[0][0], abs=1e-5)
    for name, grad in with_nll[0][1].items():
        torch.testing.assert_close(with_nll[1][1][name], grad, atol=1e-5, rtol=1e-3)
    alone = one_step(tiny, tmp_path / "alone", monkeypatch, True, 4)
    metrics, tok = with_nll[1][3], train.load(tiny, params())[1]
    rows, _ = train.dpo_rows(tok, PAIRS, 512)
    nll = -len(rows) * metrics["logps/chosen"] / sum(len(r["chosen_ids"]) for r in rows)
    assert with_nll[1][0] - alone[0] == pytest.approx(0.5 * nll, rel=1e-4)


def test_the_vocabulary_sees_answers_alone_and_prompts_are_read_once(tiny, tmp_path):
    p = params(train_batch_size=3, micro_batch_size=3)
    net, tok = train.load(tiny, p)
    rows, _ = train.dpo_rows(tok, PAIRS, 512)
    trainer = train.dpo_trainer(net, tok, rows, p, tmp_path)
    shapes = []
    trainer.model.get_base_model().lm_head.register_forward_pre_hook(lambda m, args: shapes.append(args[0].shape))
    read = []
    trainer.model.get_base_model().model.register_forward_pre_hook(
        lambda m, args, kw: read.append((kw["position_ids"] > 0).sum().item() + len(rows)), with_kwargs=True
    )
    (batch,) = trainer.get_train_dataloader()
    trainer.compute_loss(trainer.model, dict(batch))
    answers = sum(len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows)
    assert shapes[0][0] == answers - len(rows)  # both answers' first tokens are predicted at one place
    assert read[0] == sum(len(r["prompt_ids"]) for r in rows) + answers - 2 * len(rows)  # the last predicts nothing
