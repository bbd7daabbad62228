"""Which of a training's compared steps is kept, by the comparisons alone (`checkpoints` says how they are made)."""

import math

COLUMNS = ["step", "compared_with", "win_rate", "low", "high", "n", "ties", "kept"]


def strengths(rows: list[dict]) -> dict[int, float]:
    """Log-odds of each step's answers against those of step 0; half a win is added to both sides of a comparison."""
    out = {0: 0.0}
    for r in rows:
        wins = r["win_rate"] * r["n"]
        out[r["step"]] = out[r["compared_with"]] + math.log((wins + 0.5) / (r["n"] - wins + 0.5))
    return out


def best(rows: list[dict]) -> int:
    """The step that is kept of those compared so far."""
    strength = strengths(rows)
    return max((r["step"] for r in rows), key=lambda s: (round(strength[s], 9), -s))
