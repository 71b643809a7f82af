"""Sparse global attention: tokens of all times and views exchange information at a fraction of the dense cost."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DILATIONS", "dilated_neighbours"]

#: How far the neighbours of a frame are from it, in times and in views.
DILATIONS = (1, 2, 4)


def dilated_neighbours(times: int, views: int, device: torch.device | str | None = None) -> Tensor:
    """The frames that each frame of the grid looks at: itself and those around it in a dilated pattern.

    Those are the frames ``(t + dt, v + dv)`` with ``(dt, dv)`` in ``{-l, 0, l}^2`` and l in {1, 2, 4}, as far as they
    exist: nothing wraps around. Each is there once.

    Args:
        times: T.
        views: N.
        device: where the tensor is made.

    Returns:
        ``[T * N, W]`` int64, W at most 25: numbers ``t N + v`` in increasing order, then -1.

    Example:
        >>> dilated_neighbours(3, 1).tolist()
        [[0, 1, 2, -1, -1], [0, 1, 2, -1, -1], [0, 1, 2, -1, -1]]
    """
    offsets = sorted({(dt, dv) for length in DILATIONS for dt in (-length, 0, length) for dv in (-length, 0, length)})
    frames = torch.arange(times * views, device=device)
    columns = []
    for dt, dv in offsets:
        if abs(dt) < times and abs(dv) < views:
            time, view = frames // views + dt, frames % views + dv
            exists = (time >= 0) & (time < times) & (view >= 0) & (view < views)
            columns.append(torch.where(exists, time * views + view, times * views))
    found = torch.stack(columns, dim=1).sort(dim=1).values
    return torch.where(found == times * views, -1, found)
