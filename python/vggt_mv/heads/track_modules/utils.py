"""Sampling of feature maps, correlation windows and embeddings for the tracker.

Coordinates are (x, y) in cells of the map, the centre of the first cell at (0, 0). Maps are channels-last, ``[M, h,
w, F]``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vggt_mv.errors import VggtMvError
from vggt_mv.heads.utils import axis_embedding

__all__ = ["correlation_window", "feature_pyramid", "flow_embedding", "sample_map", "sampled_position_embedding"]

# Numbers in the gathered windows of one step: 64 MB in float32. Large enough that the steps' own cost vanishes.
_WINDOW_NUMBERS = 1 << 24


def feature_pyramid(maps: Tensor, levels: int) -> list[Tensor]:
    """Maps and their 2 x 2 averages, ``levels`` in all: ``[M, h / 2^l, w / 2^l, F]``, odd last rows and columns
    dropped.

    Raises:
        VggtMvError: a level would have no cell left.
    """
    smallest = min(maps.shape[1:3])
    if smallest < 1 << (levels - 1):
        raise VggtMvError(
            f"tracker: feature maps must have at least {1 << (levels - 1)} cells a side for corr_levels = {levels}, "
            f"got {maps.shape[1]} x {maps.shape[2]}; use larger images or fewer corr_levels"
        )
    pyramid = [maps]
    for _ in range(levels - 1):
        coarser = F.avg_pool2d(pyramid[-1].permute(0, 3, 1, 2), kernel_size=2)
        pyramid.append(coarser.permute(0, 2, 3, 1))
    return [level.contiguous() for level in pyramid]


def _corners(coordinate: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper cell along one axis, and the weight of the upper one, of a coordinate clamped to the map."""
    coordinate = coordinate.clamp(0, length - 1)
    lower = coordinate.floor()
    # The second clamp keeps the index of a NaN inside the map; its weight stays NaN.
    index = lower.long().clamp(0, length - 1)
    return index, (index + 1).clamp(max=length - 1), (coordinate - lower)


def sample_map(maps: Tensor, coords: Tensor) -> Tensor:
    """Bilinear samples; coordinates outside are moved to the border.

    Args:
        maps: ``[M, h, w, F]``.
        coords: ``[M, N, 2]``; no gradient reaches them.

    Returns:
        ``[M, N, F]``.
    """
    coords = coords.detach()
    height, width = maps.shape[1:3]
    x0, x1, fx = _corners(coords[..., 0], width)
    y0, y1, fy = _corners(coords[..., 1], height)
    fx, fy = fx[..., None].to(maps.dtype), fy[..., None].to(maps.dtype)
    which = torch.arange(maps.shape[0], device=maps.device)[:, None]
    top = torch.lerp(maps[which, y0, x0], maps[which, y0, x1], fx)
    bottom = torch.lerp(maps[which, y1, x0], maps[which, y1, x1], fx)
    return torch.lerp(top, bottom, fy)


def correlation_window(features: Tensor, maps: Tensor, coords: Tensor, radius: int) -> Tensor:
    """Dot products with a map around each point: ``out[i, j] = <f, map(x + i - r, y + j - r)> / sqrt(F)``.

    The map of dot products counts as zero outside. Sampling is linear and all samples of a window share their
    fraction, so the ``(2r + 2)^2`` cells around a point are all that is needed: the map of dot products with every
    cell, which is ``h w / (2r + 2)^2`` times larger, is never made.

    Args:
        features: ``[M, N, F]``.
        maps: ``[M, h, w, F]``, contiguous.
        coords: ``[M, N, 2]``; no gradient reaches them.
        radius: r.

    Returns:
        ``[M, N, (2r + 1)^2]``: the slow index moves x, the fast one y.
    """
    coords = coords.detach()
    count, points, width_f = features.shape
    height, width = maps.shape[1:3]
    side = 2 * radius + 2
    offsets = torch.arange(-radius, radius + 2, device=maps.device)
    cells, inside, fractions = [], [], []
    for axis, length in ((0, width), (1, height)):
        # Beyond this range the whole window is outside whatever the coordinate, and integers cannot overflow.
        coordinate = coords[..., axis].clamp(-radius - 2, length + radius + 1)
        lower = coordinate.floor()
        cell = lower.long()[..., None] + offsets
        cells.append(cell.clamp(0, length - 1))
        inside.append((cell >= 0) & (cell < length))
        fractions.append((coordinate - lower).to(maps.dtype)[..., None, None])
    first = torch.arange(count, device=maps.device)[:, None, None, None] * (height * width)
    index = (first + cells[1][..., None, :] * width + cells[0][..., :, None]).reshape(count * points, side * side)
    table, flat = maps.reshape(-1, width_f), features.reshape(count * points, width_f, 1)
    step = max(1, _WINDOW_NUMBERS // (side * side * width_f))
    dots = [
        torch.bmm(
            table.index_select(0, index[s : s + step].flatten()).unflatten(0, (-1, side * side)), flat[s : s + step]
        )
        for s in range(0, count * points, step)
    ]
    window = (dots[0] if len(dots) == 1 else torch.cat(dots)).view(count, points, side, side)
    window = window.masked_fill(~(inside[0][..., :, None] & inside[1][..., None, :]), 0.0)
    window = torch.lerp(window[..., :-1, :], window[..., 1:, :], fractions[0])
    window = torch.lerp(window[..., :-1], window[..., 1:], fractions[1])
    return window.flatten(2) / width_f**0.5


def flow_embedding(flow: Tensor, dim: int) -> Tensor:
    """Sines and cosines of displacements; x first, then y, each ``sin(p d_0), cos(p d_0), sin(p d_1), ..``.

    ``d_j = 2 j * 1000 / (dim / 2)``. The frequencies are that high in the pretrained tracker, and rounding in `flow`
    shows.

    Args:
        flow: ``[..., 2]``.
        dim: number of features, a multiple of 4.

    Returns:
        ``[..., dim]``.
    """
    per_axis = dim // 2
    frequencies = torch.arange(0, per_axis, 2, device=flow.device, dtype=flow.dtype) * (1000.0 / per_axis)
    angle = flow[..., None] * frequencies
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-3)


def sampled_position_embedding(coords: Tensor, height: int, width: int, dim: int) -> Tensor:
    """The 2-D sine-cosine embedding of a grid (base 10000; first half x, second y), sampled at points.

    The embedding of the whole grid is not needed: each half depends on one coordinate, so a bilinear sample of it is a
    linear one of a table along one axis. Coordinates outside are moved to the border.

    Args:
        coords: ``[..., 2]``; no gradient reaches them.
        height, width: of the grid.
        dim: number of features, a multiple of 4.

    Returns:
        ``[..., dim]``, dtype of `coords`.
    """
    coords = coords.detach()
    halves = []
    for axis, length in ((0, width), (1, height)):
        table = axis_embedding((0.0, length - 1.0), length, dim // 2, coords, omega_0=10000.0)
        lower, upper, weight = _corners(coords[..., axis], length)
        halves.append(torch.lerp(table[lower], table[upper], weight[..., None]))
    return torch.cat(halves, dim=-1)
