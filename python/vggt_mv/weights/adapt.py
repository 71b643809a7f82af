"""Shape rules: the two tensors that may be brought to another shape, and how. Everything else must fit exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Adaptation", "adaptation_for"]


@dataclass(frozen=True)
class Adaptation:
    """How a tensor is brought to the shape that the model has, and the sentence that the report gives for it."""

    kind: Literal["register_tokens", "position_grid"]
    shape: tuple[int, ...]
    reason: str

    def __call__(self, tensor: Tensor) -> Tensor:
        """The adapted tensor, in the dtype of the source and in memory of its own."""
        if self.kind == "register_tokens":
            return tensor[:, :, : self.shape[2]].expand(self.shape).clone()
        return _resample(tensor, self.shape)


def adaptation_for(canonical: str, source: tuple[int, ...], target: tuple[int, ...], *, pi3: bool) -> Adaptation | None:
    """The shape rule for this tensor, or None where there is none and the shapes simply do not match.

    - Pi3's ``register_token [1, 1, K, C]`` -> ``[1, 2, R, C]``, R <= K: the first R tokens, for both variants.
    - ``patch_embed.pos_embed [1, 1 + g*g, C]`` -> another square grid: the class token's row is kept, the grid is
      resampled bicubically with antialiasing in float32, as the model itself does for images of another size.
    """
    if pi3 and canonical == "aggregator.register_token" and len(source) == len(target) == 4:
        same = source[0] == target[0] and source[3] == target[3]
        if same and source[1] == 1 and target[1] >= 1 and target[2] <= source[2]:
            reason = f"the first {target[2]} of {source[2]} register tokens, for both variants"
            return Adaptation("register_tokens", target, reason)
    if canonical == "aggregator.patch_embed.pos_embed" and len(source) == len(target) == 3:
        old, new = _grid(source[1]), _grid(target[1])
        if old and new and source[0] == target[0] and source[2] == target[2]:
            return Adaptation(
                "position_grid", target, f"position grid {old}x{old} resampled to {new}x{new} (bicubic, antialiased)"
            )
    return None


def _grid(tokens: int) -> int:
    """Side of the square grid of `tokens` - 1 patches; 0 where it is not square or empty."""
    side = math.isqrt(max(tokens - 1, 0))
    return side if side * side == tokens - 1 else 0


def _resample(pos_embed: Tensor, shape: tuple[int, ...]) -> Tensor:
    old, new = _grid(pos_embed.shape[1]), _grid(shape[1])
    first, grid = pos_embed[:, :1], pos_embed[:, 1:]
    grid = grid.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    grid = grid.permute(0, 2, 3, 1).reshape(1, new * new, -1).to(pos_embed.dtype)
    return torch.cat((first, grid), dim=1)
