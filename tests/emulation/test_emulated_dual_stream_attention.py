"""dual_stream_attention's CUDA kernel under the operator's own code, run by the emulator, against float64."""

from __future__ import annotations

import ctypes
import importlib
import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from emulated_device import EmulatedDevice, far_apart, guarded
from test_emulated_alternating_attention_backward import EmulatedExtension as BackwardExtension
from test_emulated_alternating_attention_backward import longs, sum_of_ends
from torch import Tensor

from vggt_mv_ext import dual_stream_attention, reference

operator = importlib.import_module("vggt_mv_ext.ops.dual_stream_attention")  # the function of that name hides it

F16, BF16 = torch.float16, torch.bfloat16
# Relative Frobenius error against float64, of results and of gradients: see the tests of the kernels.
TOLERANCE = {F16: 2e-3, BF16: 1e-2}
NAMES = ("qkv_pose", "qkv_geo", "mask", "lambda_pose", "lambda_geo")
shared_or_not = pytest.mark.parametrize("shared", [False, True], ids=["own qkv", "shared qkv"])

Given = list[Tensor | None]


class EmulatedExtension(BackwardExtension):
    """The compiled module's functions by the emulator's: registers what the operator allocates and passes it on."""

    def dual_stream_attention_cuda(self, *arguments: Any) -> None:
        addresses, (grid, pose_steps, geo_steps, axis, heads, width, scale, dtype, stream) = (
            arguments[:9],
            arguments[9:],
        )
        assert stream == 7
        tokens, shape = math.prod(grid), (*grid, 3, heads)
        spans = [2 * (sum_of_ends(shape, steps) + width) for steps in (pose_steps, geo_steps)]
        rows, floats = 2 * tokens * heads * width, 4 * tokens * heads
        sizes = (*spans, 4 * tokens, 4, 4, rows, rows, floats, floats)
        for i, (address, size) in enumerate(zip(addresses, sizes, strict=True)):
            if address:
                self.device.library.emulator_register(address, size, f"argument {i}".encode(), int(i >= 5))
        status = self.device.library.emulated_dual_stream_attention(
            *(ctypes.c_void_p(address or None) for address in addresses),
            (ctypes.c_int * 4)(*grid),
            *(longs(steps) for steps in (pose_steps, geo_steps)),
            *(axis, heads, width, ctypes.c_float(scale), dtype),
        )
        assert status == 0 or self.device.reports(), f"cudaError_t {status}"


@pytest.fixture(autouse=True)
def as_on_a_gpu(emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator as on a GPU, but for the tensors, which are on the CPU."""
    monkeypatch.setattr(operator, "choose", lambda *_: "cuda")
    extension = EmulatedExtension(emulated)
    monkeypatch.setattr(operator, "extension", extension)
    monkeypatch.setattr(operator._single, "extension", extension)  # of the backward
    monkeypatch.setattr(operator._single._kernels, "stream_address", lambda tensor: 7)
    monkeypatch.setattr(operator._single._kernels, "device_guard", lambda tensor: nullcontext())


def make(
    dtype: torch.dtype, shared: bool, shape: tuple[int, ...] = (1, 2, 3, 9, 3, 2, 32), *, mask: bool = True
) -> Given:
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    given: Given = [normal(*shape).to(dtype), None if shared else normal(*shape).to(dtype), None, None, None]
    if mask:
        given[2:] = [torch.rand(shape[:4], generator=generator), torch.tensor(1.3), torch.tensor(0.7)]
    return given


def wide(given: Given) -> Given:
    return [None if tensor is None else tensor.double() for tensor in given]


def check(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.isfinite().all(), what
    error = float((actual.double() - expected).norm() / expected.norm())
    assert error <= tolerance, f"{what}: relative error {error:.3g} > {tolerance:.3g}"


@shared_or_not
@pytest.mark.parametrize("axis", ["frame", "view", "time", "global"])
def test_both_streams(emulated: EmulatedDevice, axis: str, shared: bool) -> None:
    """Each stream with its own sign and lambda: exchanged, they would be far outside of the tolerance."""
    given = make(F16, shared)
    with emulated.session("random", 1):
        found = dual_stream_attention(*given[:2], axis, *given[2:])  # type: ignore[arg-type]
    expected = reference.dual_stream_attention(*wide(given)[:2], axis, *wide(given)[2:])  # type: ignore[arg-type]
    for what, out, exact in zip(("pose", "geo"), found, expected, strict=True):
        assert out.dtype == F16 and out.is_contiguous()
        check(what, out, exact, TOLERANCE[F16])
    assert (expected[0] - expected[1]).norm() > 10 * TOLERANCE[F16] * expected[0].norm()


@shared_or_not
@pytest.mark.parametrize("width", [32, 64, 96, 128])
@pytest.mark.parametrize("length", [31, 64, 133])
def test_widths_and_lengths_of_more_than_a_tile(
    emulated: EmulatedDevice, length: int, width: int, shared: bool
) -> None:
    """Tiles have 64 (shared qkv) or 128 rows and 32 or 64 keys."""
    given = make(BF16, shared, (1, 1, 1, length, 3, 2 if length < 100 else 1, width))
    with emulated.session("reverse"):
        found = dual_stream_attention(*given[:2], "frame", *given[2:])  # type: ignore[arg-type]
    expected = reference.dual_stream_attention(*wide(given)[:2], "frame", *wide(given)[2:])  # type: ignore[arg-type]
    for what, out, exact in zip(("pose", "geo"), found, expected, strict=True):
        check(what, out, exact, TOLERANCE[BF16])


@pytest.mark.parametrize("layout", ["heads-first", "misaligned"])
def test_layouts_without_a_mask(emulated: EmulatedDevice, layout: str) -> None:
    given = make(F16, False, mask=False)
    qkv = given[1]
    assert qkv is not None
    if layout == "heads-first":
        given[1] = qkv.transpose(4, 5).contiguous().transpose(4, 5)
    else:
        given[1] = guarded((qkv.numel() + 1,), F16)[1:].view(qkv.shape).copy_(qkv)
    with emulated.session():
        found = dual_stream_attention(*given[:2], "time", *given[2:])  # type: ignore[arg-type]
    expected = reference.dual_stream_attention(*wide(given)[:2], "time", None, None, None)  # type: ignore[arg-type]
    for what, out, exact in zip(("pose", "geo"), found, expected, strict=True):
        check(what, out, exact, TOLERANCE[F16])


@shared_or_not
@pytest.mark.parametrize("streams", [(0, 1), (0,), (1,)], ids=["both", "pose", "geo"])
def test_gradients(emulated: EmulatedDevice, streams: tuple[int, ...], shared: bool) -> None:
    """Of q, k, v, the mask and both lambdas, by the kernels, where both results or one has a gradient."""
    given = make(F16, shared, (1, 2, 2, 9, 3, 2, 32))
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(1, 2, 2, 9, 64, generator=generator).to(F16) for _ in streams]

    def gradients(function, given: Given, grads: list[Tensor]) -> list[Tensor]:  # type: ignore[no-untyped-def]
        leaves = [None if tensor is None else tensor.clone().requires_grad_() for tensor in given]
        both = function(*leaves[:2], "view", *leaves[2:])
        present = [leaf for leaf in leaves if leaf is not None]
        chosen = [both[stream] for stream in streams]
        return list(torch.autograd.grad(chosen, present, grads, materialize_grads=True))

    with emulated.session("random", 2):
        found = gradients(dual_stream_attention, given, grads)
        assert emulated.launches() == 1 + 3 * len(streams)
    expected = gradients(reference.dual_stream_attention, wide(given), [grad.double() for grad in grads])
    mask, of_mask = given[2], expected[-3]
    assert mask is not None
    names = [name for name, tensor in zip(NAMES, given, strict=True) if tensor is not None]
    for name, gradient, exact in zip(names, found, expected, strict=True):
        if exact.count_nonzero() == 0:
            assert gradient.count_nonzero() == 0, name
        elif name.startswith("lambda"):  # an inner product with the mask: its error is bounded by the norms of both
            assert (gradient - exact).abs() <= TOLERANCE[F16] * mask.norm() * of_mask.norm(), name
        else:
            check(name, gradient, exact, TOLERANCE[F16])


@shared_or_not
def test_log_sums_shut_out_keys_and_order(emulated: EmulatedDevice, shared: bool) -> None:
    """lse of both streams; a mask of infinity shuts keys out of the pose stream; any order of fibers, the same bits."""
    given = make(F16, shared, (1, 1, 1, 100, 3, 1, 32))
    mask = given[2]
    assert mask is not None
    mask[..., :70] = torch.inf
    results = []
    for order in ("forward", "reverse", "random"):
        with emulated.session(order, 5):
            results.append(torch.ops.vggt_mv.dual_stream_attention(*given[:2], "frame", *given[2:], 0.3))
            assert emulated.launches() == 1
    pose, geo, _, _ = results[0]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0, equal_nan=True)
    qkv, geo_qkv, exact_mask, lambda_pose, lambda_geo = wide(given)
    assert qkv is not None and exact_mask is not None and lambda_pose is not None and lambda_geo is not None
    kept = [qkv[:, :, :, 70:], None, exact_mask[..., 70:], lambda_pose, lambda_geo]
    expected, _ = reference.dual_stream_attention(*kept[:2], "frame", *kept[2:], scale=0.3)  # type: ignore[arg-type]
    check("pose", pose[:, :, :, 70:], expected, TOLERANCE[F16])
    assert geo.isnan().all()  # infinity less infinity, as PyTorch has it

    mask[..., :70] = 0.5
    with emulated.session():
        *_, lse_pose, lse_geo = torch.ops.vggt_mv.dual_stream_attention(*given[:2], "frame", *given[2:], 0.3)
    exact_mask = mask.double()
    streams = ((lse_pose, qkv, -lambda_pose), (lse_geo, qkv if geo_qkv is None else geo_qkv, lambda_geo))
    for lse, tensor, weight in streams:
        q, k, _ = tensor[0, 0, 0, :, :, 0].unbind(1)
        exact = (0.3 * q @ k.mT + weight * exact_mask[0, 0, 0]).logsumexp(-1)
        torch.testing.assert_close(lse[0, 0].double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", ["frame", "view"])
def test_offsets_beyond_31_bits(emulated: EmulatedDevice, axis: str) -> None:
    """The streams' strides are their own: only one has two views 2^31 elements apart."""
    given = make(F16, False, (1, 1, 2, 10, 3, 2, 32))
    assert given[1] is not None
    given[1] = far_apart(given[1], 2)
    with emulated.session():
        found = dual_stream_attention(*given[:2], axis, *given[2:])  # type: ignore[arg-type]
    expected = reference.dual_stream_attention(*wide(given)[:2], axis, *wide(given)[2:])  # type: ignore[arg-type]
    for what, out, exact in zip(("pose", "geo"), found, expected, strict=True):
        check(what, out, exact, TOLERANCE[F16])


@shared_or_not
@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_shared_memory_has_no_bank_conflicts(emulated: EmulatedDevice, width: int, shared: bool) -> None:
    """Every matrix load, copy, store and load takes as few wavefronts as its bytes need."""
    given = make(F16, shared, (1, 1, 1, 128, 3, 1, width))
    with emulated.session(count_accesses=True):
        dual_stream_attention(*given[:2], "frame", *given[2:])  # type: ignore[arg-type]
        sites = emulated.access_sites()
    for site in sites:
        if site.space.startswith("shared") or (site.space == "global store" and site.bytes == 16):
            assert site.units == site.ideal_units, site
    stored = sum(site.units * 32 for site in sites if site.space == "global store" and site.bytes == 16)
    assert stored == 2 * 128 * width * 2


@pytest.mark.parametrize(
    ("change", "error"), [("width", 1), ("dtype", 1), ("scale", 1), ("no lambda", 1), ("odd", 716)]
)
def test_what_the_kernel_cannot_do_is_refused(
    emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch, change: str, error: int
) -> None:
    given = make(
        torch.float32 if change == "dtype" else F16, False, (1, 1, 1, 4, 3, 1, 48 if change == "width" else 32)
    )
    if change == "no lambda":
        monkeypatch.setattr(operator, "_check", lambda *_: None)
        given[4] = None
    elif change == "odd":
        monkeypatch.setattr(operator._kernels, "aligned_rows", lambda tensor: tensor)
        assert given[1] is not None
        given[1] = guarded((given[1].numel() + 1,), F16)[1:].view(given[1].shape).copy_(given[1])
    elif change == "scale":
        monkeypatch.setattr(operator, "_check", lambda *_: None)
    with pytest.raises(AssertionError, match=rf"cudaError_t {error}\b"), emulated.session():
        torch.ops.vggt_mv.dual_stream_attention(*given[:2], "frame", *given[2:], -1.0 if change == "scale" else None)
