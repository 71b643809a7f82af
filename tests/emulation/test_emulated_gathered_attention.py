"""The CUDA kernels of the sparse attentions, run by the emulator: launchers alone, and under the operators' code."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from emulated_device import EmulatedDevice, EmulationError, far_apart, guarded, guarded_copy
from torch import Tensor

from vggt_mv_ext import block_dilated_attention, landmark_attention, memory_read, memory_write, reference
from vggt_mv_ext.ops import _gathered

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPE_NUMBERS = {F32: 0, F16: 1, BF16: 2}
TOLERANCE = {F16: 2e-3, BF16: 1e-2}  # relative Frobenius error against float64
OPERATORS = {f.__name__: f for f in (memory_write, memory_read, landmark_attention, block_dilated_attention)}
SOURCES = {"memory_read": 0, "memory_write": 1, "landmark_attention": 2, "block_dilated_attention": 3}
every_operator = pytest.mark.parametrize("name", OPERATORS)
both_dtypes = pytest.mark.parametrize("dtype", [F16, BF16], ids=["fp16", "bf16"])


@dataclass
class Problem:
    """One input; tensors are laid out as the test wants them."""

    name: str
    qkv: Tensor  # [B, T, N, P, 3, h, D]
    memory_qkv: Tensor | None  # [B, M, 3, h, D]
    key_bias: Tensor | None  # [B, T, N, P]
    listed: Tensor | None  # [B, K] or [T N, W]
    scale: float
    chunks: int = 1

    @property
    def arguments(self) -> dict[str, Tensor]:
        """Of the operator, without the scale."""
        list_name = "landmarks" if self.name == "landmark_attention" else "neighbours"
        given = {"qkv": self.qkv, "memory_qkv": self.memory_qkv, "key_bias": self.key_bias, list_name: self.listed}
        return {key: tensor for key, tensor in given.items() if tensor is not None}

    @property
    def leading(self) -> tuple[int, ...]:
        """Dimensions of the queries."""
        if self.name != "memory_write":
            return tuple(self.qkv.shape[:4])
        assert self.memory_qkv is not None
        return tuple(self.memory_qkv.shape[:2])


def make_problem(
    name: str,
    dtype: torch.dtype = F16,
    width: int = 32,
    grid: tuple[int, int, int, int] = (1, 2, 2, 9),
    *,
    heads: int = 1,
    bias: bool = False,
    memory: int = 5,
    listed: int = 3,
    chunks: int = 1,
) -> Problem:
    """Numbers for `grid` = B, T, N, P; `memory`: tokens; `listed`: landmarks, or frames that a frame looks at."""
    generator = torch.Generator().manual_seed(width + 7 * math.prod(grid) + heads + memory + listed)
    batch, times, views, tokens = grid

    def qkv(*shape: int) -> Tensor:
        return guarded_copy((1.5 * torch.randn((*shape, 3, heads, width), generator=generator)).to(dtype))

    problem = Problem(name, qkv(*grid), None, None, None, 1.2 * width**-0.5, chunks)
    if name.startswith("memory"):
        problem.memory_qkv = qkv(batch, memory)
    if name == "landmark_attention":
        problem.listed = torch.randint(0, times * views * tokens, (batch, listed), generator=generator)
    if name == "block_dilated_attention":
        frames = times * views
        rows = [torch.randperm(frames, generator=generator)[: min(listed, frames)] for _ in range(frames)]
        problem.listed = torch.stack(rows)
        if problem.listed.shape[1] > 1:  # -1 at the end, in the middle and at the start
            problem.listed[torch.arange(0, frames, 2), torch.arange(0, frames, 2) % problem.listed.shape[1]] = -1
    if bias and name != "memory_read":
        problem.key_bias = guarded_copy(2 * torch.randn(grid, generator=generator))
    return problem


def expected(p: Problem, dtype: torch.dtype = torch.float64) -> Tensor:
    wide = reference.accumulation_dtype(dtype)
    given = {
        key: tensor if tensor.dtype == torch.int64 else tensor.to(wide if key == "key_bias" else dtype)
        for key, tensor in p.arguments.items()
    }
    result: Tensor = getattr(reference, p.name)(**given, scale=p.scale)
    return result


def expected_lse(p: Problem) -> Tensor:
    """[B, h, queries] in float64, from a dense table of which query sees which key, and how often."""
    batch, times, views, tokens = p.qkv.shape[:4]
    count = times * views * tokens
    flat = p.qkv.double().flatten(1, 3)
    bias = torch.zeros(batch, count).double() if p.key_bias is None else p.key_bias.double().flatten(1)
    times_seen = torch.zeros(batch, count, count, dtype=torch.float64)
    if p.name == "memory_write":
        times_seen = torch.ones(batch, p.leading[1], count, dtype=torch.float64)
    elif p.name == "landmark_attention":
        assert p.listed is not None
        for b, row in enumerate(p.listed.tolist()):
            for token in row:
                times_seen[b, :, token] += 1
    elif p.name == "block_dilated_attention":
        assert p.listed is not None
        for frame, row in enumerate(p.listed.tolist()):
            for near in (f for f in row if f >= 0):
                times_seen[:, frame * tokens : (frame + 1) * tokens, near * tokens : (near + 1) * tokens] += 1
    keys, weight = flat[:, :, 1], times_seen.log() + bias[:, None]
    queries = flat[:, :, 0]
    if p.memory_qkv is not None:
        memory = p.memory_qkv.double()
        keys = torch.cat((memory[:, :, 1], keys), 1)
        weight = torch.cat((torch.zeros(batch, weight.shape[1], memory.shape[1]).double(), weight), 2)
        queries = memory[:, :, 0] if p.name == "memory_write" else queries
    logits = p.scale * torch.einsum("bihd,bjhd->bhij", queries, keys) + weight[:, None]
    return logits.logsumexp(-1)


def longs(values: Sequence[int]) -> ctypes.Array[ctypes.c_longlong]:
    return (ctypes.c_longlong * len(values))(*values)


def run(device: EmulatedDevice, p: Problem, *, want_lse: bool = True) -> tuple[Tensor, Tensor]:
    """Inside a session: (out, lse), both full of NaN beforehand."""
    *grid, _, heads, width = p.qkv.shape
    queries = math.prod(p.leading[1:])
    out = guarded((*p.leading, heads * width), p.qkv.dtype)
    lse = guarded((grid[0], heads, queries), F32)
    partial = guarded((p.chunks * lse.numel() * (width + 1),), F32) if p.chunks > 1 else None

    def address(name: str, tensor: Tensor | None, role: str = "input") -> ctypes.c_void_p:
        return ctypes.c_void_p(None if tensor is None else device.buffer(tensor, name, role))

    status = device.library.emulated_gathered_attention(
        address("qkv", p.qkv),
        address("memory_qkv", p.memory_qkv),
        address("key_bias", p.key_bias),
        address("listed", p.listed),
        address("out", out, "output"),
        address("lse", lse if want_lse else None, "output"),
        address("partial", partial, "output"),
        (ctypes.c_int * 4)(*grid),
        longs(p.qkv.stride()[:6]),
        longs((0,) * 4 if p.memory_qkv is None else p.memory_qkv.stride()[:4]),
        SOURCES[p.name],
        int(p.name == "memory_write"),
        0 if p.memory_qkv is None else p.memory_qkv.shape[1],
        0 if p.listed is None else p.listed.shape[1],
        p.chunks,
        heads,
        width,
        ctypes.c_float(p.scale),
        DTYPE_NUMBERS[p.qkv.dtype],
    )
    assert status == 0 or device.reports(), f"cudaError_t {status}"
    return out, lse


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def check(p: Problem, out: Tensor, lse: Tensor) -> None:
    """Error against float64: within the tolerance, and not worse than eager's; NaN and infinity never pass."""
    exact = expected(p)
    assert out.isfinite().all(), f"{int((~out.isfinite()).sum())} of {out.numel()} results are not finite"
    difference = (out.double() - exact).abs()
    where = [int(i) for i in torch.unravel_index(difference.argmax(), difference.shape)]
    error, eager = relative_error(out, exact), relative_error(expected(p, out.dtype), exact)
    limit = min(TOLERANCE[out.dtype], 1.5 * eager + torch.finfo(out.dtype).eps)
    assert error <= limit, f"relative error {error:.3g} > {limit:.3g} (eager {eager:.3g}); worst at {where}"
    torch.testing.assert_close(lse.double(), expected_lse(p), rtol=1e-5, atol=1e-5)


@both_dtypes
@pytest.mark.parametrize("width", [32, 64, 96, 128])
@every_operator
def test_every_width_and_dtype(emulated: EmulatedDevice, name: str, width: int, dtype: torch.dtype) -> None:
    """Lists of more than one tile of keys, frames that are no multiple of one, a result in one piece."""
    problem = make_problem(name, dtype, width, (1, 2, 1, 35), heads=2, bias=width % 64 == 0, memory=40, listed=70)
    with emulated.session("random", width):
        out, lse = run(emulated, problem)
        assert emulated.launches() == 1
    check(problem, out, lse)


@every_operator
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_batches_frames_and_heads_keep_to_themselves(emulated: EmulatedDevice, name: str, bias: bool) -> None:
    problem = make_problem(name, F16, 32, (2, 2, 3, 11), heads=2, bias=bias, listed=4)
    with emulated.session("reverse"):
        out, lse = run(emulated, problem)
    check(problem, out, lse)


@pytest.mark.parametrize("length", [1, 7, 31, 32, 33, 63, 64, 65, 127, 128, 129, 193])
def test_every_length(emulated: EmulatedDevice, length: int) -> None:
    """Of the memory as keys and as queries, of a list, of a frame: tiles have 64 or 128 rows and 32 or 64 keys."""
    for width, bias in ((32, length % 2 == 1), (128, length % 2 == 0)):
        for problem in (
            make_problem("memory_read", BF16, width, (1, 1, 1, 20), memory=length),
            make_problem("memory_write", BF16, width, (1, 1, 1, 20), memory=length, bias=bias),
            make_problem("memory_write", BF16, width, (1, 1, 1, length), bias=bias),
            make_problem("landmark_attention", BF16, width, (1, 2, 1, 20), listed=length, bias=bias),
            make_problem("block_dilated_attention", BF16, width, (1, 1, 2, length), bias=bias, listed=2),
        ):
            if problem.qkv.shape[3] > 130 and width == 128:
                continue
            with emulated.session("random", length):
                out, lse = run(emulated, problem)
            check(problem, out, lse)


@pytest.mark.parametrize("width", [32, 96])
@pytest.mark.parametrize(("chunks", "tiles"), [(2, 2), (3, 5), (5, 5)])
def test_chunks_of_keys(emulated: EmulatedDevice, width: int, chunks: int, tiles: int) -> None:
    """A tile of memory, then tiles of tokens over the ends of frames; chunks of unlike numbers of tiles."""
    keys = 64 if width == 32 else 32
    tokens = (tiles - 1) * keys // 2 - 3
    problem = make_problem("memory_write", F16, width, (2, 1, 2, tokens), heads=2, bias=True, memory=9, chunks=chunks)
    with emulated.session("random", 1):
        out, lse = run(emulated, problem)
        assert emulated.launches() == 2
    check(problem, out, lse)


@pytest.mark.parametrize("order", ["reverse", "random"])
@every_operator
def test_order_of_fibers_changes_nothing(emulated: EmulatedDevice, name: str, order: str) -> None:
    chunks = 2 if name == "memory_write" else 1
    problem = make_problem(name, BF16, 64, (1, 3, 2, 25), bias=True, memory=40, listed=70, chunks=chunks)
    results = []
    for this_order in ("forward", order):
        with emulated.session(this_order, 5):
            results.append(run(emulated, problem))
    check(problem, *results[1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def strided(qkv: Tensor, layout: str) -> Tensor:
    """The same numbers elsewhere, NaN between them."""
    if layout == "gap":
        room = guarded((*qkv.shape[:-3], math.prod(qkv.shape[-3:]) + 16), qkv.dtype)
        view = room[..., 16:].unflatten(-1, qkv.shape[-3:])
    elif layout == "heads-first":
        view = guarded_copy(qkv.transpose(-3, -2)).transpose(-3, -2)
    elif qkv.dim() == 5:  # tokens last but one
        view = guarded_copy(qkv.transpose(1, 3)).transpose(1, 3)
    elif layout == "views-of-more":
        view = guarded((*qkv.shape[:2], qkv.shape[2] + 2, *qkv.shape[3:]), qkv.dtype)[:, :, 1:-1]
    else:  # time last
        view = guarded_copy(qkv.permute(0, 2, 3, 1, 4, 5, 6)).permute(0, 3, 1, 2, 4, 5, 6)
    view.copy_(qkv)
    return view


@every_operator
@pytest.mark.parametrize("layout", ["gap", "views-of-more", "time-last", "heads-first"])
def test_strided_tensors(emulated: EmulatedDevice, name: str, layout: str) -> None:
    problem = make_problem(name, F16, 32, (2, 2, 3, 12), heads=2, bias=True)
    problem.qkv = strided(problem.qkv, layout)
    assert not problem.qkv.is_contiguous()
    if problem.memory_qkv is not None:
        problem.memory_qkv = strided(problem.memory_qkv, layout)
    with emulated.session("reverse"):
        out, lse = run(emulated, problem)
    check(problem, out, lse)


@every_operator
def test_offsets_beyond_31_bits(emulated: EmulatedDevice, name: str) -> None:
    """Two views 2^31 elements apart: a run of keys that goes over the jump, and rows named by lists."""
    problem = make_problem(name, F16, 32, (1, 1, 2, 10), heads=2, bias=True)
    problem.qkv = far_apart(problem.qkv, 2)
    with emulated.session():
        out, lse = run(emulated, problem)
    check(problem, out, lse)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("name", ["memory_write", "landmark_attention", "block_dilated_attention"])
def test_shut_out_keys_weigh_nothing(emulated: EmulatedDevice, name: str, chunks: int) -> None:
    """Whole tiles of keys with a bias of -inf, at first of all and, for memory_write, as a whole chunk of the keys."""
    if chunks > 1 and name != "memory_write":
        pytest.skip("only a memory's keys come in chunks")
    problem = make_problem(name, BF16, 32, (1, 2, 1, 100), bias=True, listed=2, chunks=chunks)
    assert problem.key_bias is not None
    problem.key_bias[:, 0, :, :] = -math.inf
    if problem.listed is not None and name == "landmark_attention":
        problem.listed = torch.arange(200)[None]
    elif problem.listed is not None:
        problem.listed[:] = torch.tensor([[0, 1], [1, 0]])
    if name == "memory_write":
        problem.key_bias[:, 1, :, 60:] = -math.inf  # the last chunk of three, tiles 4 and 5 of 5
    with emulated.session("random", 3):
        out, lse = run(emulated, problem)
    check(problem, out, lse)


def test_all_keys_shut_out_is_not_a_number(emulated: EmulatedDevice) -> None:
    """As PyTorch's softmax has it: frames that look at a frame without keys, or at none; the others are not touched."""
    problem = make_problem("block_dilated_attention", F16, 32, (1, 1, 3, 20), bias=True)
    assert problem.key_bias is not None
    problem.listed = torch.tensor([[0, -1], [-1, -1], [2, -1]])
    problem.key_bias[:, :, 0] = -math.inf
    with emulated.session():
        out, lse = run(emulated, problem)
    assert out[:, :, :2].isnan().all()
    assert (lse[..., :40] == -math.inf).all()
    third = replace(problem, qkv=problem.qkv[:, :, 2:], key_bias=problem.key_bias[:, :, 2:], listed=torch.tensor([[0]]))
    assert relative_error(out[:, :, 2:], expected(third)) < TOLERANCE[F16]


@pytest.mark.parametrize("chunks", [1, 2])
def test_not_a_number_stays_where_it_belongs(emulated: EmulatedDevice, chunks: int) -> None:
    """In a value of one head: that column of all its rows, in whatever chunk it was. Never elsewhere."""
    problem = make_problem("memory_write", F16, 32, (1, 1, 1, 80), heads=2, chunks=chunks)
    problem.qkv[0, 0, 0, 70, 2, 1, 5] = math.nan
    with emulated.session():
        out, lse = run(emulated, problem)
    column = torch.zeros(out.shape, dtype=torch.bool)
    column[..., 32 + 5] = True
    assert torch.equal(out.isnan(), column)
    assert lse.isfinite().all()


@every_operator
def test_lse_may_be_left_out(emulated: EmulatedDevice, name: str) -> None:
    problem = make_problem(name, chunks=2 if name == "memory_write" else 1)
    with emulated.session():
        out, lse = run(emulated, problem, want_lse=False)
    assert lse.isnan().all()
    assert relative_error(out, expected(problem)) < TOLERANCE[F16]


@pytest.mark.parametrize("width", [32, 64, 96, 128])
@every_operator
def test_shared_memory_has_no_bank_conflicts(emulated: EmulatedDevice, name: str, width: int) -> None:
    """Every matrix load, copy, store and load takes as few wavefronts as its bytes need."""
    problem = make_problem(name, F16, width, (1, 1, 1, 64), bias=True, memory=64, listed=64)
    with emulated.session(count_accesses=True):
        run(emulated, problem)
        sites = emulated.access_sites()
    assert {"shared matrix load", "shared copy", "shared store"} <= {site.space for site in sites}
    for site in sites:
        if site.space.startswith("shared"):
            assert site.units == site.ideal_units, site
    wide = [site for site in sites if site.space == "global store" and site.bytes == 16]
    assert sum(site.units * 32 for site in wide) == 64 * width * 2
    assert all(site.units == site.ideal_units for site in wide)


CHANGES = {
    "width": ("memory_read", {}, 1),
    "dtype": ("memory_read", {}, 1),
    "scale": ("memory_read", {"scale": -1.0}, 1),
    "chunks without keys": ("memory_write", {"chunks": 3}, 1),
    "no chunk": ("memory_write", {"chunks": 0}, 1),
    "chunks of a list": ("landmark_attention", {"chunks": 2}, 1),
    "no memory": ("memory_read", {"memory_qkv": None}, 1),
    "no list": ("landmark_attention", {"listed": None}, 1),
    "misaligned": ("memory_read", {}, 716),
    "misaligned memory": ("memory_read", {}, 716),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_kernel_cannot_do_is_refused(emulated: EmulatedDevice, change: str) -> None:
    name, fields, error = CHANGES[change]
    problem = make_problem(name, F32 if change == "dtype" else F16, 48 if change == "width" else 32)
    problem = replace(problem, **fields)
    if change == "misaligned":
        problem.qkv = misaligned(problem.qkv)
    elif change == "misaligned memory" and problem.memory_qkv is not None:
        problem.memory_qkv = misaligned(problem.memory_qkv)
    with pytest.raises(AssertionError, match=rf"cudaError_t {error}\b"), emulated.session():
        run(emulated, problem)
        assert emulated.launches() == 0


def misaligned(tensor: Tensor) -> Tensor:
    return guarded((tensor.numel() + 1,), tensor.dtype)[1:].view(tensor.shape).copy_(tensor)


@every_operator
def test_nothing_to_do_launches_nothing(emulated: EmulatedDevice, name: str) -> None:
    problem = make_problem(name)
    problem.qkv = problem.qkv[:0]
    problem.memory_qkv = None if problem.memory_qkv is None else problem.memory_qkv[:0]
    with emulated.session():
        run(emulated, problem)
        assert emulated.launches() == 0


@pytest.mark.parametrize("name", ["memory_write", "landmark_attention", "block_dilated_attention"])
def test_a_bias_that_is_too_short_is_seen(emulated: EmulatedDevice, name: str) -> None:
    problem = make_problem(name, bias=True, grid=(1, 1, 2, 20), listed=70)
    assert problem.key_bias is not None
    problem.key_bias = guarded_copy(problem.key_bias[:, :, :1])
    with pytest.raises(EmulationError, match="past the end of 'key_bias'"), emulated.session():
        run(emulated, problem)


@pytest.mark.parametrize("multiprocessors", [1, 4, 132, 10_000])
@pytest.mark.parametrize("width", [64, 128])
def test_chunks_fill_the_device_and_all_have_keys(emulated: EmulatedDevice, width: int, multiprocessors: int) -> None:
    keys = 64 if width == 64 else 32
    for tokens in (1, 200, 5_000, 100_003):
        grid = (ctypes.c_int * 4)(1, 1, 1, tokens)
        with emulated.session(multiprocessors=multiprocessors):
            chunks = emulated.library.emulated_gathered_attention_key_chunks(grid, 32, 16, width)
        tiles = 1 + math.ceil(tokens / keys)
        most = max(1, min(2 * multiprocessors // 16, tiles // 4))  # a wave of two blocks each, of four tiles or more
        assert chunks == math.ceil(tiles / math.ceil(tiles / most))  # none is empty


class EmulatedExtension:
    """The compiled module's functions by the emulator's: registers what the operator allocates and passes it on."""

    def __init__(self, device: EmulatedDevice) -> None:
        self.device = device

    def gathered_attention_key_chunks(self, grid: Sequence[int], memory_tokens: int, heads: int, width: int) -> int:
        sizes = (ctypes.c_int * 4)(*grid)
        return int(self.device.library.emulated_gathered_attention_key_chunks(sizes, memory_tokens, heads, width))

    def gathered_attention_cuda(self, *arguments: Any) -> None:
        addresses, (grid, steps, memory_steps, source, memory_asks, memory, listed, chunks, *rest) = (
            arguments[:7],
            arguments[7:],
        )
        heads, width, scale, dtype, stream = rest
        assert stream == 7
        tokens, batch = math.prod(grid), grid[0]
        ends = [
            sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
            for shape, strides in (((*grid, 3, heads), steps), ((batch, memory, 3, heads), memory_steps))
        ]
        rows = (batch * memory if memory_asks else tokens) * heads
        lists = listed * (batch if source == 2 else grid[1] * grid[2])
        sizes = (2 * (ends[0] + width), 2 * (ends[1] + width), 4 * tokens, 8 * lists)
        sizes += (2 * rows * width, 4 * rows, 4 * rows * chunks * (width + 1))
        for i, (address, size) in enumerate(zip(addresses, sizes, strict=True)):
            if address:
                self.device.library.emulator_register(address, size, f"argument {i}".encode(), int(i >= 4))
        status = self.device.library.emulated_gathered_attention(
            *(ctypes.c_void_p(address or None) for address in addresses),
            (ctypes.c_int * 4)(*grid),
            longs(steps),
            longs(memory_steps),
            *(source, int(memory_asks), memory, listed, chunks, heads, width, ctypes.c_float(scale), dtype),
        )
        assert status == 0 or self.device.reports(), f"cudaError_t {status}"


@pytest.fixture
def as_on_a_gpu(emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators as on a GPU, but for the tensors, which are on the CPU."""
    monkeypatch.setattr(_gathered, "choose", lambda *_: "cuda")
    monkeypatch.setattr(_gathered, "extension", EmulatedExtension(emulated))
    monkeypatch.setattr(_gathered._kernels, "stream_address", lambda tensor: 7)
    monkeypatch.setattr(_gathered._kernels, "device_guard", lambda tensor: nullcontext())


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("layout", ["contiguous", "heads-first", "misaligned", "one head, odd stride"])
@every_operator
def test_the_operator_hands_over_what_the_launcher_expects(emulated: EmulatedDevice, name: str, layout: str) -> None:
    """The operators' own code for CUDA, on the CPU; lists with strides of their own, memory_write in two chunks."""
    one_head = layout == "one head, odd stride"
    grid = (2, 2, 2, 150) if name == "memory_write" else (2, 2, 2, 9)
    problem = make_problem(name, F16, 32, grid, heads=1 if one_head else 2, bias=True)
    given = problem.arguments
    for key in ("qkv", "memory_qkv"):
        if key not in given:
            continue
        if layout == "heads-first":
            given[key] = strided(given[key], layout)
        elif layout == "misaligned":
            given[key] = misaligned(given[key])
        elif one_head:
            tensor = given[key]
            given[key] = tensor.as_strided(tensor.shape, (*tensor.stride()[:-2], 33, 1))
    for key in ("landmarks", "neighbours"):
        if key in given:
            given[key] = given[key].repeat_interleave(2, dim=1)[:, ::2]
    with emulated.session("random", 1):
        out = OPERATORS[name](**given, scale=problem.scale)
        assert emulated.launches() == (2 if name == "memory_write" else 1)
    assert out.is_contiguous()
    assert relative_error(out, expected(problem)) < TOLERANCE[F16]


@pytest.mark.usefixtures("as_on_a_gpu")
@every_operator
def test_gradients_are_of_the_reference(emulated: EmulatedDevice, name: str) -> None:
    """The backward pass has no kernel: it takes autograd of the reference, with the kernel's choice unheeded."""
    problem = make_problem(name, F16, 32, bias=True)
    tensors = {key: tensor for key, tensor in problem.arguments.items() if tensor.dtype != torch.int64}
    leaves = {key: tensor.clone().requires_grad_() for key, tensor in tensors.items()}
    with emulated.session():
        out = OPERATORS[name](**{**problem.arguments, **leaves})
        found = torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))
        assert emulated.launches() == 1
    doubles = {key: tensor.double().requires_grad_() for key, tensor in tensors.items()}
    exact_out = getattr(reference, name)(**{**problem.arguments, **doubles})
    exact = torch.autograd.grad(exact_out, list(doubles.values()), torch.ones_like(exact_out))
    for key, gradient, expected_gradient in zip(leaves, found, exact, strict=True):
        assert relative_error(gradient, expected_gradient) < 3 * TOLERANCE[F16], key
