import json
import random
import re
from types import SimpleNamespace

import pytest

from srlm_utils import self_instruct as si
from srlm_utils.paths import SEED_DATA


def lcs(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_rouge_l_equals_the_definition():
    rng = random.Random(0)
    for _ in range(300):
        a, b = (rng.choices("abcde", k=rng.randrange(1, 12)) for _ in range(2))
        p, r = lcs(a, b) / len(b), lcs(a, b) / len(a)
        f1 = 2 * p * r / (p + r) if p + r else 0
        assert si.rouge_l(a, b) == pytest.approx(f1) == si.rouge_l(b, a)
    assert si.rouge_l([], []) == 0


def pool(*texts):
    p = si.Pool(0.7)
    for i, t in enumerate(texts):
        p.add(t, f"t{i}")
    return p


def test_the_pool_finds_what_is_near():
    p = pool("Explain how rainbows form in the sky.")
    assert p.nearest("Explain how rainbows form in our sky.")[1] == "t0"
    assert p.nearest("Write a poem about rain.") is None
    assert "explain HOW rainbows form, in the sky" in p


@pytest.mark.parametrize(
    "text,ended,reason",
    [
        ("Give three tips for growing basil.", True, "kept"),
        ("Give three tips for growing", False, "unfinished"),
        ("Go on.", True, "too_short"),
        ("Go on", False, "unfinished"),  # whatever else it is
        ("word " * 30, True, "too_long"),
        ("<<<< what is this thing here", True, "not_text"),
        ("Опишите восход солнца над морем", True, "kept"),
        ("Kể tên ba loại trái cây và cách bảo quản chúng.", True, "kept"),
        ("Vysvětlete žákům, proč je nebe modré.", True, "kept"),
        ("“Tea” – what’s the word’s origin?", True, "kept"),
        ("हिन्दी में तीन फलों के नाम लिखो।", True, "kept"),
        ("请给我三个种植罗勒的建议。", True, "kept"),
        ("茶是", True, "too_short"),  # two words
        ("请给我三个种植罗勒的建议。" * 2, True, "too_long"),
        ("★ give three tips", True, "not_text"),
        ("Smile 😀😀 and 😀😀", True, "not_text"),
        ("Name a fruit \ufffd\ufffd\ufffd", True, "not_text"),
        ("Name three teas ★★ x", True, "kept"),  # 18 of 20 letters are nine tenths
        ("Name three teas ★★★x", True, "not_text"),
        ("Describe the picture on the wall.", True, "keyword"),
        ("explain how rainbows form", True, "duplicate"),
        ("Explain how the rainbows form.", True, "similar"),
    ],
)
def test_reasons(text, ended, reason):
    p = pool("Explain how rainbows form.")
    assert si.check_prompt(text.strip(), ended, p, min_words=3, max_words=20) == reason


def test_a_batch_keeps_what_is_wanted_and_no_repeats():
    params = SimpleNamespace(min_prompt_words=3, max_prompt_words=20)
    texts = ["Name a good soup recipe.", "Name a good soup recipe.", "Why do cats purr?", "How deep is a lake?"]
    written = [(f"a{i}", SimpleNamespace(text=t, ended=True)) for i, t in enumerate(texts)]
    rows = si.filter_batch(written, pool(), params, wanted=2)
    assert [r["reason"] for r in rows] == ["kept", "duplicate", "kept", "not_needed"]


def test_demonstrations():
    seeds = [f"seed {i}" for i in range(20)]
    demos = si.pick_demos(seeds, ["new 1", "new 2", "new 3"], 6, 2, "key")
    assert len(demos) == 8 and sum(d.startswith("new") for d in demos) == 2
    assert demos == si.pick_demos(seeds, ["new 1", "new 2", "new 3"], 6, 2, "key")
    assert demos != si.pick_demos(seeds, ["new 1", "new 2", "new 3"], 6, 2, "other")
    assert len(si.pick_demos(seeds, [], 6, 2, "key")) == 8  # seeds fill in
    assert si.is_demo("One line.", 10) and not si.is_demo("Two\nlines.", 10) and not si.is_demo("w " * 11, 10)


def test_rouge_l_of_equal_and_foreign_lists():
    assert si.rouge_l(["a", "b"], ["a", "b"]) == 1 and si.rouge_l(["a"], ["b"]) == 0 == si.rouge_l(["a"], [])
    assert si.rouge_l(list("abcd"), list("bd")) == pytest.approx(2 * 2 / 6)  # LCS b d


def test_nearest_agrees_with_a_search_without_shortcuts():
    rng = random.Random(1)
    texts = [" ".join(rng.choices("abcd", k=rng.randrange(1, 9))) for _ in range(150)]
    p = pool(*texts[:50])
    for text in texts:
        w = text.split()
        near = [(2 * lcs(w, t.split()) / (len(w) + len(t.split())), f"t{i}") for i, t in enumerate(texts[:50])]
        assert p.nearest(text) == next(((s, name) for s, name in near if s >= 0.7), None)


def test_the_threshold_itself_is_similar():
    # LCS 7 of 10 and 10 words: 2 * 7 / 20 = 0.7
    p = pool("a b c d e f g h i j")
    assert p.nearest("a b c d e f g x y z") == (0.7, "t0") and p.nearest("a b c d e f w x y z") is None
    # 7 of 13 words: LCS 7, again 14 / 20
    assert pool("a b c d e f g h i j k l m").nearest("a b c d e f g") == (0.7, "t0")


def test_an_exact_duplicate_is_as_near_as_can_be():
    p = pool("Why do cats purr?")
    assert p.nearest("why do CATS purr") == (1.0, "t0") and "Why do dogs purr?" not in p


def test_different_texts_in_another_script_are_no_duplicates():
    assert "Почему кошки мурлычут" not in pool("Опишите восход солнца над морем")


def test_equal_texts_in_another_script_are_near():
    assert pool("Почему кошки мурлычут").nearest("Почему кошки мурлычут") == (1.0, "t0")


@pytest.mark.parametrize(
    "text,other,third",
    [
        ("请给我三个种植罗勒的建议", "请给我五个种植罗勒的建议", "为什么天空是蓝色的"),
        ("バジルの育て方を三つ教えてください", "バジルの育て方を五つ教えてください", "空はなぜ青いのでしょうか"),
        ("บอกเคล็ดลับการปลูกโหระพาสามข้อ", "บอกเคล็ดลับการปลูกโหระพาห้าข้อ", "ทำไมท้องฟ้าจึงเป็นสีฟ้า"),
        ("바질 키우는 방법 세 가지를 알려 주세요", "바질 키우는 방법 네 가지를 알려 주세요", "하늘은 왜 파란가요"),
    ],
)
def test_near_repeats_are_found_in_scripts_without_spaces(text, other, third):
    p = pool(text)
    assert p.nearest(other)[1] == "t0" and p.nearest(third) is None and other not in p


def test_letters_without_spaces_are_words_beside_spaced_ones():
    assert si.words("Explain 三つ, GPT-4 茶!") == ["explain", "三", "つ", "gpt", "4", "茶"]


def test_words_of_spaced_text_are_what_they_were():
    rows = [json.loads(line) for f in SEED_DATA.glob("*.jsonl") for line in f.read_text().splitlines()]
    texts = [r["prompt"] for r in rows if "prompt" in r]
    texts += ["Ünïcode wörds_and 3.5 don't", "Опишите восход", "한국어 문장입니다", "שלום עולם", "नमस्ते दुनिया"]
    assert all(si.words(t) == re.findall(r"[^\W_]+", t.lower()) and si.spaced(t) == t for t in texts)


def test_word_limits_are_inclusive():
    check = {n: si.check_prompt("tea " * (n - 1) + "tea", True, pool(), min_words=3, max_words=5) for n in range(2, 7)}
    assert check == {2: "too_short", 3: "kept", 4: "kept", 5: "kept", 6: "too_long"}


@pytest.mark.parametrize("word", si.KEYWORDS)
def test_every_keyword_is_refused_as_a_word_only(word):
    assert si.check_prompt(f"Say what this {word.upper()}, says", True, pool(), min_words=1, max_words=9) == "keyword"
    assert si.check_prompt(f"Say what x{word}x says", True, pool(), min_words=1, max_words=9) == "kept"


@pytest.mark.parametrize(
    "text,reason", [("", "too_short"), ("'Quoted' words count", "kept"), ("5 ways to rest", "kept")]
)
def test_beginnings(text, reason):
    assert si.check_prompt(text, True, pool(), min_words=3, max_words=9) == reason


def written(*texts):
    return [(f"a{i}", SimpleNamespace(text=t, ended=True)) for i, t in enumerate(texts)]


LIMITS = SimpleNamespace(min_prompt_words=3, max_prompt_words=20)


def test_near_repeats_within_a_batch_are_dropped_and_drops_do_not_join_the_pool():
    p = pool()
    rows = si.filter_batch(
        written("Draw me a cat.", " How deep is this lake?\n", "How deep is that lake?", "Find me a cat."), p,
        LIMITS, wanted=9)  # fmt: skip
    assert [r["reason"] for r in rows] == ["keyword", "kept", "similar", "kept"]
    assert rows[1] == {"attempt_id": "a1", "text": "How deep is this lake?", "reason": "kept"}
    assert p.nearest("How deep is this lake?") == (1.0, "a1") and "Draw me a cat." not in p


@pytest.mark.parametrize("wanted", [0, 1, 3, 9])
def test_no_more_is_kept_than_wanted(wanted):
    texts = ["Name a soup.", "Why do cats purr?", "How deep is a lake?", "Tell a joke now.", "What makes bread rise?"]
    reasons = [r["reason"] for r in si.filter_batch(written(*texts), pool(), LIMITS, wanted=wanted)]
    assert reasons == ["kept"] * min(wanted, 5) + ["not_needed"] * max(5 - wanted, 0)


@pytest.mark.parametrize("n_new,shown", [(0, 0), (1, 1), (2, 2), (30, 2)])
def test_seeds_fill_in_for_prompts_not_yet_generated(n_new, shown):
    demos = si.pick_demos([f"seed {i}" for i in range(20)], [f"new {i}" for i in range(n_new)], 6, 2, "k")
    assert len(set(demos)) == 8 and sum(d.startswith("new") for d in demos) == shown


def test_few_seeds_are_shown_once_each():
    assert sorted(si.pick_demos(["a", "b"], [], 6, 2, "k")) == ["a", "b"]


def test_what_was_generated_stands_anywhere_in_the_list():
    seeds = [f"seed {i}" for i in range(20)]
    places = {si.pick_demos(seeds, ["new"], 6, 1, str(k)).index("new") for k in range(50)}
    assert len(places) > 3  # behind the seeds alone, the list would end as the model writes


LIST = SimpleNamespace(
    seed=3, n_seed_demos=2, n_generated_demos=1, max_prompt_tokens=9, prompt_temperature=0.6, prompt_top_p=0.9,
    max_prompt_words=20,
)  # fmt: skip
SEEDS = [f"Seed task {i}." for i in range(9)]


@pytest.fixture
def asked(monkeypatch):
    """Write prompts without a model: (requests, how they were asked) of each call; the last id comes first."""
    calls = []
    monkeypatch.setattr(si.chat, "prompt_ids", lambda tokenizer, messages, prefill: prefill)

    def generate(requests, **how):
        calls.append((dict(requests), how))
        for key, _ in reversed(requests):
            yield [SimpleNamespace(key=f"{key}-0", text=f"text of {key}", ended=True)]

    return SimpleNamespace(tokenizer=None, generate=generate, calls=calls)


def test_a_request_is_a_list_that_goes_on_with_the_next_number(asked):
    assert si.request_ids(None, ["One.", "Two."]) == "1. One.\n2. Two.\n3."


def test_prompts_come_in_the_order_of_their_ids_sampled_as_the_step_says(asked):
    ids = [f"M1-a0000{i}" for i in range(4)]
    found = si.write_prompts(asked, ids, SEEDS, ["Kept."], LIST, (7,))
    assert [(i, s.text) for i, s in found] == [(i, f"text of {i}") for i in ids]
    ((requests, how),) = asked.calls
    assert how == {"max_new_tokens": 9, "temperature": 0.6, "top_p": 0.9, "seed": 3, "stop_ids": (7,)}
    assert all(text.count("Seed task") == 2 and text.count("Kept.") == 1 for text in requests.values())
    assert len({*requests.values()}) > 1
    si.write_prompts(asked, ids, SEEDS, ["Kept."], SimpleNamespace(**vars(LIST) | {"seed": 4}), (7,))
    assert asked.calls[1][0] != requests  # other demonstrations


def test_the_demonstrations_of_an_attempt_are_found_again(asked, monkeypatch):
    monkeypatch.setattr(si, "WAVE", 3)
    rows = [
        {"attempt_id": f"a{i}", "text": f"Text {i}.", "reason": "not_text" if i in (1, 4) else "kept"} for i in range(8)
    ]
    ift = [{"prompt": s} for s in (*SEEDS, "Two\nlines.", "w " * 21)]  # the last two are none to show
    for wave in range(3):
        ids = [r["attempt_id"] for r in rows[3 * wave : 3 * wave + 3]]
        kept = [r["text"] for r in rows[: 3 * wave] if r["reason"] == "kept"]
        si.write_prompts(asked, ids, SEEDS, kept, LIST, ())
    shown = {key: text for requests, _ in asked.calls for key, text in requests.items()}
    for key, text in shown.items():
        assert si.request_ids(None, si.shown_to(key, rows, ift, vars(LIST))) == text


def test_demonstrations_are_limited_in_words():
    assert si.is_demo("w " * 10, 10) and si.is_demo("", 10)


def test_letters_of_a_script_without_spaces_count_as_words_of_a_demonstration():
    assert si.is_demo("请给我建议", 5) and not si.is_demo("请给我建议", 4)
