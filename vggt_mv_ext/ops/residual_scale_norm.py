"""`residual = x + gamma * y` and its LayerNorm in one pass: LayerScale, residual addition, the next norm of a block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._extension import extension
from ..backends import Operator, choose
from . import _common, _kernels

NAME = "residual_scale_norm"
LOW = (torch.float16, torch.bfloat16)

# How many blocks of rows leave partial sums for the gradients of the parameters on CPU: enough to share out, and the
# same whatever the number of threads, so that the sums are too.
CPU_ROW_BLOCKS = 64


def residual_scale_norm(
    x: Tensor,
    y: Tensor,
    gamma: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Adds a scaled branch to the residual stream and normalises the sum for the next layer.

    Formula, for every row of C features::

        residual = x + gamma * y
        normed   = (residual - mean(residual)) / sqrt(var(residual) + eps) * weight + bias

    The sum is rounded to x's dtype before it is normalised; arithmetic and statistics are in float32 (float64 for
    float64 inputs). Gradients reach all five tensors.

    Args:
        x: the residual stream, `[..., C]`, any strides; float32, float16, bfloat16 or float64.
        y: the branch, same shape; the dtype of x, or float16/bfloat16 beside a float32 x.
        gamma: LayerScale, `[C]`.
        weight: LayerNorm's weight, `[C]`.
        bias: LayerNorm's bias, `[C]`. All three have one dtype, that of x or float32.
        eps: added to the variance, at least 0.
        out: where `residual` and `normed` are written, tensors of their shapes, dtypes and device that overlap nothing
            else; x itself may take `residual` and y itself `normed`. Not while gradients are recorded. Fresh memory
            costs a CPU several times what the operator does: the system hands it out page by page.

    Returns:
        `residual` in x's dtype and `normed` in y's dtype, shaped like x: the tensors of `out`, else contiguous ones.
        Under autocast dtypes are kept, save that x is widened to a y that it cannot hold and parameters of another
        dtype become float32.

    Raises:
        TypeError: an argument is not a floating-point tensor, or the dtypes do not go together.
        ValueError: shapes or devices do not go together, or eps is negative.
        RuntimeError: `out` is given and gradients are recorded.

    Source:
        LayerNorm: Ba, Kiros, Hinton 2016 (arXiv:1607.06450); LayerScale: Touvron et al. 2021 (arXiv:2103.17239).

    Example:
        >>> import torch
        >>> from vggt_mv_ext import residual_scale_norm
        >>> x, y = torch.zeros(2, 4), torch.tensor([[0.0, 2.0, 0.0, 2.0], [1.0, 1.0, 3.0, 3.0]])
        >>> residual, normed = residual_scale_norm(x, y, torch.full((4,), 0.5), torch.ones(4), torch.zeros(4), eps=0.0)
        >>> residual.tolist()
        [[0.0, 1.0, 0.0, 1.0], [0.5, 0.5, 1.5, 1.5]]
        >>> normed.round(decimals=3).tolist()
        [[-1.0, 1.0, -1.0, 1.0], [-1.0, -1.0, 1.0, 1.0]]
    """
    fits = _fits(x, y, gamma, weight, bias, eps)
    if not fits:
        _check(x, y, gamma, weight, bias, eps, any_dtypes=_common.autocast_may_cast(x))
    if out is not None:
        _check_out(out, x, y, gamma, weight, bias)
    if reference.in_forward_mode():
        residual, normed = reference.residual_scale_norm(x, y, gamma, weight, bias, eps)
    elif fits and out is not None:
        torch.ops.vggt_mv.residual_scale_norm_out(x, y, gamma, weight, bias, eps, *out)
        return out
    else:
        residual, normed, _, _ = torch.ops.vggt_mv.residual_scale_norm(x, y, gamma, weight, bias, eps)
    return (residual, normed) if out is None else (out[0].copy_(residual), out[1].copy_(normed))


_DTYPES = frozenset(
    (x, y, parameter)
    for x in _common.FLOATING
    for y in (x, *(LOW if x == torch.float32 else ()))
    for parameter in (x, torch.float32)
)


def _fits(x: Tensor, y: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor, eps: float) -> bool:
    """Whether `_check` has nothing to say, in a fraction of the time: this runs in every call, twice."""
    try:
        shape, dtype, device = x.shape, gamma.dtype, x.device
        return (
            len(shape) > 0
            and shape[-1] > 0
            and y.shape == shape
            and gamma.shape == weight.shape == bias.shape == shape[-1:]
            and weight.dtype is dtype
            and bias.dtype is dtype
            and (x.dtype, y.dtype, dtype) in _DTYPES
            and y.device == gamma.device == weight.device == bias.device == device
            and eps >= 0
        )
    except (AttributeError, TypeError):
        return False


def _check_out(out: tuple[Tensor, Tensor], x: Tensor, y: Tensor, *parameters: Tensor) -> None:
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(f"{NAME}: out must be a tuple of two tensors, got {type(out).__name__}")
    for name, to, like_name, like in (("out[0]", out[0], "x", x), ("out[1]", out[1], "y", y)):
        _common.check_tensor(NAME, name, to)
        _common.check_shape(NAME, name, to, like.shape, f"of {like_name}")
        _common.check_same_dtype(NAME, name, to, like_name, like)
        _common.check_device(NAME, name, to, like_name, like)
    if _common.is_recorded(x, y, *parameters, *out):
        raise RuntimeError(f"{NAME}: out must be None while gradients are recorded")


def _check(
    x: Tensor, y: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor, eps: float, *, any_dtypes: bool = False
) -> None:
    named = (("x", x), ("y", y), ("gamma", gamma), ("weight", weight), ("bias", bias))
    for name, tensor in named:
        _common.check_tensor(NAME, name, tensor)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{NAME}: x must have shape [..., C] with C >= 1, got {list(x.shape)}")
    _common.check_shape(NAME, "y", y, x.shape, "of x")
    for name, tensor in named[2:]:
        _common.check_shape(NAME, name, tensor, x.shape[-1:], "[C]")
    for name, tensor in named[1:]:
        _common.check_device(NAME, name, tensor, "x", x)
    if not eps >= 0:
        raise ValueError(f"{NAME}: eps must be at least 0, got {eps}")
    if any_dtypes:
        return
    if y.dtype != x.dtype and not (x.dtype == torch.float32 and y.dtype in LOW):
        raise TypeError(
            f"{NAME}: y must have the dtype of x, or be float16 or bfloat16 beside a float32 x; "
            f"got x {_common.describe(x)} and y {_common.describe(y)}"
        )
    for name, tensor in named[2:]:
        if tensor.dtype != gamma.dtype or tensor.dtype not in (x.dtype, torch.float32):
            raise TypeError(
                f"{NAME}: gamma, weight and bias must have one dtype, that of x or float32; "
                f"got {name} {_common.describe(tensor)} with gamma {_common.describe(gamma)} "
                f"and x {_common.describe(x)}"
            )


def _kernel_limits(x: Tensor, *_: Tensor) -> str | None:
    if x.numel() == 0:
        return "an empty tensor needs no kernel"
    if x.dtype == torch.float64:
        return "float64 runs on the reference alone"
    if x.shape[-1] > 2**31 - 1:
        return f"C must fit into 31 bits, got {x.shape[-1]}"
    return None


OPERATOR = Operator(NAME, {"cpu": _kernel_limits, "cuda": _kernel_limits})


def _run(
    x: Tensor, y: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not _fits(x, y, gamma, weight, bias, eps):
        _check(x, y, gamma, weight, bias, eps)
    backend = choose(OPERATOR, x)
    if backend == "reference":
        residual, normed = reference.residual_scale_norm(x, y, gamma, weight, bias, eps)
        residual, normed = residual.contiguous(), normed.contiguous()
        return residual, normed, *reference.layer_norm_statistics(residual, eps)

    results = _fake(x, y, gamma, weight, bias, eps)
    _launch(backend, x, y, gamma, weight, bias, eps, results)
    return results


def _run_out(
    x: Tensor, y: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor, normed: Tensor
) -> None:
    if not _fits(x, y, gamma, weight, bias, eps):
        _check(x, y, gamma, weight, bias, eps)
    backend = choose(OPERATOR, x)
    if backend != "cpu" or not (residual.is_contiguous() and normed.is_contiguous()):
        for out, result in zip((residual, normed), _run(x, y, gamma, weight, bias, eps)):
            out.copy_(result)
        return
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    _launch(backend, x, y, gamma, weight, bias, eps, (residual, normed, mean, rstd))


def _fake_out(
    x: Tensor, y: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor, normed: Tensor
) -> None:
    return None


def _launch(
    backend: str,
    x: Tensor,
    y: Tensor,
    gamma: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    results: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    x_rows, y_rows = _kernels.as_rows(x), _kernels.as_rows(y)
    gamma, weight, bias = gamma.contiguous(), weight.contiguous(), bias.contiguous()
    arguments = (
        *(t.data_ptr() for t in (x_rows, y_rows, gamma, weight, bias, *results)),
        x_rows.shape[0],
        x_rows.shape[1],
        x_rows.stride(0),
        y_rows.stride(0),
        eps,
        *(_kernels.DTYPE_CODES[t.dtype] for t in (x, y, gamma)),
    )
    assert extension is not None
    if backend == "cpu":
        extension.residual_scale_norm_cpu(*arguments, torch.get_num_threads())
    else:
        with _kernels.device_guard(x):
            extension.residual_scale_norm_cuda(*arguments, _kernels.stream_address(x))


def _fake(
    x: Tensor, y: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[:-1], dtype=reference.accumulation_dtype(x.dtype))
    residual = torch.empty_like(x, memory_format=torch.contiguous_format)
    return residual, torch.empty_like(y, memory_format=torch.contiguous_format), mean, torch.empty_like(mean)


def _autocast(
    device_type: str, x: Tensor, y: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Any, ...]:
    if y.dtype != x.dtype and not (x.dtype == torch.float32 and y.dtype in LOW):
        wide = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(wide), y.to(wide)
    parameters = [gamma, weight, bias]
    if any(tensor.dtype != gamma.dtype or tensor.dtype not in (x.dtype, torch.float32) for tensor in parameters):
        parameters = [tensor.to(torch.float32) for tensor in parameters]
    return x, y, *parameters, eps


def _run_backward(
    grad_residual: Tensor | None,
    grad_normed: Tensor | None,
    residual: Tensor,
    y: Tensor,
    gamma: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    parameters: bool,
) -> tuple[Tensor, ...]:
    backend = choose(OPERATOR, residual)
    if backend == "reference":
        return reference.residual_scale_norm_backward(
            grad_residual, grad_normed, residual, y, gamma, weight, mean, rstd
        )

    assert extension is not None
    if grad_residual is not None:
        grad_residual = grad_residual.contiguous()
    if grad_normed is not None:
        grad_normed = grad_normed.contiguous()
    gamma, weight, residual, y_rows = (
        gamma.contiguous(),
        weight.contiguous(),
        residual.contiguous(),
        _kernels.as_rows(y),
    )
    rows, features = y_rows.shape
    grad_x, grad_y = residual.new_empty(residual.shape), y.new_empty(y.shape)
    if backend == "cpu":
        row_blocks = min(CPU_ROW_BLOCKS, rows)
    else:
        with _kernels.device_guard(y):
            row_blocks = extension.residual_scale_norm_row_blocks(rows, features)
    partial_sums = mean.new_empty((row_blocks, 3, features)) if parameters else None
    grad_parameters = mean.new_empty((3, features)) if parameters else None
    tensors = (grad_residual, grad_normed, residual, y_rows, gamma, weight, mean.contiguous(), rstd.contiguous())
    arguments = (
        *(0 if t is None else t.data_ptr() for t in (*tensors, grad_x, grad_y, partial_sums, grad_parameters)),
        rows,
        features,
        row_blocks,
        y_rows.stride(0),
        *(_kernels.DTYPE_CODES[t.dtype] for t in (residual, y, gamma)),
    )
    if backend == "cpu":
        extension.residual_scale_norm_backward_cpu(*arguments, torch.get_num_threads())
    else:
        with _kernels.device_guard(residual):
            extension.residual_scale_norm_backward_cuda(*arguments, _kernels.stream_address(residual))
    if grad_parameters is None:
        return grad_x, grad_y, *(torch.zeros_like(t) for t in (gamma, weight, weight))
    grad_gamma, grad_weight, grad_bias = (t.to(gamma.dtype, copy=True) for t in grad_parameters.unbind())
    return grad_x, grad_y, grad_gamma, grad_weight, grad_bias


def _fake_backward(
    grad_residual: Tensor | None,
    grad_normed: Tensor | None,
    residual: Tensor,
    y: Tensor,
    gamma: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    parameters: bool,
) -> tuple[Tensor, ...]:
    grad_parameters = (gamma.new_empty(gamma.shape) for _ in range(3))
    return residual.new_empty(residual.shape), y.new_empty(y.shape), *grad_parameters


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    _, y, gamma, weight, _, eps = inputs
    residual, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(residual, y, gamma, weight, mean, rstd)
    ctx.eps = eps


def _backward(
    ctx: Any, grad_residual: Tensor | None, grad_normed: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_residual is None and grad_normed is None:
        return (None,) * 6
    residual, y, gamma, weight, mean, rstd = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: the gradients are to be differentiated again
        mean, rstd = reference.layer_norm_statistics(residual, ctx.eps)
        gradients = reference.residual_scale_norm_backward(
            grad_residual, grad_normed, residual, y, gamma, weight, mean, rstd
        )
    else:
        gradients = torch.ops.vggt_mv.residual_scale_norm_backward(
            grad_residual, grad_normed, residual, y, gamma, weight, mean, rstd, any(ctx.needs_input_grad[2:5])
        )
    return *(gradient if need else None for gradient, need in zip(gradients, ctx.needs_input_grad)), None


_common.define(
    f"{NAME}(Tensor x, Tensor y, Tensor gamma, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor residual, Tensor normed, Tensor mean, Tensor rstd)",
    _run,
    _fake,
    autocast=_autocast,
)
_common.define(
    f"{NAME}_out(Tensor x, Tensor y, Tensor gamma, Tensor weight, Tensor bias, float eps, Tensor(a!) residual,"
    " Tensor(b!) normed) -> ()",
    _run_out,
    _fake_out,
)
_common.define(
    f"{NAME}_backward(Tensor? grad_residual, Tensor? grad_normed, Tensor residual, Tensor y, Tensor gamma,"
    " Tensor weight, Tensor mean, Tensor rstd, bool parameters) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
torch.library.register_autograd(f"vggt_mv::{NAME}", _backward, setup_context=_setup_context, lib=_common.LIBRARY)
