"""The building blocks of the transformer: attention, MLP, LayerScale, RoPE, patch embedding, the DINOv2 ViT."""

from vggt_mv.layers.attention import Attention
from vggt_mv.layers.block import Block
from vggt_mv.layers.drop_path import DropPath
from vggt_mv.layers.grid import GridContext
from vggt_mv.layers.layer_scale import LayerScale
from vggt_mv.layers.linear import Linear
from vggt_mv.layers.mlp import Mlp
from vggt_mv.layers.patch_embed import PatchEmbed
from vggt_mv.layers.rope import PositionGetter, RotaryPositionEmbedding2D
from vggt_mv.layers.swiglu_ffn import SwiGLUFFN

__all__ = [
    "Attention",
    "Block",
    "DropPath",
    "GridContext",
    "LayerScale",
    "Linear",
    "Mlp",
    "PatchEmbed",
    "PositionGetter",
    "RotaryPositionEmbedding2D",
    "SwiGLUFFN",
]
