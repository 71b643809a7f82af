"""Which module turns images into patch tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from vggt_mv.errors import VggtMvError
from vggt_mv.layers.patch_embed import PatchEmbed
from vggt_mv.layers.vision_transformer import DinoVisionTransformer, vit_base, vit_giant2, vit_large, vit_small
from vggt_mv.models.options import check_option_names, check_option_types, parameter_names

__all__ = ["build_patch_embed"]

# Constructor and features of each.
_VITS: dict[str, tuple[Callable[..., DinoVisionTransformer], int]] = {
    "dinov2_vitl14_reg": (vit_large, 1024),
    "dinov2_vitb14_reg": (vit_base, 768),
    "dinov2_vits14_reg": (vit_small, 384),
    "dinov2_vitg2_reg": (vit_giant2, 1536),
}


def build_patch_embed(
    patch_embed: str | nn.Module,
    img_size: int,
    patch_size: int,
    embed_dim: int,
    num_register_tokens: int,
    options: Mapping[str, Any] | None,
) -> nn.Module:
    """The module ``[F, 3, H, W] -> patch tokens`` that `Aggregator`'s arguments of the same names ask for.

    Raises:
        VggtMvError: an unknown name or option, or tokens of another width than `embed_dim`.
    """
    options = dict(options or {})
    if isinstance(patch_embed, nn.Module):
        if options:
            raise VggtMvError("Aggregator: patch_embed_options must be empty where patch_embed is a module")
        return patch_embed
    owner = "Aggregator: patch_embed_options"
    if "conv" in patch_embed:
        check_option_names(owner, options, parameter_names(PatchEmbed.__init__))
        check_option_types(owner, options, PatchEmbed.__init__)
        sizes = {"img_size": img_size, "patch_size": patch_size, "embed_dim": embed_dim}
        return PatchEmbed(**{**sizes, **options})
    if patch_embed not in _VITS:
        raise VggtMvError(
            f"Aggregator: patch_embed must be one of {', '.join(_VITS)}, a name that contains 'conv', or a module, "
            f"got {patch_embed!r}"
        )
    check_option_names(owner, options, parameter_names(DinoVisionTransformer.__init__))
    check_option_types(owner, options, DinoVisionTransformer.__init__)
    make_vit, width = _VITS[patch_embed]
    width = options.get("embed_dim", width)
    if width != embed_dim:
        raise VggtMvError(
            f"Aggregator: patch_embed must give tokens of embed_dim = {embed_dim} features, {patch_embed!r} gives "
            f"{width}; take another one or set patch_embed_options={{'embed_dim': ..., 'num_heads': ...}}"
        )
    defaults = {
        "img_size": img_size,
        "patch_size": patch_size,
        "num_register_tokens": num_register_tokens,
        "init_values": 1.0,
        "block_chunks": 0,
        "interpolate_antialias": True,
        "interpolate_offset": 0.0,
    }
    return make_vit(**{**defaults, **options})
