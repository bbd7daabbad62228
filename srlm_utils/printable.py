"""What a model wrote, or a server said, made fit to be shown: without secrets and without what a terminal obeys."""

import os
import re

_CONTROLS = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | {0x7F: 0x2421}  # pictures of them
# C1; embeddings, overrides and isolates, which turn the direction of what stands behind them, too
_CONTROLS |= dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)
_COLOUR = re.compile("(\x1b\\[[0-9;]*m)")
_SECRET = re.compile(r"(KEYS?|TOKENS?|SECRET|PASSWORD)$")


def printable(text: str) -> str:
    """`text` with control characters, but for newline and tab, as visible signs; letters of all scripts stay."""
    return text.translate(_CONTROLS)


def without_secret(text: str, secret: str, name: str = "key") -> str:
    """`text` with ``[name]`` in place of a secret; one of fewer than 8 characters is a dummy, and may be a word."""
    return text.replace(secret, f"[{name}]") if len(secret) >= 8 else text


def without_secrets(text: str, quote=str) -> str:
    """`text` without the values of environment variables whose names say that they are secret. `quote` is how the text
    writes a string."""
    secrets = [(name, value) for name, value in os.environ.items() if _SECRET.search(name.upper())]
    for name, value in sorted(secrets, key=lambda s: -len(s[1])):  # the longest first: it may begin with another
        text = without_secret(text, quote(value), name)
    return text


def printable_output(value, *, coloured: bool = False):
    """An output of a notebook, or a part of it, with its strings `printable`. Tracebacks keep their colours."""
    if isinstance(value, dict):
        coloured = coloured or value.get("output_type") == "error"
        return {k: printable_output(v, coloured=coloured) for k, v in value.items()}
    if isinstance(value, list):
        return [printable_output(v, coloured=coloured) for v in value]
    if not isinstance(value, str):
        return value
    parts = _COLOUR.split(value) if coloured else [value]
    return "".join(part if i % 2 else printable(part) for i, part in enumerate(parts))
