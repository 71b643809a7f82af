"""LayerScale: a learnt factor per feature on a residual branch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["LayerScale"]


class LayerScale(nn.Module):
    """``gamma * x`` with one learnt `gamma` per feature (Touvron et al., "Going deeper with image transformers", 2021).

    Args:
        dim: features C.
        init_values: initial value of every entry of `gamma`.
        inplace: multiply the input itself.

    Example:
        >>> LayerScale(2, init_values=0.5)(torch.ones(3, 2)).tolist()[0]
        [0.5, 0.5]
    """

    def __init__(self, dim: int, init_values: float = 1e-5, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        self.gamma = nn.Parameter(torch.full((dim,), float(init_values)))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C]`` -> ``[..., C]``."""
        return x.mul_(self.gamma) if self.inplace else x * self.gamma
