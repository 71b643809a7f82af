"""All tokens of the grid read a memory of a few tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import Operator
from . import _common, _gathered

NAME = "memory_read"


def memory_read(qkv: Tensor, memory_qkv: Tensor, *, scale: float | None = None) -> Tensor:
    r"""Softmax attention of all tokens of the grid `[B, T, N, P]` over the M memory tokens of their batch element.

    Formula, for every token i and head, with j over the M memory tokens::

        out_i = sum_j softmax_j(scale * q_i . k_j) v_j

    Args:
        qkv: `[B, T, N, P, 3, h, D]`: queries, keys, values of h heads of width D; any strides; float32, float16,
            bfloat16 or float64. Only its queries are read. Sums and softmax are in float32 (float64 for float64).
        memory_qkv: `[B, M, 3, h, D]`, the same of the memory tokens, in qkv's dtype; its queries are not read.
        scale: factor of q . k, above 0; default `D**-0.5`.

    Returns:
        `[B, T, N, P, h * D]` in qkv's dtype, contiguous. Under autocast both tensors are cast to the autocast dtype
        first.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not go together; scale is not above 0.

    Source:
        Induced set attention with learnt tokens: Lee et al. 2019 (arXiv:1810.00825).

    Example:
        >>> import torch
        >>> from vggt_mv_ext import memory_read
        >>> qkv, memory_qkv = torch.zeros(1, 2, 1, 3, 3, 1, 4), torch.zeros(1, 2, 3, 1, 4)
        >>> memory_qkv[0, :, 2, 0, 0] = torch.tensor([1.0, 3.0])
        >>> memory_read(qkv, memory_qkv)[..., 0].flatten().tolist()
        [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    """
    _check(qkv, memory_qkv, scale, any_dtypes=_common.autocast_may_cast(qkv))
    if reference.in_forward_mode():
        return reference.memory_read(qkv, memory_qkv, scale=scale)
    out, _ = torch.ops.vggt_mv.memory_read(qkv, memory_qkv, scale)
    return out


def _check(qkv: Tensor, memory_qkv: Tensor, scale: float | None, *, any_dtypes: bool = False) -> None:
    _common.check_qkv(NAME, qkv)
    _gathered.check_memory(NAME, memory_qkv, qkv, any_dtypes=any_dtypes)
    _common.check_scale(NAME, scale)


def _reference(qkv: Tensor, memory_qkv: Tensor, scale: float | None) -> Tensor:
    return reference.memory_read(qkv, memory_qkv, scale=scale)


def _queries(qkv: Tensor, *_: Any) -> Sequence[int]:
    return qkv.shape[:4]


def _kernel(backend: str, qkv: Tensor, memory_qkv: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    return _gathered.run_kernel(backend, qkv, memory_qkv, None, None, scale, token_keys="none")


OPERATOR = Operator(NAME, _gathered.LIMITS)
_gathered.define(
    OPERATOR,
    "Tensor qkv, Tensor memory_qkv, float? scale",
    check=_check,
    reference=_reference,
    queries=_queries,
    kernel=_kernel,
    kernel_gradients={},
)
