"""Masks of what moves, given by the user: a folder laid out like the images, or an array."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vggt_mv.errors import SceneError
from vggt_mv.scene.preprocess import ViewTransform
from vggt_mv.scene.sources import Scene
from vggt_mv.scene.sources.folders import list_folder
from vggt_mv.scene.sources.images import read_image

MaskSource = str | Path | torch.Tensor | NDArray[Any]


def find_masks(folder: str | Path, scene: Scene) -> list[list[Path]]:
    """``masks[t][n]``: the mask of every image of a scene, which has its name, whatever its suffix.

    Images ``time_00/view0.png`` have the masks ``FOLDER/time_00/view0.*``.

    Raises:
        SceneError: no such folder, a scene of videos, masks that are missing or there twice.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise SceneError(f"mask folder {str(folder)!r} {'is no folder' if root.exists() else 'does not exist'}")
    if scene.kind in ("video", "videos", "tensor"):
        raise SceneError(
            f"mask folder {str(folder)!r}: masks go by the names of image files, and {scene.source!r} has none; "
            "extract its frames to folders of images"
        )
    listed: dict[Path, list[Path]] = {}

    def mask_of(name: str) -> Path | None:
        place = root / name
        if place.parent not in listed:
            listed[place.parent] = list_folder(place.parent)[0] if place.parent.is_dir() else []
        found = [path for path in listed[place.parent] if path.stem == place.stem]
        if len(found) > 1:
            raise SceneError(
                f"mask folder {str(folder)!r} has two masks of image {name!r}: {found[0].name} and {found[1].name}; "
                "remove one"
            )
        return found[0] if found else None

    masks = [[mask_of(name) for name in row] for row in scene.names]
    missing = [
        name
        for names, row in zip(scene.names, masks, strict=True)
        for name, mask in zip(names, row, strict=True)
        if mask is None
    ]
    if missing:
        raise SceneError(
            f"mask folder {str(folder)!r} lacks {len(missing)} of {scene.num_images} masks, the first that of image "
            f"{missing[0]!r}; masks lie in the same folders under the same names as images"
        )
    return [[mask for mask in row if mask is not None] for row in masks]


def read_masks(source: MaskSource, scene: Scene, transforms: Sequence[ViewTransform]) -> NDArray[np.float32]:
    """Masks as the network sees the images.

    Args:
        source: a folder (see ``find_masks``) of grey images, white where the scene moves and black where it stands
            still; or ``[T, N, H0, W0]`` (a single sequence: also ``[S, H0, W0]``) in [0, 1], bool or floating point.
            Sizes are those of the original images.
        scene: the images.
        transforms: one per view.

    Returns:
        ``[T, N, H, W]`` float32 in [0, 1]; padding stands still.

    Raises:
        SceneError: masks that are missing, unreadable, of another size, coloured, or labels rather than grey values.
    """
    if isinstance(source, (str, Path)):
        grid = [
            [_read_mask(path, transform) for path, transform in zip(row, transforms, strict=True)]
            for row in find_masks(source, scene)
        ]
        highest = max(float(mask.max()) for row in grid for mask in row)
        if 0 < highest * 255 < 2.5:
            raise SceneError(
                f"mask folder {str(source)!r}: masks must be white where the scene moves, got no value above "
                f"{round(highest * 255)} of 255; multiply labels by 255"
            )
        return np.array(grid, dtype=np.float32)
    values = _checked_array(source, scene)
    return np.array(
        [[transform.apply_map(mask) for mask, transform in zip(row, transforms, strict=True)] for row in values],
        dtype=np.float32,
    )


def _read_mask(path: Path, transform: ViewTransform) -> NDArray[np.float32]:
    pixels = np.asarray(read_image(path))
    if (pixels != pixels[..., :1]).any():
        raise SceneError(f"mask {str(path)!r} must be grey, white where the scene moves; got colours")
    height, width = transform.original_size
    if pixels.shape[:2] != (height, width):
        raise SceneError(
            f"mask {str(path)!r} must have the size of its image, {width}x{height}, got "
            f"{pixels.shape[1]}x{pixels.shape[0]}"
        )
    return transform.apply_map(pixels[..., 0].astype(np.float32) / np.float32(255))


def _checked_array(source: torch.Tensor | NDArray[Any], scene: Scene) -> NDArray[np.float32]:
    """``[T, N, H0, W0]`` float32, or a SceneError."""
    values = source.detach().cpu().numpy() if isinstance(source, torch.Tensor) else np.asarray(source)
    grid, sizes = (scene.num_times, scene.num_views), set(scene.image_sizes)
    if len(sizes) > 1:
        raise SceneError("dynamic_mask must be a folder of masks where views have different sizes, got an array")
    if scene.single_sequence and values.ndim == 3 and len(values) == scene.num_images:
        values = values.reshape(*grid, *values.shape[1:])
    expected = (*grid, *sizes.pop())
    if values.shape != expected:
        raise SceneError(
            f"dynamic_mask must be [T, N, H, W] = {list(expected)}, one value per original pixel, got "
            f"{list(values.shape)}"
        )
    if values.dtype.kind not in "fb":
        raise SceneError(f"dynamic_mask must be floating point in [0, 1] or bool, got {values.dtype}")
    masks: NDArray[np.float32] = values.astype(np.float32)
    if not np.isfinite(masks).all() or masks.min() < 0 or masks.max() > 1:
        raise SceneError(
            f"dynamic_mask must be finite and lie in [0, 1], got values from {masks.min():g} to {masks.max():g}"
        )
    return masks
