"""Images to patch tokens by one convolution."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from vggt_mv.errors import VggtMvError

__all__ = ["PatchEmbed"]


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class PatchEmbed(nn.Module):
    """A convolution whose kernel is its stride: ``[B, 3, H, W] -> [B, (H/p)(W/p), C]``, patches row by row.

    Args:
        img_size: side (or height and width) that `num_patches` is counted for; other sizes work as well.
        patch_size: side p (or height and width) of a patch in pixels.
        in_chans: channels of the image.
        embed_dim: features C of a token.
        norm_layer: makes a norm over C that follows, or None.
        flatten_embedding: False returns ``[B, H/p, W/p, C]``.

    Example:
        >>> import torch
        >>> PatchEmbed(patch_size=14, embed_dim=8)(torch.zeros(2, 3, 28, 42)).shape
        torch.Size([2, 6, 8])
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[[int], nn.Module] | None = None,
        flatten_embedding: bool = True,
    ) -> None:
        super().__init__()
        self.img_size = _pair(img_size)
        self.patch_size = _pair(patch_size)
        self.patches_resolution = (self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1])
        self.num_patches = self.patches_resolution[0] * self.patches_resolution[1]
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.flatten_embedding = flatten_embedding
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.norm: nn.Module = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_chans, H, W]`` -> tokens.

        Raises:
            VggtMvError: H or W is no multiple of the patch size.
        """
        height, width = x.shape[-2:]
        if height % self.patch_size[0] or width % self.patch_size[1]:
            raise VggtMvError(
                f"PatchEmbed: images must have sides that are multiples of {self.patch_size}, got {height} x {width}"
            )
        x = self.proj(x).permute(0, 2, 3, 1)
        if self.flatten_embedding:
            x = x.flatten(1, 2)
        return self.norm(x)
