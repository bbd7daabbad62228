"""Generation and scoring on transformers: batched, sampled exactly, each text with a random stream of its own."""

import gc
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from srlm_utils import attention, chat, context, vocabulary
from srlm_utils.devices import keep_memory, pick_device, pick_dtype
from srlm_utils.errors import ModelError, ResourceError, StepFailed, first_line
from srlm_utils.prefill import BATCH_TOKENS, read
from srlm_utils.resources import check_weights, free_memory, kept_numbers, out_of_memory, text_bytes, too_large
from srlm_utils.sampling import sample, uniforms
from srlm_utils.slots import Slots, blocks


@dataclass
class Sample:
    """One generated text. `ended`: it wrote EOS (or a stop token) before its token budget was used up."""

    key: str
    text: str
    n_tokens: int
    ended: bool


MAX_BATCH = {"cpu": 256, "cuda": 512}  # texts sampled at once where memory allows; more gains little (benchmarks/)


class Engine:
    """A model and its tokenizer, loaded for generation and scoring.

    What prompts read together begin with alike is read once (`prefill`): the rubric of many judgements, the prompt of
    four answers. Batches are continuous: where a text has ended, the next one starts. `batch_size` texts are sampled,
    or prompts read, at once; 0 samples as many as fit into half of the free memory, up to `MAX_BATCH`. Where memory
    runs out all the same, `batch_size` is halved and what was not done yet is done again.

    Each sample asks for the same random numbers whatever the batch size (`sampling.uniforms`). Logits differ by
    rounding between batch shapes, so a seed repeats exactly for the same requests and batch size; for others all but
    certainly in float32 and mostly in bfloat16, where a text may turn off at a draw that was nearly a tie.
    """

    def __init__(
        self,
        folder: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 0,
        chat_template: str = "",
        trust_remote_code: bool = False,
    ):
        from transformers import AutoModelForCausalLM

        tokenizer = chat.load_tokenizer(folder, chat_template=chat_template, trust_remote_code=trust_remote_code)
        device = pick_device(device)
        if device == "cpu":
            keep_memory()
        check_weights(folder)
        try:
            model = (
                AutoModelForCausalLM.from_pretrained(
                    folder,
                    dtype=getattr(torch, pick_dtype(dtype, device)),
                    use_safetensors=True,
                    trust_remote_code=trust_remote_code,
                )
                .to(device)
                .eval()
            )
        except (OSError, ValueError) as e:
            raise ModelError(
                f"{folder}: the model could not be loaded ({first_line(e)}). Expected "
                "a transformers causal language model with safetensors weights."
            ) from e
        except (RuntimeError, MemoryError) as e:
            raise (too_large(folder) if out_of_memory(e) else e) from None
        attention.use(model)
        self._hold(model, tokenizer, device, batch_size)

    @classmethod
    def around(cls, model, tokenizer, *, batch_size: int = 0) -> "Engine":
        """An engine on a model that is in memory, with that model's own weights: it says what they say at each call.

        Whoever trains the model puts it into eval mode around a call.
        """
        engine = cls.__new__(cls)
        engine._hold(model, tokenizer, str(model.device), batch_size)
        return engine

    def _hold(self, model, tokenizer, device: str, batch_size: int) -> None:
        self.model, self.tokenizer, self.device, self.batch_size = model, tokenizer, device, batch_size
        self.context = context.of_config(model.config.to_dict())  # tokens that it attends to, 0 if nobody knows
        self._at_work: dict[str, int] = {}  # what is in memory at once: keys, and how many tokens each may have
        eos = model.generation_config.eos_token_id
        eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
        self._ends = {tokenizer.eos_token_id, chat.end_of_turn(tokenizer), *eos}

    # ---- sampling

    @torch.inference_mode()
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
        """Sample `n` texts for each request ``(key, prompt token ids)``; yields a request's samples when all are there.

        A sample's key is ``<request key>-<index>``. Temperature 0 is greedy. EOS ends a text and is no part of it; a
        token of `stop_ids` (`chat.newline_ids`) ends it, too, before its line break. `on_token(n)` is told of tokens as
        they are made. Raises `DataError` where a prompt and its text might be longer than the model's context.
        """
        context.check_requests({key: len(ids) + max_new_tokens for key, ids in requests}, self.context)

        def run(some, at_once):
            longest = max(len(ids) for _, ids in some) + max_new_tokens
            at_once = min(at_once or self._fitting(longest), len(some) * n)
            width = n if at_once >= n else 1  # texts of a job: those of a request, while all of them fit
            jobs = [
                ([f"{key}-{i}" for i in range(first, first + width)], ids)
                for key, ids in some
                for first in range(0, n, width)
            ]
            texts = _Texts(self.tokenizer, n, max_new_tokens, seed, self._ends, {*stop_ids} - self._ends, on_token)

            def draw(logits, keys):
                u = torch.tensor(texts.uniforms(keys), device=logits.device)
                try:
                    return sample(logits, u, temperature, top_p)
                except FloatingPointError:
                    bad = (~torch.isfinite(logits).all(-1)).tolist()
                    bad = [key for key, is_bad in zip(keys, bad, strict=True) if is_bad]
                    raise no_numbers("logits", bad) from None

            if attention.is_full(self.model.config, longest):
                made = self._continuous(jobs, width, at_once // width * width, texts, draw)
            else:
                most = max(width, 32 // width * width)
                made = self._in_batches(jobs, width, min(at_once // width * width, most), texts, draw)
            for samples in made:
                yield [samples[0].key.rpartition("-")[0]], samples

        yield from self._as_fits(requests, run)

    def _as_fits(self, requests, run):
        """Yield what ``run(requests, batch_size)`` yields behind the keys of the requests that are done by it.

        Where memory runs out, what is left is run again with half as many at once. A sample has its own random numbers,
        so the same comes out but for rounding. Raises `ResourceError` where one alone does not fit.
        """
        left, ran_out = requests, ""
        while left:
            done: set[str] = set()
            self._at_work = {r[0]: len(r[1]) for r in left}
            try:
                for keys, value in run(left, self.batch_size):
                    if ran_out:  # said once it has helped
                        print(f"{ran_out} goes on with {self.batch_size}. To begin with that, set batch_size to it.")
                        ran_out = ""
                    done.update(keys)
                    yield value
                return
            except (RuntimeError, MemoryError) as e:
                if not out_of_memory(e):
                    raise
            # behind the except clause: an error holds all that stood in memory when it was raised
            gc.collect()
            if self.device.startswith("cuda"):
                torch.cuda.empty_cache()
            left = [r for r in left if r[0] not in done]
            n_at_work = min(len(self._at_work), self.batch_size or len(self._at_work))
            if n_at_work == 1:
                key, n_tokens = next(iter(self._at_work.items()))
                raise ResourceError(
                    f"memory ran out on {key} alone, with its prompt up to {n_tokens} tokens. Lower max_new_tokens, or "
                    "what a judge sees of a response (max_response_tokens); or take a smaller model, or a machine with "
                    "more memory."
                )
            ran_out = f"memory ran out with {n_at_work} texts at once ({context.some([*self._at_work][:n_at_work])}):"
            self.batch_size = n_at_work // 2

    def _continuous(self, jobs, n, size, texts, draw):
        """Texts of `jobs`, each the keys of `n` samples and the prompt of all of them, in `size` slots."""
        # the last come first: the longest, behind which all attention has to reach; then neighbours that share most
        waiting = sorted(jobs, key=lambda job: (blocks(len(job[1])), job[1]))
        tokens_of = {key: len(ids) + texts.budget for keys, ids in jobs for key in keys}
        slots = Slots(self.model, size, max(tokens_of.values()))
        held: list = [None] * size  # the sample that each slot holds
        tokens = torch.zeros(size, dtype=torch.long, device=self.device)
        while waiting or any(held):
            free = [i for i, key in enumerate(held) if not key]
            # a few at once: reading one prompt at a time leaves the processor half idle
            if waiting and len(free) >= max(n, min(len(waiting) * n, size // 8)):
                taken = [waiting.pop() for _ in range(min(len(waiting), len(free) // n))]
                now = [*filter(None, held), *(key for keys, _ in taken for key in keys)]
                self._at_work = {key: tokens_of[key] for key in now}
                for reading in read(self.model, [ids for _, ids in taken], size // n):
                    places = [[free.pop() for _ in range(n)] for _ in reading.prompts]
                    slots.put(places, reading)
                    places = [place for of_prompt in places for place in of_prompt]
                    keys = [key for i in reading.prompts for key in taken[i][0]]
                    tokens[places] = drawn = draw(reading.logits.repeat_interleave(n, 0), keys)
                    for place, key, goes in zip(places, keys, texts.add(keys, drawn.tolist()), strict=True):
                        held[place] = key if goes else None
                    del reading  # its keys stand in the slots: the next one is read into the memory it had
                yield from texts.finished()
                continue
            if not waiting and len(free) >= max(1, slots.n // 8):  # nothing comes after them: smaller batches from here
                kept = [i for i, key in enumerate(held) if key]
                held, index = [held[i] for i in kept], torch.tensor(kept, device=self.device)
                tokens = tokens[index]
                slots.keep(index)
            alive = [i for i, key in enumerate(held) if key]
            self._at_work = {held[i]: tokens_of[held[i]] for i in alive}
            logits = slots.step(tokens, torch.tensor([bool(key) for key in held], device=self.device))
            keys = [held[i] for i in alive]
            tokens[alive] = drawn = draw(logits, keys)
            for i, goes in zip(alive, texts.add(keys, drawn.tolist()), strict=True):
                if not goes:
                    held[i] = None
            yield from texts.finished()

    def _in_batches(self, jobs, n, size, texts, draw):
        """As `_continuous`, for models whose layers are more than plain attention: whole batches, in transformers' own
        cache."""
        jobs = sorted(jobs, key=lambda job: (-len(job[1]), job[0]))
        for start in range(0, len(jobs), size // n):
            batch = jobs[start : start + size // n]
            keys = [key for of_job, _ in batch for key in of_job]
            self._at_work = {key: len(ids) + texts.budget for of_job, ids in batch for key in of_job}
            ids, mask = self._left_pad([p for _, p in batch])
            out = self.model(
                input_ids=ids, attention_mask=mask, position_ids=_positions(mask), use_cache=True, logits_to_keep=1
            )
            cache, logits = out.past_key_values, out.logits[:, -1]
            if n > 1:
                cache.batch_repeat_interleave(n)
                logits, mask = (t.repeat_interleave(n, 0) for t in (logits, mask))
            while True:
                tokens = draw(logits, keys)
                going = texts.add(keys, tokens.tolist())
                yield from texts.finished()
                if not any(going):
                    break
                if not all(going):  # ended rows leave, cache and all
                    stay = torch.tensor(going, device=self.device).nonzero().squeeze(-1)
                    cache.batch_select_indices(stay)
                    mask, tokens, keys = mask[stay], tokens[stay], [k for k, g in zip(keys, going, strict=True) if g]
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                out = self.model(
                    input_ids=tokens[:, None],
                    attention_mask=mask,
                    past_key_values=cache,
                    position_ids=mask.sum(-1, keepdim=True) - 1,
                    use_cache=True,
                )
                logits = out.logits[:, -1]

    def _fitting(self, length: int) -> int:
        """How many texts of `length` tokens fit into half of the free memory, a power of two up to `MAX_BATCH`."""
        config = self.model.config.get_text_config()
        kept = kept_numbers(config)
        per_text = text_bytes(config.num_hidden_layers, kept, config.vocab_size, length, self.model.dtype.itemsize)
        if self.device.startswith("cuda"):
            device = torch.device(self.device)
            # what torch holds for itself is free as well
            free = torch.cuda.mem_get_info(device)[0]
            free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        else:
            free = free_memory()
        most = min(MAX_BATCH.get(self.device.partition(":")[0], 128), free // 2 // per_text)
        return 1 << max(0, int(most).bit_length() - 1)

    # ---- scoring

    @torch.inference_mode()
    def choice_probs(
        self, requests: list[tuple[str, list[int]]], choices: list[int]
    ) -> Iterator[list[tuple[str, list[float], float]]]:
        """Probability of each of the token ids `choices` as the next token, in one forward pass.

        Yields batches of ``(key, probabilities that sum to 1 over the choices, mass)`` for requests ``(key, prompt
        token ids)``, where mass is the share of the full distribution that the choices held before renormalising:
        near 0, the model was about to write something else and the figures mean little.
        """
        context.check_requests({key: len(ids) for key, ids in requests}, self.context)

        def run(some, at_once):
            for numbers, logits in self._last_logits(some, at_once, choices):
                probs = logits.float().softmax(-1)[:, choices]
                mass = probs.sum(-1)
                keys = [some[i][0] for i in numbers]
                if not bool(torch.isfinite(mass).all()):
                    bad = (~torch.isfinite(mass)).tolist()
                    raise no_numbers("logits", [key for key, is_bad in zip(keys, bad, strict=True) if is_bad])
                # where all are so unlikely that they are 0 in float32, the logits still tell them apart
                shares = torch.where(mass[:, None] > 0, probs / mass[:, None], logits[:, choices].float().softmax(-1))
                yield keys, list(zip(keys, shares.tolist(), mass.tolist(), strict=True))

        yield from self._as_fits(requests, run)

    @torch.inference_mode()
    def target_logprobs(
        self, requests: list[tuple[str, list[int], list[int]]]
    ) -> Iterator[list[tuple[str, list[float]]]]:
        """Log-probability (nats) of each token of a given text, for requests ``(key, prompt ids, text ids)``.

        Both must hold at least one token. Yields batches of ``(key, log-probabilities)``, texts of similar length
        together; only positions that predict a token of the text are projected through the vocabulary.
        """
        context.check_requests({key: len(prompt) + len(text) for key, prompt, text in requests}, self.context)

        def run(some, at_once):
            waiting = sorted(some, key=lambda r: -len(r[1]) - len(r[2]))
            while waiting:
                width = len(waiting[0][1]) + len(waiting[0][2])
                n = min(at_once or 16, 16, BATCH_TOKENS.get(self.device.partition(":")[0], 1024) // width)
                batch, waiting = waiting[: max(1, n)], waiting[max(1, n) :]
                self._at_work = {key: len(prompt) + len(text) for key, prompt, text in batch}
                yield list(self._at_work), self._logprobs(batch)

        yield from self._as_fits(requests, run)

    def _logprobs(self, batch) -> list[tuple[str, list[float]]]:
        ids, mask = self._left_pad([prompt + text for _, prompt, text in batch])
        lengths = torch.tensor([[len(text)] for *_, text in batch], device=self.device)
        # padding is on the left, so a text is the last of its row; each token is predicted by the one before it
        targets = torch.arange(ids.shape[1], device=self.device) >= ids.shape[1] - lengths
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=_positions(mask),
            use_cache=False,
            logits_to_keep=targets.roll(-1, 1),
        ).logits
        found = vocabulary.read(logits.view(-1, logits.shape[-1]), ids[targets]).log_probs.tolist()
        rows = []
        for key, _, text in batch:
            if not all(map(math.isfinite, found[: len(text)])):
                raise no_numbers("log-probabilities", [key])
            rows.append((key, found[: len(text)]))
            found = found[len(text) :]
        return rows

    def _last_logits(self, requests, most: int, choices: list[int]):
        """(numbers of some of `requests`, logits behind their prompts), at most `most` at once; 0 is no limit. Those of
        `choices` are `vocabulary.unrounded`."""

        def begin(numbers):
            self._at_work = {requests[i][0]: len(requests[i][1]) for i in numbers}

        if attention.is_full(self.model.config, max(len(ids) for _, ids in requests)):
            for reading in read(self.model, [ids for _, ids in requests], most, begin, choices):
                yield reading.prompts, reading.logits
            return
        # layers that are more than plain attention: whole prompts, longest first
        order, most = sorted(range(len(requests)), key=lambda i: -len(requests[i][1])), min(most or 16, 16)
        for start in range(0, len(order), most):
            numbers = order[start : start + most]
            begin(numbers)
            ids, mask = self._left_pad([requests[i][1] for i in numbers])
            with vocabulary.unrounded(self.model, choices):
                out = self.model(
                    input_ids=ids, attention_mask=mask, position_ids=_positions(mask), use_cache=False, logits_to_keep=1
                )
            yield numbers, out.logits[:, -1]

    def _left_pad(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        return ids, mask


def no_numbers(what: str, keys: list[str]) -> StepFailed:
    return StepFailed(
        f"the model's {what} hold NaN or infinity for {', '.join(keys[:16])}. Its weights are damaged, or too large "
        "for dtype float16: take bfloat16 or float32, or look at the training log of the model."
    )


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


class _Texts:
    """The texts of one call to `Engine.generate` while they are written, by the keys of their samples."""

    def __init__(self, tokenizer, n: int, budget: int, seed: int, ends: set[int], lines: set[int], on_token):
        self.tokenizer, self.n, self.budget, self.seed = tokenizer, n, budget, seed
        self.stops, self.lines = ends | lines, lines
        self.on_token = on_token or (lambda n: None)
        self._writing: dict[str, tuple[list[int], list[float]]] = {}  # tokens so far, random numbers
        self._written: dict[str, list[Sample]] = {}  # by the key of the request

    def uniforms(self, keys: list[str]) -> list[float]:
        """The random number that each sample's next token is drawn with."""
        out = []
        for key in keys:
            if key not in self._writing:
                self._writing[key] = [], uniforms(self.seed, key, self.budget).tolist()
            tokens, randoms = self._writing[key]
            out.append(randoms[len(tokens)])
        return out

    def add(self, keys: list[str], drawn: list[int]) -> list[bool]:
        """Take each sample's next token; whether it goes on."""
        going = []
        for key, token in zip(keys, drawn, strict=True):
            tokens, _ = self._writing[key]
            if not (ended := token in self.stops):
                tokens.append(token)
            going.append(not ended and len(tokens) < self.budget)
            if not going[-1]:
                line = token in self.lines
                text = chat.decode(self.tokenizer, [*tokens, token] if line else tokens, line=line)
                sample = Sample(key, text, len(tokens), ended)
                self._written.setdefault(key.rpartition("-")[0], []).append(sample)
                del self._writing[key]
        self.on_token(sum(token not in self.stops for token in drawn))
        return going

    def finished(self) -> Iterator[list[Sample]]:
        """The samples of each request that has all of them, in order; once."""
        for request in [r for r, samples in self._written.items() if len(samples) == self.n]:
            yield sorted(self._written.pop(request), key=lambda s: int(s.key.rpartition("-")[2]))


class Meter:
    """Tokens a second since it was made; for the line a notebook prints under a long cell."""

    def __init__(self):
        self.start, self.n = time.monotonic(), 0

    def __call__(self, n: int) -> None:
        self.n += n

    def __str__(self) -> str:
        seconds = time.monotonic() - self.start
        return f"{self.n:,} tokens in {seconds:.0f} s ({self.n / max(seconds, 1e-9):.0f} tok/s)"
