"""The Linear of transformer blocks."""

from __future__ import annotations

from torch import Tensor, nn

from vggt_mv_ext import packed_linear

__all__ = ["Linear"]


class Linear(nn.Linear):
    """`torch.nn.Linear` with the activation that follows, by `vggt_mv_ext.packed_linear`.

    Same arguments, parameters and results; faster on CPUs in inference.

    Example:
        >>> import torch
        >>> Linear(8, 3)(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 5, 3])
    """

    def forward(self, input: Tensor, activation: str = "none") -> Tensor:
        """``[..., in_features]`` -> ``activation(input @ weight.T + bias)``; "none" or "gelu"."""
        return packed_linear(input, self.weight, self.bias, activation)
