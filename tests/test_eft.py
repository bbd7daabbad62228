import pytest

from srlm_utils import eft, judge


@pytest.mark.parametrize(
    "ranks,scores,yes",
    [
        ([0, 1, 2], [5, 3, 1], True),
        ([0, 1, 2], [5, 5, 1], True),  # a tie is forgiven
        ([0, 1, 2], [3, 3, 3], False),  # nothing is told apart
        ([0, 1, 2], [5, 1, 3], False),  # one pair reversed
        ([0, 0, 1], [2, 4, 1], True),  # people ranked the first two alike
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


def test_what_never_agrees_is_counted():
    judged = sampled("p", [1.0], [3.0]) + sampled("q", [None], [3.0])
    kept, drops = eft.accept([ranked("p"), ranked("q")], judged)
    assert kept == [] and drops == {"unparsed": 1, "disagrees": 1}


def test_scored_seeds_pass_through():
    row = ranked()
    assert not eft.has_scores([row])
    for r in row["replies"]:
        r |= {"score": 5 - r["rank"], "justification": "Why."}
    assert eft.has_scores([row])
    assert [r["score"] for r in eft.from_scored([row])] == [5, 4]


def test_the_most_common_score_is_thinned_out():
    rows = [{"reply_id": f"r{i}", "score": 4 if i < 8 else i - 8} for i in range(11)]  # eight 4s, then 0, 1, 2
    kept, gone = eft.thin_modal_score(rows, 0.4, seed=1)
    counts = eft.score_counts(kept)
    assert counts[4] == 2 and gone == 6  # 2 of 5 is 0.4
    assert kept == eft.thin_modal_score(rows, 0.4, seed=1)[0] != eft.thin_modal_score(rows, 0.4, seed=2)[0]
    assert eft.thin_modal_score(rows, 1.0, seed=1) == (rows, 0)


def test_each_judgement_in_each_format():
    rows = [{"prompt_id": "p", "reply_id": "a", "prompt": "Q?", "reply": "A.", "score": 3, "justification": "Fine."}]
    made = eft.training_rows(rows, judge.Rubric("short"), ["justify_first", "score_first", "score_first"])
    assert [r["response"] for r in made] == ["Fine.\nScore: 3", "Score: 3", "Score: 3"]
    assert len({r["prompt_id"] for r in made}) == 3
