"""What is read from logits, and its gradient, are what torch computes on all of them in float32."""

import pytest
import torch

from srlm_utils import train, vocabulary
from tests.test_frozen import dpo, sft
from tests.test_train import params

N, VOCABULARY = 70, 300  # more rows than are read at once
CHOICES = (7, 8, 250)


def by_torch(logits, targets):
    log_probs = logits.float().log_softmax(-1)
    return {
        "log_probs": log_probs.gather(-1, targets[:, None]).squeeze(-1),
        "chosen": logits.float()[:, list(CHOICES)],
        "entropy": -(log_probs.exp() * log_probs).sum(-1),
        "mean_logits": logits.float().mean(-1),
        "is_top1": logits.argmax(-1) == targets,
    }


def gradient(logits, found):
    weights = torch.linspace(-2, 3, N)
    (found["log_probs"] @ weights + (found["chosen"].softmax(-1) @ torch.arange(3.0)) @ weights).backward()
    gradient, logits.grad = logits.grad, None
    return gradient


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_figures_and_gradients_are_those_of_torch(dtype, close):
    torch.manual_seed(0)
    logits = (4 * torch.randn(N, VOCABULARY)).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (N,))
    with torch.no_grad():
        logits[0, targets[0]], logits[1, targets[1]] = 30, -30  # sure, and all but impossible
        targets[2] = CHOICES[0]
    ours, theirs = vocabulary.read(logits, targets, CHOICES, figures=True)._asdict(), by_torch(logits, targets)
    assert theirs["is_top1"].any() and not theirs["is_top1"].all()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-5)  # figures are float32 in any case
    mine = gradient(logits, ours)
    assert mine.dtype == dtype
    torch.testing.assert_close(mine, gradient(logits, theirs), atol=close, rtol=close)


def test_gradients_go_through_what_is_asked_for_alone():
    logits = torch.randn(3, 8, requires_grad=True)
    found = vocabulary.read(logits, torch.tensor([1, 2, 3]), (4,), figures=True)
    assert [x.requires_grad for x in found] == [True, True, False, False, False]
    found.chosen[1].sum().backward()
    assert logits.grad.nonzero().tolist() == [[1, 4]]


def test_the_first_of_several_likeliest_tokens_is_top1():
    found = vocabulary.read(torch.tensor([[1.0, 1.0, 0.0]] * 3), torch.tensor([0, 1, 2]), figures=True)
    assert found.is_top1.tolist() == [True, False, False]


def test_large_logits_cost_no_precision():
    logits = (torch.randn(5, 40) + 1000).requires_grad_()
    targets = torch.arange(5)
    vocabulary.read(logits, targets).log_probs.sum().backward()
    exact = torch.nn.functional.one_hot(targets, 40) - logits.detach().double().softmax(-1)
    torch.testing.assert_close(logits.grad.double(), exact, atol=1e-6, rtol=0)


@pytest.mark.parametrize("make", [sft, dpo])
def test_adapters_learn_the_same_from_input_that_is_not_copied(tiny, tmp_path, monkeypatch, make):
    """To the bit; and with autocast alone: without it float32 adapters could not read bfloat16."""

    def step(folder, dtype):
        p = params(dtype=dtype, train_batch_size=8, micro_batch_size=8)
        torch.manual_seed(0)
        net, tok = train.load(tiny, p)
        trainer = make(net, tok, p, folder)
        with torch.no_grad():
            for name, weight in trainer.model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(len(name)))
        seen = []
        adapter = next(m for m in trainer.model.modules() if hasattr(m, "lora_A"))
        adapter.lora_A["default"].register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
        batch = next(iter(trainer.get_train_dataloader()))
        torch.manual_seed(1)
        with trainer.accelerator.autocast():
            loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        grads = {n: w.grad for n, w in trainer.model.named_parameters() if w.grad is not None}
        return loss, grads, seen[-1]

    loss, grads, seen = step(tmp_path / "as it comes", "bfloat16")
    assert seen == torch.bfloat16
    assert step(tmp_path / "float32", "float32")[2] == torch.float32
    monkeypatch.setattr(train, "as_it_comes", lambda _: None)
    by_peft = step(tmp_path / "copied", "bfloat16")
    assert by_peft[2] == torch.float32 and torch.equal(by_peft[0], loss)
    assert grads and all(torch.equal(by_peft[1][name], g) for name, g in grads.items())
