"""LLM-as-a-Judge: rubric templates, the three ways of reading a score, and the parser.

`sampled` (Yuan et al. 2024, sections 2.2 and 3.1.3): k sampled judgements that justify and end in ``Score: x``;
the mean of the valid ones. `expected`: the score-first prompt is followed by ``Score: `` and the
probabilities of the six digits give a mean in one forward pass (as in G-Eval, Liu et al. 2023), which
hardly ever ties. `sampled_expected`: sampled judgements, each read by the probabilities of the digits where it wrote
its score. Only text that the judge itself wrote is parsed, never the prompt or the candidate.
"""

import re
import statistics
from collections.abc import Iterator
from pathlib import Path

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from srlm_utils import chat
from srlm_utils.errors import ModelError, ParamError
from srlm_utils.params import JudgeMode
from srlm_utils.paths import rubric_path

MIN_SCORE, MAX_SCORE = 0, 5
FORMATS = ("justify_first", "score_first")
READ_AT_ONCE = 64  # judgements whose digits are read together
SCORE_LINE = 8  # tokens that a score line has at most, in the kit's own form
CUT = " [...]"  # ends a response of which the judge sees the beginning alone
_SCORE_LINE = re.compile(r"^[\s*_#]*score[\s*_]*[:=][\s*_]*(-?\d+(?:\.\d+)?)\s*(?:/\s*5)?[\s*_.]*$", re.IGNORECASE)
# up to the name alone: what follows it, and whether the tag is closed, a reader may overlook
_BLOCK_TAG = re.compile(
    r"<(?=\s*(?:/\s*)?(?:prompt|question|response|answer_A|answer_B|reference_answer|task|(?:user|assistant)_turn)\b)",
    re.IGNORECASE,
)


def load_template(path: Path):
    """A prompt template in a sandbox; unknown variables are errors, values are never templates."""
    env = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=False)
    try:
        return env.from_string(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, TemplateError) as e:
        raise ParamError(f"{path}: cannot be used as a template ({e}).") from e


class Rubric:
    """A judge prompt: `render(prompt, response, format)`, format one of `FORMATS`; the two ask for different things."""

    def __init__(self, name: str):
        self.name, path = name, rubric_path(name)
        self._template = load_template(path)
        probes = [self.render("[PROBE PROMPT]", "[PROBE RESPONSE]", f) for f in FORMATS]
        for needed, what in (
            ("[PROBE PROMPT]", "{{ prompt }}"),
            ("[PROBE RESPONSE]", "{{ response }}"),
            ("Score: ", "Score: "),
        ):
            if any(needed not in probe for probe in probes):
                raise ParamError(
                    f"{path}: the rendered rubric lacks {what}; a rubric shows {{{{ prompt }}}} and "
                    '{{ response }} and asks for a line "Score: ".'
                )
        if probes[0] == probes[1]:  # one question would be trained with two kinds of answer
            raise ParamError(
                f"{path}: the rubric asks the same in both formats; it needs a branch such as "
                '{% if format == "score_first" %}Write only "Score: " and the points.{% else %}Say why, then end with '
                'a line "Score: " and the points.{% endif %}'
            )

    def render(self, prompt: str, response: str, format: str) -> str:
        try:
            return self._template.render(prompt=escape_tags(prompt), response=escape_tags(response), format=format)
        except Exception as e:  # a template is the user's code
            raise ParamError(f"rubric {self.name}: {e}.") from e


def escape_tags(text: str) -> str:
    """`text` with the tags that close or open a block of our templates made harmless."""
    return _BLOCK_TAG.sub(r"<\\", text)


def guards(tokenizer, response: str) -> list[str]:
    """What in a candidate was made harmless or could have been mistaken for the judge's own words."""
    found = {
        "score line": parse_score(response)[1] != "no_score",
        "block tag": escape_tags(response) != response,
        "control token": any(
            token.special and token.content in response for token in tokenizer.added_tokens_decoder.values()
        ),
        "chat turn": chat.escape_turns(tokenizer, response) != response,
        "template expression": "{{" in response or "{%" in response,
    }
    return [name for name, fired in found.items() if fired]


def parse_score(text: str) -> tuple[float | None, str]:
    """(score, "ok") from the last ``Score: x`` line of a judgement, else (None, why).

    Why is "no_score" (no such line) or "out_of_range" (the last one is outside 0 to 5). An unparsed
    judgement is unparsed: it is neither 0 nor a reason to reject the answer.
    """
    for line in reversed(text.splitlines()):
        # a longer line is no score line, and must not cost the matching time of a hostile one
        if len(line) <= 80 and (m := _SCORE_LINE.match(line)):
            score = float(m.group(1))
            return (score, "ok") if MIN_SCORE <= score <= MAX_SCORE else (None, "out_of_range")
    return None, "no_score"


def target(justification: str, score: int, format: str) -> str:
    """What the judge should write: the response of an EFT row.

    Score-first rows hold the score alone, and of that the digit alone is trained (`train.sft_rows`).
    """
    return f"Score: {score}" if format == "score_first" else f"{justification.strip()}\nScore: {score}"


def score_tokens(tokenizer) -> tuple[list[int], list[int]]:
    """(ids that all of ``Score: 0`` .. ``Score: 5`` begin with, the one id that follows for each score)."""
    ids = [chat.answer_ids(tokenizer, f"Score: {s}", ended=False) for s in range(MIN_SCORE, MAX_SCORE + 1)]
    start = ids[0][:-1]
    if any(i[:-1] != start for i in ids) or len({i[-1] for i in ids}) < len(ids):
        raise ModelError(
            "this tokenizer does not write the scores 0 to 5 as one token each, so their "
            "probabilities cannot be read; set judge_mode to sampled and formats to [justify_first]."
        )
    return start, [i[-1] for i in ids]


def prompts(tokenizer, rubric: Rubric, items: list[dict], format: str, max_response_tokens: int, room: int = 0):
    """(judge prompts (id, token ids) of `items`, ids of the items whose response was cut).

    A response of more than `max_response_tokens` tokens (0: no limit) is shown to the judge up to there, with a mark;
    and no more of it than makes a judge prompt of `room` tokens (0: no limit).
    """
    requests, cut, no_room = [], set(), 0

    def ask(it, response):
        return chat.prompt_ids(tokenizer, chat.user(rubric.render(it["prompt"], response, format)))

    for it in items:
        response = fit(tokenizer, it["response"], max_response_tokens)
        ids = ask(it, response)
        if room and len(ids) > room:
            no_room += 1
            left = len(chat.answer_ids(tokenizer, response, ended=False))
            while len(ids) > room and left > 0:  # the mark, and a token cut in two, take some too
                left -= len(ids) - room
                response = fit(tokenizer, it["response"], max(left, 1))
                ids = ask(it, response)
        if response != it["response"]:
            cut.add(it["id"])
        requests.append((it["id"], ids))
    if no_room:
        print(f"{no_room} responses are longer than the judge's context has room for: it sees the beginning alone")
    return requests, cut


def _room(engine, items: list[dict], n_new: int) -> int:
    """Tokens that a judge prompt of `items` may have for `engine` to write `n_new` behind it; 0 is any number.

    Without items the engine is not asked: servers would be started for that.
    """
    return max(engine.context - n_new, 1) if items and engine.context else 0


def surely_fits(response: str, max_tokens: int) -> bool:
    """Whether a text cannot have more tokens, without counting them: each has a byte at least, and one may begin it."""
    return len(response.encode()) < max_tokens


def fit(tokenizer, response: str, max_tokens: int) -> str:
    """`response`, or its first `max_tokens` tokens (0: no limit) and a mark."""
    if not max_tokens or surely_fits(response, max_tokens):
        return response
    ids = chat.answer_ids(tokenizer, response, ended=False)
    return response if len(ids) <= max_tokens else chat.decode(tokenizer, ids[:max_tokens]) + CUT


def _expected(probs: list[float]) -> float:
    return sum(s * p for s, p in enumerate(probs))


def expected_scores(engine, rubric: Rubric, items: list[dict], *, max_response_tokens: int = 0) -> Iterator[list[dict]]:
    """Judge `items` ({"id", "prompt", "response"}) in one forward pass each; yields batches of rows.

    Row: {"id", "judge_mode", "cut", "score" (mean, 0 to 5), "probs" (six, sum 1), "mass" (what the six held of
    the whole distribution)}; `cut` says whether the judge saw a part of the response alone (`prompts`).
    """
    start, choices = score_tokens(engine.tokenizer)
    room = _room(engine, items, len(start) + 1)  # and the digit, which vLLM has to write
    requests, cut = prompts(engine.tokenizer, rubric, items, "score_first", max_response_tokens, room)
    for batch in engine.choice_probs([(key, ids + start) for key, ids in requests], choices):
        yield [
            {
                "id": key,
                "judge_mode": "expected",
                "cut": key in cut,
                "score": _expected(probs),
                "probs": [round(p, 6) for p in probs],
                "mass": round(mass, 6),
            }
            for key, probs, mass in batch
        ]


def sampled_scores(
    engine,
    rubric: Rubric,
    items: list[dict],
    *,
    n_samples: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    seed: int,
    max_response_tokens: int = 0,
    read_digits: bool = False,
) -> Iterator[list[dict]]:
    """Judge `items` by `n_samples` written judgements each; yields batches of rows.

    Row: {"id", "judge_mode", "cut", "score" (mean of the valid ones, or None), "variance" (of the valid ones, n - 1;
    None for fewer than two), "samples": [{"text", "score", "status", "ended"}]}; status as in `parse_score`.
    `read_digits` is the mode sampled_expected: a valid judgement's score is the mean of the digits' probabilities where
    it wrote its score, and "written" what it wrote.
    """
    room = _room(engine, items, max_new_tokens + SCORE_LINE)
    requests, cut = prompts(engine.tokenizer, rubric, items, "justify_first", max_response_tokens, room)
    asked, choices = dict(requests), score_tokens(engine.tokenizer)[1] if read_digits else []
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    mode = "sampled_expected" if read_digits else "sampled"
    waiting: list[dict] = []  # texts end one by one; their digits are read many at once
    for written in engine.generate(requests, n=n_samples, **sampling):  # those of one item
        samples = []
        for s in written:
            score, status = parse_score(s.text)
            samples.append({"text": s.text, "score": score, "status": status, "ended": s.ended})
        key = written[0].key.rpartition("-")[0]
        waiting.append({"id": key, "judge_mode": mode, "cut": key in cut, "samples": samples})
        if not read_digits or len(waiting) >= READ_AT_ONCE:
            yield _scored(engine, asked, waiting, choices)
            waiting = []
    if waiting:
        yield _scored(engine, asked, waiting, choices)


def _scored(engine, asked: dict[str, list[int]], rows: list[dict], choices: list[int]) -> list[dict]:
    """Rows with their "score" and "variance"; where there are `choices`, samples get the expected scores of digits."""
    if choices:
        _read_digits(engine, asked, [(row["id"], s) for row in rows for s in row["samples"]], choices)
    return [row | _summary(row["samples"]) for row in rows]


def _read_digits(engine, asked: dict[str, list[int]], samples: list[tuple[str, dict]], choices: list[int]) -> None:
    """Put expected scores in the place of written ones; `samples` stand beside the ids of their rows."""
    requests = []
    for i, (key, sample) in enumerate(samples):
        if sample["score"] is not None:
            text = f"{justification(sample['text'])}\nScore: {MIN_SCORE}".lstrip()
            requests.append((str(i), asked[key] + chat.answer_ids(engine.tokenizer, text, ended=False)[:-1]))
    for batch in engine.choice_probs(requests, choices):
        for i, probs, _ in batch:
            sample = samples[int(i)][1]
            sample |= {"score": _expected(probs), "written": sample["score"]}


def as_written(rows: list[dict]) -> list[dict]:
    """The rows of mode sampled out of those of sampled_expected: the same texts, the scores that they wrote."""
    out = []
    for row in rows:
        samples = [{k: s[k] for k in s if k != "written"} | {"score": s.get("written")} for s in row["samples"]]
        out.append(row | {"judge_mode": "sampled", "samples": samples} | _summary(samples))
    return out


def _summary(samples: list[dict]) -> dict:
    valid = [s["score"] for s in samples if s["score"] is not None]
    return {
        "score": statistics.fmean(valid) if valid else None,
        "variance": statistics.variance(valid) if len(valid) > 1 else None,
    }


def uncertainty(row: dict) -> float:
    """How unsure a judgement is: the variance of its digits (expected) or of its samples' scores, 0 for fewer than two;
    in points squared."""
    if row["judge_mode"] == "expected":
        return sum((digit - row["score"]) ** 2 * prob for digit, prob in enumerate(row["probs"]))
    return row["variance"] or 0.0


def rounded(score: float) -> int:
    """The nearest score on the scale; a half goes up."""
    return int(score + 0.5)


def justification(text: str) -> str:
    """What a judgement says before its last score line."""
    lines = text.rstrip().splitlines()
    ends = [i for i, line in enumerate(lines) if parse_score(line)[1] != "no_score"]
    return "\n".join(lines[: ends[-1]] if ends else lines)


def scores(engine, rubric: Rubric, items: list[dict], mode: JudgeMode, *, max_response_tokens: int = 0, **sampling):
    """Batches of judgement rows in one of the modes. `sampling` are the further arguments of `sampled_scores`;
    `expected` needs none of them."""
    if mode == "expected":
        return expected_scores(engine, rubric, items, max_response_tokens=max_response_tokens)
    sampling["max_response_tokens"] = max_response_tokens
    return sampled_scores(engine, rubric, items, read_digits=mode == "sampled_expected", **sampling)


def judge_items(step, engine, rubric: Rubric, items: list[dict], mode: str, *, log: str, **how) -> list[dict]:
    """Judge `items` in one of the modes, continuing the row log named `log`; returns all rows in order of id.

    `how` are the further arguments of `scores`.
    """
    rows = step.log(log)
    done = {r["id"] for r in rows.rows}
    todo = [it for it in items if it["id"] not in done]
    with step.progress(len(todo), "judgements") as bar:
        for batch in scores(engine, rubric, todo, mode, **how):
            rows.extend(batch)
            bar.update(len(batch))
    return sorted(rows.rows, key=lambda r: r["id"])


def parse_rate(rows: list[dict]) -> float | None:
    """Share of sampled judgements with a valid score; None if there are none."""
    samples = [s for r in rows for s in r.get("samples", [])]
    return sum(s["score"] is not None for s in samples) / len(samples) if samples else None
