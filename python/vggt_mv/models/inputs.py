"""Checks of what users hand to a model. Shapes and dtypes cost nothing; values cost one pass and are checked apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vggt_mv.errors import VggtMvError

__all__ = ["check_image_values", "check_images", "check_mask_values", "check_memory_state", "patch_means"]

# Resampling may overshoot [0, 1] a little; ImageNet-normalised images (about -2 to 2.6) and 0..255 are far outside.
_VALUE_TOLERANCE = 0.1


def check_images(owner: str, images: Tensor, patch_size: int) -> None:
    """Checks rank, channels, dtype and size of ``[S,3,H,W]``, ``[B,S,3,H,W]`` or ``[B,T,N,3,H,W]``.

    Raises:
        VggtMvError: with owner, rule, what was given and, for the size, the nearest valid one.
    """
    shape = tuple(images.shape)
    if images.ndim not in (4, 5, 6):
        raise VggtMvError(
            f"{owner}: images must be [S, 3, H, W], [B, S, 3, H, W] or [B, T, N, 3, H, W], "
            f"got {images.ndim} dimensions: {list(shape)}"
        )
    if shape[-3] != 3:
        hint = "; move the channels before height and width" if shape[-1] == 3 else ""
        raise VggtMvError(f"{owner}: images must have 3 channels (RGB), got {shape[-3]} in {list(shape)}{hint}")
    if not images.is_floating_point():
        remedy = "images.float() / 255" if images.dtype == torch.uint8 else "floating-point images in [0, 1]"
        raise VggtMvError(f"{owner}: images must be floating point in [0, 1], got {images.dtype}; pass {remedy}")
    if 0 in shape[:-3]:
        raise VggtMvError(f"{owner}: images must hold at least one frame, got {list(shape)}")
    height, width = shape[-2:]
    if height < patch_size or width < patch_size or height % patch_size or width % patch_size:
        nearest = [max(1, round(side / patch_size)) * patch_size for side in (height, width)]
        raise VggtMvError(
            f"{owner}: images must have height and width that are positive multiples of {patch_size}, "
            f"got {height} x {width}; the nearest valid size is {nearest[0]} x {nearest[1]}"
        )


def check_image_values(owner: str, images: Tensor) -> None:
    """Checks that images are finite and lie in [0, 1] (give or take 0.1).

    One reduction, and on a GPU one synchronisation; so it is left out where values are not at hand or must not be
    waited for: while compiling or exporting, under CUDA graph capture, on the meta device and for tensor subclasses.

    Raises:
        VggtMvError: NaN, infinite, or values clearly outside [0, 1].
    """
    remedy = "pass RGB in [0, 1], neither 0..255 nor normalised by mean and standard deviation"
    _check_values(owner, "images", images, _VALUE_TOLERANCE, remedy)


def check_mask_values(owner: str, dynamic_mask: Tensor) -> None:
    """Checks that a mask is finite and lies in [0, 1]; left out where `check_image_values` is.

    Raises:
        VggtMvError: NaN, infinite, or values outside [0, 1].
    """
    _check_values(owner, "dynamic_mask", dynamic_mask, 1e-3, "1 is where the scene moves, 0 where it stands still")


def _check_values(owner: str, name: str, values: Tensor, tolerance: float, remedy: str) -> None:
    if (
        torch.compiler.is_compiling()
        or type(values) is not Tensor
        or values.is_meta
        or (values.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return
    low, high = torch.stack(torch.aminmax(values.detach().float())).tolist()  # NaN anywhere makes both NaN
    if math.isnan(low):
        raise VggtMvError(f"{owner}: {name} must be finite, got NaN in {name} of shape {list(values.shape)}")
    if low < -tolerance or high > 1 + tolerance:
        raise VggtMvError(f"{owner}: {name} must lie in [0, 1], got values from {low:.4g} to {high:.4g}; {remedy}")


def check_memory_state(owner: str, memory_state: Tensor, expected: Sequence[int]) -> None:
    """Checks the shape and dtype of a memory that was handed in.

    Raises:
        VggtMvError: not floating point, or another shape than ``[streams, layers, B, M, C]`` of the model.
    """
    if not isinstance(memory_state, Tensor) or not memory_state.is_floating_point():
        what = memory_state.dtype if isinstance(memory_state, Tensor) else type(memory_state).__name__
        raise VggtMvError(f"{owner}: memory_state must be a floating-point tensor, got {what}")
    if tuple(memory_state.shape) != tuple(expected):
        raise VggtMvError(
            f"{owner}: memory_state must be [streams, layers, B, M, C] = {list(expected)}, "
            f"got {list(memory_state.shape)}"
        )


def patch_means(owner: str, values: Tensor, images: Tensor, patch_size: int, name: str = "dynamic_mask") -> Tensor:
    """Averages a mask ``[B,T,N,H,W]`` or ``[B,S,H,W]`` (4-D images: ``[S,H,W]``) over each patch.

    Args:
        values: a number for every pixel, as the mask of what moves; floating point, bool or integer.
        images: the images they belong to.
        name: what errors call the values.

    Returns:
        float32, ``[..., H/p, W/p]`` with the leading dimensions of `values`.

    Raises:
        VggtMvError: a shape that is not that of the images without their channels.
    """
    expected = (*images.shape[:-3], *images.shape[-2:])
    if tuple(values.shape) != expected:
        raise VggtMvError(
            f"{owner}: {name} must have the shape of images without the channels, {list(expected)}, "
            f"got {list(values.shape)}"
        )
    rows, columns = expected[-2] // patch_size, expected[-1] // patch_size
    values = values.to(device=images.device, dtype=torch.float32)
    return values.unflatten(-1, (columns, patch_size)).unflatten(-3, (rows, patch_size)).mean(dim=(-3, -1))
