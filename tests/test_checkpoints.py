"""Which checkpoint is kept: known answers, deaths at every point, and a training that notices nothing."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from srlm_utils import checkpoints, evaluate, plan, plots, train
from srlm_utils.artefacts import read_jsonl, write_jsonl
from srlm_utils.checkpoints import Selection
from srlm_utils.engine import Engine
from srlm_utils.errors import ParamError
from srlm_utils.params import Dpo, Experiment, Sft
from srlm_utils.selection import COLUMNS, best, strengths
from tests.conftest import cli
from tests.test_train import ANSWERS, PAIRS, FakeStep

PROMPTS = [{"prompt_id": f"v{i}", "prompt": q} for i, q in enumerate(["Name a tree.", "Why not?", "What is rain?"])]
STEPS = (2, 4, 5)  # of the trainings below: every two, and the last


class Step(FakeStep):
    """What a `Selection` needs of a step; the tiny model is the judge."""

    def __init__(self, params, work, tiny):
        self.params, self.work, self.tiny = params, work, tiny
        self.declared = SimpleNamespace(stage="02_sft")

    def model_source(self, model):
        return {"folder": self.tiny}

    def model_revision(self, model):
        return "rev"

    def engine(self, model):
        return Engine(self.tiny, device="cpu", dtype="float32")

    def rows(self, path):
        assert path == "seed/valid_prompts.jsonl"
        return PROMPTS


def params(kind=Sft, **kw):
    values = {
        "model": "M2",
        "device": "cpu",
        "dtype": "float32",
        "lora_r": 4,
        "lora_alpha": 8,
        "learning_rate": 1e-2,
        "train_batch_size": 4,
        "micro_batch_size": 2,
        "save_steps": 0,
        "select_steps": 2,
        "select_judge": "M0:pairwise",
        "select_max_new_tokens": 6,
    }
    return SimpleNamespace(**kind(**(values | kw)).model_dump())


def run(tiny, work, p, *, select=True, callback=None):
    """One training of five steps; (its log, trainer, selection)."""
    step = Step(p, work, tiny)
    selection = Selection(step) if select else None
    net, tok = train.load(tiny, p)
    if hasattr(p, "beta"):
        rows, _ = train.dpo_rows(tok, (PAIRS * 2)[:20], 512)
        trainer = train.dpo_trainer(net, tok, rows, p, work)
    else:
        rows, _ = train.sft_rows(tok, [{"prompt": q, "response": a} for q, a in (ANSWERS * 2)[:20]], 512)
        trainer = train.sft_trainer(net, tok, rows, p, work)
    if callback:
        trainer.add_callback(callback)
    return train.train(trainer, step, selection), trainer, selection


class Watch(TrainerCallback):
    """The trainable weights after each step, as training left them."""

    def __init__(self):
        self.weights = {}

    def on_step_end(self, args, state, control, model, **kwargs):
        self.weights[state.global_step] = weights(model)


def weights(model) -> dict:
    return {n.rpartition("base_model.model.")[2]: p.detach().clone() for n, p in model.named_parameters()}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture
def judge(monkeypatch):
    """`judge(step)` has a fake judge prefer the answers of that step to all others, and writes answers that name their
    step; `judge.asked` are the texts that it compared."""

    def prefer(best_step):
        prefer.asked, prefer.written = [], 0

        def compare(prompts, ours, theirs):
            prefer.asked.append((next(iter(ours.values())), next(iter(theirs.values()))))
            for pid in ours:
                for order, a, b in (("AB", ours[pid], theirs[pid]), ("BA", theirs[pid], ours[pid])):
                    good = f"step {best_step}"
                    yield [
                        {"prompt_id": pid, "order": order, "p_first": 1.0 if a == good else 0.0 if b == good else 0.5}
                    ]

        compared = Selection.compare

        def write(self, n, model, tokenizer):
            def answers(*_):
                prefer.written += 1
                return [{"prompt_id": pid, "text": f"step {n}", "n_tokens": 2, "ended": True} for pid in self.prompts]

            self._answers = answers
            compared(self, n, model, tokenizer)

        monkeypatch.setattr(Selection, "compare", write)
        monkeypatch.setattr(evaluate, "pairwise_judge", lambda step, name, mode: compare)

    return prefer


# ---- the rule


def rows(*rates, n=10):
    return [
        {"step": 2 * i + 2, "compared_with": 2 * i, "win_rate": rate, "n": n, "ties": 0} for i, rate in enumerate(rates)
    ]


@pytest.mark.parametrize(
    "rates,kept",
    [
        ([0.6, 0.6, 0.4], 4),
        ([0.6, 0.4, 0.6], 2),  # back where it was: the earlier one
        ([0.6, 0.4, 0.7], 6),
        ([0.6, 0.3, 0.6], 2),  # the last one won, but did not make up for it
        ([0.5, 0.5], 2),
        ([0.0, 0.0], 2),  # step 0 is stronger, and no trained model
        ([1.0, 1.0], 4),
    ],
)
def test_the_strongest_of_a_chain_is_kept(rates, kept):
    assert best(rows(*rates)) == kept


def test_strengths_are_bradley_and_terrys():
    (a, b) = (strengths(rows(0.6, 0.8))[s] for s in (2, 4))
    assert a == pytest.approx(torch.logit(torch.tensor(6.5 / 11)).item())
    assert b - a == pytest.approx(torch.logit(torch.tensor(8.5 / 11)).item())


# ---- training


@pytest.mark.parametrize(
    "kind,lora_r,kept", [(Sft, 4, 2), (Sft, 4, 4), (Sft, 4, 5), (Sft, 0, 4), (Dpo, 4, 4), (Dpo, 0, 4)]
)
def test_the_preferred_step_is_saved(tiny, tmp_path, judge, kind, lora_r, kept):
    judge(kept)
    watch, p = Watch(), params(kind, lora_r=lora_r)
    log, trainer, selection = run(tiny, tmp_path, p, callback=watch)
    assert len(log) == STEPS[-1] and selection.kept == kept
    assert equal(weights(trainer.model), watch.weights[kept])
    assert not equal(watch.weights[kept], watch.weights[2 if kept != 2 else 5])
    assert judge.asked == [("step 2", "step 0"), ("step 4", "step 2"), ("step 5", "step 4")]
    assert [f.name for f in (tmp_path / "selection").glob("*.safetensors")] == [f"{kept}.safetensors"]

    table = selection.table()
    assert list(table) == COLUMNS and table.step.tolist() == [*STEPS] and table.compared_with.tolist() == [0, 2, 4]
    assert table.kept.tolist() == [s == kept for s in STEPS]
    won = [{kept: 1.0}.get(s, 0.0 if before == kept else 0.5) for s, before in zip(STEPS, (0, 2, 4), strict=True)]
    assert table.win_rate.tolist() == won and table.ties.tolist() == [3 if w == 0.5 else 0 for w in won]
    assert [r["text"] for r in selection.answers()] == [f"step {s}" for s in (0, *STEPS) for _ in PROMPTS]

    ids = torch.tensor([[1, 2, 3, 4]])
    trainer.model.eval()
    with torch.no_grad():
        trained = trainer.model(ids).logits
        train.save(trainer.model, trainer.processing_class, tmp_path / "model", p, card="# card\n")
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)(ids).logits
    assert torch.allclose(saved, trained, atol=1e-4)


@pytest.mark.parametrize("kind,lora_r", [(Sft, 4), (Sft, 0), (Dpo, 4), (Dpo, 0)])
def test_training_notices_nothing(tiny, tmp_path, kind, lora_r):
    """With dropout, so that random numbers count; the model answers, and a judge is loaded in between."""
    p = params(kind, lora_r=lora_r, dropout=0.3, select_judge="M0:score" if lora_r else "M0:pairwise")
    quiet, watched = Watch(), Watch()
    before = run(tiny, tmp_path / "a", p, select=False, callback=quiet)[0]
    after, _, selection = run(tiny, tmp_path / "b", p, callback=watched)
    assert after.loss.tolist() == before.loss.tolist() and after.grad_norm.tolist() == before.grad_norm.tolist()
    assert all(equal(quiet.weights[s], watched.weights[s]) for s in quiet.weights)
    answers = pd.DataFrame(selection.answers())
    assert answers.step.unique().tolist() == [0, *STEPS] and answers.groupby("step").text.agg(tuple).nunique() > 1
    n_files = len(list((tmp_path / "b/selection").glob("*-scores.jsonl" if lora_r else "*-verdicts.jsonl")))
    assert n_files == (4 if lora_r else 3)  # a text's score is asked once


def test_the_model_in_training_answers_as_its_saved_copy(tiny, tmp_path):
    """The engine around the model sees its adapters; under full training's autocast, and gradient checkpointing, it
    answers too."""
    p = params(select_steps=5)
    _, trainer, selection = run(tiny, tmp_path, p)
    train.save(trainer.model, trainer.processing_class, tmp_path / "model", p, card="# card\n")
    selection.step.params.batch_size = 0
    saved = Engine(str(tmp_path / "model"), device="cpu", dtype="float32")
    (tmp_path / "selection/5-answers.jsonl").rename(tmp_path / "answers.jsonl")
    again = selection._answers(saved.model, saved.tokenizer)
    assert again == read_jsonl(tmp_path / "answers.jsonl") != read_jsonl(tmp_path / "selection/0-answers.jsonl")
    for kw in ({"lora_r": 0}, {"lora_r": 4, "gradient_checkpointing": True}):
        half = params(select_steps=5, dtype="bfloat16", **kw)
        assert len(run(tiny, tmp_path / str(kw["lora_r"]), half)[2].answers()) == 2 * len(PROMPTS)


# ---- deaths


class Death(BaseException):
    pass


POINTS = ("answers", "verdicts", "weights", "row", "old weights", "end")


@pytest.mark.parametrize("save_steps", [0, 1])
def test_a_death_loses_nothing(tiny, tmp_path, judge, monkeypatch, save_steps):
    """Killed at step 4 in the midst of its comparison, or after training: continued, it is an undisturbed run."""
    judge(4)
    p = params(save_steps=save_steps)
    log, whole, selection = run(tiny, tmp_path / "whole", p)
    expected, kept, n_written = selection.table(), weights(whole.model), judge.written

    def die(*args, **kwargs):
        raise Death

    for point in POINTS:
        judge.asked, judge.written = [], 0
        work = tmp_path / point
        with monkeypatch.context() as m:
            if point == "verdicts":  # behind the answers
                m.setattr(checkpoints.metrics, "head_to_head", dying(4, work, checkpoints.metrics.head_to_head))
            elif point == "weights":  # behind the verdicts
                m.setattr(Selection, "_save", dying(4, work, Selection._save))
            elif point == "row":  # between weights and row
                m.setattr(checkpoints, "write_json", dying(4, work, checkpoints.write_json))
            elif point == "old weights":  # behind the row, before the weights of step 2 are gone
                m.setattr(Selection, "kept", property(lambda self: die() if len(self.rows) == 2 else best(self.rows)))
            elif point == "answers":
                m.setattr(checkpoints, "write_jsonl", dying(4, work, checkpoints.write_jsonl, "answers"))
            else:
                m.setattr(Selection, "restore", die)
            with pytest.raises(Death):
                run(tiny, work, p)
        rows_before = {f.name: f.read_bytes() for f in (work / "selection").glob("*.json")}
        assert ("4.json" in rows_before) == (point in ("old weights", "end")), point
        n_asked, files = len(judge.asked), {f.name for f in (work / "selection").iterdir()}
        assert ("4.safetensors" in files) == (point in ("row", "old weights", "end")), point

        again, trainer, selection = run(tiny, work, p)
        assert again.loss.tolist() == pytest.approx(log.loss.tolist(), rel=1e-6), point
        pd.testing.assert_frame_equal(selection.table(), expected)
        assert equal(weights(trainer.model), kept), point
        assert [f.name for f in (work / "selection").glob("*.safetensors")] == ["4.safetensors"], point
        assert all((work / "selection" / name).read_bytes() == data for name, data in rows_before.items()), point
        assert n_asked == {"answers": 1, "end": 3}.get(point, 2), point  # nothing was asked twice
        assert len(judge.asked) == 3 and judge.written == n_written + (point == "answers"), point


def dying(step, work, do, what=""):
    """`do`, which dies where it would be done for `step` (instead of it)."""

    def call(*args, **kwargs):
        path = next((a for a in args if hasattr(a, "name")), None)
        here = path.name.startswith(str(step)) if path else (work / f"selection/{step}-answers.jsonl").exists()
        if here and what in str(path):
            raise Death
        return do(*args, **kwargs)

    return call


# ---- what is refused, read and shown


@pytest.mark.parametrize(
    "stage,model,judge_name,says",
    [
        ("sft", "M1", "M1:score", r"sft\.select_judge: M1 does not exist yet while M1 is trained; expected M0, SFT or"),
        ("sft", "SFT", "SFT:pairwise", "SFT does not exist yet while SFT is trained; expected M0 or"),
        ("dpo", "M2", "M3:score", r"dpo\.select_judge: M3 does not exist yet while M2 is trained"),
        ("dpo", "M2", "votes.jsonl:human", "nobody can vote"),
        ("dpo", "M2", "M0", r"dpo\.select_judge: found 'M0', expected"),
    ],
)
def test_a_judge_that_is_not_there_is_refused(stage, model, judge_name, says):
    name = {"sft": "02_sft", "dpo": "07_dpo"}[stage]
    p = {"select_steps": 2, "select_judge": judge_name}
    with pytest.raises(ParamError, match=says):
        plan.make_step(name, model, Experiment({stage: p}).flat(name, model))
    with pytest.raises(ParamError):
        plan.list_steps(Experiment({stage: p}))
    plan.list_steps(Experiment({stage: p | {"select_steps": 0}}))  # nobody is asked


def test_a_judge_that_is_not_there_stops_a_run_before_its_first_step():
    result = cli("run", "params/smoke.yaml", "--set", "common.select_judge=M1:score", "--run-name", "test-no-judge")
    assert result.returncode == 2 and "sft.select_judge: M1 does not exist yet while SFT is trained" in result.stderr


def test_an_endpoint_without_a_key_is_refused_before_a_model_is_loaded(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ParamError, match="OPENAI_API_KEY is not set"):
        Selection(Step(params(select_judge="gpt-4o:api"), tmp_path, tiny))


def test_an_endpoint_compares(tiny, tmp_path, monkeypatch):
    asked = []

    def compare(endpoint, prompts, ours, theirs):
        asked.append(endpoint)
        rows = [{"prompt_id": pid, "order": order, "p_first": 0.5} for pid in ours for order in ("AB", "BA")]
        yield [*rows[:-1], rows[-1] | {"unread": True}]

    monkeypatch.setattr(evaluate.api, "compare", compare)
    p = params(select_judge="judge:api", judge_base_url="http://localhost:1/v1")
    *_, selection = run(tiny, tmp_path, p)
    assert [e.base_url for e in asked] == ["http://localhost:1/v1"] * 3 and selection.kept == 2
    assert len({id(e) for e in asked}) == 1  # its limit is that of the whole training
    assert [(r["n"], r["ties"]) for r in selection.rows] == [(3, 3)] * 3  # no verdict is a tie here


def test_an_answer_that_did_not_change_is_a_tie(tmp_path):
    selection = Selection.__new__(Selection)
    selection.folder = tmp_path
    for n, score in ((0, 3.0), (2, 3.1)):  # scored in two batches
        write_jsonl(tmp_path / f"{n}-scores.jsonl", [{"id": pid, "score": score} for pid in ("v0", "v1")])
    rows = selection._by_score(2, 0, {"v0": "same", "v1": "new"}, {"v0": "same", "v1": "old"})
    assert [r["p_first"] for r in rows] == [0.5, 1.0]


def test_what_a_step_reads_and_writes():
    on = {"select_steps": 2, "select_judge": "SFT:score"}
    e = Experiment({"dpo": on})
    off, step = (plan.make_step("07_dpo", "M2", x.flat("07_dpo", "M2")) for x in (Experiment({}), e))
    assert off.reads == ("M1/model", "M1/aift/pairs.jsonl") and off.writes == ("M2/model", "M2/training_log.csv")
    assert step.reads == (*off.reads, "seed/valid_prompts.jsonl", "SFT/model")
    assert step.writes == (*off.writes, "M2/selection.csv", "M2/selection_answers.jsonl")
    outside = e.flat("07_dpo", "M2")
    assert [*plan.external_inputs(outside)] == ["select_rubric:short"]
    files = plan.external_inputs(outside | {"select_judge": "outside:score"})
    assert [*files] == ["select_judge:outside:judge_train", "select_judge:outside:judge_onpolicy"]
    assert not plan.external_inputs(outside | {"select_steps": 0})
    assert plan.sft_files("SFT", True) == ("seed/ift.jsonl",)  # no validation prompt is trained on
    assert plan.sft_files("M1", True) == ("seed/ift.jsonl", "SFT/eft/train.jsonl")
    assert plan.sft_files("M1", False) == ("seed/ift.jsonl",)
    assert plan.sft_files("M2", True) == ("seed/ift.jsonl", "M1/aift/positives.jsonl")


def test_the_figure_marks_the_kept_step():
    table = pd.DataFrame(
        [
            {"step": 2, "compared_with": 0, "win_rate": 0.6, "low": 0.4, "high": 0.8, "n": 9, "ties": 1, "kept": True},
            {
                "step": 4,
                "compared_with": 2,
                "win_rate": 0.5,
                "low": None,
                "high": None,
                "n": 9,
                "ties": 0,
                "kept": False,
            },
        ]
    )
    fig, data = plots.selection(table, "M2", "M1:score")
    (ax,) = fig.axes
    assert data is table and ax.get_ylim() == (-3, 103)
    assert [list(line.get_ydata()) for line in ax.lines if line.get_linestyle() == "--"] == [[50, 50]]
    assert [t.get_text() for t in ax.texts] == ["kept"] and ax.texts[0].xy == (2, 60)
    assert "inside the loop" in fig.get_suptitle() and "9 validation prompts" in fig.get_suptitle()
