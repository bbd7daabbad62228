"""Model cards: what a model was made from and how, what was measured, what to beware of.

A card is written twice. With the weights it has no figures: it is part of the folder whose hash later steps depend
on. `srlm share` and `srlm push` write it again from the run's manifests, with what was measured since.
"""

from pathlib import Path

import yaml

from srlm_utils import metrics, rendered
from srlm_utils.artefacts import read_json
from srlm_utils.errors import DataError, MissingInputError
from srlm_utils.lineage import draft_of, init_model, is_model_name, models_before, weights
from srlm_utils.paths import shown
from srlm_utils.report import rate
from srlm_utils.seed_model import EMBEDDED
from srlm_utils.verdicts import judge_label

LICENSES = {"Apache-2.0": "apache-2.0", "Gemma Terms of Use": "gemma"}  # the hub's names
# Figures that no model of the run decides: they alone stand in the card's metadata, where nothing can be explained.
NEUTRAL = ["pairwise_accuracy", "prompt_strict_accuracy", "instruction_strict_accuracy", "ended_rate"]
NEUTRAL += ["lm_eval_acc", "lm_eval_acc_norm", "lm_eval_exact_match"]
_TABLE = [
    "pairwise_accuracy",
    "longer_baseline",
    "tie_rate",
    "agreement_gain",
    "win_rate",
    "win_rate_length_controlled",
]
_TABLE += ["mean_score", "answer_chars", "ended_rate", "repeated_4grams", *NEUTRAL[1:3], "rouge_l", *metrics.FIELD]
_NOT_SHOWN = {"run_dir", "model", "device", "batch_size", "report_to"}

LIMITS = """A research artefact, made to study how a model learns from its own judgements. Its answers are often wrong,
and nothing was done to make them safe. A judge out of the run's own models is no independent evidence: it scored the
data that later models learned from. Intervals hold for the prompts of this run; another seed may give another order of
models. Languages and tasks beyond the seed's were not looked at."""


def base(pointer: dict) -> dict:
    """What the hub's metadata says of a run's seed model: base_model and license, as far as they are known."""
    out, name = {}, pointer["name"]
    hub_id = EMBEDDED[name].hub_id if name in EMBEDDED else name if pointer["kind"] == "hub" else ""
    if hub_id:
        out["base_model"] = hub_id
    if license := LICENSES.get(pointer.get("license", "")):
        out["license"] = license
    return out


def card(
    model: str, *, run: str, lineage: list[str], pointer: dict, made: dict, rows: list[dict] = (), revision: str = ""
) -> str:
    """The text of a card, metadata first.

    `lineage`: the models it descends from, each with how it was made; `made`: the params, inputs and figures of its
    training step's manifest; `rows`: figures as in metrics.json, empty where nothing is measured yet.
    """
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=r["set"],
            dataset_name=f"{r['set']} (of this run)",
            metric_type=r["metric"],
            metric_name=f"{r['metric']}{', ' + r['judge_mode'] if r['judge_mode'] else ''}: {rate(r)}",
            metric_value=round(r["value"], 4),
        )
        for r in rows
        if r["metric"] in NEUTRAL and r["value"] is not None and r["judge"] in ("", model) and not r["opponent"]
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["self-rewarding", "srlm-kit", "dpo" if made["step"].startswith("07_dpo") else "sft"],
        model_name=f"{run}-{model}",
        eval_results=results or None,
        **base(pointer),
    )
    if not results:
        data.model_name = None
    n_rows = _learned(made)
    figures = {k: v for k, v in made["figures"].items() if k != "learned"}  # they stand under Data
    params = {k: v for k, v in made["params"].items() if k not in _NOT_SHOWN}
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {model} of the run {run}",
        "A model of *Self-Rewarding Language Models* (Yuan et al. 2024, https://arxiv.org/abs/2401.10020), "
        "made with the srlm-kit.",
        "## Lineage\n" + "\n".join(f"{i}. {text}" for i, text in enumerate(lineage, 1)),
        "## Data\n" + _table({"file of the run": list(n_rows), "rows": list(n_rows.values())}),
        "## Training\n" + _kept(made) + _table({"parameter": [*params], "value": [*map(_cell, params.values())]}),
        _table({"figure": [*figures], "value": [*map(_cell, figures.values())]}),
        "## Evaluation\n" + _evaluation(model, list(rows)),
        f"## Limits\n{LIMITS}",
    ]
    if pointer.get("note"):
        parts.append(f"The seed model {pointer['name']}: {pointer['note']}.")
    if revision:
        parts.append(f"Kit revision {revision}.")
    return "\n\n".join(parts) + "\n"


def _kept(made: dict) -> str:
    if "kept_step" not in made["figures"]:
        return ""
    return (
        f"The weights are those after step {made['figures']['kept_step']} of {made['figures']['n_steps']}: of the "
        f"checkpoints compared on the validation prompts by {made['params']['select_judge']} it did best "
        "(selection.csv).\n\n"
    )


def _cell(value) -> str:
    return f"`{value}`" if value != "" else ""


def _table(columns: dict[str, list]) -> str:
    """A markdown table."""
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    for row in zip(*columns.values(), strict=True):
        lines.append(" | ".join(str(v).replace("|", "\\|").replace("\n", " ") for v in row))
    return "\n".join(f"| {line} |" for line in lines)


def _evaluation(model: str, rows: list[dict]) -> str:
    rows = [r for r in rows if r["metric"] in _TABLE]
    if not rows:
        return "Nothing had been measured when this card was written; the run's report has the figures."
    rows.sort(key=lambda r: _TABLE.index(r["metric"]))
    who = [
        "itself"
        if r["judge"] == model and r["set"] != "test_prompts"
        else judge_label(r["judge"])
        if r["judge"]
        else ""
        for r in rows
    ]
    table = {
        "figure": [r["metric"] for r in rows],
        "on": [r["set"] + (f", against {r['opponent']}" if r["opponent"] else "") for r in rows],
        "judge": [f"{w}, {r['judge_mode']}" if w and r["judge_mode"] else w for w, r in zip(who, rows, strict=True)],
        "value": [rate(r) for r in rows],
    }
    seen = dict.fromkeys(r["metric"] for r in rows)
    meanings = "\n".join(f"- `{m}`: {metrics.METRICS[m][1]}" for m in seen)
    return f"In brackets 95 % intervals over prompts.\n\n{_table(table)}\n\n{meanings}"


def at_training(step, start: str, data: dict[str, int], figures: dict) -> str:
    """The card that lies beside new weights; `data` has the rows of each file, `figures` those of the step."""
    inputs = {path: {"n_rows": n} for path, n in data.items()} | {
        weights(start): {"sha256": step.model_revision(start)}
    }
    made = {"step": step.name, "params": vars(step.params), "inputs": inputs, "figures": figures}
    pointer = read_json(step.input("M0/model.json"))
    model, before = step.params.model, []
    for m in ancestors(model)[:-1]:
        try:
            before.append(training_manifest(step.run, m))
        except MissingInputError:  # a scratch run starts anywhere
            continue
    text = card(model, run=step.run.name, lineage=lineage(pointer, [*before, made]), pointer=pointer, made=made)
    return rendered.forget_machine(text, rendered.absolute_paths(vars(step.params), pointer["name"]))


# ---- from a run's folder


def training_manifest(run: Path, model: str) -> dict:
    """The manifest of the step that made a model."""
    for stage in ("07_dpo", "02_sft"):
        if (path := run / "steps" / f"{stage}@{model}.json").is_file():
            return read_json(path)
    raise MissingInputError(f"{shown(run)}: no step that made {model} is done here; `srlm status` lists what is.")


def _learned(manifest: dict) -> dict[str, int]:
    """Rows of each file that a training learned from: of some it takes a share (`judge_share`, `replay`)."""
    n_rows = {path: info["n_rows"] for path, info in manifest["inputs"].items() if "n_rows" in info}
    return n_rows | manifest["figures"].get("learned", {})


def lineage(pointer: dict, manifests: list[dict]) -> list[str]:
    """One line per model, from the seed model on; `manifests` of the training steps in their order."""
    revision = f" at revision {pointer['revision']}" if pointer.get("revision") else ""
    lines = [f"M0 is {pointer['name']}{revision} ({pointer['kind']}, license {pointer.get('license') or 'unknown'})."]
    for m in manifests:
        name = m["step"].partition("@")[2]
        how = "by DPO on preference pairs" if m["step"].startswith("07_dpo") else "by supervised fine-tuning"
        start = init_model(name)
        data = ", ".join(f"{path} ({n} rows)" for path, n in _learned(m).items())
        source = m["inputs"].get(weights(start), {}).get("sha256", "")  # a scratch run may have had a stand-in
        lines.append(f"{name} was made from {start}{f' ({source[:12]})' if source else ''} {how}: {data}.")
        if any(p.startswith(f"{draft_of(name)}/") for p in m["inputs"]):
            lines.append(
                f"{draft_of(name)}, a draft of {name} by DPO on {start}'s own pairs, wrote some chosen answers."
            )
    return lines


def ancestors(model: str) -> list[str]:
    """Trained models from the first to `model`: what it descends from, itself last."""
    chain = [model]
    while (start := init_model(chain[0])) != "M0":
        chain.insert(0, start)
    return chain


def from_run(run: Path, model: str) -> str:
    """A model's card from the run's manifests and figures; paths of this machine stay out of it."""
    if not is_model_name(model) or model == "M0":
        raise MissingInputError(f"{model}: no trained model of a run. Expected SFT, M1, M2, ...")
    pointer = read_json(run / "M0" / "model.json")
    made = training_manifest(run, model)
    measured = run / model / "eval" / "metrics.json"
    rows = read_json(measured) if measured.is_file() else []
    field = run / model / "benchmarks" / "metrics.json"
    rows += read_json(field) if field.is_file() else []
    text = card(
        model,
        run=run.name,
        lineage=lineage(pointer, [training_manifest(run, m) for m in ancestors(model)]),
        pointer=pointer,
        made=made,
        rows=[r for r in rows if r["model"] == model and r["opponent"] in ("", *models_before(model))],
        revision=made.get("git", ""),
    )
    return rendered.forget_machine(text, rendered.absolute_paths(*recorded(run)))


def recorded(run: Path) -> list:
    """Everything that a run's parameters say: of the experiment, of each step, and where its seed model is."""
    path, out = run / "params.yaml", []
    if path.is_file():
        try:  # as it stands: it may have names of another version
            out.append(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (yaml.YAMLError, UnicodeDecodeError) as e:
            raise DataError(f"{shown(path)}: not valid YAML ({e}).") from None
    out += [read_json(path)["params"] for path in (run / "steps").glob("*.json")]
    return out + ([read_json(run / "M0/model.json")["name"]] if (run / "M0/model.json").is_file() else [])


def trained_models(run: Path) -> list[str]:
    """Models whose training step is done, in the order of the loop."""
    names = {
        p.stem.partition("@")[2] for stage in ("02_sft", "07_dpo") for p in (run / "steps").glob(f"{stage}@*.json")
    }
    return sorted(filter(is_model_name, names), key=lambda m: -1 if m == "SFT" else int(m[1:]))


def front(run: Path, model: str) -> str:
    """A model in a few words, for a list."""
    made = training_manifest(run, model)
    measured = run / model / "eval" / "metrics.json"
    rows = read_json(measured) if measured.is_file() else []
    judged = [r for r in rows if r["metric"] == "pairwise_accuracy" and r["judge_mode"] == "expected"]
    agreement = "".join(f"; reward agreement on {r['set']} {rate(r)}" for r in judged)
    return f"from {init_model(model)} by {made['step'].partition('@')[0]}{agreement}"
