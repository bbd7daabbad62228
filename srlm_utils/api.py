"""A judge behind an OpenAI-compatible endpoint: pairwise verdicts and single grades, paid for once.

Yuan et al. 2024 decide head-to-heads by GPT-4, asked in both orders (section 3.1.2), and MT-Bench by GPT-4's grades
from 1 to 10 (Zheng et al. 2023). Every answer is on disk before it is used, so that a run that was killed goes on
without asking again what was answered. The key is read from the variable ``OPENAI_API_KEY`` and stays there: it is in
no file, no message and no error.
"""

import hashlib
import json
import math
import os
import re
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock

from srlm_utils import chat, paths, retry, units, verdicts
from srlm_utils.artefacts import RowLog
from srlm_utils.errors import DataError, ModelError, ParamError
from srlm_utils.printable import without_secret

OPENAI = "https://api.openai.com/v1"
KEY = "OPENAI_API_KEY"
MAX_RETRY_AFTER_S = 300.0  # a server that asks for a longer wait ends the run, which can go on when it suits
ASSUMED_CALL_S = 2.0  # until calls were timed
CHARS_A_TOKEN = 4  # of English text, about
TOP_LOGPROBS = 5  # as many as every endpoint gives; the two letters are the likeliest tokens by far
# what a reply may hold: a letter, a grade with its reasons, and before either the thoughts of a reasoning model
VERDICT_TOKENS, GRADE_TOKENS = 1024, 2048
MIN_MASS = 0.1  # below it the first token was not going to be the letter, and what is left of both is noise
# what an endpoint may refuse (a reasoning model does all three): the word in its error, the parameters to leave out
REFUSABLE = {
    "logprobs": {"logprobs", "top_logprobs"},
    "temperature": {"temperature"},
    "max_completion_tokens": {"max_tokens"},  # the newer name, which is sent then
}
_RATING = re.compile(r"\[\[\s*(\d{1,3}(?:\.\d{1,6})?)\s*(?:/\s*10\s*)?\]\]")
# fmt: off
_LEAD = {"my", "the", "final", "better", "best", "answer", "verdict", "choice", "response", "assistant", "option", "is",
         "i", "choose", "prefer"}
# fmt: on


class Api:
    """A model behind ``base_url`` (empty: ``OPENAI_BASE_URL``, else OpenAI itself).

    `parallel` calls at most are under way at once. `limit` (0: none) is how many calls this object may make beyond what
    the cache holds; retries are not counted. Prices, of a million tokens in and out, are for the estimate (0: it names
    no cost). `timeout_s` is for one try. `cache` is the folder of the answers, by
    default ``api/`` in `paths.cache_dir()`, with one JSONL file for each base_url and model.
    """

    def __init__(
        self,
        model: str,
        base_url: str = "",
        *,
        parallel: int = 8,
        limit: int = 0,
        price_in: float = 0,
        price_out: float = 0,
        timeout_s: float = 60,
        cache: str | Path | None = None,
    ):
        self.local = bool(base_url)
        self.model, self.base_url = model, (base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI).rstrip("/")
        url = urlsplit(self.base_url)
        if not model:
            raise ParamError("model is empty; give the name that the endpoint knows the model by.")
        if "@" in url.netloc or url.query:
            raise ParamError(f"base_url holds a user or a query; keep keys out of it and set the variable {KEY}.")
        if url.scheme not in ("http", "https") or not url.netloc:
            raise ParamError(f"base_url {self.base_url!r} is no address; expected one like http://localhost:8000/v1.")
        for name, value, least in (("parallel", parallel, 1), ("limit", limit, 0), ("timeout_s", timeout_s, 1e-3)):
            if not value >= least:
                raise ParamError(f"{name} is {value}; expected {least} or more.")
        self.parallel, self.limit, self.timeout_s = parallel, limit, timeout_s
        self.price_in, self.price_out = price_in, price_out
        name = re.sub(r"[^\w.-]+", "_", f"{url.netloc}-{model}")[:80]
        name += f"-{hashlib.sha256(f'{self.base_url} {model}'.encode()).hexdigest()[:8]}.jsonl"
        self.path = Path(cache or paths.cache_dir() / "api") / name
        self._refused: set[str] = set()  # parameters
        self._seconds: list[float] = []  # of each call that was answered

    def ask(self, requests: list[tuple[str, list[dict]]], *, max_tokens: int, logprobs: int = 0):
        """Yield (key, reply) for each (key, messages), first what the cache holds, then in order of arrival.

        Reply: {"text", "top" ({token: logprob} of the first token's `logprobs` likeliest; {} if not asked for or not
        given), "usage" (the endpoint's token counts), "model" (which one it says answered)}. Identical requests are
        asked once. `ParamError` before the first call if `limit` is too low; `ModelError` if the endpoint refuses, or
        does not answer after `retry.RETRIES` more tries.
        """
        answers, ids, todo = self._split(requests, max_tokens, logprobs)
        made = len(self._seconds)
        if self.limit and made + len(todo) > self.limit:
            raise ParamError(
                f"limit is {self.limit}, but {len(todo)} calls to {self.model} are needed"
                f"{f' beside the {made} made before' if made else ''}. Raise it, or ask for fewer prompts."
            )
        keys: dict[str, list[str]] = {}
        for (key, _), id in zip(requests, ids, strict=True):
            if id in todo:
                keys.setdefault(id, []).append(key)
            else:
                yield key, answers.replies[id]
        if not todo:
            return
        client = self._client()
        self._estimate(todo, len(requests), max_tokens)
        stop = threading.Event()
        started = time.time()
        pool = ThreadPoolExecutor(self.parallel, thread_name_prefix="api")
        try:
            futures = {
                pool.submit(self._answer, client, answers, id, keys[id][0], body, stop): id for id, body in todo.items()
            }
            for n, future in enumerate(as_completed(futures), 1):
                if (reply := future.result()) is None:
                    continue
                if n == self.parallel < len(todo) and not made:
                    left = (time.time() - started) / n * (len(todo) - n)
                    print(f"{self.model}: {n} of {len(todo):,} calls timed, about {units.duration(left)} left")
                for key in keys[futures[future]]:
                    yield key, reply
        except _Unanswered as e:
            failure = str(e)
        else:
            return
        finally:
            # what is under way is paid for: wait for it, so that it is kept
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
        n = sum(id in answers.replies for id in ids)
        raise ModelError(
            f"{failure} {n} of {len(ids)} answers are safe in {paths.shown(self.path)}; running again continues there."
        )

    @classmethod
    def from_params(cls, model: str, params) -> "Api":
        """The endpoint that a step's parameters name (`params._Judged`)."""
        return cls(
            model,
            params.judge_base_url,
            parallel=params.api_parallel,
            limit=params.api_limit,
            price_in=params.api_price_in,
            price_out=params.api_price_out,
        )

    def _estimate(self, todo: dict[str, dict], n: int, max_tokens: int) -> None:
        """Print what calls will take: a token in for 4 characters, and as many out as there can be at most."""
        calls, timed = len(todo), bool(self._seconds)
        each = statistics.fmean(self._seconds) if timed else ASSUMED_CALL_S
        chars = sum(len(m["content"]) for body in todo.values() for m in body["messages"])
        tokens_in, tokens_out = math.ceil(chars / CHARS_A_TOKEN), calls * max_tokens
        cost = (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6
        lasts = units.duration(math.ceil(calls / self.parallel) * each)
        print(
            f"{self.model}: {calls:,} calls for {n:,} requests, about {tokens_in:,} tokens in and at most "
            f"{tokens_out:,} out, about {lasts} ({self.parallel} at once, "
            f"{f'{each:.1f} s a call so far' if timed else f'if a call takes {each:.0f} s'})"
            + (f", about {cost:.2f} at the given prices at most" if cost else "")
        )

    def _split(self, requests, max_tokens: int, logprobs: int):
        """(the cache, the id of each request, the bodies by id that the cache does not answer)."""
        answers, ids, todo = _Answers(self.path), [], {}
        for _, messages in requests:
            body = {"model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
            if logprobs:
                body |= {"logprobs": True, "top_logprobs": logprobs}
            ids.append(hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest())
            if ids[-1] not in answers.replies:
                todo[ids[-1]] = body
        return answers, ids, todo

    def check_key(self) -> None:
        """Raise `ParamError` if the environment holds no key that this endpoint could take."""
        key = _key()
        if not key and not self.local:
            raise ParamError(f"the variable {KEY} is not set; {self.base_url} needs a key.")
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ParamError(f"the variable {KEY} holds a blank or a character that no key has; copy the key again.")

    def _client(self):
        from openai import OpenAI  # slow to import

        self.check_key()
        # no retries of the client's: it cannot be stopped in a wait, and it takes a malformed answer for one
        return OpenAI(api_key=_key() or "none", base_url=self.base_url, timeout=self.timeout_s, max_retries=0)

    def _answer(self, client, answers: "_Answers", id: str, key: str, body: dict, stop: threading.Event) -> dict | None:
        """One request's reply, on disk before it is returned, or None if stopped. What fails here stops the others."""
        try:
            if (reply := self._call(client, key, body, stop)) is not None:
                answers.add(id, reply)
            return reply
        except BaseException:
            stop.set()
            raise

    def _call(self, client, key: str, body: dict, stop: threading.Event) -> dict | None:
        import openai

        tries = 0
        while not stop.is_set():
            asked_for, started = 0.0, time.time()
            sent = {k: v for k, v in body.items() if k not in self._refused}
            if "max_tokens" in self._refused:
                sent["max_completion_tokens"] = body["max_tokens"]
            try:
                raw = client.chat.completions.with_raw_response.create(**sent)
                reply = _reply(raw.http_response.text)
                self._seconds.append(time.time() - started)
                return reply
            except openai.APIStatusError as e:
                if self._leave_out(e, sent):
                    continue
                why, asked_for = _status(e), _retry_after(e.response.headers)
                if not retry.may_pass(e.status_code):
                    raise _Unanswered(self._refusal(e.status_code, key, why)) from None
                if asked_for > MAX_RETRY_AFTER_S:
                    why += f"; it asks to wait {units.duration(asked_for)}"
                    tries = retry.RETRIES
            except openai.APITimeoutError:
                why = f"no answer within {self.timeout_s:g} s"
            except openai.APIConnectionError as e:
                why = _clean(f"no connection ({e.__cause__ or e})")
            except _Malformed as e:
                why = f"an answer that is not one of the chat API ({e})"
            tries += 1
            if tries > retry.RETRIES:
                raise _Unanswered(f"{self.base_url} did not answer request {key!r} for {self.model}: {why}.")
            stop.wait(asked_for + retry.backoff(tries))
        return None

    def _leave_out(self, e, sent: dict) -> bool:
        """Whether the endpoint refused a parameter that can be left out of every further request."""
        if e.status_code not in (400, 422):
            return False
        message = str(e)
        refused = {p for word, names in REFUSABLE.items() if word in message for p in names & sent.keys()}
        if refused - self._refused:
            print(f"{self.model}: the endpoint refuses {', '.join(sorted(refused))}; asked without")
            self._refused |= refused
        return bool(refused)

    def _refusal(self, status: int, key: str, why: str) -> str:
        if status == 401:  # its message may show a part of the key
            return f"{self.base_url} answers 401: it does not accept the key. Set the variable {KEY} to one it knows."
        if status == 404:
            return f"{self.base_url} answers {why}. Check base_url and the model's name, {self.model!r}."
        return f"{self.base_url} refuses request {key!r} for {self.model}: {why}."


class _Unanswered(Exception):
    """A request that has no answer, and why."""


class _Malformed(Exception):
    """A successful answer that holds no completion."""


class _Answers:
    """The answers on disk, by id of their request. Safe among threads and processes: whole lines, under a lock."""

    def __init__(self, path: Path):
        self.path, self._threads = path, threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._processes = FileLock(path.with_suffix(".lock"))
        with self._processes:
            log = RowLog(path)  # which drops an incomplete last row
            log.close()
        try:
            self.replies: dict[str, dict] = {row["id"]: row["reply"] for row in log.rows}
        except KeyError as e:
            raise DataError(f"{path}: a row lacks {e}; expected the kit's own answers. Delete the file.") from None

    def add(self, id: str, reply: dict) -> None:
        line = json.dumps({"id": id, "reply": reply}, ensure_ascii=False) + "\n"
        with self._threads, self._processes, open(self.path, "a+b") as f:
            f.seek(max(f.seek(0, os.SEEK_END) - 1, 0))
            if f.read() not in (b"", b"\n"):  # another process was killed while it wrote
                RowLog(self.path).close()
            f.write(line.encode())
            f.flush()
            os.fsync(f.fileno())
        self.replies[id] = reply


def _key() -> str:
    return os.environ.get(KEY, "").strip()


def _clean(text: str) -> str:
    """Words of a server, fit for a file or a message: without the key, and valid UTF-8."""
    return without_secret(text, _key()).encode("utf-8", "replace").decode()


def _reply(text: str) -> dict:
    """The parts of a chat completion that are kept; `_Malformed` if it holds no message."""
    try:
        data = json.loads(text)
        choice = data["choices"][0]
        said = choice["message"]["content"] or ""
        tokens = (choice.get("logprobs") or {}).get("content") or [{}]
        top = {_clean(t["token"]): float(t["logprob"]) for t in tokens[0].get("top_logprobs") or []}
        usage = {k: v for k, v in (data.get("usage") or {}).items() if isinstance(v, int)}
        return {"text": _clean(said), "top": top, "usage": usage, "model": _clean(data.get("model") or "")}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as e:
        raise _Malformed(type(e).__name__) from None


def _status(e) -> str:
    body = e.body if isinstance(e.body, dict) else {}
    why = _clean(str(body.get("message") or e.message))  # before it is cut: half a key is one, too
    return f"{e.status_code} ({why[:300].rstrip('. ')})"


def _retry_after(headers) -> float:
    """Seconds that a ``Retry-After`` asks for, a number or a date; 0 without one."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return 0.0
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(seconds, 0.0) if not math.isnan(seconds) else 0.0


# ---- verdicts


def compare(api: Api, prompts: dict[str, str], a: dict[str, str], b: dict[str, str]) -> Iterator[list[dict]]:
    """Ask in both orders which of two answers is better; answers by prompt_id. Rows as of `verdicts.compare`.

    `p_first` is P(A) / (P(A) + P(B)) of the reply's first token where the endpoint gives it, else 1 or 0 by the letter
    that the reply ends in. A reply that says neither has 0.5 and "unread": True, and `metrics.outcomes` leaves its
    prompt out.
    """
    requests, unread = [(key, chat.user(text)) for key, text in verdicts.questions(prompts, a, b)], set()
    for key, reply in api.ask(requests, max_tokens=VERDICT_TOKENS, logprobs=TOP_LOGPROBS):
        pid, order = key.split("\t")
        p = p_first(reply)
        if p is None:
            unread.add(pid)
        row = {"prompt_id": pid, "order": order, "p_first": 0.5 if p is None else round(p, 6)}
        yield [row | ({"unread": True} if p is None else {})]
    if unread:
        print(f"{api.model}: replies to {len(unread)} of {len(a)} prompts name neither A nor B")


def p_first(reply: dict) -> float | None:
    """Probability that a reply of `Api.ask` chooses A over B; None if it says neither."""
    mass = {"A": 0.0, "B": 0.0}
    for token, logprob in reply["top"].items():
        if token.strip() in mass:
            mass[token.strip()] += math.exp(min(logprob, 0.0))
    if (total := sum(mass.values())) >= MIN_MASS:
        return mass["A"] / total
    letter = parse_choice(reply["text"])
    return None if letter is None else float(letter == "A")


def parse_choice(text: str) -> str | None:
    """The letter A or B that a reply's last line ends in, behind words such as ``Answer:`` alone, or that is its first.

    Marks around it do not matter (``**A**``, ``[[B]]``); its case does. A line that says more ("not A", "A or B") is no
    choice.
    """
    lines = [words for line in text.splitlines() if (words := re.findall(r"\w+", line))]
    if lines and lines[-1][-1] in ("A", "B") and all(w.lower() in _LEAD for w in lines[-1][:-1]):
        return lines[-1][-1]
    return lines[0][0] if lines and lines[0] in (["A"], ["B"]) else None


# ---- single grades


def parse_rating(text: str) -> float | None:
    """The last ``[[rating]]`` of a judgement, from 1 to 10; None if there is none or it is out of range."""
    found = _RATING.findall(text)
    return float(found[-1]) if found and 1 <= float(found[-1]) <= 10 else None
