"""`alternating_attention` by its CUDA kernel, against float64: axes, widths, biases, strides, streams, graphs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vggt_mv_ext
from vggt_mv_ext import alternating_attention, reference

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
AXES = ("frame", "view", "time", "global")
TOLERANCE = {F16: 2e-3, BF16: 1e-2}  # relative Frobenius error against float64
both_dtypes = pytest.mark.parametrize("dtype", [F16, BF16], ids=["fp16", "bf16"])


def make(
    dtype: torch.dtype,
    width: int,
    grid: tuple[int, int, int, int],
    *,
    heads: int = 2,
    bias: str = "none",
    seed: int = 0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """qkv and the keyword arguments of a bias: none, bias, token (row_gate [P]) or row (row_gate [B, T, N, P])."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    qkv = (1.5 * torch.randn((*grid, 3, heads, width), device="cuda", generator=generator)).to(dtype)
    arguments = {}
    if bias != "none":
        arguments["key_bias"] = 2 * torch.randn(grid, device="cuda", generator=generator)
    if bias in ("token", "row"):
        shape = grid if bias == "row" else grid[3:]
        arguments["row_gate"] = 2 * torch.rand(shape, device="cuda", generator=generator)
    return qkv, arguments


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected).norm() / expected.norm())


def check(found: Tensor, qkv: Tensor, axis: str, arguments: dict[str, Tensor]) -> None:
    expected = reference.alternating_attention(
        qkv.double(), axis, **{name: tensor.double() for name, tensor in arguments.items()}
    )
    eager = reference.alternating_attention(qkv, axis, **arguments)
    assert found.isfinite().all()
    error = relative_error(found, expected)
    limit = 1.5 * relative_error(eager, expected) + torch.finfo(qkv.dtype).eps
    assert error <= min(TOLERANCE[qkv.dtype], limit), f"relative error {error:.3g}, limit {limit:.3g}"


def run(qkv: Tensor, axis: str, **arguments: Any) -> Tensor:
    with vggt_mv_ext.backend("cuda"):
        return alternating_attention(qkv, axis, **arguments)


@both_dtypes
@pytest.mark.parametrize("width", [32, 64, 96, 128])
@pytest.mark.parametrize("bias", ["none", "row"])
@pytest.mark.parametrize("length", [1, 31, 64, 65, 127, 128, 129, 893])
def test_every_width_and_length(length: int, bias: str, width: int, dtype: torch.dtype) -> None:
    qkv, arguments = make(dtype, width, (1, 1, 1, length), bias=bias)
    check(run(qkv, "frame", **arguments), qkv, "frame", arguments)


@pytest.mark.parametrize("heads", [1, 48], ids=["64-row blocks", "128-row blocks"])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("bias", ["none", "bias", "token", "row"])
def test_every_axis(axis: str, bias: str, heads: int) -> None:
    qkv, arguments = make(BF16, 64, (2, 3, 2, 149), heads=heads, bias=bias)
    check(run(qkv, axis, **arguments), qkv, axis, arguments)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("layout", ["gap", "time-last", "heads-first"])
def test_strided_qkv(layout: str, axis: str) -> None:
    qkv, _ = make(F16, 64, (1, 3, 2, 77))
    if layout == "gap":
        room = torch.full((*qkv.shape[:4], qkv[0, 0, 0, 0].numel() + 16), math.nan, dtype=F16, device="cuda")
        view = room[..., 16:].unflatten(-1, qkv.shape[4:])
    elif layout == "time-last":
        view = torch.empty_like(qkv.permute(0, 2, 3, 1, 4, 5, 6).contiguous()).permute(0, 3, 1, 2, 4, 5, 6)
    else:
        view = torch.empty_like(qkv.transpose(4, 5).contiguous()).transpose(4, 5)
    view.copy_(qkv)
    assert not view.is_contiguous()
    assert torch.equal(run(view, axis), run(qkv, axis)), "strides must change nothing but addresses"


def test_rows_that_are_not_aligned_are_copied() -> None:
    qkv, _ = make(F16, 64, (1, 1, 1, 50))
    flat = torch.empty(qkv.numel() + 1, dtype=F16, device="cuda")
    flat[1:] = qkv.flatten()
    assert torch.equal(run(flat[1:].view(qkv.shape), "frame"), run(qkv, "frame"))


def test_long_sequence_with_neighbours_that_are_not_numbers() -> None:
    """20 frames of 336 x 518 between frames of NaN."""
    qkv, arguments = make(BF16, 64, (1, 1, 20, 893), bias="token")
    room = torch.full((1, 1, 22, *qkv.shape[3:]), math.nan, dtype=BF16, device="cuda")
    room[:, :, 1:-1] = qkv
    check(run(room[:, :, 1:-1], "view", **arguments), qkv, "view", arguments)


def test_offsets_beyond_31_bits() -> None:
    """A qkv that spans 2^32 elements; the last frame must be found there."""
    width, heads, tokens = 64, 16, 700
    frame = tokens * 3 * heads * width
    frames = 2**32 // frame + 2
    if torch.cuda.mem_get_info()[0] < 2.5 * frames * frame * 2:
        pytest.skip(f"needs {2.5 * frames * frame * 2 / 2**30:.0f} GiB of free GPU memory")
    qkv = torch.zeros(1, frames, 1, tokens, 3, heads, width, dtype=BF16, device="cuda")
    last = make(BF16, width, (1, 1, 1, tokens), heads=heads)[0]
    qkv[:, -1:] = last
    found = run(qkv, "frame")
    check(found[:, -1:].contiguous(), last, "frame", {})
    assert found[:, :-1].abs().max() == 0


def test_infinite_biases() -> None:
    qkv, arguments = make(BF16, 64, (1, 1, 2, 300), bias="bias")
    arguments["key_bias"][:, :, :, :200] = -math.inf
    found = run(qkv, "frame", **arguments)
    rest = run(qkv[:, :, :, 200:], "frame", key_bias=arguments["key_bias"][:, :, :, 200:])
    assert relative_error(found[:, :, :, 200:], rest.double()) < TOLERANCE[BF16]
    arguments["key_bias"][:, :, 0] = -math.inf
    found = run(qkv, "frame", **arguments)
    assert found[:, :, 0].isnan().all()
    assert found[:, :, 1].isfinite().all()


def test_lse() -> None:
    qkv, arguments = make(F16, 64, (1, 2, 1, 333), bias="token")
    with vggt_mv_ext.backend("cuda"):
        _, lse = torch.ops.vggt_mv.alternating_attention(
            qkv, "frame", arguments["key_bias"], arguments["row_gate"], None
        )
    q, k, _ = qkv.double().squeeze(0).squeeze(1).unbind(2)  # [T, P, h, D]
    bias = arguments["row_gate"].double()[:, None] * arguments["key_bias"].double().view(2, 1, 1, 333)
    logits = 64**-0.5 * torch.einsum("tihd,tjhd->thij", q, k) + bias
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_same_bits_every_time() -> None:
    qkv, arguments = make(BF16, 64, (1, 4, 2, 300), heads=16, bias="row")
    first = run(qkv, "global", **arguments)
    assert all(torch.equal(first, run(qkv, "global", **arguments)) for _ in range(5))


def test_opcheck() -> None:
    qkv, arguments = make(BF16, 32, (1, 2, 1, 9), bias="row")
    with vggt_mv_ext.backend("cuda"):
        torch.library.opcheck(
            torch.ops.vggt_mv.alternating_attention.default,
            (qkv.requires_grad_(), "time", arguments["key_bias"], arguments["row_gate"], None),
        )


def test_another_stream_and_graph_capture() -> None:
    qkv, arguments = make(BF16, 64, (1, 2, 2, 300), bias="token")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_side = run(qkv, "time", **arguments)
    torch.cuda.current_stream().wait_stream(side)
    check(on_side, qkv, "time", arguments)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(qkv, "time", **arguments)
    fresh, _ = make(BF16, 64, (1, 2, 2, 300), seed=1)
    qkv.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    check(captured, qkv, "time", arguments)


def test_auto_takes_the_kernel_and_says_why_not() -> None:
    assert vggt_mv_ext.explain("alternating_attention", make(BF16, 64, (1, 1, 1, 8))[0]).backend == "cuda"
    full = vggt_mv_ext.explain("alternating_attention", make(F32, 64, (1, 1, 1, 8))[0])
    assert full.backend == "reference"
    assert "float32" in full.passed_over["cuda"]
    odd = vggt_mv_ext.explain("alternating_attention", make(F16, 48, (1, 1, 1, 8))[0])
    assert odd.backend == "reference"
    assert "32, 64, 96 or 128, got 48" in odd.passed_over["cuda"]
