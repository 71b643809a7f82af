"""The pre-norm transformer block, with its residual additions fused into the norm that follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

import torch.utils.checkpoint
from torch import Tensor, nn

from vggt_mv.layers import pieces
from vggt_mv.layers.attention import Attention
from vggt_mv.layers.drop_path import DropPath
from vggt_mv.layers.grid import GridContext
from vggt_mv.layers.layer_scale import LayerScale
from vggt_mv.layers.mlp import Mlp
from vggt_mv.layers.residual import add_and_norm

__all__ = ["Block", "norm1", "run_block"]

# How many tokens the MLP takes at a time where no gradient is recorded. Its hidden layer is four times as wide as the
# tokens, twice over with the activation's result: for a whole long sequence it would be most of the memory that a frame
# costs. 16384 tokens (18 frames of 336 x 518) are 4096 tiles of a matrix product: more fill no GPU better.
MLP_TOKENS = 16384


def _run_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    """``mlp(x)``, in inference on `MLP_TOKENS` tokens at a time, which share the memory of the hidden layer.

    Hooks on the MLP see it whole, and so its input; those on its parts see as many tokens as run at a time.
    """
    tokens = x.numel() // x.shape[-1]
    hooked = mlp._forward_hooks or mlp._forward_pre_hooks
    if tokens <= MLP_TOKENS or torch.is_grad_enabled() or torch.compiler.is_compiling() or hooked:
        return mlp(x)
    parts = x.reshape(tokens, x.shape[-1]).split(MLP_TOKENS)
    first = mlp(parts[0])
    y = first.new_empty(tokens, first.shape[-1])
    y[:MLP_TOKENS] = first
    del first
    for i, part in enumerate(parts[1:], 1):
        y[i * MLP_TOKENS : (i + 1) * MLP_TOKENS] = mlp(part)
    return y.view(*x.shape[:-1], -1)


class Block(nn.Module):
    """``x = x + ls1(attn(norm1(x)));  x = x + ls2(mlp(norm2(x)))``.

    Args:
        dim: features C.
        num_heads: heads of the attention.
        mlp_ratio: hidden width of the MLP over C.
        qkv_bias, proj_bias, ffn_bias: whether the Linears have biases.
        drop: dropout after the attention's projection and in the MLP.
        attn_drop: dropout of attention weights (plain sequences only).
        init_values: initial LayerScale factor; None or 0: no LayerScale.
        drop_path: probability of leaving out a branch in training.
        act_layer, norm_layer, attn_class, ffn_layer: make the parts.
        qk_norm, fused_attn, rope: see `Attention`.

    Example:
        >>> import torch
        >>> Block(16, num_heads=2, init_values=0.01)(torch.zeros(1, 5, 16)).shape
        torch.Size([1, 5, 16])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        attn_class: Callable[..., Attention] = Attention,
        ffn_layer: Callable[..., nn.Module] = Mlp,
        qk_norm: bool = False,
        fused_attn: bool = True,
        rope: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        # Not passed on: norm_layer. The norms of q and k are LayerNorms with eps 1e-5 whatever the block's own are.
        self.attn = attn_class(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=drop,
            qk_norm=qk_norm,
            fused_attn=fused_attn,
            rope=rope,
        )
        self.ls1: nn.Module = LayerScale(dim, init_values=init_values) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = ffn_layer(
            in_features=dim, hidden_features=int(dim * mlp_ratio), act_layer=act_layer, drop=drop, bias=ffn_bias
        )
        self.ls2: nn.Module = LayerScale(dim, init_values=init_values) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path)

    @overload
    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor: ...

    @overload
    def forward(
        self, x: Tensor, pos: None = None, *, grid: GridContext, normed: Tensor | None, next_norm: nn.Module | None
    ) -> tuple[Tensor, Tensor | None]: ...

    def forward(
        self,
        x: Tensor,
        pos: Tensor | None = None,
        *,
        grid: GridContext | None = None,
        normed: Tensor | None = None,
        next_norm: nn.Module | None = None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Runs the block on sequences, ``block(x, pos)``, or on the token grid, ``block(x, grid=...)``.

        Args:
            x: ``[B, L, C]``, or with `grid` ``[B, T, N, P, C]``.
            pos: ``[B, L, 2]`` positions for RoPE (sequences only).
            grid: the axis to attend along.
            normed: ``norm1(x)`` where the block before has computed it already.
            next_norm: the norm that comes after this block (norm1 of the next one), applied in the same pass as the
                last residual addition.

        Returns:
            The tokens; with `grid` a pair: the tokens and, if `next_norm` is given, ``next_norm(tokens)``, else None.
        """
        if normed is None:
            normed = self.norm1(x)
        if grid is None:
            return self.finish(x, self.attn(normed, pos=pos), None)[0]
        if pieces.fits(self, x, next_norm):
            return pieces.run(self, x, normed, grid, next_norm)
        return self.finish(x, self.attn(normed, grid=grid), next_norm)

    def finish(self, x: Tensor, y: Tensor, next_norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
        """From the attention's result `y`, which is used up, to the block's: both residual additions and the MLP."""
        if pieces.fits(self, x, next_norm):
            return pieces.finish(self, x, y, next_norm)
        x, normed = add_and_norm(x, y, self.ls1, self.drop_path1, self.norm2)
        y = _run_mlp(self.mlp, normed)
        if next_norm is not None:
            return add_and_norm(x, y, self.ls2, self.drop_path2, next_norm)
        return x + self.drop_path2(self.ls2(y)), None

    def add_attention(self, x: Tensor, y: Tensor, next_norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
        """``x + ls1(y)``, the first residual addition alone, and ``next_norm`` of it if that is given."""
        if next_norm is not None:
            return add_and_norm(x, y, self.ls1, self.drop_path1, next_norm)
        return x + self.drop_path1(self.ls1(y)), None


def run_block(
    block: nn.Module,
    x: Tensor,
    grid: GridContext,
    *,
    normed: Tensor | None,
    next_norm: nn.Module | None,
    checkpoint: bool,
) -> tuple[Tensor, Tensor | None]:
    """Runs a block on the token grid, ``(x, normed) -> (x, next_normed)``; see `Block.forward`.

    With `checkpoint` the block keeps no activations but its input `x` for the backward pass and returns None for the
    normed tokens: those would be a second tensor to keep for every block, where recomputing one LayerNorm is cheap.
    """
    if checkpoint:
        x, _ = torch.utils.checkpoint.checkpoint(block, x, grid=grid, use_reentrant=False)
        return x, None
    return block(x, grid=grid, normed=normed, next_norm=next_norm)


def norm1(block: nn.Module) -> nn.Module:
    """The norm that `block` applies first: the one before it can apply it in its place."""
    norm = block.norm1
    assert isinstance(norm, nn.Module)
    return norm
