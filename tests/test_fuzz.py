"""Bad input: properties that hold for any text and row, and loaders that accept or refuse whatever they are given."""

import json
import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srlm_utils import (
    alpaca_eval,
    artefacts,
    chat,
    context,
    health,
    judge,
    metrics,
    mt_bench,
    pairs,
    rows,
    seeds,
    self_instruct,
    sources,
)
from srlm_utils.errors import DataError, MissingInputError
from srlm_utils.params import SeedData
from srlm_utils.verdicts import read_votes
from tests.test_sources import FURTHER, flat, message, tree

FUZZED = 100_000  # rows of the slow test
settings.register_profile("kit", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("kit")

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
SCORE = st.none() | st.floats(0, 5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


# ---- parser


@given(TEXT, st.sampled_from(["Score: 3", "**Score:** 4/5", "score=2.5", "Score: 9", "Score: -1", ""]), TEXT)
def test_the_parser_answers_for_any_text(before, line, after):
    for text in (before, f"{before}\n{line}\n{after}"):
        score, status = judge.parse_score(text)
        assert (status == "ok") == (score is not None)
        assert score is None or judge.MIN_SCORE <= score <= judge.MAX_SCORE
        assert judge.parse_score(judge.justification(text) + "\nScore: 2") == (2.0, "ok")


@given(TEXT, TEXT)
def test_no_text_leaves_its_block(prompt, response):
    page = judge.Rubric("short").render(f"{prompt}</prompt>", f"<response>{response}</response>", "score_first")
    plain = judge.Rubric("short").render("x", "x", "score_first")
    for tag in ("<prompt>", "</prompt>", "<response>", "</response>"):
        assert page.count(tag) == plain.count(tag) + prompt.count(tag) + response.count(tag)


# ---- pairs and their health


@st.composite
def rounds(draw):
    prompts, candidates, judged = [], [], []
    for i in range(draw(st.integers(0, 5))):
        prompts.append({"prompt_id": f"p{i}", "prompt": draw(TEXT)})
        for j in range(draw(st.integers(0, 4))):
            key = f"p{i}-{j}"
            text, ended = draw(TEXT | st.just("same")), draw(st.booleans())
            candidates.append({"cand_id": key, "prompt_id": f"p{i}", "text": text, "ended": ended})
            if draw(st.booleans()) or j:
                judged.append({"id": key, "judge_mode": "expected", "score": draw(SCORE), "cut": False})
    return prompts, candidates, judged


@given(rounds(), st.integers(0, 3), st.floats(0, 5))
def test_every_prompt_of_any_round_is_a_pair_or_a_drop(made, seed, margin):
    prompts, candidates, judged = made
    kept, drops = pairs.build_pairs(prompts, candidates, judged, seed=seed, min_margin=margin)
    assert len(kept) + sum(drops.values()) == len(prompts)
    scores = {j["id"]: j["score"] for j in judged}
    for pair in kept:
        assert scores[pair["chosen_id"]] == pair["chosen_score"] > pair["rejected_score"] == scores[pair["rejected_id"]]
        assert pair["chosen"] != pair["rejected"] and pair["chosen_score"] - pair["rejected_score"] >= margin
    assert (kept, drops) == pairs.build_pairs(prompts, candidates[::-1], judged[::-1], seed=seed, min_margin=margin)
    positives, why = pairs.build_positives(prompts, candidates, judged, seed=seed, min_score=margin)
    assert len(positives) + sum(why.values()) == len(prompts)
    for row in health.round_metrics("M1", prompts, candidates, judged, kept):
        assert row["value"] is None or math.isfinite(row["value"]), row


# ---- filters


@given(TEXT, TEXT)
def test_rouge_l_is_a_symmetric_share(a, b):
    a, b = self_instruct.words(a), self_instruct.words(b)
    assert 0 <= self_instruct.rouge_l(a, b) == self_instruct.rouge_l(b, a) <= 1
    assert self_instruct.rouge_l(a, a) == bool(a)


@given(st.lists(TEXT | st.sampled_from(["Name a colour, please.", "name a COLOUR please"]), max_size=6), st.booleans())
def test_what_a_filter_keeps_it_does_not_keep_again(texts, ended):
    pool = self_instruct.Pool(0.7)
    for text in map(str.strip, texts):
        reason = self_instruct.check_prompt(text, ended, pool, min_words=2, max_words=20)
        if reason == "kept":
            pool.add(text, "x")
            assert self_instruct.check_prompt(text, ended, pool, min_words=2, max_words=20) == "duplicate"


# ---- metrics


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_an_interval_holds_its_value(groups):
    parts, wholes = [min(a, b) for a, b in groups], [max(a, b) for a, b in groups]
    figure = metrics.ratio(parts, wholes)
    if not sum(wholes):
        assert figure["value"] is None
    elif len(groups) > 1:
        assert 0 <= figure["low"] - 1e-9 <= figure["value"] <= figure["high"] + 1e-9 <= 1 + 2e-9


# ---- files


@given(st.lists(st.lists(st.dictionaries(TEXT, JSON, max_size=4), max_size=4), max_size=4), st.data())
def test_any_rows_survive_a_cut_log(tmp_path_factory, batches, data):
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    log, ends = artefacts.RowLog(path), [0]
    for batch in batches:
        log.extend(batch)
        ends.append(path.stat().st_size)
    log.close()
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    log = artefacts.RowLog(path)
    n = max(i for i, end in enumerate(ends) if end <= cut)
    assert log.rows == [row for batch in batches[:n] for row in batch]
    for batch in batches[n:]:
        log.extend(batch)
    log.close()
    assert path.read_bytes() == whole


NASTY = [
    None, True, 0, -1, 3.5, 10**30, 1e308, "", " ", "\n", "\x00", "\u202eright to left \u05e9\u05dc\u05d5\u05dd",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467", "a\u2028b\x85c", "\ufeff", "x" * 5000, [], [[]], {}, [None], [1],
    ["a", "a"], {"text": "x"}, [{"role": "user", "content": 7}], [{}], "id-Why?", "AB", "tree", "ready_for_export",
]  # fmt: skip
REPLIES = [{"reply_id": "a", "text": "x", "rank": 0, "score": 4}, {"reply_id": "b", "text": "y", "rank": 1}]
IFEVAL = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
TALK = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}]
VOTE = {"prompt_id": "p", "model_a": "M1", "model_b": "M0", "order": "AB", "p_first": 1}
GOOD = [
    {"prompt_id": "p", "prompt": "Q?", "response": "A."},
    {"prompt_id": "p", "prompt": "Q?", "replies": REPLIES},
    {"prompt_id": "p", "prompt": "Q?", "reference": "A."} | IFEVAL,
    tree("Why?", message("So.", rank=0, replies=[FURTHER]), message("No.", rank=1)),
    *flat(message("Why?", "prompter", replies=[message("So.", rank=0), message("No.", rank=1)]), "t"),
    {"prompt": "Hi?", "chosen": "A.", "rejected": "B."},
    {"prompt": "Hi?", "chosen": TALK, "rejected": [*TALK[:1], {"role": "assistant", "content": "No."}]},
    {"instruction": "Hi?", "completions": [{"response": "A.", "overall_score": 4}, {"response": "B.", "score": 1}]},
    {"question_id": 81, "category": "math", "turns": ["One?", "Two?"], "reference": ["1", "2"]},
    {"instruction": "Hi?", "dataset": "helpful_base"},
    VOTE | {"judge": "me"},
]


def spoil(value, rng):
    """`value` with something wrong somewhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice([*value])
        out = {k: v for k, v in value.items() if k != key or rng.random() > 0.2}
        return out | ({key: spoil(value[key], rng)} if key in out else {})
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return [*value[:i], spoil(value[i], rng), *value[i + 1 :], *(value[i:] if rng.random() < 0.1 else [])]
    return rng.choice(NASTY)


def fuzzed(rng) -> bytes:
    """A file of one to three rows, some of them spoilt, some of its bytes too."""
    good = rng.choice(GOOD)
    found = [spoil(good, rng) if rng.random() < 0.7 else good for _ in range(rng.randint(1, 3))]
    ascii_ = rng.random() < 0.5
    end = rng.choice(["\n", "\r\n", "\n\n"])
    data = end.join(json.dumps(row, ensure_ascii=ascii_) for row in found).encode() + rng.choice([b"", end.encode()])
    if rng.random() < 0.3:
        at = rng.randrange(len(data) + 1)
        junk = rng.choice([b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r", b"\\ud800", b"NaN", b"9" * 5000, b'"', b"{", b"["])
        data = rng.choice([data[:at], data[:at] + junk + data[at:], junk + data])
    return data


def source(name, **how):
    """As 01_seed_data reads a source: what it holds is told by its first record."""
    of_kind = sources.kind_of(name)
    own = of_kind in ("ift", "ranked")
    return sources.kit_rows(name, of_kind) if own else list(sources.conversations(name, Counter(), **how))


LOADERS = [
    lambda path: rows.load_rows(path, rows.IftRow),
    lambda path: rows.load_rows(path, rows.RankedRow),
    lambda path: rows.load_rows(path, rows.PromptRow),
    lambda path: source(str(path)),
    lambda path: source(str(path), language="", all_turns=True),
    read_votes,
    mt_bench.load_questions,
    alpaca_eval.load_instructions,
]


def load_fuzzed(tmp_path, n, seed):
    """How many of `n` fuzzed rows were accepted, by loader; each is, or is refused in one line that names the file."""
    rng, path, accepted, done = random.Random(seed), tmp_path / "f.jsonl", Counter(), 0
    while done < n:
        data = fuzzed(rng)
        path.write_bytes(data)
        done += max(1, sum(bool(line.strip()) for line in data.split(b"\n")))
        for i, load in enumerate(LOADERS):
            try:
                found = load(path)
            except (DataError, MissingInputError) as e:
                assert "f.jsonl" in str(e) and len(str(e)) < 2000, data
            except Exception as e:
                raise AssertionError(f"loader {i} fell over {data!r}") from e
            else:
                accepted[i] += bool(found)
                for row in found:  # what is accepted can be written
                    json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    return accepted


def test_fuzzed_rows_are_accepted_or_refused(tmp_path):
    assert len(load_fuzzed(tmp_path, 2000, seed=0)) == len(LOADERS)


@pytest.mark.slow
@pytest.mark.long
def test_a_hundred_thousand_fuzzed_rows(tmp_path):
    assert len(load_fuzzed(tmp_path, FUZZED, seed=1)) == len(LOADERS)


@pytest.mark.parametrize("load", LOADERS[:3])
def test_shapes_of_files(tmp_path, load):
    path, row = tmp_path / "f.jsonl", GOOD[1] | GOOD[0] | IFEVAL
    line = json.dumps(row, ensure_ascii=False).encode()
    big = json.dumps(row | {"prompt": "x" * 1_000_000}).encode()
    hebrew = json.dumps(row | {"prompt": "שלום \u202e👩‍👩‍👧"}, ensure_ascii=False).encode()
    for good in (line, line + b"\n", b"\xef\xbb\xbf" + line, line + b"\r\n", b"\n\n" + line, big, hebrew):
        path.write_bytes(good)
        assert len(load(path)) == 1
    for bad, says in [
        (b"", "no rows"), (b"\n \n", "no rows"), (line + b"\n" + line, "stands twice"), (line[:-5], "not valid JSON"),
        (b"\x00" * 4096, "not valid JSON"), (line + b"\n" + b"\x00" * 9, "f.jsonl:2: not valid JSON"),
        (line.replace(b"Q?", b"\xe9"), "f.jsonl:1: not UTF-8"), (line.decode().encode("utf-16"), "not UTF-8"),
        (line.replace(b"Q?", b"\\ud83d"), "f.jsonl:1: not valid JSON"), (b"[" * 100_000, "not valid JSON"),
    ]:  # fmt: skip
        path.write_bytes(bad)
        with pytest.raises(DataError, match=says):
            load(path)


# ---- as 01_seed_data reads them

SETS = {
    "ift_file": GOOD[0],
    "ranked_train_files": GOOD[1],
    "ranked_eval_files": GOOD[1],
    "valid_file": GOOD[2],
    "test_file": GOOD[2],
}
SCRIPTS = {
    "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f4\U000e0067\U000e0062\U000e007f \u2764\ufe0f",
    "right to left": "\u05e9\u05dc\u05d5\u05dd \u202babc\u202c \u0645\u0631\u062d\u0628\u0627 \u200f!",
    "line separators": "a\u2028b\u2029c\x85d\x0be",
    "control characters": "NUL \x00 ESC \x1b[2J BEL \x07 DEL \x7f",
    "template and markup": "{{ 7 * 7 }} <script>alert(1)</script> <|im_end|> </prompt>",
}


def seeds_with(parameter, path):
    """The set that `parameter` fills, from a file in the place of a bundled one."""
    few = {name: 2 for name in ("n_ift", "n_ranked_train", "n_ranked_eval", "n_valid", "n_test")}
    value = [str(path)] if parameter.endswith("files") else str(path)
    found, _ = seeds.load_seeds(SeedData(**few, **{parameter: value}).model_dump())
    use = parameter.rpartition("_")[0]
    return found[f"{use}_prompts" if use in ("valid", "test") else use]


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
@pytest.mark.parametrize("parameter", SETS)
def test_a_seed_text_of_any_script_comes_through_as_it_is(tmp_path, parameter, text):
    path, row = tmp_path / "mine.jsonl", SETS[parameter] | {"prompt": text}
    for ascii_, before, end in ((True, b"", b"\n"), (False, b"\xef\xbb\xbf", b"\r\n"), (False, b"\n \n", b"")):
        path.write_bytes(before + json.dumps(row, ensure_ascii=ascii_).encode() + end)
        (found,) = seeds_with(parameter, path)
        assert found["prompt"] == text
        artefacts.write_jsonl(tmp_path / "out.jsonl", [found])
        assert artefacts.read_jsonl(tmp_path / "out.jsonl") == [found]


@pytest.mark.parametrize("parameter", SETS)
def test_a_bad_seed_file_is_refused_with_its_place(tmp_path, parameter):
    path, row = tmp_path / "mine.jsonl", SETS[parameter]
    line = json.dumps(row).encode()
    other = json.dumps(row | {"prompt_id": "q"}).encode()
    for bad, says in [
        (line + b"\n" + other + b"\n" + line, r"mine.jsonl: row 3 \(p\): prompt_id stands twice"),
        (line + b"\n" + other.replace(b"Q?", b"\xff"), "mine.jsonl:2: not UTF-8"),
        (line.decode().encode("utf-16"), "mine.jsonl.*: not UTF-8"),
        (line + b"\n" + b"\x00" * 512, "mine.jsonl:2: not valid JSON"),
        (line + b"\n" + other.replace(b"Q?", b"Q\x00"), "mine.jsonl:2: not valid JSON"),
        (line + b"\n" + other[:-9], "mine.jsonl:2: not valid JSON"),
        (line + b"\n" + other.replace(b"Q?", b"\\ude00"), "mine.jsonl:2: not valid JSON"),
        (line + b"\n" + other.replace(b'"Q?"', b"7"), r"mine.jsonl: row 2 \(q\): prompt"),
        (line + b"\n" + other.replace(b'"Q?"', b'" \\n "'), r"mine.jsonl: row 2 \(q\): prompt"),
        (b"", "mine.jsonl: "),
    ]:
        path.write_bytes(bad)
        with pytest.raises(DataError, match=says) as e:
            seeds_with(parameter, path)
        assert "\n" not in str(e.value)


def test_a_line_of_a_megabyte_is_a_row_and_its_prompt_is_too_long_for_the_model(tmp_path, tiny):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(GOOD[2] | {"prompt": "tea " * 250_000}) + "\n")
    (found,) = seeds_with("test_file", path)
    assert len(found["prompt"]) == 1_000_000
    with pytest.raises(DataError, match=r"^p \(\d{6,} and 8\): .* more than the 4096 that the model attends to"):
        context.check({"folder": tiny}, [found], 8)


def test_a_model_reads_any_script_whole(engine):
    for text in SCRIPTS.values():
        ids = chat.text_ids(engine.tokenizer, text)
        assert engine.tokenizer.decode(ids) == text
        controls = {i for i, token in engine.tokenizer.added_tokens_decoder.items() if token.special}
        assert not controls & {*ids}
