"""The DINOv2 vision transformer: images to patch tokens.

    [cls] + patches + pos_embed -> register tokens after cls -> depth blocks -> LayerNorm

Initialisation: Linears and position embedding normal with standard deviation 0.02, biases zero, cls and register tokens
normal with 1e-6, the convolution as PyTorch does it: the practice of DINOv2 (Oquab et al., 2023;
registers: Darcet et al., 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggt_mv.errors import VggtMvError
from vggt_mv.layers.block import Block, norm1, run_block
from vggt_mv.layers.grid import GridContext
from vggt_mv.layers.init import init_linear, init_normal
from vggt_mv.layers.mlp import Mlp
from vggt_mv.layers.patch_embed import PatchEmbed
from vggt_mv.layers.precision import autocast_enabled
from vggt_mv.layers.swiglu_ffn import SwiGLUFFN

__all__ = ["DinoVisionTransformer", "vit_base", "vit_giant2", "vit_large", "vit_small"]

_FFN_LAYERS: dict[str, type[nn.Module]] = {"mlp": Mlp, "swiglu": SwiGLUFFN, "swiglufused": SwiGLUFFN}


class DinoVisionTransformer(nn.Module):
    """DINOv2 ViT with optional register tokens.

    Args:
        img_size: side in pixels of the square that `pos_embed` covers; other sizes are interpolated.
        patch_size: side of a patch.
        in_chans: channels of the image.
        embed_dim, depth, num_heads, mlp_ratio: size of the transformer.
        qkv_bias, ffn_bias, proj_bias: whether the Linears have biases.
        drop_path_rate: probability of stochastic depth at the last block, growing linearly from 0 at the first.
        drop_path_uniform: the same probability for all blocks.
        init_values: initial LayerScale factor; None or 0: no LayerScale.
        embed_layer, act_layer, block_fn: make the parts.
        ffn_layer: ``"mlp"``, ``"swiglu"`` or ``"swiglufused"`` (the same as swiglu).
        block_chunks: > 0 nests the blocks in that many lists, keys ``blocks.{chunk}.{block}``; 0: ``blocks.{block}``.
        num_register_tokens: register tokens after cls.
        interpolate_antialias: low-pass filter when `pos_embed` shrinks.
        interpolate_offset: 0 resizes `pos_embed` to exactly the grid; else by the factor
            ``(size + offset) / old size``, as the first DINOv2 weights want it.
        qk_norm: LayerNorm of q and k.

    Example:
        >>> vit = DinoVisionTransformer(img_size=28, patch_size=14, embed_dim=16, depth=1, num_heads=2, block_chunks=0)
        >>> vit(torch.zeros(1, 3, 28, 42))["x_norm_patchtokens"].shape
        torch.Size([1, 6, 16])
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        ffn_bias: bool = True,
        proj_bias: bool = True,
        drop_path_rate: float = 0.0,
        drop_path_uniform: bool = False,
        init_values: float | None = None,
        embed_layer: Callable[..., nn.Module] = PatchEmbed,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        block_fn: Callable[..., nn.Module] = Block,
        ffn_layer: str = "mlp",
        block_chunks: int = 1,
        num_register_tokens: int = 0,
        interpolate_antialias: bool = False,
        interpolate_offset: float = 0.1,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        if ffn_layer not in _FFN_LAYERS:
            raise VggtMvError(f"DinoVisionTransformer: ffn_layer must be one of {list(_FFN_LAYERS)}, got {ffn_layer!r}")
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        self.embed_dim = self.num_features = embed_dim
        self.patch_size = patch_size
        self.depth = depth
        self.num_register_tokens = num_register_tokens
        self.interpolate_antialias = interpolate_antialias
        self.interpolate_offset = interpolate_offset
        self.gradient_checkpointing = True

        self.patch_embed = embed_layer(img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (img_size // patch_size) ** 2, embed_dim))
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, num_register_tokens, embed_dim)) if num_register_tokens else None
        )
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        drop_path = [
            drop_path_rate if drop_path_uniform else drop_path_rate * i / max(depth - 1, 1) for i in range(depth)
        ]
        blocks = [
            block_fn(
                dim=embed_dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                proj_bias=proj_bias,
                ffn_bias=ffn_bias,
                init_values=init_values,
                drop_path=drop_path[i],
                act_layer=act_layer,
                norm_layer=norm_layer,
                ffn_layer=_FFN_LAYERS[ffn_layer],
                qk_norm=qk_norm,
            )
            for i in range(depth)
        ]
        self.blocks = nn.ModuleList(blocks if block_chunks <= 0 else _chunked(blocks, block_chunks))
        self.norm = norm_layer(embed_dim)
        self.head = nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Draws all weights anew; see the top of the file."""
        init_normal(self.pos_embed, std=0.02)
        init_normal(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            init_normal(self.register_tokens, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module, std=0.02)

    def interpolate_pos_encoding(self, rows: int, columns: int) -> Tensor:
        """The position embedding ``[1, 1 + rows * columns, C]`` of a grid of that size, in the dtype of `pos_embed`.

        The patch part is resized bicubically in float32; the entry of cls stays as it is.
        """
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if (rows, columns) == (side, side):
            return self.pos_embed
        patches = self.pos_embed[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
        if self.interpolate_offset:
            offset = self.interpolate_offset
            target: dict[str, Any] = {"scale_factor": ((rows + offset) / side, (columns + offset) / side)}
        else:
            target = {"size": (rows, columns)}
        patches = F.interpolate(
            patches, mode="bicubic", antialias=self.interpolate_antialias, align_corners=False, **target
        )
        patches = patches.permute(0, 2, 3, 1).flatten(1, 2).to(self.pos_embed.dtype)
        return torch.cat([self.pos_embed[:, :1], patches], dim=1)

    def prepare_tokens(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """``[B, 3, H, W]`` -> ``[B, 1 + R + (H/p)(W/p), C]``; `masks`, bool ``[B, (H/p)(W/p)]``: patches to hide."""
        rows, columns = x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size
        x = self.patch_embed(x)
        if masks is not None:
            x = torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        pos_embed = self.interpolate_pos_encoding(rows, columns)
        parts = [(self.cls_token + pos_embed[:, :1]).expand(x.shape[0], -1, -1)]
        if self.register_tokens is not None:
            parts.append(self.register_tokens.expand(x.shape[0], -1, -1))
        return torch.cat([*parts, x + pos_embed[:, 1:]], dim=1)

    def forward(
        self, x: Tensor, masks: Tensor | None = None, *, on_block: Callable[[int, int], None] | None = None
    ) -> dict[str, Tensor | None]:
        """Runs the transformer.

        Args:
            x: normalised images ``[B, 3, H, W]``.
            masks: bool ``[B, (H/p)(W/p)]``, True where the mask token takes the place of a patch.
            on_block: called after every block with (blocks done, blocks in all).

        Returns:
            ``x_norm_clstoken [B, C]``, ``x_norm_regtokens [B, R, C]``, ``x_norm_patchtokens [B, P, C]``, ``x_prenorm``
            (all tokens before the last norm) and ``masks``.
        """
        x = self.prepare_tokens(x, masks)
        # A batch of frames is the token grid [B, T=1, N=1, L, C], and its attention that of each frame by itself.
        x = x[:, None, None]
        blocks = [block for chunk in self.blocks for block in _blocks_of(chunk)]
        # The last residual addition rounds the norm's result to the dtype of the branch. Under autocast that would be
        # 16 bits for the tokens that all else starts from.
        final_norm = None if autocast_enabled(x.device) else self.norm
        next_norms = [*(norm1(block) for block in blocks[1:]), final_norm]
        checkpoint = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        context = GridContext(axis="frame", grid_hw=(1, x.shape[-2]), num_special=0)
        normed: Tensor | None = None
        for i, (block, next_norm) in enumerate(zip(blocks, next_norms, strict=True)):
            x, normed = run_block(block, x, context, normed=normed, next_norm=next_norm, checkpoint=checkpoint)
            if on_block is not None:
                on_block(i + 1, len(blocks))
        if normed is None or not blocks:
            normed = self.norm(x)
        x, normed = x[:, 0, 0], normed[:, 0, 0]
        first_patch = 1 + self.num_register_tokens
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_norm_regtokens": normed[:, 1:first_patch],
            "x_norm_patchtokens": normed[:, first_patch:],
            "x_prenorm": x,
            "masks": masks,
        }


def _chunked(blocks: list[nn.Module], chunks: int) -> list[nn.ModuleList]:
    """`chunks` lists; block i keeps index i within its list, which identities fill up to there."""
    size = -(-len(blocks) // chunks)
    return [
        nn.ModuleList([*(nn.Identity() for _ in range(start)), *blocks[start : start + size]])
        for start in range(0, len(blocks), size)
    ]


def _blocks_of(chunk: nn.Module) -> list[nn.Module]:
    if not isinstance(chunk, nn.ModuleList):
        return [chunk]
    return [block for block in chunk if not isinstance(block, nn.Identity)]


def vit_small(patch_size: int = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
    """ViT-S: 384 features, 12 blocks, 6 heads. `kwargs` go to `DinoVisionTransformer` and win."""
    return _vit(384, 12, 6, patch_size, num_register_tokens, kwargs)


def vit_base(patch_size: int = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
    """ViT-B: 768 features, 12 blocks, 12 heads. `kwargs` go to `DinoVisionTransformer` and win."""
    return _vit(768, 12, 12, patch_size, num_register_tokens, kwargs)


def vit_large(patch_size: int = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
    """ViT-L: 1024 features, 24 blocks, 16 heads. `kwargs` go to `DinoVisionTransformer` and win."""
    return _vit(1024, 24, 16, patch_size, num_register_tokens, kwargs)


def vit_giant2(patch_size: int = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
    """ViT-g: 1536 features, 40 blocks, 24 heads. `kwargs` go to `DinoVisionTransformer` and win.

    The published DINOv2 weights of this size have gated layers: ``ffn_layer="swiglufused"``.
    """
    return _vit(1536, 40, 24, patch_size, num_register_tokens, kwargs)


def _vit(
    embed_dim: int, depth: int, num_heads: int, patch_size: int, num_register_tokens: int, options: dict[str, Any]
) -> DinoVisionTransformer:
    size = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "mlp_ratio": 4.0}
    return DinoVisionTransformer(
        **{"patch_size": patch_size, "num_register_tokens": num_register_tokens, **size, **options}
    )
