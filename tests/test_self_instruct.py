import random
from types import SimpleNamespace

import pytest

from srlm_utils import self_instruct as si


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
        ("word " * 30, True, "too_long"),
        ("<<<< what is this thing here", True, "not_text"),
        ("Опишите восход солнца над морем", True, "not_text"),
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
