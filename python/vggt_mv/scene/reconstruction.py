"""What a reconstruction is: predictions as arrays, and everything needed to make sense of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from vggt_mv.errors import VggtMvError

if TYPE_CHECKING:
    from vggt_mv.scene.preprocess import ViewTransform
    from vggt_mv.weights import WeightsProvenance

PointSource = Literal["auto", "depth", "points"]
ProgressCallback = Callable[[str, int, int], None]
"""Called with (stage name, steps done, steps in all)."""

RANDOM_WEIGHTS_NOTE = "RANDOM WEIGHTS: an untrained model made these numbers, they mean nothing"

DEFAULT_CONF_PERCENTILE = 50.0


@dataclass(frozen=True)
class PointCloud:
    """K coloured points in world coordinates.

    Attributes:
        points: [K, 3] float32, in the reconstruction's unit of length (arbitrary scale).
        colors: [K, 3] uint8, RGB.
        confidence: [K] float32, the model's confidence (1 and up), or None where it predicts none.
        time: [K] uint16, index of the time step that a point was seen at.
        view: [K] uint16, index of the view that it was seen from.
        threshold: the confidence that a point had to reach, or None.
    """

    points: NDArray[np.float32]
    colors: NDArray[np.uint8]
    confidence: NDArray[np.float32] | None
    time: NDArray[np.uint16]
    view: NDArray[np.uint16]
    threshold: float | None = None

    def __len__(self) -> int:
        return len(self.points)


@dataclass
class Reconstruction:
    """Predictions of T time steps x N views, with names, times, cameras and preprocessing.

    Cameras are OpenCV: x right, y down, z forward; ``extrinsics`` map world to camera, ``X_cam = R X_world + t``.
    Lengths are in an arbitrary unit that all frames share. ``H, W`` is the size that the network saw, ``transforms``
    lead back to the originals. Predictions of heads that the model lacks are None.

    Attributes:
        images: [T, N, H, W, 3] uint8, RGB, as the network saw them.
        names: ``names[t][n]``, the name of an image.
        view_names: ``view_names[n]``.
        times: seconds of each time step, or None where the source has no clock.
        transforms: one ViewTransform per view.
        weights: where the model's weights came from.
        extrinsics: [T, N, 3, 4] float32, camera from world.
        intrinsics: [T, N, 3, 3] float32, pixels of the network images.
        depth, depth_conf: [T, N, H, W] float32; z in camera coordinates.
        world_points, world_points_conf: [T, N, H, W, 3] and [T, N, H, W] float32, from the point head.
        dynamic_mask: [T, N, h, w] float32 in [0, 1], 1 where the scene moves; one value per patch.
        given_mask: [T, N, H, W] float32 in [0, 1], the mask that was handed in, as the network saw it.
        query_points: [M, 2] float32, (x, y) in pixels of the network image of time 0, view 0.
        tracks, track_vis, track_conf: [T, N, M, 2] (network pixels), [T, N, M], [T, N, M] float32.
        report: how it was made, JSON-ready: shapes, seconds per stage, memory, backend, attention, warnings.

    Example:
        >>> reconstruction = reconstruct("scene/", model)           # doctest: +SKIP
        >>> cloud = reconstruction.point_cloud(conf_percentile=30)  # doctest: +SKIP
        >>> reconstruction.save("out/")                             # doctest: +SKIP
    """

    images: NDArray[np.uint8]
    names: list[list[str]]
    view_names: list[str]
    transforms: list[ViewTransform]
    weights: WeightsProvenance
    times: list[float] | None = None
    extrinsics: NDArray[np.float32] | None = None
    intrinsics: NDArray[np.float32] | None = None
    depth: NDArray[np.float32] | None = None
    depth_conf: NDArray[np.float32] | None = None
    world_points: NDArray[np.float32] | None = None
    world_points_conf: NDArray[np.float32] | None = None
    dynamic_mask: NDArray[np.float32] | None = None
    given_mask: NDArray[np.float32] | None = None
    query_points: NDArray[np.float32] | None = None
    tracks: NDArray[np.float32] | None = None
    track_vis: NDArray[np.float32] | None = None
    track_conf: NDArray[np.float32] | None = None
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def num_times(self) -> int:
        return self.images.shape[0]

    @property
    def num_views(self) -> int:
        return self.images.shape[1]

    @property
    def network_size(self) -> tuple[int, int]:
        """(H, W) of the images that the network saw."""
        return self.images.shape[2], self.images.shape[3]

    @property
    def random_weights(self) -> bool:
        """True where the weights are an untrained model's: the numbers mean nothing."""
        return self.weights.family == "random"

    @property
    def intrinsics_original(self) -> NDArray[np.float32] | None:
        """[T, N, 3, 3] float32: intrinsics in pixels of the original images."""
        if self.intrinsics is None:
            return None
        with np.errstate(invalid="ignore"):  # a field of view of 0 is an infinite focal length
            per_view = [
                transform.intrinsics_to_original(self.intrinsics[:, n]) for n, transform in enumerate(self.transforms)
            ]
        return np.stack(per_view, axis=1).astype(np.float32)

    @property
    def world_from_camera(self) -> NDArray[np.float64] | None:
        """[T, N, 4, 4] float64: the inverse of ``extrinsics``, ``[R^T | -R^T t]``."""
        if self.extrinsics is None:
            return None
        rotation = self.extrinsics[..., :3].astype(np.float64).swapaxes(-1, -2)
        inverse = np.zeros((*self.extrinsics.shape[:2], 4, 4))
        inverse[..., :3, :3] = rotation
        inverse[..., :3, 3:] = -rotation @ self.extrinsics[..., 3:].astype(np.float64)
        inverse[..., 3, 3] = 1.0
        return inverse

    @property
    def points_from_depth(self) -> NDArray[np.float32]:
        """[T, N, H, W, 3] float32: the depth maps in world coordinates, ``R^T (depth K^-1 [x, y, 1] - t)``."""
        from vggt_mv.utils.geometry import unproject_depth_map_to_point_map

        if self.depth is None or self.extrinsics is None or self.intrinsics is None:
            raise VggtMvError(
                "points_from_depth needs depth and cameras; this model has no depth head or no camera head"
            )
        shape = self.depth.shape
        points = unproject_depth_map_to_point_map(
            self.depth.reshape(-1, *shape[2:], 1), self.extrinsics.reshape(-1, 3, 4), self.intrinsics.reshape(-1, 3, 3)
        )
        return points.reshape(*shape, 3).astype(np.float32)

    def depth_at_original(self, time: int, view: int) -> NDArray[np.float32]:
        """Depth of one frame at the size of its original image.

        Returns:
            [H_original, W_original] float32; NaN where preprocessing cropped the original away.
        """
        if self.depth is None:
            raise VggtMvError("depth_at_original needs depth; this model has no depth head")
        if not (0 <= time < self.num_times and 0 <= view < self.num_views):
            raise VggtMvError(
                f"depth_at_original: frame (time {time}, view {view}) is outside of {self.num_times} times x "
                f"{self.num_views} views"
            )
        return np.asarray(self.transforms[view].map_to_original(self.depth[time, view]), dtype=np.float32)

    def valid_pixels(self) -> NDArray[np.bool_]:
        """[T, N, H, W] bool: True where the network saw the scene, False on padding."""
        masks = np.stack([np.asarray(transform.valid_mask(), dtype=bool) for transform in self.transforms])
        return np.broadcast_to(masks, (self.num_times, *masks.shape))

    def point_cloud(
        self,
        conf_percentile: float = DEFAULT_CONF_PERCENTILE,
        max_points: int | None = None,
        source: PointSource = "auto",
    ) -> PointCloud:
        """Points of all frames whose confidence reaches a percentile.

        Never among them: padding, points that are not finite, depths of 0 and below.

        Args:
            conf_percentile: in [0, 100): drop this share of the points, those of lowest confidence; 0 keeps all.
            max_points: keep at most this many, an even random choice that is the same every time.
            source: "depth" (unprojected depth), "points" (the point head), or "auto": depth where there is one.

        Raises:
            VggtMvError: an argument out of its range, or predictions that the model lacks.
        """
        check_percentile(conf_percentile)
        if max_points is not None and max_points < 1:
            raise VggtMvError(f"max_points must be at least 1, got {max_points}")
        points, confidence, keep = self.usable_points(source)
        threshold: float | None = None
        if confidence is not None and keep.any():
            threshold = float(np.percentile(confidence[keep], conf_percentile))
            keep &= confidence >= threshold
        index = np.flatnonzero(keep)
        if max_points is not None and len(index) > max_points:
            index = np.sort(np.random.default_rng(0).choice(index, max_points, replace=False))
        return self._cloud(index, points, confidence, threshold)

    def points_above(self, threshold: float | None, source: PointSource = "auto") -> PointCloud:
        """All usable points whose confidence reaches a threshold, or all of them; see ``point_cloud``."""
        points, confidence, keep = self.usable_points(source)
        if confidence is not None and threshold is not None:
            keep &= confidence >= threshold
        return self._cloud(np.flatnonzero(keep), points, confidence, threshold)

    def _cloud(
        self,
        index: NDArray[np.intp],
        points: NDArray[np.float32],
        confidence: NDArray[np.float32] | None,
        threshold: float | None,
    ) -> PointCloud:
        """The points at flat indices into the pixels of all frames."""
        height, width = self.network_size
        frame = index // (height * width)
        return PointCloud(
            points=np.ascontiguousarray(points.reshape(-1, 3)[index], dtype=np.float32),
            colors=self.images.reshape(-1, 3)[index],
            confidence=None if confidence is None else confidence.reshape(-1)[index].astype(np.float32),
            time=(frame // self.num_views).astype(np.uint16),
            view=(frame % self.num_views).astype(np.uint16),
            threshold=threshold,
        )

    def usable_points(
        self, source: PointSource = "auto"
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None, NDArray[np.bool_]]:
        """Points [T, N, H, W, 3], their confidence [T, N, H, W] if there is one, and which of them can be used.

        Not: padding, points and confidences that are not finite, depths of 0 and below.
        """
        points, confidence, keep = self._points(source)
        keep = keep & self.valid_pixels() & np.isfinite(points).all(axis=-1)
        if confidence is not None:
            keep &= np.isfinite(confidence)
        return points, confidence, keep

    def _points(self, source: PointSource) -> tuple[NDArray[np.float32], NDArray[np.float32] | None, NDArray[np.bool_]]:
        """Points [T,N,H,W,3], their confidence [T,N,H,W] if there is one, and which can be used [T,N,H,W]."""
        if source not in ("auto", "depth", "points"):
            raise VggtMvError(f"source must be 'auto', 'depth' or 'points', got {source!r}")
        has_depth = self.depth is not None and self.extrinsics is not None
        if source == "depth" or (source == "auto" and has_depth):
            if self.depth is None or not has_depth:
                raise VggtMvError(
                    "source='depth' needs depth and cameras; this model has no depth head or no camera head"
                )
            return self.points_from_depth, self.depth_conf, self.depth > 0
        if self.world_points is None:
            raise VggtMvError(f"source={source!r} needs world points; this model has no point head")
        return self.world_points, self.world_points_conf, np.ones(self.world_points.shape[:4], dtype=bool)

    def save(
        self,
        folder: str | Path,
        *,
        overwrite: bool = False,
        conf_percentile: float = DEFAULT_CONF_PERCENTILE,
        max_points: int | None = None,
        progress: ProgressCallback | None = None,
    ) -> Path:
        """Write predictions.npz, cameras.json, points.ply, depth/*.png, dynamic_mask/*.png, overview.png, report.json.

        All is written beside ``folder`` and renamed into place at the end: ``folder`` is complete or not there.

        Args:
            folder: must not exist or be empty, unless ``overwrite``.
            overwrite: replace an earlier output; anything else than an earlier output is refused.
            conf_percentile, max_points: see ``point_cloud``; they concern points.ply alone.
            progress: called with ("write", files done, files in all).

        Returns:
            The folder.

        Raises:
            VggtMvError: a folder that cannot be written, is not empty, or holds what this function did not write.
        """
        from vggt_mv.scene.export import output_folder, write_outputs

        check_percentile(conf_percentile)
        with output_folder(folder, overwrite=overwrite) as staging:
            write_outputs(self, staging, conf_percentile=conf_percentile, max_points=max_points, progress=progress)
        return Path(folder)


def check_percentile(conf_percentile: float) -> None:
    """Raise VggtMvError unless it lies in [0, 100)."""
    if not 0 <= conf_percentile < 100:
        raise VggtMvError(f"conf_percentile must be in [0, 100), got {conf_percentile}")
