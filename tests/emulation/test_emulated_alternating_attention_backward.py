"""alternating_attention's CUDA backward, run by the emulator, against autograd of the reference in float64."""

from __future__ import annotations

import ctypes
import importlib
import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from emulated_device import EmulatedDevice, EmulationError, far_apart, guarded, guarded_copy
from torch import Tensor

from vggt_mv_ext import reference

operator = importlib.import_module("vggt_mv_ext.ops.alternating_attention")  # the function of that name hides it

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPE_NUMBERS = {F32: 0, F16: 1, BF16: 2}
NAMES = {F32: "fp32", F16: "fp16", BF16: "bf16"}
AXES = ("frame", "view", "time", "global")
# Relative Frobenius error against float64. Three roundings to the dtype count, each of at most u = 2^-11 (fp16) or
# 2^-8 (bf16), u / sqrt(3) in the mean square: of p or ds before the second product, of `out` inside delta, and of the
# result. Together they stay under u where delta is no bigger than dp, and under 2 u where it cancels: 2 u it is.
TOLERANCE = {F16: 2 * 2**-11, BF16: 2 * 2**-8}
# Rows and columns of the tiles: see alternating_attention_backward_tiles.cuh.
ROWS = {32: 128, 64: 128, 96: 64, 128: 64}
COLUMNS = {32: 64, 64: 64, 96: 32, 128: 32}


@dataclass
class Problem:
    """One input of the backward; tensors are laid out as the test wants them."""

    qkv: Tensor  # [B, T, N, P, 3, h, D]
    grad_out: Tensor  # [B, T, N, P, h, D]
    axis: str
    key_bias: Tensor | None  # [B, T, N, P]
    row_gate: Tensor | None  # [B, T, N, P], perhaps expanded
    scale: float


@dataclass
class Gradients:
    qkv: Tensor
    key_bias: Tensor | None
    row_gate: Tensor | None


def make_problem(
    dtype: torch.dtype = F16,
    width: int = 32,
    *,
    grid: tuple[int, int, int, int] = (1, 1, 1, 17),
    heads: int = 1,
    axis: str = "frame",
    bias: str = "gated",
    seed: int = 0,
) -> Problem:
    """`bias`: none, plain, gated (a gate `[P]`, the same in every frame) or full (a gate of each token)."""
    generator = torch.Generator().manual_seed(1000 * width + sum(grid) + seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    key_bias = None if bias == "none" else guarded_copy(normal(*grid))
    row_gate = None
    if bias == "gated":
        row_gate = guarded_copy(normal(grid[3])).expand(grid)
    elif bias == "full":
        row_gate = guarded_copy(normal(*grid))
    return Problem(
        guarded_copy(normal(*grid, 3, heads, width).to(dtype)),
        guarded_copy(normal(*grid, heads, width).to(dtype)),
        axis,
        key_bias,
        row_gate,
        1.3 * width**-0.5,
    )


def sequence_order(axis: str) -> tuple[list[int], int]:
    """Dimensions of the grid, those that number the sequences first, and how many these are."""
    outer = list(reference.SEQUENCE_DIMS[axis])
    return outer + [d for d in range(4) if d not in outer], len(outer)


def to_sequences(x: Tensor, axis: str) -> Tensor:
    """`[B, T, N, P, ...]` as `[sequences, length, ...]`."""
    order, outer = sequence_order(axis)
    ordered = x.permute(*order, *range(4, x.dim()))
    return ordered.flatten(outer, 3).flatten(0, outer - 1)


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """What the forward pass leaves: out `[B, T, N, P, h, D]` in qkv's dtype and lse `[sequences, h, length]`."""
    q, k, _ = (to_sequences(x, p.axis) for x in p.qkv.double().unbind(4))
    logits = p.scale * torch.einsum("sihd,sjhd->shij", q, k)
    if p.key_bias is not None:
        gate = torch.ones_like(p.key_bias) if p.row_gate is None else p.row_gate
        bias = to_sequences(p.key_bias, p.axis).double()[:, None, None, :]
        logits = logits + to_sequences(gate, p.axis).double()[:, None, :, None] * bias
    heads = p.qkv.shape[5:]
    out = reference.alternating_attention(
        p.qkv.double(), p.axis, key_bias=wide(p.key_bias), row_gate=wide(p.row_gate), scale=p.scale
    )
    return guarded_copy(out.unflatten(-1, heads).to(p.qkv.dtype)), guarded_copy(logits.logsumexp(-1).float())


def wide(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def expected_gradients(p: Problem) -> Gradients:
    """By autograd; the gate's gradient is of every token's own gate."""
    leaves = [p.qkv, p.key_bias, p.row_gate]
    doubles = [None if leaf is None else leaf.double().clone().requires_grad_() for leaf in leaves]
    if p.key_bias is not None and p.row_gate is None:
        doubles[2] = torch.ones_like(p.key_bias, dtype=torch.float64).requires_grad_()
    out = reference.alternating_attention(
        doubles[0],
        p.axis,
        key_bias=doubles[1],
        row_gate=doubles[2],
        scale=p.scale,  # type: ignore[arg-type]
    )
    present = [leaf for leaf in doubles if leaf is not None]
    found = iter(torch.autograd.grad((out * p.grad_out.double().flatten(-2)).sum(), present))
    return Gradients(*(None if leaf is None else next(found) for leaf in doubles))  # type: ignore[arg-type]


def longs(values: tuple[int, ...]) -> ctypes.Array[ctypes.c_longlong]:
    return (ctypes.c_longlong * len(values))(*values)


def run(
    device: EmulatedDevice,
    p: Problem,
    *,
    saved: tuple[Tensor, Tensor] | None = None,
    grad_qkv: Tensor | None = None,
    want_bias: bool | None = None,
) -> Gradients:
    """Inside a session; a refusal becomes an assertion with the number of the error.

    `want_bias`: whether to ask for the gradients of the bias; by default where there is one.
    """
    out, lse = forward(p) if saved is None else saved
    grid, heads = tuple(p.qkv.shape[:4]), p.qkv.shape[5]
    if grad_qkv is None:
        grad_qkv = guarded(tuple(p.qkv.shape), p.qkv.dtype)
    if want_bias is None:
        want_bias = p.key_bias is not None
    grad_key_bias, grad_row_gate = (guarded((heads, *grid), F32) if want_bias else None for _ in range(2))

    def address(tensor: Tensor | None, name: str, role: str = "input") -> ctypes.c_void_p:
        return ctypes.c_void_p(None if tensor is None else device.buffer(tensor, name, role))

    status = device.library.emulated_alternating_attention_backward(
        address(p.grad_out, "grad_out"),
        address(p.qkv, "qkv"),
        address(out, "out"),
        address(lse, "lse"),
        address(p.key_bias, "key_bias"),
        address(p.row_gate, "row_gate"),
        address(guarded(tuple(lse.shape), F32), "delta", "output"),
        address(grad_qkv, "grad_qkv", "output"),
        address(grad_key_bias, "grad_key_bias", "output"),
        address(grad_row_gate, "grad_row_gate", "output"),
        (ctypes.c_int * 4)(*grid),
        longs(p.qkv.stride()[:6]),
        longs(grad_qkv.stride()[:6]),
        longs(p.row_gate.stride() if p.row_gate is not None else (0, 0, 0, 0)),
        AXES.index(p.axis),
        heads,
        p.qkv.shape[6],
        ctypes.c_float(p.scale),
        DTYPE_NUMBERS[p.qkv.dtype],
    )
    assert status == 0 or device.reports(), f"cudaError_t {status}"
    return Gradients(grad_qkv, grad_key_bias, grad_row_gate)


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float, floor: float = 0.0) -> None:
    """Relative Frobenius error, `floor` added to the norm; NaN and infinity never pass; names the worst element."""
    assert actual.isfinite().all(), f"{name}: {int((~actual.isfinite()).sum())} of {actual.numel()} are not finite"
    difference = (actual.double() - expected).abs()
    error = float(difference.norm() / (expected.norm() + floor))
    where = [int(i) for i in torch.unravel_index(difference.argmax(), difference.shape)]
    assert error <= tolerance, f"{name}: relative error {error:.3g} > {tolerance:.3g}; worst at {where}"


def check(p: Problem, actual: Gradients, expected: Gradients | None = None) -> None:
    expected = expected_gradients(p) if expected is None else expected
    tolerance = TOLERANCE[p.qkv.dtype]
    # With one key, p is 1 and ds is rounding alone: the error is then measured by what cancels, |grad_out| |v|.
    alone = p.grad_out.double().norm() * p.qkv[..., 2, :, :].double().norm() * p.scale
    floor = float(alone) if to_sequences(p.qkv, p.axis).shape[1] == 1 else 0.0
    for part, name in enumerate(("grad_q", "grad_k", "grad_v")):
        part_floor = 0.0 if name == "grad_v" else floor
        assert_close(name, actual.qkv[..., part, :, :], expected.qkv[..., part, :, :], tolerance, part_floor)
    for name, own, reference_gradient in (
        ("grad_key_bias", actual.key_bias, expected.key_bias),
        ("grad_row_gate", actual.row_gate, expected.row_gate),
    ):
        if own is not None:
            assert reference_gradient is not None
            assert_close(name, own.sum(0), reference_gradient, tolerance, floor)


def lengths(width: int) -> list[int]:
    """Around a fragment, a tile of columns and a tile of rows, and over all of them."""
    around = [16, COLUMNS[width], ROWS[width]]
    return [1, *(n + d for n in around for d in (-1, 0, 1)), ROWS[width] + COLUMNS[width] + 9]


@pytest.mark.parametrize(("width", "length"), [(width, n) for width in (32, 64, 96, 128) for n in lengths(width)])
def test_every_length(emulated: EmulatedDevice, width: int, length: int) -> None:
    problem = make_problem(F16 if length % 2 else BF16, width, grid=(1, 1, 1, length), seed=length)
    with emulated.session("random", length):
        gradients = run(emulated, problem)
        assert emulated.launches() == 3
    check(problem, gradients)


@pytest.mark.parametrize("bias", ["none", "plain", "gated", "full"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=NAMES.get)
@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_every_width_dtype_and_bias(emulated: EmulatedDevice, width: int, dtype: torch.dtype, bias: str) -> None:
    problem = make_problem(dtype, width, grid=(1, 1, 2, 37), heads=2, bias=bias, axis="view")
    with emulated.session("reverse"):
        gradients = run(emulated, problem)
    check(problem, gradients)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("bias", ["none", "gated", "full"])
def test_every_axis(emulated: EmulatedDevice, axis: str, bias: str) -> None:
    problem = make_problem(BF16, 32, grid=(2, 2, 3, 19), heads=2, axis=axis, bias=bias)
    with emulated.session("random", 3):
        gradients = run(emulated, problem)
    check(problem, gradients)


def strided(x: Tensor, layout: str) -> Tensor:
    """Uninitialised (NaN) memory of x's shape in another layout."""
    if layout == "gap":
        room = guarded((*x.shape[:4], x.shape[4] * x.shape[5] * x.shape[6] + 16), x.dtype)
        return room[..., 16:].unflatten(-1, x.shape[4:])
    if layout == "time-last":
        return guarded(tuple(x.permute(0, 2, 3, 1, 4, 5, 6).shape), x.dtype).permute(0, 3, 1, 2, 4, 5, 6)
    return guarded(tuple(x.transpose(4, 5).shape), x.dtype).transpose(4, 5)  # heads before parts


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("layout", ["gap", "time-last", "heads-first"])
def test_strided_qkv_and_gradient(emulated: EmulatedDevice, axis: str, layout: str) -> None:
    problem = make_problem(F16, 32, grid=(2, 3, 2, 11), heads=2, axis=axis)
    expected = expected_gradients(problem)
    qkv = strided(problem.qkv, layout).copy_(problem.qkv)
    problem.qkv = qkv
    grad_qkv = strided(problem.qkv, "gap" if layout != "gap" else "heads-first")
    assert not qkv.is_contiguous()
    assert not grad_qkv.is_contiguous()
    with emulated.session("random", 11):
        gradients = run(emulated, problem, grad_qkv=grad_qkv)
    check(problem, gradients, expected)
    if layout != "gap":  # the gaps of the gradient are still what they were
        storage = torch.as_strided(grad_qkv, (16,), (1,), grad_qkv.storage_offset() - 16)
        assert storage.isnan().all()


@pytest.mark.parametrize("axis", ["frame", "view"])
def test_offsets_beyond_31_bits(emulated: EmulatedDevice, axis: str) -> None:
    problem = make_problem(F16, 32, grid=(1, 1, 2, 10), heads=2, axis=axis)
    problem.qkv = far_apart(problem.qkv, 2)
    with emulated.session():
        gradients = run(emulated, problem)
    check(problem, gradients)


@pytest.mark.parametrize("width", [64, 128])
def test_real_token_counts_shortened(emulated: EmulatedDevice, width: int) -> None:
    """Time attention of three frames of 5 special tokens and 6 x 9 patches, three heads."""
    problem = make_problem(BF16, width, grid=(1, 3, 2, 59), heads=3, axis="time")
    with emulated.session():
        gradients = run(emulated, problem)
    check(problem, gradients)


@pytest.mark.parametrize("width", [64, 96])
def test_the_same_bits_in_every_order(emulated: EmulatedDevice, width: int) -> None:
    problem = make_problem(F16, width, grid=(1, 2, 1, 75), heads=2, axis="time")
    saved = forward(problem)
    results = []
    for order, seed in (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        with emulated.session(order, seed):
            results.append(run(emulated, problem, saved=saved))
    for other in results[1:]:
        for name in ("qkv", "key_bias", "row_gate"):
            assert torch.equal(getattr(other, name), getattr(results[0], name))


def test_gradients_of_the_bias_may_be_unwanted(emulated: EmulatedDevice) -> None:
    problem = make_problem(F16, 64, grid=(1, 1, 2, 20))
    with emulated.session():
        gradients = run(emulated, problem, want_bias=False)
    check(problem, gradients)


@pytest.mark.parametrize("axis", ["frame", "time"])
def test_keys_that_are_shut_out(emulated: EmulatedDevice, axis: str) -> None:
    """A bias of -inf: as without those keys, whose gradients are zero."""
    problem = make_problem(F16, 32, grid=(1, 2, 1, 21), axis=axis, bias="plain")
    assert problem.key_bias is not None
    shut = torch.arange(21) % 3 == 1
    problem.key_bias[..., shut] = -math.inf
    with emulated.session("random"):
        gradients = run(emulated, problem)
    finite = Problem(**{**vars(problem), "key_bias": problem.key_bias.clamp_min(-1e4)})
    expected = expected_gradients(finite)
    check(problem, gradients, expected)
    assert gradients.key_bias is not None
    assert gradients.key_bias[..., shut].abs().max() == 0
    assert gradients.qkv[..., shut, 1:, :, :].abs().max() == 0


@pytest.mark.parametrize("width", [32, 96])
def test_absent_columns_count_for_nothing_where_exp_would_overflow(emulated: EmulatedDevice, width: int) -> None:
    """Logits about -200: the zeros that stand for tokens past the end would have weights of exp(200)."""
    problem = make_problem(BF16, width, grid=(1, 1, 1, COLUMNS[width] + 3), bias="none")
    with torch.no_grad():
        problem.qkv[..., 0, :, 0] = 50.0
        problem.qkv[..., 1, :, 0] = -4.0 / problem.scale
    with emulated.session():
        saved = forward(problem)
        assert saved[1].max() < -150
        gradients = run(emulated, problem, saved=saved)
    assert gradients.qkv.isfinite().all()
    expected = expected_gradients(problem)
    for qkv in (gradients.qkv, expected.qkv):  # all keys have the same feature 0: its sum of ds cancels to nothing
        qkv[..., 0, :, 0] = 0
    check(problem, gradients, expected)


def test_a_sequence_without_any_key_is_nan_and_only_that(emulated: EmulatedDevice) -> None:
    """All biases of the first sequence are -inf: not a number, as the forward pass has it; the second is untouched."""
    problem = make_problem(F16, 32, grid=(2, 1, 1, 5), bias="plain")
    assert problem.key_bias is not None
    problem.key_bias[0] = -math.inf
    out, lse = forward(Problem(**{**vars(problem), "key_bias": problem.key_bias.clamp_min(-10)}))
    lse[0] = -math.inf
    out[0] = math.nan
    with emulated.session():
        gradients = run(emulated, problem, saved=(out, lse))
    assert gradients.qkv[0].isnan().all()
    assert gradients.qkv[1].isfinite().all()


def test_shared_memory_is_read_without_bank_conflicts(emulated: EmulatedDevice) -> None:
    for width in (32, 64, 96, 128):
        problem = make_problem(F16, width, grid=(1, 1, 1, COLUMNS[width]))
        with emulated.session(count_accesses=True):
            run(emulated, problem)
            sites = emulated.access_sites()
        shared = [site for site in sites if site.space.startswith("shared")]
        assert {site.space for site in shared} >= {"shared matrix load", "shared load", "shared store"}
        for site in shared:
            assert site.units == site.ideal_units, f"{width}: {site}"


def test_rows_are_moved_in_16_bytes(emulated: EmulatedDevice) -> None:
    """Everything of the dtype of qkv; single floats are statistics and biases."""
    problem = make_problem(BF16, 64, grid=(1, 1, 1, 128), heads=2)
    with emulated.session(count_accesses=True):
        run(emulated, problem)
        sites = emulated.access_sites()
    stores = [site for site in sites if site.space == "global store"]
    assert {site.bytes for site in stores} == {4, 16}
    assert sum(site.units for site in stores if site.bytes == 16) == problem.qkv.numel() * 2 // 32


@pytest.mark.parametrize(
    ("change", "error"), [("fp32", 1), ("width", 1), ("bias gradient", 1), ("misaligned", 716), ("misaligned out", 716)]
)
def test_what_the_kernels_cannot_do_is_refused(emulated: EmulatedDevice, change: str, error: int) -> None:
    width = 48 if change == "width" else 32
    problem = make_problem(F32 if change == "fp32" else F16, width)
    saved = forward(problem)

    def shifted(x: Tensor) -> Tensor:
        flat = guarded((x.numel() + 1,), x.dtype)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)

    if change == "misaligned":
        problem.qkv = shifted(problem.qkv)
    elif change == "misaligned out":
        saved = (shifted(saved[0]), saved[1])
    elif change == "bias gradient":  # of a bias that is not there
        problem.key_bias = problem.row_gate = None
    with pytest.raises(AssertionError, match=rf"cudaError_t {error}\b"), emulated.session():
        run(emulated, problem, saved=saved, want_bias=change == "bias gradient" or None)


def test_nothing_to_do_launches_nothing(emulated: EmulatedDevice) -> None:
    for grid, heads in (((0, 1, 1, 3), 2), ((1, 1, 1, 3), 0)):
        problem = make_problem(F16, 32, grid=grid, heads=heads)
        shape = problem.qkv.shape
        saved = (torch.zeros(*grid, *shape[5:], dtype=F16), torch.zeros(0, heads, 3))
        with emulated.session():
            run(emulated, problem, saved=saved)
            assert emulated.launches() == 0


def test_statistics_that_are_too_short_are_seen(emulated: EmulatedDevice) -> None:
    """The bounds check covers them: lse and delta of one head where two are meant."""
    problem = make_problem(F16, 32, heads=2, bias="none")
    out, lse = forward(problem)
    with pytest.raises(EmulationError, match="past the end of 'delta'"), emulated.session():
        run(emulated, problem, saved=(out, guarded_copy(lse[:, :1])))


class EmulatedExtension:
    """The compiled module's function by the emulator's: registers what the operator allocates and passes it on."""

    def __init__(self, device: EmulatedDevice) -> None:
        self.device = device

    def alternating_attention_backward_cuda(self, *arguments: Any) -> None:
        addresses, (grid, qkv_steps, grad_qkv_steps, gate_steps, *numbers, _stream) = arguments[:10], arguments[10:]
        axis, heads, width, scale, dtype = numbers
        tokens = math.prod(grid)
        rows, floats, gates = 2 * tokens * heads * width, 4 * tokens * heads, 4 * (1 + sum_of_ends(grid, gate_steps))
        qkv_bytes = 2 * (sum_of_ends((*grid, 3, heads), qkv_steps) + width)
        sizes = (rows, qkv_bytes, rows, floats, 4 * tokens, gates, floats, 3 * rows, floats, floats)
        for i, (address, size) in enumerate(zip(addresses, sizes, strict=True)):
            if address:
                self.device.library.emulator_register(address, size, f"argument {i}".encode(), int(i >= 6))
        status = self.device.library.emulated_alternating_attention_backward(
            *(ctypes.c_void_p(address or None) for address in addresses),
            (ctypes.c_int * 4)(*grid),
            *(longs(steps) for steps in (qkv_steps, grad_qkv_steps, gate_steps)),
            axis,
            heads,
            width,
            ctypes.c_float(scale),
            dtype,
        )
        assert status == 0 or self.device.reports(), f"cudaError_t {status}"


def sum_of_ends(shape: tuple[int, ...], steps: tuple[int, ...]) -> int:
    """Offset of the last element."""
    return sum((size - 1) * step for size, step in zip(shape, steps, strict=True))


@pytest.mark.parametrize("gate", ["none", "tokens", "full"])
@pytest.mark.parametrize("layout", ["contiguous", "heads-first", "misaligned"])
def test_the_operator_hands_over_what_the_launcher_expects(
    emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch, layout: str, gate: str
) -> None:
    """The operator's own code for CUDA, on the CPU: copies, arguments in their order, sums over heads and frames."""
    problem = make_problem(F16, 32, grid=(1, 2, 2, 9), heads=2, axis="time", bias="gated" if gate != "none" else gate)
    row_gate = problem.row_gate
    if row_gate is not None:
        row_gate = row_gate[0, 0, 0] if gate == "tokens" else row_gate.contiguous()
        problem.row_gate = row_gate.expand(problem.qkv.shape[:4])
    qkv = problem.qkv
    if layout == "heads-first":
        qkv = strided(qkv, layout).copy_(qkv)
    elif layout == "misaligned":
        qkv = guarded((qkv.numel() + 1,), F16)[1:].view(qkv.shape).copy_(qkv)
    monkeypatch.setattr(operator, "extension", EmulatedExtension(emulated))
    monkeypatch.setattr(operator._kernels, "stream_address", lambda tensor: 0)
    monkeypatch.setattr(operator._kernels, "device_guard", lambda tensor: nullcontext())
    out, lse = forward(problem)
    wanted = [True, gate != "none", gate != "none"]
    with emulated.session():
        grad_qkv, grad_key_bias, grad_row_gate = operator.kernel_gradients(
            "cuda",
            problem.grad_out.flatten(-2),
            qkv,
            "time",
            problem.key_bias,
            row_gate,
            problem.scale,
            out.flatten(-2),
            lse,
            wanted,
        )
    expected = expected_gradients(problem)
    assert grad_qkv is not None
    check(problem, Gradients(grad_qkv, None, None), expected)
    if gate == "none":
        assert grad_key_bias is grad_row_gate is None
        return
    assert row_gate is not None
    assert expected.row_gate is not None
    assert grad_key_bias is not None
    assert grad_row_gate is not None
    assert_close("grad_key_bias", grad_key_bias, expected.key_bias, TOLERANCE[F16])  # type: ignore[arg-type]
    assert grad_row_gate.shape == row_gate.shape
    expected_gate = expected.row_gate.sum_to_size(row_gate.shape)
    assert_close("grad_row_gate", grad_row_gate, expected_gate, TOLERANCE[F16])
