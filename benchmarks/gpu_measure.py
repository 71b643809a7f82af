"""Time, memory and errors, for the measurements of `gpu_check`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any


def measure(
    function: Callable[[], Any], *, device: str = "cuda", warmup: int = 3, repeats: int = 20, budget_s: float = 5.0
) -> dict[str, float]:
    """Milliseconds of `function`: median, and the 10th and 90th percentile as the spread.

    CUDA events on a GPU; the wall clock on a CPU (which only the tests of this script use).
    """
    for _ in range(warmup):
        function()
    times: list[float] = []
    began = time.monotonic()
    while len(times) < repeats and (len(times) < 3 or time.monotonic() - began < budget_s):
        times.append(_milliseconds(function, device))
    times.sort()
    return {
        "median_ms": round(statistics.median(times), 4),
        "p10_ms": round(times[len(times) // 10], 4),
        "p90_ms": round(times[(len(times) * 9) // 10], 4),
        "runs": len(times),
    }


def _milliseconds(function: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        began = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - began)
    import torch

    torch.cuda.synchronize()
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    function()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last))


def measure_graph(function: Callable[[], Any]) -> dict[str, float]:
    """`function` captured in a CUDA graph: milliseconds of a replay, and how far its result is from a plain call's.

    What remains is the GPU's own time: no Python, no launches one by one.
    """
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # tables, workspaces and the weights that autocast casts exist before the capture
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function()
    graph.replay()
    error = relative_error(captured, function())
    if not error < 1e-2:
        raise RuntimeError(f"a CUDA graph's result differs from that of a plain call: relative error {error}")
    return {**measure(graph.replay), "error": error}


class PeakMemory:
    """Peak of the device memory that torch holds between `__init__` and `read`; zeros on a CPU."""

    def __init__(self, device: str) -> None:
        import torch

        self.cuda = torch.cuda if device == "cuda" else None
        if self.cuda is not None:
            self.cuda.empty_cache()
            self.cuda.reset_peak_memory_stats()
        self.base = self.cuda.memory_allocated() if self.cuda is not None else 0

    def read(self) -> dict[str, float]:
        peak = self.cuda.max_memory_allocated() if self.cuda is not None else 0
        return {"peak_gib": round(peak / 2**30, 3), "peak_above_start_gib": round((peak - self.base) / 2**30, 3)}


def relative_error(value: Any, reference: Any) -> float:
    """Relative Frobenius error in fp64; NaN in `value` gives NaN, which is below no tolerance."""
    return float((value.double() - reference.double()).norm() / reference.double().norm())
