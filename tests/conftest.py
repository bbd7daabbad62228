"""Shared fixtures: the tiny model, and one smoke run that every pipeline test reads."""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[1]


def srlm(*args: str, env: dict | None = None, timeout: int = 600) -> subprocess.CompletedProcess:
    """The command line, as a user calls it."""
    return subprocess.run(
        [sys.executable, "-m", "srlm_utils.cli", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | (env or {}),
    )


def cli(*args: str) -> subprocess.CompletedProcess:
    """The command line in this process: no imports again, and its kernels are forked from one server."""
    from srlm_utils.cli import main

    out, err, terminated = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([*args])
    except SystemExit as e:
        code = e.code
    finally:
        signal.signal(signal.SIGTERM, terminated)
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def example_notebooks() -> list[Path]:
    """The executed notebooks of the example: one for each step of its experiment, and no other."""
    from srlm_utils.params import Experiment
    from srlm_utils.paths import EXAMPLE
    from srlm_utils.plan import list_steps

    found = sorted((EXAMPLE / "notebooks").glob("*.ipynb"))
    assert {p.stem for p in found} == {s.name for s in list_steps(Experiment.load([EXAMPLE / "params.yaml"]))}
    return found


def before_dpo(smoke, run) -> None:
    """Make `run` a copy of a smoke run whose M2 is still to be trained."""
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(smoke, run)
    (run / "steps/07_dpo@M2.json").unlink()
    shutil.rmtree(run / "M2/model")


@pytest.fixture(scope="session")
def tiny() -> str:
    """Folder of the tiny random model with a real tokenizer."""
    from srlm_utils.seed_model import fetch

    return fetch("tiny-random")["path"]


@pytest.fixture(scope="session")
def engine(tiny):
    """The tiny model in float32 on the CPU."""
    from srlm_utils.engine import Engine

    return Engine(tiny, dtype="float32", device="cpu", batch_size=8)


@pytest.fixture(scope="session")
def smoke():
    """A finished smoke run, made by the command line through papermill."""
    run = ROOT / "results" / "test-smoke"
    shutil.rmtree(run, ignore_errors=True)
    result = srlm("run", "params/smoke.yaml", "--run-name", run.name)
    assert result.returncode == 0, result.stdout + result.stderr
    yield run
    shutil.rmtree(run, ignore_errors=True)


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium, whose console and requests can be read."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no Chromium with its driver here (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    browser.set_script_timeout(100)  # a busy machine is no fault of the page
    yield browser
    browser.quit()


@pytest.fixture
def endpoint(monkeypatch, tmp_path):
    """Makes endpoints; the key is set, waits are short, the cache is a folder of the test."""
    from srlm_utils import retry
    from tests.endpoints import SECRET, Endpoint

    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("SRLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retry, "BACKOFF_S", 0.02)
    servers = []

    def make(script):
        servers.append(Endpoint(script))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return servers[-1]

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()
