"""LLM-as-a-Judge: rubric templates, the two ways of reading a score, and the parser.

`sampled` (Yuan et al. 2024, section 2.3): k sampled judgements that justify and end in ``Score: x``;
the mean of the valid ones. `expected`: the score-first prompt is followed by ``Score: `` and the
probabilities of the six digits give a mean in one forward pass (as in G-Eval, Liu et al. 2023), which
hardly ever ties. Only text that the judge itself wrote is parsed, never the prompt or the candidate.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from srlm_utils import chat
from srlm_utils.errors import ModelError, ParamError
from srlm_utils.plan import rubric_path

MIN_SCORE, MAX_SCORE = 0, 5
FORMATS = ("justify_first", "score_first")
_SCORE_LINE = re.compile(r"^[\s*_#]*score[\s*_]*[:=][\s*_]*(-?\d+(?:\.\d+)?)\s*(?:/\s*5)?[\s*_.]*$", re.IGNORECASE)
_BLOCK_TAG = re.compile(r"<(/?\s*(?:prompt|question|response|answer_A|answer_B)\s*)>", re.IGNORECASE)


def load_template(path: Path):
    """A prompt template in a sandbox; unknown variables are errors, values are never templates."""
    env = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=False)
    try:
        return env.from_string(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, TemplateError) as e:
        raise ParamError(f"{path}: cannot be used as a template ({e}).") from e


class Rubric:
    """A judge prompt: `render(prompt, response, format)`, format one of `FORMATS`."""

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

    def render(self, prompt: str, response: str, format: str) -> str:
        try:
            return self._template.render(prompt=inert(prompt), response=inert(response), format=format)
        except Exception as e:  # a template is the user's code
            raise ParamError(f"rubric {self.name}: {e}.") from e


def inert(text: str) -> str:
    """`text` with the tags that close or open a block of our templates made harmless."""
    return _BLOCK_TAG.sub(r"<\\\1>", text)


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


def expected_scores(engine, rubric: Rubric, items: list[dict]) -> Iterator[list[dict]]:
    """Judge `items` ({"id", "prompt", "response"}) in one forward pass each; yields batches of rows.

    Row: {"id", "judge_mode", "score" (mean, 0 to 5), "probs" (six, sum 1), "mass" (what the six held of
    the whole distribution)}.
    """
    start, choices = score_tokens(engine.tokenizer)
    requests = []
    for it in items:
        text = rubric.render(it["prompt"], it["response"], "score_first")
        requests.append((it["id"], chat.prompt_ids(engine.tokenizer, chat.user(text)) + start))
    for batch in engine.choice_probs(requests, choices):
        yield [
            {
                "id": key,
                "judge_mode": "expected",
                "score": sum(s * p for s, p in enumerate(probs)),
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
) -> Iterator[list[dict]]:
    """Judge `items` by `n_samples` written judgements each; yields batches of rows.

    Row: {"id", "judge_mode", "score" (mean of the valid ones, or None), "samples": [{"text", "score",
    "status"}]}; status as in `parse_score`.
    """
    requests = [
        (
            it["id"],
            chat.prompt_ids(engine.tokenizer, chat.user(rubric.render(it["prompt"], it["response"], "justify_first"))),
        )
        for it in items
    ]
    for batch in engine.generate(
        requests, n=n_samples, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    ):
        rows = []
        for i in range(0, len(batch), n_samples):
            group = batch[i : i + n_samples]
            samples = []
            for s in group:
                score, status = parse_score(s.text)
                samples.append({"text": s.text, "score": score, "status": status})
            valid = [s["score"] for s in samples if s["score"] is not None]
            rows.append(
                {
                    "id": group[0].key.rpartition("-")[0],
                    "judge_mode": "sampled",
                    "score": sum(valid) / len(valid) if valid else None,
                    "samples": samples,
                }
            )
        yield rows


def judge_items(step, engine, rubric: Rubric, items: list[dict], mode: str, *, log: str, **sampling) -> list[dict]:
    """Judge `items` in either mode, continuing the row log named `log`; returns all rows in order of id.

    `sampling` are the further arguments of `sampled_scores`; `expected` needs none of them.
    """
    rows = step.log(log)
    done = {r["id"] for r in rows.rows}
    todo = [it for it in items if it["id"] not in done]
    if mode == "expected":
        batches = expected_scores(engine, rubric, todo)
    else:
        batches = sampled_scores(engine, rubric, todo, **sampling)
    with step.progress(len(todo), "judgements") as bar:
        for batch in batches:
            rows.extend(batch)
            bar.update(len(batch))
    return sorted(rows.rows, key=lambda r: r["id"])


def parse_rate(rows: list[dict]) -> float | None:
    """Share of sampled judgements with a valid score; None if there are none."""
    samples = [s for r in rows for s in r.get("samples", [])]
    return sum(s["score"] is not None for s in samples) / len(samples) if samples else None
