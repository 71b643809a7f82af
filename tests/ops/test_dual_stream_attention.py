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
