"""Open Assistant trees and preference sets become ranked rows; what is left out is counted."""

import gzip
import json
import math
import random
import tracemalloc
from collections import Counter

import pytest

from srlm_utils import seeds, sources
from srlm_utils.errors import DataError, MissingInputError, ParamError
from srlm_utils.params import SeedData
from srlm_utils.paths import is_hub_id
from srlm_utils.plan import external_inputs
from srlm_utils.rows import RankedRow


def message(text, role="assistant", rank=None, replies=(), **kw):
    base = {"message_id": f"id-{text}", "text": text, "role": role, "lang": "en", "deleted": False}
    return base | {"review_result": True, "rank": rank, "replies": list(replies)} | kw


def tree(prompt, *replies, state="ready_for_export", **kw):
    root = message(prompt, "prompter", replies=replies, **kw)
    return {"message_tree_id": root["message_id"], "tree_state": state, "prompt": root}


FURTHER = message("And red?", "prompter", replies=[message("Warm.", rank=0), message("Hot!", rank=1)])
TREES = [
    tree("Name a colour.", message("Red?", rank=2), message("Blue.", rank=0, replies=[FURTHER]), message("No", rank=1)),
    tree("Say hi.", message("gone", rank=0, deleted=True), message("Hi.", rank=1), message("Ho.", rank=3)),
    tree("Why?", message("Because.", rank=0), message("unread", rank=1, review_result=None)),
    tree("How?", message("So.", rank=None), message("bad", rank=0, review_result=False)),
    tree("Warum?", message("Darum.", rank=0, lang="de"), lang="de"),
    tree("Unfinished?", message("Yes.", rank=0), state="growing"),
    tree("Deleted?", message("Yes.", rank=0), deleted=True),
]


def save(path, records):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(r) + "\n" for r in records)
    return str(path)


def flat(node, tree_id, parent=None):
    own = {k: v for k, v in node.items() if k != "replies"} | {"parent_id": parent, "message_tree_id": tree_id}
    yield own
    for reply in node["replies"]:
        yield from flat(reply, tree_id, node["message_id"])


def texts(row):
    return [(r["text"], r["rank"]) for r in row["replies"]]


@pytest.mark.parametrize("form", ["trees.jsonl", "trees.jsonl.gz", "messages.jsonl"])
def test_open_assistant_first_turns(tmp_path, form):
    records = TREES
    if form == "messages.jsonl":
        records = [m | {"tree_state": t["tree_state"]} for t in TREES for m in flat(t["prompt"], t["message_tree_id"])]
    drops = Counter()
    rows = list(sources.conversations(save(tmp_path / form, records), drops))
    assert [(r["prompt"], texts(r)) for r in rows] == [
        ("Name a colour.", [("Blue.", 0), ("No", 1), ("Red?", 2)]),
        ("Say hi.", [("Hi.", 0), ("Ho.", 1)]),  # what is left is ranked anew, without gaps
        ("Why?", [("Because.", 0)]),
    ]
    assert drops == {
        "reply deleted": 1,
        "reply not reviewed, or rejected": 2,
        "reply not ranked": 1,
        "prompt without a usable reply": 1,
        "prompt not in en": 1,
        "prompt deleted": 1,
        "tree not finished": 1,
    }
    ranked = list(sources.ranked(rows, drops))
    assert [r["prompt"] for r in ranked] == ["Name a colour.", "Say hi."]
    assert drops["one reply, or all ranked alike"] == 1
    for row in ranked:
        RankedRow.model_validate(row)
    assert sources.best(rows[0])["response"] == "Blue."


def test_later_turns_and_other_languages_on_request(tmp_path):
    path = save(tmp_path / "t.jsonl", TREES)
    later = [r for r in sources.conversations(path, Counter(), all_turns=True) if "And red?" in r["prompt"]]
    assert [r["prompt"] for r in later] == ["User: Name a colour.\n\nAssistant: Blue.\n\nUser: And red?"]
    assert texts(later[0]) == [("Warm.", 0), ("Hot!", 1)]
    assert "Warum?" in [r["prompt"] for r in sources.conversations(path, Counter(), language="")]


PREFERENCES = {
    "texts": ({"prompt": "Hi?", "chosen": "Hello.", "rejected": "No."}, ["Hello.", "No."]),
    "messages": (
        {
            "prompt": "Hi?",
            "chosen": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}],
            "rejected": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "No."}],
        },
        ["Hello.", "No."],
    ),
    "dialogues": (
        {"chosen": "\n\nHuman: Hi?\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi?\n\nAssistant: No."},
        ["Hello.", "No."],
    ),
    "scored": (
        {
            "instruction": "Hi?",
            "completions": [
                {"model": "a", "response": "No.", "overall_score": 2.0},
                {"model": "b", "response": "Hello.", "overall_score": 8.5},
                {"model": "c", "response": "Nay.", "overall_score": 2.0},
                {"model": "d", "response": "Lost.", "overall_score": None},
            ],
        },
        ["Hello.", "No.", "Nay."],
    ),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_preference_sets(tmp_path, name):
    record, replies = PREFERENCES[name]
    drops = Counter()
    rows = list(sources.ranked(sources.conversations(save(tmp_path / "p.jsonl", [record]), drops), drops))
    assert [r["prompt"] for r in rows] == ["Hi?"]
    assert [r["text"] for r in rows[0]["replies"]] == replies
    assert [r["rank"] for r in rows[0]["replies"]] == [0, 1, 1][: len(replies)]
    assert sum(drops.values()) == (name == "scored")


def test_pairs_that_cannot_be_used_are_counted(tmp_path):
    several = "\n\nHuman: Hi?\n\nAssistant: Yes?\n\nHuman: Go.\n\nAssistant: "
    bad = [
        {"chosen": several + "A.", "rejected": several + "B."},
        {"prompt": "Hi?", "chosen": "Same.", "rejected": "Same."},
        {"chosen": "\n\nHuman: One?\n\nAssistant: A.", "rejected": "\n\nHuman: Two?\n\nAssistant: B."},
        {"question": "Hi?", "chosen": "A.", "rejected": "B."},
    ]
    drops = Counter()
    assert not list(sources.conversations(save(tmp_path / "p.jsonl", bad), drops))
    assert drops == {
        "several turns": 1,
        "blank, or the same reply twice": 1,
        "two prompts in a pair": 1,
        "no prompt": 1,
    }


def test_bad_sources_are_named(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl").write_text('{"message_tree_id": "a", "prompt": {}}\n{"message_tree_id": \n')
    (tmp_path / "other.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"chosen": "a"}\n' * 9)[:-9])
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(DataError, match="no records"):
        sources.kind_of(str(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match="broken.jsonl:2: not valid JSON"):
        list(sources.records(str(tmp_path / "broken.jsonl")))
    with pytest.raises(DataError, match="has the fields question, answer; expected kit rows"):
        sources.kind_of(str(tmp_path / "other.jsonl"))
    with pytest.raises(DataError, match="cut.jsonl.gz:9: cannot be read"):
        list(sources.records(str(tmp_path / "cut.jsonl.gz")))
    with pytest.raises(DataError, match="latin.jsonl:1: not UTF-8"):
        list(sources.records(str(tmp_path / "latin.jsonl")))
    with pytest.raises(MissingInputError, match="no such file"):
        list(sources.records(str(tmp_path / "none.jsonl")))


def test_a_hub_data_set_is_streamed(monkeypatch):
    import datasets

    asked = []

    def load(name, **kw):
        asked.append((name, kw))
        return datasets.Dataset.from_list([PREFERENCES["texts"][0]]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(sources.conversations("some-owner/some.set:test", Counter()))
    assert rows[0]["prompt"] == "Hi?"
    assert asked[-1] == ("some-owner/some.set", {"split": "test", "streaming": True})

    def offline(name, **kw):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(MissingInputError, match="some-owner/set: could not be read from the hub"):
        sources.kind_of("some-owner/set")
    assert is_hub_id("some-owner/set") and not is_hub_id("ift") and not is_hub_id("data/rows.jsonl.gz")
    assert list(external_inputs({"ift_file": "some-owner/set"})) == []


def test_a_reply_without_a_finite_score_or_rank_is_dropped(monkeypatch):
    """Which JSON cannot hold, and rows of the hub can."""
    import datasets

    def ranked(record):
        rows = datasets.Dataset.from_list([record]).to_iterable_dataset()
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
        drops = Counter()
        (row,) = sources.conversations("owner/set", drops)
        assert {r["rank"] for r in row["replies"]} == {0, 1}
        return [r["text"] for r in row["replies"]], drops

    values = {"NaN": math.nan, "low": 2.0, "inf": math.inf, "high": 3.0, "-inf": -math.inf}
    scored = [{"model": "m", "response": text, "overall_score": v} for text, v in values.items()]
    found = ranked({"instruction": "Hi?", "completions": scored})
    assert found == (["high", "low"], {"reply without text or score": 3})
    found = ranked(tree("Why?", *(message(text, rank=v) for text, v in values.items())))
    assert found == (["low", "high"], {"reply not ranked": 3})


def test_made_ids_tell_sources_and_pairs_of_one_prompt_apart(tmp_path):
    pair = PREFERENCES["texts"][0]
    paths = [
        save(tmp_path / f"{n}.jsonl", [pair | {"prompt": f"{n} {i} is a number?"} for i in range(3)] + [pair] * k)
        for n, k in (("train", 2), ("eval", 0))
    ]
    p = SeedData(run_dir="x", ranked_train_files=paths[:1], ranked_eval_files=paths[1:])
    rows, _ = seeds.load_seeds(p.model_dump())
    ids = [r["prompt_id"] for name in ("ranked_train", "ranked_eval") for r in rows[name]]
    assert len(set(ids)) == len(ids) == 8
    assert ids[4] == f"{ids[3]}-2"  # the same prompt a second time
    given = save(tmp_path / "given.jsonl", [pair | {"id": 7}, pair | {"id": 7}])
    assert [r["prompt_id"] for r in sources.conversations(given, Counter())] == ["7", "7-2"]


def test_messages_of_a_tree_must_stand_together(tmp_path):
    messages = [m for t in TREES[:2] for m in flat(t["prompt"], t["message_tree_id"])]
    path = save(tmp_path / "m.jsonl", messages[1:] + messages[:1])
    with pytest.raises(DataError, match="do not follow each other"):
        list(sources.conversations(path, Counter()))


def test_kit_rows_from_anywhere(tmp_path, monkeypatch):
    """Packed, from the hub, and ranked ones that serve as answers too."""
    import datasets

    row = {"replies": [{"reply_id": "a", "text": "No.", "rank": 1}, {"reply_id": "b", "text": "Yes.", "rank": 0}]}
    kit = [{"prompt_id": f"p{i}", "prompt": f"{i} unlike any other prompt {i * i}?"} | row for i in range(40)]
    path = save(tmp_path / "kit.jsonl.gz", kit)
    p = SeedData(run_dir="x", ift_file=path, ranked_train_files=[path], ranked_eval_files=[path])
    rows, _ = seeds.load_seeds(p.model_dump())
    assert {r["response"] for r in rows["ift"]} == {"Yes."}
    assert sum(len(rows[name]) for name in ("ift", "ranked_train", "ranked_eval")) == 40
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_list(kit).to_iterable_dataset())
    hub, _ = seeds.load_seeds(SeedData(run_dir="x", ranked_eval_files=["me/kit"]).model_dump())
    assert len(hub["ranked_eval"]) == 40 and hub["ranked_eval"][0]["set"] == "kit"
    with pytest.raises(DataError, match="ift: holds answers"):
        seeds.load_seeds(SeedData(run_dir="x", ranked_train_files=["ift"]).model_dump())


def many(n, seed=0):
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(2000)]
    for i in range(n):
        prompt = " ".join(rng.choices(words, k=8))
        replies = [message(f"{i} {k} reply", rank=k) for k in range(1 if i % 5 == 0 else 3)]
        yield tree(f"{i} {prompt}", *replies)


def test_one_source_is_divided_by_prompt(tmp_path):
    path = save(tmp_path / "oa.jsonl", many(400))
    p = SeedData(run_dir="x", ift_file=path, ranked_train_files=[path, "ranked_train"], ranked_eval_files=[path])
    rows, drops = seeds.load_seeds(p.model_dump())
    assert not drops[path]
    three = ("ift", "ranked_train", "ranked_eval")
    ids = {name: {r["prompt_id"] for r in rows[name] if r.get("set") != "ranked_train"} for name in three}
    assert not ids["ift"] & ids["ranked_train"] and not (ids["ift"] | ids["ranked_train"]) & ids["ranked_eval"]
    assert sum(map(len, ids.values())) == 400
    assert 60 < len(ids["ranked_eval"]) < 100 and 90 < len(ids["ranked_train"]) < 150  # a quarter, half of the rest
    assert {r["set"] for r in rows["ranked_train"]} == {"oa", "ranked_train"}
    again, _ = seeds.load_seeds(p.model_dump())
    assert again == rows
    other, _ = seeds.load_seeds(p.model_dump() | {"seed": 1})
    assert other == rows  # no seed's exam is taught with another
    few, _ = seeds.load_seeds(p.model_dump() | {"n_ift": 7, "n_ranked_eval": 3})
    assert few["ift"] == rows["ift"][:7] and few["ranked_eval"] == rows["ranked_eval"][:3]


def test_what_people_ranked_second_is_no_answer_to_learn(tmp_path):
    whole = [tree(f"{i} is what?", *(message(f"{i} {k}", rank=k) for k in range(3))) for i in range(4)]
    headless = tree("Whose head?", message("best", rank=0, deleted=True), *(message(f"no {k}", rank=k) for k in (1, 2)))
    path = save(tmp_path / "oa.jsonl", [headless, *whole])
    rows, drops = seeds.load_seeds(SeedData(run_dir="x", ift_file=path).model_dump())
    assert [r["response"] for r in rows["ift"]] == [f"{i} 0" for i in range(4)]
    assert drops[path] == {"reply deleted": 1, "the reply ranked best is not usable": 1}
    rows, drops = seeds.load_seeds(SeedData(run_dir="x", ranked_eval_files=[path]).model_dump())
    assert texts(rows["ranked_eval"][0]) == [("no 1", 0), ("no 2", 1)]  # still in order
    assert "best_is_gone" not in rows["ranked_eval"][0] and drops[path] == {"reply deleted": 1}


def test_what_is_left_out_is_counted_once(tmp_path):
    path = save(tmp_path / "oa.jsonl", [*TREES, *many(60)])
    p = SeedData(run_dir="x", ift_file=path, ranked_train_files=[path], ranked_eval_files=[path])
    assert seeds.load_seeds(p.model_dump())[1][path]["prompt deleted"] == 1


def test_a_set_that_is_all_leaks_is_an_error():
    rows, _ = seeds.load_seeds(SeedData(run_dir="x", n_ift=3).model_dump())
    with pytest.raises(DataError, match="ift: every prompt also stands"):
        seeds.drop_leaks(rows | {"ift": [r | {"response": "x"} for r in rows["test_prompts"][:3]]}, 0.7)


def test_memory_is_that_of_the_rows_kept(tmp_path):
    def peak(n):
        path = save(tmp_path / f"{n}.jsonl.gz", many(n))
        p = SeedData(run_dir="x", ift_file=path, ranked_train_files=[path], ranked_eval_files=[path])
        limits = {"n_ift": 5, "n_ranked_train": 5, "n_ranked_eval": 5, "n_test": 1, "n_valid": 1, "eval_share": 0.001}
        tracemalloc.start()
        seeds.load_seeds(p.model_dump() | limits | {"n_ranked_eval": 0})  # read to its end
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    small, large = peak(1500), peak(6000)
    assert large < 1.5 * small


def test_two_sources_of_one_name_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    paths = [save(tmp_path / "t.jsonl", TREES), save(tmp_path / "a" / "t.jsonl", TREES)]
    with pytest.raises(ParamError, match="two sources are called t"):
        seeds.load_seeds(SeedData(run_dir="x", ranked_train_files=paths).model_dump())


def test_nothing_left_says_why(tmp_path):
    path = save(tmp_path / "t.jsonl", [TREES[4]])
    with pytest.raises(DataError, match="ranked_eval: no rows are left of .*1 x prompt not in en"):
        seeds.load_seeds(SeedData(run_dir="x", ranked_eval_files=[path]).model_dump())
