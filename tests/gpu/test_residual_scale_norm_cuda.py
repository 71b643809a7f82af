"""`residual_scale_norm` by its CUDA kernel, against float64, in every dtype combination and at awkward sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vggt_mv_ext

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
COMBINATIONS = [  # x, y, parameters
    (F32, F32, F32),
    (F16, F16, F16),
    (BF16, BF16, BF16),
    (F32, F16, F32),
    (F32, BF16, F32),
    (F16, F16, F32),
    (BF16, BF16, F32),
]
TOLERANCE = {F32: 1e-5, F16: 2e-3, BF16: 1e-2}
SIZES = [(1, 1), (1, 7), (3, 64), (5, 1023), (4, 1024), (4, 1025), (2, 5000), (1374, 1024), (20611, 1024)]


def make(rows: int, features: int, dtypes: tuple[torch.dtype, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    x, y = (torch.randn(rows, features, device="cuda", generator=generator).to(dtype) for dtype in dtypes[:2])
    parameters = [torch.randn(features, device="cuda", generator=generator).to(dtypes[2]) for _ in range(3)]
    return [x, y, *parameters]


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference).norm() / reference.norm().clamp_min(1e-30))


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtypes", COMBINATIONS, ids=lambda dtypes: "-".join(map(short, dtypes)))
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_forward_against_float64(size: tuple[int, int], dtypes: tuple[torch.dtype, ...]) -> None:
    arguments = make(*size, dtypes)
    expected = vggt_mv_ext.reference.residual_scale_norm(*(a.double() for a in arguments))
    eager = vggt_mv_ext.reference.residual_scale_norm(*arguments)
    with vggt_mv_ext.backend("cuda"):
        found = vggt_mv_ext.residual_scale_norm(*arguments)
    for value, plain, reference, dtype in zip(found, eager, expected, dtypes, strict=False):
        assert value.dtype == dtype
        error = relative_error(value, reference)
        assert error <= max(TOLERANCE[dtype] / 100, 1.5 * relative_error(plain, reference) + torch.finfo(dtype).eps)
        if size[1] > 1:  # one feature normalises to the bias, whatever the sum was
            assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("dtypes", COMBINATIONS, ids=lambda dtypes: "-".join(map(short, dtypes)))
@pytest.mark.parametrize("size", [(3, 64), (5, 1023), (1374, 1024)], ids=lambda size: "x".join(map(str, size)))
def test_backward_against_float64(size: tuple[int, int], dtypes: tuple[torch.dtype, ...]) -> None:
    arguments = [a.requires_grad_() for a in make(*size, dtypes)]
    exact = [a.detach().double().requires_grad_() for a in arguments]
    with vggt_mv_ext.backend("cuda"):
        found = vggt_mv_ext.residual_scale_norm(*arguments)
        weights = [torch.randn_like(value) for value in found]
        gradients = torch.autograd.grad(found, arguments, weights)
        again = torch.autograd.grad(vggt_mv_ext.residual_scale_norm(*arguments), arguments, weights)
    expected = torch.autograd.grad(
        vggt_mv_ext.reference.residual_scale_norm(*exact), exact, [weight.double() for weight in weights]
    )
    low = max(TOLERANCE[dtype] for dtype in dtypes)
    for gradient, repeated, reference in zip(gradients, again, expected, strict=True):
        assert relative_error(gradient, reference) < 2 * low
        assert torch.equal(gradient, repeated), "the backward pass must be deterministic"


def test_strided_rows() -> None:
    x, y, *parameters = make(64, 512, (F32, BF16, F32))
    wide_x, wide_y = x[:, :256], y[::2].repeat_interleave(2, dim=0)[:, 256:]
    parameters = [p[:256] for p in parameters]
    expected = vggt_mv_ext.reference.residual_scale_norm(
        wide_x.double(), wide_y.double(), *(p.double() for p in parameters)
    )
    with vggt_mv_ext.backend("cuda"):
        found = vggt_mv_ext.residual_scale_norm(wide_x, wide_y, *parameters)
    assert relative_error(found[0], expected[0]) < 1e-5
    assert relative_error(found[1], expected[1]) < 1e-2


def test_opcheck() -> None:
    arguments = [a.requires_grad_() for a in make(6, 96, (F32, BF16, F32))]
    with vggt_mv_ext.backend("cuda"):
        torch.library.opcheck(torch.ops.vggt_mv.residual_scale_norm.default, (*arguments, 1e-5))


def test_another_stream_and_graph_capture() -> None:
    arguments = make(1374, 1024, (F32, BF16, F32))
    expected = vggt_mv_ext.reference.residual_scale_norm(*(a.double() for a in arguments))
    with vggt_mv_ext.backend("cuda"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            on_side = vggt_mv_ext.residual_scale_norm(*arguments)
        torch.cuda.current_stream().wait_stream(side)
        assert relative_error(on_side[1], expected[1]) < 1e-2

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = vggt_mv_ext.residual_scale_norm(*arguments)
    fresh = make(1374, 1024, (F32, BF16, F32), seed=1)
    for old, new in zip(arguments, fresh, strict=True):
        old.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    expected = vggt_mv_ext.reference.residual_scale_norm(*(a.double() for a in fresh))
    assert relative_error(captured[0], expected[0]) < 1e-5
    assert relative_error(captured[1], expected[1]) < 1e-2


def test_auto_takes_the_kernel() -> None:
    assert vggt_mv_ext.explain("residual_scale_norm", *make(2, 8, (F32, F32, F32))).backend == "cuda"
