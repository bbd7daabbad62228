"""Rates measured in turn in one run, and the ratios between them."""

import statistics
import time
from collections.abc import Callable

import torch

from srlm_utils.artefacts import read_jsonl
from srlm_utils.devices import pick_device, pick_dtype
from srlm_utils.paths import seed_path

REPEATS = 3


def bundled(name: str) -> list[dict]:
    """Rows of a bundled seed file."""
    return read_jsonl(seed_path(name))


def in_turn(cases: dict[str, Callable[[], float]], repeats: int = REPEATS) -> dict[str, list[float]]:
    """Units a second of every case, once a round, so that a slow minute of the machine meets all of them alike.

    A case does its work and returns how many units (tokens, judgements) it did.
    """
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(repeats):
        for name, case in cases.items():
            start = time.perf_counter()
            n = case()
            rates[name].append(n / (time.perf_counter() - start))
            print(f"  round {i + 1}: {name} {rates[name][-1]:,.4g}/s", flush=True)
    return rates


def row(name: str, values: list[float], target: float | None, *, lower_is_better: bool = False, **more) -> dict:
    """One row of the table: median, lowest and highest of `values`, and what it should reach."""
    middle = statistics.median(values)
    figures = {"ratio": round(middle, 3), "low": round(min(values), 3), "high": round(max(values), 3)}
    return {"name": name} | figures | {"target": target, "lower_is_better": lower_is_better} | more


def ratio(name: str, rates: dict[str, list[float]], ours: str, theirs: str, target: float | None, **more) -> dict:
    """A row of how many times the rate of `theirs` that of `ours` is, round by round."""
    values = [a / b for a, b in zip(rates[ours], rates[theirs], strict=True)]
    both = {
        "rate": round(statistics.median(rates[ours]), 2),
        "rate_of_other": round(statistics.median(rates[theirs]), 2),
    }
    return row(name, values, target, ours=ours, other=theirs, **both, **more)


def limits() -> dict[str, float]:
    """What the device that the kit picks could do: GFLOP/s of a matrix product in its dtype, GB/s of a memory copy."""
    device = pick_device()
    how = {"dtype": getattr(torch, pick_dtype()), "device": device}
    x, w = torch.randn(512, 576, **how), torch.randn(1536, 576, **how)
    a = torch.empty(100_000_000, dtype=torch.uint8, device=device)
    done = torch.cuda.synchronize if device == "cuda" else lambda: None  # a call there returns before it is done
    b = torch.empty_like(a)

    def middle(f, n):
        times = []
        for _ in range(7):
            done()
            start = time.perf_counter()
            for _ in range(n):
                f()
            done()
            times.append((time.perf_counter() - start) / n)
        return statistics.median(times)

    with torch.inference_mode():
        product = middle(lambda: torch.nn.functional.linear(x, w), 20)
        copy = middle(lambda: b.copy_(a), 3)
    return {"matmul_gflops": round(2 * 512 * 576 * 1536 / product / 1e9, 1), "copy_gb_s": round(0.2 / copy, 1)}


def fraction(tokens_a_second: float, parameters: int, passes: float, gflops: float) -> float:
    """Share of the matrix product's limit: 2 FLOP a parameter and token, `passes` times (1 forward)."""
    return round(tokens_a_second * 2 * parameters * passes / 1e9 / gflops, 3)
