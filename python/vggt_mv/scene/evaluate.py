"""How far a reconstruction is from the truth, where that is known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vggt_mv.errors import VggtMvError

if TYPE_CHECKING:
    from vggt_mv.scene.reconstruction import Reconstruction


def compare_to_truth(reconstruction: Reconstruction, depth: ArrayLike, extrinsics: ArrayLike) -> dict[str, float]:
    """Errors of depth and cameras, after the one scale and the one pose that images cannot tell are taken out.

    The scale ``s`` is the median of true over predicted depth, over all frames at once; the pose is that of the first
    camera.

    Args:
        reconstruction: with depth and cameras.
        depth: [T, N, H0, W0], true depth at original resolution; pixels not finite or not above 0 are left out.
        extrinsics: [T, N, 3, 4], true cameras, camera from world.

    Returns:
        ``scale``: s;
        ``depth_median_relative_error``: median of ``|s d - d_true| / d_true``;
        ``depth_within_25_percent``: share of pixels with ``max(s d / d_true, d_true / (s d)) < 1.25``;
        ``rotation_median_degrees``, ``rotation_max_degrees``: angle between true and predicted rotation of each camera
        relative to the first one;
        ``position_median_relative_error``: median distance of each camera (relative to the first one, times s) from its
        true position, over the median true distance.

    Raises:
        VggtMvError: shapes that do not fit, one frame only, or no depth or cameras to compare.
    """
    true_depth, true_cameras = np.asarray(depth, dtype=np.float64), np.asarray(extrinsics, dtype=np.float64)
    grid = (reconstruction.num_times, reconstruction.num_views)
    if reconstruction.depth is None or reconstruction.extrinsics is None:
        raise VggtMvError("compare_to_truth needs depth and cameras; this model has no depth head or no camera head")
    size = reconstruction.transforms[0].original_size
    if true_depth.shape != (*grid, *size) or true_cameras.shape != (*grid, 3, 4):
        raise VggtMvError(
            f"compare_to_truth: depth must be {[*grid, *size]} and extrinsics {[*grid, 3, 4]}, got "
            f"{list(true_depth.shape)} and {list(true_cameras.shape)}"
        )
    if grid == (1, 1):
        raise VggtMvError("compare_to_truth needs at least two frames: cameras are compared relative to the first one")
    found = np.stack([[reconstruction.depth_at_original(t, n) for n in range(grid[1])] for t in range(grid[0])])
    usable = np.isfinite(found) & np.isfinite(true_depth) & (found > 0) & (true_depth > 0)
    if not usable.any():
        raise VggtMvError("compare_to_truth: no pixel has both a true and a predicted depth above 0")
    d, d_true = found[usable].astype(np.float64), true_depth[usable]
    scale = float(np.median(d_true / d))
    ratio = scale * d / d_true
    cameras = _relative_to_first(reconstruction.extrinsics.astype(np.float64))
    true = _relative_to_first(true_cameras)
    angles = rotation_angles(cameras[:, :, :3], true[:, :, :3])
    positions, true_positions = _positions(cameras), _positions(true)
    distances = np.linalg.norm(scale * positions - true_positions, axis=-1)
    baseline = np.median(np.linalg.norm(true_positions, axis=-1))
    result = {
        "scale": scale,
        "depth_median_relative_error": np.median(np.abs(ratio - 1)),
        "depth_within_25_percent": np.mean(np.maximum(ratio, 1 / ratio) < 1.25),
        "rotation_median_degrees": np.median(angles),
        "rotation_max_degrees": np.max(angles),
    }
    if baseline > 0:
        result["position_median_relative_error"] = np.median(distances) / baseline
    return {name: float(value) for name, value in result.items()}


def rotation_angles(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float64]:
    """Degrees between rotations [..., 3, 3]: ``2 asin(|A - B|_F / sqrt 8)``, exact for small angles, unlike acos."""
    chord = np.linalg.norm(first - second, axis=(-2, -1)) / np.sqrt(8)
    return np.asarray(np.degrees(2 * np.arcsin(np.clip(chord, 0, 1))))


def _relative_to_first(extrinsics: NDArray[np.float64]) -> NDArray[np.float64]:
    """[T, N, 3, 4] -> [T N - 1, 3, 4]: cameras in the coordinates of the first one, which is left out."""
    cameras = extrinsics.reshape(-1, 3, 4)
    rotation = cameras[:, :, :3] @ cameras[0, :, :3].T
    translation = cameras[:, :, 3:] - rotation @ cameras[0, :, 3:]
    return np.concatenate([rotation, translation], axis=-1)[1:]


def _positions(cameras: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centres [..., 3] of cameras [..., 3, 4]: ``-R^T t``."""
    return np.asarray(-(cameras[..., :3].swapaxes(-1, -2) @ cameras[..., 3:])[..., 0])
