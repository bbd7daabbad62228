"""How many tokens a model attends to, its context; what is longer is named before the model is loaded.

Behind its context a model writes nonsense, or fails, without a word. What people wrote and does not fit is refused;
of what a model wrote the judge sees as much as fits (`judge.prompts`), and that is counted.
"""

import json
from pathlib import Path

from srlm_utils import chat
from srlm_utils.errors import DataError

KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")
FRAME = 512  # tokens that a chat template surely does not put around a text


def of_config(config: dict) -> int:
    """Tokens of the context that a config of transformers names; 0 where it names none."""
    text = config.get("text_config") or config
    return next((int(text[k]) for k in KEYS if isinstance(text.get(k), int) and text[k] > 0), 0)


def of_folder(folder: str) -> int:
    """As `of_config`, of a model folder; nothing is loaded."""
    try:
        return of_config(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError):
        return 0  # whoever loads the model says what is wrong with it


def check(source: dict, rows: list[dict], n_new: int, lower: str = "") -> None:
    """Raise `DataError` where a model cannot read one of `rows` with `n_new` tokens, or its reference, behind it.

    `source` is `StepRun.model_source`'s; rows have "prompt_id" and "prompt", and may have "reference"; `lower` names
    the parameter behind `n_new`. Of the model its tokenizer alone is loaded, and only where a text may be too long.
    """
    most = of_folder(source["folder"])

    def n_bytes(row):  # a token has a byte at least
        return len(row["prompt"].encode()) + max(n_new, len(row.get("reference", "").encode()))

    long = [row for row in rows if most and n_bytes(row) + FRAME > most]
    if not long:
        return
    tokenizer = chat.load_tokenizer(**source)
    found = []
    for row in long:
        n = len(chat.prompt_ids(tokenizer, chat.user(row["prompt"])))
        behind = max(n_new, len(chat.answer_ids(tokenizer, row.get("reference", ""))))
        if n + behind > most:
            found.append(f"{row['prompt_id']} ({n} and {behind})")
    if found:
        raise DataError(
            f"{some(found)}: a prompt's tokens and those behind it are more than the {most} that the "
            f"model attends to. Shorten or remove these rows{', or lower ' + lower if lower else ''}."
        )


def some(names: list[str]) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def check_requests(sizes: dict[str, int], most: int) -> None:
    """Raise `DataError` for requests, by key, of more than `most` tokens (0: any); the last check, before a batch."""
    if most and (long := [f"{key} ({n})" for key, n in sizes.items() if n > most]):
        raise DataError(
            f"{some(long)}: more tokens, with those still to write, than the {most} that the model "
            "attends to. Shorten these texts, or lower max_new_tokens or max_response_tokens."
        )
