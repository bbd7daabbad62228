"""What does not load a model, at the size of a cluster's round: rows, pairs, health, metrics and the report's tables.

``python -m benchmarks.scale 20000`` makes that many prompts of synthetic rows, 7 candidates each with 11 written
judgements of a hundred words (Wu et al. 2024 have 20,000 x 7 x 11 in four rounds), as many ranked prompts and test
answers, and prints seconds of this process and its peak memory. ``python -m benchmarks scale`` does so for several
sizes.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from benchmarks.measure import row
from srlm_utils import evaluate, health, measures, metrics, pairs, report, resources
from srlm_utils.artefacts import read_jsonl, write_json, write_jsonl
from srlm_utils.paths import PROJ_ROOT

SIZES = (2_500, 20_000)  # prompts
N_CANDIDATES, N_SAMPLES = 7, 11
WORDS = [
    "the",
    "of",
    "a",
    "to",
    "in",
    "is",
    "and",
    "it",
    "you",
    "that",
    "he",
    "was",
    "for",
    "on",
    "are",
    "with",
    "as",
    "his",
    "they",
    "be",
    "at",
    "one",
    "have",
    "this",
    "from",
    "or",
    "had",
]
N_REPLIES = 4  # of a ranked prompt


class Rows:
    """Synthetic rows, drawn from one seed; texts are pieces of one long text."""

    def __init__(self, n: int):
        self.n, self.rng = n, np.random.default_rng(0)
        self.text = " ".join(self.rng.choice(WORDS, 200_000))

    def _texts(self, n: int, chars: int) -> list[str]:
        starts, sizes = self.rng.integers(len(self.text) - 2 * chars, size=n), self.rng.integers(chars, size=n)
        return [self.text[a : a + chars // 2 + b] for a, b in zip(starts.tolist(), sizes.tolist(), strict=True)]

    def prompts(self):
        for i, text in enumerate(self._texts(self.n, 120)):
            yield {"prompt_id": f"p{i}", "prompt": text, "category": "list" if i % 3 else "email"}

    def candidates(self):
        for i in range(self.n):
            for k, text in enumerate(self._texts(N_CANDIDATES, 600)):
                more = {"n_tokens": len(text) // 4, "ended": bool(i % 5)}
                yield {"cand_id": f"p{i}-{k}", "prompt_id": f"p{i}", "text": text} | more

    def judgements(self):
        for i in range(self.n):
            scores = np.clip(np.round(self.rng.normal(2.5, 1.2, (N_CANDIDATES, N_SAMPLES))), 0, 5).tolist()
            for k, values in enumerate(scores):
                texts = self._texts(N_SAMPLES, 450)
                samples = [
                    {"text": t, "score": s, "status": "ok", "ended": True} for t, s in zip(texts, values, strict=True)
                ]
                mean = sum(values) / N_SAMPLES
                yield {"id": f"p{i}-{k}", "judge_mode": "sampled", "cut": False, "samples": samples, "score": mean}

    def ranked(self):
        for i, prompt in enumerate(self._texts(self.n, 120)):
            replies = [
                {"reply_id": str(k), "text": text, "rank": k} for k, text in enumerate(self._texts(N_REPLIES, 600))
            ]
            yield {"prompt_id": f"r{i}", "prompt": prompt, "set": "ranked_eval", "replies": replies}

    def ranked_judgements(self):
        for i in range(self.n):
            for k, score in enumerate(self.rng.normal(2.5, 1, N_REPLIES).tolist()):
                yield {"id": f"r{i}/{k}", "judge_mode": "expected", "score": score, "mass": 0.99}

    def answers(self):
        for i, text in enumerate(self._texts(self.n, 600)):
            more = {"n_tokens": len(text) // 4, "ended": True, "prompt": "a prompt"}
            yield {"cand_id": f"p{i}-0", "prompt_id": f"p{i}", "text": text} | more

    def verdicts(self, a: str, b: str):
        for i, p in enumerate(self.rng.choice([0.0, 0.5, 1.0], self.n).tolist()):
            who = {"model_a": a, "model_b": b, "judge": "J", "judge_mode": "score", "judge_rev": "x"}
            yield who | {"prompt_id": f"p{i}", "order": "none", "p_first": p}


MODELS = ("M0", "SFT", "M1", "M2")


def write_run(folder: Path, n: int) -> None:
    """What the report reads of a run of two iterations with `n` prompts."""
    rows = Rows(n)
    write_jsonl(folder / "seed/test_prompts.jsonl", rows.prompts())
    for name in ("prompts", "candidates", "judgements"):
        write_jsonl(folder / f"M1/aift/{name}.jsonl", getattr(rows, name)())
    write_jsonl(folder / "M1/aift/attempts.jsonl", ({"reason": "kept" if i % 2 else "short"} for i in range(2 * n)))
    write_jsonl(folder / "seed/ranked_eval.jsonl", rows.ranked())
    write_jsonl(folder / "M1/eval/judgements.jsonl", rows.ranked_judgements())
    for i, model in enumerate(MODELS):
        write_jsonl(folder / f"{model}/eval/answers.jsonl", rows.answers())
        for other in MODELS[:i]:
            write_jsonl(folder / f"{model}/eval/verdicts/{model}_vs_{other}.jsonl", rows.verdicts(model, other))


def build(run: Path, step) -> None:
    """06_build_pairs."""
    found = [step.rows(f"M1/aift/{name}.jsonl") for name in ("prompts", "candidates", "judgements")]
    kept, drops = pairs.build_pairs(*found)
    figures = health.round_metrics("M1", *found, kept)
    write_jsonl(run / "M1/aift/pairs.jsonl", kept)
    summary = {"kind": "pairs", "n_kept": len(kept), "drops": drops, "metrics": figures}
    write_json(run / "M1/aift/health.json", summary)


def measure(run: Path, step) -> None:
    """What 08_evaluate computes of M2 without a model."""
    ranked, judged = step.rows("seed/ranked_eval.jsonl"), step.rows("M1/eval/judgements.jsonl")
    rows = evaluate.agreement_rows("M1", ranked, judged, "expected", "ranked_eval")
    rows += evaluate.gain_rows("M1", "M0", ranked, judged, judged[::-1], "expected", "ranked_eval")
    evaluate.calibration(ranked, judged)
    ours = step.rows("M2/eval/answers.jsonl")
    figures = measures.answer_figures(ours, step.rows("seed/test_prompts.jsonl"))
    rows += metrics.metric_rows(figures, model="M2", set="test_prompts")
    for other in MODELS[:-1]:
        verdicts, theirs = (step.rows(f"{p}") for p in (_verdicts(other), f"{other}/eval/answers.jsonl"))
        rows += evaluate.duel_rows(verdicts, ours, theirs, model="M2", opponent=other, judge="J", judge_mode="score")
    for model in MODELS:
        write_json(run / f"{model}/eval/metrics.json", rows)


def _verdicts(other: str) -> str:
    return f"M2/eval/verdicts/M2_vs_{other}.jsonl"


def tables(run: Path, step) -> None:
    """09_report, without its figures."""
    report.metrics_table(step)
    report.funnel_table(step)
    report.score_table(step)
    report.example_pairs(step, 3)
    report.example_answers(step, 3)
    duels = report.duels(step)
    report.ratings_table(duels)
    report.kinds_table(duels, "M2", "M1")
    report.judges_table(duels)


def run_once(n: int) -> dict:
    """Seconds of this process by part, its peak memory in GB, and how many bytes of rows there were."""
    with tempfile.TemporaryDirectory() as folder:
        run, seconds = Path(folder), {}
        params = SimpleNamespace(iterations=2, seed=0, variant="scale", benchmarked=[], drafts=[])
        step = SimpleNamespace(params=params, run=run, rows=lambda p: read_jsonl(run / p), input=lambda p: run / p)
        step.is_borrowed = lambda p: False
        for part in (lambda run, step: write_run(run, n), build, measure, tables):
            start = time.process_time()
            part(run, step)
            name = part.__name__ if part.__name__ != "<lambda>" else "write_run"
            seconds[name] = round(time.process_time() - start, 1)
            print(f"  {n} prompts: {name} {seconds[name]} s", file=sys.stderr, flush=True)
        size = sum(p.stat().st_size for p in run.rglob("*.jsonl"))
    peak = resources.peak_memory() / 1e9
    total = sum(s for name, s in seconds.items() if name != "write_run")
    return {"seconds": round(total, 1), "memory_gb": round(peak, 2), "rows_gb": round(size / 1e9, 2), "parts": seconds}


def rows(_=None) -> list[dict]:
    """Time a prompt at the largest size against the smallest, and the peak memory of the largest."""
    found = {}
    for n in SIZES:
        command = [sys.executable, "-m", "benchmarks.scale", str(n)]
        out = subprocess.run(command, cwd=PROJ_ROOT, check=True, stdout=subprocess.PIPE, text=True)
        found[n] = json.loads(out.stdout.splitlines()[-1])
    first, last = found[SIZES[0]], found[SIZES[-1]]
    per_prompt = last["seconds"] / first["seconds"] * SIZES[0] / SIZES[-1]
    sizes = {str(n): f for n, f in found.items()}
    how = f"time a prompt, {SIZES[-1]:,} : {SIZES[0]:,}"
    return [
        row("scale_time", [per_prompt], 1.2, lower_is_better=True, unit=how, sizes=sizes),
        row("scale_memory_gb", [last["memory_gb"]], 4, lower_is_better=True, unit=f"GB, {SIZES[-1]:,} prompts"),
    ]


if __name__ == "__main__":
    print(json.dumps(run_once(int(sys.argv[1]))))
