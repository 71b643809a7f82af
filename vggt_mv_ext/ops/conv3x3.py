"""A 3 x 3 convolution with what follows it in a dense head, bias, residual and ReLU, in one pass."""

from __future__ import annotations

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
    overwrite_residual: bool = False,
) -> Tensor:
    r"""A 3 x 3 convolution with stride 1 that keeps the size of the map, faster on CPUs in inference.

    Formula, with zeros around the image::

        y[n, o, i, j] = activation(sum_{c, a, b} weight[o, c, a, b] x[n, c, i + a - 1, j + b - 1] + bias[o]
                                   + residual[n, o, i, j]),      activation = identity or max(., 0)

    In float32 a CPU computes it by Winograd's F(4 x 4, 3 x 3), a quarter of the multiplications, on maps of at least 16
    tiles of 4 x 4 pixels, with 16 channels or more on either side and no more than 262144 pairs of them. The sums are
    the same in another order: the relative error to float64 is about 1e-6, that of the direct sum 2e-7 (see
    docs/kernels/conv3x3.md). Everything else is PyTorch's own convolution: other devices, dtypes and sizes, and every
    call that is recorded for a backward pass.

    Args:
        x: `[N, C, h, w]`, any strides, best channels-last; float32, float16, bfloat16 or float64; h, w >= 1.
        weight: `[O, C, 3, 3]`, dtype of x.
        bias: `[O]`, dtype of x, or None.
        residual: `[N, O, h, w]`, dtype of x, or None.
        activation: `"none"` or `"relu"`.
        overwrite_residual: the result may take `residual`'s memory, so that it must not be used again. It does where
            the CPU kernel runs on a channels-last residual and nothing is being compiled; otherwise nothing changes.

    Returns:
        `[N, O, h, w]` in x's dtype; in memory channels-last, or as `F.conv2d` has it where a call is recorded. Under
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
    """
    _check(x, weight, bias, residual, activation, any_dtypes=_common.autocast_may_cast(x))
    if _common.autocast_may_cast(x) or _common.is_plain(x, weight, bias, residual):
        return reference.conv3x3(x, weight, bias, residual, activation)
    if residual is not None and overwrite_residual and _may_overwrite(x, weight, bias, residual):
        torch.ops.vggt_mv.conv3x3_(x, weight, bias, residual, activation)
        return residual
    result: Tensor = torch.ops.vggt_mv.conv3x3(x, weight, bias, residual, activation)
    return result


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
    *,
    any_dtypes: bool = False,
) -> None:
    _common.check_tensor(NAME, "x", x)
    _common.check_tensor(NAME, "weight", weight)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{NAME}: x must have shape [N, C, h, w] with C, h, w >= 1, got {list(x.shape)}")
    _common.check_shape(NAME, "weight", weight, (*weight.shape[:1], x.shape[1], 3, 3), "[O, C, 3, 3]")
    if weight.shape[0] == 0:
        raise ValueError(f"{NAME}: weight must have shape [O, C, 3, 3] with O >= 1, got {list(weight.shape)}")
    others = {"weight": weight}
    if bias is not None:
        _common.check_tensor(NAME, "bias", bias)
        _common.check_shape(NAME, "bias", bias, weight.shape[:1], "[O]")
        others["bias"] = bias
    if residual is not None:
        _common.check_tensor(NAME, "residual", residual)
        shape = (x.shape[0], weight.shape[0], *x.shape[2:])
        _common.check_shape(NAME, "residual", residual, shape, "[N, O, h, w]")
        others["residual"] = residual
    for name, tensor in others.items():
        _common.check_device(NAME, name, tensor, "x", x)
        if not any_dtypes:
            _common.check_same_dtype(NAME, name, tensor, "x", x)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{NAME}: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")


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


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    _check(x, weight, bias, residual, activation)
    if choose(OPERATOR, x, weight, bias, residual) == "reference":
        return _channels_last(reference.conv3x3(x, weight, bias, residual, activation))
    out = _fake(x, weight, bias, residual, activation)
    _launch(x, weight, bias, None if residual is None else _channels_last(residual), activation, out)
    return out


def _run_inplace(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, activation: str) -> None:
    _check(x, weight, bias, residual, activation)
    memory = torch.channels_last
    if choose(OPERATOR, x, weight, bias) != "cpu" or not residual.is_contiguous(memory_format=memory):
        residual.copy_(_run(x, weight, bias, residual, activation))
    else:
        _launch(x, weight, bias, residual, activation, residual)


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, out: Tensor
) -> None:
    """Sums up in `out`, which may be `residual`; both are channels-last."""
    x = _channels_last(x)
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    images, channels, height, width = x.shape
    tensors = (x, weight, bias, residual, out)
    assert extension is not None
    extension.conv3x3_cpu(
        *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
        images,
        height,
        width,
        channels,
        weight.shape[0],
        activation == "relu",
        torch.get_num_threads(),
    )


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fake_inplace(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, activation: str) -> None:
    return None


def _autocast(
    device_type: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> tuple[Any, ...]:
    dtype = torch.get_autocast_dtype(device_type)
    return *(_common.cast(tensor, dtype) for tensor in (x, weight, bias, residual)), activation


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Only who calls the registered operator itself comes here: the public function records plain PyTorch."""
    gradients = _common.recompute_gradients(
        lambda x, weight, bias, residual: reference.conv3x3(x, weight, bias, residual, ctx.activation),
        ctx.saved_tensors,
        ctx.needs_input_grad[:4],
        grad,
        create_graph=torch.is_grad_enabled(),
    )
    return *gradients, None


_common.define(
    f"{NAME}(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation) -> Tensor",
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
