"""From original images to what the network takes, and back: one affine map per view.

Pixel coordinates, here as in ``vggt_mv.utils.geometry``: whole numbers are the centres of pixels, (0, 0) the first
pixel's. An original of W0 x H0 pixels is resized (bicubic) to w x h and lies with its corner at (ox, oy) in the network
image, negative where it is cropped, so a point moves as

    x' = sx (x + 1/2) - 1/2 + ox,    sx = w / W0        (y alike)

and intrinsics as K' = A K, A the matrix of that map. ``sx`` and ``sy`` differ a little: sides are rounded to multiples
of the patch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vggt_mv.errors import SceneError
from vggt_mv.scene.sources import Scene
from vggt_mv.scene.sources.scene import FrameCallback

PATCH_SIZE = 14
Mode = Literal["crop", "pad"]
_Array = TypeVar("_Array", torch.Tensor, NDArray[Any])


@dataclass(frozen=True)
class ViewTransform:
    """Where the pixels of an original image lie in a network image.

    Attributes:
        original_size: (H0, W0).
        network_size: (H, W).
        resized_size: (h, w), the whole original after resizing.
        offset: (ox, oy), where the resized image's corner lies in the network image; negative: cropped, positive:
            padded.

    Example:
        >>> transform = view_transform((480, 640), image_size=518, mode="crop")
        >>> transform.network_size, transform.offset
        ((392, 518), (0, 0))
        >>> transform.points_to_original(np.array([[258.5, 195.5]])).tolist()
        [[319.5, 239.5]]
    """

    original_size: tuple[int, int]
    network_size: tuple[int, int]
    resized_size: tuple[int, int]
    offset: tuple[int, int]

    @property
    def scale(self) -> tuple[float, float]:
        """(sx, sy), network pixels per original pixel."""
        return self.resized_size[1] / self.original_size[1], self.resized_size[0] / self.original_size[0]

    @property
    def matrix(self) -> NDArray[np.float64]:
        """[3, 3]: homogeneous original pixel -> network pixel."""
        (sx, sy), (ox, oy) = self.scale, self.offset
        return np.array([[sx, 0, 0.5 * sx - 0.5 + ox], [0, sy, 0.5 * sy - 0.5 + oy], [0, 0, 1]])

    def points_to_network(self, xy: _Array) -> _Array:
        """Original pixel coordinates ``[..., 2]`` (x, y) in the network image."""
        _check_last(xy, "points_to_network: xy", (2,))
        matrix = _like(self.matrix, xy)
        return cast(_Array, xy * matrix.diagonal()[:2] + matrix[:2, 2])

    def points_to_original(self, xy: _Array) -> _Array:
        """Network pixel coordinates ``[..., 2]`` (x, y), of tracks for example, in the original image."""
        _check_last(xy, "points_to_original: xy", (2,))
        matrix = _like(self.matrix, xy)
        return cast(_Array, (xy - matrix[:2, 2]) / matrix.diagonal()[:2])

    def intrinsics_to_network(self, intrinsics: _Array) -> _Array:
        """Intrinsics ``[..., 3, 3]`` of the original image for the network image."""
        _check_last(intrinsics, "intrinsics_to_network: intrinsics", (3, 3))
        return cast(_Array, _like(self.matrix, intrinsics) @ intrinsics)

    def intrinsics_to_original(self, intrinsics: _Array) -> _Array:
        """Intrinsics ``[..., 3, 3]`` of the network image for the original image."""
        _check_last(intrinsics, "intrinsics_to_original: intrinsics", (3, 3))
        return cast(_Array, _like(np.linalg.inv(self.matrix), intrinsics) @ intrinsics)

    def map_to_original(
        self, values: _Array, *, interpolation: Literal["bilinear", "nearest"] = "bilinear", fill: float | None = None
    ) -> _Array:
        """A map of the network image (depth, confidence, colours, ids), resampled at the pixels of the original.

        Padding never mixes into the image: at its border the nearest row or column of the image is repeated.

        Args:
            values: ``[H, W, ...]``, numpy or torch, any dtype for "nearest", floating point for "bilinear".
            interpolation: "bilinear" between the four nearest pixels (at depth edges it invents depths in between), or
                "nearest".
            fill: value of the original's pixels that were cropped away (see ``seen_mask``); NaN for floating point, 0
                otherwise.

        Returns:
            ``[H0, W0, ...]``, same type, dtype and device.

        Raises:
            SceneError: another size, or bilinear interpolation of whole numbers.
        """
        if tuple(values.shape[:2]) != self.network_size:
            raise SceneError(
                f"map_to_original: values must be [H, W, ...] with (H, W) = {self.network_size}, got shape "
                f"{tuple(values.shape)}"
            )
        if isinstance(values, torch.Tensor):
            # NumPy has no bfloat16.
            plain = values.detach().cpu()
            array = (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
            resampled = self.map_to_original(array, interpolation=interpolation, fill=fill)
            return torch.from_numpy(resampled).to(values.device, values.dtype)
        floating = np.issubdtype(values.dtype, np.floating)
        rows = self._axis_weights(0)
        columns = self._axis_weights(1)
        if interpolation == "nearest":
            result = values[rows.nearest][:, columns.nearest]
        elif interpolation == "bilinear":
            if not floating:
                raise SceneError(
                    f"map_to_original: bilinear interpolation needs floating point, got {values.dtype}; use "
                    "interpolation='nearest'"
                )
            result = columns.blend(rows.blend(values, 0), 1)
        else:
            raise SceneError(f"map_to_original: interpolation must be 'bilinear' or 'nearest', got {interpolation!r}")
        if fill is None:
            fill = np.nan if floating else 0
        result[~self.seen_mask()] = fill
        return result

    def valid_mask(self) -> NDArray[np.bool_]:
        """[H, W] bool: pixels of the network image that show the original, not padding."""
        return np.logical_and.outer(*(self._shown(axis) for axis in (0, 1)))

    def seen_mask(self) -> NDArray[np.bool_]:
        """[H0, W0] bool: pixels of the original whose centre lies within the network image, not cropped away."""
        inside = []
        for axis in (0, 1):
            position = self._positions(axis)
            inside.append((position >= -0.5) & (position < self.network_size[axis] - 0.5))
        return np.logical_and.outer(*inside)

    def apply(self, image: Image.Image) -> torch.Tensor:
        """An RGB image of the original size as the network takes it: ``[3, H, W]`` float32 in [0, 1], padding white."""
        if (image.height, image.width) != self.original_size:
            raise SceneError(
                f"image must be {self.original_size[1]}x{self.original_size[0]}, got {image.width}x{image.height}"
            )
        height, width = self.resized_size
        resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        pixels = np.ones((3, *self.network_size), dtype=np.float32)
        rows, columns = (np.flatnonzero(self._shown(axis)) for axis in (0, 1))
        shown = pixels[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        # NumPy, not torch: for arrays this small, waking torch's threads costs more than the arithmetic.
        np.divide(resized[self._shown_of_resized()].transpose(2, 0, 1), np.float32(255), out=shown)
        return torch.from_numpy(pixels)

    def apply_map(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """A map of the original size, ``[H0, W0]`` float32, at the network's size: ``[H, W]``, padding 0.

        Bilinear; where the map shrinks, an average over what falls into a pixel.
        """
        height, width = self.resized_size
        resized = np.asarray(
            Image.fromarray(np.ascontiguousarray(values, dtype=np.float32)).resize(
                (width, height), Image.Resampling.BILINEAR
            )
        )
        result = np.zeros(self.network_size, dtype=np.float32)
        result[np.ix_(*(self._shown(axis) for axis in (0, 1)))] = resized[self._shown_of_resized()]
        return np.clip(result, 0.0, 1.0)

    def padded_to(self, height: int, width: int) -> ViewTransform:
        """The same network image centred in a larger one.

        Raises:
            SceneError: a smaller size, or padding along a side that is cropped: what was cropped away would come back.
        """
        offset = []
        for axis, size in ((1, width), (0, height)):
            added = size - self.network_size[axis]
            start, inside = self.offset[1 - axis], self.resized_size[axis]
            if added < 0 or (added > 0 and (start < 0 or start + inside > self.network_size[axis])):
                raise SceneError(
                    f"padded_to: {width}x{height} must be at least {self.network_size[1]}x{self.network_size[0]}, "
                    "and equal it where that is cropped"
                )
            offset.append(start + added // 2)
        return replace(self, network_size=(height, width), offset=(offset[0], offset[1]))

    def _shown(self, axis: int) -> NDArray[np.bool_]:
        index = np.arange(self.network_size[axis])
        start = self.offset[1 - axis]
        return (index >= start) & (index < start + self.resized_size[axis])

    def _shown_of_resized(self) -> tuple[slice, slice]:
        slices = []
        for axis in (0, 1):
            start = max(0, -self.offset[1 - axis])
            slices.append(slice(start, start + int(self._shown(axis).sum())))
        return slices[0], slices[1]

    def _positions(self, axis: int) -> NDArray[np.float64]:
        """Network coordinates of the original's rows (axis 0) or columns (axis 1)."""
        matrix = self.matrix
        index = np.arange(self.original_size[axis], dtype=np.float64)
        return index * float(matrix[1 - axis, 1 - axis]) + float(matrix[1 - axis, 2])

    def _axis_weights(self, axis: int) -> _AxisWeights:
        shown = np.flatnonzero(self._shown(axis))
        return _AxisWeights(self._positions(axis).clip(shown[0], shown[-1]), shown[-1])


class _AxisWeights:
    """Linear interpolation along one axis at given positions."""

    def __init__(self, positions: NDArray[np.float64], last: int) -> None:
        self.low = np.floor(positions).astype(np.int64)
        self.high = np.minimum(self.low + 1, last)
        self.fraction = positions - self.low
        self.nearest = np.floor(positions + 0.5).astype(np.int64)

    def blend(self, values: NDArray[Any], axis: int) -> NDArray[Any]:
        shape = [1] * values.ndim
        shape[axis] = -1
        fraction = self.fraction.reshape(shape).astype(values.dtype)
        low, high = values.take(self.low, axis), values.take(self.high, axis)
        # A pixel of weight 0 must not count even where it is NaN or infinite.
        return np.where(fraction > 0, low * (1 - fraction) + high * fraction, low)


@dataclass(frozen=True)
class PreprocessedScene:
    """What the network takes, and how to come back.

    Attributes:
        images: ``[1, T, N, 3, H, W]`` float32 in [0, 1].
        transforms: one per view.
        mode: "crop" or "pad".
    """

    images: torch.Tensor
    transforms: list[ViewTransform]
    mode: Mode

    @property
    def network_size(self) -> tuple[int, int]:
        """(H, W)."""
        return int(self.images.shape[-2]), int(self.images.shape[-1])


def preprocess(
    scene: Scene, *, image_size: int = 518, mode: Mode = "crop", on_frame: FrameCallback | None = None
) -> PreprocessedScene:
    """Decode a scene and bring it to the network's size.

    * "crop": width ``image_size``, height in proportion, to the nearest multiple of 14; of heights above
      ``image_size`` the centre.
    * "pad": longest side ``image_size``, the other in proportion, to the nearest multiple of 14; white around it up
      to a square.

    Args:
        scene: from ``open_scene`` or ``Scene.from_tensor``.
        image_size: a multiple of 14.
        mode: "crop", or "pad" for views whose shapes differ.
        on_frame: called with (images done, images in all).

    Raises:
        SceneError: image_size or mode not allowed; views that come out in different sizes under "crop"; an image that
            does not decode.

    Example:
        >>> scene = Scene.from_tensor(torch.rand(2, 3, 3, 48, 64))
        >>> preprocess(scene, image_size=56).images.shape
        torch.Size([1, 2, 3, 3, 42, 56])
    """
    transforms = plan_transforms(scene, image_size=image_size, mode=mode)
    total = scene.num_images
    images = np.empty((total, 3, *transforms[0].network_size), dtype=np.float32)
    for index, image in enumerate(scene.images()):
        images[index] = transforms[index % scene.num_views].apply(image).numpy()
        if on_frame is not None:
            on_frame(index + 1, total)
    grid = torch.from_numpy(images).reshape(1, scene.num_times, scene.num_views, *images.shape[1:])
    return PreprocessedScene(grid, transforms, mode)


def plan_transforms(scene: Scene, *, image_size: int = 518, mode: Mode = "crop") -> list[ViewTransform]:
    """The transforms that ``preprocess`` would use, one per view, without decoding anything; it raises the same errors
    about sizes."""
    transforms = [view_transform(size, image_size=image_size, mode=mode) for size in scene.image_sizes]
    sizes = [transform.network_size for transform in transforms]
    for n, size in enumerate(sizes):
        if size != sizes[0]:
            (h0, w0), (h1, w1) = scene.image_sizes[0], scene.image_sizes[n]
            raise SceneError(
                f"views have different shapes: {scene.names[0][0]!r} is {w0}x{h0}, {scene.names[0][n]!r} is {w1}x{h1}; "
                "use mode='pad' (--preprocess pad), or scale them to one shape"
            )
    return transforms


def view_transform(original_size: tuple[int, int], *, image_size: int = 518, mode: Mode = "crop") -> ViewTransform:
    """The transform of one image of ``original_size`` (H0, W0); see ``preprocess``.

    Raises:
        SceneError: image_size not a positive multiple of 14, or another mode.
    """
    if mode not in ("crop", "pad"):
        raise SceneError(f"mode must be 'crop' or 'pad', got {mode!r}")
    if image_size < PATCH_SIZE or image_size % PATCH_SIZE:
        raise SceneError(
            f"image_size must be a multiple of {PATCH_SIZE}, got {image_size}; the nearest is {_to_patches(image_size)}"
        )
    height, width = original_size
    longest = width if mode == "crop" else max(height, width)
    scale = image_size / longest
    resized = (
        image_size if mode == "pad" and height == longest else _to_patches(height * scale),
        image_size if width == longest else _to_patches(width * scale),
    )
    network = (image_size, image_size) if mode == "pad" else (min(resized[0], image_size), image_size)
    # All sides are multiples of the patch size, an even number: halves are whole.
    offset = ((network[1] - resized[1]) // 2, (network[0] - resized[0]) // 2)
    return ViewTransform(original_size, network, resized, offset)


def square_transform(original_size: tuple[int, int], target_size: int) -> ViewTransform:
    """The transform into a square of any side, the longest side ``target_size``, centred, nothing rounded to
    patches."""
    if target_size < 1:
        raise SceneError(f"target_size must be at least 1, got {target_size}")
    height, width = original_size
    scale = target_size / max(height, width)
    resized = (max(1, round(height * scale)), max(1, round(width * scale)))
    offset = ((target_size - resized[1]) // 2, (target_size - resized[0]) // 2)
    return ViewTransform(original_size, (target_size, target_size), resized, offset)


def pad_to_largest(transforms: Sequence[ViewTransform]) -> list[ViewTransform]:
    """Transforms into one network size, the largest height by the largest width, each image centred in white."""
    height = max(transform.network_size[0] for transform in transforms)
    width = max(transform.network_size[1] for transform in transforms)
    return [transform.padded_to(height, width) for transform in transforms]


def _to_patches(pixels: float) -> int:
    return max(1, round(pixels / PATCH_SIZE)) * PATCH_SIZE


def _like(matrix: NDArray[Any], values: Any) -> Any:
    """A matrix in the type, dtype and place of other values; whole numbers count as float64."""
    if isinstance(values, torch.Tensor):
        dtype = values.dtype if values.is_floating_point() else torch.float64
        return torch.from_numpy(matrix).to(values.device, dtype)
    return matrix.astype(values.dtype if np.issubdtype(values.dtype, np.floating) else np.float64)


def _check_last(values: Any, what: str, shape: tuple[int, ...]) -> None:
    if tuple(values.shape[-len(shape) :]) != shape:
        wanted = ", ".join(["...", *map(str, shape)])
        raise SceneError(f"{what} must have shape [{wanted}], got {list(values.shape)}")
