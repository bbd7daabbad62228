"""The frozen layers' output, kept: what does not learn computes the same in every pass over the rows.

With `lora_layers` the layers below the first adapter never change. What they make of a row is kept in main memory when
the row is first read, and read from there in later passes (and after DPO's reference pass). `benchmarks/` has what it
gains.
"""

import contextlib
from collections.abc import Hashable

import torch

from srlm_utils.resources import free_memory


class Kept:
    """Output of the last frozen layer of `model` (a peft model) by row, each (tokens, hidden size)."""

    def __init__(self, model):
        self.rows: dict[Hashable, torch.Tensor] = {}
        self._now: tuple[list[Hashable], list[int]] | None = None
        layers = model.get_base_model().get_decoder().layers
        learns = (any(p.requires_grad for p in layer.parameters()) for layer in layers)
        frozen = layers[: next((i for i, does in enumerate(learns) if does), 0)]
        for layer in frozen:
            self._wrap(layer, last=layer is frozen[-1])

    @contextlib.contextmanager
    def reading(self, keys: list[Hashable], lengths: list[int]):
        """The forward pass inside is of these rows, padded on the right; ``lengths[i]`` tokens of row i are its own."""
        self._now = keys, lengths
        try:
            yield
        finally:
            self._now = None

    def _wrap(self, layer, *, last: bool) -> None:
        compute = layer.forward

        def forward(hidden, *args, **kwargs):
            if not self._now:
                return compute(hidden, *args, **kwargs)
            keys, lengths = self._now
            if not all(key in self.rows for key in keys):
                out = compute(hidden, *args, **kwargs)
                if last:
                    for key, length, of_row in zip(keys, lengths, out.detach(), strict=True):
                        self.rows[key] = of_row[:length].to("cpu", copy=True)
                return out
            if not last:
                return hidden  # nobody reads it
            rows = [self.rows[key].to(hidden.device, non_blocking=True) for key in keys]
            rows = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            return torch.nn.functional.pad(rows, (0, 0, 0, hidden.shape[1] - rows.shape[1]))

        layer.forward = forward


def keep(trainer, params, n_tokens: int, passes: int):
    """A `Kept` for a trainer's model, or None where there is nothing to gain or no room for `n_tokens`."""
    config = trainer.model.config.get_text_config()
    size = n_tokens * config.hidden_size * trainer.model.dtype.itemsize
    if not (params.lora_r and params.lora_layers) or passes < 2 or 2 * size > free_memory():
        return None
    if not hasattr(trainer.model.get_base_model().get_decoder(), "layers"):  # as GPT-2, whose blocks are "h"
        return None
    # gradient checkpointing sends gradients through all layers; dropout makes every pass another; under FSDP all
    # processes have to ask for the same layers
    dropout = any(
        value and isinstance(value, float) and ("drop" in name)
        for name, value in config.to_dict().items()
        if name != "classifier_dropout"
    )
    if params.gradient_checkpointing or dropout or trainer.args.world_size > 1:
        return None
    return Kept(trainer.model)
