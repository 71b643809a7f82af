"""Images from files as the network takes them, by the code that ``vggt_mv.scene.preprocess`` uses for whole scenes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch

from vggt_mv.errors import SceneError
from vggt_mv.scene.preprocess import Mode, ViewTransform, pad_to_largest, square_transform, view_transform
from vggt_mv.scene.sources.images import check_image, read_image

IMAGE_SIZE = 518

PathList = Sequence[str | PathLike[str]]


def load_and_preprocess_images(image_path_list: PathList, mode: Mode = "crop") -> torch.Tensor:
    """Load images for the network.

    * "crop": width 518, height in proportion, to the nearest multiple of 14 (bicubic); of heights above 518 the centre.
    * "pad": longest side 518, the other in proportion, to the nearest multiple of 14; white around it up to 518 x 518.

    Images that come out in different sizes are padded with white to the largest, centred, and a warning says so.
    Transparency goes over white, EXIF orientation is applied.

    Args:
        image_path_list: paths of S images.
        mode: "crop" or "pad".

    Returns:
        ``[S, 3, H, W]`` float32 in [0, 1].

    Raises:
        SceneError: no paths, a file that is missing, no image, or damaged, another mode.

    Example:
        >>> images = load_and_preprocess_images(["a.png", "b.png"])   # doctest: +SKIP
        >>> images.shape                                              # doctest: +SKIP
        torch.Size([2, 3, 392, 518])
    """
    paths = _checked_paths(image_path_list)
    transforms = [view_transform(check_image(path), image_size=IMAGE_SIZE, mode=mode) for path in paths]
    sizes = sorted({transform.network_size for transform in transforms})
    if len(sizes) > 1:
        shown = ", ".join(f"{width}x{height}" for height, width in sizes)
        warnings.warn(f"images differ in size ({shown}); padded with white to the largest", stacklevel=2)
        transforms = pad_to_largest(transforms)
    return _load_all(paths, transforms)


def load_and_preprocess_images_square(
    image_path_list: PathList, target_size: int = 1024
) -> tuple[torch.Tensor, torch.Tensor]:
    """Load images into squares: longest side ``target_size`` (bicubic), centred, white around it.

    Args:
        image_path_list: paths of S images, of any sizes.
        target_size: side of the squares in pixels.

    Returns:
        ``(images, original_coords)``: ``[S, 3, target_size, target_size]`` float32 in [0, 1], and ``[S, 6]`` float32,
        (x1, y1, x2, y2, width, height): the box that the image fills in its square, edges in pixels counted from the
        square's corner, and the size of the original.

    Raises:
        SceneError: no paths, a file that is missing, no image, or damaged, a target_size below 1.
    """
    paths = _checked_paths(image_path_list)
    transforms = [square_transform(check_image(path), target_size) for path in paths]
    coords = []
    for transform in transforms:
        (left, top), (height, width) = transform.offset, transform.resized_size
        coords.append([left, top, left + width, top + height, *transform.original_size[::-1]])
    return _load_all(paths, transforms), torch.tensor(coords, dtype=torch.float32)


def _checked_paths(paths: PathList) -> list[Path]:
    if isinstance(paths, (str, PathLike)):
        raise SceneError(f"image_path_list must be a list of paths, got the single path {str(paths)!r}; write [path]")
    if len(paths) == 0:
        raise SceneError("image_path_list is empty; name at least one image")
    return [Path(path) for path in paths]


def _load_all(paths: Sequence[Path], transforms: Sequence[ViewTransform]) -> torch.Tensor:
    """One original in memory at a time."""
    return torch.stack([transform.apply(read_image(path)) for path, transform in zip(paths, transforms, strict=True)])
