"""``srlm push``: a model of a run, its card and the preference data it descends from, on the Hugging Face hub.

The token comes from the variable HF_TOKEN and from nowhere else. A new repository is private; making it public is a
click on the hub, after a look at it.
"""

import os
import re
from pathlib import Path

from srlm_utils import cards, rendered
from srlm_utils.artefacts import CARD, count_rows, describe, find_jsonl, read_bytes, read_json
from srlm_utils.errors import DataError, MissingInputError, ParamError, first_line
from srlm_utils.lineage import draft_of, init_model
from srlm_utils.paths import shown

TOKEN = "HF_TOKEN"


def push(run: Path, model: str, repo: str, *, data: bool = False) -> list[str]:
    """Upload `model` to `repo`, and with `data` the AIFT rows of the models before it to ``<repo>-aift``.

    Each repository gets one commit, whole or not at all. Returns the addresses. Everything is checked first: the
    token, the name, the folder, and that the weights are those of the manifest.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ParamError(f"--repo {repo}: expected owner/name, for example ada/m3-quickstart.")
    if not os.environ.get(TOKEN):
        raise ParamError(f"{TOKEN} is not set. Put a token with write access into the environment: {TOKEN}=hf_...")
    text = cards.from_run(run, model)
    files = {CARD: text.encode()} | _weights(run, model)
    repos = [(repo, "model", files)]
    if data:
        repos.append((f"{repo}-aift", "dataset", _aift(run, model)))

    from huggingface_hub import CommitOperationAdd, HfApi

    api, addresses = HfApi(token=os.environ[TOKEN]), []
    for name, kind, content in repos:
        try:
            api.create_repo(name, repo_type=kind, private=True, exist_ok=True)
            done = api.create_commit(
                name,
                [CommitOperationAdd(path, source) for path, source in content.items()],
                repo_type=kind,
                commit_message=f"{model} of the run {run.name}",
            )
        except Exception as e:  # no network, no right to write: the hub's client raises many kinds
            raise DataError(
                f"{name} ({kind}): could not be pushed to the hub ({type(e).__name__}: {first_line(e)}). Check the "
                f"network, and that the token may write there. Done before: {', '.join(addresses) or 'nothing'}."
            ) from e
        addresses.append(str(getattr(done, "repo_url", "") or name))
    return addresses


def _weights(run: Path, model: str) -> dict[str, str]:
    """Path in the repository -> file, of a model folder that is as its training step left it."""
    folder = run / model / "model"
    if not folder.is_dir():
        raise MissingInputError(f"{shown(folder)} is missing: weights are not kept in results/example; run it first.")
    known = cards.training_manifest(run, model)["outputs"][f"{model}/model"]["sha256"]
    if describe(folder)["sha256"] != known:
        raise DataError(
            f"{shown(folder)} is not what its manifest says: a file was changed. Run the step that makes {model} again."
        )
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {p.relative_to(folder).as_posix(): str(p) for p in files if p.name != CARD}


def _aift(run: Path, model: str) -> dict[str, str | bytes]:
    """Files of a data set: what each ancestor wrote, scored and turned into training rows, and a card."""
    files: dict[str, str | bytes] = {}
    configs, lines = [], []
    chain = cards.ancestors(model)
    learned = {path for m in chain[1:2] for path in cards.training_manifest(run, m)["inputs"]}
    for m in (name for successor in chain[1:] for name in (init_model(successor), draft_of(successor))):
        for path in find_jsonl(run / m / "aift", "*.jsonl"):
            files[f"{m}/{path.name}"] = str(path) if path.exists() else read_bytes(path)
            # the first table of the page is what M2 learned from
            first = path.stem in ("pairs", "positives") and f"{m}/aift/{path.name}" in learned
            configs.append((f"{m}_{path.stem}", f"{m}/{path.name}", first))
            lines.append(f"- `{m}/{path.name}`: {count_rows(path)} rows")
    if not files:
        raise MissingInputError(f"{model} descends from no model that made preference data; leave out --data.")
    from huggingface_hub import DatasetCardData

    card = DatasetCardData(
        task_categories=["text-generation"],
        tags=["self-rewarding", "srlm-kit", "preference"],
        configs=[
            {"config_name": name, "data_files": path} | ({"default": True} if first else {})
            for name, path, first in configs
        ],
    )
    source = read_json(run / "M0" / "model.json")["name"]
    text = (
        f"---\n{card.to_yaml()}\n---\n\n# AIFT of {model}, run {run.name}\n\nPrompts, candidates, judgements and pairs "
        f"that the models before {model} made of {source}, and learned from. Everything here was written and scored by "
        "small models: it is often wrong, and its scores are those of the models themselves.\n\n"
        + "\n".join(lines)
        + f"\n\n## Limits\n{cards.LIMITS}\n"
    )
    return {CARD: rendered.forget_machine(text, rendered.absolute_paths(source)).encode()} | files
