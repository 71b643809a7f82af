"""A synthetic scene on disk.

* ``time_XX/viewY.png``: the images; ``open_scene`` takes the folder.
* ``masks/time_XX/viewY.png``: 255 on bodies that move, 0 elsewhere.
* ``cameras.json``: cameras by time and view, both ways, and what is in the world.
* ``ground_truth.npz``: ``depth``, ``moving_mask``, ``object_ids``, ``world_points``, ``extrinsics``, ``intrinsics``,
  ``object_poses``, ``tracks``, ``visibility``, ``points3d``, ``track_objects``, ``times``, ``object_names``,
  ``object_moving``; shapes and units as in ``SyntheticScene``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vggt_mv.scene.export.folder import files_under, output_folder

if TYPE_CHECKING:
    from vggt_mv.scene.synthetic.scene import SyntheticScene

CAMERAS_NAME = "cameras.json"
CAMERAS_FORMAT = "vggt_mv.synthetic_scene"
_CONVENTION = {
    "world": "metres, z up, floor at z = 0",
    "axes": "OpenCV: x right, y down, z forward",
    "camera_from_world": "4 x 4; X_camera = R X_world + t",
    "world_from_camera": "4 x 4; the inverse: its last column is the camera's position in the world",
    "intrinsics": "3 x 3 in pixels; whole numbers are pixel centres",
}
_ARRAYS = (
    "depth",
    "moving_mask",
    "object_ids",
    "world_points",
    "extrinsics",
    "intrinsics",
    "object_poses",
    "tracks",
    "visibility",
    "points3d",
    "track_objects",
    "times",
)


def save_synthetic_scene(
    scene: SyntheticScene,
    folder: str | Path,
    *,
    overwrite: bool = False,
    on_frame: Callable[[int, int], None] | None = None,
) -> Path:
    """Write everything into a temporary folder beside ``folder``, then rename it. See ``SyntheticScene.save``.

    Returns:
        ``folder`` as a Path.
    """
    total = scene.num_times * scene.num_views
    digits = max(2, len(str(scene.num_times - 1)))
    images = np.round(_numpy(scene.images) * 255).astype(np.uint8).transpose(0, 1, 3, 4, 2)
    masks = _numpy(scene.moving_mask).astype(np.uint8) * 255
    with output_folder(folder, overwrite=overwrite, marker=CAMERAS_NAME, marker_format=CAMERAS_FORMAT) as staging:
        for index in range(total):
            t, n = divmod(index, scene.num_views)
            name = f"time_{t:0{digits}d}/view{n}.png"
            for root, pixels in ((staging, images[t, n]), (staging / "masks", masks[t, n])):
                path = root / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
            if on_frame is not None:
                on_frame(index + 1, total)
        arrays: dict[str, Any] = {name: _numpy(getattr(scene, name)) for name in _ARRAYS}
        arrays["object_names"] = np.array(scene.object_names)
        arrays["object_moving"] = np.array(scene.object_moving)
        np.savez_compressed(staging / "ground_truth.npz", **arrays)
        content = _cameras(scene, digits)
        content["files"] = [*files_under(staging), CAMERAS_NAME]
        (staging / CAMERAS_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return Path(folder)


def _cameras(scene: SyntheticScene, digits: int) -> dict[str, Any]:
    bottom = np.array([[0.0, 0.0, 0.0, 1.0]])
    extrinsics, intrinsics = _numpy(scene.extrinsics).astype(np.float64), _numpy(scene.intrinsics)
    cameras = []
    for t, n in np.ndindex(scene.num_times, scene.num_views):
        camera_from_world = np.concatenate([extrinsics[t, n], bottom])
        cameras.append(
            {
                "time": t,
                "view": n,
                "image": f"time_{t:0{digits}d}/view{n}.png",
                "camera_from_world": camera_from_world.tolist(),
                "world_from_camera": np.linalg.inv(camera_from_world).tolist(),
                "intrinsics": intrinsics[t, n].tolist(),
            }
        )
    return {
        "format": CAMERAS_FORMAT,
        "version": 1,
        "convention": _CONVENTION,
        "seed": scene.seed,
        "image_size": {"height": int(scene.images.shape[3]), "width": int(scene.images.shape[4])},
        "times": _numpy(scene.times).tolist(),
        "objects": [
            {"id": k, "name": name, "moving": moving}
            for k, (name, moving) in enumerate(zip(scene.object_names, scene.object_moving, strict=True))
        ],
        "cameras": cameras,
    }


def _numpy(values: Any) -> NDArray[Any]:
    return np.asarray(values.cpu() if hasattr(values, "cpu") else values)
