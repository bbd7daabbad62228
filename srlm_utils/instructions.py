"""Instructions that a program can verify, in the names and manner of IFEval (Zhou et al. 2023, arXiv 2311.07911).

All of its 25 kinds but ``language:response_language``, which needs a language model. Answers are judged as in the
paper's code, with these differences: capital_word_frequency and the two change_case kinds look at letters alone and do
not ask whether the text is English; JSON must be an object or a list; the end of a sentence is found by a rule, where
IFEval asks a trained tokenizer.
"""

import difflib
import json
import re

from srlm_utils.errors import DataError, cut

RELATIONS = ("at least", "less than")
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
# a period behind these ends no sentence
_ABBREVIATIONS = {"mr", "mrs", "ms", "dr", "prof", "st", "vs", "e.g", "i.e", "fig", "no", "jr", "sr", "approx"}
_CLOSERS = "\"'”’»)]*_"


def count_words(text: str) -> int:
    return len(re.findall(r"\w+", text))


def count_sentences(text: str) -> int:
    """Sentences of a text; words without a final mark count as one, line breaks alone end none.

    A mark ends a sentence if white space follows it, and no small letter unless all of the text is in small letters.
    Abbreviations, initials ("J. Smith") and list numbers ("1.") end none.
    """
    words = list(re.finditer(r"\S+", text))
    small, ends = text == text.lower(), 0
    for word, following in zip(words, words[1:], strict=False):
        bare = word[0].rstrip(_CLOSERS)
        core = bare.rstrip(".!?…")
        if core == bare or following[0][0].islower() and not small:
            continue
        core = core.lstrip("\"'“‘«([*_")
        initials = re.fullmatch(r"[A-HJ-Z]|(?:[A-Za-z]\.)+[A-Za-z]", core)  # "I" is more often the pronoun
        number = core.isdecimal() and not text[: word.start()].rpartition("\n")[2].strip()
        if bare.endswith(".") and (core.lower() in _ABBREVIATIONS or initials or number):
            continue
        ends += 1
    return ends + bool(words)


def _holds(n: int, limit: int, relation: str) -> bool:
    return n >= limit if relation == "at least" else n < limit


def _parts(text: str, mark: str) -> list[str] | None:
    """Texts between the marks; None where one in the middle is empty."""
    parts = [p.strip() for p in text.split(mark)]
    if any(not p for p in parts[1:-1]):
        return None
    return [p for p in parts if p]


def _n_paragraphs(text, num_paragraphs):
    parts = _parts(text, "***")
    return parts is not None and len(parts) == num_paragraphs


def _first_word(text, num_paragraphs, nth_paragraph, first_word):
    paragraphs = [p.split() for p in text.split("\n\n") if p.strip()]
    if len(paragraphs) != num_paragraphs or not 1 <= nth_paragraph <= num_paragraphs:
        return False
    word = paragraphs[nth_paragraph - 1][0].lstrip("\"'")
    return re.match(r"[^.,?!'\"]*", word)[0].lower() == first_word.lower()  # "It" of "It's", as in IFEval


def _postscript(text, postscript_marker):
    # "P.S." may be written "p. s."
    letters = [re.escape(x) for x in postscript_marker.split(".") if x]
    pattern = r"\.\s?".join(letters) + (r"\." if postscript_marker.endswith(".") else "")
    return re.search(pattern, text, re.I) is not None


def _is_json(text):
    text = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.I)
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):  # a model may open brackets for ever
        return False


def _two_responses(text):
    parts = _parts(text, "******")
    return parts is not None and len(parts) == 2 and parts[0] != parts[1]


def _highlights(text, num_highlights):
    found = re.findall(r"\*\*([^\n*]+)\*\*|\*([^\n*]+)\*", text)
    return sum(bool("".join(f).strip()) for f in found) >= num_highlights


def _whole_word(text, word):
    return re.search(rf"\b{re.escape(word)}\b", text, re.I) is not None


# id: (parameters and their types, whether a text that is not blank follows it). Types: int (0 or more), str, list (of
# texts), "relation". As in IFEval, existence and frequency count a word inside others, forbidden words are whole ones.
INSTRUCTIONS = {
    "keywords:existence": ({"keywords": list}, lambda t, keywords: all(k.lower() in t.lower() for k in keywords)),
    "keywords:frequency": (
        {"keyword": str, "frequency": int, "relation": "relation"},
        lambda t, keyword, frequency, relation: _holds(t.lower().count(keyword.lower()), frequency, relation),
    ),
    "keywords:forbidden_words": (
        {"forbidden_words": list},
        lambda t, forbidden_words: not any(_whole_word(t, w) for w in forbidden_words),
    ),
    "keywords:letter_frequency": (
        {"letter": str, "let_frequency": int, "let_relation": "relation"},
        lambda t, letter, let_frequency, let_relation: _holds(
            t.lower().count(letter.lower()), let_frequency, let_relation
        ),
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": int, "relation": "relation"},
        lambda t, num_sentences, relation: _holds(count_sentences(t), num_sentences, relation),
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": int}, _n_paragraphs),
    "length_constraints:number_words": (
        {"num_words": int, "relation": "relation"},
        lambda t, num_words, relation: _holds(count_words(t), num_words, relation),
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": int, "nth_paragraph": int, "first_word": str},
        _first_word,
    ),
    "detectable_content:number_placeholders": (
        {"num_placeholders": int},
        lambda t, num_placeholders: len(re.findall(r"\[[^\]\n]*\]", t)) >= num_placeholders,
    ),
    "detectable_content:postscript": ({"postscript_marker": str}, _postscript),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": int},
        lambda t, num_bullets: len(re.findall(r"^[ \t]*(?:\*[^*]|-)", t, re.M)) == num_bullets,
    ),
    "detectable_format:constrained_response": ({}, lambda t: any(o in t for o in OPTIONS)),
    "detectable_format:number_highlighted_sections": ({"num_highlights": int}, _highlights),
    "detectable_format:multiple_sections": (
        {"section_spliter": str, "num_sections": int},  # IFEval's spelling
        lambda t, section_spliter, num_sections: (
            len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", t)) >= num_sections
        ),
    ),
    "detectable_format:json_format": ({}, _is_json),
    "detectable_format:title": ({}, lambda t: any(x.strip(" <>") for x in re.findall(r"<<([^\n]+?)>>", t))),
    "combination:two_responses": ({}, _two_responses),
    "combination:repeat_prompt": (
        {"prompt_to_repeat": str},
        lambda t, prompt_to_repeat: t.strip().lower().startswith(prompt_to_repeat.strip().lower()),
    ),
    "startend:end_checker": (
        {"end_phrase": str},
        lambda t, end_phrase: t.strip().strip('"').lower().endswith(end_phrase.strip().lower()),
    ),
    "startend:quotation": ({}, lambda t: len(t.strip()) > 1 and t.strip()[0] == '"' == t.strip()[-1]),
    "change_case:capital_word_frequency": (
        {"capital_frequency": int, "capital_relation": "relation"},
        lambda t, capital_frequency, capital_relation: _holds(
            sum(w.isupper() for w in re.findall(r"[\w'’-]+", t)), capital_frequency, capital_relation
        ),
    ),
    "change_case:english_capital": ({}, str.isupper),
    "change_case:english_lowercase": ({}, str.islower),
    "punctuation:no_comma": ({}, lambda t: "," not in t),
}


def check_instructions(ids: list[str], kwargs: list[dict]) -> None:
    """Raise `DataError`, naming the id, unless every instruction is known and has its parameters.

    A parameter that is None counts as absent: the rows published with the paper name all parameters in each.
    """
    if len(ids) != len(kwargs):
        raise DataError(
            f"{len(ids)} in instruction_id_list, {len(kwargs)} in kwargs. Give each instruction its object."
        )
    for name, given in zip(ids, kwargs, strict=True):
        if name not in INSTRUCTIONS:
            near = difflib.get_close_matches(name, INSTRUCTIONS, 1)
            hint = (
                f"did you mean {near[0]!r}?" if near else "srlm_utils/instructions.py lists those that can be checked."
            )
            raise DataError(f"instruction {cut(name)} is unknown; {hint}")
        wanted, given = INSTRUCTIONS[name][0], _given(given)
        if given.keys() != wanted.keys():
            raise DataError(f"instruction {name!r}: found kwargs {cut(sorted(given))}, expected {sorted(wanted)}.")
        for key, kind in wanted.items():
            if not _fits(given[key], kind):
                raise DataError(f"instruction {name!r}: {key}: found {cut(given[key])}, expected {_KINDS[kind]}.")


_KINDS = {
    int: "a whole number, 0 or more",
    str: "a text that is not blank",
    list: "a list of one or more texts that are not blank",
    "relation": " or ".join(map(repr, RELATIONS)),
}


def _fits(value, kind) -> bool:
    if kind == "relation":
        return value in RELATIONS
    if kind is list:
        return isinstance(value, list) and bool(value) and all(_fits(v, str) for v in value)
    if kind is int:
        return type(value) is int and value >= 0
    return isinstance(value, str) and bool(value.strip())


def _given(kwargs: dict) -> dict:
    return {k: v for k, v in kwargs.items() if v is not None}


def followed(text: str, ids: list[str], kwargs: list[dict], *, loose: bool = False) -> list[bool]:
    """Whether `text` follows each instruction; a blank text follows none.

    `loose` takes an instruction as followed if any of eight variants does: the text without its first line, last line,
    both or neither, each with and without its asterisks (section 2.2 of the paper).
    """
    texts = _variants(text) if loose else [text]
    texts = [t for t in texts if t.strip()]
    return [any(INSTRUCTIONS[name][1](t, **_given(k)) for t in texts) for name, k in zip(ids, kwargs, strict=True)]


def _variants(text: str) -> list[str]:
    lines = text.split("\n")
    cut = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return cut + [t.replace("*", "") for t in cut]
