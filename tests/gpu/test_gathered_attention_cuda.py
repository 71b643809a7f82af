"""The sparse attentions by their CUDA kernels, against float64: widths, lengths, lists, biases, strides, graphs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vggt_mv_ext
from vggt_mv_ext import block_dilated_attention, landmark_attention, memory_read, memory_write, reference

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {F16: 2e-3, BF16: 1e-2}  # relative Frobenius error against float64
OPERATORS = {f.__name__: f for f in (memory_write, memory_read, landmark_attention, block_dilated_attention)}
every_operator = pytest.mark.parametrize("name", OPERATORS)
both_dtypes = pytest.mark.parametrize("dtype", [F16, BF16], ids=["fp16", "bf16"])

Arguments = dict[str, Tensor]


def make(
    name: str,
    dtype: torch.dtype,
    width: int,
    grid: tuple[int, int, int, int],
    *,
    heads: int = 2,
    bias: bool = False,
    memory: int = 32,
    listed: int = 70,
    seed: int = 0,
) -> Arguments:
    """The operator's tensors; `listed`: landmarks, or frames that each frame looks at, half of its row -1."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    batch, times, views, tokens = grid
    frames = times * views

    def qkv(*shape: int) -> Tensor:
        return (1.5 * torch.randn((*shape, 3, heads, width), device="cuda", generator=generator)).to(dtype)

    arguments = {"qkv": qkv(*grid)}
    if name.startswith("memory"):
        arguments["memory_qkv"] = qkv(batch, memory)
    if name == "landmark_attention":
        shape = (batch, listed)
        arguments["landmarks"] = torch.randint(0, frames * tokens, shape, device="cuda", generator=generator)
    if name == "block_dilated_attention":
        order = torch.rand((frames, frames), device="cuda", generator=generator).argsort(1)[:, :listed]
        arguments["neighbours"] = torch.where(torch.arange(order.shape[1], device="cuda") % 2 == 0, order, -1)
    if bias and name != "memory_read":
        arguments["key_bias"] = 2 * torch.randn(grid, device="cuda", generator=generator)
    return arguments


def run(name: str, arguments: Arguments, backend: str = "cuda") -> Tensor:
    with vggt_mv_ext.backend(backend):
        return OPERATORS[name](**arguments)


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected).norm() / expected.norm())


def check(name: str, found: Tensor, arguments: Arguments) -> None:
    wide = {key: tensor if tensor.dtype == torch.int64 else tensor.double() for key, tensor in arguments.items()}
    expected = getattr(reference, name)(**wide)
    eager = getattr(reference, name)(**arguments)
    assert found.isfinite().all()
    error = relative_error(found, expected)
    limit = 1.5 * relative_error(eager, expected) + torch.finfo(found.dtype).eps
    assert error <= min(TOLERANCE[found.dtype], limit), f"relative error {error:.3g}, limit {limit:.3g}"


@both_dtypes
@every_operator
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_every_width(name: str, width: int, bias: bool, dtype: torch.dtype) -> None:
    arguments = make(name, dtype, width, (2, 3, 2, 149), bias=bias, memory=70)
    check(name, run(name, arguments), arguments)


@every_operator
@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 893])
def test_every_length(name: str, length: int) -> None:
    """Of frames, memories and lists."""
    for grid, memory, listed in (((1, 2, 1, length), 32, 40), ((1, 2, 1, 50), length, length)):
        arguments = make(name, BF16, 64, grid, bias=True, memory=memory, listed=listed)
        check(name, run(name, arguments), arguments)


@every_operator
def test_a_scene_of_usual_size(name: str) -> None:
    """20 frames of 336 x 518 and 16 heads: the memory's keys in as many chunks as the GPU takes at once."""
    arguments = make(name, BF16, 64, (1, 5, 4, 893), heads=16, bias=True, listed=4 if "block" in name else 1400)
    check(name, run(name, arguments), arguments)


@every_operator
@pytest.mark.parametrize("layout", ["gap", "time-last", "heads-first"])
def test_strided_qkv(name: str, layout: str) -> None:
    arguments = make(name, F16, 64, (1, 3, 2, 77), bias=True)
    qkv = arguments["qkv"]
    if layout == "gap":
        room = torch.full((*qkv.shape[:4], qkv[0, 0, 0, 0].numel() + 16), math.nan, dtype=F16, device="cuda")
        view = room[..., 16:].unflatten(-1, qkv.shape[4:])
    elif layout == "time-last":
        view = torch.empty_like(qkv.permute(0, 2, 3, 1, 4, 5, 6).contiguous()).permute(0, 3, 1, 2, 4, 5, 6)
    else:
        view = torch.empty_like(qkv.transpose(4, 5).contiguous()).transpose(4, 5)
    view.copy_(qkv)
    assert not view.is_contiguous()
    assert torch.equal(run(name, {**arguments, "qkv": view}), run(name, arguments))


@every_operator
def test_rows_that_are_not_aligned_are_copied(name: str) -> None:
    arguments = make(name, F16, 64, (1, 1, 2, 50))
    crooked = {}
    for key, tensor in arguments.items():
        flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device="cuda")
        crooked[key] = flat[1:].view(tensor.shape).copy_(tensor)
    assert torch.equal(run(name, crooked), run(name, arguments))


@pytest.mark.parametrize("name", ["memory_write", "landmark_attention", "block_dilated_attention"])
def test_infinite_biases(name: str) -> None:
    arguments = make(name, BF16, 64, (1, 2, 2, 300), bias=True, listed=4 if "block" in name else 500)
    arguments["key_bias"][:, :, :, :200] = -math.inf
    found = run(name, arguments)
    check(name, found, arguments)
    shut_out = arguments["qkv"].clone()
    shut_out[:, :, :, :200, 1:] = 7.0
    queries = slice(200, None) if name != "memory_write" else slice(None)
    again = run(name, {**arguments, "qkv": shut_out})
    assert torch.equal(found[..., queries, :], again[..., queries, :])


@every_operator
def test_log_sum_of_exponentials(name: str) -> None:
    """The second result, against the CPU kernel's."""
    arguments = make(name, F16, 64, (1, 2, 2, 133), bias=True, listed=4 if "block" in name else 100)
    order = [key for key in ("qkv", "memory_qkv", "landmarks", "neighbours") if key in arguments]
    results = []
    for device, backend in (("cuda", "cuda"), ("cpu", "cpu")):
        given: list[Any] = [arguments[key].to(device) for key in order]
        if name != "memory_read":
            given.append(arguments["key_bias"].to(device))
        with vggt_mv_ext.backend(backend):
            results.append(getattr(torch.ops.vggt_mv, name)(*given, None)[1].cpu())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)


@every_operator
def test_same_bits_every_time(name: str) -> None:
    arguments = make(name, BF16, 64, (1, 4, 2, 300), heads=16, bias=True)
    first = run(name, arguments)
    assert all(torch.equal(first, run(name, arguments)) for _ in range(5))


@every_operator
def test_gradients(name: str) -> None:
    """By the reference, from the same inputs."""
    arguments = make(name, BF16, 32, (1, 2, 2, 40), bias=True)
    leaves = {key: t.clone().requires_grad_() for key, t in arguments.items() if t.dtype != torch.int64}
    wide = {key: t.double().detach().requires_grad_() for key, t in leaves.items()}
    with vggt_mv_ext.backend("cuda"):
        out = OPERATORS[name](**{**arguments, **leaves})
        found = torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))
    exact_out = getattr(reference, name)(**{**arguments, **wide})
    exact = torch.autograd.grad(exact_out, list(wide.values()), torch.ones_like(exact_out))
    for key, gradient, expected in zip(leaves, found, exact, strict=True):
        assert relative_error(gradient, expected) < 3 * TOLERANCE[BF16], key


@every_operator
def test_another_stream_and_graph_capture(name: str) -> None:
    arguments = make(name, BF16, 64, (1, 2, 2, 300), bias=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_side = run(name, arguments)
    torch.cuda.current_stream().wait_stream(side)
    check(name, on_side, arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(name, arguments)
    arguments["qkv"].copy_(make(name, BF16, 64, (1, 2, 2, 300), seed=1)["qkv"])
    graph.replay()
    torch.cuda.synchronize()
    check(name, captured, arguments)


@every_operator
def test_auto_takes_the_kernel_and_says_why_not(name: str) -> None:
    assert vggt_mv_ext.explain(name, make(name, BF16, 64, (1, 1, 1, 8))["qkv"]).backend == "cuda"
    full = vggt_mv_ext.explain(name, make(name, F32, 64, (1, 1, 1, 8))["qkv"])
    assert full.backend == "reference"
    assert "float32" in full.passed_over["cuda"]
