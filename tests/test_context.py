"""What is longer than a model's context is refused before it is loaded, or shown in part and counted."""

import json
import shutil
from types import SimpleNamespace

import pytest

from srlm_utils import chat, checkpoints, context, judge, meta, mt_bench, train
from srlm_utils.engine import Engine
from srlm_utils.errors import DataError, ParamError
from srlm_utils.params import Sft
from tests.test_checkpoints import Step
from tests.test_checkpoints import params as selecting
from tests.test_meta import CANDIDATES, PROMPTS, ROWS, a_step
from tests.test_train import params

LONG = "Tell me about tea, and then about the river. " * 12


@pytest.fixture(scope="module")
def short(tiny, tmp_path_factory):
    """Folder of the tiny model, made to attend to 128 tokens."""
    folder = tmp_path_factory.mktemp("models") / "short"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    return str(folder)


@pytest.fixture(scope="module")
def narrow(short):
    return Engine(short, dtype="float32", device="cpu")


@pytest.mark.parametrize(
    "config,expected",
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 512}, "max_position_embeddings": 9}, 512),
        ({"d_model": 3}, 0),
        ({"max_position_embeddings": None}, 0),
    ],
)
def test_a_config_says_how_much_its_model_reads(config, expected, tmp_path):
    assert context.of_config(config) == expected
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert context.of_folder(str(tmp_path)) == expected
    assert context.of_folder(str(tmp_path / "none")) == 0


def prompt(pid, text, **more):
    return {"prompt_id": pid, "prompt": text} | more


def test_prompts_of_people_are_refused_before_the_model_is_loaded(tiny, short, monkeypatch):
    source, rows = {"folder": short}, [prompt("a", "Why?"), prompt("b", LONG), prompt("c", "x", reference=LONG)]
    with pytest.raises(
        DataError, match=r"b \(\d+ and 20\), c \(\d+ and \d+\): .* more than the 128 that the model"
    ) as e:
        context.check(source, rows, 20, "max_new_tokens")
    assert str(e.value).endswith("Shorten or remove these rows, or lower max_new_tokens.")
    context.check(source, rows[:1], 20)
    n = len(chat.prompt_ids(chat.load_tokenizer(short), chat.user("Why?")))
    context.check(source, rows[:1], 128 - n)
    with pytest.raises(DataError, match=r"a \(\d+ and \d+\)"):
        context.check(source, rows[:1], 129 - n)
    with pytest.raises(DataError, match="q0 .*, q1 .*, q2 .*, q3 .* and 2 more: "):
        context.check(source, [prompt(f"q{i}", LONG) for i in range(6)], 1)
    monkeypatch.setattr(chat, "load_tokenizer", lambda **_: 1 / 0)  # what surely fits is not counted
    context.check({"folder": tiny}, rows, 20)


def test_a_question_of_two_turns_leaves_room_for_both_answers(short):
    (row,) = mt_bench.prompt_rows([{"question_id": 81, "turns": ["One?", "Two?"]}])
    assert row == {"prompt_id": "81", "prompt": "One?\nTwo?"}
    with pytest.raises(DataError, match=r"81 \(\d+ and 120\)"):
        context.check({"folder": short}, [row], 2 * 60)


def test_the_engine_computes_nothing_behind_the_context(narrow):
    ids = [5] * 100
    how = {"temperature": 0, "top_p": 1.0, "seed": 0}
    assert len(list(narrow.generate([("a", ids)], max_new_tokens=28, **how))) == 1
    with pytest.raises(DataError, match=r"^a \(129\): more tokens, with those still to write, than the 128"):
        next(narrow.generate([("a", ids), ("b", ids[:9])], max_new_tokens=29, **how))
    with pytest.raises(DataError, match=r"b \(130\)"):
        next(narrow.choice_probs([("a", ids), ("b", ids + ids[:30])], [5, 6]))
    with pytest.raises(DataError, match=r"a \(140\)"):
        next(narrow.target_logprobs([("a", ids, ids[:40])]))


@pytest.mark.parametrize("mode", ["expected", "sampled", "sampled_expected"])
def test_a_judge_sees_as_much_of_a_response_as_it_has_room_for(tiny, mode, capsys):
    items = [{"id": i, "prompt": "Tea?", "response": text} for i, text in (("long", LONG), ("short", "Yes."))]
    sampling = {"n_samples": 1, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 8, "seed": 0}
    engine, rubric = Engine(tiny, dtype="float32", device="cpu"), judge.Rubric("short")
    fmt = "score_first" if mode == "expected" else "justify_first"
    room = len(judge.prompts(engine.tokenizer, rubric, items[1:], fmt, 0)[0][0][1]) + 30
    requests, cut = judge.prompts(engine.tokenizer, rubric, items, fmt, 0, room)
    seen = dict(requests)
    assert cut == {"long"} and room - 10 < len(seen["long"]) <= room
    assert judge.CUT.strip() in engine.tokenizer.decode(seen["long"])

    def cuts():
        return {r["id"]: r["cut"] for batch in judge.scores(engine, rubric, items, mode, **sampling) for r in batch}

    assert cuts() == {"long": False, "short": False}
    capsys.readouterr()
    reserved = len(judge.score_tokens(engine.tokenizer)[0]) if mode == "expected" else 8 + judge.SCORE_LINE
    engine.context = room + reserved
    assert cuts() == {"long": True, "short": False}
    assert "1 responses are longer than the judge's context has room for" in capsys.readouterr().out


def test_a_rubric_without_room_for_any_response_is_an_error(narrow):
    items = [{"id": "x", "prompt": LONG, "response": "Yes."}]
    with pytest.raises(DataError, match=r"x \(\d+\): more tokens"):
        list(judge.expected_scores(narrow, judge.Rubric("short"), items))


def test_judgements_that_cannot_be_compared_are_left_out_and_counted(engine, tmp_path, capsys):
    judged = next(r for r in ROWS if r["id"] == "p-1")
    long = judged | {"samples": [s | {"text": f"{LONG}\n{s['text']}"} for s in judged["samples"]]}
    rows = [long if r is judged else r for r in ROWS]
    asked = []

    def ask(requests, _):
        asked.extend(requests)
        yield [(key, [0.9, 0.1] if int(key) % 3 else [0.1, 0.9], 1.0) for key, _ in requests]

    few = SimpleNamespace(tokenizer=engine.tokenizer, context=0, choice_probs=ask)
    meta.judge_pairs(a_step(tmp_path / "a"), few, judge.Rubric("short"), PROMPTS, CANDIDATES, rows, 0)
    lengths = sorted({len(ids) for _, ids in asked})
    few.context, n_asked = lengths[-1] - 1, len(asked)
    assert not capsys.readouterr().out
    asked.clear()
    meta.judge_pairs(a_step(tmp_path / "b"), few, judge.Rubric("short"), PROMPTS, CANDIDATES, rows, 0)
    assert 0 < len(asked) < n_asked and all(len(ids) <= few.context for _, ids in asked)
    assert (
        "1 candidates left out: two judgements of them are longer than the judge's context" in capsys.readouterr().out
    )


def test_rows_longer_than_the_context_are_not_trained_on(short):
    with pytest.raises(ParamError, match="max_length = 512: this model attends to 128 tokens; lower it to that"):
        train.load(short, params())
    net, tok = train.load(short, params(max_length=128))
    rows, dropped = train.sft_rows(tok, [{"prompt": LONG, "response": "x"}, {"prompt": "Q", "response": "x"}], 128)
    assert (len(rows), dropped) == (1, 1)


def test_validation_prompts_of_a_selection_are_checked_before_training(short, tmp_path):
    step = Step(selecting(Sft, select_max_new_tokens=120), tmp_path, short)
    with pytest.raises(DataError, match=r"v0 \(\d+ and 120\).*lower select_max_new_tokens"):
        checkpoints.Selection(step)
