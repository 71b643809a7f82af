"""dual_stream_attention's own code for CUDA, run on the CPU with the emulator behind it, against float64."""

from __future__ import annotations

import importlib
from contextlib import nullcontext

import pytest
import torch
from emulated_device import EmulatedDevice, guarded
from test_emulated_alternating_attention import EmulatedExtension as ForwardExtension
from test_emulated_alternating_attention_backward import EmulatedExtension as BackwardExtension
from torch import Tensor

from vggt_mv_ext import dual_stream_attention, reference

operator = importlib.import_module("vggt_mv_ext.ops.dual_stream_attention")  # the function of that name hides it

F16, BF16 = torch.float16, torch.bfloat16
# Relative Frobenius error against float64, of results and of gradients: see the tests of the kernels.
TOLERANCE = {F16: 2e-3, BF16: 1e-2}
NAMES = ("qkv_pose", "qkv_geo", "mask", "lambda_pose", "lambda_geo")
shared_or_not = pytest.mark.parametrize("shared", [False, True], ids=["own qkv", "shared qkv"])

Given = list[Tensor | None]


class EmulatedExtension(ForwardExtension, BackwardExtension):
    """The compiled module's functions by the emulator's."""


@pytest.fixture(autouse=True)
def as_on_a_gpu(emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator as on a GPU, but for the tensors, which are on the CPU."""
    monkeypatch.setattr(operator, "choose", lambda *_: "cuda")
    monkeypatch.setattr(operator._single, "extension", EmulatedExtension(emulated))
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


@pytest.mark.parametrize("width", [64, 96, 128])
def test_widths_and_lengths_of_more_than_a_tile(emulated: EmulatedDevice, width: int) -> None:
    given = make(BF16, False, (1, 1, 1, 70, 3, 1, width))
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
        assert emulated.launches() == 2 + 3 * len(streams)
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
