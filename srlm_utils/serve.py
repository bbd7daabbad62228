"""Servers that a step starts for itself by ``serve_command``, and that end with it, however it ends (`guard`)."""

import importlib.util
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

from srlm_utils.errors import ParamError
from srlm_utils.params import refuse_keys
from srlm_utils.paths import shown

GUARD = Path(__file__).with_name("guard.py")
# a prompt ends at any token with a line break: SmolLM2 has 129, and vLLM after 0.32 is to take 128 at most unless told
STOPS = {"VLLM_MAX_STOP_TOKEN_IDS": "100000"}
TALK = re.compile("WARN|INFO|DEBUG")  # a line of these may name an error that was dealt with
LOG_LINES = 15  # of a server that ended, in the message
ERROR = re.compile(r"(?:^|\s)(\w[\w.]*(?:Error|Exception)(?:: .+|$))")


def address(url: str) -> str:
    """The address of an OpenAI-compatible API: /v1 where a URL names no path; `ParamError` for what is no address."""
    try:
        parts = urlsplit(url)
        host = parts.hostname if parts.port != 0 else None
    except ValueError:  # a port that is no number, or a bracket without its other
        host = None
    if not host or parts.scheme not in ("http", "https") or "@" in parts.netloc or parts.query:
        found = "one with a user or a query" if "@" in url or "?" in url else repr(url)
        raise ParamError(f"server_urls: found {found}, expected an address like http://node1:8000/v1, without a key.")
    return url.rstrip("/") if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/v1"


def check(params: dict) -> None:
    """Raise `ParamError` for a step's `engine` that cannot be had."""
    engine, urls, command = (params.get(k) for k in ("engine", "server_urls", "serve_command"))
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ParamError(
            "engine = 'vllm': the package vllm is not installed in this environment. Install it if its transformers "
            "is the kit's; else keep it in an environment of its own and set engine: server with a serve_command."
        )
    if engine == "server":
        for url in urls:
            address(url)
        if command:
            words_of(command, model="model", port=1, index=0)
        elif not urls:
            raise ParamError("engine = 'server' needs server_urls, or a serve_command that starts one.")


def words_of(command: str, **values) -> list[str]:
    """A ``serve_command`` as words for the system, no shell in between; `ParamError` for one that cannot be used."""
    refuse_keys("serve_command", command)
    try:
        words = shlex.split(command)
    except ValueError as e:
        raise ParamError(f"serve_command = {command!r}: {e}.") from None
    for name, value in values.items():  # other braces are left alone: JSON among the options
        words = [word.replace(f"{{{name}}}", str(value)) for word in words]
    if "{model}" not in command or "{port}" not in command:
        raise ParamError(f"serve_command = {command!r}: expected {{model}} and {{port}} in it.")
    return words


class Process:
    """One server behind its guard; `log` is the file of what it says."""

    def __init__(self, words: list[str], url: str, log: Path):
        self.words, self.url, self.log = words, url, log
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "wb") as out:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", str(GUARD), *words],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=STOPS | os.environ,
                start_new_session=True,  # what kills the group of a kernel must not kill its guard
            )

    def ended(self) -> bool:
        return self._guard.poll() is not None

    def last_words(self) -> str:
        """What it said: the first error, under which a server's end may bury its cause, and its last lines."""
        said = self.log.read_text(errors="replace").strip().splitlines()
        first = next((m[1] for line in said if not TALK.search(line) and (m := ERROR.search(line))), "")
        found = [f"Its first error: {first}"] if first and not any(first in line for line in said[-LOG_LINES:]) else []
        last = ["Its last lines:", *said[-LOG_LINES:], f"All of them: {shown(self.log)}"]
        return "\n".join([f"{shlex.join(self.words)} ended.", *found, *last])

    def stop(self) -> None:
        self._guard.stdin.close()
        self._guard.wait()


_running: dict[tuple, list[Process]] = {}  # the servers of this process: all of one model, as it may need all memory


def start(command: str, folder: str, urls: list[str], logs: Path) -> list[Process]:
    """Servers of the model in `folder`, started unless they run already; those of another model end first.

    One for each of `urls`, at that address's port; without any, one at a free port of this machine.
    """
    key = (command, folder, *urls)
    if key not in _running or any(p.ended() for p in _running[key]):
        stop()
        places = [(address(url), urlsplit(url).port or 80) for url in urls]
        if not places:
            port = _free_port()
            places = [(f"http://127.0.0.1:{port}/v1", port)]
        _running[key] = []
        for i, (url, port) in enumerate(places):
            words = words_of(command, model=folder, port=port, index=i)
            _running[key].append(Process(words, url, logs / f"server-{i}.log"))
    return _running[key]


def stop() -> None:
    """End the servers of this process."""
    while _running:
        _, processes = _running.popitem()
        for p in processes:
            p.stop()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
