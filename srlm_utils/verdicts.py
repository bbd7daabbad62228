"""Head-to-head verdicts between two models' answers, by a judge that compares or one that scores."""

from collections.abc import Iterator

from srlm_utils import chat
from srlm_utils.errors import ModelError
from srlm_utils.judge import inert, load_template
from srlm_utils.paths import PROMPTS
from srlm_utils.plan import is_model_name


def judge_label(judge: str, mode: str = "") -> str:
    """How a figure names a win judge: a model of the run is inside the loop that is being measured."""
    inside = (
        " (inside the loop)"
        if is_model_name(judge) and judge not in ("M0", "SFT")
        else " (the models descend from it)"
        if is_model_name(judge)
        else ""
    )
    return f"{judge}{', ' + mode if mode else ''}{inside}"


def choice_ids(tokenizer) -> list[int]:
    """Token ids of the two answers A and B."""
    ids = [chat.answer_ids(tokenizer, letter, ended=False) for letter in "AB"]
    if any(len(i) != 1 for i in ids) or ids[0] == ids[1]:
        raise ModelError("this judge's tokenizer does not write A and B as one token each; use <model>:score.")
    return [i[0] for i in ids]


def compare(engine, prompts: dict[str, str], a: dict[str, str], b: dict[str, str]) -> Iterator[list[dict]]:
    """Ask in both orders which of two answers is better; answers by prompt_id.

    The choice is read from the probabilities of the letters, so that a small judge still says
    something. Yields rows {"prompt_id", "order" ("AB", "BA"), "p_first" (0 to 1)}.
    """
    template = load_template(PROMPTS / "pairwise.jinja")
    requests = []
    for pid in a:
        for order, first, second in (("AB", a[pid], b[pid]), ("BA", b[pid], a[pid])):
            text = template.render(prompt=inert(prompts[pid]), first=inert(first), second=inert(second))
            requests.append((f"{pid}\t{order}", chat.prompt_ids(engine.tokenizer, chat.user(text))))
    for batch in engine.choice_probs(requests, choice_ids(engine.tokenizer)):
        yield [
            {"prompt_id": key.split("\t")[0], "order": key.split("\t")[1], "p_first": round(p[0], 6)}
            for key, p, _ in batch
        ]


def from_scores(a: dict[str, float], b: dict[str, float]) -> list[dict]:
    """Verdicts of a judge that scores each answer alone: the higher score wins, equal scores tie."""
    return [
        {"prompt_id": pid, "order": "none", "p_first": 1.0 if a[pid] > b[pid] else 0.0 if a[pid] < b[pid] else 0.5}
        for pid in a
    ]
