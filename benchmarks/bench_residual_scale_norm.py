"""residual_scale_norm beside eager PyTorch and beside a plain copy of as many bytes.

    make bench ARGS=benchmarks/bench_residual_scale_norm.py

Bytes counted: forward reads x and y and writes residual and normed; backward reads grad_residual, grad_normed, residual
and y and writes grad_x and grad_y. Parameters, statistics and partial sums are left out (below 1 %), and so are the
reads that a store into memory may cause. FLOPs: about 12 an element forward, 25 backward; they do not limit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peers import Comparison, compare
from torch import Tensor

from vggt_mv_ext import explain, reference, residual_scale_norm

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = {
    "f32": (torch.float32, torch.float32),
    "f32+bf16": (torch.float32, torch.bfloat16),
    "bf16": (torch.bfloat16,) * 2,
}
ROWS = {"1 frame": 1374, "8 frames": 8 * 1374}
FEATURES = 1024
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def eager(x: Tensor, y: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    residual = x + gamma * y
    return residual, F.layer_norm(residual, (FEATURES,), weight, bias).to(y.dtype)


def make_inputs(rows: int, dtypes: tuple[torch.dtype, torch.dtype], device: str) -> list[Tensor]:
    torch.manual_seed(0)
    x, y = (torch.randn(rows, FEATURES, device=device).to(dtype) for dtype in dtypes)
    return [x, y, *(torch.randn(FEATURES, device=device, dtype=dtypes[0]) for _ in range(3))]


def check(got: tuple[Tensor, ...], exact: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for a, b in zip(got, exact, strict=True):
        error = ((a.double() - b).norm() / b.norm()).item()
        assert error <= TOLERANCE[dtype], f"relative error {error:.1e}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_residual_scale_norm(
    benchmark: Any,
    report: Callable[[Comparison], None],
    which: str,
    rows: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    device: str,
) -> None:
    inputs = make_inputs(rows, dtypes, device)
    backend = explain("residual_scale_norm", *inputs).backend
    check(residual_scale_norm(*inputs), reference.residual_scale_norm(*(t.double() for t in inputs)), dtypes[1])

    peers: dict[str, Callable[[], Any]]
    if which == "forward":
        peers = {"ours": lambda: residual_scale_norm(*inputs), "eager": lambda: eager(*inputs)}
        if device == "cpu":  # as blocks call it: the system hands out no memory for the results
            x, y, gamma, *norm = (t.clone() for t in inputs)
            gamma *= 0.01  # x takes its own result again and again
            peers = {"in place": lambda: residual_scale_norm(x, y, gamma, *norm, out=(x, y)), **peers}
        streams = 4
    else:
        leaves = [t.requires_grad_() for t in inputs]
        grads = (torch.randn_like(inputs[0]), torch.randn_like(inputs[1]))
        ours, beside = residual_scale_norm(*leaves), eager(*leaves)
        peers = {
            "ours": lambda: torch.autograd.grad(ours, leaves, grads, retain_graph=True),
            "eager": lambda: torch.autograd.grad(beside, leaves, grads, retain_graph=True),
        }
        streams = 6
    size = sum(t.element_size() for t in inputs[:2]) * rows * FEATURES * streams // 2
    source = torch.ones(size // 8, device=device)
    target = torch.empty_like(source)
    peers["copy"] = lambda: target.copy_(source)

    threads = torch.get_num_threads() if device == "cpu" else 0
    title = f"{which}, {rows} x {FEATURES}, {'+'.join(str(d)[6:] for d in dtypes)}, {backend}"
    comparison = compare(
        f"{title}, {threads} threads" if threads else title, peers, dict.fromkeys(peers, size), device=device
    )
    report(comparison)
    benchmark.extra_info["peers"] = comparison.as_dict()
    benchmark.pedantic(peers["ours"], rounds=10, warmup_rounds=1)
