"""The 3 x 3 convolution of dense heads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vggt_mv_ext import conv3x3

__all__ = ["Conv3x3"]


class Conv3x3(nn.Conv2d):
    """`torch.nn.Conv2d(in_channels, out_channels, 3, padding=1)` and what stands around it, by `vggt_mv_ext.conv3x3`.

    Same parameters and results; faster on CPUs in inference.

    Example:
        >>> import torch
        >>> Conv3x3(8, 3)(torch.zeros(2, 8, 5, 6), activation="relu").shape
        torch.Size([2, 3, 5, 6])
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1, bias=bias)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: str = "none",
        *,
        size: Sequence[int] | None = None,
        offsets: tuple[Tensor, Tensor] | None = None,
        overwrite_residual: bool = False,
    ) -> Tensor:
        """``[N, C, h, w]`` -> ``activation(conv(resize(input, size) + offsets) + residual)``; "none" or "relu"."""
        return conv3x3(
            input,
            self.weight,
            self.bias,
            residual,
            activation,
            size=size,
            offsets=offsets,
            overwrite_residual=overwrite_residual,
        )
