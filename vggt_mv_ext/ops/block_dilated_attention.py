"""All tokens of a frame look at all tokens of a few other frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import Operator
from . import _common, _gathered

NAME = "block_dilated_attention"


def block_dilated_attention(
    qkv: Tensor, neighbours: Tensor, *, key_bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    r"""Softmax attention of the tokens of every frame of the grid `[B, T, N, P]` over those of its neighbour frames.

    Formula, for a token i of frame f and every head, with j over all tokens of the frames that `neighbours[f]` names::

        logit_ij = scale * q_i . k_j + key_bias_j
        out_i    = sum_j softmax_j(logit_ij) v_j

    The neighbours are an index: nothing of size `[frames, frames]` or larger is ever written.

    Args:
        qkv: `[B, T, N, P, 3, h, D]`: queries, keys, values of h heads of width D; any strides; float32, float16,
            bfloat16 or float64. Sums and softmax are in float32 (float64 for float64).
        neighbours: `[T * N, W]` int64: for every frame the numbers `t N + n` of the frames it looks at, the same for
            all batch elements, in any order, filled up with -1; one that is there twice counts twice. Every frame needs
            one neighbour at least, and is its own only where it is listed. On a CPU values are checked; on a GPU they
            are not read back.
        key_bias: `[B, T, N, P]`, added to the logits of a key: float32, or float64 with a float64 qkv.
        scale: factor of q . k, above 0; default `D**-0.5`.

    Returns:
        `[B, T, N, P, h * D]` in qkv's dtype, contiguous. Under autocast qkv is cast to the autocast dtype first and
        key_bias to float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not go together; an index that is no frame's, or a frame without neighbours;
            scale is not above 0.

    Source:
        Sparse patterns of blocks: Child et al. 2019 (arXiv:1904.10509).

    Example:
        >>> import torch
        >>> from vggt_mv_ext import block_dilated_attention
        >>> qkv = torch.zeros(1, 3, 1, 1, 3, 1, 4)                 # three times of one view, one token each
        >>> qkv[..., 2, 0, 0] = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)
        >>> neighbours = torch.tensor([[0, 1, -1], [0, 1, 2], [1, 2, -1]])
        >>> block_dilated_attention(qkv, neighbours)[..., 0].flatten().tolist()
        [1.5, 3.0, 4.0]
    """
    _check(qkv, neighbours, key_bias, scale, any_dtypes=_common.autocast_may_cast(qkv))
    if reference.in_forward_mode():
        return reference.block_dilated_attention(qkv, neighbours, key_bias=key_bias, scale=scale)
    out, _ = torch.ops.vggt_mv.block_dilated_attention(qkv, neighbours, key_bias, scale)
    return out


def _check(
    qkv: Tensor, neighbours: Tensor, key_bias: Tensor | None, scale: float | None, *, any_dtypes: bool = False
) -> None:
    _common.check_qkv(NAME, qkv)
    _gathered.check_indices(NAME, "neighbours", neighbours, qkv.shape[1] * qkv.shape[2], "[T * N, W]", qkv)
    _gathered.check_key_bias(NAME, key_bias, qkv, any_dtypes=any_dtypes)
    _common.check_scale(NAME, scale)


def _check_values(qkv: Tensor, neighbours: Tensor, key_bias: Tensor | None, scale: float | None) -> None:
    _check(qkv, neighbours, key_bias, scale)
    _gathered.check_range(NAME, "neighbours", neighbours, -1, qkv.shape[1] * qkv.shape[2])
    if neighbours.device.type == "cpu":
        alone = (neighbours < 0).all(dim=1).nonzero().flatten().tolist()
        if alone:
            raise ValueError(f"{NAME}: neighbours must name a frame in every row, got -1 alone in rows {alone}")


def _reference(qkv: Tensor, neighbours: Tensor, key_bias: Tensor | None, scale: float | None) -> Tensor:
    return reference.block_dilated_attention(qkv, neighbours, key_bias=key_bias, scale=scale)


def _queries(qkv: Tensor, *_: Any) -> Sequence[int]:
    return qkv.shape[:4]


def _kernel(
    backend: str, qkv: Tensor, neighbours: Tensor, key_bias: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    return _gathered.run_kernel(backend, qkv, None, key_bias, neighbours, scale, token_keys="listed_frames")


OPERATOR = Operator(NAME, _gathered.LIMITS)
_gathered.define(
    OPERATOR,
    "Tensor qkv, Tensor neighbours, Tensor? key_bias, float? scale",
    check=_check_values,
    reference=_reference,
    queries=_queries,
    kernel=_kernel,
    kernel_gradients={},
)
