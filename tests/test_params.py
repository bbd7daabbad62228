import pytest

from srlm_utils.errors import ParamError
from srlm_utils.params import Experiment, merge, parse_set, read_yaml


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
        ({"by_model": {"M2": {"dpo": {"beta": "x"}}}}, "beta = 'x'"),
    ],
)
def test_misfits_are_named(tree, says):
    with pytest.raises(ParamError, match=says):
        Experiment(tree)


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


@pytest.mark.parametrize("text", ["beta=1", "dpo.beta", "dpo.beta=high", "dpo.epochs=1.5", "nope.beta=1"])
def test_bad_sets(text):
    with pytest.raises(ParamError):
        parse_set(text)


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
