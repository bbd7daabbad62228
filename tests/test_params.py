import pytest
import yaml

from srlm_utils import params
from srlm_utils.artefacts import write_json
from srlm_utils.cli import main
from srlm_utils.errors import ParamError
from srlm_utils.params import STAGES, Experiment, merge, parse_set, read_yaml, stage_key
from srlm_utils.paths import PARAMS
from srlm_utils.plan import fingerprint, idle_sections, make_step, status


@pytest.mark.parametrize(
    "tree,says",
    [
        ({"dpo": {"betta": 0.1}}, r"dpo\.betta.*Did you mean 'beta'"),
        ({"judg": {}}, "unknown section 'judg'.*'judge'"),
        ({"common": {"itertions": 2}}, "Did you mean 'iterations'"),
        ({"dpo": {"run_dir": "x"}}, "unknown parameter dpo.run_dir"),
        ({"dpo": 3}, "expected `name: value`"),
        ({"by_model": {"M9": {"dpo": {"beta": 0.1}}}}, "by_model.M9: no such model"),
        ({"by_model": {"M2": {"dpo": {"betta": 0.1}}}}, "Did you mean 'beta'"),
        ({"by_model": {"M2": {"common": {"seed": 1}}}}, "expected stage sections"),
        ({"dpo": {"beta": -1.0}}, "beta = -1.0"),
        ({"dpo": {"epochs": 1.5}}, "epochs = 1.5"),
        ({"dpo": {"learning_rate": "5e-7"}}, r"write 5\.0e-7"),
        ({"judge": {"judge_mode": "both"}}, "judge_mode = 'both'"),
        ({"common": {"device": "cuda:1"}}, "device = 'cuda:1'.*CUDA_VISIBLE_DEVICES=1 in the environment"),
        ({"by_model": {"M2": {"dpo": {"beta": "x"}}}}, "beta = 'x'"),
        ({"common": {"iterations": 0}}, "iterations = 0"),
        ({"sft": {"dropout": 1.0}}, "dropout = 1.0"),
        ({"dpo": {"epochs": True}}, "epochs = True"),
        ({"dpo": {"epochs": "2"}}, "without quotes"),
        ({"dpo": {"beta": float("nan")}}, "beta = nan"),
        ({"dpo": {"beta": float("inf")}}, "beta = inf"),
        ({"build_eft": {"formats": "score_first"}}, "formats = 'score_first'.*list"),
        ({"build_eft": {"formats": ["score_frist"]}}, "score_frist"),  # would train as justify_first
        ({"evaluate": {"judge_modes": ["expcted"]}}, "expcted"),  # would judge as sampled
        ({"evaluate": {"judge_modes": []}}, r"judge_modes = \[\].*at least 1"),  # would measure nothing
        ({"by_model": {2: {"dpo": {"beta": 0.1}}}}, "by_model.2: no such model"),
        ({"by_model": {"M2": {"dop": {"beta": 0.1}}}}, "unknown section 'dop'.*'dpo'"),
        ({"by_model": {"M2": None}}, "expected stage sections"),
        ({"common": {"beta": 0.1}}, "unknown parameter common.beta"),  # only dpo takes it
        ([], "found list"),
        ({1: {}}, "unknown section 1"),
    ],
)
def test_misfits_are_named(tree, says):
    with pytest.raises(ParamError, match=says):
        Experiment(tree)


SERVE = "vllm serve {model} --port {port}"


@pytest.mark.parametrize(
    "name,value",
    [
        ("serve_command", f"env HF_TOKEN=hf_secret {SERVE}"),
        ("serve_command", f"env VLLM_API_KEY=secret {SERVE}"),
        ("serve_command", f"bash -c 'export DB_PASSWORD=secret; {SERVE}'"),
        ("serve_command", f"{SERVE} --hf-token secret"),
        ("serve_command", f"{SERVE} --api-key=secret"),
        ("serve_command", [f"{SERVE} --api_key secret"]),  # of another type, too, it is not shown
        ("server_urls", ["http://node1:8000/v1", "http://me:secret@node2/v1"]),
        ("server_urls", ["me:secret@node1"]),
        ("judge_base_url", "https://me:secret@host/v1"),
        ("judge_base_url", "https://host/v1?key=secret"),
    ],
)
def test_a_key_among_the_parameters_is_refused_and_not_shown(name, value):
    for tree in ({"common": {name: value}}, {"by_model": {"M1": {"evaluate": {name: value}}}}):
        with pytest.raises(ParamError, match=f"{name} holds a key.*set it in the environment") as e:
            Experiment(tree)
        assert "secret" not in str(e.value)


def test_what_holds_no_key_is_taken():
    command = f"env TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES={{index}} {SERVE} --max-num-batched-tokens=4096"
    urls = {"server_urls": ["http://node1:8000/v1"], "judge_base_url": "http://[::1]:1/v1/@cf"}
    Experiment({"common": {"serve_command": command} | urls})


@pytest.mark.parametrize(
    "text,tree",
    [
        ("dpo.beta=0.2", {"dpo": {"beta": 0.2}}),
        ("dpo.epochs=3", {"dpo": {"epochs": 3}}),
        ("dpo.gradient_checkpointing=true", {"dpo": {"gradient_checkpointing": True}}),
        ("judge.rubric=additive", {"judge": {"rubric": "additive"}}),
        ("evaluate.win_judges=[M1:score, x/y:pairwise]", {"evaluate": {"win_judges": ["M1:score", "x/y:pairwise"]}}),
        ("build_eft.formats=score_first", {"build_eft": {"formats": ["score_first"]}}),
        ("by_model.M2.dpo.beta=0.05", {"by_model": {"M2": {"dpo": {"beta": 0.05}}}}),
        ("common.seed_model=a/b=c", {"common": {"seed_model": "a/b=c"}}),
    ],
)
def test_set_is_typed_by_the_field(text, tree):
    assert parse_set(text) == tree


@pytest.mark.parametrize(
    "text",
    [
        "beta=1", "dpo.beta", "dpo.beta=high", "dpo.epochs=1.5", "nope.beta=1", "", "=", "=3", "dpo.=3", ".beta=3",
        "dpo.beta=", "evaluate.win_judges=", "evaluate.win_judges=[1]", "evaluate.win_judges=[a", "dpo.epochs=True",
        "judge.judge_mode=both", "dpo.run_dir=x", "by_model.M2=3", "by_model.M2.dpo=3", "by_model.M2.common.seed=1",
        "dpo.beta.x=1", "common.seed.x=1", "by_model.M2.dpo.beta.x=1",
    ],
)  # fmt: skip
def test_bad_sets(text):
    with pytest.raises(ParamError, match="--set"):
        parse_set(text)


@pytest.mark.parametrize("stage", ["02_sft", "07_dpo"])
def test_checkpoints_are_scored_by_the_rubric_that_is_taught(stage):
    def rubric(section=(), **common):
        tree = {"common": {"rubric": "additive"} | common, stage_key(stage): dict(section)}
        return Experiment(tree).flat(stage, "M2")["select_rubric"]

    assert (rubric(select_steps=2), rubric({"select_steps": 2})) == ("additive", "additive")
    assert rubric({"select_rubric": "short"}, select_steps=2) == "short"
    assert rubric(select_steps=2, select_rubric="multiple_choice") == "multiple_choice"
    assert rubric() == "short"  # no checkpoint is scored: a training is the same as before
    with pytest.raises(ParamError, match=r"build_eft: rubric = 5"):
        rubric(rubric=5, select_steps=2)


def test_later_wins_from_common_to_overlay():
    e = Experiment(
        merge(
            {"common": {"seed": 1, "learning_rate": 1e-3}, "dpo": {"learning_rate": 1e-4, "beta": 0.3}},
            {"by_model": {"M3": {"dpo": {"beta": 0.5}}}},
            {"dpo": {"beta": 0.4}},
        )
    )
    m2, m3, sft = e.flat("07_dpo", "M2", "r"), e.flat("07_dpo", "M3", "r"), e.flat("02_sft", "M1", "r")
    assert (m2["beta"], m3["beta"], m2["learning_rate"], sft["learning_rate"]) == (0.4, 0.5, 1e-4, 1e-3)
    assert m2["seed"] == 1 and m2["run_dir"] == "r" and m2["model"] == "M2"
    plain = (int, float, str, bool, list)
    assert all(type(v) in plain for v in m2.values())


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ParamError, match="no such parameter file"):
        read_yaml(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("dpo: [1, 2\n")
    with pytest.raises(ParamError, match="bad.yaml: not valid YAML"):
        read_yaml(bad)
    tag = tmp_path / "tag.yaml"
    tag.write_text("dpo: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ParamError, match="not valid YAML"):
        read_yaml(tag)


@pytest.mark.parametrize(
    "text,says",
    [
        ("dpo:\n  beta: 0.2\nsft: {}\ndpo:\n  epochs: 2\n", "twice.yaml: line 4: dpo stands in line 1 already"),
        ("dpo:\n  beta: 0.2\n  'beta': 0.3\n", "twice.yaml: line 3: beta stands in line 2 already"),
        ("by_model:\n  M2: {dpo: {beta: 0.2}}\n  M2: {}\n", "twice.yaml: line 3: M2 stands in line 2 already"),
    ],
)
def test_what_is_written_twice_is_refused(tmp_path, text, says):
    (tmp_path / "twice.yaml").write_text(text)
    with pytest.raises(ParamError, match=says):
        read_yaml(tmp_path / "twice.yaml")


def test_what_is_taken_over_may_be_written_again(tmp_path):
    path = tmp_path / "merged.yaml"
    path.write_text("by_model: {M2: {sft: &a {epochs: 1}, dpo: &b {<<: *a, epochs: 2}}}\ndpo:\n  <<: *b\n  epochs: 3\n")
    assert read_yaml(path) == {
        "by_model": {"M2": {"sft": {"epochs": 1}, "dpo": {"epochs": 2}}},
        "dpo": {"epochs": 3},
    }


@pytest.mark.parametrize("path", sorted(PARAMS.rglob("*.yaml")), ids=lambda p: p.stem)
def test_no_file_of_the_kit_holds_a_key_twice(path):
    assert yaml.load(path.read_text(), params._Loader) == yaml.safe_load(path.read_text())


@pytest.mark.parametrize(
    "text,value", [("dpo.beta=1", 1.0), ("dpo.learning_rate=5e-7", 5e-7), ("dpo.seed=-1", -1), ("judge.rubric=1", "1")]
)
def test_set_values_have_the_fields_own_type(text, value):
    (found,) = next(iter(parse_set(text).values())).values()
    assert found == value and type(found) is type(value)


def test_a_misspelt_set_suggests_the_name():
    with pytest.raises(ParamError, match="Did you mean 'beta'"):
        parse_set("by_model.M2.dpo.betta=0.1")


def test_a_card_that_is_set_by_its_number_is_told_how():
    with pytest.raises(ParamError, match=r"'cuda:1' is no Literal\. CUDA_VISIBLE_DEVICES=1"):
        parse_set("common.device=cuda:1")
    assert parse_set("dpo.device=cpu") == {"dpo": {"device": "cpu"}}


def test_merge_lays_trees_over_each_other():
    one = {"a": {"x": 1, "y": 2}, "b": 1}
    assert merge(one, {"a": {"y": 3}}, {"a": {"z": 4}, "b": {"c": 5}}) == {"a": {"x": 1, "y": 3, "z": 4}, "b": {"c": 5}}
    assert one == {"a": {"x": 1, "y": 2}, "b": 1} and merge() == {}
    assert merge({"a": [1, 2]}, {"a": [3]}) == {"a": [3]}  # lists are replaced


def test_each_layer_wins_over_the_one_below():
    layers = [
        {"common": {"learning_rate": 0.1}},
        {"dpo": {"learning_rate": 0.2}},
        {"by_model": {"M2": {"dpo": {"learning_rate": 0.3}}}},
        {"by_model": {"M2": {"dpo": {"learning_rate": 0.4}}}},  # an overlay
    ]
    found = [Experiment(merge(*layers[:n])).flat("07_dpo", "M2", "r")["learning_rate"] for n in range(5)]
    assert found == [1e-4, 0.1, 0.2, 0.3, 0.4]
    assert Experiment(merge(*layers[::-1])).flat("07_dpo", "M2", "r")["learning_rate"] == 0.3
    assert Experiment(merge(*layers)).flat("07_dpo", "M3", "r")["learning_rate"] == 0.2


def test_files_then_overlays_then_sets(tmp_path):
    for name, text in (("base", "dpo: {beta: 0.2, epochs: 2}"), ("over", "dpo: {beta: 0.3}\ncommon:\n  seed: 7")):
        (tmp_path / f"{name}.yaml").write_text(text)
    files = [tmp_path / "base.yaml", tmp_path / "over.yaml"]
    flat = Experiment.load(files, ["common.seed=8", "common.seed=9"]).flat("07_dpo", "M2", "r")
    assert (flat["beta"], flat["epochs"], flat["seed"]) == (0.3, 2, 9)


def test_overlays_name_the_variant(tmp_path):
    for name, text in (("base", "{}"), ("a", "dpo: {beta: 0.3}"), ("b", "{}"), ("named", "common: {variant: mine}")):
        (tmp_path / f"{name}.yaml").write_text(text)
    for names, variant in (
        (("base",), "default"),
        (("base", "a"), "a"),
        (("base", "a", "b"), "a+b"),
        (("base", "a", "named"), "mine"),
        (("named", "a"), "a"),
    ):
        found = Experiment.load([tmp_path / f"{name}.yaml" for name in names])
        assert found.flat("09_report", "run", "r")["variant"] == variant


def test_by_model_knows_as_many_models_as_there_are_rounds():
    beta = {"M2": {"dpo": {"beta": 0.2}}}
    assert Experiment({"common": {"iterations": 2}, "by_model": beta}).flat("07_dpo", "M2", "r")["beta"] == 0.2
    with pytest.raises(ParamError, match=r"by_model\.M2: no such model"):
        Experiment({"common": {"iterations": 1}, "by_model": beta})


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_plain_values(stage):
    flat = Experiment({"common": {"seed": 3}}).flat(f"00_{stage}", "M1", "r")
    assert flat["seed"] == 3 and set(flat) == set(STAGES[stage].model_fields)
    assert all(type(v) in (int, float, str, bool, list) for v in flat.values())


def test_whole_numbers_are_floats_where_a_float_is_meant():
    assert type(Experiment({"dpo": {"beta": 1}}).flat("07_dpo", "M2", "r")["beta"]) is float


def test_a_parameter_that_came_later_makes_nothing_stale_at_its_default(tmp_path):
    """A run of an older version goes on: its manifests know nothing of what was added since."""
    flat = Experiment({}).flat("01_seed_data", "run", str(tmp_path))
    step = make_step("01_seed_data", "run", flat)
    now = fingerprint(step, flat, tmp_path)
    older = {k: v for k, v in now["params"].items() if k != "rouge_l_max"}
    inputs = {k: {"sha256": v} for k, v in now["inputs"].items()}
    write_json(tmp_path / "steps/01_seed_data@run.json", {"params": older, "inputs": inputs, "outputs": {}})
    assert status(step, flat, tmp_path) == (True, "done")
    assert status(step, flat | {"rouge_l_max": 0.6}, tmp_path) == (False, "rouge_l_max changed: 0.7 -> 0.6")


@pytest.mark.parametrize(
    "sets,says",
    [
        (["sft.rank_weight=0"], ["sft.rank_weight = 0.0 does not change by_model.M1.sft.rank_weight = 4.0"]),
        (["by_model.M1.sft.rank_weight=0"], []),
        (["sft.rank_weight=0", "by_model.M1.sft.rank_weight=1"], []),
        (["sft.rank_weight=4"], []),  # what M1 has
        (
            ["common.learning_rate=1e-5"],
            [
                "common.learning_rate = 1e-05 does not change dpo.learning_rate = 0.0002, "
                "by_model.M1.sft.learning_rate = 0.0005"
            ],
        ),
        (["common.learning_rate=1e-5", "dpo.learning_rate=1e-6", "by_model.M1.sft.learning_rate=1e-5"], []),
        (["common.seed=3", "dpo.beta=0.2", "evaluate.judge_modes=[expected]"], []),
    ],
)
def test_what_a_set_does_not_reach_is_said(sets, says):
    assert Experiment.load([PARAMS / "quickstart.yaml"], sets).shadowed == says


@pytest.mark.parametrize(
    "sets,says",
    [
        (["by_model.M1.dpo.beta=0.9"], ["by_model.M1.dpo: no such step; dpo runs for M2, M3: it changes nothing"]),
        (
            ["by_model.M2.judge.rubric=additive", "common.iterations=2"],
            ["by_model.M2.judge: no such step; judge runs for M1: it changes nothing"],
        ),
        (
            ["by_model.M2.dpo.beta=0.9", "common.learn_from=positives"],
            ["by_model.M2.dpo: no such step; dpo runs for no model: it changes nothing"],
        ),
        (
            ["by_model.M1.report.n_examples=1"],
            ["by_model.M1.report: no such step; report runs once a run: it changes nothing"],
        ),
        (["by_model.M2.dpo.future_chosen=true", "by_model.M1.judge.rubric=additive"], []),  # F2 is drafted with both
        (["by_model.M1.dpo.beta=0.9", "evaluate.win_judges=[M3:score]"], []),  # whose own error comes later
    ],
)
def test_a_section_of_a_model_without_that_step_is_said(sets, says):
    assert idle_sections(Experiment.load([PARAMS / "quickstart.yaml"], sets)) == says


@pytest.mark.parametrize("overlay", sorted((PARAMS / "variants").glob("*.yaml")), ids=lambda p: p.stem)
def test_overlays_reach_what_they_name(overlay):
    for base in ("quickstart", "standard"):
        experiment = Experiment.load([PARAMS / f"{base}.yaml", overlay])
        assert [*experiment.shadowed, *idle_sections(experiment)] == []


def test_the_command_line_warns_of_it(capsys):
    assert (
        main(
            ["plan", str(PARAMS / "quickstart.yaml"), "--set", "sft.rank_weight=0", "--run-name", "none"]
            + ["--set", "by_model.M1.dpo.beta=0.9"]
        )
        == 0
    )
    said = capsys.readouterr().err
    assert "WARNING: sft.rank_weight = 0.0 does not change by_model.M1" in said
    assert "WARNING: by_model.M1.dpo: no such step" in said
