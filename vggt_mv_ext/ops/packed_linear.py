"""`activation(x @ weight.T + bias)` on weights that are laid out for the matrix kernel once, with the GELU fused in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import Operator, choose
from . import _common, _packed_weights

NAME = "packed_linear"
LOW = (torch.float16, torch.bfloat16)
ACTIVATIONS = ("none", "gelu")


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    r"""A linear layer: `torch.nn.functional.linear`, faster on CPUs in inference.

    Formula, for every row of K features::

        y = activation(weight @ x + bias),      activation = identity, or exact GELU: y * (1 + erf(y / sqrt(2))) / 2

    Where oneDNN can, a CPU runs it on a copy of the weight in oneDNN's own layout, with bias and GELU in the same
    pass. The copy is made in the first call with at least 64 rows and kept as long as the weight does not change; it
    takes as much memory as the weight again (see `pack_linear_weight`). Training is plain PyTorch: as soon as
    gradients are recorded, and on other devices, this is `F.linear` and `F.gelu`.

    Changes of the weight are seen: in-place operations, `load_state_dict`, `.to()`, `p.data = ...`. A write that
    PyTorch does not count, through `p.data` or numpy, may be missed if it leaves most values as they are.

    Args:
        x: `[..., K]`, any strides; float32, float16, bfloat16 or float64.
        weight: `[N, K]`, the dtype of x, or float32 beside a float16 or bfloat16 x; or that of a convolution,
            `[N, C, a, b]`, which multiplies patches `[..., a b C]` of a channels-last map. Copies are kept of
            `torch.nn.Parameter`s alone; any other tensor is used as it is.
        bias: `[N]` in the dtype of weight, or None.
        activation: `"none"` or `"gelu"`.

    Returns:
        `[..., N]` in x's dtype, which also is the dtype of the products; contiguous. On processors without instructions
        for them (no AVX-512), products of 16-bit values are float32, and weight and bias are not rounded to x's dtype.
        Under autocast x is cast as `F.linear` casts it, and the weight is not cast anew in each call.

    Raises:
        TypeError: an argument is not a floating-point tensor, or the dtypes do not go together.
        ValueError: shapes or devices do not go together, or no such activation.

    Source:
        oneDNN's inner product, https://uxlfoundation.github.io/oneDNN/dev_guide_inner_product.html, through
        PyTorch's `mkldnn::_linear_pointwise`. GELU: Hendrycks, Gimpel 2016 (arXiv:1606.08415).

    Example:
        >>> import torch
        >>> from vggt_mv_ext import packed_linear
        >>> weight = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [0.0, -1.0]]))
        >>> with torch.no_grad():
        ...     packed_linear(torch.tensor([[1.0, 1.0]]), weight, torch.zeros(2)).tolist()
        [[3.0, -1.0]]
    """
    if not _fits(x, weight, bias, activation):
        _check(x, weight, bias, activation, any_dtypes=_common.autocast_may_cast(x))
    if x.device.type != "cpu" or _common.is_plain(x, weight, bias):
        return _plain(x, weight, bias, activation)
    result: Tensor = torch.ops.vggt_mv.packed_linear(x, weight, bias, activation)
    return result


def cannot_pack_linear_weight(weight: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """Why `packed_linear` uses this weight as it is, in products of `dtype` (by default its own); None: it packs it.

    Example:
        >>> import torch
        >>> from vggt_mv_ext import cannot_pack_linear_weight
        >>> cannot_pack_linear_weight(torch.nn.Parameter(torch.zeros(3, 2)), torch.float64)
        'float64 runs on the reference alone'
    """
    if weight.device.type != "cpu":
        return f"the weight is on {weight.device}"
    if 0 in weight.shape:
        return "an empty tensor needs no kernel"
    return _packed_weights.unpackable(weight) or _packed_weights.unsupported(dtype or weight.dtype)


def linear_product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that `packed_linear` multiplies an x of `dtype` in, on this machine's CPU.

    It is `dtype`, or float32 for float16 and bfloat16 on processors that have no instructions for them.

    Example:
        >>> import torch
        >>> from vggt_mv_ext import linear_product_dtype
        >>> linear_product_dtype(torch.float32)
        torch.float32
    """
    return _packed_weights.product_dtype(dtype)


def pack_linear_weight(weight: Tensor, dtype: torch.dtype | None = None, *, sample: bool = True) -> int:
    """Makes the packed copy of a weight now, instead of in the first call of `packed_linear` with many rows.

    Args:
        weight: a `torch.nn.Parameter [N, K]` or `[N, C, a, b]` on the CPU.
        dtype: of the products that the copy is for, by default the weight's own.
        sample: whether every call looks at a few values of the weight, to notice writes that PyTorch does not count.
            False for a weight in a mapped file that is to stay out of memory: reading one value brings in up to 2 MB.

    Returns:
        The memory that the copy takes, in bytes; 0 where there can be none (see `cannot_pack_linear_weight`).

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: neither two- nor four-dimensional.

    Example:
        >>> import torch
        >>> from vggt_mv_ext import pack_linear_weight
        >>> pack_linear_weight(torch.zeros(3, 2))  # no Parameter
        0
    """
    _common.check_tensor("pack_linear_weight", "weight", weight)
    if weight.dim() not in (2, 4):
        raise ValueError(f"pack_linear_weight: weight must have shape [N, K] or [N, C, a, b], got {list(weight.shape)}")
    if cannot_pack_linear_weight(weight, dtype) is not None:
        return 0
    return _packed_weights.packed_bytes(_packed_weights.PACKED.get(weight, dtype or weight.dtype, sample))


_DTYPES = frozenset((x, weight) for x in _common.FLOATING for weight in (x, *((torch.float32,) if x in LOW else ())))


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> bool:
    """Whether `_check` has nothing to say, in a fraction of the time: this runs in every call, twice."""
    try:
        return (
            len(weight.shape) in (2, 4)
            and x.shape[-1] == weight.shape[1:].numel()
            and (x.dtype, weight.dtype) in _DTYPES
            and x.device == weight.device
            and activation in ACTIVATIONS
            and (
                bias is None
                or (bias.shape == weight.shape[:1] and bias.dtype is weight.dtype and bias.device == x.device)
            )
        )
    except (AttributeError, TypeError, IndexError):
        return False


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, *, any_dtypes: bool = False) -> None:
    _common.check_tensor(NAME, "x", x)
    _common.check_tensor(NAME, "weight", weight)
    if weight.dim() not in (2, 4):
        raise ValueError(f"{NAME}: weight must have shape [N, K] or [N, C, a, b], got {list(weight.shape)}")
    width = weight.shape[1:].numel()
    if x.dim() == 0 or x.shape[-1] != width:
        raise ValueError(f"{NAME}: x must have shape [..., K] with the K = {width} of weight, got {list(x.shape)}")
    _common.check_device(NAME, "weight", weight, "x", x)
    if bias is not None:
        _common.check_tensor(NAME, "bias", bias)
        _common.check_shape(NAME, "bias", bias, weight.shape[:1], "[N]")
        _common.check_device(NAME, "bias", bias, "x", x)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{NAME}: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    if any_dtypes:
        return
    if weight.dtype != x.dtype and not (weight.dtype == torch.float32 and x.dtype in LOW):
        raise TypeError(
            f"{NAME}: weight must have the dtype of x, or be float32 beside a float16 or bfloat16 x; "
            f"got x {_common.describe(x)} and weight {_common.describe(weight)}"
        )
    if bias is not None and bias.dtype != weight.dtype:
        raise TypeError(
            f"{NAME}: bias must have the dtype of weight; "
            f"got bias {_common.describe(bias)} and weight {_common.describe(weight)}"
        )


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    if _common.autocast_may_cast(x):  # which casts weight and bias itself, and keeps what it cast
        result = torch.nn.functional.linear(x, reference.matrix_of(weight), bias)
        return torch.nn.functional.gelu(result) if activation == "gelu" else result
    return reference.packed_linear(x, weight, bias, activation)


def _onednn_limits(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *_: Any) -> str | None:
    if x.numel() == 0:
        return "an empty tensor needs no kernel"
    if _common.is_recorded(x, weight, bias):
        return "gradients are recorded"
    if weight is None:
        return _packed_weights.unsupported(x.dtype)
    reason = cannot_pack_linear_weight(weight, x.dtype)
    if reason is not None:
        return reason
    rows = x.numel() // x.shape[-1]
    if rows < _packed_weights.MIN_ROWS and _packed_weights.PACKED.find(weight, x.dtype) is None:
        return f"{rows} rows are not worth packing a weight for; from {_packed_weights.MIN_ROWS} on it is"
    return None


def _any(*_: Any) -> None:
    """CUDA's linear layers are PyTorch's own."""


OPERATOR = Operator(NAME, {"cpu": _onednn_limits, "cuda": _any}, library="PyTorch", falls_back=True)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    if not _fits(x, weight, bias, activation):
        _check(x, weight, bias, activation)
    if choose(OPERATOR, x, weight, bias) == "cpu":
        packed = _packed_weights.PACKED.get(weight, x.dtype)
        return _packed_weights.run(x, packed, None if bias is None else bias.detach().to(packed.dtype), activation)
    return reference.packed_linear(x, weight, bias, activation).contiguous()


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _autocast(device_type: str, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> tuple[Any, ...]:
    dtype = torch.get_autocast_dtype(device_type)
    x = _common.cast(x, dtype)  # type: ignore[assignment]
    # A float32 weight stays: its packed copy is in the dtype of x, and is found by what it is a copy of.
    if weight.dtype not in (x.dtype, torch.float32):
        weight = _common.cast(weight, dtype)  # type: ignore[assignment]
    if bias is not None and bias.dtype != weight.dtype:
        bias = bias.to(weight.dtype)
    return x, weight, bias, activation


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.activation = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Only who calls the registered operator itself comes here: the public function records plain PyTorch."""
    gradients = _common.recompute_gradients(
        lambda x, weight, bias: reference.packed_linear(x, weight, bias, ctx.activation),
        ctx.saved_tensors,
        ctx.needs_input_grad[:3],
        grad,
        create_graph=torch.is_grad_enabled(),
    )
    return *gradients, None


_common.define(
    f"{NAME}(Tensor x, Tensor weight, Tensor? bias, str activation) -> Tensor", _run, _fake, autocast=_autocast
)
torch.library.register_autograd(f"vggt_mv::{NAME}", _backward, setup_context=_setup_context, lib=_common.LIBRARY)
