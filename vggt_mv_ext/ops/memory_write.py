"""A memory of a few tokens reads everything: its queries over its own keys and those of all tokens of the grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import Operator
from . import _common, _gathered

NAME = "memory_write"


def memory_write(
    qkv: Tensor, memory_qkv: Tensor, *, key_bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    r"""Softmax attention of M memory tokens over themselves and all T N P tokens of their batch element.

    Formula, for a memory token i and every head, with j over the M memory tokens and then over all tokens::

        logit_ij = scale * q_i . k_j + key_bias_j          key_bias is 0 on memory tokens
        out_i    = sum_j softmax_j(logit_ij) v_j

    Args:
        qkv: `[B, T, N, P, 3, h, D]`: queries, keys, values of h heads of width D; any strides; float32, float16,
            bfloat16 or float64. Its queries are not read. Sums and softmax are in float32 (float64 for float64).
        memory_qkv: `[B, M, 3, h, D]`, the same of the memory tokens, in qkv's dtype.
        key_bias: `[B, T, N, P]`, added to the logits of a token's key: float32, or float64 with a float64 qkv.
        scale: factor of q . k, above 0; default `D**-0.5`.

    Returns:
        `[B, M, h * D]` in qkv's dtype, contiguous. Under autocast qkv and memory_qkv are cast to the autocast dtype
        first and key_bias to float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not go together; scale is not above 0.

    Source:
        Induced set attention with learnt tokens: Lee et al. 2019 (arXiv:1810.00825).

    Example:
        >>> import torch
        >>> from vggt_mv_ext import memory_write
        >>> qkv, memory_qkv = torch.zeros(1, 2, 1, 3, 3, 1, 4), torch.zeros(1, 2, 3, 1, 4)
        >>> qkv[..., 2, 0, 0] = 4.0                        # six tokens of value 4 and two of the memory of value 0
        >>> memory_write(qkv, memory_qkv)[..., 0].tolist()
        [[3.0, 3.0]]
    """
    _check(qkv, memory_qkv, key_bias, scale, any_dtypes=_common.autocast_may_cast(qkv))
    if reference.in_forward_mode():
        return reference.memory_write(qkv, memory_qkv, key_bias=key_bias, scale=scale)
    out, _ = torch.ops.vggt_mv.memory_write(qkv, memory_qkv, key_bias, scale)
    return out


def _check(
    qkv: Tensor, memory_qkv: Tensor, key_bias: Tensor | None, scale: float | None, *, any_dtypes: bool = False
) -> None:
    _common.check_qkv(NAME, qkv)
    _gathered.check_memory(NAME, memory_qkv, qkv, any_dtypes=any_dtypes)
    _gathered.check_key_bias(NAME, key_bias, qkv, any_dtypes=any_dtypes)
    _common.check_scale(NAME, scale)


def _reference(qkv: Tensor, memory_qkv: Tensor, key_bias: Tensor | None, scale: float | None) -> Tensor:
    return reference.memory_write(qkv, memory_qkv, key_bias=key_bias, scale=scale)


def _queries(qkv: Tensor, memory_qkv: Tensor, *_: Any) -> Sequence[int]:
    return memory_qkv.shape[:2]


def _kernel(
    backend: str, qkv: Tensor, memory_qkv: Tensor, key_bias: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    return _gathered.run_kernel(backend, qkv, memory_qkv, key_bias, None, scale, token_keys="all", memory_queries=True)


OPERATOR = Operator(NAME, _gathered.LIMITS)
_gathered.define(
    OPERATOR,
    "Tensor qkv, Tensor memory_qkv, Tensor? key_bias, float? scale",
    check=_check,
    reference=_reference,
    queries=_queries,
    kernel=_kernel,
    kernel_gradients={},
)
