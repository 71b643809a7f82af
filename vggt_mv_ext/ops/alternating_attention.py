"""Attention along one axis of the token grid: within a frame, over views, over times, or over everything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import reference
from .._extension import extension
from ..backends import Operator, choose
from . import _common, _kernels

NAME = "alternating_attention"


def alternating_attention(
    qkv: Tensor,
    axis: str,
    *,
    key_bias: Tensor | None = None,
    row_gate: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    r"""Softmax attention inside every sequence of one axis of the token grid `[B, T, N, P]`, all heads at once.

    Formula, for queries i and keys j of one sequence and every head::

        logit_ij = scale * q_i . k_j + row_gate_i * key_bias_j
        out_i    = sum_j softmax_j(logit_ij) v_j

    One sequence is: for `frame` the P tokens of one (b, t, n); for `view` the N P tokens of one (b, t); for `time` the
    T P tokens of one (b, n); for `global` the T N P tokens of one b. The tokens stay where they are for all four.

    Args:
        qkv: `[B, T, N, P, 3, h, D]`: queries, keys, values of h heads of width D; any strides; float32, float16,
            bfloat16 or float64. Sums and softmax are in float32 (float64 for float64).
        axis: `frame`, `view`, `time` or `global`.
        key_bias: `[B, T, N, P]`, added to the logits of a key for all rows and heads: float32, or float64 with a
            float64 qkv. `-inf` shuts a key out, where its row gate is not 0.
        row_gate: how strongly a row takes the bias, `[P]` (the same in every frame) or `[B, T, N, P]`, dtype as
            key_bias; default 1. Only together with key_bias.
        scale: factor of q . k, above 0; default `D**-0.5`.

    Returns:
        `[B, T, N, P, h * D]` in qkv's dtype, contiguous. Under autocast qkv is cast to the autocast dtype first and
        key_bias and row_gate to float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: no such axis; shapes or devices do not go together; scale is not above 0; a row_gate alone.

    Source:
        Attention: Vaswani et al. 2017 (arXiv:1706.03762); exact tiled evaluation: Dao et al. 2022 (arXiv:2205.14135);
        alternation of axes: Wang et al. 2025 (arXiv:2503.11651).

    Example:
        >>> import torch
        >>> from vggt_mv_ext import alternating_attention
        >>> qkv = torch.zeros(1, 2, 1, 2, 3, 1, 4)       # two times of one view with two tokens each
        >>> qkv[..., 2, 0, 0] = torch.tensor([[1.0, 2.0], [3.0, 6.0]]).view(1, 2, 1, 2)
        >>> alternating_attention(qkv, "frame")[..., 0].flatten().tolist()        # equal logits: means of the frames
        [1.5, 1.5, 4.5, 4.5]
        >>> alternating_attention(qkv, "time")[..., 0].flatten().tolist()
        [3.0, 3.0, 3.0, 3.0]
    """
    _check(qkv, axis, key_bias, row_gate, scale, any_dtypes=_common.autocast_may_cast(qkv))
    if reference.in_forward_mode():
        return _reference((qkv, key_bias, row_gate), axis, scale)
    out, _ = torch.ops.vggt_mv.alternating_attention(qkv, axis, key_bias, row_gate, scale)
    return out


def _check(
    qkv: Tensor,
    axis: str,
    key_bias: Tensor | None,
    row_gate: Tensor | None,
    scale: float | None,
    *,
    any_dtypes: bool = False,
) -> None:
    _common.check_qkv(NAME, qkv)
    _common.check_axis(NAME, axis)
    _common.check_scale(NAME, scale)
    if row_gate is not None and key_bias is None:
        raise ValueError(f"{NAME}: row_gate must come with a key_bias, got row_gate alone")
    for name, tensor in (("key_bias", key_bias), ("row_gate", row_gate)):
        if tensor is None:
            continue
        _common.check_tensor(NAME, name, tensor)
        if not any_dtypes:
            _common.check_wide(NAME, name, tensor, "qkv", qkv)
        if name == "row_gate" and tensor.dim() == 1:
            _common.check_shape(NAME, name, tensor, qkv.shape[3:4], "[P] or [B, T, N, P], here [P]")
        else:
            rule = "[B, T, N, P]" if name == "key_bias" else "[P] or [B, T, N, P], here [B, T, N, P]"
            _common.check_shape(NAME, name, tensor, qkv.shape[:4], rule)
        _common.check_device(NAME, name, tensor, "qkv", qkv)


def _reference(tensors: Sequence[Any], axis: str, scale: float | None) -> Tensor:
    qkv, key_bias, row_gate = tensors
    return reference.alternating_attention(qkv, axis, key_bias=key_bias, row_gate=row_gate, scale=scale)


def cpu_limits(qkv: Tensor, *_: Tensor | None) -> str | None:
    """Why the CPU kernel cannot run this qkv, or None where it can."""
    if qkv.numel() == 0:
        return "an empty tensor needs no kernel"
    if qkv.dtype == torch.float64:
        return "float64 runs on the reference alone"
    if max(qkv.shape) > 2**31 - 1:
        return f"sizes must fit into 31 bits, got {list(qkv.shape)}"
    return None


CUDA_WIDTHS = (32, 64, 96, 128)


def cuda_limits(qkv: Tensor, *_: Tensor | None) -> str | None:
    """Why the CUDA kernel cannot run this qkv, or None where it can."""
    if qkv.numel() == 0:
        return "an empty tensor needs no kernel"
    if qkv.dtype == torch.float32:
        return (
            "float32 attention goes to PyTorch's scaled_dot_product_attention: there are no float32 tensor cores, and "
            "TF32 is not taken silently"
        )
    if qkv.dtype == torch.float64:
        return "float64 runs on the reference alone"
    if qkv.shape[-1] not in CUDA_WIDTHS:
        return f"D must be 32, 64, 96 or 128, got {qkv.shape[-1]}"
    if qkv.is_cuda and torch.cuda.get_device_capability(qkv.device) < (8, 0):
        return "the kernel needs a GPU of compute capability 8.0 or later"
    return None


OPERATOR = Operator(NAME, {"cpu": cpu_limits, "cuda": cuda_limits})


def _run(
    qkv: Tensor, axis: str, key_bias: Tensor | None, row_gate: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    _check(qkv, axis, key_bias, row_gate, scale)
    backend = choose(OPERATOR, qkv)
    if backend == "reference":
        _, lse = fake(qkv, axis, key_bias, row_gate, scale)
        return _reference((qkv, key_bias, row_gate), axis, scale), lse.fill_(-torch.inf)
    return run_kernel(backend, qkv, axis, key_bias, row_gate, scale)


def run_kernel(
    backend: str, qkv: Tensor, axis: str, key_bias: Tensor | None, row_gate: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """`out` and `lse` from the kernel of a backend; arguments that were checked."""
    out, lse = fake(qkv, axis, key_bias, row_gate, scale)
    qkv = _kernels.unit_width(qkv)
    if backend == "cuda":
        qkv = _kernels.aligned_rows(qkv)
    key_bias = None if key_bias is None else key_bias.contiguous()
    row_gate = None if row_gate is None else row_gate.expand(qkv.shape[:4])
    tensors = (qkv, key_bias, row_gate, out, lse)
    arguments = (
        *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
        *_launch_numbers(qkv, row_gate, axis, scale),
    )
    assert extension is not None
    if backend == "cpu":
        extension.alternating_attention_cpu(*arguments, torch.get_num_threads())
    else:
        with _kernels.device_guard(qkv):
            extension.alternating_attention_cuda(*arguments, _kernels.stream_address(qkv))
    return out, lse


def _launch_numbers(qkv: Tensor, row_gate: Tensor | None, axis: str, scale: float | None) -> tuple[Any, ...]:
    *sizes, _, heads, width = qkv.shape
    return (
        sizes,
        _kernels.qkv_steps(qkv),
        (0,) * 4 if row_gate is None else row_gate.stride(),
        _kernels.AXIS_CODES[axis],
        heads,
        width,
        width**-0.5 if scale is None else scale,
        _kernels.DTYPE_CODES[qkv.dtype],
    )


def fake(
    qkv: Tensor, axis: str, key_bias: Tensor | None, row_gate: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """`out` and `lse` without data."""
    *sizes, _, heads, width = qkv.shape
    sequences = math.prod(sizes[d] for d in reference.SEQUENCE_DIMS[axis])
    length = math.prod(sizes[d] for d in range(4) if d not in reference.SEQUENCE_DIMS[axis])
    wide = reference.accumulation_dtype(qkv.dtype)
    return qkv.new_empty((*sizes, heads * width)), qkv.new_empty((sequences, heads, length), dtype=wide)


def _autocast(
    device_type: str,
    qkv: Tensor,
    axis: str,
    key_bias: Tensor | None,
    row_gate: Tensor | None,
    scale: float | None,
) -> tuple[Any, ...]:
    qkv_cast = _common.cast(qkv, torch.get_autocast_dtype(device_type))
    wide = reference.accumulation_dtype(qkv.dtype)
    return qkv_cast, axis, *(None if tensor is None else tensor.to(wide) for tensor in (key_bias, row_gate)), scale


def _run_backward(
    grad: Tensor,
    qkv: Tensor,
    axis: str,
    key_bias: Tensor | None,
    row_gate: Tensor | None,
    scale: float | None,
    out: Tensor,
    lse: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    backend = choose(OPERATOR, qkv)
    if backend == "reference":
        gradients = _common.recompute_gradients(
            lambda *tensors: _reference(tensors, axis, scale), [qkv, key_bias, row_gate], wanted, grad
        )
    else:
        if backend == "cpu" and lse.flatten()[0] == -torch.inf:  # the forward pass ran on the reference
            out, lse = _run(qkv, axis, key_bias, row_gate, scale)
        gradients = kernel_gradients(backend, grad, qkv, axis, key_bias, row_gate, scale, out, lse, wanted)
    return _common.pack_gradients(gradients, qkv)


def kernel_gradients(
    backend: str,
    grad: Tensor,
    qkv: Tensor,
    axis: str,
    key_bias: Tensor | None,
    row_gate: Tensor | None,
    scale: float | None,
    out: Tensor,
    lse: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of qkv, key_bias and row_gate from the kernel of a backend, with its forward pass's `out` and `lse`."""
    qkv, grad, out = _kernels.unit_width(qkv), grad.contiguous(), out.contiguous()
    if backend == "cuda":
        qkv, grad, out = (_kernels.aligned_rows(tensor) for tensor in (qkv, grad, out))
    key_bias = None if key_bias is None else key_bias.contiguous()
    gates = None if row_gate is None else row_gate.expand(qkv.shape[:4])
    grad_qkv, delta = torch.empty_like(qkv, memory_format=torch.contiguous_format), torch.empty_like(lse)
    of_bias = [  # for each head; of every token's own gate
        lse.new_empty((qkv.shape[5], *qkv.shape[:4])) if need and tensor is not None else None
        for tensor, need in zip((key_bias, row_gate), wanted[1:], strict=True)
    ]
    tensors = (grad, qkv, out, lse, key_bias, gates, delta, grad_qkv, *of_bias)
    sizes, qkv_steps, *numbers = _launch_numbers(qkv, gates, axis, scale)
    arguments = (
        *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
        sizes,
        qkv_steps,
        _kernels.qkv_steps(grad_qkv),
        *numbers,
    )
    assert extension is not None
    if backend == "cpu":
        extension.alternating_attention_backward_cpu(*arguments, torch.get_num_threads())
    else:
        with _kernels.device_guard(qkv):
            extension.alternating_attention_backward_cuda(*arguments, _kernels.stream_address(qkv))
    grad_key_bias, grad_gates = (None if gradient is None else gradient.sum(0) for gradient in of_bias)
    grad_row_gate = None if grad_gates is None or row_gate is None else grad_gates.sum_to_size(row_gate.shape)
    return [grad_qkv if wanted[0] else None, grad_key_bias, grad_row_gate]


def _fake_backward(
    grad: Tensor,
    qkv: Tensor,
    axis: str,
    key_bias: Tensor | None,
    row_gate: Tensor | None,
    scale: float | None,
    out: Tensor,
    lse: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    return _common.fake_gradients([qkv, key_bias, row_gate], wanted, qkv)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.axis, key_bias, row_gate, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, key_bias, row_gate, out, lse)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    qkv, key_bias, row_gate, out, lse = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
    if torch.is_grad_enabled():
        with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no second derivatives
            gradients = _common.recompute_gradients(
                lambda *tensors: _reference(tensors, ctx.axis, ctx.scale),
                [qkv, key_bias, row_gate],
                wanted,
                grad,
                create_graph=True,
            )
    else:
        packed = torch.ops.vggt_mv.alternating_attention_backward(
            grad, qkv, ctx.axis, key_bias, row_gate, ctx.scale, out, lse, wanted
        )
        gradients = _common.unpack_gradients(packed, wanted)
    grad_qkv, grad_key_bias, grad_row_gate = gradients
    return grad_qkv, None, grad_key_bias, grad_row_gate, None


# `lse`, `[sequences, h, length]`: the logarithm of every row's sum of exp(logit), for the backward pass. A kernel
# computes it; the reference does not, and says so by -inf (which makes no gradient pass for one).
_ARGUMENTS = "Tensor qkv, str axis, Tensor? key_bias, Tensor? row_gate, float? scale"
_common.define(f"{NAME}({_ARGUMENTS}) -> (Tensor out, Tensor lse)", _run, fake, autocast=_autocast)
_common.define(
    f"{NAME}_backward(Tensor grad, {_ARGUMENTS}, Tensor out, Tensor lse, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
torch.library.register_autograd(f"vggt_mv::{NAME}", _backward, setup_context=_setup_context, lib=_common.LIBRARY)
