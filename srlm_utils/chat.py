"""The one place where text becomes tokens: training, sampling and judging share these functions."""

import re
from functools import lru_cache

from srlm_utils.errors import ModelError, first_line

# For base models without a template of their own. Plain words, so that it needs no special tokens;
# the end of a turn of the assistant is the tokenizer's EOS, which sampling stops at.
PLAIN_TEMPLATE = (
    "{% for m in messages %}"
    "{{ ('User: ' if m['role'] == 'user' else 'Assistant: ' if m['role'] == 'assistant' else '')"
    " + m['content'] + (eos_token if m['role'] == 'assistant' else '') + '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
TEMPLATES = {"plain": PLAIN_TEMPLATE}
# what templates are told: no thinking before an answer (Qwen3), and a date that is no day's (Llama 3.2; this is 3.1's
# own). Templates that ask for the day by `strftime_now` alone have another prompt every day
SAID = {"enable_thinking": False, "date_string": "26 Jul 2024"}
_PLAIN_TURN = re.compile(r"^([^\S\n]*(?:User|Assistant)):", re.MULTILINE)


def load_tokenizer(folder: str, *, chat_template: str = "", trust_remote_code: bool = False):
    """Tokenizer of a model folder or hub id, ready for the kit: a chat template and a pad token.

    `chat_template` "" keeps the tokenizer's own and falls back to the kit's `plain` one for base
    models; any other value names a template of `TEMPLATES`. Raises `ModelError` without a tokenizer.
    """
    from transformers import AutoTokenizer

    if chat_template and chat_template not in TEMPLATES:
        raise ModelError(f'chat_template: found {chat_template!r}, expected "" or one of {sorted(TEMPLATES)}.')
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as e:
        raise ModelError(
            f"{folder}: no tokenizer could be loaded ({first_line(e)}). Expected "
            "tokenizer.json and tokenizer_config.json beside the weights; copy them from the "
            "model this one was made from."
        ) from e
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{folder}: the tokenizer has no EOS token, so no answer could ever end. Set "
            "eos_token in its tokenizer_config.json."
        )
    if chat_template or not tokenizer.chat_template:
        # models that were pretrained behind a BOS token (Llama, Gemma) write nonsense without it
        starts = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        tokenizer.chat_template = ("{{ bos_token }}" if starts else "") + TEMPLATES[chat_template or "plain"]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def user(text: str) -> list[dict]:
    """A conversation of one user turn: all that the paper's method uses."""
    return [{"role": "user", "content": text}]


def is_plain(tokenizer) -> bool:
    """Whether the tokenizer's chat template is the kit's `plain` one, behind a BOS token or not."""
    return tokenizer.chat_template.endswith(PLAIN_TEMPLATE)


def escape_turns(tokenizer, text: str) -> str:
    """`text` as a message shows it: under `plain`, no line of it begins a turn (``Assistant:`` is ``Assistant\\:``)."""
    return _PLAIN_TURN.sub(r"\1\\:", text) if is_plain(tokenizer) else text


def prompt_ids(tokenizer, messages: list[dict], prefill: str = "") -> list[int]:
    """Token ids up to where the assistant starts to write, plus `prefill`: words put in its mouth.

    Control tokens that stand in a message (a candidate may contain ``<|im_end|>``) are encoded as
    the plain text they are, and under `plain` lines that begin like a turn are made harmless, so no
    content can end its own turn. A model's own template whose turns are marked by plain words (Llama
    2's ``[INST]``) is not known here: there it can.
    """
    messages = [m | {"content": escape_turns(tokenizer, m["content"])} for m in messages]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, sanitize_control_tokens=True, return_dict=True, **SAID
    )["input_ids"]
    return list(ids) + (answer_ids(tokenizer, prefill, ended=False) if prefill else [])


def text_ids(tokenizer, text: str) -> list[int]:
    """Token ids of an assistant's text, without any control token, whatever the text contains."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


@lru_cache(maxsize=8)
def end_of_turn(tokenizer) -> int:
    """The token that ends an assistant's turn in the chat template; EOS where the template has none.

    The two differ for some models (Gemma's turns end in ``<end_of_turn>``, not in its EOS). Raises `ModelError` where
    an answer does not stand right behind the generation prompt: models that always think first, or name a channel.
    """
    turn, answer = user("x"), {"role": "assistant", "content": "ok"}
    start = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False, **SAID)
    whole = tokenizer.apply_chat_template([*turn, answer], tokenize=False, **SAID)
    before, said, tail = whole.removeprefix(start).partition("ok")
    if not whole.startswith(start) or not said or before.strip():
        raise ModelError(
            f"the chat template of this model asks for an answer with {start[-40:]!r} and shows one as "
            f"{whole[-60:]!r}: something comes before the answer, so it can neither be trained nor judge. "
            "Take a model that answers without thinking first; for a base model set common.chat_template: plain."
        )
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return next((i for i in ids if i in tokenizer.added_tokens_decoder), tokenizer.eos_token_id)


def answer_ids(tokenizer, text: str, *, ended: bool = True) -> list[int]:
    """Token ids that an assistant which answers `text` writes; with the end of turn only if it `ended`."""
    # a template that leaves no space after its "Assistant:" wants the space in front of the answer
    lead = " " if is_plain(tokenizer) else ""
    return text_ids(tokenizer, lead + text) + ([end_of_turn(tokenizer)] if ended else [])


def decode(tokenizer, ids: list[int], *, line: bool = False) -> str:
    """Text of generated ids without control tokens, blanks at its ends, and what is there of a character cut in two.

    `line`: what stands before the first line break, which some vocabularies join with the end of a sentence in one
    token ("?\\n").
    """
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return (text.partition("\n")[0] if line else text).rstrip("\ufffd").strip()


def newline_ids(tokenizer) -> list[int]:
    """Every token id whose text contains a line break: where one-line outputs stop."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return [i for i, text in enumerate(texts) if "\n" in text]
