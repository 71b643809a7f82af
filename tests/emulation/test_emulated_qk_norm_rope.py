"""qk_norm_rope's CUDA kernels and launchers, run by the emulator, against the formula in float64."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import pytest
import torch
from emulated_device import EmulatedDevice, EmulationError, far_apart, guarded, guarded_copy
from torch import Tensor

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPE_NUMBERS = {F32: 0, F16: 1, BF16: 2}
NAMES = {F32: "fp32", F16: "fp16", BF16: "bf16"}
COMBINATIONS = [(F32, F32), (F16, F16), (BF16, BF16), (F16, F32), (BF16, F32)]
combination_ids = [f"{NAMES[dtype]}-{NAMES[norm]}" for dtype, norm in COMBINATIONS]
# Relative Frobenius error against float64; mostly the rounding of the result (2^-11, 2^-8).
TOLERANCE = {F32: 1e-6, F16: 5e-4, BF16: 4e-3}
EPS = 1e-5
BASE = 100.0


@dataclass
class Problem:
    """One input with its norms; `qkv` is laid out as the test wants it."""

    qkv: Tensor  # [B, T, N, P, 3, h, D]
    norms: list[Tensor | None]  # q_weight, q_bias, k_weight, k_bias
    grid_hw: tuple[int, int]
    special: int
    special_position: int = 0
    cos_sin: Tensor = field(init=False)

    def __post_init__(self) -> None:
        pairs = self.qkv.shape[-1] // 4
        positions = torch.arange(max(*self.grid_hw, self.special_position) + 1, dtype=torch.float64)
        angle = positions[:, None] * BASE ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        self.cos_sin = guarded_copy(torch.stack((angle.cos(), angle.sin()), dim=-1).float())

    @property
    def norm_dtype(self) -> torch.dtype:
        return next((norm.dtype for norm in self.norms if norm is not None), self.qkv.dtype)


def make_problem(
    dtypes: tuple[torch.dtype, torch.dtype],
    width: int,
    *,
    frames: tuple[int, int, int] = (1, 1, 2),
    grid_hw: tuple[int, int] = (2, 3),
    special: int = 5,
    heads: int = 3,
    norms: tuple[bool, bool] = (True, True),
    special_position: int = 0,
) -> Problem:
    generator = torch.Generator().manual_seed(width + 7 * heads)
    shape = (*frames, special + grid_hw[0] * grid_hw[1], 3, heads, width)
    qkv = guarded_copy((torch.randn(shape, generator=generator) + 0.5).to(dtypes[0]))
    parameters: list[Tensor | None] = []
    for present in norms:
        weight = 1 + 0.3 * torch.randn(width, generator=generator)
        bias = torch.randn(width, generator=generator)
        parameters += [guarded_copy(t.to(dtypes[1])) if present else None for t in (weight, bias)]
    return Problem(qkv, parameters, grid_hw, special, special_position)


def positions_of(p: Problem) -> Tensor:
    """[P, 2], written out one by one."""
    rows = [[p.special_position, p.special_position]] * p.special
    rows += [[row + 1, column + 1] for row in range(p.grid_hw[0]) for column in range(p.grid_hw[1])]
    return torch.tensor(rows, dtype=torch.float64)


def formula(p: Problem, qkv: Tensor, norms: list[Tensor | None]) -> Tensor:
    """The operator in float64, by complex numbers, differentiable."""
    width = qkv.shape[-1]
    pairs = width // 4
    frequency = BASE ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    turn = torch.polar(torch.ones(1, dtype=torch.float64), positions_of(p)[:, :, None] * frequency)  # [P, 2, pairs]
    parts = []
    for part in range(2):
        x = qkv[..., part, :, :]
        weight, bias = norms[2 * part : 2 * part + 2]
        if weight is not None:
            x = torch.nn.functional.layer_norm(x, (width,), weight, bias, EPS)
        a, b = x.unflatten(-1, (2, 2, pairs)).unbind(-2)  # each [..., P, h, 2, pairs]
        turned = torch.complex(a, b) * turn[:, None]
        parts.append(torch.stack((turned.real, turned.imag), dim=-2).flatten(-3))
    return torch.stack((*parts, qkv[..., 2, :, :]), dim=4)


def wide(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


def longs(values: tuple[int, ...]) -> ctypes.Array[ctypes.c_longlong]:
    return (ctypes.c_longlong * len(values))(*values)


def ints(values: tuple[int, ...]) -> ctypes.Array[ctypes.c_int]:
    return (ctypes.c_int * len(values))(*values)


def register(device: EmulatedDevice, tensors: dict[str, Tensor | None], role: str = "input") -> list[ctypes.c_void_p]:
    return [
        ctypes.c_void_p(None if tensor is None else device.buffer(tensor, name, role))
        for name, tensor in tensors.items()
    ]


def geometry(p: Problem) -> list[int]:
    return [p.qkv.shape[5], p.qkv.shape[6], p.special, p.grid_hw[1], p.special_position]


def run_forward(device: EmulatedDevice, p: Problem, *, in_place: bool = False) -> Tensor:
    """Inside a session; raises CudaError text as an assertion."""
    out = p.qkv if in_place else guarded(tuple(p.qkv.shape), p.qkv.dtype)
    qkv_address = register(device, {"qkv": p.qkv}, "in_out" if in_place else "input")
    out_address = qkv_address if in_place else register(device, {"out": out}, "output")
    names = ("q_weight", "q_bias", "k_weight", "k_bias")
    rest = register(device, {**dict(zip(names, p.norms, strict=True)), "cos_sin": p.cos_sin})
    status = device.library.emulated_qk_norm_rope(
        *qkv_address,
        *out_address,
        *rest,
        ints(tuple(p.qkv.shape[:4])),
        longs(p.qkv.stride()[:6]),
        longs(out.stride()[:6]),
        *geometry(p),
        ctypes.c_float(EPS),
        DTYPE_NUMBERS[p.qkv.dtype],
        DTYPE_NUMBERS[p.norm_dtype],
    )
    assert status == 0 or device.reports(), f"cudaError_t {status}"
    return out


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative Frobenius error, NaN and infinity never pass; says where the worst element is."""
    assert actual.isfinite().all(), f"{name}: {int((~actual.isfinite()).sum())} of {actual.numel()} are not finite"
    difference = (actual.double() - expected).abs()
    error = float(difference.norm() / expected.norm())
    where = [int(i) for i in torch.unravel_index(difference.argmax(), difference.shape)]
    assert error <= tolerance, f"{name}: relative error {error:.3g} > {tolerance:.3g}; worst at {where}"


def check_forward(p: Problem, original: Tensor, out: Tensor) -> None:
    expected = formula(p, original.double(), wide(p.norms))
    assert_close("q, k", out[..., :2, :, :], expected[..., :2, :, :], TOLERANCE[p.qkv.dtype])
    assert torch.equal(out[..., 2, :, :], original[..., 2, :, :])


@pytest.mark.parametrize("width", [32, 64, 96, 128])
@pytest.mark.parametrize("dtypes", COMBINATIONS, ids=combination_ids)
def test_forward_of_every_combination(emulated: EmulatedDevice, dtypes, width: int) -> None:
    problem = make_problem(dtypes, width)
    with emulated.session("random", width):
        out = run_forward(emulated, problem)
        assert emulated.launches() == 1
    check_forward(problem, problem.qkv, out)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("heads", [1, 7, 8, 9, 16])
def test_forward_of_any_number_of_heads(emulated: EmulatedDevice, heads: int, order: str) -> None:
    """At D = 64 in 16 bits a warp takes 8 heads at a time."""
    problem = make_problem((BF16, F32), 64, heads=heads)
    with emulated.session(order):
        out = run_forward(emulated, problem)
    check_forward(problem, problem.qkv, out)


@pytest.mark.parametrize(
    ("grid_hw", "special"), [((1, 1), 0), ((1, 1), 1), ((1, 3), 0), ((2, 2), 0), ((1, 5), 0), ((24, 37), 5)]
)
def test_forward_of_any_frame(emulated: EmulatedDevice, grid_hw: tuple[int, int], special: int) -> None:
    """A block takes 4 tokens; 24 x 37 patches and 5 special tokens are a frame of 336 x 518."""
    problem = make_problem((F16, F16), 32, grid_hw=grid_hw, special=special, heads=2)
    with emulated.session("reverse"):
        out = run_forward(emulated, problem)
    check_forward(problem, problem.qkv, out)


@pytest.mark.parametrize("norms", [(True, False), (False, True), (False, False)], ids=["q", "k", "none"])
def test_forward_with_some_norms(emulated: EmulatedDevice, norms: tuple[bool, bool]) -> None:
    problem = make_problem((F32, F32), 64, norms=norms, special_position=1)
    with emulated.session("random", 1):
        out = run_forward(emulated, problem)
    check_forward(problem, problem.qkv, out)


@pytest.mark.parametrize("width", [64, 96])
def test_forward_in_place_leaves_values_alone(emulated: EmulatedDevice, width: int) -> None:
    problem = make_problem((BF16, BF16), width, frames=(2, 2, 1))
    original = problem.qkv.clone()
    with emulated.session("random", 2):
        out = run_forward(emulated, problem, in_place=True)
    assert out is problem.qkv
    check_forward(problem, original, out)


def strided(qkv: Tensor, layout: str) -> Tensor:
    """The same numbers elsewhere: a slice of a wider tensor, or the grid's dimensions in another order."""
    if layout == "gap":
        room = guarded((*qkv.shape[:4], qkv.shape[4] * qkv.shape[5] * qkv.shape[6] + 16), qkv.dtype)
        view = room[..., 16:].unflatten(-1, qkv.shape[4:])
    elif layout == "time-last":
        view = guarded_copy(qkv.permute(0, 2, 3, 1, 4, 5, 6)).permute(0, 3, 1, 2, 4, 5, 6)
    else:  # heads before parts
        view = guarded_copy(qkv.transpose(4, 5)).transpose(4, 5)
    view.copy_(qkv)
    return view


@pytest.mark.parametrize("layout", ["gap", "time-last", "heads-first"])
def test_forward_of_strided_qkv(emulated: EmulatedDevice, layout: str) -> None:
    problem = make_problem((F16, F32), 64, frames=(2, 3, 2))
    problem.qkv = strided(problem.qkv, layout)
    assert not problem.qkv.is_contiguous()
    with emulated.session("reverse"):
        out = run_forward(emulated, problem)
    check_forward(problem, problem.qkv, out)


def test_offsets_beyond_31_bits(emulated: EmulatedDevice) -> None:
    problem = make_problem((F16, F32), 64, frames=(1, 2, 1))
    problem.qkv = far_apart(problem.qkv, 1)
    grad_out = far_apart(gradient_of(problem), 1)
    with emulated.session():
        out = run_forward(emulated, problem)
    check_forward(problem, problem.qkv, out)
    with emulated.session():
        gradients = run_backward(emulated, problem, grad_out, blocks=2, norm_gradients=True)
    check_backward(problem, grad_out, *gradients)


def test_every_byte_is_moved_once(emulated: EmulatedDevice) -> None:
    """In place at D = 64, h = 16: q and k are read and written once, in full sectors."""
    problem = make_problem((BF16, BF16), 64, grid_hw=(1, 3), special=1, heads=16)
    sectors = problem.qkv.numel() * 2 // 3 * 2 // 32
    with emulated.session(count_accesses=True):
        run_forward(emulated, problem, in_place=True)
        sites = emulated.access_sites()
    stores = [site for site in sites if site.space == "global store"]
    assert sum(site.units for site in stores) == sum(site.ideal_units for site in stores) == sectors
    assert all(site.bytes == 16 for site in stores)
    loads = sum(site.units for site in sites if site.space == "global load")
    assert sectors < loads < 2 * sectors  # the rest is tables and parameters, from the L1 cache


@pytest.mark.parametrize(
    ("change", "error"),
    [("width", 1), ("dtypes", 1), ("misaligned", 716)],
)
def test_what_the_kernels_cannot_do_is_refused(emulated: EmulatedDevice, change: str, error: int) -> None:
    problem = make_problem((F32, F32) if change != "dtypes" else (F32, F16), 48 if change == "width" else 32)
    if change == "misaligned":
        flat = guarded((problem.qkv.numel() + 1,), F32)
        flat[1:] = problem.qkv.flatten()
        problem.qkv = flat[1:].view(problem.qkv.shape)
    with pytest.raises(AssertionError, match=rf"cudaError_t {error}\b"), emulated.session():
        run_forward(emulated, problem)


def test_nothing_to_do_launches_nothing(emulated: EmulatedDevice) -> None:
    for frames, heads in (((0, 1, 1), 2), ((1, 1, 1), 0)):
        problem = make_problem((F32, F32), 32, frames=frames, heads=heads)
        with emulated.session():
            run_forward(emulated, problem)
            assert emulated.launches() == 0


def test_a_table_that_is_too_short_is_seen(emulated: EmulatedDevice) -> None:
    """The bounds check covers the table: a caller that sizes it by the grid alone forgets the offset of one."""
    problem = make_problem((F32, F32), 32, grid_hw=(3, 3))
    problem.cos_sin = guarded_copy(problem.cos_sin[:-1])
    with pytest.raises(EmulationError, match="past the end of 'cos_sin'"), emulated.session():
        run_forward(emulated, problem)


# ---------------------------------------------------------------------------------------------------------- backward


def run_backward(
    device: EmulatedDevice, p: Problem, grad_out: Tensor, *, blocks: int, norm_gradients: bool, in_place: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Inside a session: (grad_qkv, grad_norms [2, 2, D])."""
    width = p.qkv.shape[-1]
    grad_qkv = grad_out if in_place else guarded(tuple(p.qkv.shape), p.qkv.dtype)
    partial, total = guarded((2, blocks, 2, width), F32), guarded((2, 2, width), F32)
    grad_address = register(device, {"grad_out": grad_out}, "in_out" if in_place else "input")
    inputs = register(device, {"qkv": p.qkv})
    grad_qkv_address = grad_address if in_place else register(device, {"grad_qkv": grad_qkv}, "output")
    rest = register(device, {"q_weight": p.norms[0], "k_weight": p.norms[2], "cos_sin": p.cos_sin})
    wanted = {"partial_sums": partial, "grad_norms": total} if norm_gradients else {"partial_sums": None, "norms": None}
    sums = register(device, wanted, "output")  # type: ignore[arg-type]
    status = device.library.emulated_qk_norm_rope_backward(
        *grad_address,
        *inputs,
        *grad_qkv_address,
        *rest,
        *sums,
        ints(tuple(p.qkv.shape[:4])),
        longs(grad_out.stride()[:6]),
        longs(p.qkv.stride()[:6]),
        longs(grad_qkv.stride()[:6]),
        *geometry(p),
        blocks,
        ctypes.c_float(EPS),
        DTYPE_NUMBERS[p.qkv.dtype],
        DTYPE_NUMBERS[p.norm_dtype],
    )
    assert status == 0 or device.reports(), f"cudaError_t {status}"
    return grad_qkv, total if norm_gradients else None


def check_backward(p: Problem, grad_out: Tensor, grad_qkv: Tensor, grad_norms: Tensor | None) -> None:
    leaf = p.qkv.double().requires_grad_()
    norms = [None if tensor is None else tensor.double().requires_grad_() for tensor in p.norms]
    leaves = [leaf, *(norm for norm in norms if norm is not None)]
    expected = torch.autograd.grad((formula(p, leaf, norms) * grad_out.double()).sum(), leaves)
    tolerance = TOLERANCE[p.qkv.dtype]
    assert_close("grad_qkv", grad_qkv, expected[0], 3 * tolerance)
    if grad_norms is None:
        return
    remaining = iter(expected[1:])
    for part in range(2):
        for which in range(2):
            if p.norms[2 * part] is None:
                assert grad_norms[part, which].abs().max() == 0
            else:
                assert_close(f"grad_norms[{part}, {which}]", grad_norms[part, which], next(remaining), 1e-5)


def gradient_of(p: Problem) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return guarded_copy(torch.randn(p.qkv.shape, generator=generator).to(p.qkv.dtype))


@pytest.mark.parametrize("width", [32, 64, 96, 128])
@pytest.mark.parametrize("dtypes", COMBINATIONS, ids=combination_ids)
def test_backward_of_every_combination(emulated: EmulatedDevice, dtypes, width: int) -> None:
    problem = make_problem(dtypes, width)
    grad_out = gradient_of(problem)
    with emulated.session("random", width):
        result = run_backward(emulated, problem, grad_out, blocks=3, norm_gradients=True)
        assert emulated.launches() == 2
    check_backward(problem, grad_out, *result)


@pytest.mark.parametrize("norms", [(True, False), (False, False)], ids=["q", "none"])
def test_backward_with_some_norms(emulated: EmulatedDevice, norms: tuple[bool, bool]) -> None:
    problem = make_problem((F32, F32), 64, norms=norms, heads=9)
    grad_out = gradient_of(problem)
    with emulated.session("reverse"):
        result = run_backward(emulated, problem, grad_out, blocks=2, norm_gradients=norms[0])
    check_backward(problem, grad_out, *result)


def test_backward_in_place_of_the_gradient(emulated: EmulatedDevice) -> None:
    problem = make_problem((F16, F32), 64)
    grad_out = gradient_of(problem)
    original = grad_out.clone()
    with emulated.session("random", 3):
        result = run_backward(emulated, problem, grad_out, blocks=2, norm_gradients=True, in_place=True)
    check_backward(problem, original, *result)


def test_backward_of_strided_tensors(emulated: EmulatedDevice) -> None:
    problem = make_problem((BF16, F32), 32, frames=(2, 3, 1))
    problem.qkv = strided(problem.qkv, "time-last")
    grad_out = strided(gradient_of(problem), "heads-first")
    with emulated.session("reverse"):
        result = run_backward(emulated, problem, grad_out, blocks=5, norm_gradients=True)
    check_backward(problem, grad_out, *result)


@pytest.mark.parametrize("blocks", [1, 7, 40])
def test_backward_sums_are_the_same_in_every_order(emulated: EmulatedDevice, blocks: int) -> None:
    problem = make_problem((F32, F32), 64, frames=(1, 2, 2), heads=8)
    grad_out = gradient_of(problem)
    results = []
    for order in ("forward", "reverse", "random"):
        with emulated.session(order, 9):
            results.append(run_backward(emulated, problem, grad_out, blocks=blocks, norm_gradients=True))
        check_backward(problem, grad_out, *results[-1])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_backward_of_no_tokens_gives_zero_parameter_gradients(emulated: EmulatedDevice) -> None:
    problem = make_problem((BF16, BF16), 64, frames=(0, 1, 1))
    with emulated.session():
        _, grad_norms = run_backward(emulated, problem, gradient_of(problem), blocks=1, norm_gradients=True)
    assert grad_norms is not None
    assert grad_norms.abs().max() == 0


def test_blocks_are_within_bounds(emulated: EmulatedDevice) -> None:
    with emulated.session(multiprocessors=132):
        for grid in ((0, 1, 1, 5), (1, 1, 1, 1), (1, 1, 1, 893), (1, 10, 10, 893), (1, 100, 1000, 1374)):
            assert 1 <= emulated.library.emulated_qk_norm_rope_blocks(ints(grid)) <= 264
