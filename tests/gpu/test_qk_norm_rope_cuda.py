"""`qk_norm_rope` by its CUDA kernel, against float64: widths, dtypes, frames, strides, in place, streams, graphs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vggt_mv_ext
from vggt_mv_ext import qk_norm_rope, reference

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
COMBINATIONS = [(F32, F32), (F16, F16), (BF16, BF16), (F16, F32), (BF16, F32)]  # qkv, norms
TOLERANCE = {F32: 1e-5, F16: 2e-3, BF16: 1e-2}  # relative Frobenius error against float64
Norm = tuple[Tensor, Tensor]


def short(dtypes: tuple[torch.dtype, ...]) -> str:
    return "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


every_combination = pytest.mark.parametrize("dtypes", COMBINATIONS, ids=short)


def make(
    dtypes: tuple[torch.dtype, torch.dtype],
    width: int,
    grid_hw: tuple[int, int],
    special: int,
    *,
    frames: tuple[int, int, int] = (1, 2, 3),
    heads: int = 3,
    seed: int = 0,
) -> tuple[Tensor, Norm, Norm]:
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator)

    qkv = (normal(*frames, special + grid_hw[0] * grid_hw[1], 3, heads, width) + 0.5).to(dtypes[0])
    q_norm, k_norm = (((1 + 0.3 * normal(width)).to(dtypes[1]), normal(width).to(dtypes[1])) for _ in range(2))
    return qkv, q_norm, k_norm


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected).norm() / expected.norm())


def wide(norm: Norm | None) -> Norm | None:
    return None if norm is None else (norm[0].double(), norm[1].double())


def check(found: Tensor, qkv: Tensor, q_norm: Norm | None, k_norm: Norm | None, *numbers: Any, **options: Any) -> None:
    expected = reference.qk_norm_rope(qkv.double(), wide(q_norm), wide(k_norm), *numbers, **options)
    eager = reference.qk_norm_rope(qkv, q_norm, k_norm, *numbers, **options)
    assert found.dtype == qkv.dtype
    assert found.isfinite().all()
    error = relative_error(found, expected)
    limit = 1.5 * relative_error(eager, expected) + torch.finfo(qkv.dtype).eps
    assert error <= min(TOLERANCE[qkv.dtype], limit), f"relative error {error:.3g}, limit {limit:.3g}"
    assert torch.equal(found[..., 2, :, :], qkv[..., 2, :, :])


def run(*arguments: Any, **options: Any) -> Tensor:
    with vggt_mv_ext.backend("cuda"):
        return qk_norm_rope(*arguments, **options)


FRAMES = {"one token": ((0, 0), 1), "one patch": ((1, 1), 0), "2x3": ((2, 3), 5), "336x518": ((24, 37), 5)}


@every_combination
@pytest.mark.parametrize("width", [32, 64, 96, 128])
@pytest.mark.parametrize(("grid_hw", "special"), FRAMES.values(), ids=FRAMES.keys())
def test_every_width_and_frame(grid_hw: tuple[int, int], special: int, width: int, dtypes: Any) -> None:
    inputs = make(dtypes, width, grid_hw, special)
    check(run(*inputs, grid_hw, special), *inputs, grid_hw, special)


@pytest.mark.parametrize("heads", [1, 7, 8, 9, 16])
def test_any_number_of_heads(heads: int) -> None:
    inputs = make((BF16, F32), 64, (3, 5), 2, heads=heads)
    check(run(*inputs, (3, 5), 2), *inputs, (3, 5), 2)


@pytest.mark.parametrize("present", [(True, False), (False, True), (False, False)], ids=["q", "k", "none"])
def test_some_norms(present: tuple[bool, bool]) -> None:
    qkv, *norms = make((F16, F16), 64, (3, 5), 2)
    chosen = [norm if here else None for norm, here in zip(norms, present, strict=True)]
    found = run(qkv, *chosen, (3, 5), 2, 1000.0, special_position=1)
    check(found, qkv, *chosen, (3, 5), 2, 1000.0, special_position=1)


def test_norms_of_two_dtypes() -> None:
    qkv, q_norm, _ = make((BF16, BF16), 64, (3, 5), 2)
    _, _, k_norm = make((BF16, F32), 64, (3, 5), 2)
    check(run(qkv, q_norm, k_norm, (3, 5), 2), qkv, q_norm, k_norm, (3, 5), 2)


@pytest.mark.parametrize("layout", ["gap", "time-last", "heads-first", "misaligned"])
def test_strides_change_nothing_but_addresses(layout: str) -> None:
    qkv, *norms = make((F16, F32), 64, (7, 11), 5)
    if layout == "gap":
        room = torch.full((*qkv.shape[:4], qkv[0, 0, 0, 0].numel() + 16), math.nan, dtype=F16, device="cuda")
        view = room[..., 16:].unflatten(-1, qkv.shape[4:])
    elif layout == "time-last":
        view = torch.empty_like(qkv.permute(0, 2, 3, 1, 4, 5, 6).contiguous()).permute(0, 3, 1, 2, 4, 5, 6)
    elif layout == "heads-first":
        view = torch.empty_like(qkv.transpose(4, 5).contiguous()).transpose(4, 5)
    else:
        view = torch.empty(qkv.numel() + 1, dtype=F16, device="cuda")[1:].view(qkv.shape)
    view.copy_(qkv)
    expected = run(qkv, *norms, (7, 11), 5)
    assert torch.equal(run(view, *norms, (7, 11), 5), expected)
    assert torch.equal(view, qkv)
    assert torch.equal(run(view, *norms, (7, 11), 5, inplace=True), expected)
    assert torch.equal(view, qkv if layout == "misaligned" else expected)


@every_combination
def test_in_place(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    qkv, *norms = make(dtypes, 64, (24, 37), 5, heads=16)
    expected = run(qkv, *norms, (24, 37), 5)
    found = run(qkv, *norms, (24, 37), 5, inplace=True)
    assert found is qkv
    assert torch.equal(qkv, expected)


def test_more_frames_than_a_grid_has_rows() -> None:
    """65535 blocks are the most in that direction of a launch; the rest is a loop."""
    qkv, *norms = make((F16, F16), 32, (1, 1), 0, frames=(1, 70_000, 1), heads=1)
    check(run(qkv, *norms, (1, 1), 0), qkv, *norms, (1, 1), 0)


def test_offsets_beyond_31_bits() -> None:
    """A qkv that spans 2^32 elements; the last frame must be found there."""
    width, heads, tokens = 64, 16, 700
    frame = tokens * 3 * heads * width
    frames = 2**32 // frame + 2
    if torch.cuda.mem_get_info()[0] < 1.5 * frames * frame * 2:
        pytest.skip(f"needs {1.5 * frames * frame * 2 / 2**30:.0f} GiB of free GPU memory")
    qkv = torch.zeros(1, frames, 1, tokens, 3, heads, width, dtype=BF16, device="cuda")
    last, *norms = make((BF16, F32), width, (25, 28), 0, frames=(1, 1, 1), heads=heads)
    qkv[:, -1:] = last
    found = run(qkv, *norms, (25, 28), 0, inplace=True)
    check(found[:, -1:].contiguous(), last, *norms, (25, 28), 0)


@every_combination
@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_gradients(width: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    qkv, q_norm, k_norm = make(dtypes, width, (24, 37), 5, heads=5)
    leaves = [t.requires_grad_() for t in (qkv, *q_norm, *k_norm)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    grad = torch.randn_like(qkv)

    def gradients(backend: str, leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        with vggt_mv_ext.backend(backend):
            out = qk_norm_rope(leaves[0], (leaves[1], leaves[2]), (leaves[3], leaves[4]), (24, 37), 5)
            return torch.autograd.grad(out, leaves, grad)

    found, again = gradients("cuda", leaves, grad), gradients("cuda", leaves, grad)
    expected = gradients("reference", exact, grad.double())
    eager = gradients("reference", leaves, grad)
    for i, (gradient, repeated, wanted, plain) in enumerate(zip(found, again, expected, eager, strict=True)):
        assert gradient.dtype == leaves[i].dtype
        assert gradient.isfinite().all()
        assert torch.equal(gradient, repeated), "the backward pass must be deterministic"
        error, limit = relative_error(gradient, wanted), 1.5 * relative_error(plain, wanted)
        limit += 2 * torch.finfo(gradient.dtype).eps
        assert error <= limit, f"gradient {i}: relative error {error:.3g}, limit {limit:.3g}"


def test_a_gradient_of_any_strides() -> None:
    """A sum's gradient is one number, expanded."""
    qkv, *norms = make((BF16, F32), 64, (3, 5), 2)
    ones = torch.ones((), dtype=BF16, device="cuda").expand(qkv.shape)
    found = []
    for grad in (ones, ones.contiguous()):
        leaf = qkv.detach().requires_grad_()
        found.append(torch.autograd.grad(run(leaf, *norms, (3, 5), 2), leaf, grad)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("norms", [True, False], ids=["norms", "no norms"])
def test_opcheck(norms: bool) -> None:
    qkv, q_norm, k_norm = make((BF16, F32), 32, (2, 2), 1, frames=(1, 2, 1))
    parameters = [t.requires_grad_() if norms else None for t in (*q_norm, *k_norm)]
    numbers = (2, 2, 1, 100.0, 1e-5, 0)
    with vggt_mv_ext.backend("cuda"):
        torch.library.opcheck(torch.ops.vggt_mv.qk_norm_rope.default, (qkv.requires_grad_(), *parameters, *numbers))
        plain = [t if t is None else t.detach() for t in (qkv, *parameters)]
        torch.library.opcheck(torch.ops.vggt_mv.qk_norm_rope_.default, (plain[0].clone(), *plain[1:], *numbers))
        wanted = [True, norms, False, norms, False]
        arguments = (torch.randn_like(plain[0]), *plain, *numbers, wanted)
        torch.library.opcheck(torch.ops.vggt_mv.qk_norm_rope_backward.default, arguments)


def test_another_stream_and_graph_capture() -> None:
    qkv, *norms = make((BF16, F32), 64, (24, 37), 5)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_side = run(qkv, *norms, (24, 37), 5)
    torch.cuda.current_stream().wait_stream(side)
    check(on_side, qkv, *norms, (24, 37), 5)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(qkv, *norms, (24, 37), 5)
    fresh, *_ = make((BF16, F32), 64, (24, 37), 5, seed=1)
    qkv.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    check(captured, qkv, *norms, (24, 37), 5)


def test_auto_takes_the_kernel_and_says_why_not() -> None:
    assert vggt_mv_ext.explain("qk_norm_rope", make((F32, F32), 64, (1, 1), 0)[0]).backend == "cuda"
    odd = vggt_mv_ext.explain("qk_norm_rope", make((F16, F16), 48, (1, 1), 0)[0])
    assert odd.backend == "reference"
    assert "32, 64, 96 or 128, got 48" in odd.passed_over["cuda"]
