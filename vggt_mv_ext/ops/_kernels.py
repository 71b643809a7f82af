"""How an operator hands tensors to a compiled kernel: as addresses, sizes and dtype codes, on the right stream."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

# The numbers of `enum class DType` in csrc/core/dtype.h.
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# The numbers of `enum class Axis` in csrc/core/token_grid.h.
AXIS_CODES = {"frame": 0, "view": 1, "time": 2, "global": 3}

# The numbers of `enum class TokenKeys` in csrc/core/gathered_attention.h.
TOKEN_KEY_CODES = {"none": 0, "all": 1, "listed_tokens": 2, "listed_frames": 3}


def unit_width(tensor: Tensor) -> Tensor:
    """A tensor with unit stride in its last dimension; a copy only where it has another."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def aligned_rows(tensor: Tensor) -> Tensor:
    """A tensor whose rows (last dimension) all begin at multiples of 16 bytes; a copy only where they do not."""
    offsets = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride(), strict=False) if size > 1]
    if tensor.data_ptr() % 16 == 0 and all(offset * tensor.element_size() % 16 == 0 for offset in offsets):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def qkv_steps(qkv: Tensor) -> tuple[int, ...]:
    """Strides of `[B, T, N, P, 3, h, D]` or `[B, M, 3, h, D]` in elements, without the last, which is 1.

    A dimension of size 1 may have any stride and nothing is ever multiplied by it: 0, so that no kernel minds it.
    """
    return tuple(0 if size == 1 else stride for size, stride in zip(qkv.shape[:-1], qkv.stride(), strict=False))


@cache  # a few KiB each, and kept for good: a captured CUDA graph reads it at its address
def rotation_table(positions: int, pairs: int, base: float, device: torch.device) -> Tensor:
    """Cosine and sine of `position * base**(-j / pairs)`, `[positions, pairs, 2]` float32, computed in float64."""
    with torch.inference_mode(False):
        angle = torch.arange(positions, dtype=torch.float64)[:, None] * base ** (
            -torch.arange(pairs, dtype=torch.float64) / pairs
        )
        return torch.stack((angle.cos(), angle.sin()), dim=-1).to(torch.float32).to(device)


def as_rows(tensor: Tensor) -> Tensor:
    """`[..., C]` as `[rows, C]` with unit stride in C; a copy only where no view does it."""
    if tensor.dim() == 2 and tensor.stride(1) == 1:
        return tensor
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def stream_address(tensor: Tensor) -> int:
    """The CUDA stream that PyTorch would launch on now, for a tensor on a GPU."""
    return torch.cuda.current_stream(tensor.device).cuda_stream


def device_guard(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one while a kernel is launched."""
    if tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)
