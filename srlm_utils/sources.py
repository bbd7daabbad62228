"""Seed data from elsewhere: Open Assistant message trees and preference sets, turned into ranked rows one by one.

A source is a bundled name, a file (``.jsonl`` or ``.jsonl.gz``) or a hub id, ``owner/name`` or ``owner/name:split``.
What it holds is told by the fields of its first record. Records are read one at a time: memory holds the rows that are
kept, however large the export is.
"""

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from pydantic import BaseModel, ConfigDict, ValidationError

from srlm_utils.artefacts import is_there, iter_jsonl
from srlm_utils.errors import DataError, MissingInputError, first_line
from srlm_utils.paths import is_hub_id, seed_path
from srlm_utils.rows import IftRow, RankedRow, check_rows, first_fault, load_rows

FORMATS = (
    "kit rows (prompt_id, prompt, response or replies), Open Assistant trees or messages (message_tree_id), pairs "
    "(chosen, rejected) or scored replies (instruction, completions)"
)

NOTHING_TO_RANK = "one reply, or all ranked alike"
BEST_IS_GONE = "the reply ranked best is not usable"


class _Foreign(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Message(_Foreign):
    """A message of an Open Assistant tree."""

    message_id: str
    text: str | None = None
    rank: int | float | None = None
    replies: list["_Message"] | None = None


class _Flat(_Message):
    """The same in a data set of messages, where it stands alone."""

    message_tree_id: str
    parent_id: str | None = None


class _Tree(_Foreign):
    message_tree_id: str
    prompt: _Message


class _Completion(_Foreign):
    response: str | None = None


class _Scored(_Foreign):
    completions: list[_Completion]


class _Pair(_Foreign):
    chosen: str | list[dict]
    rejected: str | list[dict]


SHAPES = {"tree": _Tree, "message": _Flat, "pair": _Pair, "scored": _Scored}


def _checked(where: str, record: dict, of_kind: str) -> dict:
    """`record`, which must be of the source's kind."""
    try:
        SHAPES[of_kind].model_validate(record)
    except ValidationError as e:
        raise DataError(f"{where}: expected a {of_kind} as its first record is; {first_fault(e)}.") from e
    return record


def records(name: str) -> Iterator[tuple[str, dict]]:
    """(where it stands, record) of a source, one by one."""
    if is_hub_id(name):
        yield from _hub_records(name)
        return
    path = seed_path(name)
    if not is_there(path):
        raise MissingInputError(f"{path}: no such file. Expected JSONL (.jsonl or .jsonl.gz) of {FORMATS}.")
    yield from iter_jsonl(path)


def _hub_records(name: str) -> Iterator[tuple[str, dict]]:
    from datasets import load_dataset

    dataset, _, split = name.partition(":")
    try:
        rows = iter(load_dataset(dataset, split=split or "train", streaming=True))
        first = next(rows, None)
    except Exception as e:  # no network, no such data set, no such split: datasets raises many kinds
        raise MissingInputError(
            f"{name}: could not be read from the hub ({type(e).__name__}: {first_line(e)[:200]}). "
            "Expected owner/name or owner/name:split; without a network, give a local .jsonl or .jsonl.gz export."
        ) from e
    for i, row in enumerate(itertools.chain([first] if first else [], rows), 1):
        yield f"{name}: record {i}", row


def kind(record: dict) -> str:
    """What a record is: "ranked", "ift" (kit rows), "tree", "message" (Open Assistant), "pair" or "scored"; or ""."""
    has = record.keys()
    if "message_tree_id" in has:
        return "tree" if isinstance(record.get("prompt"), dict) else "message"
    if {"chosen", "rejected"} <= has:
        return "pair"
    if "completions" in has:
        return "scored"
    return "ranked" if "replies" in has else "ift" if {"prompt", "response"} <= has else ""


def kind_of(name: str) -> str:
    """`kind` of a source's first record; `DataError` for a source that is empty or of no known kind."""
    for where, record in records(name):
        if found := kind(record):
            return found
        raise DataError(f"{where}: has the fields {', '.join(k[:40] for k in record)}; expected {FORMATS}.")
    raise DataError(f"{name}: no records. Expected JSONL of {FORMATS}.")


def conversations(name: str, drops: Counter, *, language: str = "en", all_turns: bool = False) -> Iterator[dict]:
    """Prompts of a foreign source with their usable replies, one or more, in order of rank.

    Yields {"prompt_id", "prompt", "replies": [{"reply_id", "text", "rank", "source"}]}; rank 0 is best, and ranks have
    no gaps: where Open Assistant's best reply is not usable, the row says "best_is_gone": True. `drops` counts what is
    left out, by reason. Of Open Assistant the first turn, as in the paper (section
    3.1.1), unless `all_turns`: then a later turn's prompt is the conversation so far. `language` "" takes every
    language; preference sets do not say theirs.
    """
    of_kind = kind_of(name)
    if of_kind in ("tree", "message"):
        found = _trees(name) if of_kind == "tree" else _grown(name)
        for tree in found:
            yield from _of_tree(tree, drops, language, all_turns)
        return
    seen: Counter = Counter()
    for where, record in records(name):
        _checked(where, record, of_kind)
        row = _pair(where, record, drops) if of_kind == "pair" else _scored(where, record, drops)
        if row:
            seen[row["prompt_id"]] += 1  # HH and its like give several pairs of one prompt, and few give ids
            if (n := seen[row["prompt_id"]]) > 1:
                row["prompt_id"] += f"-{n}"
            yield row


def kit_rows(name: str, of_kind: str) -> list[dict]:
    """The rows of a source in the kit's own form, "ift" or "ranked", each checked."""
    shape = {"ift": IftRow, "ranked": RankedRow}[of_kind]
    if is_hub_id(name):
        return check_rows([row for _, row in records(name)], shape, name)
    return load_rows(seed_path(name), shape)


def can_rank(row: dict) -> bool:
    """Whether two of its replies have unlike ranks."""
    return len({r["rank"] for r in row["replies"]}) > 1


def ranked(rows: Iterable[dict], drops: Counter) -> Iterator[dict]:
    """Those of `conversations` with something to rank."""
    for row in rows:
        if can_rank(row):
            yield row
        else:
            drops[NOTHING_TO_RANK] += 1


def best(row: dict) -> dict:
    """An IFT row: a prompt with its best reply."""
    reply = min(row["replies"], key=lambda r: r["rank"])
    return {"prompt_id": row["prompt_id"], "prompt": row["prompt"], "response": reply["text"]}


def _with_ranks(prompt_id: str, prompt: str, replies: list[tuple[str, str, float]], source: str) -> dict:
    """A row out of (reply_id, text, key) triples; the least key is best, and equal ones rank alike."""
    order = {key: rank for rank, key in enumerate(sorted({key for _, _, key in replies}))}
    out = [{"reply_id": i, "text": text, "rank": order[key], "source": source} for i, text, key in replies]
    return {"prompt_id": prompt_id, "prompt": prompt, "replies": sorted(out, key=lambda r: r["rank"])}


def _is_finite(value) -> bool:
    """Whether replies can be ordered by it. Rows of the hub may hold NaN, which is neither more nor less than any."""
    return isinstance(value, int | float) and abs(value) < math.inf


# ---- Open Assistant


def _trees(name: str) -> Iterator[dict]:
    for where, record in records(name):
        yield _checked(where, record, "tree")


def _grown(name: str) -> Iterator[dict]:
    """Trees out of a data set of messages, in which the messages of a tree follow each other."""
    seen: set[str] = set()
    messages = (_checked(where, record, "message") for where, record in records(name))
    for tree_id, of_tree in itertools.groupby(messages, key=lambda m: m["message_tree_id"]):
        if tree_id in seen:
            raise DataError(f"{name}: the messages of tree {tree_id} do not follow each other. Sort them by tree.")
        seen.add(tree_id)
        nodes = {m["message_id"]: m | {"replies": []} for m in of_tree}
        root = None
        for node in nodes.values():
            if node.get("parent_id") in nodes:
                nodes[node["parent_id"]]["replies"].append(node)
            elif not node.get("parent_id"):
                root = node
        if root:
            state = root.get("tree_state", "ready_for_export")
            yield {"message_tree_id": root["message_tree_id"], "tree_state": state, "prompt": root}


def _of_tree(tree: dict, drops: Counter, language: str, all_turns: bool) -> Iterator[dict]:
    if tree.get("tree_state", "ready_for_export") != "ready_for_export":
        drops["tree not finished"] += 1
        return
    waiting = [(tree["prompt"], [])]
    while waiting:
        asked, before = waiting.pop()
        if why := _unusable(asked, language):
            drops[f"prompt {why}"] += 1
            continue
        talk, replies = [*before, asked["text"]], []
        for reply in asked.get("replies") or []:
            why = _unusable(reply, language) or ("" if _is_finite(reply.get("rank")) else "not ranked")
            if why:
                drops[f"reply {why}"] += 1
                continue
            replies.append((reply["message_id"], reply["text"], reply["rank"]))
            if all_turns:
                waiting += [(further, [*talk, reply["text"]]) for further in reply.get("replies") or []]
        if replies:
            row = _with_ranks(asked["message_id"], _conversation(talk), replies, "open_assistant")
            yield row | ({"best_is_gone": True} if min(rank for _, _, rank in replies) > 0 else {})
        elif not before:
            drops["prompt without a usable reply"] += 1


def _unusable(message: dict, language: str) -> str:
    if message.get("deleted"):
        return "deleted"
    if not message.get("review_result", True):  # null: nobody has reviewed it; false: it did not pass
        return "not reviewed, or rejected"
    if language and message.get("lang") != language:
        return f"not in {language}"
    return "" if (message.get("text") or "").strip() else "blank"


def _conversation(talk: list[str]) -> str:
    if len(talk) == 1:
        return talk[0]
    return "\n\n".join(f"{('User', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(talk))


# ---- preference sets


def _pair(where: str, record: dict, drops: Counter) -> dict | None:
    """A chosen and a rejected reply: texts, lists of messages, or dialogues as in HH ("Human:", "Assistant:")."""
    talks = [_talk(where, side, record.get("prompt"), record[side]) for side in ("chosen", "rejected")]
    if any(len(talk) < 2 for talk in talks):
        drops["no prompt"] += 1
    elif any(len(talk) > 2 for talk in talks):
        drops["several turns"] += 1
    elif talks[0][0] != talks[1][0]:
        drops["two prompts in a pair"] += 1
    elif talks[0][1] == talks[1][1] or not all(text.strip() for talk in talks for text in talk):
        drops["blank, or the same reply twice"] += 1
    else:
        replies = [("chosen", talks[0][1], 0), ("rejected", talks[1][1], 1)]
        return _with_ranks(_id(talks[0][0], record), talks[0][0], replies, "preference")
    return None


def _talk(where: str, side: str, prompt, reply) -> list[str]:
    """The turns of one side of a pair, user first, without a system prompt."""
    if isinstance(reply, str) and "\n\nAssistant:" in reply:
        return [part.strip() for part in re.split(r"\n\n(?:Human|Assistant):", reply)[1:]]
    turns = []
    for part in (prompt, reply):
        if isinstance(part, str):
            turns.append(part)
        elif isinstance(part, list) and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in part):
            turns += [m["content"] for m in part if m.get("role") != "system"]
        elif part is not None:
            raise DataError(f"{where}: {side}: found {type(part).__name__}; expected a text or a list of messages.")
    if len(turns) == 3 and turns[0] == turns[1]:  # the prompt by itself and in the messages
        turns = turns[1:]
    return turns


def _scored(where: str, record: dict, drops: Counter) -> dict | None:
    """n replies with scores, as in UltraFeedback: instruction, completions [{response, overall_score}]."""
    prompt, replies = record.get("instruction") or record.get("prompt"), []
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"{where}: instruction: expected the prompt's text.")
    for i, reply in enumerate(record["completions"]):
        score = reply.get("overall_score", reply.get("score"))
        if isinstance(score, bool) or not _is_finite(score) or not (reply.get("response") or "").strip():
            drops["reply without text or score"] += 1
        else:
            replies.append((f"{i}-{reply.get('model', '')}", reply["response"], -score))
    if not replies:
        drops["prompt without a usable reply"] += 1
        return None
    return _with_ranks(_id(prompt, record), prompt, replies, "preference")


def _id(prompt: str, record: dict) -> str:
    """Its own, or one made of the prompt: sources without ids must not share any."""
    return str(record.get("prompt_id") or record.get("id") or hashlib.sha256(prompt.encode()).hexdigest()[:12])
