"""Stochastic depth: a residual branch is left out, sample by sample, while training."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["DropPath"]


class DropPath(nn.Module):
    """Zeroes whole samples with probability `drop_prob` in training and scales the others by ``1 / (1 - drop_prob)``.

    Huang et al., "Deep networks with stochastic depth", 2016. In evaluation mode, or at probability 0, the identity.

    Args:
        drop_prob: in [0, 1).

    Example:
        >>> import torch
        >>> DropPath(0.5).eval()(torch.ones(2)).tolist()
        [1.0, 1.0]
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= drop_prob < 1.0:
            raise ValueError(f"DropPath: drop_prob must lie in [0, 1), got {drop_prob}")
        self.drop_prob = drop_prob

    @property
    def active(self) -> bool:
        """Whether a call can drop anything now."""
        return self.training and self.drop_prob > 0.0

    def forward(self, x: Tensor) -> Tensor:
        """``[B, ...]`` -> the same; a sample is one index of the first dimension."""
        if not self.active:
            return x
        keep = 1.0 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)
