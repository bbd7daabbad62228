"""A model behind one or many vLLM servers: requests are shared out, and a server that dies costs only its open ones.

Each server has its own connections, which take the next request when they are free: a slow server gets fewer. What
fails goes back to the front and is taken by whoever is free. Before anything is asked a server says which model it
serves (``/v1/models``), and one that serves another model than the one meant is not asked.
"""

import json
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from srlm_utils import retry, serve
from srlm_utils.errors import ModelError
from srlm_utils.paths import resolve
from srlm_utils.printable import without_secret
from srlm_utils.vllm_engine import Reply, VllmEngine

KEY = "VLLM_API_KEY"  # vLLM's own name for it; sent to the servers if it is set
TIMEOUT_S = 900.0  # for a request, behind all that its server has taken before it
LOOK_S = 10.0  # for a server to say what it serves
PATIENCE_S = 180.0  # with no server at all, before the step ends; it goes on where it was when it is run again
START_S = 3600.0  # for a server to start: 70B are read from a disk for many minutes
TEXTS = 256  # of one server at once, where batch_size is 0; vLLM queues what it has no room for
CONNECTIONS = 64  # to one server, at most


class Servers(VllmEngine):
    """A model on servers at `urls`, or on those that `command` starts (`serve.start`).

    `meant` is the model's name in messages; `names` are those under which a server may serve it, beside its folder's
    path. Asking raises `ModelError` if no server serves it, if one refuses a request, or if none answers any more.
    """

    def __init__(
        self,
        folder: str,
        *,
        meant: str,
        names: list[str],
        urls: list[str],
        command: str,
        logs: Path,
        batch_size: int = 0,
        **source,
    ):
        super().__init__(folder, **source)
        self.meant, self.names, self.urls, self.command, self.logs = meant, names, urls, command, logs
        self.texts, self.version = batch_size or TEXTS, ""
        self._clients: dict = {}  # by address: they keep connections
        self._looked = False

    @property
    def context(self) -> int:
        """Tokens of a request at most: fewer than the model's where a server was started so (--max-model-len)."""
        if not self._looked:
            self._servers()
        return self._context

    def _ask(self, asked):
        servers = self._servers()
        n = max(how.get("n", 1) for *_, how in asked)
        yield from _Share(servers, asked, max(1, min(CONNECTIONS, self.texts // n))).replies()

    def _servers(self) -> list["_Server"]:
        """The servers that may be asked; those that do not answer now are among them if another one does."""
        if self.command:
            processes = serve.start(self.command, self.folder, self.urls, self.logs)
            servers = [_Server(p.url, self, p) for p in processes]
            for server in servers:
                server.wait()
        else:
            servers = [_Server(url, self) for url in self.urls]
            for server in servers:
                server.look()
        if not any(s.up for s in servers):
            raise ModelError("\n".join(s.why for s in servers))
        for server in servers:
            if not server.up:
                print(f"not asked: {server.why}")
        limits = {s.longest for s in servers if s.up and s.longest} | ({self._context} - {0})
        self._context, self._looked = min(limits, default=0), True
        self.version = self.version or next(s for s in servers if s.up).version()
        return [s for s in servers if not s.other]


class _Failed(Exception):
    """A try without an answer, which may be made again. `gone`: perhaps there is no server any more."""

    def __init__(self, why: str, gone: bool):
        super().__init__(why)
        self.gone = gone


class _Server:
    """One address. `up`: it answers and serves the model meant; `other`: it serves another; `why` it is not up."""

    def __init__(self, url: str, engine: Servers, process: serve.Process | None = None):
        from openai import OpenAI  # slow to import

        self.url, self.process, self._engine = serve.address(url), process, engine
        if self.url not in engine._clients:
            key = os.environ.get(KEY) or "none"
            engine._clients[self.url] = OpenAI(api_key=key, base_url=self.url, timeout=TIMEOUT_S, max_retries=0)
        self._client = engine._clients[self.url]
        self.model, self.up, self.other, self.why = "", False, False, ""
        self.longest = 0  # tokens of a request, 0 if it does not say
        self.sought = False  # a thread waits for it to come back

    def look(self) -> bool:
        """Ask what is served, and say whether it may be asked."""
        import openai

        self.up = self.other = False
        try:
            cards = self._client.with_options(timeout=LOOK_S).models.list().data
            served = [(card.id, getattr(card, "root", None) or "") for card in cards]
            limits = {card.id: getattr(card, "max_model_len", None) for card in cards}
            if not all(isinstance(name, str) for names in served for name in names):
                raise TypeError
        except openai.OpenAIError as e:
            self.why = f"{self.url} does not answer ({_words(e)})."
            return False
        except (AttributeError, TypeError, ValueError):  # a page, or JSON of another kind
            self.why = f"{self.url} answers, but not as /v1/models of a vLLM server does."
            return False
        self.model = next((name for name, root in served if self._is_meant(name) or self._is_meant(root)), "")
        self.up, self.other = bool(self.model), not self.model
        self.longest = limits[self.model] if self.up and isinstance(limits[self.model], int) else 0
        if self.other:
            found = ", ".join(f"{name} ({root})" if root not in ("", name) else name for name, root in served)
            e = self._engine
            self.why = (
                f"{self.url} serves {found or 'nothing'}, but {e.meant} is meant: {e.folder}. Serve that folder there, "
                f"or name what is served --served-model-name {e.names[0]}."
            )
        return self.up

    def _is_meant(self, name: str) -> bool:
        folder = Path(self._engine.folder)
        return bool(name) and (name in self._engine.names or (folder.is_dir() and _same(resolve(name), folder)))

    def wait(self) -> None:
        """Wait until a server that was just started answers; `ModelError` if it ends, or serves another model."""
        started = time.monotonic()
        while not self.look():
            if self.has_ended() or self.other or time.monotonic() - started > START_S:
                raise ModelError(self.why)
            time.sleep(1)
        if (seconds := time.monotonic() - started) > 1:
            print(f"{self._engine.meant} is served at {self.url} after {seconds:.0f} s")

    def has_ended(self) -> bool:
        """Whether it is a process of this step's that is no more; `why` then has its last words."""
        if self.process is None or not self.process.ended():
            return False
        self.why = self.process.last_words()
        return True

    def version(self) -> str:
        """vLLM's version, "" if the server does not tell."""
        try:
            raw = self._client.with_options(timeout=LOOK_S, base_url=self.url.removesuffix("/v1")).get(
                "/version", cast_to=object
            )
            return str(raw["version"])
        except Exception:  # nothing depends on it, and a proxy may answer anything here
            return ""

    def complete(self, ids: list[int], how: dict) -> Reply:
        """One request's reply. Raises `_Failed`, or `ModelError` if the server refuses it."""
        import openai

        how = how | {"return_token_ids": True}
        if "logprob_token_ids" in how:
            how |= {"logprobs": 0, "return_tokens_as_token_ids": True}
        try:
            raw = self._client.completions.with_raw_response.create(model=self.model, prompt=ids, extra_body=how)
            return _reply(raw.http_response.text, ids)
        except openai.APIStatusError as e:
            if retry.may_pass(e.status_code):
                raise _Failed(_words(e), gone=False) from None
            raise ModelError(f"{self.url} refuses a request of {len(ids)} tokens: {_words(e)}.") from None
        except openai.APIConnectionError as e:
            raise _Failed(_words(e), gone=True) from None
        except (ValueError, LookupError, TypeError, AttributeError) as e:
            raise _Failed(f"an answer that is no completion ({type(e).__name__}: {e})"[:300], gone=False) from None


def _same(a: Path, b: Path) -> bool:
    return a.exists() and os.path.samefile(a, b)


def _words(e) -> str:
    """What went wrong, short, without the key."""
    why = without_secret(str(getattr(e, "body", None) or e.__cause__ or e), os.environ.get(KEY, ""))
    return f"{getattr(e, 'status_code', type(e).__name__)}: {why[:300]}"  # cut last: half a key is one, too


def _reply(text: str, ids: list[int]) -> Reply:
    """The parts of a completion that are kept; an error of Python's for anything else."""
    choices = sorted(json.loads(text)["choices"], key=lambda c: c["index"])
    for choice in choices:
        if choice["finish_reason"] not in ("stop", "length"):
            raise ValueError(f"it was broken off: {choice['finish_reason']}")  # by a server that ends
        if choice.get("token_ids") is None:
            raise ModelError("the server gives no token ids (return_token_ids): it is no vLLM, or too old a one.")
    first, prompt = choices[0].get("logprobs"), choices[0].get("prompt_logprobs") or []
    return Reply(
        [c["token_ids"] for c in choices],
        {int(token.removeprefix("token_id:")): x for token, x in first["top_logprobs"][0].items()} if first else {},
        [here[str(token)]["logprob"] for token, here in zip(ids[1:], prompt[1:], strict=False)],
    )


@dataclass
class _Item:
    """A request that waits, and how often it was tried."""

    key: str
    ids: list[int]
    how: dict
    tries: int = 0


class _Share:
    """The requests of one call, and the threads that bring them to servers, `parallel` for each."""

    def __init__(self, servers: list[_Server], asked: list[tuple[str, list[int], dict]], parallel: int):
        self.servers = servers
        self.parallel = min(parallel, -(-len(asked) // len(servers)))  # a few requests go to all servers, too
        self.waiting = deque(_Item(*request) for request in asked)
        self.n_left = self.n = len(self.waiting)
        self.done: queue.SimpleQueue = queue.SimpleQueue()  # (key, reply), or the error that ends it all
        self.changed = threading.Condition()  # guards `waiting`, `n_left`, `ended` and each server's `up`
        self.ended = threading.Event()

    def replies(self) -> Iterator[tuple[str, Reply]]:
        for server in self.servers:
            for _ in range(self.parallel):
                # no pool: what hangs must not keep the kernel from ending
                threading.Thread(target=self._work, args=(server,), daemon=True).start()
            if not server.up:
                threading.Thread(target=self._seek, args=(server,), daemon=True).start()
        try:
            for _ in range(self.n):
                found = self.done.get()
                if isinstance(found, Exception):
                    raise found
                yield found
        finally:
            with self.changed:
                self.ended.set()
                self.changed.notify_all()

    def _seek(self, server: _Server) -> None:
        try:
            self._find_again(server)
        except Exception as e:
            self.done.put(e)

    def _work(self, server: _Server) -> None:
        try:
            while (item := self._take(server)) is not None:
                try:
                    reply = server.complete(item.ids, item.how)
                except _Failed as e:
                    self._give_back(item, server, e)
                    if e.gone:
                        self._find_again(server)
                    self.ended.wait(retry.backoff(item.tries))
                else:
                    with self.changed:
                        self.n_left -= 1
                        self.changed.notify_all()
                    self.done.put((item.key, reply))
        except Exception as e:  # whoever asked must hear of it
            self.done.put(e)

    def _take(self, server: _Server) -> _Item | None:
        """The next request, once the server is up and one waits; None when there are no more."""
        with self.changed:
            while self.n_left and not self.ended.is_set():
                if self.waiting and server.up:
                    return self.waiting.popleft()
                self.changed.wait()
        return None

    def _give_back(self, item: _Item, server: _Server, e: _Failed) -> None:
        item.tries += 1
        if item.tries > retry.RETRIES:
            raise ModelError(
                f"{server.url} did not answer request {item.key!r} ({e}), nor did {retry.RETRIES} tries before."
            )
        with self.changed:
            self.waiting.appendleft(item)
            self.changed.notify_all()

    def _find_again(self, server: _Server) -> None:
        """Keep requests from a server until it answers again. One thread looks, the others wait (`_take`)."""
        with self.changed:
            if server.sought:
                return
            server.sought, server.up = True, False
        tries, alone = 0, time.monotonic()  # alone: since when no server was up
        while not (self.ended.is_set() or server.look() or server.other or server.has_ended()):
            tries += 1
            alone = time.monotonic() if any(s.up for s in self.servers) else alone
            if time.monotonic() - alone > PATIENCE_S:
                break
            self.ended.wait(retry.backoff(tries))
        with self.changed:
            server.sought = False
            self.changed.notify_all()
            if not any(s.up or s.sought for s in self.servers):
                raise ModelError("\n".join(["no server answers any more.", *(s.why for s in self.servers)]))
