"""What a finished cell of a sweep (one variant, one seed) leaves: small tables from which it can be compared anywhere.

params.yaml          the experiment, but for where its models ran
cell.json            minutes of work, revision of the kit, 12 digits of the weights of every model that was trained
metrics.csv          the run's figures
answers.jsonl.gz     every model's answers to the test prompts, with the instructions they follow
scores.jsonl.gz      expected scores of these answers, with the judge and its weights
verdicts.jsonl.gz    head-to-head verdicts of the run
agreement.jsonl.gz   for each ranked prompt what a model's judging earns (`metrics.credit`), over all its rankings
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from srlm_utils import metrics, rankings
from srlm_utils.artefacts import (
    model_sha256,
    new_folder,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
    write_text,
)
from srlm_utils.errors import DataError, MissingInputError
from srlm_utils.instructions import followed
from srlm_utils.lineage import model_names, models_before
from srlm_utils.params import PLACE
from srlm_utils.paths import shown
from srlm_utils.report import read_metrics

DEFAULT = "default"  # the variant that is the base as it stands
MAX_BYTES = 300_000  # of a cell


class _Row(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Answer(_Row):
    model: str
    prompt_id: str
    prompt: str
    text: str
    n_tokens: int
    ended: bool
    n_followed: int = 0
    n_instructions: int = 0  # that a program can verify


class _Score(_Row):
    model: str
    prompt_id: str
    judge: str
    judge_rev: str
    score: float


class _Verdict(_Row):
    model_a: str
    model_b: str
    judge: str
    judge_mode: str
    prompt_id: str
    order: str
    p_first: float = Field(ge=0, le=1)


class _Agreement(_Row):
    model: str
    set: str
    judge_mode: str
    prompt_id: str
    credit: float = Field(ge=0)
    n_pairs: int = Field(ge=1)


SHAPES = {"answers": _Answer, "scores": _Score, "verdicts": _Verdict, "agreement": _Agreement}


@dataclass(frozen=True)
class Cell:
    params: dict  # the experiment's tree
    about: dict
    metrics: pd.DataFrame
    answers: list[dict]
    scores: list[dict]
    verdicts: list[dict]
    agreement: list[dict]

    @property
    def variant(self) -> str:
        return self.params.get("common", {}).get("variant", DEFAULT)

    @property
    def seed(self) -> int:
        return self.params.get("common", {}).get("seed", 0)

    @property
    def models(self) -> list[str]:
        """M0, SFT, M1 ... of the run."""
        return _models(self.params)

    @property
    def last(self) -> str:
        """The last model of the run."""
        return self.models[-1]


def _models(params: dict) -> list[str]:
    return model_names(params.get("common", {}).get("iterations", 3))


def from_run(run: Path) -> Cell:
    """The cell that a finished run folder holds."""
    if not (run / "report/metrics.csv").is_file():
        raise MissingInputError(f"{shown(run)}: not a finished run (09_report@run is not done).")
    params = _params(run / "params.yaml")
    manifests = {p.stem: read_json(p) for p in sorted((run / "steps").glob("*.json"))}
    names = _models(params)
    tests = {p["prompt_id"]: p for p in read_jsonl(run / "seed/test_prompts.jsonl")}
    ranked = read_jsonl(run / "seed/ranked_eval.jsonl")
    rows: dict[str, list[dict]] = {name: [] for name in SHAPES}
    for m in names:
        for a in read_jsonl(run / f"{m}/eval/answers.jsonl"):
            ids, kwargs = (tests[a["prompt_id"]].get(k, []) for k in ("instruction_id_list", "kwargs"))
            found = {"n_followed": sum(followed(a["text"], ids, kwargs)), "n_instructions": len(ids)} if ids else {}
            kept = {k: a[k] for k in ("prompt_id", "prompt", "text", "n_tokens", "ended")}
            rows["answers"].append({"model": m} | kept | found)
        rows["scores"] += [{"model": m} | r for r in read_jsonl(run / f"{m}/eval/answer_scores.jsonl")]
        for o in models_before(m):
            rows["verdicts"] += read_jsonl(run / f"{m}/eval/verdicts/{m}_vs_{o}.jsonl")
        rows["agreement"] += _agreement(m, ranked, read_jsonl(run / f"{m}/eval/judgements.jsonl"))
    about = {
        "minutes": round(sum(m["seconds"] for m in manifests.values()) / 60, 1),
        "git": manifests["09_report@run"]["git"],
        "weights": {m: model_sha256(run / m / "model")[:12] for m in names if (run / m / "model").is_dir()},
    }
    # the same prompt in one place: what repeats nearby costs nothing in the archive
    rows["answers"].sort(key=lambda a: (a["prompt_id"], names.index(a["model"])))
    return Cell(params, about, read_metrics(run / "report/metrics.csv"), **rows)


def _agreement(model: str, ranked: list[dict], judged: list[dict]) -> list[dict]:
    out: dict[tuple, dict] = {}
    for mode in dict.fromkeys(r["judge_mode"] for r in judged):
        scores = [r for r in judged if r["judge_mode"] == mode]
        asked = rankings.judged_by_all(ranked, scores)
        for row, prompt in zip(asked, rankings.scored_prompts(asked, scores), strict=True):
            if n := len(metrics.ordered_pairs(prompt["ranks"])):
                who = {"model": model, "set": row["set"], "judge_mode": mode, "prompt_id": row["prompt_id"]}
                of_prompt = out.setdefault((mode, row["set"], row["prompt"]), who | {"credit": 0.0, "n_pairs": 0})
                of_prompt["credit"] += metrics.credit(prompt)
                of_prompt["n_pairs"] += n
    return [*out.values()]


def write(cell: Cell, folder: Path) -> None:
    """Write a cell; the folder appears whole. Above `MAX_BYTES` answers are left out, and said: first those of the
    models between M1 and the last."""
    with new_folder(folder) as tmp:
        write_text(tmp / "params.yaml", yaml.safe_dump(anywhere(cell.params), sort_keys=False, allow_unicode=True))
        write_json(tmp / "cell.json", cell.about)
        cell.metrics.to_csv(tmp / "metrics.csv", index=False, lineterminator="\n")
        for name in SHAPES:
            write_jsonl(tmp / f"{name}.jsonl.gz", getattr(cell, name))
        spare = [m for m in dict.fromkeys(a["model"] for a in cell.answers) if m not in (cell.last, "M1")]
        answers, left_out = cell.answers, []
        while spare and sum(p.stat().st_size for p in tmp.iterdir()) > MAX_BYTES:
            left_out.append(spare.pop())
            answers = [a for a in answers if a["model"] != left_out[-1]]
            write_jsonl(tmp / "answers.jsonl.gz", answers)
        if left_out:
            left = ", ".join(left_out)
            print(f"  {shown(folder)}: answers of {left} are left out, to stay under {MAX_BYTES:,} bytes")


def read(folder: Path) -> Cell:
    """A cell that was written before; `DataError` says what is wrong with it, and in which file."""
    for name in ("params.yaml", "cell.json", "metrics.csv", *(f"{n}.jsonl.gz" for n in SHAPES)):
        if not (folder / name).is_file():
            raise DataError(f"{shown(folder)}: no {name}. Restore it, or delete the folder and run the sweep again.")
    rows = {name: _rows(folder / f"{name}.jsonl.gz", shape) for name, shape in SHAPES.items()}
    about = read_json(folder / "cell.json")
    if not isinstance(about, dict):
        raise DataError(f"{shown(folder / 'cell.json')}: found {type(about).__name__}, expected an object.")
    return Cell(_params(folder / "params.yaml"), about, read_metrics(folder / "metrics.csv"), **rows)


def read_all(sweep: Path) -> list[Cell]:
    """All cells of a sweep's folder, by name; `DataError` for none, and for one that is not what its folder says."""
    out = []
    for folder in sorted(p for p in sweep.glob("*-*") if p.is_dir() and not p.name.startswith(".")):
        cell = read(folder)
        if f"{cell.variant}-{cell.seed}" != folder.name:
            raise DataError(f"{shown(folder)}: its params.yaml is of {cell.variant}, seed {cell.seed}. Rename it.")
        out.append(cell)
    if not out:
        raise DataError(f"{shown(sweep)}: no finished cell. Run srlm sweep first.")
    return out


def _rows(path: Path, shape: type[_Row]) -> list[dict]:
    rows = read_jsonl(path)
    try:
        TypeAdapter(list[shape]).validate_python(rows)
    except ValidationError as e:
        err = e.errors()[0]
        raise DataError(
            f"{shown(path)}: row {err['loc'][0] + 1}: {'.'.join(map(str, err['loc'][1:]))}: {err['msg']}. Restore the "
            "file, or delete the cell's folder and run the sweep again."
        ) from None
    return rows


def _params(path: Path) -> dict:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as e:
        raise DataError(f"{shown(path)}: cannot be read ({e}).") from None
    common = tree.get("common", {}) if isinstance(tree, dict) else None
    if not isinstance(common, dict):
        raise DataError(f"{shown(path)}: expected sections such as `common:` and `sft:`.")
    for name, kind in (("variant", str), ("seed", int), ("iterations", int)):
        if not isinstance(common.get(name, kind()), kind):
            raise DataError(f"{shown(path)}: common.{name} is {common[name]!r}, expected {kind.__name__}.")
    return tree


def anywhere(tree: dict) -> dict:
    """An experiment's tree without where its models run (`PLACE`): a cell is the same on whatever machine."""
    return {k: anywhere(v) if isinstance(v, dict) else v for k, v in tree.items() if k not in PLACE}


def flat_params(tree: dict, prefix: str = "") -> dict:
    """``{"dpo.beta": 0.1, "by_model.M1.sft.epochs": 2}``: an experiment's tree `anywhere`, without its nesting."""
    out = {}
    for key, value in tree.items():
        if key not in PLACE:
            out |= flat_params(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out
