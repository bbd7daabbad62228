"""Which step of a training becomes the model: the checkpoint whose answers to the validation prompts win.

Yuan et al. 2024, section 3.1: a checkpoint every 200 steps, and Claude 2 compares its answers to 253 validation prompts
with those of the checkpoint before it (AlpacaEval's prompt; here the kit's own questions, in both orders). The paper
does not say how the best follows from a chain of such comparisons. Here each adds the log-odds of its win rate to the
strength of the checkpoint before it: Bradley and Terry's model, which fits a chain exactly. The strongest is kept, the
earlier of two that are equal. Step 0, the model that training starts from, is compared with but never kept. Training
goes on to its last step whatever is kept, and its losses are those of a training without comparisons.

Everything is in the step's work folder, each file whole or absent: answers, scores or verdicts, the weights of the best
so far, and last the row of the comparison. Trainer's own checkpoint of a step is written behind them, so a training
that is continued meets every step again whose row is missing, and makes only what is missing of it.
"""

import contextlib
import gc
import os
import random

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from srlm_utils import chat, context, evaluate, judge, lineage, metrics, outside, plan, plots, train, verdicts
from srlm_utils.artefacts import read_json, read_jsonl, write_json, write_jsonl
from srlm_utils.engine import Engine
from srlm_utils.selection import COLUMNS, best


class Selection:
    """The comparisons of one training. `step` is a `StepRun` with the `select_` parameters; made before its model is
    loaded, so that a judge that cannot be asked is known by then."""

    def __init__(self, step):
        p, self.step, self.folder = step.params, step, step.work / "selection"
        evaluate.check_judges([p.select_judge], p)
        self.judge, self.mode = plan.select_judge(step.declared.stage, p.model, vars(p))
        self.rubric = outside.rubric() if self.judge == lineage.OUTSIDE else None
        if self.mode == "score" and not self.rubric:
            self.rubric = judge.Rubric(p.select_rubric)
        # one endpoint, whose limit holds for all comparisons
        self._endpoint = evaluate.pairwise_judge(step, self.judge, self.mode) if self.mode == "api" else None
        if not self._endpoint:
            step.model_source(self.judge)  # fetched, or made, now and not in the midst of training
        prompts = step.rows(plan.VALID)
        self.prompts = {r["prompt_id"]: r["prompt"] for r in prompts[: p.select_prompts or len(prompts)]}
        start = step.model_source(lineage.init_model(p.model))  # whose context its successor's is
        asked = [{"prompt_id": pid, "prompt": text} for pid, text in self.prompts.items()]
        context.check(start, asked, p.select_max_new_tokens, "select_max_new_tokens")
        self.rows = sorted((read_json(f) for f in self.folder.glob("*.json")), key=lambda r: r["step"])

    @property
    def kept(self) -> int:
        """The optimizer step whose weights are the model's."""
        return best(self.rows)

    def compare(self, n: int, model, tokenizer, *, keep: bool = True) -> None:
        """Compare the answers of `model`, after `n` optimizer steps, with those of the comparison before, and keep its
        trainable weights if it is the best so far and they are not kept elsewhere (`keep`). Nothing is done that an
        earlier attempt did."""
        if any(r["step"] == n for r in self.rows):
            return
        answers = self._made(f"{n}-answers.jsonl", lambda: self._answers(model, tokenizer))
        if n == 0:
            return
        before = self.rows[-1]["step"] if self.rows else 0
        ours, theirs = (
            {r["prompt_id"]: r["text"] for r in rows}
            for rows in (answers, read_jsonl(self.folder / f"{before}-answers.jsonl"))
        )
        by = self._by_score if self.mode == "score" else self._side_by_side
        figures = metrics.head_to_head(by(n, before, ours, theirs))
        gc.collect()  # the judge is gone before training goes on
        row = {"step": n, "compared_with": before, "win_rate": figures["win_rate"]["value"]}
        row |= {k: figures["win_rate"][k] for k in ("low", "high", "n")}
        row["ties"] = round(figures["tie"]["value"] * row["n"])
        if keep and best([*self.rows, row]) == n:
            self._save(n, model)
        write_json(self.folder / f"{n}.json", row)
        self.rows.append(row)
        for path in self.folder.glob("*.safetensors"):
            if path.stem != str(self.kept):
                path.unlink()
        rate = " to ".join("?" if row[k] is None else f"{100 * row[k]:.0f}" for k in ("low", "high"))
        print(f"step {n} against {before}: wins {100 * row['win_rate']:.0f} % [{rate}], step {self.kept} is the best")

    def watch(self, trainer) -> None:
        """Compare the model of `trainer` at the steps of its training."""
        trainer.add_callback(AtSteps(self, trainer))

    def restore(self, trainer) -> None:
        """Give the model of `trainer` the weights of the kept step."""
        weights = load_file(self.folder / f"{self.kept}.safetensors")
        with torch.no_grad():
            for name, p in plain_model(trainer).named_parameters():
                if name in weights:
                    p.copy_(weights[name])

    # ---- what is shown and written

    def table(self) -> pd.DataFrame:
        """selection.csv: one row per comparison (`COLUMNS`)."""
        return pd.DataFrame([r | {"kept": r["step"] == self.kept} for r in self.rows], columns=COLUMNS)

    def answers(self) -> list[dict]:
        """Rows {"step", "prompt_id", "prompt", "text", "n_tokens", "ended"} of all steps."""
        return [
            {"step": n, "prompt_id": r["prompt_id"], "prompt": self.prompts[r["prompt_id"]]} | r
            for n in (0, *(r["step"] for r in self.rows))
            for r in read_jsonl(self.folder / f"{n}-answers.jsonl")
        ]

    def show(self) -> tuple:
        """For a notebook: the figure, the table, and what each step answers to the first prompt."""
        said = pd.DataFrame(self.answers())
        said = said[said.prompt_id == said.prompt_id.iloc[0]][["step", "prompt", "text"]]
        plots.selection(self.table(), self.step.params.model, self.step.params.select_judge)
        return self.table(), said

    def figures(self) -> dict:
        """For manifest and model card."""
        rev = "" if self.mode == "api" else self.step.model_revision(self.judge)
        return {"kept_step": self.kept, "n_compared": len(self.rows), "select_judge_revision": rev}

    # ---- answers and verdicts

    def _made(self, name: str, make) -> list[dict]:
        path = self.folder / name
        if not path.exists():
            write_jsonl(path, make())
        return read_jsonl(path)

    def _answers(self, model, tokenizer) -> list[dict]:
        """The most likely answer to each prompt: between two checkpoints no luck of a draw decides."""
        p, engine = self.step.params, Engine.around(model, tokenizer, batch_size=self.step.params.batch_size)
        asked = [(pid, chat.prompt_ids(tokenizer, chat.user(text))) for pid, text in self.prompts.items()]
        how = {"max_new_tokens": p.select_max_new_tokens, "temperature": 0, "top_p": 1.0, "seed": p.seed}
        samples = [s for batch in engine.generate(asked, **how) for s in batch]
        rows = [
            {"prompt_id": s.key.rpartition("-")[0], "text": s.text, "n_tokens": s.n_tokens, "ended": s.ended}
            for s in samples
        ]
        return sorted(rows, key=lambda r: r["prompt_id"])

    def _by_score(self, n: int, before: int, ours: dict[str, str], theirs: dict[str, str]) -> list[dict]:
        both, engine, scores = {n: ours, before: theirs}, None, {}
        for s, texts in both.items():
            name = f"{s}-scores.jsonl"
            if engine is None and not (self.folder / name).exists():
                engine = self.step.engine(self.judge)
            rows = self._made(name, lambda engine=engine, texts=texts: self._scores(engine, texts))
            scores[s] = {r["id"]: r["score"] for r in rows}
        return verdicts.from_scores(scores[n], scores[before], {pid for pid in ours if ours[pid] == theirs[pid]})

    def _scores(self, engine, texts: dict[str, str]) -> list[dict]:
        items = [{"id": pid, "prompt": self.prompts[pid], "response": text} for pid, text in texts.items()]
        return [r for batch in judge.expected_scores(engine, self.rubric, items) for r in batch]

    def _side_by_side(self, n: int, before: int, ours: dict[str, str], theirs: dict[str, str]) -> list[dict]:
        def make():
            compare = self._endpoint or evaluate.pairwise_judge(self.step, self.judge, self.mode)
            rows = [v for batch in compare(self.prompts, ours, theirs) for v in batch]
            # a judge that says nothing prefers no step; hours of training are not to end for it
            return [{k: v[k] for k in v if k != "unread"} for v in rows]

        return self._made(f"{n}-verdicts.jsonl", make)

    def _save(self, n: int, model) -> None:
        weights = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        tmp = self.folder / f".{n}.tmp"
        save_file(weights, tmp)
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())  # before the row that says it is there
        os.replace(tmp, self.folder / f"{n}.safetensors")


class AtSteps(TrainerCallback):
    """Has a `Selection` compare the model of `trainer` before the first step, every `select_steps` and at the last."""

    def __init__(self, selection: Selection, trainer):
        self.selection, self.trainer = selection, trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self._compare(0)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.selection.step.params.select_steps == 0 or state.global_step == state.max_steps:
            self._compare(state.global_step)

    def _compare(self, n: int) -> None:
        model, training = plain_model(self.trainer), self.trainer.model.training
        self.trainer.model.eval()
        # trl's fused head and accelerate's autocast, under which keys of a cache would be of two dtypes, stand aside
        patched = vars(model).pop("forward", None)
        train.as_it_comes(self.trainer, False)
        with untouched_randomness():
            self.selection.compare(n, model, self.trainer.processing_class)
        train.as_it_comes(self.trainer)
        if patched:
            model.forward = patched
        self.trainer.model.train(training)


def plain_model(trainer):
    """The transformers model in training."""
    return train.base_of(trainer.accelerator.unwrap_model(trainer.model))


@contextlib.contextmanager
def untouched_randomness():
    """Leave all generators of random numbers as they were: dropout behind a comparison is that of none."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])
