"""Remapped attention against torch's plain causal SDPA, rotation included on both sides.

    python benchmarks/attention.py --threads 1 2 --lengths 2048 4096 8192 16384

Every round runs plain and remapped attention one after the other; the table shows medians over the
rounds and the ratio of each pair, so that a machine that drifts disturbs both alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import posenc

STRATEGIES = {
    "lampe": {},
    "self_extend": {},
    "rerope": {},
    "dca": {},
    "string": {},
}
WINDOW_SHARE = 4  # the pretraining window is a quarter of the length, so that every segment is at work


def plain(q: Tensor, k: Tensor, v: Tensor, rotary: posenc.Rotary) -> Callable[[], Tensor]:
    """Stock attention: rotate with fp32 tables, one causal SDPA."""
    cos, sin = rotary.tables(torch.arange(q.shape[2]).numpy())

    def run() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            rotary.rotate(q, cos, sin), rotary.rotate(k, cos, sin), v, is_causal=True, enable_gqa=True
        )

    return run


def measure(calls: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, interleaved round by round, after one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--strategies", nargs="+", default=["lampe"], choices=sorted(STRATEGIES))
    parser.add_argument("--heads", type=int, nargs=3, default=[9, 3, 64], metavar=("HQ", "HKV", "D"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    heads, kv_heads, dim = args.heads
    rotary = posenc.Rotary.from_theta(1e4, dim)
    results = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for length in args.lengths:
            q, k, v = (torch.randn(1, h, length, dim) for h in (heads, kv_heads, kv_heads))
            calls: dict[str, Callable[[], Tensor]] = {"plain": plain(q, k, v, rotary)}
            window = length // WINDOW_SHARE
            for name in args.strategies:
                params = {"mapping": int(0.75 * window)} if name == "lampe" else {}
                plan = posenc.strategy(name, window=window, **params).plan(length)
                calls[name] = partial(posenc.attention, q, k, v, plan, rotary, backend="cpu_flash")
            with torch.inference_mode():
                seconds = measure(calls, args.rounds)
            for name in args.strategies:
                ratios = [b / a for a, b in zip(seconds["plain"], seconds[name], strict=True)]
                results.append(
                    {
                        "threads": threads,
                        "length": length,
                        "strategy": name,
                        "plain_ms": round(statistics.median(seconds["plain"]) * 1e3, 2),
                        "remapped_ms": round(statistics.median(seconds[name]) * 1e3, 2),
                        "ratio": round(statistics.median(ratios), 3),
                        "ratio_spread": [round(min(ratios), 3), round(max(ratios), 3)],
                    }
                )
    machine = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "heads": args.heads,
        "rounds": args.rounds,
    }
    if args.json:
        print(json.dumps({"machine": machine, "results": results}, indent=2))
        return
    print(machine)
    print(f"{'threads':>7} {'length':>7} {'strategy':<12} {'plain ms':>10} {'ms':>10} {'ratio':>7}  spread")
    for r in results:
        low, high = r["ratio_spread"]
        print(
            f"{r['threads']:>7} {r['length']:>7} {r['strategy']:<12} {r['plain_ms']:>10.2f} {r['remapped_ms']:>10.2f} "
            f"{r['ratio']:>7.3f}  {low:.3f} .. {high:.3f}"
        )


if __name__ == "__main__":
    main()
