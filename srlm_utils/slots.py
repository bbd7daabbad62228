"""Keys and values of a batch whose rows come and go: what continuous batching decodes with.

Each row has a slot, filled when its prompt has been read and refilled when its text has ended. A slot's tokens stand at
its beginning, and attention reads all slots up to the longest, hiding what lies behind each one's end.
"""

import weakref

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

BLOCK = 32  # all slots are made longer, or shorter, by so many tokens at once


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, (slots, heads, capacity, d); `owner` knows where the next token goes.

    Matrix products want them in one piece, and fresh memory is slow to touch: so they lie at the beginning of memory
    that is taken once, for slots as long as they will ever be.
    """

    is_sliding = False

    def __init__(self, owner: "Slots"):
        super().__init__()
        self.owner = weakref.proxy(owner)  # or a gigabyte would wait in a cycle for the garbage collector

    def lazy_initialization(self, key_states, value_states) -> None:
        n, heads, _, d = key_states.shape
        size = self.owner.n * heads * self.owner.longest
        self._memory = [x.new_empty(size * x.shape[3]) for x in (key_states, value_states)]
        self.keys, self.values = (x.new_zeros(self.owner.n, heads, 0, x.shape[3]) for x in (key_states, value_states))
        self.is_initialized = True

    def reshape(self, capacity: int, slots: torch.Tensor | None = None) -> None:
        """Keep `slots` (None: all), each with room for `capacity` tokens."""
        both = []
        for stored, memory in zip((self.keys, self.values), self._memory, strict=True):
            # copied, as it lies where what is made of it will lie
            kept = stored.clone() if slots is None else stored[slots, :, :capacity]
            n, heads, old, d = kept.shape
            both.append(memory[: n * heads * capacity * d].view(n, heads, capacity, d))
            both[-1][:, :, :old] = kept
            both[-1][:, :, old:] = 0  # the mask hides it, but what is no number shows through
        self.keys, self.values = both

    def update(self, key_states, value_states, *args, **kwargs):
        at = self.owner.next_rows(key_states.shape[1])
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            stored.view(-1, stored.shape[3]).index_copy_(0, at, new.reshape(-1, new.shape[3]))
        return self.keys, self.values

    def get_mask_sizes(self, query_length):
        return self.owner.capacity, 0

    def get_seq_length(self):
        return self.owner.capacity

    def get_max_length(self):
        return -1  # none: slots grow


class Slots(Cache):
    """`n` slots of at most `longest` tokens, for a model of full attention (`attention.is_full`). `lengths`: tokens in
    each, (n,)."""

    def __init__(self, model, n: int, longest: int):
        super().__init__(layers=[])
        self.model, self.n, self.longest, self.capacity = model, n, blocks(longest), 0
        self.lengths = torch.zeros(n, dtype=torch.long, device=model.device)
        self.mask = torch.empty(n, 1, 1, 0, dtype=model.dtype, device=model.device)
        self._next: dict[int, torch.Tensor] = {}

    def next_rows(self, heads: int) -> torch.Tensor:
        """Where each slot's and head's next token goes, in a (slots * heads * capacity, d) view of a layer."""
        if heads not in self._next:
            first = torch.arange(self.n * heads, device=self.lengths.device) * self.capacity
            self._next[heads] = first + self.lengths.repeat_interleave(heads)
        return self._next[heads]

    def put(self, slots: list[list[int]], reading) -> None:
        """Fill slots with the prompts of a `prefill.Reading`: ``slots[i]`` are all filled with its i-th."""
        if not self.layers:
            self.layers = [_Layer(self) for _ in reading.cache.layers]
            for layer, source in zip(self.layers, reading.cache.layers, strict=True):
                layer.lazy_initialization(source.keys, source.values)
        self._reserve(max(reading.lengths) + 1)
        to, (row, column) = torch.tensor(slots, device=self.lengths.device), reading.where
        for layer, source in zip(self.layers, reading.cache.layers, strict=True):
            for stored, read in ((layer.keys, source.keys), (layer.values, source.values)):
                prompts = read[row, :, column].transpose(1, 2)
                for copy in to.unbind(1):
                    stored[copy, :, : prompts.shape[2]] = prompts
        self.lengths[to] = torch.tensor(reading.lengths, device=self.lengths.device)[:, None]
        hidden = torch.arange(self.capacity, device=self.lengths.device) >= self.lengths[to.flatten(), None]
        self.mask[to.flatten(), 0, 0] = self.mask.new_zeros(hidden.shape).masked_fill(hidden, self._hide)

    def step(self, tokens: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        """Logits, (alive slots, vocabulary), behind one more token in each. Slots that are not `alive` (n,) stay as
        they are: what they are given is written where the next token will be, and read by nobody."""
        self._reserve(int(self.lengths.max()) + 1)
        self._next.clear()
        self.mask.view(self.n, -1).scatter_(1, self.lengths[:, None], 0.0)
        out = self.model(
            input_ids=tokens[:, None],
            attention_mask=self.mask,
            position_ids=self.lengths[:, None],
            past_key_values=self,
            use_cache=True,
            logits_to_keep=alive[:, None],
        )
        self.lengths += alive
        return out.logits

    def keep(self, slots: torch.Tensor) -> None:
        """Go on with these slots alone, in this order."""
        self.lengths = self.lengths[slots]
        self.n = len(slots)
        self.capacity = min(self.capacity, blocks(int(self.lengths.max()) + 1))
        self.mask = self.mask[slots, :, :, : self.capacity].contiguous()
        for layer in self.layers:
            layer.reshape(self.capacity, slots)

    @property
    def _hide(self) -> float:
        return torch.finfo(self.mask.dtype).min

    def _reserve(self, length: int) -> None:
        capacity = blocks(length)
        if capacity <= self.capacity:
            return
        self.mask = torch.nn.functional.pad(self.mask, (0, capacity - self.capacity), value=self._hide)
        for layer in self.layers:
            layer.reshape(capacity)
        self.capacity = capacity


def blocks(length: int) -> int:
    """`length`, rounded up to whole blocks."""
    return -(-length // BLOCK) * BLOCK
