"""The head that finds what moves: from the tokens of a frame to a mask over its patches (PAGE-4D)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggt_mv.layers.precision import without_autocast

__all__ = ["SpatialMaskHead"]


class SpatialMaskHead(nn.Module):
    """``m = clamp(alpha * sigmoid(-z / tau), 0, 1)`` with a logit z per patch from a small convolutional network.

        z = head0(patch tokens)                      depthwise 3x3, GELU, depthwise 3x3, GELU, 1x1 to one channel
        tau = max(softplus(tau_logit) + 1e-6, 1e-3)        alpha = softplus(alpha_logit) + 1e-6

    1 means that the scene moves there. `alpha_logit` starts at ``log 1 = 0`` and `tau_logit` at ``log 2``, so alpha at
    0.69 and tau at 1.10; the convolutions start as PyTorch makes them.

    Args:
        dim: features C of a token.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha_logit = nn.Parameter(torch.tensor(0.0))
        self.tau_logit = nn.Parameter(torch.tensor(math.log(2.0)))
        self.head0 = nn.Sequential(
            nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim),
            nn.GELU(),
            nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim),
            nn.GELU(),
            nn.Conv2d(dim, 1, kernel_size=1),
        )

    def forward(self, tokens: Tensor, grid_hw: tuple[int, int], num_special: int) -> Tensor:
        """Predicts the mask of every frame.

        Args:
            tokens: ``[..., P, C]``; no gradient flows back into them.
            grid_hw: rows and columns of patches.
            num_special: tokens before the patches.

        Returns:
            ``[..., rows, columns]`` in [0, 1], float32 (float64 in a float64 model). Computed outside autocast: it is
            small, and steers all attention after.
        """
        leading = tokens.shape[:-2]
        with without_autocast(tokens.device):
            wide = torch.promote_types(self.tau_logit.dtype, torch.float32)
            patches = tokens.detach()[..., num_special:, :].to(self.tau_logit.dtype)
            maps = patches.flatten(0, -3).unflatten(1, grid_hw).permute(0, 3, 1, 2)
            z = self.head0(maps).to(wide).view(*leading, *grid_hw)
            tau = (F.softplus(self.tau_logit.to(wide)) + 1e-6).clamp(min=1e-3)
            alpha = F.softplus(self.alpha_logit.to(wide)) + 1e-6
            return (alpha * torch.sigmoid(-z / tau)).clamp(0.0, 1.0)
