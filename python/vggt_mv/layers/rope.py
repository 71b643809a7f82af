"""Two-dimensional rotary position embedding for tokens at given positions.

The aggregator does not come here: its positions follow from the token grid, and `vggt_mv_ext.qk_norm_rope` computes
them on the fly. This is the form for a block that is called by itself, ``block(x, pos)``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vggt_mv.errors import VggtMvError

__all__ = ["PositionGetter", "RotaryPositionEmbedding2D"]


class PositionGetter:
    """Positions of the patches of a frame.

    Example:
        >>> PositionGetter()(1, 2, 2, torch.device("cpu")).tolist()
        [[[0, 0], [0, 1], [1, 0], [1, 1]]]
    """

    def __call__(self, batch_size: int, height: int, width: int, device: torch.device | str) -> Tensor:
        """int64 ``[batch_size, height * width, 2]``: row and column of each patch, row by row."""
        rows = torch.arange(height, device=device)
        columns = torch.arange(width, device=device)
        return torch.cartesian_prod(rows, columns).view(1, height * width, 2).repeat(batch_size, 1, 1)


class RotaryPositionEmbedding2D(nn.Module):
    """Rotates the first half of a head's features by the row, the second by the column (Su et al., "RoFormer", 2021).

    Within a half of width ``w = D/2``, feature ``j < w/2`` and feature ``j + w/2`` form a pair (a, b):

        angle = scaling_factor * p * frequency**(-2j/w)
        (a, b) -> (a cos(angle) - b sin(angle), b cos(angle) + a sin(angle))

    Args:
        frequency: base of the geometric series of angles.
        scaling_factor: multiplies the positions.

    Example:
        >>> rope = RotaryPositionEmbedding2D(frequency=100.0)
        >>> x = torch.ones(1, 1, 1, 4)
        >>> [round(v, 4) for v in rope(x, torch.tensor([[[0, 1]]])).flatten().tolist()]
        [1.0, 1.0, -0.3012, 1.3818]
    """

    def __init__(self, frequency: float = 100.0, scaling_factor: float = 1.0) -> None:
        super().__init__()
        self.base_frequency = float(frequency)
        self.scaling_factor = float(scaling_factor)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Rotates queries or keys.

        Args:
            tokens: ``[B, h, L, D]``, D a multiple of 4.
            positions: ``[B, L, 2]``, row and column.

        Returns:
            ``[B, h, L, D]`` of the dtype of `tokens`; angles and products are computed in float32 (or float64).

        Raises:
            VggtMvError: D no multiple of 4, or positions of another shape.
        """
        dim = tokens.shape[-1]
        if dim % 4:
            raise VggtMvError(f"RotaryPositionEmbedding2D: tokens must have a width that is a multiple of 4, got {dim}")
        if positions.ndim != 3 or positions.shape[-1] != 2:
            raise VggtMvError(
                f"RotaryPositionEmbedding2D: positions must be [B, L, 2] (row, column), got {list(positions.shape)}"
            )
        compute = torch.promote_types(tokens.dtype, torch.float32)
        half = dim // 2
        exponent = torch.arange(0, half, 2, device=tokens.device, dtype=compute) / half
        frequency = self.scaling_factor * self.base_frequency**-exponent
        rotated = []
        for axis, x in enumerate(tokens.to(compute).chunk(2, dim=-1)):
            angle = positions[:, None, :, axis, None].to(compute) * frequency
            cos, sin = angle.cos(), angle.sin()
            a, b = x.chunk(2, dim=-1)
            rotated += [a * cos - b * sin, b * cos + a * sin]
        return torch.cat(rotated, dim=-1).to(tokens.dtype)
