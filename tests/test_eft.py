import pytest

from srlm_utils import eft, judge
from srlm_utils.errors import ParamError


@pytest.mark.parametrize(
    "ranks,scores,yes",
    [
        ([0, 1, 2], [5, 3, 1], True),
        ([0, 1, 2], [5, 5, 1], True),  # a tie is forgiven
        ([0, 1, 2], [3, 3, 3], False),  # nothing is told apart
        ([0, 1, 2], [5, 1, 3], False),  # one pair reversed
        ([0, 0, 1], [2, 4, 1], True),  # people ranked the first two alike
        ([1, 0, 2], [3, 5, 1], True),  # rows need not be in order of rank
        ([0, 1], [2, 4], False),
        ([0, 0], [5, 1], False),  # people told nothing apart
    ],
)
def test_agrees(ranks, scores, yes):
    assert eft.agrees(ranks, scores) is yes


def ranked(pid="p"):
    replies = [{"reply_id": r, "text": f"reply {r}", "rank": i} for i, r in enumerate("ab")]
    return {"prompt_id": pid, "prompt": "Q?", "replies": replies}


def sampled(pid, a, b):
    def rows(scores):
        return [
            {"text": f"Because.\nScore: {s}", "score": s, "status": "ok" if s is not None else "no_score"}
            for s in scores
        ]

    return [{"id": f"{pid}/a", "samples": rows(a)}, {"id": f"{pid}/b", "samples": rows(b)}]


def test_the_first_try_that_agrees_is_kept():
    kept, drops = eft.accept([ranked()], sampled("p", [1.0, None, 4.0], [3.0, 1.0, 2.0]))
    assert [(r["reply_id"], r["score"], r["justification"]) for r in kept] == [
        ("a", 4, "Because."),
        ("b", 2, "Because."),
    ]
    assert sum(drops.values()) == 0


@pytest.mark.parametrize(
    "ranks,scores,yes",
    [
        ([0, 1, 2], [5, 3, 1], True),
        ([0, 1, 2], [5, 5, 1], False),  # a tie is not forgiven
        ([0, 0, 1], [4, 4, 1], True),
        ([0, 1], [2, 4], False),
    ],
)
def test_agrees_strictly(ranks, scores, yes):
    assert eft.agrees(ranks, scores, "strict") is yes


def test_a_strict_rule_waits_for_a_try_without_ties():
    row = ranked()
    row["replies"].append({"reply_id": "c", "text": "reply c", "rank": 2})
    judged = sampled("p", [4.0, 4.0], [4.0, 3.0]) + [
        {"id": "p/c", "samples": sampled("p", [1.0, 2.0], [])[0]["samples"]}
    ]
    assert [r["score"] for r in eft.accept([row], judged)[0]] == [4, 4, 1]
    assert [r["score"] for r in eft.accept([row], judged, "strict")[0]] == [4, 3, 2]
    half = [
        {"id": i, "samples": [{"text": f"W.\nScore: {s}", "score": s, "status": "ok"}]}
        for i, s in (("p/a", 4.5), ("p/b", 2.5))
    ]
    assert [r["score"] for r in eft.accept([ranked()], half)[0]] == [5, 3]  # halves go up, not to the even neighbour


@pytest.mark.parametrize("rule", ["strict", "no_reversal"])
def test_scores_agree_as_they_are_learned(rule):
    samples = [
        [{"text": f"W.\nScore: {s}", "score": s, "status": "ok"} for s in tries] for tries in ((3.9, 5), (3.6, 4))
    ]
    judged = [{"id": f"p/{i}", "samples": s} for i, s in zip("ab", samples, strict=True)]
    assert [r["score"] for r in eft.accept([ranked()], judged, rule)[0]] == [5, 4]  # both of the first try are a 4


def test_scores_made_of_ranks_are_spaced_evenly_and_have_no_reason():
    row = {"prompt_id": "p", "prompt": "Q?", "replies": []}
    row["replies"] = [{"reply_id": str(i), "text": f"reply {i}", "rank": rank} for i, rank in enumerate([0, 2, 2, 1])]
    rows = eft.from_ranks([row])
    assert [(r["score"], r["justification"]) for r in rows] == [(5, ""), (1, ""), (1, ""), (3, "")]
    assert [r["score"] for r in eft.from_ranks([ranked()])] == [5, 1]
    row["replies"][2]["rank"] = 3  # four places: 5, 3 2/3, 2 1/3 and 1, to the nearest point
    assert [r["score"] for r in eft.from_ranks([row])] == [5, 2, 1, 4]
    alike = ranked()
    for r in alike["replies"]:
        r["rank"] = 0
    assert eft.from_ranks([alike]) == []
    made = eft.training_rows(rows, judge.Rubric("short"), ["score_first"])
    assert [r["response"] for r in made] == ["Score: 5", "Score: 1", "Score: 1", "Score: 3"]
    with pytest.raises(ParamError, match=r"set build_eft.formats to \[score_first\]"):
        eft.training_rows(rows, judge.Rubric("short"), list(judge.FORMATS))
    rows[0]["justification"] = "One of them has a reason."
    with pytest.raises(ParamError, match="justify_first needs a justification of every score"):
        eft.training_rows(rows, judge.Rubric("short"), ["justify_first"])


def test_a_try_without_a_reason_is_no_judgement():
    judged = sampled("p", [4.0], [1.0])
    judged[0]["samples"][0]["text"] = "Score: 4"
    assert eft.accept([ranked()], judged) == ([], {"unparsed": 1, "disagrees": 0})


def test_what_never_agrees_is_counted():
    judged = sampled("p", [1.0], [3.0]) + sampled("q", [None], [3.0])
    kept, drops = eft.accept([ranked("p"), ranked("q")], judged)
    assert kept == [] and drops == {"unparsed": 1, "disagrees": 1}


def test_scored_seeds_pass_through():
    row = ranked()
    assert not eft.has_scores(row)
    for r in row["replies"]:
        r |= {"score": 5 - r["rank"], "justification": "Why."}
    assert eft.has_scores(row)
    assert [r["score"] for r in eft.from_scored([row])] == [5, 4]


def test_a_score_of_zero_is_a_score():
    row = ranked()
    for r in row["replies"]:
        r |= {"score": 0, "justification": "Why."}
    assert eft.has_scores(row)
    row["replies"][1]["justification"] = ""
    assert not eft.has_scores(row)


def test_scores_are_counted_from_0_to_5():
    assert eft.score_counts([{"score": s} for s in (5, 0, 5, 3)]) == {0: 1, 1: 0, 2: 0, 3: 1, 4: 0, 5: 2}


def test_the_most_common_score_is_thinned_out():
    rows = [{"reply_id": f"r{i}", "score": 4 if i < 8 else i - 8} for i in range(11)]  # eight 4s, then 0, 1, 2
    kept, gone = eft.thin_modal_score(rows, 0.4, seed=1)
    counts = eft.score_counts(kept)
    assert counts[4] == 2 and gone == 6  # 2 of 5 is 0.4
    assert kept == eft.thin_modal_score(rows, 0.4, seed=1)[0] != eft.thin_modal_score(rows, 0.4, seed=2)[0]
    assert eft.thin_modal_score(rows, 1.0, seed=1) == (rows, 0)


def test_each_judgement_in_each_format():
    row = {"prompt_id": "p", "reply_id": "a", "rank": 1, "prompt": "Q?", "reply": "A.", "score": 3}
    made = eft.training_rows([row | {"justification": "Fine."}], judge.Rubric("short"), list(judge.FORMATS))
    assert [r["response"] for r in made] == ["Fine.\nScore: 3", "Score: 3"]
    assert len({r["prompt_id"] for r in made}) == 2
    assert all((r["group"], r["rank"]) == ("p", 1) for r in made)


def test_a_format_that_is_named_twice_is_trained_once():
    row = {"prompt_id": "p", "reply_id": "a", "rank": 1, "prompt": "Q?", "reply": "A.", "score": 3}
    made = eft.training_rows([row | {"justification": "Fine."}], judge.Rubric("short"), ["score_first"] * 2)
    assert [r["response"] for r in made] == ["Score: 3"]


def test_a_try_that_is_half_parsed_is_skipped():
    kept, drops = eft.accept([ranked()], sampled("p", [5.0, 4.0, 3.0], [None, 2.0, 1.0]))
    assert [r["score"] for r in kept] == [4, 2] and sum(drops.values()) == 0


def test_some_parsed_but_none_agreeing_counts_as_disagreement():
    assert eft.accept([ranked()], sampled("p", [None, 2.0], [3.0, 2.0])) == ([], {"unparsed": 0, "disagrees": 1})


def test_words_after_the_score_stay_out_of_the_target():
    judged = sampled("p", [4.0], [2.0])
    judged[0]["samples"][0]["text"] = "Because.\nScore: 4\nThat is all."
    kept, _ = eft.accept([ranked()], judged)
    target = judge.target(kept[0]["justification"], kept[0]["score"], "justify_first")
    assert target.count("Score:") == 1


def test_a_scored_seed_row_is_whole():
    reply = {"reply_id": "a", "text": "A.", "rank": 0, "score": 3, "justification": "Fine.", "note": "mine"}
    assert eft.from_scored([{"prompt_id": "p", "prompt": "Q?", "replies": [reply]}]) == [
        {
            "prompt_id": "p",
            "reply_id": "a",
            "rank": 0,
            "prompt": "Q?",
            "reply": "A.",
            "score": 3,
            "justification": "Fine.",
        }
    ]


@pytest.mark.parametrize("share", [0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.9])
@pytest.mark.parametrize("others", [1, 2, 3, 7])
def test_thinning_reaches_the_share_and_drops_no_more_than_it_must(share, others):
    rows = [{"reply_id": f"r{i}", "score": 4 if i < 100 else i % 4} for i in range(100 + others)]
    kept, gone = eft.thin_modal_score(rows, share, seed=1)
    left = sum(r["score"] == 4 for r in kept)
    assert len(kept) + gone == len(rows) and len(kept) - left == others
    assert left / len(kept) <= share + 1e-9 < (left + 1) / (len(kept) + 1)


def test_thinning_leaves_alone_what_is_fine():
    rows = [{"reply_id": f"r{i}", "score": i % 5} for i in range(10)]
    assert eft.thin_modal_score(rows, 0.4, seed=1) == (rows, 0)
    same = [{"reply_id": f"r{i}", "score": 4} for i in range(5)]
    assert eft.thin_modal_score(same, 0.4, seed=1) == (same, 0)  # nothing else to keep


def test_thinning_is_seeded_where_prompts_name_their_replies_alike():
    # reply ids are unique within a row only
    rows = [{"prompt_id": f"p{i}", "reply_id": "a", "score": 4 if i < 8 else i - 8} for i in range(11)]
    picked = {tuple(r["prompt_id"] for r in eft.thin_modal_score(rows, 0.4, seed=s)[0]) for s in range(10)}
    assert len(picked) > 1


def test_training_rows_have_ids_of_their_own():
    rows = [
        {"prompt_id": p, "reply_id": r, "rank": 0, "prompt": "Q?", "reply": "A.", "score": 3, "justification": "Fine."}
        for p in "pq"
        for r in "ab"
    ]
    rubric = judge.Rubric("short")
    made = eft.training_rows(rows, rubric, list(judge.FORMATS))
    assert len({r["prompt_id"] for r in made}) == len(made) == 8  # 2 prompts, 2 replies, 2 formats
    for r in made:
        assert r["prompt"] == rubric.render("Q?", "A.", r["format"])
        assert judge.parse_score(r["response"]) == (3, "ok")


def test_long_replies_are_trained_as_they_are_judged(engine):
    long = {"prompt_id": "p", "reply_id": "a", "rank": 0, "prompt": "Q?", "score": 5, "justification": "W."}
    long["reply"] = "one two three four " * 30
    short = long | {"reply_id": "b", "rank": 1, "score": 1, "reply": "no"}
    fitted, n = eft.fit_replies([long, short], lambda: engine.tokenizer, 20)
    assert n == 1 and fitted[1] == short
    assert fitted[0]["reply"] == judge.fit(engine.tokenizer, long["reply"], 20) != long["reply"]
    assert eft.fit_replies([short], None, 20) == ([short], 0)  # no tokenizer is loaded for short ones
    assert (
        eft.fit_replies([short | {"reply": "語" * 15}], lambda: engine.tokenizer, 20)[1] == 1
    )  # more tokens than letters
