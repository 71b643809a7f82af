"""Attention of two streams of tokens, of which one looks away from what moves and the other looks at it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import reference
from .._extension import extension
from ..backends import Operator, choose
from . import _common, _kernels
from . import alternating_attention as _single

NAME = "dual_stream_attention"


def dual_stream_attention(
    qkv_pose: Tensor,
    qkv_geo: Tensor | None,
    axis: str,
    mask: Tensor | None,
    lambda_pose: Tensor | None,
    lambda_geo: Tensor | None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Softmax attention of a pose stream and a geometry stream along one axis of the token grid.

    Formula, for queries i and keys j of one sequence and every head, with the mask m of what moves::

        pose:      logit_ij = scale * q_i . k_j - lambda_pose * m_j
        geometry:  logit_ij = scale * q_i . k_j + lambda_geo * m_j
        out_i = sum_j softmax_j(logit_ij) v_j

    each with its own q, k and v. So moving tokens are muted in the first stream and amplified in the second. Sequences
    are those of `alternating_attention`. Gradients reach q, k, v, the mask and both lambdas.

    Args:
        qkv_pose: `[B, T, N, P, 3, h, D]`: queries, keys, values of h heads of width D; any strides; float32, float16,
            bfloat16 or float64. Sums and softmax are in float32 (float64 for float64).
        qkv_geo: the same of the geometry stream, shape and dtype as qkv_pose; None: both streams share qkv_pose.
        axis: `frame`, `view`, `time` or `global`.
        mask: m, `[B, T, N, P]`, float32, or float64 with a float64 qkv; 1 where a token moves, 0 where it stands still.
            None: no bias, and neither lambda is read.
        lambda_pose: 0-dimensional, dtype as mask. It stays on its device: no value is waited for.
        lambda_geo: the same for the geometry stream.
        scale: factor of q . k, above 0; default `D**-0.5`.

    Returns:
        `pose` and `geo`, `[B, T, N, P, h * D]` in qkv's dtype, contiguous. Under autocast qkv is cast to the autocast
        dtype first, mask and lambdas to float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: no such axis; shapes or devices do not go together; scale is not above 0; a mask without lambdas.

    Source:
        Attention: Vaswani et al. 2017 (arXiv:1706.03762). Muting what moves for cameras and amplifying it for geometry:
        PAGE-4D, Zhou et al. 2025 (arXiv:2510.17568).

    Example:
        >>> import torch
        >>> from vggt_mv_ext import dual_stream_attention
        >>> qkv = torch.zeros(1, 1, 1, 2, 3, 1, 4)       # one frame of two tokens with equal logits
        >>> qkv[..., 2, 0, 0] = torch.tensor([0.0, 1.0])  # the values tell the two apart
        >>> mask, weight = torch.tensor([[[[0.0, 1.0]]]]), torch.tensor(3.0).log()
        >>> pose, geo = dual_stream_attention(qkv, None, "frame", mask, weight, weight)
        >>> shares = [round(out[0, 0, 0, 0, 0].item(), 4) for out in (pose, geo)]  # of the moving token: 1 to 3, 3 to 1
        >>> shares
        [0.25, 0.75]
    """
    any_dtypes = _common.autocast_may_cast(qkv_pose)
    _check(qkv_pose, qkv_geo, axis, mask, lambda_pose, lambda_geo, scale, any_dtypes=any_dtypes)
    if reference.in_forward_mode():
        return _reference((qkv_pose, qkv_geo, mask, lambda_pose, lambda_geo), axis, scale)
    pose, geo, _, _ = torch.ops.vggt_mv.dual_stream_attention(
        qkv_pose, qkv_geo, axis, mask, lambda_pose, lambda_geo, scale
    )
    return pose, geo


def _check(
    qkv_pose: Tensor,
    qkv_geo: Tensor | None,
    axis: str,
    mask: Tensor | None,
    lambda_pose: Tensor | None,
    lambda_geo: Tensor | None,
    scale: float | None,
    *,
    any_dtypes: bool = False,
) -> None:
    _common.check_qkv(NAME, qkv_pose, "qkv_pose")
    if qkv_geo is not None:
        _common.check_qkv(NAME, qkv_geo, "qkv_geo")
        _common.check_shape(NAME, "qkv_geo", qkv_geo, qkv_pose.shape, "of qkv_pose")
        _common.check_device(NAME, "qkv_geo", qkv_geo, "qkv_pose", qkv_pose)
        if not any_dtypes:
            _common.check_same_dtype(NAME, "qkv_geo", qkv_geo, "qkv_pose", qkv_pose)
    _common.check_axis(NAME, axis)
    _common.check_scale(NAME, scale)
    if mask is None:
        return
    shapes = {"mask": (qkv_pose.shape[:4], "[B, T, N, P]"), "lambda_pose": ((), "[]"), "lambda_geo": ((), "[]")}
    for (name, (shape, rule)), tensor in zip(shapes.items(), (mask, lambda_pose, lambda_geo), strict=True):
        _common.check_tensor(NAME, name, tensor)
        assert tensor is not None
        if not any_dtypes:
            _common.check_wide(NAME, name, tensor, "qkv_pose", qkv_pose)
        _common.check_shape(NAME, name, tensor, shape, rule)
        _common.check_device(NAME, name, tensor, "qkv_pose", qkv_pose)


def _reference(tensors: Sequence[Any], axis: str, scale: float | None) -> tuple[Tensor, Tensor]:
    qkv_pose, qkv_geo, *biases = tensors
    return reference.dual_stream_attention(qkv_pose, qkv_geo, axis, *biases, scale=scale)


OPERATOR = Operator(NAME, {"cpu": _single.cpu_limits, "cuda": _single.cuda_limits})


def _run(
    qkv_pose: Tensor,
    qkv_geo: Tensor | None,
    axis: str,
    mask: Tensor | None,
    lambda_pose: Tensor | None,
    lambda_geo: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(qkv_pose, qkv_geo, axis, mask, lambda_pose, lambda_geo, scale)
    backend = choose(OPERATOR, qkv_pose)
    if backend == "reference":
        _, _, *both = _fake(qkv_pose, qkv_geo, axis, mask, lambda_pose, lambda_geo, scale)
        pose, geo = _reference((qkv_pose, qkv_geo, mask, lambda_pose, lambda_geo), axis, scale)
        lse_pose, lse_geo = (lse.fill_(-torch.inf) for lse in both)
        return pose, geo, lse_pose, lse_geo
    return _run_kernel(backend, qkv_pose, qkv_geo, axis, mask, lambda_pose, lambda_geo, scale)


def _run_kernel(
    backend: str,
    qkv_pose: Tensor,
    qkv_geo: Tensor | None,
    axis: str,
    mask: Tensor | None,
    lambda_pose: Tensor | None,
    lambda_geo: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both streams by one launch, which reads the lambdas where they are; arguments that were checked."""
    results = _fake(qkv_pose, qkv_geo, axis, mask, lambda_pose, lambda_geo, scale)
    qkv_pose = _kernels.unit_width(qkv_pose)
    qkv_geo = None if qkv_geo is None else _kernels.unit_width(qkv_geo)
    if backend == "cuda":
        qkv_pose = _kernels.aligned_rows(qkv_pose)
        qkv_geo = None if qkv_geo is None else _kernels.aligned_rows(qkv_geo)
    if mask is None:
        lambda_pose = lambda_geo = None
    else:
        mask = mask.contiguous()
    *sizes, _, heads, width = qkv_pose.shape
    tensors = (qkv_pose, qkv_geo, mask, lambda_pose, lambda_geo, *results)
    arguments = (
        *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
        sizes,
        _kernels.qkv_steps(qkv_pose),
        _kernels.qkv_steps(qkv_pose if qkv_geo is None else qkv_geo),
        _kernels.AXIS_CODES[axis],
        heads,
        width,
        width**-0.5 if scale is None else scale,
        _kernels.DTYPE_CODES[qkv_pose.dtype],
    )
    assert extension is not None
    if backend == "cpu":
        extension.dual_stream_attention_cpu(*arguments, torch.get_num_threads())
    else:
        with _kernels.device_guard(qkv_pose):
            extension.dual_stream_attention_cuda(*arguments, _kernels.stream_address(qkv_pose))
    return results


def _biases(
    mask: Tensor | None, lambda_pose: Tensor | None, lambda_geo: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The key biases of both streams: one multiplication of a `[B, T, N, P]` each, beside an attention."""
    if mask is None or lambda_pose is None or lambda_geo is None:
        return None, None
    return -lambda_pose * mask, lambda_geo * mask


def _fake(
    qkv_pose: Tensor,
    qkv_geo: Tensor | None,
    axis: str,
    mask: Tensor | None,
    lambda_pose: Tensor | None,
    lambda_geo: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, lse = _single.fake(qkv_pose, axis, None, None, scale)
    return out, torch.empty_like(out), lse, torch.empty_like(lse)


def _autocast(
    device_type: str,
    qkv_pose: Tensor,
    qkv_geo: Tensor | None,
    axis: str,
    mask: Tensor | None,
    lambda_pose: Tensor | None,
    lambda_geo: Tensor | None,
    scale: float | None,
) -> tuple[Any, ...]:
    dtype = torch.get_autocast_dtype(device_type)
    wide = reference.accumulation_dtype(qkv_pose.dtype)
    biases = (None if tensor is None else tensor.to(wide) for tensor in (mask, lambda_pose, lambda_geo))
    return _common.cast(qkv_pose, dtype), _common.cast(qkv_geo, dtype), axis, *biases, scale


def _run_backward(
    grad_pose: Tensor | None,
    grad_geo: Tensor | None,
    qkv_pose: Tensor,
    qkv_geo: Tensor | None,
    axis: str,
    mask: Tensor | None,
    lambda_pose: Tensor | None,
    lambda_geo: Tensor | None,
    scale: float | None,
    pose: Tensor,
    geo: Tensor,
    lse_pose: Tensor,
    lse_geo: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    backend = choose(OPERATOR, qkv_pose)
    tensors = (qkv_pose, qkv_geo, mask, lambda_pose, lambda_geo)
    if backend == "reference":
        return _common.pack_gradients(_recompute((grad_pose, grad_geo), tensors, wanted, axis, scale), qkv_pose)
    if backend == "cpu" and lse_pose.flatten()[0] == -torch.inf:  # the forward pass ran on the reference
        pose, geo, lse_pose, lse_geo = _run(qkv_pose, qkv_geo, axis, mask, lambda_pose, lambda_geo, scale)

    biases, of_bias = _biases(mask, lambda_pose, lambda_geo), any(wanted[2:])
    given = ((grad_pose, qkv_pose, pose, lse_pose), (grad_geo, qkv_pose if qkv_geo is None else qkv_geo, geo, lse_geo))
    of_qkv: list[Tensor | None] = [None, None]
    of_biases: list[Tensor | None] = [None, None]
    for stream, ((grad, qkv, out, lse), bias) in enumerate(zip(given, biases, strict=True)):
        if grad is not None:
            of_qkv[stream], of_biases[stream], _ = _single.kernel_gradients(
                backend, grad, qkv, axis, bias, None, scale, out, lse, [True, of_bias, False]
            )
    if qkv_geo is None:
        of_qkv = [_sum(of_qkv), None]
    gradients = [*of_qkv, *_gradients_of_biases(of_biases, mask, lambda_pose, lambda_geo)]
    return _common.pack_gradients(
        [
            None if not need or tensor is None else torch.zeros_like(tensor) if gradient is None else gradient
            for gradient, tensor, need in zip(gradients, tensors, wanted, strict=True)
        ],
        qkv_pose,
    )


def _sum(terms: Sequence[Tensor | None]) -> Tensor | None:
    first, second = terms
    return second if first is None else first if second is None else first.add_(second)


def _gradients_of_biases(
    of_biases: Sequence[Tensor | None], mask: Tensor | None, lambda_pose: Tensor | None, lambda_geo: Tensor | None
) -> list[Tensor | None]:
    """From the gradients of `-lambda_pose * m` and `lambda_geo * m` to those of m and both lambdas."""
    if mask is None or lambda_pose is None or lambda_geo is None:
        return [None, None, None]
    pose, geo = of_biases
    of_mask = _sum([None if pose is None else pose * -lambda_pose, None if geo is None else geo * lambda_geo])
    return [of_mask, None if pose is None else -(pose * mask).sum(), None if geo is None else (geo * mask).sum()]


def _recompute(
    grads: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
    wanted: Sequence[bool],
    axis: str,
    scale: float | None,
    *,
    create_graph: bool = False,
) -> list[Tensor | None]:
    streams = [stream for stream, grad in enumerate(grads) if grad is not None]

    def function(*given: Tensor | None) -> list[Tensor]:
        both = _reference(given, axis, scale)
        return [both[stream] for stream in streams]

    present = [grad for grad in grads if grad is not None]
    return _common.recompute_gradients(function, tensors, wanted, present, create_graph=create_graph)


def _fake_backward(grad_pose: Tensor | None, grad_geo: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    qkv_pose, qkv_geo, _, mask, lambda_pose, lambda_geo, *_ = arguments
    return _common.fake_gradients([qkv_pose, qkv_geo, mask, lambda_pose, lambda_geo], arguments[-1], qkv_pose)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    qkv_pose, qkv_geo, ctx.axis, *biases, ctx.scale = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv_pose, qkv_geo, *biases, *output)


def _backward(
    ctx: Any, grad_pose: Tensor | None, grad_geo: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_pose is None and grad_geo is None:
        return (None,) * 7
    qkv_pose, qkv_geo, *biases = ctx.saved_tensors
    biases, results = biases[:3], biases[3:]
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3, 4, 5)]
    if torch.is_grad_enabled():
        with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no second derivatives
            gradients = _recompute(
                (grad_pose, grad_geo), (qkv_pose, qkv_geo, *biases), wanted, ctx.axis, ctx.scale, create_graph=True
            )
    else:
        packed = torch.ops.vggt_mv.dual_stream_attention_backward(
            grad_pose, grad_geo, qkv_pose, qkv_geo, ctx.axis, *biases, ctx.scale, *results, wanted
        )
        gradients = _common.unpack_gradients(packed, wanted)
    return *gradients[:2], None, *gradients[2:], None


# `lse_pose` and `lse_geo` are as in alternating_attention: for the backward pass, -inf from the reference.
_ARGUMENTS = (
    "Tensor qkv_pose, Tensor? qkv_geo, str axis, Tensor? mask, Tensor? lambda_pose, Tensor? lambda_geo, float? scale"
)
_common.define(
    f"{NAME}({_ARGUMENTS}) -> (Tensor pose, Tensor geo, Tensor lse_pose, Tensor lse_geo)",
    _run,
    _fake,
    autocast=_autocast,
)
_common.define(
    f"{NAME}_backward(Tensor? grad_pose, Tensor? grad_geo, {_ARGUMENTS}, Tensor pose, Tensor geo, Tensor lse_pose,"
    " Tensor lse_geo, bool[5] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
torch.library.register_autograd(f"vggt_mv::{NAME}", _backward, setup_context=_setup_context, lib=_common.LIBRARY)
