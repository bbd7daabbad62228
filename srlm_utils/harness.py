"""EleutherAI's lm-evaluation-harness on a model of the run, in a process of its own.

An optional extra (`benchmarks` in pyproject.toml). Prompts and the number of examples are the task's own; no chat
template is applied, which is the harness' default.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from srlm_utils import metrics
from srlm_utils.alpaca_eval import last_line
from srlm_utils.artefacts import read_json
from srlm_utils.errors import DataError, ParamError, StepFailed
from srlm_utils.paths import resolve

METRICS = {m: f"lm_eval_{m}" for m in ("acc", "acc_norm", "exact_match")}  # theirs: ours
CPU_BATCH = 8  # rows at once where batch_size is 0; on a GPU the harness finds what fits


def require() -> None:
    """Raise `ParamError` if lm_eval cannot be imported."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ParamError(
            "benchmarks.lm_eval_tasks: lm_eval is not installed. Install the extra with "
            '`pip install -c constraints.txt -e ".[benchmarks]"`, or leave the tasks empty.'
        )


def run(
    model_folder: str,
    tasks: list[str],
    out: Path,
    *,
    limit: int = 0,
    include_path: str = "",
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 0,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> dict:
    """The harness' results of a model folder on `tasks`: its results file, as a dict.

    `limit` rows of each task (0: all); `include_path` is a folder with tasks of your own. What it prints goes to
    ``lm_eval.log`` in the folder `out`, its results file beside it. Raises `ParamError` if it is not installed and
    `StepFailed`, with its last line, if it fails (an unknown task, a data set that cannot be fetched).
    """
    from srlm_utils.devices import pick_device, pick_dtype

    require()
    if "," in model_folder:
        raise ParamError(f"{model_folder}: the harness cannot read a path with a comma. Move the run.")
    device, dtype = pick_device(device), pick_dtype(dtype, device)
    out.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "lm_eval", "run", "--model", "hf"]
    argv += ["--model_args", f"pretrained={model_folder},dtype={dtype}"]
    argv += ["--tasks", ",".join(tasks), "--device", device, "--seed", str(seed), "--output_path", str(out)]
    argv += ["--batch_size", str(batch_size or ("auto" if device.startswith("cuda") else CPU_BATCH))]
    argv += ["--limit", str(limit)] if limit else []
    argv += ["--include_path", str(resolve(include_path))] if include_path else []
    argv += ["--trust_remote_code"] if trust_remote_code else []
    before, log = {*out.rglob("results_*.json")}, out / "lm_eval.log"
    with open(log, "w", encoding="utf-8") as f:
        env = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
        code = subprocess.run(argv, stdout=f, stderr=subprocess.STDOUT, env=env).returncode
    found = {*out.rglob("results_*.json")} - before
    if code or not found:
        raise StepFailed(f"lm_eval ended with code {code}: {last_line(log)}\n  all it said: {log}")
    return read_json(max(found, key=lambda p: p.stat().st_mtime))


def metric_rows(results: dict, model: str) -> list[dict]:
    """Accuracy, normalised accuracy and exact match of every task and group: set ``lm_eval/<task>``.

    `results` is the harness' results file. Where a task reads answers through a filter, its name is in judge_mode.
    The interval is 1.96 standard errors, as the harness estimates them; n counts rows.
    """
    try:
        tasks = results["results"]
        sizes = {task: n["effective"] for task, n in results["n-samples"].items()}
    except (KeyError, TypeError) as e:
        raise DataError(
            f"lm_eval's results: {e} is missing; expected `results` and `n-samples` of a results file."
        ) from e
    rows = []
    for task, found in tasks.items():
        n = _rows_of(task, sizes, results.get("group_subtasks", {}))
        for theirs, value in found.items():
            name, _, filtered = theirs.partition(",")
            if name in METRICS and isinstance(value, int | float):
                error = found.get(f"{name}_stderr,{filtered}")
                figure = metrics.normal(float(value), error if isinstance(error, int | float) else None, n)
                where = {"model": model, "set": f"lm_eval/{task}", "judge_mode": "" if filtered == "none" else filtered}
                rows += metrics.metric_rows({METRICS[name]: figure}, **where)
    return rows


def _rows_of(task: str, sizes: dict[str, int], groups: dict[str, list[str]]) -> int:
    """Rows of a task, or of all tasks of a group."""
    return sizes[task] if task in sizes else sum(_rows_of(t, sizes, groups) for t in groups.get(task, []))
