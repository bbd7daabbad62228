"""Generation and scoring behind servers: what comes is what transformers gives, whatever happens to a server."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from srlm_utils import judge, retry, serve, servers
from srlm_utils.answers import write_answers
from srlm_utils.artefacts import RowLog, read_json, read_jsonl, sha256
from srlm_utils.errors import DataError, ModelError, ParamError
from srlm_utils.params import PLACE, Experiment
from srlm_utils.plan import fingerprint, make_step
from srlm_utils.servers import Servers
from srlm_utils.step import StepRun
from srlm_utils.verify import verify
from tests import vllm_server
from tests.conftest import ROOT, srlm
from tests.test_engine import PROMPTS, generate, requests
from tests.test_judge_modes import SAMPLING

MORE = [f"{p} ({i})" for i in range(4) for p in PROMPTS]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(retry, "BACKOFF_S", 0.02)
    monkeypatch.setattr(retry, "MAX_BACKOFF_S", 0.1)
    monkeypatch.setattr(servers, "PATIENCE_S", 1.0)


@pytest.fixture
def served(tiny):
    """Makes servers of the tiny model; they end with the test."""
    running = []

    def make(*args, **kw):
        running.append(vllm_server.serve(*(args or (tiny,)), **kw))
        return running[-1]

    yield make
    for server in running:
        end(server)


def end(server):
    server.shutdown()
    server.server_close()


def behind(tiny, *found, **kw):
    urls = [server if isinstance(server, str) else server.url for server in found]
    how = {"meant": "M1", "names": ["M1-0123456789ab"], "command": "", "logs": None} | kw
    return Servers(tiny, urls=urls, **how)


def asked(server):
    return Counter(tuple(body["prompt"]) for body in server.bodies)


# ---- the same figures


def test_greedy_texts_are_those_of_transformers(tiny, engine, served):
    one, two = served(), served()
    reqs = requests(engine, MORE)
    ours = behind(tiny, one, two)
    free = generate(engine, reqs)
    stop = tuple(engine.tokenizer(s.text, add_special_tokens=False)["input_ids"][3] for s in free.values())
    for kw in ({}, {"n": 2}, {"stop_ids": stop[:3]}):
        assert generate(ours, reqs, **kw) == generate(engine, reqs, **kw)
    assert any(s.ended for s in generate(ours, reqs, stop_ids=stop[:3]).values())
    assert one.n_answered > 0 and two.n_answered > 0 and one.n_answered + two.n_answered == 4 * len(reqs)
    assert ours.version == "0.test"


def test_scores_and_likelihoods_are_those_of_transformers(tiny, engine, served):
    ours, rubric = behind(tiny, served()), judge.Rubric("short")
    items = [{"id": f"a{i}", "prompt": p, "response": p[::-1]} for i, p in enumerate(PROMPTS)]

    def scores(engine):
        return {r["id"]: r for batch in judge.expected_scores(engine, rubric, items) for r in batch}

    theirs, mine = scores(engine), scores(ours)
    assert mine.keys() == theirs.keys()
    for key, row in theirs.items():
        assert mine[key]["score"] == pytest.approx(row["score"], abs=1e-4)
        assert mine[key]["probs"] == pytest.approx(row["probs"], abs=1e-5)
        assert mine[key]["mass"] == pytest.approx(row["mass"], abs=1e-5)
    texts = [(key, ids, ids[3:7]) for key, ids in requests(engine)]
    mine, theirs = (dict(row for batch in e.target_logprobs(texts) for row in batch) for e in (ours, engine))
    assert mine.keys() == theirs.keys()
    assert all(mine[key] == pytest.approx(theirs[key], abs=1e-4) for key in mine)


def test_candidates_are_one_request_with_a_seed_of_its_own(tiny, engine, served):
    server = served()
    ours, kw = behind(tiny, server), {"n": 3, "temperature": 0.9, "top_p": 0.9, "seed": 3}
    made = []
    first = generate(ours, requests(engine), on_token=made.append, **kw)
    assert len(server.bodies) == len(PROMPTS) and all(body["n"] == 3 for body in server.bodies)
    assert len({body["seed"] for body in server.bodies}) == len(PROMPTS)
    assert sum(made) == sum(s.n_tokens for s in first.values())
    assert first == generate(ours, requests(engine), **kw)
    assert first["q1-0"].text != first["q1-1"].text
    other = generate(ours, requests(engine), **kw | {"seed": 4})
    assert {k: s.text for k, s in first.items()} != {k: s.text for k, s in other.items()}


def test_no_more_requests_are_open_than_texts_fit(tiny, engine, served):
    server = served()
    ours = behind(tiny, server, batch_size=6)
    generate(ours, requests(engine, MORE), n=2, temperature=0.9)
    assert 1 < server.peak <= 3


# ---- faults


@pytest.mark.parametrize(
    "fault", [(429, {}, "busy"), (500, {}, "oh"), (503, {}, "no"), "hang", "cut", "cut body", "garbage", "abort"]
)
def test_what_fails_is_asked_again_and_nothing_twice_after_its_answer(tiny, engine, served, monkeypatch, fault):
    if fault == "hang":
        monkeypatch.setattr(servers, "TIMEOUT_S", 5.0)
    aborted = {"choices": [{"index": 0, "token_ids": [9], "finish_reason": "abort"}]}
    reqs = requests(engine)
    first = {tuple(ids) for _, ids in reqs[::2]}

    def fails(body, nth):
        if nth == 1 and tuple(body["prompt"]) in first:
            return aborted if fault == "abort" else fault

    server = served(fault=fails)
    assert generate(behind(tiny, server), reqs) == generate(engine, reqs)
    assert asked(server) == Counter({tuple(ids): 2 if tuple(ids) in first else 1 for _, ids in reqs})


def test_a_server_that_dies_costs_only_its_open_requests(tiny, engine, served):
    def dies(body, nth):
        if dying.n_answered >= 3:
            if not dying.over:
                dying.over = True
                end(dying)
            return "cut"

    dying, other = served(fault=dies), served()
    dying.over = False
    reqs = requests(engine, MORE)
    texts = generate(behind(tiny, dying, other, batch_size=2), reqs)
    assert texts == generate(engine, reqs)
    assert dying.over and dying.n_answered >= 3
    answered = dying.answered + other.answered
    assert len(answered) == len(reqs) and set(answered.values()) == {1}
    assert len(dying.bodies) - dying.n_answered <= 4  # what was open: not one of the others was sent there


def test_a_server_that_comes_back_is_asked_again(tiny, engine, served):
    gone = served()
    port = gone.server_port
    end(gone)
    slow = served(fault=lambda body, nth: time.sleep(0.2))
    reqs, back = requests(engine, MORE), []
    ours = behind(tiny, gone.url, slow, batch_size=1)
    for n, batch in enumerate(ours.generate(reqs, max_new_tokens=4, temperature=0, top_p=1.0, seed=0)):
        if n == 2:
            back.append(served(port=port))
        assert batch
    assert back[0].n_answered > 0 and back[0].n_answered + slow.n_answered == len(reqs)


def test_without_any_server_the_step_ends_and_says_which(tiny, engine, served):
    server = served(fault=lambda body, nth: "cut" if end_once(server) else "cut")
    with pytest.raises(ModelError, match=f"(?s)no server answers any more.*{server.server_port}"):
        generate(behind(tiny, server), requests(engine))
    with pytest.raises(ModelError, match=f"{server.server_port}/v1 does not answer"):
        generate(behind(tiny, server), requests(engine))


def end_once(server):
    if server.fileno() != -1:
        end(server)


def test_a_request_that_never_works_ends_the_step_and_is_named(tiny, engine, served):
    bad = tuple(requests(engine)[2][1])
    server = served(fault=lambda body, nth: (500, {}, "cannot") if tuple(body["prompt"]) == bad else None)
    with pytest.raises(ModelError, match="did not answer request 'q2'.*500.*cannot"):
        generate(behind(tiny, server), requests(engine))
    assert asked(server)[bad] == retry.RETRIES + 1


def test_a_request_that_is_refused_is_not_asked_again(tiny, engine, served):
    server = served(fault=lambda body, nth: (400, {}, "maximum context length is 8"))
    with pytest.raises(ModelError, match="refuses a request of .*maximum context length"):
        generate(behind(tiny, server), requests(engine)[:1])
    assert len(server.bodies) == 1


def test_a_server_that_was_started_with_less_context_is_asked_for_no_more(tiny, engine, served):
    server = served()
    server.pages["/v1/models"]["data"][0]["max_model_len"] = 60
    servers = behind(tiny, server)
    short, long = requests(engine, ["Hi."]), requests(engine, ["tea and cake " * 40])
    how = {"max_new_tokens": 8, "temperature": 0, "top_p": 1.0, "seed": 0}
    assert servers.context == 60 < engine.context
    with pytest.raises(DataError, match="60"):
        list(servers.generate(long, **how))
    assert len(list(servers.generate(short, **how))) == 1


def test_a_judge_prompt_is_cut_to_what_the_server_takes(tiny, engine, served):
    server, rubric = served(), judge.Rubric("short")
    items = [{"id": str(n), "prompt": "Hi.", "response": "tea and cake " * n} for n in (1, 40, 41, 42, 43)]
    (_, shortest), *_ = judge.prompts(engine.tokenizer, rubric, items[:1], "score_first", 0)[0]
    server.pages["/v1/models"]["data"][0]["max_model_len"] = limit = len(shortest) + 40
    rows = [r for batch in judge.expected_scores(behind(tiny, server), rubric, items) for r in batch]
    assert {r["id"]: r["cut"] for r in rows} == {str(n): n > 1 for n in (1, 40, 41, 42, 43)}
    texts = [("a", [5] * (limit - 50), [6] * 49), ("b", [5] * (limit - 50), [6] * 50)]
    assert len(list(behind(tiny, server).target_logprobs(texts[:1]))) == 1
    with pytest.raises(DataError):
        list(behind(tiny, server).target_logprobs(texts))


def test_where_nothing_is_left_to_ask_nobody_is_asked(tiny):
    nowhere = behind(tiny, "http://127.0.0.1:1/v1")
    how = {"max_new_tokens": 8, "temperature": 0, "top_p": 1.0, "seed": 0}
    assert [*nowhere.generate([], **how), *nowhere.choice_probs([], [1]), *nowhere.target_logprobs([])] == []
    for mode in ("expected", "sampled_expected"):
        how = SAMPLING if mode != "expected" else {}
        assert [*judge.scores(nowhere, judge.Rubric("short"), [], mode, **how)] == []
    with pytest.raises(ModelError, match="does not answer"):
        list(nowhere.target_logprobs([("a", [1], [2])]))


def test_servers_are_told_that_many_tokens_may_end_a_prompt(tmp_path, monkeypatch):
    say = f"import os; open({str(tmp_path / 'said')!r}, 'w').write(os.environ['VLLM_MAX_STOP_TOKEN_IDS'])"
    for own in ("", "7"):
        if own:
            monkeypatch.setenv("VLLM_MAX_STOP_TOKEN_IDS", own)
        process = serve.Process([sys.executable, "-c", say], "http://127.0.0.1:1/v1", tmp_path / "log")
        process._guard.wait(30)
        assert (tmp_path / "said").read_text() == (own or serve.STOPS["VLLM_MAX_STOP_TOKEN_IDS"])


def test_a_server_without_token_ids_is_refused(tiny, engine, served):
    server = served(fault=lambda body, nth: {"choices": [{"index": 0, "text": "Hi", "finish_reason": "stop"}]})
    with pytest.raises(ModelError, match="no token ids"):
        generate(behind(tiny, server), requests(engine))


# ---- which model


def test_another_model_is_refused_and_both_are_named(tiny, engine, served):
    server = served()
    server.pages["/v1/models"]["data"][0] |= {"id": "M2-fedcba987654", "root": "/elsewhere/M2/model"}
    with pytest.raises(ModelError, match=r"serves M2-fedcba987654 \(/elsewhere/M2/model\), but M1 is meant: .*tiny"):
        generate(behind(tiny, server), requests(engine))
    assert not server.bodies
    right = served(name="M1-0123456789ab")
    right.pages["/v1/models"]["data"][0]["root"] = "/mounted/there"
    assert generate(behind(tiny, server, right), requests(engine)) == generate(engine, requests(engine))
    assert not server.bodies and {body["model"] for body in right.bodies} == {"M1-0123456789ab"}


@pytest.mark.parametrize("page", ["<html>Sign in</html>", "[1]", '{"data": [{"name": "x"}]}', '{"data": 3}'])
def test_an_address_that_answers_as_something_else_is_named(tiny, engine, page):
    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if page.startswith("<") else "application/json")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{http.server_port}/v1"
        with pytest.raises(ModelError, match=f"{url} answers, but not as /v1/models"):
            generate(behind(tiny, url), requests(engine)[:1])
        http.shutdown()


@pytest.mark.parametrize("words", ["bad key", f"bad{' ' * 250}key"])  # the second is cut in the middle of the key
def test_the_key_goes_to_the_servers_and_into_no_message(tiny, engine, served, monkeypatch, words):
    key = "sk-secret-0123456789" + "abcdef" * 20
    monkeypatch.setenv("VLLM_API_KEY", key)
    server = served(fault=lambda body, nth: (401, {}, f"{words} {key}"))
    with pytest.raises(ModelError) as e:
        generate(behind(tiny, server), requests(engine)[:1])
    assert "[key]" in str(e.value) and "sk-secret" not in str(e.value)
    assert server.keys == [f"Bearer {key}"]


# ---- kills

KILLED = """
from types import SimpleNamespace
import contextlib
from srlm_utils.answers import write_answers
from srlm_utils.artefacts import RowLog
from srlm_utils.servers import Servers
p = SimpleNamespace(max_new_tokens=6, temperature=0.8, top_p=0.9, seed=0)
bar = lambda *a: contextlib.nullcontext(SimpleNamespace(update=lambda n: None))
step = SimpleNamespace(params=p, log=lambda name: RowLog({log!r} / name), progress=bar)
engine = Servers({tiny!r}, meant="M1", names=["x"], urls={urls!r}, command="", logs=None, batch_size=4)
write_answers(step, engine, {prompts!r}, n=2, log="answers.jsonl")
"""


def test_what_is_on_disk_is_not_asked_again_after_a_kill(tiny, served, tmp_path):
    slow = {"fault": lambda body, nth: time.sleep(0.05)}
    pair = served(**slow), served(**slow)
    prompts = [{"prompt_id": f"p{i}", "prompt": p} for i, p in enumerate(MORE)]
    code = KILLED.format(log=tmp_path, tiny=tiny, urls=[s.url for s in pair], prompts=prompts)
    code = "from pathlib import PosixPath\n" + code
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    log = tmp_path / "answers.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < 10:
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    first.wait()
    until(lambda: not any(s.busy for s in pair))
    before = RowLog(log).rows
    n_before = [asked(s) for s in pair]
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    rows = read_jsonl(log)
    assert rows[: len(before)] == before and 10 <= len(before) < len(rows) == 2 * len(prompts)
    assert len({r["cand_id"] for r in rows}) == len(rows)
    again = sum(map(asked, pair), Counter()) - sum(n_before, Counter())
    assert sum(again.values()) == len(prompts) - len(before) // 2
    whole = SimpleNamespace(max_new_tokens=6, temperature=0.8, top_p=0.9, seed=0)
    step = SimpleNamespace(params=whole, log=lambda name: RowLog(tmp_path / "whole.jsonl"), progress=no_bar)
    undisturbed = write_answers(step, behind(tiny, pair[0]), prompts, n=2, log="")
    assert sorted(rows, key=lambda r: r["cand_id"]) == undisturbed


class no_bar:  # noqa: N801
    def __init__(self, *args):
        pass

    def __enter__(self):
        return SimpleNamespace(update=lambda n: None)

    def __exit__(self, *args):
        pass


# ---- servers of one's own

COMMAND = f"{sys.executable} {ROOT / 'tests/vllm_server.py'} {{model}} {{port}}"


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # asked in one go: between two questions it may end
        return False


def children(pid):
    return [p.pid for p in psutil.Process(pid).children()]


def until(what, seconds=60):
    deadline = time.time() + seconds
    while not what():
        assert time.time() < deadline
        time.sleep(0.05)


@pytest.fixture
def stopped():
    yield
    serve.stop()


def test_a_command_starts_servers_that_end_when_another_model_is_asked(tiny, engine, tmp_path, stopped):
    shutil.copytree(tiny, tmp_path / "other")
    one = behind(tiny, command=COMMAND, logs=tmp_path)
    other = behind(str(tmp_path / "other"), command=COMMAND, logs=tmp_path)
    assert generate(one, requests(engine)) == generate(engine, requests(engine))
    (process,) = serve.start(COMMAND, tiny, [], tmp_path)  # it runs
    guard = process._guard.pid
    (server,) = children(guard)
    assert generate(other, requests(engine)) == generate(engine, requests(engine))
    assert not alive(guard) and not alive(server)
    assert generate(one, requests(engine)) == generate(engine, requests(engine))  # and the first comes back
    serve.stop()
    assert not serve._running


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_servers_end_with_whoever_started_them(tiny, tmp_path, sign):
    code = f"""
    from srlm_utils import serve
    from pathlib import Path
    import time
    (p,) = serve.start({COMMAND!r}, {tiny!r}, [], Path({str(tmp_path)!r}))
    print(p._guard.pid, flush=True)
    time.sleep(600)
    """
    starter = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True
    )
    guard = int(starter.stdout.readline())
    until(lambda: children(guard))
    (server,) = children(guard)
    assert alive(server)
    os.killpg(starter.pid, sign)
    starter.wait()
    until(lambda: not alive(server) and not alive(guard))


def test_a_command_that_ends_says_why(tiny, engine, tmp_path, stopped):
    command = f"{sys.executable} -c 'raise SystemExit(\"no GPU\")' {{model}} {{port}}"
    broken = behind(tiny, command=command, logs=tmp_path)
    with pytest.raises(ModelError, match="(?s)ended.\nIts last lines.*no GPU.*code 1.*All of them: .*log"):
        generate(broken, requests(engine))
    missing = behind(tiny, command="no-such-program {model} {port}", logs=tmp_path)
    with pytest.raises(ModelError, match="No such file"):
        generate(missing, requests(engine))


def test_the_first_error_of_a_server_is_said_whatever_it_wrote_behind_it(tiny, engine, tmp_path, stopped):
    said = ["WARNING limits may cause OSError: too many files", "INFO ImportError: no such extra"]
    said += ["worker: RuntimeError: the cause", "EngineDeadError"]
    code = f"print({chr(10).join([*said, *['noise'] * 40])!r}); raise SystemExit(1)"
    broken = behind(tiny, command=f"{shlex.join([sys.executable, '-c', code])} {{model}} {{port}}", logs=tmp_path)
    with pytest.raises(ModelError, match="ended.\nIts first error: RuntimeError: the cause\nIts last lines"):
        generate(broken, requests(engine))


def test_several_servers_are_started_at_their_ports(tiny, engine, tmp_path, stopped):
    urls = [f"http://127.0.0.1:{serve._free_port()}" for _ in range(2)]
    ours = behind(tiny, *urls, command=COMMAND + " {index}", logs=tmp_path)
    assert generate(ours, requests(engine, MORE)) == generate(engine, requests(engine, MORE))
    processes = serve.start(ours.command, tiny, urls, tmp_path)
    assert [p.words[-1] for p in processes] == ["0", "1"] and [p.url for p in processes] == [u + "/v1" for u in urls]
    (one,) = children(processes[0]._guard.pid)
    os.kill(one, signal.SIGKILL)
    until(processes[0].ended)
    assert generate(ours, requests(engine)) == generate(engine, requests(engine))  # both are started again
    assert not any(p.ended() for p in serve.start(ours.command, tiny, urls, tmp_path))


@pytest.mark.parametrize(
    "params,says",
    [
        ({}, "needs server_urls"),
        ({"server_urls": ["node1:8000"]}, "found 'node1:8000'"),
        ({"server_urls": ["http://node:80x0/v1"]}, "found 'http://node:80x0/v1'"),
        ({"server_urls": ["http://[::1/v1"]}, "expected an address"),
        ({"server_urls": ["http://me:secret@node1/v1"]}, "without a key"),
        ({"serve_command": "vllm serve {model}"}, "expected {model} and {port}"),
        ({"serve_command": "vllm serve {modle} --port {port}"}, "expected {model} and {port}"),
        ({"serve_command": "vllm serve '{model} {port}"}, "No closing quotation"),
        ({"serve_command": "vllm serve {model} --port {port} --api-key x"}, "VLLM_API_KEY"),
    ],
)
def test_what_cannot_be_asked_is_said_before_anything_starts(params, says):
    with pytest.raises(ParamError, match=says):
        serve.check({"engine": "server", "server_urls": [], "serve_command": ""} | params)
    serve.check({"engine": "transformers"} | params)
    serve.check({"beta": 0.1})


@pytest.mark.parametrize("url", ["http://me:secret@node1/v1", "me:secret@node1", "http://node1/v1?key=secret"])
def test_an_address_with_a_key_is_not_shown(url):
    with pytest.raises(ParamError, match="without a key") as e:
        serve.address(url)
    assert "secret" not in str(e.value)


@pytest.mark.parametrize("command", ["HF_TOKEN=secret vllm '", "vllm --api-key secret", "vllm --hf_token=secret"])
def test_a_command_with_a_key_is_not_shown(command):
    with pytest.raises(ParamError, match="set it in the environment") as e:
        serve.words_of(command)
    assert "secret" not in str(e.value)


# ---- steps


@pytest.fixture
def judging(tmp_path):
    """A run with what 05_judge@M1 reads, and its parameters."""
    for name in ("M1/model/model.safetensors", "M1/aift/prompts.jsonl", "M1/aift/candidates.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "M0").mkdir()
    (tmp_path / "M0/model.json").write_text('{"name": "meta-llama/Llama-2-70b-hf", "chat_template": ""}')
    return Experiment({}).flat("05_judge", "M1", str(tmp_path))


def test_where_a_model_runs_makes_nothing_stale_but_what_runs_it_does(judging):
    run, now = Path(judging["run_dir"]), {}
    moved = {"server_urls": ["http://b:1/v1"], "serve_command": "x", "tensor_parallel_size": 8}
    moved |= {"gpu_memory_utilization": 0.5}
    assert set(moved) == set(PLACE)
    for engine, where in (("server", {"server_urls": ["http://a:1/v1"]}), ("server", moved), ("vllm", moved)):
        params = judging | {"engine": engine} | where
        now.setdefault(engine, []).append(fingerprint(make_step("05_judge", "M1", params), params, run))
    assert now["server"][0] == now["server"][1] != now["vllm"][0]


def test_a_step_knows_its_models_by_their_weights(judging):
    step = StepRun("05_judge", judging)
    (name,) = step._served_names("M1")
    assert name == f"M1-{sha256(step.run / 'M1/model')[:12]}"
    assert step._served_names("M0")[1:] == ["meta-llama/Llama-2-70b-hf"]
    assert step._served_names("mistralai/Mistral-7B-v0.1") == ["mistralai/Mistral-7B-v0.1"]


@pytest.mark.slow
@pytest.mark.long
def test_the_whole_loop_behind_servers_that_each_step_starts(smoke):
    run = smoke.with_name("test-servers")
    shutil.rmtree(run, ignore_errors=True)
    args = ["params/smoke.yaml", "--run-name", run.name, "--set", "common.engine=server"]
    try:
        result = srlm("run", *args, "--set", f"common.serve_command={COMMAND}", timeout=3600)
        assert result.returncode == 0, result.stdout + result.stderr
        for model in ("M0", "SFT", "M1"):  # they are those of the other run; sampled texts are not
            ours, theirs = (expected(folder / model / "eval/judgements.jsonl") for folder in (run, smoke))
            assert ours == pytest.approx(theirs, abs=1e-3)
        assert read_json(run / "steps/05_judge@M2.json")["versions"]["vllm"] == "0.test"
        assert not verify(run).findings
        left = [p for p in psutil.process_iter(["cmdline"]) if "vllm_server.py" in " ".join(p.info["cmdline"] or [])]
        assert not left
        plan = srlm("plan", *args, "--set", "common.server_urls=[http://elsewhere:8000/v1]").stdout
        assert re.search(r"(\d+) of \1 steps done", plan), plan
    finally:
        shutil.rmtree(run, ignore_errors=True)


def expected(path):
    return {r["id"]: r["score"] for r in read_jsonl(path) if r["judge_mode"] == "expected"}
