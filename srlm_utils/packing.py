"""Rows that begin alike share one sequence, so that what they share is read and trained once.

EFT shows the judge several replies to one prompt, each in two formats: rubric and prompt are the same in all
of these rows, and a reply is the same in both of its formats. A packed sequence is the tree of such rows'
tokens. A token sees its ancestors in the tree and nothing else, and its position is its depth, so every row
computes what it would compute alone (tests/test_packing.py).
"""

import random

import torch

NO_TARGET, NO_RANK = -100, -1


def pack(rows: list[dict]) -> dict:
    """One sequence out of `rows`: {"input_ids", "positions", "parents", "targets", "ranks"}, lists of one length.

    A row has ``input_ids`` and ``labels`` (-100 where no loss is wanted, as everywhere in transformers) and may
    have ``rank``. ``parents`` holds the index of the token before, -1 at a start. ``targets`` holds what a token
    must predict, so it stands one place before its label. ``ranks`` holds the row's rank at its first target.
    Everything up to the token before the first target may be shared; from there on a row has its own tokens.
    """
    out: dict[str, list[int]] = {k: [] for k in ("input_ids", "positions", "parents", "targets", "ranks")}

    def add(token, depth, parent, target=NO_TARGET, rank=NO_RANK) -> int:
        for column, value in zip(out.values(), (token, depth, parent, target, rank), strict=True):
            column.append(value)
        return len(out["input_ids"]) - 1

    seen: dict[tuple[int, int], int] = {}  # (parent, token) -> index
    for row in rows:
        ids, labels = row["input_ids"], row["labels"]
        own = next(i for i, label in enumerate(labels) if label != NO_TARGET) - 1
        at = -1
        for depth, token in enumerate(ids[:own]):
            if (at, token) not in seen:
                seen[at, token] = add(token, depth, at)
            at = seen[at, token]
        for depth in range(own, len(ids) - 1):  # the last token predicts nothing
            rank = row.get("rank", NO_RANK) if depth == own else NO_RANK
            at = add(ids[depth], depth, at, labels[depth + 1], rank)
    return out


def sequences(rows: list[dict], size: int, *, share: bool = True) -> list[dict]:
    """Pack rows of one ``group`` together, at most `size` to a sequence; adds "kind" and "n_rows".

    Rows without a group stand alone. `share` False packs nothing (see `train.can_share`).
    """
    groups: dict = {}
    for i, row in enumerate(rows):
        groups.setdefault(("group", row["group"]) if share and "group" in row else i, []).append(row)
    parts = [g[i : i + size] for g in groups.values() for i in range(0, len(g), size)]
    return [pack(part) | {"kind": "eft" if "group" in part[0] else "ift", "n_rows": len(part)} for part in parts]


def length_batches(rows, lengths: list[int], n_rows: list[int], size: int, rng) -> list[list[int]]:
    """Indices `rows` in batches of similar length that hold at most `size` rows by `n_rows`: little padding.

    They are shuffled into length windows of eight batches; the batches come window by window.
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


def micro_batches(packed: list[dict], size: int, epochs: int, seed: int) -> list[list[int]]:
    """Indices of the sequences of each micro-batch, for `epochs` passes, in a seeded order.

    A micro-batch holds sequences of one kind and of similar length, with at most `size` rows in all. Every
    sequence comes once an epoch.
    """
    out = []
    lengths, n_rows = [len(s["input_ids"]) for s in packed], [s["n_rows"] for s in packed]
    for epoch in range(epochs):
        rng, batches = random.Random(f"{seed}:{epoch}"), []
        for kind in sorted({s["kind"] for s in packed}):
            of_kind = [i for i, s in enumerate(packed) if s["kind"] == kind]
            batches += length_batches(of_kind, lengths, n_rows, size, rng)
        rng.shuffle(batches)
        out += batches
    return out


class Collator:
    """Tensors of one micro-batch, padded on the left; a dataset row is {"sequences": indices into `packed`}."""

    def __init__(self, packed: list[dict], pad_id: int):
        self.packed, self.pad_id = packed, pad_id

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        (row,) = rows  # a dataset row is a micro-batch already
        chosen = [self.packed[i] for i in row["sequences"]]
        width = max(len(s["input_ids"]) for s in chosen)

        def padded(name: str, fill: int) -> torch.Tensor:
            return torch.tensor([[fill] * (width - len(s[name])) + s[name] for s in chosen])

        return {
            "input_ids": padded("input_ids", self.pad_id),
            "position_ids": padded("positions", 0),
            "attention_mask": self._mask(chosen, width),
            "targets": padded("targets", NO_TARGET),
            "ranks": padded("ranks", NO_RANK),
        }

    @staticmethod
    def _mask(chosen: list[dict], width: int) -> torch.Tensor:
        """What attention sees: (rows, width) of 0 and 1 where no sequence branches, else what is added to its
        logits, (rows, 1, width, width)."""
        lengths = [len(s["parents"]) for s in chosen]
        if all(s["parents"] == list(range(-1, n - 1)) for s, n in zip(chosen, lengths, strict=True)):
            return torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
        sees = torch.eye(width, dtype=torch.bool).repeat(len(chosen), 1, 1)  # padding sees itself: no empty row
        for b, s in enumerate(chosen):
            left = width - len(s["parents"])
            for i, parent in enumerate(s["parents"]):
                if parent >= 0:
                    sees[b, left + i] |= sees[b, left + parent]
        # bfloat16's least number is one of float32's too: the mask stays finite under autocast
        return torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.bfloat16).min)[:, None]
