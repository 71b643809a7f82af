"""Multi-head self-attention, on plain sequences and on the token grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggt_mv.errors import VggtMvError
from vggt_mv.layers.linear import Linear
from vggt_mv.layers.rope import RotaryPositionEmbedding2D
from vggt_mv_ext import alternating_attention, qk_norm_rope

if TYPE_CHECKING:
    from vggt_mv.layers.grid import GridContext

__all__ = ["Attention"]


def _is_affine(norm: nn.Module) -> bool:
    return isinstance(norm, nn.LayerNorm) and norm.elementwise_affine and norm.bias is not None


class Attention(nn.Module):
    """``proj(softmax(q k^T / sqrt(D)) v)`` per head, where q and k may pass a LayerNorm over D and 2-D RoPE first.

    `qkv` is one Linear whose output is laid out ``[3, h, D]``.

    Args:
        dim: features C of a token, a multiple of `num_heads`; ``D = C / h``.
        num_heads: h.
        qkv_bias, proj_bias: whether the Linears have biases.
        attn_drop: dropout of attention weights (plain sequences only).
        proj_drop: dropout of the result.
        norm_layer: makes the norms of q and k.
        qk_norm: whether q and k are normalised.
        fused_attn: False computes the attention matrix explicitly.
        rope: rotates q and k where positions are given, or None.

    Example:
        >>> Attention(16, num_heads=2)(torch.zeros(1, 5, 16)).shape
        torch.Size([1, 5, 16])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        qk_norm: bool = False,
        fused_attn: bool = True,
        rope: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise VggtMvError(f"Attention: dim must be a multiple of num_heads = {num_heads}, got {dim}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.fused_attn = fused_attn
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm: nn.Module = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = attn_drop
        self.proj = Linear(dim, dim, bias=proj_bias)
        self.proj_drop: nn.Module = nn.Dropout(proj_drop) if proj_drop > 0 else nn.Identity()
        self.rope = rope

    def forward(self, x: Tensor, pos: Tensor | None = None, *, grid: GridContext | None = None) -> Tensor:
        """Attends within each sequence.

        Args:
            x: ``[B, L, C]``; with `grid` ``[B, T, N, P, C]``.
            pos: ``[B, L, 2]`` row and column of every token, for RoPE; None: no rotation.
            grid: attend along an axis of the token grid instead, with the positions that follow from it.

        Returns:
            A tensor of the shape of `x`.
        """
        return self.merge(self._attend(x, pos) if grid is None else self._attend_grid(x, grid))

    def project(self, x: Tensor, grid: GridContext) -> Tensor:
        """Queries and keys, normalised and rotated, and values of tokens ``[B,T,N,P,C]``: ``[B,T,N,P,3,h,D]``."""
        if self.training and self.attn_drop > 0:
            raise VggtMvError(f"Attention: attn_drop must be 0 on the token grid, got {self.attn_drop}")
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        return self._norm_rope(qkv, grid)

    def merge(self, y: Tensor) -> Tensor:
        """The way out of what the heads have gathered, ``[..., h * D]``: projection and dropout."""
        return self.proj_drop(self.proj(y))

    def _attend(self, x: Tensor, pos: Tensor | None) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        # Under autocast LayerNorm gives float32; attention wants one dtype.
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if self.rope is not None and pos is not None:
            q, k = self.rope(q, pos), self.rope(k, pos)
        dropout = self.attn_drop if self.training else 0.0
        if self.fused_attn:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        else:
            weights = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
            y = F.dropout(weights, dropout).to(v.dtype) @ v
        return y.transpose(1, 2).reshape(batch, length, dim)

    def _attend_grid(self, x: Tensor, grid: GridContext) -> Tensor:
        qkv = self.project(x, grid)
        return alternating_attention(qkv, grid.axis, key_bias=grid.key_bias, row_gate=grid.row_gate, scale=self.scale)

    def _norm_rope(self, qkv: Tensor, grid: GridContext) -> Tensor:
        """LayerNorm and RoPE of q and k in ``[B, T, N, P, 3, h, D]``: one pass where both are of the usual kind."""
        norms: list[tuple[Tensor, Tensor] | None] = [None, None]
        eps = 1e-5
        if self.rope is not None and _is_affine(self.q_norm) and _is_affine(self.k_norm):
            assert isinstance(self.q_norm, nn.LayerNorm)
            assert isinstance(self.k_norm, nn.LayerNorm)
            norms = [(self.q_norm.weight, self.q_norm.bias), (self.k_norm.weight, self.k_norm.bias)]
            eps = self.q_norm.eps
        elif not isinstance(self.q_norm, nn.Identity):
            q, k, v = qkv.unbind(dim=-3)
            qkv = torch.stack([self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v], dim=-3)
        if self.rope is None:
            return qkv
        if not isinstance(self.rope, RotaryPositionEmbedding2D) or self.rope.scaling_factor != 1.0:
            raise VggtMvError(
                "Attention: rope must be a RotaryPositionEmbedding2D with scaling_factor=1 on the token grid, "
                f"got {self.rope!r}"
            )
        return qk_norm_rope(
            qkv,
            norms[0],
            norms[1],
            grid.grid_hw,
            grid.num_special,
            self.rope.base_frequency,
            eps,
            special_position=grid.special_position,
            inplace=not self.qkv._forward_hooks,  # nobody else holds what the Linear wrote
        )
