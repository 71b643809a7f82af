"""qk_norm_rope against a loop over tokens, heads and features in float64, and the rules around it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from ops_support import ISAS, assert_accurate
from torch import Tensor

import vggt_mv_ext
from vggt_mv_ext import qk_norm_rope, reference
from vggt_mv_ext._extension import extension
from vggt_mv_ext.ops.qk_norm_rope import OPERATOR

every_isa = pytest.mark.parametrize("isa", ISAS, indirect=True)
needs_kernel = pytest.mark.skipif(extension is None, reason="this build has no compiled kernels")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
Norm = tuple[Tensor, Tensor] | None


def make_inputs(
    grid_hw: tuple[int, int], num_special: int, *, heads: int = 2, width: int = 8, dtype: torch.dtype = F64
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    tokens = num_special + grid_hw[0] * grid_hw[1]
    qkv = torch.randn(1, 2, 3, tokens, 3, heads, width).to(dtype)
    q_norm, k_norm = ((torch.randn(width).to(dtype), torch.randn(width).to(dtype)) for _ in range(2))
    return qkv, q_norm, k_norm


def token_position(index: int, grid_hw: tuple[int, int], num_special: int, special_position: int) -> tuple[int, int]:
    if index < num_special:
        return special_position, special_position
    return (index - num_special) // grid_hw[1] + 1, (index - num_special) % grid_hw[1] + 1


def turned(vector: list[float], position: int, base: float) -> list[float]:
    half = len(vector) // 2
    result = [0.0] * len(vector)
    for j in range(half):
        angle = position * base ** (-2 * j / len(vector))
        a, b = vector[j], vector[j + half]
        result[j] = a * math.cos(angle) - b * math.sin(angle)
        result[j + half] = b * math.cos(angle) + a * math.sin(angle)
    return result


def naive(
    qkv: Tensor, q_norm: Norm, k_norm: Norm, grid_hw: tuple[int, int], num_special: int, base: float, special: int
) -> Tensor:
    out = qkv.clone()
    batch, times, views, tokens, _, heads, width = qkv.shape
    for b, t, n, p, h in itertools.product(*map(range, (batch, times, views, tokens, heads))):
        row, column = token_position(p, grid_hw, num_special, special)
        for which, norm in enumerate((q_norm, k_norm)):
            vector = qkv[b, t, n, p, which, h]
            if norm is not None:
                vector = F.layer_norm(vector, (width,), norm[0], norm[1], 1e-5)
            values = vector.tolist()
            turned_values = turned(values[: width // 2], row, base) + turned(values[width // 2 :], column, base)
            out[b, t, n, p, which, h] = torch.tensor(turned_values, dtype=qkv.dtype)
    return out


CASES = {
    "one special token alone": ((0, 0), 1),
    "one patch": ((1, 1), 0),
    "2x3 patches after 5 special": ((2, 3), 5),
    "3x1 patches after 1 special": ((3, 1), 1),
}


@pytest.mark.parametrize(("grid_hw", "num_special"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("norms", ["both", "q alone", "k alone", "none"])
def test_against_loops(grid_hw: tuple[int, int], num_special: int, norms: str) -> None:
    qkv, q_norm, k_norm = make_inputs(grid_hw, num_special)
    chosen = (q_norm if norms in ("both", "q alone") else None, k_norm if norms in ("both", "k alone") else None)
    got = qk_norm_rope(qkv, *chosen, grid_hw, num_special)
    assert_accurate("qkv", got, naive(qkv, *chosen, grid_hw, num_special, 100.0, 0), F64)
    assert torch.equal(got[..., 2, :, :], qkv[..., 2, :, :])


@pytest.mark.parametrize("special_position", [1, 3])
@pytest.mark.parametrize("base", [100.0, 10000.0])
def test_special_position_and_base(special_position: int, base: float) -> None:
    qkv, q_norm, k_norm = make_inputs((2, 2), 2, width=12)
    got = qk_norm_rope(qkv, q_norm, k_norm, (2, 2), 2, base, special_position=special_position)
    assert_accurate("qkv", got, naive(qkv, q_norm, k_norm, (2, 2), 2, base, special_position), F64)


def test_a_product_depends_on_the_difference_of_positions() -> None:
    """What rotary embedding is for: q at (r, c) times k at (r', c') is a function of (r - r', c - c')."""
    qkv = torch.randn(1, 1, 1, 1, 3, 1, 16, dtype=F64).expand(1, 1, 1, 25, 3, 1, 16)
    out = qk_norm_rope(qkv, None, None, (5, 5), 0)[0, 0, 0, :, :, 0]
    q, k = out[:, 0].view(5, 5, 16), out[:, 1].view(5, 5, 16)
    first = (q[0, 0] * k[2, 1]).sum()
    assert torch.allclose(first, (q[2, 3] * k[4, 4]).sum(), atol=1e-12)
    assert not torch.allclose(first, (q[0, 0] * k[1, 2]).sum(), atol=1e-3)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("wide_norms", [False, True], ids=["norms as qkv", "norms in f32"])
@pytest.mark.usefixtures("poisoned")
def test_low_precision_at_real_size(dtype: torch.dtype, wide_norms: bool) -> None:
    qkv, q_norm, k_norm = make_inputs((37, 37), 5, width=64, dtype=dtype)
    qkv = qkv[:, :1, :2]
    if wide_norms:
        q_norm, k_norm = (tuple(t.float() for t in norm) for norm in (q_norm, k_norm))  # type: ignore[assignment]
    got = qk_norm_rope(qkv, q_norm, k_norm, (37, 37), 5)
    exact = reference.qk_norm_rope(
        qkv.double(), *(tuple(t.double() for t in norm) for norm in (q_norm, k_norm)), (37, 37), 5
    )
    assert got.dtype == dtype and got.is_contiguous()
    assert_accurate("qkv", got, exact, dtype)


def test_strided_input_is_left_alone() -> None:
    qkv, q_norm, k_norm = make_inputs((2, 3), 1)
    strided = torch.full((*qkv.shape[:-1], 11), float("nan"), dtype=F64)[..., 1:9].copy_(qkv)
    before = strided.clone()
    got = qk_norm_rope(strided, q_norm, k_norm, (2, 3), 1)
    assert torch.equal(got, qk_norm_rope(qkv, q_norm, k_norm, (2, 3), 1))
    assert torch.equal(strided, before)


def test_gradients_in_float64() -> None:
    qkv, q_norm, k_norm = make_inputs((1, 2), 1, heads=1, width=4)
    tensors = [t.requires_grad_() for t in (qkv[:, :1, :1].clone(), *q_norm, *k_norm)]

    def both(qkv: Tensor, *norms: Tensor) -> Tensor:
        return qk_norm_rope(qkv, (norms[0], norms[1]), (norms[2], norms[3]), (1, 2), 1)

    def shared(qkv: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # one norm given twice: its gradients add up
        return qk_norm_rope(qkv, (weight, bias), (weight, bias), (1, 2), 1)

    assert torch.autograd.gradcheck(both, tensors)
    assert torch.autograd.gradcheck(shared, tensors[:3], fast_mode=True)
    assert torch.autograd.gradgradcheck(both, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(shared, tensors[:3], fast_mode=True)
    assert torch.autograd.gradcheck(lambda qkv: qk_norm_rope(qkv, None, None, (1, 2), 1), tensors[:1], fast_mode=True)


@pytest.mark.parametrize("norms", ["both", "none"])
def test_opcheck(norms: str) -> None:
    qkv, q_norm, k_norm = make_inputs((2, 2), 1, dtype=F32)
    tensors = [qkv.requires_grad_(), *(t.requires_grad_() if norms == "both" else None for t in (*q_norm, *k_norm))]
    numbers = (2, 2, 1, 100.0, 1e-5, 0)
    torch.library.opcheck(torch.ops.vggt_mv.qk_norm_rope.default, (*tensors, *numbers))
    plain = [t if t is None else t.detach() for t in tensors]
    wanted = [True, norms == "both", False, norms == "both", False]
    arguments = (torch.randn_like(qkv).detach(), *plain, *numbers, wanted)
    torch.library.opcheck(torch.ops.vggt_mv.qk_norm_rope_backward.default, arguments)


def test_compiles_without_a_graph_break() -> None:
    qkv, q_norm, k_norm = make_inputs((2, 2), 1, dtype=F32)
    tensors = [t.requires_grad_() for t in (qkv, *q_norm, *k_norm)]

    def function(qkv: Tensor, *norms: Tensor) -> Tensor:
        return qk_norm_rope(qkv, (norms[0], norms[1]), (norms[2], norms[3]), (2, 2), 1).square().sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    got, want = (torch.autograd.grad(f(*tensors), tensors) for f in (compiled, function))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_autocast_leaves_the_dtype_alone() -> None:
    qkv, q_norm, k_norm = make_inputs((2, 2), 1, dtype=F32)
    want = qk_norm_rope(qkv, q_norm, k_norm, (2, 2), 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(qk_norm_rope(qkv, q_norm, k_norm, (2, 2), 1), want)
        mixed = qk_norm_rope(qkv, tuple(t.bfloat16() for t in q_norm), k_norm, (2, 2), 1)  # type: ignore[arg-type]
        assert mixed.dtype == F32
        assert qk_norm_rope(qkv.bfloat16(), q_norm, k_norm, (2, 2), 1).dtype == BF16


QKV, NORM = torch.zeros(1, 1, 1, 5, 3, 1, 8), (torch.ones(8), torch.zeros(8))
ERRORS = [
    (([], None, None, (2, 2), 1), TypeError, "qk_norm_rope: qkv must be a torch.Tensor, got list"),
    ((QKV.long(), None, None, (2, 2), 1), TypeError, "qkv must have one of the dtypes .*; got int64"),
    (
        (QKV[0], None, None, (2, 2), 1),
        ValueError,
        r"qkv must have shape \[B, T, N, P, 3, h, D\] with h, D >= 1, got \[",
    ),
    ((QKV[..., :2, :, :], None, None, (2, 2), 1), ValueError, r"qkv must have shape .* got \[1, 1, 1, 5, 2, 1, 8\]"),
    ((QKV[..., :6], None, None, (2, 2), 1), ValueError, "head width D that is a multiple of 4, got D = 6"),
    ((QKV, None, None, (2, 2), 2), ValueError, r"P = num_special \+ height \* width = 2 \+ 2 \* 2 = 6 .*got P = 5"),
    ((QKV, None, None, (-2, -2), 1), ValueError, "grid_hw must have a height of at least 0, got -2"),
    ((QKV, None, None, 4, 1), TypeError, r"grid_hw must be a pair \(height, width\) of integers, got 4"),
    ((QKV, None, None, (2, 3), -1), ValueError, "num_special must be at least 0, got -1"),
    (
        (QKV, NORM[0], None, (2, 2), 1),
        TypeError,
        r"q_norm must be a pair \(weight, bias\) of tensors or None, got Tensor",
    ),
    ((QKV, None, (NORM[0], None), (2, 2), 1), TypeError, "k_norm bias must be a torch.Tensor, got NoneType"),
    (
        (QKV, None, (NORM[0][:4], NORM[1]), (2, 2), 1),
        ValueError,
        r"k_norm weight must have shape \[D\] = \[8\], got \[4\]",
    ),
    (
        (QKV, (NORM[0].half(), NORM[1]), None, (2, 2), 1),
        TypeError,
        "q_norm weight must have the dtype of qkv or float32",
    ),
    (
        (QKV, (NORM[0].to("meta"), NORM[1]), None, (2, 2), 1),
        ValueError,
        "q_norm weight must be on the device of qkv, cpu",
    ),
    ((QKV, None, None, (2, 2), 1, 0.0), ValueError, "base must be above 0 and finite, got 0.0"),
    ((QKV, None, None, (2, 2), 1, 100.0, -1.0), ValueError, "eps must be at least 0, got -1.0"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), ERRORS, ids=[text[:48] for _, _, text in ERRORS])
def test_errors_name_argument_rule_and_value(arguments: tuple, error: type[Exception], text: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(error, match=text):
        qk_norm_rope(*arguments)


def test_negative_special_position() -> None:
    with pytest.raises(ValueError, match="qk_norm_rope: special_position must be at least 0, got -1"):
        qk_norm_rope(QKV, None, None, (2, 2), 1, special_position=-1)


@needs_kernel
def test_choice_of_backend() -> None:
    assert vggt_mv_ext.explain(qk_norm_rope, QKV).backend == "cpu"
    explanation = vggt_mv_ext.explain(qk_norm_rope, QKV.double())
    assert explanation.backend == "reference"
    assert explanation.passed_over["cpu"] == "float64 runs on the reference alone"
    assert vggt_mv_ext.explain(qk_norm_rope, QKV[:0]).passed_over["cpu"] == "an empty tensor needs no kernel"


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_the_cuda_kernel_takes(width: int, dtype: torch.dtype) -> None:
    assert OPERATOR.limits["cuda"](torch.empty(1, 1, 1, 2, 3, 1, width, dtype=dtype)) is None


@pytest.mark.parametrize(
    ("dtype", "shape", "reason"),
    [
        (F64, (1, 1, 1, 2, 3, 1, 64), "float64 runs on the reference alone"),
        (F16, (1, 1, 1, 2, 3, 1, 48), "D must be 32, 64, 96 or 128, got 48"),
        (BF16, (1, 1, 0, 2, 3, 1, 64), "an empty tensor needs no kernel"),
    ],
    ids=["float64", "width", "empty"],
)
def test_the_cuda_kernel_passes_over(dtype: torch.dtype, shape: tuple[int, ...], reason: str) -> None:
    assert OPERATOR.limits["cuda"](torch.empty(shape, dtype=dtype)) == reason


# --- The CPU kernel.

Norms = tuple[Norm, Norm]


def run_both(
    qkv: Tensor, norms: Norms, dtype: torch.dtype, norm_dtype: torch.dtype, grad: Tensor | None
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The result, then gradients: by the kernel, by the float64 reference, and by the reference in the same dtypes."""

    def run(function, backend: str, dtype: torch.dtype, norm_dtype: torch.dtype) -> list[Tensor]:  # type: ignore[no-untyped-def]
        given = [qkv.to(dtype), *(None if norm is None else t.to(norm_dtype) for norm in norms for t in norm or (0, 0))]
        given = [None if t is None else t.detach().clone().requires_grad_(grad is not None) for t in given]
        pairs = [None if a is None else (a, b) for a, b in zip(given[1::2], given[2::2], strict=True)]
        with vggt_mv_ext.backend(backend):
            out = function(given[0], *pairs, (3, 5), 2, special_position=1)
            if grad is None:
                return [out]
            wanted = [t for t in given if t is not None]
            return [out.detach(), *torch.autograd.grad(out, wanted, grad.to(dtype))]

    qkv = qkv.to(dtype).double()
    norms = tuple(None if norm is None else tuple(t.to(norm_dtype).double() for t in norm) for norm in norms)  # type: ignore[assignment]
    grad = None if grad is None else grad.to(dtype).double()
    return (
        run(qk_norm_rope, "cpu", dtype, norm_dtype),
        run(reference.qk_norm_rope, "reference", F64, F64),
        run(reference.qk_norm_rope, "reference", dtype, norm_dtype),
    )


DTYPES = {"f32": (F32, F32), "f16": (F16, F16), "bf16": (BF16, BF16), "f16+f32": (F16, F32), "bf16+f32": (BF16, F32)}


@every_isa
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.usefixtures("poisoned")
def test_kernel_at_every_width(isa: str, dtypes: tuple[torch.dtype, torch.dtype], gradients: bool) -> None:
    torch.set_num_threads(1)
    for width, which in itertools.product((4, 8, 12, 32, 60, 64, 96, 128, 132), ("both", "k alone", "none")):
        qkv, q_norm, k_norm = make_inputs((3, 5), 2, heads=3, width=width)
        qkv = qkv[:, :1]
        grad = torch.randn_like(qkv) if gradients else None
        norms = (q_norm if which == "both" else None, k_norm if which != "none" else None)
        results = run_both(qkv, norms, *dtypes, grad)
        for index, (got, exact, eager) in enumerate(zip(*results, strict=True)):
            assert got.dtype == dtypes[0] if index < 2 else dtypes[1]
            assert_accurate(f"{index}", got, exact, dtypes[0], eager if index < 2 else None)
        assert torch.equal(results[0][0][..., 2, :, :], qkv[..., 2, :, :].to(dtypes[0]))


@every_isa
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["f32", "f16", "bf16"])
def test_kernel_in_place(isa: str, dtype: torch.dtype) -> None:
    qkv, q_norm, k_norm = make_inputs((3, 5), 2, heads=3, width=20, dtype=dtype)
    want = qk_norm_rope(qkv, q_norm, k_norm, (3, 5), 2)
    buffer = torch.full((*qkv.shape[:-1], 29), 7.0, dtype=dtype)
    for given in (qkv.clone(), buffer[..., 4:24].copy_(qkv)):
        got = qk_norm_rope(given, q_norm, k_norm, (3, 5), 2, inplace=True)
        assert got is given and torch.equal(got, want)
    assert (buffer[..., :4] == 7).all() and (buffer[..., 24:] == 7).all()


@needs_kernel
def test_in_place_only_where_it_harms_nothing() -> None:
    qkv, q_norm, k_norm = make_inputs((3, 5), 2, dtype=F32)
    want = qk_norm_rope(qkv, q_norm, k_norm, (3, 5), 2)
    recorded = (q_norm[0].clone().requires_grad_(), q_norm[1])
    repeated = qkv[:, :1].expand(-1, 3, -1, -1, -1, -1, -1)
    wide = torch.zeros(*qkv.shape, 2)[..., 0].copy_(qkv)
    before = qkv.clone()
    for given, norm in ((qkv, recorded), (repeated, q_norm), (wide, q_norm), (qkv.clone().requires_grad_(), q_norm)):
        kept = given.detach().clone()
        got = qk_norm_rope(given, norm, k_norm, (3, 5), 2, inplace=True)
        assert torch.equal(given, kept)
        assert torch.equal(
            got, want if given.shape == want.shape and given is not repeated else want[:, :1].expand_as(got)
        )
    with vggt_mv_ext.backend("reference"):
        qk_norm_rope(qkv, q_norm, k_norm, (3, 5), 2, inplace=True)
    compiled = torch.compile(
        lambda x: qk_norm_rope(x, q_norm, k_norm, (3, 5), 2, inplace=True), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(qkv), want)
    assert torch.equal(qkv, before)
    with torch.no_grad():
        assert qk_norm_rope(qkv, recorded, k_norm, (3, 5), 2, inplace=True) is qkv
    assert torch.equal(qkv, want)


@pytest.mark.parametrize("name", ["reference", "auto"])
def test_opcheck_in_place(name: str) -> None:
    qkv, q_norm, k_norm = make_inputs((2, 2), 1, dtype=F32)
    with vggt_mv_ext.backend(name):
        arguments = (qkv, *q_norm, *k_norm, 2, 2, 1, 100.0, 1e-5, 0)
        torch.library.opcheck(torch.ops.vggt_mv.qk_norm_rope_.default, arguments)
        want = qk_norm_rope(qkv, q_norm, k_norm, (2, 2), 1)
        torch.ops.vggt_mv.qk_norm_rope_(*arguments)
    assert torch.equal(qkv, want)


@every_isa
def test_kernel_reads_strides_and_nothing_beside(isa: str) -> None:
    qkv, q_norm, k_norm = make_inputs((3, 5), 2, heads=3, width=20, dtype=F32)
    strided = torch.full((2, 1, 17, 3, 3, 3, 29), float("nan")).permute(1, 0, 3, 2, 4, 5, 6)[..., 4:24]
    strided = strided.copy_(qkv)
    grads = []
    grad = torch.randn_like(qkv)
    for given in (qkv, strided):
        inputs = [t.detach().requires_grad_() for t in (given, *q_norm, *k_norm)]
        out = qk_norm_rope(inputs[0], (inputs[1], inputs[2]), (inputs[3], inputs[4]), (3, 5), 2)
        grads.append([out.detach(), *torch.autograd.grad(out, inputs, grad)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@every_isa
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["f32", "f16", "bf16"])
@pytest.mark.usefixtures("poisoned")
def test_kernel_with_any_number_of_heads(isa: str, dtype: torch.dtype) -> None:
    """Heads go through the kernel by four and by sixteen; 64 is a width with code of its own."""
    for heads, width in itertools.product((1, 4, 5, 15, 16, 17, 35), (20, 64)):
        qkv, q_norm, k_norm = make_inputs((3, 5), 2, heads=heads, width=width, dtype=dtype)
        exact_norms = (tuple(t.double() for t in norm) for norm in (q_norm, k_norm))
        exact = reference.qk_norm_rope(qkv.double(), *exact_norms, (3, 5), 2)
        got = qk_norm_rope(qkv, q_norm, k_norm, (3, 5), 2)
        assert_accurate(f"{heads} heads of {width}", got, exact, dtype)
        buffer = torch.full((*qkv.shape[:5], heads + 2, width + 9), 7.0, dtype=dtype)
        strided = buffer[..., 1:-1, 4 : 4 + width].copy_(qkv)
        for given in (qkv.clone(), strided):
            assert qk_norm_rope(given, q_norm, k_norm, (3, 5), 2, inplace=True) is given
            assert torch.equal(given, got)
        strided.fill_(7.0)
        assert (buffer == 7.0).all()


@every_isa
@pytest.mark.parametrize("width", [20, 64])
def test_kernel_survives_a_large_mean(isa: str, width: int) -> None:
    """Heads far from zero, each by another distance: squares that are not taken about the mean would leave nothing."""
    qkv, q_norm, k_norm = make_inputs((3, 5), 2, heads=6, width=width, dtype=F32)
    qkv += torch.tensor([0.0, 1e4, -1e4, 100.0, -3e3, 1.0])[:, None]
    exact = reference.qk_norm_rope(
        qkv.double(), *(tuple(t.double() for t in norm) for norm in (q_norm, k_norm)), (3, 5), 2
    )[..., :2, :, :]
    got = qk_norm_rope(qkv, q_norm, k_norm, (3, 5), 2)[..., :2, :, :]
    # The mean itself is rounded to 2^-11 beside a deviation of 1.
    assert (got - exact).norm() / exact.norm() < 1e-3
    assert_accurate("heads near zero", got[..., 0::5, :], exact[..., 0::5, :], F32)


@every_isa
@pytest.mark.parametrize("dtype", [F16, BF16], ids=["f16", "bf16"])
def test_every_number_of_16_bits_survives(isa: str, dtype: torch.dtype) -> None:
    """At position (0, 0) without a norm nothing is done but widening and rounding."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = torch.where(numbers.isfinite(), numbers, 1.0)  # infinity times the sine, which is zero, is NaN
    qkv = numbers.view(1, 1, 1, 64, 1, 16, 64).repeat(1, 1, 1, 1, 3, 1, 1)
    got = qk_norm_rope(qkv, None, None, (0, 0), 64)
    assert torch.equal(got, qkv)


@every_isa
@pytest.mark.parametrize("width", [32, 64])
def test_kernel_keeps_nan_in_its_head(isa: str, width: int) -> None:
    qkv, q_norm, k_norm = make_inputs((3, 5), 2, width=width, dtype=F32)
    want = qk_norm_rope(qkv, q_norm, k_norm, (3, 5), 2)
    for part in range(3):
        given = qkv.clone()
        given[0, 1, 2, 16, part, 1, 31] = torch.nan
        got = qk_norm_rope(given, q_norm, k_norm, (3, 5), 2)
        expected = torch.zeros_like(got, dtype=torch.bool)
        expected[0, 1, 2, 16, part, 1, slice(31, 32) if part == 2 else slice(None)] = True
        assert torch.equal(got.isnan(), expected)
        assert torch.equal(got[~expected], want[~expected])


@needs_kernel
def test_the_number_of_threads_changes_nothing() -> None:
    qkv, q_norm, k_norm = make_inputs((13, 11), 5, heads=4, width=64, dtype=F32)
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        inputs = [t.detach().requires_grad_() for t in (qkv, *q_norm, *k_norm)]
        out = qk_norm_rope(inputs[0], (inputs[1], inputs[2]), (inputs[3], inputs[4]), (13, 11), 5)
        runs.append([out.detach(), *torch.autograd.grad(out.square().sum(), inputs)])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
