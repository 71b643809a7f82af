"""qk_norm_rope's own code for CUDA, run on the CPU with the emulator behind it: copies, casts, arguments, autograd."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from emulated_device import ROLES, EmulatedDevice, guarded
from torch import Tensor

from vggt_mv_ext import qk_norm_rope, reference

operator = importlib.import_module("vggt_mv_ext.ops.qk_norm_rope")  # the function of that name hides it

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = {F32: "fp32", F16: "fp16", BF16: "bf16"}
BYTES = {0: 4, 1: 2, 2: 2}  # of the numbers of dtypes
# Relative Frobenius error against float64: mostly the rounding of the result (2^-11, 2^-8).
TOLERANCE = {F32: 1e-6, F16: 5e-4, BF16: 4e-3}
GRID_HW, SPECIAL = (2, 3), 5

Norm = tuple[Tensor, Tensor]


class EmulatedExtension:
    """The compiled module's functions by the emulator's: registers what the operator allocates and passes it on."""

    def __init__(self, device: EmulatedDevice) -> None:
        self.device = device
        self.norm_dtypes: list[int] = []

    def register(self, addresses: Sequence[int], sizes: Sequence[int], first_output: int) -> None:
        for i, (address, size) in enumerate(zip(addresses, sizes, strict=True)):
            if address and address not in addresses[:i]:
                again = address in addresses[i + 1 :]
                role = ROLES["in_out" if again else "output" if i >= first_output else "input"]
                self.device.library.emulator_register(address, size, f"argument {i}".encode(), role)

    def check(self, status: int) -> None:
        assert status == 0 or self.device.reports(), f"cudaError_t {status}"

    def qk_norm_rope_cuda(self, *arguments: Any) -> None:
        qkv, out, *norms, table = arguments[:7]
        grid, steps, out_steps, heads, width, special, columns, position, eps, dtype, norm_dtype, stream = arguments[7:]
        assert stream == 7
        shape, item, norm_bytes = (*grid, 3, heads), BYTES[dtype], width * BYTES[norm_dtype]
        sizes = (
            *(norm_bytes for _ in norms),
            table_bytes(grid, width, special, columns, position),
            item * (end_of(shape, steps) + width),
            item * (end_of(shape, out_steps) + width),
        )
        self.norm_dtypes.append(norm_dtype)
        self.register((*norms, table, qkv, out), (*sizes[:5], *sizes[5:]), first_output=6)
        status = self.device.library.emulated_qk_norm_rope(
            *pointers(arguments[:7]),
            (ctypes.c_int * 4)(*grid),
            longs(steps),
            longs(out_steps),
            *(heads, width, special, columns, position, ctypes.c_float(eps), dtype, norm_dtype),
        )
        self.check(status)

    def qk_norm_rope_backward_cuda(self, *arguments: Any) -> None:
        grad_out, qkv, grad_qkv, q_weight, k_weight, table, partial, grad_norms = arguments[:8]
        grid, *steps, heads, width, special, columns, position, blocks, eps, dtype, norm_dtype, stream = arguments[8:]
        assert stream == 7
        shape, item, norm_bytes = (*grid, 3, heads), BYTES[dtype], width * BYTES[norm_dtype]
        spans = [item * (end_of(shape, step) + width) for step in steps]
        table_size = table_bytes(grid, width, special, columns, position)
        self.norm_dtypes.append(norm_dtype)
        self.register(
            (grad_out, qkv, q_weight, k_weight, table, grad_qkv, partial, grad_norms),
            (*spans[:2], norm_bytes, norm_bytes, table_size, spans[2], 4 * 2 * blocks * 2 * width, 4 * 2 * 2 * width),
            first_output=5,
        )
        status = self.device.library.emulated_qk_norm_rope_backward(
            *pointers(arguments[:8]),
            (ctypes.c_int * 4)(*grid),
            *(longs(step) for step in steps),
            *(heads, width, special, columns, position, blocks, ctypes.c_float(eps), dtype, norm_dtype),
        )
        self.check(status)

    def qk_norm_rope_blocks(self, grid: Sequence[int]) -> int:
        return int(self.device.library.emulated_qk_norm_rope_blocks((ctypes.c_int * 4)(*grid)))


def end_of(shape: Sequence[int], steps: Sequence[int]) -> int:
    """Offset of the last row."""
    return sum((size - 1) * step for size, step in zip(shape, steps, strict=True))


def table_bytes(grid: Sequence[int], width: int, special: int, columns: int, position: int) -> int:
    rows = (grid[3] - special) // columns
    return (max(rows, columns, position) + 1) * (width // 4) * 2 * 4


def longs(values: Sequence[int]) -> ctypes.Array[ctypes.c_longlong]:
    return (ctypes.c_longlong * len(values))(*values)


def pointers(addresses: Sequence[int]) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(address or None) for address in addresses]


@pytest.fixture
def extension(emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> EmulatedExtension:
    """The operator as on a GPU, but for the tensors, which are on the CPU."""
    replacement = EmulatedExtension(emulated)
    monkeypatch.setattr(operator, "choose", lambda *_: "cuda")
    monkeypatch.setattr(operator, "extension", replacement)
    monkeypatch.setattr(operator._kernels, "stream_address", lambda tensor: 7)
    monkeypatch.setattr(operator._kernels, "device_guard", lambda tensor: nullcontext())
    return replacement


def make(dtypes: Sequence[torch.dtype], width: int = 32, heads: int = 3) -> tuple[Tensor, Norm, Norm]:
    """qkv, and norms whose parameters have the second and third dtype."""
    generator = torch.Generator().manual_seed(width + heads)
    shape = (1, 2, 2, SPECIAL + GRID_HW[0] * GRID_HW[1], 3, heads, width)
    qkv = (torch.randn(shape, generator=generator) + 0.5).to(dtypes[0])
    norms = [
        (
            (1 + 0.3 * torch.randn(width, generator=generator)).to(dtype),
            torch.randn(width, generator=generator).to(dtype),
        )
        for dtype in dtypes[1:]
    ]
    return qkv, norms[0], norms[1]


def laid_out(qkv: Tensor, layout: str) -> Tensor:
    """The same numbers elsewhere."""
    if layout == "heads-first":
        return qkv.transpose(4, 5).contiguous().transpose(4, 5)
    if layout == "misaligned":
        return guarded((qkv.numel() + 1,), qkv.dtype)[1:].view(qkv.shape).copy_(qkv)
    if layout == "spread":  # no unit stride in D
        return guarded((*qkv.shape, 2), qkv.dtype)[..., 0].copy_(qkv)
    if layout == "odd stride of one batch":
        copy = qkv.contiguous().clone()
        return copy.as_strided(copy.shape, (copy.stride(0) + 1, *copy.stride()[1:]))
    return qkv.clone()


def relative_error(value: Tensor, expected: Tensor) -> float:
    assert value.isfinite().all()
    return float((value.double() - expected).norm() / expected.norm())


LAYOUTS = ["contiguous", "heads-first", "misaligned", "spread", "odd stride of one batch"]


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_of_any_layout(
    emulated: EmulatedDevice, extension: EmulatedExtension, layout: str, inplace: bool
) -> None:
    qkv, q_norm, k_norm = make((F16, F32, F32))
    given = laid_out(qkv, layout)
    with emulated.session("random", 1):
        out = qk_norm_rope(given, q_norm, k_norm, GRID_HW, SPECIAL, special_position=4, inplace=inplace)
        assert emulated.launches() == 1
    expected = reference.qk_norm_rope(qkv.double(), *wide(q_norm, k_norm), GRID_HW, SPECIAL, special_position=4)
    assert relative_error(out, expected) < TOLERANCE[F16]
    assert (out is given) == (inplace and layout not in ("misaligned", "spread"))
    assert out is given or torch.equal(given, qkv)


@pytest.mark.parametrize("layout", ["contiguous", "misaligned"])
def test_the_operator_that_overwrites(emulated: EmulatedDevice, extension: EmulatedExtension, layout: str) -> None:
    """`qk_norm_rope_` itself overwrites whatever the layout: by way of a copy where the kernel cannot."""
    qkv, q_norm, k_norm = make((BF16, BF16, BF16))
    given = laid_out(qkv, layout)
    with emulated.session():
        torch.ops.vggt_mv.qk_norm_rope_(given, *q_norm, *k_norm, *GRID_HW, SPECIAL, 100.0, 1e-5, 0)
    expected = reference.qk_norm_rope(qkv.double(), *wide(q_norm, k_norm), GRID_HW, SPECIAL)
    assert relative_error(given, expected) < TOLERANCE[BF16]


def wide(*norms: Norm | None) -> list[Norm | None]:
    return [None if norm is None else (norm[0].double(), norm[1].double()) for norm in norms]


NORMS = {
    "norms as qkv": ((BF16, BF16, BF16), True, 2),
    "norms in fp32": ((BF16, F32, F32), True, 0),
    "norms of two dtypes": ((F16, F16, F32), True, 0),
    "everything fp32": ((F32, F32, F32), True, 0),
    "no norms": ((F16, F32, F32), False, 0),
}


@pytest.mark.parametrize(("dtypes", "present", "kernel_dtype"), NORMS.values(), ids=NORMS.keys())
def test_gradients(
    emulated: EmulatedDevice,
    extension: EmulatedExtension,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    present: bool,
    kernel_dtype: int,
) -> None:
    """Through autograd; parameters at odd addresses, the gradient expanded from one token's."""
    qkv, *norms = make(dtypes, width=64)
    given = [laid_out(t, "misaligned").requires_grad_() for norm in norms for t in norm] if present else [None] * 4
    leaf = laid_out(qkv, "heads-first").requires_grad_()
    grad = torch.randn(qkv.shape[3:], generator=torch.Generator().manual_seed(1)).to(qkv.dtype).expand(qkv.shape)

    def function(run: Any, qkv: Tensor, parameters: Sequence[Any]) -> Tensor:
        pairs = [None if a is None else (a, b) for a, b in zip(parameters[::2], parameters[1::2], strict=True)]
        return run(qkv, *pairs, GRID_HW, SPECIAL)

    with emulated.session("random", 2):
        out = function(qk_norm_rope, leaf, given)
    leaves = [leaf, *(t for t in given if t is not None)]
    with emulated.session("random", 3):
        found = torch.autograd.grad(out, leaves, grad)
    assert extension.norm_dtypes == [kernel_dtype, kernel_dtype]

    exact = [t.detach().double().requires_grad_() for t in leaves]
    expected_out = function(reference.qk_norm_rope, exact[0], exact[1:] or [None] * 4)
    expected = torch.autograd.grad(expected_out, exact, grad.double())
    assert relative_error(out.detach(), expected_out.detach()) < TOLERANCE[qkv.dtype]
    for i, (gradient, leaf, exact_gradient) in enumerate(zip(found, leaves, expected, strict=True)):
        assert gradient.dtype == leaf.dtype
        assert relative_error(gradient, exact_gradient) < (
            3 * TOLERANCE[qkv.dtype] if i == 0 else TOLERANCE[leaf.dtype] + 1e-5
        ), i


def test_gradient_of_qkv_alone_makes_no_sums(emulated: EmulatedDevice, extension: EmulatedExtension) -> None:
    qkv, q_norm, k_norm = make((BF16, F32, F32))
    leaf = qkv.requires_grad_()
    with emulated.session():
        out = qk_norm_rope(leaf, q_norm, k_norm, GRID_HW, SPECIAL)
    with emulated.session():
        torch.autograd.grad(out, leaf, torch.ones_like(out))
        assert emulated.launches() == 1
