"""Generation and scoring on vLLM: what `engine.Engine` does, for models that need more than one device or server.

What is asked and how the answers are read stands here once; `Vllm` asks a model in this process, `servers.Servers`
those behind addresses. Prompts go out as token ids and texts come back as token ids, so that chat template, stop rules
and decoding are those of every other engine. vLLM must tell the log-probabilities of chosen tokens
(``logprob_token_ids``; 0.32 does).
"""

import gc
import hashlib
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from srlm_utils import chat, context, serve
from srlm_utils.engine import Sample, no_numbers
from srlm_utils.errors import ParamError, StepFailed
from srlm_utils.resources import check_weights

CHOICES = 128  # tokens whose log-probabilities vLLM tells at once
# a model's generation_config.json must not change what is sampled: the paper samples by temperature and top-p alone
PLAIN = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


@dataclass
class Reply:
    """What a request brought: the token ids of each of its texts, and log-probabilities where they were asked for."""

    texts: list[list[int]]
    first: dict[int, float] = field(default_factory=dict)  # of the first token's choices
    prompt: list[float] = field(default_factory=list)  # of each token of the prompt but the first


class VllmEngine:
    """The methods of `engine.Engine`, on `_ask`, which a subclass brings: an iterator of (key, `Reply`) as replies
    come, for a list of (key, prompt token ids, sampling parameters by vLLM's names).

    A seed repeats on the same machine for the same requests, mostly: what else is in a batch decides rounding.
    """

    def __init__(self, folder: str, *, chat_template: str = "", trust_remote_code: bool = False):
        self.folder, self.trust = folder, trust_remote_code
        check_weights(folder)
        self.tokenizer = chat.load_tokenizer(folder, chat_template=chat_template, trust_remote_code=trust_remote_code)
        self._context = context.of_folder(folder)
        self._ends = {self.tokenizer.eos_token_id, chat.end_of_turn(self.tokenizer), *_eos(folder, trust_remote_code)}

    @property
    def context(self) -> int:
        """Tokens that the model attends to, 0 if nobody knows."""
        return self._context

    def generate(
        self,
        requests: list[tuple[str, list[int]]],
        *,
        n: int = 1,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        stop_ids: tuple[int, ...] = (),
        on_token=None,
    ) -> Iterator[list[Sample]]:
        """As `engine.Engine.generate`; the texts of a request are one request here, too, whose prompt is read once."""
        if not requests:
            return
        context.check_requests({key: len(ids) + max_new_tokens for key, ids in requests}, self.context)
        stops = {*stop_ids} - self._ends
        how = PLAIN | {
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "stop_token_ids": sorted(self._ends | stops),
        }
        if temperature:
            how |= {"n": n, "top_p": top_p}
        # neighbours begin alike, so that what they share is still in the cache
        asked = [
            (key, ids, how | ({"seed": _seed(seed, key)} if temperature else {}))
            for key, ids in sorted(requests, key=lambda r: r[1])
        ]
        for key, reply in self._ask(asked):
            texts = reply.texts if temperature else reply.texts * n  # greedy texts are all the same
            samples = [self._sample(f"{key}-{i}", tokens, stops) for i, tokens in enumerate(texts)]
            if on_token:
                on_token(sum(s.n_tokens for s in samples))
            yield samples

    def _sample(self, key: str, tokens: list[int], stops: set[int]) -> Sample:
        end = next((i for i, token in enumerate(tokens) if token in self._ends or token in stops), len(tokens))
        line = end < len(tokens) and tokens[end] in stops
        text = chat.decode(self.tokenizer, tokens[: end + line], line=line)
        return Sample(key, text, end, end < len(tokens))

    def choice_probs(
        self, requests: list[tuple[str, list[int]]], choices: list[int]
    ) -> Iterator[list[tuple[str, list[float], float]]]:
        """As `engine.Engine.choice_probs`, of `CHOICES` choices at most; vLLM has rounded their logits to its dtype."""
        if len(choices) > CHOICES:
            raise ParamError(f"{len(choices)} choices; vLLM tells the probabilities of {CHOICES} at most.")
        if not requests:
            return
        context.check_requests({key: len(ids) + 1 for key, ids in requests}, self.context)  # it writes one
        how = PLAIN | {"max_tokens": 1, "temperature": 0.0, "logprob_token_ids": choices}
        for key, reply in self._ask([(key, ids, how) for key, ids in sorted(requests, key=lambda r: r[1])]):
            if missing := [c for c in choices if c not in reply.first]:
                raise StepFailed(f"the reply to {key} lacks token {missing[0]}'s log-probability: vLLM is too old.")
            logs = [reply.first[c] for c in choices]
            if any(math.isnan(x) for x in logs):
                raise no_numbers("log-probabilities", [key])
            highest, mass = max(logs), sum(map(math.exp, logs))
            shares = [math.exp(x - highest) for x in logs]  # where all are 0 beside the rest, they still differ
            yield [(key, [s / sum(shares) for s in shares], mass)]

    def target_logprobs(
        self, requests: list[tuple[str, list[int], list[int]]]
    ) -> Iterator[list[tuple[str, list[float]]]]:
        """As `engine.Engine.target_logprobs`: the text is read as a part of the prompt."""
        if not requests:
            return
        context.check_requests({key: len(prompt) + len(text) + 1 for key, prompt, text in requests}, self.context)
        n_tokens = {key: len(text) for key, _, text in requests}
        how = PLAIN | {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        for key, reply in self._ask([(key, prompt + text, how) for key, prompt, text in requests]):
            found = reply.prompt[-n_tokens[key] :]
            if not all(map(math.isfinite, found)):
                raise no_numbers("log-probabilities", [key])
            yield [(key, found)]

    def _ask(self, asked: list[tuple[str, list[int], dict]]) -> Iterator[tuple[str, Reply]]:
        raise NotImplementedError


_loaded: dict[tuple, object] = {}  # the one model that this process holds in vLLM
_numbers = itertools.count()  # of requests: calls that are open at once share the model
_done: dict[str, object] = {}  # by number, what it has finished and its call has not taken yet


class Vllm(VllmEngine):
    """A model on vLLM in this process. There is room for one: asking another lets go of the one before, and asking
    that one again loads it again."""

    def __init__(
        self,
        folder: str,
        *,
        dtype: str = "auto",
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        batch_size: int = 0,
        **source,
    ):
        super().__init__(folder, **source)
        for name, value in serve.STOPS.items():  # vLLM reads it where a request is made
            os.environ.setdefault(name, value)
        self._how = {
            "model": folder,
            "dtype": dtype,
            "tensor_parallel_size": tensor_parallel_size,
            "gpu_memory_utilization": gpu_memory_utilization,
            "enable_prefix_caching": True,
            "trust_remote_code": self.trust,
            "skip_tokenizer_init": True,
        } | ({"max_num_seqs": batch_size} if batch_size else {})

    @property
    def version(self) -> str:
        import vllm

        return vllm.__version__

    def _ask(self, asked):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine, of = self._engine(), {}
        try:
            for key, ids, how in asked:
                params = SamplingParams(**how, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
                of[number := str(next(_numbers))] = key
                engine.add_request(number, {"prompt_token_ids": ids}, params)
            while of:
                if not (ready := [number for number in _done if number in of]):
                    _done.update((out.request_id, out) for out in engine.step() if out.finished)
                for number in ready:
                    yield of.pop(number), _reply(_done.pop(number))
        finally:  # whoever asked may have had enough
            engine.abort_request(list(of))
            for number in of:
                _done.pop(number, None)

    def _engine(self):
        from vllm import LLM
        from vllm.platforms import current_platform

        how = dict(self._how)
        if how["dtype"] == "auto":
            # not vLLM's own, which goes by the weights: the kit keeps float32 on disk where updates are small. The
            # first of its list is bfloat16, or float16 on cards without, where its attention is slow in float32. Torch
            # is not asked: a process that has opened the card cannot fork vLLM's
            how["dtype"] = str(current_platform.supported_dtypes[0]).removeprefix("torch.")
        key = (self.folder, *sorted((k, str(v)) for k, v in how.items()))
        if key not in _loaded:
            release()
            _loaded[key] = LLM(**how)
        return _loaded[key].llm_engine


def release() -> None:
    """Let go of the model that this process holds in vLLM, and of its memory."""
    while _loaded:
        _, llm = _loaded.popitem()
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
    _done.clear()


def _reply(out) -> Reply:
    """A finished request of vLLM's own."""
    texts = [list(o.token_ids) for o in sorted(out.outputs, key=lambda o: o.index)]
    first = out.outputs[0].logprobs
    prompt = zip(out.prompt_token_ids[1:], (out.prompt_logprobs or [])[1:], strict=False)
    if any(o.finish_reason not in ("stop", "length") for o in out.outputs):
        raise StepFailed(f"vLLM broke off a request: {out.outputs[0].finish_reason}.")
    return Reply(
        texts,
        {token: x.logprob for token, x in first[0].items()} if first else {},
        [here[token].logprob for token, here in prompt],
    )


def _seed(seed: int, key: str) -> int:
    """The seed of one request's texts: like `sampling.uniforms` it depends on (seed, key) alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:7], "little")


def _eos(folder: str, trust_remote_code: bool) -> list[int]:
    """Tokens that end a text by the model's own configuration."""
    from transformers import AutoConfig, GenerationConfig

    try:
        eos = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:  # a folder without one
        eos = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).eos_token_id
    return [] if eos is None else eos if isinstance(eos, list) else [eos]
