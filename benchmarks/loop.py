"""The whole loop: what a step costs beside its model's work, how long the quickstart takes, and how a step grows."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.measure import row
from srlm_utils import resources
from srlm_utils.artefacts import read_json
from srlm_utils.paths import PROJ_ROOT

GROWTH = (64, 256, 1024)  # prompts


def _srlm(*args: str) -> float:
    """Seconds that a command takes."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "srlm_utils.cli", *args], cwd=PROJ_ROOT, check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - start


def _stages(run: Path) -> dict[str, float]:
    """Seconds of each stage by the manifests of a run."""
    seconds: dict[str, float] = {}
    for path in (run / "steps").glob("*.json"):
        manifest = read_json(path)
        stage = manifest["step"].partition("@")[0]
        seconds[stage] = round(seconds.get(stage, 0) + manifest["seconds"], 1)
    return dict(sorted(seconds.items()))


def overhead() -> dict:
    """Wall seconds a step of the smoke run: its model has 0.2 M parameters, so nearly all of it is overhead."""
    run = PROJ_ROOT / "results" / "bench-smoke"
    wall = _srlm("run", "params/smoke.yaml", "--run-name", run.name, "--force")
    n = len(list((run / "steps").glob("*.json")))
    print(f"  smoke: {wall:.0f} s, {n} steps", flush=True)
    return row("step_overhead_s", [wall / n], 4, lower_is_better=True, unit="s", n_steps=n, stages=_stages(run))


def quickstart(again: bool) -> dict:
    """Minutes of the quickstart from M0 to the report; `again` runs it, else the last finished run is read."""
    run = PROJ_ROOT / "results" / ("bench-quickstart" if again else "quickstart")
    if again:
        wall = _srlm("run", "params/quickstart.yaml", "--run-name", run.name, "--force")
        return row("quickstart_min", [wall / 60], 20, lower_is_better=True, unit="min", stages=_stages(run))
    manifests = [read_json(p) for p in (run / "steps").glob("*.json")]
    if not any(m["step"] == "09_report@run" for m in manifests):
        note = "not measured: no finished results/quickstart; run make run first, or make bench QUICKSTART=1"
        empty = {"ratio": None, "low": None, "high": None, "target": 20, "lower_is_better": True}
        return {"name": "quickstart_min", "note": note} | empty
    begun = sorted((_time(m["started"]), m["seconds"]) for m in manifests)
    # a pause of more than a minute between two steps was no part of the work: the run had been stopped
    gaps = [b[0] - a[0] - a[1] for a, b in itertools.pairwise(begun)]
    minutes = (sum(s for _, s in begun) + sum(max(g, 0) for g in gaps if g < 60)) / 60
    versions = sorted({m["git"] for m in manifests})
    note = f"from the manifests of results/quickstart, made by {', '.join(versions)}, with what passed between steps"
    stages = _stages(run)
    return row("quickstart_min", [minutes], 20, lower_is_better=True, unit="min", stages=stages, note=note)


def _time(text: str) -> float:
    return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ"))


def growth() -> list[dict]:
    """Time and peak memory of answering and judging 64, 256 and 1,024 prompts with 64 texts at a time."""
    found = {}
    for n in GROWTH:
        out = subprocess.run(
            [sys.executable, "-m", "benchmarks.loop", str(n)], cwd=PROJ_ROOT, check=True, capture_output=True, text=True
        )
        found[n] = json.loads(out.stdout.splitlines()[-1])
        print(f"  {n} prompts: {found[n]['seconds']:.1f} s, {found[n]['memory_gb']:.2f} GB", flush=True)
    first, last = found[GROWTH[0]], found[GROWTH[-1]]
    per_prompt = last["seconds"] / first["seconds"] / (GROWTH[-1] / GROWTH[0])
    memory = last["memory_gb"] / first["memory_gb"]
    sizes = {str(n): f for n, f in found.items()}
    return [
        row("growth_time", [per_prompt], 1.2, lower_is_better=True, unit="time a prompt, 1,024 : 64", sizes=sizes),
        row("growth_memory", [memory], 1.2, lower_is_better=True, unit="peak memory, 1,024 : 64", sizes=sizes),
    ]


def _answer_and_judge(n: int) -> None:
    """In a process of its own: `n` prompts, an answer of at most 32 tokens and an expected score each."""
    from benchmarks.measure import bundled
    from srlm_utils import chat, judge
    from srlm_utils.engine import Engine
    from srlm_utils.seed_model import fetch

    engine, rubric = Engine(fetch("smollm2-135m-instruct")["path"], batch_size=64), judge.Rubric("short")
    base = [r["prompt"] for r in bundled("test_prompts")]
    prompts = [f"{base[i % 64]} ({i // 64})" for i in range(n)]  # the same lengths at every size
    list(engine.generate([("x", [1, 2, 3])], n=64, max_new_tokens=3, temperature=0.7, top_p=0.9, seed=0))  # warm up
    start = time.perf_counter()
    requests = [(f"p{i:04d}", chat.prompt_ids(engine.tokenizer, chat.user(p))) for i, p in enumerate(prompts)]
    batches = engine.generate(requests, max_new_tokens=32, temperature=0.7, top_p=0.9, seed=0)
    texts = {s.key.rpartition("-")[0]: s.text for batch in batches for s in batch}
    items = [{"id": k, "prompt": p, "response": texts[k]} for (k, _), p in zip(requests, prompts, strict=True)]
    scores = [r["score"] for batch in judge.expected_scores(engine, rubric, items) for r in batch]
    assert len(scores) == n
    peak = resources.peak_memory() / 1e9
    print(json.dumps({"seconds": time.perf_counter() - start, "memory_gb": peak}))


def rows() -> list[dict]:
    return [overhead(), quickstart(bool(os.environ.get("QUICKSTART"))), *growth()]


if __name__ == "__main__":
    _answer_and_judge(int(sys.argv[1]))
