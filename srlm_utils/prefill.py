"""Reading prompts: in packed rows, so that what prompts begin with alike is read once."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from srlm_utils import packing, vocabulary

# A token attends to its whole row, so a prompt joins a row that holds less than so many tokens, and only if it finds
# an eighth of itself there.
ROW_TOKENS = 512
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}  # read in one forward pass, at most, unless one prompt is longer


@dataclass
class Reading:
    """Some of the prompts, read: their numbers, the logits behind each (prompts, vocabulary), and where in `cache`
    each one's tokens stand (2, prompts, longest): row and column, of which the first `lengths` are meant."""

    prompts: list[int]
    logits: torch.Tensor
    cache: DynamicCache
    where: torch.Tensor
    lengths: list[int]


def read(
    model,
    prompts: list[list[int]],
    most: int = 0,
    begin: Callable[[list[int]], None] = lambda numbers: None,
    choices: Sequence[int] = (),
) -> Iterator[Reading]:
    """Read `prompts` (token ids) with a model of full attention (`attention.is_full`), in batches of at most `most`
    (0: what `BATCH_TOKENS` holds). `begin` is told the numbers of those that are about to be read; the logits of the
    token ids `choices` are `vocabulary.unrounded`.

    What all of them begin with is read first, by itself. The rest is packed: in order of their tokens, neighbours
    share most, and a row holds the tree of a few neighbours.
    """
    head = os.path.commonprefix([ids[:-1] for ids in prompts])  # each keeps a token to ask with
    past = None
    if head:
        begin([0])  # a part of each of them: what does not fit now fits with none
        past = model(input_ids=torch.tensor([head], device=model.device), use_cache=True, logits_to_keep=1)
        past = past.past_key_values
    rests = [ids[len(head) :] for ids in prompts]
    most = most or len(prompts)
    for batch in _batches(_rows(rests, most), BATCH_TOKENS.get(model.device.type, 1024), most):
        begin([i for row in batch for i in row])
        yield _read(model, rests, batch, head, past, choices)


def _rows(prompts: list[list[int]], most: int) -> list[tuple[list[int], int]]:
    """(numbers of the prompts of a row, its tokens), up to `most` neighbours in the order of their tokens together."""
    rows: list[tuple[list[int], int]] = []
    before: list[int] = []
    for i in sorted(range(len(prompts)), key=prompts.__getitem__):
        shared = len(os.path.commonprefix([before, prompts[i]]))
        new = len(prompts[i]) - shared
        fits = rows and rows[-1][1] + new <= ROW_TOKENS and len(rows[-1][0]) < most
        if fits and 8 * shared >= len(prompts[i]):
            rows[-1] = (rows[-1][0] + [i], rows[-1][1] + new)
        else:
            rows.append(([i], len(prompts[i])))
        before = prompts[i]
    return rows


def _batches(rows: list[tuple[list[int], int]], budget: int, most: int) -> Iterator[list[list[int]]]:
    """Rows of similar length, as many as fit into `budget` tokens with their padding and hold `most` prompts."""
    batch: list[list[int]] = []
    widest = 0
    for row, length in sorted(rows, key=lambda r: -r[1]):
        if batch and ((len(batch) + 1) * widest > budget or sum(map(len, batch)) + len(row) > most):
            yield batch
            batch = []
        widest = widest if batch else length
        batch.append(row)
    if batch:
        yield batch


def _read(model, rests: list[list[int]], batch: list[list[int]], head: list[int], past, choices) -> Reading:
    trees, device = [packing.tree([rests[i] for i in row], [len(rests[i]) for i in row]) for row in batch], model.device
    inputs = packing.tensors([t for t, _ in trees], device, model.dtype, n_before=len(head))
    cache = DynamicCache()
    for i, layer in enumerate(past.layers if past else []):
        cache.update(*(x.expand(len(trees), -1, -1, -1) for x in (layer.keys, layer.values)), i)

    paths = [(row, path) for row, (_, of_row) in enumerate(trees) for path in of_row]
    ends = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
    for row, path in paths:
        ends[row, path[-1]] = True
    with vocabulary.unrounded(model, choices):
        logits = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=ends.to(device)).logits
    number = ends.flatten().cumsum(0).view(ends.shape) - 1  # of an end's row in the logits: equal prompts have one
    asked = torch.tensor([int(number[row, path[-1]]) for row, path in paths], device=device)
    where = torch.zeros(2, len(paths), len(head) + max(len(path) for _, path in paths), dtype=torch.long)
    for i, (row, path) in enumerate(paths):
        where[0, i] = row
        where[1, i, : len(head) + len(path)] = torch.tensor([*range(len(head)), *(len(head) + at for at in path)])
    return Reading(
        [i for row in batch for i in row],
        logits.view(-1, logits.shape[-1])[asked],
        cache,
        where.to(device),
        [len(head) + len(path) for _, path in paths],
    )
