"""A server that answers as vLLM's does, on transformers, token by token; and fails as `tests.endpoints` lets it.

``python tests/vllm_server.py MODEL PORT`` serves a folder until it is ended.
"""

import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoModelForCausalLM

from tests.endpoints import Endpoint, Handler

PLAIN = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


class VllmHandler(Handler):
    def do_GET(self):
        self.send(self.server.pages.get(self.path) or (404, {}, "no such page"))


class VllmServer(Endpoint):
    """Serves `folder` as `name`. `fault(body, nth)` says how the nth try of a request fails, or None."""

    def __init__(self, folder, name="", port=0, fault=lambda body, nth: None):
        super().__init__(lambda body, nth: fault(body, nth) or self.completion(body), port)
        self.RequestHandlerClass = VllmHandler
        card = {"id": name or folder, "object": "model", "created": 0, "owned_by": "vllm", "root": folder}
        self.pages = {"/v1/models": {"object": "list", "data": [card]}, "/version": {"version": "0.test"}}
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def completion(self, body):
        assert body["return_token_ids"] and body.items() >= PLAIN.items(), body
        limit = self.pages["/v1/models"]["data"][0].get("max_model_len")
        if limit and len(body["prompt"]) + body["max_tokens"] > limit:
            return 400, {}, f"at most {limit} tokens"
        ids, how = body["prompt"], {"temperature": body["temperature"], "top_p": body.get("top_p", 1.0)}
        assert body["temperature"] or body.get("n", 1) == 1  # as vLLM has it
        choices = []
        for index in range(body.get("n", 1)):
            rng = torch.Generator().manual_seed(body.get("seed", 0) + index)
            tokens, first = [], None
            while len(tokens) < body["max_tokens"] and not (tokens and tokens[-1] in body.get("stop_token_ids", [])):
                logits = self.model(torch.tensor([ids + tokens])).logits[0, -1]
                first = logits.log_softmax(-1) if first is None else first
                tokens.append(_draw(logits, rng, **how))
            reason = "stop" if tokens[-1] in body.get("stop_token_ids", []) else "length"
            choice = {"index": index, "text": "", "token_ids": tokens, "finish_reason": reason, "logprobs": None}
            if wanted := body.get("logprob_token_ids"):
                assert body["logprobs"] == 0 and body["return_tokens_as_token_ids"]
                top = {f"token_id:{i}": float(first[i]) for i in dict.fromkeys([tokens[0], *wanted])}
                choice["logprobs"] = {"top_logprobs": [top]}
            if body.get("prompt_logprobs") is not None:
                logs = self.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
                logs = logs.gather(-1, torch.tensor(ids[1:])[:, None]).squeeze(-1).tolist()
                told = [{str(i): {"logprob": x, "rank": 1}} for i, x in zip(ids[1:], logs, strict=True)]
                choice["prompt_logprobs"] = [None, *told]
            choices.insert(0, choice)  # in any order
        return {"model": body["model"], "choices": choices, "usage": {}}


def _draw(logits, rng, temperature, top_p):
    if not temperature:
        return int(logits.argmax())
    probs, order = (logits / temperature).softmax(-1).sort(descending=True)
    probs = torch.where(probs.cumsum(-1) - probs < top_p, probs, 0.0)
    return int(order[torch.multinomial(probs, 1, generator=rng)])


def serve(*args, **kw):
    """A server that runs in a thread."""
    server = VllmServer(*args, **kw)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


if __name__ == "__main__":
    VllmServer(sys.argv[1], port=int(sys.argv[2])).serve_forever()
