"""A server that answers as OpenAI's chat API does, and fails in all the ways that endpoints do."""

import json
import math
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SECRET = "sk-test-0123456789abcdef"


def completion(text, top=None):
    """A chat completion; `top` are the first token's probabilities."""
    tokens = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in (top or {}).items()]
    logprobs = {"content": [tokens[0] | {"top_logprobs": tokens}]} if top else None
    message = {"role": "assistant", "content": text}
    return {
        "model": "judge-0613",
        "choices": [{"index": 0, "message": message, "logprobs": logprobs, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 1, "prompt_tokens_details": None},
    }


class Endpoint(ThreadingHTTPServer):
    """`script(body, nth)` says what the nth try of a request gets: a completion, or (status, headers, error message),
    or one of "hang", "cut", "cut body", "garbage"."""

    daemon_threads = True

    def __init__(self, script, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.script, self.lock = script, threading.Lock()
        self.tried, self.answered, self.bodies, self.keys, self.times = Counter(), Counter(), [], [], []
        self.busy = self.peak = self.n_answered = 0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that was killed


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        server, raw = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(raw)
        with server.lock:
            server.tried[raw] += 1
            nth = server.tried[raw]
            server.bodies.append(body)
            server.keys.append(self.headers["Authorization"])
            server.times.append(time.time())
            server.busy += 1
            server.peak = max(server.peak, server.busy)
        time.sleep(0.01)
        action = server.script(body, nth)
        with server.lock:
            server.busy -= 1
            server.answered[raw] += isinstance(action, dict)
            server.n_answered += isinstance(action, dict)
        self.send(action)

    def send(self, action):
        self.close_connection = True
        if action == "hang":
            self.connection.settimeout(10)
            self.connection.recv(1)  # nothing comes before the client gives up
        if action in ("hang", "cut"):
            return
        status, headers, data = 200, {}, b'{"choices": [{"mess'
        if isinstance(action, tuple):
            status, headers, message = action
            data = json.dumps({"error": {"message": message, "type": "x", "param": None, "code": None}}).encode()
        elif isinstance(action, dict):
            data = json.dumps(action).encode()
        self.send_response(status)
        length = len(data) + (100 if action == "cut body" else 0)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(length)} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
