"""compare_to_truth on reconstructions whose errors are known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vggt_mv.errors import VggtMvError
from vggt_mv.scene.evaluate import compare_to_truth, rotation_angles
from vggt_mv.scene.preprocess import view_transform
from vggt_mv.scene.reconstruction import Reconstruction
from vggt_mv.scene.synthetic import synthetic_scene

T, N, H, W = 2, 3, 28, 42


def rotation(axis: Any, degrees: float) -> np.ndarray[Any, Any]:
    """Rodrigues."""
    x, y, z = np.asarray(axis) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.radians(degrees)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


@pytest.fixture(scope="module")
def truth() -> Any:
    return synthetic_scene(T, N, H, W, antialias=1, num_tracks=0)


def perfect(truth: Any, **changes: Any) -> Reconstruction:
    """The truth, in another unit of length and another world."""
    world = np.eye(4)
    world[:3, :3], world[:3, 3] = rotation([1, 2, 3], 40), [5, 6, 7]
    cameras = np.concatenate([truth.extrinsics, np.broadcast_to([0, 0, 0, 1.0], (T, N, 1, 4))], axis=2) @ world
    cameras[:, :, :3, 3] *= 0.1
    fields: dict[str, Any] = {
        "images": np.zeros((T, N, H, W, 3), dtype=np.uint8),
        "names": [["a"] * N] * T,
        "view_names": ["a"] * N,
        "transforms": [view_transform((H, W), image_size=W)] * N,
        "weights": SimpleNamespace(family="vggt", description="", sources=()),
        "depth": (0.1 * truth.depth).astype(np.float32),
        "extrinsics": cameras[:, :, :3].astype(np.float32),
        "intrinsics": truth.intrinsics,
    }
    return Reconstruction(**{**fields, **changes})


def test_the_truth_has_no_error_in_any_unit_and_any_world(truth: Any) -> None:
    result = compare_to_truth(perfect(truth), truth.depth, truth.extrinsics)
    assert result["scale"] == pytest.approx(10, rel=1e-5)
    assert result["depth_median_relative_error"] < 1e-5
    assert result["depth_within_25_percent"] == 1
    assert result["rotation_max_degrees"] < 1e-3
    assert result["position_median_relative_error"] < 1e-4


def test_known_errors_are_found(truth: Any) -> None:
    depth = (0.1 * truth.depth).astype(np.float32)
    depth[0, 1] *= 1.3  # one frame of six: the median scale stays
    cameras = perfect(truth).extrinsics
    assert cameras is not None
    cameras[1:] = rotation([0, 1, 1], 3) @ cameras[1:]  # three of the five that are compared
    result = compare_to_truth(perfect(truth, depth=depth, extrinsics=cameras), truth.depth, truth.extrinsics)
    assert result["depth_within_25_percent"] == pytest.approx(5 / 6, abs=1e-6)
    assert result["rotation_median_degrees"] == pytest.approx(3, abs=1e-3)
    # A camera that is turned after X_camera = R X + t stays where it is.
    assert result["position_median_relative_error"] < 1e-4


@pytest.mark.parametrize("degrees", [0, 1e-4, 1, 90, 179, 180])
def test_rotation_angles(degrees: float) -> None:
    base = rotation([3, 1, 2], 77)
    assert rotation_angles(rotation([1, 1, 0], degrees) @ base, base) == pytest.approx(degrees, rel=1e-6, abs=1e-12)


def test_bad_arguments(truth: Any, tmp_path: Path) -> None:
    with pytest.raises(
        VggtMvError, match=r"depth must be \[2, 3, 28, 42\] and extrinsics \[2, 3, 3, 4\], got \[2, 3, 28, 41\]"
    ):
        compare_to_truth(perfect(truth), truth.depth[..., 1:], truth.extrinsics)
    with pytest.raises(VggtMvError, match="needs depth and cameras"):
        compare_to_truth(perfect(truth, depth=None), truth.depth, truth.extrinsics)
    with pytest.raises(VggtMvError, match="no pixel has both"):
        compare_to_truth(perfect(truth), np.zeros_like(truth.depth), truth.extrinsics)
