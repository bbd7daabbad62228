"""``make bench``: ratios measured in this run, as a table, benchmarks/latest.json and a figure.

``python -m benchmarks training`` measures one part and keeps the other rows of latest.json.
"""

import platform
import sys
import time
from pathlib import Path

import pandas as pd

from benchmarks import generation, judging, loop, measure, scale, training
from srlm_utils import step
from srlm_utils.artefacts import read_json, write_json
from srlm_utils.devices import cpu_features, pick_device, pick_dtype

HERE = Path(__file__).parent
PARTS = {
    "generation": generation.rows,
    "judging": judging.rows,
    "training": training.rows,
    "loop": lambda _: loop.rows(),
    "scale": scale.rows,
}


def machine() -> dict:
    """What the figures were measured on."""
    import torch

    has = [name for name, on in cpu_features().items() if on is True]
    return {
        "processor": platform.machine(),
        "features": [f for f in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if f in has],
        "threads": torch.get_num_threads(),
        "device": pick_device(),
        "dtype": pick_dtype(),
        "versions": step.versions(),
    }


def figure(rows: list[dict], path: Path) -> None:
    """How far each row is beyond its target, on a logarithmic axis; the bar is from the lowest to the highest round."""
    import matplotlib.pyplot as plt

    rows = [r for r in rows if r.get("ratio") and r.get("target")][::-1]
    fig, ax = plt.subplots(figsize=(8, 0.45 * len(rows) + 1.2), layout="constrained")
    for y, r in enumerate(rows):
        values = [r["ratio"], r["low"], r["high"]]
        scaled = [r["target"] / v if r["lower_is_better"] else v / r["target"] for v in values]
        good = scaled[0] >= 1
        ax.plot(sorted(scaled[1:]), [y, y], color="#999999", lw=4, solid_capstyle="round", zorder=1)
        ax.plot(scaled[0], y, "o" if good else "X", color="#0072B2" if good else "#D55E00", ms=8, zorder=2)
        least = "at most" if r["lower_is_better"] else "at least"
        ax.annotate(
            f"{r['ratio']:g} ({least} {r['target']:g})", (scaled[0], y), (8, 5), textcoords="offset points", fontsize=8
        )
    ax.axvline(1, color="black", lw=1)
    ax.set_xscale("log")
    ax.set_xlim(right=ax.get_xlim()[1] * 1.8)
    ax.set_yticks(range(len(rows)), [r["name"] for r in rows])
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("{x:g}")
    ax.set_xlabel("times its target (right of the line is better)\ndot: median of the rounds, bar: lowest to highest")
    fig.savefig(path, dpi=150)


def main(parts: list[str]) -> int:
    unknown = set(parts) - set(PARTS)
    if unknown:
        print(f"no part {sorted(unknown)[0]!r}; there are {', '.join(PARTS)}.")
        return 2
    latest, rows = HERE / "latest.json", {}
    if parts and latest.is_file():
        rows = {r["name"]: r for r in read_json(latest)["rows"]}
    limit = measure.limits()
    print(f"limits: {limit}", flush=True)
    for name in parts or PARTS:
        print(f"{name} ...", flush=True)
        for r in PARTS[name](limit):
            rows[r["name"]] = r | {"measured": time.strftime("%F")}
        write_json(
            latest, {"date": time.strftime("%F"), "machine": machine(), "limits": limit, "rows": [*rows.values()]}
        )
    table = pd.DataFrame([*rows.values()])
    columns = ["name", "ratio", "low", "high", "target", "lower_is_better", "rate", "rate_of_other", "unit", "of_limit"]
    print(table.reindex(columns=columns).fillna("").to_string(index=False))
    figure([*rows.values()], HERE / "latest.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
