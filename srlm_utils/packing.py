"""Token sequences that begin alike share one row, so that what they share is read, and trained, once.

EFT shows the judge several replies to one prompt, each in two formats: rubric and prompt are the same in all
of these rows, and a reply is the same in both of its formats. A packed row is the tree of such sequences'
tokens. A token sees its ancestors in the tree and nothing else, and its position is its depth, so every sequence
computes what it would compute alone (tests/test_packing.py).
"""

import random

import torch

NO_TARGET, NO_RANK = -100, -1


def tree(sequences: list[list[int]], shareable: list[int]) -> tuple[dict[str, list[int]], list[list[int]]]:
    """Merge what `sequences` of token ids begin with, the first `shareable[i]` tokens of each at most.

    Returns the tree, {"input_ids", "positions", "parents"} (lists of one length; a parent is the index of the token
    before, -1 at a start), and for each sequence the indices of its tokens in it.
    """
    ids, positions, parents = [], [], []
    seen: dict[tuple[int, int], int] = {}  # (parent, token) -> index
    paths = []
    for sequence, n in zip(sequences, shareable, strict=True):
        at, path = -1, []
        for depth, token in enumerate(sequence):
            parent, at = at, seen.get((at, token), -1) if depth < n else -1
            if at < 0:
                at = len(ids)
                ids.append(token)
                positions.append(depth)
                parents.append(parent)
                if depth < n:
                    seen[parent, token] = at
            path.append(at)
        paths.append(path)
    return {"input_ids": ids, "positions": positions, "parents": parents}, paths


def tensors(trees: list[dict], device, dtype: torch.dtype, *, n_before: int = 0) -> dict[str, torch.Tensor]:
    """What a model is called with for one padded batch of trees: "input_ids", "position_ids" and "attention_mask".

    The mask, (trees, 1, width, n_before + width), is what is added to the attention's logits, in the `dtype` that
    attention computes in. `n_before` tokens of a cache stand before all of the trees.
    """
    width = max(len(t["input_ids"]) for t in trees)
    sees = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1)  # padding, too, sees something: itself
    for tree, its in zip(trees, sees, strict=True):
        for i, parent in enumerate(tree["parents"]):
            if parent >= 0:
                its[i] |= its[parent]
    sees = torch.nn.functional.pad(sees, (n_before, 0), value=True)[:, None].to(device)
    ids, positions = (padded(trees, name, 0).to(device) for name in ("input_ids", "positions"))
    # bfloat16's least number is one of float32's too: the mask stays finite under autocast
    hidden = max(torch.finfo(dtype).min, torch.finfo(torch.bfloat16).min)
    mask = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, hidden)
    return {"input_ids": ids, "position_ids": positions + n_before, "attention_mask": mask}


def padded(trees: list[dict], name: str, fill: int) -> torch.Tensor:
    """One column of the trees, (trees, width), filled up on the right."""
    width = max(len(t[name]) for t in trees)
    return torch.tensor([t[name] + [fill] * (width - len(t[name])) for t in trees])


def pack(rows: list[dict]) -> dict:
    """One sequence out of `rows`: a `tree` with "targets" and "ranks", lists of one length.

    A row has ``input_ids`` and ``labels`` (-100 where no loss is wanted, as everywhere in transformers) and may
    have ``rank``. ``targets`` holds what a token must predict, so it stands one place before its label. ``ranks``
    holds the row's rank at its first target. Everything up to the token before the first target may be shared;
    from there on a row has its own tokens.
    """
    firsts = [next(i for i, label in enumerate(r["labels"]) if label != NO_TARGET) for r in rows]
    out, paths = tree([r["input_ids"][:-1] for r in rows], [first - 1 for first in firsts])  # the last predicts nothing
    out["targets"], out["ranks"] = [NO_TARGET] * len(out["input_ids"]), [NO_RANK] * len(out["input_ids"])
    for row, first, path in zip(rows, firsts, paths, strict=True):
        for i in range(first, len(row["labels"])):
            out["targets"][path[i - 1]] = row["labels"][i]
        out["ranks"][path[first - 1]] = row.get("rank", NO_RANK)
    return out


def sequences(rows: list[dict], size: int, *, share: bool = True) -> list[dict]:
    """Pack rows of one ``group`` together, at most `size` to a sequence; adds "kind", "n_rows" and their "ids".

    Rows without a group stand alone. `share` False packs nothing (see `attention.is_full`).
    """
    groups: dict = {}
    for i, row in enumerate(rows):
        groups.setdefault(("group", row["group"]) if share and "group" in row else i, []).append(row)
    parts = [g[i : i + size] for g in groups.values() for i in range(0, len(g), size)]
    about = [
        {"kind": "eft" if "group" in part[0] else "ift", "n_rows": len(part), "ids": [r.get("id", "?") for r in part]}
        for part in parts
    ]
    return [pack(part) | its for part, its in zip(parts, about, strict=True)]


def length_batches(rows, lengths: list[int], n_rows: list[int], size: int, rng) -> list[list[int]]:
    """Indices `rows` in batches of similar length that hold at most `size` rows by `n_rows`: little padding.

    They are shuffled into windows of ``8 * size`` and sorted by length there; the batches come window by window.
    """
    rows, batches = list(rows), []
    rng.shuffle(rows)
    for w in range(0, len(rows), 8 * size):
        batch: list[int] = []
        for i in sorted(rows[w : w + 8 * size], key=lambda i: lengths[i]):
            if batch and sum(n_rows[j] for j in batch) + n_rows[i] > size:
                batches.append(batch)
                batch = []
            batch.append(i)
        batches.append(batch)
    return batches


def micro_batches(
    packed: list[dict], size: int, epochs: range, seed: int, kinds: tuple[str, ...] = ("eft", "ift")
) -> list[list[int]]:
    """Indices of the sequences of each micro-batch, a pass for each of `epochs`, whose number seeds its order.

    A micro-batch holds sequences of one kind and of similar length, with at most `size` rows in all. Every
    sequence of these `kinds` comes once an epoch.
    """
    out = []
    lengths, n_rows = [len(s["input_ids"]) for s in packed], [s["n_rows"] for s in packed]
    for epoch in epochs:
        rng, batches = random.Random(f"{seed}:{epoch}"), []
        for kind in sorted({s["kind"] for s in packed} & {*kinds}):
            of_kind = [i for i, s in enumerate(packed) if s["kind"] == kind]
            batches += length_batches(of_kind, lengths, n_rows, size, rng)
        rng.shuffle(batches)
        out += batches
    return out


class Collator:
    """Tensors of one micro-batch; a dataset row is {"sequences": indices into `packed`, "weight": its loss's}."""

    def __init__(self, packed: list[dict], dtype: torch.dtype):
        self.packed, self.dtype = packed, dtype

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        (row,) = rows  # a dataset row is a micro-batch already
        chosen = [self.packed[i] for i in row["sequences"]]
        targets, ranks = padded(chosen, "targets", NO_TARGET), padded(chosen, "ranks", NO_RANK)
        batch = tensors(chosen, "cpu", self.dtype) | {"targets": targets, "ranks": ranks}
        lengths = [len(s["parents"]) for s in chosen]
        if all(s["parents"] == list(range(-1, len(s["parents"]) - 1)) for s in chosen):
            # nothing branches: models whose attention is not plain make their own mask
            batch["attention_mask"] = (torch.arange(targets.shape[1]) < torch.tensor(lengths)[:, None]).long()
        return batch | {"sequences": row["sequences"], "lengths": lengths, "weight": row["weight"]}
