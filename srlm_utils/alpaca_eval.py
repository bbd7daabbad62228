"""AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475): answers in its format, and its figures read back.

Answers are made and written here; who compares them with the reference answers is the package `alpaca_eval`.
"""

import csv
import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

from srlm_utils import metrics
from srlm_utils.artefacts import read_json, read_jsonl
from srlm_utils.errors import DataError, MissingInputError, StepFailed

SET = "alpaca_eval"
ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"  # AlpacaEval 2's
KEYS = ("OPENAI_API_KEY", "OPENAI_API_KEYS", "OPENAI_CLIENT_CONFIG_PATH")  # where alpaca_eval finds one of OpenAI


def load_instructions(path: Path, limit: int = 0) -> list[dict]:
    """The first `limit` instructions of a file (0: all), as rows {"prompt_id", "prompt", "dataset"}.

    The file is AlpacaEval's own (a JSON list of objects with "instruction" and "dataset"), the same as JSONL, or
    prompt rows of the kit ("prompt" instead). "dataset" is the file's name where it is missing.
    """
    if not path.is_file():
        raise MissingInputError(
            f"alpaca_eval_file: {path}: no such file. Expected AlpacaEval's instructions (alpaca_eval.json) or JSONL "
            'rows with "instruction".'
        )
    rows = read_json(path) if path.suffix == ".json" else read_jsonl(path)
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path}: found {type(rows).__name__} without rows, expected a list of objects.")
    out = []
    for i, row in enumerate(rows[:limit] if limit else rows, 1):
        text = (row.get("instruction") or row.get("prompt")) if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise DataError(f'{path}: row {i}: no text in "instruction". Mend or delete this row.')
        out.append({"prompt_id": f"ae{i:05d}", "prompt": text, "dataset": row.get("dataset", path.stem)})
    return out


def model_outputs(instructions: list[dict], answers: list[dict], generator: str) -> list[dict]:
    """AlpacaEval's model_outputs: {"instruction", "output", "generator", "dataset"}, in the instructions' order.

    `answers` are rows of `answers.write_answers`, `generator` names the model in AlpacaEval's tables.
    """
    text = {a["prompt_id"]: a["text"] for a in answers}
    return [
        {
            "instruction": row["prompt"],
            "output": text[row["prompt_id"]],
            "generator": generator,
            "dataset": row["dataset"],
        }
        for row in instructions
    ]


def arguments(outputs: Path, annotator: str) -> list[str]:
    """Arguments of `alpaca_eval`; results go beside `outputs`, into a folder named after the annotator.

    Without the last two a name that was compared before would get its old figures again.
    """
    return [
        *("--model_outputs", str(outputs), "--output_path", str(outputs.parent)),
        *("--annotators_config", annotator, "--is_overwrite_leaderboard", "True", "--is_cache_leaderboard", "False"),
    ]


def command(outputs: Path, annotator: str) -> str:
    """The command for a shell."""
    return shlex.join(["alpaca_eval", *arguments(outputs, annotator)])


def missing() -> str:
    """What is missing for a comparison here, "" if nothing is."""
    if importlib.util.find_spec("alpaca_eval") is None:
        return "alpaca_eval is not installed (`pip install -c constraints.txt -e '.[benchmarks]'`)"
    if not any(os.environ.get(k) for k in KEYS):
        return f"no key of the annotator's service in the environment ({', '.join(KEYS)})"
    return ""


def run(outputs: Path, annotator: str, log: Path) -> None:
    """Have `annotator`, a paid service, compare `outputs` with AlpacaEval's reference; what it prints goes to `log`."""
    with open(log, "w", encoding="utf-8") as f:
        argv = [sys.executable, "-m", "alpaca_eval.main", "evaluate", *arguments(outputs, annotator)]
        code = subprocess.run(argv, stdout=f, stderr=subprocess.STDOUT).returncode
    if code:
        raise StepFailed(
            f"alpaca_eval ended with code {code}: {last_line(log)}\n  all it said: {log}\n  by hand: "
            f"{command(outputs, annotator)}"
        )


def compare(outputs: Path, annotator: str) -> dict[str, dict]:
    """`figures` of the answers in `outputs`; {}, and the command on the screen, where nobody can compare them here.

    Results that alpaca_eval left beside `outputs`, here or on another machine, are taken if they are of these answers.
    """
    results = outputs.parent if "/" in annotator else outputs.parent / annotator  # where alpaca_eval puts them
    if not annotator or not _compared(outputs, results):
        reason = missing() if annotator else "alpaca_eval_annotator names nobody"
        if reason:
            print(f"not compared: {reason}. By hand:\n{command(outputs, annotator or ANNOTATOR)}")
            return {}
        run(outputs, annotator, outputs.parent / "alpaca_eval.log")
    return figures(results, read_json(outputs)[0]["generator"])


def _compared(outputs: Path, results: Path) -> bool:
    """Whether the annotations in `results` are of these outputs."""
    if not (results / "annotations.json").is_file():
        return False
    text = {o["instruction"]: o["output"] for o in read_json(outputs)}
    annotations = read_json(results / "annotations.json")
    return bool(annotations) and all(text.get(a.get("instruction")) == a.get("output_2") for a in annotations)


def last_line(log: Path) -> str:
    """The last line of a log that says something, 300 characters at most."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def figures(folder: Path, generator: str) -> dict[str, dict]:
    """Win rate and length-controlled win rate, 0 to 1, out of alpaca_eval's results in `folder`.

    The win rate is the mean of the preferences in annotations.json, with an interval over instructions;
    the length-controlled one comes from leaderboard.csv with its standard error.
    """
    annotations, board = folder / "annotations.json", folder / "leaderboard.csv"
    for path in (annotations, board):
        if not path.is_file():
            raise MissingInputError(f"{path}: no such file. Run alpaca_eval on the model's outputs first.")
    values = [a.get("preference") for a in read_json(annotations)]  # 1 is the reference, 2 the model, between is unsure
    values = [1.5 if v == 0 else v for v in values if isinstance(v, int | float)]  # 0 was a draw in older versions
    wins = [v - 1 for v in values if 1 <= v <= 2]  # as alpaca_eval itself leaves out all others
    with open(board, encoding="utf-8", newline="") as f:
        row = next((r for r in csv.DictReader(f) if r[""] == generator), None)
    if row is None:
        raise DataError(f"{board}: no row of {generator!r}. Run alpaca_eval on this model's outputs again.")
    out = {"alpaca_eval_win_rate": metrics.mean(wins)}
    if row.get("length_controlled_winrate"):
        value, error = float(row["length_controlled_winrate"]) / 100, float(row["lc_standard_error"]) / 100
        out["alpaca_eval_lc_win_rate"] = metrics.normal(value, error, len(wins))
    return out


def length(outputs: list[dict]) -> dict[str, dict]:
    """Mean length of the answers in characters, as AlpacaEval counts it."""
    return {"alpaca_eval_chars": metrics.mean([len(r["output"]) for r in outputs])}
