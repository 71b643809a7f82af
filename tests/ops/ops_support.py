"""What the operator tests share: how far a result may be from the float64 reference, and inputs that lie awkwardly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vggt_mv_ext._extension import extension

# Every instruction set that CPU kernels are compiled for; the fixture `isa` skips those that this machine lacks.
ISAS = ("portable", "avx2", "avx512", "avx512_bf16")

# Relative Frobenius error against the float64 reference. A result is rounded once to its dtype (half a unit in the last
# place: 2^-24, 2^-11, 2^-8) and built from inputs and intermediate results that were rounded so too; the bounds leave a
# factor of a few for those.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
ROUNDING_UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def widest_tolerance(*dtypes: torch.dtype) -> torch.dtype:
    """Of the dtypes that go into a result, the one that limits its accuracy."""
    return max(dtypes, key=TOLERANCE.__getitem__)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference by that of `exact`; a tensor of (nearly) zeros is measured absolutely."""
    floor = 1e-3 * math.sqrt(max(exact.numel(), 1))
    return ((got.double() - exact).norm() / exact.norm().clamp_min(floor)).item()


def assert_accurate(name: str, got: Tensor, exact: Tensor, dtype: torch.dtype, eager: Tensor | None = None) -> None:
    """Fails unless `got` is as near to the float64 result `exact` as computing in `dtype` allows.

    A NaN or an infinity passes only where `exact` has the same. With `eager`, what PyTorch computes in the same dtype,
    the error may also be at most 1.5 times eager's plus one rounding unit.
    """
    assert got.shape == exact.shape, f"{name}: shape {list(got.shape)} instead of {list(exact.shape)}"
    for what, test in (("NaN", torch.isnan), ("infinity", torch.isinf)):
        wrong = test(got) != test(exact)
        assert not wrong.any(), f"{name}: {what} at {wrong.nonzero()[0].tolist()}, or missing there"
    finite = exact.isfinite()
    got, exact = got[finite], exact[finite]
    error = relative_error(got, exact)
    worst = (got.double() - exact).abs().argmax().item() if got.numel() else -1
    where = f"worst: {got[worst].item()} instead of {exact[worst].item()}" if got.numel() else ""
    assert error <= TOLERANCE[dtype], f"{name}: relative error {error:.2e} above {TOLERANCE[dtype]:.0e}; {where}"
    if eager is not None:
        bound = 1.5 * relative_error(eager[finite], exact) + ROUNDING_UNIT[dtype]
        assert error <= bound, f"{name}: relative error {error:.2e} above 1.5 x eager's + a unit, {bound:.2e}; {where}"


def strided_in_nan(tensor: Tensor) -> Tensor:
    """The same values as a view with gaps between rows, inside a buffer of NaN: reading beside a row shows."""
    *outer, features = tensor.shape
    buffer = torch.full((*outer, features + 5), float("nan"), dtype=tensor.dtype)
    view = buffer[..., 2 : 2 + features]
    view.copy_(tensor.detach())
    return view.requires_grad_(tensor.requires_grad)


def usable_isas() -> Sequence[str]:
    return [] if extension is None else extension.build_info()["cpu_isas_usable"]


def compiled_isas() -> Sequence[str]:
    return [] if extension is None else extension.build_info()["cpu_isas"]
