"""Micro-benchmarks for the design of the CPU backend: the operator, the merge, the rotation, the planner, padding.

    python -m scripts.micro [--threads 1] [--heads 9/3x64] [--model smollm2-135m]

Each line is a median of several runs in processor time, which other work on the machine
disturbs less than wall-clock time. docs/internals/cpu-kernel.md draws the conclusions.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

import posenc
from posenc.bench.cases import STRATEGIES, BenchCase
from posenc.bench.model import Prefill, make_model, padded_batch
from posenc.bench.padded import RowByRow
from posenc.bench.shapes import SHAPES, Heads, row_lengths
from posenc.kernels.cpu.calls import flash_calls
from posenc.kernels.cpu.flash_operator import flash
from posenc.kernels.merge import merge_into
from posenc.positions import PositionStrategy

RUNS = 7


def seconds(work: Callable[[], object]) -> float:
    """Return the median processor time of a call, after one warm-up call."""
    work()
    times = []
    for _ in range(RUNS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


def operator(heads: Heads) -> None:
    """Time an attended pair in calls of several shapes: causal squares are computed in blocks of 512 whole keys."""
    print("flash operator, ns per attended pair")
    for blocks, q_len, k_len, causal in [
        (1, 4096, 4096, False),
        (1, 1024, 4096, False),
        (1, 256, 4096, False),
        (1, 4096, 4096, True),
        (4, 1024, 1024, True),
        (8, 512, 512, True),
        (16, 256, 256, True),
        (32, 128, 128, True),
        (32, 128, 128, False),
        (64, 64, 64, True),
    ]:
        q, k, v = tensors(heads, blocks, q_len, k_len)
        used = seconds(partial(flash, q, k, v, 0.0, causal))
        pairs = blocks * heads.query * (q_len * (q_len + 1) // 2 if causal else q_len * k_len)
        shape = f"{blocks} x {q_len} x {k_len}{' causal' if causal else ''}"
        print(f"  {shape:26} {used / pairs * 1e9:6.2f}")


def bands(heads: Heads) -> None:
    """Time a band as blocks of queries under one mask, and as two causal triangles per ``width`` queries."""
    print("band of 4096 queries, ns per query and head")
    for width in (128, 256, 512, 1024, 2048):
        line = []
        for rows in (32, 64, 128, 256):
            q, k, v = tensors(heads, 4096 // rows, rows, rows + width)
            row, key = torch.arange(rows)[:, None], torch.arange(rows + width)
            bias = torch.zeros(rows, rows + width).masked_fill((key <= row) | (key > row + width), float("-inf"))
            used = seconds(partial(flash, q, k, v, 0.0, False, attn_mask=bias[None, None]))
            line.append(f"{rows} rows {used / 4096 / heads.query * 1e9:6.0f}")
        q, k, v = tensors(heads, 4096 // width, width, width)
        used = 2 * seconds(partial(flash, q, k, v, 0.0, True))
        print(f"  width {width:5}  {'  '.join(line)}  two triangles {used / 4096 / heads.query * 1e9:6.0f}")


def merging(heads: Heads) -> None:
    """Time the merge, in place and as sums of fresh products."""
    print("merge and fresh memory, ns per query and head")
    for length in (1024, 4096, 16384):
        out, new = torch.randn(2, 1, heads.query, length, heads.dim)
        lse, new_lse = torch.randn(2, 1, heads.query, length)
        rows = length * heads.query
        in_place = seconds(partial(merge_into, out, lse, new, new_lse, first=False)) / rows * 1e9
        fresh = seconds(partial(weighted_sum, out, new, lse[..., None])) / rows * 1e9
        pages = seconds(partial(fresh_zeros, out)) / rows * 1e9
        numbers = f"in place {in_place:5.1f}  fresh products {fresh:5.1f}  zeroing fresh memory {pages:5.1f}"
        print(f"  {length:6} tokens  {numbers}")


def weighted_sum(one: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    """Add two outputs as a merge does, in fresh memory."""
    return one * weight + other * weight


def fresh_zeros(like: Tensor) -> Tensor:
    """Fill fresh memory with zeros."""
    return torch.empty_like(like).zero_()


def rotation(heads: Heads) -> None:
    """Time one rotation of the queries: products and sums of halves, and in place."""
    print("rotation of the queries, ns per query and head")
    rotary = posenc.Rotary.from_theta(1e4, heads.dim)
    for length in (1024, 4096, 16384):
        q = torch.randn(1, heads.query, length, heads.dim)
        cos, sin = rotary.tables(np.arange(length))
        both, rows = rotary.both(cos), length * heads.query
        ours = seconds(partial(rotary.rotate, q, both, sin)) / rows * 1e9
        space = torch.empty_like(q)
        into = seconds(partial(rotary.rotate, q, both, sin, out=space)) / rows * 1e9
        stock = seconds(partial(rotary.rotate_as_stock, q, torch.arange(length)[None])) / rows * 1e9
        print(
            f"  {length:6} tokens  ours {ours:6.1f}  into memory of its own {into:6.1f}  as transformers {stock:6.1f}"
        )


def planning() -> None:
    """Time making a plan and its kernel calls, which happens once per prompt."""
    print("plan and calls of 16384 tokens, ms")
    for name in STRATEGIES:
        params = {"mapping": 3072} if name == "lampe" else {}
        strategy = posenc.strategy(name, window=4096, **params)
        plan_time = seconds(partial(strategy.plan, 16384))
        both = seconds(partial(plan_and_calls, strategy))
        print(f"  {name:12} plan {plan_time * 1e3:5.2f}  calls {(both - plan_time) * 1e3:5.2f}")


def plan_and_calls(strategy: PositionStrategy) -> object:
    """Make a plan and its kernel calls."""
    return flash_calls(strategy.plan(16384), 16384)


def padding(shape: str) -> None:
    """Time a padded batch against its rows without attention: linear layers compute the padding too."""
    from transformers import AttentionInterface

    def no_attention(module: object, q: Tensor, k: Tensor, v: Tensor, *rest: object, **options: object) -> Any:
        return torch.zeros_like(q).transpose(1, 2), None

    AttentionInterface.register("no_attention", no_attention)
    case = BenchCase("padded", shape, "float32", torch.get_num_threads(), 2048, 512, "rope", "auto")
    model = make_model(case)
    model.set_attn_implementation("no_attention")
    rows = [torch.ones((1, length), dtype=torch.long) for length in row_lengths(case.length)]
    ratio = seconds(padded_batch(model, rows)) / seconds(RowByRow([Prefill(model, row) for row in rows]))
    print("padded batch through a model without attention")
    print(f"  rows of {', '.join(str(row.shape[1]) for row in rows)} tokens  {ratio:.2f} times the rows alone")


def tensors(heads: Heads, batch: int, q_len: int, k_len: int) -> list[Tensor]:
    """Return random query, key and value tensors."""
    shapes = ((heads.query, q_len), (heads.key, k_len), (heads.key, k_len))
    return [torch.randn(batch, count, length, heads.dim) for count, length in shapes]


@click.command()
@click.option("--threads", default=1, show_default=True)
@click.option("--heads", default="9/3x64", show_default=True)
@click.option("--model", default="smollm2-135m", type=click.Choice(list(SHAPES)), show_default=True)
def main(threads: int, heads: str, model: str) -> None:
    """Print every micro-benchmark."""
    torch.set_num_threads(threads)
    shape = Heads.parse(heads)
    with torch.no_grad():
        for part in (operator, bands, merging, rotation):
            part(shape)
        padding(model)
    planning()


if __name__ == "__main__":
    main()
