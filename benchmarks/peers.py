"""An operator beside its peers: runs taken in turn, so that what else the machine does falls on all of them alike.

    comparison = compare({"ours": f, "eager": g, "copy": h}, bytes_moved={"ours": 123, ...})
    print(comparison)

A ratio between peers is taken from one call of `compare`; times from different calls say little about each other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one peer: median, quartiles, best of the rounds, and bytes and FLOPs that one run needs."""

    median: float
    low: float
    high: float
    best: float
    bytes_moved: int
    flops: int = 0

    @property
    def gigaflops_per_second(self) -> float:
        return self.flops / self.median / 1e6

    @property
    def gigabytes_per_second(self) -> float:
        return self.bytes_moved / self.median / 1e6


@dataclass(frozen=True)
class Comparison:
    """Timings by peer; the first peer is the one that the ratios are about."""

    title: str
    timings: dict[str, Timing]

    def ratio(self, peer: str) -> float:
        """How many times as long `peer` takes as the first."""
        return self.timings[peer].median / next(iter(self.timings.values())).median

    def ratio_of_best(self, peer: str) -> float:
        """The same of the best rounds, which other jobs on the machine disturb least."""
        return self.timings[peer].best / next(iter(self.timings.values())).best

    def as_dict(self) -> dict[str, Any]:
        """For pytest-benchmark's `extra_info` and for result files."""
        return {
            peer: {
                "median_ms": round(t.median, 4),
                "quartiles_ms": [round(t.low, 4), round(t.high, 4)],
                "best_ms": round(t.best, 4),
                "bytes": t.bytes_moved,
                "gb_per_s": round(t.gigabytes_per_second, 2),
                "times_as_long": round(self.ratio(peer), 2),
                **({"gflop_per_s": round(t.gigaflops_per_second, 1)} if t.flops else {}),
            }
            for peer, t in self.timings.items()
        }

    def __str__(self) -> str:
        lines = [self.title]
        for peer, t in self.timings.items():
            rate = f"  {t.gigaflops_per_second:7.1f} GFLOP/s" if t.flops else ""
            lines.append(
                f"  {peer:<12} {t.median:9.3f} ms  ({t.low:.3f} to {t.high:.3f})  {t.bytes_moved / 1e6:8.2f} MB"
                f"  {t.gigabytes_per_second:7.1f} GB/s{rate}  x{self.ratio(peer):.2f}"
                f"  best x{self.ratio_of_best(peer):.2f}"
            )
        return "\n".join(lines)


def compare(
    title: str,
    peers: Mapping[str, Callable[[], Any]],
    bytes_moved: Mapping[str, int],
    *,
    flops: Mapping[str, int] | None = None,
    device: str = "cpu",
    rounds: int = 25,
) -> Comparison:
    """Times all peers in turn, `rounds` times, after two runs of each that do not count."""
    times: dict[str, list[float]] = {peer: [] for peer in peers}
    for index in range(rounds + 2):
        for peer, function in peers.items():
            if device != "cpu":
                torch.cuda.synchronize()
            began = time.perf_counter()
            function()
            if device != "cpu":
                torch.cuda.synchronize()
            if index >= 2:
                times[peer].append(1e3 * (time.perf_counter() - began))
    timings = {}
    for peer, found in times.items():
        low, _, high = statistics.quantiles(found, n=4)
        timings[peer] = Timing(
            statistics.median(found), low, high, min(found), bytes_moved[peer], (flops or {}).get(peer, 0)
        )
    return Comparison(title, timings)
