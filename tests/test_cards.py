"""Model cards and what is pushed with them: valid metadata, honest figures, nothing of this machine."""

import json
from types import SimpleNamespace

import pytest
from huggingface_hub import DatasetCard, ModelCard

from srlm_utils import cards, example, hub
from srlm_utils.artefacts import describe, read_json, read_jsonl, write_json, write_jsonl
from srlm_utils.errors import DataError, MissingInputError, ParamError
from srlm_utils.paths import EXAMPLE
from tests.conftest import srlm


@pytest.fixture
def run(tmp_path):
    """A run of two models with weights of four bytes; its seed model is a folder of this machine."""
    run = tmp_path / "a-run"
    write_json(run / "M0/model.json", {"name": "/models/mine", "kind": "local", "license": "", "note": ""})
    for step, reads in (("02_sft@M1", {"M0/model.json": {"sha256": "0" * 64}}), ("07_dpo@M2", {})):
        model = step.partition("@")[2]
        (run / model / "model").mkdir(parents=True)
        (run / model / "model" / "model.safetensors").write_bytes(b"abcd")
        (run / model / "model" / "README.md").write_text("as trained")
        reads = reads or {"M1/model": {"sha256": "1" * 64}, "M1/aift/pairs.jsonl": {"sha256": "2" * 64, "n_rows": 7}}
        manifest = {"step": step, "params": {"seed": 1, "run_dir": "/x", "rubric": "/home/me/r.jinja"}, "inputs": reads}
        outputs = {f"{model}/model": describe(run / model / "model")}
        write_json(run / f"steps/{step}.json", manifest | {"outputs": outputs, "figures": {"n_steps": 5}, "git": "abc"})
    write_jsonl(run / "M1/aift/pairs.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}] * 7)
    return run


class FakeApi:
    """huggingface_hub.HfApi without a network: remembers what it was asked."""

    calls: list = []

    def __init__(self, token):
        self.calls.append(("token", token))

    def create_repo(self, repo, **how):
        if "unreachable" in repo:
            raise Exception("")  # httpx has errors of its own
        self.calls.append(("create", repo, how))

    def create_commit(self, repo, operations, **how):
        if "refused" in repo:
            raise OSError("403 Forbidden\nmore")
        self.calls.append(("commit", repo, {o.path_in_repo: o.path_or_fileobj for o in operations}, how))


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "calls", [])
    monkeypatch.setenv("HF_TOKEN", "hf_1234567890")
    return FakeApi


@pytest.mark.parametrize("model", ["SFT", "M1", "M2", "M3"])
def test_the_hub_reads_the_examples_cards(model):
    card = ModelCard(cards.from_run(EXAMPLE, model))
    data = card.data
    assert (data.base_model, data.license, data.library_name) == (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
        "transformers",
    )
    assert ModelCard(str(card)).data.to_dict() == data.to_dict()
    measured = read_json(EXAMPLE / model / "eval/metrics.json")
    rows = {(r["set"], r["metric"], r["judge_mode"]): r["value"] for r in measured}
    assert data.eval_results
    for r in data.eval_results:
        mode = r.metric_name.partition(":")[0].partition(", ")[2]
        assert rows[r.dataset_type, r.metric_type, mode] == pytest.approx(r.metric_value, abs=1e-4)
    # a verdict of the run's own models stands in the text, where it is called that, and not in the metadata
    assert not any("win" in r.metric_type or "score" in r.metric_type for r in data.eval_results)
    assert "(inside the loop)" in card.text and "## Limits" in card.text and "244 rows" in card.text


def test_lineage_goes_back_to_the_seed_model():
    text = cards.from_run(EXAMPLE, "M3")
    order = [text.index(f"{i}. {m} ") for i, m in enumerate(["M0", "M1", "M2", "M3"], 1)]
    n = len(read_jsonl(EXAMPLE / "M2/aift/pairs.jsonl"))
    assert order == sorted(order) and f"M2/aift/pairs.jsonl ({n} rows)" in text
    assert cards.ancestors("SFT") == ["SFT"] and cards.ancestors("M3") == ["M1", "M2", "M3"]


def test_a_card_counts_what_was_learned_from(run):
    """Of pairs of judgements, and of earlier rounds' pairs, a training takes a share."""
    path = run / "steps/07_dpo@M2.json"
    manifest = read_json(path)
    manifest["inputs"]["M1/aift/judge_pairs.jsonl"] = {"sha256": "3" * 64, "n_rows": 97}
    manifest["figures"]["learned"] = {"M1/aift/pairs.jsonl": 7, "M1/aift/judge_pairs.jsonl": 1}
    write_json(path, manifest)
    text = cards.from_run(run, "M2")
    assert "M1/aift/pairs.jsonl (7 rows), M1/aift/judge_pairs.jsonl (1 rows)." in text
    assert "97 rows" not in text and "| learned |" not in text


def test_what_is_unknown_is_left_out_and_paths_stay_at_home(run):
    text = cards.from_run(run, "M2")
    data = ModelCard(text).data
    assert data.base_model is None and data.license is None and data.eval_results is None
    assert "Nothing had been measured" in text and "`.../r.jinja`" in text and "M0 is .../mine" in text
    assert "/home/me" not in text and "/models" not in text and "run_dir" not in text
    with pytest.raises(MissingInputError, match="no trained model"):
        cards.from_run(run, "M0")
    with pytest.raises(MissingInputError, match="no step that made M5"):
        cards.from_run(run, "M5")


def test_a_card_is_written_with_the_weights_wherever_a_run_starts(run):
    """In a scratch run the steps before may be missing, or may have had the seed model as a stand-in."""
    step = SimpleNamespace(
        name="07_dpo@M3",
        run=run,
        params=SimpleNamespace(model="M3", seed=0, file="/home/me/pairs.jsonl"),
        input=lambda path: run / path,
        model_revision=lambda model: "f" * 12,
    )
    manifest = read_json(run / "steps/07_dpo@M2.json")
    del manifest["inputs"]["M1/model"]
    write_json(run / "steps/07_dpo@M2.json", manifest)
    text = cards.at_training(step, "M2", {"M2/aift/pairs.jsonl": 9}, {"n_steps": 2})
    assert "M2 was made from M1 by DPO" in text and f"M3 was made from M2 ({'f' * 12}) by DPO" in text
    assert "| M2/aift/pairs.jsonl | 9 |" in text and "/home/me" not in text
    (run / "steps/02_sft@M1.json").unlink()
    assert ModelCard(cards.at_training(step, "M2", {}, {})).data.tags == ["self-rewarding", "srlm-kit", "dpo"]


def test_a_push_is_one_commit_with_the_card_and_as_trained(run, api):
    assert hub.push(run, "M2", "ada/m2", data=True) == ["ada/m2", "ada/m2-aift"]
    token, create, commit, create_data, commit_data = api.calls
    assert token == ("token", "hf_1234567890")
    assert create == ("create", "ada/m2", {"repo_type": "model", "private": True, "exist_ok": True})
    assert set(commit[2]) == {"README.md", "model.safetensors"}
    assert commit[2]["README.md"].decode() == cards.from_run(run, "M2")
    assert create_data[1:] == ("ada/m2-aift", {"repo_type": "dataset", "private": True, "exist_ok": True})
    assert set(commit_data[2]) == {"README.md", "M1/pairs.jsonl"}
    card = DatasetCard(commit_data[2]["README.md"].decode())
    assert card.data.configs == [{"config_name": "M1_pairs", "data_files": "M1/pairs.jsonl", "default": True}]
    assert "7 rows" in card.text and "/models" not in card.text
    assert "hf_1234567890" not in json.dumps([str(c) for c in api.calls[1:]])


def test_a_push_holds_the_rows_of_a_rendered_run_unpacked(run, api):
    rows = (run / "M1/aift/pairs.jsonl").read_bytes()
    example.pack(run / "M1/aift/pairs.jsonl")
    hub.push(run, "M2", "ada/m2", data=True)
    files = api.calls[-1][2]
    assert set(files) == {"README.md", "M1/pairs.jsonl"} and files["M1/pairs.jsonl"] == rows
    assert "7 rows" in DatasetCard(files["README.md"].decode()).text


def test_a_push_is_checked_before_anything_is_asked(run, api, monkeypatch):
    with pytest.raises(ParamError, match="expected owner/name"):
        hub.push(run, "M2", "m2")
    with pytest.raises(MissingInputError, match="descends from no model"):
        hub.push(run, "M1", "ada/m1", data=True)
    with pytest.raises(MissingInputError, match="weights are not kept"):
        hub.push(EXAMPLE, "M2", "ada/m2")
    (run / "M1/model/model.safetensors").write_bytes(b"dcba")
    with pytest.raises(DataError, match="not what its manifest says"):
        hub.push(run, "M1", "ada/m1")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ParamError, match="HF_TOKEN is not set"):
        hub.push(run, "M2", "ada/m2")
    assert not api.calls
    monkeypatch.setenv("HF_TOKEN", "hf_1234567890")
    with pytest.raises(DataError, match="ada/refused .model.: could not be pushed .*.OSError: 403 Forbidden.. Check"):
        hub.push(run, "M2", "ada/refused")
    with pytest.raises(DataError, match="ada/unreachable .model.: could not be pushed .*.Exception: .. Check"):
        hub.push(run, "M2", "ada/unreachable")


def test_the_command_names_what_is_missing(run):
    result = srlm("push", str(run), "M2", "--repo", "ada/m2", env={"HF_TOKEN": ""})
    assert result.returncode == 2 and "HF_TOKEN is not set" in result.stderr
