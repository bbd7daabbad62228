"""Memory that runs out in the middle: batches are halved, texts stay what they are, and what cannot fit is named."""

import math
import re
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from srlm_utils import attention, train
from srlm_utils.engine import Engine
from srlm_utils.errors import DataError, ResourceError
from srlm_utils.resources import out_of_memory
from tests.test_engine import PROMPTS, requests
from tests.test_train import ANSWERS, PAIRS, FakeStep, params

MORE = PROMPTS * 2


class Allocator(TorchDispatchMode):
    """A machine on which no result may have more than `most` bytes: torch's own error of a CPU, or of a GPU.

    `largest` are the bytes of the largest that was asked for.
    """

    def __init__(self, most: float = math.inf, error=RuntimeError):
        super().__init__()
        self.most, self.error, self.n_refused, self.largest = most, error, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                n = t.numel() * t.element_size()
                self.largest = max(self.largest, n)
                if n > self.most:
                    self.n_refused += 1
                    raise self.error(f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {n} bytes.")
        return out


def small(tiny, batch_size=0):
    return Engine(tiny, dtype="float32", device="cpu", batch_size=batch_size)


def sampled(engine, n=2):
    how = {"n": n, "max_new_tokens": 6, "temperature": 0.9, "top_p": 0.9, "seed": 3}
    return {s.key: s for batch in engine.generate(requests(engine, MORE), **how) for s in batch}


def chosen(engine):
    return {key: row for b in engine.choice_probs(requests(engine, MORE), [5, 6, 7]) for key, *row in b}


def likely(engine):
    asked = [(key, ids, [5, 6, 7]) for key, ids in requests(engine, MORE)]
    return {key: row for b in engine.target_logprobs(asked) for key, row in b}


def measured(ask, tiny, batch_size):
    """What an engine of that batch size gives, and the bytes of the largest result on its way."""
    engine = small(tiny, batch_size)
    with Allocator() as machine:
        return ask(engine), machine.largest


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, MemoryError])
def test_a_batch_that_does_not_fit_is_halved_until_it_does(tiny, monkeypatch, capsys, plain, error):
    if not plain:
        monkeypatch.setattr(attention, "is_full", lambda *_: False)
    expected, enough = measured(sampled, tiny, 4)
    engine, machine = small(tiny, 20), Allocator(enough, error)
    with machine:
        assert sampled(engine) == expected
    assert machine.n_refused and 2 <= engine.batch_size <= 10
    said = capsys.readouterr().out.splitlines()
    assert 1 <= len(said) <= 3  # once for each size that was a help
    assert re.fullmatch(
        rf"memory ran out with \d+ texts at once \(q\d+-\d, q\d+-\d(, q\d+-\d, q\d+-\d)?( and \d+ more)?\): goes on "
        rf"with {engine.batch_size}\. To begin with that, set batch_size to it\.",
        said[-1],
    )
    machine.n_refused = 0
    with machine:  # the engine has learned what fits
        assert sampled(engine) == expected
    assert not machine.n_refused and not capsys.readouterr().out


def test_answers_of_one_prompt_are_parted_where_they_do_not_fit_together(tiny):
    four = partial(sampled, n=4)
    expected, enough = measured(four, tiny, 1)
    engine = small(tiny)
    with Allocator(enough):
        assert four(engine) == expected
    assert engine.batch_size < 4


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("ask", [chosen, likely])
def test_prompts_that_are_read_are_halved_too(tiny, monkeypatch, capsys, plain, ask):
    if not plain:
        monkeypatch.setattr(attention, "is_full", lambda *_: False)
    expected, enough = measured(ask, tiny, 1)
    engine = small(tiny)
    with Allocator(enough) as machine:
        found = ask(engine)
    assert machine.n_refused and 1 <= engine.batch_size <= 5
    assert capsys.readouterr().out.count("goes on with") >= 1
    assert found.keys() == expected.keys()
    for key, row in found.items():
        assert tree_leaves(row) == pytest.approx(tree_leaves(expected[key]), abs=1e-4)


@pytest.mark.parametrize("ask", [sampled, chosen, likely])
def test_one_text_that_does_not_fit_is_named(tiny, ask):
    engine = small(tiny)
    says = r"memory ran out on q\d+(-\d)? alone, with its prompt up to \d+ tokens\. Lower max_new_tokens"
    with Allocator(1000), pytest.raises(ResourceError, match=says) as e:
        ask(engine)
    assert engine.batch_size <= 1
    assert not e.value.__context__  # which would hold what stood in memory


def test_what_was_done_before_is_not_done_again(tiny):
    how = {"n": 1, "max_new_tokens": 5, "temperature": 0.9, "top_p": 0.9, "seed": 0}

    def made(engine, machine, then):
        """Keys of the texts; `then()` is called until two are there."""
        keys = []
        with machine:
            for batch in engine.generate(requests(engine, MORE), **how):
                keys += [s.key for s in batch]
                if len(keys) <= 2:
                    then()
        return keys

    largest = {}
    for size in (2, 4):
        machine = Allocator()
        made(small(tiny, size), machine, lambda m=machine: setattr(m, "largest", 0))
        largest[size] = machine.largest  # behind the first two
    engine, machine = small(tiny, 4), Allocator()
    keys = made(engine, machine, lambda: setattr(machine, "most", largest[2]))
    assert sorted(keys) == sorted(f"q{i}-0" for i in range(len(MORE)))
    assert machine.n_refused and engine.batch_size <= 2 and largest[2] < largest[4]


def trainer_of(kind, tiny, folder, **kw):
    p = params(**kw)
    net, tok = train.load(tiny, p)
    if kind == "sft":
        data = [{"prompt_id": f"p{i}", "prompt": q, "response": a} for i, (q, a) in enumerate(ANSWERS)]
        return train.sft_trainer(net, tok, train.sft_rows(tok, data, 512)[0], p, folder)
    data = [r | {"prompt_id": f"p{i}"} for i, r in enumerate(PAIRS)]
    return train.dpo_trainer(net, tok, train.dpo_rows(tok, data, 512)[0], p, folder)


def full_at(call, n, then):
    """`call` that finds no memory the `n`-th time; `then(*args)` is told its arguments."""
    seen = []

    def counted(*args, **kw):
        seen.append(1)
        if len(seen) == n:
            then(*args)
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return call(*args, **kw)

    return counted


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_training_without_memory_names_its_rows_and_what_to_lower(tiny, tmp_path, kind):
    trainer = trainer_of(kind, tiny, tmp_path, save_steps=1, micro_batch_size=2, train_batch_size=4)
    asked = []
    trainer.compute_loss = full_at(trainer.compute_loss, 4, lambda model, inputs: asked.append(inputs))
    with pytest.raises(ResourceError, match="memory ran out at step 2, on rows") as e:
        train.train(trainer, FakeStep())
    size = trainer.args.per_device_train_batch_size  # of the second micro-batch of step 2
    rows = [i for ids in trainer.row_ids[3 * size : 4 * size] for i in ids]
    assert len(rows) == 2 and f"rows {rows[0]}, {rows[1]}: lower micro_batch_size from 2 to 1; or" in str(e.value)
    shorter = max(trainer.lengths[i] for i in rows) * 3 // 4
    assert f"lower max_length from 512 to {shorter}, which drops longer rows; or set gradient" in str(e.value)
    (inputs,) = asked
    assert len(inputs["input_ids"]) == (4 if kind == "dpo" else 2)
    assert not e.value.__context__
    assert [d.name for d in (tmp_path / "checkpoints").glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_reference_without_memory_names_its_pairs(tiny, tmp_path, monkeypatch):
    from trl import DPOTrainer

    full = full_at(DPOTrainer.compute_ref_log_probs, 2, lambda *_: None)
    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", lambda *args: full(*args))
    with pytest.raises(ResourceError, match="ran out while the reference read rows p2, p3: lower micro_batch_size"):
        trainer_of("dpo", tiny, tmp_path)


def test_a_micro_batch_that_must_hold_a_prompts_judgements_is_not_to_be_lowered_below():
    p = params(rank_weight=1.0, micro_batch_size=8, train_batch_size=24, gradient_checkpointing=True)
    assert train.less_memory(p, 3, 100).startswith("lower micro_batch_size from 8 to 4; or lower max_length")
    assert train.less_memory(p, 5, 100) == "lower max_length from 512 to 75, which drops longer rows"


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_nothing_to_learn_from_is_said(tiny, tmp_path, kind):
    p = params(max_length=16)
    net, tok = train.load(tiny, p)
    make = train.sft_trainer if kind == "sft" else train.dpo_trainer
    with pytest.raises(DataError, match="no row is left to learn from: none came, or all are longer than max_length"):
        make(net, tok, [], p, tmp_path)


def test_other_errors_are_not_taken_for_it(tiny, monkeypatch):
    assert not out_of_memory(ResourceError("x")) and not out_of_memory(RuntimeError("size mismatch"))
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**55, dtype=torch.uint8)
    assert out_of_memory(real.value)
    engine = small(tiny)
    monkeypatch.setattr(engine, "_continuous", lambda *_: (_ for _ in ()).throw(RuntimeError("size mismatch")))
    with pytest.raises(RuntimeError, match="size mismatch"):
        sampled(engine)


def test_weights_that_do_not_fit_are_named(tiny, monkeypatch):
    def full(*args, **kw):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    for load in (small, lambda folder: train.load(folder, params())):
        with pytest.raises(ResourceError, match="memory ran out while its weights were loaded"):
            load(tiny)
