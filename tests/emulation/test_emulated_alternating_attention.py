"""alternating_attention's CUDA forward kernel and launcher, run by the emulator, against the formula in float64."""

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
AXES = ("frame", "view", "time", "global")
TOLERANCE = {F16: 2e-3, BF16: 1e-2}  # relative Frobenius error against float64
both_dtypes = pytest.mark.parametrize("dtype", [F16, BF16], ids=["fp16", "bf16"])
# A grid with fewer blocks than multiprocessors takes tiles of 64 rows, any other tiles of 128.
LARGE, SMALL = 1, 10_000
both_tilings = pytest.mark.parametrize("multiprocessors", [LARGE, SMALL], ids=["128-rows", "64-rows"])


@dataclass
class Problem:
    """One input; `qkv` and `row_gate` are laid out as the test wants them."""

    qkv: Tensor  # [B, T, N, P, 3, h, D]
    axis: str
    key_bias: Tensor | None = None  # [B, T, N, P]
    row_gate: Tensor | None = None  # [P] or [B, T, N, P]
    scale: float = 0.0

    def __post_init__(self) -> None:
        self.scale = self.scale or self.qkv.shape[-1] ** -0.5

    @property
    def expanded_gate(self) -> Tensor | None:
        return None if self.row_gate is None else self.row_gate.expand(self.qkv.shape[:4])


def make_problem(
    dtype: torch.dtype,
    width: int,
    grid: tuple[int, int, int, int],
    axis: str = "frame",
    *,
    heads: int = 1,
    bias: bool = False,
    gate: str = "none",
    spread: float = 1.5,
) -> Problem:
    """Numbers for `grid` = B, T, N, P; `gate`: none, token ([P]) or full ([B, T, N, P])."""
    generator = torch.Generator().manual_seed(width + 7 * math.prod(grid) + heads)
    qkv = guarded_copy((torch.randn((*grid, 3, heads, width), generator=generator) * spread).to(dtype))
    key_bias = guarded_copy(2 * torch.randn(grid, generator=generator)) if bias else None
    row_gate = None
    if gate != "none":
        row_gate = guarded_copy(torch.rand(grid if gate == "full" else grid[3:], generator=generator) * 2)
    return Problem(qkv, axis, key_bias, row_gate)


def to_sequences(x: Tensor, axis: str) -> Tensor:
    """[B, T, N, P, ...] -> [sequences, length, ...]."""
    if axis == "time":
        x = x.transpose(1, 2)
    outer = {"frame": 3, "view": 2, "time": 2, "global": 1}[axis]
    return x.flatten(outer, 3).flatten(0, outer - 1)


def formula_lse(p: Problem) -> Tensor:
    """[sequences, h, length] in float64, written out."""
    q, k, _ = (to_sequences(part, p.axis) for part in p.qkv.double().unbind(4))
    logits = p.scale * torch.einsum("sihd,sjhd->shij", q, k)
    if p.key_bias is not None:
        gate = torch.ones_like(p.key_bias) if p.expanded_gate is None else p.expanded_gate
        gate, bias = (to_sequences(x.double(), p.axis) for x in (gate, p.key_bias))
        logits = logits + gate[:, None, :, None] * bias[:, None, None, :]
    return logits.logsumexp(-1)


def formula(p: Problem, dtype: torch.dtype = torch.float64) -> Tensor:
    wide = reference.accumulation_dtype(dtype)
    bias, gate = (None if x is None else x.to(wide) for x in (p.key_bias, p.row_gate))
    return reference.alternating_attention(p.qkv.to(dtype), p.axis, key_bias=bias, row_gate=gate, scale=p.scale)


def longs(values: tuple[int, ...]) -> ctypes.Array[ctypes.c_longlong]:
    return (ctypes.c_longlong * len(values))(*values)


def register(device: EmulatedDevice, name: str, tensor: Tensor | None, role: str = "input") -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else device.buffer(tensor, name, role))


def run(device: EmulatedDevice, p: Problem, *, want_lse: bool = True) -> tuple[Tensor, Tensor]:
    """Inside a session: (out, lse), both full of NaN beforehand."""
    *grid, _, heads, width = p.qkv.shape
    out = guarded((*grid, heads * width), p.qkv.dtype)
    length = {"frame": grid[3], "view": math.prod(grid[2:]), "time": grid[1] * grid[3], "global": math.prod(grid[1:])}
    lse = guarded((math.prod(grid) // max(length[p.axis], 1), heads, length[p.axis]), F32)
    gate_strides = (0, 0, 0, 0) if p.expanded_gate is None else p.expanded_gate.stride()
    status = device.library.emulated_alternating_attention(
        register(device, "qkv", p.qkv),
        register(device, "key_bias", p.key_bias),
        register(device, "row_gate", p.row_gate),
        register(device, "out", out, "output"),
        register(device, "lse", lse if want_lse else None, "output"),
        (ctypes.c_int * 4)(*grid),
        longs(p.qkv.stride()[:6]),
        longs(gate_strides),
        AXES.index(p.axis),
        heads,
        width,
        ctypes.c_float(p.scale),
        DTYPE_NUMBERS[p.qkv.dtype],
    )
    assert status == 0 or device.reports(), f"cudaError_t {status}"
    return out, lse


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def check(p: Problem, out: Tensor, lse: Tensor) -> None:
    """Error against float64: within the tolerance, and not worse than eager's; NaN and infinity never pass."""
    expected = formula(p)
    assert out.isfinite().all(), f"{int((~out.isfinite()).sum())} of {out.numel()} results are not finite"
    difference = (out.double() - expected).abs()
    where = [int(i) for i in torch.unravel_index(difference.argmax(), difference.shape)]
    error, eager = relative_error(out, expected), relative_error(formula(p, out.dtype), expected)
    limit = min(TOLERANCE[out.dtype], 1.5 * eager + torch.finfo(out.dtype).eps)
    assert error <= limit, f"relative error {error:.3g} > {limit:.3g} (eager {eager:.3g}); worst at {where}"
    torch.testing.assert_close(lse.double(), formula_lse(p), rtol=1e-5, atol=1e-5)


@both_tilings
@both_dtypes
@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_every_width_dtype_and_tiling(emulated: EmulatedDevice, width: int, dtype, multiprocessors: int) -> None:
    """70 tokens are one or two tiles of rows and two or three tiles of keys."""
    problem = make_problem(dtype, width, (1, 1, 1, 70), heads=2, bias=multiprocessors == LARGE, gate="none")
    with emulated.session("random", width, multiprocessors=multiprocessors):
        out, lse = run(emulated, problem)
        assert emulated.launches() == 1
    check(problem, out, lse)


@pytest.mark.parametrize("length", [1, 7, 31, 32, 33, 63, 64, 65, 127, 128, 129, 193])
def test_every_length(emulated: EmulatedDevice, length: int) -> None:
    """Tiles have 64 or 128 rows and 32 or 64 keys; what lies past the end of a sequence is NaN."""
    for width, multiprocessors in ((32, LARGE), (128, SMALL)) if length <= 129 else ((32, LARGE),):
        problem = make_problem(BF16, width, (1, 1, 1, length), bias=length % 2 == 1)
        with emulated.session("reverse", multiprocessors=multiprocessors):
            out, lse = run(emulated, problem)
        check(problem, out, lse)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("gate", ["none", "token", "full"])
def test_every_axis_and_bias(emulated: EmulatedDevice, axis: str, gate: str) -> None:
    """Neighbouring sequences must not reach each other, and biases must follow the axis."""
    problem = make_problem(F16, 32, (2, 2, 3, 11), axis, heads=2, bias=True, gate=gate)
    with emulated.session("random", 1):
        out, lse = run(emulated, problem)
    check(problem, out, lse)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_order_of_fibers_changes_nothing(emulated: EmulatedDevice, order: str) -> None:
    """A frame of 5 special tokens and 5 x 9 patches, over 3 times: tiles of keys run over the jumps between frames."""
    problem = make_problem(BF16, 64, (1, 3, 2, 50), "time", bias=True, gate="token")
    results = []
    for this_order in ("forward", order):
        with emulated.session(this_order, 5):
            results.append(run(emulated, problem))
    check(problem, *results[1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def strided(qkv: Tensor, layout: str) -> Tensor:
    """The same numbers elsewhere, NaN between them."""
    if layout == "gap":
        room = guarded((*qkv.shape[:4], qkv.shape[4] * qkv.shape[5] * qkv.shape[6] + 16), qkv.dtype)
        view = room[..., 16:].unflatten(-1, qkv.shape[4:])
    elif layout == "views-of-more":
        room = guarded((*qkv.shape[:2], qkv.shape[2] + 2, *qkv.shape[3:]), qkv.dtype)
        view = room[:, :, 1:-1]
    elif layout == "time-last":
        view = guarded_copy(qkv.permute(0, 2, 3, 1, 4, 5, 6)).permute(0, 3, 1, 2, 4, 5, 6)
    else:  # heads before parts
        view = guarded_copy(qkv.transpose(4, 5)).transpose(4, 5)
    view.copy_(qkv)
    return view


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("layout", ["gap", "views-of-more", "time-last", "heads-first"])
def test_strided_qkv(emulated: EmulatedDevice, layout: str, axis: str) -> None:
    problem = make_problem(F16, 32, (1, 2, 3, 12), axis, heads=2)
    problem.qkv = strided(problem.qkv, layout)
    assert not problem.qkv.is_contiguous()
    with emulated.session("reverse"):
        out, lse = run(emulated, problem)
    check(problem, out, lse)


@pytest.mark.parametrize("axis", ["frame", "view"])
def test_offsets_beyond_31_bits(emulated: EmulatedDevice, axis: str) -> None:
    """Two views 2^31 elements apart: two sequences, or one whose tile of keys runs over the jump."""
    problem = make_problem(F16, 32, (1, 1, 2, 10), axis, heads=2)
    problem.qkv = far_apart(problem.qkv, 2)
    with emulated.session():
        out, lse = run(emulated, problem)
    check(problem, out, lse)


def test_strided_row_gate(emulated: EmulatedDevice) -> None:
    problem = make_problem(F16, 32, (2, 2, 1, 9), "global", bias=True, gate="full")
    assert problem.row_gate is not None
    problem.row_gate = problem.row_gate[:1, :, :, :1].expand(2, 2, 1, 9)
    with emulated.session():
        out, lse = run(emulated, problem)
    check(problem, out, lse)


def test_shut_out_keys_weigh_nothing(emulated: EmulatedDevice) -> None:
    """A bias of -inf for the whole first tile of keys: nothing is known of the maximum until the second."""
    problem = make_problem(BF16, 32, (1, 1, 1, 100), bias=True)
    assert problem.key_bias is not None
    problem.key_bias[..., :70] = -math.inf
    with emulated.session("random", 3):
        out, lse = run(emulated, problem)
    kept = Problem(problem.qkv[:, :, :, 70:], "frame", problem.key_bias[..., 70:], scale=problem.scale)
    expected = formula(kept)
    assert relative_error(out[:, :, :, 70:], expected) < TOLERANCE[BF16]
    torch.testing.assert_close(lse.double(), formula_lse(problem), rtol=1e-5, atol=1e-5)
    assert out.isfinite().all()


def test_all_keys_shut_out_is_not_a_number(emulated: EmulatedDevice) -> None:
    """As PyTorch's softmax has it; the other sequence and gates of 0 on finite biases are not touched."""
    problem = make_problem(F16, 32, (1, 1, 2, 20), bias=True)
    assert problem.key_bias is not None
    problem.key_bias[:, :, 0] = -math.inf
    with emulated.session():
        out, lse = run(emulated, problem)
    assert out[:, :, 0].isnan().all()
    assert (lse[0] == -math.inf).all()
    assert relative_error(out[:, :, 1], formula(problem)[:, :, 1]) < TOLERANCE[F16]


@pytest.mark.parametrize("place", ["query", "value"])
def test_not_a_number_stays_where_it_belongs(emulated: EmulatedDevice, place: str) -> None:
    """In a query: its row; in a value: that column of its own sequence. Never elsewhere."""
    problem = make_problem(F16, 32, (1, 1, 2, 40))
    problem.qkv[0, 0, 1, 3, 0 if place == "query" else 2, 0, 5] = math.nan
    with emulated.session():
        out, _ = run(emulated, problem)
    expected = torch.zeros(out.shape, dtype=torch.bool)
    expected[(0, 0, 1, 3) if place == "query" else (0, 0, 1, slice(None), 5)] = True
    assert torch.equal(out.isnan(), expected)


def test_logits_beyond_the_range_of_fp16(emulated: EmulatedDevice) -> None:
    """q . k of 2^17 and more: logits are in float; the weights of a row are 0 and 1 then."""
    problem = make_problem(F16, 64, (1, 1, 1, 40), spread=90.0)
    q, k, _ = problem.qkv.double().unbind(4)
    assert torch.einsum("btnihd,btnjhd->ij", q, k).abs().max() > 65504
    with emulated.session():
        out, lse = run(emulated, problem)
    expected = formula(problem)
    assert out.isfinite().all()
    assert relative_error(out, expected) < TOLERANCE[F16]
    torch.testing.assert_close(lse.double(), formula_lse(problem), rtol=1e-5, atol=1e-3)


def test_lse_may_be_left_out(emulated: EmulatedDevice) -> None:
    problem = make_problem(F16, 32, (1, 1, 1, 20), heads=3)
    with emulated.session():
        out, lse = run(emulated, problem, want_lse=False)
    assert lse.isnan().all()
    assert relative_error(out, formula(problem)) < TOLERANCE[F16]


def test_other_scale(emulated: EmulatedDevice) -> None:
    problem = make_problem(BF16, 32, (1, 1, 1, 20), bias=True, gate="full")
    problem.scale = 0.5
    with emulated.session():
        out, lse = run(emulated, problem)
    check(problem, out, lse)


@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_shared_memory_has_no_bank_conflicts(emulated: EmulatedDevice, width: int) -> None:
    """Every matrix load, copy, store and load takes as few wavefronts as its bytes need."""
    problem = make_problem(F16, width, (1, 1, 1, 128), bias=True)
    with emulated.session(count_accesses=True):
        run(emulated, problem)
        sites = emulated.access_sites()
    assert {"shared matrix load", "shared copy", "shared store", "shared load"} <= {site.space for site in sites}
    for site in sites:
        if site.space.startswith("shared"):
            assert site.units == site.ideal_units, site
    wide = [site for site in sites if site.space.startswith("global") and site.bytes == 16]
    assert all(site.units == site.ideal_units for site in wide)
    assert sum(site.units * 32 for site in wide if site.space == "global store") == 128 * width * 2


@pytest.mark.parametrize(
    ("width", "multiprocessor_kib"),
    [(32, 100), (64, 100), (96, 164), (128, 164)],
    ids=["32-sm_86", "64-sm_86", "96-sm_80", "128-sm_80"],
)
def test_two_blocks_share_a_multiprocessor(emulated: EmulatedDevice, width: int, multiprocessor_kib: int) -> None:
    """Shared memory leaves room for two; the system takes 1 KiB of each."""
    problem = make_problem(F16, width, (1, 1, 1, 3), bias=True)
    with emulated.session(max_shared_bytes=multiprocessor_kib * 1024 // 2 - 1024):
        out, lse = run(emulated, problem)
    check(problem, out, lse)


@pytest.mark.parametrize(
    ("change", "error"), [("width", 1), ("dtype", 1), ("scale", 1), ("gate alone", 1), ("misaligned", 716)]
)
def test_what_the_kernel_cannot_do_is_refused(emulated: EmulatedDevice, change: str, error: int) -> None:
    problem = make_problem(
        F16, 48 if change == "width" else 32, (1, 1, 1, 4), bias=change == "gate alone", gate="token"
    )
    if change == "dtype":
        problem.qkv = guarded_copy(problem.qkv.float())
    elif change == "scale":
        problem.scale = -1.0
    elif change == "misaligned":
        flat = guarded((problem.qkv.numel() + 1,), F16)
        flat[1:] = problem.qkv.flatten()
        problem.qkv = flat[1:].view(problem.qkv.shape)
    problem.key_bias = None
    if change != "gate alone":
        problem.row_gate = None
    with pytest.raises(AssertionError, match=rf"cudaError_t {error}\b"), emulated.session():
        run(emulated, problem)


def test_nothing_to_do_launches_nothing(emulated: EmulatedDevice) -> None:
    for grid in ((0, 1, 1, 3), (1, 1, 1, 0), (1, 0, 2, 3)):
        problem = make_problem(F16, 32, grid, "time")
        with emulated.session():
            run(emulated, problem)
            assert emulated.launches() == 0


def test_a_bias_that_is_too_short_is_seen(emulated: EmulatedDevice) -> None:
    problem = make_problem(F16, 32, (1, 1, 1, 20), bias=True)
    assert problem.key_bias is not None
    problem.key_bias = guarded_copy(problem.key_bias[..., :19])
    with pytest.raises(EmulationError, match="past the end of 'key_bias'"), emulated.session():
        run(emulated, problem)


class EmulatedExtension:
    """The compiled module's function by the emulator's: registers what the operator allocates and passes it on."""

    def __init__(self, device: EmulatedDevice) -> None:
        self.device = device

    def alternating_attention_cuda(self, *arguments: Any) -> None:
        addresses, (grid, qkv_steps, gate_steps, axis, heads, width, scale, dtype, stream) = (
            arguments[:5],
            arguments[5:],
        )
        assert stream == 7
        tokens = math.prod(grid)
        ends = [
            sum((size - 1) * step for size, step in zip(shape, steps, strict=True))
            for shape, steps in (((*grid, 3, heads), qkv_steps), (grid, gate_steps))
        ]
        sizes = (2 * (ends[0] + width), 4 * tokens, 4 * (ends[1] + 1), 2 * tokens * heads * width, 4 * tokens * heads)
        for i, (address, size) in enumerate(zip(addresses, sizes, strict=True)):
            if address:
                self.device.library.emulator_register(address, size, f"argument {i}".encode(), int(i >= 3))
        status = self.device.library.emulated_alternating_attention(
            *(ctypes.c_void_p(address or None) for address in addresses),
            (ctypes.c_int * 4)(*grid),
            longs(qkv_steps),
            longs(gate_steps),
            axis,
            heads,
            width,
            ctypes.c_float(scale),
            dtype,
        )
        assert status == 0 or self.device.reports(), f"cudaError_t {status}"


@pytest.mark.parametrize("gate", ["no bias", "none", "token", "full"])
@pytest.mark.parametrize("layout", ["contiguous", "heads-first", "misaligned", "one head, odd stride"])
def test_the_operator_hands_over_what_the_launcher_expects(
    emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch, layout: str, gate: str
) -> None:
    """The operator's own code for CUDA, on the CPU."""
    one_head = layout == "one head, odd stride"
    problem = make_problem(
        F16,
        32,
        (1, 2, 2, 9),
        "time",
        heads=1 if one_head else 2,
        bias=gate != "no bias",
        gate="none" if gate == "no bias" else gate,
    )
    qkv = problem.qkv
    if layout == "heads-first":
        qkv = strided(qkv, layout)
    elif layout == "misaligned":
        qkv = guarded((qkv.numel() + 1,), F16)[1:].view(qkv.shape).copy_(qkv)
    elif one_head:
        qkv = qkv.as_strided(qkv.shape, (*qkv.stride()[:5], 33, 1))
    monkeypatch.setattr(operator, "choose", lambda *_: "cuda")
    monkeypatch.setattr(operator, "extension", EmulatedExtension(emulated))
    monkeypatch.setattr(operator._kernels, "stream_address", lambda tensor: 7)
    monkeypatch.setattr(operator._kernels, "device_guard", lambda tensor: nullcontext())
    with emulated.session("random", 1):
        out, lse = torch.ops.vggt_mv.alternating_attention(
            qkv, "time", problem.key_bias, problem.row_gate, problem.scale
        )
        assert emulated.launches() == 1
    check(problem, out, lse)
