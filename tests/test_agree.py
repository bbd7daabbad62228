"""``srlm agree`` on each kind of ranked set."""

import json

import pytest

from srlm_utils import agree
from srlm_utils.cli import main
from srlm_utils.metrics import METRICS
from srlm_utils.paths import EXAMPLE
from tests.test_judge_modes import Judge
from tests.test_sources import PREFERENCES, TREES, save


@pytest.fixture
def fake(engine, monkeypatch):
    """Judges: `good` prefers what ends in a full stop; any other says the same of everything."""

    class Stop(Judge):
        def choice_probs(self, requests, choices):
            for key, ids in requests:
                inside = self.tokenizer.decode(ids).split("<response>\n")[1].split("\n</response>")[0]
                yield [(key, [0, 0, 0, 0, 1.0, 0] if inside.endswith(".") else [0, 1.0, 0, 0, 0, 0], 0.9)]

    monkeypatch.setattr(agree, "engine_of", lambda m: (Stop if m == "good" else Judge)(engine.tokenizer))


def run(capsys, *args):
    assert main(["agree", *args]) == 0
    return capsys.readouterr().out


def test_open_assistant_trees_as_json(fake, tmp_path, capsys):
    path = save(tmp_path / "trees.jsonl", TREES)
    out = json.loads(run(capsys, "--model", "good", "--ranked", path, "--json"))
    # "Blue." over "No" and "Red?"; "No" and "Red?" tie; "Hi." and "Ho." tie
    assert out["pairwise_accuracy"] | {"low": 0, "high": 0} == {"value": 1.0, "low": 0, "high": 0, "n": 2}
    assert out["tie_rate"]["value"] == 0.5 and out["n_prompts"] == 2 and out["turns"] == "first"
    assert out["left_out"]["prompt not in en"] == 1
    figures = {k: v for k, v in out.items() if isinstance(v, dict) and k != "left_out"}
    assert {"pairwise_accuracy", "tie_rate", "spearman", "longer_baseline", "similar_length_accuracy"} <= set(figures)
    assert all(set(f) == {"value", "low", "high", "n"} and k in METRICS for k, f in figures.items())
    later = json.loads(run(capsys, "--model", "good", "--ranked", path, "--json", "--all-turns"))
    assert later["turns"] == "all" and later["n_prompts"] == 3
    german = json.loads(run(capsys, "--model", "good", "--ranked", path, "--json", "--language", ""))
    assert "prompt not in en" not in german["left_out"]


def test_the_gain_over_another_model_as_a_table(fake, tmp_path, capsys):
    path = save(tmp_path / "p.jsonl", [PREFERENCES["scored"][0]])
    table = run(capsys, "--model", "good", "--against", "other", "--ranked", path)
    (gain,) = [line for line in table.splitlines() if line.startswith("agreement_gain")]
    assert gain.split()[:3] == ["agreement_gain", "0.000", "2"]
    assert "pairwise_accuracy" in table and "turns" not in table


def test_the_gain_is_of_the_model_over_the_other_one(fake, tmp_path, capsys):
    path = save(tmp_path / "trees.jsonl", TREES)  # "good" orders two of four pairs; a tie is half
    for model, other, gain in (("good", "other", 0.25), ("other", "good", -0.25)):
        out = json.loads(run(capsys, "--model", model, "--against", other, "--ranked", path, "--json"))
        assert (out["model"], out["against"], out["agreement_gain"]["value"]) == (model, other, gain)


def test_replies_that_the_judge_saw_in_part_are_counted(fake, tmp_path, monkeypatch, capsys):
    path = save(tmp_path / "trees.jsonl", TREES)
    assert json.loads(run(capsys, "--model", "good", "--ranked", path, "--json"))["n_cut"] == 0
    monkeypatch.setattr(agree, "MAX_RESPONSE_TOKENS", 1)
    assert json.loads(run(capsys, "--model", "good", "--ranked", path, "--json"))["n_cut"] > 0


def test_kit_rows_by_name_and_the_other_modes(fake, capsys):
    out = json.loads(run(capsys, "--model", "good", "--ranked", "ranked_eval", "--limit", "3", "--json"))
    assert out["n_prompts"] == 3
    for mode in ("sampled", "sampled_expected"):
        out = json.loads(
            run(capsys, "--model", "x", "--ranked", "ranked_eval", "--limit", "2", "--mode", mode, "--json")
        )
        assert out["parse_rate"]["value"] == 1 and out["judge_mode"] == mode


def test_a_path_is_relative_to_where_one_stands(fake, tmp_path, monkeypatch, capsys):
    save(tmp_path / "here.jsonl", TREES)
    monkeypatch.chdir(tmp_path)
    assert json.loads(run(capsys, "--model", "good", "--ranked", "here.jsonl", "--json"))["n_prompts"] == 2


def test_the_exam_of_a_rendered_run_goes_by_its_name(fake, capsys):
    out = run(capsys, "--model", "good", "--ranked", str(EXAMPLE / "seed/ranked_eval.jsonl"), "--json")
    assert json.loads(out)["n_prompts"] == 87


def test_bad_input_ends_in_one_line(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n')
    for args, says in (
        (["--ranked", str(path)], "has the fields a; expected"),
        (["--ranked", str(tmp_path / "none.jsonl")], "no such file"),
        (["--ranked", "ranked_eval", "--rubric", "nice"], "nice.jinja"),
        (["--ranked", "ranked_eval", "--limit", "-3"], "--limit -3: expected"),
    ):
        assert main(["agree", "--model", "no/such-model", *args]) == 2
        assert says in capsys.readouterr().err


def test_a_real_folder_and_a_run_s_pointer(tiny, tmp_path, capsys):
    from srlm_utils.seed_model import fetch, write_pointer

    write_pointer(tmp_path / "M0" / "model.json", fetch("tiny-random"), "")
    results = [
        json.loads(run(capsys, "--model", model, "--ranked", "onpolicy_eval", "--limit", "2", "--json"))
        for model in (tiny, str(tmp_path / "M0"))
    ]
    assert results[0]["pairwise_accuracy"] == results[1]["pairwise_accuracy"] and results[0]["n_replies"] == 8
