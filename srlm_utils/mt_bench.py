"""MT-Bench (Zheng et al. 2023, arXiv 2306.05685): dialogues of two turns, each answer graded by itself.

Files have FastChat's formats. A judge behind an endpoint rates from 1 to 10, asked in the kit's own words; ratings to
print beside published ones come from FastChat's `gen_judgment` on the same answers. A local judge's expected scores, 0
to 5, are a figure of the kit's own.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from srlm_utils import api, chat, judge, metrics
from srlm_utils.artefacts import read_jsonl
from srlm_utils.errors import MissingInputError
from srlm_utils.paths import PROMPTS
from srlm_utils.rows import check_rows

SET = "mt_bench"
TURNS = (1, 2)
# FastChat's temperature of each category; any other category has that of writing
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}


class Question(BaseModel):
    """A row of a question file. `reference`: good answers to both turns, where there are right ones."""

    model_config = ConfigDict(extra="allow", strict=True)

    question_id: int | str
    category: str = Field(min_length=1)
    turns: list[str] = Field(min_length=2, max_length=2)
    reference: list[str] = Field([], max_length=2)

    @field_validator("turns")
    @classmethod
    def _not_blank(cls, v: list[str]) -> list[str]:
        if not all(t.strip() for t in v):
            raise ValueError("holds a blank turn")
        return v


def load_questions(path: Path, limit: int = 0) -> list[dict]:
    """The first `limit` questions of a JSONL file (0: all), checked, ids unique."""
    if not path.is_file():
        raise MissingInputError(
            f"mt_bench_file: {path}: no such file. Expected MT-Bench's question.jsonl, or rows of {{question_id, "
            "category, turns, reference}."
        )
    rows = check_rows(read_jsonl(path), Question, str(path))
    return rows[:limit] if limit else rows


def key(question: dict, turn: int) -> str:
    """Name of an answer: ``<question_id>/<turn>``, turn 1 or 2."""
    return f"{question['question_id']}/{turn}"


def dialogue(question: dict, answers: dict[str, str], turn: int) -> list[dict]:
    """Messages up to the user's turn `turn`, with the model's own answers between."""
    messages = chat.user(question["turns"][0])
    if turn == 2:
        messages += [{"role": "assistant", "content": answers[key(question, 1)]}, *chat.user(question["turns"][1])]
    return messages


def prompt_rows(questions: list[dict]) -> list[dict]:
    """Both turns of each question as one prompt row, for `context.check`: an answer stands between, another behind."""
    return [{"prompt_id": str(q["question_id"]), "prompt": "\n".join(q["turns"])} for q in questions]


def write_answers(step, engine, questions: list[dict]) -> dict[str, str]:
    """Both answers of each question, by `key`, continuing the row log mt_bench.jsonl.

    Temperatures are those of the categories, top-p is 1, as in FastChat; the step's parameters give
    max_new_tokens and seed.
    """
    p, log = step.params, step.log("mt_bench.jsonl")
    with step.progress(2 * len(questions) - len(log.rows), "answers") as bar:
        for turn in TURNS:
            answers = {r["key"]: r["text"] for r in log.rows}
            by_temperature: dict[float, list] = {}
            for q in questions:
                if key(q, turn) not in answers:
                    ids = chat.prompt_ids(engine.tokenizer, dialogue(q, answers, turn))
                    temperature = TEMPERATURES.get(q["category"], TEMPERATURES["writing"])
                    by_temperature.setdefault(temperature, []).append((key(q, turn), ids))
            for temperature, requests in by_temperature.items():
                sampling = {"max_new_tokens": p.max_new_tokens, "temperature": temperature, "top_p": 1.0}
                for batch in engine.generate(requests, seed=p.seed, **sampling):
                    log.extend([{"key": s.key.rpartition("-")[0], "text": s.text} for s in batch])
                    bar.update(len(batch))
    return {r["key"]: r["text"] for r in log.rows}


def model_answer(questions: list[dict], answers: dict[str, str], model_id: str, tstamp: float) -> list[dict]:
    """Rows of FastChat's model_answer/<model>.jsonl; `tstamp` in seconds since 1970."""
    return [
        {
            "question_id": q["question_id"],
            "answer_id": f"{model_id}-{q['question_id']}",
            "model_id": model_id,
            "choices": [{"index": 0, "turns": [answers[key(q, t)] for t in TURNS]}],
            "tstamp": tstamp,
        }
        for q in questions
    ]


# ---- grading


def api_judge(name: str) -> str:
    """The endpoint's model of ``<model>:api``, "" for a judge that is none."""
    return name.removesuffix(":api") if name.endswith(":api") else ""


def ratings(endpoint: api.Api, questions: list[dict], answers: dict[str, str]) -> dict[str, float | None]:
    """Ratings of 1 to 10 by key, None where the judge's reply holds none (`api.parse_rating`)."""
    template = judge.load_template(PROMPTS / "mt_bench_rating.jinja")
    items = []
    for q in questions:
        for t in TURNS:
            said = [*dialogue(q, answers, t), {"role": "assistant", "content": answers[key(q, t)]}]
            said = [m | {"content": judge.escape_tags(m["content"])} for m in said]
            reference = "".join(q.get("reference", [])[t - 1 : t])
            items.append((key(q, t), chat.user(template.render(dialogue=said, reference=reference))))
    return {k: api.parse_rating(reply["text"]) for k, reply in endpoint.ask(items, max_tokens=api.GRADE_TOKENS)}


def expected(
    engine, rubric: judge.Rubric, questions: list[dict], answers: dict[str, str], *, max_response_tokens: int = 0
) -> dict[str, float | None]:
    """Expected scores of 0 to 5 by key, read from a local judge in one pass each; these are no MT-Bench ratings."""
    items = [
        {"id": key(q, t), "prompt": _as_text(dialogue(q, answers, t)), "response": answers[key(q, t)]}
        for q in questions
        for t in TURNS
    ]
    batches = judge.expected_scores(engine, rubric, items, max_response_tokens=max_response_tokens)
    return {r["id"]: r["score"] for batch in batches for r in batch}


def _as_text(messages: list[dict]) -> str:
    """A dialogue as one prompt for a rubric; a single turn as it is."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in messages)


def grade_rows(questions: list[dict], grades: dict[str, float | None], judge_name: str, mode: str) -> list[dict]:
    """Rows of grades.jsonl: {"question_id", "category", "turn", "judge", "judge_mode", "score"}."""
    return [
        {
            "question_id": q["question_id"],
            "category": q["category"],
            "turn": turn,
            "judge": judge_name,
            "judge_mode": mode,
            "score": grades[key(q, turn)],
        }
        for q in questions
        for turn in TURNS
    ]


def metric_rows(model: str, grades: list[dict]) -> list[dict]:
    """Means of `grade_rows` by turn, of both, and of both in each category (set ``mt_bench/<category>``).

    Questions are resampled for the intervals. Names start with mt_bench_ and the mode: expected, or rating.
    """
    if not grades:
        return []
    mode = grades[0]["judge_mode"]
    name = f"mt_bench_{mode}"
    figures = {name: _mean(grades), "mt_bench_judged": _share(grades)}
    figures |= {f"{name}_turn_{t}": _mean([g for g in grades if g["turn"] == t]) for t in TURNS}
    where = {"model": model, "judge": grades[0]["judge"], "judge_mode": mode}
    rows = metrics.metric_rows(figures, set=SET, **where)
    for category in dict.fromkeys(g["category"] for g in grades):
        part = [g for g in grades if g["category"] == category]
        rows += metrics.metric_rows({name: _mean(part)}, set=f"{SET}/{category}", **where)
    return rows


def _by_question(grades: list[dict]) -> list[list[float | None]]:
    questions: dict = {}
    for g in grades:
        questions.setdefault(g["question_id"], []).append(g["score"])
    return list(questions.values())


def _mean(grades: list[dict]) -> dict:
    valid = [[s for s in scores if s is not None] for scores in _by_question(grades)]
    return metrics.ratio([sum(s) for s in valid], [len(s) for s in valid], share=False)


def _share(grades: list[dict]) -> dict:
    questions = _by_question(grades)
    return metrics.ratio([sum(s is not None for s in q) for q in questions], [len(q) for q in questions])
