"""What the sparse attentions share: all tokens or a memory look at gathered keys. Checks, registration, the backward.

`memory_write`, `memory_read`, `landmark_attention` and `block_dilated_attention` each return, as registered operators,
the result and `lse`, `[B, h, queries]`: the logarithm of every row's sum of exp(logit), for the backward pass. A kernel
computes it; the reference does not, and says so by -inf (which makes no gradient pass for one).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._extension import extension
from ..backends import Operator, choose
from ..reference import accumulation_dtype
from . import _common, _kernels
from .alternating_attention import cpu_limits, cuda_limits


def check_memory(operator: str, memory_qkv: Tensor, qkv: Tensor, *, any_dtypes: bool) -> None:
    """Raises unless `memory_qkv` is `[B, M, 3, h, D]` with M >= 1, beside `qkv [B, T, N, P, 3, h, D]`."""
    _common.check_tensor(operator, "memory_qkv", memory_qkv)
    batch, *_, heads, width = qkv.shape
    if memory_qkv.dim() != 5 or memory_qkv.shape[1] == 0:
        raise ValueError(
            f"{operator}: memory_qkv must have shape [B, M, 3, h, D] with M >= 1, got {list(memory_qkv.shape)}"
        )
    shape = (batch, memory_qkv.shape[1], 3, heads, width)
    _common.check_shape(operator, "memory_qkv", memory_qkv, shape, "[B, M, 3, h, D]")
    _common.check_device(operator, "memory_qkv", memory_qkv, "qkv", qkv)
    if not any_dtypes:
        _common.check_same_dtype(operator, "memory_qkv", memory_qkv, "qkv", qkv)


def check_key_bias(operator: str, key_bias: Tensor | None, qkv: Tensor, *, any_dtypes: bool) -> None:
    """Raises unless `key_bias` is absent or `[B, T, N, P]` in the dtype of the logits."""
    if key_bias is None:
        return
    _common.check_tensor(operator, "key_bias", key_bias)
    if not any_dtypes:
        _common.check_wide(operator, "key_bias", key_bias, "qkv", qkv)
    _common.check_shape(operator, "key_bias", key_bias, qkv.shape[:4], "[B, T, N, P]")
    _common.check_device(operator, "key_bias", key_bias, "qkv", qkv)


def check_indices(operator: str, name: str, indices: object, rows: int, rule: str, qkv: Tensor) -> None:
    """Raises unless `indices` is int64 `[rows, K]` with K >= 1, on the device of `qkv`; values: `check_range`."""
    if not isinstance(indices, Tensor):
        raise TypeError(f"{operator}: {name} must be a torch.Tensor, got {type(indices).__name__}")
    if indices.dtype != torch.int64:
        raise TypeError(f"{operator}: {name} must be int64, got {_common.describe(indices)}")
    if indices.dim() != 2 or indices.shape[0] != rows or indices.shape[1] == 0:
        raise ValueError(
            f"{operator}: {name} must have shape {rule} with {rows} rows and at least one column, "
            f"got {list(indices.shape)}"
        )
    _common.check_device(operator, name, indices, "qkv", qkv)


def check_range(operator: str, name: str, indices: Tensor, low: int, high: int) -> None:
    """Raises ValueError unless all values lie in low..high - 1; on a GPU they are not read back, and not checked."""
    if indices.device.type != "cpu" or indices.numel() == 0:
        return
    smallest, largest = (value.item() for value in torch.aminmax(indices))
    if smallest < low or largest >= high:
        raise ValueError(
            f"{operator}: {name} must hold indices in {low}..{high - 1}, got values from {smallest} to {largest}"
        )


def fake_results(qkv: Tensor, leading: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`out [*leading, h * D]` and `lse [B, h, queries]` without data, for queries `leading = [B, ...]`."""
    heads, width = qkv.shape[5:]
    queries = 1
    for size in leading[1:]:
        queries = queries * size
    lse = qkv.new_empty((leading[0], heads, queries), dtype=accumulation_dtype(qkv.dtype))
    return qkv.new_empty((*leading, heads * width)), lse


LIMITS = {"cpu": cpu_limits, "cuda": cuda_limits}


def run_kernel(
    backend: str,
    qkv: Tensor,
    memory_qkv: Tensor | None,
    key_bias: Tensor | None,
    listed: Tensor | None,
    scale: float | None,
    *,
    token_keys: str,
    memory_queries: bool = False,
) -> tuple[Tensor, Tensor]:
    """The result and lse of one of the sparse attentions by the kernel of a backend, which runs all four.

    Args:
        backend: `cpu` or `cuda`.
        qkv, memory_qkv, key_bias, scale: as the operators have them.
        listed: landmarks or neighbours.
        token_keys: which tokens of the grid are keys: `none`, `all`, `listed_tokens`, `listed_frames`.
        memory_queries: the memory asks, not the tokens.
    """
    *sizes, _, heads, width = qkv.shape
    leading: Sequence[int] = sizes
    if memory_queries:
        assert memory_qkv is not None
        leading = memory_qkv.shape[:2]
    out, lse = fake_results(qkv, leading)
    qkv = _kernels.unit_width(qkv)
    memory_qkv = None if memory_qkv is None else _kernels.unit_width(memory_qkv)
    if backend == "cuda":
        qkv = _kernels.aligned_rows(qkv)
        memory_qkv = None if memory_qkv is None else _kernels.aligned_rows(memory_qkv)
    key_bias = None if key_bias is None else key_bias.contiguous()
    listed = None if listed is None else listed.contiguous()
    memory_tokens = 0 if memory_qkv is None else memory_qkv.shape[1]
    assert extension is not None
    with nullcontext() if backend == "cpu" else _kernels.device_guard(qkv):
        chunks, partial = 1, None
        if backend == "cuda" and memory_queries:
            chunks = extension.gathered_attention_key_chunks(sizes, memory_tokens, heads, width)
            partial = lse.new_empty((chunks, lse.numel() * (width + 1))) if chunks > 1 else None
        tensors = (qkv, memory_qkv, key_bias, listed, out, lse, partial)
        arguments = (
            *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
            sizes,
            _kernels.qkv_steps(qkv),
            (0,) * 4 if memory_qkv is None else _kernels.qkv_steps(memory_qkv),
            _kernels.TOKEN_KEY_CODES[token_keys],
            memory_queries,
            memory_tokens,
            0 if listed is None else listed.shape[1],
            chunks,
            heads,
            width,
            width**-0.5 if scale is None else scale,
            _kernels.DTYPE_CODES[qkv.dtype],
        )
        if backend == "cpu":
            extension.gathered_attention_cpu(*arguments, torch.get_num_threads())
        else:
            extension.gathered_attention_cuda(*arguments, _kernels.stream_address(qkv))
    return out, lse


def define(
    operator: Operator,
    arguments: str,
    *,
    check: Callable[..., None],
    reference: Callable[..., Tensor],
    queries: Callable[..., Sequence[int]],
    kernel: Callable[..., tuple[Tensor, Tensor]],
    kernel_gradients: dict[str, Callable[..., list[Tensor | None]]],
) -> None:
    """Registers a sparse attention and its backward.

    Args:
        operator: its name and the limits of its kernels.
        arguments: of the schema: floating-point tensors, qkv first, an index among them, scale last.
        check: `(*arguments)`, raises for what the operator does not take.
        reference: `(*arguments)`, the result in differentiable PyTorch.
        queries: `(*arguments)`, the leading dimensions of the result.
        kernel: `(backend, *arguments)`, the result and lse.
        kernel_gradients: backend -> `(grad, *arguments, out, lse, wanted)`, a gradient for each floating-point tensor,
            None where none was wanted. A backend with a kernel and no entry here takes the reference's.
    """
    name = operator.name
    count = arguments.count(",") + 1
    # An index has no gradient, and no dtype that autocast might change.
    indices = {
        place for place, text in enumerate(arguments.split(", ")) if text.endswith((" landmarks", " neighbours"))
    }
    differentiable = [place for place in range(count - 1) if place not in indices]

    def fake(*given: Any) -> tuple[Tensor, Tensor]:
        return fake_results(given[0], queries(*given))

    def run(*given: Any) -> tuple[Tensor, Tensor]:
        check(*given)
        backend = choose(operator, *(given[place] for place in differentiable))
        if backend != "reference":
            return kernel(backend, *given)
        _, lse = fake(*given)
        return reference(*given).contiguous(), lse.fill_(-torch.inf)

    def autocast(device_type: str, *given: Any) -> tuple[Any, ...]:
        dtype, wide = torch.get_autocast_dtype(device_type), accumulation_dtype(given[0].dtype)
        cast = list(given)
        for place in differentiable:
            if given[place] is not None:
                is_bias = given[place].dim() == 4
                cast[place] = given[place].to(wide) if is_bias else _common.cast(given[place], dtype)
        return tuple(cast)

    def recompute(
        given: Sequence[Any], wanted: Sequence[bool], grad: Tensor, create_graph: bool
    ) -> list[Tensor | None]:
        def function(*tensors: Tensor | None) -> Tensor:
            filled = list(given)
            for place, tensor in zip(differentiable, tensors, strict=True):
                filled[place] = tensor
            return reference(*filled)

        tensors = [given[place] for place in differentiable]
        return _common.recompute_gradients(function, tensors, wanted, grad, create_graph=create_graph)

    def run_backward(grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        given, (out, lse, wanted) = rest[:count], rest[count:]
        backend = choose(operator, *(given[place] for place in differentiable))
        if backend not in kernel_gradients:
            gradients = recompute(given, wanted, grad, create_graph=False)
        else:
            if lse.flatten()[0] == -torch.inf:  # the forward pass ran on the reference
                out, lse = run(*given)
            gradients = kernel_gradients[backend](grad, *given, out, lse, wanted)
        return _common.pack_gradients(gradients, given[0])

    def fake_backward(grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return _common.fake_gradients([rest[place] for place in differentiable], rest[-1], rest[0])

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:-1], *output)
        ctx.scale = inputs[-1]

    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * count
        *tensors, out, lse = ctx.saved_tensors
        given = (*tensors, ctx.scale)
        wanted = [ctx.needs_input_grad[place] for place in differentiable]
        if torch.is_grad_enabled():
            with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no second derivatives
                gradients = recompute(given, wanted, grad, create_graph=True)
        else:
            registered = getattr(torch.ops.vggt_mv, f"{name}_backward")
            gradients = _common.unpack_gradients(registered(grad, *given, out, lse, wanted), wanted)
        found = dict(zip(differentiable, gradients, strict=True))
        return tuple(found.get(place) for place in range(count))

    _common.define(f"{name}({arguments}) -> (Tensor out, Tensor lse)", run, fake, autocast=autocast)
    results = ", ".join(["Tensor"] * len(differentiable))
    _common.define(
        f"{name}_backward(Tensor grad, {arguments}, Tensor out, Tensor lse, bool[{len(differentiable)}] wanted)"
        f" -> ({results})",
        run_backward,
        fake_backward,
    )
    torch.library.register_autograd(f"vggt_mv::{name}", backward, setup_context=setup_context, lib=_common.LIBRARY)
