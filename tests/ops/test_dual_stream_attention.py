"""dual_stream_attention against two single attentions and a loop in float64, and the rules around it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from ops_support import ISAS, TOLERANCE, assert_accurate
from torch import Tensor

import vggt_mv_ext
from vggt_mv_ext import alternating_attention, dual_stream_attention, reference
from vggt_mv_ext._extension import extension

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
AXES = ("frame", "view", "time", "global")
every_axis = pytest.mark.parametrize("axis", AXES)
shared_or_not = pytest.mark.parametrize("shared", [False, True], ids=["own qkv", "shared qkv"])
needs_kernel = pytest.mark.skipif(extension is None, reason="this build has no compiled kernels")
NAMES = ("qkv_pose", "qkv_geo", "mask", "lambda_pose", "lambda_geo")


def make_inputs(
    shared: bool, shape: tuple[int, ...] = (2, 3, 2, 4, 3, 2, 8)
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    qkv_pose = torch.randn(shape, dtype=F64)
    qkv_geo = None if shared else torch.randn(shape, dtype=F64)
    mask = torch.rand(shape[:4], dtype=F64)
    mask[..., 0] = 0
    return qkv_pose, qkv_geo, mask, torch.tensor(1.3, dtype=F64), torch.tensor(0.7, dtype=F64)


def call(function, axis: str, given, **options) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    return function(given[0], given[1], axis, *given[2:], **options)


def cast(given, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    wide = F64 if dtype == F64 else F32
    return [None if t is None else t.to(dtype if t.dim() == 7 else wide) for t in given]


def gradients(function, axis: str, given, grads, **options) -> list[Tensor | None]:  # type: ignore[no-untyped-def]
    inputs = [None if t is None else t.detach().clone().requires_grad_() for t in given]
    outputs = [out for out, grad in zip(call(function, axis, inputs, **options), grads) if grad is not None]
    wanted = [t for t in inputs if t is not None]
    found = iter(torch.autograd.grad(outputs, wanted, [g for g in grads if g is not None], materialize_grads=True))
    return [None if t is None else next(found) for t in inputs]


def naive(qkv: Tensor, bias: Tensor, axis: str, scale: float) -> Tensor:
    """Row after row, straight from the formula."""
    batch, times, views, tokens, _, heads, width = qkv.shape
    out = torch.full((batch, times, views, tokens, heads * width), float("nan"), dtype=qkv.dtype)
    grid = list(itertools.product(range(batch), range(times), range(views), range(tokens)))
    same = {"frame": (0, 1, 2), "view": (0, 1), "time": (0, 2), "global": (0,)}[axis]
    for row in grid:
        keys = [key for key in grid if all(key[d] == row[d] for d in same)]
        for h in range(heads):
            logits = torch.stack([scale * qkv[row][0, h] @ qkv[key][1, h] + bias[key] for key in keys])
            values = torch.stack([qkv[key][2, h] for key in keys])
            out[row][h * width : (h + 1) * width] = torch.softmax(logits, dim=0) @ values
    return out


@every_axis
@shared_or_not
@pytest.mark.usefixtures("poisoned")
def test_against_loops(axis: str, shared: bool) -> None:
    given = make_inputs(shared, (1, 2, 2, 3, 3, 2, 4))
    qkv_pose, qkv_geo, mask, lambda_pose, lambda_geo = given
    for scale in (None, 0.7):
        pose, geo = call(dual_stream_attention, axis, given, scale=scale)
        factor = 4**-0.5 if scale is None else scale
        assert pose.is_contiguous() and geo.is_contiguous()
        assert_accurate("pose", pose, naive(qkv_pose, -lambda_pose * mask, axis, factor), F64)
        geo_qkv = qkv_pose if qkv_geo is None else qkv_geo
        assert_accurate("geo", geo, naive(geo_qkv, lambda_geo * mask, axis, factor), F64)


@every_axis
def test_without_a_mask_the_streams_are_single_ones(axis: str) -> None:
    qkv_pose, qkv_geo, *_ = make_inputs(False)
    for dtype in (F64, F32):
        both = dual_stream_attention(qkv_pose.to(dtype), qkv_geo.to(dtype), axis, None, None, None)
        for out, qkv in zip(both, (qkv_pose, qkv_geo), strict=True):
            assert torch.equal(out, alternating_attention(qkv.to(dtype), axis))


@pytest.mark.parametrize("dtype", [F64, F32], ids=["f64", "f32"])
def test_odds_of_a_marked_half_fall_by_e_to_the_minus_lambda(dtype: torch.dtype) -> None:
    """Values that tell marked from unmarked keys make the outputs the probability of the marked half."""
    qkv = torch.randn(1, 2, 2, 6, 3, 2, 8, dtype=dtype)
    mask = torch.zeros(1, 2, 2, 6, dtype=dtype)
    mask[..., 3:] = 1
    qkv[..., 2, :, :] = mask[..., None, None]
    weight = torch.tensor(4.0, dtype=dtype)
    pose, geo = dual_stream_attention(qkv, None, "global", mask, weight, weight)
    plain = alternating_attention(qkv, "global")
    odds, pose_odds, geo_odds = (p / (1 - p) for p in (plain, pose, geo))
    tolerance = {F64: 1e-12, F32: 3e-5}[dtype]  # 1 - p at odds of e^4 and more loses 6 bits
    assert ((pose_odds / odds) * math.exp(4) - 1).abs().max() < tolerance
    assert ((geo_odds / odds) * math.exp(-4) - 1).abs().max() < tolerance


@shared_or_not
@pytest.mark.parametrize("axis", ["view", "time"])
def test_gradients_in_float64(axis: str, shared: bool) -> None:
    """Of q, k, v, the mask and both lambdas, against finite differences."""
    given = make_inputs(shared, (1, 2, 2, 2, 3, 1, 2))
    tensors = [t.requires_grad_() for t in given if t is not None]

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        first, second = (tensors[0], None) if shared else tensors[:2]
        return dual_stream_attention(first, second, axis, *tensors[-3:])

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@shared_or_not
@pytest.mark.parametrize("streams", ["both", "pose", "geo"])
@pytest.mark.parametrize("name", ["reference", pytest.param("cpu", marks=needs_kernel)])
def test_gradients_of_one_stream_or_both(shared: bool, streams: str, name: str) -> None:
    given = make_inputs(shared, (1, 2, 3, 9, 3, 2, 16))
    grads = [torch.randn(1, 2, 3, 9, 32, dtype=F64) if streams in ("both", s) else None for s in ("pose", "geo")]
    exact = gradients(reference.dual_stream_attention, "view", given, grads)
    with vggt_mv_ext.backend(name):
        low = [None if g is None else g.float() for g in grads]
        got = gradients(dual_stream_attention, "view", cast(given, F32), low)
    for what, a, b in zip(NAMES, got, exact, strict=True):
        if b is not None:
            assert a is not None
            assert_accurate(what, a, b, F32)
    unused = {"both": (), "pose": ("qkv_geo", "lambda_geo"), "geo": ("qkv_pose", "lambda_pose")}[streams]
    if shared:
        unused = [name for name in unused if name.startswith("lambda")]
    for what, a in zip(NAMES, got, strict=True):
        assert a is None or (a.count_nonzero() == 0) == (what in unused), what


@pytest.mark.parametrize("mask", [True, False], ids=["mask", "no mask"])
@shared_or_not
def test_opcheck(shared: bool, mask: bool) -> None:
    given = cast(make_inputs(shared, (1, 2, 2, 3, 3, 2, 8)), F32)
    if not mask:
        given[2:] = [None] * 3
    tracked = [None if t is None else t.clone().requires_grad_() for t in given]
    arguments = (*tracked[:2], "time", *tracked[2:], None)
    torch.library.opcheck(torch.ops.vggt_mv.dual_stream_attention.default, arguments)
    saved = torch.ops.vggt_mv.dual_stream_attention(*given[:2], "time", *given[2:], 0.5)
    wanted = [True, not shared, mask, False, mask]
    grad = torch.randn(1, 2, 2, 3, 16)
    arguments = (None, grad, *given[:2], "time", *given[2:], 0.5, *saved, wanted)
    torch.library.opcheck(torch.ops.vggt_mv.dual_stream_attention_backward.default, arguments)


def test_compiles_without_a_graph_break() -> None:
    given = [t.requires_grad_() for t in cast(make_inputs(False, (1, 2, 2, 3, 3, 2, 8)), F32)]

    def function(*given: Tensor) -> Tensor:
        pose, geo = dual_stream_attention(given[0] * 2, given[1], "view", *given[2:])
        return (pose * geo).sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    got, want = (torch.autograd.grad(f(*given), given) for f in (compiled, function))
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert_accurate(name, a, b.double(), F32)


@pytest.mark.parametrize("dtype", [F32, F16, F64], ids=["f32", "f16", "f64"])
def test_autocast(dtype: torch.dtype) -> None:
    given = make_inputs(False)
    low = [t.to(dtype) for t in given if t is not None]
    with torch.autocast("cpu", torch.bfloat16):
        both = call(dual_stream_attention, "time", low)
    expected = F64 if dtype == F64 else BF16
    for name, got, exact in zip(("pose", "geo"), both, call(reference.dual_stream_attention, "time", given)):
        assert got.dtype == expected
        assert_accurate(name, got, exact, expected)


@needs_kernel
@shared_or_not
@every_axis
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.usefixtures("poisoned")
def test_kernel(isa: str, axis: str, shared: bool) -> None:
    for dtype in (F32, F16, BF16):
        given = cast(cast(make_inputs(shared, (2, 2, 3, 19, 3, 2, 32)), dtype), F64)
        grads = [torch.randn(2, 2, 3, 19, 64).to(dtype).double() for _ in range(2)]
        exact = [*call(reference.dual_stream_attention, axis, given)]
        exact_gradients = gradients(reference.dual_stream_attention, axis, given, grads)
        low, low_grads = cast(given, dtype), [g.to(dtype) for g in grads]
        eager = call(reference.dual_stream_attention, axis, low)
        with vggt_mv_ext.backend("cpu"):
            got = call(dual_stream_attention, axis, low)
            got_gradients = gradients(dual_stream_attention, axis, low, low_grads)
        for name, a, b, c in zip(("pose", "geo"), got, exact, eager, strict=True):
            assert_accurate(name, a, b, dtype, c)
        for name, a, b in zip(NAMES, got_gradients, exact_gradients, strict=True):
            if a is not None and b is not None and not name.startswith("lambda"):
                assert_accurate(name, a, b, dtype)
        # A lambda's gradient is the inner product of the mask with terms that nearly cancel: by Cauchy and Schwarz its
        # error is bounded by the norms of both, not by its own size.
        size = given[2].norm() * exact_gradients[2].norm()
        for a, b in zip(got_gradients[3:], exact_gradients[3:], strict=True):
            assert (a - b).abs() <= TOLERANCE[dtype] * size


# --- The CPU kernel: streams that share qkv have one softmax where the biases of each lie at most 30 apart, else two.

every_isa = pytest.mark.parametrize("isa", ISAS, indirect=True)
TOKENS = (1, 5, 6, 7, 8, 9, 15, 17, 24, 25, 86, 255, 256, 257)


def kernel_inputs(shared: bool, shape: tuple[int, ...], dtype: torch.dtype = F32, weight: float = 1.0):  # type: ignore[no-untyped-def]
    """float64 inputs that a kernel of the dtype is given exactly; biases up to some `weight` in size."""
    pose, geo, mask, lambda_pose, lambda_geo = make_inputs(shared, shape)
    return cast(cast((pose, geo, mask, lambda_pose * weight, lambda_geo * weight), dtype), F64)


def run_kernel(axis: str, given, dtype: torch.dtype = F32) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """pose, geo, lse_pose, lse_geo."""
    qkv_pose, qkv_geo, *biases = cast(given, dtype)
    with vggt_mv_ext.backend("cpu"):
        return list(torch.ops.vggt_mv.dual_stream_attention(qkv_pose, qkv_geo, axis, *biases, None))


def exact_lse(given, axis: str) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Of every stream, [sequences, h, length], for frame and global sequences, which are contiguous."""
    qkv_pose, qkv_geo, mask, lambda_pose, lambda_geo = given
    found = []
    for qkv, weight in ((qkv_pose, -lambda_pose), (qkv_pose if qkv_geo is None else qkv_geo, lambda_geo)):
        q, k, _ = qkv.flatten(0, {"frame": 2, "global": 0}[axis]).flatten(1, -4).unbind(2)
        bias = (weight * mask).reshape(len(q), 1, 1, -1)
        logits = torch.einsum("slhd,smhd->shlm", q, k) * q.shape[-1] ** -0.5 + bias
        found.append(logits.logsumexp(-1))
    return found


@every_isa
@shared_or_not
@pytest.mark.parametrize(("axis", "sizes"), [("frame", (2, 1, 1)), ("view", (1, 2, 3)), ("time", (1, 3, 2))])
@pytest.mark.usefixtures("poisoned")
def test_kernel_at_every_length(isa: str, axis: str, sizes: tuple[int, ...], shared: bool) -> None:
    for tokens in TOKENS:
        given = kernel_inputs(shared, (*sizes, tokens, 3, 2, 20))
        for got, exact in zip(run_kernel(axis, given), call(reference.dual_stream_attention, axis, given)):
            error = (got - exact).norm() / exact.norm()
            assert error < 5e-7, f"{tokens} tokens: {error:.2e}"  # measured: up to 3e-7


@every_isa
@shared_or_not
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 33, 64, 96])
@pytest.mark.usefixtures("poisoned")
def test_kernel_at_every_width(isa: str, width: int, dtype: torch.dtype, shared: bool) -> None:
    given = kernel_inputs(shared, (1, 2, 2, 37, 3, 3, width), dtype)
    eager = call(reference.dual_stream_attention, "view", cast(given, dtype))
    exact = call(reference.dual_stream_attention, "view", given)
    for name, got, want, beside in zip(("pose", "geo"), run_kernel("view", given, dtype), exact, eager):
        assert_accurate(name, got, want, dtype, beside)


@every_isa
@shared_or_not
@pytest.mark.parametrize("weight", [1.0, 60.0], ids=["near", "far"])
def test_kernel_gives_the_same_bits_on_any_number_of_threads(isa: str, shared: bool, weight: float) -> None:
    for dtype in (F32, BF16):
        given = kernel_inputs(shared, (1, 1, 1, 1041, 3, 2, 64), dtype, weight)
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run_kernel("frame", given, dtype))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
        for got, exact in zip(found[0], call(reference.dual_stream_attention, "frame", given)):
            assert_accurate("out", got, exact, dtype)


@every_isa
@shared_or_not
@every_axis
def test_kernel_reads_strides_and_nothing_beside(isa: str, axis: str, shared: bool) -> None:
    given = cast(kernel_inputs(shared, (2, 2, 3, 19, 3, 2, 21)), F32)
    want = run_kernel(axis, given)
    strided = list(given)
    for place, order in ((0, (2, 3, 19, 2, 3, 2, 29)), (1, (3, 2, 19, 2, 3, 2, 37))):
        if given[place] is not None:
            dims = (0, 3, 1, 2, 4, 5, 6) if place == 0 else (1, 3, 0, 2, 4, 5, 6)
            strided[place] = torch.full(order, float("nan")).permute(dims)[..., 3:24]
            strided[place].copy_(given[place])
    strided[2] = torch.full((2, 2, 3, 19, 2), float("nan"))[..., 0].copy_(given[2])
    for got, plain in zip(run_kernel(axis, strided), want, strict=True):
        assert torch.equal(got, plain) and plain.isfinite().all()


@every_isa
@shared_or_not
@pytest.mark.parametrize("weight", [0.0, 1.0, 22.5, 23.5, 60.0, 500.0])
@pytest.mark.parametrize("axis", ["frame", "global"])
def test_kernel_with_biases_near_and_far(isa: str, axis: str, weight: float, shared: bool) -> None:
    """1.3 x 22.5 is within 30, 1.3 x 23.5 beyond it. Scores of some tens, so that either may decide."""
    given = kernel_inputs(shared, (1, 2, 1, 300, 3, 2, 16), weight=weight)
    given[2][..., :2] = torch.tensor([0.0, 1.0])
    for qkv in given[:2]:
        if qkv is not None:
            qkv[..., :2, :, :] *= 3
    given = cast(cast(given, F32), F64)
    exact = [*call(reference.dual_stream_attention, axis, given), *exact_lse(given, axis)]
    eager = call(reference.dual_stream_attention, axis, cast(given, F32))
    for name, got, want, beside in zip(("pose", "geo"), run_kernel(axis, given), exact, eager):
        # Without a fused multiply-add every product is rounded, which large scores show.
        assert_accurate(name, got, want, F32, None if isa == "portable" else beside)
    for name, got, want in zip(("lse_pose", "lse_geo"), run_kernel(axis, given)[2:], exact[2:]):
        assert_accurate(name, got, want, F32)


@every_isa
@shared_or_not
@pytest.mark.parametrize("weight", [22.5, 60.0], ids=["near", "far"])
def test_kernel_gradients_with_large_biases(isa: str, shared: bool, weight: float) -> None:
    """They hang on lse: exp(score - lse) are the probabilities."""
    given = kernel_inputs(shared, (1, 2, 2, 37, 3, 2, 16), weight=weight)
    grads = [torch.randn(1, 2, 2, 37, 32).double() for _ in range(2)]
    exact = gradients(reference.dual_stream_attention, "view", given, grads)
    with vggt_mv_ext.backend("cpu"):
        got = gradients(dual_stream_attention, "view", cast(given, F32), [g.float() for g in grads])
    for name, a, b in zip(NAMES[:3], got, exact):
        if a is not None and b is not None:
            assert_accurate(name, a, b, F32)


@every_isa
@shared_or_not
def test_kernel_where_whole_sequences_are_far_apart(isa: str, shared: bool) -> None:
    """A bias that all keys of a sequence have changes nothing, however large."""
    given = kernel_inputs(shared, (1, 1, 2, 40, 3, 2, 16))
    given[2] = torch.zeros(1, 1, 2, 40, dtype=F64)
    given[2][0, 0, 1] = 1
    given[3] = given[4] = torch.tensor(300.0, dtype=F64)
    exact = call(reference.dual_stream_attention, "frame", given)
    for name, got, want in zip(("pose", "geo"), run_kernel("frame", given), exact):
        assert_accurate(name, got, want, F32)


@every_isa
@shared_or_not
def test_kernel_shuts_keys_out(isa: str, shared: bool) -> None:
    """An infinite mask: -inf as bias of the marked keys in both streams, and NaN where no key is left."""
    given = kernel_inputs(shared, (1, 1, 1, 600, 3, 1, 16))
    given[2] = torch.zeros(1, 1, 1, 600, dtype=F64)
    given[2][..., 100:500] = torch.inf
    given[4] = torch.tensor(-1.0, dtype=F64)
    kept = [
        None if qkv is None else torch.cat((qkv[..., :100, :, :, :], qkv[..., 500:, :, :, :]), 3) for qkv in given[:2]
    ]
    exact = call(reference.dual_stream_attention, "frame", (*kept, None, None, None))
    for got, want in zip(run_kernel("frame", given), exact):
        rows = torch.cat((got[..., :100, :], got[..., 500:, :]), 3)
        assert got.isfinite().all() and (rows - want).norm() / want.norm() < 5e-7
    given[2][:] = torch.inf
    assert all(out.isnan().all() for out in run_kernel("frame", given)[:2])
    given[2] = torch.zeros(1, 1, 1, 600, dtype=F64)
    given[2][..., 7] = torch.nan
    assert all(out.isnan().all() for out in run_kernel("frame", given)[:2])


@every_isa
@pytest.mark.parametrize("mask", [True, False], ids=["lambdas of zero", "no mask"])
def test_kernel_without_bias_gives_the_bits_of_one_stream(isa: str, mask: bool) -> None:
    for dtype in (F32, F16, BF16):
        qkv = torch.randn(1, 2, 2, 67, 3, 2, 40).to(dtype)
        zero = torch.zeros(())
        given = (qkv, None, torch.rand(1, 2, 2, 67), zero, zero) if mask else (qkv, None, None, None, None)
        with vggt_mv_ext.backend("cpu"):
            single, lse = torch.ops.vggt_mv.alternating_attention(qkv, "view", None, None, None)
        pose, geo, lse_pose, lse_geo = run_kernel("view", given, dtype)
        assert torch.equal(pose, single) and torch.equal(geo, single)
        assert torch.equal(lse_pose, lse) and torch.equal(lse_geo, lse)


@needs_kernel
def test_choice_of_backend() -> None:
    assert vggt_mv_ext.explain(dual_stream_attention, QKV).backend == "cpu"
    assert vggt_mv_ext.explain(dual_stream_attention, QKV.double()).backend == "reference"


def test_no_tokens() -> None:
    qkv = torch.zeros(1, 2, 2, 0, 3, 2, 8, requires_grad=True)
    pose, geo = dual_stream_attention(qkv, None, "view", torch.zeros(1, 2, 2, 0), torch.ones(()), torch.ones(()))
    assert pose.shape == geo.shape == (1, 2, 2, 0, 16)
    (pose.sum() + geo.sum()).backward()


QKV, MASK, ONE = torch.zeros(1, 2, 2, 5, 3, 1, 8), torch.zeros(1, 2, 2, 5), torch.ones(())
ERRORS = [
    (
        (QKV[0], None, "view", None, None, None),
        ValueError,
        r"dual_stream_attention: qkv_pose must have shape \[B, T, N",
    ),
    ((QKV, QKV[..., :4], "view", None, None, None), ValueError, "qkv_geo must have shape of qkv_pose = .*, got"),
    (
        (QKV, QKV.half(), "view", None, None, None),
        TypeError,
        "qkv_geo must have the dtype of qkv_pose, float32 .*float16",
    ),
    ((QKV, QKV.to("meta"), "view", None, None, None), ValueError, "qkv_geo must be on the device of qkv_pose, cpu"),
    ((QKV, None, "views", None, None, None), ValueError, "axis must be one of frame, view, time, global; got 'views'"),
    ((QKV, None, "view", MASK, None, ONE), TypeError, "lambda_pose must be a torch.Tensor, got NoneType"),
    ((QKV, None, "view", MASK, ONE, 0.1), TypeError, "lambda_geo must be a torch.Tensor, got float"),
    ((QKV, None, "view", MASK, ONE[None], ONE), ValueError, r"lambda_pose must have shape \[\] = \[\], got \[1\]"),
    ((QKV, None, "view", MASK, ONE, ONE.double()), TypeError, "lambda_geo must be float32 with a qkv_pose .*float64"),
    ((QKV, None, "view", MASK[0], ONE, ONE), ValueError, r"mask must have shape \[B, T, N, P\] = \[1, 2, 2, 5\], got"),
    ((QKV, None, "view", MASK.half(), ONE, ONE), TypeError, "mask must be float32 with a qkv_pose .*; got float16"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), ERRORS, ids=[text[:48] for *_, text in ERRORS])
def test_errors_name_argument_rule_and_value(arguments, error, text) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=text):
        dual_stream_attention(*arguments)


def test_scale_must_be_positive() -> None:
    with pytest.raises(ValueError, match="dual_stream_attention: scale must be above 0 and finite, got -1"):
        dual_stream_attention(QKV, None, "view", None, None, None, scale=-1.0)
