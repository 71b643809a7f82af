"""What every operator's file needs: the library they register with, checks of arguments, the recomputing backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference

LIBRARY = torch.library.Library("vggt_mv", "DEF")
AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    autocast: Callable[..., Any] | None = None,
) -> None:
    """Registers an operator: its schema, what it runs on any device, its shapes, and its rule under autocast.

    Args:
        schema: name, arguments and results in the language of `torch.library`.
        implementation: runs the operator on real tensors and chooses the backend.
        fake: the operator on tensors without data: shapes and dtypes of the results.
        autocast: `(device_type, *arguments) -> arguments` with the dtypes that the operator takes under autocast.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vggt_mv::{name}", fake, lib=LIBRARY)
    if autocast is not None:
        for device_type, key in AUTOCAST_KEYS.items():
            LIBRARY.impl(name, _autocast_kernel(name, device_type, key, autocast), key)


def _autocast_kernel(name: str, device_type: str, key: str, rule: Callable[..., Any]) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*args: Any) -> Any:
        operator = getattr(torch.ops.vggt_mv, name).default
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(*rule(device_type, *args))

    return kernel


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Casts a floating-point tensor as autocast does: float64 and absent tensors stay as they are."""
    if tensor is None or tensor.dtype in (dtype, torch.float64) or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)


def recompute_gradients(
    function: Callable[..., Tensor | Sequence[Tensor]],
    tensors: Sequence[Tensor | None],
    wanted: Sequence[bool],
    grad_output: Tensor | Sequence[Tensor],
    *,
    create_graph: bool = False,
) -> list[Tensor | None]:
    """Gradients of `function(*tensors)` by running it again with autograd on: the backward of every reference.

    Args:
        function: differentiable PyTorch code.
        tensors: its tensor arguments; None where one is absent.
        wanted: which of them need a gradient.
        grad_output: the gradient of the result, or of each of its results.
        create_graph: whether the gradients are to be differentiated again.

    Returns:
        One gradient for each tensor, None where none was wanted.
    """
    device_type = (grad_output if isinstance(grad_output, Tensor) else grad_output[0]).device.type
    needed = [need and tensor is not None for tensor, need in zip(tensors, wanted, strict=True)]
    # Inside an operator PyTorch may have switched autograd off below enable_grad: any dispatch mode does.
    autograd_on = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with autograd_on, torch.enable_grad(), torch.autocast(device_type, enabled=False):
        inputs: list[Tensor | None] = []
        for tensor, need in zip(tensors, needed, strict=True):
            if tensor is None:
                inputs.append(None)
            elif create_graph:
                inputs.append(tensor.view_as(tensor))  # a tensor that is given twice gets two gradients
            else:
                inputs.append(tensor.detach().requires_grad_(need))
        chosen = [tensor for tensor, need in zip(inputs, needed, strict=True) if need and tensor is not None]
        found = torch.autograd.grad(
            function(*inputs), chosen, grad_output, create_graph=create_graph, materialize_grads=True
        )
    gradients = iter(found)
    return [next(gradients) if need else None for need in needed]


def pack_gradients(gradients: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Makes a result of an operator, which cannot hold None: an empty tensor stands for "no gradient"."""
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


def fake_gradients(tensors: Sequence[Tensor | None], wanted: Sequence[bool], like: Tensor) -> tuple[Tensor, ...]:
    """The results of `pack_gradients(recompute_gradients(...))` without data."""
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if need and tensor is not None
        else like.new_empty(0)
        for tensor, need in zip(tensors, wanted, strict=True)
    )


def unpack_gradients(gradients: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Undoes `pack_gradients`."""
    return [gradient if need else None for gradient, need in zip(gradients, wanted, strict=True)]


def describe(tensor: Tensor) -> str:
    """A tensor in an error message: dtype and shape."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def check_tensor(operator: str, name: str, value: object) -> None:
    """Raises TypeError unless `value` is a tensor of real floating-point numbers."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{operator}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
        raise TypeError(f"{operator}: {name} must have one of the dtypes {allowed}; got {describe(value)}")


def check_shape(operator: str, name: str, tensor: Tensor, shape: Sequence[int], rule: str) -> None:
    """Raises ValueError unless `tensor` has this shape."""
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{operator}: {name} must have shape {rule} = {list(shape)}, got {list(tensor.shape)}")


def check_device(operator: str, name: str, tensor: Tensor, first_name: str, first: Tensor) -> None:
    """Raises ValueError unless both tensors are on one device."""
    if tensor.device != first.device:
        raise ValueError(
            f"{operator}: {name} must be on the device of {first_name}, {first.device}; it is on {tensor.device}"
        )


AXES = ("frame", "view", "time", "global")
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def autocast_may_cast(tensor: object) -> bool:
    """Whether autocast will choose the dtypes of a call with this tensor."""
    if not isinstance(tensor, Tensor):
        return False
    device_type = tensor.device.type
    return device_type in AUTOCAST_KEYS and torch.is_autocast_enabled(device_type)


def is_recorded(*tensors: Tensor | None) -> bool:
    """Whether a call with these tensors is recorded for a backward pass."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether something that only plain PyTorch knows is to go through the call: gradients, transforms, subclasses."""
    if is_recorded(*tensors):
        return True
    if torch.compiler.is_compiling():
        return False
    return (
        any(type(tensor) not in (Tensor, torch.nn.Parameter, type(None)) for tensor in tensors)
        or torch._C._functorch.maybe_current_level() is not None  # vmap, jvp, grad of torch.func
        or reference.in_forward_mode()
    )


def check_qkv(operator: str, qkv: object, name: str = "qkv") -> None:
    """Raises unless `qkv` is a packed tensor on the token grid, `[B, T, N, P, 3, h, D]` with h, D >= 1."""
    check_tensor(operator, name, qkv)
    assert isinstance(qkv, Tensor)
    if qkv.dim() != 7 or qkv.shape[4] != 3 or 0 in qkv.shape[5:]:
        raise ValueError(
            f"{operator}: {name} must have shape [B, T, N, P, 3, h, D] with h, D >= 1, got {list(qkv.shape)}"
        )


def check_axis(operator: str, axis: object) -> None:
    """Raises ValueError unless `axis` names an axis of the token grid."""
    if axis not in AXES:
        raise ValueError(f"{operator}: axis must be one of {', '.join(AXES)}; got {axis!r}")


def check_scale(operator: str, scale: float | None) -> None:
    """Raises ValueError unless the factor of q . k is above 0."""
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"{operator}: scale must be above 0 and finite, got {scale}")


def check_same_dtype(operator: str, name: str, tensor: Tensor, first_name: str, first: Tensor) -> None:
    """Raises TypeError unless both tensors have one dtype."""
    if tensor.dtype != first.dtype:
        raise TypeError(
            f"{operator}: {name} must have the dtype of {first_name}, {describe(first)}; got {describe(tensor)}"
        )


def check_wide(operator: str, name: str, tensor: Tensor, qkv_name: str, qkv: Tensor) -> None:
    """Raises TypeError unless `tensor`, a part of the logits, has the dtype in which they are computed."""
    wide = reference.accumulation_dtype(qkv.dtype)
    if tensor.dtype != wide:
        raise TypeError(
            f"{operator}: {name} must be {str(wide).removeprefix('torch.')} with a {qkv_name} {describe(qkv)}; "
            f"got {describe(tensor)}"
        )
