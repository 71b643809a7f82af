"""Gradients of `alternating_attention` by its CUDA kernels, through the operator, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import vggt_mv_ext
from vggt_mv_ext import alternating_attention, reference

F16, BF16 = torch.float16, torch.bfloat16
AXES = ("frame", "view", "time", "global")
# Relative Frobenius error against float64: twice the forward pass's, since p or ds, out and the result are rounded.
TOLERANCE = {F16: 4e-3, BF16: 2e-2}
both_dtypes = pytest.mark.parametrize("dtype", [F16, BF16], ids=["fp16", "bf16"])

Inputs = dict[str, Tensor]


def make(
    dtype: torch.dtype,
    width: int,
    grid: tuple[int, int, int, int],
    *,
    heads: int = 2,
    bias: str = "none",
    seed: int = 0,
) -> tuple[Inputs, Tensor]:
    """The operator's tensors (bias: none, bias, token: a row_gate [P], row: one of [B, T, N, P]) and a gradient."""
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator)

    inputs = {"qkv": normal(*grid, 3, heads, width).to(dtype)}
    if bias != "none":
        inputs["key_bias"] = normal(*grid)
    if bias in ("token", "row"):
        inputs["row_gate"] = normal(*(grid if bias == "row" else grid[3:]))
    return inputs, normal(*grid, heads * width).to(dtype)


def gradients(inputs: Inputs, axis: str, grad_out: Tensor, backend: str) -> Inputs:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    with vggt_mv_ext.backend(backend):
        out = alternating_attention(axis=axis, **leaves)
        found = torch.autograd.grad(out, list(leaves.values()), grad_out)
    return dict(zip(leaves, found, strict=True))


def check(found: Inputs, inputs: Inputs, axis: str, grad_out: Tensor) -> None:
    doubles = {name: tensor.double() for name, tensor in inputs.items()}
    expected = gradients(doubles, axis, grad_out.double(), "reference")
    for name, gradient in found.items():
        assert gradient.dtype == inputs[name].dtype
        assert gradient.shape == inputs[name].shape
        assert gradient.isfinite().all(), name
        error = float((gradient.double() - expected[name]).norm() / expected[name].norm())
        tolerance = TOLERANCE[inputs["qkv"].dtype]
        assert error <= tolerance, f"{name}: relative error {error:.3g} > {tolerance:.3g}"


@both_dtypes
@pytest.mark.parametrize("width", [32, 64, 96, 128])
@pytest.mark.parametrize("bias", ["none", "row"])
@pytest.mark.parametrize("length", [15, 31, 33, 63, 65, 127, 128, 129, 893])
def test_every_width_and_length(length: int, bias: str, width: int, dtype: torch.dtype) -> None:
    inputs, grad_out = make(dtype, width, (1, 1, 1, length), bias=bias)
    check(gradients(inputs, "frame", grad_out, "cuda"), inputs, "frame", grad_out)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("bias", ["none", "bias", "token", "row"])
def test_every_axis(axis: str, bias: str) -> None:
    inputs, grad_out = make(BF16, 64, (2, 3, 2, 149), heads=3, bias=bias)
    check(gradients(inputs, axis, grad_out, "cuda"), inputs, axis, grad_out)


@pytest.mark.parametrize("layout", ["gap", "heads-first"])
def test_strides_change_nothing_but_addresses(layout: str) -> None:
    inputs, grad_out = make(F16, 64, (1, 3, 2, 77))
    qkv = inputs["qkv"]
    if layout == "gap":
        room = torch.full((*qkv.shape[:4], qkv[0, 0, 0, 0].numel() + 16), math.nan, dtype=F16, device="cuda")
        view = room[..., 16:].unflatten(-1, qkv.shape[4:])
    else:
        view = torch.empty_like(qkv.transpose(4, 5).contiguous()).transpose(4, 5)
    view.copy_(qkv)
    strided = gradients({"qkv": view}, "time", grad_out, "cuda")["qkv"]
    assert torch.equal(strided, gradients(inputs, "time", grad_out, "cuda")["qkv"])


def test_a_gradient_of_any_strides() -> None:
    """A sum's gradient is one number, expanded."""
    inputs, grad_out = make(BF16, 64, (1, 2, 1, 70))
    ones = torch.ones((), dtype=BF16, device="cuda").expand(grad_out.shape)
    found = gradients(inputs, "frame", ones, "cuda")["qkv"]
    assert torch.equal(found, gradients(inputs, "frame", ones.contiguous(), "cuda")["qkv"])


def test_the_same_bits_every_time() -> None:
    inputs, grad_out = make(BF16, 64, (1, 4, 2, 300), heads=16, bias="row")
    first = gradients(inputs, "global", grad_out, "cuda")
    for _ in range(5):
        again = gradients(inputs, "global", grad_out, "cuda")
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_keys_that_are_shut_out() -> None:
    inputs, grad_out = make(BF16, 64, (1, 1, 2, 300), bias="bias")
    inputs["key_bias"][..., :100] = -math.inf
    found = gradients(inputs, "view", grad_out, "cuda")
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert found["key_bias"][..., :100].abs().max() == 0
    assert found["qkv"][:, :, :, :100, 1:].abs().max() == 0


def test_another_stream() -> None:
    inputs, grad_out = make(BF16, 64, (1, 2, 2, 300), bias="token")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_side = gradients(inputs, "time", grad_out, "cuda")
    torch.cuda.current_stream().wait_stream(side)
    check(on_side, inputs, "time", grad_out)


def test_opcheck() -> None:
    inputs, _ = make(BF16, 32, (1, 2, 1, 9), bias="row")
    leaves = [inputs[name].requires_grad_() for name in ("qkv", "key_bias", "row_gate")]
    with vggt_mv_ext.backend("cuda"):
        torch.library.opcheck(
            torch.ops.vggt_mv.alternating_attention.default,
            (leaves[0], "time", leaves[1], leaves[2], None),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


def test_a_training_step_of_long_sequences() -> None:
    """Ten frames of 336 x 518 with the reference in float32 as the judge: float64 would not fit."""
    inputs, grad_out = make(BF16, 64, (1, 1, 10, 893), heads=4)
    found = gradients(inputs, "view", grad_out, "cuda")["qkv"]
    expected = torch.autograd.grad(
        reference.alternating_attention(leaf := inputs["qkv"].float().requires_grad_(), "view"), leaf, grad_out.float()
    )[0]
    error = float((found.float() - expected).norm() / expected.norm())
    assert error <= TOLERANCE[BF16]
