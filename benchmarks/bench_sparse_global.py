"""What the sparse strategies and the dual stream cost on a CPU.

    python benchmarks/bench_sparse_global.py

Operators: one exchange among all frames, tokens [1, T, 2, P, 3, h, D] with 8 to 512 frames: dense global attention, the
memory bank (a write and a read), landmarks, neighbour frames. Correctness first, against float64 at the smallest size.
The exponent is the slope of log(time) over log(frames), from 32 frames on: 1 is linear in T N. Memory is what an
exchange allocates for one frame more: its results and lists (no strategy copies keys). Dense attention stops where a
call would take over --limit seconds.

Model: an aggregator with its patch embedding, with one stream and with two, 8 frames; the goal is a ratio of 1.85.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vggt_mv_ext
from vggt_mv.models.aggregator import Aggregator
from vggt_mv.models.sparse_global import dilated_neighbours
from vggt_mv_ext import (
    alternating_attention,
    block_dilated_attention,
    landmark_attention,
    memory_read,
    memory_write,
)

ROOT = Path(__file__).resolve().parents[1]
TOKENS, HEADS, WIDTH, VIEWS, MEMORY, LANDMARKS = 101, 4, 64, 2, 32, 37
FRAMES = (8, 16, 32, 64, 128, 256, 512)
STRATEGIES = ("dense", "memory_bank", "landmark", "block_dilated")


def exchange(strategy: str, qkv: Tensor) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """One exchange as a function of qkv and what else it reads."""
    _, times, views, tokens = qkv.shape[:4]
    if strategy == "memory_bank":
        memory = torch.randn(1, MEMORY, 3, HEADS, WIDTH).to(qkv.dtype)

        def write_and_read(qkv: Tensor, memory: Tensor) -> Tensor:
            written = memory_write(qkv, memory)
            return memory_read(qkv, memory + written.view(1, MEMORY, 1, HEADS, WIDTH))

        return write_and_read, (memory,)
    if strategy == "landmark":
        chosen = torch.stack([torch.randperm(tokens)[:LANDMARKS] + f * tokens for f in range(times * views)])
        return landmark_attention, (chosen.view(1, -1),)
    if strategy == "block_dilated":
        return block_dilated_attention, (dilated_neighbours(times, views),)
    return lambda qkv: alternating_attention(qkv, "global"), ()


def seconds(function: Callable[[], Any], rounds: int) -> float:
    times = []
    for index in range(rounds + 1):
        began = time.perf_counter()
        function()
        if index:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def slope(points: dict[int, float]) -> float | None:
    """Least squares through the logarithms, from 32 frames on."""
    pairs = [(math.log(frames), math.log(value)) for frames, value in points.items() if frames >= 32]
    if len(pairs) < 2:
        return None
    x, y = (statistics.fmean(column) for column in zip(*pairs, strict=True))
    return sum((a - x) * (b - y) for a, b in pairs) / sum((a - x) ** 2 for a, _ in pairs)


@torch.inference_mode()
def measure_operators(dtype: torch.dtype, limit: float, rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {name: {} for name in STRATEGIES}
    slow: set[str] = set()
    for frames in FRAMES:
        torch.manual_seed(frames)
        qkv = torch.randn(1, frames // VIEWS, VIEWS, TOKENS, 3, HEADS, WIDTH).to(dtype)
        for strategy in STRATEGIES:
            if strategy in slow:
                continue
            function, more = exchange(strategy, qkv)
            if frames == FRAMES[0]:
                wide = (t.double() if t.is_floating_point() else t for t in more)
                exact, got = function(qkv.double(), *wide), function(qkv, *more)
                error = ((got.double() - exact).norm() / exact.norm()).item()
                assert error < (1e-2 if dtype == torch.bfloat16 else 1e-5), f"{strategy}: relative error {error:.1e}"
            took = seconds(partial(function, qkv, *more), rounds)
            found[strategy][frames] = took
            if took > limit / 4:  # twice as many frames may take four times as long
                slow.add(strategy)
    dense = found["dense"]
    result_bytes = TOKENS * HEADS * (WIDTH * torch.empty(0, dtype=dtype).element_size() + 4)
    lists = {"landmark": 8 * LANDMARKS, "block_dilated": 8 * 25}
    return {
        name: {
            "milliseconds": {frames: round(1e3 * value, 3) for frames, value in times.items()},
            "exponent": None if slope(times) is None else round(slope(times) or 0.0, 2),
            "dense_over_this": {f: round(dense[f] / value, 2) for f, value in times.items() if f in dense},
            "bytes_a_frame": result_bytes + lists.get(name, 0),
        }
        for name, times in found.items()
    }


@torch.inference_mode()
def measure_model(dtype: torch.dtype, frames: int, side: int, rounds: int) -> dict[str, Any]:
    """An aggregator of ViT-B's size, with one stream and with two."""
    sizes: dict[str, Any] = {"embed_dim": 768, "depth": 12, "num_heads": 12, "patch_embed": "dinov2_vitb14_reg"}
    torch.manual_seed(0)
    images = torch.rand(1, frames // 2, 2, 3, side, side)
    mask = torch.rand(1, frames // 2, 2, side, side)
    runs: dict[str, Callable[[], Any]] = {}
    for name, dual in (("one stream", False), ("dual stream", True)):
        torch.manual_seed(0)
        aggregator = Aggregator(img_size=side, **sizes, enable_dual_stream=dual, enable_spatial_mask=True).eval()
        given = mask if dual else None
        runs[name] = partial(aggregator, images, keep_outputs={2, 5, 8, 11}, dynamic_mask=given)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        times: dict[str, list[float]] = {name: [] for name in runs}
        for index in range(rounds + 1):
            for name, run in runs.items():
                began = time.perf_counter()
                run()
                if index:
                    times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "frames": frames,
        "side": side,
        "seconds": {name: round(value, 3) for name, value in medians.items()},
        "ratio": round(medians["dual stream"] / medians["one stream"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--limit", type=float, default=20.0, help="seconds that a call may take (default: 20)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=336, help="pixels of the model's images (default: 336)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "local-sparse.json")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"threads": torch.get_num_threads(), "build": vggt_mv_ext.build_info()}
    for name in arguments.dtypes:
        dtype = getattr(torch, name)
        results[name] = {"operators": measure_operators(dtype, arguments.limit, arguments.rounds)}
        for strategy, row in results[name]["operators"].items():
            times = ", ".join(f"{frames}: {value:.1f}" for frames, value in row["milliseconds"].items())
            print(f"{name} {strategy:<14} exponent {row['exponent']}, {row['bytes_a_frame']} bytes a frame, ms {times}")
        results[name]["aggregator"] = measure_model(dtype, 8, arguments.side, arguments.rounds)
        print(f"{name} aggregator, 8 frames: {results[name]['aggregator']}")
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
