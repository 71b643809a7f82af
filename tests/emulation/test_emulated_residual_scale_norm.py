"""residual_scale_norm's CUDA kernels and launchers, run by the emulator, against float64."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from emulated_device import EmulatedDevice, guarded, guarded_copy
from torch import Tensor

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPE_NUMBERS = {F32: 0, F16: 1, BF16: 2}
COMBINATIONS = [
    (F32, F32, F32),
    (F16, F16, F16),
    (BF16, BF16, BF16),
    (F32, F16, F32),
    (F32, BF16, F32),
    (F16, F16, F32),
    (BF16, BF16, F32),
]
# Relative Frobenius error against float64; the low precisions' own rounding (2^-11, 2^-8) is most of it.
TOLERANCE = {F32: 1e-6, F16: 5e-4, BF16: 4e-3}
EPS = 1e-5


def name_of(dtype: torch.dtype) -> str:
    return {F32: "fp32", F16: "fp16", BF16: "bf16"}[dtype]


combination_ids = ["-".join(map(name_of, dtypes)) for dtypes in COMBINATIONS]


@dataclass
class Problem:
    """Inputs, guarded by poison, and room for the outputs, filled with it."""

    x: Tensor
    y: Tensor
    gamma: Tensor
    weight: Tensor
    bias: Tensor

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        return self.x.dtype, self.y.dtype, self.gamma.dtype


def make_problem(
    rows: int,
    features: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    *,
    offset: float = 0.0,
    place: Callable[[Tensor], Tensor] = guarded_copy,
) -> Problem:
    """Random inputs; `offset` shifts the rows away from zero, `place` lays x and y out."""
    generator = torch.Generator().manual_seed(1000 * rows + features)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x_dtype, y_dtype, p_dtype = dtypes
    return Problem(
        place((random(rows, features) + offset).to(x_dtype)),
        place(random(rows, features).to(y_dtype)),
        guarded_copy(random(features).to(p_dtype)),
        guarded_copy((1 + 0.3 * random(features)).to(p_dtype)),
        guarded_copy(random(features).to(p_dtype)),
    )


def with_row_gap(gap: int) -> Callable[[Tensor], Tensor]:
    """Lays a matrix out with `gap` poisoned elements between its rows."""

    def place(source: Tensor) -> Tensor:
        rows, features = source.shape
        wide = guarded((rows, features + gap), source.dtype)
        wide[:, :features] = source
        return wide[:, :features]

    return place


def shifted(source: Tensor) -> Tensor:
    """Lays a matrix out contiguously, one element past a 16-byte boundary."""
    flat = guarded((source.numel() + 1,), source.dtype)
    flat[1:] = source.reshape(-1)
    return flat[1:].view(source.shape)


def address(pointer: int | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(pointer)


def run_forward(device: EmulatedDevice, p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inside a session: (residual, normed, mean, rstd)."""
    rows, features = p.x.shape
    residual, normed = guarded((rows, features), p.x.dtype), guarded((rows, features), p.y.dtype)
    mean, rstd = guarded((rows,), F32), guarded((rows,), F32)
    inputs = [device.buffer(getattr(p, name), name) for name in ("x", "y", "gamma", "weight", "bias")]
    outputs = [
        device.buffer(tensor, name, "output")
        for name, tensor in (("residual", residual), ("normed", normed), ("mean", mean), ("rstd", rstd))
    ]
    status = device.library.emulated_residual_scale_norm(
        *map(address, inputs + outputs),
        ctypes.c_longlong(rows),
        features,
        ctypes.c_longlong(p.x.stride(0)),
        ctypes.c_longlong(p.y.stride(0)),
        ctypes.c_float(EPS),
        *(DTYPE_NUMBERS[dtype] for dtype in p.dtypes),
    )
    assert status == 0 or device.reports(), f"cudaError_t {status}"
    return residual, normed, mean, rstd


def assert_close(name: str, actual: Tensor, expected: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """Relative Frobenius error, NaN and infinity never pass; says where the worst element is."""
    if expected.numel() == 0:
        return
    assert actual.isfinite().all(), f"{name}: {int((~actual.isfinite()).sum())} of {actual.numel()} are not finite"
    difference = (actual.double() - expected).abs()
    error = float(difference.norm() / expected.norm().clamp_min(1e-30))
    worst = int(difference.argmax())
    assert error <= scale * TOLERANCE[dtype], (
        f"{name}: relative error {error:.3g} > {scale * TOLERANCE[dtype]:.3g}; worst at flat index {worst}: "
        f"{actual.flatten()[worst]} instead of {expected.flatten()[worst]}"
    )


def check_forward(p: Problem, outputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    residual, normed, mean, rstd = outputs
    exact = p.x.double() + p.gamma.double() * p.y.double()
    assert_close("residual", residual, exact, p.x.dtype)
    rounded = residual.double()
    assert_close("mean", mean + 1, rounded.mean(-1) + 1, F32)
    exact_rstd = (rounded.var(-1, correction=0) + EPS).rsqrt()
    assert_close("rstd", rstd, exact_rstd, F32)
    expected = torch.nn.functional.layer_norm(rounded, rounded.shape[-1:], p.weight.double(), p.bias.double(), EPS)
    assert_close("normed", normed, expected, p.y.dtype)


# Features: one, odd, below, at and above a vector and a warp's 4 vectors, the groups of 4 and 8 warps, the real widths.
NARROW = [1, 7, 8, 9, 255, 256, 257, 511, 513]
REAL = [384, 768, 1024]
WIDE = [1023, 1032, 1536, 2048, 4095, 4096, 4104]


@pytest.mark.parametrize("dtypes", COMBINATIONS, ids=combination_ids)
@pytest.mark.parametrize("features", [*NARROW, *REAL])
def test_forward_of_every_combination(emulated: EmulatedDevice, dtypes, features: int) -> None:
    problem = make_problem(5, features, dtypes)
    with emulated.session("random", features):
        outputs = run_forward(emulated, problem)
        assert emulated.launches() == 1
    check_forward(problem, outputs)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("features", [1, 9, 1024, 1032, 4096])
def test_forward_in_every_order(emulated: EmulatedDevice, order: str, features: int) -> None:
    problem = make_problem(3, features, (BF16, BF16, F32))
    results = []
    for attempt in range(2):
        with emulated.session(order, attempt):
            results.append(run_forward(emulated, problem))
        check_forward(problem, results[-1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), "the order of threads changes the result"


@pytest.mark.parametrize(
    "dtypes", [(F32, F32, F32), (BF16, BF16, BF16), (F32, F16, F32)], ids=["fp32", "bf16", "mixed"]
)
@pytest.mark.parametrize("features", WIDE)
def test_forward_of_wide_rows(emulated: EmulatedDevice, dtypes, features: int) -> None:
    problem = make_problem(2, features, dtypes)
    with emulated.session("reverse"):
        outputs = run_forward(emulated, problem)
    check_forward(problem, outputs)


@pytest.mark.parametrize("features", [8192, 8200, 9001])
def test_forward_of_rows_beyond_the_registers(emulated: EmulatedDevice, features: int) -> None:
    problem = make_problem(2, features, (BF16, BF16, F32))
    with emulated.session("random", 1):
        outputs = run_forward(emulated, problem)
    check_forward(problem, outputs)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 9])
def test_forward_of_few_rows(emulated: EmulatedDevice, rows: int) -> None:
    """A block of the narrow kernel takes four rows."""
    problem = make_problem(rows, 64, (F16, F16, F16))
    with emulated.session("random", rows):
        outputs = run_forward(emulated, problem)
    check_forward(problem, outputs)


@pytest.mark.parametrize(("features", "rows"), [(8, 300), (520, 70), (4104, 66)])
def test_forward_of_more_rows_than_the_grid_has(emulated: EmulatedDevice, features: int, rows: int) -> None:
    """One multiprocessor: 64 blocks, so that blocks go round."""
    dtypes = (F32, F32, F32) if features == 4104 else (BF16, BF16, BF16)
    problem = make_problem(rows, features, dtypes)
    with emulated.session("random", 3, multiprocessors=1):
        outputs = run_forward(emulated, problem)
    check_forward(problem, outputs)


@pytest.mark.parametrize("dtypes", COMBINATIONS, ids=combination_ids)
@pytest.mark.parametrize(
    "place", [with_row_gap(16), with_row_gap(3), shifted], ids=["aligned-gap", "odd-gap", "misaligned"]
)
def test_forward_of_strided_and_misaligned_rows(emulated: EmulatedDevice, dtypes, place) -> None:
    problem = make_problem(5, 128, dtypes, place=place)
    with emulated.session("reverse"):
        outputs = run_forward(emulated, problem)
    check_forward(problem, outputs)


@pytest.mark.parametrize("features", [512, 1024, 8200])
def test_statistics_of_rows_far_from_zero(emulated: EmulatedDevice, features: int) -> None:
    """Mean 1000, deviation 1: E[r^2] - E[r]^2 in float would leave an error of about 6 % in the variance."""
    problem = make_problem(2, features, (F32, F32, F32), offset=1000.0)
    problem.gamma.zero_()
    with emulated.session():
        residual, normed, _, _ = run_forward(emulated, problem)
    rounded = residual.double()
    expected = torch.nn.functional.layer_norm(rounded, (features,), problem.weight.double(), problem.bias.double(), EPS)
    assert_close("normed", normed, expected, F32, scale=100)  # the mean of 1000 is known to 2^-24 * 1000


def test_nothing_to_do_launches_nothing(emulated: EmulatedDevice) -> None:
    for rows, features in ((0, 64), (4, 0)):
        with emulated.session():
            run_forward(emulated, make_problem(rows, features, (BF16, BF16, BF16)))
            assert emulated.launches() == 0


@pytest.mark.parametrize("dtypes", [(F16, F32, F32), (F16, BF16, F32), (F32, F32, F16), (F16, F16, BF16)])
def test_other_combinations_are_refused(emulated: EmulatedDevice, dtypes) -> None:
    with pytest.raises(AssertionError, match="cudaError_t 1"), emulated.session():
        run_forward(emulated, make_problem(2, 8, dtypes))


def test_every_byte_is_moved_once(emulated: EmulatedDevice) -> None:
    """At C = 1024, bf16: each input and output crosses the bus once, in full sectors, 16 bytes a thread."""
    rows, features = 8, 1024
    problem = make_problem(rows, features, (BF16, BF16, BF16))
    with emulated.session(count_accesses=True):
        run_forward(emulated, problem)
        sites = emulated.access_sites()
    tensor_sectors = rows * features * 2 // 32
    once = [site for site in sites if site.space == "global load" and site.units == 2 * tensor_sectors]
    assert len(once) == 1, sites  # x and y through the same statement of load_packed_once
    vector_stores = [site for site in sites if site.space == "global store" and site.bytes == 16]
    assert sum(site.units for site in vector_stores) == 2 * tensor_sectors
    assert all(site.units == site.ideal_units for site in sites if site.bytes == 16)


# ---------------------------------------------------------------------------------------------------------- backward


@dataclass
class Gradients:
    x: Tensor
    y: Tensor
    parameters: Tensor | None  # [3, C]


def run_backward(
    device: EmulatedDevice,
    p: Problem,
    residual: Tensor,
    grads: tuple[Tensor | None, Tensor | None],
    *,
    row_blocks: int,
    parameters: bool = True,
) -> Gradients:
    """Inside a session; statistics are computed here, in float64, and rounded."""
    rows, features = p.x.shape
    wide = residual.double()
    mean = guarded_copy(wide.mean(-1).float())
    variance = (wide - wide.mean(-1, keepdim=True)).square().mean(-1)
    rstd = guarded_copy((variance + EPS).rsqrt().float())
    grad_x, grad_y = guarded((rows, features), p.x.dtype), guarded((rows, features), p.y.dtype)
    partial, total = guarded((row_blocks, 3, features), F32), guarded((3, features), F32)
    names = ["grad_residual", "grad_normed", "residual", "y", "gamma", "weight", "mean", "rstd"]
    tensors = [*grads, residual, p.y, p.gamma, p.weight, mean, rstd]
    inputs = [
        None if tensor is None else device.buffer(tensor, name) for name, tensor in zip(names, tensors, strict=True)
    ]
    outputs: list[int | None] = [device.buffer(grad_x, "grad_x", "output"), device.buffer(grad_y, "grad_y", "output")]
    if parameters:
        outputs += [device.buffer(partial, "partial_sums", "output"), device.buffer(total, "parameters", "output")]
    else:
        outputs += [None, None]
    status = device.library.emulated_residual_scale_norm_backward(
        *map(address, inputs + outputs),
        ctypes.c_longlong(rows),
        features,
        row_blocks,
        ctypes.c_longlong(p.y.stride(0)),
        *(DTYPE_NUMBERS[dtype] for dtype in p.dtypes),
    )
    assert status == 0 or device.reports(), f"cudaError_t {status}"
    return Gradients(grad_x, grad_y, total if parameters else None)


def prepare_backward(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """(residual, grad_residual, grad_normed)."""
    generator = torch.Generator().manual_seed(17)
    residual = guarded_copy((p.x.double() + p.gamma.double() * p.y.double()).to(p.x.dtype))
    grad_residual = guarded_copy(torch.randn(p.x.shape, generator=generator).to(p.x.dtype))
    grad_normed = guarded_copy(torch.randn(p.y.shape, generator=generator).to(p.y.dtype))
    return residual, grad_residual, grad_normed


def check_backward(p: Problem, residual: Tensor, grads: tuple[Tensor | None, Tensor | None], actual: Gradients) -> None:
    leaf = residual.double().requires_grad_()
    weight = p.weight.double().requires_grad_()
    bias = p.bias.double().requires_grad_()
    normed = torch.nn.functional.layer_norm(leaf, leaf.shape[-1:], weight, bias, EPS)
    loss = 0 * leaf.sum() + 0 * normed.sum()
    if grads[0] is not None:
        loss = loss + (grads[0].double() * leaf).sum()
    if grads[1] is not None:
        loss = loss + (grads[1].double() * normed).sum()
    grad_leaf, grad_weight, grad_bias = torch.autograd.grad(loss, (leaf, weight, bias))
    if p.x.shape[1] == 1 and grads[0] is None:
        assert actual.x.abs().max() == 0  # one feature is normalised to zero whatever it is
    else:
        assert_close("grad_x", actual.x, grad_leaf, p.x.dtype, scale=3)
        assert_close("grad_y", actual.y, p.gamma.double() * grad_leaf, p.y.dtype, scale=3)
    if actual.parameters is not None:
        expected = torch.stack(((grad_leaf * p.y.double()).sum(0), grad_weight, grad_bias))
        for i, name in enumerate(("grad_gamma", "grad_weight", "grad_bias")):
            if expected[i].abs().max() < 1e-9:
                assert actual.parameters[i].abs().max() < 1e-4
            else:
                assert_close(name, actual.parameters[i], expected[i], F32, scale=10)


@pytest.mark.parametrize("dtypes", COMBINATIONS, ids=combination_ids)
@pytest.mark.parametrize("features", [1, 7, 8, 255, 257, 384, 1024])
def test_backward_of_every_combination(emulated: EmulatedDevice, dtypes, features: int) -> None:
    problem = make_problem(7, features, dtypes)
    residual, *grads = prepare_backward(problem)
    with emulated.session("random", features):
        actual = run_backward(emulated, problem, residual, tuple(grads), row_blocks=3)
        assert emulated.launches() == 2
    check_backward(problem, residual, tuple(grads), actual)


@pytest.mark.parametrize("features", [1023, 4095, 4096, 4104])
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, BF16, F32)], ids=["fp32", "bf16"])
def test_backward_of_wide_rows(emulated: EmulatedDevice, dtypes, features: int) -> None:
    problem = make_problem(3, features, dtypes)
    residual, *grads = prepare_backward(problem)
    with emulated.session("reverse"):
        actual = run_backward(emulated, problem, residual, tuple(grads), row_blocks=2)
    check_backward(problem, residual, tuple(grads), actual)


@pytest.mark.parametrize("missing", ["grad_residual", "grad_normed"])
@pytest.mark.parametrize("features", [64, 4104])
def test_backward_without_one_gradient(emulated: EmulatedDevice, missing: str, features: int) -> None:
    problem = make_problem(5, features, (F32, BF16, F32))
    residual, grad_residual, grad_normed = prepare_backward(problem)
    grads = (None, grad_normed) if missing == "grad_residual" else (grad_residual, None)
    with emulated.session("random", 2):
        actual = run_backward(emulated, problem, residual, grads, row_blocks=2)
    check_backward(problem, residual, grads, actual)


def test_backward_without_parameter_gradients(emulated: EmulatedDevice) -> None:
    problem = make_problem(5, 40, (BF16, BF16, BF16))
    residual, *grads = prepare_backward(problem)
    with emulated.session():
        actual = run_backward(emulated, problem, residual, tuple(grads), row_blocks=2, parameters=False)
        assert emulated.launches() == 1
    check_backward(problem, residual, tuple(grads), actual)


@pytest.mark.parametrize("place", [with_row_gap(16), with_row_gap(3)], ids=["aligned-gap", "odd-gap"])
def test_backward_of_strided_y(emulated: EmulatedDevice, place) -> None:
    problem = make_problem(5, 128, (BF16, BF16, BF16))
    problem.y = place(problem.y)
    residual, *grads = prepare_backward(problem)
    with emulated.session("reverse"):
        actual = run_backward(emulated, problem, residual, tuple(grads), row_blocks=4)
    check_backward(problem, residual, tuple(grads), actual)


@pytest.mark.parametrize("rows_and_blocks", [(1, 1), (9, 9), (33, 5), (40, 33)])
def test_backward_sums_are_the_same_in_every_order(emulated: EmulatedDevice, rows_and_blocks: tuple[int, int]) -> None:
    rows, row_blocks = rows_and_blocks
    problem = make_problem(rows, 72, (F32, F32, F32))
    residual, *grads = prepare_backward(problem)
    results = []
    for order in ("forward", "reverse", "random"):
        with emulated.session(order, 5):
            results.append(run_backward(emulated, problem, residual, tuple(grads), row_blocks=row_blocks))
        check_backward(problem, residual, tuple(grads), results[-1])
    for other in results[1:]:
        assert torch.equal(other.x, results[0].x)
        assert torch.equal(other.parameters, results[0].parameters)


def test_backward_of_no_rows_gives_zero_parameter_gradients(emulated: EmulatedDevice) -> None:
    problem = make_problem(0, 64, (BF16, BF16, BF16))
    residual, *grads = prepare_backward(problem)
    with emulated.session():
        actual = run_backward(emulated, problem, residual, tuple(grads), row_blocks=1)
    assert actual.parameters is not None
    assert actual.parameters.abs().max() == 0
    with emulated.session():
        run_backward(emulated, problem, residual, tuple(grads), row_blocks=1, parameters=False)
        assert emulated.launches() == 0


def test_row_blocks_are_within_the_bounds_of_the_params(emulated: EmulatedDevice) -> None:
    with emulated.session(multiprocessors=132):
        for rows in (0, 1, 7, 8, 1000, 10**6):
            for features in (1, 1024, 8192):
                blocks = emulated.library.emulated_residual_scale_norm_row_blocks(ctypes.c_longlong(rows), features)
                assert 1 <= blocks <= max(rows, 1)
