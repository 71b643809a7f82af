"""alternating_attention against a loop over sequences, heads and rows in float64, and the rules around it."""

from __future__ import annotations

import itertools

import pytest
import torch
from ops_support import ISAS, assert_accurate
from torch import Tensor

import vggt_mv_ext
from vggt_mv_ext import alternating_attention, qk_norm_rope, reference, residual_scale_norm
from vggt_mv_ext._extension import extension

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
AXES = ("frame", "view", "time", "global")
every_axis = pytest.mark.parametrize("axis", AXES)
every_isa = pytest.mark.parametrize("isa", ISAS, indirect=True)
needs_kernel = pytest.mark.skipif(extension is None, reason="this build has no compiled kernels")


def sequences(axis: str, batch: int, times: int, views: int, tokens: int) -> list[list[tuple[int, int, int, int]]]:
    """The tokens of every sequence of an axis, by index (b, t, n, p), straight from the table in the documentation."""
    found: dict[tuple[int, ...], list[tuple[int, int, int, int]]] = {}
    for b, t, n, p in itertools.product(range(batch), range(times), range(views), range(tokens)):
        name = {"frame": (b, t, n), "view": (b, t), "time": (b, n), "global": (b,)}[axis]
        found.setdefault(name, []).append((b, t, n, p))
    return list(found.values())


def naive(qkv: Tensor, axis: str, key_bias: Tensor | None, row_gate: Tensor | None, scale: float) -> Tensor:
    heads, width = qkv.shape[5:]
    out = torch.full((*qkv.shape[:4], heads * width), float("nan"), dtype=qkv.dtype)
    for members in sequences(axis, *qkv.shape[:4]):
        for h in range(heads):
            keys = torch.stack([qkv[token][1, h] for token in members])
            values = torch.stack([qkv[token][2, h] for token in members])
            for token in members:
                logits = scale * keys @ qkv[token][0, h]
                if key_bias is not None:
                    gate = 1.0 if row_gate is None else (row_gate[token[3]] if row_gate.dim() == 1 else row_gate[token])
                    logits = logits + gate * torch.stack([key_bias[key] for key in members])
                out[token][h * width : (h + 1) * width] = torch.softmax(logits, dim=0) @ values
    return out


def make_inputs(
    gate: str, shape: tuple[int, ...] = (2, 3, 2, 4, 3, 2, 8)
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    qkv = torch.randn(shape, dtype=F64)
    key_bias = None if gate == "no bias" else -2.0 * torch.rand(shape[:4], dtype=F64)
    row_gate = {"a gate a token": torch.rand(shape[3], dtype=F64), "a gate a row": torch.rand(shape[:4], dtype=F64)}
    return qkv, key_bias, row_gate.get(gate)


GATES = ("no bias", "bias", "a gate a token", "a gate a row")


@every_axis
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.usefixtures("poisoned")
def test_against_loops(axis: str, gate: str) -> None:
    qkv, key_bias, row_gate = make_inputs(gate)
    for scale in (None, 0.7):
        got = alternating_attention(qkv, axis, key_bias=key_bias, row_gate=row_gate, scale=scale)
        assert got.is_contiguous()
        assert_accurate("out", got, naive(qkv, axis, key_bias, row_gate, 8**-0.5 if scale is None else scale), F64)


SHAPES = {
    "one token": (1, 1, 1, 1, 3, 1, 1),
    "odd widths": (1, 2, 2, 3, 3, 1, 7),
    "one time": (1, 1, 3, 5, 3, 2, 32),
    "one view": (2, 3, 1, 5, 3, 1, 64),
    "width 128": (1, 2, 2, 3, 3, 1, 128),
}


@every_axis
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_awkward_shapes(axis: str, shape: tuple[int, ...]) -> None:
    qkv, key_bias, row_gate = make_inputs("a gate a row", shape)
    got = alternating_attention(qkv, axis, key_bias=key_bias, row_gate=row_gate)
    assert_accurate("out", got, naive(qkv, axis, key_bias, row_gate, shape[6] ** -0.5), F64)


@every_axis
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["f32", "f16", "bf16"])
def test_low_precision(axis: str, gate: str, dtype: torch.dtype) -> None:
    qkv, key_bias, row_gate = make_inputs(gate, (1, 3, 2, 67, 3, 2, 64))
    qkv, key_bias = qkv.to(dtype), None if key_bias is None else key_bias.float()
    row_gate = None if row_gate is None else row_gate.float()
    got = alternating_attention(qkv, axis, key_bias=key_bias, row_gate=row_gate)
    wide = (None if t is None else t.double() for t in (key_bias, row_gate))
    exact = reference.alternating_attention(qkv.double(), axis, **dict(zip(("key_bias", "row_gate"), wide)))
    assert got.dtype == dtype
    assert_accurate("out", got, exact, dtype)
    if dtype == F32:  # what a mask of this size would cost in accuracy shows long before 1e-5
        assert (got - exact).norm() / exact.norm() < 1e-6


@pytest.mark.parametrize("dtype", [F16, BF16], ids=["f16", "bf16"])
def test_bias_keeps_more_bits_than_the_dtype(dtype: torch.dtype) -> None:
    """With equal scores everywhere the output shows the bias alone: rounding it to 8 bits would miss by 1e-2."""
    qkv = torch.zeros(1, 1, 1, 64, 3, 1, 64)
    qkv[0, 0, 0, :, 2, 0, 0] = torch.linspace(-1, 1, 64)
    key_bias = 4 + 4 * torch.rand(1, 1, 1, 64)
    row_gate = 1 + torch.rand(1, 1, 1, 64)
    got = alternating_attention(qkv.to(dtype), "frame", key_bias=key_bias, row_gate=row_gate)
    weights = torch.softmax(row_gate[0, 0, 0, :, None] * key_bias[0, 0, 0, None, :].double(), dim=1)
    exact = weights @ qkv[0, 0, 0, :, 2, 0, 0].to(dtype).double()
    unit = {F16: 2.0**-11, BF16: 2.0**-8}[dtype]
    assert ((got[0, 0, 0, :, 0] - exact).abs() <= 3 * unit * exact.abs().clamp_min(0.25)).all()


@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64], ids=["f32", "f16", "bf16", "f64"])
def test_infinite_bias_shuts_a_key_out(dtype: torch.dtype) -> None:
    qkv, key_bias, row_gate = make_inputs("a gate a row", (1, 2, 2, 9, 3, 1, 32))
    assert key_bias is not None and row_gate is not None
    wide = F64 if dtype == F64 else F32
    qkv, key_bias, row_gate = qkv.to(dtype), key_bias.to(wide), (row_gate + 0.5).to(wide)
    key_bias[:, :, :, 4] = -torch.inf
    out = alternating_attention(qkv, "view", key_bias=key_bias, row_gate=row_gate)
    assert out.isfinite().all()
    qkv[:, :, :, 4, 1:] = 77.0  # key and value of what is shut out do not matter
    assert torch.equal(out, alternating_attention(qkv, "view", key_bias=key_bias, row_gate=row_gate))


@every_axis
def test_strided_input(axis: str) -> None:
    qkv, key_bias, _ = make_inputs("bias")
    strided = torch.full((2, 2, 4, 3, 3, 2, 11), float("nan"), dtype=F64).permute(0, 3, 1, 2, 4, 5, 6)[..., 1:9]
    strided.copy_(qkv)
    assert not strided.is_contiguous()
    want = alternating_attention(qkv, axis, key_bias=key_bias)
    assert_accurate("out", alternating_attention(strided, axis, key_bias=key_bias), want, F64)


def test_one_grid_for_all() -> None:
    """A single sequence is the grid T = 1: time attention is attention in a frame, view attention over everything."""
    qkv, _, _ = make_inputs("no bias", (2, 1, 3, 4, 3, 2, 8))
    assert torch.allclose(alternating_attention(qkv, "time"), alternating_attention(qkv, "frame"), atol=1e-14)
    assert torch.allclose(alternating_attention(qkv, "view"), alternating_attention(qkv, "global"), atol=1e-14)


@pytest.mark.parametrize("shape", [(0, 2, 2, 3, 3, 2, 8), (2, 2, 2, 0, 3, 2, 8)], ids=str)
def test_no_tokens(shape: tuple[int, ...]) -> None:
    for axis in AXES:
        qkv = torch.zeros(shape, requires_grad=True)
        out = alternating_attention(qkv, axis, key_bias=torch.zeros(shape[:4]))
        assert out.shape == (*shape[:4], 16)
        out.sum().backward()


@pytest.mark.parametrize(("axis", "gate"), [*zip(AXES, GATES), ("time", "a gate a row")])
def test_gradients_in_float64(axis: str, gate: str) -> None:
    qkv, key_bias, row_gate = make_inputs(gate, (1, 2, 2, 2, 3, 1, 2))
    tensors = [t.requires_grad_() for t in (qkv, key_bias, row_gate) if t is not None]

    def function(*given: Tensor) -> Tensor:
        biases = dict(zip(("key_bias", "row_gate"), given[1:]))
        return alternating_attention(given[0], axis, **biases)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_low_precision_gradients() -> None:
    qkv, key_bias, row_gate = make_inputs("a gate a row", (1, 2, 2, 33, 3, 2, 32))
    assert key_bias is not None and row_gate is not None
    grad = torch.randn(1, 2, 2, 33, 64, dtype=F64)
    exact_inputs = [
        t.requires_grad_() for t in (qkv.bfloat16().double(), key_bias.float().double(), row_gate.float().double())
    ]
    exact = torch.autograd.grad(
        reference.alternating_attention(exact_inputs[0], "view", key_bias=exact_inputs[1], row_gate=exact_inputs[2]),
        exact_inputs,
        grad.bfloat16().double(),
    )
    for dtype in (F32, BF16):
        inputs = [qkv.bfloat16().to(dtype), key_bias.float(), row_gate.float()]
        inputs = [t.detach().requires_grad_() for t in inputs]
        out = alternating_attention(inputs[0], "view", key_bias=inputs[1], row_gate=inputs[2])
        got = torch.autograd.grad(out, inputs, grad.bfloat16().to(dtype))
        for name, a, b, t in zip(("qkv", "key_bias", "row_gate"), got, exact, inputs, strict=True):
            assert a.dtype == t.dtype
            assert_accurate(name, a, b, dtype)


@pytest.mark.parametrize("gate", ["no bias", "a gate a token", "a gate a row"])
def test_opcheck(gate: str) -> None:
    qkv, key_bias, row_gate = make_inputs(gate, (1, 2, 2, 3, 3, 2, 8))
    tensors = [None if t is None else t.float().requires_grad_() for t in (qkv, key_bias, row_gate)]
    arguments = (tensors[0], "time", *tensors[1:], None)
    torch.library.opcheck(torch.ops.vggt_mv.alternating_attention.default, arguments)
    wanted = [True, key_bias is not None, False]
    plain = [None if t is None else t.detach() for t in tensors]
    saved = torch.ops.vggt_mv.alternating_attention(plain[0], "time", *plain[1:], 0.5)
    arguments = (torch.randn(1, 2, 2, 3, 16), plain[0], "time", *plain[1:], 0.5, *saved, wanted)
    torch.library.opcheck(torch.ops.vggt_mv.alternating_attention_backward.default, arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_block_compiles_without_a_graph_break(compiler: str) -> None:
    """The operators of a block in one graph, forward and backward."""
    x, width = torch.randn(1, 2, 2, 5, 16, requires_grad=True), 8
    parameters = [torch.randn(16, requires_grad=True) for _ in range(3)]
    norm = (torch.ones(width, requires_grad=True), torch.zeros(width, requires_grad=True))
    key_bias = torch.randn(1, 2, 2, 5, requires_grad=True)

    def block(x: Tensor, key_bias: Tensor, *parameters: Tensor) -> Tensor:
        qkv = torch.cat((x, x.sin(), x.cos()), dim=-1).view(1, 2, 2, 5, 3, 2, width)
        qkv = qk_norm_rope(qkv, norm, norm, (2, 2), 1)
        y = alternating_attention(qkv, "view", key_bias=key_bias)
        residual, normed = residual_scale_norm(x, y, *parameters)
        return (residual * normed).sum()

    inputs = [x, key_bias, *parameters]
    compiled = torch.compile(block, backend=compiler, fullgraph=True)
    got, want = (torch.autograd.grad(f(*inputs), [*inputs, *norm]) for f in (compiled, block))
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_accurate(f"gradient {index}", a, b.double(), F32)


@pytest.mark.parametrize("dtype", [F32, F16, F64], ids=["f32", "f16", "f64"])
def test_autocast(dtype: torch.dtype) -> None:
    qkv, key_bias, _ = make_inputs("bias")
    assert key_bias is not None
    qkv = qkv.to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = alternating_attention(qkv, "time", key_bias=key_bias.to(dtype if dtype == F64 else F16))
    expected = F64 if dtype == F64 else BF16
    assert out.dtype == expected
    exact = reference.alternating_attention(qkv.detach().double(), "time", key_bias=key_bias)
    assert_accurate("out", out.detach(), exact, expected)
    out.sum().backward()
    assert qkv.grad is not None and qkv.grad.dtype == dtype


QKV, BIAS = torch.zeros(1, 2, 2, 5, 3, 1, 8), torch.zeros(1, 2, 2, 5)
ERRORS = [
    (
        (QKV[0], "view"),
        {},
        ValueError,
        r"alternating_attention: qkv must have shape \[B, T, N, P, 3, h, D\] .* got \[2, 2",
    ),
    ((QKV.int(), "view"), {}, TypeError, "qkv must have one of the dtypes .*; got int32"),
    ((QKV, "views"), {}, ValueError, "axis must be one of frame, view, time, global; got 'views'"),
    ((QKV, "view"), {"scale": 0.0}, ValueError, "scale must be above 0 and finite, got 0.0"),
    ((QKV, "view"), {"row_gate": BIAS}, ValueError, "row_gate must come with a key_bias, got row_gate alone"),
    ((QKV, "view"), {"key_bias": 1.0}, TypeError, "key_bias must be a torch.Tensor, got float"),
    (
        (QKV, "view"),
        {"key_bias": BIAS[..., :4]},
        ValueError,
        r"key_bias must have shape \[B, T, N, P\] = \[1, 2, 2, 5\], got",
    ),
    (
        (QKV, "view"),
        {"key_bias": BIAS.half()},
        TypeError,
        r"key_bias must be float32 with a qkv float32 .*; got float16",
    ),
    (
        (QKV.double(), "view"),
        {"key_bias": BIAS},
        TypeError,
        r"key_bias must be float64 with a qkv float64 .*; got float32",
    ),
    (
        (QKV, "view"),
        {"key_bias": BIAS.to("meta")},
        ValueError,
        "key_bias must be on the device of qkv, cpu; it is on meta",
    ),
    (
        (QKV, "view"),
        {"key_bias": BIAS, "row_gate": BIAS[0, 0, 0, :4]},
        ValueError,
        r"row_gate must have shape \[P\] or \[B, T, N, P\], here \[P\] = \[5\], got \[4\]",
    ),
    (
        (QKV, "view"),
        {"key_bias": BIAS, "row_gate": BIAS[0]},
        ValueError,
        r"row_gate must have shape \[P\] or \[B, T, N, P\], here \[B, T, N, P\] = \[1, 2, 2, 5\], got \[2, 2, 5\]",
    ),
]


@pytest.mark.parametrize(("arguments", "options", "error", "text"), ERRORS, ids=[text[:48] for *_, text in ERRORS])
def test_errors_name_argument_rule_and_value(arguments, options, error, text) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=text):
        alternating_attention(*arguments, **options)


@needs_kernel
def test_choice_of_backend() -> None:
    assert vggt_mv_ext.explain(alternating_attention, QKV).backend == "cpu"
    explanation = vggt_mv_ext.explain(alternating_attention, QKV.double())
    assert explanation.backend == "reference"
    assert explanation.passed_over["cpu"] == "float64 runs on the reference alone"
    assert vggt_mv_ext.explain(alternating_attention, QKV[:0]).passed_over["cpu"] == "an empty tensor needs no kernel"


# --- The CPU kernel. A tile has 6 or 8 rows and 8, 16 or 32 columns, a strip 24 or 32 rows, a block 256 keys.

AXIS_LENGTHS = [("frame", (2, 1, 1)), ("view", (1, 2, 3)), ("time", (1, 3, 2)), ("global", (2, 1, 3))]
TOKENS = (1, 5, 6, 7, 8, 9, 15, 16, 17, 23, 24, 25, 85, 86, 255, 256, 257)


def kernel_inputs(
    sizes: tuple[int, ...], tokens: int, heads: int, width: int, bias: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """float64 inputs that float32 holds exactly."""
    qkv = torch.randn(*sizes, tokens, 3, heads, width)
    biases = {"key_bias": -2 * torch.rand(*sizes, tokens), "row_gate": torch.rand(*sizes, tokens)} if bias else {}
    return qkv.double(), {name: tensor.double() for name, tensor in biases.items()}


def run_kernel(qkv: Tensor, axis: str, biases: dict[str, Tensor], dtype: torch.dtype = F32) -> Tensor:
    with vggt_mv_ext.backend("cpu"):
        return alternating_attention(qkv.to(dtype), axis, **{name: t.float() for name, t in biases.items()})


@every_isa
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("axis", "sizes"), AXIS_LENGTHS)
@pytest.mark.usefixtures("poisoned")
def test_kernel_at_every_length(isa: str, axis: str, sizes: tuple[int, ...], bias: bool) -> None:
    for tokens in TOKENS:
        qkv, biases = kernel_inputs(sizes, tokens, 2, 20, bias)
        exact = reference.alternating_attention(qkv, axis, **biases)
        error = (run_kernel(qkv, axis, biases) - exact).norm() / exact.norm()
        assert error < 5e-7, f"{tokens} tokens: {error:.2e}"  # measured: up to 3e-7


@every_isa
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("width", [1, 4, 15, 16, 17, 31, 32, 33, 64, 96, 128])
@pytest.mark.usefixtures("poisoned")
def test_kernel_at_every_width(isa: str, width: int, dtype: torch.dtype) -> None:
    qkv, biases = kernel_inputs((1, 2, 2), 37, 3, width, bias=True)
    qkv = qkv.to(dtype).double()
    exact = reference.alternating_attention(qkv, "view", **biases)
    eager = reference.alternating_attention(qkv.to(dtype), "view", **{name: t.float() for name, t in biases.items()})
    assert_accurate("out", run_kernel(qkv, "view", biases, dtype), exact, dtype, eager)


@every_isa
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_kernel_at_a_real_length(isa: str, threads: int) -> None:
    qkv, biases = kernel_inputs((1, 1, 1), 1041, 2, 64, bias=True)
    torch.set_num_threads(threads)
    got = run_kernel(qkv, "frame", biases)
    exact = reference.alternating_attention(qkv, "frame", **biases)
    assert (got - exact).norm() / exact.norm() < 5e-7
    torch.set_num_threads(1)
    assert torch.equal(got, run_kernel(qkv, "frame", biases))


@every_isa
@every_axis
def test_kernel_reads_strides_and_nothing_beside(isa: str, axis: str) -> None:
    qkv, biases = kernel_inputs((2, 2, 3), 19, 2, 21, bias=True)
    want = run_kernel(qkv, axis, biases)
    strided = torch.full((2, 3, 19, 2, 3, 2, 29), float("nan")).permute(0, 3, 1, 2, 4, 5, 6)[..., 3:24]
    strided.copy_(qkv)
    gate = torch.full((19, 2), float("nan"))
    gate[:, 0] = biases["row_gate"][0, 0, 0]
    with vggt_mv_ext.backend("cpu"):
        got = alternating_attention(strided, axis, key_bias=biases["key_bias"].float())
        gated = alternating_attention(strided, axis, key_bias=biases["key_bias"].float(), row_gate=gate[:, 0])
    assert torch.equal(got, run_kernel(qkv, axis, {"key_bias": biases["key_bias"]}))
    expanded = biases["row_gate"][:1, :1, :1].expand(2, 2, 3, 19)
    assert torch.equal(gated, run_kernel(qkv, axis, {**biases, "row_gate": expanded}))
    assert want.isfinite().all() and not torch.equal(got, want)


@every_isa
def test_kernel_keeps_nan_where_it_belongs(isa: str) -> None:
    """A query's NaN stays in its row and head, a key's or value's in its sequence and head."""
    clean, _ = kernel_inputs((1, 2, 2), 67, 2, 32, bias=False)
    want = run_kernel(clean, "frame", {})
    for part in range(3):
        qkv = clean.clone()
        qkv[0, 1, 0, 66, part, 1, 5] = torch.nan
        got = run_kernel(qkv, "frame", {})
        expected = torch.zeros_like(got, dtype=torch.bool).view(1, 2, 2, 67, 2, 32)
        if part == 0:
            expected[0, 1, 0, 66, 1] = True
        elif part == 1:
            expected[0, 1, 0, :, 1] = True
        else:
            expected[0, 1, 0, :, 1, 5] = True
        expected = expected.view_as(got)
        assert torch.equal(got.isnan(), expected)
        assert torch.equal(got[~expected], want[~expected])


@every_isa
@pytest.mark.parametrize("first", [0, 200], ids=["the first keys", "the last keys"])
def test_kernel_shuts_keys_out(isa: str, first: int) -> None:
    qkv, _ = kernel_inputs((1, 1, 1), 600, 1, 16, bias=False)
    key_bias = torch.zeros(1, 1, 1, 600)
    key_bias[..., first : first + 400] = -torch.inf
    got = run_kernel(qkv, "frame", {"key_bias": key_bias})
    kept = torch.cat((qkv[:, :, :, :first], qkv[:, :, :, first + 400 :]), dim=3)
    logits = qkv[0, 0, 0, :, 0, 0] @ kept[0, 0, 0, :, 1, 0].T / 4
    exact = torch.softmax(logits, dim=1) @ kept[0, 0, 0, :, 2, 0]
    assert (got[0, 0, 0] - exact).norm() / exact.norm() < 5e-7
    nothing_left = run_kernel(qkv, "frame", {"key_bias": torch.full_like(key_bias, -torch.inf)})
    assert nothing_left.isnan().all()
    zero_times_infinity = run_kernel(qkv, "frame", {"key_bias": key_bias, "row_gate": torch.zeros_like(key_bias)})
    assert zero_times_infinity.isnan().all()


@every_isa
def test_kernel_with_large_scores(isa: str) -> None:
    """Scores of some thousands: exp of one would overflow, and all but a few are far below the smallest float."""
    qkv, _ = kernel_inputs((1, 1, 1), 300, 1, 64, bias=False)
    qkv[..., :2, :, :] *= 15
    exact = reference.alternating_attention(qkv, "frame")
    eager = reference.alternating_attention(qkv.float(), "frame")
    # Without a fused multiply-add every product is rounded, which shows here alone.
    assert_accurate("out", run_kernel(qkv, "frame", {}), exact, F32, None if isa == "portable" else eager)


@every_isa
def test_kernel_exponential(isa: str) -> None:
    """Two keys with values 0 and 1 and logits 0 and -x show exp(-x) / (1 + exp(-x)), over the range of exp."""
    x = torch.linspace(0, 86, 20011, dtype=F64).float()
    qkv = torch.zeros(20011, 1, 1, 2, 3, 1, 1)
    qkv[:, 0, 0, 1, 2] = 1.0
    key_bias = torch.stack((torch.zeros_like(x), -x), dim=1)[:, None, None]
    got = run_kernel(qkv, "frame", {"key_bias": key_bias})[:, 0, 0, 0, 0]
    exact = torch.sigmoid(-x.double())
    bound = 3.5e-7 + 1.4e-8 * x.double()  # the exponential's, and the roundings of sum and quotient
    assert (((got - exact) / exact).abs() <= bound).all()


@every_isa
@every_axis
def test_kernel_lse(isa: str, axis: str) -> None:
    qkv, biases = kernel_inputs((1, 2, 3), 29, 2, 16, bias=True)
    with vggt_mv_ext.backend("cpu"):
        arguments = (qkv.float(), axis, *(t.float() for t in biases.values()), None)
        _, lse = torch.ops.vggt_mv.alternating_attention(*arguments)
    for sequence, members in enumerate(sequences(axis, 1, 2, 3, 29)):
        index = tuple(torch.tensor(members).T)
        q, k, _ = qkv[index].permute(1, 2, 0, 3)
        exact = (q @ k.mT / 4 + biases["row_gate"][index][:, None] * biases["key_bias"][index]).logsumexp(-1)
        assert (lse[sequence] - exact).abs().max() < 2e-6


def gradients(
    function,
    qkv: Tensor,
    axis: str,
    biases: dict[str, Tensor],
    grad: Tensor,
    dtype: torch.dtype,  # type: ignore[no-untyped-def]
) -> list[Tensor]:
    wide = F64 if dtype == F64 else F32
    inputs = [qkv.detach().to(dtype), *(t.detach().to(wide) for t in biases.values())]
    inputs = [(t.clone() if t.is_contiguous() else t).requires_grad_() for t in inputs]
    out = function(inputs[0], axis, **dict(zip(biases, inputs[1:])))
    return list(torch.autograd.grad(out, inputs, grad.to(dtype)))


def assert_kernel_gradients(
    qkv: Tensor, axis: str, biases: dict[str, Tensor], dtype: torch.dtype = F32, label: str = ""
) -> None:
    qkv = qkv.to(dtype).double()
    grad = torch.randn(*qkv.shape[:4], qkv.shape[5] * qkv.shape[6]).to(dtype).double()
    with vggt_mv_ext.backend("cpu"):
        got = gradients(alternating_attention, qkv, axis, biases, grad, dtype)
    exact = gradients(reference.alternating_attention, qkv, axis, biases, grad, F64)
    for name, a, b in zip(("qkv", *biases), got, exact, strict=True):
        assert a.isfinite().all(), f"{label} {name}"
        error = ((a - b).norm() / b.norm()).item()
        # A bias's gradient is a difference, in which the rounding of `out` to 8 or 11 bits shows more.
        tolerance = {F32: 2e-6, F16: 2e-3, BF16: 1e-2}[dtype] * (1 if name == "qkv" or dtype == F32 else 4)
        assert error < tolerance, f"{label} {name}: relative error {error:.2e}"


@every_isa
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("axis", "sizes"), AXIS_LENGTHS)
@pytest.mark.usefixtures("poisoned")
def test_kernel_gradients_at_every_length(isa: str, axis: str, sizes: tuple[int, ...], bias: bool) -> None:
    torch.set_num_threads(1)
    for tokens in (2, 5, 6, 7, 8, 9, 23, 25, 71, 72, 73, 143, 144, 145, 161):
        assert_kernel_gradients(*with_axis(kernel_inputs(sizes, tokens, 2, 20, bias), axis), label=f"{tokens} tokens")


def with_axis(inputs: tuple[Tensor, dict[str, Tensor]], axis: str) -> tuple[Tensor, str, dict[str, Tensor]]:
    return inputs[0], axis, inputs[1]


@every_isa
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["f32", "f16", "bf16"])
@pytest.mark.usefixtures("poisoned")
def test_kernel_gradients_at_every_width(isa: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    for width in (1, 4, 15, 16, 17, 31, 32, 33, 64, 96, 128):
        inputs = with_axis(kernel_inputs((1, 2, 2), 37, 3, width, bias=True), "view")
        assert_kernel_gradients(*inputs, dtype, label=f"D = {width}")


@every_isa
def test_kernel_gradients_of_one_token_are_zero(isa: str) -> None:
    """One key: its probability is 1 whatever q, k and bias are; grad_v is grad_out."""
    qkv, biases = kernel_inputs((1, 1, 1), 1, 2, 16, bias=True)
    grad = torch.randn(1, 1, 1, 1, 32)
    grad_qkv, *of_biases = gradients(alternating_attention, qkv, "frame", biases, grad, F32)
    assert torch.equal(grad_qkv[..., 2, :, :].flatten(4), grad)
    assert grad_qkv[..., :2, :, :].abs().max() < 1e-5 and max(t.abs().max() for t in of_biases) < 1e-5


@every_isa
@every_axis
def test_kernel_gradients_read_strides_and_nothing_beside(isa: str, axis: str) -> None:
    qkv, biases = kernel_inputs((2, 2, 3), 19, 2, 21, bias=True)
    biases["row_gate"] = biases["row_gate"][0, 0, 0]
    strided = torch.full((2, 3, 19, 2, 3, 2, 29), float("nan")).permute(0, 3, 1, 2, 4, 5, 6)[..., 3:24]
    strided.copy_(qkv)
    grad = torch.randn(2, 2, 3, 19, 42)
    spread = torch.full((2, 2, 3, 19, 42, 2), float("nan"))[..., 0].copy_(grad)
    want = gradients(alternating_attention, qkv, axis, biases, grad, F32)
    got = gradients(alternating_attention, strided, axis, biases, spread, F32)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    exact = gradients(reference.alternating_attention, qkv, axis, biases, grad, F64)
    assert (want[2] - exact[2]).norm() / exact[2].norm() < 2e-6


@needs_kernel
def test_gradients_at_a_real_length_whatever_the_threads() -> None:
    qkv, biases = kernel_inputs((1, 1, 1), 1041, 3, 64, bias=True)
    grad = torch.randn(1, 1, 1, 1041, 192)
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(gradients(alternating_attention, qkv, "frame", biases, grad, F32))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
    exact = gradients(reference.alternating_attention, qkv, "frame", biases, grad, F64)
    for a, b in zip(runs[0], exact, strict=True):
        assert (a - b).norm() / b.norm() < 2e-6


@every_isa
def test_kernel_gradients_with_keys_shut_out(isa: str) -> None:
    qkv, biases = kernel_inputs((1, 1, 2), 90, 2, 16, bias=True)
    biases = {"key_bias": biases["key_bias"]}
    biases["key_bias"][..., 20:60] = -torch.inf
    grad = torch.randn(1, 1, 2, 90, 32)
    got = gradients(alternating_attention, qkv, "frame", biases, grad, F32)
    assert not got[0][:, :, :, 20:60, 1:].any() and not got[1][..., 20:60].any()
    kept = [i for i in range(90) if not 20 <= i < 60]
    shorter = {"key_bias": biases["key_bias"][..., kept]}
    # Queries that are shut out as keys still ask; leave them out of the comparison by a zero gradient.
    grad[..., 20:60, :] = 0
    got = gradients(alternating_attention, qkv, "frame", biases, grad, F32)
    exact = gradients(reference.alternating_attention, qkv[:, :, :, kept], "frame", shorter, grad[:, :, :, kept], F64)
    assert (got[0][:, :, :, kept] - exact[0]).norm() / exact[0].norm() < 2e-6
    assert (got[1][..., kept] - exact[1]).norm() / exact[1].norm() < 2e-6


@needs_kernel
def test_backward_by_the_kernel_after_forward_by_the_reference() -> None:
    qkv, biases = kernel_inputs((1, 1, 1), 33, 2, 16, bias=False)
    inputs = qkv.float().requires_grad_()
    grad = torch.randn(1, 1, 1, 33, 32)
    with vggt_mv_ext.backend("reference"):
        out = alternating_attention(inputs, "frame")
    with vggt_mv_ext.backend("cpu"):
        (got,) = torch.autograd.grad(out, inputs, grad)
    (exact,) = gradients(reference.alternating_attention, qkv, "frame", biases, grad, F64)
    assert (got - exact).norm() / exact.norm() < 2e-6
