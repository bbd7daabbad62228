"""A ranker that does not read: bag of words and surface features, logistic regression on reply pairs.

What it gets right on `ranked_eval` is what a judge could get right without understanding a word.
"""

import re
from itertools import combinations

import numpy as np


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def _surface(prompt: str, text: str) -> list[float]:
    w, asked = _words(text), set(_words(prompt))
    n, grams = max(len(w), 1), list(zip(w, w[1:], w[2:], w[3:], strict=False))
    return [
        np.log1p(len(text)),
        np.log1p(n),
        len(text) / n,
        len(set(w)) / n,
        1 - len(set(grams)) / max(len(grams), 1),
        text.count("\n") / n,
        len(re.findall(r"^\s*(?:[-*]|\d+[.)])", text, re.M)),
        len(re.findall(r"\d", text)) / n,
        text.count(",") / n,
        text.count("!"),
        text.count("?"),
        len(re.findall(r"[.!?](?:\s|$)", text)),
        float(text.rstrip()[-1:] in ".!?\"')"),
        sum(c.isupper() for c in text) / n,
        len(asked & set(w)) / max(len(asked), 1),
        sum(x in asked for x in w) / n,
    ]


def _differences(rows: list[dict], vocabulary: dict[str, int], surface: bool) -> np.ndarray:
    """Features of the better reply minus those of the worse one, a row a pair."""
    out = []
    for row in rows:
        features = []
        for reply in row["replies"]:
            counts = np.zeros(len(vocabulary))
            for w in _words(reply["text"]):
                if w in vocabulary:
                    counts[vocabulary[w]] += 1
            features.append(
                np.concatenate([np.log1p(counts), _surface(row["prompt"], reply["text"]) if surface else []])
            )
        ranks = [reply["rank"] for reply in row["replies"]]
        for a, b in combinations(range(len(ranks)), 2):
            if ranks[a] != ranks[b]:
                out.append((features[a] - features[b]) * np.sign(ranks[b] - ranks[a]))
    return np.array(out)


def pairwise_accuracy(train: list[dict], held_out: list[dict], *, words: bool, surface: bool, l2: float) -> float:
    """Share of the held-out pairs that a ranker trained on `train` orders as they are ranked."""
    seen: dict[str, int] = {}
    for row in train if words else []:
        for reply in row["replies"]:
            for w in set(_words(reply["text"])):
                seen[w] = seen.get(w, 0) + 1
    vocabulary = {w: i for i, w in enumerate(sorted(w for w, n in seen.items() if n >= 3))}
    x, y = _differences(train, vocabulary, surface), _differences(held_out, vocabulary, surface)
    scale = np.sqrt((x**2).mean(0)) + 1e-9
    x, y = x / scale, y / scale
    weights = np.zeros(x.shape[1])
    step = 1 / (np.linalg.norm(x, 2) ** 2 / 4 / len(x) + l2)
    for _ in range(1000):
        weights += step * ((x.T @ (1 / (1 + np.exp(np.clip(x @ weights, -30, 30))))) / len(x) - l2 * weights)
    return float((y @ weights > 0).mean())
