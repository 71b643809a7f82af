"""alternating_attention on a CPU beside PyTorch's attention, and dual_stream_attention beside the single one.

    make bench ARGS=benchmarks/bench_alternating_attention.py

FLOPs counted: 4 L^2 D h forward, 2.5 times that backward (five products of the mathematics, whatever a method does).
Bytes: qkv read, the result written. `sdpa` is given contiguous [1, h, L, D] tensors; `eager` is what a model has to do,
from and to the layout of its Linears.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peers import Comparison, compare
from torch import Tensor

from vggt_mv_ext import alternating_attention, dual_stream_attention, explain, reference

HEADS, WIDTH = 16, 64
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
LENGTHS = (1024, 2048, 4096, 8192)

Report = Callable[[Comparison], None]
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def make_qkv(length: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(1, 1, 1, length, 3, HEADS, WIDTH).to(dtype)


def check(got: Tensor, qkv: Tensor, bias: Tensor | None, rows: int = 256) -> None:
    """The first rows against float64."""
    q, k, v = (part.transpose(0, 1).double() for part in qkv[0, 0, 0].unbind(1))
    logits = q[:, :rows] @ k.transpose(1, 2) * WIDTH**-0.5 + (0 if bias is None else bias.double().flatten())
    exact = (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)
    error = ((got[0, 0, 0, :rows].double() - exact).norm() / exact.norm()).item()
    assert error <= TOLERANCE[qkv.dtype], f"relative error {error:.1e}"


@every_dtype
@pytest.mark.parametrize("length", LENGTHS)
@torch.inference_mode()
def test_forward(benchmark: Any, report: Report, length: int, dtype: torch.dtype) -> None:
    qkv = make_qkv(length, dtype)
    bias = -torch.rand(1, 1, 1, length)
    q, k, v = (part.contiguous() for part in qkv[0, 0].permute(2, 0, 3, 1, 4))
    check(alternating_attention(qkv, "frame"), qkv, None)
    check(alternating_attention(qkv, "frame", key_bias=bias), qkv, bias)
    peers: dict[str, Callable[[], Any]] = {
        "ours": lambda: alternating_attention(qkv, "frame"),
        "with bias": lambda: alternating_attention(qkv, "frame", key_bias=bias),
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v),
        "eager": lambda: reference.alternating_attention(qkv, "frame"),
    }
    run(benchmark, report, f"forward, L = {length}", qkv, peers, 4 * length**2 * WIDTH * HEADS, 4, rounds=9)


@every_dtype
@pytest.mark.parametrize("length", [1374, 4096])
def test_backward(benchmark: Any, report: Report, length: int, dtype: torch.dtype) -> None:
    qkv = make_qkv(length, dtype).requires_grad_()
    ours, eager = alternating_attention(qkv, "frame"), reference.alternating_attention(qkv, "frame")
    grad = torch.randn_like(ours)
    peers: dict[str, Callable[[], Any]] = {
        "ours": lambda: torch.autograd.grad(ours, qkv, grad, retain_graph=True),
        "eager": lambda: torch.autograd.grad(eager, qkv, grad, retain_graph=True),
    }
    (got,), (beside,) = peers["ours"](), peers["eager"]()
    error = ((got - beside).double().norm() / beside.double().norm()).item()
    assert error <= 2 * TOLERANCE[dtype], f"relative difference to eager {error:.1e}"
    run(benchmark, report, f"backward, L = {length}", qkv, peers, 10 * length**2 * WIDTH * HEADS, 8, rounds=5)


@every_dtype
@pytest.mark.parametrize("length", LENGTHS)
@torch.inference_mode()
def test_dual_stream(benchmark: Any, report: Report, length: int, dtype: torch.dtype) -> None:
    """Two streams are two attentions: at most twice the time of one, 1.6 times where they share qkv.

    "far" are biases so far apart that streams with the same qkv take two softmaxes all the same.
    """
    pose, geo = make_qkv(length, dtype), make_qkv(length, dtype).flip(3).contiguous()
    mask, weights = torch.rand(1, 1, 1, length), (torch.tensor(0.3), torch.tensor(0.2))
    far = [200 * weight for weight in weights]
    for second, lambdas in ((geo, weights), (None, weights), (None, far)):
        both = dual_stream_attention(pose, second, "frame", mask, *lambdas)
        for got, qkv, weight in zip(both, (pose, second), (-lambdas[0], lambdas[1]), strict=True):
            check(got, pose if qkv is None else qkv, weight * mask)
    peers: dict[str, Callable[[], Any]] = {
        "one stream": lambda: alternating_attention(pose, "frame"),
        "two": lambda: dual_stream_attention(pose, geo, "frame", mask, *weights),
        "two, shared": lambda: dual_stream_attention(pose, None, "frame", mask, *weights),
        "two, far": lambda: dual_stream_attention(pose, None, "frame", mask, *far),
    }
    run(benchmark, report, f"dual stream, L = {length}", pose, peers, 4 * length**2 * WIDTH * HEADS, 4, rounds=9)


def run(
    benchmark: Any,
    report: Report,
    title: str,
    qkv: Tensor,
    peers: dict[str, Callable[[], Any]],
    flops: int,
    parts: int,
    *,
    rounds: int,
) -> None:
    """Compares peers that need `flops` operations and read or write `parts` tensors of the size of the result."""
    counted = {name: flops * (2 if name.startswith("two") else 1) for name in peers}
    size = qkv.numel() * qkv.element_size() // 3 * parts
    backend = explain("alternating_attention", qkv).backend
    title = f"{title}, {str(qkv.dtype)[6:]}, {backend}, {torch.get_num_threads()} threads"
    comparison = compare(title, peers, dict.fromkeys(peers, size), flops=counted, rounds=rounds)
    finish(benchmark, report, comparison, peers)


def finish(benchmark: Any, report: Report, comparison: Comparison, peers: dict[str, Callable[[], Any]]) -> None:
    report(comparison)
    benchmark.extra_info["peers"] = comparison.as_dict()
    benchmark.pedantic(next(iter(peers.values())), rounds=3, warmup_rounds=1)
