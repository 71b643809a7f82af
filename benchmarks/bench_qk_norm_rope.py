"""qk_norm_rope on a CPU, in place as blocks call it, beside a copy of q and k and beside eager PyTorch.

    make bench ARGS=benchmarks/bench_qk_norm_rope.py

Bytes counted: q and k read and written; norms and the table of sines and cosines are left out (below 1 %). FLOPs: about
15 an element. The ids say frames of 1374 tokens, 16 heads of 64. One frame (11 MB in bfloat16) stays in the caches of a
larger CPU, so that its copy is one from cache to cache; eight frames do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peers import Comparison, compare

from vggt_mv_ext import qk_norm_rope, reference

HEADS, WIDTH, GRID, SPECIAL = 16, 64, (37, 37), 5
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("threads", sorted({1, torch.get_num_threads()}))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("frames", [1, 8])
@torch.inference_mode()
def test_qk_norm_rope(
    benchmark: Any, report: Callable[[Comparison], None], frames: int, dtype: torch.dtype, threads: int
) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(1, 1, frames, SPECIAL + GRID[0] * GRID[1], 3, HEADS, WIDTH).to(dtype)
    norms = [(torch.randn(WIDTH), torch.randn(WIDTH)) for _ in range(2)]
    exact_norms = [tuple(t.double() for t in norm) for norm in norms]
    exact = reference.qk_norm_rope(qkv[:, :, :1].double(), *exact_norms, GRID, SPECIAL)
    got = qk_norm_rope(qkv[:, :, :1].clone(), *norms, GRID, SPECIAL, inplace=True)
    error = ((got.double() - exact).norm() / exact.norm()).item()
    assert error <= TOLERANCE[dtype], f"relative error {error:.1e}"

    source = qkv[..., :2, :, :].clone()
    target = torch.empty_like(source)
    peers: dict[str, Callable[[], Any]] = {
        "ours": lambda: qk_norm_rope(qkv, *norms, GRID, SPECIAL, inplace=True),
        "copy": lambda: target.copy_(source),
        "eager": lambda: reference.qk_norm_rope(qkv, *norms, GRID, SPECIAL),
    }
    size = 2 * source.numel() * source.element_size()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        title = f"qk_norm_rope, {frames} frames, {str(dtype)[6:]}, {threads} threads"
        comparison = compare(title, peers, dict.fromkeys(peers, size), rounds=25)
        report(comparison)
        benchmark.extra_info["peers"] = comparison.as_dict()
        benchmark.pedantic(peers["ours"], rounds=3, warmup_rounds=1)
    finally:
        torch.set_num_threads(before)
