"""Static rules: what every notebook looks like, and that every preset fits every notebook."""

import json
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import papermill as pm
import pytest

from srlm_utils import lineage, pairs, plan
from srlm_utils.params import STAGES, Experiment, stage_key
from srlm_utils.plan import list_steps
from srlm_utils.tokens import token_table
from tests.conftest import example_notebooks

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
READING = ("00_tour", "11_label", "12_compare")  # opened by people, no step of a run
STAGE_NOTEBOOKS = [n for n in NOTEBOOKS if n.stem not in READING]
PRESETS = sorted((ROOT / "params").glob("*.yaml"))
VARIANTS = sorted((ROOT / "params" / "variants").glob("*.yaml"))
TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list[str]": list}


def read(path):
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    return nb


@cache
def parameter_names(stage):
    return set(pm.inspect_notebook(str(ROOT / "notebooks" / f"{stage}.ipynb")))


def code(nb):
    return [c for c in nb.cells if c.cell_type == "code"]


def test_the_notebooks_are_there():
    assert [n.stem[:2] for n in NOTEBOOKS] == [f"{i:02d}" for i in range(14)]
    assert {stage_key(n.stem) for n in STAGE_NOTEBOOKS} == set(STAGES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_form(path):
    nb = read(path)
    first = nb.cells[0].source
    assert re.match(rf"# {path.stem[:2]} · .+\n> .+", first), "an H1 with the number, then one quoted sentence"
    for word in ("**Reads**", "**Writes**", "**Time**"):
        assert word in first
    assert "%autoreload 2" in nb.cells[1].source
    assert nb.cells[2].metadata.get("tags") == ["parameters"]
    assert sum("parameters" in c.metadata.get("tags", []) for c in nb.cells) == 1
    assert nb.metadata.kernelspec.name == "python3"
    headings = [c.source for c in nb.cells if c.cell_type == "markdown" and c.source.startswith("## ")]
    assert len(headings) >= 3
    for cell in code(nb):
        assert not cell.outputs and cell.execution_count is None, "sources are kept stripped"
        if "parameters" not in cell.metadata.get("tags", []):
            assert len(cell.source.splitlines()) <= 25, cell.source[:80]
        assert not re.search(r"!pip|input\(|/home/|/tmp/|/root/|[A-Z]:\\\\", cell.source)


@pytest.mark.parametrize("path", STAGE_NOTEBOOKS, ids=lambda p: p.stem)
def test_stage_notebooks_begin_and_finish_their_step(path):
    source = "\n".join(c.source for c in code(read(path)))
    assert f'begin_step("{path.stem}", globals())' in source
    assert source.count("step.finish(") == 1
    assert "**Next:**" in read(path).cells[-1].source


@pytest.mark.parametrize("name", READING)
def test_parameters_of_the_others_are_typed_and_told(name):
    found = pm.inspect_notebook(str(ROOT / "notebooks" / f"{name}.ipynb"))
    assert found and all(info["help"] and info["inferred_type_name"] in TYPES for info in found.values())


def test_labelling_defaults_are_the_papers_human_evaluation():
    namespace = {}
    exec(read(ROOT / "notebooks/11_label.ipynb").cells[2].source, namespace)
    assert [namespace[k] for k in ("n_prompts", "n_readers", "opponent")] == [50, 3, "SFT"]
    assert namespace["labels"].startswith("results/scratch/")


def test_a_quick_try_of_m1_learns_to_judge_too():
    """`max_rows` takes so many rows of each file: with the first ones of all, M1 would see no judgement."""
    cell = next(c.source for c in code(read(ROOT / "notebooks/02_sft.ipynb")) if "p.max_rows" in c.source)
    step = SimpleNamespace(rows=lambda path: [path] * 5)
    p = SimpleNamespace(use_eft=True, max_rows=2)
    namespace = {"plan": plan, "pd": pd, "step": step, "p": p, "model": "M1"}
    exec(cell, namespace)
    assert namespace["data"] == ["seed/ift.jsonl"] * 2 + ["SFT/eft/train.jsonl"] * 2
    p.max_rows = 0
    exec(cell, namespace)
    assert len(namespace["data"]) == 10
    p.max_rows = 2
    exec(cell, namespace)
    assert (
        sum(map(len, namespace["sources"].values())) == 4
    )  # what is shown, and stands in the card, is what was learned


def test_a_quick_try_of_dpo_says_what_it_learns_from():
    cell = next(c.source for c in code(read(ROOT / "notebooks/07_dpo.ipynb")) if "p.max_rows" in c.source)
    step = SimpleNamespace(
        rows=lambda path: [{"prompt_id": f"{path}-{i}"} for i in range(8)],
        declared=SimpleNamespace(reads=["M2/aift/pairs.jsonl", "M1/aift/pairs.jsonl", "M2/aift/judge_pairs.jsonl"]),
    )
    step.params = SimpleNamespace(max_rows=3, replay=0.5, judge_share=0.5, seed=0)
    namespace = {"lineage": lineage, "model": "M3", "begin_step": lambda *_: step}
    namespace |= {"replayed": pairs.replayed, "capped": pairs.capped}
    exec(cell, namespace)
    n_judge = pairs.capped(step.rows(""), 0.5, 6, 0)
    assert list(namespace["counts"].values()) == [3, 3, len(n_judge)] and len(namespace["pairs"]) == 6 + len(n_judge)
    step.params.judge_share = 0.2
    exec(cell, namespace)
    assert list(namespace["counts"].values()) == [3, 3, 1]  # a fifth at most of what is learned, not of what there is


@pytest.mark.parametrize("path", STAGE_NOTEBOOKS, ids=lambda p: p.stem)
def test_parameters_equal_the_typed_model(path):
    found = pm.inspect_notebook(str(path))
    fields = STAGES[stage_key(path.stem)].model_fields
    assert set(found) == set(fields)  # a notebook has them in the order in which they are read
    namespace = {}
    exec(read(path).cells[2].source, namespace)  # the cell holds nothing but assignments
    for name, info in found.items():
        assert info["help"], f"{name} has no help comment"
        assert info["inferred_type_name"] in TYPES, name
        assert isinstance(namespace[name], TYPES[info["inferred_type_name"]])
        annotation = fields[name].annotation
        if annotation in (int, float, str, bool):
            assert info["inferred_type_name"] == annotation.__name__
    STAGES[stage_key(path.stem)].model_validate({k: namespace[k] for k in fields})


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_every_preset_fits_every_notebook(path):
    experiment = Experiment.load([path])
    for step in list_steps(experiment):
        assert set(experiment.flat(step.stage, step.model, "results/x")) == parameter_names(step.stage)


@pytest.mark.parametrize("preset", ["quickstart", "smoke"])
@pytest.mark.parametrize("path", VARIANTS, ids=lambda p: p.stem)
def test_every_variant_lies_over_the_presets(path, preset):
    text, base = path.read_text(), ROOT / f"params/{preset}.yaml"
    assert f"`{path.stem}`" in (ROOT / "README.md").read_text()
    assert f"# command   srlm run params/quickstart.yaml params/variants/{path.name} --run-name {path.stem}\n" in text
    experiment, plain = Experiment.load([base, path]), Experiment.load([base])
    judging = {}
    for step in list_steps(experiment):
        flat = experiment.flat(step.stage, step.model, "results/x")
        assert set(flat) == parameter_names(step.stage)
        for mode in {*flat.get("judge_modes", [])} - {"expected"}:  # in one mode all models write as many judgements
            assert judging.setdefault(mode, flat["n_samples"]) == flat["n_samples"], (step.name, mode)
    assert token_table(experiment)
    changed = [s for s in list_steps(experiment) if experiment.flat(s.stage, s.model) != plain.flat(s.stage, s.model)]
    assert changed or list_steps(experiment) != list_steps(plain)


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_headers_say_hardware_time_command_and_tokens(path):
    text = path.read_text()
    header = [line.lstrip("# ").rstrip() for line in text.splitlines() if line.startswith("#")]
    for word in ("hardware", "time", "command"):
        assert any(line.startswith(word) for line in header)
    for line in token_table(Experiment.load([path])).splitlines():
        assert f"# {line}".rstrip() in text, f"the token table is not that of `srlm plan {path.name} --tokens`"


def test_the_papers_hyper_parameters():
    e = Experiment.load([ROOT / "params/paper_llama2_70b.yaml"])
    sft, dpo = e.flat("02_sft", "M1"), e.flat("07_dpo", "M2")
    write, judge = e.flat("04_self_instruct", "M1"), e.flat("05_judge", "M1")
    assert (sft["learning_rate"], sft["final_learning_rate"], sft["train_batch_size"], sft["dropout"]) == (
        5.5e-6,
        1.1e-6,
        16,
        0.1,
    )
    assert (dpo["learning_rate"], dpo["final_learning_rate"], dpo["train_batch_size"], dpo["beta"]) == (
        1e-6,
        1e-7,
        16,
        0.1,
    )
    assert (write["n_candidates"], write["temperature"], write["top_p"]) == (4, 0.7, 0.9)
    assert (write["prompt_temperature"], write["prompt_top_p"]) == (0.6, 0.9)
    assert (write["n_seed_demos"], write["n_generated_demos"]) == (6, 2)
    assert (judge["judge_mode"], judge["n_samples"], judge["rubric"]) == ("sampled", 3, "additive")
    assert e.run.iterations == 3


def test_executed_example_notebooks_have_no_errors():
    for path in example_notebooks():
        text = path.read_text()
        assert path.stat().st_size < 2_000_000
        assert not re.search(r"/home/|/tmp/|/root/", text), f"{path.name} shows a path of the machine it ran on"
        outputs = [o for c in json.loads(text)["cells"] if c["cell_type"] == "code" for o in c["outputs"]]
        assert outputs and not any(o["output_type"] == "error" for o in outputs)
