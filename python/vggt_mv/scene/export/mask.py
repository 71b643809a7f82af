"""dynamic_mask/*.png: what moves, drawn over the images. The numbers are in predictions.npz."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vggt_mv.scene.export.depth import preview_names, save_picture

if TYPE_CHECKING:
    from vggt_mv.scene.reconstruction import Reconstruction

_PREDICTED = (255, 120, 0)
_GIVEN = (0, 220, 255)
_OPACITY = 0.75


def mask_overlay(
    image: NDArray[np.uint8], predicted: NDArray[np.floating] | None, given: NDArray[np.floating] | None
) -> NDArray[np.uint8]:
    """An image, greyed, under orange where the predicted mask is high, with the outline of a given mask in cyan.

    Args:
        image: [H, W, 3].
        predicted: [h, w] in [0, 1], one value for each of ``H/h x W/w`` pixels; drawn as it is, block by block.
        given: [H, W] in [0, 1]; the outline is where it crosses a half.

    Returns:
        [H, W, 3] uint8.
    """
    height, width = image.shape[:2]
    grey = image.astype(np.float32).mean(axis=-1, keepdims=True)
    # Where there is nothing to mark, colours stay to be seen, a little.
    picture = 0.7 * grey + 0.3 * image
    if predicted is not None:
        rows = np.arange(height) * predicted.shape[0] // height
        columns = np.arange(width) * predicted.shape[1] // width
        alpha = _OPACITY * np.clip(predicted[rows][:, columns, None], 0.0, 1.0)
        picture = (1 - alpha) * picture + alpha * np.array(_PREDICTED, dtype=np.float32)
    if given is not None:
        inside = np.pad(given >= 0.5, 1, mode="edge")
        edge = np.zeros((height, width), dtype=bool)
        for rows_of, columns_of in ((slice(0, -2), slice(1, -1)), (slice(1, -1), slice(0, -2))):
            edge |= inside[1:-1, 1:-1] != inside[rows_of, columns_of]
        picture[edge] = _GIVEN
    return np.asarray(np.round(picture), dtype=np.uint8)


def write_mask_overlays(
    reconstruction: Reconstruction, folder: Path, *, on_file: Callable[[], None] | None = None
) -> None:
    """Write one overlay per frame, at network resolution, named after its image."""
    predicted, given = reconstruction.dynamic_mask, reconstruction.given_mask
    if predicted is None and given is None:
        raise ValueError("write_mask_overlays: the reconstruction has no mask")
    folder.mkdir()
    names = preview_names(reconstruction.names)
    for t in range(reconstruction.num_times):
        for n in range(reconstruction.num_views):
            overlay = mask_overlay(
                reconstruction.images[t, n],
                None if predicted is None else predicted[t, n],
                None if given is None else given[t, n],
            )
            save_picture(Image.fromarray(overlay), folder / names[t][n], reconstruction)
            if on_file is not None:
                on_file()
