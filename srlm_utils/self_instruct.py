"""New prompts in the manner of Self-Instruct (Wang et al. 2022; Yuan et al. 2024, sections 2.2 and 3.1.3).

Eight demonstrations, six of the seed and two the model wrote itself, are shown as the beginning of a
numbered list that the model continues by one line. What comes is filtered, and every drop has a reason.
"""

import random
import re
import unicodedata

from rapidfuzz.distance import LCSseq

from srlm_utils import chat, context
from srlm_utils.judge import load_template
from srlm_utils.paths import PROMPTS

# things a text-only assistant cannot see, open, draw or play
KEYWORDS = (
    "image",
    "images",
    "picture",
    "pictures",
    "photo",
    "photos",
    "graph",
    "graphs",
    "chart",
    "video",
    "videos",
    "audio",
    "file",
    "files",
    "map",
    "maps",
    "draw",
    "plot",
    "link",
    "website",
    "url",
    "attached",
)
WAVE = 64  # prompts asked for at once: each is shown two that were kept before
QUOTES = "\"'“”‘’„«»「『¿¡"  # and the other marks that a sentence may begin with
_WORD = re.compile(r"[^\W_]+")
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai and Lao, Burmese, Khmer
    "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"  # Chinese characters
)


def spaced(text: str) -> str:
    """`text` with spaces around each letter of the scripts that leave none between words: there a letter is a word."""
    return _UNSPACED.sub(r" \g<0> ", text)


def words(text: str) -> list[str]:
    """Lower-case words and numbers, as ROUGE counts them; of scripts without spaces, letters (`spaced`)."""
    return _WORD.findall(spaced(text.lower()))


def rouge_l(a: list[str], b: list[str]) -> float:
    """ROUGE-L F1 of two word lists: 2 * LCS / (|a| + |b|); 0 for two empty ones."""
    return 2 * LCSseq.similarity(a, b) / (len(a) + len(b)) if a or b else 0.0


class Pool:
    """Texts that a new prompt must differ from: seeds, held-out prompts, and what was accepted before."""

    def __init__(self, threshold: float):
        self.threshold, self._entries, self._exact = threshold, [], set()

    def add(self, text: str, name: str) -> None:
        w = words(text)
        self._entries.append((w, name))
        self._exact.add(tuple(w))

    def nearest(self, text: str) -> tuple[float, str] | None:
        """(ROUGE-L, name) of the first entry at or above the threshold, or None."""
        w = words(text)
        for other, name in self._entries:
            # LCS is at most the shorter length: most entries are settled without aligning them
            if 2 * min(len(w), len(other)) >= self.threshold * (len(w) + len(other)):
                score = rouge_l(w, other)
                if score >= self.threshold:
                    return score, name
        return None

    def __contains__(self, text: str) -> bool:
        return tuple(words(text)) in self._exact


def pick_demos(seed_prompts: list[str], generated: list[str], n_seed: int, n_generated: int, key: str) -> list[str]:
    """Demonstrations of one request, drawn by `key` alone; seeds fill in until enough were generated."""
    rng = random.Random(key)
    new = rng.sample(generated, min(n_generated, len(generated)))
    demos = rng.sample(seed_prompts, min(n_seed + n_generated - len(new), len(seed_prompts))) + new
    rng.shuffle(demos)
    return demos


def request_ids(tokenizer, demos: list[str]) -> list[int]:
    """Token ids of one request: the instruction, and the list so far as the assistant's own words."""
    lines = "\n".join(f"{i}. {demo}" for i, demo in enumerate(demos, 1))
    task = load_template(PROMPTS / "new_task.jinja").render()
    return chat.prompt_ids(tokenizer, chat.user(task), prefill=f"{lines}\n{len(demos) + 1}.")


def write_prompts(engine, ids: list[str], demos: list[str], kept: list[str], params, stop_ids) -> list[tuple]:
    """One request for each attempt id; (attempt id, `engine.Sample`) in the order of `ids`."""
    requests = []
    for i in ids:
        shown = pick_demos(demos, kept, params.n_seed_demos, params.n_generated_demos, f"{params.seed}:{i}")
        requests.append((i, request_ids(engine.tokenizer, shown)))
    batches = engine.generate(
        requests,
        max_new_tokens=params.max_prompt_tokens,
        temperature=params.prompt_temperature,
        top_p=params.prompt_top_p,
        seed=params.seed,
        stop_ids=stop_ids,
    )
    written = {s.key.rpartition("-")[0]: s for batch in batches for s in batch}
    return [(i, written[i]) for i in ids]


def shown_to(attempt_id: str, attempts: list[dict], ift: list[dict], params: dict) -> list[str]:
    """The demonstrations above an attempt, from the rows of attempts.jsonl and seed/ift.jsonl and its step's params."""
    seeds = [row["prompt"] for row in ift if is_demo(row["prompt"], params["max_prompt_words"])]
    place = [row["attempt_id"] for row in attempts].index(attempt_id)
    # requests go out in waves; those of a wave are shown what was kept before it
    before = [row["text"] for row in attempts[: place // WAVE * WAVE] if row["reason"] == "kept"]
    return pick_demos(
        seeds, before, params["n_seed_demos"], params["n_generated_demos"], f"{params['seed']}:{attempt_id}"
    )


def check_room(step, model: str, writer: str, demos: list[str]) -> None:
    """Raise `DataError` where `model` has no room for an answer behind the longest new prompt, or `writer` none for a
    new prompt behind the longest demonstrations."""
    p = step.params
    answered = [{"prompt_id": "a new prompt", "prompt": ""}]
    context.check(step.model_source(model), answered, p.max_prompt_tokens + p.max_new_tokens, "max_new_tokens")
    longest = [{"prompt_id": "demonstrations", "prompt": "\n".join(sorted(demos, key=len)[-p.n_seed_demos :])}]
    n_written = (p.n_generated_demos + 1) * p.max_prompt_tokens
    context.check(step.model_source(writer), longest, n_written, "n_seed_demos or max_prompt_words")


def is_demo(prompt: str, max_words: int) -> bool:
    """Whether a seed prompt can stand as one line of the list."""
    return "\n" not in prompt and len(spaced(prompt).split()) <= max_words


def is_text(text: str) -> bool:
    """Whether `text` begins with a letter, quote or digit, and nine tenths of it are text.

    Text is ASCII, and letters, marks, numbers, punctuation and spaces of any script; not emoji, other symbols, control
    characters, or broken bytes (U+FFFD).
    """
    n = sum(c.isascii() or unicodedata.category(c)[0] in "LMNPZ" for c in text)
    return (text[0].isalnum() or text[0] in QUOTES) and n / len(text) >= 0.9


def check_prompt(text: str, ended: bool, pool: Pool, *, min_words: int, max_words: int) -> str:
    """ "kept", or the reason for which a written prompt is dropped.

    Reasons: unfinished (the token budget ended it), too_short, too_long, not_text (`is_text`), keyword
    (asks for what text cannot do, in English), duplicate (same words as a pool entry), similar (ROUGE-L
    at or above the pool's threshold).
    """
    n = len(spaced(text).split())
    if not ended:
        return "unfinished"
    if n < min_words:
        return "too_short"
    if n > max_words:
        return "too_long"
    if not is_text(text):
        return "not_text"
    if set(words(text)) & set(KEYWORDS):
        return "keyword"
    if text in pool:
        return "duplicate"
    return "similar" if pool.nearest(text) else "kept"


def filter_batch(written: list[tuple[str, object]], pool: Pool, params, *, wanted: int) -> list[dict]:
    """Check a batch of (attempt id, `engine.Sample`) in order; what is kept joins `pool`.

    Rows: {"attempt_id", "text", "reason"}. Once `wanted` prompts were kept, the rest of the batch is
    "not_needed".
    """
    rows = []
    for attempt_id, s in written:
        text = s.text.strip()
        reason = (
            "not_needed"
            if wanted <= 0
            else check_prompt(text, s.ended, pool, min_words=params.min_prompt_words, max_words=params.max_prompt_words)
        )
        if reason == "kept":
            pool.add(text, attempt_id)
            wanted -= 1
        rows.append({"attempt_id": attempt_id, "text": text, "reason": reason})
    return rows
