"""cameras.json: every camera by name, in both directions, at network and at original resolution."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from vggt_mv.scene.reconstruction import Reconstruction

CAMERAS_FORMAT = "vggt_mv.cameras"
CONVENTION = {
    "axes": "OpenCV: x right, y down, z forward",
    "camera_from_world": "4 x 4; X_camera = R X_world + t",
    "world_from_camera": "4 x 4; the inverse: its last column is the camera's position in the world",
    "intrinsics": "3 x 3 in pixels; 'network' for the images as the network saw them, 'original' as they were given",
    "network_from_original": "3 x 3; original pixel (x, y, 1) to network pixel; whole numbers are pixel centres",
    "unit": "arbitrary, the same for all cameras, depths and points",
}


def cameras_dict(reconstruction: Reconstruction) -> dict[str, Any]:
    """The content of cameras.json. Matrices that are not finite become null (JSON knows no NaN)."""
    from vggt_mv.scene.export.report import weights_dict

    height, width = reconstruction.network_size
    return {
        "format": CAMERAS_FORMAT,
        "version": 1,
        "convention": CONVENTION,
        "weights": weights_dict(reconstruction),
        "network_size": {"height": height, "width": width},
        "views": [
            {
                "index": n,
                "name": reconstruction.view_names[n],
                "original_size": {"height": transform.original_size[0], "width": transform.original_size[1]},
                "network_from_original": transform.matrix.tolist(),
            }
            for n, transform in enumerate(reconstruction.transforms)
        ],
        "times": [
            {"index": t, "seconds": None if reconstruction.times is None else reconstruction.times[t]}
            for t in range(reconstruction.num_times)
        ],
        "cameras": list(camera_entries(reconstruction)),
    }


def camera_entries(reconstruction: Reconstruction, first_time: int = 0) -> Iterator[dict[str, Any]]:
    """The entries of "cameras"; ``first_time`` is what time 0 of the reconstruction is called."""
    extrinsics, intrinsics = reconstruction.extrinsics, reconstruction.intrinsics
    original, inverse = reconstruction.intrinsics_original, reconstruction.world_from_camera
    if extrinsics is None or intrinsics is None or original is None or inverse is None:
        raise ValueError("camera_entries: the reconstruction has no cameras")
    bottom = np.array([[0.0, 0.0, 0.0, 1.0]])
    for t in range(reconstruction.num_times):
        for n in range(reconstruction.num_views):
            yield {
                "time": first_time + t,
                "view": n,
                "view_name": reconstruction.view_names[n],
                "image": reconstruction.names[t][n],
                "camera_from_world": _matrix(np.concatenate([extrinsics[t, n], bottom])),
                "world_from_camera": _matrix(inverse[t, n]),
                "intrinsics": {"network": _matrix(intrinsics[t, n]), "original": _matrix(original[t, n])},
            }


def write_cameras(reconstruction: Reconstruction, path: Path) -> None:
    """Write cameras.json."""
    path.write_text(json.dumps(cameras_dict(reconstruction), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _matrix(matrix: Any) -> list[list[float]] | None:
    values = np.asarray(matrix, dtype=np.float64)
    return values.tolist() if np.isfinite(values).all() else None
