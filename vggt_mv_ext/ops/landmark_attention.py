"""All tokens of the grid look at a few chosen ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import Operator
from . import _common, _gathered

NAME = "landmark_attention"


def landmark_attention(
    qkv: Tensor, landmarks: Tensor, *, key_bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    r"""Softmax attention of all tokens of the grid `[B, T, N, P]` over K chosen tokens of their batch element.

    Formula, for every token i and head, with j over the tokens that `landmarks` names::

        logit_ij = scale * q_i . k_j + key_bias_j
        out_i    = sum_j softmax_j(logit_ij) v_j

    Args:
        qkv: `[B, T, N, P, 3, h, D]`: queries, keys, values of h heads of width D; any strides; float32, float16,
            bfloat16 or float64. Sums and softmax are in float32 (float64 for float64).
        landmarks: `[B, K]` int64: numbers `(t N + n) P + p` of tokens, in any order; one that is there twice counts
            twice. On a CPU their range is checked; on a GPU they are not read back.
        key_bias: `[B, T, N, P]`, added to the logits of a key: float32, or float64 with a float64 qkv.
        scale: factor of q . k, above 0; default `D**-0.5`.

    Returns:
        `[B, T, N, P, h * D]` in qkv's dtype, contiguous. Under autocast qkv is cast to the autocast dtype first and
        key_bias to float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not go together; an index that is no token's; scale is not above 0.

    Source:
        Attention: Vaswani et al. 2017 (arXiv:1706.03762), over a subset of the keys.

    Example:
        >>> import torch
        >>> from vggt_mv_ext import landmark_attention
        >>> qkv = torch.zeros(1, 2, 1, 3, 3, 1, 4)
        >>> qkv[..., 2, 0, 0] = torch.arange(6.0).view(1, 2, 1, 3)       # token number as value
        >>> landmark_attention(qkv, torch.tensor([[1, 5]]))[..., 0].flatten().tolist()
        [3.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    """
    _check(qkv, landmarks, key_bias, scale, any_dtypes=_common.autocast_may_cast(qkv))
    if reference.in_forward_mode():
        return reference.landmark_attention(qkv, landmarks, key_bias=key_bias, scale=scale)
    out, _ = torch.ops.vggt_mv.landmark_attention(qkv, landmarks, key_bias, scale)
    return out


def _check(
    qkv: Tensor, landmarks: Tensor, key_bias: Tensor | None, scale: float | None, *, any_dtypes: bool = False
) -> None:
    _common.check_qkv(NAME, qkv)
    _gathered.check_indices(NAME, "landmarks", landmarks, qkv.shape[0], "[B, K]", qkv)
    _gathered.check_key_bias(NAME, key_bias, qkv, any_dtypes=any_dtypes)
    _common.check_scale(NAME, scale)


def _check_values(qkv: Tensor, landmarks: Tensor, key_bias: Tensor | None, scale: float | None) -> None:
    _check(qkv, landmarks, key_bias, scale)
    _gathered.check_range(NAME, "landmarks", landmarks, 0, math.prod(qkv.shape[1:4]))


def _reference(qkv: Tensor, landmarks: Tensor, key_bias: Tensor | None, scale: float | None) -> Tensor:
    return reference.landmark_attention(qkv, landmarks, key_bias=key_bias, scale=scale)


def _queries(qkv: Tensor, *_: Any) -> Sequence[int]:
    return qkv.shape[:4]


def _kernel(
    backend: str, qkv: Tensor, landmarks: Tensor, key_bias: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    return _gathered.run_kernel(backend, qkv, None, key_bias, landmarks, scale, token_keys="listed_tokens")


OPERATOR = Operator(NAME, _gathered.LIMITS)
_gathered.define(
    OPERATOR,
    "Tensor qkv, Tensor landmarks, Tensor? key_bias, float? scale",
    check=_check_values,
    reference=_reference,
    queries=_queries,
    kernel=_kernel,
    kernel_gradients={},
)
