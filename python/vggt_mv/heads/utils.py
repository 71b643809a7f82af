"""Sine-cosine position embeddings of image maps.

A map of ``w x h`` cells over an image of aspect ratio ``a = W / H`` gets coordinates on a plane whose half-diagonal
is 1: with ``g = sqrt(a^2 + 1)``, u runs linearly over ``+-(a / g)(w - 1) / w`` along a row and v over ``+-(1 / g)(h
- 1) / h`` down a column (cell centres). A coordinate p becomes the 2n features

    [sin(p w_0) .. sin(p w_{n-1}), cos(p w_0) .. cos(p w_{n-1})],    w_j = omega_0 ** (-j / n).

Everything is computed in float64 and rounded once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vggt_mv.errors import VggtMvError

__all__ = [
    "add_position_embedding",
    "axis_embedding",
    "create_uv_grid",
    "position_grid_to_embed",
    "position_offsets",
    "sincos_embedding",
]


def _axis_limits(width: int, height: int, aspect_ratio: float) -> tuple[float, float]:
    """Largest u and v of the grid."""
    diagonal = math.sqrt(aspect_ratio * aspect_ratio + 1.0)
    return aspect_ratio / diagonal * (width - 1) / width, 1.0 / diagonal * (height - 1) / height


def _check_size(function: str, width: int, height: int, aspect_ratio: float) -> None:
    if width < 1 or height < 1:
        raise VggtMvError(f"{function}: width and height must be at least 1, got {width} and {height}")
    if not 0.0 < aspect_ratio < math.inf:
        raise VggtMvError(f"{function}: aspect_ratio must be positive and finite, got {aspect_ratio}")


def create_uv_grid(
    width: int,
    height: int,
    aspect_ratio: float | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Coordinates (u, v) of the cells of a map (see the module's docstring).

    Args:
        width, height: size of the map in cells.
        aspect_ratio: W / H of the image; default ``width / height``.
        dtype: of the result; default ``torch.get_default_dtype()``.
        device: of the result.

    Returns:
        ``[height, width, 2]``.

    Raises:
        VggtMvError: a size below 1 or an aspect ratio that is not positive.

    Example:
        >>> import torch
        >>> create_uv_grid(2, 1, aspect_ratio=0.75)[0, :, 0]  # u of the row's two cells
        tensor([-0.3000,  0.3000])
    """
    if aspect_ratio is None:
        aspect_ratio = width / max(height, 1)  # a height of 0 is for the check to report
    _check_size("create_uv_grid", width, height, aspect_ratio)
    u_max, v_max = _axis_limits(width, height, aspect_ratio)
    # On the CPU, since not every device has float64.
    u = torch.linspace(-u_max, u_max, width, dtype=torch.float64, device="cpu")
    v = torch.linspace(-v_max, v_max, height, dtype=torch.float64, device="cpu")
    grid = torch.stack((u.expand(height, width), v[:, None].expand(height, width)), dim=-1)
    return grid.to(device=device, dtype=dtype or torch.get_default_dtype())


def sincos_embedding(positions: Tensor, embed_dim: int, omega_0: float = 100.0) -> Tensor:
    """``[sin(p w_j), cos(p w_j)]`` in two blocks, ``w_j = omega_0 ** (-j / (embed_dim / 2))``.

    Args:
        positions: ``[...]``, any real dtype and device.
        embed_dim: number of features, even.
        omega_0: base of the frequencies.

    Returns:
        ``[..., embed_dim]`` float64.

    Raises:
        VggtMvError: `embed_dim` is odd or below 2.

    Example:
        >>> import torch
        >>> sincos_embedding(torch.tensor([0.0]), 4).tolist()
        [[0.0, 0.0, 1.0, 1.0]]
    """
    if embed_dim < 2 or embed_dim % 2:
        raise VggtMvError(f"sincos_embedding: embed_dim must be a positive even number, got {embed_dim}")
    half = embed_dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=positions.device) / half
    angle = positions[..., None].to(torch.float64) * (1.0 / omega_0**exponent)
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


def position_grid_to_embed(pos_grid: Tensor, embed_dim: int, omega_0: float = 100) -> Tensor:
    """Embedding of a grid of coordinates: the first half of the channels from u, the second from v.

    Args:
        pos_grid: ``[H, W, 2]`` coordinates (u, v), e.g. of `create_uv_grid`.
        embed_dim: number of channels C, a multiple of 4.
        omega_0: base of the frequencies.

    Returns:
        ``[H, W, C]`` float32.

    Raises:
        VggtMvError: a grid that is not [H, W, 2], or `embed_dim` that is not a multiple of 4.

    Example:
        >>> import torch
        >>> position_grid_to_embed(create_uv_grid(3, 2), 8).shape
        torch.Size([2, 3, 8])
    """
    if pos_grid.ndim != 3 or pos_grid.shape[-1] != 2:
        raise VggtMvError(f"position_grid_to_embed: pos_grid must be [H, W, 2], got {list(pos_grid.shape)}")
    if embed_dim < 4 or embed_dim % 4:
        raise VggtMvError(f"position_grid_to_embed: embed_dim must be a positive multiple of 4, got {embed_dim}")
    u, v = pos_grid.unbind(-1)
    halves = [sincos_embedding(axis, embed_dim // 2, omega_0).float() for axis in (u, v)]
    return torch.cat(halves, dim=-1)


def _axis_table(
    limits: tuple[float, float],
    length: int,
    embed_dim: int,
    omega_0: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    # On the CPU, since not every device has float64.
    positions = torch.linspace(*limits, length, dtype=torch.float64, device="cpu")
    return sincos_embedding(positions, embed_dim, omega_0).to(torch.float32).to(device=device, dtype=dtype)


@functools.lru_cache(maxsize=128)
def _cached_axis_table(inference: bool, *arguments: Any) -> Tensor:
    # `inference` only keeps apart what was made in inference mode.
    return _axis_table(*arguments)


def axis_embedding(
    limits: tuple[float, float], length: int, embed_dim: int, like: Tensor, omega_0: float = 100.0
) -> Tensor:
    """Embedding of `length` positions spaced evenly over `limits`, both ends included; cached.

    The 128 tables used last are kept, by their arguments and the dtype and device of `like`. Tables made in
    inference mode are kept apart, so that training never meets an inference tensor.

    Returns:
        ``[length, embed_dim]``, dtype and device of `like`. Shared: do not write into it.
    """
    arguments = (limits, length, embed_dim, omega_0, like.dtype, like.device)
    # Traced and fake tensors must not enter the cache, nor meet what is in it.
    if torch.compiler.is_compiling() or type(like) not in (Tensor, torch.nn.Parameter):
        return _axis_table(*arguments)
    return _cached_axis_table(torch.is_inference_mode_enabled(), *arguments)


def add_position_embedding(x: Tensor, aspect_ratio: float, scale: float = 0.1) -> Tensor:
    """``x + scale * embedding`` of the map's cells, in place where that is safe.

    A channel of the embedding depends on the column alone or on the row alone, so two small tables are kept, never a
    map.

    Args:
        x: ``[N, C, h, w]`` feature maps, C a multiple of 4. **May be overwritten**: pass a tensor that nobody else
            reads.
        aspect_ratio: W / H of the image.
        scale: factor of the embedding.

    Returns:
        ``[N, C, h, w]``, in the memory format of `x`.

    Raises:
        VggtMvError: `x` is not 4-D, C is not a multiple of 4, or the aspect ratio is not positive.

    Example:
        >>> import torch
        >>> add_position_embedding(torch.zeros(1, 8, 2, 3), aspect_ratio=1.5).abs().max() <= 0.1
        tensor(True)
    """
    if x.ndim != 4 or x.shape[1] < 4 or x.shape[1] % 4:
        raise VggtMvError(f"add_position_embedding: x must be [N, C, h, w] with C a multiple of 4, got {list(x.shape)}")
    half = x.shape[1] // 2
    rows, columns = _embeddings("add_position_embedding", x, x.shape[-2:], aspect_ratio)
    rows, columns = rows.mT.unsqueeze(2), columns.mT.unsqueeze(1)  # [C/2, h, 1] and [C/2, 1, w]
    if x.requires_grad:
        # cat keeps channels-last, as stack does not.
        return torch.cat((x[:, :half].add(columns, alpha=scale), x[:, half:].add(rows, alpha=scale)), dim=1)
    x[:, :half].add_(columns, alpha=scale)
    x[:, half:].add_(rows, alpha=scale)
    return x


def position_offsets(
    like: Tensor, size: Sequence[int], aspect_ratio: float, scale: float = 0.1
) -> tuple[Tensor, Tensor]:
    """What `add_position_embedding` would add to a map, as an offset of each row and one of each column.

    Args:
        like: ``[N, C, ...]``, C a multiple of 4: its number of channels, dtype and device count.
        size: (H, W) of the map.
        aspect_ratio: W / H of the image.
        scale: factor of the embedding.

    Returns:
        ``[H, C]``, zero in the first half of the channels, and ``[W, C]``, zero in the second.

    Raises:
        VggtMvError: C is not a multiple of 4, or the size or the aspect ratio is not positive.

    Example:
        >>> import torch
        >>> rows, columns = position_offsets(torch.zeros(1, 8, 1, 1), (2, 3), aspect_ratio=1.5)
        >>> expected = add_position_embedding(torch.zeros(1, 8, 2, 3), aspect_ratio=1.5)
        >>> torch.equal(rows.mT[:, :, None] + columns.mT[:, None], expected[0])
        True
    """
    if like.ndim < 2 or like.shape[1] < 4 or like.shape[1] % 4:
        raise VggtMvError(f"position_offsets: like must be [N, C, ...] with C a multiple of 4, got {list(like.shape)}")
    half = like.shape[1] // 2
    rows, columns = _embeddings("position_offsets", like, size, aspect_ratio)
    return F.pad(scale * rows, (half, 0)), F.pad(scale * columns, (0, half))


def _embeddings(function: str, like: Tensor, size: Sequence[int], aspect_ratio: float) -> tuple[Tensor, Tensor]:
    """Of the rows ``[H, C/2]`` and columns ``[W, C/2]`` of a map."""
    height, width = size
    _check_size(function, width, height, aspect_ratio)
    u_max, v_max = _axis_limits(width, height, aspect_ratio)
    half = like.shape[1] // 2
    return (
        axis_embedding((-v_max, v_max), height, half, like),
        axis_embedding((-u_max, u_max), width, half, like),
    )
