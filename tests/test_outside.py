"""The outside judge: what it is taught, what its exam counts, and that it is made once."""

import json
from types import SimpleNamespace

import pytest

from srlm_utils import evaluate, metrics, outside, seed_model, verdicts
from srlm_utils.artefacts import read_jsonl, write_jsonl
from srlm_utils.errors import DataError, ParamError
from srlm_utils.params import Experiment
from srlm_utils.plan import external_inputs, list_steps, parse_win_judge
from srlm_utils.step import StepRun

RANKED = [
    {
        "prompt_id": "a",
        "prompt": "Name a colour.",
        "replies": [
            {"reply_id": "1", "text": "Blue.", "rank": 0},
            {"reply_id": "2", "text": "Seven.", "rank": 1},
            {"reply_id": "3", "text": "Eight.", "rank": 1},
        ],
    }
]


class Bar:
    n = 0

    def update(self, n):
        self.n += n

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass


def fake_step():
    params = SimpleNamespace(device="cpu", dtype="float32", max_response_tokens=0)
    return SimpleNamespace(params=params, progress=lambda total, unit: Bar(), model_revision=lambda name: "0" * 12)


def test_a_lesson_is_a_reply_behind_the_rubric_and_its_digit_alone_carries_loss(engine):
    scored = [RANKED[0] | {"replies": [r | {"score": s} for r, s in zip(RANKED[0]["replies"], (5, 1, 1), strict=True)]}]
    rows = outside.lessons(engine.tokenizer, scored, 2000)
    digits = [engine.tokenizer.decode([r["labels"][-1]]) for r in rows]
    assert digits == ["5", "1", "1"] and [r["rank"] for r in rows] == [0, 1, 1] and {r["group"] for r in rows} == {"a"}
    assert all(r["input_ids"][-1] == r["labels"][-1] and set(r["labels"][:-1]) == {-100} for r in rows)
    assert not outside.lessons(engine.tokenizer, scored, 20)


def test_coarse_lessons_rank_behind_all_others():
    lessons = [row for path in outside.LESSONS for row in read_jsonl(path)]
    made = outside.coarsened(lessons, 0)
    assert made == outside.coarsened(lessons, 0) != outside.coarsened(lessons, 1)
    kinds = set()
    for row, more in zip(lessons, made, strict=True):
        if max(r["score"] for r in row["replies"]) < 4:  # nothing good to spoil
            assert more == row
            continue
        assert more["replies"][:-2] == row["replies"]
        worst = max(r["rank"] for r in row["replies"])
        for reply in more["replies"][-2:]:
            kinds.add(reply["reply_id"])
            assert reply["rank"] == worst + 2 - reply["score"] and reply["text"] and reply["score"] in (0, 1)
    assert kinds == {"off", "loop", "cut", "echo"}
    assert max(len(r["replies"]) for r in made) <= outside.RECIPE["micro_batch_size"]  # all are compared in one batch


def test_a_judge_learns_its_lessons(tiny, tmp_path):
    from srlm_utils.engine import Engine

    ranked = [
        {
            "prompt_id": name,
            "prompt": f"Name a {name}.",
            "replies": [
                {"reply_id": "1", "text": good, "rank": 0, "score": 5},
                {"reply_id": "2", "text": bad, "rank": 1, "score": 2},
            ],
        }
        for name, good, bad in (("colour", "Blue.", "Seven."), ("fruit", "An apple.", "A shoe."))
    ]
    recipe = {"epochs": 80, "learning_rate": 5e-3, "final_learning_rate": 1e-3, "max_length": 2000, "save_steps": 0}
    outside.train_judge(fake_step(), tiny, ranked, tmp_path / "work", tmp_path / "judge", **recipe)
    judge = Engine(str(tmp_path / "judge"), dtype="float32", device="cpu")
    seen = []
    figures = outside.examine(judge, ranked, seen.append)
    assert figures["exam_accuracy"]["value"] == 1 and figures["exam_accuracy"]["n"] == 2 and sum(seen) == 4
    assert figures["exam_tie_rate"]["value"] == 0


def test_a_step_that_writes_in_float16_can_make_it(tiny, tmp_path, monkeypatch):
    """The dtype is one to write and judge in; training has no loss scaler."""
    from srlm_utils import train

    asked = []
    monkeypatch.setattr(train, "load", lambda base, p: asked.append(p.dtype) or 1 / 0)
    step = fake_step()
    for step.params.dtype in ("float16", "bfloat16"):
        with pytest.raises(ZeroDivisionError):
            outside.train_judge(step, tiny, [], tmp_path / "work", tmp_path / "judge")
    assert asked == ["auto", "bfloat16"]


def test_the_exam_is_sat_once(monkeypatch, tmp_path):
    monkeypatch.setattr(outside, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(outside, "EXAMS", ("ranked_eval",))
    (tmp_path / "models").mkdir()
    ranked = read_jsonl(outside.SEED_DATA / "ranked_eval.jsonl")
    rank = {f"{row['prompt_id']}/{r['reply_id']}": r["rank"] for row in ranked for r in row["replies"]}
    asked = []

    def knows_the_ranks(engine, rubric, items, **how):
        asked.append(len(items))
        yield [{"id": item["id"], "score": 5 - rank[item["id"]]} for item in items]

    monkeypatch.setattr(outside.judge, "expected_scores", knows_the_ranks)
    first = outside.exam(fake_step(), None)
    again = outside.exam(fake_step(), None)
    assert first == again and asked == [len(rank)]
    assert first["ranked_eval"]["exam_accuracy"]["value"] == 1
    rows = evaluate.exam_rows(fake_step(), None)
    assert {(r["model"], r["set"], r["judge_mode"]) for r in rows} == {("outside", "ranked_eval", "expected")}
    write_jsonl(tmp_path / "ranked_eval.jsonl", ranked[:5])  # another exam is sat again
    monkeypatch.setattr(outside, "SEED_DATA", tmp_path)
    outside.exam(fake_step(), None)
    monkeypatch.setattr(outside, "MAX_RESPONSE_TOKENS", 7)
    outside.exam(fake_step(), None)
    assert asked[1:] == [sum(len(row["replies"]) for row in ranked[:5])] * 2


def test_the_outside_judge_is_asked_what_it_was_taught(monkeypatch):
    asked = []
    monkeypatch.setattr(
        evaluate.judge, "expected_scores", lambda e, rubric, items, **how: asked.append(rubric.name) or []
    )
    for name in ("outside", "M1"):
        evaluate.score_answers(fake_step(), None, evaluate.judge.Rubric("additive"), name, [])
    assert asked == ["short", "additive"]


def test_it_is_made_again_when_what_it_is_made_from_changes(monkeypatch, tmp_path):
    before = outside.version()
    written, sampled = outside.LESSONS
    lessons = tmp_path / "judge_onpolicy.jsonl"
    lessons.write_text(sampled.read_text() + "\n")
    monkeypatch.setattr(outside, "LESSONS", [written, lessons])
    changed = outside.version()
    monkeypatch.setitem(outside.RECIPE, "epochs", 9)
    assert len({before, changed, outside.version()}) == 3


def test_it_is_made_once(monkeypatch, tmp_path):
    monkeypatch.setattr(outside, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(seed_model, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(seed_model, "fetch", lambda name: {"path": f"/models/{name}"})
    made, step = [], fake_step()
    step.release = lambda: made.append("room on the card")

    def teach(step, base, ranked, work, folder):
        made.append((base, len(ranked)))
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(outside, "train_judge", teach)
    folders = {outside.fetch(step) for _ in range(2)}
    assert len(folders) == 1 and made == [
        "room on the card",
        ("/models/gemma-3-270m", sum(len(read_jsonl(path)) for path in outside.LESSONS)),
    ]


def test_its_revision_says_which_weights_score(monkeypatch, tmp_path):
    """Another machine rounds otherwise, and makes another judge by the same recipe."""
    monkeypatch.setattr(outside, "fetch", lambda step: str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"one")
    one = StepRun.model_revision(SimpleNamespace(), "outside")
    (tmp_path / "README.md").write_text("a card")
    assert StepRun.model_revision(SimpleNamespace(), "outside") == one and len(one) == 12
    (tmp_path / "model.safetensors").write_bytes(b"another")
    assert StepRun.model_revision(SimpleNamespace(), "outside") != one


def test_no_lesson_is_an_exam_question():
    """No prompt of the judge's lessons stands in a set that it, or a model of a run, is measured or trained on."""
    lessons = {r["prompt"] for path in outside.LESSONS for r in read_jsonl(path)}
    others = [p for p in outside.SEED_DATA.glob("*.jsonl") if p not in outside.LESSONS]
    assert len(others) > 6
    for path in others:
        assert not lessons & {r.get("prompt") or r["turns"][0] for r in read_jsonl(path)}, path.name


# ---- who decides


@pytest.mark.parametrize("text", ["outside:pairwise", "outside:api", "M1", "M1:vote", ":pairwise"])
def test_a_judge_that_is_none_is_refused(text):
    with pytest.raises(ParamError, match="expected outside:score"):
        parse_win_judge(text)


def test_a_file_of_verdicts_is_an_input(tmp_path):
    assert parse_win_judge("votes/a:b.jsonl:human") == ("votes/a:b.jsonl", "human")
    files = external_inputs({"win_judges": [f"{tmp_path}/v.jsonl:human", "outside:score"]})
    lessons = {f"win_judges:outside:{path.stem}": path for path in outside.LESSONS}
    assert files == {f"win_judges:{tmp_path}/v.jsonl": tmp_path / "v.jsonl"} | lessons


def asks_api(base_url):
    flat = Experiment({}).flat("08_evaluate", "M1")
    return SimpleNamespace(**flat | {"judge_base_url": base_url})


@pytest.mark.parametrize(
    "model,judges,says",
    [
        ("M3", ["M1:score", "M2:score"], "M2:score compares M3 with M0, whose answers it does not score"),
        ("M3", ["outside:score"], "outside:score compares M3 with M0"),
        ("M0", ["M1:score", "M2:score"], "M2 would judge M0, which exists before it does; expected M0, SFT, M1 or"),
        ("M2", ["M1:score", "M3:pairwise"], "M3 would judge M2, which exists before it does; expected M0, SFT, M1, M2"),
    ],
)
def test_each_models_win_judges_exist_and_scored_its_opponents(model, judges, says):
    def steps(by_model):
        by_model = {m: {"evaluate": {"win_judges": found}} for m, found in by_model.items()}
        return list_steps(Experiment({"evaluate": {"win_judges": ["M1:score"]}, "by_model": by_model}))

    with pytest.raises(ParamError, match=says):
        steps({model: judges})
    later = steps({"M2": ["M1:score", "M2:pairwise"], "M3": ["x/y:pairwise"]})  # compares, and so needs no scores
    assert [s.name for s in later] == [s.name for s in steps({})]


def test_an_endpoint_without_key_stops_before_a_model_loads(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ParamError, match="OPENAI_API_KEY"):
        evaluate.check_judges(["some-model:api"], asks_api(""))
    evaluate.check_judges(["some-model:api"], asks_api("http://localhost:8000/v1"))


def vote(pid, a, b, order, p_first):
    return {"prompt_id": pid, "model_a": a, "model_b": b, "order": order, "p_first": p_first}


def test_people_decide_by_majority_whoever_stood_first():
    votes = [
        vote("p", "M2", "M1", "AB", 1),  # M2
        vote("p", "M2", "M1", "BA", 0),  # M2
        vote("p", "M1", "M2", "AB", 1),  # M1
        vote("q", "M1", "M2", "BA", 1),  # M2
        vote("q", "M1", "M2", "AB", 1),  # M1
        vote("r", "M2", "M1", "AB", 0.5),
        vote("r", "M2", "SFT", "AB", 0),  # another pair
        vote("unknown", "M2", "M1", "AB", 1),
    ]
    rows = verdicts.from_votes(votes, "M2", "M1", {"p", "q", "r"})
    assert metrics.outcomes(rows) == {"p": 1.0, "q": 0.5, "r": 0.5}
    assert metrics.outcomes(verdicts.from_votes(votes, "M1", "M2", {"p"})) == {"p": 0.0}


def test_votes_on_other_answers_do_not_count_here(tmp_path):
    step = SimpleNamespace(model_revision=lambda name: name)
    path, answers = tmp_path / "votes.jsonl", [{"prompt_id": "p", "prompt": "Q?", "text": "ours"}]

    def decide(text):
        write_jsonl(path, [vote("p", "M2", "M1", "AB", 1) | {"answers": verdicts.answers_digest("theirs", text)}])
        theirs = [{"prompt_id": "p", "text": "theirs"}]
        return evaluate.compare_answers(step, str(path), "human", "M2", answers, "M1", theirs)

    assert metrics.outcomes(decide("ours")) == {"p": 1.0}
    with pytest.raises(DataError, match="votes.jsonl has verdicts on other answers of M2 and M1"):
        decide("of another run")


def test_votes_on_other_models_or_prompts_are_no_fault_of_this_comparison(tmp_path):
    """People vote into one file: on all models, and on prompts that a smaller run does not ask."""
    path, elsewhere = tmp_path / "votes.jsonl", {"answers": "0" * 12}
    votes = [
        vote("p", "M1", "M2", "AB", 0),
        vote("p", "M2", "SFT", "AB", 0) | elsewhere,
        vote("gone", "M2", "M1", "AB", 0) | elsewhere,
    ]
    write_jsonl(path, votes)
    step = SimpleNamespace(model_revision=lambda name: name)
    answers, theirs = ([{"prompt_id": "p", "prompt": "Q?", "text": text}] for text in ("ours", "theirs"))
    rows = evaluate.compare_answers(step, str(path), "human", "M2", answers, "M1", theirs)
    assert metrics.outcomes(rows) == {"p": 1.0}
    assert [(r["model_a"], r["model_b"], r["judge"], r["judge_mode"]) for r in rows] == [
        ("M2", "M1", str(path), "human")
    ]


def test_scores_of_two_judges_of_one_name_are_not_set_against_each_other(capsys):
    def decide(theirs_by, theirs_say="u", scratch=False):
        ours, theirs = (
            [{"prompt_id": "p", "judge": "outside", "judge_rev": r, "score": s}] for r, s in (("a", 3), theirs_by)
        )
        step = SimpleNamespace(rows=lambda path: theirs, model_revision=lambda name: "a", scratch=scratch)
        answers, others = ([{"prompt_id": "p", "prompt": "Q?", "text": text}] for text in ("t", theirs_say))
        return evaluate.compare_answers(step, "outside", "score", "M2", answers, "M1", others, scores=ours)

    assert metrics.outcomes(decide(("a", 2))) == {"p": 1.0}
    with pytest.raises(DataError, match="M1/eval/answer_scores.jsonl is by other weights of outside"):
        decide(("b", 2))
    assert metrics.outcomes(decide(("a", 2), "t")) == {"p": 0.5}  # one text, scored in two batches
    assert capsys.readouterr().out == ""
    decide(("b", 2), scratch=True)
    assert "another outside scored the answers of M1: this win rate means nothing" in capsys.readouterr().out


def test_an_opponent_that_the_judge_did_not_score_is_named():
    theirs = [{"prompt_id": "p", "judge": "SFT", "judge_rev": "a", "score": 3}]
    step = SimpleNamespace(rows=lambda path: theirs, model_revision=lambda name: "a", scratch=False)
    answers = [{"prompt_id": "p", "prompt": "Q?", "text": "t"}]
    ours = [{"prompt_id": "p", "judge": "M1", "judge_rev": "b", "score": 3}]
    with pytest.raises(DataError, match="M0/eval/answer_scores.jsonl has no score of M1 for p.*08_evaluate@M0 --force"):
        evaluate.compare_answers(step, "M1", "score", "M2", answers, "M0", answers, scores=ours)


@pytest.mark.parametrize(
    "row, wrong",
    [
        ({"prompt_id": "p"}, "no model_a"),
        (vote(7, "M1", "M2", "AB", 1), "prompt_id is 7, expected a text"),
        (vote("p", "M1", ["M2"], "AB", 1), r"model_b is \['M2'\], expected a text"),
        (vote("p", "M1", "M2", "first", 1), "order is 'first'"),
        (vote("p", "M1", "M2", "AB", "A"), "p_first is 'A'"),
    ],
)
def test_a_row_that_is_no_verdict_is_named(tmp_path, row, wrong):
    path = tmp_path / "votes.jsonl"
    path.write_text(json.dumps(vote("p", "M1", "M2", "AB", 1)) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(
        DataError, match=f"votes.jsonl: row 2 is no verdict: it has {wrong}" if "no " in wrong else wrong
    ):
        verdicts.read_votes(path)
