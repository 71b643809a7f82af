"""LayerNorm and 2-D rotary position embedding of queries and keys, on the packed output of the qkv projection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._extension import extension
from ..backends import Operator, choose
from . import _common, _kernels

NAME = "qk_norm_rope"

# How many blocks of tokens leave partial sums for the gradients of the norms on CPU: enough to share out, and the same
# whatever the number of threads, so that the sums are too.
CPU_BLOCKS = 64

Norm = tuple[Tensor, Tensor]


def qk_norm_rope(
    qkv: Tensor,
    q_norm: Norm | None,
    k_norm: Norm | None,
    grid_hw: tuple[int, int],
    num_special: int,
    base: float = 100.0,
    eps: float = 1e-5,
    *,
    special_position: int = 0,
    inplace: bool = False,
) -> Tensor:
    r"""Normalises the queries and keys of every head and turns them by the position of their token.

    Formula, for every q and k of a token at (row, column), with `w = D / 2`::

        u = (q - mean(q)) / sqrt(var(q) + eps) * weight + bias           (over the D features; not without a norm)
        angle_j = p * base**(-2 j / w)                                   j < w / 2
        (u_j, u_{j + w/2}) -> (u_j cos angle_j - u_{j + w/2} sin angle_j, u_{j + w/2} cos angle_j + u_j sin angle_j)

    where the first w features turn with `p = row` and the last w with `p = column`. The tokens of a frame are
    `num_special` special ones at (special_position, special_position), then the patches row by row, the first at
    (1, 1). Values pass unchanged. Arithmetic is in float32 (float64 for float64 inputs).

    Args:
        qkv: `[B, T, N, P, 3, h, D]`: queries, keys, values of h heads of width D, a multiple of 4; any strides;
            float32, float16, bfloat16 or float64.
        q_norm: `(weight [D], bias [D])` of the queries' LayerNorm, or None for no norm.
        k_norm: the same of the keys. The dtype of all of them is that of qkv or float32.
        grid_hw: height and width of the patch grid in patches; `P = num_special + height * width`.
        num_special: how many special tokens stand first in a frame (camera and registers).
        base: the base of the frequencies, above 0.
        eps: added to the variance, at least 0.
        special_position: row and column of the special tokens, at least 0.
        inplace: the result may take qkv's memory, so that qkv must not be used again. It does where a kernel runs, no
            gradient is recorded and nothing is being compiled; otherwise nothing changes.

    Returns:
        A new tensor of qkv's shape and dtype, contiguous, or `qkv` itself (see inplace). Autocast leaves its
        dtype alone.

    Raises:
        TypeError: an argument has the wrong type, or the dtypes do not go together.
        ValueError: shapes, devices or numbers do not go together.

    Source:
        Rotary embedding: Su et al. 2021 (arXiv:2104.09864), in two dimensions as in Heo et al. 2024 (arXiv:2403.13298);
        norm of queries and keys: Henry et al. 2020 (arXiv:2010.04245), Dehghani et al. 2023 (arXiv:2302.05442).

    Example:
        >>> import torch
        >>> from vggt_mv_ext import qk_norm_rope
        >>> qkv = torch.ones(1, 1, 1, 2, 3, 1, 4)      # one special token, one patch, one head of width 4
        >>> out = qk_norm_rope(qkv, None, None, (1, 1), num_special=1)
        >>> [round(value, 3) for value in out[0, 0, 0, 1, 0, 0].tolist()]     # the patch's query, turned by 1 radian
        [-0.301, 1.382, -0.301, 1.382]
        >>> bool((out[0, 0, 0, 0] == 1).all() and (out[..., 2, :, :] == 1).all())
        True
    """
    q_weight, q_bias = _check_norm("q_norm", q_norm)
    k_weight, k_bias = _check_norm("k_norm", k_norm)
    if not isinstance(grid_hw, (tuple, list, torch.Size)) or len(grid_hw) != 2:
        raise TypeError(f"{NAME}: grid_hw must be a pair (height, width) of integers, got {grid_hw!r}")
    height, width = grid_hw
    arguments = (qkv, q_weight, q_bias, k_weight, k_bias, height, width, num_special, base, eps, special_position)
    _check(*arguments, any_dtypes=_common.autocast_may_cast(qkv))
    if reference.in_forward_mode():
        return _reference(arguments[:5], arguments[5:])
    if inplace and _may_overwrite(*arguments[:5]):
        torch.ops.vggt_mv.qk_norm_rope_(*arguments)
        return qkv
    return torch.ops.vggt_mv.qk_norm_rope(*arguments)


def _may_overwrite(qkv: Tensor, *norms: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or (backend := choose(OPERATOR, qkv)) == "reference":
        return False
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (qkv, *norms)):
        return False
    repeats = any(stride == 0 and size > 1 for stride, size in zip(qkv.stride(), qkv.shape, strict=True))
    return not repeats and _readable(backend, qkv) is qkv


def _check_norm(name: str, norm: Norm | None) -> tuple[Tensor | None, Tensor | None]:
    if norm is None:
        return None, None
    if not isinstance(norm, (tuple, list)) or len(norm) != 2:
        raise TypeError(f"{NAME}: {name} must be a pair (weight, bias) of tensors or None, got {type(norm).__name__}")
    for part, tensor in zip(("weight", "bias"), norm, strict=True):
        _common.check_tensor(NAME, f"{name} {part}", tensor)
    return norm[0], norm[1]


def _check(
    qkv: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    height: int,
    width: int,
    num_special: int,
    base: float,
    eps: float,
    special_position: int,
    *,
    any_dtypes: bool = False,
) -> None:
    _common.check_qkv(NAME, qkv)
    if qkv.shape[6] % 4 != 0:
        raise ValueError(f"{NAME}: qkv must have a head width D that is a multiple of 4, got D = {qkv.shape[6]}")
    for name, number in (("height", height), ("width", width)):
        if number < 0:
            raise ValueError(f"{NAME}: grid_hw must have a {name} of at least 0, got {number}")
    for name, number in (("num_special", num_special), ("special_position", special_position)):
        if number < 0:
            raise ValueError(f"{NAME}: {name} must be at least 0, got {number}")
    if num_special + height * width != qkv.shape[3]:
        raise ValueError(
            f"{NAME}: qkv must have P = num_special + height * width = {num_special} + {height} * {width} = "
            f"{num_special + height * width} tokens a frame, got P = {qkv.shape[3]}"
        )
    if not 0 < base < math.inf:
        raise ValueError(f"{NAME}: base must be above 0 and finite, got {base}")
    if not eps >= 0:
        raise ValueError(f"{NAME}: eps must be at least 0, got {eps}")
    named = (
        ("q_norm weight", q_weight),
        ("q_norm bias", q_bias),
        ("k_norm weight", k_weight),
        ("k_norm bias", k_bias),
    )
    for name, tensor in named:
        if tensor is None:
            continue
        _common.check_shape(NAME, name, tensor, qkv.shape[6:], "[D]")
        _common.check_device(NAME, name, tensor, "qkv", qkv)
        if tensor.dtype not in (qkv.dtype, torch.float32) and not any_dtypes:
            raise TypeError(
                f"{NAME}: {name} must have the dtype of qkv or float32; "
                f"got {_common.describe(tensor)} with qkv {_common.describe(qkv)}"
            )


def _reference(tensors: Sequence[Any], numbers: Sequence[Any]) -> Tensor:
    qkv, q_weight, q_bias, k_weight, k_bias = tensors
    height, width, num_special, base, eps, special_position = numbers
    q_norm = None if q_weight is None else (q_weight, q_bias)
    k_norm = None if k_weight is None else (k_weight, k_bias)
    return reference.qk_norm_rope(
        qkv, q_norm, k_norm, (height, width), num_special, base, eps, special_position=special_position
    )


def _cpu_limits(qkv: Tensor, *_: Tensor | None) -> str | None:
    if qkv.numel() == 0:
        return "an empty tensor needs no kernel"
    if qkv.dtype == torch.float64:
        return "float64 runs on the reference alone"
    if max(qkv.shape) > 2**31 - 1:
        return f"sizes must fit into 31 bits, got {list(qkv.shape)}"
    return None


CUDA_WIDTHS = (32, 64, 96, 128)


def _cuda_limits(qkv: Tensor, *_: Tensor | None) -> str | None:
    reason = _cpu_limits(qkv)
    if reason is None and qkv.shape[-1] not in CUDA_WIDTHS:
        return f"D must be 32, 64, 96 or 128, got {qkv.shape[-1]}"
    return reason


OPERATOR = Operator(NAME, {"cpu": _cpu_limits, "cuda": _cuda_limits})


def _run(qkv: Tensor, *arguments: Any) -> Tensor:
    _check(qkv, *arguments)
    backend = choose(OPERATOR, qkv)
    if backend == "reference":
        return _reference((qkv, *arguments[:4]), arguments[4:])
    out = _fake(qkv)
    _launch(backend, _readable(backend, qkv), out, arguments)
    return out


def _run_inplace(qkv: Tensor, *arguments: Any) -> None:
    _check(qkv, *arguments)
    backend = choose(OPERATOR, qkv)
    if backend == "reference":
        qkv.copy_(_reference((qkv, *arguments[:4]), arguments[4:]))
    elif _readable(backend, qkv) is qkv:
        _launch(backend, qkv, qkv, arguments)
    else:
        qkv.copy_(_run(qkv, *arguments))


def _fake_inplace(qkv: Tensor, *arguments: Any) -> None:
    return None


def _readable(backend: str, qkv: Tensor) -> Tensor:
    """`qkv` where the kernel can read it as it lies, else a copy."""
    qkv = _kernels.unit_width(qkv)
    return _kernels.aligned_rows(qkv) if backend == "cuda" else qkv


def _launch(backend: str, qkv: Tensor, out: Tensor, arguments: Sequence[Any]) -> None:
    norms, norm_dtype = _norm_parameters(backend, arguments[:4])
    height, width, num_special, base, eps, special_position = arguments[4:]
    table = _table(qkv, height, width, base, special_position)
    fields = (
        *(0 if tensor is None else tensor.data_ptr() for tensor in (qkv, out, *norms, table)),
        qkv.shape[:4],
        _kernels.qkv_steps(qkv),
        _kernels.qkv_steps(out),
        *qkv.shape[5:],
        num_special,
        width,
        special_position,
        eps,
        _kernels.DTYPE_CODES[qkv.dtype],
        _kernels.DTYPE_CODES[norm_dtype],
    )
    assert extension is not None
    if backend == "cpu":
        extension.qk_norm_rope_cpu(*fields, torch.get_num_threads())
    else:
        with _kernels.device_guard(qkv):
            extension.qk_norm_rope_cuda(*fields, _kernels.stream_address(qkv))


def _norm_parameters(backend: str, norms: Sequence[Tensor | None]) -> tuple[list[Tensor | None], torch.dtype]:
    """The norms' parameters in one dtype: float32, or on CUDA the one that all of them have, which spares the casts."""
    if backend == "cpu":
        return [None if norm is None else norm.to(torch.float32).contiguous() for norm in norms], torch.float32
    dtypes = {norm.dtype for norm in norms if norm is not None}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return [None if norm is None else _kernels.aligned_rows(norm.to(dtype).contiguous()) for norm in norms], dtype


def _table(qkv: Tensor, height: int, width: int, base: float, special_position: int) -> Tensor:
    return _kernels.rotation_table(max(height, width, special_position) + 1, qkv.shape[6] // 4, base, qkv.device)


def _fake(qkv: Tensor, *arguments: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _autocast(device_type: str, qkv: Tensor, *arguments: Any) -> tuple[Any, ...]:
    norms = (
        tensor if tensor is None or tensor.dtype == qkv.dtype else _common.cast(tensor, torch.float32)
        for tensor in arguments[:4]
    )
    return qkv, *norms, *arguments[4:]


def _run_backward(grad: Tensor, qkv: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    norms, numbers, wanted = arguments[:4], arguments[4:10], arguments[10]
    gradients: Sequence[Tensor | None]
    backend = choose(OPERATOR, qkv)
    if backend == "reference":
        gradients = _common.recompute_gradients(
            lambda *tensors: _reference(tensors, numbers), [qkv, *norms], wanted, grad
        )
    else:
        gradients = _launch_backward(backend, grad, qkv, norms, numbers, any(wanted[1:]))
    needed = (gradient if need else None for gradient, need in zip(gradients, wanted, strict=True))
    return _common.pack_gradients(list(needed), qkv)


def _launch_backward(
    backend: str,
    grad: Tensor,
    qkv: Tensor,
    norms: Sequence[Tensor | None],
    numbers: Sequence[Any],
    sums: bool,
) -> list[Tensor | None]:
    height, width, num_special, base, eps, special_position = numbers
    grad, qkv = _readable(backend, grad), _readable(backend, qkv)
    grad_qkv = qkv.new_empty(qkv.shape)
    weights, norm_dtype = _norm_parameters(backend, (norms[0], norms[2]))
    table = _table(qkv, height, width, base, special_position)
    blocks = _blocks(backend, qkv)
    partial_sums = table.new_empty((2, blocks, 2, qkv.shape[6])) if sums else None
    grad_norms = table.new_empty((2, 2, qkv.shape[6])) if sums else None
    tensors = (grad, qkv, grad_qkv, *weights, table, partial_sums, grad_norms)
    fields = (
        *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
        qkv.shape[:4],
        *(_kernels.qkv_steps(tensor) for tensor in (grad, qkv, grad_qkv)),
        *qkv.shape[5:],
        num_special,
        width,
        special_position,
        blocks,
        eps,
        _kernels.DTYPE_CODES[qkv.dtype],
        _kernels.DTYPE_CODES[norm_dtype],
    )
    assert extension is not None
    if backend == "cpu":
        extension.qk_norm_rope_backward_cpu(*fields, torch.get_num_threads())
    else:
        with _kernels.device_guard(qkv):
            extension.qk_norm_rope_backward_cuda(*fields, _kernels.stream_address(qkv))
    if grad_norms is None:
        return [grad_qkv, None, None, None, None]
    found = grad_norms.flatten(0, 1).unbind()
    return [
        grad_qkv,
        *(None if norm is None else total.to(norm.dtype, copy=True) for norm, total in zip(norms, found, strict=True)),
    ]


def _blocks(backend: str, qkv: Tensor) -> int:
    """How many blocks of tokens leave partial sums for the gradients of the norms."""
    if backend == "cpu":
        return min(CPU_BLOCKS, math.prod(qkv.shape[:4]))
    assert extension is not None
    with _kernels.device_guard(qkv):
        return int(extension.qk_norm_rope_blocks(qkv.shape[:4]))


def _fake_backward(grad: Tensor, qkv: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _common.fake_gradients([qkv, *arguments[:4]], arguments[-1], qkv)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.numbers = inputs[5:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors, numbers, wanted = ctx.saved_tensors, ctx.numbers, list(ctx.needs_input_grad[:5])
    if torch.is_grad_enabled():
        gradients = _common.recompute_gradients(
            lambda *given: _reference(given, numbers), tensors, wanted, grad, create_graph=True
        )
    else:
        packed = torch.ops.vggt_mv.qk_norm_rope_backward(grad, *tensors, *numbers, wanted)
        gradients = _common.unpack_gradients(packed, wanted)
    return *gradients, *(None for _ in numbers)


_ARGUMENTS = (
    "Tensor qkv, Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, Tensor? k_bias, SymInt height, SymInt width,"
    " SymInt num_special, float base, float eps, SymInt special_position"
)
_common.define(f"{NAME}({_ARGUMENTS}) -> Tensor", _run, _fake, autocast=_autocast)
_common.define(
    f"{NAME}_({_ARGUMENTS.replace('Tensor', 'Tensor(a!)', 1)}) -> ()", _run_inplace, _fake_inplace, autocast=_autocast
)
_common.define(
    f"{NAME}_backward(Tensor grad, {_ARGUMENTS}, bool[5] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
torch.library.register_autograd(f"vggt_mv::{NAME}", _backward, setup_context=_setup_context, lib=_common.LIBRARY)
