"""The tracker's transformer: attention along time, and across tracks through a few virtual ones.

Its blocks differ from the usual pre-norm ones: **the residual adds to the normalised input**,

    x = norm1(x);    x = x + attention(x);    x = x + mlp(norm2(x)).

Attention across N tracks costs N V instead of N^2: V virtual tracks read the points, exchange among themselves, and
are read by the points. After Karaev et al., "CoTracker: It Is Better to Track Together", 2024.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vggt_mv.errors import VggtMvError
from vggt_mv.layers.mlp import Mlp

__all__ = ["CrossAttentionBlock", "SelfAttentionBlock", "UpdateTransformer"]


class SelfAttentionBlock(nn.Module):
    """``x = norm1(x); x = x + attn(x); x = x + mlp(norm2(x))`` on ``[batch, length, dim]``."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.mlp = Mlp(in_features=dim, hidden_features=int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, length, dim]`` -> the same shape."""
        x = self.norm1(x)
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class CrossAttentionBlock(nn.Module):
    """``x = norm1(x); c = norm_context(context); x = x + attn(q=x, kv=c); x = x + mlp(norm2(x))``."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.cross_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.mlp = Mlp(in_features=dim, hidden_features=int(dim * mlp_ratio))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """``[batch, length, dim]``, context ``[batch, any length, dim]`` -> the shape of x."""
        x = self.norm1(x)
        context = self.norm_context(context)
        x = x + self.cross_attn(x, context, context, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class UpdateTransformer(nn.Module):
    """Updates of all tracks in all frames from their tokens.

    Args:
        input_dim: width of a token.
        hidden_size: width inside, a multiple of `num_heads`.
        output_dim: width of an update.
        depth: number of layers, each along time, then across tracks.
        num_heads: heads of all attentions.
        mlp_ratio: hidden width of the MLPs over `hidden_size`.
        num_virtual_tracks: V.
        space_attention: False leaves out everything across tracks; then each track moves by itself.

    Raises:
        VggtMvError: `hidden_size` is no multiple of `num_heads`.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_size: int,
        output_dim: int,
        depth: int,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        num_virtual_tracks: int = 64,
        space_attention: bool = True,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise VggtMvError(
                f"UpdateTransformer: hidden_size must be a multiple of {num_heads} heads, got {hidden_size}"
            )
        self.space_attention = space_attention
        self.input_norm = nn.LayerNorm(input_dim)
        self.input_transform = nn.Linear(input_dim, hidden_size)
        self.output_norm = nn.LayerNorm(hidden_size)
        self.flow_head = nn.Linear(hidden_size, output_dim)
        nn.init.trunc_normal_(self.flow_head.weight, std=1e-3)  # an untrained tracker hardly moves its points

        def self_blocks() -> nn.ModuleList:
            return nn.ModuleList(SelfAttentionBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))

        def cross_blocks() -> nn.ModuleList:
            return nn.ModuleList(CrossAttentionBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))

        self.time_blocks = self_blocks()
        if space_attention:
            # The key is spelled like this in the pretrained weights.
            self.virual_tracks = nn.Parameter(torch.randn(1, num_virtual_tracks, 1, hidden_size))
            self.space_virtual_blocks = self_blocks()
            self.space_point2virtual_blocks = cross_blocks()
            self.space_virtual2point_blocks = cross_blocks()

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, N, S, input_dim]`` (N tracks over S frames) -> ``[B, N, S, output_dim]``."""
        batch, count, frames, _ = tokens.shape
        start = self.input_transform(self.input_norm(tokens))
        x = start
        if self.space_attention:
            x = torch.cat((start, self.virual_tracks.expand(batch, -1, frames, -1)), dim=1)
        for i, time_block in enumerate(self.time_blocks):
            x = time_block(x.flatten(0, 1)).unflatten(0, (batch, -1))
            if self.space_attention:
                x = self._across_tracks(x, count, i)
        return self.flow_head(self.output_norm(x[:, :count] + start))

    def _across_tracks(self, x: Tensor, count: int, layer: int) -> Tensor:
        """One exchange between the tracks of each frame; the first `count` tracks are real, the others virtual."""
        batch, frames = x.shape[0], x.shape[2]
        x = x.transpose(1, 2).flatten(0, 1)  # [B S, tracks, hidden]
        points, virtual = x[:, :count], x[:, count:]
        virtual = self.space_virtual2point_blocks[layer](virtual, points)
        virtual = self.space_virtual_blocks[layer](virtual)
        points = self.space_point2virtual_blocks[layer](points, virtual)
        return torch.cat((points, virtual), dim=1).unflatten(0, (batch, frames)).transpose(1, 2)
