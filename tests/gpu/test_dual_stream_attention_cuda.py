"""`dual_stream_attention` by the CUDA kernels, results and gradients, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vggt_mv_ext
from vggt_mv_ext import dual_stream_attention, reference

F16, BF16 = torch.float16, torch.bfloat16
# Relative Frobenius error against float64; of gradients twice that: p or ds, out and the result are rounded.
TOLERANCE = {F16: 2e-3, BF16: 1e-2}
NAMES = ("qkv_pose", "qkv_geo", "mask", "lambda_pose", "lambda_geo")
both_dtypes = pytest.mark.parametrize("dtype", [F16, BF16], ids=["fp16", "bf16"])
shared_or_not = pytest.mark.parametrize("shared", [False, True], ids=["own qkv", "shared qkv"])

Given = list[Any]


def make(dtype: torch.dtype, width: int, grid: tuple[int, ...], *, shared: bool = False, seed: int = 0) -> Given:
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def qkv() -> Tensor:
        return torch.randn((*grid, 3, 2, width), device="cuda", generator=generator).to(dtype)

    mask = torch.rand(grid, device="cuda", generator=generator)
    return [qkv(), None if shared else qkv(), mask, torch.tensor(1.3, device="cuda"), torch.tensor(0.7, device="cuda")]


def wide(given: Given) -> Given:
    return [None if tensor is None else tensor.double() for tensor in given]


def run(given: Given, axis: str, backend: str = "cuda") -> tuple[Tensor, Tensor]:
    with vggt_mv_ext.backend(backend):
        return dual_stream_attention(*given[:2], axis, *given[2:])


def check(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.isfinite().all(), what
    error = float((found.double() - expected).norm() / expected.norm())
    assert error <= tolerance, f"{what}: relative error {error:.3g} > {tolerance:.3g}"


@shared_or_not
@both_dtypes
@pytest.mark.parametrize("axis", ["frame", "view", "time", "global"])
@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_both_streams(width: int, axis: str, dtype: torch.dtype, shared: bool) -> None:
    given = make(dtype, width, (2, 3, 2, 149), shared=shared)
    exact = reference.dual_stream_attention(*wide(given)[:2], axis, *wide(given)[2:])
    for what, out, expected in zip(("pose", "geo"), run(given, axis), exact, strict=True):
        check(what, out, expected, TOLERANCE[dtype])


@shared_or_not
def test_gradients(shared: bool) -> None:
    given = make(BF16, 64, (1, 2, 2, 149), shared=shared)
    grads = [torch.randn(1, 2, 2, 149, 128, device="cuda").to(BF16) for _ in range(2)]

    def gradients(given: Given, grads: list[Tensor], backend: str) -> list[Tensor]:
        leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in given]
        with vggt_mv_ext.backend(backend):
            both = dual_stream_attention(*leaves[:2], "view", *leaves[2:])
            return list(torch.autograd.grad(both, [leaf for leaf in leaves if leaf is not None], grads))

    found = gradients(given, grads, "cuda")
    exact = gradients(wide(given), [grad.double() for grad in grads], "reference")
    names = [name for name, tensor in zip(NAMES, given, strict=True) if tensor is not None]
    for name, gradient, expected in zip(names, found, exact, strict=True):
        if name.startswith("lambda"):  # an inner product with the mask: its error is bounded by the norms of both
            assert (gradient - expected).abs() <= 2 * TOLERANCE[BF16] * given[2].norm() * exact[-3].norm(), name
        else:
            check(name, gradient, expected, 2 * TOLERANCE[BF16])


def test_no_value_is_waited_for() -> None:
    """A captured graph, forward and backward, follows lambdas and masks that change on the device."""
    given = make(BF16, 64, (1, 2, 2, 149))
    leaves = [tensor.requires_grad_() for tensor in given]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad(sum(out.sum() for out in run(leaves, "time")), leaves)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(leaves, "time")
        torch.autograd.grad(sum(out.sum() for out in captured), leaves)
    with torch.no_grad():
        given[3].fill_(3.0)
        given[4].fill_(-2.0)
    graph.replay()
    torch.cuda.synchronize()
    exact = reference.dual_stream_attention(*wide(given)[:2], "time", *wide(given)[2:])
    for what, out, expected in zip(("pose", "geo"), captured, exact, strict=True):
        check(what, out.detach(), expected.detach(), TOLERANCE[BF16])


def test_auto_takes_the_kernel() -> None:
    assert vggt_mv_ext.explain("dual_stream_attention", make(BF16, 64, (1, 1, 1, 8))[0]).backend == "cuda"
