"""Judging through an endpoint that fails in all the ways that endpoints do."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from srlm_utils import api as api_module
from srlm_utils import chat, evaluate, mt_bench, retry
from srlm_utils.api import Api, compare, p_first, parse_choice, parse_rating
from srlm_utils.errors import DataError, ModelError, ParamError
from srlm_utils.metrics import outcomes
from tests.endpoints import SECRET, completion

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = {f"p{i}": f"Question {i}?" for i in range(12)}
OURS = {pid: f"{pid} right" for pid in PROMPTS}
THEIRS = {pid: f"{pid} wrong" for pid in PROMPTS}


def right_is_first(body):
    """A judge that likes the answer with the word "right"."""
    prompt = body["messages"][0]["content"]
    return completion("A" if "right" in prompt.split("<answer_B>")[0] else "B")


def ask_all(api, n=1, **kw):
    requests = [(f"k{i}", chat.user(f"Say {i}")) for i in range(n)]
    return dict(api.ask(requests, max_tokens=8, **kw))


def verdict_rows(api):
    return sorted((v for rows in compare(api, PROMPTS, OURS, THEIRS) for v in rows), key=lambda v: list(v.values()))


FAULTS = [
    (429, {}, "slow down"),
    (429, {"Retry-After": "0.1"}, "slow down"),
    (500, {}, "oops"),
    (503, {"Retry-After": format_datetime(datetime.now(UTC))}, "busy"),
    "hang",
    "cut",
    "cut body",
    "garbage",
    {"choices": []},  # as some proxies report their errors
    {"error": {"message": "upstream failed"}, "choices": None},
]


def test_every_fault_is_outlived_and_no_verdict_is_paid_for_twice(endpoint):
    kinds = {}

    def script(body, nth):
        fault = kinds.setdefault(json.dumps(body), len(kinds)) % len(FAULTS)
        return FAULTS[fault] if nth == 1 else FAULTS[(fault + 1) % len(FAULTS)] if nth == 2 else right_is_first(body)

    server = endpoint(script)
    api = Api("judge", server.url, parallel=5, timeout_s=0.5)
    rows = verdict_rows(api)
    assert rows == sorted(
        (
            {"prompt_id": pid, "order": order, "p_first": p}
            for pid in PROMPTS
            for order, p in (("AB", 1.0), ("BA", 0.0))
        ),
        key=lambda v: list(v.values()),
    )
    assert set(server.tried.values()) == {3} and len(server.tried) == 24
    assert 2 <= server.peak <= 5
    assert verdict_rows(Api("judge", server.url)) == rows  # out of the cache
    assert sum(server.tried.values()) == 72


def test_retry_after_is_waited_for(endpoint):
    server = endpoint(lambda body, nth: (429, {"Retry-After": "1"}, "") if nth == 1 else completion("A"))
    ask_all(Api("judge", server.url))
    assert server.times[1] - server.times[0] >= 1
    soon = datetime.now(UTC) + timedelta(seconds=30)
    assert 28 < api_module._retry_after({"retry-after": format_datetime(soon, usegmt=True)}) <= 30
    assert [api_module._retry_after({"retry-after": v}) for v in ("", "later", "-3", "nan")] == [0] * 4
    server = endpoint(lambda body, nth: (429, {"Retry-After": "7200"}, "daily limit"))
    with pytest.raises(ModelError, match=r"429 \(daily limit\); it asks to wait 2 h"):
        ask_all(Api("judge", server.url))
    assert len(server.times) == 1


def test_retries_end_and_the_answers_are_safe(endpoint, monkeypatch):
    monkeypatch.setattr(retry, "RETRIES", 2)
    server = endpoint(
        lambda body, nth: (500, {}, "broken") if body["messages"][0]["content"] == "Say 4" else right_is_first(body)
    )
    with pytest.raises(
        ModelError, match=r"request 'k4' for judge: 500 \(broken\)\. 4 of 6 answers are safe in .*again"
    ):
        ask_all(Api("judge", server.url, parallel=1), 6)
    assert sorted(server.tried.values()) == [1, 1, 1, 1, 3]  # the sixth was not begun
    server.script = lambda body, nth: right_is_first(body)
    assert len(ask_all(Api("judge", server.url), 6)) == 6
    assert set(server.answered.values()) == {1}


@pytest.mark.parametrize(
    "status,says",
    [
        (401, r"answers 401: it does not accept the key\. Set the variable OPENAI_API_KEY"),
        (404, r"answers 404 \(no such model\)\. Check base_url and the model's name, 'judge'"),
        (400, r"refuses request 'k\d' for judge: 400 \(no such model\)"),
    ],
)
def test_a_refusal_ends_at_once(endpoint, status, says):
    server = endpoint(lambda body, nth: (status, {}, "no such model"))
    with pytest.raises(ModelError, match=says + r"\. .*0 of 40 answers are safe" if status != 401 else says):
        ask_all(Api("judge", server.url, parallel=4), 40)
    assert len(server.times) <= 4 and max(server.tried.values()) == 1


def test_no_server_is_an_error_that_says_so(endpoint, monkeypatch):
    monkeypatch.setattr(retry, "RETRIES", 1)
    with pytest.raises(ModelError, match="http://127.0.0.1:9/v1 did not answer request 'k0' .*no connection"):
        ask_all(Api("judge", "http://127.0.0.1:9/v1"))


RUN = """
import sys
from srlm_utils.api import Api
url, first, n, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
requests = [(str(i), [{"role": "user", "content": f"Say {i}"}]) for i in range(first, first + n)]
for key, reply in Api("judge", url, parallel=4, cache=folder).ask(requests, max_tokens=8):
    print(key, reply["text"] == sys.argv[5], flush=True)
"""


def start(url, first, n, folder, text):
    """A process that prints of each key whether its reply is `text`."""
    args = [sys.executable, "-c", RUN, url, str(first), str(n), str(folder), text]
    return subprocess.Popen(args, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_killed_run_goes_on_where_it_was(endpoint, tmp_path):
    text, n = "é\u2028" * 3000, 120

    def script(body, nth):
        time.sleep(0.02)
        return completion(text)

    server = endpoint(script)
    for i in range(2):
        run = start(server.url, 0, n, tmp_path / "answers", text)
        while server.n_answered < 30 * (i + 1):
            time.sleep(0.003)
        os.kill(run.pid, signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        while server.busy:  # with what was under way
            time.sleep(0.01)
        (path,) = (tmp_path / "answers").glob("*.jsonl")
        kept = path.read_bytes().count(b"\n")
        assert server.n_answered - kept <= 4 * (i + 1)  # what the killed runs had asked and not heard
    before = server.n_answered
    out, _ = start(server.url, 0, n, tmp_path / "answers", text).communicate(timeout=60)
    assert sorted(line for line in out.split("\n") if line.endswith(" True")) == sorted(f"{i} True" for i in range(n))
    assert server.n_answered - before == n - kept
    assert len({json.loads(line)["id"] for line in path.read_bytes().split(b"\n") if line}) == n


def test_two_processes_share_a_cache(endpoint, tmp_path):
    text = "x" * 20_000
    server = endpoint(lambda body, nth: completion(text))
    runs = [start(server.url, first, 60, tmp_path, text) for first in (0, 60)]
    assert [run.communicate(timeout=60) and run.returncode for run in runs] == [0, 0]
    out, _ = start(server.url, 0, 120, tmp_path, text).communicate(timeout=60)
    assert out.count(" True") == 120 and set(server.answered.values()) == {1}


def test_a_torn_line_of_another_process_is_dropped(tmp_path):
    answers = api_module._Answers(tmp_path / "a.jsonl")
    answers.add("1", {"text": "one"})
    with open(tmp_path / "a.jsonl", "ab") as f:
        f.write(b'{"id": "2", "rep')
    answers.add("3", {"text": "three"})
    assert api_module._Answers(tmp_path / "a.jsonl").replies == {"1": {"text": "one"}, "3": {"text": "three"}}


def test_the_key_is_sent_and_is_nowhere_else(endpoint, tmp_path, capsys, caplog):
    caplog.set_level(logging.DEBUG)
    monkey_text = completion(f"You sent {SECRET} and \ud800", {SECRET: 0.9})
    server = endpoint(lambda body, nth: monkey_text)
    reply = ask_all(Api("judge", server.url), logprobs=5)["k0"]
    assert reply["text"] == "You sent [key] and ?" and list(reply["top"]) == ["[key]"]
    for status in (400, 401, 403, 404):
        before = " " * (300 - len(SECRET) // 2)  # a long message is cut, here in the middle of the key
        for words in ("Incorrect API key provided:", before):
            server.script = lambda body, nth, status=status, words=words: (status, {}, f"{words}{SECRET}")
            try:
                ask_all(Api(f"judge{status}{len(words)}", server.url))
            except ModelError:
                assert SECRET[: len(SECRET) // 3] not in traceback.format_exc()
    assert set(server.keys) == {f"Bearer {SECRET}"}
    printed = capsys.readouterr()
    assert SECRET not in printed.out + printed.err + caplog.text
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert any(p.suffix == ".jsonl" and p.stat().st_size for p in files)
    assert not any(SECRET.encode() in p.read_bytes() for p in files)


def test_where_the_key_comes_from(endpoint, monkeypatch):
    server = endpoint(lambda body, nth: completion("A"))
    monkeypatch.setenv("OPENAI_API_KEY", "bad\u201dkey-of-some-length")
    with pytest.raises(ParamError, match="OPENAI_API_KEY holds a blank or a character that no key has") as e:
        ask_all(Api("judge", server.url))
    assert "key-of" not in "".join(traceback.format_exception(e.value))
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ParamError, match="the variable OPENAI_API_KEY is not set"):
        ask_all(Api("judge"))
    assert ask_all(Api("judge", server.url))["k0"]["text"] == "A"  # a local server needs none
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    assert ask_all(Api("judge"))["k0"]["text"] == "A"  # the same endpoint and model: kept answers need no key
    assert len(server.times) == 1


def test_a_limit_is_checked_before_the_first_call(endpoint):
    server = endpoint(lambda body, nth: completion("A"))
    api = Api("judge", server.url, limit=10)
    with pytest.raises(ParamError, match="limit is 10, but 24 calls to judge are needed"):
        verdict_rows(api)
    assert not server.times
    ask_all(api, 8)
    assert len(ask_all(api, 10)) == 10  # eight of them are kept
    with pytest.raises(ParamError, match="limit is 10, but 1 calls to judge are needed beside the 10 made before"):
        ask_all(api, 11)
    assert len(server.times) == 10


def test_the_estimate_comes_before_the_calls(endpoint, capsys):
    seen = []
    server = endpoint(lambda body, nth: seen.append(capsys.readouterr().out) or completion("A"))
    api = Api("judge", server.url, parallel=2, price_in=2, price_out=10)
    requests = [(str(i), chat.user("x" * 400 + str(i))) for i in range(10)]
    list(api.ask(requests, max_tokens=50))
    assert "10 calls for 10 requests, about 1,003 tokens in and at most 500 out" in seen[0]
    assert "about 10 s (2 at once, if a call takes 2 s), about 0.01 at the given prices at most" in seen[0]
    assert "2 of 10 calls timed, about" in "".join(seen) + capsys.readouterr().out
    api.price_in = api.price_out = 0
    seen.clear()
    list(api.ask(requests + [("new", chat.user("y" * 8))], max_tokens=50))
    assert "1 calls for 11 requests, about 2 tokens in and at most 50 out, about 0 s" in seen[0]
    assert "s a call so far)" in seen[0] and "at the given prices" not in seen[0]


def test_identical_requests_are_asked_once(endpoint):
    server = endpoint(lambda body, nth: completion("A"))
    rows = [v for r in compare(Api("judge", server.url), {"p": "?"}, {"p": "same"}, {"p": "same"}) for v in r]
    assert sorted(v["order"] for v in rows) == ["AB", "BA"] and len(server.times) == 1


def test_letters_are_read_from_logprobs(endpoint):
    top = {"A": 0.5, " A": 0.1, "B": 0.2, "a": 0.1, "**": 0.1}
    server = endpoint(lambda body, nth: completion("B", top))
    (row,) = next(compare(Api("judge", server.url), {"p": "?"}, {"p": "x"}, {"p": "y"}))
    assert row == {"prompt_id": "p", "order": row["order"], "p_first": 0.75}
    assert server.bodies[0]["logprobs"] is True and server.bodies[0]["top_logprobs"] == 5
    assert server.bodies[0]["temperature"] == 0 and server.bodies[0]["max_tokens"] == 1024
    # a first token that is no letter: what it gives the letters is noise, the text says it
    assert p_first({"text": "**B**", "top": {"**": -0.01, "A": -5.0, "B": -9.0}}) == 0


def test_refused_parameters_are_left_out(endpoint, capsys):
    def script(body, nth):
        for name in ("logprobs", "temperature", "max_tokens"):
            if name in body:
                instead = " Use 'max_completion_tokens' instead." if name == "max_tokens" else ""
                return 400, {}, f"Unsupported parameter: '{name}'.{instead}"
        return right_is_first(body)

    server = endpoint(script)
    rows = verdict_rows(Api("judge", server.url, parallel=1))
    assert len(rows) == 24 and {v["p_first"] for v in rows} == {0.0, 1.0}
    assert len(server.times) == 24 + 3 and max(server.tried.values()) == 1
    assert set(server.bodies[-1]) == {"model", "messages", "max_completion_tokens"}
    assert "the endpoint refuses logprobs, top_logprobs; asked without" in capsys.readouterr().out
    assert verdict_rows(Api("judge", server.url)) == rows and len(server.times) == 27


def test_nonsense_is_no_verdict_and_is_counted(endpoint, capsys):
    def script(body, nth):
        return completion("Both are fine." if "Question 1?" in body["messages"][0]["content"] else "A")

    server = endpoint(script)
    rows = verdict_rows(Api("judge", server.url))
    assert [v["prompt_id"] for v in rows if v.get("unread") is True] == ["p1", "p1"]
    assert outcomes(rows) == {pid: 0.5 for pid in PROMPTS if pid != "p1"}  # A in both orders
    assert "judge: replies to 1 of 12 prompts name neither A nor B\n" in capsys.readouterr().out


def test_a_judge_that_mostly_says_nothing_is_an_error():
    ours, theirs = ([{"prompt_id": p, "prompt": "Q?", "text": text} for p in PROMPTS] for text in ("a", "b"))
    step = SimpleNamespace(model_revision=lambda name: name)

    def decide(n_unread):
        rows = [{"prompt_id": p, "order": o, "p_first": 0.5} for p in PROMPTS for o in ("AB", "BA")]
        said = [row | {"unread": True} for row in rows[: 2 * n_unread]] + rows[2 * n_unread :]
        return evaluate.compare_answers(step, "judge", "api", "M1", ours, "M0", theirs, compare=lambda *a: [said])

    assert len(outcomes(decide(6))) == 6
    with pytest.raises(DataError, match="judge: what it says of 7 of 12 prompts is no verdict. Take another"):
        decide(7)


@pytest.mark.parametrize(
    "text,letter",
    [
        ("A", "A"),
        (" b ", None),
        ("**B**", "B"),
        ("Answer: A", "A"),
        ("[[B]]", "B"),
        ("The better answer is **A**.", "A"),
        ("Answer A is short.\nAnswer B\nFinal verdict: A\n", "A"),
        ("B\n\nAnswer A repeats itself.", "B"),
        ("The worse answer is B", None),
        ("It is not A", None),
        ("A or B", None),
        ("A/B", None),
        ("A better answer", None),
        ("ABBA", None),
        ("Grade A\nnothing", None),
        ("***\n", None),
        ("", None),
    ],
)
def test_a_choice_is_the_replys_own_letter(text, letter):
    assert parse_choice(text) == letter


@pytest.mark.parametrize(
    "text,score",
    [
        ("Good.\nRating: [[7]]", 7),
        ("like [[5]] here; [[ 8.5 ]]", 8.5),
        ("[[9/10]]", 9),
        ("[[11]]", None),
        ("[[0]]", None),
        ("[[-3]]", None),
        ("[[rating]]", None),
        ("[7]", None),
        ("[[" + "9" * 50_000, None),
    ],
)
def test_a_rating_is_in_double_brackets(text, score):
    assert parse_rating(text) == score


def test_mt_bench_ratings_are_the_judges_last_word(endpoint):
    replies = {True: "Fair. [[2]] Rating: [[7]]", False: "no rating"}
    server = endpoint(lambda body, nth: completion(replies["number two" in body["messages"][-1]["content"]]))
    q = {"question_id": 81, "category": "writing", "turns": ["the first", "number two"]}
    rated = mt_bench.ratings(Api("judge", server.url), [q], {mt_bench.key(q, t): "an answer" for t in (1, 2)})
    assert rated == {mt_bench.key(q, 1): None, mt_bench.key(q, 2): 7.0}
    assert "logprobs" not in server.bodies[0]


def test_it_works_in_a_running_event_loop_and_stops_when_the_reader_does(endpoint):
    server = endpoint(lambda body, nth: completion("A"))

    async def cell():
        return verdict_rows(Api("judge", server.url))

    assert len(asyncio.run(cell())) == 24
    asked = len(server.times)
    for _ in Api("other", server.url, parallel=2).ask([(str(i), chat.user(str(i))) for i in range(50)], max_tokens=8):
        break
    n = len(server.times) - asked
    time.sleep(0.1)
    assert len(server.times) - asked == n < 10 and not [t for t in threading.enumerate() if t.name.startswith("api")]


@pytest.mark.parametrize(
    "kw,says",
    [
        ({"model": ""}, "model is empty"),
        ({"base_url": "localhost:8000"}, "is no address; expected one like"),
        ({"base_url": "http://u:s3cret@h/v1"}, "keep keys out of it"),
        ({"base_url": "http://h/v1?key=s3cret"}, "keep keys out of it"),
        ({"parallel": 0}, "parallel is 0; expected 1 or more"),
        ({"limit": -1}, "limit is -1"),
        ({"timeout_s": 0}, "timeout_s is 0"),
    ],
)
def test_bad_parameters_are_named(kw, says):
    with pytest.raises(ParamError, match=says) as e:
        Api(**{"model": "judge"} | kw)
    assert "s3cret" not in str(e.value)
