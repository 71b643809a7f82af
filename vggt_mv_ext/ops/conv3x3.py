"""A 3 x 3 convolution with what stands around it in a dense head, in one pass: resizing, bias, residual, ReLU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._extension import extension
from ..backends import Operator, choose
from . import _common

NAME = "conv3x3"
ACTIVATIONS = ("none", "relu")

# Below these the transforms take longer than the multiplications that they save, and plain PyTorch is faster.
MIN_CHANNELS = 16
MIN_TILES = 16
# Above, transformed weights, 144 bytes for a pair of channels, leave the caches; and they are memory that is kept.
MAX_CHANNEL_PAIRS = 1 << 18


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    *,
    size: Sequence[int] | None = None,
    offsets: tuple[Tensor, Tensor] | None = None,
    overwrite_residual: bool = False,
) -> Tensor:
    r"""A 3 x 3 convolution with stride 1 that keeps the size of the map, faster on CPUs in inference.

    Formula, with zeros around the map m::

        m[n, c, i, j] = resize(x, (H, W))[n, c, i, j] + rows[i, c] + columns[j, c]
        y[n, o, i, j] = activation(sum_{c, a, b} weight[o, c, a, b] m[n, c, i + a - 1, j + b - 1] + bias[o]
                                   + residual[n, o, i, j]),      activation = identity or max(., 0)

    where resize is bilinear interpolation with corners aligned: row i of H lies at i (h - 1) / (H - 1) in x. The
    kernel makes m tile by tile, so that a large map is never in memory.

    In float32 a CPU computes it by Winograd's F(4 x 4, 3 x 3), a quarter of the multiplications, on maps of at least 16
    tiles of 4 x 4 pixels, with 16 channels or more on either side and no more than 262144 pairs of them. The sums are
    the same in another order: the relative error to float64 is about 1e-6, that of the direct sum 2e-7 (see
    docs/kernels/conv3x3.md). Everything else is PyTorch's own convolution: other devices, dtypes and sizes, and every
    call that is recorded for a backward pass.

    Args:
        x: `[N, C, h, w]`, any strides, best channels-last; float32, float16, bfloat16 or float64; h, w >= 1.
        weight: `[O, C, 3, 3]`, dtype of x.
        bias: `[O]`, dtype of x, or None.
        residual: `[N, O, H, W]`, dtype of x, or None.
        activation: `"none"` or `"relu"`.
        size: (H, W), at least 1 each; None: the size of x.
        offsets: `(rows [H, C], columns [W, C])`, dtype of x, to be added to the map; None: zero.
        overwrite_residual: the result may take `residual`'s memory, so that it must not be used again. It does where
            the CPU kernel runs on a channels-last residual and nothing is being compiled; otherwise nothing changes.

    Returns:
        `[N, O, H, W]` in x's dtype; in memory channels-last, or as `F.conv2d` has it where a call is recorded. Under
        autocast what `F.conv2d` and `+` give.

    Raises:
        TypeError: an argument is not a floating-point tensor, or the dtypes differ.
        ValueError: shapes or devices do not go together, or no such activation.

    Source:
        Winograd, "Arithmetic Complexity of Computations", 1980; Lavin, Gray 2015 (arXiv:1509.09308). Points other than
        0, +-1, +-2 for smaller errors: Barabasz et al. 2018 (arXiv:1803.10986).

    Example:
        >>> import torch
        >>> from vggt_mv_ext import conv3x3
        >>> x = torch.arange(4.0).view(1, 1, 2, 2)
        >>> conv3x3(x, torch.ones(1, 1, 3, 3), residual=-2 * x, activation="relu").flatten().tolist()
        [6.0, 4.0, 2.0, 0.0]
        >>> conv3x3(x, torch.ones(1, 1, 3, 3), size=(1, 3)).flatten().tolist()  # of 0, 0.5, 1
        [0.5, 1.5, 1.5]
    """
    rows, columns = _offsets(offsets)
    arguments = (x, weight, bias, residual, activation, size, rows, columns)
    _check(*arguments, any_dtypes=_common.autocast_may_cast(x))
    if _common.autocast_may_cast(x) or _common.is_plain(x, weight, bias, residual, rows, columns):
        return reference.conv3x3(*arguments)
    alone = size is None and offsets is None
    if overwrite_residual and residual is not None and alone and _may_overwrite(x, weight, bias, residual):
        torch.ops.vggt_mv.conv3x3_(x, weight, bias, residual, activation)
        return residual
    result: Tensor = torch.ops.vggt_mv.conv3x3(*arguments)
    return result


def _offsets(offsets: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    if offsets is None:
        return None, None
    if not isinstance(offsets, (tuple, list)) or len(offsets) != 2:
        raise TypeError(f"{NAME}: offsets must be a pair (rows, columns) or None, got {type(offsets).__name__}")
    return offsets[0], offsets[1]


def _may_overwrite(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and choose(OPERATOR, x, weight, bias, residual) == "cpu"
        and residual.is_contiguous(memory_format=torch.channels_last)
        and residual.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    )


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    size: Sequence[int] | None = None,
    row_offsets: Tensor | None = None,
    column_offsets: Tensor | None = None,
    *,
    any_dtypes: bool = False,
) -> None:
    _common.check_tensor(NAME, "x", x)
    _common.check_tensor(NAME, "weight", weight)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{NAME}: x must have shape [N, C, h, w] with C, h, w >= 1, got {list(x.shape)}")
    channels = x.shape[1]
    _common.check_shape(NAME, "weight", weight, (*weight.shape[:1], channels, 3, 3), "[O, C, 3, 3]")
    if weight.shape[0] == 0:
        raise ValueError(f"{NAME}: weight must have shape [O, C, 3, 3] with O >= 1, got {list(weight.shape)}")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"{NAME}: size must be (H, W) with H, W >= 1, got {tuple(size)}")
    height, width = _size(x, size)
    shapes = {
        "weight": (weight, tuple(weight.shape), "[O, C, 3, 3]"),
        "bias": (bias, (weight.shape[0],), "[O]"),
        "residual": (residual, (x.shape[0], weight.shape[0], height, width), "[N, O, H, W]"),
        "offsets of rows": (row_offsets, (height, channels), "[H, C]"),
        "offsets of columns": (column_offsets, (width, channels), "[W, C]"),
    }
    for name, (tensor, shape, rule) in shapes.items():
        if tensor is None:
            continue
        _common.check_tensor(NAME, name, tensor)
        _common.check_shape(NAME, name, tensor, shape, rule)
        _common.check_device(NAME, name, tensor, "x", x)
        if not any_dtypes:
            _common.check_same_dtype(NAME, name, tensor, "x", x)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{NAME}: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")


def _size(x: Tensor, size: Sequence[int] | None) -> tuple[int, int]:
    """Of the map that is convolved."""
    height, width = x.shape[-2:] if size is None else size
    return height, width


def _kernel_limits(x: Tensor, weight: Tensor | None = None, *others: Tensor | None) -> str | None:
    if x.dtype != torch.float32:
        return f"{str(x.dtype).removeprefix('torch.')} runs on the reference alone"
    if _common.is_recorded(x, weight, *others):
        return "gradients are recorded"
    if x.dim() != 4:
        return "x is no [N, C, h, w]"
    images, channels, height, width = x.shape
    outputs = channels if weight is None else weight.shape[0]
    if min(channels, outputs) < MIN_CHANNELS:
        return f"{channels} to {outputs} channels are too few, from {MIN_CHANNELS} on it is worth transforming them"
    tiles = images * (-(-height // 4)) * (-(-width // 4))
    if tiles < MIN_TILES:
        return f"{tiles} tiles of 4 x 4 pixels are too few, from {MIN_TILES} on it is worth transforming the weights"
    if channels * outputs > MAX_CHANNEL_PAIRS:
        return f"{channels} to {outputs} channels are too many for transformed weights to stay in the caches"
    if max(height, width) > 2**31 - 1:
        return f"sizes must fit into 31 bits, got {list(x.shape)}"
    return None


OPERATOR = Operator(NAME, {"cpu": _kernel_limits}, falls_back=True)


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    size: Sequence[int] | None,
    row_offsets: Tensor | None,
    column_offsets: Tensor | None,
) -> Tensor:
    arguments = (x, weight, bias, residual, activation, size, row_offsets, column_offsets)
    _check(*arguments)
    if choose(OPERATOR, x, weight, bias, residual, row_offsets, column_offsets) == "reference":
        return _channels_last(reference.conv3x3(*arguments))
    out = _fake(*arguments)
    residual = None if residual is None else _channels_last(residual)
    _launch(x, weight, bias, residual, activation, out, row_offsets, column_offsets)
    return out


def _run_inplace(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, activation: str) -> None:
    _check(x, weight, bias, residual, activation)
    memory = torch.channels_last
    if choose(OPERATOR, x, weight, bias) != "cpu" or not residual.is_contiguous(memory_format=memory):
        residual.copy_(_run(x, weight, bias, residual, activation, None, None, None))
    else:
        _launch(x, weight, bias, residual, activation, residual)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out: Tensor,
    row_offsets: Tensor | None = None,
    column_offsets: Tensor | None = None,
) -> None:
    """Sums up in `out`, which may be `residual`; both are channels-last. The size of the map is that of `out`."""
    x = _channels_last(x)
    others = [None if tensor is None else tensor.contiguous() for tensor in (bias, row_offsets, column_offsets)]
    tensors = (x, weight.contiguous(), others[0], residual, *others[1:], out)
    assert extension is not None
    extension.conv3x3_cpu(
        *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
        x.shape[0],
        *x.shape[2:],
        *out.shape[2:],
        x.shape[1],
        out.shape[1],
        activation == "relu",
        torch.get_num_threads(),
    )


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    size: Sequence[int] | None,
    *_: Tensor | None,
) -> Tensor:
    shape = (x.shape[0], weight.shape[0], *_size(x, size))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fake_inplace(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, activation: str) -> None:
    return None


def _autocast(device_type: str, *arguments: Any) -> tuple[Any, ...]:
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(_common.cast(value, dtype) if isinstance(value, Tensor) else value for value in arguments)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, residual, ctx.activation, ctx.size, *offsets = inputs
    ctx.save_for_backward(x, weight, bias, residual, *offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Only who calls the registered operator itself comes here: the public function records plain PyTorch."""
    wanted = ctx.needs_input_grad
    gradients = _common.recompute_gradients(
        lambda x, weight, bias, residual, *offsets: reference.conv3x3(
            x, weight, bias, residual, ctx.activation, ctx.size, *offsets
        ),
        ctx.saved_tensors,
        (*wanted[:4], *wanted[6:]),
        grad,
        create_graph=torch.is_grad_enabled(),
    )
    return *gradients[:4], None, None, *gradients[4:]


_common.define(
    f"{NAME}(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation, SymInt[]? size,"
    " Tensor? row_offsets, Tensor? column_offsets) -> Tensor",
    _run,
    _fake,
    autocast=_autocast,
)
_common.define(
    f"{NAME}_(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) residual, str activation) -> ()",
    _run_inplace,
    _fake_inplace,
)
torch.library.register_autograd(f"vggt_mv::{NAME}", _backward, setup_context=_setup_context, lib=_common.LIBRARY)
