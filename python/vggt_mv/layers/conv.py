"""The 3 x 3 convolutions of dense heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggt_mv_ext import cannot_pack_linear_weight, conv3x3, packed_linear

__all__ = ["Conv3x3", "StridedConv3x3"]


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


class StridedConv3x3(nn.Conv2d):
    """`torch.nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)`; same parameters and results.

    On CPUs in inference the patches of the map go through `vggt_mv_ext.packed_linear`: the many weights of a small map
    are laid out for the matrix kernel once, and not in each call.

    Example:
        >>> import torch
        >>> StridedConv3x3(8, 3)(torch.zeros(2, 8, 5, 6)).shape
        torch.Size([2, 3, 3, 3])
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, stride=2, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        """``[N, C, h, w]`` -> ``[N, C', ceil(h / 2), ceil(w / 2)]``."""
        if (
            input.device.type != "cpu"
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
            or cannot_pack_linear_weight(self.weight, input.dtype) is not None
        ):
            return super().forward(input)
        padded = F.pad(input.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        patches = padded.unfold(1, 3, 2).unfold(2, 3, 2).permute(0, 1, 2, 4, 5, 3).flatten(3)  # [N, h', w', 9 C]
        return packed_linear(patches, self.weight, self.bias).permute(0, 3, 1, 2)
