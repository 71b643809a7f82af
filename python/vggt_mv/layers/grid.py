"""What a block has to know about the token grid ``[B, T, N, P, C]`` to attend along one of its axes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["GridContext"]


@dataclass(frozen=True)
class GridContext:
    """One attention over tokens ``[B, T, N, P, C]``: T times, N views, P tokens a frame, none of which ever moves.

    Attributes:
        axis: what one sequence of the attention is: ``"frame"`` (P tokens of one frame), ``"view"`` (N P tokens of one
            time), ``"time"`` (T P tokens of one view) or ``"global"`` (all T N P).
        grid_hw: rows and columns of patches in a frame, ``P = num_special + rows * columns``.
        num_special: tokens before the patches (camera and registers).
        special_position: row and column that RoPE takes for those.
        key_bias: ``[B, T, N, P]``, float32, added to the logits of a key, or None.
        row_gate: ``[P]`` or ``[B, T, N, P]``, float32: how much of `key_bias` a query sees; None means 1.
    """

    axis: str
    grid_hw: tuple[int, int]
    num_special: int
    special_position: int = 0
    key_bias: Tensor | None = None
    row_gate: Tensor | None = None
